"""The real run's commands, with every file fetched from a server that holds small files of the real form at the real addresses."""
import io
import json
import pickle
import zipfile

import numpy as np
import torch

import model
from conftest import GOLDEN, run_process
from server import Server
from test_prepare import GENES, write_h5ad

SCGPT = "/czi-scgenept-public.s3.amazonaws.com/models/pretrained/scgpt/"
VECTORS = "/czi-scgenept-public.s3.amazonaws.com/models/gene_embeddings/GO_C_gene_embeddings-gpt3.5-ada-concat.pickle"


def hosted_files(folder):
    """GEARS' zip of a dataset, scGPT's three files and a pickle of vectors, as {path at the server: bytes}."""
    golden = np.load(GOLDEN / "scgenept_ncbi_flash_layout.npz")  # 120 tokens, width 32, attention in flash-attention's layout
    state = {key.removeprefix("state/"): torch.from_numpy(golden[key]) for key in golden.files if key.startswith("state/")}
    weights, archive = io.BytesIO(), io.BytesIO()
    torch.save({key: value for key, value in state.items() if not key.startswith("genept")}, weights)
    vocab = {gene: i for i, gene in enumerate([*GENES[:25], *(f"OTHER{i}" for i in range(92)), "<pad>", "<cls>", "<eoc>"])}
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.write(write_h5ad(folder / "perturb_processed.h5ad"), "dixit/perturb_processed.h5ad")
        file.writestr("dixit/go.csv", "source,target\n")
    rng = np.random.default_rng(0)
    return {"/dataverse.harvard.edu/api/access/datafile/6154416": archive.getvalue(),
            SCGPT + "vocab.json": json.dumps(vocab).encode(), SCGPT + "best_model.pt": weights.getvalue(),
            SCGPT + "args.json": json.dumps({"embsize": 32, "nlayers": 3, "nheads": 4, "d_hid": 48}).encode(),
            VECTORS: pickle.dumps({gene: rng.normal(size=1536).tolist() for gene in [*GENES[:20], "ELSEWHERE"]})}


def test_data_vectors_and_pretrained_weights_are_fetched_and_used(tmp_path):
    with Server(hosted_files(tmp_path)) as server:
        def stage(script, *options):
            return run_process(script, "--dataset", "dixit", *options, root=tmp_path, env={"SCGENEPT_MIRROR": server.url}).stdout
        assert "21 vectors of 1,536 numbers" in stage("02_embed.py", "--source", "go_c")
        prepared = stage("03_prepare_data.py")
        assert "25 of 30 genes are in the vocabulary" in prepared and "the file's own rankings" in prepared
        trained = stage("04_train.py", "--variant", "scgpt", "scgenept_go_c", "genept_go_c", "--epochs", 1, "--batch-size", 32)
        assert "of encoder, transformer_encoder, value_encoder" in trained and "20 of 31 genes have a text, 1536-dimensional" in trained
        assert "| all " in stage("05_eval.py", "--controls", 2)
        n_requests = len(server.requests)
        for script in ("02_embed.py", "03_prepare_data.py", "04_train.py"):  # what is there is not asked for again
            stage(script, *{"02_embed.py": ["--source", "go_c"], "04_train.py": ["--variant", "scgpt", "--epochs", 1, "--batch-size", 32]}.get(script, []))
        assert len(server.requests) == n_requests
    net = model.load(tmp_path / "runs/dixit/scgenept_go_c/seed42/model.pt")
    assert (net.config.d_model, net.config.n_layers, net.config.n_tokens, net.config.pad_id) == (32, 3, 120, 117)
    assert net.config.languages == {"go_c": 1536}
