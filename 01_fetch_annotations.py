"""Stage 01: what the literature says of each gene -> data/<space>/annotations.h5

    python 01_fetch_annotations.py                                       the demo's synthetic texts, no network
    python 01_fetch_annotations.py --dataset norman                      human genes, all six sources of the paper
    python 01_fetch_annotations.py --dataset norman --source go_c go_all --go-release current
    python 01_fetch_annotations.py --dataset mine --tsv notes=notes.tsv  own texts: a header gene<TAB>text, a line a gene

A source is a group of the file: `genes` (N) and `text` (N); the GO sources also have `terms` (M) and `term_offsets`
(N + 1), each gene's terms one by one. Sources that the file has already and this call does not name are kept.

The helpers that several stages share (files that appear whole or not at all, provenance, downloads) live here.
"""
import argparse
import contextlib
import datetime
import hashlib
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path

import h5py
import numpy as np

FORMAT_VERSION = 1
SOURCES = ("ncbi", "ncbi+uniprot", "go_f", "go_c", "go_p", "go_all")
GO_PREFIX = {"go_f": "Molecular Function", "go_c": "Cellular Component", "go_p": "Biological Process"}


# ---------------------------------------------------------------------------------------------------------------------
# Shared by all stages

def run(main):
    """Call a stage's `main`; what a user can cause ends in one line and exit code 1, our own mistakes in a traceback."""
    try:
        main()
    except OSError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from what is already on disk")


def common_options(parser, default_seed=None):
    """Add the options that every stage has in the same words."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--dataset", default="demo", help="demo, norman, adamson, dixit, replogle_k562_essential, "
                        "replogle_rpe1_essential, or a name of your own (default: demo)")
    parser.add_argument("--root", type=Path, default=Path("."), metavar="DIR",
                        help="the folder that holds data/, runs/ and results/ (default: the current folder)")
    parser.add_argument("--force", action="store_true", help="do it again even if the output is there")
    return parser


def check_name(name, what):
    """A name that becomes part of a path: letters, digits, `_`, `-`, `+` only. Ends the run otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_+-]*", name):
        sys.exit(f"error: {what} {name!r}: use letters, digits, '_', '-' and '+' only")
    return name


def space_of(dataset):
    """The space (the set of genes with texts) of a dataset: `demo` for the demo, `human` for every other."""
    return "demo" if check_name(dataset, "--dataset") == "demo" else "human"


def fingerprint(path):
    """SHA-256 of a file; of one over 256 MB its size and modification time."""
    stat = os.stat(path)
    if stat.st_size > 256 * 2**20:
        return f"size {stat.st_size} mtime {stat.st_mtime_ns}"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") \
            else hashlib.sha256(file.read()).hexdigest()


def made_from(options, inputs):
    """What decides an output, as JSON text: the options and the fingerprints of the input files."""
    return json.dumps({"options": options, "inputs": {Path(p).name: fingerprint(p) for p in inputs}}, sort_keys=True)


def provenance(made):
    """The attributes of every output file: format, command line, date, library versions, options and inputs."""
    versions = {"python": sys.version.split()[0]}
    for name in ("numpy", "scipy", "h5py", "torch"):
        if name in sys.modules:
            versions[name] = sys.modules[name].__version__
    return {"format_version": FORMAT_VERSION, "command": shlex.join(sys.argv), "made_from": made,
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "versions": json.dumps(versions)}


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path` and rename it onto `path` at the end: a reader (or a killed writer) never
    sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a run that was killed
        if time.time() - leftover.stat().st_mtime > 86400:
            leftover.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def write_h5(path, made):
    """Yield a new HDF5 file with its provenance attributes; it becomes `path` when the block ends without an error."""
    with replacing(path) as partial:
        with h5py.File(partial, "w") as file:
            file.attrs.update(provenance(made))
            yield file


def write_text(path, text):
    """Write a text file (UTF-8) whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def write_strings(group, name, strings):
    """Write a dataset of variable-length UTF-8 text."""
    group.create_dataset(name, data=np.array(list(strings), dtype=object), dtype=h5py.string_dtype())


@contextlib.contextmanager
def open_h5(path, made_by, keys=()):
    """Yield an HDF5 file that an earlier stage made. Ends the run when it is missing (naming the command that makes
    it), no HDF5 file, or without one of `keys`."""
    path = Path(path)
    if not path.exists():
        sys.exit(f"error: {path} does not exist; run first: python {made_by}")
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        sys.exit(f"error: {path}: not a whole HDF5 file ({error}); make it again: python {made_by} --force")
    with file:
        for key in keys:
            if key not in file:
                sys.exit(f"error: {path}: no {key!r} in it; make it again: python {made_by} --force")
        yield file


def is_current(path, made, force, key="/"):
    """Whether the HDF5 file `path` (its group `key`) was made from exactly this; says so, or says that it is stale."""
    path = Path(path)
    if force or not path.exists():
        return False
    try:
        with h5py.File(path, "r") as file:
            old = file[key].attrs.get("made_from") if key in file else None
    except OSError:
        print(f"{path}: not a whole HDF5 file, made again")
        return False
    if old == made:
        print(f"{path}{'' if key == '/' else ' ' + key}: there already, from the same inputs and options (--force makes it again)")
    elif old is not None:
        print(f"{path}{'' if key == '/' else ' ' + key}: stale, made again ({difference(old, made)})")
    return old == made


def difference(old, new):
    """In which options or inputs two `made_from` texts differ, in words."""
    old, new = json.loads(old), json.loads(new)
    words = []
    for kind in ("options", "inputs"):
        for name in sorted(old[kind].keys() | new[kind].keys()):
            a, b = old[kind].get(name), new[kind].get(name)
            if a != b:
                words.append(f"{name} changed" if kind == "inputs" and a and b else f"{name} was {a}, now {b}")
    return "; ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# The demo's gene space: invented genes whose texts name the invented processes that they take part in

DEMO_PROCESSES = {  # process: (molecular function, cellular component), all invented
    "amber tide regulation": ("amber tide binding", "amber vesicle"),
    "birch lattice assembly": ("lattice ligase activity", "birch lattice"),
    "cobalt relay signaling": ("cobalt relay kinase activity", "relay membrane"),
    "dune cycle progression": ("dune cycle hydrolase activity", "dune body"),
    "ember transport": ("ember transporter activity", "ember channel"),
    "fjord stress response": ("fjord sensor activity", "fjord granule"),
    "glacier matrix turnover": ("glacier matrix protease activity", "glacier matrix"),
    "harbor lipid synthesis": ("harbor lipid synthase activity", "harbor droplet"),
}


def demo_genes():
    """Names (128) and processes of the demo's genes, as a bool array (128, 8): each gene takes part in one or two, each
    process has as many genes as the others. Stage 03 simulates the cells from the same array."""
    n_genes, n_processes = 128, len(DEMO_PROCESSES)
    rng = np.random.default_rng(0)
    takes_part = np.zeros((n_genes, n_processes), dtype=bool)
    takes_part[np.arange(n_genes), rng.permutation(n_genes) % n_processes] = True
    second = rng.permutation(n_genes)[:n_genes // 2]
    takes_part[second, (takes_part[second].argmax(1) + 1 + np.arange(len(second)) % (n_processes - 1)) % n_processes] = True
    return [f"DEMO{i + 1:03d}" for i in range(n_genes)], takes_part


def demo_texts(source):
    """The synthetic texts of one source: genes, texts, and for GO each gene's terms (else None)."""
    genes, takes_part = demo_genes()
    names = list(DEMO_PROCESSES)
    terms = {"go_p": [[names[p] for p in np.flatnonzero(row)] for row in takes_part],
             "go_f": [[DEMO_PROCESSES[names[p]][0] for p in np.flatnonzero(row)] for row in takes_part],
             "go_c": [[DEMO_PROCESSES[names[p]][1] for p in np.flatnonzero(row)] for row in takes_part]}
    if source in terms:
        return genes, [go_text({source: t}) for t in terms[source]], terms[source]
    if source == "go_all":
        each = [{s: terms[s][i] for s in GO_PREFIX} for i in range(len(genes))]
        return genes, [go_text(e) for e in each], [sum(e.values(), []) for e in each]
    texts = [f"Gene Symbol {gene} This synthetic gene takes part in {' and in '.join(p)}." for gene, p in zip(genes, terms["go_p"])]
    if source == "ncbi+uniprot":
        texts = [f"{text} Protein summary: Has {' and '.join(f)}." for text, f in zip(texts, terms["go_f"])]
    return genes, texts, None


def go_text(terms):
    """The text of one gene in concat mode, from {source: [term, ...]}: `Molecular Function: term, term; Cellular ...`."""
    return "; ".join(f"{GO_PREFIX[source]}: {', '.join(names)}" for source, names in terms.items() if names)


# ---------------------------------------------------------------------------------------------------------------------
# Own texts

def read_tsv(path):
    """Genes and texts of a tab-separated file with the header gene<TAB>text (UTF-8); a gene may stand once."""
    texts = {}
    try:
        with open(path, encoding="utf-8-sig") as file:
            if file.readline().rstrip("\r\n").split("\t") != ["gene", "text"]:
                sys.exit(f"error: {path}: the first line has to be gene<TAB>text")
            for number, line in enumerate(file, 2):
                fields = line.rstrip("\r\n").split("\t")
                if fields == [""]:
                    continue
                if len(fields) != 2 or not all(field.strip() for field in fields):
                    sys.exit(f"error: {path}, line {number}: expected a gene, a tab and a text")
                if fields[0] in texts:
                    sys.exit(f"error: {path}, line {number}: gene {fields[0]!r} stands here a second time")
                texts[fields[0]] = fields[1]
    except UnicodeDecodeError as error:
        sys.exit(f"error: {path}: not UTF-8 text ({error})")
    if not texts:
        sys.exit(f"error: {path}: no gene in it")
    return list(texts), list(texts.values())


# ---------------------------------------------------------------------------------------------------------------------

def options():
    parser = argparse.ArgumentParser(description=__doc__)
    common_options(parser)
    parser.add_argument("--source", nargs="+", choices=SOURCES, metavar="NAME",
                        help=f"any of {', '.join(SOURCES)} (default: all; with --tsv: none)")
    parser.add_argument("--tsv", nargs="+", default=[], metavar="NAME=FILE",
                        help="own texts as a source NAME: a file with the header gene<TAB>text")
    return parser.parse_args()


def main():
    args = options()
    space = space_of(args.dataset)
    path = args.root / "data" / space / "annotations.h5"
    wanted = {}  # source -> (what decides it, a function that gives genes, texts, terms)
    for item in args.tsv:
        name, _, file = item.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in SOURCES or not file:
            sys.exit(f"error: --tsv {item}: expected NAME=FILE with a NAME of letters, digits and '_' that is no built-in source")
        wanted[name] = made_from({"tsv": True}, [file]), lambda file=file: (*read_tsv(file), None)
    for source in args.source or ([] if args.tsv else SOURCES):
        if space == "demo":
            wanted[source] = made_from({"demo": 1}, []), lambda source=source: demo_texts(source)
        else:
            sys.exit(f"error: --source {source} is not there yet for human genes; use --tsv NAME=FILE")

    todo = {s: w for s, w in wanted.items() if not is_current(path, w[0], args.force, s)}
    if not todo:
        return
    made = made_from({"space": space}, [])
    with write_h5(path, made) as new:
        if path.exists() and h5py.is_hdf5(path):
            with h5py.File(path, "r") as old:
                for source in old:
                    if source not in todo:
                        old.copy(source, new)
        for source, (made, texts_of) in todo.items():
            genes, texts, terms = texts_of()
            group = new.create_group(source)
            group.attrs["made_from"] = made
            write_strings(group, "genes", genes)
            write_strings(group, "text", texts)
            if terms is not None:
                write_strings(group, "terms", [term for of_gene in terms for term in of_gene])
                group["term_offsets"] = np.cumsum([0] + [len(of_gene) for of_gene in terms])
            print(f"{source}: {len(genes):,} genes with text" + (" (SYNTHETIC: invented genes and processes)" if space == "demo" else ""))
    print(f"wrote {path}\nnext: python 02_embed.py" + ("" if args.dataset == "demo" else f" --dataset {args.dataset}"))


if __name__ == "__main__":
    run(main)
