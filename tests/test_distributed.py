"""Training on several processes, with the real torchrun (gloo on the CPU): the same numbers as one process, written once."""
import csv
import os
import subprocess
import sys

import pytest
from conftest import KIT, run_script

# The paper's learning rate: at the demo's, ten times as high, the order of additions alone makes 1e-5 within two epochs
OPTIONS = ["--variant", "scgenept_go_c", "--epochs", "2", "--batch-size", "128", "--genes-per-batch", "48",
           "--dropout", "0", "--d-model", "32", "--n-layers", "1", "--lr", "1e-4"]


@pytest.fixture(scope="module")
def two_roots(demo, tmp_path_factory):
    """The same demo twice; in the first, one process has trained; in the second, two processes. And what the two printed."""
    root, parallel_root = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    for folder in (root, parallel_root):
        (folder / "data").symlink_to(demo / "data", target_is_directory=True)
    run_script("04_train.py", *OPTIONS, root=root)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    parts = ["--cells-at-once", "40"]  # each takes its 64 cells in two parts, and exchanges gradients once
    done = subprocess.run([*torchrun, str(KIT / "04_train.py"), *OPTIONS, *parts, "--root", str(parallel_root)],
                          capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    return root, parallel_root, done


def logs(root):
    return {path.parent.parent.name: list(csv.DictReader(path.open())) for path in root.glob("runs/demo/*/seed42/log.csv")}


def test_two_processes_with_half_the_batch_each_give_the_losses_of_one(two_roots):
    one, two = logs(two_roots[0]), logs(two_roots[1])
    assert set(one) == set(two) == {"scgenept_go_c"}
    for variant in one:
        assert [row["epoch"] for row in two[variant]] == [row["epoch"] for row in one[variant]] == ["1", "2"]
        for expected, row in zip(one[variant], two[variant]):
            for column in ("train_mse", "val_mse"):
                assert float(row[column]) == pytest.approx(float(expected[column]), rel=1e-5)


def test_only_the_first_process_writes_and_prints(two_roots):
    _, root, done = two_roots
    for run in root.glob("runs/demo/*/seed42"):
        assert sorted(path.name for path in run.iterdir()) == ["config.json", "log.csv", "model.pt", "state.pt"]
    assert "Warning" not in done.stderr
    lines = done.stdout.splitlines()
    assert sum("2 processes" in line for line in lines) == 1
    assert sum(line.lstrip().startswith("epoch") for line in lines) == 2
    assert sum(line.startswith("next:") for line in lines) == 1


def test_what_two_processes_trained_one_process_finds_finished(two_roots):
    done = run_script("04_train.py", *OPTIONS, root=two_roots[1])
    assert done.stdout.count("finished already") == 1
