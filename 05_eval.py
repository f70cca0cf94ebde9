"""Stage 05: predictions of the held-out perturbations, tables and figures -> results/<dataset>/

    python 05_eval.py                                          the demo: every finished run beside the baselines
    python 05_eval.py --dataset norman                         with as many control cells as each condition has cells
    python 05_eval.py --dataset norman --controls 50           quicker, for a machine without a GPU
    python 05_eval.py --dataset norman --run scgpt scgenept_go_c

Writes metrics.csv (a value a condition), summary.csv (mean and 95% interval over seeds), report.md with figures, and each
model's predicted means as predictions/<model>.seed<N>.h5ad, which anndata and scanpy open. Predictions that are there already
are used again.

The prediction of a condition is the mean over control cells of what the model predicts for each; every model gets the same
control cells. Baselines need no training: non-ctrl-mean (mean profile of the training perturbations), random (the mean
profile of one training perturbation drawn at random), no-change (mean of the control cells).
"""
import argparse
import csv
import importlib
import io
import json
import math
import sys
import time
from pathlib import Path

import h5py
import numpy as np

import metrics

shared = importlib.import_module("01_fetch_annotations")
training = importlib.import_module("04_train")

METRICS = {  # key: (heading, whether higher is better)
    "pearson_delta_top20": ("Pearson Δ top 20", True),
    "pearson_delta_all": ("Pearson Δ all", True),
    "mse_top20": ("MSE top 20", False),
    "mse_all": ("MSE all", False),
    "pearson_top20": ("Pearson top 20", True),
    "pearson_all": ("Pearson all", True),
}
BASELINES = ("non-ctrl-mean", "random", "no-change")
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")  # told apart by colour-blind people


# ---------------------------------------------------------------------------------------------------------------------
# Predictions

def find_runs(folder, wanted, dataset_path, of_dataset):
    """Finished runs as a list of (model name, seed, folder), in order of name and seed; those that cannot be compared (not
    finished, other data) are named and left out."""
    runs, names = [], set()
    made_by = f"python 04_train.py{of_dataset}"
    fingerprint = shared.fingerprint(dataset_path)
    for path in sorted(folder.glob("*/seed*/config.json")):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            name, seed, inputs = config["variant"], int(config["seed"]), json.loads(config["made_from"])["inputs"]
        except (ValueError, KeyError, TypeError):
            sys.exit(f"error: {path}: not a run's config.json; train again: {made_by} --force")
        names.add(name)
        if wanted and name not in wanted:
            continue
        if not config.get("finished"):
            print(f"left out: {path.parent} is not finished; {made_by} --variant {name} --seed {seed} goes on with it")
        elif inputs.get("dataset.h5") != fingerprint:
            print(f"left out: {path.parent} was trained on another {dataset_path}; train again with --force")
        else:
            runs.append((name, seed, path.parent))
    for name in wanted or ():
        if name not in names:
            sys.exit(f"error: --run {name}: not found in {folder}; there are: {', '.join(sorted(names)) or 'none'}")
    if not runs:
        sys.exit(f"error: no finished run in {folder}; run first: {made_by}")
    return sorted(runs, key=lambda run: (not run[0].startswith("scgpt"), run[0], run[1]))


def draw_controls(data, conditions, n_controls, seed):
    """Control cells for each condition, the same for every model: as many as it has cells, or n_controls. A list of index
    arrays."""
    n_cells = np.bincount(data.cell_condition, minlength=len(data.conditions))
    return [np.random.default_rng([seed, 4, int(condition)]).choice(data.ctrl_cells, n_controls or n_cells[condition])
            for condition in conditions]


def predict_means(path, data, conditions, controls, device, batch_size, title):
    """Mean predicted profile of each condition by the model in `path`: (conditions, G) float64."""
    import model
    from tqdm import tqdm
    try:
        net = model.load(path).to(device)
    except ValueError as error:
        sys.exit(f"error: {error}")
    autocast, _ = training.mixed_precision(device)
    means = np.zeros((len(conditions), len(data.genes)))
    with tqdm(total=sum(map(len, controls)), desc=f"  {title}", unit=" cells", leave=False, disable=None) as progress:
        for row, (condition, cells) in enumerate(zip(conditions, controls)):
            targets = data.targets[condition]
            for start in range(0, len(cells), 512):  # blocks, so that memory does not grow with the number of cells
                block = data.X[cells[start:start + 512]].toarray()
                with autocast():
                    predicted = model.predict(net, data.token_ids, block, targets[targets >= 0], batch_size)
                means[row] += predicted.sum(0, dtype=np.float64)
                progress.update(len(block))
            means[row] /= len(cells)
    return means


def write_h5ad(path, made, X, obs, var_names, uns):
    """Write mean profiles X (conditions, genes) as an AnnData file: obs {column: values} with the index `condition`."""
    def table(file, name, index, columns):
        group = file.create_group(name)
        group.attrs.update({"encoding-type": "dataframe", "encoding-version": "0.2.0", "_index": "_index",
                            "column-order": np.array(list(columns), dtype=h5py.string_dtype())})
        for column, values in {"_index": index, **columns}.items():
            if isinstance(values[0], str):
                shared.write_strings(group, column, values)
            else:
                group[column] = np.asarray(values)
            group[column].attrs.update({"encoding-type": "string-array" if isinstance(values[0], str) else "array", "encoding-version": "0.2.0"})

    with shared.write_h5(path, made) as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        file["X"] = X.astype(np.float32)
        file["X"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        table(file, "obs", obs["condition"], obs)
        table(file, "var", var_names, {"gene_name": var_names})
        for name in ("layers", "obsm", "obsp", "varm", "varp", "uns"):
            file.create_group(name).attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
        for name, value in uns.items():
            file["uns"].create_dataset(name, data=value, dtype=h5py.string_dtype()).attrs.update(
                {"encoding-type": "string", "encoding-version": "0.2.0"})


# ---------------------------------------------------------------------------------------------------------------------
# Baselines

def baseline_means(data, conditions, seed):
    """Mean profiles that the baselines predict for each condition: {name: (conditions, G)}. Only `random` depends on `seed`."""
    trained = np.flatnonzero(data.split == "train")
    ctrl = data.mean[data.split == "ctrl"][0]
    drawn = np.random.default_rng([seed, 5]).choice(trained, len(conditions))
    n = len(conditions)
    return {"non-ctrl-mean": np.tile(data.mean[trained].mean(0, dtype=np.float64), (n, 1)),
            "random": data.mean[drawn],
            "no-change": np.tile(ctrl, (n, 1))}


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def summarize(rows):
    """Rows (model, seed, condition, subgroup, metric, value) -> {(model, subgroup, metric): (mean, half width, n seeds)};
    a seed's value is the mean over conditions, `all` takes all of them."""
    by_seed = {}
    for model, seed, _, subgroup, metric, value in rows:
        for group in {"all", subgroup or "all"}:
            by_seed.setdefault((model, group, metric), {}).setdefault(seed, []).append(value)
    return {key: (*metrics.interval95([np.mean(values) for values in seeds.values()]), len(seeds)) for key, seeds in by_seed.items()}


def csv_text(header, rows):
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def number(mean, half_width):
    """`0.665 ± 0.010`, with three significant digits for small values."""
    digits = 3 if abs(mean) >= 0.1 or mean == 0 else min(3 - math.floor(math.log10(abs(mean))) - 1, 7)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half_width) else f" ± {half_width:.{digits}f}")


def markdown_table(header, rows):
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def marked(summary, models, subgroup, metric):
    """A column of a table: each model's number, the best in bold and the second best in italics."""
    means = [summary[model, subgroup, metric][0] for model in models]
    ranked = sorted(set(means), reverse=METRICS[metric][1])
    marks = {ranked[0]: "**"} | ({ranked[1]: "*"} if len(ranked) > 1 else {})
    return [f"{marks.get(mean, '')}{number(*summary[model, subgroup, metric][:2])}{marks.get(mean, '')}" for model, mean in zip(models, means)]


def draw_bars(path, summary, models, subgroups, title):
    """Bars with 95% intervals: Pearson delta on the top 20 genes and mean squared error, by subgroup."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(2, 1, figsize=(max(6.5, 1.2 + 0.25 * len(models) * len(subgroups)), 7), layout="constrained")
    for axis, metric, label in zip(axes, ("pearson_delta_top20", "mse_top20"),
                                   ("Pearson Δ, top 20 DE genes", "MSE, top 20 DE genes\n(squared log-normalized expression)")):
        for i, model in enumerate(models):
            values = np.array([summary[model, group, metric][:2] for group in subgroups])
            x = np.arange(len(subgroups)) + (i - (len(models) - 1) / 2) * 0.85 / len(models)
            axis.bar(x, values[:, 0], 0.8 / len(models), yerr=None if np.isnan(values[:, 1]).all() else values[:, 1], capsize=2, label=model,
                     color=COLORS[i % len(COLORS)], hatch=("", "//", "..", "xx")[i // len(COLORS) % 4], edgecolor="white", error_kw={"lw": 1})
        axis.axhline(0, color="black", lw=0.8)
        axis.set_xticks(range(len(subgroups)), [group.replace("_", " ") for group in subgroups])
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_title(title)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    with shared.replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------------------------

def options():
    parser = shared.common_options(argparse.ArgumentParser(description=__doc__))
    add = parser.add_argument
    add("--run", nargs="+", metavar="NAME", help="runs to evaluate, by the name of their folder (default: all found)")
    add("--controls", type=int, metavar="N", help="control cells a condition (default: as many as the condition has cells)")
    add("--seed", type=int, default=42, metavar="N", help="of the draw of control cells (default: 42)")
    add("--batch-size", type=int, default=16, metavar="N", help="cells at a time (default: 16)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    return parser.parse_args()


def main():
    args = options()
    is_demo = shared.space_of(args.dataset) == "demo"
    of_dataset = "" if is_demo else f" --dataset {args.dataset}"
    for name in ("controls", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            sys.exit(f"error: --{name.replace('_', '-')} has to be above 0")
    dataset_path = args.root / "data" / args.dataset / "dataset.h5"
    results = args.root / "results" / args.dataset
    data = training.load_dataset(dataset_path, f"03_prepare_data.py{of_dataset}")
    runs = find_runs(args.root / "runs" / args.dataset, args.run, dataset_path, of_dataset)
    device = training.choose_device(args.device)

    tested = np.flatnonzero(data.split == "test")
    controls = draw_controls(data, tested, args.controls, args.seed)
    genes = np.flatnonzero(data.measured)  # only these count
    column = np.full(len(data.genes), -1)
    column[genes] = np.arange(len(genes))
    de_idx = np.where(data.de_idx[tested] >= 0, column[data.de_idx[tested]], -1)
    ctrl, true = data.mean[data.split == "ctrl"][0][genes], data.mean[tested][:, genes]
    print(f"{len(tested)} test conditions, {len(genes):,} genes, {sum(map(len, controls)):,} control cells to predict from; device: {device}")

    # Predictions of every model and baseline: (model, seed, (P, G) of the measured genes)
    predictions = []
    for name, seed, run in runs:
        path = results / "predictions" / f"{name}.seed{seed}.h5ad"
        made = shared.made_from({"controls": args.controls or "as cells", "seed": args.seed}, [dataset_path, run / "model.pt"])
        if not shared.is_current(path, made, args.force):
            started = time.perf_counter()
            means = predict_means(run / "model.pt", data, tested, controls, device, args.batch_size, f"{name}, seed {seed}")[:, genes]
            obs = {"condition": list(data.conditions[tested]), "subgroup": list(data.subgroup[tested]), "model": [name] * len(tested),
                   "seed": [seed] * len(tested), "n_controls": [len(cells) for cells in controls]}
            write_h5ad(path, made, means, obs, list(data.genes[genes]),
                       {"description": "mean predicted log-normalized expression" + (" of SYNTHETIC cells" if data.synthetic else "")})
            print(f"{name}, seed {seed}: predicted in {time.perf_counter() - started:.1f} s -> {path}")
        with h5py.File(path, "r") as file:
            predictions.append((name, seed, file["X"][:]))
    for seed in sorted({seed for _, seed, _ in runs}):
        for name, means in baseline_means(data, tested, seed).items():
            if name == "random" or not any(done == name for done, _, _ in predictions):
                predictions.append((name, seed if name == "random" else "", means[:, genes]))

    # Scores
    rows = []
    for name, seed, predicted in predictions:
        scores = metrics.evaluate(predicted, true, ctrl, de_idx)
        rows += [(name, seed, data.conditions[c], data.subgroup[c], metric, float(scores[metric][i]))
                 for i, c in enumerate(tested) for metric in METRICS]
    summary = summarize(rows)
    models = list(dict.fromkeys([name for name, _, _ in runs] + list(BASELINES)))
    subgroups = [*sorted({group for group in data.subgroup[tested] if group}, key=lambda g: (g != "unseen_single", g)), "all"]
    shared.write_text(results / "metrics.csv", csv_text(("model", "seed", "condition", "subgroup", "metric", "value"), rows))
    shared.write_text(results / "summary.csv", csv_text(
        ("model", "subgroup", "metric", "mean", "interval", "n_seeds"),
        [(model, group, metric, mean, "" if math.isnan(half) else half, n) for (model, group, metric), (mean, half, n) in summary.items()]))

    # Report
    label = " (SYNTHETIC data)" if data.synthetic else ""
    draw_bars(results / "subgroups.png", summary, models, subgroups, f"{args.dataset}{label}: held-out perturbations")
    shared.write_text(results / "report.md", report(args.dataset, data, summary, models, subgroups, runs, args, len(genes)))

    header = [f"{METRICS['pearson_delta_top20'][0]}{label}", "n", *models]
    table = [[group, (data.subgroup[tested] == group).sum() if group != "all" else len(tested)]
             + [number(*summary[model, group, "pearson_delta_top20"][:2]) for model in models] for group in subgroups]
    print(f"\n{markdown_table(header, table)}\n")
    print(f"report: {results / 'report.md'}\nfigure: {results / 'subgroups.png'}\nvalues: {results / 'metrics.csv'}, {results / 'summary.csv'}")


def report(dataset, data, summary, models, subgroups, runs, args, n_genes):
    """The text of report.md."""
    tested = data.split == "test"
    seeds = sorted({seed for _, seed, _ in runs})
    trained = [model for model in models if model not in BASELINES]
    lines = [f"# {dataset}: predicting held-out perturbations", ""]
    if data.synthetic:
        lines += ["**SYNTHETIC data**: simulated cells of invented genes. The numbers show that the kit works, nothing about biology.", ""]
    lines += [f"Compared on {tested.sum()} held-out conditions and {n_genes:,} genes: {len(trained)} trained models "
              f"(seeds {', '.join(map(str, seeds))}) and {len(BASELINES)} baselines. {verdict(summary, trained)}", "",
              "Mean over the test conditions, then mean ± 95% interval (Student's t) over the seeds; **best**, *second best*. "
              "Δ is the difference to the mean of the control cells. The random baseline is drawn once a seed; the others do not depend on one.", "",
              "## All test conditions", "",
              markdown_table(["model", "seeds", *(heading for heading, _ in METRICS.values())],
                             zip(models, [summary[model, "all", "mse_all"][2] if model in trained or model == "random" else "–" for model in models],
                                 *(marked(summary, models, "all", metric) for metric in METRICS))), ""]
    for metric in ("pearson_delta_top20", "mse_top20"):
        lines += [f"## By subgroup: {METRICS[metric][0]}", "",
                  markdown_table(["model", *(f"{g} ({(data.subgroup[tested] == g).sum() if g != 'all' else tested.sum()})" for g in subgroups)],
                                 zip(models, *(marked(summary, models, group, metric) for group in subgroups))), ""]
    lines += ["![Bars by subgroup](subgroups.png)", "", "## Runs", "",
              markdown_table(["model", "seed", "best epoch", "validation MSE", "parameters"],
                             [[name, seed, *run_facts(run)] for name, seed, run in runs]), "",
              f"Control cells a condition: {args.controls or 'as many as the condition has cells'}, drawn with seed {args.seed}, the same for all models.", ""]
    return "\n".join(lines)


def run_facts(run):
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    return config["best_epoch"], f"{config['best_val_mse']:.5f}", f"{config['n_parameters']:,}"


def verdict(summary, trained):
    """What came out, in words: the best model, and whether it beats the mean baseline and its own shuffled control."""
    def value(model):
        return summary[model, "all", "pearson_delta_top20"]

    best = max(trained, key=lambda model: value(model)[0])
    rivals = ["non-ctrl-mean"] + [f"{best}-shuffled"] * (f"{best}-shuffled" in trained) + ["scgpt"] * ("scgpt" in trained and best != "scgpt")
    words = []
    for rival in rivals:
        (a, da, n), (b, db, _) = value(best), value(rival)
        half_widths = sum(half for half in (da, db) if not math.isnan(half))
        relation = "above" if a > b else "not above"
        beyond = " (one seed: no interval)" if n < 2 else (" beyond the intervals" if a - b > half_widths else " within the intervals") if a > b else ""
        words.append(f"{relation} {rival} ({number(b, db)}){beyond}")
    return f"By Pearson Δ on the top 20 genes, {best} is the best trained model ({number(*value(best)[:2])}): {'; '.join(words)}."


if __name__ == "__main__":
    shared.run(main)
