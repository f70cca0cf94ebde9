"""metrics.py: equal to what GEARS computes, to scipy, and to plain loops."""
import numpy as np
import pytest
from numpy.testing import assert_allclose
from pytest import approx
from scipy import stats

import metrics
from conftest import GOLDEN


def profiles(seed, n=7):
    """Predicted and true profiles (n, 40), one of control cells and the top 20 genes of each, at random."""
    rng = np.random.default_rng(seed)
    top = np.stack([rng.permutation(40)[:20] for _ in range(n)])
    return rng.random((n, 40)), rng.random((n, 40)), rng.random(40), top


def pearson(a, b):
    return approx(stats.pearsonr(a, b)[0])


def test_scores_are_those_of_gears():
    golden = np.load(GOLDEN / "metrics.npz")
    scores = metrics.evaluate(golden["pred"], golden["true"], golden["ctrl"], golden["de_idx"])
    assert set(scores) == {"mse_all", "mse_top20", "pearson_all", "pearson_top20", "pearson_delta_all",
                           "pearson_delta_top20"}
    for name, values in scores.items():
        assert_allclose(values, golden[name], atol=1e-6, err_msg=name)


def test_scores_are_those_of_a_loop_over_conditions_with_scipy():
    pred, true, ctrl, de_idx = profiles(0)
    de_idx[2, 12:] = -1  # a condition with only 12 ranked genes
    scores = metrics.evaluate(pred, true, ctrl, de_idx)
    for i, top in enumerate(de_idx):
        top = top[top >= 0]
        for name, genes in (("all", np.arange(40)), ("top20", top)):
            p = pred[i, genes]
            t = true[i, genes]
            c = ctrl[genes]
            assert scores[f"mse_{name}"][i] == approx(np.mean((p - t) ** 2))
            assert scores[f"pearson_{name}"][i] == pearson(p, t)
            assert scores[f"pearson_delta_{name}"][i] == pearson(p - c, t - c)


def test_an_undefined_correlation_counts_as_zero():
    pred, true, ctrl, de_idx = profiles(1)
    pred[0] = ctrl  # no change: its delta is constant
    pred[1] = 0.3   # a constant profile
    with np.errstate(all="raise"):
        scores = metrics.evaluate(pred, true, ctrl, de_idx)
    for genes in ("all", "top20"):
        assert np.flatnonzero(scores[f"pearson_delta_{genes}"] == 0).tolist() == [0]
        assert np.flatnonzero(scores[f"pearson_{genes}"] == 0).tolist() == [1]


def test_shapes_that_disagree_and_genes_that_are_not_there_are_errors():
    pred, true, ctrl, de_idx = profiles(2)
    for bad in ((pred[:, 1:], true, ctrl, de_idx), (pred, true, ctrl[1:], de_idx),
                (pred, true, ctrl, de_idx[1:])):
        with pytest.raises(ValueError, match="shapes disagree"):
            metrics.evaluate(*bad)
    for outside in (de_idx + 40, de_idx - 2):
        with pytest.raises(ValueError, match="genes outside"):
            metrics.evaluate(pred, true, ctrl, outside)


def test_interval95_is_students():
    for n in range(2, 40):
        values = np.random.default_rng(n).normal(size=n)
        mean, half_width = metrics.interval95(values)
        expected = stats.t.ppf(0.975, n - 1) * stats.sem(values)
        assert mean == approx(values.mean())
        assert half_width == approx(expected, rel=1e-4 if n <= 31 else 2e-3)


def test_interval95_of_one_value_is_undefined():
    mean, half_width = metrics.interval95([0.5])
    assert mean == 0.5
    assert np.isnan(half_width)


def test_specific_scores_are_those_of_a_loop():
    pred, true, reference, _ = profiles(3)
    scores = metrics.evaluate_specific(pred, true, reference)
    for i in range(7):
        assert scores["pearson_systema"][i] == pearson(pred[i] - reference, true[i] - reference)
        distances = np.linalg.norm(true - pred[i], axis=1)
        n_farther = (distances > distances[i]).sum()
        assert scores["centroid_accuracy"][i] == approx(n_farther / 6)


def test_specific_scores_tell_a_perfect_prediction_from_one_that_is_the_same_for_all():
    _, true, reference, _ = profiles(4, n=50)
    perfect = metrics.evaluate_specific(true, true, reference)
    assert perfect["centroid_accuracy"].min() == 1
    assert perfect["pearson_systema"].min() == approx(1)
    same = metrics.evaluate_specific(np.tile(reference, (50, 1)), true, reference)
    assert same["centroid_accuracy"].mean() == approx(0.5)
    assert not same["pearson_systema"].any()


def test_a_single_condition_has_none_to_be_told_apart_from():
    pred, true, reference, _ = profiles(4, n=1)
    assert np.isnan(metrics.evaluate_specific(pred, true, reference)["centroid_accuracy"]).all()


def test_the_reverse_question_is_answered_as_by_guessing_in_order_with_ties_drawn_at_random():
    rng = np.random.default_rng(5)
    predicted, true, ctrl, _ = profiles(5)
    predicted[2] = predicted[4]  # a tie
    found = metrics.found_among(predicted, true, ctrl, [1, 2, 5])
    for i in range(7):
        likeness = [stats.pearsonr(guess - ctrl, true[i] - ctrl)[0] for guess in predicted]
        n_found = np.zeros(3)
        for _ in range(1000):
            drawn = rng.permutation(7)  # ties in this order, as the sort is stable
            order = sorted(drawn, key=lambda guess: -round(likeness[guess], 9))
            n_found += [i in order[:k] for k in (1, 2, 5)]
        assert_allclose(found[i], n_found / 1000, atol=0.06)


def test_one_prediction_for_all_is_found_as_often_as_by_chance():
    true = np.random.default_rng(6).normal(size=(9, 20))
    found = metrics.found_among(np.tile(true[0], (9, 1)), true, np.zeros(20), [1, 3, 9, 20])
    assert_allclose(found, np.tile([1 / 9, 3 / 9, 1, 1], (9, 1)))
