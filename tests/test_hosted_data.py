"""The real run's commands, with everything fetched from a server that holds small files of the real form at the real
addresses: released texts and vectors, GEARS' zip, scGPT's weights, the list of the bucket, an embeddings API."""
import csv
import hashlib
import io
import json
import os
import pickle
import zipfile
from types import SimpleNamespace
from unittest import mock

import h5py
import numpy as np
import pytest
import torch

import model
from conftest import GOLDEN, run_script
from server import Server
from test_prepare import GENES, write_h5ad

BUCKET = "/czi-scgenept-public.s3.amazonaws.com/"
SCGPT = BUCKET + "models/pretrained/scgpt/"
VECTORS = BUCKET + "models/gene_embeddings/"
FINETUNED = "models/finetuned/scgenept_ncbi+uniprot/dixit/best_model_gpt3.5_ada_rnd_seed_42.pt"


def torch_file(state):
    content = io.BytesIO()
    torch.save(state, content)
    return content.getvalue()


def list_of(keys):
    """A bucket's answer to ListObjectsV2."""
    contents = "".join(f"<Contents><Key>{key}</Key><LastModified>2024-10-01T00:00:00.000Z</LastModified><Size>1</Size>"
                       "<StorageClass>STANDARD</StorageClass></Contents>" for key in keys)
    return ('<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>czi-scgenept-public'
            f"</Name><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>").encode()


def hosted_files(folder):
    """{path at the server: bytes}; the golden network (120 tokens, width 32, attention in flash-attention's layout) is both the
    pretrained one, without its language, and a fine-tuned one."""
    golden = np.load(GOLDEN / "scgenept_ncbi_flash_layout.npz")
    state = {key.removeprefix("state/"): torch.from_numpy(golden[key]) for key in golden.files if key.startswith("state/")}
    archive = io.BytesIO()
    vocab = {gene: i for i, gene in enumerate([*GENES[:25], *(f"OTHER{i}" for i in range(92)), "<pad>", "<cls>", "<eoc>"])}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(write_h5ad(folder / "perturb_processed.h5ad"), "dixit/perturb_processed.h5ad")
        file.writestr("dixit/go.csv", "source,target\n")
    rng = np.random.default_rng(0)
    vectors = {gene: rng.normal(size=1536).tolist() for gene in [*GENES[:20], "ELSEWHERE"]}
    return {"/dataverse.harvard.edu/api/access/datafile/6154416": archive.getvalue(),
            SCGPT + "vocab.json": json.dumps(vocab).encode(),
            SCGPT + "best_model.pt": torch_file({key: value for key, value in state.items() if not key.startswith("genept")}),
            SCGPT + "args.json": json.dumps({"embsize": 32, "nlayers": 3, "nheads": 4, "d_hid": 48}).encode(),
            VECTORS + "gene_annotations/NCBI_summary_of_genes.json": json.dumps({gene: f"Gene Symbol {gene} {gene} binds." for gene in vectors}).encode(),
            VECTORS + "NCBI_gene_embeddings-gpt3.5-ada.pickle": pickle.dumps(vectors),
            BUCKET + "?list-type=2&prefix=models%2Ffinetuned%2F": list_of(["models/finetuned/", "models/finetuned/scgpt/norman/best_model_seed_42.pt", FINETUNED]),
            BUCKET + FINETUNED: torch_file(state)}


def embeddings_api(method, path, headers, body):
    """What an embeddings server answers: for each text 8 numbers that depend on nothing but the text."""
    if method == "POST" and path == "/v1/embeddings":
        texts = json.loads(body)["input"]
        data = [{"index": i, "embedding": [byte / 255 for byte in hashlib.sha256(text.encode()).digest()[:8]]} for i, text in enumerate(texts)]
        return 200, {"Content-Type": "application/json"}, json.dumps({"data": data, "model": "tiny", "object": "list"}).encode()


@pytest.fixture(scope="module")
def hosted(tmp_path_factory):
    """A root in which stages 01 to 03 of a hosted dataset have run, its server, and a function that runs further stages there."""
    root = tmp_path_factory.mktemp("hosted")
    with Server(hosted_files(root), embeddings_api) as server:
        env = {"SCGENEPT_MIRROR": server.url, "OPENAI_API_KEY": "sk-none"}

        def run(script, *options, **more):
            with mock.patch.dict(os.environ, env):
                return run_script(script, "--dataset", "dixit", *options, root=root, **more)
        yield SimpleNamespace(root=root, server=server, run=run, said={
            script: run(script, *options).stdout for script, options in (
                ("01_fetch_annotations.py", ["--source", "ncbi"]), ("02_embed.py", ["--source", "ncbi"]), ("03_prepare_data.py", []))})


def test_texts_vectors_cells_and_pretrained_weights_are_fetched_once_and_used(hosted):
    assert "ncbi: 21 genes with text" in hosted.said["01_fetch_annotations.py"]
    assert "21 vectors of 1,536 numbers" in hosted.said["02_embed.py"]
    prepared = hosted.said["03_prepare_data.py"]
    assert "25 of 30 genes are in the vocabulary" in prepared and "the file's own rankings" in prepared and "genes with text, of 31: ncbi 20" in prepared
    assert "targets with text, of" in prepared
    archive = hosted.server.files["/dataverse.harvard.edu/api/access/datafile/6154416"]
    found = (hosted.root / "data/dixit/dixit.zip.sha256").read_text()  # a download without a known checksum: which one it was
    assert found == f"{hashlib.sha256(archive).hexdigest()}  dixit.zip\n"
    train = "--variant", "scgpt", "scgenept_ncbi", "genept_ncbi", "--epochs", 1, "--batch-size", 32
    trained = hosted.run("04_train.py", *train).stdout
    assert "of encoder, transformer_encoder, value_encoder" in trained and "20 of 31 genes have a text, vectors of 1536" in trained
    assert "| all " in hosted.run("05_eval.py", "--controls", 2).stdout
    n_requests = len(hosted.server.requests)
    for script, options in ("01_fetch_annotations.py", ["--source", "ncbi"]), ("02_embed.py", ["--source", "ncbi"]), ("03_prepare_data.py", []), ("04_train.py", train):
        hosted.run(script, *options)
    assert len(hosted.server.requests) == n_requests
    net = model.load(hosted.root / "runs/dixit/scgenept_ncbi/seed42/model.pt")
    assert (net.config.d_model, net.config.n_layers, net.config.n_tokens, net.config.pad_id) == (32, 3, 120, 117)
    assert net.config.languages == {"ncbi": 1536}


def test_two_embedders_a_projection_a_released_model_and_another_method_stand_in_one_report(hosted):
    hosted.run("02_embed.py", "--source", "ncbi", "--embedder", "openai", "--model", "tiny", "--base-url", f"{hosted.server.url}v1")
    train = "--variant", "scgenept_ncbi", "--epochs", 1, "--batch-size", 32
    for options in [], ["--embedder", "tiny"], ["--align", "projection"]:
        hosted.run("04_train.py", *train, *options)
    names = ["scgenept_ncbi", "scgenept_ncbi,embedder=tiny", "scgenept_ncbi,align=projection"]
    with h5py.File(hosted.root / "data/dixit/dataset.h5") as data, h5py.File(hosted.root / "other.h5ad", "w") as file:
        file["X"] = data["mean"][:, data["measured"][:]]
        for table, column, values in (("obs", "condition", data["conditions"][:]), ("var", "gene_name", data["genes"][data["measured"][:]])):
            file.create_group(table).attrs["_index"] = column
            file[table].create_dataset(column, data=values, dtype=h5py.string_dtype())
    said = hosted.run("05_eval.py", "--controls", 2, "--external", f"other={hosted.root / 'other.h5ad'}", "--run", *names,
                      "released:scgenept_ncbi+uniprot").stdout
    report = (hosted.root / "results/dixit/report.md").read_text(encoding="utf-8")
    with (hosted.root / "results/dixit/metrics.csv").open(newline="") as file:
        scored = {(row["model"], row["seed"]) for row in csv.DictReader(file)}
    assert scored >= {("other", ""), ("scgenept_ncbi+uniprot-released", "42"), *((name, "42") for name in names)}
    assert "the best trained model, other (1.000)" in said  # those are the measured means
    assert all(name in report for name in names)


def test_a_released_model_that_the_bucket_does_not_list_is_an_error_that_names_those_it_lists(hosted):
    done = hosted.run("05_eval.py", "--run", "released:scgpt", check=False)
    assert done.returncode == 1 and done.stderr.startswith("error: --run released:scgpt: ")
    assert done.stderr.endswith("has no such model of dixit; there are: scgenept_ncbi+uniprot (dixit), scgpt (norman)\n")
