"""The same command gives the same results, also after runs that ended too soon: killed, interrupted, or on a
full disk. What those leave behind is whole."""
import contextlib
import csv
import importlib
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

from conftest import command_of, run_process, until
from server import Server
from test_annotations import FILES, KEY, services
from test_embed import Api

resource = pytest.importorskip("resource", reason="no limits on the size of files here")
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["torch._dynamo", "matplotlib.figure", "matplotlib.backends.backend_agg",
                                   "openai", "scipy.sparse", "tqdm", "test_crashes"])
TRAINING = ["--variant", "scgenept_go_c", "--epochs", 3, "--dropout", 0.1, "--batch-size", 128,
            "--genes-per-batch", 48, "--d-model", 16, "--n-layers", 1, "--n-heads", 2, "--d-hid", 16]
RUN = "runs/demo/scgenept_go_c/seed42"
STAGES = {"01_fetch_annotations.py": [],
          "02_embed.py": ["--source", "go_c", "go_all"],
          "03_prepare_data.py": [],
          "04_train.py": TRAINING,
          "05_eval.py": ["--controls", 2]}
FRESH = ["--dataset", "norman", "--source", "ncbi", "ncbi+uniprot", "go_all", "--fresh"]
ON_SERVER = ["--source", "go_all", "--mode", "avg", "--embedder", "openai", "--batch-size", 1]
CHANGES = {"date", "command", "seconds", "cells_per_second",  # from run to run
           "versions"}  # depends on which libraries are in memory
KILLS = [3, pytest.param(20, marks=pytest.mark.soak)]


def work(script, args, root, env, limit, at_operation):
    """What a process of start() does."""
    sys.stdout = open(f"{root}.out", "w", buffering=1)
    sys.stderr = open(f"{root}.err", "w", buffering=1)
    sys.argv = command_of(script, args, root)
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    if at_operation:
        kill_before(at_operation, f"{root}/")
    importlib.import_module("01_fetch_annotations").run(importlib.import_module(Path(script).stem).main)


def kill_before(n, folder):
    """Kill this process before its nth operation that changes a file in the folder."""
    n_before = 0

    def count(event, args):
        nonlocal n_before
        is_opened_to_write = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR)
        is_change = is_opened_to_write or event in ("os.rename", "os.remove", "os.mkdir")
        if is_change and str(args[0]).startswith(folder):
            n_before += 1
            if n_before == n:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def start(script, *args, root, limit=None, at_operation=None, **env):
    """A script as a process, forked from one that has the large libraries in memory, which saves the seconds
    that imports take. With `limit` no file may grow beyond so many bytes, as on a full disk; before its nth
    `at_operation` on a file it is killed."""
    arguments = script, args, root, env, limit, at_operation
    process = FORKSERVER.Process(target=work, args=arguments, daemon=True)
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
    assert process.exitcode == 1, errors
    assert len(errors.splitlines()) == 1, errors
    return errors.strip()


def plain(value):
    """Nested data as it compares with ==, without what changes from run to run."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if key not in CHANGES}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if torch.is_tensor(value):
        value = value.numpy()
    if isinstance(value, (np.ndarray, np.generic)):
        data = value.tolist() if value.dtype.hasobject else value.tobytes()
        return value.dtype.str, value.shape, data
    return value


def content_of_h5(path):
    """{name: [attributes, values]} of all that an HDF5 file holds."""
    found = {}

    def add(name, item):
        if name.removeprefix("uns/") not in CHANGES:
            values = item[()] if isinstance(item, h5py.Dataset) else None
            found[name] = plain([dict(item.attrs), values])

    with h5py.File(path) as file:
        add("/", file)
        file.visititems(add)
    return found


def content(path):
    """What a file holds, read to its end; bytes, where nothing in them changes from run to run."""
    if path.suffix in (".h5", ".h5ad"):
        return content_of_h5(path)
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
    started, n_before, first = time.perf_counter(), len(list(root.rglob("*"))), None
    while process.exitcode is None:
        if not first and len(list(root.rglob("*"))) > n_before:
            first = time.perf_counter() - started
        time.sleep(0.005)
    finish(process)
    return first, time.perf_counter() - started


def assert_whole(found, result):
    """What a killed process left can be read, and is as it will be; only a run's files still change."""
    different = [name for name in found if not name.startswith("runs") and found[name] != result.get(name)]
    assert different == []


def uninterrupted(run, before, after):
    """What is known of run(root), a process, in a folder `after` that starts as a copy of `before`."""
    shutil.copytree(before, after)
    first, end = timed(run(after), after)
    return SimpleNamespace(before=before, after=after, first=first, end=end, result=contents(after))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """For each stage what is known of its uninterrupted run, which continues that of the stage before."""
    FORKSERVER.Process(target=print).start()  # starts the process that start() forks from
    stages, before = {}, tmp_path_factory.mktemp("before")
    for script, options in STAGES.items():
        after = tmp_path_factory.mktemp("whole") / "root"
        stages[script] = uninterrupted(lambda root: start(script, *options, root=root), before, after)
        before = after
    return stages


def killed_and_run_again(run, whole, root, n_kills, seed, goes_on=False):
    """Kill run(), a process that works in `root`, at random moments of its work, then let it finish: compare
    with the uninterrupted run `whole`. Returns how often it began from the beginning.

    One that goes on where it was is killed within 60% of the time that the whole takes.
    """
    rng = random.Random(seed)
    latest = whole.first + (0.6 if goes_on else 1) * (whole.end - whole.first)
    shutil.copytree(whole.before, root)
    n_begun = 1
    while n_kills:
        process = run()
        process.join(rng.uniform(0.8 * whole.first, latest))
        if process.exitcode is None:
            process.kill()
            process.join()
            n_kills -= 1
            assert_whole(contents(root), whole.result)
        else:  # what earlier runs did made it faster: once more from the beginning
            finish(process)
            assert contents(root) == whole.result
            shutil.rmtree(root)
            shutil.copytree(whole.before, root)
            n_begun += 1
    finish(run())
    assert contents(root) == whole.result
    return n_begun


# --- again

@pytest.mark.parametrize("script", STAGES)
def test_the_same_command_in_another_folder_gives_the_same_results(whole, tmp_path, script):
    root = shutil.copytree(whole[script].before, tmp_path / "root")
    run_process(script, *STAGES[script], root=root, env={"PYTHONHASHSEED": "1"})
    assert contents(root) == whole[script].result


# --- killed

@pytest.mark.parametrize("n_kills", KILLS)
@pytest.mark.parametrize("script", STAGES)
def test_a_stage_killed_at_random_moments_and_run_again_gives_the_same(whole, tmp_path, script, n_kills):
    root = tmp_path / "root"
    killed_and_run_again(lambda: start(script, *STAGES[script], root=root), whole[script], root, n_kills,
                         seed=script, goes_on=script == "04_train.py")


@pytest.mark.soak
@pytest.mark.parametrize("script", STAGES)
def test_a_stage_killed_before_any_of_its_file_operations_gives_the_same(whole, tmp_path, script):
    stage, root, n = whole[script], tmp_path / "root", 1
    while True:
        shutil.copytree(stage.before, root)
        process = start(script, *STAGES[script], root=root, at_operation=n)
        process.join()
        assert_whole(contents(root), stage.result)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        finish(start(script, *STAGES[script], root=root))
        assert contents(root) == stage.result, n
        shutil.rmtree(root)
        n += 1
    assert n > 3


@pytest.mark.parametrize("n_kills", KILLS)
def test_downloads_and_answers_of_services_are_asked_for_once_however_often_killed(tmp_path, n_kills):
    nothing, root = tmp_path / "nothing", tmp_path / "root"
    nothing.mkdir()
    with Server(FILES, hook=services) as server:
        def run(root):
            return start("01_fetch_annotations.py", *FRESH, root=root,
                         SCGENEPT_MIRROR=server.url, NCBI_API_KEY=KEY)

        whole = uninterrupted(run, nothing, tmp_path / "whole")
        n_requests = len(server.requests)
        server.requests.clear()
        n_begun = killed_and_run_again(lambda: run(root), whole, root, n_kills, seed=1)
    # Each kill costs what was under way, and the search whose pages are asked for
    assert len(server.requests) <= n_begun * n_requests + 2 * n_kills


@pytest.mark.parametrize("n_kills", KILLS)
def test_vectors_of_a_server_are_paid_for_once_however_often_killed(whole, tmp_path, n_kills):
    root = tmp_path / "root"
    with Api() as api:
        api.delay = 0.05

        def run(root):
            return start("02_embed.py", *ON_SERVER, "--base-url", api.base_url, root=root,
                         OPENAI_API_KEY="key")

        of_server = uninterrupted(run, whole["02_embed.py"].before, tmp_path / "whole")
        n_texts = len(api.requests)
        api.requests.clear()
        n_begun = killed_and_run_again(lambda: run(root), of_server, root, n_kills, seed=2)
    assert n_texts == 24
    assert len(api.requests) <= n_begun * n_texts + n_kills  # one is under way at a time


# --- interrupted

@pytest.fixture(scope="module")
def interrupted(whole, tmp_path_factory):
    """A folder in which training was interrupted after its first epoch, and the line that it ended with."""
    root = shutil.copytree(whole["04_train.py"].before, tmp_path_factory.mktemp("interrupted") / "root")
    process = start("04_train.py", *TRAINING, root=root)
    until((root / RUN / "log.csv").exists)
    os.kill(process.pid, signal.SIGINT)
    return root, last_words(process)


def test_interrupted_training_ends_in_a_line_and_goes_on_to_the_same_weights(whole, interrupted, tmp_path):
    root = shutil.copytree(interrupted[0], tmp_path / "root")
    assert interrupted[1] == "interrupted; the same command goes on from what is already on disk"
    assert "goes on after epoch" in finish(start("04_train.py", *TRAINING, root=root))
    assert contents(root) == whole["04_train.py"].result


@pytest.mark.parametrize("script", [script for script in STAGES if script != "04_train.py"])
def test_any_stage_that_is_interrupted_ends_in_one_line(whole, tmp_path, script):
    for i in range(20):
        root = shutil.copytree(whole[script].before, tmp_path / str(i))
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


@pytest.mark.parametrize("name", FULL)
def test_a_full_disk_is_one_line_that_names_the_file_and_earlier_results_stay(whole, tmp_path, name):
    script, options, limit, file = FULL[name]
    root = shutil.copytree(whole[script].after, tmp_path / "root")
    words = last_words(start(script, *STAGES[script], *options, root=root, limit=limit))
    assert words.startswith("error: ")
    assert file in words and "File too large" in words
    found = contents(root)
    assert {name: found[name] for name in whole[script].result} == whole[script].result
    assert not list(root.rglob("*.tmp"))


def end_before_the_weights(root):
    """Leave what a kill leaves just before the weights of a finished run are written."""
    (root / RUN / "model.pt").unlink()
    config = root / RUN / "config.json"
    config.write_text(config.read_text().replace('"finished": true', '"finished": false'))


@pytest.mark.parametrize("file, limit", [("state.pt", 100_000), ("model.pt", 30_000)])
def test_training_on_a_full_disk_keeps_the_last_epoch(whole, interrupted, tmp_path, file, limit):
    if file == "state.pt":
        root = shutil.copytree(interrupted[0], tmp_path / "root")
    else:
        root = shutil.copytree(whole["04_train.py"].after, tmp_path / "root")
        end_before_the_weights(root)
    before = contents(root)
    words = last_words(start("04_train.py", *TRAINING, root=root, limit=limit))
    assert file in words and "File too large" in words
    after = contents(root)
    for name in ("config.json", "log.csv"):  # these may have been written again
        del before[f"{RUN}/{name}"], after[f"{RUN}/{name}"]
    assert after == before
    assert not list(root.rglob("*.tmp"))
