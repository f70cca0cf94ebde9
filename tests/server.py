"""A local web server for the tests. It serves files as a good server does (ranges, entity tags), and
misbehaves when told to.

    with Server({"/host/file.bin": b"..."}) as server:
        server.misbehave("/host/file.bin", {"drop": 1000}, {"status": 503, "headers": {"Retry-After": "1"}})
        ... a script with SCGENEPT_MIRROR=server.url in its environment ...
        server.requests  # what was asked for: time, method, path (with query), headers, body

A fault is a dict, for one request; the keys can be combined:
    status, headers, body   the answer, or the part of it that differs from the good one
    drop      N             the connection ends after N bytes of the body (-1: before the status line)
    length    N             Content-Length says N whatever the body's length
    stall     S             nothing comes for S seconds, at the place of the drop or before the body
    no_range  True          Range is ignored
"""
import hashlib
import http.server
import itertools
import re
import threading
import time
from types import SimpleNamespace
from urllib.parse import unquote


class Server:
    """Serves `files`, {path: bytes} with or without the query in the path. What `hook(method, path, headers,
    body)` answers with (status, headers, body) comes first; where it returns None, the files' turn comes."""

    def __init__(self, files=(), hook=None):
        self.files, self.hook, self.faults, self.requests = dict(files), hook, {}, []
        self.closing = threading.Event()
        handler = type("Handler", (Handler,), {"server_of": self})
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"

    def misbehave(self, path, *faults, always=False):
        """The next requests for `path` meet one fault each, in this order; with `always` for ever."""
        self.faults[path] = itertools.cycle(faults) if always else iter(faults)

    def asked(self, path):
        """The requests for `path` so far."""
        return [request for request in self.requests if request.path.split("?")[0] == path]

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.http.shutdown()
        self.http.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self):
        """Note the request, find the good answer, and send what the fault makes of it."""
        server = self.server_of
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.requests.append(SimpleNamespace(time=time.time(), method=self.command, path=self.path,
                                               headers=dict(self.headers), body=body))
        bare = self.path.split("?")[0]
        faults = server.faults.get(self.path, server.faults.get(bare, iter(())))
        fault = next(faults, {})
        hooked = server.hook and server.hook(self.command, self.path, self.headers, body)
        status, headers, content = hooked or self.from_files(fault)
        self.send(fault.get("status", status), headers, fault.get("body", content), fault)

    def from_files(self, fault):
        """Status, headers and body of the file that is asked for, or of the part that is."""
        bare = self.path.split("?")[0]
        places = self.path, unquote(self.path), bare, unquote(bare)
        found = [self.server_of.files[place] for place in places if place in self.server_of.files]
        if not found:
            return 404, {}, b"no such file\n"
        etag = f'"{hashlib.sha256(found[0]).hexdigest()[:16]}"'
        headers = {"ETag": etag, "Accept-Ranges": "bytes", **fault.get("headers", {})}
        return self.ranged(headers, found[0], fault)

    def ranged(self, headers, content, fault):
        """The rest of the file where a Range is asked for, and If-Range names this version or none."""
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        versions = None, headers.get("ETag"), headers.get("Last-Modified")
        if not wanted or fault.get("no_range") or self.headers.get("If-Range") not in versions:
            return 200, headers, content
        start = int(wanted[1])
        if start >= len(content):
            return 416, {**headers, "Content-Range": f"bytes */{len(content)}"}, b""
        part = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return 206, {**headers, "Content-Range": part}, content[start:]

    def send(self, status, headers, content, fault):
        """Send an answer, up to the place where the connection ends or falls silent."""
        self.close_connection = True
        if fault.get("drop", 0) < 0:
            return
        length = str(fault.get("length", len(content)))
        headers = {"Content-Type": "application/octet-stream", "Content-Length": length, **headers,
                   **fault.get("headers", {}), "Connection": "close"}
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

        first = fault.get("drop", 0 if "stall" in fault else len(content))
        self.wfile.write(content[:first])
        if "stall" in fault:
            self.wfile.flush()
            self.server_of.closing.wait(fault["stall"])
            if "drop" not in fault:
                self.wfile.write(content[first:])

    do_GET = do_POST = do_HEAD = answer

    def log_message(self, *_):
        pass

    def handle(self):
        try:
            super().handle()
        except ConnectionError:  # a client that was killed
            pass
