"""Stage 04: fine-tuning -> runs/<dataset>/<variant>/seed<N>/

    python 04_train.py                                                     the demo: three small networks from scratch
    python 04_train.py --dataset norman                                    scGPT, scGenePT and its shuffled control, pretrained
    python 04_train.py --dataset norman --variant scgenept_go_c --seed 42 23 89 30 12
    python 04_train.py --dataset mine --variant scgpt scgenept_notes --no-pretrained --d-model 128
    torchrun --nproc_per_node 4 04_train.py --dataset norman               the same on four GPUs

Variants: scgpt; scgenept_<source>, with several sources scgenept_<source>+<source>; genept_<source> (language alone, pretrained
attention), genept_<source>-scratch; scgpt-counts, scgpt-tokens (scGPT without that part). `-shuffled` at the end of a name
gives every gene another gene's text: what such a control reaches does not come from what the texts say.

--align takes one of the ways in which the paper joins language with scGPT (appendix A.2), for the variants with language:
layernorm (the default, which the paper kept), linear (no norm before the encoder), normalized (linear, language vectors scaled
to length 1), batchnorm (in place of the layer norm), dropout0 (layernorm without any dropout), projection (starts from the
least-squares projection of language vectors to pretrained token vectors), weights (a learned factor for each part),
two-encoders (language goes through a transformer of its own).

A run's folder holds model.pt (the epoch with the lowest validation error), state.pt (the last epoch, from which the same
command goes on after an interruption), log.csv and config.json. Finished runs are left as they are.
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

import numpy as np

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # else, where others work on the machine too, a small step takes many times as long
shared = importlib.import_module("01_fetch_annotations")

PRETRAINED_URL = "https://czi-scgenept-public.s3.amazonaws.com/models/pretrained/scgpt/"
PRETRAINED_FILES = ("args.json", "vocab.json", "best_model.pt")
VARIANTS = ["scgpt", "scgenept_go_all", "scgenept_go_all-shuffled"]
DEFAULTS = {"epochs": 20, "batch_size": 64, "lr": 1e-4, "genes_per_batch": 1536, "dropout": 0.2}  # the paper's (Table 31)
DEMO_DEFAULTS = DEFAULTS | {"epochs": 12, "lr": 1e-3, "batch_size": 32, "dropout": 0.0}  # small, from scratch
SCRATCH_SIZES = {"d_model": 64, "n_layers": 2, "n_heads": 4, "d_hid": 64}
ALIGN = {"layernorm": {}, "linear": {"layer_norm": False}, "normalized": {"layer_norm": False, "normalize_language": True},
         "batchnorm": {"layer_norm": False, "batch_norm": True}, "dropout0": {}, "projection": {},
         "weights": {"modality_weights": True}, "two-encoders": {"two_encoders": True}}
PATIENCE = 10  # epochs without a better validation error before a run stops
LOG_COLUMNS = ("epoch", "train_mse", "val_mse", "lr", "seconds", "cells_per_second")


# ---------------------------------------------------------------------------------------------------------------------
# Data

def load_dataset(path, made_by):
    """dataset.h5 as a namespace: X (CSR), genes, token_ids, measured, conditions, cell_condition, targets, split, subgroup,
    mean, de_idx as in the file, and its attributes."""
    from scipy import sparse
    arrays = ("token_ids", "measured", "cell_condition", "targets", "mean", "de_idx")
    texts = ("genes", "conditions", "split", "subgroup")
    with shared.open_h5(path, made_by, (*arrays, *texts, "X/data", "X/indices", "X/indptr")) as file:
        data = SimpleNamespace(**{name: file[name][:] for name in arrays}, **{name: file[name].asstr()[:] for name in texts},
                               synthetic=bool(file.attrs["synthetic"]), vocab=str(file.attrs["vocab"]), control=str(file.attrs["control"]),
                               n_tokens=int(file.attrs["n_tokens"]), pad_id=int(file.attrs["pad_id"]))
        n_cells, n_genes, (n_conditions, most) = len(data.cell_condition), len(data.genes), data.targets.shape
        for name, (kind, shape, low, high) in {  # what the rest of the script takes for granted
                "token_ids": ("i", (n_genes,), 0, data.n_tokens), "measured": ("b", (n_genes,), 0, 2),
                "mean": ("f", (n_conditions, n_genes), -1e9, 1e9), "cell_condition": ("i", (n_cells,), 0, n_conditions),
                "targets": ("i", (n_conditions, most), -1, n_genes), "de_idx": ("i", (n_conditions, 20), -1, n_genes)}.items():
            array = getattr(data, name)
            if array.dtype.kind != kind or array.shape != shape or not ((low <= array) & (array < high)).all():
                raise ValueError(f"{name} does not fit the rest")
        names = data.conditions, data.split, data.subgroup
        if any(texts.shape != (n_conditions,) for texts in names) or set(data.split) != {"train", "val", "test", "ctrl"} or \
                (data.split == "ctrl").sum() != 1 or ((data.targets >= 0).any(1) == (data.split == "ctrl")).any() or \
                not np.bincount(data.cell_condition, minlength=n_conditions).all() or not data.measured.any() or \
                not 0 <= data.pad_id < data.n_tokens <= 10**6:
            raise ValueError("conditions, split and cells do not fit")
        X = file["X"]
        data.X = sparse.csr_matrix((X["data"][:], X["indices"][:], X["indptr"][:]), shape=(n_cells, n_genes))
        data.X.check_format(full_check=True)
        if data.X.dtype != np.float32 or not np.isfinite(data.X.data).all():
            raise ValueError("X holds no finite float32")
    data.ctrl_cells = np.flatnonzero(data.split[data.cell_condition] == "ctrl")
    return data


def on_device(array, device):
    """A numpy array as a tensor on `device`; through pinned memory to a GPU, so that the copy does not wait for its running work."""
    import torch
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def expression_reader(X, device):
    """A function (cells (B,), genes (L,)) -> expression (B, L), float32 on `device`.

    On a GPU with room for it the whole matrix lies there, so that a batch is one indexing operation.
    """
    import torch
    if device.type == "cuda" and X.shape[0] * X.shape[1] * 4 < torch.cuda.mem_get_info(device)[0] / 4:
        whole = torch.empty(X.shape, device=device)
        for start in range(0, X.shape[0], 4096):
            whole[start:start + 4096] = torch.from_numpy(X[start:start + 4096].toarray())

        def read(cells, genes):
            return whole[on_device(cells, device)[:, None], on_device(genes, device)]
    else:
        def read(cells, genes):
            return on_device(X[cells].toarray()[:, genes], device)
    return read


def pair_cells(data, seed):
    """For every cell the control cell that is its input (cells,): for perturbed cells one drawn at random once and for all,
    for control cells themselves (GEARS)."""
    input_cell = np.random.default_rng([seed, 0]).choice(data.ctrl_cells, len(data.cell_condition))
    input_cell[data.ctrl_cells] = data.ctrl_cells
    return input_cell


def batches(data, cells, batch_size, n_genes, rng, with_targets=False):
    """Yield (cells, genes) index arrays: consecutive batches of `cells`, each with one random set of genes for all its cells;
    all genes where n_genes covers them. `with_targets`: the set contains the targets of the batch's cells."""
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
# Variants and their language vectors

def parse_variant(name, known_sources):
    """Parts of a variant's name as a namespace: has_tokens, has_counts, sources, pretrained (whether its attention is),
    shuffled. A `+` may be part of a source's name: the longest known source wins."""
    base = name.removesuffix("-shuffled")
    variant = SimpleNamespace(name=name, has_tokens=True, has_counts=True, sources=[], pretrained=True, shuffled=base != name)
    family, _, rest = base.partition("_")
    if base == "scgpt-counts":
        variant.has_counts = False
    elif base == "scgpt-tokens":
        variant.has_tokens = False
    elif family == "genept" and rest not in ("", "-scratch"):
        variant.has_tokens = variant.has_counts = False
        variant.pretrained = not rest.endswith("-scratch")
        rest = rest.removesuffix("-scratch")
    elif base != "scgpt" and not (family == "scgenept" and rest) or rest.endswith("+"):
        sys.exit(f"error: unknown variant {name!r}: one of scgpt, scgpt-counts, scgpt-tokens, scgenept_<source>[+<source>], "
                 "genept_<source>, genept_<source>-scratch; each with -shuffled at the end")
    while rest:
        source = max((s for s in known_sources if f"{rest}+".startswith(f"{s}+")), key=len, default=None)
        if source is None:
            sys.exit(f"error: variant {name!r}: unknown source {rest!r}; known are {', '.join(sorted(known_sources))} "
                     "(texts of your own: 01 --tsv, then 02 --source)")
        if source in variant.sources:
            sys.exit(f"error: variant {name!r} names the source {source} twice")
        variant.sources.append(source)
        rest = rest[len(source) + 1:]
    if variant.shuffled and not variant.sources:
        sys.exit(f"error: variant {name!r}: there are no texts to shuffle in {base}")
    return variant


def embeddings_of(folder):
    """Embedding files that are there: {source: {(embedder, mode): path}}, from names <source>.<embedder>.<mode>.h5."""
    found = {}
    for path in sorted(folder.glob("*.*.*.h5")):
        source, *embedder, mode = path.name.removesuffix(".h5").split(".")
        found.setdefault(source, {})[".".join(embedder), mode] = path
    return found


def choose_embeddings(variant, found, embedder, mode, command):
    """The embedding files of a variant's sources, {source: path}, and the parts of the run's name that tell of a choice that
    is not the default. Default: the only embedder and mode that all sources have, else published, concat."""
    for source in variant.sources:
        if source not in found:
            sys.exit(f"error: {variant.name}: no vectors of the source {source}; run first: {command} --source {source}"
                     + (f" (or name others with --variant; there are vectors of {', '.join(found)})" if found else ""))
    if not variant.sources:
        return {}, []
    common = set.intersection(*(set(found[source]) for source in variant.sources))
    if not common:
        sys.exit(f"error: {variant.name}: its sources have no embedder and mode in common ("
                 + "; ".join(f"{source}: {', '.join('.'.join(of) for of in found[source])}" for source in variant.sources)
                 + "); embed them alike with 02_embed.py")
    suffix = []

    def choose(option, wanted, there, preferred):
        default = there[0] if len(there) == 1 else preferred if preferred in there else None
        if wanted is None and default is None:
            sys.exit(f"error: {variant.name}: vectors of {', '.join(there)} are there; choose with --{option}")
        if wanted is not None and wanted not in there:
            sys.exit(f"error: {variant.name}: no vectors with {option} {wanted} (there are: {', '.join(there)}); make them with 02_embed.py")
        if wanted not in (None, default):
            suffix.append(f"{option}={wanted}")
        return wanted or default

    embedder = choose("embedder", embedder, sorted({e for e, _ in common}), "published")
    mode = choose("mode", mode, sorted(m for e, m in common if e == embedder), "concat")
    return {source: found[source][embedder, mode] for source in variant.sources}, suffix


def language_tables(data, files, seed, shuffled):
    """Language vectors of the dataset's genes: unique vocabulary rows (R,) and {source: (R, width) float32}.

    A gene without a text, or outside the vocabulary, gets a vector drawn from U(-0.1, 0.1). `shuffled` permutes the texts'
    vectors among the genes that have one.
    """
    token_ids, first = np.unique(data.token_ids, return_index=True)
    tables = {}
    for i, (source, path) in enumerate(files.items()):
        rng = np.random.default_rng([seed, 2, i])
        genes, vectors = shared.read_embeddings(path, f"02_embed.py --source {source}")
        row_of = {gene: row for row, gene in enumerate(genes)}
        rows = np.array([-1 if token == data.pad_id else row_of.get(data.genes[j], -1) for token, j in zip(token_ids, first)])
        has_text = np.flatnonzero(rows >= 0)
        if not len(has_text):
            sys.exit(f"error: {path}: has no vector for any gene of the dataset ({data.genes[0]}, ...)")
        source_rows = rows[has_text]
        if shuffled:
            source_rows = rng.permutation(source_rows)
        table = rng.uniform(-0.1, 0.1, (len(token_ids), vectors.shape[1])).astype(np.float32)
        table[has_text] = vectors[source_rows]
        tables[source] = table
        print(f"  {source}: {len(has_text):,} of {len(data.genes):,} genes have a text, {vectors.shape[1]}-dimensional vectors from {path.name}"
              + (" (SHUFFLED among genes)" if shuffled else ""))
    return token_ids, tables


# ---------------------------------------------------------------------------------------------------------------------
# Device and processes

def choose_device(name):
    """The torch device of --device; `auto` takes CUDA where it is, else the CPU. Under torchrun each process gets a GPU of its own."""
    import torch
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        sys.exit(f"error: --device {name}: {str(error).splitlines()[0]}")
    return device


def mixed_precision(device):
    """Autocast context for `device`: bfloat16 (float16 on older GPUs) on CUDA, float32 elsewhere; and its dtype."""
    import torch
    if device.type != "cuda":
        return contextlib.nullcontext, torch.float32
    dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return lambda: torch.autocast("cuda", dtype=dtype), dtype


def device_words(device):
    """Device and precision, for the log."""
    import torch
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    return f"device: {name}, {mixed_precision(device)[1]}".replace("torch.", "")


def process_group(device):
    """(rank, number of processes) under torchrun, whose processes it connects; (0, 1) otherwise."""
    import torch
    import torch.distributed as dist
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what NCCL uses; without it every process of a machine would talk through its first GPU
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size()


# ---------------------------------------------------------------------------------------------------------------------
# Training

def fit_projection(net, token_ids, tables):
    """Start each language source's projection at the least-squares solution from the genes' language vectors to their
    token vectors (`projection` of the paper's appendix A.2)."""
    import torch
    with torch.no_grad():
        goal = net.encoder(torch.from_numpy(token_ids))  # (R, d)
        for source, table in tables.items():
            with_one = torch.cat([torch.from_numpy(table), torch.ones(len(table), 1)], dim=1)
            solution = torch.linalg.lstsq(with_one, goal, driver="gelsd").solution  # (width + 1, d)
            net.language_encoders[source].proj.weight.copy_(solution[:-1].T)
            net.language_encoders[source].proj.bias.copy_(solution[-1])


def build_model(variant, sizes, options, data, files, seed, pretrained):
    """The network of a variant with its starting weights; `pretrained` is scGPT's best_model.pt or None."""
    import torch
    import model
    torch.manual_seed(seed)
    token_ids, tables = language_tables(data, files, seed, variant.shuffled) if files else (None, {})
    config = model.Config(n_tokens=int(data.n_tokens), pad_id=int(data.pad_id), **sizes, dropout=options["dropout"],
                          attention_dropout=options["attention_dropout"], has_tokens=variant.has_tokens, has_counts=variant.has_counts,
                          languages={source: table.shape[1] for source, table in tables.items()},
                          n_language_rows=0 if token_ids is None else len(token_ids), **ALIGN[options["align"]])
    try:
        net = model.ScGenePT(config)
        if tables:
            net.set_language(token_ids, tables)
        if pretrained and variant.pretrained:
            taken, left = model.load_pretrained(net, pretrained)
            parts = sorted({key.split(".")[0] for key in taken})
            print(f"  pretrained: {len(taken)} tensors of {', '.join(parts)} from {pretrained}; not used: "
                  + (", ".join(sorted({key.split(".")[0] for key in left})) or "nothing"))
            if options["align"] == "projection":
                fit_projection(net, token_ids, tables)
    except ValueError as error:
        sys.exit(f"error: {error}")
    return net


def train(run, net, data, options, seed, device, rank, n_processes):
    """Train `net` in the folder `run`, from its state.pt if there is one; leaves model.pt, state.pt and log.csv.

    Everything random comes from (seed, epoch, batch): a run that was killed, or interrupted in mid-epoch, and goes on gives the
    numbers of one that was not.
    Returns the best epoch and its validation error.
    """
    import torch
    import torch.distributed as dist
    from tqdm import tqdm
    import model as model_file

    net.to(device)
    gene_ids, measured = torch.from_numpy(data.token_ids.astype(np.int64)).to(device), torch.from_numpy(data.measured).to(device)
    expression = expression_reader(data.X, device)
    input_cell = pair_cells(data, seed)
    cell_split = data.split[data.cell_condition]
    train_cells, val_cells = np.flatnonzero(np.isin(cell_split, ["train", "ctrl"])), np.flatnonzero(cell_split == "val")
    batch_size = options["batch_size"]
    n_steps = len(train_cells) // batch_size  # the last, partial batch is dropped, as in the paper's runs
    if not n_steps:
        sys.exit(f"error: {len(train_cells)} training cells are fewer than one batch; lower --batch-size {batch_size}")

    autocast, dtype = mixed_precision(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=options["lr"], fused=device.type == "cuda")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)
    log, best_epoch, best_val = [], 0, math.inf
    done, total = 0, torch.zeros((), device=device)  # batches of the current epoch, and the sum of their losses

    def save_state():
        """The truth after a kill; model.pt and log.csv follow from it."""
        with shared.replacing(run / "state.pt") as partial, open(partial, "wb") as file:
            torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "scaler": scaler.state_dict(),
                        "log": log, "best_epoch": best_epoch, "best_val": best_val, "done": done, "total": total}, file)

    def save_best():
        with shared.replacing(run / "model.pt") as partial:
            model_file.save(net, partial)

    if (run / "state.pt").exists():
        try:
            state = torch.load(run / "state.pt", map_location="cpu", weights_only=True)
            for part, name in ((net, "model"), (optimizer, "optimizer"), (schedule, "schedule"), (scaler, "scaler")):
                if state[name] or name != "scaler":  # empty where it was saved without one, in another precision
                    part.load_state_dict(state[name])
            log = [{column: row[column] for column in LOG_COLUMNS} for row in state["log"]]
            best_epoch, best_val, done, total = (state[name] for name in ("best_epoch", "best_val", "done", "total"))
            if not 0 <= best_epoch <= len(log) or not best_val > 0 or not 0 <= done <= n_steps or total.shape != ():
                raise ValueError("not a state of this run")
            total = total.to(device)
            del state  # a second copy of the weights
        except Exception as error:  # torch raises many kinds
            sys.exit(f"error: {run / 'state.pt'}: cannot be read ({next(iter(str(error).splitlines()), type(error).__name__)}); --force trains anew")
        if rank == 0:
            print(f"  goes on after epoch {len(log)}" + (f", batch {done}" if done else ""))
            if best_epoch == len(log) and not done:  # it may have been killed between state.pt and model.pt
                save_best()
    parallel = net if n_processes == 1 else torch.nn.parallel.DistributedDataParallel(net)

    def errors(predict, cells, genes):
        """Squared error summed over a batch's cells and measured genes, and the number of those entries."""
        cells = cells[rank::n_processes]
        if not len(cells):  # the last validation batch may not have one for every process
            return torch.zeros((), device=device), torch.zeros((), dtype=torch.long, device=device)
        flags, genes_here = on_device(perturbed_flags(data, cells, genes), device), on_device(genes, device)
        with autocast():
            predicted = predict(gene_ids[genes_here], expression(input_cell[cells], genes), flags)
        counts = measured[genes_here]
        return ((predicted.float() - expression(cells, genes)) ** 2 * counts).sum(), counts.sum() * len(cells)

    def train_on(cells, genes):
        """A training step; the loss of its batch."""
        squared, n = errors(parallel, cells, genes)
        loss = squared / n
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        return loss.detach()

    def validate():
        """Squared error summed over the validation cells, and the number of entries; the same genes after every epoch, so that epochs
        compare."""
        parallel.eval()
        with torch.no_grad():
            steps = batches(data, val_cells, batch_size, options["genes_per_batch"], np.random.default_rng([seed, 3]))
            return map(sum, zip(*(errors(net, cells, genes) for cells, genes in steps)))

    def over_processes(values):
        values = torch.stack(values)
        if n_processes > 1:
            dist.all_reduce(values)
        return values.tolist()

    while len(log) < options["epochs"] and len(log) - best_epoch < PATIENCE:
        epoch, done_before = len(log) + 1, done
        started = time.perf_counter()
        rng = np.random.default_rng([seed, 1, epoch])
        parallel.train()
        steps = batches(data, rng.permutation(train_cells)[:n_steps * batch_size], batch_size, options["genes_per_batch"], rng, options["targets_in_batch"])
        progress = tqdm(steps, f"  epoch {epoch}", n_steps, unit_scale=batch_size, unit=" cells", leave=False, disable=None if rank == 0 else True)
        try:
            for step, (cells, genes) in enumerate(progress, 1):
                if step <= done:
                    continue
                with shared.uninterrupted():  # Ctrl-C takes effect between two steps
                    torch.manual_seed(int(np.random.default_rng([seed, 8, epoch, step, rank]).integers(2**63)))  # dropout
                    total += train_on(cells, genes)
                    done = step
                if device.type == "cpu" or step % 50 == 0 or step == n_steps:  # reading a loss makes a GPU wait
                    if not math.isfinite(total.item()):
                        sys.exit(f"error: {run}: the loss is {total.item()} in epoch {epoch}, batch {step}; lower --lr {options['lr']:g}"
                                 + (f"; model.pt holds epoch {best_epoch}" if best_epoch else ""))
                    progress.set_postfix(mse=f"{total.item() / step:.4g}")
            train_mse = over_processes([total / n_steps / n_processes])[0]
            squared, n = validate()
        except KeyboardInterrupt:
            progress.close()
            if n_processes > 1:  # each has a state of its own
                raise
            save_state()
            sys.exit(f"interrupted in epoch {epoch} after {done} of {n_steps} batches, kept in {run / 'state.pt'}; the same command (without --force) goes on")
        squared, n = over_processes([squared, n])
        val_mse = squared / n
        if not math.isfinite(val_mse):
            sys.exit(f"error: {run}: the validation error is {val_mse} after epoch {epoch}; lower --lr {options['lr']:g}")
        seconds = time.perf_counter() - started
        n_cells = (n_steps - done_before) * batch_size + len(val_cells)
        log.append(dict(zip(LOG_COLUMNS, (epoch, train_mse, val_mse, schedule.get_last_lr()[0], seconds, n_cells / seconds))))
        schedule.step()
        done, total = 0, torch.zeros((), device=device)
        if val_mse < best_val:
            best_epoch, best_val = epoch, val_mse
        if rank == 0:
            print(f"  epoch {epoch:2d}  train MSE {train_mse:.5f}  validation MSE {val_mse:.5f}{' *' if best_epoch == epoch else '  '}  "
                  f"{seconds:.1f} s  {n_cells / seconds:,.0f} cells/s", flush=True)
            save_state()
            if best_epoch == epoch:
                save_best()
            write_log(run / "log.csv", log)
    if rank == 0:
        write_log(run / "log.csv", log)
    return best_epoch, best_val


def write_log(path, log):
    """log.csv: a line an epoch, numbers written so that they read back exactly."""
    rows = [",".join(LOG_COLUMNS)] + [",".join(repr(row[column]) for column in LOG_COLUMNS) for row in log]
    shared.write_text(path, "\n".join(rows) + "\n")


# ---------------------------------------------------------------------------------------------------------------------

def options():
    parser = shared.common_options(argparse.ArgumentParser(description=__doc__))
    add = parser.add_argument
    add("--variant", nargs="+", default=VARIANTS, metavar="NAME", help=f"default: {' '.join(VARIANTS)}")
    add("--seed", nargs="+", type=shared.seed, default=[42], metavar="N", help="default: 42; the paper's: 42 23 89 30 12")
    add("--embedder", metavar="NAME", help="whose vectors, where a source has several (default: the only ones, else published)")
    add("--mode", choices=("concat", "avg"), help="which vectors, where a source has both (default: the only ones, else concat)")
    add("--epochs", type=int, metavar="N", help="at most; default: 20, the demo's: 12")
    add("--batch-size", type=int, metavar="N", help="cells a batch; default: 64, the demo's: 32")
    add("--lr", type=float, metavar="X", help="learning rate of Adam, times 0.9 after each epoch; default: 1e-4, the demo's: 1e-3")
    add("--genes-per-batch", type=int, metavar="N", help="genes drawn for a batch; default: 1536")
    add("--targets-in-batch", action="store_true", help="the genes drawn for a batch contain its cells' targets (the paper's need not)")
    add("--align", choices=ALIGN, default="layernorm", metavar="WAY", help=f"{', '.join(ALIGN)} (default: layernorm)")
    add("--dropout", type=float, metavar="X", help="default: 0.2, the demo's: 0")
    add("--attention-dropout", type=float, metavar="X", help="of attention probabilities; default: as --dropout, but 0 on a CPU, whose "
        "fast attention has none")
    add("--pretrained", type=Path, metavar="DIR", help="folder with scGPT's best_model.pt, args.json, vocab.json (default: "
        "data/human/scgpt/, fetched; the demo trains from scratch)")
    add("--no-pretrained", action="store_true", help="start from random weights, with the sizes that follow")
    for name, value in SCRATCH_SIZES.items():
        add(f"--{name.replace('_', '-')}", type=int, metavar="N", help=f"default: {value}; pretrained: as in args.json")
    add("--compile", action="store_true", help="compile the network with torch.compile: costs minutes at first, meant for long runs on a GPU")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    return parser.parse_args()


def main():
    args = options()
    is_demo = shared.space_of(args.dataset) == "demo"
    defaults = DEMO_DEFAULTS if is_demo else DEFAULTS
    of_dataset = "" if is_demo else f" --dataset {args.dataset}"
    settings = {name: value if getattr(args, name) is None else getattr(args, name) for name, value in defaults.items()}
    for name in ("epochs", "batch_size", "lr", "genes_per_batch", *SCRATCH_SIZES):
        value = settings.get(name, getattr(args, name))
        if value is not None and value <= 0:
            sys.exit(f"error: --{name.replace('_', '-')} has to be above 0")
    for name in ("dropout", "attention_dropout"):
        if not 0 <= (settings.get(name, getattr(args, name)) or 0) < 1:
            sys.exit(f"error: --{name.replace('_', '-')} has to be from 0 to below 1")

    dataset_path = args.root / "data" / args.dataset / "dataset.h5"
    embeddings = embeddings_of(args.root / "data" / shared.space_of(args.dataset) / "embeddings")
    variants = [parse_variant(name, {*shared.SOURCES, *embeddings}) for name in args.variant]
    data = load_dataset(dataset_path, f"03_prepare_data.py{of_dataset}")
    files = [choose_embeddings(v, embeddings, args.embedder, args.mode, f"python 02_embed.py{of_dataset}") for v in variants]

    # Sizes: scGPT's own, or of a network from scratch
    sizes = {name: value if getattr(args, name) is None else getattr(args, name) for name, value in SCRATCH_SIZES.items()}
    pretrained, inputs = None, [dataset_path]
    if args.pretrained and (args.no_pretrained or is_demo):
        sys.exit("error: --pretrained: " + ("it contradicts --no-pretrained" if args.no_pretrained else "the demo's genes are invented, it trains from scratch"))
    if not (args.no_pretrained or is_demo):
        if data.vocab == "own genes":
            sys.exit(f"error: {dataset_path} has its own vocabulary, which fits no pretrained model: add --no-pretrained")
        for name in SCRATCH_SIZES:
            if getattr(args, name) is not None:
                sys.exit(f"error: --{name.replace('_', '-')} goes with --no-pretrained; the pretrained model has its own sizes")
        folder = args.pretrained or args.root / "data" / "human" / "scgpt"
        for name in PRETRAINED_FILES:
            if not args.pretrained:
                shared.download(PRETRAINED_URL + name, folder / name)
            elif not (folder / name).exists():
                sys.exit(f"error: {folder / name} does not exist; --pretrained takes a folder with {', '.join(PRETRAINED_FILES)}")
        if shared.fingerprint(folder / "vocab.json") != data.vocab:
            sys.exit(f"error: {dataset_path} was made with another vocabulary than {folder / 'vocab.json'}; "
                     f"run: python 03_prepare_data.py{of_dataset} --vocab {folder / 'vocab.json'}")
        pretrained = folder / "best_model.pt"
        inputs.append(pretrained)
        saved = shared.read_json(folder / "args.json", object)
        sizes = {name: saved.get(key) for name, key in zip(SCRATCH_SIZES, ("embsize", "nlayers", "nheads", "d_hid"))}
        if not all(type(size) is int and 0 < size <= 10_000 for size in sizes.values()):
            sys.exit(f"error: {folder / 'args.json'}: not scGPT's settings (embsize, nlayers, nheads, d_hid)")

    import torch
    import model
    if pretrained:
        try:
            with torch.device("meta"):  # before anything takes memory: are those the sizes of its weights?
                model.load_pretrained(model.ScGenePT(model.Config(n_tokens=data.n_tokens, pad_id=data.pad_id, **sizes)), pretrained)
        except ValueError as error:
            sys.exit(f"error: {error}")
    device = choose_device(args.device)
    rank, n_processes = process_group(device)
    if settings["batch_size"] % n_processes:
        sys.exit(f"error: --batch-size {settings['batch_size']} is not a multiple of the {n_processes} processes")
    if args.align == "batchnorm" and n_processes > 1:
        sys.exit("error: --align batchnorm on one process only: each would normalize by its own part of a batch")
    if rank:
        sys.stdout = open(os.devnull, "w")
    settings["attention_dropout"] = args.attention_dropout if args.attention_dropout is not None else \
        0.0 if device.type == "cpu" else settings["dropout"]
    settings["targets_in_batch"] = args.targets_in_batch
    print(device_words(device) + (f", {n_processes} processes" if n_processes > 1 else ""))
    print(f"dropout {settings['dropout']:g}, attention dropout {settings['attention_dropout']:g}"
          + (" (off: the CPU's fast attention has none; --attention-dropout 0.2 turns it on)"
             if device.type == "cpu" and args.attention_dropout is None and settings["dropout"] else ""))
    if settings["targets_in_batch"]:
        print("targets in batch: the drawn genes contain the targets of the batch's cells (unlike the paper's runs)")

    for variant, (vectors, suffix) in zip(variants, files):
        of_variant = settings | {"align": args.align if variant.sources else "layernorm"}
        if of_variant["align"] == "dropout0":
            of_variant |= {"dropout": 0.0, "attention_dropout": 0.0}
        if of_variant["align"] == "projection" and not (pretrained and variant.pretrained and variant.has_tokens):
            sys.exit(f"error: {variant.name}: --align projection needs pretrained token vectors")
        suffix = suffix + [f"align={args.align}"] * (of_variant["align"] != "layernorm") + ["targets-in-batch"] * args.targets_in_batch
        for seed in args.seed:
            run = args.root / "runs" / args.dataset / ",".join([variant.name, *suffix]) / f"seed{seed}"
            made = shared.made_from({**of_variant, **sizes, "pretrained": bool(pretrained)}, [*inputs, *vectors.values()])
            config = {"variant": ",".join([variant.name, *suffix]), "seed": seed, "sources": variant.sources,
                      "embeddings": {source: path.name for source, path in vectors.items()}, **shared.provenance(made)}
            print(f"{config['variant']}, seed {seed} -> {run}")
            if not is_to_be_trained(run, config, args.force, rank, n_processes):
                continue
            net = build_model(variant, sizes, of_variant, data, vectors, seed, pretrained)
            n_parameters = sum(p.numel() for p in net.parameters())
            print(f"  {n_parameters:,} parameters; {(np.isin(data.split[data.cell_condition], ['train', 'ctrl'])).sum():,} training cells, "
                  f"{min(settings['genes_per_batch'], len(data.genes)):,} genes a batch")
            if args.compile:
                torch.compiler.reset()  # else the fourth kind of network in one command would not be compiled
                net.compile()
            try:
                best_epoch, best_val = train(run, net, data, of_variant, seed, device, rank, n_processes)
            except KeyboardInterrupt:
                kept = f"the last whole epoch, {run / 'state.pt'}" if (run / "state.pt").exists() else "the beginning: no epoch was finished yet"
                sys.exit(f"interrupted; the same command (without --force) goes on from {kept}")
            print(f"  best epoch {best_epoch}, validation MSE {best_val:.5f}")
            if rank == 0:
                shared.write_text(run / "config.json", json.dumps(config | {"n_parameters": n_parameters, "best_epoch": best_epoch,
                                                                            "best_val_mse": best_val, "finished": True}, indent=1))
    print(f"next: python 05_eval.py{of_dataset}")
    if n_processes > 1:
        torch.distributed.destroy_process_group()


def is_to_be_trained(run, config, force, rank, n_processes):
    """Whether the run is new or unfinished; writes its config.json. Ends when the folder's run had other options or inputs."""
    import torch.distributed as dist
    path, old = run / "config.json", None
    if path.exists() and not force:
        old = shared.read_json(path, object)
        try:
            words = shared.difference(old["made_from"], config["made_from"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            sys.exit(f"error: {path}: not a run's config.json; --force trains anew")
        if words:
            sys.exit(f"error: {run} was trained otherwise ({words}); --force trains anew; to keep both, copy data/ to another folder and give that as --root")
    if n_processes > 1:  # all look before one writes
        seen = [None] * n_processes
        dist.all_gather_object(seen, [file.exists() and shared.fingerprint(file) for file in (path, run / "state.pt")])
        if any(of_process != seen[0] for of_process in seen):
            sys.exit(f"error: {run}: not all processes see the same files there; --root has to be one folder that all machines share")
    if old and old.get("finished"):
        print("  finished already (--force trains anew)")
        return False
    if rank == 0:
        if not old and run.exists():  # --force, or what a killed --force left
            path.unlink(missing_ok=True)  # first: without it nothing else in the folder counts
            shutil.rmtree(run)
        if not old:
            shared.write_text(path, json.dumps(config | {"finished": False}, indent=1))
    if n_processes > 1:
        dist.barrier()
    return True


if __name__ == "__main__":
    shared.run(main)
