"""Stage 03: cells, split, differential expression -> data/<dataset>/dataset.h5

    python 03_prepare_data.py                                   the demo: a simulated Perturb-seq screen, no network
    python 03_prepare_data.py --dataset norman                  GEARS' file, downloaded to data/norman/ (169 MB)
    python 03_prepare_data.py --dataset mine --h5ad mine.h5ad --condition-key perturbation --control NT
    python 03_prepare_data.py --dataset mine --h5ad mine.h5ad --split split.json      {"train": [...], "val": [...], "test": [...]}
    python 03_prepare_data.py --dataset mine --h5ad mine.h5ad --vocab none            for stage 04 --no-pretrained

Reads an AnnData file, or a zip of GEARS' with one in it. A condition is a label such as `ctrl`, `KLF1+ctrl`, `ctrl+KLF1` or
`KLF1+MAP2K6`. X has to be log-normalized expression; raw counts are normalized with --normalize. A target that the data
does not measure joins as a gene with expression 0, so that it can be flagged; it never counts in a loss or a metric.
"""
import argparse
import contextlib
import importlib
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import h5py
import numpy as np

shared = importlib.import_module("01_fetch_annotations")

DATAVERSE = "https://dataverse.harvard.edu/api/access/datafile/"
DATASETS = {  # GEARS' hosted data: address, bytes where known
    "norman": (DATAVERSE + "6154020", 168_758_985),
    "adamson": (DATAVERSE + "6154417", None),
    "dixit": (DATAVERSE + "6154416", None),
    "replogle_k562_essential": (DATAVERSE + "7458695", None),
    "replogle_rpe1_essential": (DATAVERSE + "7458694", None),
}
VOCAB_URL = "https://czi-scgenept-public.s3.amazonaws.com/models/pretrained/scgpt/vocab.json"
N_TOP = 20  # differentially expressed genes that the metrics look at


# ---------------------------------------------------------------------------------------------------------------------
# Conditions and the split

def parse_condition(label, control="ctrl"):
    """Targets of a condition label: `A+B` -> [A, B], `A+ctrl` and `ctrl+A` -> [A], `ctrl` -> []. Ends the run otherwise."""
    if label == control:
        return []
    parts = label.split("+")
    targets = [part for part in parts if part != control]
    if not targets or any(part != part.strip() or not part for part in parts) or len(set(targets)) < len(targets):
        sys.exit(f"error: condition {label!r}: expected {control!r}, a target, TARGET+{control}, or different targets joined by '+'")
    return targets


def simulation_split(targets_of, seed, train_share=0.75, train_share_of_seen_pairs=0.75):
    """One round of GEARS' simulation split: {label: [target, ...]} of the perturbed conditions -> (train, subgroup).

    `train` is the list of training labels, `subgroup` names for every other label why it is held out: unseen_single, or
    combo_seen<k> with k of its targets seen as training genes. Legacy NumPy generator, as in the paper's runs.
    """
    genes = sorted({gene for targets in targets_of.values() for gene in targets})
    rng = np.random.RandomState(seed)
    train_genes = set(rng.choice(genes, int(len(genes) * train_share), replace=False))
    subgroup, train, seen_pairs = {}, [], []
    for label, targets in targets_of.items():
        n_seen = sum(gene in train_genes for gene in targets)
        if n_seen == len(targets):
            (train if len(targets) == 1 else seen_pairs).append(label)
        else:
            subgroup[label] = "unseen_single" if len(targets) == 1 else f"combo_seen{n_seen}"
    seen_pairs.sort()
    rng = np.random.RandomState(seed)
    kept = set(rng.choice(seen_pairs, int(len(seen_pairs) * train_share_of_seen_pairs), replace=False)) if seen_pairs else set()
    for label in seen_pairs:
        if label in kept:
            train.append(label)
        else:
            subgroup[label] = f"combo_seen{len(targets_of[label])}"
    return train, subgroup


def split_conditions(targets_of, seed):
    """The paper's split: {label: targets} -> ({label: train | val | test}, {label: subgroup}); the training labels of a first
    round at 75% go through a second one at 90%, and what falls out of that is validation (scGenePT; GEARS `simulation`)."""
    train_and_val, subgroup = simulation_split(targets_of, seed)
    train, subgroup_of_val = simulation_split({label: targets_of[label] for label in train_and_val}, seed, 0.9, 0.9)
    split = dict.fromkeys(subgroup, "test") | dict.fromkeys(subgroup_of_val, "val") | dict.fromkeys(train, "train")
    return split, subgroup | subgroup_of_val


def split_from_json(path, targets_of):
    """A split of the user's from a JSON file {"train": [label, ...], "val": [...], "test": [...]}; every label stands once."""
    try:
        lists = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        sys.exit(f"error: {path}: not JSON ({error})")
    if not isinstance(lists, dict) or set(lists) != {"train", "val", "test"} or \
            not all(isinstance(v, list) and all(isinstance(label, str) for label in v) for v in lists.values()):
        sys.exit(f'error: {path}: expected {{"train": [label, ...], "val": [...], "test": [...]}}')
    split = {}
    for name, labels in lists.items():
        for label in labels:
            if label in split:
                sys.exit(f"error: {path}: condition {label!r} stands twice")
            split[label] = name
    for label in split:
        if label not in targets_of:
            sys.exit(f"error: {path}: condition {label!r} has no cells (or is the control, which always joins the training cells)")
    for label in targets_of:
        if label not in split:
            sys.exit(f"error: {path}: condition {label!r} of the data is in none of train, val and test")
    seen = {gene for label in lists["train"] for gene in targets_of[label]}
    subgroup = {}
    for label in lists["val"] + lists["test"]:
        targets = targets_of[label]
        n_seen = sum(gene in seen for gene in targets)
        if len(targets) > 1:
            subgroup[label] = f"combo_seen{n_seen}"
        elif not n_seen:
            subgroup[label] = "unseen_single"
    return split, subgroup


# ---------------------------------------------------------------------------------------------------------------------
# Expression

def moments(X, cell_condition, n_conditions):
    """Mean and variance (ddof 1; 0 for a single cell) of each condition: CSR (cells, G) -> two float64 arrays (P, G)."""
    n_genes = X.shape[1]
    mean, variance = np.zeros((2, n_conditions, n_genes))
    for condition in range(n_conditions):
        cells = X[np.flatnonzero(cell_condition == condition)]
        n = cells.shape[0]
        values = cells.data.astype(np.float64)
        mean[condition] = np.bincount(cells.indices, values, n_genes) / n
        squares = np.bincount(cells.indices, values ** 2, n_genes)
        variance[condition] = np.maximum(squares - n * mean[condition] ** 2, 0) / max(n - 1, 1)
    return mean, variance


def rank_de(mean, variance, n_cells, ctrl, n_measured):
    """Top differentially expressed genes (P, 20) by |t| of a Welch-type t-test against control, -1 for control itself.

    mean, variance (P, G), n_cells (P,), ctrl: row of the control; only the first n_measured genes can be ranked.
    As scanpy's rank_genes_groups(method="t-test", reference=control, rankby_abs=True).
    """
    difference = mean - mean[ctrl]
    error = np.sqrt(variance / n_cells[:, None] + variance[ctrl] / n_cells[ctrl])
    score = np.abs(np.divide(difference, error, out=np.zeros_like(difference), where=error > 0))
    return top_genes(np.argsort(-score[:, :n_measured], axis=1, kind="stable"), ctrl)


def top_genes(order, ctrl):
    """The first 20 of each row of gene indices (P, n) as int32 (P, 20), -1 for the control and beyond the last gene."""
    top = np.full((len(order), N_TOP), -1, dtype=np.int32)
    top[:, :min(N_TOP, order.shape[1])] = order[:, :N_TOP]
    top[ctrl] = -1
    return top


def normalized(X):
    """log1p of counts scaled to the median total of a cell: CSR of counts -> CSR float32."""
    totals = np.asarray(X.sum(axis=1, dtype=np.float64)).ravel()
    if not totals.all():
        sys.exit(f"error: {(totals == 0).sum():,} cells have no counts at all; remove them first")
    X = X.astype(np.float32)
    X.data = np.log1p(X.data * np.repeat(np.median(totals) / totals, np.diff(X.indptr))).astype(np.float32)
    return X


# ---------------------------------------------------------------------------------------------------------------------
# The demo: a simulated screen

def simulate_demo():
    """Simulated cells (CSR, 3,564 x 128, log-normalized), genes, and each cell's condition label. SYNTHETIC.

    Every gene takes part in one or two of eight processes (stage 01 writes texts that say so). Perturbing a gene changes the
    activity of the other processes through a random signed matrix, and thereby the genes that take part in them. The matrix
    is centred by rows and columns: no response is shared by all perturbations, so that a mean predicts nothing.
    """
    from scipy import sparse
    genes, takes_part = shared.demo_genes()
    rng = np.random.default_rng(1)
    share = takes_part / takes_part.sum(1, keepdims=True)                       # (G, processes)
    effect = rng.choice([-1.0, 1.0], (share.shape[1],) * 2) * rng.uniform(0.5, 1.5, (share.shape[1],) * 2)
    effect -= effect.mean(0)
    effect -= effect.mean(1, keepdims=True)
    targets = rng.choice(len(genes), 96, replace=False)
    pairs = [rng.choice(targets, 2, replace=False) for _ in range(40)]
    conditions = [("ctrl", [], 300)] + [(f"{genes[t]}+ctrl", [t], 24) for t in targets]
    conditions += [(f"{genes[a]}+{genes[b]}", [a, b], 24) for a, b in pairs]

    baseline = rng.normal(1.0, 0.7, len(genes))
    counts, labels = [], []
    for label, perturbed, n_cells in conditions:
        activity = rng.normal(0, 0.15, (n_cells, share.shape[1]))               # cells differ without any perturbation
        for target in perturbed:
            activity = activity + effect @ share[target]
        log_mean = baseline + activity @ share.T + rng.normal(0, 0.2, (n_cells, 1))  # the last: sequencing depth
        log_mean[:, perturbed] -= 1.5                                           # knocked down
        counts.append(rng.poisson(np.exp(log_mean)))
        labels += [label] * n_cells
    return normalized(sparse.csr_matrix(np.concatenate(counts).astype(np.float32))), genes, labels


# ---------------------------------------------------------------------------------------------------------------------
# AnnData files

@contextlib.contextmanager
def as_h5ad(path, folder):
    """Yield the path of an h5ad file: `path` itself, or the one inside a zip, unpacked into `folder` for as long as needed."""
    if not path.exists():
        sys.exit(f"error: {path} does not exist")
    if not zipfile.is_zipfile(path):
        yield path
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".h5ad")]
            if len(members) != 1:
                sys.exit(f"error: {path}: {len(members)} .h5ad files in it, expected one")
            free = shutil.disk_usage(folder).free
            if members[0].file_size > free:
                sys.exit(f"error: {path}: unpacks to {members[0].file_size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in {folder}")
            with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=folder) as temporary:
                print(f"unpacking {members[0].filename} ({members[0].file_size / 1e6:,.0f} MB)")
                unpacked = Path(temporary) / "cells.h5ad"
                with archive.open(members[0]) as source, open(unpacked, "wb") as target:
                    shutil.copyfileobj(source, target, 2**22)
                yield unpacked
    except (zipfile.BadZipFile, EOFError) as error:
        sys.exit(f"error: {path}: broken zip ({error})")


def read_strings(table, name, path):
    """A column of an AnnData table (obs or var) as (values, codes): `values[codes]` is the column. Knows the older and the
    newer encoding of categories, and plain columns."""
    if name not in table:
        sys.exit(f"error: {path}: {table.name} has no column {name!r}; it has {', '.join(sorted(table))}")
    column = table[name]
    if isinstance(column, h5py.Group):                       # newer: a group of codes and categories
        values, codes = column["categories"], column["codes"][:]
    elif "categories" in column.attrs:                       # older: codes and a reference
        values, codes = table.file[column.attrs["categories"]], column[:]
    else:
        values, codes = column, None
    values = values.asstr()[:] if h5py.check_string_dtype(values.dtype) else values[:].astype(str)
    if codes is None:
        return np.unique(values, return_inverse=True)
    if len(codes) and (codes.min() < 0 or codes.max() >= len(values)):
        sys.exit(f"error: {path}: {table.name}/{name} has missing values")
    return values, codes.astype(np.int64)


def read_x(file, path):
    """X of an AnnData file as CSR float32 (cells, genes); nothing else of the file (layers, raw) is read."""
    from scipy import sparse
    X = file["X"]
    if isinstance(X, h5py.Dataset):
        matrix = sparse.csr_matrix(X[:])
    else:
        kind = X.attrs.get("encoding-type", X.attrs.get("h5sparse_format"))
        shape = X.attrs.get("shape", X.attrs.get("h5sparse_shape"))
        if kind not in ("csr_matrix", "csc_matrix", "csr", "csc") or shape is None:
            sys.exit(f"error: {path}: X is neither a dense, a CSR nor a CSC matrix (encoding-type {kind!r})")
        data, indices, indptr = X["data"][:], X["indices"][:], X["indptr"][:]
        n_rows, n_columns = (int(n) for n in (shape if kind.startswith("csr") else shape[::-1]))
        if len(indptr) != n_rows + 1 or indptr[0] != 0 or indptr[-1] != len(data) or (np.diff(indptr) < 0).any() or \
                len(indices) != len(data) or (len(indices) and (indices.min() < 0 or indices.max() >= n_columns)):
            sys.exit(f"error: {path}: X is a damaged sparse matrix (indptr, indices and shape disagree)")
        matrix = (sparse.csr_matrix if kind.startswith("csr") else sparse.csc_matrix)((data, indices, indptr), shape=shape).tocsr()
    if not np.issubdtype(matrix.dtype, np.number) or not np.isfinite(matrix.data).all():
        sys.exit(f"error: {path}: X holds NaN, infinite or non-numeric values")
    if matrix.nnz and matrix.data.min() < 0:
        sys.exit(f"error: {path}: X holds negative values: scaled data? Expected log-normalized expression, or counts with --normalize")
    return matrix.astype(np.float32, copy=False)


def read_h5ad(path, args):
    """Cells (CSR), gene symbols, gene ids, condition labels (P,), each cell's condition, and the file's own rankings of
    differentially expressed genes ({label: gene ids} or None)."""
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        sys.exit(f"error: {path}: not a whole HDF5 file ({error})")
    with file:
        for key in ("X", "obs", "var"):
            if key not in file:
                sys.exit(f"error: {path}: no {key} in it: not an AnnData file")
        obs, var = file["obs"], file["var"]
        index = var.attrs.get("_index", "index")
        gene_key = args.gene_key or ("gene_name" if "gene_name" in var else index)
        values, codes = read_strings(var, gene_key, path)
        genes = values[codes]
        values, codes = read_strings(var, index, path)
        gene_ids = values[codes]
        conditions, cell_condition = read_strings(obs, args.condition_key, path)
        X = read_x(file, path)
        if X.shape != (len(cell_condition), len(genes)):
            sys.exit(f"error: {path}: X is {X.shape[0]} x {X.shape[1]}, but there are {len(cell_condition)} cells and {len(genes)} genes")
        rankings = None
        if "rank_genes_groups_cov_all" in file.get("uns", {}) and "condition_name" in obs and not args.normalize:
            ranked = file["uns/rank_genes_groups_cov_all"]
            names, codes = read_strings(obs, "condition_name", path)
            name_of = dict(zip(conditions[cell_condition], names[codes]))
            if all(name_of.get(label, "/") in ranked for label in conditions if label != args.control):
                rankings = {label: ranked[name_of[label]].asstr()[:] for label in conditions if label != args.control}
    return X, genes, gene_ids, conditions, cell_condition, rankings


# ---------------------------------------------------------------------------------------------------------------------

def read_vocab(path):
    """The vocabulary {symbol: row} of a scGPT vocab.json. Ends the run for anything else."""
    try:
        vocab = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        sys.exit(f"error: {path} does not exist; --vocab takes scGPT's vocab.json, or none")
    except ValueError as error:
        sys.exit(f"error: {path}: not JSON ({error})")
    if not isinstance(vocab, dict) or not all(type(row) is int for row in vocab.values()) or \
            sorted(vocab.values()) != list(range(len(vocab))) or "<pad>" not in vocab:
        sys.exit(f'error: {path}: expected {{"SYMBOL": row, ...}} with rows from 0 on and a "<pad>"')
    return vocab


def options():
    parser = shared.common_options(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--h5ad", type=Path, metavar="FILE", help="an AnnData file, or a zip with one in it")
    parser.add_argument("--condition-key", default="condition", metavar="COLUMN", help="obs column with the conditions (default: condition)")
    parser.add_argument("--control", default="ctrl", metavar="LABEL", help="label of unperturbed cells (default: ctrl)")
    parser.add_argument("--gene-key", metavar="COLUMN", help="var column with gene symbols (default: gene_name, else var's index)")
    parser.add_argument("--normalize", action="store_true", help="X holds raw counts: scale to the median total, then log1p")
    parser.add_argument("--split", default="simulation", metavar="simulation|FILE.json",
                        help='the paper\'s split, or a file {"train": [label, ...], "val": [...], "test": [...]} (default: simulation)')
    parser.add_argument("--split-seed", type=int, default=1, metavar="N", help="seed of the simulation split (default: 1, the paper's)")
    parser.add_argument("--vocab", metavar="FILE|none", help="vocabulary that numbers the genes (default: scGPT's, fetched to "
                        "data/human/scgpt/; none: the dataset's own genes, to train without pretrained weights; the demo: none)")
    return parser.parse_args()


def main():
    args = options()
    is_demo = shared.space_of(args.dataset) == "demo"
    folder = args.root / "data" / args.dataset
    path = folder / "dataset.h5"
    if is_demo and args.h5ad:
        sys.exit("error: --h5ad needs a name of its own: --dataset NAME")
    if not is_demo and not args.h5ad and args.dataset not in DATASETS:
        sys.exit(f"error: unknown dataset {args.dataset!r}: one of demo, {', '.join(DATASETS)}, or your own with --h5ad FILE")
    folder.mkdir(parents=True, exist_ok=True)

    # Inputs, and whether anything is to be done
    vocab_path = None
    if args.vocab not in (None, "none"):
        vocab_path = Path(args.vocab)
    elif args.vocab is None and not is_demo:
        vocab_path = shared.download(VOCAB_URL, args.root / "data" / "human" / "scgpt" / "vocab.json")
    vocab = read_vocab(vocab_path) if vocab_path else None
    source = args.h5ad
    if not is_demo and source is None:
        url, size = DATASETS[args.dataset]
        source = shared.download(url, folder / f"{args.dataset}.zip", size=size)
    if source is not None and not source.exists():
        sys.exit(f"error: --h5ad {source} does not exist")
    inputs = [p for p in (source, vocab_path, None if args.split == "simulation" else Path(args.split)) if p]
    made = shared.made_from({"condition_key": args.condition_key, "control": args.control, "gene_key": args.gene_key,
                             "normalize": args.normalize, "split": "simulation" if args.split == "simulation" else "file",
                             "split_seed": args.split_seed, "vocab": "file" if vocab else "none"}, inputs)
    if shared.is_current(path, made, args.force):
        return

    # Cells
    if is_demo:
        X, genes, labels = simulate_demo()
        print("SYNTHETIC cells: a simulated screen, for trying the kit; its numbers say nothing about biology")
        conditions, cell_condition = np.unique(labels, return_inverse=True)
        genes = gene_ids = np.array(genes, dtype=object)
        rankings = None
    else:
        with as_h5ad(source, folder) as h5ad:
            X, genes, gene_ids, conditions, cell_condition, rankings = read_h5ad(h5ad, args)
        is_counts = X.nnz > 0 and (X.data == np.round(X.data)).all()
        if args.normalize and is_counts:
            X = normalized(X)
        elif args.normalize:
            print("X does not hold integers: taken as normalized already, --normalize left it alone")
        elif is_counts:
            sys.exit(f"error: {source}: X holds raw counts; add --normalize to scale and log-transform them")

    # Conditions and their targets
    n_cells = np.bincount(cell_condition, minlength=len(conditions))
    if not n_cells.all():
        sys.exit(f"error: {source}: condition {conditions[np.argmin(n_cells)]!r} has no cells")
    if args.control not in conditions:
        sys.exit(f"error: {source}: no condition {args.control!r}; name the control label with --control (there are "
                 f"{', '.join(map(str, conditions[:5]))}, ...)")
    ctrl = int(np.flatnonzero(conditions == args.control)[0])
    targets_of = {label: parse_condition(label, args.control) for label in conditions}
    n_measured = len(genes)
    measured = set(genes)
    all_targets = {gene: None for targets in targets_of.values() for gene in targets}  # ordered, unique
    unmeasured = sorted(gene for gene in all_targets if gene not in measured)
    if not is_demo and len(unmeasured) == len(all_targets):
        print(f"warning: none of the {len(all_targets)} targets is a measured gene ({genes[0]}, ...): are those gene symbols? (--gene-key)",
              file=sys.stderr)
    genes = np.concatenate([genes, np.array(unmeasured, dtype=object)])
    X.resize(X.shape[0], len(genes))
    column = {gene: i for i, gene in reversed(list(enumerate(genes)))}  # the first of a symbol that stands twice
    targets = np.full((len(conditions), max(map(len, targets_of.values()))), -1, dtype=np.int32)
    for i, label in enumerate(conditions):
        targets[i, :len(targets_of[label])] = [column[gene] for gene in targets_of[label]]

    # Tokens
    if vocab is None:
        token_ids, n_tokens, pad_id = np.arange(len(genes)), len(genes) + 1, len(genes)
    else:
        n_tokens, pad_id = len(vocab), vocab["<pad>"]
        token_ids = np.array([vocab.get(gene, pad_id) for gene in genes])
        if (token_ids[:n_measured] == pad_id).all():
            sys.exit(f"error: none of the {n_measured:,} genes ({genes[0]}, {genes[1]}, ...) is in {vocab_path}: "
                     "are those gene symbols? Name their var column with --gene-key")

    # Split
    perturbed = {label: t for label, t in targets_of.items() if t}
    split, subgroup = (split_conditions(perturbed, args.split_seed) if args.split == "simulation"
                       else split_from_json(args.split, perturbed))
    split[args.control] = "ctrl"
    for name in ("train", "val", "test"):
        if name not in split.values():
            sys.exit(f"error: the split leaves no condition for {name} ({len(perturbed)} perturbations); give your own with --split FILE.json")

    # Differential expression
    mean, variance = moments(X, cell_condition, len(conditions))
    if rankings is None:
        de_idx = rank_de(mean, variance, n_cells, ctrl, n_measured)
    else:
        row_of = {gene_id: i for i, gene_id in enumerate(gene_ids)}
        order = np.full((len(conditions), N_TOP), -1)
        for i, label in enumerate(conditions):
            ranked = [row_of[gene_id] for gene_id in rankings.get(label, []) if gene_id in row_of][:N_TOP]
            order[i, :len(ranked)] = ranked
        de_idx = top_genes(order, ctrl)

    with shared.write_h5(path, made) as file:
        file.attrs.update({"dataset": args.dataset, "synthetic": is_demo, "control": args.control, "n_tokens": n_tokens, "pad_id": pad_id,
                           "vocab": "own genes" if vocab is None else shared.fingerprint(vocab_path)})
        group = file.create_group("X")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": np.array(X.shape)})
        group["data"], group["indices"], group["indptr"] = X.data, X.indices.astype(np.int32, copy=False), X.indptr
        for name, strings in (("genes", genes), ("conditions", conditions), ("split", [split[c] for c in conditions]),
                              ("subgroup", [subgroup.get(c, "") for c in conditions])):
            shared.write_strings(file, name, strings)
        file["token_ids"] = token_ids.astype(np.int32)
        file["measured"] = np.arange(len(genes)) < n_measured
        file["cell_condition"] = cell_condition.astype(np.int32)
        file["targets"] = targets
        file["mean"] = mean.astype(np.float32)
        file["de_idx"] = de_idx

    print(f"{X.shape[0]:,} cells ({n_cells[ctrl]:,} control), {n_measured:,} genes, {len(perturbed):,} perturbations of {len(all_targets):,} targets")
    if vocab is not None:
        print(f"{(token_ids[:n_measured] != pad_id).sum():,} of {n_measured:,} genes are in the vocabulary")
    print(f"{len(all_targets) - len(unmeasured):,} of {len(all_targets):,} targets are measured"
          + (f"; {len(unmeasured):,} join as unmeasured genes ({(token_ids[n_measured:] != pad_id).sum():,} of them in the vocabulary): "
             + ", ".join(unmeasured[:8]) + (", ..." if len(unmeasured) > 8 else "") if unmeasured else ""))
    for name in ("train", "val", "test"):
        groups = [subgroup.get(label, "") for label in perturbed if split[label] == name]
        print(f"{name}: {len(groups)} conditions" + "".join(f", {groups.count(g)} {g}" for g in sorted(set(groups)) if g))
    print(f"top {N_TOP} differentially expressed genes: " + ("computed (t-test against control)" if rankings is None else "the file's own rankings"))
    print(f"wrote {path}\nnext: python 04_train.py" + ("" if is_demo else f" --dataset {args.dataset}"))


if __name__ == "__main__":
    shared.run(main)
