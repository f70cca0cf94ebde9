"""Stage 01: what the literature says of each gene -> data/<space>/annotations.h5

    python 01_fetch_annotations.py                                         the demo's synthetic texts, no internet
    python 01_fetch_annotations.py --dataset norman                        human genes, all six sources of the paper
    python 01_fetch_annotations.py --dataset norman --source go_c --go-release current
    python 01_fetch_annotations.py --dataset norman --source ncbi --fresh  from NCBI itself, as of today
    python 01_fetch_annotations.py --dataset mine --tsv notes=notes.tsv    your own texts: a header gene<TAB>text, a line per gene

Each source is a group of the file: `genes` (N) and `text` (N); the GO sources also have `terms` (M) and `term_offsets`
(N + 1), each gene's terms one by one. Sources that are in the file already stay there. Downloads for human genes are kept
in data/human/raw/; annotations.png shows how many genes each source covers.

What all stages share (output files, provenance, downloads, figures, command line) stands at the end of this file.
"""
import argparse
import contextlib
import datetime
import functools
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import requests
import urllib3
from filelock import FileLock
from tqdm import tqdm

SOURCES = ("ncbi", "ncbi+uniprot", "go_f", "go_c", "go_p", "go_all")
GO_PREFIX = {"go_f": "Molecular Function", "go_c": "Cellular Component", "go_p": "Biological Process"}
GO_ASPECT = {"F": "go_f", "C": "go_c", "P": "go_p"}
PAPER_GO_RELEASE = "2024-01-17"

BUCKET = "https://czi-scgenept-public.s3.amazonaws.com/models/gene_embeddings/gene_annotations"
RELEASED = {"ncbi": f"{BUCKET}/NCBI_summary_of_genes.json",
            "ncbi+uniprot": f"{BUCKET}/NCBI_UniProt_summary_of_genes.json"}
GO_DATED, GO_CURRENT = "https://release.geneontology.org", "https://current.geneontology.org"
VOCAB = "https://czi-scgenept-public.s3.amazonaws.com/models/pretrained/scgpt/vocab.json"
NCBI = "https://eutils.ncbi.nlm.nih.gov/entrez/eutils"
UNIPROT = ("https://rest.uniprot.org/uniprotkb/stream?compressed=true&format=tsv&fields=gene_primary,cc_function"
           "&query=%28organism_id%3A9606%29%20AND%20%28reviewed%3Atrue%29")


# ---------------------------------------------------------------------------------------------------------------------
# The demo's genes: invented, with texts that name the invented processes each gene takes part in

SYNTHETIC = "SYNTHETIC: invented genes and processes"
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

    Every gene takes part in one or two processes, and every process has equally many genes. Stage 03 simulates cells
    from the same array.
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
    """The synthetic texts of one source: genes, texts, and for GO each gene's terms (else None)."""
    genes, takes_part = demo_genes()
    names = list(DEMO_PROCESSES)
    processes = [[names[p] for p in np.flatnonzero(row)] for row in takes_part]
    functions = [[DEMO_PROCESSES[name][0] for name in of_gene] for of_gene in processes]
    components = [[DEMO_PROCESSES[name][1] for name in of_gene] for of_gene in processes]

    if source in ("ncbi", "ncbi+uniprot"):
        texts = [f"Gene Symbol {gene} This synthetic gene takes part in {' and in '.join(of_gene)}."
                 for gene, of_gene in zip(genes, processes)]
        if source == "ncbi+uniprot":
            texts = [f"{text} Protein summary: Has {' and '.join(of_gene)}."
                     for text, of_gene in zip(texts, functions)]
        return genes, texts, None

    terms = [dict(zip(GO_PREFIX, of_gene)) for of_gene in zip(functions, components, processes)]
    return genes, *go_texts(source, terms)


def go_texts(source, terms):
    """Texts and terms of one GO source, or of all three in a row, from {source: [term, ...]} of each gene.

    A text reads `Molecular Function: term, term; Cellular Component: term; Biological Process: term`.
    """
    parts = list(GO_PREFIX) if source == "go_all" else [source]
    texts = ["; ".join(f"{GO_PREFIX[part]}: {', '.join(of_gene[part])}" for part in parts if of_gene[part])
             for of_gene in terms]
    return texts, [[term for part in parts for term in of_gene[part]] for of_gene in terms]


# ---------------------------------------------------------------------------------------------------------------------
# Readers: each returns genes, texts, and for GO each gene's terms (else None). A broken file ends the run in one line.

def read_lines(path):
    """Yield (number, line) of a UTF-8 text file, gzipped or not."""
    with open(path, "rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    number = 0
    try:
        with (gzip.open if is_gzip else open)(path, "rt", encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, 1):
                if number == 1 and is_html(line.encode()):
                    sys.exit(f"error: {path}: a web page, not the file; delete it and get the file again")
                yield number, line.rstrip("\r\n")
    except UnicodeDecodeError:
        sys.exit(f"error: {path}, line {number + 1}: not UTF-8 text")
    except (EOFError, gzip.BadGzipFile, gzip.zlib.error) as error:
        sys.exit(f"error: {path}, line {number + 1}: damaged gzip file ({error}); delete it and get it again")


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
    """Genes and texts of a tab-separated file with the header gene<TAB>text; each gene stands once.

    A gene without a text is left out, with a line that says so.
    """
    texts, without_text = {}, []
    for number, line in read_lines(path):
        fields = line.split("\t")
        if number == 1:
            if fields != ["gene", "text"]:
                sys.exit(f"error: {path}: the first line has to be gene<TAB>text")
            continue
        if not line.strip():
            continue
        gene, text = fields[0].strip(), "".join(fields[1:]).strip()
        if len(fields) > 2 or not gene:
            sys.exit(f"error: {path}, line {number}: expected a gene, a tab and a text")
        if gene in texts:
            sys.exit(f"error: {path}, line {number}: gene {gene!r} stands here a second time")
        if text:
            texts[gene] = text
        else:
            without_text.append(gene)
    if without_text:
        print(f"{path}: {len(without_text):,} genes without a text left out: {shown(without_text)}")
    if not texts:
        sys.exit(f"error: {path}: no gene with a text in it")
    return list(texts), list(texts.values()), None


def read_released(path):
    """Genes and texts of a released JSON file: an object of symbol -> text."""
    texts = {gene: text for gene, text in read_json(path, str).items() if gene and text.strip()}
    if not texts:
        sys.exit(f"error: {path}: no gene with a text in it")
    return list(texts), list(texts.values()), None


def read_obo(path):
    """The terms of an OBO file: names in force {id: name}, old ids {id: its id now}, and the set of obsolete ids."""
    names, id_now, obsolete = {}, {}, set()
    in_term, term = False, None
    for number, line in read_lines(path):
        if line.startswith("["):
            in_term, term = line == "[Term]", None
        elif in_term and line:
            key, colon, value = line.partition(": ")
            if not colon or (key != "id" and term is None):
                sys.exit(f"error: {path}, line {number}: expected 'tag: value', a term's id first, not {line[:60]!r}")
            if key == "id":
                term = value
            elif key == "name":
                names[term] = value
            elif key == "alt_id":
                id_now[value] = term
            elif key == "is_obsolete" and value == "true":
                obsolete.add(term)
    if not names:
        sys.exit(f"error: {path}: no [Term] in it: not an OBO file")
    return {term: name for term, name in names.items() if term not in obsolete}, id_now, obsolete


@functools.lru_cache(maxsize=1)  # read once for all GO sources of a call
def read_annotations(gaf, obo):
    """What human genes are annotated with in a GAF 2 file: {gene: {source: {term id: term name}}}, in file order.

    Left out: negated annotations (NOT), those that say there is no data (ND), other species, obsolete terms.
    """
    names, id_now, obsolete = read_obo(obo)
    found = {source: {} for source in GO_PREFIX}
    n_unknown = 0
    for number, line in read_lines(gaf):
        if not line or line.startswith("!"):
            continue
        columns = line.split("\t")
        if not 15 <= len(columns) <= 17 or not columns[2] or columns[8] not in GO_ASPECT:
            sys.exit(f"error: {gaf}, line {number}: not a line of a GAF 2 file: {line[:60]!r}")
        gene, qualifiers, term, evidence, aspect, taxa = (columns[i] for i in (2, 3, 4, 6, 8, 12))
        if "NOT" in qualifiers.split("|") or evidence == "ND" or taxa.split("|")[0] != "taxon:9606":
            continue
        term = id_now.get(term, term)
        if term in names:
            found[GO_ASPECT[aspect]].setdefault(gene, {})[term] = names[term]
        elif term not in obsolete:
            n_unknown += 1
    if not any(found.values()):
        sys.exit(f"error: {gaf}: no annotation of a human gene with a term of {obo}")
    if n_unknown:
        print(f"{gaf}: {n_unknown:,} annotations left out, since {obo} does not have their terms")
    return found


def read_go(source, gaf, obo):
    """Genes, texts and terms of one GO source, or of all three in a row."""
    found = read_annotations(gaf, obo)
    parts = list(GO_PREFIX) if source == "go_all" else [source]
    genes = list(dict.fromkeys(gene for part in parts for gene in found[part]))
    terms = [{part: list(found[part].get(gene, {}).values()) for part in parts} for gene in genes]
    return genes, *go_texts(source, terms)


# ---------------------------------------------------------------------------------------------------------------------
# Human genes: the released texts, or fresh ones from NCBI and UniProt in the same form

def ask_ncbi(tool, take, **params):
    """What `take` finds in the JSON answer of one of NCBI's E-utilities.

    An overloaded service answers in another form: it is asked again. The parameters travel in the body of the request,
    so that no error message quotes the key.
    """
    key = os.environ.get("NCBI_API_KEY")
    params |= {"db": "gene", "retmode": "json"}
    if key:
        params["api_key"] = key
    url = f"{NCBI}/{tool}.fcgi"
    for attempt in range(TRIES):
        time.sleep(0.11 if key else 0.34)  # ten or three requests a second are allowed
        with request(url, method="POST", data=params) as response:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return take(response.json())
        time.sleep(BACKOFF * 2 ** attempt)
    sys.exit(f"error: {address(url)}: not the answer that was asked for; the same command goes on from here")


def fetch_summaries(path):
    """Symbol and summary of every human gene, from NCBI, as lines of JSON [gene id, symbol, summary].

    Each page of 500 genes is on disk (in `<path>.part`) before the next is asked for: an interrupted run goes on there.
    """
    def take_search(answer):
        found = answer["esearchresult"]
        return int(found["count"]), {"query_key": found["querykey"], "WebEnv": found["webenv"]}

    def take_genes(answer):
        genes = answer["result"]
        return [[i, genes[i].get("name", ""), genes[i].get("summary", "")] for i in genes["uids"]]

    part = Path(f"{path}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{path}.lock"):
        if path.exists():
            return
        n_genes, history = ask_ncbi("esearch", take_search, term="9606[taxid] AND alive[prop]", usehistory="y", retmax=0)

        # The first line says how many genes were found: the pages of another search cannot be continued
        header = json.dumps({"n_genes": n_genes}) + "\n"
        lines = part.read_text(encoding="utf-8").splitlines(keepends=True) if part.exists() else []
        if lines[:1] != [header]:
            lines = [header]
        elif not lines[-1].endswith("\n"):  # cut off when the run was killed
            lines.pop()
        part.write_text("".join(lines), encoding="utf-8")

        n_done = len(lines) - 1
        with open(part, "a", encoding="utf-8") as file, \
                tqdm(desc=path.name, total=n_genes, initial=n_done, unit=" genes", disable=None) as progress:
            while n_done < n_genes:
                genes = ask_ncbi("esummary", take_genes, **history, retstart=n_done, retmax=500)
                if not genes:
                    sys.exit(f"error: {address(NCBI)}: no genes after the first {n_done:,} of {n_genes:,}")
                file.writelines(json.dumps(gene) + "\n" for gene in genes)
                file.flush()
                n_done += len(genes)
                progress.update(len(genes))
        os.replace(part, path)
    print(f"downloaded {path} ({n_genes:,} genes)")


def read_fresh(summaries, uniprot=None):
    """Genes and texts in the released form, from what fetch_summaries wrote and UniProt's table of names and functions.

    A gene that neither says anything about is left out.
    """
    texts = {}
    for number, line in read_lines(summaries):
        if number > 1:  # the first line is the number of genes
            _, gene, summary = json.loads(line)
            if gene and summary:
                texts.setdefault(gene, f"Gene Symbol {gene} {summary}")

    functions = {}
    for number, line in read_lines(uniprot) if uniprot else ():
        columns = line.split("\t")
        if len(columns) != 2 or number == 1 and line.lower() != "gene names (primary)\tfunction [cc]":
            sys.exit(f"error: {uniprot}, line {number}: not UniProt's table of primary gene names and functions")
        genes, function = columns
        function = re.sub(r" ?\{ECO:[^}]*\}\.?", "", function.replace("FUNCTION: ", ""))  # without codes of evidence
        if number > 1 and function:
            for gene in filter(None, genes.split("; ")):
                functions.setdefault(gene, []).append(function)
    for gene, of_gene in functions.items():
        texts[gene] = f"{texts.get(gene, f'Gene Symbol {gene}')} Protein summary: {' '.join(of_gene)}"
    return list(texts), list(texts.values()), None


def human_source(source, release, fresh, raw):
    """Where the texts of a human source come from: the options that decide them, {file: address}, and their reader."""
    if source in RELEASED and not fresh:
        path = raw / RELEASED[source].rsplit("/", 1)[1]
        return {"fresh": False}, {path: RELEASED[source]}, lambda: read_released(path)
    if source in RELEASED:
        files = {raw / "ncbi_fresh.jsonl": NCBI}
        if source == "ncbi+uniprot":
            files[raw / "uniprot_fresh.tsv.gz"] = UNIPROT
        return {"fresh": True}, files, lambda: read_fresh(*files)
    site = GO_CURRENT if release == "current" else f"{GO_DATED}/{release}"
    gaf, obo = raw / f"goa_human.{release}.gaf.gz", raw / f"go-basic.{release}.obo"
    files = {gaf: f"{site}/annotations/goa_human.gaf.gz", obo: f"{site}/ontology/go-basic.obo"}
    return {"go_release": release}, files, lambda: read_go(source, gaf, obo)


# ---------------------------------------------------------------------------------------------------------------------
# annotations.h5

def source_made_from(path, source, options, files):
    """`made_from` of a source. A file that was downloaded and has been deleted since counts as what it was."""
    recorded = json.loads(recorded_made_from(path, source) or '{"inputs": {}}')["inputs"]
    inputs = {file.name: fingerprint(file) if file.exists() else recorded.get(file.name) for file in files}
    return made_from(options, inputs)


def collect(wanted, force):
    """Download what the wanted sources need and read it: {source: (genes, texts, terms)}."""
    changing = {file for options, files, _ in wanted.values() for file in files
                if options.get("fresh") or options.get("go_release") == "current"}
    if force:  # what a service says today may differ from the last time
        for file in changing:
            file.unlink(missing_ok=True)
    texts = {}
    for source, (_, files, read) in wanted.items():
        for file, url in files.items():
            if url == NCBI:
                fetch_summaries(file)
            elif url:
                download(url, file)
        texts[source] = read()
    return texts


def write_annotations(path, space, wanted, texts):
    """Write annotations.h5 anew: the sources in `texts`, and those it has already."""
    with FileLock(f"{path}.lock"), write_h5(path, made_from({"space": space}, {})) as new:
        if recorded_made_from(path):  # neither missing nor damaged
            with read_h5(path) as old:
                for source in set(old) - set(texts):
                    old.copy(source, new)
        for source, (genes, of_genes, terms) in texts.items():
            options, files, _ = wanted[source]
            group = new.create_group(source)
            group.attrs["made_from"] = source_made_from(path, source, options, files)
            if any(files.values()):
                group.attrs["source_urls"] = list(files.values())
            write_strings(group, "genes", genes)
            write_strings(group, "text", of_genes)
            if terms is not None:
                write_strings(group, "terms", [term for of_gene in terms for term in of_gene])
                group["term_offsets"] = np.cumsum([0] + [len(of_gene) for of_gene in terms])
            print(f"{source}: {len(genes):,} genes with text{f' ({SYNTHETIC})' if space == 'demo' else ''}")


def in_order(sources):
    """The paper's sources in the paper's order, then the user's own."""
    return [source for source in SOURCES if source in sources] + sorted(set(sources) - set(SOURCES))


def print_coverage(path, vocab_path):
    """Print how many genes each source covers, and how many of them scGPT's vocabulary and each other source has too,
    by exact symbol: the paper's Table 21."""
    with read_h5(path) as file:
        genes = {source: set(file[source]["genes"].asstr()[:]) for source in in_order(file)}
    others = dict(genes)
    if vocab_path.exists():
        others = {"scGPT vocab": set(read_json(vocab_path, int)), **others}
    width = max(map(len, genes))
    print(f"{'':{width}}    genes  " + "  ".join(f"{name:>{max(7, len(name))}}" for name in others))
    for source, own in genes.items():
        counts = [f"{len(own & other):>{max(7, len(name))},}" for name, other in others.items()]
        print(f"{source:{width}}  {len(own):>7,}  " + "  ".join(counts))


def draw_coverage(path, figure_path, title):
    """Draw how many genes each source covers, and the 20 commonest terms of each GO category (the paper's Figures 4, 5)."""
    panels = []  # (title, {label: count}, colour)
    with read_h5(path) as file:
        panels.append(("Genes with text", {s: len(file[s]["genes"]) for s in in_order(file)}, COLORS[0]))
        for source, color in zip(GO_PREFIX, COLORS[1:]):
            if source in file:
                terms, counts = np.unique(file[source]["terms"].asstr()[:].astype(str), return_counts=True)
                commonest = np.argsort(-counts, kind="stable")[:20]
                bars = dict(zip(terms[commonest], counts[commonest]))
                panels.append((f"{GO_PREFIX[source]}: commonest terms", bars, color))

    n_rows, n_columns = (len(panels) + 1) // 2, min(len(panels), 2)
    height = 5.5 * n_rows if len(panels) > 1 else 1.2 + 0.35 * len(panels[0][1])
    figure = new_figure(9 * n_columns, height, title)
    for i, (name, bars, color) in enumerate(panels):
        axes = figure.add_subplot(n_rows, n_columns, i + 1)
        drawn = axes.barh(range(len(bars)), list(bars.values()), color=color)
        axes.bar_label(drawn, [f"{count:,}" for count in bars.values()], padding=3, fontsize=8)
        labels = [label if len(label) < 60 else label[:57] + "..." for label in bars]
        axes.set_yticks(range(len(bars)), labels, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.08)
        axes.set(title=name, xlabel="genes")
    save_figure(figure, figure_path)


# ---------------------------------------------------------------------------------------------------------------------

def parse_arguments():
    parser = common_options(argparse.ArgumentParser(description=__doc__))
    parser.add_argument("--source", nargs="+", choices=SOURCES, metavar="NAME",
                        help=f"any of {', '.join(SOURCES)} (default: all; with --tsv: none)")
    parser.add_argument("--go-release", default=PAPER_GO_RELEASE, metavar="DATE",
                        help=f"a release of the Gene Ontology, or current (default: {PAPER_GO_RELEASE}, the paper's)")
    parser.add_argument("--fresh", action="store_true",
                        help="build ncbi and ncbi+uniprot from NCBI's and UniProt's services instead of the released files "
                             "(ten requests a second instead of three with NCBI_API_KEY in the environment)")
    parser.add_argument("--tsv", nargs="+", default=[], metavar="NAME=FILE",
                        help="your own texts as a source NAME: a file with the header gene<TAB>text")
    args = parser.parse_args()
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}|current", args.go_release):
        sys.exit(f"error: --go-release {args.go_release}: expected a date such as {PAPER_GO_RELEASE}, or current")
    return args


def wanted_sources(args, space, raw):
    """The sources of this call: {name: (options that decide it, {input file: its address or None}, reader)}."""
    wanted = {}
    for item in args.tsv:
        name, _, file = item.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in SOURCES or not file:
            sys.exit(f"error: --tsv {item}: expected NAME=FILE, NAME of letters, digits and '_', not one of {SOURCES}")
        if not Path(file).exists():
            sys.exit(f"error: --tsv {item}: {file} does not exist")
        wanted[name] = {"tsv": True}, {Path(file): None}, functools.partial(read_tsv, file)
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
        figure_path.unlink(missing_ok=True)  # it is drawn again even if this run is killed before it comes to that
        write_annotations(path, space, stale, collect(stale, args.force))
        if any(url for _, files, _ in stale.values() for url in files.values()):  # your own texts need no internet
            download(VOCAB, vocab_path)
    if not figure_path.exists():
        print_coverage(path, vocab_path)
        draw_coverage(path, figure_path, SYNTHETIC if space == "demo" else "Human genes")
        print(f"wrote {path} and {figure_path}")

    own_texts = ["--source", *wanted, "--embedder", "lsa"] if args.tsv and not args.source else []
    print("next: " + command("02_embed.py", args, *own_texts))


# ---------------------------------------------------------------------------------------------------------------------
# Shared by all stages: command line

HOSTED = ("norman", "adamson", "dixit", "replogle_k562_essential", "replogle_rpe1_essential")  # stage 03 downloads these


def run(main):
    """Call a stage's `main`: what a user can cause ends in one line and exit code 1, our own mistakes in a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a log that can be watched, on consoles without Δ and ± too
        sys.stdout.reconfigure(line_buffering=True, errors="replace")
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from what is already on disk")
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        hint = "; choose another folder with --root" if isinstance(error, PermissionError) else ""
        sys.exit(f"error: {place}{error.strerror or error}{hint}")
    except (MemoryError, RuntimeError) as error:
        is_full = isinstance(error, MemoryError) or ("memory" in str(error) and "alloc" in str(error))  # the latter: torch's
        if not is_full:
            raise
        sys.exit("error: not enough memory; lower --batch-size or --genes-per-batch, or keep fewer genes in stage 03")


def common_options(parser):
    """Add the options that every stage has in the same words."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = "python %(prog)s [options]"  # short: the examples come first
    parser.error = lambda message: sys.exit(f"error: {message} (python {parser.prog} --help lists the options)")
    parser.add_argument("--dataset", default="demo",
                        help=f"demo, {', '.join(HOSTED)}, or a name of your own (default: demo)")
    parser.add_argument("--root", type=Path, default=Path("."), metavar="DIR",
                        help="the folder that holds data/, runs/ and results/ (default: the current folder)")
    parser.add_argument("--force", action="store_true", help="do it again even if the output is there")
    return parser


def seed(text):
    """A seed on the command line (the type of an argparse option)."""
    if not 0 <= int(text) < 2**32:
        raise ValueError
    return int(text)


def check_name(name, what):
    """Return a name that becomes part of a path; end the run unless it is letters, digits, `_`, `-` and `+` only."""
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


# ---------------------------------------------------------------------------------------------------------------------
# Shared by all stages: output files, which appear whole or not at all, and what they were made from

FORMAT_VERSION = 1


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path` and rename it to `path` at the end: readers never see half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file (UTF-8) whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


@contextlib.contextmanager
def write_h5(path, made):
    """Yield a new HDF5 file with its provenance; it becomes `path` when the block ends without an error."""
    with replacing(path) as partial, h5py.File(partial, "w") as file:
        file.attrs.update(provenance(made))
        yield file


def write_strings(group, name, strings):
    """Write a dataset of UTF-8 text."""
    group.create_dataset(name, data=np.array(list(strings), dtype=object), dtype=h5py.string_dtype())


@contextlib.contextmanager
def read_h5(path, made_by=None):
    """Yield an HDF5 file for reading. One that is missing, damaged, or keeps data in other files ends the run in one line.

    made_by: the command that makes the file, for the message.
    """
    if made_by and not Path(path).exists():
        sys.exit(f"error: {path} does not exist; run first: {made_by}")
    try:
        with h5py.File(path, "r") as file:
            file.visititems_links(refuse_other_files)
            yield file
    except (OSError, RuntimeError, KeyError) as error:
        remedy = f"make it again: {made_by} --force" if made_by else "get it again from its source"
        sys.exit(f"error: {path}: not an HDF5 file, or a damaged one ({' '.join(str(error).split())}); {remedy}")


def refuse_other_files(name, link):
    """Raise OSError for a link to another file."""
    if isinstance(link, h5py.ExternalLink):
        raise OSError(f"{name} lies in another file")


def checksum(path, algorithm="sha256"):
    """The SHA-256 (or `md5`) of a file, in hexadecimal."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(path, group="/"):
    """What a file counts as when it is an input: the SHA-256 of what it was made from, for the kit's own HDF5 files (or a
    group of one); for others the SHA-256 of their bytes, or over 256 MB their size and the SHA-256 found at download."""
    if made := recorded_made_from(path, group):
        return hashlib.sha256(f"{FORMAT_VERSION} {made}".encode()).hexdigest()
    n_bytes = Path(path).stat().st_size
    if n_bytes <= 256 * 2**20:
        return checksum(path)
    found = Path(f"{path}.sha256")  # written by `download`
    return f"{n_bytes} bytes" + (f", SHA-256 {found.read_text()[:64]}" if found.exists() else "")


def recorded_made_from(path, group="/"):
    """`made_from` of one of the kit's HDF5 files (or of a group of it); None for any other file, or a damaged one."""
    with contextlib.suppress(OSError, RuntimeError, KeyError):
        with h5py.File(path, "r") as file:
            return file[group].attrs.get("made_from")


def made_from(options, inputs):
    """What decides an output, as JSON text: options {name: value} and inputs {name: fingerprint}."""
    return json.dumps({"options": options, "inputs": inputs}, sort_keys=True)


def provenance(made):
    """The attributes of an output file: format, command line, date, library versions, options and inputs."""
    modules = {name: sys.modules[name] for name in ("numpy", "scipy", "h5py", "torch") if name in sys.modules}
    versions = {"python": sys.version.split()[0], **{name: module.__version__ for name, module in modules.items()}}
    return {"format_version": FORMAT_VERSION, "command": shlex.join(sys.argv), "made_from": made,
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "versions": json.dumps(versions)}


def is_current(path, made, force, group="/"):
    """Whether an HDF5 file (or a group of it) was made from exactly this; says so, or why it has to be made again."""
    if force or not Path(path).exists():
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
    for name in sorted(old["options"].keys() | new["options"].keys()):
        before, now = old["options"].get(name), new["options"].get(name)
        if before != now:
            words.append(f"{name} was {before}, now {now}")
    for name in sorted(old["inputs"].keys() | new["inputs"].keys()):
        if old["inputs"].get(name) != new["inputs"].get(name):
            words.append(f"{name} changed")
    return "; ".join(words)


# ---------------------------------------------------------------------------------------------------------------------
# Shared by all stages: downloads

TIMEOUT = 60   # seconds without a byte after which a connection counts as dead
TRIES = 6      # in a row without getting any further
BACKOFF = 1    # seconds before the second try, doubled before each later one
TRY_AGAIN = (429, 500, 502, 503, 504)  # what a busy or broken server answers


def address(url):
    """`url`, or its place on the mirror that SCGENEPT_MIRROR names; without a password, so that it can be printed."""
    return re.sub(r"//[^/@]*@", "//", mirrored(url))


def mirrored(url):
    mirror = os.environ.get("SCGENEPT_MIRROR")
    return f"{mirror.rstrip('/')}/{url.split('://', 1)[1]}" if mirror else url


def request(url, path=None, method="GET", headers=None, **options):
    """The response to a request, open for streaming. Ends the run in one line on any but a good one.

    Failed connections and busy servers are tried again, after waits that double or that the server asks for. `path`: where
    a file that cannot be fetched has to be put by hand.
    """
    retry = urllib3.Retry(TRIES - 1, backoff_factor=BACKOFF, status_forcelist=TRY_AGAIN, allowed_methods=None,
                          raise_on_status=False)
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
    headers = {"User-Agent": "scgenept-kit/1", "Accept-Encoding": "identity", **(headers or {})}
    try:
        response = session.request(method, mirrored(url), headers=headers, stream=True, timeout=TIMEOUT, **options)
    except requests.RequestException as error:
        sys.exit(f"error: {address(url)}: {cause_of(error)}; the same command goes on from here")

    is_page = "text/html" in response.headers.get("Content-Type", "")
    if response.status_code in (200, 206, 416) and not is_page:
        return response
    cause = f"{response.status_code} {response.reason}" + (", a web page" if is_page else "")
    if response.status_code in TRY_AGAIN:
        sys.exit(f"error: {address(url)}: {cause}; the same command goes on from here")
    by_hand = f"; if a browser can download it, save it as {path} and run the same command again" if path else ""
    sys.exit(f"error: {address(url)}: {cause}{by_hand}")


def cause_of(error):
    """The innermost reason of a failed request, in one line; the outer ones quote the whole address."""
    while inner := next((e for e in (getattr(error, "reason", None), *error.args) if isinstance(e, Exception)), None):
        error = inner
    return re.sub(r"^\S*Connection\w*\(.*?\): ", "", " ".join(str(error).split()))


def download(url, path, size=None, sha256=None, md5=None):
    """Download `url` to `path`, unless it is there already, and return the path.

    The bytes go to `<path>.part`, where a later try or run goes on if the server still has the same file; it becomes `path`
    once it is whole and has the size and checksum that are known of it. Where none is, the SHA-256 found is written to
    `<path>.sha256`. Ends the run in one line on failure.
    """
    path = Path(path)
    part = Path(f"{path}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return path
    with FileLock(f"{path}.lock"):
        if path.exists():  # another process was faster
            return path
        print(f"downloading {address(url)}")
        n_tries, n_before = 0, 0
        while not fetch_rest(url, path, part, size):
            n_bytes = part.stat().st_size if part.exists() else 0
            n_tries = 1 if n_bytes > n_before else n_tries + 1
            n_before = n_bytes
            if n_tries == TRIES:
                sys.exit(f"error: {address(url)}: the connection keeps breaking off; the same command goes on from here")
            time.sleep(BACKOFF * 2 ** n_tries)

        found = checksum(part)
        wrong = what_is_wrong(part, found, size, sha256, md5)
        Path(f"{part}.etag").unlink(missing_ok=True)
        if wrong:
            part.unlink()
            sys.exit(f"error: {address(url)}: {wrong}; if a browser gets the right file, save it as {path}")
        if not sha256:
            write_text(f"{path}.sha256", f"{found}  {path.name}\n")
        os.replace(part, path)
    print(f"downloaded {path} ({path.stat().st_size:,} bytes, SHA-256 {found})")
    return path


def fetch_rest(url, path, part, size):
    """Append to `part` what it lacks of the file at `url`; whether it is whole now."""
    etag = Path(f"{part}.etag")  # which file the partial download belongs to: its ETag or date, as the server gave it
    n_have = part.stat().st_size if part.exists() and etag.exists() else 0
    headers = {"Range": f"bytes={n_have}-", "If-Range": etag.read_text()} if n_have else {}
    with request(url, path, headers=headers) as response:
        if response.status_code == 416:  # nothing after these bytes: the file is whole, or another one
            is_whole = response.headers.get("Content-Range", "") == f"bytes */{n_have}"
            if not is_whole:
                part.unlink(missing_ok=True)
            return is_whole
        if not response.headers.get("Content-Range", "").startswith(f"bytes {n_have}-"):
            n_have = 0  # the server sends the whole file
        length = response.headers.get("Content-Length")
        total = n_have + int(length) if length else None
        if total and total - n_have > shutil.disk_usage(part.parent).free:
            sys.exit(f"error: {path}: no room on the disk for {total / 1e6:,.0f} MB")
        if size and total not in (None, size):
            sys.exit(f"error: {address(url)}: the server's file has {total:,} bytes, expected {size:,}")

        version = response.headers.get("ETag", "W/")
        if version.startswith("W/"):  # a weak one does not promise the same bytes
            version = response.headers.get("Last-Modified", "")
        etag.write_text(version) if version else etag.unlink(missing_ok=True)
        try:
            with open(part, "ab" if n_have else "wb") as file, \
                    tqdm(desc=path.name, total=total, initial=n_have, unit="B", unit_scale=True, disable=None) as progress:
                for chunk in response.raw.stream(2**16, decode_content=False):
                    file.write(chunk)
                    progress.update(len(chunk))
        except (urllib3.exceptions.HTTPError, ConnectionError, TimeoutError):
            return False
    return total is None or part.stat().st_size == total


def what_is_wrong(path, found, size, sha256, md5):
    """Why a finished download is not the file that was wanted, or "". found: its SHA-256."""
    n_bytes = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(1000)
    if not head:
        return "an empty file"
    if is_html(head):
        return "a web page, not the file"
    if size and n_bytes != size:
        return f"{n_bytes:,} bytes, expected {size:,}"
    if sha256 and found != sha256:
        return f"SHA-256 {found}, expected {sha256}"
    if md5 and checksum(path, "md5") != md5:
        return f"MD5 {checksum(path, 'md5')}, expected {md5}"
    return ""


def is_html(head):
    """Whether bytes begin a web page (an error page, a login form) instead of a data file."""
    return head.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith((b"<!doctype html", b"<html"))


# ---------------------------------------------------------------------------------------------------------------------
# Shared by all stages: figures

COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")  # Okabe and Ito's, for the colour-blind
GREY = "#999999"


def new_figure(width, height, title):
    """An empty figure (inches) that needs no display."""
    import matplotlib.figure  # here, since most runs draw nothing and it takes half a second
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is no formula
    figure = matplotlib.figure.Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    return figure


def save_figure(figure, path):
    """Write a figure as PNG, whole or not at all."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


if __name__ == "__main__":
    run(main)
