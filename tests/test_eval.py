"""05_eval.py: predictions, baselines, tables, figures and files, against plain loops and other readers."""
import csv
import hashlib
import io
import json
import shutil
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import scipy.stats
import torch
from scipy import sparse

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


def test_the_random_baseline_is_the_profile_of_one_training_perturbation_drawn_ten_times(results, evaluation):
    data, tested = results.data, np.flatnonzero(results.data.split == "test")
    draws = {seed: evaluation.random_means(data, tested, seed) for seed in (42, 23)}
    trained = {tuple(row) for row in data.mean[data.split == "train"]}
    assert all(tuple(row) in trained for draw in draws.values() for row in draw) and not np.array_equal(draws[42], draws[23])
    assert len({tuple(row) for row in draws[42]}) > 10
    assert {row["seed"] for row in results.metrics if row["model"] == "random"} == {str(draw) for draw in range(10)}
    assert {row["seed"] for row in results.metrics if row["model"] == "no-change"} == {""}


def small_screen(seed=0):
    """Means of control, A, B (as A+ctrl and ctrl+A), C, A+B, A+D, D over 15 genes; D, A+B and A+D are tested."""
    rng = np.random.default_rng(seed)
    conditions = np.array(["ctrl", "A+ctrl", "ctrl+A", "B+ctrl", "C+ctrl", "A+B", "A+D", "D+ctrl", "E+ctrl"], dtype=object)
    targets = np.array([[-1, -1], [0, -1], [0, -1], [1, -1], [2, -1], [0, 1], [0, 3], [3, -1], [4, -1]])
    split = np.array(["ctrl", "train", "train", "train", "train", "test", "test", "test", "val"], dtype=object)
    cell_condition = np.repeat(np.arange(9), [9, 2, 6, 4, 4, 3, 3, 1, 3])
    X = rng.random((len(cell_condition), 15))
    mean = np.stack([X[cell_condition == c].mean(0) for c in range(9)])
    return SimpleNamespace(conditions=conditions, targets=targets, split=split, cell_condition=cell_condition, mean=mean,
                           genes=np.array(list("ABCDEFGHIJKLMNO"), dtype=object), X=sparse.csr_matrix(X))


def test_matching_mean_and_additive_take_the_parts_trained_profiles(evaluation):
    data = small_screen()
    means = evaluation.baseline_means(data, [5, 6, 7])
    ctrl, A, B = data.mean[0], (2 * data.mean[1] + 6 * data.mean[2]) / 8, data.mean[3]  # A's two labels by their cells
    non_ctrl = data.mean[1:5].mean(0)
    np.testing.assert_allclose(means["matching-mean"], [(A + B) / 2, (A + non_ctrl) / 2, non_ctrl])
    np.testing.assert_allclose(means["additive"], [A + B - ctrl, A, ctrl])


@pytest.mark.parametrize("width, known", [(2, "ABCDE"), (40, "ABCDE"), (2, "ABCE")])
def test_the_ridge_baseline_is_the_closed_form_with_the_penalty_that_validation_chooses(evaluation, tmp_path, width, known):
    data = small_screen()
    rng = np.random.default_rng(1)
    vectors = {gene: rng.normal(size=width).astype(np.float32) for gene in known}
    with h5py.File(tmp_path / "s.h5", "w") as file:
        file.create_dataset("genes", data=list(vectors), dtype=h5py.string_dtype())
        file["vectors"] = np.stack(list(vectors.values()))
    mean = np.mean([vectors[gene] for gene in "ABC"], axis=0, dtype=float)  # of the training targets, for one without a vector
    x = np.stack([sum((vectors.get("ABCDE"[t], mean) for t in targets if t >= 0), np.zeros(width)) for targets in data.targets])
    train, val, test = [1, 2, 3, 4], [8], [5, 6, 7]
    design = np.column_stack([x, np.ones(len(x))])
    best = None
    centred = x[train] - x[train].mean(0)
    for penalty in evaluation.RIDGE_PENALTIES * np.trace(centred @ centred.T) / len(train):
        P = penalty * np.eye(width + 1)
        P[-1, -1] = 0  # the intercept is not penalized
        weights = np.linalg.solve(design[train].T @ design[train] + P, design[train].T @ data.mean[train])
        error = ((design[val] @ weights - data.mean[val]) ** 2).mean()
        if best is None or error < best[0]:
            best = error, design[test] @ weights
    np.testing.assert_allclose(evaluation.ridge_means(data, test, tmp_path / "s.h5"), best[1], rtol=1e-6, atol=1e-8)


def test_the_ceiling_of_noiseless_cells_is_one_and_a_single_cell_has_none(evaluation):
    data = small_screen()
    data.X = sparse.csr_matrix(data.mean[data.cell_condition])
    one, other = evaluation.halves(data, [5, 6, 7], draw=1)
    np.testing.assert_allclose(one[:2], other[:2])
    np.testing.assert_allclose(one[:2], data.mean[[5, 6]])
    assert np.isnan(one[2]).all()


def test_the_halves_of_the_ceiling_are_all_cells_of_a_condition_once(evaluation):
    data = small_screen()
    one, other = evaluation.halves(data, [5, 1], draw=3)  # 3 and 2 cells
    np.testing.assert_allclose((2 * one[0] + other[0]) / 3, data.mean[5])
    np.testing.assert_allclose((one[1] + other[1]) / 2, data.mean[1])


def verdict_of(evaluation, **models):
    """The verdict on {name: (mean over seeds, half width, number of seeds, values of the conditions)}; an underscore for a hyphen."""
    models = {name.replace("_", "-"): values for name, values in models.items()}
    rows = [(name, 1, condition, "", "pearson_delta_top20", value) for name, (*_, values) in models.items() for condition, value in enumerate(values)]
    summary = {(name, "all", metric): (mean, half, n) for name, (mean, half, n, _) in models.items() for metric in ("pearson_delta_top20", "mse_top20")}
    baselines = [name for name in models if name in ("non-ctrl-mean", "ridge")]
    return evaluation.verdict(rows, summary, [name for name in models if name not in baselines], baselines)


def test_the_verdict_says_whether_the_best_model_beats_the_mean_its_control_and_the_best_baseline(evaluation):
    words = verdict_of(evaluation, scgpt=(0.5, 0.1, 3, [0.5, 0.5]), lang=(0.7, 0.05, 3, [0.9, 0.5]), lang_shuffled=(0.69, 0.1, 3, [0.69, 0.69]),
                       non_ctrl_mean=(0.6, np.nan, 1, [0.6, 0.6]), ridge=(0.9, np.nan, 1, [0.95, 0.85]))
    assert ("the best trained model, lang (0.700 ± 0.050), beats the mean of the training perturbations, non-ctrl-mean (0.600; beaten in 1 of 2 conditions, "
            "beyond the intervals over seeds)") in words
    assert "above lang-shuffled (0.690 ± 0.100; beaten in 1 of 2 conditions, within the intervals" in words and "not above ridge (0.900; beaten in 0 of 2" in words
    assert "(lower is better): lang 0.700 ± 0.050, non-ctrl-mean 0.600." in words and "one seed" not in words


def test_a_model_below_the_mean_does_not_beat_it_and_a_shuffled_control_is_never_the_best(evaluation):
    words = verdict_of(evaluation, scgpt=(0.5, 0.1, 3, [0.5]), lang=(0.4, 0.05, 3, [0.4]), lang_shuffled=(0.7, 0.1, 3, [0.7]), non_ctrl_mean=(0.6, np.nan, 1, [0.6]))
    assert "the best trained model, scgpt (0.500 ± 0.100), does NOT beat the mean of the training perturbations" in words
    assert "lang (0.400 ± 0.050) is not above lang-shuffled (0.700 ± 0.100; beaten in 0 of 1 conditions, beyond the intervals over seeds)" in words


def test_intervals_are_spoken_of_only_where_both_have_seeds(evaluation):
    words = verdict_of(evaluation, scgpt=(0.5, np.nan, 1, [0.5]), lang=(0.7, 0.05, 3, [0.7]), non_ctrl_mean=(0.6, np.nan, 1, [0.6]))
    assert "above scgpt (0.500; beaten in 1 of 1 conditions)" in words and "Models of one seed have no interval" in words


def test_runs_of_one_name_with_different_options_are_no_seeds(evaluation):
    runs = [SimpleNamespace(name=name, options=options) for name, options in (("a", {"lr": 1, "epochs": 2}), ("a", {"lr": 1, "epochs": 3}), ("b", {"lr": 1}), ("b", {"lr": 1}))]
    assert evaluation.unlike(runs) == " The runs of a differ in epochs (2, 3): they are not seeds of one model."


def test_every_baseline_and_the_ceiling_stand_in_the_report(results):
    report = (results.folder / "report.md").read_text(encoding="utf-8")
    for name in ("matching-mean", "additive", "random", "no-change", "ridge_go_c", "ridge_ncbi+uniprot", "data-ceiling"):
        assert report.count(f"| {name} ") == 3, name


def test_the_papers_figures_stand_beside_ours_for_norman_only(evaluation):
    table = evaluation.paper_rows(evaluation.PAPER["norman"])
    assert table["scgenept_go_all"] == ["0.698 ± 0.02", "0.554 ± 0.02", "0.209 ± 0.02", "0.00400 ± 0.00"]
    assert evaluation.paper_rows(evaluation.PAPER_BY_SUBGROUP)["GEARS"][0] == "0.448 ± 0.01" and "demo" not in evaluation.PAPER
    assert all(len(cells) == 4 for text in (*evaluation.PAPER.values(), evaluation.PAPER_BY_SUBGROUP) for cells in evaluation.paper_rows(text).values())


def test_embedders_and_modes_are_compared_as_far_as_runs_exist(evaluation):
    def run(name, file):
        return SimpleNamespace(name=name, embeddings={"go_c": file} if file else {})
    runs = [run("scgpt", None), run("v", "go_c.published.concat.h5"), run("v,embedder=m.1", "go_c.m.1.concat.h5"), run("v,mode=avg", "go_c.published.avg.h5"),
            run("w", "go_c.published.concat.h5")]
    summary = {(r.name, "all", metric): (0.5 + i, np.nan, 1) for i, r in enumerate(runs) for metric in evaluation.METRICS}
    text = "\n".join(evaluation.tables_by_embedding(summary, runs))
    assert text.count("## By embedder") == text.count("## Concatenated against averaged") == 4
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| v ")]
    assert rows[0] == ["v", "2.500", "1.500"] and rows[4] == ["v", "3.500", "1.500"] and "| w " not in text


# --- other models

def as_released(net, path):
    """Write a network of this kit under the keys of a released scGenePT file with GO-C vectors."""
    names = {"language_encoders.go_c.": "gopt_encoder_c.", ".proj.": ".fc."}
    state = {}
    for key, value in net.state_dict().items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        if key != "language_rows":
            state[key] = value.double() if "gopt_encoder_c.embedding" in key else value
    torch.save(state, path)


def test_a_released_file_and_a_copied_own_file_evaluate_like_runs(results, tmp_path):
    torch.manual_seed(0)
    config = model.Config(n_tokens=129, pad_id=126, d_model=32, n_heads=8, d_hid=16, n_layers=1, languages={"go_c": 6}, n_language_rows=129)
    net = model.ScGenePT(config).eval()
    net.language_rows.copy_(torch.arange(129))
    as_released(net, tmp_path / "best_model_seed_42.pt")
    shutil.copy(results.root / "runs/demo/scgpt/seed42/model.pt", tmp_path / "mine.pt")
    (tmp_path / "data").symlink_to(results.root / "data")
    run_script("05_eval.py", "--run", f"released={tmp_path / 'best_model_seed_42.pt'}", tmp_path / "mine.pt", "--controls", 3, root=tmp_path)
    rows = list(csv.DictReader((tmp_path / "results/demo/metrics.csv").open(newline="")))
    assert {(row["model"], row["seed"]) for row in rows} >= {("released", "42"), ("mine", "0")}
    with h5py.File(tmp_path / "results/demo/predictions/released.seed42.h5ad") as file:
        assert file["X"].shape == (46, 128)


def test_a_model_of_another_vocabulary_is_refused(results, tmp_path):
    model.save(model.ScGenePT(model.Config(n_tokens=50, pad_id=47, d_model=8, n_heads=2, d_hid=8, n_layers=1)), tmp_path / "other.pt")
    (tmp_path / "data").symlink_to(results.root / "data")
    error = error_of("05_eval.py", "--run", tmp_path / "other.pt", root=tmp_path)
    assert "other.pt: has a vocabulary of 50 genes, the dataset one of 129" in error


@pytest.mark.parametrize("options", [["--run", "random={0}"], ["--run", "ridge_go_c={0}"], ["--run", "x={0}", "x={0}"],
                                     ["--run", "x={0}", "x={0}", "--predict", "DEMO001"], ["--external", "scgpt={1}"]])
def test_two_models_of_one_name_are_an_error(results, tmp_path, options):
    data = results.data
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["X"] = data.mean
        for table, column, values in (("obs", "condition", data.conditions), ("var", "gene_name", data.genes)):
            file.create_group(table).attrs["_index"] = column
            file[table].create_dataset(column, data=values, dtype=h5py.string_dtype())
    (tmp_path / "data").symlink_to(results.root / "data")
    (tmp_path / "runs").symlink_to(results.root / "runs")
    own = results.root / "runs/demo/scgpt/seed42/model.pt"
    assert "two models are called" in error_of("05_eval.py", *(word.format(own, tmp_path / "other.h5ad") for word in options), root=tmp_path)


@pytest.mark.parametrize("per_cell, left_out", [(True, ""), (False, ""), (False, "combo_seen2")])
def test_another_methods_predictions_get_the_same_rows_as_far_as_it_has_the_conditions(results, tmp_path, per_cell, left_out):
    data = results.data
    tested = np.flatnonzero((data.split == "test") & (data.subgroup != (left_out or None)))
    order = np.random.default_rng(0).permutation(128)
    rows = np.repeat(tested, 2 if per_cell else 1)
    noise = np.tile([[0.5], [-0.5]], (len(tested), 1)) if per_cell else 0  # cancels in the mean of a condition's cells
    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["X"] = (data.mean[rows].astype(float) + noise)[:, order]
        for table, column, values in (("obs", "condition", data.conditions[rows]), ("var", "gene_name", data.genes[order])):
            file.create_group(table).attrs["_index"] = column
            file[table].create_dataset(column, data=values, dtype=h5py.string_dtype())
    (tmp_path / "data").symlink_to(results.root / "data")
    (tmp_path / "runs").symlink_to(results.root / "runs")
    done = run_script("05_eval.py", "--run", "scgpt", "--controls", 2, "--external", f"oracle={tmp_path / 'other.h5ad'}", root=tmp_path)
    assert (f"The figures of oracle are means over {len(tested)} of these conditions" in done.stdout) == bool(left_out)
    found = [row for row in csv.DictReader((tmp_path / "results/demo/metrics.csv").open(newline="")) if row["model"] == "oracle"]
    assert {row["condition"] for row in found} == set(data.conditions[tested])
    for row in found:
        assert float(row["value"]) == pytest.approx(0 if row["metric"].startswith("mse") else 1, abs=1e-5)


def test_of_a_symbol_that_stands_twice_each_gene_gets_its_own_prediction(evaluation, tmp_path):
    data = SimpleNamespace(genes=np.array(["A", "B", "A"], dtype=object), measured=np.ones(3, dtype=bool), conditions=np.array(["x"], dtype=object))
    for names in (["B", "A", "A"], ["B", "A", "A-1"]):  # as they are, and as anndata makes them unique
        with h5py.File(tmp_path / "other.h5ad", "w") as file:
            file["X"] = np.array([[2.0, 1.0, 3.0]])
            for table, column, values in (("obs", "condition", ["x"]), ("var", "gene_name", names)):
                file.create_group(table).attrs["_index"] = column
                file[table].create_dataset(column, data=values, dtype=h5py.string_dtype())
        assert evaluation.read_external(f"other={tmp_path / 'other.h5ad'}", data, np.array([0]))[1].tolist() == [[1, 2, 3]]


# --- single perturbations

@pytest.fixture(scope="module")
def predicted(results, tmp_path_factory):
    """What --predict made of a measured single, a pair that was not measured, and a file of perturbations: its folder and rows."""
    root = tmp_path_factory.mktemp("predict")
    for name in ("data", "runs"):
        (root / name).symlink_to(results.root / name)
    (root / "list.txt").write_text("DEMO010\n\nDEMO004+DEMO005\n")
    done = run_script("05_eval.py", "--predict", "DEMO001", "DEMO002+DEMO003", root / "list.txt", "--controls", 7, root=root)
    folder = root / "results/demo"
    return SimpleNamespace(folder=folder, output=done.stdout, genes=list(csv.DictReader((folder / "predicted_genes.csv").open(newline=""))),
                           ranked=list(csv.DictReader((folder / "predicted.csv").open(newline=""))))


def change(results, name, seed, genes):
    """Mean predicted change of the seven control cells, by the model file itself."""
    data = results.data
    control = data.X[np.random.default_rng([42, 7]).choice(data.ctrl_cells, 7)].toarray()
    net = model.load(results.root / f"runs/demo/{name}/seed{seed}/model.pt")
    return (model.predict(net, data.token_ids, control, [data.genes.tolist().index(gene) for gene in genes]) - control).mean(0)


def test_predicted_changes_are_means_over_cells_and_intervals_over_seeds(results, predicted):
    rows = [row for row in predicted.genes if (row["condition"], row["model"]) == ("DEMO002+DEMO003", "scgpt")]
    both = np.stack([change(results, "scgpt", seed, ["DEMO002", "DEMO003"]) for seed in (42, 23)])
    assert [row["gene"] for row in rows] == results.data.genes[np.argsort(-np.abs(both.mean(0)), kind="stable")[:20]].tolist()
    for row in rows:
        values = both[:, results.data.genes.tolist().index(row["gene"])]
        assert float(row["delta"]) == pytest.approx(values.mean(), abs=1e-5)
        assert float(row["interval"]) == pytest.approx(12.7062 * abs(values[0] - values[1]) / 2, abs=1e-4)
        assert float(row["predicted"]) - float(row["control"]) == pytest.approx(float(row["delta"]), abs=1e-6) and row["measured_delta"] == ""


def test_a_measured_perturbation_shows_the_measured_change_beside_it(results, predicted):
    data = results.data
    condition = data.conditions.tolist().index("DEMO001+ctrl")
    for row in (row for row in predicted.genes if row["condition"] == "DEMO001"):
        gene = data.genes.tolist().index(row["gene"])
        assert float(row["measured_delta"]) == pytest.approx(float(data.mean[condition, gene] - data.mean[data.split == "ctrl"][0][gene]), abs=1e-5)


def test_perturbations_are_ranked_by_their_effect_and_pairs_by_their_distance_from_the_sum_of_singles(results, predicted):
    sizes = [float(row["effect_rms"]) for row in predicted.ranked]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) == 4 * 2
    for row in predicted.ranked:
        genes = row["condition"].split("+")
        deltas = [change(results, row["model"], seed, genes) for seed in (42, 23)]
        assert float(row["effect_rms"]) == pytest.approx(np.mean([np.sqrt((d ** 2).mean()) for d in deltas]), rel=1e-4)
        if len(genes) == 2:
            nothing = [change(results, row["model"], seed, []) for seed in (42, 23)]
            apart = [d + n - sum(change(results, row["model"], seed, [gene]) for gene in genes) for d, n, seed in zip(deltas, nothing, (42, 23))]
            assert float(row["interaction_rms"]) == pytest.approx(np.mean([np.sqrt((a ** 2).mean()) for a in apart]), rel=1e-3)
        else:
            assert row["interaction_rms"] == ""


def test_predictions_of_perturbations_open_in_anndata_with_control_and_delta(predicted):
    anndata = pytest.importorskip("anndata")
    table = anndata.read_h5ad(predicted.folder / "predicted.h5ad")
    assert table.shape == (4 * 4, 128) and {"condition", "model", "seed"} == set(table.obs) and "gene_name" in table.var
    np.testing.assert_allclose(table.layers["control"] + table.layers["delta"], table.X, rtol=1e-5)
    assert table.obs_names.is_unique and "05_eval.py" in table.uns["command"]


def test_a_model_that_predicts_the_same_for_all_is_warned_of(results, tmp_path):
    net = model.load(results.root / "runs/demo/scgpt/seed42/model.pt")
    with torch.no_grad():
        net.pert_encoder.weight.zero_()  # it does not see what is perturbed
    model.save(net, tmp_path / "blind.pt")
    (tmp_path / "data").symlink_to(results.root / "data")
    done = run_script("05_eval.py", "--run", tmp_path / "blind.pt", "--predict", "DEMO001", "DEMO002", "DEMO003+DEMO004", "--controls", 4, root=tmp_path)
    assert "warning: blind predicts nearly the same change for all of these (median correlation 1.000)" in done.stderr
    ranked = list(csv.DictReader((tmp_path / "results/demo/predicted.csv").open(newline="")))
    assert max(float(row["interaction_rms"] or 0) for row in ranked) < 1e-6 < min(float(row["effect_rms"]) for row in ranked)


def test_every_perturbation_has_a_figure_as_long_as_they_are_few(predicted):
    assert {path.name for path in predicted.folder.glob("*.png")} == {f"predicted_{label}.png" for label in
                                                                       ("DEMO001", "DEMO002+DEMO003", "DEMO010", "DEMO004+DEMO005")}


def test_all_singles_are_all_genes_of_the_dataset(results, tmp_path):
    for name in ("data", "runs"):
        (tmp_path / name).symlink_to(results.root / name)
    done = run_script("05_eval.py", "--predict", "all-singles", "--run", "scgpt", "--controls", 1, root=tmp_path)
    rows = list(csv.DictReader((tmp_path / "results/demo/predicted.csv").open(newline="")))
    assert {row["condition"] for row in rows} == set(results.data.genes) and "none for more than 12" in done.stdout


def test_a_gene_with_a_plus_in_its_name_is_one_gene(evaluation):
    data = SimpleNamespace(genes=np.array(["A", "B", "A+B"]), vocab="own genes", control="ctrl", pad_id=3, token_ids=np.arange(3),
                           conditions=np.array(["ctrl"]), targets=np.array([[-1]]))
    assert evaluation.read_perturbations(["A+B", "B+A"], data, None) == ({"A+B": ["A+B"], "B+A": ["B", "A"]}, [])


def test_predicting_an_unknown_gene_names_it_and_what_comes_near(results):
    assert "'DMEO001' is no gene of the dataset or its vocabulary; did you mean DEMO001" in error_of("05_eval.py", "--predict", "DMEO001", root=results.root)
    assert "did you mean DEMO001" in error_of("05_eval.py", "--predict", "demo001", root=results.root)


@pytest.mark.parametrize("label", ["DEMO001+DEMO001", "DEMO001+", "ctrl"])
def test_a_perturbation_is_of_different_genes(results, label):
    assert f"--predict '{label}': expected a gene, or different genes joined by +" in error_of("05_eval.py", "--predict", label, root=results.root)


def test_a_condition_of_the_dataset_is_predicted_under_its_own_name(results, evaluation):
    data = results.data
    pair = next(label for label, targets in zip(data.conditions, data.targets) if (targets >= 0).sum() == 2)
    genes_of, _ = evaluation.read_perturbations(["DEMO001+ctrl", pair], data, None)
    assert genes_of == {"DEMO001+ctrl": ["DEMO001"], pair: pair.split("+")}


# --- cell by cell

@pytest.fixture(scope="module")
def cells(results, tmp_path_factory):
    """Folders with what --cells wrote for the held-out conditions and for --predict, read by anndata."""
    anndata = pytest.importorskip("anndata")
    root = tmp_path_factory.mktemp("cells")
    for name in ("data", "runs"):
        (root / name).symlink_to(results.root / name)
    run_script("05_eval.py", "--run", "scgpt", "--controls", 3, "--cells", root=root)
    run_script("05_eval.py", "--run", "scgpt", "--controls", 3, "--cells", "--predict", "DEMO001+ctrl", "DEMO002+DEMO003", root=root)
    return lambda name: anndata.read_h5ad(root / "results/demo" / name)


def test_cells_of_a_model_and_the_measured_ones_are_a_pair_that_cell_eval_accepts(results, cells):
    predicted, measured = cells("predictions/scgpt.seed42.cells.h5ad"), cells("predictions/measured.cells.h5ad")
    assert predicted.var_names.equals(measured.var_names) and predicted.var_names.tolist() == results.data.genes.tolist()
    assert set(predicted.obs["condition"]) == set(measured.obs["condition"]) == {"ctrl", *results.data.conditions[results.data.split == "test"]}
    assert predicted.obs_names.is_unique and measured.obs_names.is_unique
    assert predicted.X.min() == 0 and predicted.X.max() < 15 and measured.X.max() < 15


def test_cells_are_the_control_cells_as_measured_and_what_was_predicted_for_each(results, cells):
    predicted, measured, means = (cells(f"predictions/{name}.h5ad") for name in ("scgpt.seed42.cells", "measured.cells", "scgpt.seed42"))
    np.testing.assert_array_equal(predicted[predicted.obs["condition"] == "ctrl"].X, measured[measured.obs["condition"] == "ctrl"].X.toarray())
    for condition in means.obs["condition"][::9]:
        rows = predicted[predicted.obs["condition"] == condition].X
        high = rows.min(0) > 0  # where nothing was cut at 0
        assert len(rows) == 3 and high.sum() > 64
        np.testing.assert_allclose(rows.mean(0)[high], means[condition].X[0, high], rtol=1e-4)
        true = measured[measured.obs["condition"] == condition].X.toarray().mean(0)
        np.testing.assert_allclose(true, results.data.mean[results.data.conditions.tolist().index(condition)], rtol=1e-4, atol=1e-6)


def test_cells_of_chosen_perturbations_stand_beside_their_controls_for_every_model(cells):
    predicted, means = cells("predicted.cells.h5ad"), cells("predicted.h5ad")
    counts = predicted.obs.groupby(["condition", "model", "seed"], observed=True).size()
    assert len(predicted) == 3 * 3 * 2 and set(counts) == {3} and set(predicted.obs["condition"]) == {"ctrl", "DEMO001+ctrl", "DEMO002+DEMO003"}
    ctrl = predicted[(predicted.obs["condition"] == "ctrl") & (predicted.obs["seed"] == 42)]
    np.testing.assert_allclose(ctrl.X.mean(0), means.layers["control"][0], rtol=1e-5)


def test_a_symbol_that_stands_twice_gets_a_name_of_its_own_in_the_index(evaluation, tmp_path):
    anndata = pytest.importorskip("anndata")
    evaluation.write_h5ad(tmp_path / "x.h5ad", "{}", np.eye(2, 3), {"condition": ["A", "B"]}, ["A", "B", "A"], "", SimpleNamespace(synthetic=False, control="NT"))
    table = anndata.read_h5ad(tmp_path / "x.h5ad")
    assert table.var_names.tolist() == ["A", "B", "A-1"] and table.var["gene_name"].tolist() == ["A", "B", "A"]


def test_files_for_anndata_carry_what_they_were_made_from(results, cells):
    table = cells("predictions/scgpt.seed42.h5ad")
    assert {"description", "control", "command", "date", "versions", "made_from"} == set(table.uns) and "SYNTHETIC" in table.uns["description"]
    np.testing.assert_allclose(table.layers["delta"], table.X - results.data.mean[results.data.split == "ctrl"], atol=1e-6)


def test_a_target_that_the_dataset_lacks_joins_with_its_token_and_its_language_vector(results, evaluation, tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "vocab.json").write_text(json.dumps({"A": 0, "B": 1, "NEW": 2, "<pad>": 3}))
    with h5py.File(tmp_path / "s.lsa.concat.h5", "w") as file:
        file.create_dataset("genes", data=["NEW", "A"], dtype=h5py.string_dtype())
        file["vectors"] = rng.normal(size=(2, 5)).astype(np.float32)
        vector = file["vectors"][0]
    vocab_fingerprint = hashlib.sha256((tmp_path / "vocab.json").read_bytes()).hexdigest()
    data = SimpleNamespace(genes=np.array(["A", "B"], dtype=object), token_ids=np.array([0, 1]), measured=np.ones(2, dtype=bool), pad_id=3,
                           mean=np.ones((1, 2)), X=sparse.csr_matrix(np.ones((4, 2))), vocab=vocab_fingerprint, control="ctrl",
                           conditions=["ctrl"], targets=np.array([[-1]]))
    genes_of, new = evaluation.read_perturbations(["A+NEW"], data, tmp_path / "vocab.json")
    assert (genes_of, new) == ({"A+NEW": ["A", "NEW"]}, ["NEW"]) and data.token_ids.tolist() == [0, 1, 2] and data.measured.tolist() == [True, True, False]
    torch.manual_seed(0)
    net = model.ScGenePT(model.Config(n_tokens=4, pad_id=3, d_model=8, n_heads=2, d_hid=8, n_layers=1, languages={"s": 5}, n_language_rows=2)).eval()
    net.set_language([0, 1], {"s": rng.normal(size=(2, 5)).astype(np.float32)})
    before = model.predict(net, [0, 1], np.ones((1, 2)), 0)
    evaluation.add_language(net, SimpleNamespace(name="scgenept_s", embeddings={"s": "s.lsa.concat.h5"}), data, new, tmp_path)
    np.testing.assert_array_equal(net.language_encoders["s"].embedding.weight[net.language_rows[2]].detach(), vector)
    np.testing.assert_array_equal(model.predict(net, [0, 1], np.ones((1, 2)), 0), before)
    assert np.isfinite(model.predict(net, data.token_ids, data.X.toarray(), [0, 2])).all()


def test_a_model_file_needs_no_embeddings_for_genes_that_it_has_and_names_those_that_it_lacks(evaluation):
    data, run = SimpleNamespace(token_ids=np.array([0, 1, 2])), SimpleNamespace(name="released", path="released.pt", embeddings={})
    net = model.ScGenePT(model.Config(n_tokens=4, pad_id=3, d_model=8, n_heads=2, d_hid=8, n_layers=1, languages={"s": 5}, n_language_rows=4))
    net.language_rows.copy_(torch.arange(4))
    evaluation.add_language(net, run, data, ["NEW"], None)
    assert net.config.n_language_rows == 4
    net.language_rows[2] = -1
    with pytest.raises(SystemExit, match="released.pt has no language vector for NEW"):
        evaluation.add_language(net, run, data, ["NEW"], None)


# --- tables

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
            half_width = scipy.stats.t.ppf(0.975, len(means) - 1) * scipy.stats.sem(means)
            assert float(row["interval"]) == pytest.approx(half_width, rel=1e-4)
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
    column = {row["model"]: float(row["mean"]) for row in results.summary if (row["subgroup"], row["metric"]) == ("all", "mse_all")
              and row["model"] != "data-ceiling"}
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
        made["inputs"]["dataset.h5"] = hashlib.sha256((tmp_path / "data/demo/dataset.h5").read_bytes()).hexdigest()
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
    assert "seed42 is not finished" in done.stdout and "dataset.h5 changed since it was trained" in done.stdout
    assert sorted(path.name for path in (tmp_path / "results/demo/predictions").iterdir()) == ["scgenept_go_c.seed23.h5ad", "scgenept_go_c.seed42.h5ad"]


def test_a_run_goes_by_the_name_of_its_folder(results, tmp_path):
    (tmp_path / "data").symlink_to(results.root / "data")
    shutil.copytree(results.root / "runs/demo/scgpt", tmp_path / "runs/demo/scgpt_before")
    run_script("05_eval.py", "--controls", 2, root=tmp_path)
    assert {path.name for path in (tmp_path / "results/demo/predictions").iterdir()} == {"scgpt_before.seed23.h5ad", "scgpt_before.seed42.h5ad"}


@pytest.mark.parametrize("args, message", [(["--seed", "-1"], "invalid seed value: '-1'"), (["--run", "scgtp"], "--run scgtp: not found"), (["--controls", "0"], "--controls"),
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
    rows = [("a,b", 'say "x"', "line\nbreak", "pi|pe", "Ünïcode", "line\rbreak")]
    header = ("1", "2", "3", "4", "5", "6")
    assert list(csv.reader(io.StringIO(evaluation.csv_text(header, rows), newline="")))[1] == list(rows[0])
    assert all(line.replace("\\|", "").count("|") == 6 for line in evaluation.markdown_table(header[:5], [[*rows[0][:2], "x", *rows[0][3:5]]]).splitlines())
