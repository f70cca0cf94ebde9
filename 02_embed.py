"""Stage 02: gene texts -> gene vectors, data/<space>/embeddings/<source>.<embedder>.<mode>.h5

    python 02_embed.py                                          the demo: every source, embedded offline with lsa
    python 02_embed.py --dataset norman --embedder lsa --source ncbi go_c

A file holds `genes` (N) and `vectors` (N, d) float32. Modes: `concat` embeds one text a gene, `avg` embeds each GO term
alone and takes the mean over the gene's terms.
"""
import argparse
import hashlib
import importlib
import json
import re
import sys
from array import array
from collections import Counter

import numpy as np

stage01 = importlib.import_module("01_fetch_annotations")

LSA_DIM = 256  # most dimensions of an lsa vector


# ---------------------------------------------------------------------------------------------------------------------
# The texts

def read_texts(path, source, mode):
    """What is to be embedded for one source of annotations.h5: `genes` (N), the distinct `texts` (T), and the sparse
    matrix (N, T) that takes text vectors to gene vectors (concat: a single 1 in each row; avg: 1 / number of terms)."""
    import scipy.sparse
    with stage01.open_h5(path, "01_fetch_annotations.py", [source]) as file:
        group = file[source]
        genes = group["genes"].asstr()[:]
        if mode == "avg" and "terms" not in group:
            sys.exit(f"error: {path}: source {source!r} has no terms one by one; use --mode concat")
        texts = group["terms" if mode == "avg" else "text"].asstr()[:]
        offsets = group["term_offsets"][:] if mode == "avg" else np.arange(len(genes) + 1)
    distinct, idx = np.unique(texts.astype(object), return_inverse=True)
    n_texts = np.diff(offsets)
    average = scipy.sparse.csr_matrix((np.repeat(1 / n_texts, n_texts), idx, offsets), shape=(len(genes), len(distinct)))
    return genes, distinct, average


# ---------------------------------------------------------------------------------------------------------------------
# lsa: TF-IDF and a truncated SVD (Deerwester et al. 1990), offline and deterministic

def words_of(text):
    """Lower-case words and pairs of neighbouring words (not across punctuation), without a leading `Gene Symbol X`."""
    for clause in re.split(r"[,;:.()]", re.sub(r"^Gene Symbol \S+", "", text).lower()):
        words = re.findall(r"\w+", clause)
        yield from words
        yield from zip(words, words[1:])


def lsa(texts, counts):
    """Vectors (T, d) of unit length for T distinct texts, of which each stands `counts` (T) times; d is at most LSA_DIM
    and never more than the rank of the word matrix. A text that shares no word with another gets zeros."""
    import scipy.sparse
    columns, indices, values, indptr = {}, array("i"), array("f"), array("q", [0])
    for text in texts:
        for word, n in Counter(words_of(text)).items():
            indices.append(columns.setdefault(word, len(columns)))
            values.append(1 + np.log(n))
        indptr.append(len(indices))
    words = scipy.sparse.csr_matrix((values, indices, indptr), shape=(len(texts), len(columns)), dtype=np.float64)
    n_with = (words > 0).T @ counts  # texts that hold the word
    words = words[:, n_with > 1]  # a word of a single text says nothing about its likeness to others
    if not words.nnz:
        sys.exit("error: lsa: no word stands in two texts; use --embedder openai")
    words = unit_rows(words @ scipy.sparse.diags(np.log((1 + counts.sum()) / n_with[n_with > 1])))
    directions, _ = leading_directions(scipy.sparse.diags(np.sqrt(counts)) @ words, LSA_DIM)
    return unit_rows(words @ directions)


def unit_rows(matrix):
    """A matrix (dense or sparse) with its rows scaled to length 1; zero rows stay."""
    import scipy.sparse
    squares = matrix.multiply(matrix) if scipy.sparse.issparse(matrix) else matrix * matrix
    norms = np.sqrt(np.asarray(squares.sum(axis=1))).ravel()
    return scipy.sparse.diags(1 / np.where(norms > 0, norms, 1)) @ matrix


def leading_directions(matrix, k):
    """The right singular vectors (m, k) of a matrix (n, m), dense or sparse, and their singular values (k), largest first;
    fewer if its rank is lower. Block power iteration (Halko et al. 2011, algorithm 4.4), same result at every call."""
    width = min(k + 16, *matrix.shape)
    basis = np.random.default_rng(0).standard_normal((matrix.shape[1], width))
    for _ in range(6):
        basis = np.linalg.qr(matrix.T @ (matrix @ basis))[0]
    _, s, rotation = np.linalg.svd(matrix @ basis, full_matrices=False)
    k = min(k, int((s > 1e-6 * s[0]).sum()))
    directions = basis @ rotation[:k].T
    signs = np.sign(directions[np.abs(directions).argmax(0), np.arange(k)])  # the largest entry is positive
    return directions * signs, s[:k]


# ---------------------------------------------------------------------------------------------------------------------

def options():
    parser = argparse.ArgumentParser(description=__doc__)
    stage01.common_options(parser)
    parser.add_argument("--source", nargs="+", metavar="NAME", help="sources of annotations.h5 "
                        "(default: all of them on the demo, otherwise go_all, which stage 04 trains by default)")
    parser.add_argument("--embedder", choices=("lsa",), default="lsa")
    parser.add_argument("--mode", choices=("concat", "avg"), default="concat",
                        help="one text a gene, or the mean over its GO terms (default: concat)")
    return parser.parse_args()


def main():
    args = options()
    space = stage01.space_of(args.dataset)
    annotations = args.root / "data" / space / "annotations.h5"
    folder = annotations.parent / "embeddings"
    sources = args.source or ["go_all"]
    if space == "demo" and not args.source:
        with stage01.open_h5(annotations, "01_fetch_annotations.py") as file:
            sources = [s for s in file if args.mode == "concat" or "terms" in file[s]]
    for source in sources:
        path = folder / f"{source}.{args.embedder}.{args.mode}.h5"
        genes, texts, average = read_texts(annotations, source, args.mode)
        digest = hashlib.sha256(json.dumps([list(genes), list(texts), average.indices.tolist()]).encode()).hexdigest()
        made = json.dumps({"options": {"embedder": args.embedder, "mode": args.mode, "lsa_dim": LSA_DIM},
                           "inputs": {f"annotations.h5 {source}": digest}}, sort_keys=True)
        if stage01.is_current(path, made, args.force):
            continue
        vectors = (average @ lsa(texts, np.bincount(average.indices))).astype(np.float32)
        with stage01.write_h5(path, made) as file:
            stage01.write_strings(file, "genes", genes)
            file["vectors"] = vectors
            file.attrs.update(source=source, embedder=args.embedder, mode=args.mode, dim=vectors.shape[1])
        print(f"{path}: {len(genes):,} vectors of {vectors.shape[1]} dimensions")
    print("next: python 03_prepare_data.py" + ("" if args.dataset == "demo" else f" --dataset {args.dataset}"))


if __name__ == "__main__":
    stage01.run(main)
