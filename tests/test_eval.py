"""05_eval.py: predictions, baselines, tables, figures and files, against plain loops and other readers."""
import csv
import gzip
import io
import json
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import torch
from scipy import sparse

import model
from conftest import KIT, error_of, run_script

BASELINES = ("non-ctrl-mean", "random", "no-change", "matching-mean", "additive", "ridge_go_c",
             "data-ceiling")


@pytest.fixture(scope="module")
def evaluation(stage):
    return stage("05_eval")


def read_csv(path):
    return list(csv.DictReader(path.open(newline="", encoding="utf-8")))


@pytest.fixture(scope="module")
def results(demo, stage):
    """What stage 05 made of the demo's four short runs: its output, tables, data and folders."""
    done = run_script("05_eval.py", root=demo)
    folder = demo / "results/demo"
    return SimpleNamespace(
        root=demo, folder=folder, output=done.stdout, metrics=read_csv(folder / "metrics.csv"),
        summary=read_csv(folder / "summary.csv"), prepare=stage("03_prepare_data"),
        data=stage("03_prepare_data").load_dataset(demo / "data/demo/dataset.h5", ""))


@pytest.fixture
def root(demo, tmp_path):
    """A root of its own with the demo's data and runs, and without results."""
    for name in ("data", "runs"):
        (tmp_path / name).symlink_to(demo / name)
    return tmp_path


@pytest.fixture
def own_runs(root, demo):
    """The same with a copy of the runs, to be changed."""
    (root / "runs").unlink()
    shutil.copytree(demo / "runs", root / "runs")
    return root


def value(rows, name, condition, metric, seed=""):
    wanted = {"model": name, "seed": str(seed), "condition": condition, "metric": metric}
    found = [float(row["value"]) for row in rows if wanted.items() <= row.items()]
    assert len(found) == 1
    return found[0]


def predictions(results, name):
    with h5py.File(results.folder / "predictions" / name) as file:
        return dict(zip(file["obs/condition"].asstr()[:], file["X"][:]))


# --- predictions and their scores

def test_a_prediction_is_the_mean_over_as_many_control_cells_as_the_condition_has(results, evaluation):
    data, net = results.data, model.load(results.root / "runs/demo/scgenept_go_c/seed23/model.pt")
    predicted = predictions(results, "scgenept_go_c.seed23.h5ad")
    tested = np.flatnonzero(data.split == "test")
    assert set(predicted) == set(data.conditions[tested])
    controls = evaluation.draw_controls(data, tested, None, 42)
    for condition, cells in list(zip(tested, controls))[::15]:
        assert len(cells) == (data.cell_condition == condition).sum()
        assert np.isin(cells, data.ctrl_cells).all()
        targets = [t for t in data.targets[condition] if t >= 0]
        each = model.predict(net, data.token_ids, data.X[cells].toarray(), targets)
        np.testing.assert_allclose(predicted[data.conditions[condition]], each.mean(0), rtol=1e-4, atol=1e-5)


def test_scores_of_models_and_baselines_are_those_of_a_loop_with_scipy(results):
    data = results.data
    ctrl, trained = data.mean[data.split == "ctrl"][0], data.mean[data.split == "train"]
    profiles = {("scgpt", 42): predictions(results, "scgpt.seed42.h5ad"), ("no-change", ""): ctrl,
                ("non-ctrl-mean", ""): trained.astype(float).mean(0)}
    for condition in np.flatnonzero(data.split == "test")[::9]:
        label, true, top = data.conditions[condition], data.mean[condition], data.de_idx[condition]
        for (name, seed), profile in profiles.items():
            p = profile[label] if isinstance(profile, dict) else profile
            mse = np.mean((p - true)[top] ** 2)
            delta = scipy.stats.pearsonr(p - ctrl, true - ctrl)[0] if name != "no-change" else 0
            assert value(results.metrics, name, label, "mse_top20", seed) == pytest.approx(mse, rel=1e-4)
            scored = value(results.metrics, name, label, "pearson_delta_all", seed)
            assert scored == pytest.approx(delta, abs=1e-5)


def test_the_summary_is_mean_and_students_interval_over_the_seeds_means(results):
    for row in results.summary:
        seeds = {}
        for m in results.metrics:
            is_same = (m["model"], m["metric"]) == (row["model"], row["metric"])
            if is_same and row["subgroup"] in ("all", m["subgroup"]):
                seeds.setdefault(m["seed"], []).append(float(m["value"]))
        means = [np.mean(values) for values in seeds.values()]
        assert float(row["mean"]) == pytest.approx(np.mean(means)) and int(row["n_seeds"]) == len(means)
        if len(means) == 1:
            assert row["interval"] == ""
        else:
            half_width = scipy.stats.t.ppf(0.975, len(means) - 1) * scipy.stats.sem(means)
            assert float(row["interval"]) == pytest.approx(half_width, rel=1e-4)
    groups = results.data.subgroup[results.data.split == "test"]
    assert {row["subgroup"] for row in results.summary} == {"all", *groups}


def test_predictions_are_used_again(results):
    path = results.folder / "predictions/scgpt.seed42.h5ad"
    before = path.stat().st_mtime_ns
    assert "there already" in run_script("05_eval.py", root=results.root).stdout
    assert path.stat().st_mtime_ns == before


def test_unmeasured_genes_never_count(results, root):
    (root / "data").unlink()
    shutil.copytree(results.root / "data", root / "data")
    with h5py.File(root / "data/demo/dataset.h5", "a") as file:
        used = set(file["de_idx"][:].ravel()) | set(file["targets"][:].ravel())
        unmeasured = sorted(set(range(128)) - used)[:3]
        for name, wrong in (("measured", False), ("mean", 1e6)):
            values = file[name][:]
            values[..., unmeasured] = wrong
            file[name][:] = values
    run_script("05_eval.py", "--run", "scgpt", "--controls", 5, root=root)
    with h5py.File(root / "results/demo/predictions/scgpt.seed42.h5ad") as file:
        assert file["X"].shape == (46, 125)
        assert not set(file["var/gene_name"].asstr()[:]) & set(results.data.genes[unmeasured])
    rows = read_csv(root / "results/demo/metrics.csv")
    assert max(float(row["value"]) for row in rows) < 100
    label = rows[0]["condition"]
    assert value(rows, "no-change", label, "mse_top20") == pytest.approx(
        value(results.metrics, "no-change", label, "mse_top20"))


# --- baselines

def small_screen(seed=0):
    """Control, A (as A+ctrl and ctrl+A), B, C, A+B, A+D, D, E over 15 genes; A+B, A+D and D are tested."""
    rng = np.random.default_rng(seed)
    conditions = ["ctrl", "A+ctrl", "ctrl+A", "B+ctrl", "C+ctrl", "A+B", "A+D", "D+ctrl", "E+ctrl"]
    targets = [[-1, -1], [0, -1], [0, -1], [1, -1], [2, -1], [0, 1], [0, 3], [3, -1], [4, -1]]
    split = ["ctrl", "train", "train", "train", "train", "test", "test", "test", "val"]
    cell_condition = np.repeat(np.arange(9), [9, 2, 6, 4, 4, 3, 3, 1, 3])
    X = rng.random((len(cell_condition), 15))
    mean = np.stack([X[cell_condition == c].mean(0) for c in range(9)])
    return SimpleNamespace(
        conditions=np.array(conditions, dtype=object), targets=np.array(targets),
        split=np.array(split, dtype=object), cell_condition=cell_condition, mean=mean,
        genes=np.array(list("ABCDEFGHIJKLMNO"), dtype=object), X=sparse.csr_matrix(X))


def test_the_random_baseline_is_one_training_perturbation_drawn_ten_times(results, evaluation):
    data, tested = results.data, np.flatnonzero(results.data.split == "test")
    draws = [evaluation.random_means(data, tested, draw) for draw in (0, 1)]
    trained = {tuple(row) for row in data.mean[data.split == "train"]}
    assert all(tuple(row) in trained for draw in draws for row in draw)
    assert not np.array_equal(*draws) and len({tuple(row) for row in draws[0]}) > 10
    seeds = {row["seed"] for row in results.metrics if row["model"] == "random"}
    assert seeds == {str(draw) for draw in range(10)}


def test_matching_mean_and_additive_take_the_parts_trained_profiles(evaluation):
    data = small_screen()
    means = evaluation.baseline_means(data, evaluation.targets_at(data, [5, 6, 7]), {})
    ctrl, B = data.mean[0], data.mean[3]
    A = (2 * data.mean[1] + 6 * data.mean[2]) / 8  # its two labels by their cells
    non_ctrl = data.mean[1:5].mean(0)
    np.testing.assert_allclose(means["matching-mean"], [(A + B) / 2, (A + non_ctrl) / 2, non_ctrl])
    np.testing.assert_allclose(means["additive"], [A + B - ctrl, A, ctrl])


@pytest.mark.parametrize("width, known", [(2, "ABCDE"), (40, "ABCDE"), (2, "ABCE")])
def test_ridge_is_the_closed_form_with_the_penalty_that_validation_chooses(
        evaluation, tmp_path, width, known):
    data = small_screen()
    rng = np.random.default_rng(1)
    vectors = {gene: rng.normal(size=width).astype(np.float32) for gene in known}
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file.create_dataset("genes", data=list(vectors), dtype=h5py.string_dtype())
        file["vectors"] = np.stack(list(vectors.values()))
    mean = np.mean([vectors[gene] for gene in "ABC"], axis=0, dtype=float)  # for a target without a vector
    x = np.stack([sum((vectors.get("ABCDE"[t], mean) for t in targets if t >= 0), np.zeros(width))
                  for targets in data.targets])
    train, val, test = [1, 2, 3, 4], [8], [5, 6, 7]
    design = np.column_stack([x, np.ones(len(x))])
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
    np.testing.assert_allclose(means, best, rtol=1e-6, atol=1e-8)


def test_the_halves_of_the_ceiling_are_all_cells_of_a_condition_once(evaluation):
    data = small_screen()
    one, other = evaluation.halves(data, [5, 1], draw=3)  # 3 and 2 cells
    np.testing.assert_allclose((2 * one[0] + other[0]) / 3, data.mean[5])
    np.testing.assert_allclose((one[1] + other[1]) / 2, data.mean[1])


def test_a_single_cell_has_no_ceiling(evaluation):
    assert np.isnan(evaluation.halves(small_screen(), [7], draw=1)).all()


def test_without_trained_runs_the_baselines_are_compared_and_training_comes_next(root):
    (root / "runs").unlink()
    done = run_script("05_eval.py", root=root)
    assert {row["model"] for row in read_csv(root / "results/demo/summary.csv")} >= set(BASELINES)
    assert "only baselines are compared" in done.stdout
    assert f"next, to train: python 04_train.py --root {root}" in done.stdout
    assert "next: python 05_eval.py --predict DEMO" in done.stdout


# --- which models

@pytest.mark.parametrize("args, message", [
    (["--run", "nofile.pt"], "--run nofile.pt: nofile.pt does not exist"),
    (["--run", "mine=nofile.pt"], "nofile.pt does not exist"),
    (["--run", "scgtp"], "--run scgtp: not found"),
    (["--seed", "-1"], "invalid seed value: '-1'"),
    (["--controls", "0"], "--controls: has to be above 0"),
    (["--predict", "list.txt"], "list.txt: No such file"),
    (["--dataset", "mine"], "run first: python 03_prepare_data.py --dataset mine")])
def test_a_wrong_option_is_one_line(root, args, message):
    assert message in error_of("05_eval.py", *args, root=root)


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_an_unfinished_run_asked_for_by_name_says_so_with_the_command_that_goes_on(own_runs):
    for seed in (23, 42):
        folder = own_runs / f"runs/demo/scgpt/seed{seed}"
        change_config(folder, finished=False, command="04_train.py --epochs 9")
    done = run_script("05_eval.py", "--run", "scgpt", root=own_runs, check=False)
    assert done.returncode == 1 and "error: --run scgpt: not found" in done.stderr and "left out above" in done.stderr
    for seed in (23, 42):
        assert f"scgpt/seed{seed} is not finished; go on: python 04_train.py --epochs 9\n" in done.stdout


def evaluated(root):
    """The files of predictions that stage 05 left."""
    return {path.name for path in (root / "results/demo/predictions").iterdir()}


def test_a_run_whose_model_is_missing_is_left_out_with_a_line_and_the_others_are_evaluated(own_runs):
    (own_runs / "runs/demo/scgpt/seed23/model.pt").unlink()
    done = run_script("05_eval.py", "--controls", 2, root=own_runs)
    line = next(line for line in done.stdout.splitlines() if "scgpt/seed23 has no model.pt" in line)
    assert "train again: python " in line and "04_train.py --variant scgpt scgenept_go_c --seed 42 23" in line
    assert evaluated(own_runs) == {
        "scgpt.seed42.h5ad", "scgenept_go_c.seed23.h5ad", "scgenept_go_c.seed42.h5ad"}


def test_a_run_on_other_data_is_left_out_with_a_line(own_runs):
    change_config(own_runs / "runs/demo/scgpt/seed42", inputs={"dataset.h5": "another"})
    done = run_script("05_eval.py", "--controls", 2, "--run", "scgpt", root=own_runs)
    assert "scgpt/seed42: the dataset has changed since; train again: python " in done.stdout
    assert evaluated(own_runs) == {"scgpt.seed23.h5ad"}


def test_a_run_goes_by_the_name_of_its_folder(own_runs):
    (own_runs / "runs/demo/scgpt").rename(own_runs / "runs/demo/scgpt_before")
    run_script("05_eval.py", "--controls", 2, "--run", "scgpt_before", root=own_runs)
    assert evaluated(own_runs) == {"scgpt_before.seed23.h5ad", "scgpt_before.seed42.h5ad"}


def as_released(net, path):
    """Write a model of this kit under the keys of a released scGenePT file with GO-C vectors."""
    state = {}
    for key, tensor in net.state_dict().items():
        key = key.replace("language_encoders.go_c.", "gopt_encoder_c.").replace(".proj.", ".fc.")
        if key != "language_rows":
            state[key] = tensor.double() if "gopt_encoder_c.embedding" in key else tensor
    torch.save(state, path)


def test_a_released_file_and_a_copied_own_file_evaluate_like_runs(results, root):
    torch.manual_seed(0)
    config = model.Config(n_tokens=129, pad_id=126, d_model=32, n_heads=8, d_hid=16, n_layers=1,
                          languages={"go_c": 6}, n_language_rows=129)
    net = model.ScGenePT(config).eval()
    net.language_rows.copy_(torch.arange(129))
    as_released(net, root / "best_model_seed_42.pt")
    shutil.copy(results.root / "runs/demo/scgpt/seed42/model.pt", root / "mine.pt")
    released = f"released={root / 'best_model_seed_42.pt'}"
    run_script("05_eval.py", "--run", released, root / "mine.pt", "--controls", 3, root=root)
    rows = read_csv(root / "results/demo/metrics.csv")
    assert {(row["model"], row["seed"]) for row in rows} >= {("released", "42"), ("mine", "0")}
    with h5py.File(root / "results/demo/predictions/released.seed42.h5ad") as file:
        assert file["X"].shape == (46, 128)


def test_a_model_of_another_vocabulary_is_refused(root):
    config = model.Config(n_tokens=50, pad_id=47, d_model=8, n_heads=2, d_hid=8, n_layers=1)
    model.save(model.ScGenePT(config), root / "other.pt")
    error = error_of("05_eval.py", "--run", root / "other.pt", root=root)
    assert "other.pt: has a vocabulary of 50 genes, the dataset one of 129" in error


def test_a_broken_model_file_is_named(own_runs):
    (own_runs / "runs/demo/scgpt/seed42/model.pt").write_bytes(b"no model")
    assert "scgpt/seed42/model.pt: " in error_of("05_eval.py", "--run", "scgpt", root=own_runs)


@pytest.mark.parametrize("options", [["--run", "random={0}"], ["--run", "ridge_go_c={0}"],
                                     ["--run", "x={0}", "x={0}"], ["--external", "scgpt={0}"]])
def test_two_models_of_one_name_are_an_error(root, options):
    own = root / "runs/demo/scgpt/seed42/model.pt"
    error = error_of("05_eval.py", *(word.format(own) for word in options), root=root)
    assert "two models are called" in error


# --- other methods' predictions

def write_external(path, labels, genes, X):
    """An AnnData file with obs column `condition`, by hand."""
    with h5py.File(path, "w") as file:
        file["X"] = X
        for table, column, values in (("obs", "condition", labels), ("var", "gene_name", genes)):
            file.create_group(table).attrs["_index"] = column
            file[table].create_dataset(column, data=list(values), dtype=h5py.string_dtype())
    return path


def turned(label):
    return "+".join(reversed(label.split("+")))


def held_out_means(data):
    tested = np.flatnonzero(data.split == "test")
    return data.conditions[tested], data.mean[tested].astype(float), data.mean[data.split == "ctrl"][0]


@pytest.mark.parametrize("per_cell", [True, False])
def test_external_conditions_match_by_their_set_of_targets_and_genes_by_symbol(results, root, per_cell):
    labels, means, _ = held_out_means(results.data)
    labels, noise = [turned(label) for label in labels], 0  # B+A for A+B, ctrl+A for A+ctrl
    if per_cell:
        labels, means = np.repeat(labels, 2), np.repeat(means, 2, axis=0)
        noise = np.tile([[0.1], [-0.1]], (len(means) // 2, 1))  # cancels in the mean of a condition's cells
    order = np.random.default_rng(0).permutation(128)
    path = write_external(root / "x.h5ad", labels, results.data.genes[order], (means + noise)[:, order])
    run_script("05_eval.py", "--external", f"oracle={path}", "--run", "scgpt", "--controls", 1, root=root)
    rows = [row for row in read_csv(root / "results/demo/metrics.csv") if row["model"] == "oracle"]
    assert {row["condition"] for row in rows} == set(held_out_means(results.data)[0])
    for row in rows:
        perfect = 0 if row["metric"].startswith("mse") else 1
        assert float(row["value"]) == pytest.approx(perfect, abs=1e-5)


def test_another_method_is_compared_with_the_baselines_where_nothing_was_trained(results, root):
    (root / "runs").unlink()
    labels, means, _ = held_out_means(results.data)
    path = write_external(root / "x.h5ad", labels, results.data.genes, means)
    done = run_script("05_eval.py", "--external", f"oracle={path}", root=root)
    assert "the best model, oracle (1.000), beats the mean" in " ".join(done.stdout.split())
    models = {row["model"] for row in read_csv(root / "results/demo/summary.csv")}
    assert models >= {"oracle", *BASELINES}


def test_a_method_that_lacks_conditions_is_not_ranked(results, root):
    labels, means, _ = held_out_means(results.data)
    path = write_external(root / "x.h5ad", labels[:20], results.data.genes, means[:20])
    options = ("--run", "scgpt", "--controls", 2, "--external", f"other={path}")
    done = run_script("05_eval.py", *options, root=root)
    words = " ".join(done.stdout.split())
    assert "Not ranked: other (predictions of only 20 of the 46 conditions)" in words
    assert "best model, other" not in words


def test_a_method_worse_than_no_change_on_most_conditions_is_not_called_best(results, root):
    labels, means, ctrl = held_out_means(results.data)
    too_large = np.maximum(ctrl + 3 * (means - ctrl), 0)  # the right direction, three times too far
    path = write_external(root / "x.h5ad", labels, results.data.genes, too_large)
    options = ("--run", "scgpt", "--controls", 2, "--external", f"loud={path}")
    done = run_script("05_eval.py", *options, root=root)
    rows = read_csv(root / "results/demo/summary.csv")
    mean = {row["model"]: float(row["mean"]) for row in rows
            if (row["subgroup"], row["metric"]) == ("all", "pearson_delta_top20")}
    assert mean["loud"] > 0.8 > mean["scgpt"]
    report = (root / "results/demo/report.md").read_text(encoding="utf-8")
    for text in (report, " ".join(done.stdout.split())):
        assert "the best model, scgpt (" in text
        assert "Not ranked: loud (MSE over all genes above that of no-change on most conditions)." in text
    marked = [line for line in report.splitlines() if line.startswith("| loud ") and "*" in line]
    assert not marked


@pytest.mark.parametrize("change, words", [
    (lambda means, ctrl: means - ctrl, "values around 0, as changes and z-scores have"),
    (lambda means, ctrl: (means - ctrl) / 100, "values around 0, as changes and z-scores have"),
    (lambda means, ctrl: scipy.stats.zscore(means), "values around 0, as changes and z-scores have"),
    (lambda means, ctrl: np.expm1(means) * 100, "as counts have"),
    (lambda means, ctrl: np.round(means * 4), "whole values up to"),
    (lambda means, ctrl: means * np.nan, "NaN in all of them")])
def test_values_that_are_no_log_normalized_expression_are_refused_with_what_they_look_like(
        results, root, change, words):
    labels, means, ctrl = held_out_means(results.data)
    path = write_external(root / "x.h5ad", labels, results.data.genes, change(means, ctrl))
    assert words in error_of("05_eval.py", "--external", f"other={path}", root=root)


def test_counts_of_cells_are_refused_though_their_means_are_small_and_no_whole_numbers(results, root):
    labels, means, _ = held_out_means(results.data)
    counts = np.random.default_rng(0).poisson(np.repeat(means, 7, axis=0)).astype(np.float32)
    path = write_external(root / "x.h5ad", np.repeat(labels, 7).tolist(), results.data.genes, counts)
    assert "as counts have" in error_of("05_eval.py", "--external", f"other={path}", root=root)


def test_another_method_may_write_pairs_as_gears_does_in_a_gzipped_file(results, root):
    labels, means, _ = held_out_means(results.data)
    labels = [label.replace("+ctrl", "").replace("+", "_") for label in labels]
    path = write_external(root / "x.h5ad", labels, results.data.genes, means)
    packed = root / "x.h5ad.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    done = run_script("05_eval.py", "--external", f"a={packed}", "--run", "scgpt", "--controls", 1, root=root)
    assert f"a: 46 of the 46 test conditions are in {packed}" in done.stdout
    assert "warning" not in done.stderr


def test_another_method_on_another_scale_is_warned_of(results, root):
    labels, means, _ = held_out_means(results.data)
    path = write_external(root / "x.h5ad", labels, results.data.genes, np.log1p(np.expm1(means) * 10))
    done = run_script("05_eval.py", "--external", f"a={path}", "--run", "scgpt", "--controls", 1, root=root)
    assert "times what the dataset's do" in done.stderr


def test_a_file_of_another_kind_is_no_prediction(root):
    (root / "x.csv").write_text("gene,value\n")
    error = error_of("05_eval.py", "--external", f"a={root / 'x.csv'}", root=root)
    assert "a text file (csv, tsv?), not an AnnData file" in error


def test_an_external_file_without_a_test_condition_or_with_too_few_genes_is_refused(results, root):
    labels, means, _ = held_out_means(results.data)
    path = write_external(root / "a.h5ad", ["X+ctrl"] * len(labels), results.data.genes, means)
    error = error_of("05_eval.py", "--external", f"a={path}", root=root)
    assert "has none of the 46 test conditions" in error
    path = write_external(root / "b.h5ad", labels, results.data.genes[3:], means[:, 3:])
    error = error_of("05_eval.py", "--external", f"b={path}", root=root)
    assert "lacks 3 of 128 genes: DEMO001, DEMO002, DEMO003" in error


# --- --predict

@pytest.fixture(scope="module")
def predicted(results, tmp_path_factory):
    """What --predict made of a measured single, an unmeasured pair and a list: its folder and rows."""
    root = tmp_path_factory.mktemp("predict")
    for name in ("data", "runs"):
        (root / name).symlink_to(results.root / name)
    (root / "list.txt").write_text("DEMO010\n\nDEMO004+DEMO005\nDEMO003+DEMO002\n")
    wanted = ("DEMO001", "DEMO002+DEMO003", root / "list.txt")
    run_script("05_eval.py", "--predict", *wanted, "--controls", 7, root=root)
    folder = root / "results/demo/predicted/last"
    return SimpleNamespace(folder=folder, ranked=read_csv(folder / "predicted.csv"),
                           genes=read_csv(folder / "predicted_genes.csv"))


def change(results, name, seed, genes):
    """Mean predicted change of the seven control cells, by the model file itself."""
    data = results.data
    control = data.X[np.random.default_rng([42, 7]).choice(data.ctrl_cells, 7)].toarray()
    net = model.load(results.root / f"runs/demo/{name}/seed{seed}/model.pt")
    target_idx = [data.genes.tolist().index(gene) for gene in genes]
    return (model.predict(net, data.token_ids, control, target_idx) - control).mean(0)


def test_predicted_changes_are_means_over_cells_and_intervals_over_seeds(results, predicted):
    data = results.data
    rows = [row for row in predicted.genes
            if (row["condition"], row["model"]) == ("DEMO002+DEMO003", "scgpt")]
    both = np.stack([change(results, "scgpt", seed, ["DEMO002", "DEMO003"]) for seed in (42, 23)])
    order = np.argsort(-np.abs(both.mean(0)), kind="stable")[:20]
    assert [row["gene"] for row in rows] == data.genes[order].tolist()
    for row in rows:
        values = both[:, data.genes.tolist().index(row["gene"])]
        assert float(row["delta"]) == pytest.approx(values.mean(), abs=1e-5)
        assert float(row["interval"]) == pytest.approx(12.7062 * abs(values[0] - values[1]) / 2, abs=1e-4)
        assert float(row["predicted"]) - float(row["control"]) == pytest.approx(float(row["delta"]), abs=1e-6)
        assert row["measured_delta"] == ""


def test_a_measured_perturbation_shows_the_measured_change_beside_it(results, predicted):
    data = results.data
    measured = data.mean[data.conditions.tolist().index("DEMO001+ctrl")] - data.mean[data.split == "ctrl"][0]
    for row in (row for row in predicted.genes if row["condition"] == "DEMO001"):
        expected = float(measured[data.genes.tolist().index(row["gene"])])
        assert float(row["measured_delta"]) == pytest.approx(expected, abs=1e-5)


def test_perturbations_are_ranked_by_effect_and_pairs_have_their_interaction(results, predicted):
    sizes = [float(row["effect_rms"]) for row in predicted.ranked]
    assert sizes == sorted(sizes, reverse=True)

    def rms(change):
        return np.sqrt((change ** 2).mean())
    for row in predicted.ranked:
        name, genes = row["model"], row["condition"].split("+")
        deltas = [change(results, name, seed, genes) for seed in (42, 23)]
        assert float(row["effect_rms"]) == pytest.approx(np.mean([rms(d) for d in deltas]), rel=1e-4)
        if len(genes) == 1:
            assert row["interaction_rms"] == ""
            continue
        apart = [d + change(results, name, seed, []) - sum(change(results, name, seed, [g]) for g in genes)
                 for d, seed in zip(deltas, (42, 23))]
        assert float(row["interaction_rms"]) == pytest.approx(np.mean([rms(a) for a in apart]), rel=1e-3)


def test_a_pair_and_its_reverse_are_one(predicted):
    conditions = {row["condition"] for row in predicted.ranked}
    assert conditions == {"DEMO001", "DEMO002+DEMO003", "DEMO010", "DEMO004+DEMO005"}
    assert len(predicted.ranked) == 4 * 2


def test_few_perturbations_have_a_figure_each(predicted):
    names = {path.name for path in predicted.folder.glob("*.png")}
    labels = ("DEMO001", "DEMO002+DEMO003", "DEMO010", "DEMO004+DEMO005", "heatmap")
    assert names == {f"{label}.png" for label in labels}


def contents(folder):
    """{path: bytes} of all files in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_predict_writes_to_the_folder_of_its_name_and_touches_nothing_else(root):
    run_script("05_eval.py", "--run", "scgpt", "--controls", 1, root=root)
    predict = ("05_eval.py", "--predict", "DEMO001", "--run", "scgpt", "--controls", 1)
    run_script(*predict, root=root)
    before = contents(root / "results")
    run_script(*predict, "--name", "first", root=root)
    after = contents(root / "results")
    first = root / "results/demo/predicted/first"
    assert {path.name for path in after.keys() - before.keys() if path.parent == first} == {
        "predicted.csv", "predicted_genes.csv", "predicted.h5ad", "DEMO001.png"}
    assert {path: after[path] for path in after if path.parent != first} == before
    assert {path.name for path in before} >= {"report.md", "summary.csv", "predicted.csv"}


def test_predict_again_leaves_no_figure_of_the_call_before(root):
    for gene in ("DEMO001", "DEMO002"):
        run_script("05_eval.py", "--predict", gene, "--run", "scgpt", "--controls", 1, root=root)
    assert [path.name for path in (root / "results/demo/predicted/last").glob("*.png")] == ["DEMO002.png"]


def test_all_singles_are_all_genes_without_a_figure_each_or_cells(results, root):
    done = run_script("05_eval.py", "--predict", "all-singles", "--run", "scgpt", "--controls", 1, root=root)
    folder = root / "results/demo/predicted/last"
    rows = read_csv(folder / "predicted.csv")
    assert {row["condition"] for row in rows} == set(results.data.genes)
    part_of = dict(zip(results.data.conditions, results.data.split))
    for row in rows:
        assert row["measured"] == part_of.get(f"{row['condition']}+ctrl", "no")
    new = [row["condition"] for row in rows if row["measured"] == "no"]  # the largest effect first
    printed = [line.split(":")[0].strip() for line in done.stdout.splitlines() if ": effect " in line]
    assert printed == new[:10] and "not measured yet, by the size of the effect:" in done.stdout
    assert {path.name for path in folder.iterdir()} == {
        "predicted.csv", "predicted_genes.csv", "predicted.h5ad", "heatmap.png"}


def test_predicted_cells_are_kept_only_where_they_are_drawn_or_asked_for(results, evaluation):
    for words, keeps in ((["DEMO001"], True), (["all-singles"], False), (["all-singles", "--cells"], True)):
        options = ("--root", results.root, "--run", "scgpt", "--controls", 1, "--predict", *words)
        args, data, runs, ridge_files = evaluation.set_up(evaluation.parse_arguments(options))
        wanted = evaluation.read_perturbations(args, data)
        cells = evaluation.choose_cells(data, wanted, args)
        for run in evaluation.predict_wanted(wanted, cells, runs, ridge_files, args):
            assert run.changes.keys() == {*wanted, ""} and run.changes[""].shape == (128,)
            assert list(run.cells) == (list(wanted) if keeps else [])


def test_an_interrupted_list_goes_on_where_it_was(results, evaluation, root):
    command = [sys.executable, KIT / "05_eval.py", "--predict", "all-singles", "--run", "scgpt", "--controls", 15,
               "--batch-size", 1, "--root", root]
    folder = root / "results/demo/predicted/last"
    process = subprocess.Popen(list(map(str, command)))
    pattern = ".scgpt.seed23.*.npy"  # of the first of two runs
    while not (parts := list(folder.glob(pattern))) or np.load(parts[0], mmap_mode="r").any(1).sum() < 30:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    n_done = np.load(parts[0], mmap_mode="r").any(1).sum()
    changes = np.load(parts[0], mmap_mode="r+")
    changes[4] = 7  # whatever stands there is taken over
    changes[5, 64:] = 0  # but for a row of which a part never reached the disk
    run_script("05_eval.py", "--predict", "DEMO001", "--run", "scgpt", root=root)  # another call in between
    run_script("05_eval.py", *command[2:-2], root=root)
    assert 30 <= n_done < 129 and not list(folder.glob(".*.npy"))
    rows = {row["condition"]: float(row["effect_rms"]) for row in read_csv(folder / "predicted.csv")}
    assert len(rows) == 128 and rows[results.data.genes[4]] > 3 and sorted(rows.values())[-2] < 3
    again = evaluation.predict("--root", root, *command[2:-2])
    delta = again["delta"][again["condition"] == results.data.genes[5]]
    assert rows[results.data.genes[5]] == pytest.approx(np.sqrt((delta ** 2).mean(1)).mean(), abs=1e-5)


def test_a_lower_case_gene_is_told_its_own_name(root):
    assert "'demo017' (did you mean DEMO017?)" in error_of("05_eval.py", "--predict", "demo017", root=root)


def test_all_unknown_genes_are_named_in_one_message(root):
    labels = ("DEMO001", "DMEO002", "XYZ+DEMO003", "DEMO004+DEMO004", "ctrl")
    error = error_of("05_eval.py", "--predict", *labels, root=root)
    assert "4 of 5 are not in the dataset or its vocabulary" in error
    assert "'DMEO002' (did you mean DEMO002?)" in error
    assert "'XYZ+DEMO003' (nothing comes near)" in error
    assert "'DEMO004+DEMO004' (the same target twice)" in error
    assert "'ctrl' (nothing is perturbed)" in error
    assert error.endswith("--skip-unknown goes on without them")


def test_skip_unknown_goes_on_without_them(root):
    done = run_script("05_eval.py", "--predict", "DEMO001", "XYZ", "--skip-unknown", "--run", "scgpt",
                      "--controls", 1, root=root)
    assert "left out: 1 of 2" in done.stdout
    rows = read_csv(root / "results/demo/predicted/last/predicted.csv")
    assert {row["condition"] for row in rows} == {"DEMO001"}


def test_without_a_run_the_baselines_predict(root):
    (root / "runs").unlink()
    run_script("05_eval.py", "--predict", "DEMO001", "--controls", 5, root=root)
    models = {row["model"] for row in read_csv(root / "results/demo/predicted/last/predicted.csv")}
    assert models >= {"non-ctrl-mean", "ridge_go_c"} and "scgpt" not in models


def test_baselines_by_name_predict_their_change_from_the_control_mean(results, evaluation):
    """The demo's pairs are of targets that were perturbed alone, so that all baselines know them."""
    data = results.data
    row = np.flatnonzero((data.split == "train") & (data.targets[:, 1] < 0))[0]
    gene, ctrl = data.genes[data.targets[row, 0]], data.mean[data.split == "ctrl"][0]
    found = evaluation.predict("--root", results.root, "--predict", gene, "--run", "additive", "non-ctrl-mean",
                               "--controls", 4)
    assert found["model"].tolist() == ["additive", "non-ctrl-mean"]
    np.testing.assert_allclose(found["delta"][0], data.mean[row] - ctrl, atol=1e-5)
    mean = data.mean[data.split == "train"].mean(0)
    np.testing.assert_allclose(found["delta"][1], mean - ctrl, atol=1e-5)


def test_the_additive_baseline_says_that_it_does_not_know_a_target(root, results):
    data = results.data
    gene = data.genes[data.targets[data.subgroup == "unseen_single"][0, 0]]
    done = run_script("05_eval.py", "--predict", gene, "--run", "additive", "non-ctrl-mean", root=root)
    assert f"additive says nothing of {gene}" in done.stdout
    rows = read_csv(root / "results/demo/predicted/last/predicted.csv")
    assert [row["model"] for row in rows] == ["non-ctrl-mean"]


def test_predictions_from_python_are_those_of_the_command(results, evaluation, predicted):
    found = evaluation.predict("--root", results.root, "--predict", "DEMO001", "--controls", 7,
                               "--run", "scgpt")
    rows = [row for row in predicted.genes if (row["condition"], row["model"]) == ("DEMO001", "scgpt")]
    for row in rows:
        delta = found["delta"][:, found["genes"].tolist().index(row["gene"])].mean()
        assert float(row["delta"]) == pytest.approx(delta, abs=1e-6)


@pytest.fixture(scope="module")
def own_cells(results, tmp_path_factory):
    """Cells of another lab: counts of 100 of the demo's genes in another order, and a gene of its own."""
    path = tmp_path_factory.mktemp("own") / "own.h5ad"
    genes = [*results.data.genes[:100][::-1], "OTHER"]
    counts = np.random.default_rng(3).poisson(3.0, (40, 101)).astype(np.float32)
    results.prepare.write_h5ad(path, "{}", counts, {"condition": ["a"] * 40}, np.array(genes, dtype=object), "")
    totals = counts.sum(1, keepdims=True)
    return SimpleNamespace(path=path, genes=genes, log=np.log1p(counts * np.median(totals) / totals))


def test_own_cells_are_predicted_from_over_the_genes_in_common(results, evaluation, own_cells):
    found = evaluation.predict("--root", results.root, "--controls-from", own_cells.path, "--normalize",
                               "--predict", "DEMO001", "DEMO120", "--run", "scgpt", "--controls", 500)
    genes = [*results.data.genes[:100], "DEMO120"]
    assert found["genes"].tolist() == [gene for gene in results.data.genes if gene in genes]
    column = found["genes"].tolist().index("DEMO050")
    counts = np.expm1(own_cells.log)
    screen = np.expm1(results.data.X[results.data.ctrl_cells].toarray())[:, :100].sum(1)
    counts *= np.median(screen) / np.median(counts[:, :100].sum(1))  # over the genes in common
    expected = np.log1p(counts[:, own_cells.genes.index("DEMO050")]).mean()  # 500 draws of 40 cells
    assert found["control"][column] == pytest.approx(expected, abs=0.1)
    assert found["control"][found["genes"].tolist().index("DEMO120")] == 0


@pytest.mark.parametrize("factor", [0.7, 1.3, 30])
def test_own_cells_on_another_scale_are_brought_to_the_datasets(results, evaluation, root, factor):
    data = results.data
    log = data.X[data.ctrl_cells].toarray()
    path = root / "own.h5ad"
    results.prepare.write_h5ad(path, "{}", np.log1p(np.expm1(log) * factor), {"condition": ["a"] * len(log)}, data.genes, "")
    own = evaluation.read_own_cells(path, SimpleNamespace(root=root, dataset="demo", layer=None, gene_key=None,
                                                          upper_case=False, normalize=False), data)
    np.testing.assert_allclose(own[0].toarray(), log, atol=1e-4)


@pytest.mark.parametrize("genes", [2, 60, 0])
def test_what_a_perturbation_does_to_genes_is_no_change_of_scale(results, evaluation, root, genes):
    data = results.data
    counts = np.expm1(data.X[data.ctrl_cells].toarray())
    counts[:, :genes] *= 200 if genes == 2 else 1.5  # a few genes change the sum, many the typical gene
    if genes == 0:  # genes that control cells lack, and one that changes the sum
        data = SimpleNamespace(**vars(data))
        log = data.X[np.arange(data.X.shape[0])].toarray()
        log[data.ctrl_cells, :80] = 0
        data.X = scipy.sparse.csr_matrix(log)
        counts[:, 127] *= 200
    if genes == 60:
        counts *= np.expm1(data.X[data.ctrl_cells].toarray()).sum() / counts.sum()
    path = root / "own.h5ad"
    results.prepare.write_h5ad(path, "{}", np.log1p(counts), {"condition": ["a"] * len(counts)}, data.genes, "")
    own = evaluation.read_own_cells(path, SimpleNamespace(root=root, dataset="demo", layer=None, gene_key=None,
                                                          upper_case=False, normalize=False), data)
    np.testing.assert_allclose(own[0].toarray(), np.log1p(counts), atol=1e-4)


def test_the_first_of_two_genes_of_one_symbol_is_taken(results, evaluation, root):
    data, genes = results.data, results.data.genes.copy()
    genes[50] = genes[3]  # a second one
    log = data.X[data.ctrl_cells].toarray()
    path = root / "own.h5ad"
    results.prepare.write_h5ad(path, "{}", log, {"condition": ["a"] * len(log)}, genes, "")
    X, in_common = evaluation.read_own_cells(path, SimpleNamespace(
        root=root, dataset="demo", layer=None, gene_key=None, upper_case=False, normalize=False), data)
    assert in_common.tolist() == [i != 50 for i in range(128)]
    np.testing.assert_array_equal(X[:, 3].toarray().ravel(), log[:, 3])


def test_own_cells_without_a_gene_in_common_are_refused(root, own_cells, results):
    path = root / "none.h5ad"
    results.prepare.write_h5ad(path, "{}", own_cells.log, {"condition": ["a"] * 40},
                               np.array([f"X{i}" for i in range(101)], dtype=object), "")
    error = error_of("05_eval.py", "--predict", "DEMO001", "--controls-from", path, root=root)
    assert "0 of the 128 measured genes are in it" in error


def test_perturbations_are_ranked_by_how_near_they_lead(results, evaluation, root):
    data = results.data
    row = np.flatnonzero((data.split == "test") & (data.targets[:, 1] < 0))[0]
    gene = data.genes[data.targets[row, 0]]
    options = ["--run", "scgenept_go_c", "--controls", 20]
    done = run_script("05_eval.py", "--towards", gene, *options, root=root)
    rows = read_csv(root / "results/demo/predicted/last/towards.csv")
    assert len(rows) == 128 and [row["rank"] for row in rows] == [str(rank) for rank in range(1, 129)]

    found = evaluation.predict("--root", results.root, "--predict", "all-singles", *options)
    goal = data.mean[row] - found["control"]
    for one in rows[::40]:
        change = found["delta"][found["condition"] == one["condition"]].mean(0)
        assert float(one["pearson"]) == pytest.approx(np.corrcoef(change, goal)[0, 1], abs=1e-5)
        distance = np.linalg.norm(change - goal) / np.linalg.norm(goal)
        assert float(one["distance"]) == pytest.approx(distance, abs=1e-5)
    rank = next(one["rank"] for one in rows if one["condition"] == gene)
    words = " ".join(done.stdout.split())
    assert f"closest to {gene}: {rows[0]['condition']} ({float(rows[0]['pearson']):.2f})" in words
    assert f"{gene} itself has rank {rank} of 128" in words


def test_what_leads_away_is_not_among_the_closest(results, root):
    data = results.data
    ctrl = data.mean[data.split == "ctrl"][0]
    mean_change = data.mean[data.split == "train"].mean(0) - ctrl
    away = np.maximum(ctrl - 3 * mean_change, 0)  # the opposite of what all perturbations have in common
    path = root / "away.h5ad"
    results.prepare.write_h5ad(path, "{}", away[None], {"condition": ["a"]}, data.genes, "")
    targets = data.genes[data.targets[data.subgroup == "unseen_single", 0]][:3]
    done = run_script("05_eval.py", "--towards", path, "--predict", *targets, "--run", "scgpt", "--controls", 20, root=root)
    rows = read_csv(root / "results/demo/predicted/last/towards.csv")
    shown = {row["condition"] for row in rows if float(row["pearson"]) > 0}
    words = " ".join(done.stdout.split()).partition("closest to ")[2].partition(" values")[0]
    assert {row["condition"] for row in rows if row["condition"] in words} == shown
    assert shown or "none leads there" in words


def test_the_best_model_of_the_report_comes_first(evaluation, tmp_path):
    runs = [SimpleNamespace(name=name) for name in ("scgpt", "genept_x", "scgenept_x-shuffled", "new", "scgenept_x")]
    table = "model,subgroup,metric,mean\n" + "".join(f"{name},all,pearson_delta_top20,{mean}\n" for name, mean in [
        ("scgpt", 0.5), ("genept_x", -0.2), ("scgenept_x-shuffled", 0.9), ("scgenept_x", 0.7)])
    (tmp_path / "summary.csv").write_text(table + "scgpt,unseen_single,pearson_delta_top20,1\nscgpt,all,mse_all,2\n")
    ordered = [run.name for run in evaluation.best_first(runs, tmp_path / "summary.csv")]
    assert ordered == ["scgenept_x", "scgpt", "genept_x", "new", "scgenept_x-shuffled"]
    ordered = [run.name for run in evaluation.best_first(runs, tmp_path / "none.csv")]
    assert ordered == ["scgpt", "genept_x", "new", "scgenept_x", "scgenept_x-shuffled"]


@pytest.mark.parametrize("goal, message", [
    ("NOWHERE", "neither a condition of the dataset nor a file"),
    ("DEMO128", "neither a condition of the dataset nor a file"),
    ("ctrl", "no perturbation"),
    ("empty.h5ad", "an empty file")])
def test_a_wrong_goal_is_one_line_before_anything_is_predicted(root, goal, message):
    (root / "empty.h5ad").touch()
    folder = root / "results/demo/predicted/last"
    folder.mkdir(parents=True)
    (folder / "towards.csv").write_text("of an earlier call")
    error = error_of("05_eval.py", "--towards", root / goal if "." in goal else goal, "--run", "scgpt", root=root)
    assert message in error and goal in error
    assert [path.name for path in folder.iterdir()] == ["towards.csv"]


def test_a_goal_may_be_written_as_other_conditions_are(results, root):
    pair = results.data.genes[results.data.targets[results.data.targets[:, 1] >= 0][0]]
    done = run_script("05_eval.py", "--towards", "_".join(pair), "--run", "additive", "--predict", *pair, root=root)
    assert f"closest to {'_'.join(pair)}" in done.stdout


def test_what_predicts_the_same_for_all_is_not_ranked(root):
    done = run_script("05_eval.py", "--towards", "DEMO005", "--run", "ridge_go_c", "non-ctrl-mean", root=root)
    assert "non-ctrl-mean: not ranked, as it does not tell these perturbations apart" in done.stdout
    rows = read_csv(root / "results/demo/predicted/last/towards.csv")
    assert {row["model"] for row in rows} == {"ridge_go_c"}
    error = error_of("05_eval.py", "--towards", "DEMO005", "--run", "non-ctrl-mean", root=root)
    assert "no model tells these perturbations apart" in error


@pytest.mark.parametrize("words, message", [
    (["--predict", "list.txt"], "--predict list.txt: no perturbation in it"),
    (["--predict", "DEMO001", "--external", "X=x.h5ad"], "--external is for the evaluation")])
def test_a_call_that_asks_for_nothing_is_one_line(root, monkeypatch, words, message):
    monkeypatch.chdir(root)
    (root / "list.txt").write_text("# nothing yet\n")
    assert message in error_of("05_eval.py", *words, root=root)


def test_large_and_disputed_effects_have_priority(predicted):
    for row in predicted.ranked:
        same = [float(other["effect_rms"]) for other in predicted.ranked
                if other["condition"] == row["condition"]]
        assert float(row["priority"]) == pytest.approx(np.mean(same) * float(row["disagreement"]), rel=0.05)


def test_a_model_that_predicts_the_same_for_all_is_warned_of(results, root):
    net = model.load(results.root / "runs/demo/scgpt/seed42/model.pt")
    with torch.no_grad():
        net.pert_encoder.weight.zero_()  # it does not see what is perturbed
    model.save(net, root / "blind.pt")
    wanted = ("DEMO001", "DEMO002", "DEMO003+DEMO004")
    options = ("--run", root / "blind.pt", "--controls", 4)
    done = run_script("05_eval.py", "--predict", *wanted, *options, root=root)
    assert "blind, seed 0 predicts nearly the same change for all of these" in done.stderr
    ranked = read_csv(root / "results/demo/predicted/last/predicted.csv")
    assert max(float(row["interaction_rms"] or 0) for row in ranked) < 1e-6
    assert min(float(row["effect_rms"]) for row in ranked) > 1e-6


def language_model(n_language_rows):
    torch.manual_seed(0)
    return model.ScGenePT(model.Config(n_tokens=4, pad_id=3, d_model=8, n_heads=2, d_hid=8, n_layers=1,
                                       languages={"s": 5}, n_language_rows=n_language_rows)).eval()


def test_a_gene_that_the_dataset_lacks_joins_with_its_token_and_its_language_vector(evaluation, tmp_path):
    data = SimpleNamespace(genes=np.array(["A", "B"], dtype=object), token_ids=np.array([0, 1]), pad_id=3,
                           measured=np.ones(2, dtype=bool), mean=np.ones((1, 2)),
                           cell_condition=np.zeros(4), X=SimpleNamespace(shape=(4, 2)))
    evaluation.add_genes(data, ["A", "NEW"], {"A": 0, "B": 1, "NEW": 2, "<pad>": 3})
    assert data.genes.tolist() == ["A", "B", "NEW"] and data.token_ids.tolist() == [0, 1, 2]
    assert data.measured.tolist() == [True, True, False] and data.X.shape == (4, 3)

    vectors = np.random.default_rng(0).normal(size=(2, 5)).astype(np.float32)
    folder = tmp_path / "data/human/embeddings"
    folder.mkdir(parents=True)
    with h5py.File(folder / "s.lsa.concat.h5", "w") as file:
        file.create_dataset("genes", data=["NEW", "A"], dtype=h5py.string_dtype())
        file["vectors"] = vectors
    net = language_model(2)
    net.set_language([0, 1], {"s": np.ones((2, 5), dtype=np.float32)})
    before = model.predict(net, [0, 1], np.ones((1, 2)), 0)
    run = SimpleNamespace(name="scgenept_s", path="model.pt", config={"embeddings": {"s": "s.lsa.concat.h5"}})
    evaluation.add_language(net, run, data, SimpleNamespace(root=tmp_path, dataset="mine"))
    added = net.language_encoders["s"].embedding.weight[net.language_rows[2]].detach()
    np.testing.assert_array_equal(added, vectors[0])
    np.testing.assert_array_equal(model.predict(net, [0, 1], np.ones((1, 2)), 0), before)
    assert np.isfinite(model.predict(net, data.token_ids, np.ones((4, 3)), [0, 2])).all()


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
def cells(results, tmp_path_factory):
    """What --cells wrote for the held-out conditions and for --predict, read by anndata."""
    anndata = pytest.importorskip("anndata")
    root = tmp_path_factory.mktemp("cells")
    for name in ("data", "runs"):
        (root / name).symlink_to(results.root / name)
    options = ("--run", "scgpt", "--controls", 3, "--cells")
    run_script("05_eval.py", *options, root=root)
    run_script("05_eval.py", *options, "--predict", "DEMO001", "DEMO002+DEMO003", root=root)
    return lambda name: anndata.read_h5ad(root / "results/demo" / name)


def test_cells_of_a_model_and_the_measured_ones_are_a_pair_that_cell_eval_accepts(results, cells):
    predicted = cells("predictions/scgpt.seed42.cells.h5ad")
    measured = cells("predictions/measured.cells.h5ad")
    assert predicted.var_names.tolist() == measured.var_names.tolist() == results.data.genes.tolist()
    tested = results.data.conditions[results.data.split == "test"]
    assert set(predicted.obs["condition"]) == set(measured.obs["condition"]) == {"ctrl", *tested}
    assert predicted.obs_names.is_unique and measured.obs_names.is_unique
    assert predicted.X.min() == 0 and predicted.X.max() < 15 and measured.X.max() < 15


@pytest.mark.parametrize("name", ["predictions/scgpt.seed42.cells.h5ad", "predictions/measured.cells.h5ad",
                                  "predicted/last/predicted.cells.h5ad"])
def test_cells_name_their_target_genes(cells, name):
    obs = cells(name).obs
    assert "ctrl" in set(obs["target_gene"])
    for condition, genes in zip(obs["condition"], obs["target_gene"]):  # A+ctrl and ctrl+A: A
        assert genes == condition.replace("+ctrl", "").replace("ctrl+", "")


def test_cells_are_the_control_cells_as_measured_and_what_was_predicted_for_each(results, cells):
    predicted, measured, means = (cells(f"predictions/{name}.h5ad") for name in (
        "scgpt.seed42.cells", "measured.cells", "scgpt.seed42"))
    of_control = [table[table.obs["condition"] == "ctrl"] for table in (predicted, measured)]
    np.testing.assert_array_equal(of_control[0].X, of_control[1].X.toarray())
    for condition in means.obs["condition"].iloc[::9]:
        rows = predicted[predicted.obs["condition"] == condition].X
        high = rows.min(0) > 0  # where nothing was cut at 0
        assert len(rows) == 3 and high.sum() > 64
        np.testing.assert_allclose(rows.mean(0)[high], means[condition].X[0, high], rtol=1e-4)
        true = measured[measured.obs["condition"] == condition].X.toarray().mean(0)
        expected = results.data.mean[results.data.conditions.tolist().index(condition)]
        np.testing.assert_allclose(true, expected, rtol=1e-4, atol=1e-6)


def test_cells_of_chosen_perturbations_stand_below_their_controls_for_every_model(cells):
    predicted, means = cells("predicted/last/predicted.cells.h5ad"), cells("predicted/last/predicted.h5ad")
    counts = predicted.obs.groupby(["condition", "model", "seed"], observed=True).size()
    assert len(predicted) == 3 * 3 * 2 and set(counts) == {3}
    assert set(predicted.obs["condition"]) == {"ctrl", "DEMO001", "DEMO002+DEMO003"}
    ctrl = predicted[(predicted.obs["condition"] == "ctrl") & (predicted.obs["seed"] == 42)]
    np.testing.assert_allclose(ctrl.X.mean(0), means.layers["control"][0], rtol=1e-5)


def test_predictions_open_in_anndata_and_carry_what_they_were_made_from(results, cells, tmp_path):
    table = cells("predictions/scgpt.seed42.h5ad")
    assert table.shape == (46, 128) and table.X.dtype == np.float32
    assert {"condition", "subgroup", "model", "seed", "n_controls"} == set(table.obs)
    assert table.var_names[0] == "DEMO001" and table.obs_names[0] == table.obs["condition"].iloc[0]
    assert {"description", "control", "command", "date", "versions", "made_from"} == set(table.uns)
    assert "SYNTHETIC" in table.uns["description"] and "05_eval.py" in table.uns["command"]
    delta = table.X - results.data.mean[results.data.split == "ctrl"]
    np.testing.assert_allclose(table.layers["delta"], delta, atol=1e-6)
    table.write_h5ad(tmp_path / "again.h5ad")


# --- what a user sees

def test_the_table_has_a_row_a_model_and_a_column_a_subgroup(results):
    table = [line for line in results.output.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["model", "unseen single", "seen1", "seen2", "all"]
    assert cells[2] == ["(conditions)", "24", "16", "6", "46"]
    value = {row["model"]: float(row["mean"]) for row in results.summary
             if (row["subgroup"], row["metric"]) == ("all", "pearson_delta_top20")}
    best = max(value.keys() - {"scgpt", "scgenept_go_c", "data-ceiling"}, key=value.get)
    assert [row[0] for row in cells[3:]] == ["scgpt", "scgenept_go_c", "non-ctrl-mean", best]
    assert "SYNTHETIC" in results.output


@pytest.mark.parametrize("name", ["a", "scgenept_ncbi+uniprot+go_all-shuffled"])
def test_the_table_and_the_words_below_it_fit_80_columns(root, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "80")
    own = root / "runs/demo/scgpt/seed42/model.pt"
    done = run_script("05_eval.py", "--run", f"{name}={own}", "--controls", 2, root=root)
    start = done.stdout.index("Pearson Δ top 20: correlation")
    lines = done.stdout[start:done.stdout.index("report with all")].splitlines()
    assert max(map(len, lines)) <= 80 and any(line.startswith(f"| {name} ") for line in lines)


def test_the_demo_ends_with_commands_for_predict_and_for_own_cells(results):
    *_, predict, own = results.output.splitlines()
    assert predict.startswith("next: python 05_eval.py --predict DEMO")
    assert predict.endswith(f"--root {results.root}")
    assert own.startswith("next") and "python 03_prepare_data.py --dataset mine --h5ad FILE.h5ad" in own
    command = predict.removeprefix("next: python 05_eval.py ").split()
    done = run_script("05_eval.py", *command, "--run", "scgpt", "--controls", 1)
    assert "values and figures: " in done.stdout


def test_the_report_is_labelled_synthetic_and_marks_the_best(results):
    report = (results.folder / "report.md").read_text(encoding="utf-8")
    assert "**SYNTHETIC data**" in report
    column = {row["model"]: float(row["mean"]) for row in results.summary
              if (row["subgroup"], row["metric"]) == ("all", "mse_all") and row["model"] != "data-ceiling"}
    best = min(column, key=column.get)
    assert any(line.startswith(f"| {best} ") and "**0.0" in line for line in report.splitlines())
    for name in ("split.png", "subgroups.png", "scatter.png", "training.png"):
        assert f"({name})" in report and (results.folder / name).read_bytes().startswith(b"\x89PNG")


def test_every_baseline_and_the_ceiling_stand_in_the_report(results):
    lines = (results.folder / "report.md").read_text(encoding="utf-8").splitlines()
    for name in BASELINES:
        assert sum(line.startswith(f"| {name} ") for line in lines) >= 3, name


def outcome(**models):
    """What `verdict` takes, of {name: values of the conditions}; an underscore stands for a hyphen."""
    models = {name.replace("_", "-"): values for name, values in models.items()}
    rows = [(name, 1, condition, "", "pearson_delta_top20", value)
            for name, values in models.items() for condition, value in enumerate(values)]
    summary = {(name, "all", metric): (np.mean(values), 0.05, 3)
               for name, values in models.items() for metric in ("pearson_delta_top20", "mse_top20")}
    trained = [name for name in models if name not in ("non-ctrl-mean", "ridge")]
    return SimpleNamespace(rows=rows, summary=summary, names=list(models), models=trained, unranked={},
                           runs=[SimpleNamespace(name=name) for name in trained])


def test_the_verdict_compares_the_best_model_with_its_rivals(evaluation):
    text, table = evaluation.verdict(outcome(scgpt=[0.5, 0.5], lang=[0.9, 0.5], lang_shuffled=[0.69, 0.69],
                                             non_ctrl_mean=[0.6, 0.6], ridge=[0.95, 0.85]))
    assert "best model, lang (0.700 ± 0.050), beats the mean of the training perturbations (0.600" in text
    assert "not above ridge" in text and "One seed" not in text
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert {row[0]: row[3] for row in rows} == {
        "lang": "", "non-ctrl-mean": "1 of 2", "lang-shuffled": "1 of 2", "scgpt": "1 of 2",
        "ridge": "0 of 2"}


def test_a_model_below_the_mean_does_not_beat_it_and_a_shuffled_control_is_never_the_best(evaluation):
    text, _ = evaluation.verdict(outcome(scgpt=[0.5], lang=[0.4], lang_shuffled=[0.7], non_ctrl_mean=[0.6]))
    assert "the best model, scgpt (0.500 ± 0.050), does NOT beat the mean" in text


def test_the_papers_figures_stand_beside_ours(evaluation):
    norman, adamson = (evaluation.paper_rows(evaluation.PAPER, part) for part in (slice(0, 4), slice(4, 8)))
    assert norman["scgenept_go_all"] == ["0.698 ± 0.02", "0.554 ± 0.02", "0.209 ± 0.02", "0.00400 ± 0.00"]
    assert adamson["scgenept_go_all"] == ["0.787 ± 0.02", "0.605 ± 0.03", "0.127 ± 0.01", "0.00641 ± 0.00"]
    assert evaluation.paper_rows(evaluation.PAPER_BY_SUBGROUP)["GEARS"][0] == "0.448 ± 0.01"
    assert {len(cells) for cells in evaluation.paper_rows(evaluation.PAPER).values()} == {8}
    ours = {"ours": ["1", "2"]}
    table = evaluation.table_with_paper(["scgpt", "mine"], ours, adamson, ["a", "b", "c", "d"])
    assert table.splitlines()[2].split() == (
        "| scgpt | 1 | 0.782 ± 0.02 | 0.589 ± 0.03 | 0.135 ± 0.01 | 0.00672 ± 0.00 |".split())


def test_csv_and_markdown_stay_valid_whatever_a_label_holds(evaluation, tmp_path):
    row = ("a,b", 'say "x"', "line\nbreak", "pi|pe", "Ünïcode")
    evaluation.write_csv(tmp_path / "x.csv", ("1", "2", "3", "4", "5"), [row])
    text = (tmp_path / "x.csv").read_text(encoding="utf-8")
    assert list(csv.reader(io.StringIO(text, newline="")))[1] == list(row)
    table = evaluation.markdown_table(("1", "2"), [row[3:]])
    assert all(line.replace("\\|", "").count("|") == 3 for line in table.splitlines())
