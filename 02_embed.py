"""Stage 02: gene texts -> gene vectors, data/<space>/embeddings/<source>.<embedder>.<mode>.h5

    python 02_embed.py                                              the demo: every source, offline (lsa)
    python 02_embed.py --dataset norman                             the released scGenePT vectors of go_all
    python 02_embed.py --dataset norman --source genept             GenePT's, from its own archive
    python 02_embed.py --dataset norman --source ncbi --embedder lsa --color pathways.tsv:pathway
    python 02_embed.py --dataset norman --source go_c --mode avg --embedder openai --dry-run
    python 02_embed.py --dataset norman --source go_c --dim 64      their 64 leading principal components
    python 02_embed.py --dataset norman --source names --embedder openai --model meta-llama/Llama-3.1-8B \\
                       --base-url http://localhost:8000/v1          vLLM, Ollama, llama.cpp, TEI, ...

A file holds `genes` (N) and `vectors` (N, d) float32; a figure beside it shows their projection, by UMAP if
umap-learn is installed, else by PCA. With --dim N, the file's name and stage 04 call the embedder
<embedder>-N.
Modes: `concat` embeds one text per gene; `avg` embeds each GO term and averages them per gene.
Embedders: `published`, the vectors that the authors released; `openai`, a server with OpenAI's embeddings API
(the key comes from OPENAI_API_KEY; answers are kept in embeddings/.cache, so nothing is paid twice); `lsa`,
TF-IDF and a truncated SVD of the texts: offline, a plain baseline, each source in a space of its own.
"""
import argparse
import contextlib
import csv
import hashlib
import importlib
import io
import math
import os
import pickle
import re
import sys
import zipfile
from array import array
from collections import Counter

import numpy as np
import scipy.sparse.linalg
from tqdm import tqdm

shared = importlib.import_module("01_fetch_annotations")

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

OPENAI_URL = "https://api.openai.com/v1"
MAX_REQUEST_TOKENS, MAX_TEXT_TOKENS = 300_000, 8_191  # OpenAI's limits
WINDOWS = {  # the longest text of other models, in tokens; the name without owner and :tag
    "all-MiniLM-L6-v2": 256, "all-mpnet-base-v2": 384, "bge-small-en-v1.5": 512, "bge-base-en-v1.5": 512,
    "bge-large-en-v1.5": 512, "mxbai-embed-large": 512, "mxbai-embed-large-v1": 512}
BYTES_PER_TOKEN = 4  # of English, for estimates
MIN_BYTES_PER_TOKEN = 3  # cautious: gene symbols take more tokens than English
TOO_LARGE = 400, 413, 422  # how servers refuse a request with too many texts, or with too long a text
HOPELESS = b"too large", b"too long", b"insufficient_quota"  # in a 429 or 500: trying again cannot help
ADVICE = {  # status: what to do
    401: "check OPENAI_API_KEY", 403: "check OPENAI_API_KEY",
    404: "check --model, and --base-url, which usually ends in /v1"}
PRICES = {  # dollars per million tokens
    "text-embedding-ada-002": 0.10, "text-embedding-3-small": 0.02, "text-embedding-3-large": 0.13}
PRICES_NOTED = "May 2026"

LSA_MIN_DIM, LSA_MAX_DIM = 10, 256  # dimensions of an lsa vector, unless --dim says otherwise
CHANCE_MARGIN = 1.03  # a singular value has to exceed chance by this factor
MAX_POINTS, UMAP_MIN_POINTS = 20_000, 10  # the most in a figure; the fewest for UMAP


# ----------------------------------------------------------------------------------------------------------
# The texts

def read_texts(path, source, mode, made_by):
    """Genes (N) of a source of annotations.h5, the texts to embed for them (M), and offsets (N + 1).

    The texts of gene i are texts[offsets[i]:offsets[i + 1]]: one in the mode concat, its GO terms in avg.
    """
    with shared.read_h5(path, made_by) as file:
        if source not in file:
            there = shared.shown(shared.in_order(file))
            sys.exit(f"error: {path}: no source {source!r} in it (there are: {there}); run first: {made_by}")
        group = file[source]
        genes = group["genes"].asstr()[:]
        if mode == "concat":
            return genes, group["text"].asstr()[:], np.arange(len(genes) + 1)
        if "terms" not in group:
            sys.exit(f"error: {path}: source {source!r} has no separate terms; use --mode concat")
        return genes, group["terms"].asstr()[:], group["term_offsets"][:]


def distinct_texts(genes, texts, offsets):
    """The T distinct texts, a gene of each (T), and the sparse matrix (N, T) that averages their vectors.

    Its row of a gene holds 1 / (number of the gene's texts) for each of them: a single 1 in the mode concat.
    """
    distinct, first_idx, text_idx = np.unique(texts, return_index=True, return_inverse=True)
    n_texts = np.diff(offsets)
    shares = np.repeat(1 / n_texts, n_texts)
    average = scipy.sparse.csr_matrix((shares, text_idx, offsets), shape=(len(genes), len(distinct)))
    return distinct, np.repeat(genes, n_texts)[first_idx], average


# ----------------------------------------------------------------------------------------------------------
# lsa: TF-IDF and a truncated SVD (Deerwester et al. 1990), offline and deterministic

def lsa(texts, counts, dim=None):
    """Vectors (T, dim) of unit length for T distinct texts, each of which occurs `counts` (T) times.

    Without dim, choose_rank finds it. A text that shares no word with others gets zeros.
    Weights: (1 + log of the count in the text) * log((1 + N) / number of texts with the word).
    """
    tf = count_words(texts)
    n_texts_with = (tf > 0).T @ counts
    is_common = n_texts_with > 1  # a word of a single text says nothing about its likeness to others
    tf = tf[:, is_common]
    if not tf.nnz:
        sys.exit("error: lsa: no two texts share a word; use --embedder openai")
    idf = np.log((1 + counts.sum()) / n_texts_with[is_common])
    tfidf = unit_rows(tf @ scipy.sparse.diags(idf))

    # A text that occurs n times counts n times: the SVD takes squares, so its row is scaled by the root of n
    weighted = scipy.sparse.diags(np.sqrt(counts)) @ tfidf
    directions, values = leading_directions(weighted, dim or LSA_MAX_DIM)
    if dim and dim > len(values):
        sys.exit(f"error: --dim {dim}: lsa finds only {len(values)} dimensions in these texts")
    rank = dim or choose_rank(weighted, values)
    return unit_rows(tfidf @ directions[:, :rank])


def choose_rank(matrix, values):
    """How many of the leading singular values (k) of a matrix (texts, words) rise above noise.

    Dimensions of noise tell every gene apart, so that a model memorizes genes instead of learning what they
    share. Parallel analysis (Horn 1965): each word is shuffled among the texts, which keeps its frequency but
    not its neighbours. Dimensions count up to the first that is no stronger than after shuffling; the very
    first (what all texts share) always counts. CHANCE_MARGIN: pairs of words contain their own words, which
    lifts even random texts by 2%. LSA_MIN_DIM: in short texts real processes can fall below chance, and one
    dimension too few costs more than one too many.
    """
    rng = np.random.default_rng(0)
    columns = matrix.tocsc()
    rows = [rng.choice(matrix.shape[0], n, replace=False) for n in np.diff(columns.indptr)]
    shuffled = scipy.sparse.csc_matrix((columns.data, np.concatenate(rows), columns.indptr), matrix.shape)
    _, by_chance = leading_directions(shuffled.tocsr(), len(values))
    by_chance = np.pad(by_chance, (0, len(values) - len(by_chance)))
    n_above_chance = 1 + (values[1:] > CHANCE_MARGIN * by_chance[1:]).cumprod().sum()
    least = min(LSA_MIN_DIM, len(values))
    rank = max(n_above_chance, least)
    print(f"lsa: vectors of {rank} numbers ({n_above_chance} of {len(values)} directions rise above noise; "
          f"at least {least} are kept; --dim N keeps N)")
    return rank


def count_words(texts):
    """The sparse matrix (T, words) of 1 + log(how often the word occurs in the text)."""
    column_of = {}
    columns, values, offsets = array("i"), array("f"), array("q", [0])
    for text in texts:
        for word, count in Counter(words_of(text)).items():
            columns.append(column_of.setdefault(word, len(column_of)))
            values.append(1 + math.log(count))
        offsets.append(len(columns))
    shape = len(texts), len(column_of)
    return scipy.sparse.csr_matrix((values, columns, offsets), shape=shape, dtype=np.float64)


def words_of(text):
    """Yield lower-case words and neighbouring pairs (not across punctuation), no leading `Gene Symbol X`."""
    text = re.sub(r"^Gene Symbol \S+", "", text).lower()
    for clause in re.split(r"[,;:.()]", text):
        words = re.findall(r"\w+", clause)
        yield from words
        yield from zip(words, words[1:])


def unit_rows(matrix):
    """A matrix (dense or sparse) with its rows scaled to length 1; zero rows stay."""
    norm = scipy.sparse.linalg.norm if scipy.sparse.issparse(matrix) else np.linalg.norm
    norms = norm(matrix, axis=1)
    return scipy.sparse.diags(1 / np.where(norms > 0, norms, 1)) @ matrix


def leading_directions(matrix, k):
    """Right singular vectors (m, k) of a matrix (n, m), dense or sparse, and its singular values (k).

    Largest first; fewer if the rank is below k. Block power iteration (Halko et al. 2011, algorithm 4.4).
    """
    width = min(k + 16, *matrix.shape)
    basis = np.random.default_rng(0).standard_normal((matrix.shape[1], width)).astype(matrix.dtype)
    for _ in range(6):
        basis, _ = np.linalg.qr(matrix.T @ (matrix @ basis))
    _, values, rotation = np.linalg.svd(matrix @ basis, full_matrices=False)
    k = min(k, (values > 1e-6 * values[0]).sum())
    directions = basis @ rotation[:k].T

    # Singular vectors are known up to their sign: make the largest entry of each positive
    largest = np.abs(directions).argmax(axis=0)
    return directions * np.sign(directions[largest, np.arange(k)]), values[:k]


def principal_components(vectors, k):
    """Coordinates (N, k) of vectors (N, d) along the directions in which they vary most, and the shares (k)
    of the variance along each. Fewer than k where the vectors vary in fewer directions.
    """
    centred = vectors - vectors.mean(axis=0)
    directions, values = leading_directions(centred, k)
    return centred @ directions, values ** 2 / (centred ** 2).sum()


def shorten(vectors, dim):
    """The leading `dim` principal components of vectors (N, d)."""
    vectors, shares = principal_components(vectors, dim)
    if dim > len(shares):
        sys.exit(f"error: --dim {dim}: these vectors have only {len(shares)} principal components")
    print(f"--dim {dim}: principal components with {shares.sum():.0%} of the variance")
    return vectors


# ----------------------------------------------------------------------------------------------------------
# published: pickled dicts of gene -> vector. A pickle can call any function; here it gets numpy's arrays.

ADMITTED = {"numpy.ndarray", "numpy.dtype", "_codecs.encode",  # protocol 2 spells bytes with the last
            "numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct",  # numpy 1 and 2
            "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar",
            "numpy.core.numeric._frombuffer", "numpy._core.numeric._frombuffer"}


class VectorUnpickler(pickle._Unpickler):
    """Python's unpickler, in pure Python, with lists that become float32 arrays while they are read.

    A Python float takes 32 bytes in a list. The opcodes are explained in Python's pickletools.
    """
    dispatch = pickle._Unpickler.dispatch.copy()

    def load_empty_list(self):
        self.append(array("f"))

    dispatch[pickle.EMPTY_LIST[0]] = load_empty_list

    def find_class(self, module, name):
        if f"{module}.{name}" not in ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is refused")
        return super().find_class(module, name)


def read_pickle(path, member=None):
    """Genes (N) and vectors (N, d) float32 of a pickled dict gene -> vector, or of one in a zip archive."""
    place = f"{path}: {member}" if member else path
    try:
        with open_member(path, member) if member else open(path, "rb") as file:
            table = VectorUnpickler(file).load()
        genes = list(table)
        with np.errstate(over="ignore"):  # infinite then, which is refused below
            vectors = np.array(list(table.values()), np.float32)
        vectors = vectors.reshape(len(genes), -1)  # a vector may be a row (1, d)
        is_finite = np.isfinite(vectors).all(axis=1)
        if not is_finite.all():
            raise ValueError(f"{genes[is_finite.argmin()]!r} has numbers that are not finite")
    except Exception as error:  # a damaged pickle or archive can raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        sys.exit(f"error: {place}: not a whole file of vectors ({reason}); delete it and run again")
    return genes, vectors


def open_member(path, name):
    """A member of a zip archive, by its name without folders (and without the dot after a released name)."""
    with zipfile.ZipFile(path) as archive:
        members = {os.path.basename(member).rstrip("."): member for member in archive.namelist()}
        return io.BufferedReader(archive.open(members[name]))  # stays open when the archive is closed


def fetch_published(source, mode, raw):
    """A source's released file, downloaded if need be; its URL; and its member if it is an archive."""
    if (source, mode) not in PUBLISHED:
        there = ", ".join(f"{source} ({mode})" for source, mode in PUBLISHED)
        sys.exit(f"error: no published vectors for --source {source} --mode {mode}; there are {there}; "
                 "for others use --embedder openai or lsa")
    name = PUBLISHED[source, mode]
    if source.startswith("genept"):
        return shared.download(path=raw / "GenePT_emebdding_v2.zip", **GENEPT), GENEPT["url"], name
    url = f"{shared.BUCKET}/gene_embeddings/{name}"
    return shared.download(url, raw / name.replace("%2B", "+")), url, None


# ----------------------------------------------------------------------------------------------------------
# openai: any server with the OpenAI embeddings API. Each answered batch is a file of the cache: `keys`
# (n, 32) uint8, the SHA-256 of each text, and `vectors` (n, d) float32. Texts in the cache are not sent.

def key_of(text):
    """The SHA-256 of a text, by which the cache knows it."""
    return hashlib.sha256(text.encode()).digest()


def server_vectors(texts, genes, args, cache):
    """Vectors (T, d) float32 of T texts; in a dry run only what they would cost is printed.

    genes: a gene (T) that has the text, for messages.
    """
    texts = cut_texts(texts, genes, args.max_tokens)
    gene_of, text_of = dict(zip(texts, genes)), {key_of(text): text for text in texts}
    vector_of = {}
    for path in sorted(cache.glob("*.npz")):
        with np.load(path) as batch:
            found = dict(zip(map(bytes, batch["keys"]), batch["vectors"]))
        vector_of |= {text_of[key]: found[key] for key in found.keys() & text_of.keys()}
    missing = [text for text in gene_of if text not in vector_of]

    n_tokens = sum(math.ceil(len(text.encode()) / BYTES_PER_TOKEN) for text in missing)
    cost = f"no price known for {args.model}"
    if price := PRICES.get(args.model):
        cost = f"about ${n_tokens * price / 1e6:.4f} ({args.model}, price noted in {PRICES_NOTED})"
    print(f"{len(gene_of):,} distinct texts, {len(vector_of):,} of them embedded before; "
          f"to send: {len(missing):,} texts, about {n_tokens:,} tokens, {cost}")
    if args.dry_run:
        return None
    if missing:
        send(missing, gene_of, args, cache, vector_of)
    return np.stack([vector_of[text] for text in texts])


def cut_texts(texts, genes, max_tokens):
    """Texts (T) of genes (T), the long ones cut.

    A token counts as MIN_BYTES_PER_TOKEN bytes of UTF-8, since models split words differently and the kit has
    no tokenizer: most texts are cut a little shorter than necessary.
    """
    max_bytes = max_tokens * MIN_BYTES_PER_TOKEN
    cut = [text.encode()[:max_bytes].decode(errors="ignore") for text in texts]
    changed = genes[texts != cut]
    if len(changed):
        print(f"--max-tokens {max_tokens}: {len(changed):,} of {len(texts):,} texts cut to {max_bytes:,} "
              f"bytes: {shared.shown(changed)}")
    return cut


def send(texts, gene_of, args, cache, vector_of):
    """Embed texts, batch after batch, into the cache and into vector_of {text: vector (d)}.

    A busy server or a broken connection is tried again, a batch that is too large is halved. Ends the run in
    one line on anything else that the server refuses.
    """
    import openai  # here, since it takes a second and most runs do without
    client, url = connect(args), args.base_url  # connect ends the run without a usable key
    batch_size = args.batch_size
    progress = tqdm(total=len(texts), unit=" texts", disable=None)
    while texts:
        n_bytes = np.cumsum([len(text.encode()) for text in texts[:batch_size]])
        n_allowed = (n_bytes <= MAX_REQUEST_TOKENS * MIN_BYTES_PER_TOKEN).sum()
        batch = texts[:max(1, n_allowed)]
        try:
            vectors = ask(client, args, batch)
        except openai.APIError as error:
            if is_too_large(error) and len(batch) > 1:
                batch_size = len(batch) // 2
                continue
            sys.exit(f"error: {url} {why_refused(error, args, client.api_key, gene_of[batch[0]])}")
        except (AttributeError, TypeError, ValueError) as error:
            sys.exit(f"error: {url}: no answer of the embeddings API ({error})")
        dim, dim_before = vectors.shape[1], len(next(iter(vector_of.values()), vectors[0]))
        if dim != dim_before:
            sys.exit(f"error: {url}: vectors of {dim} numbers, before it was {dim_before}; "
                     f"if the model has changed, delete {cache}")

        keys = b"".join(key_of(text) for text in batch)
        name = f"{hashlib.sha256(keys).hexdigest()}.npz"
        with shared.replacing(cache / name) as partial, open(partial, "wb") as file:
            np.savez(file, keys=np.frombuffer(keys, np.uint8).reshape(len(batch), -1), vectors=vectors)
        vector_of.update(zip(batch, vectors))
        texts = texts[len(batch):]
        progress.update(len(batch))
    progress.close()
    if batch_size < args.batch_size:
        print(f"{url} refused larger requests; next time: --batch-size {batch_size}")


def connect(args):
    """A client of the server, which tries again where that can help; ends the run without a usable key."""
    import openai
    api_key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not api_key and args.base_url == OPENAI_URL:
        sys.exit("error: set the environment variable OPENAI_API_KEY, or name another server with --base-url")
    if not re.fullmatch(r"[!-~]*", api_key):  # the HTTP library would quote it in an error
        sys.exit("error: OPENAI_API_KEY holds blanks or letters that no key has")
    http_client = openai.DefaultHttpxClient(event_hooks={"response": [refuse_retry]})
    return openai.OpenAI(api_key=api_key or "none", base_url=args.base_url, max_retries=8,
                         timeout=600, http_client=http_client)  # seconds


def refuse_retry(response):
    """Set the header by which a server tells the library not to try again, where that cannot help."""
    if response.is_error and any(words in response.read().lower() for words in HOPELESS):
        response.headers["x-should-retry"] = "false"


def ask(client, args, batch):
    """Vectors (n, d) float32 of n texts; ValueError, TypeError or AttributeError if the answer lacks them."""
    options = {"dimensions": args.api_dim} if args.api_dim else {}
    answer = client.embeddings.create(model=args.model, input=batch, encoding_format="float", **options).data
    answer = sorted(answer, key=lambda item: item.index)  # the order is not promised
    if [item.index for item in answer] != list(range(len(batch))):
        raise ValueError(f"{len(answer)} vectors for {len(batch)} texts")
    vectors = np.array([item.embedding for item in answer], np.float32)
    if vectors.ndim != 2 or not vectors.size or not np.isfinite(vectors).all():
        raise ValueError("vectors without numbers, or with numbers that are not finite")
    return vectors


def is_too_large(error):
    """Whether a request may pass in smaller pieces. error: openai's."""
    return "too large" in str(error.body).lower() or getattr(error, "status_code", None) in TOO_LARGE


def why_refused(error, args, api_key, gene):
    """The end of an error message that begins with the server's address: one line, without the key.

    error: openai's, for a batch that began with the text of `gene`.
    """
    words = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
    cause = without_key(words or error.__cause__ or error, api_key)
    status = getattr(error, "status_code", None)
    if status:
        cause = f"status {status}: {cause}"
    if is_too_large(error):
        return f"refuses the text of {gene} ({cause}); if too long: --max-tokens below {args.max_tokens}"
    advice = ADVICE.get(status, "the same command goes on from what is already on disk")
    return f"did not embed the texts ({cause}); {advice}"


def without_key(words, api_key):
    """The text on one line, with *** for words that show four characters of the key (servers quote it)."""
    pieces = {api_key[i:i + 4] for i in range(len(api_key) - 3)}
    hidden = ["***" if any(piece in word for piece in pieces) else word for word in str(words).split()]
    return " ".join(hidden)[:300]


# ----------------------------------------------------------------------------------------------------------
# The figure

def read_column(spec):
    """The name of a column and its values {gene: value}, from FILE.tsv:COLUMN with a column `gene`."""
    path, _, column = spec.rpartition(":")
    lines = (line for _, line in shared.read_lines(path)) if path else ()
    rows = csv.DictReader(lines, delimiter="\t")
    if not {"gene", column} <= set(rows.fieldnames or ()):
        sys.exit(f"error: --color {spec}: expected FILE.tsv:COLUMN, tab-separated, columns gene and COLUMN")
    return column, {row["gene"]: row[column] for row in rows}


def sample_vectors(path, most):
    """At most `most` genes (n) of an embedding file, drawn at random, and their vectors (n, d)."""
    genes, vectors = read_embeddings(path)
    drawn = np.sort(np.random.default_rng(0).permutation(len(genes))[:most])
    return genes[drawn], vectors[drawn]


def project(vectors):
    """Two coordinates (n, 2) of n vectors, and the names of the axes: by UMAP if it can run, else by PCA."""
    if len(vectors) >= UMAP_MIN_POINTS:
        with contextlib.suppress(ImportError):
            import umap  # here, since it need not be installed, and takes seconds
            xy = umap.UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(vectors)
            return xy, ["UMAP 1", "UMAP 2"]
    xy, shares = principal_components(vectors, 2)
    names = [f"principal component {i} ({share:.0%} of the variance)" for i, share in enumerate(shares, 1)]
    xy = np.pad(xy, ((0, 0), (0, 2 - len(shares))))  # vectors on a line, or all the same: zeros
    return xy, [*names, "", ""]


def as_numbers(labels):
    """Labels as floats (n), NaN where there is none; None if they are words, or all missing."""
    try:
        numbers = np.array([float(label or "nan") for label in labels])
    except ValueError:
        return None
    return numbers if np.isfinite(numbers).any() else None


def is_drawn(figure_path, paths):
    """Whether a figure is newer than the vectors that it shows."""
    return figure_path.exists() and figure_path.stat().st_mtime >= max(p.stat().st_mtime for p in paths)


def draw(path, note, vectors, labels, legend):
    """Draw the projection of vectors (n, d), coloured by n labels: numbers on a scale, words as groups.

    The commonest groups have colours; the others, and points without a label (None), are grey.
    """
    xy, axis_names = project(vectors)
    figure = shared.new_figure(7, 5.5, f"{note}{path.stem}: {len(labels):,} vectors")
    axes = figure.subplots()
    style = {"s": 8 if len(labels) > 1000 else 25, "linewidths": 0, "alpha": 0.6}

    numbers = as_numbers(labels)
    if numbers is not None:
        points = axes.scatter(*xy.T, c=numbers, plotnonfinite=True, **style)
        points.set_cmap(points.cmap.with_extremes(bad=shared.GREY))
        figure.colorbar(points, label=legend)
    else:
        groups = [group for group, _ in Counter(filter(None, labels)).most_common()]
        color_of = dict(zip(groups, shared.COLORS))
        if color_of and set(labels) - set(color_of):
            color_of["other"] = shared.GREY
        rest = color_of.get("other", shared.COLORS[0])
        axes.scatter(*xy.T, color=[color_of.get(label, rest) for label in labels], **style)
        for group, color in color_of.items():
            axes.scatter([], [], color=color, label=group, **style)
        if color_of:
            figure.legend(title=legend, loc="outside right upper", fontsize=8)
    axes.set(xlabel=axis_names[0], ylabel=axis_names[1])
    shared.save_figure(figure, path)
    print(f"{path}: a figure of {len(labels):,} vectors")


# ----------------------------------------------------------------------------------------------------------
# The embedding file

def write_embeddings(path, made, genes, vectors, attributes):
    """Write genes (N) and vectors (N, d) with their attributes."""
    with shared.write_h5(path, made) as file:
        shared.write_strings(file, "genes", genes)
        file["vectors"] = vectors.astype(np.float32, copy=False)
        file.attrs.update(attributes | {"dim": vectors.shape[1]})
    print(f"{path}: {len(genes):,} vectors of {vectors.shape[1]:,} numbers")


def read_embeddings(path):
    """Genes (N) and vectors (N, d) float32 of an embedding file."""
    with shared.read_h5(path) as file:
        return file["genes"].asstr()[:], file["vectors"][:]


def model_name(model):
    """A model's name as file names have it."""
    return re.sub(r"[^A-Za-z0-9.+-]+", "_", model)


def embed_published(args, source, embedder, path):
    """Write the released vectors of a source to `path`, unless they are there."""
    released, url, member = fetch_published(source, args.mode, path.parent.parent / "raw")
    options = {"embedder": embedder, "mode": args.mode}
    made = shared.made_from(options, {released.name: shared.fingerprint(released)})
    if shared.is_current(path, made, args.force):
        return
    genes, vectors = read_pickle(released, member)
    if args.dim:
        vectors = shorten(vectors, args.dim)
    origin = {"source": source, "url": url, "sha256": shared.checksum(released)}
    write_embeddings(path, made, genes, vectors, options | origin)


def embed_texts(args, source, embedder, path):
    """Embed the texts of a source to `path`, unless it is there, or print what it costs (--dry-run)."""
    annotations = path.parent.parent / "annotations.h5"
    words = ("--source", source) if source in shared.SOURCES else ("--tsv", f"{source}=FILE")
    made_by = shared.command("01_fetch_annotations.py", args, *words)
    genes, texts, offsets = read_texts(annotations, source, args.mode, made_by)

    options = {"embedder": embedder, "mode": args.mode, "dim": args.dim}
    if args.embedder == "openai":
        options |= {"model": args.model, "base_url": args.base_url, "max_tokens": args.max_tokens}
    made = shared.made_from(options, {f"annotations.h5 {source}": shared.fingerprint(annotations, source)})
    if shared.is_current(path, made, args.force):
        return

    texts, owners, average = distinct_texts(genes, texts, offsets)
    if args.embedder == "lsa":
        vectors = average @ lsa(texts, np.bincount(average.indices), args.dim)
    else:
        name = embedder if args.api_dim else model_name(args.model)  # whole vectors serve every --dim
        cache = path.parent / ".cache" / f"{name}.{key_of(args.base_url).hex()[:8]}"
        vectors = server_vectors(texts, owners, args, cache)
        if args.dry_run:
            return
        vectors = average @ vectors
        if args.dim and not args.api_dim:
            vectors = shorten(vectors, args.dim)
    write_embeddings(path, made, genes, vectors, options | {"source": source})


# ----------------------------------------------------------------------------------------------------------

def parse_arguments():
    parser = shared.common_options(argparse.ArgumentParser(description=__doc__))
    add = parser.add_argument
    add("--source", nargs="+", metavar="NAME",
        help=f"{', '.join(shared.SOURCES)}, a name of your own, or with published genept, genept_protein "
             "(default: all there are on the demo, otherwise go_all)")
    add("--embedder", choices=("published", "openai", "lsa"),
        help="(default: lsa on the demo, otherwise published)")
    add("--mode", choices=("concat", "avg"), default="concat",
        help="embed one text a gene, or each GO term and take the mean (default: concat)")
    add("--dim", type=shared.positive, metavar="N",
        help="vectors of N numbers: with lsa its rank (default: found from the texts), with text-embedding-3 "
             "what the server shortens them to, else principal components")
    add("--color", metavar="FILE.tsv:COLUMN",
        help="colour the figure by a column of a tab-separated file with a column gene")
    add = parser.add_argument_group("with --embedder openai").add_argument
    add("--model", default="text-embedding-ada-002", metavar="NAME",
        help="(default: text-embedding-ada-002)")
    add("--base-url", default=os.environ.get("OPENAI_BASE_URL") or OPENAI_URL, metavar="URL",
        help=f"the server (default: OPENAI_BASE_URL, or {OPENAI_URL})")
    add("--batch-size", type=shared.positive, default=512, metavar="N",
        help="texts a request at most, fewer where the server refuses (default: 512)")
    add("--max-tokens", type=shared.positive, metavar="N",
        help="cut longer texts; a token counts as 3 bytes (default: the model's window where known, else "
             f"{MAX_TEXT_TOKENS})")
    add("--dry-run", action="store_true", help="print texts, tokens and cost (estimates); send nothing")
    args = parser.parse_args()

    args.base_url = args.base_url.rstrip("/")
    args.embedder = args.embedder or ("lsa" if args.dataset == "demo" else "published")
    args.api_dim = args.dim if "text-embedding-3" in args.model and args.embedder == "openai" else None
    if args.max_tokens is None:
        args.max_tokens = WINDOWS.get(os.path.basename(args.model).split(":")[0], MAX_TEXT_TOKENS)
    if not re.fullmatch(r"https?://[^\s@?#/]+(/[^\s@?#]*)?", args.base_url):
        sys.exit("error: --base-url: expected http://host/v1 or https://host/v1, with no password in it")
    if args.embedder == "published" and args.dataset == "demo":
        sys.exit("error: no vectors are published for the demo's genes; use --embedder lsa or openai")
    if args.dry_run and args.embedder != "openai":
        sys.exit(f"error: --dry-run: --embedder {args.embedder} sends nothing and costs nothing")
    for source in args.source or ():
        shared.check_name(source, "--source")
    return args


def default_sources(args, annotations):
    """The demo's sources that have what the mode embeds; for human genes, stage 04's default."""
    if args.dataset != "demo":
        return ["go_all"]
    with shared.read_h5(annotations, shared.command("01_fetch_annotations.py", args)) as file:
        return [name for name in shared.in_order(file) if args.mode == "concat" or "terms" in file[name]]


def main():
    args = parse_arguments()
    folder = args.root / "data" / shared.space_of(args.dataset) / "embeddings"
    sources = args.source or default_sources(args, folder.parent / "annotations.h5")
    embedder = model_name(args.model) if args.embedder == "openai" else args.embedder
    embedder += f"-{args.dim}" if args.dim else ""
    paths = [folder / f"{source}.{embedder}.{args.mode}.h5" for source in sources]
    column, label_of = read_column(args.color) if args.color else ("", {})

    embed = embed_published if args.embedder == "published" else embed_texts
    for source, path in zip(sources, paths):
        embed(args, source, embedder, path)
    if args.dry_run:
        return

    # A figure of each source, and one of all, unless each has a space of its own (lsa, principal components)
    note = "SYNTHETIC: invented genes\n" if args.dataset == "demo" else ""
    for path in paths:
        figure_path = path.with_suffix(".png")
        if args.color or not is_drawn(figure_path, [path]):
            genes, vectors = sample_vectors(path, MAX_POINTS)
            draw(figure_path, note, vectors, [label_of.get(gene) for gene in genes], column)
    figure_path = folder / f"sources.{embedder}.{args.mode}.png"
    share_space = args.embedder != "lsa" and args.dim == args.api_dim and "genept_protein" not in sources
    if len(sources) > 1 and share_space and not is_drawn(figure_path, paths):
        drawn = [sample_vectors(path, MAX_POINTS // len(paths))[1] for path in paths]
        labels = np.repeat(sources, [len(vectors) for vectors in drawn])
        draw(figure_path, note, np.vstack(drawn), labels, "source")

    own_cells = [] if args.dataset in ("demo", *shared.HOSTED) else ["--h5ad", "FILE"]
    print("next: " + shared.command("03_prepare_data.py", args, *own_cells))


if __name__ == "__main__":
    shared.run(main)
