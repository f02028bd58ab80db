"""The engine: paged KV cache, continuous batching, prefix cache, sampling. Run directly it is nanoGPT's sample.py and more.

    python infer.py --init_from=out-sft --start="Once upon a time"       # sample, tokens stream as they come
    python infer.py --init_from=out-sft --chat                           # talk to it in the terminal
    python infer.py --init_from=out-grpo --eval_file=data/gsm8k/test.jsonl --reward=data/gsm8k/reward.py
    (OpenAI's HTTP API: python serve.py; rewards and rollouts ahead of the trainer: rollout.py)

One step of the engine, in the order of this file:
 1. BlockManager  memory is handed out in blocks of 16 tokens. Full blocks are named by a hash of all tokens up to their end
    (and of the weight version); a new request that begins with the same tokens takes them over instead of computing them.
 2. caches        where keys and values lie. PagedCache (CUDA): blocks anywhere, a block table per request, vLLM's way
    (2309.06180). RowCache (CPU): a row of consecutive memory per running request, because a CPU multiplies long rows
    several times faster than it gathers pages; blocks are then the unit of account, and cached blocks are copies.
 3. Net           the forward over the flat tokens of all requests: decoding ones (one token) and prompts (a chunk) together. On CPU in
    float32 it is one call of C (native.forward), and a request's numbers are the same to the bit whatever is beside it.
 4. Sampler       one batch, every request with its own settings. One random number per request and position, from a counter:
    a sample depends on its seed only, never on the batch that it happened to run in.
 5. Engine        the scheduler (who runs, who waits, who is thrown out when memory ends) and the verbs of RL: load_weights,
    pause, resume. On CUDA a decode step is a captured graph, started before the one before it is read. Speculation: drafts are checked in one
    forward; since token t is always drawn from the model with the random number of position t, and a draft is kept where it equals that draw, the
    output is the very same as without.
"""
import bisect
import contextlib
import ctypes
import hashlib
import itertools
import json
import os
import sys
import threading
import time
from collections import OrderedDict, deque
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F

import kernels as K
import parallel
from dataset import load_dataset
from tokenizer import encode_prompt, get_tokenizer
from model import rope_frequencies
from run import kv_cache_bytes, load_model

# -----------------------------------------------------------------------------
# what to run: one of sample (default), chat, eval_file
init_from = 'out-sft' # an out_dir or its ckpt.pt, a Hugging Face directory or name
start = '\n' # the prompt of a sample; FILE:prompt.txt reads a file
num_samples = 1 # >= 1: samples of that prompt
chat = False # a chat in the terminal
system = '' # system prompt of chat
eval_file = '' # rows {"prompt" or "question", ...} to answer and score
reward = '' # file with reward(prompt, completion, row) -> float; correct means reward > 0.5
out_file = '' # eval: samples as JSONL; '' = beside init_from, eval.jsonl
eval_limit = 0 # >= 0: eval: the first so many rows; 0 = all
serve = False # moved: python serve.py --init_from=... --port=8000
# sampling
max_new_tokens = 256 # >= 1: tokens a completion at most
temperature = 0.8 # >= 0: 0 = greedy
top_k = 0 # >= -1: 0 = off
top_p = 1.0 # in (0, 1]: 1 = off
min_p = 0.0 # in [0, 1]: 0 = off
repetition_penalty = 1.0 # > 0: 1 = off
stop = '' # a string that ends the completion
# engine
max_num_seqs = 256 # >= 1: requests that run together
max_num_batched_tokens = 2048 # >= 1: tokens of one step: longer prompts are prefilled in chunks
block_size = 16 # >= 1: tokens of a KV block
num_blocks = 0 # >= 0: 0 = what max_num_seqs full contexts need, within the memory at hand
prefix_caching = True # requests that begin alike share what they begin with
draft_from = '' # a smaller model with the same tokenizer proposes tokens
ngram = 0 # >= 0: or: propose what followed the last ngram tokens before; 0 = off
num_draft = 4 # >= 1: tokens proposed at a time
# system
seed = 1337
device = 'cuda' if torch.cuda.is_available() else 'cpu'
dtype = 'bfloat16' if torch.cuda.is_available() else 'float32' # 'float32', 'bfloat16', 'float16', 'float64'
threads = 0 # >= 0: CPU threads; 0 = one or two for tiny models, whichever is faster at the time (class Tempo), else torch's choice
compile = False # torch.compile of the blocks
kernels = 'auto' # 'auto' | 'torch' | 'triton'
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read()) # overrides from command line or config file
config = {k: globals()[k] for k in config_keys} # will be useful for logging
# -----------------------------------------------------------------------------


@dataclass
class SamplingParams:
    """How one request is sampled. Order: logit bias and min_tokens, penalties, temperature, min_p, top_k, top_p, renormalise.
    repetition_penalty (HF) sees prompt and output, presence and frequency (OpenAI) the output. logprobs: that many top
    log-probs per token (raw distribution). seed None: drawn from the engine's. n: distinct samples, one prefill."""
    max_tokens: int = 16
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | list | tuple | None = None
    stop_token_ids: list | tuple = ()
    seed: int | None = None
    n: int = 1
    logprobs: int = 0
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: dict | None = None

    def __post_init__(self):
        self.stop = [self.stop] if isinstance(self.stop, str) else list(self.stop or ())
        self.stop_token_ids, self.logprobs, self.top_k = list(self.stop_token_ids or ()), int(self.logprobs or 0), max(int(self.top_k), 0)
        self.logit_bias = {int(k): float(v) for k, v in (self.logit_bias or {}).items()}
        for ok, what in ((self.max_tokens >= 1, 'max_tokens must be at least 1'), (self.n >= 1, 'n must be at least 1'),
                         (0 <= self.temperature < float('inf'), 'temperature must be 0 (greedy) or more'), (0 < self.top_p <= 1, 'top_p must be in (0, 1]'),
                         (0 <= self.min_p <= 1, 'min_p must be in [0, 1]'), (self.repetition_penalty > 0, 'repetition_penalty must be above 0'),
                         (self.min_tokens <= self.max_tokens, f'min_tokens must not exceed max_tokens {self.max_tokens}'), (self.logprobs >= 0, 'logprobs must be 0 or more'),
                         (all(isinstance(s, str) and s for s in self.stop), 'stop must be non-empty strings')):
            if not ok:
                raise ValueError(f'SamplingParams: {what}, got {getattr(self, what.split()[0])!r}')
        self.simple = not (self.top_k or self.top_p < 1 or self.min_p or self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass
class Completion:
    """What came of one sample. logprobs: of the distribution sampled from (greedy: raw); raw_logprobs: log softmax of the plain
    logits; weight_versions: which weights made each token. The EOS stands in token_ids (it is an action), not in text."""
    text: str
    token_ids: list
    logprobs: list
    raw_logprobs: list
    top_logprobs: list
    weight_versions: list
    finish_reason: str
    prompt_index: int = 0
    index: int = 0
    prompt_token_ids: list = field(default_factory=list)


class Request:
    """One sample on its way. tokens = prompt + output; n of them have their keys and values in the cache."""

    def __init__(self, id, index, prompt, params, key, limit, stream, left, version):
        self.id, self.index, self.params, self.key, self.limit, self.stream, self.left = id, index, params, key, limit, stream, left
        self.tokens, self.P, self.n = list(prompt), len(prompt), 0
        self.blocks, self.names, self.named, self.kv_version, self.siblings = [], [], 0, None, []
        self.arena = self.row = None    # RowCache: where its row lies
        self.draft, self.draft_n = [], 0  # proposed tokens; how many tokens the draft model has in the cache
        self.logprobs, self.raw_logprobs, self.top_logprobs, self.marks = [], [], [], [(0, version)]
        self.finish_reason, self.closed = None, False  # closed: the last token is an EOS or stop token, it has no text
        self.text, self.sent, self.cut = '', 0, False  # cut: a stop string ended the text
        self.read, self.prefix = self.P, max(self.P - 5, 0)  # detokenizer: decode(prefix:) minus decode(prefix:read)

    def out(self):
        return self.tokens[self.P:]

    def held(self):
        """Tokens whose keys and values lie in its row, of the model or the draft model, at most: what a step has just written counts
        before it is confirmed, since a row may be moved in between."""
        return max(self.n, self.draft_n) + 1 + len(self.draft)


# -----------------------------------------------------------------------------
# 1. blocks: who owns which, and which can be taken over


class BlockManager:
    """Reference counts over `num_blocks` blocks and the prefix cache over those that are full.

    A block is free, in use (ref > 0), or cached: nobody uses it, its content still has a name and can be taken over or, oldest
    first, evicted. The name chains: blake2b(name of the block before, tokens); the first link holds the weight version, so new
    weights find nothing of the old ones. A cryptographic hash, since a collision that a client can build shows one user another's
    cache (CVE-2025-25183); the tokens are compared all the same. Idle invariant: free + cached = all."""

    def __init__(self, num_blocks, block_size):
        self.num_blocks, self.block_size = num_blocks, block_size
        self.free, self.cached, self.table = list(range(num_blocks)), OrderedDict(), {}  # a stack: memory just used is still warm
        self.ref, self.name, self.tokens = [0] * num_blocks, [None] * num_blocks, [None] * num_blocks

    def available(self):
        return len(self.free) + len(self.cached)

    def take(self):
        """A block with ref 1: a free one, else the cached one unused for longest."""
        block = self.free.pop() if self.free else self.cached.popitem(last=False)[0]
        self._unname(block)
        self.ref[block] = 1
        return block

    def hold(self, block):
        self.cached.pop(block, None)
        self.ref[block] += 1

    def drop(self, blocks):
        for block in reversed(blocks):  # ends are evicted before beginnings, which more requests share
            self.ref[block] -= 1
            assert self.ref[block] >= 0, f'block {block} was dropped twice'
            if not self.ref[block]:
                if self.name[block] is None:
                    self.free.append(block)
                else:
                    self.cached[block] = None

    def names(self, tokens, known, version):
        """Extends `known`, the names of a sequence's full blocks, to all of `tokens`."""
        for i in range(len(known), len(tokens) // self.block_size):
            before = known[-1] if known else b'weights %d' % version
            known.append(hashlib.blake2b(before + np.array(self._slice(tokens, i), np.int64).tobytes(), digest_size=16).digest())
        return known

    def _slice(self, tokens, i):
        return tokens[i * self.block_size:(i + 1) * self.block_size]

    def match(self, names, tokens):
        """Blocks whose content is a prefix of `tokens`; always leaves the last token to compute: its logits are needed."""
        found = []
        for i, name in enumerate(names[:(len(tokens) - 1) // self.block_size]):
            block = self.table.get(name)
            if block is None or self.tokens[block] != self._slice(tokens, i):
                break
            found.append(block)
        return found

    def publish(self, block, name, tokens):
        """Names a block whose content has been computed. False when the name is taken (another request computed the same)."""
        if name in self.table or self.name[block] is not None:
            return False
        self.table[name], self.name[block], self.tokens[block] = block, name, tokens
        return True

    def _unname(self, block):
        self.table.pop(self.name[block], None)
        self.name[block] = self.tokens[block] = None

    def forget(self):
        """Empties the prefix cache; blocks in use stay in use."""
        for block in list(self.table.values()):
            self._unname(block)
        self.free.extend(self.cached)
        self.cached.clear()


# -----------------------------------------------------------------------------
# 2. where keys and values lie. Both caches hold the layers of every net (0 the model, 1 the draft model)


def _attend_chunk(q, k, v, scale):
    """One sequence's last n positions: q (n, nh, hs), k and v (nkv, S, hs) -> (n, nh * hs)."""
    n, S = len(q), k.size(1)
    mask = None if n in (1, S) else torch.ones(n, S, dtype=torch.bool, device=q.device).tril(S - n)
    y = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], mask, is_causal=n == S and n > 1, scale=scale, enable_gqa=q.size(1) != k.size(0))
    return y[0].transpose(0, 1).reshape(n, -1)


def _rectangles(lens, starts):
    """Sequences of like length share a right-padded rectangle, where causality alone hides the padding: between half and
    the whole of its width. [(token index of every cell (S * W,), S, W, cells that are real, their tokens)]"""
    out, lens, starts = [], np.asarray(lens), np.asarray(starts)
    width = int(lens.max()) if len(lens) else 0
    while width:
        mine = np.nonzero((lens <= width) & (lens > width // 2))[0]
        if len(mine):
            w = int(lens[mine].max())
            real = (np.arange(w) < lens[mine, None])
            grid = starts[mine, None] + np.minimum(np.arange(w), lens[mine, None] - 1)
            out.append((torch.from_numpy(grid.reshape(-1)), len(mine), w, torch.from_numpy(np.nonzero(real.reshape(-1))[0]), torch.from_numpy(grid[real])))
        width //= 2
    return out


class Arena:
    """Rows of one capacity. Row i is keys and values of rows[i], in every layer; rows are kept dense, growth doubles. new: torch.zeros where
    attention reads beyond a row's end, 0 * nan is nan; or torch.empty, whose pages the system provides only when they are written."""

    def __init__(self, cap, shapes, dtype, new):
        self.cap, self.shapes, self.dtype, self.new, self.rows = cap, shapes, dtype, new, []
        self.shrink()

    def shrink(self):
        self.kv = [self.new(2, layers, 0, nkv, self.cap, hs, dtype=self.dtype) for layers, nkv, hs in self.shapes]

    def add(self, r):
        if len(self.rows) == self.kv[0].size(2):
            for i, (layers, nkv, hs) in enumerate(self.shapes):
                bigger = self.new(2, layers, max(8, 2 * len(self.rows)), nkv, self.cap, hs, dtype=self.dtype)
                used = max((r.held() for r in self.rows), default=0)  # the rest may be memory that nobody has touched yet
                bigger[:, :, :len(self.rows), :, :used] = self.kv[i][:, :, :, :, :used]
                self.kv[i] = bigger
        r.arena, r.row = self, len(self.rows)
        self.rows.append(r)

    def remove(self, r):
        last = self.rows.pop()
        if last is not r:
            for kv in self.kv:
                kv[:, :, r.row, :, :last.held()] = kv[:, :, last.row, :, :last.held()]
            self.rows[r.row], last.row = last, r.row
        r.arena = r.row = None


class RowCache:
    """CPU. A request's row moves to an arena of twice the capacity when it outgrows its own, so a row is at least half full and
    the decode attention of an arena is two batched products over [rows, longest of them]. Published blocks are copied to
    `store`, whose pages the system provides only when they are written."""
    copies = True

    def __init__(self, nets, num_blocks, block_size, max_len, prefix):
        self.shapes, self.block_size, self.dtype = [net.shape for net in nets], block_size, nets[0].dtype
        self.scales, self.in_c = [net.c.head_size ** -0.5 for net in nets], all(net.code for net in nets)
        row_bytes = sum(2 * layers * nkv * hs for layers, nkv, hs in self.shapes) * self.dtype.itemsize
        caps = [256 if self.in_c else max(64, min(256, (1 << 19) // row_bytes // 16 * 16))]  # few, wide arenas: PyTorch pays some ten calls for each, C for what it reads only
        while caps[-1] < max_len:
            caps.append(2 * caps[-1])
        self.arenas = [Arena(cap, self.shapes, self.dtype, torch.empty if self.in_c else torch.zeros) for cap in caps]
        self.caps, self.moves, self.known = caps, 0, (None,) * 4
        self.store = [torch.empty(2, layers, num_blocks, nkv, block_size, hs, dtype=self.dtype) for layers, nkv, hs in self.shapes] if prefix else None

    def reserve(self, r, n):
        """Room for n tokens of r, whose n so far stay."""
        if r.arena is not None and n <= r.arena.cap:
            return
        self.moves += 1
        old, row = r.arena, r.row
        new = self.arenas[bisect.bisect_left(self.caps, n)]
        new.add(r)
        if old is not None:
            to, held = r.row, min(r.held(), old.cap)
            for a, b in zip(new.kv, old.kv):
                a[:, :, to, :, :held] = b[:, :, row, :, :held]
            r.row = row
            old.remove(r)
            r.arena, r.row = new, to

    def release(self, r):
        self.moves += 1
        if r.arena is not None:
            r.arena.remove(r)
        if not any(a.rows for a in self.arenas):  # idle: what many requests at once have needed goes back to the system
            for arena in self.arenas:
                if max(kv.nbytes for kv in arena.kv) > 1 << 27:
                    arena.shrink()

    def fork(self, r, s):
        """s begins with what r has computed."""
        self.reserve(s, r.n)
        for a, b in zip(s.arena.kv, r.arena.kv):
            a[:, :, s.row, :, :r.n] = b[:, :, r.row, :, :r.n]

    def load(self, r, blocks):
        """Cached blocks into the beginning of r's row."""
        for kv, store in zip(r.arena.kv, self.store):
            kv[:, :, r.row, :, :len(blocks) * self.block_size] = store[:, :, blocks].transpose(2, 3).flatten(3, 4)

    def save(self, r, first, blocks):
        """The row's blocks from number `first` on into the store."""
        a, b = first * self.block_size, (first + len(blocks)) * self.block_size
        for kv, store in zip(r.arena.kv, self.store):
            store[:, :, blocks] = kv[:, :, r.row, :, a:b].unflatten(3, (len(blocks), self.block_size)).transpose(2, 3)

    def clear(self):
        for kv in (kv for arena in self.arenas for kv in arena.kv):
            kv.zero_()

    def order(self, decode):
        return decode if self.in_c else sorted(decode, key=lambda r: (r.arena.cap, r.row))

    def plan(self, decode, chunks, pos, net=0):
        """decode: requests in `order`, one token each, then chunks [(request, start, n)]; pos: all positions (N,) NumPy.
        -> attend(layer, q (N, nh, hs), k, v (N, nkv, hs)) -> (N, nh * hs), which also writes k and v."""
        nkv, dense = self.shapes[net][1], self.dtype in (torch.float32, torch.float64)
        heads, jobs, fresh, later = np.arange(nkv), [], [], []
        spans, at = {}, len(decode)
        for r, start, n in chunks:
            spans.setdefault(r.arena, []).append((at, r.row, n))
            (later if start else fresh).append((r, at, start, n))
            at += n
        begin = 0
        for arena in self.arenas:
            end = begin
            while end < len(decode) and decode[end].arena is arena:
                end += 1
            mine = spans.get(arena, ())
            if end > begin or mine:
                rows = np.fromiter((r.row for r in decode[begin:end]), np.int64, end - begin)
                every, tokens = rows, slice(begin, end)
                if mine:
                    every = np.concatenate([rows, *(np.full(n, row) for _, row, n in mine)])
                    tokens = np.concatenate([np.arange(begin, end), *(np.arange(a, a + n) for a, _, n in mine)])
                dest = torch.from_numpy(((every[:, None] * nkv + heads) * arena.cap + pos[tokens][:, None]).reshape(-1))
                tokens = tokens if not mine else None if len(tokens) == at else torch.from_numpy(tokens)
                full = mask = None
                if end > begin:
                    lens = np.ones(len(arena.rows), np.int64)
                    lens[rows] = pos[begin:end] + 1
                    longest = int(lens.max())
                    mask = torch.zeros(len(lens), longest, dtype=self.dtype)
                    mask.masked_fill_(torch.arange(longest) >= torch.from_numpy(lens)[:, None], float('-inf'))
                    mask = mask.repeat_interleave(nkv, 0)[:, None] if dense else mask[:, None, None]
                    full = len(rows) == len(lens)
                jobs.append((arena, tokens, dest, slice(begin, end), full, torch.from_numpy(rows), mask))
            begin = end
        grids = _rectangles([n for *_, n in fresh], [a for _, a, _, _ in fresh])
        whole = len(jobs) == 1 and not chunks

        def attend(layer, q, k, v):
            N, nh, hs = q.shape
            out = None if whole else q.new_empty(N, nh * hs)
            for arena, tokens, dest, rows, full, index, mask in jobs:
                kc, vc = arena.kv[net][0, layer], arena.kv[net][1, layer]
                for cache, new in ((kc, k), (vc, v)):
                    new = new if tokens is None else new[tokens]
                    cache.view(-1, hs).index_copy_(0, dest, new.reshape(-1, hs))
                if mask is not None:
                    B = len(arena.rows)
                    mine = q[rows] if full else q.new_zeros(B, nh, hs).index_copy_(0, index, q[rows])
                    y = _attend_rows(mine, kc[:B], vc[:B], mask, dense)
                    y = y if full else y.index_select(0, index)
                    if whole:
                        return y
                    out[rows] = y
            return self._attend_prompts(out, net, layer, q, k, v, grids, later)
        return attend

    def _attend_prompts(self, out, net, layer, q, k, v, grids, later):
        """Fills in `out` for prompts from their beginning, in rectangles, and for chunks that follow what is in the cache."""
        (_, nh, hs), nkv = q.shape, k.size(1)
        for grid, S, W, real, at in grids:
            a, b, c = (x.index_select(0, grid).view(S, W, -1, hs).transpose(1, 2) for x in (q, k, v))
            y = F.scaled_dot_product_attention(a, b, c, is_causal=True, scale=self.scales[net], enable_gqa=nh != nkv).transpose(1, 2).reshape(S * W, -1)
            out.index_copy_(0, at, y.index_select(0, real))
        for r, at, start, n in later:
            kc, vc = (r.arena.kv[net][i, layer, r.row, :, :start + n] for i in (0, 1))
            out[at:at + n] = _attend_chunk(q[at:at + n], kc, vc, self.scales[net])
        return out

    def tables(self, decode, chunks, pos, net):
        """plan, for the forward in C: -> rows (N, 4), who (n,), width (see native.forward), prompts: None, or prompts(layer, q, k, v, out), which attends
        for chunks of more than 256 tokens, by matrix products."""
        if (self.moves, net, decode) == self.known[:3] and not chunks:  # nobody came, went or outgrew its row
            rows = self.known[3]
        else:
            where = {a: (kv.data_ptr(), kv.stride(2) * kv.itemsize, kv.stride(0), a.cap, kv.stride(1)) for a in self.arenas if a.rows for kv in (a.kv[net],)}
            rows = np.array([(w[0] + r.row * w[1], *w[2:]) for r in [*decode, *(r for r, *_ in chunks)] for w in (where[r.arena],)], np.int64)
            self.known = (self.moves, net, decode, rows) if not chunks else (None,) * 4
        who, width, fresh, later, at = np.arange(len(pos)), (int(pos.max()) + 16) // 16 * 16, [], [], len(decode)
        if chunks:
            rows, short = np.repeat(rows, [1] * len(decode) + [n for *_, n in chunks], axis=0), np.ones(len(pos), bool)
            for r, start, n in chunks:
                if n > 256:
                    (later if start else fresh).append((r, at, start, n))
                    short[at:at + n] = False
                at += n
            who = who[short]
        grids = _rectangles([n for *_, n in fresh], [a for _, a, _, _ in fresh])
        return rows, who, width, (lambda layer, q, k, v, out: self._attend_prompts(out, net, layer, q, k, v, grids, later)) if fresh or later else None


def _attend_rows(q, k, v, mask, dense):
    """q (B, nh, hs) against rows k, v (B, nkv, cap, hs) of which the mask's width is read -> (B, nh * hs)."""
    B, nkv, cap, hs = k.shape
    T = mask.size(-1)
    if not dense:  # half precision: the fused kernel, which adds up in float32
        q = q.reshape(B, nkv, -1, hs)
        return F.scaled_dot_product_attention(q, k[:, :, :T], v[:, :, :T], mask).reshape(B, -1)
    k, v, q = k.view(B * nkv, cap, hs)[:, :T], v.view(B * nkv, cap, hs)[:, :T], q.reshape(B * nkv, -1, hs)
    return torch.bmm(torch.baddbmm(mask, q, k.transpose(1, 2), alpha=hs ** -0.5).softmax(-1), v).view(B, -1)


class PagedCache:
    """CUDA (on CPU through the kernels' twins, for tests). kv (2, layers, blocks, block_size, nkv, hs); a request's block i
    holds its positions i * block_size and on."""
    copies = False

    def __init__(self, nets, num_blocks, block_size, max_len, prefix):
        self.block_size, self.device, self.width = block_size, nets[0].device, -(-max_len // block_size)
        self.kv = [torch.zeros(2, layers, num_blocks, block_size, nkv, hs, dtype=nets[0].dtype, device=self.device) for net in nets for layers, nkv, hs in (net.shape,)]

    def reserve(self, r, n):
        """A block table needs no more room than its blocks."""
        return r

    release = load = save = lambda self, *_: None  # blocks are the memory: nothing to move

    def clear(self):
        for kv in self.kv:
            kv.zero_()

    def order(self, decode):
        return decode

    def fork(self, r, s):
        """Full blocks are shared by reference (the engine did it), the last, unfinished one is copied."""
        if r.n % self.block_size:
            for kv in self.kv:
                kv[:, :, s.blocks[-1]] = kv[:, :, r.blocks[r.n // self.block_size]]

    def slots(self, requests, pos):
        """Flat cache slot of each (request, position)."""
        size = self.block_size
        return np.array([r.blocks[p // size] * size + p % size for r, p in zip(requests, pos.tolist())], np.int64)

    def span(self, r, start, n):
        """Flat cache slots of r's positions start to start + n."""
        first = start // self.block_size
        blocks = np.array(r.blocks[first:-(-(start + n) // self.block_size)], np.int64)
        return (blocks[:, None] * self.block_size + np.arange(self.block_size)).reshape(-1)[start - first * self.block_size:][:n]

    def tables(self, decode):
        table = np.zeros((len(decode), max((len(r.blocks) for r in decode), default=1)), np.int32)
        for row, r in zip(table, decode):
            row[:len(r.blocks)] = r.blocks
        return table

    def plan(self, decode, chunks, pos, net=0):
        """As RowCache.plan."""
        up = lambda a: _upload(torch.from_numpy(a), self.device)
        D = len(decode)
        slots = up(np.concatenate([self.slots(decode, pos[:D]), *(self.span(*chunk) for chunk in chunks)]))
        table, lens = up(self.tables(decode)), up(pos[:D].astype(np.int32) + 1)
        fresh, later, at = [], [], D
        for r, start, n in chunks:
            (later if start else fresh).append((r, at, start, n))
            at += n
        cu = lambda counts: up(np.cumsum([0, *counts]).astype(np.int32))
        rows_of = lambda chunks: up(np.concatenate([np.arange(a, a + n) for _, a, _, n in chunks]))
        packed = lambda chunks: (rows_of(chunks), cu([n for *_, n in chunks]), max(n for *_, n in chunks)) if chunks else None
        fresh, rest = packed(fresh), packed(later)  # prompts from their beginning attend to what is computed here, the others to what lies in the cache, too
        if later:
            keys = up(np.concatenate([self.span(r, 0, start + n) for r, _, start, n in later]))
            cu_keys, most = cu([start + n for *_, start, n in later]), max(start + n for *_, start, n in later)

        def attend(layer, q, k, v):
            N, nh, hs = q.shape
            kc, vc = self.kv[net][0, layer], self.kv[net][1, layer]
            K.kv_write(k, v, kc, vc, slots)
            if D == N:
                return K.paged_attention(q, kc, vc, table, lens).reshape(N, nh * hs)
            out = q.new_empty(N, nh * hs)
            if D:
                out[:D] = K.paged_attention(q[:D], kc, vc, table, lens).reshape(D, nh * hs)
            if fresh:
                rows, cu, longest = fresh
                out[rows] = K.flash_attention(q[rows], k[rows], v[rows], cu_seqlens=cu, longest=longest).reshape(-1, nh * hs)
            if rest:
                rows, cu, longest = rest
                a, b = (c.flatten(0, 1)[keys] for c in (kc, vc))
                out[rows] = K.flash_attention(q[rows], a, b, cu_seqlens=cu, longest=(longest, most), cu_keys=cu_keys).reshape(-1, nh * hs)
            return out
        return attend

    def graph_attend(self, slots, lens, table, net=0):
        """The attention of decode rows over fixed buffers, for a captured graph."""
        def attend(layer, q, k, v):
            kc, vc = self.kv[net][0, layer], self.kv[net][1, layer]
            K.kv_write(k, v, kc, vc, slots)
            return K.paged_attention(q, kc, vc, table, lens).reshape(len(q), -1)
        return attend


# -----------------------------------------------------------------------------
# 3. the forward, on flat tokens


class Net:
    """The model's weights as inference wants them, in one of two forms. code (float32 on CPU where a C compiler is): every matrix is copied in the
    order in which native.forward multiplies, and a forward is one call of it. Else PyTorch: weights shared with the model, but for the query, key
    and value matrices of the rotary models, which are joined; on CPU products go to oneDNN with a copy of each matrix in its own order, which
    multiplies 64 rows twice as fast as MKL does on the AMD machine that this was measured on. `refresh` reads the model again: after an
    optimizer step, or under LoRA, whose merged weight is what runs."""

    def __init__(self, model, compile=False, rows=False):
        a, w = model.h[0].attn, model.wte.weight
        c = replace(model.config, n_head=a.n_head, n_kv_head=a.n_kv_head)  # of a tensor-parallel rank: its own
        self.model, self.c, self.dtype, self.device = model, c, w.dtype, w.device
        cpu, self.act = w.device.type == 'cpu' and not compile, 'gated' if c.gated else c.act  # what is compiled are plain operations; packed matrices are closed to it
        known = rows and cpu and K.in_c(w) and self.act in K.native.ACTS
        self.code = K.native.forward(c.n_kv_head, c.n_head // c.n_kv_head, c.head_size) if known else None
        takes = w.dtype == torch.float32 or w.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # bfloat16 wants AVX-512 or AVX-NE-CONVERT
        self.onednn = cpu and self.code is None and torch.backends.mkldnn.is_available() and takes
        if compile:  # one graph each for all layers: weights are arguments
            self.before, self.behind = (torch.compile(f, dynamic=True) for f in (self.before, self.behind))
        self.shape = (c.n_layer, c.n_kv_head, c.head_size if self.code is None else -(-c.head_size // 16) * 16)
        self.heads, self.kept, self.addresses, self.rope, self.rows, self.z = c.n_head + 2 * c.n_kv_head, {}, None, None, 0, torch.empty(0, 0)
        if c.pos == 'rope':
            inv = rope_frequencies(c).to(torch.float64 if w.dtype == torch.float64 else torch.float32)  # never half: angles need the bits
            angle = torch.arange(c.block_size)[:, None].float() * inv
            self.rope = angle.cos().to(w.device), angle.sin().to(w.device)
        self.refresh()

    def keep(self, key, new):
        """`new` under this name, written into the same memory each time."""
        old = self.kept.setdefault(key, new)
        return old if old is new else old.copy_(new)

    @staticmethod
    def own(linear):
        """(weight, bias) in force; an adapter's is merged."""
        w = linear.merged_weight() if getattr(linear, 'active', None) is not None and not linear.kept else linear.weight
        return w.detach(), None if getattr(linear, 'bias', None) is None else linear.bias.detach()

    def parts(self, block):
        """-> (weight, bias) of q, k, v (one matrix), out, up, down, gate (or None), and the RMSNorm weights of q and k (or None)."""
        a, p = block.attn, block.mlp
        if hasattr(a, 'c_attn'):
            qkv = self.own(a.c_attn)
        else:
            w, b = zip(*map(self.own, (a.q_proj, a.k_proj, a.v_proj)))
            qkv = torch.cat(w), None if b[0] is None else torch.cat(b)
        up, down, gate = (p.up_proj, p.down_proj, p.gate_proj) if self.c.gated else (p.c_fc, p.c_proj, None)
        norm = None if a.q_norm is None else (a.q_norm.weight.detach(), a.k_norm.weight.detach())
        return qkv, self.own(getattr(a, 'o_proj', None) or a.c_proj), self.own(up), self.own(down), gate and self.own(gate), norm

    @torch.no_grad()
    def refresh(self):
        """True when a weight has moved in memory, so that captured graphs are stale."""
        m = self.model
        self.ln_f, self.wte, self.wpe = self.scale(m.ln_f), m.wte.weight.detach(), None if m.wpe is None else m.wpe.weight.detach()
        if self.code is not None:
            return self._refresh_c()

        def pack(w, b):
            """(weight, bias, weight in oneDNN's order)"""
            return w, b, torch.ops.mkldnn._reorder_linear_weight(w, 64) if self.onednn else w
        self.layers = []
        for i, block in enumerate(m.h):
            (w, b), out, up, down, gate, norm = self.parts(block)
            if self.c.arch != 'gpt2':
                w, b = self.keep((i, 'w'), w), None if b is None else self.keep((i, 'b'), b)
            if norm is not None:
                norm = self.keep((i, 'n'), torch.cat([n.expand(heads, -1) for n, heads in zip(norm, (self.c.n_head, self.c.n_kv_head))]))
            self.layers.append((self.scale(block.ln_1), pack(w, b), norm, pack(*out), self.scale(block.ln_2), [pack(*x) for x in (gate, up) if x], pack(*down)))
        self.head = pack(*self.own(m.lm_head))
        before, self.addresses = self.addresses, [p.data_ptr() for p in m.parameters()] + [down[0].data_ptr() for *_, down in self.layers]
        return before != self.addresses

    def _refresh_c(self):
        """Fills in what C reads: panels of every matrix, and where norms and embeddings lie."""
        c, (L, _, hs), table = self.c, self.shape, {}

        def pad(w):  # heads * head_size rows -> heads * hs
            return F.pad(w.view(-1, c.head_size, w.size(1)), (0, 0, 0, hs - c.head_size)).flatten(0, 1)

        def put(i, name, w, b, gate=(None, None), rows=lambda w: w, columns=lambda w: w):
            col = lambda x: None if x is None else x[:, None]
            table[i, name] = self.keep((i, name), K.native.panels(columns(rows(w)), gate[0])).data_ptr()
            table[i, name + 'b'] = 0 if b is None else self.keep((i, name + 'b'), K.native.panels(rows(col(b)), col(gate[1]))).data_ptr()
        for i, block in enumerate(self.model.h):
            qkv, out, up, down, gate, norm = self.parts(block)
            put(i, 'qkv', *qkv, rows=pad)
            put(i, 'o', *out, columns=lambda w: pad(w.t()).t())
            put(i, 'up', *up, gate or (None, None))
            put(i, 'down', *down)
            for name, pair in (('n1', self.scale(block.ln_1)), ('n2', self.scale(block.ln_2))):
                table[i, name], table[i, name + 'b'] = (0 if x is None else x.data_ptr() for x in pair)
            table[i, 'qn'], table[i, 'kn'] = (0, 0) if norm is None else (x.data_ptr() for x in norm)
        put(-1, 'head', *self.own(self.model.lm_head))
        self.table = np.array([[table[i, name] for name in K.native.LAYER] for i in range(L)], np.int64)
        at = lambda x: 0 if x is None else x.data_ptr()
        cos, sin = self.rope or (None, None)
        self.c_net = K.native.Net(layers=self.table.ctypes.data, wte=at(self.wte), wpe=at(self.wpe), cos=at(cos), sin=at(sin), nf=at(self.ln_f[0]), nfb=at(self.ln_f[1]),
                          head=table[-1, 'head'], headb=table[-1, 'headb'], C=c.n_embd, inner=c.n_inner, V=c.vocab_size, act=K.native.ACTS[self.act], rms=c.norm == 'rms',
                          eps=c.norm_eps, scale=c.head_size ** -0.5)
        self.rows = 0
        return False

    def run(self, ids, pos, rows, who, width, prompts):
        """hidden in C: ids, pos (N,) int64 NumPy arrays, the rest from RowCache.tables -> (N, C), valid until the next forward."""
        n, C, (L, nkv, hs) = len(ids), self.c.n_embd, self.shape
        if n > self.rows:
            self.rows = max(n, 2 * self.rows, 64)
            line = lambda n: -(-n // 32) * 32 + 16  # rows a power of two apart would fall on the same lines of the CPU's cache
            widths = dict(x=C, y=C, qkv=self.heads * hs, att=self.c.n_head * hs, mid=self.c.n_inner)
            self.work = {name: torch.zeros(self.rows, line(width)) for name, width in widths.items()}
            for name, buffer in self.work.items():
                setattr(self.c_net, name, buffer.data_ptr())
                setattr(self.c_net, dict(y='sx').get(name, 's' + name[0]), line(widths[name]))
        go = lambda a, b: self.code.forward(ctypes.byref(self.c_net), a, b, ids.ctypes.data, rows.ctypes.data, pos.ctypes.data, n, who.ctypes.data, len(who), width)
        if prompts is None:
            go(0, 2 * L)
        else:
            q, k, v = self.work['qkv'][:n, :self.heads * hs].view(n, -1, hs).split([self.c.n_head, nkv, nkv], 1)
            for layer in range(L):
                go(2 * layer, 2 * layer + 1)
                prompts(layer, q, k, v, self.work['att'][:n, :self.c.n_head * hs])
                go(2 * layer + 1, 2 * layer + 2)
        return self.work['x'][:n, :C]

    @staticmethod
    def scale(norm):
        return norm.weight.detach(), None if norm.bias is None else norm.bias.detach()

    def norm(self, x, scale):
        w, b = scale
        if self.device.type != 'cpu':
            return K.rms_norm(x, w, self.c.norm_eps) if self.c.norm == 'rms' else K.layer_norm(x, w, b, self.c.norm_eps)
        return F.rms_norm(x, w.shape, w, self.c.norm_eps) if self.c.norm == 'rms' else F.layer_norm(x, w.shape, w, b, self.c.norm_eps)

    def lin(self, x, weight, act='', add=None, mul=None):
        """act(x W' + b), or x W' + b + add, or (x W' + b) * mul"""
        w, b, packed = weight
        if self.onednn and len(x) >= 6:  # below, starting it costs more than it saves
            if add is not None or mul is not None:
                return torch.ops.mkldnn._linear_pointwise.binary(x, mul if add is None else add, packed, b, 'mul' if add is None else 'add')
            name, how = {'': ('none', ''), 'gelu_tanh': ('gelu', 'tanh'), 'gelu': ('gelu', 'none'), 'relu': ('relu', ''), 'silu': ('swish', '')}[act]
            return torch.ops.mkldnn._linear_pointwise(x, packed, b, name, [], how)
        if add is not None and b is None:
            return torch.addmm(add, x, w.t())
        y = F.linear(x, w, b)
        if act:
            return {'gelu_tanh': K.gelu, 'gelu': F.gelu, 'relu': F.relu, 'silu': F.silu}[act](y)
        return y + add if add is not None else y * mul if mul is not None else y

    def embed(self, ids):
        return F.embedding(ids, self.wte)

    def hidden(self, ids, pos, attend):
        """ids, pos (N,) int64 -> (N, C), before the last norm."""
        x, rope = self.embed(ids), None
        if self.c.pos == 'learned':
            x = x + F.embedding(pos, self.wpe)
        else:
            rope = [t[pos] for t in self.rope]
        for layer, (ln_1, qkv, norm, *rest) in enumerate(self.layers):
            q, k, v = self.before(x, rope, ln_1, qkv, norm)
            x = self.behind(x, attend(layer, q, k, v), *rest)
        return x

    def before(self, x, rope, ln_1, qkv, norm):
        """x (N, C) -> what attention takes: q (N, nh, hs), k and v (N, nkv, hs)"""
        c, n_qk = self.c, self.c.n_head + self.c.n_kv_head
        heads = self.lin(self.norm(x, ln_1), qkv).view(len(x), self.heads, c.head_size)
        qk, v = heads[:, :n_qk], heads[:, n_qk:]
        if norm is not None:
            qk = F.rms_norm(qk, (c.head_size,), None, c.norm_eps) * norm
        q, k = qk[:, :c.n_head], qk[:, c.n_head:]
        if rope is not None:
            q, k = (t[0].to(v.dtype) for t in K.rope(q[None], k[None], *rope))
        return q, k, v

    def behind(self, x, y, out, ln_2, up, down):
        """x (N, C) and what attention gave (N, nh * hs) -> x of the next layer"""
        x = self.lin(y, out, add=x)
        y = self.norm(x, ln_2)
        y = self.lin(y, up[1], mul=self.lin(y, up[0], 'silu')) if self.c.gated else self.lin(y, up[0], self.c.act)
        return self.lin(y, down, add=x)

    def logits(self, x, at=None):
        """x (N, C) as hidden or run gave it; at: a list of its rows, None = all -> (n, V), float32 or float64, valid until the next call"""
        if self.code is None:
            y, (w, b, _) = self.norm(x if at is None else x[at], self.ln_f), self.head
            if self.device.type == 'cuda' and y.element_size() == 2:
                y = K.product(y, w)
                return y if b is None else y.add_(b)
            y = self.lin(y, self.head)
            return y if y.dtype == torch.float64 else y.float()
        at = np.arange(len(x)) if at is None else np.array(at, np.int64)
        n, V = len(at), self.c.vocab_size
        if len(self.z) < n:
            self.z = torch.empty(max(n, 2 * len(self.z)), -(-V // 32) * 32)
        self.code.logits(ctypes.byref(self.c_net), at.ctypes.data, n, self.z.data_ptr(), self.z.stride(0))
        return self.z[:n, :V]


class ShardNet(Net):
    """One rank's part of a model that parallel.cut has cut: its heads (and their keys and values), MLP columns and words. The ranks of the
    group run the same rows in step: two sums a layer, and everybody's logits put together. Residual and bias enter the sums once."""

    def __init__(self, model, compile=False, rows=False):
        if compile:
            raise ValueError('compile of a tensor-parallel engine is not supported: leave out compile, or the plain model')
        self.tp, self.lo = model.tp, model.wte.lo
        super().__init__(model)

    def refresh(self):
        moved, once = super().refresh(), lambda w: w if self.tp.rank == 0 else (w[0], None, *w[2:])
        self.layers = [(ln_1, qkv, norm, once(out), ln_2, up, once(down)) for ln_1, qkv, norm, out, ln_2, up, down in self.layers]
        return moved

    def embed(self, ids):
        here = (ids >= self.lo) & (ids < self.lo + len(self.wte))
        return self.tp.all_reduce(F.embedding(torch.where(here, ids - self.lo, 0), self.wte) * here[:, None], 'embeddings of the engine')

    def behind(self, x, y, out, ln_2, up, down):
        once = lambda x: x if self.tp.rank == 0 else None
        x = self.tp.all_reduce(self.lin(y, out, add=once(x)), 'attention of the engine')
        y = self.norm(x, ln_2)
        y = self.lin(y, up[1], mul=self.lin(y, up[0], 'silu')) if self.c.gated else self.lin(y, up[0], self.c.act)
        return self.tp.all_reduce(self.lin(y, down, add=once(x)), 'MLP of the engine')

    def logits(self, x, at=None):
        return parallel.gather_words(super().logits(x, at), self.c.vocab_size, self.tp)


# -----------------------------------------------------------------------------
# 4. sampling


def _mix(*parts):
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), 'little')


def uniform(keys, t):
    """One number in [0, 1) per (key, position): SplitMix64 (Steele 2014) as a counter. keys, t uint64 arrays -> float64 array."""
    z = keys + (t + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0 ** -53


class Settings:
    """The SamplingParams of a batch as arrays; kept while the batch stays the same."""

    def __init__(self, rows, eot, device, dtype):
        p = [r.params for r in rows]
        col = lambda name, dtype=dtype: _upload(torch.tensor([getattr(x, name) for x in p], dtype=dtype), device)
        pick = lambda test: [i for i, x in enumerate(p) if not x.simple and test(x)]
        self.keys = np.array([r.key for r in rows], np.uint64)
        self.limit = np.array([r.limit - r.P for r in rows])
        self.cut, self.repeat = pick(lambda x: x.temperature > 0 and (x.top_k or x.top_p < 1 or x.min_p)), pick(lambda x: x.repetition_penalty != 1)
        self.seen, biased = pick(lambda x: x.presence_penalty or x.frequency_penalty), pick(lambda x: x.logit_bias)
        if self.cut:
            self.cut_k, self.cut_p, self.cut_m = (col(n, d)[self.cut] for n, d in (('top_k', torch.long), ('top_p', torch.float64), ('min_p', torch.float64)))
        if self.repeat:
            self.repetition = col('repetition_penalty')[self.repeat][:, None]
        if self.seen:
            self.presence, self.frequency = col('presence_penalty')[self.seen][:, None], col('frequency_penalty')[self.seen][:, None]
        self.bias = [torch.tensor(t, device=device) for t in zip(*((i, t, b) for i in biased for t, b in p[i].logit_bias.items()))]
        stops = [([] if x.ignore_eos or eot is None else [eot]) + x.stop_token_ids for x in p]
        width = max(1, *map(len, stops)) if stops else 1
        self.stop_ids = np.array([ids + [-1] * (width - len(ids)) for ids in stops])
        self.min_tokens = np.array([x.min_tokens for x in p])
        self.any_min, self.top = any(x.min_tokens for x in p), max(x.logprobs for x in p)
        self.plain = not (self.bias or self.repeat or self.seen)
        self.heat = col('temperature', torch.float64 if dtype == torch.float64 else torch.float32)
        self.static = not (self.repeat or self.seen or self.top or self.any_min)  # nothing hangs on the tokens drawn before


def _counts(rows, V, device):
    """rows: lists of tokens -> (n, V) how often each occurs."""
    flat = torch.tensor([i * V + t for i, row in enumerate(rows) for t in row], dtype=torch.long, device=device)
    return torch.bincount(flat, minlength=len(rows) * V).view(len(rows), V)


def _filter(z, k, p, m):
    """min-p, then top-k, then top-p, each over what the one before left. z (n, V) logits already at temperature; k (n,) int, 0 = off; p, m
    (n,). Each rule keeps the tokens above a threshold; equal logits stay or go together. Works on the largest few
    hundred logits where they hold enough mass: sorting 50,257 takes 70 times as long."""
    V = z.size(-1)
    lead, lse = z.max(-1, keepdim=True)[0], z.logsumexp(-1, keepdim=True)
    floor = torch.where(m[:, None] > 0, lead + m[:, None].clamp_min(1e-300).log(), float('-inf'))
    width = min(V, max(256, int(k.max())))
    while True:
        top = z.topk(width, -1)[0].double()
        top = torch.where(top >= floor, top, float('-inf'))
        kth = torch.where((k > 0) & (k < width), k - 1, width - 1)[:, None]
        limit = top.gather(-1, kth)
        limited = (k > 0)[:, None] | (limit == float('-inf'))  # what top-k or min-p left lies all inside `top`
        top = torch.where(top >= limit, top, float('-inf'))
        mass = torch.where(limited, top.logsumexp(-1, keepdim=True), lse.double())
        probs = (top - mass).exp()
        before = probs.cumsum(-1) - probs
        enough = limited[:, 0] | (p >= 1) | ((m <= 0) & (before[:, -1] >= p))
        if width == V or bool(enough.all()):
            break
        width = min(V, width * 8)
    floor = torch.maximum(floor, torch.where((k > 0)[:, None], limit, float('-inf')))
    last = (before < p[:, None]).logical_and(top > float('-inf')).sum(-1, keepdim=True).clamp_min(1) - 1
    floor = torch.maximum(floor, torch.where(p[:, None] < 1, top.gather(-1, last), float('-inf')))
    return z.masked_fill(z < floor.to(z.dtype), float('-inf'))


def sample(logits, s, rows, extra, outs):
    """logits (n, V), row i for rows[i] after its output and extra[i] (unconfirmed draft tokens); outs (n,) tokens written before.
    -> tokens (n,) int64, logprobs, raw_logprobs (n,), all on the logits' device, top [(ids, logprobs)] or None."""
    early, z, V = np.nonzero(outs < s.min_tokens)[0] if s.any_min else (), logits, logits.size(-1)
    if not s.plain or s.cut or len(early):
        z = logits.clone()
        if s.bias:
            z.index_put_((s.bias[0], s.bias[1]), s.bias[2].to(z.dtype), accumulate=True)
        for i in early:
            z[int(i), torch.from_numpy(s.stop_ids[i][s.stop_ids[i] >= 0]).to(z.device)] = float('-inf')
        if s.repeat:
            was, part = _counts([rows[i].tokens + list(extra[i]) for i in s.repeat], V, z.device) > 0, z[s.repeat]
            z[s.repeat] = torch.where(was, torch.where(part > 0, part / s.repetition, part * s.repetition), part)
        if s.seen:
            count = _counts([rows[i].out() + list(extra[i]) for i in s.seen], V, z.device)
            z[s.seen] -= count * s.frequency + (count > 0) * s.presence
        if s.cut:
            part = z[s.cut]
            z[s.cut] = part.masked_fill(_filter(part / s.heat[s.cut, None].to(z.dtype), s.cut_k, s.cut_p, s.cut_m) == float('-inf'), float('-inf'))
    tokens, lp, raw_lp = K.draw(z, _upload(torch.from_numpy(uniform(s.keys, outs.astype(np.uint64))), z.device), s.heat)
    if z is not logits:
        raw_lp = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        lp = torch.where(s.heat > 0, lp, raw_lp)  # greedy text is scored by the plain distribution
    top = None
    if s.top:
        best, lse = logits.topk(min(s.top, V), -1), logits.logsumexp(-1, keepdim=True)
        top = list(zip(best.indices.tolist(), (best.values - lse).tolist()))
    return tokens, lp, raw_lp, top


def _upload(t, device):
    """A CPU tensor to the device; to a GPU through pinned memory, which alone lets the copy wait in the stream while the program goes on."""
    return t.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else t.to(device)


class Drawn:
    """What a step has drawn for `rows`, perhaps still on its way from the GPU: tokens stays on the device, for the step behind."""

    def __init__(self, rows, extra, tokens, lp, raw, top, settings, outs):
        self.rows, self.extra, self.tokens, self.top, self.settings, self.outs, self.ready = rows, extra, tokens, top, settings, outs, None
        self.host = tokens, lp, raw
        if tokens.is_cuda:
            self.host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in self.host]
            self.ready = torch.cuda.Event()
            self.ready.record()

    def read(self):
        """Waits. -> tokens, logprobs, raw_logprobs as NumPy arrays; FloatingPointError when the logits were not finite."""
        if self.ready is not None:
            self.ready.synchronize()
        tokens, lp, raw = (t.numpy() for t in self.host)
        if not np.isfinite(raw).all():
            raise FloatingPointError(f'the logits of {int((~np.isfinite(raw)).sum())} of {len(raw)} rows are not finite: the weights (or the dtype) have overflowed')
        return tokens, lp, raw


# -----------------------------------------------------------------------------
# 5. the engine


class Inputs:
    """Pinned memory (from any other a copy to the GPU would wait for it) behind a graph's positions, slots, lengths and block tables. A table is
    written where it has grown, anew when another list of blocks stands in its row."""

    def __init__(self, like):
        self.tensors = [torch.zeros(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for t in like]
        self.arrays, self.lists, self.counts = [t.numpy() for t in self.tensors], [None] * len(like[0]), [0] * len(like[0])

    def fill(self, rows, pos, slots):
        (to_pos, to_slots, to_lens, table), n = self.arrays, len(rows)
        to_pos[:n], to_slots[:n], to_slots[n:], to_lens[:n], to_lens[n:] = pos, slots, -1, pos + 1, 0
        for i, r in enumerate(rows):
            known = self.counts[i] if self.lists[i] is r.blocks else 0
            if known < len(r.blocks):
                table[i, known:len(r.blocks)] = r.blocks[known:]
                self.lists[i], self.counts[i] = r.blocks, len(r.blocks)


class Tempo:
    """One thread or two for steps of a few milliseconds? Two are up to 1.7 times faster on an idle machine and several times slower where another program
    holds a core (they wait for each other in every layer), so it is tried while it runs: now and then a few decode steps are made the other way,
    and what takes less time a row stays. A trial ends early once it has cost what all of it may. The C path's numbers do not depend on it.

    t = Tempo(2); t.note(0.010, 64) after each decode step: seconds, rows; t.now is the count for the next one"""
    TRIAL, FIRST, LAST = 6, 16, 128  # steps of a trial; steps between trials, doubled each time that nothing changes

    def __init__(self, most):
        self.now, self.other, self.trying, self.wait, self.left, self.base = 1, most, False, self.FIRST, self.TRIAL, 0.0
        self.seconds = self.rows = 0

    def note(self, seconds, rows):
        self.seconds, self.rows, self.left = self.seconds + seconds, self.rows + rows, self.left - 1
        pace = self.seconds / self.rows
        if self.trying and (self.left == 0 or self.seconds > self.TRIAL * self.base * rows):
            if pace < 0.9 * self.base:
                self.wait = self.FIRST
            else:
                self.now, self.other, self.wait = self.other, self.now, min(2 * self.wait, self.LAST)
            self.trying, self.left = False, self.wait
        elif not self.trying and self.left == 0:
            self.now, self.other, self.trying, self.left, self.base = self.other, self.now, True, self.TRIAL, pace
        if self.left in (self.TRIAL, self.wait):  # a phase begins, or the steps that the next trial is compared with
            self.seconds = self.rows = 0


class Engine:
    """Many requests, one model. generate() for batches; add_request() and step() for streams; safe to call from several threads,
    one step at a time. `model` is read where it lies (see Net): after an optimizer step call weights_changed(), or load_weights(state)
    to copy weights in. A model cut by parallel.cut: every rank of its group makes the same calls in the same order (parallel.sampler_of). cache: 'rows' (CPU) | 'paged' (CUDA) | 'auto'. max_len: tokens of a sequence at most, 0 = the model's.

    engine = Engine(model, tok); [c.text for c in engine.generate(['Once', 'Two'], SamplingParams(max_tokens=8, temperature=0))]"""

    def __init__(self, model, tokenizer=None, max_num_seqs=256, max_num_batched_tokens=2048, block_size=16, num_blocks=0, prefix_caching=True,
                 max_len=0, seed=1337, threads=0, cache='auto', draft=None, ngram=0, num_draft=4, compile=False):
        for name, value in dict(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, block_size=block_size).items():
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        self.model, self.tokenizer, self.eot = model, tokenizer, getattr(tokenizer, 'eot', None)
        self.max_num_seqs, self.budget, self.block_size, self.prefix_caching = max_num_seqs, max_num_batched_tokens, block_size, prefix_caching
        kind = (RowCache if next(model.parameters()).device.type == 'cpu' else PagedCache) if cache == 'auto' else dict(rows=RowCache, paged=PagedCache)[cache]
        self.nets = [(ShardNet if hasattr(m, 'tp') else Net)(m, compile, kind is RowCache) for m in (model, draft) if m is not None]
        self.net, c, self.tp = self.nets[0], model.config, getattr(model, 'tp', parallel.ALONE.tp)
        if draft is not None and draft.config.vocab_size != c.vocab_size:
            raise ValueError(f'the draft model has a vocabulary of {draft.config.vocab_size}, the model {c.vocab_size}: they must share a tokenizer')
        self.max_len = min([max_len or c.block_size] + [net.c.block_size for net in self.nets])
        self.ngram, self.num_draft = ngram, num_draft if draft is not None or ngram else 0
        self.device, self.dtype, self.vocab_size, self.seed = self.net.device, self.net.dtype, c.vocab_size, seed
        params = sum(p.numel() for p in model.parameters()) if self.device.type == 'cpu' else 0
        per_block = sum(kv_cache_bytes(net.c, block_size, self.dtype.itemsize) for net in self.nets)
        self.num_blocks = num_blocks or max(1, min(max_num_seqs * -(-self.max_len // block_size), self.tp.least(self._memory() // per_block, self.device)))
        self.kv_bytes = self.num_blocks * per_block
        self.blocks = BlockManager(self.num_blocks, block_size)
        self.cache = kind(self.nets, self.num_blocks, block_size, self.max_len, prefix_caching)
        self.native = self.net.code is not None
        self.threads = threads or (1 if 0 < params < 4e6 else 0)
        self.tempo = Tempo(2) if self.threads and not threads and self.native and torch.get_num_threads() > 1 else None
        self.waiting, self.running, self.requests, self.undelivered = deque(), [], {}, []
        self.weight_version, self.counter, self.settings, self.settings_of = 0, itertools.count(), None, None
        self.lock, self.go, self.admitting = threading.RLock(), threading.Event(), True
        self.go.set()
        captured = self.device.type == 'cuda' and kind is PagedCache and self.tp.size == 1 and K.which() == 'triton (CUDA)'  # a twin waits for the GPU
        self.graphs = {} if captured else None
        self.ahead, self.flight = self.graphs is not None, None  # see _ahead
        self.counts = dict(steps=0, output_tokens=0, prompt_tokens=0, cached_tokens=0, preemptions=0, drafted=0, accepted=0)

    def _memory(self):
        """Bytes for the cache where num_blocks does not say: half of what is free."""
        if self.device.type == 'cuda':
            return torch.cuda.mem_get_info(self.device)[0] // 2
        return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_AVPHYS_PAGES') // 2

    def __repr__(self):
        how = f'{"1 or 2" if self.tempo else self.threads or torch.get_num_threads()} threads' if self.device.type == 'cpu' else K.which()
        return (f'engine: {type(self.cache).__name__}, {str(self.dtype)[6:]}{" oneDNN" * self.net.onednn}{" C" * self.native}, {how}, {self.num_blocks} blocks x {self.block_size} tokens '
                f'= {self.kv_bytes / 1e6:.0f} MB of keys and values at most, {self.max_num_seqs} requests at once')

    # ---- requests in ---------------------------------------------------------------------------------------------

    def _check(self, prompt, params):
        """The prompt as ids. ValueError for what can never run."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError('a text prompt needs an engine with a tokenizer; or give token ids')
            prompt = prompt and [*getattr(self.tokenizer, 'prefix', ()), *self.tokenizer.encode(prompt)]  # Llama's <s>
        prompt = list(map(int, prompt))
        if not prompt:
            raise ValueError('the prompt is empty: give at least one token (the end token, for instance)')
        if min(prompt) < 0 or max(prompt) >= self.vocab_size:
            raise ValueError(f'token id {min(prompt) if min(prompt) < 0 else max(prompt)} is outside the vocabulary of {self.vocab_size}')
        if len(prompt) >= self.max_len:
            raise ValueError(f'the prompt has {len(prompt)} tokens, the context is {self.max_len}: shorten it so that an answer fits')
        need = -(-min(len(prompt) + params.max_tokens, self.max_len) // self.block_size)
        if need > self.num_blocks:
            raise ValueError(f'prompt + max_tokens need {need} blocks, there are {self.num_blocks}: raise num_blocks or lower max_tokens')
        bad = [t for t in [*params.logit_bias, *params.stop_token_ids] if not 0 <= t < self.vocab_size]
        if bad:
            raise ValueError(f'token id {bad[0]} of logit_bias or stop_token_ids is outside the vocabulary of {self.vocab_size}')
        return prompt

    def add_request(self, prompt, params=None, request_id=None):
        """Queues a prompt (str or token ids); its outputs come from step(). Returns its id. ValueError for what can never run."""
        params = params or SamplingParams()
        prompt = self._check(prompt, params)
        with self.lock:
            return self._add(prompt, params, request_id, stream=True)[0].id

    def _add(self, prompt, params, request_id=None, stream=False, left=None):
        number = next(self.counter)
        request_id = number if request_id is None else request_id
        if request_id in self.requests:
            raise ValueError(f'request id {request_id!r} is already running')
        seed, limit = params.seed if params.seed is not None else _mix(self.seed, number), min(len(prompt) + params.max_tokens, self.max_len)
        group = [Request(request_id, i, prompt, params, _mix(seed, i), limit, stream, left, self.weight_version) for i in range(params.n)]
        group[0].siblings = group[1:]  # they fork from the first once its prompt is in
        self.requests[request_id] = list(group)
        self.waiting.append(group[0])
        return group

    def generate(self, prompts, params=None):
        """prompts: [str | [int]], params: one SamplingParams or one for each -> [Completion], in order, prompt-major when n > 1.
        Waits while the engine is paused (another thread resumes it)."""
        if isinstance(prompts, str):
            raise ValueError('generate wants a list of prompts; for one text: generate([text])')
        params = params if isinstance(params, (list, tuple)) else [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f'{len(prompts)} prompts but {len(params)} SamplingParams: give one, or one for each')
        ids = [self._check(x, p) for x, p in zip(prompts, params)]
        left = [sum(p.n for p in params)]  # counted down as they end
        with self.lock:
            groups = [self._add(x, p, left=left) for x, p in zip(ids, params)]
        with self._threads():
            while left[0]:
                self.go.wait()
                with self.lock:
                    self.undelivered += self._step()
        return [self._completion(r, i) for i, g in enumerate(groups) for r in g]

    def _completion(self, r, prompt_index=0):
        self._read_text(r)
        ends = [a for a, _ in r.marks[1:]] + [len(r.tokens) - r.P]
        versions = [v for (a, v), b in zip(r.marks, ends) for _ in range(b - a)]
        return Completion(r.text, r.out(), r.logprobs, r.raw_logprobs, r.top_logprobs, versions, r.finish_reason, prompt_index, r.index, r.tokens[:r.P])

    # ---- one step --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _threads(self):
        before = self.allowed = torch.get_num_threads()
        torch.set_num_threads(min(before, self.tempo.now) if self.tempo else self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def step(self):
        """One forward for whatever runs. -> [{request_id, index, token_ids (new), text (new), finished, finish_reason, logprobs,
        raw_logprobs, top_logprobs (of the new ones)}] of the requests that came in by add_request; [] while paused."""
        with self.lock, self._threads():
            out, self.undelivered = self.undelivered + (self._step() if self.go.is_set() else []), []
        return out

    def has_unfinished(self):
        return bool(self.waiting or self.running or self.undelivered)

    @torch.inference_mode()
    def _step(self):
        """Schedule, forward, sample. -> events of streaming requests."""
        if not self.go.is_set():
            return []
        try:
            if self.flight is not None:
                before, self.flight = self.flight, None
                self.flight = self._ahead(before)
                return self._land(before)
            if self.num_draft:
                self._propose()
            decode, chunks = self._schedule()
            if not decode and not chunks:
                return []
            t0 = time.perf_counter()
            self.counts['steps'] += 1
            x = self._forward(0, decode, chunks)
            rows, extra, at, end = decode, None, None, len(decode)
            if chunks:
                rows, extra, at = list(decode), [()] * len(decode), list(range(len(decode)))
            for r, start, n in chunks:
                end += n
                drafts = len(r.draft)
                r.n = start + n - drafts
                if r.n == len(r.tokens):  # its last token is in: draw the next one, or with drafts one behind each of them
                    new = [r] * (1 + drafts) if drafts else [r, *self._fork(r)]
                    rows += new
                    extra += [r.draft[:j] for j in range(1 + drafts)] if drafts else [()] * len(new)
                    at += range(end - 1 - drafts, end) if drafts else [end - 1] * len(new)
                elif self.prefix_caching:
                    self._publish(r)
            if not rows:
                return []
            drawn = self._draw(rows, extra, self.net.logits(x, at))
            if self.ahead and not chunks and len(decode) == len(self.running) and drawn.settings.static and not self.num_draft:
                self.flight = drawn
                return []
            events = self._land(drawn)
            if self.tempo and not chunks and self.allowed > 1:
                self.tempo.note(time.perf_counter() - t0, len(decode))
                torch.set_num_threads(self.tempo.now)
            return events
        except FloatingPointError:
            self._reset()
            raise

    def _ahead(self, drawn):
        """Asynchronous scheduling (CUDA): the decode step behind `drawn`, started before its tokens are known here: they go from one step to the next
        on the GPU, which thus never waits for this program's bookkeeping. None when it hangs on more than them: on who is admitted, or thrown out,
        next; an engine with drafts, which hang on every token, never comes here. A row that turns out to have ended, by an end token or a stop string,
        is computed once more for nothing and left out by _land."""
        if self.waiting and self.admitting and len(self.running) < self.max_num_seqs:
            return None
        keep = [i for i, r in enumerate(drawn.rows) if r.finish_reason is None and len(r.tokens) + 1 < r.limit]
        rows, tokens = [drawn.rows[i] for i in keep], drawn.tokens
        if not rows or not all(self._room(r, len(r.tokens) + 1) for r in rows):
            return None
        if len(rows) < len(drawn.rows):
            tokens = tokens[_upload(torch.tensor(keep), self.device)]
        self.counts['steps'] += 1
        return self._draw(rows, None, self.net.logits(self._forward(0, rows, [], tokens)), 1)

    @torch.inference_mode()
    def _settle(self):
        """Reads the step that is still on its way, if there is one; its events come with the next step()."""
        if self.flight is not None:
            drawn, self.flight = self.flight, None
            try:
                self.undelivered += self._land(drawn)
            except FloatingPointError:
                self._reset()
                raise

    def _forward(self, net, decode, chunks, drawn=None):
        """The last token of each of decode, then those of the chunks [(request, start, n)], through net `net` -> (N, C). drawn: instead of the last
        tokens those behind them, which only the device knows yet."""
        ids = [r.draft[-1] if r.draft else r.tokens[-1] for r in decode] if drawn is None else drawn
        pos = np.fromiter((len(r.tokens) + len(r.draft) - (drawn is None) for r in decode), np.int64, len(decode))
        if chunks:
            for r, start, n in chunks:
                ids += (r.tokens[start:start + n] + r.draft)[:n]
            pos = np.concatenate([pos, *(np.arange(start, start + n) for _, start, n in chunks)])
        elif self.graphs is not None and net == 0:
            return self._replay(ids, pos, decode)
        if self.nets[net].code is not None:
            return self.nets[net].run(np.array(ids), pos, *self.cache.tables(decode, chunks, pos, net))
        ids, at = torch.as_tensor(ids, device=self.device), torch.from_numpy(pos).to(self.device)
        return self.nets[net].hidden(ids, at, self.cache.plan(decode, chunks, pos, net))

    def _replay(self, ids, pos, decode):
        """Decode on CUDA: one captured graph for each power of two of rows; padding rows (slot -1, length 0) do nothing. A decode step
        of a small model is some hundred launches of a few microseconds each; a graph makes them one."""
        n, cache = max(1, 1 << (len(ids) - 1).bit_length()), self.cache
        if n not in self.graphs:
            z = lambda *shape, dtype=torch.int64, fill=0: torch.full(shape, fill, dtype=dtype, device=self.device)
            box = [z(n), z(n), z(n, fill=-1), z(n, dtype=torch.int32), z(n, cache.width, dtype=torch.int32)]
            attend = cache.graph_attend(*box[2:])
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # kernels compile outside the capture
                for _ in range(2):
                    self.net.hidden(box[0], box[1], attend)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self.net.hidden(box[0], box[1], attend)
            self.graphs[n] = graph, box, [Inputs(box[1:]) for _ in range(2)], out
        graph, box, inputs, out = self.graphs[n]
        inputs.reverse()  # two take turns: what was copied for the last step may still be on its way
        inputs[0].fill(decode, pos, cache.slots(decode, pos))
        box[0][:len(ids)].copy_(ids if torch.is_tensor(ids) else torch.tensor(ids), non_blocking=True)
        for buffer, value in zip(box[1:], inputs[0].tensors):
            buffer.copy_(value, non_blocking=True)
        graph.replay()
        return out[:len(ids)]

    # ---- who runs --------------------------------------------------------------------------------------------------

    def _schedule(self):
        """-> (decode requests in the cache's order, chunks [(request, start, n)]) within the token budget: first what runs, oldest
        first, then who waits. Memory short: the youngest is thrown out and starts over later, from the prefix cache if it can."""
        budget, decode, chunks = self.budget, [], []

        def place(r):
            nonlocal budget
            n = len(r.tokens) + len(r.draft) - r.n
            if n > budget:
                r.draft, r.draft_n = [], min(r.draft_n, len(r.tokens) - 1)  # the draft model forgets them too
                n = min(len(r.tokens) - r.n, budget)
            if n and self._grow(r, r.n + n):
                budget -= n
                if n == 1 and r.n == len(r.tokens) - 1 and not r.siblings:
                    decode.append(r)
                else:
                    chunks.append((r, r.n, n))
        i = 0
        while i < len(self.running):  # place() may shorten it from the end
            place(self.running[i])
            i += 1
        while self.waiting and self.admitting and budget and len(self.running) < self.max_num_seqs and self._admit(self.waiting[0]):
            place(self.running[-1])
        return self.cache.order(decode), chunks

    def _admit(self, r):
        """Blocks for all of its tokens, cached ones where there are; False when they are not to be had yet."""
        size, found = self.block_size, []
        if self.prefix_caching:
            found = self.blocks.match(self.blocks.names(r.tokens, r.names, self.weight_version), r.tokens)
        for block in found:
            self.blocks.hold(block)
        need = -(-len(r.tokens) // size) - len(found)
        if self.blocks.available() < need + bool(self.running):  # one to spare, or it would be thrown out at once
            self.blocks.drop(found)
            return False
        self.waiting.popleft()
        self.running.append(r)
        r.blocks, r.n, r.named, r.kv_version = found + [self.blocks.take() for _ in range(need)], len(found) * size, len(found), self.weight_version
        self.cache.reserve(r, len(r.tokens))
        if found:
            self.cache.load(r, found)
        self.counts['cached_tokens'] += r.n
        self.counts['prompt_tokens'] += len(r.tokens)
        return True

    def _room(self, r, n):
        """Blocks for n tokens if they are to be had."""
        more = -(-n // self.block_size) - len(r.blocks)
        if more > self.blocks.available():
            return False
        for _ in range(more):
            r.blocks.append(self.blocks.take())
        self.cache.reserve(r, n)
        return True

    def _grow(self, r, n):
        """Blocks for n tokens, at others' cost; False when r itself was the youngest and had to go."""
        while not self._room(r, n):
            if self._evict() is r:
                return False
        return True

    def _evict(self):
        """The youngest that runs loses its keys and values and waits, first in line; it goes on with the same tokens. -> that request"""
        victim = self.running.pop()
        self._release(victim)
        victim.names, victim.n, victim.draft, victim.draft_n = [], 0, [], 0
        self.waiting.appendleft(victim)
        self.counts['preemptions'] += 1
        return victim

    def _fork(self, r):
        """The other samples of r's prompt take over its keys and values: full blocks shared, the unfinished one copied."""
        if self.prefix_caching:
            self._publish(r)
        new, later, full = [], [], r.n // self.block_size
        for s in r.siblings:
            need = -(-r.n // self.block_size) - full
            if len(self.running) >= self.max_num_seqs or self.blocks.available() < need + 1:
                later.append(s)
                continue
            for block in r.blocks[:full]:
                self.blocks.hold(block)
            s.blocks, s.n, s.names, s.named, s.kv_version = r.blocks[:full] + [self.blocks.take() for _ in range(need)], r.n, list(r.names), r.named, r.kv_version
            self.cache.reserve(s, r.n)
            self.cache.fork(r, s)
            self.running.append(s)
            new.append(s)
        self.waiting.extendleft(reversed(later))
        r.siblings = []
        return new

    def _publish(self, r):
        """r's full blocks into the prefix cache, unless other weights computed them."""
        full = r.n // self.block_size
        if r.kv_version != self.weight_version or r.named >= full:
            return
        names, size, new = self.blocks.names(r.tokens, r.names, self.weight_version), self.block_size, []
        for i in range(r.named, full):
            if self.blocks.publish(r.blocks[i], names[i], r.tokens[i * size:(i + 1) * size]):
                new.append(i)
        if new and new[-1] - new[0] == len(new) - 1:
            self.cache.save(r, new[0], [r.blocks[i] for i in new])
        else:
            for i in new:
                self.cache.save(r, i, [r.blocks[i]])
        r.named = full

    def _release(self, r):
        if self.prefix_caching and (r.stream or not self.cache.copies):  # nobody goes on where generate() ended: not worth a copy
            self._publish(r)
        self.cache.release(r)
        self.blocks.drop(r.blocks)
        r.blocks = []

    # ---- what was drawn --------------------------------------------------------------------------------------------

    def _draw(self, rows, extra, logits, ahead=0):
        """Draws for every row -> Drawn. extra: see sample; ahead: tokens of each that are drawn but not yet read."""
        if rows != self.settings_of:
            self.settings, self.settings_of = Settings(rows, self.eot, logits.device, logits.dtype), list(rows)
        outs = np.fromiter((len(r.tokens) - r.P + ahead for r in rows), np.int64, len(rows))
        if extra is not None:
            outs += np.fromiter(map(len, extra), np.int64, len(rows))
        tokens, lp, raw, top = sample(logits, self.settings, rows, extra or [()] * len(rows), outs)
        if self.tp.size > 1:  # all hold the same logits; one draw counts, whatever the last bit of a GPU's sum says
            tokens, lp, raw = self.tp.broadcast(torch.stack([t.double() for t in (tokens, lp, raw)]), 0, 'tokens')
            tokens = tokens.long()
        return Drawn(rows, extra, tokens, lp, raw, top, self.settings, outs)

    def _land(self, drawn):
        """Reads what was drawn, appends it, ends what is done. A request with drafts has several rows, row j drawn as if its first j
        drafts were right: they count up to the first draft that was not. A row whose request has ended since is nobody's. -> events."""
        (tokens, lp, raw), rows, extra, top, s, outs = drawn.read(), drawn.rows, drawn.extra, drawn.top, drawn.settings, drawn.outs
        ended = (s.stop_ids == tokens[:, None]).any(1) & (outs >= s.min_tokens)
        done, tokens = (ended | (outs + 1 >= s.limit)).tolist(), tokens.tolist()
        over, events, finished = set(), [], []
        for i, (r, t, a, b) in enumerate(zip(rows, tokens, lp.tolist(), raw.tolist())):
            if r in over or r.finish_reason is not None:
                continue
            r.tokens.append(t)
            r.logprobs.append(a)
            r.raw_logprobs.append(b)
            if r.params.logprobs:
                r.top_logprobs.append(dict(zip(*(x[:r.params.logprobs] for x in top[i]))))
            if r.params.stop and self._stopped(r, outs[i] + 1 >= r.params.min_tokens):
                r.finish_reason = 'stop'
            elif done[i]:
                r.closed = bool(ended[i])
                r.finish_reason = 'stop' if r.closed else 'length'
            if r.draft:
                j = len(extra[i])
                if r.finish_reason is None and j < len(r.draft) and t == r.draft[j]:
                    continue
                over.add(r)
                self.counts['accepted'] += j
                r.draft_n = min(r.draft_n, len(r.tokens) - 1)
                r.draft = []
                count = j + 1
            else:
                r.draft_n, count = min(r.draft_n, len(r.tokens) - 1), 1
            r.n = len(r.tokens) - 1
            self.counts['output_tokens'] += count
            if r.stream:
                events.append(self._event(r, count))
            if r.finish_reason is not None:
                finished.append(r)
        for r in finished:  # after the loop: leaving rows move others, which must know all of their tokens
            self._finish(r)
        return events

    def _finish(self, r):
        self.running.remove(r)
        self._release(r)
        self._ended(r)

    def _ended(self, r):
        if r.left is not None:
            r.left[0] -= 1
        if all(x.finish_reason is not None for x in self.requests.get(r.id, ())):  # siblings may end in the same step
            self.requests.pop(r.id, None)

    def _event(self, r, count):
        self._read_text(r)
        text = r.text if r.finish_reason is not None else r.text[:len(r.text) - _held_back(r.text, r.params.stop)]
        new, r.sent = text[r.sent:], max(r.sent, len(text))
        cut = len(r.tokens) - r.P - count
        return dict(request_id=r.id, index=r.index, token_ids=r.tokens[len(r.tokens) - count:], text=new, finished=r.finish_reason is not None, finish_reason=r.finish_reason,
                    logprobs=r.logprobs[cut:], raw_logprobs=r.raw_logprobs[cut:], top_logprobs=r.top_logprobs[cut:])

    def _read_text(self, r):
        """Decodes what is new, up to the last whole character, in the light of the tokens before (spaces of SentencePiece)."""
        tokens = r.tokens[:-1] if r.closed else r.tokens
        if self.tokenizer is None or r.cut or r.read >= len(tokens):
            return
        before, after = (self.tokenizer.decode(tokens[r.prefix:end]) for end in (r.read, len(tokens)))
        if r.finish_reason is not None or not after.endswith('\ufffd'):
            r.text += after[len(before):]
            r.prefix, r.read = r.read, len(tokens)

    def _stopped(self, r, may):
        """Cuts the text at the earliest stop string, if there is one that ends in what is new."""
        seen = len(r.text)
        self._read_text(r)
        hits = [at for s in r.params.stop if (at := r.text.find(s, max(0, seen - len(s) + 1))) >= 0] if may else ()
        if hits:
            r.text, r.cut = r.text[:min(hits)], True
        return bool(hits)

    # ---- speculation -----------------------------------------------------------------------------------------------

    def _propose(self):
        """Fills r.draft of decoding requests: by the draft model, or with what followed the last `ngram` tokens before."""
        ready = []
        for r in self.running:
            k = min(self.num_draft, r.limit - len(r.tokens) - 1)
            if r.n == len(r.tokens) - 1 and r.n >= r.P and k > 0 and self._room(r, len(r.tokens) + k):
                ready.append((r, k))
        if len(self.nets) == 1:
            for r, k in ready:
                r.draft = _lookup(r.tokens, self.ngram, k)
        elif ready:
            self._propose_by_model(ready)
        self.counts['drafted'] += sum(len(r.draft) for r, _ in ready)

    def _propose_by_model(self, ready):
        """The draft model's layers are further layers of the same cache. It draws with the settings and the random numbers of the
        request, so where the two models agree they draw the same token."""
        for j in range(self.num_draft):
            rows = [r for r, k in ready if k > j]
            if not rows:
                break
            lag = {r: len(r.tokens) + len(r.draft) - r.draft_n for r in rows}
            decode = self.cache.order([r for r in rows if lag[r] == 1])
            chunks = [(r, r.draft_n, lag[r]) for r in rows if lag[r] > 1]
            x = self._forward(1, decode, chunks)
            rows = decode + [r for r, _, _ in chunks]
            at = list(range(len(decode))) + (len(decode) - 1 + np.cumsum([n for *_, n in chunks], dtype=int)).tolist()
            tokens = self._draw(rows, [r.draft for r in rows], self.nets[1].logits(x, at)).read()[0].tolist()
            for r, t in zip(rows, tokens):
                r.draft_n = len(r.tokens) + len(r.draft)
                r.draft = r.draft + [t]

    # ---- verbs -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()  # rows of the cache may move, and they are inference tensors
    def abort(self, request_id):
        """Ends all samples of a request and frees its blocks; nothing happens when it has ended."""
        with self.lock:
            for r in [r for r in self.requests.get(request_id, ()) if r.finish_reason is None]:
                r.finish_reason = 'abort'
                if r in self.running:
                    self.running.remove(r)
                    self._release(r)
                elif r in self.waiting:
                    self.waiting.remove(r)
                self._ended(r)

    def pause(self, mode='keep'):
        """No step is made until resume(). 'keep': requests stay where they are; 'wait': what runs is finished first, what waits
        waits on; 'abort': all are ended, with what they have, finish_reason 'abort'."""
        if mode not in ('keep', 'wait', 'abort'):
            raise ValueError(f"pause mode {mode!r}: expected 'keep', 'wait' or 'abort'")
        with self.lock, self._threads():
            if mode == 'abort':
                for group in list(self.requests.values()):
                    alive = [r for r in group if r.finish_reason is None]
                    self.abort(group[0].id)
                    self.undelivered += [self._event(r, 0) for r in alive if r.stream]
            self.admitting = False
            while mode == 'wait' and self.running:
                self.undelivered += self._step()
            self.go.clear()

    def resume(self):
        with self.lock:
            self.admitting = True
            self.go.set()

    def load_weights(self, state, version=None, recompute=False):
        """Copies a state dict of the model in place, also between two tokens of a request; see weights_changed. ValueError when a name or a
        shape is another model's; nothing is changed then."""
        own, tie = self.model.state_dict(), self.model.config.tie
        for k in own.keys() | state.keys():
            if k == 'lm_head.weight' and tie and k not in state:
                continue
            want, got = (list(t[k].shape) if k in t else 'no such tensor' for t in (own, state))
            if want != got:
                raise ValueError(f'load_weights: these are another model\'s: {k} is {got} there and {want} here')
        with self.lock, torch.no_grad():
            self._settle()
            for k in state:
                own[k].copy_(state[k])
            self.weights_changed(version, recompute)

    def weights_changed(self, version=None, recompute=False):
        """To be called after the model's weights were changed where they lie. The prefix cache is emptied; running requests keep their
        keys and values (made by the old weights) and go on under the new ones; their tokens carry the version. recompute: keys and values of
        what runs are made anew (AReaL's way), so that each token comes from one set of weights exactly. Returns the version."""
        with self.lock:
            self._settle()
            with torch.inference_mode():
                while recompute and self.running:
                    self._evict()
            for i, net in enumerate(self.nets):
                if net.refresh() and i == 0 and self.graphs:
                    self.graphs.clear()
            self.weight_version = self.weight_version + 1 if version is None else version
            self.blocks.forget()
            for r in (r for group in self.requests.values() for r in group):
                if r.marks[-1][0] == len(r.tokens) - r.P:
                    r.marks.pop()
                r.marks.append((len(r.tokens) - r.P, self.weight_version))
                if not r.blocks:
                    r.names = []
        return self.weight_version

    def _reset(self):
        """After logits that are not finite: nothing in the cache can be trusted."""
        self.flight = None
        for request_id in list(self.requests):
            self.abort(request_id)
        self.blocks.forget()
        self.cache.clear()

    def stats(self):
        """{num_blocks, free_blocks, cached_blocks, running, waiting, weight_version} and counts since the start."""
        with self.lock:
            waiting = len(self.waiting) + sum(len(r.siblings) for r in [*self.waiting, *self.running])
            return dict(num_blocks=self.num_blocks, free_blocks=len(self.blocks.free), cached_blocks=len(self.blocks.cached), running=len(self.running),
                        waiting=waiting, weight_version=self.weight_version, **self.counts)

    @torch.no_grad()
    def mismatch(self, completions, model=None):
        """Parity meter: |raw log-prob of the engine - model.logprobs| over the completions' tokens -> {'max', 'mean'} nats. In fp32 about 1e-6."""
        if model is None and self.tp.size > 1:
            raise ValueError('mismatch of a tensor-parallel engine: give the sharded model, mismatch(completions, model)')
        seqs = [c.prompt_token_ids + c.token_ids for c in completions]
        idx = torch.zeros(len(seqs), max(map(len, seqs)), dtype=torch.long)
        mask, ours = torch.zeros_like(idx, dtype=torch.bool), torch.zeros(idx.shape, dtype=torch.float64)
        for i, (seq, c) in enumerate(zip(seqs, completions)):
            idx[i, :len(seq)], mask[i, :len(seq)] = torch.tensor(seq), True
            ours[i, len(c.prompt_token_ids):len(seq)] = torch.tensor(c.raw_logprobs, dtype=torch.float64)
        where = (ours[:, 1:] != 0) & mask[:, 1:]
        logp = (model or self.model).logprobs(idx.to(self.device), mask=mask.to(self.device), where=where.to(self.device)).cpu().double()
        delta = (logp - ours[:, 1:])[where].abs()
        return dict(max=float(delta.max()), mean=float(delta.mean())) if len(delta) else dict(max=0.0, mean=0.0)


def _held_back(text, stops):
    """How many last characters may be the beginning of a stop string: they are not sent yet."""
    return max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


def _lookup(tokens, ngram, k):
    """Up to k tokens that followed the last occurrence of the last `ngram` tokens (prompt lookup, Saxena 2023).
    [5, 6, 7, 8, 5, 6] with ngram=2, k=2 -> [7, 8]"""
    a, n = np.array(tokens), len(tokens)
    if n <= ngram:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(a[:-1], ngram)
    hits = np.nonzero((windows == a[n - ngram:]).all(1))[0]
    return a[hits[-1] + ngram:hits[-1] + ngram + k].tolist() if len(hits) else []


# -----------------------------------------------------------------------------
# 6. the command


def _stream(engine, prompt, params, lead=''):
    """One prompt, printed as it comes, behind `lead` -> (text of sample 0, tokens, seconds). Samples after the first are printed whole."""
    print(lead, end='', flush=True)
    engine.add_request(prompt, params, 'cli')
    texts, count, t0 = [''] * params.n, 0, time.time()
    try:
        while engine.has_unfinished():
            for e in engine.step():
                texts[e['index']] += e['text']
                count += len(e['token_ids'])
                if e['index'] == 0:
                    print(e['text'], end='', flush=True)
    finally:
        engine.abort('cli')
    for text in texts[1:]:
        print('\n---------------\n' + lead + text, end='')
    print(flush=True)
    return texts[0], count, time.time() - t0


def run_sample(engine, params):
    text = start
    if start.startswith('FILE:'):
        with open(start[5:], encoding='utf-8') as f:
            text = f.read()
    prompt = encode_prompt(text, engine.tokenizer) or [t for t in (engine.eot,) if t is not None]  # --start= begins where texts begin
    _, count, dt = _stream(engine, prompt, params, text)
    print(f'---------------\n{count} tokens in {dt:.2f} s: {count / dt:.1f} tok/s', file=sys.stderr)


def run_chat(engine, params):
    """Reads lines until the end of the input. The turns before are in the prefix cache, so only what is new is computed."""
    first = [dict(role='system', content=system)] if system else []
    messages, tok = list(first), engine.tokenizer
    print('chat: an empty line or Ctrl-D ends it, /reset forgets, Ctrl-C stops an answer', file=sys.stderr)
    while True:
        try:
            line = input('> ')
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not line.strip():
            return
        if line.strip() == '/reset':
            messages = list(first)
            continue
        messages.append(dict(role='user', content=line))
        while len(prompt := tok.apply_chat_template(messages, add_generation_prompt=True)) + params.max_tokens > engine.max_len and len(messages) > len(first) + 1:
            del messages[len(first):len(first) + 2]
            print('(context full: the oldest turn is forgotten)', file=sys.stderr)
        try:
            answer, count, dt = _stream(engine, prompt, params)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            messages.pop()
            continue
        print(f'({count} tokens, {count / dt:.0f} tok/s)', file=sys.stderr)
        messages.append(dict(role='assistant', content=answer))


def run_eval(engine, params):
    """Answers every row of eval_file num_samples times, scores, prints accuracy (and pass@k), writes the samples."""
    from rollout import load_reward  # here: rollout.py stands above this file
    rows, score = [dict(r) for r in load_dataset(eval_file)], load_reward(reward) if reward else None
    rows = rows[:eval_limit or None]
    key = next((k for k in ('prompt', 'question', 'instruction') if rows and k in rows[0]), None)
    if key is None:
        raise ValueError(f'{eval_file}: rows with "prompt", "question" or "instruction" are wanted, ' + (f'got {", ".join(rows[0])}' if rows else 'it is empty'))
    prompts, t0 = [encode_prompt(r[key], engine.tokenizer) for r in rows], time.time()
    out = engine.generate(prompts, replace(params, n=num_samples))
    dt, count = time.time() - t0, sum(len(c.token_ids) for c in out)
    file = out_file or os.path.join(init_from if os.path.isdir(init_from) else '.', 'eval.jsonl')
    scores, log = [], {}
    with open(file + '.tmp', 'w', encoding='utf-8') as f:
        for row, group in zip(rows, (out[i:i + num_samples] for i in range(0, len(out), num_samples))):
            text = row[key] if isinstance(row[key], str) else row[key][-1]['content']
            got = [float(score(text, c.text, row)) for c in group] if score else []
            scores.append(got)
            f.write(json.dumps(dict(row, completions=[c.text for c in group], scores=got, finish_reasons=[c.finish_reason for c in group]), ensure_ascii=False) + '\n')
    os.replace(file + '.tmp', file)
    if score:
        right = np.array(scores) > 0.5
        log['score'], log['accuracy'], log['stderr'] = float(np.mean(scores)), float(right.mean()), float(right.mean(1).std() / max(1, len(right)) ** 0.5)
        if num_samples > 1:
            log[f'pass@{num_samples}'] = float(right.any(1).mean())
    log.update(rows=len(rows), ended=float(np.mean([c.finish_reason == 'stop' for c in out])), mean_tokens=count / len(out))
    print(' | '.join(f'{k} {v:.4f}' if isinstance(v, float) else f'{k} {v}' for k, v in log.items()) + f' | {count / dt:.0f} tok/s | samples in {file}')
    return log


def main():
    if serve:
        raise ValueError(f'infer.py no longer serves: python serve.py --init_from={init_from} --port=8000')
    K.use(kernels)
    torch.manual_seed(seed)
    kind = dict(float32=torch.float32, float64=torch.float64, bfloat16=torch.bfloat16, float16=torch.float16).get(dtype)
    if kind is None:
        raise ValueError(f"--dtype={dtype}: expected 'float32', 'bfloat16', 'float16' or 'float64'")
    model, tokenizer = load_model(init_from, device, kind)
    draft = load_model(draft_from, device, kind)[0].eval() if draft_from else None
    engine = Engine(model.eval(), get_tokenizer(tokenizer), max_num_seqs, max_num_batched_tokens, block_size, num_blocks, prefix_caching, seed=seed, threads=threads,
                    draft=draft, ngram=ngram, num_draft=num_draft, compile=compile)
    print(engine, file=sys.stderr)
    params = SamplingParams(max_new_tokens, temperature, top_k, top_p, min_p, repetition_penalty, stop=stop or None, seed=seed, n=num_samples)
    if chat:
        run_chat(engine, replace(params, n=1))
    elif eval_file:
        run_eval(engine, params)
    else:
        run_sample(engine, params)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
