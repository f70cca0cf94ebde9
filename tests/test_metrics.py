"""metrics.py: equal to what GEARS computes, to scipy, and to plain loops."""
import numpy as np
import pytest
import scipy.stats

import metrics
from conftest import GOLDEN


def profiles(seed, P=7, G=40):
    rng = np.random.default_rng(seed)
    de_idx = np.stack([rng.permutation(G)[:20] for _ in range(P)])
    return rng.random((P, G)), rng.random((P, G)), rng.random(G), de_idx


def test_scores_are_those_of_gears():
    golden = np.load(GOLDEN / "metrics.npz")
    scores = metrics.evaluate(golden["pred"], golden["true"], golden["ctrl"], golden["de_idx"])
    assert set(scores) == {"mse_all", "mse_top20", "pearson_all", "pearson_top20", "pearson_delta_all", "pearson_delta_top20"}
    for name, values in scores.items():
        np.testing.assert_allclose(values, golden[name], atol=1e-6, err_msg=name)


def test_scores_are_those_of_a_loop_over_conditions_with_scipy():
    pred, true, ctrl, de_idx = profiles(0)
    de_idx[2, 12:] = -1  # a condition with only 12 ranked genes
    scores = metrics.evaluate(pred, true, ctrl, de_idx)
    for i in range(len(pred)):
        top = de_idx[i][de_idx[i] >= 0]
        for name, genes in (("all", slice(None)), ("top20", top)):
            p, t, c = pred[i][genes], true[i][genes], ctrl[genes]
            assert scores[f"mse_{name}"][i] == pytest.approx(np.mean((p - t) ** 2))
            assert scores[f"pearson_{name}"][i] == pytest.approx(scipy.stats.pearsonr(p, t)[0])
            assert scores[f"pearson_delta_{name}"][i] == pytest.approx(scipy.stats.pearsonr(p - c, t - c)[0])


def test_an_undefined_correlation_counts_as_zero():
    pred, true, ctrl, de_idx = profiles(1)
    pred[0] = ctrl          # no change: its delta is constant
    pred[1] = 0.3           # a constant profile
    with np.errstate(all="raise"):
        scores = metrics.evaluate(pred, true, ctrl, de_idx)
    assert scores["pearson_delta_all"][0] == scores["pearson_delta_top20"][0] == scores["pearson_all"][1] == scores["pearson_top20"][1] == 0
    assert scores["pearson_all"][0] != 0


def test_shapes_that_disagree_and_genes_that_are_not_there_are_errors():
    pred, true, ctrl, de_idx = profiles(2)
    for bad in ((pred[:, 1:], true, ctrl, de_idx), (pred, true, ctrl[1:], de_idx), (pred, true, ctrl, de_idx[1:]), (pred, true, ctrl, de_idx + 40)):
        with pytest.raises(ValueError):
            metrics.evaluate(*bad)


@pytest.mark.parametrize("n", [2, 3, 5, 31, 32, 200])
def test_interval95_is_students(n):
    values = np.random.default_rng(n).normal(size=n)
    mean, half_width = metrics.interval95(values)
    low, high = scipy.stats.t.interval(0.95, n - 1, values.mean(), scipy.stats.sem(values))
    assert mean == pytest.approx(values.mean()) and half_width == pytest.approx((high - low) / 2, rel=2e-3 if n > 31 else 1e-4)


def test_interval95_of_one_value_is_undefined():
    mean, half_width = metrics.interval95([0.5])
    assert mean == 0.5 and np.isnan(half_width)


def test_specific_scores_are_those_of_a_loop():
    pred, true, reference, _ = profiles(3)
    scores = metrics.evaluate_specific(pred, true, reference)
    for i in range(len(pred)):
        assert scores["pearson_systema"][i] == pytest.approx(scipy.stats.pearsonr(pred[i] - reference, true[i] - reference)[0])
        distance = [np.linalg.norm(pred[i] - true[j]) for j in range(len(pred))]
        farther = [distance[j] > distance[i] for j in range(len(pred)) if j != i]
        assert scores["centroid_accuracy"][i] == pytest.approx(np.mean(farther))


def test_specific_scores_tell_a_perfect_prediction_from_one_that_is_the_same_for_all():
    _, true, reference, _ = profiles(4, P=50)
    perfect, same = metrics.evaluate_specific(true, true, reference), metrics.evaluate_specific(np.tile(reference, (50, 1)), true, reference)
    assert perfect["centroid_accuracy"].min() == 1 and perfect["pearson_systema"].min() == pytest.approx(1)
    assert same["centroid_accuracy"].mean() == pytest.approx(0.5) and not same["pearson_systema"].any()
    assert np.isnan(metrics.evaluate_specific(true[:1], true[:1], reference)["centroid_accuracy"]).all()  # nothing to tell it apart from


def test_the_reverse_question_is_answered_as_by_guessing_in_order_with_ties_drawn_at_random():
    rng = np.random.default_rng(5)
    predicted, true, ctrl = rng.normal(size=(7, 30)), rng.normal(size=(7, 30)), rng.normal(size=30)
    predicted[2] = predicted[4]  # a tie
    found = metrics.found_among(predicted, true, ctrl, [1, 2, 5])
    for i in range(7):
        likeness = [round(np.corrcoef(guess - ctrl, true[i] - ctrl)[0, 1], 9) for guess in predicted]
        for column, k in enumerate([1, 2, 5]):
            share = 0
            for _ in range(2000):
                order = sorted(range(7), key=lambda j: (-likeness[j], rng.random()))
                share += (i in order[:k]) / 2000
            assert found[i, column] == pytest.approx(share, abs=0.06)


def test_one_prediction_for_all_is_found_as_often_as_by_chance():
    true = np.random.default_rng(6).normal(size=(9, 20))
    found = metrics.found_among(np.tile(true[0], (9, 1)), true, np.zeros(20), [1, 3, 9, 20])
    np.testing.assert_allclose(found, np.tile([1 / 9, 3 / 9, 1, 1], (9, 1)))
