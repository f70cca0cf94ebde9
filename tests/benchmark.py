"""How fast and lean the kit is, as ratios to a plain implementation of the same formulas, all measured in one run.

    python tests/benchmark.py                    every part
    python tests/benchmark.py train predict      some
    python tests/benchmark.py --quick            every part at a fraction of its size, in a few minutes; goals do not apply

Parts: train, predict, growth, prepare (stage 03 on a file as large as Norman), batches, annotations (stage 01's parsers), help.
Every measurement runs in a process of its own, so that its peak memory is its own. The full size needs about 20 GB of memory
(the plain implementation does) and 3 GB of disk.
"""
import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

KIT = Path(__file__).resolve().parent.parent
N_CELLS, N_GENES, N_VALUES, N_TOKENS = 91_205, 5_045, 37_000_000, 60_697  # Norman's, and scGPT's vocabulary
WIDTH, LAYERS, D_LANGUAGE = 512, 12, 1536
GB = 2**30


# ---------------------------------------------------------------------------------------------------------------------
# The plain implementation

def plain_network(layers, dropout=0.2):
    """The formulas written down with PyTorch's own parts: a padding mask that masks nothing, and language vectors that are looked
    up and projected for every cell, from a trainable row for every entry of the vocabulary."""
    import torch
    from torch import nn

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.tokens_norm = nn.Embedding(N_TOKENS, WIDTH), nn.LayerNorm(WIDTH)
            self.values = nn.Sequential(nn.Linear(1, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(dropout))
            self.flags = nn.Embedding(3, WIDTH)
            self.language = nn.Sequential(nn.Embedding(N_TOKENS, D_LANGUAGE), nn.Linear(D_LANGUAGE, WIDTH), nn.LayerNorm(WIDTH))
            self.norm = nn.LayerNorm(WIDTH)
            self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 8, WIDTH, dropout, batch_first=True), layers)
            self.decoder = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(), nn.Linear(WIDTH, WIDTH), nn.LeakyReLU(), nn.Linear(WIDTH, 1))

        def forward(self, gene_ids, expression, perturbed):  # (L,), (B, L), (B, L) -> (B, L)
            gene_ids = gene_ids.repeat(len(expression), 1)
            x = self.tokens_norm(self.tokens(gene_ids)) + self.values(expression.clamp(max=512).unsqueeze(-1))
            x = x + self.flags(perturbed.long()) + self.language(gene_ids)
            h = self.encoder(self.norm(x), src_key_padding_mask=torch.zeros_like(perturbed))
            return self.decoder(h).squeeze(-1)

    return Plain()


def our_network(layers, dropout=0.2):
    """scGenePT with one language source, as stage 04 builds it for the CPU."""
    import numpy as np
    import model
    net = model.ScGenePT(model.Config(n_layers=layers, dropout=dropout, attention_dropout=0, languages={"go_c": D_LANGUAGE},
                                      n_language_rows=N_GENES))
    net.set_language(np.arange(N_GENES), {"go_c": np.random.default_rng(0).random((N_GENES, D_LANGUAGE), dtype=np.float32)})
    return net


# ---------------------------------------------------------------------------------------------------------------------
# Files as large as the real ones

def norman_labels(n_cells):
    """A condition label for every cell, with Norman's 284 labels in its proportions, in random order: (n_cells,)."""
    import numpy as np
    rows = [line.split("\t") for line in (KIT / "tests/golden/norman_conditions.tsv").read_text().splitlines()[1:]]
    share = np.array([int(count) for _, count in rows]) / sum(int(count) for _, count in rows)
    n = np.maximum(1, np.floor(share * n_cells)).astype(int)
    n[share.argmax()] += n_cells - n.sum()
    return np.random.default_rng(0).permutation(np.repeat([label for label, _ in rows], n))


def write_norman_like(folder, n_cells, n_genes, n_values):
    """norman.h5ad as GEARS writes it, with random values, and a vocab.json: `n_values` of the n_cells x n_genes are not zero, a
    dense layers/counts stands beside X, and all genes are ranked for every condition."""
    import h5py
    import numpy as np
    rng = np.random.default_rng(0)
    labels = norman_labels(n_cells)
    categories, codes = np.unique(labels, return_inverse=True)
    targets = sorted({part for label in categories for part in label.split("+")} - {"ctrl"})
    genes = targets + [f"GENE{i}" for i in range(n_genes - len(targets))]
    ids = [f"ENSG{i:011d}" for i in range(n_genes)]
    a_cell = rng.integers(3, 5, n_cells) * n_values // (n_cells * 4)  # values a cell
    a_cell = (a_cell * (n_values / a_cell.sum())).astype(int)
    indptr = np.concatenate([[0], np.cumsum(a_cell)])
    stride = np.repeat(n_genes // a_cell, a_cell)  # one value in every stretch of so many genes: sorted, none twice
    indices = ((np.arange(indptr[-1]) - np.repeat(indptr[:-1], a_cell)) * stride + rng.random(indptr[-1], dtype=np.float32) * stride)
    text = h5py.string_dtype()
    with h5py.File(folder / "norman.h5ad", "w") as file:
        file["X/data"], file["X/indices"] = rng.random(indptr[-1], dtype=np.float32) * 4, indices.astype(np.int32)
        file["X/indptr"] = indptr.astype(np.int32)
        file["X"].attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [n_cells, n_genes]})
        counts = file.create_dataset("layers/counts", (n_cells, n_genes), np.float32)
        for start in range(0, n_cells, 4096):
            counts[start:start + 4096] = 1
        names = [f"A549_{label}_{'1' if label == 'ctrl' else '1+1'}" for label in categories]
        for column, values in (("condition", categories), ("condition_name", names)):
            file[f"obs/__categories/{column}"] = np.array(values, dtype=text)
            file[f"obs/{column}"] = codes.astype(np.int16)
            file[f"obs/{column}"].attrs["categories"] = file[f"obs/__categories/{column}"].ref
        for column, values in (("gene_name", genes), ("gene_id", ids)):
            file[f"var/{column}"] = np.array(values, dtype=text)
        file["var"].attrs["_index"] = "gene_id"
        for name in names:
            if name != "A549_ctrl_1":
                file[f"uns/rank_genes_groups_cov_all/{name}"] = np.array(ids, dtype=object)[rng.permutation(n_genes)].astype(text)
    vocab = genes + [f"OTHER{i}" for i in range(N_TOKENS - n_genes - 3)] + ["<pad>", "<cls>", "<eoc>"]
    (folder / "vocab.json").write_text(json.dumps({symbol: row for row, symbol in enumerate(vocab)}))


# ---------------------------------------------------------------------------------------------------------------------
# Measurements: each runs in a process of its own and returns a dict of numbers

def train(kind, cells, genes, layers, steps):
    """Seconds of a training step, the fastest of `steps` after one to warm up."""
    import torch
    torch.manual_seed(0)
    net = {"plain": plain_network, "ours": our_network}[kind](layers)
    optimizer = torch.optim.Adam(net.parameters(), 1e-4)
    gene_ids, expression, perturbed = torch.randperm(N_GENES)[:genes], torch.rand(cells, genes), torch.rand(cells, genes) < 1e-3
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        loss = torch.nn.functional.mse_loss(net(gene_ids, expression, perturbed), expression)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    return {"seconds": min(seconds[1:])}


def predict(kind, cells, genes, layers):
    """Seconds a cell of predicting `cells` cells; the plain implementation takes them one at a time, as the released code does."""
    import numpy as np
    import torch
    import model
    net = {"plain": plain_network, "ours": our_network}[kind](layers).eval()
    gene_ids, control = np.arange(genes), np.random.default_rng(0).random((cells, genes), dtype=np.float32)
    seconds = []
    for n in (1, cells):  # the first to warm up
        started = time.perf_counter()
        if kind == "ours":
            model.predict(net, gene_ids, control[:n], [7], batch_size=2)
        else:
            with torch.no_grad():
                for cell in torch.from_numpy(control[:n]).split(1):
                    net(torch.from_numpy(gene_ids), cell, torch.from_numpy(gene_ids)[None] == 7)
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[-1] / cells}


def matmul():
    """Floating-point operations a second that this machine reaches on large matrices, float32."""
    import torch
    a, b, seconds = torch.rand(2048, 2048), torch.rand(2048, 2048), []
    for _ in range(8):
        started = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - started)
    return {"rate": 2 * 2048**3 / min(seconds)}


def make_norman(folder, **sizes):
    """Seconds of writing the files of write_norman_like."""
    started = time.perf_counter()
    write_norman_like(Path(folder), **sizes)
    return {"seconds": time.perf_counter() - started}


def prepare(folder, dataset):
    """Stage 03: its seconds, imports included, and the bytes that it read (None where the system does not tell)."""
    started = time.perf_counter()
    stage = importlib.import_module("03_prepare_data")
    sys.argv = ["03_prepare_data.py", "--root", folder, "--dataset", dataset, "--h5ad", f"{folder}/norman.h5ad", "--vocab", f"{folder}/vocab.json"]
    stage.main()
    seconds, io = time.perf_counter() - started, Path("/proc/self/io")
    return {"seconds": seconds, "read": int(io.read_text().split()[1]) if io.exists() else None}


def split(n_cells):
    """Seconds of splitting Norman's labels; its peak memory is that of stage 03's imports."""
    stage = importlib.import_module("03_prepare_data")
    targets_of = {label: stage.parse_condition(label) for label in sorted(set(norman_labels(n_cells)))}
    started = time.perf_counter()
    stage.split_conditions({label: targets for label, targets in targets_of.items() if targets}, 1)
    return {"seconds": time.perf_counter() - started}


def batches(folder, dataset, share):
    """Seconds of making a training batch of 64 cells x 1,536 genes from a share of a dataset's cells: drawn genes, inputs, targets,
    flags."""
    import numpy as np
    import torch
    stage = importlib.import_module("04_train")
    data = stage.load_dataset(Path(folder) / "data" / dataset / "dataset.h5", "03_prepare_data.py")
    n_cells = int(len(data.cell_condition) * share)
    data.X, data.ctrl_cells = data.X[:n_cells], data.ctrl_cells[data.ctrl_cells < n_cells]
    data.cell_condition = data.cell_condition[:n_cells]
    rng, input_cell, read = np.random.default_rng(0), stage.pair_cells(data, 0), stage.expression_reader(data.X, torch.device("cpu"))
    seconds = []
    steps = iter(stage.batches(data, rng.permutation(n_cells)[:64 * 200], 64, 1536, rng))
    for _ in range(n_cells // 64 if n_cells < 64 * 200 else 200):
        started = time.perf_counter()
        cells, genes = next(steps)
        read(input_cell[cells], genes), read(cells, genes), stage.perturbed_flags(data, cells, genes)
        seconds.append(time.perf_counter() - started)
    return {"seconds": float(np.median(seconds))}


def annotations(folder, n_lines, n_terms):
    """Seconds of parsing a GAF with n_lines annotations and an OBO with n_terms terms."""
    import gzip
    import random
    stage, draw = importlib.import_module("01_fetch_annotations"), random.Random(0)
    obo, gaf = Path(folder) / "go.obo", Path(folder) / "goa.gaf.gz"
    obo.write_text("format-version: 1.2\n" + "".join(
        f"\n[Term]\nid: GO:{i:07d}\nname: process {i}\nnamespace: biological_process\ndef: \"What {i} does.\" [GOC:x]\n"
        f"alt_id: GO:{i + 5_000_000:07d}\nsynonym: \"number {i}\" EXACT []\nis_a: GO:{i // 2:07d} ! process {i // 2}\n" for i in range(n_terms)))
    with gzip.open(gaf, "wt", compresslevel=1) as file:
        file.write("!gaf-version: 2.2\n")
        for i in range(n_lines):
            file.write(f"UniProtKB\tP{i % 20_000:05d}\tGENE{i % 20_000}\tinvolved_in\tGO:{draw.randrange(n_terms):07d}\tPMID:{i}\tIDA\t\t{'FCP'[i % 3]}"
                       f"\tProtein {i % 20_000}\tGENE{i % 20_000}\tprotein\ttaxon:9606\t20240101\tUniProt\t\t\n")
    started = time.perf_counter()
    stage.read_annotations(gaf, obo)
    return {"seconds": time.perf_counter() - started}


MEASUREMENTS = {f.__name__: f for f in (train, predict, matmul, make_norman, prepare, split, batches, annotations)}


def peak_memory():
    """Bytes of this process at its largest; NaN where the system does not tell (Windows)."""
    try:
        import resource
    except ImportError:
        return float("nan")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(measurement, **options):
    """Run a measurement in a process of its own: its numbers, and its peak memory in bytes as `peak`."""
    done = subprocess.run([sys.executable, __file__, "--measure", json.dumps([measurement, options])], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: {measurement} {options}: ended with {done.returncode}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Parts: what is compared, and with which goal

def row(what, value, goal="", met=None):
    """Print a line of the table."""
    print(f"{what:<66} {value:>24}  {goal:<14} {'' if met is None else 'met' if met else 'MISSED'}", flush=True)


def part_train(quick):
    sizes = {"cells": 2 if quick else 4, "genes": 512 if quick else 1536, "layers": 2 if quick else LAYERS}
    title = "training step, {cells} cells x {genes:,} genes, {layers} layers".format(**sizes)
    ours, plain = measure("train", kind="ours", steps=2, **sizes), measure("train", kind="plain", steps=1, **sizes)
    row(f"{title}: ours, plain", f"{ours['seconds']:.2f} s, {plain['seconds']:.2f} s")
    row("  faster by", f"{plain['seconds'] / ours['seconds']:.1f} x", ">= 4 x", plain["seconds"] >= 4 * ours["seconds"])
    row("  peak memory: ours, plain", f"{ours['peak'] / GB:.2f} GB, {plain['peak'] / GB:.2f} GB")
    row("  share of the plain one's memory", f"{ours['peak'] / plain['peak']:.2f}", "<= 0.33", ours["peak"] <= plain["peak"] / 3)


def part_predict(quick):
    sizes = {"genes": 1000 if quick else N_GENES, "layers": 2 if quick else LAYERS}
    few, many = (measure("predict", kind="ours", cells=cells, **sizes) for cells in (2, 8))
    plain = measure("predict", kind="plain", cells=1, **sizes)
    row("prediction, {genes:,} genes, {layers} layers, a cell: ours, plain".format(**sizes), f"{many['seconds']:.2f} s, {plain['seconds']:.2f} s")
    row("  faster by", f"{plain['seconds'] / many['seconds']:.1f} x", ">= 4.5 x", plain["seconds"] >= 4.5 * many["seconds"])
    row("  peak memory: ours, 2 cells at a time; plain, 1", f"{few['peak'] / GB:.2f} GB, {plain['peak'] / GB:.2f} GB")
    row("  memory for 8 cells / for 2 cells", f"{many['peak'] / few['peak']:.2f}", "<= 1.05", many["peak"] <= 1.05 * few["peak"])


def step_operations(cells, genes, layers):
    """Floating-point operations of a training step by the formulas; the backward pass takes twice those of the forward one."""
    a_gene = layers * (8 * WIDTH**2 + 4 * WIDTH**2 + 4 * genes * WIDTH) + 2 * WIDTH**2 + 4 * WIDTH**2  # encoder; values; decoder
    return 3 * (cells * genes * a_gene + genes * 2 * D_LANGUAGE * WIDTH)


def part_growth(quick):
    rate = measure("matmul")["rate"]
    base = {"cells": 2, "genes": 256 if quick else 768, "layers": 2 if quick else 4}
    weights = measure("train", kind="ours", steps=2, **base | {"cells": 1, "genes": 8})["peak"]
    reference = measure("train", kind="ours", steps=2, **base)
    row("growth of a training step from {cells} cells x {genes} genes, {layers} layers".format(**base),
        f"{reference['seconds']:.2f} s, {reference['peak'] / GB:.2f} GB")
    row("  share of the matrix-multiply rate", f"{step_operations(**base) / reference['seconds'] / rate:.0%} of {rate / 1e9:,.0f} GFLOP/s")
    for name in ("genes", "cells", "layers"):
        larger = base | {name: 2 * base[name]}
        grown = measure("train", kind="ours", steps=2, **larger)
        row(f"  2 x {name}: time, measured (formula)", f"{grown['seconds'] / reference['seconds']:.2f} "
            f"({step_operations(**larger) / step_operations(**base):.2f})")
        row(f"  2 x {name}: memory beyond the weights, measured (formula)",
            f"{(grown['peak'] - weights) / (reference['peak'] - weights):.2f} (2.00)")
    row("  share of the matrix-multiply rate, 2 x layers", f"{step_operations(**larger) / grown['seconds'] / rate:.0%}")


def part_prepare(quick, folder):
    shrink = 10 if quick else 1
    sizes = {"n_cells": N_CELLS // shrink, "n_genes": N_GENES, "n_values": N_VALUES // shrink}
    measure("make_norman", folder=str(folder), **sizes)
    bare = measure("split", n_cells=sizes["n_cells"])
    done = measure("prepare", folder=str(folder), dataset="norman-like")
    row("stage 03, {n_cells:,} x {n_genes:,} cells x genes, {n_values:,} values".format(**sizes), f"{done['seconds']:.1f} s", "<= 15 s", done["seconds"] <= 15)
    row("  memory beyond the interpreter and its imports", f"{(done['peak'] - bare['peak']) / GB:.2f} GB", "<= 1.5 GB",
        done["peak"] - bare["peak"] <= 1.5 * GB)
    if done["read"]:
        counts = sizes["n_cells"] * sizes["n_genes"] * 4
        row("  bytes read / bytes of the dense counts layer", f"{done['read'] / counts:.2f}", "< 1", done["read"] < counts)
    row("  the split", f"{bare['seconds'] * 1000:.1f} ms", "< 100 ms", bare["seconds"] < 0.1)


def part_batches(quick, folder):
    if not (folder / "data/norman-like/dataset.h5").exists():
        part_prepare(quick, folder)
    quarter, whole = (measure("batches", folder=str(folder), dataset="norman-like", share=share) for share in (0.25, 1))
    row("a training batch of 64 cells x 1,536 genes", f"{whole['seconds'] * 1000:.2f} ms", "< 2.5 ms", whole["seconds"] < 2.5e-3)
    row("  4 x cells in the dataset: time (formula)", f"{whole['seconds'] / quarter['seconds']:.2f} (1.00)")


def part_annotations(quick, folder):
    sizes = {"n_lines": 60_000 if quick else 600_000, "n_terms": 4_500 if quick else 45_000}
    done = measure("annotations", folder=str(folder), **sizes)
    row("GAF of {n_lines:,} lines and OBO of {n_terms:,} terms".format(**sizes), f"{done['seconds']:.1f} s, {done['peak'] / GB:.2f} GB", "< 10 s", done["seconds"] < 10)


def part_help(quick):
    for script in sorted(KIT.glob("0?_*.py")):
        seconds = []
        for _ in range(3):
            started = time.perf_counter()
            subprocess.run([sys.executable, script, "--help"], stdout=subprocess.DEVNULL, check=True)
            seconds.append(time.perf_counter() - started)
        row(f"{script.name} --help", f"{min(seconds):.2f} s", "< 0.5 s", min(seconds) < 0.5)


PARTS = {"train": part_train, "predict": part_predict, "growth": part_growth, "prepare": part_prepare, "batches": part_batches,
         "annotations": part_annotations, "help": part_help}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="every part at a fraction of its size; goals do not apply")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)  # what the processes of the measurements are started with
    args = parser.parse_args()
    if args.measure:
        sys.path.insert(0, str(KIT))
        name, options = args.measure
        print(json.dumps({**MEASUREMENTS[name](**options), "peak": peak_memory()}))
        return
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"unknown part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.parts or PARTS:
            needs_folder = name in ("prepare", "batches", "annotations")
            PARTS[name](args.quick, *[Path(folder)] * needs_folder)


if __name__ == "__main__":
    main()
