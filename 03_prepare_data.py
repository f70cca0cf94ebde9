"""Stage 03: cells, split, differential expression -> data/<dataset>/dataset.h5

    python 03_prepare_data.py                       the demo: a simulated Perturb-seq screen, no internet
                                                    (data/demo/cells.h5ad)
    python 03_prepare_data.py --dataset norman      GEARS' file, downloaded to data/norman/ (169 MB)

Your own cells: python 03_prepare_data.py --dataset mine --h5ad mine.h5ad, and whichever of these apply:

    --condition-key perturbation --control 'NT-*'   the obs column of labels, and the labels of control cells
    --normalize --n-genes 5000 --min-cells 20       X holds raw counts
    --layer counts --normalize                      a layer holds raw counts
    --separator _ --target-regex '(.+)g[0-9]+'      KLF1g2_MAP2K6g1: guides of a gene become one target
    --control 'NegCtrl*' --target-regex '(.+)_(.+)__.+'
                                                    KLF1_NegCtrl0__KLF1_NegCtrl0 (Norman et al.)
    --control non-targeting --target-regex '[0-9]+_(.+?)_.+'
                                                    10005_ZBTB4_P1_ENSG00000174282 (Replogle et al.)
    --split split.json                              {"train": [label, ...], "val": [...], "test": [...]}
    --vocab none                                    for stage 04 --no-pretrained

Reads any AnnData file (X dense, CSR or CSC; also gzipped, or in a zip such as GEARS'). A condition is what
a cell's label stands for: the control (`ctrl`), one target (`KLF1+ctrl`) or several (`KLF1+MAP2K6`).
X has to be log-normalized expression, or raw counts with --normalize. A target that the data does not measure
joins as a gene with expression 0, so that it can be flagged as perturbed; it never counts in a loss or a
metric. Screens may be larger than memory: X is copied in pieces (except CSC, stored by gene,
which must fit in memory twice).

dataset.h5, of G genes and P conditions: X (cells x G, CSR: data, indices, indptr; float32), genes (G),
token_ids (G, rows of the vocabulary), measured (G), conditions (P), cell_condition (cells, rows of
conditions), targets (P x K, rows of genes, -1 = none), split (P; train, val, test, ctrl), subgroup (P), mean
(P x G), de_idx (P x 20, rows of genes).
"""
import argparse
import contextlib
import difflib
import fnmatch
import functools
import gzip
import importlib
import itertools
import os
import re
import shlex
import shutil
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
from scipy import sparse
from tqdm import tqdm

shared = importlib.import_module("01_fetch_annotations")
shown = shared.shown

KNOWN_SHA256 = {"norman": "23ffb0fac6a847ff927cf7509d80d85052bfefbfb97610786a2dafaaefa0b6a0"}  # of the h5ad
CONTROL = "ctrl"   # what control cells are called from here on, whatever the source calls them
N_TOP = 20         # differentially expressed genes that the metrics look at
MOST_TARGETS = 10  # a cell with more guides than this is no designed combination
BLOCK = 2**23      # values of X in memory at a time while it is read
USUAL_LOG = 15     # log-normalized expression stays below this
LARGEST_LOG = 50   # and no logarithm of expression exceeds this

# Labels of control cells, and of cells whose perturbation is not known, in capitals or not
LOOKS_LIKE_CONTROL = re.compile(
    r"(sg|g|human[ ._-]|mouse[ ._-]|one[ ._-])?"
    r"(ctrl|control|ctl|ntc?|neg[ ._-]?(ctrl|control|ctl)?|negative[ ._-]?(ctrl|control)"
    r"|(non|no)[ ._-]?(target(ing)?|cutting|gene|site)|safe[ ._-]?(target(ing)?|harbou?r)|intergenic"
    r"|scrambled?|aavs1|rosa26|e?[gb]fp|mcherry|tdtomato|lacz|luc(iferase)?|empty[ ._-]?vector|unperturbed"
    r"|untreated|unstimulated|parental|mock|vehicle|dmso|pbs|wt|wildtype)"
    r"([ ._-]?(ctrl|control|guide|s?grna|site|cell)s?)?([ ._-]?[a-z]?\d+|[ ._-][a-z])*", re.IGNORECASE)
MEANS_UNKNOWN = re.compile(
    r"[*?-]|<?nan?>?|n/a|none|null|missing|unassigned|not[ ._-]?(assigned|called|detected)|unknown|undefined"
    r"|undetected|undetermined|unclassified|unmapped|no[ ._-]?(guide|call|s?g?rna)s?|multiplets?|doublets?"
    r"|multi(ple)?([ ._-]?guides?)?|collision|ambiguous|low[ ._-]?quality|negative", re.IGNORECASE)


class BadCells(Exception):
    """What is wrong with a file of cells; open_cells ends the run with this line, after the file's name."""


# ----------------------------------------------------------------------------------------------------------
# Conditions: what the labels of the cells stand for

def make_rules(args, genes):
    """How the labels of a dataset are read (see parse_condition)."""
    return SimpleNamespace(control=[CONTROL, *args.control], separator=args.separator, genes=set(genes),
                           target_regex=args.target_regex, upper_case=args.upper_case)


def parse_condition(label, rules):
    """The targets that a label stands for, in its order: `A+B` -> [A, B], `A+ctrl` -> [A], control -> [].

    rules: control (names and shell patterns), separator, target_regex (or None), genes (set), upper_case.
    A separator within the name of a gene does not separate: with `-`, `HLA-A-KLF1` is HLA-A and KLF1. The
    regular expression is tried on the whole label, then on its parts; its groups are the targets.
    Raises ValueError, saying what is wrong with the label.
    """
    names = split_label(label.strip(), rules)
    if not all(names):
        raise ValueError(f"nothing before or after a {rules.separator!r}")
    targets = [name for name in names if not is_named(name, rules.control)]
    if rules.upper_case:
        targets = [target.upper() for target in targets]
    if rules.target_regex:  # two guides of one gene are one target
        targets = list(dict.fromkeys(targets))
    if len(set(targets)) < len(targets):
        raise ValueError("the same target twice")
    return targets


def is_named(name, patterns):
    """Whether a name is among these names and shell patterns (`NT-*`)."""
    return name in patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_control(name, rules):
    """Whether a name is that of a control. One of several parts has to look like a control, too: the pattern
    `NT*` is not meant for `NT_KLF1`."""
    is_one_part = rules.separator not in name and not find_groups(rules.target_regex, name)
    is_meant = is_one_part or LOOKS_LIKE_CONTROL.fullmatch(name)
    return name in rules.control or (is_meant and is_named(name, rules.control))


def split_label(label, rules):
    """The names in a label: what the regular expression finds in all of it, or its parts."""
    if is_control(label, rules):
        return [label]
    names = find_groups(rules.target_regex, label)
    if names and not any(rules.separator in name for name in names):
        return names
    names = []
    pieces = [piece.strip() for piece in label.split(rules.separator)]
    while pieces:  # take the most pieces that make a known name, or else one
        for n in range(len(pieces), 0, -1):
            part = rules.separator.join(pieces[:n])
            name = (find_groups(rules.target_regex, part) or [part])[0]
            symbol = name.upper() if rules.upper_case else name
            if symbol in rules.genes or is_control(name, rules):
                break
        names.append(name)
        del pieces[:n]
    return names


def find_groups(regex, text):
    """What the groups of a regular expression find in a text; [] where it does not match all of it."""
    match = re.fullmatch(regex, text) if regex else None
    return [group.strip() for group in match.groups() if group] if match else []


def condition_name(label, targets):
    """The name of a condition: `ctrl`, `A+ctrl`, or its targets in alphabetical order, joined by +.

    A label in GEARS' form (`ctrl`, `A+ctrl`, `ctrl+A`, `A+B`) stays as it is, as in the paper's tables.
    """
    padding = [CONTROL] if len(targets) < 2 else []
    if sorted(label.split("+")) == sorted(targets + padding):
        return label
    return "+".join(sorted(targets) + padding)


def find_condition(label, conditions, rules):
    """The condition that a user's label means: its own name, or one of the same targets; None for others.

    conditions: {condition: targets}
    """
    label = str(label)  # in a JSON file it may be a number
    if label in conditions:
        return label
    try:
        targets = sorted(parse_condition(label, rules))
    except ValueError:
        return None
    return next((name for name, others in conditions.items() if sorted(others) == targets), None)


def is_unknown(label, rules):
    """Whether a label says that nobody knows how its cells were perturbed: in a word, or by many guides."""
    if LOOKS_LIKE_CONTROL.fullmatch(label):
        return False
    names = split_label(label, rules)
    says_so = any(MEANS_UNKNOWN.fullmatch(word) and not is_control(word, rules) for word in [label, *names])
    return says_so or len(names) > MOST_TARGETS


def read_labels(n_cells, rules, drop):
    """What each label stands for, {label: targets}, without those that are left out.

    n_cells: {label: number of cells}; drop: the names and patterns of --drop, None without that option.
    Raises BadCells, listing every label that cannot be read.
    """
    targets_of, left_out, bad = {}, [], []
    for label, n in n_cells.items():
        if not label or is_named(label, drop or []) or (drop != [] and is_unknown(label, rules)):
            left_out.append(f"{label[:60] or 'no label'} ({n:,})")
            continue
        try:
            targets_of[label] = parse_condition(label, rules)
        except ValueError as error:
            bad.append(f"{label[:60]!r} ({error})")

    if left_out:
        print(f"left out, with numbers of cells: {shown(left_out, 20)}; see --drop")
    words = [word for label, targets in targets_of.items() if targets for word in (label, *targets)]
    controls = [word for word in dict.fromkeys(words)
                if LOOKS_LIKE_CONTROL.fullmatch(word) and word not in rules.genes]
    problems = []
    if bad:
        problems.append(f"labels that are no conditions ({len(bad):,} of {len(n_cells):,}): "
                        f"{shown(bad, 10)}; see --separator, --target-regex, --drop")
    if controls:
        names = [name for name in rules.control if name != CONTROL] + controls[:8]
        problems.append(f"these look like controls: {shown(controls)}; name all (--control "
                        f"{shlex.join(names)}; patterns such as 'NT*' work), or leave these out with --drop")
    parts = [part for label in n_cells for part in (label, *label.split(rules.separator))]
    if rules.target_regex and not any(find_groups(rules.target_regex, part) for part in parts):
        problems.append(f"--target-regex {rules.target_regex!r} matches no label, such as "
                        f"{shown(list(n_cells), 3)}")
    if problems:
        raise BadCells("; ".join(problems))
    return targets_of


def choose_conditions(labels, label_of_cell, rules, args):
    """{condition: targets}, and the condition of each cell (cells,): its place there, -1 if it is left out.

    labels (L,): as in the file; label_of_cell (cells,): the label of each cell.
    """
    labels = [label.strip() for label in labels]
    n_cells = Counter()
    for label, n in zip(labels, np.bincount(label_of_cell, minlength=len(labels))):
        if n:  # a category may have no cells
            n_cells[label] += n
    targets_of_label = read_labels(n_cells, rules, args.drop)
    with_ctrl = [label for label in targets_of_label if CONTROL in label.split(args.separator)]
    if with_ctrl and CONTROL not in args.control:
        print(f"{CONTROL!r} within a label counts as control, too: {shown(with_ctrl, 3)}")

    labels_of = {}
    for label, targets in targets_of_label.items():
        labels_of.setdefault(condition_name(label, targets), []).append(label)
    merged = [f"{condition} ({shown(same, 3)})" for condition, same in labels_of.items() if len(same) > 1]
    if merged:
        print(f"{len(targets_of_label):,} labels make {len(labels_of):,} conditions: {shown(merged, 5)}")

    n_of = {condition: sum(n_cells[label] for label in same) for condition, same in labels_of.items()}
    few = [f"{condition} ({n:,})" for condition, n in n_of.items() if n < args.min_cells]
    if few:
        print(f"left out, with fewer cells than --min-cells {args.min_cells}: {shown(few, 20)}")
    kept = [condition for condition, n in n_of.items() if n >= args.min_cells]
    if CONTROL not in kept:
        most = sorted(n_cells, key=n_cells.get, reverse=True)
        raise BadCells(f"too few control cells ({', '.join(args.control)}: {n_of.get(CONTROL, 0):,}); name "
                       f"their label with --control (most cells are {shown(most, 5)})")
    if kept == [CONTROL]:
        raise BadCells("control cells only; to predict from these, give them to 05_eval.py --controls-from")

    row_of = {label: row for row, condition in enumerate(kept) for label in labels_of[condition]}
    row_of_label = [row_of.get(label, -1) for label in labels]
    targets_of = {condition: targets_of_label[labels_of[condition][0]] for condition in kept}
    return targets_of, np.array(row_of_label, dtype=np.int32)[label_of_cell]


# ----------------------------------------------------------------------------------------------------------
# The split

def simulation_split(targets_of, seed, train_share=0.75, train_share_of_seen_pairs=0.75):
    """One round of GEARS' simulation split: {label: [target, ...]} of perturbed conditions
    -> (train, subgroup).

    `train` lists the training labels; `subgroup` says for every other label why it is held out. Legacy NumPy
    generator, as in the paper's runs.
    """
    genes = sorted(set().union(*targets_of.values()))
    rng = np.random.RandomState(seed)
    train_genes = set(rng.choice(genes, int(len(genes) * train_share), replace=False))
    seen = [label for label, targets in targets_of.items() if train_genes.issuperset(targets)]

    # Of the pairs whose targets are all seen, some are held out; A+B and B+A stay on the same side
    pair_of = {}
    for label in sorted(seen):
        if len(targets_of[label]) > 1:
            pair_of.setdefault(frozenset(targets_of[label]), label)
    pairs = list(pair_of.values())
    rng = np.random.RandomState(seed)
    kept = rng.choice(pairs, int(len(pairs) * train_share_of_seen_pairs), replace=False)
    held_out = set(pairs).difference(kept)
    train = [label for label in seen if pair_of.get(frozenset(targets_of[label])) not in held_out]
    return train, held_out_subgroups(targets_of, train, train_genes)


def held_out_subgroups(targets_of, train, seen_genes):
    """{label: subgroup} of the conditions that are not in `train`: unseen_single, or combo_seen<k> with k of
    its targets among seen_genes. A single target that was seen is in neither."""
    subgroup = {}
    for label in targets_of.keys() - train:
        n_seen = len(seen_genes.intersection(targets_of[label]))
        if len(targets_of[label]) > 1:
            subgroup[label] = f"combo_seen{n_seen}"
        elif not n_seen:
            subgroup[label] = "unseen_single"
    return subgroup


def split_conditions(targets_of, seed):
    """The paper's split: {label: targets} -> ({label: train | val | test}, {label: subgroup}).

    The training labels of a first round at 75% go through a second one at 90%; what falls out of that is
    validation (scGenePT; GEARS' `simulation`).
    """
    train_and_val, subgroup = simulation_split(targets_of, seed)
    targets_of_seen = {label: targets_of[label] for label in train_and_val}
    train, subgroup_of_val = simulation_split(targets_of_seen, seed, 0.9, 0.9)
    test, val = dict.fromkeys(subgroup, "test"), dict.fromkeys(subgroup_of_val, "val")
    return test | val | dict.fromkeys(train, "train"), subgroup | subgroup_of_val


def split_from_json(path, targets_of, rules):
    """A split of the user's from a JSON file {"train": [label, ...], "val": [...], "test": [...]}, as
    split_conditions.

    Labels may be those of the dataset or of the source; every perturbed condition has to stand in it once.
    """
    lists = shared.read_json(path, list)
    if set(lists) != {"train", "val", "test"}:
        sys.exit(f'error: {path}: expected {{"train": [label, ...], "val": [...], "test": [...]}}')
    split, problems = {}, []
    for part, labels in lists.items():
        for label in labels:
            if label == CONTROL:  # GEARS lists it among the training labels
                continue
            condition = find_condition(label, targets_of, rules)
            if condition is None:
                near = difflib.get_close_matches(str(label), targets_of, 2)
                advice = f" (did you mean {' or '.join(near)}?)" if near else ""
                problems.append(f"{label!r} is no perturbed condition of the data{advice}")
            elif condition in split:
                problems.append(f"{label!r} stands twice")
            else:
                split[condition] = part
    problems += [f"{condition!r} is missing" for condition in targets_of if condition not in split]
    if problems:
        sys.exit(f"error: {path}: {shown(problems, 10)}")

    train = [condition for condition, part in split.items() if part == "train"]
    trained_genes = set().union(*(targets_of[condition] for condition in train))
    return split, held_out_subgroups(targets_of, train, trained_genes)


def make_split(targets_of, rules, args):
    """Part (P,; train, val, test or ctrl) and subgroup (P,; or "") of each condition, as --split says.

    targets_of: {condition: [target, ...]} of the P conditions.
    """
    perturbed = {condition: targets for condition, targets in targets_of.items() if targets}
    if args.split == "none":
        split, subgroup = dict.fromkeys(perturbed, "train"), {}
    elif args.split == "simulation":
        split, subgroup = split_conditions(perturbed, args.split_seed)
    else:
        split, subgroup = split_from_json(args.split, perturbed, rules)
    empty = [part for part in ("train", "val", "test") if part not in split.values()]
    if empty and args.split != "none":
        raise BadCells(f"too few perturbations ({len(perturbed)}) for the split, none left for "
                       f"{' and '.join(empty)}: it takes about a dozen; --split none trains on all")
    parts = [split.get(condition, "ctrl") for condition in targets_of]
    subgroups = [subgroup.get(condition, "") for condition in targets_of]
    return np.array(parts, dtype=object), np.array(subgroups, dtype=object)


# ----------------------------------------------------------------------------------------------------------
# Expression

def moments(blocks, cell_condition, n_conditions, n_genes):
    """Mean and variance (ddof 1; 0 for a single cell) of each condition: two float64 arrays (P, G).

    blocks: the expression matrix piece by piece, CSR (some cells, G or the first genes of G); cell_condition
    (cells,): the condition of each cell of all blocks.
    """
    sums, squares = np.zeros((2, n_conditions, n_genes))
    n_read = 0
    for X in blocks:
        conditions = cell_condition[n_read:n_read + X.shape[0]]
        n_read += X.shape[0]
        X, cells = X.astype(np.float64), np.arange(X.shape[0])
        is_of = sparse.csr_matrix((np.ones(len(cells)), (conditions, cells)), (n_conditions, len(cells)))
        for total, values in ((sums, X), (squares, X.power(2))):
            part = (is_of @ values).tocoo()
            total[part.row, part.col] += part.data

    mean, variance = sums, squares  # turned into these in place: they can be gigabytes
    for row, n in enumerate(np.bincount(cell_condition, minlength=n_conditions)):
        mean[row] /= n
        variance[row] = np.maximum(squares[row] - n * mean[row] ** 2, 0) / max(n - 1, 1)
    return mean, variance


def rank_de(mean, variance, n_cells, ctrl, n_measured):
    """Top differentially expressed genes, int32 (P, 20), by |t| of a Welch-type t-test against control: -1
    for control itself, and where there are fewer genes.

    mean, variance (P, G), n_cells (P,), ctrl: row of the control; only the first n_measured genes are ranked.
    As scanpy's rank_genes_groups(method="t-test", reference=control, rankby_abs=True).
    """
    mean, variance = mean[:, :n_measured], variance[:, :n_measured]
    top = np.full((len(mean), N_TOP), -1, dtype=np.int32)
    for row in range(len(mean)):
        if row != ctrl:
            difference = mean[row] - mean[ctrl]
            error = np.sqrt(variance[row] / n_cells[row] + variance[ctrl] / n_cells[ctrl])
            score = np.divide(difference, error, out=np.zeros_like(difference), where=error > 0)
            order = np.argsort(-np.abs(score), kind="stable")[:N_TOP]
            top[row, :len(order)] = order
    return top


def cell_totals(X):
    """Sum of each cell: CSR or CSC (cells, G) -> float64 (cells,)."""
    return np.asarray(X.sum(axis=1, dtype=np.float64)).ravel()


def normalize(X, scale):
    """log1p of counts times the factor of their cell, scale (cells,): CSR or CSC -> float32."""
    X = X.astype(np.float32)
    X.data = np.log1p(X.data * scale[X.tocoo(copy=False).row]).astype(np.float32)
    return X


def most_variable(mean, variance, n):
    """Which genes are the n most variable, (G,) bool, by their mean and variance (G,) before the logarithm.

    Seurat's normalized dispersion (Satija et al. 2015), as scanpy's highly_variable_genes(flavor="seurat"):
    the z-score of log(variance / mean) among genes of about the same log mean (20 bins of equal width). A
    gene alone in its bin counts as 1; one that never varies is never chosen; genes that tie with the last one
    are all chosen.
    """
    mean = np.where(mean == 0, 1e-12, mean)
    log_mean = np.log1p(mean)
    edges = np.linspace(log_mean.min(), log_mean.max(), 21)[1:-1]
    bin_of = np.searchsorted(edges, log_mean)  # a gene on an edge belongs to the bin below
    score = np.full(len(mean), np.nan)
    for b in range(20):
        genes = np.flatnonzero((bin_of == b) & (variance > 0))
        dispersion = np.log(variance[genes] / mean[genes])
        if len(genes) == 1:
            score[genes] = 1
        elif len(genes) and dispersion.std() > 0:
            score[genes] = (dispersion - dispersion.mean()) / dispersion.std(ddof=1)
    score = np.round(score, 9)  # ties stay ties in whatever order the cells were summed
    best = -np.sort(-score)[:n]  # NaN, of genes that never vary, comes last
    return score >= np.fmin.reduce(best)


# ----------------------------------------------------------------------------------------------------------
# The demo: a simulated screen

def simulate_demo(path):
    """Write simulated cells (3,564 x 128, counts) and their conditions as an AnnData file. SYNTHETIC.

    Every gene takes part in one or two of eight processes (stage 01 writes texts that say so). Perturbing a
    gene changes the activity of the other processes through a random signed matrix, and thereby the genes
    that take part in them. The matrix is centred by rows and columns: no response is shared by all
    perturbations, so that a mean predicts nothing.
    """
    genes, takes_part = shared.demo_genes()
    rng = np.random.default_rng(1)
    share = takes_part / takes_part.sum(1, keepdims=True)  # (G, processes)
    n_processes = share.shape[1]
    sign = rng.choice([-1.0, 1.0], (n_processes, n_processes))
    effect = sign * rng.uniform(0.5, 1.5, (n_processes, n_processes))
    effect -= effect.mean(0)
    effect -= effect.mean(1, keepdims=True)
    targets = rng.choice(len(genes), 96, replace=False)
    pairs = [rng.choice(targets, 2, replace=False) for _ in range(40)]

    baseline = rng.normal(1.0, 0.7, len(genes))
    counts, labels = [], []
    for perturbed in [[], *([target] for target in targets), *pairs]:
        n_cells = 24 if len(perturbed) else 300
        names = [genes[target] for target in perturbed]
        label = "+".join(names if len(names) == 2 else [*names, CONTROL])
        activity = rng.normal(0, 0.15, (n_cells, n_processes))  # cells differ without any perturbation
        for target in perturbed:
            activity = activity + effect @ share[target]
        depth = rng.normal(0, 0.2, (n_cells, 1))
        log_mean = baseline + activity @ share.T + depth
        log_mean[:, perturbed] -= 1.5  # knocked down
        counts.append(rng.poisson(np.exp(log_mean)))
        labels += [label] * n_cells
    X = sparse.csr_matrix(np.concatenate(counts).astype(np.float32))
    made = shared.made_from({"simulated": "demo"}, {})
    write_h5ad(path, made, X, {"condition": labels}, genes, "SYNTHETIC cells: a simulated screen")


# ----------------------------------------------------------------------------------------------------------
# AnnData files: reading

HOW_TO_CONVERT = "not an AnnData file (h5ad); read it with anndata or scanpy and save it with write_h5ad"


@contextlib.contextmanager
def open_cells(path, folder, sha256=None):
    """Yield the path of an h5ad file: `path` itself, or what a .gz or a zip holds, in `folder` for as long as
    the block lasts.

    Ends the run for a file of another kind, where the unpacked file has another SHA-256 than this, and where
    the block raises BadCells.
    """
    unpacked = folder / f".unpacked.{os.getpid()}.h5ad"  # a process may unpack another file meanwhile
    try:
        yield path if h5py.is_hdf5(path) else unpack(path, unpacked, sha256)
    except BadCells as error:
        sys.exit(f"error: {path}: {error}")
    finally:
        unpacked.unlink(missing_ok=True)


def unpack(path, unpacked, sha256):
    """Unpack the h5ad in a .gz or a zip to the path `unpacked`, and return that."""
    try:
        with open_packed(path) as source, open(unpacked, "wb") as file:
            print(f"unpacking {path}")
            shutil.copyfileobj(source, file, 2**22)
    except (zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error, RuntimeError) as error:
        raise BadCells(f"damaged ({error}); get it again from its source") from None
    if sha256 and shared.checksum(unpacked) != sha256:
        raise BadCells("the cells in it are not those expected (SHA-256); delete it and run again")
    if not h5py.is_hdf5(unpacked):
        raise BadCells(f"{kind_of(unpacked)} in it, {HOW_TO_CONVERT}")
    return unpacked


def open_packed(path):
    """The h5ad in a .gz or a zip, open for reading."""
    kind = kind_of(path)
    if kind == "a gzipped file":
        return gzip.open(path)
    if kind != "a zip archive":
        raise BadCells(f"{kind}, {HOW_TO_CONVERT}")
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if name.endswith(".h5ad") and "__MACOSX/" not in name]
    if len(names) != 1:
        raise BadCells(f"{len(names)} .h5ad files in it, expected one (it has "
                       f"{shown(archive.namelist(), 5) or 'none'})")
    return archive.open(names[0])


def kind_of(path):
    """What a file that is not HDF5 is, in words."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head:
        return "an empty file"
    if tarfile.is_tarfile(path):  # also a gzipped one
        return "a tar archive"
    if shared.is_html(head):
        return "a web page"
    kinds = {b"\x1f\x8b": "a gzipped file", b"PK": "a zip archive", b"\x80": "a Python pickle",
             b"BZh": "a bzip2 file (unpack it)", b"\xfd7zXZ": "an xz file (unpack it)",
             b"version https://git-lfs": "a pointer of Git LFS (git lfs pull fetches the file)",
             b"\x28\xb5\x2f\xfd": "a zstd file (unpack it)", b"PAR1": "a parquet file",
             b"X\n": "an R object (rds)", b"RDX": "an R file", b"%%MatrixMarket": "a text file (mtx)"}
    other = "a binary file" if b"\0" in head else "a text file (csv, tsv?)"
    return next((words for start, words in kinds.items() if head.startswith(start)), other)


def check_is_anndata(file):
    """Raise BadCells for an HDF5 file that is not an AnnData file, saying what it is."""
    has_tables = all(isinstance(file.get(name), h5py.Group) for name in ("obs", "var"))
    if has_tables and "mod" not in file:
        return
    kinds = {"mod": "a MuData file (h5mu)", "row_attrs": "a loom file", "matrix": "10x Genomics' h5 format",
             "assays": "an h5Seurat file", "obs": "a file of anndata before 0.7"}
    others = f"an HDF5 file with {shown(list(file)) or 'nothing'} in it"
    kind = next((words for key, words in kinds.items() if key in file), others)
    raise BadCells(f"{kind}, {HOW_TO_CONVERT}")


def read_text(item):
    """A dataset of an AnnData table as text (n,): numbers as they print, "" for a missing value."""
    if isinstance(item, h5py.Group):  # nullable
        return np.where(item["mask"][:], "", read_text(item["values"]))
    if h5py.check_string_dtype(item.dtype):
        return item.asstr()[:]
    values = item[:]
    return np.where(np.isnan(values), "", values.astype(str)).astype(object)


def read_column(table, name):
    """A column of an AnnData table (obs or var) as (values, codes): `values[codes]` is the column as text,
    "" where a value is missing.

    Knows plain columns, nullable ones (values and a mask), and categories: as written today (a group of
    categories and codes), and before 2022 (codes, and a reference to the categories).
    """
    if name not in table:
        raise BadCells(f"{table.name.strip('/')} has no column {name!r}; it has {columns_of(table)}")
    column = table[name]
    if "categories" in column.attrs:
        values, codes = table.file[column.attrs["categories"]], column
    elif isinstance(column, h5py.Group) and "codes" in column:
        values, codes = column["categories"], column["codes"]
    else:
        return np.unique(read_text(column), return_inverse=True)
    values, codes = read_text(values), codes[:].astype(np.int64)
    if not ((-1 <= codes) & (codes < len(values))).all():
        raise BadCells(f"{column.name}: codes outside its {len(values):,} categories")
    return np.append(values, ""), codes % (len(values) + 1)  # -1, a missing value, is the last


def columns_of(table):
    """The columns of an AnnData table, for a message."""
    return shown(sorted(column for column in table if not column.startswith("_")), 50) or "none"


def find_matrix(file, layer):
    """The expression matrix of an AnnData file that --layer names (None: X), and the table of its genes."""
    place = {None: "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")
    var = "raw/var" if layer == "raw" else "var"
    for name in (place, var):
        if name not in file:
            raise BadCells(f"no {name} in it{other_layers(file)}")
    return file[place], file[var]


def other_layers(file):
    """What --layer can choose in an AnnData file, as the end of a message."""
    layers = list(file.get("layers", ())) + (["raw"] if "raw/X" in file else [])
    return f"; choose another matrix with --layer ({shown(layers, 20)})" if layers else ""


def find_genes(file, args):
    """The symbols (G,) of the genes that the options choose in an AnnData file, and their table."""
    check_is_anndata(file)
    _, var = find_matrix(file, args.layer)
    key = args.gene_key or "gene_name"
    if key not in var and args.gene_key in (None, "index"):
        key = index_of(var)
    symbols, codes = read_column(var, key)
    if args.upper_case:
        symbols = np.array([symbol.upper() for symbol in symbols], dtype=object)
    return symbols[codes], var


def index_of(table):
    """The name of the column of an AnnData table that is its index."""
    return table.attrs.get("_index", "index")


def shape_of(X):
    """The shape (cells, genes) of the expression matrix of an AnnData file."""
    return tuple(X.shape if isinstance(X, h5py.Dataset) else X.attrs["shape"])


def expression_blocks(path, args, n_cells, n_genes):
    """Yield the expression matrix of an AnnData file piece by piece: (slice of cells, CSR float32 matrix)."""
    with shared.read_h5(path) as file:
        X, _ = find_matrix(file, args.layer)
        if shape_of(X) != (n_cells, n_genes):
            raise BadCells(f"{X.name} is not of {n_cells:,} cells and {n_genes:,} genes")
        if isinstance(X, h5py.Group):
            yield from read_sparse_blocks(X)
        else:
            rows_of_chunk = X.chunks[0] if X.chunks else 1
            for cells in row_slices(n_cells, X.size, rows_of_chunk):
                yield cells, sparse.csr_matrix(X.astype(np.float32)[cells])


def read_sparse_blocks(X):
    """expression_blocks of a CSR or CSC matrix. CSC, stored by gene, becomes CSR in memory."""
    encoding = X.attrs.get("encoding-type")
    if encoding not in ("csr_matrix", "csc_matrix"):
        raise BadCells(f"{X.name} is neither dense, CSR nor CSC ({encoding})")
    n_cells, n_genes = shape_of(X)
    data, indices = X["data"].astype(np.float32), X["indices"].astype(np.int32)
    indptr = X["indptr"][:].astype(np.int64)
    try:
        if (np.diff(indptr) < 0).any():  # scipy does not see this in a block without values
            raise ValueError("indptr decreases")
        if encoding == "csc_matrix":
            whole = sparse.csc_matrix((data[:], indices[:], indptr), shape=(n_cells, n_genes))
            whole.check_format()
            whole = whole.tocsr()
            data, indices, indptr = whole.data, whole.indices, whole.indptr
        for cells in row_slices(n_cells, len(data)):
            starts = indptr[cells.start:cells.stop + 1]
            part = slice(starts[0], starts[-1])
            block = sparse.csr_matrix((data[part], indices[part], starts - starts[0]),
                                      shape=(cells.stop - cells.start, n_genes))
            block.check_format()
            block.sum_duplicates()
            block.eliminate_zeros()
            yield cells, block
    except ValueError as error:
        raise BadCells(f"{X.name} is damaged, or of another shape ({error})") from None


def row_slices(n_rows, n_values, multiple=1):
    """Yield slices of rows that hold about BLOCK of the n_values values of a matrix, with a progress bar.

    multiple: rows of a chunk of the file, which is unpacked as a whole.
    """
    step = max(1, BLOCK * n_rows // max(n_values, 1))
    step = -(-step // multiple) * multiple
    for start in tqdm(range(0, n_rows, step), "reading cells", unit=" blocks", leave=False, disable=None):
        yield slice(start, min(start + step, n_rows))


def scan_expression(path, args, is_wanted, n_genes):
    """Check the expression matrix of an AnnData file. Returns a function that yields its log_blocks; which
    cells are kept (cells,): wanted ones with any expression; each gene's number of nonzero values in them
    (G,); whether it holds counts, which --normalize turns into logarithms.

    is_wanted (cells,) bool. Raises BadCells for values that are neither logarithms nor, with --normalize,
    counts.
    """
    blocks = functools.partial(expression_blocks, path, args, len(is_wanted), n_genes)
    totals, n_values = np.zeros(len(is_wanted)), np.zeros(n_genes, dtype=np.int64)
    extremes, is_whole = [0], True
    for cells, X in blocks():
        extremes += [X.data.min(initial=0), X.data.max(initial=0)]
        is_whole = is_whole and (X.data == np.round(X.data)).all()
        totals[cells] = cell_totals(X)
        n_values += X[is_wanted[cells]].getnnz(axis=0)

    smallest, largest = np.min(extremes), np.max(extremes)  # NaN if a value is
    is_counts = is_whole or largest > LARGEST_LOG
    problem = None
    if not np.isfinite([smallest, largest]).all():
        problem = "NaN or infinite values in the expression matrix"
    elif largest == smallest == 0:
        problem = "nothing but zeros in the expression matrix"
    elif smallest < 0:
        problem = "negative values, as in scaled data; expected log-normalized ones"
    elif is_counts and not args.normalize:
        problem = (f"counts, not logarithms (values up to {largest:,.0f}); add --normalize to scale and "
                   "log-transform them")
    if problem:
        with shared.read_h5(path) as file:
            raise BadCells(problem + other_layers(file))

    if args.normalize and not is_counts:
        print("the values are not counts but normalized already: --normalize left them alone")
    if is_counts and not is_whole:
        print("the values are not whole numbers (corrected counts?): normalized like counts")
    filled = totals[totals > 0]
    has_same_sums = len(filled) > 1 and np.ptp(filled) < 1e-3 * filled.mean()
    if not is_counts and (largest > USUAL_LOG or has_same_sums):
        sign = "all cells have the same sum" if has_same_sums else f"there are values up to {largest:.1f}"
        print(f"warning: {sign}: normalized, but not log-transformed?", file=sys.stderr)
    kept = is_wanted & (totals > 0)
    scale = np.median(totals[kept]) / np.maximum(totals, 1) if is_counts else None
    return functools.partial(log_blocks, blocks, kept, scale), kept, n_values, is_counts


def log_blocks(blocks, kept, scale, chosen=None):
    """Yield the kept cells (cells,) and chosen genes (G,) (None: all) of the expression_blocks of blocks(),
    log-normalized. scale (cells,) normalizes counts; None leaves values as they are."""
    for cells, X in blocks():
        X = normalize(X, scale[cells]) if scale is not None else X
        X = X[kept[cells]]
        yield X if chosen is None else X[:, chosen]


def choose_variable(logs, is_target, n_cells, n_wanted):
    """Which genes --n-genes keeps, (G,) bool: the most variable of log_blocks' `logs`, and targets (G,)."""
    blocks = (X.expm1() for X in logs)
    mean, variance = moments(blocks, np.zeros(n_cells, dtype=int), 1, len(is_target))
    is_variable = most_variable(mean[0], variance[0], n_wanted)
    chosen = is_variable | is_target
    print(f"--n-genes {n_wanted}: kept the {is_variable.sum():,} most variable of {len(chosen):,} genes "
          f"and {(chosen & ~is_variable).sum():,} more that are targets")
    return chosen


def read_rankings(file, conditions, cell_condition, chosen):
    """The file's own rankings of differentially expressed genes (GEARS' layout), the first 20 as rows of the
    chosen genes (P, 20), -1 for control; None unless it ranks the genes of every condition.
    """
    rankings = file.get("uns/rank_genes_groups_cov_all")
    if rankings is None or "condition_name" not in file["obs"]:
        return None
    names, codes = read_column(file["obs"], "condition_name")
    name_of = dict(zip(cell_condition, names[codes]))  # its row: the name of its ranking
    gene_ids = read_text(file["var"][index_of(file["var"])])[chosen]
    row_of = {gene_id: i for i, gene_id in enumerate(gene_ids)}
    order = np.full((len(conditions), N_TOP), -1, dtype=np.int32)
    for i, condition in enumerate(conditions):
        if condition == CONTROL:
            continue
        if name_of[i] not in rankings:
            return None
        ranking = read_text(rankings[name_of[i]])
        ranked = [row_of[gene_id] for gene_id in ranking if gene_id in row_of][:N_TOP]
        if len(ranked) < min(N_TOP, len(gene_ids)):
            return None
        order[i, :len(ranked)] = ranked
    return order


def open_h5ad(path, args, vocab=None):
    """What this stage takes of an AnnData file, as a namespace: blocks(), which reads the expression of the
    cells and genes kept, CSR matrices of some cells each (float32), and n_values, the number of values in
    them; genes (G,), conditions (P,), cell_condition (cells,), targets_of {condition: [target]}, the set
    all_targets, the rules of the labels, and the file's rankings (P, 20) or None.

    vocab: {symbol: row} of scGPT's vocabulary, or None.
    """
    with shared.read_h5(path) as file:
        genes, var = find_genes(file, args)
        if vocab:
            check_known(genes, vocab, columns_of(var))
        labels, label_of_cell = read_column(file["obs"], args.condition_key)
    rules = make_rules(args, genes)
    targets_of, cell_condition = choose_conditions(labels, label_of_cell, rules, args)
    conditions = np.array(list(targets_of), dtype=object)
    all_targets = set().union(*targets_of.values())

    # Cells
    is_wanted = cell_condition >= 0
    logs, kept, n_values, is_counts = scan_expression(path, args, is_wanted, len(genes))
    n_empty = (is_wanted & ~kept).sum()
    if n_empty:
        print(f"left out, without any expression: {n_empty:,} of {len(kept):,} cells")
    n_cells = np.bincount(cell_condition[kept], minlength=len(conditions))
    if not n_cells.all():
        raise BadCells(f"no cell with any expression in {shown(conditions[n_cells == 0])}; leave those out "
                       "with --drop")

    # Genes
    chosen, blocks = slice(None), logs
    if args.n_genes:
        is_target = np.array([gene in all_targets for gene in genes])
        chosen = choose_variable(logs(), is_target, kept.sum(), args.n_genes)
        blocks = functools.partial(logs, chosen)
    rankings = None
    if not is_counts and kept.all() and args.layer is None:
        with shared.read_h5(path) as file:
            rankings = read_rankings(file, conditions, cell_condition, chosen)
    return SimpleNamespace(
        blocks=blocks, n_values=n_values[chosen].sum(),
        genes=genes[chosen], conditions=conditions, cell_condition=cell_condition[kept],
        targets_of=targets_of, all_targets=all_targets, rules=rules, rankings=rankings)


def read_cells(path, args):
    """All cells of an AnnData file that have any expression, whatever their labels: X (cells, G) CSR float32,
    log-normalized, and genes (G,). Takes the options layer, normalize, gene_key and upper_case."""
    with shared.read_h5(path) as file:
        genes, _ = find_genes(file, args)
        X, _ = find_matrix(file, args.layer)
        is_wanted = np.ones(shape_of(X)[0], dtype=bool)
    logs, *_ = scan_expression(path, args, is_wanted, len(genes))
    return sparse.vstack(list(logs()), format="csr"), unique_names(genes)


# ----------------------------------------------------------------------------------------------------------
# AnnData files: writing

def write_h5ad(path, made, X, obs, genes, description, control=None):
    """Write X as an AnnData file with obs {column: values}: a CSR matrix, or one after the other its rows
    (genes,), an array or a generator.

    With `control` (genes,), the mean of control cells, it also gets the layers `control` and `delta`. The
    index of obs is the condition where that is unique. Format: anndata 0.8 and later, which scanpy opens.
    """
    index = obs["condition"]
    if len(set(index)) < len(index):
        index = [f"{condition} {row}" for row, condition in enumerate(index)]
    about = {"description": description, "control": CONTROL, **shared.provenance(made)}
    del about["format_version"]
    with shared.write_h5(path, made) as file:
        mark(file, "anndata", "0.1.0")
        for name in ("layers", "obsm", "obsp", "varm", "varp", "uns"):
            mark(file.create_group(name), "dict", "0.1.0")
        if sparse.issparse(X):
            list(write_blocks(file, "X", [X], X.nnz, X.shape))
        else:
            write_rows(file, X, (len(index), len(genes)), control)
        write_table(file, "obs", index, obs)
        write_table(file, "var", genes, {"gene_name": genes})
        for name, text in about.items():
            file["uns"][name] = text
            mark(file["uns"][name], "string")


def write_rows(file, rows, shape, control=None):
    """Write the rows (genes,) of a dense matrix as X of an AnnData file, a thousand at a time, and with
    `control` (genes,) the layers `control` and `delta`."""
    for name in ("X",) if control is None else ("X", "layers/control", "layers/delta"):
        mark(file.create_dataset(name, shape, np.float32), "array")
    rows = iter(rows)
    for start in range(0, shape[0], 1000):
        block = np.stack(list(itertools.islice(rows, 1000)))
        part = slice(start, start + len(block))
        file["X"][part] = block
        if control is not None:
            file["layers/control"][part] = np.broadcast_to(control, block.shape)
            file["layers/delta"][part] = block - control


def mark(item, kind, version="0.2.0"):
    """Say what an item of an AnnData file is."""
    item.attrs.update({"encoding-type": kind, "encoding-version": version})


def write_blocks(group, name, blocks, n_values, shape):
    """Write CSR matrices of some cells each as one, of n_values values in all, as AnnData does, and yield
    each when it is written. In one stretch and not compressed: ExpressionMatrix maps it into memory."""
    matrix = group.create_group(name)
    mark(matrix, "csr_matrix", "0.1.0")
    matrix.attrs["shape"] = np.array(shape)
    data = matrix.create_dataset("data", (n_values,), np.float32)
    indices = matrix.create_dataset("indices", (n_values,), np.int32)
    indptr, n_written = [[0]], 0
    for X in blocks:
        part = slice(n_written, n_written + X.nnz)
        data[part], indices[part] = X.data, X.indices
        indptr.append(n_written + X.indptr[1:].astype(np.int64))
        n_written += X.nnz
        yield X
    matrix["indptr"] = np.concatenate(indptr)


def write_table(file, name, index, columns):
    """Write obs or var: an index and columns {name: values}, texts or numbers."""
    table = file.create_group(name)
    mark(table, "dataframe")
    order = np.array(list(columns), dtype=h5py.string_dtype())
    table.attrs.update({"_index": "_index", "column-order": order})
    for column, values in {"_index": index, **columns}.items():
        is_text = isinstance(values[0], str)
        if is_text:
            shared.write_strings(table, column, values)
        else:
            table[column] = np.asarray(values)
        mark(table[column], "string-array" if is_text else "array")


# ----------------------------------------------------------------------------------------------------------
# dataset.h5

def number_genes(data, vocab):
    """Add to open_h5ad's namespace the numbers of its genes: genes (G,), measured (G,) bool, token_ids (G,),
    n_tokens and pad_id of the vocabulary, targets (P, K), rows of genes (-1: none).

    Targets that the data does not measure join at the end. vocab: {symbol: row} of scGPT's vocabulary, or
    None: every gene is a token of its own.
    """
    unmeasured = sorted(data.all_targets.difference(data.genes))
    symbols = np.concatenate([data.genes, np.array(unmeasured, dtype=object)])
    n_genes = len(symbols)
    data.measured = np.arange(n_genes) < len(data.genes)
    if vocab is None:
        token_ids, data.n_tokens, data.pad_id = range(n_genes), n_genes + 1, n_genes
    else:
        data.n_tokens, data.pad_id = len(vocab), vocab["<pad>"]
        token_ids = [vocab.get(gene, data.pad_id) for gene in symbols]
    data.token_ids = np.array(token_ids, dtype=np.int32)
    data.genes = unique_names(symbols)
    renamed = data.genes[data.genes != symbols]
    if len(renamed):
        print(f"symbols of two genes: the second is {shown(renamed)}; perturbations flag the first")

    row_of = {gene: row for row, gene in enumerate(data.genes)}
    rows = [[row_of[target] for target in targets] for targets in data.targets_of.values()]
    columns = itertools.zip_longest(*rows, fillvalue=-1)
    data.targets = np.array(list(columns), dtype=np.int32).T


def unique_names(symbols):
    """Symbols (G,) in which the second `A` is called `A-1`, as an array of text."""
    names = {}  # a dict keeps the order
    for symbol in symbols:
        name, n = symbol, 0
        while name in names:
            n += 1
            name = f"{symbol}-{n}"
        names[name] = None
    return np.array(list(names), dtype=object)


def check_known(genes, vocab, columns):
    """Warn if less than half of the genes are in the vocabulary; raise BadCells if none is.

    columns: where else in the file symbols may be
    """
    n_known = sum(gene in vocab for gene in genes)
    if n_known >= len(genes) / 2:
        return
    is_mouse = sum(gene.upper() in vocab for gene in genes) > 2 * n_known
    cause = "mouse symbols? --upper-case" if is_mouse else f"old symbols, or ids? --gene-key ({columns})"
    found = f"{n_known:,} of {len(genes):,} genes ({shown(genes, 2)}) are in the vocabulary: {cause}"
    if not n_known:
        raise BadCells(found)
    print(f"warning: only {found}", file=sys.stderr)


# What dataset.h5 has besides X and attributes
ARRAYS = ("token_ids", "measured", "cell_condition", "targets", "mean", "de_idx")
TEXTS = ("genes", "conditions", "split", "subgroup")


def write_dataset(path, made, attributes, data):
    """Write dataset.h5, with each condition's mean and ranking of genes; load_dataset reads it."""
    with shared.write_h5(path, made) as file:
        file.attrs.update(attributes)
        # X goes from file to file in pieces, and the means are added up on the way
        shape = len(data.cell_condition), len(data.genes)
        blocks = write_blocks(file, "X", data.blocks(), data.n_values, shape)
        mean, variance = moments(blocks, data.cell_condition, len(data.conditions), len(data.genes))
        data.mean, data.de_idx = mean.astype(np.float32), data.rankings
        if data.rankings is None:
            n_cells = np.bincount(data.cell_condition)
            ctrl = list(data.conditions).index(CONTROL)
            data.de_idx = rank_de(mean, variance, n_cells, ctrl, data.measured.sum())
        for name in ARRAYS:
            file[name] = getattr(data, name)
        for name in TEXTS:
            shared.write_strings(file, name, getattr(data, name))


class ExpressionMatrix:
    """The expression of a dataset, (cells, genes), which stays on disk: X[cells] reads these rows, an array
    of indices, as CSR.

    The file is mapped into memory: what was read lately is there for as long as no program needs the space.
    """
    def __init__(self, group):
        self.indptr = group["indptr"][:].astype(np.int64)
        self.data, self.indices = map_into_memory(group["data"]), map_into_memory(group["indices"])
        self.shape = tuple(group.attrs["shape"])

    def __getitem__(self, cells):
        starts = self.indptr[cells]
        n_values = self.indptr[cells + 1] - starts
        indptr = np.concatenate([[0], np.cumsum(n_values)])  # of the rows that are read
        places = np.arange(indptr[-1]) + np.repeat(starts - indptr[:-1], n_values)
        return sparse.csr_matrix((self.data[places], self.indices[places], indptr),
                                 shape=(len(cells), self.shape[1]))


def map_into_memory(dataset):
    """A dataset that write_blocks wrote, as an array that the system reads from the file where it is used."""
    return np.memmap(dataset.file.filename, dataset.dtype, "r", dataset.id.get_offset(), dataset.shape)


def load_dataset(path, made_by):
    """dataset.h5 as a namespace: X (an ExpressionMatrix), genes, token_ids, measured, conditions,
    cell_condition, targets, split, subgroup, mean, de_idx as in the file, its attributes, and ctrl_cells, the
    indices of the control cells."""
    data = SimpleNamespace()
    with shared.read_h5(path, made_by) as file:
        for name in ARRAYS:
            setattr(data, name, file[name][:])
        for name in TEXTS:
            setattr(data, name, file[name].asstr()[:])
        data.synthetic, data.vocab = bool(file.attrs["synthetic"]), str(file.attrs["vocab"])
        data.n_tokens, data.pad_id = int(file.attrs["n_tokens"]), int(file.attrs["pad_id"])
        data.X = ExpressionMatrix(file["X"])
    data.ctrl_cells = np.flatnonzero(data.split[data.cell_condition] == "ctrl")
    return data


def print_summary(data, vocab, args):
    """Print what is in the dataset, and what the user should know of it."""
    n_control = (data.split[data.cell_condition] == "ctrl").sum()
    measured, unmeasured = data.genes[data.measured], data.genes[~data.measured]
    targets = sorted(data.all_targets)
    print(f"{len(data.cell_condition):,} cells ({n_control:,} control), {len(measured):,} genes, "
          f"{len(data.conditions) - 1:,} perturbations of {len(targets):,} targets")
    print(f"{len(targets) - len(unmeasured):,} of {len(targets):,} targets are measured"
          + (f"; added as unmeasured genes: {shown(unmeasured)}" if len(unmeasured) else ""))
    if vocab:
        n_known = (data.token_ids[data.measured] != data.pad_id).sum()
        print(f"{n_known:,} of {len(measured):,} genes are in the vocabulary")
        unknown = [target for target in targets if target not in vocab]
        if unknown:
            print(f"targets that are not in it ({len(unknown):,}), which the model cannot tell apart without "
                  f"texts: {shown(unknown)}")
    with_text = print_text_coverage(data.genes, targets, args)
    for part in ("train", "val", "test"):
        groups = list(data.subgroup[data.split == part])
        if groups:
            kinds = [f", {groups.count(group)} {group}" for group in sorted(set(groups)) if group]
            print(f"{part}: {len(groups)} conditions{''.join(kinds)}")
    how = "computed (t-test against control)" if data.rankings is None else "the file's own rankings"
    print(f"top {N_TOP} differentially expressed genes: {how}")
    warn_of_targets(targets, measured, with_text, args)


def warn_of_targets(targets, measured, with_text, args):
    """Print a warning where targets look like guides, pairs, or ids. Genes are those that are measured (G,)
    or have a text (a set)."""
    symbols = with_text.union(measured)
    odd = [target for target in targets if target not in symbols
           and any(target[:end.start()] in symbols for end in re.finditer("[^A-Za-z0-9.]", target))]
    if odd:
        print(f"warning: targets that are not genes but begin with one ({len(odd):,}): {shown(odd, 3)}; "
              f"pairs (--separator, now {args.separator!r}) or guides (--target-regex)?", file=sys.stderr)
    elif symbols.isdisjoint(targets):
        print(f"warning: no target ({shown(targets, 3)}) is a measured gene ({shown(measured, 3)}); are "
              "those symbols? See --gene-key, --target-regex, --upper-case", file=sys.stderr)


def print_text_coverage(genes, targets, args):
    """Print how many of the genes and of the targets each source of stage 01 has a text for, and return the
    genes with a text in any (a set)."""
    path = args.root / "data" / shared.space_of(args.dataset) / "annotations.h5"
    if not path.exists():
        print(f"genes with text: not known before {shared.command('01_fetch_annotations.py', args)}")
        return set()
    with shared.read_h5(path) as file:
        with_text = {source: set(group["genes"].asstr()[:]) for source, group in file.items()}
    for what, names in (("genes", set(genes)), ("targets", set(targets))):
        counts = [f"{source} {len(of_source & names):,}" for source, of_source in with_text.items()]
        print(f"{what} with text, of {len(names):,}: {', '.join(counts)}")
    known = set().union(*with_text.values())
    without = [target for target in targets if target not in known]
    if without:
        print(f"targets without any text ({len(without):,}): {shown(without)}")
    return known


# ----------------------------------------------------------------------------------------------------------

def parse_arguments():
    parser = shared.common_options(argparse.ArgumentParser(description=__doc__))
    add = parser.add_argument
    add("--h5ad", type=Path, metavar="FILE", help="an AnnData file, also gzipped or in a zip")

    add = parser.add_argument_group("labels").add_argument
    add("--condition-key", default="condition", metavar="COLUMN",
        help="obs column with the labels (default: condition)")
    add("--control", nargs="+", default=[CONTROL], metavar="LABEL",
        help="labels of control cells, also as patterns such as 'NT-*' (default: ctrl)")
    add("--drop", nargs="*", metavar="LABEL",
        help="labels of cells to leave out, also as patterns, besides those that mean that the perturbation "
             "is not known (unassigned, doublet, nan, over ten guides, ...); without a value, keep these")
    add("--separator", default="+", metavar="TEXT", help="what separates targets (default: +)")
    add("--target-regex", type=regex_of_targets, metavar="REGEX",
        help="finds the targets in a label, or in each of its parts: its groups are the targets, as in "
             "'(.+)_g[0-9]+' for KLF1_g2")
    add("--min-cells", type=int, default=0, metavar="N", help="leave out smaller conditions (default: 0)")

    group = parser.add_argument_group("expression")
    expression_options(group)
    add = group.add_argument
    add("--n-genes", type=shared.positive, metavar="N",
        help="keep the N most variable genes (scanpy's seurat flavour) and the targets (default: all)")

    add = parser.add_argument_group("split and vocabulary").add_argument
    add("--split", default="simulation", metavar="simulation|none|FILE.json",
        help='the paper\'s split; none, to train on everything; or {"train": [label, ...], "val": [...], '
             '"test": [...]} (default: simulation)')
    add("--split-seed", type=shared.seed, default=1, metavar="N",
        help="seed of the simulation split (default: 1, the paper's)")
    add("--vocab", metavar="FILE|none",
        help="vocabulary that numbers the genes (default: scGPT's, fetched to data/human/scgpt/; none: the "
             "dataset's own genes, to train without pretrained weights; the demo: none)")
    args = parser.parse_args()
    check_arguments(args)
    return args


def expression_options(parser):
    """Add the options that say how to read the expression of an AnnData file."""
    parser.add_argument("--gene-key", metavar="COLUMN",
                        help="var column with symbols, or index (default: gene_name, else the index)")
    parser.add_argument("--upper-case", action="store_true",
                        help="write symbols in capitals: mouse genes become human ones")
    parser.add_argument("--layer", metavar="NAME", help="read this layer, or raw, instead of X")
    parser.add_argument("--normalize", action="store_true",
                        help="values are counts: scale to the median total, then log1p")


def regex_of_targets(text):
    """A regular expression on the command line that finds targets (the type of an argparse option)."""
    with contextlib.suppress(re.error):
        if re.compile(text).groups:
            return text
    raise argparse.ArgumentTypeError(f"{text!r}: expected a regular expression with the target in "
                                     "parentheses, as '(.+)_g[0-9]+'")


def check_arguments(args):
    """End the run for impossible options."""
    if shared.space_of(args.dataset) == "demo":
        args.vocab, args.normalize = "none", True
        if args.h5ad:
            sys.exit("error: --h5ad needs a name of its own: --dataset NAME")
    elif not args.h5ad and args.dataset not in shared.HOSTED:
        known = ", ".join(shared.HOSTED)
        sys.exit(f"error: unknown dataset {args.dataset!r}: demo, {known}, or your own with --h5ad FILE")
    for path in (args.h5ad, args.vocab, args.split):
        if path not in (None, "none", "simulation") and not Path(path).exists():
            sys.exit(f"error: {path} does not exist")
    if args.h5ad and args.h5ad.is_dir():
        sys.exit(f"error: {args.h5ad}: a folder (zarr?), {HOW_TO_CONVERT}")
    if not args.separator:
        sys.exit("error: --separator '': expected what separates targets, as + or _")


def read_vocab(path):
    """A scGPT vocab.json, {symbol: row}."""
    vocab = shared.read_json(path, int)
    if sorted(vocab.values()) != list(range(len(vocab))) or "<pad>" not in vocab:
        sys.exit(f'error: {path}: expected {{"SYMBOL": row, ...}} with rows from 0 on and a "<pad>"')
    return vocab


def dataset_made_from(args, source, vocab_path):
    """`made_from` of dataset.h5: the options and files that decide it."""
    others = ("dataset", "root", "force", "h5ad", "vocab")
    options = {name: value for name, value in vars(args).items() if name not in others}
    files = {"cells": source, "vocabulary": vocab_path}
    if args.split not in ("simulation", "none"):
        options["split"], files["split"] = "file", Path(args.split)
    return shared.made_from(options, {name: shared.fingerprint(file) for name, file in files.items() if file})


def next_command(args):
    """The command that trains on the dataset: its default variants need vectors of go_all."""
    words = ["--no-pretrained"] if args.vocab == "none" and args.dataset != "demo" else []
    embeddings = args.root / "data" / shared.space_of(args.dataset) / "embeddings"
    sources = sorted({file.name.split(".")[0] for file in embeddings.glob("*.*.*.h5")})
    if sources and "go_all" not in sources:
        words += ["--variant", "scgpt", f"scgenept_{sources[0]}"]
    return shared.command("04_train.py", args, *words)


def main():
    args = parse_arguments()
    folder = args.root / "data" / args.dataset
    path = folder / "dataset.h5"
    folder.mkdir(parents=True, exist_ok=True)
    source, sha256 = args.h5ad, None
    if args.dataset == "demo":
        print("SYNTHETIC cells: a simulated screen to try the kit with, which says nothing about biology")
        source = folder / "cells.h5ad"
        if not source.exists():
            simulate_demo(source)
    elif not source:
        source = shared.download(path=folder / f"{args.dataset}.zip", **shared.HOSTED[args.dataset])
        sha256 = KNOWN_SHA256.get(args.dataset)
    vocab_path, vocab, vocab_name = None, None, "own genes"
    if args.vocab != "none":
        vocab_path = args.vocab or args.root / "data" / "human" / "scgpt" / "vocab.json"
        vocab = read_vocab(shared.download(shared.VOCAB, vocab_path))
        vocab_name = shared.fingerprint(vocab_path)
    made = dataset_made_from(args, source, vocab_path)
    if shared.is_current(path, made, args.force):
        print(f"next: {next_command(args)}")
        return

    with open_cells(source, folder, sha256) as h5ad:
        data = open_h5ad(h5ad, args, vocab)
        number_genes(data, vocab)
        data.split, data.subgroup = make_split(data.targets_of, data.rules, args)
        attributes = {"dataset": args.dataset, "synthetic": args.dataset == "demo", "vocab": vocab_name,
                      "n_tokens": data.n_tokens, "pad_id": data.pad_id}
        write_dataset(path, made, attributes, data)
    print_summary(data, vocab, args)
    print(f"wrote {path}\nnext: {next_command(args)}")


if __name__ == "__main__":
    shared.run(main)
