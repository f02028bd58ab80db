"""
native.c for Python: compiles it with the C compiler that is there, and hands tensors over.

Delete native.py and native.c, and everything still runs, slower: kernels.py and infer.py ask here first, and
have a PyTorch twin of each function. The same happens where there is no compiler, and one line on stderr says
so. Only float32 tensors on the CPU come here.
"""
import ctypes
import functools
import itertools
import os
import shutil
import struct
import subprocess
import sys
import tempfile

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'native.c')
FLAGS = ['-O3', '-fno-math-errno', '-fno-trapping-math', '-shared', '-fPIC']
# Of both the first that the compiler takes. An ARM Mac's takes -mcpu. OpenMP from gcc alone: its library is
# the one that torch has loaded, so there is one pool of threads; native.c refuses clang's, which would be a
# second pool that spins against torch's. -fopenmp-simd starts no threads.
MACHINE = ['-march=native'], ['-mcpu=native'], []
OPENMP = ['-fopenmp'], ['-fopenmp-simd'], []
ACTIVATIONS = dict(relu=2, gelu_tanh=3, gated=4)  # in native.c


# ----------------------------------------------------------------------------------------------------
# compile and call

@functools.lru_cache(None)
def _say(why):
    """One line for the user, once (and once for all processes of torchrun)."""
    if os.environ.get('RANK', '0') == '0':
        print(f'{why}, decoding is about 4 times faster with it', file=sys.stderr, flush=True)


def _complaint(*command):
    """Runs a compiler -> its first error, '' where all went well."""
    done = subprocess.run(command, capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if 'error' in line]
    return [*errors, done.stderr][0] if done.returncode else ''


@functools.lru_cache(None)
def library(part, **sizes):
    """One part of native.c ('DOCS', 'FORWARD', 'DRAW') for these sizes, by $CC or the first compiler found;
    else None, and a line says why."""
    names = os.environ.get('CC'), 'cc', 'gcc', 'clang'
    compiler = next((name for name in names if name and shutil.which(name)), None)
    if compiler is None:
        return _say('no C compiler: install gcc or clang')
    defines = [f'-D{name}={value}' for name, value in {part: 1, **sizes}.items()]
    # A folder of our own: nobody can leave a library there for us. Windows cannot remove a loaded one.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = os.path.join(folder, 'native.so')
        for machine, openmp in itertools.product(MACHINE, OPENMP):
            why = _complaint(compiler, *FLAGS, *machine, *openmp, *defines, SOURCE, '-o', file, '-lm')
            if not why:
                break
        try:
            return _say(f'native.c does not compile ({why})') if why else ctypes.CDLL(file)
        except OSError as e:
            return _say(f'native.c does not load ({e}; TMPDIR may name a folder from which it does)')


def _address(x):
    """Of a tensor or an array; NULL for None; numbers are themselves."""
    if isinstance(x, torch.Tensor):
        return x.data_ptr()
    return x.ctypes.data if isinstance(x, np.ndarray) else x or 0


def pack(*fields):
    """A C struct: tensors and arrays by their addresses (they must outlive it), int64 and double."""
    fields = [_address(x) for x in fields]
    return struct.pack(''.join('d' if isinstance(x, float) else 'q' for x in fields), *fields)


def call(function, *arguments):
    """Calls C with structs, tensors, arrays and int64. RuntimeError with what it says against them."""
    function.restype = ctypes.c_char_p
    fault = function(*(x if isinstance(x, bytes) else ctypes.c_int64(_address(x)) for x in arguments))
    if fault:
        raise RuntimeError(f'native.c: {function.__name__} needs {fault.decode()}')


# ----------------------------------------------------------------------------------------------------
# attention of packed documents

def docs(head_size):
    """The library for heads of this size, a multiple of 16; None without one."""
    return library('DOCS', HS=head_size)


class DocAttention(torch.autograd.Function):
    """kernels.doc_attention"""

    @staticmethod
    def forward(ctx, q, k, v, scale, rows, cu, first, tasks, longest):
        if q.shape[::2] != k.shape[::2] or k.shape != v.shape or q.shape[1] % k.shape[1]:
            shapes = [tuple(x.shape) for x in (q, k, v)]
            raise ValueError(f'q, k and v of the shapes {shapes} do not fit together')
        q, k, v = (x.contiguous() for x in (q, k, v))
        places = [x.long().contiguous() for x in (rows, cu, first, tasks)]
        counts = [len(q), len(rows), min(len(cu) - 1, len(first)), len(tasks) - 1]
        heads = [k.shape[1], q.shape[1] // k.shape[1]]
        out, lse = torch.zeros(q.shape), torch.empty(q.shape[:2])
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.places = places
        ctx.numbers = [*counts, longest, *heads, scale]
        struct = pack(q, k, v, *places, out, lse, *[None] * 4, *ctx.numbers)
        call(docs(q.shape[-1]).attend, struct)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        *qkv, out, lse = ctx.saved_tensors
        gradients = [torch.zeros_like(x) for x in qkv]
        dout = g.contiguous()
        struct = pack(*qkv, *ctx.places, out, lse, dout, *gradients, *ctx.numbers)
        call(docs(g.shape[-1]).attend, struct)
        return *gradients, *[None] * 6


# ----------------------------------------------------------------------------------------------------
# the engine's forward

def padded(n, to=16):
    """Floats of a head in the cache."""
    return -(-n // to) * to


def panels(*parts):
    """w (O, K) -> (ceil(O / 32), K, 32), the order in which C multiplies, zeros behind the last row. Two: in
    turns of 16 rows, as C wants a gate and its values."""
    wide = 32 // len(parts)
    turns = [F.pad(w, (0, 0, 0, -len(w) % wide)).view(-1, wide, w.shape[1]) for w in parts]
    return torch.cat(turns, 1).transpose(1, 2).contiguous()


def forward(c):
    """The library for the heads of this GPTConfig; None without one, or for an activation unknown to C."""
    if not c.gated and c.act not in ACTIVATIONS:
        return None
    return library('FORWARD', NKV=c.n_kv_head, G=c.n_head // c.n_kv_head, D=c.head_size)


class Forward:
    """The forward in C: float32 on a CPU, one call a step. Every matrix is copied in the order in which C
    multiplies it. A request's numbers are the same to the bit whatever is beside it and on however many
    threads."""

    def __init__(self, model, cache):
        self.model, self.config, self.cache = model, model.config, cache
        self.code, self.z = forward(model.config), torch.empty(0, 0)
        self.refresh()

    @torch.no_grad()
    def refresh(self):
        """Reads the model again: after an optimizer step, or when another adapter is in force. False: there
        is no graph to be stale."""
        m = self.model
        self.layers = self.ends = None  # first gives the memory back
        self.layers = [_layer(block) for block in m.h]
        self.table = np.array([[_address(x) for x in layer] for layer in self.layers])
        self.ends = [
            _weight(m.wte),
            None if m.wpe is None else m.wpe.weight,
            *_rotations(m),
            m.ln_f.weight,
            m.ln_f.bias,
            *_matrix([m.lm_head]),
        ]
        self.rows = 0  # that the work space has
        return False

    def _make_room(self, n):
        """The work space for n tokens. Rows a power of two apart would fall on the same lines of the CPU's
        cache: hence 16 floats more."""
        c = self.config
        self.rows = max(n, 2 * self.rows, 64)
        heads = (c.n_head + 2 * c.n_kv_head) * c.head_size
        stride = padded(max(c.n_embd, c.n_inner, heads), 32) + 16
        self.work = torch.zeros(5, self.rows, stride)  # x, y, qkv, att, mid
        act = ACTIVATIONS['gated' if c.gated else c.act]
        sizes = [c.n_embd, c.n_inner, c.vocab_size, c.block_size, act, c.norm == 'rms']
        scales = [float(c.norm_eps), c.head_size ** -0.5]
        self.net = pack(self.table, *self.ends, *self.work, stride, self.rows, *sizes, *scales)

    def hidden(self, batch):
        """-> (N, C) before the last norm, valid until the next call"""
        n, kv = len(batch.pos), self.cache.kv
        if n > self.rows:
            self._make_room(n)
        table = self.cache.tables.fill(batch.requests)
        places = pack(kv, table, *kv.stride()[:2], kv.shape[2], kv.shape[4], *table.shape)
        ids = np.array(batch.ids(), np.int64)
        longest = padded(int(batch.pos.max()) + 1)
        tokens = [ids, batch.owner, batch.pos, n, longest]
        call(self.code.forward, self.net, len(self.layers), places, *tokens)
        return self.work[0, :n, :self.config.n_embd]

    def logits(self, x, at):
        """-> (len(at), V) of those rows of x, valid until the next call. `at` has no row twice: the work
        space has as many as x."""
        n, V = len(at), self.config.vocab_size
        assert n <= len(x), f'{n} rows of logits from {len(x)} tokens'
        if len(self.z) < n:
            self.z = torch.empty(max(n, 2 * len(self.z)), padded(V, 32))
        call(self.code.logits, self.net, np.array(at, np.int64), n, self.z, *self.z.shape)
        return self.z[:n, :V]


def _layer(block):
    """What a layer of native.c holds."""
    attn, mlp = block.attn, block.mlp
    *inputs, output = [m for m in attn.children() if isinstance(m, nn.Linear)]
    *ups, down = mlp.children()
    return [
        block.ln_1.weight,
        block.ln_1.bias,
        *_matrix(inputs),
        *(None if norm is None else norm.weight for norm in (attn.q_norm, attn.k_norm)),
        *_matrix([output]),
        block.ln_2.weight,
        block.ln_2.bias,
        *_matrix(*([up] for up in ups)),
        *_matrix([down]),
    ]


def _rotations(m):
    """cos, sin (T, hs / 2) of rope, or None."""
    if m.inv_freq is None:
        return None, None
    angle = torch.arange(m.config.block_size)[:, None].float() * m.inv_freq.float()
    return angle.cos(), angle.sin()


def _matrix(*groups):
    """Weights and biases as panels. The Linear layers of a group stand one behind the other, two groups in
    turns."""
    weights = [torch.cat([_weight(layer) for layer in group]) for group in groups]
    biases = [torch.cat([_bias(layer) for layer in group]) for group in groups]
    return panels(*weights), panels(*biases)


def _weight(layer):
    """Of a Linear or Embedding; an adapter in force is merged in."""
    return layer.merged_weight() if getattr(layer, 'active', False) else layer.weight


def _bias(layer):
    return torch.zeros(layer.out_features, 1) if layer.bias is None else layer.bias[:, None]


# ----------------------------------------------------------------------------------------------------
# drawing a token

def draw(z, u, temperature):
    """kernels.draw for float32 logits z (n, V) whose rows are dense; None without a library."""
    code = library('DRAW')
    if code is None:
        return None
    n, V = z.shape
    u, temperature = u.double().contiguous(), temperature.float().contiguous()
    token = torch.empty(n, dtype=torch.long)
    logp, raw = torch.empty(2, n)
    fits = min(len(u), len(temperature))
    call(code.draw, z, z.stride(0), n, V, fits, u, temperature, token, logp, raw)
    return token, logp, raw
