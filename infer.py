"""The engine: continuous batching over a paged cache of keys and values, a prefix cache, sampling.

    python infer.py --init_from=out-sft --start="Once upon a time"       # nanoGPT's sample.py
    python infer.py --init_from=out-sft --chat                           # talk to it in the terminal

    requests -> Scheduler (who) -> Batch (which tokens) -> forward -> logits -> sample -> Engine (tell, end)
                   |                                          |
                 Blocks (memory, prefix cache)             KVCache (keys and values)

 1. Blocks     memory is handed out in blocks of some tokens. A full block is named by a hash of all tokens
               up to its end (and of the weights); a request that begins with the same tokens takes the block
               over instead of computing it.
 2. KVCache    one paged cache (vLLM, 2309.06180): blocks lie anywhere, each request has a table of its own.
 3. forward    on the flat tokens of all requests: one token of those that decode, a chunk of each prompt. In
               C for float32 on a CPU (native.c); everywhere else GPT.hidden, the very blocks that train. On
               CUDA a decode step is a captured graph.
 4. sampling   every request with its own settings. One random number for each request and position, from a
               counter: a sample depends on its seed alone, never on the batch that it happened to run in.
 5. Scheduler  who runs, who waits, and who is thrown out when memory ends. It needs no model.
 6. Engine     the loop: schedule, forward, sample, tell. On CUDA a step starts before the last one is read.

Left out: speculation (one request would be several rows of a batch, and all of the loop would have to know),
a second cache for CPUs (rows instead of blocks: as fast, twice the memory), swapping to the CPU's memory.
"""
import contextlib
import hashlib
import itertools
import mmap
import operator
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
from run import load_model, pick_device
from tokenizer import encode_prompt, get_tokenizer

# -----------------------------------------------------------------------------
init_from = 'out-sft' # an out_dir or its ckpt.pt, a Hugging Face directory or name
start = '\n' # the prompt of a sample; FILE:prompt.txt reads a file
num_samples = 1 # >= 1: samples of that prompt
chat = False # a chat in the terminal
system = '' # system prompt of chat
# sampling
max_new_tokens = 256 # >= 1: tokens a completion at most
temperature = 0.8 # >= 0: 0 = greedy
top_k = 0 # >= -1: 0 or -1 = off
top_p = 1.0 # in (0, 1]: 1 = off
min_p = 0.0 # in [0, 1]: 0 = off
repetition_penalty = 1.0 # > 0: 1 = off
stop = '' # a string that ends the completion
# engine
max_num_seqs = 256 # >= 1: requests that run together
max_num_batched_tokens = 2048 # >= 1: tokens of one step: longer prompts are prefilled in chunks
block_size = 0 # >= 0: tokens of a block of keys and values; 0 = 64 on a CPU, 16 on a GPU
num_blocks = 0 # >= 0: 0 = for max_num_seqs contexts, in 90 % of a GPU's free memory (CPU: half)
prefix_caching = True # requests that begin alike share what they begin with
# system
seed = 1337
device = 'auto' # 'auto' = cuda if there is one | 'cpu' | 'cuda' | 'cuda:1'
dtype = 'auto' # of the weights: 'auto' | 'float32' | 'bfloat16' | 'float16' | 'float64'
threads = 0 # >= 0: CPU threads; 0 = one for models under 4 M parameters, else torch's choice
kernels = 'auto' # 'auto' | 'torch' | 'triton'
config_keys = [k for k, v in globals().items()
               if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
_gone = {
    'serve': 'python serve.py serves',
    'eval_file': 'python evaluate.py evaluates',
    'draft_from': 'speculation was dropped',
    'ngram': 'speculation was dropped',
    'compile': 'a decode step is a CUDA graph, or C on a CPU',
}
if __name__ == '__main__':
    for _key in (arg[2:].split('=')[0] for arg in sys.argv[1:]):
        if _key in _gone:
            print(f'error: infer.py has no --{_key} any more: {_gone[_key]}', file=sys.stderr)
            sys.exit(2)
# overrides from the command line or a config file
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
config = {k: globals()[k] for k in config_keys} # will be useful for logging
# -----------------------------------------------------------------------------

MOST = 1 << 31
LIMITS = {  # setting: (type, lowest, highest)
    'max_tokens': (int, 1, MOST),
    'min_tokens': (int, 0, MOST),
    'n': (int, 1, MOST),
    'logprobs': (int, 0, MOST),
    'top_k': (int, -1, MOST),
    'temperature': (float, 0, 1e6),
    'top_p': (float, 1e-9, 1),
    'min_p': (float, 0, 1),
    'repetition_penalty': (float, 1e-6, 1e6),
    'presence_penalty': (float, -1e6, 1e6),
    'frequency_penalty': (float, -1e6, 1e6),
}


@dataclass
class SamplingParams:
    """How one request is sampled. Order: logit bias and min_tokens, penalties, temperature, min_p, top_k,
    top_p, renormalise.

    temperature: below 1e-5 it is 0, greedy. top_k 0 or -1: off. repetition_penalty (Hugging Face's) sees
    prompt and output, presence and frequency (OpenAI's) the output alone. logprobs: that many of the raw
    distribution's largest for each token. seed None: drawn from the engine's. n: distinct samples of one
    prefill. Raises ValueError for a value out of its range."""
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
        self.stop_token_ids = list(self.stop_token_ids or ())
        self.logit_bias = dict(self.logit_bias or {})
        self.logprobs = self.logprobs or 0
        for name, (kind, low, high) in LIMITS.items():
            value = getattr(self, name)
            fits = (
                isinstance(value, (int, np.integer) if kind is int else (int, float, np.number))
                and low <= value <= high
            )
            self.check(name, fits, f'be {kind.__name__}, {low:g} to {high:g}')
        self.check(
            'min_tokens', self.min_tokens <= self.max_tokens, f'not exceed max_tokens {self.max_tokens}'
        )
        self.check('stop', all(isinstance(s, str) and s for s in self.stop), 'be non-empty strings')
        ids = all(isinstance(t, (int, np.integer)) for t in self.stop_token_ids)
        self.check('stop_token_ids', ids, 'be token ids')
        biases = all(
            str(t).isdecimal() and isinstance(b, (int, float)) and b < MOST
            for t, b in self.logit_bias.items()
        )
        self.check('logit_bias', biases, f'map token ids to numbers below {MOST}')
        self.logit_bias = {int(t): float(b) for t, b in self.logit_bias.items()}  # JSON's ids are texts
        # 1 / temperature would overflow float32 at 1e-39; here all that divide by it are safe
        if self.temperature < 1e-5:
            self.temperature = 0.0
        self.top_k = max(self.top_k, 0)

    def check(self, name, fits, rule):
        if not fits:
            raise ValueError(f'SamplingParams: {name} must {rule}, got {getattr(self, name)!r}')

    @property
    def cuts(self):
        """Does top-k, top-p or min-p cut the distribution?"""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


@dataclass
class Completion:
    """What came of one sample. logprobs: of the distribution sampled from (greedy: raw); raw_logprobs: log
    softmax of the plain logits; weight_versions: which weights made each token. The end token stands in
    token_ids (it is an action), not in text."""
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
    """One sample on its way. tokens = prompt + output; the keys and values of the first n of them are in the
    cache."""

    def __init__(self, id, index, prompt, params, key=0, limit=MOST, stream=False, tokenizer=None):
        self.id, self.index, self.params = id, index, params
        self.key = key        # of its random numbers
        self.limit = limit    # tokens at most, prompt included
        self.stream, self.tokenizer = stream, tokenizer
        self.tokens, self.P, self.n = list(prompt), len(prompt), 0
        self.blocks, self.siblings = [], []
        self.names, self.named = [], 0  # names of its full blocks; how many of them the prefix cache knows
        self.kv_version = 0             # the weights that made its keys and values
        self.logprobs, self.raw_logprobs, self.top_logprobs = [], [], []
        self.versions = []              # the weights that made each token
        self.finish_reason = None
        self.closed = False             # the last token is an end or stop token: it has no text
        self.text, self.cut = '', False             # cut: a stop string ended the text
        self.sent = self.told = 0      # characters that the stream has seen; that were read at the last event
        # new text = decode(prefix:) minus decode(prefix:read)
        self.read, self.prefix = self.P, max(self.P - 5, 0)

    def out(self):
        return self.tokens[self.P:]

    def read_text(self):
        """Decodes what is new, up to the last whole character, in the light of the tokens before (spaces of
        SentencePiece)."""
        end = len(self.tokens) - self.closed
        if self.tokenizer is None or self.cut or self.read >= end:
            return
        before = self.tokenizer.decode(self.tokens[self.prefix:self.read])
        after = self.tokenizer.decode(self.tokens[self.prefix:end])
        if self.finish_reason is not None or not after.endswith('\ufffd'):
            self.text += after[len(before):]
            self.prefix, self.read = self.read, end

    def hits_stop(self):
        """Cuts the text at the earliest stop string that ends in what is new. Costs what the text is long,
        not what the string is."""
        seen = len(self.text)
        self.read_text()
        if len(self.tokens) - self.P < self.params.min_tokens:
            return False
        found = [self.text.find(s, max(0, seen - len(s) + 1)) for s in self.params.stop]
        found = [at for at in found if at >= 0]
        if found:
            self.text, self.cut = self.text[:min(found)], True
        return bool(found)

    def event(self):
        """What step() tells of the last token. Text that may be the beginning of a stop string is held back;
        pieces have each token's own."""
        self.read_text()
        piece, self.told = self.text[self.told:], len(self.text)
        end = len(self.text)
        if self.finish_reason is None and self.params.stop:
            held = (
                i for i in range(self.sent, end) if any(s.startswith(self.text[i:]) for s in self.params.stop)
            )
            end = next(held, end)  # found at once in the next step, unless it turned out to be none
        new, self.sent = self.text[self.sent:end], max(self.sent, end)
        return dict(
            request_id=self.id, index=self.index, token_ids=self.tokens[-1:], text=new, pieces=[piece],
            finished=self.finish_reason is not None, finish_reason=self.finish_reason,
            logprobs=self.logprobs[-1:], raw_logprobs=self.raw_logprobs[-1:],
            top_logprobs=self.top_logprobs[-1:])

    def completion(self, prompt_index=0):
        self.read_text()
        return Completion(
            self.text, self.out(), self.logprobs, self.raw_logprobs, self.top_logprobs, self.versions,
            self.finish_reason, prompt_index, self.index, self.tokens[:self.P])


# -----------------------------------------------------------------------------
# 1. blocks: who owns which, and which can be taken over


class Blocks:
    """Reference counts over `num_blocks` blocks and the prefix cache over those that are full.

    A block is free, in use (ref > 0), or cached: nobody uses it, but its content has a name, so that it can
    be taken over, or evicted, the oldest first. The name chains: blake2b(name of the block before, tokens);
    the first link holds the weights' version, so new weights find nothing of the old ones. A cryptographic
    hash, since a collision that a client can build shows one user another's cache (CVE-2025-25183); the
    tokens are compared all the same. When nothing runs: free + cached = all."""

    def __init__(self, num_blocks, size):
        self.num_blocks, self.size = num_blocks, size
        self.free = list(range(num_blocks))[::-1]  # a stack: memory just used is still warm
        self.cached, self.table = OrderedDict(), {}
        self.ref, self.name, self.tokens = [0] * num_blocks, [None] * num_blocks, [None] * num_blocks

    def available(self):
        return len(self.free) + len(self.cached)

    def count(self, tokens):
        """Blocks that so many tokens need."""
        return -(-tokens // self.size)

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
            if self.ref[block]:
                continue
            if self.name[block] is None:
                self.free.append(block)
            else:
                self.cached[block] = None

    def names(self, tokens, known, version):
        """Extends `known`, the names of a sequence's full blocks, to all of `tokens`."""
        for i in range(len(known), len(tokens) // self.size):
            before = known[-1] if known else b'weights %d' % version
            content = np.array(self._slice(tokens, i), np.int64).tobytes()
            known.append(hashlib.blake2b(before + content, digest_size=16).digest())
        return known

    def _slice(self, tokens, i):
        return tokens[i * self.size:(i + 1) * self.size]

    def match(self, names, tokens):
        """Blocks whose content is a prefix of `tokens`; always leaves the last token to compute: its logits
        are needed."""
        found = []
        for i, name in enumerate(names[:(len(tokens) - 1) // self.size]):
            block = self.table.get(name)
            if block is None or self.tokens[block] != self._slice(tokens, i):
                break
            found.append(block)
        return found

    def publish(self, block, name, tokens):
        """Names a block whose content has been computed, unless the name is taken: another request computed
        the same."""
        if name not in self.table and self.name[block] is None:
            self.table[name], self.name[block], self.tokens[block] = block, name, tokens

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
# 2. keys and values


class Batch:
    """The tokens of one step: the next token of each of `decode`, then the chunks [(request, first token,
    count)].

    requests: one for each of them. pos (N,) the tokens' positions, owner (N,) the index of each one's
    request. drawn (D,) on the device: tokens of `decode` that this program has not read yet; they stand
    behind the last ones it knows."""

    def __init__(self, decode, chunks, drawn=None):
        self.decode, self.chunks, self.drawn = decode, chunks, drawn
        self.requests = decode + [r for r, _, _ in chunks]
        ahead = drawn is not None
        pos = [np.array([len(r.tokens) - 1 + ahead for r in decode], np.int64)]
        pos += [np.arange(first, first + n) for _, first, n in chunks]
        self.pos = np.concatenate(pos)
        self.owner = np.repeat(np.arange(len(self.requests)), [1] * len(decode) + [n for _, _, n in chunks])

    def ids(self):
        ids = [r.tokens[-1] for r in self.decode]
        for r, first, n in self.chunks:
            ids += r.tokens[first:first + n]
        return ids


class Tables:
    """The block tables of a batch's requests, (rows, width) int32. Only what has grown is written, unless
    another request's list of blocks stands in the row: a decode step writes next to nothing. pinned: memory
    that a copy to a GPU can read while we go on."""

    def __init__(self, rows, width, pinned=False):
        self.tensor = torch.zeros(rows, width, dtype=torch.int32, pin_memory=pinned)
        self.array, self.lists, self.counts = self.tensor.numpy(), [None] * rows, [0] * rows

    def fill(self, requests):
        for i, r in enumerate(requests):
            known = self.counts[i] if self.lists[i] is r.blocks else 0
            if known < len(r.blocks):
                self.array[i, known:len(r.blocks)] = r.blocks[known:]
                self.lists[i], self.counts[i] = r.blocks, len(r.blocks)
        return self.array


class KVCache:
    """kv (2, layers, blocks, heads, size, width): keys, then values. A request's block i holds its positions
    i * size and on. What a slot that no token has written holds does not matter to any reader."""

    def __init__(self, config, num_blocks, size, max_len, rows, like):
        """For `config`'s layers and heads. rows: requests of a batch; like: a tensor of its dtype, device."""
        self.size, self.device, self.width = size, like.device, -(-max_len // size)
        shape = 2, config.n_layer, num_blocks, config.n_kv_head, size, config.head_size
        self.kv = torch.empty(shape, dtype=like.dtype, device=like.device)  # pages come when written
        self.tables = Tables(rows, self.width)

    def copy_block(self, source, to):
        self.kv[:, :, to] = self.kv[:, :, source]

    def layer(self, i):
        """-> keys and values of a layer as kernels.py wants them: (blocks, size, heads, width)"""
        return self.kv[0, i].transpose(1, 2), self.kv[1, i].transpose(1, 2)

    def slots(self, batch):
        """block * size + offset of each token."""
        table = self.tables.fill(batch.requests)
        return table[batch.owner, batch.pos // self.size].astype(np.int64) * self.size + batch.pos % self.size

    def attention(self, batch):
        """-> attend(layer, q (N, nh, hs), k, v (N, nkv, hs)), which writes k and v and reads all that a token
        may see."""
        D, slots = len(batch.decode), _upload(self.slots(batch), self.device)
        lens = _upload(batch.pos[:D].astype(np.int32) + 1, self.device)
        table = _upload(self.tables.array[:D, :self._longest(batch.decode)].copy(), self.device)
        decode = self.decode_attention(slots, lens, table)
        if not batch.chunks:
            return decode
        block, offset = (_upload(x, self.device) for x in self._chunk_keys(batch))
        queries = [n for _, _, n in batch.chunks]
        keys = [first + n for _, first, n in batch.chunks]
        cu, cu_keys = (_upload(np.cumsum([0, *x]).astype(np.int32), self.device) for x in (queries, keys))

        def attend(layer, q, k, v):
            k_cache, v_cache = self.layer(layer)
            K.kv_write(k, v, k_cache, v_cache, slots)
            y = K.flash_attention(q[D:], k_cache[block, offset], v_cache[block, offset], cu_seqlens=cu,
                                  longest=(max(queries), max(keys)), cu_keys=cu_keys)
            return torch.cat([K.paged_attention(q[:D], k_cache, v_cache, table, lens), y]) if D else y
        return attend

    def decode_attention(self, slots, lens, table):
        def attend(layer, q, k, v):
            k_cache, v_cache = self.layer(layer)
            K.kv_write(k, v, k_cache, v_cache, slots)
            return K.paged_attention(q, k_cache, v_cache, table, lens)
        return attend

    def _longest(self, requests):
        return max((len(r.blocks) for r in requests), default=1)

    def _chunk_keys(self, batch):
        """(block, offset) of every token that the chunks may see, their own among them."""
        blocks, offsets = [], []
        for row, (_, first, n) in enumerate(batch.chunks, len(batch.decode)):
            pos = np.arange(first + n)
            blocks.append(self.tables.array[row, pos // self.size].astype(np.int64))
            offsets.append(pos % self.size)
        return np.concatenate(blocks), np.concatenate(offsets)


def _upload(array, device):
    """A NumPy array to the device; to a GPU through pinned memory, or the copy would wait for all that was
    started before."""
    t = torch.from_numpy(array)
    return t.pin_memory().to(device, non_blocking=True) if device.type == 'cuda' else t.to(device)


# -----------------------------------------------------------------------------
# 3. the forward


class Forward:
    """GPT.hidden with the cache's attention: on CUDA, and on a CPU without a C compiler or in other dtypes
    than float32. The model is read where it lies. One that parallel.cut has cut (model.tp): the ranks of its
    group run the same batches in step, each with its heads and their keys and values; rows are padded to a
    multiple of the group, since each rank adds up its share of them."""

    def __init__(self, model, cache):
        self.model, self.cache, self.tp = model, cache, getattr(model, 'tp', parallel.ALONE.tp)
        self.seen = None
        self.refresh()

    def refresh(self):
        """True when a weight has moved in memory or another adapter is in force, so that captured graphs are
        stale."""
        before = self.seen
        adapters = [m.active for m in self.model.modules() if hasattr(m, 'active')]
        self.seen = [p.data_ptr() for p in self.model.parameters()], adapters
        return before != self.seen

    @contextlib.contextmanager
    def sampling(self):
        """A model that is being trained has dropout, and maybe compiled blocks: not here."""
        trained = self.model.training
        if trained:
            self.model.eval()
        try:
            with (
                torch.compiler.set_stance('force_eager') if self.model.compiled else contextlib.nullcontext()
            ):
                yield
        finally:
            if trained:
                self.model.train()

    def hidden(self, batch):
        """-> (N, C) after the last norm, valid until the next call"""
        device = self.cache.device
        ids = batch.drawn if batch.drawn is not None else _upload(np.array(batch.ids(), np.int64), device)
        return self.run(ids, _upload(batch.pos, device), self.cache.attention(batch))

    def run(self, ids, pos, attend):
        with self.sampling():
            if self.tp.size == 1:
                return self.model.hidden(ids, pos, attend)
            n, rest = len(ids), -len(ids) % self.tp.size
            padded = lambda layer, q, k, v: F.pad(attend(layer, q[:n], k[:n], v[:n]), (0, 0, 0, 0, 0, rest))
            x = self.model.hidden(F.pad(ids, (0, rest)), F.pad(pos, (0, rest)), padded)
            return parallel.gather_rows(x, self.tp)[:n]

    def logits(self, x, at):
        """-> (len(at), V) of those rows of x: float32, or float64; on the CPU where the device has no float64
        (Apple's GPUs)"""
        x = x[_upload(np.array(at, np.int64), x.device)]
        z = K.product(x, self.model.lm_head.weight.to(x.dtype))
        if self.tp.size > 1:
            z = parallel.gather_words(z, self.model.config.vocab_size, self.tp)
        return z.cpu() if z.device.type == 'mps' else z


class Graphs:
    """Decode steps on CUDA: one captured graph of GPT.hidden for each power of two of rows. A step of a small
    model is some hundred launches of a few microseconds each; a graph makes them one. Rows beyond the batch
    do nothing: slot -1, length 0."""

    def __init__(self, forward, rows):
        self.forward, self.cache = forward, forward.cache
        self.most = 1 << max(0, rows - 1).bit_length()
        self.graphs, self.pool = {}, None

    def clear(self):
        self.graphs.clear()

    def hidden(self, batch):
        count = len(batch.decode)
        size = 1 << max(0, count - 1).bit_length()
        for n in (self.most, size):  # the largest first: the others fit into its memory
            if n not in self.graphs:
                self.graphs[n] = self._capture(n)
        graph, buffers, stages = self.graphs[size][:3]
        stages.reverse()  # two take turns: what was copied for the last step may still be on its way
        self._fill(stages[0], batch)
        ids = batch.drawn
        if ids is None:
            ids = torch.tensor(batch.ids(), pin_memory=self.cache.device.type == 'cuda')
        buffers[0][:count].copy_(ids, non_blocking=True)
        for buffer, value in zip(buffers[1:], stages[0][:3] + [stages[0][3].tensor]):
            buffer.copy_(value, non_blocking=True)
        graph.replay()
        return self.graphs[size][3][:count]

    def _capture(self, n):
        device, width = self.cache.device, self.cache.width
        ids, pos = (torch.zeros(n, dtype=torch.int64, device=device) for _ in range(2))
        slots, lens = torch.full_like(ids, -1), torch.zeros(n, dtype=torch.int32, device=device)
        table = torch.zeros(n, width, dtype=torch.int32, device=device)
        attend = self.cache.decode_attention(slots, lens, table)
        run = lambda: self.forward.run(ids, pos, attend)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # kernels compile outside the capture
            run()
            run()
        torch.cuda.current_stream().wait_stream(stream)
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            out = run()
        return graph, [ids, pos, slots, lens, table], [self._stage(n) for _ in range(2)], out

    def _stage(self, n):
        """Pinned memory for positions, slots, lengths and tables: from any other a copy to the GPU would wait
        for it."""
        pinned = self.cache.device.type == 'cuda'
        new = lambda dtype: torch.zeros(n, dtype=dtype, pin_memory=pinned)
        return [new(torch.int64), new(torch.int64), new(torch.int32), Tables(n, self.cache.width, pinned)]

    def _fill(self, stage, batch):
        (pos, slots, lens), tables = (t.numpy() for t in stage[:3]), stage[3]
        n, size = len(batch.decode), self.cache.size
        table = tables.fill(batch.decode)
        pos[:n], lens[:n] = batch.pos, batch.pos + 1
        slots[n:], lens[n:] = -1, 0
        slots[:n] = table[np.arange(n), batch.pos // size].astype(np.int64) * size + batch.pos % size


# -----------------------------------------------------------------------------
# 4. sampling


def _mix(*parts):
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), 'little')


def uniform(keys, t):
    """One number in [0, 1) per (key, position): SplitMix64 (Steele 2014) as a counter. keys, t uint64 arrays
    -> float64 array."""
    z = keys + (t + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) * 2.0 ** -53


class Settings:
    """The SamplingParams of a batch as arrays; kept while the batch stays the same. ends: token ids that end
    an answer."""

    def __init__(self, rows, ends, device, dtype):
        self.rows, self.device, self.columns = list(rows), device, {}
        self.params = [r.params for r in rows]
        self.keys = np.array([r.key for r in rows], np.uint64)
        self.limit = np.array([r.limit - r.P for r in rows])
        stops = [([] if p.ignore_eos else list(ends)) + p.stop_token_ids for p in self.params]
        width = max(1, *map(len, stops)) if stops else 1
        self.stop_ids = np.array([ids + [-1] * (width - len(ids)) for ids in stops])
        self.min_tokens = np.array([p.min_tokens for p in self.params])
        self.top = max((p.logprobs for p in self.params), default=0)
        self.heat = self.column(
            'temperature', range(len(rows)), torch.float64 if dtype == torch.float64 else torch.float32
        )
        self.biased = self.where(lambda p: p.logit_bias)
        self.repeats = self.where(lambda p: p.repetition_penalty != 1)
        self.counts = self.where(lambda p: p.presence_penalty or p.frequency_penalty)
        self.cuts = self.where(lambda p: p.cuts)
        # a step may start before the tokens of the last one are known, if nothing hangs on them
        self.static = not (self.repeats or self.counts or self.top or self.min_tokens.any())

    def where(self, test):
        return [i for i, p in enumerate(self.params) if test(p)]

    def column(self, name, rows, dtype):
        if name not in self.columns:
            values = torch.tensor([getattr(self.params[i], name) for i in rows], dtype=dtype)
            self.columns[name] = _upload(values.numpy(), self.device)
        return self.columns[name]


def _occurrences(rows, V, device):
    """rows: lists of tokens -> (n, V) how often each occurs."""
    flat = torch.tensor(
        [i * V + t for i, row in enumerate(rows) for t in row], dtype=torch.long, device=device
    )
    return torch.bincount(flat, minlength=len(rows) * V).view(len(rows), V)


def _cut(z, k, p, m):
    """min-p, then top-k, then top-p, each over what the one before left: -inf where a token is out. z (n, V)
    logits already at temperature; k (n,) int, 0 = off; p, m (n,). Each rule keeps the tokens above a
    threshold; equal logits stay or go together. Works on the largest few hundred logits where they hold
    enough mass: sorting 50,257 takes 70 times as long."""
    V = z.size(-1)
    floor = torch.where(m > 0, z.amax(-1).double() + m.clamp_min(1e-300).log(), float('-inf'))[:, None]
    whole, width = z.logsumexp(-1, keepdim=True).double(), min(V, max(256, int(k.max())))
    while True:
        top = z.topk(width, -1)[0].double()
        top = top.masked_fill(top < floor, float('-inf'))
        limit = top.gather(-1, torch.where((k > 0) & (k < width), k - 1, width - 1)[:, None])
        inside = (k > 0)[:, None] | (limit == float('-inf'))  # what min-p and top-k left lies all in `top`
        top = top.masked_fill(top < limit, float('-inf'))
        probs = (top - torch.where(inside, top.logsumexp(-1, keepdim=True), whole)).exp()
        before = probs.cumsum(-1) - probs
        enough = inside[:, 0] | (p >= 1) | ((m <= 0) & (before[:, -1] >= p))
        if width == V or bool(enough.all()):
            break
        width = min(V, width * 8)
    floor = torch.where((k > 0)[:, None], floor.maximum(limit), floor)
    last = ((before < p[:, None]) & (top > float('-inf'))).sum(-1, keepdim=True).clamp_min(1) - 1
    floor = torch.where((p < 1)[:, None], floor.maximum(top.gather(-1, last)), floor)
    return z.masked_fill(z < floor.to(z.dtype), float('-inf'))


def processed(logits, s, outs):
    """The logits that are drawn from, before temperature: bias, min_tokens, penalties, cuts. `logits` itself
    where nothing is to do."""
    early = np.nonzero(outs < s.min_tokens)[0].tolist()
    if not (early or s.biased or s.repeats or s.counts or s.cuts):
        return logits
    z, V = logits.clone(), logits.size(-1)
    for i in s.biased:
        bias = s.params[i].logit_bias
        z[i, list(bias)] += torch.tensor(list(bias.values()), dtype=z.dtype, device=z.device)
    for i in early:
        z[i, [t for t in s.stop_ids[i].tolist() if t >= 0]] = float('-inf')
    if s.repeats:
        part, penalty = z[s.repeats], s.column('repetition_penalty', s.repeats, z.dtype)[:, None]
        seen = _occurrences([s.rows[i].tokens for i in s.repeats], V, z.device) > 0
        z[s.repeats] = torch.where(seen, torch.where(part > 0, part / penalty, part * penalty), part)
    if s.counts:
        count = _occurrences([s.rows[i].out() for i in s.counts], V, z.device)
        presence, frequency = (
            s.column(name, s.counts, z.dtype)[:, None] for name in ('presence_penalty', 'frequency_penalty')
        )
        z[s.counts] -= count * frequency + (count > 0) * presence
    if s.cuts:
        part = z[s.cuts]
        k, p, m = (
            s.column(name, s.cuts, dtype)
            for name, dtype in (('top_k', torch.long), ('top_p', torch.float64), ('min_p', torch.float64))
        )
        out = _cut(part / s.heat[s.cuts, None].to(z.dtype), k, p, m) == float('-inf')
        z[s.cuts] = part.masked_fill(out, float('-inf'))
    return z


def sample(logits, s, outs):
    """logits (n, V), row i for s.rows[i]; outs (n,) tokens that it has written before. -> tokens (n,) int64,
    logprobs, raw_logprobs (n,), all on the logits' device, and top: [(ids, logprobs)] or None."""
    z = processed(logits, s, outs)
    u = _upload(uniform(s.keys, outs.astype(np.uint64)), z.device)
    tokens, logprobs, raw = K.draw(z, u, s.heat)
    if z is not logits:
        raw = logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
        logprobs = torch.where(s.heat > 0, logprobs, raw)  # greedy text is scored by the plain distribution
    if not s.top:
        return tokens, logprobs, raw, None
    best = logits.topk(min(s.top, logits.size(-1)), -1)
    scores = best.values - logits.logsumexp(-1, keepdim=True)
    return tokens, logprobs, raw, list(zip(best.indices.tolist(), scores.tolist()))


class Drawn:
    """What a step has drawn for its rows, perhaps still on its way from the GPU: `tokens` stays there, for
    the step behind."""

    def __init__(self, settings, outs, tokens, logprobs, raw, top):
        self.settings, self.rows, self.outs = settings, settings.rows, outs
        self.tokens, self.top = tokens, top
        self.host, self.ready = (tokens, logprobs, raw), None
        if tokens.is_cuda:
            self.host = [
                torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True)
                for t in self.host
            ]
            self.ready = torch.cuda.Event()
            self.ready.record()

    def read(self):
        """Waits. -> tokens, logprobs, raw_logprobs as NumPy arrays; FloatingPointError when the logits were
        not finite."""
        if self.ready is not None:
            self.ready.synchronize()
        tokens, logprobs, raw = (t.numpy() for t in self.host)
        if not np.isfinite(raw).all():
            bad = int((~np.isfinite(raw)).sum())
            raise FloatingPointError(
                f'the logits of {bad} of {len(raw)} rows are not finite: the weights have overflowed'
            )
        return tokens, logprobs, raw


# -----------------------------------------------------------------------------
# 5. who runs


class Scheduler:
    """Decides which requests run and gives them blocks. `budget`: tokens of a step at most."""

    def __init__(self, blocks, cache, max_num_seqs, budget, prefix_caching):
        self.blocks, self.cache, self.prefix_caching = blocks, cache, prefix_caching
        self.max_num_seqs, self.budget = max_num_seqs, budget
        self.waiting, self.running = deque(), []
        self.version = 0  # of the weights
        self.counts = dict(steps=0, output_tokens=0, prompt_tokens=0, cached_tokens=0, preemptions=0)

    def schedule(self):
        """-> Batch: first what runs, oldest first, then who waits. Memory short: the youngest is thrown out
        and starts over later."""
        self.left, decode, chunks = self.budget, [], []
        i = 0
        while i < len(self.running):  # placing one may throw out the last
            self._place(self.running[i], decode, chunks)
            i += 1
        while self.waiting and self.left and self.may_start() and self._admit(self.waiting[0]):
            self._place(self.running[-1], decode, chunks)
        return Batch(decode, chunks)

    def may_start(self):
        return len(self.running) < self.max_num_seqs

    def _place(self, r, decode, chunks):
        """Gives r its part of the step: one token, or a chunk of what it has not computed yet."""
        n = min(len(r.tokens) - r.n, self.left)
        if not n:
            return
        while not self.has_room(r, r.n + n):
            if self.preempt() is r:  # r itself was the youngest
                return
        self.left -= n
        if r.n == len(r.tokens) - 1 and not r.siblings:
            decode.append(r)
        else:
            chunks.append((r, r.n, n))

    def has_room(self, r, n):
        """Blocks for n tokens of r, if they are to be had."""
        more = self.blocks.count(n) - len(r.blocks)
        if more > self.blocks.available():
            return False
        r.blocks += [self.blocks.take() for _ in range(more)]
        return True

    def _admit(self, r):
        """Blocks for all of r's tokens, cached ones where there are; False when they are not to be had
        yet."""
        found = []
        if self.prefix_caching:
            found = self.blocks.match(self.blocks.names(r.tokens, r.names, self.version), r.tokens)
        for block in found:
            self.blocks.hold(block)
        need = self.blocks.count(len(r.tokens)) - len(found)
        # one to spare, or it would be thrown out at once
        if self.blocks.available() < need + bool(self.running):
            self.blocks.drop(found)
            return False
        self.waiting.popleft()
        self._start(r, found + [self.blocks.take() for _ in range(need)], len(found) * self.blocks.size)
        r.named = len(found)
        self.counts['cached_tokens'] += r.n
        self.counts['prompt_tokens'] += len(r.tokens)
        return True

    def _start(self, r, blocks, n):
        r.blocks, r.n, r.kv_version = blocks, n, self.version
        self.running.append(r)

    def preempt(self):
        """The youngest that runs loses its keys and values and waits, first in line; it goes on with the same
        tokens. -> that request"""
        victim = self.running.pop()
        self.release(victim)
        victim.names, victim.n = [], 0
        self.waiting.appendleft(victim)
        self.counts['preemptions'] += 1
        return victim

    def advance(self, batch):
        """After the forward: -> requests whose next token is to be drawn, and for each the row of the batch
        behind which it comes."""
        rows, at = list(batch.decode), list(range(len(batch.decode)))
        end = len(batch.decode)
        for r, first, n in batch.chunks:
            end += n
            r.n = first + n
            if self.prefix_caching:
                self._publish(r)
            if r.n == len(r.tokens):
                started = [r, *self._fork(r)]
                rows += started
                at += [end - 1] * len(started)
        return rows, at

    def _fork(self, r):
        """The other samples of r's prompt take over its keys and values: full blocks are shared, the
        unfinished one is copied."""
        started, later, full = [], [], r.n // self.blocks.size
        rest = self.blocks.count(r.n) - full
        for s in r.siblings:
            if not self.may_start() or self.blocks.available() < rest + 1:
                later.append(s)
                continue
            for block in r.blocks[:full]:
                self.blocks.hold(block)
            self._start(s, r.blocks[:full] + [self.blocks.take() for _ in range(rest)], r.n)
            s.kv_version, s.names, s.named = r.kv_version, list(r.names), r.named
            if rest:
                self.cache.copy_block(r.blocks[full], s.blocks[full])
            started.append(s)
        self.waiting.extendleft(reversed(later))
        r.siblings = []
        return started

    def _publish(self, r):
        """r's full blocks into the prefix cache, unless other weights computed them."""
        full, size = r.n // self.blocks.size, self.blocks.size
        if r.kv_version != self.version or r.named >= full:
            return
        names = self.blocks.names(r.tokens, r.names, self.version)
        for i in range(r.named, full):
            self.blocks.publish(r.blocks[i], names[i], r.tokens[i * size:(i + 1) * size])
        r.named = full

    def release(self, r):
        if self.prefix_caching:
            self._publish(r)
        self.blocks.drop(r.blocks)
        r.blocks = []

    def remove(self, r):
        """r has ended, wherever it was."""
        if r in self.running:
            self.running.remove(r)
            self.release(r)
        elif r in self.waiting:
            self.waiting.remove(r)


# -----------------------------------------------------------------------------
# 6. the engine


class Engine:
    """Many requests, one model. generate() for batches; add_request() and step() for streams; safe to call
    from several threads, one step at a time. `model` is read where it lies: after an optimizer step call
    weights_changed(), or load_weights(state) to copy weights in. A model cut by parallel.cut: every rank of
    its group makes the same calls in the same order. max_len: tokens of a sequence at most, 0 = the model's
    context. kv_memory: bytes that keys and values may take, 0 = half of what is free.

    engine = Engine(model, tok); [c.text for c in engine.generate(['Once', 'Two'],
    SamplingParams(max_tokens=8, temperature=0))]"""

    def __init__(self, model, tokenizer=None, max_num_seqs=256, max_num_batched_tokens=2048, block_size=0,
                 num_blocks=0, prefix_caching=True, max_len=0, seed=1337, threads=0, kv_memory=0):
        c, weight = model.config, model.wte.weight
        self.model, self.tokenizer, self.eot = model, tokenizer, getattr(tokenizer, 'eot', None)
        self.device, self.dtype, self.seed = weight.device, weight.dtype, seed
        self.vocab_size, self.max_len = c.vocab_size, min(max_len or c.block_size, c.block_size)
        self.tp = getattr(model, 'tp', parallel.ALONE.tp)
        self.native = self._fits_c()
        block_size = block_size or (64 if self.device.type == 'cpu' else 16)
        for name, value in dict(max_num_seqs=max_num_seqs, block_size=block_size).items():
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
        cache = self._make_cache(max_num_seqs, block_size, num_blocks, kv_memory)
        self.forward = (K.native.Forward if self.native else Forward)(model, cache)
        self.blocks = Blocks(self.num_blocks, block_size)
        self.scheduler = Scheduler(self.blocks, cache, max_num_seqs, max_num_batched_tokens, prefix_caching)
        self.counts, self.weight_version = self.scheduler.counts, 0
        tiny = self.native and sum(p.numel() for p in model.parameters()) < 4e6
        self.threads = threads or int(tiny)
        self.requests, self.undelivered = {}, []  # id -> its samples; events that the next step() hands out
        self.numbers, self.settings, self.lock = itertools.count(), None, threading.RLock()
        # a twin waits for the GPU, so it cannot be captured
        captured = self.device.type == 'cuda' and self.tp.size == 1 and K.which() == 'triton (CUDA)'
        self.graphs = Graphs(self.forward, max_num_seqs) if captured else None
        self.ahead, self.flight = captured, None  # see _start_ahead

    def _fits_c(self):
        """Is the forward that of native.c? It has no tensor parallelism and not every activation."""
        able = K.in_c(self.model.wte.weight) and self.tp.size == 1
        return able and K.native.forward(self.model.config) is not None

    def _make_cache(self, max_num_seqs, block_size, num_blocks, kv_memory):
        if num_blocks < 0:
            raise ValueError(f'num_blocks must be 0 (as many as fit) or more, got {num_blocks}')
        if self.native and block_size % 16:
            raise ValueError(f'block_size {block_size}: C wants a multiple of 16; --kernels=torch takes any')
        attn, c = self.model.h[0].attn, self.model.config
        self.config = replace(c, n_head=attn.n_head, n_kv_head=attn.n_kv_head)  # of a tp rank: its own heads
        width = K.native.padded(c.head_size) if self.native else c.head_size
        shape = replace(self.config, head_size=width)
        numbers = 2 * c.n_layer * block_size * shape.n_kv_head * width  # keys and values of a block
        block_bytes = numbers * self.dtype.itemsize
        wanted = max_num_seqs * -(-self.max_len // block_size)
        room = kv_memory or _free_memory(self.device) // 2
        fits = self.tp.least(room // block_bytes, self.device)
        self.num_blocks = num_blocks or max(1, min(wanted, fits))
        self.kv_bytes = self.num_blocks * block_bytes
        return KVCache(shape, self.num_blocks, block_size, self.max_len, max_num_seqs, self.model.wte.weight)

    def __repr__(self):
        where = K.which()
        if self.device.type == 'cpu':
            where = f'CPU{" in C" if self.native else ""}, {self.threads or torch.get_num_threads()} threads'
        memory = f'{self.num_blocks} blocks x {self.blocks.size} tokens = {self.kv_bytes / 1e6:.0f} MB'
        return (
            f'engine: {str(self.dtype)[6:]} on {where}, {memory} of keys and values at most, '
            f'{self.scheduler.max_num_seqs} requests at once'
        )

    # ---- requests in
    # ---------------------------------------------------------------------------------------------

    def check(self, prompt, params):
        """The prompt as ids. ValueError for what can never run."""
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError('a text prompt needs an engine with a tokenizer; or give token ids')
            # Llama's <s>
            prompt = prompt and [*getattr(self.tokenizer, 'prefix', ()), *self.tokenizer.encode(prompt)]
        try:
            prompt = [operator.index(token) for token in prompt]
        except TypeError:
            raise ValueError(f'a prompt is a text or a list of token ids, got {prompt!r:.80}') from None
        if not prompt:
            raise ValueError('the prompt is empty: give at least one token (the end token, for instance)')
        outside = [t for t in (min(prompt), max(prompt)) if not 0 <= t < self.vocab_size]
        if outside:
            raise ValueError(f'token id {outside[0]} is outside the vocabulary of {self.vocab_size}')
        if len(prompt) >= self.max_len:
            raise ValueError(
                f'the prompt has {len(prompt)} tokens, the context is {self.max_len}: make room for an answer'
            )
        need = self.blocks.count(min(len(prompt) + params.max_tokens, self.max_len))
        if need > self.num_blocks:
            raise ValueError(
                f'prompt + max_tokens need {need} of {self.num_blocks} blocks: lower max_tokens or add blocks'
            )
        outside = [t for t in [*params.logit_bias, *params.stop_token_ids] if not 0 <= t < self.vocab_size]
        if outside:
            raise ValueError(
                f'token id {outside[0]} of logit_bias or stop_token_ids is outside the vocabulary'
            )
        return prompt

    def add_request(self, prompt, params=None, request_id=None):
        """Queues a prompt (str or token ids); its outputs come from step(). Returns its id. ValueError for
        what can never run."""
        return self.submit(prompt, params or SamplingParams(), request_id, stream=True)[0].id

    def submit(self, prompt, params, request_id=None, stream=False):
        """Queues a prompt -> its samples, a Request each, done when they have a finish_reason. stream: step()
        tells of them."""
        prompt = self.check(prompt, params)
        with self.lock:
            number = next(self.numbers)
            request_id = number if request_id is None else request_id
            if request_id in self.requests:
                raise ValueError(f'request id {request_id!r} is already running')
            seed = params.seed if params.seed is not None else _mix(self.seed, number)
            limit = min(len(prompt) + params.max_tokens, self.max_len)
            group = [
                Request(request_id, i, prompt, params, _mix(seed, i), limit, stream, self.tokenizer)
                for i in range(params.n)
            ]
            group[0].siblings = group[1:]  # they fork from the first once its prompt is in
            self.requests[request_id] = group
            self.scheduler.waiting.append(group[0])
        return group

    def generate(self, prompts, params=None):
        """prompts: [str | [int]], params: one SamplingParams or one for each -> [Completion], in order,
        prompt-major when n > 1."""
        if isinstance(prompts, str):
            raise ValueError('generate wants a list of prompts; for one text: generate([text])')
        params = params if isinstance(params, (list, tuple)) else [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(
                f'{len(prompts)} prompts but {len(params)} SamplingParams: give one, or one for each'
            )
        prompts = [self.check(x, p) for x, p in zip(prompts, params)]  # all of them before one runs
        with self.lock:
            groups = [self.submit(x, p) for x, p in zip(prompts, params)]
        mine = {group[0].id for group in groups}
        with self._threads():
            while mine & self.requests.keys():
                with self.lock:
                    self.undelivered += self._step()
        return [r.completion(i) for i, group in enumerate(groups) for r in group]

    # ---- one step
    # --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _threads(self):
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def step(self):
        """One forward for whatever runs. -> [{request_id, index, token_ids (new), text (new), finished,
        finish_reason, logprobs, raw_logprobs, top_logprobs (of the new ones)}] of the requests that came in
        by add_request."""
        with self.lock, self._threads():
            events, self.undelivered = self.undelivered + self._step(), []
        return events

    def has_unfinished(self):
        return bool(self.requests or self.undelivered)

    @torch.inference_mode()
    def _step(self):
        """Schedule, forward, sample. -> events of streaming requests."""
        try:
            if self.flight is not None:
                before, self.flight = self.flight, None
                self.flight = self._start_ahead(before)
                return self._land(before)
            batch = self.scheduler.schedule()
            if not batch.requests:
                return []
            x = self._hidden(batch)
            rows, at = self.scheduler.advance(batch)
            if not rows:
                return []
            drawn = self._draw(rows, self._logits(x, at))
            alone = not batch.chunks and len(rows) == len(self.scheduler.running)
            if self.ahead and alone and drawn.settings.static:
                self.flight = drawn  # the next step starts before this one is read
                return []
            return self._land(drawn)
        except FloatingPointError:
            self._reset()
            raise

    def _start_ahead(self, drawn):
        """Asynchronous scheduling (CUDA): the decode step behind `drawn`, started before its tokens are known
        here: they go from one step to the next on the GPU, which never waits for this program's bookkeeping.
        None when it hangs on more than them: on who is admitted, or thrown out, next. A row that turns out to
        have ended is computed once more for nothing; _land ignores it."""
        scheduler = self.scheduler
        if scheduler.waiting and scheduler.may_start():
            return None
        keep = [
            i for i, r in enumerate(drawn.rows) if r.finish_reason is None and len(r.tokens) + 1 < r.limit
        ]
        rows, tokens = [drawn.rows[i] for i in keep], drawn.tokens
        if not rows or not all(scheduler.has_room(r, len(r.tokens) + 1) for r in rows):
            return None
        if len(rows) < len(drawn.rows):
            tokens = tokens[_upload(np.array(keep), self.device)]
        x = self._hidden(Batch(rows, [], tokens))
        return self._draw(rows, self._logits(x, range(len(rows))), 1)

    def _hidden(self, batch):
        self.counts['steps'] += 1
        captured = self.graphs is not None and not batch.chunks
        return (self.graphs if captured else self.forward).hidden(batch)

    def _logits(self, x, at):
        """(len(at), V). Samples of one prompt stand behind the same row of x, whose logits are computed
        once."""
        rows, back = np.unique(at, return_inverse=True)
        z = self.forward.logits(x, rows)
        return z if len(rows) == len(at) else z[_upload(back, z.device)]

    def _draw(self, rows, logits, ahead=0):
        """Draws for every row. ahead: tokens of each that are drawn but not yet read."""
        if self.settings is None or rows != self.settings.rows:
            self.settings = Settings(rows, self.end_ids(), logits.device, logits.dtype)
        outs = np.array([len(r.tokens) - r.P + ahead for r in rows])
        *drawn, top = sample(logits, self.settings, outs)
        # all hold the same logits; one draw counts, whatever the last bit of a GPU's sum says
        if self.tp.size > 1:
            drawn = self.tp.broadcast(torch.stack([t.double() for t in drawn]), 0, 'tokens')
            drawn = [drawn[0].long(), *drawn[1:]]
        return Drawn(self.settings, outs, *drawn, top)

    def end_ids(self):
        """All tokens that end an answer: the tokenizer's, and those of config.json and
        generation_config.json."""
        eos = getattr(self.model.config, 'eos_token_id', None)
        ids = [
            self.eot,
            *getattr(self.tokenizer, 'stop_ids', ()),
            *(eos if isinstance(eos, (list, tuple)) else [eos]),
        ]
        return sorted({t for t in ids if t is not None and 0 <= t < self.vocab_size})

    def _land(self, drawn):
        """Reads what was drawn, appends it, ends what is done; rows of requests that ended in the meantime
        are ignored. -> events"""
        tokens, logprobs, raw = drawn.read()
        s, events = drawn.settings, []
        closed = (s.stop_ids == tokens[:, None]).any(1) & (drawn.outs >= s.min_tokens)
        last = drawn.outs + 1 >= s.limit
        columns = (x.tolist() for x in (tokens, logprobs, raw, closed, last))
        for i, (r, token, logprob, raw_logprob, is_end, is_last) in enumerate(zip(drawn.rows, *columns)):
            if r.finish_reason is not None:
                continue
            r.n = len(r.tokens)
            r.tokens.append(token)
            r.logprobs.append(logprob)
            r.raw_logprobs.append(raw_logprob)
            r.versions.append(self.weight_version)
            self.counts['output_tokens'] += 1
            if r.params.logprobs:
                ids, scores = drawn.top[i]
                r.top_logprobs.append(dict(zip(ids[:r.params.logprobs], scores)))
            r.closed = is_end
            if is_end or r.params.stop and r.hits_stop():
                r.finish_reason = 'stop'
            elif is_last:
                r.finish_reason = 'length'
            if r.stream:
                events.append(r.event())
            if r.finish_reason is not None:
                self._end(r)
        return events

    def _end(self, r):
        self.scheduler.remove(r)
        if all(x.finish_reason is not None for x in self.requests.get(r.id, ())):
            self.requests.pop(r.id, None)

    @torch.inference_mode()
    def _settle(self):
        """Reads the step that is still on its way, if there is one; its events come with the next step()."""
        drawn, self.flight = self.flight, None
        if drawn is None:
            return
        try:
            self.undelivered += self._land(drawn)
        except FloatingPointError:
            self._reset()
            raise

    # ---- verbs
    # -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def score(self, ids, top=0):
        """[(log-prob, {token: log-prob} of the `top` largest)] of a prompt's tokens by the model itself;
        the first has none."""
        found = [(None, {})]
        with self.lock:
            x = self.model.encode(torch.tensor([ids], device=self.device))[0]
            for part in x[:-1].split(256):  # logits of 256 tokens at a time
                logp = self.model.logits(part).log_softmax(-1)
                values, tokens = logp.topk(min(top, self.vocab_size), -1)
                for row, best, names in zip(logp, values.tolist(), tokens.tolist()):
                    found.append((float(row[ids[len(found)]]), dict(zip(names, best))))
        return found

    def text_of(self, token, before):
        """The text of a token behind others; '' while a UTF-8 character is not complete."""
        before = before[-8:]
        known = self.tokenizer.decode(before).rstrip('\ufffd')
        text = self.tokenizer.decode([*before, token])
        return '' if text.endswith('\ufffd') else text[len(known):]

    def abort(self, request_id):
        """Ends all samples of a request and frees its blocks; nothing happens when it has ended."""
        with self.lock:
            for r in self.requests.pop(request_id, ()):
                if r.finish_reason is None:
                    r.finish_reason = 'abort'
                    self.scheduler.remove(r)

    def load_weights(self, state, version=None, recompute=False):
        """Copies a state dict of the model in place, also between two tokens of a request; see
        weights_changed. ValueError when a name or a shape is another model's; nothing is changed then."""
        own, tie = self.model.state_dict(), self.model.config.tie
        for name in own.keys() | state.keys():
            if name == 'lm_head.weight' and tie and name not in state:
                continue
            want, got = (list(t[name].shape) if name in t else 'no such tensor' for t in (own, state))
            if want != got:
                raise ValueError(
                    f"load_weights: these are another model's: {name} is {got} there and {want} here"
                )
        with self.lock, torch.no_grad():
            self._settle()
            for name, tensor in state.items():
                own[name].copy_(tensor)
            self.weights_changed(version, recompute)

    def weights_changed(self, version=None, recompute=False):
        """To be called after the model's weights were changed where they lie. The prefix cache is emptied;
        running requests keep their keys and values (made by the old weights) and go on under the new ones.
        recompute: keys and values of what runs are made anew (AReaL's way), so that each token comes from one
        set of weights exactly. Returns the version."""
        with self.lock:
            self._settle()
            while recompute and self.scheduler.running:
                self.scheduler.preempt()
            if self.forward.refresh() and self.graphs is not None:
                self.graphs.clear()
            self.weight_version = self.weight_version + 1 if version is None else version
            self.scheduler.version = self.weight_version
            self.blocks.forget()
            for r in self.scheduler.waiting:
                r.names = []
        return self.weight_version

    def _reset(self):
        """After logits that are not finite: nothing in the cache can be trusted."""
        self.flight = None
        for request_id in list(self.requests):
            self.abort(request_id)
        self.blocks.forget()

    def stats(self):
        """{num_blocks, free_blocks, cached_blocks, running, waiting, weight_version} and counts since the
        start. It does not wait for a step that is being made."""
        groups = list(self.requests.values())
        alive = sum(r.finish_reason is None for group in groups for r in group)
        running = len(self.scheduler.running)
        return dict(
            num_blocks=self.num_blocks,
            free_blocks=len(self.blocks.free),
            cached_blocks=len(self.blocks.cached),
            running=running,
            waiting=alive - running,
            weight_version=self.weight_version,
            **self.counts,
        )


def _free_memory(device):
    """Bytes. A CPU's are an upper bound (macOS tells only the size of its memory): pages are provided when
    they are first written."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device)[0]
    for name in ('SC_AVPHYS_PAGES', 'SC_PHYS_PAGES'):
        if name in getattr(os, 'sysconf_names', ()):
            return os.sysconf(name) * mmap.PAGESIZE
    return 8 << 30


# -----------------------------------------------------------------------------
# 7. the command


def stream(engine, prompt, params, lead=''):
    """One prompt, printed as it comes, behind `lead` -> (text of sample 0, tokens, seconds). Samples after
    the first are printed whole."""
    print(lead, end='', flush=True)
    texts, count, began = [''] * params.n, 0, time.time()
    engine.add_request(prompt, params, 'cli')
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
    return texts[0], count, time.time() - began


def run_sample(engine, params):
    text = start
    if start.startswith('FILE:'):
        with open(start[5:], encoding='utf-8') as f:
            text = f.read()
    # --start= begins where texts begin
    prompt = encode_prompt(text, engine.tokenizer) or engine.end_ids()[:1]
    _, count, seconds = stream(engine, prompt, params, text)
    print(f'---------------\n{count} tokens in {seconds:.2f} s: {count / seconds:.1f} tok/s', file=sys.stderr)


def run_chat(engine, params):
    """Reads lines until the end of the input. The turns before are in the prefix cache, so only what is new
    is computed."""
    first = [dict(role='system', content=system)] if system else []
    messages = list(first)
    print('chat: an empty line or Ctrl-D ends it, /reset forgets, Ctrl-C stops an answer', file=sys.stderr)
    while line := _ask():
        if line == '/reset':
            messages = list(first)
            continue
        messages.append(dict(role='user', content=line))
        prompt = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        while len(prompt) + params.max_tokens > engine.max_len and len(messages) > len(first) + 1:
            del messages[len(first):len(first) + 2]
            print('(context full: the oldest turn is forgotten)', file=sys.stderr)
            prompt = engine.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        try:
            answer, count, seconds = stream(engine, prompt, params)
        except KeyboardInterrupt:
            print(file=sys.stderr)
            messages.pop()
            continue
        print(f'({count} tokens, {count / seconds:.0f} tok/s)', file=sys.stderr)
        messages.append(dict(role='assistant', content=answer))


def _ask():
    """A line of the user's, '' when there are no more."""
    try:
        return input('> ').strip()
    except (EOFError, KeyboardInterrupt):
        print(file=sys.stderr)
        return ''


def open_engine(config):
    """An engine for any checkpoint, from the keys of a command that needs one. dtype: 'auto' (bfloat16 on a
    GPU that has it, else float32), 'float32', 'bfloat16', 'float16' or 'float64'."""
    dtype, seed = config['dtype'], config['seed']
    K.use(config['kernels'])
    torch.manual_seed(seed)
    place, usual = pick_device(config['device'], 'auto')
    if dtype not in ('auto', 'float32', 'bfloat16', 'float16', 'float64'):
        raise ValueError(f"--dtype={dtype}: expected 'auto', 'float32', 'bfloat16', 'float16' or 'float64'")
    kind = usual if dtype == 'auto' else getattr(torch, dtype)
    model, tokenizer = load_model(config['init_from'], place, kind)
    names = 'max_num_seqs max_num_batched_tokens block_size num_blocks prefix_caching threads'.split()
    sizes = {name: config[name] for name in names}
    if place.type == 'cuda':
        # nobody else wants it; the rest is for activations
        sizes['kv_memory'] = int(0.9 * _free_memory(place))
    engine = Engine(model.eval(), get_tokenizer(tokenizer), seed=seed, **sizes)
    print(engine, file=sys.stderr)
    return engine


def main():
    engine = open_engine(config)
    params = SamplingParams(
        max_new_tokens,
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        stop=stop or None,
        seed=seed,
        n=1 if chat else num_samples,
    )
    (run_chat if chat else run_sample)(engine, params)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
