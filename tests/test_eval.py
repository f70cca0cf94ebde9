"""05_eval.py: predictions, baselines, tables, figures and files, against plain loops and other readers."""
import csv
import json
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import scipy.stats

import model
from conftest import error_of, run_script


@pytest.fixture(scope="module")
def evaluation(stage):
    return stage("05_eval")


@pytest.fixture(scope="module")
def results(demo, stage):
    """What stage 05 made of the demo's four short runs: its output, the rows of its CSV files, data and folders."""
    done = run_script("05_eval.py", root=demo)
    folder = demo / "results/demo"
    read = lambda name: list(csv.DictReader((folder / name).open(newline="", encoding="utf-8")))
    return SimpleNamespace(root=demo, folder=folder, output=done.stdout, metrics=read("metrics.csv"), summary=read("summary.csv"),
                           data=stage("04_train").load_dataset(demo / "data/demo/dataset.h5", ""))


def value(results, model_name, seed, condition, metric):
    found = [float(row["value"]) for row in results.metrics
             if (row["model"], row["seed"], row["condition"], row["metric"]) == (model_name, str(seed), condition, metric)]
    assert len(found) == 1
    return found[0]


def predictions(results, name):
    with h5py.File(results.folder / "predictions" / name) as file:
        return dict(zip(file["obs/condition"].asstr()[:], file["X"][:]))


def test_a_prediction_is_the_mean_over_as_many_control_cells_as_the_condition_has(results, evaluation):
    data, net = results.data, model.load(results.root / "runs/demo/scgenept_go_c/seed23/model.pt")
    predicted = predictions(results, "scgenept_go_c.seed23.h5ad")
    tested = np.flatnonzero(data.split == "test")
    assert set(predicted) == set(data.conditions[tested])
    controls = evaluation.draw_controls(data, tested, None, 42)
    for condition, cells in list(zip(tested, controls))[::15]:
        assert len(cells) == (data.cell_condition == condition).sum() and np.isin(cells, data.ctrl_cells).all()
        targets = [t for t in data.targets[condition] if t >= 0]
        each = model.predict(net, data.token_ids, data.X[cells].toarray(), targets)
        np.testing.assert_allclose(predicted[data.conditions[condition]], each.mean(0), rtol=1e-4, atol=1e-5)


def test_scores_of_models_and_baselines_are_those_of_a_loop_with_scipy(results):
    data = results.data
    ctrl, trained = data.mean[data.split == "ctrl"][0], data.mean[data.split == "train"]
    profiles = {("scgpt", 42): predictions(results, "scgpt.seed42.h5ad"), ("non-ctrl-mean", ""): trained.astype(float).mean(0), ("no-change", ""): ctrl}
    for condition in np.flatnonzero(data.split == "test")[::9]:
        label, true, top = data.conditions[condition], data.mean[condition], data.de_idx[condition]
        for (name, seed), profile in profiles.items():
            p = profile[label] if isinstance(profile, dict) else profile
            assert value(results, name, seed, label, "mse_top20") == pytest.approx(np.mean((p - true)[top] ** 2), rel=1e-4)
            delta = scipy.stats.pearsonr(p - ctrl, true - ctrl)[0] if name != "no-change" else 0
            assert value(results, name, seed, label, "pearson_delta_all") == pytest.approx(delta, abs=1e-5)


def test_the_random_baseline_is_the_profile_of_one_training_perturbation_drawn_for_each_seed(results, evaluation):
    data, tested = results.data, np.flatnonzero(results.data.split == "test")
    draws = {seed: evaluation.baseline_means(data, tested, seed)["random"] for seed in (42, 23)}
    trained = {tuple(row) for row in data.mean[data.split == "train"]}
    assert all(tuple(row) in trained for draw in draws.values() for row in draw) and not np.array_equal(draws[42], draws[23])
    assert len({tuple(row) for row in draws[42]}) > 10
    assert {row["seed"] for row in results.metrics if row["model"] == "random"} == {"42", "23"}
    assert {row["seed"] for row in results.metrics if row["model"] == "no-change"} == {""}


def test_the_summary_is_mean_and_students_interval_over_the_seeds_means(results):
    for row in results.summary:
        seeds = {}
        for m in results.metrics:
            if (m["model"], m["metric"]) == (row["model"], row["metric"]) and row["subgroup"] in ("all", m["subgroup"]):
                seeds.setdefault(m["seed"], []).append(float(m["value"]))
        means = [np.mean(values) for values in seeds.values()]
        assert float(row["mean"]) == pytest.approx(np.mean(means)) and int(row["n_seeds"]) == len(means)
        if len(means) == 1:
            assert row["interval"] == ""
        else:
            low, high = scipy.stats.t.interval(0.95, len(means) - 1, np.mean(means), scipy.stats.sem(means))
            assert float(row["interval"]) == pytest.approx((high - low) / 2, rel=1e-4)
    assert {row["subgroup"] for row in results.summary} == {"all", *results.data.subgroup[results.data.split == "test"]}


def test_the_run_ends_with_a_table_by_subgroup_and_says_where_report_and_figure_lie(results):
    table = [line for line in results.output.splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in table[0].strip("|").split("|")]
    assert header[2:] == ["scgpt", "scgenept_go_c", "non-ctrl-mean", "random", "no-change"] and "SYNTHETIC" in header[0]
    assert [line.split("|")[1].strip() for line in table[2:]] == ["unseen_single", "combo_seen1", "combo_seen2", "all"]
    for name in ("report.md", "subgroups.png", "metrics.csv", "summary.csv"):
        assert str(results.folder / name) in results.output and (results.folder / name).stat().st_size > 100


def test_the_report_is_labelled_synthetic_and_marks_the_best(results):
    report = (results.folder / "report.md").read_text(encoding="utf-8")
    assert "**SYNTHETIC data**" in report and "![" in report
    column = {row["model"]: float(row["mean"]) for row in results.summary if (row["subgroup"], row["metric"]) == ("all", "mse_all")}
    best = min(column, key=column.get)
    line = next(line for line in report.splitlines() if line.startswith(f"| {best} "))
    assert f"**{column[best]:.3f}" in line
    assert (results.folder / "subgroups.png").read_bytes().startswith(b"\x89PNG")


def test_predictions_open_in_anndata(results):
    anndata = pytest.importorskip("anndata")
    table = anndata.read_h5ad(results.folder / "predictions/scgpt.seed42.h5ad")
    assert table.shape == (46, 128) and table.X.dtype == np.float32
    assert {"condition", "subgroup", "model", "seed", "n_controls"} <= set(table.obs) and set(table.obs["seed"]) == {42}
    assert table.var_names[0] == "DEMO001" and table.obs_names[0] == table.obs["condition"].iloc[0]
    assert "SYNTHETIC" in table.uns["description"]
    table.write_h5ad(results.root / "again.h5ad")


def test_predictions_are_used_again_until_their_run_or_the_options_change(results):
    before = (results.folder / "predictions/scgpt.seed42.h5ad").stat().st_mtime_ns
    done = run_script("05_eval.py", root=results.root)
    assert "there already" in done.stdout and (results.folder / "predictions/scgpt.seed42.h5ad").stat().st_mtime_ns == before


def test_unmeasured_genes_never_count(results, tmp_path):
    shutil.copytree(results.root / "data", tmp_path / "data")
    shutil.copytree(results.root / "runs", tmp_path / "runs")
    with h5py.File(tmp_path / "data/demo/dataset.h5", "a") as file:
        unmeasured = sorted(set(range(128)) - set(file["de_idx"][:].ravel()) - set(file["targets"][:].ravel()))[:3]
        for name, wrong in (("measured", False), ("mean", 1e6)):
            values = file[name][:]
            values[..., unmeasured] = wrong
            file[name][:] = values
    for path in (tmp_path / "runs").glob("demo/*/*/config.json"):  # as if they had been trained on this file
        config = json.loads(path.read_text())
        made = json.loads(config["made_from"])
        made["inputs"]["dataset.h5"] = __import__("hashlib").sha256((tmp_path / "data/demo/dataset.h5").read_bytes()).hexdigest()
        path.write_text(json.dumps(config | {"made_from": json.dumps(made)}))
    run_script("05_eval.py", "--run", "scgpt", "--controls", 5, root=tmp_path)
    with h5py.File(tmp_path / "results/demo/predictions/scgpt.seed42.h5ad") as file:
        assert file["X"].shape == (46, 125) and not set(file["var/gene_name"].asstr()[:]) & {f"DEMO{i + 1:03d}" for i in unmeasured}
    rows = list(csv.DictReader((tmp_path / "results/demo/metrics.csv").open(newline="")))
    assert max(float(row["value"]) for row in rows) < 100
    assert value(results, "no-change", "", rows[0]["condition"], "mse_top20") == pytest.approx(
        next(float(row["value"]) for row in rows if row["model"] == "no-change" and row["condition"] == rows[0]["condition"] and row["metric"] == "mse_top20"))


def test_runs_that_are_not_finished_or_of_other_data_are_named_and_left_out(results, tmp_path):
    (tmp_path / "data").symlink_to(results.root / "data")
    shutil.copytree(results.root / "runs", tmp_path / "runs")
    for run, old, new in (("scgpt/seed42", '"finished": true', '"finished": false'), ("scgpt/seed23", '\\"dataset.h5\\": \\"', '\\"dataset.h5\\": \\"0')):
        path = tmp_path / "runs/demo" / run / "config.json"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    done = run_script("05_eval.py", "--controls", 2, root=tmp_path)
    assert "seed42 is not finished" in done.stdout and "seed23 was trained on another" in done.stdout
    assert sorted(path.name for path in (tmp_path / "results/demo/predictions").iterdir()) == ["scgenept_go_c.seed23.h5ad", "scgenept_go_c.seed42.h5ad"]


@pytest.mark.parametrize("args, message", [(["--run", "scgtp"], "--run scgtp: not found"), (["--controls", "0"], "--controls"),
                                           (["--dataset", "mine"], "run first: python 03_prepare_data.py --dataset mine")])
def test_bad_options_are_one_line(demo, args, message):
    assert message in error_of("05_eval.py", *args, root=demo)


def test_without_a_run_the_next_command_is_named(demo, tmp_path):
    (tmp_path / "data").symlink_to(demo / "data")
    assert "run first: python 04_train.py" in error_of("05_eval.py", root=tmp_path)


def test_a_broken_model_file_is_named(results, tmp_path):
    (tmp_path / "data").symlink_to(results.root / "data")
    shutil.copytree(results.root / "runs", tmp_path / "runs")
    (tmp_path / "runs/demo/scgpt/seed42/model.pt").write_bytes(b"no model")
    assert "model.pt: not a readable torch file" in error_of("05_eval.py", "--run", "scgpt", root=tmp_path)


def test_csv_and_markdown_stay_valid_whatever_a_label_holds(evaluation):
    rows = [("a,b", 'say "x"', "line\nbreak", "pi|pe", "Ünïcode")]
    header = ("1", "2", "3", "4", "5")
    assert list(csv.reader(evaluation.csv_text(header, rows).splitlines(keepends=True)))[1] == list(rows[0])
    assert all(line.replace("\\|", "").count("|") == 6 for line in evaluation.markdown_table(header, [[*rows[0][:2], "x", *rows[0][3:]]]).splitlines())
