"""scGenePT: predicts the expression of every gene after a genetic perturbation of a single cell.

This file stands alone: copy it anywhere, it imports torch and numpy only.

    import numpy as np, model
    net = model.load("model.pt")                # the authors' own files: model.load_released("file.pt")
    predicted = model.predict(net, gene_ids, control, perturbed_idx=[7])

`gene_ids` (G,) are rows of the scGPT vocabulary (vocab.json; `<pad>` for genes that it does not have),
`control` (N, G) is the log-normalized expression of N unperturbed cells, zeros included, and `perturbed_idx`
says which of the G genes are perturbed: positions in `gene_ids`, not vocabulary rows. `predicted` (N, G) is
in the units of `control`.

For a cell with genes g_1..g_L, expression c_1..c_L and flags p_1..p_L (1 = perturbed, else 0):

    x_j = LN(E_tok[g_j]) + V(c_j) + E_pert[p_j] + sum over language sources s of LN(W_s E_s[g_j] + b_s)
    h   = TransformerEncoder(LN(x));   prediction_j = D(h_j)

This kit's own additions: with `target_by_text`, E_tok is left out of x_j where g_j is perturbed and has a
text; with `residual`, prediction_j = c_j + D(h_j).

ONNX (needs onnxscript), for any number of cells and genes, the arguments being an example of those of
`forward`:

    cells, genes = torch.export.Dim("cells"), torch.export.Dim("genes")
    torch.onnx.export(net, (gene_ids, expression, perturbed), "net.onnx", dynamo=True,
                      dynamic_shapes=({0: genes}, {0: cells, 1: genes}, {0: cells, 1: genes}))

scGPT: Cui et al., Nature Methods 2024. scGenePT: Istrate, Li, Karaletsos, bioRxiv 2024, Eq. 1-8.
"""
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

MAX_VALUE = 512.0  # scGPT clamps expression here
PRETRAINED_PARTS = ("encoder.", "value_encoder.", "transformer_encoder.")  # what fine-tuning takes from scGPT


@dataclass
class Config:
    """Sizes and parts of a model; the defaults are scGPT's (whole-human)."""
    n_tokens: int = 60697          # rows of the vocabulary
    pad_id: int = 60694            # the row of <pad>, which is never trained
    d_model: int = 512
    n_heads: int = 8
    d_hid: int = 512               # width inside the feed-forward blocks
    n_layers: int = 12
    dropout: float = 0.2
    attention_dropout: float = 0.2 # of attention probabilities; a CPU has a fused kernel only without it
    has_tokens: bool = True        # E_tok; off in genePT and scGPT (-tokens)
    has_counts: bool = True        # V; off in genePT and scGPT (-counts)
    languages: dict = field(default_factory=dict)  # language source -> width of its vectors
    n_language_rows: int = 0       # genes that have a row in the language tables
    # Ways of joining language with the rest (paper, appendix A.2); released models have the layer norm alone
    layer_norm: bool = True          # of the sum, before the encoder
    batch_norm: bool = False         # of the sum, before the encoder
    normalize_language: bool = False # language vectors scaled to length 1 before their projection
    modality_weights: bool = False   # a learned factor for each term of the sum
    two_encoders: bool = False       # language goes through a transformer of its own
    # This kit's own
    target_by_text: bool = False     # a perturbed gene that has a text enters without its token
    residual: bool = False           # the decoder predicts the change of expression


class GeneEncoder(nn.Module):
    """Learned vector of each vocabulary row, layer-normalized: E_tok."""
    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.n_tokens, config.d_model, padding_idx=config.pad_id)
        self.enc_norm = nn.LayerNorm(config.d_model)
        nn.init.uniform_(self.embedding.weight, -0.1, 0.1)

    def forward(self, gene_ids):  # (L,) -> (L, d)
        return self.enc_norm(self.embedding(gene_ids))


class ValueEncoder(nn.Module):
    """Vector of an expression value: V."""
    def __init__(self, config):
        super().__init__()
        self.linear1 = nn.Linear(1, config.d_model)
        self.linear2 = nn.Linear(config.d_model, config.d_model)
        self.norm = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, expression):  # (B, L) -> (B, L, d)
        x = F.relu(self.linear1(expression.clamp(max=MAX_VALUE).unsqueeze(-1)))
        return self.dropout(self.norm(self.linear2(x)))


class LanguageEncoder(nn.Module):
    """Trainable vectors of the genes' texts, projected to the width of the model: E_s, W_s, b_s."""
    def __init__(self, config, d_language):
        super().__init__()
        self.normalize = config.normalize_language
        self.embedding = nn.Embedding(config.n_language_rows, d_language)
        self.proj = nn.Linear(d_language, config.d_model)
        self.enc_norm = nn.LayerNorm(config.d_model)

    def forward(self, rows, is_pad):  # (L,), (L,) -> (L, d)
        vectors = self.embedding(rows)
        vectors = torch.where(is_pad.unsqueeze(-1), vectors.detach(), vectors)  # <pad>'s is not trained
        return self.enc_norm(self.proj(F.normalize(vectors, dim=-1) if self.normalize else vectors))


class SelfAttention(nn.Module):
    """Multi-head attention of every gene to every gene; parameters named as nn.MultiheadAttention's."""
    def __init__(self, config):
        super().__init__()
        d = config.d_model
        self.n_heads, self.dropout = config.n_heads, config.attention_dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * d, d))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * d))
        self.out_proj = nn.Linear(d, d)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x):  # (B, L, d) -> (B, L, d)
        B, L, d = x.shape
        parts = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)  # each (B, L, d)
        shape = B, L, self.n_heads, d // self.n_heads
        q, k, v = (part.view(shape).transpose(1, 2) for part in parts)  # each (B, heads, L, d / heads)
        if x.device.type == "cpu":  # 5% faster there
            q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        x = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return self.out_proj(x.transpose(1, 2).reshape(B, L, d))


class EncoderLayer(nn.Module):
    """Post-norm transformer layer: what nn.TransformerEncoderLayer computes, under the same names."""
    def __init__(self, config):
        super().__init__()
        self.self_attn = SelfAttention(config)
        self.linear1 = nn.Linear(config.d_model, config.d_hid)
        self.linear2 = nn.Linear(config.d_hid, config.d_model)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, L, d) -> (B, L, d)
        x = self.norm1(x + self.dropout(self.self_attn(x)))
        return self.norm2(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))


class Encoder(nn.Module):
    """The stack of layers."""
    def __init__(self, config):
        super().__init__()
        self.layers = nn.Sequential(*(EncoderLayer(config) for _ in range(config.n_layers)))

    def forward(self, x):  # (B, L, d) -> (B, L, d)
        return self.layers(x)


class Decoder(nn.Module):
    """Predicted expression from each gene's final vector: D. Linear, so it can be slightly negative."""
    def __init__(self, config):
        super().__init__()
        d = config.d_model
        self.fc = nn.Sequential(nn.Linear(d, d), nn.LeakyReLU(),
                                nn.Linear(d, d), nn.LeakyReLU(),
                                nn.Linear(d, 1))

    def forward(self, x):  # (B, L, d) -> (B, L)
        return self.fc(x).squeeze(-1)


class ScGenePT(nn.Module):
    """scGPT (no language source), scGenePT (tokens, counts, language) or genePT (language alone)."""
    def __init__(self, config):
        super().__init__()
        if config.d_model % config.n_heads:
            raise ValueError(f"d_model {config.d_model} is not a multiple of n_heads {config.n_heads}")
        self.config = config
        self.encoder = GeneEncoder(config) if config.has_tokens else None
        self.value_encoder = ValueEncoder(config) if config.has_counts else None
        self.pert_encoder = nn.Embedding(3, config.d_model, padding_idx=2)  # not perturbed, perturbed, unused
        self.language_encoders = nn.ModuleDict(
            {source: LanguageEncoder(config, width) for source, width in config.languages.items()})
        if config.languages:  # vocabulary row -> row of the language tables, -1 = none
            self.register_buffer("language_rows", torch.full((config.n_tokens,), -1))
        if config.target_by_text:  # vocabulary row -> whether the gene has a text
            self.register_buffer("has_text", torch.zeros(config.n_tokens, dtype=torch.bool))
        self.ln = nn.LayerNorm(config.d_model) if config.layer_norm else nn.Identity()
        self.bn = nn.BatchNorm1d(config.d_model) if config.batch_norm else None
        n_parts = 3 + len(config.languages)
        self.modality_weights = nn.Parameter(torch.ones(n_parts)) if config.modality_weights else None
        self.transformer_encoder = Encoder(config)
        self.language_transformer = Encoder(config) if config.two_encoders else None
        self.decoder = Decoder(config)

    def set_language(self, token_ids, vectors, with_text=None):
        """Give the genes `token_ids` (R,), unique vocabulary rows, starting vectors {source: (R, width)}.

        with_text: those of token_ids that have a text in a source (default: all)
        """
        self.language_rows.fill_(-1)
        self.language_rows[torch.as_tensor(token_ids, dtype=torch.long)] = torch.arange(len(token_ids))
        if self.config.target_by_text:
            with_text = token_ids if with_text is None else with_text
            self.has_text[torch.as_tensor(with_text, dtype=torch.long)] = True
        with torch.no_grad():
            for source, encoder in self.language_encoders.items():
                encoder.embedding.weight.copy_(torch.as_tensor(vectors[source]))

    def add_language(self, token_ids, vectors):
        """Give vectors {source: (R, width)} to further genes, rows of the vocabulary (R,) without any yet."""
        n_before, n_after = self.config.n_language_rows, self.config.n_language_rows + len(token_ids)
        new_rows = torch.arange(n_before, n_after, device=self.language_rows.device)
        self.language_rows[torch.as_tensor(token_ids, dtype=torch.long)] = new_rows
        if self.config.target_by_text:
            self.has_text[torch.as_tensor(token_ids, dtype=torch.long)] = True
        self.config.n_language_rows = n_after
        for source, encoder in self.language_encoders.items():
            old = encoder.embedding.weight.detach()
            table = torch.cat([old, torch.as_tensor(vectors[source]).to(old)])
            encoder.embedding = nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, gene_ids, expression, perturbed):
        """Predicted expression after the perturbation.

        gene_ids (L,) int64: vocabulary rows of the genes, the same for all cells of the batch
        expression (B, L): log-normalized expression before the perturbation
        perturbed (B, L): 1 or True where the gene is perturbed
        returns (B, L), in the units of `expression`
        """
        # What depends on the gene alone is computed once per batch: (L, d). Absent parts are 0.
        tokens = self.encoder(gene_ids) if self.encoder is not None else 0
        is_pad = gene_ids == self.config.pad_id
        language = [encoder(self.language_rows[gene_ids], is_pad)
                    for encoder in self.language_encoders.values()]

        # What depends on the cell: (B, L, d)
        counts = self.value_encoder(expression) if self.value_encoder is not None else 0
        flag_off, flag_on = self.pert_encoder.weight[0], self.pert_encoder.weight[1]
        perturbed = perturbed.bool()
        perturbation = torch.where(perturbed.unsqueeze(-1), flag_on, flag_off)
        if self.config.target_by_text:
            is_withheld = perturbed & self.has_text[gene_ids]
            tokens = tokens * ~is_withheld.unsqueeze(-1)  # (B, L, d)

        if self.modality_weights is not None:
            parts = zip(self.modality_weights, [perturbation, counts, tokens, *language])
            perturbation, counts, tokens, *language = [weight * part for weight, part in parts]
        if self.language_transformer is None:
            h = self.transformer_encoder(self.normalized(perturbation + counts + tokens + sum(language)))
        else:
            h = self.transformer_encoder(self.normalized(perturbation + counts + tokens))
            h = h + self.language_transformer(self.normalized(perturbation + sum(language)))
        return expression + self.decoder(h) if self.config.residual else self.decoder(h)

    def normalized(self, x):  # (B, L, d) -> (B, L, d)
        if self.bn is not None:
            x = self.bn(x.transpose(1, 2)).transpose(1, 2)
        return self.ln(x)


@torch.inference_mode()
def predict(model, gene_ids, control, perturbed_idx, batch_size=None):
    """Predict what a perturbation does to each of N control cells.

    gene_ids (G,): vocabulary rows; control (N, G): log-normalized expression; perturbed_idx: positions
    (0..G-1) of the perturbed genes; batch_size: cells at a time, by default about 5,000 values on a CPU,
    whose memory is slow, and on CUDA 80,000, or what fits into half of its free memory. Returns (N, G)
    float32 (numpy). Memory grows with batch_size, not with N. Leaves the model in its mode. Raises ValueError
    for shapes that disagree, positions outside the genes, and genes that the model has no row for.
    """
    device = model.pert_encoder.weight.device
    gene_ids = torch.as_tensor(np.asarray(gene_ids), dtype=torch.long)
    control = np.asarray(control)
    perturbed_idx = np.atleast_1d(np.asarray(perturbed_idx, dtype=np.int64))
    _check_inputs(model, gene_ids, control, perturbed_idx)

    n_values = 5_000
    if device.type == "cuda":  # a layer holds at most 16 vectors per gene
        n_values = min(80_000, torch.cuda.mem_get_info(device)[0] // (2 * 16 * 4 * model.config.d_model))
    batch_size = batch_size or max(1, n_values // max(1, len(gene_ids)))
    perturbed = torch.zeros(1, len(gene_ids), dtype=torch.bool)
    perturbed[0, perturbed_idx] = True
    gene_ids, perturbed = gene_ids.to(device), perturbed.to(device)
    predicted = np.empty(control.shape, dtype=np.float32)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(control), batch_size):
            cells = torch.as_tensor(control[start:start + batch_size], dtype=torch.float32).to(device)
            output = model(gene_ids, cells, perturbed.expand(len(cells), -1))
            predicted[start:start + batch_size] = output.float().cpu().numpy()
    finally:
        model.train(was_training)
    return predicted


def _check_inputs(model, gene_ids, control, perturbed_idx):
    """Raise ValueError for inputs of `predict` that do not fit each other or the model."""
    n_genes, n_tokens = len(gene_ids), model.config.n_tokens
    if control.ndim != 2 or gene_ids.ndim != 1 or control.shape[1] != n_genes:
        raise ValueError(f"control has the shape {control.shape}, not (cells, {n_genes}) as gene_ids have")
    if not np.all((0 <= perturbed_idx) & (perturbed_idx < n_genes)):
        raise ValueError(f"perturbed_idx {perturbed_idx.tolist()}: positions run from 0 to {n_genes - 1}")
    outside = (gene_ids < 0) | (gene_ids >= n_tokens)
    if outside.any():
        wrong = gene_ids[outside][0]
        raise ValueError(f"gene_ids: {wrong} is no row of the vocabulary (0 to {n_tokens - 1})")
    if model.config.languages:
        lacking = gene_ids[model.language_rows.cpu()[gene_ids] < 0]
        if len(lacking):
            raise ValueError(f"gene_ids: no language vector for {len(lacking)} genes, the first {lacking[0]}")


# ------------------------------------------------------------------------------------------------------------
# Files

def save(model, path):
    """Write config and weights of `model` to `path`; `load` reads it."""
    state = {key: value.detach().cpu() for key, value in model.state_dict().items()}
    with open(path, "wb") as file:  # so that a full disk is an OSError
        torch.save({"format_version": 1, "config": asdict(model.config), "state": state}, file)


def load(path):
    """The model that `save` wrote to `path`, on the CPU, in eval mode. ValueError for any other file."""
    file = _read(path)
    if not {"config", "state"} <= file.keys():
        raise ValueError(f"{path}: not a file of this kit (released fine-tuned models: load_released)")
    try:
        model = ScGenePT(Config(**file["config"]))
    except TypeError as error:  # a field that Config does not have
        raise ValueError(f"{path}: config of another version ({error})") from None
    _load_strictly(model, file["state"], path)
    return model.eval()


def load_pretrained(model, path):
    """Take the parts that `model` has of token encoder, value encoder and transformer from scGPT's
    `best_model.pt`.

    Returns the keys taken and the keys left (other heads of scGPT). Raises ValueError, naming the key, when
    the file lacks one of the three parts, or a key of them is missing, unknown or of another shape.
    """
    state = _torch_names(_read(path))
    for part in PRETRAINED_PARTS:
        if not any(key.startswith(part) for key in state):
            raise ValueError(f"{path}: no {part}* in it: not a pretrained scGPT model")
    own = model.state_dict()
    parts = tuple(part for part in PRETRAINED_PARTS if any(key.startswith(part) for key in own))
    taken = {key: value for key, value in state.items() if key.startswith(parts)}
    _load_strictly(model, taken, path, parts)
    return sorted(taken), sorted(state.keys() - taken.keys())


def load_released(path, n_heads=8):
    """A released fine-tuned scGPT, scGenePT or genePT file as a model on the CPU, in eval mode.

    Sizes and parts are read from the tensors; only the number of heads leaves no trace in them. Language
    sources are named after their modules in the file (`genept_encoder`, `gopt_encoder_c`, ...). `<pad>` is
    the third row from the end, as in scGPT's vocabulary. Raises ValueError, naming the key, for one that is
    missing, unknown or of the wrong shape.
    """
    file = _read(path)
    if {"config", "state"} <= file.keys():
        raise ValueError(f"{path}: a file of this kit, which `load` reads")
    state, tables = {}, []
    for key, value in _torch_names(file).items():
        module, _, rest = key.partition(".")
        if module == "cls_decoder":  # a head that no prediction reads
            continue
        if module.startswith(("genept_encoder", "gopt_encoder_")):
            rest = rest.replace("proj_layer.", "proj.").replace("fc.", "proj.")
            key = f"language_encoders.{module}.{rest}"
            if rest == "embedding.weight":
                tables.append(key)
        state[key] = value

    languages = {key.split(".")[1]: _shape(state, key, path)[1] for key in tables}
    tables += [key for key in state if key == "encoder.embedding.weight"]
    # Without tokens and language no table tells the size of the vocabulary: it is scGPT's then
    n_tokens = _shape(state, tables[-1], path)[0] if tables else Config.n_tokens
    layers = {key.split(".")[2] for key in state if key.startswith("transformer_encoder.layers.")}
    config = Config(n_tokens=n_tokens, pad_id=n_tokens - 3, n_heads=n_heads, n_layers=len(layers),
                    d_model=_shape(state, "pert_encoder.weight", path)[1],
                    d_hid=_shape(state, "transformer_encoder.layers.0.linear1.weight", path)[0],
                    has_tokens="encoder.embedding.weight" in state,
                    has_counts=any(key.startswith("value_encoder.") for key in state),
                    languages=languages, n_language_rows=n_tokens if languages else 0)
    model = ScGenePT(config)
    if languages:
        state["language_rows"] = torch.arange(n_tokens)
    _load_strictly(model, state, path)
    return model.eval()


def _read(path):
    """The dict in a torch file, without running any code that the file might carry."""
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception:  # torch raises many kinds for a broken file, and advises to run what is in it
        raise ValueError(f"{path}: expected weights as torch.save writes them (a dict of names and tensors), "
                         "not another kind of file or a damaged one") from None
    if not isinstance(file, dict) or not all(isinstance(key, str) for key in file):
        raise ValueError(f"{path}: holds a {type(file).__name__}, expected a dict of names and tensors")
    return file


def _torch_names(state):
    """Keys as PyTorch's own layer has them: flash-attention calls the same weights Wqkv."""
    return {key.replace("self_attn._impl.", "self_attn.")
               .replace("self_attn.Wqkv.", "self_attn.in_proj_"): value for key, value in state.items()}


def _shape(state, key, path):
    """The shape of a matrix among the weights."""
    if key not in state:
        raise ValueError(f"{path}: {key} is missing")
    if not torch.is_tensor(state[key]) or state[key].ndim != 2:
        raise ValueError(f"{path}: {key} is not a matrix")
    return state[key].shape


@torch.no_grad()
def _load_strictly(model, state, path, parts=("",)):
    """Copy `state` into the keys of `model` that begin with `parts`; a key that does not fit is an error."""
    own = {key: value for key, value in model.state_dict().items() if key.startswith(parts)}
    for key in sorted(own.keys() | state.keys()):
        if key not in state:
            raise ValueError(f"{path}: {key} is missing")
        if key not in own:
            raise ValueError(f"{path}: {key} is unknown")
        shape = tuple(state[key].shape) if torch.is_tensor(state[key]) else type(state[key]).__name__
        if shape != tuple(own[key].shape):
            raise ValueError(f"{path}: {key} has the shape {shape}, expected {tuple(own[key].shape)}")
        if not torch.isfinite(state[key]).all():
            raise ValueError(f"{path}: {key} holds numbers that are not finite")
    for key, value in own.items():
        value.copy_(state[key])
