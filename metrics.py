"""Metrics of perturbation prediction on mean expression profiles. This file stands alone: numpy is all.

    scores = evaluate(pred, true, ctrl, de_idx)                  # {name: one value per condition}
    scores |= evaluate_specific(pred, true, perturbed_mean)      # do predictions tell perturbations apart?
    found = found_among(pred, true, ctrl, [1, 5, 10])            # which perturbation led to these cells?
    mean, half_width = interval95(values_of_seeds)

Sources: MSE, Pearson and Pearson delta on all and on the top 20 differentially expressed genes are those of
GEARS (Roohani et al., Nature Biotechnology 2024) and scGenePT (Istrate et al. 2024); the specific ones those
of Systema (Nature Biotechnology 2025).
"""
import numpy as np

# 97.5% quantiles of Student's t for 1, 2, ... 30 degrees of freedom
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
         2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
         2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423)


def evaluate(pred, true, ctrl, de_idx):
    """Compare predicted with measured mean profiles, condition by condition.

    pred, true (P, G): mean expression of each condition; ctrl (G,): mean expression of the control cells;
    de_idx (P, 20): top differentially expressed genes of each condition, -1 = none. Returns arrays of (P,):
    mse_*, pearson_* (of the profiles) and pearson_delta_* (of their differences to ctrl), on all genes and on
    the top 20. An undefined correlation (of a constant profile) counts as 0. Raises ValueError for shapes
    that disagree.
    """
    pred, true, ctrl = (np.asarray(a, dtype=np.float64) for a in (pred, true, ctrl))
    de_idx = np.asarray(de_idx)
    fit = pred.ndim == de_idx.ndim == 2 and pred.shape == true.shape and ctrl.shape == pred.shape[1:]
    if not fit or len(de_idx) != len(pred):
        raise ValueError(f"shapes disagree: pred {pred.shape}, true {true.shape}, ctrl {ctrl.shape}, "
                         f"de_idx {de_idx.shape}")
    if de_idx.size and (de_idx.min() < -1 or de_idx.max() >= pred.shape[1]):
        raise ValueError(f"de_idx names genes outside 0..{pred.shape[1] - 1}")
    rows = np.arange(len(pred))[:, None]
    every, top = np.ones(pred.shape, dtype=bool), de_idx >= 0
    pred20, true20, ctrl20 = pred[rows, de_idx], true[rows, de_idx], ctrl[de_idx]
    return {"mse_all": _mean((pred - true) ** 2, every),
            "mse_top20": _mean((pred20 - true20) ** 2, top),
            "pearson_all": pearson(pred, true, every),
            "pearson_top20": pearson(pred20, true20, top),
            "pearson_delta_all": pearson(pred - ctrl, true - ctrl, every),
            "pearson_delta_top20": pearson(pred20 - ctrl20, true20 - ctrl20, top)}


def evaluate_specific(pred, true, perturbed_mean):
    """Whether predictions say more than what all perturbations have in common.

    pred, true (P, G): mean expression of each condition; perturbed_mean (G,): mean profile of the training
    perturbations. Returns arrays of (P,): pearson_systema, the correlation of the differences to that mean
    over all genes (0 where undefined), and centroid_accuracy, the share of the other conditions whose true
    profile lies farther (Euclidean) from the prediction than the condition's own does: on average a half for
    predictions that tell nothing apart, NaN for a single condition.
    """
    pred, true = np.asarray(pred, dtype=np.float64), np.asarray(true, dtype=np.float64)
    # |p - t|^2 less |p|^2, which is the same for all t: (P, P), row: prediction, column: true profile
    distance = (true ** 2).sum(1) - 2 * pred @ true.T
    own = np.diag(distance)[:, None]
    farther = (distance > own).sum(1) / (len(pred) - 1) if len(pred) > 1 else np.full(len(pred), np.nan)
    every = np.ones(pred.shape, dtype=bool)
    return {"pearson_systema": pearson(pred - perturbed_mean, true - perturbed_mean, every),
            "centroid_accuracy": farther}


def found_among(pred, true, ctrl, n_guesses):
    """The reverse question, which perturbation led to these cells: whether a condition's own prediction is
    among the first k of all P, by the Pearson correlation of predicted with measured change.

    pred, true (P, G): mean expression of each condition; ctrl (G,); n_guesses (n,): the values of k. Returns
    (P, n): 1 or 0, or the chance of it where others correlate as well; so one prediction for all conditions
    is found as often as by chance, k / P.
    """
    predicted, measured = (_unit_rows(np.asarray(profiles, np.float64) - ctrl) for profiles in (pred, true))
    likeness = measured @ predicted.T  # (P, P), row: measured change, column: prediction
    own = np.diag(likeness)[:, None]
    is_tie = np.isclose(likeness, own, rtol=0, atol=1e-9)
    n_above = (~is_tie & (likeness > own)).sum(1, keepdims=True)
    n_ties = is_tie.sum(1, keepdims=True)  # itself among them
    return ((np.asarray(n_guesses) - n_above) / n_ties).clip(0, 1)


def _unit_rows(a):
    """Rows minus their means, scaled to length 1; a constant one becomes 0, which correlates with nothing."""
    centred, norm = _centred(a, np.ones(a.shape, dtype=bool))
    return centred / np.where(norm > 0, norm, np.inf)[:, None]


def pearson(a, b, is_used):
    """Pearson correlation of each row of `a` with the same row of `b` over the entries in use; all (P, G) ->
    (P,).

    0 where it is undefined: where a row is constant up to rounding.
    """
    (a, norm_a), (b, norm_b) = _centred(a, is_used), _centred(b, is_used)
    defined = (norm_a > 0) & (norm_b > 0)
    return np.where(defined, (a * b).sum(1) / np.where(defined, norm_a * norm_b, 1), 0)


def _centred(a, is_used):
    """Rows minus their means, and their norms; the norm of a row that is constant up to rounding is 0."""
    mean = _mean(a, is_used)[:, None]
    centred = np.where(is_used, a - mean, 0)
    norm = np.linalg.norm(centred, axis=1)
    rounding = 1e-13 * np.abs(mean[:, 0]) * np.sqrt(is_used.sum(1))
    return centred, np.where(norm > rounding, norm, 0)


def _mean(a, is_used):
    """Mean of each row over the entries in use; 0 for a row without any."""
    return np.where(is_used, a, 0).sum(1) / np.maximum(is_used.sum(1), 1)


def interval95(values):
    """Mean of `values` (n,), say one per seed, and the half width of its 95% interval (Student's t); NaN for
    the half width of a single value."""
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n < 2:
        return float(values.mean()) if n else float("nan"), float("nan")
    t = T_975[n - 2] if n - 1 <= len(T_975) else 1.96 + 2.4 / (n - 1)
    return float(values.mean()), float(t * values.std(ddof=1) / np.sqrt(n))
