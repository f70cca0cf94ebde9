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
from conftest import run_script
from test_annotations import ANNOTATIONS, NCBI_TEXTS, ONTOLOGY, PROTEINS
from test_own_cells import GENES, LABELS, counts, logged, write_cells
from test_prepare import rules


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


def read_or_refused(read):
    """Whether read() succeeds; it has to end in one line where it does not, with no other exception."""
    try:
        read()
    except SystemExit as end:
        assert isinstance(end.code, str) and end.code.startswith("error: ") and "\n" not in end.code, end.code
        return False
    return True


def runs_or_is_refused(script, *args, root):
    """Whether a script succeeds; it has to end in one line where it does not."""
    done = run_script(script, *args, root=root, check=False)
    lines = done.stderr.strip().splitlines()
    is_refused = done.returncode == 1 and len(lines) == 1 and lines[0].startswith("error: ")
    assert done.returncode == 0 or is_refused, done.stderr
    return not is_refused


# --- text and JSON

SPLIT = {"train": ["A+ctrl", "B+C"], "val": ["B+ctrl"], "test": ["D+ctrl"]}
TARGETS = {"A+ctrl": ["A"], "B+C": ["B", "C"], "B+ctrl": ["B"], "D+ctrl": ["D"]}
TEXTS = {  # kind: (content, how it is read: script modules by number, path, folder with whole files)
    "gaf": (ANNOTATIONS, lambda s, path, whole: s[1].read_go("go_all", path, whole / "obo")),
    "obo": (ONTOLOGY, lambda s, path, whole: s[1].read_go("go_all", whole / "gaf", path)),
    "tsv": ("gene\ttext\nA\tb\nC\td\n", lambda s, path, whole: s[1].read_tsv(path)),
    "uniprot": (PROTEINS, lambda s, path, whole: s[1].read_fresh(whole / "summaries", path)),
    "colours": ("gene\tpathway\nA\tx\nB\ty\n", lambda s, path, whole: s[2].read_column(f"{path}:pathway"))}
JSON = {
    "texts": (NCBI_TEXTS, lambda s, path: s[1].read_released(path)),
    "vocab": ({"A": 0, "<pad>": 1, "B": 2}, lambda s, path: s[3].read_vocab(path)),
    "split": (SPLIT, lambda s, path: s[3].split_from_json(path, TARGETS, rules("A", "B", "C", "D")))}
ODD = (None, True, -1, 2**70, 1.5, float("nan"), "", "\ud800", [], [[]], {}, {"x": 1})


@pytest.fixture(scope="module")
def scripts(stage):
    names = ("01_fetch_annotations", "02_embed", "03_prepare_data", "04_train", "05_eval")
    return {i: stage(name) for i, name in enumerate(names, 1)}


@pytest.mark.parametrize("kind", TEXTS)
def test_damaged_text_is_read_or_refused(scripts, tmp_path, kind):
    for name, (content, _) in TEXTS.items():
        (tmp_path / name).write_text(content)
    (tmp_path / "summaries").write_text('{"FOSB": "Gene Symbol FOSB Summary."}')
    content, read = TEXTS[kind]
    for seed in range(100):
        path = tmp_path / f"{kind}.{seed}"
        path.write_bytes(damaged(content.encode(), seed))
        read_or_refused(lambda: read(scripts, path, tmp_path))


def test_a_damaged_gzip_file_is_read_or_refused(scripts, tmp_path):
    packed = gzip.compress(TEXTS["tsv"][0].encode())
    for seed in range(100):
        path = tmp_path / f"tsv.gz.{seed}"
        path.write_bytes(damaged(packed, seed))
        read_or_refused(lambda: scripts[1].read_tsv(path))


@pytest.mark.parametrize("kind", JSON)
def test_damaged_json_is_read_or_refused(scripts, tmp_path, kind):
    content, read = JSON[kind]
    for seed in range(100):
        path = tmp_path / f"{kind}.{seed}"
        path.write_bytes(damaged(json.dumps(content).encode(), seed))
        read_or_refused(lambda: read(scripts, path))


@pytest.mark.parametrize("kind", ["texts", "vocab", "split"])
def test_json_with_other_values_is_read_or_refused(scripts, tmp_path, kind):
    content, read = JSON[kind]
    changed = [*ODD, *({**content, key: value} for key in content for value in ODD)]
    for i, value in enumerate(changed):
        path = tmp_path / f"{kind}.{i}"
        path.write_text(json.dumps(value))
        read_or_refused(lambda: read(scripts, path))


# --- models and HDF5

@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a model in both forms, a lab's cells, and the dataset made from them."""
    root = tmp_path_factory.mktemp("whole")
    net = model.ScGenePT(model.Config(n_tokens=33, pad_id=30, d_model=8, n_heads=2, d_hid=8, n_layers=1))
    model.save(net, root / "own.pt")
    torch.save(net.state_dict(), root / "released.pt")
    write_cells(root / "cells.h5ad", logged(counts()), LABELS, GENES)
    run_script("03_prepare_data.py", "--dataset", "mine", "--h5ad", root / "cells.h5ad", "--vocab", "none",
               root=root)
    return root


@pytest.mark.parametrize("damage", [truncated, overwritten])
@pytest.mark.parametrize("name", ["own.pt", "released.pt"])
def test_a_damaged_model_is_read_or_refused(scripts, whole, tmp_path, name, damage):
    content = (whole / name).read_bytes()
    for seed in range(40):
        path = tmp_path / f"{seed}.pt"
        path.write_bytes(damage(content, seed))
        is_read = read_or_refused(lambda: scripts[5].load_model(path, SimpleNamespace(n_tokens=33)))
        assert not (is_read and damage is truncated)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # overflows of numbers that damage made large
@pytest.mark.parametrize("name", ["X/data", "X/indices", "X/indptr", "obs/condition/codes"])
def test_cells_with_damaged_numbers_are_read_or_refused(whole, tmp_path, name):
    content = (whole / "cells.h5ad").read_bytes()
    with h5py.File(whole / "cells.h5ad") as file:  # damage outside of the numbers can crash HDF5 itself
        start, n = file[name].id.get_offset(), file[name].nbytes
    for seed in range(15):
        path = tmp_path / f"{seed}.h5ad"
        path.write_bytes(overwritten(content, seed, start, start + n))
        runs_or_is_refused("03_prepare_data.py", "--dataset", "mine", "--h5ad", path, "--vocab", "none",
                           root=tmp_path / "root")


def test_truncated_cells_are_refused(whole, tmp_path):
    content = (whole / "cells.h5ad").read_bytes()
    for seed in range(10):
        path = tmp_path / f"{seed}.h5ad"
        path.write_bytes(truncated(content, seed))
        assert not runs_or_is_refused("03_prepare_data.py", "--dataset", "mine", "--h5ad", path,
                                      "--vocab", "none", root=tmp_path / "root")


def test_a_truncated_dataset_is_refused(scripts, whole, tmp_path):
    content = (whole / "data/mine/dataset.h5").read_bytes()
    for seed in range(40):
        path = tmp_path / f"{seed}.h5"
        path.write_bytes(truncated(content, seed))
        assert not read_or_refused(lambda: scripts[3].load_dataset(path, "python 03_prepare_data.py"))


def test_truncated_predictions_of_another_method_are_refused(scripts, whole, tmp_path):
    data = scripts[3].load_dataset(whole / "data/mine/dataset.h5", "")
    args = SimpleNamespace(root=whole, dataset="mine", layer=None, gene_key=None, upper_case=False, controls=None, seed=42)
    test = scripts[5].held_out(data, args)
    content = (whole / "cells.h5ad").read_bytes()  # the measured cells as if they were predicted
    for seed in range(40):
        path = tmp_path / f"{seed}.h5ad"
        path.write_bytes(truncated(content, seed))
        assert not read_or_refused(lambda: scripts[5].read_external(f"other={path}", data, test, args))
