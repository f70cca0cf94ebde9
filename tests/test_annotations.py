"""Stage 01: the demo's texts, own texts, and human genes from a local server in the place of the real ones."""
import gzip
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs

import h5py
import numpy as np
import pytest
from conftest import run_script, start_process
from server import Server

SCRIPT = Path(__file__).parent.parent / "01_fetch_annotations.py"
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
    return "\t".join(["UniProtKB", "P1", gene, qualifier, term, "PMID:1", evidence, "", aspect, "a name", "", "protein",
                      taxon, "20240101", "UniProt", "", ""]) + "\n"


ANNOTATIONS = "!gaf-version: 2.2\n!\n" + "".join([
    annotation("FOSB", "GO:0000981", "F"),
    annotation("FOSB", "GO:0003677", "F"),
    annotation("FOSB", "GO:0006357", "P", "involved_in"),
    annotation("FOSB", "GO:0005634", "C", "located_in"),
    annotation("KLF1", "GO:0005634", "C", "located_in"),
])
NCBI_TEXTS = {"FOSB": "Gene Symbol FOSB The Fos gene family.", "KLF1": "Gene Symbol KLF1 An erythroid factor."}
VOCAB = {"/czi-scgenept-public.s3.amazonaws.com/models/pretrained/scgpt/vocab.json": b'{"FOSB": 0, "TP53": 1, "<pad>": 2}'}
FILES = {**VOCAB, NCBI: json.dumps(NCBI_TEXTS).encode(),
         BUCKET + "NCBI_UniProt_summary_of_genes.json": b'{"FOSB": "Gene Symbol FOSB A factor. Protein summary: Binds."}',
         GAF: gzip.compress(ANNOTATIONS.encode()), OBO: ONTOLOGY.encode()}


def mirror(server):
    return {"SCGENEPT_MIRROR": server.url if server else "http://127.0.0.1:9/"}  # nobody is there


def start(root, *options, server=None, dataset="norman", **environment):
    """Stage 01 in a process of its own."""
    return start_process(SCRIPT.name, "--dataset", dataset, *options, root=root, env={**mirror(server), **environment})


def run(root, *options, server=None, dataset="norman", **environment):
    """Exit code, output and error output of stage 01, within this process."""
    with mock.patch.dict(os.environ, {**mirror(server), **environment}):
        done = run_script(SCRIPT.name, "--dataset", dataset, *options, root=root, check=False)
    return done.returncode, done.stdout, done.stderr


def made(*arguments, **named):
    """The output of a run that succeeds."""
    code, output, errors = run(*arguments, **named)
    assert code == 0, errors
    return output


def fails(result, *words):
    """Checks that a run ended in one line with these words."""
    code, _, errors = result
    assert code == 1 and errors.startswith("error: ") and errors.count("\n") == 1, errors
    assert all(word in errors for word in words), errors


def texts(root, source, space="human"):
    """{gene: text} of a source in annotations.h5."""
    with h5py.File(root / "data" / space / "annotations.h5", "r") as file:
        return dict(zip(file[source]["genes"].asstr(), file[source]["text"].asstr()))


def terms(root, source):
    """{gene: [term, ...]} of a GO source in annotations.h5."""
    with h5py.File(root / "data/human/annotations.h5", "r") as file:
        names, offsets = file[source]["terms"].asstr()[:], file[source]["term_offsets"][:]
        return {gene: list(names[a:b]) for gene, a, b in zip(file[source]["genes"].asstr(), offsets, offsets[1:])}


def go_server(*lines, ontology=ONTOLOGY):
    return Server({**VOCAB, GAF: gzip.compress(("!gaf-version: 2.2\n" + "".join(lines)).encode()), OBO: ontology.encode()})


# ---------------------------------------------------------------------------------------------------------------------
# The demo

@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo made twice: two folders, and what the second run printed."""
    roots = [tmp_path_factory.mktemp("demo") for _ in range(2)]
    return roots, [made(root, dataset="demo") for root in roots][1]


def test_the_demo_needs_no_network_and_says_that_it_is_synthetic(demo):
    roots, output = demo
    assert "SYNTHETIC" in output and len(texts(roots[0], "go_all", "demo")) == 128
    assert (roots[0] / "data/demo/annotations.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_gives_the_same_output_dates_aside(demo):
    def contents(root):
        found = {}
        with h5py.File(root / "data/demo/annotations.h5", "r") as file:
            file.visititems(lambda name, item: found.update({name: item[:].tolist()} if hasattr(item, "dtype") else {}))
        return found, (root / "data/demo/annotations.png").read_bytes()
    assert contents(demo[0][0]) == contents(demo[0][1])


def test_help_comes_at_once():
    started = time.time()
    assert subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True).returncode == 0
    assert time.time() - started < 3  # less than a second, on a machine that does nothing else


# ---------------------------------------------------------------------------------------------------------------------
# Human genes, released texts and Gene Ontology

@pytest.fixture(scope="module")
def human(tmp_path_factory):
    """A folder with the six sources, what the run printed, and what the server was asked for."""
    root = tmp_path_factory.mktemp("human")
    with Server(FILES) as server:
        return root, made(root, server=server), server.requests


def test_the_six_sources_of_the_paper_are_the_default(human):
    with h5py.File(human[0] / "data/human/annotations.h5", "r") as file:
        assert set(file) == {"ncbi", "ncbi+uniprot", "go_f", "go_c", "go_p", "go_all"}


def test_the_released_texts_are_taken_as_they_are(human):
    assert texts(human[0], "ncbi") == NCBI_TEXTS


def test_the_go_text_of_fosb_is_the_papers_table_22(human):
    assert texts(human[0], "go_f")["FOSB"] == ("Molecular Function: DNA-binding transcription factor activity, "
                                               "RNA polymerase II-specific, DNA binding")


def test_go_all_joins_function_component_process(human):
    assert texts(human[0], "go_all") == {
        "FOSB": "Molecular Function: DNA-binding transcription factor activity, RNA polymerase II-specific, DNA binding; "
                "Cellular Component: nucleus; Biological Process: regulation of transcription by RNA polymerase II",
        "KLF1": "Cellular Component: nucleus"}
    assert terms(human[0], "go_all")["KLF1"] == ["nucleus"]


def test_terms_stand_one_by_one_for_the_avg_mode(human):
    assert terms(human[0], "go_f") == {
        "FOSB": ["DNA-binding transcription factor activity, RNA polymerase II-specific", "DNA binding"]}


def test_the_overlaps_are_printed_as_in_table_21(human):
    rows = [line.split() for line in human[1].splitlines()]
    assert ["ncbi", "2", "1", "2", "1", "1", "2", "1", "2"] in rows  # genes, of the vocabulary, of each source
    assert ["go_f", "1", "1", "1", "1", "1", "1", "1", "1"] in rows


def test_the_file_says_where_each_source_came_from(human):
    with h5py.File(human[0] / "data/human/annotations.h5", "r") as file:
        source = json.loads(file["go_c"].attrs["made_from"])
        assert source["options"] == {"go_release": "2024-01-17"}
        gaf = human[0] / "data/human/raw/goa_human.2024-01-17.gaf.gz"
        assert source["inputs"][gaf.name] == hashlib.sha256(gaf.read_bytes()).hexdigest()
        assert list(file["go_c"].attrs["source_urls"]) == ["https:/" + GAF, "https:/" + OBO]


def test_each_file_is_asked_for_once(human):
    assert sorted(request.path for request in human[2]) == sorted(FILES)


def test_a_second_run_needs_no_network_even_without_the_downloads(human, tmp_path):
    root = shutil.copytree(human[0], tmp_path / "copy")
    assert made(root).count("there already") == 6
    shutil.rmtree(root / "data/human/raw")
    assert made(root).count("there already") == 6


def test_a_changed_download_makes_its_sources_stale(human, tmp_path):
    root = shutil.copytree(human[0], tmp_path / "copy")
    (root / "data/human/raw/NCBI_summary_of_genes.json").write_text('{"TP53": "Gene Symbol TP53 changed"}')
    output = made(root, "--source", "ncbi", "go_c")
    assert "ncbi: stale, making it again (NCBI_summary_of_genes.json changed)" in output and "go_c: there already" in output
    assert texts(root, "ncbi") == {"TP53": "Gene Symbol TP53 changed"} and "FOSB" in texts(root, "go_f")


def test_another_go_release_is_another_input(human, tmp_path):
    root = shutil.copytree(human[0], tmp_path / "copy")
    with Server({**VOCAB, CURRENT + "annotations/goa_human.gaf.gz": FILES[GAF],
                 CURRENT + "ontology/go-basic.obo": FILES[OBO]}) as server:
        output = made(root, "--source", "go_c", "--go-release", "current", server=server)
    assert "go_c: stale, making it again (go_release was 2024-01-17, now current" in output


def test_a_go_release_is_a_date(tmp_path):
    fails(run(tmp_path, "--source", "go_c", "--go-release", "../x"), "--go-release", "date")


# ---------------------------------------------------------------------------------------------------------------------
# Which annotations count

@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    root = tmp_path_factory.mktemp("selected")
    with go_server(annotation("TWICE", "GO:0003677", "F"), annotation("TWICE", "GO:0003677", "F", evidence="IEA"),
                   annotation("ALT", "GO:0000999", "F"), annotation("ALT", "GO:0000981", "F"),
                   annotation("NEGATED", "GO:0003677", "F", "NOT|enables"),
                   annotation("NODATA", "GO:0003677", "F", evidence="ND"),
                   annotation("OBSOLETE", "GO:0006350", "P"), annotation("INFORCE", "GO:0006357", "P"),
                   annotation("MOUSE", "GO:0003677", "F", taxon="taxon:10090"),
                   annotation("VIRAL", "GO:0003677", "F", taxon="taxon:11676|taxon:9606"),
                   annotation("HOST", "GO:0003677", "F", taxon="taxon:9606|taxon:11676"),
                   annotation("ORDER", "GO:0003677", "F"), annotation("ORDER", "GO:0000981", "F"),
                   annotation("UNKNOWN", "GO:7777777", "F")) as server:
        return root, made(root, "--source", "go_f", "go_p", server=server)


def test_a_term_stands_once_a_gene(selected):
    assert terms(selected[0], "go_f")["TWICE"] == ["DNA binding"]


def test_an_alternative_id_is_its_primary_term(selected):
    assert terms(selected[0], "go_f")["ALT"] == ["DNA-binding transcription factor activity, RNA polymerase II-specific"]


def test_terms_keep_the_files_order(selected):
    assert terms(selected[0], "go_f")["ORDER"][0] == "DNA binding"


@pytest.mark.parametrize("gene", ["NEGATED", "NODATA", "OBSOLETE", "MOUSE", "VIRAL", "UNKNOWN"])
def test_negated_absent_obsolete_foreign_and_unknown_annotations_are_left_out(selected, gene):
    assert gene not in texts(selected[0], "go_f") and gene not in texts(selected[0], "go_p")


def test_of_two_taxa_the_first_is_the_genes(selected):
    assert "HOST" in texts(selected[0], "go_f")


def test_terms_that_the_ontology_does_not_know_are_counted(selected):
    assert "1 annotations left out" in selected[1]


# ---------------------------------------------------------------------------------------------------------------------
# Broken downloads

BROKEN = {  # name: (source, path, body, what the error says)
    "a web page for JSON": ("ncbi", NCBI, b"<html>Sign in</html>", ["web page"]),
    "half a JSON file": ("ncbi", NCBI, b'{"FOSB": "Gene', ["NCBI_summary", "not a JSON file", "line 1"]),
    "a JSON list": ("ncbi", NCBI, b'["FOSB"]', ["expected an object"]),
    "a number for a text": ("ncbi", NCBI, b'{"FOSB": 1}', ["values of the type str"]),
    "JSON in Latin-1": ("ncbi", NCBI, '{"FOSB": "é"}'.encode("latin-1"), ["not a JSON file", "utf-8"]),
    "no text at all": ("ncbi", NCBI, b'{"FOSB": " "}', ["no gene with a text"]),
    "a truncated gzip file": ("go_f", GAF, FILES[GAF][:-20], ["goa_human", "line", "damaged gzip"]),
    "a gzip file with a wrong checksum": ("go_f", GAF, FILES[GAF][:-8] + bytes(4) + FILES[GAF][-4:], ["damaged gzip"]),
    "damage inside a gzip file": ("go_f", GAF, FILES[GAF][:60] + bytes(3) + FILES[GAF][63:], ["goa_human", "damaged gzip"]),
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


def test_a_source_that_fails_leaves_the_others_as_they_were(human, tmp_path):
    root = shutil.copytree(human[0], tmp_path / "copy")
    before = (root / "data/human/annotations.h5").read_bytes()
    (root / "data/human/raw/NCBI_summary_of_genes.json").write_text("{")
    fails(run(root, "--source", "ncbi"), "NCBI_summary_of_genes.json")
    assert (root / "data/human/annotations.h5").read_bytes() == before


def test_a_damaged_output_is_made_again(human, tmp_path):
    root = shutil.copytree(human[0], tmp_path / "copy")
    path = root / "data/human/annotations.h5"
    path.write_bytes(path.read_bytes()[:5000])
    made(root, "--source", "ncbi")
    assert texts(root, "ncbi") == NCBI_TEXTS


@pytest.mark.skipif(sys.platform == "win32", reason="no file-size limits there")
def test_a_full_disk_ends_in_one_line_and_leaves_the_earlier_output(human, tmp_path):
    import resource
    root = shutil.copytree(human[0], tmp_path / "copy")
    before = (root / "data/human/annotations.h5").read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))  # inherited by the process
    try:
        process = start(root, "--source", "go_f", "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    output, errors = process.communicate()
    fails((process.returncode, output, errors), "annotations.h5: File too large")
    assert (root / "data/human/annotations.h5").read_bytes() == before
    assert not list(root.rglob("*.tmp"))


# ---------------------------------------------------------------------------------------------------------------------
# Texts from the primary services

N_GENES = 1200
PROTEINS = ("Gene Names (primary)\tFunction [CC]\n"
            "GENE1\tFUNCTION: Binds zinc (PubMed:1). {ECO:0000269|PubMed:1}.\n"
            "GENE2; ALONE\tFUNCTION: Cuts.\n"
            "GENE3\t\n")


def services(method, path, headers, body):
    """E-utilities with N_GENES genes, every tenth without a summary, and UniProt's table."""
    asked = {name: values[0] for name, values in parse_qs(body.decode()).items()}
    if path.startswith(UNIPROT):
        return 200, {}, gzip.compress(PROTEINS.encode(), mtime=0)
    if path == EUTILS + "esearch.fcgi":
        assert asked["usehistory"] == "y" and asked["term"] == "9606[taxid] AND alive[prop]" and asked["db"] == "gene"
        answer = {"esearchresult": {"count": str(N_GENES), "querykey": "1", "webenv": "MCID_1"}}
    elif path == EUTILS + "esummary.fcgi":
        assert asked["WebEnv"] == "MCID_1" and asked["query_key"] == "1"
        ids = [str(i) for i in range(N_GENES)][int(asked["retstart"]):][:int(asked["retmax"])]
        answer = {"result": {"uids": ids, **{i: {"uid": i, "name": f"GENE{i}", "description": "",
                                                 "summary": f"Summary {i}." if int(i) % 10 else ""} for i in ids}}}
    else:
        return None
    return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()


FRESH = ["--source", "ncbi", "ncbi+uniprot", "--fresh"]


def test_fresh_texts_have_the_released_form(tmp_path):
    with Server(VOCAB, hook=services) as server:
        made(tmp_path, *FRESH, server=server, NCBI_API_KEY=KEY)
    found, both = texts(tmp_path, "ncbi"), texts(tmp_path, "ncbi+uniprot")
    assert found["GENE1"] == "Gene Symbol GENE1 Summary 1." and len(found) == N_GENES * 9 // 10
    assert both["GENE1"] == "Gene Symbol GENE1 Summary 1. Protein summary: Binds zinc (PubMed:1)."
    assert both["ALONE"] == "Gene Symbol ALONE Protein summary: Cuts." and both["GENE3"] == found["GENE3"]


def test_the_key_travels_in_the_body_and_is_printed_and_written_nowhere(tmp_path):
    with Server(VOCAB, hook=services) as server:
        printed = made(tmp_path, *FRESH, server=server, NCBI_API_KEY=KEY)
    asked = [request for request in server.requests if EUTILS in request.path]
    assert len(asked) == 4 and all(parse_qs(request.body.decode())["api_key"] == [KEY] for request in asked)
    assert not any(KEY in request.path + str(request.headers) for request in server.requests)
    assert KEY not in printed
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.parametrize("fault, cause", [
    ({"status": 400, "body": f"no such key: {KEY}".encode()}, "400 Bad Request"),
    ({"body": b'{"error": "%s"}' % KEY.encode()}, "not the answer that was asked for"),
    ({"drop": 10}, "not the answer that was asked for"),
    ({"status": 302, "headers": {"Location": f"http://{KEY}.invalid/?api_key={KEY}"}}, "302 Found"),
    ({"drop": -1}, "closed connection")], ids=["400", "another form", "dropped", "moved", "no answer"])
def test_the_key_is_not_shown_whatever_the_service_answers(tmp_path, impatient, fault, cause):
    with Server(VOCAB, hook=services) as server:
        server.misbehave(EUTILS + "esummary.fcgi", {}, *[fault] * 6)
        code, output, errors = run(tmp_path, *FRESH, server=server, NCBI_API_KEY=KEY)
    fails((code, output, errors), "esummary.fcgi: ", cause)
    assert KEY not in output + errors
    assert not any(KEY.encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_an_overloaded_service_is_asked_again(tmp_path, impatient):
    page = EUTILS + "esummary.fcgi"
    with Server(VOCAB, hook=services) as server:
        server.misbehave(page, {"status": 503}, {"body": b'{"error": "too many requests"}'}, {"drop": 20}, {"drop": -1})
        made(tmp_path, *FRESH, server=server, NCBI_API_KEY=KEY)
    starts = [parse_qs(request.body.decode())["retstart"][0] for request in server.asked(page)]
    assert starts == ["0", "0", "0", "0", "0", "500", "1000"]


def test_a_page_with_fewer_genes_than_asked_for_loses_none(tmp_path):
    page = EUTILS + "esummary.fcgi"

    def stingy(method, path, headers, body):
        if path == page:  # whatever is asked for, 300 genes come
            body = body.replace(b"retmax=500", b"retmax=300")
        return services(method, path, headers, body)

    with Server(VOCAB, hook=stingy) as server:
        made(tmp_path, *FRESH, server=server, NCBI_API_KEY=KEY)
    starts = [parse_qs(request.body.decode())["retstart"][0] for request in server.asked(page)]
    assert starts == ["0", "300", "600", "900"] and len(texts(tmp_path, "ncbi")) == N_GENES * 9 // 10


@pytest.mark.parametrize("tool, answer", [
    ("esummary", {"result": {"uids": ["0", "1"], "0": {"name": "GENE0"}}}),
    ("esummary", {"result": {"uids": ["0"], "0": "busy"}}),
    ("esearch", {"esearchresult": {"count": str(N_GENES)}}),
    ("esearch", {"esearchresult": {"count": "many", "querykey": "1", "webenv": "MCID_1"}})])
def test_an_answer_that_lacks_something_is_asked_for_again(tmp_path, impatient, tool, answer):
    page = f"{EUTILS}{tool}.fcgi"
    with Server(VOCAB, hook=services) as server:
        server.misbehave(page, {"body": json.dumps(answer).encode()})
        made(tmp_path, *FRESH, server=server, NCBI_API_KEY=KEY)
    assert len(texts(tmp_path, "ncbi")) == N_GENES * 9 // 10
    assert len(server.asked(page)) == (4 if tool == "esummary" else 2)


def test_fresh_goes_on_after_sigkill_with_the_page_that_is_missing(tmp_path):
    page = EUTILS + "esummary.fcgi"
    with Server(VOCAB, hook=services) as server:
        server.misbehave(page, {}, {"stall": 60})
        process = start(tmp_path, *FRESH, server=server, NCBI_API_KEY=KEY)
        while len(server.asked(page)) < 2:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert not (tmp_path / "data/human/annotations.h5").exists()
        made(tmp_path, *FRESH, server=server)
    starts = [parse_qs(request.body.decode())["retstart"][0] for request in server.asked(page)]
    assert starts == ["0", "500", "500", "1000"]
    assert len(texts(tmp_path, "ncbi")) == N_GENES * 9 // 10
    assert not list(tmp_path.rglob("*.part"))


def test_force_asks_the_services_again(tmp_path):
    with Server(VOCAB, hook=services) as server:
        made(tmp_path, *FRESH, server=server, NCBI_API_KEY=KEY)
        n_requests = len(server.requests)
        made(tmp_path, *FRESH, server=server)
        assert len(server.requests) == n_requests
        made(tmp_path, *FRESH, "--force", server=server, NCBI_API_KEY=KEY)
        assert len(server.requests) == 2 * n_requests - 1  # all but the vocabulary


# ---------------------------------------------------------------------------------------------------------------------
# Own texts

def test_own_texts_are_a_source_beside_the_others(human, tmp_path):
    root = shutil.copytree(human[0], tmp_path / "copy")
    (tmp_path / "notes.tsv").write_text("gene\ttext\nFOSB\tmine, with \"quotes\" and ünicode\n", encoding="utf-8")
    output = made(root, "--tsv", f"notes={tmp_path / 'notes.tsv'}")
    assert "next: python 02_embed.py --dataset norman --source notes --embedder lsa" in output
    assert texts(root, "notes") == {"FOSB": "mine, with \"quotes\" and ünicode"} and texts(root, "ncbi") == NCBI_TEXTS


@pytest.mark.parametrize("content, words", [
    (b"symbol\ttext\nA\tb\n", ["gene<TAB>text"]),
    (b"gene\ttext\nA\tb\nA\tc\n", ["line 3", "'A'", "second time"]),
    (b"gene\ttext\nA\tb\tc\n", ["line 2", "a gene, a tab and a text"]),
    (b"gene\ttext\n\tb\n", ["line 2", "a gene, a tab and a text"]),
    (b"gene\ttext\nA\tb\nB\t\xff\n", ["line 3", "UTF-8"]),
    (b"gene\ttext\n", ["no gene"]),
    (b"", ["gene<TAB>text"]),
    (None, ["does not exist", "notes.tsv"]),
])
def test_a_table_that_cannot_be_read_ends_in_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "notes.tsv").write_bytes(content)
    fails(run(tmp_path, "--tsv", f"notes={tmp_path / 'notes.tsv'}", dataset="demo"), "notes", *words)


def test_a_table_that_is_gone_is_missed_though_its_texts_are_there(tmp_path):
    (tmp_path / "notes.tsv").write_text("gene\ttext\nA\tb\n")
    made(tmp_path, "--tsv", f"notes={tmp_path / 'notes.tsv'}")
    (tmp_path / "notes.tsv").unlink()
    fails(run(tmp_path, "--tsv", f"notes={tmp_path / 'notes.tsv'}"), "does not exist")


def test_a_gene_without_a_text_is_left_out_with_a_line(tmp_path):
    (tmp_path / "notes.tsv").write_text("gene\ttext\nA\tb\nB\t \n\nC\n")
    output = made(tmp_path, "--tsv", f"notes={tmp_path / 'notes.tsv'}")
    assert f"{tmp_path / 'notes.tsv'}: 2 genes without a text left out: B, C\n" in output
    assert texts(tmp_path, "notes") == {"A": "b"}


@pytest.mark.parametrize("name", ["ncbi", "a/b", "..", "", "a+b"])
def test_a_name_that_is_taken_or_no_name_is_refused(tmp_path, name):
    fails(run(tmp_path, "--tsv", f"{name}=notes.tsv"), "--tsv", "NAME")


def test_two_runs_at_once_lose_none_of_their_sources(tmp_path):
    processes = [start(tmp_path, "--source", source, dataset="demo") for source in ("ncbi", "go_f", "go_c")]
    assert [process.wait() for process in processes] == [0, 0, 0]
    with h5py.File(tmp_path / "data/demo/annotations.h5", "r") as file:
        assert set(file) == {"ncbi", "go_f", "go_c"}


# ---------------------------------------------------------------------------------------------------------------------
# What all stages share: fingerprints, HDF5 files

def test_a_source_made_again_or_copied_counts_as_the_same_input(tmp_path):
    made(tmp_path, dataset="demo")
    path = tmp_path / "data/demo/annotations.h5"
    before, date = shared.fingerprint(path, "go_all"), path.stat().st_mtime_ns
    made(tmp_path, "--force", dataset="demo")
    copy = shutil.copy(path, tmp_path / "copy.h5")
    assert path.stat().st_mtime_ns != date
    assert shared.fingerprint(path, "go_all") == shared.fingerprint(copy, "go_all") == before


def test_another_file_counts_as_its_bytes_whatever_its_date(tmp_path):
    path = tmp_path / "screen.h5ad"
    with h5py.File(path, "w") as file:
        file["X"] = np.zeros(3)
    before = shared.fingerprint(path)
    os.utime(path, (0, 0))
    assert shared.fingerprint(path) == before == hashlib.sha256(path.read_bytes()).hexdigest()


def read_error(path, **options):
    """The line that reading X of an HDF5 file ends the run with."""
    with pytest.raises(SystemExit) as caught, shared.read_h5(path, **options) as file:
        file["X"][:]
    assert caught.value.code.startswith(f"error: {path}") and "\n" not in caught.value.code
    return caught.value.code


def test_an_hdf5_file_that_is_missing_or_damaged_or_lacks_something_ends_in_one_line(tmp_path):
    path = tmp_path / "file.h5"
    assert read_error(path, made_by="python 01.py").endswith(" does not exist; run first: python 01.py")
    with h5py.File(path, "w") as file:
        file["Y"] = np.zeros(1000)
    assert "'X'" in read_error(path, made_by="python 01.py")
    path.write_bytes(path.read_bytes()[:3000])
    assert read_error(path, made_by="python 01.py").endswith("make it again: python 01.py --force")
    assert read_error(path).endswith("get it again from its source")


def test_an_hdf5_file_that_keeps_data_in_other_files_is_refused(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as other:
        other["X"] = np.zeros(8)
    layout = h5py.VirtualLayout(shape=(8,), dtype=float)
    layout[:] = h5py.VirtualSource(tmp_path / "other.h5", "X", shape=(8,))
    ways = {"link": lambda file: file.update({"X": h5py.ExternalLink("other.h5", "X")}),
            "virtual": lambda file: file.create_virtual_dataset("X", layout),
            "external": lambda file: file.create_dataset("X", (8,), "f8", external=str(tmp_path / "other.h5"))}
    for name, write in ways.items():
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            write(file)
        assert "X lies in another file" in read_error(tmp_path / f"{name}.h5")
