"""What makes training and prediction fast leaves their results alone.

How fast they are: python tests/benchmark.py
"""
import numpy as np
import pytest
import torch

import model


@pytest.mark.parametrize("variant", ["scgpt", "scgenept_go_c"])
def test_predictions_in_bfloat16_stay_within_a_hundredth_of_float32(demo, stage, variant):
    data = stage("03_prepare_data").load_dataset(demo / "data/demo/dataset.h5", "03_prepare_data.py")
    net = model.load(demo / f"runs/demo/{variant}/seed42/model.pt")
    control = data.X[data.ctrl_cells[:40]].toarray()
    in_float32 = model.predict(net, data.token_ids, control, [3, 70])
    with torch.autocast("cpu", torch.bfloat16):
        in_bfloat16 = model.predict(net, data.token_ids, control, [3, 70])
    assert 0 < np.linalg.norm(in_bfloat16 - in_float32) / np.linalg.norm(in_float32) < 1e-2


def test_a_compiled_model_has_the_same_weights_by_name_and_the_same_output():
    torch.manual_seed(0)
    config = model.Config(n_tokens=50, pad_id=47, d_model=16, n_heads=2, d_hid=16, n_layers=1)
    net = model.ScGenePT(config).eval()
    inputs = torch.arange(20), torch.rand(2, 20), torch.rand(2, 20) < 0.1
    keys, expected = list(net.state_dict()), net(*inputs)
    net.compile(backend="eager")  # what --compile calls; this backend needs no compiler
    assert list(net.state_dict()) == keys
    torch.testing.assert_close(net(*inputs), expected)
