"""04_train.py: variants, language vectors, batches, the training loop, pretrained weights, runs, and what it refuses."""
import csv
import json
import shlex
import shutil
import time
from types import SimpleNamespace
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
from scipy import sparse

import model
from conftest import GOLDEN, error_of, run_process, run_script, start_process

SMALL = ["--d-model", 16, "--n-layers", 1, "--n-heads", 2, "--d-hid", 16, "--batch-size", 512, "--genes-per-batch", 32,
         "--lr", 1e-3]


@pytest.fixture(scope="module")
def training(stage):
    return stage("04_train")


@pytest.fixture
def root(demo, tmp_path):
    """A root of its own with the demo's data, and no runs."""
    (tmp_path / "data").symlink_to(demo / "data", target_is_directory=True)
    return tmp_path


@pytest.fixture
def own(demo, tmp_path):
    """A copy of the demo's root, data and runs."""
    return shutil.copytree(demo, tmp_path / "own")


def train(root, *args, run=run_script, **options):
    return run("04_train.py", *SMALL, "--variant", "scgpt", *args, root=root, **options)


def train_as_before(root, run="scgpt/seed42"):
    """The command that trained a run of conftest's demo, in a copy of its root."""
    words = shlex.split(config_of(root, run)["command"])[1:]
    return run_script("04_train.py", *words[:words.index("--root")], root=root)


def weights(root, run="scgpt/seed42", file="model.pt"):
    saved = torch.load(root / "runs/demo" / run / file, weights_only=True)
    return saved["state" if file == "model.pt" else "net"]


def are_equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def config_of(root, run="scgpt/seed42"):
    return json.loads((root / "runs/demo" / run / "config.json").read_text())


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
    ("scgenept_go_c-scratch", (True, True, ["go_c"], False, False)),
    ("genept_notes", (False, False, ["notes"], True, False)),
    ("genept_go_p-scratch", (False, False, ["go_p"], False, False)),
    ("genept_go_p-scratch-shuffled", (False, False, ["go_p"], False, True)),
])
def test_a_variants_name_gives_its_parts(training, stage, name, expected):
    variant = training.parse_variant(name, {*stage("01_fetch_annotations").SOURCES, "notes"})
    assert (variant.has_tokens, variant.has_counts, variant.sources, variant.pretrained, variant.shuffled) == expected


@pytest.mark.parametrize("name, message", [
    ("scgtp", "unknown variant 'scgtp'"), ("scgenept_", "unknown variant"), ("genept_-scratch", "unknown variant"),
    ("scgenept_go_x", "unknown source 'go_x'"), ("scgpt-shuffled", "no texts to shuffle"), ("scgpt-scratch", "unknown variant")])
def test_an_unknown_variant_or_source_is_named(training, stage, name, message):
    with pytest.raises(SystemExit, match=message):
        training.parse_variant(name, stage("01_fetch_annotations").SOURCES)


def test_the_only_vectors_are_taken_else_published_concat_and_the_name_tells_the_rest(training):
    variant = SimpleNamespace(name="v", sources=["go_c"])
    both = {("published", "concat"): 1, ("published", "avg"): 2, ("lsa", "concat"): 3}

    def choose(found, embedder=None, mode=None):
        return training.choose_embeddings(variant, {"go_c": found}, SimpleNamespace(embedder=embedder, mode=mode))

    assert choose({("lsa", "avg"): 9}) == ({"go_c": 9}, [])
    assert choose(both) == ({"go_c": 1}, [])
    assert choose(both, "lsa") == ({"go_c": 3}, ["embedder=lsa"])
    assert choose(both, mode="avg") == ({"go_c": 2}, ["mode=avg"])
    two = {("a", "concat"): 1, ("b", "concat"): 2}
    for found, embedder, mode in ((two, None, None), (both, "openai", None), (both, "lsa", "avg")):
        with pytest.raises(SystemExit):
            choose(found, embedder, mode)


# --- language vectors

@pytest.fixture
def vectors(tmp_path):
    """Genes A to D of a dataset (C outside the vocabulary), and vectors of D, A, C and a gene elsewhere."""
    with h5py.File(tmp_path / "s.lsa.concat.h5", "w") as file:
        file.create_dataset("genes", data=["D", "X", "A", "C"], dtype=h5py.string_dtype())
        file["vectors"] = np.arange(12, dtype=np.float32).reshape(4, 3) + 10
    data = SimpleNamespace(genes=np.array(["A", "B", "C", "D"], dtype=object), token_ids=np.array([5, 3, 9, 4]), pad_id=9)
    return data, {"s": tmp_path / "s.lsa.concat.h5"}


def test_genes_get_their_vectors_and_a_random_one_without_a_text_or_a_token(training, vectors):
    token_ids, tables, has_text = training.language_tables(*vectors, seed=1, shuffled=False)
    assert token_ids.tolist() == [3, 4, 5, 9] and tables["s"].dtype == np.float32
    assert tables["s"][1].tolist() == [10, 11, 12] and tables["s"][2].tolist() == [16, 17, 18]  # D, A
    assert (np.abs(tables["s"][[0, 3]]) <= 0.1).all() and np.abs(tables["s"][[0, 3]]).min() > 0     # B, <pad>


def test_shuffling_permutes_the_vectors_among_the_genes_that_have_one(training, vectors):
    plain = training.language_tables(*vectors, seed=1, shuffled=False)[1]["s"]
    seen = set()
    for seed in range(20):
        shuffled = training.language_tables(*vectors, seed=seed, shuffled=True)[1]["s"]
        assert sorted(map(tuple, shuffled[1:3])) == sorted(map(tuple, plain[1:3]))
        assert (np.abs(shuffled[[0, 3]]) <= 0.1).all()
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
    drawn = [genes for i in range(200)
             for _, genes in training.batches(cells, np.arange(40), 16, 10, np.random.default_rng(i))]
    assert len(drawn) == 600 and all(len(set(genes)) == 10 for genes in drawn)
    counts = np.bincount(np.concatenate(drawn), minlength=30)
    assert counts.min() > 150 and counts.max() < 250  # 200 expected, five standard deviations are 58


def test_batches_go_once_through_the_cells_and_take_all_genes_where_they_fit(training, cells):
    batches = list(training.batches(cells, np.arange(40)[::-1], 16, 1536, np.random.default_rng(0)))
    assert np.concatenate([batch for batch, _ in batches]).tolist() == list(range(40))[::-1]
    assert [len(batch) for batch, _ in batches] == [16, 16, 8]
    assert all(genes.tolist() == list(range(30)) for _, genes in batches)


def test_targets_in_batch_puts_the_targets_of_its_cells_among_the_genes(training, cells):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        for batch, genes in training.batches(cells, rng.permutation(40), 4, 10, rng, with_targets=True):
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


def splits(split):
    """Data with a condition of two cells for each name of `split`."""
    return SimpleNamespace(split=np.array(split), cell_condition=np.repeat(np.arange(len(split)), 2),
                           conditions=np.array([f"G{i}+ctrl" for i in range(len(split))], dtype=object))


def test_without_validation_conditions_a_tenth_of_the_training_conditions_validates(training, capsys):
    train_cells, val_cells = training.split_cells(splits(["ctrl", "test"] + ["train"] * 30))
    assert len(val_cells) == 6 and len(train_cells) == 2 * 28 and not set(train_cells) & set(val_cells)
    assert {0, 1} <= set(train_cells) and not {2, 3} & {*train_cells, *val_cells}  # control, test
    assert "no validation conditions" in capsys.readouterr().out


def test_an_only_condition_both_trains_and_validates(training):
    train_cells, val_cells = training.split_cells(splits(["ctrl", "train"]))
    assert train_cells.tolist() == [0, 1, 2, 3] and val_cells.tolist() == [2, 3]


# --- the loop

def test_training_is_a_plain_loop_of_adam_on_the_mean_squared_error_of_measured_genes(training, stage, root):
    """The log of the script against a loop written here with PyTorch alone, on data with unmeasured genes and fewer genes a
    batch than there are."""
    data = stage("03_prepare_data").load_dataset(root / "data/demo/dataset.h5", "")
    data.measured[[3, 50, 99]] = False
    settings = {"epochs": 2, "batch_size": 100, "lr": 2e-3, "genes_per_batch": 40, "dropout": 0.0, "attention_dropout": 0.0,
                "targets_in_batch": False, "align": "layernorm", "residual": False, "cells_at_once": 100,
                "d_model": 16, "n_heads": 2, "d_hid": 16, "n_layers": 1}
    plan = SimpleNamespace(variant=training.parse_variant("scgpt", []), settings=settings, vectors={}, pretrained=None)
    machine = training.set_up_machine(SimpleNamespace(device="cpu", batch_size=100, align="layernorm"))

    run = root / "run"
    run.mkdir()
    state = training.train(run, training.build_model(plan, data, 7), data, settings, 7, machine)
    saved = torch.load(run / "state.pt", weights_only=True)

    net = training.build_model(plan, data, 7)
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    X, pairs = torch.from_numpy(data.X[np.arange(len(data.cell_condition))].toarray()), training.pair_cells(data, 7)
    split = data.split[data.cell_condition]

    def loss_of(cells, genes):
        flags = torch.tensor([[gene in data.targets[data.cell_condition[cell]] for gene in genes] for cell in cells])
        predicted = net(torch.from_numpy(data.token_ids[genes]).long(), X[pairs[cells]][:, genes], flags)
        return ((predicted - X[cells][:, genes])[:, data.measured[genes]] ** 2).mean()

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
        assert saved["log"][epoch - 1]["train_mse"] == pytest.approx(np.mean(losses), rel=1e-5)
        assert saved["log"][epoch - 1]["lr"] == pytest.approx(2e-3 * 0.9 ** (epoch - 1))
    for key, plain in net.state_dict().items():
        if not key.endswith("in_proj_bias"):  # the keys' bias changes no attention: its gradient is rounding, which Adam scales up
            assert (saved["net"][key] - plain).norm() < 1e-3 * plain.norm(), key
    assert state.log == saved["log"] and training.best_of(state.log)["val_mse"] == min(row["val_mse"] for row in state.log)


def test_the_validation_error_is_that_of_the_best_weights_on_the_validation_cells(training, stage, root):
    train(root, "--epochs", 2, "--genes-per-batch", 128)
    config, log = config_of(root), log_of(root)
    errors = [float(row["val_mse"]) for row in log]
    assert errors[config["best_epoch"] - 1] == config["best_val_mse"] == min(errors)
    data = stage("03_prepare_data").load_dataset(root / "data/demo/dataset.h5", "")
    net = model.load(root / "runs/demo/scgpt/seed42/model.pt")
    cells = np.flatnonzero(data.split[data.cell_condition] == "val")
    pairs, error = training.pair_cells(data, 42), []
    for cell in cells:
        targets = data.targets[data.cell_condition[cell]]
        predicted = model.predict(net, data.token_ids, data.X[pairs[[cell]]].toarray(), targets[targets >= 0])
        error.append(((predicted - data.X[np.array([cell])].toarray()) ** 2).mean())
    assert np.mean(error) == pytest.approx(config["best_val_mse"], rel=1e-5)


def test_training_stops_when_validation_gets_no_better_and_is_finished_then(training, root):
    with mock.patch.object(training, "PATIENCE", 2):
        done = train(root, "--epochs", 40, "--lr", 0.3)
    log = log_of(root)
    best = min(range(len(log)), key=lambda i: float(log[i]["val_mse"])) + 1
    assert len(log) == best + 2 < 40 and f"best epoch {best}" in done.stdout
    assert "finished already" in train(root, "--epochs", 80, "--lr", 0.3).stdout


def test_a_split_without_validation_conditions_trains(own):
    run_script("03_prepare_data.py", "--split", "none", root=own)
    assert "no validation conditions" in train(own, "--epochs", 1, "--name", "all").stdout
    assert float(log_of(own, "scgpt,name=all/seed42")[0]["val_mse"]) > 0


def test_an_only_condition_trains(demo, tmp_path):
    write_demo_h5ad(demo, tmp_path / "cells.h5ad", n_conditions=2)
    cells = ("--dataset", "one", "--h5ad", tmp_path / "cells.h5ad", "--split", "none", "--vocab", "none")
    run_script("03_prepare_data.py", *cells, root=tmp_path)
    done = train(tmp_path, "--dataset", "one", "--no-pretrained", "--epochs", 1, "--batch-size", 16)
    assert "the only condition" in done.stdout and (tmp_path / "runs/one/scgpt/seed42/model.pt").exists()


def test_the_same_command_gives_the_same_weights_and_another_seed_others(root):
    train(root, "--epochs", 1, "--seed", 1, 2)
    first, other = weights(root, "scgpt/seed1"), weights(root, "scgpt/seed2")
    train(root, "--epochs", 1, "--seed", 1, "--force")
    assert are_equal(first, weights(root, "scgpt/seed1"))
    assert not torch.equal(first["decoder.fc.0.weight"], other["decoder.fc.0.weight"])


SIX = ["ncbi", "ncbi+uniprot", "go_f", "go_c", "go_p", "go_all"]
WITH_TEXTS = [f"scgenept_{source}" for source in [*SIX, *(f"ncbi+uniprot+{go}" for go in SIX[2:])]] + [
    f"genept_{source}{attention}" for source in SIX for attention in ("", "-scratch")]
EVERY = ["scgpt", "scgpt-counts", "scgpt-tokens", *WITH_TEXTS, *(f"{name}-shuffled" for name in WITH_TEXTS)]


def test_every_variant_of_the_paper_and_its_shuffled_control_trains(root):
    done = train(root, "--variant", *EVERY, "--epochs", 1, "--genes-per-batch", 16, run=run_process)
    assert len(set(EVERY)) == 47 and done.stdout.count("best epoch 1") == 47
    for name in EVERY:
        config = model.load(root / "runs/demo" / name / "seed42/model.pt").config
        is_genept = name.startswith("genept")
        assert config.has_tokens == (not is_genept and name != "scgpt-tokens")
        assert config.has_counts == (not is_genept and name != "scgpt-counts")
        sources = name.removesuffix("-shuffled").removesuffix("-scratch").partition("_")[2]
        if sources not in ["", *SIX]:
            assert list(config.languages) == ["ncbi+uniprot", sources.removeprefix("ncbi+uniprot+")]
        else:
            assert list(config.languages) == [source for source in [sources] if source]


@pytest.mark.parametrize("way", ["linear", "normalized", "batchnorm", "dropout0", "weights", "two-encoders"])
def test_every_way_of_aligning_language_trains_and_names_its_run(root, way):
    train(root, "--variant", "scgpt", "scgenept_go_c", "--align", way, "--epochs", 1, "--dropout", 0.1)
    assert {path.name for path in (root / "runs/demo").iterdir()} == {"scgpt", f"scgenept_go_c,align={way}"}
    net = model.load(root / f"runs/demo/scgenept_go_c,align={way}/seed42/model.pt")
    keys = {key.split(".")[0] for key in net.state_dict()}
    assert ("ln" in keys) == (way not in ("linear", "normalized", "batchnorm")) and ("bn" in keys) == (way == "batchnorm")
    assert ("modality_weights" in keys) == (way == "weights") and ("language_transformer" in keys) == (way == "two-encoders")
    assert net.config.normalize_language == (way == "normalized") and (net.config.dropout == 0) == (way == "dropout0")


def test_the_projection_starts_at_the_least_squares_solution(training):
    rng = np.random.default_rng(0)
    net = model.ScGenePT(model.Config(n_tokens=50, pad_id=49, d_model=8, n_heads=2, d_hid=8, n_layers=1,
                                      languages={"s": 5}, n_language_rows=40))
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
    tokens = [*genes, *(f"OTHER{i}" for i in range(53)), "<pad>", "<cls>", "<eoc>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "args.json").write_text(json.dumps({"embsize": 32, "nlayers": 3, "nheads": 4, "d_hid": 48, "dropout": 0.2}))
    golden = np.load(GOLDEN / "scgenept_ncbi_flash_layout.npz")
    state = {key.removeprefix("state/"): torch.from_numpy(golden[key]) for key in golden.files if key.startswith("state/")}
    released = {key: value for key, value in state.items() if not key.startswith("genept")}
    torch.save(released | {"flag_encoder.weight": torch.ones(2, 32)}, folder / "best_model.pt")
    write_demo_h5ad(demo, tmp_path / "cells.h5ad")
    run_script("03_prepare_data.py", "--dataset", "mine", "--h5ad", tmp_path / "cells.h5ad", "--vocab", folder / "vocab.json",
               root=tmp_path)
    return folder


def write_demo_h5ad(demo, path, n_conditions=None):
    """The demo's cells, or those of the control and its first conditions, as an AnnData file of the user's."""
    with h5py.File(demo / "data/demo/dataset.h5") as source, h5py.File(path, "w") as file:
        condition, X = source["cell_condition"][:], source["X"]
        X = sparse.csr_matrix((X["data"][:], X["indices"][:], X["indptr"][:]), shape=(len(condition), 128))
        conditions = source["conditions"].asstr()[:]
        kept = np.argsort(conditions != "ctrl", kind="stable")[:n_conditions]  # the control first
        is_kept = np.isin(condition, kept)
        file["X"] = X[is_kept].toarray()
        tables = {"obs": ("condition", conditions[condition[is_kept]]), "var": ("gene_name", source["genes"][:])}
        for table, (column, values) in tables.items():
            file.create_group(table).attrs["_index"] = column
            file[table].create_dataset(column, data=values, dtype=h5py.string_dtype())


def test_fine_tuning_starts_from_the_pretrained_parts_and_says_so(pretrained, tmp_path):
    options = ("--dataset", "mine", "--variant", "scgpt", "--pretrained", pretrained, "--epochs", 1, "--batch-size", 512,
               "--genes-per-batch", 16)
    done = run_script("04_train.py", *options, "--lr", 1e-9, root=tmp_path)
    assert "of encoder, transformer_encoder, value_encoder" in done.stdout
    assert "cls_decoder, decoder, flag_encoder, ln, pert_encoder" in done.stdout
    state = torch.load(pretrained / "best_model.pt", weights_only=True)
    for key, value in model.load(tmp_path / "runs/mine/scgpt/seed42/model.pt").state_dict().items():
        if key.startswith(("encoder.", "value_encoder.", "transformer_encoder.")):
            torch.testing.assert_close(value, state[key.replace("in_proj_", "Wqkv.")], atol=1e-6, rtol=0)


def test_the_projection_needs_pretrained_tokens_and_takes_them(pretrained, tmp_path):
    lines = [f"DEMO{i + 1:03d}\tword{i % 5} word{i % 7}\n" for i in range(128)]
    (tmp_path / "notes.tsv").write_text("gene\ttext\n" + "".join(lines))
    of_data = ("--dataset", "mine")
    run_script("01_fetch_annotations.py", *of_data, "--tsv", f"notes={tmp_path / 'notes.tsv'}", root=tmp_path)
    run_script("02_embed.py", *of_data, "--source", "notes", "--embedder", "lsa", root=tmp_path)
    options = (*of_data, "--variant", "scgenept_notes", "--align", "projection", "--epochs", 1, "--batch-size", 512,
               "--genes-per-batch", 16)
    run_script("04_train.py", *options, "--pretrained", pretrained, root=tmp_path)
    assert (tmp_path / "runs/mine/scgenept_notes,align=projection/seed42/model.pt").exists()
    assert "needs pretrained token vectors" in error_of("04_train.py", *options, "--no-pretrained", root=tmp_path)


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: torch.save({"encoder.embedding.weight": torch.ones(3, 3)}, folder / "best_model.pt"), "no value_encoder"),
    (lambda folder: (folder / "best_model.pt").write_text("<html>"), "best_model.pt: expected weights"),
    (lambda folder: (folder / "args.json").write_text("{}"), "args.json: not scGPT's settings"),
    (lambda folder: (folder / "vocab.json").write_text('{"<pad>": 0}'), "made with another vocabulary"),
    (lambda folder: (folder / "best_model.pt").unlink(), "best_model.pt: No such file")])
def test_a_pretrained_folder_that_does_not_fit_is_an_error(pretrained, tmp_path, spoil, message):
    spoil(pretrained)
    options = ("--dataset", "mine", "--variant", "scgpt", "--pretrained", pretrained, "--epochs", 1)
    assert message in error_of("04_train.py", *options, root=tmp_path)


def test_data_with_a_vocabulary_of_its_own_needs_no_pretrained(demo, tmp_path):
    write_demo_h5ad(demo, tmp_path / "cells.h5ad", n_conditions=20)
    cells = ("--dataset", "mine", "--h5ad", tmp_path / "cells.h5ad", "--vocab", "none")
    run_script("03_prepare_data.py", *cells, root=tmp_path)
    assert "--no-pretrained" in error_of("04_train.py", "--dataset", "mine", "--variant", "scgpt", root=tmp_path)


# --- runs

def test_a_finished_run_is_left_as_it_is(root):
    train(root, "--epochs", 2)
    before = {path: path.read_bytes() for path in (root / "runs").rglob("*") if path.is_file()}
    assert "finished already, 2 epochs" in train(root, "--epochs", 2).stdout
    assert "finished already, 2 epochs" in train(root, "--epochs", 1).stdout
    assert before == {path: path.read_bytes() for path in (root / "runs").rglob("*") if path.is_file()}


def test_more_epochs_go_on_to_the_weights_of_as_many_at_once(root):
    train(root, "--epochs", 2)
    assert "goes on after epoch 2" in train(root, "--epochs", 3).stdout
    in_two_parts = weights(root), weights(root, file="state.pt"), config_of(root)
    assert in_two_parts[2]["epochs"] == 3 and in_two_parts[2]["finished"]
    train(root, "--epochs", 3, "--force")
    assert are_equal(in_two_parts[0], weights(root)) and are_equal(in_two_parts[1], weights(root, file="state.pt"))


def test_other_settings_in_the_same_folder_are_an_error_that_names_them_and_name_keeps_both(root):
    train(root, "--epochs", 1)
    before = weights(root)
    error = train(root, "--epochs", 1, "--lr", 0.5, run=error_of)
    assert "lr was 0.001, now 0.5" in error and "--name" in error and "--force" in error
    train(root, "--epochs", 1, "--lr", 0.5, "--name", "fast")
    assert config_of(root)["lr"] == 0.001 and are_equal(before, weights(root))
    assert config_of(root, "scgpt,name=fast/seed42")["lr"] == 0.5


def test_weights_without_their_settings_are_not_thrown_away(root):
    train(root, "--epochs", 1)
    before = weights(root)
    (root / "runs/demo/scgpt/seed42/config.json").unlink()
    assert "its config.json is missing" in train(root, "--epochs", 1, run=error_of)
    assert are_equal(before, weights(root))


def test_a_run_without_a_whole_epoch_is_replaced_by_other_settings(root):
    train(root, "--epochs", 1, "--lr", 1e25, run=error_of)
    train(root, "--epochs", 1, "--lr", 1e-3)
    assert config_of(root)["finished"] and config_of(root)["lr"] == 1e-3


def test_config_json_is_flat(root):
    train(root, "--epochs", 1, "--dropout", 0.1)
    config = config_of(root)
    assert (config["epochs"], config["batch_size"], config["dropout"], config["d_model"]) == (1, 512, 0.1, 16)
    assert (config["device"], config["precision"], config["n_processes"]) == ("cpu", "float32", 1)
    assert (config["variant"], config["seed"], config["finished"], config["best_epoch"]) == ("scgpt", 42, True, 1)


def test_a_run_of_an_older_version_of_the_kit_is_left_out(own):
    path = next(own.glob("runs/demo/scgpt/seed*/config.json"))
    config = json.loads(path.read_text())
    del config["inputs"]
    path.write_text(json.dumps(config))
    assert f"left out: {path.parent}: the dataset has changed since" in run_script("05_eval.py", "--controls", 2, root=own).stdout


@pytest.mark.parametrize("script, options", [("03_prepare_data.py", ["--force"]), ("03_prepare_data.py", ["--split-seed", 2]),
                                             ("02_embed.py", ["--source", "go_c", "--force"])])
def test_data_that_is_made_again_leaves_runs_valid(own, script, options):
    run_script(script, *options, root=own)
    if "--force" not in options:  # another split and back
        assert "the dataset has changed since" in run_script("05_eval.py", "--controls", 2, root=own).stdout
        run_script(script, root=own)
    assert train_as_before(own).stdout.count("finished already") == 4
    done = run_script("05_eval.py", "--controls", 2, root=own)
    assert "left out" not in done.stdout
    with open(own / "results/demo/metrics.csv", newline="") as file:
        assert {"scgpt", "scgenept_go_c"} <= {row["model"] for row in csv.DictReader(file)}


def test_a_finished_run_without_its_model_is_left_out_of_the_tables_and_trained_again(own):
    lost = own / "runs/demo/scgpt/seed42/model.pt"
    before = weights(own)
    lost.unlink()
    done = run_script("05_eval.py", "--controls", 2, root=own)
    assert f"left out: {lost.parent} has no model.pt" in done.stdout
    with open(own / "results/demo/metrics.csv", newline="") as file:
        runs = {(row["model"], row["seed"]) for row in csv.DictReader(file)}
    assert {("scgpt", "23"), ("scgenept_go_c", "42")} <= runs and ("scgpt", "42") not in runs
    done = train_as_before(own)
    assert "model.pt is missing: trains again" in done.stdout and done.stdout.count("finished already") == 3
    assert are_equal(before, weights(own))


def test_force_with_a_wrong_option_leaves_the_finished_model_as_it_was(root):
    train(root, "--epochs", 1)
    before = weights(root), config_of(root)
    for wrong in (["--batch-size", 4000], ["--lr", 1e25], ["--d-model", 15], ["--embedder", "openai", "--variant", "scgenept_go_c"]):
        train(root, "--epochs", 1, "--force", *wrong, run=error_of)
        assert are_equal(before[0], weights(root)) and config_of(root) == before[1]


def until(condition):
    """Wait until something is so."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("waited for too long")


def test_force_killed_midway_leaves_the_old_model_in_use_and_goes_on_beside_it(training, root):
    train(root, "--epochs", 1)
    before, new = weights(root), root / "runs/demo/scgpt/seed42.new"
    again = ["--epochs", 8, "--lr", 2e-3, "--force"]
    process = train(root, *again, run=start_process)
    until((new / "state.pt").exists)
    process.kill()
    process.communicate()
    assert are_equal(before, weights(root)) and "finished already" in train(root, "--epochs", 1).stdout
    assert [run.path for run in training.find_runs(root, "demo")] == [root / "runs/demo/scgpt/seed42/model.pt"]

    assert "goes on after epoch" in train(root, *again).stdout
    assert len(log_of(root)) == config_of(root)["epochs"] == 8 and config_of(root)["lr"] == 2e-3
    assert [path.name for path in new.parent.iterdir() if not path.name.startswith(".")] == ["seed42"]


@pytest.mark.parametrize("is_gone", [False, True])
def test_force_killed_as_the_new_run_takes_the_place_of_the_old_one_goes_on(root, is_gone):
    train(root, "--epochs", 1, "--lr", 2e-3)
    run = root / "runs/demo/scgpt/seed42"
    expected = weights(root)
    run.rename(root / "new")
    train(root, "--epochs", 1)
    (root / "new").rename(f"{run}.new")
    if is_gone:
        shutil.rmtree(run)
    assert "finished already" in train(root, "--epochs", 1, "--lr", 2e-3).stdout
    assert are_equal(expected, weights(root)) and config_of(root)["lr"] == 2e-3
    assert [path.name for path in run.parent.iterdir() if not path.name.startswith(".")] == ["seed42"]


def test_two_trainings_in_one_folder_at_once_the_second_ends_in_a_line(root):
    process = train(root, "--epochs", 500, "--dropout", 0.5, run=start_process)
    until((root / "runs/demo/scgpt/seed42/state.pt").exists)
    assert "another process trains there" in train(root, "--epochs", 1, run=error_of)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_a_run_killed_between_state_and_model_gets_its_best_model_back(root):
    train(root, "--epochs", 2)
    run = root / "runs/demo/scgpt/seed42"
    best = weights(root)
    assert log_of(root)[1]["val_mse"] < log_of(root)[0]["val_mse"]
    (run / "config.json").write_text(json.dumps(config_of(root) | {"finished": False}))
    (run / "model.pt").unlink()
    train(root, "--epochs", 2)
    assert are_equal(best, weights(root))


# --- what a run says and refuses

def test_targets_in_batch_is_part_of_the_runs_name(root):
    train(root, "--epochs", 1, "--targets-in-batch")
    assert config_of(root, "scgpt,targets-in-batch/seed42")["targets_in_batch"]


def test_attention_dropout_is_off_on_a_cpu_and_an_option_turns_it_on(root):
    options = ("--epochs", 1, "--dropout", 0.1)
    assert "dropout 0.1, of attention 0\n" in train(root, *options).stdout
    assert "dropout 0.1, of attention 0.1\n" in train(root, *options, "--attention-dropout", 0.1, "--force").stdout
    assert model.load(root / "runs/demo/scgpt/seed42/model.pt").config.attention_dropout == 0.1


def test_a_loss_that_is_not_finite_stops_the_run_with_epoch_batch_and_advice(root):
    error = train(root, "--lr", 1e25, run=error_of)
    assert "in epoch 1, batch 2" in error and "lower --lr" in error


def test_printed_commands_carry_root_and_dataset(root, demo):
    there = f"--root {root}"
    assert train(root, "--epochs", 1).stdout.endswith(f"next: python 05_eval.py {there}\n")
    missing = error_of("04_train.py", "--dataset", "mine", root=root)
    assert f"run first: python 03_prepare_data.py --dataset mine {there}" in missing
    (root / "data").unlink()
    shutil.copytree(demo / "data/demo", root / "data/mine", ignore=shutil.ignore_patterns("embeddings"))
    missing = error_of("04_train.py", "--dataset", "mine", "--variant", "scgenept_ncbi", "--no-pretrained", root=root)
    assert f"run first: python 02_embed.py --dataset mine --source ncbi {there}" in missing


@pytest.mark.parametrize("args, message", [
    (["--variant", "scgenept_go_x"], "unknown source"), (["--epochs", "0"], "--epochs: has to be above 0"),
    (["--dropout", "1"], "--dropout"), (["--batch-size", "4000"], "lower --batch-size"), (["--device", "meta"], "--device meta"),
    (["--device", "cuda"], "--device cuda"), (["--dataset", "a/../b"], "--dataset"), (["--name", "a/b"], "--name"),
    (["--n-heads", "3"], "not a multiple"), (["--n-heads", "0"], "--n-heads: has to be above 0"),
    (["--lr", "nan"], "--lr nan: has to be above 0"), (["--lr", "-1"], "--lr -1: has to be above 0"),
    (["--pretrained", "nowhere"], "nor for the demo, whose genes are invented"), (["--seed", "-1"], "invalid seed value: '-1'"),
    (["--d-hid", "1000000000000"], "not enough memory")])
def test_bad_options_are_one_line(root, args, message):
    if torch.cuda.is_available() and "cuda" in args:
        pytest.skip("there is a GPU")
    assert message in train(root, *args, run=error_of)


def test_a_broken_dataset_is_named(own):
    path = own / "data/demo/dataset.h5"
    path.write_bytes(path.read_bytes()[:5000])
    assert "dataset.h5: not an HDF5 file, or a damaged one" in train(own, run=error_of)


def test_a_broken_state_is_named(root):
    train(root, "--epochs", 1)
    run = root / "runs/demo/scgpt/seed42"
    (run / "state.pt").write_bytes((run / "state.pt").read_bytes()[:1000])
    assert "state.pt: cannot be read" in train(root, "--epochs", 2, run=error_of)


# --- this kit's own ways

def test_a_way_of_joining_language_can_stand_behind_a_variants_name(root):
    run_script("04_train.py", "--variant", "scgenept_go_c,align=target-by-text", *SMALL, root=root)
    run = root / "runs/demo/scgenept_go_c,align=target-by-text/seed42"
    assert json.loads((run / "config.json").read_text())["align"] == "target-by-text"
    assert model.load(run / "model.pt").config.target_by_text


def test_residual_is_recorded_and_part_of_the_name(root):
    run_script("04_train.py", "--variant", "scgpt", "--residual", *SMALL, root=root)
    assert model.load(root / "runs/demo/scgpt,residual/seed42/model.pt").config.residual


@pytest.mark.parametrize("options, message", [
    (["--variant", "scgpt-counts", "--residual"], "needs a variant with counts"),
    (["--variant", "genept_go_c", "--align", "target-by-text"], "needs a variant with tokens"),
    (["--variant", "scgenept_go_c,align=nowhere"], "--align is one of layernorm"),
    (["--variant", "scgenept_go_c", "--align", "batchnorm", "--cells-at-once", 4], "in one piece"),
])
def test_what_a_variant_cannot_do_is_one_line(root, options, message):
    done = run_script("04_train.py", *options, root=root, check=False)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1


def test_only_genes_with_a_text_in_a_source_are_told_by_it(training, vectors):
    token_ids, _, has_text = training.language_tables(*vectors, seed=1, shuffled=True)
    data = vectors[0]
    genes = {token: gene for token, gene in zip(data.token_ids, data.genes)}
    assert 0 < has_text.sum() < len(token_ids) and not has_text[token_ids == data.pad_id].any()
    assert len(genes) == len(has_text)
