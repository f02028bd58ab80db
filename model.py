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
import functools
import json
import math
import mmap
import os
import re
from dataclasses import dataclass, fields

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
    segment; cu_seqlens (S+1,) int32 borders of the segments; dense: the batch is a whole rectangle. Worked:
    mask [[0,1,1],[1,1,0]] -> keep [1,2,3,4], pos [0,1,0,1], cu_seqlens [0,2,4]. """

    def __init__(self, shape, device, mask=None, doc=None):
        self.B, self.T = shape
        self.device = device
        self.keep = self.rows = self.slot = None
        self.extra = 0  # dummy rows that round N up: oneDNN compiles a product anew for every shape
        self.dense = mask is None and doc is None
        if self.dense:
            self.pos = torch.arange(self.T, device=device).repeat(self.B)
            self.cu_seqlens = torch.arange(self.B + 1, dtype=torch.int32, device=device) * self.T
            return
        row = torch.arange(self.B, device=device).repeat_interleave(self.T)
        if mask is not None:
            self.keep = mask.reshape(-1).nonzero()[:, 0]
            row = row[self.keep]
        new = torch.ones_like(row, dtype=torch.bool)  # does a segment begin here?
        new[1:] = row[1:] != row[:-1]
        if doc is not None:
            number = self.pick(doc)
            new[1:] |= number[1:] != number[:-1]
        starts, n = new.nonzero()[:, 0], len(row)
        self.pos = torch.arange(n, device=device) - starts[new.long().cumsum(0) - 1]
        self.cu_seqlens = torch.cat([starts, starts.new_tensor([n])]).int()
        self.extra = kernels.extra_rows(n) if device.type == 'cpu' else 0

    def through(self, rows, slot):
        """The segments become paths through a flat array in which they share rows, such as a prompt with
        several answers: position i of all segments is flat row rows[i] (n,); flat row j is computed at
        position slot[j], the same in all segments that go through it."""
        self.rows, self.slot = rows, slot
        return self

    @functools.cached_property
    def paths(self):
        """(rows, cu, first, tasks, longest) of kernels.doc_attention, after `through`."""
        cu, rows = self.cu_seqlens.long(), self.rows
        asked = self.slot[rows] == torch.arange(len(rows))
        asked_before = F.pad(asked.long().cumsum(0), (1, 0))
        first = cu.diff() - asked_before[cu].diff()  # the shared part is in front
        tasks = F.pad((first == 0).nonzero()[:, 0], (0, 1), value=len(cu) - 1)
        return rows, cu, first, tasks, self.longest
    @functools.cached_property
    def longest(self):
        """Tokens of the longest segment; a GPU is waited for once a batch."""
        return int(self.cu_seqlens.diff().max()) if len(self.cu_seqlens) > 1 else 0

    def pick(self, x):
        """(B, T) -> (N,)"""
        x = x.reshape(-1)
        return x if self.keep is None else x[self.keep]

    def put(self, x):
        """(N, ...) -> (B, T, ...), zeros where nothing is."""
        if self.keep is not None:
            x = x.new_zeros(self.B * self.T, *x.shape[1:]).index_copy(0, self.keep, x)
        return x.view(self.B, self.T, *x.shape[1:])

    def attend(self, dropout=0.0):
        """The attention of training: causal, inside each segment. q (N, nh, hs), k and v (N, nkv, hs) -> (N,
        nh, hs)."""
        def fused(q, k, v):  # (S, T, heads, hs) each
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            grouped = q.shape[1] != k.shape[1]
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=grouped)
            return y.transpose(1, 2)

        def attend(layer, q, k, v):
            in_c = not dropout and kernels.docs_in_c(q)
            if self.dense and not in_c:
                return fused(*(x.view(self.B, self.T, *x.shape[1:]) for x in (q, k, v))).flatten(0, 1)
            if dropout:  # our kernels have none: one rectangle, in which causality hides the padding
                step = torch.arange(self.longest, device=self.device)
                real = step < self.cu_seqlens.diff()[:, None]
                grid = torch.where(real, self.cu_seqlens[:-1, None] + step, 0)  # (S, longest) flat rows
                y = fused(q[grid], k[grid], v[grid])[real]
                return torch.zeros_like(q).index_copy(0, grid[real], y)
            if self.rows is None:
                return kernels.flash_attention(q, k, v, self.cu_seqlens, longest=self.longest)
            if in_c:
                return kernels.doc_attention(q, k, v, *self.paths)
            q, k, v = (x[self.rows] for x in (q, k, v))
            return kernels.flash_attention(q, k, v, self.cu_seqlens, longest=self.longest)[self.slot]
        return attend


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
        self.q_norm = Norm(c.head_size, 'rms', c.norm_eps, False) if c.qk_norm else None
        self.k_norm = Norm(c.head_size, 'rms', c.norm_eps, False) if c.qk_norm else None

    def forward(self, x, layer, rope, attend):
        n = x.shape[0]
        fused = hasattr(self, 'c_attn')
        if fused:
            q, k, v = self.c_attn(x).view(n, 3, self.n_head, self.head_size).unbind(1)
        else:
            q = self.q_proj(x).view(n, self.n_head, self.head_size)
            k = self.k_proj(x).view(n, self.n_kv_head, self.head_size)
            v = self.v_proj(x).view(n, self.n_kv_head, self.head_size)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (t[0] for t in kernels.rope(q[None], k[None], *rope))
        y = attend(layer, q.to(v.dtype), k.to(v.dtype), v).reshape(n, -1)
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
        else:
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
        return Layout(idx.shape, idx.device, mask, doc)

    def attention_dropout(self):
        return self.config.dropout if self.training else 0.0

    def encode(self, idx, mask=None, doc=None):
        """idx (B, T) -> (x (N, C) of the real tokens, Layout). What heads and losses share."""
        at = self.layout(idx, mask, doc)
        ids, pos = (F.pad(t, (0, at.extra)) for t in (at.pick(idx), at.pos))
        return self.hidden(ids, pos, at.attend(self.attention_dropout()))[:len(at.pos)], at

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
        config = config_from_hf(raw, where)
        unknown = overrides.keys() - vars(config).keys()
        if unknown:
            raise ValueError(f'GPTConfig has no {", ".join(unknown)}; it has: {", ".join(vars(config))}')
        vars(config).update(overrides)
        stored = load_safetensors_dir(folder)
        if config.n_layer > len(stored):  # before as many layers are made
            raise ValueError(f'{where}: {config.n_layer} layers, but the weights are {len(stored)} tensors')
        if head is None:
            head = 'scalar' if 'SequenceClassification' in str(raw.get('architectures')) else 'lm'
        with torch.device('meta'):
            model = cls(config, head)
        return fill(model, from_hf_names(stored, model), folder, dtype)

    def save_pretrained(self, folder, shard_bytes=5 << 30):
        """config.json + model.safetensors (several shards and an index beyond shard_bytes) that transformers
        opens."""
        os.makedirs(folder, exist_ok=True)
        state = to_hf_names(self)
        shards, used = [{}], 0
        for name, value in state.items():
            if shards[-1] and used + value.nbytes > shard_bytes:
                shards.append({})
                used = 0
            shards[-1][name] = value
            used += value.nbytes
        places = {}
        for i, shard in enumerate(shards, 1):
            file = f'model-{i:05d}-of-{len(shards):05d}.safetensors' if len(shards) > 1 else files.SINGLE
            save_safetensors(os.path.join(folder, file), shard)
            places |= dict.fromkeys(shard, file)
        if len(shards) > 1:
            size = sum(value.nbytes for value in state.values())
            index = dict(metadata=dict(total_size=size), weight_map=places)
            write_json(os.path.join(folder, files.INDEX), index)
        dtype = next(iter(state.values())).dtype
        write_json(os.path.join(folder, 'config.json'), config_to_hf(self.config, self.head, dtype))


# ----------------------------------------------------------------------------------------------------
# names and weights: HF's and ours

_BUFFERS = re.compile(r'\.attn\.(masked_)?bias$|\.rotary_emb\.inv_freq$')  # of older files; no weights


LLAMA_NAMES = {  # our modules (regular expressions): HF's
    '^h': 'layers', '^wte': 'embed_tokens', '^ln_f': 'norm', r'\.attn': '.self_attn',
    r'\.ln_1': '.input_layernorm', r'\.ln_2': '.post_attention_layernorm'}


def hf_name(name, arch):
    """HF's name of ours. 'h.0.attn.q_proj.weight' of a Llama -> 'model.layers.0.self_attn.q_proj.weight'."""
    if name in ('lm_head.weight', 'lm_head', 'score.weight', 'score'):
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
        name = names.get(key) or names.get(prefix + key)
        if name is None and _BUFFERS.search(key):
            continue
        state[name or key] = value.t() if name and is_conv1d(name, arch) and value.dim() == 2 else value
    return state


def to_hf_names(model):
    """The counterpart: {HF's name: tensor} on the CPU, a tied head left out."""
    c, state = model.config, {}
    for name, value in model.state_dict().items():
        if not (name == 'lm_head.weight' and c.tie):
            value = value.t() if is_conv1d(name, c.arch) else value
            state[hf_name(name, c.arch)] = value.detach().cpu().contiguous()
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
        if not c.tie and model.head == 'lm':
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.wte.weight))
    if c.tie and model.head == 'lm' and 'wte.weight' in state:
        state['lm_head.weight'] = state['wte.weight']
    model.fresh_head = model.head == 'scalar' and 'score.weight' not in state
    if model.fresh_head or model.head == 'lm':  # the head of the other kind was not asked for
        state.pop('score.weight' if model.head == 'lm' else 'lm_head.weight', None)
    fresh = {'score.weight'} if model.fresh_head else set()
    missing = [name for name in want if name not in state.keys() | fresh]
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
    model.to_empty(device='cpu').load_state_dict(state, strict=False)  # but for a fresh head it is complete
    if c.pos == 'rope':
        model.inv_freq = rope_frequencies(c)
    if model.fresh_head:
        model.init_score()
    if model.head == 'lm' and c.tie:
        model.lm_head.weight = model.wte.weight
    return model.to(dtype)


# ----------------------------------------------------------------------------------------------------
# config.json

_ACT = dict(gelu_new='gelu_tanh', gelu_pytorch_tanh='gelu_tanh', gelu='gelu', relu='relu', silu='silu',
            swish='silu')
_SHAPE = dict(n_embd='hidden_size', n_layer='num_hidden_layers', n_head='num_attention_heads',
              block_size='max_position_embeddings', n_inner='intermediate_size', vocab_size='vocab_size')
KEYS = {  # GPTConfig's field: config.json's names of it, the one that we write first
    'gpt2': dict(n_embd=('n_embd', 'hidden_size'), n_layer=('n_layer', 'num_hidden_layers'),
                 n_head=('n_head', 'num_attention_heads'), n_inner=('n_inner',), vocab_size=('vocab_size',),
                 block_size=('n_positions', 'max_position_embeddings'), norm_eps=('layer_norm_epsilon',),
                 tie=('tie_word_embeddings',)),
    'qwen2': dict({field: (key,) for field, key in _SHAPE.items()}, n_kv_head=('num_key_value_heads',),
                  head_size=('head_dim',), norm_eps=('rms_norm_eps',), tie=('tie_word_embeddings',)),
}
KEYS['qwen3'] = dict(KEYS['qwen2'], attn_out_bias=('attention_bias',))
KEYS['llama'] = dict(KEYS['qwen3'], bias=('mlp_bias',))
DEFAULTS = dict(n_kv_head=0, head_size=0, attn_out_bias=False, bias=False, tie=False, norm_eps=1e-6,
                block_size=2048)
USUAL = {  # what a setting is that a file leaves out; 0: GPTConfig works it out
    'gpt2': dict(n_inner=0, norm_eps=1e-5, block_size=1024, tie=True),
    'llama': DEFAULTS, 'qwen2': DEFAULTS, 'qwen3': dict(DEFAULTS, head_size=128),
}
TOKENS = 'bos_token_id', 'eos_token_id', 'pad_token_id'
MUST_BE = {  # settings that this model has in one way only; a file may leave them out
    'gpt2': dict(scale_attn_by_inverse_layer_idx=False, scale_attn_weights=True, add_cross_attention=False),
    'llama': dict(use_sliding_window=False, sliding_window=None),
    'qwen2': dict(use_sliding_window=False),
    'qwen3': dict(use_sliding_window=False),
}


def setting(raw, where, keys, kind, default=...):
    """What config.json (a dict) says under one of `keys`, the names of one setting, as a positive int or
    float, a bool or a str. ValueError names the key that is missing (no default), that is no such thing, or
    that contradicts another."""
    said = {key: raw[key] for key in keys if raw.get(key) is not None}
    if not said and default is ...:
        raise ValueError(f'{where}: no {keys[0]}')
    if not said:
        return default
    for key, value in said.items():
        first, found = next(iter(said.items()))
        if value != found:
            raise ValueError(f'{where}: {first} = {found!r:.40} contradicts {key} = {value!r:.40}')
        fine = type(value) in ((int, float) if kind is float else (kind,))
        if kind in (int, float):
            fine = fine and 0 < value < (2 ** 31 if kind is int else math.inf)
        if not fine:
            positive = 'a positive ' if kind in (int, float) else 'a '
            raise ValueError(f'{where}: {key} = {value!r:.40}, expected {positive}{kind.__name__}')
    return found


def config_from_hf(raw, where='config.json'):
    """HF config.json (dict) -> GPTConfig. A setting that we would silently ignore is a ValueError that names
    it."""
    arch = raw.get('model_type')
    if not isinstance(arch, str) or arch not in ARCHS:
        raise ValueError(f'{where}: model_type {arch!r:.40}; known: {", ".join(ARCHS)}')
    if raw.get('quantization_config'):
        raise ValueError(f'{where}: quantization_config: quantised weights are not read, take the originals')
    for key, only in MUST_BE[arch].items():
        if raw.get(key) not in (None, only):
            raise ValueError(f'{where}: {key} = {raw[key]!r:.40} cannot be honoured by this model')
    layers = raw.get('layer_types') or []
    if not isinstance(layers, list) or any(kind != 'full_attention' for kind in layers):
        raise ValueError(f'{where}: layer_types {str(layers):.80} cannot be honoured, only full_attention')
    c, kinds = dict(ARCHS[arch], arch=arch), {f.name: f.type for f in fields(GPTConfig)}
    for field, keys in KEYS[arch].items():
        c[field] = setting(raw, where, keys, kinds[field], USUAL[arch].get(field, ...))
    if c.get('attn_out_bias'):
        c['qkv_bias'] = True
    key, act, known = 'hidden_act', 'silu', ['silu', 'swish']
    if arch == 'gpt2':
        key, act, known = 'activation_function', 'gelu_new', list(_ACT)
    else:
        c['rope_theta'], c['rope_scaling'] = _rope(raw, where)
    act = setting(raw, where, (key,), str, act)
    if act not in known:
        raise ValueError(f'{where}: {key} {act!r:.40} cannot be honoured; known: {", ".join(known)}')
    c['act'] = _ACT[act]
    c['reward_bias'] = bias = raw.get('reward_bias', 0.0)
    if type(bias) not in (int, float) or not math.isfinite(bias):
        raise ValueError(f'{where}: reward_bias = {bias!r:.40}, expected a finite number')
    for key in TOKENS:
        c[key] = _token_ids(raw.get(key), f'{where}: {key}')
    return GPTConfig(**c)


def _rope(raw, where):
    """(theta, None or its scaling). transformers 5 writes all of it into rope_parameters; before, rope_theta
    stood beside rope_scaling, whose rope_type was `type` once, and some settings stand beside both."""
    flat = dict(raw)
    for block in ('rope_parameters', 'rope_scaling'):
        if not isinstance(raw.get(block) or {}, dict):
            raise ValueError(f'{where}: {block} = {raw[block]!r:.40}, expected an object')
        flat |= {f'{block}.{key}': value for key, value in (raw.get(block) or {}).items()}

    def read(kind, *names, default=...):
        blocks = [f'{block}.{name}' for block in ('rope_parameters', 'rope_scaling') for name in names]
        beside = [name for name in names if name not in ('rope_type', 'type', 'factor')]
        return setting(flat, where, blocks + beside, kind, default)
    theta = read(float, 'rope_theta', default=10000.0)
    kind = read(str, 'rope_type', 'type', default='default')
    if read(float, 'partial_rotary_factor', default=1.0) != 1.0:
        raise ValueError(f'{where}: partial_rotary_factor cannot be honoured, only 1.0')
    if kind == 'default':
        return float(theta), None
    if kind not in ('linear', 'llama3'):
        raise ValueError(f'{where}: rope_type {kind!r:.40} cannot be honoured, only default, linear, llama3')
    scaling = dict(rope_type=kind, factor=read(float, 'factor'))
    if kind == 'llama3':
        for key in ('low_freq_factor', 'high_freq_factor'):
            scaling[key] = read(float, key)
        scaling['original_max_position_embeddings'] = read(int, 'original_max_position_embeddings')
        if scaling['low_freq_factor'] >= scaling['high_freq_factor']:
            raise ValueError(f'{where}: low_freq_factor is not below high_freq_factor')
    return float(theta), scaling


def _token_ids(value, what):
    """None, an id, or several (of which none is left: None)."""
    ids = value if isinstance(value, list) else [value]
    if value is not None and any(type(i) is not int for i in ids):
        raise ValueError(f'{what} = {value!r:.40}, expected a token id or a list of them')
    return value if value != [] else None


def config_to_hf(c, head, dtype):
    cls = dict(gpt2='GPT2', llama='Llama', qwen2='Qwen2', qwen3='Qwen3')[c.arch]
    kind = 'LMHeadModel' if c.arch == 'gpt2' else 'ForCausalLM'
    if head == 'scalar':
        kind = 'ForSequenceClassification'
    raw = dict(architectures=[cls + kind], model_type=c.arch, torch_dtype=str(dtype).removeprefix('torch.'))
    raw |= {key: getattr(c, key) for key in TOKENS}
    raw |= {keys[0]: getattr(c, field) for field, keys in KEYS[c.arch].items()}
    if c.arch == 'gpt2':
        raw['activation_function'] = 'gelu_new' if c.act == 'gelu_tanh' else c.act
        raw |= dict.fromkeys(('resid_pdrop', 'embd_pdrop', 'attn_pdrop'), c.dropout)
    else:
        raw |= dict(hidden_act='silu', rope_theta=c.rope_theta, rope_scaling=c.rope_scaling,
                    use_sliding_window=False)
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


def _entry(name, t, room):
    """(dtype, shape, (start, end)) of one line of a safetensors header; room: bytes of all tensors."""
    try:
        dtype, shape, (start, end) = t['dtype'], t['shape'], t['data_offsets']
        whole = all(type(x) is int and 0 <= x < 2 ** 48 for x in [*shape, start, end])
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f'{name:.80} is {str(t):.80}')
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f'{name:.80} has dtype {dtype!r:.20}; known: {", ".join(_DTYPES)}')
    dtype = _DTYPES[dtype]
    if end - start != math.prod(shape) * dtype.itemsize or end > room:
        raise ValueError(f'{name:.80}: {t["dtype"]} {shape} does not fit bytes {start}..{end} of {room} '
                         f'(truncated?)')
    return dtype, shape, (start, end)


def load_safetensors(path):
    """{name: tensor} over a private mmap (the tensors are views: copy before writing). ValueError, one line,
    for anything that is not exactly a safetensors file: lengths, dtypes, overlaps, holes."""
    size = os.path.getsize(path)
    with open(path, 'rb') as f:
        start = f.read(8)
        n = int.from_bytes(start, 'little')
        if start and LFS.startswith(start):
            raise ValueError(f'{path}: a git-lfs pointer, not the weights: `git lfs pull` fetches them')
        if size < 8 or n > min(size - 8, 100 << 20):
            raise ValueError(f'{path}: not a safetensors file: header of {n} bytes in a file of {size} '
                             f'(truncated?)')
        header = parse_json(f.read(n), f'{path}: header of safetensors')
        whole = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants a writable buffer
    header.pop('__metadata__', None)
    spans, out = [], {}
    for name, t in header.items():
        try:
            dtype, shape, span = _entry(name, t, size - 8 - n)
        except ValueError as e:
            raise ValueError(f'{path}: not a safetensors file that we can read: {e}') from None
        spans.append(span)
        if span[0] < span[1]:
            flat = torch.frombuffer(whole, dtype=dtype, count=math.prod(shape), offset=8 + n + span[0])
        else:
            flat = torch.empty(0, dtype=dtype)
        out[name] = flat.view(shape) if math.prod(x for x in shape if x) < 2 ** 48 else flat
    reached = 0
    for a, b in sorted(spans):
        if a != reached:
            raise ValueError(f'{path}: not a safetensors file: tensors overlap or leave holes')
        reached = b
    if spans and reached != size - 8 - n:
        raise ValueError(f'{path}: not a safetensors file: {size - 8 - n - reached} bytes are left over')
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
    paths, n = [], 0  # flat rows so far
    for ids, k in zip(sequences, shared):
        beginning = paths[-1][:k] if k else []
        paths.append(np.concatenate([beginning, np.arange(n, n + len(ids) - k)]).astype(np.int64))
        n += len(ids) - k
    slot = np.unique(np.concatenate(paths), return_index=True)[1]  # where in the attention a row is met first
    slot = np.pad(slot, (0, kernels.extra_rows(n)))  # dummy rows: the CPU's library wants few shapes
    slot = torch.from_numpy(slot).to(device)
    tokens = flat_tensor(sequences, device)
    layout = Layout((1, len(tokens)), device, doc=_documents(sequences, device))
    if any(shared):
        layout.through(flat_tensor(paths, device), slot)
    return model.hidden(tokens[slot], layout.pos[slot], layout.attend()), paths


def flat_tensor(lists, device):
    return torch.from_numpy(np.concatenate(lists).astype(np.int64)).to(device)


def _documents(sequences, device):
    """(1, N): the number of the sequence that each token is in, when they lie one behind the other."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    return torch.arange(len(lengths)).repeat_interleave(lengths)[None].to(device)


def _cut_along_context(model):
    """Under context parallelism no token can be in two sequences."""
    return hasattr(model, 'mesh') and model.mesh.cp.size > 1


def _whole_answers(model, groups):
    """(idx, doc, where), (1, N) each: every answer behind a prompt of its own, where: an answer's token is
    next."""
    device = next(model.parameters()).device
    both, where = [], []
    for prompt, answers in groups:
        for answer in answers:
            both.append([*prompt, *answer])
            where.append([False] * (len(prompt) - 1) + [True] * len(answer) + [False])
    where = flat_tensor(where, device)[None].bool()
    return flat_tensor(both, device)[None], _documents(both, device), where


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
    """Flat values of all answers' tokens -> (S, R), padded on the right with 0, and the mask of what is
    real."""
    sizes = [len(answer) for _, answers in groups for answer in answers]
    rows = nn.utils.rnn.pad_sequence(found.split(sizes), batch_first=True)
    step = torch.arange(rows.shape[1], device=found.device)
    return rows, step < step.new_tensor(sizes)[:, None]


def answer_logprobs(model, groups, temperature=1.0):
    """Log-probs and entropies of answers' tokens. groups: [(prompt ids, [answer ids, ...])]. Returns (logp,
    entropy, mask), all (S, R): S answers in order, padded on the right with 0."""
    if _cut_along_context(model):
        idx, doc, where = _whole_answers(model, groups)
        where = where[:, :-1]
        found = model.logprobs(idx, temperature, doc=doc, where=where, entropy=True)
        logp, entropy = (y[where] for y in found)
    else:
        x = _predicting(model, groups)
        targets = flat_tensor([a for _, answers in groups for a in answers], x.device)
        logp, entropy = model.token_logprobs(x, targets, temperature)
    logp, mask = _by_answer(logp, groups)
    return logp, _by_answer(entropy, groups)[0], mask


def answer_values(model, groups):
    """Values (S, R) of a scalar head where it predicts each token of each answer, and the mask."""
    if _cut_along_context(model):
        idx, doc, where = _whole_answers(model, groups)
        return _by_answer(model(idx, doc=doc)[0][where], groups)
    return _by_answer(model.values(_predicting(model, groups)), groups)


def rewards_of(model, sequences):
    """Rewards (S,) of token lists by a scalar head, read at the last token of each. What a sequence and the
    one before it begin with is computed once: a pair's prompt, say."""
    if _cut_along_context(model):
        device = next(model.parameters()).device
        values, _ = model(flat_tensor(sequences, device)[None], doc=_documents(sequences, device))
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
