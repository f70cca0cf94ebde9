"""04_train.py: variants, language vectors, batches, the training loop, pretrained weights, runs, refusals."""
import csv
import json
import shlex
import shutil
from types import SimpleNamespace
from unittest import mock

import h5py
import numpy as np
import pytest
import torch
from scipy import sparse

import model
from cells import write_cells
from conftest import error_of, run_script, start_process, until
from test_model import golden

SMALL = ["--d-model", 16, "--n-layers", 1, "--n-heads", 2, "--d-hid", 16, "--batch-size", 512,
         "--genes-per-batch", 32, "--lr", 1e-3]


@pytest.fixture(scope="module")
def training(stage):
    return stage("04_train")


@pytest.fixture(scope="module")
def demo_data(stage, demo):
    return stage("03_prepare_data").load_dataset(demo / "data/demo/dataset.h5", "")


@pytest.fixture
def root(demo, tmp_path):
    """A root of its own with the demo's data, and no runs."""
    (tmp_path / "data").symlink_to(demo / "data", target_is_directory=True)
    return tmp_path


@pytest.fixture
def own(demo, tmp_path):
    """A copy of the demo's root, data and runs."""
    return shutil.copytree(demo, tmp_path / "own")


def train(root, *args, run=run_script):
    """Train a small scgpt on the demo, unless args say otherwise."""
    return run("04_train.py", *SMALL, "--variant", "scgpt", *args, root=root)


def folder_of(root, run="scgpt/seed42"):
    return root / "runs/demo" / run


def model_of(root, run="scgpt/seed42"):
    return model.load(folder_of(root, run) / "model.pt")


def weights(root, run="scgpt/seed42"):
    return model_of(root, run).state_dict()


def are_equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def config_of(root, run="scgpt/seed42"):
    return json.loads((folder_of(root, run) / "config.json").read_text())


def log_of(root):
    with open(folder_of(root) / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def val_errors(root):
    return [float(row["val_mse"]) for row in log_of(root)]


# --- variants

@pytest.mark.parametrize("name, sources, pretrained, shuffled", [
    ("scgpt", [], True, False),
    ("scgenept_ncbi+go_f-shuffled", ["ncbi", "go_f"], True, True),
    ("scgenept_go_c-scratch", ["go_c"], False, False),
    ("genept_notes", ["notes"], True, False),
    ("genept_go_p-scratch-shuffled", ["go_p"], False, True)])
def test_a_variants_name_gives_its_parts(training, stage, name, sources, pretrained, shuffled):
    variant = training.parse_variant(name, {*stage("01_fetch_annotations").SOURCES, "notes"})
    assert (variant.sources, variant.pretrained, variant.shuffled) == (sources, pretrained, shuffled)


@pytest.mark.parametrize("name, message", [
    ("scgtp", "unknown variant 'scgtp'"),
    ("scgenept_", "unknown variant"),
    ("scgpt-scratch", "unknown variant"),
    ("scgenept_go_x", "unknown source 'go_x'"),
    ("scgpt-shuffled", "no texts to shuffle")])
def test_an_unknown_variant_or_source_is_named(training, stage, name, message):
    with pytest.raises(SystemExit, match=message):
        training.parse_variant(name, stage("01_fetch_annotations").SOURCES)


GO = ["go_f", "go_c", "go_p", "go_all"]
ONE = {source: [source] for source in ["ncbi", "ncbi+uniprot", *GO]}
TWO = {f"ncbi+uniprot+{go}": ["ncbi+uniprot", go] for go in GO}
WITHOUT_TEXTS = dict.fromkeys(["scgpt", "scgpt-counts", "scgpt-tokens"], [])
WITH_TEXTS = {f"scgenept_{name}": sources for name, sources in (ONE | TWO).items()}
WITH_TEXTS |= {f"genept_{name}": sources for name, sources in ONE.items()}
WITH_TEXTS |= {f"genept_{name}-scratch": sources for name, sources in ONE.items()}
SHUFFLED = {f"{name}-shuffled": sources for name, sources in WITH_TEXTS.items()}


def test_every_variant_of_the_paper_and_its_shuffled_control_trains(root):
    every = WITHOUT_TEXTS | WITH_TEXTS | SHUFFLED
    assert len(every) == 47
    train(root, "--variant", *every, "--epochs", 1, "--batch-size", 2000, "--genes-per-batch", 16)
    for name, sources in every.items():
        config = model_of(root, f"{name}/seed42").config
        is_genept = name.startswith("genept")
        assert config.has_tokens == (not is_genept and name != "scgpt-tokens")
        assert config.has_counts == (not is_genept and name != "scgpt-counts")
        assert list(config.languages) == sources


CONCAT, AVG, OF_LSA = ("published", "concat"), ("published", "avg"), ("lsa", "concat")
THREE = [AVG, CONCAT, OF_LSA]


def choose(training, found, embedder=None, mode=None):
    variant = SimpleNamespace(name="v", sources=["go_c"])
    files = {"go_c": {embedding: embedding for embedding in found}}
    args = SimpleNamespace(embedder=embedder, mode=mode)
    vectors, labels = training.choose_embeddings(variant, files, args)
    return vectors["go_c"], labels


def test_vectors_are_the_only_ones_or_published_concat_or_chosen(training):
    assert choose(training, [("lsa", "avg")]) == (("lsa", "avg"), [])
    assert choose(training, THREE) == (CONCAT, [])
    assert choose(training, THREE, embedder="lsa") == (OF_LSA, ["embedder=lsa"])
    assert choose(training, THREE, mode="avg") == (AVG, ["mode=avg"])


@pytest.mark.parametrize("found, embedder, mode, message", [
    ([("a", "concat"), ("b", "concat")], None, None, "choose with --embedder: a, b"),
    (THREE, "openai", None, "no vectors with embedder openai"),
    (THREE, "lsa", "avg", "no vectors with mode avg")])
def test_vectors_that_are_not_there_or_have_no_default_are_refused(training, found, embedder, mode, message):
    with pytest.raises(SystemExit, match=message):
        choose(training, found, embedder, mode)


# --- language vectors

@pytest.fixture
def vectors(tmp_path):
    """Genes A to D of a dataset (C outside the vocabulary), and vectors of D, A, C and a gene elsewhere."""
    path = tmp_path / "s.lsa.concat.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("genes", data=["D", "X", "A", "C"], dtype=h5py.string_dtype())
        file["vectors"] = np.array([[1, 2], [3, 5], [8, 13], [21, 34]], dtype=np.float32)
    genes = np.array(["A", "B", "C", "D"], dtype=object)
    data = SimpleNamespace(genes=genes, token_ids=np.array([5, 3, 117, 4]), pad_id=117, n_tokens=120)
    return data, {"s": path}


def test_genes_get_their_vectors_and_a_random_one_without_a_text_or_a_token(training, vectors):
    token_ids, tables, has_text = training.language_tables(*vectors, seed=1, shuffled=False)
    assert token_ids.tolist() == [3, 4, 5, 117]  # B, D, A and <pad> for C
    assert has_text.tolist() == [False, True, True, False]
    table = tables["s"]
    assert table.dtype == np.float32
    assert table[1:3].tolist() == [[1, 2], [8, 13]]
    drawn = np.abs(table[[0, 3]])
    assert drawn.max() <= 0.1 and drawn.min() > 0


def test_shuffling_permutes_the_vectors_among_the_genes_that_have_one(training, vectors):
    firsts = set()
    for seed in range(20):
        _, tables, has_text = training.language_tables(*vectors, seed=seed, shuffled=True)
        table = tables["s"]
        assert sorted(table[1:3].tolist()) == [[1, 2], [8, 13]]
        assert np.abs(table[[0, 3]]).max() <= 0.1
        assert has_text.tolist() == [False, True, True, False]
        firsts.add(table[1, 0])
    assert firsts == {1, 8}


# --- batches

@pytest.fixture
def cells():
    """40 cells of four conditions x 30 genes; the targets of pairs, singles and control."""
    return SimpleNamespace(genes=np.arange(30), cell_condition=np.repeat([0, 1, 2, 3], 10),
                           ctrl_cells=np.arange(10), targets=np.array([[-1, -1], [3, -1], [7, -1], [3, 21]]),
                           X=sparse.random(40, 30, 0.3, "csr", random_state=0, dtype=np.float32))


def test_a_perturbed_cell_is_paired_with_a_control_cell_and_a_control_cell_with_itself(training, cells):
    pairs = training.pair_cells(cells, seed=1)
    assert pairs[:10].tolist() == list(range(10))
    assert set(pairs) <= set(cells.ctrl_cells)
    assert len(set(pairs[10:])) > 5
    assert np.array_equal(pairs, training.pair_cells(cells, seed=1))
    assert not np.array_equal(pairs, training.pair_cells(cells, seed=2))


def test_a_batch_draws_its_genes_once_without_repetition_and_every_gene_alike(training, cells):
    drawn = []
    for seed in range(200):
        for _, genes in training.batches(cells, np.arange(40), 16, 10, np.random.default_rng(seed)):
            assert len(genes) == len(set(genes)) == 10
            drawn.append(genes)
    assert len(drawn) == 600
    counts = np.bincount(np.concatenate(drawn), minlength=30)
    assert 150 < counts.min() <= counts.max() < 250  # 200 expected, five standard deviations are 58


def test_batches_go_once_through_the_cells_and_take_all_genes_where_they_fit(training, cells):
    batches = list(training.batches(cells, np.arange(40)[::-1], 16, 1536, np.random.default_rng(0)))
    assert [len(batch) for batch, _ in batches] == [16, 16, 8]
    assert np.concatenate([batch for batch, _ in batches]).tolist() == list(range(40))[::-1]
    for _, genes in batches:
        assert genes.tolist() == list(range(30))


def test_targets_in_batch_puts_the_targets_of_its_cells_among_the_genes(training, cells):
    for seed in range(20):
        rng = np.random.default_rng(seed)
        for batch, genes in training.batches(cells, rng.permutation(40), 4, 10, rng, with_targets=True):
            targets = set(cells.targets[cells.cell_condition[batch]].ravel()) - {-1}
            assert targets <= set(genes)
            assert len(set(genes)) == 10


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
    names = [f"G{i}+ctrl" for i in range(len(split))]
    return SimpleNamespace(split=np.array(split), conditions=np.array(names, dtype=object),
                           cell_condition=np.repeat(np.arange(len(split)), 2))


def test_without_validation_conditions_a_tenth_of_the_training_conditions_validates(training, capsys):
    train_cells, val_cells = training.split_cells(splits(["ctrl", "test"] + ["train"] * 30))
    of_ctrl, of_test = {0, 1}, {2, 3}
    assert len(train_cells) == 2 + 2 * 27
    assert len(val_cells) == 2 * 3
    assert {*train_cells, *val_cells} == set(range(64)) - of_test
    assert of_ctrl <= set(train_cells)
    assert "no validation conditions" in capsys.readouterr().out


def test_an_only_condition_both_trains_and_validates(training, capsys):
    train_cells, val_cells = training.split_cells(splits(["ctrl", "train"]))
    assert train_cells.tolist() == [0, 1, 2, 3]
    assert val_cells.tolist() == [2, 3]
    assert "the only condition" in capsys.readouterr().out


def test_an_only_condition_trains(tmp_path):
    X = np.random.default_rng(0).random((60, 8), dtype=np.float32)
    path = write_cells(tmp_path, X, ["ctrl"] * 40 + ["G3+ctrl"] * 20, [f"G{i}" for i in range(8)])
    of_cells = ("--h5ad", path, "--vocab", "none", "--split", "none")
    run_script("03_prepare_data.py", "--dataset", "one", *of_cells, root=tmp_path)
    train(tmp_path, "--dataset", "one", "--no-pretrained", "--epochs", 1, "--batch-size", 16)
    assert (tmp_path / "runs/one/scgpt/seed42/model.pt").exists()


# --- the loop

def plain_epoch(net, optimizer, data, pairs, epoch):
    """An epoch written with PyTorch alone: its mean loss."""
    X = torch.from_numpy(data.X[np.arange(len(data.cell_condition))].toarray())
    rng = np.random.default_rng([7, 1, epoch])
    split = data.split[data.cell_condition]
    order = rng.permutation(np.flatnonzero((split == "train") | (split == "ctrl")))
    losses = []
    for start in range(0, len(order) - 99, 100):  # the last, partial batch is left out
        cells = order[start:start + 100]
        genes = rng.permutation(128)[:40]
        flags = np.zeros((100, 40), bool)
        for i, cell in enumerate(cells):
            flags[i] = np.isin(genes, data.targets[data.cell_condition[cell]])
        token_ids = torch.from_numpy(data.token_ids[genes]).long()
        predicted = net(token_ids, X[pairs[cells]][:, genes], torch.from_numpy(flags))
        error = predicted - X[cells][:, genes]
        loss = (error[:, data.measured[genes]] ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return np.mean(losses)


def test_training_is_a_plain_loop_of_adam_on_the_mean_squared_error_of_measured_genes(
        training, demo_data, tmp_path):
    data = SimpleNamespace(**vars(demo_data))
    data.measured = ~np.isin(np.arange(128), [3, 50, 99])
    settings = {
        "epochs": 2, "batch_size": 100, "lr": 2e-3, "genes_per_batch": 40, "dropout": 0.0,
        "attention_dropout": 0.0, "targets_in_batch": False, "align": "layernorm", "residual": False,
        "cells_at_once": 100, "seed": 7, "d_model": 16, "n_heads": 2, "d_hid": 16, "n_layers": 1}
    variant = training.parse_variant("scgpt", [])
    plan = SimpleNamespace(variant=variant, settings=settings, vectors={}, pretrained=None)
    machine = training.set_up_machine(SimpleNamespace(device="cpu", batch_size=100, align="layernorm"))
    trained = training.build_model(plan, data, 7)
    log = training.train(tmp_path, trained, data, settings, machine).log

    net = training.build_model(plan, data, 7)
    pairs = training.pair_cells(data, 7)
    optimizer = torch.optim.Adam(net.parameters())
    for epoch, line in enumerate(log, 1):
        lr = 2e-3 * 0.9 ** (epoch - 1)
        optimizer.param_groups[0]["lr"] = lr
        assert line["lr"] == pytest.approx(lr)
        assert line["train_mse"] == pytest.approx(plain_epoch(net, optimizer, data, pairs, epoch), rel=1e-5)
    assert len(log) == 2
    for key, plain in net.state_dict().items():
        if not key.endswith("in_proj_bias"):  # the keys' bias changes no attention: its gradient is rounding
            assert (trained.state_dict()[key] - plain).norm() < 1e-3 * plain.norm(), key


def test_the_validation_error_is_that_of_the_best_weights_on_the_validation_cells(training, demo_data, root):
    train(root, "--epochs", 2, "--genes-per-batch", 128)
    config, errors = config_of(root), val_errors(root)
    assert config["best_val_mse"] == min(errors) == errors[config["best_epoch"] - 1]

    net, pairs, squared = model_of(root), training.pair_cells(demo_data, 42), []
    for condition in np.flatnonzero(demo_data.split == "val"):
        cells = np.flatnonzero(demo_data.cell_condition == condition)
        targets = demo_data.targets[condition]
        control, measured = demo_data.X[pairs[cells]].toarray(), demo_data.X[cells].toarray()
        predicted = model.predict(net, demo_data.token_ids, control, targets[targets >= 0])
        squared.append((predicted - measured) ** 2)
    assert np.concatenate(squared).mean() == pytest.approx(config["best_val_mse"], rel=1e-5)


def test_training_stops_when_validation_gets_no_better_and_is_finished_then(training, root):
    with mock.patch.object(training, "PATIENCE", 2):
        done = train(root, "--epochs", 40, "--lr", 0.3)
    errors = val_errors(root)
    best = 1 + int(np.argmin(errors))
    assert len(errors) == best + 2 < 40
    assert f"best epoch {best}" in done.stdout
    assert "finished already" in train(root, "--epochs", 80, "--lr", 0.3).stdout


def test_the_same_command_gives_the_same_weights_and_another_seed_others(root):
    train(root, "--epochs", 1, "--seed", 1, 2)
    first, other = weights(root, "scgpt/seed1"), weights(root, "scgpt/seed2")
    train(root, "--epochs", 1, "--seed", 1, "--force")
    assert are_equal(first, weights(root, "scgpt/seed1"))
    assert not torch.equal(first["decoder.fc.0.weight"], other["decoder.fc.0.weight"])


# --- ways of joining language

WAYS = {  # way: the parts that its model has, of those that models differ in
    "layernorm": {"ln"}, "linear": set(), "normalized": set(), "batchnorm": {"bn"}, "dropout0": {"ln"},
    "weights": {"ln", "modality_weights"}, "two-encoders": {"ln", "language_transformer"},
    "target-by-text": {"ln", "has_text"}}


def test_every_way_of_joining_language_trains_behind_a_variants_name(root):
    variants = [f"scgenept_go_c,align={way}" for way in WAYS]
    train(root, "--variant", *variants, "--epochs", 1, "--dropout", 0.1)
    for way, parts in WAYS.items():
        run = "scgenept_go_c" if way == "layernorm" else f"scgenept_go_c,align={way}"
        net = model_of(root, f"{run}/seed42")
        modules = {key.split(".")[0] for key in net.state_dict()}
        assert modules & set.union(*WAYS.values()) == parts
        assert net.config.normalize_language == (way == "normalized")
        assert net.config.dropout == (0 if way == "dropout0" else 0.1)
        assert config_of(root, f"{run}/seed42")["align"] == way


def test_align_names_the_runs_with_language_alone(root):
    train(root, "--variant", "scgpt", "scgenept_go_c", "--align", "linear", "--epochs", 1)
    names = {path.name for path in (root / "runs/demo").iterdir()}
    assert names == {"scgpt", "scgenept_go_c,align=linear"}


def write_pretrained(folder):
    """scGPT's weights and settings, as small as the golden file."""
    _, state = golden("scgenept_ncbi_flash_layout")
    state = {key: value for key, value in state.items() if not key.startswith("genept")}
    torch.save(state | {"flag_encoder.weight": torch.ones(2, 32)}, folder / "best_model.pt")
    settings = {"embsize": 32, "nlayers": 3, "nheads": 4, "d_hid": 48, "dropout": 0.2}
    (folder / "args.json").write_text(json.dumps(settings))


def test_the_projection_starts_at_least_squares_to_the_pretrained_tokens(training, vectors, tmp_path):
    data, files = vectors
    write_pretrained(tmp_path)
    settings = {"dropout": 0, "attention_dropout": 0, "residual": False, "align": "projection",
                "d_model": 32, "n_layers": 3, "n_heads": 4, "d_hid": 48}
    variant = training.parse_variant("scgenept_s", ["s"])
    plan = SimpleNamespace(variant=variant, settings=settings, vectors=files,
                           pretrained=tmp_path / "best_model.pt")
    net = training.build_model(plan, data, 1)

    token_ids, tables, _ = training.language_tables(data, files, 1, shuffled=False)
    pretrained = torch.load(tmp_path / "best_model.pt", weights_only=True)
    tokens = torch.nn.functional.layer_norm(
        pretrained["encoder.embedding.weight"][token_ids], (32,),
        pretrained["encoder.enc_norm.weight"], pretrained["encoder.enc_norm.bias"])
    with_one = np.column_stack([tables["s"], np.ones(4)])
    expected = np.linalg.lstsq(with_one, tokens.numpy(), rcond=None)[0]
    projection = net.language_encoders["s"].proj
    np.testing.assert_allclose(projection.weight.detach().T, expected[:-1], atol=1e-4)
    np.testing.assert_allclose(projection.bias.detach(), expected[-1], atol=1e-4)


# --- pretrained weights

@pytest.fixture
def pretrained(demo, tmp_path):
    """A folder as scGPT's, whose vocabulary has half of the demo's genes, and the demo's cells numbered by
    it as the dataset `mine`."""
    folder = tmp_path / "scgpt"
    folder.mkdir()
    write_pretrained(folder)
    genes = [f"DEMO{i:03d}" for i in range(1, 129, 2)]
    tokens = [*genes, *(f"OTHER{i}" for i in range(53)), "<pad>", "<cls>", "<eoc>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    prepare_cells(demo, tmp_path, folder / "vocab.json")
    return folder


def prepare_cells(demo, root, vocab):
    """The demo's cells as a user's own."""
    of_cells = ("--h5ad", demo / "data/demo/cells.h5ad", "--normalize", "--vocab", vocab)
    run_script("03_prepare_data.py", "--dataset", "mine", *of_cells, root=root)


def test_fine_tuning_starts_from_the_pretrained_parts_and_says_so(pretrained, tmp_path):
    options = ("--pretrained", pretrained, "--batch-size", 512, "--genes-per-batch", 16, "--lr", 1e-9)
    done = run_script("04_train.py", "--dataset", "mine", "--variant", "scgpt", "--epochs", 1, *options,
                      root=tmp_path)
    assert "of encoder, transformer_encoder, value_encoder" in done.stdout
    assert "cls_decoder, decoder, flag_encoder, ln, pert_encoder" in done.stdout
    state = torch.load(pretrained / "best_model.pt", weights_only=True)
    trained = model.load(tmp_path / "runs/mine/scgpt/seed42/model.pt").state_dict()
    taken = [key for key in trained if key.startswith(("encoder.", "value_encoder.", "transformer_encoder."))]
    assert len(taken) == 3 + 6 + 3 * 12  # tensors of tokens, values, and each of three layers
    for key in taken:
        torch.testing.assert_close(trained[key], state[key.replace("in_proj_", "Wqkv.")], atol=1e-6, rtol=0)


@pytest.mark.parametrize("file, content, message", [
    ("best_model.pt", "<html>", "best_model.pt: expected weights"),
    ("best_model.pt", None, "best_model.pt: No such file"),
    ("args.json", "{}", "args.json: not scGPT's settings"),
    ("vocab.json", '{"<pad>": 0}', "made with another vocabulary")])
def test_a_pretrained_folder_that_does_not_fit_is_an_error(pretrained, tmp_path, file, content, message):
    (pretrained / file).unlink()
    if content:
        (pretrained / file).write_text(content)
    options = ("--dataset", "mine", "--variant", "scgpt", "--pretrained", pretrained, "--epochs", 1)
    assert message in error_of("04_train.py", *options, root=tmp_path)


def test_data_with_a_vocabulary_of_its_own_needs_no_pretrained(demo, tmp_path):
    prepare_cells(demo, tmp_path, "none")
    error = error_of("04_train.py", "--dataset", "mine", "--variant", "scgpt", root=tmp_path)
    assert "--no-pretrained" in error


# --- runs that are there already

def files_of(root):
    return {path: path.read_bytes() for path in (root / "runs").rglob("*") if path.is_file()}


def test_a_finished_run_is_left_as_it_is(root):
    train(root, "--epochs", 2)
    before = files_of(root)
    for n_epochs in (2, 1):
        assert "finished already with --epochs 2" in train(root, "--epochs", n_epochs).stdout
        assert files_of(root) == before


def test_more_epochs_go_on_to_the_weights_of_as_many_at_once(root):
    def results():
        last = torch.load(folder_of(root) / "state.pt", weights_only=True)["net"]
        return weights(root), last

    train(root, "--epochs", 2)
    assert "goes on after epoch 2" in train(root, "--epochs", 3).stdout
    best, last = results()
    assert {"epochs": 3, "finished": True}.items() <= config_of(root).items()
    train(root, "--epochs", 3, "--force")
    best_at_once, last_at_once = results()
    assert are_equal(best, best_at_once)
    assert are_equal(last, last_at_once)


def test_other_settings_in_the_same_folder_are_an_error_that_names_them_and_name_keeps_both(root):
    train(root, "--epochs", 1)
    before = weights(root)
    error = train(root, "--epochs", 1, "--lr", 0.5, run=error_of)
    assert "lr was 0.001, now 0.5" in error
    assert "--name" in error and "--force" in error
    train(root, "--epochs", 1, "--lr", 0.5, "--name", "fast")
    assert config_of(root, "scgpt,name=fast/seed42")["lr"] == 0.5
    assert config_of(root)["lr"] == 0.001
    assert are_equal(before, weights(root))


def test_weights_without_their_settings_are_not_thrown_away(root):
    train(root, "--epochs", 1)
    before = weights(root)
    (folder_of(root) / "config.json").unlink()
    assert "its config.json is missing" in train(root, "--epochs", 1, run=error_of)
    assert are_equal(before, weights(root))


def test_a_run_without_a_whole_epoch_is_replaced_by_other_settings(root):
    train(root, "--epochs", 1, "--lr", 1e25, run=error_of)
    train(root, "--epochs", 1, "--lr", 1e-3)
    assert {"finished": True, "lr": 1e-3}.items() <= config_of(root).items()


def test_config_json_says_what_was_trained_and_how(root):
    train(root, "--epochs", 1, "--dropout", 0.1)
    expected = {"epochs": 1, "batch_size": 512, "dropout": 0.1, "d_model": 16, "device": "cpu",
                "precision": "float32", "n_processes": 1, "variant": "scgpt", "seed": 42, "finished": True,
                "best_epoch": 1}
    assert expected.items() <= config_of(root).items()


def train_as_before(root):
    """The command that trained the runs of conftest's demo, in a copy of its root."""
    words = shlex.split(config_of(root)["command"])[1:]
    return run_script("04_train.py", *words[:words.index("--root")], root=root).stdout


def runs_in_use(training, root):
    return [f"{run.name}/seed{run.seed}" for run in training.find_runs(root, "demo")]


DEMO_RUNS = ["scgpt/seed23", "scgpt/seed42", "scgenept_go_c/seed23", "scgenept_go_c/seed42"]


@pytest.mark.parametrize("script, options", [
    ("03_prepare_data.py", ["--force"]), ("02_embed.py", ["--source", "go_c", "--force"])])
def test_data_that_is_made_again_leaves_runs_valid(training, own, script, options):
    run_script(script, *options, root=own)
    assert sorted(runs_in_use(training, own)) == sorted(DEMO_RUNS)
    assert train_as_before(own).count("finished already") == 4


def test_runs_on_another_split_are_left_out_until_it_is_back(training, own, capsys):
    run_script("03_prepare_data.py", "--split-seed", 2, root=own)
    assert runs_in_use(training, own) == []
    assert capsys.readouterr().out.count("the dataset has changed since") == 4
    run_script("03_prepare_data.py", root=own)
    assert sorted(runs_in_use(training, own)) == sorted(DEMO_RUNS)


def test_a_run_of_an_older_version_of_the_kit_is_left_out(training, root, capsys):
    train(root, "--epochs", 1)
    config = config_of(root)
    del config["inputs"]
    (folder_of(root) / "config.json").write_text(json.dumps(config))
    assert runs_in_use(training, root) == []
    assert f"left out: {folder_of(root)}: the dataset has changed since" in capsys.readouterr().out


def test_a_finished_run_without_its_model_is_left_out_and_trained_again(training, root, capsys):
    train(root, "--epochs", 1)
    before = weights(root)
    (folder_of(root) / "model.pt").unlink()
    assert runs_in_use(training, root) == []
    assert f"left out: {folder_of(root)} has no model.pt" in capsys.readouterr().out
    assert "model.pt is missing: trains again" in train(root, "--epochs", 1).stdout
    assert are_equal(before, weights(root))


def test_a_run_killed_between_state_and_model_gets_its_best_model_back(root):
    train(root, "--epochs", 2)
    best, (first_error, second_error) = weights(root), val_errors(root)
    assert second_error < first_error
    (folder_of(root) / "config.json").write_text(json.dumps(config_of(root) | {"finished": False}))
    (folder_of(root) / "model.pt").unlink()
    train(root, "--epochs", 2)
    assert are_equal(best, weights(root))


def test_a_broken_state_is_named(root):
    train(root, "--epochs", 1)
    state = folder_of(root) / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    assert "state.pt: cannot be read" in train(root, "--epochs", 2, run=error_of)


# --- --force, and two trainings at once

@pytest.mark.parametrize("wrong", [
    ["--batch-size", 4000], ["--lr", 1e25], ["--d-model", 15],
    ["--embedder", "openai", "--variant", "scgenept_go_c"]])
def test_force_with_a_wrong_option_leaves_the_finished_model_as_it_was(own, wrong):
    before = files_of(own)
    train(own, "--epochs", 1, "--force", *wrong, run=error_of)
    after = files_of(own)
    assert {path: after[path] for path in before} == before


def folders_of(root):
    return [path.name for path in folder_of(root).parent.iterdir() if path.is_dir()]


def test_force_trains_beside_the_old_run_which_stays_in_use_and_goes_on_when_killed(training, root):
    train(root, "--epochs", 1)
    before = weights(root)
    again = ["--epochs", 8, "--lr", 2e-3, "--force"]
    process = train(root, *again, run=start_process)
    until((folder_of(root, "scgpt/seed42.new") / "state.pt").exists)
    assert "another process trains there" in train(root, "--epochs", 1, run=error_of)
    assert process.poll() is None
    process.kill()
    process.communicate()
    assert are_equal(before, weights(root))
    assert runs_in_use(training, root) == ["scgpt/seed42"]
    assert "finished already" in train(root, "--epochs", 1).stdout

    assert "goes on after epoch" in train(root, *again).stdout
    assert len(log_of(root)) == config_of(root)["epochs"] == 8
    assert config_of(root)["lr"] == 2e-3
    assert folders_of(root) == ["seed42"]


@pytest.mark.parametrize("is_gone", [False, True])
def test_force_killed_as_the_new_run_takes_the_place_of_the_old_one_goes_on(root, is_gone):
    train(root, "--epochs", 1, "--lr", 2e-3)
    expected = weights(root)
    folder_of(root).rename(root / "new")
    if not is_gone:
        train(root, "--epochs", 1)
    (root / "new").rename(folder_of(root, "scgpt/seed42.new"))
    assert "finished already" in train(root, "--epochs", 1, "--lr", 2e-3).stdout
    assert are_equal(expected, weights(root))
    assert folders_of(root) == ["seed42"]


# --- what a run says and refuses

def test_residual_and_targets_in_batch_are_recorded_and_part_of_the_name(root):
    train(root, "--epochs", 1, "--residual", "--targets-in-batch")
    run = "scgpt,residual,targets-in-batch/seed42"
    assert model_of(root, run).config.residual
    assert config_of(root, run)["targets_in_batch"]


def test_attention_dropout_is_off_on_a_cpu_and_an_option_turns_it_on(root):
    options = ("--epochs", 1, "--dropout", 0.1)
    assert "dropout 0.1, of attention 0\n" in train(root, *options).stdout
    done = train(root, *options, "--attention-dropout", 0.1, "--force")
    assert "dropout 0.1, of attention 0.1\n" in done.stdout
    assert model_of(root).config.attention_dropout == 0.1


def test_a_loss_that_is_not_finite_stops_the_run_with_epoch_batch_and_advice(root):
    error = train(root, "--lr", 1e25, run=error_of)
    assert "in epoch 1, batch 2" in error and "lower --lr" in error


def test_printed_commands_carry_root_and_dataset(root, demo):
    options = f"--root {root}"
    assert train(root, "--epochs", 1).stdout.endswith(f"next: python 05_eval.py {options}\n")

    missing = train(root, "--dataset", "mine", "--no-pretrained", run=error_of)
    assert f"run first: python 03_prepare_data.py --dataset mine {options}" in missing

    (root / "data").unlink()
    (root / "data/mine").mkdir(parents=True)
    shutil.copy(demo / "data/demo/dataset.h5", root / "data/mine")
    missing = train(root, "--dataset", "mine", "--no-pretrained", "--variant", "scgenept_ncbi", run=error_of)
    assert f"run first: python 02_embed.py --dataset mine --source ncbi {options}" in missing


@pytest.mark.parametrize("options, message", [
    (["--epochs", "0"], "--epochs: has to be above 0"),
    (["--dropout", "1"], "--dropout"),
    (["--lr", "nan"], "--lr nan: has to be above 0"),
    (["--lr", "-1"], "--lr -1: has to be above 0"),
    (["--seed", "-1"], "invalid seed value: '-1'"),
    (["--name", "a/b"], "--name"),
    (["--dataset", "a/../b"], "--dataset"),
    (["--device", "meta"], "--device meta"),
    (["--device", "cuda:99"], "--device cuda:99"),
    (["--batch-size", "4000"], "lower --batch-size"),
    (["--n-heads", "3"], "not a multiple"),
    (["--d-hid", "1000000000000"], "not enough memory"),
    (["--pretrained", "nowhere"], "nor for the demo, whose genes are invented"),
    (["--variant", "scgpt-counts", "--residual"], "needs a variant with counts"),
    (["--variant", "genept_go_c", "--align", "target-by-text"], "needs a variant with tokens"),
    (["--variant", "scgenept_go_c", "--align", "projection"], "needs pretrained token vectors"),
    (["--variant", "scgenept_go_c,align=nowhere"], "--align is one of layernorm"),
    (["--variant", "scgenept_go_c", "--align", "batchnorm", "--cells-at-once", "4"], "in one piece")])
def test_bad_options_are_one_line(root, options, message):
    assert message in train(root, *options, run=error_of)


def test_a_broken_dataset_is_named(own):
    path = own / "data/demo/dataset.h5"
    path.write_bytes(path.read_bytes()[:5000])
    assert "dataset.h5: not an HDF5 file, or a damaged one" in train(own, run=error_of)
