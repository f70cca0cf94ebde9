"""03_prepare_data.py on a lab's own files: every layout of AnnData, labels as they are in the field, counts,
variable genes; and on files of other kinds, or broken ones."""
import bz2
import gzip
import json
import pickle
import tarfile
import tracemalloc
import zipfile

import h5py
import numpy as np
import pytest
from scipy import sparse

from cells import (GENES, IDS, LABELS, STAGE, counts, logged, prepared, refused, write_cells, write_matrix,
                   write_text)
from conftest import GOLDEN, error_of, run_script


@pytest.fixture(scope="module")
def stage03(stage):
    return stage("03_prepare_data")


# --- the whole path, on a file that has nothing in common with GEARS'

def test_a_file_unlike_gears_gives_the_numbers_worked_out_by_hand(tmp_path):
    """Counts stored by gene, ids as the index, guides, a pair with |, targets not measured or rare."""
    genes = [f"HGNC{i}" for i in range(200)]
    labels = ["NT_g1"] * 40 + ["NT_g2"] * 20 + ["HGNC1_g1|HGNC0_g2"] * 6 + ["LOST_g1 "] * 5
    expected_labels = ["ctrl"] * 60 + ["HGNC0+HGNC1"] * 6 + ["LOST+ctrl"] * 5
    for gene in genes[:20]:
        labels += [f"{gene}_g1"] * 4 + [f"{gene}_g2"] * 4
        expected_labels += [f"{gene}+ctrl"] * 8
    X = counts(len(labels) + 2, 200) * np.arange(1, 234)[:, None]  # each cell read deeper than the one before
    path = write_cells(
        tmp_path, X, labels + ["HGNC30_g1"] * 2, [f"ENSG{i:011d}" for i in range(200)], layout="csc",
        encoding="nullable", obs_column="guide", var_columns={"symbol": genes})
    data = prepared(
        path, "--condition-key", "guide", "--control", "NT", "--gene-key", "symbol", "--normalize",
        "--separator", "|", "--target-regex", "(.+)_g[0-9]+", "--min-cells", 5)

    assert data.genes == genes + ["LOST"]
    assert data.measured.tolist() == [True] * 200 + [False]
    np.testing.assert_allclose(data.X[:, :-1], logged(X[:-2]), rtol=1e-6)
    assert not data.X[:, -1].any()
    assert data.labels == expected_labels
    singles = {f"{target}+ctrl": [target] for target in [*genes[:20], "LOST"]}
    assert data.targets_of == {"ctrl": [], "HGNC0+HGNC1": ["HGNC1", "HGNC0"], **singles}
    assert "HGNC30+ctrl (2)" in data.stdout
    assert "45 labels make 24 conditions: " in data.stdout
    assert "HGNC0+ctrl (HGNC0_g1, HGNC0_g2)" in data.stdout
    assert "231 cells (60 control), 200 genes, 22 perturbations of 21 targets" in data.stdout
    assert "20 of 21 targets are measured; added as unmeasured genes: LOST" in data.stdout


# --- layouts and encodings

@pytest.mark.parametrize("block", [2**23, 200])
@pytest.mark.parametrize("layout, dtype, storage", [
    ("csr", np.uint8, {}),
    ("csr", np.float32, {"compression": "gzip", "index_dtype": np.int64}),
    ("csc", np.int64, {}),
    ("dense", np.uint8, {}),
    ("dense", np.float64, {"chunks": (7, 4)})])
def test_layout_number_type_and_blocks_change_nothing(
        stage03, tmp_path, monkeypatch, layout, dtype, storage, block):
    monkeypatch.setattr(stage03, "BLOCK", block)
    data = prepared(write_cells(tmp_path, counts().astype(dtype), layout=layout, **storage), "--normalize")
    np.testing.assert_allclose(data.X, logged(counts()), rtol=1e-6)


@pytest.mark.parametrize("layout, options", [("csr", []), ("dense", ["--n-genes", 30])])
def test_memory_never_holds_all_cells(stage03, tmp_path, monkeypatch, layout, options):
    monkeypatch.setattr(stage03, "BLOCK", 2**14)
    labels = LABELS * 24
    X = np.random.RandomState(0).poisson(0.3, (len(labels), 1000)).astype(np.float32)
    path = write_cells(tmp_path, X, labels, [f"GENE{i}" for i in range(1000)], layout)
    n_bytes = 8 * np.count_nonzero(X)  # of their values and indices as CSR, 3.7 MB
    tracemalloc.start()
    run_script(*STAGE, path, "--normalize", *options, root=tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.75 * n_bytes


def test_rows_of_the_matrix_on_disk_are_those_in_memory(stage03, tmp_path):
    dense = logged(counts())
    dense[7] = dense[-1] = 0
    parts = [dense[:1], dense[1:40], dense[40:40], dense[40:]]
    blocks = [sparse.csr_matrix(part) for part in parts]
    with h5py.File(tmp_path / "x.h5", "w") as file:
        written = stage03.write_blocks(file, "X", blocks, np.count_nonzero(dense), dense.shape)
        assert list(written) == blocks
    with h5py.File(tmp_path / "x.h5") as file:
        X = stage03.ExpressionMatrix(file["X"])
    shuffled = np.random.default_rng(0).permutation(len(dense))
    for cells in [5, 5, 0], [7], [], [len(dense) - 1, 7, 3], shuffled:
        cells = np.array(cells, dtype=int)
        rows = X[cells]
        assert rows.format == "csr" and rows.dtype == np.float32
        np.testing.assert_array_equal(rows.toarray(), dense[cells])


@pytest.mark.parametrize("layout", ["csr", "csc"])
def test_values_that_are_stored_in_parts_count_as_their_sum(tmp_path, layout):
    path = write_cells(tmp_path, counts(), layout=layout)
    with h5py.File(path, "a") as file:
        X = file["X"]
        replace(X, "data", np.repeat(X["data"][:] / 2, 2))
        replace(X, "indices", np.repeat(X["indices"][:], 2))
        replace(X, "indptr", 2 * X["indptr"][:])
    data = prepared(path, "--normalize")
    np.testing.assert_allclose(data.X, logged(counts()), rtol=1e-6)


def replace(group, name, values):
    del group[name]
    group[name] = values


@pytest.mark.parametrize("encoding", [
    "plain", "fixed length", "nullable", "categories", "old categories", "nullable categories"])
def test_labels_are_read_in_every_encoding(tmp_path, encoding):
    assert prepared(write_cells(tmp_path, encoding=encoding)).labels == LABELS


def test_a_category_without_cells_does_not_exist(tmp_path):
    path = write_cells(tmp_path)
    with h5py.File(path, "a") as file:
        column = file["obs/condition"]
        gone, other = column["categories"].asstr()[3:5]
        codes = column["codes"][:]
        column["codes"][:] = np.where(codes == 3, 4, codes)
    data = prepared(path)
    assert set(data.conditions) == set(LABELS) - {gone}
    assert data.labels.count(other) == 10


@pytest.mark.parametrize("encoding", ["nullable", "categories"])
def test_cells_without_a_label_are_left_out_and_counted(tmp_path, encoding):
    data = prepared(write_cells(tmp_path, labels=[None] * 4 + LABELS[4:], encoding=encoding))
    assert data.labels == LABELS[4:]
    np.testing.assert_array_equal(data.X, logged(counts())[4:])
    assert "left out, with numbers of cells: no label (4)" in data.stdout


NUMBERS = [str(i) for i in range(30)]


def test_a_column_of_numbers_gives_labels_as_they_print(tmp_path):
    labels = np.repeat(np.arange(15), 5)
    data = prepared(write_cells(tmp_path, labels=labels, genes=NUMBERS, encoding="numbers"), "--control", "0")
    assert data.labels == ["ctrl"] * 5 + [f"{label}+ctrl" for label in labels[5:]]
    assert data.targets_of["7+ctrl"] == ["7"]


@pytest.mark.parametrize("encoding, line", [("numbers", "no label (3)"), ("plain", "nan (3)")])
def test_not_a_number_is_no_label_and_its_text_means_unknown(tmp_path, encoding, line):
    labels = np.repeat(np.arange(15.0), 5)
    labels[-3:] = np.nan
    labels = labels if encoding == "numbers" else labels.astype(str)
    data = prepared(write_cells(tmp_path, labels=labels, encoding=encoding), "--control", "0.0")
    assert f"left out, with numbers of cells: {line}" in data.stdout
    assert len(data.labels) == 72 and len(data.conditions) == 15


# --- genes

def test_symbols_come_from_the_column_or_the_index_that_gene_key_names(tmp_path):
    path = write_cells(tmp_path, var_columns={"gene_name": IDS, "symbol": GENES[::-1]})
    assert prepared(path, "--gene-key", "symbol").genes == GENES[::-1]
    assert prepared(path, "--gene-key", "index").genes == GENES
    assert prepared(path).genes == IDS + GENES[:10]  # gene_name, and the targets, which it lacks


def test_ensembl_ids_as_symbols_are_reported_with_the_columns_to_choose_from(tmp_path):
    path = write_cells(tmp_path, genes=IDS, var_columns={"feature_name": GENES})
    (tmp_path / "vocab.json").write_text('{"<pad>": 0, "GENE1": 1}')
    line = refused(path, "--vocab", tmp_path / "vocab.json")
    assert "0 of 30 genes (ENSG00000000000, ENSG00000000001, ...) are in the vocabulary" in line
    assert "--gene-key (feature_name)" in line
    assert "no target (GENE0, GENE1, GENE2, ...) is a measured gene (ENSG" in prepared(path).stderr


def test_mouse_symbols_are_warned_of_and_upper_case_maps_them(tmp_path):
    labels = [label.replace("GENE", "Gene") for label in LABELS]
    path = write_cells(tmp_path, labels=labels, genes=[gene.title() for gene in GENES])
    vocab = tmp_path / "vocab.json"
    vocab.write_text(json.dumps({gene: row for row, gene in enumerate([*GENES, "Gene0", "<pad>"])}))
    warning = "only 1 of 30 genes (Gene0, Gene1, ...) are in the vocabulary: mouse symbols? --upper-case"
    assert warning in prepared(path, "--vocab", vocab).stderr
    data = prepared(path, "--vocab", vocab, "--upper-case")
    assert data.stderr == ""
    assert data.genes == GENES
    assert data.labels == LABELS


def test_of_two_genes_of_one_symbol_the_first_keeps_it_and_is_flagged(tmp_path):
    data = prepared(write_cells(tmp_path, genes=[*GENES[:28], "GENE1", "GENE2"]))
    assert data.genes == [*GENES[:28], "GENE1-1", "GENE2-1"]
    assert data.targets_of["GENE1+ctrl"] == ["GENE1"]
    line = "symbols of two genes: the second is GENE1-1, GENE2-1; perturbations flag the first"
    assert data.stdout.count(line) == 1


def test_odd_characters_in_genes_and_labels_change_nothing(tmp_path):
    odd = ["A/B", "../../x", "it's", 'say "x"', "two words", "a,b", "β-catenin", "line\nbreak", "%s{0}", "🧬"]
    labels = ["ctrl"] * 20 + np.repeat(odd, 5).tolist() + LABELS[70:]
    data = prepared(write_cells(tmp_path, labels=labels, genes=odd + GENES[:20]))
    assert data.labels == [f"{label}+ctrl" if label in odd else label for label in labels]
    assert data.genes[:10] == odd
    assert [path.name for path in (tmp_path / "data").rglob("*")] == ["mine", "dataset.h5"]


# --- labels

def written_by_a_lab(controls):
    """LABELS as a lab writes them: A for A+ctrl, A_B for A+B, and these names for its control cells."""
    labels = [label.removesuffix("+ctrl").replace("+", "_") for label in LABELS]
    for i in range(20):
        labels[i] = controls[i % len(controls)]
    return labels


@pytest.mark.parametrize("names, patterns", [
    (["NT-1", "NT-2", "sgNT1", "negative control", "ctrl_1", "mCherry", "Human_Non-Targeting"],
     ["NT-*", "sgNT1", "negative control", "ctrl_1", "mCherry", "Human_*"]),
    (["Non-Targeting_1", "Non-Targeting_2", "non-targeting", "safe-targeting", "intergenic", "safe_harbor"],
     ["Non-Targeting_*", "*-targeting", "intergenic", "safe_harbor"]),
    (["NegCtrl0", "NegCtrl10", "INTERGENIC378", "NO_SITE", "ONE_NON-GENE_SITE"],
     ["NegCtrl[0-9]*", "INTERGENIC*", "NO_SITE", "ONE_NON-GENE_SITE"]),
    (["AAVS1", "scramble", "control_A", "unstimulated"], ["AAVS1", "scramble", "control_?", "unstimulated"])])
def test_all_labels_that_look_like_controls_have_to_be_named(tmp_path, names, patterns):
    path = write_cells(tmp_path, labels=written_by_a_lab(names))
    line = refused(path, "--separator", "_", "--control", names[0])
    found = line.partition("these look like controls: ")[2].partition(";")[0]
    assert set(names[1:]) <= set(found.split(", "))
    assert prepared(path, "--separator", "_", "--control", *patterns).labels == LABELS


def test_ctrl_within_a_label_counts_as_control_whatever_control_cells_are_called(tmp_path):
    labels = ["control"] * 20 + LABELS[20:]
    data = prepared(write_cells(tmp_path, labels=labels), "--control", "control")
    assert data.labels == LABELS
    assert "'ctrl' within a label counts as control, too: GENE0+ctrl, " in data.stdout
    assert "counts as control, too" not in prepared(write_cells(tmp_path)).stdout


def test_without_control_cells_the_largest_labels_are_named(tmp_path):
    line = refused(write_cells(tmp_path, labels=["K562"] * 20 + LABELS[20:]))
    assert "too few control cells (ctrl: 0); name their label with --control (most cells are K562, " in line


MANY_GUIDES = "_".join(f"chr1.{i}_x" for i in range(60))
UNKNOWN = ["unassigned", "unassigned", "multiplet", "*", "nan", "negative", "no_sgRNA", "GENE1_unknown", " ",
           MANY_GUIDES]


def test_labels_of_no_known_perturbation_are_left_out_and_counted(tmp_path):
    labels = written_by_a_lab(["NT"])
    labels[50:60] = UNKNOWN
    data = prepared(write_cells(tmp_path, labels=labels), "--control", "NT", "--separator", "_")
    assert data.labels == LABELS[:50] + LABELS[60:]
    np.testing.assert_array_equal(data.X, np.delete(logged(counts()), range(50, 60), axis=0))
    line = next(line for line in data.stdout.splitlines() if line.startswith("left out"))
    for label in UNKNOWN[2:8]:
        assert f"{label} (1)" in line
    for words in "unassigned (2)", "no label (1)", "chr1.0_x":
        assert words in line


def test_drop_leaves_out_more_labels_and_without_a_value_none(tmp_path):
    labels = list(LABELS)
    labels[50] = "unassigned"
    path = write_cells(tmp_path, labels=labels)
    data = prepared(path, "--drop", "GENE[12]+ctrl", "GENE0+GENE1")
    assert set(data.conditions) == set(LABELS) - {"GENE1+ctrl", "GENE2+ctrl", "GENE0+GENE1"}
    assert "GENE1+ctrl (5)" in data.stdout
    data = prepared(path, "--drop")
    assert set(data.conditions) == set(LABELS) | {"unassigned+ctrl"}
    assert "left out" not in data.stdout


def test_all_labels_that_are_no_condition_are_named_at_once(tmp_path):
    labels = list(LABELS)
    labels[30], labels[40], labels[50], labels[60] = "A++B", "GENE1+GENE1", "NT", "GENE5 + ctrl"
    line = refused(write_cells(tmp_path, labels=labels))
    assert "labels that are no conditions (2 of 16): " in line
    assert "'A++B' (nothing before or after a '+'), 'GENE1+GENE1' (the same target twice)" in line
    assert "these look like controls: NT" in line
    assert "GENE5 + ctrl" not in line


@pytest.mark.parametrize("label", ["GENE0_GENE1", "HLA-A_GENE1", "GENE1-sg2"])
def test_targets_that_look_like_pairs_or_guides_are_pointed_out(tmp_path, label):
    path = write_cells(tmp_path, labels=LABELS[:-5] + [label] * 5, genes=[*GENES[:29], "HLA-A"])
    warning = (f"warning: targets that are not genes but begin with one (1): {label}; "
               "pairs (--separator, now '+') or guides (--target-regex)?")
    assert warning in prepared(path).stderr


def test_a_target_regex_that_matches_no_label_is_an_error(tmp_path):
    line = refused(write_cells(tmp_path), "--target-regex", "(.+)_g[0-9]+")
    assert "'(.+)_g[0-9]+' matches no label, such as GENE0+GENE1, " in line


def test_conditions_of_few_cells_are_left_out_and_listed(tmp_path):
    labels = LABELS[:-4] + ["GENE8+GENE9"] * 3 + ["GENE7+GENE9"]
    path = write_cells(tmp_path, labels=labels)
    data = prepared(path, "--min-cells", 3)
    assert set(labels) - set(data.conditions) == {"GENE0+GENE1", "GENE7+GENE9"}
    assert len(data.X) == 73
    assert "left out, with fewer cells than --min-cells 3: GENE0+GENE1 (1), GENE7+GENE9 (1)" in data.stdout
    assert "too few control cells (ctrl: 20)" in refused(path, "--min-cells", 21)


# --- expression

def test_logged_data_is_left_alone_and_normalize_says_so(tmp_path):
    data = prepared(write_cells(tmp_path), "--normalize")
    np.testing.assert_array_equal(data.X, logged(counts()))
    assert "--normalize left them alone" in data.stdout


@pytest.mark.parametrize("change, options, message", [
    (lambda X: X - X.mean(0), [], "negative values, as in scaled data"),
    (lambda X: X, [], "counts, not logarithms (values up to 6); add --normalize"),
    (lambda X: X * 100.5, [], "counts, not logarithms (values up to 603); add --normalize"),
    (lambda X: X * 0, ["--normalize"], "nothing but zeros"),
    (lambda X: X * 1e300, [], "infinite"),
    (lambda X: np.where(X == 6, np.nan, X), [], "NaN"),
    (lambda X: np.append(0 * X[:20], X[20:], axis=0), ["--normalize"],
     "no cell with any expression in ctrl; leave those out with --drop")])
def test_values_that_are_neither_counts_nor_logarithms_are_refused(tmp_path, change, options, message):
    X = change(counts().astype(np.float64))
    assert message in refused(write_cells(tmp_path, X), *options)


def test_corrected_counts_that_are_no_whole_numbers_are_normalized_like_counts(tmp_path):
    data = prepared(write_cells(tmp_path, counts() * 40.5), "--normalize")
    assert "not whole numbers (corrected counts?): normalized like counts" in data.stdout
    np.testing.assert_allclose(data.X, logged(counts() * 40.5), rtol=1e-6)


@pytest.mark.parametrize("X, sign", [
    (logged(counts()) * 10, "there are values up to "),
    (counts() / counts().sum(1, keepdims=True) * 30, "all cells have the same sum")])
def test_values_that_are_normalized_but_perhaps_no_logarithms_are_warned_of(tmp_path, X, sign):
    warning = prepared(write_cells(tmp_path, X)).stderr
    assert f"warning: {sign}" in warning
    assert "not log-transformed?" in warning


def test_cells_without_counts_are_left_out_with_a_line(tmp_path):
    X = counts()
    X[[7, 60]] = 0
    data = prepared(write_cells(tmp_path, X), "--normalize")
    assert data.labels == np.delete(LABELS, [7, 60]).tolist()
    np.testing.assert_allclose(data.X, logged(np.delete(X, [7, 60], axis=0)), rtol=1e-6)
    assert "left out, without any expression: 2 of 75 cells" in data.stdout


@pytest.fixture
def layered(tmp_path):
    """A file with scaled values in X, counts in a layer, and logarithms of the genes backwards in raw."""
    path = write_cells(tmp_path, counts() - counts().mean(0), layout="dense")
    with h5py.File(path, "a") as file:
        write_matrix(file, "layers/counts", counts())
        write_matrix(file, "raw/X", logged(counts())[:, ::-1], "csc")
        write_text(file, "raw/var/_index", GENES[::-1])
        file["raw/var"].attrs["_index"] = "_index"
    return path


def test_a_layer_or_raw_is_read_instead_of_x(layered):
    data = prepared(layered, "--layer", "counts", "--normalize")
    np.testing.assert_allclose(data.X, logged(counts()), rtol=1e-6)
    data = prepared(layered, "--layer", "raw")
    assert data.genes == GENES[::-1]
    np.testing.assert_array_equal(data.X, logged(counts())[:, ::-1])


def test_the_layers_to_choose_from_are_listed(layered):
    assert "negative values, as in scaled data; expected log-normalized ones; choose another matrix " \
        "with --layer (counts, raw)" in refused(layered)
    assert "no layers/lognorm in it; choose another" in refused(layered, "--layer", "lognorm")
    assert "counts, not logarithms" in refused(layered, "--layer", "counts")
    with h5py.File(layered, "a") as file:
        del file["X"], file["raw"]
    assert "no X in it; choose another matrix with --layer (counts)" in refused(layered)
    with h5py.File(layered, "a") as file:
        del file["layers"]
    assert refused(layered).endswith("no X in it")


def test_the_most_variable_genes_are_scanpys(stage03, tmp_path, monkeypatch):
    monkeypatch.setattr(stage03, "BLOCK", 2**15)
    rng = np.random.RandomState(7)  # whose numbers never change: golden/hvg_seurat.json was made with them
    mean, shape = np.exp(rng.normal(-1, 1.5, 1000)), rng.gamma(2, 1, 1000) + 0.1
    of_gene = rng.gamma(shape, mean / shape, (300, 1000))
    of_cell = rng.gamma(5, 0.2, (300, 1))
    X = rng.poisson(of_gene * of_cell).astype(np.float32)
    X[:, [3, 500]] = 0
    genes = [f"GENE{i}" for i in range(1000)]
    labels = ["ctrl"] * 60 + np.repeat(genes[:20], 12).tolist()
    path = write_cells(tmp_path, X, labels, genes)
    golden = json.loads((GOLDEN / "hvg_seurat.json").read_text())["genes"]
    assert len(golden) > 1
    for n, expected in golden.items():
        data = prepared(path, "--normalize", "--n-genes", n)
        assert set(data.genes) == {genes[g] for g in expected}.union(genes[:20])


def test_genes_that_tie_are_all_among_the_most_variable_and_those_that_never_vary_are_not(stage03):
    variance = np.array([1.0, 2, 0, 2, 0])
    assert stage03.most_variable(np.ones(5), variance, 1).tolist() == [False, True, False, True, False]
    assert stage03.most_variable(np.ones(5), variance, 5).tolist() == [True, True, False, True, False]
    assert not stage03.most_variable(np.zeros(5), np.zeros(5), 3).any()


# --- options and summary

@pytest.mark.parametrize("option, message", [
    (["--separator", ""], "--separator"),
    (["--target-regex", "(("], "in parentheses"),
    (["--target-regex", "x_g1"], "in parentheses"),
    (["--split", "no.json"], "no.json does not exist"),
    (["--n-genes", 0], "--n-genes: has to be above 0")])
def test_an_impossible_option_is_an_error_that_names_it(tmp_path, option, message):
    assert message in error_of(*STAGE, write_cells(tmp_path), *option, root=tmp_path)


def test_the_summary_counts_genes_with_text_of_each_source(tmp_path):
    path = write_cells(tmp_path)
    assert "not known before python 01_fetch_annotations.py --dataset mine" in prepared(path).stdout
    (tmp_path / "notes.tsv").write_text("gene\ttext\nGENE1\tone\nGENE2\ttwo\nOTHER\tthree\n")
    run_script("01_fetch_annotations.py", "--dataset", "mine", "--tsv", f"notes={tmp_path / 'notes.tsv'}",
               root=tmp_path)
    assert "genes with text, of 30: notes 2" in prepared(path, "--force").stdout


# --- files of other kinds, and broken ones

def zipped(path, *names, content=b"not HDF5"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("kind", ["gz", "zip"])
def test_a_gzipped_or_zipped_file_is_read_as_it_is_and_nothing_stays_unpacked(tmp_path, kind):
    content = write_cells(tmp_path).read_bytes()
    path = tmp_path / f"cells.{kind}"
    if kind == "gz":
        path.write_bytes(gzip.compress(content))
    else:
        zipped(path, "a/cells.h5ad", "a/go.csv", "__MACOSX/a/._cells.h5ad", content=content)
    np.testing.assert_array_equal(prepared(path).X, logged(counts()))
    assert [path.name for path in (tmp_path / "data/mine").iterdir()] == ["dataset.h5"]


@pytest.mark.parametrize("names, message", [
    ([], "0 .h5ad files"), (["a.h5ad", "b.h5ad"], "2 .h5ad files"), (["../../evil.h5ad"], "a text file")])
def test_a_zip_needs_one_file_of_cells_and_no_name_in_it_becomes_a_path(tmp_path, names, message):
    path = zipped(tmp_path / "cells.zip", *names)
    assert message in error_of(*STAGE, path, root=tmp_path / "deep/kit")
    assert not list(tmp_path.rglob("*.h5ad"))
    assert not list((tmp_path / "deep/kit/data/mine").iterdir())


@pytest.mark.parametrize("name, content, kind", [
    ("empty.h5ad", b"", "an empty file"),
    ("table.csv", b"cell,GENE0\n", "a text file (csv, tsv?)"),
    ("x.mtx", b"%%MatrixMarket matrix", "a text file (mtx)"),
    ("page.h5ad", b"<!doctype html>", "a web page"),
    ("x.pkl", pickle.dumps([1]), "a Python pickle"),
    ("x.h5ad", b"a\0b", "a binary file"),
    ("x.csv.gz", gzip.compress(b"cell,GENE0\n"), "a text file (csv, tsv?) in it"),
    ("x.rds", gzip.compress(b"X\n\0\0"), "an R object (rds) in it"),
    ("x.h5ad.bz2", bz2.compress(b"\x89HDF"), "a bzip2 file (unpack it)"),
    ("x.h5ad", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS")])
def test_a_file_of_another_kind_is_told_by_what_it_is(tmp_path, name, content, kind):
    (tmp_path / name).write_bytes(content)
    line = refused(tmp_path / name)
    assert f"{name}: {kind}" in line
    assert "save it with write_h5ad" in line


def test_a_tar_archive_and_a_folder_are_told_too(tmp_path):
    for name, mode in (("cells.tar", "w"), ("cells.tgz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.add(write_cells(tmp_path), "cells.h5ad")
        assert f"{name}: a tar archive, not an AnnData file" in refused(tmp_path / name)
    (tmp_path / "cells.zarr").mkdir()
    assert "cells.zarr: a folder (zarr?), not an AnnData file" in refused(tmp_path / "cells.zarr")


@pytest.mark.parametrize("groups, kind", [
    (["mod", "obs", "var"], "a MuData file (h5mu)"),
    (["matrix/barcodes"], "10x Genomics' h5 format"),
    (["matrix", "row_attrs"], "a loom file"),
    (["assays", "cell.names"], "an h5Seurat file"),
    (["X", "var"], "an HDF5 file with X, var in it"),
    ([], "an HDF5 file with nothing in it")])
def test_other_hdf5_files_are_told_by_what_they_are(tmp_path, groups, kind):
    with h5py.File(tmp_path / "cells.h5", "w") as file:
        for name in groups:
            file.create_group(name)
    assert f"cells.h5: {kind}, not an AnnData file" in refused(tmp_path / "cells.h5")


def test_data_that_lies_in_another_file_is_not_followed(tmp_path):
    path = write_cells(tmp_path)
    path.rename(tmp_path / "other.h5ad")
    write_cells(tmp_path)
    with h5py.File(path, "a") as file:
        del file["obs/condition"]
        file["obs/condition"] = h5py.ExternalLink("other.h5ad", "/obs/condition")
    assert "obs/condition lies in another file" in refused(path)


@pytest.mark.parametrize("content", [gzip.compress(b"\x89HDF" * 10)[:-9], b"PK\x03\x04 broken"])
def test_a_damaged_archive_is_an_error(tmp_path, content):
    (tmp_path / "cells").write_bytes(content)
    assert "cells: damaged" in refused(tmp_path / "cells")


def test_a_file_cut_anywhere_is_an_error(tmp_path):
    path = write_cells(tmp_path)
    content = path.read_bytes()
    for size in (0, 1, 8, 95, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        refused(path)


@pytest.mark.parametrize("option, message", [
    (["--condition-key", "guide"], "obs has no column 'guide'; it has condition"),
    (["--gene-key", "symbol"], "var has no column 'symbol'; it has gene_name")])
def test_a_column_that_is_not_there_is_an_error_that_lists_those_that_are(tmp_path, option, message):
    assert message in refused(write_cells(tmp_path, var_columns={"gene_name": GENES}), *option)


@pytest.mark.parametrize("attribute, value, message", [
    ("shape", (8, 30), "X is not of 75 cells and 30 genes"),
    ("encoding-type", "coo_matrix", "X is neither dense, CSR nor CSC (coo_matrix)")])
def test_a_matrix_of_another_shape_or_an_unknown_layout_is_refused(tmp_path, attribute, value, message):
    path = write_cells(tmp_path)
    with h5py.File(path, "a") as file:
        file["X"].attrs[attribute] = value
    assert message in refused(path)


@pytest.mark.parametrize("name, start", [
    ("indices", [30]),               # no such gene
    ("indptr", [0, 20, 10**6, 40]),  # descends
    ("indptr", [0, 20, 0]),          # descends within a block that has no values then
    ("indptr", [0] * 9)])            # of too few cells
def test_a_damaged_matrix_is_refused(stage03, tmp_path, monkeypatch, name, start):
    monkeypatch.setattr(stage03, "BLOCK", 40)  # two cells
    path = write_cells(tmp_path)
    with h5py.File(path, "a") as file:
        rest = file["X"][name][len(start):] if len(start) < 9 else []
        replace(file["X"], name, np.concatenate([start, rest]).astype(np.int32))
    assert "X is damaged, or of another shape" in refused(path)
    assert not (tmp_path / "data/mine/dataset.h5").exists()
