"""Stage 02: lsa, published pickles (harmful and broken ones too), and a server with the OpenAI embeddings API."""
import collections
import hashlib
import importlib
import json
import os
import pickle
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
    """Genes, vectors and attributes of an embedding file."""
    path = root / "data" / space / "embeddings" / f"{name}.h5"
    with h5py.File(path) as file:
        attributes = dict(file.attrs)
    genes, vectors = stage02.read_embeddings(path)
    return list(genes), vectors, attributes


def write_texts(root, texts):
    """Own texts as the source `own` of human genes."""
    (root / "own.tsv").write_text("gene\ttext\n" + "".join(f"{gene}\t{text}\n" for gene, text in texts.items()))
    run_script("01_fetch_annotations.py", "--dataset", "mine", "--tsv", f"own={root / 'own.tsv'}", root=root)


def column(root, source, name):
    with h5py.File(root / "data/demo/annotations.h5") as file:
        values = file[source][name]
        return values.asstr()[:] if values.dtype.kind == "O" else values[:]


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


# ---------------------------------------------------------------------------------------------------------------------
# The embedding file

def test_the_demo_gets_vectors_and_figures_of_every_source_by_default(demo):
    embed(root=demo)
    for source in ("ncbi", "ncbi+uniprot", "go_f", "go_c", "go_p", "go_all"):
        genes, vectors, attributes = embedding(demo, f"{source}.lsa.concat")
        assert len(genes) == 128 and vectors.dtype == np.float32
        assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
        assert (attributes["source"], attributes["embedder"], attributes["mode"]) == (source, "lsa", "concat")
        assert attributes["dim"] == vectors.shape[1] and attributes["format_version"] == 1
        assert (demo / f"data/demo/embeddings/{source}.lsa.concat.png").read_bytes().startswith(b"\x89PNG")


def test_vectors_are_made_again_only_when_forced_and_are_the_same(demo):
    path = demo / "data/demo/embeddings/ncbi.lsa.concat.h5"
    embed("--source", "ncbi", root=demo)
    first, before = embedding(demo, "ncbi.lsa.concat")[1], path.stat().st_mtime_ns
    assert "there already" in embed("--source", "ncbi", root=demo)
    assert path.stat().st_mtime_ns == before
    embed("--source", "ncbi", "--force", root=demo)
    assert first.tobytes() == embedding(demo, "ncbi.lsa.concat")[1].tobytes() and path.stat().st_mtime_ns > before


def test_vectors_made_again_count_as_the_same_input_for_later_stages(demo):
    shared, path = importlib.import_module("01_fetch_annotations"), demo / "data/demo/embeddings/ncbi.lsa.concat.h5"
    embed("--source", "ncbi", root=demo)
    before = shared.fingerprint(path)
    run_script("01_fetch_annotations.py", "--force", root=demo)
    embed("--source", "ncbi", "--force", root=demo)
    assert shared.fingerprint(path) == before


def test_changed_texts_make_the_vectors_stale(tmp_path):
    own = "--dataset", "mine", "--source", "own", "--embedder", "lsa"
    write_texts(tmp_path, {"A": "iron transport", "B": "iron binding"})
    embed(*own, root=tmp_path)
    write_texts(tmp_path, {"A": "iron transport", "B": "zinc transport"})
    assert "stale" in embed(*own, root=tmp_path)


def test_the_next_command_has_the_dataset_and_the_root(demo, tmp_path):
    assert embed("--source", "ncbi", root=demo).splitlines()[-1] == f"next: python 03_prepare_data.py --root {demo}"
    write_texts(tmp_path, {"A": "iron transport", "B": "iron binding"})
    out = embed("--dataset", "mine", "--source", "own", "--embedder", "lsa", root=tmp_path)
    assert out.splitlines()[-1] == f"next: python 03_prepare_data.py --dataset mine --h5ad FILE --root {tmp_path}"


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


# ---------------------------------------------------------------------------------------------------------------------
# lsa

def test_genes_whose_texts_share_words_are_nearer_than_others(demo):
    embed("--source", "go_p", root=demo)
    _, takes_part = importlib.import_module("01_fetch_annotations").demo_genes()
    have_common_process = takes_part.astype(int) @ takes_part.T.astype(int) > 0
    near = cosine(embedding(demo, "go_p.lsa.concat")[1])
    assert near[have_common_process].min() > near[~have_common_process].max()


def test_lsa_equals_tf_idf_and_a_dense_svd(demo):
    embed("--source", "go_all", root=demo)
    texts = column(demo, "go_all", "text")
    counts = [collections.Counter(stage02.words_of(text)) for text in texts]
    words = [w for w in {w for c in counts for w in c} if sum(w in c for c in counts) > 1]
    weights = np.array([[(1 + np.log(c[w])) * np.log((1 + len(texts)) / sum(w in d for d in counts)) if w in c else 0
                         for w in words] for c in counts])
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(weights, full_matrices=False)
    embed("--source", "go_all", "--dim", 5, root=demo)
    for name, rank in (("lsa", 10), ("lsa-5", 5)):
        vectors = embedding(demo, f"go_all.{name}.concat")[1]
        assert vectors.shape[1] == rank and np.allclose(cosine(vectors), cosine((u * s)[:, :rank]), atol=1e-5)


def test_leading_directions_equal_a_dense_svd():
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((200, 80)) @ np.diag(0.8 ** np.arange(80)) @ rng.standard_normal((80, 300))
    directions, s = stage02.leading_directions(matrix, 10)
    _, expected_s, expected = np.linalg.svd(matrix, full_matrices=False)
    assert np.allclose(s, expected_s[:10])
    assert np.allclose(np.abs(np.sum(directions.T * expected[:10], axis=1)), 1)


def test_avg_with_lsa_is_the_mean_of_the_term_vectors(demo):
    embed("--source", "go_p", "--mode", "avg", root=demo)
    _, vectors, _ = embedding(demo, "go_p.lsa.avg")
    terms, offsets = column(demo, "go_p", "terms"), column(demo, "go_p", "term_offsets")
    of_gene = [tuple(terms[a:b]) for a, b in zip(offsets, offsets[1:])]
    of_term = {names[0]: vectors[i] for i, names in enumerate(of_gene) if len(names) == 1}
    for vector, names in zip(vectors, of_gene):
        if all(name in of_term for name in names):
            assert np.allclose(vector, sum(of_term[name] for name in names) / len(names), atol=1e-6)


def simulated_texts(n_genes, n_processes, noise, seed=1):
    rng = np.random.default_rng(seed)
    return np.array(simulate.simulate_texts(simulate.simulate_processes(n_genes, n_processes, rng), noise, rng))


@pytest.mark.parametrize("n_genes, n_processes, noise", [
    (120, 7, 0), (120, 7, 0.5), (120, 7, 0.7), (500, 8, 0.5), (500, 8, 0.7), (500, 25, 0.5), (2000, 10, 0.5)])
def test_the_rank_is_the_number_of_processes_but_ten_at_least(capsys, n_genes, n_processes, noise):
    vectors = stage02.lsa(simulated_texts(n_genes, n_processes, noise), np.ones(n_genes))
    assert f"({n_processes} of" in capsys.readouterr().out
    assert vectors.shape == (n_genes, max(n_processes, 10))


def test_texts_that_tell_nothing_get_the_least_rank(capsys):
    assert stage02.lsa(simulated_texts(500, 8, noise=1), np.ones(500)).shape == (500, 10)
    assert "(1 of 256 directions rise above noise" in capsys.readouterr().out


def test_fewer_words_than_the_least_rank_give_what_there_is():
    assert stage02.lsa(np.array(["iron", "iron zinc", "zinc copper", "copper"]), np.ones(4)).shape == (4, 3)


def test_the_rank_is_the_same_each_time():
    texts = simulated_texts(120, 7, noise=0.9)
    assert stage02.lsa(texts, np.ones(120)).tobytes() == stage02.lsa(texts, np.ones(120)).tobytes()


def test_more_dimensions_than_there_are_is_an_error(demo):
    assert "finds only 10 dimensions" in fails("--source", "go_all", "--dim", 11, root=demo)
    assert "above 0" in fails("--dim", 0, root=demo)


def test_the_gene_symbol_prefix_does_not_count():
    texts = [f"Gene Symbol {gene} {metal} transport" for gene, metal in zip("ABCD", ("iron", "iron", "zinc", "zinc"))]
    near = cosine(stage02.lsa(texts, np.ones(4)))
    assert near[0, 1] == pytest.approx(1) and near[0, 2] < 0.99


def test_texts_without_a_common_word_are_an_error(tmp_path):
    write_texts(tmp_path, {"A": "iron", "B": "zinc"})
    error = fails("--dataset", "mine", "--source", "own", "--embedder", "lsa", root=tmp_path)
    assert "no two texts share a word" in error


def test_avg_of_a_source_without_terms_is_an_error(demo):
    assert "--mode concat" in fails("--source", "ncbi", "--mode", "avg", root=demo)


# ---------------------------------------------------------------------------------------------------------------------
# The figure

def test_the_figure_is_coloured_by_a_column_of_the_user(demo):
    figure_path = demo / "data/demo/embeddings/go_p.lsa.concat.png"
    embed("--source", "go_p", root=demo)
    plain = figure_path.read_bytes()
    lines = [f"DEMO{i:03d}\tp{i % 3}\t{i / 7}\n" for i in range(1, 100)]
    (demo / "my.tsv").write_text("gene\tpathway\tscore\n" + "".join(lines))
    figures = []
    for name in ("pathway", "score"):
        embed("--source", "go_p", "--color", f"{demo / 'my.tsv'}:{name}", root=demo)
        figures.append(figure_path.read_bytes())
    assert len({plain, *figures}) == 3
    for wrong in (f"{demo / 'my.tsv'}:nothing", "my.tsv"):
        assert "expected FILE.tsv:COLUMN" in fails("--color", wrong, root=demo)


def test_pca_shows_the_share_of_the_variance():
    rng = np.random.default_rng(2)
    vectors = (rng.standard_normal((50, 6)) * [5, 3, 1, 1, 1, 1]).astype(np.float32)
    xy, names = stage02.project(vectors)
    variances = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
    assert np.allclose(xy.var(axis=0, ddof=1), variances[:2], rtol=1e-3)
    assert names[0] == f"principal component 1 ({variances[0] / variances.sum():.0%} of the variance)"


@pytest.mark.parametrize("n_genes, way", [(3, "principal component 1"), (12, "UMAP 1")])
def test_umap_draws_where_it_is_installed_and_has_ten_points(monkeypatch, n_genes, way):
    class Umap:
        def __init__(self, **_):
            pass

        def fit_transform(self, vectors):
            assert len(vectors) >= 10
            return vectors[:, :2]

    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=Umap))
    xy, names = stage02.project(np.random.default_rng(0).standard_normal((n_genes, 5)))
    assert xy.shape == (n_genes, 2) and names[0].startswith(way)


def test_three_genes_get_a_figure(tmp_path):
    write_texts(tmp_path, {"A": "iron transport", "B": "iron binding", "C": "zinc binding"})
    out = embed("--dataset", "mine", "--source", "own", "--embedder", "lsa", root=tmp_path)
    assert "own.lsa.concat.png: a figure of 3 vectors" in out
    assert (tmp_path / "data/human/embeddings/own.lsa.concat.png").exists()


# ---------------------------------------------------------------------------------------------------------------------
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


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_pickles_of_each_protocol_and_shape_are_read(tmp_path, shape, protocol):
    table = SHAPES[shape](TABLE)
    genes, vectors = stage02.read_pickle(place(tmp_path, pickle.dumps(table, protocol)))
    assert genes == list(table)
    assert np.array_equal(vectors, np.float32([np.ravel(v) for v in table.values()]))


@pytest.mark.parametrize("protocol", [2, 5])
def test_module_names_of_numpy_1_and_2_are_read(tmp_path, protocol):
    data = pickle.dumps({"A": np.arange(4.0)}, protocol)
    core = b"numpy._core." if b"numpy._core." in data else b"numpy.core."
    for name in (b"numpy.core.", b"numpy._core."):  # as numpy 1 and numpy 2 write it
        n_more = len(name) - len(core)
        other = data.replace(core, name)
        if protocol > 3 and n_more:  # the lengths of the name and of the frame stand before them
            at = data.index(core)
            other = (data[:3] + (int.from_bytes(data[3:11], "little") + n_more).to_bytes(8, "little") + data[11:at - 1]
                     + bytes([data[at - 1] + n_more]) + data[at:].replace(core, name))
        assert name in other and stage02.read_pickle(place(tmp_path, other))[1].tolist() == [[0, 1, 2, 3]]


def test_published_vectors_become_an_embedding_file(tmp_path):
    path = place(tmp_path, pickle.dumps(TABLE, 4))
    embed(*PUBLISHED, root=tmp_path)
    genes, vectors, attributes = embedding(tmp_path, "go_all.published.concat", "human")
    assert genes == list(TABLE) and np.array_equal(vectors, np.float32(list(TABLE.values())))
    assert attributes["embedder"] == "published"
    assert attributes["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_dim_takes_the_leading_principal_components_of_published_vectors(tmp_path):
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((300, 40)) * 0.8 ** np.arange(40) + 3
    place(tmp_path, pickle.dumps({f"G{i}": list(row) for i, row in enumerate(wide)}, 4))
    out = embed(*PUBLISHED, "--dim", 5, root=tmp_path)
    genes, vectors, attributes = embedding(tmp_path, "go_all.published-5.concat", "human")
    u, s, _ = np.linalg.svd(wide - wide.mean(0), full_matrices=False)
    assert attributes["dim"] == 5 and attributes["embedder"] == "published-5" and len(genes) == 300
    assert np.allclose(np.abs(vectors), np.abs(u * s)[:, :5], atol=1e-3)
    assert f"{(s[:5] ** 2).sum() / (s ** 2).sum():.0%} of the variance" in out
    assert "only 40 principal components" in fails(*PUBLISHED, "--dim", 41, root=tmp_path)


def test_stage_04_takes_the_whole_vectors_unless_told(demo):
    training = importlib.import_module("04_train")
    embed("--source", "go_c", "--dim", 4, root=demo)
    names = []
    for embedder in (None, None, "lsa-4"):
        found = training.find_embeddings(demo, "demo")
        chosen = training.choose_embeddings(SimpleNamespace(name="scgenept_go_c", sources=["go_c"]), found,
                                            SimpleNamespace(embedder=embedder, mode=None))
        names.append((chosen[0]["go_c"].name, chosen[1]))
        embed("--source", "go_c", root=demo)
    assert names == [("go_c.lsa-4.concat.h5", []), ("go_c.lsa.concat.h5", []),
                     ("go_c.lsa-4.concat.h5", ["embedder=lsa-4"])]


def test_a_plus_in_the_released_name_is_sent_as_2B(tmp_path, monkeypatch):
    address = "/czi-scgenept-public.s3.amazonaws.com/models/gene_embeddings/NCBI%2BUniProt_embeddings-gpt3.5-ada.pkl"
    with Server({address: pickle.dumps(TABLE, 4)}) as server:
        monkeypatch.setenv("SCGENEPT_MIRROR", server.url)
        embed(*PUBLISHED, "--source", "ncbi+uniprot", root=tmp_path)
        assert server.requests[-1].path == address
    assert embedding(tmp_path, "ncbi+uniprot.published.concat", "human")[0] == list(TABLE)


def test_genept_vectors_come_from_its_archive(tmp_path):
    place_archive(tmp_path, "NCBI_summary_of_genes.json", "GenePT_gene_embedding_ada_text.pickle")
    embed(*PUBLISHED, "--source", "genept", root=tmp_path)
    assert embedding(tmp_path, "genept.published.concat", "human")[1].shape == (7, 1536)


def test_a_member_of_the_archive_is_found_with_a_dot_at_its_end(tmp_path):
    place_archive(tmp_path, "GenePT_gene_protein_embedding_model_3_text.pickle.")
    embed(*PUBLISHED, "--source", "genept_protein", root=tmp_path)
    assert embedding(tmp_path, "genept_protein.published.concat", "human")[0] == list(TABLE)


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
    with pytest.raises(SystemExit) as error:
        stage02.read_pickle(path)
    assert str(error.value).startswith(f"error: {path}: ") and says in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "owned").exists()


def test_after_a_bad_pickle_the_run_ends_without_an_output(tmp_path):
    path = place(tmp_path, BAD["os.system"][0])
    assert str(path) in fails(*PUBLISHED, root=tmp_path)
    assert not (tmp_path / "data/human/embeddings").exists()


FUZZED = [pickle.dumps({g: kind(v[:5]) for g, v in TABLE.items()}, protocol)
          for kind in (list, tuple, np.array) for protocol in (2, 4, 5)]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(strategies.sampled_from(FUZZED),
       strategies.lists(strategies.tuples(strategies.integers(0, 2000), strategies.binary(max_size=3)), min_size=1))
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
    """A pickled dict of `n_genes` lists of 1,536 floats, as Python's pickler writes it, without building it."""
    rng = np.random.default_rng(0)
    row = np.full((1536, 9), ord("G"), np.uint8)
    with open(path, "wb") as file:
        file.write(b"\x80\x04}\x94")
        for i in range(n_genes):
            row[:, 1:] = rng.standard_normal(1536).astype(">f8").view(np.uint8).reshape(1536, 8)
            name = f"GENE{i}".encode()
            file.write((b"(" if i % 1000 == 0 else b"") + b"\x8c" + bytes([len(name)]) + name + b"\x94]\x94("
                       + row[:1000].tobytes() + b"e(" + row[1000:].tobytes() + b"e"
                       + (b"u" if i % 1000 == 999 or i == n_genes - 1 else b""))
        file.write(b".")


MEASURE = ("import importlib, resource, sys; sys.path.insert(0, sys.argv[1]); stage02 = importlib.import_module('02_embed');"
           "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024;"
           "before = peak(); stage02.read_pickle(sys.argv[2]); print(peak() - before)")


def peak_of_reading(path):
    """MB of memory that reading a pickle takes beyond what the imports take, in a process of its own."""
    return int(subprocess.run([sys.executable, "-c", MEASURE, KIT, path], check=True, capture_output=True).stdout)


def test_a_pickle_of_python_floats_never_stands_in_memory_as_python_floats(tmp_path):
    path = place(tmp_path, b"")
    write_big_pickle(path, 2_500)
    assert peak_of_reading(path) < 75  # the vectors are 15 MB; as Python floats they would be 150 MB


@pytest.mark.soak
def test_a_pickle_as_large_as_the_released_ones_is_read_in_3_minutes_and_2_gb(tmp_path):
    path = place(tmp_path, b"")
    write_big_pickle(path, 93_800)  # 1.3 GB
    start = time.perf_counter()
    assert peak_of_reading(path) < 2000
    assert time.perf_counter() - start < 180


# ---------------------------------------------------------------------------------------------------------------------
# openai

PATH = "/v1/embeddings"
ADA = "text-embedding-ada-002"


def true_vector(text, dim=16):
    return np.random.default_rng(list(hashlib.sha256(text.encode()).digest())).standard_normal(dim).astype(np.float32)


def answer(vectors):
    """The body of an answer with these vectors, in another order than asked for: the API does not promise one."""
    data = [{"object": "embedding", "index": i, "embedding": np.array(v).tolist()} for i, v in enumerate(vectors)]
    return json.dumps({"object": "list", "model": ADA, "data": data[::-1], "usage": {"prompt_tokens": 1, "total_tokens": 1}})


class Api(Server):
    """An embeddings server. `misbehave(PATH, {...}, ...)` makes it fail, one request after the other; `refuse`, a
    function of a request's texts, gives the status and body of a refusal, or None."""

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
        vectors = [true_vector(text, asked.get("dimensions", 16)) for text in asked["input"]]
        return 200, {"Content-Type": "application/json"}, answer(vectors).encode()

    def batches(self):
        """The texts of each request so far."""
        return [json.loads(request.body)["input"] for request in self.requests]

    def sent(self):
        """How often each text was sent."""
        return collections.Counter(text for batch in self.batches() for text in batch)


@pytest.fixture
def api():
    with Api() as server:
        yield server


def openai(api, *args, source="ncbi"):
    return "--embedder", "openai", "--base-url", api.base_url, "--source", source, *args


def refusal(status, message="no"):
    return {"status": status, "body": json.dumps({"error": {"message": message}}).encode()}


def test_vectors_come_from_a_server_in_the_order_of_the_genes(demo, api):
    embed(*openai(api, "--model", "meta-llama/Llama-3.1-8B"), root=demo)
    genes, vectors, attributes = embedding(demo, "ncbi.meta-llama_Llama-3.1-8B.concat")
    assert genes[0] == "DEMO001" and attributes["model"] == "meta-llama/Llama-3.1-8B"
    assert attributes["embedder"] == "meta-llama_Llama-3.1-8B"  # as in the file's name
    assert np.allclose(vectors, [true_vector(text) for text in column(demo, "ncbi", "text")])


def test_avg_embeds_each_term_once_and_takes_the_mean(demo, api):
    embed(*openai(api, "--mode", "avg", source="go_all"), root=demo)
    _, vectors, _ = embedding(demo, f"go_all.{ADA}.avg")
    terms, offsets = column(demo, "go_all", "terms"), column(demo, "go_all", "term_offsets")
    assert api.sent() == collections.Counter(set(terms))
    for i, vector in enumerate(vectors):
        of_terms = [true_vector(term) for term in terms[offsets[i]:offsets[i + 1]]]
        assert np.allclose(vector, np.mean(of_terms, axis=0), atol=1e-6)


def test_dim_is_asked_of_models_that_shorten_their_vectors(demo, api):
    embed(*openai(api, "--model", "text-embedding-3-small", "--dim", 4), root=demo)
    assert json.loads(api.requests[0].body)["dimensions"] == 4
    _, vectors, _ = embedding(demo, "ncbi.text-embedding-3-small-4.concat")
    assert np.allclose(vectors, [true_vector(text, 4) for text in column(demo, "ncbi", "text")])


def test_other_models_vectors_are_embedded_once_for_every_dim(demo, api):
    for options in ((), ("--dim", 4), ("--dim", 6)):
        embed(*openai(api, *options), root=demo)
    assert max(api.sent().values()) == 1 and "dimensions" not in json.loads(api.requests[0].body)
    whole = embedding(demo, f"ncbi.{ADA}.concat")[1]
    u, s, _ = np.linalg.svd(whole - whole.mean(0), full_matrices=False)
    for dim in (4, 6):
        vectors = embedding(demo, f"ncbi.{ADA}-{dim}.concat")[1]
        assert np.allclose(vectors @ vectors.T, (u * s ** 2)[:, :dim] @ u[:, :dim].T, atol=1e-3)


def test_several_sources_share_what_was_embedded_and_a_figure(demo, api):
    embed(*openai(api, "go_c", "go_all", "--mode", "avg", source="go_f"), root=demo)
    assert max(api.sent().values()) == 1
    assert (demo / f"data/demo/embeddings/sources.{ADA}.avg.png").exists()


def test_a_request_keeps_to_the_limit_on_tokens(tmp_path, api):
    write_texts(tmp_path, {f"G{i}": f"text {i} " + "word " * 3000 for i in range(100)})
    out = embed("--dataset", "mine", *openai(api, source="own"), root=tmp_path)
    assert len(api.requests) > 1 and all(sum(map(len, batch)) / 4 < 300_000 for batch in api.batches())
    assert "cut" not in out


def test_a_request_keeps_to_the_batch_size(tmp_path, api):
    write_texts(tmp_path, {f"G{i}": f"text {i}" for i in range(2100)})
    embed("--dataset", "mine", *openai(api, "--batch-size", 2048, source="own"), root=tmp_path)
    assert sorted(map(len, api.batches())) == [52, 2048]


LONG = {"FOS": "short", "TITIN": "long " * 10_000, "DMD": "long text " * 200}  # 50,000 and 2,000 bytes


@pytest.mark.parametrize("options, n_tokens, cut", [
    ([], 8191, "1 of 3 texts cut to 24,573 bytes: TITIN"),
    (["--model", "BAAI/bge-large-en-v1.5"], 512, "2 of 3 texts cut to 1,536 bytes: TITIN, DMD"),
    (["--model", "mxbai-embed-large:latest"], 512, "2 of 3 texts cut"),
    (["--max-tokens", 100], 100, "2 of 3 texts cut to 300 bytes"),
    (["--max-tokens", 20_000], 20_000, None)])
def test_texts_beyond_the_models_window_or_max_tokens_are_cut(tmp_path, api, options, n_tokens, cut):
    write_texts(tmp_path, LONG)
    out = embed("--dataset", "mine", *openai(api, *options, source="own"), root=tmp_path)
    assert f"--max-tokens {n_tokens}: {cut}" in out if cut else "cut" not in out
    assert set(api.sent()) == {text.strip()[:3 * n_tokens] for text in LONG.values()}


def test_fewer_than_one_token_is_refused(demo):
    assert "above 0" in fails("--embedder", "openai", "--max-tokens", 0, root=demo)


@pytest.mark.parametrize("status, words", [
    (413, b"batch size 128 > maximum allowed batch size 40"), (422, b"too many inputs"),
    (400, json.dumps({"error": {"message": "batch size is invalid, it should not be larger than 40"}}).encode())])
def test_a_server_that_takes_few_texts_at_once_gets_few_and_batch_size_is_named(demo, api, status, words):
    api.refuse = lambda texts: (status, words) if len(texts) > 40 else None
    out = embed(*openai(api), root=demo)
    n_texts = len(set(column(demo, "ncbi", "text")))
    assert [len(batch) for batch in api.batches()][:3] == [n_texts, n_texts // 2, n_texts // 4]
    assert f"--batch-size {n_texts // 4}" in out and len(api.sent()) == n_texts
    assert embedding(demo, f"ncbi.{ADA}.concat")[1].shape == (128, 16)


@pytest.mark.parametrize("status, words", [
    (400, json.dumps({"error": {"message": "maximum context length is 512 tokens"}}).encode()),
    (413, b"inputs must have less than 512 tokens"), (422, b'{"detail": "inputs must have less than 512 tokens"}'),
    (500, b"input is too large to process (512 tokens)")])
def test_too_long_a_text_is_told_by_its_gene_and_the_option_at_once(tmp_path, api, status, words):
    write_texts(tmp_path, {f"G{i}": "word " * (i + 1) for i in range(20)} | LONG)
    api.refuse = lambda texts: (status, words) if max(map(len, texts)) > 1536 else None
    to_server = "--dataset", "mine", *openai(api, source="own")
    start = time.perf_counter()
    error = fails(*to_server, root=tmp_path)
    assert "refuses the text of DMD" in error or "refuses the text of TITIN" in error
    assert "512 tokens" in error and "--max-tokens below 8191" in error
    assert len(api.requests) < 20 and time.perf_counter() - start < 3  # not the half minute of eight tries
    embed(*to_server, "--max-tokens", 512, root=tmp_path)


def test_where_the_money_is_used_up_nothing_is_tried_again(demo, api):
    api.refuse = lambda texts: (429, b'{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}')
    assert "You exceeded your quota" in fails(*openai(api), root=demo)
    assert len(api.requests) == 1


def test_a_dry_run_tells_texts_tokens_and_cost_and_sends_nothing(demo, api):
    out = embed(*openai(api, "--dry-run"), root=demo)
    texts = set(column(demo, "ncbi", "text"))
    n_tokens = sum(-(-len(text) // 4) for text in texts)
    assert f"{len(texts)} distinct texts" in out and f"{n_tokens:,} tokens" in out and f"${n_tokens * 0.1 / 1e6:.4f}" in out
    assert "no price known" in embed(*openai(api, "--dry-run", "--model", "llama"), root=demo)
    assert not api.requests and not (demo / "data/demo/embeddings").exists()


def test_a_server_that_stumbles_is_asked_again(demo, api):
    api.misbehave(PATH, {"status": 500}, {"drop": -1}, {"status": 429, "headers": {"Retry-After": "1"}})
    embed(*openai(api), root=demo)
    assert len(api.requests) == 4 and api.requests[3].time - api.requests[2].time >= 1
    assert embedding(demo, f"ncbi.{ADA}.concat")[1].shape == (128, 16)


WRONG = {  # name: (what comes from the server, what the one-line error says)
    "a wrong key": (refusal(401), "status 401: no); check OPENAI_API_KEY"),
    "an unknown model": (refusal(404), "status 404: no); check --model, and --base-url"),
    "any other refusal": (refusal(402, "pay first"), "status 402: pay first"),
    "a refusal in plain text": ({"status": 405, "body": b"not at this address"}, "status 405: not at this address"),
    "too few vectors": ({"body": answer([[1.0, 2.0]] * 9).encode()}, "9 vectors for 10 texts"),
    "numbers that are not finite": ({"body": answer([[1.0, float("nan")]] * 10).encode()}, "not finite"),
    "ragged vectors": ({"body": answer([[1.0]] * 9 + [[1.0, 2.0]]).encode()}, "no answer of the embeddings API"),
    "vectors without numbers": ({"body": answer([[]] * 10).encode()}, "vectors without numbers"),
    "vectors of another length": ({"body": answer([[1.0, 2.0]] * 10).encode()}, "vectors of 2 numbers, before it was 16"),
    "a web page": ({"body": b"<html>", "headers": {"Content-Type": "text/html"}}, "no answer of the embeddings API"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_the_server_does_wrong_is_one_line_and_finished_batches_are_kept(demo, api, case):
    fault, says = WRONG[case]
    api.misbehave(PATH, {}, {}, {}, fault)
    assert says in fails(*openai(api, "--batch-size", 10), root=demo)
    folder = demo / "data/demo/embeddings"
    assert len(api.requests) == 4 and len(list((folder / ".cache").rglob("*.npz"))) == 3
    assert not list(folder.glob("*.h5"))


def test_after_a_refusal_the_same_command_goes_on_with_what_is_missing(demo, api):
    api.misbehave(PATH, {}, {}, {}, refusal(402))
    fails(*openai(api, "--batch-size", 10), root=demo)
    texts, finished = column(demo, "ncbi", "text"), sum(api.batches()[:3], [])
    embed(*openai(api, "--batch-size", 10), root=demo)
    assert all(api.sent()[text] == 1 for text in finished)
    assert np.allclose(embedding(demo, f"ncbi.{ADA}.concat")[1], [true_vector(text) for text in texts])


def test_no_answer_is_said_with_its_cause():
    import openai as library
    with Server() as server:
        address = server.url  # nobody listens there any more
    with pytest.raises(library.APIConnectionError) as error:
        library.OpenAI(api_key=KEY, base_url=address, max_retries=0).embeddings.create(model=ADA, input=["x"])
    assert "refused" in stage02.why_refused(error.value, SimpleNamespace(model=ADA), KEY, "FOS")


def test_a_killed_run_goes_on_without_sending_again_what_was_finished(tmp_path, api):
    write_texts(tmp_path, {f"G{i}": f"text {i}" for i in range(320)})
    args = "--dataset", "mine", *openai(api, "--batch-size", 8, source="own")
    api.delay = 0.1
    process = subprocess.Popen([sys.executable, KIT / SCRIPT, *map(str, args), "--root", tmp_path], stdout=subprocess.DEVNULL)
    while len(api.requests) < 10:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = list((tmp_path / "data/human/embeddings/.cache").rglob("*.npz"))
    assert 9 <= len(kept) < 40

    api.delay = 0
    embed(*args, root=tmp_path)
    sent_twice = [text for text, n in api.sent().items() if n > 1]
    assert len(sent_twice) <= 8 and len(api.sent()) == 320  # only the batch that was under way
    genes, vectors, _ = embedding(tmp_path, f"own.{ADA}.concat", "human")
    assert np.allclose(vectors, [true_vector(f"text {gene[1:]}") for gene in genes])


def test_the_key_is_sent_and_stands_nowhere(demo, api, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    out = embed(*openai(api), root=demo)
    sent = [value for request in api.requests for name, value in request.headers.items() if name.lower() == "authorization"]
    assert sent == [f"Bearer {KEY}"]
    for status in (401, 403, 400, 422):
        fault = refusal(status, f"Incorrect key {KEY} or {KEY[:8]}***{KEY[-4:]}: no")
        api.misbehave(PATH, fault, always=True)
        out += fails(*openai(api, source="go_p"), root=demo)
    everything = [out.encode()] + [path.read_bytes() for path in demo.rglob("*") if path.is_file()]
    assert len(everything) > 3
    for piece in (KEY[3:8], KEY[-4:], KEY[8:14]):
        assert not any(piece.encode() in data for data in everything)


def test_without_a_key_openai_itself_is_not_asked(demo, monkeypatch):
    to_openai = "--embedder", "openai", "--source", "ncbi"
    assert "OPENAI_API_KEY" in fails(*to_openai, root=demo)
    monkeypatch.setenv("OPENAI_API_KEY", "two words")
    assert "letters that no key has" in fails(*to_openai, root=demo)


def test_a_password_in_the_address_is_refused(demo):
    assert "no password" in fails("--embedder", "openai", "--base-url", "http://me:secret@127.0.0.1/v1", root=demo)
