"""Stage 05: predictions of the held-out perturbations, tables and figures -> results/<dataset>/

    python 05_eval.py                                              the demo: every finished run beside the baselines
    python 05_eval.py --dataset norman                             as many control cells as each condition has cells
    python 05_eval.py --dataset norman --controls 50               quicker, for a machine without a GPU
    python 05_eval.py --dataset norman --run scgpt released:scgenept_go_c mine=model.pt       chosen runs, the authors' own
                                                                   fine-tuned model (fetched), a file
    python 05_eval.py --dataset norman --external GEARS=gears.h5ad                     another method's predictions
    python 05_eval.py --dataset norman --predict POU3F2 CEBPE+KLF1                     what these perturbations do
    python 05_eval.py --dataset norman --cells                                         cell by cell, for scanpy and cell-eval

Writes metrics.csv (a value a condition), summary.csv (mean and 95% interval over seeds), report.md with figures, and each
model's predicted means as predictions/<model>.seed<N>.h5ad, which anndata and scanpy open. Predictions that are there already
are used again.

The prediction of a condition is the mean over control cells of what the model predicts for each; every model gets the same
control cells. Beside the models stand baselines, which need no training; report.md says what each is.

--cells writes <model>.seed<N>.cells.h5ad (control cells as measured, and every predicted cell) and measured.cells.h5ad, the
measured cells of the same conditions: the pair that `cell-eval run --pert-col condition --control-pert ctrl` takes.
"""
import argparse
import csv
import difflib
import importlib
import io
import json
import math
import re
import sys
import time
import urllib.parse
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np

import metrics

shared = importlib.import_module("01_fetch_annotations")
training = importlib.import_module("04_train")

BUCKET, FINETUNED = "https://czi-scgenept-public.s3.amazonaws.com/", "models/finetuned/"  # <variant>/<dataset>/<file>.pt
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
CELLS_X_GENES = 80_000   # predicted between two steps of the progress bar
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
# Predictions

def fetch_released(variant, dataset, folder):
    """The files of a variant that the authors fine-tuned on a dataset, downloaded to `folder`. Their names follow no rule: the
    bucket is asked for the list."""
    found = shared.request(BUCKET, folder, lambda response: re.findall(
        rf"<Key>{FINETUNED}([\w+-]+)/([\w-]+)/([\w.+-]+\.pt)</Key>", response.raw.read(2**20).decode("utf-8", "replace")),
        params={"list-type": 2, "prefix": FINETUNED})
    files = [file for of_variant, of_dataset, file in found if (of_variant, of_dataset) == (variant, dataset)]
    if not files:
        there = ", ".join(sorted({f"{of_variant} ({of_dataset})" for of_variant, of_dataset, _ in found}))
        sys.exit(f"error: --run released:{variant}: {shared.address(BUCKET)} lists no such model of {dataset}; there are: {there or 'none'}")
    return [shared.download(BUCKET + urllib.parse.quote(f"{FINETUNED}{variant}/{dataset}/{file}"), folder / variant / dataset / file) for file in files]


def find_files(items, dataset, folder):
    """Models given as FILE.pt, NAME=FILE.pt or released:VARIANT (fetched to `folder`): namespaces as find_runs gives."""
    models = []
    for item in items:
        kind, _, variant = item.partition(":")
        name, _, file = (f"{variant}-released", "", "") if kind == "released" else ("", "", item) if Path(item).exists() else item.partition("=")
        for path in fetch_released(variant, dataset, folder) if kind == "released" else [Path(file)]:
            if not path.exists():
                sys.exit(f"error: --run {item}: {path} does not exist")
            seed = re.search(r"seed_?(\d+)", path.name)
            models.append(SimpleNamespace(name=shared.check_name(name or path.stem.replace(".", "_"), "--run"), seed=int(seed[1]) if seed else 0,
                                          path=path, embeddings={}, options={}, facts=("–", "–", "–")))
    return models


def find_runs(folder, wanted, dataset_path, of_dataset):
    """Finished runs as namespaces (name, seed, path, embeddings, options, facts), in order of name and seed; all of them, or those of
    the names `wanted`. Runs that cannot be compared (not finished, other data) are named and left out."""
    runs, names = [], set()
    made_by = f"python 04_train.py{of_dataset}"
    fingerprint = shared.fingerprint(dataset_path)
    for path in sorted(path for path in folder.glob("*/seed*/config.json") if path.parent.name[4:].isdigit()):
        config = shared.read_json(path, object)
        try:
            name, seed = path.parent.parent.name, int(path.parent.name[4:])
            made_from = json.loads(config["made_from"])
            inputs, options = made_from["inputs"], dict(made_from["options"])
            run = SimpleNamespace(name=name, seed=seed, path=path.parent / "model.pt", embeddings=dict(config["embeddings"]), options=options, facts=(
                config.get("best_epoch"), f"{config.get('best_val_mse', math.nan):.5f}", f"{config.get('n_parameters', 0):,}"))
            if not all(file == Path(file).name for file in run.embeddings.values()):
                raise ValueError("files of other folders")
            inputs.get("dataset.h5")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            sys.exit(f"error: {path}: not a run's config.json; train again: {made_by} --force")
        names.add(name)
        if wanted is not None and name not in wanted:
            continue
        if not config.get("finished"):
            print(f"left out: {path.parent} is not finished; {made_by} --variant {name} --seed {seed} goes on with it")
        elif inputs.get("dataset.h5") != fingerprint:
            words = shared.change(str(inputs.get("dataset.h5")), fingerprint)
            print(f"left out: {path.parent}: {dataset_path} {words} since it was trained; {made_by} --variant {name} --seed {seed} --force trains again")
        else:
            runs.append(run)
    for name in wanted or ():
        if name not in names:
            sys.exit(f"error: --run {name}: not found in {folder}; there are: {', '.join(sorted(names)) or 'none'}")
    return sorted(runs, key=lambda run: (not run.name.startswith("scgpt"), run.name, run.seed))


def unlike(runs):
    """A sentence for every model whose runs were trained with different options: their interval is not one over seeds alone."""
    sentences = []
    for name in dict.fromkeys(run.name for run in runs):
        options = [run.options for run in runs if run.name == name]
        differing = [f"{key} ({', '.join(dict.fromkeys(str(of.get(key)) for of in options))})" for key in sorted({key for of in options for key in of})
                     if any(of.get(key) != options[0].get(key) for of in options)]
        if differing:
            sentences.append(f" The runs of {name} differ in {', '.join(differing)}: they are not seeds of one model.")
    return "".join(sentences)


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


def predict_cells(net, path, data, control, targets, device, batch_size):
    """What the network of the file `path` predicts for control cells (N, G): (N, G). Ends the run where it lacks one of the genes."""
    import model
    autocast, _ = training.mixed_precision(device)
    try:
        with autocast():
            return model.predict(net, data.token_ids, control, targets, batch_size)
    except ValueError as error:
        sys.exit(f"error: {path}: {error}: trained on other genes than these")


def predict_means(path, data, conditions, controls, device, batch_size, title, cells_to=None):
    """Mean predicted profile of each condition by the model in `path`: (conditions, G) float64. Appends what it predicts for the
    cells, blocks of (cells, measured genes), to the list `cells_to`."""
    from tqdm import tqdm
    net, step = load_model(path, data).to(device), max(batch_size or 1, CELLS_X_GENES // len(data.genes))
    means = np.zeros((len(conditions), len(data.genes)))
    with tqdm(total=sum(map(len, controls)), desc=f"  {title}", unit=" cells", leave=False, disable=None) as progress:
        for row, (condition, cells) in enumerate(zip(conditions, controls)):
            targets = data.targets[condition]
            for start in range(0, len(cells), step):  # blocks, so that memory does not grow with the number of cells
                block = data.X[cells[start:start + step]].toarray()
                predicted = predict_cells(net, path, data, block, targets[targets >= 0], device, batch_size)
                means[row] += predicted.sum(0, dtype=np.float64)
                if cells_to is not None:
                    cells_to.append(predicted[:, data.measured])
                progress.update(len(block))
            means[row] /= len(cells)
    return means


def numbered(genes):
    """(gene, how often it stood before) of each gene: a symbol may stand several times."""
    times, pairs = Counter(), []
    for gene in genes:
        pairs.append((gene, times[gene]))
        times[gene] += 1
    return pairs


def write_h5ad(path, made, X, obs, genes, description, data, control=None):
    """Write X (rows, genes), dense or CSR, as an AnnData file with obs {column: values}; with `control` (genes,), the mean of control
    cells, also the layers `control` and `delta`. The index of obs is the condition where that is unique."""
    def encode(item, kind, version="0.2.0"):
        item.attrs.update({"encoding-type": kind, "encoding-version": version})

    def table(file, name, index, columns):
        group = file.create_group(name)
        encode(group, "dataframe")
        group.attrs.update({"_index": "_index", "column-order": np.array(list(columns), dtype=h5py.string_dtype())})
        for column, values in {"_index": index, **columns}.items():
            if isinstance(values[0], str):
                shared.write_strings(group, column, values)
            else:
                group[column] = np.asarray(values)
            encode(group[column], "string-array" if isinstance(values[0], str) else "array")

    index = obs["condition"]
    if len(set(index)) < len(index):
        index = [f"{condition} {row}" for row, condition in enumerate(index)]
    unique = [f"{gene}-{n}" if n else gene for gene, n in numbered(genes)]  # as from scanpy's var_names_make_unique
    about = shared.provenance(made)
    with shared.write_h5(path, made) as file:
        encode(file, "anndata", "0.1.0")
        if isinstance(X, np.ndarray):
            file["X"] = X.astype(np.float32, copy=False)
            encode(file["X"], "array")
        else:
            group = file.create_group("X")
            encode(group, "csr_matrix", "0.1.0")
            group.attrs["shape"] = np.array(X.shape)
            group["data"], group["indices"], group["indptr"] = X.data, X.indices, X.indptr
        table(file, "obs", index, obs)
        table(file, "var", unique, {"gene_name": list(genes)})
        for name in ("layers", "obsm", "obsp", "varm", "varp", "uns"):
            encode(file.create_group(name), "dict", "0.1.0")
        for name, text in {"description": description + (" of SYNTHETIC cells" if data.synthetic else ""), "control": data.control,
                           **{name: about[name] for name in ("command", "date", "versions", "made_from")}}.items():
            file["uns"].create_dataset(name, data=text, dtype=h5py.string_dtype())
            encode(file["uns"][name], "string")
        if control is not None:
            for name, values in (("control", control), ("delta", X - control)):
                file["layers"].create_dataset(name, X.shape, np.float32)[...] = values
                encode(file["layers"][name], "array")


def write_cells(path, made, blocks, obs, data):
    """Write blocks of cells (cells, measured genes), predicted ones and the control cells that readers compare them with."""
    X = np.concatenate(blocks)
    np.maximum(X, 0, out=X)  # the network's output is linear; readers of log-normalized data refuse values below 0
    write_h5ad(path, made, X, obs, data.genes[data.measured],
               "predicted log-normalized expression of cells, not below 0; control cells as measured", data)


# ---------------------------------------------------------------------------------------------------------------------
# Baselines

def random_means(data, conditions, draw):
    """The profile of one training perturbation drawn at random for each condition: (conditions, G)."""
    return data.mean[np.random.default_rng([draw, 5]).choice(np.flatnonzero(data.split == "train"), len(conditions))]


def baseline_means(data, conditions):
    """Mean profiles that the baselines without chance predict for each condition: {name: (conditions, G)}."""
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
    return {"non-ctrl-mean": np.tile(non_ctrl, (len(conditions), 1)),
            "no-change": np.tile(ctrl, (len(conditions), 1)),
            "matching-mean": np.stack([np.mean([profile_of.get(t, non_ctrl) for t in targets], axis=0) for targets in parts]),
            "additive": np.stack([ctrl + sum(profile_of.get(t, ctrl) - ctrl for t in targets) for targets in parts])}


def ridge_means(data, conditions, path):
    """What GenePert's ridge regression predicts for each condition, (conditions, G), or None where the source has a vector
    for no training target: from the sum of the targets' language vectors to the mean response, with an intercept. A target without
    a vector has the mean of the training targets'. The penalty is the one with the lowest error on the validation conditions."""
    genes, vectors = shared.read_embeddings(path, "02_embed.py")
    row_of = {gene: row for row, gene in enumerate(genes)}
    row = np.array([row_of.get(gene, -1) for gene in data.genes] + [-1])  # the last is that of target -1
    has_vector = (row[data.targets] >= 0) & (data.targets >= 0)
    trained, val = np.flatnonzero((data.split == "train") & has_vector.any(1)), np.flatnonzero(data.split == "val")
    if not len(trained):
        return None
    seen = np.unique(data.targets[trained][has_vector[trained]])
    mean_vector = vectors[row[seen]].mean(0, dtype=np.float64)
    x = np.array([sum((vectors[row[t]] if row[t] >= 0 else mean_vector for t in targets if t >= 0), np.zeros(vectors.shape[1]))
                  for targets in data.targets])
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


def halves(data, conditions, draw):
    """Mean profiles of two random halves of each condition's cells, two arrays (conditions, G); NaN for a single cell."""
    rng = np.random.default_rng([draw, 6])
    means = np.full((2, len(conditions), len(data.genes)), np.nan)
    for row, condition in enumerate(conditions):
        cells = rng.permutation(np.flatnonzero(data.cell_condition == condition))
        for half, chosen in enumerate(np.array_split(cells, 2)):
            if len(cells) > 1:
                means[half, row] = np.asarray(data.X[chosen].mean(axis=0)).ravel()
    return means


def read_external(item, data, conditions):
    """Another method's predictions, NAME=FILE.h5ad: an obs column `condition`, X predicted expression per cell or per
    condition, genes by symbol. Returns the name and the mean profiles (conditions, G of the measured genes), NaN for conditions
    that the file lacks."""
    prepare = importlib.import_module("03_prepare_data")
    name, _, path = item.partition("=")
    if not path or not Path(path).exists():
        sys.exit(f"error: --external {item}: expected NAME=FILE.h5ad, a file that exists")
    shared.check_name(name, "--external")
    with prepare.damage_in(path), shared.read_h5(path) as file:
        obs, var = (prepare.find(file, key, path) for key in ("obs", "var"))
        if obs is None or var is None or prepare.find(file, "X", path) is None:
            sys.exit(f"error: {path}: no X, obs or var in it: not an AnnData file")
        labels, label_of_cell = prepare.read_column(obs, "condition", path)
        gene_key = "gene_name" if prepare.find(var, "gene_name", path) is not None else str(prepare.attribute(var, path, "_index"))
        values, codes = prepare.read_column(var, gene_key, path)
        column = {gene: i for i, gene in enumerate(numbered(values[codes]))}
        genes = numbered(data.genes[data.measured])
        places = [column.get((gene, n), column.get((f"{gene}-{n}", 0))) for gene, n in genes]  # the second X, by anndata's names
        missing = [gene for (gene, _), place in zip(genes, places) if place is None]
        if missing:
            sys.exit(f"error: {path}: {len(missing):,} of {len(genes):,} genes are missing, the first {missing[0]!r}")
        row_of = {label: row for row, label in enumerate(labels)}
        n_cells = np.bincount(label_of_cell[label_of_cell >= 0], minlength=len(labels))
        there = np.array([label in row_of and n_cells[row_of[label]] > 0 for label in data.conditions[conditions]])
        if not there.any():
            sys.exit(f"error: {path}: none of the {len(conditions)} test conditions is in obs/condition, as {data.conditions[conditions[0]]!r}")
        if strange := sorted(set(labels) - set(data.conditions)):
            print(f"{path}: {len(strange):,} of its {len(labels):,} labels are no condition of the dataset: {prepare.shown(strange)}")
        sums = np.zeros((len(labels), len(codes)))
        for cells, genes, X in prepare.read_blocks(file, path, (len(label_of_cell), len(codes))):
            of_cells = label_of_cell[cells]
            for label in np.unique(of_cells[of_cells >= 0]):
                sums[label, genes] += np.asarray(X[np.flatnonzero(of_cells == label)].sum(axis=0)).ravel()
    rows = [row_of[label] for label in data.conditions[conditions[there]]]
    if not np.isfinite(sums[rows]).all():
        sys.exit(f"error: {path}: X holds NaN or infinite values")
    means = np.full((len(conditions), data.measured.sum()), np.nan)
    means[there] = (sums[rows] / n_cells[rows][:, None])[:, places]
    return name, means


# ---------------------------------------------------------------------------------------------------------------------
# Tables

def summarize(rows):
    """Rows (model, seed, condition, subgroup, metric, value) -> {(model, subgroup, metric): (mean, half width, n seeds)};
    a seed's value is the mean over conditions, `all` takes all of them."""
    by_seed = {}
    for model, seed, _, subgroup, metric, value in rows:
        for group in dict.fromkeys(["all", subgroup or "all"]):  # in this order, not that of a set, which changes from run to run
            by_seed.setdefault((model, group, metric), {}).setdefault(seed, []).append(value)
    return {key: (*metrics.interval95([np.mean(values) for values in seeds.values()]), len(seeds)) for key, seeds in by_seed.items()}


def csv_text(header, rows):
    lines = []
    for row in (header, *rows):
        line = io.StringIO()
        csv.writer(line).writerow(row)  # with its own \r\n at the end, so that both are quoted within a name
        lines.append(line.getvalue().removesuffix("\r\n") + "\n")
    return "".join(lines)


def number(mean, half_width, metric="pearson"):
    """`0.665 ± 0.010`; squared errors, which may be small, with three significant digits."""
    if math.isnan(mean):
        return ""
    size = max(abs(mean), half_width)  # the mean where half_width is NaN
    digits = 3 if not metric.startswith("mse") or size >= 0.1 or size == 0 else min(3 - math.floor(math.log10(size)) - 1, 7)
    return f"{mean:.{digits}f}" + ("" if math.isnan(half_width) else f" ± {half_width:.{digits}f}")


def markdown_table(header, rows):
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def marked(summary, models, subgroup, metric, unranked):
    """A column of a table: each model's number, of those that are not `unranked` the best in bold and the second best in italics."""
    shown = [number(*summary.get((model, subgroup, metric), (math.nan, math.nan))[:2], metric) for model in models]
    value_of = {text: float(text.split()[0]) for model, text in zip(models, shown) if text and model not in unranked}  # as printed
    ranked = sorted(set(value_of.values()), reverse=METRICS[metric][1])
    marks = [dict(zip(ranked, ("**", "*"))).get(value_of.get(text), "") if model not in unranked else "" for model, text in zip(models, shown)]
    return [f"{mark}{text}{mark}" for mark, text in zip(marks, shown)]


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
            rows = [[base, *(number(*summary[by[column], "all", metric][:2], metric) if column in by else "" for column in columns)]
                    for base, by in cells.items()]
            lines += [f"## {heading}: {METRICS[metric][0]}", "", markdown_table(["model", *columns], rows), ""]
    return lines


def draw_bars(path, summary, models, trained, subgroups, title):
    """Bars with 95% intervals: Pearson delta and mean squared error on the top 20 genes, by subgroup (the paper's Figures 10
    and 14 to 16). Trained models in colours, baselines in grey (of the ridge regressions the best), the ceiling in white."""
    ridges = sorted((model for model in models if model.startswith("ridge_")), key=lambda model: -summary[model, "all", "pearson_delta_top20"][0])
    models = [model for model in models if model not in ridges[1:]]
    others = [model for model in models if model not in trained]
    figure = shared.new_figure(min(max(6.5, 1.2 + 0.22 * len(models) * len(subgroups)), 30), 7.5, title)
    for axes, metric, label in zip(figure.subplots(2, 1), ("pearson_delta_top20", "mse_top20"),
                                   ("Pearson Δ, top 20 DE genes", "MSE, top 20 DE genes\n(squared log-normalized expression)")):
        for i, model in enumerate(models):
            means, halves_ = np.array([summary.get((model, group, metric), (np.nan, np.nan))[:2] for group in subgroups]).T
            style = ({"color": "white", "edgecolor": "black"} if model == CEILING else {"color": str(0.3 + 0.6 * others.index(model) / len(others))}
                     if model in others else {"color": shared.COLORS[trained.index(model) % len(shared.COLORS)], "edgecolor": "white",
                                              "hatch": ("", "//", "..", "xx")[trained.index(model) // len(shared.COLORS) % 4]})
            axes.bar(np.arange(len(subgroups)) + (i - (len(models) - 1) / 2) * 0.85 / len(models), means, 0.8 / len(models), label=model,
                     yerr=None if np.isnan(halves_).all() else halves_, capsize=2, error_kw={"lw": 1}, **style)
        low, high = axes.get_ylim()  # intervals over two seeds may run far beyond what can be
        largest = np.nanmax([summary.get((model, group, metric), (0,))[0] for model in models for group in subgroups])
        axes.set_ylim(*((max(low, -1.05), min(high, 1.05)) if metric.startswith("pearson") else (0, min(high, 1.5 * largest))))
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xlim(-0.5, len(subgroups) - 0.5)
        axes.set_xticks(range(len(subgroups)), [group.replace("_", " ") for group in subgroups])
        axes.set_ylabel(label)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    shared.save_figure(figure, path)


def by_subgroup(groups):
    """The subgroups that occur, the single targets first."""
    return sorted(set(groups), key=lambda group: (group != "unseen_single", group))


def draw_split(path, data, title):
    """Conditions of the split by subgroup (the paper's Figure 7)."""
    groups = [(split, group) for split in ("train", "val", "test") for group in by_subgroup(data.subgroup[data.split == split])]
    figure = shared.new_figure(6.5, 0.6 + 0.35 * len(groups), title)
    axes = figure.subplots()
    counts = [((data.split == split) & (data.subgroup == group)).sum() for split, group in groups]
    bars = axes.barh(range(len(groups)), counts, color=[shared.COLORS[("train", "val", "test").index(split)] for split, _ in groups])
    axes.bar_label(bars, padding=3)
    axes.set_yticks(range(len(groups)), [f"{split} {group.replace('_', ' ')}".strip() for split, group in groups])
    axes.invert_yaxis()
    axes.set_xlabel("conditions")
    shared.save_figure(figure, path)


# ---------------------------------------------------------------------------------------------------------------------
# Single perturbations

def read_perturbations(items, data, vocab_path):
    """The perturbations of --predict as {label: [gene, ...]}, from GENE, GENE+GENE, a condition of the dataset, a text file with
    one a line, or all-singles (every gene of the dataset); and the genes among them that the dataset lacks: those join it as
    unmeasured ones, if the vocabulary has them."""
    labels = []
    for item in items:
        if item == "all-singles":
            labels += list(data.genes)
        elif Path(item).is_file():
            labels += [line.strip() for _, line in shared.read_lines(item) if line.strip() and not line.startswith("#")]
        elif item.endswith((".txt", ".tsv", ".csv")):
            sys.exit(f"error: --predict {item}: no such file")
        else:
            labels.append(item)
    known, genes_of = set(data.genes), {}
    of_condition = {label: list(data.genes[targets[targets >= 0]]) for label, targets in zip(data.conditions, data.targets)}
    for label in labels:
        genes_of[label] = of_condition.get(label) or [label] * (label in known) or [gene for gene in label.split("+") if gene not in ("ctrl", data.control)]
        if not genes_of[label] or not all(genes_of[label]) or len(set(genes_of[label])) < len(genes_of[label]):
            sys.exit(f"error: --predict {label!r}: expected a gene, or different genes joined by +, as KLF1+MAP2K6")
    new = list(dict.fromkeys(gene for genes in genes_of.values() for gene in genes if gene not in known))
    if new:
        has_own, vocab = data.vocab == "own genes", {}
        if not has_own and vocab_path.exists() and shared.fingerprint(vocab_path) == data.vocab:
            vocab = shared.read_json(vocab_path, int)
        unknown = next((gene for gene in new if gene not in vocab), None)
        if unknown is not None:
            names = [{name.upper(): name for name in of} for of in (known, vocab)]  # the dataset's first
            near = next(filter(None, ([of[name] for name in difflib.get_close_matches(unknown.upper(), of, 3)] for of in names)), None)
            sys.exit(f"error: --predict: {unknown!r} is no gene of the dataset{' or its vocabulary' if vocab or has_own else ''}"
                     + (f"; did you mean {', '.join(near)}?" if near else "")
                     + ("" if vocab or has_own else f" (for genes that it lacks: --vocab FILE, the one given to stage 03; not {vocab_path})"))
        print(f"not in the dataset, joined as unmeasured genes: {', '.join(new)}")
        data.genes = np.concatenate([data.genes, np.array(new, dtype=object)])
        data.token_ids = np.concatenate([data.token_ids, [vocab[gene] for gene in new]])
        data.measured = np.concatenate([data.measured, np.zeros(len(new), dtype=bool)])
        data.mean = np.pad(data.mean, ((0, 0), (0, len(new))))
        data.X.resize(data.X.shape[0], len(data.genes))
    tokens = dict(zip(data.genes, data.token_ids))
    nameless = [gene for gene in dict.fromkeys(gene for genes in genes_of.values() for gene in genes) if tokens[gene] == data.pad_id]
    if nameless:
        print(f"not in the vocabulary, so that the models cannot tell these from each other: {', '.join(nameless)}")
    return genes_of, new


def add_language(net, run, data, new, embeddings):
    """Give a network the language vectors of the genes `new`, from the files that its run was trained with."""
    if not new or not net.config.languages:
        return
    tokens, vectors = data.token_ids[-len(new):], {}
    lacking = net.language_rows[tokens] < 0
    if not lacking.any():  # a released model has a row for the whole vocabulary
        return
    for source in net.config.languages:
        if source not in run.embeddings:
            sys.exit(f"error: --predict: {run.path} has no language vector for {', '.join(np.array(new)[lacking.numpy()])}; name its run, not its file")
        genes, of_genes = shared.read_embeddings(embeddings / run.embeddings[source], "02_embed.py")
        row_of = {gene: row for row, gene in enumerate(genes)}
        missing = [gene for gene, lacks in zip(new, lacking) if lacks and gene not in row_of]
        if missing:
            sys.exit(f"error: --predict: {run.embeddings[source]} has no vector for {', '.join(missing)}, which {run.name} needs; choose other models with --run")
        if of_genes.shape[1] != net.config.languages[source]:
            sys.exit(f"error: --predict: {run.embeddings[source]} has vectors of {of_genes.shape[1]:,} numbers, {run.name} was trained with others")
        vectors[source] = of_genes[[row_of.get(gene, 0) for gene in new]][lacking.numpy()]
    net.add_language(tokens[lacking.numpy()], vectors)


def predict_perturbations(args, data, runs, device, results):
    """For every perturbation of --predict what each model says of it: predicted.h5ad (mean profiles), predicted.csv (ranked by the
    size of the effect), predicted_genes.csv (the 20 genes that change most), and for a dozen perturbations at most a figure."""
    from tqdm import tqdm
    folder = args.root / "data" / shared.space_of(args.dataset)
    genes_of, new = read_perturbations(args.predict, data, args.vocab or folder / "scgpt" / "vocab.json")
    position = {gene: i for i, gene in reversed(list(enumerate(data.genes)))}
    targets_of = {label: np.array(sorted(position[gene] for gene in genes)) for label, genes in genes_of.items()}
    singles = {gene: np.array([position[gene]]) for genes in genes_of.values() if len(genes) > 1 for gene in genes}  # to compare pairs with
    ctrl = data.mean[data.split == "ctrl"][0].astype(np.float64)
    cells = np.random.default_rng([args.seed, 7]).choice(data.ctrl_cells, args.controls or N_FIGURE_CONTROLS)
    control = data.X[cells].toarray()
    baseline = control.mean(0, dtype=np.float64)  # a prediction is compared with the cells that it started from
    is_measured = data.measured
    delta, of_cells, top = {}, {}, {}  # (label, model, seed): (G,), (cells, top); label: (top,)
    offset = {}  # (model, seed): (G,), the change that it predicts where nothing is perturbed
    blocks, cell_rows = [], []  # of --cells: (cells, measured genes); (label, model, seed) of every row

    def most_changed(change):
        return np.argsort(-np.where(is_measured, np.abs(change), -1), kind="stable")[:min(20, is_measured.sum())]

    wanted = singles | targets_of
    print(f"perturbations: {len(genes_of):,}; models: {len(runs)}; control cells for each: {len(cells)}; {training.device_words(device)}")
    with tqdm(total=len(runs) * len(wanted), unit=" perturbations", leave=False, disable=None) as progress:
        for run in runs:
            net = load_model(run.path, data)
            add_language(net, run, data, new, folder / "embeddings")
            net.to(device)
            if args.cells:
                blocks.append(control[:, is_measured])
                cell_rows += [(data.control, run.name, run.seed)] * len(cells)
            unperturbed = predict_cells(net, run.path, data, control, [], device, args.batch_size)
            offset[run.name, run.seed] = unperturbed.mean(0, dtype=np.float64) - baseline
            for label, targets in wanted.items():
                each = predict_cells(net, run.path, data, control, targets, device, args.batch_size)
                change = (each.mean(0, dtype=np.float64) - baseline).astype(np.float32)
                delta[label, run.name, run.seed] = change
                if label not in top:
                    same = measured_as(data, targets)
                    top[label] = data.de_idx[same[0]][data.de_idx[same[0]] >= 0] if same else most_changed(change)
                if len(genes_of) <= MOST_FIGURES:
                    of_cells[label, run.name, run.seed] = each[:, top[label]] - baseline[top[label]]
                if args.cells and label in genes_of:
                    blocks.append(each[:, is_measured])
                    cell_rows += [(label, run.name, run.seed)] * len(cells)
                progress.update()

    # Per perturbation and model: the size of the effect, its genes, and for pairs the interaction: how far it is from the sum of the
    # effects of its parts, each against the prediction where nothing is perturbed
    def over_seeds(label, name, value):
        return metrics.interval95([value(delta[label, name, seed], seed) for seed in seeds[name]])

    def rms(values):
        return float(np.sqrt((values[is_measured] ** 2).mean()))

    seeds = {name: [run.seed for run in runs if run.name == name] for name in dict.fromkeys(run.name for run in runs)}
    ranked, genes = [], []
    for label, targets in targets_of.items():
        measured = [data.mean[c] for c in measured_as(data, targets)]
        for name in seeds:
            size, half = over_seeds(label, name, lambda change, seed: rms(change))
            parts = genes_of[label]
            apart = over_seeds(label, name, lambda change, seed: rms(change - offset[name, seed] - sum(
                delta[part, name, seed] - offset[name, seed] for part in parts)))[0] if len(parts) > 1 else ""
            mean = np.mean([delta[label, name, seed] for seed in seeds[name]], axis=0)
            order = most_changed(mean)
            ranked.append((label, name, len(seeds[name]), size, "" if math.isnan(half) else half, apart,
                           " ".join(f"{data.genes[g]}:{mean[g]:+.3f}" for g in order[:10])))
            for g in order:
                value, half = over_seeds(label, name, lambda change, seed: change[g])
                genes.append((label, name, data.genes[g], float(baseline[g]), float(baseline[g]) + value, value, "" if math.isnan(half) else half,
                              float(np.mean([mean[g] for mean in measured]) - ctrl[g]) if measured else ""))
    ranked.sort(key=lambda row: -row[3])
    shared.write_text(results / "predicted.csv", csv_text(
        ("condition", "model", "n_seeds", "effect_rms", "interval", "interaction_rms", "top_genes"), ranked))
    shared.write_text(results / "predicted_genes.csv", csv_text(
        ("condition", "model", "gene", "control", "predicted", "delta", "interval", "measured_delta"), genes))

    def columns(keys):
        return {column: [key[i] for key in keys] for i, column in enumerate(("condition", "model", "seed"))}

    measured_baseline = baseline[is_measured].astype(np.float32)
    kept = [(label, name, seed) for label in genes_of for name in seeds for seed in seeds[name]]
    made = shared.made_from({"controls": len(cells), "seed": args.seed,
                             "models": {f"{run.name}, seed {run.seed}": shared.fingerprint(run.path) for run in runs}}, [])
    write_h5ad(results / "predicted.h5ad", made, np.stack([delta[key][is_measured] for key in kept]) + measured_baseline, columns(kept),
               data.genes[is_measured], "mean predicted log-normalized expression", data, measured_baseline)
    for old in results.glob("predicted_*.png"):  # of another --predict
        old.unlink()
    if args.cells:
        write_cells(results / "predicted.cells.h5ad", made, blocks, columns(cell_rows), data)
    if len(genes_of) <= MOST_FIGURES:
        for label in genes_of:
            draw_perturbation(results, label, data, top[label], ctrl, {name: np.concatenate([of_cells[label, name, seed] for seed in seeds[name]])
                                                                       for name in seeds}, measured_as(data, targets_of[label]))
    for name in seeds if len(targets_of) > 1 else ():
        changes = np.array([np.mean([delta[label, name, seed][is_measured] for seed in seeds[name]], axis=0) for label in list(targets_of)[:200]])
        with np.errstate(invalid="ignore"):  # a model that predicts no change at all
            alike = np.median(np.corrcoef(changes)[np.triu_indices(len(changes), 1)])
        if alike > 0.99:
            print(f"warning: {name} predicts nearly the same change for all of these (median correlation {alike:.3f}): it says little of each", file=sys.stderr)
    for row in [row for row in ranked if "-shuffled" not in row[1]][:10]:  # a shuffled control is no answer
        print(f"{row[0]}: effect {row[3]:.4f} by {row[1]}; {' '.join(row[6].split()[:5])} ...")
    print(f"figures: {'one a perturbation, ' + str(results / 'predicted_*.png') if len(genes_of) <= MOST_FIGURES else f'none for more than {MOST_FIGURES} perturbations'}\n"
          "values: " + ", ".join(str(results / name) for name in ("predicted.csv", "predicted_genes.csv", "predicted.h5ad",
                                                                  *["predicted.cells.h5ad"] * args.cells)))


def measured_as(data, targets):
    """Conditions of the data with exactly these targets."""
    return [c for c, t in enumerate(data.targets) if set(t[t >= 0]) == set(targets)]


def draw_perturbation(results, label, data, top, ctrl, predicted, conditions):
    """Draw the genes `top` of one perturbation: change as measured (where the data has it) and as each model predicts it,
    {model: (cells, top)} (the paper's Figures 8 and 9)."""
    series = dict(predicted)
    if conditions:
        cells = np.flatnonzero(np.isin(data.cell_condition, conditions))
        series = {"measured": data.X[cells].toarray()[:, top] - ctrl[top]} | series
    words = f"the {len(top)} genes " + ("that are most differentially expressed, measured and predicted" if conditions else
                                        f"that change most as {next(iter(predicted))} predicts; not measured")
    figure = shared.new_figure(12, 5, f"{label}: {words}{' (SYNTHETIC data)' if data.synthetic else ''}\n"
                        "cells between the quartiles (box), median (line), mean (diamond), rest without outliers (whiskers)")
    axes = figure.subplots()
    for i, (name, values) in enumerate(series.items()):
        color = shared.GREY if name == "measured" else shared.COLORS[(i - bool(conditions)) % len(shared.COLORS)]
        at = np.arange(len(top)) + (i - (len(series) - 1) / 2) * 0.8 / len(series)
        boxes = axes.boxplot(values, positions=at, widths=0.7 / len(series), showfliers=False, patch_artist=True,
                             medianprops={"color": "black"}, manage_ticks=False, showmeans=True,
                             meanprops={"marker": "D", "markersize": 4, "markerfacecolor": color, "markeredgecolor": "black",
                                        "markeredgewidth": 0.5})
        for box in boxes["boxes"]:
            box.set_facecolor(color)
        axes.bar(0, 0, color=color, label=name)
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xlim(-0.6, len(top) - 0.4)
    axes.set_xticks(range(len(top)), data.genes[top], rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_ylabel("expression of a cell less the control mean\n(log-normalized)")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    shared.save_figure(figure, results / f"predicted_{urllib.parse.quote(label, safe='+')[:200]}.png")


# ---------------------------------------------------------------------------------------------------------------------

def options():
    parser = shared.common_options(argparse.ArgumentParser(description=__doc__))
    add = parser.add_argument
    add("--run", nargs="+", metavar="NAME", help="runs to evaluate by the name of their folder; model files, own or the "
        "authors', as FILE.pt or NAME=FILE.pt; released:VARIANT fetches what the authors fine-tuned on norman or adamson (default: all runs found)")
    add("--external", nargs="+", default=[], metavar="NAME=FILE.h5ad", help="predictions of another method: obs column condition, "
        "X predicted expression per cell or per condition")
    add("--predict", nargs="+", metavar="GENE", help="only predict these perturbations, measured or not: GENE, GENE+GENE, a text file "
        "with one a line, or all-singles (every gene of the dataset)")
    add("--cells", action="store_true", help="also write every predicted cell, below the control cells, as *.cells.h5ad")
    add("--vocab", type=Path, metavar="FILE", help="vocab.json for targets of --predict that the dataset lacks (default: data/human/scgpt/)")
    add("--controls", type=int, metavar="N", help="control cells a condition (default: as many as the condition has cells; "
        f"--predict: {N_FIGURE_CONTROLS})")
    add("--seed", type=shared.seed, default=42, metavar="N", help="of the draw of control cells (default: 42)")
    add("--batch-size", type=int, metavar="N", help="cells at a time (default: what suits the device)")
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
    files = [item for item in args.run or () if item.endswith(".pt") or item.startswith("released:")]
    runs = find_runs(args.root / "runs" / args.dataset, args.run and [item for item in args.run if item not in files], dataset_path, of_dataset)
    runs += find_files(files, args.dataset, args.root / "data" / "human" / "raw" / "finetuned")
    if not runs:
        sys.exit(f"error: no finished run in {args.root / 'runs' / args.dataset}; run first: python 04_train.py{of_dataset}")
    device = training.choose_device(args.device)
    embeddings = training.embeddings_of(args.root / "data" / shared.space_of(args.dataset) / "embeddings")
    others = [*BASELINES, *(f"ridge_{source}" for source in embeddings), CEILING, *(item.partition("=")[0] for item in args.external)]
    called = [f"{run.name}, seed {run.seed}" for run in runs] + others
    clash = [name for name in called if called.count(name) > 1] + [run.name for run in runs if run.name in others]
    if clash:
        sys.exit(f"error: two models are called {clash[0]}; name one otherwise: --run NAME=FILE.pt, --external NAME=FILE.h5ad")
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
    print(f"{len(tested)} test conditions, {len(genes):,} genes, {sum(map(len, controls)):,} control cells to predict from; {training.device_words(device)}")

    if args.cells:
        path, made = results / "predictions" / "measured.cells.h5ad", shared.made_from({}, [dataset_path])
        if not shared.is_current(path, made, args.force):
            cells = np.concatenate([data.ctrl_cells, *(np.flatnonzero(data.cell_condition == c) for c in tested)])
            write_h5ad(path, made, data.X[cells][:, genes], {"condition": list(data.conditions[data.cell_condition[cells]])}, data.genes[genes],
                       "measured log-normalized expression of control cells and held-out conditions", data)

    # Mean profiles of every model and baseline: (name, seed or "", predicted (P, G), true (P, G))
    profiles = []
    for run in runs:
        path = results / "predictions" / f"{run.name}.seed{run.seed}.h5ad"
        made = shared.made_from({"controls": args.controls or "as cells", "seed": args.seed}, [dataset_path, run.path])
        paths = [path] + [path.with_suffix(".cells.h5ad")] * args.cells
        if not all([shared.is_current(p, made, args.force) for p in paths]):
            started = time.perf_counter()
            blocks = [] if args.cells else None
            means = predict_means(run.path, data, tested, controls, device, args.batch_size, f"{run.name}, seed {run.seed}", blocks)[:, genes]
            obs = {"condition": list(data.conditions[tested]), "subgroup": list(data.subgroup[tested]), "model": [run.name] * len(tested),
                   "seed": [run.seed] * len(tested), "n_controls": [len(cells) for cells in controls]}
            write_h5ad(path, made, means, obs, data.genes[genes], "mean predicted log-normalized expression", data, ctrl)
            if args.cells:
                labels = [data.control] * len(data.ctrl_cells) + [data.conditions[c] for c, cells in zip(tested, controls) for _ in cells]
                obs = {"condition": labels, "model": [run.name] * len(labels), "seed": [run.seed] * len(labels)}
                write_cells(paths[1], made, [data.X[data.ctrl_cells].toarray()[:, genes], *blocks], obs, data)
            print(f"{run.name}, seed {run.seed}: predicted in {time.perf_counter() - started:.1f} s -> {', '.join(map(str, paths))}")
        with shared.open_h5(path, f"05_eval.py{of_dataset}", ["X"]) as file:
            if file["X"].shape != true.shape or not np.isfinite(file["X"][:]).all():
                raise ValueError("X is not a finite profile for each test condition")
            profiles.append((run.name, run.seed, file["X"][:], true))
    profiles += [(name, "", means, true) for name, means in external]
    profiles += [(name, "", means[:, genes], true) for name, means in baseline_means(data, tested).items()]
    profiles += [("random", draw, random_means(data, tested, draw)[:, genes], true) for draw in range(N_DRAWS)]
    ridge_files = {source: found.get(("published", "concat")) or next(iter(found.values())) for source, found in embeddings.items()}
    for source, path in ridge_files.items():
        means = ridge_means(data, tested, path)
        if means is not None:
            profiles.append((f"ridge_{source}", "", means[:, genes], true))
    for draw in range(N_DRAWS):
        one, other = halves(data, tested, draw)
        profiles.append((CEILING, draw, one[:, genes], other[:, genes]))

    # Scores
    rows = []
    for name, seed, predicted, truth in profiles:
        there = np.flatnonzero(np.isfinite(predicted).all(1) & np.isfinite(truth).all(1))  # a single cell has no halves
        scores = metrics.evaluate(predicted[there], truth[there], ctrl, de_idx[there]) \
            | metrics.evaluate_specific(predicted[there], truth[there], perturbed_mean)
        rows += [(name, seed, data.conditions[c], data.subgroup[c], metric, float(scores[metric][i]))
                 for i, c in enumerate(tested[there]) for metric in METRICS if not math.isnan(scores[metric][i])]
    summary = summarize(rows)
    models = list(dict.fromkeys(name for name, *_ in profiles if any(row[0] == name for row in rows)))
    trained = list(dict.fromkeys([run.name for run in runs] + [name for name, _ in external]))
    subgroups = [*filter(None, by_subgroup(data.subgroup[tested])), "all"]
    shared.write_text(results / "metrics.csv", csv_text(("model", "seed", "condition", "subgroup", "metric", "value"), rows))
    shared.write_text(results / "summary.csv", csv_text(
        ("model", "subgroup", "metric", "mean", "interval", "n_seeds"),
        [(model, group, metric, mean, "" if math.isnan(half) else half, n) for (model, group, metric), (mean, half, n) in summary.items()]))

    # Report
    label = " (SYNTHETIC data)" if data.synthetic else ""
    partial = {name: len(tested) - np.isnan(means).any(1).sum() for name, means in external if np.isnan(means).any()}
    words = verdict(rows, summary, [name for name in trained if name not in partial], [name for name in models if name not in (*trained, CEILING)])
    words += "".join(f" The figures of {name} are means over {n} of these conditions, since its file lacks the others: it is not ranked."
                     for name, n in partial.items()) + unlike(runs)
    draw_split(results / "split.png", data, f"{args.dataset}{label}: conditions of the split")
    draw_bars(results / "subgroups.png", summary, models, trained, subgroups, f"{args.dataset}{label}: held-out perturbations\nmean over conditions and "
              "seeds (grey: baselines, of the ridge regressions the best); lines: 95% interval over seeds, cut at the edge")
    shared.write_text(results / "report.md", report(args, data, summary, models, trained, {CEILING, *partial}, subgroups, runs, ridge_files, words, len(genes)))

    shown = trained + [model for model in list(BASELINES)[:3] if model not in trained]
    header = [f"{METRICS['pearson_delta_top20'][0]}{label}", "n", *shown]
    table = [[group, (data.subgroup[tested] == group).sum() if group != "all" else len(tested)]
             + [number(*summary.get((model, group, "pearson_delta_top20"), (math.nan, math.nan))[:2]) for model in shown] for group in subgroups]
    print(f"\n{markdown_table(header, table)}\n\n{words}\n")
    print(f"report with all baselines and metrics: {results / 'report.md'}\nfigures: {results / 'subgroups.png'}, {results / 'split.png'}\n"
          f"values: {results / 'metrics.csv'}, {results / 'summary.csv'}")


def report(args, data, summary, models, trained, unranked, subgroups, runs, ridge_files, words, n_genes):
    """The text of report.md."""
    tested = data.split == "test"
    lines = [f"# {args.dataset}: predicting held-out perturbations", ""]
    if data.synthetic:
        lines += ["**SYNTHETIC data**: simulated cells of invented genes. The numbers show that the kit works, nothing about biology.", ""]
    lines += [f"Compared on {tested.sum()} held-out conditions and {n_genes:,} genes. {words}", "",
              "Mean over the test conditions, then mean ± 95% interval (Student's t) over the seeds; **best**, *second best*. Δ is the "
              "difference to the mean of the control cells. Pearson Systema is the same with the mean of the training perturbations in its "
              "place, and centroid accuracy the share of the other conditions that are farther from a prediction than its own. Where predictions "
              "look alike, these two are near what chance gives, 0 and 0.5.", "",
              "unseen_single: the target is perturbed in no training condition. combo_seen0, 1, 2: so many targets of the pair are. "
              "`-shuffled` is a model whose texts were permuted among the genes: what it reaches does not come from what they say.", "",
              "Baselines, which need no training:", "", *(f"- `{name}`: {what}" for name, what in BASELINES.items()),
              f"- `{CEILING}`: no prediction; one half of a condition's cells scored as if it predicted the other. Both halves are noisy: with "
              "few cells a good model can be above it, and a condition of a single cell is left out", "",
              f"Vectors of the ridge regressions: {', '.join(path.name for path in ridge_files.values()) or 'none'}.", "",
              "![The split](split.png)", "", "## All test conditions", ""]
    paper = paper_rows(PAPER.get(args.dataset, ""))
    header = ["model", "seeds", *(heading for heading, _ in METRICS.values()), *(f"paper: {METRICS[m][0]}" for m in PAPER_METRICS if paper)]
    columns = [marked(summary, models, "all", metric, unranked) for metric in METRICS]
    rows = [[model, summary[model, "all", "mse_all"][2] if model in trained else "–",
             *(column[i] for column in columns), *paper.get(model, [""] * len(PAPER_METRICS) if paper else [])] for i, model in enumerate(models)]
    lines += [markdown_table(header, rows), ""]
    for metric in ("pearson_delta_top20", "mse_top20"):
        paper = paper_rows(PAPER_BY_SUBGROUP) if args.dataset == "norman" and metric == "pearson_delta_top20" else {}
        header = ["model", *(f"{g} ({(data.subgroup[tested] == g).sum() if g != 'all' else tested.sum()})" for g in subgroups),
                  *(f"paper: {g}" for g in PAPER_SUBGROUPS if paper)]
        columns = [marked(summary, models, group, metric, unranked) for group in subgroups]
        rows = [[model, *(column[i] for column in columns), *paper.get(model, [""] * len(PAPER_SUBGROUPS) if paper else [])]
                for i, model in enumerate(models)]
        lines += [f"## By subgroup: {METRICS[metric][0]}", "", markdown_table(header, rows), ""]
    lines += ["![Bars by subgroup](subgroups.png)", "", *tables_by_embedding(summary, runs), "## Runs", "",
              markdown_table(["model", "seed", "best epoch", "validation MSE", "parameters", "fingerprint of its file"],
                             [[run.name, run.seed, *run.facts, shared.fingerprint(run.path)] for run in runs]), "",
              f"Control cells a condition: {args.controls or 'as many as the condition has cells'}, drawn with seed {args.seed}, the same for "
              "all models.", ""]
    return "\n".join(lines)


def verdict(rows, summary, trained, baselines):
    """What came out, in words: whether the best trained model (a shuffled control is none) beats the mean of the training
    perturbations, by Pearson delta on the top 20 genes; then against its shuffled control, scGPT and the best baseline, and by squared
    error; and the best model with a shuffled control against that, where it is another one."""
    metric, of_conditions = "pearson_delta_top20", {}
    for model, _, condition, _, of_metric, value in rows:
        if of_metric == metric:
            of_conditions.setdefault(model, {}).setdefault(condition, []).append(value)

    def value(model):
        return summary[model, "all", metric]

    def shuffled(model):  # scgenept_go_c,align=linear -> scgenept_go_c-shuffled,align=linear
        variant, *suffix = model.split(",")
        return ",".join([f"{variant}-shuffled", *suffix])

    def against(model, rival):
        """(whether the model is above the rival, how surely, in words)"""
        (a, half_a, n), (b, half_b, n_rival) = value(model), value(rival)
        wins = [np.mean(values) > np.mean(of_conditions[rival][condition]) for condition, values in of_conditions[model].items()]
        words = f"{rival} ({number(b, half_b)}; beaten in {sum(wins)} of {len(wins)} conditions"
        if n > 1 and (n_rival > 1 or rival not in trained):
            words += f", {'beyond' if abs(a - b) > half_a + (0 if math.isnan(half_b) else half_b) else 'within'} the intervals over seeds"
        return a > b, words + ")"

    def compared(model, rivals):
        results = [against(model, rival) for rival in dict.fromkeys(rivals) if rival != model and (rival in trained or rival in baselines)]
        return "; ".join(f"{'above' if is_above else 'not above'} {words}" for is_above, words in results)

    if not trained:
        return "No trained model has predictions of all conditions."
    best = max([model for model in trained if "-shuffled" not in model] or trained, key=lambda model: value(model)[0])
    is_above, words = against(best, "non-ctrl-mean")
    text = (f"By Pearson Δ on the top 20 genes, the best trained model, {best} ({number(*value(best)[:2])}), "
            + ("beats" if is_above else "does NOT beat") + f" the mean of the training perturbations, {words}.")
    if others := compared(best, [shuffled(best), "scgpt", max(baselines, key=lambda model: value(model)[0])]):
        text += f" It is {others}."
    errors = [f"{model} {number(*summary[model, 'all', 'mse_top20'][:2], 'mse')}" for model in (best, "non-ctrl-mean", "no-change") if model in (best, *baselines)]
    text += f" Mean squared error on the same genes (lower is better): {', '.join(errors)}."
    controlled = max((model for model in trained if shuffled(model) in trained), key=lambda model: value(model)[0], default=best)
    if controlled != best:
        text += f" {controlled} ({number(*value(controlled)[:2])}) is {compared(controlled, [shuffled(controlled)])}."
    if min(value(model)[2] for model in trained) < 2:
        text += " Models of one seed have no interval: train with several (04 --seed 42 23 89) before believing a difference."
    return text


if __name__ == "__main__":
    shared.run(main)
