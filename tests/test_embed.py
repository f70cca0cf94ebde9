"""Stage 02, run as a process: lsa, published pickles (also hostile ones), an embeddings server (also a misbehaving one)."""
import base64
import collections
import hashlib
import http.server
import importlib
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings, strategies

ROOT = Path(__file__).resolve().parent.parent
KEY = "sk-Zq8vX3nW5tK7pL2mR9"
sys.path.insert(0, str(ROOT))
stage02 = importlib.import_module("02_embed")


def script(name, *args, root, **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OPENAI_", "SCGENEPT_")) and "proxy" not in k.lower()}
    return [sys.executable, str(ROOT / name), *map(str, args), "--root", str(root)], clean | env


def run(*args, root, name="02_embed.py", **env):
    command, env = script(name, *args, root=root, **env)
    return subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=120)


def embed(*args, root, **env):
    """Run stage 02, which has to succeed."""
    done = run(*args, root=root, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(*args, root, **env):
    """Run stage 02, which has to end in one line and exit code 1."""
    done = run(*args, root=root, **env)
    errors = [line for line in done.stderr.splitlines() if "next try in" not in line]
    assert done.returncode == 1 and len(errors) == 1 and errors[0].startswith("error: "), done.stderr
    return errors[0]


def read(root, name, space="demo"):
    with h5py.File(root / "data" / space / "embeddings" / f"{name}.h5") as file:
        return list(file["genes"].asstr()[:]), file["vectors"][:], dict(file.attrs)


def write_texts(root, texts):
    """Own texts as the source `own` of the space human."""
    (root / "own.tsv").write_text("gene\ttext\n" + "".join(f"{gene}\t{text}\n" for gene, text in texts.items()))
    done = run("--dataset", "mine", "--tsv", f"own={root / 'own.tsv'}", root=root, name="01_fetch_annotations.py")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="session")
def demo_annotations(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    assert run(root=root, name="01_fetch_annotations.py").returncode == 0
    return root / "data/demo/annotations.h5"


@pytest.fixture
def demo(tmp_path, demo_annotations):
    (tmp_path / "data/demo").mkdir(parents=True)
    shutil.copy(demo_annotations, tmp_path / "data/demo")
    return tmp_path


def cosine(vectors):
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


# ---------------------------------------------------------------------------------------------------------------------
# lsa

def test_the_demo_gets_vectors_and_figures_of_every_source_by_default(demo):
    embed(root=demo)
    for source in ("ncbi", "ncbi+uniprot", "go_f", "go_c", "go_p", "go_all"):
        genes, vectors, attributes = read(demo, f"{source}.lsa.concat")
        assert len(genes) == 128 and vectors.dtype == np.float32 and np.allclose(np.linalg.norm(vectors, axis=1), 1)
        assert (attributes["source"], attributes["embedder"], attributes["mode"]) == (source, "lsa", "concat")
        assert attributes["dim"] == vectors.shape[1] and attributes["format_version"] == 1
        assert (demo / f"data/demo/embeddings/{source}.lsa.concat.png").read_bytes().startswith(b"\x89PNG")


def test_lsa_gives_the_same_vectors_again_and_only_when_forced(demo):
    embed("--source", "ncbi", root=demo)
    first, file = read(demo, "ncbi.lsa.concat")[1], demo / "data/demo/embeddings/ncbi.lsa.concat.h5"
    before = file.stat().st_mtime_ns
    assert "there already" in embed("--source", "ncbi", root=demo) and file.stat().st_mtime_ns == before
    embed("--source", "ncbi", "--force", root=demo)
    assert first.tobytes() == read(demo, "ncbi.lsa.concat")[1].tobytes() and file.stat().st_mtime_ns > before


def test_changed_texts_make_the_vectors_stale(tmp_path):
    write_texts(tmp_path, {"A": "iron transport", "B": "iron binding"})
    own = "--dataset", "mine", "--source", "own", "--embedder", "lsa"
    embed(*own, root=tmp_path)
    write_texts(tmp_path, {"A": "iron transport", "B": "zinc transport"})
    assert "stale" in embed(*own, root=tmp_path)


def test_genes_whose_texts_share_words_are_nearer_than_others(demo):
    embed("--source", "go_p", root=demo)
    stage01 = importlib.import_module("01_fetch_annotations")
    _, takes_part = stage01.demo_genes()
    shared = takes_part.astype(int) @ takes_part.T.astype(int) > 0
    near = cosine(read(demo, "go_p.lsa.concat")[1])
    assert near[shared].min() > near[~shared].max()


def test_lsa_equals_tf_idf_and_a_dense_svd(demo):
    embed("--source", "go_all", root=demo)
    with h5py.File(demo / "data/demo/annotations.h5") as file:
        texts = file["go_all/text"].asstr()[:]
    counts = [collections.Counter(stage02.words_of(text)) for text in texts]
    words = [w for w in {w for c in counts for w in c} if sum(w in c for c in counts) > 1]
    weights = np.array([[(1 + np.log(c[w])) * np.log((1 + len(texts)) / sum(w in d for d in counts)) if w in c else 0
                         for w in words] for c in counts])
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    u, s, _ = np.linalg.svd(weights, full_matrices=False)
    vectors = read(demo, "go_all.lsa.concat")[1]
    rank = int((s > 1e-6 * s[0]).sum())
    assert vectors.shape[1] == rank and np.allclose(cosine(vectors), cosine((u * s)[:, :rank]), atol=1e-5)


def test_leading_directions_equal_a_dense_svd():
    rng = np.random.default_rng(1)
    matrix = rng.standard_normal((200, 80)) @ np.diag(0.8 ** np.arange(80)) @ rng.standard_normal((80, 300))
    directions, s = stage02.leading_directions(matrix, 10)
    _, expected_s, expected = np.linalg.svd(matrix, full_matrices=False)
    assert np.allclose(s, expected_s[:10]) and np.allclose(np.abs(np.sum(directions.T * expected[:10], axis=1)), 1)


def test_avg_with_lsa_is_the_mean_of_the_term_vectors(demo):
    embed("--source", "go_p", "--mode", "avg", root=demo)
    genes, vectors, _ = read(demo, "go_p.lsa.avg")
    with h5py.File(demo / "data/demo/annotations.h5") as file:
        terms, offsets = file["go_p/terms"].asstr()[:], file["go_p/term_offsets"][:]
    of_gene = [tuple(terms[a:b]) for a, b in zip(offsets, offsets[1:])]
    of_term = {t[0]: vectors[i] for i, t in enumerate(of_gene) if len(t) == 1}
    for vector, names in zip(vectors, of_gene):
        if all(name in of_term for name in names):
            assert np.allclose(vector, sum(of_term[name] for name in names) / len(names), atol=1e-6)


def test_the_gene_symbol_prefix_does_not_count():
    texts = [f"Gene Symbol {gene} {metal} transport" for gene, metal in zip("ABCD", ("iron", "iron", "zinc", "zinc"))]
    near = cosine(stage02.lsa(texts, np.ones(4)))
    assert near[0, 1] == pytest.approx(1) and near[0, 2] < 0.99


def test_texts_without_a_common_word_are_an_error(tmp_path):
    write_texts(tmp_path, {"A": "iron", "B": "zinc"})
    assert "no word stands in two texts" in fails("--dataset", "mine", "--source", "own", "--embedder", "lsa", root=tmp_path)


def test_avg_of_a_source_without_terms_is_an_error(demo):
    assert "--mode concat" in fails("--source", "ncbi", "--mode", "avg", root=demo)


def test_a_missing_source_names_the_command_that_makes_it(tmp_path):
    assert "01_fetch_annotations.py" in fails(root=tmp_path)
    write_texts(tmp_path, {"A": "iron", "B": "zinc"})
    error = fails("--dataset", "mine", "--source", "other", "--embedder", "lsa", root=tmp_path)
    assert "01_fetch_annotations.py --dataset mine --tsv other=FILE" in error


def test_a_source_name_cannot_leave_the_folder(demo):
    assert "--source '../x'" in fails("--source", "../x", root=demo)


def test_the_figure_is_coloured_by_a_column_of_the_user(demo):
    embed("--source", "go_p", root=demo)
    plain = (demo / "data/demo/embeddings/go_p.lsa.concat.png").read_bytes()
    lines = [f"DEMO{i:03d}\tp{i % 3}\t{i / 7}\n" for i in range(1, 100)]
    (demo / "my.tsv").write_text("gene\tpathway\tscore\n" + "".join(lines))
    for column in ("pathway", "score"):
        embed("--source", "go_p", "--color", f"{demo / 'my.tsv'}:{column}", root=demo)
        coloured = (demo / "data/demo/embeddings/go_p.lsa.concat.png").read_bytes()
        assert coloured != plain
    assert "expected FILE.tsv:COLUMN" in fails("--color", f"{demo / 'my.tsv'}:nothing", root=demo)


def test_help_comes_within_half_a_second_of_python_itself(tmp_path):
    start = time.perf_counter()
    assert "python 02_embed.py" in embed("--help", root=tmp_path)
    seconds = time.perf_counter() - start
    assert seconds < 1  # half a second on an idle machine


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


SHAPES = {  # what a table of vectors may look like: TABLE -> what is pickled
    "lists": lambda t: t, "tuples": lambda t: {g: tuple(v) for g, v in t.items()},
    "float64 arrays": lambda t: {g: np.array(v) for g, v in t.items()},
    "float32 arrays": lambda t: {g: np.array(v, np.float32) for g, v in t.items()},
    "big-endian arrays": lambda t: {g: np.array(v, ">f8") for g, v in t.items()},
    "rows": lambda t: {g: np.array([v]) for g, v in t.items()},
    "lists of numpy floats": lambda t: {g: [np.float64(x) for x in v] for g, v in t.items()},
    "the same list twice": lambda t: t | {"twin": t["G3"]},
}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_pickles_of_each_protocol_and_shape_are_read(tmp_path, shape, protocol):
    table = SHAPES[shape](TABLE)
    path = place(tmp_path, pickle.dumps(table, protocol))
    genes, vectors = stage02.read_pickle(path)
    assert genes == list(table)
    assert np.array_equal(vectors, np.float32([np.ravel(v) for v in table.values()]))


def test_module_names_of_numpy_1_and_2_are_read(tmp_path):
    data = pickle.dumps({"A": np.arange(4.0)}, 2)
    for core in b"numpy.core.", b"numpy._core.":  # as numpy 1 and numpy 2 write it
        other = data.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", core)
        assert core in other and stage02.read_pickle(place(tmp_path, other))[1].tolist() == [[0, 1, 2, 3]]


def test_published_vectors_become_an_embedding_file(tmp_path):
    path = place(tmp_path, pickle.dumps(TABLE, 4))
    embed(*PUBLISHED, root=tmp_path)
    genes, vectors, attributes = read(tmp_path, "go_all.published.concat", "human")
    assert genes == list(TABLE) and np.array_equal(vectors, np.float32(list(TABLE.values())))
    assert attributes["embedder"] == "published" and attributes["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_plus_in_the_released_name_is_sent_as_2B(tmp_path):
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            data = pickle.dumps(TABLE, 4)
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    with serving(Handler) as address:
        embed(*PUBLISHED, "--source", "ncbi+uniprot", root=tmp_path, SCGENEPT_MIRROR=address)
    assert asked[-1] == ("/czi-scgenept-public.s3.amazonaws.com/models/gene_embeddings/"
                         "NCBI%2BUniProt_embeddings-gpt3.5-ada.pkl")
    assert read(tmp_path, "ncbi+uniprot.published.concat", "human")[0] == list(TABLE)


def test_genept_vectors_come_from_its_zip(tmp_path):
    path = place(tmp_path, b"", "GenePT_emebdding_v2.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("GenePT_emebdding_v2/GenePT_gene_embedding_ada_text.pickle", pickle.dumps(TABLE, 4))
    embed(*PUBLISHED, "--source", "genept", root=tmp_path)
    assert read(tmp_path, "genept.published.concat", "human")[1].shape == (7, 1536)
    assert "no GenePT_gene_protein_" in fails(*PUBLISHED, "--source", "genept_protein", root=tmp_path)
    path.write_bytes(path.read_bytes()[:5000])
    assert "not a whole zip" in fails(*PUBLISHED, "--source", "genept", "--force", root=tmp_path)


def test_what_was_never_published_is_an_error_that_lists_what_was(tmp_path):
    assert "go_f (avg)" in fails(*PUBLISHED, "--source", "ncbi", "--mode", "avg", root=tmp_path)
    assert "--embedder lsa" in fails("--embedder", "published", root=tmp_path)


class Reduce:
    """Pickles as a call of any function."""
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def counted(opcode, n, data=b""):
    return b"\x80\x04}" + opcode + n + data


HOSTILE = {  # name: (pickle, what the one-line error says)
    "os.system": (pickle.dumps({"FOS": Reduce(os.system, "touch owned")}, 4), "system"),
    "os.system in a list": (pickle.dumps({"FOS": [1.0, Reduce(os.system, "touch owned")]}, 2), "'FOS'"),
    "eval": (pickle.dumps({"FOS": Reduce(eval, "open('owned', 'w')")}, 4), "builtins.eval"),
    "eval in protocol 2": (pickle.dumps({"FOS": Reduce(eval, "open('owned', 'w')")}, 2), "eval"),
    "instance": (b"\x80\x02(S'touch owned'\nios\nsystem\n.", "refused"),
    "an object array": (pickle.dumps({"FOS": np.array([1.0, None], object)}, 4), "'O8' is refused"),
    "a class of numpy": (pickle.dumps({"FOS": np.ma.masked_array([1.0])}, 4), "numpy.ma"),
    "a structured dtype": (pickle.dumps({"FOS": np.zeros(2, "f8,f8")}, 4), "'V16' is refused"),
    "a matrix": (pickle.dumps({"FOS": np.zeros((2, 3))}, 4), "no vector"),
    "a state for a dict": (b"\x80\x04}(K\1K\1tb.", "dict is refused"),
    "a dtype that is a dict": (b"\x80\x04}(\x8c\3FOScnumpy.core.multiarray\nscalar\n}(\x8c\2O8]\x8c\1|]uC\0\x86Ru.",
                               "proper dtype"),
    "truncated": (pickle.dumps(TABLE, 4)[:-500], "ends in the middle (near 'G6')"),
    "empty": (b"", "ends in the middle"),
    "deep nesting": (b"\x80\x04" + b"(" * 10**6, "nested"),
    "deep tuples": (b"\x80\x04)" + b"\x85" * 10**5 + b".", "no dict"),
    "a string of 8 exabytes": (counted(b"\x8d", b"\xff" * 7 + b"\x7f"), "ends in the middle"),
    "bytes of 4 gigabytes": (counted(b"B", b"\xff" * 4), "ends in the middle"),
    "an absurd array shape": (pickle.dumps({"A": np.zeros(3)}, 4).replace(b"K\x03\x85", b"J\xff\xff\xff\x7f\x85"),
                              "no vector"),
    "a NUL in a gene's name": (pickle.dumps({"A\0": [1.0]}, 4), "NUL"),
    "a key that is no string": (pickle.dumps({1: [1.0]}, 4), "no string but a int"),
    "a vector of words": (pickle.dumps({"FOS": ["a", "b"]}, 4), "'FOS'"),
    "no vector at all": (pickle.dumps({"FOS": None}, 4), "NoneType"),
    "ragged": (pickle.dumps({"FOS": [1.0, 2.0], "JUN": [1.0]}, 4), "'JUN' has 1 numbers"),
    "not finite": (pickle.dumps({"FOS": [1.0], "JUN": [float("nan")]}, 4), "'JUN'"),
    "too large for float32": (pickle.dumps({"FOS": np.array([1e300])}, 4), "not finite"),
    "no table": (pickle.dumps([1.0, 2.0], 4), "no dict"),
    "nothing in it": (pickle.dumps({}, 4), "no vectors"),
    "a web page": (b"<!DOCTYPE html><html>404</html>", "not a pickle"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_or_broken_pickle_is_one_line(tmp_path, monkeypatch, case):
    data, says = HOSTILE[case]
    path = place(tmp_path, data)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        stage02.read_pickle(path)
    assert says in str(error.value) and str(error.value).startswith(f"error: {path}: ") and "\n" not in str(error.value)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("case", ["os.system", "truncated", "not finite"])
def test_after_a_bad_pickle_the_run_ends_without_an_output(tmp_path, case):
    path = place(tmp_path, HOSTILE[case][0])
    assert str(path) in fails(*PUBLISHED, root=tmp_path)
    assert not (tmp_path / "owned").exists() and not (tmp_path / "data/human/embeddings").exists()


def test_one_vector_under_many_names_cannot_fill_the_memory(tmp_path):
    floats = (b"G" + struct.pack(">d", 1)) * 50_000
    names = b"".join(b"\x8c\4%04dh\0" % i for i in range(5000))  # each followed by a reference to the one tuple
    with pytest.raises(SystemExit, match="unfolds"):
        stage02.read_pickle(place(tmp_path, b"\x80\x04}(X\1\0\0\0a(" + floats + b"t\x94" + names + b"u."))


FUZZED = [pickle.dumps({g: kind(v[:5]) for g, v in TABLE.items()}, protocol)
          for kind in (list, tuple, np.array) for protocol in (2, 4, 5)]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(strategies.sampled_from(FUZZED),
       strategies.lists(strategies.tuples(strategies.integers(0, 2000), strategies.binary(max_size=3)), min_size=1))
def test_a_mutated_pickle_is_read_or_refused_in_one_line(tmp_path_factory, data, edits):
    for at, new in edits:
        at %= len(data)
        data = data[:at] + new + data[at + 1:]
    path = tmp_path_factory.getbasetemp() / "mutated.pickle"
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


MEASURE = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL); " \
          "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"


def peak_and_seconds(*args, root):
    """Run stage 02; its peak memory in MB and its time in s. A small process starts it, whose size counts, too."""
    command, env = script("02_embed.py", *args, root=root)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", MEASURE, *command], env=env, check=True, capture_output=True, text=True)
    peak, seconds = int(done.stdout) / 1024, time.perf_counter() - start
    print(f"peak {peak:.0f} MB, {seconds:.1f} s")
    return peak, seconds


def test_the_bytes_of_arrays_are_not_kept(tmp_path):
    with open(place(tmp_path, b""), "wb") as file:
        pickle.dump({f"G{i}": np.full(1536, i / 7) for i in range(4_000)}, file, 4)  # 50 MB
    peak, _ = peak_and_seconds(*PUBLISHED, root=tmp_path)
    assert peak < 300


def test_a_pickle_of_python_floats_never_stands_in_memory_as_python_floats(tmp_path):
    write_big_pickle(place(tmp_path, b""), 4_000)  # 55 MB; 200 MB as Python floats
    peak, _ = peak_and_seconds(*PUBLISHED, root=tmp_path)
    assert peak < 300


@pytest.mark.soak
def test_a_pickle_as_large_as_the_released_ones_in_2_gb_and_2_minutes(tmp_path, request):
    if "soak" not in (request.config.option.markexpr or ""):
        pytest.skip("only with -m soak")
    write_big_pickle(place(tmp_path, b""), 93_800)  # 1.3 GB
    peak, seconds = peak_and_seconds(*PUBLISHED, root=tmp_path)
    assert peak < 2000 and seconds < 120


# ---------------------------------------------------------------------------------------------------------------------
# openai

class serving:
    """A server on a free port of 127.0.0.1, in a thread; gives its address."""
    def __init__(self, handler):
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return f"http://127.0.0.1:{self.server.server_port}/"

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


def true_vector(text, dim=16):
    return np.random.default_rng(list(hashlib.sha256(text.encode()).digest())).standard_normal(dim).astype(np.float32)


class Api:
    """An embeddings server: `requests` is what it was asked, `faults` what it does wrong first, one request each."""
    def __init__(self):
        self.requests, self.times, self.keys, self.faults, self.delay, self.base64 = [], [], [], [], 0, True
        api = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                api.requests.append(body["input"])
                api.times.append(time.monotonic())
                api.keys.append(self.headers["Authorization"])
                time.sleep(api.delay)
                fault = api.faults.pop(0) if api.faults else None
                status, headers = 200, {}
                vectors = [true_vector(text) for text in body["input"]]
                if fault == "drop":
                    self.connection.close()
                    return
                if isinstance(fault, tuple):
                    status, headers = fault
                elif fault == "other dim":
                    vectors = [v[:8] for v in vectors]
                elif fault == "too few":
                    vectors = vectors[:-1]
                elif fault == "nan":
                    vectors[0] = vectors[0] * np.nan
                elif fault == "ragged":
                    vectors[0] = vectors[0][:3]
                if api.base64 and body.get("encoding_format") == "base64":
                    vectors = [base64.b64encode(v.tobytes()).decode() for v in vectors]
                else:
                    vectors = [v.tolist() for v in vectors]
                data = [{"object": "embedding", "index": i, "embedding": v} for i, v in enumerate(vectors)]
                reply = {"object": "list", "model": body["model"], "data": data[::-1],  # the order is not promised
                         "usage": {"prompt_tokens": 1, "total_tokens": 1}}
                if status != 200:
                    key = self.headers["Authorization"][7:]
                    reply = {"error": {"message": f"Incorrect key {key} or {KEY[:8]}***{KEY[-4:]}: no", "code": None}}
                out = b"<html>hello</html>" if fault == "html" else json.dumps(reply).encode()
                self.send_response(status)
                self.send_header("Content-Type", "text/html" if fault == "html" else "application/json")
                self.send_header("Content-Length", str(len(out)))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(out)

            def log_message(self, *_):
                pass

        self.handler = Handler

    def seen(self):
        return collections.Counter(text for texts in self.requests for text in texts)


@pytest.fixture
def api():
    api = Api()
    with serving(api.handler) as address:
        api.url = address + "v1"
        yield api


def openai(api, *args, source="ncbi"):
    return "--embedder", "openai", "--base-url", api.url, "--source", source, *args


def texts_of(root, source):
    with h5py.File(root / "data/demo/annotations.h5") as file:
        return file[source]["text"].asstr()[:]


@pytest.mark.parametrize("encoding", ["base64", "floats"])
def test_vectors_come_from_a_server_in_the_order_of_the_genes(demo, api, encoding):
    api.base64 = encoding == "base64"
    embed(*openai(api, "--model", "meta-llama/Llama-3.1-8B"), root=demo)
    genes, vectors, attributes = read(demo, "ncbi.meta-llama_Llama-3.1-8B.concat")
    assert genes[0] == "DEMO001" and attributes["model"] == "meta-llama/Llama-3.1-8B"
    assert attributes["embedder"] == "meta-llama_Llama-3.1-8B"  # as in the file's name
    assert np.allclose(vectors, [true_vector(text) for text in texts_of(demo, "ncbi")])


def test_avg_embeds_each_term_once_and_takes_the_mean(demo, api):
    embed(*openai(api, "--mode", "avg", source="go_all"), root=demo)
    _, vectors, _ = read(demo, "go_all.text-embedding-ada-002.avg")
    with h5py.File(demo / "data/demo/annotations.h5") as file:
        terms, offsets = file["go_all/terms"].asstr()[:], file["go_all/term_offsets"][:]
    assert api.seen() == collections.Counter(set(terms))
    for i, vector in enumerate(vectors):
        mean = np.zeros(16)
        for term in terms[offsets[i]:offsets[i + 1]]:
            mean += true_vector(term) / (offsets[i + 1] - offsets[i])
        assert np.allclose(vector, mean, atol=1e-6)


def test_several_sources_share_what_was_embedded_and_a_figure(demo, api):
    embed(*openai(api, "go_c", "go_all", "--mode", "avg", source="go_f"), root=demo)
    assert max(api.seen().values()) == 1
    assert (demo / "data/demo/embeddings/sources.text-embedding-ada-002.avg.png").exists()


def test_a_request_keeps_to_the_limits_of_the_api(tmp_path, api):
    write_texts(tmp_path, {f"G{i}": f"text {i} " + "word " * 3000 for i in range(100)})
    out = embed("--dataset", "mine", *openai(api, source="own"), root=tmp_path)
    assert len(api.requests) > 1 and all(sum(map(len, r)) / 4 < 300_000 for r in api.requests) and "cut" not in out
    api.requests.clear()
    write_texts(tmp_path, {f"G{i}": f"text {i}" for i in range(2100)})
    embed("--dataset", "mine", *openai(api, "--batch-size", 2048, source="own"), root=tmp_path)
    assert sorted(map(len, api.requests)) == [52, 2048]


def test_too_long_a_text_is_cut_and_its_gene_named(tmp_path, api):
    write_texts(tmp_path, {"TITIN": "long " * 10_000, "FOS": "short"})
    out = embed("--dataset", "mine", *openai(api, source="own"), root=tmp_path)
    assert "TITIN: text of" in out and "cut" in out and "FOS:" not in out
    assert max(map(len, api.seen())) <= 8191 * 4


def test_a_dry_run_tells_texts_tokens_and_cost_and_sends_nothing(demo, api):
    out = embed(*openai(api, "--dry-run"), root=demo)
    texts = set(texts_of(demo, "ncbi"))
    n_tokens = sum(-(-len(text) // 4) for text in texts)
    assert f"{len(texts)} distinct texts" in out and f"{n_tokens:,} tokens" in out and f"${n_tokens * 0.1 / 1e6:.4f}" in out
    assert "no price known" in embed(*openai(api, "--dry-run", "--model", "llama"), root=demo)
    assert not api.requests and not (demo / "data/demo/embeddings").exists()


def test_retry_after_is_honoured(demo, api):
    api.faults = [(429, {"Retry-After": "1"})]
    embed(*openai(api), root=demo)
    assert len(api.times) == 2 and api.times[1] - api.times[0] >= 1


def test_a_server_that_stumbles_is_asked_again(demo, api):
    api.faults = [(500, {}), "drop"]
    embed(*openai(api), root=demo)
    assert len(api.requests) == 3 and read(demo, "ncbi.text-embedding-ada-002.concat")[1].shape == (128, 16)


REFUSALS = {"401": ((401, {}), "refuses the key (401)"), "404": ((404, {}), "knows no model 'text-embedding-ada-002' (404)"),
            "400": ((400, {}), "status 400"), "too few vectors": ("too few", "vectors for"),
            "not finite": ("nan", "not finite"),
            "ragged": ("ragged", "no answer of the embeddings API"), "html": ("html", "no answer of the embeddings API")}


@pytest.mark.parametrize("case", REFUSALS)
def test_what_the_server_does_wrong_is_one_line_and_finished_batches_are_kept(demo, api, case):
    fault, says = REFUSALS[case]
    api.faults = [None] * 6 + [fault] * 20
    assert says in fails(*openai(api, "--batch-size", 10), root=demo, OPENAI_API_KEY=KEY)
    folder = demo / "data/demo/embeddings"
    assert len(list((folder / ".cache").rglob("*.npz"))) == 6 and not list(folder.glob("*.h5"))
    assert len(api.requests) <= 6 + 4  # what was in flight


def test_vectors_of_another_length_than_before_are_one_line(demo, api):
    api.faults = [None] * 3 + ["other dim"] * 20
    assert "different lengths (8, 16 numbers)" in fails(*openai(api, "--batch-size", 10), root=demo)
    api.faults = []
    embed(*openai(api, "--batch-size", 10), root=demo)
    assert read(demo, "ncbi.text-embedding-ada-002.concat")[1].shape == (128, 16)


def test_a_killed_run_goes_on_without_sending_again_what_was_finished(tmp_path, api):
    write_texts(tmp_path, {f"G{i}": f"text {i}" for i in range(320)})
    args = "--dataset", "mine", *openai(api, "--batch-size", 8, source="own")
    api.delay = 0.1
    command, env = script("02_embed.py", *args, root=tmp_path)
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(api.requests) < 15:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(0.3)  # the server's threads finish
    api.delay = 0
    embed(*args, root=tmp_path)
    twice = sum(n > 1 for n in api.seen().values())
    assert twice <= 4 * 8 and max(api.seen().values()) <= 2
    genes, vectors, _ = read(tmp_path, "own.text-embedding-ada-002.concat", "human")
    assert np.allclose(vectors, [true_vector(f"text {gene[1:]}") for gene in genes])


def test_a_damaged_batch_on_disk_is_named(demo, api):
    embed(*openai(api), root=demo)
    batch, = (demo / "data/demo/embeddings/.cache").rglob("*.npz")
    batch.write_bytes(batch.read_bytes()[:-30])
    assert str(batch) in fails(*openai(api, "--force"), root=demo)


def test_the_key_is_sent_and_stands_nowhere(demo, api):
    out = embed(*openai(api), root=demo, OPENAI_API_KEY=KEY)
    assert set(api.keys) == {f"Bearer {KEY}"}
    for fault in (401, {}), (400, {}):
        api.faults = [fault]
        out += fails(*openai(api, source="go_p"), root=demo, OPENAI_API_KEY=KEY)
    api.faults = [(500, {})]
    done = run(*openai(api, source="go_p"), root=demo, OPENAI_API_KEY=KEY)
    everything = [(out + done.stdout + done.stderr).encode()] + [p.read_bytes() for p in demo.rglob("*") if p.is_file()]
    assert done.returncode == 0 and len(everything) > 4
    for piece in (KEY[3:8], KEY[-5:], KEY[8:14]):
        assert not any(piece.encode() in data for data in everything)


def test_without_a_key_openai_itself_is_not_asked(demo):
    to_openai = "--embedder", "openai", "--source", "ncbi"
    assert "OPENAI_API_KEY" in fails(*to_openai, root=demo)
    assert "letters that no key has" in fails(*to_openai, root=demo, OPENAI_API_KEY="two words")


def test_a_password_in_the_address_is_refused(demo):
    assert "no password" in fails("--embedder", "openai", "--base-url", "http://me:secret@127.0.0.1/v1", root=demo)
