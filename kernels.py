"""
Kernels: what a Transformer and its RL losses spend their time in, each as a lesson: a drawing of the tiles, the algorithm in a
few lines of NumPy (the lines behind #| are real code: a test runs them), the Triton kernel, and a plain PyTorch twin.

    CUDA -> Triton.   CPU -> the twin.   TRITON_INTERPRET=1 -> the Triton source, interpreted on the CPU (for tests; not bfloat16).
    kernels.use('auto' | 'torch' | 'triton') switches all of them; kernels.which() says in one line what runs.

Left to torch on purpose: dense attention on CUDA (its cuDNN and FlashAttention kernels beat a readable one; ours takes packed
batches, windows and paged caches), the matmuls themselves, and AdamW (fused=True is one pass over its four tensors already).
Triton 3.6 to 3.9: plain pointers, a mask on every load, float32 inside, no atomics (two runs agree to the bit), a table of sizes
instead of autotuning.
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
else:  # Mac, Windows, a CPU-only torch: the sources below are only read, never run
    class tl:
        constexpr = None

jit = triton.jit if triton else (lambda f: f)
CHUNK_BYTES = 32 << 20  # the most that a block of logits may take on CPU; on CUDA 2 GiB, or 1/32 of a smaller card
_mode = 'auto'


def use(mode='auto'):
    """Choose the implementation: 'auto' (Triton on CUDA, else PyTorch), 'torch', 'triton' (a ValueError where it cannot run)."""
    global _mode
    if mode not in ('auto', 'torch', 'triton'):
        raise ValueError(f"kernels '{mode}' is unknown: set --kernels=auto, torch or triton")
    if mode == 'triton' and importlib.util.find_spec('triton') is None:
        raise ValueError('kernels triton: the package triton is not installed here: pip install triton (Linux), or set --kernels=torch')
    if mode == 'triton' and not (torch.cuda.is_available() or INTERPRET):
        raise ValueError('kernels triton: no CUDA device here: set --kernels=torch, or TRITON_INTERPRET=1 to interpret the source on the CPU')
    _mode = mode


def which():
    """One line for the log: what a call on the best device here would run, 'torch (CPU)', 'triton (CUDA)' ..."""
    device = 'CUDA' if torch.cuda.is_available() else 'CPU'
    if _mode == 'torch' or triton is None or not (torch.cuda.is_available() or INTERPRET):
        return f'torch ({device})'
    return 'triton (interpreted on CPU)' if INTERPRET else 'triton (CUDA)'


def takes(x):
    """Does a Triton kernel take this tensor? float64, empty tensors and what torch.compile makes kernels of are the PyTorch twin's. (A stage asks too: its own lines are a twin.)"""
    if _mode == 'torch' or triton is None or not (x.is_cuda or INTERPRET) or x.numel() == 0 or x.dtype == torch.float64 or torch.compiler.is_compiling():
        return False
    if INTERPRET and x.dtype == torch.bfloat16:
        raise ValueError("Triton's interpreter computes bfloat16 wrongly: use float32 or float16, or unset TRITON_INTERPRET")
    return True


@functools.lru_cache(None)
def _without_native():
    print('no native.py: decoding is about 4 times faster with it', file=sys.stderr, flush=True)


def in_c(x):
    """May native.py take this tensor? float32 on the CPU, not under --kernels=torch."""
    if _mode == 'torch' or INTERPRET or x.device.type != 'cpu' or x.dtype != torch.float32 or torch.is_autocast_enabled('cpu') or torch.compiler.is_compiling():
        return False
    if native is None:
        _without_native()
    return native is not None


def _launch(kernel, grid, *args, **meta):
    """Every kernel starts here: on its tensors' device, whichever is current."""
    with torch.cuda.device_of(args[0]):
        kernel[grid](*args, **meta)


@functools.lru_cache(None)
def _roomy():
    """Has a block 227 KB of shared memory (H100, H200, B200), or an A100's 163 and a GeForce's 99? The large tiles below are for the former."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() in ((9, 0), (10, 0), (10, 3))


def _pow2(n, least=1):
    return max(least, 1 << max(0, n - 1).bit_length())


def _cdiv(a, b):
    return -(-a // b)


def _flat(x):
    """(..., C) -> (N, C) with neighbours in memory along C; a copy only where the strides demand one."""
    x = x.reshape(-1, x.size(-1))
    return x if x.stride(1) == 1 or x.size(1) == 1 else x.contiguous()


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---------------------------------------------------------------------------------------------------------------------
# RMSNorm and LayerNorm, with the residual add in the same pass
#
#        C ->                    a program: ROWS whole rows, so sums stay inside it. One read of x (and residual), one write of
#      +--------------+          h and y. Backward: a program strides down the rows  p, p + P, p + 2P ...  and keeps its sum of
#    N | ROWS x C     |  p = 0   dw, db in registers; P partial sums are added at the end, in a fixed order.
#      +--------------+
#      | ROWS x C     |  p = 1
#      +--------------+
#| def norm(x, w, b, eps, layer):                    # rms: layer=False, b=0
#|     d = x - x.mean(-1, keepdims=True) if layer else x
#|     return d / np.sqrt((d * d).mean(-1, keepdims=True) + eps) * w + b
#| def norm_backward(dy, x, w, eps, layer):          # the norm removes from its gradient what it removed from x: scale (and mean)
#|     d = x - x.mean(-1, keepdims=True) if layer else x
#|     rstd = 1 / np.sqrt((d * d).mean(-1, keepdims=True) + eps)
#|     xhat, g = d * rstd, dy * w
#|     g = g - xhat * (g * xhat).mean(-1, keepdims=True) - (g.mean(-1, keepdims=True) if layer else 0)
#|     return g * rstd, (dy * xhat).sum(0), dy.sum(0)

@jit
def _norm_fwd(X, R, W, B, Y, H, MEAN, RSTD, N, C, sx, sr, eps, LAYER: tl.constexpr, RES: tl.constexpr, BIAS: tl.constexpr,
              ROWS: tl.constexpr, BLOCK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BLOCK)
    ok = (r < N)[:, None] & (c < C)[None, :]
    x = tl.load(X + r[:, None] * sx + c[None, :], mask=ok, other=0.0).to(tl.float32)
    if RES:
        x += tl.load(R + r[:, None] * sr + c[None, :], mask=ok, other=0.0).to(tl.float32)
        h = x.to(H.dtype.element_ty)
        tl.store(H + r[:, None] * C + c[None, :], h, mask=ok)
        x = h.to(tl.float32)  # subtle: norm what was stored, for the backward will read that
    if LAYER:
        mean = tl.sum(x, 1) / C
        tl.store(MEAN + r, mean, mask=r < N)
        x = tl.where(ok, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
    tl.store(RSTD + r, rstd, mask=r < N)
    y = x * rstd[:, None] * tl.load(W + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        y += tl.load(B + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    tl.store(Y + r[:, None] * C + c[None, :], y.to(Y.dtype.element_ty), mask=ok)

@jit
def _norm_bwd(DY, GH, H, W, MEAN, RSTD, DX, DW, DB, N, C, sh, P, LAYER: tl.constexpr, RES: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
              STAGES: tl.constexpr):
    p = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    w = tl.load(W + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    dw = tl.zeros([BLOCK], dtype=tl.float32)
    db = tl.zeros([BLOCK], dtype=tl.float32)
    for start in tl.range(p * ROWS, N, P * ROWS, num_stages=STAGES):
        r = (start + tl.arange(0, ROWS)).to(tl.int64)
        ok = (r < N)[:, None] & (c < C)[None, :]
        dy = tl.load(DY + r[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        xhat = tl.load(H + r[:, None] * sh + c[None, :], mask=ok, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + r, mask=r < N, other=0.0)[:, None]
        if LAYER:
            xhat = tl.where(ok, xhat - tl.load(MEAN + r, mask=r < N, other=0.0)[:, None], 0.0)
        xhat = xhat * rstd
        g = dy * w
        d = g - xhat * (tl.sum(g * xhat, 1) / C)[:, None]
        if LAYER:
            d = d - (tl.sum(g, 1) / C)[:, None]
        d = d * rstd
        if RES:  # h = x + residual is an output too: its own gradient joins
            d += tl.load(GH + r[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        tl.store(DX + r[:, None] * C + c[None, :], d.to(DX.dtype.element_ty), mask=ok)
        dw += tl.sum(dy * xhat, 0)
        db += tl.sum(dy, 0)
    tl.store(DW + p * C + c, dw, mask=c < C)
    tl.store(DB + p * C + c, db, mask=c < C)

def _norm_sizes(N, C):
    """Tiles of 2048 numbers, or one row: hs=128 -> 16 rows at once; warps by the tile's size."""
    block = _pow2(C, 16)
    rows = max(1, min(2048 // block, _pow2(N)))
    return rows, block, 4 if block <= 2048 else 8 if block <= 8192 else 16

def _norm_programs(tile):
    """(programs of the backward for each multiprocessor, stages of its loads); tile: bytes of ROWS x BLOCK. The next tiles of dy, h and the
    residual's gradient wait in shared memory, stages - 1 of each: 6 * 8 KB in bf16 at C=4096. 128 registers a thread allow two programs. H200, (16384,
    4096): 86 % of its copy bandwidth for RMSNorm with (2, 3), 75 with one stage, 72 with two, 87 with (1, 4), 75 with (4, 3)."""
    return 2, 3 if tile <= 16384 else 1

class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, residual, layer):
        flat = _flat(x)
        (N, C), res = flat.shape, residual is not None
        r = _flat(residual) if res else flat
        dtype = torch.promote_types(x.dtype, r.dtype)
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        h = torch.empty(x.shape, dtype=dtype, device=x.device) if res else flat
        mean, rstd = (torch.empty(N, dtype=torch.float32, device=x.device) for _ in range(2))
        ROWS, BLOCK, warps = _norm_sizes(N, C)
        _launch(_norm_fwd, (_cdiv(N, ROWS),), flat, r, weight, weight if bias is None else bias, y, h, mean, rstd, N, C, flat.stride(0),
                r.stride(0), eps, LAYER=layer, RES=res, BIAS=bias is not None, ROWS=ROWS, BLOCK=BLOCK, num_warps=warps)
        ctx.save_for_backward(h, weight, bias, mean, rstd)
        ctx.layer, ctx.res, ctx.dtypes = layer, res, (x.dtype, r.dtype)
        ctx.set_materialize_grads(True)
        return (y, h) if res else y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, gh=None):
        h, weight, bias, mean, rstd = ctx.saved_tensors
        shape, h, dy, gh = dy.shape, h.reshape(-1, dy.size(-1)), dy.contiguous(), dy if gh is None else gh.contiguous()
        N, C = h.shape
        ROWS, BLOCK, warps = _norm_sizes(N, C)
        programs, stages = _norm_programs(ROWS * BLOCK * h.element_size())
        P = min(_cdiv(N, ROWS), programs * torch.cuda.get_device_properties(h.device).multi_processor_count if h.is_cuda else 3)
        dx = torch.empty(shape, dtype=h.dtype, device=h.device)
        dw, db = (torch.empty(P, C, dtype=torch.float32, device=h.device) for _ in range(2))
        _launch(_norm_bwd, (P,), dy, gh, h, weight, mean, rstd, dx, dw, db, N, C, h.stride(0), P, LAYER=ctx.layer, RES=ctx.res, ROWS=ROWS,
                BLOCK=BLOCK, STAGES=stages, num_warps=warps)
        return (dx.to(ctx.dtypes[0]), dw.sum(0).to(weight.dtype), None if bias is None else db.sum(0).to(bias.dtype), None,
                dx.to(ctx.dtypes[1]) if ctx.res else None, None)

def rms_norm(x, weight, eps, residual=None):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis (1910.07467). x (..., C), weight (C,). With `residual` (like x),
    h = x + residual is normed: -> (y, h). Any float dtype, float32 inside. x=[3,4], weight 1, eps 0 -> [3,4] / 3.536 = [.849, 1.131]."""
    if takes(x):
        return _Norm.apply(x, weight, None, eps, residual, False)
    h = x if residual is None else x + residual
    y = F.rms_norm(h, (h.size(-1),), weight.to(h.dtype), eps)
    return y if residual is None else (y, h)

def layer_norm(x, weight, bias, eps, residual=None):
    """y = (x - mean) / sqrt(var + eps) * weight + bias over the last axis (1607.06450), biased variance; bias may be None. With
    `residual`, h = x + residual is normed: -> (y, h). x=[1,3], weight 1, bias 0, eps 0 -> [-1, 1]."""
    if takes(x):
        return _Norm.apply(x, weight, bias, eps, residual, True)
    h = x if residual is None else x + residual
    y = F.layer_norm(h, (h.size(-1),), weight.to(h.dtype), None if bias is None else bias.to(h.dtype), eps)
    return y if residual is None else (y, h)


# ---------------------------------------------------------------------------------------------------------------------
# Rotary embedding (2104.09864)
#
#      hs ->   half:  a a a a b b b b     interleaved:  a b a b a b a b     each pair (a, b) of a head is turned by the angle of
#    h +----------------+                                                   its position. A program: one token, all heads of q
#    e | a       b      |  cos, sin of the token are read once, for all     (or of k). The backward turns by minus the angle, so
#    a | a       b      |  heads.                                           no activation has to be kept, and in place is fine.
#    d +----------------+
#| def rope(x, cos, sin, interleaved):               # x (T, nh, hs), tables (T, hs/2)
#|     a, b = (x[..., ::2], x[..., 1::2]) if interleaved else np.split(x, 2, -1)
#|     c, s = cos[:, None], sin[:, None]
#|     a, b = a * c - b * s, b * c + a * s
#|     return np.stack([a, b], -1).reshape(x.shape) if interleaved else np.concatenate([a, b], -1)

@jit
def _rope_heads(X, Y, COS, SIN, n, T, sxb, sxt, sxh, syb, syt, syh, nh, half, PER_TOKEN: tl.constexpr, BACK: tl.constexpr,
                PAIRS: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr):
    h = tl.arange(0, BH)[:, None]
    d = tl.arange(0, BD)[None, :]
    ok = (h < nh) & (d < half)
    row = n if PER_TOKEN else n % T
    cos = tl.load(COS + row * half + d, mask=d < half, other=0.0).to(tl.float32)
    sin = tl.load(SIN + row * half + d, mask=d < half, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    da = 2 * d if PAIRS else d
    db = 2 * d + 1 if PAIRS else d + half
    x = X + (n // T) * sxb + (n % T) * sxt + h * sxh
    y = Y + (n // T) * syb + (n % T) * syt + h * syh
    a = tl.load(x + da, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(x + db, mask=ok, other=0.0).to(tl.float32)
    tl.store(y + da, (a * cos - b * sin).to(Y.dtype.element_ty), mask=ok)
    tl.store(y + db, (b * cos + a * sin).to(Y.dtype.element_ty), mask=ok)

@jit
def _rope(Q, K, YQ, YK, COS, SIN, T, sqb, sqt, sqh, skb, skt, skh, yqb, yqt, yqh, ykb, ykt, ykh, nh, nkv, half, PER_TOKEN: tl.constexpr,
          BACK: tl.constexpr, PAIRS: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        _rope_heads(Q, YQ, COS, SIN, n, T, sqb, sqt, sqh, yqb, yqt, yqh, nh, half, PER_TOKEN, BACK, PAIRS, BQ, BD)
    else:
        _rope_heads(K, YK, COS, SIN, n, T, skb, skt, skh, ykb, ykt, ykh, nkv, half, PER_TOKEN, BACK, PAIRS, BK, BD)

def _run_rope(q, k, cos, sin, pairs, back, inplace):
    q, k = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k))
    yq, yk = (q, k) if inplace else (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k))
    B, T, nh, hs = q.shape
    _launch(_rope, (B * T, 2), q, k, yq, yk, cos, sin, T, *q.stride()[:3], *k.stride()[:3], *yq.stride()[:3], *yk.stride()[:3], nh, k.size(2),
            hs // 2, PER_TOKEN=cos.dim() > 2, BACK=back, PAIRS=pairs, BQ=_pow2(nh), BK=_pow2(k.size(2)), BD=_pow2(hs // 2), num_warps=4)
    return yq, yk

class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, pairs, inplace):
        ctx.save_for_backward(cos, sin)
        ctx.pairs = pairs
        if inplace:
            ctx.mark_dirty(q, k)
        return _run_rope(q, k, cos, sin, pairs, False, inplace)

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk):
        return *_run_rope(dq, dk, *ctx.saved_tensors, ctx.pairs, True, False), None, None, None, None

def _rotate(x, cos, sin, interleaved):
    wide, half = x.to(_wide(x.dtype)), x.size(-1) // 2
    a, b = (wide[..., 0::2], wide[..., 1::2]) if interleaved else (wide[..., :half], wide[..., half:])
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # one angle for all heads of a position
    a, b = a * cos - b * sin, b * cos + a * sin
    return (torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)).to(x.dtype)

def rope(q, k, cos, sin, interleaved=False, inplace=False):
    """Turns q (B, T, nh, hs) and k (B, T, nkv, hs) by the angles of their positions; cos, sin (T, hs/2) or (B, T, hs/2) float. -> (q, k)
    like the inputs. inplace overwrites q and k (inference: no second copy). hs=2, angle 90 degrees: [1, 0] -> [0, 1]."""
    if q.dim() != 4 or k.dim() != 4 or q.size(-1) != 2 * cos.size(-1):
        raise ValueError(f'rope: got q {tuple(q.shape)}, k {tuple(k.shape)}, cos {tuple(cos.shape)}; expected (B, T, heads, hs), cos (T, hs/2)')
    if takes(q):
        return _Rope.apply(q, k, cos.contiguous(), sin.contiguous(), interleaved, inplace)
    yq, yk = _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)
    return (q.copy_(yq), k.copy_(yk)) if inplace else (yq, yk)


# ---------------------------------------------------------------------------------------------------------------------
# SwiGLU and GELU
#
#    flat, 1024 numbers a program. Eager SwiGLU is two kernels (silu; times up: 5 reads and writes of C numbers a token), this is
#    one (3). The backward computes silu again from gate instead of keeping it.
#| def swiglu(g, u): return g / (1 + np.exp(-g)) * u
#| def swiglu_backward(dy, g, u):
#|     s = 1 / (1 + np.exp(-g))
#|     return dy * u * s * (1 + g * (1 - s)), dy * g * s
#| def gelu(x): return 0.5 * x * (1 + np.tanh(0.7978845608 * (x + 0.044715 * x ** 3)))
#| def gelu_backward(dy, x):
#|     t = np.tanh(0.7978845608 * (x + 0.044715 * x ** 3))
#|     return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * 0.7978845608 * (1 + 3 * 0.044715 * x * x))

@jit
def _act(G, U, DY, Y, DU, N, C, sg, su, GATED: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(C, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    row, c = pid // blocks, (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    ok = c < C
    g = tl.load(G + row * sg + c, mask=ok, other=0.0).to(tl.float32)
    if GATED:
        u = tl.load(U + row * su + c, mask=ok, other=0.0).to(tl.float32)
        s = tl.sigmoid(g)
    else:
        t = 2.0 * tl.sigmoid(1.5957691216 * (g + 0.044715 * g * g * g)) - 1.0  # tanh z = 2 sigmoid(2z) - 1
    if BACK:
        dy = tl.load(DY + row * C + c, mask=ok, other=0.0).to(tl.float32)
        if GATED:
            tl.store(Y + row * C + c, (dy * u * s * (1.0 + g * (1.0 - s))).to(Y.dtype.element_ty), mask=ok)
            tl.store(DU + row * C + c, (dy * g * s).to(DU.dtype.element_ty), mask=ok)
        else:
            d = 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * 0.7978845608 * (1.0 + 0.134145 * g * g)
            tl.store(Y + row * C + c, (dy * d).to(Y.dtype.element_ty), mask=ok)
    elif GATED:
        tl.store(Y + row * C + c, (g * s * u).to(Y.dtype.element_ty), mask=ok)
    else:
        tl.store(Y + row * C + c, (0.5 * g * (1.0 + t)).to(Y.dtype.element_ty), mask=ok)

class _Act(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return _run_act(gate, up, None)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return _run_act(*ctx.saved_tensors, dy.contiguous())

def _run_act(gate, up, dy):
    g, u = (_flat(t) for t in (gate, gate if up is None else up))
    if g.is_contiguous() and u.is_contiguous():
        g, u = g.view(1, -1), u.view(1, -1)  # one long row: no block is cut short at a row's end
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    du = torch.empty_like(y) if up is not None and dy is not None else y
    N, C = g.shape
    _launch(_act, (N * _cdiv(C, 1024),), g, u, y if dy is None else dy, y, du, N, C, g.stride(0), u.stride(0), GATED=up is not None,
            BACK=dy is not None, BLOCK=1024, num_warps=4)
    return y, None if up is None else du

def swiglu(gate, up):
    """silu(gate) * up (2002.05202), any shape, both alike. gate=1, up=2 -> 2 * 0.7311 = 1.4621."""
    return _Act.apply(gate, up) if takes(gate) else F.silu(gate) * up

def gelu(x):
    """GPT-2's GELU, tanh form (1606.08415). 1 -> 0.8412."""
    return _Act.apply(x, None) if takes(x) else F.gelu(x, approximate='tanh')


# ---------------------------------------------------------------------------------------------------------------------
# Cross entropy: loss and entropy of each row of logits in one pass
#
#         V ->                                    a program: one row, walked in blocks. Running maximum m, sum s of e^(z-m) and sum a
#      +------+------+------+------+              of e^(z-m) (z-m) are rescaled by e^(m - m') when the maximum grows to m':
#    N | blk0 > blk1 > blk2 > blk3 |  -> m, s, a      lse = m + log s,   log p = z[y] - lse,   entropy = log s - a / s
#      +------+------+------+------+              Backward: dz = g_l (1[y] - p) - g_H p (log p + H), every block by itself.
#    Each thread keeps m, s and a of the 16 bytes that it loads at once, and they are joined at the row's end: the walk along the row needs no
#    word between threads, 11 instructions a number for 14 with sums over the block, and few enough registers that 64 warps fit a multiprocessor.
#| def online_softmax(z, y, block=3):
#|     m, s, a = -1e38, 0.0, 0.0
#|     for v in range(0, len(z), block):
#|         new = max(m, z[v:v + block].max())
#|         d, keep = z[v:v + block] - new, np.exp(m - new)
#|         m, s, a = new, s * keep + np.exp(d).sum(), (a + s * (m - new)) * keep + (np.exp(d) * d).sum()
#|     return z[y] - m - np.log(s), np.log(s) - a / s       # log p(y), entropy: of z in the place of z - m, a / s would carry m's rounding

@jit
def _rescale(m, s, a, base, by):
    """s and a over a new maximum, `base`."""
    d = m - base
    keep = tl.exp2(d * by)
    return s * keep, (a + s * tl.maximum(d, -1e38)) * keep

@jit
def _softmax_block(z, m, s, a, by):
    """One step of the online softmax of z * scale over the last axis of z (rows, block); by = scale * log2 e. -> m, s, a, each (rows,), m and a
    of z itself: so the scale costs nothing, as e^x is 2^(x log2 e) anyway."""
    new = tl.maximum(m, tl.max(z, 1))
    base = tl.where(new == float('-inf'), 0.0, new)  # subtle: -inf - -inf is nan; a row that is -inf so far adds exactly 0
    d = z - base[:, None]
    e = tl.exp2(d * by)
    s, a = _rescale(m, s, a, base, by)
    return new, s + tl.sum(e, 1), a + tl.sum(e * tl.maximum(d, -1e38), 1)  # 0 * -1e38 = 0 where z is -inf

@jit
def _ce_fwd(Z, Y, LOGP, MAX, LOGS, ENT, V, sz, scale, BLOCK: tl.constexpr, LANE: tl.constexpr, STAGES: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    m = tl.full([BLOCK // LANE], float('-inf'), dtype=tl.float32)
    s = tl.zeros([BLOCK // LANE], dtype=tl.float32)
    a = tl.zeros([BLOCK // LANE], dtype=tl.float32)
    at = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    by = scale * 1.4426950408889634
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        z = tl.load(Z + row * sz + start + at, mask=start + at < V, other=float('-inf')).to(tl.float32)
        m, s, a = _softmax_block(z, m, s, a, by)
    top = tl.max(m, 0)
    dead = top == float('-inf')  # nothing but -inf
    top = tl.where(dead, 0.0, top)
    s, a = _rescale(m, s, a, top, by)
    s = tl.where(dead, 1.0, tl.sum(s, 0))
    top, a, logs = top * scale, tl.sum(a, 0) * scale, tl.log(s)
    z_y = tl.load(Z + row * sz + tl.load(Y + row)).to(tl.float32) * scale
    tl.store(LOGP + row, z_y - top - logs)
    tl.store(MAX + row, top)
    tl.store(LOGS + row, logs)
    tl.store(ENT + row, logs - a / s)

@jit
def _ce_bwd(Z, Y, MAX, LOGS, ENT, GL, GH, D, V, sz, sd, v0, scale, ENTROPY: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(V, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    row, v = pid // blocks, (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(Z + row * sz + v, mask=v < V, other=float('-inf')).to(tl.float32) * scale
    logp = z - tl.load(MAX + row) - tl.load(LOGS + row)  # subtle: in two steps; the rounding of m + log s would be in every p
    p = tl.exp(logp)
    gl = tl.load(GL + row)
    d = -p * gl
    if ENTROPY:
        d -= tl.where(p > 0.0, p * (logp + tl.load(ENT + row)), 0.0) * tl.load(GH + row)
    d = (d + tl.where(v == tl.load(Y + row) - v0, gl, 0.0)) * scale
    tl.store(D + row * sd + v, d.to(D.dtype.element_ty), mask=v < V)

def _ce_sizes(V):
    """(BLOCK, warps, stages) of the forward's walk along a row; with more than one stage, loads run ahead through shared memory."""
    return min(_pow2(V, 16), 4096), 8, 1

def _run_ce_fwd(z, targets, temperature=1.0):
    """-> log p(target), entropy, and (m, log s) for the backward, each (N,), of softmax(z / temperature)."""
    logp, m, logs, entropy = (torch.empty(len(z), dtype=torch.float32, device=z.device) for _ in range(4))
    V, (BLOCK, warps, stages) = z.size(1), _ce_sizes(z.size(1))
    _launch(_ce_fwd, (len(z),), z, targets, logp, m, logs, entropy, V, z.stride(0), 1.0 / temperature, BLOCK=BLOCK, LANE=16 // z.element_size(), STAGES=stages,
            num_warps=warps)
    return logp, entropy, (m, logs)

def _run_ce_bwd(z, targets, stats, entropy, g_logp, g_entropy, dtype, v0=0, temperature=1.0):
    d, V, BLOCK = torch.empty(z.shape, dtype=dtype, device=z.device), z.size(1), min(_pow2(z.size(1), 16), 4096)
    g_logp, g_h = g_logp.contiguous(), g_logp if g_entropy is None else g_entropy.contiguous()
    _launch(_ce_bwd, (len(z) * _cdiv(V, BLOCK),), z, targets, *stats, entropy, g_logp, g_h, d, V, z.stride(0), d.stride(0), v0, 1.0 / temperature,
            ENTROPY=g_entropy is not None, BLOCK=BLOCK, num_warps=8)
    return d

def _softmax_stats(z, targets):
    """z (n, V) finite -> p = softmax(z), log p[target], entropy, m = max z, log s. log s = -log max p: the largest p is 1/V at least."""
    m = z.amax(1)
    if z.size(1) <= 8192:
        p = torch.softmax(z, 1)
        logs = p.amax(1).log_().neg_()
    else:  # torch.softmax adds 16 running sums of float32: of 150,000 small terms beside a large one it loses up to 2e-4 nats
        p = torch.sub(z, m[:, None]).exp_()
        s = p.sum(1)  # adds pairs of sums
        logs = s.log()
        p.div_(s[:, None])
    return p, z.gather(1, targets[:, None])[:, 0] - m - logs, m - torch.linalg.vecdot(p, z) + logs, m, logs

def _plogp(p):
    return p.clamp_min(1e-37).log_().mul_(p)  # 0 where p is 0; twice as fast as xlogy

def _softmax_grad(p, targets, entropy, g_logp, g_entropy, out):
    """out (n, columns) = d/dz of g_logp . log p[target] + g_entropy . H, where dlogp = 1[target] - p and dH = -p (log p + H). p may
    be some columns of the softmax; targets outside of them have their 1 elsewhere. out may be p."""
    if g_entropy is None:
        torch.mul(p, -g_logp[:, None], out=out)
    else:
        plogp = _plogp(p)
        torch.mul(p, -(g_logp + g_entropy * entropy)[:, None], out=out).addcmul_(plogp, g_entropy[:, None], value=-1)
    rows = ((targets >= 0) & (targets < p.size(1))).nonzero()[:, 0]
    out[rows, targets[rows]] += g_logp[rows]
    return out

class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, ignore_index):
        ctx.set_materialize_grads(False)
        valid, ctx.triton = targets != ignore_index, takes(logits)
        safe = torch.where(valid, targets, 0)
        if ctx.triton:
            logits = _flat(logits)
            logp, entropy, stats = _run_ce_fwd(logits, safe)
        else:
            z, stats = logits.to(_wide(logits.dtype)), ()
            z = z - z.amax(1, keepdim=True)
            logp = z - z.exp().sum(1, keepdim=True).log()  # not log_softmax: see _softmax_stats
            entropy, logp = -_plogp(logp.exp()).sum(1), logp.gather(1, safe[:, None])[:, 0]
            dead = torch.isnan(entropy)  # nothing but -inf: loss inf, entropy 0
            entropy, logp = entropy.masked_fill(dead, 0), logp.masked_fill(dead, -torch.inf)
        ctx.save_for_backward(logits, safe, valid, entropy, *stats)
        return torch.where(valid, -logp, 0), torch.where(valid, entropy, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_loss, g_entropy):
        logits, targets, valid, entropy, *stats = ctx.saved_tensors
        g_logp = torch.zeros_like(entropy) if g_loss is None else torch.where(valid, -g_loss, 0)
        g_entropy = None if g_entropy is None else torch.where(valid, g_entropy, 0)
        if ctx.triton:
            return _run_ce_bwd(logits, targets, stats, entropy, g_logp, g_entropy, logits.dtype), None, None
        p = torch.softmax(logits.to(entropy.dtype), 1).nan_to_num_(0.0)
        return _softmax_grad(p, targets, entropy, g_logp, g_entropy, p).to(logits.dtype), None, None

def cross_entropy(logits, targets, ignore_index=-1):
    """-log softmax(logits)[target] and the entropy of each row. logits (N, V), targets (N,) int64 -> (loss, entropy), (N,) float32
    (float64 for float64), both differentiable, both 0 where targets == ignore_index. -inf masks a word; a row of nothing
    else has loss inf, entropy 0 and a finite gradient. V=2, logits [0,0] -> loss log 2, entropy log 2."""
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f'cross_entropy: got logits {tuple(logits.shape)}, targets {tuple(targets.shape)}; expected (N, V) and (N,): flatten them')
    return _CrossEntropy.apply(logits, targets, ignore_index)


# ---------------------------------------------------------------------------------------------------------------------
# linear: x W' + b. CUDA: cuBLAS. CPU with AVX-512, float32: oneDNN, because torch hands such products to MKL, which on AMD stays with AVX2:
# 240 against 95 GFLOP/s a core at (3373, 128) x (128, 512) on a Zen 5 (python bench.py kernels). Same float32, same error. Where AVX2 is all
# there is MKL is the faster one, in the backward by 1.1 to 2 times, since oneDNN first turns transposed matrices round.

# oneDNN compiles a product anew for each shape. Its cache is kept short: a thousand compiled ones, strewn over the heap, cost 1.1 GB.
os.environ.setdefault('ONEDNN_PRIMITIVE_CACHE_CAPACITY', '32')
_onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, '_linear_pointwise') and torch.backends.cpu.get_cpu_capability() == 'AVX512'

def _use_onednn(x, weight):
    return (_onednn and x.device.type == 'cpu' and x.dtype == weight.dtype == torch.float32 and x.numel() >= 32 * weight.shape[1] > 0
            and not torch.is_autocast_enabled('cpu') and not torch.compiler.is_compiling())

def extra_rows(n):
    """Dummy rows that round n tokens up to at most 32 sizes an octave (3 % more on the mean), so that few shapes occur. 1000 -> 24."""
    return -n % max(64, 1 << max(0, n.bit_length() - 5)) if _onednn else 0


def matmul_t(a, b):
    """a (N, K) @ b (M, K).T -> (N, M), by oneDNN where it is the faster one. [[1, 2]] @ [[3, 4]].T -> [[11]]."""
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
        dy = dy.contiguous()
        dx = matmul_t(dy, weight.t()) if ctx.needs_input_grad[0] else None
        dw = matmul_t(dy.t(), x.t()) if ctx.needs_input_grad[1] else None
        return dx, dw, dy.sum(0) if ctx.needs_input_grad[2] else None

def linear(x, weight, bias=None):
    """F.linear: x (..., C), weight (M, C), bias (M,) or None -> (..., M), any dtype. [[1, 2]], [[3, 4]], [5] -> [[16]]."""
    if not _use_onednn(x, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])


# ---------------------------------------------------------------------------------------------------------------------
# Linear layer + softmax without the logits: log-prob and entropy of the targets straight from x and weight
#
#                 V ->   split 0          split 1            a program: BM rows of x against one split of the vocabulary. A tile of
#               +-------------------+-------------------+    logits (BM x BN) lives in registers: C / BK small matmuls fill it, the
#          N BM | tile > tile > ... | tile > tile > ... |    online softmax above eats it. What leaves is m, s, a, z[y] of each row
#               +-------------------+-------------------+    and split; a few torch lines join the splits. 4096 x 131072 logits in
#            BM | tile > ...        | ...               |    float32 would be 2.1 GB; this leaves 4096 * splits * 16 B.
#               +-------------------+-------------------+
#    Backward: needs whole matmuls, so the library does them, in blocks of the vocabulary: z = x W_b', _ce_bwd in between, then
#    dx += dz W_b and dW_b = dz' x. A block of dW is written once; by blocks of rows all of dW would be read and written each time.
#| def linear_logprobs(x, w, y, T, block=4):          # one row x (C,), w (V, C)
#|     parts = [w[v:v + block] @ x / T for v in range(0, len(w), block)]
#|     m = max(z.max() for z in parts)
#|     s = sum(np.exp(z - m).sum() for z in parts)
#|     a = sum((np.exp(z - m) * z).sum() for z in parts)
#|     return parts[y // block][y % block] - m - np.log(s), m + np.log(s) - a / s

@jit
def _linear_stats(X, W, Y, OUT, N, V, C, sx, sw, per_split, scale, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # row blocks run fastest: neighbours read the same split of W, from L2
    split = tl.program_id(1)
    y = tl.load(Y + r, mask=r < N, other=-1)
    m = tl.full([BM], float('-inf'), dtype=tl.float32)
    s = tl.zeros([BM], dtype=tl.float32)
    a = tl.zeros([BM], dtype=tl.float32)
    z_y = tl.zeros([BM], dtype=tl.float32)
    for start in range(split * per_split, tl.minimum(V, (split + 1) * per_split), BN):
        v = (start + tl.arange(0, BN)).to(tl.int64)
        z = tl.zeros([BM, BN], dtype=tl.float32)
        for k0 in range(0, C, BK):
            k = k0 + tl.arange(0, BK)
            x = tl.load(X + r[:, None] * sx + k[None, :], mask=(r < N)[:, None] & (k < C)[None, :], other=0.0)
            w = tl.load(W + v[None, :] * sw + k[:, None], mask=(v < V)[None, :] & (k < C)[:, None], other=0.0)
            z = tl.dot(x, w, z, input_precision='ieee')
        z = tl.where((v < V)[None, :], z, float('-inf'))
        z_y += tl.sum(tl.where(v[None, :] == y[:, None], z, 0.0), 1)
        m, s, a = _softmax_block(z, m, s, a, scale * 1.4426950408889634)
    out = OUT + split.to(tl.int64) * 4 * N + r
    tl.store(out, m * scale, mask=r < N)
    tl.store(out + N, s, mask=r < N)
    tl.store(out + 2 * N, a * scale, mask=r < N)
    tl.store(out + 3 * N, z_y * scale, mask=r < N)

def _linear_sizes(itemsize):
    """(BM, BN, BK, warps, stages)"""
    if INTERPRET:
        return 16, 16, 16, 4, 1
    return (64, 64, 32, 4, 2) if itemsize == 4 else (256, 128, 64, 8, 3) if _roomy() else (128, 128, 64, 8, 3)

def _run_linear_stats(x, weight, targets, temperature):
    x, weight = _flat(x), _flat(weight)
    (N, C), V = x.shape, weight.size(0)
    BM, BN, BK, warps, stages = _linear_sizes(x.element_size())
    splits = min(_cdiv(V, BN), 3 if INTERPRET else max(1, _cdiv(1024, _cdiv(N, BM))))  # about 8 programs for each of 132 processors
    per_split = _cdiv(_cdiv(V, splits), BN) * BN
    splits = _cdiv(V, per_split)
    out = torch.empty(splits, 4, N, dtype=torch.float32, device=x.device)
    _launch(_linear_stats, (_cdiv(N, BM), splits), x, weight, targets, out, N, V, C, x.stride(0), weight.stride(0), per_split, 1.0 / temperature,
            BM=BM, BN=BN, BK=BK, num_warps=warps, num_stages=stages)
    m, s, a, z_y = out.unbind(1)
    top = m.amax(0)
    keep = (m - top).exp()
    s, a = (s * keep).sum(0), ((a + s * (m - top)) * keep).sum(0)
    return z_y.sum(0) - top - s.log(), s.log() - a / s, (top, s.log())

def product(a, b):
    """a @ b.T in float32 (float64 stays), of 16-bit operands too: a bfloat16 logit of 20 is off by 0.06, and a PPO ratio with it."""
    if a.is_cuda and a.element_size() == 2:
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    return matmul_t(a, b).to(_wide(a.dtype))

def _budget(device):
    return min(2 << 30, torch.cuda.get_device_properties(device).total_memory // 32) if device.type == 'cuda' else CHUNK_BYTES

def _fits(x, other, least):
    """How many rows (or columns) of float32 logits fit into a block, when a row (or column) has `other` of them."""
    return max(least, _budget(x.device) // (4 * max(other, 1)))

def logits_bytes(device, rows, words):
    """What the block of logits, float32, and its gradient, 16 bits, take on a GPU at most; a CPU's 32 MB are not worth a line in a plan: 0.
    16,384 rows of 50,257 words on an H200: 2 GiB and half as much = 3.2 GB."""
    return min(_budget(device), 4 * rows * words) * 3 // 2 if device.type == 'cuda' else 0

def _parts(z):
    """Row slices of a block that the cache holds, 1 MiB on CPU: softmax and gradient read each number several times."""
    n = len(z) if z.is_cuda else max(1, (1 << 20) // (4 * z.size(1)))
    return [slice(i, min(i + n, len(z))) for i in range(0, len(z), max(n, 1))]

def _library_forward(x):
    """Does the forward too take its logits from the library, in blocks, as the backward does? H200, bf16, 4096 rows of 4096, V=131072: the library's
    product takes 6.6 ms with float32 out, and with the pass over its logits 7.2; _linear_stats takes 8.9, since what it saves, reading and
    writing 2 GB, costs less than its slower product. It stays for float32. subtle: with and without gradients alike, or the ratios of PPO's first
    update, whose old log-probs come without, would not be 1 to the bit."""
    return x.element_size() == 2

class _LinearLogprobs(torch.autograd.Function):
    """Logits come and go in blocks. The backward computes them again (4 matmuls for 3), unless all of them fit into one block: that is held, as
    logits before the temperature for the Triton kernels, as probabilities for torch."""
    @staticmethod
    def forward(ctx, x, weight, targets, temperature, grad):
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.triton, held = temperature, takes(x), None
        if ctx.triton and not _library_forward(x):
            logp, entropy, stats = _run_linear_stats(x, weight, targets, temperature)
        else:
            logp, entropy, *stats = (torch.empty(len(x), dtype=_wide(x.dtype), device=x.device) for _ in range(4))
            n = _fits(x, len(weight), 64)
            for i in range(0, len(x), n):
                z = product(x[i:i + n], weight)
                if ctx.triton:
                    rows, held = slice(i, i + n), z if grad and len(x) <= n else None
                    logp[rows], entropy[rows], (stats[0][rows], stats[1][rows]) = _run_ce_fwd(z, targets[rows], temperature)
                    z = None  # not two blocks at once
                    continue
                z = z if temperature == 1.0 else z.div_(temperature)
                for s in _parts(z):
                    rows = slice(i + s.start, i + s.stop)
                    p, logp[rows], entropy[rows], stats[0][rows], stats[1][rows] = _softmax_stats(z[s], targets[rows])
                    if grad and len(x) <= n:
                        z[s], held = p, z
        ctx.save_for_backward(x, weight, targets, entropy, held, *stats)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_entropy):
        x, weight, targets, entropy, held, *stats = ctx.saved_tensors
        g_logp, (need_x, need_w), T = torch.zeros_like(entropy) if g_logp is None else g_logp, ctx.needs_input_grad[:2], ctx.temperature
        dx = torch.zeros(x.shape, dtype=entropy.dtype, device=x.device) if need_x else None
        dw = torch.empty_like(weight) if need_w else None
        n = len(weight) if held is not None else _fits(x, len(x), 256)
        for v in range(0, len(weight), n):
            w = weight[v:v + n]
            z = product(x, w) if held is None else held if ctx.triton else torch.empty_like(held)
            if ctx.triton:
                d = _run_ce_bwd(z, targets, stats, entropy, g_logp, g_entropy, x.dtype, v, T)
            else:
                for s in _parts(z):
                    p = held[s] if held is not None else z[s].div_(T).sub_(stats[0][s, None]).sub_(stats[1][s, None]).exp_()
                    _softmax_grad(p, targets[s] - v, entropy[s], g_logp[s] / T, None if g_entropy is None else g_entropy[s] / T, z[s])
                d = z.to(x.dtype)
            if need_x:
                dx += product(d, w.t())
            if need_w:
                dw[v:v + n] = product(d.t(), x.t())
        return None if dx is None else dx.to(x.dtype), dw, None, None, None

class _LinearCrossEntropy(torch.autograd.Function):
    """Mean loss. A scalar's gradient is known but for one factor, so it is computed with the loss: 3 matmuls, as without blocks."""
    @staticmethod
    def forward(ctx, x, weight, targets, grad):
        wide, kernel = _wide(x.dtype), takes(x)
        loss = torch.zeros((), dtype=wide, device=x.device)
        dx = torch.empty_like(x) if grad and ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=wide) if grad and ctx.needs_input_grad[1] else None
        n = _fits(x, len(weight), 64)
        for i in range(0, len(x), n):
            xs, y = x[i:i + n], targets[i:i + n]
            z = product(xs, weight)
            if kernel:
                logp, entropy, stats = _run_ce_fwd(z, y)
                loss -= logp.sum()
                d = _run_ce_bwd(z, y, stats, entropy, torch.full_like(logp, -1.0 / len(x)), None, x.dtype) if grad else None
            else:
                for s in _parts(z):
                    p, logp, *_ = _softmax_stats(z[s], y[s])
                    loss -= logp.sum()
                    if grad:
                        z[s] = p.scatter_add_(1, y[s, None], p.new_full((len(p), 1), -1.0)).div_(len(x))
                d = z.to(x.dtype)
            if dx is not None:
                dx[i:i + n] = product(d, weight.t())
            if dw is not None:
                dw.addmm_(d.t(), xs) if len(x) > n and d.dtype == wide else dw.add_(product(d.t(), xs.t()))
        ctx.save_for_backward(dx, None if dw is None else dw.to(weight.dtype))
        return loss / max(1, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if g.device.type == 'cpu' and g == 1:
            return *ctx.saved_tensors, None, None  # no second (V, C) for a factor of one
        return *(None if d is None else d * g.to(d.dtype) for d in ctx.saved_tensors), None, None

def _linear_inputs(name, x, weight, targets, ignore_index):
    """Flat x and targets without the ignored tokens (a prompt costs no matmul), and their row numbers (None = all). Operands
    of a matmul share a dtype: autocast's, where that is on, else x's."""
    if x.shape[:-1] != targets.shape or weight.dim() != 2 or weight.size(1) != x.size(-1):
        raise ValueError(f'{name}: got x {tuple(x.shape)}, weight {tuple(weight.shape)}, targets {tuple(targets.shape)}; expected (..., C), (V, C), (...)')
    device, x, targets = x.device.type, x.reshape(-1, x.size(-1)), targets.reshape(-1)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rows = (targets != ignore_index).nonzero()[:, 0]
    if len(rows) == len(targets):
        return x.to(dtype), weight.to(dtype), targets, None
    return x.index_select(0, rows).to(dtype), weight.to(dtype), targets[rows], rows

def linear_cross_entropy(x, weight, targets, ignore_index=-1):
    """Mean over the counted tokens of -log softmax(x @ weight.T)[target], without holding the (N, V) logits. x (..., C), weight
    (V, C), targets (...) int64 -> float32 scalar; 0 when every target is ignored. x=0, V=50257 -> log 50257 = 10.825."""
    x, weight, targets, _ = _linear_inputs('linear_cross_entropy', x, weight, targets, ignore_index)
    return _LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))

def linear_logprobs(x, weight, targets, temperature=1.0, ignore_index=-1):
    """Log-probability of each target and the entropy of its distribution, softmax(x @ weight.T / temperature), without holding the
    (N, V) logits; both differentiable. x (..., C), weight (V, C), targets (...) int64 -> (logp, entropy), (...) float32, both 0
    where targets == ignore_index. x=0, V=4 -> logp -log 4 = -1.386, entropy 1.386."""
    flat, weight, y, rows = _linear_inputs('linear_logprobs', x, weight, targets, ignore_index)
    if not temperature > 0:
        raise ValueError(f'linear_logprobs: temperature {temperature}, expected above 0 (greedy text is scored at the temperature it was sampled at)')
    outs = _LinearLogprobs.apply(flat, weight, y, float(temperature), torch.is_grad_enabled() and (flat.requires_grad or weight.requires_grad))
    if rows is not None:
        outs = [o.new_zeros(targets.numel()).index_copy(0, rows, o) for o in outs]
    return tuple(o.view(targets.shape) for o in outs)


# ---------------------------------------------------------------------------------------------------------------------
# FlashAttention (2205.14135, 2307.08691): softmax(q k' * scale) v without the (T, T) scores
#
#           keys ->                      a program: BM queries of one head. It walks over tiles of BN keys with the online softmax,
#         +----+----+----+----+          acc = acc * e^(m - m') + p v.   [ ] every pair visible: no mask is computed
#    q BM | \  |    |    |    |                                         [\] the mask cuts through      blank: never visited
#         +----+----+----+----+          Documents of a packed batch are rows cu[d]:cu[d+1]: each (document, head) has its own grid
#      BM | [] | \  |    |    |          of tiles, so nothing is computed between documents. Heads share k, v by h // (nh / nkv).
#         +----+----+----+----+          Backward: p again from the saved row sums lse (in powers of 2), then
#      BM | [] | [] | \  |    |            dv = p' do,   ds = p (do v' - delta),   dq = ds k,   dk = ds' q,   delta = rowsum(do o)
#         +----+----+----+----+          once along the rows (dq), once down the columns and over the heads that share them (dk, dv):
#                                        each sum is one program's, so no atomics, and two runs agree to the bit.
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
def _rows(X, base, n, limit, st, d, HS: tl.constexpr):
    """A tile (rows, BD) of a (token, hs) matrix: rows n of it from row base on, zero behind `limit` and behind hs."""
    at = X + (base + n).to(tl.int64)[:, None] * st + d[None, :]
    return tl.load(at, mask=(n < limit)[:, None] & (d < HS)[None, :], other=0.0)

@jit
def _seen(i, j, Tq, Tk, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """(BM, BN): may query i see key j? The last query stands at the last key."""
    ok = (i < Tq)[:, None] & (j < Tk)[None, :]
    if CAUSAL:
        ok = ok & (j[None, :] <= i[:, None] + (Tk - Tq))
    if WINDOW:
        ok = ok & (j[None, :] > i[:, None] + (Tk - Tq) - window)
    return ok

@jit
def _attn_steps(acc, m, l, q, K, V, base, lo, hi, i, Tq, Tk, skt, svt, d, scale, window, MASK: tl.constexpr, CAUSAL: tl.constexpr,
                WINDOW: tl.constexpr, HS: tl.constexpr, BN: tl.constexpr):
    for start in range(lo, hi, BN):
        j = start + tl.arange(0, BN)
        s = tl.dot(q, tl.trans(_rows(K, base, j, Tk, skt, d, HS)), input_precision='ieee') * scale
        if MASK:
            s = tl.where(_seen(i, j, Tq, Tk, window, CAUSAL, WINDOW), s, float('-inf'))
        new = tl.maximum(m, tl.max(s, 1))
        top = tl.where(new == float('-inf'), 0.0, new)
        p = tl.exp2(s - top[:, None])
        keep = tl.exp2(m - top)
        l = l * keep + tl.sum(p, 1)
        v = _rows(V, base, j, Tk, svt, d, HS)
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision='ieee')
        m = new
    return acc, m, l

@jit
def _attn_fwd(Q, K, V, O, LSE, CUQ, CUK, N, sqt, sqh, skt, skh, svt, svh, heads, group, docs, blocks, window, scale, CAUSAL: tl.constexpr,
              WINDOW: tl.constexpr, HS: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    pid = tl.program_id(0)
    start = (blocks - 1 - pid // (docs * heads)) * BM  # the longest rows of tiles first: they would be the last to end
    doc, h = pid % (docs * heads) // heads, pid % heads
    qa, ka = tl.load(CUQ + doc), tl.load(CUK + doc)
    Tq, Tk = tl.load(CUQ + doc + 1) - qa, tl.load(CUK + doc + 1) - ka
    if start < Tq:
        i, d = start + tl.arange(0, BM), tl.arange(0, BD)
        K += (h // group).to(tl.int64) * skh
        V += (h // group).to(tl.int64) * svh
        q = _rows(Q + h.to(tl.int64) * sqh, qa, i, Tq, sqt, d, HS)
        m = tl.full([BM], float('-inf'), dtype=tl.float32)
        l = tl.zeros([BM], dtype=tl.float32)
        acc = tl.zeros([BM, BD], dtype=tl.float32)
        lo, hi = 0, Tk
        full = Tk // BN * BN  # keys that need no mask end here
        if CAUSAL:
            hi = tl.maximum(tl.minimum(Tk, start + BM + Tk - Tq), 0)
            full = tl.minimum(full, tl.maximum(start + 1 + Tk - Tq, 0) // BN * BN)
        if WINDOW:
            lo = tl.maximum(start + Tk - Tq - window + 1, 0) // BN * BN
            full = lo
        acc, m, l = _attn_steps(acc, m, l, q, K, V, ka, lo, full, i, Tq, Tk, skt, svt, d, scale, window, False, CAUSAL, WINDOW, HS, BN)
        acc, m, l = _attn_steps(acc, m, l, q, K, V, ka, full, hi, i, Tq, Tk, skt, svt, d, scale, window, True, CAUSAL, WINDOW, HS, BN)
        blind = l == 0.0  # a query with no visible key: output 0, and lse = inf makes p 0 in the backward
        l = tl.where(blind, 1.0, l)
        o = O + ((qa + i).to(tl.int64)[:, None] * heads + h) * HS + d[None, :]
        tl.store(o, (acc / l[:, None]).to(O.dtype.element_ty), mask=(i < Tq)[:, None] & (d < HS)[None, :])
        tl.store(LSE + h.to(tl.int64) * N + qa + i, tl.where(blind, float('inf'), m + tl.log2(l)), mask=i < Tq)

@jit
def _attn_delta(O, DO, DELTA, N, heads, sdt, sdh, HS: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr):
    n, h, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1).to(tl.int64), tl.arange(0, BD)
    o = _rows(O + h * HS, 0, n, N, heads * HS, d, HS).to(tl.float32)
    tl.store(DELTA + h * N + n, tl.sum(o * _rows(DO + h * sdh, 0, n, N, sdt, d, HS).to(tl.float32), 1), mask=n < N)

@jit
def _attn_dq(Q, K, V, DO, LSE, DELTA, DQ, CUQ, CUK, N, sqt, sqh, skt, skh, svt, svh, sdt, sdh, heads, group, docs, blocks, window, scale, raw,
             CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HS: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    pid = tl.program_id(0)
    start = (blocks - 1 - pid // (docs * heads)) * BM
    doc, h = pid % (docs * heads) // heads, pid % heads
    qa, ka = tl.load(CUQ + doc), tl.load(CUK + doc)
    Tq, Tk = tl.load(CUQ + doc + 1) - qa, tl.load(CUK + doc + 1) - ka
    if start < Tq:
        i, d = start + tl.arange(0, BM), tl.arange(0, BD)
        K += (h // group).to(tl.int64) * skh
        V += (h // group).to(tl.int64) * svh
        q = _rows(Q + h.to(tl.int64) * sqh, qa, i, Tq, sqt, d, HS)
        do = _rows(DO + h.to(tl.int64) * sdh, qa, i, Tq, sdt, d, HS)
        lse = tl.load(LSE + h.to(tl.int64) * N + qa + i, mask=i < Tq, other=float('inf'))
        delta = tl.load(DELTA + h.to(tl.int64) * N + qa + i, mask=i < Tq, other=0.0)
        dq = tl.zeros([BM, BD], dtype=tl.float32)
        lo, hi = 0, Tk
        if CAUSAL:
            hi = tl.maximum(tl.minimum(Tk, start + BM + Tk - Tq), 0)
        if WINDOW:
            lo = tl.maximum(start + Tk - Tq - window + 1, 0) // BN * BN
        for at in range(lo, hi, BN):
            j = at + tl.arange(0, BN)
            k = _rows(K, ka, j, Tk, skt, d, HS)
            s = tl.dot(q, tl.trans(k), input_precision='ieee') * scale
            p = tl.where(_seen(i, j, Tq, Tk, window, CAUSAL, WINDOW), tl.exp2(s - lse[:, None]), 0.0)
            dp = tl.dot(do, tl.trans(_rows(V, ka, j, Tk, svt, d, HS)), input_precision='ieee')
            dq = tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, dq, input_precision='ieee')
        out = DQ + ((qa + i).to(tl.int64)[:, None] * heads + h) * HS + d[None, :]
        tl.store(out, (dq * raw).to(DQ.dtype.element_ty), mask=(i < Tq)[:, None] & (d < HS)[None, :])

@jit
def _attn_dkdv(Q, K, V, DO, LSE, DELTA, DK, DV, CUQ, CUK, N, sqt, sqh, skt, skh, svt, svh, sdt, sdh, kv_heads, group, docs, window, scale, raw,
               CAUSAL: tl.constexpr, WINDOW: tl.constexpr, HS: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    pid = tl.program_id(0)
    start = pid // (docs * kv_heads) * BN
    doc, kvh = pid % (docs * kv_heads) // kv_heads, pid % kv_heads
    qa, ka = tl.load(CUQ + doc), tl.load(CUK + doc)
    Tq, Tk = tl.load(CUQ + doc + 1) - qa, tl.load(CUK + doc + 1) - ka
    if start < Tk:
        j, d = start + tl.arange(0, BN), tl.arange(0, BD)
        k = _rows(K + kvh.to(tl.int64) * skh, ka, j, Tk, skt, d, HS)
        v = _rows(V + kvh.to(tl.int64) * svh, ka, j, Tk, svt, d, HS)
        dk = tl.zeros([BN, BD], dtype=tl.float32)
        dv = tl.zeros([BN, BD], dtype=tl.float32)
        lo, hi = 0, Tq
        if CAUSAL:  # the first query that sees key `start`
            lo = tl.maximum(start - (Tk - Tq), 0) // BM * BM
        if WINDOW:  # and the last one that still sees the tile's last key
            hi = tl.minimum(Tq, tl.maximum(start + BN - 1 - (Tk - Tq) + window, 0))
        for g in range(0, group):
            h = (kvh * group + g).to(tl.int64)
            for at in range(lo, hi, BM):
                i = at + tl.arange(0, BM)
                q = _rows(Q + h * sqh, qa, i, Tq, sqt, d, HS)
                do = _rows(DO + h * sdh, qa, i, Tq, sdt, d, HS)
                lse = tl.load(LSE + h * N + qa + i, mask=i < Tq, other=float('inf'))
                delta = tl.load(DELTA + h * N + qa + i, mask=i < Tq, other=0.0)
                s = tl.dot(q, tl.trans(k), input_precision='ieee') * scale
                p = tl.where(_seen(i, j, Tq, Tk, window, CAUSAL, WINDOW), tl.exp2(s - lse[:, None]), 0.0)
                dv = tl.dot(tl.trans(p.to(do.dtype)), do, dv, input_precision='ieee')
                ds = p * (tl.dot(do, tl.trans(v), input_precision='ieee') - delta[:, None])
                dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk, input_precision='ieee')
        ok = (j < Tk)[:, None] & (d < HS)[None, :]
        out = ((ka + j).to(tl.int64)[:, None] * kv_heads + kvh) * HS + d[None, :]
        tl.store(DK + out, (dk * raw).to(DK.dtype.element_ty), mask=ok)
        tl.store(DV + out, dv.to(DV.dtype.element_ty), mask=ok)

def _attn_sizes(hs, itemsize, back):
    """(BM, BN, warps, stages). A warpgroup, 4 warps, multiplies 64 rows at a time on Hopper: 64 rows go with 4 warps, 128 with 8. On an H200, 16
    documents of 2048, hs=128: forward 335 TFLOP/s, 220 with 4 warps for 128 rows; backward 233, 122 with 8 warps for 64 rows.
    Shared memory of a block is 227 KB; bf16, hs=128, 128 + 2 * 3 * 128 rows of 256 B = 224 KB."""
    if INTERPRET:
        return 16, 16, 4, 1
    if itemsize == 4:  # without tensor cores: registers are the limit
        return (32, 32, 8, 1) if hs <= 64 else (16, 16, 8, 1)
    if hs <= 64:
        return 64, 64, 4, 3
    if hs <= 128:
        return (64, 64, 4, 2 if _roomy() else 1) if back else (128, 128, 8, 3) if _roomy() else (64, 64, 4, 2)
    return (32, 32, 4, 1) if back else (64, 32, 4, 2)

class _Flash(torch.autograd.Function):
    """q (N, nh, hs), k and v (M, nkv, hs) packed; cu_q, cu_k int32; longest: the most queries and keys in one document."""
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, longest, causal, window, scale):
        q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        (N, nh, hs), nkv, docs = q.shape, k.size(1), len(cu_q) - 1
        BM, BN, warps, stages = _attn_sizes(hs, q.element_size(), False)
        o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)  # rows behind the last document stay 0
        lse = torch.zeros(nh, N, dtype=torch.float32, device=q.device)
        blocks = _cdiv(longest[0], BM)
        ctx.meta = dict(CAUSAL=causal, WINDOW=window > 0, HS=hs, BD=_pow2(hs, 16))
        _launch(_attn_fwd, (blocks * docs * nh,), q, k, v, o, lse, cu_q, cu_k, N, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], nh, nh // nkv,
                docs, blocks, window, scale * 1.4426950408889634, **ctx.meta, BM=BM, BN=BN, num_warps=warps, num_stages=stages)
        ctx.save_for_backward(q, k, v, o, lse, cu_q, cu_k)
        ctx.longest, ctx.window, ctx.scale = longest, window, scale
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx, do):
        q, k, v, o, lse, cu_q, cu_k = ctx.saved_tensors
        do = do if do.stride(-1) == 1 else do.contiguous()
        (N, nh, hs), nkv, docs, meta = q.shape, k.size(1), len(cu_q) - 1, ctx.meta
        BM, BN, warps, stages = _attn_sizes(hs, q.element_size(), True)
        dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        delta = torch.empty_like(lse)
        _launch(_attn_delta, (_cdiv(N, 64), nh), o, do, delta, N, nh, *do.stride()[:2], HS=hs, BD=meta['BD'], BM=64, num_warps=4)
        strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *do.stride()[:2]
        blocks, rest = _cdiv(ctx.longest[0], BM), (ctx.window, ctx.scale * 1.4426950408889634, ctx.scale)
        size = dict(**meta, BM=BM, BN=BN, num_warps=warps, num_stages=stages)
        _launch(_attn_dq, (blocks * docs * nh,), q, k, v, do, lse, delta, dq, cu_q, cu_k, N, *strides, nh, nh // nkv, docs, blocks, *rest, **size)
        _launch(_attn_dkdv, (_cdiv(ctx.longest[1], BN) * docs * nkv,), q, k, v, do, lse, delta, dk, dv, cu_q, cu_k, N, *strides, nkv, nh // nkv,
                docs, *rest, **size)
        return dq, dk, dv, None, None, None, None, None, None

def _flash_triton(q, k, v, cu_seqlens, causal, window, scale, longest, cu_keys):
    if cu_keys is not None:
        return _Flash.apply(q, k, v, cu_seqlens.int(), cu_keys.int(), longest or [int(cu.diff().max()) for cu in (cu_seqlens, cu_keys)], causal, window, scale)
    if cu_seqlens is not None:
        cu = cu_seqlens.int()
        longest = longest or (int((cu[1:] - cu[:-1]).max()) if len(cu) > 1 else 0)  # the one host sync
        return _Flash.apply(q, k, v, cu, cu, (longest, longest), causal, window, scale) if longest else torch.zeros_like(q)
    (B, T), Tk = q.shape[:2], k.size(1)
    cu_q, cu_k = (torch.arange(B + 1, dtype=torch.int32, device=q.device) * n for n in (T, Tk))
    return _Flash.apply(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_q, cu_k, (T, Tk), causal, window, scale).view(q.shape)

def _visible(Tq, Tk, causal, window, device):
    """(Tq, Tk) bool, True = may attend. The last query stands at the last key."""
    i, j = torch.arange(Tk - Tq, Tk, device=device)[:, None], torch.arange(Tk, device=device)
    ok = (j <= i) if causal else torch.ones(Tq, Tk, dtype=torch.bool, device=device)
    return ok & (j > i - window) if window else ok

def _attend(q, k, v, causal, window, scale):
    """(B, T, nh, hs): torch's fused attention, a mask only where there is no flag for it."""
    Tq, Tk = q.size(1), k.size(1)
    plain = not window and (not causal or Tq == Tk)
    mask = None if plain else _visible(Tq, Tk, causal, window, q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=plain and causal, scale=scale, enable_gqa=q.size(1) != k.size(1))
    return y.transpose(1, 2)

def flash_attention(q, k, v, cu_seqlens=None, causal=True, window=0, scale=None, longest=0, cu_keys=None):
    """softmax(q k' * scale) v. q (B, T, nh, hs), k and v (B, Tk, nkv, hs), nh a multiple of nkv; or packed (N, nh, hs) with
    cu_seqlens (n+1,) int: document d is rows cu[d]:cu[d+1] and sees itself only, rows behind the last one are 0. Tk > T: the
    queries are the last T positions. window w > 0: only the last w keys, the own one among them. scale: hs^-0.5. longest: of the documents, where it is
    known: a GPU need not be waited for then. cu_keys (n+1,): document d's keys are other rows than its queries, cu_keys[d]:cu_keys[d+1], at whose end the
    queries stand; longest is then (queries, keys). -> like q. T=1: the output is v."""
    if q.size(-2) % k.size(-2) or q.dim() != (4 if cu_seqlens is None else 3):
        raise ValueError(f'flash_attention: got q {tuple(q.shape)}, k {tuple(k.shape)}; expected (B, T, heads, hs), or (N, heads, hs) with cu_seqlens, '
                         'query heads a multiple of key heads')
    scale = q.size(-1) ** -0.5 if scale is None else float(scale)
    if takes(q) and k.numel() and (cu_seqlens is not None or window or _mode == 'triton' or INTERPRET):  # dense on CUDA: torch's is faster
        return _flash_triton(q, k, v, cu_seqlens, causal, window, scale, longest, cu_keys)
    if cu_seqlens is None:
        return _attend(q, k, v, causal, window, scale)
    if causal and not window and cu_keys is None and docs_in_c(q):
        cu = cu_seqlens.long()
        n = len(cu) - 1
        return doc_attention(q, k, v, torch.arange(int(cu[-1])), cu, torch.zeros(n, dtype=torch.long), torch.arange(n + 1), int(cu.diff().max()) if n else 0, scale)
    cu = cu_seqlens.tolist()
    ck = cu if cu_keys is None else cu_keys.tolist()
    parts = [_attend(q[None, a:b], k[None, c:d], v[None, c:d], causal, window, scale)[0] for a, b, c, d in zip(cu, cu[1:], ck, ck[1:]) if b > a]
    if cu[-1] < len(q):
        parts.append(torch.zeros_like(q[cu[-1]:]))
    return torch.cat(parts) if parts else torch.zeros_like(q)


# ---------------------------------------------------------------------------------------------------------------------
# The same on the CPU in C, for training: native.c draws it

def docs_in_c(x):
    """Does the C attention take x (..., hs)? float32 on the CPU, hs % 16 = 0, a C compiler, not under --kernels=torch."""
    return x.shape[-1] % 16 == 0 and in_c(x) and native.docs(x.shape[-1]) is not None


def doc_attention(q, k, v, rows, cu, first, tasks, longest, scale=None):
    """Causal attention of documents that are paths through flat rows, in C (`docs_in_c`). q (N, nh, hs), k and v (N, nkv, hs); int64: rows (M,), the
    flat row of each position of each document; cu (docs + 1,) their borders; first (docs,): positions before it are keys only, since another
    document has them as queries; tasks (n + 1,): borders of the runs of documents that share rows; longest: the most positions of one.
    -> (N, nh, hs), 0 in rows that nobody asks for. Rows [0, 1, 0, 2], cu [0, 2, 4], first [0, 1], tasks [0, 2]: a prompt with two answers."""
    return native.DocAttention.apply(q, k, v, q.shape[-1] ** -0.5 if scale is None else float(scale), rows, cu, first, tasks, longest)



# ---------------------------------------------------------------------------------------------------------------------
# Paged attention (2309.06180): one new token a row against keys that lie scattered over the cache's blocks
#
#    row b:  block_table [7, 2, 9]     cache:  block 0 | 1 | 2 ######## | ... | 7 ######## | 8 | 9 ##......     (# = this row's keys)
#            tokens  0........511 | 512.....1023 | 1024..   a program: one split of 512 tokens, one key head and all query heads that
#            split       0              1            2      share it (a small matmul). Splits are merged by a second kernel: a long
#    context keeps the whole chip busy. The splits depend on the row's own length only, so neither the batch around a row nor
#    the width of the table changes a bit of its result.
#| def merge(ms, ls, accs):                           # split softmaxes -> the whole one
#|     m = max(ms)
#|     return sum(np.exp(x - m) * a for x, a in zip(ms, accs)) / sum(np.exp(x - m) * l for x, l in zip(ms, ls))

@jit
def _paged_split(Q, K, V, TABLE, LENS, M, L, ACC, sqb, sqh, skb, sks, skh, svb, svs, svh, stb, size, heads, group, splits, scale, HS: tl.constexpr,
                 BD: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr):
    b, kvh, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    lo = split * SPLIT
    hi = tl.minimum(tl.load(LENS + b).to(tl.int32), lo + SPLIT)
    if lo < hi:
        g, d = tl.arange(0, BG), tl.arange(0, BD)
        some = (g < group)[:, None] & (d < HS)[None, :]
        q = tl.load(Q + b * sqb + (kvh * group + g)[:, None] * sqh + d[None, :], mask=some, other=0.0)
        m = tl.full([BG], float('-inf'), dtype=tl.float32)
        l = tl.zeros([BG], dtype=tl.float32)
        acc = tl.zeros([BG, BD], dtype=tl.float32)
        for start in range(lo, hi, BN):
            t = start + tl.arange(0, BN)
            block = tl.load(TABLE + b * stb + t // size, mask=t < hi, other=0).to(tl.int64)
            ok = (t < hi)[:, None] & (d < HS)[None, :]
            k = tl.load(K + (block * skb + t % size * sks + kvh * skh)[:, None] + d[None, :], mask=ok, other=0.0).to(q.dtype)
            s = tl.where((t < hi)[None, :], tl.dot(q, tl.trans(k), input_precision='ieee') * scale, float('-inf'))
            new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - new[:, None])
            keep = tl.exp2(m - new)
            v = tl.load(V + (block * svb + t % size * svs + kvh * svh)[:, None] + d[None, :], mask=ok, other=0.0).to(q.dtype)
            acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision='ieee')
            l = l * keep + tl.sum(p, 1)
            m = new
        at = (b * heads + kvh * group + g) * splits + split
        tl.store(M + at, m, mask=g < group)
        tl.store(L + at, l, mask=g < group)
        tl.store(ACC + at[:, None] * HS + d[None, :], acc, mask=some)

@jit
def _paged_merge(M, L, ACC, LENS, OUT, heads, splits, HS: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr, SPLIT: tl.constexpr):
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
        part = tl.load(ACC + (base + s)[:, None] * HS + d[None, :], mask=(s < n)[:, None] & (d < HS)[None, :], other=0.0)
        total = total * keep + tl.sum(w * tl.load(L + base + s, mask=s < n, other=0.0), 0)
        acc = acc * keep + tl.sum(w[:, None] * part, 0)
        top = new
    acc = acc / tl.where(n > 0, total, 1.0)
    tl.store(OUT + (b * heads + h) * HS + d, acc.to(OUT.dtype.element_ty), mask=d < HS)

@jit
def _kv_write(K, V, KC, VC, SLOTS, skt, skh, svt, svh, kb, ks, kh, vb, vs, vh, size, nkv, HS: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    slot = tl.load(SLOTS + n).to(tl.int64)
    if slot >= 0:
        h, d = tl.arange(0, BH)[:, None], tl.arange(0, BD)[None, :]
        ok = (h < nkv) & (d < HS)
        block, at = slot // size, slot % size
        k = tl.load(K + n * skt + h * skh + d, mask=ok, other=0.0)
        v = tl.load(V + n * svt + h * svh + d, mask=ok, other=0.0)
        tl.store(KC + block * kb + at * ks + h * kh + d, k.to(KC.dtype.element_ty), mask=ok)
        tl.store(VC + block * vb + at * vs + h * vh + d, v.to(VC.dtype.element_ty), mask=ok)

def _paged_sizes(hs, itemsize):
    """(SPLIT, BN, warps, stages). Not by the batch: a row's bits would then depend on its neighbours. bf16, hs=128 on an H200, splits of 512: 3726 GB/s
    (88 % of a copy's) for 64 rows of 4096 keys, 2431 for one row of 32768. Of 256: 3679, 2130; of 1024: 3865, 2170."""
    BN = 64 if hs <= 128 else 32
    return (32, 16, 4, 1) if INTERPRET else (256, BN, 4, 1) if itemsize == 4 else (512, BN, 4, 4)

def _paged_triton(q, k_cache, v_cache, block_table, context_lens, scale):
    q = q if q.stride(-1) == 1 else q.contiguous()
    (B, nh, hs), (_, size, nkv, _) = q.shape, k_cache.shape
    SPLIT, BN, warps, stages = _paged_sizes(hs, q.element_size())
    table, splits = block_table if block_table.stride(1) == 1 else block_table.contiguous(), max(1, _cdiv(block_table.size(1) * size, SPLIT))
    m, l = (torch.empty(B, nh, splits, dtype=torch.float32, device=q.device) for _ in range(2))
    acc = torch.empty(B, nh, splits, hs, dtype=torch.float32, device=q.device)
    out, BD = torch.empty(q.shape, dtype=q.dtype, device=q.device), _pow2(hs, 16)
    _launch(_paged_split, (B, nkv, splits), q, k_cache, v_cache, table, context_lens, m, l, acc, *q.stride()[:2], *k_cache.stride()[:3],
            *v_cache.stride()[:3], table.stride(0), size, nh, nh // nkv, splits, scale * 1.4426950408889634, HS=hs, BD=BD,
            BG=_pow2(nh // nkv, 16), BN=BN, SPLIT=SPLIT, num_warps=warps, num_stages=stages)
    _launch(_paged_merge, (B, nh), m, l, acc, context_lens, out, nh, splits, HS=hs, BD=BD, BS=16, SPLIT=SPLIT, num_warps=4)
    return out

def paged_attention(q, k_cache, v_cache, block_table, context_lens, scale=None):
    """Attention of one query token a row over a paged cache (no gradient). q (B, nh, hs), caches (blocks, block_size, nkv, hs),
    block_table (B, max_blocks) int, context_lens (B,) int: the keys of row b are the first context_lens[b] slots of its blocks, its
    own among them. -> (B, nh, hs), 0 where the length is 0. What unused slots hold does not matter. One key: the output is v."""
    scale = q.size(-1) ** -0.5 if scale is None else float(scale)
    if takes(q):
        return _paged_triton(q, k_cache, v_cache, block_table, context_lens, scale)
    size, longest = k_cache.size(1), int(context_lens.max()) if len(q) else 0
    if longest == 0:
        return torch.zeros_like(q)
    table = block_table[:, :_cdiv(longest, size)].long().clamp_min(0)  # unused entries may hold -1
    mask = torch.arange(longest, device=q.device) < context_lens[:, None]
    row, slot = (~mask).nonzero().unbind(1)
    k, v = (c[table].flatten(1, 2)[:, :longest].to(q.dtype) for c in (k_cache, v_cache))  # (B, L, nkv, hs)
    k[row, slot] = v[row, slot] = 0  # an unwritten slot may hold nan, and 0 * nan is nan
    y = F.scaled_dot_product_attention(q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None, None], scale=scale, enable_gqa=q.size(1) != k.size(2))
    return torch.where((context_lens > 0)[:, None, None], y[:, :, 0], 0)

def kv_write(k, v, k_cache, v_cache, slots):
    """Writes k, v (N, nkv, hs) into the caches (blocks, block_size, nkv, hs), in place: token i goes to slot slots[i] = block *
    block_size + offset; a negative slot is padding and is skipped. Two tokens must not share a slot."""
    if takes(k):
        k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
        _launch(_kv_write, (len(k),), k, v, k_cache, v_cache, slots, *k.stride()[:2], *v.stride()[:2], *k_cache.stride()[:3], *v_cache.stride()[:3],
                k_cache.size(1), k.size(1), HS=k.size(2), BH=_pow2(k.size(1)), BD=_pow2(k.size(2)), num_warps=4)
        return
    slots, size = slots.long(), k_cache.size(1)
    if (slots < 0).any():
        k, v, slots = k[slots >= 0], v[slots >= 0], slots[slots >= 0]
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache.index_put_((slots // size, slots % size), new.to(cache.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# The clipped token loss of PPO and GRPO (1707.06347, eq. 7), loss, statistics and gradient in one pass
#
#    flat, 1024 tokens a program: 4 sums leave it (loss, tokens, clipped, KL) and d loss / d logp of every token.
#| def token_loss(logp, old, adv, mask, lo, hi):
#|     ratio = np.exp(np.where(mask, logp - old, 0))
#|     plain, clipped = -adv * ratio, -adv * np.clip(ratio, 1 - lo, 1 + hi)
#|     n = max(mask.sum(), 1)
#|     grad = np.where(mask & (plain >= clipped), plain, 0) / n    # d ratio / d logp = ratio; a clipped token has none
#|     return np.where(mask, np.maximum(plain, clipped), 0).sum() / n, grad

@jit
def _token_loss(LOGP, OLD, ADV, MASK, GRAD, SUMS, N, lo, hi, BLOCK: tl.constexpr):
    pid = tl.program_id(0).to(tl.int64)
    n = pid * BLOCK + tl.arange(0, BLOCK)
    on = tl.load(MASK + n, mask=n < N, other=0).to(tl.int32) != 0
    d = tl.load(LOGP + n, mask=on, other=0.0).to(tl.float32) - tl.load(OLD + n, mask=on, other=0.0).to(tl.float32)
    adv = tl.load(ADV + n, mask=on, other=0.0).to(tl.float32)
    ratio = tl.exp(d)
    plain = -adv * ratio
    clipped = -adv * tl.minimum(tl.maximum(ratio, 1.0 - lo), 1.0 + hi)
    tl.store(GRAD + n, tl.where(on & (plain >= clipped), plain, 0.0), mask=n < N)
    tl.store(SUMS + pid * 4, tl.sum(tl.where(on, tl.maximum(plain, clipped), 0.0), 0))
    tl.store(SUMS + pid * 4 + 1, tl.sum(tl.where(on, 1.0, 0.0), 0))
    tl.store(SUMS + pid * 4 + 2, tl.sum(tl.where(on & (clipped > plain), 1.0, 0.0), 0))
    tl.store(SUMS + pid * 4 + 3, tl.sum(tl.where(on, 0.5 * d * d, 0.0), 0))

class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, old_logp, advantages, mask, clip_low, clip_high):
        args, N = [t.contiguous() for t in (logp, old_logp, advantages, mask)], logp.numel()
        grad = torch.empty(logp.shape, dtype=torch.float32, device=logp.device)
        sums = torch.empty(_cdiv(N, 1024), 4, dtype=torch.float32, device=logp.device)
        _launch(_token_loss, (len(sums),), *args, grad, sums, N, clip_low, clip_high, BLOCK=1024, num_warps=4)
        loss, count, clipped, kl = sums.sum(0).unbind()
        count = count.clamp_min(1)
        ctx.save_for_backward(grad, count)
        ctx.dtype = logp.dtype
        clip_frac, kl = clipped / count, kl / count
        ctx.mark_non_differentiable(clip_frac, kl)
        return loss / count, clip_frac, kl

    @staticmethod
    @once_differentiable
    def backward(ctx, g, *_):
        grad, count = ctx.saved_tensors
        return (grad * (g / count)).to(ctx.dtype), None, None, None, None, None

def token_loss(logp, old_logp, advantages, mask, clip_low=0.2, clip_high=0.2):
    """Masked mean of max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)), r = exp(logp - old_logp). All (B, R), mask bool. -> (loss,
    clip_frac, approx_kl), 0-d float; the gradient goes to logp only; what masked positions hold does not matter; an empty
    mask gives 0. r = 1, A = [1, 3] -> -2."""
    if takes(logp):
        return _TokenLoss.apply(logp, old_logp, advantages, mask, float(clip_low), float(clip_high))
    d = torch.where(mask, logp - old_logp.detach(), 0)
    adv, ratio, n = torch.where(mask, advantages.detach(), 0), d.exp(), mask.sum().clamp_min(1)
    plain, clipped = -adv * ratio, -adv * ratio.clamp(1 - clip_low, 1 + clip_high)
    with torch.no_grad():
        clip_frac, kl = ((clipped > plain) & mask).sum() / n, 0.5 * (d * d).sum() / n
    return torch.maximum(plain, clipped).sum() / n, clip_frac, kl


# ---------------------------------------------------------------------------------------------------------------------
# Drawing a token: one number u in [0, 1) a row, and the first word at which the mass so far exceeds u of all
#
#    words ->                              two launches. _draw_stats: a program for each 4096 words leaves their maximum, their mass at temperature
#    +------+------+------+------+--       1 and at the row's, their largest word. _draw_pick: a program for each row adds the masses up, finds the
#    | 4096 | 4096 | 4096 | 4096 |         part in which the goal lies (^), and reads that part alone once more. The logits are read once, where
#    +------+------+------+------+--       softmax, sum and search in torch read and write them ten times: about 2 ms -> 0.07, 256 rows of
#      mass   mass    ^                    151,936 words on an H200.
#| def draw(z, u, T, block=3):
#|     parts = [np.exp(z[v:v + block] / T).sum() for v in range(0, len(z), block)]
#|     goal = u * sum(parts)
#|     c = int(np.argmax(np.cumsum(parts) > goal))
#|     e = np.exp(z[c * block:(c + 1) * block] / T)
#|     return c * block + int(np.argmax(np.cumsum(e) > goal - sum(parts[:c])))

@jit
def _draw_stats(Z, HEAT, MAX, ONE, ALL, ARG, V, sz, chunks, BLOCK: tl.constexpr):
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = chunk * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(Z + row * sz + v, mask=v < V, other=float('-inf'))
    heat, m = tl.load(HEAT + row), tl.max(z, 0)
    base = tl.where(m == float('-inf'), 0.0, m)
    at = row * chunks + chunk
    tl.store(MAX + at, m)
    tl.store(ONE + at, tl.sum(tl.exp(z - base), 0))
    tl.store(ALL + at, tl.sum(tl.exp((z - base) / tl.where(heat > 0.0, heat, 1.0)), 0))
    tl.store(ARG + at, tl.min(tl.where((z == m) & (v < V), v, V), 0))

@jit
def _first(cum, part, goal, i, END: tl.constexpr):
    """The first i at which the mass so far exceeds the goal; behind it, by rounding, the last that has mass; 0 where none has (nan)."""
    has = part > 0.0
    at = tl.min(tl.where((cum > goal) & has, i, END), 0)
    return tl.where(at < END, at, tl.maximum(tl.max(tl.where(has, i, -1), 0), 0))

@jit
def _draw_pick(Z, U, HEAT, MAX, ONE, ALL, ARG, TOKEN, LOGP, RAW, V, sz, chunks, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, CHUNKS)
    at, ok, heat = row * chunks + c, c < chunks, tl.load(HEAT + row)
    cool = 1.0 / tl.where(heat > 0.0, heat, 1.0)
    m = tl.load(MAX + at, mask=ok, other=float('-inf'))
    top = tl.max(m, 0)
    base = tl.where(m == float('-inf'), 0.0, m)  # what the chunk's sums stand on
    one = tl.sum(tl.load(ONE + at, mask=ok, other=0.0) * tl.exp(base - top), 0)
    part = tl.load(ALL + at, mask=ok, other=0.0).to(tl.float64) * tl.exp((base - top) * cool).to(tl.float64)
    all, cum = tl.sum(part, 0), tl.cumsum(part, 0)
    goal = tl.load(U + row) * all
    chunk = _first(cum, part, goal, c, CHUNKS)
    i = tl.arange(0, BLOCK)
    z = tl.load(Z + row * sz + chunk * BLOCK + i, mask=chunk * BLOCK + i < V, other=float('-inf'))
    mass = tl.exp((z - top) * cool).to(tl.float64)
    token = chunk * BLOCK + _first(tl.cumsum(mass, 0) + tl.sum(tl.where(c < chunk, part, 0.0), 0), mass, goal, i, BLOCK)
    best = tl.min(tl.where((m == top) & ok, c, CHUNKS), 0)
    largest = tl.load(ARG + row * chunks + tl.minimum(best, chunks - 1))
    token = tl.minimum(tl.where(heat > 0.0, token, largest), V - 1)
    z_t = tl.load(Z + row * sz + token)
    raw = z_t - top - tl.log(one)
    tl.store(TOKEN + row, token.to(tl.int64))
    tl.store(RAW + row, raw)
    tl.store(LOGP + row, tl.where(heat > 0.0, (z_t - top) * cool - tl.log(all).to(tl.float32), raw))

def _draw_triton(z, u, temperature):
    z = z if z.stride(1) == 1 else z.contiguous()
    (n, V), BLOCK = z.shape, min(_pow2(z.size(1), 16), 64 if INTERPRET else 4096)
    chunks = _cdiv(V, BLOCK)
    m, one, all = (torch.empty(n, chunks, dtype=torch.float32, device=z.device) for _ in range(3))
    arg, token = torch.empty(n, chunks, dtype=torch.int32, device=z.device), torch.empty(n, dtype=torch.int64, device=z.device)
    logp, raw = (torch.empty(n, dtype=torch.float32, device=z.device) for _ in range(2))
    _launch(_draw_stats, (n, chunks), z, temperature, m, one, all, arg, V, z.stride(0), chunks, BLOCK=BLOCK, num_warps=8)
    _launch(_draw_pick, (n,), z, u, temperature, m, one, all, arg, token, logp, raw, V, z.stride(0), chunks, CHUNKS=_pow2(chunks, 2), BLOCK=BLOCK, num_warps=8)
    return token, logp, raw

def draw(z, u, temperature):
    """One token a row from softmax(z / temperature), by its distribution function: the first at which the mass so far exceeds u of all. z (n, V) float
    logits (-inf is never drawn), u (n,) float64 in [0, 1), temperature (n,) of z's dtype, 0 = the largest logit. -> token (n,) int64, its log-prob at the
    temperature (greedy: at 1), at 1; nan where z is not finite. z = log [.2, .5, .3], temperature 1: u .1 -> 0, u .69 -> 1, u .7 -> 2."""
    if z.dtype == torch.float32 and takes(z):
        return _draw_triton(z, u, temperature)
    if in_c(z) and z.stride(1) == 1 and len(z) and (out := native.draw(z, u, temperature)):
        return out
    hot = z / torch.where(temperature > 0, temperature, 1)[:, None]
    logp = hot - hot.logsumexp(-1, keepdim=True)  # log_softmax adds in a way that loses 1e-4 nats at 150,000 words
    mass = logp.exp().cumsum(-1, dtype=torch.float64)
    goal = torch.minimum(u[:, None] * mass[:, -1:], torch.nextafter(mass[:, -1:], torch.zeros_like(mass[:, -1:])))
    token = torch.where(temperature > 0, torch.searchsorted(mass, goal, right=True)[:, 0], z.argmax(-1)).clamp_max_(z.size(-1) - 1)  # beyond the end only where z is nan
    raw = z.gather(-1, token[:, None])[:, 0] - z.logsumexp(-1)
    return token, torch.where(temperature > 0, logp.gather(-1, token[:, None])[:, 0], raw), raw
