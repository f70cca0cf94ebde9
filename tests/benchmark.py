"""How fast and lean the kit is, beside a plain implementation of the same formulas.

    python tests/benchmark.py                        every part but gpu
    python tests/benchmark.py train predict          some
    python tests/benchmark.py --quick                at a fraction of the size, where goals need not be met
    python tests/benchmark.py gpu                    all figures of a graphics card, in about eight minutes
    python tests/benchmark.py gpu --device cpu --quick     its lines, without a card

Parts: train, parts (a batch of 64 cells, a few at a time), predict, growth, prepare (stage 03 on a file as
large as Norman), large (on screens of up to a million cells), batches, annotations (stage 01's parsers),
help; gpu. Every measurement runs in a process of its own, so that its peak memory is its own. The full size
needs about 20 GB of memory (the plain implementation does) and 6 GB of disk.

Measured with OMP_NUM_THREADS=1 on a machine of two CPU cores that did other work, too; float32, torch 2.13,
12 layers of width 512. One core multiplied large matrices at 114 GFLOP/s.

    parts: a training step of 64 cells x 1,536 genes, 4 cells at once    270 to 330 s, 5.2 GB; as 16 steps of 4
    train: a step of 4 cells x 1,536 genes                               17 s, 4.1 GB
    predict: 5,045 genes, a cell                                         10.0 s, 0.7 GB
    the same with the plain implementation                               33.3 s, 3.3 GB
    prepare: 91,205 cells x 5,045 genes, 37 million values               2.5 s, 0.5 GB beyond the imports
    large: 500,000 cells x 20,000 genes, 5,000 kept                      39 s, 0.64 GB
    250,000 and 1,000,000 cells x 8,000 genes, 2,000 targets             11 s, 0.98 GB; 50 s, 1.03 GB
    a batch of 64 cells x 1,536 genes of those, from disk                2.5 ms, 0.26 GB in all
    batches: a batch of 64 cells x 1,536 genes                           1.4 ms
    annotations: 600,000 annotations and 45,000 terms                    1.8 s
    help: stages 01 to 03, stages 04 and 05                              0.3 s, 1.6 s

On one NVIDIA H100 (80 GB HBM3; PyTorch 2.11, CUDA 13.0), where tests/test_gpu.py passed:

    bf16 matrix rate (8192 x 8192)                                       845 TFLOP/s
    predict: 5,045 genes, 12 layers, a cell                              2.7 ms, 1.4 GB of GPU memory

A training step and the other lines of `gpu` have not been measured on a card; on a CPU they ran.
"""
import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

KIT = Path(__file__).resolve().parent.parent
N_CELLS, N_GENES, N_VALUES, N_TOKENS = 91_205, 5_045, 37_000_000, 60_697  # Norman's, and scGPT's vocabulary
OUTSIDE = 498 / 5_045  # share of Norman's genes that are not in that vocabulary
WIDTH, LAYERS, D_LANGUAGE = 512, 12, 1536
GB = 2**30


# ------------------------------------------------------------------------------------------------------------
# The plain implementation

def plain_network(layers):
    """The formulas written down with PyTorch's own parts: a padding mask that masks nothing, and language
    vectors that are looked up and projected for every cell, from a trainable row for every entry of the
    vocabulary."""
    import torch
    from torch import nn

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.tokens_norm = nn.Embedding(N_TOKENS, WIDTH), nn.LayerNorm(WIDTH)
            self.values = nn.Sequential(nn.Linear(1, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH),
                                        nn.LayerNorm(WIDTH), nn.Dropout(0.2))
            self.flags = nn.Embedding(3, WIDTH)
            self.language = nn.Sequential(nn.Embedding(N_TOKENS, D_LANGUAGE), nn.Linear(D_LANGUAGE, WIDTH),
                                          nn.LayerNorm(WIDTH))
            self.norm = nn.LayerNorm(WIDTH)
            layer = nn.TransformerEncoderLayer(WIDTH, 8, WIDTH, 0.2, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, layers)
            self.decoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(), nn.Linear(WIDTH, WIDTH),
                                         nn.LeakyReLU(), nn.Linear(WIDTH, 1))

        def forward(self, gene_ids, expression, perturbed):  # (L,), (B, L), (B, L) -> (B, L)
            gene_ids = gene_ids.repeat(len(expression), 1)
            x = self.tokens_norm(self.tokens(gene_ids)) + self.values(expression.clamp(max=512).unsqueeze(-1))
            x = x + self.flags(perturbed.long()) + self.language(gene_ids)
            h = self.encoder(self.norm(x), src_key_padding_mask=torch.zeros_like(perturbed))
            return self.decoder(h).squeeze(-1)

    return Plain()


def our_network(layers, vocabulary=N_TOKENS, attention_dropout=0):
    """scGenePT with one language source, as stage 04 builds it; for a CPU without dropout of attention."""
    import numpy as np
    import model
    n_rows, pad_id = min(N_GENES, vocabulary - 3) + 1, vocabulary - 3
    net = model.ScGenePT(model.Config(n_tokens=vocabulary, pad_id=pad_id, n_layers=layers,
                                      attention_dropout=attention_dropout,
                                      languages={"go_c": D_LANGUAGE}, n_language_rows=n_rows))
    vectors = np.random.default_rng(0).random((n_rows, D_LANGUAGE), dtype=np.float32)
    net.set_language(np.append(np.arange(n_rows - 1), pad_id), {"go_c": vectors})
    return net


# ------------------------------------------------------------------------------------------------------------
# Files as large as the real ones

def norman_labels(n_cells):
    """A label for every cell, Norman's 284 conditions in its proportions, in random order: (n_cells,)."""
    import numpy as np
    lines = (KIT / "tests/golden/norman_conditions.tsv").read_text().splitlines()[1:]
    rows = [line.split("\t") for line in lines]
    share = np.array([int(count) for _, count in rows]) / sum(int(count) for _, count in rows)
    n = np.maximum(1, np.floor(share * n_cells)).astype(int)
    n[share.argmax()] += n_cells - n.sum()
    return np.random.default_rng(0).permutation(np.repeat([label for label, _ in rows], n))


def write_norman_like(folder, n_cells, n_genes, n_values):
    """norman.h5ad as GEARS writes it, with random values, and a vocab.json: `n_values` of the n_cells x
    n_genes are not zero, a dense layers/counts stands beside X, and all genes are ranked for every
    condition."""
    import h5py
    import numpy as np
    folder = Path(folder)
    rng = np.random.default_rng(0)
    labels = norman_labels(n_cells)
    categories, codes = np.unique(labels, return_inverse=True)
    targets = sorted({part for label in categories for part in label.split("+")} - {"ctrl"})
    genes = targets + [f"GENE{i}" for i in range(n_genes - len(targets))]
    ids = [f"ENSG{i:011d}" for i in range(n_genes)]
    a_cell = rng.integers(3, 5, n_cells) * n_values // (n_cells * 4)  # values a cell
    a_cell = (a_cell * (n_values / a_cell.sum())).astype(int)
    indptr = np.concatenate([[0], np.cumsum(a_cell)])
    stride = np.repeat(n_genes // a_cell, a_cell)  # one value in every stretch of so many genes
    number = np.arange(indptr[-1]) - np.repeat(indptr[:-1], a_cell)  # of a value in its cell
    indices = (number + rng.random(indptr[-1], dtype=np.float32) * 0.99) * stride
    text = h5py.string_dtype()
    with h5py.File(folder / "norman.h5ad", "w") as file:
        file["X/data"] = rng.random(indptr[-1], dtype=np.float32) * 4
        file["X/indices"] = indices.astype(np.int32)
        file["X/indptr"] = indptr.astype(np.int32)
        file["X"].attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0",
                                "shape": [n_cells, n_genes]})
        counts = file.create_dataset("layers/counts", (n_cells, n_genes), np.float32)
        for start in range(0, n_cells, 4096):
            counts[start:start + 4096] = 1
        names = [f"A549_{label}_{'1' if label == 'ctrl' else '1+1'}" for label in categories]
        for column, values in (("condition", categories), ("condition_name", names)):  # as in older files
            file[f"obs/__categories/{column}"] = np.array(values, dtype=text)
            file[f"obs/{column}"] = codes.astype(np.int16)
            file[f"obs/{column}"].attrs["categories"] = file[f"obs/__categories/{column}"].ref
        for column, values in (("gene_name", genes), ("gene_id", ids)):
            file[f"var/{column}"] = np.array(values, dtype=text)
        file["var"].attrs["_index"] = "gene_id"
        for name in names:
            if name != "A549_ctrl_1":
                ranked = np.array(ids, dtype=object)[rng.permutation(n_genes)]
                file[f"uns/rank_genes_groups_cov_all/{name}"] = ranked.astype(text)
    vocab = genes + [f"OTHER{i}" for i in range(N_TOKENS - n_genes - 3)] + ["<pad>", "<cls>", "<eoc>"]
    (folder / "vocab.json").write_text(json.dumps({symbol: row for row, symbol in enumerate(vocab)}))
    return {}


def write_large(folder, n_cells, n_genes, n_targets):
    """large.h5ad as a lab may have it: random raw counts (CSR), 5% not zero, of two guides a target."""
    import h5py
    import numpy as np
    rng, a_cell, text = np.random.default_rng(0), n_genes // 20, h5py.string_dtype()
    genes = [f"GENE{i}" for i in range(n_genes)]
    guides = ["NT"] + [f"{gene}_g{i}" for gene in genes[:n_targets] for i in (1, 2)]
    with h5py.File(Path(folder) / "large.h5ad", "w") as file:
        data = file.create_dataset("X/data", (n_cells * a_cell,), np.float32)
        indices = file.create_dataset("X/indices", (n_cells * a_cell,), np.int32)
        for start in range(0, n_cells, 4096):
            n = min(4096, n_cells - start)
            stretch = np.arange(0, n_genes, 20, dtype=np.int32)[:a_cell]  # one gene in every twenty
            drawn = stretch + rng.integers(0, 20, (n, a_cell), dtype=np.int32)
            indices[start * a_cell:(start + n) * a_cell] = drawn.ravel()
            data[start * a_cell:(start + n) * a_cell] = rng.integers(1, 30, n * a_cell, dtype=np.int32)
        file["X/indptr"] = np.arange(n_cells + 1, dtype=np.int64) * a_cell
        file["X"].attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0",
                                "shape": [n_cells, n_genes]})
        file["obs/guide"] = np.array(guides, dtype=object)[rng.integers(0, len(guides), n_cells)].astype(text)
        file["var/symbol"] = np.array(genes, dtype=text)
        for table, column in (("obs", "guide"), ("var", "symbol")):
            file[table].attrs["_index"] = column
    return {}


def norman_data(n_cells, n_genes, n_values):
    """What stage 03's load_dataset gives for Norman, with its conditions and split and random values."""
    import numpy as np
    from scipy import sparse
    stage, rng = importlib.import_module("03_prepare_data"), np.random.default_rng(0)
    conditions, cell_condition = np.unique(norman_labels(n_cells).astype(str), return_inverse=True)
    targets_of = {label: [gene for gene in label.split("+") if gene != "ctrl"]
                  for label in conditions.tolist() if label != "ctrl"}
    split_of, _ = stage.split_conditions(targets_of, 1)
    split = np.array([split_of.get(label, "ctrl") for label in conditions.tolist()])
    position = {gene: i for i, gene in enumerate(sorted({g for genes in targets_of.values() for g in genes}))}
    targets = np.full((len(conditions), 2), -1)
    for row_of_targets, label in zip(targets, conditions.tolist()):
        genes = targets_of.get(label, [])
        row_of_targets[:len(genes)] = [position[gene] for gene in genes]

    a_cell = n_values // n_cells
    stride = n_genes // a_cell  # one value in every stretch of so many genes
    indices = rng.integers(0, stride, (n_cells, a_cell), dtype=np.int32)
    indices += np.arange(a_cell, dtype=np.int32) * stride
    values, indptr = rng.random(n_cells * a_cell, dtype=np.float32) * 4, np.arange(n_cells + 1) * a_cell
    X = sparse.csr_matrix((values, indices.ravel(), indptr), shape=(n_cells, n_genes))
    token_ids = np.arange(n_genes)
    token_ids[round(n_genes * (1 - OUTSIDE)):] = N_TOKENS - 3  # <pad>
    return SimpleNamespace(
        X=X, genes=np.array([f"GENE{i}" for i in range(n_genes)], dtype=object), token_ids=token_ids,
        pad_id=N_TOKENS - 3, n_tokens=N_TOKENS, measured=np.ones(n_genes, dtype=bool), conditions=conditions,
        split=split, cell_condition=cell_condition, targets=targets,
        ctrl_cells=np.flatnonzero(split[cell_condition] == "ctrl"))


# ------------------------------------------------------------------------------------------------------------
# Measurements: each runs in a process of its own and returns a dict of numbers

def fastest(action, times=1):
    """Seconds that action() takes, the least of so many times."""
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def train(kind, cells, genes, layers, steps, **network):
    """Seconds of a training step, the fastest of `steps` after one to warm up."""
    import torch
    torch.manual_seed(0)
    net = {"plain": plain_network, "ours": our_network}[kind](layers, **network)
    optimizer = torch.optim.Adam(net.parameters(), 1e-4)
    gene_ids, expression = torch.arange(genes), torch.rand(cells, genes)
    perturbed = torch.rand(cells, genes) < 1e-3

    def step():
        loss = torch.nn.functional.mse_loss(net(gene_ids, expression, perturbed), expression)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    return {"seconds": fastest(step, steps)}


def predict(kind, cells, genes, layers, outside):
    """Seconds a cell of predicting `cells` cells with as many zeros as Norman's have, the faster of two runs.
    A share `outside` of genes is not in the vocabulary. The plain implementation takes one cell at a time,
    as the released code does."""
    import torch
    import model
    torch.manual_seed(0)
    net = {"plain": plain_network, "ours": our_network}[kind](layers).eval()
    is_expressed = torch.rand(cells, genes) < N_VALUES / N_CELLS / N_GENES
    gene_ids, control = torch.arange(genes), torch.rand(cells, genes) * is_expressed
    gene_ids[round(genes * (1 - outside)):] = N_TOKENS - 3  # <pad>

    def run(control):
        if kind == "ours":
            return model.predict(net, gene_ids, control, [7])
        return [net(gene_ids, cell, gene_ids[None] == 7) for cell in control.split(1)]

    with torch.no_grad():
        run(control[:1])  # to warm up
        return {"seconds": fastest(lambda: run(control), 2) / cells}


def matmul(device="cpu", size=2048):
    """Floating-point operations a second that the device reaches on large matrices, in the precision in which
    stage 04 trains there."""
    import torch
    stage = importlib.import_module("04_train")
    dtype = stage.mixed_precision(torch.device(device))[1]
    a, b = torch.rand(2, size, size, device=device, dtype=dtype)
    return {"rate": 2 * size**3 / fastest(lambda: (a @ b)[0, 0].item(), 50)}


def stage_training(device, cells, genes, layers, n_cells, n_genes, n_values, cells_at_once=None,
                   is_compiled=False):
    """Stage 04 ready to train a full-size model on data like Norman's: its module, model, job and state."""
    stage = importlib.import_module("04_train")
    machine = stage.set_up_machine(SimpleNamespace(device=device, batch_size=cells))
    settings = stage.DEFAULTS["pretrained"] | {
        "batch_size": cells, "genes_per_batch": genes, "attention_dropout": 0.0 if device == "cpu" else 0.2,
        "targets_in_batch": False, "align": "layernorm", "cells_at_once": cells_at_once, "seed": 0}
    net = our_network(layers, attention_dropout=settings["attention_dropout"])
    settings["cells_at_once"] = stage.cells_at_once(net, genes, settings, machine)
    if is_compiled:
        net.compile()
    net.to(machine.device).train()
    job = stage.make_job(norman_data(n_cells, n_genes, n_values), settings, machine)
    return stage, net, job, stage.new_state(net, settings, machine)


def stage_step(n_warm_up, n_steps, **sizes):
    """Seconds of a training step of stage 04, the fastest of n_steps or of as many as take 20 seconds; the
    cells that go through the model at once; and the bytes of the GPU that it takes."""
    import torch
    stage, net, job, state = stage_training(**sizes)

    def step():
        genes = torch.randperm(sizes["n_genes"]).numpy()[:sizes["genes"]]
        batch = stage.read_batch(job.train_cells[:sizes["cells"]], genes, job)
        stage.add_gradients(net, state, job, batch)
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        norm.item()  # waits for the device

    for _ in range(n_warm_up):
        step()
    seconds = [fastest(step)]
    while len(seconds) < n_steps and sum(seconds) < 20:
        seconds.append(fastest(step))
    return {"seconds": min(seconds), "cells_at_once": job.settings["cells_at_once"],
            "gpu": gpu_memory(sizes["device"])}


def stage_epoch(n_steps, **sizes):
    """Seconds of a step in the loop of stage 04, and of making its batch alone; and the steps of an epoch."""
    stage, net, job, state = stage_training(**sizes)
    n_in_epoch, job.n_steps = job.n_steps, 3
    stage.train_epoch(net, state, job, 1)  # to warm up
    job.n_steps = n_steps
    seconds = fastest(lambda: stage.train_epoch(net, state, job, 2)) / n_steps

    def make_batches():
        rng = stage.random_stream("batches", 0, 3)
        cells = rng.permutation(job.train_cells)[:n_steps * sizes["cells"]]
        steps = stage.batches(job.data, cells, sizes["cells"], sizes["genes"], rng)
        for batch in stage.read_ahead(steps, job):
            pass
        batch.input.sum().item()

    return {"seconds": seconds, "batch": fastest(make_batches, 2) / n_steps, "steps": n_in_epoch}


def stage_predict(device, cells, genes, layers):
    """Seconds a cell of predicting `genes` genes, as stage 05 does, and the bytes of the GPU taken."""
    import numpy as np
    import torch
    import model
    autocast, _ = importlib.import_module("04_train").mixed_precision(torch.device(device))
    net = our_network(layers).to(device)
    control = np.random.default_rng(0).random((cells, genes), dtype=np.float32)
    with autocast():
        model.predict(net, np.arange(genes), control[:32], [7])  # to warm up
        seconds = fastest(lambda: model.predict(net, np.arange(genes), control, [7]), 2) / cells
    return {"seconds": seconds, "gpu": gpu_memory(device)}


def rounding(root, device):
    """What rounding to 16 bits does to the predictions of a model trained on the demo: the mean error of a
    condition's mean profile, and of a cell, in units of the mean predicted change."""
    import numpy as np
    import torch
    import model
    prepare, stage = (importlib.import_module(name) for name in ("03_prepare_data", "04_train"))
    data = prepare.load_dataset(Path(root) / "data/demo/dataset.h5", "")
    net = model.load(Path(root) / "runs/demo/scgenept_go_all/seed42/model.pt").to(device)
    autocast = stage.mixed_precision(torch.device(device))[0]
    if device == "cpu":  # in the precision of most GPUs
        autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)
    control, of_means, of_cells, changes = data.X[data.ctrl_cells[:100]].toarray(), [], [], []
    for row in np.flatnonzero(data.split == "test"):
        target_idx = data.targets[row][data.targets[row] >= 0]
        exact = model.predict(net, data.token_ids, control, target_idx)
        with autocast():
            error = model.predict(net, data.token_ids, control, target_idx) - exact
        of_means.append(np.abs(error.mean(0)).mean())
        of_cells.append(np.abs(error).mean())
        changes.append(np.abs((exact - control).mean(0)).mean())
    change = float(np.mean(changes))
    return {"mean": float(np.mean(of_means)) / change, "cell": float(np.mean(of_cells)) / change}


def gpu_memory(device):
    """Bytes that PyTorch has held at once on a GPU; 0 for a CPU."""
    import torch
    return 0 if device == "cpu" else torch.cuda.max_memory_allocated(device)


def prepare(folder, dataset, options):
    """Stage 03: its seconds, imports included, and the bytes that it read (None where it cannot be told)."""
    sys.argv = ["03_prepare_data.py", "--root", folder, "--dataset", dataset, *options]
    seconds, io = fastest(lambda: importlib.import_module("03_prepare_data").main()), Path("/proc/self/io")
    return {"seconds": seconds, "read": int(io.read_text().split()[1]) if io.exists() else None}


def split(n_cells):
    """Seconds of splitting Norman's labels; its peak memory is that of stage 03's imports."""
    stage = importlib.import_module("03_prepare_data")
    targets_of = {label: [gene for gene in label.split("+") if gene != "ctrl"]
                  for label in sorted({*norman_labels(n_cells)} - {"ctrl"})}
    return {"seconds": fastest(lambda: stage.split_conditions(targets_of, 1))}


def batches(folder, dataset, share=1):
    """Seconds of making a batch (genes, inputs, targets, flags) of 64 x 1,536 from a share of a dataset: read
    from the disk (None where that cannot be told), and again from the system's memory of the file; and the
    bytes of this process, less pages of the file that the system may take back (None where it does not
    tell)."""
    import os
    import numpy as np
    stage, path = importlib.import_module("04_train"), Path(folder) / "data" / dataset / "dataset.h5"
    data = stage.prepare.load_dataset(path, "03_prepare_data.py")
    n_cells = int(len(data.cell_condition) * share)
    machine = stage.set_up_machine(SimpleNamespace(device="cpu", batch_size=64))
    settings = {"batch_size": 64, "genes_per_batch": 1536, "cells_at_once": 1, "seed": 0}
    job, seconds = stage.make_job(data, settings, machine), []
    if hasattr(os, "posix_fadvise"):  # lets the system forget the file
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    for _ in range(2):
        rng, of_run, started = np.random.default_rng(0), [], time.perf_counter()
        for cells, genes in stage.batches(data, rng.permutation(n_cells)[:64 * 200], 64, 1536, rng):
            stage.read_batch(cells, genes, job)
            of_run.append(time.perf_counter() - started)
            started = time.perf_counter()
        seconds.append(float(np.median(of_run)))
    status = Path("/proc/self/status")
    own = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return {"cold": seconds[0] if hasattr(os, "posix_fadvise") else None, "seconds": seconds[1],
            "own": int(own[1]) * 1024 if own else None}


def annotations(folder, n_lines, n_terms):
    """Seconds of parsing a GAF with n_lines annotations and an OBO with n_terms terms."""
    import gzip
    import random
    stage, draw = importlib.import_module("01_fetch_annotations"), random.Random(0)
    obo, gaf = Path(folder) / "go.obo", Path(folder) / "goa.gaf.gz"
    obo.write_text("format-version: 1.2\n" + "".join(
        f"\n[Term]\nid: GO:{i:07d}\nname: process {i}\nnamespace: biological_process\n"
        f"def: \"What {i} does.\" [GOC:x]\nalt_id: GO:{i + 5_000_000:07d}\nsynonym: \"number {i}\" EXACT []\n"
        f"is_a: GO:{i // 2:07d} ! process {i // 2}\n"
        for i in range(n_terms)))
    with gzip.open(gaf, "wt", compresslevel=1) as file:
        file.write("!gaf-version: 2.2\n")
        for i in range(n_lines):
            gene, term, aspect = i % 20_000, draw.randrange(n_terms), "FCP"[i % 3]
            file.write(f"UniProtKB\tP{gene:05d}\tGENE{gene}\tinvolved_in\tGO:{term:07d}\tPMID:{i}\tIDA\t\t"
                       f"{aspect}\tProtein {gene}\tSYNONYM{gene}|OTHER{gene}\tprotein\ttaxon:9606\t"
                       "20240101\tUniProt\t\t\n")
    return {"seconds": fastest(lambda: stage.read_annotations(gaf, obo))}


def peak_memory():
    """Bytes of this process at its largest; NaN where the system does not tell."""
    if sys.platform == "win32":
        return float("nan")
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(measurement, **options):
    """Run a measurement in a process of its own: its numbers, and its peak memory in bytes as `peak`."""
    command = [sys.executable, __file__, "--measure", json.dumps([measurement, options])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {measurement} {options}: ended with {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------------
# Parts: what is compared, and with which goal

def row(what, value, goal="", met=None):
    """Print a line of the table: what was measured, its value, the goal and whether it is met."""
    verdict = "" if met is None else "(met)" if met else "(MISSED)"
    print(f"{what:<70} {value:>20}  {goal} {verdict}".rstrip(), flush=True)


def operations(cells, genes, layers):
    """Floating-point operations of a prediction by the formulas; a training step has three times as many."""
    encoder = layers * (8 * WIDTH**2 + 4 * WIDTH**2 + 4 * genes * WIDTH)
    a_gene = encoder + 2 * WIDTH**2 + 4 * WIDTH**2  # values, decoder
    return cells * genes * a_gene + genes * 2 * D_LANGUAGE * WIDTH


def row_of_share(seconds, n_operations):
    """Print which share of the rate of large matrix products, measured now, so many operations in so many
    seconds are."""
    rate = measure("matmul")["rate"]
    share = n_operations / seconds / rate
    row(f"  share of this machine's matrix-multiply rate, {rate / 1e9:,.0f} GFLOP/s", f"{share:.0%}")


def part_train(quick, _):
    sizes = {"cells": 2 if quick else 4, "genes": 512 if quick else 1536, "layers": 2 if quick else LAYERS}
    title = "training step, {cells} cells x {genes:,} genes, {layers} layers".format(**sizes)
    ours = measure("train", kind="ours", steps=2, **sizes)
    plain = measure("train", kind="plain", steps=1, **sizes)
    row(f"{title}: ours, plain", f"{ours['seconds']:.2f} s, {plain['seconds']:.2f} s")
    factor = plain["seconds"] / ours["seconds"]
    row("  faster by", f"{factor:.1f} x", ">= 4 x", factor >= 4)
    row("  peak memory: ours, plain", f"{ours['peak'] / GB:.2f} GB, {plain['peak'] / GB:.2f} GB")
    share = ours["peak"] / plain["peak"]
    row("  share of the plain one's memory", f"{share:.2f}", "<= 0.33", share <= 1 / 3)
    row_of_share(ours["seconds"], 3 * operations(**sizes))


def part_predict(quick, _):
    sizes = {"genes": 1000 if quick else N_GENES, "layers": 2 if quick else LAYERS}
    few, many = (measure("predict", kind="ours", cells=cells, outside=OUTSIDE, **sizes) for cells in (2, 8))
    plain = measure("predict", kind="plain", cells=2, outside=OUTSIDE, **sizes)
    known = measure("predict", kind="ours", cells=8, outside=0, **sizes)
    row("prediction, {genes:,} genes, {layers} layers, a cell: ours, plain".format(**sizes),
        f"{many['seconds']:.2f} s, {plain['seconds']:.2f} s")
    factor, factor_known = plain["seconds"] / many["seconds"], plain["seconds"] / known["seconds"]
    row("  faster by", f"{factor:.1f} x", ">= 4.5 x", factor >= 4.5)
    row("  with every gene in the vocabulary (else a tenth is not, as Norman's)", f"{factor_known:.1f} x")
    row("  peak memory: ours, plain", f"{few['peak'] / GB:.2f} GB, {plain['peak'] / GB:.2f} GB")
    growth = many["peak"] / few["peak"]
    row("  memory for 8 cells / for 2 cells (the allocator's noise is 0.2)", f"{growth:.2f}", "<= 1.25",
        growth <= 1.25)
    row_of_share(known["seconds"], operations(cells=1, **sizes))


def part_growth(quick, _):
    def step(sizes):
        """Seconds of a step, and its bytes beyond those of hardly any genes, with a small vocabulary."""
        done, least = (measure("train", kind="ours", steps=3, vocabulary=2000, **given)
                       for given in (sizes, sizes | {"cells": 1, "genes": 8}))
        return done["seconds"], done["peak"] - least["peak"]

    base = {"cells": 2, "genes": 256 if quick else 768, "layers": 2 if quick else 4}
    seconds, peak = step(base)
    row("a step of {cells} cells x {genes} genes, {layers} layers; memory beyond weights".format(**base),
        f"{seconds:.2f} s, {peak / GB:.2f} GB")
    for name in ("genes", "cells", "layers"):
        larger = base | {name: 2 * base[name]}
        grown_seconds, grown_peak = step(larger)
        row(f"  2 x {name}: time, memory", f"{grown_seconds / seconds:.2f} x, {grown_peak / peak:.2f} x",
            f"formula {operations(**larger) / operations(**base):.2f} x, 2.00 x")


def part_prepare(quick, folder):
    shrink = 10 if quick else 1
    sizes = {"n_cells": N_CELLS // shrink, "n_genes": N_GENES, "n_values": N_VALUES // shrink}
    measure("write_norman_like", folder=str(folder), **sizes)
    bare = measure("split", n_cells=sizes["n_cells"])
    done = measure("prepare", folder=str(folder), dataset="norman-like",
                   options=["--h5ad", f"{folder}/norman.h5ad", "--vocab", f"{folder}/vocab.json"])
    title = "stage 03, {n_cells:,} cells x {n_genes:,} genes, {n_values:,} values".format(**sizes)
    row(title, f"{done['seconds']:.1f} s", "<= 15 s", done["seconds"] <= 15)
    memory = (done["peak"] - bare["peak"]) / GB
    row("  memory beyond the interpreter and its imports", f"{memory:.2f} GB", "<= 1.5 GB", memory <= 1.5)
    if done["read"]:
        share = done["read"] / (sizes["n_cells"] * sizes["n_genes"] * 4)
        row("  bytes read / bytes of the dense counts layer", f"{share:.2f}", "< 1", share < 1)
    row("  the split", f"{bare['seconds'] * 1000:.1f} ms", "< 100 ms", bare["seconds"] < 0.1)


def part_large(quick, folder):
    """Stages 03 and 04 on screens that grow: genes without end, then cells without end."""
    shrink = 25 if quick else 1
    done = measure_large(folder, "wide", 500_000 // shrink, 20_000, 100, ["--n-genes", "5000"])
    row("  peak memory", f"{done['peak'] / GB:.2f} GB", "<= 4 GB", done["peak"] <= 4 * GB)
    for n_cells in (250_000 // shrink, 1_000_000 // shrink):
        done = measure_large(folder, f"long{n_cells}", n_cells, 8000, 2000, [])
        is_goal = n_cells == 1_000_000
        row("  peak memory", f"{done['peak'] / GB:.2f} GB", *["<= 4 GB", done["peak"] <= 4 * GB] * is_goal)
        batch = measure("batches", folder=str(folder), dataset=f"long{n_cells}")
        seconds = batch["cold"] or batch["seconds"]
        row("  stage 04: a batch of 64 cells x 1,536 genes, from the disk", f"{seconds * 1000:.1f} ms",
            *["< 10 ms", seconds < 0.01] * is_goal)
        row("  the same from the system's memory", f"{batch['seconds'] * 1000:.1f} ms")
        if batch["own"]:
            row("  memory without the mapped file", f"{batch['own'] / GB:.2f} GB",
                *["<= 4 GB", batch["own"] <= 4 * GB] * is_goal)


def measure_large(folder, name, n_cells, n_genes, n_targets, options):
    """Stage 03 on a file of write_large, as dataset `name`: prints its time, returns what it took."""
    measure("write_large", folder=str(folder), n_cells=n_cells, n_genes=n_genes, n_targets=n_targets)
    done = measure("prepare", folder=str(folder), dataset=name, options=[
        "--h5ad", f"{folder}/large.h5ad", "--condition-key", "guide", "--control", "NT",
        "--target-regex", "(.+)_g[0-9]+", "--normalize", "--vocab", "none", *options])
    (folder / "large.h5ad").unlink()
    title = f"stage 03, {n_cells:,} cells x {n_genes:,} genes, raw counts, {n_targets:,} targets"
    row(" ".join([title, *options]), f"{done['seconds']:.0f} s", "<= 180 s", done["seconds"] <= 180)
    return done


def part_batches(quick, folder):
    if not (folder / "data/norman-like/dataset.h5").exists():
        part_prepare(quick, folder)
    quarter, whole = (measure("batches", folder=str(folder), dataset="norman-like", share=share)
                      for share in (0.25, 1))
    row("a training batch of 64 cells x 1,536 genes", f"{whole['seconds'] * 1000:.2f} ms", "< 2.5 ms",
        whole["seconds"] < 2.5e-3)
    row("  4 x cells in the dataset: time (formula)", f"{whole['seconds'] / quarter['seconds']:.2f} (1.00)")


def part_parts(quick, _):
    """A full-size training step, 64 cells x 1,536 genes, on the CPU, in parts that fit into its memory."""
    sizes = {"device": "cpu", "cells": 64, "genes": 128 if quick else 1536, "layers": 2 if quick else LAYERS,
             "n_cells": 2000, "n_genes": N_GENES, "n_values": 2000 * 400}
    whole = measure("stage_step", n_warm_up=0, n_steps=1, **sizes)
    title = "training step, {cells} cells x {genes:,} genes, {layers} layers".format(**sizes)
    row(f"{title}, {whole['cells_at_once']} cells at once", f"{whole['seconds']:.1f} s")
    row("  peak memory", f"{whole['peak'] / GB:.2f} GB", "< 8 GB", whole["peak"] < 8 * GB)
    few = measure("stage_step", n_warm_up=1, n_steps=2, **sizes | {"cells": 4})
    row("  beside 16 steps of 4 cells: time", f"{whole['seconds'] / (16 * few['seconds']):.2f} x", "<= 1.1 x",
        whole["seconds"] <= 1.1 * 16 * few["seconds"])


def part_gpu(quick, folder, device="cuda"):
    """All that a GPU is for, in about eight minutes; a line that fails does not stop the others."""
    import torch
    if device != "cpu" and not torch.cuda.is_available():
        sys.exit("error: no NVIDIA GPU here; without one: gpu --device cpu --quick")
    sizes = {"device": device, "cells": 4 if quick else 64, "genes": 64 if quick else 1536,
             "layers": 1 if quick else LAYERS}
    few_cells = {"n_cells": 2000, "n_genes": N_GENES, "n_values": 2000 * 400}
    norman = few_cells if quick else {"n_cells": N_CELLS, "n_genes": N_GENES, "n_values": N_VALUES}

    attempt(gpu_name, device)
    rate = attempt(gpu_products, device, 512 if quick else 8192) or float("nan")
    attempt(gpu_tests)
    seconds = attempt(gpu_step, rate, "", **sizes, **few_cells) or 1
    attempt(gpu_step, rate, ", --compile", **sizes, **few_cells, is_compiled=True)
    for n_cells in (1, 2) if quick else (8, 16):
        attempt(gpu_step, rate, "", **sizes, **few_cells, cells_at_once=n_cells)
    attempt(gpu_prediction, device, 2 if quick else 256, 256 if quick else N_GENES, sizes["layers"])
    attempt(gpu_epoch, 5 if quick else max(5, min(200, int(40 / seconds))), sizes | norman)
    attempt(gpu_demo, folder, device, ["--epochs", 1] if quick else [])
    attempt(gpu_rounding, folder, device)
    attempt(gpu_processes, folder, device)


def attempt(action, *args, **options):
    """What action() returns, or None after a line that says why it failed."""
    try:
        return action(*args, **options)
    except (Exception, SystemExit) as error:
        row(f"FAILED: {action.__name__}", "", f"{type(error).__name__}: {error}")


def gpu_name(device):
    import torch
    name = device if device == "cpu" else torch.cuda.get_device_name(device)
    memory = 0 if device == "cpu" else torch.cuda.get_device_properties(device).total_memory
    row(f"{name}, torch {torch.__version__}", f"{memory / GB:.1f} GB")


def gpu_products(device, size):
    rate = measure("matmul", device=device, size=size)["rate"]
    row("large matrix products in the precision of training", f"{rate / 1e12:.2f} TFLOP/s")
    return rate


def gpu_tests():
    printed, _ = timed([sys.executable, "-m", "pytest", "-q", "tests/test_gpu.py"])
    row("tests/test_gpu.py: golden files and gradients on the card, and more", "",
        printed.splitlines()[-1].strip("= "))


def gpu_step(rate, title, **sizes):
    done = measure("stage_step", n_warm_up=3, n_steps=10, **sizes)
    name = "training step, {cells} cells x {genes:,} genes, {layers} layers".format(**sizes)
    row(f"{name}{title}", f"{done['seconds']:.3f} s", f"{done['cells_at_once']} cells at once")
    share = 3 * operations(sizes["cells"], sizes["genes"], sizes["layers"]) / done["seconds"] / rate
    row("  share of the rate of matrix products; peak memory", f"{share:.0%}, {memory_of(done)}")
    return done["seconds"]


def gpu_prediction(device, cells, genes, layers):
    done = measure("stage_predict", device=device, cells=cells, genes=genes, layers=layers)
    row(f"prediction of {genes:,} genes, a cell; peak memory",
        f"{done['seconds'] * 1000:.1f} ms, {memory_of(done)}")


def gpu_epoch(n_steps, sizes):
    done = measure("stage_epoch", n_steps=n_steps, **sizes)
    minutes = done["seconds"] * done["steps"] / 60
    row(f"an epoch of {sizes['n_cells']:,} cells, {done['steps']:,} steps, from {n_steps} of them",
        f"{minutes:.1f} min")
    row("  a step; making its batch alone", f"{done['seconds'] * 1000:.0f} ms, {done['batch'] * 1000:.1f} ms")


def gpu_demo(folder, device, options):
    for script in ("01_fetch_annotations.py", "02_embed.py", "03_prepare_data.py"):
        timed([sys.executable, KIT / script, "--root", folder])
    for script, options in (("04_train.py", options), ("05_eval.py", ["--controls", 20])):
        command = [sys.executable, KIT / script, "--root", folder, "--device", device, *options]
        row(f"{script} on the demo", f"{timed(command)[1]:.0f} s")


def gpu_rounding(folder, device):
    done = measure("rounding", root=str(folder), device=device)
    row("rounding of the demo's predictions / mean change: of means, of cells",
        f"{done['mean']:.2%}, {done['cell']:.1%}")


def gpu_processes(folder, device):
    import torch
    n = 2 if device == "cpu" else torch.cuda.device_count()
    if n < 2:
        return row("torchrun", "", "needs two cards")
    printed, seconds = timed([
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n,
        KIT / "04_train.py", "--root", folder, "--device", device.partition(":")[0], "--variant", "scgpt",
        "--name", "torchrun", "--epochs", 1, "--batch-size", 32 * n])
    losses = next(line for line in printed.splitlines() if "train MSE" in line)
    row(f"torchrun with {n} processes, an epoch of the demo", f"{seconds:.0f} s", losses.strip())


def memory_of(done):
    """The memory of a measurement, in words: that of the GPU, or of the process where there is none."""
    return f"{(done['gpu'] or done['peak']) / GB:.2f} GB"


def timed(command):
    """What a command prints, and the seconds that it takes."""
    started = time.perf_counter()
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=KIT)
    if done.returncode:
        sys.exit(f"{command}: ended with {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout, time.perf_counter() - started


def part_annotations(quick, folder):
    sizes = {"n_lines": 60_000 if quick else 600_000, "n_terms": 4_500 if quick else 45_000}
    done = measure("annotations", folder=str(folder), **sizes)
    title = "stage 01, GAF of {n_lines:,} lines and OBO of {n_terms:,} terms".format(**sizes)
    row(title, f"{done['seconds']:.1f} s", "< 10 s", done["seconds"] < 10)


def part_help(quick, _):
    for script in sorted(KIT.glob("0?_*.py")):
        command = [sys.executable, script, "--help"]
        seconds = fastest(lambda: subprocess.run(command, stdout=subprocess.DEVNULL, check=True), 3)
        limit = 2 if script.name.startswith(("04", "05")) else 0.5  # these two import torch
        row(f"{script.name} --help", f"{seconds:.2f} s", f"< {limit} s", seconds < limit)


PARTS = {function.__name__.removeprefix("part_"): function for function in
         (part_train, part_parts, part_predict, part_growth, part_prepare, part_large, part_batches,
          part_annotations, part_help, part_gpu)}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all but gpu)")
    parser.add_argument("--quick", action="store_true",
                        help="a fraction of the sizes, where the goals need not be met")
    parser.add_argument("--device", default="cuda", help="of the part gpu: cuda, cuda:1, cpu (default: cuda)")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)  # one measurement
    args = parser.parse_args()
    if args.measure:
        sys.path.insert(0, str(KIT))
        name, options = args.measure
        print(json.dumps({**globals()[name](**options), "peak": peak_memory()}))
        return
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.parts or [name for name in PARTS if name != "gpu"]:
            device = [args.device] if name == "gpu" else []
            PARTS[name](args.quick, Path(folder), *device)


if __name__ == "__main__":
    main()
