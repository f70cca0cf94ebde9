"""Files of every kind that the scripts read, damaged at random: each is read, or refused in one line, and nothing else happens.
(Cells for stage 03: test_own_cells.py; pickles: test_embed.py.)"""
import contextlib
import copy
import gzip
import io
import json
import random
import re
import resource
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import model
from conftest import run_script
from test_annotations import ANNOTATIONS, NCBI_TEXTS, ONTOLOGY, PROTEINS
from test_own_cells import GENES, LABELS, counts, logged, structure_damage, write_cells

OFTEN = pytest.mark.parametrize("n_examples", [30, pytest.param(500, marks=pytest.mark.soak)])
SELDOM = pytest.mark.parametrize("n_examples", [8, pytest.param(200, marks=pytest.mark.soak)])  # a whole script each time
SPLIT = {"train": ["A+ctrl", "B+C"], "val": ["B+ctrl"], "test": ["D+ctrl"]}
ODD = [None, True, -1, 0, 1, 2**70, 1.5, float("nan"), "", "x", "\ud800", "../x", [], [[]], {}, {"x": 1}, ["x"]]


def fuzz(n_examples, check):
    """check(rng) for so many random generators; memory must not grow by more than 500 MB meanwhile."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @settings(max_examples=n_examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(seed=st.integers(0, 2**32))
    def run(seed):
        check(random.Random(seed))
    run()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000


def read_or_refused(read):
    """What read() gives, or None where it ends in one line; any other exception is raised here."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return read()
    except SystemExit as end:
        assert isinstance(end.code, str) and end.code.startswith("error: ") and "\n" not in end.code, end.code


def runs_or_is_refused(script, *args, root):
    """Whether a script succeeds; it has to end in one line where it does not."""
    done = run_script(script, *args, root=root, check=False)
    errors = done.stderr.strip().splitlines()
    assert done.returncode == 0 or done.returncode == 1 and len(errors) == 1 and errors[0].startswith("error: "), done.stderr
    return done.returncode == 0


def bytes_damaged(content, rng):
    """Bytes with a few changed, cut out, doubled, put in, or all after them gone; or the same text in another encoding, or in a
    line without end."""
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice([0, 1, 8, 300]))
        put_in = rng.choice([b"", rng.randbytes(end - start), rng.randbytes(5), 2 * content[start:end], content[:50], b"\0", b"\n", b"\t", b'"', b"[" * 3000,
                             b"x" * 600_000, b"9" * 5000])
        content = content[:start] + put_in + rng.choice([content[end:], content[end:], content[end:], b""])
    if rng.random() < 0.1:
        content = content.decode("latin-1").encode(rng.choice(["utf-16", "utf-8"]))
    return content


def json_damaged(value, rng):
    """JSON text in which a few values or names have become others."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        holder = value
        while isinstance(holder, (dict, list)) and holder:
            key = rng.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
            if not isinstance(holder[key], (dict, list)) or not holder[key] or rng.random() < 0.4:
                change = rng.randrange(4)
                if change == 0:
                    del holder[key]
                elif change == 1 and isinstance(holder, dict):
                    holder[rng.choice(["", "x", "<pad>", "\ud800", "a\nb"])] = holder.pop(key)
                else:
                    holder[key] = copy.deepcopy(rng.choice(ODD))
                break
            holder = holder[key]
    return json.dumps(rng.choice(ODD) if rng.random() < 0.05 else value).encode()


# --- text and JSON

TEXTS = {  # name: (content, function that reads it: script modules by number, path, folder with whole files)
    "gaf": (ANNOTATIONS.encode(), lambda s, path, good: s[1].read_go("go_all", path, good / "obo")),
    "obo": (ONTOLOGY.encode(), lambda s, path, good: s[1].read_go("go_all", good / "gaf", path)),
    "own texts": (b"gene\ttext\nA\tb\nC\td\n", lambda s, path, good: s[1].read_tsv(path)),
    "summaries": (b'{"n_genes": 2}\n["0", "GENE0", ""]\n["1", "GENE1", "Summary 1."]\n', lambda s, path, good: s[1].read_fresh(path)),
    "proteins": (PROTEINS.encode(), lambda s, path, good: s[1].read_fresh(good / "summaries", path)),
    "colours": (b"gene\tpathway\nA\tx\nB\ty\n", lambda s, path, good: s[2].read_column(f"{path}:pathway")),
    "perturbations": (b"A\nB+A\n\nC\n", lambda s, path, good: s[5].read_perturbations(
        [str(path)], SimpleNamespace(genes=np.array(["A", "B", "C"], dtype=object), vocab="own genes", control="ctrl", pad_id=3, token_ids=np.arange(3),
                                       conditions=np.array(["ctrl", "A+ctrl"]), targets=np.array([[-1], [0]])), path))}
JSON = {
    "released texts": (NCBI_TEXTS, lambda s, path: s[1].read_released(path)),
    "vocabulary": ({"A": 0, "<pad>": 1, "B": 2}, lambda s, path: s[3].read_vocab(path)),
    "split": (SPLIT, lambda s, path: s[3].split_from_json(path, {c: c.replace("+ctrl", "").split("+") for of in SPLIT.values() for c in of}))}


@pytest.fixture(scope="module")
def scripts(stage):
    names = ("01_fetch_annotations", "02_embed", "03_prepare_data", "04_train", "05_eval")
    return {i: stage(name) for i, name in enumerate(names, 1)}


@OFTEN
@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", TEXTS)
def test_text_is_read_or_refused(scripts, tmp_path, kind, zipped, n_examples):
    for name, (content, _) in TEXTS.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / kind).rename(tmp_path / "whole")
    content, read = TEXTS[kind]

    def check(rng):
        damaged = bytes_damaged(gzip.compress(content) if zipped and rng.random() < 0.5 else content, rng)
        (tmp_path / kind).write_bytes(gzip.compress(damaged) if zipped and rng.random() < 0.5 else damaged)
        scripts[1].read_annotations.cache_clear()
        read_or_refused(lambda: read(scripts, tmp_path / kind, tmp_path))
    fuzz(n_examples, check)


@OFTEN
@pytest.mark.parametrize("kind", JSON)
def test_json_is_read_or_refused(scripts, tmp_path, kind, n_examples):
    content, read = JSON[kind]

    def check(rng):
        (tmp_path / "x.json").write_bytes(json_damaged(content, rng) if rng.random() < 0.7 else bytes_damaged(json.dumps(content).encode(), rng))
        read_or_refused(lambda: read(scripts, tmp_path / "x.json"))
    fuzz(n_examples, check)


# --- files that the scripts make themselves, and models of others

@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder in which all stages have run on a few cells, with scGPT's files of a small model in `scgpt`."""
    root = tmp_path_factory.mktemp("good")
    (root / "scgpt").mkdir()
    (root / "scgpt/vocab.json").write_text(json.dumps({name: i for i, name in enumerate([*GENES, "<pad>", "<cls>", "<eoc>"])}))
    (root / "scgpt/args.json").write_text(json.dumps({"embsize": 8, "nlayers": 1, "nheads": 2, "d_hid": 8}))
    net = model.ScGenePT(model.Config(n_tokens=33, pad_id=30, d_model=8, n_heads=2, d_hid=8, n_layers=1))
    torch.save({key: value for key, value in net.state_dict().items() if not key.startswith("ln")}, root / "scgpt/best_model.pt")
    torch.save(net.state_dict(), root / "released.pt")
    write_cells(root / "cells.h5ad", logged(counts()), LABELS, GENES)
    (root / "notes.tsv").write_text("gene\ttext\n" + "".join(f"{gene}\tword{i % 5} word{i % 7}\n" for i, gene in enumerate(GENES)))
    of_data = ("--dataset", "mine")
    run_script("01_fetch_annotations.py", "--source", "go_c", root=root)
    run_script("01_fetch_annotations.py", *of_data, "--tsv", f"notes={root / 'notes.tsv'}", root=root)
    run_script("02_embed.py", *of_data, "--source", "notes", "--embedder", "lsa", root=root)
    run_script("03_prepare_data.py", *of_data, "--h5ad", root / "cells.h5ad", "--vocab", root / "scgpt/vocab.json", root=root)
    run_script("04_train.py", *of_data, *TRAIN, "--pretrained", root / "scgpt", root=root)
    run_script("05_eval.py", *of_data, "--controls", 2, root=root)
    state = torch.load(root / RUN / "state.pt", weights_only=True)
    torch.save(state | {"log": state["log"][:1], "best_epoch": 1}, root / "begun.pt")  # one epoch is left to do
    return root


TRAIN = ("--variant", "scgenept_notes", "--epochs", 2, "--batch-size", 32)
RUN = "runs/mine/scgenept_notes/seed42"


def tensors_damaged(state, rng):
    """The nested dict of a torch file with a few entries gone, renamed, or other than they were (PyTorch's own optimizer and schedule as
    a whole: what is inside them it takes as it is)."""
    for _ in range(rng.randint(1, 2)):
        holder = state
        while True:
            key = rng.choice(list(holder) or [""])
            if not isinstance(holder.get(key), dict) or not holder[key] or key in ("optimizer", "schedule", "scaler") or rng.random() < 0.2:
                break
            holder = holder[key]
        value = holder.pop(key, 0)
        if torch.is_tensor(value):
            holder[key] = rng.choice([
                value[:-1] if value.ndim else value, value.double(), value.to(torch.int8), value.to(torch.complex64), value * float("nan"),
                value.unsqueeze(0), torch.zeros(1).expand(10**6, *value.shape[1:]) if value.ndim else value, value.to_sparse(), value + 10**6,
                torch.zeros(1).expand(*value.shape[:-1], 10**10) if value.ndim else value, value.half(), torch.zeros(0), *copy.deepcopy(ODD)])
        elif rng.random() < 0.2:
            holder[rng.choice(["x", 5, None, "encoder.x"])] = value
        elif rng.random() < 0.8:
            holder[key] = rng.choice([*copy.deepcopy(ODD), 10**12, 10**9, 10**5, 7, torch.zeros(3)])
    return state


def torch_damaged(whole, path, rng):
    if rng.random() < 0.5:
        path.write_bytes(bytes_damaged(whole.read_bytes(), rng))
    else:
        torch.save(tensors_damaged(torch.load(whole, weights_only=True), rng), path)


@OFTEN
@pytest.mark.parametrize("kind", [f"{RUN}/model.pt", "released.pt"])
def test_a_model_is_read_or_refused(scripts, good, tmp_path, kind, n_examples):
    def check(rng):
        torch_damaged(good / kind, tmp_path / "x.pt", rng)
        net = read_or_refused(lambda: scripts[5].load_model(tmp_path / "x.pt", SimpleNamespace(n_tokens=33)))
        if net and kind == "released.pt":
            assert np.isfinite(model.predict(net, np.arange(30), np.zeros((2, 30)), [0])).all()
    fuzz(n_examples, check)


@OFTEN
def test_pretrained_weights_are_read_or_refused(good, tmp_path, n_examples):
    def check(rng):
        torch_damaged(good / "scgpt/best_model.pt", tmp_path / "x.pt", rng)
        net = model.ScGenePT(model.Config(n_tokens=33, pad_id=30, d_model=8, n_heads=2, d_hid=8, n_layers=1))
        with contextlib.suppress(ValueError):
            model.load_pretrained(net, tmp_path / "x.pt")
    fuzz(n_examples, check)


def copied(good, root):
    """A copy of `good` without figures and cells."""
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(good, root, ignore=lambda folder, names: [name for name in names if name.endswith((".png", ".h5ad"))])
    return root


@SELDOM
@pytest.mark.filterwarnings("ignore:Casting complex")
@pytest.mark.parametrize("file", ["state.pt", "config.json", "args.json"])
def test_training_goes_on_from_what_it_finds_or_refuses_it(good, tmp_path, file, n_examples):
    def check(rng):
        root = copied(good, tmp_path / "root")
        config = json.loads((root / RUN / "config.json").read_text()) | {"finished": False}
        (root / RUN / "config.json").write_text(json.dumps(config))
        if file == "state.pt":
            torch_damaged(good / "begun.pt", root / RUN / file, rng)
        elif file == "config.json":
            (root / RUN / file).write_bytes(json_damaged(config, rng) if rng.random() < 0.7 else bytes_damaged(json.dumps(config).encode(), rng))
        else:
            shutil.rmtree(root / "runs")
            (root / "scgpt/args.json").write_bytes(json_damaged(json.loads((good / "scgpt/args.json").read_text()), rng))
        runs_or_is_refused("04_train.py", "--dataset", "mine", *TRAIN, "--pretrained", root / "scgpt", root=root)
    fuzz(n_examples, check)


@OFTEN
def test_a_runs_settings_are_read_or_refused(scripts, good, tmp_path, n_examples):
    path = tmp_path / RUN / "config.json"
    path.parent.mkdir(parents=True)
    config = json.loads((good / RUN / "config.json").read_text())

    def check(rng):
        path.write_bytes(json_damaged(config, rng) if rng.random() < 0.7 else bytes_damaged(json.dumps(config).encode(), rng))
        for run in read_or_refused(lambda: scripts[5].find_runs(tmp_path / "runs/mine", None, good / "data/mine/dataset.h5", "")) or ():
            assert run.name == "scgenept_notes" and run.seed == 42
    fuzz(n_examples, check)


# --- HDF5

def h5_damaged(path, rng):
    """Change an HDF5 file in one or two ways that a stranger or a broken disk could; metadata itself stays well-formed, or is cut off, or has
    a hole where texts lie, at which HDF5 by itself would stay forever."""
    content = bytearray(path.read_bytes())
    heaps = [match.start() for match in re.finditer(b"GCOL", content)]
    if heaps and rng.random() < 0.1:
        at, n = rng.choice(heaps) + 16 + rng.randrange(3000), rng.choice([16, 64, 512])
        content[at:at + n] = bytes(n)
        path.write_bytes(content)
        return
    if rng.random() < 0.1:
        path.write_bytes(path.read_bytes()[:rng.randrange(path.stat().st_size)])
        return
    with h5py.File(path, "a") as file, contextlib.suppress(KeyError):  # a second change may find nothing left where the first one was
        for _ in range(rng.randint(1, 2)):
            names = []
            file.visit(names.append)
            name = rng.choice(names or ["/"])
            change = rng.randrange(10)
            if change < 4 and names:
                structure_damage(file, rng)
            elif change == 4:
                holder = file[rng.choice(["/", name])]
                key = rng.choice(list(holder.attrs) or ["x"])
                holder.attrs[key] = rng.choice([-1, 10**12, 2.5, np.nan, "x", "{", "[]", b"\xff", [1, 2], h5py.Empty("f4")])
            elif change == 5 and name in file:
                del file[name]
                file[name] = rng.choice([h5py.ExternalLink("other.h5", "/x"), h5py.SoftLink("/genes"), h5py.SoftLink(f"/{name}")])
                return
            elif change == 6 and name in file:
                del file[name]
                file.create_dataset(name, (10**12,), rng.choice(["f4", "i4", h5py.string_dtype()]), chunks=(10**6,))
                return
            elif change == 7 and isinstance(file.get(name), h5py.Dataset) and file[name].dtype.kind in "iuf" and file[name].size:
                values = file[name][...]
                values.flat[rng.randrange(values.size)] = rng.choice([np.nan, np.inf, -np.inf]) if values.dtype.kind == "f" else rng.choice([-2, 2**31 - 1, 5])
                file[name][...] = values
            elif change == 8 and isinstance(file.get(name), h5py.Dataset) and file[name].shape:
                values = file[name][...]
                del file[name]
                file[name] = rng.choice([np.zeros(values.shape), np.zeros(values.shape, "i8"), values[::-1], values[:0], values[None], values[:1],
                                         np.full(values.shape, b"\xff\xfe"), np.full(values.shape, "ctrl".encode())])


@pytest.fixture
def damaged_copy(good, tmp_path):
    """A function (file of `good`, rng) -> path of a damaged copy."""
    def make(name, rng):
        path = shutil.copy(good / name, tmp_path / "damaged.h5ad")
        h5_damaged(path, rng)
        return path
    return make


@OFTEN
def test_texts_are_read_or_refused(scripts, damaged_copy, n_examples):
    def check(rng):
        path = damaged_copy("data/human/annotations.h5", rng)
        read_or_refused(lambda: scripts[2].read_texts(path, "notes", "concat", "01"))
        read_or_refused(lambda: scripts[3].text_coverage(path, ["GENE1"], ["GENE2"], "mine"))
        read_or_refused(lambda: scripts[1].is_current(path, '{"inputs": {}, "options": {}}', False, "notes"))
        read_or_refused(lambda: scripts[1].report(path, path / "none"))
        read_or_refused(lambda: scripts[1].draw(path, path.with_suffix(".png"), "") if rng.random() < 0.1 else None)
    fuzz(n_examples, check)


@OFTEN
@pytest.mark.parametrize("mode", ["concat", "avg"])
def test_terms_are_read_or_refused(scripts, damaged_copy, mode, n_examples):
    def check(rng):
        path = damaged_copy("data/demo/annotations.h5", rng)
        read_or_refused(lambda: scripts[2].read_texts(path, "go_c", mode, "01"))
    fuzz(n_examples, check)


@OFTEN
def test_vectors_are_read_or_refused(scripts, damaged_copy, n_examples):
    def check(rng):
        path = damaged_copy("data/human/embeddings/notes.lsa.concat.h5", rng)
        found = read_or_refused(lambda: scripts[2].some_vectors(path, 10))
        assert found is None or np.isfinite(found[1]).all() and len(found[0]) == len(found[1])
    fuzz(n_examples, check)


@OFTEN
def test_a_dataset_is_read_or_refused_and_one_that_is_read_can_be_trained_on(scripts, damaged_copy, n_examples):
    def check(rng):
        data = read_or_refused(lambda: scripts[4].load_dataset(damaged_copy("data/mine/dataset.h5", rng), "03"))
        if data is not None:
            tested = np.flatnonzero(data.split == "test")
            for means in (*scripts[5].baseline_means(data, tested).values(), scripts[5].random_means(data, tested, 1), *scripts[5].halves(data, tested, 1)):
                assert means.shape == (len(tested), len(data.genes))
            cells = np.arange(len(data.cell_condition))
            for batch, genes in scripts[4].batches(data, cells, 32, 20, np.random.default_rng(0), True):
                assert scripts[4].perturbed_flags(data, batch, genes).shape == data.X[batch].toarray()[:, genes].shape
            assert np.isfinite(data.X[scripts[4].pair_cells(data, 1)].toarray()).all()
    fuzz(n_examples, check)


@OFTEN
def test_predictions_of_others_are_read_or_refused(scripts, good, damaged_copy, n_examples):
    data = scripts[4].load_dataset(good / "data/mine/dataset.h5", "03")
    tested = np.flatnonzero(data.split == "test")

    def check(rng):
        path = damaged_copy(f"results/mine/predictions/{RUN.split('/')[2]}.seed42.h5ad", rng)
        found = read_or_refused(lambda: scripts[5].read_external(f"other={path}", data, tested))
        assert found is None or (np.isfinite(found[1]).all(1) | np.isnan(found[1]).all(1)).all()  # NaN: conditions that it lacks
    fuzz(n_examples, check)


@SELDOM
def test_predictions_that_are_there_are_used_made_again_or_refused(good, tmp_path, n_examples):
    def check(rng):
        root = copied(good, tmp_path / "root")
        predictions = "results/mine/predictions/scgenept_notes.seed42.h5ad"
        h5_damaged(shutil.copy(good / predictions, root / predictions), rng)
        runs_or_is_refused("05_eval.py", "--dataset", "mine", "--controls", 2, root=root)
    fuzz(n_examples, check)
