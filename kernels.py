"""
Kernels: what a Transformer and its RL losses spend their time in, each as a lesson: a drawing of the tiles,
the algorithm in a few lines of NumPy (those behind #| are real: a test runs them), the Triton kernel, and a
plain PyTorch twin.

    CUDA -> Triton.   CPU -> the twin, or native.c.   TRITON_INTERPRET=1 -> the Triton source on the CPU (for
    tests; not bfloat16). kernels.use('auto' | 'torch' | 'triton') switches; kernels.which() says what runs.

Triton stands only where it beats what torch has. Left to torch: matmuls, LayerNorm and GELU (as fast), dense
attention (cuDNN and FlashAttention beat a readable one; ours takes packed batches and paged caches), AdamW
(fused=True is one pass over its four tensors), and all attention on cards before Ampere (compute capability
8.0), for which Triton makes no tensor-core instruction. Triton 3.6 to 3.9: plain pointers, a mask on every
load, float32 inside, no atomics (two runs agree to the bit), a table of sizes instead of autotuning.
"""
import functools
import importlib.util
import os
import sys

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

try:
    import native  # some of this in C, for float32 on the CPU
except ModuleNotFoundError:
    native = None  # it was deleted: the twins run

INTERPRET = os.environ.get('TRITON_INTERPRET') == '1'
triton = None
if importlib.util.find_spec('triton') and (torch.version.cuda or torch.version.hip or INTERPRET):
    import triton
    import triton.language as tl
    from triton.language import constexpr
else:  # Mac, Windows, a CPU-only torch: the sources below are only read, never run
    constexpr = None

CHUNK_BYTES = 32 << 20  # the most that a block of logits may take on CPU; on CUDA see _budget
LOG2E = 1.4426950408889634  # e^x = 2^(x log2 e): GPUs have a power of two
_mode = 'auto'


def jit(function):
    return triton.jit(function) if triton else function


@jit
def _read(at, ok):
    """Float32 of a tile of any dtype, 0 where not ok."""
    return tl.load(at, mask=ok, other=0.0).to(tl.float32)


@jit
def _write(at, x, ok):
    tl.store(at, x.to(at.dtype.element_ty), mask=ok)


@jit
def _trial(X):
    tl.store(X, 1.0)


def _launch(kernel, grid, *args, **meta):
    """Every kernel starts here: on its tensors' device, whichever is current."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **meta)


@functools.lru_cache(None)
def _trouble(device):
    """Why Triton cannot compile and start a kernel on this device; '' where it can."""
    try:
        _launch(_trial, (1,), torch.zeros(1, device=device))
    except Exception as e:  # a compiler that is missing or fails, a folder, a card: each has its own error
        why = str(e).strip().splitlines() or [type(e).__name__]
        return (f'Triton cannot run here ({why[0]}): it needs a C compiler (build-essential), Python.h '
                '(python3-dev), a cache folder (TRITON_CACHE_DIR) and a card that it knows')
    return ''


@functools.lru_cache(None)
def _runs(device):
    """Does Triton run on this device? If not, a line says why, once."""
    why = '' if INTERPRET else _trouble(device)
    if why:
        print(f'{why}. PyTorch runs in its place.', file=sys.stderr, flush=True)
    return not why


def use(mode='auto'):
    """Choose the implementation: 'auto' (Triton on CUDA, else PyTorch), 'torch', 'triton'. ValueError where
    it cannot run."""
    global _mode
    if mode not in ('auto', 'torch', 'triton'):
        raise ValueError(f"kernels '{mode}' is unknown: set --kernels=auto, torch or triton")
    if mode == 'triton':
        if importlib.util.find_spec('triton') is None:
            raise ValueError('kernels triton: the package triton is not installed here: pip install triton '
                             '(Linux), or set --kernels=torch')
        if not (torch.cuda.is_available() or INTERPRET):
            raise ValueError('kernels triton: no CUDA device here: set --kernels=torch, or '
                             'TRITON_INTERPRET=1 to interpret the source on the CPU')
        why = '' if INTERPRET else _trouble(torch.device('cuda', torch.cuda.current_device()))
        if why:
            raise ValueError(f'kernels triton: {why}; or set --kernels=torch')
    _mode = mode


def which():
    """One line for the log: what a call on the best device here would run, 'torch (CPU)', 'triton (CUDA)'
    ..."""
    gpu = torch.cuda.is_available()
    if INTERPRET and _mode != 'torch':
        return 'triton (interpreted on CPU)'
    if not gpu:
        c = in_c(torch.empty(0)) and native.library('DRAW')
        return 'torch and C (CPU)' if c else 'torch (CPU)'
    device = torch.device('cuda', torch.cuda.current_device())
    if _mode == 'torch' or triton is None or not _runs(device):
        return 'torch (CUDA)'
    return 'triton (CUDA)' if _tensor_cores(device) else 'triton (CUDA), attention by torch (before Ampere)'


def takes(x):
    """Does a Triton kernel take this tensor? float64, empty tensors and what torch.compile makes kernels of
    are the PyTorch twin's."""
    if _mode == 'torch' or triton is None or not (x.is_cuda or INTERPRET):
        return False
    if x.numel() == 0 or x.dtype == torch.float64 or torch.compiler.is_compiling() or not _runs(x.device):
        return False
    if INTERPRET and x.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter computes bfloat16 wrongly: use float32 or float16, or unset "
                         'TRITON_INTERPRET')
    return True


@functools.lru_cache(None)
def _without_native():
    print('no native.py: decoding is about 4 times faster with it', file=sys.stderr, flush=True)


def in_c(x):
    """May native.py take this tensor? float32 on the CPU, not under --kernels=torch."""
    if _mode == 'torch' or INTERPRET or x.device.type != 'cpu' or x.dtype != torch.float32:
        return False
    if torch.is_autocast_enabled('cpu') or torch.compiler.is_compiling():
        return False
    if native is None:
        _without_native()
    return native is not None


def _tensor_cores(device):
    """Has the card tensor cores that Triton uses? NVIDIA's from Ampere on, AMD's."""
    return bool(INTERPRET or torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def _roomy(x):
    """Has a block of this tensor's card 227 KB of shared memory (H100, H200, B200)? An A100 has 163, a
    GeForce 99, an AMD card 64. The large tiles below are for the former."""
    if not x.is_cuda:
        return True
    card = torch.cuda.get_device_properties(x.device)
    return getattr(card, 'shared_memory_per_block_optin', 0) >= 227 << 10


def _pow2(n, least=1):
    return max(least, 1 << max(0, n - 1).bit_length())


def _cdiv(a, b):
    return -(-a // b)


def _flat(x):
    """(..., C) -> (N, C) with neighbours in memory along C; a copy only where the strides demand one."""
    x = x.reshape(-1, x.size(-1))
    return _dense(x) if x.size(1) != 1 else x


def _dense(x):
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x):
    """(N, heads, hs): a token's heads side by side, as in a slice of one matrix of q, k and v; else a
    copy."""
    return x if x.stride(-1) == 1 and x.stride(-2) == x.size(-1) else x.contiguous()


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _numbers(like, *shape, count=1):
    """Uninitialised float32 tensors on the device of `like`."""
    made = [torch.empty(shape, dtype=torch.float32, device=like.device) for _ in range(count)]
    return made if count > 1 else made[0]


# ----------------------------------------------------------------------------------------------------
# RMSNorm and LayerNorm, with the residual add in the same pass
#
#        C ->             a program: ROWS whole rows, so sums stay inside it. One read of x (and residual),
#      +--------------+   one write of h and y. Backward: a program strides down the rows p, p + P, p + 2P ...
#    N | ROWS x C     |   and keeps its sum of dw in registers; P partial sums are added at the end, in one
#      +--------------+   order. LayerNorm is torch's: its kernels are as fast.
#      | ROWS x C     |
#      +--------------+
#| def norm(x, w, b, eps, layer):                    # rms: layer=False, b=0
#|     d = x - x.mean(-1, keepdims=True) if layer else x
#|     return d / np.sqrt((d * d).mean(-1, keepdims=True) + eps) * w + b
#| def norm_backward(dy, x, w, eps, layer):          # the norm removes from its gradient what it took from x
#|     d = x - x.mean(-1, keepdims=True) if layer else x
#|     rstd = 1 / np.sqrt((d * d).mean(-1, keepdims=True) + eps)
#|     xhat, g = d * rstd, dy * w
#|     g = g - xhat * (g * xhat).mean(-1, keepdims=True) - (g.mean(-1, keepdims=True) if layer else 0)
#|     return g * rstd, (dy * xhat).sum(0), dy.sum(0)

@jit
def _norm_fwd(X, R, W, Y, H, RSTD, N, C, x_stride, r_stride, eps,
              RES: constexpr, ROWS: constexpr, BLOCK: constexpr):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)[None, :]
    row = r[:, None]
    ok = (row < N) & (c < C)
    x = _read(X + row * x_stride + c, ok)
    if RES:
        x += _read(R + row * r_stride + c, ok)
        h = x.to(H.dtype.element_ty)
        tl.store(H + row * C + c, h, mask=ok)
        x = h.to(tl.float32)  # subtle: norm what was stored, for the backward will read that
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
    tl.store(RSTD + r, rstd, mask=r < N)
    y = x * rstd[:, None] * _read(W + c, c < C)
    _write(Y + row * C + c, y, ok)

@jit
def _norm_bwd(DY, GH, H, W, RSTD, DX, DW, N, C, h_stride, P,
              RES: constexpr, ROWS: constexpr, BLOCK: constexpr, STAGES: constexpr):
    p = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    c = columns[None, :]
    w = _read(W + c, c < C)
    dw = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.range(p * ROWS, N, P * ROWS, num_stages=STAGES):
        r = (start + tl.arange(0, ROWS)).to(tl.int64)
        row = r[:, None]
        ok = (row < N) & (c < C)
        dy = _read(DY + row * C + c, ok)
        rstd = _read(RSTD + r, r < N)[:, None]
        xhat = _read(H + row * h_stride + c, ok) * rstd
        g = dy * w
        d = (g - xhat * (tl.sum(g * xhat, 1) / C)[:, None]) * rstd
        if RES:  # h = x + residual is an output too: its own gradient joins
            d += _read(GH + row * C + c, ok)
        _write(DX + row * C + c, d, ok)
        dw += tl.sum(dy * xhat, 0)
    tl.store(DW + p * C + columns, dw, mask=columns < C)

def _norm_sizes(N, C):
    """Tiles of 2048 numbers, or one row: hs=128 -> 16 rows at once; warps by the tile's size."""
    block = _pow2(C, 16)
    rows = max(1, min(2048 // block, _pow2(N)))
    return dict(ROWS=rows, BLOCK=block, num_warps=min(16, max(4, _pow2(block // 1024))))

class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual):
        flat, res = _flat(x), residual is not None
        r = _flat(residual) if res else flat
        dtype = torch.promote_types(x.dtype, r.dtype)
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        h = torch.empty_like(y) if res else flat
        (N, C), rstd = flat.shape, _numbers(x, len(flat))
        size = _norm_sizes(N, C)
        _launch(_norm_fwd, (_cdiv(N, size['ROWS']),), flat, r, weight, y, h, rstd, N, C, flat.stride(0),
                r.stride(0), eps, RES=res, **size)
        ctx.save_for_backward(h, weight, rstd)
        ctx.res, ctx.dtypes = res, (x.dtype, r.dtype)
        ctx.set_materialize_grads(True)
        return (y, h) if res else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, gh=None):
        h, weight, rstd = ctx.saved_tensors
        shape, dy, h = dy.shape, dy.contiguous(), h.reshape(-1, dy.size(-1))
        gh = gh.contiguous() if ctx.res else dy
        N, C = h.shape
        size = _norm_sizes(N, C)
        # Loads run ahead through shared memory, two tiles of each input: 6 * 8 KB in bf16 at C=4096. Two
        # programs a multiprocessor. H200, (16384, 4096): 86 % of its copy bandwidth, 75 with one stage.
        small = size['ROWS'] * size['BLOCK'] * h.element_size() <= 16384
        most = 2 * torch.cuda.get_device_properties(h.device).multi_processor_count if h.is_cuda else 3
        P = min(_cdiv(N, size['ROWS']), most)
        dx, dw = torch.empty(shape, dtype=h.dtype, device=h.device), _numbers(h, P, C)
        _launch(_norm_bwd, (P,), dy, gh, h, weight, rstd, dx, dw, N, C, h.stride(0), P, RES=ctx.res,
                STAGES=3 if small else 1, **size)
        dr = dx.to(ctx.dtypes[1]) if ctx.res else None
        return dx.to(ctx.dtypes[0]), dw.sum(0).to(weight.dtype), None, dr

def rms_norm(x, weight, eps, residual=None):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis (1910.07467). x (..., C), weight (C,). With
    `residual` (like x), h = x + residual is normed: -> (y, h). Any float dtype, float32 inside. x=[3,4],
    weight 1, eps 0 -> [3,4] / 3.536 = [.849, 1.131]."""
    if takes(x):
        return _RMSNorm.apply(x, weight, eps, residual)
    h = x if residual is None else x + residual
    y = F.rms_norm(h, (h.size(-1),), weight.to(h.dtype), eps)
    return y if residual is None else (y, h)

def layer_norm(x, weight, bias, eps, residual=None):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last axis (1607.06450), biased variance; bias
    may be None. With `residual`, h = x + residual is normed: -> (y, h). x=[1,3], weight 1, bias 0, eps 0 ->
    [-1, 1]."""
    h = x if residual is None else x + residual
    y = F.layer_norm(h, (h.size(-1),), weight.to(h.dtype), None if bias is None else bias.to(h.dtype), eps)
    return y if residual is None else (y, h)


# ----------------------------------------------------------------------------------------------------
# Rotary embedding (2104.09864)
#
#      hs ->   a a a a b b b b
#    h +----------------+    each pair (a, b) of a head is turned by the angle of its position. A program: one
#    e | a       b      |    token, all heads of q (or of k). cos, sin of the token are read once, for all
#    a | a       b      |    heads. The backward turns by minus the angle, so no activation has to be kept.
#    d +----------------+
#| def rope(x, cos, sin):                             # x (T, nh, hs), tables (T, hs/2)
#|     (a, b), c, s = np.split(x, 2, -1), cos[:, None], sin[:, None]
#|     return np.concatenate([a * c - b * s, b * c + a * s], -1)

@jit
def _rope_heads(X, Y, COS, SIN, n, T, stride, heads, half,
                BACK: constexpr, BH: constexpr, BD: constexpr):
    h = tl.arange(0, BH)[:, None]
    d = tl.arange(0, BD)[None, :]
    ok = (h < heads) & (d < half)
    cos = _read(COS + n % T * half + d, d < half)
    sin = _read(SIN + n % T * half + d, d < half)
    if BACK:
        sin = -sin
    x = X + n * stride + h * half * 2 + d
    y = Y + (n * heads + h) * half * 2 + d
    a = _read(x, ok)
    b = _read(x + half, ok)
    _write(y, a * cos - b * sin, ok)
    _write(y + half, b * cos + a * sin, ok)

@jit
def _rope(Q, K, YQ, YK, COS, SIN, T, q_stride, k_stride, nh, nkv, half,
          BACK: constexpr, BQ: constexpr, BK: constexpr, BD: constexpr):
    n = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _rope_heads(Q, YQ, COS, SIN, n, T, q_stride, nh, half, BACK, BQ, BD)
    else:
        _rope_heads(K, YK, COS, SIN, n, T, k_stride, nkv, half, BACK, BK, BD)

def _run_rope(q, k, cos, sin, back):
    yq, yk = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    q, k = _heads(q.flatten(0, 1)), _heads(k.flatten(0, 1))
    (T, half), nh, nkv = cos.shape, q.size(1), k.size(1)
    _launch(_rope, (len(q), 2), q, k, yq, yk, cos, sin, T, q.stride(0), k.stride(0), nh, nkv, half, BACK=back,
            BQ=_pow2(nh), BK=_pow2(nkv), BD=_pow2(half), num_warps=4)
    return yq, yk

class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _run_rope(q, k, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        return *_run_rope(dq, dk, *ctx.saved_tensors, True), None, None

def _rotate(x, cos, sin):
    a, b = x.to(_wide(x.dtype)).chunk(2, -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one angle for all heads of a position
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

def rope(q, k, cos, sin):
    """Turns q (B, T, nh, hs) and k (B, T, nkv, hs) by the angles of their positions; cos, sin (T, hs/2)
    float. -> (q, k) like the inputs. hs=2, angle 90 degrees: [1, 0] -> [0, 1]."""
    if q.dim() != 4 or k.dim() != 4 or cos.shape != (q.size(1), q.size(-1) // 2):
        raise ValueError(f'rope: got q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}; '
                         'expected (B, T, heads, hs), cos (T, hs/2)')
    if takes(q):
        return _Rope.apply(q, k, cos.contiguous(), sin.contiguous())
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


# ----------------------------------------------------------------------------------------------------
# SwiGLU and GELU
#
#    flat, 1024 numbers a program. Eager SwiGLU is two kernels (silu; times up: 5 reads and writes of C
#    numbers a token), this is one (3). The backward computes silu again from gate. GELU is torch's.
#| def swiglu(g, u): return g / (1 + np.exp(-g)) * u
#| def swiglu_backward(dy, g, u):
#|     s = 1 / (1 + np.exp(-g))
#|     return dy * u * s * (1 + g * (1 - s)), dy * g * s
#| def gelu(x): return 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x ** 3)))

@jit
def _swiglu(G, U, DY, Y, DU, C, g_stride, u_stride, BACK: constexpr, BLOCK: constexpr):
    blocks = tl.cdiv(C, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // blocks
    c = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    ok = c < C
    g = _read(G + row * g_stride + c, ok)
    u = _read(U + row * u_stride + c, ok)
    s = tl.sigmoid(g)
    y = g * s * u
    if BACK:
        dy = _read(DY + row * C + c, ok)
        _write(DU + row * C + c, dy * g * s, ok)
        y = dy * u * s * (1.0 + g * (1.0 - s))  # the gradient of g
    _write(Y + row * C + c, y, ok)

def _run_swiglu(gate, up, dy=None):
    g, u = _flat(gate), _flat(up)
    if g.is_contiguous() and u.is_contiguous():
        g, u = g.view(1, -1), u.view(1, -1)  # one long row: no block is cut short at a row's end
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    du = y if dy is None else torch.empty_like(y)
    N, C = g.shape
    _launch(_swiglu, (N * _cdiv(C, 1024),), g, u, y if dy is None else dy, y, du, C, g.stride(0), u.stride(0),
            BACK=dy is not None, BLOCK=1024, num_warps=4)
    return y, du

class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _run_swiglu(gate, up)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _run_swiglu(*ctx.saved_tensors, dy.contiguous())

def swiglu(gate, up):
    """silu(gate) * up (2002.05202), any shape, both alike. gate=1, up=2 -> 2 * 0.7311 = 1.4621."""
    return _SwiGLU.apply(gate, up) if takes(gate) else F.silu(gate) * up

def gelu(x):
    """GPT-2's GELU, tanh form (1606.08415). 1 -> 0.8412."""
    return F.gelu(x, approximate='tanh')


# ----------------------------------------------------------------------------------------------------
# Log-probs and entropies of softmax rows
#
#         V ->                             a program: one row, walked in blocks. Running maximum m, sum s of
#      +------+------+------+------+       e^(z-m) and sum a of e^(z-m) (z-m) are rescaled by e^(m - m') when
#    N | blk0 > blk1 > blk2 > blk3 |       the maximum grows to m':
#      +------+------+------+------+           log p = z[y] - m - log s,   entropy H = log s - a / s
#                       -> m, s, a         Backward: dz = g_l (1[y] - p) - g_H p (log p + H), block by block.
#    Each thread keeps m, s and a of the 16 bytes that it loads at once, and they are joined at the end of the
#    row: threads need not talk while they walk, and 64 warps fit a multiprocessor.
#| def online_softmax(z, y, block=3):
#|     m, s, a = -1e38, 0.0, 0.0
#|     for v in range(0, len(z), block):
#|         new = max(m, z[v:v + block].max())
#|         d, keep = z[v:v + block] - new, np.exp(m - new)
#|         m, s, a = new, s * keep + np.exp(d).sum(), (a + s * (m - new)) * keep + (np.exp(d) * d).sum()
#|     return z[y] - m - np.log(s), np.log(s) - a / s       # a of z itself would carry m's rounding

@jit
def _rescale(m, s, a, base, by):
    """s and a over a new maximum, `base`."""
    d = m - base
    keep = tl.exp2(d * by)
    return s * keep, (a + s * tl.maximum(d, -1e38)) * keep

@jit
def _ce_fwd(Z, Y, LOGP, MAX, LOGS, ENT, V, z_stride, scale, LOG2E: constexpr, BLOCK: constexpr,
            LANE: constexpr):
    row = tl.program_id(0).to(tl.int64)
    m = tl.full([BLOCK // LANE], float('-inf'), dtype=tl.float32)
    s = tl.zeros([BLOCK // LANE], dtype=tl.float32)
    a = tl.zeros([BLOCK // LANE], dtype=tl.float32)
    at = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    by = scale * LOG2E  # m and a are of z itself, and e^(z scale) = 2^(z by): so the scale costs nothing
    for start in range(0, V, BLOCK):
        z = tl.load(Z + row * z_stride + start + at, mask=start + at < V, other=float('-inf')).to(tl.float32)
        new = tl.maximum(m, tl.max(z, 1))
        base = tl.where(new == float('-inf'), 0.0, new)  # subtle: -inf - -inf is nan
        d = z - base[:, None]
        e = tl.exp2(d * by)
        s, a = _rescale(m, s, a, base, by)
        s += tl.sum(e, 1)
        a += tl.sum(e * tl.maximum(d, -1e38), 1)  # 0 * -1e38 = 0 where z is -inf
        m = new
    top = tl.max(m, 0)
    dead = top == float('-inf')  # nothing but -inf
    top = tl.where(dead, 0.0, top)
    s, a = _rescale(m, s, a, top, by)
    s = tl.where(dead, 1.0, tl.sum(s, 0))
    logs = tl.log(s)
    z_y = tl.load(Z + row * z_stride + tl.load(Y + row)).to(tl.float32)
    tl.store(LOGP + row, z_y * scale - top * scale - logs)
    tl.store(MAX + row, top * scale)
    tl.store(LOGS + row, logs)
    tl.store(ENT + row, logs - tl.sum(a, 0) * scale / s)

@jit
def _ce_bwd(Z, Y, MAX, LOGS, ENT, GL, GH, D, V, z_stride, d_stride, v0, scale,
            ENTROPY: constexpr, BLOCK: constexpr):
    blocks = tl.cdiv(V, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    row = pid // blocks
    v = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(Z + row * z_stride + v, mask=v < V, other=float('-inf')).to(tl.float32) * scale
    logp = z - tl.load(MAX + row) - tl.load(LOGS + row)  # subtle: in two steps; m + log s would be rounded
    p = tl.exp(logp)
    g_logp = tl.load(GL + row)
    d = -p * g_logp
    if ENTROPY:
        d -= tl.where(p > 0.0, p * (logp + tl.load(ENT + row)), 0.0) * tl.load(GH + row)
    d = (d + tl.where(v == tl.load(Y + row) - v0, g_logp, 0.0)) * scale
    _write(D + row * d_stride + v, d, v < V)

def _run_ce_fwd(z, targets, temperature):
    """-> log p(target), entropy, m, log s, each (N,), of softmax(z / temperature)."""
    (N, V), (logp, entropy, m, logs) = z.shape, _numbers(z, len(z), count=4)
    _launch(_ce_fwd, (N,), z, targets, logp, m, logs, entropy, V, z.stride(0), 1.0 / temperature, LOG2E=LOG2E,
            BLOCK=min(_pow2(V, 16), 4096), LANE=16 // z.element_size(), num_warps=8)
    return logp, entropy, m, logs

def _run_ce_bwd(z, targets, stats, g_logp, g_entropy, dtype, v0, temperature):
    """Columns v0 .. v0 + z.size(1) of the gradient; stats: entropy, m, log s."""
    d = torch.empty(z.shape, dtype=dtype, device=z.device)
    (N, V), (entropy, m, logs), g_logp = z.shape, stats, g_logp.contiguous()
    g_h = g_logp if g_entropy is None else g_entropy.contiguous()
    BLOCK = min(_pow2(V, 16), 4096)
    _launch(_ce_bwd, (N * _cdiv(V, BLOCK),), z, targets, m, logs, entropy, g_logp, g_h, d, V, z.stride(0),
            d.stride(0), v0, 1.0 / temperature, ENTROPY=g_entropy is not None, BLOCK=BLOCK, num_warps=8)
    return d

def cross_entropy(logits, targets, ignore_index=-1):
    """-log softmax(logits)[target] and the entropy of each row. logits (N, V), targets (N,) int64 -> (loss,
    entropy), (N,) float32 (float64 for float64), both differentiable, both 0 where targets == ignore_index.
    -inf masks a word; a row of nothing else has loss inf, entropy 0 and a finite gradient. V=2, logits [0,0]
    -> loss log 2, entropy log 2."""
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f'cross_entropy: got logits {tuple(logits.shape)}, targets {tuple(targets.shape)}; '
                         'expected (N, V) and (N,): flatten them')
    valid = targets != ignore_index
    safe = torch.where(valid, targets, 0)
    if takes(logits):
        logp, entropy = _Logprobs.apply(_flat(logits), None, safe, 1.0, torch.is_grad_enabled())
    else:
        z = logits.to(_wide(logits.dtype))
        dead = z.amax(1) == -torch.inf
        z = torch.where(dead[:, None], 0, z)
        z = z - z.detach().amax(1, keepdim=True)
        logps = z - z.logsumexp(1, keepdim=True)  # log_softmax loses 3e-5 nats at 150,000 words
        entropy = -(logps.exp() * logps.clamp_min(-1e30)).sum(1)
        logp = torch.where(dead, -torch.inf, logps.gather(1, safe[:, None])[:, 0])
        entropy = torch.where(dead, 0, entropy)
    return torch.where(valid, -logp, 0), torch.where(valid, entropy, 0)


# ----------------------------------------------------------------------------------------------------
# linear: x W' + b. CUDA: cuBLAS. CPU with AVX-512, float32: oneDNN, because torch hands such products to
# MKL, which on AMD stays with AVX2: 240 against 95 GFLOP/s a core at (3373, 128) x (128, 512) on a Zen 5
# (python bench.py kernels). Where AVX2 is all there is MKL is the faster one, in the backward by 1.1 to 2
# times.

# oneDNN compiles a product anew for each shape. A thousand compiled ones, strewn over the heap, cost 1.1 GB.
os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '32')
_onednn = (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise')
           and torch.backends.cpu.get_cpu_capability() == 'AVX512')

def _use_onednn(x, weight):
    return (_onednn and x.device.type == 'cpu' and x.dtype == weight.dtype == torch.float32
            and x.numel() >= 32 * weight.shape[1] > 0
            and not torch.is_autocast_enabled('cpu') and not torch.compiler.is_compiling())

def extra_rows(n):
    """Dummy rows that round n tokens up to at most 32 sizes an octave (3 % more on the mean), so that few
    shapes occur. 1000 -> 24."""
    return -n % max(64, 1 << max(0, n.bit_length() - 5)) if _onednn else 0

def matmul_t(a, b):
    """a (N, K) @ b (M, K).T -> (N, M), by oneDNN where it is the faster one. [[1, 2]] @ [[3, 4]].T ->
    [[11]]."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, 'none', [], '') if _use_onednn(a, b) else a @ b.t()

class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad
        dy = dy.contiguous()
        dx = matmul_t(dy, weight.t()) if need_x else None
        dw = matmul_t(dy.t(), x.t()) if need_w else None
        return dx, dw, dy.sum(0) if need_b else None

def linear(x, weight, bias=None):
    """F.linear: x (..., C), weight (M, C), bias (M,) or None -> (..., M), any dtype. [[1, 2]], [[3, 4]], [5]
    -> [[16]]."""
    if not _use_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


# ----------------------------------------------------------------------------------------------------
# Linear layer + softmax, never holding all logits: log-prob and entropy of the targets from x and weight
#
#               V ->                       forward: BM rows of x at a time: the library's matmul gives their
#         +-----------------------+        logits, the kernel above eats them. 4096 x 131072 float32 logits
#    x BM | z = x W'              |        are 2.1 GB.
#         +-----------------------+
#      BM | ...                   |        backward: in blocks of the vocabulary: z = x W_b' again, _ce_bwd,
#         +-----------------------+        then dx += dz W_b and dW_b = dz' x. A block of dW is written once;
#           W_0  |  W_1  |  W_2            by blocks of rows all of dW would be read and written each time.
#| def linear_logprobs(x, w, y, T, block=4):          # one row x (C,), w (V, C)
#|     parts = [w[v:v + block] @ x / T for v in range(0, len(w), block)]
#|     m = max(z.max() for z in parts)
#|     s = sum(np.exp(z - m).sum() for z in parts)
#|     a = sum((np.exp(z - m) * z).sum() for z in parts)
#|     return parts[y // block][y % block] - m - np.log(s), m + np.log(s) - a / s

def product(a, b):
    """a @ b.T in float32 (float64 stays), of 16-bit operands too: a bfloat16 logit of 20 is off by 0.06, and
    a PPO ratio with it."""
    if a.is_cuda and a.element_size() == 2:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return matmul_t(a, b).to(_wide(a.dtype))

def _budget(device):
    if device.type != 'cuda':
        return CHUNK_BYTES
    return min(2 << 30, torch.cuda.get_device_properties(device).total_memory // 32)

def _fits(x, other, least):
    """How many rows (or columns) of float32 logits fit into a block, when a row (or column) has `other` of
    them."""
    return max(least, _budget(x.device) // (4 * max(other, 1)))

def logits_bytes(device, rows, words):
    """What the block of logits, float32, and its gradient, 16 bits, take on a GPU at most; a CPU's 32 MB are
    not worth a line in a plan: 0. 16,384 rows of 50,257 words on an H200: 2 GiB and half as much = 3.2 GB."""
    return min(_budget(device), 4 * rows * words) * 3 // 2 if device.type == 'cuda' else 0

def _parts(z):
    """Row slices of a block that the CPU's cache holds, 1 MiB: softmax and gradient read each number several
    times."""
    n = len(z) if z.is_cuda else max(1, (1 << 20) // (4 * z.size(1)))
    return [slice(i, min(i + n, len(z))) for i in range(0, len(z), max(n, 1))]

def _softmax_stats(z, targets):
    """z (n, V) finite -> p = softmax(z), log p[target], entropy, m = max z, log s. log s = -log max p: the
    largest p is 1/V at least."""
    m = z.amax(1)
    if z.size(1) <= 8192:
        p = torch.softmax(z, 1)
        logs = p.amax(1).log_().neg_()
    else:  # torch.softmax adds 16 running sums: of 150,000 small terms beside a large one it loses 2e-4 nats
        p = torch.sub(z, m[:, None]).exp_()
        s = p.sum(1)  # adds pairs of sums
        logs = s.log()
        p.div_(s[:, None])
    return p, z.gather(1, targets[:, None])[:, 0] - m - logs, m - torch.linalg.vecdot(p, z) + logs, m, logs

def _softmax_grad(p, targets, entropy, g_logp, g_entropy, out):
    """out (n, columns) = d/dz of g_logp . log p[target] + g_entropy . H, where dlogp = 1[target] - p and dH =
    -p (log p + H). p may be some columns of the softmax; targets outside of them have their 1 elsewhere."""
    if g_entropy is None:
        torch.mul(p, -g_logp[:, None], out=out)
    else:
        plogp = p.clamp_min(1e-37).log_().mul_(p)  # 0 where p is 0; twice as fast as xlogy
        torch.mul(p, -(g_logp + g_entropy * entropy)[:, None], out=out)
        out.addcmul_(plogp, g_entropy[:, None], value=-1)
    rows = ((targets >= 0) & (targets < p.size(1))).nonzero()[:, 0]
    out[rows, targets[rows]] += g_logp[rows]

def _logits_grad(ctx, z, v, g_logp, g_entropy):
    """The gradient of the logits of words v, v + 1 ..., in x's dtype, from those of _Logprobs' outputs."""
    x, _, targets = ctx.saved_tensors[:3]
    held, *stats = ctx.saved_tensors[3:]
    T = ctx.temperature
    if ctx.triton:
        return _run_ce_bwd(z, targets, stats, g_logp, g_entropy, x.dtype, v, T)
    out, (entropy, m, logs) = z if held is None else torch.empty_like(z), stats
    for s in _parts(z):
        p = z[s] if held is not None else z[s].div_(T).sub_(m[s, None]).sub_(logs[s, None]).exp_()
        g_h = None if g_entropy is None else g_entropy[s] / T
        _softmax_grad(p, targets[s] - v, entropy[s], g_logp[s] / T, g_h, out[s])
    return out.to(x.dtype)

class _Logprobs(torch.autograd.Function):
    """x (N, C), weight (V, C), or x (N, V) logits and weight None (Triton alone) -> log p(target), entropy,
    (N,). The backward computes the logits again (4 matmuls for 3), unless all of them fit into one block:
    that is held, as logits before the temperature for the Triton kernels, as probabilities for torch."""

    @staticmethod
    def forward(ctx, x, weight, targets, temperature, grad):
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.triton, held = temperature, takes(x), None
        outs = [torch.empty(len(x), dtype=_wide(x.dtype), device=x.device) for _ in range(4)]
        n = max(len(x), 1) if weight is None else _fits(x, len(weight), 64)
        keep = grad and len(x) <= n
        for i in range(0, len(x), n):
            z = x if weight is None else product(x[i:i + n], weight)
            if ctx.triton:
                held = z if keep else None
                for out, part in zip(outs, _run_ce_fwd(z, targets[i:i + n], temperature)):
                    out[i:i + n] = part
                z = None  # not two blocks at once
                continue
            z = z if temperature == 1.0 else z.div_(temperature)
            for s in _parts(z):
                rows = slice(i + s.start, i + s.stop)
                p, *parts = _softmax_stats(z[s], targets[rows])
                for out, part in zip(outs, parts):
                    out[rows] = part
                if keep:
                    z[s] = p
                    held = z
        ctx.save_for_backward(x, weight, targets, held, *outs[1:])
        return outs[0], outs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_entropy):
        x, weight, targets = ctx.saved_tensors[:3]
        held, entropy = ctx.saved_tensors[3:5]
        need_x, need_w = ctx.needs_input_grad[:2]
        g_logp = torch.zeros_like(entropy) if g_logp is None else g_logp
        if weight is None:
            return _logits_grad(ctx, x, 0, g_logp, g_entropy), None, None, None, None
        dx = torch.zeros(x.shape, dtype=entropy.dtype, device=x.device) if need_x else None
        dw = torch.empty_like(weight) if need_w else None
        n = len(weight) if held is not None else _fits(x, len(x), 256)
        for v in range(0, len(weight), n):
            w = weight[v:v + n]
            z = product(x, w) if held is None else held
            d = _logits_grad(ctx, z, v, g_logp, g_entropy)
            if need_x:
                dx += product(d, w.t())
            if need_w:
                dw[v:v + n] = product(d.t(), x.t())
        return None if dx is None else dx.to(x.dtype), dw, None, None, None

def _counted(name, x, weight, targets, ignore_index):
    """Flat x and targets without the ignored tokens (a prompt costs no matmul), and their row numbers (None =
    all). Operands of a matmul share a dtype: autocast's, where that is on, else x's."""
    if x.shape[:-1] != targets.shape or weight.dim() != 2 or weight.size(1) != x.size(-1):
        raise ValueError(f'{name}: got x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets '
                         f'{tuple(targets.shape)}; expected (..., C), (V, C), (...)')
    device, x, targets = x.device.type, x.reshape(-1, x.size(-1)), targets.reshape(-1)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rows = (targets != ignore_index).nonzero()[:, 0]
    if len(rows) == len(targets):
        return (x.to(dtype), weight.to(dtype), targets), None
    return (x.index_select(0, rows).to(dtype), weight.to(dtype), targets[rows]), rows

def _logprobs(x, weight, targets, temperature):
    grad = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    return _Logprobs.apply(x, weight, targets, float(temperature), grad)

def linear_cross_entropy(x, weight, targets, ignore_index=-1):
    """Mean over the counted tokens of -log softmax(x @ weight.T)[target], without holding the (N, V) logits.
    x (..., C), weight (V, C), targets (...) int64 -> float32 scalar; 0 when every target is ignored. x=0,
    V=50257 -> log 50257 = 10.825."""
    counted, _ = _counted('linear_cross_entropy', x, weight, targets, ignore_index)
    logp, _ = _logprobs(*counted, 1.0)
    return -logp.sum() / max(1, len(logp))

def linear_logprobs(x, weight, targets, temperature=1.0, ignore_index=-1):
    """Log-probability of each target and the entropy of its distribution, softmax(x @ weight.T /
    temperature), without holding the (N, V) logits; both differentiable. x (..., C), weight (V, C), targets
    (...) int64 -> (logp, entropy), (...) float32, both 0 where targets == ignore_index. x=0, V=4 -> logp -log
    4 = -1.386, entropy 1.386."""
    counted, rows = _counted('linear_logprobs', x, weight, targets, ignore_index)
    if not temperature > 0:
        raise ValueError(f'linear_logprobs: temperature {temperature}, expected above 0 (greedy text is '
                         'scored at the temperature it was sampled at)')
    outs = _logprobs(*counted, temperature)
    if rows is not None:
        outs = [o.new_zeros(targets.numel()).index_copy(0, rows, o) for o in outs]
    return tuple(o.view(targets.shape) for o in outs)


# ----------------------------------------------------------------------------------------------------
# FlashAttention (2205.14135, 2307.08691): softmax(q k' * scale) v without the (T, T) scores, causal, packed
# documents
#
#           keys ->                 a program: BM queries of one head. It walks over tiles of BN keys with the
#         +----+----+----+----+     online softmax, acc = acc * e^(m - m') + p v.
#    q BM | \  |    |    |    |         [ ] every pair visible: no mask is computed
#         +----+----+----+----+         [\] the mask cuts through       blank: never visited
#      BM | [] | \  |    |    |     Documents are rows cu[d]:cu[d+1]: each (document, head) has its own grid
#         +----+----+----+----+     of tiles, so nothing is computed between documents. Heads share k, v by
#      BM | [] | [] | \  |    |     h // (nh / nkv).
#         +----+----+----+----+     Backward: p again from the saved row sums lse (in powers of 2), then
#        dv = p' do,   ds = p (do v' - delta),   dq = ds k,   dk = ds' q,   delta = rowsum(do o)
#    once along the rows (dq), once down the columns and over the heads that share them (dk, dv): each sum is
#    one program's, so no atomics, and two runs agree to the bit.
#| def flash_row(q, k, v, scale, block=4):            # one query (hs,) over visible keys (n, hs)
#|     m, l, acc = -np.inf, 0.0, np.zeros(v.shape[1])
#|     for j in range(0, len(k), block):
#|         s = k[j:j + block] @ q * scale
#|         new = max(m, s.max())
#|         p = np.exp(s - new)
#|         l, acc, m = l * np.exp(m - new) + p.sum(), acc * np.exp(m - new) + p @ v[j:j + block], new
#|     return acc / l
#| def attention_backward(do, q, k, v, scale, visible):
#|     s = np.where(visible, q @ k.T * scale, -np.inf)
#|     p = np.exp(s - s.max(1, keepdims=True)); p /= p.sum(1, keepdims=True)
#|     ds = p * (do @ v.T - (do * (p @ v)).sum(1, keepdims=True))
#|     return ds @ k * scale, ds.T @ q * scale, p.T @ do  # dq, dk, dv

@jit
def _rows(X, base, n, limit, stride, d, HS: constexpr):
    """A tile (rows, BD) of a (token, hs) matrix: rows n of it from row base on, zero behind `limit` and
    behind hs."""
    at = X + (base + n).to(tl.int64)[:, None] * stride + d[None, :]
    return tl.load(at, mask=(n < limit)[:, None] & (d < HS)[None, :], other=0.0)

@jit
def _scores(q, k, i, j, Tq, Tk, scale, MASK: constexpr):
    """(BM, BN): q k' * scale; -inf where query i may not see key j. The last query stands at the last key."""
    s = tl.dot(q, tl.trans(k), input_precision='ieee') * scale
    if MASK:
        ok = (i < Tq)[:, None] & (j < Tk)[None, :] & (j[None, :] <= i[:, None] + (Tk - Tq))
        s = tl.where(ok, s, float('-inf'))
    return s

@jit
def _attn_steps(acc, m, l, q, K, V, base, lo, hi, i, Tq, Tk, k_stride, v_stride, d, scale,
                MASK: constexpr, HS: constexpr, BN: constexpr):
    for start in range(lo, hi, BN):
        j = start + tl.arange(0, BN)
        s = _scores(q, _rows(K, base, j, Tk, k_stride, d, HS), i, j, Tq, Tk, scale, MASK)
        new = tl.maximum(m, tl.max(s, 1))
        top = tl.where(new == float('-inf'), 0.0, new)
        p = tl.exp2(s - top[:, None])
        keep = tl.exp2(m - top)
        l = l * keep + tl.sum(p, 1)
        v = _rows(V, base, j, Tk, v_stride, d, HS)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision='ieee')
        m = new
    return acc, m, l

@jit
def _document(CU, doc):
    """First row and number of rows of a document."""
    first = tl.load(CU + doc)
    return first, tl.load(CU + doc + 1) - first

@jit
def _attn_fwd(Q, K, V, O, LSE, CUQ, CUK, N, q_stride, k_stride, v_stride, heads, group, docs,
              blocks, scale, HS: constexpr, BD: constexpr, BM: constexpr, BN: constexpr):
    pid = tl.program_id(0)
    start = (blocks - 1 - pid // (docs * heads)) * BM  # the longest rows of tiles first: they take longest
    h = (pid % heads).to(tl.int64)
    qa, Tq = _document(CUQ, pid % (docs * heads) // heads)
    ka, Tk = _document(CUK, pid % (docs * heads) // heads)
    if start < Tq:
        i, d = start + tl.arange(0, BM), tl.arange(0, BD)
        K += h // group * HS
        V += h // group * HS
        q = _rows(Q + h * HS, qa, i, Tq, q_stride, d, HS)
        m = tl.full([BM], float('-inf'), dtype=tl.float32)
        l = tl.zeros([BM], dtype=tl.float32)
        acc = tl.zeros([BM, BD], dtype=tl.float32)
        hi = tl.maximum(tl.minimum(Tk, start + BM + Tk - Tq), 0)
        full = tl.minimum(Tk, tl.maximum(start + 1 + Tk - Tq, 0)) // BN * BN  # keys that need no mask
        acc, m, l = _attn_steps(acc, m, l, q, K, V, ka, 0, full, i, Tq, Tk, k_stride, v_stride, d, scale,
                                False, HS, BN)
        acc, m, l = _attn_steps(acc, m, l, q, K, V, ka, full, hi, i, Tq, Tk, k_stride, v_stride, d, scale,
                                True, HS, BN)
        blind = l == 0.0  # a query with no visible key: output 0, and lse = inf makes p 0 in the backward
        l = tl.where(blind, 1.0, l)
        o = O + ((qa + i).to(tl.int64)[:, None] * heads + h) * HS + d[None, :]
        _write(o, acc / l[:, None], (i < Tq)[:, None] & (d < HS)[None, :])
        tl.store(LSE + h * N + qa + i, tl.where(blind, float('inf'), m + tl.log2(l)), mask=i < Tq)

@jit
def _attn_dq(Q, K, V, O, DO, LSE, DELTA, DQ, CUQ, CUK, N, q_stride, k_stride, v_stride, g_stride, heads,
             group, docs, blocks, scale, raw, HS: constexpr, BD: constexpr, BM: constexpr, BN: constexpr):
    pid = tl.program_id(0)
    start = (blocks - 1 - pid // (docs * heads)) * BM
    h = (pid % heads).to(tl.int64)
    qa, Tq = _document(CUQ, pid % (docs * heads) // heads)
    ka, Tk = _document(CUK, pid % (docs * heads) // heads)
    if start < Tq:
        i, d = start + tl.arange(0, BM), tl.arange(0, BD)
        K += h // group * HS
        V += h // group * HS
        q = _rows(Q + h * HS, qa, i, Tq, q_stride, d, HS)
        do = _rows(DO + h * HS, qa, i, Tq, g_stride, d, HS)
        lse = tl.load(LSE + h * N + qa + i, mask=i < Tq, other=float('inf'))
        o = _rows(O + h * HS, qa, i, Tq, heads * HS, d, HS).to(tl.float32)
        delta = tl.sum(o * do.to(tl.float32), 1)
        tl.store(DELTA + h * N + qa + i, delta, mask=i < Tq)  # for _attn_dkdv, which comes after
        dq = tl.zeros([BM, BD], dtype=tl.float32)
        hi = tl.maximum(tl.minimum(Tk, start + BM + Tk - Tq), 0)
        for at in range(0, hi, BN):
            j = at + tl.arange(0, BN)
            k = _rows(K, ka, j, Tk, k_stride, d, HS)
            p = tl.exp2(_scores(q, k, i, j, Tq, Tk, scale, True) - lse[:, None])
            dp = tl.dot(do, tl.trans(_rows(V, ka, j, Tk, v_stride, d, HS)), input_precision='ieee')
            dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision='ieee')
        out = DQ + ((qa + i).to(tl.int64)[:, None] * heads + h) * HS + d[None, :]
        _write(out, dq * raw, (i < Tq)[:, None] & (d < HS)[None, :])

@jit
def _attn_dkdv(Q, K, V, DO, LSE, DELTA, DK, DV, CUQ, CUK, N, q_stride, k_stride, v_stride, g_stride, kv_heads,
               group, docs, scale, raw, HS: constexpr, BD: constexpr, BM: constexpr, BN: constexpr):
    pid = tl.program_id(0)
    start = pid // (docs * kv_heads) * BN
    kvh = (pid % kv_heads).to(tl.int64)
    qa, Tq = _document(CUQ, pid % (docs * kv_heads) // kv_heads)
    ka, Tk = _document(CUK, pid % (docs * kv_heads) // kv_heads)
    if start < Tk:
        j, d = start + tl.arange(0, BN), tl.arange(0, BD)
        k = _rows(K + kvh * HS, ka, j, Tk, k_stride, d, HS)
        v = _rows(V + kvh * HS, ka, j, Tk, v_stride, d, HS)
        dk = tl.zeros([BN, BD], dtype=tl.float32)
        dv = tl.zeros([BN, BD], dtype=tl.float32)
        lo = tl.maximum(start - (Tk - Tq), 0) // BM * BM  # the first query that sees key `start`
        for g in range(0, group):
            h = kvh * group + g
            for at in range(lo, Tq, BM):
                i = at + tl.arange(0, BM)
                q = _rows(Q + h * HS, qa, i, Tq, q_stride, d, HS)
                do = _rows(DO + h * HS, qa, i, Tq, g_stride, d, HS)
                lse = tl.load(LSE + h * N + qa + i, mask=i < Tq, other=float('inf'))
                delta = _read(DELTA + h * N + qa + i, i < Tq)
                p = tl.exp2(_scores(q, k, i, j, Tq, Tk, scale, True) - lse[:, None])
                dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision='ieee')
                ds = p * (tl.dot(do, tl.trans(v), input_precision='ieee') - delta[:, None])
                dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision='ieee')
        ok = (j < Tk)[:, None] & (d < HS)[None, :]
        out = ((ka + j).to(tl.int64)[:, None] * kv_heads + kvh) * HS + d[None, :]
        _write(DK + out, dk * raw, ok)
        _write(DV + out, dv, ok)

def _attn_sizes(q, back):
    """Tiles and how they run. A warpgroup, 4 warps, multiplies 64 rows at a time on Hopper: 64 rows go with 4
    warps, 128 with 8. On an H200, 16 documents of 2048, hs=128: forward 335 TFLOP/s, 220 with 4 warps for 128
    rows; backward 233, 122 with 8 warps for 64 rows. Shared memory, bf16, hs=128: 128 + 2 * 3 * 128 rows of
    256 B = 224 KB."""
    hs, roomy = q.size(-1), _roomy(q)
    if INTERPRET:
        size = 16, 16, 4, 1
    elif q.element_size() == 4:  # without tensor cores: registers are the limit
        size = (32, 32, 8, 1) if hs <= 64 else (16, 16, 8, 1)
    elif hs <= 64:
        size = 64, 64, 4, 3
    elif hs > 128:
        size = (32, 32, 4, 1) if back else (64, 32, 4, 2)
    elif back:
        size = 64, 64, 4, 2 if roomy else 1
    else:
        size = (128, 128, 8, 3) if roomy else (64, 64, 4, 2)
    return dict(zip(('BM', 'BN', 'num_warps', 'num_stages'), size), HS=hs, BD=_pow2(hs, 16))

class _Flash(torch.autograd.Function):
    """q (N, nh, hs), k and v (M, nkv, hs) packed; cu_q, cu_k int32; longest: the most queries and keys of a
    document."""

    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, longest, scale):
        q, k, v = map(_heads, (q, k, v))
        (N, nh, _), nkv, docs = q.shape, k.size(1), len(cu_q) - 1
        size = _attn_sizes(q, False)
        o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)  # rows behind the last document stay 0
        lse = torch.zeros(nh, N, dtype=torch.float32, device=q.device)
        blocks = _cdiv(longest[0], size['BM'])
        strides = [t.stride(0) for t in (q, k, v)]
        _launch(_attn_fwd, (blocks * docs * nh,), q, k, v, o, lse, cu_q, cu_k, N, *strides, nh, nh // nkv,
                docs, blocks, scale * LOG2E, **size)
        ctx.save_for_backward(q, k, v, o, lse, cu_q, cu_k)
        ctx.longest, ctx.scale = longest, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v = ctx.saved_tensors[:3]
        o, lse, *borders = ctx.saved_tensors[3:]
        do, delta = _heads(do), torch.empty_like(lse)
        (N, nh, _), nkv, docs = q.shape, k.size(1), len(borders[0]) - 1
        size, scales = _attn_sizes(q, True), (ctx.scale * LOG2E, ctx.scale)
        dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        where = *borders, N, *(t.stride(0) for t in (q, k, v, do))
        blocks, columns = _cdiv(ctx.longest[0], size['BM']), _cdiv(ctx.longest[1], size['BN'])
        _launch(_attn_dq, (blocks * docs * nh,), q, k, v, o, do, lse, delta, dq, *where, nh, nh // nkv, docs,
                blocks, *scales, **size)
        _launch(_attn_dkdv, (columns * docs * nkv,), q, k, v, do, lse, delta, dk, dv, *where, nkv, nh // nkv,
                docs, *scales, **size)
        return dq, dk, dv, None, None, None, None

def _sdpa(q, k, v, mask=None, causal=False, scale=None):
    """torch's fused attention of q (B, Tq, nh, hs), k and v (B, Tk, nkv, hs)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    group = q.size(1) // k.size(1)
    if group > 1 and q.is_cuda and not _tensor_cores(q.device):  # enable_gqa has no fast kernel there
        k, v, group = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), 1
    y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=group > 1)
    return y.transpose(1, 2)

def _rectangles(q, k, v, cu_q, cu_k, causal, scale):
    """The twin of packed attention: documents of the same power of two of queries and keys are one
    rectangle."""
    queries, keys = cu_q.diff(), cu_k.diff()
    groups = {}
    for doc, (n, m) in enumerate(zip(queries.tolist(), keys.tolist())):
        if n:
            groups.setdefault((_pow2(n), _pow2(m)), []).append(doc)
    places, parts = [], []
    for docs in groups.values():
        docs = torch.tensor(docs, device=q.device)
        n, m = queries[docs, None], keys[docs, None]
        i = torch.arange(int(n.max()), device=q.device)
        j = torch.arange(max(int(m.max()), 1), device=q.device)
        rows = cu_q[docs, None] + torch.minimum(i, n - 1)  # behind its end a document's last row once more
        columns = cu_k[docs, None] + torch.minimum(j, (m - 1).clamp_min(0))
        mask = None
        if cu_k is not cu_q or not causal:  # of its own keys a causal query sees none that was repeated
            mask = (j < m)[:, None, :] & ((j <= (i + m - n)[..., None]) if causal else True)
            mask = mask[:, None]
        out = _sdpa(q[rows], k[columns], v[columns], mask, causal and mask is None, scale)
        places.append(rows[i < n])
        parts.append(out[i < n])
    out = torch.zeros_like(q)
    return out.index_copy(0, torch.cat(places), torch.cat(parts)) if parts else out

def flash_attention(q, k, v, cu_seqlens=None, causal=True, scale=None, longest=0, cu_keys=None):
    """softmax(q k' * scale) v. q (B, T, nh, hs), k and v (B, Tk, nkv, hs), nh a multiple of nkv; or packed
    (N, nh, hs) with cu_seqlens (n+1,) int: document d is rows cu[d]:cu[d+1] and sees itself only, rows behind
    the last one are 0. Tk > T: the queries are the last T positions. scale: hs^-0.5. longest: of the
    documents, where it is known: a GPU need not be waited for then. cu_keys (n+1,): document d's keys are
    other rows than its queries, cu_keys[d]:cu_keys[d+1], at whose end the queries stand; longest is then
    (queries, keys). -> like q. T=1: v."""
    if q.size(-2) % k.size(-2) or q.dim() != (4 if cu_seqlens is None else 3):
        raise ValueError(f'flash_attention: got q {tuple(q.shape)}, k {tuple(k.shape)}; expected (B, T, '
                         'heads, hs), or (N, heads, hs) with cu_seqlens, query heads a multiple of key heads')
    scale = q.size(-1) ** -0.5 if scale is None else float(scale)
    if cu_seqlens is None:
        T, Tk = q.size(1), k.size(1)
        later = causal and T != Tk
        seen = torch.ones(T, Tk, dtype=torch.bool, device=q.device).tril(Tk - T) if later else None
        return _sdpa(q, k, v, seen, causal and not later, scale)
    if causal and cu_keys is None and docs_in_c(q):
        cu, n = cu_seqlens.long(), len(cu_seqlens) - 1
        rows, first, tasks = torch.arange(int(cu[-1])), torch.zeros(n, dtype=torch.long), torch.arange(n + 1)
        return doc_attention(q, k, v, rows, cu, first, tasks, int(cu.diff().max()) if n else 0, scale)
    cu_q = cu_seqlens.int()
    cu_k = cu_q if cu_keys is None else cu_keys.int()
    if not (causal and takes(q) and k.numel() and _tensor_cores(q.device)) or len(cu_q) < 2:
        return _rectangles(q, k, v, cu_q, cu_k, causal, scale)
    if not longest:  # the one host sync
        longest = int(cu_q.diff().max()), int(cu_k.diff().max())
    both = longest if isinstance(longest, tuple) else (longest, longest)
    return _Flash.apply(q, k, v, cu_q, cu_k, both, scale) if both[0] else torch.zeros_like(q)

def docs_in_c(x):
    """Does the C attention take x (..., hs)? float32 on the CPU, hs % 16 = 0, a C compiler, not
    --kernels=torch."""
    return x.shape[-1] % 16 == 0 and in_c(x) and native.docs(x.shape[-1]) is not None

def doc_attention(q, k, v, rows, cu, first, tasks, longest, scale=None):
    """Causal attention of documents that are paths through flat rows, in C (`docs_in_c`). q (N, nh, hs), k
    and v (N, nkv, hs); int64: rows (M,), the flat row of each position of each document; cu (docs + 1,) their
    borders; first (docs,): positions before it are keys only, since another document has them as queries;
    tasks (n + 1,): borders of the runs of documents that share rows; longest: the most positions of one. ->
    (N, nh, hs), 0 in rows that nobody asks for. Rows [0, 1, 0, 2], cu [0, 2, 4], first [0, 1], tasks [0, 2]:
    a prompt with two answers."""
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return native.DocAttention.apply(q, k, v, scale, rows, cu, first, tasks, longest)


# ----------------------------------------------------------------------------------------------------
# Paged attention (2309.06180): one new token a row against keys that lie scattered over the cache's blocks
#
#    row b:  block_table [7, 2, 9]     cache:  block 0 | 1 | 2 ######## | ... | 7 ######## | 8 | 9 ##......
#            tokens  0........511 | 512.....1023 | 1024..                          (# = this row's keys)
#            split       0              1            2
#    a program: one split of 512 tokens, one key head and all query heads that share it (a small matmul).
#    Splits are merged by a second kernel: a long context keeps the whole chip busy. The splits depend on the
#    row's own length only, so neither the batch around a row nor the width of the table changes a bit of it.
#| def merge(ms, ls, accs):                           # split softmaxes -> the whole one
#|     m = max(ms)
#|     weights = [np.exp(x - m) for x in ms]
#|     return sum(w * a for w, a in zip(weights, accs)) / sum(w * l for w, l in zip(weights, ls))

@jit
def _paged_split(Q, K, V, TABLE, LENS, M, L, ACC, q_stride, table_stride, block_stride, slot_stride,
                 head_stride, size, heads, group, splits, scale, HS: constexpr, BD: constexpr,
                 BG: constexpr, BN: constexpr, SPLIT: constexpr):
    b, kvh, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    lo = split * SPLIT
    hi = tl.minimum(tl.load(LENS + b).to(tl.int32), lo + SPLIT)
    if lo < hi:
        g, d = tl.arange(0, BG), tl.arange(0, BD)
        some = (g < group)[:, None] & (d < HS)[None, :]
        q = tl.load(Q + b * q_stride + (kvh * group + g)[:, None] * HS + d[None, :], mask=some, other=0.0)
        m = tl.full([BG], float('-inf'), dtype=tl.float32)
        l = tl.zeros([BG], dtype=tl.float32)
        acc = tl.zeros([BG, BD], dtype=tl.float32)
        for start in range(lo, hi, BN):
            t = start + tl.arange(0, BN)
            block = tl.load(TABLE + b * table_stride + t // size, mask=t < hi, other=0).to(tl.int64)
            ok = (t < hi)[:, None] & (d < HS)[None, :]
            at = (block * block_stride + t % size * slot_stride + kvh * head_stride)[:, None] + d[None, :]
            k = tl.load(K + at, mask=ok, other=0.0).to(q.dtype)
            s = tl.dot(q, tl.trans(k), input_precision='ieee') * scale
            s = tl.where((t < hi)[None, :], s, float('-inf'))
            new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            keep = tl.exp2(m - new)
            v = tl.load(V + at, mask=ok, other=0.0).to(q.dtype)
            acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision='ieee')
            l = l * keep + tl.sum(p, 1)
            m = new
        out = (b * heads + kvh * group + g) * splits + split
        tl.store(M + out, m, mask=g < group)
        tl.store(L + out, l, mask=g < group)
        tl.store(ACC + out[:, None] * HS + d[None, :], acc, mask=some)

@jit
def _paged_merge(M, L, ACC, LENS, OUT, heads, splits,
                 HS: constexpr, BD: constexpr, BS: constexpr, SPLIT: constexpr):
    b, h, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, BD)
    n = tl.cdiv(tl.load(LENS + b).to(tl.int32), SPLIT)
    base = (b * heads + h) * splits
    top, total = float('-inf'), 0.0
    acc = tl.zeros([BD], dtype=tl.float32)
    for start in range(0, n, BS):
        s = start + tl.arange(0, BS)
        m = tl.load(M + base + s, mask=s < n, other=float('-inf'))
        new = tl.maximum(top, tl.max(m, 0))
        w = tl.exp2(m - new)
        keep = tl.exp2(top - new)
        ok = (s < n)[:, None] & (d < HS)[None, :]
        part = _read(ACC + (base + s)[:, None] * HS + d[None, :], ok)
        total = total * keep + tl.sum(w * _read(L + base + s, s < n), 0)
        acc = acc * keep + tl.sum(w[:, None] * part, 0)
        top = new
    acc = acc / tl.where(n > 0, total, 1.0)
    _write(OUT + (b * heads + h) * HS + d, acc, d < HS)

@jit
def _kv_write(K, V, KC, VC, SLOTS, k_stride, v_stride, block_stride, slot_stride, head_stride, size, nkv,
              HS: constexpr, BH: constexpr, BD: constexpr):
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(SLOTS + n).to(tl.int64)
    if slot >= 0:
        h, d = tl.arange(0, BH)[:, None], tl.arange(0, BD)[None, :]
        ok = (h < nkv) & (d < HS)
        at = slot // size * block_stride + slot % size * slot_stride + h * head_stride + d
        k = tl.load(K + n * k_stride + h * HS + d, mask=ok, other=0.0)
        v = tl.load(V + n * v_stride + h * HS + d, mask=ok, other=0.0)
        _write(KC + at, k, ok)
        _write(VC + at, v, ok)

def _paged_sizes(hs, itemsize):
    """Not by the batch: a row's bits would then depend on its neighbours. bf16, hs=128 on an H200, splits of
    512: 3726 GB/s (88 % of a copy's) for 64 rows of 4096 keys, 2431 for one row of 32768. float32: without
    tensor cores, tiles that stay in registers."""
    if INTERPRET:
        size = 32, 16, 4, 1
    elif itemsize == 4:
        size = 256, 16, 8, 1
    else:
        size = 512, 64 if hs <= 128 else 32, 4, 4
    return dict(zip(('SPLIT', 'BN', 'num_warps', 'num_stages'), size))

def _cache_strides(k_cache, v_cache):
    """Of a block, a slot, a head: the same in both."""
    if k_cache.stride() != v_cache.stride() or k_cache.stride(-1) != 1:
        raise ValueError(f'the caches differ in memory: strides {k_cache.stride()} and {v_cache.stride()}')
    return k_cache.stride()[:3]

def _paged_triton(q, k_cache, v_cache, block_table, lens, scale):
    q, table = _heads(q), _dense(block_table)
    (B, nh, hs), (_, block_size, nkv, _) = q.shape, k_cache.shape
    size, heads = _paged_sizes(hs, q.element_size()), dict(HS=hs, BD=_pow2(hs, 16))
    splits = max(1, _cdiv(table.size(1) * block_size, size['SPLIT']))
    m, l = _numbers(q, B, nh, splits, count=2)
    acc, out = _numbers(q, B, nh, splits, hs), torch.empty(q.shape, dtype=q.dtype, device=q.device)
    strides = q.stride(0), table.stride(0), *_cache_strides(k_cache, v_cache)
    _launch(_paged_split, (B, nkv, splits), q, k_cache, v_cache, table, lens, m, l, acc, *strides, block_size,
            nh, nh // nkv, splits, scale * LOG2E, BG=_pow2(nh // nkv, 16), **heads, **size)
    _launch(_paged_merge, (B, nh), m, l, acc, lens, out, nh, splits, BS=16, SPLIT=size['SPLIT'], **heads,
            num_warps=4)
    return out

def paged_attention(q, k_cache, v_cache, block_table, context_lens, scale=None):
    """Attention of one query token a row over a paged cache (no gradient). q (B, nh, hs), caches (blocks,
    block_size, nkv, hs), block_table (B, max_blocks) int, context_lens (B,) int: the keys of row b are the
    first context_lens[b] slots of its blocks, its own among them. -> (B, nh, hs), 0 where the length is 0.
    What unused slots hold does not matter. One key: the output is v."""
    scale = q.size(-1) ** -0.5 if scale is None else float(scale)
    if takes(q) and _tensor_cores(q.device):
        return _paged_triton(q, k_cache, v_cache, block_table, context_lens, scale)
    size, longest = k_cache.size(1), int(context_lens.max()) if len(q) else 0
    if longest == 0:
        return torch.zeros_like(q)
    table = block_table[:, :_cdiv(longest, size)].long().clamp_min(0)  # unused entries may hold -1
    mask = torch.arange(longest, device=q.device) < context_lens[:, None]
    row, slot = (~mask).nonzero().unbind(1)
    k, v = (c[table].flatten(1, 2)[:, :longest].to(q.dtype) for c in (k_cache, v_cache))  # (B, L, nkv, hs)
    k[row, slot] = v[row, slot] = 0  # an unwritten slot may hold nan, and 0 * nan is nan
    y = _sdpa(q[:, None], k, v, mask[:, None, None], scale=scale)[:, 0]
    return torch.where((context_lens > 0)[:, None, None], y, 0)

def kv_write(k, v, k_cache, v_cache, slots):
    """Writes k, v (N, nkv, hs) into the caches (blocks, block_size, nkv, hs), in place: token i goes to slot
    slots[i] = block * block_size + offset; a negative slot is padding and is skipped. Two tokens must not
    share a slot."""
    size = k_cache.size(1)
    if takes(k):
        (N, nkv, hs), k, v = k.shape, _heads(k), _heads(v)
        strides = k.stride(0), v.stride(0), *_cache_strides(k_cache, v_cache)
        _launch(_kv_write, (N,), k, v, k_cache, v_cache, slots, *strides, size, nkv, HS=hs, BH=_pow2(nkv),
                BD=_pow2(hs), num_warps=4)
        return
    slots = slots.long()
    if (slots < 0).any():
        k, v, slots = k[slots >= 0], v[slots >= 0], slots[slots >= 0]
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache.index_put_((slots // size, slots % size), new.to(cache.dtype))


# ----------------------------------------------------------------------------------------------------
# Drawing a token: one number u in [0, 1) a row, and the first word at which the mass so far exceeds u of all
#
#    words ->                       two launches. _draw_stats: a program for each 4096 words leaves their
#    +------+------+------+------+  maximum, their mass at temperature 1 and at the row's, their largest word.
#    | 4096 | 4096 | 4096 | 4096 |  _draw_pick: a program for each row adds the masses up, finds the part in
#    +------+------+------+------+  which the goal lies (^), and reads that part alone once more. The logits
#      mass   mass    ^             are read once, where torch reads and writes them ten times: 2 ms -> 0.07,
#                                   256 rows of 151,936 words on an H200.
#| def draw(z, u, T, block=3):
#|     parts = [np.exp(z[v:v + block] / T).sum() for v in range(0, len(z), block)]
#|     goal = u * sum(parts)
#|     c = int(np.argmax(np.cumsum(parts) > goal))
#|     e = np.exp(z[c * block:(c + 1) * block] / T)
#|     return c * block + int(np.argmax(np.cumsum(e) > goal - sum(parts[:c])))

@jit
def _draw_stats(Z, HEAT, MAX, ONE, ALL, ARG, V, z_stride, chunks, BLOCK: constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = chunk * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(Z + row * z_stride + v, mask=v < V, other=float('-inf'))
    heat, m = tl.load(HEAT + row), tl.max(z, 0)
    base = tl.where(m == float('-inf'), 0.0, m)
    at = row * chunks + chunk
    tl.store(MAX + at, m)
    tl.store(ONE + at, tl.sum(tl.exp(z - base), 0))
    tl.store(ALL + at, tl.sum(tl.exp((z - base) / tl.where(heat > 0.0, heat, 1.0)), 0))
    tl.store(ARG + at, tl.min(tl.where((z == m) & (v < V), v, V), 0))

@jit
def _first(cum, part, goal, i, END: constexpr):
    """The first i at which the mass so far exceeds the goal; behind it, by rounding, the last that has mass;
    0 where none has (nan)."""
    has = part > 0.0
    at = tl.min(tl.where((cum > goal) & has, i, END), 0)
    return tl.where(at < END, at, tl.maximum(tl.max(tl.where(has, i, -1), 0), 0))

@jit
def _draw_pick(Z, U, HEAT, MAX, ONE, ALL, ARG, TOKEN, LOGP, RAW, V, z_stride, chunks,
               CHUNKS: constexpr, BLOCK: constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    at, ok, heat = row * chunks + c, c < chunks, tl.load(HEAT + row)
    cool = 1.0 / tl.where(heat > 0.0, heat, 1.0)
    m = tl.load(MAX + at, mask=ok, other=float('-inf'))
    top = tl.max(m, 0)
    base = tl.where(m == float('-inf'), 0.0, m)  # what the chunk's sums stand on
    one = tl.sum(_read(ONE + at, ok) * tl.exp(base - top), 0)
    part = _read(ALL + at, ok).to(tl.float64) * tl.exp((base - top) * cool).to(tl.float64)
    all_mass = tl.sum(part, 0)
    goal = tl.load(U + row) * all_mass
    chunk = _first(tl.cumsum(part, 0), part, goal, c, CHUNKS)
    before = tl.sum(tl.where(c < chunk, part, 0.0), 0)
    i = tl.arange(0, BLOCK)
    z = tl.load(Z + row * z_stride + chunk * BLOCK + i, mask=chunk * BLOCK + i < V, other=float('-inf'))
    mass = tl.exp((z - top) * cool).to(tl.float64)
    token = chunk * BLOCK + _first(tl.cumsum(mass, 0) + before, mass, goal, i, BLOCK)
    best = tl.min(tl.where((m == top) & ok, c, CHUNKS), 0)
    largest = tl.load(ARG + row * chunks + tl.minimum(best, chunks - 1))
    token = tl.minimum(tl.where(heat > 0.0, token, largest), V - 1)
    z_t = tl.load(Z + row * z_stride + token)
    raw = z_t - top - tl.log(one)
    tl.store(TOKEN + row, token.to(tl.int64))
    tl.store(RAW + row, raw)
    tl.store(LOGP + row, tl.where(heat > 0.0, (z_t - top) * cool - tl.log(all_mass).to(tl.float32), raw))

def _draw_triton(z, u, temperature):
    z, BLOCK = _dense(z), min(_pow2(z.size(1), 16), 64 if INTERPRET else 4096)
    (n, V), chunks = z.shape, _cdiv(z.size(1), BLOCK)
    stats = _numbers(z, n, chunks, count=3)
    stats.append(torch.empty(n, chunks, dtype=torch.int32, device=z.device))
    token, (logp, raw) = torch.empty(n, dtype=torch.int64, device=z.device), _numbers(z, n, count=2)
    _launch(_draw_stats, (n, chunks), z, temperature, *stats, V, z.stride(0), chunks, BLOCK=BLOCK,
            num_warps=8)
    _launch(_draw_pick, (n,), z, u, temperature, *stats, token, logp, raw, V, z.stride(0), chunks,
            CHUNKS=_pow2(chunks, 2), BLOCK=BLOCK, num_warps=8)
    return token, logp, raw

def draw(z, u, temperature):
    """One token a row from softmax(z / temperature), by its distribution function: the first at which the
    mass so far exceeds u of all. z (n, V) float logits (-inf is never drawn), u (n,) float64 in [0, 1),
    temperature (n,) of z's dtype, 0 = the largest logit. -> token (n,) int64, its log-prob at the temperature
    (greedy: at 1), at 1; nan where z is not finite. z = log [.2, .5, .3], temperature 1: u .1 -> 0, u .69 ->
    1, u .7 -> 2."""
    if z.device.type == 'mps':  # it has no float64, and a row of logits is small beside a forward
        return tuple(t.to(z.device) for t in draw(z.cpu(), u.cpu(), temperature.cpu()))
    if z.dtype == torch.float32 and takes(z):
        return _draw_triton(z, u, temperature)
    if in_c(z) and z.stride(1) == 1 and len(z) and (out := native.draw(z, u, temperature)):
        return out
    hot = z / torch.where(temperature > 0, temperature, 1)[:, None]
    logp = hot - hot.logsumexp(-1, keepdim=True)  # log_softmax loses 1e-4 nats at 150,000 words
    mass = logp.exp().cumsum(-1, dtype=torch.float64)
    whole = mass[:, -1:]
    goal = torch.minimum(u[:, None] * whole, torch.nextafter(whole, torch.zeros_like(whole)))
    drawn = torch.searchsorted(mass, goal, right=True)[:, 0]
    drawn.clamp_max_(z.size(-1) - 1)  # beyond the end only where z is nan
    token = torch.where(temperature > 0, drawn, z.argmax(-1))
    raw = z.gather(-1, token[:, None])[:, 0] - z.logsumexp(-1)
    return token, torch.where(temperature > 0, logp.gather(-1, token[:, None])[:, 0], raw), raw
