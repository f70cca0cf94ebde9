"""Stage 01: the demo's texts, own texts, and human genes from a local server instead of the real ones."""
import gzip
import hashlib
import importlib
import json
import os
import shutil
from types import SimpleNamespace
from unittest import mock
from urllib.parse import parse_qs

import h5py
import numpy as np
import pytest
from conftest import full_disk, run_script, start_process
from server import Server

SCRIPT = "01_fetch_annotations.py"
shared = importlib.import_module("01_fetch_annotations")
KEY = "0123secret0123"
BUCKET = "/czi-scgenept-public.s3.amazonaws.com/models/gene_embeddings/gene_annotations/"
NCBI = BUCKET + "NCBI_summary_of_genes.json"
RELEASE = "/release.geneontology.org/2024-01-17/"
GAF, OBO = RELEASE + "annotations/goa_human.gaf.gz", RELEASE + "ontology/go-basic.obo"
CURRENT = "/current.geneontology.org/"
EUTILS, UNIPROT = "/eutils.ncbi.nlm.nih.gov/entrez/eutils/", "/rest.uniprot.org/uniprotkb/stream"

ONTOLOGY = """format-version: 1.2
ontology: go

[Term]
id: GO:0000981
name: DNA-binding transcription factor activity, RNA polymerase II-specific
namespace: molecular_function
alt_id: GO:0000999

[Term]
id: GO:0003677
name: DNA binding
namespace: molecular_function

[Term]
id: GO:0005634
name: nucleus
namespace: cellular_component

[Term]
id: GO:0006357
name: regulation of transcription by RNA polymerase II
namespace: biological_process

[Term]
id: GO:0006350
name: obsolete transcription
is_obsolete: true

[Typedef]
id: part_of
name: part of
"""


def annotation(gene, term, aspect, qualifier="enables", evidence="IDA", taxon="taxon:9606"):
    """A line of a GAF 2.2 file."""
    columns = ["UniProtKB", "P1", gene, qualifier, term, "PMID:1", evidence, "", aspect, "a name", "",
               "protein", taxon, "20240101", "UniProt", "", ""]
    return "\t".join(columns) + "\n"


ANNOTATIONS = "!gaf-version: 2.2\n!\n" + "".join([
    annotation("FOSB", "GO:0000981", "F"),
    annotation("FOSB", "GO:0003677", "F"),
    annotation("FOSB", "GO:0006357", "P", "involved_in"),
    annotation("FOSB", "GO:0005634", "C", "located_in"),
    annotation("KLF1", "GO:0005634", "C", "located_in"),
])
NCBI_TEXTS = {"FOSB": "Gene Symbol FOSB The Fos gene family.",
              "KLF1": "Gene Symbol KLF1 An erythroid factor."}
NCBI_UNIPROT_TEXTS = {"FOSB": "Gene Symbol FOSB A factor. Protein summary: Binds."}
VOCAB = {"/czi-scgenept-public.s3.amazonaws.com/models/pretrained/scgpt/vocab.json":
         b'{"FOSB": 0, "TP53": 1, "<pad>": 2}'}
FILES = {**VOCAB,
         NCBI: json.dumps(NCBI_TEXTS).encode(),
         BUCKET + "NCBI_UniProt_summary_of_genes.json": json.dumps(NCBI_UNIPROT_TEXTS).encode(),
         GAF: gzip.compress(ANNOTATIONS.encode()),
         OBO: ONTOLOGY.encode()}


def mirror(server):
    return {"SCGENEPT_MIRROR": server.url if server else "http://127.0.0.1:9/"}  # nobody is there


def run(root, *options, server=None, dataset="norman", **environment):
    """Exit code, output and error output of stage 01, within this process."""
    with mock.patch.dict(os.environ, {**mirror(server), **environment}):
        done = run_script(SCRIPT, "--dataset", dataset, *options, root=root, check=False)
    return done.returncode, done.stdout, done.stderr


def made(*arguments, **named):
    """The output of a run that succeeds."""
    code, output, errors = run(*arguments, **named)
    assert code == 0, errors
    return output


def fails(result, *words):
    """Checks that a run ended in one line with these words."""
    code, _, errors = result
    assert code == 1, errors
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    for word in words:
        assert word in errors


def texts(root, source, space="human"):
    """{gene: text} of a source in annotations.h5."""
    with h5py.File(root / "data" / space / "annotations.h5", "r") as file:
        return dict(zip(file[source]["genes"].asstr(), file[source]["text"].asstr()))


def terms(root, source):
    """{gene: [term, ...]} of a GO source in annotations.h5."""
    with h5py.File(root / "data/human/annotations.h5", "r") as file:
        genes, names = file[source]["genes"].asstr()[:], file[source]["terms"].asstr()[:]
        offsets = file[source]["term_offsets"][:]
    return {gene: list(of_gene) for gene, of_gene in zip(genes, np.split(names, offsets[1:-1]))}


# ----------------------------------------------------------------------------------------------------------
# The demo

def test_the_demo_needs_no_network_and_says_that_it_is_synthetic(tmp_path):
    output = made(tmp_path, dataset="demo")
    assert "SYNTHETIC" in output
    assert len(texts(tmp_path, "go_all", "demo")) == 128
    assert (tmp_path / "data/demo/annotations.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------------------------------------
# Human genes, released texts and Gene Ontology

@pytest.fixture(scope="module")
def human(tmp_path_factory):
    """A folder with the six sources, what the run printed, and what the server was asked for."""
    root = tmp_path_factory.mktemp("human")
    with Server(FILES) as server:
        return SimpleNamespace(root=root, output=made(root, server=server), requests=server.requests)


@pytest.fixture
def root(human, tmp_path):
    """A copy of the folder with the six sources."""
    return shutil.copytree(human.root, tmp_path / "copy")


def test_the_six_sources_of_the_paper_are_the_default(human):
    with h5py.File(human.root / "data/human/annotations.h5", "r") as file:
        assert set(file) == {"ncbi", "ncbi+uniprot", "go_f", "go_c", "go_p", "go_all"}


def test_the_released_texts_are_taken_as_they_are(human):
    assert texts(human.root, "ncbi") == NCBI_TEXTS


def test_the_go_text_of_fosb_is_the_papers_table_22(human):
    assert texts(human.root, "go_f")["FOSB"] == (
        "Molecular Function: DNA-binding transcription factor activity, RNA polymerase II-specific, "
        "DNA binding")


def test_go_all_joins_function_component_process(human):
    assert texts(human.root, "go_all") == {
        "FOSB": "Molecular Function: DNA-binding transcription factor activity, RNA polymerase II-specific, "
                "DNA binding; Cellular Component: nucleus; "
                "Biological Process: regulation of transcription by RNA polymerase II",
        "KLF1": "Cellular Component: nucleus"}


def test_terms_stand_one_by_one_for_the_avg_mode(human):
    function = ["DNA-binding transcription factor activity, RNA polymerase II-specific", "DNA binding"]
    process = "regulation of transcription by RNA polymerase II"
    assert terms(human.root, "go_f") == {"FOSB": function}
    assert terms(human.root, "go_all") == {"FOSB": [*function, "nucleus", process], "KLF1": ["nucleus"]}


def test_the_overlaps_are_printed_as_in_table_21(human):
    rows = [line.split() for line in human.output.splitlines()]  # genes, of the vocabulary, of each source
    assert ["ncbi", "2", "1", "2", "1", "1", "2", "1", "2"] in rows
    assert ["go_f", "1", "1", "1", "1", "1", "1", "1", "1"] in rows


def test_the_file_says_where_each_source_came_from(human):
    with h5py.File(human.root / "data/human/annotations.h5", "r") as file:
        attributes = dict(file["go_c"].attrs)
    made_from = json.loads(attributes["made_from"])
    assert made_from["options"] == {"go_release": "2024-01-17"}
    assert made_from["inputs"]["goa_human.2024-01-17.gaf.gz"] == hashlib.sha256(FILES[GAF]).hexdigest()
    assert list(attributes["source_urls"]) == ["https:/" + GAF, "https:/" + OBO]


def test_each_file_is_asked_for_once(human):
    assert sorted(request.path for request in human.requests) == sorted(FILES)


def test_a_second_run_needs_no_network_even_without_the_downloads(root):
    assert made(root).count("there already") == 6
    shutil.rmtree(root / "data/human/raw")
    assert made(root).count("there already") == 6


def test_a_changed_download_makes_its_sources_stale(root):
    (root / "data/human/raw/NCBI_summary_of_genes.json").write_text('{"TP53": "Gene Symbol TP53 changed"}')
    output = made(root, "--source", "ncbi", "go_c")
    assert "ncbi: stale, making it again (NCBI_summary_of_genes.json changed)" in output
    assert "go_c: there already" in output
    assert texts(root, "ncbi") == {"TP53": "Gene Symbol TP53 changed"}
    assert "FOSB" in texts(root, "go_f")


def test_another_go_release_is_another_input(root):
    files = {CURRENT + "annotations/goa_human.gaf.gz": FILES[GAF],
             CURRENT + "ontology/go-basic.obo": FILES[OBO]}
    with Server(VOCAB | files) as server:
        output = made(root, "--source", "go_c", "--go-release", "current", server=server)
    assert "go_c: stale, making it again (go_release was 2024-01-17, now current" in output


def test_a_go_release_is_a_date(tmp_path):
    fails(run(tmp_path, "--source", "go_c", "--go-release", "../x"), "--go-release", "date")


# ----------------------------------------------------------------------------------------------------------
# Which annotations count

@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    """A folder with the sources go_f and go_p of annotations of all kinds, and what the run printed."""
    root = tmp_path_factory.mktemp("selected")
    lines = [annotation("TWICE", "GO:0003677", "F"),
             annotation("TWICE", "GO:0003677", "F", evidence="IEA"),
             annotation("ALT", "GO:0000999", "F"),
             annotation("ALT", "GO:0000981", "F"),
             annotation("NEGATED", "GO:0003677", "F", "NOT|enables"),
             annotation("NODATA", "GO:0003677", "F", evidence="ND"),
             annotation("OBSOLETE", "GO:0006350", "P"),
             annotation("INFORCE", "GO:0006357", "P"),
             annotation("MOUSE", "GO:0003677", "F", taxon="taxon:10090"),
             annotation("VIRAL", "GO:0003677", "F", taxon="taxon:11676|taxon:9606"),
             annotation("HOST", "GO:0003677", "F", taxon="taxon:9606|taxon:11676"),
             annotation("ORDER", "GO:0003677", "F"),
             annotation("ORDER", "GO:0000981", "F"),
             annotation("UNKNOWN", "GO:7777777", "F")]
    gaf = "!gaf-version: 2.2\n" + "".join(lines)
    with Server({**VOCAB, GAF: gzip.compress(gaf.encode()), OBO: ONTOLOGY.encode()}) as server:
        output = made(root, "--source", "go_f", "go_p", server=server)
    return SimpleNamespace(root=root, output=output)


def test_a_term_stands_once_a_gene(selected):
    assert terms(selected.root, "go_f")["TWICE"] == ["DNA binding"]


def test_an_alternative_id_is_its_primary_term(selected):
    primary = "DNA-binding transcription factor activity, RNA polymerase II-specific"
    assert terms(selected.root, "go_f")["ALT"] == [primary]


def test_terms_keep_the_files_order(selected):
    assert terms(selected.root, "go_f")["ORDER"][0] == "DNA binding"


def test_negated_absent_obsolete_foreign_and_unknown_annotations_are_left_out(selected):
    assert set(texts(selected.root, "go_f")) == {"TWICE", "ALT", "HOST", "ORDER"}
    assert set(texts(selected.root, "go_p")) == {"INFORCE"}


def test_terms_that_the_ontology_does_not_know_are_counted(selected):
    assert "1 annotations left out" in selected.output


# ----------------------------------------------------------------------------------------------------------
# Broken downloads

BROKEN = {  # name: (source, path, body, what the error says)
    "half a JSON file": ("ncbi", NCBI, b'{"FOSB": "Gene', ["NCBI_summary", "not a JSON file", "line 1"]),
    "a JSON list": ("ncbi", NCBI, b'["FOSB"]', ["expected an object"]),
    "a number for a text": ("ncbi", NCBI, b'{"FOSB": 1}', ["values of the type str"]),
    "JSON in Latin-1": ("ncbi", NCBI, '{"FOSB": "é"}'.encode("latin-1"), ["not a JSON file", "utf-8"]),
    "no text at all": ("ncbi", NCBI, b'{"FOSB": " "}', ["no gene with a text"]),
    "a truncated gzip file": ("go_f", GAF, FILES[GAF][:-20], ["goa_human", "line", "damaged gzip"]),
    "a gzip file with a wrong checksum": ("go_f", GAF, FILES[GAF][:-8] + bytes(4) + FILES[GAF][-4:], ["damaged gzip"]),
    "damage inside a gzip file": ("go_f", GAF, FILES[GAF][:60] + bytes(3) + FILES[GAF][63:], ["damaged gzip"]),
    "a web page in gzip": ("go_f", GAF, gzip.compress(b"<!DOCTYPE html>"), ["goa_human", "line 1", "<!DOCTYPE html>"]),
    "too few columns": ("go_f", GAF, gzip.compress(b"!gaf-version: 2.2\nUniProtKB\tP1\tFOSB\n"), ["line 2", "GAF 2"]),
    "a wrong aspect": ("go_f", GAF, gzip.compress(annotation("A", "GO:0003677", "X").encode()), ["line 1", "GAF 2"]),
    "GAF in Latin-1": ("go_f", GAF, gzip.compress((ANNOTATIONS + "é").encode("latin-1")), ["line 8", "UTF-8"]),
    "no human gene": ("go_f", GAF, gzip.compress(b"!gaf-version: 2.2\n"), ["go_f: no gene with a text", "goa_human"]),
    "no ontology": ("go_f", OBO, b"format-version: 1.2\n", ["not an OBO file"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_ends_in_one_line_that_names_it(tmp_path, name):
    source, place, body, words = BROKEN[name]
    with Server({**FILES, place: body}) as server:
        fails(run(tmp_path, "--source", source, server=server), *words)
    assert not (tmp_path / "data/human/annotations.h5").exists()


def test_a_source_that_fails_leaves_the_others_as_they_were(root):
    before = (root / "data/human/annotations.h5").read_bytes()
    (root / "data/human/raw/NCBI_summary_of_genes.json").write_text("{")
    fails(run(root, "--source", "ncbi"), "NCBI_summary_of_genes.json")
    assert (root / "data/human/annotations.h5").read_bytes() == before


def test_a_damaged_output_is_made_again(root):
    path = root / "data/human/annotations.h5"
    path.write_bytes(path.read_bytes()[:5000])
    made(root, "--source", "ncbi")
    assert texts(root, "ncbi") == NCBI_TEXTS


def test_a_full_disk_ends_in_one_line_and_leaves_the_earlier_output(root):
    before = (root / "data/human/annotations.h5").read_bytes()
    with full_disk(20_000):
        result = run(root, "--source", "go_f", "--force")
    fails(result, "annotations.h5: File too large")
    assert (root / "data/human/annotations.h5").read_bytes() == before
    assert not list(root.rglob("*.tmp"))


# ----------------------------------------------------------------------------------------------------------
# Texts from the primary services

N_GENES = 1200
WITH_SUMMARY = N_GENES * 9 // 10
PAGE = EUTILS + "esummary.fcgi"
PROTEINS = ("Gene Names (primary)\tFunction [CC]\n"
            "GENE1\tFUNCTION: Binds zinc (PubMed:1). {ECO:0000269|PubMed:1}.\n"
            "GENE2; ALONE\tFUNCTION: Cuts.\n"
            "GENE3\t\n")
FRESH = ["--source", "ncbi", "ncbi+uniprot", "--fresh"]


def gene_summary(uid):
    """NCBI's answer for one gene; every tenth has no summary."""
    summary = f"Summary {uid}." if uid % 10 else ""
    return {"uid": str(uid), "name": f"GENE{uid}", "description": "", "summary": summary}


def services(method, path, headers, body):
    """E-utilities with N_GENES genes, and UniProt's table."""
    if path.startswith(UNIPROT):
        return 200, {}, gzip.compress(PROTEINS.encode(), mtime=0)
    asked = {name: values[0] for name, values in parse_qs(body.decode()).items()}
    if path == EUTILS + "esearch.fcgi":
        assert (asked["db"], asked["term"]) == ("gene", "9606[taxid] AND alive[prop]")
        assert asked["usehistory"] == "y"
        answer = {"esearchresult": {"count": str(N_GENES), "querykey": "1", "webenv": "MCID_1"}}
    elif path == PAGE:
        assert (asked["WebEnv"], asked["query_key"]) == ("MCID_1", "1")
        uids = range(N_GENES)[int(asked["retstart"]):][:int(asked["retmax"])]
        summaries = {str(uid): gene_summary(uid) for uid in uids}
        answer = {"result": {"uids": list(summaries), **summaries}}
    else:
        return None
    return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()


def made_fresh(root, server, *options):
    """The output of a run that asks the services for their texts."""
    return made(root, *FRESH, *options, server=server, NCBI_API_KEY=KEY)


def pages_asked(server):
    """The first gene of each page that was asked for."""
    return [parse_qs(request.body.decode())["retstart"][0] for request in server.asked(PAGE)]


def assert_without_key(root):
    for path in root.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """A folder with fresh texts, what the run printed, and what the services were asked for."""
    root = tmp_path_factory.mktemp("fresh")
    with Server(VOCAB, hook=services) as server:
        return SimpleNamespace(root=root, output=made_fresh(root, server), requests=server.requests)


def test_fresh_texts_have_the_released_form(fresh):
    ncbi, both = texts(fresh.root, "ncbi"), texts(fresh.root, "ncbi+uniprot")
    assert ncbi["GENE1"] == "Gene Symbol GENE1 Summary 1."
    assert len(ncbi) == WITH_SUMMARY
    assert both["GENE1"] == "Gene Symbol GENE1 Summary 1. Protein summary: Binds zinc (PubMed:1)."
    assert both["ALONE"] == "Gene Symbol ALONE Protein summary: Cuts."
    assert both["GENE3"] == ncbi["GENE3"]


def test_the_key_travels_in_the_body_and_is_printed_and_written_nowhere(fresh):
    bodies = [parse_qs(request.body.decode()) for request in fresh.requests if EUTILS in request.path]
    assert [body["api_key"] for body in bodies] == [[KEY]] * 4
    for request in fresh.requests:
        assert KEY not in request.path + str(request.headers)
    assert KEY not in fresh.output
    assert_without_key(fresh.root)


@pytest.mark.parametrize("fault, cause", [
    ({"status": 400, "body": f"no such key: {KEY}".encode()}, "400 Bad Request"),
    ({"body": b'{"error": "%s"}' % KEY.encode()}, "not the answer that was asked for"),
    ({"status": 302, "headers": {"Location": f"http://{KEY}.invalid/?api_key={KEY}"}}, "302 Found"),
    ({"drop": -1}, "closed connection")], ids=["400", "another form", "moved", "no answer"])
def test_the_key_is_not_shown_whatever_the_service_answers(tmp_path, impatient, fault, cause):
    with Server(VOCAB, hook=services) as server:
        server.misbehave(PAGE, {}, *[fault] * 6)
        code, output, errors = run(tmp_path, *FRESH, server=server, NCBI_API_KEY=KEY)
    fails((code, output, errors), "esummary.fcgi: ", cause)
    assert KEY not in output + errors
    assert_without_key(tmp_path)


def test_an_overloaded_service_is_asked_again(tmp_path, impatient):
    with Server(VOCAB, hook=services) as server:
        overload = {"body": b'{"error": "too many requests"}'}
        server.misbehave(PAGE, {"status": 503}, overload, {"drop": 20}, {"drop": -1})
        made_fresh(tmp_path, server)
    assert pages_asked(server) == ["0", "0", "0", "0", "0", "500", "1000"]


def test_a_page_with_fewer_genes_than_asked_for_loses_none(tmp_path):
    def stingy(method, path, headers, body):
        if path == PAGE:  # whatever is asked for, 300 genes come
            body = body.replace(b"retmax=500", b"retmax=300")
        return services(method, path, headers, body)

    with Server(VOCAB, hook=stingy) as server:
        made_fresh(tmp_path, server)
    assert pages_asked(server) == ["0", "300", "600", "900"]
    assert len(texts(tmp_path, "ncbi")) == WITH_SUMMARY


@pytest.mark.parametrize("tool, answer", [
    ("esummary", {"result": {"uids": ["0", "1"], "0": {"name": "GENE0"}}}),
    ("esummary", {"result": {"uids": ["0"], "0": "busy"}}),
    ("esearch", {"esearchresult": {"count": "many", "querykey": "1", "webenv": "MCID_1"}})])
def test_an_answer_that_lacks_something_is_asked_for_again(tmp_path, impatient, tool, answer):
    with Server(VOCAB, hook=services) as server:
        server.misbehave(f"{EUTILS}{tool}.fcgi", {"body": json.dumps(answer).encode()})
        made_fresh(tmp_path, server)
    assert len(texts(tmp_path, "ncbi")) == WITH_SUMMARY
    assert len(server.asked(EUTILS + "esearch.fcgi") + server.asked(PAGE)) == 5  # one more than needed


def test_fresh_goes_on_with_the_page_that_is_missing(tmp_path, impatient):
    with Server(VOCAB, hook=services) as server:
        server.misbehave(PAGE, {}, {"status": 400})
        fails(run(tmp_path, *FRESH, server=server, NCBI_API_KEY=KEY), "400")
        assert not (tmp_path / "data/human/annotations.h5").exists()
        made(tmp_path, *FRESH, server=server)  # without a key too
    assert pages_asked(server) == ["0", "500", "500", "1000"]
    assert len(texts(tmp_path, "ncbi")) == WITH_SUMMARY
    assert not list(tmp_path.rglob("*.part"))


def test_the_services_are_asked_again_only_when_forced(fresh, tmp_path):
    copy = shutil.copytree(fresh.root, tmp_path / "copy")
    with Server(VOCAB, hook=services) as server:
        made_fresh(copy, server)
        assert server.requests == []
        made_fresh(copy, server, "--force")
    again = [request.path for request in server.requests]
    assert again == [request.path for request in fresh.requests if request.path not in VOCAB]


# ----------------------------------------------------------------------------------------------------------
# Own texts

@pytest.fixture
def notes(tmp_path):
    return tmp_path / "notes.tsv"


def test_own_texts_are_a_source_beside_the_others(root, notes):
    notes.write_text("gene\ttext\nFOSB\tmine, with \"quotes\" and ünicode\n", encoding="utf-8")
    output = made(root, "--tsv", f"notes={notes}")
    assert "next: python 02_embed.py --dataset norman --source notes --embedder lsa" in output
    assert texts(root, "notes") == {"FOSB": "mine, with \"quotes\" and ünicode"}
    assert texts(root, "ncbi") == NCBI_TEXTS


@pytest.mark.parametrize("content, words", [
    (b"symbol\ttext\nA\tb\n", ["gene<TAB>text"]),
    (b"gene\ttext\nA\tb\nA\tc\n", ["line 3", "'A'", "second time"]),
    (b"gene\ttext\nA\tb\tc\n", ["line 2", "a gene, a tab and a text"]),
    (b"gene\ttext\n\tb\n", ["line 2", "a gene, a tab and a text"]),
    (b"gene\ttext\nA\tb\nB\t\xff\n", ["line 3", "UTF-8"]),
    (b"gene\ttext\n", ["no gene"]),
    (b"", ["gene<TAB>text"])])
def test_a_table_that_cannot_be_read_ends_in_one_line(tmp_path, notes, content, words):
    notes.write_bytes(content)
    fails(run(tmp_path, "--tsv", f"notes={notes}", dataset="demo"), "notes", *words)


def test_a_table_that_is_gone_is_missed_though_its_texts_are_there(tmp_path, notes):
    notes.write_text("gene\ttext\nA\tb\n")
    made(tmp_path, "--tsv", f"notes={notes}")
    notes.unlink()
    fails(run(tmp_path, "--tsv", f"notes={notes}"), f"{notes} does not exist")


def test_a_gene_without_a_text_is_left_out_with_a_line(tmp_path, notes):
    notes.write_text("gene\ttext\nA\tb\nB\t \n\nC\n")
    output = made(tmp_path, "--tsv", f"notes={notes}")
    assert f"{notes}: 2 genes without a text left out: B, C\n" in output
    assert texts(tmp_path, "notes") == {"A": "b"}


@pytest.mark.parametrize("name", ["ncbi", "a/b", "", "a+b"])
def test_a_name_that_is_taken_or_no_name_is_refused(tmp_path, name):
    fails(run(tmp_path, "--tsv", f"{name}=notes.tsv"), "--tsv", "NAME")


def test_two_runs_at_once_lose_none_of_their_sources(tmp_path):
    processes = [start_process(SCRIPT, "--source", source, root=tmp_path) for source in ("ncbi", "go_f")]
    assert [process.wait() for process in processes] == [0, 0]
    with h5py.File(tmp_path / "data/demo/annotations.h5", "r") as file:
        assert set(file) == {"ncbi", "go_f"}


# ----------------------------------------------------------------------------------------------------------
# What all stages share: fingerprints, HDF5 files

def test_a_source_made_again_or_copied_counts_as_the_same_input(root, tmp_path):
    path = root / "data/human/annotations.h5"
    before, date = shared.fingerprint(path, "go_all"), path.stat().st_mtime_ns
    made(root, "--force")
    copy = shutil.copy(path, tmp_path / "copy.h5")
    assert path.stat().st_mtime_ns != date
    assert shared.fingerprint(path, "go_all") == before
    assert shared.fingerprint(copy, "go_all") == before


def test_another_file_counts_as_its_bytes_whatever_its_date(tmp_path):
    path = tmp_path / "screen.h5ad"
    with h5py.File(path, "w") as file:
        file["X"] = np.zeros(3)
    os.utime(path, (0, 0))
    assert shared.fingerprint(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def read_error(path, made_by=None):
    """The line that reading X of an HDF5 file ends the run with."""
    with pytest.raises(SystemExit) as caught, shared.read_h5(path, made_by) as file:
        file["X"][:]
    words = caught.value.code
    assert words.startswith(f"error: {path}")
    assert "\n" not in words
    return words


def test_an_hdf5_file_that_is_missing_or_damaged_or_lacks_something_ends_in_one_line(tmp_path):
    path = tmp_path / "file.h5"
    assert read_error(path, "python 01.py").endswith(" does not exist; run first: python 01.py")
    with h5py.File(path, "w") as file:
        file["Y"] = np.zeros(1000)
    assert "'X'" in read_error(path, "python 01.py")
    path.write_bytes(path.read_bytes()[:3000])
    assert read_error(path, "python 01.py").endswith("make it again: python 01.py --force")
    assert read_error(path).endswith("get it again from its source")


@pytest.fixture
def other(tmp_path):
    """The HDF5 file in which another one keeps its X."""
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["X"] = np.zeros(8)
    return tmp_path / "other.h5"


def test_an_hdf5_file_that_keeps_data_in_other_files_is_refused(tmp_path, other):
    layout = h5py.VirtualLayout(shape=(8,), dtype=float)
    layout[:] = h5py.VirtualSource(other, "X", shape=(8,))
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["X"] = h5py.ExternalLink("other.h5", "X")
    with h5py.File(tmp_path / "virtual.h5", "w") as file:
        file.create_virtual_dataset("X", layout)
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("X", (8,), "f8", external=str(other))
    for name in ("link", "virtual", "external"):
        assert "X lies in another file" in read_error(tmp_path / f"{name}.h5")
