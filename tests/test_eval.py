"""05_eval.py: predictions, baselines, tables, figures and files, against plain loops and other readers."""
import csv
import functools
import gzip
import io
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from pytest import approx
from scipy import sparse, stats

import model
from cells import write_cells as write_lab_file
from conftest import KIT, error_of, run_script

LAST = "results/demo/predicted/last"
TABLES = {"predicted.csv", "predicted_genes.csv", "predicted.h5ad"}  # what --predict always writes
QUICKLY = ("--run", "scgpt", "--controls", 1)
BASELINES = ("non-ctrl-mean", "random", "no-change", "matching-mean", "additive", "ridge_go_c",
             "data-ceiling")


def evaluate(root, *options):
    """Run stage 05 with these options, to success."""
    return run_script("05_eval.py", *options, root=root)


def refusal(root, *options):
    """The one line with which stage 05 refuses these options."""
    return error_of("05_eval.py", *options, root=root)


def number(text):
    try:
        return float(text)
    except ValueError:
        return text


def rows_of(root, name):
    """The rows of a table of the demo's results, numbers as such."""
    with open(root / "results/demo" / name, newline="", encoding="utf-8") as file:
        return [{column: number(text) for column, text in row.items()} for row in csv.DictReader(file)]


def one_line(text):
    return " ".join(text.split())


def names_in(folder):
    return {path.name for path in folder.iterdir()}


def linked(folder, demo):
    """A root with the demo's data and runs, and without results."""
    for name in ("data", "runs"):
        (folder / name).symlink_to(demo / name)
    return folder


@pytest.fixture(scope="module", autouse=True)
def terminal():
    """A terminal of 80 columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        yield


@pytest.fixture(scope="module")
def evaluation(stage):
    return stage("05_eval")


@pytest.fixture(scope="module")
def predict(demo, evaluation):
    """A function: what stage 05 predicts from Python in the demo's root."""
    return functools.partial(evaluation.predict, "--root", demo)


@pytest.fixture(scope="module")
def data(demo, stage):
    """The demo's dataset, also with the mean profile of the control cells and the test conditions."""
    data = stage("03_prepare_data").load_dataset(demo / "data/demo/dataset.h5", "")
    data.ctrl = data.mean[data.split == "ctrl"][0]
    data.tested = np.flatnonzero(data.split == "test")
    data.labels, data.true = data.conditions[data.tested], data.mean[data.tested].astype(float)
    return data


@pytest.fixture(scope="module")
def results(demo):
    """What stage 05 made of the demo's four short runs."""
    done = evaluate(demo)
    return SimpleNamespace(folder=demo / "results/demo", output=done.stdout,
                           metrics=rows_of(demo, "metrics.csv"), summary=rows_of(demo, "summary.csv"))


@pytest.fixture
def root(demo, tmp_path):
    return linked(tmp_path, demo)


@pytest.fixture
def own_runs(root, demo):
    """A root with a copy of the runs, to be changed."""
    (root / "runs").unlink()
    shutil.copytree(demo / "runs", root / "runs")
    return root


def value(rows, name, condition, metric, seed=""):
    wanted = {"model": name, "seed": seed, "condition": condition, "metric": metric}
    found, = (row["value"] for row in rows if wanted.items() <= row.items())
    return found


def over_all(summary, metric):
    """{model: its mean over all test conditions}"""
    wanted = {"subgroup": "all", "metric": metric}
    return {row["model"]: row["mean"] for row in summary if wanted.items() <= row.items()}


def singles(data, part):
    """The conditions of a part of the split that have one target, and these targets."""
    conditions = np.flatnonzero((data.split == part) & (data.targets[:, 1] < 0))
    return conditions, data.genes[data.targets[conditions, 0]]


def predictions(results, name):
    """{condition: predicted profile} of a file of predictions."""
    with h5py.File(results.folder / "predictions" / name) as file:
        return dict(zip(file["obs/condition"].asstr()[:], file["X"][:]))


# --- predictions and their scores

def test_a_prediction_is_the_mean_over_as_many_control_cells_as_the_condition_has(
        demo, data, results, evaluation):
    predicted = predictions(results, "scgenept_go_c.seed23.h5ad")
    assert set(predicted) == set(data.labels)
    net = model.load(demo / "runs/demo/scgenept_go_c/seed23/model.pt")
    controls = evaluation.draw_controls(data, data.tested, None, 42)
    for condition, cells in list(zip(data.tested, controls))[::15]:
        assert len(cells) == (data.cell_condition == condition).sum()
        assert np.isin(cells, data.ctrl_cells).all()
        targets = [target for target in data.targets[condition] if target >= 0]
        each = model.predict(net, data.token_ids, data.X[cells].toarray(), targets)
        assert_allclose(predicted[data.conditions[condition]], each.mean(0), rtol=1e-4, atol=1e-5)


def test_scores_of_models_and_baselines_are_those_of_a_loop_with_scipy(data, results):
    of_model = predictions(results, "scgpt.seed42.h5ad")
    trained_mean = data.mean[data.split == "train"].astype(float).mean(0)
    for condition in data.tested[::9]:
        label, true, top = data.conditions[condition], data.mean[condition], data.de_idx[condition]
        profiles = {("scgpt", 42): of_model[label],
                    ("non-ctrl-mean", ""): trained_mean,
                    ("no-change", ""): data.ctrl}
        for (name, seed), profile in profiles.items():
            mse = np.mean((profile - true)[top] ** 2)
            change = profile - data.ctrl
            pearson = stats.pearsonr(change, true - data.ctrl)[0] if change.any() else 0
            assert value(results.metrics, name, label, "mse_top20", seed) == approx(mse, rel=1e-4)
            assert value(results.metrics, name, label, "pearson_delta_all", seed) == approx(pearson, abs=1e-5)


def test_the_summary_is_mean_and_students_interval_over_the_seeds_means(results):
    values = {}  # {(model, subgroup, metric): {seed: [value of a condition, ...]}}
    for row in results.metrics:
        for subgroup in ("all", row["subgroup"]):
            seeds = values.setdefault((row["model"], subgroup, row["metric"]), {})
            seeds.setdefault(row["seed"], []).append(row["value"])
    summary = {(row["model"], row["subgroup"], row["metric"]): row for row in results.summary}
    assert summary.keys() == values.keys()
    for key, row in summary.items():
        means = [np.mean(of_seed) for of_seed in values[key].values()]
        assert row["mean"] == approx(np.mean(means))
        assert row["n_seeds"] == len(means)
        if len(means) == 1:
            assert row["interval"] == ""
        else:
            half_width = stats.t.ppf(0.975, len(means) - 1) * stats.sem(means)
            assert row["interval"] == approx(half_width, rel=1e-4)


def test_predictions_are_used_again(root, results):
    shutil.copytree(results.folder, root / "results/demo")
    path = root / "results/demo/predictions/scgpt.seed42.h5ad"
    before = path.stat().st_mtime_ns
    assert "there already" in evaluate(root, "--run", "scgpt").stdout
    assert path.stat().st_mtime_ns == before


def test_unmeasured_genes_never_count(demo, data, results, root):
    used = np.union1d(data.de_idx, data.targets)
    unmeasured = np.setdiff1d(np.arange(128), used)[:3]
    (root / "data").unlink()
    shutil.copytree(demo / "data", root / "data")
    with h5py.File(root / "data/demo/dataset.h5", "a") as file:
        for name, wrong in (("measured", False), ("mean", 1e6)):
            values = file[name][:]
            values[..., unmeasured] = wrong
            file[name][:] = values
    evaluate(root, "--run", "scgpt", "--controls", 5)
    with h5py.File(root / "results/demo/predictions/scgpt.seed42.h5ad") as file:
        assert file["X"].shape == (46, 125)
        assert not set(file["var/gene_name"].asstr()[:]) & set(data.genes[unmeasured])
    rows = rows_of(root, "metrics.csv")
    assert max(row["value"] for row in rows) < 100
    arguments = ("no-change", rows[0]["condition"], "mse_top20")
    assert value(rows, *arguments) == approx(value(results.metrics, *arguments))


# --- baselines

def small_screen():
    """Control, A (as A+ctrl and ctrl+A), B, C, A+B, A+D, D, E over 15 genes; A+B, A+D and D are tested."""
    conditions = ["ctrl", "A+ctrl", "ctrl+A", "B+ctrl", "C+ctrl", "A+B", "A+D", "D+ctrl", "E+ctrl"]
    targets = [[-1, -1], [0, -1], [0, -1], [1, -1], [2, -1], [0, 1], [0, 3], [3, -1], [4, -1]]
    split = ["ctrl", "train", "train", "train", "train", "test", "test", "test", "val"]
    cell_condition = np.repeat(np.arange(9), [9, 2, 6, 4, 4, 3, 3, 1, 3])
    X = np.random.default_rng(0).random((len(cell_condition), 15))
    mean = np.stack([X[cell_condition == condition].mean(0) for condition in range(9)])
    return SimpleNamespace(
        conditions=np.array(conditions, dtype=object), targets=np.array(targets),
        split=np.array(split, dtype=object), cell_condition=cell_condition, mean=mean,
        genes=np.array(list("ABCDEFGHIJKLMNO"), dtype=object), X=sparse.csr_matrix(X))


def test_the_random_baseline_is_one_training_perturbation_drawn_ten_times(data, results, evaluation):
    trained = {tuple(row) for row in data.mean[data.split == "train"]}
    first, second = (evaluation.random_means(data, data.tested, draw) for draw in (0, 1))
    drawn = {tuple(row) for row in first}
    assert drawn <= trained
    assert len(drawn) > 10
    assert not np.array_equal(first, second)
    assert {row["seed"] for row in results.metrics if row["model"] == "random"} == set(range(10))


def test_matching_mean_and_additive_take_the_parts_trained_profiles(evaluation):
    data = small_screen()
    means = evaluation.baseline_means(data, evaluation.targets_at(data, [5, 6, 7]), {})
    ctrl, B = data.mean[0], data.mean[3]
    A = (2 * data.mean[1] + 6 * data.mean[2]) / 8  # its two labels by their cells
    non_ctrl = data.mean[1:5].mean(0)
    assert_allclose(means["matching-mean"], [(A + B) / 2, (A + non_ctrl) / 2, non_ctrl])
    assert_allclose(means["additive"], [A + B - ctrl, A, ctrl])


def write_vectors(path, vector_of):
    """A file of language vectors, {gene: vector}."""
    with h5py.File(path, "w") as file:
        file.create_dataset("genes", data=list(vector_of), dtype=h5py.string_dtype())
        file["vectors"] = np.stack(list(vector_of.values()))


@pytest.mark.parametrize("width, known", [(2, "ABCDE"), (40, "ABCE")])  # D: a target without a vector
def test_ridge_is_the_closed_form_with_the_penalty_that_validation_chooses(
        evaluation, tmp_path, width, known):
    data = small_screen()
    rng = np.random.default_rng(1)
    vectors = {gene: rng.normal(size=width).astype(np.float32) for gene in known}
    write_vectors(tmp_path / "s.h5", vectors)
    trained_mean = np.mean([vectors[gene] for gene in "ABC"], axis=0, dtype=float)
    x = np.zeros((9, width))
    for row, targets in zip(x, data.targets):
        for target in targets[targets >= 0]:
            row += vectors.get("ABCDE"[target], trained_mean)
    design = np.column_stack([x, np.ones(9)])

    train, val, test = [1, 2, 3, 4], [8], [5, 6, 7]
    centred = x[train] - x[train].mean(0)
    lowest, best = np.inf, None
    for penalty in evaluation.RIDGE_PENALTIES * np.trace(centred @ centred.T) / len(train):
        P = penalty * np.eye(width + 1)
        P[-1, -1] = 0  # the intercept is not penalized
        weights = np.linalg.solve(design[train].T @ design[train] + P, design[train].T @ data.mean[train])
        error = ((design[val] @ weights - data.mean[val]) ** 2).mean()
        if error < lowest:
            lowest, best = error, design[test] @ weights
    means = evaluation.ridge_means(data, evaluation.targets_at(data, test), tmp_path / "s.h5")
    assert_allclose(means, best, rtol=1e-6, atol=1e-8)


def test_the_halves_of_the_ceiling_are_all_cells_of_a_condition_once_and_a_single_cell_has_none(evaluation):
    data = small_screen()
    one, other = evaluation.halves(data, [5, 1, 7], draw=3)  # 3 cells, 2 cells and 1 cell
    assert_allclose((2 * one[0] + other[0]) / 3, data.mean[5])
    assert_allclose((one[1] + other[1]) / 2, data.mean[1])
    assert np.isnan([one[2], other[2]]).all()


def test_without_trained_runs_the_baselines_are_compared_and_training_comes_next(root):
    (root / "runs").unlink()
    done = evaluate(root)
    assert {row["model"] for row in rows_of(root, "summary.csv")} >= set(BASELINES)
    assert "only baselines are compared" in done.stdout
    assert f"next, to train: python 04_train.py --root {root}" in done.stdout
    assert "next: python 05_eval.py --predict DEMO" in done.stdout


# --- which models

@pytest.mark.parametrize("options, message", [
    (["--run", "mine=nofile.pt"], "--run mine=nofile.pt: no such file"),
    (["--run", "scgtp"], "--run scgtp: not found"),
    (["--seed", "-1"], "invalid seed value: '-1'"),
    (["--controls", "0"], "--controls: has to be above 0"),
    (["--predict", "list.txt"], "list.txt: No such file"),
    (["--predict", "empty.txt"], "--predict empty.txt: no perturbation in it"),
    (["--predict", "DEMO001", "--external", "X=x.h5ad"], "--external is for the evaluation"),
    (["--dataset", "mine"], "run first: python 03_prepare_data.py --dataset mine")])
def test_a_wrong_option_is_one_line(root, monkeypatch, options, message):
    monkeypatch.chdir(root)
    (root / "empty.txt").write_text("# nothing yet\n")
    assert message in refusal(root, *options)


def change_config(run, **values):
    path = run / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | values))


def test_runs_that_cannot_be_used_are_left_out_with_a_line_and_the_others_are_evaluated(own_runs):
    of_scgpt, of_language = (own_runs / "runs/demo" / name for name in ("scgpt", "scgenept_go_c"))
    (of_scgpt / "seed23/model.pt").unlink()
    change_config(of_scgpt / "seed42", inputs={"dataset.h5": "another"})
    change_config(of_language / "seed42", finished=False, command="04_train.py --epochs 9")
    lines = evaluate(own_runs, "--controls", 2).stdout.splitlines()
    lost, = (line for line in lines if "scgpt/seed23 has no model.pt; train again: python " in line)
    assert "04_train.py --variant scgpt scgenept_go_c --seed 42 23" in lost
    assert any("scgpt/seed42: the dataset has changed since; train again: python " in line for line in lines)
    unfinished, = (line for line in lines if "scgenept_go_c/seed42 is not finished" in line)
    assert unfinished.endswith("; go on: python 04_train.py --epochs 9")
    assert names_in(own_runs / "results/demo/predictions") == {"scgenept_go_c.seed23.h5ad"}
    error = refusal(own_runs, "--run", "scgpt")
    assert "--run scgpt: not found" in error
    assert "left out above" in error


def test_a_run_goes_by_the_name_of_its_folder(own_runs, evaluation):
    (own_runs / "runs/demo/scgpt").rename(own_runs / "runs/demo/scgpt_before")
    options = ("--run", "scgpt_before", "--predict", "DEMO001", "--controls", 2)
    found = evaluation.predict("--root", own_runs, *options)
    assert found["model"].tolist() == ["scgpt_before", "scgpt_before"]


def test_a_model_of_another_vocabulary_is_refused(root):
    config = model.Config(n_tokens=50, pad_id=47, d_model=8, n_heads=2, d_hid=8, n_layers=1)
    model.save(model.ScGenePT(config), root / "other.pt")
    error = refusal(root, "--run", root / "other.pt")
    assert "other.pt: has a vocabulary of 50 genes, the dataset one of 129" in error


def test_a_broken_model_file_is_named(root):
    (root / "broken.pt").write_bytes(b"no model")
    assert "broken.pt: " in refusal(root, "--run", root / "broken.pt")


@pytest.mark.parametrize("options", [["--run", "random={0}"], ["--run", "ridge_go_c={0}"],
                                     ["--run", "x={0}", "x={0}"], ["--external", "scgpt={0}"]])
def test_two_models_of_one_name_are_an_error(root, options):
    own = root / "runs/demo/scgpt/seed42/model.pt"
    error = refusal(root, *(word.format(own) for word in options))
    assert "two models are called" in error


# --- other methods' predictions

def write_cells(path, labels, genes, X):
    return write_lab_file(path.parent, X, labels, genes, layout="dense", name=path.name)


@pytest.fixture(scope="module")
def perfect(demo, data, tmp_path_factory):
    """An evaluation, where nothing was trained, of the truth as other methods may write it."""
    root = tmp_path_factory.mktemp("perfect")
    (root / "data").symlink_to(demo / "data")
    order = np.random.default_rng(0).permutation(128)
    turned = ["+".join(reversed(label.split("+"))) for label in data.labels]  # B+A, ctrl+A
    write_cells(root / "order=random.h5ad", turned, data.genes[order], data.true[:, order])

    noise = np.tile([[0.1], [-0.1]], (46, 1))  # cancels in the mean of a condition's two cells
    cells = np.repeat(data.true, 2, axis=0) + noise
    write_cells(root / "cells.h5ad", np.repeat(data.labels, 2), data.genes, cells)

    as_gears = [label.replace("+ctrl", "").replace("+", "_") for label in data.labels]  # A_B, A
    path = write_cells(root / "gears.h5ad", as_gears, data.genes, data.true)
    (root / "gears.h5ad.gz").write_bytes(gzip.compress(path.read_bytes()))

    done = evaluate(root, "--external", f"turned={root / 'order=random.h5ad'}", root / "cells.h5ad",
                    f"gears={root / 'gears.h5ad.gz'}")
    return SimpleNamespace(root=root, output=one_line(done.stdout), warnings=done.stderr)


@pytest.mark.parametrize("name", ["turned", "cells", "gears"])
def test_conditions_of_another_method_match_by_their_targets_and_genes_by_symbol(perfect, data, name):
    assert f"{name}: 46 of the 46 test conditions are in " in perfect.output
    rows = [row for row in rows_of(perfect.root, "metrics.csv") if row["model"] == name]
    assert {row["condition"] for row in rows} == set(data.labels)
    for row in rows:
        best = 0 if row["metric"].startswith("mse") else 1
        assert row["value"] == approx(best, abs=1e-5)
    assert "warning" not in perfect.warnings


def test_another_method_is_compared_with_the_baselines_where_nothing_was_trained(perfect):
    assert "(1.000), beats the mean" in perfect.output
    assert {row["model"] for row in rows_of(perfect.root, "summary.csv")} >= {"gears", *BASELINES}


LONG_NAME = "scgenept_ncbi+uniprot+go_all-shuffled"


@pytest.fixture(scope="module")
def mixed(demo, data, tmp_path_factory):
    """An evaluation of runs, of a model file, and of methods that lack conditions, predict too much and
    predict on another scale."""
    root = linked(tmp_path_factory.mktemp("mixed"), demo)
    too_large = np.maximum(data.ctrl + 3 * (data.true - data.ctrl), 0)  # in the right direction
    ten_times = np.log1p(np.expm1(data.true) * 10)
    write_cells(root / "part.h5ad", data.labels[:20], data.genes, data.true[:20])
    write_cells(root / "loud.h5ad", data.labels, data.genes, too_large)
    write_cells(root / "scaled.h5ad", data.labels, data.genes, ten_times)
    shutil.copy(demo / "runs/demo/scgpt/seed42/model.pt", root / "mine.pt")
    options = ["--run", "scgpt", f"{LONG_NAME}={root / 'mine.pt'}", "--controls", 2, "--external"]
    done = evaluate(root, *options, *(f"{name}={root / name}.h5ad" for name in ("part", "loud", "scaled")))
    return SimpleNamespace(root=root, output=done.stdout, warnings=done.stderr,
                           report=(root / "results/demo/report.md").read_text(encoding="utf-8"))


def test_a_copied_model_file_evaluates_like_the_run(mixed):
    rows = rows_of(mixed.root, "metrics.csv")
    of_run, of_file = ([row["value"] for row in rows if (row["model"], row["seed"]) == key]
                       for key in (("scgpt", 42), (LONG_NAME, 0)))
    assert len(of_file) == 46 * 8
    assert of_file == of_run


@pytest.mark.parametrize("evaluated, name", [("results", "scgpt"), ("mixed", LONG_NAME)])
def test_the_table_and_the_words_below_it_fit_the_terminal(request, evaluated, name):
    output = request.getfixturevalue(evaluated).output
    start = output.index("Pearson Δ top 20: correlation")
    lines = output[start:output.index("report with all")].splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.startswith(f"| {name} ") for line in lines)


def test_methods_that_lack_conditions_or_are_worse_than_no_change_on_most_are_not_ranked(mixed):
    for text in (one_line(mixed.output), mixed.report):
        assert "the best model, scgpt (" in text
        assert "Not ranked: part (predictions of only 20 of the 46 conditions); " in text
        assert "; loud (MSE over all genes above that of no-change on most conditions); " in text
    pearson = over_all(rows_of(mixed.root, "summary.csv"), "pearson_delta_top20")
    assert pearson["loud"] > 0.8 > pearson["scgpt"]
    rows = [line for line in mixed.report.splitlines() if line.startswith(("| part ", "| loud "))]
    assert rows
    assert not any("*" in row for row in rows)


def test_another_method_on_another_scale_is_warned_of(mixed):
    warning, = (line for line in mixed.warnings.splitlines() if "scaled.h5ad" in line)
    assert "before the logarithm" in warning
    assert "times what the dataset's do" in warning


def refusal_of_method(root, labels, genes, X):
    path = write_cells(root / "x.h5ad", labels, genes, X)
    return refusal(root, "--external", f"other={path}")


@pytest.mark.parametrize("change, words", [
    (lambda means, ctrl: (means - ctrl) / 100, "values around 0, as changes and z-scores have"),
    (lambda means, ctrl: stats.zscore(means), "values around 0, as changes and z-scores have"),
    (lambda means, ctrl: np.expm1(means) * 100, "as counts have"),
    (lambda means, ctrl: means * np.nan, "NaN in all of them")])
def test_values_that_are_no_log_normalized_expression_are_refused_with_what_they_look_like(
        data, root, change, words):
    changed = change(data.true, data.ctrl)
    assert words in refusal_of_method(root, data.labels, data.genes, changed)


def test_counts_of_cells_are_refused_though_their_means_are_small_and_no_whole_numbers(data, root):
    of_cells = np.repeat(data.true, 7, axis=0)
    counts = np.random.default_rng(0).poisson(of_cells).astype(np.float32)
    error = refusal_of_method(root, np.repeat(data.labels, 7), data.genes, counts)
    assert "whole values up to" in error
    assert "as counts have" in error


def test_another_method_without_a_test_condition_or_with_too_few_genes_is_refused(data, root):
    error = refusal_of_method(root, ["X+ctrl"] * 46, data.genes, data.true)
    assert "has none of the 46 test conditions" in error
    error = refusal_of_method(root, data.labels, data.genes[3:], data.true[:, 3:])
    assert "lacks 3 of 128 genes: DEMO001, DEMO002, DEMO003" in error


# --- --predict

@pytest.fixture(scope="module")
def predicted(demo, tmp_path_factory):
    """What --predict made of a measured single, an unmeasured pair and a list: its folder and rows."""
    root = linked(tmp_path_factory.mktemp("predict"), demo)
    (root / "list.txt").write_text("DEMO010\n\nDEMO004+DEMO005\nDEMO003+DEMO002\n")
    evaluate(root, "--predict", "DEMO001", "DEMO002+DEMO003", root / "list.txt", "--controls", 7)
    return SimpleNamespace(folder=root / LAST,
                           ranked=rows_of(root, "predicted/last/predicted.csv"),
                           genes=rows_of(root, "predicted/last/predicted_genes.csv"))


@pytest.fixture(scope="module")
def change(demo, data):
    """A function: the mean change of the seven control cells that a model file itself predicts."""
    drawn = np.random.default_rng([42, 7]).choice(data.ctrl_cells, 7)
    control = data.X[drawn].toarray()

    def mean_change(name, seed, genes):
        net = model.load(demo / f"runs/demo/{name}/seed{seed}/model.pt")
        targets = [data.genes.tolist().index(gene) for gene in genes]
        return (model.predict(net, data.token_ids, control, targets) - control).mean(0)
    return mean_change


def rms(change):
    return np.sqrt((change ** 2).mean())


def genes_changed(predicted, condition, name):
    """The rows of predicted_genes.csv for a perturbation and a model."""
    rows = [row for row in predicted.genes if (row["condition"], row["model"]) == (condition, name)]
    assert len(rows) == 20
    return rows


def test_predicted_changes_are_means_over_cells_and_intervals_over_seeds(data, predicted, change):
    rows = genes_changed(predicted, "DEMO002+DEMO003", "scgpt")
    first, second = (change("scgpt", seed, ["DEMO002", "DEMO003"]) for seed in (42, 23))
    mean, half_width = (first + second) / 2, 12.7062 * abs(first - second) / 2
    largest = np.argsort(-np.abs(mean), kind="stable")[:20]
    assert [row["gene"] for row in rows] == data.genes[largest].tolist()
    for row, gene in zip(rows, largest):
        assert row["delta"] == approx(mean[gene], abs=1e-5)
        assert row["interval"] == approx(half_width[gene], abs=1e-4)
        assert row["predicted"] - row["control"] == approx(row["delta"], abs=1e-6)
        assert row["measured_delta"] == ""


def test_a_measured_perturbation_shows_the_measured_change_beside_it(data, predicted):
    measured = data.mean[data.conditions.tolist().index("DEMO001+ctrl")] - data.ctrl
    measured_of = dict(zip(data.genes, measured))
    for row in genes_changed(predicted, "DEMO001", "scgpt"):
        assert row["measured_delta"] == approx(measured_of[row["gene"]], abs=1e-5)


def test_perturbations_are_ranked_by_the_size_of_their_effect(predicted, change):
    sizes = [row["effect_rms"] for row in predicted.ranked]
    assert sizes == sorted(sizes, reverse=True)
    for row in predicted.ranked:
        genes = row["condition"].split("+")
        first, second = (rms(change(row["model"], seed, genes)) for seed in (42, 23))
        assert row["effect_rms"] == approx((first + second) / 2, rel=1e-4)


def test_the_interaction_of_a_pair_is_what_it_does_beyond_its_single_targets(predicted, change):
    for row in predicted.ranked:
        name, genes = row["model"], row["condition"].split("+")
        if len(genes) == 1:
            assert row["interaction_rms"] == ""
            continue
        sizes = []
        for seed in (42, 23):
            alone = sum(change(name, seed, [gene]) for gene in genes)
            sizes.append(rms(change(name, seed, genes) - alone + change(name, seed, [])))
        assert row["interaction_rms"] == approx(np.mean(sizes), rel=1e-3)


def test_large_and_disputed_effects_have_priority(predicted, change):
    for row in predicted.ranked:
        genes, means, sizes = row["condition"].split("+"), [], []
        for name in ("scgpt", "scgenept_go_c"):
            of_seeds = [change(name, seed, genes) for seed in (42, 23)]
            means.append(np.mean(of_seeds, axis=0))
            sizes += map(rms, of_seeds)
        disagreement = 1 - stats.pearsonr(*means)[0]
        assert row["disagreement"] == approx(disagreement, rel=1e-3)
        assert row["priority"] == approx(np.mean(sizes) * disagreement, rel=1e-3)


def test_a_pair_and_its_reverse_are_one(predicted):
    conditions = {row["condition"] for row in predicted.ranked}
    assert conditions == {"DEMO001", "DEMO002+DEMO003", "DEMO010", "DEMO004+DEMO005"}
    assert len(predicted.ranked) == 4 * 2


def test_few_perturbations_have_a_figure_each(predicted):
    figures = {f"{label}.png" for label in ("DEMO001", "DEMO002+DEMO003", "DEMO010", "DEMO004+DEMO005")}
    assert names_in(predicted.folder) == TABLES | figures | {"heatmap.png"}


def test_predict_writes_to_the_folder_of_its_name_and_touches_nothing_else(root):
    results = root / "results/demo"
    (root / LAST).mkdir(parents=True)
    earlier = [results / name for name in ("report.md", "summary.csv", "predicted/last/DEMO001.png")]
    for path in earlier:
        path.write_text("of an earlier call")
    evaluate(root, "--predict", "DEMO001", *QUICKLY, "--name", "first")
    assert {path.read_text() for path in earlier} == {"of an earlier call"}
    assert names_in(results) == {"report.md", "summary.csv", "predicted"}
    assert names_in(root / LAST) == {"DEMO001.png"}
    assert names_in(results / "predicted/first") == TABLES | {"DEMO001.png"}


def test_predict_leaves_nothing_of_another_kind_from_the_call_before(root):
    folder = root / LAST
    folder.mkdir(parents=True)
    for name in ("DEMO002.png", "heatmap.png", "predicted.cells.h5ad", "towards.csv"):
        (folder / name).touch()
    evaluate(root, "--predict", "DEMO001", *QUICKLY)
    assert names_in(folder) == TABLES | {"DEMO001.png"}


def test_all_singles_are_all_genes_without_a_figure_each_or_cells(data, root):
    done = evaluate(root, "--predict", "all-singles", *QUICKLY)
    rows = rows_of(root, "predicted/last/predicted.csv")
    assert {row["condition"] for row in rows} == set(data.genes)
    part_of = dict(zip(data.conditions, data.split))
    for row in rows:
        assert row["measured"] == part_of.get(f"{row['condition']}+ctrl", "no")
    new = [row["condition"] for row in rows if row["measured"] == "no"]  # the largest effect first
    printed = [line.split(":")[0].strip() for line in done.stdout.splitlines() if ": effect " in line]
    assert printed == new[:10]
    assert "not measured yet, by the size of the effect:" in done.stdout
    assert names_in(root / LAST) == TABLES | {"heatmap.png"}


@pytest.mark.parametrize("words, keeps", [(["DEMO001"], True), (["all-singles"], False),
                                          (["all-singles", "--cells"], True)])
def test_predicted_cells_are_kept_only_where_they_are_drawn_or_asked_for(demo, evaluation, words, keeps):
    options = ("--root", demo, *QUICKLY, "--predict", *words)
    args, data, runs, ridge_files = evaluation.set_up(evaluation.parse_arguments(options))
    wanted = evaluation.read_perturbations(args, data)
    cells = evaluation.choose_cells(data, wanted, args)
    found = evaluation.predict_wanted(wanted, cells, runs, ridge_files, args)
    assert len(found) == 2
    for run in found:
        assert run.changes.keys() == {*wanted, ""}
        assert run.changes[""].shape == (128,)
        assert list(run.cells) == (list(wanted) if keeps else [])


def test_an_interrupted_list_goes_on_where_it_was(data, evaluation, root):
    genes = data.genes[:40].tolist()
    options = ("--run", "scgpt", "--controls", 15, "--batch-size", 1, "--root", root)
    folder = root / LAST
    command = [sys.executable, KIT / "05_eval.py", "--predict", *genes, *options]
    process = subprocess.Popen(list(map(str, command)))

    def n_predicted():
        stored = list(folder.glob(".scgpt.seed23.*.npy"))  # of the first of two runs
        return np.load(stored[0], mmap_mode="r").any(1).sum() if stored else 0
    while n_predicted() < 10:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert n_predicted() < 41
    changes = np.load(next(folder.glob(".scgpt.seed23.*.npy")), mmap_mode="r+")
    changes[4] = 7  # whatever stands there is taken over
    changes[5, 64:] = 0  # but for a row of which a part never reached the disk

    evaluate(root, "--predict", "DEMO001", *QUICKLY)  # another call in between
    run_script("05_eval.py", "--predict", *genes, *options)
    assert not list(folder.glob(".*.npy"))
    rows = rows_of(root, "predicted/last/predicted.csv")
    size_of = {row["condition"]: row["effect_rms"] for row in rows}
    assert size_of.keys() == set(genes)
    assert [gene for gene, size in size_of.items() if size > 3] == [genes[4]]
    delta = evaluation.predict("--predict", genes[5], *options)["delta"]
    assert size_of[genes[5]] == approx((rms(delta[0]) + rms(delta[1])) / 2, abs=1e-5)


def test_all_unknown_genes_are_named_in_one_message(root):
    labels = ("DEMO001", "demo017", "DMEO002", "XYZ+DEMO003", "DEMO004+DEMO004", "ctrl")
    error = refusal(root, "--predict", *labels)
    assert "5 of 6 are not in the dataset or its vocabulary" in error
    for problem in ("'demo017' (did you mean DEMO017?)", "'DMEO002' (did you mean DEMO002?)",
                    "'XYZ+DEMO003' (nothing comes near)", "'DEMO004+DEMO004' (the same target twice)",
                    "'ctrl' (nothing is perturbed)"):
        assert problem in error
    assert error.endswith("--skip-unknown goes on without them")


def test_skip_unknown_goes_on_without_them(predict, capsys):
    found = predict("--predict", "DEMO001", "XYZ", "--skip-unknown", *QUICKLY)
    assert "left out: 1 of 2" in capsys.readouterr().out
    assert found["condition"].tolist() == ["DEMO001", "DEMO001"]


def test_without_a_run_the_baselines_predict(evaluation, root):
    (root / "runs").unlink()
    found = evaluation.predict("--root", root, "--predict", "DEMO001", "--controls", 5)
    models = set(found["model"])
    assert models >= {"non-ctrl-mean", "ridge_go_c"}
    assert "scgpt" not in models


def test_baselines_by_name_predict_their_change_from_the_control_mean(data, predict):
    conditions, genes = singles(data, "train")
    found = predict("--predict", genes[0], "--run", "additive", "non-ctrl-mean", "--controls", 4)
    assert found["model"].tolist() == ["additive", "non-ctrl-mean"]
    additive, non_ctrl_mean = found["delta"]
    assert_allclose(additive, data.mean[conditions[0]] - data.ctrl, atol=1e-5)
    assert_allclose(non_ctrl_mean, data.mean[data.split == "train"].mean(0) - data.ctrl, atol=1e-5)


def test_the_additive_baseline_says_that_it_does_not_know_a_target(data, predict, capsys):
    gene = singles(data, "test")[1][0]
    found = predict("--predict", gene, "--run", "additive", "non-ctrl-mean")
    assert f"additive says nothing of {gene}" in capsys.readouterr().out
    assert found["model"].tolist() == ["non-ctrl-mean"]


def test_predictions_from_python_are_those_of_the_command(predict, predicted):
    found = predict("--predict", "DEMO001", "--controls", 7, "--run", "scgpt")
    delta_of = dict(zip(found["genes"], found["delta"].mean(0)))
    for row in genes_changed(predicted, "DEMO001", "scgpt"):
        assert row["delta"] == approx(delta_of[row["gene"]], abs=1e-6)


def test_a_model_that_predicts_the_same_for_all_is_warned_of(demo, root):
    net = model.load(demo / "runs/demo/scgpt/seed42/model.pt")
    with torch.no_grad():
        net.pert_encoder.weight.zero_()  # it does not see what is perturbed
    model.save(net, root / "blind.pt")
    labels = ("DEMO001", "DEMO002", "DEMO003+DEMO004")
    done = evaluate(root, "--predict", *labels, "--run", root / "blind.pt", "--controls", 4)
    assert "blind, seed 0 predicts nearly the same change for all of these" in done.stderr
    pair, = (row for row in rows_of(root, "predicted/last/predicted.csv")
             if row["condition"] == "DEMO003+DEMO004")
    assert pair["effect_rms"] > 1e-6 > pair["interaction_rms"]


# --- --controls-from: cells of another lab

@pytest.fixture
def read_own(data, evaluation, root):
    """A function: expression and genes in common that stage 05 reads from cells, none of them perturbed."""
    args = SimpleNamespace(root=root, dataset="demo", layer=None, gene_key=None, upper_case=False,
                           normalize=False)

    def read(X, genes=data.genes, screen=data):
        path = write_cells(root / "own.h5ad", ["a"] * len(X), genes, X)
        X, in_common = evaluation.read_own_cells(path, args, screen)
        return X.toarray(), in_common
    return read


@pytest.fixture
def log(data):
    """Expression of the control cells."""
    return data.X[data.ctrl_cells].toarray()


def test_own_cells_are_predicted_from_over_the_genes_in_common(data, log, predict, tmp_path):
    in_file = [*data.genes[:100][::-1], "OTHER"]
    counts = np.random.default_rng(3).poisson(3.0, (40, 101)).astype(np.float32)
    path = write_cells(tmp_path / "own.h5ad", ["a"] * 40, in_file, counts)
    found = predict("--predict", "DEMO001", "DEMO120", "--run", "scgpt", "--controls", 500,
                    "--controls-from", path, "--normalize")
    assert set(found["genes"]) == {*data.genes[:100], "DEMO120"}

    normalized = counts / counts.sum(1, keepdims=True)
    total = np.median(normalized[:, :100].sum(1))
    total_of_screen = np.median(np.expm1(log[:, :100]).sum(1))  # over the genes in common
    normalized *= total_of_screen / total
    control_of = dict(zip(found["genes"], found["control"]))
    expected = np.log1p(normalized[:, in_file.index("DEMO050")]).mean()
    assert control_of["DEMO050"] == approx(expected, abs=0.1)  # 500 draws of 40 cells
    assert control_of["DEMO120"] == 0


@pytest.mark.parametrize("factor", [0.7, 1.3, 30])
def test_own_cells_on_another_scale_are_brought_to_the_datasets(log, read_own, factor):
    own, _ = read_own(np.log1p(np.expm1(log) * factor))
    assert_allclose(own, log, atol=1e-4)


@pytest.mark.parametrize("n_genes, factor, is_total_kept", [(2, 200, False), (60, 1.5, True)])
def test_what_a_perturbation_does_to_genes_is_no_change_of_scale(
        log, read_own, n_genes, factor, is_total_kept):
    counts = np.expm1(log)
    total = counts.sum()
    counts[:, :n_genes] *= factor
    if is_total_kept:
        counts *= total / counts.sum()
    own, _ = read_own(np.log1p(counts))
    assert_allclose(own, np.log1p(counts), atol=1e-4)


def test_genes_that_control_cells_lack_say_nothing_of_the_scale(data, log, read_own):
    screen = SimpleNamespace(**vars(data))
    X = data.X[np.arange(data.X.shape[0])].toarray()
    X[data.ctrl_cells, :80] = 0
    screen.X = sparse.csr_matrix(X)
    counts = np.expm1(log)
    counts[:, 127] *= 200  # changes the total
    own, _ = read_own(np.log1p(counts), screen=screen)
    assert_allclose(own, np.log1p(counts), atol=1e-4)


def test_the_first_of_two_genes_of_one_symbol_is_taken(data, log, read_own):
    genes = data.genes.copy()
    genes[50] = genes[3]  # a second one
    own, in_common = read_own(log, genes)
    assert np.flatnonzero(~in_common).tolist() == [50]
    np.testing.assert_array_equal(own[:, 3], log[:, 3])


def test_own_cells_without_a_gene_in_common_are_refused(log, root):
    path = write_cells(root / "none.h5ad", ["a"] * len(log), [f"X{i}" for i in range(128)], log)
    error = refusal(root, "--predict", "DEMO001", "--controls-from", path)
    assert "0 of the 128 measured genes are in it" in error


# --- --towards

def test_perturbations_are_ranked_by_how_near_they_lead(data, predict, root):
    conditions, genes = singles(data, "test")
    options = ("--run", "scgenept_go_c", "--controls", 5)
    words = one_line(evaluate(root, "--towards", genes[0], *options).stdout)
    rows = rows_of(root, "predicted/last/towards.csv")
    ranked = [row["condition"] for row in rows]
    pearsons = [row["pearson"] for row in rows]
    assert set(ranked) == set(data.genes)
    assert [row["rank"] for row in rows] == list(range(1, 129))
    assert pearsons == sorted(pearsons, reverse=True)
    assert f"closest to {genes[0]}: {ranked[0]} ({pearsons[0]:.2f})" in words
    assert f"{genes[0]} itself has rank {ranked.index(genes[0]) + 1} of 128" in words

    found = predict("--predict", *ranked[::40], *options)
    goal = data.mean[conditions[0]] - found["control"]
    for row in rows[::40]:
        change = found["delta"][found["condition"] == row["condition"]].mean(0)
        distance = np.linalg.norm(change - goal) / np.linalg.norm(goal)
        assert row["pearson"] == approx(stats.pearsonr(change, goal)[0], abs=1e-5)
        assert row["distance"] == approx(distance, abs=1e-5)


def test_what_leads_away_from_the_cells_of_a_file_is_not_among_the_closest(data, root):
    conditions, genes = singles(data, "train")
    likeness = np.corrcoef(data.mean[conditions] - data.ctrl)[0]
    there, away = genes[0], genes[likeness.argmin()]
    assert likeness.min() < -0.1
    cells = data.X[np.flatnonzero(data.cell_condition == conditions[0])].toarray()
    path = write_cells(root / "goal.h5ad", ["a"] * len(cells), data.genes, cells)
    options = ("--run", "additive", "--controls", 300, "--towards", path, "--predict")
    words = one_line(evaluate(root, *options, there, away).stdout)
    assert f"closest to {path}: {there} (1.00) values" in words
    assert "none leads there" in evaluate(root, *options, away).stdout


def test_the_best_model_of_the_report_comes_first_and_shuffled_controls_last(evaluation, tmp_path):
    rows = [("scgpt", "all", "pearson_delta_top20", 0.5), ("scgpt", "all", "mse_all", 2),
            ("scgpt", "unseen_single", "pearson_delta_top20", 1),
            ("genept_x", "all", "pearson_delta_top20", -0.2),
            ("scgenept_x", "all", "pearson_delta_top20", 0.7),
            ("scgenept_x-shuffled", "all", "pearson_delta_top20", 0.9)]
    summary = tmp_path / "summary.csv"
    evaluation.write_csv(summary, ("model", "subgroup", "metric", "mean"), rows)
    names = ("scgpt", "genept_x", "scgenept_x-shuffled", "new", "scgenept_x")
    runs = [SimpleNamespace(name=name) for name in names]
    ordered = [run.name for run in evaluation.best_first(runs, summary)]
    assert ordered == ["scgenept_x", "scgpt", "genept_x", "new", "scgenept_x-shuffled"]
    summary.unlink()
    ordered = [run.name for run in evaluation.best_first(runs, summary)]
    assert ordered == ["scgpt", "genept_x", "new", "scgenept_x", "scgenept_x-shuffled"]


@pytest.mark.parametrize("goal, message", [
    ("NOWHERE", "neither a condition of the dataset nor a file"),
    ("DEMO128", "neither a condition of the dataset nor a file"),  # a gene, never perturbed
    ("ctrl", "no perturbation"),
    ("empty.h5ad", "an empty file")])
def test_a_wrong_goal_is_one_line_before_anything_is_predicted(root, monkeypatch, goal, message):
    monkeypatch.chdir(root)
    (root / "empty.h5ad").touch()
    folder = root / LAST
    folder.mkdir(parents=True)
    (folder / "towards.csv").write_text("of an earlier call")
    error = refusal(root, "--towards", goal, "--run", "scgpt")
    assert message in error
    assert goal in error
    assert names_in(folder) == {"towards.csv"}


def test_a_goal_may_be_written_as_other_conditions_are(data, root):
    pair = data.genes[data.targets[data.targets[:, 1] >= 0][0]]
    goal = "_".join(pair)
    done = evaluate(root, "--towards", goal, "--run", "additive", "--predict", *pair)
    assert f"closest to {goal}" in done.stdout


def test_what_predicts_the_same_for_all_is_not_ranked(root):
    done = evaluate(root, "--towards", "DEMO005", "--run", "ridge_go_c", "non-ctrl-mean")
    assert "non-ctrl-mean: not ranked, as it does not tell these perturbations apart" in done.stdout
    rows = rows_of(root, "predicted/last/towards.csv")
    assert {row["model"] for row in rows} == {"ridge_go_c"}
    error = refusal(root, "--towards", "DEMO005", "--run", "non-ctrl-mean")
    assert "no model tells these perturbations apart" in error


# --- genes that the dataset lacks

def language_model(n_language_rows):
    torch.manual_seed(0)
    config = model.Config(n_tokens=4, pad_id=3, d_model=8, n_heads=2, d_hid=8, n_layers=1,
                          languages={"s": 5}, n_language_rows=n_language_rows)
    return model.ScGenePT(config).eval()


def test_a_gene_that_the_dataset_lacks_joins_with_its_token(evaluation):
    data = SimpleNamespace(genes=np.array(["A", "B"], dtype=object), token_ids=np.array([0, 1]), pad_id=3,
                           measured=np.ones(2, dtype=bool), mean=np.ones((1, 2)),
                           cell_condition=np.zeros(4), X=SimpleNamespace(shape=(4, 2)))
    evaluation.add_genes(data, ["A", "NEW"], {"A": 0, "B": 1, "NEW": 2, "<pad>": 3})
    assert data.genes.tolist() == ["A", "B", "NEW"]
    assert data.token_ids.tolist() == [0, 1, 2]
    assert data.measured.tolist() == [True, True, False]
    assert data.X.shape == (4, 3)


def test_a_gene_that_the_dataset_lacks_joins_with_its_language_vector(evaluation, tmp_path):
    of_new, of_others = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    folder = tmp_path / "data/human/embeddings"
    folder.mkdir(parents=True)
    write_vectors(folder / "s.lsa.concat.h5", {"NEW": of_new, "A": of_others})
    net = language_model(2)
    net.set_language([0, 1], {"s": np.stack([of_others, of_others])})
    cell = np.ones((1, 2))
    before = model.predict(net, [0, 1], cell, 0)

    data = SimpleNamespace(token_ids=np.array([0, 1, 2]), genes=np.array(["A", "B", "NEW"]))
    run = SimpleNamespace(name="scgenept_s", path="model.pt", config={"embeddings": {"s": "s.lsa.concat.h5"}})
    evaluation.add_language(net, run, data, SimpleNamespace(root=tmp_path, dataset="mine"))
    added = net.language_encoders["s"].embedding.weight[net.language_rows[2]]
    assert added.tolist() == of_new.tolist()
    np.testing.assert_array_equal(model.predict(net, [0, 1], cell, 0), before)
    assert np.isfinite(model.predict(net, [0, 1, 2], np.ones((4, 3)), [0, 2])).all()


def test_a_model_file_names_the_genes_that_it_has_no_vector_for(evaluation):
    data = SimpleNamespace(token_ids=np.array([0, 1, 2]), genes=np.array(["A", "B", "NEW"]))
    run = SimpleNamespace(name="released", path="released.pt", config={})
    net = language_model(4)
    net.language_rows.copy_(torch.arange(4))
    evaluation.add_language(net, run, data, None)  # it has a row for every token: nothing to do
    net.language_rows[2] = -1
    with pytest.raises(SystemExit, match="released.pt has no vector for NEW"):
        evaluation.add_language(net, run, data, None)


# --- files for anndata

@pytest.fixture(scope="module")
def cells(demo, tmp_path_factory):
    """What --cells wrote for the held-out conditions and for --predict, read by anndata."""
    anndata = pytest.importorskip("anndata")
    root = linked(tmp_path_factory.mktemp("cells"), demo)
    options = ("--run", "scgpt", "--controls", 3, "--cells")
    evaluate(root, *options)
    evaluate(root, *options, "--predict", "DEMO001", "DEMO002+DEMO003")
    return lambda name: anndata.read_h5ad(root / "results/demo" / name)


def test_cells_of_a_model_and_the_measured_ones_are_a_pair_that_cell_eval_accepts(data, cells):
    predicted = cells("predictions/scgpt.seed42.cells.h5ad")
    measured = cells("predictions/measured.cells.h5ad")
    conditions = {"ctrl", *data.labels}
    for table in (predicted, measured):
        assert table.var_names.tolist() == data.genes.tolist()
        assert set(table.obs["condition"]) == conditions
        assert table.obs_names.is_unique
        assert table.X.min() >= 0
        assert table.X.max() < 15


def test_predicted_cells_are_cut_at_zero(data, evaluation, tmp_path):
    X = np.linspace(-1, 1, 128, dtype=np.float32)[None]
    run = SimpleNamespace(name="m", seed=1)
    evaluation.write_predicted_cells(tmp_path / "x.h5ad", "{}", data, [(run, "ctrl", X)])
    with h5py.File(tmp_path / "x.h5ad") as file:
        np.testing.assert_array_equal(file["X"][:], X.clip(0))


@pytest.mark.parametrize("name", ["predictions/scgpt.seed42.cells.h5ad", "predictions/measured.cells.h5ad",
                                  "predicted/last/predicted.cells.h5ad"])
def test_cells_name_their_target_genes(cells, name):
    obs = cells(name).obs
    assert "ctrl" in set(obs["target_gene"])
    for condition, genes in zip(obs["condition"], obs["target_gene"]):  # A+ctrl and ctrl+A: A
        assert genes == condition.replace("+ctrl", "").replace("ctrl+", "")


def test_cells_are_the_control_cells_as_measured_and_what_was_predicted_for_each(data, cells):
    predicted, measured, means = (cells(f"predictions/{name}.h5ad") for name in (
        "scgpt.seed42.cells", "measured.cells", "scgpt.seed42"))

    def of(table, condition):
        return table[table.obs["condition"] == condition].X
    np.testing.assert_array_equal(of(predicted, "ctrl"), of(measured, "ctrl").toarray())
    mean_of = dict(zip(data.conditions, data.mean))
    for condition in means.obs["condition"].iloc[::9]:
        rows = of(predicted, condition)
        assert len(rows) == 3
        high = rows.min(0) > 0  # where nothing was cut at 0
        assert high.sum() > 64
        assert_allclose(rows.mean(0)[high], means[condition].X[0, high], rtol=1e-4)
        true = of(measured, condition).toarray().mean(0)
        assert_allclose(true, mean_of[condition], rtol=1e-4, atol=1e-6)


def test_cells_of_chosen_perturbations_stand_below_their_controls_for_every_model(cells):
    predicted = cells("predicted/last/predicted.cells.h5ad")
    n_cells = Counter(zip(predicted.obs["condition"], predicted.obs["seed"]))
    conditions = ("ctrl", "DEMO001", "DEMO002+DEMO003")
    assert n_cells == {(condition, seed): 3 for condition in conditions for seed in (23, 42)}
    is_ctrl = (predicted.obs["condition"] == "ctrl") & (predicted.obs["seed"] == 42)
    control = cells("predicted/last/predicted.h5ad").layers["control"]
    assert_allclose(predicted[is_ctrl].X.mean(0), control[0], rtol=1e-5)


def test_predictions_open_in_anndata_and_carry_what_they_were_made_from(data, cells, tmp_path):
    table = cells("predictions/scgpt.seed42.h5ad")
    assert table.shape == (46, 128)
    assert table.X.dtype == np.float32
    assert table.var_names[0] == "DEMO001"
    assert table.obs_names[0] == table.obs["condition"].iloc[0]
    assert set(table.obs) == {"condition", "subgroup", "model", "seed", "n_controls"}
    assert set(table.uns) == {"description", "control", "command", "date", "versions", "made_from"}
    assert "SYNTHETIC" in table.uns["description"]
    assert "05_eval.py" in table.uns["command"]
    assert_allclose(table.layers["delta"], table.X - data.ctrl, atol=1e-6)
    table.write_h5ad(tmp_path / "again.h5ad")


# --- what a user sees

def table_cells(lines):
    """The cells of a Markdown table."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_table_has_a_row_a_model_and_a_column_a_subgroup(results):
    header, _, counts, *rows = table_cells(
        line for line in results.output.splitlines() if line.startswith("|"))
    assert header == ["model", "unseen single", "seen1", "seen2", "all"]
    assert counts == ["(conditions)", "24", "16", "6", "46"]
    pearson = over_all(results.summary, "pearson_delta_top20")
    best = max(pearson.keys() - {"scgpt", "scgenept_go_c", "data-ceiling"}, key=pearson.get)
    assert [row[0] for row in rows] == ["scgpt", "scgenept_go_c", "non-ctrl-mean", best]
    assert "SYNTHETIC" in results.output


def test_the_demo_ends_with_commands_for_predict_and_for_own_cells(demo, results):
    *_, for_predict, for_own_cells = results.output.splitlines()
    assert for_predict.startswith("next: python 05_eval.py --predict DEMO")
    assert for_predict.endswith(f"--root {demo}")
    assert for_own_cells.startswith("next")
    assert "python 03_prepare_data.py --dataset mine --h5ad FILE.h5ad" in for_own_cells
    words = for_predict.removeprefix("next: python 05_eval.py ").split()
    assert "values and figures: " in run_script("05_eval.py", *words, *QUICKLY).stdout


def test_the_report_is_labelled_synthetic_and_marks_the_best(results):
    report = (results.folder / "report.md").read_text(encoding="utf-8")
    assert "**SYNTHETIC data**" in report
    mse = over_all(results.summary, "mse_all")
    del mse["data-ceiling"]
    best = min(mse, key=mse.get)
    assert any(line.startswith(f"| {best} ") and "**0.0" in line for line in report.splitlines())


def test_every_figure_and_baseline_and_the_ceiling_stand_in_the_report(results):
    report = (results.folder / "report.md").read_text(encoding="utf-8")
    for name in BASELINES:
        assert report.count(f"\n| {name} ") >= 3, name
    for name in ("split.png", "subgroups.png", "scatter.png", "training.png"):
        assert f"({name})" in report
        assert (results.folder / name).read_bytes().startswith(b"\x89PNG")


def outcome(**models):
    """What `verdict` takes, of {name: values of the conditions}; an underscore stands for a hyphen."""
    rows, summary = [], {}
    for name, values in models.items():
        name = name.replace("_", "-")
        rows += [(name, 1, condition, "", "pearson_delta_top20", value)
                 for condition, value in enumerate(values)]
        for metric in ("pearson_delta_top20", "mse_top20"):
            summary[name, "all", metric] = (np.mean(values), 0.05, 3)
    names = [name.replace("_", "-") for name in models]
    trained = [name for name in names if name not in ("non-ctrl-mean", "ridge")]
    return SimpleNamespace(rows=rows, summary=summary, names=names, models=trained, unranked={},
                           runs=[SimpleNamespace(name=name) for name in trained])


def test_the_verdict_compares_the_best_model_with_its_rivals(evaluation):
    text, table = evaluation.verdict(outcome(scgpt=[0.5, 0.5], lang=[0.9, 0.5], lang_shuffled=[0.69, 0.69],
                                             non_ctrl_mean=[0.6, 0.6], ridge=[0.95, 0.85]))
    assert "best model, lang (0.700 ± 0.050), beats the mean of the training perturbations (0.600" in text
    assert "not above ridge" in text
    assert "One seed" not in text
    better_in = {row[0]: row[3] for row in table_cells(table.splitlines()[2:])}
    assert better_in == {"lang": "", "non-ctrl-mean": "1 of 2", "lang-shuffled": "1 of 2",
                         "scgpt": "1 of 2", "ridge": "0 of 2"}


def test_a_model_below_the_mean_does_not_beat_it_and_a_shuffled_control_is_never_the_best(evaluation):
    text, _ = evaluation.verdict(outcome(scgpt=[0.5], lang=[0.4], lang_shuffled=[0.7], non_ctrl_mean=[0.6]))
    assert "the best model, scgpt (0.500 ± 0.050), does NOT beat the mean" in text


def test_the_papers_figures_are_those_of_its_tables(evaluation):
    both = evaluation.paper_rows(evaluation.PAPER)
    assert {len(cells) for cells in both.values()} == {8}
    assert both["scgenept_go_all"] == [
        "0.698 ± 0.02", "0.554 ± 0.02", "0.209 ± 0.02", "0.00400 ± 0.00",  # Norman
        "0.787 ± 0.02", "0.605 ± 0.03", "0.127 ± 0.01", "0.00641 ± 0.00"]  # Adamson
    assert evaluation.paper_rows(evaluation.PAPER_BY_SUBGROUP)["GEARS"][0] == "0.448 ± 0.01"


def test_the_papers_figures_stand_beside_ours(evaluation):
    adamson = evaluation.paper_rows(evaluation.PAPER, evaluation.PAPER_COLUMNS["adamson"])
    ours = {"ours": ["1", "2"]}
    table = evaluation.table_with_paper(["scgpt", "mine"], ours, adamson, ["a", "b", "c", "d"])
    of_scgpt, of_mine = table_cells(table.splitlines()[2:])
    assert of_scgpt == ["scgpt", "1", "0.782 ± 0.02", "0.589 ± 0.03", "0.135 ± 0.01", "0.00672 ± 0.00"]
    assert of_mine == ["mine", "2", "", "", "", ""]


def test_csv_and_markdown_stay_valid_whatever_a_label_holds(evaluation, tmp_path):
    row = ("a,b", 'say "x"', "line\nbreak", "pi|pe", "Ünïcode")
    evaluation.write_csv(tmp_path / "x.csv", ("1", "2", "3", "4", "5"), [row])
    text = (tmp_path / "x.csv").read_text(encoding="utf-8")
    _, read = csv.reader(io.StringIO(text, newline=""))
    assert read == list(row)
    table = evaluation.markdown_table(("1", "2"), [row[3:]])
    assert all(line.replace("\\|", "").count("|") == 3 for line in table.splitlines())
