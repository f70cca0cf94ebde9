"""Stage 02: lsa, published pickles (harmful and broken ones too), and a server with the embeddings API."""
import collections
import hashlib
import importlib
import itertools
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from conftest import KIT, error_of, run_process, run_script
import simulate
from hypothesis import given, settings, strategies
from server import Server

KEY = "sk-Zq8vX3nW5tK7pL2mR9"
SCRIPT = "02_embed.py"
OWN = "--dataset", "mine", "--source", "own"
shared = importlib.import_module("01_fetch_annotations")
stage02 = importlib.import_module("02_embed")


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch):
    """What the environment says of keys, servers and proxies does not reach the tests."""
    for name in list(os.environ):
        if name.startswith(("OPENAI_", "SCGENEPT_")) or "proxy" in name.lower():
            monkeypatch.delenv(name)


def embed(*args, root):
    """Run stage 02, which has to succeed; its output."""
    return run_script(SCRIPT, *args, root=root).stdout


def fails(*args, root):
    """Run stage 02, which has to end in one line; that line."""
    return error_of(SCRIPT, *args, root=root)


def embedding(root, name, space="demo"):
    """What an embedding file holds: genes, vectors, attributes."""
    with h5py.File(root / "data" / space / "embeddings" / f"{name}.h5") as file:
        return SimpleNamespace(genes=list(file["genes"].asstr()), vectors=file["vectors"][:],
                               attributes=dict(file.attrs))


def write_texts(root, texts):
    """Make own texts {gene: text} the source `own` of human genes."""
    lines = [f"{gene}\t{text}\n" for gene, text in texts.items()]
    (root / "own.tsv").write_text("gene\ttext\n" + "".join(lines))
    run_script("01_fetch_annotations.py", "--dataset", "mine", "--tsv", f"own={root / 'own.tsv'}", root=root)


def texts_of(root, source):
    """The text of each of the demo's genes."""
    with h5py.File(root / "data/demo/annotations.h5") as file:
        return file[source]["text"].asstr()[:]


def terms_of(root, source):
    """The GO terms of each of the demo's genes."""
    with h5py.File(root / "data/demo/annotations.h5") as file:
        terms, offsets = file[source]["terms"].asstr()[:], file[source]["term_offsets"][:]
    return np.split(terms, offsets[1:-1])


def cosine(vectors):
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


@pytest.fixture(scope="session")
def demo_annotations(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    run_script("01_fetch_annotations.py", root=root)
    return root / "data/demo/annotations.h5"


@pytest.fixture
def demo(tmp_path, demo_annotations):
    """A root with the demo's texts."""
    (tmp_path / "data/demo").mkdir(parents=True)
    shutil.copy(demo_annotations, tmp_path / "data/demo")
    return tmp_path


# ----------------------------------------------------------------------------------------------------------
# The embedding file

def test_the_demo_gets_vectors_and_figures_of_every_source_by_default(demo):
    embed(root=demo)
    for source in ("ncbi", "ncbi+uniprot", "go_f", "go_c", "go_p", "go_all"):
        made = embedding(demo, f"{source}.lsa.concat")
        assert len(made.genes) == 128
        assert made.vectors.dtype == np.float32
        assert np.allclose(np.linalg.norm(made.vectors, axis=1), 1)
        expected = {"source": source, "embedder": "lsa", "mode": "concat", "dim": made.vectors.shape[1],
                    "format_version": 1}
        assert expected.items() <= made.attributes.items()
        figure = (demo / f"data/demo/embeddings/{source}.lsa.concat.png").read_bytes()
        assert figure.startswith(b"\x89PNG")


def test_vectors_are_made_again_only_when_forced(demo):
    path = demo / "data/demo/embeddings/ncbi.lsa.concat.h5"
    embed("--source", "ncbi", root=demo)
    date = path.stat().st_mtime_ns
    assert "there already" in embed("--source", "ncbi", root=demo)
    assert path.stat().st_mtime_ns == date
    embed("--source", "ncbi", "--force", root=demo)
    assert path.stat().st_mtime_ns > date


def test_vectors_made_again_are_the_same_and_the_same_input_for_later_stages(demo):
    path = demo / "data/demo/embeddings/ncbi.lsa.concat.h5"
    embed("--source", "ncbi", root=demo)
    vectors, fingerprint = embedding(demo, "ncbi.lsa.concat").vectors, shared.fingerprint(path)
    run_script("01_fetch_annotations.py", "--force", root=demo)
    embed("--source", "ncbi", "--force", root=demo)
    assert np.array_equal(embedding(demo, "ncbi.lsa.concat").vectors, vectors)
    assert shared.fingerprint(path) == fingerprint


def test_changed_texts_make_the_vectors_stale(tmp_path):
    write_texts(tmp_path, {"A": "iron transport", "B": "iron binding"})
    embed(*OWN, "--embedder", "lsa", root=tmp_path)
    write_texts(tmp_path, {"A": "iron transport", "B": "zinc transport"})
    assert "stale" in embed(*OWN, "--embedder", "lsa", root=tmp_path)


def test_the_next_command_has_the_dataset_and_the_root(demo):
    output = embed("--source", "ncbi", root=demo)
    assert output.splitlines()[-1] == f"next: python 03_prepare_data.py --root {demo}"
    write_texts(demo, {"A": "iron transport", "B": "iron binding"})
    output = embed(*OWN, "--embedder", "lsa", root=demo)
    expected = f"next: python 03_prepare_data.py --dataset mine --h5ad FILE --root {demo}"
    assert output.splitlines()[-1] == expected


def test_a_missing_source_names_the_command_that_makes_it(tmp_path):
    assert f"run first: python 01_fetch_annotations.py --root {tmp_path}" in fails(root=tmp_path)
    write_texts(tmp_path, {"A": "iron", "B": "zinc"})
    error = fails("--dataset", "mine", "--source", "other", "--embedder", "lsa", root=tmp_path)
    assert f"python 01_fetch_annotations.py --dataset mine --tsv other=FILE --root {tmp_path}" in error


def test_a_source_name_cannot_leave_the_folder(demo):
    assert "--source '../x'" in fails("--source", "../x", root=demo)


def test_help_comes_at_once():
    start = time.perf_counter()
    assert "python 02_embed.py" in run_process(SCRIPT, "--help").stdout
    assert time.perf_counter() - start < 2  # half a second on an idle machine


# ----------------------------------------------------------------------------------------------------------
# lsa

def test_genes_whose_texts_share_words_are_nearer_than_others(demo):
    embed("--source", "go_p", root=demo)
    _, takes_part = shared.demo_genes()
    n_common = takes_part.astype(int) @ takes_part.T.astype(int)
    near = cosine(embedding(demo, "go_p.lsa.concat").vectors)
    assert near[n_common > 0].min() > near[n_common == 0].max()


def words_and_pairs(text):
    for clause in re.split(r"[,;:.()]", text.lower()):
        words = re.findall(r"\w+", clause)
        yield from words
        yield from zip(words, words[1:])


def tf_idf(texts):
    """A dense matrix (texts, words) of the words and pairs that several texts have, with rows of length 1."""
    counts = [collections.Counter(words_and_pairs(text)) for text in texts]
    n_texts_with = collections.Counter(itertools.chain(*counts))
    common = [word for word, n in n_texts_with.items() if n > 1]
    weights = np.zeros((len(texts), len(common)))
    for row, count in zip(weights, counts):
        for j, word in enumerate(common):
            if count[word]:
                idf = np.log((1 + len(texts)) / n_texts_with[word])
                row[j] = (1 + np.log(count[word])) * idf
    return weights / np.linalg.norm(weights, axis=1, keepdims=True)


def test_lsa_equals_tf_idf_and_a_dense_svd(demo):
    embed("--source", "go_all", root=demo)
    embed("--source", "go_all", "--dim", 5, root=demo)
    u, s, _ = np.linalg.svd(tf_idf(texts_of(demo, "go_all")), full_matrices=False)
    for name, rank in (("lsa", 10), ("lsa-5", 5)):
        vectors = embedding(demo, f"go_all.{name}.concat").vectors
        assert vectors.shape[1] == rank
        assert np.allclose(cosine(vectors), cosine((u * s)[:, :rank]), atol=1e-5)


def test_leading_directions_equal_a_dense_svd():
    rng = np.random.default_rng(1)
    scale = 0.8 ** np.arange(80)
    matrix = (rng.standard_normal((200, 80)) * scale) @ rng.standard_normal((80, 300))
    directions, values = stage02.leading_directions(matrix, 10)
    _, expected_values, expected = np.linalg.svd(matrix, full_matrices=False)
    assert np.allclose(values, expected_values[:10])
    assert np.allclose(np.abs(np.sum(directions.T * expected[:10], axis=1)), 1)


def test_avg_with_lsa_is_the_mean_of_the_term_vectors(demo):
    embed("--source", "go_p", "--mode", "avg", root=demo)
    vectors, terms = embedding(demo, "go_p.lsa.avg").vectors, terms_of(demo, "go_p")
    of_term = {own[0]: vector for own, vector in zip(terms, vectors) if len(own) == 1}
    n_means = 0
    for own, vector in zip(terms, vectors):
        if len(own) > 1 and set(own) <= of_term.keys():
            n_means += 1
            assert np.allclose(vector, np.mean([of_term[term] for term in own], axis=0), atol=1e-6)
    assert n_means > 10


def simulated_texts(n_genes, n_processes, noise):
    rng = np.random.default_rng(1)
    takes_part = simulate.simulate_processes(n_genes, n_processes, rng)
    return np.array(simulate.simulate_texts(takes_part, noise, rng))


@pytest.mark.parametrize("n_genes, n_processes, noise", [(120, 7, 0), (120, 7, 0.7), (500, 25, 0.5)])
def test_the_rank_is_the_number_of_processes_but_ten_at_least(capsys, n_genes, n_processes, noise):
    vectors = stage02.lsa(simulated_texts(n_genes, n_processes, noise), np.ones(n_genes))
    assert f"({n_processes} of" in capsys.readouterr().out
    assert vectors.shape == (n_genes, max(n_processes, 10))


def test_texts_that_tell_nothing_get_the_least_rank(capsys):
    vectors = stage02.lsa(simulated_texts(200, 8, noise=1), np.ones(200))
    assert "(1 of 200 directions rise above noise" in capsys.readouterr().out
    assert vectors.shape == (200, 10)


def test_fewer_words_than_the_least_rank_give_what_there_is():
    texts = np.array(["iron", "iron zinc", "zinc copper", "copper"])
    assert stage02.lsa(texts, np.ones(4)).shape == (4, 3)


def test_more_dimensions_than_there_are_is_an_error(demo):
    assert "finds only 10 dimensions" in fails("--source", "go_all", "--dim", 11, root=demo)
    assert "above 0" in fails("--dim", 0, root=demo)


def test_the_gene_symbol_prefix_does_not_count():
    metals = {"A": "iron", "B": "iron", "C": "zinc", "D": "zinc"}
    texts = [f"Gene Symbol {gene} {metal} transport" for gene, metal in metals.items()]
    near = cosine(stage02.lsa(texts, np.ones(4)))
    assert near[0, 1] == pytest.approx(1)
    assert near[0, 2] < 0.99


def test_texts_without_a_common_word_are_an_error(tmp_path):
    write_texts(tmp_path, {"A": "iron", "B": "zinc"})
    assert "no two texts share a word" in fails(*OWN, "--embedder", "lsa", root=tmp_path)


def test_avg_of_a_source_without_terms_is_an_error(demo):
    assert "--mode concat" in fails("--source", "ncbi", "--mode", "avg", root=demo)


# ----------------------------------------------------------------------------------------------------------
# The figure

def test_the_figure_is_coloured_by_a_column_of_the_user(demo):
    lines = [f"DEMO{i:03d}\tp{i % 3}\t{i / 7}\n" for i in range(1, 100)]
    (demo / "my.tsv").write_text("gene\tpathway\tscore\n" + "".join(lines))
    figures = set()
    for color in ([], ["--color", f"{demo / 'my.tsv'}:pathway"], ["--color", f"{demo / 'my.tsv'}:score"]):
        embed("--source", "go_p", *color, root=demo)
        figures.add((demo / "data/demo/embeddings/go_p.lsa.concat.png").read_bytes())
    assert len(figures) == 3


def test_a_column_that_is_not_there_is_an_error(demo):
    (demo / "my.tsv").write_text("gene\tpathway\nDEMO001\tp\n")
    for wrong in (f"{demo / 'my.tsv'}:nothing", "my.tsv"):
        assert "expected FILE.tsv:COLUMN" in fails("--color", wrong, root=demo)


def test_pca_shows_the_share_of_the_variance():
    rng = np.random.default_rng(2)
    vectors = (rng.standard_normal((50, 6)) * [5, 3, 1, 1, 1, 1]).astype(np.float32)
    xy, names = stage02.project(vectors)
    variances = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
    assert np.allclose(xy.var(axis=0, ddof=1), variances[:2], rtol=1e-3)
    assert names[0] == f"principal component 1 ({variances[0] / variances.sum():.0%} of the variance)"


class Umap:
    """In place of umap-learn, which need not be installed."""
    def __init__(self, **_):
        pass

    def fit_transform(self, vectors):
        assert len(vectors) >= 10
        return vectors[:, :2]


@pytest.mark.parametrize("n_genes, way", [(9, "principal component 1"), (10, "UMAP 1")])
def test_umap_draws_where_it_is_installed_and_has_ten_points(monkeypatch, n_genes, way):
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap))
    xy, names = stage02.project(np.random.default_rng(0).standard_normal((n_genes, 5)))
    assert xy.shape == (n_genes, 2)
    assert names[0].startswith(way)


def test_three_genes_get_a_figure(tmp_path):
    write_texts(tmp_path, {"A": "iron transport", "B": "iron binding", "C": "zinc binding"})
    output = embed(*OWN, "--embedder", "lsa", root=tmp_path)
    assert "own.lsa.concat.png: a figure of 3 vectors" in output
    assert (tmp_path / "data/human/embeddings/own.lsa.concat.png").exists()


# ----------------------------------------------------------------------------------------------------------
# published

PICKLE = "GO_all_gene_embeddings-gpt3.5-ada-concat.pickle"
TABLE = {f"G{i}": [i + j / 3 for j in range(1536)] for i in range(7)}
PUBLISHED = "--dataset", "norman"


def place(root, data, name=PICKLE):
    """Put a file where the download would put it."""
    path = root / "data/human/raw" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def place_archive(root, *members):
    """Put an archive like GenePT's, whose members all hold TABLE, where the download would put it."""
    path = place(root, b"", "GenePT_emebdding_v2.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members:
            archive.writestr(f"GenePT_emebdding_v2/{member}", pickle.dumps(TABLE, 4))
    return path


SHAPES = {  # what a table of vectors may look like: TABLE -> what is pickled
    "lists": lambda t: t,
    "tuples": lambda t: {g: tuple(v) for g, v in t.items()},
    "float64 arrays": lambda t: {g: np.array(v) for g, v in t.items()},
    "float32 arrays": lambda t: {g: np.array(v, np.float32) for g, v in t.items()},
    "float16 arrays": lambda t: {g: np.array(v, np.float16) for g, v in t.items()},
    "big-endian arrays": lambda t: {g: np.array(v, ">f8") for g, v in t.items()},
    "rows": lambda t: {g: np.array([v]) for g, v in t.items()},
    "lists of numpy floats": lambda t: {g: [np.float64(x) for x in v] for g, v in t.items()},
    "the same list twice": lambda t: t | {"twin": t["G3"]},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_pickles_of_each_shape_and_protocol_are_read(tmp_path, shape):
    table = SHAPES[shape](TABLE)
    expected = np.array([np.ravel(vector) for vector in table.values()], np.float32)
    for protocol in (2, 3, 4, 5):
        genes, vectors = stage02.read_pickle(place(tmp_path, pickle.dumps(table, protocol)))
        assert genes == list(table)
        assert np.array_equal(vectors, expected)


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize("protocol", [2, 5])
def test_pickles_of_numpy_1_and_2_are_read(tmp_path, protocol, core):
    data = pickle.dumps({"A": np.arange(4.0), "B": list(np.arange(4.0))}, protocol)
    if protocol == 5:
        data = data[:2] + data[11:]  # without the frame, whose length would be wrong
    for part in (b".multiarray", b".numeric"):
        for old in (b"numpy.core" + part, b"numpy._core" + part):
            data = renamed(data, old, core + part)
    assert core in data
    assert stage02.read_pickle(place(tmp_path, data))[1].tolist() == [[0, 1, 2, 3]] * 2


def renamed(data, old, new):
    """A pickle with a module renamed; from protocol 4 on a name stands behind its length."""
    data = data.replace(bytes([len(old)]) + old, bytes([len(new)]) + new)
    return data.replace(old, new)


def test_published_vectors_become_an_embedding_file(tmp_path):
    path = place(tmp_path, pickle.dumps(TABLE, 4))
    embed(*PUBLISHED, root=tmp_path)
    made = embedding(tmp_path, "go_all.published.concat", "human")
    assert made.genes == list(TABLE)
    assert np.array_equal(made.vectors, np.float32(list(TABLE.values())))
    assert made.attributes["embedder"] == "published"
    assert made.attributes["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_dim_takes_the_leading_principal_components_of_published_vectors(tmp_path):
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((300, 40)) * 0.8 ** np.arange(40) + 3
    place(tmp_path, pickle.dumps({f"G{i}": list(row) for i, row in enumerate(wide)}, 4))
    output = embed(*PUBLISHED, "--dim", 5, root=tmp_path)
    made = embedding(tmp_path, "go_all.published-5.concat", "human")
    u, s, _ = np.linalg.svd(wide - wide.mean(0), full_matrices=False)
    assert np.allclose(np.abs(made.vectors), np.abs(u * s)[:, :5], atol=1e-3)
    assert (made.attributes["dim"], made.attributes["embedder"]) == (5, "published-5")
    assert f"{(s[:5] ** 2).sum() / (s ** 2).sum():.0%} of the variance" in output
    assert "only 40 principal components" in fails(*PUBLISHED, "--dim", 41, root=tmp_path)


def test_stage_04_takes_the_whole_vectors_unless_told(demo):
    training = importlib.import_module("04_train")
    variant = SimpleNamespace(name="scgenept_go_c", sources=["go_c"])

    def chosen(embedder=None):
        found = training.find_embeddings(demo, "demo")
        options = SimpleNamespace(embedder=embedder, mode=None)
        paths, words = training.choose_embeddings(variant, found, options)
        return paths["go_c"].name, words

    embed("--source", "go_c", "--dim", 4, root=demo)
    assert chosen() == ("go_c.lsa-4.concat.h5", [])
    embed("--source", "go_c", root=demo)
    assert chosen() == ("go_c.lsa.concat.h5", [])
    assert chosen("lsa-4") == ("go_c.lsa-4.concat.h5", ["embedder=lsa-4"])


def test_a_plus_in_the_released_name_is_sent_as_2B(tmp_path, monkeypatch):
    folder = "/czi-scgenept-public.s3.amazonaws.com/models/gene_embeddings/"
    address = folder + "NCBI%2BUniProt_embeddings-gpt3.5-ada.pkl"
    with Server({address: pickle.dumps(TABLE, 4)}) as server:
        monkeypatch.setenv("SCGENEPT_MIRROR", server.url)
        embed(*PUBLISHED, "--source", "ncbi+uniprot", root=tmp_path)
    assert server.requests[-1].path == address
    assert embedding(tmp_path, "ncbi+uniprot.published.concat", "human").genes == list(TABLE)


@pytest.mark.parametrize("source, member", [
    ("genept", "GenePT_gene_embedding_ada_text.pickle"),
    ("genept_protein", "GenePT_gene_protein_embedding_model_3_text.pickle.")])  # released with this dot
def test_genept_vectors_come_from_its_archive(tmp_path, source, member):
    place_archive(tmp_path, "NCBI_summary_of_genes.json", member)
    embed(*PUBLISHED, "--source", source, root=tmp_path)
    made = embedding(tmp_path, f"{source}.published.concat", "human")
    assert made.genes == list(TABLE)
    assert made.vectors.shape == (7, 1536)


def test_an_archive_without_the_member_is_an_error_that_names_it(tmp_path):
    place_archive(tmp_path, "NCBI_summary_of_genes.json", "other.pickle")
    error = fails(*PUBLISHED, "--source", "genept", root=tmp_path)
    assert "(KeyError: 'GenePT_gene_embedding_ada_text.pickle'); delete it" in error


def test_a_truncated_archive_is_one_line(tmp_path):
    path = place_archive(tmp_path, "GenePT_gene_embedding_ada_text.pickle")
    path.write_bytes(path.read_bytes()[:5000])
    assert "delete it" in fails(*PUBLISHED, "--source", "genept", root=tmp_path)


def test_what_was_never_published_is_an_error_that_lists_what_was(tmp_path):
    assert "go_f (avg)" in fails(*PUBLISHED, "--source", "ncbi", "--mode", "avg", root=tmp_path)
    assert "--embedder lsa" in fails("--embedder", "published", root=tmp_path)


class Call:
    """Pickles as a call of any function."""
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


SYSTEM = f"{os.system.__module__}.system"  # posix.system
BAD = {  # name: (pickle, what the one-line error says)
    "os.system": (pickle.dumps({"FOS": Call(os.system, "touch owned")}, 4), SYSTEM),
    "os.system in a list": (pickle.dumps({"FOS": [1.0, Call(os.system, "touch owned")]}, 2), SYSTEM),
    "os.system as an instance": (b"\x80\x02(S'touch owned'\nios\nsystem\n.", "os.system"),
    "eval": (pickle.dumps({"FOS": Call(eval, "open('owned', 'w')")}, 4), "builtins.eval"),
    "another function of numpy": (pickle.dumps({"FOS": Call(np.loadtxt, "owned")}, 4), "numpy"),
    "a class of numpy": (pickle.dumps({"FOS": np.ma.masked_array([1.0])}, 4), "numpy.ma"),
    "an object array": (pickle.dumps({"FOS": np.array([1.0, None], object)}, 4), "not a whole file of vectors"),
    "truncated": (pickle.dumps(TABLE, 4)[:-500], "not a whole file of vectors"),
    "empty": (b"", "not a whole file of vectors"),
    "a vector of words": (pickle.dumps({"FOS": ["a", "b"]}, 4), "not a whole file of vectors"),
    "no vector at all": (pickle.dumps({"FOS": None}, 4), "'FOS'"),
    "ragged": (pickle.dumps({"FOS": [1.0, 2.0], "JUN": [1.0]}, 4), "not a whole file of vectors"),
    "not finite": (pickle.dumps({"FOS": [1.0], "JUN": [float("nan")]}, 4), "'JUN'"),
    "too large for float32": (pickle.dumps({"FOS": np.array([1e300])}, 4), "'FOS'"),
    "no table": (pickle.dumps([1.0, 2.0], 4), "not a whole file of vectors"),
    "nothing in it": (pickle.dumps({}, 4), "not a whole file of vectors"),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "not a whole file of vectors"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_harmful_or_broken_pickle_is_one_line(tmp_path, monkeypatch, case):
    data, says = BAD[case]
    path = place(tmp_path, data)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        stage02.read_pickle(path)
    words = str(caught.value)
    assert words.startswith(f"error: {path}: ") and "\n" not in words
    assert says in words
    assert not (tmp_path / "owned").exists()


def test_after_a_bad_pickle_the_run_ends_without_an_output(tmp_path):
    path = place(tmp_path, BAD["os.system"][0])
    assert str(path) in fails(*PUBLISHED, root=tmp_path)
    assert not (tmp_path / "data/human/embeddings").exists()


FUZZED = []
for kind in (list, tuple, np.array):
    table = {gene: kind(vector[:5]) for gene, vector in TABLE.items()}
    FUZZED += [pickle.dumps(table, protocol) for protocol in (2, 4, 5)]
EDIT = strategies.tuples(strategies.integers(0, 2000), strategies.binary(max_size=3))  # place, new bytes


@settings(max_examples=200, deadline=None, derandomize=True)
@given(strategies.sampled_from(FUZZED), strategies.lists(EDIT, min_size=1))
def test_a_damaged_pickle_is_read_or_refused_in_one_line(tmp_path_factory, data, edits):
    for at, new in edits:
        at %= len(data)
        data = data[:at] + new + data[at + 1:]
    path = tmp_path_factory.getbasetemp() / "damaged.pickle"
    path.write_bytes(data)
    try:
        stage02.read_pickle(path)
    except SystemExit as error:
        assert str(error).startswith("error: ") and "\n" not in str(error)


def write_big_pickle(path, n_genes):
    """A pickled dict of lists of 1,536 floats, as Python's pickler writes it, without building it."""
    rng = np.random.default_rng(0)
    floats = np.full((1536, 9), ord("G"), np.uint8)  # G: the next 8 bytes are a float
    with open(path, "wb") as file:
        file.write(b"\x80\x04}\x94")
        for i in range(n_genes):
            if i % 1000 == 0:
                file.write(b"(")
            name = f"GENE{i}".encode()
            file.write(b"\x8c" + bytes([len(name)]) + name + b"\x94]\x94")
            floats[:, 1:] = rng.standard_normal(1536).astype(">f8").view(np.uint8).reshape(1536, 8)
            for part in (floats[:1000], floats[1000:]):
                file.write(b"(" + part.tobytes() + b"e")
            if i % 1000 == 999 or i == n_genes - 1:
                file.write(b"u")
        file.write(b".")


MEASURE = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
stage02 = importlib.import_module("02_embed")

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM:"))

before = peak()
stage02.read_pickle(sys.argv[2])
print((peak() - before) // 1024)
"""


def peak_of_reading(path):
    """MB of memory that reading a pickle takes beyond what the imports take, in a process of its own.

    By VmHWM, since a process inherits the ru_maxrss of the one that starts it.
    """
    if not os.path.exists("/proc/self/status"):
        pytest.skip("no VmHWM here")
    command = [sys.executable, "-c", MEASURE, KIT, path]
    return int(subprocess.run(command, check=True, capture_output=True).stdout)


def test_a_pickle_of_python_floats_never_stands_in_memory_as_python_floats(tmp_path):
    path = place(tmp_path, b"")
    write_big_pickle(path, 1_000)
    assert peak_of_reading(path) < 40  # the vectors are 6 MB; as Python floats they would be 60 MB


@pytest.mark.soak
def test_a_pickle_as_large_as_the_released_ones_is_read_in_3_minutes_and_2_gb(tmp_path):
    path = place(tmp_path, b"")
    write_big_pickle(path, 93_800)  # 1.3 GB
    start = time.perf_counter()
    assert peak_of_reading(path) < 2000
    assert time.perf_counter() - start < 180


# ----------------------------------------------------------------------------------------------------------
# openai

PATH = "/v1/embeddings"
ADA = "text-embedding-ada-002"


def true_vector(text, dim=16):
    seed = list(hashlib.sha256(text.encode()).digest())
    return np.random.default_rng(seed).standard_normal(dim).astype(np.float32)


def true_vectors(texts, dim=16):
    return [true_vector(text, dim) for text in texts]


def answer(vectors):
    """The body of an answer with these vectors, in another order than asked for: none is promised."""
    data = [{"object": "embedding", "index": i, "embedding": list(map(float, vector))}
            for i, vector in enumerate(vectors)]
    usage = {"prompt_tokens": 1, "total_tokens": 1}
    return json.dumps({"object": "list", "model": ADA, "data": data[::-1], "usage": usage}).encode()


class Api(Server):
    """An embeddings server. `misbehave(PATH, {...}, ...)` makes it fail, one request after the other;
    `refuse`, a function of a request's texts, gives the status and body of a refusal, or None."""

    def __init__(self):
        super().__init__(hook=self.embed)
        self.base_url = f"{self.url}v1"
        self.delay, self.refuse = 0, lambda texts: None

    def embed(self, method, path, headers, body):
        asked = json.loads(body)
        time.sleep(self.delay)
        assert asked["encoding_format"] == "float"
        refused = self.refuse(asked["input"])
        if refused:
            return refused[0], {}, refused[1]
        vectors = true_vectors(asked["input"], asked.get("dimensions", 16))
        return 200, {"Content-Type": "application/json"}, answer(vectors)

    def batches(self):
        """The texts of each request so far."""
        return [json.loads(request.body)["input"] for request in self.requests]

    def sent(self):
        """How often each text was sent."""
        return collections.Counter(itertools.chain(*self.batches()))


@pytest.fixture
def api():
    with Api() as server:
        yield server


def openai(api, *args, source="ncbi"):
    return "--embedder", "openai", "--base-url", api.base_url, "--source", source, *args


def own(api, *args):
    return "--dataset", "mine", *openai(api, *args, source="own")


def message(words):
    """The body of a refusal in OpenAI's form."""
    return json.dumps({"error": {"message": words}}).encode()


def refusal(status, words="no"):
    return {"status": status, "body": message(words)}


def test_vectors_come_from_a_server_in_the_order_of_the_genes(demo, api):
    embed(*openai(api, "--model", "meta-llama/Llama-3.1-8B"), root=demo)
    made = embedding(demo, "ncbi.meta-llama_Llama-3.1-8B.concat")
    assert made.genes[0] == "DEMO001"
    assert made.attributes["model"] == "meta-llama/Llama-3.1-8B"
    assert made.attributes["embedder"] == "meta-llama_Llama-3.1-8B"  # as in the file's name
    assert np.allclose(made.vectors, true_vectors(texts_of(demo, "ncbi")))


def test_avg_embeds_each_term_once_and_takes_the_mean(demo, api):
    embed(*openai(api, "--mode", "avg", source="go_all"), root=demo)
    terms = terms_of(demo, "go_all")
    assert api.sent() == collections.Counter(set(itertools.chain(*terms)))
    means = [np.mean(true_vectors(of_gene), axis=0) for of_gene in terms]
    assert np.allclose(embedding(demo, f"go_all.{ADA}.avg").vectors, means, atol=1e-6)


def test_dim_is_asked_of_models_that_shorten_their_vectors(demo, api):
    embed(*openai(api, "--model", "text-embedding-3-small", "--dim", 4), root=demo)
    assert json.loads(api.requests[0].body)["dimensions"] == 4
    vectors = embedding(demo, "ncbi.text-embedding-3-small-4.concat").vectors
    assert np.allclose(vectors, true_vectors(texts_of(demo, "ncbi"), 4))


def test_other_models_vectors_are_embedded_once_for_every_dim(demo, api):
    for options in ((), ("--dim", 4), ("--dim", 6)):
        embed(*openai(api, *options), root=demo)
    assert max(api.sent().values()) == 1
    assert "dimensions" not in json.loads(api.requests[0].body)
    whole = np.array(true_vectors(texts_of(demo, "ncbi")))
    u, s, _ = np.linalg.svd(whole - whole.mean(0), full_matrices=False)
    for dim in (4, 6):
        vectors = embedding(demo, f"ncbi.{ADA}-{dim}.concat").vectors
        expected = (u * s)[:, :dim]
        assert np.allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-3)


def test_several_sources_share_what_was_embedded_and_a_figure(demo, api):
    embed(*openai(api, "go_c", "go_all", "--mode", "avg", source="go_f"), root=demo)
    assert max(api.sent().values()) == 1
    assert (demo / f"data/demo/embeddings/sources.{ADA}.avg.png").exists()


def test_a_request_keeps_to_the_limit_on_tokens(tmp_path, api):
    write_texts(tmp_path, {f"G{i}": f"text {i} " + "word " * 3000 for i in range(100)})
    output = embed(*own(api), root=tmp_path)
    assert len(api.requests) > 1
    for batch in api.batches():
        assert sum(map(len, batch)) / 4 < 300_000  # four letters a token
    assert "cut" not in output


def test_a_request_keeps_to_the_batch_size(tmp_path, api):
    write_texts(tmp_path, {f"G{i}": f"text {i}" for i in range(25)})
    embed(*own(api, "--batch-size", 10), root=tmp_path)
    assert [len(batch) for batch in api.batches()] == [10, 10, 5]


LONG = {"FOS": "short", "TITIN": "long " * 10_000, "DMD": "long text " * 200}  # 50,000 and 2,000 bytes


@pytest.mark.parametrize("options, n_tokens, cut", [
    ([], 8191, "1 of 3 texts cut to 24,573 bytes: TITIN"),
    (["--model", "BAAI/bge-large-en-v1.5"], 512, "2 of 3 texts cut to 1,536 bytes: TITIN, DMD"),
    (["--model", "mxbai-embed-large:latest"], 512, "2 of 3 texts cut"),
    (["--max-tokens", 20_000], 20_000, None)])
def test_texts_beyond_the_models_window_or_max_tokens_are_cut(tmp_path, api, options, n_tokens, cut):
    write_texts(tmp_path, LONG)
    output = embed(*own(api, *options), root=tmp_path)
    if cut:
        assert f"--max-tokens {n_tokens}: {cut}" in output
    else:
        assert "cut" not in output
    assert set(api.sent()) == {text.strip()[:3 * n_tokens] for text in LONG.values()}


def test_fewer_than_one_token_is_refused(demo):
    assert "above 0" in fails("--embedder", "openai", "--max-tokens", 0, root=demo)


def test_a_server_that_takes_few_texts_at_once_gets_few_and_batch_size_is_named(demo, api):
    refused = 400, message("batch size is invalid, it should not be larger than 40")
    api.refuse = lambda texts: refused if len(texts) > 40 else None
    output = embed(*openai(api), root=demo)
    n_texts = len(set(texts_of(demo, "ncbi")))
    assert [len(batch) for batch in api.batches()][:3] == [n_texts, n_texts // 2, n_texts // 4]
    assert f"--batch-size {n_texts // 4}" in output
    assert np.allclose(embedding(demo, f"ncbi.{ADA}.concat").vectors, true_vectors(texts_of(demo, "ncbi")))


@pytest.mark.parametrize("status, words", [
    (400, message("maximum context length is 512 tokens")),
    (413, b"inputs must have less than 512 tokens"),
    (422, b'{"detail": "inputs must have less than 512 tokens"}'),
    (500, b"input is too large to process (512 tokens)")])
def test_too_long_a_text_is_told_by_its_gene_and_the_option_at_once(tmp_path, api, status, words):
    write_texts(tmp_path, {f"G{i}": "word " * (i + 1) for i in range(20)} | LONG)
    api.refuse = lambda texts: (status, words) if max(map(len, texts)) > 1536 else None
    start = time.perf_counter()
    error = fails(*own(api), root=tmp_path)
    assert time.perf_counter() - start < 3  # not the half minute of eight tries
    assert len(api.requests) < 20
    assert re.search("refuses the text of (DMD|TITIN)", error)
    assert "512 tokens" in error and "--max-tokens below 8191" in error
    embed(*own(api, "--max-tokens", 512), root=tmp_path)


def test_where_the_money_is_used_up_nothing_is_tried_again(demo, api):
    words = b'{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}'
    api.refuse = lambda texts: (429, words)
    assert "You exceeded your quota" in fails(*openai(api), root=demo)
    assert len(api.requests) == 1


def test_a_dry_run_tells_texts_tokens_and_cost_and_sends_nothing(demo, api):
    output = embed(*openai(api, "--dry-run"), root=demo)
    texts = set(texts_of(demo, "ncbi"))
    n_tokens = sum(-(-len(text) // 4) for text in texts)
    assert f"{len(texts)} distinct texts" in output
    assert f"{n_tokens:,} tokens" in output
    assert f"${n_tokens * 0.1 / 1e6:.4f}" in output
    assert "no price known" in embed(*openai(api, "--dry-run", "--model", "llama"), root=demo)
    assert api.requests == []
    assert not (demo / "data/demo/embeddings").exists()


def test_a_server_that_stumbles_is_asked_again(demo, api):
    api.misbehave(PATH, {"status": 500}, {"drop": -1}, {"status": 429, "headers": {"Retry-After": "1"}})
    embed(*openai(api), root=demo)
    assert len(api.requests) == 4
    assert api.requests[3].time - api.requests[2].time >= 1
    assert np.allclose(embedding(demo, f"ncbi.{ADA}.concat").vectors, true_vectors(texts_of(demo, "ncbi")))


WEB_PAGE = {"body": b"<html>", "headers": {"Content-Type": "text/html"}}
WRONG = {  # name: (what comes from the server, what the one-line error says)
    "a wrong key": (refusal(401), "status 401: no); check OPENAI_API_KEY"),
    "an unknown model": (refusal(404), "status 404: no); check --model, and --base-url"),
    "any other refusal": (refusal(402, "pay first"), "status 402: pay first"),
    "a refusal in plain text": ({"status": 405, "body": b"not at this address"}, "status 405: not at this address"),
    "too few vectors": ({"body": answer([[1.0, 2.0]] * 9)}, "9 vectors for 10 texts"),
    "numbers that are not finite": ({"body": answer([[1.0, float("nan")]] * 10)}, "not finite"),
    "ragged vectors": ({"body": answer([[1.0]] * 9 + [[1.0, 2.0]])}, "no answer of the embeddings API"),
    "vectors without numbers": ({"body": answer([[]] * 10)}, "vectors without numbers"),
    "vectors of another length": ({"body": answer([[1.0, 2.0]] * 10)}, "vectors of 2 numbers, before it was 16"),
    "a web page": (WEB_PAGE, "no answer of the embeddings API"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_server_does_wrong_is_one_line_and_finished_batches_are_kept(demo, api, case):
    fault, says = WRONG[case]
    api.misbehave(PATH, {}, {}, {}, fault)
    assert says in fails(*openai(api, "--batch-size", 10), root=demo)
    folder = demo / "data/demo/embeddings"
    assert len(api.requests) == 4
    assert len(list((folder / ".cache").rglob("*.npz"))) == 3
    assert not list(folder.glob("*.h5"))


def test_after_a_refusal_the_same_command_goes_on_with_what_is_missing(demo, api):
    api.misbehave(PATH, {}, {}, {}, refusal(402))
    fails(*openai(api, "--batch-size", 10), root=demo)
    refused = api.batches()[3]
    embed(*openai(api, "--batch-size", 10), root=demo)
    assert {text for text, n in api.sent().items() if n > 1} == set(refused)
    assert np.allclose(embedding(demo, f"ncbi.{ADA}.concat").vectors, true_vectors(texts_of(demo, "ncbi")))


def test_no_answer_is_said_with_its_cause():
    import openai as library
    with Server() as server:
        address = server.url  # nobody listens there any more
    client = library.OpenAI(api_key=KEY, base_url=address, max_retries=0)
    with pytest.raises(library.APIConnectionError) as caught:
        client.embeddings.create(model=ADA, input=["x"])
    assert "refused" in stage02.why_refused(caught.value, SimpleNamespace(model=ADA), KEY, "FOS")


def test_the_key_is_sent_and_stands_nowhere(demo, api, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    printed = embed(*openai(api), root=demo)
    headers = {name.lower(): value for name, value in api.requests[0].headers.items()}
    assert headers["authorization"] == f"Bearer {KEY}"
    for status in (401, 400):  # it is quoted whole, and in part
        quoting = refusal(status, f"Incorrect key {KEY} or {KEY[:8]}***{KEY[-4:]}: no")
        api.misbehave(PATH, quoting, always=True)
        printed += fails(*openai(api, source="go_p"), root=demo)
    assert printed.count("Incorrect key ***") == 2
    written = [path.read_bytes() for path in demo.rglob("*") if path.is_file()]
    for piece in (KEY[3:8], KEY[-4:], KEY[8:14]):
        assert piece not in printed
        assert not any(piece.encode() in data for data in written)


def test_without_a_key_openai_itself_is_not_asked(demo, monkeypatch):
    to_openai = "--embedder", "openai", "--source", "ncbi"
    assert "OPENAI_API_KEY" in fails(*to_openai, root=demo)
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    assert "letters that no key has" in fails(*to_openai, root=demo)


def test_a_password_in_the_address_is_refused(demo):
    address = "http://me:secret@127.0.0.1/v1"
    assert "no password" in fails("--embedder", "openai", "--base-url", address, root=demo)
