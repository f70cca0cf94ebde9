"""The download that all stages share, as real processes against a server that misbehaves: every fault ends with the whole
file or with one line that names address, file and cause, and exit code 1."""
import email.utils
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from server import Server

ROOT = Path(__file__).parent.parent
DATA = random.Random(1).randbytes(300_000)
URL, PLACE = "https://example.org/data/file.bin", "/example.org/data/file.bin"
CALL = """
import importlib, json, sys
stage = importlib.import_module("01_fetch_annotations")
known = json.loads(sys.argv[1])
stage.run(lambda: [stage.download(url, path, **known) for url, path in zip(sys.argv[2::2], sys.argv[3::2])])
"""


@pytest.fixture
def server():
    with Server({PLACE: DATA}) as server:
        yield server


def start(server, *places, patience=0.03, **known):
    """A process that downloads (url, path) pairs one after the other."""
    environment = {**os.environ, "SCGENEPT_MIRROR": server.url, "SCGENEPT_PATIENCE": str(patience), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", CALL, json.dumps(known), *map(str, places)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def fails(result):
    """The one line that a failed run ends with."""
    code, _, errors = result
    assert code == 1 and "Traceback" not in errors
    last = errors.splitlines()[-1]
    assert last.startswith("error: ") and "/data/file.bin -> " in last
    return last


def until(condition):
    for _ in range(600):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited for too long")


def leftovers(path):
    return sorted(p.name for p in path.parent.iterdir() if p.name not in (path.name, f"{path.name}.sha256"))


def test_a_file_arrives_whole_with_its_sha256_printed_and_kept_and_nothing_beside_it(server, tmp_path):
    path = tmp_path / "new folder" / "file.bin"
    code, output, errors = finish(start(server, URL, path))
    digest = hashlib.sha256(DATA).hexdigest()
    assert (code, errors) == (0, "")  # no progress bar where stderr is no terminal
    assert path.read_bytes() == DATA and digest in output and leftovers(path) == []
    assert Path(f"{path}.sha256").read_text() == f"{digest}  file.bin\n"


def test_a_file_that_is_there_needs_no_network(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"as it is")
    assert finish(start(server, URL, tmp_path / "file.bin"))[0] == 0
    assert server.requests == [] and (tmp_path / "file.bin").read_bytes() == b"as it is"


def test_the_mirror_is_asked_for_host_path_and_query(tmp_path):
    with Server({"/example.org/a%2Bb?format=tsv&query=%28x%20y%29": DATA}) as server:
        finish(start(server, "https://example.org/a%2Bb?format=tsv&query=%28x%20y%29", tmp_path / "file.bin"))
    assert (tmp_path / "file.bin").read_bytes() == DATA


def test_all_addresses_in_the_scripts_are_https():
    for script in ROOT.glob("0*.py"):
        addresses = re.findall(r'"(\w+)://[\w-]+\.[\w-]', script.read_text(encoding="utf-8"))
        assert set(addresses) <= {"https"}, script


OTHER = random.Random(2).randbytes(300_000)
RECOVERABLE = {
    "dropped before the status": [{"drop": -1}],
    "dropped before the body": [{"drop": 0}],
    "dropped after a byte": [{"drop": 1}],
    "dropped inside a chunk": [{"drop": 65_535}],
    "dropped between chunks": [{"drop": 65_536}],
    "dropped before the last byte": [{"drop": len(DATA) - 1}],
    "dropped again and again": [{"drop": 30_000}] * 9,
    "a length that is too large": [{"length": len(DATA) + 1}],
    "a length that is too large, then no ranges": [{"length": len(DATA) + 1}, {"no_range": True}],
    "ranges ignored": [{"drop": 100_000}, {"no_range": True}],
    "ranges ignored, dropped twice": [{"drop": 100_000}, {"no_range": True, "drop": 50_000}],
    "another version meanwhile": [{"drop": 100_000, "headers": {"ETag": '"old"'}, "body": OTHER}],
    "no version named": [{"drop": 100_000, "headers": {"ETag": None}}],
    "a weak version": [{"drop": 100_000, "headers": {"ETag": 'W/"x"'}}],
    "a version by date": [{"drop": 100_000, "headers": {"ETag": None, "Last-Modified": "Wed, 17 Jan 2024 00:00:00 GMT"}}],
    "no length, no end": [{"drop": 100_000, "headers": {"Content-Length": None}}],
    "range refused": [{"drop": 100_000}, {"status": 416, "body": b""}],
    "another range": [{"drop": 100_000}, {"headers": {"Content-Range": "bytes 5-299999/300000"}}],
    "429": [{"status": 429}],
    "500, 502, 503": [{"status": 500}, {"status": 502}, {"status": 503}],
    "nothing before the body": [{"stall": 9}],
    "nothing in mid-body": [{"stall": 9, "drop": 100_000}],
    "moved": [{"status": 302, "headers": {"Location": PLACE + "?moved"}}],
}


@pytest.mark.parametrize("name", RECOVERABLE)
def test_after_a_fault_the_file_is_whole(server, tmp_path, name):
    server.misbehave(PLACE, *RECOVERABLE[name])
    path = tmp_path / "file.bin"
    known = {"size": len(DATA)} if name == "no length, no end" else {}
    code, _, errors = finish(start(server, URL, path, **known))
    assert code == 0, errors
    assert path.read_bytes() == DATA and leftovers(path) == []


def test_connections_dropped_at_random_offsets_lose_nothing(tmp_path):
    rng = random.Random(3)
    files = {f"/example.org/{i}": rng.randbytes(rng.randrange(1, 400_000)) for i in range(20)}
    with Server(files) as server:
        for place, content in files.items():
            server.misbehave(place, *({"drop": rng.randrange(-1, len(content) + 1)} for _ in range(3)))
        places = [p for i in range(20) for p in (f"https://example.org/{i}", tmp_path / str(i))]
        code, _, errors = finish(start(server, *places))
    assert code == 0, errors
    assert [(tmp_path / str(i)).read_bytes() for i in range(20)] == list(files.values())


def test_a_dropped_connection_is_continued_where_it_ended_if_the_file_is_the_same(server, tmp_path):
    server.misbehave(PLACE, {"drop": 100_000}, {"drop": 50_000})
    finish(start(server, URL, tmp_path / "file.bin"))
    first, second, third = server.requests
    assert "Range" not in first.headers
    assert [r.headers["Range"] for r in (second, third)] == ["bytes=100000-", "bytes=150000-"]
    assert second.headers["If-Range"] == third.headers["If-Range"] == f'"{hashlib.sha256(DATA).hexdigest()[:16]}"'


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_honoured(server, tmp_path, form):
    until_then = "2" if form == "seconds" else email.utils.formatdate(time.time() + 3, usegmt=True)  # whole seconds
    server.misbehave(PLACE, {"status": 503, "headers": {"Retry-After": until_then}})
    assert finish(start(server, URL, tmp_path / "file.bin"))[0] == 0
    first, second = server.requests
    assert second.time - first.time >= (2 if form == "seconds" else 1)


FATAL = {  # name: (fault, what the error says, requests that the server sees)
    "404": ({"status": 404}, "404", 1),
    "401": ({"status": 401}, "401", 1),
    "403": ({"status": 403}, "403", 1),
    "a web page by its type": ({"headers": {"Content-Type": "text/html; charset=utf-8"}}, "web page", 1),
    "a web page by its beginning": ({"body": b"\n<!DOCTYPE html><title>Sign in</title>"}, "web page", 1),
    "another web page": ({"body": b"<HTML><h1>It works!</h1></HTML>"}, "web page", 1),
    "nothing": ({"body": b""}, "empty", 1),
    "larger than any disk": ({"length": 10**18}, "disk space", 1),
    "a wait of a day": ({"status": 503, "headers": {"Retry-After": "86400"}}, "86,400 s", 1),
    "503 for ever": ({"status": 503}, "503", 6),
    "always dropped": ({"drop": 0}, "IncompleteRead", 6),
    "redirects for ever": ({"status": 302, "headers": {"Location": PLACE}}, "redirects", 31),
}


@pytest.mark.parametrize("name", FATAL)
def test_a_fault_that_stays_ends_in_one_line(server, tmp_path, name):
    fault, words, n_requests = FATAL[name]
    server.misbehave(PLACE, fault, always=True)
    assert words in fails(finish(start(server, URL, tmp_path / "file.bin")))
    assert len(server.requests) == n_requests and not (tmp_path / "file.bin").exists()


@pytest.mark.parametrize("known", [{"size": 299_999}, {"sha256": "0" * 64}, {"md5": "0" * 32}], ids=lambda k: next(iter(k)))
def test_a_file_that_is_not_the_one_known_is_refused_and_not_kept(server, tmp_path, known):
    assert "expected" in fails(finish(start(server, URL, tmp_path / "file.bin", **known)))
    assert list(tmp_path.iterdir()) == []


def test_known_size_and_checksums_are_accepted(server, tmp_path):
    known = {"size": len(DATA), "sha256": hashlib.sha256(DATA).hexdigest(), "md5": hashlib.md5(DATA).hexdigest()}
    assert finish(start(server, URL, tmp_path / "file.bin", **known))[0] == 0


def test_a_server_that_nobody_runs_is_named_in_one_line(server, tmp_path):
    server.__exit__()
    assert "refused" in fails(finish(start(server, URL, tmp_path / "file.bin")))


def test_killed_in_mid_download_it_goes_on_from_there(server, tmp_path):
    path = tmp_path / "file.bin"
    server.misbehave(PLACE, {"drop": 200_000, "stall": 60})
    process = start(server, URL, path)
    until(lambda: path.with_name("file.bin.part").exists() and path.with_name("file.bin.part").stat().st_size > 100_000)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = path.with_name("file.bin.part").stat().st_size
    assert not path.exists()
    assert finish(start(server, URL, path))[0] == 0
    assert server.requests[1].headers["Range"] == f"bytes={kept}-"
    assert path.read_bytes() == DATA and leftovers(path) == []


def test_two_at_once_download_once_and_both_have_it(server, tmp_path):
    server.misbehave(PLACE, {"drop": 200_000, "stall": 1})
    processes = [start(server, URL, tmp_path / "file.bin", patience=0.3) for _ in range(2)]
    assert [finish(process)[0] for process in processes] == [0, 0]
    assert (tmp_path / "file.bin").read_bytes() == DATA and leftovers(tmp_path / "file.bin") == []
    assert len(server.requests) == 2  # the dropped one and its continuation


def test_a_process_that_was_stopped_and_overtaken_leaves_the_file_alone(server, tmp_path):
    path = tmp_path / "file.bin"
    server.misbehave(PLACE, {"drop": 200_000, "stall": 3})
    stopped = start(server, URL, path)
    until(lambda: path.with_name("file.bin.part").exists() and path.with_name("file.bin.part").stat().st_size > 100_000)
    os.kill(stopped.pid, signal.SIGSTOP)
    assert finish(start(server, URL, path))[0] == 0
    os.kill(stopped.pid, signal.SIGCONT)
    finish(stopped)
    assert path.read_bytes() == DATA


@pytest.mark.skipif(sys.platform == "win32", reason="no file-size limits there")
def test_a_full_disk_ends_in_one_line_and_the_same_command_goes_on(server, tmp_path):
    import resource
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # inherited by the process
    try:
        process = start(server, URL, tmp_path / "file.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert "goes on from here" in fails(finish(process))
    assert finish(start(server, URL, tmp_path / "file.bin"))[0] == 0
    assert (tmp_path / "file.bin").read_bytes() == DATA and "Range" in server.requests[1].headers
