"""Small files of cells for the tests, in every layout and encoding of AnnData, and stage 03 run on them."""
from types import SimpleNamespace

import h5py
import numpy as np
from scipy import sparse

from conftest import error_of, run_script

GENES = [f"GENE{i}" for i in range(30)]
IDS = [f"ENSG{i:011d}" for i in range(30)]
SINGLES = [f"{gene}+ctrl" for gene in GENES[:10]]
LABELS = ["ctrl"] * 20 + np.repeat(SINGLES, 5).tolist() + ["GENE0+GENE1"] * 5


def counts(n_cells=len(LABELS), n_genes=len(GENES)):
    rng = np.random.RandomState(0)
    return rng.poisson(1.0, (n_cells, n_genes)).astype(np.float32)


def logged(X):
    """Counts scaled to the median total of the cells, and their log1p."""
    totals = X.sum(1, keepdims=True, dtype=np.float64)
    return np.log1p(X / totals * np.median(totals)).astype(np.float32)


# --- writing

def write_text(group, name, values):
    group.create_dataset(name, data=np.array(values, dtype=object), dtype=h5py.string_dtype())


def write_column(table, name, values, encoding="categories"):
    """A column of obs or var, with None for a missing value, in one of AnnData's encodings."""
    if encoding == "plain":
        write_text(table, name, values)
    elif encoding == "fixed length":
        table[name] = np.array(values, dtype=bytes)
    elif encoding == "numbers":
        table[name] = np.array(values)
    elif encoding == "nullable":
        write_nullable(table, name, values)
    else:
        write_categories(table, name, values, encoding)


def write_nullable(table, name, values):
    group = table.create_group(name)
    write_text(group, "values", [value or "" for value in values])
    group["mask"] = np.array([value is None for value in values])


def write_categories(table, name, values, encoding):
    categories = sorted(set(values) - {None})
    code_of = {value: code for code, value in enumerate(categories)} | {None: -1}
    codes = np.array([code_of[value] for value in values], dtype=np.int16)
    if encoding == "old categories":
        write_text(table.require_group("__categories"), name, categories)
        table[name] = codes
        table[name].attrs["categories"] = table["__categories"][name].ref
        return
    group = table.create_group(name)
    group["codes"] = codes
    write = write_nullable if encoding == "nullable categories" else write_text
    write(group, "categories", categories)


def write_matrix(file, name, X, layout="csr", index_dtype=np.int32, **storage):
    """A matrix, dense, CSR or CSC; storage: how HDF5 stores it (chunks, compression)."""
    if layout == "dense":
        file.create_dataset(name, data=X, **storage)
        return
    matrix = sparse.csr_matrix(X) if layout == "csr" else sparse.csc_matrix(X)
    group = file.create_group(name)
    group.attrs.update({"encoding-type": f"{layout}_matrix", "shape": X.shape})
    group.create_dataset("data", data=matrix.data, **storage)
    group.create_dataset("indices", data=matrix.indices.astype(index_dtype), **storage)
    group["indptr"] = matrix.indptr.astype(index_dtype)


def write_cells(folder, X=None, labels=LABELS, genes=GENES, layout="csr", encoding="categories",
                obs_column="condition", var_columns=None, name="cells.h5ad", **storage):
    """A lab's file: X (default: logarithms), a column of labels in obs, and genes as the index of var;
    var_columns are more columns there."""
    path = folder / name
    with h5py.File(path, "w") as file:
        obs, var = file.create_group("obs"), file.create_group("var")
        obs.attrs["_index"] = var.attrs["_index"] = "_index"
        write_text(obs, "_index", [f"cell{i}" for i in range(len(labels))])
        write_column(obs, obs_column, labels, encoding)
        write_text(var, "_index", genes)
        for column, values in (var_columns or {}).items():
            write_column(var, column, values)
        write_matrix(file, "X", logged(counts()) if X is None else X, layout, **storage)
    return path


GEARS_LABELS = LABELS + ["UNMEASURED+ctrl"] * 5


def write_gears(folder):
    """A file as GEARS' are: ids as the index, old categories, and rankings in an order that no test gives."""
    X = logged(counts(len(GEARS_LABELS)))
    path = write_cells(folder, X, GEARS_LABELS, IDS, encoding="old categories",
                       var_columns={"gene_name": GENES})
    names = [f"K562_{label}_1+1" for label in GEARS_LABELS]
    with h5py.File(path, "a") as file:
        write_column(file["obs"], "condition_name", names, "old categories")
        for i, name in enumerate(sorted(set(names) - {"K562_ctrl_1+1"})):
            write_text(file, f"uns/rank_genes_groups_cov_all/{name}", np.roll(IDS, -i))
    return path


# --- reading

STAGE = ("03_prepare_data.py", "--dataset", "mine", "--vocab", "none", "--h5ad")


def prepared(path, *options):
    """Stage 03 on a file of cells, in the folder of the file: what it printed, and what dataset.h5 holds."""
    done = run_script(*STAGE, path, *options, root=path.parent)
    data = read_dataset(path.parent / "data/mine/dataset.h5")
    data.stdout, data.stderr = done.stdout, done.stderr
    return data


def refused(path, *options):
    """The one-line error that stage 03 ends with on a file of cells; it has to name the file."""
    line = error_of(*STAGE, path, *options, root=path.parent)
    assert path.name in line
    return line


def read_dataset(path):
    """dataset.h5 with X dense, the label of each cell, and the targets of each condition by name."""
    data = SimpleNamespace()
    with h5py.File(path) as file:
        data.attrs = dict(file.attrs)
        for name in ("token_ids", "measured", "cell_condition", "targets", "mean", "de_idx"):
            setattr(data, name, file[name][:])
        for name in ("genes", "conditions", "split", "subgroup"):
            setattr(data, name, file[name].asstr()[:].tolist())
        X = file["X"]
        parts = X["data"][:], X["indices"][:], X["indptr"][:]
        data.X = sparse.csr_matrix(parts, shape=X.attrs["shape"]).toarray()
    data.labels = [data.conditions[row] for row in data.cell_condition]
    data.targets_of = {}
    for condition, rows in zip(data.conditions, data.targets):
        data.targets_of[condition] = [data.genes[row] for row in rows if row >= 0]
    return data


def rules(*genes, control=("ctrl",), separator="+", target_regex=None, upper_case=False):
    """How labels are read: as of the options' defaults, but for what is given."""
    return SimpleNamespace(control=control, separator=separator, target_regex=target_regex,
                           upper_case=upper_case, genes=set(genes))
