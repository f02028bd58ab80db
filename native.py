"""
native.c for Python: compiles it with the C compiler that is there, and hands tensors over.

Delete native.py and native.c, and everything still runs, slower: kernels.py and infer.py ask here first, and
have a PyTorch twin of each function. The same happens where there is no compiler, and one line on stderr says
so. Only float32 tensors on the CPU come here.
"""
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

SOURCE = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'native.c')
FLAGS = ['-O3', '-fno-math-errno', '-fno-trapping-math', '-shared', '-fPIC']
MACHINE = ['-march=native', '-mcpu=native']  # the first that the compiler takes; on an ARM Mac the second
# OpenMP from gcc alone: its library is the one that torch has loaded, so there is one pool of threads. The
# threads of clang's would be a second pool that spins against torch's, and a Mac has none. -fopenmp-simd
# starts no threads.
OPENMP = ['-fopenmp', '-fopenmp-simd']
PROGRAM = """
#if defined _OPENMP && defined __clang__
#error not the OpenMP of torch
#endif
int number(void) { return 1; }
"""


# ----------------------------------------------------------------------------------------------------
# compile

@functools.lru_cache(None)
def _say(why):
    """One line for the user, once (and once for all processes of torchrun)."""
    if os.environ.get('RANK', '0') == '0':
        print(f'{why}, decoding is about 4 times faster with it', file=sys.stderr, flush=True)


def _complaint(*command):
    """Runs a compiler. -> its first error, '' where all went well."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as e:
        return str(e)
    errors = [line for line in done.stderr.splitlines() if 'error' in line] or [done.stderr.strip()]
    return errors[0] if done.returncode else ''


@functools.lru_cache(None)
def _compiler():
    """The C compiler, $CC or the first found, with what it takes of MACHINE and OPENMP; None without one."""
    found = [name for name in (os.environ.get('CC'), 'cc', 'gcc', 'clang') if name and shutil.which(name)]
    if not found:
        return None
    command = found[:1]
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, 'program.c')
        with open(file, 'w') as f:
            f.write(PROGRAM)
        for flags in (MACHINE, OPENMP):
            trial = [*command, '-shared', '-fPIC', file, '-o', file + '.so']
            command += [flag for flag in flags if not _complaint(*trial, flag)][:1]
    return command


@functools.lru_cache(None)
def library(part, **sizes):
    """One part of native.c ('DOCS', 'FORWARD', 'DRAW') for these sizes; else None, and a line says why."""
    if _compiler() is None:
        return _say('no C compiler: install gcc or clang')
    # A folder of our own: nobody can leave a library there for us. Windows cannot remove a loaded one.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = os.path.join(folder, 'native.so')
        defines = [f'-D{name}={value}' for name, value in sizes.items()]
        why = _complaint(*_compiler(), *FLAGS, f'-D{part}', *defines, SOURCE, '-o', file, '-lm')
        try:
            return _say(f'native.c does not compile ({why})') if why else ctypes.CDLL(file)
        except OSError as e:
            return _say(f'native.c does not load ({e}; TMPDIR may name a folder from which it does)')


def _check(fault, function, arguments):
    if fault:
        raise RuntimeError(f'native.c: {function.__name__} needs {fault.decode()}')


def _declared(function, *arguments):
    function.argtypes, function.restype, function.errcheck = arguments, ctypes.c_char_p, _check
    return function


POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _fields(pointers, ints, floats):
    """Fields of a C struct, in its order: addresses, then integers, then floats."""
    kinds = (pointers, POINTER), (ints, INT), (floats, FLOAT)
    return [(name, kind) for names, kind in kinds for name in names.split()]


# ----------------------------------------------------------------------------------------------------
# attention of packed documents

class Docs(ctypes.Structure):
    """docs in native.c."""
    _fields_ = _fields('q k v rows cu first tasks out lse dout dq dk dv',
                       'sq sk sv N M docs n_tasks longest nkv group', 'scale')

    @staticmethod
    def of(tensors, longest, scale):
        """tensors: by their names in C; they must outlive what this returns."""
        q, k, v = (tensors[name] for name in 'qkv')
        cu, first = tensors['cu'], tensors['first']
        strides = dict(sq=q.stride(0), sk=k.stride(0), sv=v.stride(0))
        counts = dict(N=len(q), M=len(tensors['rows']), docs=min(len(cu) - 1, len(first)))
        counts.update(n_tasks=len(tensors['tasks']) - 1, nkv=k.shape[1], group=q.shape[1] // k.shape[1])
        places = {name: t.data_ptr() for name, t in tensors.items()}
        return Docs(**places, **strides, **counts, longest=longest, scale=scale)


@functools.lru_cache(None)
def docs(head_size):
    """attend(Docs) for heads of this size, a multiple of 16; None without a library."""
    lib = library('DOCS', HS=head_size)
    return lib and _declared(lib.attend, POINTER)


class DocAttention(torch.autograd.Function):
    """kernels.doc_attention; layout: rows, cu, first, tasks, longest."""

    @staticmethod
    def forward(ctx, q, k, v, scale, *layout):
        if q.shape[::2] != k.shape[::2] or k.shape != v.shape or q.shape[1] % k.shape[1]:
            shapes = ', '.join(str(tuple(x.shape)) for x in (q, k, v))
            raise ValueError(f'q, k and v of the shapes {shapes} do not fit together')
        dense = [x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] for x in (q, k, v)]
        q, k, v = (x if ok else x.contiguous() for x, ok in zip((q, k, v), dense))
        out, lse = torch.zeros(q.shape), torch.empty(q.shape[:2])
        *places, longest = layout
        ctx.tensors = dict(zip(('rows', 'cu', 'first', 'tasks'), (t.long().contiguous() for t in places)))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.longest, ctx.scale = longest, scale
        m = Docs.of(dict(ctx.tensors, q=q, k=k, v=v, out=out, lse=lse), longest, scale)
        docs(q.shape[-1])(ctypes.byref(m))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        saved = ctx.saved_tensors
        q, k, v = saved[:3]
        out, lse = saved[3:]
        dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
        tensors = dict(ctx.tensors, q=q, k=k, v=v, out=out, lse=lse, dout=g.contiguous(), dq=dq, dk=dk, dv=dv)
        docs(q.shape[-1])(ctypes.byref(Docs.of(tensors, ctx.longest, ctx.scale)))
        return dq, dk, dv, *[None] * 6


# ----------------------------------------------------------------------------------------------------
# the engine's forward

LAYER = 'n1 n1b qkv qkvb qn kn o ob n2 n2b up upb down downb'.split()
ACTS = dict(relu=2, gelu_tanh=3, gated=4)


class Net(ctypes.Structure):
    """net in native.c: addresses of float32 weights (0: there is none) and of buffers, sizes, strides."""
    _fields_ = _fields('layers wte wpe cos sin nf nfb head headb x y qkv att mid',
                       'C inner V positions rows sx sq sa sm act rms', 'eps scale')


class Cache(ctypes.Structure):
    """cache in native.c."""
    _fields_ = _fields('keys table', 'values layer blocks size requests width', '')


def panels(w, gate=None):
    """w (O, K) -> (ceil(O / 32), K, 32), the order in which C multiplies, zeros behind the last row; with a
    gate (O, K): 16 rows of the gate, then 16 of w. A bias is w with K = 1."""
    (O, K), wide = w.shape, 32 if gate is None else 16
    parts = [F.pad(x, (0, 0, 0, -O % wide)).view(-1, wide, K) for x in (gate, w) if x is not None]
    return torch.cat(parts, 1).transpose(1, 2).contiguous()


def padded(head_size):
    """Floats of a head in the cache."""
    return -(-head_size // 16) * 16


def forward(c):
    """The library for the heads of this GPTConfig; None without one, or for an activation unknown to C."""
    if activation(c) is None:
        return None
    lib = library('FORWARD', NKV=c.n_kv_head, G=c.n_head // c.n_kv_head, D=c.head_size)
    if lib is not None:
        _declared(lib.forward, POINTER, INT, *[POINTER] * 4, INT, INT)
        _declared(lib.logits, POINTER, POINTER, INT, POINTER, INT, INT)
    return lib


def activation(c):
    return ACTS.get('gated' if c.gated else c.act)


class Forward:
    """The forward in C: float32 on a CPU, one call a step. Every matrix is copied in the order in which C
    multiplies it. A request's numbers are the same to the bit whatever is beside it and on however many
    threads."""

    def __init__(self, model, cache):
        self.model, self.config, self.cache = model, model.config, cache
        self.code, self.width = forward(model.config), padded(model.config.head_size)
        self.kept, self.work, self.z = {}, {}, torch.empty(0, 0)
        self.rows = 0  # that the work space has
        self.refresh()

    def keep(self, key, new):
        """The address of `new`, which is written into the same memory each time; 0 for None."""
        if new is None:
            return 0
        old = self.kept.setdefault(key, new)
        return _address(old if old is new else old.copy_(new))

    @torch.no_grad()
    def refresh(self):
        """Reads the model again: after an optimizer step, or when another adapter is in force. False: there
        is no graph to be stale."""
        c, m = self.config, self.model
        cos = sin = None
        if c.pos == 'rope':
            angle = torch.arange(c.block_size)[:, None].float() * m.inv_freq.float()
            cos, sin = angle.cos(), angle.sin()
        self.layers = np.array([self._layer(i, block) for i, block in enumerate(m.h)], np.int64)
        head, head_bias = _in_force(m.lm_head)
        norm, norm_bias = self._norm(m.ln_f)
        self.wte = _in_force(m.wte)[0]
        wpe = None if m.wpe is None else m.wpe.weight
        self.net = Net(
            layers=self.layers.ctypes.data,
            wte=_address(self.wte),
            wpe=_address(wpe),
            cos=self.keep('cos', cos),
            sin=self.keep('sin', sin),
            nf=norm,
            nfb=norm_bias,
            head=self.keep('head', panels(head)),
            headb=self._bias('head_bias', head_bias),
            C=c.n_embd,
            inner=c.n_inner,
            V=c.vocab_size,
            positions=c.block_size,
            act=activation(c),
            rms=c.norm == 'rms',
            eps=c.norm_eps,
            scale=c.head_size ** -0.5,
        )
        self.rows = 0
        return False

    def _layer(self, i, block):
        """Addresses of a layer's weights and biases, in the order of LAYER."""
        attn, mlp, gated = block.attn, block.mlp, self.config.gated
        if hasattr(attn, 'c_attn'):
            qkv, qkv_bias = _in_force(attn.c_attn)
        else:
            parts = [_in_force(part) for part in (attn.q_proj, attn.k_proj, attn.v_proj)]
            qkv = torch.cat([weight for weight, _ in parts])
            qkv_bias = None if parts[0][1] is None else torch.cat([bias for _, bias in parts])
        out, out_bias = _in_force(attn.c_proj if hasattr(attn, 'c_proj') else attn.o_proj)
        up, up_bias = _in_force(mlp.up_proj if gated else mlp.c_fc)
        gate, gate_bias = _in_force(mlp.gate_proj) if gated else (None, None)
        down, down_bias = _in_force(mlp.down_proj if gated else mlp.c_proj)
        norms = [0 if norm is None else norm.weight.data_ptr() for norm in (attn.q_norm, attn.k_norm)]
        qkv_bias = None if qkv_bias is None else self._pad_heads(qkv_bias[:, None])[:, 0]
        return [
            *self._norm(block.ln_1),
            self.keep((i, 'qkv'), panels(self._pad_heads(qkv))),
            self._bias((i, 'qkv_bias'), qkv_bias),
            *norms,
            self.keep((i, 'out'), panels(self._pad_heads(out.t()).t())),
            self._bias((i, 'out_bias'), out_bias),
            *self._norm(block.ln_2),
            self.keep((i, 'up'), panels(up, gate)),
            self._bias((i, 'up_bias'), up_bias, gate_bias),
            self.keep((i, 'down'), panels(down)),
            self._bias((i, 'down_bias'), down_bias),
        ]

    def _bias(self, key, bias, gate=None):
        if bias is None:
            return 0
        return self.keep(key, panels(bias[:, None], None if gate is None else gate[:, None]))

    def _norm(self, norm):
        return _address(norm.weight), _address(norm.bias)

    def _pad_heads(self, w):
        """(heads * head_size, K) -> (heads * width, K)"""
        size = self.config.head_size
        return F.pad(w.reshape(-1, size, w.shape[1]), (0, 0, 0, self.width - size)).flatten(0, 1)

    def _make_room(self, n):
        """The work space for n tokens. Rows a power of two apart would fall on the same lines of the CPU's
        cache: hence 16 floats more."""
        c = self.config
        self.rows = self.net.rows = max(n, 2 * self.rows, 64)
        heads = c.n_head * self.width
        qkv = heads + 2 * c.n_kv_head * self.width
        work = (  # name, floats of a row, name of its stride
            ('x', c.n_embd, 'sx'),
            ('y', c.n_embd, 'sx'),
            ('qkv', qkv, 'sq'),
            ('att', heads, 'sa'),
            ('mid', c.n_inner, 'sm'),
        )
        for name, width, stride in work:
            self.work[name] = torch.zeros(self.rows, -(-width // 32) * 32 + 16)
            setattr(self.net, name, self.work[name].data_ptr())
            setattr(self.net, stride, self.work[name].stride(0))

    def hidden(self, batch):
        """-> (N, C) before the last norm, valid until the next call"""
        n, kv = len(batch.pos), self.cache.kv
        if n > self.rows:
            self._make_room(n)
        tables, ids = self.cache.tables.fill(batch.requests), np.array(batch.ids(), np.int64)
        cache = Cache(
            keys=kv.data_ptr(),
            values=kv.stride(0),
            layer=kv.stride(1),
            blocks=kv.shape[2],
            size=kv.shape[4],
            table=tables.ctypes.data,
            requests=len(tables),
            width=tables.shape[1],
        )
        longest = (int(batch.pos.max()) + 16) // 16 * 16
        arrays = [a.ctypes.data for a in (ids, batch.owner, batch.pos)]
        net, places = ctypes.byref(self.net), ctypes.byref(cache)
        self.code.forward(net, len(self.layers), places, *arrays, n, longest)
        return self.work['x'][:n, :self.config.n_embd]

    def logits(self, x, at):
        """-> (len(at), V) of those rows of x, valid until the next call. `at` has no row twice: the work
        space has as many as x."""
        n, V = len(at), self.config.vocab_size
        assert n <= len(x), f'{n} rows of logits from {len(x)} tokens'
        if len(self.z) < n:
            self.z = torch.empty(max(n, 2 * len(self.z)), -(-V // 32) * 32)
        rows = np.array(at, np.int64)
        self.code.logits(ctypes.byref(self.net), rows.ctypes.data, n, self.z.data_ptr(), *self.z.shape)
        return self.z[:n, :V]


def _address(x):
    return 0 if x is None else x.data_ptr()


def _in_force(layer):
    """(weight, bias) of a Linear or Embedding; an adapter's is merged."""
    adapted = getattr(layer, 'active', False)
    weight = layer.merged_weight() if adapted else layer.weight
    bias = getattr(layer, 'bias', None)
    return weight.detach(), None if bias is None else bias.detach()


# ----------------------------------------------------------------------------------------------------
# drawing a token

@functools.lru_cache(None)
def _draw():
    lib = library('DRAW')
    return lib and _declared(lib.draw, POINTER, INT, INT, INT, INT, *[POINTER] * 5)


def draw(z, u, temperature):
    """kernels.draw for float32 logits z (n, V) whose rows are dense; None without a library."""
    fn = _draw()
    if fn is None:
        return None
    n, V = z.shape
    token, logp, raw = torch.empty(n, dtype=torch.long), torch.empty(n), torch.empty(n)
    numbers = [u.double().contiguous(), temperature.float().contiguous(), token, logp, raw]
    fn(z.data_ptr(), z.stride(0), n, V, min(map(len, numbers)), *(t.data_ptr() for t in numbers))
    return token, logp, raw
