"""04_train.py on a GPU: what needs one is skipped without; all else of that path runs on the CPU here."""
import gc
import json
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
from scipy import sparse

import model
from conftest import KIT, run_script
from test_model import RELEASED, inputs, released, without_dropout

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.fixture(scope="module")
def training(stage):
    return stage("04_train")


@pytest.fixture(scope="module")
def data():
    """60 cells x 40 genes, two outside the vocabulary and one unmeasured; 27 cells train, 8 a batch."""
    rng = np.random.default_rng(0)
    X = sparse.random(60, 40, 0.4, "csr", random_state=0, dtype=np.float32)
    return SimpleNamespace(
        X=X, genes=np.array([f"G{i}" for i in range(40)], dtype=object), measured=np.arange(40) != 5,
        token_ids=np.append(rng.permutation(47)[:38], [47, 47]), pad_id=47, n_tokens=50,
        conditions=np.array(["ctrl", "G3+ctrl", "G7+G21", "G9+ctrl"], dtype=object),
        split=np.array(["ctrl", "train", "train", "val"]),
        cell_condition=np.repeat([0, 1, 2, 3], [9, 9, 9, 33]),
        targets=np.array([[-1, -1], [3, -1], [7, 21], [9, -1]]), ctrl_cells=np.arange(9))


@pytest.fixture(scope="module")
def vectors(tmp_path_factory):
    """Vectors of the genes G0 to G29."""
    path = tmp_path_factory.mktemp("vectors") / "s.lsa.concat.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("genes", data=[f"G{i}" for i in range(30)], dtype=h5py.string_dtype())
        file["vectors"] = np.random.default_rng(1).normal(size=(30, 12)).astype(np.float32)
    return {"s": {("lsa", "concat"): path}}


def machine_of(device=CPU, autocast=nullcontext, dtype=torch.float32, n_processes=1):
    return SimpleNamespace(device=device, autocast=autocast, dtype=dtype, rank=0, n_processes=n_processes)


def in_bfloat16():
    return machine_of(autocast=lambda: torch.autocast("cpu", dtype=torch.bfloat16), dtype=torch.bfloat16)


def in_float16():
    """A machine whose gradients are scaled; the CPU then computes in float32, but has the scaler of a GPU."""
    return machine_of(dtype=torch.float16)


def prepared(training, data, vectors, machine, variant="scgpt", *options):
    """A model as 04_train.py builds it with these options, its job and its state."""
    command = ["04_train.py", "--dataset", "mine", "--no-pretrained", "--variant", variant, "--dropout", 0,
               "--d-model", 16, "--n-layers", 2, "--n-heads", 2, "--d-hid", 24, "--batch-size", 8,
               "--genes-per-batch", 30, *options]
    with mock.patch.object(sys, "argv", [str(word) for word in command]):
        args = training.parse_arguments()
    sizes = {name: getattr(args, name) for name in training.SIZES}
    plan = training.plan_run(args.variant[0], vectors, None, sizes, args, machine)
    net = training.build_model(plan, data, 7).to(machine.device)
    n_cells = training.cells_at_once(net, args.genes_per_batch, plan.settings, machine)
    settings = plan.settings | {"cells_at_once": n_cells, "seed": 7}
    return net, training.make_job(data, settings, machine), training.new_state(net, settings, machine)


def gradients(training, net, job, state):
    """The error and the gradients of one batch, in one vector."""
    batch = training.read_batch(job.train_cells[:8], np.arange(2, 32), job)
    loss = training.add_gradients(net.train(), state, job, batch)
    return loss, torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


# --- a batch in parts

@pytest.mark.parametrize("variant, options", [
    ("scgpt", []), ("scgpt-tokens", []), ("scgpt-counts", []), ("scgenept_s", []), ("genept_s-scratch", []),
    ("scgenept_s", ["--align", "linear"]), ("scgenept_s", ["--align", "normalized"]),
    ("scgenept_s", ["--align", "weights"]), ("scgenept_s", ["--align", "two-encoders"]),
    ("scgenept_s", ["--align", "target-by-text"]), ("scgenept_s", ["--no-residual"]),
    ("scgpt", ["--targets-in-batch"])])
def test_three_steps_in_parts_give_the_weights_of_whole_batches(training, data, vectors, variant, options):
    errors, weights = [], []
    for cells_at_once in (8, 3):
        net, job, state = prepared(training, data, vectors, machine_of(), variant, *options,
                                   "--cells-at-once", cells_at_once)
        assert (job.n_steps, job.settings["cells_at_once"]) == (3, cells_at_once)
        errors.append((training.train_epoch(net, state, job, 1), training.validate(net, job)))
        weights.append(net.state_dict())
    assert errors[1] == pytest.approx(errors[0], rel=1e-5)
    whole, of_parts = weights
    for key in whole:
        one, other = whole[key], of_parts[key]
        if key.endswith("in_proj_bias"):  # the keys' bias changes no attention: its gradient is rounding
            one, other = (bias.view(3, -1)[[0, 2]] for bias in (one, other))
        torch.testing.assert_close(other, one, atol=1e-6, rtol=0, msg=key)


def test_batchnorm_takes_a_batch_in_one_piece_however_small_the_memory(training, data, vectors):
    with mock.patch.object(training, "CPU_MEMORY", 1):
        for way, n_cells in (("layernorm", 1), ("batchnorm", 8)):
            _, job, _ = prepared(training, data, vectors, machine_of(), "scgenept_s", "--align", way)
            assert job.settings["cells_at_once"] == n_cells


# --- memory that is too small

OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2 GiB"


class Marker:
    """Something to refer to."""


class Fails(torch.autograd.Function):
    """Returns its input; its backward pass runs out of memory as often as `times` says."""
    times, passes = 0, []

    @staticmethod
    def forward(ctx, x):
        ctx.marker = Marker()  # lives as long as the tensors of this pass
        Fails.passes.append(weakref.ref(ctx.marker))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        if Fails.times:
            Fails.times -= 1
            raise torch.cuda.OutOfMemoryError(OUT_OF_MEMORY)
        return gradient


def test_a_pass_that_runs_out_of_memory_is_repeated_with_half_the_cells(training, data, vectors, capsys):
    _, expected = gradients(training, *prepared(training, data, vectors, machine_of()))
    net, job, state = prepared(training, data, vectors, machine_of())

    def run_out(module, args):
        _, expression, _ = args
        if len(expression) > 2:
            raise torch.cuda.OutOfMemoryError(OUT_OF_MEMORY)

    net.register_forward_pre_hook(run_out)
    _, repeated = gradients(training, net, job, state)
    assert job.settings["cells_at_once"] == 2
    said = capsys.readouterr().out
    assert "goes on with 4 cells" in said
    assert "goes on with 2 cells" in said
    torch.testing.assert_close(repeated, expected, atol=1e-6, rtol=1e-5)


def test_a_part_that_runs_out_of_memory_leaves_neither_gradients_nor_tensors_behind(
        training, data, vectors, monkeypatch):
    loss, expected = gradients(training, *prepared(training, data, vectors, machine_of()))
    net, job, state = prepared(training, data, vectors, machine_of(), "scgpt", "--cells-at-once", 4)
    monkeypatch.setattr(Fails, "passes", [])
    n_before_pass = []

    def fail_in_the_second_part(module, args, output):
        n_before_pass.append(sum(marker() is not None for marker in Fails.passes))
        Fails.times = len(Fails.passes) == 1
        return Fails.apply(output)

    net.register_forward_hook(fail_in_the_second_part)
    gc.disable()
    try:
        loss_again, repeated = gradients(training, net, job, state)
    finally:
        gc.enable()
    assert job.settings["cells_at_once"] == 2
    assert len(n_before_pass) == 2 + 4  # in fours, of which the second fails; in twos
    assert n_before_pass[2] == 0  # nothing of the failed pass is there when it is tried again
    assert loss_again.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(repeated, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options, n_processes", [
    (["scgpt", "--cells-at-once", 1], 1), (["scgpt"], 2), (["scgenept_s", "--align", "batchnorm"], 1)])
def test_where_cells_cannot_be_fewer_the_error_stands(training, data, vectors, options, n_processes):
    net, job, state = prepared(training, data, vectors, machine_of(), *options)
    job.machine.n_processes = n_processes
    net.register_forward_hook(lambda module, args, output: Fails.apply(output))
    with pytest.raises(torch.cuda.OutOfMemoryError), mock.patch.object(Fails, "times", 99):
        gradients(training, net, job, state)


MEASURE = """
import importlib, json, sys
from types import SimpleNamespace
import torch
sys.path.insert(0, sys.argv[1])
import model
training = importlib.import_module("04_train")
CELLS, GENES = 12, 384

def peak(net, n_cells):  # bytes beyond those before the step
    def read(name):
        return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) * 1024
    genes, x = torch.arange(GENES), torch.rand(n_cells, GENES)
    flags = x > 0.99
    open("/proc/self/clear_refs", "w").write("5")
    before = read("VmRSS")
    net(genes, x, flags).square().mean().backward()
    return read("VmHWM") - before

for options in json.loads(sys.argv[2]):
    if options.get("languages"):
        options["n_language_rows"] = GENES
    options = {"n_tokens": 400, "pad_id": 397, "n_heads": 4, "attention_dropout": 0} | options
    net = model.ScGenePT(model.Config(**options))
    if options.get("languages"):
        net.set_language(range(GENES), {"s": torch.rand(GENES, 32)})
    peak(net, 1)  # the gradients of the weights
    training.CPU_MEMORY = 100 * peak(net, CELLS)
    settings = {"batch_size": 10_000, "align": "", "cells_at_once": None}
    machine = SimpleNamespace(n_processes=1, device=torch.device("cpu"))
    print(training.cells_at_once(net, GENES, settings, machine) / CELLS / 100)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measures memory as Linux tells it")
def test_cells_at_once_is_within_a_factor_of_two_of_the_memory_that_a_step_takes():
    base = {"d_model": 128, "d_hid": 128, "n_layers": 3, "dropout": 0.2}
    language = {"languages": {"s": 32}}
    ways = [base, base | {"d_hid": 512}, base | {"dropout": 0}, base | {"attention_dropout": 0.2},
            base | language | {"two_encoders": True}, base | language | {"target_by_text": True},
            base | language | {"modality_weights": True}]
    returns_memory = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed, to the system
    done = subprocess.run([sys.executable, "-c", MEASURE, str(KIT), json.dumps(ways)], capture_output=True,
                          text=True, env=returns_memory)
    assert done.returncode == 0, done.stderr
    ratios = [float(line) for line in done.stdout.split()]
    assert len(ratios) == len(ways)
    assert 0.5 < min(ratios) <= max(ratios) < 2, ratios


def test_on_a_gpu_the_cells_at_once_follow_from_its_free_memory(training, data, vectors):
    net, job, _ = prepared(training, data, vectors, machine_of())
    settings = job.settings | {"batch_size": 64, "cells_at_once": None}
    n_bytes = 4 * 1000 * (2 * (12 * 16 + 2 * 24) + 12 * 16)  # of a cell of 1,000 genes
    for_weights = 16 * sum(p.numel() for p in net.parameters())
    for n_cells, expected in ((0.5, 1), (10.5, 10), (1000, 64)):
        free = (n_cells * n_bytes + for_weights) / 0.6
        with mock.patch.object(torch.cuda, "mem_get_info", return_value=(free, 8e9)):
            assert training.cells_at_once(net, 1000, settings, machine_of(CUDA)) == expected


# --- precision

def test_precision_is_bfloat16_or_on_older_gpus_float16_and_float32_elsewhere(training):
    assert training.mixed_precision(CPU) == (nullcontext, torch.float32)
    for is_new, dtype in ((True, torch.bfloat16), (False, torch.float16)):
        with mock.patch.object(torch.cuda, "is_bf16_supported", return_value=is_new):
            assert training.mixed_precision(CUDA)[1] == dtype


@pytest.mark.parametrize("variant, options", [
    ("scgpt", ["--no-residual"]), ("scgpt-tokens", []), ("scgpt-counts", []), ("scgenept_s", []),
    ("genept_s", []), *(("scgenept_s", ["--align", way]) for way in (
        "linear", "normalized", "batchnorm", "weights", "two-encoders", "target-by-text"))])
def test_bfloat16_gives_the_error_and_gradients_of_float32_but_for_rounding(
        training, data, vectors, variant, options):
    options = (*options, "--lr", 1e-4)
    loss, expected = gradients(training, *prepared(training, data, vectors, machine_of(), variant, *options))
    net, job, state = prepared(training, data, vectors, in_bfloat16(), variant, *options)
    rounded_loss, rounded = gradients(training, net, job, state)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - expected).norm() < 0.05 * expected.norm()
    assert rounded_loss.item() == pytest.approx(loss.item(), rel=0.01)

    assert not state.scaler.is_enabled()
    assert np.isfinite(training.train_epoch(net, state, job, 1))
    assert np.isfinite(training.validate(net, job))
    assert {p.dtype for p in net.parameters()} == {torch.float32}


@pytest.mark.parametrize("cells_at_once, is_fused", [(8, False), (3, True)])
def test_a_step_that_overflows_is_left_out_of_the_error_and_of_the_weights(
        training, data, vectors, cells_at_once, is_fused):
    X = data.X.tolil()
    X[20] = 1e38  # a training cell whose squared error is no float32
    data = SimpleNamespace(**vars(data) | {"X": X.tocsr()})
    options = ("scgpt", "--cells-at-once", cells_at_once)
    net, job, state = prepared(training, data, vectors, in_float16(), *options)
    assert state.scaler.is_enabled()
    optimizer = torch.optim.Adam(net.parameters(), lr=job.settings["lr"], fused=is_fused)  # fused on a GPU
    state.optimizer = optimizer
    error = training.train_epoch(net, state, job, 1)

    plain, plain_job, plain_state = prepared(training, data, vectors, machine_of(), *options)
    rng = training.random_stream("batches", 7, 1)
    losses = []
    for cells, genes in training.batches(data, rng.permutation(job.train_cells)[:24], 8, 30, rng):
        if 20 in cells:
            continue
        batch = training.read_batch(cells, genes, plain_job)
        losses.append(training.add_gradients(plain.train(), plain_state, plain_job, batch).item())
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        plain_state.optimizer.step()
        plain_state.optimizer.zero_grad()
    assert len(losses) == 2  # of three steps
    assert error == pytest.approx(np.mean(losses), rel=1e-5)
    assert {values["step"].item() for values in optimizer.state.values()} == {2}
    assert state.scaler.get_scale() == 2**16 / 2
    for key, value in plain.state_dict().items():
        if not key.endswith("in_proj_bias"):
            torch.testing.assert_close(net.state_dict()[key], value, atol=1e-5, rtol=0, msg=key)


def test_scaled_gradients_train_as_unscaled_ones(training, data, vectors):
    errors, weights = [], []
    for machine in (machine_of(), in_float16()):
        net, job, state = prepared(training, data, vectors, machine, "scgenept_s", "--cells-at-once", 3)
        errors.append(training.train_epoch(net, state, job, 1))
        weights.append(net.state_dict())
    assert errors[1] == pytest.approx(errors[0], rel=1e-6)
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-6, rtol=1e-5, msg=key)


def log_and_save(training, state, folder):
    state.log.append(dict.fromkeys(training.LOG_COLUMNS, 0))
    training.save_state(state, folder)


def test_the_scale_is_kept_where_the_precision_needs_one(training, data, vectors, tmp_path):
    net, job, state = prepared(training, data, vectors, in_float16())
    training.train_epoch(net, state, job, 1)
    state.scaler.update(new_scale=1024.0)
    log_and_save(training, state, tmp_path)
    for machine, scale in ((in_float16(), 1024), (machine_of(), 1)):
        _, _, again = prepared(training, data, vectors, machine)
        training.resume(again, tmp_path, machine)
        assert again.scaler.get_scale() == scale


# --- data and optimizer

def test_a_matrix_that_lies_on_the_device_gives_the_batches_of_the_sparse_one(training):
    X = sparse.random(5000, 30, 0.3, "csr", random_state=0, dtype=np.float32)
    cells, genes = np.array([4999, 0, 4096, 4095, 0]), np.array([7, 29, 0])
    expected = training.expression_reader(X, CPU)(cells, genes)
    assert torch.equal(training.whole_matrix_reader(X, CPU)(cells, genes), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a copy to a GPU fails only without one")
def test_without_room_for_it_on_the_gpu_the_matrix_is_not_copied(training):
    X = sparse.csr_matrix((5000, 30), dtype=np.float32)
    n_bytes = 5000 * 30 * 4
    with mock.patch.object(torch.cuda, "mem_get_info", return_value=(4 * n_bytes, 8e9)):
        training.expression_reader(X, CUDA)
    with mock.patch.object(torch.cuda, "mem_get_info", return_value=(4 * n_bytes + 1, 8e9)):
        with pytest.raises((AssertionError, RuntimeError)):
            training.expression_reader(X, CUDA)


def test_on_a_cpu_nothing_is_copied_into_pinned_memory_and_adam_is_not_fused(training, data, vectors):
    array = np.arange(5)
    tensor = training.on_device(array, CPU)
    assert not tensor.is_pinned()
    assert tensor.data_ptr() == array.ctypes.data
    _, _, state = prepared(training, data, vectors, machine_of())
    assert state.optimizer.defaults["fused"] is False


def test_a_run_begun_on_a_gpu_goes_on_on_a_cpu(training, data, vectors, tmp_path):
    net, job, state = prepared(training, data, vectors, machine_of())
    state.optimizer = torch.optim.Adam(net.parameters(), fused=True)
    training.train_epoch(net, state, job, 1)
    log_and_save(training, state, tmp_path)
    net, job, state = prepared(training, data, vectors, machine_of())
    training.resume(state, tmp_path, machine_of())
    assert state.optimizer.param_groups[0]["fused"] is False
    assert np.isfinite(training.train_epoch(net, state, job, 2))


# --- on a GPU

@on_gpu
@pytest.mark.parametrize("name", RELEASED)
def test_outputs_and_gradients_on_the_gpu_are_those_of_the_released_implementation(name, tmp_path):
    arrays, net = released(name, tmp_path)
    net = without_dropout(net).to(CUDA)
    gene_ids, expression, perturbed = (x.to(CUDA) for x in inputs(arrays))
    with torch.no_grad():
        output = net.eval()(gene_ids, expression, perturbed).cpu().numpy()
    tolerance = 1e-4 * np.abs(arrays["output"]).max()
    np.testing.assert_allclose(output, arrays["output"], atol=tolerance, rtol=1e-4)

    target = torch.from_numpy(arrays["target"]).to(CUDA)
    loss = ((net.train()(gene_ids, expression, perturbed) - target) ** 2).mean()
    loss.backward()
    assert loss.item() == pytest.approx(float(arrays["loss"]), rel=1e-4)
    for key, parameter in net.named_parameters():
        if not key.startswith("language_encoders."):  # named otherwise in the file
            norm = float(arrays[f"gradnorm/{key}"])
            assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-7), key


@on_gpu
def test_predictions_on_the_gpu_are_those_of_the_cpu_and_in_its_precision_nearly_so(training):
    torch.manual_seed(0)
    config = model.Config(n_tokens=600, pad_id=597, d_model=128, n_heads=4, d_hid=128, n_layers=3)
    net = model.ScGenePT(config).eval()
    control = np.random.default_rng(0).random((20, 500), dtype=np.float32) * 3
    expected = model.predict(net, np.arange(500), control, [7])
    net.to(CUDA)
    in_float32 = model.predict(net, np.arange(500), control, [7])
    with training.mixed_precision(CUDA)[0]():
        rounded = model.predict(net, np.arange(500), control, [7])
    assert np.linalg.norm(in_float32 - expected) < 1e-4 * np.linalg.norm(expected)
    assert 0 < np.linalg.norm(rounded - expected) < 2e-2 * np.linalg.norm(expected)


@on_gpu
def test_a_training_epoch_on_the_gpu_is_that_of_the_cpu_but_for_rounding(training, data, vectors):
    autocast, dtype = training.mixed_precision(CUDA)
    errors = []
    for machine in (machine_of(), machine_of(CUDA), machine_of(CUDA, autocast, dtype)):
        options = ("scgenept_s", "--cells-at-once", 3, "--attention-dropout", 0)
        net, job, state = prepared(training, data, vectors, machine, *options)
        errors.append((training.train_epoch(net, state, job, 1), training.validate(net, job)))
    assert errors[1] == pytest.approx(errors[0], rel=1e-3)
    assert errors[2] == pytest.approx(errors[0], rel=0.05)


@on_gpu
def test_where_the_gpus_memory_is_short_the_cells_at_once_are_halved(training, vectors, capsys):
    data = SimpleNamespace(
        X=sparse.random(200, 500, 0.3, "csr", random_state=0, dtype=np.float32),
        measured=np.ones(500, dtype=bool),
        genes=np.arange(500), token_ids=np.arange(500), pad_id=597, n_tokens=600, ctrl_cells=np.arange(100),
        conditions=np.array(["ctrl", "G3+ctrl", "G4+ctrl"], dtype=object),
        split=np.array(["ctrl", "train", "val"]),
        cell_condition=np.repeat([0, 1, 2], [100, 50, 50]), targets=np.array([[-1], [3], [4]]))
    options = ("--d-model", 256, "--n-layers", 4, "--n-heads", 4, "--d-hid", 256, "--batch-size", 64,
               "--genes-per-batch", 500)

    def result(n_cells):
        options_here = ("scgpt", *options, "--cells-at-once", n_cells, "--attention-dropout", 0)
        net, job, state = prepared(training, data, vectors, machine_of(CUDA), *options_here)
        batch = training.read_batch(job.train_cells[:64], np.arange(500), job)
        loss = training.add_gradients(net.train(), state, job, batch)
        return job.settings["cells_at_once"], loss.item(), net.decoder.fc[0].weight.grad.cpu()

    _, loss, expected = result(4)
    total = torch.cuda.get_device_properties(CUDA).total_memory
    gc.collect()
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 0.7e9  # the batch takes about 2 GB
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        n_cells, loss_again, repeated = result(64)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert n_cells < 64
    assert f"goes on with {n_cells} cells at once" in capsys.readouterr().out
    assert loss_again == pytest.approx(loss, rel=1e-4)
    torch.testing.assert_close(repeated, expected, atol=1e-5, rtol=1e-3)


@on_gpu
def test_the_demo_trains_and_is_evaluated_on_the_gpu(demo, tmp_path):
    (tmp_path / "data").symlink_to(demo / "data", target_is_directory=True)
    options = ("--variant", "scgpt", "scgenept_go_c", "--epochs", 2, "--device", "cuda")
    run_script("04_train.py", *options, root=tmp_path)
    config = json.loads((tmp_path / "runs/demo/scgpt/seed42/config.json").read_text())
    assert config["device"] == torch.cuda.get_device_name()
    assert config["precision"] in ("bfloat16", "float16")
    run_script("05_eval.py", "--controls", 5, "--device", "cuda", root=tmp_path)
    assert (tmp_path / "results/demo/metrics.csv").exists()
