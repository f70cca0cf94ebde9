"""Files from outside and the kit's own, cut short or with bytes changed at random: each is read, or refused
in one line. The damage depends on a seed alone, which is part of the file's name."""
import gzip
import json
import random
from types import SimpleNamespace

import h5py
import pytest
import torch

import model
from cells import STAGE, prepared, rules, write_cells
from conftest import run_script
from test_annotations import ANNOTATIONS, NCBI_TEXTS, ONTOLOGY, PROTEINS


def damaged(content, seed):
    """Bytes with one to four places changed, cut out, doubled or filled, or all after a place gone."""
    rng = random.Random(seed)
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(content) + 1)
        end = min(len(content), start + rng.choice([1, 8, 300]))
        piece = content[start:end]
        filling = rng.choice([b"", rng.randbytes(len(piece)), 2 * piece, b"\0", b"\n", b"\t", b'"'])
        rest = rng.choice([content[end:], content[end:], content[end:], b""])
        content = content[:start] + filling + rest
    return content


def truncated(content, seed):
    return content[:random.Random(seed).randrange(len(content))]


def overwritten(content, seed, start=0, end=None):
    """Bytes of the same length with one to four places between start and end changed."""
    rng = random.Random(seed)
    content = bytearray(content)
    end = end or len(content)
    for _ in range(rng.randint(1, 4)):
        first = rng.randrange(start, end)
        n = min(rng.choice([1, 8, 300]), end - first)
        content[first:first + n] = rng.choice([bytes(n), rng.randbytes(n)])
    return bytes(content)


def is_read(read, path):
    """Whether read(path) succeeds; where it does not, it has to end in one line, with no other exception."""
    try:
        read(path)
    except SystemExit as end:
        assert_is_refusal(end.code)
        return False
    return True


def assert_is_refusal(message):
    assert message.startswith("error: ") and "\n" not in message, message


def assert_refuses_truncated(read, whole, folder):
    """read() takes the whole file and none that is cut short."""
    assert is_read(read, whole)
    content = whole.read_bytes()
    for seed in range(40):
        path = folder / f"{seed}{whole.suffix}"
        path.write_bytes(truncated(content, seed))
        assert not is_read(read, path), path


@pytest.fixture(scope="module")
def scripts(stage):
    names = ("01_fetch_annotations", "02_embed", "03_prepare_data", "04_train", "05_eval")
    return {i: stage(name) for i, name in enumerate(names, 1)}


# --- text and JSON

SPLIT = {"train": ["A+ctrl", "B+C"], "val": ["B+ctrl"], "test": ["D+ctrl"]}
TARGETS = {"A+ctrl": ["A"], "B+C": ["B", "C"], "B+ctrl": ["B"], "D+ctrl": ["D"]}
TSV = "gene\ttext\nA\tb\nC\td\n"
JSON = {"texts": NCBI_TEXTS, "vocab": {"A": 0, "<pad>": 1, "B": 2}, "split": SPLIT}
FILES = {
    "gaf": ANNOTATIONS.encode(),
    "obo": ONTOLOGY.encode(),
    "tsv": TSV.encode(),
    "tsv.gz": gzip.compress(TSV.encode()),
    "uniprot": PROTEINS.encode(),
    "colours": b"gene\tpathway\nA\tx\nB\ty\n",
    "summaries": b'{"FOSB": "Gene Symbol FOSB Summary."}',
    **{kind: json.dumps(content).encode() for kind, content in JSON.items()}}
READERS = {  # kind: how it is read, by the scripts' numbers; the other files lie beside it
    "gaf": lambda s, path: s[1].read_go("go_all", path, path.with_name("obo")),
    "obo": lambda s, path: s[1].read_go("go_all", path.with_name("gaf"), path),
    "tsv": lambda s, path: s[1].read_tsv(path),
    "tsv.gz": lambda s, path: s[1].read_tsv(path),
    "uniprot": lambda s, path: s[1].read_fresh(path.with_name("summaries"), path),
    "colours": lambda s, path: s[2].read_column(f"{path}:pathway"),
    "texts": lambda s, path: s[1].read_released(path),
    "vocab": lambda s, path: s[3].read_vocab(path),
    "split": lambda s, path: s[3].split_from_json(path, TARGETS, rules("A", "B", "C", "D"))}


@pytest.mark.parametrize("kind", READERS)
def test_damaged_text_is_read_or_refused(scripts, tmp_path, kind):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    READERS[kind](scripts, tmp_path / kind)
    for seed in range(100):
        path = tmp_path / f"{kind}.{seed}"
        path.write_bytes(damaged(FILES[kind], seed))
        is_read(lambda path: READERS[kind](scripts, path), path)


ODD = (None, True, -1, 2**70, 1.5, float("nan"), "", "\ud800", [], [[]], {}, {"x": 1})


@pytest.mark.parametrize("kind", JSON)
def test_json_with_other_values_is_read_or_refused(scripts, tmp_path, kind):
    changed = list(ODD)
    for key in JSON[kind]:
        changed += [{**JSON[kind], key: value} for value in ODD]
    for i, value in enumerate(changed):
        path = tmp_path / f"{kind}.{i}"
        path.write_text(json.dumps(value))
        is_read(lambda path: READERS[kind](scripts, path), path)


# --- models and HDF5

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a model in both forms, a lab's cells, and the dataset made from them."""
    root = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    net = model.ScGenePT(model.Config(n_tokens=33, pad_id=30, d_model=8, n_heads=2, d_hid=8, n_layers=1))
    model.save(net, root / "own.pt")
    torch.save(net.state_dict(), root / "released.pt")
    prepared(write_cells(root))
    return root


@pytest.fixture
def load_model(scripts):
    return lambda path: scripts[5].load_model(path, SimpleNamespace(n_tokens=33))


@pytest.mark.parametrize("name", ["own.pt", "released.pt"])
def test_a_truncated_model_is_refused(load_model, whole, tmp_path, name):
    assert_refuses_truncated(load_model, whole / name, tmp_path)


@pytest.mark.parametrize("name", ["own.pt", "released.pt"])
def test_an_overwritten_model_is_read_or_refused(load_model, whole, tmp_path, name):
    content = (whole / name).read_bytes()
    for seed in range(40):
        path = tmp_path / f"{seed}.pt"
        path.write_bytes(overwritten(content, seed))
        is_read(load_model, path)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflows of numbers that damage made large
@pytest.mark.parametrize("layout, name", [
    ("csr", "X/data"), ("csr", "X/indices"), ("csr", "X/indptr"), ("csc", "X/indices"), ("csc", "X/indptr"),
    ("csr", "obs/condition/codes")])
def test_cells_with_damaged_numbers_are_read_or_refused(tmp_path, layout, name):
    cells = write_cells(tmp_path, layout=layout)
    content = cells.read_bytes()
    with h5py.File(cells) as file:  # damage outside of the numbers can crash HDF5 itself
        start, n = file[name].id.get_offset(), file[name].nbytes
    for seed in range(12):
        path = tmp_path / f"{seed}.h5ad"
        path.write_bytes(overwritten(content, seed, start, start + n))
        done = run_script(*STAGE, path, root=tmp_path, check=False)
        if done.returncode:
            assert_is_refusal(done.stderr.strip())


def test_a_truncated_dataset_is_refused(scripts, whole, tmp_path):
    def load(path):
        scripts[3].load_dataset(path, "python 03_prepare_data.py")
    assert_refuses_truncated(load, whole / "data/mine/dataset.h5", tmp_path)


def test_truncated_predictions_of_another_method_are_refused(scripts, whole, tmp_path):
    data = scripts[3].load_dataset(whole / "data/mine/dataset.h5", "")
    args = SimpleNamespace(root=whole, dataset="mine", layer=None, gene_key=None, upper_case=False,
                           controls=None, seed=42)
    test = scripts[5].held_out(data, args)

    def read(path):
        scripts[5].read_external(f"other={path}", data, test, args)
    assert_refuses_truncated(read, whole / "cells.h5ad", tmp_path)  # as if measured cells were predicted
