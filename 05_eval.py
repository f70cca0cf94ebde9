"""Stage 05: predictions of the held-out perturbations, tables and figures -> results/<dataset>/

    python 05_eval.py                                              the demo: every finished run beside the baselines
    python 05_eval.py --dataset norman                             as many control cells as each condition has cells
    python 05_eval.py --dataset norman --controls 50               quicker, for a machine without a GPU
    python 05_eval.py --dataset norman --run scgpt released=best_model_seed_42.pt      chosen runs, a released model
    python 05_eval.py --dataset norman --external GEARS=gears.h5ad                     another method's predictions
    python 05_eval.py --dataset norman --predict POU3F2 CEBPE+KLF1                     figures of single perturbations

Writes metrics.csv (a value a condition), summary.csv (mean and 95% interval over seeds), report.md with figures, and each
model's predicted means as predictions/<model>.seed<N>.h5ad, which anndata and scanpy open. Predictions that are there already
are used again.

The prediction of a condition is the mean over control cells of what the model predicts for each; every model gets the same
control cells. The baselines need no training:
    non-ctrl-mean    the mean profile of the training perturbations
    random           the profile of one training perturbation drawn at random
    no-change        the mean of the control cells
    matching-mean    the mean of the parts' own training profiles, non-ctrl-mean for parts not trained on (Systema)
    additive         control plus the sum of the parts' effects, 0 for parts not trained on (Ahlmann-Eltze et al. 2025)
    ridge_<source>   ridge regression from the sum of the targets' language vectors to the response (GenePert)
data-ceiling is no prediction: one half of a condition's cells scored as if it predicted the other.
"""
import argparse
import csv
import importlib
import io
import json
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

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
    "pearson_systema": ("Pearson Systema", True),
    "centroid_accuracy": ("centroid accuracy", True),
}
BASELINES = ("non-ctrl-mean", "random", "no-change", "matching-mean", "additive")  # and ridge_<source>
DEPEND_ON_SEED = ("random", "data-ceiling")
CEILING = "data-ceiling"
RIDGE_PENALTIES = 10.0 ** np.arange(-4, 5)  # times the mean squared length of the centred vectors
N_FIGURE_CONTROLS = 300  # as in the paper's Figures 8 and 9

# The paper's own figures, mean over five seeds ± 95% interval: Pearson Δ top 20 and all, MSE top 20 and all (Tables 3, 4, 16, 18)
PAPER = {
    "norman": """
        scgpt                  0.665 ± 0.01 | 0.534 ± 0.02 | 0.223 ± 0.01 | 0.00421 ± 0.00
        scgenept_ncbi          0.685 ± 0.03 | 0.548 ± 0.03 | 0.223 ± 0.03 | 0.00415 ± 0.00
        scgenept_ncbi+uniprot  0.696 ± 0.01 | 0.557 ± 0.02 | 0.205 ± 0.02 | 0.00403 ± 0.00
        scgenept_go_f          0.686 ± 0.01 | 0.554 ± 0.02 | 0.216 ± 0.02 | 0.00405 ± 0.00
        scgenept_go_c          0.687 ± 0.03 | 0.550 ± 0.02 | 0.219 ± 0.01 | 0.00405 ± 0.00
        scgenept_go_p          0.682 ± 0.02 | 0.543 ± 0.02 | 0.220 ± 0.02 | 0.00412 ± 0.00
        scgenept_go_all        0.698 ± 0.02 | 0.554 ± 0.02 | 0.209 ± 0.02 | 0.00400 ± 0.00
        GEARS                  0.710 ± 0.00 | 0.573 ± 0.00 | 0.177 ± 0.00 | 0.00510 ± 0.00
        random                 0.604 ± 0.03 | 0.495 ± 0.00 | 0.340 ± 0.00 | 0.00488 ± 0.00
        non-ctrl-mean          0.608 ± 0.00 | 0.571 ± 0.00 | 0.337 ± 0.00 | 0.00466 ± 0.00""",
    "adamson": """
        scgpt                  0.782 ± 0.02 | 0.589 ± 0.03 | 0.135 ± 0.01 | 0.00672 ± 0.00
        scgenept_ncbi          0.779 ± 0.02 | 0.606 ± 0.03 | 0.133 ± 0.00 | 0.00654 ± 0.00
        scgenept_ncbi+uniprot  0.784 ± 0.02 | 0.617 ± 0.03 | 0.129 ± 0.00 | 0.00620 ± 0.00
        scgenept_go_f          0.785 ± 0.02 | 0.611 ± 0.03 | 0.128 ± 0.00 | 0.00640 ± 0.00
        scgenept_go_c          0.791 ± 0.01 | 0.623 ± 0.02 | 0.125 ± 0.00 | 0.00622 ± 0.00
        scgenept_go_p          0.789 ± 0.01 | 0.609 ± 0.03 | 0.127 ± 0.00 | 0.00645 ± 0.00
        scgenept_go_all        0.787 ± 0.02 | 0.605 ± 0.03 | 0.127 ± 0.01 | 0.00641 ± 0.00
        GEARS                  0.730 ± 0.00 | 0.691 ± 0.00 | 0.157 ± 0.00 | 0.00516 ± 0.00
        random                 0.726 ± 0.03 | 0.693 ± 0.00 | 0.151 ± 0.00 | 0.00482 ± 0.00
        non-ctrl-mean          0.729 ± 0.00 | 0.709 ± 0.00 | 0.149 ± 0.00 | 0.00456 ± 0.00"""}
PAPER_METRICS = ("pearson_delta_top20", "pearson_delta_all", "mse_top20", "mse_all")
# Pearson Δ top 20 on Norman by subgroup (Tables 5 and 17)
PAPER_BY_SUBGROUP = """
        scgpt                  0.509 ± 0.03 | 0.579 ± 0.08 | 0.727 ± 0.04 | 0.844 ± 0.03
        scgenept_ncbi          0.517 ± 0.04 | 0.649 ± 0.03 | 0.717 ± 0.06 | 0.857 ± 0.04
        scgenept_ncbi+uniprot  0.507 ± 0.03 | 0.660 ± 0.03 | 0.745 ± 0.03 | 0.872 ± 0.03
        scgenept_go_f          0.521 ± 0.05 | 0.633 ± 0.07 | 0.731 ± 0.01 | 0.857 ± 0.03
        scgenept_go_c          0.529 ± 0.03 | 0.615 ± 0.10 | 0.746 ± 0.02 | 0.860 ± 0.03
        scgenept_go_p          0.507 ± 0.03 | 0.629 ± 0.05 | 0.736 ± 0.02 | 0.857 ± 0.01
        scgenept_go_all        0.510 ± 0.04 | 0.662 ± 0.04 | 0.745 ± 0.00 | 0.874 ± 0.03
        GEARS                  0.448 ± 0.01 | 0.785 ± 0.00 | 0.737 ± 0.01 | 0.869 ± 0.00
        random                 0.397 ± 0.04 | 0.771 ± 0.06 | 0.630 ± 0.01 | 0.619 ± 0.00
        non-ctrl-mean          0.397 ± 0.00 | 0.741 ± 0.00 | 0.656 ± 0.00 | 0.640 ± 0.00"""
PAPER_SUBGROUPS = ("unseen_single", "combo_seen0", "combo_seen1", "combo_seen2")
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")  # told apart by colour-blind people


# ---------------------------------------------------------------------------------------------------------------------
# Predictions

def find_runs(folder, wanted, dataset_path, of_dataset):
    """Models to evaluate as a list of namespaces (name, seed, path, embeddings, facts): finished runs in order of name and
    seed, and files given as FILE.pt or NAME=FILE.pt. Runs that cannot be compared (not finished, other data) are named and
    left out."""
    runs, names, files = [], set(), []
    made_by = f"python 04_train.py{of_dataset}"
    fingerprint = shared.fingerprint(dataset_path)
    for item in wanted or ():
        name, _, file = item.rpartition("=") if item.endswith(".pt") else (item, "", "")
        if file and not Path(file).exists():
            sys.exit(f"error: --run {item}: {file} does not exist")
        if file:
            seed = re.search(r"seed_?(\d+)", Path(file).name)
            files.append(SimpleNamespace(name=shared.check_name(name or Path(file).stem.replace(".", "_"), "--run"),
                                         seed=int(seed[1]) if seed else 0, path=Path(file), embeddings={}, facts=("–", "–", "–")))
    wanted_names = None if wanted is None else [item for item in wanted if not item.endswith(".pt")]
    for path in sorted(folder.glob("*/seed*/config.json")):
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            name, seed, inputs = config["variant"], int(config["seed"]), json.loads(config["made_from"])["inputs"]
            run = SimpleNamespace(name=name, seed=seed, path=path.parent / "model.pt", embeddings=dict(config["embeddings"]), facts=(
                config.get("best_epoch"), f"{config.get('best_val_mse', math.nan):.5f}", f"{config.get('n_parameters', 0):,}"))
        except (ValueError, KeyError, TypeError, AttributeError):
            sys.exit(f"error: {path}: not a run's config.json; train again: {made_by} --force")
        names.add(name)
        if wanted_names is not None and name not in wanted_names:
            continue
        if not config.get("finished"):
            print(f"left out: {path.parent} is not finished; {made_by} --variant {name} --seed {seed} goes on with it")
        elif inputs.get("dataset.h5") != fingerprint:
            print(f"left out: {path.parent} was trained on another {dataset_path}; train again with --force")
        else:
            runs.append(run)
    for name in wanted_names or ():
        if name not in names:
            sys.exit(f"error: --run {name}: not found in {folder}; there are: {', '.join(sorted(names)) or 'none'}")
    return sorted(runs, key=lambda run: (not run.name.startswith("scgpt"), run.name, run.seed)) + files


def load_model(path, data):
    """The model in an own or a released file. Ends the run when it is neither, or of another vocabulary than the data."""
    import model
    try:
        net = model.load(path)
    except ValueError as error:
        if "load_released" not in str(error):
            sys.exit(f"error: {error}")
        try:
            net = model.load_released(path)
        except ValueError as error:
            sys.exit(f"error: {error}")
    if net.config.n_tokens != data.n_tokens:
        sys.exit(f"error: {path}: has a vocabulary of {net.config.n_tokens:,} genes, the dataset one of {data.n_tokens:,}")
    return net


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
    net = load_model(path, data).to(device)
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
    ctrl = data.mean[data.split == "ctrl"][0].astype(np.float64)
    n_cells = np.bincount(data.cell_condition, minlength=len(data.conditions))
    cells_of, sum_of = {}, {}  # of each single target that was trained on, over its labels (A+ctrl, ctrl+A)
    for condition in trained:
        targets = data.targets[condition][data.targets[condition] >= 0]
        if len(targets) == 1:
            cells_of[targets[0]] = cells_of.get(targets[0], 0) + n_cells[condition]
            sum_of[targets[0]] = sum_of.get(targets[0], 0) + n_cells[condition] * data.mean[condition].astype(np.float64)
    profile_of = {target: sum_of[target] / cells_of[target] for target in sum_of}
    non_ctrl = data.mean[trained].mean(0, dtype=np.float64)
    parts = [data.targets[condition][data.targets[condition] >= 0] for condition in conditions]
    drawn = np.random.default_rng([seed, 5]).choice(trained, len(conditions))
    return {"non-ctrl-mean": np.tile(non_ctrl, (len(conditions), 1)),
            "random": data.mean[drawn],
            "no-change": np.tile(ctrl, (len(conditions), 1)),
            "matching-mean": np.stack([np.mean([profile_of.get(t, non_ctrl) for t in targets], axis=0) for targets in parts]),
            "additive": np.stack([ctrl + sum(profile_of.get(t, ctrl) - ctrl for t in targets) for targets in parts])}


def ridge_means(data, conditions, path):
    """What GenePert's ridge regression predicts for each condition, (conditions, G), or None where the source has a vector
    for no training target: from the sum of the targets' language vectors (0 for a target without one) to the mean response,
    with an intercept. The penalty is the one with the lowest error on the validation conditions."""
    with shared.open_h5(path, "02_embed.py", ("genes", "vectors")) as file:
        row_of = {gene: row for row, gene in enumerate(file["genes"].asstr()[:])}
        vectors = file["vectors"][:].astype(np.float64)
    x = np.zeros((len(data.conditions), vectors.shape[1]))
    for condition, targets in enumerate(data.targets):
        for target in targets[targets >= 0]:
            if data.genes[target] in row_of:
                x[condition] += vectors[row_of[data.genes[target]]]
    known = x.any(axis=1)
    trained, val = np.flatnonzero((data.split == "train") & known), np.flatnonzero(data.split == "val")
    if not len(trained):
        return None
    y = data.mean.astype(np.float64)
    x_mean, y_mean = x[trained].mean(0), y[trained].mean(0)
    xc, yc = x[trained] - x_mean, y[trained] - y_mean
    values, basis = np.linalg.eigh(xc @ xc.T)  # of as many rows as conditions, however wide the vectors are
    best = None
    for penalty in RIDGE_PENALTIES * max(values.mean(), 1e-12):
        weights = xc.T @ (basis @ ((basis.T @ yc) / (np.maximum(values, 0) + penalty)[:, None]))  # (width, G)
        error = ((y_mean + (x[val] - x_mean) @ weights - y[val]) ** 2).mean()
        if best is None or error < best[0]:
            best = error, y_mean + (x[conditions] - x_mean) @ weights
    return best[1]


def halves(data, conditions, seed):
    """Mean profiles of two random halves of each condition's cells, two arrays (conditions, G); NaN for a single cell."""
    rng = np.random.default_rng([seed, 6])
    means = np.full((2, len(conditions), len(data.genes)), np.nan)
    for row, condition in enumerate(conditions):
        cells = rng.permutation(np.flatnonzero(data.cell_condition == condition))
        for half, chosen in enumerate(np.array_split(cells, 2)):
            if len(cells) > 1:
                means[half, row] = np.asarray(data.X[chosen].mean(axis=0)).ravel()
    return means


def read_external(item, data, conditions):
    """Another method's predictions, NAME=FILE.h5ad: an obs column `condition`, X predicted expression per cell or per
    condition, genes by symbol. Returns the name and the mean profiles (conditions, G of the measured genes)."""
    prepare = importlib.import_module("03_prepare_data")
    name, _, file = item.partition("=")
    if not name or not file:
        sys.exit(f"error: --external {item}: expected NAME=FILE.h5ad")
    options = SimpleNamespace(gene_key=None, condition_key="condition", control=data.control, normalize=False)
    X, genes, _, labels, cell_condition, _ = prepare.read_h5ad(Path(file), options, may_be_negative=True)
    column = {gene: i for i, gene in reversed(list(enumerate(genes)))}
    wanted = data.genes[data.measured]
    missing = [gene for gene in wanted if gene not in column]
    if missing:
        sys.exit(f"error: {file}: {len(missing):,} of {len(wanted):,} genes are missing, the first {missing[0]}")
    row_of = {label: row for row, label in enumerate(labels)}
    absent = [data.conditions[c] for c in conditions if data.conditions[c] not in row_of]
    if absent:
        sys.exit(f"error: {file}: {len(absent)} of {len(conditions)} test conditions are missing, the first {absent[0]!r}")
    means = [np.asarray(X[np.flatnonzero(cell_condition == row_of[data.conditions[c]])].mean(axis=0)).ravel() for c in conditions]
    return name, np.stack(means)[:, [column[gene] for gene in wanted]]


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
    ranked = sorted({summary[model, subgroup, metric][0] for model in models if model != CEILING}, reverse=METRICS[metric][1])
    marks = dict(zip(ranked, ("**", "*")))
    cells = []
    for model in models:
        mean, half_width, _ = summary.get((model, subgroup, metric), (math.nan, math.nan, 0))
        mark = marks.get(mean, "") if model != CEILING else ""
        cells.append("" if math.isnan(mean) else f"{mark}{number(mean, half_width)}{mark}")
    return cells


def paper_rows(text):
    """{model: [cell, ...]} of one of the paper's tables above."""
    return {line.split()[0]: [cell.strip() for cell in line.strip().split(None, 1)[1].split("|")] for line in text.strip().splitlines()}


def tables_by_embedding(summary, runs):
    """Tables of the models that were trained with several embedders (the paper's Tables 32-39), and with both forms of GO
    texts (Tables 23-26), as far as there are such runs."""
    lines = []
    for part, heading, words in ((-2, "By embedder", "embedder="), (-1, "Concatenated against averaged GO terms", "mode=")):
        cells = {}
        for run in runs:
            if run.embeddings:
                source, *embedder, mode = next(iter(run.embeddings.values())).removesuffix(".h5").split(".")
                base = ",".join(word for word in run.name.split(",") if not word.startswith(words))
                cells.setdefault(base, {})[".".join(embedder) if part == -2 else mode] = run.name
        cells = {base: by for base, by in cells.items() if len(by) > 1}
        columns = sorted({column for by in cells.values() for column in by})
        for metric in PAPER_METRICS if cells else ():
            rows = [[base, *(number(*summary[by[column], "all", metric][:2]) if column in by else "" for column in columns)]
                    for base, by in cells.items()]
            lines += [f"## {heading}: {METRICS[metric][0]}", "", markdown_table(["model", *columns], rows), ""]
    return lines


def new_figure(width, height, title):
    """An empty figure (inches) that needs no display."""
    from matplotlib.figure import Figure  # no pyplot: no window, no backend to choose
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def save_figure(figure, path):
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with shared.replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def draw_bars(path, summary, models, subgroups, title):
    """Bars with 95% intervals: Pearson delta and mean squared error on the top 20 genes, by subgroup (the paper's Figures 10
    and 14 to 16)."""
    figure = new_figure(max(6.5, 1.2 + 0.22 * len(models) * len(subgroups)), 7.5, title)
    for axes, metric, label in zip(figure.subplots(2, 1), ("pearson_delta_top20", "mse_top20"),
                                   ("Pearson Δ, top 20 DE genes", "MSE, top 20 DE genes\n(squared log-normalized expression)")):
        for i, model in enumerate(models):
            means, halves_ = np.array([summary.get((model, group, metric), (np.nan, np.nan))[:2] for group in subgroups]).T
            axes.bar(np.arange(len(subgroups)) + (i - (len(models) - 1) / 2) * 0.85 / len(models), means, 0.8 / len(models), label=model,
                     yerr=None if np.isnan(halves_).all() else halves_, capsize=2, error_kw={"lw": 1}, edgecolor="white",
                     color=COLORS[i % len(COLORS)], hatch=("", "//", "..", "xx")[i // len(COLORS) % 4])
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xticks(range(len(subgroups)), [group.replace("_", " ") for group in subgroups])
        axes.set_ylabel(label)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    save_figure(figure, path)


def draw_split(path, data, title):
    """Conditions of the split by subgroup (the paper's Figure 7)."""
    groups = [(split, group) for split in ("train", "val", "test") for group in sorted(set(data.subgroup[data.split == split]))]
    figure = new_figure(6.5, 0.6 + 0.35 * len(groups), title)
    axes = figure.subplots()
    counts = [((data.split == split) & (data.subgroup == group)).sum() for split, group in groups]
    bars = axes.barh(range(len(groups)), counts, color=[COLORS[("train", "val", "test").index(split)] for split, _ in groups])
    axes.bar_label(bars, padding=3)
    axes.set_yticks(range(len(groups)), [f"{split} {group.replace('_', ' ')}".strip() for split, group in groups])
    axes.invert_yaxis()
    axes.set_xlabel("conditions")
    save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# Single perturbations

def predict_perturbations(args, data, runs, device, results):
    """For every perturbation of --predict: its 20 genes that change most, measured (where the data has it) and as each model
    predicts them, as a figure and as rows of predicted.csv."""
    import model
    ctrl = data.mean[data.split == "ctrl"][0]
    position = {gene: i for i, gene in reversed(list(enumerate(data.genes)))}
    wanted = []
    for label in args.predict:
        unknown = [gene for gene in label.split("+") if gene not in position]
        if unknown:
            sys.exit(f"error: --predict {label}: {unknown[0]!r} is no gene of the dataset (its symbols are like {data.genes[0]})")
        wanted.append((label, np.array(sorted({position[gene] for gene in label.split("+")}))))
    cells = np.random.default_rng([args.seed, 7]).choice(data.ctrl_cells, args.controls or N_FIGURE_CONTROLS)
    control = data.X[cells].toarray()
    autocast, _ = training.mixed_precision(device)
    predicted = {label: {} for label, _ in wanted}  # label: {(model, seed): (cells, G)}
    for run in runs:
        net = load_model(run.path, data).to(device)
        for label, targets in wanted:
            with autocast():
                predicted[label][run.name, run.seed] = model.predict(net, data.token_ids, control, targets, args.batch_size)
    rows = []
    for label, targets in wanted:
        same = [c for c, t in enumerate(data.targets) if set(t[t >= 0]) == set(targets)]
        measured = data.X[np.flatnonzero(np.isin(data.cell_condition, same))].toarray() if same else None
        delta = {key: each.mean(0) - ctrl for key, each in predicted[label].items()}
        if same:
            top = data.de_idx[same[0]][data.de_idx[same[0]] >= 0]
        else:
            top = np.argsort(-np.where(data.measured, np.abs(np.mean(list(delta.values()), axis=0)), -1), kind="stable")[:20]
        for (name, seed), change in delta.items():
            rows += [(label, name, seed, data.genes[g], float(ctrl[g]), float(ctrl[g] + change[g]), float(change[g]),
                      float(measured[:, g].mean() - ctrl[g]) if same else "") for g in top]
        series = ([("measured", measured[:, top])] if same else []) + [
            (name, np.concatenate([each[:, top] for (other, _), each in predicted[label].items() if other == name]))
            for name in dict.fromkeys(run.name for run in runs)]
        figure = new_figure(12, 5, f"{label}: {'most changed genes as measured' if same else 'most changed genes as predicted, not measured'}"
                            + (" (SYNTHETIC data)" if data.synthetic else ""))
        axes = figure.subplots()
        for i, (name, values) in enumerate(series):
            at = np.arange(len(top)) + (i - (len(series) - 1) / 2) * 0.8 / len(series)
            boxes = axes.boxplot(values - ctrl[top], positions=at, widths=0.7 / len(series), showfliers=False, patch_artist=True,
                                 medianprops={"color": "black"}, manage_ticks=False)
            color = "#999999" if name == "measured" else COLORS[(i - bool(same)) % (len(COLORS) - 1)]
            for box in boxes["boxes"]:
                box.set_facecolor(color)
            axes.bar(0, 0, color=color, label=name)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xticks(range(len(top)), data.genes[top], rotation=60, ha="right", fontsize=8)
        axes.set_ylabel("expression less the control mean\n(log-normalized)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize="small")
        path = results / ("predicted_" + re.sub(r"[^A-Za-z0-9_-]", "_", label) + ".png")
        save_figure(figure, path)
        print(f"{label}: {'measured and ' if same else ''}predicted over {len(cells)} control cells -> {path}")
    shared.write_text(results / "predicted.csv", csv_text(
        ("condition", "model", "seed", "gene", "control", "predicted", "delta", "measured_delta"), rows))
    print(f"values: {results / 'predicted.csv'}")


# ---------------------------------------------------------------------------------------------------------------------

def options():
    parser = shared.common_options(argparse.ArgumentParser(description=__doc__))
    add = parser.add_argument
    add("--run", nargs="+", metavar="NAME", help="runs to evaluate by the name of their folder, or model files as FILE.pt or "
        "NAME=FILE.pt, own or released (default: all runs found)")
    add("--external", nargs="+", default=[], metavar="NAME=FILE.h5ad", help="predictions of another method: obs column condition, "
        "X predicted expression per cell or per condition")
    add("--predict", nargs="+", metavar="GENE", help="only predict these perturbations, GENE or GENE+GENE, measured or not: a "
        "figure each, and predicted.csv")
    add("--controls", type=int, metavar="N", help="control cells a condition (default: as many as the condition has cells; "
        f"--predict: {N_FIGURE_CONTROLS})")
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
    if not runs:
        sys.exit(f"error: no finished run in {args.root / 'runs' / args.dataset}; run first: python 04_train.py{of_dataset}")
    device = training.choose_device(args.device)
    if args.predict:
        return predict_perturbations(args, data, runs, device, results)

    tested = np.flatnonzero(data.split == "test")
    controls = draw_controls(data, tested, args.controls, args.seed)
    genes = np.flatnonzero(data.measured)  # only these count
    column = np.full(len(data.genes), -1)
    column[genes] = np.arange(len(genes))
    de_idx = np.where(data.de_idx[tested] >= 0, column[data.de_idx[tested]], -1)
    ctrl, true = data.mean[data.split == "ctrl"][0][genes], data.mean[tested][:, genes]
    perturbed_mean = data.mean[data.split == "train"].mean(0, dtype=np.float64)[genes]
    external = [read_external(item, data, tested) for item in args.external]
    print(f"{len(tested)} test conditions, {len(genes):,} genes, {sum(map(len, controls)):,} control cells to predict from; device: {device}")

    # Mean profiles of every model and baseline: (name, seed or "", predicted (P, G), true (P, G))
    profiles = []
    for run in runs:
        path = results / "predictions" / f"{run.name}.seed{run.seed}.h5ad"
        made = shared.made_from({"controls": args.controls or "as cells", "seed": args.seed}, [dataset_path, run.path])
        if not shared.is_current(path, made, args.force):
            started = time.perf_counter()
            means = predict_means(run.path, data, tested, controls, device, args.batch_size, f"{run.name}, seed {run.seed}")[:, genes]
            obs = {"condition": list(data.conditions[tested]), "subgroup": list(data.subgroup[tested]), "model": [run.name] * len(tested),
                   "seed": [run.seed] * len(tested), "n_controls": [len(cells) for cells in controls]}
            write_h5ad(path, made, means, obs, list(data.genes[genes]),
                       {"description": "mean predicted log-normalized expression" + (" of SYNTHETIC cells" if data.synthetic else "")})
            print(f"{run.name}, seed {run.seed}: predicted in {time.perf_counter() - started:.1f} s -> {path}")
        with h5py.File(path, "r") as file:
            profiles.append((run.name, run.seed, file["X"][:], true))
    profiles += [(name, "", means, true) for name, means in external]
    seeds = sorted({run.seed for run in runs})
    for seed in seeds:
        profiles += [(name, seed if name in DEPEND_ON_SEED else "", means[:, genes], true)
                     for name, means in baseline_means(data, tested, seed).items() if seed == seeds[0] or name in DEPEND_ON_SEED]
    for source, found in training.embeddings_of(args.root / "data" / shared.space_of(args.dataset) / "embeddings").items():
        means = ridge_means(data, tested, found.get(("published", "concat")) or next(iter(found.values())))
        if means is not None:
            profiles.append((f"ridge_{source}", "", means[:, genes], true))
    for seed in seeds:
        one, other = halves(data, tested, seed)
        profiles.append((CEILING, seed, one[:, genes], other[:, genes]))

    # Scores
    rows = []
    for name, seed, predicted, truth in profiles:
        scores = metrics.evaluate(predicted, truth, ctrl, de_idx) | metrics.evaluate_specific(predicted, truth, perturbed_mean)
        rows += [(name, seed, data.conditions[c], data.subgroup[c], metric, float(scores[metric][i]))
                 for i, c in enumerate(tested) for metric in METRICS if np.isfinite(truth[i]).all()]
    summary = summarize(rows)
    models = list(dict.fromkeys(name for name, *_ in profiles if any(row[0] == name for row in rows)))
    trained = list(dict.fromkeys([run.name for run in runs] + [name for name, _ in external]))
    subgroups = [*sorted({group for group in data.subgroup[tested] if group}, key=lambda g: (g != "unseen_single", g)), "all"]
    shared.write_text(results / "metrics.csv", csv_text(("model", "seed", "condition", "subgroup", "metric", "value"), rows))
    shared.write_text(results / "summary.csv", csv_text(
        ("model", "subgroup", "metric", "mean", "interval", "n_seeds"),
        [(model, group, metric, mean, "" if math.isnan(half) else half, n) for (model, group, metric), (mean, half, n) in summary.items()]))

    # Report
    label = " (SYNTHETIC data)" if data.synthetic else ""
    words = verdict(summary, trained, [model for model in models if model not in trained and model != CEILING])
    draw_split(results / "split.png", data, f"{args.dataset}{label}: split")
    draw_bars(results / "subgroups.png", summary, models, subgroups, f"{args.dataset}{label}: held-out perturbations")
    shared.write_text(results / "report.md", report(args, data, summary, models, trained, subgroups, runs, words, len(genes)))

    shown = trained + [model for model in BASELINES[:3] if model not in trained]
    header = [f"{METRICS['pearson_delta_top20'][0]}{label}", "n", *shown]
    table = [[group, (data.subgroup[tested] == group).sum() if group != "all" else len(tested)]
             + [number(*summary[model, group, "pearson_delta_top20"][:2]) for model in shown] for group in subgroups]
    print(f"\n{markdown_table(header, table)}\n\n{words}\n")
    print(f"report with all baselines and metrics: {results / 'report.md'}\nfigures: {results / 'subgroups.png'}, {results / 'split.png'}\n"
          f"values: {results / 'metrics.csv'}, {results / 'summary.csv'}")


def report(args, data, summary, models, trained, subgroups, runs, words, n_genes):
    """The text of report.md."""
    tested = data.split == "test"
    lines = [f"# {args.dataset}: predicting held-out perturbations", ""]
    if data.synthetic:
        lines += ["**SYNTHETIC data**: simulated cells of invented genes. The numbers show that the kit works, nothing about biology.", ""]
    lines += [f"Compared on {tested.sum()} held-out conditions and {n_genes:,} genes. {words}", "",
              "Mean over the test conditions, then mean ± 95% interval (Student's t) over the seeds; **best**, *second best*. Δ is the "
              "difference to the mean of the control cells. Pearson Systema is the same with the mean of the training perturbations in its "
              "place, and centroid accuracy the share of the other conditions that are farther from a prediction than its own: both are low "
              "where predictions look alike. data-ceiling is one half of a condition's cells scored against the other half.", "",
              "![The split](split.png)", "", "## All test conditions", ""]
    paper = paper_rows(PAPER.get(args.dataset, ""))
    header = ["model", "seeds", *(heading for heading, _ in METRICS.values()), *(f"paper: {METRICS[m][0]}" for m in PAPER_METRICS if paper)]
    columns = [marked(summary, models, "all", metric) for metric in METRICS]
    rows = [[model, summary[model, "all", "mse_all"][2] if model in trained or model in DEPEND_ON_SEED else "–",
             *(column[i] for column in columns), *paper.get(model, [""] * len(PAPER_METRICS) if paper else [])] for i, model in enumerate(models)]
    lines += [markdown_table(header, rows), ""]
    for metric in ("pearson_delta_top20", "mse_top20"):
        paper = paper_rows(PAPER_BY_SUBGROUP) if args.dataset == "norman" and metric == "pearson_delta_top20" else {}
        header = ["model", *(f"{g} ({(data.subgroup[tested] == g).sum() if g != 'all' else tested.sum()})" for g in subgroups),
                  *(f"paper: {g}" for g in PAPER_SUBGROUPS if paper)]
        columns = [marked(summary, models, group, metric) for group in subgroups]
        rows = [[model, *(column[i] for column in columns), *paper.get(model, [""] * len(PAPER_SUBGROUPS) if paper else [])]
                for i, model in enumerate(models)]
        lines += [f"## By subgroup: {METRICS[metric][0]}", "", markdown_table(header, rows), ""]
    lines += ["![Bars by subgroup](subgroups.png)", "", *tables_by_embedding(summary, runs), "## Runs", "",
              markdown_table(["model", "seed", "best epoch", "validation MSE", "parameters"], [[run.name, run.seed, *run.facts] for run in runs]), "",
              f"Control cells a condition: {args.controls or 'as many as the condition has cells'}, drawn with seed {args.seed}, the same for "
              "all models.", ""]
    return "\n".join(lines)


def verdict(summary, trained, baselines):
    """What came out, in words: the best trained model by Pearson delta on the top 20 genes, against the mean, its own shuffled
    control, scGPT, and the best baseline."""
    def value(model):
        return summary[model, "all", "pearson_delta_top20"]

    best = max(trained, key=lambda model: value(model)[0])
    rivals = ["non-ctrl-mean", max(baselines, key=lambda model: value(model)[0]), f"{best}-shuffled", "scgpt"]
    words = []
    for rival in dict.fromkeys(rival for rival in rivals if rival != best and (rival in trained or rival in baselines)):
        (a, half_a, n), (b, half_b, _) = value(best), value(rival)
        half_widths = sum(half for half in (half_a, half_b) if not math.isnan(half))
        certainty = "one seed, no interval" if n < 2 else "beyond the intervals" if abs(a - b) > half_widths else "within the intervals"
        words.append(f"{'above' if a > b else 'not above'} {rival} ({number(b, half_b)}; {certainty})")
    return f"By Pearson Δ on the top 20 genes, {best} is the best trained model ({number(*value(best)[:2])}): {'; '.join(words)}."


if __name__ == "__main__":
    shared.run(main)
