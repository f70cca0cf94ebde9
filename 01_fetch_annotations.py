"""Stage 01: what the literature says of each gene -> data/<space>/annotations.h5

    python 01_fetch_annotations.py                                       the demo's synthetic texts, no network
    python 01_fetch_annotations.py --dataset norman                      human genes, all six sources of the paper
    python 01_fetch_annotations.py --dataset norman --source go_c go_all --go-release current
    python 01_fetch_annotations.py --dataset norman --source ncbi --fresh  from NCBI itself, as of today
    python 01_fetch_annotations.py --dataset mine --tsv notes=notes.tsv  own texts: a header gene<TAB>text, a line a gene

A source is a group of the file: `genes` (N) and `text` (N); the GO sources also have `terms` (M) and `term_offsets`
(N + 1), each gene's terms one by one. Sources that the file has already and this call does not name are kept. What is
downloaded for human genes stays in data/human/raw/; annotations.png shows what the sources cover.

The helpers that several stages share (files that appear whole or not at all, provenance, downloads) live here.
"""
import argparse
import contextlib
import datetime
import difflib
import email.utils
import functools
import gzip
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

import h5py
import numpy as np

FORMAT_VERSION = 1
SOURCES = ("ncbi", "ncbi+uniprot", "go_f", "go_c", "go_p", "go_all")
GO_PREFIX = {"go_f": "Molecular Function", "go_c": "Cellular Component", "go_p": "Biological Process"}
GO_ASPECT = {"F": "go_f", "C": "go_c", "P": "go_p"}
PAPER_GO_RELEASE = "2024-01-17"
HOSTED = ("norman", "adamson", "dixit", "replogle_k562_essential", "replogle_rpe1_essential")  # cells that stage 03 can download

BUCKET = "https://czi-scgenept-public.s3.amazonaws.com/models/gene_embeddings/gene_annotations"
RELEASED = {"ncbi": f"{BUCKET}/NCBI_summary_of_genes.json", "ncbi+uniprot": f"{BUCKET}/NCBI_UniProt_summary_of_genes.json"}
GO_DATED, GO_CURRENT = "https://release.geneontology.org", "https://current.geneontology.org"
VOCAB = "https://czi-scgenept-public.s3.amazonaws.com/models/pretrained/scgpt/vocab.json"
NCBI = "https://eutils.ncbi.nlm.nih.gov/entrez/eutils"
UNIPROT = ("https://rest.uniprot.org/uniprotkb/stream?compressed=true&format=tsv&fields=gene_primary,cc_function"
           "&query=%28organism_id%3A9606%29%20AND%20%28reviewed%3Atrue%29")

PATIENCE = os.environ.get("SCGENEPT_PATIENCE", "1")  # scales the next three; below 1 to give up sooner
if not re.fullmatch(r"\d{0,3}\.?\d{1,3}", PATIENCE) or not float(PATIENCE):
    sys.exit(f"error: SCGENEPT_PATIENCE={PATIENCE}: expected a number above 0, as 0.5")
PATIENCE = float(PATIENCE)
TIMEOUT = 60 * PATIENCE     # seconds without a byte after which a connection counts as dead
FIRST_WAIT = 1 * PATIENCE   # seconds before the second try; doubled before each one after it
STALE = 10 * PATIENCE       # seconds after which a lock that nobody touches is that of a killed process
TRIES = 6                   # in a row without getting any further
LONGEST_WAIT = 3600         # seconds; a server that asks for more is not waited for
LONGEST_LINE = 500_000      # bytes; no line of these formats comes near
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")  # Okabe and Ito: colour-blind people tell them apart
GREY = "#999999"
MEND = "put a good file there, or delete it if this script downloaded it"


# ---------------------------------------------------------------------------------------------------------------------
# Shared by all stages

def run(main):
    """Call a stage's `main`; what a user can cause ends in one line and exit code 1, our own mistakes in a traceback."""
    with contextlib.suppress(AttributeError):  # a stream that somebody put in its place
        sys.stdout.reconfigure(line_buffering=True, errors="replace")  # a log that can be watched; a console without Δ and ±
    try:
        main()
    except OSError as error:
        words = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else " ".join(str(error).split())
        sys.exit(f"error: {words}" + ("; another folder: --root DIR" if isinstance(error, PermissionError) else ""))
    except MemoryError:
        sys.exit("error: not enough memory")
    except (KeyboardInterrupt, RuntimeError, ImportError) as error:
        if "allocate" in str(error) and "memory" in str(error):  # torch's on a CPU and on a GPU
            sys.exit(f"error: not enough memory ({str(error).splitlines()[0][:200]}); lower --batch-size or --genes-per-batch")
        while error and not isinstance(error, KeyboardInterrupt):  # an interrupted import may end in another error
            error = error.__cause__ or error.__context__
        if not error:
            raise
        sys.exit("interrupted; the same command (without --force) goes on from what is already on disk")


def common_options(parser):
    """Add the options that every stage has in the same words."""
    def refuse(message):
        word = [*message.rpartition(": ")[2].split(), ""][0]
        near = difflib.get_close_matches(word, parser._option_string_actions, 1)
        sys.exit(f"error: {message}{f'; did you mean {near[0]}?' if near else ''} (python {parser.prog} --help lists the options)")

    parser.formatter_class, parser.error = argparse.RawDescriptionHelpFormatter, refuse
    parser.usage = "python %(prog)s [options]"  # short: the examples come first
    parser.add_argument("--dataset", default="demo", help=f"demo, {', '.join(HOSTED)}, or a name of your own (default: demo)")
    parser.add_argument("--root", type=Path, default=Path("."), metavar="DIR",
                        help="the folder that holds data/, runs/ and results/ (default: the current folder)")
    parser.add_argument("--force", action="store_true", help="do it again even if the output is there")
    return parser


def seed(text):
    """A seed on the command line."""
    if not 0 <= int(text) < 2**32:
        raise ValueError
    return int(text)


def check_name(name, what):
    """A name that becomes part of a path: letters, digits, `_`, `-`, `+` only. Ends the run otherwise."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_+-]*", name):
        sys.exit(f"error: {what} {name!r}: use letters, digits, '_', '-' and '+' only")
    return name


def space_of(dataset):
    """The space (the set of genes with texts) of a dataset: `demo` for the demo, `human` for every other."""
    return "demo" if check_name(dataset, "--dataset") == "demo" else "human"


def fingerprint(path):
    """SHA-256 of a file; of one over 256 MB its size and modification time, and the SHA-256 found when it was downloaded."""
    stat = os.stat(path)
    if stat.st_size > 256 * 2**20:
        found = Path(f"{path}.sha256")  # see download
        return f"size {stat.st_size} mtime {stat.st_mtime_ns}" + (f" sha256 {found.read_text(errors='replace')[:64]}" if found.exists() else "")
    return checksum(path, "sha256")


def checksum(path, algorithm):
    """The `sha256` or `md5` of a file, in hexadecimal."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def made_from(options, inputs):
    """What decides an output, as JSON text: the options and the fingerprints of the input files."""
    names = [Path(p).name for p in inputs]
    names = [name if names.count(name) == 1 else f"{name} ({i + 1})" for i, name in enumerate(names)]
    return json.dumps({"options": options, "inputs": dict(zip(names, map(fingerprint, inputs)))}, sort_keys=True)


def provenance(made):
    """The attributes of every output file: format, command line, date, library versions, options and inputs."""
    versions = {"python": sys.version.split()[0]}
    for name in ("numpy", "scipy", "h5py", "torch"):
        if name in sys.modules:
            versions[name] = sys.modules[name].__version__
    command = shlex.join(sys.argv).encode(errors="replace").decode()  # a path may hold what is no text
    return {"format_version": FORMAT_VERSION, "command": command, "made_from": made,
            "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"), "versions": json.dumps(versions)}


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path beside `path` and rename it onto `path` at the end: a reader (or a killed writer) never
    sees half a file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a run that was killed
        if time.time() - leftover.stat().st_mtime > 86400:
            leftover.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield partial
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save wraps it
        if not isinstance(cause, OSError):
            raise
        raise OSError(f"{path}: {cause.strerror or cause}; what was there before is as it was") from None
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def uninterrupted():
    """Let Ctrl-C take effect at the end of the block: HDF5 does not get over it in the middle of writing."""
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            signal.raise_signal(signal.SIGINT)


class H5Target(io.FileIO):
    """A file for HDF5 to write to. Where the disk is full the library crashes, at once or at exit: the run ends in one line,
    before the library hears of it."""

    def write(self, data):
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[super().write(rest):]
        except OSError as error:
            self.give_up(error)
        return len(data)

    def truncate(self, size=None):
        try:
            return super().truncate(size)
        except OSError as error:
            self.give_up(error)

    def give_up(self, error):
        with contextlib.suppress(OSError):
            os.unlink(self.name)
        print(f"error: {self.name}: {error.strerror}; what was there before is as it was", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)


@contextlib.contextmanager
def write_h5(path, made):
    """Yield a new HDF5 file with its provenance attributes; it becomes `path` when the block ends without an error."""
    with uninterrupted(), replacing(path) as partial, H5Target(partial, "w+") as target, h5py.File(target, "w") as file:
        file.attrs.update(provenance(made))
        yield file


def write_text(path, text):
    """Write a text file (UTF-8) whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8", newline="\n")


def write_strings(group, name, strings):
    """Write a dataset of variable-length UTF-8 text."""
    group.create_dataset(name, data=np.array(list(strings), dtype=object), dtype=h5py.string_dtype())


def new_figure(width, height, title):
    """An empty figure (inches) that needs no display."""
    import matplotlib
    from matplotlib.figure import Figure  # no pyplot: no window, no backend to choose
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is no formula
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    return figure


def save_figure(figure, path):
    """Write a figure as PNG, whole or not at all."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    with replacing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")


def read_h5(path):
    """An HDF5 file, open for reading. Raises OSError for what HDF5 would read forever, or with gigabytes of memory: see check_texts."""
    n_bytes, arrays = os.path.getsize(path), []  # arrays: first and last byte of what is all numbers, and not looked at

    def note(name, item):
        if str(name).count("/") > 16:
            raise OSError("groups within groups, deeper than any file of cells or texts has them")
        if not isinstance(item, h5py.Dataset):
            return
        if item.is_virtual or item.external:
            raise OSError(f"the data of {name[:100]!r} lies in other files, which are not read")
        places = []  # first byte, bytes, mask of filters that were left out
        if item.chunks:
            item.id.chunk_iter(lambda chunk: places.append((chunk.byte_offset, chunk.size, chunk.filter_mask)))
        elif item.id.get_offset() is not None:
            places.append((item.id.get_offset(), item.id.get_storage_size(), 0))
        if any(start + size > n_bytes for start, size, _ in places):
            raise OSError(f"the data of {name[:100]!r} lies beyond the end of the file")
        if item.dtype.kind in "iuf":
            arrays.extend((start, start + size) for start, size, _ in places)
        for start, size, left_out in places if item.dtype.kind == "O" and item.compression in (None, "gzip") else ():
            file.seek(start)
            check_references(item, file.read(size), left_out, n_bytes)

    with contextlib.ExitStack() as stack, open(path, "rb") as file:
        opened = stack.enter_context(h5py.File(path, "r"))
        opened.visititems(note)
        check_texts(file, n_bytes, arrays)
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            stack.pop_all()
            return opened
    return read_h5(path)  # another process put a new file there meanwhile


def check_references(item, piece, left_out, n_bytes):
    """Raise OSError where a reference to a text, 16 bytes of which the first four are its length, claims more than the file has. `piece` is a
    chunk of a dataset of texts, or all of it, as it lies in the file."""
    try:
        if item.compression and not left_out:
            piece = zlib.decompressobj().decompress(piece, 16 * math.prod(item.chunks))
    except zlib.error as error:
        raise OSError(f"{item.name[:100]}: {error}") from None
    first_bytes = np.frombuffer(piece[:len(piece) // 16 * 16], np.uint8)
    first_bytes = (first_bytes.reshape(16, -1).T if item.shuffle else first_bytes.reshape(-1, 16))[:, :4]
    if np.ascontiguousarray(first_bytes).view("<u4").max(initial=0) > n_bytes:
        raise OSError(f"a text in {item.name[:100]!r} that is longer than the file")


def check_texts(file, n_bytes, arrays):
    """Raise OSError for texts that HDF5 does not get over: they lie in heaps ("GCOL" in HDF5's file format), of which an entry without length
    is read forever, and a reference to an entry makes it allocate whatever length it claims. Zeros in the place of a part of the
    file, as a broken copy has them, are enough."""
    def outside(ranges):
        """Yield the bytes outside of ranges [(first, last), ...] as (place in the file, bytes); pieces overlap by 16."""
        position = 0
        for start, end in sorted([*ranges, (n_bytes, n_bytes)]):
            piece = b""
            while position < start and file.seek(position) >= 0 and (chunk := file.read(min(2**24, start - position))):
                piece = piece[-16:] + chunk
                position += len(chunk)
                yield position - len(piece), piece
            position = max(position, end)

    heaps = []  # first and last byte
    for heap in sorted({place + match.start() for place, piece in outside(arrays) for match in re.finditer(b"GCOL\1", piece)}):
        file.seek(heap + 8)
        size = int.from_bytes(file.read(8), "little")
        if 4096 <= size <= n_bytes - heap:  # HDF5 itself refuses others
            heaps.append((heap, heap + size))
    if sum(end - heap for heap, end in heaps) > 2 * n_bytes:
        raise OSError("texts within texts")
    for heap, end in heaps:
        file.seek(heap + 16)
        entries, at = file.read(end - heap - 16), 0
        while at + 16 <= len(entries):
            index, _, _, length = struct.unpack_from("<HHIQ", entries, at)
            step = 16 + -(-length // 8) * 8 if index else length  # index 0: what is left over
            if not 0 < step <= len(entries) - at:
                raise OSError(f"texts at byte {heap:,} without end")
            at += step

    starts, ends = np.array(heaps, dtype=np.int64).reshape(-1, 2).T
    array_starts, array_ends = np.array(sorted(arrays) or [(n_bytes, n_bytes)], dtype=np.int64).T
    for place, piece in outside([*arrays, *heaps]):
        for shift in range(min(8, len(piece) // 8)):  # a reference: length (4 bytes), heap (8), index in it (4)
            numbers, words = (np.frombuffer(piece, dtype, (len(piece) - first) // size, first) for dtype, size, first in (("<i8", 8, shift), ("<u4", 4, shift % 4)))
            inside = np.unique(numbers[(numbers >= array_starts[0]) & (numbers < n_bytes)])
            for number in inside[inside < array_ends[np.searchsorted(array_starts, inside, "right") - 1]]:
                file.seek(number)
                if file.read(4) == b"GCOL":
                    raise OSError(f"texts amid numbers at byte {number:,}")
            if not heaps:
                continue
            at = np.flatnonzero((numbers >= starts[0]) & (numbers <= starts[-1]))
            heap = np.searchsorted(starts, numbers[at])
            word = at * 2 + shift // 4  # where the heap's address stands among the words
            is_reference = (starts[heap] == numbers[at]) & (word > 0) & (word + 2 < len(words))
            word, heap = word[is_reference], heap[is_reference]
            wrong = word[(words[word - 1] > (ends - starts)[heap]) & (0 < words[word + 2]) & (words[word + 2] < 2**16)]
            if len(wrong):
                raise OSError(f"a text at byte {place + 4 * wrong[0]:,} that is longer than what it lies in")


@contextlib.contextmanager
def open_h5(path, made_by, keys=()):
    """Yield an HDF5 file that an earlier stage made. Ends the run when it is missing (naming the command that makes
    it), no HDF5 file, or without one of `keys`."""
    path = Path(path)
    if not path.exists():
        sys.exit(f"error: {path} does not exist; run first: python {made_by}")
    with damage_in(path, f"make it again: python {made_by} --force"), read_h5(path) as file:
        for key in keys:
            if find(file, key, path) is None:
                sys.exit(f"error: {path}: no {key!r} in it; make it again: python {made_by} --force")
        yield file


@contextlib.contextmanager
def damage_in(path, remedy="get it again from its source"):
    """What h5py raises in the block, which only reads, ends the run in one line. Which of these it raises depends on what is damaged."""
    try:
        yield
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError) as error:
        sys.exit(f"error: {path}: not a whole HDF5 file, or a damaged one ({' '.join(str(error).split())}); {remedy}")


def find(group, name, path):
    """The group or dataset `name` of an HDF5 group (`A/B`: B of its group A), or None.

    Ends the run on what no file of cells, texts or vectors needs and a stranger's may hold: links and data that lie elsewhere
    (neither is ever followed), sizes far beyond what the file stores, chunks that fill the memory.
    """
    with damage_in(path):
        found = group
        for part in filter(None, name.split("/")):
            key = part.encode(errors="surrogateescape")
            if not isinstance(found, h5py.Group) or not found.id.links.exists(key):
                return None
            if found.id.links.get_info(key).type != h5py.h5l.TYPE_HARD:
                sys.exit(f"error: {path}: {name[:100]!r} is a link, and links are not followed; write the file anew without them")
            found = found[part]
        if isinstance(found, h5py.Dataset):
            stored, chunk = found.id.get_storage_size(), math.prod(found.chunks or ()) * found.dtype.itemsize
            if found.nbytes > max(2**26, 1000 * stored) or chunk > 2**29:  # gzip packs zeros 1,000 times, and nothing better
                sys.exit(f"error: {path}: {name[:100]!r} declares {found.nbytes / 1e6:,.0f} MB in chunks of {chunk / 1e6:,.0f} MB, "
                         f"and the file stores {stored / 1e6:,.1f} MB of it: damaged, or made to fill the memory")
        return found


def read_embeddings(path, made_by):
    """The genes (N) and vectors (N, d) of an embedding file."""
    with open_h5(path, made_by, ("genes", "vectors")) as file:
        genes, vectors = file["genes"].asstr()[:], file["vectors"][:]
        if vectors.dtype.kind != "f" or vectors.ndim != 2 or len(vectors) != len(set(genes)) or not vectors.size or not np.isfinite(vectors).all():
            raise ValueError("vectors is not a finite array with a row for every gene")
    return genes, vectors


def is_current(path, made, force, key="/"):
    """Whether the HDF5 file `path` (its group `key`) was made from exactly this; says so, or says that it is stale."""
    path = Path(path)
    if force or not path.exists():
        return False
    try:
        with read_h5(path) as file:
            old = file[key].attrs.get("made_from") if key in file else None
        words = difference(old, made) if old not in (None, made) else ""
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError):
        print(f"{path}: not a whole HDF5 file, making it again")
        return False
    label = "" if key == "/" else f" {key}"
    if old == made:
        print(f"{path}{label}: there already, from the same inputs and options (--force makes it again)")
    elif old is not None:
        print(f"{path}{label}: stale, making it again ({words})")
    return old == made


def difference(old, new):
    """In which options or inputs two `made_from` texts differ, in words."""
    old, new = json.loads(old), json.loads(new)
    words = []
    for kind in ("options", "inputs"):
        for name in sorted(old[kind].keys() | new[kind].keys()):
            a, b = old[kind].get(name), new[kind].get(name)
            if a != b:
                words.append(f"{name} was {a}, now {b}" if kind == "options" else
                             f"{name} {change(a, b) if a and b else 'is new' if b else 'is no longer an input'}")
    return "; ".join(words)


def change(old, new):
    """What two fingerprints that differ say of a file, in words."""
    sizes = [words.split()[1] for words in (old, new) if words.startswith("size ")]
    return "has the same size and another date (a copy? cp -p and rsync -a keep dates)" if len(sizes) == 2 and len(set(sizes)) == 1 else "changed"


# ---------------------------------------------------------------------------------------------------------------------
# Downloads, shared by all stages

def mirrored(url):
    """Where `url` is asked for: there, or at http://host/<its host>/<its path> with SCGENEPT_MIRROR=http://host/."""
    mirror = os.environ.get("SCGENEPT_MIRROR")
    return f"{mirror.rstrip('/')}/{url.split('://', 1)[1]}" if mirror else url


def address(url):
    """The address that is asked, for a message: without the password that a mirror may have."""
    return re.sub(r"//[^/@]*@", "//", mirrored(url))


def request(url, path, read, headers=dict, params=None):
    """GET `url` and return `read(response)`, the response open for streaming.

    Connection errors, timeouts, broken bodies (`read` raises ConnectionError), 429 and 5xx are tried again: after waits that
    double, or as long as the server asks (Retry-After). headers() makes each try's headers; a try with other headers than
    the one before it has got further, and counts as the first. Ends the run in one line on any other answer; `path` is
    named in it, and the API key among `params` never is.
    """
    import requests
    import urllib3
    tries, before = 0, None
    while True:
        now, wait, again = headers(), 0, True
        tries, before = tries + 1 if now == before else 1, now
        try:
            with requests.get(mirrored(url), params=params, headers={"Accept-Encoding": "identity", **now}, stream=True,
                              timeout=TIMEOUT) as response:
                if response.status_code in (200, 206, 416):
                    return read(response)
                cause = f"{response.status_code} {response.reason}"
                again, wait = response.status_code == 429 or response.status_code >= 500, retry_after(response)
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError, ConnectionError,
                urllib3.exceptions.HTTPError) as error:
            cause = cause_of(error)
        except (requests.RequestException, ValueError) as error:  # an address that cannot be, redirects without end
            cause, again = cause_of(error), False
        cause = without((params or {}).get("api_key", ""), cause)
        if not again or tries == TRIES or wait > LONGEST_WAIT:
            cause += f" (the server asks to wait {wait:,.0f} s)" if again and wait > LONGEST_WAIT else ""
            cause += "; the same command goes on from here" if again else ""
            sys.exit(f"error: {address(url)} -> {path}: {cause}")
        wait = max(wait, FIRST_WAIT * 2 ** (tries - 1))
        print(f"{address(url)}: {cause}; next try in {wait:.0f} s", file=sys.stderr)
        time.sleep(wait)


def without(key, text):
    """A message on one line, with every word that shows four characters of the key in a row left out."""
    pieces = {key[i:i + 4] for i in range(len(key) - 3)}
    return " ".join("***" if any(piece in word for piece in pieces) else word for word in str(text).split())[:300]


def cause_of(error):
    """The innermost reason of a failed request in one line; the outer ones hold the whole address, a key in it included."""
    while inner := next((e for e in (getattr(error, "reason", None), *error.args) if isinstance(e, Exception)), None):
        error = inner
    return re.sub(r"^\S*?Connection\w*\(.*?\): ", "", " ".join(str(error).split()))


def retry_after(response):
    """Seconds that a response's Retry-After header asks for: a number, or an HTTP date; 0 without one."""
    value = response.headers.get("Retry-After", "")
    if re.fullmatch("[0-9]{1,9}", value):
        return int(value)
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return email.utils.parsedate_to_datetime(value).timestamp() - time.time()
    return 0


@contextlib.contextmanager
def only_one(path):
    """Let one process at a time into the block for `path`, the others wait. Yields a function that says whether this one
    is still it: a process that was stopped for so long that its lock seemed left behind is not."""
    lock, me, told = Path(f"{path}.lock"), f"{os.getpid()} {os.urandom(8).hex()}", False
    lock.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with contextlib.suppress(FileExistsError):
            with open(lock, "x") as file:
                file.write(me)
            break
        with contextlib.suppress(FileNotFoundError):
            if time.time() - lock.stat().st_mtime > STALE:
                lock.unlink()
                continue
        if not told:
            print(f"{path}: waiting for another process (if it was killed, {STALE:.0f} s at most)", file=sys.stderr)
        told = True
        time.sleep(0.1)

    def is_mine():
        with contextlib.suppress(FileNotFoundError):
            return lock.read_text() == me
        return False

    def keep():
        while not done.wait(STALE / 5):
            with contextlib.suppress(FileNotFoundError):
                if is_mine():
                    os.utime(lock)

    done = threading.Event()
    threading.Thread(target=keep, daemon=True).start()
    try:
        yield is_mine
    finally:
        done.set()
        if is_mine():
            lock.unlink(missing_ok=True)


def is_html(head):
    """Whether bytes are the beginning of a web page (an error page, a login form) and not of a data file."""
    return head.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith((b"<!doctype html", b"<html"))


def download(url, path, size=None, sha256=None, md5=None):
    """Download `url` to `path` and return it as a Path; a file that is there already is taken as it is.

    The bytes go to `<path>.part`, which a later try or run continues where the server can do so and the file there is still
    the same; it becomes `path` once it is whole and has the `size` (bytes) and checksums that are known of it.
    Without a known SHA-256, the one found is printed and written to `<path>.sha256`. Ends the run in one line on failure.
    """
    path = Path(path)
    if path.exists():
        return path
    part, note, may_go_on = Path(f"{path}.part"), Path(f"{path}.part.json"), True

    def fail(cause):
        sys.exit(f"error: {address(url)} -> {path}: {cause}")

    def noted():
        """Of what .part is the beginning: the version as the server names it (or None), and the size in bytes (or None)."""
        with contextlib.suppress(OSError, ValueError, TypeError):
            address, version, total = json.loads(note.read_text())
            if address == url and part.stat().st_size:
                return version, total
        return None, None

    def headers():
        version = noted()[0]
        return {"Range": f"bytes={part.stat().st_size}-", "If-Range": version} if version else {}

    def read(response):
        import tqdm
        nonlocal may_go_on
        going_on = "Range" in response.request.headers
        start = part.stat().st_size if going_on and response.status_code == 206 else 0
        length = response.headers.get("Content-Length", "")
        total = start + int(length) if re.fullmatch("[0-9]{1,30}", length) else size
        may_go_on &= not going_on or start > 0  # a server that did not go on once is not asked to again
        fits = response.headers.get("Content-Range", "").startswith(f"bytes {start}-") and noted()[1] in (None, total)
        if response.status_code == 416 or start and not fits:
            may_go_on = False
            note.unlink(missing_ok=True)
            raise ConnectionError("the server cannot go on where the download stopped")
        if "text/html" in response.headers.get("Content-Type", ""):
            fail("a web page, not the file")
        if size and total not in (None, size):
            fail(f"the server's file has {total:,} bytes, expected {size:,}")
        if total and (free := shutil.disk_usage(path.parent).free) < total - start:
            fail(f"needs {(total - start) / 2**20:,.0f} MiB of disk space, {free / 2**20:,.0f} MiB are free")
        try:
            with open(part, "ab" if start else "wb") as file, tqdm.tqdm(
                    desc=path.name, total=total, initial=start, unit="B", unit_scale=True, disable=None) as bar:
                if not start:
                    etag = response.headers.get("ETag", "W/")  # a weak one does not promise the same bytes
                    version = response.headers.get("Last-Modified") if etag.startswith("W/") else etag
                    write_text(note, json.dumps([url, version if may_go_on else None, total]))
                for chunk in response.raw.stream(2**16, decode_content=False):
                    if not is_mine():
                        fail("another process has taken this download over")
                    file.write(chunk)
                    bar.update(len(chunk))
        except OSError as error:
            fail(f"{error.strerror or error}; the same command goes on from here")
        if total is not None and part.stat().st_size != total:
            raise ConnectionError(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")

    with only_one(path) as is_mine:
        if path.exists():  # another process was faster
            return path
        if noted()[1] is None or part.stat().st_size != noted()[1]:
            request(url, path, read, headers)
        with open(part, "rb") as file:
            head = file.read(1000)
        n_bytes, found = part.stat().st_size, checksum(part, "sha256")
        wrong = ("an empty file" if not head else "a web page, not the file" if is_html(head) else
                 f"{n_bytes:,} bytes, expected {size:,}" if size and n_bytes != size else
                 f"SHA-256 {found}, expected {sha256}" if sha256 and found != sha256.lower() else
                 f"MD5 {checksum(part, 'md5')}, expected {md5}" if md5 and checksum(part, "md5") != md5.lower() else "")
        if wrong:
            part.unlink()
            note.unlink(missing_ok=True)
            fail(wrong)
        if not sha256:
            write_text(f"{path}.sha256", f"{found}  {path.name}\n")
        os.replace(part, path)
        note.unlink(missing_ok=True)
    print(f"downloaded {path} ({n_bytes:,} bytes, SHA-256 {found})")
    return path


# ---------------------------------------------------------------------------------------------------------------------
# The demo's gene space: invented genes whose texts name the invented processes that they take part in

SYNTHETIC = "SYNTHETIC: invented genes and processes"
DEMO_PROCESSES = {  # process: (molecular function, cellular component), all invented
    "amber tide regulation": ("amber tide binding", "amber vesicle"),
    "birch lattice assembly": ("lattice ligase activity", "birch lattice"),
    "cobalt relay signaling": ("cobalt relay kinase activity", "relay membrane"),
    "dune cycle progression": ("dune cycle hydrolase activity", "dune body"),
    "ember transport": ("ember transporter activity", "ember channel"),
    "fjord stress response": ("fjord sensor activity", "fjord granule"),
    "glacier matrix turnover": ("glacier matrix protease activity", "glacier matrix"),
    "harbor lipid synthesis": ("harbor lipid synthase activity", "harbor droplet"),
}


def demo_genes():
    """Names (128) and processes of the demo's genes, as a bool array (128, 8): each gene takes part in one or two, each
    process has as many genes as the others. Stage 03 simulates the cells from the same array."""
    n_genes, n_processes = 128, len(DEMO_PROCESSES)
    rng = np.random.default_rng(0)
    takes_part = np.zeros((n_genes, n_processes), dtype=bool)
    takes_part[np.arange(n_genes), rng.permutation(n_genes) % n_processes] = True
    second = rng.permutation(n_genes)[:n_genes // 2]
    takes_part[second, (takes_part[second].argmax(1) + 1 + np.arange(len(second)) % (n_processes - 1)) % n_processes] = True
    return [f"DEMO{i + 1:03d}" for i in range(n_genes)], takes_part


def demo_texts(source):
    """The synthetic texts of one source: genes, texts, and for GO each gene's terms (else None)."""
    genes, takes_part = demo_genes()
    names = list(DEMO_PROCESSES)
    terms = {"go_p": [[names[p] for p in np.flatnonzero(row)] for row in takes_part],
             "go_f": [[DEMO_PROCESSES[names[p]][0] for p in np.flatnonzero(row)] for row in takes_part],
             "go_c": [[DEMO_PROCESSES[names[p]][1] for p in np.flatnonzero(row)] for row in takes_part]}
    if source in terms:
        return genes, [go_text({source: t}) for t in terms[source]], terms[source]
    if source == "go_all":
        each = [{s: terms[s][i] for s in GO_PREFIX} for i in range(len(genes))]
        return genes, [go_text(e) for e in each], [sum(e.values(), []) for e in each]
    texts = [f"Gene Symbol {gene} This synthetic gene takes part in {' and in '.join(processes)}."
             for gene, processes in zip(genes, terms["go_p"])]
    if source == "ncbi+uniprot":
        texts = [f"{text} Protein summary: Has {' and '.join(f)}." for text, f in zip(texts, terms["go_f"])]
    return genes, texts, None


def go_text(terms):
    """The text of one gene in concat mode, from {source: [term, ...]}: `Molecular Function: term, term; Cellular ...`."""
    return "; ".join(f"{GO_PREFIX[source]}: {', '.join(names)}" for source, names in terms.items() if names)


# ---------------------------------------------------------------------------------------------------------------------
# Readers: each gives genes, texts, and for GO each gene's terms (else None); broken files end the run in one line

def read_lines(path):
    """Yield (number, line) of a UTF-8 text file, gzip-compressed or not. Ends the run at damage, other encodings, web pages
    and lines too long for any of these formats, naming file and line."""
    with open(path, "rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        file = io.BufferedReader(gzip.GzipFile(fileobj=raw), 2**20) if zipped else raw
        number, problem = 0, None
        try:
            while line := file.readline(LONGEST_LINE):
                number += 1
                if number == 1 and is_html(line):
                    problem = "a web page, not the file"
                elif len(line) == LONGEST_LINE:
                    problem = f"longer than {LONGEST_LINE:,} bytes"
                if problem:
                    break
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError:
            problem = "not UTF-8 text"
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            number, problem = number + 1, f"damaged gzip file ({error})"
    if problem:
        sys.exit(f"error: {path}, line {number}: {problem}; {MEND}")


def read_json(path, kind):
    """A JSON file (UTF-8) that holds one object of str -> `kind`, as a dict."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            entries = json.load(file)
        if not isinstance(entries, dict):
            raise ValueError("not an object of names and values")
        for name, value in entries.items():
            if not isinstance(value, kind):
                raise ValueError(f"the value of {name!r} is no {kind.__name__}")
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, and the two above
        sys.exit(f"error: {path}: not JSON, or not what belongs there ({error}); {MEND}")
    return entries


def read_tsv(path):
    """Genes and texts of a tab-separated file with the header gene<TAB>text (UTF-8); a gene may stand once."""
    texts = {}
    for number, line in read_lines(path):
        fields = line.split("\t")
        if number == 1:
            if fields != ["gene", "text"]:
                sys.exit(f"error: {path}: the first line has to be gene<TAB>text")
        elif line:
            if len(fields) != 2 or not all(field.strip() for field in fields):
                sys.exit(f"error: {path}, line {number}: expected a gene, a tab and a text")
            if fields[0] in texts:
                sys.exit(f"error: {path}, line {number}: gene {fields[0]!r} stands here a second time")
            texts[fields[0]] = fields[1]
    if not texts:
        sys.exit(f"error: {path}: no gene in it")
    return list(texts), list(texts.values()), None


def read_released(path):
    """Genes and texts of a released JSON file: an object of symbol -> text."""
    texts = {gene: text for gene, text in read_json(path, str).items() if gene and text.strip()}
    if not texts:
        sys.exit(f"error: {path}: no gene with a text in it; {MEND}")
    return list(texts), list(texts.values()), None


def read_obo(path):
    """Of an OBO file the names {id: name} of the terms in force, the other ids of them {id: its id now}, and the ids of
    the obsolete terms."""
    names, id_now, obsolete = {}, {}, set()
    in_term, term = False, None
    for number, line in read_lines(path):
        if line.startswith("["):
            in_term, term = line == "[Term]", None
        elif in_term and line:
            key, colon, value = line.partition(": ")
            if not colon or (key != "id" and term is None):
                sys.exit(f"error: {path}, line {number}: expected 'tag: value', and a term's id first, found {line[:60]!r}")
            if key == "id":
                term = value
            elif key == "name":
                names[term] = value
            elif key == "alt_id":
                id_now[value] = term
            elif key == "is_obsolete" and value == "true":
                obsolete.add(term)
    if not names:
        sys.exit(f"error: {path}: no [Term] in it: not an OBO file")
    return {term: name for term, name in names.items() if term not in obsolete}, id_now, obsolete


@functools.lru_cache(maxsize=1)  # one reading for all GO sources of a call
def read_annotations(gaf, obo):
    """What human genes are annotated with in a GAF 2 file: {source: {gene: {term id: term name}}}, in file order.

    Left out: negated annotations (NOT), those that say there is no data (ND), other species, obsolete terms.
    """
    names, id_now, obsolete = read_obo(obo)
    found, n_unknown = {source: {} for source in GO_PREFIX}, 0
    for number, line in read_lines(gaf):
        if not line or line.startswith("!"):
            continue
        columns = line.split("\t")
        if not 15 <= len(columns) <= 17 or not columns[2] or columns[8] not in GO_ASPECT:
            sys.exit(f"error: {gaf}, line {number}: not a line of a GAF 2 file (17 columns, a symbol in column 3, "
                     f"F, C or P in column 9): {line[:60]!r}")
        gene, qualifiers, term, evidence, aspect, taxa = (columns[i] for i in (2, 3, 4, 6, 8, 12))
        if "NOT" in qualifiers.split("|") or evidence == "ND" or taxa.split("|")[0] != "taxon:9606":
            continue
        term = id_now.get(term, term)
        if term in names:
            found[GO_ASPECT[aspect]].setdefault(gene, {})[term] = names[term]
        elif term not in obsolete:
            n_unknown += 1
    if not any(found.values()):
        sys.exit(f"error: {gaf}: no annotation of a human gene with a term of {obo}")
    if n_unknown:
        print(f"{gaf}: {n_unknown:,} annotations left out, their terms are not in {obo}")
    return found


def read_go(source, gaf, obo):
    """Genes, texts and terms of one GO source, or of all three one after the other."""
    found = read_annotations(gaf, obo)
    parts = list(GO_PREFIX) if source == "go_all" else [source]
    genes = list(dict.fromkeys(gene for part in parts for gene in found[part]))
    terms = [{part: list(found[part].get(gene, {}).values()) for part in parts} for gene in genes]
    return genes, [go_text(of_gene) for of_gene in terms], [sum(of_gene.values(), []) for of_gene in terms]


# ---------------------------------------------------------------------------------------------------------------------
# Human genes from the primary services, in the released form

def fetch_summaries(url, path):
    """Symbol and summary of every human gene, from NCBI's E-utilities, as lines of JSON [gene id, symbol, summary].

    Each page of 500 genes is on disk (in `<path>.part`) before the next is asked for: a run that was killed goes on there.
    """
    import tqdm
    key = os.environ.get("NCBI_API_KEY")
    common = {"db": "gene", "retmode": "json", **({"api_key": key} if key else {})}
    part = Path(f"{path}.part")

    def ask(tool, take, **params):
        def read(response):
            try:
                return take(response.json())
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # an overload is reported in an answer of another form
                raise ConnectionError("not the answer that was asked for") from None
        time.sleep(0.11 if key else 0.34)  # ten or three requests a second are allowed
        return request(f"{url}/{tool}.fcgi", path, read, params={**common, **params})

    def take_search(answer):
        found = answer["esearchresult"]
        if int(found["count"]) < 1:
            raise ValueError
        return int(found["count"]), {"query_key": found["querykey"], "WebEnv": found["webenv"]}

    def take_genes(answer):
        genes = answer["result"]
        return [[i, genes[i].get("name", ""), genes[i].get("summary", "")] for i in genes["uids"]] or genes["none"]

    with only_one(path):
        if path.exists():
            return
        n_genes, found = ask("esearch", take_search, term="9606[taxid] AND alive[prop]", usehistory="y", retmax=0)
        first = json.dumps({"n_genes": n_genes}).encode()
        lines = part.read_bytes().split(b"\n")[:-1] if part.exists() else []  # what follows the last \n was cut off
        if lines[:1] != [first]:  # nothing yet, or of a search that found other genes
            lines = [first]
            part.write_bytes(first + b"\n")
        with open(part, "r+b") as file, tqdm.tqdm(
                desc=path.name, total=n_genes, initial=len(lines) - 1, unit=" genes", disable=None) as bar:
            file.truncate(sum(len(line) + 1 for line in lines))
            file.seek(0, os.SEEK_END)
            n_done = len(lines) - 1
            while n_done < n_genes:
                genes = ask("esummary", take_genes, **found, retstart=n_done, retmax=500)
                file.write("".join(json.dumps(gene) + "\n" for gene in genes).encode())
                file.flush()
                n_done += len(genes)
                bar.update(len(genes))
        os.replace(part, path)
    print(f"downloaded {path} ({n_genes:,} genes)")


def read_fresh(summaries, uniprot=None):
    """Genes and texts in the released form, from what fetch_summaries wrote and (if given) UniProt's table of gene names
    and functions. A gene that neither says anything of is left out."""
    texts, functions = {}, {}
    for number, line in read_lines(summaries):
        try:
            if number > 1:
                _, gene, summary = json.loads(line)
                if gene and summary:
                    texts.setdefault(gene, "Gene Symbol " + gene + " " + summary)
        except (ValueError, TypeError, RecursionError) as error:
            sys.exit(f"error: {summaries}, line {number}: {error}; delete the file, the next run fetches it again")
    for number, line in read_lines(uniprot) if uniprot else ():
        columns = line.split("\t")
        if len(columns) != 2 or number == 1 and line.lower() != "gene names (primary)\tfunction [cc]":
            sys.exit(f"error: {uniprot}, line {number}: not UniProt's table of primary gene names and functions")
        function = re.sub(r" ?\{ECO:[^}]*\}\.?", "", columns[1].replace("FUNCTION: ", ""))  # without the codes of evidence
        for gene in columns[0].split("; ") if number > 1 and function else ():
            functions.setdefault(gene, []).append(function)
    for gene in filter(None, functions):
        texts[gene] = f"{texts.get(gene, f'Gene Symbol {gene}')} Protein summary: {' '.join(functions[gene])}"
    return list(texts), list(texts.values()), None


def human_source(source, release, fresh, raw):
    """Where a human source comes from: what decides its texts (options), {file: address}, function that reads them."""
    if source in RELEASED and not fresh:
        path = raw / RELEASED[source].rsplit("/", 1)[1]
        return {"fresh": False}, {path: RELEASED[source]}, lambda: read_released(path)
    if source in RELEASED:
        files = {raw / "ncbi_fresh.jsonl": NCBI, **({raw / "uniprot_fresh.tsv.gz": UNIPROT} if source != "ncbi" else {})}
        return {"fresh": True}, files, lambda: read_fresh(*files)
    site = GO_CURRENT if release == "current" else f"{GO_DATED}/{release}"
    files = {raw / f"goa_human.{release}.gaf.gz": f"{site}/annotations/goa_human.gaf.gz",  # gaf first: read_go's order
             raw / f"go-basic.{release}.obo": f"{site}/ontology/go-basic.obo"}
    return {"go_release": release}, files, lambda: read_go(source, *files)


# ---------------------------------------------------------------------------------------------------------------------
# What the sources cover

def in_order(sources):
    """The paper's sources in the paper's order, then the user's own."""
    return [source for source in SOURCES if source in sources] + [source for source in sources if source not in SOURCES]


def report(path, vocab):
    """Print how many genes each source of annotations.h5 has text for, how many of them scGPT's vocabulary (if `vocab` is
    there) and each other source has, by exact symbol: the paper's Table 21."""
    with open_h5(path, "01_fetch_annotations.py") as file:
        genes = {source: set(find(file, f"{source}/genes", path).asstr()[:]) for source in in_order(file)}
    columns = {"genes": None, **({"scGPT vocab": set(read_json(vocab, int))} if vocab.exists() else {}), **genes}
    width = max(map(len, genes), default=0)
    print(f"{'':{width}}  " + "  ".join(f"{name:>{max(7, len(name))}}" for name in columns))
    for source, own in genes.items():
        counts = {name: len(own if other is None else own & other) for name, other in columns.items()}
        print(f"{source:{width}}  " + "  ".join(f"{n:>{max(7, len(name))},}" for name, n in counts.items()))


def draw(path, figure_path, title):
    """Draw the number of genes with text of each source, and each GO category's 20 commonest terms (the paper's Figures 4
    and 5)."""
    with open_h5(path, "01_fetch_annotations.py") as file:
        panels = [("Genes with text", [(source, len(file[source]["genes"])) for source in in_order(file)], COLORS[0])]
        for source, color in zip(GO_PREFIX, COLORS[1:]):
            if source in file:
                terms, counts = np.unique(find(file, f"{source}/terms", path)[:], return_counts=True)
                bars = [(terms[i].decode(), counts[i]) for i in np.argsort(-counts, kind="stable")[:20]]
                panels.append((f"{GO_PREFIX[source]}: commonest terms", bars, color))
    height = 5.5 * ((len(panels) + 1) // 2) if len(panels) > 1 else 1.2 + 0.35 * len(panels[0][1])
    figure = new_figure(9 * min(len(panels), 2), height, title)
    for i, (name, bars, color) in enumerate(panels):
        axes = figure.add_subplot((len(panels) + 1) // 2, min(len(panels), 2), i + 1)
        names = [label if len(label) < 60 else label[:57] + "..." for label, _ in bars]
        axes.bar_label(axes.barh(range(len(bars)), [count for _, count in bars], color=color), padding=3, fontsize=8,
                       labels=[f"{count:,}" for _, count in bars])
        axes.set_yticks(range(len(bars)), names, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.08)
        axes.set(title=name, xlabel="genes")
    save_figure(figure, figure_path)


# ---------------------------------------------------------------------------------------------------------------------

def options():
    parser = argparse.ArgumentParser(description=__doc__)
    common_options(parser)
    parser.add_argument("--source", nargs="+", choices=SOURCES, metavar="NAME",
                        help=f"any of {', '.join(SOURCES)} (default: all; with --tsv: none)")
    parser.add_argument("--go-release", default=PAPER_GO_RELEASE, metavar="DATE",
                        help=f"a release of the Gene Ontology, as {PAPER_GO_RELEASE}, or current (default: "
                             f"{PAPER_GO_RELEASE}, the paper's)")
    parser.add_argument("--fresh", action="store_true",
                        help="build ncbi and ncbi+uniprot from NCBI's and UniProt's services instead of the released files "
                             "(ten requests a second instead of three with NCBI_API_KEY in the environment)")
    parser.add_argument("--tsv", nargs="+", default=[], metavar="NAME=FILE",
                        help="own texts as a source NAME: a file with the header gene<TAB>text")
    return parser.parse_args()


def recorded(path, source, decides, inputs):
    """`made_from` of a source as of now; for files that were downloaded once and deleted since, with their fingerprints as
    of then: a finished output needs no network to know that it is current."""
    made = json.loads(made_from(decides, [file for file, url in inputs.items() if not url or file.exists()]))
    with contextlib.suppress(OSError, LookupError, ValueError, TypeError, AttributeError, RuntimeError), read_h5(path) as file:
        old = json.loads(file[source].attrs["made_from"])["inputs"]
        made["inputs"] |= {file.name: old[file.name] for file in inputs if not file.exists() and file.name in old}
    return json.dumps(made, sort_keys=True)


def collect(todo, force):
    """Download what the sources in `todo` need and read it: {source: (genes, texts, terms)}."""
    if force:  # what a service says today may differ from the last time
        for file in {file for decides, inputs, _ in todo.values() for file in inputs
                     if decides.get("fresh") or decides.get("go_release") == "current"}:
            file.unlink(missing_ok=True)
    texts = {}
    for source, (_, inputs, read) in todo.items():
        for file, url in inputs.items():
            if url:
                (fetch_summaries if url == NCBI else download)(url, file)
        texts[source] = read()
        for gene, text in zip(*texts[source][:2]):
            if re.search("[\0\ud800-\udfff]", gene + text):
                sys.exit(f"error: {source}: gene {gene!r}: a NUL or half a surrogate pair in its name or text")
    return texts


def write(path, space, todo, texts):
    """Write annotations.h5 anew: the sources in `texts`, and those that it has already and `texts` has not."""
    with only_one(path), write_h5(path, made_from({"space": space}, [])) as new, contextlib.ExitStack() as stack:
        old = {}
        with contextlib.suppress(OSError, RuntimeError):  # none yet, or not a whole one
            old = stack.enter_context(read_h5(path))
        for source in old:
            if source not in texts:
                old.copy(source, new)
        for source, (genes, of_genes, terms) in texts.items():
            decides, inputs, _ = todo[source]
            group = new.create_group(source)
            group.attrs["made_from"] = made_from(decides, inputs)
            if any(inputs.values()):
                group.attrs["source_urls"] = list(inputs.values())
            write_strings(group, "genes", genes)
            write_strings(group, "text", of_genes)
            if terms is not None:
                write_strings(group, "terms", [term for of_gene in terms for term in of_gene])
                group["term_offsets"] = np.cumsum([0] + [len(of_gene) for of_gene in terms])
            print(f"{source}: {len(genes):,} genes with text{f' ({SYNTHETIC})' if space == 'demo' else ''}")


def main():
    args = options()
    space = space_of(args.dataset)
    path = args.root / "data" / space / "annotations.h5"
    figure = path.with_suffix(".png")
    if not re.fullmatch(r"\d{4}-\d{2}-\d{2}|current", args.go_release):
        sys.exit(f"error: --go-release {args.go_release}: expected a date as {PAPER_GO_RELEASE}, or current")
    wanted = {}  # source: what decides it, {input file: its address or None}, function that reads genes, texts, terms
    for item in args.tsv:
        name, _, file = item.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in SOURCES or not file:
            sys.exit(f"error: --tsv {item}: expected NAME=FILE, NAME of letters, digits and '_' and no built-in source")
        wanted[name] = {"tsv": True}, {Path(file): None}, lambda file=file: read_tsv(file)
    for source in args.source or ([] if args.tsv else SOURCES):
        if space == "demo":
            wanted[source] = {"demo": 1}, {}, lambda source=source: demo_texts(source)
        else:
            wanted[source] = human_source(source, args.go_release, args.fresh, path.parent / "raw")

    todo = {source: of for source, of in wanted.items()
            if not is_current(path, recorded(path, source, *of[:2]), args.force, source)}
    if not todo and figure.exists():
        return
    if todo:
        figure.unlink(missing_ok=True)  # drawn again even if this run is killed before it comes to that
        write(path, space, todo, collect(todo, args.force))
    vocab = path.parent / "scgpt" / "vocab.json"
    if any(url for _, inputs, _ in todo.values() for url in inputs.values()):  # own texts alone need no network
        download(VOCAB, vocab)
    report(path, vocab)
    draw(path, figure, SYNTHETIC if space == "demo" else "Human genes")
    print(f"wrote {path} and {figure}")
    print("next: python 02_embed.py" + ("" if args.dataset == "demo" else f" --dataset {args.dataset}")
          + (f" --source {' '.join(wanted)} --embedder lsa" if args.tsv and not args.source else ""))


if __name__ == "__main__":
    run(main)
