"""model.py: equal to the released implementation and to PyTorch's layers; loaders that miss nothing."""
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import model
from conftest import GOLDEN, KIT

RELEASED = ["scgpt", "scgenept_go_c", "scgenept_ncbi_flash_layout"]


def golden(name):
    """Arrays of a golden file, and its weights as the state dict that the released code saves."""
    arrays = np.load(GOLDEN / f"{name}.npz")
    keys = [key for key in arrays.files if key.startswith("state/")]
    return arrays, {key.removeprefix("state/"): torch.from_numpy(arrays[key]) for key in keys}


def released(name, folder):
    arrays, state = golden(name)
    torch.save(state, folder / "released.pt")
    return arrays, model.load_released(folder / "released.pt", n_heads=int(arrays["n_heads"]))


def inputs(arrays):
    return [torch.from_numpy(arrays[name]) for name in ("gene_ids", "expression", "perturbed")]


def without_dropout(net):
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(module, model.SelfAttention):
            module.dropout = 0.0
    return net


def small(**options):
    """A small model; with a language source where options say how many rows it has."""
    sizes = {"n_tokens": 30, "pad_id": 27, "d_model": 16, "n_heads": 2, "d_hid": 24, "n_layers": 2}
    language = {"languages": {"s": 5}} if "n_language_rows" in options else {}
    return model.ScGenePT(model.Config(**sizes | language | options))


# --- numbers

@pytest.mark.parametrize("name", RELEASED)
def test_output_is_that_of_the_released_implementation(name, tmp_path):
    arrays, net = released(name, tmp_path)
    with torch.no_grad():
        output = net(*inputs(arrays)).numpy()
    tolerance = 1e-5 * np.abs(arrays["output"]).max()
    np.testing.assert_allclose(output, arrays["output"], atol=tolerance, rtol=1e-5)


@pytest.mark.parametrize("name", RELEASED)
def test_loss_and_gradients_are_those_of_the_released_implementation(name, tmp_path):
    arrays, net = released(name, tmp_path)
    without_dropout(net).train()
    loss = ((net(*inputs(arrays)) - torch.from_numpy(arrays["target"])) ** 2).mean()
    loss.backward()
    assert loss.item() == pytest.approx(float(arrays["loss"]), rel=1e-6)
    norms = {key: float(arrays[key]) for key in arrays.files if key.startswith("gradnorm/")}
    for key, parameter in net.named_parameters():
        if key.startswith("language_encoders."):  # the two released classes name the projection differently
            projection = ".fc." if "gopt" in key else ".proj_layer."
            key = key.removeprefix("language_encoders.").replace(".proj.", projection)
        assert parameter.grad.norm().item() == pytest.approx(norms.pop(f"gradnorm/{key}"), rel=1e-4), key
    assert not norms


@pytest.mark.parametrize("training", [False, True])
def test_an_encoder_layer_computes_what_pytorchs_layer_does(training):
    torch.manual_seed(0)
    theirs = torch.nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True).train(training)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = model.Config(d_model=16, n_heads=2, d_hid=24, dropout=0.0, attention_dropout=0.0)
    ours = model.EncoderLayer(config).train(training)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 50, 16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_attention_dropout_drops_with_its_probability_and_only_in_training():
    torch.manual_seed(0)
    attention = model.SelfAttention(model.Config(d_model=16, n_heads=2, attention_dropout=0.5))
    with torch.no_grad():  # all values are 1, and so the output is the sum of the attention that is kept
        attention.in_proj_weight.zero_()
        attention.in_proj_bias.copy_(torch.cat([torch.zeros(32), torch.ones(16)]))
        attention.out_proj.weight.copy_(torch.eye(16))
    x = torch.randn(8, 200, 16)
    kept = attention.train()(x)
    assert kept.mean().item() == pytest.approx(1, abs=0.02)
    assert 0.03 < kept.std().item() < 0.12  # 1 / sqrt(200) = 0.07
    torch.testing.assert_close(attention.eval()(x), torch.ones(8, 200, 16))


def test_a_gene_outside_the_language_table_is_an_error_not_another_genes_vector():
    net = small(n_language_rows=3)
    net.set_language([4, 7, 9], {"s": np.ones((3, 5), np.float32)})
    model.predict(net, [4, 9, 7], np.zeros((1, 3)), 0)
    with pytest.raises(ValueError, match="no language vector for 1 genes, the first 5"):
        model.predict(net, [4, 5], np.zeros((1, 2)), 0)
    with pytest.raises(IndexError):
        net(torch.tensor([4, 5]), torch.zeros(1, 2), torch.zeros(1, 2))


def test_language_rows_compute_what_a_table_of_the_whole_vocabulary_does():
    torch.manual_seed(1)
    compact, whole = small(n_language_rows=4).eval(), small(n_language_rows=30).eval()
    token_ids, vectors, table = [27, 3, 12, 8], torch.randn(4, 5), torch.randn(30, 5)
    table[token_ids] = vectors
    compact.set_language(token_ids, {"s": vectors})
    of_whole = {"language_rows": torch.arange(30), "language_encoders.s.embedding.weight": table}
    whole.load_state_dict(compact.state_dict() | of_whole)
    x = torch.tensor([3, 8, 27, 12]), torch.rand(2, 4), torch.eye(2, 4)
    torch.testing.assert_close(compact(*x), whole(*x))


def test_the_vectors_of_pad_get_no_gradient():
    net = small(n_language_rows=2)
    net.set_language([27, 3], {"s": torch.randn(2, 5)})
    net(torch.tensor([27, 3]), torch.rand(2, 2), torch.zeros(2, 2)).sum().backward()
    tokens = net.encoder.embedding.weight.grad
    assert tokens[27].norm() == 0 < tokens[3].norm()
    pad, gene = net.language_encoders["s"].embedding.weight.grad
    assert pad.norm() == 0 < gene.norm()


@pytest.mark.parametrize("options", [
    {}, {"layer_norm": False}, {"layer_norm": False, "normalize_language": True},
    {"layer_norm": False, "batch_norm": True}, {"modality_weights": True}, {"two_encoders": True},
    {"target_by_text": True}])
@torch.no_grad()
def test_every_way_of_joining_language_is_its_formula(options):
    torch.manual_seed(3)
    net = small(n_language_rows=4, **options).eval()
    net.set_language([27, 3, 12, 8], {"s": torch.randn(4, 5)}, with_text=[3, 8])
    gene_ids, expression = torch.tensor([3, 8, 27, 12]), torch.rand(2, 4)
    perturbed = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1]])

    encoder = net.language_encoders["s"]
    vectors = encoder.embedding.weight[[1, 3, 0, 2]]  # in the order of gene_ids
    if "normalize_language" in options:
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
    flags = net.pert_encoder.weight[perturbed]
    values = net.value_encoder(expression)
    tokens = net.encoder(gene_ids).repeat(2, 1, 1)
    language = encoder.enc_norm(encoder.proj(vectors))
    if "target_by_text" in options:
        tokens[0, 0] = tokens[1, 1] = 0  # 12 is perturbed too, but has no text
    if "modality_weights" in options:
        factors = net.modality_weights.copy_(torch.rand(4))
        flags, values, tokens, language = map(torch.mul, factors, (flags, values, tokens, language))
    if "batch_norm" in options:
        net.bn.running_mean.fill_(0.3)

    def normalized(x):
        if "batch_norm" in options:
            return (x - 0.3) / (1 + 1e-5) ** 0.5
        return x if "layer_norm" in options else net.ln(x)

    if "two_encoders" in options:
        h = net.transformer_encoder(normalized(flags + values + tokens))
        h = h + net.language_transformer(normalized(flags + language))
    else:
        h = net.transformer_encoder(normalized(flags + values + tokens + language))
    torch.testing.assert_close(net(gene_ids, expression, perturbed), net.decoder(h))


def test_a_withheld_token_gets_no_gradient():
    net = small(n_language_rows=2, target_by_text=True)
    net.set_language([3, 12], {"s": torch.randn(2, 5)})
    net(torch.tensor([3, 12]), torch.rand(2, 2), torch.tensor([[1, 0], [1, 0]])).sum().backward()
    tokens = net.encoder.embedding.weight.grad
    assert tokens[3].norm() == 0 < tokens[12].norm()


def test_a_gene_that_joins_with_a_vector_has_a_text(tmp_path):
    net = small(n_language_rows=1, target_by_text=True)
    net.set_language([3], {"s": torch.randn(1, 5)})
    net.add_language([7], {"s": torch.randn(1, 5)})
    model.save(net, tmp_path / "model.pt")
    loaded = model.load(tmp_path / "model.pt")
    assert loaded.config.target_by_text
    assert loaded.has_text.nonzero().ravel().tolist() == [3, 7]


def test_a_residual_model_predicts_the_change_from_the_input():
    torch.manual_seed(4)
    plain, residual = small(), small(residual=True)
    residual.load_state_dict(plain.state_dict())
    gene_ids, control = np.array([1, 5, 9]), np.random.default_rng(0).random((4, 3), dtype=np.float32)
    change = model.predict(residual, gene_ids, control, 1) - model.predict(plain, gene_ids, control, 1)
    np.testing.assert_allclose(change, control, atol=1e-6)


@pytest.mark.parametrize("name", ["scgpt", "scgenept_go_c"])
def test_predictions_in_bfloat16_stay_within_a_hundredth_of_float32(name, tmp_path):
    arrays, net = released(name, tmp_path)
    cells = (arrays["gene_ids"], arrays["expression"], [3, 20])
    in_float32 = model.predict(net, *cells)
    with torch.autocast("cpu", torch.bfloat16):
        in_bfloat16 = model.predict(net, *cells)
    assert 0 < np.linalg.norm(in_bfloat16 - in_float32) < 1e-2 * np.linalg.norm(in_float32)


def test_a_compiled_model_has_the_same_weights_by_name_and_the_same_output():
    torch.manual_seed(0)
    net = small().eval()
    x = torch.arange(20), torch.rand(2, 20), torch.rand(2, 20) < 0.1
    keys, expected = list(net.state_dict()), net(*x)
    net.compile(backend="eager")  # what --compile calls; this backend needs no compiler
    assert list(net.state_dict()) == keys
    torch.testing.assert_close(net(*x), expected)


# --- predict

@pytest.mark.parametrize("batch_size", [3, None])
@pytest.mark.parametrize("options", [{}, {"n_language_rows": 30}])
def test_predict_equals_forward_cell_by_cell(options, batch_size):
    torch.manual_seed(2)
    net = small(**options).train()
    if options:
        net.set_language(np.arange(30), {"s": torch.randn(30, 5)})
    gene_ids = np.append(np.arange(12), np.full(20, 27))  # twenty are not in the vocabulary
    control = np.random.default_rng(0).random((7, 32), dtype=np.float32)
    together = model.predict(net, gene_ids, control, [2, 30], batch_size)
    assert net.training
    assert together.dtype == np.float32
    net.eval()
    flags = torch.zeros(1, 32)
    flags[0, [2, 30]] = 1
    for cell, row in zip(control, together):
        alone = net(torch.from_numpy(gene_ids), torch.from_numpy(cell)[None], flags)[0]
        np.testing.assert_allclose(row, alone.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("change, message", [
    ({"control": np.zeros((2, 5))}, "not .cells, 4."),
    ({"perturbed_idx": [4]}, "positions run from 0 to 3"),
    ({"perturbed_idx": -1}, "positions run from 0 to 3"),
    ({"gene_ids": [0, 1, 2, 30]}, "30 is no row of the vocabulary"),
])
def test_predict_refuses_arguments_that_do_not_fit(change, message):
    arguments = {"gene_ids": [0, 1, 2, 3], "control": np.zeros((2, 4)), "perturbed_idx": 1} | change
    with pytest.raises(ValueError, match=message):
        model.predict(small(), **arguments)


# --- files

def test_own_files_give_the_same_model_back(tmp_path):
    languages = {"go_c": 5, "ncbi+uniprot": 7}
    net = small(languages=languages, n_language_rows=2, has_counts=False, attention_dropout=0).eval()
    net.set_language([3, 1], {source: torch.randn(2, width) for source, width in languages.items()})
    model.save(net, tmp_path / "model.pt")
    again = model.load(tmp_path / "model.pt")
    x = torch.tensor([1, 3]), torch.rand(2, 2), torch.eye(2)
    assert again.config == net.config
    assert torch.equal(again(*x), net(*x))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


GOLDEN_SIZES = {"n_tokens": 120, "pad_id": 117, "d_model": 32, "n_heads": 4, "d_hid": 48, "n_layers": 3}


def golden_sized(**options):
    return model.ScGenePT(model.Config(**GOLDEN_SIZES | options))


@pytest.fixture
def pretrained():
    """A checkpoint with the parts of scGPT whole-human: the golden file's, and heads that stay behind."""
    _, state = golden("scgenept_ncbi_flash_layout")
    fine_tuned = ("genept_encoder", "pert_encoder", "ln.")
    state = {key: value for key, value in state.items() if not key.startswith(fine_tuned)}
    heads = {"flag_encoder.weight": torch.randn(2, 32), "mvc_decoder.gene2query.weight": torch.randn(32, 32)}
    return state | heads


BIAS = "transformer_encoder.layers.1.linear1.bias"


@pytest.mark.parametrize("change, message", [
    ({BIAS: None}, "linear1.bias is missing"),
    ({"transformer_encoder.layers.1.linear9.bias": torch.zeros(3)}, "linear9.bias is unknown"),
    ({BIAS: torch.zeros(7)}, r"linear1.bias has the shape \(7,\), expected \(48,\)"),
    ({BIAS: torch.full((48,), torch.nan)}, "linear1.bias holds numbers that are not finite")])
def test_weights_of_others_that_do_not_fit_are_refused_by_name(pretrained, tmp_path, change, message):
    def spoilt(state):
        state = {key: value for key, value in (state | change).items() if value is not None}
        torch.save(state, tmp_path / "file.pt")
        return tmp_path / "file.pt"

    with pytest.raises(ValueError, match=message):
        model.load_released(spoilt(golden("scgenept_go_c")[1]), n_heads=4)
    with pytest.raises(ValueError, match=message):
        model.load_pretrained(golden_sized(), spoilt(pretrained))


def test_load_released_knows_the_names_of_newer_flash_attention_wrappers(tmp_path):
    arrays, state = golden("scgenept_ncbi_flash_layout")
    state = {key.replace("self_attn.", "self_attn._impl."): value for key, value in state.items()}
    torch.save(state, tmp_path / "released.pt")
    output = model.load_released(tmp_path / "released.pt", n_heads=4)(*inputs(arrays))
    np.testing.assert_allclose(output.detach().numpy(), arrays["output"], atol=1e-6)


def test_load_pretrained_takes_encoder_value_encoder_and_transformer_and_nothing_else(pretrained, tmp_path):
    torch.save(pretrained, tmp_path / "best_model.pt")
    net = golden_sized(languages={"go_c": 6}, n_language_rows=2)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    taken, left = model.load_pretrained(net, tmp_path / "best_model.pt")
    for key, value in net.state_dict().items():
        is_taken = key.startswith(("encoder.", "value_encoder.", "transformer_encoder."))
        assert (key in taken) == is_taken
        expected = pretrained[key.replace("in_proj_", "Wqkv.")] if is_taken else before[key]
        assert torch.equal(value, expected), key
    assert {key.split(".")[0] for key in left} == {"flag_encoder", "mvc_decoder", "decoder", "cls_decoder"}


def test_load_pretrained_gives_genept_the_attention_only(pretrained, tmp_path):
    torch.save(pretrained, tmp_path / "best_model.pt")
    net = golden_sized(has_tokens=False, has_counts=False, languages={"ncbi": 6}, n_language_rows=2)
    taken, _ = model.load_pretrained(net, tmp_path / "best_model.pt")
    assert {key.split(".")[0] for key in taken} == {"transformer_encoder"}


@pytest.mark.parametrize("part", ["encoder.", "value_encoder.", "transformer_encoder."])
def test_load_pretrained_ends_with_an_error_when_a_part_is_absent(part, pretrained, tmp_path):
    others = {key: value for key, value in pretrained.items() if not key.startswith(part)}
    torch.save(others, tmp_path / "best_model.pt")
    with pytest.raises(ValueError, match=rf"no {part}\* in it"):
        model.load_pretrained(golden_sized(), tmp_path / "best_model.pt")


class Evil:
    def __reduce__(self):
        return (print, ("code from a model file ran",))


@pytest.mark.parametrize("load", [model.load, model.load_released])
@pytest.mark.parametrize("content, message", [
    (b"", "expected weights as torch.save writes them"),
    (b"<!doctype html><p>Not found", "expected weights as torch.save writes them"),
    (Evil(), "expected weights as torch.save writes them"),
    ([1, 2], "holds a list, expected a dict")])
def test_files_that_are_no_models_are_refused_and_run_no_code(content, message, load, tmp_path, capsys):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(ValueError, match=f"file.pt: {message}") as refusal:
        load(path)
    assert "weights_only" not in str(refusal.value)  # PyTorch's own advice would run what is in the file
    assert "ran" not in capsys.readouterr().out


def test_a_released_file_without_tokens_and_language_has_the_vocabulary_of_scgpt(tmp_path):
    net = model.ScGenePT(model.Config(d_model=16, n_heads=2, d_hid=16, n_layers=1, has_tokens=False))
    torch.save(net.state_dict(), tmp_path / "counts.pt")
    loaded = model.load_released(tmp_path / "counts.pt", n_heads=2)
    assert (loaded.config.n_tokens, loaded.config.pad_id) == (60697, 60694)
    x = torch.arange(5), torch.rand(2, 5), torch.eye(2, 5)
    torch.testing.assert_close(loaded(*x), net.eval()(*x))


# --- elsewhere

ALONE = """
import sys
import numpy as np
import model

cells = np.load("cells.npz")
gene_ids, control = cells["gene_ids"], cells["control"]
net = model.load_released("released.pt", n_heads=4)
predicted = model.predict(net, gene_ids, control, perturbed_idx=[7])
assert predicted.shape == control.shape
assert np.isfinite(predicted).all()
model.save(net, "model.pt")
assert np.array_equal(model.predict(model.load("model.pt"), gene_ids, control, [7]), predicted)
assert not {"h5py", "scipy", "requests"} & set(sys.modules)
"""


def test_model_py_works_alone_in_an_empty_folder(tmp_path):
    shutil.copy(KIT / "model.py", tmp_path)
    arrays, state = golden("scgpt")
    torch.save(state, tmp_path / "released.pt")
    np.savez(tmp_path / "cells.npz", gene_ids=arrays["gene_ids"], control=arrays["expression"])
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torch_export_takes_the_model_as_it_is_for_any_number_of_cells_and_genes():
    torch.manual_seed(0)
    net = small(n_language_rows=30).eval()
    net.set_language(range(30), {"s": torch.randn(30, 5)})
    cells, genes = torch.export.Dim("cells"), torch.export.Dim("genes")
    example = torch.arange(12), torch.rand(3, 12), torch.zeros(3, 12, dtype=torch.bool)
    shapes = {0: genes}, {0: cells, 1: genes}, {0: cells, 1: genes}
    exported = torch.export.export(net, example, dynamic_shapes=shapes).module()
    others = torch.randperm(30)[:20], torch.rand(5, 20), torch.rand(5, 20) > 0.8
    torch.testing.assert_close(exported(*others), net(*others))
