"""Stage 05: predictions of the held-out perturbations, tables and figures -> results/<dataset>/

    python 05_eval.py                                           the demo: every finished run beside the baselines
    python 05_eval.py --dataset norman                          as many control cells as each condition has cells
    python 05_eval.py --dataset norman --controls 50            quicker, for a machine without a GPU
    python 05_eval.py --dataset norman --run scgpt released:scgenept_go_c mine=model.pt
                                            chosen runs; the authors' own fine-tuned model, which is fetched; a file
    python 05_eval.py --dataset norman --external GEARS=gears.h5ad        another method's predictions
    python 05_eval.py --dataset norman --predict POU3F2 CEBPE+KLF1        what these perturbations do
    python 05_eval.py --dataset norman --cells                            cell by cell, for scanpy and cell-eval

Writes report.md with figures, metrics.csv (a value per condition), summary.csv (mean and 95% interval over seeds), and each
model's predicted mean profiles as predictions/<model>.seed<N>.h5ad. Predictions that are there already are used again.

The prediction of a condition is the mean over control cells of what the model predicts for each; every model gets the same
control cells. Beside the models stand baselines, which need no training; report.md says what each of them is.

--cells also writes <model>.seed<N>.cells.h5ad (control cells as measured, and every predicted cell) and measured.cells.h5ad,
the measured cells of the same conditions: the pair that `cell-eval run --pert-col condition --control-pert ctrl` takes.

--predict writes to results/<dataset>/predicted/<--name>/: predicted.csv (perturbations by the size of their effect),
predicted_genes.csv (the 20 genes that change most), predicted.h5ad (mean profiles), and figures for a dozen at most.

GEARS' predictions for --external, in its own environment (cell-gears 0.1.2; a sketch). Newer versions of GEARS leave some
conditions out before they split, so that its own split would train on perturbations that are tested here: give it this one.

    split = {part: [c for c in conditions if split_of[c] == part] for part in ("train", "val", "test")}   # of dataset.h5
    split["train"].append("ctrl")
    pickle.dump(split, open("split.pkl", "wb"))
    pert_data.prepare_split(split="custom", split_dict_path="split.pkl")       # without the conditions that GEARS dropped
    ...                                                                        # train; with uncertainty=True, predict
    targets = [[g for g in c.split("+") if g != "ctrl"] for c in split["test"]]            # returns a pair of dicts
    predicted = gears_model.predict(targets)                                   # {"A" or "A_B": expression of every gene}
    X = numpy.stack([predicted["_".join(t)] for t in targets])
    anndata.AnnData(X, pandas.DataFrame({"condition": split["test"]}), pert_data.adata.var).write_h5ad("gears.h5ad")
"""
import argparse
import csv
import difflib
import importlib
import io
import json
import math
import re
import shutil
import sys
import textwrap
import time
import urllib.parse
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

import metrics
import model

shared = importlib.import_module("01_fetch_annotations")
embed = importlib.import_module("02_embed")
prepare = importlib.import_module("03_prepare_data")
training = importlib.import_module("04_train")
shown = shared.shown

BUCKET, FINETUNED = "https://czi-scgenept-public.s3.amazonaws.com/", "models/finetuned/"  # <variant>/<dataset>/<file>.pt
METRICS = {  # name: (heading, whether higher is better)
    "pearson_delta_top20": ("Pearson Δ top 20", True),
    "pearson_delta_all": ("Pearson Δ all", True),
    "mse_top20": ("MSE top 20", False),
    "mse_all": ("MSE all", False),
    "pearson_top20": ("Pearson top 20", True),
    "pearson_all": ("Pearson all", True),
    "pearson_systema": ("Pearson Systema", True),
    "centroid_accuracy": ("centroid accuracy", True),
}
MAIN_METRIC = "pearson_delta_top20"
BASELINES = {  # they need no training
    "non-ctrl-mean": "the mean profile of the training perturbations",
    "random": "the profile of one training perturbation drawn at random; ten draws",
    "no-change": "the mean of the control cells",
    "matching-mean": "the mean of the parts' own training profiles, non-ctrl-mean for parts not trained on (Systema)",
    "additive": "control plus the sum of the parts' effects, 0 for parts not trained on (Ahlmann-Eltze et al. 2025)",
    "ridge_<source>": "ridge regression from the sum of the targets' language vectors to the response (GenePert)"}
CEILING = "data-ceiling"
N_DRAWS = 10  # of the random baseline, and of the halves of the ceiling
RIDGE_PENALTIES = 10.0 ** np.arange(-4, 5)  # times the mean squared length of the centred vectors
CELLS_X_GENES = 80_000   # values predicted between two steps of the progress bar
MOST_FIGURES = 12        # of --predict; for a longer list none is drawn
N_FIGURE_CONTROLS = 300  # as in the paper's Figures 8 and 9

# The paper's own figures, mean over five seeds ± 95% interval: Pearson Δ top 20 and all, MSE top 20 and all (Tables 3, 4, 8-16, 18-20, 27-30)
PAPER = {
    "norman": """
        scgpt                        0.665 ± 0.01 | 0.534 ± 0.02 | 0.223 ± 0.01 | 0.00421 ± 0.00
        scgenept_ncbi                0.685 ± 0.03 | 0.548 ± 0.03 | 0.223 ± 0.03 | 0.00415 ± 0.00
        scgenept_ncbi+uniprot        0.696 ± 0.01 | 0.557 ± 0.02 | 0.205 ± 0.02 | 0.00403 ± 0.00
        scgenept_go_f                0.686 ± 0.01 | 0.554 ± 0.02 | 0.216 ± 0.02 | 0.00405 ± 0.00
        scgenept_go_c                0.687 ± 0.03 | 0.550 ± 0.02 | 0.219 ± 0.01 | 0.00405 ± 0.00
        scgenept_go_p                0.682 ± 0.02 | 0.543 ± 0.02 | 0.220 ± 0.02 | 0.00412 ± 0.00
        scgenept_go_all              0.698 ± 0.02 | 0.554 ± 0.02 | 0.209 ± 0.02 | 0.00400 ± 0.00
        scgpt-counts                 0.035 ± 0.00 | 0.128 ± 0.00 | 2.784 ± 0.02 | 0.1619 ± 0.00
        scgpt-tokens                 0.143 ± 0.01 | 0.137 ± 0.00 | 0.546 ± 0.02 | 0.0115 ± 0.00
        genept_ncbi-scratch          0.625 ± 0.03 | 0.302 ± 0.02 | 0.269 ± 0.04 | 0.00904 ± 0.00
        genept_ncbi                  0.591 ± 0.08 | 0.318 ± 0.02 | 0.266 ± 0.03 | 0.00896 ± 0.00
        genept_ncbi+uniprot-scratch  0.640 ± 0.03 | 0.322 ± 0.02 | 0.249 ± 0.03 | 0.00874 ± 0.00
        genept_ncbi+uniprot          0.631 ± 0.03 | 0.320 ± 0.02 | 0.256 ± 0.02 | 0.00880 ± 0.00
        genept_go_f-scratch          0.617 ± 0.03 | 0.307 ± 0.03 | 0.259 ± 0.03 | 0.00900 ± 0.00
        genept_go_f                  0.626 ± 0.04 | 0.313 ± 0.03 | 0.275 ± 0.05 | 0.00903 ± 0.00
        genept_go_c-scratch          0.630 ± 0.03 | 0.312 ± 0.02 | 0.258 ± 0.05 | 0.00892 ± 0.00
        genept_go_c                  0.573 ± 0.11 | 0.315 ± 0.02 | 0.278 ± 0.05 | 0.00903 ± 0.00
        genept_go_p-scratch          0.620 ± 0.02 | 0.309 ± 0.01 | 0.262 ± 0.04 | 0.00899 ± 0.00
        genept_go_p                  0.613 ± 0.04 | 0.329 ± 0.02 | 0.265 ± 0.05 | 0.00890 ± 0.00
        genept_go_all-scratch        0.633 ± 0.01 | 0.321 ± 0.02 | 0.247 ± 0.01 | 0.00885 ± 0.00
        genept_go_all                0.625 ± 0.03 | 0.305 ± 0.01 | 0.281 ± 0.04 | 0.00904 ± 0.00
        GEARS                        0.710 ± 0.00 | 0.573 ± 0.00 | 0.177 ± 0.00 | 0.00510 ± 0.00
        random                       0.604 ± 0.03 | 0.495 ± 0.00 | 0.340 ± 0.00 | 0.00488 ± 0.00
        non-ctrl-mean                0.608 ± 0.00 | 0.571 ± 0.00 | 0.337 ± 0.00 | 0.00466 ± 0.00""",
    "adamson": """
        scgpt                        0.782 ± 0.02 | 0.589 ± 0.03 | 0.135 ± 0.01 | 0.00672 ± 0.00
        scgenept_ncbi                0.779 ± 0.02 | 0.606 ± 0.03 | 0.133 ± 0.00 | 0.00654 ± 0.00
        scgenept_ncbi+uniprot        0.784 ± 0.02 | 0.617 ± 0.03 | 0.129 ± 0.00 | 0.00620 ± 0.00
        scgenept_go_f                0.785 ± 0.02 | 0.611 ± 0.03 | 0.128 ± 0.00 | 0.00640 ± 0.00
        scgenept_go_c                0.791 ± 0.01 | 0.623 ± 0.02 | 0.125 ± 0.00 | 0.00622 ± 0.00
        scgenept_go_p                0.789 ± 0.01 | 0.609 ± 0.03 | 0.127 ± 0.00 | 0.00645 ± 0.00
        scgenept_go_all              0.787 ± 0.02 | 0.605 ± 0.03 | 0.127 ± 0.01 | 0.00641 ± 0.00
        scgpt-counts                 0.257 ± 0.00 | 0.044 ± 0.00 | 7.776 ± 0.04 | 0.2834 ± 0.00
        scgpt-tokens                 0.023 ± 0.05 | -0.092 ± 0.02 | 0.323 ± 0.03 | 0.0271 ± 0.00
        scgenept_ncbi+uniprot+go_f   0.793 ± 0.00 | 0.618 ± 0.02 | 0.127 ± 0.00 | 0.00641 ± 0.00
        scgenept_ncbi+uniprot+go_c   0.790 ± 0.01 | 0.617 ± 0.02 | 0.130 ± 0.00 | 0.00645 ± 0.00
        scgenept_ncbi+uniprot+go_p   0.792 ± 0.00 | 0.620 ± 0.02 | 0.127 ± 0.00 | 0.00616 ± 0.00
        scgenept_ncbi+uniprot+go_all 0.793 ± 0.00 | 0.617 ± 0.00 | 0.126 ± 0.00 | 0.00627 ± 0.00
        genept_ncbi-scratch          0.741 ± 0.00 | 0.344 ± 0.02 | 0.179 ± 0.00 | 0.02461 ± 0.00
        genept_ncbi                  0.742 ± 0.02 | 0.340 ± 0.03 | 0.178 ± 0.00 | 0.02462 ± 0.00
        genept_ncbi+uniprot-scratch  0.739 ± 0.00 | 0.331 ± 0.01 | 0.181 ± 0.00 | 0.02436 ± 0.00
        genept_ncbi+uniprot          0.742 ± 0.00 | 0.339 ± 0.02 | 0.178 ± 0.00 | 0.02437 ± 0.00
        genept_go_f-scratch          0.740 ± 0.00 | 0.334 ± 0.02 | 0.180 ± 0.00 | 0.02452 ± 0.00
        genept_go_f                  0.741 ± 0.01 | 0.339 ± 0.01 | 0.176 ± 0.00 | 0.02438 ± 0.00
        genept_go_c-scratch          0.747 ± 0.00 | 0.350 ± 0.00 | 0.176 ± 0.01 | 0.02454 ± 0.00
        genept_go_c                  0.744 ± 0.01 | 0.342 ± 0.03 | 0.174 ± 0.00 | 0.02451 ± 0.00
        genept_go_p-scratch          0.745 ± 0.00 | 0.350 ± 0.01 | 0.178 ± 0.00 | 0.02466 ± 0.00
        genept_go_p                  0.742 ± 0.02 | 0.337 ± 0.03 | 0.180 ± 0.01 | 0.02456 ± 0.00
        genept_go_all-scratch        0.744 ± 0.01 | 0.351 ± 0.03 | 0.179 ± 0.01 | 0.02459 ± 0.00
        genept_go_all                0.740 ± 0.00 | 0.337 ± 0.01 | 0.181 ± 0.00 | 0.02450 ± 0.00
        GEARS                        0.730 ± 0.00 | 0.691 ± 0.00 | 0.157 ± 0.00 | 0.00516 ± 0.00
        random                       0.726 ± 0.03 | 0.693 ± 0.00 | 0.151 ± 0.00 | 0.00482 ± 0.00
        non-ctrl-mean                0.729 ± 0.00 | 0.709 ± 0.00 | 0.149 ± 0.00 | 0.00456 ± 0.00"""}
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

# ---------------------------------------------------------------------------------------------------------------------
# Models

def fetch_released(variant, dataset, folder):
    """The files of a variant that the authors fine-tuned on a dataset, downloaded to `folder`. Their names follow no rule:
    the bucket is asked for the list."""
    with shared.request(BUCKET, params={"list-type": 2, "prefix": FINETUNED}) as response:
        listing = response.text
    found = re.findall(rf"<Key>{FINETUNED}([\w+-]+)/([\w-]+)/([\w.+-]+\.pt)</Key>", listing)
    files = [file for of_variant, of_dataset, file in found if (of_variant, of_dataset) == (variant, dataset)]
    if not files:
        there = sorted({f"{of_variant} ({of_dataset})" for of_variant, of_dataset, _ in found})
        sys.exit(f"error: --run released:{variant}: {shared.address(BUCKET)} has no such model of {dataset}; there are: "
                 + (", ".join(there) or "none"))
    return [shared.download(BUCKET + urllib.parse.quote(f"{FINETUNED}{variant}/{dataset}/{file}"),
                            folder / variant / dataset / file) for file in files]


def find_files(items, args):
    """Models given as FILE.pt, NAME=FILE.pt or released:VARIANT (which is fetched), as namespaces like find_runs'."""
    models = []
    for item in items:
        if item.startswith("released:"):
            variant = item.removeprefix("released:")
            name = f"{variant}-released"
            paths = fetch_released(variant, args.dataset, args.root / "data" / "human" / "raw" / "finetuned")
        else:
            name, _, file = item.rpartition("=") if not Path(item).exists() else ("", "", item)
            paths = [Path(file)]
            name = name or paths[0].stem.replace(".", "_")
        for path in paths:
            if not path.exists():
                sys.exit(f"error: --run {item}: {path} does not exist")
            seed = re.search(r"seed_?(\d+)", path.name)
            models.append(SimpleNamespace(name=shared.check_name(name, "--run"), seed=int(seed[1]) if seed else 0,
                                          path=path, config={}))
    return models


def find_models(args):
    """The models of --run: the kit's runs, and files. By default all finished runs."""
    files = [item for item in args.run or () if item.endswith(".pt") or item.startswith("released:")]
    names = [item for item in args.run if item not in files] if args.run else None
    return training.find_runs(args.root, args.dataset, names, args) + find_files(files, args)


def load_model(path, data):
    """The model in an own or a released file. Ends the run when it is neither, or of another vocabulary than the data."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Predictions of the held-out conditions

def held_out(data):
    """The test conditions of a dataset over its measured genes (G), which alone count, as a namespace: rows (P,) among the
    conditions, names and subgroups (P,), gene_idx (G,), genes (G,), true (P, G), ctrl (G,), perturbed_mean (G,), the mean
    of the training perturbations, and de_idx (P, 20) among the measured genes."""
    rows = np.flatnonzero(data.split == "test")
    gene_idx = np.flatnonzero(data.measured)
    column = np.full(len(data.genes) + 1, -1)  # the last is for -1: no gene
    column[gene_idx] = np.arange(len(gene_idx))
    return SimpleNamespace(
        rows=rows, names=data.conditions[rows], subgroups=data.subgroup[rows], gene_idx=gene_idx,
        genes=data.genes[gene_idx], true=data.mean[rows][:, gene_idx], de_idx=column[data.de_idx[rows]],
        ctrl=data.mean[data.split == "ctrl"][0][gene_idx],
        perturbed_mean=data.mean[data.split == "train"].mean(0, dtype=np.float64)[gene_idx])


def draw_controls(data, rows, n_controls, seed):
    """Control cells for each condition, the same for every model: as many as it has cells, or n_controls. A list of index
    arrays."""
    n_cells = np.bincount(data.cell_condition, minlength=len(data.conditions))
    return [training.random_stream("controls", seed, int(row)).choice(data.ctrl_cells, n_controls or n_cells[row])
            for row in rows]


def predict_cells(net, path, data, control, target_idx, machine):
    """What the model of the file `path` predicts for control cells (N, G): (N, G)."""
    try:
        with machine.autocast():
            return model.predict(net, data.token_ids, control, target_idx, machine.batch_size)
    except ValueError as error:
        sys.exit(f"error: {path}: {error}: trained on other genes than these")


def predict_means(run, data, rows, controls, machine):
    """Mean predicted profile of each condition, (P, genes) float64, and yield-free blocks of the predicted cells: a list of
    (cells, measured genes), empty unless machine.keep_cells."""
    net = load_model(run.path, data).to(machine.device)
    step = max(machine.batch_size or 1, CELLS_X_GENES // len(data.genes))
    means, blocks = np.zeros((len(rows), len(data.genes))), []
    with tqdm(total=sum(map(len, controls)), desc=f"  {run.name}, seed {run.seed}", unit=" cells", leave=False,
              disable=None) as progress:
        for i, (row, cells) in enumerate(zip(rows, controls)):
            target_idx = data.targets[row][data.targets[row] >= 0]
            for start in range(0, len(cells), step):  # so that memory does not grow with the number of cells
                control = data.X[cells[start:start + step]].toarray()
                predicted = predict_cells(net, run.path, data, control, target_idx, machine)
                means[i] += predicted.sum(0, dtype=np.float64)
                if machine.keep_cells:
                    blocks.append(predicted[:, data.measured])
                progress.update(len(control))
            means[i] /= len(cells)
    return means, blocks


def predict_run(run, args, data, test, controls, machine, dataset_made):
    """A run's mean predicted profiles of the test conditions (P, G): from its file in predictions/, or made now."""
    path = args.root / "results" / args.dataset / "predictions" / f"{run.name}.seed{run.seed}.h5ad"
    cells_path = path.with_suffix(".cells.h5ad")
    made = shared.made_from({"controls": args.controls or "as cells", "seed": args.seed},
                            {"dataset.h5": dataset_made, "model": shared.checksum(run.path)})
    wanted = [path, cells_path] if args.cells else [path]
    if not all([shared.is_current(file, made, args.force) for file in wanted]):
        started = time.perf_counter()
        means, blocks = predict_means(run, data, test.rows, controls, machine)
        obs = {"condition": test.names, "subgroup": test.subgroups, "model": [run.name] * len(test.rows),
               "seed": [run.seed] * len(test.rows), "n_controls": [len(cells) for cells in controls]}
        prepare.write_h5ad(path, made, means[:, test.gene_idx], obs, test.genes, describe(data, "predicted means"), test.ctrl)
        if args.cells:
            labels = [name for name, cells in zip(test.names, controls) for _ in cells]
            write_cells(cells_path, made, data, test, labels, blocks, run)
        print(f"{run.name}, seed {run.seed}: predicted in {time.perf_counter() - started:.1f} s -> {path}")
    with shared.read_h5(path) as file:
        return file["X"][:]


def describe(data, what):
    return f"{what}, log-normalized expression" + (" of SYNTHETIC cells" if data.synthetic else "")


def write_cells(path, made, data, test, labels, blocks, run):
    """Write predicted cells, blocks of (cells, G), below the control cells that readers compare them with."""
    labels = [prepare.CONTROL] * len(data.ctrl_cells) + labels
    X = np.concatenate([data.X[data.ctrl_cells][:, test.gene_idx].toarray(), *blocks])
    np.maximum(X, 0, out=X)  # the model's output is linear; readers of log-normalized data refuse values below 0
    obs = {"condition": labels, "target_gene": target_genes(labels), "model": [run.name] * len(labels),
           "seed": [run.seed] * len(labels)}
    prepare.write_h5ad(path, made, X, obs, test.genes, describe(data, "predicted cells below measured control cells"))


def write_measured_cells(path, data, test, dataset_made, force):
    """Write the measured control cells and cells of the test conditions, for comparison with predicted ones."""
    made = shared.made_from({}, {"dataset.h5": dataset_made})
    if shared.is_current(path, made, force):
        return
    cells = np.concatenate([data.ctrl_cells, *(np.flatnonzero(data.cell_condition == row) for row in test.rows)])
    labels = list(data.conditions[data.cell_condition[cells]])
    obs = {"condition": labels, "target_gene": target_genes(labels)}
    prepare.write_h5ad(path, made, data.X[cells][:, test.gene_idx], obs, test.genes, describe(data, "measured cells"))


def target_genes(labels):
    """The targets of each label, joined by + (`ctrl` for control cells): what cell-eval leaves out of some scores."""
    return ["+".join(part for part in label.split("+") if part != prepare.CONTROL) or prepare.CONTROL for label in labels]


# ---------------------------------------------------------------------------------------------------------------------
# Baselines

def random_means(data, rows, draw):
    """The profile of one training perturbation drawn at random for each condition: (P, genes)."""
    trained = np.flatnonzero(data.split == "train")
    return data.mean[training.random_stream("random_baseline", draw).choice(trained, len(rows))]


def baseline_means(data, rows):
    """Mean profiles that the baselines without chance predict for each condition: {name: (P, genes)}."""
    trained = np.flatnonzero(data.split == "train")
    ctrl = data.mean[data.split == "ctrl"][0].astype(np.float64)
    non_ctrl = data.mean[trained].mean(0, dtype=np.float64)

    # The profile of each single target that was trained on, over its labels (A+ctrl, ctrl+A)
    n_cells = np.bincount(data.cell_condition, minlength=len(data.conditions))
    rows_of = {}
    for row in trained:
        targets = data.targets[row][data.targets[row] >= 0]
        if len(targets) == 1:
            rows_of.setdefault(targets[0], []).append(row)
    profile_of = {target: np.average(data.mean[of_target].astype(np.float64), axis=0, weights=n_cells[of_target])
                  for target, of_target in rows_of.items()}

    parts = [data.targets[row][data.targets[row] >= 0] for row in rows]
    matching = [np.mean([profile_of.get(target, non_ctrl) for target in targets], axis=0) for targets in parts]
    additive = [ctrl + sum(profile_of.get(target, ctrl) - ctrl for target in targets) for targets in parts]
    return {"non-ctrl-mean": np.tile(non_ctrl, (len(rows), 1)), "no-change": np.tile(ctrl, (len(rows), 1)),
            "matching-mean": np.stack(matching), "additive": np.stack(additive)}


def ridge_means(data, rows, path):
    """What GenePert's ridge regression predicts for each condition, (P, genes): from the sum of the targets' language
    vectors to the mean response, with an intercept. None where the source has a vector for no training target.

    A target without a vector has the mean of the training targets'. The penalty is the one with the lowest error on the
    validation conditions.
    """
    genes, vectors = embed.read_embeddings(path)
    row_of = {gene: row for row, gene in enumerate(genes)}
    vector_row = np.array([row_of.get(gene, -1) for gene in data.genes] + [-1])  # the last is that of target -1
    has_vector = (vector_row[data.targets] >= 0) & (data.targets >= 0)
    trained = np.flatnonzero((data.split == "train") & has_vector.any(1))
    val = np.flatnonzero(data.split == "val")
    if not len(trained):
        return None

    # x: what each condition is described by; y: its mean profile
    seen = np.unique(data.targets[trained][has_vector[trained]])
    mean_vector = vectors[vector_row[seen]].mean(0, dtype=np.float64)
    x = np.zeros((len(data.conditions), vectors.shape[1]))
    for i, targets in enumerate(data.targets):
        for target in targets[targets >= 0]:
            x[i] += vectors[vector_row[target]] if vector_row[target] >= 0 else mean_vector
    y = data.mean.astype(np.float64)
    x_mean, y_mean = x[trained].mean(0), y[trained].mean(0)
    xc, yc = x[trained] - x_mean, y[trained] - y_mean

    # Ridge in its dual form: the matrix has as many rows as conditions, however wide the vectors are
    eigenvalues, basis = np.linalg.eigh(xc @ xc.T)
    eigenvalues = np.maximum(eigenvalues, 0)
    lowest, best = math.inf, None
    for penalty in RIDGE_PENALTIES * max(eigenvalues.mean(), 1e-12):
        weights = xc.T @ (basis @ ((basis.T @ yc) / (eigenvalues + penalty)[:, None]))  # (width, genes)
        error = ((y_mean + (x[val] - x_mean) @ weights - y[val]) ** 2).mean() if len(val) else penalty
        if error < lowest:
            lowest, best = error, y_mean + (x[rows] - x_mean) @ weights
    return best


def halves(data, rows, draw):
    """Mean profiles of two random halves of each condition's cells, two arrays (P, genes); NaN for a single cell."""
    rng = training.random_stream("halves", draw)
    means = np.full((2, len(rows), len(data.genes)), np.nan)
    for i, row in enumerate(rows):
        cells = rng.permutation(np.flatnonzero(data.cell_condition == row))
        if len(cells) > 1:
            for half, chosen in enumerate(np.array_split(cells, 2)):
                means[half, i] = np.asarray(data.X[chosen].mean(axis=0)).ravel()
    return means


def all_baselines(data, test, embeddings):
    """Predictions of every baseline, as in predicted_profiles, and the vectors that the ridge regressions used {source:
    path}."""
    profiles = [(name, "", means, test.true) for name, means in baseline_means(data, test.rows).items()]
    profiles += [("random", draw, random_means(data, test.rows, draw), test.true) for draw in range(N_DRAWS)]
    ridge_files = {source: found.get(("published", "concat")) or next(iter(found.values()))
                   for source, found in embeddings.items()}
    for source, path in ridge_files.items():
        means = ridge_means(data, test.rows, path)
        if means is not None:
            profiles.append((f"ridge_{source}", "", means, test.true))
    profiles = [(name, draw, means[:, test.gene_idx], true) for name, draw, means, true in profiles]
    for draw in range(N_DRAWS):
        one, other = halves(data, test.rows, draw)
        profiles.append((CEILING, draw, one[:, test.gene_idx], other[:, test.gene_idx]))
    return profiles, ridge_files


# ---------------------------------------------------------------------------------------------------------------------
# Another method's predictions

def read_external(item, data, test):
    """Another method's predictions, NAME=FILE.h5ad: an obs column `condition`, X predicted expression per cell or per
    condition. Conditions match by their targets, genes by symbol. Returns the name and mean profiles (P, G), NaN for
    conditions that the file lacks."""
    name, _, path = item.partition("=")
    if not path or not Path(path).exists():
        sys.exit(f"error: --external {item}: expected NAME=FILE.h5ad, a file that exists")
    shared.check_name(name, "--external")
    with shared.read_h5(path) as file:
        prepare.check_is_anndata(file, path)
        genes, _ = prepare.read_genes(file["var"], None, path)
        labels, label_of_cell = prepare.read_column(file["obs"], "condition", path)
        blocks = prepare.read_blocks(file["X"], path, len(label_of_cell), len(genes))
        means = label_means(blocks, label_of_cell, len(labels), len(genes))

    position = {gene: i for i, gene in reversed(list(enumerate(genes)))}
    missing = [gene for gene in test.genes if gene not in position]
    if missing:
        sys.exit(f"error: {path}: {len(missing):,} of {len(test.genes):,} genes are missing: {shown(missing, 3)}")
    row_of = {targets_of(label, data): row for row, label in enumerate(labels) if np.isfinite(means[row]).all()}
    wanted = [frozenset(data.genes[data.targets[row][data.targets[row] >= 0]]) for row in test.rows]
    if not any(targets in row_of for targets in wanted):
        sys.exit(f"error: {path}: obs/condition has none of the {len(wanted)} test conditions, such as {test.names[0]!r}")
    columns = [position[gene] for gene in test.genes]
    nothing = np.full(len(columns), np.nan)
    profiles = np.stack([means[row_of[t]][columns] if t in row_of else nothing for t in wanted])
    refuse_other_values(profiles[np.isfinite(profiles).all(1)], path)
    return name, profiles


def label_means(blocks, label_of_cell, n_labels, n_genes):
    """Mean profile of each label (n_labels, n_genes), NaN for one without cells, from blocks as of prepare.read_blocks."""
    sums = np.zeros((n_labels, n_genes))
    for cells, genes, X in blocks:
        of_cells = label_of_cell[cells]
        for label in np.unique(of_cells[of_cells >= 0]):
            sums[label, genes] += np.asarray(X[np.flatnonzero(of_cells == label)].sum(axis=0)).ravel()
    n_cells = np.bincount(label_of_cell[label_of_cell >= 0], minlength=n_labels)
    with np.errstate(invalid="ignore"):
        return sums / n_cells[:, None]


def targets_of(label, data):
    """The targets of another file's label as a set: symbols, the control left out."""
    return frozenset(part.strip() for part in label.split("+")) - {prepare.CONTROL}


def refuse_other_values(profiles, path):
    """End the run for mean profiles that cannot be log-normalized expression."""
    if profiles.min() < -1 or (profiles < -0.1).mean() > 0.1:
        looks_like = "negative values, as changes or z-scores have"
    elif profiles.max() > prepare.LARGEST_LOG:
        looks_like = f"values up to {profiles.max():,.0f}, as counts have"
    else:
        return
    sys.exit(f"error: {path}: {looks_like}; expected log-normalized expression, in the units of the dataset")


# ---------------------------------------------------------------------------------------------------------------------
# Scores

def score(profiles, data, test):
    """Rows (model, seed, condition, subgroup, metric, value) of profiles (name, seed, predicted (P, G), true (P, G)).

    A condition that a profile lacks (NaN) has no row.
    """
    rows = []
    for name, seed, predicted, true in profiles:
        there = np.flatnonzero(np.isfinite(predicted).all(1) & np.isfinite(true).all(1))
        scores = metrics.evaluate(predicted[there], true[there], test.ctrl, test.de_idx[there])
        scores |= metrics.evaluate_specific(predicted[there], true[there], test.perturbed_mean)
        for i, p in enumerate(there):
            for metric in METRICS:
                if not math.isnan(scores[metric][i]):
                    rows.append((name, seed, test.names[p], test.subgroups[p], metric, float(scores[metric][i])))
    return rows


def summarize(rows):
    """Rows as of `score` -> {(model, subgroup, metric): (mean, half width of the 95% interval, n seeds)}.

    A seed's value is the mean over conditions; `all` takes all of them.
    """
    by_seed = {}
    for name, seed, _, subgroup, metric, value in rows:
        for group in dict.fromkeys(["all", subgroup or "all"]):
            by_seed.setdefault((name, group, metric), {}).setdefault(seed, []).append(value)
    return {key: (*metrics.interval95([np.mean(values) for values in seeds.values()]), len(seeds))
            for key, seeds in by_seed.items()}


def by_condition(rows, metric):
    """{model: {condition: mean over seeds}} of one metric."""
    values = {}
    for name, _, condition, _, of_metric, value in rows:
        if of_metric == metric:
            values.setdefault(name, {}).setdefault(condition, []).append(value)
    return {name: {condition: np.mean(v) for condition, v in of_name.items()} for name, of_name in values.items()}


def write_csv(path, header, rows):
    """Write a table; NaN becomes an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        writer.writerow("" if isinstance(value, float) and math.isnan(value) else value for value in row)
    shared.write_text(path, text.getvalue())


# ---------------------------------------------------------------------------------------------------------------------
# Report

def number(mean, half_width=math.nan, metric=MAIN_METRIC):
    """`0.665 ± 0.010`; squared errors, which may be small, with three significant digits."""
    if math.isnan(mean):
        return ""
    digits = 3
    size = abs(mean) if math.isnan(half_width) else max(abs(mean), half_width)
    if metric.startswith("mse") and 0 < size < 0.1:
        digits = min(2 - math.floor(math.log10(size)), 7)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half_width) else f" ± {half_width:.{digits}f}")


def markdown_table(header, rows):
    """A Markdown table whose columns also line up in a terminal."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def value_of(summary, name, subgroup, metric):
    """Mean and half width of a model's interval; NaN where it has none."""
    return summary.get((name, subgroup, metric), (math.nan, math.nan))[:2]


def marked_column(summary, names, subgroup, metric, unranked):
    """A column of a table: each model's number, the best of those that are not `unranked` in bold, the second in italics."""
    texts = {name: number(*value_of(summary, name, subgroup, metric), metric) for name in names}
    printed = {name: float(text.split()[0]) for name, text in texts.items() if text and name not in unranked}
    ranked = sorted(set(printed.values()), reverse=METRICS[metric][1])
    mark_of = dict(zip(ranked, ("**", "*")))
    marks = [mark_of.get(printed.get(name), "") for name in names]
    return [f"{mark}{texts[name]}{mark}" for name, mark in zip(names, marks)]


def paper_rows(text):
    """{model: [cell, ...]} of one of the paper's tables above."""
    rows = (line.strip().split(None, 1) for line in text.strip().splitlines())
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in rows}


def with_paper(names, header, columns, paper, paper_header):
    """A Markdown table of columns with a row per model, and the paper's own figures at its right (paper: {model: cells})."""
    nothing = [""] * len(paper_header)
    rows = [[name, *cells, *(paper.get(name, nothing) if paper else [])] for name, *cells in zip(names, *columns)]
    return markdown_table(["model", *header, *(f"paper: {column}" for column in paper_header if paper)], rows)


def best_model(summary, rows, trained, unranked):
    """The trained model to compare with the baselines: the highest Pearson Δ (top 20) of those that predict every
    condition, are no shuffled control, and have in most conditions a lower squared error than no change; None without."""
    errors = by_condition(rows, "mse_all")

    def is_sound(name):
        wins = [error < errors["no-change"][condition] for condition, error in errors[name].items()]
        return np.mean(wins) >= 0.5

    ranked = [name for name in trained if name not in unranked and "-shuffled" not in name]
    ranked = [name for name in ranked if is_sound(name)] or ranked
    return max(ranked, key=lambda name: summary[name, "all", MAIN_METRIC][0], default=None)


def verdict(summary, rows, trained, baselines, unranked):
    """What came out: a few sentences, and a table of the best trained model beside its rivals (Markdown)."""
    best = best_model(summary, rows, trained, unranked)
    if best is None:
        return "No trained model has predictions of all conditions: only baselines are compared.", ""
    variant, *suffix = best.split(",")
    shuffled = ",".join([f"{variant}-shuffled", *suffix])
    strongest = max(baselines, key=lambda name: summary[name, "all", MAIN_METRIC][0])
    rivals = [name for name in dict.fromkeys(["non-ctrl-mean", shuffled, "scgpt", strongest, "no-change"])
              if name != best and (name in trained or name in baselines)]

    values = by_condition(rows, MAIN_METRIC)
    table = []
    for name in (best, *rivals):
        wins = [value > values[name][condition] for condition, value in values[best].items()]
        table.append([name, number(*value_of(summary, name, "all", MAIN_METRIC)),
                      number(*value_of(summary, name, "all", "mse_top20"), "mse"),
                      "" if name == best else f"{sum(wins)} of {len(wins)}"])
    header = ["model", "Pearson Δ top 20", "MSE top 20", f"{best} better in"]

    is_above = summary[best, "all", MAIN_METRIC][0] > summary["non-ctrl-mean", "all", MAIN_METRIC][0]
    text = (f"By Pearson Δ on the top 20 genes, the best trained model, {best} ({table[0][1]}), "
            f"{'beats' if is_above else 'does NOT beat'} the mean of the training perturbations ({table[1][1]}).")
    above = [name for name in rivals if summary[name, "all", MAIN_METRIC][0] >= summary[best, "all", MAIN_METRIC][0]]
    if above:
        text += f" It is not above {' and '.join(above)}."
    if min(summary[name, "all", MAIN_METRIC][2] for name in trained) < 2:
        text += " One seed has no interval: train with several (04 --seed 42 23 89) before believing a difference."
    return text, markdown_table(header, table)


EXPLANATION = """\
Mean over the test conditions, then mean ± 95% interval (Student's t) over the seeds; **best**, *second best*.
**Pearson Δ** correlates the predicted with the measured change from the mean of the control cells, on all genes or on the 20
that are most differentially expressed; 1 is perfect, 0 tells nothing. **MSE** is the mean squared error of log-normalized
expression. **Pearson Systema** takes the change from the mean of the training perturbations instead, and **centroid
accuracy** is the share of other conditions that are farther from a prediction than its own: where predictions look alike,
these two are near chance, 0 and 0.5.

unseen_single: the target is perturbed in no training condition. combo_seen0, 1, 2: so many targets of the pair are.
`-shuffled` is a model whose texts were permuted among the genes: what it reaches does not come from what they say.

Baselines, which need no training:
"""


def write_report(path, args, data, test, summary, names, trained, unranked, words, runs, ridge_files):
    """Write report.md: the verdict, what the numbers mean, tables of all models by metric and by subgroup, the runs."""
    groups = ordered_subgroups(test)
    sections = [f"# {args.dataset}: predicting held-out perturbations"]
    if data.synthetic:
        sections += ["**SYNTHETIC data**: simulated cells of invented genes. The numbers show that the kit works, nothing "
                     "about biology."]
    sections += [f"Compared on {len(test.rows)} held-out conditions and {len(test.genes):,} genes.", *words]
    baselines = [f"- `{name}`: {what}" for name, what in BASELINES.items()]
    baselines += [f"- `{CEILING}`: no prediction; one half of a condition's cells scored as if it predicted the other. With "
                  "few cells both halves are noisy, and a good model can be above it."]
    vectors = ", ".join(file.name for file in ridge_files.values()) or "none"
    sections += [EXPLANATION + "\n" + "\n".join(baselines), f"Vectors of the ridge regressions: {vectors}.",
                 "![The split](split.png)"]

    paper = paper_rows(PAPER.get(args.dataset, ""))
    columns = [marked_column(summary, names, "all", metric, unranked) for metric in METRICS]
    n_seeds = [summary[name, "all", MAIN_METRIC][2] if name in trained else "–" for name in names]
    headings = [heading for heading, _ in METRICS.values()]
    sections += ["## All test conditions", with_paper(names, ["seeds", *headings], [n_seeds, *columns], paper,
                                                      [METRICS[metric][0] for metric in PAPER_METRICS])]
    for metric in (MAIN_METRIC, "mse_top20"):
        paper = paper_rows(PAPER_BY_SUBGROUP) if args.dataset == "norman" and metric == MAIN_METRIC else {}
        columns = [marked_column(summary, names, group, metric, unranked) for group in groups]
        header = [f"{group} ({n})" for group, n in groups.items()]
        sections += [f"## By subgroup: {METRICS[metric][0]}", with_paper(names, header, columns, paper, PAPER_SUBGROUPS)]

    header = ["model", "seed", "best epoch", "validation MSE", "parameters", "SHA-256 of its file"]
    table = [[run.name, run.seed, run.config.get("best_epoch", "–"), number(run.config.get("best_val_mse", math.nan)),
              run.config.get("n_parameters", "–"), shared.checksum(run.path)] for run in runs]
    controls = args.controls or "as many as the condition has cells"
    sections += ["![Bars by subgroup](subgroups.png)", "## Runs", markdown_table(header, table),
                 f"Control cells a condition: {controls}, drawn with seed {args.seed}, the same for all models."]
    shared.write_text(path, "\n\n".join(filter(None, sections)) + "\n")


def ordered_subgroups(test):
    """{subgroup: number of conditions}, single targets first, and `all` at the end."""
    groups = sorted(set(test.subgroups) - {""}, key=lambda group: (group != "unseen_single", group))
    return {group: (test.subgroups == group).sum() for group in groups} | {"all": len(test.rows)}


def print_table(summary, names, test, synthetic):
    """Print the main metric, a row per model; without the intervals where the terminal is too narrow for them."""
    width = shutil.get_terminal_size().columns
    groups = ordered_subgroups(test)
    header = ["model", *(f"{group.removeprefix('combo_').replace('_', ' ')} ({n})" for group, n in groups.items())]
    for has_intervals in (True, False):
        rows = [[name, *(number(*value_of(summary, name, group, MAIN_METRIC)[:1 + has_intervals]) for group in groups)]
                for name in names]
        table = markdown_table(header, rows)
        if len(table.splitlines()[0]) <= width:
            break
    title = f"{METRICS[MAIN_METRIC][0]}: correlation of predicted with measured change, 20 most changed genes"
    print("\n" + textwrap.fill(title + (" (SYNTHETIC data)" if synthetic else ""), width) + f"\n\n{table}\n")


# ---------------------------------------------------------------------------------------------------------------------
# Figures of the report

def draw_split(path, data, title):
    """Draw the conditions of the split by subgroup (the paper's Figure 7)."""
    bars = {}
    for part, color in zip(("train", "val", "test"), shared.COLORS):
        groups = data.subgroup[data.split == part]
        for group in sorted(set(groups), key=lambda group: (group != "unseen_single", group)):
            bars[f"{part} {group.replace('_', ' ')}".strip()] = (groups == group).sum(), color
    figure = shared.new_figure(6.5, 0.6 + 0.35 * len(bars), title)
    axes = figure.subplots()
    drawn = axes.barh(range(len(bars)), [n for n, _ in bars.values()], color=[color for _, color in bars.values()])
    axes.bar_label(drawn, padding=3)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel("conditions")
    shared.save_figure(figure, path)


def bar_style(name, trained, others):
    """Colours of a model's bars: trained models in colours, baselines in grey, the ceiling in white."""
    if name == CEILING:
        return {"color": "white", "edgecolor": "black"}
    if name in others:
        return {"color": str(0.3 + 0.6 * others.index(name) / len(others))}
    i = trained.index(name)
    n_colors = len(shared.COLORS)
    return {"color": shared.COLORS[i % n_colors], "edgecolor": "white", "hatch": ("", "//", "..", "xx")[i // n_colors % 4]}


def draw_bars(path, summary, names, trained, groups, title):
    """Draw bars with 95% intervals: Pearson delta and mean squared error on the top 20 genes, by subgroup (the paper's
    Figures 10 and 14 to 16). Of the ridge regressions only the best is shown."""
    ridges = [name for name in names if name.startswith("ridge_")]
    best_ridge = max(ridges, key=lambda name: summary[name, "all", MAIN_METRIC][0], default=None)
    names = [name for name in names if name not in ridges or name == best_ridge]
    others = [name for name in names if name not in trained]
    width = min(max(6.5, 1.2 + 0.22 * len(names) * len(groups)), 30)
    figure = shared.new_figure(width, 7.5, title)
    panels = {MAIN_METRIC: "Pearson Δ, top 20 DE genes", "mse_top20": "MSE, top 20 DE genes\n(log-normalized expression)"}
    for axes, (metric, label) in zip(figure.subplots(2, 1), panels.items()):
        for i, name in enumerate(names):
            means, half_widths = np.array([value_of(summary, name, group, metric) for group in groups]).T
            x = np.arange(len(groups)) + (i - (len(names) - 1) / 2) * 0.85 / len(names)
            axes.bar(x, means, 0.8 / len(names), label=name, yerr=None if np.isnan(half_widths).all() else half_widths,
                     capsize=2, error_kw={"lw": 1}, **bar_style(name, trained, others))
        low, high = axes.get_ylim()  # intervals over two seeds may run far beyond what can be
        largest = np.nanmax([value_of(summary, name, group, metric)[0] for name in names for group in groups])
        limits = (max(low, -1.05), min(high, 1.05)) if metric == MAIN_METRIC else (0, min(high, 1.5 * largest))
        axes.set_ylim(*limits)
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.set_xticks(range(len(groups)), [group.replace("_", " ") for group in groups])
        axes.set_ylabel(label)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    shared.save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# --predict: what single perturbations do

def read_perturbations(args, data):
    """The perturbations of --predict, {name: [gene, ...]}, from GENE, GENE+GENE, a condition of the dataset, a text file
    with one a line, or all-singles (every gene of the dataset). Genes that the dataset lacks join it (see add_genes)."""
    labels = []
    for item in args.predict:
        if item == "all-singles":
            labels += list(data.genes)
        elif Path(item).is_file():
            lines = [line.strip() for _, line in shared.read_lines(item)]
            labels += [line for line in lines if line and not line.startswith("#")]
        elif item.endswith((".txt", ".tsv", ".csv")):
            sys.exit(f"error: --predict {item}: no such file")
        else:
            labels.append(item)

    vocab = read_vocab(args, data)
    known = set(data.genes) | set(vocab)
    rules = SimpleNamespace(control=[prepare.CONTROL], separator="+", target_regex=None, genes=known, upper_case=False)
    own_rules = SimpleNamespace(**{**vars(rules), "separator": own_separator(args)})
    wanted, problems = {}, []
    for label in labels:
        try:
            genes = prepare.parse_condition(label, rules)
            if not set(genes) <= known:  # perhaps written as in the user's own file
                own = prepare.parse_condition(label, own_rules)
                genes = own if set(own) <= known else genes
        except ValueError as error:
            problems.append(f"{label!r} ({error})")
            continue
        unknown = [gene for gene in genes if gene not in known]
        if unknown or not genes:
            problems.append(f"{label!r}{nearest(unknown, data.genes, vocab)}")
        elif sorted(genes) not in [sorted(other) for other in wanted.values()]:  # A+B and B+A are one
            wanted["+".join(genes)] = genes
    if problems:
        message = f"{len(problems):,} of {len(labels):,} are no genes of the dataset or its vocabulary: {shown(problems, 10)}"
        if not args.skip_unknown or not wanted:
            sys.exit(f"error: --predict: {message} (--skip-unknown goes on without them)")
        print(f"left out: {message}")
    add_genes(data, wanted, vocab)
    return wanted


def read_vocab(args, data):
    """The vocabulary {symbol: token_id} that the dataset was made with; empty where it is not at hand."""
    path = args.vocab or args.root / "data" / "human" / "scgpt" / "vocab.json"
    if args.vocab and not path.exists():
        sys.exit(f"error: --vocab {path} does not exist")
    return shared.read_json(path, int) if path.exists() and shared.fingerprint(path) == data.vocab else {}


def own_separator(args):
    """What stands between targets in the labels of the file that the dataset was made from."""
    made = shared.recorded_made_from(args.root / "data" / args.dataset / "dataset.h5")
    return json.loads(made)["options"]["separator"]


def nearest(unknown, genes, vocab):
    """` (did you mean ...?)` for the first unknown gene: names of the dataset, or else of the vocabulary, in any case."""
    for names in (genes, vocab):
        by_capitals = {name.upper(): name for name in names}
        found = difflib.get_close_matches(unknown[0].upper(), by_capitals, 2) if unknown else []
        if found:
            return f" (did you mean {' or '.join(by_capitals[name] for name in found)}?)"
    return ""


def add_genes(data, wanted, vocab):
    """Let genes of the perturbations that the dataset lacks join it as unmeasured ones; data.new_genes lists them."""
    known = set(data.genes)
    used = dict.fromkeys(gene for genes in wanted.values() for gene in genes)
    data.new_genes = [gene for gene in used if gene not in known]
    if data.new_genes:
        n = len(data.new_genes)
        print(f"not in the dataset, joined as unmeasured genes: {shown(data.new_genes)}")
        data.genes = np.concatenate([data.genes, np.array(data.new_genes, dtype=object)])
        data.token_ids = np.concatenate([data.token_ids, [vocab[gene] for gene in data.new_genes]])
        data.measured = np.concatenate([data.measured, np.zeros(n, dtype=bool)])
        data.mean = np.pad(data.mean, ((0, 0), (0, n)))
        data.X.resize(data.X.shape[0], len(data.genes))
    token_of = dict(zip(data.genes, data.token_ids))
    without_token = [gene for gene in used if token_of[gene] == data.pad_id]
    if without_token:
        print(f"not in the vocabulary, so that models cannot tell these from each other: {shown(without_token)}")


def add_language(net, run, data, args):
    """Give a model the language vectors of data.new_genes, from the files that its run was trained with."""
    if not data.new_genes or not net.config.languages:
        return
    token_ids = data.token_ids[-len(data.new_genes):]
    is_missing = (net.language_rows[token_ids] < 0).numpy()
    if not is_missing.any():  # a released model has a row for the whole vocabulary
        return
    genes_missing = np.array(data.new_genes, dtype=object)[is_missing]
    files = run.config.get("embeddings", {})
    vectors = {}
    for source in net.config.languages:
        if source not in files:
            sys.exit(f"error: --predict: {run.path} has no vector for {shown(genes_missing)}; name its run, not its file")
        folder = args.root / "data" / shared.space_of(args.dataset) / "embeddings"
        genes, of_genes = embed.read_embeddings(folder / files[source])
        row_of = {gene: row for row, gene in enumerate(genes)}
        without = [gene for gene in genes_missing if gene not in row_of]
        if without:
            sys.exit(f"error: --predict: {files[source]} has no vector for {shown(without)}, which {run.name} needs; choose "
                     "other models with --run")
        vectors[source] = of_genes[[row_of[gene] for gene in genes_missing]]
    net.add_language(token_ids[is_missing], vectors)


def predict_deltas(runs, perturbations, data, control, machine, args):
    """What every model says of every perturbation: {(name of the perturbation, run index): (cells, genes) changes of each
    control cell}, and under the name "" the change that it predicts where nothing is perturbed."""
    position = {gene: i for i, gene in reversed(list(enumerate(data.genes)))}
    baseline = control.mean(0, dtype=np.float64)
    changes = {}
    with tqdm(total=len(runs) * (len(perturbations) + 1), unit=" perturbations", leave=False, disable=None) as progress:
        for i, run in enumerate(runs):
            net = load_model(run.path, data)
            add_language(net, run, data, args)
            net.to(machine.device)
            for name, genes in {"": [], **perturbations}.items():
                target_idx = [position[gene] for gene in genes]
                predicted = predict_cells(net, run.path, data, control, target_idx, machine)
                keep = predicted if machine.keep_cells else predicted.mean(0, keepdims=True, dtype=np.float64)
                changes[name, i] = (keep - baseline).astype(np.float32)
                progress.update()
    return changes, baseline


def measured_rows(data, genes):
    """Conditions of the dataset with exactly these targets."""
    wanted = set(genes)
    return [row for row, targets in enumerate(data.targets) if set(data.genes[targets[targets >= 0]]) == wanted]


def most_changed(change, data):
    """The 20 measured genes (at most) with the largest change (genes,), the largest first."""
    size = np.where(data.measured, np.abs(change), -1)
    return np.argsort(-size, kind="stable")[:min(20, data.measured.sum())]


def effect_rows(wanted, runs, deltas, data, baseline):
    """Rows of predicted.csv and predicted_genes.csv. deltas: {(name, run index): (genes,) mean change}.

    effect_rms is the root mean square of the change over the measured genes; interaction_rms, for pairs, that of what is
    left when the changes of the single targets are taken away, each less what is predicted where nothing is perturbed.
    """
    runs_of = {}  # model: its seeds' places in `runs`
    for i, run in enumerate(runs):
        runs_of.setdefault(run.name, []).append(i)
    ctrl = data.mean[data.split == "ctrl"][0].astype(np.float64)

    def rms(change):
        return float(np.sqrt((change[data.measured] ** 2).mean()))

    def interaction(genes, i):
        alone = sum(deltas[gene, i] - deltas["", i] for gene in genes)
        return rms(deltas["+".join(genes), i] - deltas["", i] - alone)

    effects, gene_rows = [], []
    for name, genes in wanted.items():
        rows = measured_rows(data, genes)
        measured = data.mean[rows].mean(0) - ctrl if rows else np.full(len(ctrl), math.nan)
        for of_model, places in runs_of.items():
            size, interval = metrics.interval95([rms(deltas[name, i]) for i in places])
            apart = np.mean([interaction(genes, i) for i in places]) if len(genes) > 1 else math.nan
            mean = np.mean([deltas[name, i] for i in places], axis=0)
            order = most_changed(mean, data)
            top = " ".join(f"{data.genes[g]}:{mean[g]:+.3f}" for g in order[:10])
            effects.append((name, of_model, len(places), size, interval, float(apart), top))
            for g in order:
                value, half_width = metrics.interval95([deltas[name, i][g] for i in places])
                gene_rows.append((name, of_model, data.genes[g], float(baseline[g]), float(baseline[g]) + value, value,
                                  half_width, float(measured[g])))
    return sorted(effects, key=lambda row: -row[3]), gene_rows


def predict_perturbations(args, data, runs, machine):
    """Predict the perturbations of --predict with every model and write results/<dataset>/predicted/<--name>/."""
    wanted = read_perturbations(args, data)
    parts = {gene: [gene] for genes in wanted.values() if len(genes) > 1 for gene in genes}  # to compare pairs with
    cells = training.random_stream("predict", args.seed).choice(data.ctrl_cells, args.controls or N_FIGURE_CONTROLS)
    control = data.X[cells].toarray()
    has_figures = len(wanted) <= MOST_FIGURES
    machine.keep_cells = args.cells or has_figures
    print(f"perturbations: {len(wanted):,}; models: {len(runs)}; control cells for each: {len(cells)}")
    changes, baseline = predict_deltas(runs, parts | wanted, data, control, machine, args)
    deltas = {key: change.mean(0, dtype=np.float64) for key, change in changes.items()}
    effects, gene_rows = effect_rows(wanted, runs, deltas, data, baseline)

    folder = args.root / "results" / args.dataset / "predicted" / args.name
    write_csv(folder / "predicted.csv",
              ("condition", "model", "n_seeds", "effect_rms", "interval", "interaction_rms", "top_genes"), effects)
    write_csv(folder / "predicted_genes.csv",
              ("condition", "model", "gene", "control", "predicted", "delta", "interval", "measured_delta"), gene_rows)
    write_predicted(folder, args, data, runs, wanted, changes, deltas, baseline, control)
    for old in folder.glob("*.png"):  # of an earlier call
        old.unlink()
    for name, genes in wanted.items() if has_figures else ():
        of_models = {}
        for i, run in enumerate(runs):
            of_models.setdefault(run.name, []).append(changes[name, i])
        draw_perturbation(folder, name, data, {model: np.concatenate(c) for model, c in of_models.items()},
                          measured_rows(data, genes))
    warn_of_likeness(wanted, runs, deltas, data)
    for name, of_model, _, size, _, _, top in [row for row in effects if "-shuffled" not in row[1]][:10]:
        print(f"{name}: effect {size:.4f} by {of_model}; {' '.join(top.split()[:5])} ...")
    print(f"values{' and figures' if has_figures else ''}: {folder}")


def write_predicted(folder, args, data, runs, wanted, changes, deltas, baseline, control):
    """Write predicted.h5ad, mean profiles of every perturbation and run, and with --cells predicted.cells.h5ad."""
    keys = [(name, i) for name in wanted for i in range(len(runs))]
    made = shared.made_from({"controls": len(control), "seed": args.seed},
                            {f"{run.name}, seed {run.seed}": shared.checksum(run.path) for run in runs})
    obs = {"condition": [name for name, _ in keys], "model": [runs[i].name for _, i in keys],
           "seed": [runs[i].seed for _, i in keys]}
    mean_control = baseline[data.measured].astype(np.float32)
    X = np.stack([deltas[key][data.measured] for key in keys]) + mean_control
    genes = data.genes[data.measured]
    prepare.write_h5ad(folder / "predicted.h5ad", made, X, obs, genes, describe(data, "predicted means"), mean_control)
    if args.cells:
        blocks, rows = [], []
        for i, run in enumerate(runs):
            for name in ("", *wanted):
                cells = control if name == "" else changes[name, i] + baseline
                blocks.append(cells[:, data.measured])
                rows += [(name or prepare.CONTROL, run)] * len(cells)
        labels = [name for name, _ in rows]
        obs = {"condition": labels, "target_gene": target_genes(labels), "model": [run.name for _, run in rows],
               "seed": [run.seed for _, run in rows]}
        prepare.write_h5ad(folder / "predicted.cells.h5ad", made, np.maximum(np.concatenate(blocks), 0).astype(np.float32),
                           obs, genes, describe(data, "predicted cells below measured control cells"))


def warn_of_likeness(wanted, runs, deltas, data):
    """Print a warning for a model that predicts nearly the same change for all perturbations."""
    for i, run in enumerate(runs) if len(wanted) > 1 else ():
        change = np.array([deltas[name, i][data.measured] for name in list(wanted)[:200]])
        with np.errstate(invalid="ignore"):  # a model that predicts no change at all
            likeness = np.median(np.corrcoef(change)[np.triu_indices(len(change), 1)])
        if likeness > 0.99:
            print(f"warning: {run.name}, seed {run.seed} predicts nearly the same change for all of these (median correlation "
                  f"{likeness:.3f}): it says little of each", file=sys.stderr)


def draw_perturbation(folder, name, data, predicted, rows):
    """Draw the top genes of one perturbation: change as measured in the conditions `rows`, if any, and as each model
    predicts it, {model: (cells, genes)} (the paper's Figures 8 and 9)."""
    ctrl = data.mean[data.split == "ctrl"][0].astype(np.float64)
    series = dict(predicted)
    if rows:
        top = data.de_idx[rows[0]][data.de_idx[rows[0]] >= 0]
        cells = np.flatnonzero(np.isin(data.cell_condition, rows))
        series = {"measured": data.X[cells].toarray() - ctrl} | series
        words = "that are most differentially expressed, measured and predicted"
    else:
        top = most_changed(next(iter(predicted.values())).mean(0), data)
        words = f"that change most as {next(iter(predicted))} predicts; not measured"
    figure = shared.new_figure(12, 5, f"{name}: the {len(top)} genes {words}{' (SYNTHETIC data)' if data.synthetic else ''}\n"
                               "box: middle half of the cells; line: median; diamond: mean; whiskers: without outliers")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        color = shared.GREY if label == "measured" else shared.COLORS[(i - bool(rows)) % len(shared.COLORS)]
        x = np.arange(len(top)) + (i - (len(series) - 1) / 2) * width
        diamond = {"marker": "D", "markersize": 4, "markerfacecolor": color, "markeredgecolor": "black", "markeredgewidth": 0.5}
        axes.boxplot(values[:, top], positions=x, widths=0.9 * width, showfliers=False, patch_artist=True, showmeans=True,
                     manage_ticks=False, medianprops={"color": "black"}, meanprops=diamond, boxprops={"facecolor": color})
        axes.bar(0, 0, color=color, label=label)  # for the legend
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xlim(-0.6, len(top) - 0.4)
    axes.set_xticks(range(len(top)), data.genes[top], rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_ylabel("expression of a cell less the control mean\n(log-normalized)")
    handles = axes.get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    shared.save_figure(figure, folder / f"{urllib.parse.quote(name, safe='+')[:200]}.png")


# ---------------------------------------------------------------------------------------------------------------------

def parse_arguments():
    parser = shared.common_options(argparse.ArgumentParser(description=__doc__))
    add = parser.add_argument
    add("--run", nargs="+", metavar="NAME", help="runs to evaluate by the name of their folder; model files, own or the "
        "authors', as FILE.pt or NAME=FILE.pt; released:VARIANT fetches what the authors fine-tuned on norman or adamson "
        "(default: all finished runs)")
    add("--external", nargs="+", default=[], metavar="NAME=FILE.h5ad", help="predictions of another method: obs column "
        "condition, X predicted expression per cell or per condition")
    add("--predict", nargs="+", metavar="GENE", help="only predict these perturbations, measured or not: GENE, GENE+GENE, a "
        "text file with one a line, or all-singles (every gene of the dataset)")
    add("--skip-unknown", action="store_true", help="leave genes of --predict out that nothing is known of")
    add("--name", default="last", metavar="NAME", help="folder of what --predict finds (default: last)")
    add("--cells", action="store_true", help="also write every predicted cell, below the control cells, as *.cells.h5ad")
    add("--vocab", type=Path, metavar="FILE", help="vocab.json for targets of --predict that the dataset lacks (default: "
        "data/human/scgpt/)")
    add("--controls", type=int, metavar="N", help="control cells a condition (default: as many as the condition has cells; "
        f"--predict: {N_FIGURE_CONTROLS})")
    add("--seed", type=shared.seed, default=42, metavar="N", help="of the draw of control cells (default: 42)")
    add("--batch-size", type=int, metavar="N", help="cells at a time (default: what suits the device)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_args()
    for name in ("controls", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            sys.exit(f"error: --{name.replace('_', '-')} has to be above 0")
    shared.check_name(args.name, "--name")
    return args


def check_names(runs, embeddings, external):
    """End the run where two models would have the same name in the tables."""
    others = [*BASELINES, CEILING, *(f"ridge_{source}" for source in embeddings), *(item.split("=")[0] for item in external)]
    names = [f"{run.name}, seed {run.seed}" for run in runs] + others
    clash = [name for name in names if names.count(name) > 1] + [run.name for run in runs if run.name in others]
    if clash:
        sys.exit(f"error: two models are called {clash[0]}; rename one: --run NAME=FILE.pt, --external NAME=FILE.h5ad")


def evaluate(args, data, runs, embeddings, machine):
    """Compare all models and baselines on the held-out conditions; write tables, figures and report."""
    results = args.root / "results" / args.dataset
    test = held_out(data)
    if not len(test.rows):
        sys.exit(f"error: {args.dataset} has no test conditions (03 --split none): nothing to compare; use --predict")
    dataset_made = shared.fingerprint(args.root / "data" / args.dataset / "dataset.h5")
    controls = draw_controls(data, test.rows, args.controls, args.seed)
    print(f"{len(test.rows)} test conditions, {len(test.genes):,} genes, {sum(map(len, controls)):,} control cells to predict "
          "from")

    # Mean profiles: (name, seed, predicted (P, G), true (P, G))
    external = [read_external(item, data, test) for item in args.external]
    profiles = [(run.name, run.seed, predict_run(run, args, data, test, controls, machine, dataset_made), test.true)
                for run in runs]
    profiles += [(name, "", means, test.true) for name, means in external]
    baselines, ridge_files = all_baselines(data, test, embeddings)
    if args.cells:
        write_measured_cells(results / "predictions" / "measured.cells.h5ad", data, test, dataset_made, args.force)

    rows = score(profiles + baselines, data, test)
    summary = summarize(rows)
    write_csv(results / "metrics.csv", ("model", "seed", "condition", "subgroup", "metric", "value"), rows)
    write_csv(results / "summary.csv", ("model", "subgroup", "metric", "mean", "interval", "n_seeds"),
              [(*key, *value) for key, value in summary.items()])

    names = [name for name in dict.fromkeys(name for name, *_ in profiles + baselines) if (name, "all", "mse_all") in summary]
    trained = list(dict.fromkeys(name for name, *_ in profiles))
    partial = {name: np.isfinite(means).all(1).sum() for name, means in external if np.isnan(means).any()}
    text, table = verdict(summary, rows, trained, [name for name in names if name not in (*trained, CEILING)], partial)
    for name, n in partial.items():
        text += f" {name} is not ranked: its file has {n} of the {len(test.rows)} conditions."
    label = f"{args.dataset}{' (SYNTHETIC data)' if data.synthetic else ''}"
    draw_split(results / "split.png", data, f"{label}: conditions of the split")
    draw_bars(results / "subgroups.png", summary, names, trained, list(ordered_subgroups(test)), f"{label}: held-out "
              "perturbations\nmean over conditions and seeds (grey: baselines); lines: 95% interval over seeds")
    write_report(results / "report.md", args, data, test, summary, names, trained, {CEILING, *partial}, (text, table), runs,
                 ridge_files)

    print_table(summary, [*trained, *[name for name in names if name in ("non-ctrl-mean", "no-change")]], test, data.synthetic)
    print(textwrap.fill(text, shutil.get_terminal_size().columns))
    print(f"\nreport with all baselines, metrics and figures: {results / 'report.md'}")
    print_next(args, data, runs)


def print_next(args, data, runs):
    """Print commands that may come next."""
    if args.dataset == "demo" and runs:
        singles = data.genes[data.targets[data.subgroup == "unseen_single"][:2, 0]]
        print(f"next: {shared.command('05_eval.py', args, '--predict', *singles, '+'.join(singles))}")
        print("your own cells: python 03_prepare_data.py --dataset mine --h5ad FILE.h5ad --condition-key COLUMN --control LABEL")


def main():
    args = parse_arguments()
    dataset_path = args.root / "data" / args.dataset / "dataset.h5"
    data = prepare.load_dataset(dataset_path, shared.command("03_prepare_data.py", args))
    embeddings = training.find_embeddings(args.root, args.dataset)
    runs = find_models(args)
    check_names(runs, embeddings, args.external)
    if args.predict and not runs:
        sys.exit(f"error: no finished run to predict with; run first: {shared.command('04_train.py', args)}")
    device = training.choose_device(args.device)
    autocast, _ = training.mixed_precision(device)
    machine = SimpleNamespace(device=device, autocast=autocast, batch_size=args.batch_size, keep_cells=args.cells)
    print("device: {}, {}".format(*training.describe_device(device)))
    if args.predict:
        predict_perturbations(args, data, runs, machine)
    else:
        evaluate(args, data, runs, embeddings, machine)


if __name__ == "__main__":
    shared.run(main)
