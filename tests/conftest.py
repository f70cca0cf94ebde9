"""Helpers of the tests: the scripts as modules, and the scripts as processes."""
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

KIT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path.insert(0, str(KIT))


@pytest.fixture(scope="session")
def stage():
    """Import a script as a module: stage("03_prepare_data")."""
    return importlib.import_module


def run_script(script, *args, root=None, env=None, check=True, cwd=None):
    """Run a script of the kit as a user does; returns the finished process with its output as text."""
    command = [sys.executable, str(KIT / script), *map(str, args)] + (["--root", str(root)] if root else [])
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, **(env or {})}, timeout=300)
    if check:
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


def error_of(script, *args, **options):
    """The one-line error that a script ends with; fails the test if it does not end with exactly that and exit code 1."""
    done = run_script(script, *args, check=False, **options)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    return lines[0]


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """A root in which stages 01 to 03 of the demo have run, and 04 with two epochs of two variants and two seeds."""
    root = tmp_path_factory.mktemp("demo")
    for script in ("01_fetch_annotations.py", "02_embed.py", "03_prepare_data.py"):
        run_script(script, root=root)
    run_script("04_train.py", "--variant", "scgpt", "scgenept_go_c", "--seed", 42, 23, "--epochs", 2, root=root)
    return root
