"""Helpers of the tests: the scripts as modules, as commands within the test's process, and as processes."""
import contextlib
import importlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

# One thread: small matrices gain little from more, and lose much where others work on the machine. The second
# way is for a numpy that a plugin of pytest has loaded already
os.environ.setdefault("OMP_NUM_THREADS", "1")
with contextlib.suppress(ImportError):
    import threadpoolctl
    threadpoolctl.threadpool_limits(int(os.environ["OMP_NUM_THREADS"]))

GOLDEN = Path(__file__).resolve().parent / "golden"
KIT = GOLDEN.parent.parent
sys.path.insert(0, str(KIT))


def pytest_configure(config):
    config.addinivalue_line("markers", "soak: takes minutes; left out unless asked for with -m soak")


def pytest_collection_modifyitems(config, items):
    if config.getoption("-m"):
        return
    for item in items:
        if "soak" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes: pytest -m soak"))


@pytest.fixture
def impatient(monkeypatch):
    """Downloads in this process wait hundredths of a second between tries, and one for a silent server."""
    shared = importlib.import_module("01_fetch_annotations")
    monkeypatch.setattr(shared, "BACKOFF", 0.01)
    monkeypatch.setattr(shared, "TIMEOUT", 1)


@pytest.fixture(scope="session")
def stage():
    """Import a script as a module: stage("03_prepare_data")."""
    return importlib.import_module


def command_of(script, args, root):
    return [str(KIT / script), *map(str, args)] + (["--root", str(root)] if root else [])


def run_process(script, *args, root=None, env=None, cwd=None, check=True, timeout=300):
    """Run a script as a user does, in a process; returns the finished process with its output as text."""
    command = [sys.executable, *command_of(script, args, root)]
    done = subprocess.run(command, env={**os.environ, **(env or {})}, cwd=cwd, timeout=timeout,
                          capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def start_process(script, *args, root=None, env=None):
    """Start a script in a process, with short waits between tries, and return it at once: to be killed, or
    to run beside another."""
    code = ("import importlib; shared = importlib.import_module('01_fetch_annotations'); "
            f"shared.BACKOFF = 0.01; shared.run(importlib.import_module('{Path(script).stem}').main)")
    return subprocess.Popen([sys.executable, "-c", code, *command_of(script, args, root)[1:]],
                            env={**os.environ, "PYTHONPATH": str(KIT), **(env or {})},
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def run_script(script, *args, root=None, check=True):
    """Run a script as a user does, but in this process, which saves the seconds that imports take.

    Returns returncode, stdout and stderr. An exception other than SystemExit (a user would see a traceback)
    is raised here.
    """
    main = importlib.import_module(Path(script).stem).main
    run = importlib.import_module("01_fetch_annotations").run
    code, output, errors = 0, io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", command_of(script, args, root)), \
            contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            run(main)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
    done = SimpleNamespace(returncode=code, stdout=output.getvalue(), stderr=errors.getvalue())
    assert not check or code == 0, done.stdout + done.stderr
    return done


def error_of(script, *args, run=run_script, **options):
    """The one line that a script ends with; fails the test if it ends otherwise, or without exit code 1."""
    done = run(script, *args, check=False, **options)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: "), done.stderr
    return lines[0]


@contextlib.contextmanager
def full_disk(n_bytes):
    """No file that this process writes may grow beyond so many bytes."""
    resource = pytest.importorskip("resource", reason="no limits on the size of files here")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def until(condition):
    """Wait for something that another process or thread does."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("waited for too long")


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A root where stages 01 to 03 of the demo have run, and 04 for two epochs of two variants and seeds."""
    root = tmp_path_factory.mktemp("demo")
    for script in ("01_fetch_annotations.py", "02_embed.py", "03_prepare_data.py"):
        run_script(script, root=root)
    run_script("04_train.py", "--variant", "scgpt", "scgenept_go_c", "--seed", 42, 23, "--epochs", 2,
               "--d-model", 32, "--n-layers", 1, "--batch-size", 64, root=root)
    return root
