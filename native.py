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
    """One part of native.c ('DOCS', 'FORWARD', 'DRAW') for these sizes; None, and a line says why, without it."""
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


def _declare(function, *arguments):
    function.argtypes, function.restype = arguments, None


POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _fields(pointers, ints, floats):
    """Fields of a C struct, in its order: addresses, then integers, then floats."""
    kinds = (pointers, POINTER), (ints, INT), (floats, FLOAT)
    return [(name, kind) for names, kind in kinds for name in names.split()]


# ----------------------------------------------------------------------------------------------------
# attention of packed documents

class Docs(ctypes.Structure):
    """docs in native.c."""
    _fields_ = _fields('q k v rows cu first tasks out lse', 'sq sk sv n_tasks longest nkv group', 'scale')

    @staticmethod
    def of(q, k, v, out, lse, layout, scale):
        """Tensors as DocAttention keeps them -> what C reads. The tensors must outlive it."""
        rows, cu, first, tasks, longest = layout
        tensors = dict(q=q, k=k, v=v, rows=rows, cu=cu, first=first, tasks=tasks, out=out, lse=lse)
        sizes = dict(n_tasks=len(tasks) - 1, longest=longest, nkv=k.shape[1], group=q.shape[1] // k.shape[1])
        strides = dict(sq=q.stride(0), sk=k.stride(0), sv=v.stride(0))
        return Docs(**{name: t.data_ptr() for name, t in tensors.items()}, **sizes, **strides, scale=scale)


@functools.lru_cache(None)
def docs(head_size):
    """The library for heads of this size, a multiple of 16; None without one."""
    lib = library('DOCS', HS=head_size)
    if lib is not None:
        _declare(lib.attend, POINTER)
        _declare(lib.attend_backward, *[POINTER] * 5)
    return lib


class DocAttention(torch.autograd.Function):
    """kernels.doc_attention; layout: (rows, cu, first, tasks, longest)."""

    @staticmethod
    def forward(ctx, q, k, v, scale, *layout):
        dense = [x.stride(-1) == 1 and x.stride(-2) == x.shape[-1] for x in (q, k, v)]
        q, k, v = (x if ok else x.contiguous() for x, ok in zip((q, k, v), dense))
        out, lse = torch.zeros(q.shape), torch.empty(q.shape[:2])
        docs(q.shape[-1]).attend(ctypes.byref(Docs.of(q, k, v, out, lse, layout, scale)))
        ctx.save_for_backward(q, k, v, out, lse, *layout[:-1])
        ctx.longest, ctx.scale = layout[-1], scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        q, k, v, out, lse, *layout = ctx.saved_tensors
        grads = [torch.zeros(x.shape) for x in (q, k, v)]
        m = Docs.of(q, k, v, out, lse, (*layout, ctx.longest), ctx.scale)
        docs(q.shape[-1]).attend_backward(ctypes.byref(m), *(t.data_ptr() for t in (g.contiguous(), *grads)))
        return *grads, *[None] * 6


# ----------------------------------------------------------------------------------------------------
# the engine's forward

LAYER = 'n1 n1b qkv qkvb qn kn o ob n2 n2b up upb down downb'.split()
ACTS = dict(relu=2, gelu_tanh=3, gated=4)


class Net(ctypes.Structure):
    """net in native.c: addresses of float32 weights (0: there is none) and of buffers, sizes, strides."""
    _fields_ = _fields('layers wte wpe cos sin nf nfb head headb x y qkv att mid',
                       'C inner V sx sq sa sm act rms', 'eps scale')


def panels(w, gate=None):
    """w (O, K) -> (ceil(O / 32), K, 32), the order in which C multiplies, zeros behind the last row; with a
    gate (O, K): 16 rows of the gate, then 16 of w. A bias is w with K = 1."""
    (O, K), wide = w.shape, 32 if gate is None else 16
    parts = [F.pad(x, (0, 0, 0, -O % wide)).view(-1, wide, K) for x in (gate, w) if x is not None]
    return torch.cat(parts, 1).transpose(1, 2).contiguous()


def forward(nkv, group, head_size):
    """The library for nkv heads of keys, `group` queries to each, head_size numbers a head; None without one.
    forward(net, from, to, ids (N,), rows (N, 4), pos (N,), N, who (n,), n, width): half-layers from .. to of
    all tokens, the even ones up to attention, which is that of the tokens `who` over their positions 0 .. pos
    and writes net.att; rows, int64: address of the keys of the token's row in layer 0 (nkv, cap, head_size
    padded to 16), floats from keys to values, cap % 16 = 0, floats from layer to layer; width: the longest
    row, a multiple of 16.
    logits(net, at (n,) rows of x or NULL, n, z (n, stride), stride)."""
    lib = library('FORWARD', NKV=nkv, G=group, D=head_size)
    if lib is not None:
        _declare(lib.forward, POINTER, INT, INT, POINTER, POINTER, POINTER, INT, POINTER, INT, INT)
        _declare(lib.logits, POINTER, POINTER, INT, POINTER, INT)
    return lib


# ----------------------------------------------------------------------------------------------------
# drawing a token

def draw(z, u, temperature):
    """kernels.draw for float32 logits z (n, V) whose rows are dense; None without a library."""
    lib = library('DRAW')
    if lib is None:
        return None
    _declare(lib.draw, POINTER, INT, INT, INT, *[POINTER] * 5)
    n, V = z.shape
    token, logp, raw = torch.empty(n, dtype=torch.long), torch.empty(n), torch.empty(n)
    lib.draw(z.data_ptr(), z.stride(0), n, V, *(x.data_ptr() for x in (u, temperature, token, logp, raw)))
    return token, logp, raw
