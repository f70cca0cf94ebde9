"""Stage 05: predictions of the held-out perturbations, tables and figures -> results/<dataset>/

    python 05_eval.py                                   the demo: every finished run beside the baselines
    python 05_eval.py --dataset norman                  as many control cells as each condition has cells
    python 05_eval.py --dataset norman --controls 50    quicker, for a machine without a GPU
    python 05_eval.py --dataset norman --run scgpt released:scgenept_go_c mine=model.pt
                                                        chosen runs; the authors' own model, fetched; a file
    python 05_eval.py --dataset norman --external GEARS=gears.h5ad      another method's predictions
    python 05_eval.py --dataset norman --predict POU3F2 CEBPE+KLF1      what these perturbations do
    python 05_eval.py --dataset norman --predict KLF1 --run ridge_ncbi additive     ... by baselines
    python 05_eval.py --dataset norman --predict KLF1 --controls-from my_cells.h5ad     in cells of one's own
    python 05_eval.py --dataset norman --towards CEBPA      which perturbations lead to these cells
    python 05_eval.py --dataset norman --cells                          cell by cell, for scanpy and cell-eval

Writes report.md with figures, metrics.csv (a value per condition), summary.csv (mean and 95% interval over
seeds), and each model's mean profiles as predictions/<model>.seed<N>.h5ad, which the next call reuses.

The prediction of a condition is the mean over control cells of what the model predicts for each; every model
gets the same control cells. Beside them stand baselines, which need no training; report.md explains them.

--cells also writes <model>.seed<N>.cells.h5ad (measured control cells, then every predicted cell) and
measured.cells.h5ad: the pair that `cell-eval run --pert-col condition --control-pert ctrl` takes.

--predict writes to results/<dataset>/predicted/<--name>/: predicted.csv (perturbations by the size of their
effect), predicted_genes.csv (the 20 genes that change most), predicted.h5ad, figures for a dozen at most, and
towards.csv for --towards. The same from Python, with the same options:

    evaluation = importlib.import_module("05_eval")
    found = evaluation.predict("--dataset", "norman", "--predict", "KLF1", "CEBPE+KLF1")
    found["condition"], found["model"], found["genes"], found["delta"]      # delta: (predictions, genes)

GEARS' predictions for --external, in its own environment (cell-gears 0.1.2; a sketch). Newer versions drop
some conditions before they split, and would then train on what is tested here: give GEARS this split.

    split = {part: [c for c in conditions if split_of[c] == part] for part in ("train", "val", "test")}
    split["train"].append("ctrl")     # split_of: from dataset.h5, without the conditions that GEARS dropped
    pickle.dump(split, open("split.pkl", "wb"))
    pert_data.prepare_split(split="custom", split_dict_path="split.pkl")
    ...                                    # train; with uncertainty=True, predict returns a pair of dicts
    targets = [[g for g in c.split("+") if g != "ctrl"] for c in split["test"]]
    predicted = gears_model.predict(targets)            # {"A" or "A_B": expression of every gene}
    X = numpy.stack([predicted["_".join(t)] for t in targets])
    obs = pandas.DataFrame({"condition": split["test"]})
    anndata.AnnData(X, obs, pert_data.adata.var).write_h5ad("gears.h5ad")
"""
import argparse
import contextlib
import csv
import difflib
import functools
import hashlib
import importlib
import itertools
import json
import math
import re
import shutil
import sys
import textwrap
import time
import urllib.parse
from collections import Counter, namedtuple
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from scipy.cluster import hierarchy
from tqdm import tqdm

import metrics

shared = importlib.import_module("01_fetch_annotations")
embed = importlib.import_module("02_embed")
prepare = importlib.import_module("03_prepare_data")
training = importlib.import_module("04_train")  # before model: it sets what torch reads when it is loaded
import model

shown = shared.shown

BUCKET = "https://czi-scgenept-public.s3.amazonaws.com/"
FINETUNED = "models/finetuned/"  # <variant>/<dataset>/<file>.pt
METRICS = {  # name: heading; higher is better, but for squared errors
    "pearson_delta_top20": "Pearson Δ top 20",
    "pearson_delta_all": "Pearson Δ all",
    "mse_top20": "MSE top 20",
    "mse_all": "MSE all",
    "pearson_top20": "Pearson top 20",
    "pearson_all": "Pearson all",
    "pearson_systema": "Pearson Systema",
    "centroid_accuracy": "centroid accuracy"}
MAIN_METRIC = "pearson_delta_top20"
BASELINES = ("non-ctrl-mean", "random", "no-change", "matching-mean", "additive")  # and ridge_<source>
FOR_ANY_TARGET = ("non-ctrl-mean", "matching-mean", "additive")  # the baselines that --predict takes by name
CEILING = "data-ceiling"
MEASURED = {  # part of the split: what that means for a prediction
    "train": "measured, for training: baselines give back what was measured", "val": "measured, for validation",
    "test": "measured, held out from training", "no": "not measured"}
TOP_K = (1, 5, 10)       # how many guesses count in the reverse question
N_DRAWS = 10             # of the random baseline, and of the halves of the ceiling
RIDGE_PENALTIES = 10.0 ** np.arange(-4, 5)  # times the mean squared length of the centred vectors
CELLS_X_GENES = 80_000   # values predicted between two steps of the progress bar
MOST_FIGURES = 12        # of --predict; for a longer list none is drawn
MOST_ROWS = 60           # of a heatmap
N_FIGURE_CONTROLS = 300  # as in the paper's Figures 8 and 9

# The paper's own figures, mean over five seeds ± 95% interval: Pearson Δ top 20 and all, MSE top 20 and all
# on Norman, then the same on Adamson (Tables 3, 4, 8-16, 18-20, 27-30)
PAPER_METRICS = ("pearson_delta_top20", "pearson_delta_all", "mse_top20", "mse_all")
PAPER_COLUMNS = {"norman": slice(0, 4), "adamson": slice(4, 8)}
PAPER = """
    scgpt                        0.665 ± 0.01 | 0.534 ± 0.02 | 0.223 ± 0.01 | 0.00421 ± 0.00 | 0.782 ± 0.02 | 0.589 ± 0.03  | 0.135 ± 0.01 | 0.00672 ± 0.00
    scgenept_ncbi                0.685 ± 0.03 | 0.548 ± 0.03 | 0.223 ± 0.03 | 0.00415 ± 0.00 | 0.779 ± 0.02 | 0.606 ± 0.03  | 0.133 ± 0.00 | 0.00654 ± 0.00
    scgenept_ncbi+uniprot        0.696 ± 0.01 | 0.557 ± 0.02 | 0.205 ± 0.02 | 0.00403 ± 0.00 | 0.784 ± 0.02 | 0.617 ± 0.03  | 0.129 ± 0.00 | 0.00620 ± 0.00
    scgenept_go_f                0.686 ± 0.01 | 0.554 ± 0.02 | 0.216 ± 0.02 | 0.00405 ± 0.00 | 0.785 ± 0.02 | 0.611 ± 0.03  | 0.128 ± 0.00 | 0.00640 ± 0.00
    scgenept_go_c                0.687 ± 0.03 | 0.550 ± 0.02 | 0.219 ± 0.01 | 0.00405 ± 0.00 | 0.791 ± 0.01 | 0.623 ± 0.02  | 0.125 ± 0.00 | 0.00622 ± 0.00
    scgenept_go_p                0.682 ± 0.02 | 0.543 ± 0.02 | 0.220 ± 0.02 | 0.00412 ± 0.00 | 0.789 ± 0.01 | 0.609 ± 0.03  | 0.127 ± 0.00 | 0.00645 ± 0.00
    scgenept_go_all              0.698 ± 0.02 | 0.554 ± 0.02 | 0.209 ± 0.02 | 0.00400 ± 0.00 | 0.787 ± 0.02 | 0.605 ± 0.03  | 0.127 ± 0.01 | 0.00641 ± 0.00
    scgpt-counts                 0.035 ± 0.00 | 0.128 ± 0.00 | 2.784 ± 0.02 | 0.1619 ± 0.00  | 0.257 ± 0.00 | 0.044 ± 0.00  | 7.776 ± 0.04 | 0.2834 ± 0.00
    scgpt-tokens                 0.143 ± 0.01 | 0.137 ± 0.00 | 0.546 ± 0.02 | 0.0115 ± 0.00  | 0.023 ± 0.05 | -0.092 ± 0.02 | 0.323 ± 0.03 | 0.0271 ± 0.00
    scgenept_ncbi+uniprot+go_f   –            | –            | –            | –              | 0.793 ± 0.00 | 0.618 ± 0.02  | 0.127 ± 0.00 | 0.00641 ± 0.00
    scgenept_ncbi+uniprot+go_c   –            | –            | –            | –              | 0.790 ± 0.01 | 0.617 ± 0.02  | 0.130 ± 0.00 | 0.00645 ± 0.00
    scgenept_ncbi+uniprot+go_p   –            | –            | –            | –              | 0.792 ± 0.00 | 0.620 ± 0.02  | 0.127 ± 0.00 | 0.00616 ± 0.00
    scgenept_ncbi+uniprot+go_all –            | –            | –            | –              | 0.793 ± 0.00 | 0.617 ± 0.00  | 0.126 ± 0.00 | 0.00627 ± 0.00
    genept_ncbi-scratch          0.625 ± 0.03 | 0.302 ± 0.02 | 0.269 ± 0.04 | 0.00904 ± 0.00 | 0.741 ± 0.00 | 0.344 ± 0.02  | 0.179 ± 0.00 | 0.02461 ± 0.00
    genept_ncbi                  0.591 ± 0.08 | 0.318 ± 0.02 | 0.266 ± 0.03 | 0.00896 ± 0.00 | 0.742 ± 0.02 | 0.340 ± 0.03  | 0.178 ± 0.00 | 0.02462 ± 0.00
    genept_ncbi+uniprot-scratch  0.640 ± 0.03 | 0.322 ± 0.02 | 0.249 ± 0.03 | 0.00874 ± 0.00 | 0.739 ± 0.00 | 0.331 ± 0.01  | 0.181 ± 0.00 | 0.02436 ± 0.00
    genept_ncbi+uniprot          0.631 ± 0.03 | 0.320 ± 0.02 | 0.256 ± 0.02 | 0.00880 ± 0.00 | 0.742 ± 0.00 | 0.339 ± 0.02  | 0.178 ± 0.00 | 0.02437 ± 0.00
    genept_go_f-scratch          0.617 ± 0.03 | 0.307 ± 0.03 | 0.259 ± 0.03 | 0.00900 ± 0.00 | 0.740 ± 0.00 | 0.334 ± 0.02  | 0.180 ± 0.00 | 0.02452 ± 0.00
    genept_go_f                  0.626 ± 0.04 | 0.313 ± 0.03 | 0.275 ± 0.05 | 0.00903 ± 0.00 | 0.741 ± 0.01 | 0.339 ± 0.01  | 0.176 ± 0.00 | 0.02438 ± 0.00
    genept_go_c-scratch          0.630 ± 0.03 | 0.312 ± 0.02 | 0.258 ± 0.05 | 0.00892 ± 0.00 | 0.747 ± 0.00 | 0.350 ± 0.00  | 0.176 ± 0.01 | 0.02454 ± 0.00
    genept_go_c                  0.573 ± 0.11 | 0.315 ± 0.02 | 0.278 ± 0.05 | 0.00903 ± 0.00 | 0.744 ± 0.01 | 0.342 ± 0.03  | 0.174 ± 0.00 | 0.02451 ± 0.00
    genept_go_p-scratch          0.620 ± 0.02 | 0.309 ± 0.01 | 0.262 ± 0.04 | 0.00899 ± 0.00 | 0.745 ± 0.00 | 0.350 ± 0.01  | 0.178 ± 0.00 | 0.02466 ± 0.00
    genept_go_p                  0.613 ± 0.04 | 0.329 ± 0.02 | 0.265 ± 0.05 | 0.00890 ± 0.00 | 0.742 ± 0.02 | 0.337 ± 0.03  | 0.180 ± 0.01 | 0.02456 ± 0.00
    genept_go_all-scratch        0.633 ± 0.01 | 0.321 ± 0.02 | 0.247 ± 0.01 | 0.00885 ± 0.00 | 0.744 ± 0.01 | 0.351 ± 0.03  | 0.179 ± 0.01 | 0.02459 ± 0.00
    genept_go_all                0.625 ± 0.03 | 0.305 ± 0.01 | 0.281 ± 0.04 | 0.00904 ± 0.00 | 0.740 ± 0.00 | 0.337 ± 0.01  | 0.181 ± 0.00 | 0.02450 ± 0.00
    GEARS                        0.710 ± 0.00 | 0.573 ± 0.00 | 0.177 ± 0.00 | 0.00510 ± 0.00 | 0.730 ± 0.00 | 0.691 ± 0.00  | 0.157 ± 0.00 | 0.00516 ± 0.00
    random                       0.604 ± 0.03 | 0.495 ± 0.00 | 0.340 ± 0.00 | 0.00488 ± 0.00 | 0.726 ± 0.03 | 0.693 ± 0.00  | 0.151 ± 0.00 | 0.00482 ± 0.00
    non-ctrl-mean                0.608 ± 0.00 | 0.571 ± 0.00 | 0.337 ± 0.00 | 0.00466 ± 0.00 | 0.729 ± 0.00 | 0.709 ± 0.00  | 0.149 ± 0.00 | 0.00456 ± 0.00"""
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

# ----------------------------------------------------------------------------------------------------------
# Models

def fetch_released(variant, args):
    """Download a variant that the authors fine-tuned on this dataset; returns the paths. File names follow no
    rule, so the bucket is asked for a list."""
    with shared.request(BUCKET, params={"list-type": 2, "prefix": FINETUNED}) as response:
        keys = re.findall(rf"<Key>{FINETUNED}([\w+-]+/[\w-]+/[\w.+-]+\.pt)</Key>", response.text)
    folder = args.root / "data" / "human" / "raw" / "finetuned"
    paths = [shared.download(BUCKET + urllib.parse.quote(FINETUNED + key), folder / key)
             for key in keys if key.startswith(f"{variant}/{args.dataset}/")]
    if not paths:
        places = sorted({key.rpartition("/")[0] for key in keys})
        sys.exit(f"error: --run released:{variant}: {shared.address(BUCKET)} has no such model of "
                 f"{args.dataset}; there are: {', '.join(places) or 'none'}")
    return paths


def named_file(item, option):
    """The name and path of a model: NAME=FILE, or FILE, which goes by its own name."""
    name, path = "", Path(item)
    if not path.exists():
        name, _, file = item.partition("=")
        path = Path(file)
    if not path.is_file():
        sys.exit(f"error: {option} {item}: no such file")
    return shared.check_name(name or path.stem.replace(".", "_"), option), path


def find_models(args):
    """The models of --run: the kit's runs (by default all finished ones), and files, as namespaces like
    those of find_runs."""
    names, files = [], []
    for item in args.run:
        if item.startswith("released:"):
            variant = item.removeprefix("released:")
            files += [(f"{variant}-released", path) for path in fetch_released(variant, args)]
        elif item.endswith(".pt"):
            files.append(named_file(item, "--run"))
        elif not is_baseline(item):
            names.append(item)
    runs = training.find_runs(args.root, args.dataset, names if args.run else None)
    for name, path in files:
        found = re.search(r"seed_?(\d+)", path.name)
        seed = int(found[1]) if found else 0
        runs.append(SimpleNamespace(name=name, seed=seed, path=path, config={}))
    return runs


def is_baseline(item):
    """Whether an item of --run is a baseline, not a run or a file."""
    return item in FOR_ANY_TARGET or item.startswith("ridge_") and not item.endswith(".pt")


def load_model(path, data):
    """The model in one of our files or a released one, with the vocabulary of the dataset."""
    try:
        try:
            net = model.load(path)
        except ValueError as error:
            if "load_released" not in str(error):
                raise
            net = model.load_released(path)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if net.config.n_tokens != data.n_tokens:
        sys.exit(f"error: {path}: has a vocabulary of {net.config.n_tokens:,} genes, the dataset one of "
                 f"{data.n_tokens:,}")
    return net


def predict_cells(net, path, token_ids, control, target_idx, args):
    """What the model from the file `path` predicts for control cells (N, G): (N, G)."""
    autocast, _ = training.mixed_precision(args.device)
    try:
        with autocast():
            return model.predict(net, token_ids, control, target_idx, args.batch_size)
    except ValueError as error:
        sys.exit(f"error: {path}: {error}: trained on other genes than these")


# ----------------------------------------------------------------------------------------------------------
# Predictions of the held-out conditions

def held_out(data, args):
    """The test conditions of a dataset over its measured genes (G), the only ones scored, as a namespace.

    rows (P,) among the conditions, names and subgroups (P,), groups {subgroup or `all`: number}, genes (G,),
    true (P, G), ctrl (G,), perturbed_mean (G,) over the training perturbations, de_idx (P, 20) among the
    measured genes, controls (see draw_controls), and the fingerprint of dataset.h5.
    """
    rows = np.flatnonzero(data.split == "test")
    if not len(rows):
        sys.exit(f"error: {args.dataset} has no test conditions (03 --split none); --predict needs none")
    groups = {**count_subgroups(filter(None, data.subgroup[rows])), "all": len(rows)}
    mean, de_idx = data.mean[:, data.measured], data.de_idx[rows]
    new_idx = np.cumsum(data.measured) - 1  # of each gene among the measured ones
    return SimpleNamespace(
        rows=rows, names=data.conditions[rows], subgroups=data.subgroup[rows], groups=groups,
        genes=data.genes[data.measured], de_idx=np.where(de_idx < 0, -1, new_idx[de_idx]),
        true=mean[rows], ctrl=mean[data.split == "ctrl"][0],
        perturbed_mean=mean[data.split == "train"].mean(0, dtype=np.float64),
        controls=draw_controls(data, rows, args.controls, args.seed),
        fingerprint=shared.fingerprint(args.root / "data" / args.dataset / "dataset.h5"))


def draw_controls(data, rows, n_controls, seed):
    """The control cells of each condition, the same for every model: n_controls, or as many as it has cells.
    A list of index arrays."""
    n_cells = np.bincount(data.cell_condition, minlength=len(data.conditions))
    controls = []
    for row in rows:
        rng = training.random_stream("controls", seed, int(row))
        controls.append(rng.choice(data.ctrl_cells, n_controls or n_cells[row]))
    return controls


def predict_means(run, data, test, args):
    """Mean predicted profiles of the test conditions, (P, G) float64, and with --cells the predicted cells as
    write_predicted_cells takes them."""
    net = load_model(run.path, data).to(args.device)
    step = max(args.batch_size or 1, CELLS_X_GENES // len(data.genes))
    means, blocks = [], []
    progress = tqdm(total=sum(map(len, test.controls)), desc=f"  {run.name}, seed {run.seed}", unit=" cells",
                    leave=False, disable=None)
    for name, cells, targets in zip(test.names, test.controls, targets_at(data, test.rows)):
        total = 0
        for start in range(0, len(cells), step):  # so that memory does not grow with the number of cells
            control = data.X[cells[start:start + step]].toarray()
            predicted = predict_cells(net, run.path, data.token_ids, control, targets, args)
            total += predicted.sum(0, dtype=np.float64)
            if args.cells:
                blocks.append((run, name, predicted))
            progress.update(len(control))
        means.append(total / len(cells))
    progress.close()
    return np.stack(means)[:, data.measured], blocks


def predict_run(run, args, data, test):
    """A run's mean predicted profiles of the test conditions (P, G), from predictions/ if they are there."""
    path = args.results / "predictions" / f"{run.name}.seed{run.seed}.h5ad"
    made = shared.made_from({"controls": args.controls or "as cells", "seed": args.seed},
                            {"dataset.h5": test.fingerprint, "model": shared.checksum(run.path)})
    cells_path = path.with_suffix(".cells.h5ad")
    outputs = [path, cells_path] if args.cells else [path]
    if not all(shared.is_current(output, made, args.force) for output in outputs):
        started = time.perf_counter()
        means, blocks = predict_means(run, data, test, args)
        obs = {
            "condition": test.names,
            "subgroup": test.subgroups,
            "model": [run.name] * len(means),
            "seed": [run.seed] * len(means),
            "n_controls": [len(cells) for cells in test.controls]}
        write_h5ad(path, made, data, means, obs, "predicted means", test.ctrl)
        if args.cells:
            control = (run, prepare.CONTROL, data.X[data.ctrl_cells].toarray())
            write_predicted_cells(cells_path, made, data, [control, *blocks])
        print(f"{run.name}, seed {run.seed}: predicted in {time.perf_counter() - started:.1f} s -> {path}")
    with shared.read_h5(path) as file:
        return file["X"][:]


def write_predicted_cells(path, made, data, blocks):
    """Write the cells that runs predicted and those that they were predicted from, [(run, condition, cells
    (n, G)), ...]."""
    X = np.concatenate([cells[:, data.measured] for _, _, cells in blocks])
    np.maximum(X, 0, out=X)  # models are linear at the end; readers refuse log-normalized values below 0
    obs = {"condition": [], "model": [], "seed": [], "target_gene": []}
    for run, condition, cells in blocks:
        obs["condition"] += [condition] * len(cells)
        obs["model"] += [run.name] * len(cells)
        obs["seed"] += [run.seed] * len(cells)
        obs["target_gene"] += [target_gene(condition)] * len(cells)
    write_h5ad(path, made, data, X, obs, "predicted cells below measured control cells")


def target_gene(label):
    """The targets of a condition joined by +, or `ctrl`: cell-eval leaves these genes out of some scores."""
    targets = [part for part in label.split("+") if part != prepare.CONTROL]
    return "+".join(targets) or prepare.CONTROL


def write_h5ad(path, made, data, X, obs, what, control=None):
    """Write X over the measured genes as AnnData (see prepare.write_h5ad), saying what it is."""
    description = f"{what}, log-normalized expression{synthetic(data)}"
    prepare.write_h5ad(path, made, X, obs, data.genes[data.measured], description, control)


def write_measured_cells(path, data, test, force):
    """Write the measured control cells and cells of the test conditions, to compare predicted ones with."""
    made = shared.made_from({}, {"dataset.h5": test.fingerprint})
    if not shared.is_current(path, made, force):
        is_shown = np.isin(data.split, ["ctrl", "test"])[data.cell_condition]
        X = data.X[np.flatnonzero(is_shown)][:, data.measured]
        labels = data.conditions[data.cell_condition[is_shown]]
        obs = {"condition": labels, "target_gene": [target_gene(label) for label in labels]}
        write_h5ad(path, made, data, X, obs, "measured cells")


# ----------------------------------------------------------------------------------------------------------
# Baselines

def random_means(data, rows, draw):
    """The profile of one training perturbation, drawn at random for each condition: (P, genes)."""
    trained = np.flatnonzero(data.split == "train")
    return data.mean[training.random_stream("random_baseline", draw).choice(trained, len(rows))]


def targets_at(data, rows):
    """The targets of conditions: a list of arrays of gene indices."""
    return [data.targets[row][data.targets[row] >= 0] for row in rows]


def trained_singles(data):
    """{target: its training conditions without another target}: [row, ...], of A+ctrl and ctrl+A."""
    rows_of, trained = {}, np.flatnonzero(data.split == "train")
    for row, targets in zip(trained, targets_at(data, trained)):
        if len(targets) == 1:
            rows_of.setdefault(targets[0], []).append(row)
    return rows_of


def baseline_means(data, targets, ridge_files):
    """Mean profiles that the deterministic baselines predict for each of P lists of targets (gene indices):
    {name: (P, genes)}. ridge_files: {source: file of vectors}."""
    mean = data.mean.astype(np.float64)
    ctrl, non_ctrl = mean[data.split == "ctrl"][0], mean[data.split == "train"].mean(0)

    # The profile of each single target that was trained on, over its labels (A+ctrl, ctrl+A)
    n_cells = np.bincount(data.cell_condition, minlength=len(data.conditions))
    profile_of = {}
    for target, rows in trained_singles(data).items():
        profile_of[target] = np.average(mean[rows], axis=0, weights=n_cells[rows])

    matching, additive = [], []
    for parts in targets:
        matching.append(np.mean([profile_of.get(target, non_ctrl) for target in parts], axis=0))
        additive.append(ctrl + sum(profile_of.get(target, ctrl) - ctrl for target in parts))
    found = {"non-ctrl-mean": [non_ctrl] * len(targets), "no-change": [ctrl] * len(targets),
             "matching-mean": matching, "additive": additive}
    for source, path in ridge_files.items():
        means = ridge_means(data, targets, path)
        if means is not None:
            found[f"ridge_{source}"] = means
    return {name: np.asarray(means) for name, means in found.items()}


def ridge_means(data, wanted, path):
    """What GenePert's ridge regression predicts for each of P lists of targets (gene indices), (P, genes):
    from the sum of the targets' language vectors to the mean response, with an intercept. None where no
    training target has a vector.

    A target without a vector gets the mean of the training targets'. The penalty is the one with the lowest
    error on the validation conditions.
    """
    vector_of = dict(zip(*embed.read_embeddings(path)))
    has_vector = np.array([gene in vector_of for gene in data.genes])
    train, val = np.flatnonzero(data.split == "train"), np.flatnonzero(data.split == "val")
    train = [row for row, targets in zip(train, targets_at(data, train)) if has_vector[targets].any()]
    if not train:
        return None
    seen = np.unique(np.concatenate(targets_at(data, train)))
    known = data.genes[seen[has_vector[seen]]]
    mean_vector = np.mean([vector_of[gene] for gene in known], axis=0, dtype=np.float64)
    vectors = np.array([vector_of.get(gene, mean_vector) for gene in data.genes], dtype=np.float64)

    # x: what describes each condition, y: its mean profile
    parts = targets_at(data, train), targets_at(data, val), wanted
    x, x_val, x_wanted = (np.array([vectors[targets].sum(0) for targets in part]) for part in parts)
    y, y_val = data.mean[train].astype(np.float64), data.mean[val].astype(np.float64)
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean

    # Ridge in its dual form: the matrix has as many rows as conditions, however wide the vectors are
    eigenvalues, basis = np.linalg.eigh(x @ x.T)
    eigenvalues = np.maximum(eigenvalues, 0)
    lowest, best = math.inf, None
    for penalty in RIDGE_PENALTIES * max(eigenvalues.mean(), 1e-12):
        weights = x.T @ (basis @ ((basis.T @ y) / (eigenvalues + penalty)[:, None]))  # (width, genes)
        error = ((y_mean + (x_val - x_mean) @ weights - y_val) ** 2).mean() if len(val) else penalty
        if error < lowest:
            lowest, best = error, y_mean + (x_wanted - x_mean) @ weights
    return best


def halves(data, rows, draw):
    """Mean profiles of two random halves of each condition's cells, (2, P, genes); NaN for a single cell."""
    rng = training.random_stream("halves", draw)
    means = np.full((2, len(rows), len(data.genes)), np.nan)
    for i, row in enumerate(rows):
        cells = rng.permutation(np.flatnonzero(data.cell_condition == row))
        if len(cells) > 1:
            for half, chosen in enumerate(np.array_split(cells, 2)):
                means[half, i] = data.X[chosen].mean(axis=0)
    return means


def all_baselines(data, test, ridge_files):
    """Yield the profiles of every baseline, as `compare` takes them."""
    measured = data.measured
    for name, means in baseline_means(data, targets_at(data, test.rows), ridge_files).items():
        yield name, "", means[:, measured], test.true
    for draw in range(N_DRAWS):
        yield "random", draw, random_means(data, test.rows, draw)[:, measured], test.true
    for draw in range(N_DRAWS):
        half, other_half = halves(data, test.rows, draw)[:, :, measured]
        yield CEILING, draw, half, other_half


# ----------------------------------------------------------------------------------------------------------
# Another method's predictions

def read_external(item, data, test, args):
    """Another method's predictions, FILE.h5ad or NAME=FILE.h5ad: obs column `condition`, X expression, per
    cell or per condition. Conditions match by their targets, genes by symbol.

    Returns what `compare` takes: name, seed "", mean profiles (P, G), NaN for conditions that the file
    lacks, and the true ones.
    """
    name, path = named_file(item, "--external")
    with prepare.open_cells(path, args.root / "data" / args.dataset) as h5ad:
        with shared.read_h5(h5ad) as file:
            genes, _ = prepare.find_genes(file, args)
            labels, label_of_cell = prepare.read_column(file["obs"], "condition")
        column_of = positions(prepare.unique_names(genes))
        missing = [gene for gene in test.genes if gene not in column_of]
        if missing:
            sys.exit(f"error: {path}: lacks {len(missing):,} of {len(test.genes):,} genes: "
                     f"{shown(missing, 3)}; it has {shown(genes, 3)}")
        blocks = functools.partial(prepare.expression_blocks, h5ad, args, len(label_of_cell), len(genes))
        is_whole = all((X.data == np.round(X.data)).all() for _, X in blocks())
        with np.errstate(invalid="ignore"):  # NaN for a label without cells
            means, _ = prepare.moments((X for _, X in blocks()), label_of_cell, len(labels), len(genes))

    means = means[:, [column_of[gene] for gene in test.genes]]
    mean_of, notations = {}, label_notations(set(data.genes), args)
    for label, mean in zip(labels, means):
        with contextlib.suppress(ValueError):  # a label that is no condition
            mean_of[frozenset(parse_perturbation(label, notations))] = mean
    profiles = np.full(test.true.shape, np.nan)
    for profile, targets in zip(profiles, targets_at(data, test.rows)):
        profile[:] = mean_of.get(frozenset(data.genes[targets]), np.nan)
    found = profiles[np.isfinite(profiles).all(1)]
    if not len(found):
        sys.exit(f"error: {path}: obs/condition has none of the {len(test.rows)} test conditions, such as "
                 f"{test.names[0]!r}, or NaN in all of them")
    print(f"{name}: {len(found)} of the {len(test.rows)} test conditions are in {path}")
    check_values(found, is_whole, test.ctrl, path)
    return name, "", profiles, test.true


def check_values(profiles, is_whole, ctrl, path):
    """End the run for profiles (n, G) that cannot be log-normalized expression; warn of another scale.

    is_whole: whether all values were whole numbers; ctrl (G,): the dataset's control profile.
    """
    is_near_zero = (profiles ** 2).mean() < ((profiles - ctrl) ** 2).mean()
    if profiles.min() < -1 or (profiles.min() < 0 and is_near_zero):
        looks_like = "values around 0, as changes and z-scores have"
    elif is_whole or profiles.max() > prepare.USUAL_LOG:
        looks_like = f"{'whole ' if is_whole else ''}values up to {profiles.max():,.0f}, as counts have"
    else:
        ratio = np.expm1(profiles).sum(1).mean() / np.expm1(ctrl).sum()
        if not 0.5 < ratio < 2:
            print(f"warning: {path}: before the logarithm, its profiles sum to {ratio:.1f} times what the "
                  "dataset's do; expected the units of the dataset", file=sys.stderr)
        return
    sys.exit(f"error: {path}: {looks_like}; expected log-normalized expression, in the units of the dataset")


# ----------------------------------------------------------------------------------------------------------
# Scores

def score(name, seed, predicted, true, test):
    """Rows (model, seed, condition, subgroup, metric, value) of predicted and true profiles (P, G). A
    condition that one of them lacks (NaN) has no row."""
    scored = np.flatnonzero(np.isfinite(predicted + true).all(1))
    scores = metrics.evaluate(predicted[scored], true[scored], test.ctrl, test.de_idx[scored])
    scores |= metrics.evaluate_specific(predicted[scored], true[scored], test.perturbed_mean)
    rows = []
    for i, p in enumerate(scored):
        for metric in METRICS:
            value = float(scores[metric][i])
            if not math.isnan(value):  # centroid accuracy of a single condition
                rows.append((name, seed, test.names[p], test.subgroups[p], metric, value))
    return rows


def summarize(rows):
    """Rows of `score` -> {(model, subgroup or all, metric): (mean, half width of the 95% interval, n seeds)}.
    The value of a seed is the mean over conditions."""
    by_seed = {}
    for name, seed, _, subgroup, metric, value in rows:
        for group in dict.fromkeys(["all", subgroup or "all"]):
            by_seed.setdefault((name, group, metric), {}).setdefault(seed, []).append(value)
    summary = {}
    for key, seeds in by_seed.items():
        means = [np.mean(values) for values in seeds.values()]
        summary[key] = (*metrics.interval95(means), len(means))
    return summary


def by_condition(rows, metric):
    """{model: {condition: mean over seeds}} of one metric."""
    found = {}
    for name, _, condition, _, of_metric, value in rows:
        if of_metric == metric:
            found.setdefault(name, {}).setdefault(condition, []).append(value)
    for values in found.values():
        for condition, of_seeds in values.items():
            values[condition] = np.mean(of_seeds)
    return found


def n_above(values, others):
    """In how many conditions a value is above the other one, {condition: value} each."""
    return sum(value > others.get(condition, math.inf) for condition, value in values.items())


def write_csv(path, header, rows):
    """Write a table; NaN becomes an empty field."""
    with shared.replacing(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        for row in rows:
            writer.writerow("" if isinstance(value, float) and math.isnan(value) else value for value in row)


def compare(profiles, baselines, test):
    """Score the profiles of models (trained ones and other methods) and of baselines, (model, seed, predicted
    (P, G), true (P, G)) each, and decide which model may be called best, as a namespace.

    rows, summary: see `score` and `summarize`; names: all that has scores; models: their names; unranked:
    {model: why it is not ranked}; found_first: {model: share of the conditions (3,) whose own prediction is
    among the first 1, 5, 10 guesses of the reverse question, mean over seeds}, by chance at the end.
    """
    rows, shares = [], {}
    for name, seed, predicted, true in itertools.chain(profiles, baselines):
        rows += score(name, seed, predicted, true, test)
        if np.isfinite(predicted + true).all():
            found = metrics.found_among(predicted, true, test.ctrl, TOP_K)
            shares.setdefault(name, []).append(found.mean(0))
    models = list(dict.fromkeys(name for name, *_ in profiles))
    errors, unranked = by_condition(rows, "mse_all"), {}
    for name in models:
        if len(errors[name]) < len(test.rows):
            unranked[name] = f"predictions of only {len(errors[name])} of the {len(test.rows)} conditions"
        elif n_above(errors["no-change"], errors[name]) < len(test.rows) / 2:
            unranked[name] = "MSE over all genes above that of no-change on most conditions"
    found_first = {name: np.mean(of_seeds, axis=0) for name, of_seeds in shares.items()}
    found_first["chance"] = np.minimum(np.divide(TOP_K, len(test.rows)), 1)
    return SimpleNamespace(rows=rows, summary=summarize(rows), names=list(errors), models=models,
                           unranked=unranked, found_first=found_first)


# ----------------------------------------------------------------------------------------------------------
# Report

def number(mean, half_width=math.nan, metric=MAIN_METRIC):
    """`0.665 ± 0.010`; squared errors, which may be small, with three significant digits."""
    if math.isnan(mean):
        return ""
    form, half_form = ("#.3g", "#.2g") if metric.startswith("mse") else (".3f", ".3f")
    return f"{mean:{form}}" + ("" if math.isnan(half_width) else f" ± {half_width:{half_form}}")


def value_of(outcome, name, group="all", metric=MAIN_METRIC):
    """Mean and half width of a model's interval; NaN where it has none."""
    return outcome.summary.get((name, group, metric), (math.nan, math.nan))[:2]


def markdown_table(header, rows):
    """A Markdown table whose columns also line up in a terminal."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    lines = [" | ".join(map(str.ljust, row, widths)) for row in cells]
    return "\n".join(f"| {line} |" for line in lines)


def marked_column(outcome, group, metric):
    """A column: each model's number, of those that are ranked the best in bold, the second in italics."""
    texts, values = {}, {}
    for name in outcome.names:
        text = number(*value_of(outcome, name, group, metric), metric)
        texts[name] = text
        if text and name not in (CEILING, *outcome.unranked):
            values[name] = float(text.split()[0])  # as printed: equal numbers look equal
    ranked = sorted(set(values.values()), reverse=not metric.startswith("mse"))
    mark_of = dict(zip(ranked, ("**", "*")))
    for name, value in values.items():
        mark = mark_of.get(value, "")
        texts[name] = f"{mark}{texts[name]}{mark}"
    return list(texts.values())


def paper_rows(text, columns=slice(None)):
    """{model: [cell, ...]} of one of the paper's tables above, or of some of its columns."""
    rows = {}
    for line in text.strip().splitlines():
        name, cells = line.split(None, 1)
        rows[name] = [cell.strip() for cell in cells.split("|")][columns]
    return rows


def table_with_paper(names, columns, paper, paper_header):
    """A Markdown table of {heading: column}, a row per model, with the paper's own figures at its right."""
    header, rows = ["model", *columns], list(zip(names, *columns.values()))
    if paper:
        header += [f"paper: {heading}" for heading in paper_header]
        rows = [(*row, *paper.get(row[0], [""] * len(paper_header))) for row in rows]
    return markdown_table(header, rows)


def table_by_subgroup(outcome, groups, metric, paper):
    """A Markdown table of one metric: models x subgroups, {subgroup: number of conditions}."""
    columns = {f"{group} ({n})": marked_column(outcome, group, metric) for group, n in groups.items()}
    return table_with_paper(outcome.names, columns, paper, PAPER_SUBGROUPS)


def best_of(names, outcome):
    """The one of these models with the highest main metric; None if there are none."""
    return max(names, key=lambda name: value_of(outcome, name)[0], default=None)


def best_model(outcome):
    """The best ranked model that is not a shuffled control; None if no model is ranked."""
    ranked = [name for name in outcome.models if name not in outcome.unranked and is_informative(name)]
    return best_of(ranked, outcome)


def best_baseline(outcome):
    """The best one of the baselines, without the ceiling."""
    return best_of([name for name in outcome.names if name not in (*outcome.models, CEILING)], outcome)


def main_models(outcome):
    """The models beside the mean and the best baseline; all baselines where there is no model."""
    if not outcome.models:
        return outcome.names
    return list(dict.fromkeys([*outcome.models, "non-ctrl-mean", best_baseline(outcome)]))


def verdict(outcome):
    """What came out: a few sentences, and a table of the best model beside its rivals (Markdown)."""
    best = best_model(outcome)
    reasons = "; ".join(f"{name} ({reason})" for name, reason in outcome.unranked.items())
    reasons = f" Not ranked: {reasons}." if reasons else ""
    if best is None:
        return "No model is ranked: only baselines are compared." + reasons, ""

    # The rivals, and in how many conditions the best model is better than each
    variant, comma, labels = best.partition(",")
    shuffled = f"{variant}-shuffled{comma}{labels}"
    candidates = [best, "non-ctrl-mean", shuffled, f"{variant}-shuffled", "scgpt", best_baseline(outcome),
                  "no-change"]
    names = [name for name in dict.fromkeys(candidates) if name in outcome.names]
    values = by_condition(outcome.rows, MAIN_METRIC)
    table = []
    for name in names:
        n_better = f"{n_above(values[best], values[name])} of {len(values[best])}" if name != best else ""
        mse = number(*value_of(outcome, name, metric="mse_top20"), "mse")
        table.append([name, number(*value_of(outcome, name)), mse, n_better])

    # In words
    pearson, _ = value_of(outcome, best)
    above = [name for name in names if name != best and value_of(outcome, name)[0] >= pearson]
    beats = "does NOT beat" if "non-ctrl-mean" in above else "beats"
    text = (f"By Pearson Δ on the top 20 genes, the best model, {best} ({table[0][1]}), {beats} the mean of "
            f"the training perturbations ({table[1][1]}).")
    mse, mse_of_mean = (value_of(outcome, name, metric="mse_top20")[0] for name in (best, "non-ctrl-mean"))
    if mse > mse_of_mean:
        text += " By squared error on these genes it is worse than that mean."
    others = [f"{name} ({number(*value_of(outcome, name))})" for name in above if name != "non-ctrl-mean"]
    if others:
        text += f" It is not above {' and '.join(others)}."
    if any(outcome.summary[run.name, "all", MAIN_METRIC][2] < 2 for run in outcome.runs):
        text += " One seed has no interval: train several (04 --seed 42 23 89) before you trust a gap."
    header = ["model", "Pearson Δ top 20", "MSE top 20", f"{best} better in"]
    return text + reasons, markdown_table(header, table)


REPORT = """\
# {dataset}: predicting held-out perturbations

{synthetic}

Compared on {n_conditions} held-out conditions and {n_genes:,} genes.

{verdict}

{rivals}

Mean over the test conditions, then mean ± 95% interval (t) over the seeds; **best**, *second best*.
**Pearson Δ** correlates the predicted with the measured change from the mean of the control cells, on all
genes or on the 20 that are most differentially expressed; 1 is perfect, 0 is guessing. **MSE** is the mean
squared error of log-normalized expression. **Pearson Systema** takes the change from the mean of the training
perturbations instead, and **centroid accuracy** is the share of other conditions that are farther from a
prediction than its own: where predictions look alike, these two are near chance, 0 and 0.5.

Subgroups: unseen_single, the target is perturbed in no training condition; combo_seen0, 1, 2: that many of
the targets are. `-shuffled`: a control whose texts were permuted among the genes; what it achieves does not
come from the texts.

Baselines, which need no training:

- `non-ctrl-mean`: the mean profile of the training perturbations
- `random`: the profile of one training perturbation drawn at random; ten draws
- `no-change`: the mean of the control cells
- `matching-mean`: the mean of the parts' training profiles; non-ctrl-mean for new parts (Systema)
- `additive`: control plus the parts' training effects; 0 for new parts (Ahlmann-Eltze et al. 2025)
- `ridge_<source>`: ridge regression from the sum of the targets' vectors to the response (GenePert)
- `data-ceiling`: no prediction; half of a condition's cells scored as if they predicted the other half. With
  few cells both are noisy, and a good model can be above it.

Vectors of the ridge regressions: {vectors}.

![The split](split.png)

## All test conditions

{all_conditions}

## By subgroup: Pearson Δ top 20

{pearson_by_subgroup}

## By subgroup: MSE top 20

{mse_by_subgroup}

## Which perturbation was it?

The reverse question: the measured change of a test condition ranks all {n_conditions} predicted changes by
correlation. Share of conditions whose own prediction is among the first 1, 5 and 10:

{found_first}

![Bars by subgroup](subgroups.png)

{scatter}

## Runs

{runs}

{training}

Control cells a condition: {n_controls}, drawn with seed {seed}, the same for all models.
"""
SYNTHETIC = ("**SYNTHETIC data**: simulated cells of invented genes. The numbers show that the kit works and "
             "say nothing about biology.")


def write_report(path, args, data, test, outcome):
    """Write report.md: the verdict, what the numbers mean, tables by metric and by subgroup, the runs."""
    text, rivals = verdict(outcome)
    n_seeds = [outcome.summary[name, "all", "mse_all"][2] if name in outcome.models else "–"
               for name in outcome.names]
    columns = {heading: marked_column(outcome, "all", metric) for metric, heading in METRICS.items()}
    paper = paper_rows(PAPER, PAPER_COLUMNS[args.dataset]) if args.dataset in PAPER_COLUMNS else {}
    paper_by_subgroup = paper_rows(PAPER_BY_SUBGROUP) if args.dataset == "norman" else {}
    found = [[name, *(f"{share:.2f}" for share in shares)] for name, shares in outcome.found_first.items()]
    runs = []
    for run in outcome.runs:
        best_mse = number(run.config.get("best_val_mse", math.nan), metric="mse")
        runs.append([run.name, run.seed, run.config.get("best_epoch", "–"), best_mse,
                     run.config.get("n_parameters", "–"), shared.checksum(run.path)])
    report = REPORT.format(
        dataset=args.dataset,
        synthetic=SYNTHETIC if data.synthetic else "",
        n_conditions=len(test.rows),
        n_genes=len(test.genes),
        verdict=text,
        rivals=rivals,
        vectors=", ".join(file.name for file in outcome.ridge_files.values()) or "none",
        all_conditions=table_with_paper(outcome.names, {"seeds": n_seeds, **columns}, paper,
                                        [METRICS[metric] for metric in PAPER_METRICS]),
        pearson_by_subgroup=table_by_subgroup(outcome, test.groups, MAIN_METRIC, paper_by_subgroup),
        mse_by_subgroup=table_by_subgroup(outcome, test.groups, "mse_top20", {}),
        found_first=markdown_table(["model", "first 1", "first 5", "first 10"], found),
        scatter="![Predicted against measured change, of the best model](scatter.png)" if rivals else "",
        runs=markdown_table(["model", "seed", "best epoch", "validation MSE", "parameters",
                             "SHA-256 of its file"], runs),
        training="![Training](training.png)" if any(run.config for run in outcome.runs) else "",
        n_controls=args.controls or "as many as it has cells",
        seed=args.seed)
    shared.write_text(path, re.sub("\n{3,}", "\n\n", report))  # where a part is empty


def count_subgroups(subgroups):
    """{subgroup: number of conditions}, single targets first."""
    return Counter(sorted(subgroups, key=lambda group: (group != "unseen_single", group)))


def print_table(outcome, test, data):
    """Print the main metric, a row per model, with the intervals and subgroups that fit the terminal.

    The report has the other baselines."""
    width = shutil.get_terminal_size().columns
    for groups, n_values in ((test.groups, 2), (test.groups, 1), (["all"], 2)):
        header = ["model", *(group.removeprefix("combo_").replace("_", " ") for group in groups)]
        rows = [["(conditions)", *(test.groups[group] for group in groups)]]
        for name in main_models(outcome):
            values = [number(*value_of(outcome, name, group)[:n_values]) for group in groups]
            variant, *labels = name.split(",")  # labels on lines of their own: names can be long
            rows.append([variant, *values])
            rows += [[f"  {label}", *([""] * len(groups))] for label in labels]
        table = markdown_table(header, rows)
        if table.index("\n") <= width:
            break
    title = ("Pearson Δ top 20: correlation of predicted with measured change, 20 most changed genes"
             + synthetic(data))
    print(f"\n{wrapped(title, '')}\n\n{table}\n\n{wrapped(verdict(outcome)[0], '')}\n")


# ----------------------------------------------------------------------------------------------------------
# Figures of the report

def draw_split(path, data, title):
    """Draw the conditions of the split by subgroup (the paper's Figure 7)."""
    labels, sizes, colors = [], [], []
    for part, color in zip(("train", "val", "test"), shared.COLORS):
        for group, n in count_subgroups(data.subgroup[data.split == part]).items():
            labels.append(f"{part} {group.replace('_', ' ')}".strip())
            sizes.append(n)
            colors.append(color)
    figure = shared.new_figure(6.5, 0.6 + 0.35 * len(labels), title)
    axes = figure.subplots()
    axes.bar_label(axes.barh(labels, sizes, color=colors), padding=3)
    axes.invert_yaxis()
    axes.set_xlabel("conditions")
    shared.save_figure(figure, path)


def bar_style(name, place):
    """Colours of a model's bars: the ceiling in white, the mean in grey, others by their place."""
    if name == CEILING:
        return {"color": "white", "edgecolor": "black"}
    if name == "non-ctrl-mean":
        return {"color": shared.GREY}
    n_rounds, i = divmod(place, len(shared.COLORS))
    return {"color": shared.COLORS[i], "edgecolor": "white", "hatch": ("", "//", "..", "xx")[n_rounds % 4]}


def draw_bars(path, outcome, groups, title):
    """Draw bars with 95% intervals: Pearson delta and squared error on the top 20 genes, by subgroup (the
    paper's Figures 10 and 14 to 16)."""
    names = list(dict.fromkeys([*main_models(outcome), CEILING]))
    figure = shared.new_figure(np.clip(1.2 + 0.22 * len(names) * len(groups), 6.5, 30), 7.5, title)
    upper, lower = figure.subplots(2, 1)
    draw_bar_panel(upper, outcome, names, groups, MAIN_METRIC)
    draw_bar_panel(lower, outcome, names, groups, "mse_top20")

    # Intervals over two seeds can be huge: clip the axes
    upper.set_ylim(*np.clip(upper.get_ylim(), -1.05, 1.05))
    largest = np.nanmax([bar.get_height() for bar in lower.patches])
    lower.set_ylim(0, min(lower.get_ylim()[1], 1.5 * largest))
    add_legend(figure)
    shared.save_figure(figure, path)


def draw_bar_panel(axes, outcome, names, groups, metric):
    """Draw the bars of one metric, a group of models a subgroup."""
    x, width = np.arange(len(groups)), 0.85 / len(names)
    for i, name in enumerate(names):
        values = [value_of(outcome, name, group, metric) for group in groups]
        means, half_widths = np.transpose(values)
        place = x + (i - (len(names) - 1) / 2) * width
        axes.bar(place, means, 0.94 * width, yerr=half_widths, label=name, capsize=2, error_kw={"lw": 1},
                 **bar_style(name, i))
    axes.axhline(0, color="black", lw=0.8)
    axes.set_ylabel(f"{METRICS[metric]} DE genes")
    axes.set_xlim(-0.5, len(groups) - 0.5)
    axes.set_xticks(x, [group.replace("_", " ") for group in groups])


def draw_scatter(path, name, predicted, outcome, test, label):
    """Draw a model's predicted (P, G) against the measured change of every gene, the top 20 in colour, for
    nine test conditions from the one that it predicts best to the worst."""
    pearson_of = by_condition(outcome.rows, MAIN_METRIC)[name]
    order = sorted(pearson_of, key=pearson_of.get, reverse=True)
    places = np.linspace(0, len(order) - 1, min(9, len(order))).astype(int)
    n_rows = math.ceil(len(places) / 3)
    title = (f"{label}: {name}\nchange of each gene, top 20 in colour; line: predicted = measured; number: "
             "Pearson Δ\nfrom the best to the worst predicted condition")
    figure = shared.new_figure(6.5, 0.8 + 2.2 * n_rows, title)
    idx_of = positions(test.names)
    for panel, place in enumerate(places, 1):
        condition = order[place]
        i = idx_of[condition]
        x, y = test.true[i] - test.ctrl, predicted[i] - test.ctrl
        top = test.de_idx[i][test.de_idx[i] >= 0]
        axes = figure.add_subplot(n_rows, 3, panel)
        axes.axline((0, 0), slope=1, color="black", lw=0.5)
        axes.scatter(x, y, s=4, color=shared.GREY)
        axes.scatter(x[top], y[top], s=12, color=shared.COLORS[1])
        axes.axis("equal")
        axes.set_title(f"{condition}: {pearson_of[condition]:.2f}", fontsize="small")
    figure.supxlabel("measured change")
    figure.supylabel("predicted change")
    shared.save_figure(figure, path)


def draw_training(path, runs, title):
    """Draw the validation error of the kit's runs by epoch, from their log.csv."""
    figure = shared.new_figure(6.5, 4.5, title)
    axes = figure.subplots()
    colors = {}
    for run in runs:
        label = None if run.name in colors else run.name  # one entry of the legend a model
        color = colors.setdefault(run.name, shared.COLORS[len(colors) % len(shared.COLORS)])
        log = np.genfromtxt(run.path.with_name("log.csv"), delimiter=",", names=True, ndmin=1)
        axes.plot(log["epoch"], log["val_mse"], color=color, label=label)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch")
    axes.set_ylabel("validation error (MSE)")
    add_legend(figure, 2)
    shared.save_figure(figure, path)


def add_legend(figure, n_columns=4):
    """Put one legend below all panels."""
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=n_columns, frameon=False, fontsize="small")


# ----------------------------------------------------------------------------------------------------------
# --predict: which perturbations, in which cells

def read_perturbations(args, data):
    """The perturbations of --predict, {name: [gene index, ...]}. Genes that the dataset lacks join it."""
    labels = []
    for item in args.predict:
        if item == "all-singles":
            labels += list(data.genes)
        elif Path(item).is_file() or item.endswith((".txt", ".tsv", ".csv")):
            lines = [line.strip() for _, line in shared.read_lines(item)]
            labels += [line for line in lines if line and not line.startswith("#")]
        else:
            labels.append(item)
    if not labels:
        sys.exit(f"error: --predict {' '.join(args.predict)}: no perturbation in it")

    vocab = read_vocab(args, data)
    known = set(data.genes) | set(vocab)
    notations = label_notations(known, args)
    wanted, problems = {}, []
    for label in labels:
        try:
            genes = parse_perturbation(label, notations)
            if not genes:
                raise ValueError("nothing is perturbed")
            for gene in genes:
                if gene not in known:  # ten are shown, and looking for a likely name takes a while
                    raise ValueError(nearest(gene, known) if len(problems) < 10 else "unknown")
            wanted.setdefault(frozenset(genes), genes)  # A+B and B+A are one
        except ValueError as error:
            problems.append(f"{label!r} ({error})")
    if problems:
        message = (f"{len(problems):,} of {len(labels):,} are not in the dataset or its vocabulary: "
                   f"{shown(problems, 10)}")
        if not (args.skip_unknown and wanted):
            advice = "; --skip-unknown goes on without them" if wanted else ""
            sys.exit(f"error: --predict: {message}{advice}")
        print(f"left out: {message}")
    add_genes(data, list(itertools.chain(*wanted.values())), vocab)
    idx_of = positions(data.genes)
    return {"+".join(genes): [idx_of[gene] for gene in genes] for genes in wanted.values()}


def positions(names):
    """{name: its position}"""
    return {name: i for i, name in enumerate(names)}


def label_notations(known, args):
    """How labels may be written, in the order to try: `A+B`, as in the user's own file, `A_B` (GEARS)."""
    plus = {"control": [], "separator": "+", "target_regex": None, "upper_case": False}
    own = json.loads(shared.recorded_made_from(args.root / "data" / args.dataset / "dataset.h5"))["options"]
    return [prepare.make_rules(SimpleNamespace(**options), known)
            for options in (plus, plus | own, plus | {"separator": "_"})]


def parse_perturbation(label, notations):
    """The genes of a label, by the first notation that gives known genes only; else as `A+B`."""
    for rules in notations:
        genes = prepare.parse_condition(label, rules)
        if rules.genes.issuperset(genes):
            return genes
    return prepare.parse_condition(label, notations[0])


def read_vocab(args, data):
    """The vocabulary {symbol: token_id} that the dataset was made with; empty where it is not at hand."""
    path = args.root / "data" / "human" / "scgpt" / "vocab.json"
    is_at_hand = path.exists() and shared.fingerprint(path) == data.vocab
    return shared.read_json(path, int) if is_at_hand else {}


def nearest(gene, known):
    """What an unknown gene may have meant, in any case."""
    name_of = {name.upper(): name for name in known}
    found = difflib.get_close_matches(gene.upper(), name_of, 1, cutoff=0.75)
    return f"did you mean {name_of[found[0]]}?" if found else "nothing comes near"


def add_genes(data, targets, vocab):
    """Let those of the targets [gene, ...] that the dataset lacks join it as unmeasured genes."""
    known = set(data.genes)
    new = [gene for gene in dict.fromkeys(targets) if gene not in known]
    if new:
        print(f"not in the dataset, added as unmeasured genes: {shown(new)}")
        data.genes = np.append(data.genes, new)
        data.token_ids = np.append(data.token_ids, [vocab[gene] for gene in new])
        data.measured = np.pad(data.measured, (0, len(new)))
        data.mean = np.pad(data.mean, ((0, 0), (0, len(new))))
        data.X.shape = len(data.cell_condition), len(data.genes)
    without_token = set(targets) & set(data.genes[data.token_ids == data.pad_id])
    if without_token:
        print(f"not in the vocabulary, so that models cannot tell them apart: {shown(sorted(without_token))}")


def add_language(net, run, data, args):
    """Give a model the language vectors of genes that joined the dataset, from the files that its run was
    trained with."""
    if not net.config.languages:
        return
    is_new = net.language_rows.numpy()[data.token_ids] < 0  # none in a released model
    if not is_new.any():
        return
    genes, vectors = data.genes[is_new], {}
    files = run.config.get("embeddings", {})
    for source in net.config.languages:
        if source not in files:
            sys.exit(f"error: --predict: {run.path} has no vector for {shown(genes)}; name its run, "
                     "not its file")
        folder = args.root / "data" / shared.space_of(args.dataset) / "embeddings"
        vector_of = dict(zip(*embed.read_embeddings(folder / files[source])))
        without = [gene for gene in genes if gene not in vector_of]
        if without:
            sys.exit(f"error: --predict: {files[source]} has no vector for {shown(without)}, needed by "
                     f"{run.name}; choose other models with --run")
        vectors[source] = np.stack([vector_of[gene] for gene in genes])
    net.add_language(data.token_ids[is_new], vectors)


def read_own_cells(path, args, data):
    """The cells of a user's AnnData file, CSR (cells, genes in common), log-normalized, and which of the
    dataset's genes these are, bool (G,): measured ones that the file has.

    Cells on another scale than the dataset's (see relative_scale) are brought to it.
    """
    with prepare.open_cells(path, args.root / "data" / args.dataset) as h5ad:
        X, genes = prepare.read_cells(h5ad, args)
    column_of = positions(genes)
    columns = np.array([column_of.get(gene, -1) for gene in data.genes])
    in_common = data.measured & (columns >= 0)
    n_genes, n_common = data.measured.sum(), in_common.sum()
    summary = f"{path}: all {X.shape[0]:,} cells; {n_common:,} of the {n_genes:,} measured genes are in it"
    if not n_common:
        sys.exit(f"error: {summary}; see --gene-key and --upper-case")
    print(summary)
    if n_common < n_genes / 2:
        print("warning: fewer than half of the genes: predictions rest on these few", file=sys.stderr)

    X = X[:, columns[in_common]]
    scale = relative_scale(X, data.X[data.ctrl_cells[:1000]][:, in_common])
    if not 0.8 < scale < 1.25:
        print(f"{path}: its values are {scale:.2f} times the dataset's before the logarithm: scaled to it")
        X = prepare.normalize(X.expm1(), np.full(X.shape[0], 1 / scale))
    return X, in_common


def relative_scale(cells, control):
    """How many times larger log-normalized cells are than control cells (CSR, the same genes), before the
    logarithm: by their totals or by a typical gene, whichever is nearer to 1. Another unit changes both; a
    perturbation can change the total by a few genes, or many genes at the same total."""
    mean, control_mean = (np.asarray(X.expm1().mean(axis=0)).ravel() for X in (cells, control))
    if not (mean.any() and control_mean.any()):
        return 1.0
    is_high = control_mean >= np.median(control_mean[control_mean > 0])
    typical = np.median(mean[is_high] / control_mean[is_high])
    total = mean.sum() / control_mean.sum()
    return min(total, typical, key=lambda ratio: abs(math.log(max(ratio, 1e-9))))


def choose_cells(data, wanted, args):
    """Draw the cells to predict from, out of the screen's control cells or of --controls-from. Returns the
    dataset with: control (N, G), their expression, and control_mean (G,); seen, the genes that models see
    (indices); ctrl (G,), the mean of the screen's control cells; conditions_of {set of targets: [condition,
    ...]}, with A+ctrl and ctrl+A as one.

    Of a file's genes those count that the dataset has, too: data.measured. Models also see the targets, of
    expression 0 where the file lacks them.
    """
    rng = training.random_stream("predict", args.seed)
    n_cells = args.controls or N_FIGURE_CONTROLS
    if args.controls_from:
        X, data.measured = read_own_cells(args.controls_from, args, data)
        data.seen = np.union1d(np.flatnonzero(data.measured), list(itertools.chain(*wanted.values())))
        data.control = np.zeros((n_cells, len(data.genes)), dtype=np.float32)
        data.control[:, data.measured] = X[rng.choice(X.shape[0], n_cells)].toarray()
    else:
        data.seen = np.arange(len(data.genes))
        data.control = data.X[rng.choice(data.ctrl_cells, n_cells)].toarray()
    data.control_mean = data.control.mean(0, dtype=np.float64)
    data.ctrl = data.mean[data.split == "ctrl"][0].astype(np.float64)
    data.conditions_of = {}
    for condition, targets in enumerate(targets_at(data, range(len(data.conditions)))):
        data.conditions_of.setdefault(frozenset(targets), []).append(condition)
    return data


# ----------------------------------------------------------------------------------------------------------
# --predict: predicting

def predict_wanted(wanted, data, runs, ridge_files, args, folder=None):
    """Predict the wanted perturbations in the cells of choose_cells. Returns the runs, and baselines as runs
    of path None. Each has

    changes {name: (G,) float32}: the mean change from the cells predicted from, by the wanted perturbations,
    the single targets of pairs and, in a trained run, "" (nothing is perturbed). What a baseline says nothing
    of is missing.
    cells {name: (N, G)}: the predicted cells, where figures or --cells need them.

    With `folder`, the changes of trained runs lie there on disk, where the same command finds them again.
    """
    targets_of = dict(wanted)
    for targets in wanted.values():
        for target in targets:
            targets_of.setdefault(data.genes[target], [target])
    keep = wanted if args.cells or len(wanted) <= MOST_FIGURES else {}
    names, baselines = list(dict.fromkeys(filter(is_baseline, args.run))), []
    if names or not runs:  # first, since a wrong name costs only seconds here
        baselines = baseline_runs(names, ridge_files, targets_of, keep, data)
    for baseline in baselines:
        silent = [name for name in wanted if name not in baseline.changes]
        if silent:
            print(f"{baseline.name} says nothing of {shown(silent)}: never perturbed alone in training "
                  f"({len(silent):,} of {len(wanted):,})")
    n_models = len({run.name for run in runs + baselines})
    advice = " (--controls 20 is quicker)" if len(wanted) > MOST_FIGURES and not args.controls else ""
    print(f"perturbations: {len(wanted):,}; models: {n_models}; cells for each: {len(data.control)}{advice}")
    predict_changes(runs, targets_of | {"": []}, keep, data, args, folder)
    runs = runs + baselines
    if not any(name in run.changes for run in runs for name in wanted):
        sys.exit(f"error: --run {' '.join(names)}: says nothing of {shown(list(wanted))}")
    return runs


def stored_changes(run, targets_of, data, folder):
    """The array (perturbations, G) for the changes that a run predicts, 0 where nothing was predicted yet: in
    memory, or in a file of `folder` (run.stored) that is named after what decides them. What a call that was
    interrupted leaves there stays until the same call is finished."""
    zeros = np.zeros((len(targets_of), len(data.genes)), dtype=np.float32)
    if folder is None:
        return zeros
    inputs = repr([list(data.genes[data.seen]), targets_of, shared.checksum(run.path)])
    digest = hashlib.sha256(data.control.tobytes() + inputs.encode()).hexdigest()
    run.stored = folder / f".{run.name}.seed{run.seed}.{digest[:16]}.npy"
    if not run.stored.exists():
        with shared.replacing(run.stored) as partial, open(partial, "wb") as file:
            np.save(file, zeros)
    return np.asarray(np.load(run.stored, mmap_mode="r+"))


def predict_changes(runs, targets_of, keep, data, args, folder):
    """Predict the changes by {name: targets} with trained runs, and the cells of the names in `keep`."""
    seen = data.seen
    control = data.control.take(seen, axis=1)
    for run in runs:  # all files before the first prediction: a full disk is noticed before the hours
        run.changes = dict(zip(targets_of, stored_changes(run, targets_of, data, folder)))
        run.cells = {}
    progress = tqdm(total=len(runs) * len(targets_of), unit=" predictions", leave=False, disable=None)
    for run in runs:
        net = load_model(run.path, data)
        add_language(net, run, data, args)
        net.to(args.device)
        for name, change in run.changes.items():
            progress.update()
            if change[seen].all() and name not in keep:  # by an earlier command, which was interrupted
                continue
            target_idx = np.searchsorted(seen, targets_of[name])
            predicted = data.control.copy()
            predicted[:, seen] = predict_cells(net, run.path, data.token_ids[seen], control, target_idx, args)
            change[:] = predicted.mean(0, dtype=np.float64) - data.control_mean
            if name in keep:
                run.cells[name] = predicted
    progress.close()


def baseline_runs(names, ridge_files, targets_of, keep, data):
    """Baselines as runs: those with the names, or all. Each predicts the change from the mean of the screen's
    control cells by {name: targets}; its cells are those predicted from with this change added."""
    targets = list(targets_of.values())
    there = [*FOR_ANY_TARGET, *(f"ridge_{source}" for source in ridge_files)]
    if names:
        ridge_files = {source: path for source, path in ridge_files.items() if f"ridge_{source}" in names}
    profiles = baseline_means(data, targets, ridge_files)
    del profiles["no-change"]
    singles = trained_singles(data).keys()
    new = [name for name in targets_of if singles.isdisjoint(targets_of[name])]
    runs = []
    for model_name in names or profiles:
        if model_name not in profiles:
            sys.exit(f"error: --run {model_name}: no such baseline here; there are: {', '.join(there)}")
        changes = dict(zip(targets_of, (profiles[model_name] - data.ctrl).astype(np.float32)))
        if model_name in ("additive", "matching-mean"):
            for name in new:
                del changes[name]
        own_cells = {name: data.control + changes[name] for name in keep if name in changes}
        runs.append(SimpleNamespace(name=model_name, seed=0, path=None, changes=changes, cells=own_cells))
    return runs


def changes_of(runs, name):
    """{model: (runs, G) float64}: the changes by a perturbation, of the models that say something of it."""
    found = {}
    for run in runs:
        if name in run.changes:
            found.setdefault(run.name, []).append(run.changes[name])
    return {model_name: np.array(changes, dtype=np.float64) for model_name, changes in found.items()}


def list_predictions(wanted, runs):
    """Every prediction: ([condition, ...], [model, ...], [seed, ...], [change (G,), ...])."""
    return zip(*[(name, run.name, run.seed, run.changes[name])
                 for name in wanted for run in runs if name in run.changes])


def predict(*words):
    """What `05_eval.py` with these words predicts, from Python; nothing is written.

    Returns a dict of arrays: condition, model and seed (n,), genes (G,), control (G,) the mean of the cells
    predicted from, delta (n, G) the predicted mean change.
    """
    args, data, runs, ridge_files = set_up(parse_arguments(words))
    wanted = read_perturbations(args, data)
    data = choose_cells(data, wanted, args)
    runs = predict_wanted(wanted, data, runs, ridge_files, args)
    conditions, models, seeds, changes = map(np.array, list_predictions(wanted, runs))
    return {"condition": conditions, "model": models, "seed": seeds, "genes": data.genes[data.seen],
            "control": data.control_mean[data.seen], "delta": changes[:, data.seen]}


# ----------------------------------------------------------------------------------------------------------
# --predict: what it writes

def predict_perturbations(args, data, runs, ridge_files):
    """Predict the perturbations of --predict with every model; write to predicted/<--name>/."""
    folder = args.results / "predicted" / args.name
    wanted = read_perturbations(args, data)
    data = choose_cells(data, wanted, args)
    goal = read_goal(data, args) if args.towards else None  # a mistake in it would cost hours of predictions
    runs = best_first(runs, args.results / "summary.csv")
    all_runs = predict_wanted(wanted, data, runs, ridge_files, args, folder)
    for old in [*folder.glob("*.png"), folder / "predicted.cells.h5ad", folder / "towards.csv"]:
        old.unlink(missing_ok=True)

    effects = sorted(find_effects(wanted, all_runs, data), key=lambda effect: -effect.effect_rms)
    write_csv(folder / "predicted.csv", Effect._fields, effects)
    header = ("condition", "model", "gene", "control", "predicted", "delta", "interval", "measured_delta")
    write_csv(folder / "predicted_genes.csv", header, gene_rows(wanted, all_runs, data))
    write_predicted(folder, wanted, all_runs, data, args)
    has_figures = len(wanted) <= MOST_FIGURES
    if has_figures:
        for name, targets in wanted.items():
            draw_perturbation(folder, name, targets, all_runs, data)
    draw_heatmap(folder / "heatmap.png", effects, all_runs, data)
    warn_of_likeness(wanted, runs, data)
    if goal:
        answer_towards(folder, goal, wanted, all_runs, data, args)
    else:
        print_effects(wanted, effects)
    if runs and not args.run:
        print("by the trained models; --run also takes baselines (matching-mean, additive, ridge_<source>): "
              "report.md says which are best")
    for run in runs:
        run.changes.clear()  # closes the file
        run.stored.unlink(missing_ok=True)  # the same command, run twice at once, shares it
    kept = "" if args.name != "last" else " (the next question overwrites it; --name NAME keeps it)"
    print(f"values{' and figures' * has_figures}: {folder}{kept}")


def best_first(runs, summary):
    """Runs in the order of the report's main metric, shuffled controls last; as they are without a report."""
    pearson_of = {}
    if summary.exists():
        with open(summary, encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                if (row["subgroup"], row["metric"]) == ("all", MAIN_METRIC):
                    pearson_of[row["model"]] = float(row["mean"])
    return sorted(runs, key=lambda run: (not is_informative(run.name), -pearson_of.get(run.name, -1)))


def print_effects(wanted, effects):
    """Print what each model predicts of a few perturbations; of a long list ten that nobody has measured."""
    effects = [effect for effect in effects if is_informative(effect.model)]
    if len(wanted) <= MOST_FIGURES:
        for name in wanted:
            of_name = [effect for effect in effects if effect.condition == name]
            if of_name:
                print(f"{name}: {MEASURED[of_name[0].measured]}")
            for effect in of_name:
                top = " ".join(effect.top_genes.split()[:5])
                print(wrapped(f"  {effect.model}: effect {effect.effect_rms:.4f}; {top} ..."))
        return

    new = [effect for effect in effects if effect.measured == "no"]
    order = "by the size of the effect"
    if any(effect.priority > 0 for effect in new):
        order = "by priority (size of the effect x disagreement of the models)"
        new.sort(key=lambda effect: -np.nan_to_num(effect.priority))
    print(f"not measured yet, {order}:" if new else f"all of them measured, {order}:")
    largest = {}  # {perturbation: its largest effect}, in this order
    for effect in new or effects:
        largest.setdefault(effect.condition, effect)
    for name, effect in list(largest.items())[:10]:
        priority = "" if math.isnan(effect.priority) else f"priority {effect.priority:.4f}, "
        print(f"  {name}: {priority}effect {effect.effect_rms:.4f} by {effect.model}")


def wrapped(line, indent="    "):
    """A line, wrapped to the width of the terminal."""
    return textwrap.fill(line, shutil.get_terminal_size().columns, subsequent_indent=indent,
                         break_on_hyphens=False)  # names have hyphens


def most_changed(change, data, n=20):
    """The n measured genes (at most) with the largest change (G,), the largest first."""
    size = np.where(data.measured, np.abs(change), -1)
    return np.argsort(-size, kind="stable")[:min(n, data.measured.sum())]


def pair_correlations(changes):
    """Pearson correlation of each pair of n changes (genes,); NaN where one is the same for all genes."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.atleast_2d(np.corrcoef(changes))[np.triu_indices(len(changes), 1)]


def root_mean_square(changes, data):
    """The size of changes (..., G) over the measured genes: (...)."""
    return np.sqrt((changes[..., data.measured].astype(np.float64) ** 2).mean(-1))


def interaction(model_name, name, targets, runs, data):
    """How much a pair does beyond what its single targets do, as a model says: root mean square, mean over
    its runs; NaN for what is no pair, and if it says nothing of a target. Each change is less what is
    predicted for no perturbation."""
    singles, sizes = data.genes[targets], []
    for run in runs:
        if run.name == model_name and len(singles) > 1 and run.changes.keys() >= set(singles):
            of_nothing = run.changes.get("", 0)  # 0: a baseline
            alone = sum(run.changes[single] - of_nothing for single in singles)
            sizes.append(root_mean_square(run.changes[name] - of_nothing - alone, data))
    return float(np.mean(sizes)) if sizes else math.nan


def is_informative(model_name):
    """Whether a model's opinion counts: it is no shuffled control, and not the same for all perturbations."""
    return "-shuffled" not in model_name and model_name != "non-ctrl-mean"


Effect = namedtuple("Effect", ("condition", "model", "measured", "n_seeds", "effect_rms", "interval",
                               "interaction_rms", "disagreement", "priority", "top_genes"))


def find_effects(wanted, runs, data):
    """Yield the rows of predicted.csv.

    measured: the part of the split that the perturbation is in, or `no`. effect_rms: root mean square of the
    change over the measured genes. interaction_rms: see `interaction`. disagreement: 1 less the correlation
    of two models' changes, mean over the pairs of models; NaN for a single one. priority: mean effect_rms of
    the models, times disagreement: a large effect that they disagree on is worth measuring next. Both leave
    out shuffled controls and the mean, which tells nothing apart.
    """
    for name, targets in wanted.items():
        changes = changes_of(runs, name)
        sizes = {model_name: root_mean_square(of_runs, data) for model_name, of_runs in changes.items()}
        rivals = [model_name for model_name in changes if is_informative(model_name)]
        disagreement = priority = math.nan
        if len(rivals) > 1:
            means = [changes[model_name].mean(0)[data.measured] for model_name in rivals]
            disagreement = float((1 - pair_correlations(means)).mean())
            priority = float(np.mean([sizes[model_name].mean() for model_name in rivals])) * disagreement

        conditions = data.conditions_of.get(frozenset(targets))
        part = data.split[conditions[0]] if conditions else "no"
        for model_name, of_runs in changes.items():
            mean = of_runs.mean(0)
            top = " ".join(f"{data.genes[g]}:{mean[g]:+.3f}" for g in most_changed(mean, data, 10))
            size, interval = metrics.interval95(sizes[model_name])
            yield Effect(name, model_name, part, len(of_runs), size, interval,
                         interaction(model_name, name, targets, runs, data), disagreement, priority, top)


def gene_rows(wanted, runs, data):
    """Yield the rows of predicted_genes.csv: the genes that change most, by each perturbation and model."""
    for name, targets in wanted.items():
        measured = np.full(len(data.genes), math.nan)
        if conditions := data.conditions_of.get(frozenset(targets)):
            measured = data.mean[conditions].mean(0) - data.ctrl
        for model_name, changes in changes_of(runs, name).items():
            for g in most_changed(changes.mean(0), data):
                delta, half_width = metrics.interval95(changes[:, g])
                control = float(data.control_mean[g])
                yield (name, model_name, data.genes[g], control, control + delta, delta, half_width,
                       float(measured[g]))


def write_predicted(folder, wanted, runs, data, args):
    """Write predicted.h5ad, a mean profile per perturbation and run, and with --cells predicted.cells.h5ad:
    each run's predicted cells below the cells that they were predicted from."""
    made = shared.made_from({"controls": len(data.control), "seed": args.seed},
                            {f"{run.name}, seed {run.seed}": shared.checksum(run.path)
                             for run in runs if run.path})
    conditions, models, seeds, changes = list_predictions(wanted, runs)
    obs = {"condition": conditions, "model": models, "seed": seeds}
    control = data.control_mean[data.measured].astype(np.float32)
    profiles = (control + change[data.measured] for change in changes)
    write_h5ad(folder / "predicted.h5ad", made, data, profiles, obs, "predicted means", control)
    if args.cells:
        blocks = []
        for run in runs:
            blocks.append((run, prepare.CONTROL, data.control))
            blocks += [(run, name, predicted) for name, predicted in run.cells.items()]
        write_predicted_cells(folder / "predicted.cells.h5ad", made, data, blocks)


def warn_of_likeness(wanted, runs, data):
    """Print a warning for a trained run that predicts nearly the same change for all perturbations."""
    if len(wanted) < 2:
        return
    for run in runs:
        changes = [run.changes[name][data.measured] for name in list(wanted)[:200]]
        likeness = np.median(pair_correlations(changes))
        if likeness > 0.99:
            print(f"warning: {run.name}, seed {run.seed} predicts nearly the same change for all of these "
                  f"(median correlation {likeness:.3f}): it hardly tells them apart", file=sys.stderr)


def draw_heatmap(path, effects, runs, data):
    """Draw the changes that one model predicts, the first (the best of the report): perturbations of the
    largest effects x genes that change most, both in the order of a hierarchical clustering. Of fewer than
    three perturbations nothing is drawn."""
    model_name = next((run.name for run in runs if is_informative(run.name)), runs[0].name)
    names = [effect.condition for effect in effects if effect.model == model_name]
    if len(names) < 3:
        return
    title = f"Change of log-normalized expression that {model_name} predicts{synthetic(data)}"
    if len(names) > MOST_ROWS:
        title += f"\nthe {MOST_ROWS} largest effects of {len(names):,} perturbations"
        names = names[:MOST_ROWS]
    changes = np.stack([changes_of(runs, name)[model_name].mean(0) for name in names])
    genes = most_changed(np.abs(changes).max(0), data, 30)
    changes = changes[:, genes]  # (perturbations, genes)
    rows = hierarchy.leaves_list(hierarchy.linkage(changes, "average"))
    columns = hierarchy.leaves_list(hierarchy.linkage(changes.T, "average"))
    limit = np.quantile(np.abs(changes), 0.99) or 1  # so that one outlier does not pale all others

    figure = shared.new_figure(6.5, max(3, 1.5 + 0.16 * len(names)), title)
    axes = figure.subplots()
    image = axes.imshow(changes[rows][:, columns], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(genes)), data.genes[genes[columns]], rotation=90, fontsize=8)
    axes.set_yticks(range(len(names)), [names[row] for row in rows], fontsize=8)
    figure.colorbar(image, extend="both", aspect=40, shrink=0.6)
    shared.save_figure(figure, path)


def synthetic(data):
    """A label of simulated data for titles, empty for real data."""
    return " (SYNTHETIC data)" if data.synthetic else ""


def draw_perturbation(folder, name, targets, runs, data):
    """Draw how the top genes of one perturbation change in cells: as measured, if it was, and as each model
    predicts (the paper's Figures 8 and 9)."""
    series = {}  # {label: [(cells, G), ...]}, the changes of cells, an array a run
    conditions = data.conditions_of.get(frozenset(targets))
    if conditions:
        measured = data.X[np.flatnonzero(np.isin(data.cell_condition, conditions))]
        series["measured"] = [measured.toarray() - data.ctrl]
    for run in runs:
        if name in run.cells:
            series.setdefault(run.name, []).append(run.cells[name] - data.control_mean)
    if not series:
        return
    series = {label: np.concatenate(blocks) for label, blocks in series.items()}
    if conditions:
        top = data.de_idx[conditions[0]]
        top = top[(top >= 0) & data.measured[top]]
        words = f"that change most, {MEASURED[data.split[conditions[0]]].partition(':')[0]}"
    else:
        first = next(iter(series))
        top = most_changed(series[first].mean(0), data)
        words = f"that change most as {first} predicts; not measured"

    figure = shared.new_figure(
        7.5, 4.5, f"{name}: the {len(top)} genes {words}{synthetic(data)}\n"
        "box: middle half of the cells; line: median; diamond: mean; whiskers: without outliers")
    axes = figure.subplots()
    draw_boxes(axes, series, top)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xlim(-0.6, len(top) - 0.4)
    axes.set_xticks(range(len(top)), data.genes[top], rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("expression of a cell less the control mean\n(log-normalized)")
    add_legend(figure)
    shared.save_figure(figure, folder / f"{urllib.parse.quote(name, safe='+')[:200]}.png")


def draw_boxes(axes, series, top):
    """Draw a box for each gene of `top` and label of {label: (cells, G)}, what is measured in grey."""
    colors = itertools.cycle(shared.COLORS)
    width = 0.8 / len(series)
    for i, (label, changes) in enumerate(series.items()):
        color = shared.GREY if label == "measured" else next(colors)
        x = np.arange(len(top)) + (i - (len(series) - 1) / 2) * width
        diamond = {"marker": "D", "markersize": 3, "markerfacecolor": color, "markeredgecolor": "black",
                   "markeredgewidth": 0.5}
        boxes = axes.boxplot(changes[:, top], positions=x, widths=0.9 * width,
                             showfliers=False, patch_artist=True, showmeans=True, manage_ticks=False,
                             medianprops={"color": "black"}, meanprops=diamond, boxprops={"facecolor": color})
        boxes["boxes"][0].set_label(label)  # for the legend


# ----------------------------------------------------------------------------------------------------------
# --towards: which perturbation leads to these cells

def answer_towards(folder, goal, wanted, runs, data, args):
    """Rank the wanted perturbations by how near they lead to --towards: towards.csv, words and a figure.
    goal: see read_goal."""
    change, targets = goal
    answers = rank_towards(change, wanted, runs, args)
    rows = []
    for model_name, ranked in answers.items():
        rows += [(model_name, rank, *row) for rank, row in enumerate(ranked, 1)]
    write_csv(folder / "towards.csv", ("model", "rank", "condition", "pearson", "distance"), rows)
    print_towards(answers, targets, wanted, args)
    draw_towards(folder / "towards.png", answers, data, args)


def read_goal(data, args):
    """The change from the cells predicted from to the mean of those that --towards names, (G,), NaN where
    nothing is measured; and the set of their targets, None for cells from a file."""
    targets = None
    with contextlib.suppress(ValueError):  # the name of a file
        genes = parse_perturbation(args.towards, label_notations(set(data.genes), args))
        if not genes:
            sys.exit(f"error: --towards {args.towards}: no perturbation")
        idx_of = positions(data.genes)
        targets = frozenset(idx_of.get(gene) for gene in genes)
    if conditions := data.conditions_of.get(targets):
        state = data.mean[conditions].mean(0, dtype=np.float64)
    elif Path(args.towards).is_file():
        X, in_common = read_own_cells(Path(args.towards), args, data)
        targets, state = None, np.full(len(in_common), np.nan)
        state[in_common] = np.asarray(X.mean(axis=0)).ravel()
    else:
        having = [name for name, row in zip(data.conditions, data.targets) if set(row) & set(targets or ())]
        advice = f"; measured are {shown(having)}" if having else ""
        sys.exit(f"error: --towards {args.towards}: neither a condition of the dataset nor a file{advice}")
    return np.where(data.measured, state - data.control_mean, np.nan), targets


def rank_towards(goal, wanted, runs, args):
    """The perturbations by how near each model says that they lead to --towards, the nearest first: {model:
    [(perturbation, Pearson of its change and the wanted one, distance left), ...]}. goal (G,): see read_goal.

    The distance is that of the predicted state from the wanted one, relative to that without a perturbation.
    """
    counts = np.isfinite(goal)
    goal = goal[counts]
    answers = {}
    for name in wanted:
        for model_name, changes in changes_of(runs, name).items():
            change = changes.mean(0)[counts]
            likeness = float(pair_correlations([change, goal])[0])
            distance = float(np.linalg.norm(change - goal) / np.linalg.norm(goal))
            answers.setdefault(model_name, []).append((name, likeness, distance))

    for model_name, ranked in list(answers.items()):
        ranked.sort(key=lambda row: -np.nan_to_num(row[1], nan=-2))
        if len({likeness for _, likeness, _ in ranked}) < min(2, len(wanted)):
            print(f"{model_name}: not ranked, as it does not tell these perturbations apart")
            del answers[model_name]
    if not answers:
        sys.exit(f"error: --towards {args.towards}: no model tells these perturbations apart")
    return answers


def print_towards(answers, targets, wanted, args):
    """Print each model's five nearest with the correlation of the changes, if that is above 0, and the rank
    of the perturbation that --towards names."""
    for model_name, ranked in answers.items():
        nearest = [f"{name} ({likeness:.2f})" for name, likeness, _ in ranked[:5] if likeness > 0]
        line = f"{model_name}: closest to {args.towards}: {', '.join(nearest) or 'none leads there'}"
        for rank, (name, *_) in enumerate(ranked, 1):
            if targets == set(wanted[name]):
                line += f"; {name} itself has rank {rank} of {len(ranked)}"
        print(wrapped(line))


def draw_towards(path, answers, data, args):
    """Draw the ten nearest of the first three models."""
    drawn = list(answers)[:3]
    title = f"Perturbations that lead towards {args.towards}{synthetic(data)}"
    figure = shared.new_figure(5, 0.6 + 2.4 * len(drawn), title)
    panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False).flat
    for axes, model_name in zip(panels, drawn):
        names, likeness, _ = zip(*answers[model_name][:10])
        axes.barh(names, likeness, color=shared.COLORS[0])
        axes.invert_yaxis()
        axes.set_title(model_name, fontsize="small")
    axes.set_xlim(0, 1)  # below 0 it leads away
    axes.set_xlabel("correlation of predicted with wanted change")
    shared.save_figure(figure, path)


# ----------------------------------------------------------------------------------------------------------

def parse_arguments(words=None):
    parser = shared.common_options(argparse.ArgumentParser(description=__doc__))
    add = parser.add_argument
    add("--run", nargs="+", default=[], metavar="NAME", help="runs by the name of their folder; model files, "
        "our own or the authors', as FILE.pt or NAME=FILE.pt; released:VARIANT fetches what the authors "
        "fine-tuned on norman or adamson; for --predict also baselines: ridge_<source>, "
        f"{', '.join(FOR_ANY_TARGET)} (default: all finished runs; --predict without any: all baselines)")
    add("--external", nargs="+", default=[], metavar="FILE.h5ad", help="predictions of another method, as "
        "FILE.h5ad or NAME=FILE.h5ad: obs column condition, X predicted expression per cell or condition")
    add("--cells", action="store_true", help="also write every predicted cell, as *.cells.h5ad (they "
        "have to fit into memory)")
    add("--controls", type=shared.positive, metavar="N", help="control cells a condition (default: as many "
        f"as it has cells; --predict: {N_FIGURE_CONTROLS})")
    add("--seed", type=shared.seed, default=42, metavar="N", help="draws the control cells (default: 42)")
    add("--batch-size", type=shared.positive, metavar="N",
        help="cells at a time (default: what suits the device)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    add = parser.add_argument_group("questions, in place of the evaluation").add_argument
    add("--predict", nargs="+", metavar="GENE", help="what do these perturbations do, measured or not: "
        "GENE, GENE+GENE, a text file with one a line, or all-singles (every gene of the dataset)")
    add("--towards", metavar="CONDITION|FILE.h5ad", help="rank the perturbations of --predict (default: "
        "all-singles) by how near they lead to the cells of a condition or of a file")
    add("--controls-from", type=Path, metavar="FILE.h5ad",
        help="predict in these cells, unperturbed ones, instead of the screen's control cells")
    add("--skip-unknown", action="store_true", help="leave out what --predict does not know")
    add("--name", default="last", help="folder of the answers (default: last)")
    prepare.expression_options(parser.add_argument_group("how to read files of cells"))
    args = parser.parse_args(None if words is None else list(map(str, words)))
    if args.towards and not args.predict:
        args.predict = ["all-singles"]
    if words is not None and not args.predict:
        sys.exit("error: predict() needs --predict or --towards")
    if args.predict and args.external:
        sys.exit("error: --external is for the evaluation, without --predict and --towards")
    if args.controls_from and not args.predict:
        sys.exit("error: --controls-from needs --predict or --towards")
    shared.check_name(args.name, "--name")
    return args


def check_names(runs, ridge_files, external):
    """End the run where two models would have the same name in the tables."""
    names = [*BASELINES, CEILING, *(f"ridge_{source}" for source in ridge_files)]
    names += [named_file(item, "--external")[0] for item in external]
    names += {run.name for run in runs}
    names += [f"{run.name}, seed {run.seed}" for run in runs]
    name, n = Counter(names).most_common(1)[0]
    if n > 1:
        sys.exit(f"error: two models are called {name}; rename one: --run NAME=FILE.pt, "
                 "--external NAME=FILE.h5ad")


def evaluate(args, data, runs, ridge_files):
    """Compare all models and baselines on the held-out conditions; write tables, figures and report."""
    results = args.results
    test = held_out(data, args)
    print(f"{len(test.rows)} test conditions, {len(test.genes):,} genes, {sum(map(len, test.controls)):,} "
          "control cells to predict from")

    # Mean profiles: (model, seed, predicted (P, G), true (P, G)); first those that may be in error
    external = [read_external(item, data, test, args) for item in args.external]
    profiles = [(run.name, run.seed, predict_run(run, args, data, test), test.true) for run in runs]
    profiles += external
    outcome = compare(profiles, all_baselines(data, test, ridge_files), test)
    outcome.runs, outcome.ridge_files = runs, ridge_files

    header = ("model", "seed", "condition", "subgroup", "metric", "value")
    write_csv(results / "metrics.csv", header, outcome.rows)
    header = ("model", "subgroup", "metric", "mean", "interval", "n_seeds")
    rows = [(*key, *value) for key, value in outcome.summary.items()]
    write_csv(results / "summary.csv", header, rows)
    if args.cells:
        write_measured_cells(results / "predictions" / "measured.cells.h5ad", data, test, args.force)
    label = args.dataset + synthetic(data)
    draw_split(results / "split.png", data, f"{label}: conditions of the split")
    draw_bars(results / "subgroups.png", outcome, list(test.groups), f"{label}: held-out "
              "perturbations\nmean over conditions and seeds; lines: 95% interval over seeds (draws)")
    if best := best_model(outcome):
        predicted = np.mean([of_seed for name, _, of_seed, _ in profiles if name == best], axis=0)
        draw_scatter(results / "scatter.png", best, predicted, outcome, test, label)
    if logged := [run for run in runs if run.config]:
        draw_training(results / "training.png", logged, f"{label}: training")
    write_report(results / "report.md", args, data, test, outcome)

    print_table(outcome, test, data)
    print(f"report with all baselines, metrics and figures: {results / 'report.md'}")
    print_next(args, data, runs)


def print_next(args, data, runs):
    """Print commands that may come next."""
    if not runs:
        own_genes = "none" if data.vocab == "own genes" else None
        words = SimpleNamespace(dataset=args.dataset, root=args.root, vocab=own_genes)
        print(f"next, to train: {prepare.next_command(words)}")
    singles = data.genes[data.targets[data.subgroup == "unseen_single", 0]][:2]
    if len(singles) == 2:
        print(f"next: {shared.command('05_eval.py', args, '--predict', *singles, '+'.join(singles))}")
    if args.dataset == "demo" and runs:
        mine = SimpleNamespace(dataset="mine", root=args.root)
        words = ("--h5ad", "FILE.h5ad", "--condition-key", "COLUMN", "--control", "LABEL")
        print(f"next, with your own cells: {shared.command('03_prepare_data.py', mine, *words)}")


def set_up(args):
    """What evaluation and prediction need: args, data, runs, ridge_files {source: file of vectors}."""
    dataset_path = args.root / "data" / args.dataset / "dataset.h5"
    data = prepare.load_dataset(dataset_path, shared.command("03_prepare_data.py", args))
    # For the ridge regressions: published + concat where there is a choice, else lsa rather than lsa-64
    ridge_files = {}
    for source, files in training.find_embeddings(args.root, args.dataset).items():
        ridge_files[source] = files.get(("published", "concat")) or files[min(files)]
    runs = find_models(args)
    check_names(runs, ridge_files, args.external)
    args.results = args.root / "results" / args.dataset
    args.device = training.choose_device(args.device)
    print("device: {}, {}".format(*training.describe_device(args.device)))
    return args, data, runs, ridge_files


def main():
    args, data, runs, ridge_files = set_up(parse_arguments())
    if args.predict:
        predict_perturbations(args, data, runs, ridge_files)
    else:
        evaluate(args, data, runs, ridge_files)


if __name__ == "__main__":
    shared.run(main)
