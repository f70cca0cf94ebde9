"""03_prepare_data.py: the paper's split, differential expression, AnnData files of both encodings, and bad input."""
import hashlib
import json
import zipfile
from collections import Counter
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import scipy.stats
from scipy import sparse

from conftest import GOLDEN, error_of, run_script


@pytest.fixture(scope="module")
def prepare(stage):
    return stage("03_prepare_data")


def rules(*genes, control=("ctrl",), separator="+", target_regex=None, upper_case=False):
    """How labels are read: as of the options' defaults, but for what is given."""
    return SimpleNamespace(control=control, separator=separator, target_regex=target_regex, upper_case=upper_case,
                           genes=set(genes))


@pytest.fixture(scope="module")
def norman(prepare):
    """The 284 condition labels of the published Norman file, as {label: targets}."""
    lines = (GOLDEN / "norman_conditions.tsv").read_text().splitlines()[1:]
    return {label: prepare.parse_condition(label, rules()) for label in (line.split("\t")[0] for line in lines)}


# --- split

def test_the_split_of_norman_is_the_papers(prepare, norman):
    perturbed = {label: targets for label, targets in norman.items() if targets}
    split, subgroup = prepare.split_conditions(perturbed, seed=1)
    sizes = Counter((split[label], subgroup.get(label, "")) for label in perturbed)
    assert sizes == {("train", ""): 137,
                     ("test", "unseen_single"): 37, ("test", "combo_seen0"): 9, ("test", "combo_seen1"): 52, ("test", "combo_seen2"): 18,
                     ("val", "unseen_single"): 14, ("val", "combo_seen1"): 11, ("val", "combo_seen2"): 5}


def test_no_held_out_gene_is_perturbed_in_training(prepare, norman):
    perturbed = {label: targets for label, targets in norman.items() if targets}
    split, subgroup = prepare.split_conditions(perturbed, seed=1)
    trained = {gene for label, targets in perturbed.items() if split[label] == "train" for gene in targets}
    n_seen = {"unseen_single": 0, "combo_seen0": 0, "combo_seen1": 1}
    for label in perturbed:
        if split[label] == "test" and subgroup[label] in n_seen:
            assert sum(gene in trained for gene in perturbed[label]) <= n_seen[subgroup[label]]


def test_the_split_depends_on_the_seed_not_on_the_order_of_labels(prepare, norman):
    perturbed = {label: targets for label, targets in norman.items() if targets}
    shuffled = {label: perturbed[label] for label in sorted(perturbed, key=hash)}
    assert prepare.split_conditions(shuffled, 1) == prepare.split_conditions(perturbed, 1)
    assert prepare.split_conditions(perturbed, 2) != prepare.split_conditions(perturbed, 1)


def test_a_pair_written_in_both_orders_stays_on_one_side(prepare, norman):
    """Also, the labels that stand once fall where they fall without the others."""
    perturbed = {label: targets for label, targets in norman.items() if targets}
    reverse = {f"{label}, reversed": targets[::-1] for label, targets in perturbed.items() if len(targets) == 2}
    split, subgroup = prepare.split_conditions(perturbed | reverse, 1)
    assert all(split[f"{label}, reversed"] == split[label] and subgroup.get(f"{label}, reversed") == subgroup.get(label)
               for label, targets in perturbed.items() if len(targets) == 2)
    assert {label: split[label] for label in perturbed} == prepare.split_conditions(perturbed, 1)[0]


@pytest.mark.parametrize("label", ["A+", "+A", "A+A", "", "A++B"])
def test_a_label_that_is_no_condition_raises_a_value_error(prepare, label):
    with pytest.raises(ValueError, match="nothing before or after|twice"):
        prepare.parse_condition(label, rules())


@pytest.mark.parametrize("label, targets", [("A+ctrl", ["A"]), ("ctrl+A", ["A"]), ("A", ["A"]), ("A+B+C", ["A", "B", "C"]), ("ctrl", []),
                                            ("ctrl+ctrl", []), (" A + B ", ["A", "B"])])
def test_labels_give_their_targets_whatever_the_place_of_control(prepare, label, targets):
    assert prepare.parse_condition(label, rules()) == targets


@pytest.mark.parametrize("label, targets, name", [
    ("ctrl", [], "ctrl"), ("A+ctrl", ["A"], "A+ctrl"), ("ctrl+A", ["A"], "ctrl+A"), ("B+A", ["B", "A"], "B+A"),  # GEARS' form stays
    ("NT-1", [], "ctrl"), ("A", ["A"], "A+ctrl"), ("A_NT", ["A"], "A+ctrl"), ("B_A", ["B", "A"], "A+B"), ("C|B|A", ["C", "B", "A"], "A+B+C")])
def test_the_name_of_a_condition_is_its_label_in_gears_form_and_else_made_of_its_targets(prepare, label, targets, name):
    assert prepare.condition_name(label, targets) == name


@pytest.mark.parametrize("label, separator, condition", [
    ("A+ctrl", "+", "A+ctrl"), ("ctrl+A", "+", "A+ctrl"), ("A", "+", "A+ctrl"), ("B+A", "+", "A+B"), ("A_B", "_", "A+B"), ("A+B", "_", "A+B"),
    ("Z", "+", None), ("A__B", "_", None), (7, "+", None)])
def test_a_users_label_finds_its_condition_by_its_targets(prepare, label, separator, condition):
    conditions = {"A+ctrl": ["A"], "A+B": ["A", "B"]}
    assert prepare.find_condition(label, conditions, rules(separator=separator)) == condition


def test_a_split_of_the_users_names_its_subgroups(prepare, tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": ["A+ctrl", "B+C"], "val": ["B"], "test": ["D+ctrl", "B+A", "A+D", "D+E"]}))
    names = ["A+ctrl", "B+C", "B+ctrl", "D+ctrl", "A+B", "A+D", "D+E"]
    targets_of = {name: prepare.parse_condition(name, rules()) for name in names}
    split, subgroup = prepare.split_from_json(path, targets_of, rules())
    assert split["B+C"] == "train" and split["B+ctrl"] == "val" and set(split) == set(names)
    assert subgroup == {"D+ctrl": "unseen_single", "A+B": "combo_seen2", "A+D": "combo_seen1", "D+E": "combo_seen0"}


@pytest.mark.parametrize("content, message", [
    ("{", "not a JSON file"), ('{"train": []}', "expected"),
    ('{"train": ["A+ctrl", "Z+ctrl", 7], "val": ["A"], "test": []}', "split.json: 'Z\\+ctrl' is no perturbed condition of the data .did you mean .*A\\+ctrl.*, "
     "7 is no .*'A' stands twice, 'B\\+ctrl' is missing")])
def test_a_bad_split_file_is_an_error_that_names_all_that_is_wrong(prepare, tmp_path, content, message):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        prepare.split_from_json(path, {"A+ctrl": ["A"], "B+ctrl": ["B"]}, rules())


# --- differential expression

def test_moments_and_ranking_are_those_of_scipys_welch_test(prepare):
    rng = np.random.default_rng(0)
    dense = rng.poisson(rng.gamma(1, 1, 60), (200, 60)) * rng.random((200, 60))
    dense[:80, :30] *= 1.7
    dense[:, 5] = 0  # a gene that no cell expresses
    condition = np.repeat([0, 1, 2], [80, 40, 80])
    order = rng.permutation(200)
    blocks = [sparse.csr_matrix(dense[cells]) for cells in np.split(order, [1, 70, 70, 130])]
    mean, variance = prepare.moments(blocks, condition[order], 3, 61)
    assert not mean[:, 60].any() and not variance[:, 60].any()  # a gene that the blocks lack
    for c in range(3):
        np.testing.assert_allclose(mean[c, :60], dense[condition == c].mean(0), atol=1e-12)
        np.testing.assert_allclose(variance[c, :60], dense[condition == c].var(0, ddof=1), atol=1e-12)
    de_idx = prepare.rank_de(mean, variance, np.array([80, 40, 80]), ctrl=2, n_measured=60)
    assert (de_idx[2] == -1).all()
    for c in range(2):
        t = scipy.stats.ttest_ind(dense[condition == c], dense[condition == 2], equal_var=False).statistic
        np.testing.assert_array_equal(de_idx[c], np.argsort(-np.abs(np.nan_to_num(t)), kind="stable")[:20])


def test_only_measured_genes_are_ranked(prepare):
    mean = np.array([[0.0, 9, 1], [0, 0, 0]])
    de_idx = prepare.rank_de(mean, np.ones((2, 3)), np.array([5, 5]), ctrl=1, n_measured=2)
    assert de_idx[0].tolist() == [1, 0] + [-1] * 18


def test_normalization_scales_to_the_median_total_and_takes_the_log(prepare):
    counts = np.array([[1, 2, 0], [4, 0, 4], [0, 5, 0]], dtype=float)
    expected = np.log1p(counts / counts.sum(1, keepdims=True) * np.median(counts.sum(1)))
    scale = np.median(counts.sum(1)) / counts.sum(1)
    for matrix in sparse.csr_matrix(counts), sparse.csc_matrix(counts):
        np.testing.assert_allclose(prepare.normalize(matrix, scale).toarray(), expected, rtol=1e-6)


# --- AnnData files

GENES = [f"GENE{i}" for i in range(30)]
LABELS = ["ctrl"] * 40 + [f"{gene}+ctrl" for gene in GENES[:10] for _ in range(6)] + [f"GENE{i}+GENE{i + 1}" for i in range(6) for _ in range(6)] \
    + ["UNMEASURED+ctrl"] * 6


def expression(seed=0):
    rng = np.random.default_rng(seed)
    return (rng.poisson(1.0, (len(LABELS), len(GENES))) * rng.uniform(0.5, 1.5, (len(LABELS), len(GENES)))).astype(np.float32)


def write_h5ad(path, encoding="old", X="csr", dense=None, labels=LABELS, genes=GENES, rankings=True):
    """A small file laid out as GEARS' are, in the older or the newer AnnData encoding, X as CSR, CSC or dense."""
    dense = expression() if dense is None else dense

    def strings(group, name, values):
        group.create_dataset(name, data=np.array(values, dtype=object), dtype=h5py.string_dtype())

    def column(table, name, values):
        categories, codes = np.unique(values, return_inverse=True)
        if encoding == "old":
            strings(table.require_group("__categories"), name, categories)
            table[name] = codes.astype(np.int8)
            table[name].attrs["categories"] = table["__categories"][name].ref
        elif encoding == "new":
            group = table.create_group(name)
            group.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
            strings(group, "categories", categories)
            group["codes"] = codes.astype(np.int8)
        else:
            strings(table, name, values)

    with h5py.File(path, "w") as file:
        obs, var = file.create_group("obs"), file.create_group("var")
        for table in (obs, var):
            table.attrs.update({"_index": "_index", "encoding-type": "dataframe", "encoding-version": "0.1.0"})
        strings(obs, "_index", [f"cell{i}" for i in range(len(labels))])
        column(obs, "condition", labels)
        column(obs, "condition_name", [f"K562_{label}_{'1' if label == 'ctrl' else '1+1'}" for label in labels])
        strings(var, "_index", [f"ENSG{i:011d}" for i in range(len(genes))])
        column(var, "gene_name", genes)
        if X == "dense":
            file["X"] = dense
        else:
            matrix = sparse.csr_matrix(dense) if X == "csr" else sparse.csc_matrix(dense)
            group = file.create_group("X")
            group.attrs.update({"encoding-type": f"{X}_matrix", "encoding-version": "0.1.0", "shape": dense.shape})
            group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
        if rankings:  # an order that no test would give
            for i, label in enumerate(sorted(set(labels) - {"ctrl"})):
                strings(file, f"uns/rank_genes_groups_cov_all/K562_{label}_1+1", [f"ENSG{(g + i) % len(genes):011d}" for g in range(len(genes))])
    return path


def prepared(tmp_path, *options, file="cells.h5ad", **kwargs):
    path = write_h5ad(tmp_path / file, **kwargs) if not (tmp_path / file).exists() else tmp_path / file
    done = run_script("03_prepare_data.py", "--dataset", "mine", "--h5ad", path, "--vocab", "none", *options, root=tmp_path)
    return done, h5py.File(tmp_path / "data/mine/dataset.h5")


def arrays_of(file):
    return {name: file[name].asstr()[:] if h5py.check_string_dtype(file[name].dtype) else file[name][:]
            for name in ("X/data", "X/indices", "X/indptr", "genes", "token_ids", "measured", "conditions", "cell_condition", "targets", "split",
                         "subgroup", "mean", "de_idx")}


def test_every_array_of_dataset_h5_is_what_the_design_says(tmp_path):
    done, file = prepared(tmp_path)
    with file:
        data, dense = arrays_of(file), expression()
        assert file.attrs["format_version"] == 1 and not file.attrs["synthetic"]
    n_genes = len(GENES) + 1
    assert data["genes"].tolist() == GENES + ["UNMEASURED"] and data["measured"].tolist() == [True] * 30 + [False]
    assert data["token_ids"].tolist() == list(range(n_genes))
    X = sparse.csr_matrix((data["X/data"], data["X/indices"], data["X/indptr"]), shape=(len(LABELS), n_genes)).toarray()
    np.testing.assert_array_equal(X[:, :30], dense)
    assert not X[:, 30].any() and data["X/data"].dtype == np.float32
    assert data["conditions"][data["cell_condition"]].tolist() == LABELS
    for c, label in enumerate(data["conditions"]):
        of_label = [gene for gene in label.split("+") if gene != "ctrl"]
        assert [data["genes"][t] for t in data["targets"][c] if t >= 0] == of_label and data["targets"].shape[1] == 2
        np.testing.assert_allclose(data["mean"][c, :30], dense[np.array(LABELS) == label].mean(0), rtol=1e-5)
        assert (data["split"][c] == "ctrl") == (label == "ctrl") and (data["subgroup"][c] == "") == (data["split"][c] in ("ctrl", "train"))
    assert "10 of 11 targets are measured" in done.stdout and "; added as unmeasured genes: UNMEASURED" in done.stdout


def test_rankings_of_the_file_are_taken_by_gene_id_and_computed_without_them(tmp_path):
    _, file = prepared(tmp_path)
    with file:
        data = arrays_of(file)
    perturbed = [c for c, label in enumerate(data["conditions"]) if label != "ctrl"]
    for i, c in enumerate(perturbed):
        assert data["de_idx"][c].tolist() == [(g + i) % 30 for g in range(20)]
    (tmp_path / "cells.h5ad").unlink()
    done, file = prepared(tmp_path, rankings=False)
    with file:
        assert "stale" in done.stdout and "computed (t-test" in done.stdout and not np.array_equal(file["de_idx"][:], data["de_idx"])


@pytest.mark.parametrize("encoding, X", [("new", "csr"), ("plain", "csr"), ("old", "csc"), ("new", "dense")])
def test_every_encoding_gives_the_same_dataset(tmp_path, encoding, X):
    _, file = prepared(tmp_path)
    with file:
        expected = arrays_of(file)
    (tmp_path / "other").mkdir()
    _, file = prepared(tmp_path / "other", encoding=encoding, X=X)
    with file:
        for name, values in arrays_of(file).items():
            np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_a_gears_zip_gives_the_same_as_its_h5ad_and_leaves_nothing_unpacked(tmp_path):
    _, file = prepared(tmp_path)
    with file:
        expected = arrays_of(file)
    (tmp_path / "zip").mkdir()
    with zipfile.ZipFile(tmp_path / "zip/gears.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "cells.h5ad", "norman/perturb_processed.h5ad")
        archive.writestr("norman/go.csv", "source,target\n")
    _, file = prepared(tmp_path / "zip", file="gears.zip")
    with file:
        for name, values in arrays_of(file).items():
            np.testing.assert_array_equal(values, expected[name], err_msg=name)
    assert sorted(path.name for path in (tmp_path / "zip/data/mine").iterdir()) == ["dataset.h5"]


def test_unpacked_cells_of_another_checksum_than_known_are_refused(prepare, tmp_path):
    content = write_h5ad(tmp_path / "cells.h5ad").read_bytes()
    with zipfile.ZipFile(tmp_path / "gears.zip", "w") as archive:
        archive.writestr("norman/perturb_processed.h5ad", content)
    with prepare.open_cells(tmp_path / "gears.zip", tmp_path, hashlib.sha256(content).hexdigest()) as unpacked:
        assert unpacked.read_bytes() == content
    with pytest.raises(SystemExit, match="gears.zip: the cells in it are not those expected"):
        with prepare.open_cells(tmp_path / "gears.zip", tmp_path, "0" * 64):
            pass


def test_the_dense_counts_layer_is_never_read(tmp_path):
    path = write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(path, "a") as file:  # a chunk that cannot be decompressed: whoever reads the layer gets an error
        layer = file.create_dataset("layers/counts", shape=(len(LABELS), 30), dtype="f4", chunks=(len(LABELS), 30), compression="gzip")
        layer.id.write_direct_chunk((0, 0), b"not gzip")
    with h5py.File(path) as file, pytest.raises(OSError):
        file["layers/counts"][:]
    prepared(tmp_path)[1].close()


def test_genes_take_the_rows_of_the_vocabulary_and_pad_where_they_are_absent(tmp_path):
    vocab = {"<pad>": 0, "GENE3": 1, "UNMEASURED": 2, "OTHER": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    done, file = prepared(tmp_path, "--vocab", tmp_path / "vocab.json")
    with file:
        rows = dict(zip(file["genes"].asstr()[:], file["token_ids"][:].tolist()))
        assert file.attrs["n_tokens"] == 4 and file.attrs["pad_id"] == 0
    assert rows == {gene: vocab.get(gene, 0) for gene in rows} and "1 of 30 genes are in the vocabulary" in done.stdout


def test_counts_are_normalized_on_request(prepare, tmp_path):
    counts = np.random.default_rng(1).poisson(3, (len(LABELS), 30)).astype(np.float32)
    _, file = prepared(tmp_path, "--normalize", dense=counts)
    with file:
        expected = np.log1p(counts * (np.median(counts.sum(1)) / counts.sum(1))[:, None])
        np.testing.assert_allclose(file["X/data"][:], expected[expected > 0], rtol=1e-6)


def test_a_second_call_does_nothing_and_force_does_it_again(tmp_path):
    _, file = prepared(tmp_path)
    file.close()
    path = tmp_path / "data/mine/dataset.h5"
    first = path.stat().st_mtime_ns
    done, file = prepared(tmp_path)
    file.close()
    assert "there already" in done.stdout and path.stat().st_mtime_ns == first
    _, file = prepared(tmp_path, "--force")
    file.close()
    assert path.stat().st_mtime_ns != first


def spoil(path, how):
    with h5py.File(path, "a") as file:
        how(file)


BAD_INPUT = {
    "no AnnData file": (lambda f: f.pop("obs"), [], "an HDF5 file with X, uns, var in it, not an AnnData file"),
    "no condition column": (lambda f: None, ["--condition-key", "guide"], "obs has no column 'guide'; it has condition, condition_name"),
    "no such gene column": (lambda f: None, ["--gene-key", "symbol"], "var has no column 'symbol'; it has gene_name"),
    "no such control": (lambda f: f["obs/__categories/condition"].__setitem__(slice(-1, None), "GENE8+GENE9"), ["--control", "NT"], "too few control cells (NT: 0)"),
    "no such layer": (lambda f: f["X"].copy(f["X"], f.create_group("layers"), "logged"), ["--layer", "counts"], "no layers/counts in it; choose another matrix with --layer (logged)"),
    "NaN": (lambda f: f["X/data"].__setitem__(3, np.nan), [], "NaN"),
    "negative": (lambda f: f["X/data"].__setitem__(3, -1), [], "negative"),
    "raw counts": (lambda f: f["X/data"].__setitem__(slice(None), 2), [], "--normalize"),
    "indices out of range": (lambda f: f["X/indices"].__setitem__(0, 30), [], "damaged"),
    "indptr not ascending": (lambda f: f["X/indptr"].__setitem__(3, 10**6), [], "damaged, or of another shape"),
    "another number of cells": (lambda f: f["X"].attrs.__setitem__("shape", (8, 30)), [], "is not of 142 cells and 30 genes"),
    "indptr of another number of cells": (lambda f: f["X"].__delitem__("indptr") or f["X"].__setitem__("indptr", np.zeros(9, "i4")), [], "damaged, or of another shape"),
    "an unknown layout": (lambda f: f["X"].attrs.__setitem__("encoding-type", "coo_matrix"), [], "neither dense, CSR nor CSC (coo_matrix)"),
    "no X": (lambda f: f.pop("X"), [], "no X in it"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_that_names_file_and_cause(tmp_path, name):
    how, options, message = BAD_INPUT[name]
    path = write_h5ad(tmp_path / "cells.h5ad")
    spoil(path, how)
    error = error_of("03_prepare_data.py", "--dataset", "mine", "--h5ad", path, "--vocab", "none", *options, root=tmp_path)
    assert "cells.h5ad" in error and message in error
    assert not (tmp_path / "data/mine/dataset.h5").exists()


def test_a_category_without_cells_does_not_exist(tmp_path):
    path = write_h5ad(tmp_path / "cells.h5ad", encoding="new", rankings=False)
    with h5py.File(path, "a") as file:
        codes = file["obs/condition/codes"][:]
        file["obs/condition/codes"][:] = np.where(codes == 3, 2, codes)
        gone = file["obs/condition/categories"].asstr()[3]
    _, file = prepared(tmp_path)
    with file:
        assert gone not in file["conditions"].asstr()[:] and len(file["conditions"]) == len(set(LABELS)) - 1


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"<!doctype html>", b"\x89HDF\r\n\x1a\n and no more"])
def test_a_file_of_another_kind_is_an_error(tmp_path, content):
    (tmp_path / "cells.h5ad").write_bytes(content)
    assert "cells.h5ad" in error_of("03_prepare_data.py", "--dataset", "mine", "--h5ad", tmp_path / "cells.h5ad", "--vocab", "none", root=tmp_path)


def test_gene_names_that_match_nothing_are_an_error_with_advice(tmp_path):
    path = write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "vocab.json").write_text('{"<pad>": 0, "TP53": 1}')
    error = error_of("03_prepare_data.py", "--dataset", "mine", "--h5ad", path, "--vocab", tmp_path / "vocab.json", root=tmp_path)
    assert "0 of 30 genes (GENE0, GENE1, ...) are in the vocabulary" in error and "--gene-key" in error


def test_too_few_perturbations_for_a_split_are_an_error_and_train_with_split_none(tmp_path):
    labels = ["ctrl"] * 5 + ["GENE1+ctrl"] * 5 + ["GENE2+ctrl"] * 5
    path = write_h5ad(tmp_path / "cells.h5ad", labels=labels, dense=expression()[:15])
    line = error_of("03_prepare_data.py", "--dataset", "mine", "--h5ad", path, "--vocab", "none", root=tmp_path)
    assert "too few perturbations (2) for the split" in line and "about a dozen" in line and "--split none" in line
    done, file = prepared(tmp_path, "--split", "none")
    with file:
        assert dict(zip(file["conditions"].asstr()[:], file["split"].asstr()[:])) == {"ctrl": "ctrl", "GENE1+ctrl": "train", "GENE2+ctrl": "train"}
    assert "train: 2 conditions" in done.stdout and "test:" not in done.stdout


def test_control_cells_alone_are_an_error_that_names_what_takes_them(tmp_path):
    path = write_h5ad(tmp_path / "cells.h5ad", labels=["ctrl"] * 5, dense=expression()[:5])
    for split in "simulation", "none":
        line = error_of("03_prepare_data.py", "--dataset", "mine", "--h5ad", path, "--vocab", "none", "--split", split, root=tmp_path)
        assert "control cells only" in line and "--controls-from" in line


def test_an_unknown_dataset_and_a_missing_file_are_errors(tmp_path):
    assert "unknown dataset 'nomran'" in error_of("03_prepare_data.py", "--dataset", "nomran", root=tmp_path)
    assert "no.h5ad" in error_of("03_prepare_data.py", "--dataset", "mine", "--h5ad", tmp_path / "no.h5ad", "--vocab", "none", root=tmp_path)


# --- the demo

def test_the_demo_is_balanced_labelled_synthetic_and_its_mean_response_is_small(tmp_path):
    assert "SYNTHETIC" in run_script("03_prepare_data.py", root=tmp_path).stdout
    with h5py.File(tmp_path / "data/demo/dataset.h5") as file:
        assert file.attrs["synthetic"]
        split, mean, ctrl = file["split"].asstr()[:], file["mean"][:], file["conditions"].asstr()[:] == "ctrl"
    delta = mean[split == "train"] - mean[ctrl]
    assert np.linalg.norm(delta.mean(0)) < 0.35 * np.linalg.norm(delta, axis=1).mean()
