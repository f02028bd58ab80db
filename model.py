"""One Transformer for GPT-2, Llama, Qwen2 and Qwen3: LM or scalar head, Hugging Face weights in and out.

The body works on FLAT tokens: whatever comes in (dense, left- or right-padded, packed) is first reduced to its N real
tokens with a position each (`Layout`), so that no linear layer ever multiplies padding; only attention sees the shape.
Attention itself is a function passed in, `attend(layer, q, k, v)`: training, the dense KV cache and the paged engine
of infer.py run the very same blocks.

    model = GPT.from_pretrained('gpt2')                  # or a directory, or GPT(GPTConfig(...))
    logits, _ = model(idx)                               # (B, T, V)
    logp = model.logprobs(idx, temperature=0.7)          # (B, T-1), never holds (B, T, V)

Weights are HF's safetensors (8 bytes + JSON + raw tensors, parsed here); nothing in a checkpoint is ever executed.
References: GPT-2 (Radford et al. 2019), Llama (2302.13971), RoPE (2104.09864), GQA (2305.13245), Qwen2 (2407.10671),
Qwen3 (2505.09388); structure and initialisation as in nanoGPT.
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
    """Defaults are GPT-2 small. n_kv_head, head_size, n_inner = 0 mean n_head, n_embd // n_head and 4 * n_embd."""
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

    @classmethod
    def of(cls, arch, **shape):
        """What the architecture fixes (norm, positions, activation ...) plus a shape: GPTConfig.of('qwen3', n_layer=4, ...)."""
        if arch not in ARCHS:
            raise ValueError(f'unknown arch {arch!r}; known: {", ".join(ARCHS)}')
        return cls(**{**ARCHS[arch], 'arch': arch, **shape})


ARCHS = {  # what an architecture fixes; a config.json says the rest
    'gpt2': dict(norm='layer', pos='learned', act='gelu_tanh', gated=False, qkv_bias=True, attn_out_bias=True, bias=True),
    'llama': dict(norm='rms', pos='rope', act='silu', gated=True, qkv_bias=False, attn_out_bias=False, bias=False),
    'qwen2': dict(norm='rms', pos='rope', act='silu', gated=True, qkv_bias=True, attn_out_bias=False, bias=False),
    'qwen3': dict(norm='rms', pos='rope', act='silu', gated=True, qkv_bias=False, attn_out_bias=False, bias=False, qk_norm=True),
}
# ---------------------------------------------------------------------------------------------------------------------
# the layout of a batch: which tokens are real, where they stand, which ones may see each other


class Layout:
    """The N real tokens of a (B, T) batch and the segments (sequences or packed documents) that they form.

    keep (N,) int64: flat indices of the real tokens, None when all are real; pos (N,) position inside the segment;
    cu_seqlens (S+1,) int32 borders of the segments, None when the batch is a dense rectangle.
    Worked: mask [[0,1,1],[1,1,0]] -> keep [1,2,3,4], pos [0,1,0,1], cu_seqlens [0,2,4].
    """

    def __init__(self, shape, device, mask=None, doc=None):
        (self.B, self.T), self.device = shape, device
        self.keep = self.cu_seqlens = self.rows = self.slot = None
        self.extra = 0  # dummy rows that round N up: oneDNN compiles a matrix product anew for every shape that it meets
        if mask is None and doc is None:
            self.pos = torch.arange(self.T, device=device).repeat(self.B)
            return
        row = torch.arange(self.B, device=device).repeat_interleave(self.T)
        if mask is not None:
            self.keep = mask.reshape(-1).nonzero()[:, 0]
            row = row[self.keep]
        new = torch.ones_like(row, dtype=torch.bool)
        new[1:] = row[1:] != row[:-1]
        if doc is not None:
            d = self.pick(doc)
            new[1:] |= d[1:] != d[:-1]
        starts = new.nonzero()[:, 0]
        n = len(row)
        self.pos = torch.arange(n, device=device) - starts[new.long().cumsum(0) - 1]
        self.cu_seqlens = torch.cat([starts, starts.new_tensor([n])]).int()
        self.extra = kernels.extra_rows(n) if device.type == 'cpu' else 0

    def through(self, rows, slot):
        """The segments become paths through a flat array in which they share rows, such as a prompt with several answers: position i of all
        segments is flat row rows[i] (n,); flat row j is computed at position slot[j], the same in all segments that go through it."""
        self.rows, self.slot = rows, slot
        return self

    @functools.cached_property
    def paths(self):
        """(rows, cu, first, tasks, longest) of kernels.doc_attention."""
        cu = self.cu_seqlens.long() if self.cu_seqlens is not None else torch.arange(self.B + 1) * self.T
        rows = torch.arange(int(cu[-1])) if self.rows is None else self.rows
        asked = torch.ones_like(rows, dtype=torch.bool) if self.slot is None else self.slot[rows] == torch.arange(len(rows))
        asked_before = F.pad(asked.long().cumsum(0), (1, 0))
        first = cu.diff() - asked_before[cu].diff()  # the shared part is in front
        return rows, cu, first, F.pad((first == 0).nonzero()[:, 0], (0, 1), value=len(cu) - 1), self.longest

    @functools.cached_property
    def longest(self):
        """Tokens of the longest segment; a GPU is waited for once a batch."""
        if self.cu_seqlens is None:
            return self.T if self.B else 0
        return int(self.cu_seqlens.diff().max()) if len(self.cu_seqlens) > 1 else 0

    @functools.cached_property
    def buckets(self):
        """([(flat rows, segments, width)], slot): right-padded rectangles, where causality alone hides the padding, for torch's own attention on
        CPU, and with dropout. Segments of like length share a rectangle (between half and the whole of its width), so little is wasted; row j's result stands at slot[j]."""
        cu = self.cu_seqlens.long().cpu()
        lens, starts, n, buckets, base = cu.diff(), cu[:-1], int(cu[-1]), [], 0
        slot = torch.empty(n, dtype=torch.long)
        width = int(lens.max()) if n else 0
        while width:
            mine = ((lens <= width) & (lens > width // 2)).nonzero()[:, 0]
            if len(mine):
                w = int(lens[mine].max())
                grid = starts[mine, None] + torch.arange(w)
                real = torch.arange(w) < lens[mine, None]
                slot[grid[real]] = base + real.reshape(-1).nonzero()[:, 0]
                grid = grid.clamp_(max=n - 1).reshape(-1).to(self.device)
                buckets.append((grid if self.rows is None else self.rows[grid], len(mine), w))
                base += real.numel()
            width //= 2
        slot = slot.to(self.device)
        return buckets, F.pad(slot, (0, self.extra)) if self.slot is None else slot[self.slot]  # a dummy row reads some real row; nobody reads the dummy

    def pick(self, x):
        """(B, T, ...) -> (N, ...)"""
        x = x.reshape(self.B * self.T, *x.shape[2:])
        return x if self.keep is None else x[self.keep]

    def put(self, x):
        """(N, ...) -> (B, T, ...), zeros where nothing is."""
        if self.keep is not None:
            x = x.new_zeros(self.B * self.T, *x.shape[1:]).index_copy(0, self.keep, x)
        return x.view(self.B, self.T, *x.shape[1:])

    def attend(self, dropout=0.0):
        """The attention of training: causal, inside each segment. q (N, nh, hs), k and v (N, nkv, hs) -> (N, nh, hs)."""
        def dense(layer, q, k, v, B=self.B, T=self.T):
            q, k, v = (x.view(B, T, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1])
            return y.transpose(1, 2).reshape(B * T, *y.shape[1:2], y.shape[-1])

        def bucketed(layer, q, k, v):
            rectangles, slot = self.buckets
            out = [dense(layer, q.index_select(0, g), k.index_select(0, g), v.index_select(0, g), s, w) for g, s, w in rectangles]
            return (out[0] if len(out) == 1 else torch.cat(out)).index_select(0, slot)

        def packed(layer, q, k, v):
            if dropout:  # the kernel has none
                return bucketed(layer, q, k, v)
            if self.rows is None:
                return kernels.flash_attention(q, k, v, cu_seqlens=self.cu_seqlens, longest=self.longest)
            return kernels.flash_attention(q[self.rows], k[self.rows], v[self.rows], cu_seqlens=self.cu_seqlens, longest=self.longest)[self.slot]

        def on_cpu(layer, q, k, v):
            if not dropout and kernels.docs_in_c(q):
                return kernels.doc_attention(q, k, v, *self.paths)
            return (dense if self.cu_seqlens is None else bucketed)(layer, q, k, v)

        if self.device.type == 'cpu':
            return on_cpu
        return dense if self.cu_seqlens is None else packed


class KVCache:
    """Dense cache for plain decoding, one rectangle per layer: k, v (B, max_len, nkv, hs), `n` tokens filled in each row.
    (The engine of infer.py has the paged one.)"""

    def __init__(self, config, B, max_len, device, dtype):
        shape = (config.n_layer, B, max_len, config.n_kv_head, config.head_size)
        self.k, self.v, self.n = torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype), 0

    def attend(self, B, T):
        n = self.n
        causal = torch.ones(T, n + T, dtype=torch.bool, device=self.k.device).tril(n)

        def attend(layer, q, k, v):
            self.k[layer, :, n:n + T], self.v[layer, :, n:n + T] = k.view(B, T, *k.shape[1:]), v.view(B, T, *v.shape[1:])
            q, k, v = (x.transpose(1, 2) for x in (q.view(B, T, *q.shape[1:]), self.k[layer, :, :n + T], self.v[layer, :, :n + T]))
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=causal, enable_gqa=q.shape[1] != k.shape[1])
            return y.transpose(1, 2).reshape(B * T, y.shape[1], y.shape[-1])
        return attend


# ---------------------------------------------------------------------------------------------------------------------
# the network


class Norm(nn.Module):
    """LayerNorm or RMSNorm; with `residual` it adds first and returns both, one pass over memory instead of two."""

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
        if c.arch == 'gpt2':
            self.c_attn = Linear(c.n_embd, 3 * c.n_head * c.head_size, bias=c.qkv_bias)
            self.c_proj = Linear(c.n_head * c.head_size, c.n_embd, bias=c.attn_out_bias)
        else:
            self.q_proj = Linear(c.n_embd, c.n_head * c.head_size, bias=c.qkv_bias)
            self.k_proj = Linear(c.n_embd, c.n_kv_head * c.head_size, bias=c.qkv_bias)
            self.v_proj = Linear(c.n_embd, c.n_kv_head * c.head_size, bias=c.qkv_bias)
            self.o_proj = Linear(c.n_head * c.head_size, c.n_embd, bias=c.attn_out_bias)
        self.q_norm = Norm(c.head_size, 'rms', c.norm_eps, False) if c.qk_norm else None
        self.k_norm = Norm(c.head_size, 'rms', c.norm_eps, False) if c.qk_norm else None

    def forward(self, x, layer, rope, attend):
        n = x.shape[0]
        if hasattr(self, 'c_attn'):
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
        return (self.c_proj if hasattr(self, 'c_proj') else self.o_proj)(y)


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
        h = self.c_fc(x)
        return self.c_proj(kernels.gelu(h) if self.act == 'gelu_tanh' else {'gelu': F.gelu, 'relu': F.relu, 'silu': F.silu}[self.act](h))


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
    """Inverse frequencies (hs/2,) fp32, after linear or Llama-3 scaling (the long wavelengths are stretched by `factor`,
    the short ones kept, a ramp between). theta=10000, hs=4 -> [1, 0.01]."""
    inv = 1.0 / (c.rope_theta ** (torch.arange(0, c.head_size, 2, dtype=torch.float32) / c.head_size))
    s = c.rope_scaling
    if not s:
        return inv
    if s['rope_type'] == 'linear':
        return inv / s['factor']
    wave, old = 2 * math.pi / inv, s['original_max_position_embeddings']
    lo, hi = s['low_freq_factor'], s['high_freq_factor']
    ramp = ((old / wave - lo) / (hi - lo)).clamp(0, 1)  # 0: stretched, 1: kept
    return inv * (ramp + (1 - ramp) / s['factor'])


class GPT(nn.Module):
    def __init__(self, config, head='lm'):
        super().__init__()
        self.config, self.head, self.checkpointing, self.compiled = config, head, False, False
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
        self.inv_freq = rope_frequencies(config) if config.pos == 'rope' else None  # no buffer: .to(bfloat16) would round it
        self.apply(self._init_weights)
        for name, p in self.named_parameters():  # residual branches start small (GPT-2 paper)
            if name.endswith(('c_proj.weight', 'o_proj.weight', 'down_proj.weight')):
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
        if head == 'scalar':  # N(0, 1/sqrt(d+1)): rewards of about unit size [lm-human-preferences]
            nn.init.normal_(self.score.weight, std=1 / math.sqrt(config.n_embd + 1))

    @staticmethod
    def _init_weights(m):
        if isinstance(m, (nn.Linear, nn.Embedding)):
            nn.init.normal_(m.weight, std=0.02)
            if getattr(m, 'bias', None) is not None:
                nn.init.zeros_(m.bias)

    # ---- forward -----------------------------------------------------------------------------------------------

    def hidden(self, idx, pos, attend):
        """idx, pos (N,) int64 flat tokens and their positions -> (N, C) after the last norm."""
        x, delta, rope = self.wte(idx), None, None
        if self.wpe is not None:
            x = x + self.wpe(pos)
        else:
            self.inv_freq = self.inv_freq.to(pos.device)  # once: a captured graph may not copy from the CPU
            inv = self.inv_freq.to(torch.promote_types(x.dtype, torch.float32))  # float32 in half precision, float64 in float64
            angle = pos[:, None].to(inv.dtype) * inv
            rope = (angle.cos().to(x.dtype), angle.sin().to(x.dtype))
        x = F.dropout(x, self.config.dropout, self.training)
        attend = torch.compiler.disable(attend) if self.compiled else attend
        for layer, block in enumerate(self.h):
            if self.checkpointing and torch.is_grad_enabled():
                x, delta = checkpoint(block, x, delta, layer, rope, attend, use_reentrant=False)
            else:
                x, delta = block(x, delta, layer, rope, attend)
        return self.ln_f(delta, x)[0]

    def compile_blocks(self, backend='inductor'):
        """torch.compile of each block, for any number of rows; attention stays a call between graphs, since it depends on how the batch is packed."""
        for block in self.h:
            block.compile(dynamic=True, backend=backend)
        self.compiled = True

    def layout(self, idx, mask=None, doc=None):
        """The Layout of a batch that fits this model; ValueError for one that does not."""
        if doc is None and idx.shape[1] > self.config.block_size:  # packed rows may be longer, their documents not
            raise ValueError(f'sequence of {idx.shape[1]} tokens is longer than block_size {self.config.block_size}: shorten it')
        return Layout(idx.shape, idx.device, mask, doc)

    def encode(self, idx, mask=None, doc=None):
        """idx (B, T) -> (x (N, C) of the real tokens, Layout). What heads and losses share."""
        at = self.layout(idx, mask, doc)
        ids, attend = at.pick(idx), at.attend(self.config.dropout if self.training else 0.0)
        return self.hidden(F.pad(ids, (0, at.extra)), F.pad(at.pos, (0, at.extra)), attend)[:len(ids)], at

    def head_weight(self, x):
        """(x, lm_head.weight) in the dtype that the matrix product shall run in (autocast does not reach our kernels)."""
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        return x.to(dtype), self.lm_head.weight.to(dtype)

    def forward(self, idx, targets=None, mask=None, doc=None, cache=None):
        """idx (B, T) int64. Returns (logits (B, T, V), None), with targets (-1 ignored) (None, mean loss), with a scalar
        head (values (B, T), None). mask (B, T) bool, True = real token, either side padded; doc (B, T) int, packed
        documents; cache: a KVCache, idx then continues it."""
        if cache is not None:
            B, T = idx.shape
            pos = torch.arange(cache.n, cache.n + T, device=idx.device).repeat(B)
            x, at = self.hidden(idx.reshape(-1), pos, cache.attend(B, T)), Layout(idx.shape, idx.device)
            cache.n += T
        else:
            x, at = self.encode(idx, mask, doc)
        if self.head == 'scalar':
            return at.put(self.values(x)), None
        if targets is None:
            return at.put(self.lm_head(x)), None
        targets = at.pick(targets)
        counted = targets >= 0  # the head runs on counted positions only: in SFT about half of them
        if not bool(counted.all()):
            x, targets = x[counted], targets[counted]
        if not len(targets):
            return None, x.sum() * 0.0
        return None, kernels.linear_cross_entropy(*self.head_weight(x), targets)

    def logprobs(self, idx, temperature=1.0, mask=None, doc=None, where=None, entropy=False, encoded=None):
        """log p(idx[:, t+1] | idx[:, :t+1]) at `temperature`, (B, T-1) fp32; the (B, T, V) logits never exist.

        where (B, T-1) bool limits the work to the positions that count (0 elsewhere): in RL only responses need the
        head. entropy=True returns (logp, entropy), both (B, T-1). encoded: (x, Layout) of `encode` if already there.
        V=2, equal logits -> every entry is log 1/2 = -0.6931."""
        x, at = encoded or self.encode(idx, mask, doc)
        B, T = idx.shape
        real = torch.ones_like(idx[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:] & mask[:, :-1]
        if doc is not None:
            real = real & (doc[:, 1:] == doc[:, :-1])
        if where is not None:
            real = real & where
        flat = F.pad(real, (0, 1)).reshape(-1).nonzero()[:, 0]  # indices into B*T of the tokens that predict
        row = flat if at.keep is None else torch.searchsorted(at.keep, flat)
        logp, ent = kernels.linear_logprobs(*self.head_weight(x[row]), idx.reshape(-1)[flat + 1], temperature)
        out = [torch.zeros(B * T, device=idx.device, dtype=logp.dtype).index_copy(0, flat, y).view(B, T)[:, :-1] for y in (logp, ent)]
        return tuple(out) if entropy else out[0]

    def values(self, x):
        """The scalar head on hidden states x (n, C) -> (n,), float32 at least."""
        return self.score(x)[:, 0].to(torch.promote_types(x.dtype, torch.float32)) + self.config.reward_bias

    def token_logprobs(self, x, targets, temperature=1.0):
        """(log p, entropy) of targets (n,) int64 after the hidden states x (n, C), both (n,) float32: the head without its logits."""
        return kernels.linear_logprobs(*self.head_weight(x), targets, temperature)

    # ---- optimizer and cost --------------------------------------------------------------------------------------

    def num_params(self, non_embedding=True):
        n = sum(p.numel() for p in self.parameters())
        return n - (self.wpe.weight.numel() if non_embedding and self.wpe is not None else 0)

    def configure_optimizers(self, weight_decay, learning_rate, betas, eps=1e-8):
        """AdamW, matrices decayed, vectors not (nanoGPT); only what requires a gradient, so adapters work too."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
                  dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
        return torch.optim.AdamW([g for g in groups if g['params']], lr=learning_rate, betas=betas, eps=eps, fused=True)

    def flops_per_token(self, T):
        """Forward + backward, PaLM appendix B: 6 N + 12 L nh hs T."""
        c = self.config
        return 6 * self.num_params() + 12 * c.n_layer * c.n_head * c.head_size * T

    def estimate_mfu(self, tokens_per_second, T, peak):
        """Share of `peak` FLOP/s (see `peak_flops`) that training at this rate uses, 0..1."""
        return self.flops_per_token(T) * tokens_per_second / peak

    # ---- Hugging Face's format -------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name_or_dir, head=None, dtype=torch.float32, **overrides):
        """A model of the hub or a directory with config.json + *.safetensors. `overrides` are GPTConfig fields. head=None
        takes what the directory holds; an LM body under head='scalar' gets a fresh head."""
        folder = files.resolve(name_or_dir)
        with open(os.path.join(folder, 'config.json')) as f:
            raw = json.load(f)
        more = os.path.join(folder, 'generation_config.json')  # what transformers' generate goes by, where there is one
        if os.path.exists(more):
            with open(more) as f:
                raw['eos_token_id'] = json.load(f).get('eos_token_id', raw.get('eos_token_id'))
        config, found = config_from_hf(raw, folder), 'scalar' if 'SequenceClassification' in str(raw.get('architectures')) else 'lm'
        for key, value in overrides.items():
            if key not in {f.name for f in fields(GPTConfig)}:
                raise ValueError(f'unknown model override {key!r}; GPTConfig has: {", ".join(f.name for f in fields(GPTConfig))}')
            setattr(config, key, value)
        state, stored = {}, load_safetensors_dir(folder)
        names = {n: i for i, n in hf_names(config).items()}
        for key, value in stored.items():
            name = names.get(key) or names.get('transformer.' + key)  # the hub's GPT-2 lacks the prefix
            if name is not None:
                state[name] = value.t() if config.arch == 'gpt2' and is_conv1d(name) else value
        if 'lm_head.weight' in state and 'wte.weight' not in state:
            state['wte.weight'] = state['lm_head.weight']  # tied, and only the head was stored
        with torch.device('meta'):
            model = cls(config, head or found)
        return _fill(model, state, folder, dtype, fresh_head=(head == 'scalar' and found == 'lm'))

    def save_pretrained(self, folder, shard_bytes=5 << 30):
        """config.json + model.safetensors (several shards and an index beyond shard_bytes) that transformers opens."""
        os.makedirs(folder, exist_ok=True)
        names, state = hf_names(self.config, self.head), {}
        for name, value in self.state_dict().items():
            if not (name == 'lm_head.weight' and self.config.tie):
                value = value.t() if self.config.arch == 'gpt2' and is_conv1d(name) else value
                state[names[name]] = value.detach().cpu().contiguous()
        if self.config.arch == 'gpt2':  # HF's GPT-2 always has biases: zeros are the same function
            for name in [n for n in state if n.endswith('.weight') and re.search(r'ln_|attn|mlp', n) and n[:-6] + 'bias' not in state]:
                width = state[name].shape[-1]
                state[name[:-6] + 'bias'] = torch.zeros(width, dtype=state[name].dtype)
        shards, size = [{}], 0
        for name, value in state.items():
            size += value.nbytes
            if size > shard_bytes and shards[-1]:
                shards.append({})
                size = value.nbytes
            shards[-1][name] = value
        if len(shards) == 1:
            save_safetensors(os.path.join(folder, 'model.safetensors'), state)
        else:
            file = lambda i: f'model-{i + 1:05d}-of-{len(shards):05d}.safetensors'
            for i, shard in enumerate(shards):
                save_safetensors(os.path.join(folder, file(i)), shard)
            index = dict(metadata={'total_size': sum(v.nbytes for v in state.values())},
                         weight_map={n: file(i) for i, shard in enumerate(shards) for n in shard})
            write_json(os.path.join(folder, 'model.safetensors.index.json'), index)
        write_json(os.path.join(folder, 'config.json'), config_to_hf(self.config, self.head, next(iter(state.values())).dtype))


def _fill(model, state, where, dtype, fresh_head=False):
    """Puts `state` into a model built on the meta device, after checking every name and shape; one line tells what is wrong."""
    want = {k: v for k, v in model.state_dict().items() if not (k == 'lm_head.weight' and model.config.tie)}
    missing = [k for k in want if k not in state and not (fresh_head and k == 'score.weight')]
    if missing:
        raise ValueError(f'{where}: no weights for {missing[0]} (and {len(missing) - 1} more): not a {model.config.arch} model of this shape?')
    for k, v in want.items():
        if k in state and state[k].shape != v.shape:
            raise ValueError(f'{where}: {k} has shape {tuple(state[k].shape)}, config.json asks for {tuple(v.shape)}')
    model.to_empty(device='cpu')
    with torch.no_grad():
        for k, v in model.state_dict().items():
            if k in state and k in want:
                v.copy_(state[k])
    if model.inv_freq is not None:
        model.inv_freq = rope_frequencies(model.config)
    model.fresh_head = fresh_head  # the scalar head knows nothing yet: this is no reward model
    if fresh_head:
        nn.init.normal_(model.score.weight, std=1 / math.sqrt(model.config.n_embd + 1))
    if model.head == 'lm' and model.config.tie:
        model.lm_head.weight = model.wte.weight
    return model.to(dtype)


def is_conv1d(name):
    """GPT-2's HF weights are Conv1D, stored (in, out): transposed at the border."""
    return name.startswith('h.') and name.endswith(('c_attn.weight', 'c_proj.weight', 'c_fc.weight'))


def hf_names(c, head='lm'):
    """{our parameter name: HF's name} for every parameter of a model of this config."""
    names = {}
    with torch.device('meta'):
        ours = [*GPT(c, 'lm').state_dict(), 'score.weight']
    for n in ours:
        if c.arch == 'gpt2':
            names[n] = n if n in ('lm_head.weight', 'score.weight') else 'transformer.' + n
        else:
            h = n.replace('wte.', 'embed_tokens.').replace('ln_f.', 'norm.').replace('.attn.', '.self_attn.')
            h = re.sub(r'^h\.', 'layers.', h).replace('.ln_1.', '.input_layernorm.').replace('.ln_2.', '.post_attention_layernorm.')
            names[n] = h if n in ('lm_head.weight', 'score.weight') else 'model.' + h
    return names


_ACT = {'gelu_new': 'gelu_tanh', 'gelu_pytorch_tanh': 'gelu_tanh', 'gelu': 'gelu', 'relu': 'relu', 'silu': 'silu', 'swish': 'silu'}


def config_from_hf(raw, where='config.json'):
    """HF config.json (dict) -> GPTConfig. A setting that we would silently ignore is a ValueError that names it."""
    arch = raw.get('model_type')
    if arch not in ARCHS:
        raise ValueError(f'{where}: model_type {arch!r}; known: {", ".join(ARCHS)}')

    def refuse(key, *fine):
        if raw.get(key) not in (None, *fine):
            raise ValueError(f'{where}: {key} = {raw[key]!r} cannot be honoured by this model')
    c = dict(ARCHS[arch], arch=arch, vocab_size=raw['vocab_size'], reward_bias=raw.get('reward_bias', 0.0),
             **{k: raw.get(k) for k in ('bos_token_id', 'pad_token_id')})
    c['eos_token_id'] = raw.get('eos_token_id')
    if arch == 'gpt2':
        for key, *fine in (('scale_attn_by_inverse_layer_idx', False), ('scale_attn_weights', True), ('add_cross_attention', False)):
            refuse(key, *fine)
        act = raw.get('activation_function', 'gelu_new')
        c.update(block_size=raw.get('n_positions', 1024), n_embd=raw['n_embd'], n_layer=raw['n_layer'], n_head=raw['n_head'],
                 n_inner=raw.get('n_inner') or 0, norm_eps=raw.get('layer_norm_epsilon', 1e-5), tie=raw.get('tie_word_embeddings', True))
    else:
        refuse('use_sliding_window', False)
        refuse('partial_rotary_factor', 1.0)
        if arch == 'llama' or raw.get('use_sliding_window'):
            refuse('sliding_window')
        if any(t != 'full_attention' for t in raw.get('layer_types') or []):
            raise ValueError(f'{where}: layer_types with {set(raw["layer_types"])} cannot be honoured, only full_attention')
        act = raw.get('hidden_act', 'silu')
        rope = dict(raw.get('rope_parameters') or raw.get('rope_scaling') or {})
        theta = rope.pop('rope_theta', None) or raw.get('rope_theta', 10000.0)
        kind = rope['rope_type'] = rope.pop('type', None) or rope.get('rope_type', 'default')
        if kind not in ('default', 'linear', 'llama3'):
            raise ValueError(f"{where}: rope_type {kind!r} cannot be honoured; known: default, linear, llama3")
        if rope.get('partial_rotary_factor', 1.0) != 1.0:
            raise ValueError(f"{where}: partial_rotary_factor {rope['partial_rotary_factor']} cannot be honoured")
        c.update(block_size=raw.get('max_position_embeddings', 2048), n_embd=raw['hidden_size'], n_layer=raw['num_hidden_layers'],
                 n_head=raw['num_attention_heads'], n_kv_head=raw.get('num_key_value_heads') or 0,
                 head_size=raw.get('head_dim') or (128 if arch == 'qwen3' else 0), n_inner=raw['intermediate_size'],
                 norm_eps=raw.get('rms_norm_eps', 1e-6), tie=raw.get('tie_word_embeddings', False), rope_theta=float(theta),
                 rope_scaling=None if kind == 'default' else rope)
        if arch != 'qwen2' and raw.get('attention_bias'):
            c.update(qkv_bias=True, attn_out_bias=True)
        if raw.get('mlp_bias'):
            c['bias'] = True
    if act not in _ACT:
        raise ValueError(f'{where}: activation {act!r}; known: {", ".join(_ACT)}')
    if c['gated'] and _ACT[act] != 'silu':
        raise ValueError(f'{where}: hidden_act {act!r} in a gated MLP cannot be honoured, only silu')
    c['act'] = _ACT[act]
    return GPTConfig(**c)


def config_to_hf(c, head, dtype):
    cls = dict(gpt2='GPT2', llama='Llama', qwen2='Qwen2', qwen3='Qwen3')[c.arch]
    kind = 'ForSequenceClassification' if head == 'scalar' else 'LMHeadModel' if c.arch == 'gpt2' else 'ForCausalLM'
    raw = dict(architectures=[cls + kind], model_type=c.arch, vocab_size=c.vocab_size, tie_word_embeddings=c.tie, torch_dtype=str(dtype)[6:],
               bos_token_id=c.bos_token_id, eos_token_id=c.eos_token_id, pad_token_id=c.pad_token_id)
    if c.arch == 'gpt2':
        act = {'gelu_tanh': 'gelu_new'}.get(c.act, c.act)
        raw |= dict(n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head, n_inner=c.n_inner, activation_function=act,
                    layer_norm_epsilon=c.norm_eps, resid_pdrop=c.dropout, embd_pdrop=c.dropout, attn_pdrop=c.dropout)
    else:
        raw |= dict(hidden_size=c.n_embd, intermediate_size=c.n_inner, num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
                    num_key_value_heads=c.n_kv_head, head_dim=c.head_size, max_position_embeddings=c.block_size, rms_norm_eps=c.norm_eps,
                    hidden_act='silu', rope_theta=c.rope_theta, rope_scaling=c.rope_scaling, mlp_bias=c.bias,
                    attention_bias=c.attn_out_bias, use_sliding_window=False)
    if head == 'scalar':
        raw |= dict(num_labels=1, id2label={'0': 'reward'}, label2id={'reward': 0}, problem_type='regression', reward_bias=c.reward_bias)
    return raw


# -----------------------------------------------------------------------------------------------------------
# answers and rewards: one forward without padding, in which a beginning that sequences share is computed once


def shared_forward(model, sequences, shared):
    """sequences: token lists, of which the first shared[i] tokens of number i are also those of number i - 1.

        flat tokens   p p p a a | b b b | ...          what embeddings, linear layers and norms see: N = P + 2 + 3
        attention     p p p a a | p p p b b b | ...    gathered for the attention alone
    Returns (hidden states (N, C), [rows of them that are sequence i, (len_i,) int64])."""
    device = next(model.parameters()).device
    tokens, pos, slot, paths = [], [], [], []
    n = m = 0  # flat rows, and places in the attention, so far
    path = np.zeros(0, np.int64)
    for ids, k in zip(sequences, shared):
        own = len(ids) - k
        path = np.concatenate([path[:k], np.arange(n, n + own)])
        paths.append(path)
        tokens.append(ids[k:])
        pos.append(np.arange(k, len(ids)))
        slot.append(np.arange(m + k, m + len(ids)))
        n, m = n + own, m + len(ids)
    for column in (tokens, pos, slot):  # dummy rows that nobody reads: the CPU's library wants few shapes
        column.append(np.zeros(kernels.extra_rows(n), np.int64))
    lengths = torch.tensor([len(ids) for ids in sequences])
    doc = torch.arange(len(lengths)).repeat_interleave(lengths)[None]
    layout = Layout((1, m), device, doc=doc.to(device)).through(flat_tensor(paths, device), flat_tensor(slot, device))
    return model.hidden(flat_tensor(tokens, device), flat_tensor(pos, device), layout.attend()), paths


def flat_tensor(lists, device):
    return torch.from_numpy(np.concatenate(lists).astype(np.int64)).to(device)


def _packed(sequences, device):
    """(idx, doc), both (1, N): documents that share nothing. Under context parallelism no token can be in two."""
    lengths = torch.tensor([len(ids) for ids in sequences])
    doc = torch.arange(len(lengths)).repeat_interleave(lengths)[None]
    return flat_tensor(sequences, device)[None], doc.to(device)


def _packed_answers(groups, device):
    """_packed of each prompt with each of its answers, and (1, N) bool, True where an answer's token is predicted."""
    both = [(list(prompt), list(answer)) for prompt, answers in groups for answer in answers]
    predicts = [[False] * (len(prompt) - 1) + [True] * len(answer) + [False] for prompt, answer in both]
    return *_packed([prompt + answer for prompt, answer in both], device), flat_tensor(predicts, device)[None].bool()


def _cut_along_context(model):
    return hasattr(model, 'mesh') and model.mesh.cp.size > 1


def _by_answer(found, answers):
    """Flat values of all answers' tokens -> (S, R), padded on the right with 0, and the mask of what is real."""
    sizes = torch.tensor([len(a) for a in answers], device=found.device)
    mask = torch.arange(int(sizes.max()), device=found.device) < sizes[:, None]
    where = mask.reshape(-1).nonzero()[:, 0]
    return found.new_zeros(mask.numel()).index_copy(0, where, found).view(mask.shape), mask


def _predicting(model, groups):
    """(hidden states that predict each token of each answer (n, C), the answers). The state at t predicts token
    t + 1, so an answer's last token is not in the input at all."""
    sequences, shared, starts = [], [], []
    for prompt, answers in groups:
        for j, answer in enumerate(answers):
            sequences.append([*prompt, *answer[:-1]])
            shared.append(len(prompt) if j else 0)
            starts.append(len(prompt) - 1)
    x, paths = shared_forward(model, sequences, shared)
    rows = [path[start:] for path, start in zip(paths, starts)]
    return x[flat_tensor(rows, x.device)], [a for _, answers in groups for a in answers]


def answer_logprobs(model, groups, temperature=1.0):
    """Log-probs and entropies of answers' tokens. groups: [(prompt ids, [answer ids, ...])]. Returns (logp, entropy,
    mask), all (S, R): S answers in order, padded on the right with 0."""
    answers = [a for _, answers in groups for a in answers]
    if _cut_along_context(model) or len(answers) == len(groups):  # nothing is shared
        idx, doc, predicts = _packed_answers(groups, next(model.parameters()).device)
        where = predicts[:, :-1]
        logp, entropy = (y[where] for y in model.logprobs(idx, temperature, doc=doc, where=where, entropy=True))
    else:
        x, _ = _predicting(model, groups)
        logp, entropy = model.token_logprobs(x, flat_tensor(answers, x.device), temperature)
    logp, mask = _by_answer(logp, answers)
    return logp, _by_answer(entropy, answers)[0], mask


def answer_values(model, groups):
    """Values (S, R) of a scalar head where it predicts each token of each answer, and the mask."""
    answers = [a for _, answers in groups for a in answers]
    if _cut_along_context(model) or len(answers) == len(groups):  # nothing is shared
        idx, doc, predicts = _packed_answers(groups, next(model.parameters()).device)
        values = model(idx, doc=doc)[0][predicts]
    else:
        x, _ = _predicting(model, groups)
        values = model.values(x)
    return _by_answer(values, answers)


def rewards_of(model, sequences):
    """Rewards (S,) of token lists by a scalar head, read at the last token of each. What a sequence and the one before
    it begin with is computed once: a pair's prompt, say."""
    if _cut_along_context(model):
        idx, doc = _packed(sequences, next(model.parameters()).device)
        ends = np.cumsum([len(ids) for ids in sequences]) - 1
        return model(idx, doc=doc)[0][0, torch.from_numpy(ends).to(idx.device)]
    sequences = [np.asarray(ids, np.int64) for ids in sequences]
    shared = [0]
    for before, ids in zip(sequences, sequences[1:]):
        n = min(len(ids) - 1, len(before))  # its last token is always its own
        differ = np.flatnonzero(ids[:n] != before[:n])
        shared.append(int(differ[0]) if len(differ) else n)
    x, paths = shared_forward(model, sequences, shared)
    return model.values(x[flat_tensor([path[-1:] for path in paths], x.device)])


@torch.no_grad()
def all_rewards(model, sequences, micro_tokens=8192):
    """rewards_of any number of token lists, a few at a time, without gradient: float32 on the CPU, in their order."""
    out, lengths = torch.empty(len(sequences)), [len(ids) for ids in sequences]
    for rows in pack(lengths, max([micro_tokens, *lengths])):
        out[rows] = rewards_of(model, [sequences[i] for i in rows]).float().cpu()
    return out


# ---------------------------------------------------------------------------------------------------------------------
# safetensors: u64 header length, JSON {name: {dtype, shape, data_offsets}}, raw little-endian tensors

_DTYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64, I32=torch.int32,
               I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)


def load_safetensors(path):
    """{name: tensor} over a read-only mmap (the tensors are views: copy before writing). ValueError, one line, for
    anything that is not exactly a safetensors file: lengths, dtypes, overlaps, holes."""
    def bad(why):
        return ValueError(f'{path}: not a sound safetensors file: {why}')
    size = os.path.getsize(path)
    if size < 8:
        raise bad(f'{size} bytes are too few for a header')
    with open(path, 'rb') as f:
        n = int.from_bytes(f.read(8), 'little')
        if n > min(size - 8, 100 << 20):
            raise bad(f'header of {n} bytes in a file of {size} (truncated?)')
        try:
            header = json.loads(f.read(n).decode('utf-8'))
        except ValueError as e:
            raise bad(f'header is not JSON ({e})') from None
        whole = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)  # copy-on-write: torch wants a writable buffer
    if not isinstance(header, dict):
        raise bad('header is not a JSON object')
    header.pop('__metadata__', None)
    spans, out = [], {}
    for name, t in header.items():
        try:
            dtype, shape, (a, b) = _DTYPES[t['dtype']], t['shape'], t['data_offsets']
            ok = all(type(x) is int and x >= 0 for x in [*shape, a, b])
        except (KeyError, TypeError, ValueError):
            raise bad(f'entry {name!r} is {str(t)[:80]}; known dtypes: {", ".join(_DTYPES)}') from None
        count = math.prod(shape) if ok else -1
        if not ok or b - a != count * dtype.itemsize or 8 + n + b > size:
            raise bad(f'{name}: {t["dtype"]} {shape} does not fit bytes {a}..{b} of {size - 8 - n} (truncated?)')
        spans.append((a, b))
        out[name] = (torch.frombuffer(whole, dtype=dtype, count=count, offset=8 + n + a) if count else torch.empty(0, dtype=dtype)).view(shape)
    spans.sort()
    if [a for a, _ in spans] != [0, *(b for _, b in spans)][:len(spans)] or (spans and 8 + n + spans[-1][1] != size):
        raise bad('tensors overlap or leave holes')
    return out


def load_safetensors_dir(folder):
    index, single = (os.path.join(folder, f) for f in ('model.safetensors.index.json', 'model.safetensors'))
    if os.path.exists(single):
        return load_safetensors(single)
    if not os.path.exists(index):
        raise ValueError(f'{folder}: no model.safetensors (pickled .bin weights are not read: they can run code; convert them)')
    with open(index) as f:
        files = sorted(set(json.load(f)['weight_map'].values()))
    state = {}
    for name in files:
        if os.path.basename(name) != name:
            raise ValueError(f'{index}: shard {name!r} is outside the folder')
        state.update(load_safetensors(os.path.join(folder, name)))
    return state


def save_safetensors(path, state):
    """Whole or not at all. Largest dtype first, so that every tensor is aligned."""
    kinds, header, at = {v: k for k, v in _DTYPES.items()}, {'__metadata__': {'format': 'pt'}}, 0
    order = sorted(state, key=lambda k: (-state[k].dtype.itemsize, k))
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


def write_json(path, obj):
    with files.replaced(path, 'w') as f:
        f.write(json.dumps(obj, indent=2) + '\n')
