"""04_train.py: variants, batches, the training loop, interruption, and what it refuses."""
import csv
import json
from types import SimpleNamespace
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
from scipy import sparse

import model
from conftest import GOLDEN, error_of, run_process, run_script

SMALL = ["--d-model", 16, "--n-layers", 1, "--n-heads", 2, "--d-hid", 16]


@pytest.fixture(scope="module")
def training(stage):
    return stage("04_train")


@pytest.fixture
def root(demo, tmp_path):
    """A root of its own with the demo's data, and no runs."""
    (tmp_path / "data").symlink_to(demo / "data", target_is_directory=True)
    return tmp_path


def train(root, *args, run=run_script, **options):
    return run("04_train.py", *SMALL, *args, root=root, **options)


def log_of(root, run="scgpt/seed42"):
    with open(root / "runs/demo" / run / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


# --- variants

@pytest.mark.parametrize("name, expected", [
    ("scgpt", (True, True, [], True, False)),
    ("scgpt-counts", (True, False, [], True, False)),
    ("scgpt-tokens", (False, True, [], True, False)),
    ("scgenept_go_c", (True, True, ["go_c"], True, False)),
    ("scgenept_ncbi", (True, True, ["ncbi"], True, False)),
    ("scgenept_ncbi+uniprot", (True, True, ["ncbi+uniprot"], True, False)),
    ("scgenept_ncbi+uniprot+go_all", (True, True, ["ncbi+uniprot", "go_all"], True, False)),
    ("scgenept_ncbi+go_f-shuffled", (True, True, ["ncbi", "go_f"], True, True)),
    ("genept_notes", (False, False, ["notes"], True, False)),
    ("genept_go_p-scratch", (False, False, ["go_p"], False, False)),
    ("genept_go_p-scratch-shuffled", (False, False, ["go_p"], False, True)),
])
def test_a_variants_name_gives_its_parts(training, stage, name, expected):
    variant = training.parse_variant(name, {*stage("01_fetch_annotations").SOURCES, "notes"})
    assert (variant.has_tokens, variant.has_counts, variant.sources, variant.pretrained, variant.shuffled) == expected


@pytest.mark.parametrize("name, message", [
    ("scgtp", "unknown variant 'scgtp'"), ("scgenept_", "unknown variant"), ("genept_-scratch", "unknown variant"), ("scgenept_go_x", "unknown source 'go_x'"),
    ("scgenept_go_c+", "unknown variant"), ("scgpt-shuffled", "no texts to shuffle"), ("scgenept_go_c+go_c", "go_c twice"),
    ("scgenept_go_c-scratch", "unknown source")])
def test_an_unknown_variant_or_source_is_named(training, stage, name, message):
    with pytest.raises(SystemExit, match=message):
        training.parse_variant(name, stage("01_fetch_annotations").SOURCES)


def test_the_only_vectors_are_taken_else_published_concat_and_the_name_tells_the_rest(training):
    variant = SimpleNamespace(name="v", sources=["go_c"])
    both = {("published", "concat"): 1, ("published", "avg"): 2, ("lsa", "concat"): 3}

    def choose(found, embedder=None, mode=None):
        return training.choose_embeddings(variant, {"go_c": found}, embedder, mode, "02")

    assert choose({("lsa", "avg"): 9}) == ({"go_c": 9}, [])
    assert choose(both) == ({"go_c": 1}, [])
    assert choose(both, "lsa") == ({"go_c": 3}, ["embedder=lsa"])
    assert choose(both, mode="avg") == ({"go_c": 2}, ["mode=avg"])
    for found, embedder, mode in (({("a", "concat"): 1, ("b", "concat"): 2}, None, None), (both, "openai", None), (both, "lsa", "avg")):
        with pytest.raises(SystemExit):
            choose(found, embedder, mode)


# --- language vectors

@pytest.fixture
def vectors(tmp_path):
    """Genes A to D of a dataset (C outside the vocabulary), and vectors of D, A, C and a gene elsewhere."""
    with h5py.File(tmp_path / "s.lsa.concat.h5", "w") as file:
        file.create_dataset("genes", data=["D", "X", "A", "C"], dtype=h5py.string_dtype())
        file["vectors"] = np.arange(12, dtype=np.float32).reshape(4, 3) + 10
    return SimpleNamespace(genes=np.array(["A", "B", "C", "D"], dtype=object), token_ids=np.array([5, 3, 9, 4]), pad_id=9), \
        {"s": tmp_path / "s.lsa.concat.h5"}


def test_genes_get_their_vectors_and_a_random_one_without_a_text_or_a_token(training, vectors):
    token_ids, tables = training.language_tables(*vectors, seed=1, shuffled=False)
    assert token_ids.tolist() == [3, 4, 5, 9] and tables["s"].dtype == np.float32
    assert tables["s"][1].tolist() == [10, 11, 12] and tables["s"][2].tolist() == [16, 17, 18]  # D, A
    assert (np.abs(tables["s"][[0, 3]]) <= 0.1).all() and np.abs(tables["s"][[0, 3]]).min() > 0     # B, <pad>


def test_shuffling_permutes_the_vectors_among_the_genes_that_have_one(training, vectors):
    plain = training.language_tables(*vectors, seed=1, shuffled=False)[1]["s"]
    seen = set()
    for seed in range(20):
        shuffled = training.language_tables(*vectors, seed=seed, shuffled=True)[1]["s"]
        assert sorted(map(tuple, shuffled[1:3])) == sorted(map(tuple, plain[1:3])) and (np.abs(shuffled[[0, 3]]) <= 0.1).all()
        seen.add(tuple(shuffled[1]))
    assert len(seen) == 2


# --- batches

@pytest.fixture
def cells():
    """40 cells of four conditions x 30 genes; the targets of pairs, singles and control."""
    rng = np.random.default_rng(0)
    return SimpleNamespace(genes=np.arange(30), cell_condition=np.repeat([0, 1, 2, 3], 10), ctrl_cells=np.arange(10),
                           targets=np.array([[-1, -1], [3, -1], [7, -1], [3, 21]]),
                           X=sparse.random(40, 30, 0.3, "csr", random_state=0, dtype=np.float32), rng=rng)


def test_every_perturbed_cell_is_paired_with_one_control_cell_and_control_cells_with_themselves(training, cells):
    pairs = training.pair_cells(cells, seed=1)
    assert np.isin(pairs, cells.ctrl_cells).all() and pairs[:10].tolist() == list(range(10))
    assert len(set(pairs[10:])) > 5
    assert np.array_equal(pairs, training.pair_cells(cells, 1)) and not np.array_equal(pairs, training.pair_cells(cells, 2))


def test_a_batch_draws_its_genes_once_without_repetition_and_every_gene_alike(training, cells):
    drawn = [genes for i in range(200) for _, genes in training.batches(cells, np.arange(40), 16, 10, np.random.default_rng(i))]
    assert len(drawn) == 600 and all(len(set(genes)) == 10 for genes in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=30)
    assert counts.min() > 150 and counts.max() < 250  # 200 expected, five standard deviations are 58


def test_batches_go_once_through_the_cells_and_take_all_genes_where_they_fit(training, cells):
    batches = list(training.batches(cells, np.arange(40)[::-1], 16, 1536, np.random.default_rng(0)))
    assert np.concatenate([batch for batch, _ in batches]).tolist() == list(range(40))[::-1]
    assert [len(batch) for batch, _ in batches] == [16, 16, 8] and all(genes.tolist() == list(range(30)) for _, genes in batches)


def test_targets_in_batch_puts_the_targets_of_its_cells_among_the_genes(training, cells):
    for seed in range(20):
        for batch, genes in training.batches(cells, np.random.default_rng(seed).permutation(40), 4, 10, np.random.default_rng(seed), True):
            targets = set(cells.targets[cells.cell_condition[batch]].ravel()) - {-1}
            assert targets <= set(genes) and len(set(genes)) == 10


def test_flags_and_expression_are_those_of_a_loop(training, cells):
    batch, genes = np.array([2, 11, 35, 25, 35]), np.array([21, 3, 0, 7])
    flags = training.perturbed_flags(cells, batch, genes)
    expression = training.expression_reader(cells.X, torch.device("cpu"))(batch, genes)
    dense = cells.X.toarray()
    for i, cell in enumerate(batch):
        for j, gene in enumerate(genes):
            assert flags[i, j] == (gene in cells.targets[cells.cell_condition[cell]])
            assert expression[i, j] == dense[cell, gene]


# --- the loop

def test_training_is_a_plain_loop_of_adam_on_the_mean_squared_error_of_measured_genes(training, root):
    """The log of the script against a loop written here with PyTorch alone, on data with unmeasured genes and fewer genes a
    batch than there are."""
    data = training.load_dataset(root / "data/demo/dataset.h5", "")
    data.measured[[3, 50, 99]] = False
    options = {"epochs": 2, "batch_size": 100, "lr": 2e-3, "genes_per_batch": 40, "dropout": 0.0, "attention_dropout": 0.0, "targets_in_batch": False, "align": "layernorm"}
    sizes = {"d_model": 16, "n_heads": 2, "d_hid": 16, "n_layers": 1}
    variant = training.parse_variant("scgpt", [])

    run = root / "run"
    run.mkdir()
    best = training.train(run, training.build_model(variant, sizes, options, data, {}, 7, None), data, options, 7, torch.device("cpu"), 0, 1)
    log = torch.load(run / "state.pt", weights_only=True)["log"]

    net = training.build_model(variant, sizes, options, data, {}, 7, None)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    X, pairs = torch.from_numpy(data.X.toarray()), training.pair_cells(data, 7)
    split = data.split[data.cell_condition]

    def loss_of(cells, genes):
        flags = torch.tensor([[gene in data.targets[data.cell_condition[cell]] for gene in genes] for cell in cells])
        error = net(torch.from_numpy(data.token_ids[genes]).long(), X[pairs[cells]][:, genes], flags) - X[cells][:, genes]
        return (error[:, data.measured[genes]] ** 2).mean()

    for epoch in (1, 2):
        rng = np.random.default_rng([7, 1, epoch])
        order = rng.permutation(np.flatnonzero((split == "train") | (split == "ctrl")))
        losses = []
        for start in range(0, len(order) - 99, 100):
            loss = loss_of(order[start:start + 100], rng.permutation(128)[:40])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * 0.9 ** (epoch - 1)
            optimizer.step()
            losses.append(loss.item())
        assert log[epoch - 1]["train_mse"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert log[epoch - 1]["lr"] == pytest.approx(2e-3 * 0.9 ** (epoch - 1))
    trained = torch.load(run / "state.pt", weights_only=True)["model"]
    for key, plain in net.state_dict().items():
        if not key.endswith("in_proj_bias"):  # a bias of the keys changes no attention: its gradient is rounding, which Adam scales up
            assert (trained[key] - plain).norm() < 1e-3 * plain.norm(), key
    assert best[1] == min(row["val_mse"] for row in log)


def test_the_validation_error_is_that_of_the_best_weights_on_the_validation_cells(training, root):
    train(root, "--variant", "scgpt", "--epochs", 2)
    run = root / "runs/demo/scgpt/seed42"
    config, log = json.loads((run / "config.json").read_text()), log_of(root)
    assert config["finished"] and float(log[config["best_epoch"] - 1]["val_mse"]) == config["best_val_mse"] == min(float(r["val_mse"]) for r in log)
    data, net = training.load_dataset(root / "data/demo/dataset.h5", ""), model.load(run / "model.pt")
    cells = np.flatnonzero(data.split[data.cell_condition] == "val")
    pairs, error = training.pair_cells(data, 42), []
    for cell in cells:
        targets = data.targets[data.cell_condition[cell]]
        predicted = model.predict(net, data.token_ids, data.X[pairs[cell]].toarray(), targets[targets >= 0])
        error.append(((predicted - data.X[cell].toarray()) ** 2).mean())
    assert np.mean(error) == pytest.approx(config["best_val_mse"], rel=1e-5)


def test_training_stops_when_validation_gets_no_better_and_keeps_the_best_epoch(training, root):
    with mock.patch.object(training, "PATIENCE", 2):
        done = train(root, "--variant", "scgpt", "--epochs", 40, "--lr", 0.3)
    log = log_of(root)
    best = min(range(len(log)), key=lambda i: float(log[i]["val_mse"])) + 1
    assert len(log) == best + 2 < 40 and f"best epoch {best}" in done.stdout


def test_a_run_killed_between_state_and_model_gets_its_best_model_back(root):
    train(root, "--variant", "scgpt", "--epochs", 2)
    run = root / "runs/demo/scgpt/seed42"
    best = model.load(run / "model.pt").state_dict()
    assert log_of(root)[1]["val_mse"] < log_of(root)[0]["val_mse"]
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {"finished": False}))
    (run / "model.pt").unlink()
    train(root, "--variant", "scgpt", "--epochs", 2)
    assert all(torch.equal(value, best[key]) for key, value in model.load(run / "model.pt").state_dict().items())


def test_a_folder_without_its_config_is_trained_anew(root):
    train(root, "--variant", "scgpt", "--epochs", 1)
    (root / "runs/demo/scgpt/seed42/config.json").unlink()
    assert "goes on after" not in train(root, "--variant", "scgpt", "--epochs", 1, "--lr", 5e-4).stdout
    assert [row["lr"] for row in log_of(root)] == ["0.0005"]


def test_the_same_command_gives_the_same_weights_and_another_seed_others(root):
    train(root, "--variant", "scgpt", "--epochs", 1, "--seed", 1, 2)
    first, other = (torch.load(root / f"runs/demo/scgpt/seed{seed}/state.pt", weights_only=True)["model"] for seed in (1, 2))
    train(root, "--variant", "scgpt", "--epochs", 1, "--seed", 1, "--force")
    again = torch.load(root / "runs/demo/scgpt/seed1/state.pt", weights_only=True)["model"]
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["decoder.fc.0.weight"], other["decoder.fc.0.weight"])


SIX = ["ncbi", "ncbi+uniprot", "go_f", "go_c", "go_p", "go_all"]
WITH_TEXTS = [f"scgenept_{source}" for source in [*SIX, *(f"ncbi+uniprot+{go}" for go in SIX[2:])]] + [
    f"genept_{source}{attention}" for source in SIX for attention in ("", "-scratch")]
EVERY = ["scgpt", "scgpt-counts", "scgpt-tokens", *WITH_TEXTS, *(f"{name}-shuffled" for name in WITH_TEXTS)]


def test_every_variant_of_the_paper_and_its_shuffled_control_trains(root):
    done = train(root, "--variant", *EVERY, "--epochs", 1, "--batch-size", 512, "--genes-per-batch", 16, run=run_process)
    assert len(set(EVERY)) == 47 and done.stdout.count("best epoch 1") == 47
    for name in EVERY:
        config = model.load(root / "runs/demo" / name / "seed42/model.pt").config
        is_genept = name.startswith("genept")
        assert (config.has_tokens, config.has_counts) == (not is_genept and name != "scgpt-tokens", not is_genept and name != "scgpt-counts")
        sources = name.removesuffix("-shuffled").removesuffix("-scratch").partition("_")[2]
        assert list(config.languages) == ([] if not sources else [sources] if sources in SIX else ["ncbi+uniprot", sources.removeprefix("ncbi+uniprot+")])


@pytest.mark.parametrize("way", ["linear", "normalized", "batchnorm", "dropout0", "weights", "two-encoders"])
def test_every_way_of_aligning_language_trains_and_names_its_run(root, way):
    train(root, "--variant", "scgpt", "scgenept_go_c", "--align", way, "--epochs", 1, "--batch-size", 512, "--dropout", 0.1)
    assert {path.name for path in (root / "runs/demo").iterdir()} == {"scgpt", f"scgenept_go_c,align={way}"}
    net = model.load(root / f"runs/demo/scgenept_go_c,align={way}/seed42/model.pt")
    keys = {key.split(".")[0] for key in net.state_dict()}
    assert ("ln" in keys) == (way not in ("linear", "normalized", "batchnorm")) and ("bn" in keys) == (way == "batchnorm")
    assert ("modality_weights" in keys) == (way == "weights") and ("language_transformer" in keys) == (way == "two-encoders")
    assert net.config.normalize_language == (way == "normalized") and (net.config.dropout == 0) == (way == "dropout0")


def test_the_projection_starts_at_the_least_squares_solution(training):
    rng = np.random.default_rng(0)
    net = model.ScGenePT(model.Config(n_tokens=50, pad_id=49, d_model=8, n_heads=2, d_hid=8, n_layers=1, languages={"s": 5}, n_language_rows=40))
    token_ids, table = np.arange(40), rng.normal(size=(40, 5)).astype(np.float32)
    training.fit_projection(net, token_ids, {"s": table})
    goal = net.encoder(torch.arange(40)).detach().numpy()
    expected = np.linalg.lstsq(np.column_stack([table, np.ones(40)]), goal, rcond=None)[0]
    np.testing.assert_allclose(net.language_encoders["s"].proj.weight.detach().numpy(), expected[:-1].T, atol=1e-5)
    np.testing.assert_allclose(net.language_encoders["s"].proj.bias.detach().numpy(), expected[-1], atol=1e-5)


# --- pretrained weights

@pytest.fixture
def pretrained(demo, tmp_path):
    """A folder as scGPT's whole-human one, whose vocabulary has the demo's genes, and the demo's cells numbered by it."""
    folder = tmp_path / "scgpt"
    folder.mkdir()
    genes = [f"DEMO{i + 1:03d}" for i in range(0, 128, 2)]
    (folder / "vocab.json").write_text(json.dumps({gene: i for i, gene in enumerate([*genes, *(f"OTHER{i}" for i in range(53)), "<pad>", "<cls>", "<eoc>"])}))
    (folder / "args.json").write_text(json.dumps({"embsize": 32, "nlayers": 3, "nheads": 4, "d_hid": 48, "dropout": 0.2}))
    golden = np.load(GOLDEN / "scgenept_ncbi_flash_layout.npz")
    state = {key.removeprefix("state/"): torch.from_numpy(golden[key]) for key in golden.files if key.startswith("state/")}
    torch.save({key: value for key, value in state.items() if not key.startswith("genept")} | {"flag_encoder.weight": torch.ones(2, 32)},
               folder / "best_model.pt")
    write_demo_h5ad(demo, tmp_path / "cells.h5ad")
    run_script("03_prepare_data.py", "--dataset", "mine", "--h5ad", tmp_path / "cells.h5ad", "--vocab", folder / "vocab.json", root=tmp_path)
    return folder


def write_demo_h5ad(demo, path):
    """The demo's cells as an AnnData file of the user's."""
    with h5py.File(demo / "data/demo/dataset.h5") as source, h5py.File(path, "w") as file:
        file.create_group("X").attrs.update({"encoding-type": "csr_matrix", "shape": source["X"].attrs["shape"]})
        for name in ("data", "indices", "indptr"):
            file["X"][name] = source["X"][name][:]
        for table, column, values in (("obs", "condition", source["conditions"][:][source["cell_condition"][:]]), ("var", "gene_name", source["genes"][:])):
            file.create_group(table).attrs["_index"] = column
            file[table].create_dataset(column, data=values, dtype=h5py.string_dtype())


def test_fine_tuning_starts_from_the_pretrained_parts_and_says_so(pretrained, tmp_path):
    options = ("--dataset", "mine", "--variant", "scgpt", "--pretrained", pretrained, "--epochs", 1, "--batch-size", 512)
    done = run_script("04_train.py", *options, "--lr", 1e-9, root=tmp_path)
    assert "of encoder, transformer_encoder, value_encoder" in done.stdout and "cls_decoder, decoder, flag_encoder, ln, pert_encoder" in done.stdout
    state = torch.load(pretrained / "best_model.pt", weights_only=True)
    for key, value in model.load(tmp_path / "runs/mine/scgpt/seed42/model.pt").state_dict().items():
        if key.startswith(("encoder.", "value_encoder.", "transformer_encoder.")):
            torch.testing.assert_close(value, state[key.replace("in_proj_", "Wqkv.")], atol=1e-6, rtol=0)


def test_the_projection_needs_pretrained_tokens_and_takes_them(pretrained, tmp_path):
    (tmp_path / "notes.tsv").write_text("gene\ttext\n" + "".join(f"DEMO{i + 1:03d}\tword{i % 5} word{i % 7}\n" for i in range(128)))
    of_data = ("--dataset", "mine")
    run_script("01_fetch_annotations.py", *of_data, "--tsv", f"notes={tmp_path / 'notes.tsv'}", root=tmp_path)
    run_script("02_embed.py", *of_data, "--source", "notes", "--embedder", "lsa", root=tmp_path)
    options = (*of_data, "--variant", "scgenept_notes", "--align", "projection", "--epochs", 1, "--batch-size", 512)
    run_script("04_train.py", *options, "--pretrained", pretrained, root=tmp_path)
    assert (tmp_path / "runs/mine/scgenept_notes,align=projection/seed42/model.pt").exists()
    assert "needs pretrained token vectors" in error_of("04_train.py", *options, "--no-pretrained", root=tmp_path)


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: torch.save({"encoder.embedding.weight": torch.ones(3, 3)}, folder / "best_model.pt"), "no value_encoder"),
    (lambda folder: (folder / "best_model.pt").write_text("<html>"), "best_model.pt: not a readable torch file"),
    (lambda folder: (folder / "args.json").write_text("{}"), "args.json: not scGPT's settings"),
    (lambda folder: (folder / "vocab.json").write_text('{"<pad>": 0}'), "made with another vocabulary"),
    (lambda folder: (folder / "best_model.pt").unlink(), "best_model.pt does not exist")])
def test_a_pretrained_folder_that_does_not_fit_is_an_error(pretrained, tmp_path, spoil, message):
    spoil(pretrained)
    assert message in error_of("04_train.py", "--dataset", "mine", "--variant", "scgpt", "--pretrained", pretrained, "--epochs", 1, root=tmp_path)


def test_data_with_a_vocabulary_of_its_own_needs_no_pretrained(demo, tmp_path):
    write_demo_h5ad(demo, tmp_path / "cells.h5ad")
    run_script("03_prepare_data.py", "--dataset", "mine", "--h5ad", tmp_path / "cells.h5ad", "--vocab", "none", root=tmp_path)
    assert "--no-pretrained" in error_of("04_train.py", "--dataset", "mine", "--variant", "scgpt", root=tmp_path)


# --- what a run says and refuses

def test_a_finished_run_is_left_alone_and_one_with_other_options_is_an_error_that_names_them(root):
    train(root, "--variant", "scgpt", "--epochs", 1)
    before = (root / "runs/demo/scgpt/seed42/state.pt").read_bytes()
    assert "finished already" in train(root, "--variant", "scgpt", "--epochs", 1).stdout
    error = train(root, "--variant", "scgpt", "--epochs", 1, "--lr", 0.5, run=error_of)
    assert "lr was 0.001, now 0.5" in error and "--force" in error
    assert (root / "runs/demo/scgpt/seed42/state.pt").read_bytes() == before


def test_targets_in_batch_is_reported_and_part_of_the_runs_name(root):
    done = train(root, "--variant", "scgpt", "--epochs", 1, "--batch-size", 512, "--genes-per-batch", 64, "--targets-in-batch")
    assert "unlike the paper's runs" in done.stdout and (root / "runs/demo/scgpt,targets-in-batch/seed42/model.pt").exists()


def test_the_start_of_a_run_says_that_attention_dropout_is_off_on_a_cpu_and_an_option_turns_it_on(root):
    options = ("--variant", "scgpt", "--epochs", 1, "--batch-size", 512, "--dropout", 0.1)
    assert "attention dropout 0 (off" in train(root, *options).stdout
    assert "attention dropout 0.1\n" in train(root, *options, "--attention-dropout", 0.1, "--force").stdout
    assert model.load(root / "runs/demo/scgpt/seed42/model.pt").config.attention_dropout == 0.1


def test_a_loss_that_is_not_finite_stops_the_run_with_epoch_batch_and_advice(root):
    error = train(root, "--variant", "scgpt", "--lr", 1e25, run=error_of)
    assert "in epoch 1, batch 2" in error and "lower --lr" in error


@pytest.mark.parametrize("args, message", [
    (["--variant", "scgenept_go_x"], "unknown source"), (["--epochs", "0"], "--epochs"), (["--dropout", "1"], "--dropout"),
    (["--batch-size", "4000"], "lower --batch-size"), (["--device", "cuda"], "--device cuda"), (["--dataset", "a/../b"], "--dataset"),
    (["--dataset", "mine", "--variant", "scgpt"], "run first: python 03_prepare_data.py --dataset mine"), (["--n-heads", "3"], "not a multiple"),
    (["--n-heads", "0"], "--n-heads has to be above 0"), (["--device", "meta"], "--device meta"),
    (["--pretrained", "nowhere"], "the demo's genes are invented"), (["--variant", "scgpt", "--n-layers", "1", "--n-heads", "1", "--d-model", "4000000"], "not enough memory"),
    (["--seed", "-1"], "invalid seed value: '-1'")])
def test_bad_options_are_one_line(root, args, message):
    if torch.cuda.is_available() and "cuda" in args:
        pytest.skip("there is a GPU")
    assert message in error_of("04_train.py", *args, root=root)


def test_vectors_that_are_not_there_name_the_command_that_makes_them(root, demo):
    assert "run first: python 03_prepare_data.py --dataset mine" in error_of("04_train.py", "--variant", "scgenept_ncbi", "--dataset", "mine", root=root)
    (root / "data").unlink()
    (root / "data/mine").mkdir(parents=True)
    (root / "data/mine/dataset.h5").write_bytes((demo / "data/demo/dataset.h5").read_bytes())
    assert "run first: python 02_embed.py --dataset mine --source ncbi" in error_of("04_train.py", "--variant", "scgenept_ncbi", "--dataset", "mine", root=root)


def test_a_broken_dataset_or_state_is_named(root, demo):
    (root / "data").unlink()
    (root / "data/demo").mkdir(parents=True)
    (root / "data/demo/dataset.h5").write_bytes((demo / "data/demo/dataset.h5").read_bytes()[:5000])
    assert "dataset.h5: not a whole HDF5 file" in train(root, "--variant", "scgpt", run=error_of)
    (root / "data/demo/dataset.h5").write_bytes((demo / "data/demo/dataset.h5").read_bytes())
    train(root, "--variant", "scgpt", "--epochs", 1, "--batch-size", 512)
    run = root / "runs/demo/scgpt/seed42"
    (run / "state.pt").write_bytes((run / "state.pt").read_bytes()[:1000])
    (run / "config.json").write_text((run / "config.json").read_text().replace('"finished": true', '"finished": false'))
    assert "state.pt: cannot be read" in train(root, "--variant", "scgpt", "--epochs", 1, "--batch-size", 512, run=error_of)
