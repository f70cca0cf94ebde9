"""Simulated screens, to see what stages 02 to 05 make of texts of known quality. SYNTHETIC.

    python tests/simulate.py FOLDER --genes 120 --processes 7 --noise 0.5 --seed 1

writes FOLDER/texts.tsv (for 01 --tsv), FOLDER/screen.h5ad (for 03 --h5ad) and FOLDER/processes.npy, the
truth: which gene takes part in which process (genes, processes).

Every gene takes part in one or two hidden processes. Perturbing it changes the activity of processes, and
thereby the genes that take part in those. A text holds words of the gene's processes, and a share of noise:
words drawn at random from a vocabulary. --noise 0 is a clean text, 0.5 a noisy one, 1 tells nothing.
"""
import argparse
import importlib
import sys
from pathlib import Path

import numpy as np
import scipy.sparse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
stage03 = importlib.import_module("03_prepare_data")

WORDS_OF_TEXT, WORDS_OF_PROCESS, NOISE_WORDS = 24, 8, 400
TARGETS, PAIRS, CELLS, CONTROLS = 90, 30, 20, 300


def simulate_processes(n_genes, n_processes, rng):
    """Which process each gene takes part in: bool (genes, processes), one or two in a row."""
    takes_part = np.zeros((n_genes, n_processes), bool)
    for row in takes_part:
        row[rng.choice(n_processes, rng.integers(1, 3), replace=False)] = True
    return takes_part


def simulate_texts(takes_part, noise, rng):
    """A text (genes) for each row of takes_part, of which a share `noise` of the words is drawn at random."""
    texts = []
    for row in takes_part:
        process = rng.choice(np.flatnonzero(row), WORDS_OF_TEXT)
        number = rng.integers(WORDS_OF_PROCESS, size=WORDS_OF_TEXT)
        words = [f"process{p}word{n}" for p, n in zip(process, number)]
        is_noise = rng.random(WORDS_OF_TEXT) < noise
        drawn = rng.integers(NOISE_WORDS, size=WORDS_OF_TEXT)
        texts.append(" ".join(f"noise{d}" if random else word
                              for word, random, d in zip(words, is_noise, drawn)))
    return texts


def simulate_cells(genes, takes_part, rng):
    """Log-normalized Poisson counts (cells, genes) as CSR, and the condition (cells) of each cell.

    No response is shared by all perturbations (the effects are centred), so that their mean predicts nothing.
    """
    n_genes, n_processes = takes_part.shape
    share = takes_part / takes_part.sum(1, keepdims=True)
    sign = rng.choice([-1.0, 1.0], (n_processes, n_processes))
    effect = sign * rng.uniform(0.5, 1.5, (n_processes, n_processes))
    effect -= effect.mean(0)
    effect -= effect.mean(1, keepdims=True)
    targets = rng.permutation(n_genes)[:min(TARGETS, 3 * n_genes // 4)]
    pairs = [rng.choice(targets, 2, replace=False) for _ in range(PAIRS)]
    conditions = [("ctrl", [], CONTROLS)]
    conditions += [(f"{genes[target]}+ctrl", [target], CELLS) for target in targets]
    conditions += [(f"{genes[a]}+{genes[b]}", [a, b], CELLS) for a, b in pairs]

    baseline = rng.normal(1.0, 0.7, n_genes)
    counts, labels = [], []
    for label, perturbed, n_cells in conditions:
        activity = rng.normal(0, 0.15, (n_cells, n_processes)) + (share[perturbed] @ effect.T).sum(0)
        log_mean = baseline + activity @ share.T + rng.normal(0, 0.2, (n_cells, 1))  # the last: depth
        log_mean[:, perturbed] -= 1.5  # knocked down
        counts.append(rng.poisson(np.exp(log_mean)))
        labels += [label] * n_cells
    X = scipy.sparse.csr_matrix(np.concatenate(counts).astype(np.float32))
    totals = stage03.cell_totals(X)
    return stage03.normalize(X, np.median(totals) / totals), np.array(labels, object)


def write_screen(folder, n_genes, n_processes, noise, seed):
    """Write texts.tsv, screen.h5ad and processes.npy to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    of_processes, of_texts, of_cells = np.random.default_rng(seed).spawn(3)
    genes = np.array([f"SIM{i + 1:04d}" for i in range(n_genes)], object)
    takes_part = simulate_processes(n_genes, n_processes, of_processes)
    np.save(folder / "processes.npy", takes_part)
    texts = simulate_texts(takes_part, noise, of_texts)
    lines = ["gene\ttext", *(f"{gene}\t{text}" for gene, text in zip(genes, texts))]
    (folder / "texts.tsv").write_text("\n".join(lines) + "\n")
    X, labels = simulate_cells(genes, takes_part, of_cells)
    made = stage03.shared.made_from({"simulated": [n_genes, n_processes, noise, seed]}, {})
    stage03.write_h5ad(folder / "screen.h5ad", made, X, {"condition": labels}, genes, "SYNTHETIC screen")


def main():
    as_written = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--genes", type=int, default=120)
    parser.add_argument("--processes", type=int, default=7)
    parser.add_argument("--noise", type=float, default=0.5, help="share of the words, 0 to 1")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    write_screen(args.folder, args.genes, args.processes, args.noise, args.seed)


if __name__ == "__main__":
    main()
