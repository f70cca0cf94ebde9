"""The download that all stages share, against a server that misbehaves: every fault ends with the whole file,
or with one line that names the address, the cause and what to do."""
import hashlib
import importlib
import os
import random
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import KIT, full_disk, until
from server import Server

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


@pytest.fixture
def path(tmp_path):
    return tmp_path / "file.bin"


def error_of(path, **known):
    """The line that a download of URL ends the run with."""
    with pytest.raises(SystemExit) as caught:
        shared.download(URL, path, **known)
    words = caught.value.code
    assert words.startswith("error: ") and "\n" not in words
    assert "file.bin: " in words
    return words


def start(path):
    """A process that downloads URL."""
    code = ("import importlib, sys; stage = importlib.import_module('01_fetch_annotations'); "
            "stage.BACKOFF = 0.01; stage.run(lambda: stage.download(sys.argv[1], sys.argv[2]))")
    return subprocess.Popen([sys.executable, "-c", code, URL, str(path)],
                            env={**os.environ, "PYTHONPATH": str(KIT)}, stdout=subprocess.DEVNULL)


def until_part_has(path, n_bytes):
    part = Path(f"{path}.part")
    until(lambda: part.exists() and part.stat().st_size >= n_bytes)


def leftovers(path):
    """What stands beside a file, its checksum and its lock aside."""
    expected = {path.name, f"{path.name}.sha256", f"{path.name}.lock"}
    return sorted({file.name for file in path.parent.iterdir()} - expected)


# ----------------------------------------------------------------------------------------------------------
# The good case

def test_a_file_arrives_whole_with_its_sha256_and_nothing_else_beside_it(server, tmp_path, capsys):
    path = tmp_path / "new folder" / "file.bin"
    shared.download(URL, path)
    printed = capsys.readouterr()
    digest = hashlib.sha256(DATA).hexdigest()
    assert path.read_bytes() == DATA
    assert Path(f"{path}.sha256").read_text() == f"{digest}  file.bin\n"
    assert digest in printed.out
    assert printed.err == ""  # no progress bar where stderr is no terminal
    assert leftovers(path) == []


def test_a_file_that_is_there_needs_no_network(server, path):
    path.write_bytes(b"as it is")
    assert shared.download(URL, path) == path
    assert server.requests == []
    assert path.read_bytes() == b"as it is"


def test_the_mirror_is_asked_for_host_path_and_query(server, path):
    server.files["/example.org/a%2Bb?format=tsv&query=%28x%20y%29"] = OTHER
    shared.download("https://example.org/a%2Bb?format=tsv&query=%28x%20y%29", path)
    assert path.read_bytes() == OTHER


def test_the_password_of_a_mirror_is_not_shown(server, path, monkeypatch, capsys):
    monkeypatch.setenv("SCGENEPT_MIRROR", server.url.replace("http://", "http://me:secret@"))
    server.misbehave(PLACE, {"status": 404})
    error = error_of(path)
    assert "404" in error
    assert "secret" not in error + capsys.readouterr().out
    assert "Authorization" in server.requests[0].headers


def test_all_addresses_in_the_scripts_are_https():
    for script in KIT.glob("0*.py"):
        schemes = re.findall(r'"(\w+)://[\w-]+\.[\w-]', script.read_text(encoding="utf-8"))
        assert set(schemes) <= {"https"}, script


def test_every_request_says_that_it_comes_from_the_kit(path, monkeypatch):
    """Some servers refuse what requests calls itself unless told otherwise."""
    def no_python_requests(method, path, headers, body):
        if headers.get("User-Agent", "").startswith("python-requests"):
            return 403, {}, b"no robots\n"

    with Server({PLACE: DATA, "/example.org/list": b"[1]"}, no_python_requests) as server:
        monkeypatch.setenv("SCGENEPT_MIRROR", server.url)
        server.misbehave(PLACE, {"drop": 100_000}, {"status": 302, "headers": {"Location": PLACE}})
        shared.download(URL, path)
        shared.request("https://example.org/list", method="POST", data={"a": 1}).close()
    assert {request.headers["User-Agent"] for request in server.requests} == {"scgenept-kit/1"}
    assert len(server.requests) == 4


def test_a_file_of_the_known_size_and_checksum_is_accepted(server, path):
    shared.download(URL, path, size=len(DATA), md5=hashlib.md5(DATA).hexdigest())
    assert path.read_bytes() == DATA


# ----------------------------------------------------------------------------------------------------------
# Faults that pass

DATE = "Wed, 17 Jan 2024 00:00:00 GMT"
PASSING = {
    "dropped before the status": [{"drop": -1}],
    "dropped before the body": [{"drop": 0}],
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
def test_after_a_fault_that_passes_the_file_is_whole(server, path, name):
    server.misbehave(PLACE, *PASSING[name])
    known = {"size": len(DATA)} if name == "no length, no end" else {}
    shared.download(URL, path, **known)
    assert path.read_bytes() == DATA
    assert leftovers(path) == []


def test_connections_dropped_at_random_places_lose_nothing(server, tmp_path):
    rng = random.Random(3)
    for i in range(20):
        content = rng.randbytes(rng.randrange(1, 400_000))
        drops = [{"drop": rng.randrange(-1, len(content) + 1)} for _ in range(3)]
        server.files[f"/example.org/{i}"] = content
        server.misbehave(f"/example.org/{i}", *drops)
        shared.download(f"https://example.org/{i}", tmp_path / str(i))
        assert (tmp_path / str(i)).read_bytes() == content


def test_a_dropped_connection_goes_on_where_it_ended_if_the_file_is_the_same(server, path):
    server.misbehave(PLACE, {"drop": 100_000}, {"drop": 50_000})
    shared.download(URL, path)
    first, *later = [request.headers for request in server.requests]
    etag = f'"{hashlib.sha256(DATA).hexdigest()[:16]}"'
    assert "Range" not in first
    assert [headers["Range"] for headers in later] == ["bytes=100000-", "bytes=150000-"]
    assert [headers["If-Range"] for headers in later] == [etag, etag]


def test_the_wait_that_a_server_asks_for_is_kept(server, path):
    server.misbehave(PLACE, {"status": 503, "headers": {"Retry-After": "1"}})
    shared.download(URL, path)
    first, second = server.requests
    assert second.time - first.time >= 1


# ----------------------------------------------------------------------------------------------------------
# Faults that stay

REFUSED = {  # name: (fault, what the error says)
    "403": ({"status": 403}, "403"),
    "a challenge": ({"status": 202, "body": b"", "headers": {"x-amzn-waf-action": "challenge"}}, "202"),
    "a captcha": ({"status": 405, "headers": {"Content-Type": "text/html"}}, "405"),
    "a web page by its type": ({"headers": {"Content-Type": "text/html; charset=utf-8"}}, "web page"),
    "a web page by its beginning": ({"body": b"\n<!DOCTYPE html><title>Sign in</title>"}, "web page"),
    "another web page": ({"body": b"<HTML><h1>It works!</h1></HTML>"}, "web page"),
    "nothing": ({"body": b""}, "an empty file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_the_server_refuses_a_program_a_person_can_put_the_file_there(server, path, name):
    fault, words = REFUSED[name]
    server.misbehave(PLACE, fault, always=True)
    error = error_of(path)
    assert f"{server.url}example.org/data/file.bin: " in error
    assert words in error
    assert f"download it with a browser, save it as {path} and run the same command again" in error
    assert not path.exists()
    path.write_bytes(DATA)
    shared.download(URL, path)
    assert len(server.requests) == 1


STAYING = {  # name: (fault, what the error says, requests that the server sees)
    "a length that is always too large": ({"length": 10**18}, "the connection broke", 6),
    "503 for ever": ({"status": 503}, "503", 6),
    "always dropped": ({"drop": 0}, "the connection broke", 6),
    "dropped before the status": ({"drop": -1}, "closed connection", 6),
    "redirects for ever": ({"status": 302, "headers": {"Location": PLACE}}, "redirects", 31),
}


@pytest.mark.parametrize("name", STAYING)
def test_a_fault_that_stays_ends_in_one_line(server, path, name):
    fault, words, n_requests = STAYING[name]
    server.misbehave(PLACE, fault, always=True)
    assert words in error_of(path)
    assert len(server.requests) == n_requests
    assert not path.exists()


@pytest.mark.parametrize("known", [{"size": 299_999}, {"md5": "0" * 32}], ids=["size", "md5"])
def test_a_file_that_is_not_the_one_known_is_refused_and_not_kept(server, path, known):
    assert "expected" in error_of(path, **known)
    assert [file.name for file in path.parent.iterdir()] == ["file.bin.lock"]


def test_a_server_that_nobody_runs_is_named_in_one_line(server, path):
    server.__exit__()
    error = error_of(path)
    assert server.url in error and "Connection refused; " in error
    assert error.endswith(f"download it with a browser, save it as {path} and run the same command again")


def test_a_full_disk_ends_in_one_line_and_the_same_command_goes_on(server, path):
    with full_disk(100_000):
        assert error_of(path) == f"error: {path}: File too large; the same command goes on from here"
    shared.download(URL, path)
    assert path.read_bytes() == DATA
    assert "Range" in server.requests[1].headers


# ----------------------------------------------------------------------------------------------------------
# Several processes, and killed ones

def test_a_download_that_was_killed_goes_on_from_there_and_its_lock_holds_nobody_up(server, path):
    server.misbehave(PLACE, {"drop": 200_000, "stall": 60})
    process = start(path)
    until_part_has(path, 100_000)
    process.kill()
    process.wait()
    kept = Path(f"{path}.part").stat().st_size
    assert not path.exists()
    shared.download(URL, path)
    assert server.requests[1].headers["Range"] == f"bytes={kept}-"
    assert path.read_bytes() == DATA
    assert leftovers(path) == []


def test_two_at_once_download_once_and_both_have_it(server, path):
    server.misbehave(PLACE, {"drop": 200_000, "stall": 60})
    process = start(path)
    until_part_has(path, 100_000)
    threading.Timer(1, server.closing.set).start()  # the process goes on when the download here waits for it
    shared.download(URL, path)
    assert process.wait(60) == 0
    assert len(server.requests) == 2  # the dropped one and its continuation
    assert path.read_bytes() == DATA
    assert leftovers(path) == []
