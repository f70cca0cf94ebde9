"""The same command gives the same results, also after runs that ended too soon: killed, interrupted, or on a full disk. What
those leave behind is whole."""
import contextlib
import csv
import importlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from conftest import command_of, run_process
from server import Server
from test_annotations import FILES, KEY, services
from test_embed import Api

FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg", "openai",
                                   "scipy.sparse", "tqdm", "test_crashes"])
TRAINING = ["--variant", "scgenept_go_c", "--epochs", 3, "--dropout", 0.1, "--batch-size", 128, "--genes-per-batch", 48,
            "--d-model", 16, "--n-layers", 1, "--n-heads", 2, "--d-hid", 16]
RUN = "runs/demo/scgenept_go_c/seed42"
STAGES = {"01_fetch_annotations.py": [], "02_embed.py": ["--source", "go_c", "go_all"], "03_prepare_data.py": [],
          "04_train.py": TRAINING, "05_eval.py": ["--controls", 2]}
FRESH = ["--dataset", "norman", "--source", "ncbi", "ncbi+uniprot", "go_all", "--fresh"]
CHANGES = {"date", "command", "seconds", "cells_per_second", "versions"}  # from run to run; versions: of what start() has in memory
SOAK = pytest.param(20, marks=pytest.mark.soak)


def work(script, args, root, env, limit, at_operation):
    """What a process of start() does."""
    sys.stdout, sys.stderr = open(f"{root}.out", "w", buffering=1), open(f"{root}.err", "w", buffering=1)
    sys.argv = command_of(script, args, root)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where the tests run in the background
    os.environ.update(env)
    if limit:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if at_operation:
        operations = itertools.count(1)

        def count(event, args):
            if event in ("os.rename", "os.remove", "os.mkdir") or event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR):
                if str(args[0]).startswith(f"{root}/") and next(operations) == at_operation:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
    importlib.import_module("01_fetch_annotations").run(importlib.import_module(Path(script).stem).main)


def start(script, *args, root, limit=None, at_operation=None, **env):
    """A script as a process of its own, forked from one that has the large libraries in memory, which saves the seconds that
    imports take. With `limit` no file may grow beyond so many bytes, as on a full disk; before its nth `at_operation` on a
    file it is killed."""
    process = FORKSERVER.Process(target=work, args=(script, args, root, env, limit, at_operation), daemon=True)
    process.start()
    process.root = root
    return process


def finish(process):
    """What a process that has to succeed printed."""
    process.join(120)
    assert process.exitcode == 0, Path(f"{process.root}.err").read_text()
    return Path(f"{process.root}.out").read_text()


def last_words(process):
    """The one line that a process ends with, exit code 1."""
    process.join(60)
    errors = Path(f"{process.root}.err").read_text()
    assert process.exitcode == 1 and len(errors.splitlines()) == 1, errors
    return errors.strip()


def plain(value):
    """Nested data as it compares with ==, without what changes from run to run."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in CHANGES}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    value = value.numpy() if torch.is_tensor(value) else value
    return (value.dtype.str, value.tolist()) if isinstance(value, (np.ndarray, np.generic)) else value


def content(path):
    """What a file holds, read to its end; bytes, where nothing in them changes from run to run."""
    if path.suffix in (".h5", ".h5ad"):
        with h5py.File(path) as file:
            found = {"/": plain(dict(file.attrs))}
            file.visititems(lambda name, item: found.update(
                {name: plain([dict(item.attrs), item[()] if isinstance(item, h5py.Dataset) else 0])}))
        return {name: value for name, value in found.items() if name.removeprefix("uns/") not in CHANGES}
    if path.suffix == ".pt":
        return plain(torch.load(path, weights_only=True))
    if path.name == "config.json":
        return plain(json.loads(path.read_text()))
    if path.name == "log.csv":
        return plain(list(csv.DictReader(path.read_text().splitlines(True))))
    return path.read_bytes()


def contents(root):
    """{file: content}, without what no stage reads as a result: locks, downloads under way, hidden files."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        is_hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and not is_hidden and path.suffix not in (".lock", ".part", ".etag", ".tmp"):
            found[str(name)] = content(path)
    return found


def timed(process, root):
    """When a process first writes something below root, and when it ends, in seconds."""
    started, before, first = time.perf_counter(), len(list(root.rglob("*"))), None
    while process.exitcode is None:
        first = first or (time.perf_counter() - started if len(list(root.rglob("*"))) > before else None)
        time.sleep(0.005)
    finish(process)
    return first, time.perf_counter() - started


@pytest.fixture(scope="module", autouse=True)
def libraries():
    """The process that start() forks from."""
    process = FORKSERVER.Process(target=print)
    process.start()
    process.join()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """For each stage the folder before it and after it, and the times of that uninterrupted run."""
    stages, before = {}, tmp_path_factory.mktemp("before")
    for script, options in STAGES.items():
        after = shutil.copytree(before, tmp_path_factory.mktemp("whole") / "root")
        first, end = timed(start(script, *options, root=after), after)
        stages[script] = SimpleNamespace(before=before, after=after, first=first, end=end, result=contents(after))
        before = after
    return stages


def killed_and_run_again(run, before, root, first, end, result, n_kills, rng, goes_on=True):
    """Kill run(), a process that works in `root`, at random moments of its work, then let it finish: compare with `result`.
    How often it began from the beginning. One that goes on where it was is killed within 60% of the time that the whole
    takes."""
    end = first + (0.6 if goes_on else 1) * (end - first)
    shutil.copytree(before, root)
    n_begun = 1
    while n_kills:
        process = run()
        process.join(rng.uniform(0.8 * first, end))
        if process.exitcode is None:
            process.kill()
            process.join()
            n_kills -= 1
            found = contents(root)  # all of it can be read, and is whole
            assert [name for name in found if found[name] != result.get(name) and not name.startswith("runs")] == []
        else:  # what earlier runs did made it faster: once more from the beginning
            finish(process)
            assert contents(root) == result
            shutil.rmtree(root)
            shutil.copytree(before, root)
            n_begun += 1
    finish(run())
    assert contents(root) == result
    return n_begun


# --- again

@pytest.mark.parametrize("script", STAGES)
def test_the_same_command_in_another_folder_gives_the_same_results(whole, tmp_path, script):
    root = shutil.copytree(whole[script].before, tmp_path / "root")
    run_process(script, *STAGES[script], root=root, env={"PYTHONHASHSEED": "1"})
    assert contents(root) == whole[script].result


# --- killed

@pytest.mark.parametrize("n_kills", [3, SOAK])
@pytest.mark.parametrize("script", STAGES)
def test_a_stage_killed_at_random_moments_and_run_again_gives_what_it_would_have_given(whole, tmp_path, script, n_kills):
    stage, root = whole[script], tmp_path / "root"
    killed_and_run_again(lambda: start(script, *STAGES[script], root=root), stage.before, root, stage.first, stage.end,
                         stage.result, n_kills, random.Random(script), script == "04_train.py")


@pytest.mark.soak
@pytest.mark.parametrize("script", STAGES)
def test_a_stage_killed_before_any_of_its_file_operations_gives_what_it_would_have_given(whole, tmp_path, script):
    stage, root, n = whole[script], tmp_path / "root", 0
    while True:
        n += 1
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(stage.before, root)
        process = start(script, *STAGES[script], root=root, at_operation=n)
        process.join()
        found = contents(root)
        assert all(found[name] == stage.result[name] for name in found if not name.startswith("runs")), n
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        finish(start(script, *STAGES[script], root=root))
        assert contents(root) == stage.result, n
    assert n > 3


@pytest.mark.parametrize("n_kills", [3, SOAK])
def test_downloads_and_answers_of_services_are_asked_for_once_however_often_the_run_is_killed(tmp_path, n_kills):
    nothing, whole, root = (tmp_path / name for name in ("nothing", "whole", "root"))
    nothing.mkdir()
    with Server(FILES, hook=services) as server:
        def run(root):
            return start("01_fetch_annotations.py", *FRESH, root=root, SCGENEPT_MIRROR=server.url, NCBI_API_KEY=KEY)
        first, end = timed(run(shutil.copytree(nothing, whole)), whole)
        n_requests = len(server.requests)
        server.requests.clear()
        n_begun = killed_and_run_again(lambda: run(root), nothing, root, first, end, contents(whole), n_kills, random.Random(1))
    assert len(server.requests) <= n_begun * n_requests + 2 * n_kills  # what was under way, and the search whose pages are asked for


@pytest.mark.parametrize("n_kills", [3, SOAK])
def test_vectors_of_a_server_are_paid_for_once_however_often_the_run_is_killed(whole, tmp_path, n_kills):
    before, root = whole["02_embed.py"].before, tmp_path / "root"
    with Api() as api:
        api.delay = 0.05

        def run(root):
            return start("02_embed.py", "--source", "go_all", "--mode", "avg", "--embedder", "openai", "--batch-size", 1,
                         "--base-url", api.base_url, root=root, OPENAI_API_KEY="key")
        first, end = timed(run(shutil.copytree(before, tmp_path / "whole")), tmp_path / "whole")
        n_texts = len(api.requests)
        result = contents(tmp_path / "whole")
        n_begun = killed_and_run_again(lambda: run(root), before, root, first, end, result, n_kills, random.Random(2))
    assert n_texts == 24 and len(api.requests) <= (1 + n_begun) * n_texts + n_kills  # one is under way at a time


# --- interrupted

def until(condition):
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("waited for too long")


@pytest.fixture(scope="module")
def interrupted(whole, tmp_path_factory):
    """A folder in which training was interrupted after its first epoch, and the line that it ended with."""
    root = shutil.copytree(whole["04_train.py"].before, tmp_path_factory.mktemp("interrupted") / "root")
    process = start("04_train.py", *TRAINING, root=root)
    until((root / RUN / "log.csv").exists)
    os.kill(process.pid, signal.SIGINT)
    return root, last_words(process)


def test_training_that_is_interrupted_ends_in_a_line_and_goes_on_to_the_same_weights(whole, interrupted, tmp_path):
    root = shutil.copytree(interrupted[0], tmp_path / "root")
    assert interrupted[1] == "interrupted; the same command goes on from what is already on disk"
    assert "goes on after epoch" in finish(start("04_train.py", *TRAINING, root=root))
    assert contents(root) == whole["04_train.py"].result


@pytest.mark.parametrize("script", [script for script in STAGES if script != "04_train.py"])
def test_any_stage_that_is_interrupted_ends_in_one_line(whole, tmp_path, script):
    for _ in range(20):
        root = shutil.copytree(whole[script].before, tmp_path / str(time.time()))
        n_files = len(list(root.rglob("*")))
        process = start(script, *STAGES[script], root=root)
        until(lambda: len(list(root.rglob("*"))) > n_files)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGINT)
        process.join()
        if process.exitcode:  # not faster than the signal
            break
    assert last_words(process).startswith("interrupted; the same command ")
    assert not list(root.rglob("*.tmp"))


# --- a full disk

FULL = {  # name: (script, options, most bytes of a file, the file that does not fit)
    "vectors": ("02_embed.py", ["--force"], 3_000, "go_c.lsa.concat.h5"),
    "a figure": ("02_embed.py", ["--force"], 18_000, "go_c.lsa.concat.png"),
    "cells": ("03_prepare_data.py", ["--force"], 100_000, "dataset.h5"),
    "settings": ("04_train.py", ["--seed", 1], 500, "config.json"),
    "predictions": ("05_eval.py", ["--force"], 20_000, "scgenept_go_c.seed42.h5ad"),
    "tables": ("05_eval.py", [], 100_000, "metrics.csv")}


@pytest.mark.skipif(sys.platform == "win32", reason="no file-size limits there")
@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_one_line_that_names_the_file_and_earlier_results_stay(whole, tmp_path, name):
    script, options, limit, file = FULL[name]
    root = shutil.copytree(whole[script].after, tmp_path / "root")
    words = last_words(start(script, *STAGES[script], *options, root=root, limit=limit))
    assert words.startswith("error: ") and file in words and "File too large" in words
    found = contents(root)
    assert {name: found[name] for name in whole[script].result} == whole[script].result
    assert not list(root.rglob("*.tmp"))


@pytest.mark.skipif(sys.platform == "win32", reason="no file-size limits there")
@pytest.mark.parametrize("file, limit", [("state.pt", 100_000), ("model.pt", 30_000)])
def test_training_on_a_full_disk_keeps_the_last_epoch(whole, interrupted, tmp_path, file, limit):
    root = shutil.copytree(interrupted[0] if file == "state.pt" else whole["04_train.py"].after, tmp_path / "root")
    if file == "model.pt":  # as after a kill just before it is written
        (root / RUN / file).unlink()
        config = root / RUN / "config.json"
        config.write_text(config.read_text().replace('"finished": true', '"finished": false'))
    before = contents(root)
    words = last_words(start("04_train.py", *TRAINING, root=root, limit=limit))
    assert file in words and "File too large" in words
    after = contents(root)
    for name in (f"{RUN}/config.json", f"{RUN}/log.csv"):  # these may have been written again
        before.pop(name), after.pop(name)
    assert after == before and not list(root.rglob("*.tmp"))
