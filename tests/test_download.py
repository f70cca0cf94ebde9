"""The download that all stages share, against a server that misbehaves: every fault ends with the whole file, or with one
line that names the address, the cause and what to do."""
import hashlib
import importlib
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
shared = importlib.import_module("01_fetch_annotations")
DATA = random.Random(1).randbytes(300_000)
OTHER = random.Random(2).randbytes(300_000)
URL, PLACE = "https://example.org/data/file.bin", "/example.org/data/file.bin"

pytestmark = pytest.mark.usefixtures("impatient")


@pytest.fixture
def server(monkeypatch):
    with Server({PLACE: DATA}) as server:
        monkeypatch.setenv("SCGENEPT_MIRROR", server.url)
        yield server


def error_of(url, path, **known):
    """The line that a download ends the run with, or None if it succeeds."""
    try:
        shared.download(url, path, **known)
    except SystemExit as error:
        assert error.code.startswith("error: ") and "file.bin: " in error.code and "\n" not in error.code
        return error.code


def start(path):
    """A process that downloads URL."""
    code = ("import importlib, sys; stage = importlib.import_module('01_fetch_annotations'); stage.BACKOFF = 0.01; "
            "stage.run(lambda: stage.download(sys.argv[1], sys.argv[2]))")
    return subprocess.Popen([sys.executable, "-c", code, URL, str(path)], env={**os.environ, "PYTHONPATH": str(ROOT)},
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process):
    output, errors = process.communicate(timeout=60)
    return process.returncode, output, errors


def until_part_has(path, n_bytes):
    part = Path(f"{path}.part")
    for _ in range(1000):
        if part.exists() and part.stat().st_size >= n_bytes:
            return
        time.sleep(0.01)
    raise AssertionError("waited for too long")


def leftovers(path):
    """What stands beside a file, its checksum and its lock aside."""
    return sorted(p.name for p in path.parent.iterdir() if p.name.removeprefix(path.name) not in ("", ".sha256", ".lock"))


# ---------------------------------------------------------------------------------------------------------------------
# The good case

def test_a_file_arrives_whole_with_its_sha256_printed_and_kept_and_nothing_else_beside_it(server, tmp_path):
    path = tmp_path / "new folder" / "file.bin"
    code, output, errors = finish(start(path))
    digest = hashlib.sha256(DATA).hexdigest()
    assert (code, errors) == (0, "")  # no progress bar where stderr is no terminal
    assert path.read_bytes() == DATA and digest in output and leftovers(path) == []
    assert Path(f"{path}.sha256").read_text() == f"{digest}  file.bin\n"


def test_a_file_that_is_there_needs_no_network(server, tmp_path):
    (tmp_path / "file.bin").write_bytes(b"as it is")
    assert shared.download(URL, tmp_path / "file.bin") == tmp_path / "file.bin"
    assert server.requests == [] and (tmp_path / "file.bin").read_bytes() == b"as it is"


def test_the_mirror_is_asked_for_host_path_and_query(server, tmp_path):
    server.files["/example.org/a%2Bb?format=tsv&query=%28x%20y%29"] = OTHER
    shared.download("https://example.org/a%2Bb?format=tsv&query=%28x%20y%29", tmp_path / "file.bin")
    assert (tmp_path / "file.bin").read_bytes() == OTHER


def test_the_password_of_a_mirror_is_not_shown(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SCGENEPT_MIRROR", server.url.replace("http://", "http://me:secret@"))
    server.misbehave(PLACE, {"status": 404})
    assert "secret" not in error_of(URL, tmp_path / "file.bin") + capsys.readouterr().out
    assert "Authorization" in server.requests[0].headers


def test_all_addresses_in_the_scripts_are_https():
    for script in ROOT.glob("0*.py"):
        addresses = re.findall(r'"(\w+)://[\w-]+\.[\w-]', script.read_text(encoding="utf-8"))
        assert set(addresses) <= {"https"}, script


def test_every_request_says_that_it_comes_from_the_kit(tmp_path, monkeypatch):
    """Some servers refuse what requests calls itself unless told otherwise."""
    def no_python_requests(method, path, headers, body):
        if headers.get("User-Agent", "").startswith("python-requests"):
            return 403, {}, b"no robots\n"
    with Server({PLACE: DATA, "/example.org/list": b"[1]"}, no_python_requests) as server:
        monkeypatch.setenv("SCGENEPT_MIRROR", server.url)
        server.misbehave(PLACE, {"drop": 100_000}, {"status": 302, "headers": {"Location": PLACE}})
        shared.download(URL, tmp_path / "file.bin")
        shared.request("https://example.org/list", method="POST", data={"a": 1}).close()
    assert {request.headers["User-Agent"] for request in server.requests} == {"scgenept-kit/1"}
    assert len(server.requests) == 4


def test_known_size_and_checksums_are_accepted(server, tmp_path):
    known = {"size": len(DATA), "md5": hashlib.md5(DATA).hexdigest()}
    assert error_of(URL, tmp_path / "file.bin", **known) is None


# ---------------------------------------------------------------------------------------------------------------------
# Faults that pass

DATE = "Wed, 17 Jan 2024 00:00:00 GMT"
PASSING = {
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
    "a version by date": [{"drop": 100_000, "headers": {"ETag": None, "Last-Modified": DATE}}],
    "no length, no end": [{"drop": 100_000, "headers": {"Content-Length": None}}],
    "range refused": [{"drop": 100_000}, {"status": 416, "body": b""}],
    "another range": [{"drop": 100_000}, {"headers": {"Content-Range": "bytes 5-299999/300000"}}],
    "429": [{"status": 429}],
    "500, 502, 503": [{"status": 500}, {"status": 502}, {"status": 503}],
    "nothing before the body": [{"stall": 9}],
    "nothing in mid-body": [{"stall": 9, "drop": 100_000}],
    "moved": [{"status": 302, "headers": {"Location": PLACE + "?moved"}}],
}


@pytest.mark.parametrize("name", PASSING)
def test_after_a_fault_that_passes_the_file_is_whole(server, tmp_path, name):
    server.misbehave(PLACE, *PASSING[name])
    path = tmp_path / "file.bin"
    known = {"size": len(DATA)} if name == "no length, no end" else {}
    assert error_of(URL, path, **known) is None
    assert path.read_bytes() == DATA and leftovers(path) == []


def test_connections_dropped_at_random_offsets_lose_nothing(server, tmp_path):
    rng = random.Random(3)
    for i in range(20):
        content = rng.randbytes(rng.randrange(1, 400_000))
        server.files[f"/example.org/{i}"] = content
        server.misbehave(f"/example.org/{i}", *({"drop": rng.randrange(-1, len(content) + 1)} for _ in range(3)))
        assert error_of(f"https://example.org/{i}", tmp_path / str(i)) is None
        assert (tmp_path / str(i)).read_bytes() == content


def test_a_dropped_connection_is_continued_where_it_ended_if_the_file_is_the_same(server, tmp_path):
    server.misbehave(PLACE, {"drop": 100_000}, {"drop": 50_000})
    shared.download(URL, tmp_path / "file.bin")
    first, second, third = server.requests
    assert "Range" not in first.headers
    assert [r.headers["Range"] for r in (second, third)] == ["bytes=100000-", "bytes=150000-"]
    assert second.headers["If-Range"] == third.headers["If-Range"] == f'"{hashlib.sha256(DATA).hexdigest()[:16]}"'


def test_the_wait_that_a_server_asks_for_is_kept(server, tmp_path):
    server.misbehave(PLACE, {"status": 503, "headers": {"Retry-After": "1"}})
    shared.download(URL, tmp_path / "file.bin")
    first, second = server.requests
    assert second.time - first.time >= 1


# ---------------------------------------------------------------------------------------------------------------------
# Faults that stay

REFUSED = {  # name: (fault, what the error says)
    "401": ({"status": 401}, "401"),
    "403": ({"status": 403}, "403"),
    "404": ({"status": 404}, "404"),
    "a challenge": ({"status": 202, "body": b"", "headers": {"x-amzn-waf-action": "challenge"}}, "202"),
    "a captcha": ({"status": 405, "headers": {"Content-Type": "text/html"}}, "405"),
    "a web page by its type": ({"headers": {"Content-Type": "text/html; charset=utf-8"}}, "web page"),
    "a web page by its beginning": ({"body": b"\n<!DOCTYPE html><title>Sign in</title>"}, "web page"),
    "another web page": ({"body": b"<HTML><h1>It works!</h1></HTML>"}, "web page"),
    "nothing": ({"body": b""}, "an empty file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_the_server_refuses_a_program_a_person_can_put_the_file_there(server, tmp_path, name):
    fault, words = REFUSED[name]
    path = tmp_path / "file.bin"
    server.misbehave(PLACE, fault, always=True)
    error = error_of(URL, path)
    assert f"{server.url}example.org/data/file.bin: " in error and words in error
    assert f"download it with a browser, save it as {path} and run the same command again" in error
    assert len(server.requests) == 1 and not path.exists()
    path.write_bytes(DATA)
    assert error_of(URL, path) is None and len(server.requests) == 1


STAYING = {  # name: (fault, what the error says, requests that the server sees)
    "a length that is always too large": ({"length": 10**18}, "the connection broke", 6),
    "503 for ever": ({"status": 503}, "503", 6),
    "always dropped": ({"drop": 0}, "the connection broke", 6),
    "dropped before the status": ({"drop": -1}, "closed connection", 6),
    "redirects for ever": ({"status": 302, "headers": {"Location": PLACE}}, "redirects", 31),
}


@pytest.mark.parametrize("name", STAYING)
def test_a_fault_that_stays_ends_in_one_line(server, tmp_path, name):
    fault, words, n_requests = STAYING[name]
    server.misbehave(PLACE, fault, always=True)
    assert words in error_of(URL, tmp_path / "file.bin")
    assert len(server.requests) == n_requests and not (tmp_path / "file.bin").exists()


@pytest.mark.parametrize("known", [{"size": 299_999}, {"md5": "0" * 32}], ids=lambda k: next(iter(k)))
def test_a_file_that_is_not_the_one_known_is_refused_and_not_kept(server, tmp_path, known):
    assert "expected" in error_of(URL, tmp_path / "file.bin", **known)
    assert [p.name for p in tmp_path.iterdir()] == ["file.bin.lock"]


def test_a_server_that_nobody_runs_is_named_in_one_line(server, tmp_path):
    server.__exit__()
    path = tmp_path / "file.bin"
    assert error_of(URL, path).endswith(f"Connection refused; download it with a browser, save it as {path} and run the "
                                        "same command again")


@pytest.mark.skipif(sys.platform == "win32", reason="no file-size limits there")
def test_a_full_disk_ends_in_one_line_and_the_same_command_goes_on(server, tmp_path):
    import resource
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))  # inherited by the process
    try:
        process = start(tmp_path / "file.bin")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    code, _, errors = finish(process)
    assert code == 1 and errors == f"error: {tmp_path / 'file.bin'}: File too large; the same command goes on from here\n"
    assert error_of(URL, tmp_path / "file.bin") is None
    assert (tmp_path / "file.bin").read_bytes() == DATA and "Range" in server.requests[1].headers


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, and killed ones

def test_a_download_that_was_killed_goes_on_from_there_and_its_lock_holds_nobody_up(server, tmp_path):
    path = tmp_path / "file.bin"
    server.misbehave(PLACE, {"drop": 200_000, "stall": 60})
    process = start(path)
    until_part_has(path, 100_000)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = path.with_name("file.bin.part").stat().st_size
    assert not path.exists()
    assert finish(start(path))[0] == 0
    assert server.requests[1].headers["Range"] == f"bytes={kept}-"
    assert path.read_bytes() == DATA and leftovers(path) == []


def test_two_at_once_download_once_and_both_have_it(server, tmp_path):
    path = tmp_path / "file.bin"
    server.misbehave(PLACE, {"drop": 200_000, "stall": 60})
    processes = [start(path)]
    until_part_has(path, 100_000)
    processes.append(start(path))
    time.sleep(1)  # the second one comes to the lock
    server.closing.set()  # the first one goes on
    assert [finish(process)[0] for process in processes] == [0, 0]
    assert path.read_bytes() == DATA and leftovers(path) == []
    assert len(server.requests) == 2  # the dropped one and its continuation
