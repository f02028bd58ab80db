"""One Transformer for GPT-2, Llama, Qwen2 and Qwen3: LM or scalar head, Hugging Face weights in and out.

The body works on FLAT tokens: whatever comes in (dense, padded on the left or right, packed) is first reduced
to its N real tokens with a position each (`Layout`), so no linear layer ever multiplies padding; only
attention sees the shape. Attention itself is a function passed in, `attend(layer, q, k, v)`: training, the
paged engine of infer.py and the context parallelism of parallel.py run the very same blocks.

    model = GPT.from_pretrained('gpt2')                  # or a directory, or GPT(GPTConfig(...))
    logits, _ = model(idx)                               # (B, T, V)
    logp = model.logprobs(idx, temperature=0.7)          # (B, T-1), never holds (B, T, V)

Weights are HF's safetensors (8 bytes + JSON + raw tensors, parsed here); nothing in a checkpoint is executed.
References: GPT-2 (Radford et al. 2019), Llama (2302.13971), RoPE (2104.09864), GQA (2305.13245), Qwen2
(2407.10671), Qwen3 (2505.09388); structure and initialisation as in nanoGPT.
"""
import json
import math
import mmap
import os
import re
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import files
import kernels
from dataset import pack


@dataclass
class GPTConfig:
    """Defaults are GPT-2 small. n_kv_head, head_size, n_inner = 0 mean n_head, n_embd // n_head, 4 *
    n_embd."""
    arch: str = 'gpt2'          # 'gpt2' | 'llama' | 'qwen2' | 'qwen3': decides names at the HF border only
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0
    n_embd: int = 768
    head_size: int = 0
    n_inner: int = 0
    norm: str = 'layer'         # 'layer' | 'rms'
    norm_eps: float = 1e-5
    pos: str = 'learned'        # 'learned' | 'rope'
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None   # {'rope_type': 'linear' | 'llama3', 'factor': ...}
    act: str = 'gelu_tanh'      # 'gelu_tanh' | 'gelu' | 'relu' | 'silu'
    gated: bool = False         # SwiGLU: down(silu(gate(x)) * up(x))
    qkv_bias: bool = True
    attn_out_bias: bool = True
    bias: bool = True           # of the MLP and the LayerNorms
    qk_norm: bool = False       # RMSNorm over head_size on q and k (Qwen3)
    tie: bool = True            # lm_head.weight is wte.weight
    dropout: float = 0.0        # 0 for everything RL; 0.1+ only for small-data pretraining
    reward_bias: float = 0.0    # scalar head: value = score(x) + reward_bias
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None  # all that end an answer
    pad_token_id: int | None = None

    def __post_init__(self):
        self.n_kv_head = self.n_kv_head or self.n_head
        self.head_size = self.head_size or self.n_embd // self.n_head
        self.n_inner = self.n_inner or 4 * self.n_embd
        if self.n_head % self.n_kv_head:
            raise ValueError(f'n_head {self.n_head} is not divisible by n_kv_head {self.n_kv_head}')
        if self.n_embd % self.n_head and self.arch == 'gpt2':
            raise ValueError(f'n_embd {self.n_embd} is not divisible by n_head {self.n_head}')
        if self.head_size < 1 or self.pos == 'rope' and self.head_size % 2:
            raise ValueError(f'head_size {self.head_size}: rotated in pairs, so an even number')

    @classmethod
    def of(cls, arch, **shape):
        """What the architecture fixes (norm, positions, activation ...) plus a shape, GPTConfig.of('qwen3',
        n_layer=4)."""
        if arch not in ARCHS:
            raise ValueError(f'unknown arch {arch!r}; known: {", ".join(ARCHS)}')
        return cls(**{**ARCHS[arch], 'arch': arch, **shape})


_LLAMA = dict(norm='rms', pos='rope', act='silu', gated=True, qkv_bias=False, attn_out_bias=False, bias=False)
ARCHS = {  # what an architecture fixes; a config.json says the rest
    'gpt2': {},  # GPTConfig's defaults
    'llama': _LLAMA,
    'qwen2': dict(_LLAMA, qkv_bias=True),
    'qwen3': dict(_LLAMA, qk_norm=True),
}

# ----------------------------------------------------------------------------------------------------
# the layout of a batch: which tokens are real, where they stand, which ones may see each other


class Layout:
    """The N real tokens of a (B, T) batch and the segments (sequences or packed documents) that they form.

    keep (N,) int64: flat indices of the real tokens, None when all are real; pos (N,) position in the
    segment; cu_seqlens (S+1,) int32 borders of the segments, longest: tokens of the longest one; dense: the
    batch is a whole rectangle. Worked: mask [[0,1,1],[1,1,0]] -> keep [1,2,3,4], pos [0,1,0,1], cu_seqlens
    [0,2,4]. dropout: of the attention. """

    def __init__(self, shape, device, mask=None, doc=None, dropout=0.0):
        self.B, self.T = shape
        self.dropout, self.keep = dropout, None
        self.extra = 0  # dummy rows that round N up: oneDNN compiles a product anew for every shape
        self.dense = mask is None and doc is None
        if self.dense:
            self.longest = self.T
            self.pos = torch.arange(self.T, device=device).repeat(self.B)
            self.cu_seqlens = torch.arange(self.B + 1, dtype=torch.int32, device=device) * self.T
            return
        if mask is not None:
            self.keep = mask.reshape(-1).nonzero()[:, 0]
        row = self.pick(torch.arange(self.B, device=device).repeat_interleave(self.T))
        new = torch.ones_like(row, dtype=torch.bool)  # does a segment begin here?
        new[1:] = row.diff() != 0
        if doc is not None:
            new[1:] |= self.pick(doc).diff() != 0
        starts, n = new.nonzero()[:, 0], len(row)
        self.cu_seqlens = F.pad(starts, (0, 1), value=n).int()
        lengths = self.cu_seqlens.diff()
        self.longest = int(lengths.max()) if n else 0  # a GPU is waited for, once a batch
        self.pos = torch.arange(n, device=device) - starts.repeat_interleave(lengths)
        self.extra = kernels.extra_rows(n) if device.type == 'cpu' else 0

    def pick(self, x):
        """(B, T) -> (N,)"""
        x = x.reshape(-1)
        return x if self.keep is None else x[self.keep]

    def put(self, x):
        """(N, ...) -> (B, T, ...), zeros where nothing is."""
        if self.keep is not None:
            x = x.new_zeros(self.B * self.T, *x.shape[1:]).index_copy(0, self.keep, x)
        return x.view(self.B, self.T, *x.shape[1:])

    def attend(self, layer, q, k, v):
        """The attention of training: causal, inside each segment. q (N, nh, hs), k and v (N, nkv, hs) -> (N,
        nh, hs)."""
        if not self.dropout and (not self.dense or kernels.docs_in_c(q)):
            return kernels.flash_attention(q, k, v, self.cu_seqlens, longest=self.longest)
        if self.dense:
            q, k, v = (x.view(self.B, self.T, *x.shape[1:]) for x in (q, k, v))
            return self._rectangle(q, k, v).flatten(0, 1)
        # our kernels have no dropout: one rectangle, in which causality hides the padding
        step = torch.arange(self.longest, device=q.device)
        real = step < self.cu_seqlens.diff()[:, None]
        grid = torch.where(real, self.cu_seqlens[:-1, None] + step, 0)  # (S, longest) flat rows
        y = self._rectangle(q[grid], k[grid], v[grid])[real]
        return torch.zeros_like(q).index_copy(0, grid[real], y)

    def _rectangle(self, q, k, v):
        """(S, T, heads, hs) each."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        grouped = q.shape[1] != k.shape[1]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout,
                                           enable_gqa=grouped)
        return y.transpose(1, 2)


# ----------------------------------------------------------------------------------------------------
# the network


class Norm(nn.Module):
    """LayerNorm or RMSNorm; with `residual` it adds first and returns both, one pass over memory instead of
    two."""

    def __init__(self, size, kind, eps, bias):
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if kind == 'layer' and bias else None

    def forward(self, x, residual=None):
        if self.kind == 'rms':
            return kernels.rms_norm(x, self.weight, self.eps, residual)
        return kernels.layer_norm(x, self.weight, self.bias, self.eps, residual)


class Linear(nn.Linear):
    def forward(self, x):
        return kernels.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_size = c.n_head, c.n_kv_head, c.head_size
        wide, narrow = c.n_head * c.head_size, c.n_kv_head * c.head_size
        if c.arch == 'gpt2':
            self.c_attn = Linear(c.n_embd, 3 * wide, bias=c.qkv_bias)
            self.c_proj = Linear(wide, c.n_embd, bias=c.attn_out_bias)
        else:
            self.q_proj = Linear(c.n_embd, wide, bias=c.qkv_bias)
            self.k_proj = Linear(c.n_embd, narrow, bias=c.qkv_bias)
            self.v_proj = Linear(c.n_embd, narrow, bias=c.qkv_bias)
            self.o_proj = Linear(wide, c.n_embd, bias=c.attn_out_bias)
        norms = (Norm(c.head_size, 'rms', c.norm_eps, False) if c.qk_norm else None for _ in range(2))
        self.q_norm, self.k_norm = norms

    def forward(self, x, layer, rope, attend):
        fused = hasattr(self, 'c_attn')
        if fused:
            q, k, v = self.c_attn(x).unflatten(1, (3, self.n_head, self.head_size)).unbind(1)
        else:
            projected = self.q_proj(x), self.k_proj(x), self.v_proj(x)
            q, k, v = (y.unflatten(1, (-1, self.head_size)) for y in projected)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (t[0] for t in kernels.rope(q[None], k[None], *rope))
        y = attend(layer, q.to(v.dtype), k.to(v.dtype), v).flatten(1)
        return self.c_proj(y) if fused else self.o_proj(y)


ACTIVATIONS = dict(gelu_tanh=kernels.gelu, gelu=F.gelu, relu=F.relu, silu=F.silu)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.act, self.gated = c.act, c.gated
        if c.gated:
            self.gate_proj = Linear(c.n_embd, c.n_inner, bias=c.bias)
            self.up_proj = Linear(c.n_embd, c.n_inner, bias=c.bias)
            self.down_proj = Linear(c.n_inner, c.n_embd, bias=c.bias)
        else:
            self.c_fc = Linear(c.n_embd, c.n_inner, bias=c.bias)
            self.c_proj = Linear(c.n_inner, c.n_embd, bias=c.bias)

    def forward(self, x):
        if self.gated:
            return self.down_proj(kernels.swiglu(self.gate_proj(x), self.up_proj(x)))
        return self.c_proj(ACTIVATIONS[self.act](self.c_fc(x)))


class Block(nn.Module):
    """Pre-norm, written as (x, delta): the sum x + delta is formed inside the next norm."""

    def __init__(self, c):
        super().__init__()
        self.ln_1, self.ln_2 = (Norm(c.n_embd, c.norm, c.norm_eps, c.bias) for _ in range(2))
        self.attn, self.mlp, self.config = Attention(c), MLP(c), c

    def forward(self, x, delta, layer, rope, attend):
        y, x = (self.ln_1(x), x) if delta is None else self.ln_1(delta, x)
        p = self.config.dropout
        y, x = self.ln_2(F.dropout(self.attn(y, layer, rope, attend), p, self.training), x)
        return x, F.dropout(self.mlp(y), p, self.training)


def rope_frequencies(c):
    """Inverse frequencies (hs/2,) fp32, after linear or Llama-3 scaling (long wavelengths are stretched by
    `factor`, short ones kept, a ramp between). theta=10000, hs=4 -> [1, 0.01]."""
    inv = 1.0 / (c.rope_theta ** (torch.arange(0, c.head_size, 2, dtype=torch.float32) / c.head_size))
    s = c.rope_scaling
    if not s:
        return inv
    if s['rope_type'] == 'linear':
        return inv / s['factor']
    turns = s['original_max_position_embeddings'] * inv / (2 * math.pi)
    low, high = s['low_freq_factor'], s['high_freq_factor']
    ramp = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretched, 1: kept
    return inv * (ramp + (1 - ramp) / s['factor'])


class GPT(nn.Module):
    cp = 1  # ranks that share a sequence; of a model that parallel.shard has cut there may be more

    def __init__(self, config, head='lm'):
        super().__init__()
        self.config, self.head = config, head
        self.checkpointing = self.compiled = False
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.pos == 'learned' else None
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = Norm(config.n_embd, config.norm, config.norm_eps, config.bias)
        if head == 'lm':
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
            if config.tie:
                self.lm_head.weight = self.wte.weight
        elif head == 'scalar':
            self.score = Linear(config.n_embd, 1, bias=False)
        else:
            raise ValueError(f"head {head!r}: expected 'lm' or 'scalar'")
        # no buffer: .to(bfloat16) would round it
        self.inv_freq = rope_frequencies(config) if config.pos == 'rope' else None
        self.apply(self._init_weights)
        for name, p in self.named_parameters():  # residual branches start small (GPT-2 paper)
            if name.endswith(('c_proj.weight', 'o_proj.weight', 'down_proj.weight')):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
        if head == 'scalar':
            self.init_score()

    @staticmethod
    def _init_weights(m):
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, std=0.02)
            if getattr(m, 'bias', None) is not None:
                nn.init.zeros_(m.bias)

    def init_score(self):
        """N(0, 1/sqrt(d+1)): rewards of about unit size [lm-human-preferences]."""
        nn.init.normal_(self.score.weight, std=1 / math.sqrt(self.config.n_embd + 1))

    # ---- forward ---------------------------------------------------------------------------------

    def hidden(self, idx, pos, attend):
        """idx, pos (N,) int64 flat tokens and their positions -> (N, C) after the last norm."""
        x, delta, rope = self.wte(idx), None, None
        if self.wpe is not None:
            x = x + self.wpe(pos)
        if self.inv_freq is not None:
            self.inv_freq = self.inv_freq.to(pos.device)  # once: a captured graph may not copy from the CPU
            inv = self.inv_freq.to(torch.promote_types(x.dtype, torch.float32))
            angle = pos[:, None].to(inv.dtype) * inv  # float32 in half precision, float64 in float64
            rope = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        x = F.dropout(x, self.config.dropout, self.training)
        attend = torch.compiler.disable(attend) if self.compiled else attend
        for layer, block in enumerate(self.h):
            if self.checkpointing and torch.is_grad_enabled():
                x, delta = checkpoint(block, x, delta, layer, rope, attend, use_reentrant=False)
            else:
                x, delta = block(x, delta, layer, rope, attend)
        return self.ln_f(delta, x)[0]

    def compile_blocks(self, backend='inductor'):
        """torch.compile of each block, for any number of rows; attention stays a call between graphs, since
        it depends on how the batch is packed."""
        for block in self.h:
            block.compile(dynamic=True, backend=backend)
        self.compiled = True

    def layout(self, idx, mask=None, doc=None):
        """The Layout of a batch that fits this model; ValueError for one that does not."""
        if doc is None and idx.shape[1] > self.config.block_size:  # packed rows may be longer
            raise ValueError(f'sequence of {idx.shape[1]} tokens is longer than block_size '
                             f'{self.config.block_size}: shorten it')
        dropout = self.config.dropout if self.training else 0.0
        return Layout(idx.shape, idx.device, mask, doc, dropout)

    def encode(self, idx, mask=None, doc=None):
        """idx (B, T) -> (x (N, C) of the real tokens, Layout). What heads and losses share."""
        at = self.layout(idx, mask, doc)
        ids, pos = (F.pad(t, (0, at.extra)) for t in (at.pick(idx), at.pos))
        return self.hidden(ids, pos, at.attend)[:len(at.pos)], at

    def head_weight(self, x):
        """(x, lm_head.weight) in the dtype of the matrix product (autocast does not reach our kernels)."""
        dtype, device = x.dtype, x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        return x.to(dtype), self.lm_head.weight.to(dtype)

    def logits(self, x):
        return self.lm_head(x)

    def loss(self, x, at, targets):
        """Mean cross-entropy of targets (B, T), -1 = not counted. The head runs on counted positions only: in
        SFT about half of them."""
        targets = at.pick(targets)
        counted = targets >= 0
        if not bool(counted.all()):
            x, targets = x[counted], targets[counted]
        if not len(targets):
            return x.sum() * 0.0
        return kernels.linear_cross_entropy(*self.head_weight(x), targets)

    def values(self, x):
        """The scalar head on hidden states x (n, C) -> (n,), float32 at least."""
        return self.score(x)[:, 0].to(torch.promote_types(x.dtype, torch.float32)) + self.config.reward_bias

    def token_logprobs(self, x, targets, temperature=1.0):
        """(log p, entropy) of targets (n,) int64 after the hidden states x (n, C), both (n,) float32: the
        head without its logits."""
        return kernels.linear_logprobs(*self.head_weight(x), targets, temperature)

    def forward(self, idx, targets=None, mask=None, doc=None):
        """idx (B, T) int64. Returns (logits (B, T, V), None), with targets (-1 ignored) (None, mean loss),
        with a scalar head (values (B, T), None). mask (B, T) bool, True = real token, either side padded; doc
        (B, T) int, packed documents."""
        x, at = self.encode(idx, mask, doc)
        if self.head == 'scalar':
            return at.put(self.values(x)), None
        if targets is None:
            return at.put(self.logits(x)), None
        return None, self.loss(x, at, targets)

    def logprobs(self, idx, temperature=1.0, mask=None, doc=None, where=None, entropy=False):
        """log p(idx[:, t+1] | idx[:, :t+1]) at `temperature`, (B, T-1) fp32; the (B, T, V) logits never
        exist.

        where (B, T-1) bool limits the work to the positions that count (0 elsewhere): in RL only responses
        need the head. entropy=True returns (logp, entropy), both (B, T-1). V=2, equal logits -> every entry
        is log 1/2 = -0.6931."""
        x, at = self.encode(idx, mask, doc)
        predicts = torch.ones_like(idx[:, 1:], dtype=torch.bool)
        if mask is not None:
            predicts &= mask[:, 1:] & mask[:, :-1]
        if doc is not None:
            predicts &= doc[:, 1:] == doc[:, :-1]
        if where is not None:
            predicts &= where
        row = at.pick(F.pad(predicts, (0, 1))).nonzero()[:, 0]  # rows of x that predict
        following = at.pick(idx.roll(-1, 1))[row]
        found = []
        for y in self.token_logprobs(x[row], following, temperature):
            found.append(at.put(y.new_zeros(len(x)).index_copy(0, row, y))[:, :-1])
        return tuple(found) if entropy else found[0]

    def num_params(self):
        """Parameters without the table of positions, as nanoGPT counts."""
        return sum(p.numel() for name, p in self.named_parameters() if name != 'wpe.weight')

    # ---- Hugging Face's format -------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name_or_dir, head=None, dtype=torch.float32, **overrides):
        """A model of the hub or a directory with config.json + *.safetensors. `overrides` are GPTConfig
        fields. head=None takes what the directory holds; an LM body under head='scalar' gets a fresh head."""
        folder = files.resolve(name_or_dir)
        where = os.path.join(folder, 'config.json')
        raw = read_json(where)
        more = os.path.join(folder, 'generation_config.json')  # what transformers' generate goes by
        if os.path.exists(more):
            raw['eos_token_id'] = read_json(more).get('eos_token_id', raw.get('eos_token_id'))
        config = replace(config_from_hf(raw, where), **overrides)
        stored = load_safetensors_dir(folder)
        if config.n_layer > len(stored):  # before as many layers are made
            raise ValueError(f'{where}: {config.n_layer} layers, but the weights are {len(stored)} tensors')
        if head is None:
            head = 'scalar' if 'SequenceClassification' in str(raw.get('architectures')) else 'lm'
        with torch.device('meta'):
            model = cls(config, head)
        return fill(model, from_hf_names(stored, model), folder, dtype)

    def save_pretrained(self, folder):
        """config.json + model.safetensors (one file, whatever its size) that transformers opens."""
        os.makedirs(folder, exist_ok=True)
        state = to_hf_names(self)
        save_safetensors(os.path.join(folder, files.SINGLE), state)
        config = config_to_hf(self.config, self.head, next(iter(state.values())).dtype)
        write_json(os.path.join(folder, 'config.json'), config)


# ----------------------------------------------------------------------------------------------------
# names and weights: HF's and ours

_BUFFERS = re.compile(r'\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$')  # of older files; no weights


LLAMA_NAMES = {  # our modules (regular expressions): HF's
    '^h': 'layers', '^wte': 'embed_tokens', '^ln_f': 'norm', r'\.attn': '.self_attn',
    r'\.ln_1': '.input_layernorm', r'\.ln_2': '.post_attention_layernorm'}


def hf_name(name, arch):
    """HF's name of ours. 'h.0.attn.q_proj.weight' of a Llama -> 'model.layers.0.self_attn.q_proj.weight'."""
    if name.startswith(('lm_head', 'score')):
        return name
    if arch == 'gpt2':
        return 'transformer.' + name
    for ours, theirs in LLAMA_NAMES.items():
        name = re.sub(ours + r'\b', theirs, name)
    return 'model.' + name


def is_conv1d(name, arch):
    """GPT-2's HF weights are Conv1D, stored (in, out): transposed at the border."""
    matrices = 'c_attn.weight', 'c_proj.weight', 'c_fc.weight'
    return arch == 'gpt2' and name.startswith('h.') and name.endswith(matrices)


def from_hf_names(stored, model):
    """{our name: tensor} of {HF's name: tensor}; a body that was saved alone lacks the prefix
    ('transformer.', 'model.'). A name that is none keeps its place, for `fill` to tell."""
    arch, state = model.config.arch, {}
    names = {hf_name(name, arch): name for name in model.state_dict()}
    prefix = hf_name('', arch)
    for key, value in stored.items():
        name = names.get(key, names.get(prefix + key, key))
        if not _BUFFERS.search(key):
            state[name] = value.transpose(0, -1) if is_conv1d(name, arch) else value
    return state


def to_hf_names(model):
    """The counterpart: {HF's name: tensor} on the CPU, a tied head left out."""
    c, state = model.config, {}
    for name, value in model.state_dict().items():
        if not (name == 'lm_head.weight' and c.tie):
            value = value.t() if is_conv1d(name, c.arch) else value
            state[hf_name(name, c.arch)] = value.cpu().contiguous()
    if c.arch == 'gpt2':  # HF's GPT-2 always has biases: zeros are the same function
        for name in [n for n in state if re.search(r'(ln_|attn|mlp).*weight$', n)]:
            state.setdefault(name[:-6] + 'bias', state[name].new_zeros(state[name].shape[-1]))
    return state


def fill(model, state, where, dtype=torch.float32):
    """Weights {our name: tensor} into a model that was built on the meta device: returns it, on the CPU. The
    one look at what a file holds: ValueError names a tensor that is missing, that no parameter takes (but the
    other kind of head, where the head was asked for), of another shape, or quantised. A tied model may store
    its head alone; one whose two differ is not tied, whatever its config says, as in transformers. A scalar
    head that is not there is drawn (model.fresh_head)."""
    c, want, state = model.config, model.state_dict(), dict(state)
    head = state.get('lm_head.weight')
    if c.tie and head is not None:
        table = state.setdefault('wte.weight', head)
        c.tie = table.dtype == head.dtype and torch.equal(table, head)
    if c.tie and model.head == 'lm' and 'wte.weight' in state:
        state['lm_head.weight'] = state['wte.weight']
    state.pop('score.weight' if model.head == 'lm' else 'lm_head.weight', None)  # not asked for
    model.fresh_head = model.head == 'scalar' and 'score.weight' not in state
    if model.fresh_head:
        state['score.weight'] = torch.zeros(1, c.n_embd)  # drawn below
    missing = [name for name in want if name not in state]
    if missing:
        more = f'{missing[0]} (and {len(missing) - 1} more)'
        raise ValueError(f'{where}: no weights for {more}: not a {c.arch} model of this shape?')
    for name, value in state.items():
        if name not in want:
            raise ValueError(f'{where}: a {c.arch} model has no place for the tensor {name}')
        if value.shape != want[name].shape:
            raise ValueError(f'{where}: {name} has shape {tuple(value.shape)}, the config asks for '
                             f'{tuple(want[name].shape)}')
        if not value.is_floating_point():
            raise ValueError(f'{where}: {name} is {value.dtype}: quantised weights are not read')
    model.to_empty(device='cpu').load_state_dict(state)
    if c.pos == 'rope':
        model.inv_freq = rope_frequencies(c)
    if model.fresh_head:
        model.init_score()
    if model.head == 'lm' and c.tie:
        model.lm_head.weight = model.wte.weight
    return model.to(dtype)


# ----------------------------------------------------------------------------------------------------
# config.json

KEYS = {  # GPTConfig's field: config.json's name of it
    'gpt2': dict(n_embd='n_embd', n_layer='n_layer', n_head='n_head', n_inner='n_inner',
                 vocab_size='vocab_size', block_size='n_positions', norm_eps='layer_norm_epsilon',
                 tie='tie_word_embeddings', act='activation_function'),
    'qwen2': dict(n_embd='hidden_size', n_layer='num_hidden_layers', n_head='num_attention_heads',
                  n_inner='intermediate_size', vocab_size='vocab_size', block_size='max_position_embeddings',
                  norm_eps='rms_norm_eps', tie='tie_word_embeddings', n_kv_head='num_key_value_heads',
                  head_size='head_dim', act='hidden_act', rope_theta='rope_theta'),
}
KEYS['qwen3'] = dict(KEYS['qwen2'], attn_out_bias='attention_bias')
KEYS['llama'] = dict(KEYS['qwen3'], bias='mlp_bias')
LEFT_OUT = dict(n_kv_head=0, head_size=0, attn_out_bias=False, bias=False, tie=False, norm_eps=1e-6,
                block_size=2048, rope_theta=1e4, act='silu')
USUAL = {  # what a setting is that a file leaves out; 0: GPTConfig works it out
    'gpt2': dict(n_inner=0, norm_eps=1e-5, block_size=1024, tie=True, act='gelu_new'),
    'llama': LEFT_OUT, 'qwen2': LEFT_OUT, 'qwen3': dict(LEFT_OUT, head_size=128),
}
GPT2_ALSO = dict(hidden_size='n_embd', num_hidden_layers='n_layer', num_attention_heads='n_head',
                 max_position_embeddings='n_positions')  # other names that transformers takes
ACT = dict(gelu_new='gelu_tanh', gelu_pytorch_tanh='gelu_tanh', gelu='gelu', relu='relu', silu='silu',
           swish='silu')
TOKENS = 'bos_token_id', 'eos_token_id', 'pad_token_id'
MUST_BE = dict(  # settings that this model has in one way only; a file may leave them out
    scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, add_cross_attention=False,
    use_sliding_window=False, partial_rotary_factor=1.0, quantization_config={})
SCALING = dict(  # of RoPE: what each kind needs
    default={}, linear=dict(factor=float),
    llama3=dict(factor=float, low_freq_factor=float, high_freq_factor=float,
                original_max_position_embeddings=int))


def setting(said, where, key, kind, default=...):
    """said[key]: a positive int or float, a bool or a str. ValueError names the key that is missing (no
    default) or no such thing."""
    value = said.get(key)
    if value is None and default is ...:
        raise ValueError(f'{where}: no {key}')
    if value is None:
        return default
    number = kind in (int, float)
    fine = type(value) is kind or kind is float and type(value) is int
    if not fine or number and not 0 < value < (2 ** 31 if kind is int else 1e30):
        expected = 'a positive ' if number else 'a '
        raise ValueError(f'{where}: {key} = {value!r:.40}, expected {expected}{kind.__name__}')
    return kind(value)


def _flat(raw, where, also):
    """What a config.json says: {key: value}, without nulls, each setting under one name (also: other names),
    and what is said of RoPE beside the rest. transformers 5 writes that into rope_parameters, 4 into
    rope_scaling, and some of it may stand beside both. ValueError where two contradict."""
    said = {}
    for block in (raw, raw.get('rope_parameters') or {}, raw.get('rope_scaling') or {}):
        if not isinstance(block, dict):
            raise ValueError(f'{where}: rope_parameters or rope_scaling is {block!r:.40}, expected an object')
        for key, value in block.items():
            name = also.get(key, key)
            if value is not None and name in said and value != said[name]:
                raise ValueError(f'{where}: {key} = {value!r:.40} contradicts {name} = {said[name]!r:.40}')
            if value is not None:
                said[name] = value
    return said


def config_from_hf(raw, where='config.json'):
    """HF config.json (dict) -> GPTConfig. A setting that we would silently ignore is a ValueError that names
    it."""
    arch = raw.get('model_type')
    if not isinstance(arch, str) or arch not in ARCHS:
        raise ValueError(f'{where}: model_type {arch!r:.40}; known: {", ".join(ARCHS)}')
    said = _flat(raw, where, dict(GPT2_ALSO if arch == 'gpt2' else {}, type='rope_type'))
    for key, only in MUST_BE.items():
        if said.get(key, only) != only:
            raise ValueError(f'{where}: {key} = {said[key]!r:.40} cannot be honoured, only {only}')
    layers = said.get('layer_types', [])
    if not isinstance(layers, list) or any(kind != 'full_attention' for kind in layers):
        raise ValueError(f'{where}: layer_types {str(layers):.80} cannot be honoured, only full_attention')
    c, kinds = dict(ARCHS[arch], arch=arch), {f.name: f.type for f in fields(GPTConfig)}
    for field, key in KEYS[arch].items():
        c[field] = setting(said, where, key, kinds[field], USUAL[arch].get(field, ...))
    if c.get('attn_out_bias'):
        c['qkv_bias'] = True
    act = ACT.get(c['act'])
    if act is None or act != 'silu' and arch != 'gpt2':
        raise ValueError(f'{where}: {KEYS[arch]["act"]} {c["act"]!r:.40} cannot be honoured')
    bias = said.get('reward_bias', 0.0)
    if type(bias) not in (int, float) or not math.isfinite(bias):
        raise ValueError(f'{where}: reward_bias = {bias!r:.40}, expected a finite number')
    c |= dict(act=act, reward_bias=bias, rope_scaling=_rope_scaling(said, where))
    for key in TOKENS:  # None, an id, or several
        ids = said.get(key, [])
        if any(type(i) is not int for i in (ids if isinstance(ids, list) else [ids])):
            raise ValueError(f'{where}: {key} = {ids!r:.40}, expected a token id or a list of them')
        c[key] = None if ids == [] else ids
    return GPTConfig(**c)


def _rope_scaling(said, where):
    kind = setting(said, where, 'rope_type', str, 'default')
    if kind not in SCALING:
        raise ValueError(f'{where}: rope_type {kind!r:.40} cannot be honoured, only {", ".join(SCALING)}')
    scaling = dict(rope_type=kind)
    for key, number in SCALING[kind].items():
        scaling[key] = setting(said, where, key, number)
    if kind == 'llama3' and scaling['low_freq_factor'] >= scaling['high_freq_factor']:
        raise ValueError(f'{where}: low_freq_factor is not below high_freq_factor')
    return None if kind == 'default' else scaling


def config_to_hf(c, head, dtype):
    name = 'GPT2LMHeadModel' if c.arch == 'gpt2' else c.arch.capitalize() + 'ForCausalLM'
    if head == 'scalar':
        name = re.sub('LMHeadModel|ForCausalLM', 'ForSequenceClassification', name)
    raw = dict(architectures=[name], model_type=c.arch, torch_dtype=str(dtype).removeprefix('torch.'))
    raw |= {key: getattr(c, key) for key in TOKENS}
    raw |= {key: getattr(c, field) for field, key in KEYS[c.arch].items()}
    raw[KEYS[c.arch]['act']] = 'gelu_new' if c.act == 'gelu_tanh' else c.act
    if c.arch == 'gpt2':
        raw |= dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), c.dropout)
    else:
        raw |= dict(rope_scaling=c.rope_scaling, use_sliding_window=False)
    if head == 'scalar':
        raw |= dict(num_labels=1, id2label={'0': 'reward'}, label2id={'reward': 0}, problem_type='regression',
                    reward_bias=c.reward_bias)
    return raw


# ----------------------------------------------------------------------------------------------------
# files: JSON, and safetensors (u64 header length, JSON {name: {dtype, shape, data_offsets}}, raw tensors)

_DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
               I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)


LFS = b'version https://git-lfs'  # how the file begins that stands for one that was not fetched


def parse_json(data, where):
    """bytes -> dict; ValueError, one line, for what is no JSON object."""
    try:
        found = json.loads(data.decode('utf-8-sig'))
    except (ValueError, RecursionError) as e:
        why = 'a git-lfs pointer, `git lfs pull` fetches the file' if data.startswith(LFS) else str(e)
        raise ValueError(f'{where}: not JSON: {why:.100}') from None
    if not isinstance(found, dict):
        raise ValueError(f'{where}: JSON, but not an object: {str(found):.40}')
    return found


def read_json(path):
    """A JSON object of a user's file. ValueError, one line, for anything else."""
    with open(path, 'rb') as f:
        return parse_json(f.read(), path)


def write_json(path, obj):
    with files.replaced(path, 'w') as f:
        f.write(json.dumps(obj, indent=2) + '\n')


def load_safetensors(path):
    """{name: tensor} over a private mmap (the tensors are views: copy before writing). ValueError, one line,
    for anything that is not exactly a safetensors file: lengths, dtypes, overlaps, holes."""
    size = os.path.getsize(path)
    with open(path, 'rb') as f:
        n = int.from_bytes(f.read(8), 'little')
        room = size - 8 - n  # bytes of all tensors
        if size < 8 or room < 0 or n > 100 << 20:
            raise ValueError(f'{path}: not a safetensors file: header of {n} bytes in a file of {size} '
                             f'(truncated? or a git-lfs pointer: `git lfs pull` fetches the weights)')
        header = parse_json(f.read(n), f'{path}: header of safetensors')
        whole = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants a writable buffer
    header.pop('__metadata__', None)
    borders, out = [(0, 0), (room, room)], {}
    for name, t in header.items():
        try:
            dtype, shape, (start, end) = _DTYPES[t['dtype']], list(t['shape']), t['data_offsets']
            sound = all(type(x) is int and x >= 0 for x in [*shape, start, end])
            fits = sound and end - start == math.prod(shape) * dtype.itemsize and end <= room
            fits = fits and math.prod(x or 1 for x in shape) < 2 ** 48
        except (KeyError, TypeError, ValueError):
            fits = False
        if not fits:
            raise ValueError(f'{path}: not a safetensors file that we can read: {name:.80} is {str(t):.80} '
                             f'in {room} bytes; dtypes: {", ".join(_DTYPES)}')
        borders.append((start, end))
        flat = torch.empty(0, dtype=dtype)
        if start < end:
            flat = torch.frombuffer(whole, dtype=dtype, count=math.prod(shape), offset=8 + n + start)
        out[name] = flat.view(shape)
    borders.sort()
    if any(end != start for (_, end), (start, _) in zip(borders, borders[1:])):
        raise ValueError(f'{path}: not a safetensors file: tensors overlap, or leave holes')
    return out


def load_safetensors_dir(folder):
    """All tensors of model.safetensors, or of the shards that an index names."""
    index, single = (os.path.join(folder, file) for file in (files.INDEX, files.SINGLE))
    if os.path.exists(single):
        return load_safetensors(single)
    if not os.path.exists(index):
        raise ValueError(f'{folder}: no model.safetensors (pickled .bin weights are not read, since they can '
                         f'run code: convert them)')
    places, state = read_json(index).get('weight_map'), {}
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f'{index}: no weight_map {{tensor: file}} in it')
    for file in sorted(set(places.values())):
        if os.path.basename(file) != file:
            raise ValueError(f'{index}: shard {file!r:.80} is outside the folder')
        state |= load_safetensors(os.path.join(folder, file))
    return state


def save_safetensors(path, state):
    """Whole or not at all. Largest dtype first, so that every tensor is aligned."""
    kinds, header, at = {v: k for k, v in _DTYPES.items()}, {'__metadata__': {'format': 'pt'}}, 0
    order = sorted(state, key=lambda name: (-state[name].dtype.itemsize, name))
    for name in order:
        t = state[name]
        header[name] = dict(dtype=kinds[t.dtype], shape=list(t.shape), data_offsets=[at, at + t.nbytes])
        at += t.nbytes
    head = json.dumps(header, separators=(',', ':')).encode()
    head += b' ' * (-len(head) % 8)
    with files.replaced(path) as f:
        f.write(len(head).to_bytes(8, 'little') + head)
        for name in order:
            f.write(memoryview(state[name].contiguous().reshape(-1).view(torch.uint8).numpy()))


# ----------------------------------------------------------------------------------------------------
# answers and rewards: one forward without padding, in which a beginning that sequences share is computed once


def shared_forward(model, sequences, shared):
    """sequences: token lists, of which the first shared[i] tokens of number i are also those of number i - 1.

        flat tokens   p p p a a | b b b | ...          what embeddings, linear layers and norms see: P + 2 + 3
        attention     p p p a a | p p p b b b | ...    gathered for the attention alone
    Returns (hidden states (N, C), [rows of them that are sequence i, (len_i,) int64])."""
    device = next(model.parameters()).device
    path, paths, n = np.arange(0), [], 0  # n: flat rows so far
    for ids, k in zip(sequences, shared):
        path = np.concatenate([path[:k], np.arange(n, n + len(ids) - k)])
        paths.append(path)
        n += len(ids) - k
    slot = np.unique(np.concatenate(paths), return_index=True)[1]  # where a row is met first
    slot = np.pad(slot, (0, kernels.extra_rows(n)))  # dummy rows: the CPU's library wants few shapes
    rows, slot = flat_tensor(paths, device), flat_tensor([slot], device)
    tokens = flat_tensor(sequences, device)[slot]
    pos = flat_tensor([np.arange(len(ids)) for ids in sequences], device)[slot]
    lengths = torch.tensor([len(ids) for ids in sequences])
    cu, longest = F.pad(lengths.cumsum(0), (1, 0)).int().to(device), int(lengths.max())
    first = torch.tensor(shared)  # earlier positions are keys only: another sequence has them as queries
    runs = F.pad((first == 0).nonzero()[:, 0], (0, 1), value=len(shared))  # of sequences that share rows

    def attend(layer, q, k, v):
        if not any(shared):
            return kernels.flash_attention(q, k, v, cu, longest=longest)
        if kernels.docs_in_c(q):
            return kernels.doc_attention(q, k, v, rows, cu, first, runs, longest)
        q, k, v = (x[rows] for x in (q, k, v))
        return kernels.flash_attention(q, k, v, cu, longest=longest)[slot]
    return model.hidden(tokens, pos, attend), paths


def flat_tensor(lists, device):
    return torch.from_numpy(np.concatenate(lists).astype(np.int64)).to(device)


def _packed(model, sequences):
    """(tokens, number of the sequence that each is in), (1, N) both: for context parallelism, under which no
    token can be in two sequences."""
    device, lengths = next(model.parameters()).device, [len(ids) for ids in sequences]
    doc = np.repeat(np.arange(len(sequences)), lengths)
    return flat_tensor(sequences, device)[None], flat_tensor([doc], device)[None]


def _whole_answers(model, groups):
    """(idx, doc, where), (1, N) each: every answer behind a prompt of its own, where: an answer's token is
    next."""
    sequences, where = [], []
    for prompt, answers in groups:
        for answer in answers:
            sequences.append([*prompt, *answer])
            where.append([False] * (len(prompt) - 1) + [True] * len(answer) + [False])
    idx, doc = _packed(model, sequences)
    return idx, doc, flat_tensor(where, idx.device)[None].bool()


def _predicting(model, groups):
    """Hidden states (n, C) that predict each token of each answer. The state at t predicts token t + 1, so an
    answer's last token is not in the input at all."""
    sequences, shared, starts = [], [], []
    for prompt, answers in groups:
        for j, answer in enumerate(answers):
            sequences.append([*prompt, *answer[:-1]])
            shared.append(len(prompt) if j else 0)
            starts.append(len(prompt) - 1)
    x, paths = shared_forward(model, sequences, shared)
    return x[flat_tensor([path[start:] for path, start in zip(paths, starts)], x.device)]


def _by_answer(found, groups):
    """Flat values of all answers' tokens, each kind -> (S, R), padded on the right with 0; last the mask of
    what is real."""
    sizes = [len(answer) for _, answers in groups for answer in answers]
    found = *found, torch.ones_like(found[0], dtype=torch.bool)
    return [nn.utils.rnn.pad_sequence(flat.split(sizes), batch_first=True) for flat in found]


def answer_logprobs(model, groups, temperature=1.0):
    """Log-probs and entropies of answers' tokens. groups: [(prompt ids, [answer ids, ...])]. Returns (logp,
    entropy, mask), all (S, R): S answers in order, padded on the right with 0."""
    if model.cp > 1:
        idx, doc, where = _whole_answers(model, groups)
        where = where[:, :-1]
        found = model.logprobs(idx, temperature, doc=doc, where=where, entropy=True)
        return _by_answer([y[where] for y in found], groups)
    x = _predicting(model, groups)
    targets = flat_tensor([answer for _, answers in groups for answer in answers], x.device)
    return _by_answer(model.token_logprobs(x, targets, temperature), groups)


def answer_values(model, groups):
    """Values (S, R) of a scalar head where it predicts each token of each answer, and the mask."""
    if model.cp > 1:
        idx, doc, where = _whole_answers(model, groups)
        return _by_answer([model(idx, doc=doc)[0][where]], groups)
    return _by_answer([model.values(_predicting(model, groups))], groups)


def rewards_of(model, sequences):
    """Rewards (S,) of token lists by a scalar head, read at the last token of each. What a sequence and the
    one before it begin with is computed once: a pair's prompt, say."""
    if model.cp > 1:
        idx, doc = _packed(model, sequences)
        values, _ = model(idx, doc=doc)
        return values[0, np.cumsum([len(ids) for ids in sequences]) - 1]
    shared = [0]
    for before, ids in zip(sequences, sequences[1:]):
        common = os.path.commonprefix([list(before), list(ids)])
        shared.append(min(len(common), len(ids) - 1))  # its last token is always its own
    x, paths = shared_forward(model, sequences, shared)
    return model.values(x[flat_tensor([path[-1:] for path in paths], x.device)])


@torch.no_grad()
def all_rewards(model, sequences, micro_tokens=8192):
    """rewards_of any number of token lists, a few at a time, without gradient: float32 on the CPU, in their
    order."""
    out, lengths = torch.empty(len(sequences)), [len(ids) for ids in sequences]
    for rows in pack(lengths, max([micro_tokens, *lengths])):
        out[rows] = rewards_of(model, [sequences[i] for i in rows]).float().cpu()
    return out
