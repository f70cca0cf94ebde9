"""03_prepare_data.py, piece by piece: what labels mean, the paper's split, differential expression,
dataset.h5 for a file as GEARS' are, and the demo."""
import hashlib
import json
import zipfile
from collections import Counter

import h5py
import numpy as np
import pytest
import scipy.stats
from scipy import sparse

from cells import (GEARS_LABELS, GENES, counts, logged, prepared, read_dataset, refused, rules, write_cells,
                   write_gears)
from conftest import GOLDEN, error_of, run_script


@pytest.fixture(scope="module")
def stage03(stage):
    return stage("03_prepare_data")


# --- labels

@pytest.mark.parametrize("separator, label, targets", [
    ("+", "ctrl", []), ("+", "ctrl+ctrl", []), ("_", "NT", []),
    ("+", "A", ["A"]), ("+", "A+ctrl", ["A"]), ("+", "ctrl+A", ["A"]), ("_", "NT_A", ["A"]),
    ("+", " A + B ", ["A", "B"]), (", ", "A, B", ["A", "B"]), ("|", "A|B|C|D", ["A", "B", "C", "D"])])
def test_a_label_stands_for_its_targets_wherever_the_control_is_named(stage03, separator, label, targets):
    assert stage03.parse_condition(label, rules(control=["ctrl", "NT"], separator=separator)) == targets


@pytest.mark.parametrize("separator, label, targets", [
    ("-", "HLA-A-B", ["HLA-A", "B"]), ("-", "B-HLA-A", ["B", "HLA-A"]), ("_", "MT_CO1_A", ["MT_CO1", "A"])])
def test_a_separator_within_the_name_of_a_gene_does_not_separate(stage03, separator, label, targets):
    genes = "A", "B", "HLA-A", "MT_CO1"
    assert stage03.parse_condition(label, rules(*genes, separator=separator)) == targets


@pytest.mark.parametrize("label", ["", "+A", "A++B", "A+A"])
def test_a_label_that_is_no_condition_raises_a_value_error(stage03, label):
    with pytest.raises(ValueError, match="nothing before or after|twice"):
        stage03.parse_condition(label, rules())


@pytest.mark.parametrize("control", ["non-targeting", "non-*"])
def test_a_control_label_with_the_separator_in_it_is_the_control(stage03, control):
    by_hyphen = rules(control=["ctrl", control], separator="-")
    assert stage03.parse_condition("non-targeting", by_hyphen) == []
    assert stage03.parse_condition("KLF1-non-targeting", by_hyphen) == ["KLF1"]
    assert stage03.parse_condition("non-targeting-KLF1", by_hyphen) == ["KLF1"]


@pytest.mark.parametrize("label, control, targets", [
    ("NT_KLF1", "NT*", ["KLF1"]), ("KLF1_NT", "*NT*", ["KLF1"]), ("NegCtrl0_NegCtrl1", "NegCtrl*", []),
    ("ctrl_1", "ctrl_*", []), ("KLF1_ctrl_1", "ctrl_*", ["KLF1"])])
def test_a_pattern_of_controls_leaves_the_other_target_of_a_label_alone(stage03, label, control, targets):
    assert stage03.parse_condition(label, rules(control=["ctrl", control], separator="_")) == targets


@pytest.mark.parametrize("label, targets", [
    ("KLF1", ["KLF1"]), ("KLF1_guide", ["KLF1_guide"]), ("MAP2K6_g1+KLF1_g2", ["MAP2K6", "KLF1"]),
    ("KLF1_g1+KLF1_g2", ["KLF1"]), ("KLF1_g1+ctrl_g7", ["KLF1"]), ("ctrl_g1+ctrl_g2", [])])
def test_guides_are_collapsed_where_the_regex_matches_the_whole_name(stage03, label, targets):
    assert stage03.parse_condition(label, rules(target_regex="(.+)_g[0-9]+")) == targets


NORMAN, REPLOGLE = "(.+)_(.+)__.+", "[0-9]+_(.+?)_.+"


@pytest.mark.parametrize("regex, label, targets", [
    (NORMAN, "NegCtrl10_KLF1__NegCtrl10_KLF1", ["KLF1"]),
    (NORMAN, "KLF1_MAP2K6__KLF1_MAP2K6", ["KLF1", "MAP2K6"]),
    (NORMAN, "NegCtrl0_NegCtrl0__NegCtrl0_NegCtrl0", []),
    ("(?P<first>[^_]+)_(?P<second>[^_]+)__.+", "KLF1_MAP2K6__KLF1_MAP2K6", ["KLF1", "MAP2K6"]),
    (REPLOGLE, "2_HLA-A_P1P2_ENSG00000206503", ["HLA-A"]),
    (REPLOGLE, "10752_non-targeting_non-targeting_non-targeting", []),
    ("(.+?)(?:_g[0-9])?", "NegCtrl7_g1", [])])
@pytest.mark.parametrize("separator", "+_")
def test_the_regex_sees_the_whole_label_first_and_each_group_is_a_target(
        stage03, regex, label, targets, separator):
    control = ["ctrl", "NegCtrl*", "non-targeting"]
    how = rules(control=control, target_regex=regex, separator=separator)
    assert stage03.parse_condition(label, how) == targets


@pytest.mark.parametrize("label, targets, name", [
    ("ctrl+A", ["A"], "ctrl+A"), ("B+A", ["B", "A"], "B+A"),  # GEARS' form stays
    ("NT-1", [], "ctrl"), ("A_NT", ["A"], "A+ctrl"), ("C|B|A", ["C", "B", "A"], "A+B+C")])
def test_a_condition_is_named_by_its_label_in_gears_form_or_by_its_targets(stage03, label, targets, name):
    assert stage03.condition_name(label, targets) == name


@pytest.mark.parametrize("label, separator, condition", [
    ("A", "+", "A+ctrl"), ("B+A", "+", "A+B"), ("A_B", "_", "A+B"),
    ("A+B", "_", "A+B"),  # its own name
    ("Z", "+", None), ("A__B", "_", None), (7, "+", None)])
def test_a_users_label_finds_its_condition_by_its_targets(stage03, label, separator, condition):
    conditions = {"A+ctrl": ["A"], "A+B": ["A", "B"]}
    assert stage03.find_condition(label, conditions, rules(separator=separator)) == condition


# --- split

@pytest.fixture(scope="module")
def norman(stage03):
    """The perturbed conditions of the published Norman file: {label: targets}."""
    lines = (GOLDEN / "norman_conditions.tsv").read_text().splitlines()[1:]
    labels = [line.split("\t")[0] for line in lines]
    targets_of = {label: stage03.parse_condition(label, rules()) for label in labels}
    return {label: targets for label, targets in targets_of.items() if targets}


def test_the_split_of_norman_is_the_papers(stage03, norman):
    split, subgroup = stage03.split_conditions(norman, seed=1)
    sizes = Counter((split[label], subgroup.get(label)) for label in norman)
    assert sizes == {
        ("train", None): 137,
        ("test", "unseen_single"): 37,
        ("test", "combo_seen0"): 9,
        ("test", "combo_seen1"): 52,
        ("test", "combo_seen2"): 18,
        ("val", "unseen_single"): 14,
        ("val", "combo_seen1"): 11,
        ("val", "combo_seen2"): 5}


def test_no_held_out_gene_is_perturbed_in_training(stage03, norman):
    split, subgroup = stage03.split_conditions(norman, seed=1)
    trained = set()
    for label, targets in norman.items():
        if split[label] == "train":
            trained.update(targets)
    most_seen = {"unseen_single": 0, "combo_seen0": 0, "combo_seen1": 1, "combo_seen2": 2}
    for label, targets in norman.items():
        if split[label] == "test":
            assert len(trained.intersection(targets)) <= most_seen[subgroup[label]]


def test_the_split_depends_on_the_seed_not_on_the_order_of_labels(stage03, norman):
    split = stage03.split_conditions(norman, 1)
    backwards = dict(reversed(norman.items()))
    assert stage03.split_conditions(backwards, 1) == split
    assert stage03.split_conditions(norman, 2) != split


def test_a_pair_written_in_both_orders_stays_on_one_side(stage03, norman):
    """Also, the other labels fall where they would without it."""
    pairs = {label: targets for label, targets in norman.items() if len(targets) == 2}
    swapped = {f"{label}, swapped": targets[::-1] for label, targets in pairs.items()}
    split, subgroup = stage03.split_conditions(norman | swapped, 1)
    for label in pairs:
        twin = f"{label}, swapped"
        assert split[twin] == split[label]
        assert subgroup.get(twin) == subgroup.get(label)
    alone, _ = stage03.split_conditions(norman, 1)
    assert {label: split[label] for label in norman} == alone


def test_a_split_of_the_users_names_its_subgroups(stage03, tmp_path):
    path = tmp_path / "split.json"
    lists = {"train": ["A+ctrl", "B+C"], "val": ["B"], "test": ["D+ctrl", "B+A", "A+D", "D+E"]}
    path.write_text(json.dumps(lists))
    names = ["A+ctrl", "B+C", "B+ctrl", "D+ctrl", "A+B", "A+D", "D+E"]
    targets_of = {name: stage03.parse_condition(name, rules()) for name in names}
    split, subgroup = stage03.split_from_json(path, targets_of, rules())
    test = dict.fromkeys(["D+ctrl", "A+B", "A+D", "D+E"], "test")
    assert split == {"A+ctrl": "train", "B+C": "train", "B+ctrl": "val", **test}
    assert subgroup == {
        "D+ctrl": "unseen_single", "A+B": "combo_seen2", "A+D": "combo_seen1", "D+E": "combo_seen0"}


EVERY_MISTAKE = {"train": ["A+ctrl", "Z+ctrl", 7], "val": ["A"], "test": []}


@pytest.mark.parametrize("content, message", [
    ("{", "not a JSON file"),
    ('{"train": []}', "expected"),
    (json.dumps(EVERY_MISTAKE), r"split.json: 'Z\+ctrl' is no perturbed condition of the data "
     r"\(did you mean .*A\+ctrl.*\), 7 is no .*'A' stands twice, 'B\+ctrl' is missing")])
def test_a_bad_split_file_is_an_error_that_names_all_that_is_wrong(stage03, tmp_path, content, message):
    path = tmp_path / "split.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match=message):
        stage03.split_from_json(path, {"A+ctrl": ["A"], "B+ctrl": ["B"]}, rules())


def test_too_few_perturbations_for_a_split_are_an_error_and_train_with_split_none(tmp_path):
    labels = ["ctrl"] * 5 + ["GENE1+ctrl"] * 5 + ["GENE2+ctrl"] * 5
    path = write_cells(tmp_path, logged(counts(15)), labels)
    line = refused(path)
    assert "too few perturbations (2) for the split" in line
    assert "about a dozen" in line and "--split none" in line
    data = prepared(path, "--split", "none")
    part_of = dict(zip(data.conditions, data.split))
    assert part_of == {"ctrl": "ctrl", "GENE1+ctrl": "train", "GENE2+ctrl": "train"}
    assert "train: 2 conditions" in data.stdout
    assert "test:" not in data.stdout


def test_control_cells_alone_are_an_error_that_names_what_takes_them(tmp_path):
    line = refused(write_cells(tmp_path, logged(counts(5)), ["ctrl"] * 5), "--split", "none")
    assert "control cells only" in line and "--controls-from" in line


# --- differential expression

@pytest.fixture
def screen():
    """Cells of three conditions, of 80, 40 and 80 cells, with 60 genes: expression and condition of each."""
    rng = np.random.default_rng(0)
    dense = rng.poisson(rng.gamma(1, 1, 60), (200, 60)) * rng.random((200, 60))
    dense[:80, :30] *= 1.7
    dense[:, 5] = 0  # a gene that no cell expresses
    return dense, np.repeat([0, 1, 2], [80, 40, 80])


def test_moments_are_those_of_each_condition_in_whatever_blocks_its_cells_come(stage03, screen):
    dense, condition = screen
    order = np.random.default_rng(1).permutation(200)
    blocks = [sparse.csr_matrix(dense[cells]) for cells in np.split(order, [1, 70, 70, 130])]
    mean, variance = stage03.moments(blocks, condition[order], 3, 61)
    for c in range(3):
        cells = dense[condition == c]
        np.testing.assert_allclose(mean[c, :60], cells.mean(0), atol=1e-12)
        np.testing.assert_allclose(variance[c, :60], cells.var(0, ddof=1), atol=1e-12)
    assert not mean[:, 60].any() and not variance[:, 60].any()  # a gene that the blocks lack


def test_the_ranking_is_that_of_scipys_welch_test(stage03, screen):
    dense, condition = screen
    parts = [dense[condition == c] for c in range(3)]
    mean = np.array([cells.mean(0) for cells in parts])
    variance = np.array([cells.var(0, ddof=1) for cells in parts])
    de_idx = stage03.rank_de(mean, variance, np.array([80, 40, 80]), ctrl=2, n_measured=60)
    for c in range(2):
        t = scipy.stats.ttest_ind(parts[c], parts[2], equal_var=False).statistic
        expected = np.argsort(-np.abs(np.nan_to_num(t)), kind="stable")[:20]
        np.testing.assert_array_equal(de_idx[c], expected)
    assert (de_idx[2] == -1).all()


def test_only_measured_genes_are_ranked(stage03):
    mean = np.array([[0.0, 9, 1], [0, 0, 0]])
    de_idx = stage03.rank_de(mean, np.ones((2, 3)), np.array([5, 5]), ctrl=1, n_measured=2)
    assert de_idx[0].tolist() == [1, 0] + [-1] * 18


# --- dataset.h5

def test_every_array_of_dataset_h5_is_what_the_cells_say(tmp_path):
    data = prepared(write_gears(tmp_path))
    expected = logged(counts(len(GEARS_LABELS)))
    assert data.attrs["format_version"] == 1
    assert not data.attrs["synthetic"]
    assert data.genes == GENES + ["UNMEASURED"]
    assert data.measured.tolist() == [True] * 30 + [False]
    assert data.token_ids.tolist() == list(range(31))
    assert data.X.dtype == np.float32
    np.testing.assert_array_equal(data.X[:, :30], expected)
    assert not data.X[:, 30].any()
    assert data.labels == GEARS_LABELS
    assert data.targets.shape[1] == 2
    assert set(data.split) == {"ctrl", "train", "val", "test"}
    for c, label in enumerate(data.conditions):
        cells = np.array(GEARS_LABELS) == label
        np.testing.assert_allclose(data.mean[c, :30], expected[cells].mean(0), rtol=1e-5)
        assert data.targets_of[label] == [target for target in label.split("+") if target != "ctrl"]
        assert (data.split[c] == "ctrl") == (label == "ctrl")
        assert (data.subgroup[c] == "") == (data.split[c] in ("ctrl", "train"))
    assert "10 of 11 targets are measured; added as unmeasured genes: UNMEASURED" in data.stdout


def test_rankings_of_the_file_are_taken_by_gene_id_and_computed_without_them(tmp_path):
    path = write_gears(tmp_path)
    data = prepared(path)
    own = data.de_idx[np.array(data.conditions) != "ctrl"]
    assert len(own) == 12
    for i, ranking in enumerate(own):
        assert ranking.tolist() == [(rank + i) % 30 for rank in range(20)]
    with h5py.File(path, "a") as file:
        del file["uns"]
    without = prepared(path)
    assert "stale" in without.stdout
    assert "computed (t-test" in without.stdout
    assert not np.array_equal(without.de_idx, data.de_idx)


def test_unpacked_cells_of_another_checksum_than_known_are_refused(stage03, tmp_path):
    content = write_gears(tmp_path).read_bytes()
    archive = tmp_path / "gears.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("norman/perturb_processed.h5ad", content)
    with stage03.open_cells(archive, tmp_path, hashlib.sha256(content).hexdigest()) as unpacked:
        assert unpacked.read_bytes() == content
    with pytest.raises(SystemExit, match="gears.zip: the cells in it are not those expected"):
        with stage03.open_cells(archive, tmp_path, "0" * 64):
            pass


def test_the_dense_counts_layer_is_never_read(tmp_path):
    path = write_gears(tmp_path)
    shape = len(GEARS_LABELS), 30
    with h5py.File(path, "a") as file:
        layer = file.create_dataset("layers/counts", shape, "f4", chunks=shape, compression="gzip")
        layer.id.write_direct_chunk((0, 0), b"not gzip")
    with h5py.File(path) as file, pytest.raises(OSError):
        file["layers/counts"][:]
    prepared(path)


def test_genes_take_the_rows_of_the_vocabulary_and_pad_where_they_are_absent(tmp_path):
    vocab = {"<pad>": 0, "GENE3": 1, "UNMEASURED": 2, "OTHER": 3}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    data = prepared(write_gears(tmp_path), "--vocab", tmp_path / "vocab.json")
    assert (data.attrs["n_tokens"], data.attrs["pad_id"]) == (4, 0)
    assert data.token_ids.tolist() == [0, 0, 0, 1] + [0] * 26 + [2]
    assert "1 of 30 genes are in the vocabulary" in data.stdout


@pytest.mark.parametrize("vocab", [{"A": 0, "B": 1}, {"<pad>": 0, "A": 2}, {"<pad>": 0, "A": 0}])
def test_a_vocabulary_has_a_pad_and_rows_from_0_on(stage03, tmp_path, vocab):
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    with pytest.raises(SystemExit, match='vocab.json: expected .* with rows from 0 on and a "<pad>"'):
        stage03.read_vocab(tmp_path / "vocab.json")


def test_a_second_call_does_nothing_but_with_force_or_other_options(tmp_path):
    cells, dataset = write_gears(tmp_path), tmp_path / "data/mine/dataset.h5"
    prepared(cells)
    first = dataset.stat().st_mtime_ns
    assert "there already" in prepared(cells).stdout
    assert dataset.stat().st_mtime_ns == first
    prepared(cells, "--force")
    assert dataset.stat().st_mtime_ns > first
    for option in ["--n-genes", 12], ["--upper-case"], ["--split", "none"]:
        said = prepared(cells, *option).stdout
        assert "stale, making it again" in said
        assert option[0][2:].replace("-", "_") in said


def test_an_unknown_dataset_and_a_missing_file_are_errors(tmp_path):
    assert "unknown dataset 'nomran'" in error_of("03_prepare_data.py", "--dataset", "nomran", root=tmp_path)
    assert "no.h5ad does not exist" in refused(tmp_path / "no.h5ad")


# --- the demo

def test_the_demo_is_labelled_synthetic_and_its_mean_response_is_small(tmp_path):
    assert "SYNTHETIC" in run_script("03_prepare_data.py", root=tmp_path).stdout
    data = read_dataset(tmp_path / "data/demo/dataset.h5")
    assert data.attrs["synthetic"]
    control = data.mean[data.conditions.index("ctrl")]
    delta = data.mean[np.array(data.split) == "train"] - control
    sizes = np.linalg.norm(delta, axis=1)
    assert np.linalg.norm(delta.mean(0)) < 0.35 * sizes.mean()
