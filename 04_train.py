"""Stage 04: fine-tuning -> runs/<dataset>/<variant>/seed<N>/

    python 04_train.py                                     the demo: four small models from scratch
    python 04_train.py --dataset norman                    scGPT, scGenePT, its shuffled control; pretrained
    python 04_train.py --dataset norman --variant scgenept_go_c --seed 42 23 89 30 12
    python 04_train.py --dataset mine --variant scgpt scgenept_notes --no-pretrained --d-model 128
    torchrun --nproc_per_node 4 04_train.py --dataset norman      the same on four GPUs (several machines
                                                                  need --root on a disk that all share)

Variants: scgpt; scgenept_<source>, with several sources scgenept_<source>+<source>; genept_<source> (language
alone), -scratch after either (random attention); scgpt-counts, scgpt-tokens (scGPT without that
part). `-shuffled` at the end of a name gives every gene another gene's text: what such a control reaches does
not come from what the texts say.

--align takes one of the paper's ways of joining language with scGPT (appendix A.2): layernorm (the default,
which the paper kept), linear (no norm before the encoder), normalized (linear, language vectors scaled to
length 1), batchnorm (in place of the layer norm), dropout0 (layernorm without any dropout), projection
(starts from the least-squares projection of language vectors to pretrained token vectors), weights (a learned
factor for each part), two-encoders (language goes through a transformer of its own). target-by-text is this
kit's own: as layernorm, but a perturbed gene that has a text enters without its token. Otherwise the model
learns each training target by its token, which says nothing about other targets; without it, the model has
to use the text.

A run's folder holds model.pt (the epoch with the lowest validation error), state.pt (the last epoch, from
which the same command goes on), log.csv and config.json. A finished run is left as it is; with more --epochs
it goes on, and --name keeps runs with other settings apart.

A gene has three numbers, and the code keeps them apart by name:
    gene_idx       its position in the dataset: column of X, row of `genes`, what `targets` holds
    token_id       its row of scGPT's vocabulary, which the model calls gene_ids; <pad> if it is not in there
    language_row   its row of the model's language tables, which hold the dataset's genes alone
"""
import argparse
import contextlib
import gc
import importlib
import json
import math
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, pairwise
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch; else small steps crawl on a busy machine
os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what Apple's GPU cannot do runs on the CPU

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from tqdm import tqdm

import model

shared = importlib.import_module("01_fetch_annotations")
embed = importlib.import_module("02_embed")
prepare = importlib.import_module("03_prepare_data")

PRETRAINED_URL = "https://czi-scgenept-public.s3.amazonaws.com/models/pretrained/scgpt/"
PRETRAINED_FILES = ("args.json", "vocab.json", "best_model.pt")
VARIANTS = ["scgpt", "scgenept_go_all", "scgenept_go_all-shuffled"]
DEMO_VARIANTS = [*VARIANTS, "scgenept_go_all,align=target-by-text"]
DEFAULTS = {  # pretrained: Table 31 of the paper; the sizes are those of the pretrained model
    "pretrained": {"epochs": 20, "batch_size": 64, "lr": 1e-4, "genes_per_batch": 1536, "dropout": 0.2,
                   "residual": False},
    "from scratch": {"epochs": 12, "batch_size": 64, "lr": 1e-3, "genes_per_batch": 1536, "dropout": 0.0,
                     "residual": True, "d_model": 64, "n_layers": 2, "n_heads": 4, "d_hid": 64},
    "demo": {"epochs": 6, "batch_size": 32, "lr": 2e-3, "genes_per_batch": 1536, "dropout": 0.0,
             "residual": False, "d_model": 64, "n_layers": 1, "n_heads": 4, "d_hid": 64}}
SIZES = {  # their names in scGPT's args.json
    "d_model": "embsize", "n_layers": "nlayers", "n_heads": "nheads", "d_hid": "d_hid"}
IDENTITY = (  # the settings that make it another run; more epochs only go on with it
    "batch_size", "lr", "genes_per_batch", "dropout", "attention_dropout", "residual", "targets_in_batch",
    "align", "pretrained", *SIZES)
ALIGN = {  # --align: what it changes in the model's Config
    "layernorm": {}, "dropout0": {}, "projection": {}, "linear": {"layer_norm": False},
    "normalized": {"layer_norm": False, "normalize_language": True},
    "batchnorm": {"layer_norm": False, "batch_norm": True},
    "weights": {"modality_weights": True}, "two-encoders": {"two_encoders": True},
    "target-by-text": {"target_by_text": True}}
CPU_MEMORY = 2.5e9  # bytes for the cells that go through the model at once; malloc takes twice as many
PATIENCE = 10  # epochs without a lower validation error before a run stops
LOG_COLUMNS = ("epoch", "train_mse", "val_mse", "lr", "seconds", "cells_per_second")

# Each use of random numbers has its own stream, so that none depends on how many numbers another drew
STREAMS = {"pairs": 0, "batches": 1, "language": 2, "validation": 3, "controls": 4, "random_baseline": 5,
           "halves": 6, "predict": 7, "dropout": 8}


def random_stream(name, seed, *rest):
    """The NumPy generator of one purpose, for a seed and further numbers (epoch, condition, ...)."""
    return np.random.default_rng([seed, STREAMS[name], *rest])


# ------------------------------------------------------------------------------------------------------------
# Variants and their language vectors

def parse_variant(name, known_sources):
    """The parts of a variant's name, as a namespace: has_tokens, has_counts, sources, pretrained (whether its
    attention is), shuffled."""
    base = name.removesuffix("-shuffled")
    family, _, rest = base.partition("_")
    joined_sources = rest.removesuffix("-scratch")
    has_language = family in ("scgenept", "genept") and joined_sources
    if not has_language and base not in ("scgpt", "scgpt-counts", "scgpt-tokens"):
        sys.exit(f"error: unknown variant {name!r}: scgpt, scgpt-counts, scgpt-tokens, scgenept_<source> "
                 "or genept_<source> (+<source>, -scratch, -shuffled if wanted)")
    if base != name and not has_language:
        sys.exit(f"error: variant {name!r}: {base} has no texts to shuffle")
    return SimpleNamespace(
        name=name, sources=parse_sources(name, joined_sources, known_sources),
        has_tokens=base != "scgpt-tokens" and family != "genept",
        has_counts=base != "scgpt-counts" and family != "genept",
        pretrained=not rest.endswith("-scratch"), shuffled=base != name)


def parse_sources(name, joined, known_sources):
    """The sources that `joined`, part of a variant's name, joins by +. A source may have a + in its own name:
    the longest known source wins."""
    sources = []
    while joined:
        source = max((s for s in known_sources if f"{joined}+".startswith(f"{s}+")), key=len, default=None)
        if source is None:
            sys.exit(f"error: variant {name!r}: unknown source {joined!r}; known are "
                     f"{', '.join(sorted(known_sources))} (your own texts: 01 --tsv, then 02 --source)")
        sources.append(source)
        joined = joined[len(source) + 1:]
    return sources


def find_embeddings(root, dataset):
    """The embedding files of a dataset's space, {source: {(embedder, mode): path}}, from their names
    <source>.<embedder>.<mode>.h5."""
    found = {}
    folder = root / "data" / shared.space_of(dataset) / "embeddings"
    for path in sorted(folder.glob("*.*.*.h5")):
        source, *embedder, mode = path.name.removesuffix(".h5").split(".")
        found.setdefault(source, {})[".".join(embedder), mode] = path
    return found


def choose_embeddings(variant, found, args):
    """The embedding files of a variant's sources, {source: path}, and what the run's name says of the choice.

    By default the only embedder and mode that all the sources have, or else published and concat.
    """
    if not variant.sources:
        return {}, []
    for source in variant.sources:
        if source not in found:
            embed_it = shared.command("02_embed.py", args, "--source", source)
            sys.exit(f"error: {variant.name}: no vectors of the source {source}; run first: {embed_it}")
    common = set.intersection(*(set(found[source]) for source in variant.sources))
    if not common:
        sys.exit(f"error: {variant.name}: its sources share no embedder and mode; embed them alike with 02")
    embedders = {embedder for embedder, _ in common}
    embedder, embedder_label = choose("embedder", args.embedder, embedders, "published", variant)
    modes = {mode for other, mode in common if other == embedder}
    mode, mode_label = choose("mode", args.mode, modes, "concat", variant)
    return {source: found[source][embedder, mode] for source in variant.sources}, embedder_label + mode_label


def choose(option, wanted, available, preferred, variant):
    """The value of --embedder or --mode, and [option=value] unless that is the default."""
    # lsa-64 is lsa with --dim 64 of stage 02: the default only where it is alone
    whole = [name for name in available if name.rpartition("-")[0] not in available]
    default = whole[0] if len(whole) == 1 else preferred
    value = wanted or default
    if value not in available:
        sys.exit(f"error: {variant.name}: no vectors with {option} {value}; choose with --{option}: "
                 f"{', '.join(sorted(available))}")
    return value, [] if value == default else [f"{option}={value}"]


def language_tables(data, files, seed, shuffled):
    """The language vectors that training starts from: the dataset's distinct token_ids (R,),
    {source: (R, width) float32}, and whether a gene has a text in a source (R,).

    A gene without a text, or outside the vocabulary, gets a vector drawn from U(-0.1, 0.1). `shuffled`
    permutes the vectors among the genes that have a text.
    """
    token_ids, gene_idx = np.unique(data.token_ids, return_index=True)
    genes = data.genes[gene_idx]
    has_text = np.zeros(len(genes), dtype=bool)
    tables = {}
    for i, (source, path) in enumerate(files.items()):
        rng = random_stream("language", seed, i)
        names, vectors = embed.read_embeddings(path)
        row_of = {gene: row for row, gene in enumerate(names)}
        with_text = np.array([gene in row_of for gene in genes]) & (token_ids != data.pad_id)  # (R,)
        if not with_text.any():
            sys.exit(f"error: {path}: has no vector of any of the dataset's genes ({data.genes[0]}, ...)")

        file_rows = [row_of[gene] for gene in genes[with_text]]
        if shuffled:
            file_rows = rng.permutation(file_rows)
        table = rng.uniform(-0.1, 0.1, (len(genes), vectors.shape[1])).astype(np.float32)
        table[with_text] = vectors[file_rows]
        tables[source] = table
        has_text |= with_text
        note = " (SHUFFLED among genes)" if shuffled else ""
        print(f"  {source}: {with_text.sum():,} of {len(data.genes):,} genes have a text, vectors of "
              f"{vectors.shape[1]} numbers from {path.name}{note}")
    return token_ids, tables, has_text


# ------------------------------------------------------------------------------------------------------------
# The model of a run

def build_model(plan, data, seed):
    """The model of a plan (see plan_run) with the weights that training starts from."""
    variant, settings = plan.variant, plan.settings
    torch.manual_seed(seed)
    token_ids, tables, has_text = language_tables(data, plan.vectors, seed, variant.shuffled)
    names = ("dropout", "attention_dropout", "residual", *SIZES)
    net = model.ScGenePT(model.Config(
        n_tokens=data.n_tokens, pad_id=data.pad_id, has_tokens=variant.has_tokens,
        has_counts=variant.has_counts, n_language_rows=len(token_ids) if tables else 0,
        languages={source: table.shape[1] for source, table in tables.items()},
        **{name: settings[name] for name in names}, **ALIGN[settings["align"]]))
    if tables:
        net.set_language(token_ids, tables, token_ids[has_text])
    if plan.pretrained and variant.pretrained:
        try:
            taken, left = model.load_pretrained(net, plan.pretrained)
        except ValueError as error:
            sys.exit(f"error: {error}")
        parts, unused = (", ".join(sorted({key.split(".")[0] for key in keys})) for keys in (taken, left))
        print(f"  pretrained: {len(taken)} tensors of {parts} from {plan.pretrained}; not used: "
              f"{unused or 'nothing'}")
        if settings["align"] == "projection":
            fit_projection(net, token_ids, tables)
    return net


@torch.no_grad()
def fit_projection(net, token_ids, tables):
    """Start each source's projection at the least-squares solution that takes the genes' language vectors to
    their token vectors (`projection` of the paper's appendix A.2)."""
    goal = net.encoder(torch.from_numpy(token_ids))  # (R, d)
    for source, table in tables.items():
        with_one = torch.cat([torch.from_numpy(table), torch.ones(len(table), 1)], dim=1)  # (R, width + 1)
        solution = torch.linalg.lstsq(with_one, goal, driver="gelsd").solution  # (width + 1, d)
        projection = net.language_encoders[source].proj
        projection.weight.copy_(solution[:-1].T)
        projection.bias.copy_(solution[-1])


def find_pretrained(args, data, dataset_path):
    """scGPT's best_model.pt and its sizes; None and {} when training from scratch."""
    if args.kind != "pretrained":
        return None, {}
    if data.vocab == "own genes":
        sys.exit(f"error: {dataset_path} has a vocabulary of its own, which fits no pretrained model: "
                 "add --no-pretrained")
    folder = args.pretrained or args.root / "data" / "human" / "scgpt"
    if not args.pretrained:
        for name in PRETRAINED_FILES:
            shared.download(PRETRAINED_URL + name, folder / name)
    if shared.fingerprint(folder / "vocab.json") != data.vocab:
        prepare_it = shared.command("03_prepare_data.py", args, "--vocab", folder / "vocab.json")
        sys.exit(f"error: {dataset_path} was made with another vocabulary than {folder / 'vocab.json'}; "
                 f"run: {prepare_it}")
    saved = shared.read_json(folder / "args.json", object)
    try:
        return folder / "best_model.pt", {name: int(saved[key]) for name, key in SIZES.items()}
    except (KeyError, TypeError, ValueError):
        sys.exit(f"error: {folder / 'args.json'}: not scGPT's settings ({', '.join(SIZES.values())})")


# ------------------------------------------------------------------------------------------------------------
# Device and processes

def choose_device(name):
    """The torch device of --device; `auto` is CUDA or Apple's GPU (mps) where there is one, else the CPU.
    Under torchrun each process gets a GPU of its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL would use the first GPU otherwise
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        sys.exit(f"error: --device {name}: {str(error).splitlines()[0]}")
    return device


def mixed_precision(device):
    """Autocast context for `device`, and its dtype: on CUDA bfloat16 (float16 on older GPUs), else
    float32."""
    if device.type != "cuda":
        return contextlib.nullcontext, torch.float32
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return lambda: torch.autocast("cuda", dtype=dtype), dtype


def describe_device(device):
    """Device and precision, in words."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return name, str(mixed_precision(device)[1]).removeprefix("torch.")


def set_up_machine(args):
    """Where training runs, as a namespace: device, autocast, dtype, and torchrun's rank and n_processes (0
    and 1 without it)."""
    device = choose_device(args.device)
    autocast, dtype = mixed_precision(device)
    machine = SimpleNamespace(device=device, autocast=autocast, dtype=dtype, rank=0, n_processes=1)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        machine.rank, machine.n_processes = dist.get_rank(), dist.get_world_size()
    if args.batch_size % machine.n_processes:
        sys.exit(f"error: --batch-size {args.batch_size} is not a multiple of the {machine.n_processes} "
                 "processes")
    if machine.rank:
        sys.stdout = open(os.devnull, "w")
    return machine


def sum_over_processes(value, machine):
    """A tensor without dimensions, added up over the processes, as a number."""
    if machine.n_processes > 1:
        value = value.double()
        dist.all_reduce(value)
    return value.item()


# ------------------------------------------------------------------------------------------------------------
# Batches

def on_device(array, device):
    """A NumPy array as a tensor; to a GPU through pinned memory, so that the program need not wait for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def expression_reader(X, device):
    """A function (cells (B,), genes (L,)) -> expression (B, L), float32 on `device`."""
    n_bytes = X.shape[0] * X.shape[1] * 4
    if device.type == "cuda" and n_bytes < torch.cuda.mem_get_info(device)[0] / 4:
        return whole_matrix_reader(X, device)
    return lambda cells, genes: on_device(X[cells].toarray()[:, genes], device)


def whole_matrix_reader(X, device):
    """expression_reader for a GPU with room for the whole matrix: a batch is one indexing operation there."""
    whole = torch.empty(X.shape, device=device)
    for start in range(0, len(whole), 4096):
        cells = np.arange(start, min(start + 4096, len(whole)))
        whole[start:start + 4096] = torch.from_numpy(X[cells].toarray())
    return lambda cells, genes: whole[on_device(cells, device)[:, None], on_device(genes, device)]


def pair_cells(data, seed):
    """The control cell that each cell is predicted from (cells,): for a perturbed cell one drawn at random,
    once and for all; for a control cell itself (GEARS)."""
    input_cell = random_stream("pairs", seed).choice(data.ctrl_cells, len(data.cell_condition))
    input_cell[data.ctrl_cells] = data.ctrl_cells
    return input_cell


def split_cells(data):
    """Indices of the training cells (with the control cells) and of the validation cells.

    Without validation conditions (03 --split none) a tenth of the training conditions validates instead of
    training; an only condition does both.
    """
    trains, validates = np.isin(data.split, ["train", "ctrl"]), data.split == "val"  # (P,), (P,)
    if not validates.any():
        conditions = np.flatnonzero(data.split == "train")
        chosen = random_stream("validation", 0).permutation(conditions)[:max(1, len(conditions) // 10)]
        validates[chosen] = True
        is_only = len(conditions) == 1
        trains[chosen] = is_only
        share = "the only condition, also trained on" if is_only else "a tenth of the training conditions"
        print("  the split has no validation conditions; the best epoch is that for "
              f"{shared.shown(data.conditions[chosen], 5)} ({share})")
    return np.flatnonzero(trains[data.cell_condition]), np.flatnonzero(validates[data.cell_condition])


def batches(data, cells, batch_size, n_genes, rng, with_targets=False):
    """Yield (cells, genes) index arrays: consecutive batches of `cells`, each with one random set of genes
    for all of its cells, or with every gene where n_genes covers them.

    with_targets: the set contains the targets of the batch's cells.
    """
    gene_idx = np.arange(len(data.genes))
    for start in range(0, len(cells), batch_size):
        batch = cells[start:start + batch_size]
        genes = gene_idx
        if n_genes < len(gene_idx):
            first = gene_idx[:0]
            if with_targets:
                first = np.setdiff1d(data.targets[data.cell_condition[batch]], [-1])
            genes = np.concatenate([first, rng.permutation(np.setdiff1d(gene_idx, first))])[:n_genes]
        yield batch, genes


def perturbed_flags(data, cells, genes):
    """Which of `genes` (L,) are targets of each of `cells` (B,): bool (B, L)."""
    targets = data.targets[data.cell_condition[cells]]  # (B, K)
    return (targets[:, :, None] == genes).any(axis=1)


def read_batch(cells, genes, job):
    """This process's share of a batch (B cells, L genes), as a namespace: token_ids and measured (L,), input,
    target and flags (B, L) on the device; n_values, how many values of the whole batch are measured."""
    device = job.machine.device
    n_values = len(cells) * int(job.data.measured[genes].sum())
    cells = cells[job.machine.rank::job.machine.n_processes]
    gene_idx = on_device(genes, device)
    return SimpleNamespace(
        token_ids=job.token_ids[gene_idx], measured=job.measured[gene_idx],
        input=job.expression(job.input_cell[cells], genes), target=job.expression(cells, genes),
        flags=on_device(perturbed_flags(job.data, cells, genes), device), n_values=n_values)


def read_ahead(steps, job):
    """Yield read_batch of each (cells, genes) of `steps`. A thread reads the next one meanwhile: the cells
    may lie on a disk."""
    if job.machine.device.type == "mps":  # which two threads cannot safely share
        yield from (read_batch(cells, genes, job) for cells, genes in steps)
        return
    with ThreadPoolExecutor(1) as thread:
        futures = (thread.submit(read_batch, cells, genes, job) for cells, genes in steps)
        for batch, _ in pairwise(chain(futures, [None])):  # the second of a pair is being read by now
            yield batch.result()


# ------------------------------------------------------------------------------------------------------------
# Training

def train(run, net, data, settings, machine):
    """Train `net` in the folder `run`, from its state.pt if there is one; leaves model.pt, state.pt and
    log.csv. Returns the state that it reached (see new_state).

    All random numbers come from (seed, epoch, batch): a run that was killed and goes on gives the same
    numbers as one that was not.
    """
    net.to(machine.device)
    job = make_job(data, settings, machine)
    state = new_state(net, settings, machine)
    if (run / "state.pt").exists():
        resume(state, run, machine)
    parallel = net
    if machine.n_processes > 1:
        parallel = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)

    while len(state.log) < settings["epochs"] and not has_stopped(state.log):
        started = time.perf_counter()
        epoch = len(state.log) + 1
        train_mse = train_epoch(parallel, state, job, epoch)
        val_mse = validate(net, job)
        if not math.isfinite(val_mse):
            sys.exit(f"error: {run}: the validation error is {val_mse} in epoch {epoch}; lower --lr")

        # One line of the log
        lr = state.schedule.get_last_lr()[0]
        seconds = time.perf_counter() - started
        speed = (job.n_steps * settings["batch_size"] + len(job.val_cells)) / seconds
        line = dict(zip(LOG_COLUMNS, (epoch, train_mse, val_mse, lr, seconds, speed)))
        state.log.append(line)
        state.schedule.step()
        mark = "*" if best_of(state.log) is line else " "
        print("  epoch {epoch:2d}  train MSE {train_mse:.5f}  validation MSE {val_mse:.5f} {mark}  "
              "{seconds:.1f} s  {cells_per_second:,.0f} cells/s".format(mark=mark, **line))
        if machine.rank == 0:
            save_state(state, run)
    return state


def best_of(log):
    """The line of the log with the lowest validation error."""
    return min(log, key=lambda line: line["val_mse"])


def has_stopped(log):
    """Whether the validation error has not improved for PATIENCE epochs."""
    return bool(log) and len(log) - best_of(log)["epoch"] >= PATIENCE


def make_job(data, settings, machine):
    """What does not change during training, as a namespace: the arguments, the cells of the split, the input
    of each cell, and on the device token_ids (G,), measured (G,) and the reader of expression."""
    train_cells, val_cells = split_cells(data)
    n_steps = len(train_cells) // settings["batch_size"]  # drops the last, partial batch (paper)
    if not n_steps:
        sys.exit(f"error: {len(train_cells)} training cells are fewer than one batch; lower --batch-size")
    return SimpleNamespace(
        data=data, settings=settings, machine=machine,
        train_cells=train_cells, val_cells=val_cells, n_steps=n_steps,
        input_cell=pair_cells(data, settings["seed"]), expression=expression_reader(data.X, machine.device),
        token_ids=torch.from_numpy(data.token_ids.astype(np.int64)).to(machine.device),
        measured=torch.from_numpy(data.measured).to(machine.device))


def train_epoch(net, state, job, epoch):
    """One pass over the training cells. Returns the mean of its batches' losses."""
    settings, machine = job.settings, job.machine
    rng = random_stream("batches", settings["seed"], epoch)
    cells_in_order = rng.permutation(job.train_cells)[:job.n_steps * settings["batch_size"]]
    steps = batches(job.data, cells_in_order, settings["batch_size"], settings["genes_per_batch"], rng,
                    settings["targets_in_batch"])
    progress = tqdm(read_ahead(steps, job), f"  epoch {epoch}", job.n_steps, leave=False, unit=" cells",
                    unit_scale=settings["batch_size"], disable=True if machine.rank else None)
    total, n_taken = torch.zeros(2, device=machine.device)
    net.train()
    for step, batch in enumerate(progress, 1):
        # Seeded at each step, so that dropout is the same after a resume
        rng_of_step = random_stream("dropout", settings["seed"], epoch, step, machine.rank)
        torch.manual_seed(int(rng_of_step.integers(2**63)))
        loss = add_gradients(net, state, job, batch)
        state.scaler.unscale_(state.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()

        is_taken = norm.isfinite() | (not state.scaler.is_enabled())  # in float16, overflow skips a step
        total += torch.where(is_taken, loss, 0)
        n_taken += is_taken
        if machine.device.type == "cpu" or step % 50 == 0 or step == job.n_steps:  # item() makes a GPU wait
            mse = (total / n_taken.clamp(min=1)).item()
            if not math.isfinite(mse):
                sys.exit(f"error: the training error is {mse} in epoch {epoch}, batch {step}; "
                         f"lower --lr {settings['lr']:g}")
            progress.set_postfix(mse=f"{mse:.4g}")
    if not n_taken:
        sys.exit(f"error: every step of epoch {epoch} overflowed in float16; lower --lr {settings['lr']:g}")
    return sum_over_processes(total, machine) / (n_taken.item() * machine.n_processes)


def add_gradients(net, state, job, batch):
    """The gradients of a batch's mean squared error, with fewer cells at once where a GPU's memory is too
    small. Returns this process's error, without gradient."""
    settings = job.settings
    while True:
        try:
            return add_parts(net, state, job, batch)
        except torch.cuda.OutOfMemoryError:
            # Other processes may have got their gradients; batchnorm takes a batch in one piece
            cannot_repeat = job.machine.n_processes > 1 or settings["align"] == "batchnorm"
            if settings["cells_at_once"] == 1 or cannot_repeat:
                raise
        # Out here, the error no longer holds the tensors of the pass that failed
        settings["cells_at_once"] = math.ceil(settings["cells_at_once"] / 2)
        print(f"  out of memory: goes on with {settings['cells_at_once']} cells at once")
        net.zero_grad()
        torch.cuda.empty_cache()


def add_parts(net, state, job, batch):
    """Add up the gradients of a batch, one part of its cells after the other: less memory, and the gradients
    of one piece but for what dropout draws."""
    parts = parts_of(batch, job)
    total = torch.zeros((), device=job.machine.device)
    for part in parts:
        if job.machine.n_processes > 1:  # DistributedDataParallel averages the gradients once a batch
            net.require_backward_grad_sync = part is parts[-1]
        loss = squared_error(net, job, batch, part) * job.machine.n_processes / batch.n_values
        state.scaler.scale(loss).backward()
        total += loss.detach()
    return total


def parts_of(batch, job):
    """The cells of a batch (see read_batch), as slices that fit into the memory with their gradients."""
    n = job.settings["cells_at_once"]
    return [slice(start, start + n) for start in range(0, len(batch.flags), n)]


@torch.no_grad()
def validate(net, job):
    """Mean squared error over the validation cells; the same genes after every epoch, so that epochs
    compare."""
    net.eval()
    settings = job.settings
    rng = random_stream("validation", settings["seed"])
    steps = batches(job.data, job.val_cells, settings["batch_size"], settings["genes_per_batch"], rng)
    squared, n = torch.zeros((), device=job.machine.device), 0
    for batch in read_ahead(steps, job):
        for part in parts_of(batch, job):
            squared += squared_error(net, job, batch, part)
        n += batch.n_values
    return sum_over_processes(squared, job.machine) / n


def squared_error(net, job, batch, part):
    """Squared error of a part of a batch, a slice of its cells, summed over cells x measured genes."""
    with job.machine.autocast():
        predicted = net(batch.token_ids, batch.input[part], batch.flags[part])
    return ((predicted.float() - batch.target[part]) ** 2 * batch.measured).sum()


def cells_at_once(net, n_genes, settings, machine):
    """How many cells of a batch go through the model at once, with what their gradients need: the option's
    number, or as many as fit into the free memory of a GPU, and else into CPU_MEMORY."""
    if machine.device.type == "cuda":
        gc.collect()  # an optimizer refers to itself: the run before may still lie in memory
        torch.cuda.empty_cache()
    n_cells = settings["batch_size"] // machine.n_processes
    if settings["align"] == "batchnorm":
        return n_cells
    if settings["cells_at_once"]:
        return min(settings["cells_at_once"], n_cells)

    # The numbers that a cell's gradients need, counted in the model's forward pass
    config = net.config
    n_layers = config.n_layers * (1 + config.two_encoders)
    numbers = n_genes * (n_layers * (12 * config.d_model + 2 * config.d_hid) + 12 * config.d_model)
    memory = CPU_MEMORY
    if machine.device.type == "cuda":
        for_weights = 16 * sum(p.numel() for p in net.parameters())  # and gradients, and Adam's moments
        # A quarter of the memory may hold the expression matrix
        memory = 0.6 * torch.cuda.mem_get_info(machine.device)[0] - for_weights
    elif config.attention_dropout or machine.device.type == "mps":
        # No fused attention: every gene's weight for every gene is kept
        numbers += 3 * n_layers * config.n_heads * n_genes ** 2
    return min(max(1, int(memory // (4 * numbers))), n_cells)


def new_state(net, settings, machine):
    """What changes during training, as a namespace: the model, optimizer, learning rate schedule and gradient
    scaler; the log, a dict an epoch."""
    optimizer = torch.optim.Adam(net.parameters(), lr=settings["lr"], fused=machine.device.type == "cuda")
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)
    return SimpleNamespace(
        net=net, optimizer=optimizer, schedule=schedule,
        scaler=torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16),
        log=[])


def resume(state, run, machine):
    """Load what save_state wrote."""
    try:
        saved = torch.load(run / "state.pt", map_location="cpu", weights_only=True)
        for group in saved["optimizer"]["param_groups"]:
            group["fused"] = machine.device.type == "cuda"  # whatever device the run began on
        for name in ("net", "optimizer", "schedule", "scaler"):
            if saved[name]:  # a scaler's is empty where the precision did not need one
                getattr(state, name).load_state_dict(saved[name])
        state.log = saved["log"]
    except Exception as error:  # torch raises many kinds for a damaged file
        sys.exit(f"error: {run / 'state.pt'}: cannot be read ({type(error).__name__}); --force trains anew")
    print(f"  goes on after epoch {len(state.log)}")
    if machine.rank == 0:
        save_derived(state, run)


def save_state(state, run):
    """Write state.pt first: after a crash, model.pt and log.csv are made from it."""
    saved = {name: getattr(state, name).state_dict() for name in ("net", "optimizer", "schedule", "scaler")}
    with shared.replacing(run / "state.pt") as partial, open(partial, "wb") as file:
        torch.save(saved | {"log": state.log}, file)
    save_derived(state, run)


def save_derived(state, run):
    """Write model.pt, if the last epoch is the best one, and log.csv, whose numbers read back exactly."""
    if best_of(state.log) is state.log[-1]:
        with shared.replacing(run / "model.pt") as partial:
            model.save(state.net, partial)
    lines = [",".join(map(repr, line.values())) for line in state.log]
    shared.write_text(run / "log.csv", "\n".join([",".join(LOG_COLUMNS), *lines, ""]))


# ------------------------------------------------------------------------------------------------------------
# Runs

def identity(config):
    """The part of a run's config that makes it another run, as shared.difference compares it."""
    return {"options": {name: config.get(name) for name in IDENTITY}, "inputs": config.get("inputs", {})}


def train_run(run, config, plan, data, args, machine):
    """Train one variant with one seed in the folder `run`, or go on there, unless it is finished.

    --force trains in a folder beside it, which takes its place at the end.
    """
    new = run.with_name(f"{run.name}.new")
    folder = new if args.force else run
    if machine.rank == 0:
        if read_config(new).get("finished"):  # killed before it took its place
            replace_folder(run, new)
        clear_folder(folder, config, args.force)
    if machine.n_processes > 1:
        dist.barrier()
    old = read_config(folder)
    if old.get("finished") and (old["stopped_early"] or old["epochs"] >= config["epochs"]):
        print(f"  finished already with --epochs {old['epochs']} (--force trains anew)")
        return

    net = build_model(plan, data, config["seed"])
    config["n_parameters"] = sum(p.numel() for p in net.parameters())
    n_genes = min(config["genes_per_batch"], len(data.genes))
    config["cells_at_once"] = cells_at_once(net, n_genes, config, machine)
    print(f"  {config['n_parameters']:,} parameters; a batch: {config['batch_size']} cells x {n_genes:,} "
          f"genes, {config['cells_at_once']} cells at once")
    if args.compile:
        torch.compiler.reset()  # otherwise the fourth kind of model in one command is not compiled
        net.compile()

    if machine.rank == 0:
        shared.write_text(folder / "config.json", json.dumps(config | {"finished": False}, indent=1))
    state = train(folder, net, data, config, machine)
    best = best_of(state.log)
    print(f"  best epoch {best['epoch']}, validation MSE {best['val_mse']:.5f}")
    if machine.rank == 0:
        config |= {"epochs": max(config["epochs"], len(state.log)), "stopped_early": has_stopped(state.log),
                   "best_epoch": best["epoch"], "best_val_mse": best["val_mse"], "finished": True}
        shared.write_text(folder / "config.json", json.dumps(config, indent=1))
        if args.force:
            replace_folder(run, new)


def read_config(run):
    """The config of the run in a folder, {} if there is none."""
    path = run / "config.json"
    return shared.read_json(path, object) if path.exists() else {}


def clear_folder(folder, config, force):
    """Empty a run's folder, unless it can go on from what is there. Weights of another run are an error; with
    --force they are what an earlier --force left behind."""
    old = read_config(folder)
    words = shared.difference(identity(old), identity(config))
    if words and not force and any(folder.glob("*.pt")):
        reason = words if old else "its config.json is missing"
        sys.exit(f"error: {folder} was trained otherwise ({reason}); keep both with --name, or replace it "
                 "with --force")
    is_lost = old.get("finished") and not (folder / "model.pt").exists()
    if is_lost:
        print("  model.pt is missing: trains again")
    if words or is_lost:
        shutil.rmtree(folder, ignore_errors=True)
    for leftover in folder.glob("*.tmp"):  # of a run that was killed
        leftover.unlink()


def replace_folder(run, new):
    """Put the folder `new` in the place of `run`."""
    shutil.rmtree(run, ignore_errors=True)
    new.rename(run)


def only_trainer(run, machine):
    """Lock the folder `run` until the `with` block ends. The first process holds the lock for all."""
    if machine.rank:
        return contextlib.nullcontext()
    run.parent.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(run.with_name(f".{run.name}.lock")).acquire(timeout=0)
    except Timeout:
        sys.exit(f"error: {run}: another process trains there")


def find_runs(root, dataset, wanted=None):
    """The finished runs of a dataset, as namespaces (name, seed, path, config), in order of name and seed:
    all, or those with the names `wanted`. Runs that are not finished or have other data are left out, with a
    line."""
    folder = root / "runs" / dataset
    dataset_made = shared.fingerprint(root / "data" / dataset / "dataset.h5")
    paths = sorted(folder.glob("*/seed*[0-9]"))  # not seed42.new, of a --force under way
    runs = []
    for path in paths:
        name, config = path.parent.name, read_config(path)
        if not config or wanted is not None and name not in wanted:
            continue
        train_it = f"python {config['command']}"
        if not config["finished"]:
            print(f"left out: {path} is not finished; go on: {train_it}")
        elif not (path / "model.pt").exists():
            print(f"left out: {path} has no model.pt; train again: {train_it}")
        elif config.get("inputs", {}).get("dataset.h5") != dataset_made:
            print(f"left out: {path}: the dataset has changed since; train again: {train_it} --force")
        else:
            seed = config["seed"]
            runs.append(SimpleNamespace(name=name, seed=seed, path=path / "model.pt", config=config))
    for name in wanted or ():
        if not any(run.name == name for run in runs):
            there = ", ".join(sorted({path.parent.name for path in paths})) or "none"
            sys.exit(f"error: --run {name}: not found in {folder} (there: {there}), or left out above")
    return sorted(runs, key=lambda run: (not run.name.startswith("scgpt"), run.name, run.seed))


# ------------------------------------------------------------------------------------------------------------

def parse_arguments():
    parser = group = shared.common_options(argparse.ArgumentParser(description=__doc__))

    def add(name, **options):
        key = name.strip("-").replace("-", "_")
        if key in DEFAULTS["from scratch"]:
            values = [f"{kind} {of_kind[key]}" for kind, of_kind in DEFAULTS.items() if key in of_kind]
            options["help"] += f" (default: {', '.join(values)})"
        group.add_argument(name, **options)

    add("--variant", nargs="+", metavar="NAME",
        help=f"NAME or NAME,align=WAY (default: {' '.join(VARIANTS)}; demo: also {DEMO_VARIANTS[-1]})")
    add("--seed", nargs="+", type=shared.seed, default=[42], metavar="N",
        help="(default: 42; the paper's: 42 23 89 30 12)")
    add("--name", metavar="NAME", help="added to the name of the run's folder, to keep other settings apart")
    add("--embedder", metavar="NAME",
        help="which vectors, where a source has several (default: the only ones, else published)")
    add("--mode", choices=("concat", "avg"),
        help="how texts were embedded, where a source has both (default: the only ones, else concat)")
    add("--compile", action="store_true", help="compile the model: minutes at first, for long runs on a GPU")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")

    group = parser.add_argument_group("training")
    add("--epochs", type=shared.positive, metavar="N", help="at most")
    add("--batch-size", type=shared.positive, metavar="N", help="cells a batch")
    add("--cells-at-once", type=shared.positive, metavar="N",
        help="a batch goes through the model in parts of so many cells: less memory, the same training but "
             "for what dropout draws (default: as many as fit)")
    add("--lr", type=float, metavar="X", help="Adam's learning rate, times 0.9 after each epoch")
    add("--genes-per-batch", type=shared.positive, metavar="N", help="genes drawn for a batch")
    add("--targets-in-batch", action="store_true",
        help="the genes drawn for a batch contain its cells' targets (in the paper they need not)")
    add("--dropout", type=fraction, metavar="X", help="share of values set to zero")
    add("--attention-dropout", type=fraction, metavar="X",
        help="of attention probabilities (default: as --dropout; 0 on a CPU, whose fast attention has none)")

    group = parser.add_argument_group("model")
    add("--align", choices=ALIGN, default="layernorm", metavar="WAY",
        help=f"how language joins scGPT: {', '.join(ALIGN)} (default: layernorm)")
    add("--residual", action=argparse.BooleanOptionalAction,
        help="the model predicts the change from the input expression")
    add("--pretrained", type=Path, metavar="DIR",
        help="folder with scGPT's best_model.pt, args.json, vocab.json (default: data/human/scgpt/, fetched)")
    add("--no-pretrained", action="store_true", help="start from random weights, with these sizes:")
    add("--d-model", type=shared.positive, metavar="N", help="width of the model")
    add("--n-layers", type=shared.positive, metavar="N", help="layers of the transformer")
    add("--n-heads", type=shared.positive, metavar="N", help="attention heads of a layer")
    add("--d-hid", type=shared.positive, metavar="N", help="width inside the feed-forward blocks")
    args = parser.parse_args()
    check_arguments(args)
    return args


def fraction(text):
    """A number from 0 to below 1 on the command line (the type of an argparse option)."""
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError("has to be from 0 to below 1")
    return float(text)


def check_arguments(args):
    """Fill in the defaults of the dataset. Ends the run for options that do not go together."""
    is_demo = shared.space_of(args.dataset) == "demo"
    kind = "demo" if is_demo else "from scratch" if args.no_pretrained else "pretrained"
    args.kind = kind
    if kind == "pretrained" and any(getattr(args, name) for name in SIZES):
        sys.exit("error: the pretrained model sets --d-model, --n-layers, --n-heads and --d-hid; to choose "
                 "them, add --no-pretrained")
    for name, value in DEFAULTS[kind].items():
        if getattr(args, name) is None and name != "residual":  # see plan_run
            setattr(args, name, value)
    args.variant = args.variant or (DEMO_VARIANTS if is_demo else VARIANTS)

    if not args.lr > 0:  # nor NaN
        sys.exit(f"error: --lr {args.lr:g}: has to be above 0")
    if args.name:
        shared.check_name(args.name, "--name")
    if args.pretrained and kind != "pretrained":
        sys.exit("error: --pretrained: not with --no-pretrained, nor for the demo, whose genes are invented")
    if kind != "pretrained" and args.d_model % args.n_heads:
        sys.exit(f"error: --d-model {args.d_model} is not a multiple of --n-heads {args.n_heads}")


def plan_run(name, embeddings, pretrained, sizes, args, machine):
    """What --variant NAME, or NAME,align=WAY, stands for, as a namespace: variant, name (of the run),
    vectors {source: file}, settings, pretrained (file or None). sizes: those of a pretrained model."""
    variant_name, _, align = name.partition(",align=")
    align = align or args.align
    if align not in ALIGN:
        sys.exit(f"error: variant {name!r}: --align is one of {', '.join(ALIGN)}")
    variant = parse_variant(variant_name, {*shared.SOURCES, *embeddings})
    vectors, labels = choose_embeddings(variant, embeddings, args)
    if not variant.sources:
        align = "layernorm"
    default_residual = DEFAULTS[args.kind]["residual"] and variant.has_counts
    residual = default_residual if args.residual is None else args.residual
    settings = {name: getattr(args, name) for name in ("epochs", "cells_at_once", *IDENTITY)}
    settings |= {**sizes, "pretrained": pretrained is not None, "align": align, "residual": residual}
    if args.attention_dropout is None:
        settings["attention_dropout"] = 0.0 if machine.device.type == "cpu" else args.dropout
    if align == "dropout0":
        settings |= {"dropout": 0.0, "attention_dropout": 0.0}

    problems = {
        "--align batchnorm takes a batch in one piece: it normalizes by all of its cells":
            align == "batchnorm" and (machine.n_processes > 1 or args.cells_at_once),
        "--align target-by-text needs a variant with tokens":
            align == "target-by-text" and not variant.has_tokens,
        "--align projection needs pretrained token vectors":
            align == "projection" and not (pretrained and variant.pretrained and variant.has_tokens),
        "--residual needs a variant with counts": residual and not variant.has_counts}
    for problem, is_there in problems.items():
        if is_there:
            sys.exit(f"error: {variant.name}: {problem}")

    if align != "layernorm":
        labels += [f"align={align}"]
    if residual != default_residual:
        labels += ["residual" if residual else "no-residual"]
    if args.targets_in_batch:
        labels += ["targets-in-batch"]
    if args.name:
        labels += [f"name={args.name}"]
    return SimpleNamespace(variant=variant, name=",".join([variant.name, *labels]), vectors=vectors,
                           settings=settings, pretrained=pretrained)


def make_config(plan, seed, inputs, machine):
    """What config.json says of a run, before it is trained. inputs: {name: fingerprint} of dataset and
    weights."""
    device, precision = describe_device(machine.device)
    about = shared.provenance("")
    about.pop("made_from")  # which the settings and inputs say here
    return about | {
        "variant": plan.name, "seed": seed, "sources": plan.variant.sources, **plan.settings,
        "embeddings": {source: path.name for source, path in plan.vectors.items()},
        "inputs": inputs | {source: shared.fingerprint(path) for source, path in plan.vectors.items()},
        "device": device, "precision": precision, "n_processes": machine.n_processes,
        "versions": json.loads(about["versions"])}


def main():
    args = parse_arguments()
    dataset_path = args.root / "data" / args.dataset / "dataset.h5"
    data = prepare.load_dataset(dataset_path, shared.command("03_prepare_data.py", args))
    embeddings = find_embeddings(args.root, args.dataset)
    machine = set_up_machine(args)
    pretrained, sizes = find_pretrained(args, data, dataset_path)
    plans = [plan_run(name, embeddings, pretrained, sizes, args, machine) for name in args.variant]
    processes = f", {machine.n_processes} processes" if machine.n_processes > 1 else ""
    print("device: {}, {}{}".format(*describe_device(machine.device), processes))

    inputs = {"dataset.h5": shared.fingerprint(dataset_path)}
    if pretrained:
        inputs["pretrained"] = shared.fingerprint(pretrained)
    for plan in plans:
        for seed in args.seed:
            run = args.root / "runs" / args.dataset / plan.name / f"seed{seed}"
            print("{}, seed {} -> {}; dropout {dropout:g}, of attention {attention_dropout:g}".format(
                plan.name, seed, run, **plan.settings))
            with only_trainer(run, machine):
                train_run(run, make_config(plan, seed, inputs, machine), plan, data, args, machine)
    print(f"next: {shared.command('05_eval.py', args)}")
    if machine.n_processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    shared.run(main)
