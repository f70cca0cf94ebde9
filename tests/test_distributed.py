"""Training on several processes, with the real torchrun (gloo on the CPU): as one process, written once."""
import csv
import os
import subprocess
import sys

import pytest

from conftest import KIT, run_script

# The paper's learning rate. At the demo's, ten times as high, the order of additions alone makes 1e-5.
OPTIONS = ["--variant", "scgenept_go_c", "--epochs", "2", "--batch-size", "128", "--genes-per-batch", "48",
           "--dropout", "0", "--d-model", "16", "--n-layers", "1", "--lr", "1e-4"]
PARTS = ["--cells-at-once", "40"]  # a process takes its 64 cells in two parts, and exchanges gradients once
RUN = "runs/demo/scgenept_go_c/seed42"


@pytest.fixture(scope="module")
def by_one(demo, tmp_path_factory):
    """A root in which one process has trained."""
    root = tmp_path_factory.mktemp("one")
    (root / "data").symlink_to(demo / "data", target_is_directory=True)
    run_script("04_train.py", *OPTIONS, root=root)
    return root


@pytest.fixture(scope="module")
def by_two(demo, tmp_path_factory):
    """A root in which two processes have trained, and what they printed."""
    root = tmp_path_factory.mktemp("two")
    (root / "data").symlink_to(demo / "data", target_is_directory=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*torchrun, str(KIT / "04_train.py"), *OPTIONS, *PARTS, "--root", str(root)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done


def log_of(root):
    with open(root / RUN / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_two_processes_with_half_the_batch_each_give_the_losses_of_one(by_one, by_two):
    one, two = log_of(by_one), log_of(by_two[0])
    assert len(one) == len(two) == 2
    for expected, row in zip(one, two):
        for column in ("train_mse", "val_mse"):
            assert float(row[column]) == pytest.approx(float(expected[column]), rel=1e-5)


def test_only_the_first_process_writes_and_prints(by_two):
    root, done = by_two
    files = sorted(path.name for path in (root / RUN).iterdir())
    assert files == ["config.json", "log.csv", "model.pt", "state.pt"]
    assert "Warning" not in done.stderr
    lines = done.stdout.splitlines()
    assert sum("2 processes" in line for line in lines) == 1
    assert sum(line.startswith("  epoch") for line in lines) == 2
    assert sum(line.startswith("next:") for line in lines) == 1


def test_what_two_processes_trained_one_process_finds_finished(by_two):
    assert "finished already" in run_script("04_train.py", *OPTIONS, root=by_two[0]).stdout
