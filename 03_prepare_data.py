"""Stage 03: cells, split, differential expression -> data/<dataset>/dataset.h5

    python 03_prepare_data.py                                   the demo: a simulated Perturb-seq screen, no internet
    python 03_prepare_data.py --dataset norman                  GEARS' file, downloaded to data/norman/ (169 MB)
    python 03_prepare_data.py --dataset mine --h5ad mine.h5ad --condition-key perturbation --control 'NT-*'
    python 03_prepare_data.py --dataset mine --h5ad mine.h5ad --normalize --n-genes 5000 --min-cells 20      raw counts
    python 03_prepare_data.py --dataset mine --h5ad mine.h5ad --layer counts --normalize      raw counts in a layer
    python 03_prepare_data.py --dataset mine --h5ad mine.h5ad --separator _ --target-regex '(.+)g[0-9]+'
                                                                KLF1g2_MAP2K6g1: guides of one gene become one target
    python 03_prepare_data.py --dataset mine --h5ad mine.h5ad --split split.json
                                                                {"train": [label, ...], "val": [...], "test": [...]}
    python 03_prepare_data.py --dataset mine --h5ad mine.h5ad --vocab none      for stage 04 --no-pretrained

Reads any AnnData file (X dense, CSR or CSC; also gzipped, or in a zip such as GEARS'). A condition is what one label of
the cells stands for: the control (`ctrl`), one target (`KLF1+ctrl`) or several (`KLF1+MAP2K6`). X has to be
log-normalized expression, or raw counts with --normalize. A target that the data does not measure joins as a gene with
expression 0, so that it can be flagged as perturbed; it never counts in a loss or a metric.
"""
import argparse
import difflib
import fnmatch
import gzip
import importlib
import re
import shlex
import shutil
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
from scipy import sparse
from tqdm import tqdm

shared = importlib.import_module("01_fetch_annotations")
shown = shared.shown

DATAVERSE = "https://dataverse.harvard.edu/api/access/datafile/"
DATASETS = {  # GEARS' hosted data: address, and where known the bytes of the zip and the SHA-256 of the h5ad in it
    "norman": (DATAVERSE + "6154020", 168_758_985, "23ffb0fac6a847ff927cf7509d80d85052bfefbfb97610786a2dafaaefa0b6a0"),
    "adamson": (DATAVERSE + "6154417", None, None),
    "dixit": (DATAVERSE + "6154416", None, None),
    "replogle_k562_essential": (DATAVERSE + "7458695", None, None),
    "replogle_rpe1_essential": (DATAVERSE + "7458694", None, None),
}
CONTROL = "ctrl"   # what control cells are called from here on, whatever the source calls them
N_TOP = 20         # differentially expressed genes that the metrics look at
MOST_TARGETS = 10  # of one condition; a label of more parts is no perturbation but a list
BLOCK = 2**23      # values of X in memory at a time while it is read
USUAL_LOG, LARGEST_LOG = 15, 50  # log-normalized expression stays below the first; nothing logarithmic reaches the second

# Labels of other screens' control cells (whole names, in capitals or not), and of cells whose perturbation is not known
LOOKS_LIKE_CONTROL = re.compile(
    r"(sg|g)?(ctrl|control|ntc?|neg[ ._-]?(ctrl|control)?|negative[ ._-]?(ctrl|control)|(non|no)[ ._-]?target(ing)?"
    r"|safe[ ._-]?(target(ing)?|harbou?r)|intergenic|scrambled?|aavs1|unperturbed|untreated|mock)"
    r"([ ._-]?(ctrl|control|guide|sgrna|grna|cells?)s?)?([ ._-]?[a-z]?\d+)*", re.IGNORECASE)
MEANS_UNKNOWN = re.compile(
    r"|\*|nan?|n/a|none|null|unassigned|unknown|undetermined|unmapped|multiplets?|doublets?|multiple|ambiguous|negative",
    re.IGNORECASE)


# ---------------------------------------------------------------------------------------------------------------------
# Conditions: what the labels of the cells stand for

def is_named(name, patterns):
    """Whether a label, or a part of one, is among these names and shell patterns (`NT-*`)."""
    return any(name == pattern or fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def parse_condition(label, rules):
    """The targets that a label stands for, in its order: `A+B` -> [A, B], `A+ctrl` -> [A], the control -> [].

    rules: control (list of names and patterns), separator, target_regex (or None), genes (set), upper_case (bool).
    A separator within the name of a gene does not separate: with `-`, `HLA-A-KLF1` is HLA-A and KLF1. The regular
    expression is tried on the whole label first, then on its parts; its groups are the targets.
    Raises ValueError, saying what is wrong with the label.
    """
    label = label.strip()
    names = [label] if is_named(label, rules.control) else split_label(label, rules)
    if not all(names):
        raise ValueError(f"a part between {rules.separator!r} is empty")
    targets = [name for name in names if name != CONTROL and not is_named(name, rules.control)]
    if rules.upper_case:
        targets = [target.upper() for target in targets]
    if rules.target_regex:  # two guides of one gene are one target
        targets = list(dict.fromkeys(targets))
    if len(targets) > MOST_TARGETS:
        raise ValueError(f"{len(targets)} targets; leave such cells out with --drop")
    if len(set(targets)) < len(targets):
        raise ValueError("a target stands twice")
    return targets


def split_label(label, rules):
    """The names in a label: what the regular expression finds in all of it, or its parts."""
    if rules.target_regex:
        match = re.fullmatch(rules.target_regex, label)
        groups = [group.strip() for group in match.groups() if group] if match else []
        if groups and not any(rules.separator in group for group in groups):
            return groups

    def name_of(part):
        match = re.fullmatch(rules.target_regex, part) if rules.target_regex else None
        return next(filter(None, match.groups()), "") if match else part

    pieces = [piece.strip() for piece in label.split(rules.separator)]
    if len(pieces) > 10 * MOST_TARGETS:
        raise ValueError(f"{len(pieces)} parts; leave such cells out with --drop")
    names = []
    while pieces:  # take the most pieces that make a known name, or else one
        for n in range(len(pieces), 0, -1):
            name = name_of(rules.separator.join(pieces[:n]))
            if name in rules.genes or name == CONTROL or is_named(name, rules.control):
                break
        names.append(name)
        del pieces[:n]
    return names


def condition_name(label, targets):
    """The name of a condition: the label itself where it is in GEARS' form (`ctrl`, `A+ctrl`, `ctrl+A`, `A+B`), which keeps
    the paper's labels as they are; else `ctrl`, `A+ctrl`, or the targets in alphabetical order, joined by +."""
    parts = label.strip().split("+")
    padding = [CONTROL] if len(targets) < 2 else []
    if sorted(parts) == sorted(targets + padding):
        return label.strip()
    return "+".join(sorted(targets) + padding)


def read_labels(labels, n_cells, rules, drop, source):
    """What each distinct label stands for: {label: targets}, without those that mean that nothing is known.

    n_cells: {label: number of cells}; drop: names and patterns of --drop, None without the option. Ends the run with all
    the labels that cannot be read.
    """
    targets_of, problems, dropped = {}, [], []
    for label in labels:
        is_unknown = MEANS_UNKNOWN.fullmatch(label.strip()) and not is_named(label, rules.control) and drop != []
        if is_unknown or is_named(label, drop or []):
            dropped.append(f"{label} ({n_cells[label]:,})")
            continue
        try:
            targets_of[label] = parse_condition(label, rules)
        except ValueError as error:
            problems.append(f"{label[:60]!r} ({error})")
    if dropped:
        print(f"left out, with their numbers of cells: {shown(dropped, 20)}"
              + ("" if drop else " (--drop without a name keeps them)"))
    if problems:
        sys.exit(f"error: {source}: {len(problems):,} of {len(labels):,} labels are no condition: {shown(problems, 10)}; "
                 "see --control, --drop, --separator, --target-regex")

    names = dict.fromkeys(target for targets in targets_of.values() for target in targets)
    controls = [name for name in names if name not in rules.genes and LOOKS_LIKE_CONTROL.fullmatch(name)]
    if controls:
        named = [name for name in rules.control if name != CONTROL] + controls
        sys.exit(f"error: {source}: {shown(controls)} look like controls; name all controls (--control "
                 f"{shlex.join(named[:8])}; patterns such as 'NT*' will do), or leave those out with --drop")
    return targets_of


def choose_conditions(labels, label_of_cell, genes, args, source):
    """Conditions (P,), each cell's condition (cells,; -1: left out), and {condition: targets}.

    labels (L,): the distinct labels of the source; label_of_cell (cells,): each cell's label, -1 where it is missing.
    """
    if (label_of_cell < 0).any():
        print(f"{(label_of_cell < 0).sum():,} of {len(label_of_cell):,} cells have no {args.condition_key}: left out")
    counts = np.bincount(label_of_cell[label_of_cell >= 0], minlength=len(labels))
    n_cells = {label: n for label, n in zip(labels, counts) if n}  # a label without cells does not exist
    rules = make_rules(args, genes)
    targets_of_label = read_labels(list(n_cells), n_cells, rules, args.drop, source)
    print_how_read(targets_of_label, rules, source)

    # Labels of the same condition become one
    condition_of = {label: condition_name(label, targets) for label, targets in targets_of_label.items()}
    targets_of, n_of = {}, {}
    for label, condition in condition_of.items():
        targets_of.setdefault(condition, targets_of_label[label])
        n_of[condition] = n_of.get(condition, 0) + n_cells[label]
    print_merged(condition_of)

    if CONTROL not in targets_of:
        most = sorted(n_cells, key=lambda label: -n_cells[label])
        sys.exit(f"error: {source}: no control cells ({', '.join(args.control)}); name their label with --control "
                 f"(the labels with most cells are {shown(most, 5)})")
    few = [condition for condition in targets_of if n_of[condition] < args.min_cells]
    if CONTROL in few:
        sys.exit(f"error: {source}: {n_of[CONTROL]:,} control cells, fewer than --min-cells {args.min_cells}")
    if few:
        numbers = [f"{condition} ({n_of[condition]:,})" for condition in few]
        print(f"--min-cells {args.min_cells}: {len(few):,} conditions left out (their cells): {shown(numbers, 20)}")

    conditions = [condition for condition in targets_of if condition not in few]
    row = {condition: i for i, condition in enumerate(conditions)}
    row_of_label = [row.get(condition_of.get(label), -1) for label in labels] + [-1]  # the last: no label
    cell_condition = np.array(row_of_label)[label_of_cell]
    return np.array(conditions, dtype=object), cell_condition, {condition: targets_of[condition] for condition in conditions}


def make_rules(args, genes):
    """How the labels of a dataset are read: see parse_condition."""
    return SimpleNamespace(control=args.control, separator=args.separator, target_regex=args.target_regex,
                           upper_case=args.upper_case, genes=set(genes))


def print_how_read(targets_of_label, rules, source):
    """Say what the user may not expect of the way in which labels were read. Ends the run if the regex never matches."""
    if CONTROL not in rules.control:
        n_padded = sum(CONTROL in label.split(rules.separator) for label in targets_of_label)
        if n_padded:
            print(f"{n_padded:,} labels have {CONTROL!r} in them: it counts as control, too")
    if rules.target_regex:
        parts = [part for label in targets_of_label for part in (label, *label.split(rules.separator))]
        if not any(re.fullmatch(rules.target_regex, part) for part in parts):
            sys.exit(f"error: --target-regex {rules.target_regex!r} matches no label of {source}, "
                     f"such as {shown(list(targets_of_label), 3)}")


def print_merged(condition_of):
    """Say which labels stand for the same condition. condition_of: {label: condition}."""
    labels_of = {}
    for label, condition in condition_of.items():
        labels_of.setdefault(condition, []).append(label)
    examples = [f"{shown(labels, 3)} to {condition}" for condition, labels in labels_of.items() if len(labels) > 1]
    if examples:
        print(f"{len(condition_of):,} labels make {len(labels_of):,} conditions: {'; '.join(examples[:5])}"
              + ("; ..." if len(examples) > 5 else ""))


# ---------------------------------------------------------------------------------------------------------------------
# The split

def simulation_split(targets_of, seed, train_share=0.75, train_share_of_seen_pairs=0.75):
    """One round of GEARS' simulation split: {label: [target, ...]} of perturbed conditions -> (train, subgroup).

    `train` lists the training labels; `subgroup` says for every other label why it is held out: unseen_single, or
    combo_seen<k> with k of its targets among the training genes. Legacy NumPy generator, as in the paper's runs.
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

    # Of the pairs whose targets are all seen, some are held out; A+B and B+A stay on the same side
    labels_of = {}
    for label in sorted(seen_pairs):
        labels_of.setdefault(frozenset(targets_of[label]), []).append(label)
    first_labels = [labels[0] for labels in labels_of.values()]
    rng = np.random.RandomState(seed)
    n_kept = int(len(first_labels) * train_share_of_seen_pairs)
    kept = set(rng.choice(first_labels, n_kept, replace=False)) if first_labels else set()
    for targets, labels in labels_of.items():
        if labels[0] in kept:
            train += labels
        else:
            subgroup |= dict.fromkeys(labels, f"combo_seen{len(targets)}")
    return train, subgroup


def split_conditions(targets_of, seed):
    """The paper's split: {label: targets} -> ({label: train | val | test}, {label: subgroup}).

    The training labels of a first round at 75% go through a second one at 90%, and what falls out of that is validation
    (scGenePT; GEARS' `simulation`).
    """
    train_and_val, subgroup = simulation_split(targets_of, seed)
    train, subgroup_of_val = simulation_split({label: targets_of[label] for label in train_and_val}, seed, 0.9, 0.9)
    split = dict.fromkeys(subgroup, "test") | dict.fromkeys(subgroup_of_val, "val") | dict.fromkeys(train, "train")
    return split, subgroup | subgroup_of_val


def split_from_json(path, targets_of, rules):
    """A split of the user's from a JSON file {"train": [label, ...], "val": [...], "test": [...]}, as split_conditions.

    Labels may be those of the dataset or of the source; every perturbed condition has to stand in it once.
    """
    lists = shared.read_json(path, list)
    if set(lists) != {"train", "val", "test"}:
        sys.exit(f'error: {path}: expected {{"train": [label, ...], "val": [...], "test": [...]}}')
    split, problems = {}, []
    for part, labels in lists.items():
        for label in labels:
            condition = find_condition(label, targets_of, rules)
            if condition is None:
                near = difflib.get_close_matches(str(label), targets_of, 2)
                problems.append(f"{label!r} is no perturbed condition of the data"
                                + (f" (did you mean {' or '.join(near)}?)" if near else ""))
            elif condition in split:
                problems.append(f"{label!r} stands twice")
            else:
                split[condition] = part
    problems += [f"{condition!r} of the data is missing" for condition in targets_of if condition not in split]
    if problems:
        sys.exit(f"error: {path}: {len(problems):,} problems: {shown(problems, 10)}")

    train_genes = {gene for condition, part in split.items() if part == "train" for gene in targets_of[condition]}
    subgroup = {}
    for condition, part in split.items():
        targets = targets_of[condition]
        n_seen = sum(gene in train_genes for gene in targets)
        if part != "train" and len(targets) > 1:
            subgroup[condition] = f"combo_seen{n_seen}"
        elif part != "train" and not n_seen:
            subgroup[condition] = "unseen_single"
    return split, subgroup


def find_condition(label, conditions, rules):
    """The condition that a user's label means, or None: its own name, or the same targets in another form."""
    if label in conditions:
        return label
    try:
        name = condition_name(label, parse_condition(label, rules))
    except (ValueError, AttributeError):  # no condition, or no text
        return None
    reverse = "+".join(reversed(name.split("+")))
    return next((condition for condition in (name, reverse) if condition in conditions), None)


def make_split(targets_of, args, rules):
    """{condition: train | val | test | ctrl} and {condition: subgroup}, as --split says."""
    perturbed = {condition: targets for condition, targets in targets_of.items() if targets}
    if args.split == "none":
        if not perturbed:
            sys.exit("error: no perturbed cells: nothing to train on")
        return dict.fromkeys(perturbed, "train") | {CONTROL: "ctrl"}, {}
    if args.split == "simulation":
        split, subgroup = split_conditions(perturbed, args.split_seed)
    else:
        split, subgroup = split_from_json(args.split, perturbed, rules)
    for part in ("train", "val", "test"):
        if part not in split.values():
            sys.exit(f"error: the split leaves no condition for {part}: {len(perturbed)} perturbations are too few for it "
                     "(it takes about a dozen); --split FILE.json gives your own, --split none trains on all of them")
    return split | {CONTROL: "ctrl"}, subgroup


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


def normalize(X, scale):
    """log1p of counts times the factor of their cell, scale (cells,): CSR or CSC -> float32."""
    X = X.astype(np.float32)
    factors = np.repeat(scale, np.diff(X.indptr)) if X.format == "csr" else scale[X.indices]
    X.data = np.log1p(X.data * factors).astype(np.float32)
    return X


def most_variable(mean, variance, n):
    """Which genes are the n most variable, (G,) bool, by their mean and variance (G,) before the logarithm.

    Seurat's normalized dispersion (Satija et al. 2015), the genes of scanpy's highly_variable_genes(flavor="seurat"): the
    z-score of log(variance / mean) among the genes of about the same log mean (20 bins of equal width). A gene alone in
    its bin counts as 1; one that never varies is never chosen; genes that tie with the last one are all chosen.
    """
    mean = np.where(mean == 0, 1e-12, mean)
    with np.errstate(divide="ignore", invalid="ignore"):
        dispersion = np.log(np.where(variance > 0, variance / mean, np.nan))
    log_mean = np.log1p(mean)
    edges = np.linspace(log_mean.min(), log_mean.max(), 21)[1:-1]
    bin_of = np.searchsorted(edges, log_mean)  # a gene on an edge belongs to the bin below
    score = np.full(len(mean), np.nan)
    for b in range(20):
        genes = np.flatnonzero((bin_of == b) & np.isfinite(dispersion))
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

    Every gene takes part in one or two of eight processes (stage 01 writes texts that say so). Perturbing a gene changes
    the activity of the other processes through a random signed matrix, and thereby the genes that take part in them. The
    matrix is centred by rows and columns: no response is shared by all perturbations, so that a mean predicts nothing.
    """
    genes, takes_part = shared.demo_genes()
    rng = np.random.default_rng(1)
    share = takes_part / takes_part.sum(1, keepdims=True)  # (G, processes)
    n_processes = share.shape[1]
    effect = rng.choice([-1.0, 1.0], (n_processes, n_processes)) * rng.uniform(0.5, 1.5, (n_processes, n_processes))
    effect -= effect.mean(0)
    effect -= effect.mean(1, keepdims=True)
    targets = rng.choice(len(genes), 96, replace=False)
    pairs = [rng.choice(targets, 2, replace=False) for _ in range(40)]
    conditions = [(CONTROL, [], 300)]
    conditions += [(f"{genes[t]}+{CONTROL}", [t], 24) for t in targets]
    conditions += [(f"{genes[a]}+{genes[b]}", [a, b], 24) for a, b in pairs]

    baseline = rng.normal(1.0, 0.7, len(genes))
    counts, labels = [], []
    for label, perturbed, n_cells in conditions:
        activity = rng.normal(0, 0.15, (n_cells, n_processes))  # cells differ without any perturbation
        for target in perturbed:
            activity = activity + effect @ share[target]
        depth = rng.normal(0, 0.2, (n_cells, 1))
        log_mean = baseline + activity @ share.T + depth
        log_mean[:, perturbed] -= 1.5  # knocked down
        counts.append(rng.poisson(np.exp(log_mean)))
        labels += [label] * n_cells
    X = sparse.csr_matrix(np.concatenate(counts).astype(np.float32))
    totals = cell_totals(X)
    return normalize(X, np.median(totals) / totals), genes, labels


# ---------------------------------------------------------------------------------------------------------------------
# AnnData files: reading

def open_cells(path, folder, sha256=None):
    """The path of an h5ad file: `path` itself, or what a .gz or a zip holds, unpacked to `folder` for as long as needed.

    Ends the run where the unpacked file does not have this SHA-256, or `path` is a file of another kind.
    """
    if path.is_dir():
        sys.exit(f"error: {path}: a folder (zarr?), {HOW_TO_CONVERT}")
    if h5py.is_hdf5(path):
        return path
    unpacked = folder / ".unpacked.h5ad"
    try:
        with open_packed(path) as source, open(unpacked, "wb") as file:
            print(f"unpacking {path}")
            shutil.copyfileobj(source, file, 2**22)
    except (zipfile.BadZipFile, gzip.BadGzipFile, EOFError, zlib.error) as error:
        sys.exit(f"error: {path}: damaged ({error}); get it again from its source")
    if sha256 and shared.checksum(unpacked) != sha256:
        sys.exit(f"error: {path}: the cells in it are not those expected (SHA-256); delete it and run again")
    if not h5py.is_hdf5(unpacked):
        sys.exit(f"error: {path}: {kind_of(unpacked)} in it, {HOW_TO_CONVERT}")
    return unpacked


HOW_TO_CONVERT = "not an AnnData file (h5ad); read it with anndata or scanpy and save it with write_h5ad"


def open_packed(path):
    """The h5ad inside a .gz or a zip, open for reading. Ends the run where there is none."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    if is_gzip and not path.name.endswith((".tar.gz", ".tgz")):
        return gzip.open(path)
    if not zipfile.is_zipfile(path) or is_gzip:
        sys.exit(f"error: {path}: {kind_of(path)}, {HOW_TO_CONVERT}")
    archive = zipfile.ZipFile(path)
    members = [m for m in archive.infolist() if m.filename.endswith(".h5ad") and not m.filename.startswith("__MACOSX/")]
    if len(members) != 1:
        sys.exit(f"error: {path}: {len(members)} .h5ad files in it, expected one")
    return archive.open(members[0])


def kind_of(path):
    """What a file that is no HDF5 file is, in words."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head:
        return "an empty file"
    if head[:2] == b"\x1f\x8b" or tarfile.is_tarfile(path):
        return "a tar archive or gzipped file"
    if head[:2] == b"PK":
        return "a zip archive"
    if head[:1] == b"\x80":
        return "a Python pickle"
    if shared.is_html(head):
        return "a web page"
    return "a binary file" if b"\0" in head else "a text file (csv, tsv or mtx)"


def check_is_anndata(file, path):
    """End the run where an HDF5 file is no AnnData file, with what it is."""
    if isinstance(file.get("obs"), h5py.Group) and isinstance(file.get("var"), h5py.Group):
        return
    kinds = {"mod": "a MuData file (h5mu)", "matrix": "10x Genomics' h5 or a loom file", "row_attrs": "a loom file",
             "obs": "written by anndata before 0.7"}
    kind = next((words for key, words in kinds.items() if key in file), f"an HDF5 file with {shown(list(file)) or 'nothing'}")
    sys.exit(f"error: {path}: {kind}, {HOW_TO_CONVERT}")


def read_text(item):
    """A dataset of an AnnData table as text (n,); numbers as they print."""
    if h5py.check_string_dtype(item.dtype):
        return item.asstr()[:]
    distinct, of_value = np.unique(item[:], return_inverse=True)  # few are different
    return distinct.astype(str).astype(object)[of_value]


def read_column(table, name, path):
    """A column of an AnnData table (obs or var) as (values, codes): `values[codes]` is the column, code -1 is missing.

    Knows plain columns, nullable ones (values and a mask), and categories: as written today (a group of categories and
    codes), and before 2022 (codes, and a reference to the categories).
    """
    if name not in table:
        columns = sorted(column for column in table if not column.startswith("_"))
        sys.exit(f"error: {path}: {table.name.strip('/')} has no column {name!r}; it has {shown(columns, 50) or 'none'}")
    column = table[name]
    if "categories" in column.attrs:
        return read_text(table.file[column.attrs["categories"]]), column[:].astype(np.int64)
    if isinstance(column, h5py.Group) and "codes" in column:
        return read_text(column["categories"]), column["codes"][:].astype(np.int64)
    if isinstance(column, h5py.Group):
        values, is_missing = read_text(column["values"]), column["mask"][:]
    else:
        values = read_text(column)
        is_missing = (values == "nan") & (column.dtype.kind == "f")
    codes = np.full(len(values), -1)
    values, codes[~is_missing] = np.unique(values[~is_missing], return_inverse=True)
    return values, codes


def find_matrix(file, layer, path):
    """The expression matrix of an AnnData file that --layer names (None: X), and the table of its genes."""
    place = {None: "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")
    if place not in file:
        layers = [name for name in file.get("layers", ())] + (["raw"] if "raw/X" in file else [])
        sys.exit(f"error: {path}: no {place} in it; --layer takes one of: {shown(layers) or 'none are there'}")
    return file[place], file["raw/var" if layer == "raw" else "var"]


def read_genes(var, gene_key, path):
    """Symbols (G,) and ids (G,) of the genes in an AnnData file's table of genes."""
    index = var.attrs.get("_index", "index")
    if gene_key is None:
        gene_key = "gene_name" if "gene_name" in var else index
    elif gene_key == "index" and "index" not in var:
        gene_key = index
    (symbols, codes), (ids, id_codes) = read_column(var, gene_key, path), read_column(var, index, path)
    if (codes < 0).any():
        sys.exit(f"error: {path}: genes without a name in var/{gene_key}; name another column with --gene-key")
    return symbols[codes], ids[id_codes]


def warn_of_ensembl_ids(genes, var, path, vocab):
    """Say so if genes go by Ensembl ids; end the run for it unless the vocabulary is the dataset's own genes."""
    n_ids = sum(re.match(r"ENS[A-Z]*G\d{11}", gene) is not None for gene in genes)
    if n_ids > len(genes) / 2:
        columns = sorted(name for name in var if not name.startswith("_"))
        message = (f"{path}: the genes are Ensembl ids ({genes[0]}), but vocabulary and texts go by symbols; name the "
                   f"column of symbols with --gene-key (there are: {shown(columns, 20)})")
        if vocab != "none":
            sys.exit(f"error: {message}")
        print(f"warning: {message}")


def sparse_parts(X, path, n_cells, n_genes):
    """Kind (csr_matrix or csc_matrix), data, indices and indptr of a sparse matrix in an AnnData file."""
    kind = X.attrs.get("encoding-type", X.attrs.get("h5sparse_format"))
    kind = {"csr": "csr_matrix", "csc": "csc_matrix"}.get(kind, kind)
    if kind not in ("csr_matrix", "csc_matrix"):
        sys.exit(f"error: {path}: {X.name} is neither a dense, a CSR nor a CSC matrix ({kind})")
    data, indices, indptr = X["data"], X["indices"], X["indptr"][:].astype(np.int64)
    n_rows = n_cells if kind == "csr_matrix" else n_genes
    if len(indptr) != n_rows + 1 or not len(data) == len(indices) == indptr[-1] or (np.diff(indptr) < 0).any():
        sys.exit(f"error: {path}: {X.name} is damaged, or not of {n_cells:,} cells and {n_genes:,} genes")
    return kind, data, indices, indptr


def read_blocks(X, path, n_cells, n_genes):
    """Yield the matrix X (cells, genes) of an AnnData file piece by piece: (cells, genes, float32 matrix), `cells` and
    `genes` slices that say which part of X it is. Dense and CSR data comes by cells and as CSR, CSC data by genes and as
    CSC."""
    if isinstance(X, h5py.Dataset):
        if X.shape != (n_cells, n_genes):
            sys.exit(f"error: {path}: {X.name} is {shown(X.shape)}, but there are {n_cells} cells and {n_genes} genes")
        step = max(1, BLOCK // n_genes)
        if X.chunks:  # whole chunks, or each is unpacked again and again
            step = -(-step // X.chunks[0]) * X.chunks[0]
        for start in tqdm(range(0, n_cells, step), "reading cells", unit=" blocks", leave=False, disable=None):
            cells = slice(start, min(start + step, n_cells))
            yield cells, slice(None), sparse.csr_matrix(X[cells].astype(np.float32, copy=False))
        return

    kind, data, indices, indptr = sparse_parts(X, path, n_cells, n_genes)
    by_cells = kind == "csr_matrix"
    n_rows, n_columns = (n_cells, n_genes) if by_cells else (n_genes, n_cells)
    bounds = [0]  # first row of each block
    while bounds[-1] < n_rows:
        last = np.searchsorted(indptr, indptr[bounds[-1]] + BLOCK, "right") - 1
        bounds.append(max(bounds[-1] + 1, int(last)))
    pairs = list(zip(bounds, bounds[1:]))
    for start, stop in tqdm(pairs, "reading cells", unit=" blocks", leave=False, disable=None):
        part = slice(indptr[start], indptr[stop])
        columns = indices[part].astype(np.int32, copy=False)
        if len(columns) and not 0 <= columns.min() <= columns.max() < n_columns:
            sys.exit(f"error: {path}: {X.name} is damaged: an index beyond its {n_columns:,} columns")
        pieces = data[part].astype(np.float32, copy=False), columns, (indptr[start:stop + 1] - indptr[start])
        rows = slice(start, stop)
        if by_cells:
            block = sparse.csr_matrix(pieces, shape=(stop - start, n_columns))
        else:
            block = sparse.csc_matrix(pieces, shape=(n_columns, stop - start))
        block.sum_duplicates()
        yield (rows, slice(None), block) if by_cells else (slice(None), rows, block)


def scan_expression(blocks, n_cells, args, source):
    """Each cell's total (cells,), and whether the values are counts, which --normalize turns into logarithms.

    blocks() yields the matrix as read_blocks does. Ends the run for values that are neither logarithms nor counts.
    """
    totals, is_counts, largest, smallest = np.zeros(n_cells), True, 0, 0
    for cells, _, X in blocks():
        if not np.isfinite(X.data).all():
            sys.exit(f"error: {source}: NaN or infinite values in the expression matrix")
        smallest = min(smallest, X.data.min(initial=0))
        largest = max(largest, X.data.max(initial=0))
        is_counts = is_counts and (X.data == np.round(X.data)).all()
        totals[cells] += cell_totals(X)
    is_counts = is_counts and largest > 0
    other = "; other matrices of the file are chosen with --layer NAME, or --layer raw"
    if smallest < 0:
        sys.exit(f"error: {source}: negative values, as in scaled data; expected log-normalized expression{other}")
    if is_counts and not args.normalize:
        sys.exit(f"error: {source}: raw counts; add --normalize to scale and log-transform them{other}")
    if not is_counts and largest > LARGEST_LOG:
        sys.exit(f"error: {source}: values up to {largest:,.0f} are neither logarithms nor counts; log-transform them "
                 f"(log1p){other}")
    if args.normalize and not is_counts:
        print("the values are no counts: taken as normalized already, --normalize left them alone")
    if not is_counts:
        warn_of_values(largest, totals, source)
    return totals, is_counts


def warn_of_values(largest, totals, source):
    """Print a warning for values that look normalized, but not log-transformed."""
    filled = totals[totals > 0]
    if largest > USUAL_LOG:
        print(f"warning: {source}: values up to {largest:.1f}: are these logarithms? Those of expression stay below 15",
              file=sys.stderr)
    elif len(filled) > 1 and np.ptp(filled) < 1e-3 * filled.mean():
        print(f"warning: {source}: all cells have the same sum ({filled.mean():,.0f}): normalized, but not log-transformed?",
              file=sys.stderr)


def read_expression(blocks, kept, scale, is_target, n_genes_kept):
    """Expression of the kept cells and the chosen genes as CSR float32, and which genes are chosen, bool (G,).

    blocks() yields X in pieces (as read_blocks), kept (cells,) and is_target (G,) are bool; scale (cells,) normalizes
    counts, None leaves values as they are. X is read once or twice, so that memory holds only what is kept.
    """
    def kept_blocks():
        for cells, genes, X in blocks():
            X = normalize(X, scale[cells]) if scale is not None else X
            yield genes, X if kept.all() else X[kept[cells]]

    chosen = np.ones(len(is_target), dtype=bool)
    if n_genes_kept:
        sums = np.zeros((2, len(is_target)))  # of the values without logarithm, and of their squares
        for genes, X in kept_blocks():
            X = np.expm1(X).astype(np.float64)
            sums[:, genes] += [np.asarray(values.sum(axis=0)).ravel() for values in (X, X.power(2))]
        n, mean = kept.sum(), sums[0] / kept.sum()
        variable = most_variable(mean, (sums[1] - n * mean ** 2) / max(n - 1, 1), n_genes_kept)
        chosen = variable | is_target
        print(f"--n-genes {n_genes_kept}: kept the {variable.sum():,} most variable of {len(chosen):,} genes and "
              f"{(chosen & ~variable).sum():,} more that are targets")
    parts = [X if chosen.all() else X[:, chosen[genes]] for genes, X in kept_blocks()]
    if parts[0].format == "csr":
        return sparse.vstack(parts, format="csr"), chosen
    X = sparse.hstack(parts, format="csc")
    del parts  # before X is in memory a second time
    return X.tocsr(), chosen


def read_rankings(file, path, conditions, label_of_cell, gene_ids):
    """The file's own rankings of differentially expressed genes (GEARS' layout) as the first 20 rows of gene_ids (P, 20),
    -1 for control; None unless it ranks the genes of every condition. label_of_cell (cells,): each cell's condition."""
    rankings = file.get("uns/rank_genes_groups_cov_all")
    if rankings is None or "condition_name" not in file["obs"]:
        return None
    names, codes = read_column(file["obs"], "condition_name", path)
    if (codes < 0).any():
        return None
    name_of = dict(zip(label_of_cell, names[codes]))
    row_of = {gene_id: i for i, gene_id in enumerate(gene_ids)}
    order = np.full((len(conditions), N_TOP), -1)
    for i, condition in enumerate(conditions):
        if condition == CONTROL:
            continue
        if name_of.get(condition) not in rankings:
            return None
        ranking = read_text(rankings[name_of[condition]])
        ranked = [row_of[gene_id] for gene_id in ranking if gene_id in row_of][:N_TOP]
        if len(ranked) < min(N_TOP, len(gene_ids)):
            return None
        order[i, :len(ranked)] = ranked
    return order


def read_h5ad(path, args, source, before_expression=lambda: None):
    """What this stage takes of an AnnData file, as a namespace: X (cells, G) CSR float32 of the cells and genes kept, genes
    (G,), conditions (P,), cell_condition (cells,), targets_of {condition: [target]}, and the file's rankings (P, 20) or None.

    before_expression() is called when labels and genes have been read, and before the matrix, which takes longer.
    """
    with shared.read_h5(path) as file:
        check_is_anndata(file, source)
        matrix, var = find_matrix(file, args.layer, source)
        genes, gene_ids = read_genes(var, args.gene_key, source)
        if args.upper_case:
            genes = np.array([gene.upper() for gene in genes], dtype=object)
        warn_of_ensembl_ids(genes, var, source, args.vocab)
        labels, label_of_cell = read_column(file["obs"], args.condition_key, source)
        conditions, cell_condition, targets_of = choose_conditions(labels, label_of_cell, genes, args, source)
        before_expression()

        def blocks():
            return read_blocks(matrix, source, len(label_of_cell), len(genes))

        totals, is_counts = scan_expression(blocks, len(label_of_cell), args, source)
        is_empty = (totals == 0) & (cell_condition >= 0)
        if is_empty.any():
            print(f"{is_empty.sum():,} cells without any expression left out")
            cell_condition[is_empty] = -1
        kept = cell_condition >= 0
        for condition, n in zip(conditions, np.bincount(cell_condition[kept], minlength=len(conditions))):
            if n == 0:
                sys.exit(f"error: {source}: no cell of {condition} has any expression; leave it out with --drop")
        scale = np.median(totals[kept]) / np.maximum(totals, 1) if is_counts else None

        targets = {gene for of_condition in targets_of.values() for gene in of_condition}
        is_target = np.isin(genes.astype(str), list(targets))
        X, chosen = read_expression(blocks, kept, scale, is_target, args.n_genes)
        rankings = None
        if not is_counts and (cell_condition >= 0).all() and args.layer is None:
            rankings = read_rankings(file, source, conditions, conditions[cell_condition], gene_ids[chosen])
    return SimpleNamespace(X=X, genes=genes[chosen], conditions=conditions, cell_condition=cell_condition[kept],
                           targets_of=targets_of, rankings=rankings)


# ---------------------------------------------------------------------------------------------------------------------
# AnnData files: writing

def write_h5ad(path, made, X, obs, genes, description, control=None):
    """Write X (rows, genes), dense or CSR, as an AnnData file with obs {column: values}.

    With `control` (genes,), the mean of control cells, it also gets the layers `control` and `delta`. The index of obs is
    the condition where that is unique. Format: anndata 0.8 and later, which scanpy opens.
    """
    index = obs["condition"]
    if len(set(index)) < len(index):
        index = [f"{condition} {row}" for row, condition in enumerate(index)]
    about = {"description": description, "control": CONTROL, **shared.provenance(made)}
    with shared.write_h5(path, made) as file:
        mark(file, "anndata", "0.1.0")
        write_matrix(file, "X", X)
        write_table(file, "obs", index, obs)
        write_table(file, "var", genes, {"gene_name": genes})
        for name in ("layers", "obsm", "obsp", "varm", "varp", "uns"):
            mark(file.create_group(name), "dict", "0.1.0")
        for name in ("description", "control", "command", "date", "versions", "made_from"):
            file["uns"].create_dataset(name, data=about[name], dtype=h5py.string_dtype())
            mark(file["uns"][name], "string")
        if control is not None:
            write_matrix(file["layers"], "control", np.broadcast_to(control, X.shape))
            write_matrix(file["layers"], "delta", X - control)


def mark(item, kind, version="0.2.0"):
    """Say what an item of an AnnData file is."""
    item.attrs.update({"encoding-type": kind, "encoding-version": version})


def write_matrix(group, name, X):
    """Write a dense or CSR matrix as AnnData does."""
    if isinstance(X, np.ndarray):
        group[name] = X.astype(np.float32, copy=False)
        mark(group[name], "array")
        return
    matrix = group.create_group(name)
    mark(matrix, "csr_matrix", "0.1.0")
    matrix.attrs["shape"] = np.array(X.shape)
    matrix["data"], matrix["indices"], matrix["indptr"] = X.data, X.indices.astype(np.int32, copy=False), X.indptr


def write_table(file, name, index, columns):
    """Write obs or var: an index and columns {name: values}, texts or numbers."""
    table = file.create_group(name)
    mark(table, "dataframe")
    table.attrs.update({"_index": "_index", "column-order": np.array(list(columns), dtype=h5py.string_dtype())})
    for column, values in {"_index": index, **columns}.items():
        if isinstance(values[0], str):
            shared.write_strings(table, column, values)
        else:
            table[column] = np.asarray(values)
        mark(table[column], "string-array" if isinstance(values[0], str) else "array")


# ---------------------------------------------------------------------------------------------------------------------
# dataset.h5

def number_genes(cells, vocab, source):
    """Give the genes of the dataset their numbers, as a namespace: names (G,), token_ids (G,), measured (G,) bool, targets
    (P, K) as positions among them (-1: none), n_tokens and pad_id of the vocabulary.

    Targets that the data does not measure join at the end, with columns of zeros in cells.X. vocab: {symbol: row} of
    scGPT's vocabulary, or None: every gene is a token of its own.
    """
    all_targets = {gene: None for targets in cells.targets_of.values() for gene in targets}
    n_measured = len(cells.genes)
    unmeasured = sorted(set(all_targets) - set(cells.genes))
    names = np.concatenate([cells.genes, np.array(unmeasured, dtype=object)])
    cells.X.resize(cells.X.shape[0], len(names))

    if vocab is None:
        token_ids, n_tokens, pad_id = np.arange(len(names)), len(names) + 1, len(names)
    else:
        n_tokens, pad_id = len(vocab), vocab["<pad>"]
        token_ids = np.array([vocab.get(gene, pad_id) for gene in names])
        n_known = (token_ids[:n_measured] != pad_id).sum()
        cause = ("Mouse genes? --upper-case writes them as the human ones" if names[0] != names[0].upper() else
                 "Are they symbols (--gene-key), and human?")
        if not n_known:
            sys.exit(f"error: {source}: none of the {n_measured:,} genes ({shown(names, 2)}) is in the vocabulary. {cause}")
        if n_known < n_measured / 2:
            print(f"warning: only {n_known:,} of {n_measured:,} genes are in the vocabulary. {cause}", file=sys.stderr)

    position = {}
    for i, gene in enumerate(names):
        if gene in position:  # two genes of one symbol: the first keeps the name, and is what a perturbation flags
            names[i] = next(name for n in range(1, len(names)) if (name := f"{gene}-{n}") not in names)
            print(f"{gene} names two genes: the second is called {names[i]} here, a perturbation of {gene} flags the first")
        position.setdefault(gene, i)
    targets = np.full((len(cells.conditions), max(1, *map(len, cells.targets_of.values()))), -1, dtype=np.int32)
    for i, condition in enumerate(cells.conditions):
        of_condition = cells.targets_of[condition]
        targets[i, :len(of_condition)] = [position[gene] for gene in of_condition]
    return SimpleNamespace(names=names, token_ids=token_ids, measured=np.arange(len(names)) < n_measured, targets=targets,
                           n_tokens=n_tokens, pad_id=pad_id, unmeasured=unmeasured)


def write_dataset(path, made, attributes, cells, genes, split, subgroup, mean, de_idx):
    """Write dataset.h5; load_dataset reads it."""
    with shared.write_h5(path, made) as file:
        file.attrs.update(attributes)
        write_matrix(file, "X", cells.X)
        shared.write_strings(file, "genes", genes.names)
        shared.write_strings(file, "conditions", cells.conditions)
        shared.write_strings(file, "split", [split[condition] for condition in cells.conditions])
        shared.write_strings(file, "subgroup", [subgroup.get(condition, "") for condition in cells.conditions])
        file["token_ids"] = genes.token_ids.astype(np.int32)
        file["measured"] = genes.measured
        file["cell_condition"] = cells.cell_condition.astype(np.int32)
        file["targets"] = genes.targets
        file["mean"] = mean.astype(np.float32)
        file["de_idx"] = de_idx


def load_dataset(path, made_by):
    """dataset.h5 as a namespace: X (CSR), genes, token_ids, measured, conditions, cell_condition, targets, split, subgroup,
    mean, de_idx as in the file, its attributes, and ctrl_cells, the indices of the control cells."""
    arrays = ("token_ids", "measured", "cell_condition", "targets", "mean", "de_idx")
    texts = ("genes", "conditions", "split", "subgroup")
    with shared.read_h5(path, made_by) as file:
        data = SimpleNamespace(**{name: file[name][:] for name in arrays}, **{name: file[name].asstr()[:] for name in texts})
        data.synthetic, data.vocab = bool(file.attrs["synthetic"]), str(file.attrs["vocab"])
        data.n_tokens, data.pad_id = int(file.attrs["n_tokens"]), int(file.attrs["pad_id"])
        X = file["X"]
        shape = (len(data.cell_condition), len(data.genes))
        data.X = sparse.csr_matrix((X["data"][:], X["indices"][:], X["indptr"][:]), shape=shape)
    data.ctrl_cells = np.flatnonzero(data.split[data.cell_condition] == "ctrl")
    return data


def print_summary(args, cells, genes, split, subgroup, vocab):
    """Print what is in the dataset, and what the user should know of it."""
    n_measured = genes.measured.sum()
    n_cells = np.bincount(cells.cell_condition, minlength=len(cells.conditions))
    n_control = n_cells[list(cells.conditions).index(CONTROL)]
    targets = sorted({gene for of_condition in cells.targets_of.values() for gene in of_condition})
    n_perturbed = len(cells.conditions) - 1
    print(f"{cells.X.shape[0]:,} cells ({n_control:,} control), {n_measured:,} genes, {n_perturbed:,} perturbations of "
          f"{len(targets):,} targets")
    if vocab is not None:
        print(f"{(genes.token_ids[genes.measured] != genes.pad_id).sum():,} of {n_measured:,} genes are in the vocabulary")
    print(f"{len(targets) - len(genes.unmeasured):,} of {len(targets):,} targets are measured")
    if genes.unmeasured:
        n_known = (genes.token_ids[~genes.measured] != genes.pad_id).sum()
        print(f"{len(genes.unmeasured):,} targets join as unmeasured genes ({n_known:,} of them in the vocabulary): "
              f"{shown(genes.unmeasured)}")
    without_token = [target for target in targets if vocab is not None and target not in vocab]
    if without_token:
        print(f"{len(without_token):,} targets are not in the vocabulary; without a text, the model cannot tell these "
              f"from each other: {shown(without_token)}")
    print_text_coverage(args, genes.names, targets)
    for part in ("train", "val", "test"):
        groups = [subgroup.get(condition, "") for condition in split if split[condition] == part]
        if groups or args.split != "none":
            kinds = "".join(f", {groups.count(group)} {group}" for group in sorted(set(groups)) if group)
            print(f"{part}: {len(groups)} conditions{kinds}")
    how = "computed (t-test against control)" if cells.rankings is None else "the file's own rankings"
    print(f"top {N_TOP} differentially expressed genes: {how}")
    warn_of_targets(genes, targets, args)


def warn_of_targets(genes, targets, args):
    """Print a warning where targets that the data does not measure look like guides, pairs, or ids."""
    measured = set(genes.names[genes.measured])
    parts_of = {target: re.split(r"[^A-Za-z0-9.]", target) for target in genes.unmeasured}
    odd = [target for target, parts in parts_of.items() if len(parts) > 1 and parts[0] in measured]
    if odd:
        print(f"warning: {len(odd):,} targets are no genes of the data, but begin with one ({shown(odd, 3)}): are those pairs "
              f"(--separator, now {args.separator!r}) or guides (--target-regex)?", file=sys.stderr)
    elif targets and len(genes.unmeasured) == len(targets):
        print(f"warning: none of the {len(targets)} targets is a measured gene ({shown(sorted(measured), 3)}): are those "
              "gene symbols? (--gene-key)", file=sys.stderr)


def print_text_coverage(args, genes, targets):
    """Print how many of the genes and of the targets each source of stage 01 has a text for."""
    path = args.root / "data" / shared.space_of(args.dataset) / "annotations.h5"
    if not path.exists():
        print(f"genes with text: not known before {shared.command('01_fetch_annotations.py', args)}")
        return
    with shared.read_h5(path) as file:
        with_text = {source: set(group["genes"].asstr()[:]) for source, group in file.items()}
    for what, names in (("genes", set(genes)), ("targets", set(targets))):
        counts = [f"{source} {len(of_source & names):,}" for source, of_source in with_text.items()]
        print(f"{what} with text, of {len(names):,}: {', '.join(counts)}")


# ---------------------------------------------------------------------------------------------------------------------

def parse_arguments():
    parser = shared.common_options(argparse.ArgumentParser(description=__doc__))
    add = parser.add_argument
    add("--h5ad", type=Path, metavar="FILE", help="an AnnData file, also gzipped or in a zip")
    add("--condition-key", default="condition", metavar="COLUMN", help="obs column with the labels (default: condition)")
    add("--control", nargs="+", default=[CONTROL], metavar="LABEL",
        help="labels of control cells, also as patterns such as 'NT-*' (default: ctrl)")
    add("--drop", nargs="*", metavar="LABEL", help="labels of cells to leave out, also as patterns, besides the usual words "
        "for no known perturbation (unassigned, doublet, nan, ...); without a value, those words are kept")
    add("--separator", default="+", metavar="TEXT", help="what stands between the targets of a label (default: +)")
    add("--target-regex", metavar="REGEX", help="finds the targets in a label, or in each of its parts: its groups are the "
        "targets, as in '(.+)_g[0-9]+' for KLF1_g2")
    add("--min-cells", type=int, default=0, metavar="N", help="leave out conditions of fewer cells (default: 0)")
    add("--gene-key", metavar="COLUMN", help="var column with symbols, or index (default: gene_name, else the index)")
    add("--upper-case", action="store_true", help="write symbols in capitals, which maps mouse genes to human ones")
    add("--layer", metavar="NAME", help="read this layer, or raw, instead of X")
    add("--normalize", action="store_true", help="the values are raw counts: scale to the median total, then log1p")
    add("--n-genes", type=int, metavar="N",
        help="keep the N most variable genes (scanpy's seurat flavour) and the targets (default: all)")
    add("--split", default="simulation", metavar="simulation|none|FILE.json", help="the paper's split; none, to train on "
        'everything; or {"train": [label, ...], "val": [...], "test": [...]} (default: simulation)')
    add("--split-seed", type=shared.seed, default=1, metavar="N",
        help="seed of the simulation split (default: 1, the paper's)")
    add("--vocab", metavar="FILE|none", help="vocabulary that numbers the genes (default: scGPT's, fetched to "
        "data/human/scgpt/; none: the dataset's own genes, to train without pretrained weights; the demo: none)")
    args = parser.parse_args()

    if shared.space_of(args.dataset) == "demo":
        args.vocab = "none"
        if args.h5ad:
            sys.exit("error: --h5ad needs a name of its own: --dataset NAME")
    elif not args.h5ad and args.dataset not in DATASETS:
        sys.exit(f"error: unknown dataset {args.dataset!r}: demo, {', '.join(DATASETS)}, or your own with --h5ad FILE")
    for path in (args.h5ad, args.vocab, args.split):
        if path not in (None, "none", "simulation") and not Path(path).exists():
            sys.exit(f"error: {path} does not exist")
    if not args.separator or args.separator in args.control:
        sys.exit(f"error: --separator {args.separator!r}: expected what stands between targets, as + or _")
    if args.min_cells < 0 or args.n_genes is not None and args.n_genes < 1:
        sys.exit("error: --min-cells and --n-genes expect numbers from 0 and 1 on")
    try:
        if args.target_regex is not None and re.compile(args.target_regex).groups < 1:
            sys.exit(f"error: --target-regex {args.target_regex!r}: put the target in parentheses, as in '(.+)_g[0-9]+'")
    except re.error as error:
        sys.exit(f"error: --target-regex {args.target_regex!r}: not a regular expression ({error})")
    return args


def fetch_cells(args, folder):
    """The file with the cells (None for the demo), downloaded if need be, and the SHA-256 of the h5ad in it if known."""
    if args.h5ad or args.dataset not in DATASETS:
        return args.h5ad, None
    url, size, sha256 = DATASETS[args.dataset]
    return shared.download(url, folder / f"{args.dataset}.zip", size=size), sha256


def read_vocab(path):
    """A scGPT vocab.json, {symbol: row}."""
    vocab = shared.read_json(path, int)
    if sorted(vocab.values()) != list(range(len(vocab))) or "<pad>" not in vocab:
        sys.exit(f'error: {path}: expected {{"SYMBOL": row, ...}} with rows from 0 on and a "<pad>"')
    return vocab


def dataset_made_from(args, source, vocab_path):
    """`made_from` of dataset.h5: the options and files that decide it."""
    options = {name: getattr(args, name) for name in (
        "condition_key", "control", "drop", "separator", "target_regex", "min_cells", "gene_key", "upper_case", "layer",
        "normalize", "n_genes", "split_seed")}
    options["split"] = args.split if args.split in ("simulation", "none") else "file"
    files = {"cells": source, "vocabulary": vocab_path, "split": Path(args.split) if options["split"] == "file" else None}
    return shared.made_from(options, {name: shared.fingerprint(file) for name, file in files.items() if file})


def next_command(args, has_vocab):
    """The command that trains on the dataset: the default variants need vectors of go_all."""
    words = [] if has_vocab or args.dataset == "demo" else ["--no-pretrained"]
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
    source, sha256 = fetch_cells(args, folder)
    has_vocab = args.vocab != "none"
    vocab_path = Path(args.vocab or args.root / "data" / "human" / "scgpt" / "vocab.json") if has_vocab else None

    def is_done():
        return shared.is_current(path, dataset_made_from(args, source, vocab_path), args.force)

    if (not has_vocab or vocab_path.exists()) and is_done():
        print(f"next: {next_command(args, has_vocab)}")
        return

    # Cells; the vocabulary is fetched when labels and genes have been found to be in order
    def fetch_vocab():
        if has_vocab:
            shared.download(shared.VOCAB, vocab_path)

    if source is None:
        print("SYNTHETIC cells: a simulated screen, for trying the kit; its numbers say nothing about biology")
        cells = read_demo(args)
    else:
        try:
            cells = read_h5ad(open_cells(source, folder, sha256), args, source, fetch_vocab)
        finally:
            (folder / ".unpacked.h5ad").unlink(missing_ok=True)

    # Genes, split, means and differential expression
    vocab = read_vocab(vocab_path) if has_vocab else None
    genes = number_genes(cells, vocab, source)
    split, subgroup = make_split(cells.targets_of, args, make_rules(args, cells.genes))
    ctrl = list(cells.conditions).index(CONTROL)
    n_cells = np.bincount(cells.cell_condition, minlength=len(cells.conditions))
    mean, variance = moments(cells.X, cells.cell_condition, len(cells.conditions))
    if cells.rankings is None:
        de_idx = rank_de(mean, variance, n_cells, ctrl, genes.measured.sum())
    else:
        de_idx = top_genes(cells.rankings, ctrl)

    attributes = {"dataset": args.dataset, "synthetic": source is None, "n_tokens": genes.n_tokens, "pad_id": genes.pad_id,
                  "vocab": shared.fingerprint(vocab_path) if has_vocab else "own genes"}
    made = dataset_made_from(args, source, vocab_path)
    write_dataset(path, made, attributes, cells, genes, split, subgroup, mean, de_idx)
    print_summary(args, cells, genes, split, subgroup, vocab)
    print(f"wrote {path}\nnext: {next_command(args, has_vocab)}")


def read_demo(args):
    """The demo's cells, as read_h5ad gives those of a file."""
    X, genes, labels = simulate_demo()
    genes = np.array(genes, dtype=object)
    labels, label_of_cell = np.unique(labels, return_inverse=True)
    conditions, cell_condition, targets_of = choose_conditions(labels, label_of_cell, genes, args, "the demo")
    kept = cell_condition >= 0
    return SimpleNamespace(X=X[kept], genes=genes, conditions=conditions, cell_condition=cell_condition[kept],
                           targets_of=targets_of, rankings=None)


if __name__ == "__main__":
    shared.run(main)
