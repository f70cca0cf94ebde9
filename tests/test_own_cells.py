"""03_prepare_data.py on a lab's own files: every layout of AnnData, labels as they are in the field, counts, guides, separators,
variable genes; and on files of other kinds, or broken ones."""
import bz2
import gzip
import json
import pickle
import random
import sys
import tarfile
import tracemalloc
import zipfile
from types import SimpleNamespace
from unittest import mock

import h5py
import numpy as np
import pytest
from scipy import sparse

from conftest import GOLDEN, error_of, run_script
from test_prepare import rules


@pytest.fixture(scope="module")
def prepare(stage):
    return stage("03_prepare_data")


def write_column(table, name, values, encoding="categories"):
    """A column of obs or var in one of AnnData's encodings."""
    def strings(group, key, texts):
        group.create_dataset(key, data=np.array(texts, dtype=object), dtype=h5py.string_dtype())

    if encoding == "plain":
        strings(table, name, values)
    elif encoding == "fixed length":
        table[name] = np.array([value.encode() for value in values])
    elif encoding == "numbers":
        table[name] = np.array(values)
    elif encoding == "nullable":
        group = table.create_group(name)
        strings(group, "values", ["" if value is None else value for value in values])
        group["mask"] = np.array([value is None for value in values])
    else:
        categories = sorted({value for value in values if value is not None})
        codes = np.array([-1 if value is None else categories.index(value) for value in values], dtype=np.int16)
        if encoding == "old categories":
            strings(table.require_group("__categories"), name, categories)
            table[name] = codes
            table[name].attrs["categories"] = table["__categories"][name].ref
        else:
            group = table.create_group(name)
            group["codes"] = codes
            if encoding == "nullable categories":
                write_column(group, "categories", categories, "nullable")
            else:
                strings(group, "categories", categories)


def write_x(file, dense, layout="csr", index_dtype=np.int32, name="X", **dataset):
    if layout == "dense":
        file.create_dataset(name, data=dense, **dataset)
        return
    matrix = (sparse.csr_matrix if layout == "csr" else sparse.csc_matrix)(dense)
    group = file.create_group(name)
    group.attrs.update({"encoding-type": f"{layout}_matrix", "shape": dense.shape})
    group.create_dataset("data", data=matrix.data, **dataset)
    group.create_dataset("indices", data=matrix.indices.astype(index_dtype), **dataset)
    group["indptr"] = matrix.indptr.astype(index_dtype)


def write_cells(path, dense, labels, genes, layout="csr", encoding="categories", obs_column="condition", var_columns=None, **dataset):
    """A lab's file: X, a column of labels in obs, gene symbols as the index of var or in the columns given."""
    with h5py.File(path, "w") as file:
        obs, var = file.create_group("obs"), file.create_group("var")
        obs.attrs["_index"] = var.attrs["_index"] = "_index"
        write_column(obs, "_index", [f"cell{i}" for i in range(len(labels))], "plain")
        write_column(obs, obs_column, labels, encoding)
        write_column(var, "_index", genes, "plain")
        for name, values in (var_columns or {}).items():
            write_column(var, name, values)
        write_x(file, dense, layout, **dataset)
    return path


GENES = [f"GENE{i}" for i in range(30)]
LABELS = ["ctrl"] * 20 + [f"GENE{i}+ctrl" for i in range(10) for _ in range(5)] + ["GENE0+GENE1"] * 5


def counts(n_cells=len(LABELS), n_genes=len(GENES), seed=0):
    return np.random.RandomState(seed).poisson(1.0, (n_cells, n_genes)).astype(np.float32)


def logged(dense):
    return np.log1p(dense / dense.sum(1, keepdims=True, dtype=np.float64) * np.median(dense.sum(1, dtype=np.float64))).astype(np.float32)


def run(tmp_path, path, *options, dataset="mine"):
    """Stage 03 on a file: what it printed, and dataset.h5 as a namespace, X dense."""
    done = run_script("03_prepare_data.py", "--dataset", dataset, "--h5ad", path, "--vocab", "none", *options, root=tmp_path)
    with h5py.File(tmp_path / "data" / dataset / "dataset.h5") as file:
        data = SimpleNamespace(**{key: file[key][:] for key in ("token_ids", "measured", "cell_condition", "targets", "mean", "de_idx")},
                               **{key: file[key].asstr()[:] for key in ("genes", "conditions", "split", "subgroup")})
        x = file["X"]
        data.X = sparse.csr_matrix((x["data"][:], x["indices"][:], x["indptr"][:]), shape=x.attrs["shape"]).toarray()
    data.targets_of = {c: [data.genes[t] for t in row if t >= 0] for c, row in zip(data.conditions, data.targets)}
    return done, data


def error(tmp_path, path, *options):
    return error_of("03_prepare_data.py", "--dataset", "mine", "--h5ad", path, "--vocab", "none", *options, root=tmp_path)


# --- the whole path, on a file that has nothing in common with GEARS'

def test_a_file_unlike_gears_gives_the_numbers_worked_out_by_hand(tmp_path):
    rng = np.random.RandomState(1)
    genes = [f"HGNC{i}" for i in range(2000)]
    labels = ["NT_g1"] * 40 + ["NT_g2"] * 20 + [f"HGNC{i}_g{k}" for i in range(20) for k in (1, 2) for _ in range(4)] + \
        ["HGNC1_g1|HGNC0_g2"] * 6 + ["LOST_g1"] * 5 + ["HGNC30_g1"] * 2
    dense = rng.poisson(rng.gamma(0.5, 1, 2000), (len(labels), 2000))
    path = write_cells(tmp_path / "screen.h5ad", dense, labels, [f"ENSG{i:011d}" for i in range(2000)], "csc", "nullable", "guide",
                       {"symbol": genes})
    done, data = run(tmp_path, path, "--condition-key", "guide", "--control", "NT", "--gene-key", "symbol", "--normalize", "--separator", "|",
                     "--target-regex", "(.+)_g[0-9]+", "--min-cells", 5, "--n-genes", 300)

    kept = np.array([label != "HGNC30_g1" for label in labels])
    expected = logged(dense[kept])
    chosen = variable_genes(np.expm1(expected), 300) | {genes.index(f"HGNC{i}") for i in range(20)}
    assert data.genes.tolist() == [genes[i] for i in sorted(chosen)] + ["LOST"]
    assert data.measured.sum() == len(chosen) and not data.X[:, -1].any()
    np.testing.assert_allclose(data.X[:, :-1], expected[:, sorted(chosen)], rtol=1e-6)
    assert data.targets_of == {"ctrl": [], "HGNC0+HGNC1": ["HGNC1", "HGNC0"], "LOST+ctrl": ["LOST"],
                               **{f"HGNC{i}+ctrl": [f"HGNC{i}"] for i in range(20)}}
    names = [label.replace("_g1", "").replace("_g2", "") for label in np.array(labels)[kept]]
    names = ["ctrl" if name == "NT" else "HGNC0+HGNC1" if "|" in name else f"{name}+ctrl" for name in names]
    assert data.conditions[data.cell_condition].tolist() == names
    assert "HGNC30+ctrl (2)" in done.stdout and "LOST" in done.stdout and "HGNC0+ctrl (HGNC0_g1, HGNC0_g2)" in done.stdout
    assert f"{kept.sum()} cells (60 control), {len(chosen)} genes, 22 perturbations of 21 targets" in done.stdout
    assert "20 of 21 targets are measured" in done.stdout and "test: " in done.stdout


# --- layouts and encodings

@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8])
def test_every_layout_and_number_type_gives_the_same(tmp_path, layout, dtype):
    path = write_cells(tmp_path / "cells.h5ad", counts().astype(dtype), LABELS, GENES, layout)
    _, data = run(tmp_path, path, "--normalize")
    np.testing.assert_allclose(data.X, logged(counts()), rtol=1e-6)


@pytest.mark.parametrize("layout, options", [("csr", {}), ("csr", {"compression": "gzip", "index_dtype": np.int64}), ("csc", {}),
                                             ("dense", {}), ("dense", {"chunks": (7, 4), "compression": "gzip"})])
def test_small_blocks_give_the_same_as_one(prepare, tmp_path, monkeypatch, layout, options):
    path = write_cells(tmp_path / "cells.h5ad", counts(), LABELS, GENES, layout, **options)
    choose = ["--normalize", "--n-genes", 12, "--min-cells", 5, "--force"]
    _, whole = run(tmp_path, path, *choose)
    monkeypatch.setattr(prepare, "BLOCK", 40)
    _, in_blocks = run(tmp_path, path, *choose)
    assert in_blocks.genes.tolist() == whole.genes.tolist()
    np.testing.assert_array_equal(in_blocks.X, whole.X)


def arguments(prepare, *words):
    with mock.patch.object(sys, "argv", ["03_prepare_data.py", *map(str, words)]):
        return prepare.parse_arguments()


@pytest.mark.parametrize("layout", ["csr", "dense"])
def test_memory_holds_what_is_kept_not_the_file(prepare, tmp_path, monkeypatch, layout):
    labels = LABELS * 40
    dense = np.random.RandomState(0).poisson(0.3, (len(labels), 1500)).astype(np.float32)  # 1.2 million values, 9 MB as CSR
    path = write_cells(tmp_path / "cells.h5ad", dense, labels, [f"GENE{i}" for i in range(1500)], layout, "plain")
    monkeypatch.setattr(prepare, "BLOCK", 2**15)
    args = arguments(prepare, "--dataset", "mine", "--h5ad", path, "--normalize", "--n-genes", 30)
    tracemalloc.start()
    cells = prepare.open_h5ad(path, args)
    X = sparse.vstack(list(cells.blocks()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6 and X.nnz == cells.n_values
    chosen = np.isin([f"GENE{i}" for i in range(1500)], cells.genes)
    assert 30 <= chosen.sum() <= 40  # with the targets
    np.testing.assert_allclose(X.toarray(), logged(dense)[:, chosen], rtol=1e-6)


def test_memory_does_not_grow_with_the_cells(prepare, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "BLOCK", 2**15)
    peaks = []
    for n in (4, 40):
        labels = LABELS * n
        dense = np.random.RandomState(0).poisson(0.3, (len(labels), 1500)).astype(np.float32)
        path = write_cells(tmp_path / f"{n}.h5ad", dense, labels, [f"GENE{i}" for i in range(1500)], "csr", "plain")
        del dense
        tracemalloc.start()
        with mock.patch.object(prepare, "parse_arguments", return_value=arguments(
                prepare, "--root", tmp_path, "--dataset", f"n{n}", "--h5ad", path, "--normalize", "--vocab", "none")):
            prepare.main()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "data/n40/dataset.h5").stat().st_size > 8e6 and peaks[1] < peaks[0] + 1e6


def test_rows_of_the_matrix_on_disk_are_those_in_memory(prepare, tmp_path):
    dense = logged(counts())
    dense[7] = dense[-1] = 0
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        blocks = [sparse.csr_matrix(part) for part in (dense[:1], dense[1:40], dense[40:40], dense[40:])]
        assert list(prepare.write_blocks(file, "X", blocks, np.count_nonzero(dense), dense.shape)) == blocks
    with h5py.File(path) as file:
        X = prepare.ExpressionMatrix(file["X"])
    for cells in ([5, 5, 0], [7], [], [len(dense) - 1, 7, 3], np.random.default_rng(0).permutation(len(dense))):
        rows = X[np.array(cells, dtype=int)]
        assert rows.format == "csr" and rows.dtype == np.float32
        np.testing.assert_array_equal(rows.toarray(), dense[np.array(cells, dtype=int)])


@pytest.mark.parametrize("encoding", ["plain", "fixed length", "nullable", "categories", "old categories", "nullable categories"])
def test_labels_are_read_in_every_encoding(tmp_path, encoding):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES, encoding=encoding)
    _, data = run(tmp_path, path)
    assert data.conditions[data.cell_condition].tolist() == LABELS


@pytest.mark.parametrize("encoding", ["nullable", "categories", "old categories"])
def test_cells_without_a_label_are_left_out_and_counted(tmp_path, encoding):
    labels = [None] * 4 + LABELS[4:]
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, GENES, encoding=encoding)
    done, data = run(tmp_path, path)
    assert data.conditions[data.cell_condition].tolist() == labels[4:] and "left out, with numbers of cells: no label (4)" in done.stdout
    np.testing.assert_allclose(data.X, logged(counts())[4:], rtol=1e-6)


def test_a_column_of_floats_has_missing_labels_too_and_a_text_nan_means_unknown(tmp_path):
    labels = np.repeat(np.arange(15.0), 5)
    labels[-3:] = np.nan
    genes = [f"{i}.0" for i in range(30)]
    done, data = run(tmp_path, write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, genes, encoding="numbers"), "--control", "0.0")
    assert "left out, with numbers of cells: no label (3)" in done.stdout and "nan" not in data.conditions
    done, data = run(tmp_path, write_cells(tmp_path / "cells.h5ad", logged(counts()), labels.astype(str), genes, "csr", "plain"), "--control", "0.0", "--force")
    assert "left out, with numbers of cells: nan (3)" in done.stdout and len(data.conditions) == 15


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_values_that_are_stored_in_parts_count_as_their_sum(tmp_path, layout):
    path = write_cells(tmp_path / "cells.h5ad", counts(), LABELS, GENES, layout)
    with h5py.File(path, "a") as file:
        X = {name: file["X"][name][:] for name in ("data", "indices", "indptr")}
        wide = np.flatnonzero(np.diff(X["indptr"]) < 29)  # where another entry does not look like damage
        for name, values in (("data", np.insert(X["data"] - np.isin(np.arange(len(X["data"])), X["indptr"][wide]) * 0.5, X["indptr"][wide], 0.5)),
                             ("indices", np.insert(X["indices"], X["indptr"][wide], X["indices"][X["indptr"][wide]])),
                             ("indptr", X["indptr"] + np.searchsorted(wide, np.arange(len(X["indptr"]))).astype(np.int32))):
            del file["X"][name]
            file["X"][name] = values
    _, data = run(tmp_path, path, "--normalize")
    np.testing.assert_allclose(data.X, logged(counts()), rtol=1e-6)


def test_a_column_of_numbers_gives_labels_as_they_print(tmp_path):
    labels = np.repeat(np.arange(15), 5)
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, [str(i) for i in range(30)], encoding="numbers")
    _, data = run(tmp_path, path, "--control", "0")
    assert set(data.conditions) == {"ctrl", *(f"{i}+ctrl" for i in range(1, 15))} and data.targets_of["7+ctrl"] == ["7"]


# --- genes

def test_symbols_come_from_the_column_or_the_index_that_gene_key_names(tmp_path):
    ids = [f"ID{i}" for i in range(30)]
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, ids, var_columns={"gene_name": ids, "symbol": GENES})
    assert run(tmp_path, path, "--gene-key", "symbol")[1].genes.tolist() == GENES
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES, var_columns={"gene_name": ids})
    assert run(tmp_path, path, "--gene-key", "index")[1].genes.tolist() == GENES
    assert set(run(tmp_path, path)[1].genes) == set(ids) | {f"GENE{i}" for i in range(10)}


def test_ensembl_ids_as_symbols_are_reported_with_the_columns_to_choose_from(tmp_path):
    ids = [f"ENSG{i:011d}.2" for i in range(30)]
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, ids, var_columns={"feature_name": GENES})
    (tmp_path / "vocab.json").write_text(json.dumps({"<pad>": 0, "GENE1": 1}))
    message = error(tmp_path, path, "--vocab", tmp_path / "vocab.json")
    assert "0 of 30 genes (ENSG00000000000.2, " in message and "--gene-key (feature_name)" in message
    assert "no target (GENE0, GENE1, GENE2, ...) is a measured gene (ENSG" in run(tmp_path, path)[0].stderr


# --- labels

@pytest.mark.parametrize("separator, label, targets", [
    ("+", "A+B", ["A", "B"]), ("_", "A_B", ["A", "B"]), ("|", "A|B", ["A", "B"]), (",", "A,B", ["A", "B"]), (", ", "A, B", ["A", "B"]),
    ("+", "A+B+C+D", ["A", "B", "C", "D"]), ("_", "A_B_C", ["A", "B", "C"]), ("+", " A + B ", ["A", "B"]),
    ("_", "A_NT", ["A"]), ("_", "NT_A", ["A"]), ("_", "NT", []), ("_", "A_ctrl", ["A"]), ("+", "A", ["A"]),
    ("+", "HLA-A+MT_CO1", ["HLA-A", "MT_CO1"]),
    ("-", "HLA-A-B", ["HLA-A", "B"]), ("-", "B-HLA-A", ["B", "HLA-A"]), ("_", "MT_CO1_A", ["MT_CO1", "A"])])
def test_every_separator_gives_the_targets(prepare, separator, label, targets):
    genes = "A", "B", "C", "HLA-A", "MT_CO1"
    assert prepare.parse_condition(label, rules(*genes, control=["ctrl", "NT"], separator=separator)) == targets


@pytest.mark.parametrize("control", ["non-targeting", "non-*"])
@pytest.mark.parametrize("label, targets", [("non-targeting", []), ("KLF1-non-targeting", ["KLF1"]), ("non-targeting-KLF1", ["KLF1"])])
def test_a_control_label_with_the_separator_in_it_is_the_control(prepare, label, targets, control):
    assert prepare.parse_condition(label, rules(control=["ctrl", control], separator="-")) == targets


@pytest.mark.parametrize("label, control, targets", [
    ("NT_KLF1", "NT*", ["KLF1"]), ("KLF1_NT", "*NT*", ["KLF1"]), ("NegCtrl0_KLF1", "NegCtrl*", ["KLF1"]), ("NegCtrl0_NegCtrl1", "NegCtrl*", []),
    ("ctrl_1", "ctrl_*", []), ("KLF1_ctrl_1", "ctrl_*", ["KLF1"]), ("Non-Targeting_00012", "Non-Targeting_*", [])])
def test_a_pattern_of_controls_leaves_the_other_target_of_a_label_alone(prepare, label, control, targets):
    assert prepare.parse_condition(label, rules(control=["ctrl", control], separator="_")) == targets


@pytest.mark.parametrize("label, targets", [
    ("KLF1_g2", ["KLF1"]), ("KLF1_g2+MAP2K6_g1", ["KLF1", "MAP2K6"]), ("MAP2K6_g1+KLF1_g2", ["MAP2K6", "KLF1"]), ("KLF1_g1+KLF1_g2", ["KLF1"]),
    ("KLF1_g1+ctrl_g7", ["KLF1"]), ("ctrl_g1+ctrl_g2", []), ("ctrl", []), ("KLF1", ["KLF1"]), ("KLF1_guide", ["KLF1_guide"])])
def test_guides_are_collapsed_where_the_regex_matches_the_whole_name(prepare, label, targets):
    assert prepare.parse_condition(label, rules(target_regex="(.+)_g[0-9]+")) == targets


NORMAN, REPLOGLE = "(.+)_(.+)__.+", "[0-9]+_(.+?)_.+"


@pytest.mark.parametrize("regex, label, targets", [
    (NORMAN, "KLF1_NegCtrl0__KLF1_NegCtrl0", ["KLF1"]), (NORMAN, "NegCtrl10_KLF1__NegCtrl10_KLF1", ["KLF1"]),
    (NORMAN, "KLF1_MAP2K6__KLF1_MAP2K6", ["KLF1", "MAP2K6"]), (NORMAN, "NegCtrl0_NegCtrl0__NegCtrl0_NegCtrl0", []),
    ("(?P<first>[^_]+)_(?P<second>[^_]+)__.+", "KLF1_MAP2K6__KLF1_MAP2K6", ["KLF1", "MAP2K6"]),
    (REPLOGLE, "10005_ZBTB4_P1_ENSG00000174282", ["ZBTB4"]), (REPLOGLE, "2_HLA-A_P1P2_ENSG00000206503", ["HLA-A"]),
    (REPLOGLE, "10752_non-targeting_non-targeting_non-targeting", []), ("(.+?)(?:_g[0-9])?", "NegCtrl7_g1", [])])
@pytest.mark.parametrize("separator", "+_")
def test_the_regex_sees_the_whole_label_first_and_each_group_is_a_target(prepare, regex, label, targets, separator):
    control = ["ctrl", "NegCtrl*", "non-targeting"]
    assert prepare.parse_condition(label, rules(control=control, target_regex=regex, separator=separator)) == targets


def test_labels_of_one_condition_are_merged_under_its_name(tmp_path):
    labels = [label.replace("+ctrl", "_g1") if i % 2 else f"{label} " for i, label in enumerate(LABELS)]
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, GENES)
    done, data = run(tmp_path, path, "--target-regex", "(.+)_g[0-9]+")
    assert set(data.conditions) == set(LABELS) and data.conditions[data.cell_condition].tolist() == LABELS
    assert "22 labels make 12 conditions: GENE0+ctrl (GENE0+ctrl, GENE0_g1), " in done.stdout


def singles(control, pair="{}_{}"):
    """Labels of a lab: targets by their names, pairs with a separator of their own, the control as given for cell i."""
    parts = [label.removesuffix("+ctrl").split("+") for label in LABELS]
    return [control(i) if part == ["ctrl"] else pair.format(*part) if len(part) == 2 else part[0] for i, part in enumerate(parts)]


@pytest.mark.parametrize("names, patterns", [
    (["NT-1", "NT-2", "NT-3", "NT-4"], ["NT-*"]), (["non-targeting", "safe-targeting", "intergenic"], ["*-targeting", "intergenic"]),
    (["NegCtrl0", "NegCtrl10"], ["NegCtrl[0-9]*"]), (["Non-Targeting_00012", "Non-Targeting_00013"], ["Non-Targeting_*"]),
    (["sgNT1", "negative control"], ["sgNT1", "negative control"]), (["ctrl_1", "ctrl_2"], ["ctrl_1", "ctrl_2"]),
    (["safe_harbor", "AAVS1", "scramble"], ["safe_harbor", "AAVS1", "scramble"]),
    (["INTERGENIC378", "NO_SITE", "ONE_NON-GENE_SITE"], ["INTERGENIC*", "NO_SITE", "ONE_NON-GENE_SITE"]),
    (["mCherry", "control_A", "Human_Non-Targeting", "unstimulated"], ["mCherry", "control_?", "Human_*", "unstimulated"])])
def test_control_labels_are_named_all_and_those_that_are_not_end_the_run(tmp_path, names, patterns):
    labels = singles(lambda i: names[i % len(names)])
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, GENES)
    line = error(tmp_path, path, "--separator", "_", "--control", names[0])
    assert all(name in line for name in names[1:]) and "look like controls" in line and "--control" in line
    _, data = run(tmp_path, path, "--separator", "_", "--control", *patterns)
    assert data.conditions[data.cell_condition].tolist() == LABELS


def test_ctrl_within_a_label_counts_as_control_whatever_control_cells_are_called(tmp_path):
    labels = ["control" if label == "ctrl" else label for label in LABELS]
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, GENES)
    done, data = run(tmp_path, path, "--control", "control")
    assert data.conditions[data.cell_condition].tolist() == LABELS
    assert "'ctrl' within a label counts as control, too: GENE0+ctrl, " in done.stdout


MANY_GUIDES = "_".join(f"chr1.{i}_x" for i in range(60))
ODD = {50: "unassigned", 51: "unassigned", 52: "multiplet", 53: "*", 54: "nan", 55: "negative", 56: MANY_GUIDES, 57: "GENE1_unknown", 58: "",
       59: "no_sgRNA"}


def test_labels_of_no_known_perturbation_are_left_out_and_counted(tmp_path):
    labels = [ODD.get(i, label) for i, label in enumerate(singles(lambda i: "NT"))]
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, GENES)
    done, data = run(tmp_path, path, "--control", "NT", "--separator", "_")
    kept = [i for i in range(len(labels)) if i not in ODD]
    assert data.conditions[data.cell_condition].tolist() == [LABELS[i] for i in kept]
    np.testing.assert_array_equal(data.X, logged(counts())[kept])
    line = next(line for line in done.stdout.splitlines() if line.startswith("left out"))
    assert all(word in line for word in ("unassigned (2)", "multiplet (1)", "* (1)", "nan (1)", "negative (1)", "chr1.0_x", "GENE1_unknown (1)",
                                         "no label (1)"))


def test_drop_leaves_out_more_labels_and_without_a_value_none(tmp_path):
    labels = ["unassigned" if i == 50 else label for i, label in enumerate(LABELS)]
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, GENES)
    done, data = run(tmp_path, path, "--drop", "GENE[12]+ctrl", "GENE0+GENE1")
    assert set(data.conditions) == set(LABELS) - {"GENE1+ctrl", "GENE2+ctrl", "GENE0+GENE1"} and "GENE1+ctrl (5)" in done.stdout
    done, data = run(tmp_path, path, "--drop", "--force")
    assert set(data.conditions) == set(LABELS) | {"unassigned+ctrl"} and "left out" not in done.stdout


def test_all_labels_that_are_no_condition_are_named_at_once(tmp_path):
    labels = [{30: "A++B", 40: "GENE1+GENE1", 50: "NT", 60: "GENE5 + ctrl"}.get(i, label) for i, label in enumerate(LABELS)]
    line = error(tmp_path, write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, GENES))
    assert "labels that are no conditions (2 of 16): 'A++B' (nothing before or after a '+'), 'GENE1+GENE1' (the same target twice)" in line
    assert "these look like controls: NT" in line and "GENE5 + ctrl" not in line


def test_mouse_symbols_are_warned_of_and_upper_case_maps_them(tmp_path):
    genes, labels = [gene.title() for gene in GENES], ["ctrl" if label == "ctrl" else label.replace("GENE", "Gene") for label in LABELS]
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, genes)
    vocab = tmp_path / "vocab.json"
    vocab.write_text(json.dumps({gene: i for i, gene in enumerate([*GENES, "Gene0", "<pad>"])}))
    done, _ = run(tmp_path, path, "--vocab", vocab)
    assert "warning: only 1 of 30 genes (Gene0, Gene1, ...) are in the vocabulary: mouse symbols? --upper-case" in done.stderr
    done, data = run(tmp_path, path, "--vocab", vocab, "--upper-case")
    assert done.stderr == "" and data.genes.tolist() == GENES and data.conditions[data.cell_condition].tolist() == LABELS


def test_of_two_genes_of_one_symbol_the_first_keeps_it_and_is_flagged(tmp_path):
    genes = [*GENES[:28], "GENE1", "GENE2"]
    done, data = run(tmp_path, write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, genes))
    assert data.genes.tolist() == [*GENES[:28], "GENE1-1", "GENE2-1"] and data.targets[data.conditions == "GENE1+ctrl", 0] == [1]
    assert done.stdout.count("symbols of two genes: the second is GENE1-1, GENE2-1; perturbations flag the first") == 1


@pytest.mark.parametrize("label, options, advice", [("GENE0_GENE1", [], "--separator"),
                                                    ("GENE1-sg2", [], "--target-regex")])
def test_targets_that_look_like_pairs_or_guides_are_pointed_out(tmp_path, label, options, advice):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS[:-5] + [label] * 5, GENES)
    done, _ = run(tmp_path, path, *options)
    assert "warning" in done.stderr and label in done.stderr and advice in done.stderr


def test_a_pair_whose_first_gene_has_a_hyphen_is_pointed_out(tmp_path):
    genes = ["HLA-A", *GENES[1:]]
    labels = [label.replace("GENE0+", "HLA-A+") for label in LABELS[:-5]] + ["HLA-A_GENE1"] * 5
    done, _ = run(tmp_path, write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, genes))
    assert "targets that are not genes but begin with one (1): HLA-A_GENE1; pairs" in done.stderr and "--separator" in done.stderr


def test_a_target_regex_that_matches_no_label_is_an_error(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS[:-5] + ["GENE1-sg2"] * 5, GENES)
    assert "'(.+)_g[0-9]+' matches no label, such as" in error(tmp_path, path, "--target-regex", "(.+)_g[0-9]+")


def test_conditions_of_few_cells_are_left_out_and_listed(tmp_path):
    labels = LABELS[:-4] + ["GENE8+GENE9"] * 3 + ["GENE7+GENE9"]
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, GENES)
    done, data = run(tmp_path, path, "--min-cells", 3)
    assert set(labels) - set(data.conditions) == {"GENE0+GENE1", "GENE7+GENE9"} and len(data.X) == 73
    assert "left out, with fewer cells than --min-cells 3: GENE0+GENE1 (1), GENE7+GENE9 (1)" in done.stdout
    assert "too few control cells (ctrl: 20)" in error(tmp_path, path, "--min-cells", 21)
    assert "control cells only" in error(tmp_path, path, "--min-cells", 6)


def test_odd_characters_in_genes_and_labels_change_nothing(tmp_path):
    odd = ['A/B', '../../x', "it's", 'say "x"', "two words", "a,b", "β-catenin", "line\nbreak", "tab\there", "%s{0}\\n", "🧬"]
    labels = [odd[GENES.index(label.split("+")[0])] if label.endswith("+ctrl") else label for label in LABELS]
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, odd + GENES[len(odd):])
    done, data = run(tmp_path, path, "--min-cells", 2)
    names = [f"{label}+ctrl" if label in odd else label for label in labels]
    assert data.conditions[data.cell_condition].tolist() == names and data.genes[:len(odd)].tolist() == odd
    assert [p.name for p in (tmp_path / "data").rglob("*")] == ["mine", "dataset.h5"]


def test_without_control_cells_the_largest_labels_are_named(tmp_path):
    labels = ["K562" if label == "ctrl" else label for label in LABELS]
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, GENES)
    assert "too few control cells (ctrl: 0); name their label with --control (most cells are K562, " in error(tmp_path, path)


# --- expression

def test_logged_data_is_left_alone_and_normalize_says_so(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES)
    done, data = run(tmp_path, path, "--normalize")
    np.testing.assert_array_equal(data.X, logged(counts()))
    assert "--normalize left them alone" in done.stdout


@pytest.mark.parametrize("change, options, message", [
    (lambda X: X - X.mean(0), [], "negative values, as in scaled data"), (lambda X: X, [], "counts, not logarithms (values up to 6); add --normalize"),
    (lambda X: X * 100.5, [], "counts, not logarithms (values up to 603); add --normalize"), (lambda X: X * 0, ["--normalize"], "nothing but zeros"), (lambda X: X.astype(np.float64) * 1e300, [], "infinite"),
    (lambda X: X * (np.arange(len(X)) >= 20)[:, None], ["--normalize"], "no cell with any expression in ctrl; leave those out with --drop")])
def test_values_that_are_neither_counts_nor_logarithms_are_refused_with_advice(tmp_path, change, options, message):
    path = write_cells(tmp_path / "cells.h5ad", change(counts()), LABELS, GENES)
    line = error(tmp_path, path, *options)
    assert message in line and "cells.h5ad" in line


def test_corrected_counts_that_are_no_whole_numbers_are_normalized_like_counts(tmp_path):
    done, data = run(tmp_path, write_cells(tmp_path / "cells.h5ad", counts() * 40.5, LABELS, GENES), "--normalize")
    assert "not whole numbers (corrected counts?): normalized like counts" in done.stdout
    np.testing.assert_allclose(data.X, logged(counts() * 40.5), rtol=1e-6)


@pytest.mark.parametrize("change, sign", [(lambda X: logged(X) * 10, "there are values up to "), (lambda X: X / X.sum(1, keepdims=True) * 30, "all cells have the same sum")])
def test_values_that_are_normalized_but_perhaps_no_logarithms_are_warned_of(tmp_path, change, sign):
    done, _ = run(tmp_path, write_cells(tmp_path / "cells.h5ad", change(counts()), LABELS, GENES))
    assert f"warning: {sign}" in done.stderr and "not log-transformed?" in done.stderr


def test_cells_without_counts_are_left_out_with_a_line(tmp_path):
    dense = counts()
    dense[[7, 60]] = 0
    done, data = run(tmp_path, write_cells(tmp_path / "cells.h5ad", dense, LABELS, GENES), "--normalize")
    kept = [i for i in range(len(dense)) if i not in (7, 60)]
    assert data.conditions[data.cell_condition].tolist() == [LABELS[i] for i in kept] and "left out, without any expression: 2 of 75 cells" in done.stdout
    np.testing.assert_allclose(data.X, logged(dense[kept]), rtol=1e-6)


def test_a_layer_or_raw_is_read_instead_of_x_and_messages_list_them(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", counts() - counts().mean(0), LABELS, GENES, "dense")
    with h5py.File(path, "a") as file:
        write_x(file, counts(), name="layers/counts")
        write_x(file, logged(counts())[:, ::-1], "csc", name="raw/X")
        write_column(file.create_group("raw/var"), "_index", GENES[::-1], "plain")
        file["raw/var"].attrs["_index"] = "_index"
    assert "negative values" in error(tmp_path, path) and "--layer (counts, raw)" in error(tmp_path, path)
    assert "counts, not logarithms" in error(tmp_path, path, "--layer", "counts")
    np.testing.assert_allclose(run(tmp_path, path, "--layer", "counts", "--normalize")[1].X, logged(counts()), rtol=1e-6)
    _, data = run(tmp_path, path, "--layer", "raw")
    assert data.genes.tolist() == GENES[::-1]
    np.testing.assert_array_equal(data.X, logged(counts())[:, ::-1])
    with h5py.File(path, "a") as file:
        del file["X"]
    assert "no X in it; choose another matrix with --layer (counts, raw)" in error(tmp_path, path)
    assert "no layers/lognorm in it; choose another" in error(tmp_path, path, "--layer", "lognorm")


def variable_genes(X, n):
    """The n most variable genes by Seurat's normalized dispersion, gene by gene and bin by bin; X without logarithm."""
    X = X.astype(np.float64)
    log_mean, dispersion = {}, {}
    for g in range(X.shape[1]):
        mean, variance = X[:, g].mean(), X[:, g].var(ddof=1)
        log_mean[g] = np.log1p(mean)
        if variance > 0:
            dispersion[g] = np.log(variance / mean)
    low, high = min(log_mean.values()), max(log_mean.values())
    score = {}
    for b in range(20):
        left, right = low + (high - low) * b / 20, low + (high - low) * (b + 1) / 20
        members = [g for g in dispersion if (left < log_mean[g] or b == 0) and (log_mean[g] <= right or b == 19)]
        for g in members:
            values = [dispersion[m] for m in members]
            score[g] = 1 if len(members) == 1 else (dispersion[g] - np.mean(values)) / np.std(values, ddof=1)
    ranked = sorted(score.values(), reverse=True)
    return {g for g in score if score[g] >= ranked[:n][-1]}


def screen_of_golden(n_cells=300, n_genes=1000):
    """Counts from a generator whose numbers never change, as golden/hvg_seurat.json was made with."""
    rng = np.random.RandomState(7)
    mean, shape = np.exp(rng.normal(-1, 1.5, n_genes)), rng.gamma(2, 1, n_genes) + 0.1
    dense = rng.poisson(rng.gamma(shape, mean / shape, (n_cells, n_genes)) * rng.gamma(5, 0.2, (n_cells, 1))).astype(np.float32)
    dense[:, [3, 500]] = 0
    return dense


def test_the_most_variable_genes_are_scanpys(prepare, tmp_path):
    golden = json.loads((GOLDEN / "hvg_seurat.json").read_text())
    dense, labels = screen_of_golden(), ["NT"] * 60 + [f"GENE{i}" for i in range(20) for _ in range(12)]
    path = write_cells(tmp_path / "cells.h5ad", dense, labels, [f"GENE{i}" for i in range(1000)])
    for n, genes in golden["genes"].items():
        done, data = run(tmp_path, path, "--control", "NT", "--normalize", "--n-genes", n)
        assert set(data.genes) == {f"GENE{i}" for i in genes} | {f"GENE{i}" for i in range(20)}


@pytest.mark.parametrize("seed", range(3))
def test_the_most_variable_genes_are_those_of_the_formula_worked_out_gene_by_gene(prepare, seed):
    rng = np.random.RandomState(seed)
    X = rng.gamma(rng.gamma(1, 1, 200), 3, (50, 200)) * (rng.rand(50, 200) < 0.4)
    X[:, 5] = 0                 # never expressed
    X[:, 6] = 40 * rng.rand(50)  # alone in its bin
    for n in (1, 20, 150, 500):
        assert set(np.flatnonzero(prepare.most_variable(X.mean(0), X.var(0, ddof=1), n))) == variable_genes(X, n)


def test_genes_that_never_vary_leave_no_most_variable_ones(prepare):
    assert not prepare.most_variable(np.zeros(5), np.zeros(5), 3).any()


# --- options, summary

@pytest.mark.parametrize("option", [["--n-genes", 12], ["--min-cells", 6], ["--separator", "|"], ["--target-regex", "(GENE0)"], ["--drop", "GENE3*"], ["--upper-case"],
                                    ["--split", "none"]])
def test_an_option_that_changes_makes_the_output_stale(tmp_path, option):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS[:-5] + ["GENE5+ctrl"] * 5, GENES)
    run(tmp_path, path)
    done = run_script("03_prepare_data.py", "--dataset", "mine", "--h5ad", path, "--vocab", "none", *option, root=tmp_path, check=False)
    assert "stale, making it again" in done.stdout and option[0][2:].replace("-", "_") in done.stdout


@pytest.mark.parametrize("option, message", [(["--separator", ""], "--separator"), (["--target-regex", "(("], "in parentheses"),
                                             (["--target-regex", "x_g1"], "in parentheses"), (["--split", "no.json"], "no.json does not exist"),
                                             (["--n-genes", 0], "--n-genes: has to be above 0")])
def test_an_impossible_option_is_an_error_that_names_it(tmp_path, option, message):
    assert message in error(tmp_path, write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES), *option)


def test_the_summary_counts_genes_with_text_of_each_source(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES)
    assert "not known before python 01_fetch_annotations.py --dataset mine" in run(tmp_path, path)[0].stdout
    (tmp_path / "notes.tsv").write_text("gene\ttext\nGENE1\tone\nGENE2\ttwo\nOTHER\tthree\n")
    run_script("01_fetch_annotations.py", "--dataset", "mine", "--tsv", f"notes={tmp_path / 'notes.tsv'}", root=tmp_path)
    assert "genes with text, of 30: notes 2" in run(tmp_path, path, "--force")[0].stdout


# --- files of other kinds, and broken ones

def packed(folder, kind, content):
    """An h5ad's content in an archive."""
    path = folder / {"gz": "cells.h5ad.gz", "zip": "cells.zip", "tar": "cells.tar", "tar.gz": "cells.tar.gz"}[kind]
    if kind == "gz":
        path.write_bytes(gzip.compress(content))
    elif kind == "zip":
        zipped(path, "a/cells.h5ad", "__MACOSX/a/._cells.h5ad", content=content)
    else:
        (folder / "packed").write_bytes(content)
        with tarfile.open(path, "w:gz" if kind == "tar.gz" else "w") as archive:
            archive.add(folder / "packed", "cells.h5ad")
    return path


@pytest.mark.parametrize("kind", ["gz", "zip"])
def test_a_gzipped_or_zipped_file_is_read_as_it_is(tmp_path, kind):
    content = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES).read_bytes()
    _, data = run(tmp_path, packed(tmp_path, kind, content))
    np.testing.assert_array_equal(data.X, logged(counts()))
    assert [path.name for path in (tmp_path / "data/mine").iterdir()] == ["dataset.h5"]


@pytest.mark.parametrize("name, content, kind", [
    ("empty.h5ad", b"", "an empty file"), ("table.csv", b"cell,GENE0\n", "a text file (csv, tsv?)"), ("x.mtx", b"%%MatrixMarket matrix", "a text file (mtx)"),
    ("page.h5ad", b"<!doctype html>", "a web page"), ("x.pkl", pickle.dumps([1]), "a Python pickle"), ("x.h5ad", b"a\0b", "a binary file"),
    ("x.csv.gz", gzip.compress(b"cell,GENE0\n"), "a text file (csv, tsv?) in it"), ("x.rds", gzip.compress(b"X\n\0\0"), "an R object (rds) in it"),
    ("x.h5ad.bz2", bz2.compress(b"\x89HDF"), "a bzip2 file (unpack it)"), ("x.h5ad", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    ("x.h5ad.gz", gzip.compress(b"\x89HDF" * 10)[:-9], "damaged"), ("x.zip", b"PK\x03\x04 broken", "damaged")])
def test_a_file_of_another_kind_is_told_by_what_it_is(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    line = error(tmp_path, tmp_path / name)
    assert f"{name}: {kind}" in line and ("save it with write_h5ad" in line or kind == "damaged")


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zarr"])
def test_a_tar_archive_and_a_folder_are_told_too(tmp_path, kind):
    path = tmp_path / "cells.zarr"
    path.mkdir()
    if kind != "zarr":
        path = packed(tmp_path, kind, b"cells")
    assert f"{path.name}: {'a folder (zarr?)' if kind == 'zarr' else 'a tar archive'}, not an AnnData file" in error(tmp_path, path)


@pytest.mark.parametrize("groups, kind", [
    (["mod", "obs", "var"], "a MuData file (h5mu)"), (["matrix/barcodes"], "10x Genomics' h5 format"), (["matrix", "row_attrs"], "a loom file"),
    (["assays", "cell.names"], "an h5Seurat file"), (["stuff"], "an HDF5 file with stuff in it"), ([], "an HDF5 file with nothing in it")])
def test_other_hdf5_files_are_told_by_what_they_are(tmp_path, groups, kind):
    with h5py.File(tmp_path / "cells.h5", "w") as file:
        for name in groups:
            file.create_group(name)
    assert f"cells.h5: {kind}, not an AnnData file" in error(tmp_path, tmp_path / "cells.h5")


@pytest.mark.parametrize("name", ["X", "obs/condition"])
def test_data_that_lies_in_another_file_is_not_followed(tmp_path, name):
    write_cells(tmp_path / "other.h5ad", logged(counts()), LABELS, GENES)
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES)
    with h5py.File(path, "a") as file:
        del file[name]
        file[name] = h5py.ExternalLink("other.h5ad", f"/{name}")
    assert f"{name} lies in another file" in error(tmp_path, path)


def test_a_file_cut_anywhere_is_an_error_that_names_it(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES)
    content = path.read_bytes()
    for size in (0, 1, 8, 95, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        assert "cells.h5ad" in error(tmp_path, path)


def zipped(path, *names, content=b"not HDF5"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("names, message", [([], "0 .h5ad files"), (["a.h5ad", "b.h5ad"], "2 .h5ad files"),
                                            (["../../evil.h5ad"], "a text file")])
def test_a_zip_needs_one_file_of_cells_and_no_name_in_it_becomes_a_path(tmp_path, names, message):
    (tmp_path / "root").mkdir()
    assert message in error(tmp_path / "root", zipped(tmp_path / "cells.zip", *names))
    assert not list(tmp_path.rglob("*.h5ad")) and not list((tmp_path / "root/data/mine").iterdir())


@pytest.mark.parametrize("seed", range(10))
def test_random_bytes_in_the_matrix_end_well_or_in_one_line(tmp_path, seed):
    rng = random.Random(seed)
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES, rng.choice(["csr", "csc"]))
    with h5py.File(path, "a") as file:
        for name in "indices", "indptr":
            file["X"][name][rng.randrange(30)] = rng.choice([-1, 0, 29, 30, 10**6])
    done = run_script("03_prepare_data.py", "--dataset", "mine", "--h5ad", path, "--vocab", "none", root=tmp_path, check=False)
    assert done.returncode == 0 or done.stderr.count("\n") == 1 and "cells.h5ad" in done.stderr
