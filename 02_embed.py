"""Stage 02: gene texts -> gene vectors, data/<space>/embeddings/<source>.<embedder>.<mode>.h5

    python 02_embed.py                                              the demo: every source, offline (lsa)
    python 02_embed.py --dataset norman                             the released scGenePT vectors of go_all
    python 02_embed.py --dataset norman --source genept             GenePT's, from its own archive
    python 02_embed.py --dataset norman --source ncbi --embedder lsa --color pathways.tsv:pathway
    python 02_embed.py --dataset norman --source go_c --mode avg --embedder openai --model text-embedding-3-large --dry-run
    python 02_embed.py --dataset norman --source names --embedder openai --model meta-llama/Llama-3.1-8B \\
                       --base-url http://localhost:8000/v1          vLLM, Ollama, llama.cpp, TEI, ...

A file holds `genes` (N) and `vectors` (N, d) float32; a figure beside it shows their projection. Modes: `concat` embeds
one text a gene, `avg` embeds each GO term alone and takes the mean over the gene's terms. Embedders: `published` (the
vectors that the authors released), `openai` (any server with the OpenAI embeddings API; the key comes from
OPENAI_API_KEY; what it answered is kept in embeddings/.cache, so nothing is paid for twice), `lsa` (TF-IDF and a
truncated SVD of the texts: offline, a plain baseline; each source has a space of its own).
"""
import argparse
import csv
import hashlib
import importlib
import io
import json
import lzma
import math
import os
import re
import struct
import sys
import threading
import urllib.parse
import zipfile
import zlib
from array import array
from collections import Counter

import numpy as np

stage01 = importlib.import_module("01_fetch_annotations")

BUCKET = "https://czi-scgenept-public.s3.amazonaws.com/models/gene_embeddings/"
GENEPT = {"url": "https://zenodo.org/api/records/10833191/files/GenePT_emebdding_v2.zip/content",
          "size": 574_395_233, "md5": "3f6ce4317e3a0091978ae5cb8fbf05a3"}
PUBLISHED = {  # (source, mode): a pickle of the bucket, or a member of GenePT's archive; spelled as released
    ("ncbi", "concat"): "NCBI_gene_embeddings-gpt3.5-ada.pickle",
    ("ncbi+uniprot", "concat"): "NCBI%2BUniProt_embeddings-gpt3.5-ada.pkl",
    ("go_f", "concat"): "GO_F_gene_embeddings-gpt3.5-ada-concat.pickle",
    ("go_c", "concat"): "GO_C_gene_embeddings-gpt3.5-ada-concat.pickle",
    ("go_p", "concat"): "GO_P_gene_embeddings-gpt3.5-ada-concat.pickle",
    ("go_all", "concat"): "GO_all_gene_embeddings-gpt3.5-ada-concat.pickle",
    ("go_f", "avg"): "GO_F_gene_embeddings-gpt3.5-ada-avg.pickle",
    ("go_c", "avg"): "GO_C_gene_embeddings-gpt3.5-ada-avg.pickle",
    ("go_p", "avg"): "GO_P_gene_embedding-gpt3.5-ada-avg.pickle",
    ("go_all", "avg"): "GO_all_gene_embeddings-gpt3.5-ada-avg.pickle",
    ("genept", "concat"): "GenePT_gene_embedding_ada_text.pickle",
    ("genept_protein", "concat"): "GenePT_gene_protein_embedding_model_3_text.pickle",
}
MAX_STACK, MAX_DEPTH, MAX_MEMO = 100_000, 20, 5_000_000  # of a pickle; the released ones stay far below

OPENAI_URL = "https://api.openai.com/v1"
MAX_INPUTS, MAX_REQUEST_TOKENS, MAX_TEXT_TOKENS = 2048, 300_000, 8_191  # the API's limits
BYTES_PER_TOKEN = 4  # of English, for estimates; the limits are kept with 3, which leaves a margin
N_IN_FLIGHT, N_ATTEMPTS = 4, 8
DOLLARS_PER_MILLION_TOKENS = {"text-embedding-ada-002": 0.10, "text-embedding-3-small": 0.02, "text-embedding-3-large": 0.13}
PRICES_NOTED = "May 2026"

LSA_DIM = 256  # most dimensions of an lsa vector
MAX_POINTS = 20_000  # of a figure


# ---------------------------------------------------------------------------------------------------------------------
# The texts

def read_texts(path, source, mode, made_by, max_bytes=None):
    """What is to be embedded for one source of annotations.h5: `genes` (N), the distinct `texts` (T), cut to `max_bytes`,
    and the sparse matrix (N, T) that takes text vectors to gene vectors (concat: a single 1 in each row; avg: 1 / number
    of terms)."""
    import scipy.sparse
    with stage01.open_h5(path, made_by) as file:
        if source not in file:
            sys.exit(f"error: {path}: no texts of the source {source!r} in it (there are: {', '.join(stage01.in_order(file))}); "
                     f"run first: python {made_by}")
        if mode == "avg" and stage01.find(file, f"{source}/terms", path) is None:
            sys.exit(f"error: {path}: source {source!r} has no terms one by one; use --mode concat")
        genes, texts, offsets = (stage01.find(file, f"{source}/{name}", path) for name in (
            ("genes", "terms", "term_offsets") if mode == "avg" else ("genes", "text", "genes")))
        genes, texts = genes.asstr()[:], texts.asstr()[:]
        offsets = offsets[:] if mode == "avg" else np.arange(len(genes) + 1)
        n_texts = np.diff(offsets)
        if offsets.dtype.kind not in "iu" or offsets.shape != (len(genes) + 1,) or offsets[0] != 0 or offsets[-1] != len(texts) or n_texts.min() < 1:
            raise ValueError(f"genes and texts of {source!r} do not fit")
    for i in [i for i, text in enumerate(texts) if max_bytes and len(text.encode()) > max_bytes]:
        gene = genes[np.searchsorted(offsets, i, "right") - 1]
        print(f"{gene}: text of {len(texts[i]):,} characters cut to {max_bytes:,} bytes")
        texts[i] = texts[i].encode()[:max_bytes].decode(errors="ignore")
    distinct, idx = np.unique(texts.astype(object), return_inverse=True)
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
            values.append(1 + math.log(n))
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
    basis = np.random.default_rng(0).standard_normal((matrix.shape[1], width)).astype(matrix.dtype)
    for _ in range(6):
        basis = np.linalg.qr(matrix.T @ (matrix @ basis))[0]
    _, s, rotation = np.linalg.svd(matrix @ basis, full_matrices=False)
    k = min(k, int((s > 1e-6 * s[0]).sum()))
    directions = basis @ rotation[:k].T
    signs = np.sign(directions[np.abs(directions).argmax(0), np.arange(k)])  # the largest entry is positive
    return directions * signs, s[:k]


# ---------------------------------------------------------------------------------------------------------------------
# published: pickles, read without ever building what they ask for

def published(source, mode, folder):
    """The released vectors of a source: their file (downloaded if need be), its address, and a function that reads genes
    (N) and vectors (N, d) from it."""
    if (source, mode) not in PUBLISHED:
        sys.exit(f"error: no published vectors for --source {source} --mode {mode}; there are "
                 + ", ".join(f"{s} ({m})" for s, m in PUBLISHED) + "; for others use --embedder openai or lsa")
    name = PUBLISHED[source, mode]
    if source.startswith("genept"):
        path = stage01.download(GENEPT["url"], folder / "GenePT_emebdding_v2.zip", size=GENEPT["size"], md5=GENEPT["md5"])
        return path, GENEPT["url"], lambda: read_zip(path, name)
    path = stage01.download(BUCKET + name, folder / urllib.parse.unquote(name))
    return path, BUCKET + name, lambda: read_pickle(path)


def read_pickle(path):
    with open(path, "rb", buffering=2**16) as file:
        return stack_vectors(path, read_vectors(path, file, os.path.getsize(path)))


def read_zip(path, name):
    try:
        with zipfile.ZipFile(path) as archive:
            member = next((m for m in archive.infolist() if m.filename.split("/")[-1] == name), None)
            if member is None:
                sys.exit(f"error: {path}: no {name} in it")
            if member.file_size > max(2**28, 100 * member.compress_size):  # packed numbers are half their size, no less
                sys.exit(f"error: {path}: {name} in it declares to unpack to {member.file_size / 1e9:,.1f} GB, which no vectors do")
            with io.BufferedReader(archive.open(member), 2**16) as file:
                return stack_vectors(path, read_vectors(f"{path}: {name}", file, member.file_size))
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {path}: not a whole zip file ({error}); delete it and run again")


def stack_vectors(path, table):
    """Genes (N) and vectors (N, d) float32 of a dict gene -> float array; ends the run on ragged or non-finite ones."""
    if not table:
        sys.exit(f"error: {path}: no vectors in it")
    genes, dim = list(table), len(next(iter(table.values())))
    vectors = np.empty((len(genes), dim), np.float32)
    for i, gene in enumerate(genes):
        vector = np.asarray(table.pop(gene))
        if len(vector) != dim or dim == 0:
            sys.exit(f"error: {path}: the vector of {gene!r} has {len(vector)} numbers, that of {genes[0]!r} {dim}")
        if not np.isfinite(vector).all():
            sys.exit(f"error: {path}: the vector of {gene!r} has numbers that are not finite")
        vectors[i] = vector
    return genes, vectors


def new_dtype(code, *_):
    if code not in ("f2", "f4", "f8", "i4", "i8"):
        raise ValueError(f"an array of dtype {(code[:40] if isinstance(code, str) else type(code).__name__)!r} is refused")
    return [code, "<"]  # a list, since BUILD sets the byte order afterwards


def array_values(raw, dtype, shape):
    """The bytes of a numpy vector as array("f")."""
    if not isinstance(dtype, list) or dtype[1] not in ("<", ">", "=", "|"):
        raise ValueError("an array without a proper dtype is refused")
    code, order = dtype
    values = np.frombuffer(raw, np.dtype(order + code))
    if [n for n in shape if n != 1] != [n for n in values.shape if n != 1]:
        raise ValueError("an array that is no vector is refused")
    with np.errstate(over="ignore"):  # what overflows is found as not finite afterwards
        return array("f", values.astype(np.float32).tobytes())


# What a pickled numpy array names, and what is done instead of calling it. (Protocol 2 spells bytes as _codecs.encode.)
ADMITTED = {"numpy.ndarray": lambda *_: None, "numpy.dtype": new_dtype,
            "_codecs.encode": lambda text, _: text.encode("latin1")}
for module in ("numpy.core", "numpy._core"):  # before and since numpy 2
    ADMITTED[f"{module}.multiarray._reconstruct"] = lambda *_: array("f")  # empty; BUILD brings shape, dtype and bytes
    ADMITTED[f"{module}.multiarray.scalar"] = lambda dtype, raw: array_values(raw, dtype, (1,))[0]
    ADMITTED[f"{module}.numeric._frombuffer"] = lambda raw, dtype, shape, *_: array_values(raw, dtype, shape)
COUNTED = {b"\x8c": (1, str), b"X": (4, str), b"\x8d": (8, str),  # opcode: bytes of the length that follows, type
           b"C": (1, bytes), b"B": (4, bytes), b"\x8e": (8, bytes), b"\x96": (8, bytes)}


def read_vectors(path, file, size):
    """The dict str -> array("f") in a pickle (protocol 2 to 5) of lists, tuples or numpy arrays of numbers, read from a
    buffered file of `size` bytes. Lists become float32 arrays while they are read, so a file of Python floats
    takes half its own size in memory. Anything but dict, list, tuple, float, int, str and numpy arrays ends the run, by
    name, before it is built. Opcodes: the comments of Python's pickletools.
    """
    stack, outer, memo, n_numbers = [], [], {}, 0  # outer: the stacks below the open MARKs

    def exactly(n):
        if n > 2**16 and n > size - file.tell():  # a declared length allocates nothing that is not there
            raise EOFError
        data = file.read(n)
        if len(data) < n:
            raise EOFError
        return data

    def remember(key):
        """Keep the top of the stack for a later GET, unless it is long text or bytes, or holds them: those are the bytes
        of an array, which no pickler refers to twice, and together they would outweigh the vectors."""
        parts = stack[-1] if isinstance(stack[-1], tuple) else [stack[-1]]
        memo[key] = None if any(isinstance(part, (str, bytes)) and len(part) > 256 for part in parts) else stack[-1]

    def line():
        return file.readline(256).decode("utf-8", "replace").rstrip("\n")

    def floats():
        """The number after a BINFLOAT opcode and those of the BINFLOATs that follow at once, as far as buffered."""
        ahead = file.peek(9000)[:9000]
        n = (len(ahead) + 1) // 9
        if n < 2:
            return struct.unpack(">d", exactly(8))
        others = np.flatnonzero(np.frombuffer(ahead, np.uint8)[8:9 * n - 1:9] != ord("G"))
        n = 1 + int(others[0]) if len(others) else n
        file.read(9 * n - 1)
        return np.ndarray(n, ">f8", ahead, 0, (9,)).tolist()

    def admitted(module, name):
        full = ".".join([module, name])
        if full not in ADMITTED:
            raise ValueError(f"it asks for {full[:80]!r}, which is refused")
        return ADMITTED[full]

    def vector(value):
        if isinstance(value, tuple):
            value = array("f", value)
        if not isinstance(value, array):
            raise ValueError(f"a {type(value).__name__} where a vector was expected")
        return counted(value)

    def counted(values):
        nonlocal n_numbers
        n_numbers += len(values)
        if n_numbers > 2 * size:  # one object under a thousand names
            raise ValueError("it unfolds to more numbers than it has bytes")
        return values

    def set_items(table, items):
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                raise ValueError(f"a key is no string but a {type(key).__name__}")
            if "\0" in key:
                raise ValueError(f"a key with a NUL in it: {key[:40]!r}")
            table[key] = vector(value)

    try:
        if exactly(1) != b"\x80" or exactly(1) not in b"\2\3\4\5":
            raise ValueError("not a pickle of protocol 2 to 5")
        while (op := exactly(1)) != b".":
            if op == b"G":
                stack.extend(floats())
            elif op in COUNTED:
                width, kind = COUNTED[op]
                data = exactly(int.from_bytes(exactly(width), "little"))
                stack.append(data.decode() if kind is str else data)
            elif op in b"K\x8a":
                stack.append(exactly(1)[0] if op == b"K" else int.from_bytes(exactly(exactly(1)[0]), "little", signed=True))
            elif op in b"MJ":
                stack.append(struct.unpack("<H", exactly(2))[0] if op == b"M" else struct.unpack("<i", exactly(4))[0])
            elif op in b"N\x88\x89":
                stack.append({b"N": None, b"\x88": True, b"\x89": False}[op])
            elif op == b"}":
                stack.append({})
            elif op == b"]":
                stack.append(array("f"))
            elif op == b"(":
                outer.append(stack)
                stack = []
            elif op in b"eut":
                items, stack = stack, outer.pop()
                if op == b"e":
                    stack[-1].extend(items)
                elif op == b"u":
                    set_items(stack[-1], items)
                else:  # a tuple of floats is a gene's vector
                    stack.append(array("f", items) if items and isinstance(items[0], float) else tuple(items))
            elif op == b"a":
                item = stack.pop()
                stack[-1].append(item)
            elif op == b"s":
                value, key = stack.pop(), stack.pop()
                set_items(stack[-1], [key, value])
            elif op in b")\x85\x86\x87":
                n = b")\x85\x86\x87".index(op)
                stack[len(stack) - n:] = [tuple(stack[len(stack) - n:])]
            elif op in b"ci":
                stack.append(admitted(line(), line()))
            elif op == b"\x93":
                name, module = stack.pop(), stack.pop()
                stack.append(admitted(module, name))
            elif op == b"R":
                arguments, function = stack.pop(), stack.pop()
                stack.append(function(*arguments))
            elif op == b"b":
                state = stack.pop()
                if isinstance(stack[-1], array):
                    _, shape, dtype, _, raw = state
                    stack[-1].extend(counted(array_values(raw, dtype, shape)))
                elif isinstance(stack[-1], list):
                    stack[-1][1] = state[1]
                else:
                    raise ValueError(f"a state for a {type(stack[-1]).__name__} is refused")
            elif op == b"\x94":
                remember(len(memo))
            elif op in b"qr":
                remember(int.from_bytes(exactly(1 if op == b"q" else 4), "little"))
            elif op in b"hj":
                stack.append(memo[int.from_bytes(exactly(1 if op == b"h" else 4), "little")])
            elif op == b"\x95":
                exactly(8)  # FRAME: only tells how much to read ahead
            else:
                import pickletools
                known = pickletools.code2op.get(op.decode("latin1"))
                raise ValueError(f"opcode {known.name if known else op} is refused")
            if len(stack) > MAX_STACK or len(outer) > MAX_DEPTH or len(memo) > MAX_MEMO:
                raise ValueError("nested or repeated beyond what vectors need")
        table, = stack
        if not isinstance(table, dict):
            raise ValueError("no dict of vectors")
        return table
    except (EOFError, ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        gene = next((item for item in reversed(sum(outer, []) + stack) if isinstance(item, str)), None)
        reason = ("it ends in the middle" if isinstance(error, EOFError) else
                  "not a pickle of vectors" if isinstance(error, (LookupError, AttributeError)) else str(error))
        sys.exit(f"error: {path}: {reason}{f' (near {gene[:40]!r})' if gene else ''}; delete it, or get it again")


# ---------------------------------------------------------------------------------------------------------------------
# openai: any server with the OpenAI embeddings API

def openai_vectors(genes, texts, average, model, base_url, batch_size, cache, dry_run):
    """Vectors (N, d) from a server, or None in a dry run, which only prints what it would cost. Each finished batch is
    a file of the folder `cache` at once, and only texts that no such file holds are sent."""
    position = {hashlib.sha256(text.encode()).digest(): i for i, text in enumerate(texts)}  # column of `average`
    missing, dims = dict.fromkeys(position.values()), set()
    for idx, vectors in cached(cache, position):
        dims.add(vectors.shape[1])
        for i in idx:
            del missing[i]
    n_tokens = sum(math.ceil(len(texts[i].encode()) / BYTES_PER_TOKEN) for i in missing)
    price = DOLLARS_PER_MILLION_TOKENS.get(model)
    cost = (f"about ${n_tokens * price / 1e6:.4f} ({model}, price noted in {PRICES_NOTED})" if price is not None else
            f"no price known for {model}")
    print(f"{len(genes):,} genes, {len(position):,} distinct texts, {len(position) - len(missing):,} of them embedded "
          f"before; to send: {len(missing):,} texts, about {n_tokens:,} tokens, {cost}", flush=True)
    if dry_run:
        return None
    if missing:
        send([texts[i] for i in missing], model, base_url, batch_size, cache, dims)

    average, total = average.tocsc(), None
    for idx, vectors in cached(cache, position):  # one batch in memory at a time: a million terms are too many at once
        if total is None:
            total = np.zeros((len(genes), vectors.shape[1]))
        part = average[:, idx].tocsr()
        rows = np.flatnonzero(np.diff(part.indptr))
        total[rows] += part[rows] @ vectors
    return total


def cached(cache, position):
    """Yield, for each batch on disk, where its texts stand in `position` (n) and their vectors (n, d); each text once."""
    left = dict(position)
    for path in sorted(cache.glob("*.npz")):
        try:
            with np.load(path) as batch:
                found = [(left.pop(key.tobytes()), row) for row, key in enumerate(batch["keys"]) if key.tobytes() in left]
                if found:
                    idx, rows = zip(*found)
                    yield list(idx), batch["vectors"][list(rows)]
        except (ValueError, LookupError, EOFError, TypeError, RuntimeError, zlib.error, zipfile.BadZipFile) as error:
            sys.exit(f"error: {path}: damaged ({error}); delete it, and its texts are sent again")


def send(texts, model, base_url, batch_size, cache, dims):
    """Embed texts with several requests in flight, each finished batch to a file of `cache`: `keys` (n, 32), the SHA-256
    of each text, and `vectors` (n, d). `dims`: the set of d so far. Ends the run on what the server refuses."""
    from concurrent.futures import ThreadPoolExecutor, as_completed
    import openai
    from tqdm import tqdm
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key and base_url == OPENAI_URL:
        sys.exit("error: set the environment variable OPENAI_API_KEY, or name another server with --base-url")
    if not re.fullmatch(r"[!-~]*", key):  # such a key would be quoted in the HTTP library's error
        sys.exit("error: OPENAI_API_KEY holds blanks or letters that no key has")
    client = openai.OpenAI(api_key=key or "none", base_url=base_url, max_retries=0, timeout=10 * stage01.TIMEOUT)  # of a slow server of one's own
    stop = threading.Event()

    def embed(batch):
        if stop.is_set():
            return 0
        try:
            vectors = request(client, model, batch, key, stop)
        except BaseException:
            stop.set()  # what the server refuses once it need not be asked again
            raise
        dims.add(vectors.shape[1])
        if len(dims) > 1:
            sys.exit(f"error: {base_url}: vectors of different lengths ({', '.join(map(str, sorted(dims)))} numbers); "
                     f"if the model has changed, delete {cache}")
        keys = np.array([np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in batch])
        with stage01.replacing(cache / f"{hashlib.sha256(keys.tobytes()).hexdigest()[:32]}.npz") as partial:
            with open(partial, "wb") as file:
                np.savez(file, keys=keys, vectors=vectors)
        return len(batch)

    pool = ThreadPoolExecutor(N_IN_FLIGHT)
    try:
        done = as_completed([pool.submit(embed, batch) for batch in batches(texts, batch_size)])
        with tqdm(total=len(texts), unit=" texts", disable=None) as bar:
            for future in done:
                bar.update(future.result())
    finally:  # what is in flight still finishes, and is kept
        stop.set()
        pool.shutdown(cancel_futures=True)


def batches(texts, batch_size):
    """Yield lists of texts within the API's limits on texts and tokens a request."""
    batch, n_bytes = [], 0
    for text in texts:
        n = len(text.encode())
        if len(batch) == batch_size or n_bytes + n > 3 * MAX_REQUEST_TOKENS:
            yield batch
            batch, n_bytes = [], 0
        batch.append(text)
        n_bytes += n
    yield batch


def request(client, model, batch, key, stop):
    """Vectors (n, d) float32 of one batch of texts. Waits and tries again when the server is busy, broken or away."""
    import openai
    for attempt in range(N_ATTEMPTS):
        try:
            data = client.embeddings.create(model=model, input=batch).data
            if sorted(item.index for item in data) != list(range(len(batch))):
                sys.exit(f"error: {client.base_url}: {len(data)} vectors for {len(batch)} texts")
            vectors = np.array([item.embedding for item in sorted(data, key=lambda item: item.index)], dtype=np.float32)
            if vectors.ndim != 2 or not vectors.shape[1] or not np.isfinite(vectors).all():
                sys.exit(f"error: {client.base_url}: vectors of no length, or with numbers that are not finite")
            return vectors
        except openai.APIConnectionError as error:
            reason, wait = f"no answer ({stage01.without(key, error.__cause__ or error)})", 0
        except openai.APIStatusError as error:
            reason, wait = f"status {error.status_code}: {stage01.without(key, error.message)}", stage01.retry_after(error.response)
            if error.status_code in (401, 403):  # such answers quote parts of the key
                sys.exit(f"error: {client.base_url} refuses the key ({error.status_code}); check OPENAI_API_KEY")
            if error.status_code == 404:
                sys.exit(f"error: {client.base_url} knows no model {model!r} (404); check --model, and --base-url, "
                         "which usually ends in /v1")
            if (error.status_code < 500 and error.status_code not in (408, 409, 429)) or error.code == "insufficient_quota":
                sys.exit(f"error: {client.base_url}: {reason}")
        except (openai.OpenAIError, AttributeError, TypeError, ValueError, RecursionError) as error:
            sys.exit(f"error: {client.base_url}: no answer of the embeddings API ({stage01.without(key, error)})")
        if stop.is_set() or attempt == N_ATTEMPTS - 1 or wait > stage01.LONGEST_WAIT:
            break
        wait = max(wait, stage01.FIRST_WAIT * 2 ** attempt / 2)
        sys.stderr.write(f"{client.base_url}: {reason}; next try in {wait:.0f} s\n")  # one write: other threads write, too
        stop.wait(wait)
    sys.exit(f"error: {client.base_url}: {reason}; the same command goes on from what is already on disk")


# ---------------------------------------------------------------------------------------------------------------------
# The figure

def read_column(spec):
    """The name of a column and its values by gene, from FILE.tsv:COLUMN (tab-separated, with a column `gene`)."""
    path, _, column = spec.rpartition(":")
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, delimiter="\t")
            if not {"gene", column} <= set(rows.fieldnames or ()):
                sys.exit(f"error: --color {spec}: expected FILE.tsv:COLUMN, tab-separated, with columns gene and COLUMN")
            return column, {row["gene"]: row[column] or "" for row in rows}
    except (UnicodeDecodeError, csv.Error) as error:
        sys.exit(f"error: {path}: not a tab-separated file in UTF-8 ({error})")


def some_vectors(path, most):
    """At most `most` genes (n) of an embedding file, drawn at random, their vectors (n, d), and how many genes it has."""
    genes, vectors = stage01.read_embeddings(path, "02_embed.py")
    shown = np.sort(np.random.default_rng(0).permutation(len(genes))[:most])
    return genes[shown], vectors[shown], len(genes)


def project(vectors):
    """Two coordinates (n, 2) for n vectors, and the axes' names: UMAP where umap-learn is installed, else PCA."""
    try:
        import umap
        return umap.UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(vectors), ["UMAP 1", "UMAP 2"]
    except ImportError:
        centred = vectors - vectors.mean(axis=0)
        directions, s = leading_directions(centred, 2)
        shares = np.pad(s ** 2 / max((centred ** 2).sum(), 1e-30), (0, 2 - len(s)))
        return (np.pad(centred @ directions, ((0, 0), (0, 2 - len(s)))),
                [f"principal component {i + 1} ({share:.0%} of the variance)" for i, share in enumerate(shares)])


def draw(path, title, vectors, labels, legend):
    """Draw the projection of vectors (n, d), coloured by n labels: numbers on a scale, words as categories (the most
    frequent ones in colours, the others grey like points without a label)."""
    xy, axis_names = project(vectors)
    figure, colors = stage01.new_figure(7, 5.5, title), stage01.COLORS
    axes = figure.subplots()
    style = {"s": 8 if len(labels) > 1000 else 25, "linewidths": 0, "alpha": 0.6}
    try:
        numbers = np.array([float(label or "nan") for label in labels])
    except ValueError:
        numbers = None
    if numbers is not None and np.isfinite(numbers).any():
        axes.scatter(*xy[~np.isfinite(numbers)].T, color="#BBBBBB", **style)
        known = np.isfinite(numbers)
        figure.colorbar(axes.scatter(*xy[known].T, c=numbers[known], cmap="viridis", **style), label=legend)
    else:
        groups = dict(zip([label for label, _ in Counter(filter(None, labels)).most_common(len(colors))], colors))
        other = [i for i, label in enumerate(labels) if label not in groups]
        axes.scatter(*xy[other].T, color="#BBBBBB" if groups else colors[0], label="other" if other else None, **style)
        for group, color in groups.items():
            axes.scatter(*xy[[label == group for label in labels]].T, color=color, label=group, **style)
        if groups:
            figure.legend(title=legend, loc="outside right upper", fontsize=8)
    axes.set(xlabel=axis_names[0], ylabel=axis_names[1])
    stage01.save_figure(figure, path)
    print(f"{path}: projection")


# ---------------------------------------------------------------------------------------------------------------------

def options():
    parser = argparse.ArgumentParser(description=__doc__)
    stage01.common_options(parser)
    parser.add_argument("--source", nargs="+", metavar="NAME", help=f"{', '.join(stage01.SOURCES)}, a name of your own, or "
                        "with published genept, genept_protein (default: all there are on the demo, otherwise go_all, which "
                        "stage 04 trains by default)")
    parser.add_argument("--embedder", choices=("published", "openai", "lsa"),
                        help="(default: lsa on the demo, otherwise published)")
    parser.add_argument("--mode", choices=("concat", "avg"), default="concat",
                        help="embed one text a gene, or each GO term and take the mean (default: concat)")
    parser.add_argument("--color", metavar="FILE.tsv:COLUMN", help="colour the figure's points by a column of a "
                        "tab-separated file with a column gene")
    group = parser.add_argument_group("with --embedder openai")
    group.add_argument("--model", default="text-embedding-ada-002", metavar="NAME", help="(default: text-embedding-ada-002)")
    group.add_argument("--base-url", default=os.environ.get("OPENAI_BASE_URL") or OPENAI_URL, metavar="URL",
                       help=f"the server (default: OPENAI_BASE_URL, or {OPENAI_URL})")
    group.add_argument("--batch-size", type=int, default=512, metavar="N", help="most texts a request; the API takes 2048, "
                       "some servers fewer (default: 512)")
    group.add_argument("--dry-run", action="store_true", help="print texts, tokens and cost (estimates); send nothing")
    args = parser.parse_args()
    args.base_url = args.base_url.rstrip("/")
    args.embedder = args.embedder or ("lsa" if args.dataset == "demo" else "published")
    if not 1 <= args.batch_size <= MAX_INPUTS:
        sys.exit(f"error: --batch-size {args.batch_size}: from 1 to {MAX_INPUTS}")
    if not re.fullmatch(r"https?://([\w.-]+|\[[0-9a-fA-F:]+\])(:\d{1,5})?(/[!-~]*)?", args.base_url, re.ASCII) or re.search("[@?#]", args.base_url):
        sys.exit("error: --base-url: expected http://host/v1 or https://host/v1, with no password in it")
    if args.embedder == "published" and args.dataset == "demo":
        sys.exit("error: nobody has published vectors for the demo's invented genes; use --embedder lsa or openai")
    if args.dry_run and args.embedder != "openai":
        sys.exit(f"error: --dry-run: --embedder {args.embedder} sends nothing and costs nothing")
    return args


def embed_source(args, source, embedder, path):
    """Make the file `path` of one source, unless it is there already (or this is a dry run); whether it was made."""
    data = args.root / "data" / stage01.space_of(args.dataset)
    decides, origin = {"embedder": embedder, "mode": args.mode}, {}
    if args.embedder == "published":
        released, url, read = published(source, args.mode, data / "raw")
        made, origin = stage01.made_from(decides, [released]), {"url": url}
    else:
        made_by = ("01_fetch_annotations.py" + ("" if args.dataset == "demo" else f" --dataset {args.dataset}")
                   + (f" --source {source}" if source in stage01.SOURCES else f" --tsv {source}=FILE"))
        genes, texts, average = read_texts(data / "annotations.h5", source, args.mode, made_by,
                                           3 * MAX_TEXT_TOKENS if args.embedder == "openai" else None)
        decides |= {"dim": LSA_DIM} if args.embedder == "lsa" else {"model": args.model, "base_url": args.base_url}
        content = json.dumps([list(genes), list(texts), average.indices.tolist(), average.indptr.tolist()])
        inputs = {f"annotations.h5 {source}": hashlib.sha256(content.encode()).hexdigest()}  # other sources do not count
        made = json.dumps({"options": decides, "inputs": inputs}, sort_keys=True)
    if stage01.is_current(path, made, args.force):
        return False
    if args.embedder == "published":
        genes, vectors = read()
        origin["sha256"] = stage01.checksum(released, "sha256")
    elif args.embedder == "lsa":
        vectors = average @ lsa(texts, np.bincount(average.indices))
    else:
        cache = path.parent / ".cache" / f"{embedder}.{hashlib.sha256(args.base_url.encode()).hexdigest()[:8]}"
        vectors = openai_vectors(genes, texts, average, args.model, args.base_url, args.batch_size, cache, args.dry_run)
        if args.dry_run:
            return False
        origin = {"model": args.model, "base_url": args.base_url}
    with stage01.write_h5(path, made) as file:
        stage01.write_strings(file, "genes", genes)
        file["vectors"] = vectors.astype(np.float32, copy=False)
        file.attrs.update(source=source, embedder=embedder, mode=args.mode, dim=vectors.shape[1], **origin)
    print(f"{path}: {len(genes):,} vectors of {vectors.shape[1]:,} numbers")
    return True


def main():
    args = options()
    space = stage01.space_of(args.dataset)
    folder = args.root / "data" / space / "embeddings"
    column, label_of = read_column(args.color) if args.color else ("", {})
    note = "SYNTHETIC: invented genes\n" if space == "demo" else ""
    sources = args.source or ["go_all"]
    if space == "demo" and not args.source:
        annotations = folder.parent / "annotations.h5"
        with stage01.open_h5(annotations, "01_fetch_annotations.py") as file:
            sources = [s for s in file if args.mode == "concat" or stage01.find(file, f"{s}/terms", annotations) is not None]
    embedder = re.sub(r"[^A-Za-z0-9.+-]+", "_", args.model) if args.embedder == "openai" else args.embedder

    made_any = False
    paths = [folder / f"{stage01.check_name(source, '--source')}.{embedder}.{args.mode}.h5" for source in sources]
    for source, path in zip(sources, paths):
        made = embed_source(args, source, embedder, path)
        made_any |= made
        figure = path.with_suffix(".png")
        if not args.dry_run and (made or args.color or not figure.exists()):
            genes, vectors, n_all = some_vectors(path, MAX_POINTS)
            of = f" of {n_all:,}" if len(genes) < n_all else ""
            draw(figure, f"{note}{source}, {embedder}, {args.mode}: {len(genes):,}{of} genes", vectors,
                 [label_of.get(gene, "") for gene in genes], column)
    if made_any and len(sources) > 1 and embedder != "lsa":  # lsa: another space for each source
        read = [some_vectors(path, MAX_POINTS // len(sources)) for path in paths]
        if len({vectors.shape[1] for _, vectors, _ in read}) == 1:
            labels = [source for source, (genes, _, _) in zip(sources, read) for _ in genes]
            draw(folder / f"sources.{embedder}.{args.mode}.png", f"{note}{embedder}, {args.mode}",
                 np.vstack([vectors for _, vectors, _ in read]), labels, "source")
    if not args.dry_run:
        print("next: python 03_prepare_data.py" + ("" if args.dataset == "demo" else f" --dataset {args.dataset}")
              + ("" if args.dataset in ("demo", *stage01.HOSTED) else " --h5ad FILE"))


if __name__ == "__main__":
    stage01.run(main)
