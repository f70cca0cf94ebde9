"""A local web server for the tests. It serves files as a good server does (ranges, entity tags), and misbehaves on request.

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
    """Serves `files`, {path: bytes} with or without the query in the path; what `hook(method, path, headers, body)` answers
    with (status, headers, body) comes first, with None the files' turn comes."""

    def __init__(self, files=(), hook=None):
        self.files, self.hook, self.faults, self.requests = dict(files), hook, {}, []
        self.closing = threading.Event()
        handler = type("Handler", (Handler,), {"server_of": self})
        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/"

    def misbehave(self, path, *faults, always=False):
        """The next requests for `path` meet one fault each, in this order; with `always` the same ones for ever."""
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
        server = self.server_of
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.requests.append(SimpleNamespace(time=time.time(), method=self.command, path=self.path,
                                               headers=dict(self.headers), body=body))
        bare = self.path.split("?")[0]
        fault = next(server.faults.get(self.path, server.faults.get(bare, iter(()))), {})
        hooked = server.hook and server.hook(self.command, self.path, self.headers, body)
        if hooked:
            status, headers, content = hooked
        else:
            places = self.path, unquote(self.path), bare, unquote(bare)
            found = [server.files[place] for place in places if place in server.files]
            content = found[0] if found else b"no such file\n"
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()[:16]}"', "Accept-Ranges": "bytes"} if found else {}
            status = 200 if found else 404
            status, headers, content = self.ranged(status, {**headers, **fault.get("headers", {})}, content, fault)
        status, content = fault.get("status", status), fault.get("body", content)
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(fault.get("length", len(content))),
                   **headers, **fault.get("headers", {})}
        self.close_connection = True
        if fault.get("drop", 0) < 0:
            return
        self.send_response(status)
        for name, value in {**headers, "Connection": "close"}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        first = fault.get("drop", 0 if "stall" in fault else len(content))
        self.wfile.write(content[:first])
        if "stall" in fault:
            self.wfile.flush()
            server.closing.wait(fault["stall"])
            if "drop" not in fault:
                self.wfile.write(content[first:])

    def ranged(self, status, headers, content, fault):
        """The part of the file that is asked for, where If-Range names this version of it."""
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if status != 200 or not wanted or fault.get("no_range"):
            return status, headers, content
        if self.headers.get("If-Range") not in (None, headers.get("ETag"), headers.get("Last-Modified")):
            return status, headers, content
        start = int(wanted[1])
        if start >= len(content):
            return 416, {**headers, "Content-Range": f"bytes */{len(content)}"}, b""
        return 206, {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}, content[start:]

    do_GET = do_POST = do_HEAD = answer

    def log_message(self, *_):
        pass

    def handle(self):
        try:
            super().handle()
        except ConnectionError:  # a client that was killed
            pass
