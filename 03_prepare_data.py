"""Stage 03: cells, split, differential expression -> data/<dataset>/dataset.h5

    python 03_prepare_data.py                                   the demo: a simulated Perturb-seq screen, no network
    python 03_prepare_data.py --dataset norman                  GEARS' file, downloaded to data/norman/ (169 MB)
    python 03_prepare_data.py --dataset mine --h5ad mine.h5ad --condition-key perturbation --control NT
    python 03_prepare_data.py --dataset mine --h5ad mine.h5ad --normalize --n-genes 5000 --min-cells 20      from raw counts
    python 03_prepare_data.py --dataset mine --h5ad mine.h5ad --separator _ --target-regex '(.+)g[0-9]+'     KLF1g2_MAP2K6g1
    python 03_prepare_data.py --dataset mine --h5ad mine.h5ad --split split.json      {"train": [...], "val": [...], "test": [...]}
    python 03_prepare_data.py --dataset mine --h5ad mine.h5ad --vocab none            for stage 04 --no-pretrained

Reads any AnnData file (X dense, CSR or CSC), or a zip of GEARS' with one in it. A condition is a label such as `ctrl`,
`KLF1+ctrl`, `ctrl+KLF1` or `KLF1+MAP2K6`. X has to be log-normalized expression; raw counts are normalized with --normalize. A
target that the data does not measure joins as a gene with expression 0, so that it can be flagged; it never counts in a loss or a
metric. X is read in blocks: memory holds the chosen genes, not the file.
"""
import argparse
import contextlib
import difflib
import importlib
import lzma
import re
import shutil
import sys
import tempfile
import time
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np

shared = importlib.import_module("01_fetch_annotations")
find, damage_in = shared.find, shared.damage_in

DATAVERSE = "https://dataverse.harvard.edu/api/access/datafile/"
DATASETS = {  # GEARS' hosted data: address, and where known the bytes of the zip and the SHA-256 of the h5ad in it
    "norman": (DATAVERSE + "6154020", 168_758_985, "23ffb0fac6a847ff927cf7509d80d85052bfefbfb97610786a2dafaaefa0b6a0"),
    "adamson": (DATAVERSE + "6154417", None, None),
    "dixit": (DATAVERSE + "6154416", None, None),
    "replogle_k562_essential": (DATAVERSE + "7458695", None, None),
    "replogle_rpe1_essential": (DATAVERSE + "7458694", None, None),
}
N_TOP = 20  # differentially expressed genes that the metrics look at
BLOCK = 2**23  # values of X in memory at a time while it is read: 64 MB as float32 and int32, several times that at work
LARGEST_LOG = 50  # no logarithm of an expression comes near
LONGEST_NAME = 10_000  # characters; no gene's name or condition's label comes near
MOST_ENTRIES = 20_000_000  # of a column; no screen has so many cells


# ---------------------------------------------------------------------------------------------------------------------
# Conditions and the split

def shown(names, most=8):
    """The first names of a list, for a message: in one line and not too long, whatever characters they are made of."""
    return ", ".join(repr(str(name)[:100])[1:-1] for name in names[:most]) + (", ..." if len(names) > most else "")


def parse_condition(label, control="ctrl", separator="+", genes=(), target_regex=None, source="labels"):
    """Targets of a condition label: `A+B` -> [A, B], `A+ctrl` and `ctrl+A` -> [A], `ctrl` -> []. Ends the run otherwise.

    A separator within the name of the control or of one of `genes` does not separate: with `-`, `HLA-A-KLF1` is HLA-A and
    KLF1. Where target_regex matches the whole of a guide's name, its first group is the target: `KLF1_g2` -> KLF1.
    """
    def target_of(name):
        match = re.fullmatch(target_regex, name) if target_regex else None
        return match[1] or "" if match else name

    def refuse():
        sys.exit(f"error: {source}: condition {shown([label])!r}: expected {control!r}, a target, TARGET{separator}{control}, or different "
                 f"targets joined by {separator!r} (labels of another form: --control, --separator, --target-regex)")

    parts = label.split(separator)
    if len(parts) > 100 or not all(part and part == part.strip() for part in parts):
        refuse()
    names = []
    while parts:  # the longest name known that the rest begins with, else its first part
        candidates = [target_of(separator.join(parts[:n])) for n in range(len(parts), 0, -1)]
        i = next((i for i, name in enumerate(candidates) if name == control or name in genes), len(parts) - 1)
        names.append(candidates[i])
        del parts[:len(candidates) - i]
    targets = [name for name in names if name != control]
    if target_regex:  # two guides of one gene are one target, the order of guides means nothing
        return sorted(set(targets)) if all(targets) else refuse()
    if names != [control] and not targets or len(set(targets)) < len(targets):
        refuse()
    return targets


def collapse_guides(labels, targets, control):
    """The labels with guides collapsed, written as the control's label, TARGET+ctrl or A+B; prints what became one."""
    conditions = [control if not t else f"{t[0]}+ctrl" if len(t) == 1 else "+".join(t) for t in targets]
    labels_of = {}
    for label, condition in zip(labels, conditions):
        labels_of.setdefault(condition, []).append(label)
    examples = [f"{' and '.join(of[:3])}{' and more' if len(of) > 3 else ''} to {condition}"
                for condition, of in labels_of.items() if len(of) > 1]
    print(f"--target-regex: {len(labels):,} labels collapsed to {len(labels_of):,}: "
          f"{shown(examples, 5) or 'no two have the same targets'}")
    return conditions


def choose_conditions(labels, label_of_cell, genes, args, source):
    """Conditions (P,) of the labels (L,) in the source, each cell's condition (-1: left out) from its label (-1: missing), and
    {condition: targets}. Collapses guides and leaves out conditions of few cells; says so."""
    genes = set(genes)
    if args.target_regex and not any(re.fullmatch(args.target_regex, part) for label in labels for part in (label, *label.split(args.separator))):
        sys.exit(f"error: --target-regex {args.target_regex!r} matches no guide of {source}, as {shown(labels, 3)}")
    targets = [parse_condition(label, args.control, args.separator, genes, args.target_regex, source) for label in labels]
    if args.target_regex:
        labels = collapse_guides(labels, targets, args.control)
    targets_of = dict(zip(labels, targets))
    row = {label: i for i, label in enumerate(targets_of)}
    cell_condition = np.array([row[label] for label in labels] + [-1])[label_of_cell]  # a missing label takes the last: -1
    if (cell_condition < 0).any():
        print(f"{(cell_condition < 0).sum():,} of {len(cell_condition):,} cells have no {args.condition_key}: left out")

    conditions = np.array(list(targets_of), dtype=object)
    n_cells = np.bincount(cell_condition[cell_condition >= 0], minlength=len(conditions))
    if args.control not in row:
        most = conditions[np.argsort(-n_cells, kind="stable")]
        sys.exit(f"error: {source}: no condition {args.control!r}; name the control label with --control (the labels with most cells "
                 f"are {shown(most, 5)})")
    is_kept = n_cells >= args.min_cells
    if not is_kept[row[args.control]]:
        sys.exit(f"error: {source}: the control {args.control!r} has {n_cells[row[args.control]]:,} cells, fewer than --min-cells "
                 f"{args.min_cells}")
    if not n_cells[is_kept].all():
        sys.exit(f"error: {source}: condition {shown(conditions[n_cells == 0], 1)!r} has no cells; leave such out with --min-cells 1")
    if not is_kept.all():
        dropped = [f"{condition} ({n:,})" for condition, n in zip(conditions[~is_kept], n_cells[~is_kept])]
        print(f"--min-cells {args.min_cells}: {len(dropped):,} conditions left out (their cells): {shown(dropped, len(dropped))}")
    new_row = np.append(np.where(is_kept, np.cumsum(is_kept) - 1, -1), -1)
    conditions = conditions[is_kept]
    return conditions, new_row[cell_condition], {condition: targets_of[condition] for condition in conditions}


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
    labels_of = {}  # A+B and B+A stay together; the first of them is drawn
    for label in sorted(seen_pairs):
        labels_of.setdefault(frozenset(targets_of[label]), []).append(label)
    drawn = [labels[0] for labels in labels_of.values()]
    rng = np.random.RandomState(seed)
    kept = set(rng.choice(drawn, int(len(drawn) * train_share_of_seen_pairs), replace=False)) if drawn else set()
    for targets, labels in labels_of.items():
        if labels[0] in kept:
            train += labels
        else:
            subgroup |= dict.fromkeys(labels, f"combo_seen{len(targets)}")
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
    lists = shared.read_json(path, list)
    if set(lists) != {"train", "val", "test"} or not all(isinstance(label, str) for labels in lists.values() for label in labels):
        sys.exit(f'error: {path}: expected {{"train": [label, ...], "val": [...], "test": [...]}}')
    split = {}
    for name, labels in lists.items():
        for label in labels:
            if label in split:
                sys.exit(f"error: {path}: condition {label!r} stands twice")
            split[label] = name
    for label in split:
        if label not in targets_of:
            near = [f"{label}+ctrl"] * (f"{label}+ctrl" in targets_of) or difflib.get_close_matches(label, targets_of, 2)
            sys.exit(f"error: {path}: {label!r} is no perturbed condition of the data" + (f"; did you mean {shown(near)}?" if near else ""))
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


def cell_totals(X):
    """Sum of each cell: CSR or CSC (cells, G) -> float64 (cells,)."""
    return np.asarray(X.sum(axis=1, dtype=np.float64)).ravel()


def scale_to_median(totals, source="X"):
    """The factor that brings each cell's total of counts (cells,) to the median of all."""
    if not totals.all():
        sys.exit(f"error: {source}: {(totals == 0).sum():,} cells have no counts at all; remove them first")
    return np.median(totals) / totals


def normalized(X, scale=None):
    """log1p of counts times the factor of their cell (cells,), by default the one to the median total: CSR or CSC -> float32."""
    scale = scale_to_median(cell_totals(X)) if scale is None else scale
    X = X.astype(np.float32)
    factors = np.repeat(scale, np.diff(X.indptr)) if X.format == "csr" else scale[X.indices]
    X.data = np.log1p(X.data * factors).astype(np.float32)
    return X


def most_variable(mean, variance, n):
    """Which genes are the n most variable, (G,) bool, by their mean and variance (G,) before the logarithm.

    Seurat's normalized dispersion (Satija et al. 2015), the genes of scanpy's highly_variable_genes(flavor="seurat"): the
    z-score of log(variance / mean) among the genes of about the same log mean (20 bins of equal width). A gene alone in its
    bin counts as 1; one that never varies is never chosen; genes that tie with the last one are all chosen.
    """
    mean = np.where(mean == 0, 1e-12, mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        dispersion = np.log(np.where(variance > 0, variance / mean, np.nan))
    mean = np.log1p(mean)
    edges = np.linspace(mean.min(), mean.max(), 21)[1:-1]
    bin_of = np.searchsorted(edges, mean)  # a gene on an edge belongs to the bin below
    score = np.full(len(mean), np.nan)
    for genes in (np.flatnonzero((bin_of == b) & np.isfinite(dispersion)) for b in range(20)):
        values = dispersion[genes]
        if len(genes) == 1:
            score[genes] = 1
        elif len(genes) and values.std() > 0:
            score[genes] = (values - values.mean()) / values.std(ddof=1)
    ranked = np.sort(score[np.isfinite(score)])[::-1]
    return score >= ranked[:n][-1] if len(ranked) else np.zeros(len(mean), dtype=bool)


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
# AnnData files, also broken ones and ones from strangers

@contextlib.contextmanager
def as_h5ad(path, folder, sha256=None):
    """Yield the path of an h5ad file: `path` itself, or the one inside a zip, unpacked into `folder` for as long as needed. Ends the
    run where that is not the one with this SHA-256."""
    if not zipfile.is_zipfile(path):
        yield path
        return
    for leftover in folder.glob(".unpacked-*"):  # of a run that was killed
        if time.time() - leftover.stat().st_mtime > 86400:
            shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".unpacked-", dir=folder) as temporary:
        h5ad = unpack(path, Path(temporary) / "cells.h5ad")
        if sha256 and (found := shared.checksum(h5ad, "sha256")) != sha256:
            sys.exit(f"error: {path}: the SHA-256 of the cells in it is {found}, expected {sha256}; delete it and run again")
        yield h5ad


def unpack(path, target):
    """Write the one h5ad file of a zip to `target` and return that; no name in the zip becomes a path."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".h5ad") and not m.filename.startswith("__MACOSX/")]
            if len(members) != 1:
                sys.exit(f"error: {path}: {len(members)} .h5ad files in it, expected one")
            size, packed, free = members[0].file_size, members[0].compress_size, shutil.disk_usage(target.parent).free
            if size > 2**30 and size > 200 * packed:  # GEARS' files: 13 times
                sys.exit(f"error: {path}: {packed / 1e6:,.1f} MB in it declare to unpack to {size / 1e9:,.1f} GB, which no cells do; "
                         "unzip it yourself if you trust it")
            if size > free:
                sys.exit(f"error: {path}: unpacks to {size / 1e9:,.1f} GB, {free / 1e9:,.1f} GB are free in {target.parent.parent}")
            print(f"unpacking {shown([members[0].filename])} ({size / 1e6:,.0f} MB)")
            with archive.open(members[0]) as source, open(target, "wb") as file:
                shutil.copyfileobj(source, file, 2**22)
    except (zipfile.BadZipFile, EOFError, zlib.error, lzma.LZMAError, RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {path}: cannot be unpacked ({error}); if the disk is not full, get it again from its source")
    return target


def read_array(group, name, path, kinds):
    """The list `name` of an HDF5 group as a numpy array: numbers of these kinds (numpy's letters), or, with kinds="text", an
    array of str; numbers then as they print. Ends the run for anything else."""
    array, where = find(group, name, path), f"{group.name.rstrip('/')}/{shown([name])}"
    with damage_in(path):
        if not isinstance(array, h5py.Dataset) or array.ndim != 1:
            sys.exit(f"error: {path}: {where} is missing, or no list; write the file anew with anndata 0.7 or later")
        is_string = h5py.check_string_dtype(array.dtype) is not None
        if array.size > MOST_ENTRIES or array.nbytes > 2**29 or is_string and array.nbytes > max(2**24, 20 * array.id.get_storage_size()):
            sys.exit(f"error: {path}: {where} has {array.size:,} entries: damaged, or made to fill the memory")
        if kinds == "text" and is_string:
            values = array.asstr("utf-8")[:]
        elif array.dtype.kind in ("iufb" if kinds == "text" else kinds):
            values = array[:]
            if kinds == "text":  # few are different
                distinct, of_value = np.unique(values, return_inverse=True)
                values = distinct.astype(str).astype(object)[of_value]
        else:
            sys.exit(f"error: {path}: {where} holds {array.dtype}, expected {'text' if kinds == 'text' else 'numbers'}")
    if is_string and any("\0" in value or len(value) > LONGEST_NAME for value in values):
        sys.exit(f"error: {path}: {where} has a text with a NUL character or over {LONGEST_NAME:,} characters in it")
    return values


def attribute(item, path, *names):
    """The first of these attributes that an HDF5 group or dataset has, or None; bytes as str."""
    with damage_in(path):
        value = next((item.attrs[name] for name in names if name in item.attrs), None)
        return value.decode() if isinstance(value, bytes) else value


def columns_of(table, path):
    """Names of the columns of an AnnData table (obs or var), its index left out."""
    with damage_in(path):
        return sorted(name for name in table if not name.startswith("_"))


def read_column(table, name, path):
    """A column of an AnnData table (obs or var) as (values, codes): `values[codes]` is the column, code -1 a missing value.

    Knows plain columns, nullable ones (values and a mask), and categories: as written today (a group of categories and
    codes), and before 2022 (codes, and a reference to the categories).
    """
    column = find(table, name, path)
    if column is None:
        sys.exit(f"error: {path}: {table.name} has no column {name!r}; it has {shown(columns_of(table, path), 50)}")
    reference = attribute(column, path, "categories")
    if isinstance(reference, h5py.Reference):
        with damage_in(path):
            categories = table.file[reference].name or ""
        values, codes = read_array(table.file, categories, path, "text"), read_array(table, name, path, "iu")
    elif isinstance(column, h5py.Group) and find(column, "codes", path):
        values, order = read_plain(column, "categories", path)
        values, codes = values[order], read_array(column, "codes", path, "iu")
    else:
        return read_plain(table, name, path)
    codes = codes.astype(np.int64)
    if len(codes) and (codes.min() < -1 or codes.max() >= len(values)):
        sys.exit(f"error: {path}: {table.name}/{name} is damaged: codes beyond its {len(values):,} categories")
    return values, codes


def read_plain(table, name, path):
    """A plain or nullable column as read_column gives it, values sorted."""
    if isinstance(find(table, name, path), h5py.Group):
        values, mask = read_array(table, f"{name}/values", path, "text"), read_array(table, f"{name}/mask", path, "b")
        if len(values) != len(mask):
            sys.exit(f"error: {path}: {table.name}/{name} is damaged: {len(values)} values, {len(mask)} in its mask")
    else:
        values = read_array(table, name, path, "text")
        mask = (values == "nan") & (find(table, name, path).dtype.kind == "f")
    codes = np.full(len(values), -1)
    values, codes[~mask] = np.unique(values[~mask], return_inverse=True)
    return values, codes


def open_x(file, path, shape):
    """X of an AnnData file, checked: (by_cells, data, indices, ends). Dense X: data (cells, genes), indices and ends None.
    CSR (by_cells) and CSC: ends[i] is where row (column) i ends in data and indices. Ends the run for anything else."""
    X = find(file, "X", path)
    is_dense = isinstance(X, h5py.Dataset)
    kind = "dense" if is_dense else attribute(X, path, "encoding-type", "h5sparse_format")
    declared = X.shape if is_dense else attribute(X, path, "shape", "h5sparse_shape")
    if not is_dense and str(kind) not in ("csr_matrix", "csc_matrix", "csr", "csc") or np.size(declared) != 2:
        sys.exit(f"error: {path}: X is neither a dense, a CSR nor a CSC matrix (encoding-type {shown([kind])})")
    if tuple(declared) != shape:
        sys.exit(f"error: {path}: X is {shown(declared).replace(', ', ' x ')}, but there are {shape[0]} cells and {shape[1]} genes")
    data, indices = (X, None) if is_dense else (find(X, "data", path), find(X, "indices", path))
    with damage_in(path):
        if not isinstance(data, h5py.Dataset) or data.dtype.kind not in "iuf":
            sys.exit(f"error: {path}: X holds non-numeric values")
        if is_dense:
            return True, data, None, None
        is_whole = isinstance(indices, h5py.Dataset) and indices.dtype.kind in "iu" and data.ndim == 1 and data.shape == indices.shape
    by_cells = kind.startswith("csr")
    n_rows, n_columns = shape if by_cells else shape[::-1]
    ends = read_array(X, "indptr", path, "iu").astype(np.int64)
    if not is_whole or len(ends) != n_rows + 1 or ends[0] != 0 or ends[-1] != len(data) or \
            np.diff(ends).min() < 0 or np.diff(ends).max() > n_columns:
        sys.exit(f"error: {path}: X is a damaged sparse matrix (indptr, indices, data and shape disagree)")
    return by_cells, data, indices, ends


def read_blocks(file, path, shape):
    """X of an AnnData file piece by piece: yields (cells, genes, float32 matrix), `cells` and `genes` slices that say which part
    of X (cells, genes) it is. Dense and CSR data comes by cells and as CSR, CSC data by genes and as CSC. Nothing else of the
    file (layers, raw) is read."""
    from scipy import sparse
    from tqdm import tqdm
    by_cells, data, indices, ends = open_x(file, path, shape)
    n_rows, n_columns = shape if by_cells else shape[::-1]
    if indices is None:
        step = max(1, BLOCK // n_columns)
        if data.chunks and data.chunks[0] * n_columns <= 4 * BLOCK:  # whole chunks, or each is unpacked again and again
            step = -(-step // data.chunks[0]) * data.chunks[0]
        bounds = [*range(0, n_rows, step), n_rows]
    else:
        bounds = [0]
        while bounds[-1] < n_rows:
            last = np.searchsorted(ends, ends[bounds[-1]] + BLOCK, "right") - 1
            bounds.append(max(bounds[-1] + 1, int(last)))
    for start, stop in tqdm(list(zip(bounds, bounds[1:])), desc="reading X", unit=" blocks", leave=False, disable=None):
        part = slice(start, stop) if indices is None else slice(ends[start], ends[stop])
        with damage_in(path), np.errstate(over="ignore"):  # beyond float32: infinite, which read_cells refuses
            values = data[part].astype(np.float32, copy=False)
            minor = None if indices is None else indices[part]
        if minor is None:
            block = sparse.csr_matrix(values)
        else:
            if len(minor) and (minor.min() < 0 or minor.max() >= n_columns):
                sys.exit(f"error: {path}: X is a damaged sparse matrix (an index is beyond its {n_columns:,} "
                         f"{'genes' if by_cells else 'cells'})")
            pieces = values, minor.astype(np.int32, copy=False), (ends[start:stop + 1] - ends[start]).astype(np.int32)
            block = (sparse.csr_matrix(pieces, shape=(stop - start, n_columns)) if by_cells else
                     sparse.csc_matrix(pieces, shape=(n_columns, stop - start)))
            block.sum_duplicates()
        yield (slice(start, stop), slice(None), block) if by_cells else (slice(None), slice(start, stop), block)


def read_cells(blocks, kept, is_target, args, source):
    """Expression of the kept cells and the chosen genes as CSR float32, and which genes are chosen (G,) bool.

    blocks() yields X in pieces (as read_blocks), kept (cells,) and is_target (G,) are bool. X is read two or three times, so
    that memory holds what is kept, never X itself. Ends the run for values that are neither logarithms nor counts.
    """
    from scipy import sparse
    n_genes, totals, is_counts, largest = len(is_target), np.zeros(len(kept)), True, 0
    for cells, _, X in blocks():
        if not np.isfinite(X.data).all() or X.data.max(initial=0) > 1e12:
            sys.exit(f"error: {source}: X holds NaN, infinite or absurdly large values")
        if X.nnz and X.data.min() < 0:
            sys.exit(f"error: {source}: X holds negative values: scaled data? Expected log-normalized expression, or counts with "
                     "--normalize")
        is_counts = is_counts and (X.data == np.round(X.data)).all()
        largest = max(largest, X.data.max(initial=0))
        totals[cells] += cell_totals(X)
    is_counts = is_counts and largest > 0
    if is_counts and not args.normalize:
        sys.exit(f"error: {source}: X holds raw counts; add --normalize to scale and log-transform them")
    if not is_counts and largest > LARGEST_LOG:
        sys.exit(f"error: {source}: X holds values up to {largest:,.0f}: neither logarithms (10 or so at most) nor counts; "
                 "log-transform it (log1p), or put the raw counts into X and add --normalize")
    if args.normalize and not is_counts:
        print("X does not hold integers: taken as normalized already, --normalize left it alone")
    scale = np.ones(len(kept))
    if is_counts:
        scale[kept] = scale_to_median(totals[kept], source)

    def kept_blocks():
        for cells, genes, X in blocks():
            X = normalized(X, scale[cells]) if is_counts else X
            yield genes, X if kept.all() else X[kept[cells]]

    chosen = np.ones(n_genes, dtype=bool)
    if args.n_genes:
        sums = np.zeros((2, n_genes))  # of the values without logarithm, and of their squares
        for genes, X in kept_blocks():
            X = np.expm1(X).astype(np.float64)
            sums[:, genes] += [np.asarray(weights.sum(axis=0)).ravel() for weights in (X, X.power(2))]
        n, mean = kept.sum(), sums[0] / kept.sum()
        variable = most_variable(mean, (sums[1] - n * mean ** 2) / max(n - 1, 1), args.n_genes)
        chosen = variable | is_target
        no_more = " (no others vary)" if variable.sum() < min(args.n_genes, n_genes) else ""
        print(f"--n-genes {args.n_genes}: kept the {variable.sum():,} most variable of {n_genes:,} genes{no_more} and "
              f"{(chosen & ~variable).sum():,} more that are targets")
    parts = [X if chosen.all() else X[:, chosen[genes]] for genes, X in kept_blocks()]
    if parts[0].format == "csr":
        return sparse.vstack(parts, format="csr"), chosen
    X = sparse.hstack(parts, format="csc")
    del parts  # before X is there a second time
    return X.tocsr(), chosen


def read_rankings(file, path, conditions, label_of_cell, gene_ids, control):
    """The file's own rankings of differentially expressed genes (GEARS' layout) as the first 20 rows of gene_ids (P, 20), -1
    for control; None unless it ranks the genes of every condition. label_of_cell (cells,): each cell's condition."""
    where = "uns/rank_genes_groups_cov_all"
    if find(file, where, path) is None or find(file, "obs/condition_name", path) is None:
        return None
    names, codes = read_column(file["obs"], "condition_name", path)
    if len(codes) != len(label_of_cell) or codes.min() < 0:
        return None
    name_of = dict(zip(label_of_cell, names[codes]))
    row_of = {gene_id: i for i, gene_id in enumerate(gene_ids)}
    order = np.full((len(conditions), N_TOP), -1)
    for i, label in enumerate(conditions):
        if label == control:
            continue
        if not isinstance(find(file, f"{where}/{name_of[label]}", path), h5py.Dataset):
            return None
        ranking = read_array(file, f"{where}/{name_of[label]}", path, "text")
        ranked = [row_of[gene_id] for gene_id in ranking if gene_id in row_of][:N_TOP]
        if len(ranked) < min(N_TOP, len(gene_ids)):
            return None
        order[i, :len(ranked)] = ranked
    return order


def read_h5ad(path, args, source):
    """What stage 03 takes of an AnnData file: X (cells, G) CSR float32 of the cells and genes kept, their gene symbols (G,), the
    conditions (P,), each cell's condition (cells,), {condition: targets}, and the file's own rankings (P, 20) or None."""
    with damage_in(source):
        file = shared.read_h5(path)
    with file:
        obs, var, X = (find(file, key, source) for key in ("obs", "var", "X"))
        for key, found in (("X", X), ("obs", obs), ("var", var)):
            if found is None:
                sys.exit(f"error: {source}: no {key} in it: not an AnnData file")
            if key != "X" and not isinstance(found, h5py.Group):
                sys.exit(f"error: {source}: {key} is no table of columns; write the file anew with anndata 0.7 or later")
        index = attribute(var, source, "_index")
        index = index if isinstance(index, str) else "index"
        gene_key = args.gene_key or ("gene_name" if find(var, "gene_name", source) is not None else index)
        if gene_key == "index" and find(var, "index", source) is None:
            gene_key = index
        columns = [read_column(var, key, source) for key in (gene_key, index)]
        if min(codes.min(initial=0) for _, codes in columns) < 0:
            sys.exit(f"error: {source}: genes without a name in var/{gene_key}; name another column with --gene-key")
        genes, gene_ids = (values[codes] for values, codes in columns)
        labels, label_of_cell = read_column(obs, args.condition_key, source)
        shape = (len(label_of_cell), len(genes))
        if not all(shape) or len(gene_ids) != len(genes):
            sys.exit(f"error: {source}: {shape[0]} cells, {shape[1]} genes, {len(gene_ids)} gene ids: nothing to prepare")
        report_ensembl_ids(genes, gene_key, var, source, args.vocab)

        conditions, cell_condition, targets_of = choose_conditions(labels, label_of_cell, genes, args, source)
        kept = cell_condition >= 0
        targets = {gene for of in targets_of.values() for gene in of}
        is_target = np.array([gene in targets for gene in genes])
        X, chosen = read_cells(lambda: read_blocks(file, source, shape), kept, is_target, args, source)
        rankings = None
        if not (args.normalize or args.target_regex or (label_of_cell < 0).any()):
            rankings = read_rankings(file, source, conditions, labels[label_of_cell], gene_ids[chosen], args.control)
    return X, genes[chosen], conditions, cell_condition[kept], targets_of, rankings


def report_ensembl_ids(genes, gene_key, var, path, vocab):
    """Say so if genes go by Ensembl ids; end the run for it unless the vocabulary is the dataset's own genes."""
    n_ids = sum(re.match(r"ENS[A-Z]*G\d{11}", gene) is not None for gene in genes)
    if n_ids > len(genes) / 2:
        columns = [key for key in columns_of(var, path) if key != gene_key]
        message = (f"{path}: var/{shown([gene_key])} holds Ensembl ids ({shown(genes, 1)}), but vocabulary and texts go by gene "
                   f"symbols; name the column of symbols with --gene-key (there are: {shown(columns, 20) or 'no other columns'})")
        if vocab != "none":
            sys.exit(f"error: {message}")
        print(f"warning: {message}")


# ---------------------------------------------------------------------------------------------------------------------

def read_vocab(path):
    """The vocabulary {symbol: row} of a scGPT vocab.json. Ends the run for anything else."""
    if not Path(path).exists():
        sys.exit(f"error: {path} does not exist; --vocab takes scGPT's vocab.json, or none")
    vocab = shared.read_json(path, int)
    if sorted(vocab.values()) != list(range(len(vocab))) or "<pad>" not in vocab:
        sys.exit(f'error: {path}: expected {{"SYMBOL": row, ...}} with rows from 0 on and a "<pad>"')
    return vocab


def warn_of_targets(unmeasured, all_targets, measured, args):
    """Print a warning where targets that the data does not measure look like guides, pairs, or ids."""
    parts_of = {target: re.split(r"[^A-Za-z0-9.]", target) for target in unmeasured}
    odd = [target for target, parts in parts_of.items() if len(parts) > 1 and parts[0] in measured]
    if missing := [target for target in unmeasured if target.lower() in ("nan", "none", "na")]:
        print(f"warning: {shown(missing)} counts as a target; if those cells have no condition, take them out first", file=sys.stderr)
    if odd:
        print(f"warning: {len(odd):,} targets are no genes of the data, but begin with one ({shown(odd, 3)}): are those pairs "
              f"(--separator, now {args.separator!r}) or guides (--target-regex)?", file=sys.stderr)
    elif len(unmeasured) == len(all_targets):
        print(f"warning: none of the {len(all_targets)} targets is a measured gene ({shown(sorted(measured), 3)}): are those gene symbols? "
              "(--gene-key)", file=sys.stderr)


def text_coverage(path, genes, targets, dataset):
    """How many of the genes and of the targets each source of stage 01 has a text for; what to run where there is none yet."""
    stage_01 = "01_fetch_annotations.py" + ("" if dataset == "demo" else f" --dataset {dataset}")
    if not path.exists():
        return f"genes with text: not known before python {stage_01}"
    with shared.open_h5(path, stage_01) as file:
        with_text = {name: set(find(file, f"{name}/genes", path).asstr()[:]) for name in shared.in_order(file)}
    return "\n".join(f"{what} with text, of {len(names):,}: " + ", ".join(f"{name} {len(of & names):,}" for name, of in with_text.items())
                     for what, names in (("genes", set(genes)), ("targets", set(targets))))


def options():
    parser = shared.common_options(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--h5ad", type=Path, metavar="FILE", help="an AnnData file, or a zip with one in it")
    parser.add_argument("--condition-key", default="condition", metavar="COLUMN", help="obs column with the conditions (default: condition)")
    parser.add_argument("--control", default="ctrl", metavar="LABEL", help="label of unperturbed cells (default: ctrl)")
    parser.add_argument("--separator", default="+", metavar="TEXT",
                        help="what stands between the targets of a label, as _ in KLF1_MAP2K6 (default: +)")
    parser.add_argument("--target-regex", metavar="REGEX", help="collapses guides: where it matches the whole of a guide's name, its "
                        "first group is the target, as '(.+)_g[0-9]+' for KLF1_g2")
    parser.add_argument("--min-cells", type=int, default=0, metavar="N", help="leave out conditions of fewer cells (default: 0)")
    parser.add_argument("--gene-key", metavar="COLUMN", help="var column with gene symbols, or index (default: gene_name, else the index)")
    parser.add_argument("--normalize", action="store_true", help="X holds raw counts: scale to the median total, then log1p")
    parser.add_argument("--n-genes", type=int, metavar="N",
                        help="keep the N most variable genes (scanpy's seurat flavour) and the targets (default: all)")
    parser.add_argument("--split", default="simulation", metavar="simulation|FILE.json",
                        help='the paper\'s split, or a file {"train": [label, ...], "val": [...], "test": [...]} (default: simulation)')
    parser.add_argument("--split-seed", type=shared.seed, default=1, metavar="N", help="seed of the simulation split (default: 1, the paper's)")
    parser.add_argument("--vocab", metavar="FILE|none", help="vocabulary that numbers the genes (default: scGPT's, fetched to "
                        "data/human/scgpt/; none: the dataset's own genes, to train without pretrained weights; the demo: none)")
    args = parser.parse_args()
    if not args.separator or args.separator == args.control:
        sys.exit(f"error: --separator {args.separator!r}: expected what stands between targets, as + or _")
    if args.min_cells < 0 or args.n_genes is not None and args.n_genes < 1:
        sys.exit("error: --min-cells and --n-genes expect numbers from 0 and 1 on")
    try:
        if args.target_regex is not None and re.compile(args.target_regex).groups < 1:
            sys.exit(f"error: --target-regex {args.target_regex!r}: put the part that is the target in parentheses, as '(.+)_g[0-9]+'")
    except re.error as error:
        sys.exit(f"error: --target-regex {args.target_regex!r}: not a regular expression ({error})")
    return args


def main():
    args = options()
    is_demo = shared.space_of(args.dataset) == "demo"
    folder = args.root / "data" / args.dataset
    path = folder / "dataset.h5"
    if is_demo and args.h5ad:
        sys.exit("error: --h5ad needs a name of its own: --dataset NAME")
    if not is_demo and not args.h5ad and args.dataset not in DATASETS:
        sys.exit(f"error: unknown dataset {args.dataset!r}: one of demo, {', '.join(DATASETS)}, or your own with --h5ad FILE")
    if args.h5ad and not args.h5ad.exists():
        sys.exit(f"error: --h5ad {args.h5ad} does not exist")
    folder.mkdir(parents=True, exist_ok=True)

    # Inputs, and whether anything is to be done
    vocab_path = None
    if args.vocab not in (None, "none"):
        vocab_path = Path(args.vocab)
    elif args.vocab is None and not is_demo:
        vocab_path = shared.download(shared.VOCAB, args.root / "data" / "human" / "scgpt" / "vocab.json")
    vocab = read_vocab(vocab_path) if vocab_path else None
    source, sha256 = args.h5ad, None
    if not is_demo and source is None:
        url, size, sha256 = DATASETS[args.dataset]
        source = shared.download(url, folder / f"{args.dataset}.zip", size=size)
    inputs = [p for p in (source, vocab_path, None if args.split == "simulation" else Path(args.split)) if p]
    made = shared.made_from({"condition_key": args.condition_key, "control": args.control, "gene_key": args.gene_key,
                             "separator": args.separator, "target_regex": args.target_regex, "min_cells": args.min_cells,
                             "normalize": args.normalize, "n_genes": args.n_genes,
                             "split": "simulation" if args.split == "simulation" else "file",
                             "split_seed": args.split_seed, "vocab": "file" if vocab else "none"}, inputs)
    sources = sorted({file.name.split(".")[0] for file in (args.root / "data" / shared.space_of(args.dataset) / "embeddings").glob("*.*.*.h5")})
    variants = f" --variant scgpt scgenept_{sources[0]}" if sources and "go_all" not in sources else ""  # the default needs go_all
    next_command = "next: python 04_train.py" + ("" if is_demo else f" --dataset {args.dataset}{'' if vocab else ' --no-pretrained'}{variants}")
    if shared.is_current(path, made, args.force):
        print(next_command)
        return

    # Cells, conditions and their targets
    if is_demo:
        X, genes, labels = simulate_demo()
        print("SYNTHETIC cells: a simulated screen, for trying the kit; its numbers say nothing about biology")
        genes = np.array(genes, dtype=object)
        conditions, cell_condition, targets_of = choose_conditions(*np.unique(labels, return_inverse=True), genes, args, "the demo")
        X, cell_condition, rankings = X[cell_condition >= 0], cell_condition[cell_condition >= 0], None
    else:
        with as_h5ad(source, folder, sha256) as h5ad:
            X, genes, conditions, cell_condition, targets_of, rankings = read_h5ad(h5ad, args, source)
    n_cells = np.bincount(cell_condition, minlength=len(conditions))
    ctrl = int(np.flatnonzero(conditions == args.control)[0])
    n_measured = len(genes)
    measured = set(genes)
    all_targets = {gene: None for targets in targets_of.values() for gene in targets}  # ordered, unique
    unmeasured = sorted(gene for gene in all_targets if gene not in measured)
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
            sys.exit(f"error: {source}: none of the {n_measured:,} genes ({shown(genes, 2)}) is in {vocab_path}: "
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
    de_idx = rank_de(mean, variance, n_cells, ctrl, n_measured) if rankings is None else top_genes(rankings, ctrl)

    with shared.write_h5(path, made) as file:
        file.attrs.update({"dataset": args.dataset, "synthetic": is_demo, "control": args.control, "n_tokens": n_tokens, "pad_id": pad_id,
                           "vocab": "own genes" if vocab is None else shared.fingerprint(vocab_path)})
        if source and not args.h5ad and Path(f"{source}.sha256").exists():  # of a download without a known checksum
            file.attrs["source_sha256"] = Path(f"{source}.sha256").read_text(errors="replace")[:64]
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
             + shown(unmeasured) if unmeasured else ""))
    if nameless := sorted(target for target in all_targets if vocab is not None and target not in vocab):
        print(f"{len(nameless):,} targets are not in the vocabulary; the network cannot tell these from each other: {shown(nameless)}")
    print(text_coverage(args.root / "data" / shared.space_of(args.dataset) / "annotations.h5", genes, all_targets, args.dataset))
    for name in ("train", "val", "test"):
        groups = [subgroup.get(label, "") for label in perturbed if split[label] == name]
        print(f"{name}: {len(groups)} conditions" + "".join(f", {groups.count(g)} {g}" for g in sorted(set(groups)) if g))
    print(f"top {N_TOP} differentially expressed genes: " + ("computed (t-test against control)" if rankings is None else "the file's own rankings"))
    warn_of_targets(unmeasured, all_targets, measured, args)
    print(f"wrote {path}\n{next_command}")


if __name__ == "__main__":
    shared.run(main)
