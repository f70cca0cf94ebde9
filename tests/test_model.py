"""model.py: equal to the released implementation and to PyTorch's own layers; loaders that let nothing pass unseen."""
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
    state = {key.removeprefix("state/"): torch.from_numpy(arrays[key]) for key in arrays.files if key.startswith("state/")}
    return arrays, state


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
    return model.Config(**{"n_tokens": 30, "pad_id": 27, "d_model": 16, "n_heads": 2, "d_hid": 24, "n_layers": 2} | options)


# --- numbers

@pytest.mark.parametrize("name", RELEASED)
def test_output_is_that_of_the_released_implementation(name, tmp_path):
    arrays, net = released(name, tmp_path)
    with torch.no_grad():
        output = net(*inputs(arrays))
    np.testing.assert_allclose(output.numpy(), arrays["output"], atol=1e-5 * np.abs(arrays["output"]).max(), rtol=1e-5)


@pytest.mark.parametrize("name", RELEASED)
def test_loss_and_gradients_are_those_of_the_released_implementation(name, tmp_path):
    arrays, net = released(name, tmp_path)
    without_dropout(net).train()
    loss = ((net(*inputs(arrays)) - torch.from_numpy(arrays["target"])) ** 2).mean()
    loss.backward()
    assert loss.item() == pytest.approx(float(arrays["loss"]), rel=1e-6)
    checked = 0
    for key, parameter in net.named_parameters():
        if key.startswith("language_encoders."):  # the two released classes name the projection differently
            key = key.removeprefix("language_encoders.").replace(".proj.", ".fc." if "gopt" in key else ".proj_layer.")
        assert parameter.grad.norm().item() == pytest.approx(float(arrays[f"gradnorm/{key}"]), rel=1e-4), key
        checked += 1
    assert checked == sum(key.startswith("gradnorm/") for key in arrays.files)


@pytest.mark.parametrize("training", [False, True])
def test_encoder_layer_computes_what_pytorchs_layer_does(training):
    torch.manual_seed(0)
    config = small(dropout=0.0, attention_dropout=0.0)
    ours = model.EncoderLayer(config).train(training)
    theirs = torch.nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True).train(training)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 50, 16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_attention_dropout_drops_with_its_probability_and_only_in_training():
    torch.manual_seed(0)
    attention = model.SelfAttention(small(attention_dropout=0.5))
    with torch.no_grad():  # values are 1 and the projection is the identity: the output is the sum of what attention keeps
        attention.in_proj_weight.zero_()
        attention.in_proj_bias.copy_(torch.cat([torch.zeros(32), torch.ones(16)]))
        attention.out_proj.weight.copy_(torch.eye(16))
    x = torch.randn(8, 200, 16)
    kept = attention.train()(x)
    assert kept.mean().item() == pytest.approx(1, abs=0.02) and 0.03 < kept.std().item() < 0.12  # 1 / sqrt(200) = 0.07
    torch.testing.assert_close(attention.eval()(x), torch.ones(8, 200, 16))


def test_a_gene_outside_the_language_table_is_an_error_not_another_genes_vector():
    net = model.ScGenePT(small(languages={"s": 5}, n_language_rows=3))
    net.set_language([4, 7, 9], {"s": np.ones((3, 5), np.float32)})
    model.predict(net, [4, 9, 7], np.zeros((1, 3)), 0)
    with pytest.raises(ValueError, match="no language vector for 1 genes, the first 5"):
        model.predict(net, [4, 5], np.zeros((1, 2)), 0)
    with pytest.raises(IndexError):
        net(torch.tensor([4, 5]), torch.zeros(1, 2), torch.zeros(1, 2))


def test_language_rows_compute_what_a_table_of_the_whole_vocabulary_does():
    torch.manual_seed(1)
    compact = model.ScGenePT(small(languages={"s": 5}, n_language_rows=4)).eval()
    token_ids, vectors = [27, 3, 12, 8], torch.randn(4, 5)
    compact.set_language(token_ids, {"s": vectors})
    whole = model.ScGenePT(small(languages={"s": 5}, n_language_rows=30)).eval()
    table = torch.randn(30, 5)
    table[token_ids] = vectors
    state = compact.state_dict() | {"language_rows": torch.arange(30), "language_encoders.s.embedding.weight": table}
    whole.load_state_dict(state)
    x = (torch.tensor([3, 8, 27, 12]), torch.rand(2, 4), torch.eye(2, 4))
    torch.testing.assert_close(compact(*x), whole(*x))


def test_the_vectors_of_pad_get_no_gradient():
    net = model.ScGenePT(small(languages={"s": 5}, n_language_rows=2))
    net.set_language([27, 3], {"s": torch.randn(2, 5)})
    net(torch.tensor([27, 3]), torch.rand(2, 2), torch.zeros(2, 2)).sum().backward()
    for table, pad, gene in ((net.encoder.embedding.weight.grad, 27, 3), (net.language_encoders["s"].embedding.weight.grad, 0, 1)):
        assert table[pad].norm() == 0 and table[gene].norm() > 0


def test_the_token_of_a_perturbed_gene_with_a_text_is_left_out():
    """Against the formula, gene by gene: x = token + value + flag + language, without the token where withheld."""
    torch.manual_seed(3)
    net = model.ScGenePT(small(languages={"s": 5}, n_language_rows=4, target_by_text=True)).eval()
    token_ids = [27, 3, 12, 8]
    net.set_language(token_ids, {"s": torch.randn(4, 5)}, with_text=[3, 8])
    gene_ids, expression = torch.tensor([3, 8, 27, 12]), torch.rand(2, 4)
    perturbed = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 1]])  # the gene 12 has no text and keeps its token
    language = net.language_encoders["s"]
    x = torch.zeros(2, 4, 16)
    for cell in range(2):
        for i, gene in enumerate(gene_ids.tolist()):
            row = language.embedding.weight[token_ids.index(gene)]
            x[cell, i] = language.enc_norm(language.proj(row))
            x[cell, i] += net.value_encoder(expression[cell, i].view(1, 1))[0, 0]
            x[cell, i] += net.pert_encoder.weight[perturbed[cell, i]]
            if not (perturbed[cell, i] and gene in (3, 8)):
                x[cell, i] += net.encoder(torch.tensor([gene]))[0]
    expected = net.decoder(net.transformer_encoder(net.ln(x)))
    torch.testing.assert_close(net(gene_ids, expression, perturbed), expected)


def test_a_withheld_token_gets_no_gradient():
    net = model.ScGenePT(small(languages={"s": 5}, n_language_rows=2, target_by_text=True))
    net.set_language([3, 12], {"s": torch.randn(2, 5)})
    net(torch.tensor([3, 12]), torch.rand(2, 2), torch.tensor([[1, 0], [1, 0]])).sum().backward()
    assert net.encoder.embedding.weight.grad[3].norm() == 0 < net.encoder.embedding.weight.grad[12].norm()


def test_a_gene_that_joins_with_a_vector_has_a_text(tmp_path):
    net = model.ScGenePT(small(languages={"s": 5}, n_language_rows=1, target_by_text=True))
    net.set_language([3], {"s": torch.randn(1, 5)})
    net.add_language([7], {"s": torch.randn(1, 5)})
    model.save(net, tmp_path / "model.pt")
    loaded = model.load(tmp_path / "model.pt")
    assert loaded.config.target_by_text and loaded.has_text.nonzero().ravel().tolist() == [3, 7]


def test_a_residual_model_predicts_the_change_from_the_input():
    torch.manual_seed(4)
    plain = model.ScGenePT(small()).eval()
    residual = model.ScGenePT(small(residual=True)).eval()
    residual.load_state_dict(plain.state_dict())
    gene_ids, control = np.array([1, 5, 9]), np.random.default_rng(0).random((4, 3), dtype=np.float32)
    change = model.predict(residual, gene_ids, control, 1) - model.predict(plain, gene_ids, control, 1)
    np.testing.assert_allclose(change, control, atol=1e-6)


# --- predict

@pytest.mark.parametrize("batch_size", [1, 3, None])
@pytest.mark.parametrize("options", [{}, {"languages": {"s": 5}, "n_language_rows": 30, "two_encoders": True}])
def test_predict_equals_forward_cell_by_cell(options, batch_size):
    torch.manual_seed(2)
    rng, net = np.random.default_rng(0), model.ScGenePT(small(**options)).train()
    if options:
        net.set_language(np.arange(30), {"s": torch.randn(30, 5)})
    gene_ids = np.append(np.arange(12), np.full(20, 27))  # twenty are not in the vocabulary, and most are not expressed
    control = (rng.random((7, 32)) * (rng.random((7, 32)) < 0.1)).astype(np.float32)
    together = model.predict(net, gene_ids, control, [2, 30], batch_size)
    assert net.training and together.dtype == np.float32
    net.eval()
    flags = torch.zeros(1, 32)
    flags[0, [2, 30]] = 1
    for cell, row in zip(control, together):
        with torch.no_grad():
            alone = net(torch.from_numpy(gene_ids), torch.from_numpy(cell)[None], flags)[0]
        np.testing.assert_allclose(row, alone.numpy(), atol=1e-5)


@pytest.mark.parametrize("change, message", [
    ({"control": np.zeros((2, 5))}, "not .cells, 4."), ({"perturbed_idx": [4]}, "positions run from 0 to 3"),
    ({"perturbed_idx": -1}, "positions run from 0 to 3"), ({"gene_ids": [0, 1, 2, 30]}, "30 is no row of the vocabulary"),
])
def test_predict_refuses_arguments_that_do_not_fit(change, message):
    arguments = {"gene_ids": [0, 1, 2, 3], "control": np.zeros((2, 4)), "perturbed_idx": 1} | change
    with pytest.raises(ValueError, match=message):
        model.predict(model.ScGenePT(small()), **arguments)


# --- files

def test_own_files_give_the_same_model_back(tmp_path):
    net = model.ScGenePT(small(languages={"go_c": 5, "ncbi+uniprot": 7}, n_language_rows=2, has_counts=False, attention_dropout=0)).eval()
    net.set_language([3, 1], {"go_c": torch.randn(2, 5), "ncbi+uniprot": torch.randn(2, 7)})
    model.save(net, tmp_path / "model.pt")
    again = model.load(tmp_path / "model.pt")
    x = (torch.tensor([1, 3]), torch.rand(2, 2), torch.eye(2))
    assert again.config == net.config and torch.equal(again(*x), net(*x))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def spoilt(state, kind):
    state = dict(state)
    if kind == "missing":
        del state["transformer_encoder.layers.1.linear1.bias"]
    elif kind == "unknown":
        state["transformer_encoder.layers.1.linear9.bias"] = torch.zeros(3)
    else:
        state["transformer_encoder.layers.1.linear1.bias"] = torch.zeros(7)
    return state


MESSAGES = {"missing": r"layers\.1\.linear1\.bias is missing", "unknown": r"layers\.1\.linear9\.bias is unknown",
            "misshapen": r"layers\.1\.linear1\.bias has the shape \(7,\)"}


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("name", RELEASED)
def test_load_released_names_the_key_that_does_not_fit(name, kind, tmp_path):
    torch.save(spoilt(golden(name)[1], kind), tmp_path / "released.pt")
    with pytest.raises(ValueError, match=MESSAGES[kind]):
        model.load_released(tmp_path / "released.pt", n_heads=4)


def test_load_released_does_not_pass_over_attention_weights_under_a_third_name(tmp_path):
    _, state = golden("scgpt")
    state = {key.replace("in_proj_weight", "packed_weight"): value for key, value in state.items()}
    torch.save(state, tmp_path / "released.pt")
    with pytest.raises(ValueError, match="in_proj_weight is missing"):
        model.load_released(tmp_path / "released.pt", n_heads=4)


def test_load_released_knows_the_names_of_newer_flash_attention_wrappers(tmp_path):
    arrays, state = golden("scgenept_ncbi_flash_layout")
    state = {key.replace("self_attn.", "self_attn._impl."): value for key, value in state.items()}
    torch.save(state, tmp_path / "released.pt")
    output = model.load_released(tmp_path / "released.pt", n_heads=4)(*inputs(arrays))
    np.testing.assert_allclose(output.detach().numpy(), arrays["output"], atol=1e-6)


def pretrained_state():
    """A checkpoint with the parts of scGPT whole-human: those of the golden file and heads that fine-tuning leaves."""
    _, state = golden("scgenept_ncbi_flash_layout")
    state = {key: value for key, value in state.items() if not key.startswith(("genept_encoder", "pert_encoder", "ln."))}
    return state | {"flag_encoder.weight": torch.randn(2, 32), "mvc_decoder.gene2query.weight": torch.randn(32, 32)}


GOLDEN_SIZES = {"n_tokens": 120, "pad_id": 117, "d_model": 32, "n_heads": 4, "d_hid": 48, "n_layers": 3}


def test_load_pretrained_takes_encoder_value_encoder_and_transformer_and_nothing_else(tmp_path):
    state = pretrained_state()
    torch.save(state, tmp_path / "best_model.pt")
    net = model.ScGenePT(model.Config(**GOLDEN_SIZES, languages={"go_c": 6}, n_language_rows=2))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    taken, left = model.load_pretrained(net, tmp_path / "best_model.pt")
    after = net.state_dict()
    for key in after:
        expected = state.get(key.replace("in_proj_", "Wqkv.")) if key in taken else before[key]
        assert torch.equal(after[key], expected), key
        assert (key in taken) == key.startswith(("encoder.", "value_encoder.", "transformer_encoder."))
    assert {key.split(".")[0] for key in left} == {"flag_encoder", "mvc_decoder", "decoder", "cls_decoder"}


def test_load_pretrained_gives_genept_the_attention_only(tmp_path):
    torch.save(pretrained_state(), tmp_path / "best_model.pt")
    net = model.ScGenePT(model.Config(**GOLDEN_SIZES, has_tokens=False, has_counts=False, languages={"ncbi": 6}, n_language_rows=2))
    taken, _ = model.load_pretrained(net, tmp_path / "best_model.pt")
    assert {key.split(".")[0] for key in taken} == {"transformer_encoder"}


@pytest.mark.parametrize("part", ["encoder.", "value_encoder.", "transformer_encoder."])
def test_load_pretrained_ends_with_an_error_when_a_part_is_absent(part, tmp_path):
    torch.save({key: value for key, value in pretrained_state().items() if not key.startswith(part)}, tmp_path / "best_model.pt")
    with pytest.raises(ValueError, match=rf"no {part}\* in it"):
        model.load_pretrained(model.ScGenePT(model.Config(**GOLDEN_SIZES)), tmp_path / "best_model.pt")


@pytest.mark.parametrize("kind", MESSAGES)
def test_load_pretrained_names_the_key_that_does_not_fit(kind, tmp_path):
    torch.save(spoilt(pretrained_state(), kind), tmp_path / "best_model.pt")
    with pytest.raises(ValueError, match=MESSAGES[kind]):
        model.load_pretrained(model.ScGenePT(model.Config(**GOLDEN_SIZES)), tmp_path / "best_model.pt")


class Evil:
    def __reduce__(self):
        return (print, ("code from a model file ran",))


@pytest.mark.parametrize("load", [model.load, model.load_released])
@pytest.mark.parametrize("content", [b"", b"<!doctype html><p>Not found", Evil(), [1, 2]])
def test_files_that_are_no_models_are_refused_and_run_no_code(content, load, tmp_path, capsys):
    path = tmp_path / "file.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match="file.pt"):
        load(path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("load", [model.load, model.load_released])
def test_the_message_for_another_kind_of_file_does_not_advise_to_run_what_is_in_it(load, tmp_path):
    torch.save(Evil(), tmp_path / "file.pt")
    with pytest.raises(ValueError, match="expected weights as torch.save writes them") as refusal:
        load(tmp_path / "file.pt")
    assert "weights_only" not in str(refusal.value)


def test_a_released_file_without_tokens_and_language_has_the_vocabulary_of_scgpt(tmp_path):
    net = model.ScGenePT(model.Config(d_model=16, n_heads=2, d_hid=16, n_layers=1, has_tokens=False))
    torch.save(net.state_dict(), tmp_path / "counts.pt")
    loaded = model.load_released(tmp_path / "counts.pt", n_heads=2)
    assert loaded.config.n_tokens == 60697 and loaded.config.pad_id == 60694
    x = (torch.arange(5), torch.rand(2, 5), torch.eye(2, 5))
    torch.testing.assert_close(loaded(*x), net.eval()(*x))


# --- elsewhere

def test_model_py_works_alone_in_an_empty_folder(tmp_path):
    shutil.copy(KIT / "model.py", tmp_path)
    arrays, state = golden("scgpt")
    torch.save(state, tmp_path / "released.pt")
    np.savez(tmp_path / "cells.npz", gene_ids=arrays["gene_ids"], control=arrays["expression"])
    code = ("import numpy as np, model, sys\n"
            "cells = np.load('cells.npz')\n"
            "net = model.load_released('released.pt', n_heads=4)\n"
            "predicted = model.predict(net, cells['gene_ids'], cells['control'], perturbed_idx=[7])\n"
            "model.save(net, 'model.pt')\n"
            "assert np.array_equal(model.predict(model.load('model.pt'), cells['gene_ids'], cells['control'], [7]), predicted)\n"
            "assert predicted.shape == cells['control'].shape and np.isfinite(predicted).all()\n"
            "assert not {'h5py', 'scipy', 'requests'} & set(sys.modules)\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torch_export_takes_the_model_as_it_is_for_any_number_of_cells_and_genes():
    torch.manual_seed(0)
    net = model.ScGenePT(small(languages={"go": 6}, n_language_rows=30)).eval()
    net.language_rows.copy_(torch.arange(30))
    cells, genes = torch.export.Dim("cells"), torch.export.Dim("genes")
    program = torch.export.export(net, (torch.arange(12), torch.rand(3, 12), torch.zeros(3, 12, dtype=torch.bool)),
                                  dynamic_shapes=({0: genes}, {0: cells, 1: genes}, {0: cells, 1: genes})).module()
    others = torch.randperm(30)[:20], torch.rand(5, 20), torch.rand(5, 20) > 0.8
    torch.testing.assert_close(program(*others), net(*others))
