"""03_prepare_data.py on a lab's own files: every layout of AnnData, counts, guides, separators, variable genes; and on files
that are broken or made to do harm."""
import json
import os
import random
import re
import tracemalloc
import zipfile
import zlib
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from conftest import GOLDEN, error_of, run_script


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


def write_x(file, dense, layout="csr", index_dtype=np.int32, **dataset):
    if layout == "dense":
        file.create_dataset("X", data=dense, **dataset)
        return
    matrix = (sparse.csr_matrix if layout == "csr" else sparse.csc_matrix)(dense)
    group = file.create_group("X")
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
    assert data.targets_of == {"NT": [], "HGNC0+HGNC1": ["HGNC0", "HGNC1"], "LOST+ctrl": ["LOST"],
                               **{f"HGNC{i}+ctrl": [f"HGNC{i}"] for i in range(20)}}
    names = [label.replace("_g1", "").replace("_g2", "") for label in np.array(labels)[kept]]
    names = ["NT" if name == "NT" else "HGNC0+HGNC1" if "|" in name else f"{name}+ctrl" for name in names]
    assert data.conditions[data.cell_condition].tolist() == names
    assert "HGNC30+ctrl (2)" in done.stdout and "LOST" in done.stdout and "HGNC0_g1 and HGNC0_g2 to HGNC0+ctrl" in done.stdout
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


@pytest.mark.parametrize("layout", ["csr", "csc", "dense"])
def test_memory_holds_what_is_kept_not_the_file(prepare, tmp_path, monkeypatch, layout):
    labels = LABELS * 40
    dense = np.random.RandomState(0).poisson(0.3, (len(labels), 1500)).astype(np.float32)  # 1.2 million values, 9 MB as CSR
    path = write_cells(tmp_path / "cells.h5ad", dense, labels, [f"GENE{i}" for i in range(1500)], layout, "plain")
    monkeypatch.setattr(prepare, "BLOCK", 2**15)
    args = SimpleNamespace(normalize=True, n_genes=30)
    with h5py.File(path) as file:
        tracemalloc.start()
        X, chosen = prepare.read_cells(lambda: prepare.read_blocks(file, path, dense.shape), np.ones(len(labels), dtype=bool),
                                       np.zeros(1500, dtype=bool), args, path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert chosen.sum() == 30 and peak < 4e6
    np.testing.assert_allclose(X.toarray(), logged(dense)[:, chosen], rtol=1e-6)


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
    assert data.conditions[data.cell_condition].tolist() == labels[4:] and "4 of 75 cells have no condition: left out" in done.stdout
    np.testing.assert_allclose(data.X, logged(counts())[4:], rtol=1e-6)


def test_a_column_of_floats_has_missing_labels_too_and_a_text_nan_is_warned_of(tmp_path):
    labels = np.repeat(np.arange(15.0), 5)
    labels[-3:] = np.nan
    genes = [f"{i}.0" for i in range(30)]
    done, data = run(tmp_path, write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, genes, encoding="numbers"), "--control", "0.0")
    assert "3 of 75 cells have no condition: left out" in done.stdout and "nan" not in data.conditions
    done, data = run(tmp_path, write_cells(tmp_path / "cells.h5ad", logged(counts()), labels.astype(str), genes, "csr", "plain"), "--control", "0.0", "--force")
    assert "warning: nan counts as a target" in done.stderr and "nan" in data.conditions


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
    assert set(data.conditions) == {str(i) for i in range(15)} and data.targets_of["7"] == ["7"]


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
    assert "Ensembl ids (ENSG00000000000.2" in message and "--gene-key" in message and "feature_name" in message
    assert "Ensembl ids" in run(tmp_path, path)[0].stdout


# --- labels

@pytest.mark.parametrize("separator, label, targets", [
    ("+", "A+B", ["A", "B"]), ("_", "A_B", ["A", "B"]), ("|", "A|B", ["A", "B"]), (",", "A,B", ["A", "B"]), (", ", "A, B", ["A", "B"]),
    ("+", "A+B+C+D", ["A", "B", "C", "D"]), ("_", "A_B_C", ["A", "B", "C"]),
    ("_", "A_NT", ["A"]), ("_", "NT_A", ["A"]), ("_", "NT", []), ("+", "A", ["A"]),
    ("+", "HLA-A+MT_CO1", ["HLA-A", "MT_CO1"]),
    ("-", "HLA-A-B", ["HLA-A", "B"]), ("-", "B-HLA-A", ["B", "HLA-A"]), ("_", "MT_CO1_A", ["MT_CO1", "A"])])
def test_every_separator_gives_the_targets(prepare, separator, label, targets):
    assert prepare.parse_condition(label, "NT", separator, {"A", "B", "C", "HLA-A", "MT_CO1"}) == targets


def test_a_control_label_with_the_separator_in_it_is_the_control(prepare):
    assert prepare.parse_condition("non-targeting", "non-targeting", "-") == []
    assert prepare.parse_condition("KLF1-non-targeting", "non-targeting", "-") == ["KLF1"]
    assert prepare.parse_condition("non-targeting-KLF1", "non-targeting", "-") == ["KLF1"]


@pytest.mark.parametrize("label, targets", [
    ("KLF1_g2", ["KLF1"]), ("KLF1_g2+MAP2K6_g1", ["KLF1", "MAP2K6"]), ("MAP2K6_g1+KLF1_g2", ["KLF1", "MAP2K6"]), ("KLF1_g1+KLF1_g2", ["KLF1"]),
    ("KLF1_g1+ctrl_g7", ["KLF1"]), ("ctrl_g1+ctrl_g2", []), ("ctrl", []), ("KLF1", ["KLF1"]), ("KLF1_guide", ["KLF1_guide"])])
def test_guides_are_collapsed_where_the_regex_matches_the_whole_name(prepare, label, targets):
    assert prepare.parse_condition(label, target_regex="(.+)_g[0-9]+") == targets


def test_labels_stay_as_in_the_source_unless_guides_are_collapsed(tmp_path):
    labels = [label.replace("ctrl+", "").replace("+ctrl", "_g1") if i % 2 else label for i, label in enumerate(LABELS)]
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, GENES)
    assert set(run(tmp_path, path)[1].conditions) == set(labels)
    done, data = run(tmp_path, path, "--target-regex", "(.+)_g[0-9]+")
    assert set(data.conditions) == set(LABELS) and data.conditions[data.cell_condition].tolist() == LABELS
    assert "22 labels collapsed to 12: GENE0+ctrl and GENE0_g1 to GENE0+ctrl" in done.stdout


@pytest.mark.parametrize("label, options, advice", [("GENE0_GENE1", [], "--separator"),
                                                    ("GENE1-sg2", [], "--target-regex")])
def test_targets_that_look_like_pairs_or_guides_are_pointed_out(tmp_path, label, options, advice):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS[:-5] + [label] * 5, GENES)
    done, _ = run(tmp_path, path, *options)
    assert "warning" in done.stderr and label in done.stderr and advice in done.stderr


def test_a_target_regex_that_matches_no_guide_is_an_error(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS[:-5] + ["GENE1-sg2"] * 5, GENES)
    assert "'(.+)_g[0-9]+' matches no guide of" in error(tmp_path, path, "--target-regex", "(.+)_g[0-9]+")


def test_conditions_of_few_cells_are_left_out_and_listed(tmp_path):
    labels = LABELS[:-4] + ["GENE8+GENE9"] * 3 + ["GENE7+GENE9"]
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, GENES)
    done, data = run(tmp_path, path, "--min-cells", 3)
    assert set(labels) - set(data.conditions) == {"GENE0+GENE1", "GENE7+GENE9"} and len(data.X) == 73
    assert "2 conditions left out (their cells): GENE0+GENE1 (1), GENE7+GENE9 (1)" in done.stdout
    assert "the control 'ctrl' has 20 cells" in error(tmp_path, path, "--min-cells", 21)


def test_odd_characters_in_genes_and_labels_change_nothing(tmp_path):
    odd = ['A/B', '../../x', "it's", 'say "x"', "two words", "a,b", "β-catenin", "line\nbreak", "tab\there", "%s{0}\\n", "🧬"]
    labels = [odd[GENES.index(label.split("+")[0])] if label.endswith("+ctrl") else label for label in LABELS]
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), labels, odd + GENES[len(odd):])
    done, data = run(tmp_path, path, "--min-cells", 2)
    assert data.conditions[data.cell_condition].tolist() == labels and data.genes[:len(odd)].tolist() == odd
    assert [p.name for p in (tmp_path / "data").rglob("*")] == ["mine", "dataset.h5"]
    assert "most cells are ctrl, " in error(tmp_path, path, "--control", "none such")


# --- expression

def test_logged_data_is_left_alone_and_normalize_says_so(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES)
    done, data = run(tmp_path, path, "--normalize")
    np.testing.assert_array_equal(data.X, logged(counts()))
    assert "left it alone" in done.stdout


@pytest.mark.parametrize("change, options, message", [
    (lambda X: X - X.mean(0), [], "negative values: scaled data?"), (lambda X: X, [], "raw counts; add --normalize"),
    (lambda X: X * 100.5, [], "log-transform it"), (lambda X: X.astype(np.float64) * 1e300, [], "infinite"),
    (lambda X: X * (np.arange(len(X)) > 0)[:, None], ["--normalize"], "1 cells have no counts at all")])
def test_values_that_are_neither_counts_nor_logarithms_are_refused_with_advice(tmp_path, change, options, message):
    path = write_cells(tmp_path / "cells.h5ad", change(counts()), LABELS, GENES)
    line = error(tmp_path, path, *options)
    assert message in line and "cells.h5ad" in line


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

@pytest.mark.parametrize("option", [["--n-genes", 12], ["--min-cells", 6], ["--separator", "|"], ["--target-regex", "(GENE0)"]])
def test_an_option_that_changes_makes_the_output_stale(tmp_path, option):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS[:-5] + ["GENE5+ctrl"] * 5, GENES)
    run(tmp_path, path)
    done = run_script("03_prepare_data.py", "--dataset", "mine", "--h5ad", path, "--vocab", "none", *option, root=tmp_path, check=False)
    assert "stale, making it again" in done.stdout and option[0][2:].replace("-", "_") in done.stdout


@pytest.mark.parametrize("option, message", [(["--separator", ""], "--separator"), (["--target-regex", "(("], "not a regular expression"),
                                             (["--target-regex", "x_g1"], "in parentheses"), (["--n-genes", 0], "--n-genes"),
                                             (["--min-cells", -1], "--min-cells")])
def test_an_impossible_option_is_an_error_that_names_it(tmp_path, option, message):
    assert message in error(tmp_path, write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES), *option)


def test_the_summary_counts_genes_with_text_of_each_source(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES)
    assert "not known before python 01_fetch_annotations.py --dataset mine" in run(tmp_path, path)[0].stdout
    (tmp_path / "notes.tsv").write_text("gene\ttext\nGENE1\tone\nGENE2\ttwo\nOTHER\tthree\n")
    run_script("01_fetch_annotations.py", "--dataset", "mine", "--tsv", f"notes={tmp_path / 'notes.tsv'}", root=tmp_path)
    assert "genes with text, of 30: notes 2" in run(tmp_path, path, "--force")[0].stdout


# --- files that are broken or made to do harm

def replace(file, name, **dataset):
    del file[name]
    file.create_dataset(name, **dataset)


def virtual(file, name, source):
    del file[name]
    layout = h5py.VirtualLayout((5,), "i4")
    layout[:] = h5py.VirtualSource(source, "X/indptr", (5,))
    file.create_virtual_dataset(name, layout)


def link(file, name, target):
    del file[name]
    file[name] = target


OTHER = "other.h5ad"  # a whole file beside it: who follows the link ends well
HARM = {
    "external link": (lambda f: link(f, "X", h5py.ExternalLink(OTHER, "/X")), "is a link"),
    "external link to a column": (lambda f: link(f, "obs/condition", h5py.ExternalLink(OTHER, "/obs/condition")), "is a link"),
    "external link within X": (lambda f: link(f, "X/data", h5py.ExternalLink(OTHER, "/X/data")), "is a link"),
    "soft link": (lambda f: link(f, "var", h5py.SoftLink("/obs")), "is a link"),
    "soft link in a circle": (lambda f: link(f, "X/indices", h5py.SoftLink("/X/indices")), "is a link"),
    "data in another file": (lambda f: replace(f, "X/data", shape=(100,), dtype="f4", external=[(OTHER, 0, 400)]), "in other files"),
    "virtual data": (lambda f: virtual(f, "X/indptr", OTHER), "in other files"),
    "terabytes of values": (lambda f: replace(f, "X/data", shape=(10**13,), dtype="f4", chunks=(10**6,)), "declares"),
    "terabytes of rows": (lambda f: replace(f, "X/indptr", shape=(10**13,), dtype="i8", chunks=(10**6,)), "declares"),
    "terabytes of labels": (lambda f: replace(f, "obs/condition/codes", shape=(10**12,), dtype="i1", chunks=(10**6,)), "declares"),
    "terabytes of names": (lambda f: replace(f, "var/_index", shape=(10**12,), dtype=h5py.string_dtype(), chunks=(10**6,)), "declares"),
    "a dense X of terabytes": (lambda f: replace(f, "X", shape=(10**7, 10**6), dtype="f4", chunks=(1, 10**6)), "declares"),
    "a chunk of gigabytes": (lambda f: replace(f, "X/data", shape=(100,), maxshape=(None,), dtype="f4", chunks=(10**9,)), "declares"),
    "a wide type": (lambda f: replace(f, "obs/condition/categories", data=np.array([b"x" * 10**6] * 3)), "characters in it"),
    "values of text": (lambda f: replace(f, "X/data", data=[b"1"] * 10), "non-numeric"),
    "values of pairs": (lambda f: replace(f, "X/data", data=np.zeros(10, dtype="c8")), "non-numeric"),
    "indices of fractions": (lambda f: replace(f, "X/indices", data=np.zeros(f["X/indices"].shape)), "damaged sparse matrix"),
    "indptr of text": (lambda f: replace(f, "X/indptr", data=[b"1"] * 76), "expected numbers"),
    "a square of indices": (lambda f: replace(f, "X/indices", data=np.zeros((5, 5), dtype="i4")), "damaged sparse matrix"),
    "indptr descending": (lambda f: f["X/indptr"].__setitem__(3, f["X/indptr"][4] + 1), "damaged sparse matrix"),
    "indptr not from zero": (lambda f: f["X/indptr"].__setitem__(0, 1), "damaged sparse matrix"),
    "an index too large": (lambda f: f["X/indices"].__setitem__(7, 30), "damaged sparse matrix"),
    "a negative index": (lambda f: f["X/indices"].__setitem__(7, -1), "damaged sparse matrix"),
    "fewer indices than values": (lambda f: replace(f, "X/indices", data=f["X/indices"][:-1]), "damaged sparse matrix"),
    "another shape": (lambda f: f["X"].attrs.__setitem__("shape", (10**15, 30)), "1000000000000000 x 30, but there are 75 cells"),
    "no shape": (lambda f: f["X"].attrs.__delitem__("shape"), "neither a dense, a CSR nor a CSC"),
    "an unknown layout": (lambda f: f["X"].attrs.__setitem__("encoding-type", "coo\nmatrix"), "neither a dense, a CSR nor a CSC"),
    "X in three dimensions": (lambda f: replace(f, "X", data=np.zeros((75, 30, 2))), "neither a dense"),
    "X a number": (lambda f: replace(f, "X", data=3.0), "neither a dense"),
    "X without values": (lambda f: f["X"].__delitem__("data"), "non-numeric"),
    "codes beyond the categories": (lambda f: f["obs/condition/codes"].__setitem__(0, 99), "codes beyond"),
    "codes below": (lambda f: f["obs/condition/codes"].__setitem__(0, -2), "codes beyond"),
    "no categories": (lambda f: f["obs/condition"].__delitem__("categories"), "is missing"),
    "columns of a kind of its own": (lambda f: replace(f, "obs/condition/categories", data=np.zeros(3, dtype=[("a", "i4")])), "expected text"),
    "text that is no UTF-8": (lambda f: replace(f, "var/_index", data=[b"\xff\xfe"] * 30), "utf-8"),
    "text with NUL": (lambda f: replace(f, "var/_index", data=np.array([b"a\0b"] * 30)), "NUL"),
    "a name of a million characters": (lambda f: replace(f, "var/_index", data=["x" * 10**6] + GENES[1:]), "characters in it"),
    "a label of a hundred thousand targets": (lambda f: f["obs/condition/categories"].__setitem__(0, "A+" * 4000 + "A"), "expected 'ctrl'"),
    "no cells": (lambda f: (replace(f, "obs/condition/codes", data=np.zeros(0, dtype="i1")), replace(f, "X", data=np.zeros((0, 30)))), "0 cells"),
    "obs a list": (lambda f: replace(f, "obs", data=np.zeros(75, dtype=[("condition", "i4")])), "no table of columns"),
}


@pytest.mark.parametrize("name", HARM)
def test_harm_is_one_line_that_names_file_and_cause_and_takes_no_memory(tmp_path, name):
    harm, message = HARM[name]
    write_cells(tmp_path / OTHER, logged(counts()), LABELS, GENES)
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES)
    with h5py.File(path, "a") as file:
        harm(file)
    tracemalloc.start()
    line = error(tmp_path, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert message in line and "cells.h5ad" in line and len(line) < 600
    assert peak < 50e6 and not (tmp_path / "data/mine/dataset.h5").exists()


def test_zeros_among_the_texts_of_a_file_do_not_hang_the_run(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES)
    content = path.read_bytes()
    heap = content.index(b"GCOL")
    for start in range(heap + 16, heap + 1000, 200):
        path.write_bytes(content[:start] + bytes(100) + content[start + 100:])
        assert "without end" in error(tmp_path, path)


CLAIM = (0xFF000005).to_bytes(4, "little")  # the length that a reference to a text claims: 4 GB


@pytest.mark.parametrize("options", [{}, {"chunks": (10,)}, {"chunks": (30,), "compression": "gzip"}, {"chunks": (30,), "compression": "gzip", "shuffle": True}])
def test_a_text_that_claims_gigabytes_is_not_asked_for(tmp_path, options):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES)
    with h5py.File(path, "a") as file:
        replace(file, "var/_index", data=GENES, dtype=h5py.string_dtype(), **options)
        index = file["var/_index"].id
        start = index.get_chunk_info(0).byte_offset if options else index.get_offset()
        if "compression" in options:
            references = bytearray(zlib.decompress(index.read_direct_chunk((0,))[1]))
            references[90 if "shuffle" in options else 3] = 255
            index.write_direct_chunk((0,), zlib.compress(references))
    if "compression" not in options:
        content = bytearray(path.read_bytes())
        assert content[start:start + 4] == len("GENE0").to_bytes(4, "little")
        content[start:start + 4] = CLAIM
        path.write_bytes(content)
    assert "a text in '/var/_index' that is longer than the file" in error(tmp_path, path)


def test_packed_texts_that_are_damaged_are_one_line(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES)
    with h5py.File(path, "a") as file:
        replace(file, "var/_index", data=GENES, dtype=h5py.string_dtype(), chunks=(30,), compression="gzip")
        file["var/_index"].id.write_direct_chunk((0,), b"no zlib")
    assert "cells.h5ad: not a whole HDF5 file, or a damaged one (/var/_index: " in error(tmp_path, path)


def test_an_attribute_that_claims_gigabytes_is_not_asked_for(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES)
    with h5py.File(path, "a") as file:
        file["X"].attrs["note"] = 77 * "x"
    content = path.read_bytes()
    references = [match.start() for match in re.finditer((77).to_bytes(4, "little"), content)
                  if content[int.from_bytes(content[match.end():match.end() + 8], "little"):][:4] == b"GCOL"]
    assert len(references) == 1
    path.write_bytes(content[:references[0]] + CLAIM + content[references[0] + 4:])
    assert "that is longer than what it lies in" in error(tmp_path, path)


def test_texts_without_end_that_lie_amid_numbers_are_not_read(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES)
    with h5py.File(path, "a") as file:
        file["uns/numbers"] = np.zeros(4096, "u1")
        numbers = file["uns/numbers"].id.get_offset()
        replace(file, "var/_index", data=GENES, dtype=h5py.string_dtype())
        references = file["var/_index"].id.get_offset()
    content = bytearray(path.read_bytes())
    heap = int.from_bytes(content[references + 4:references + 12], "little")
    content[numbers:numbers + 4096] = content[heap:heap + 216] + bytes(4096 - 216)
    for i in range(30):
        content[references + 16 * i + 4:references + 16 * i + 12] = numbers.to_bytes(8, "little")
    path.write_bytes(content)
    assert "texts amid numbers" in error(tmp_path, path)


def test_groups_within_groups_without_end_are_not_walked(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES)
    with h5py.File(path, "a") as file:
        group = file.create_group("uns").id
        for _ in range(2000):
            group = h5py.h5g.create(group, b"a")
    assert "groups within groups" in error(tmp_path, path)


def test_a_column_of_more_entries_than_any_screen_has_cells_is_refused(tmp_path):
    path = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES)
    with h5py.File(path, "a") as file:
        replace(file, "obs/condition", shape=(30_000_000,), dtype=bool, chunks=(2**20,), compression="gzip")
        file["obs/condition"][::2**19] = 1
    assert "30,000,000 entries" in error(tmp_path, path)


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


def test_a_zip_that_declares_an_absurd_expansion_is_not_unpacked(tmp_path):
    path = zipped(tmp_path / "cells.zip", "cells.h5ad", content=bytes(10**6))
    content = path.read_bytes()
    sizes = (10**6).to_bytes(4, "little")
    for size, message in ((3 * 10**9, "declare to unpack to 3.0 GB"), (10**5, "cannot be unpacked")):
        path.write_bytes(content.replace(sizes, size.to_bytes(4, "little")))
        assert message in error(tmp_path, path)


def test_what_a_killed_run_left_unpacked_goes_after_a_day(tmp_path):
    old, new = (tmp_path / f"data/mine/.unpacked-{name}" for name in ("old", "new"))
    for folder in (old, new):
        folder.mkdir(parents=True)
    os.utime(old, (0, 0))
    cells = write_cells(tmp_path / "cells.h5ad", logged(counts()), LABELS, GENES)
    run(tmp_path, zipped(tmp_path / "cells.zip", "cells.h5ad", content=cells.read_bytes()))
    assert not old.exists() and new.exists()


@pytest.mark.parametrize("names, message", [([], "0 .h5ad files"), (["a.h5ad", "b.h5ad"], "2 .h5ad files"),
                                            (["../../evil.h5ad"], "not a whole HDF5")])
def test_a_zip_needs_one_file_of_cells_and_no_name_in_it_becomes_a_path(tmp_path, names, message):
    (tmp_path / "root").mkdir()
    assert message in error(tmp_path / "root", zipped(tmp_path / "cells.zip", *names))
    assert not list(tmp_path.rglob("*.h5ad")) and not list((tmp_path / "root/data/mine").iterdir())


# --- random damage

def structure_damage(file, rng):
    """One random change of the structure of a file: something deleted, replaced by another, or of another size or type."""
    names = []
    file.visit(names.append)
    name = rng.choice(names)
    kind = rng.randrange(6)
    if kind == 0:
        del file[name]
    elif kind == 1:
        other = rng.choice(names)
        value = file[other]
        if not other.startswith(name) and not name.startswith(other):
            del file[name]
            file[name] = value  # a hard link
    elif kind == 2:
        values = [np.zeros(3), np.array([b"text"] * 75), np.arange(76), np.zeros((75, 30), "i1"), -1, np.array([np.nan] * 30),
                  h5py.Empty("f4")]
        del file[name]
        file[name] = rng.choice(values)
    elif kind == 3:
        attribute = rng.choice(["encoding-type", "shape", "_index", "categories"])
        file[name].attrs[attribute] = rng.choice([0, "x", [1, 2], b"\xff", [75, 30], "csc_matrix"])
    elif kind == 4 and isinstance(file[name], h5py.Dataset) and file[name].size:
        values = file[name][...]
        values.flat[rng.randrange(values.size)] = rng.choice([0, -1, 1, 100]) if values.dtype.kind in "iufb" else b""
        file[name][...] = values
    elif isinstance(file[name], h5py.Dataset) and file[name].ndim:
        values = file[name][:rng.randrange(len(file[name]) + 1)]
        dtype = file[name].dtype
        del file[name]
        file.create_dataset(name, data=values, dtype=dtype)


def damaged(path, kind, rng):
    if kind == "structure":
        with h5py.File(path, "a") as file:
            for _ in range(rng.randint(1, 2)):
                structure_damage(file, rng)
        return
    content = bytearray(path.read_bytes())
    for _ in range(rng.randint(1, 20)):
        if rng.random() < 0.2:  # where the directory of a file or zip stands
            content[rng.randrange(min(3000, len(content)))] = rng.randrange(256)
        else:
            content[rng.randrange(len(content))] = rng.choice([0, 1, 127, 255, rng.randrange(256)])
    if rng.random() < 0.1:
        del content[rng.randrange(len(content)):]
    path.write_bytes(content)


def check_outcome(folder, kind, encoding, layout, seed):
    """Damage a good file at random and prepare it: success, or one line that names the file."""
    path = write_cells(folder / "cells.h5ad", logged(counts()), LABELS, GENES, layout, encoding)
    if kind == "zip":
        with zipfile.ZipFile(folder / "cells.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(path, "x/cells.h5ad")
        path = folder / "cells.zip"
    damaged(path, kind, random.Random(seed))
    done = run_script("03_prepare_data.py", "--dataset", "mine", "--h5ad", path, "--vocab", "none", "--min-cells", 1, root=folder, check=False)
    errors = done.stderr.strip().splitlines()
    if done.returncode:
        assert done.returncode == 1 and len(errors) == 1 and errors[0].startswith("error: "), done.stderr
        assert path.name in errors[0] or "the split leaves no condition" in errors[0], errors[0]
        assert not (folder / "data/mine/dataset.h5").exists()
    else:
        assert all(line.startswith("warning: ") for line in errors), done.stderr
    assert not list((folder / "data/mine").glob(".*"))


damage = given(kind=st.sampled_from(["bytes", "structure", "zip"]), encoding=st.sampled_from(["categories", "old categories", "nullable"]),
               layout=st.sampled_from(["csr", "csc", "dense"]), seed=st.integers(0, 2**32))
fuzz = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@settings(fuzz, max_examples=30)
@damage
def test_random_damage_ends_well_or_in_one_line(tmp_path_factory, **drawn):
    check_outcome(tmp_path_factory.mktemp("damage"), **drawn)


@pytest.mark.soak
@settings(fuzz, max_examples=500)
@damage
def test_much_random_damage_ends_well_or_in_one_line(tmp_path_factory, **drawn):
    check_outcome(tmp_path_factory.mktemp("damage"), **drawn)
