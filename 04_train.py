"""Stage 04: fine-tuning -> runs/<dataset>/<variant>/seed<N>/

    python 04_train.py                                            the demo: three small models from scratch
    python 04_train.py --dataset norman                           scGPT, scGenePT, its shuffled control; pretrained
    python 04_train.py --dataset norman --variant scgenept_go_c --seed 42 23 89 30 12
    python 04_train.py --dataset mine --variant scgpt scgenept_notes --no-pretrained --d-model 128
    torchrun --nproc_per_node 4 04_train.py --dataset norman      the same on four GPUs

Variants: scgpt; scgenept_<source>, with several sources scgenept_<source>+<source>; genept_<source> (language alone),
-scratch after either (attention from random weights); scgpt-counts, scgpt-tokens (scGPT without that part). `-shuffled` at
the end of a name gives every gene another gene's text: what such a control reaches does not come from what the texts say.

--align takes one of the paper's ways of joining language with scGPT (appendix A.2): layernorm (the default, which the paper
kept), linear (no norm before the encoder), normalized (linear, language vectors scaled to length 1), batchnorm (in place of
the layer norm), dropout0 (layernorm without any dropout), projection (starts from the least-squares projection of language
vectors to pretrained token vectors), weights (a learned factor for each part), two-encoders (language goes through a
transformer of its own).

A run's folder holds model.pt (the epoch with the lowest validation error), state.pt (the last epoch, from which the same
command goes on), log.csv and config.json. A finished run is left as it is; with more --epochs it goes on, and --name keeps
runs with other settings apart.

A gene has three numbers, and the code keeps them apart by name:
    gene_idx       its position in the dataset: column of X, row of `genes`, what `targets` names
    token_id       its row of scGPT's vocabulary, which the model calls gene_ids; <pad> for genes it does not have
    language_row   its row in the model's language tables, which hold the dataset's genes alone
"""
import argparse
import contextlib
import importlib
import json
import math
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: small steps are slow on a busy machine otherwise

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
DEFAULTS = {"epochs": 20, "batch_size": 64, "lr": 1e-4, "genes_per_batch": 1536, "dropout": 0.2}  # paper, Table 31
DEMO_DEFAULTS = {"epochs": 12, "batch_size": 32, "lr": 1e-3, "genes_per_batch": 1536, "dropout": 0.0}
SCRATCH_SIZES = {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_hid": 64}
SCGPT_SIZES = {"d_model": "embsize", "n_layers": "nlayers", "n_heads": "nheads", "d_hid": "d_hid"}  # as in args.json
ALIGN = {  # --align: what it changes in the model's Config
    "layernorm": {}, "linear": {"layer_norm": False}, "normalized": {"layer_norm": False, "normalize_language": True},
    "batchnorm": {"layer_norm": False, "batch_norm": True}, "dropout0": {}, "projection": {},
    "weights": {"modality_weights": True}, "two-encoders": {"two_encoders": True}}
PATIENCE = 10  # epochs without a lower validation error before a run stops
LOG_COLUMNS = ("epoch", "train_mse", "val_mse", "lr", "seconds", "cells_per_second")

# Every use of random numbers has a stream of its own, so that none depends on how often another was asked
STREAMS = {"pairs": 0, "batches": 1, "language": 2, "validation": 3, "controls": 4, "random_baseline": 5, "halves": 6,
           "predict": 7, "dropout": 8}


def random_stream(name, seed, *rest):
    """The NumPy generator of one purpose, for a seed and further numbers (epoch, condition, ...)."""
    return np.random.default_rng([seed, STREAMS[name], *rest])


# ---------------------------------------------------------------------------------------------------------------------
# Variants and their language vectors

def parse_variant(name, known_sources):
    """The parts of a variant's name, as a namespace: has_tokens, has_counts, sources, pretrained (whether its attention
    is), shuffled. A `+` may be part of a source's name: the longest known source wins."""
    base = name.removesuffix("-shuffled")
    variant = SimpleNamespace(name=name, has_tokens=True, has_counts=True, sources=[], pretrained=True,
                              shuffled=base != name)
    family, _, rest = base.partition("_")
    if base == "scgpt-counts":
        variant.has_counts = False
    elif base == "scgpt-tokens":
        variant.has_tokens = False
    elif family in ("scgenept", "genept") and rest.removesuffix("-scratch"):
        variant.has_tokens = variant.has_counts = family == "scgenept"
        variant.pretrained = not rest.endswith("-scratch")
        variant.sources = parse_sources(name, rest.removesuffix("-scratch"), known_sources)
    elif base != "scgpt":
        sys.exit(f"error: unknown variant {name!r}: one of scgpt, scgpt-counts, scgpt-tokens, "
                 "scgenept_<source>[+<source>], genept_<source>, with -scratch and -shuffled at the end if wanted")
    if variant.shuffled and not variant.sources:
        sys.exit(f"error: variant {name!r}: there are no texts to shuffle in {base}")
    return variant


def parse_sources(name, rest, known_sources):
    """The sources joined by + in `rest`, the end of a variant's name."""
    sources = []
    while rest:
        source = max((s for s in known_sources if f"{rest}+".startswith(f"{s}+")), key=len, default=None)
        if source is None:
            sys.exit(f"error: variant {name!r}: unknown source {rest!r}; known are {', '.join(sorted(known_sources))} "
                     "(texts of your own: 01 --tsv, then 02 --source)")
        if source in sources:
            sys.exit(f"error: variant {name!r} names the source {source} twice")
        sources.append(source)
        rest = rest[len(source) + 1:]
    return sources


def find_embeddings(root, dataset):
    """Embedding files that are there: {source: {(embedder, mode): path}}, from names <source>.<embedder>.<mode>.h5."""
    found = {}
    for path in sorted((root / "data" / shared.space_of(dataset) / "embeddings").glob("*.*.*.h5")):
        source, *embedder, mode = path.name.removesuffix(".h5").split(".")
        found.setdefault(source, {})[".".join(embedder), mode] = path
    return found


def choose_embeddings(variant, found, args):
    """The embedding files of a variant's sources, {source: path}, and what the run's name tells of the choice.

    Default: the only embedder and mode that all sources have, else published and concat.
    """
    if not variant.sources:
        return {}, []
    for source in variant.sources:
        if source not in found:
            sys.exit(f"error: {variant.name}: no vectors of the source {source}; run first: "
                     + shared.command("02_embed.py", args, "--source", source))
    common = set.intersection(*(set(found[source]) for source in variant.sources))
    if not common:
        sys.exit(f"error: {variant.name}: its sources have no embedder and mode in common; embed them alike with 02")
    embedder, name_of_embedder = choose("embedder", args.embedder, {e for e, _ in common}, "published", variant)
    modes = {mode for e, mode in common if e == embedder}
    mode, name_of_mode = choose("mode", args.mode, modes, "concat", variant)
    return {source: found[source][embedder, mode] for source in variant.sources}, name_of_embedder + name_of_mode


def choose(option, wanted, there, preferred, variant):
    """The value of --embedder or --mode, and [option=value] unless that is the default."""
    default = min(there) if len(there) == 1 else preferred if preferred in there else None
    value = wanted or default
    if value is None:
        sys.exit(f"error: {variant.name}: vectors of {', '.join(sorted(there))} are there; choose with --{option}")
    if value not in there:
        sys.exit(f"error: {variant.name}: no vectors with {option} {value} (there are: {', '.join(sorted(there))})")
    return value, [] if value == default else [f"{option}={value}"]


def language_tables(data, files, seed, shuffled):
    """Starting language vectors of the dataset's genes: unique token_ids (R,) and {source: (R, width) float32}.

    A gene without a text, or outside the vocabulary, gets a vector drawn from U(-0.1, 0.1). `shuffled` permutes the texts'
    vectors among the genes that have one.
    """
    token_ids, first_idx = np.unique(data.token_ids, return_index=True)
    tables = {}
    for i, (source, path) in enumerate(files.items()):
        rng = random_stream("language", seed, i)
        genes, vectors = embed.read_embeddings(path)
        row_of = {gene: row for row, gene in enumerate(genes)}
        rows = np.array([row_of.get(gene, -1) for gene in data.genes[first_idx]])
        rows[token_ids == data.pad_id] = -1
        has_text = np.flatnonzero(rows >= 0)
        if not len(has_text):
            sys.exit(f"error: {path}: has no vector for any gene of the dataset ({data.genes[0]}, ...)")
        rows_used = rng.permutation(rows[has_text]) if shuffled else rows[has_text]
        tables[source] = rng.uniform(-0.1, 0.1, (len(token_ids), vectors.shape[1])).astype(np.float32)
        tables[source][has_text] = vectors[rows_used]
        print(f"  {source}: {len(has_text):,} of {len(data.genes):,} genes have a text, vectors of {vectors.shape[1]} "
              f"numbers from {path.name}" + (" (SHUFFLED among genes)" if shuffled else ""))
    return token_ids, tables


# ---------------------------------------------------------------------------------------------------------------------
# The model of a run

def build_model(plan, data, seed, sizes, pretrained):
    """The model of a variant with its starting weights. pretrained: scGPT's best_model.pt, or None."""
    variant, settings = plan.variant, plan.settings
    torch.manual_seed(seed)
    token_ids, tables = language_tables(data, plan.vectors, seed, variant.shuffled) if plan.vectors else ([], {})
    net = model.ScGenePT(model.Config(
        n_tokens=data.n_tokens, pad_id=data.pad_id, **sizes,
        dropout=settings["dropout"], attention_dropout=settings["attention_dropout"],
        has_tokens=variant.has_tokens, has_counts=variant.has_counts,
        languages={source: table.shape[1] for source, table in tables.items()}, n_language_rows=len(token_ids),
        **ALIGN[settings["align"]]))
    if tables:
        net.set_language(token_ids, tables)
    if pretrained and variant.pretrained:
        try:
            taken, left = model.load_pretrained(net, pretrained)
        except ValueError as error:
            sys.exit(f"error: {error}")
        parts, unused = ({key.split(".")[0] for key in keys} for keys in (taken, left))
        print(f"  pretrained: {len(taken)} tensors of {', '.join(sorted(parts))} from {pretrained}; not used: "
              + (", ".join(sorted(unused)) or "nothing"))
        if settings["align"] == "projection":
            fit_projection(net, token_ids, tables)
    return net


@torch.no_grad()
def fit_projection(net, token_ids, tables):
    """Start each source's projection at the least-squares solution from the genes' language vectors to their token vectors
    (`projection` of the paper's appendix A.2)."""
    goal = net.encoder(torch.from_numpy(token_ids))  # (R, d)
    for source, table in tables.items():
        with_one = torch.cat([torch.from_numpy(table), torch.ones(len(table), 1)], dim=1)
        solution = torch.linalg.lstsq(with_one, goal, driver="gelsd").solution  # (width + 1, d)
        net.language_encoders[source].proj.weight.copy_(solution[:-1].T)
        net.language_encoders[source].proj.bias.copy_(solution[-1])


def find_pretrained(args, data, dataset_path):
    """scGPT's best_model.pt (None when training from scratch) and the sizes of the model."""
    if args.no_pretrained or args.dataset == "demo":
        return None, {name: getattr(args, name) or value for name, value in SCRATCH_SIZES.items()}
    if data.vocab == "own genes":
        sys.exit(f"error: {dataset_path} has its own vocabulary, which fits no pretrained model: add --no-pretrained")
    folder = args.pretrained or args.root / "data" / "human" / "scgpt"
    for name in PRETRAINED_FILES:
        if not args.pretrained:
            shared.download(PRETRAINED_URL + name, folder / name)
        elif not (folder / name).exists():
            sys.exit(f"error: {folder / name} does not exist; --pretrained takes a folder with "
                     + ", ".join(PRETRAINED_FILES))
    if shared.fingerprint(folder / "vocab.json") != data.vocab:
        sys.exit(f"error: {dataset_path} was made with another vocabulary than {folder / 'vocab.json'}; run: "
                 + shared.command("03_prepare_data.py", args, "--vocab", folder / "vocab.json"))
    saved = shared.read_json(folder / "args.json", object)
    try:
        return folder / "best_model.pt", {name: int(saved[key]) for name, key in SCGPT_SIZES.items()}
    except (KeyError, TypeError, ValueError):
        sys.exit(f"error: {folder / 'args.json'}: not scGPT's settings ({', '.join(SCGPT_SIZES.values())})")


# ---------------------------------------------------------------------------------------------------------------------
# Device and processes

def choose_device(name):
    """The torch device of --device; `auto` takes CUDA where it is, else the CPU. Under torchrun each process gets a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"error: --device {name}: {str(error).splitlines()[0]}")
    return device


def mixed_precision(device):
    """Autocast context for `device`, and its dtype: bfloat16 (float16 on older GPUs) on CUDA, float32 elsewhere."""
    if device.type != "cuda":
        return contextlib.nullcontext, torch.float32
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return lambda: torch.autocast("cuda", dtype=dtype), dtype


def describe_device(device):
    """Device and precision, for the log."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return name, str(mixed_precision(device)[1]).removeprefix("torch.")


def set_up_machine(args):
    """Where training runs, as a namespace: device, autocast, dtype, and rank and n_processes of torchrun (else 0 and 1)."""
    device = choose_device(args.device)
    autocast, dtype = mixed_precision(device)
    machine = SimpleNamespace(device=device, autocast=autocast, dtype=dtype, rank=0, n_processes=1)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)  # what NCCL uses; else all processes would talk through the first GPU
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        machine.rank, machine.n_processes = dist.get_rank(), dist.get_world_size()
    if args.batch_size % machine.n_processes:
        sys.exit(f"error: --batch-size {args.batch_size} is not a multiple of the {machine.n_processes} processes")
    if args.align == "batchnorm" and machine.n_processes > 1:
        sys.exit("error: --align batchnorm on one process only: each would normalize by its own part of a batch")
    if machine.rank:
        sys.stdout = open(os.devnull, "w")
    return machine


def sum_over_processes(values, machine):
    """Tensors without dimensions, each added up over the processes, as numbers."""
    values = torch.stack([value.double() for value in values])
    if machine.n_processes > 1:
        dist.all_reduce(values)
    return values.tolist()


def wait_for_all(machine):
    if machine.n_processes > 1:
        dist.barrier()


# ---------------------------------------------------------------------------------------------------------------------
# Batches

def on_device(array, device):
    """A numpy array as a tensor; to a GPU through pinned memory, so that the copy does not wait for work in progress."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def expression_reader(X, device):
    """A function (cells (B,), genes (L,)) -> expression (B, L), float32 on `device`.

    On a GPU with room for it the whole matrix lies there, so that a batch is one indexing operation.
    """
    n_bytes = X.shape[0] * X.shape[1] * 4
    if device.type == "cuda" and n_bytes < torch.cuda.mem_get_info(device)[0] / 4:
        whole = torch.empty(X.shape, device=device)
        for start in range(0, X.shape[0], 4096):
            whole[start:start + 4096] = torch.from_numpy(X[start:start + 4096].toarray())
        return lambda cells, genes: whole[on_device(cells, device)[:, None], on_device(genes, device)]
    return lambda cells, genes: on_device(X[cells].toarray()[:, genes], device)


def pair_cells(data, seed):
    """The control cell that is the input of every cell (cells,): for perturbed cells one drawn at random once and for all,
    for control cells themselves (GEARS)."""
    input_cell = random_stream("pairs", seed).choice(data.ctrl_cells, len(data.cell_condition))
    input_cell[data.ctrl_cells] = data.ctrl_cells
    return input_cell


def split_cells(data):
    """Indices of the training cells (with the control cells) and of the validation cells.

    Data without validation conditions (03 --split none) gives up a tenth of its training conditions.
    """
    split = data.split.copy()
    if "val" not in split:
        training = np.flatnonzero(split == "train")
        chosen = random_stream("validation", 0).permutation(training)[:max(1, len(training) // 10)]
        if len(training) > 1:
            split[chosen] = "val"
        print(f"  no validation conditions in the split: {', '.join(data.conditions[chosen][:5])}"
              + (" (a tenth of the training conditions)" if len(training) > 1 else ", the only condition,")
              + " tell the best epoch")
        if len(training) == 1:
            only = data.cell_condition == training[0]
            return np.flatnonzero(only | (data.split[data.cell_condition] == "ctrl")), np.flatnonzero(only)
    cell_split = split[data.cell_condition]
    return np.flatnonzero(np.isin(cell_split, ["train", "ctrl"])), np.flatnonzero(cell_split == "val")


def batches(data, cells, batch_size, n_genes, rng, with_targets=False):
    """Yield (cells, genes) index arrays: consecutive batches of `cells`, each with one random set of genes for all of its
    cells; all genes where n_genes covers them. `with_targets`: the set contains the targets of the batch's cells."""
    every = np.arange(len(data.genes))
    for start in range(0, len(cells), batch_size):
        batch = cells[start:start + batch_size]
        if n_genes >= len(every):
            yield batch, every
        elif with_targets:
            targets = np.setdiff1d(data.targets[data.cell_condition[batch]], [-1])[:n_genes]
            others = rng.permutation(np.setdiff1d(every, targets))
            yield batch, np.concatenate([targets, others[:n_genes - len(targets)]]).astype(np.int64)
        else:
            yield batch, rng.permutation(every)[:n_genes]


def perturbed_flags(data, cells, genes):
    """Which of `genes` (L,) is a target of each of `cells` (B,): bool (B, L)."""
    return (data.targets[data.cell_condition[cells]][:, :, None] == genes).any(axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Training

def train(run, net, data, settings, seed, machine):
    """Train `net` in the folder `run`, from its state.pt if there is one; leaves model.pt, state.pt and log.csv.

    Everything random comes from (seed, epoch, batch): a run that was killed and goes on gives the numbers of one that was
    not. Returns its state, as new_state.
    """
    net.to(machine.device)
    feed = make_feed(data, seed, machine)
    n_steps = len(feed.train_cells) // settings["batch_size"]  # the last, partial batch is dropped, as in the paper's runs
    if not n_steps:
        sys.exit(f"error: {len(feed.train_cells)} training cells are fewer than one batch; lower --batch-size")
    state = new_state(net, settings, machine)
    if (run / "state.pt").exists():
        resume(state, run, machine)
    parallel = torch.nn.parallel.DistributedDataParallel(net) if machine.n_processes > 1 else net

    while len(state.log) < settings["epochs"] and not has_stopped(state):
        started = time.perf_counter()
        epoch = len(state.log) + 1
        train_mse = train_epoch(parallel, state, feed, settings, seed, epoch, machine)
        val_mse = validate(net, feed, settings, seed, machine)
        for name, value in (("training", train_mse), ("validation", val_mse)):
            if not math.isfinite(value):
                sys.exit(f"error: {run}: the {name} error is {value} in epoch {epoch}; lower --lr {settings['lr']:g}")

        seconds = time.perf_counter() - started
        speed = (n_steps * settings["batch_size"] + len(feed.val_cells)) / seconds
        lr = state.schedule.get_last_lr()[0]
        state.log.append(dict(zip(LOG_COLUMNS, (epoch, train_mse, val_mse, lr, seconds, speed))))
        state.schedule.step()
        is_best = val_mse < state.best_val
        if is_best:
            state.best_epoch, state.best_val = epoch, val_mse
        print(f"  epoch {epoch:2d}  train MSE {train_mse:.5f}  validation MSE {val_mse:.5f}{' *' if is_best else '  '}  "
              f"{seconds:.1f} s  {speed:,.0f} cells/s")
        if machine.rank == 0:
            save_state(state, run)
    return state


def has_stopped(state):
    """Whether the validation error has not fallen for so long that training ends."""
    return len(state.log) - state.best_epoch >= PATIENCE


def make_feed(data, seed, machine):
    """What batches are made of, on the device: see squared_error."""
    train_cells, val_cells = split_cells(data)
    return SimpleNamespace(
        data=data, train_cells=train_cells, val_cells=val_cells, input_cell=pair_cells(data, seed),
        expression=expression_reader(data.X, machine.device),
        token_ids=torch.from_numpy(data.token_ids.astype(np.int64)).to(machine.device),
        measured=torch.from_numpy(data.measured).to(machine.device))


def squared_error(net, feed, cells, genes, machine):
    """Squared error summed over this process's share of a batch, cells x measured genes, and the number of entries."""
    cells = cells[machine.rank::machine.n_processes]
    if not len(cells):  # the last validation batch may not have one for every process
        return torch.zeros((), device=machine.device), torch.zeros((), dtype=torch.long, device=machine.device)
    flags = on_device(perturbed_flags(feed.data, cells, genes), machine.device)
    genes_there = on_device(genes, machine.device)
    with machine.autocast():
        predicted = net(feed.token_ids[genes_there], feed.expression(feed.input_cell[cells], genes), flags)
    measured = feed.measured[genes_there]
    squared = (predicted.float() - feed.expression(cells, genes)) ** 2 * measured
    return squared.sum(), measured.sum() * len(cells)


def train_epoch(net, state, feed, settings, seed, epoch, machine):
    """One pass over the training cells; the mean of its batches' losses."""
    rng = random_stream("batches", seed, epoch)
    batch_size = settings["batch_size"]
    n_steps = len(feed.train_cells) // batch_size
    cells_in_order = rng.permutation(feed.train_cells)[:n_steps * batch_size]
    steps = batches(feed.data, cells_in_order, batch_size, settings["genes_per_batch"], rng, settings["targets_in_batch"])
    total = torch.zeros((), device=machine.device)
    net.train()
    progress = tqdm(steps, f"  epoch {epoch}", n_steps, unit_scale=batch_size, unit=" cells", leave=False,
                    disable=True if machine.rank else None)
    for step, (cells, genes) in enumerate(progress, 1):
        torch.manual_seed(int(random_stream("dropout", seed, epoch, step, machine.rank).integers(2**63)))
        squared, n = squared_error(net, feed, cells, genes, machine)
        loss = squared / n
        state.scaler.scale(loss).backward()
        state.scaler.unscale_(state.optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        state.optimizer.zero_grad()
        total += loss.detach()
        if machine.device.type == "cpu" or step % 50 == 0:  # reading a loss makes a GPU wait
            progress.set_postfix(mse=f"{total.item() / step:.4g}")
    return sum_over_processes([total / n_steps / machine.n_processes], machine)[0]


@torch.no_grad()
def validate(net, feed, settings, seed, machine):
    """Mean squared error over the validation cells; the same genes after every epoch, so that epochs compare."""
    net.eval()
    rng = random_stream("validation", seed)
    steps = batches(feed.data, feed.val_cells, settings["batch_size"], settings["genes_per_batch"], rng)
    errors = [squared_error(net, feed, cells, genes, machine) for cells, genes in steps]
    squared, n = sum_over_processes(map(sum, zip(*errors)), machine)
    return squared / n


def new_state(net, settings, machine):
    """What a run has reached: the model, its optimizer, learning rate schedule and gradient scaler, and the log."""
    optimizer = torch.optim.Adam(net.parameters(), lr=settings["lr"], fused=machine.device.type == "cuda")
    return SimpleNamespace(
        net=net, optimizer=optimizer, schedule=torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9),
        scaler=torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16),
        log=[], best_epoch=0, best_val=math.inf)


def resume(state, run, machine):
    """Take up the state that save_state wrote."""
    try:
        saved = torch.load(run / "state.pt", map_location="cpu", weights_only=True)
        for name in ("net", "optimizer", "schedule", "scaler"):
            if saved[name] or name != "scaler":  # a scaler's is empty where precision did not need one
                getattr(state, name).load_state_dict(saved[name])
        state.log, state.best_epoch, state.best_val = saved["log"], saved["best_epoch"], saved["best_val"]
    except Exception as error:  # torch raises many kinds for a damaged file
        sys.exit(f"error: {run / 'state.pt'}: cannot be read ({str(error).splitlines()[0]}); --force trains anew")
    print(f"  goes on after epoch {len(state.log)}")
    if machine.rank == 0:
        save_derived(state, run)


def save_state(state, run):
    """state.pt is written first: after a crash, model.pt and log.csv are made from it."""
    parts = {name: getattr(state, name).state_dict() for name in ("net", "optimizer", "schedule", "scaler")}
    with shared.replacing(run / "state.pt") as partial:
        torch.save({**parts, "log": state.log, "best_epoch": state.best_epoch, "best_val": state.best_val}, partial)
    save_derived(state, run)


def save_derived(state, run):
    """model.pt, where the last epoch is the best one, and log.csv, whose numbers read back exactly."""
    if state.best_epoch == len(state.log):
        model.save(state.net, run / "model.pt")
    rows = [",".join(repr(row[column]) for column in LOG_COLUMNS) for row in state.log]
    shared.write_text(run / "log.csv", "\n".join([",".join(LOG_COLUMNS), *rows]) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# Runs

def identity(config):
    """The part of a run's config that decides what is trained, as shared.difference takes it."""
    names = [name for name in DEFAULTS if name != "epochs"]
    names += ["attention_dropout", "targets_in_batch", "align", "pretrained", *SCRATCH_SIZES]
    return {"options": {name: config.get(name) for name in names}, "inputs": config["inputs"]}


def train_run(run, config, plan, data, sizes, pretrained, args, machine):
    """Train one variant with one seed in the folder `run`, or go on there, unless it is finished.

    --force trains in a folder beside it, which takes its place when it is finished.
    """
    folder = run.with_name(f"{run.name}.new") if args.force else run
    old = shared.read_json(folder / "config.json", object) if (folder / "config.json").exists() else None
    if old:
        words = shared.difference(identity(old), identity(config))
        if words and not args.force:
            sys.exit(f"error: {run} was trained otherwise ({words}); keep both with --name NAME, or replace it with --force")
        if words:  # what an earlier --force left
            old = None
        elif old["finished"] and not (folder / "model.pt").exists():
            print("  model.pt is missing: trains again")
            old = None
        elif old["finished"] and (old["stopped_early"] or old["epochs"] >= plan.settings["epochs"]):
            print(f"  finished already, {old['epochs']} epochs (--force trains anew)")
            return
    wait_for_all(machine)  # until all processes have looked
    if machine.rank == 0:
        if old is None:
            shutil.rmtree(folder, ignore_errors=True)
        shared.write_text(folder / "config.json", json.dumps(config | {"finished": False}, indent=1))
    wait_for_all(machine)

    net = build_model(plan, data, config["seed"], sizes, pretrained)
    config["n_parameters"] = sum(p.numel() for p in net.parameters())
    print(f"  {config['n_parameters']:,} parameters, "
          f"{min(plan.settings['genes_per_batch'], len(data.genes)):,} genes a batch")
    if args.compile:
        torch.compiler.reset()  # else the fourth kind of model in one command would not be compiled
        net.compile()
    state = train(folder, net, data, plan.settings, config["seed"], machine)
    print(f"  best epoch {state.best_epoch}, validation MSE {state.best_val:.5f}")
    if machine.rank == 0:
        config |= {"best_epoch": state.best_epoch, "best_val_mse": state.best_val, "stopped_early": has_stopped(state)}
        shared.write_text(folder / "config.json", json.dumps(config | {"finished": True}, indent=1))
        if args.force:
            replace_folder(run, folder)


def replace_folder(old, new):
    """Put the folder `new` in the place of `old`."""
    if old.exists():
        discarded = old.with_name(f"{old.name}.old")
        shutil.rmtree(discarded, ignore_errors=True)
        old.rename(discarded)
        new.rename(old)
        shutil.rmtree(discarded)
    else:
        new.rename(old)


@contextlib.contextmanager
def only_trainer(run, machine):
    """Let one training at a time into the folder `run`."""
    lock = FileLock(run.with_name(f".{run.name}.lock"), timeout=0)
    run.parent.mkdir(parents=True, exist_ok=True)
    try:
        with lock if machine.rank == 0 else contextlib.nullcontext():
            yield
    except Timeout:
        sys.exit(f"error: {run}: another process trains there")


def find_runs(root, dataset, wanted, args):
    """The finished runs of a dataset, as namespaces (name, seed, path, config), in order of name and seed; all, or those
    with the names `wanted`. Runs that cannot be compared (not finished, other data) are left out, with a line."""
    folder = root / "runs" / dataset
    dataset_made = shared.fingerprint(root / "data" / dataset / "dataset.h5")
    runs, names = [], set()
    for path in sorted(folder.glob("*/seed*/config.json")):
        run, name, seed = path.parent, path.parent.parent.name, path.parent.name.removeprefix("seed")
        if not seed.isdigit():  # seed42.new, of a --force under way
            continue
        names.add(name)
        if wanted is not None and name not in wanted:
            continue
        config = shared.read_json(path, object)
        train_it = shared.command("04_train.py", args, "--variant", name.split(",")[0], "--seed", seed)
        if not config.get("finished"):
            print(f"left out: {run} is not finished; {train_it} goes on with it")
        elif not (run / "model.pt").exists():
            print(f"left out: {run} has no model.pt; {train_it} trains again")
        elif config["inputs"]["dataset.h5"] != dataset_made:
            print(f"left out: {run}: the dataset has changed since; {train_it} --force trains again")
        else:
            runs.append(SimpleNamespace(name=name, seed=int(seed), path=run / "model.pt", config=config))
    for name in wanted or ():
        if name not in names:
            sys.exit(f"error: --run {name}: not found in {folder}; there are: {', '.join(sorted(names)) or 'none'}")
        if not any(run.name == name for run in runs):
            sys.exit(f"error: --run {name}: none of its runs can be used (see above)")
    return sorted(runs, key=lambda run: (not run.name.startswith("scgpt"), run.name, run.seed))


# ---------------------------------------------------------------------------------------------------------------------

def parse_arguments():
    parser = shared.common_options(argparse.ArgumentParser(description=__doc__))
    add = parser.add_argument
    add("--variant", nargs="+", default=VARIANTS, metavar="NAME", help=f"default: {' '.join(VARIANTS)}")
    add("--seed", nargs="+", type=shared.seed, default=[42], metavar="N", help="default: 42; the paper's: 42 23 89 30 12")
    add("--name", metavar="NAME", help="keeps runs with other settings apart: part of the folder's name")
    add("--embedder", metavar="NAME", help="which vectors, where a source has several (default: the only ones, else "
        "published)")
    add("--mode", choices=("concat", "avg"), help="likewise (default: the only ones, else concat)")
    add("--epochs", type=int, metavar="N", help="at most; default: 20, the demo's: 12")
    add("--batch-size", type=int, metavar="N", help="cells a batch; default: 64, the demo's: 32")
    add("--lr", type=float, metavar="X", help="Adam's learning rate, times 0.9 after each epoch; default: 1e-4, the demo's: "
        "1e-3")
    add("--genes-per-batch", type=int, metavar="N", help="genes drawn for a batch; default: 1536")
    add("--targets-in-batch", action="store_true", help="the genes drawn for a batch contain its cells' targets (in the "
        "paper they need not)")
    add("--align", choices=ALIGN, default="layernorm", metavar="WAY", help=f"{', '.join(ALIGN)} (default: layernorm)")
    add("--dropout", type=float, metavar="X", help="default: 0.2, the demo's: 0")
    add("--attention-dropout", type=float, metavar="X", help="of attention probabilities; default: as --dropout, but 0 on a "
        "CPU, whose fast attention has none")
    add("--pretrained", type=Path, metavar="DIR", help="folder with scGPT's best_model.pt, args.json, vocab.json (default: "
        "data/human/scgpt/, fetched; the demo trains from scratch)")
    add("--no-pretrained", action="store_true", help="start from random weights, with these sizes:")
    for name, value in SCRATCH_SIZES.items():
        add(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"default: {value}")
    add("--compile", action="store_true", help="compile the model with torch.compile: minutes at first, for long runs on "
        "a GPU")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    args = parser.parse_args()
    check_arguments(args)
    return args


def check_arguments(args):
    """Fill in the defaults of the dataset and end the run for values that cannot be."""
    is_demo = shared.space_of(args.dataset) == "demo"
    for name, value in (DEMO_DEFAULTS if is_demo else DEFAULTS).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    for name in ("epochs", "batch_size", "lr", "genes_per_batch", *SCRATCH_SIZES):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            sys.exit(f"error: --{name.replace('_', '-')} has to be above 0")
    for name in ("dropout", "attention_dropout"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) < 1:
            sys.exit(f"error: --{name.replace('_', '-')} has to be from 0 to below 1")
    if args.name:
        shared.check_name(args.name, "--name")
    if args.pretrained and (args.no_pretrained or is_demo):
        sys.exit("error: --pretrained: the demo, and --no-pretrained, train from scratch")
    if not (args.no_pretrained or is_demo):
        for name in SCRATCH_SIZES:
            if getattr(args, name) is not None:
                sys.exit(f"error: --{name.replace('_', '-')} goes with --no-pretrained; pretrained models have their size")


def plan_run(name, embeddings, args, machine, has_pretrained):
    """What --variant NAME means, as a namespace: variant, vectors {source: file}, name of the run, settings."""
    variant = parse_variant(name, {*shared.SOURCES, *embeddings})
    vectors, name_of_choice = choose_embeddings(variant, embeddings, args)
    settings = {key: getattr(args, key) for key in (*DEFAULTS, "attention_dropout", "targets_in_batch")}
    if settings["attention_dropout"] is None:
        settings["attention_dropout"] = 0.0 if machine.device.type == "cpu" else settings["dropout"]
    settings["align"] = args.align if variant.sources else "layernorm"
    if settings["align"] == "dropout0":
        settings |= {"dropout": 0.0, "attention_dropout": 0.0}
    if settings["align"] == "projection" and not (has_pretrained and variant.pretrained and variant.has_tokens):
        sys.exit(f"error: {variant.name}: --align projection needs pretrained token vectors")

    words = [variant.name, *name_of_choice]
    words += [f"align={args.align}"] * (settings["align"] != "layernorm")
    words += ["targets-in-batch"] * args.targets_in_batch
    words += [f"name={args.name}"] * bool(args.name)
    return SimpleNamespace(variant=variant, vectors=vectors, name=",".join(words), settings=settings)


def main():
    args = parse_arguments()
    dataset_path = args.root / "data" / args.dataset / "dataset.h5"
    data = prepare.load_dataset(dataset_path, shared.command("03_prepare_data.py", args))
    embeddings = find_embeddings(args.root, args.dataset)
    pretrained, sizes = find_pretrained(args, data, dataset_path)
    machine = set_up_machine(args)
    plans = [plan_run(name, embeddings, args, machine, pretrained is not None) for name in args.variant]
    device, precision = describe_device(machine.device)
    processes = f", {machine.n_processes} processes" if machine.n_processes > 1 else ""
    print(f"device: {device}, {precision}{processes}; dropout {args.dropout:g}, of attention "
          f"{plans[0].settings['attention_dropout']:g}")

    inputs = {"dataset.h5": shared.fingerprint(dataset_path)}
    if pretrained:
        inputs["pretrained"] = shared.fingerprint(pretrained)
    for plan in plans:
        for seed in args.seed:
            run = args.root / "runs" / args.dataset / plan.name / f"seed{seed}"
            about = shared.provenance("")
            config = {"variant": plan.name, "seed": seed, "sources": plan.variant.sources, **plan.settings, **sizes,
                      "pretrained": pretrained is not None,
                      "embeddings": {source: path.name for source, path in plan.vectors.items()},
                      "inputs": inputs | {source: shared.fingerprint(path) for source, path in plan.vectors.items()},
                      "device": device, "precision": precision, "n_processes": machine.n_processes,
                      **{name: about[name] for name in ("format_version", "command", "date")},
                      "versions": json.loads(about["versions"])}
            print(f"{plan.name}, seed {seed} -> {run}")
            with only_trainer(run, machine):
                train_run(run, config, plan, data, sizes, pretrained, args, machine)
    print(f"next: {shared.command('05_eval.py', args)}")
    if machine.n_processes > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    shared.run(main)
