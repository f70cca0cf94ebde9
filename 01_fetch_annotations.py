"""Stage 01: what the literature says of each gene -> data/<space>/annotations.h5

    python 01_fetch_annotations.py                                    the demo's synthetic texts, offline
    python 01_fetch_annotations.py --dataset norman                   human genes, the paper's six sources
    python 01_fetch_annotations.py --dataset norman --source go_c --go-release current
    python 01_fetch_annotations.py --dataset norman --source ncbi --fresh        from NCBI itself, as of today
    python 01_fetch_annotations.py --dataset mine --tsv notes=notes.tsv          your own texts: the header
                                                                         gene<TAB>text, one line per gene

Each source is a group of the file: `genes` (N) and `text` (N); the GO sources also have `terms` (M) and
`term_offsets` (N + 1), each gene's terms one by one. Sources that the file has already stay. Downloads for
human genes are kept in data/human/raw/; annotations.png shows how many genes each source covers.

What all stages share (command line, output files, provenance, downloads, figures) stands at the end.
"""
import argparse
import collections
import contextlib
import datetime
import functools
import gzip
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import time
import zlib
from pathlib import Path

import h5py
import numpy as np
import requests
import urllib3
from filelock import FileLock
from tqdm import tqdm

SOURCES = ("ncbi", "ncbi+uniprot", "go_f", "go_c", "go_p", "go_all")
GO_CATEGORIES = {"go_f": "Molecular Function", "go_c": "Cellular Component", "go_p": "Biological Process"}
PAPER_GO_RELEASE = "2024-01-17"

BUCKET = "https://czi-scgenept-public.s3.amazonaws.com/models"
RELEASED = {"ncbi": f"{BUCKET}/gene_embeddings/gene_annotations/NCBI_summary_of_genes.json",
            "ncbi+uniprot": f"{BUCKET}/gene_embeddings/gene_annotations/NCBI_UniProt_summary_of_genes.json"}
VOCAB = f"{BUCKET}/pretrained/scgpt/vocab.json"
GO_DATED, GO_CURRENT = "https://release.geneontology.org", "https://current.geneontology.org"
NCBI = "https://eutils.ncbi.nlm.nih.gov/entrez/eutils"
UNIPROT = ("https://rest.uniprot.org/uniprotkb/stream?compressed=true&format=tsv"
           "&fields=gene_primary,cc_function&query=%28organism_id%3A9606%29%20AND%20%28reviewed%3Atrue%29")


# ----------------------------------------------------------------------------------------------------------
# The demo's genes: invented, with texts that name the invented processes each gene takes part in

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
    """Names (128) of the demo's genes and the processes each takes part in, bool (128, 8).

    Every gene takes part in one or two processes, and every process is the first of equally many genes.
    Stage 03 simulates cells from the same array.
    """
    n_genes, n_processes = 128, len(DEMO_PROCESSES)
    rng = np.random.default_rng(0)
    takes_part = np.zeros((n_genes, n_processes), dtype=bool)
    first_process = rng.permutation(n_genes) % n_processes
    takes_part[np.arange(n_genes), first_process] = True

    # Half of the genes take part in a second process, 1 to 7 places further on in the list
    genes_with_two = rng.permutation(n_genes)[:n_genes // 2]
    steps = 1 + np.arange(len(genes_with_two)) % (n_processes - 1)
    takes_part[genes_with_two, (first_process[genes_with_two] + steps) % n_processes] = True
    return [f"DEMO{i + 1:03d}" for i in range(n_genes)], takes_part


def demo_texts(source):
    """The synthetic texts of one source, as the readers return them."""
    genes, takes_part = demo_genes()
    processes = {gene: list(itertools.compress(DEMO_PROCESSES, row)) for gene, row in zip(genes, takes_part)}
    functions = {gene: [DEMO_PROCESSES[name][0] for name in names] for gene, names in processes.items()}
    components = {gene: [DEMO_PROCESSES[name][1] for name in names] for gene, names in processes.items()}
    if source.startswith("go_"):
        return go_texts(source, {"go_f": functions, "go_c": components, "go_p": processes})

    texts = {}
    for gene, names in processes.items():
        texts[gene] = f"Gene Symbol {gene} This synthetic gene takes part in {' and in '.join(names)}."
        if source == "ncbi+uniprot":
            texts[gene] += f" Protein summary: Has {' and '.join(functions[gene])}."
    return texts, None


def go_texts(source, annotations):
    """Texts and terms of a GO source, from {category: {gene: terms}}.

    A text reads `Molecular Function: term, term; Cellular Component: term; Biological Process: term`.
    """
    texts, terms = {}, {}
    for category in GO_CATEGORIES if source == "go_all" else [source]:
        for gene, of_gene in annotations[category].items():
            texts.setdefault(gene, []).append(f"{GO_CATEGORIES[category]}: {', '.join(of_gene)}")
            terms.setdefault(gene, []).extend(of_gene)
    return {gene: "; ".join(parts) for gene, parts in texts.items()}, terms


# ----------------------------------------------------------------------------------------------------------
# Readers: each returns {gene: text}, and for GO {gene: [term, ...]} (else None)

def read_lines(path):
    """Yield (number, line) of a UTF-8 text file, gzipped or not."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    number = 0
    try:
        with (gzip.open if is_gzip else open)(path, "rb") as file:
            for number, line in enumerate(file, 1):
                yield number, line.decode().strip("\ufeff\r\n")  # \ufeff: Excel's mark of UTF-8
    except UnicodeDecodeError:
        sys.exit(f"error: {path}, line {number}: not UTF-8 text")
    except (EOFError, gzip.BadGzipFile, zlib.error):
        sys.exit(f"error: {path}: damaged gzip file after line {number}; delete it and get it again")


def read_json(path, kind):
    """A JSON file that holds one object of str -> `kind`, as a dict."""
    try:
        entries = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except ValueError as error:  # not UTF-8, or not JSON
        sys.exit(f"error: {path}: not a JSON file ({error})")
    if not isinstance(entries, dict) or not all(isinstance(value, kind) for value in entries.values()):
        sys.exit(f"error: {path}: expected an object of names and values of the type {kind.__name__}")
    return entries


def read_tsv(path):
    """Texts of a tab-separated file with the header gene<TAB>text, in which each gene stands once.

    A gene without a text is left out, with a line that says so.
    """
    lines = read_lines(path)
    if next(lines, (1, ""))[1] != "gene\ttext":
        sys.exit(f"error: {path}: the first line has to be gene<TAB>text")
    texts = {}
    for number, line in lines:
        gene, _, text = (part.strip() for part in line.partition("\t"))
        if not gene and not text:
            continue
        if not gene or "\t" in text:
            sys.exit(f"error: {path}, line {number}: expected a gene, a tab and a text")
        if gene in texts:
            sys.exit(f"error: {path}, line {number}: gene {gene!r} is listed a second time")
        texts[gene] = text
    without_text = [gene for gene, text in texts.items() if not text]
    if without_text:
        print(f"{path}: {len(without_text):,} genes without a text left out: {shown(without_text)}")
    return {gene: text for gene, text in texts.items() if text}, None


def read_released(path):
    """Texts of a JSON file in the released form: an object of symbol -> text."""
    return {gene: text for gene, text in read_json(path, str).items() if gene and text.strip()}, None


def read_obo(path):
    """Names of the terms of an OBO file by id and by alternative id; None for an obsolete term."""
    names, main_ids, term = {}, {}, None
    for _, line in read_lines(path):
        tag, _, value = line.partition(": ")
        if tag == "id":
            term = value
        elif tag == "name":
            names[term] = value
        elif tag == "alt_id":
            main_ids[value] = term
        elif line == "is_obsolete: true":
            names[term] = None
    if not names:
        sys.exit(f"error: {path}: no term in it: not an OBO file")
    return names | {other: names.get(term) for other, term in main_ids.items()}


@functools.lru_cache(maxsize=1)  # read once for all GO sources of a call
def read_annotations(gaf, obo):
    """Annotations of human genes in a GAF 2 file, in its order: {category: {gene: terms}}.

    Left out: negated annotations (NOT), those that say there is no data (ND), other species, obsolete terms.
    """
    names = read_obo(obo)
    found = {category: {} for category in GO_CATEGORIES}
    n_unknown = 0
    for number, line in read_lines(gaf):
        if not line or line.startswith("!"):
            continue
        columns = line.split("\t")
        if len(columns) < 15 or columns[8] not in ("F", "C", "P"):
            sys.exit(f"error: {gaf}, line {number}: not a line of a GAF 2 file: {line[:60]!r}")
        gene, qualifiers, term, evidence, aspect, taxa = (columns[i] for i in (2, 3, 4, 6, 8, 12))
        if "NOT" in qualifiers.split("|") or evidence == "ND" or taxa.split("|")[0] != "taxon:9606":
            continue
        if term not in names:
            n_unknown += 1
        elif names[term]:
            of_gene = found[f"go_{aspect.lower()}"].setdefault(gene, {})
            of_gene[names[term]] = None  # a dict keeps the order, and each term once
    if n_unknown:
        print(f"{gaf}: {n_unknown:,} annotations left out: their terms are not in {obo}")
    return found


def read_go(source, gaf, obo):
    """Texts and terms of a GO source."""
    return go_texts(source, read_annotations(gaf, obo))


# ----------------------------------------------------------------------------------------------------------
# Human genes: the released texts, or fresh ones from NCBI and UniProt in the same form

NOT_THE_FORM = (ValueError, KeyError, TypeError, AttributeError)  # what a parser raises for another form


def ask_ncbi(tool, parse, **params):
    """What `parse` finds in the JSON answer of one of NCBI's E-utilities, which has to be something.

    An overloaded service answers in another form, and is asked again. The API key travels in the body of the
    request and no redirect is followed, so that no message can quote it.
    """
    api_key = os.environ.get("NCBI_API_KEY")
    params |= {"db": "gene", "retmode": "json", "api_key": api_key}  # requests leaves out a key that is None
    pause = 0.11 if api_key else 0.34  # seconds: ten or three requests a second are allowed
    url = f"{NCBI}/{tool}.fcgi"
    for attempt in range(TRIES):
        time.sleep(pause + BACKOFF * (2 ** attempt - 1))
        with request(url, method="POST", data=params, allow_redirects=False) as response:
            with contextlib.suppress(requests.RequestException, *NOT_THE_FORM):
                if found := parse(response.json()):
                    return found
    sys.exit(f"error: {address(url)}: not the answer that was asked for; the same command goes on from here")


def parse_search(answer):
    """The number of genes that were found, and the words that ask for them."""
    found = answer["esearchresult"]
    return int(found["count"]), {"query_key": found["querykey"], "WebEnv": found["webenv"]}


def parse_genes(answer):
    """[[symbol, summary], ...], None for what a gene does not have."""
    genes = [answer["result"][uid] for uid in answer["result"]["uids"]]
    return [[gene.get("name"), gene.get("summary")] for gene in genes]


def fetch_summaries(path):
    """Write the summaries of human genes that NCBI has today, in the released form.

    Each page of 500 genes, or of as many as came, is a file until the last has come, so that an interrupted
    run goes on there.
    """
    with locked(path):
        if path.exists():
            return
        query = {"term": "9606[taxid] AND alive[prop]", "usehistory": "y", "retmax": 0}
        n_genes, history = ask_ncbi("esearch", parse_search, **query)

        # The number of genes is in the names of the pages, since those of an earlier search may not fit
        texts, n_done = {}, 0
        progress = tqdm(total=n_genes, desc=path.name, unit=" genes", disable=None)
        while n_done < n_genes:
            page = Path(f"{path}.{n_done}of{n_genes}.part")
            if not page.exists():
                genes = ask_ncbi("esummary", parse_genes, **history, retstart=n_done, retmax=500)
                write_text(page, json.dumps(genes))
            genes = json.loads(page.read_text(encoding="utf-8"))
            for gene, summary in genes:
                if gene and summary:
                    texts.setdefault(gene, f"Gene Symbol {gene} {summary}")
            n_done += len(genes)
            progress.update(len(genes))
        progress.close()
        write_text(path, json.dumps(texts))
        for page in path.parent.glob(f"{path.name}.*.part"):
            page.unlink()
    print(f"downloaded {path} ({n_genes:,} genes)")


def read_fresh(ncbi, uniprot):
    """Texts of what fetch_summaries wrote, with the functions of the proteins in UniProt's table."""
    lines = read_lines(uniprot)
    if next(lines, (1, ""))[1].lower() != "gene names (primary)\tfunction [cc]":
        sys.exit(f"error: {uniprot}: not UniProt's table of gene names and functions")
    functions = {}
    for _, line in lines:
        genes, _, function = line.partition("\t")
        function = re.sub(r"FUNCTION: | ?\{ECO:[^}]*\}\.?", "", function)  # ECO: codes of evidence
        for gene in genes.split("; "):
            if gene and function:
                functions.setdefault(gene, []).append(function)

    texts, _ = read_released(ncbi)
    for gene, of_gene in functions.items():
        texts[gene] = f"{texts.get(gene, f'Gene Symbol {gene}')} Protein summary: {' '.join(of_gene)}"
    return texts, None


def human_source(source, release, fresh, raw):
    """The options that decide a human source's texts, its input files {file: address}, and their reader."""
    if source in RELEASED and not fresh:
        return {"fresh": False}, {raw / os.path.basename(RELEASED[source]): RELEASED[source]}, read_released
    ncbi = {raw / "ncbi_fresh.json": NCBI}
    if source == "ncbi":
        return {"fresh": True}, ncbi, read_released
    if source == "ncbi+uniprot":
        return {"fresh": True}, ncbi | {raw / "uniprot_fresh.tsv.gz": UNIPROT}, read_fresh
    site = GO_CURRENT if release == "current" else f"{GO_DATED}/{release}"
    files = {raw / f"goa_human.{release}.gaf.gz": f"{site}/annotations/goa_human.gaf.gz",
             raw / f"go-basic.{release}.obo": f"{site}/ontology/go-basic.obo"}
    return {"go_release": release}, files, functools.partial(read_go, source)


# ----------------------------------------------------------------------------------------------------------
# annotations.h5

def source_made_from(path, source, options, files):
    """`made_from` of a source. For a download deleted since, the recorded fingerprint counts."""
    recorded = json.loads(recorded_made_from(path, source) or '{"inputs": {}}')["inputs"]
    inputs = {file.name: fingerprint(file) if file.exists() else recorded.get(file.name) for file in files}
    return made_from(options, inputs)


def fetch_inputs(wanted, vocab_path, force):
    """Download the files that the wanted sources need, and scGPT's vocabulary, with which they are compared.

    force: ask services again whose answers change with time.
    """
    inputs = {file: url for _, files, _ in wanted.values() for file, url in files.items() if url}
    if inputs:  # own texts need no internet
        inputs[vocab_path] = VOCAB
    for file, url in inputs.items():
        if force and url.startswith((NCBI, UNIPROT, GO_CURRENT)):
            file.unlink(missing_ok=True)
        if url == NCBI:
            fetch_summaries(file)
        else:
            download(url, file)


def write_annotations(path, space, wanted):
    """Read the wanted sources, and write annotations.h5 anew: these, and the others that it has already."""
    with locked(path), write_h5(path, made_from({"space": space}, {})) as new:
        if recorded_made_from(path):  # neither missing nor damaged
            with h5py.File(path, "r") as old:
                for source in set(old) - set(wanted):
                    old.copy(source, new)
        for source, (options, files, read) in wanted.items():
            texts, terms = read(*files)
            if not texts:
                sys.exit(f"error: {source}: no gene with a text in {' and '.join(map(str, files))}")
            group = new.create_group(source)
            group.attrs["made_from"] = source_made_from(path, source, options, files)
            if any(files.values()):
                group.attrs["source_urls"] = list(files.values())
            write_strings(group, "genes", texts)
            write_strings(group, "text", texts.values())
            if terms:
                write_strings(group, "terms", itertools.chain(*terms.values()))
                group["term_offsets"] = np.cumsum([0, *map(len, terms.values())])
            print(f"{source}: {len(texts):,} genes with text")


def in_order(sources):
    """The paper's sources in the paper's order, then the user's own."""
    return [source for source in SOURCES if source in sources] + sorted(set(sources) - set(SOURCES))


def print_coverage(path, vocab_path):
    """Print each source's number of genes, and how many of them scGPT's vocabulary and the others have too,
    by exact symbol: the paper's Table 21."""
    with read_h5(path) as file:
        genes = {source: set(file[source]["genes"].asstr()[:]) for source in in_order(file)}
    columns = {"genes": set().union(*genes.values())}  # all, so that each source has its own number there
    if vocab_path.exists():
        columns["scGPT vocab"] = set(read_json(vocab_path, int))
    columns |= genes
    rows = [["", *columns]]
    for source, own in genes.items():
        rows.append([source, *(f"{len(own & other):,}" for other in columns.values())])
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))


def draw_coverage(path, figure_path, title):
    """Draw each source's number of genes, and each GO category's 20 commonest terms (paper, Figures 4, 5)."""
    with read_h5(path) as file:
        panels = {"Genes with text": {source: len(file[source]["genes"]) for source in in_order(file)}}
        for source, category in GO_CATEGORIES.items():
            if source in file:
                counts = collections.Counter(file[source]["terms"].asstr()[:])
                panels[f"{category}: commonest terms"] = dict(counts.most_common(20))

    n_bars = [len(bars) for bars in panels.values()]
    figure = new_figure(9, 0.9 * len(panels) + 0.2 * sum(n_bars), title)
    places = figure.subplots(len(panels), squeeze=False, height_ratios=n_bars)
    for axes, name, color in zip(places.flat, panels, COLORS):
        bars = axes.barh(list(panels[name]), list(panels[name].values()), color=color)
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
        axes.tick_params("y", labelsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.08)
        axes.set(title=name, xlabel="genes")
    save_figure(figure, figure_path)


# ----------------------------------------------------------------------------------------------------------

def parse_arguments():
    parser = common_options(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--source", nargs="+", choices=SOURCES, metavar="NAME",
                        help=f"any of {', '.join(SOURCES)} (default: all; with --tsv: none)")
    parser.add_argument("--go-release", default=PAPER_GO_RELEASE, metavar="DATE",
                        help="a release of the Gene Ontology, or current (default: %(default)s, the paper's)")
    parser.add_argument("--fresh", action="store_true",
                        help="build ncbi and ncbi+uniprot from NCBI's and UniProt's services, not from "
                             "released files (faster with NCBI_API_KEY in the environment)")
    parser.add_argument("--tsv", nargs="+", default=[], metavar="NAME=FILE",
                        help="your own texts as a source NAME: a file with the header gene<TAB>text")
    args = parser.parse_args()
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}|current", args.go_release):
        sys.exit(f"error: --go-release {args.go_release}: expected a date as {PAPER_GO_RELEASE}, or current")
    return args


def wanted_sources(args, space, raw):
    """The sources of this call: {name: (options that decide it, {input file: address or ""}, reader)}."""
    wanted = {}
    for item in args.tsv:
        name, _, file = item.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in SOURCES or not file:
            sys.exit(f"error: --tsv {item}: expected NAME=FILE, a new NAME of letters, digits and '_'")
        if not Path(file).exists():
            sys.exit(f"error: --tsv {item}: {file} does not exist")
        wanted[name] = {"tsv": True}, {Path(file): ""}, read_tsv
    for source in args.source or ([] if args.tsv else SOURCES):
        if space == "demo":
            wanted[source] = {"demo": 1}, {}, functools.partial(demo_texts, source)
        else:
            wanted[source] = human_source(source, args.go_release, args.fresh, raw)
    return wanted


def main():
    args = parse_arguments()
    space = space_of(args.dataset)
    path = args.root / "data" / space / "annotations.h5"
    figure_path = path.with_suffix(".png")
    vocab_path = path.parent / "scgpt" / "vocab.json"
    wanted = wanted_sources(args, space, path.parent / "raw")

    stale = {source: wanted[source] for source, (options, files, _) in wanted.items()
             if not is_current(path, source_made_from(path, source, options, files), args.force, source)}
    if stale:
        figure_path.unlink(missing_ok=True)  # drawn again by the next run if this one ends before it
        fetch_inputs(stale, vocab_path, args.force)
        write_annotations(path, space, stale)
    if not figure_path.exists():
        title = "SYNTHETIC: invented genes and processes" if space == "demo" else "Human genes"
        print(f"{title}: how many have a text, and how many are in the other lists too")
        print_coverage(path, vocab_path)
        draw_coverage(path, figure_path, title)
        print(f"wrote {path} and {figure_path}")

    own_texts = ["--source", *wanted, "--embedder", "lsa"] if args.tsv and not args.source else []
    print("next: " + command("02_embed.py", args, *own_texts))


# ----------------------------------------------------------------------------------------------------------
# Shared by all stages: command line

# Datasets that GEARS hosts, as `download` takes them: stage 03 downloads them
DATAVERSE = "https://dataverse.harvard.edu/api/access/datafile/"
HOSTED = {"norman": {"url": DATAVERSE + "6154020", "size": 168_758_985},
          "adamson": {"url": DATAVERSE + "6154417"},
          "dixit": {"url": DATAVERSE + "6154416"},
          "replogle_k562_essential": {"url": DATAVERSE + "7458695"},
          "replogle_rpe1_essential": {"url": DATAVERSE + "7458694"}}


def run(main):
    """Call a stage's `main`. A user's errors end in a line and exit code 1, our mistakes in a traceback."""
    signals = []  # Ctrl-C within HDF5 can come out as any exception

    def on_interrupt(number, _):
        signals.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, on_interrupt)
    if hasattr(sys.stdout, "reconfigure"):  # a log that can be watched, on consoles without Δ and ± too
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        main()
    except BaseException as error:
        if signals:
            print("interrupted; the same command goes on from what is already on disk", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)  # at once: HDF5 would complain of what it has open
        if isinstance(error, OSError):
            place = f"{error.filename}: " if error.filename else ""
            hint = "; choose another folder with --root" if isinstance(error, PermissionError) else ""
            sys.exit(f"error: {place}{error.strerror or error}{hint}")
        # torch raises a RuntimeError where memory runs out
        words = str(error) if isinstance(error, RuntimeError) else ""
        if isinstance(error, MemoryError) or re.search("memory.*alloc|alloc.*memory", words, re.S):
            sys.exit("error: not enough memory; lower --cells-at-once (04), --batch-size or "
                     "--genes-per-batch")
        raise


def common_options(parser):
    """Add the options that every stage has in the same words."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "python %(prog)s [options]"  # short: the examples come first
    parser.error = lambda message: sys.exit(f"error: {message} (options: python {parser.prog} --help)")
    parser.add_argument("--dataset", default="demo",
                        help=f"demo, {', '.join(HOSTED)}, or a name of your own (default: demo)")
    parser.add_argument("--root", type=Path, default=Path("."), metavar="DIR",
                        help="the folder that holds data/, runs/ and results/ (default: the current folder)")
    parser.add_argument("--force", action="store_true", help="do it again even if the output is there")
    return parser


def positive(text):
    """A whole number above 0 on the command line (the type of an argparse option)."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError("has to be above 0")
    return int(text)


def seed(text):
    """A seed on the command line (the type of an argparse option)."""
    if not 0 <= int(text) < 2**32:
        raise ValueError
    return int(text)


def check_name(name, what):
    """Return a name that becomes part of a path; it has to be of letters, digits, `_`, `-` and `+`."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_+-]*", name):
        sys.exit(f"error: {what} {name!r}: use letters, digits, '_', '-' and '+' only")
    return name


def space_of(dataset):
    """The space (set of genes with texts) of a dataset: `demo` for the demo, `human` for every other."""
    return "demo" if check_name(dataset, "--dataset") == "demo" else "human"


def command(script, args, *words):
    """A command line to paste, with the --dataset and --root of this call."""
    dataset = [] if args.dataset == "demo" else ["--dataset", args.dataset]
    root = [] if args.root == Path(".") else ["--root", str(args.root)]
    return shlex.join(["python", script, *dataset, *map(str, words), *root])


def shown(names, most=8):
    """The first names of a list, for a message."""
    return ", ".join(str(name)[:100] for name in names[:most]) + (", ..." if len(names) > most else "")


# ----------------------------------------------------------------------------------------------------------
# Shared by all stages: output files, which appear whole or not at all, and what they were made from

FORMAT_VERSION = 1


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; it becomes `path` at the end, and nobody sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # an error of a full disk names no file
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file (UTF-8) whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def write_h5(path, made):
    """Yield a new HDF5 file with its provenance; it becomes `path` when the block ends without an error."""
    # HDF5 crashes on a full disk when it writes itself; with a file of Python's it is an OSError
    with replacing(path) as partial, open(partial, "w+b") as target, h5py.File(target, "w") as file:
        file.attrs.update(provenance(made))
        yield file


def write_strings(group, name, strings):
    """Write a dataset of UTF-8 text."""
    group.create_dataset(name, data=list(strings), dtype=h5py.string_dtype())


@contextlib.contextmanager
def locked(path):
    """Make the folder of `path`, and let one process at a time into the block."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        yield


@contextlib.contextmanager
def read_h5(path, made_by=None):
    """Yield an HDF5 file for reading. One that is missing or damaged, keeps data in other files, or lacks
    what the block looks for, ends the run in one line.

    made_by: the command that makes the file, for the message.
    """
    if made_by and not Path(path).exists():
        sys.exit(f"error: {path} does not exist; run first: {made_by}")
    try:
        with h5py.File(path, "r") as file:
            refuse_other_files(file)
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        cause = " ".join(str(error).split())
        remedy = f"make it again: {made_by} --force" if made_by else "get it again from its source"
        sys.exit(f"error: {path}: not an HDF5 file, or a damaged one ({cause}); {remedy}")


def refuse_other_files(file):
    """Raise OSError if an HDF5 file has links to other files or keeps data in them."""
    def lies_elsewhere(name, item):
        is_data_elsewhere = isinstance(item, h5py.Dataset) and (item.is_virtual or item.external)
        return name if is_data_elsewhere or isinstance(item, h5py.ExternalLink) else None
    found = file.visititems_links(lies_elsewhere) or file.visititems(lies_elsewhere)
    if found:
        raise OSError(f"{found} lies in another file")


def checksum(path, algorithm="sha256"):
    """The SHA-256 (or `md5`) of a file, in hexadecimal."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(path, group="/"):
    """A text that changes when the content of an input file does.

    The kit's own HDF5 files (or a group of one): the SHA-256 of what they were made from, the same for a copy
    and when made again. Others: the SHA-256 of their bytes; over 256 MB their size, and the SHA-256 of the
    download.
    """
    if made := recorded_made_from(path, group):
        return hashlib.sha256(f"{FORMAT_VERSION} {made}".encode()).hexdigest()
    n_bytes = Path(path).stat().st_size
    if n_bytes <= 256 * 2**20:
        return checksum(path)
    found = Path(f"{path}.sha256")  # written by `download`
    return f"{n_bytes} bytes" + (f", SHA-256 {found.read_text()[:64]}" if found.exists() else "")


def recorded_made_from(path, group="/"):
    """`made_from` of one of the kit's HDF5 files (or of a group of it); None for others and damaged ones."""
    with contextlib.suppress(OSError, RuntimeError, KeyError):
        with h5py.File(path, "r") as file:
            return file[group].attrs.get("made_from")


def made_from(options, inputs):
    """All that an output depends on, as JSON text: options {name: value} and inputs {name: fingerprint}."""
    return json.dumps({"options": options, "inputs": inputs}, sort_keys=True)


def provenance(made):
    """The attributes of an output file: format, command line, date, library versions, options and inputs."""
    loaded = [name for name in ("numpy", "scipy", "h5py", "torch") if name in sys.modules]
    versions = {"python": sys.version.split()[0], **{name: sys.modules[name].__version__ for name in loaded}}
    date = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"format_version": FORMAT_VERSION, "command": shlex.join(sys.argv), "made_from": made,
            "date": date, "versions": json.dumps(versions)}


def is_current(path, made, force, group="/"):
    """Whether an HDF5 file (or a group of it) was made from exactly this. Prints that, or what differs."""
    if force:
        return False
    old = recorded_made_from(path, group)
    label = str(path) if group == "/" else f"{path} {group}"
    if old == made:
        print(f"{label}: there already, from the same inputs and options (--force makes it again)")
    elif old is not None:
        print(f"{label}: stale, making it again ({difference(json.loads(old), json.loads(made))})")
    return old == made


def difference(old, new):
    """How two {"options": {...}, "inputs": {...}} differ, in words."""
    words = []
    for kind in ("options", "inputs"):
        for name in sorted(old[kind].keys() | new[kind].keys()):
            before, now = old[kind].get(name), new[kind].get(name)
            if before != now:
                words.append(f"{name} was {before}, now {now}" if kind == "options" else f"{name} changed")
    return "; ".join(words)


# ----------------------------------------------------------------------------------------------------------
# Shared by all stages: downloads

TIMEOUT = 60   # seconds without a byte after which a connection counts as dead
TRIES = 6      # in a row that bring no new bytes
BACKOFF = 1    # seconds of the first wait between tries; each later one is twice as long


def mirrored(url):
    """`url`, or its place on the mirror that SCGENEPT_MIRROR names."""
    mirror = os.environ.get("SCGENEPT_MIRROR")
    return f"{mirror.rstrip('/')}/{url.split('://', 1)[1]}" if mirror else url


def address(url):
    """Where `url` is asked for, to be printed: without a password."""
    return re.sub(r"//[^/@]*@", "//", mirrored(url))


def by_hand(path):
    """What to do where a program gets no file but a person may: no internet here, a login, a captcha."""
    return f"; download it with a browser, save it as {path} and run the same command again"


def request(url, path=None, method="GET", **options):
    """The response to a request, open for streaming. Anything but a good one ends the run in one line.

    Failed connections and busy servers are tried again, after waits that double or that the server asks for.
    path: where a file that the server refuses can be put by hand.
    """
    retry = urllib3.Retry(TRIES - 1, backoff_factor=BACKOFF, status_forcelist=(429, 500, 502, 503, 504),
                          allowed_methods=None, raise_on_status=False)
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
    session.headers.update({"User-Agent": "scgenept-kit/1", "Accept-Encoding": "identity"})
    try:
        response = session.request(method, mirrored(url), stream=True, timeout=TIMEOUT, **options)
    except requests.RequestException as error:
        cause = error
        while cause.__context__:  # the innermost reason; the outer ones quote the whole address
            cause = cause.__context__
        advice = by_hand(path) if path else "; the same command goes on from here"
        sys.exit(f"error: {address(url)}: {cause}{advice}")

    is_page = "text/html" in response.headers.get("Content-Type", "")
    if response.status_code in (200, 206, 416) and not is_page:
        return response
    cause = f"{response.status_code} {response.reason}" + (", a web page" if is_page else "")
    sys.exit(f"error: {address(url)}: {cause}" + (by_hand(path) if path else ""))


def download(url, path, size=None, md5=None):
    """Download `url` to `path`, unless it is there already, and return the path. Failure ends the run.

    The bytes go to `<path>.part`, where a later try or run goes on if the server still has the same file.
    Once it is whole and has the size and checksum that are known of it, it becomes `path`. `<path>.sha256`
    keeps its SHA-256.
    """
    path = Path(path)
    if path.exists():
        return path
    with locked(path):
        if path.exists():  # another process was faster
            return path
        print(f"downloading {address(url)}")
        part = Path(f"{path}.part")
        n_tries, n_most = 0, 0
        while not fetch_rest(url, path, part, size):
            n_tries += 1
            if part.stat().st_size > n_most:
                n_tries, n_most = 1, part.stat().st_size
            if n_tries == TRIES:
                sys.exit(f"error: {address(url)}: the connection broke; the same command goes on from here")
            time.sleep(BACKOFF * 2 ** (n_tries - 1))

        found = checksum(part)
        wrong = what_is_wrong(part, size, md5)
        Path(f"{part}.etag").unlink()
        if wrong:
            part.unlink()
            sys.exit(f"error: {address(url)}: {wrong}" + by_hand(path))
        write_text(f"{path}.sha256", f"{found}  {path.name}\n")
        os.replace(part, path)
    print(f"downloaded {path} ({path.stat().st_size:,} bytes, SHA-256 {found})")
    return path


def fetch_rest(url, path, part, size):
    """Append to `part` what it lacks of the file at `url`. Returns whether it is whole now."""
    etag = Path(f"{part}.etag")  # which version of the file `part` is from: the server's ETag, or its date
    version = etag.read_text() if etag.exists() and part.exists() else ""
    n_have = part.stat().st_size if version else 0
    headers = {"Range": f"bytes={n_have}-", "If-Range": version} if n_have else {}
    with request(url, path, headers=headers) as response:
        status, content_range = response.status_code, response.headers.get("Content-Range", "")
        if status == 200:  # the whole file
            n_have = 0
        elif status != 206 or not content_range.startswith(f"bytes {n_have}-"):
            part.write_bytes(b"")  # not the bytes that were asked for: start again
            return False

        length = response.headers.get("Content-Length", "")
        total = n_have + int(length) if length.isdigit() else size
        try:
            with open(part, "ab" if n_have else "wb") as file, tqdm.wrapattr(
                    file, "write", total, initial=n_have, desc=path.name, disable=None) as target:
                etag.write_text(response.headers.get("ETag") or response.headers.get("Last-Modified", ""))
                shutil.copyfileobj(response.raw, target)
        except urllib3.exceptions.HTTPError:
            return False
        except OSError as error:
            sys.exit(f"error: {path}: {error.strerror}; the same command goes on from here")
    return total is None or part.stat().st_size >= total


def what_is_wrong(path, size, md5):
    """Why a finished download is not the file that was wanted, or ""."""
    n_bytes = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(1000)
    if not head:
        return "an empty file"
    if is_html(head):
        return "a web page, not the file"
    if size and n_bytes != size:
        return f"{n_bytes:,} bytes, expected {size:,}"
    if md5 and checksum(path, "md5") != md5:
        return f"another file than expected (MD5 {md5})"
    return ""


def is_html(head):
    """Whether bytes begin a web page (an error page, a login form) instead of a data file."""
    return head.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith((b"<!doctype html", b"<html"))


# ----------------------------------------------------------------------------------------------------------
# Shared by all stages: figures

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")  # of Okabe and Ito
GREY = "#999999"


def new_figure(width, height, title):
    """An empty figure (inches) that needs no display."""
    import matplotlib.figure  # here, since most runs draw nothing and it takes half a second
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is no formula
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    lines = [textwrap.fill(line, int(11 * width), break_on_hyphens=False) for line in title.splitlines()]
    figure.suptitle("\n".join(lines), fontsize="medium")
    return figure


def save_figure(figure, path):
    """Write a figure as PNG, whole or not at all."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


if __name__ == "__main__":
    run(main)
