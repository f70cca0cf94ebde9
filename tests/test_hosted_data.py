"""The real run's commands, with everything fetched from a server that holds small files of the real form at
the real addresses: released texts and vectors, GEARS' zip, scGPT's weights, the list of the bucket, an
embeddings API."""
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
from cells import GENES, write_gears
from conftest import GOLDEN, run_script
from server import Server

DATAVERSE = "/dataverse.harvard.edu/api/access/datafile/6154416"
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
    contents = "".join(
        f"<Contents><Key>{key}</Key><LastModified>2024-10-01T00:00:00.000Z</LastModified><Size>1</Size>"
        "<StorageClass>STANDARD</StorageClass></Contents>" for key in keys)
    return ('<?xml version="1.0" encoding="UTF-8"?>\n'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            "<Name>czi-scgenept-public</Name>"
            f"<MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated>{contents}</ListBucketResult>").encode()


def hosted_files(folder):
    """{path at the server: bytes}. The golden network (120 tokens, width 32, attention in flash-attention's
    layout) is both the pretrained one, without its language, and a fine-tuned one."""
    golden = np.load(GOLDEN / "scgenept_ncbi_flash_layout.npz")
    state = {key.removeprefix("state/"): torch.from_numpy(golden[key])
             for key in golden.files if key.startswith("state/")}
    pretrained = {key: value for key, value in state.items() if not key.startswith("genept")}
    sizes = {"embsize": 32, "nlayers": 3, "nheads": 4, "d_hid": 48}
    names = [*GENES[:25], *(f"OTHER{i}" for i in range(92)), "<pad>", "<cls>", "<eoc>"]
    vocab = {name: i for i, name in enumerate(names)}
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(write_gears(folder), "dixit/perturb_processed.h5ad")
        file.writestr("dixit/go.csv", "source,target\n")
    rng = np.random.default_rng(0)
    vectors = {gene: rng.normal(size=1536).tolist() for gene in [*GENES[:20], "ELSEWHERE"]}
    texts = {gene: f"Gene Symbol {gene} {gene} binds." for gene in vectors}
    finetuned = ["models/finetuned/", "models/finetuned/scgpt/norman/best_model_seed_42.pt", FINETUNED]
    return {DATAVERSE: archive.getvalue(),
            SCGPT + "vocab.json": json.dumps(vocab).encode(),
            SCGPT + "best_model.pt": torch_file(pretrained),
            SCGPT + "args.json": json.dumps(sizes).encode(),
            VECTORS + "gene_annotations/NCBI_summary_of_genes.json": json.dumps(texts).encode(),
            VECTORS + "NCBI_gene_embeddings-gpt3.5-ada.pickle": pickle.dumps(vectors),
            BUCKET + "?list-type=2&prefix=models%2Ffinetuned%2F": list_of(finetuned),
            BUCKET + FINETUNED: torch_file(state)}


def embeddings_api(method, path, headers, body):
    """What an embeddings server answers: for each text 8 numbers that depend on nothing but the text."""
    if method == "POST" and path == "/v1/embeddings":
        digests = [hashlib.sha256(text.encode()).digest() for text in json.loads(body)["input"]]
        data = [{"index": i, "embedding": [byte / 255 for byte in digest[:8]]}
                for i, digest in enumerate(digests)]
        answer = {"data": data, "model": "tiny", "object": "list"}
        return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()


STAGES = (("01_fetch_annotations.py", "--source", "ncbi"), ("02_embed.py", "--source", "ncbi"),
          ("03_prepare_data.py",))
SHORT = ("--epochs", 1, "--batch-size", 32)


@pytest.fixture(scope="module")
def hosted(tmp_path_factory):
    """A root in which stages 01 to 03 of a hosted dataset have run, what they said, its server, and a
    function that runs further stages there."""
    root = tmp_path_factory.mktemp("hosted")
    with Server(hosted_files(root), embeddings_api) as server:
        env = {"SCGENEPT_MIRROR": server.url, "OPENAI_API_KEY": "sk-none"}

        def run(script, *options, **more):
            with mock.patch.dict(os.environ, env):
                return run_script(script, "--dataset", "dixit", *options, root=root, **more)
        said = {script: run(script, *options).stdout for script, *options in STAGES}
        yield SimpleNamespace(root=root, server=server, run=run, said=said)


def test_texts_vectors_cells_and_pretrained_weights_are_fetched_once_and_used(hosted):
    assert "ncbi: 21 genes with text" in hosted.said["01_fetch_annotations.py"]
    assert "21 vectors of 1,536 numbers" in hosted.said["02_embed.py"]
    prepared = hosted.said["03_prepare_data.py"]
    assert "25 of 30 genes are in the vocabulary" in prepared
    assert "the file's own rankings" in prepared
    assert "genes with text, of 31: ncbi 20" in prepared
    assert "targets with text, of 11: ncbi 10" in prepared
    train = ("04_train.py", "--variant", "scgpt", "scgenept_ncbi", "genept_ncbi", *SHORT)
    trained = hosted.run(*train).stdout
    assert "of encoder, transformer_encoder, value_encoder" in trained
    assert "20 of 31 genes have a text, vectors of 1536" in trained
    assert "| all " in hosted.run("05_eval.py", "--controls", 2).stdout
    n_requests = len(hosted.server.requests)
    for script, *options in (*STAGES, train):
        hosted.run(script, *options)
    assert len(hosted.server.requests) == n_requests
    config = model.load(hosted.root / "runs/dixit/scgenept_ncbi/seed42/model.pt").config
    assert (config.d_model, config.n_layers, config.n_tokens, config.pad_id) == (32, 3, 120, 117)
    assert config.languages == {"ncbi": 1536}


def test_two_embedders_a_projection_a_released_model_and_another_method_stand_in_one_report(hosted):
    hosted.run("02_embed.py", "--source", "ncbi", "--embedder", "openai", "--model", "tiny",
               "--base-url", f"{hosted.server.url}v1")
    for options in [], ["--embedder", "tiny"], ["--align", "projection"]:
        hosted.run("04_train.py", "--variant", "scgenept_ncbi", *SHORT, *options)
    names = ["scgenept_ncbi", "scgenept_ncbi,embedder=tiny", "scgenept_ncbi,align=projection"]

    other = hosted.root / "other.h5ad"  # predicts what was measured
    with h5py.File(hosted.root / "data/dixit/dataset.h5") as data, h5py.File(other, "w") as file:
        measured = data["measured"][:]
        file["X"] = data["mean"][:, measured]
        file["obs/condition"], file["var/gene_name"] = data["conditions"][:], data["genes"][measured]
        file["obs"].attrs["_index"], file["var"].attrs["_index"] = "condition", "gene_name"
    said = hosted.run("05_eval.py", "--controls", 2, "--external", f"other={other}",
                      "--run", *names, "released:scgenept_ncbi+uniprot").stdout
    assert "the best model, other (1.000)" in " ".join(said.split())

    with (hosted.root / "results/dixit/metrics.csv").open(newline="") as file:
        scored = {(row["model"], row["seed"]) for row in csv.DictReader(file)}
    assert scored >= {("other", ""), ("scgenept_ncbi+uniprot-released", "42")}
    assert scored >= {(name, "42") for name in names}
    report = (hosted.root / "results/dixit/report.md").read_text(encoding="utf-8")
    for name in names:
        assert name in report


def test_a_released_model_that_the_bucket_does_not_list_is_an_error_that_names_those_it_lists(hosted):
    error = hosted.run("05_eval.py", "--run", "released:scgpt", check=False).stderr
    assert error.startswith("error: --run released:scgpt: ")
    assert error.endswith(
        "has no such model of dixit; there are: scgenept_ncbi+uniprot/dixit, scgpt/norman\n")
