"""kernels.py against float64 formulas written here, forward and every gradient.

Rule (flash-attention's): the error against float64 is at most twice that of plain PyTorch in the same
dtype, three times for gradients. The same tests run three times: the twins in this process; the Triton
source in a child with TRITON_INTERPRET=1 (the variable must be set before triton is imported); the kernels
on CUDA with `pytest -m gpu`. Uninitialised memory is poisoned with nan throughout, so an element that
nobody wrote shows. KERNEL_SEED=n draws other inputs. """

import os
import random
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import kernels as K

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
INTERP = os.environ.get('TRITON_INTERPRET') == '1'
SEED = int(os.environ.get('KERNEL_SEED', 20261130))
SIDES = (
    {'interp': (torch.float32, torch.float16)}
    if INTERP
    else {'cpu': (torch.float32, torch.bfloat16), 'cuda': (torch.float32, torch.float16, torch.bfloat16)}
)
CASES = [
    pytest.param(
        side, dtype, id=f'{side}-{str(dtype)[6:]}', marks=[pytest.mark.gpu] if side == 'cuda' else []
    )
    for side, dtypes in SIDES.items()
    for dtype in dtypes
]
cases = pytest.mark.parametrize('side, dtype', CASES)
child = pytest.mark.skipif(INTERP, reason='for the parent process')


@pytest.fixture(autouse=True)
def fresh(request):
    torch.manual_seed(SEED)
    print(f'KERNEL_SEED={SEED}')
    K.use('auto')
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # torch.empty is full of nan
    chunk = K.CHUNK_BYTES
    yield
    K.CHUNK_BYTES = chunk
    torch.use_deterministic_algorithms(False)
    K.use('auto')


def dev(side):
    return 'cuda' if side == 'cuda' else 'cpu'


def draw(*shape, side='cpu', dtype=torch.float32, layout='plain', scale=1.0):
    """Random numbers; 'rows': a slice of something wider; 'strided': not even the last axis is dense."""
    wide = {'plain': shape, 'rows': (*shape[:-1], shape[-1] + 3), 'strided': (*shape[:-1], shape[-1] * 2)}[
        layout
    ]
    x = (torch.randn(wide, dtype=torch.float64) * scale).to(dtype).to(dev(side))
    return x[..., : shape[-1]] if layout == 'rows' else x[..., ::2] if layout == 'strided' else x


def run(fn, inputs, dtype, grads):
    """Outputs and input gradients of fn, float inputs cast to dtype (None keeps theirs). Leaves keep the
    inputs' strides."""
    leaves = [x.to(dtype or x.dtype) if dtype == torch.float64 else x for x in inputs]
    leaves = [x.detach().requires_grad_() for x in leaves]
    out = fn(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    torch.autograd.backward(out, [g.to(o.dtype) for o, g in zip(out, grads)])
    return [o.detach() for o in out], [x.grad for x in leaves]


def hold(ours, plain, exact, factor, what, ulp=0.0, scale=1e-3):
    """The tolerance rule. Where plain PyTorch happens to be exact, a few units in the last place are
    allowed, of the value itself or of `scale` (a gradient that cancels to 0, as dq with one visible key, is
    as exact as the terms that cancel)."""
    assert ours.shape == exact.shape and torch.isfinite(ours).all(), (
        f'{what}: shape {tuple(ours.shape)} or not finite'
    )
    if exact.numel() == 0:
        return
    floor = max(ulp, 16 * torch.finfo(ours.dtype).eps) * max(exact.abs().max().item(), scale)
    err, limit = (
        (ours.double() - exact).abs().max().item(),
        factor * (plain.double() - exact).abs().max().item() + floor,
    )
    assert err <= limit, f'{what}: error {err:.3g}, allowed {limit:.3g} (KERNEL_SEED={SEED})'


def check_against(fn, ref, inputs, what='', ulp=0.0):
    """fn against ref in float64, measured by ref in the dtype of the inputs. All inputs are
    differentiated."""
    with torch.no_grad():
        shapes = ref(*[x.double() for x in inputs])
    shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    grads = [
        torch.randn(o.shape, dtype=torch.float64).to(o.device).to(inputs[0].dtype).double() for o in shapes
    ]
    ours, g_ours = run(fn, inputs, None, grads)
    exact, g_exact = run(ref, inputs, torch.float64, grads)
    plain, g_plain = run(ref, inputs, None, grads)
    for i, (a, b, c) in enumerate(zip(ours, plain, exact)):
        hold(a, b, c, 2, f'{what} output {i}', ulp)
    scale = max([g.abs().max().item() for g in g_exact if g.numel()] + [1e-3])
    for i, (a, b, c) in enumerate(zip(g_ours, g_plain, g_exact)):
        assert a.dtype == inputs[i].dtype
        hold(a, b, c, 3, f'{what} gradient {i}', scale=scale)


# ---- norms, rotary, activations ------------------------------------------------------------------


def norm_ref(x, w, b=None, r=None, eps=1e-5, layer=False):
    h = x if r is None else x + r
    d = h - h.mean(-1, keepdim=True) if layer else h
    y = d / (d * d).mean(-1, keepdim=True).add(eps).sqrt() * w
    y = y if b is None else y + b
    return y if r is None else (y, h)


def check_norm(side, dtype, shape, layout, layer, res, bias):
    x, r = (draw(*shape, side=side, dtype=dtype, layout=layout) for _ in range(2))
    w, b = (draw(shape[-1], side=side, dtype=dtype) for _ in range(2))
    inputs = [x, w] + ([b] if bias else []) + ([r] if res else [])

    def unpack(rest):
        return dict(b=rest[0] if bias else None, r=rest[-1] if res else None)

    def ours(x, w, *rest):
        a = unpack(rest)
        return K.layer_norm(x, w, a['b'], 1e-5, a['r']) if layer else K.rms_norm(x, w, 1e-5, a['r'])

    check_against(
        ours,
        lambda x, w, *rest: norm_ref(x, w, **unpack(rest), layer=layer),
        inputs,
        f'norm {shape} {layout}',
    )


@cases
@pytest.mark.parametrize(
    'layer, res, bias',
    [(False, False, False), (False, True, False), (True, True, True), (True, False, False)],
)
def test_norm(side, dtype, layer, res, bias):
    check_norm(side, dtype, (3, 37, 50), 'plain', layer, res, bias)
    check_norm(side, dtype, (7, 129), 'strided' if res else 'rows', layer, res, bias)


@cases
def test_norm_mixed_dtypes(side, dtype):
    """float32 stream plus a 16-bit update, as under autocast: summed and normed in float32, each gradient
    in its own dtype."""
    x, r, w = draw(5, 24, side=side, dtype=dtype), draw(5, 24, side=side), draw(24, side=side)
    x, r, w = (t.requires_grad_() for t in (x, r, w))
    y, h = K.rms_norm(x, w, 1e-6, r)
    assert y.dtype == h.dtype == torch.float32 and torch.equal(h, x.float() + r)
    (y.sum() + 2 * h.sum()).backward()
    assert x.grad.dtype == dtype and r.grad.dtype == torch.float32 and torch.equal(x.grad, r.grad.to(dtype))


def rope_ref(q, k, cos, sin):
    def turn(x):
        (a, b), c, s = x.chunk(2, -1), cos.to(x.dtype)[:, None], sin.to(x.dtype)[:, None]
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    return turn(q), turn(k)


@cases
@pytest.mark.parametrize('B', [1, 2])
def test_rope(side, dtype, B):
    T, nh, nkv, hs = 5, 6, 3, 20
    angle = torch.rand(T, hs // 2) * 100
    cos, sin = angle.cos().to(dev(side)), angle.sin().to(dev(side))
    fused = draw(
        B, T, nh + 2 * nkv, hs, side=side, dtype=dtype
    )  # q and k are views of one matrix, as after a fused projection
    q, k = fused[:, :, :nh], fused[:, :, nh : nh + nkv]
    check_against(lambda q, k: K.rope(q, k, cos, sin), lambda q, k: rope_ref(q, k, cos, sin), [q, k], 'rope')
    apart = draw(B, nh, T, hs, side=side, dtype=dtype).transpose(
        1, 2
    )  # nor need the heads of a token lie side by side
    assert torch.equal(K.rope(apart, k, cos, sin)[0], K.rope(apart.contiguous(), k, cos, sin)[0])


@cases
def test_rope_turns_relative(side, dtype):
    """What rotary is for: q.k depends on the distance only, and lengths stay."""
    q, k = draw(1, 1, 1, 8, side=side).expand(1, 9, 1, 8), draw(1, 1, 1, 8, side=side).expand(1, 9, 1, 8)
    angle = torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001])
    rq, rk = K.rope(q, k, angle.cos().to(dev(side)), angle.sin().to(dev(side)))
    dots = torch.einsum('btd,bsd->ts', rq[:, :, 0], rk[:, :, 0])
    for shift in range(-4, 5):
        d = torch.diagonal(dots, shift)
        assert (d - d[0]).abs().max() < 1e-5 * dots.abs().max() + 1e-6
    assert torch.allclose(rq.norm(dim=-1), q.norm(dim=-1), rtol=1e-5)


@cases
@pytest.mark.parametrize('layout', ['plain', 'rows', 'strided'])
def test_swiglu_gelu(side, dtype, layout):
    g, u = (draw(3, 5, 83, side=side, dtype=dtype, layout=layout, scale=3) for _ in range(2))
    check_against(K.swiglu, lambda g, u: g * torch.sigmoid(g) * u, [g, u], 'swiglu')
    check_against(
        K.gelu,
        lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
        [g],
        'gelu',
    )
    big = torch.tensor([-100.0, 0.0, 100.0], dtype=dtype, device=dev(side))
    assert torch.equal(K.gelu(big), torch.tensor([-0.0, 0.0, 100.0], dtype=dtype, device=dev(side)))


# ---- cross entropy, log-probs --------------------------------------------------------------------


def stats_ref(z, y, ignore=-1):
    """(log p(y), entropy) by the definition; words at -inf have no share."""
    logp = torch.log_softmax(z, -1)
    p = logp.exp()
    h = -torch.where(p > 0, p * logp.masked_fill(p == 0, 0), 0).sum(-1)
    on = y != ignore
    return torch.where(on, logp.gather(-1, y.clamp_min(0)[:, None])[:, 0], 0), torch.where(on, h, 0)


@cases
@pytest.mark.parametrize('N, V, layout', [(9, 37, 'plain'), (5, 4099, 'rows'), (4, 64, 'strided')])
def test_cross_entropy(side, dtype, N, V, layout):
    z, y = draw(N, V, side=side, dtype=dtype, layout=layout, scale=3), torch.randint(0, V, (N,)).to(dev(side))
    y[1] = -1
    check_against(
        lambda z: K.cross_entropy(z, y),
        lambda z: (-stats_ref(z, y)[0].to(_out(dtype, z)), stats_ref(z, y)[1].to(_out(dtype, z))),
        [z],
        'cross_entropy',
    )


def _out(dtype, z):
    return torch.float64 if z.dtype == torch.float64 else torch.float32


@cases
def test_cross_entropy_minus_inf(side, dtype):
    """Masked words: no nan anywhere; a row of nothing but -inf: loss inf, entropy 0, finite gradient;
    ignored rows: garbage has no say."""
    z, y = draw(6, 50, side=side, dtype=dtype), torch.tensor([3, 4, 5, -1, -1, 7], device=dev(side))
    z[0, 10:], z[1, :4], z[2], z[3], z[4, ::2] = -torch.inf, -torch.inf, -torch.inf, -torch.inf, 60000.0
    x = z.clone().requires_grad_()
    loss, entropy = K.cross_entropy(x, y)
    want, h = stats_ref(z.double(), y)
    live = [0, 1, 3, 4, 5]
    assert torch.allclose(loss[live].double(), -want[live], atol=2e-3) and torch.allclose(
        entropy[[0, 1, 5]].double(), h[[0, 1, 5]], atol=2e-3
    )
    assert (
        loss[2] == torch.inf
        and entropy[2] == 0
        and (loss[[3, 4]] == 0).all()
        and (entropy[[3, 4]] == 0).all()
    )
    (loss[live].sum() + entropy.sum() + loss[2] * 0.5).backward()
    assert torch.isfinite(x.grad).all() and (x.grad[[3, 4]] == 0).all() and (x.grad[0, 10:] == 0).all()


@cases
def test_cross_entropy_far_from_zero(side, dtype):
    """Logits around 512: the entropy is that of their differences."""
    z, y = draw(6, 200, side=side, dtype=dtype, scale=3) + 512, torch.arange(6).to(dev(side))
    (loss, entropy), (want, h) = K.cross_entropy(z, y), stats_ref(z.double(), y)
    assert (entropy - h).abs().max() < 2e-6 and (loss + want).abs().max() < 2e-6


def linear_ref(x, w, y, T):
    z = x @ w.t() / T
    return tuple(o.to(_out(None, x)) for o in stats_ref(z.to(_out(None, x)), y))


def check_linear(side, dtype, N, C, V, T, chunk=None, layout='plain'):
    K.CHUNK_BYTES = chunk or K.CHUNK_BYTES
    x, w = (
        draw(N, C, side=side, dtype=dtype, layout=layout),
        draw(V, C, side=side, dtype=dtype, scale=C**-0.5, layout=layout),
    )
    y = torch.randint(0, V, (N,)).to(dev(side))
    y[::3] = -1
    ulp = (
        torch.finfo(dtype).eps
    )  # a library's 16-bit logit is off by half of it, whoever asks, and 15 rows are a small sample of that
    check_against(
        lambda x, w: K.linear_logprobs(x, w, y, T),
        lambda x, w: linear_ref(x, w, y, T),
        [x, w],
        f'linear_logprobs {N, C, V, T}',
        ulp,
    )
    for i, what in enumerate(('logp alone', 'entropy alone')):
        check_against(
            lambda x, w: K.linear_logprobs(x, w, y, T)[i],
            lambda x, w: linear_ref(x, w, y, T)[i],
            [x, w],
            what,
            ulp,
        )
    n = (y >= 0).sum().clamp_min(1)
    check_against(
        lambda x, w: K.linear_cross_entropy(x, w, y),
        lambda x, w: -linear_ref(x, w, y, 1.0)[0].sum() / n,
        [x, w],
        'linear_cross_entropy',
        ulp,
    )


@cases
def test_linear(side, dtype):
    check_linear(side, dtype, 23, 20, 75, 0.7)
    check_linear(
        side, dtype, 130, 17, 33, 1.0, chunk=40 * 33 * 4, layout='strided'
    )  # several blocks, the last one short


@pytest.mark.parametrize('side, dtype', [c for c in CASES if c.values[0] != 'cpu'])
def test_linear_logprobs_in_blocks(side, dtype, monkeypatch):
    """Logits are held when they fit into one block and computed again when not: the same values and
    gradients."""
    seen, fits = [], K._fits
    for name in ('_run_ce_fwd', 'product'):
        monkeypatch.setattr(
            K, name, lambda *a, name=name, f=getattr(K, name): seen.append((name, len(a[0]))) or f(*a)
        )
    for most, blocks in ((32, [16]), (12, [12, 4])):  # rows (or columns) of a block; 16 tokens count
        monkeypatch.setattr(K, '_fits', lambda x, other, least: min(fits(x, other, least), most))
        check_linear(side, dtype, 24, 20, 30, 0.7)
        x, w, y = (
            draw(16, 20, side=side, dtype=dtype).requires_grad_(),
            draw(30, 20, side=side, dtype=dtype).requires_grad_(),
            torch.arange(16, device=dev(side)),
        )
        seen.clear()
        outs = K.linear_logprobs(x, w, y, 0.7)
        with torch.no_grad():
            n = len(seen)
            assert all(
                torch.equal(a, b) for a, b in zip(outs, K.linear_logprobs(x, w, y, 0.7))
            )  # ratios of PPO's first update are 1 to the bit
            del seen[n:]
        sum(o.sum() for o in outs).backward()
        assert [n for name, n in seen if name == '_run_ce_fwd'] == blocks
        columns = (
            1 if most == 32 else 3
        )  # blocks of the vocabulary in the backward: 3 products each, or 2 where the logits are held
        assert sum(name == 'product' for name, _ in seen) == len(blocks) + columns * (2 if most == 32 else 3)


@cases
def test_linear_shapes_and_dtypes(side, dtype):
    x, w = draw(2, 3, 16, side=side, dtype=dtype), draw(40, 16, side=side, dtype=dtype)
    y = torch.randint(0, 40, (2, 3)).to(dev(side))
    logp, h = K.linear_logprobs(x, w, y)
    assert logp.shape == h.shape == (2, 3) and logp.dtype == torch.float32
    assert K.linear_cross_entropy(x, w, torch.full_like(y, -1)) == 0  # nothing counts: 0, not nan
    with torch.no_grad():
        again = K.linear_logprobs(x, w, y)[0]
    assert torch.equal(again, logp)
    frozen = x.clone().requires_grad_()
    K.linear_logprobs(frozen, w, y)[0].sum().backward()  # a frozen head: no gradient for it, none computed
    assert frozen.grad is not None and w.grad is None
    with pytest.raises(ValueError, match='expected'):
        K.linear_logprobs(x, w, y[:1])
    with pytest.raises(ValueError, match='temperature'):
        K.linear_logprobs(x, w, y, temperature=0.0)


@child
def test_linear_gradient_accumulates():
    """Two backward passes through one graph, and a scaled loss, as gradient accumulation does."""
    x, w, y = draw(9, 8).requires_grad_(), draw(30, 8).requires_grad_(), torch.randint(0, 30, (9,))
    loss = K.linear_cross_entropy(x, w, y)
    loss.backward(retain_graph=True)
    once = x.grad.clone(), w.grad.clone()
    (loss * 0.5).backward()
    assert torch.allclose(x.grad, 1.5 * once[0]) and torch.allclose(w.grad, 1.5 * once[1])


@child
def test_linear_autocast():
    x, w, y = draw(9, 8).requires_grad_(), draw(30, 8).requires_grad_(), torch.randint(0, 30, (9,))
    with torch.autocast('cpu', torch.bfloat16):
        logp, _ = K.linear_logprobs(x, w, y)
    logp.sum().backward()
    want = stats_ref((x @ w.t()).double(), y)[0]
    assert (
        logp.dtype == torch.float32
        and w.grad.dtype == torch.float32
        and (logp.double() - want).abs().max() < 0.1
    )


@child
def test_logits_are_never_held():
    """No tensor of the size of the logits is made, nor a tenth of it, forward or backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(
                t.untyped_storage().nbytes()
                for t in (out if isinstance(out, (tuple, list)) else [out])
                if isinstance(t, torch.Tensor)
            )
            return out

    K.CHUNK_BYTES = 1 << 20
    N, C, V = 1024, 8, 3000
    for fn in (lambda x, w, y: sum(o.sum() for o in K.linear_logprobs(x, w, y)), K.linear_cross_entropy):
        seen.clear()
        x, w, y = draw(N, C).requires_grad_(), draw(V, C).requires_grad_(), torch.randint(0, V, (N,))
        with Sizes():
            fn(x, w, y).backward()
        assert seen and max(seen) <= 1.1 * (1 << 20) < 0.1 * 4 * N * V


@cases
@pytest.mark.parametrize('shape, M', [((70, 24), 33), ((2, 3, 24), 5), ((65, 1), 1), ((0, 24), 5)])
@pytest.mark.parametrize('onednn', [True, False])
def test_linear_layer(side, dtype, shape, M, onednn, monkeypatch):
    """Both sides of its switches (AVX-512 and many rows: oneDNN; else torch), with and without a bias, any
    strides."""
    monkeypatch.setattr(K, '_onednn', onednn and torch.backends.mkldnn.is_available())
    for layout in ('plain', 'rows', 'strided'):
        x, w, b = (
            draw(*shape, side=side, dtype=dtype, layout=layout),
            draw(M, shape[-1], side=side, dtype=dtype, layout=layout),
            draw(M, side=side, dtype=dtype),
        )
        check_against(
            lambda x, w, b: K.linear(x, w, b),
            lambda x, w, b: x @ w.transpose(0, 1) + b,
            [x, w, b],
            f'linear {shape} {layout}',
        )
        check_against(
            lambda x, w: K.linear(x, w),
            lambda x, w: x @ w.transpose(0, 1),
            [x, w],
            f'linear {shape} {layout}, no bias',
        )
        if x.dim() == 2:
            hold(K.matmul_t(x, w), x @ w.t(), x.double() @ w.double().t(), 2, 'matmul_t')


# ---- attention -----------------------------------------------------------------------------------


def attention_ref(q, k, v, cu=None, causal=True):
    """The definition: an explicit mask, softmax, two products; heads repeated. (B, T, nh, hs), or packed
    with cu."""
    if cu is not None:
        parts = [
            attention_ref(q[None, a:b], k[None, a:b], v[None, a:b], None, causal)[0]
            for a, b in zip(cu[:-1], cu[1:])
        ]
        return torch.cat(parts + [q[cu[-1] :] * 0])
    g, (Tq, Tk) = q.size(2) // k.size(2), (q.size(1), k.size(1))
    k, v = k.repeat_interleave(g, 2), v.repeat_interleave(g, 2)
    s = torch.einsum('bihd,bjhd->bhij', q, k) * q.size(-1) ** -0.5
    i, j = torch.arange(Tq, device=q.device)[:, None] + Tk - Tq, torch.arange(Tk, device=q.device)
    ok = j <= (i if causal else Tk)
    p = torch.softmax(s.masked_fill(~ok, -1e4), -1)
    return torch.einsum('bhij,bjhd->bihd', p, v)


def check_flash(side, dtype, q, k, v, cu=None, causal=True):
    cut = None if cu is None else torch.tensor(cu, dtype=torch.int32, device=dev(side))
    check_against(
        lambda q, k, v: K.flash_attention(q, k, v, cut, causal),
        lambda q, k, v: attention_ref(q, k, v, cu, causal),
        [q, k, v],
        f'flash {tuple(q.shape)} {tuple(k.shape)} cu={cu} causal={causal}',
    )


@cases
@pytest.mark.parametrize('causal, T, Tk', [(True, 37, 37), (False, 50, 50), (False, 37, 50), (True, 37, 61)])
def test_flash_dense(side, dtype, causal, T, Tk):
    fused = draw(2, max(T, Tk), 4 + 2 + 2, 20, side=side, dtype=dtype)
    check_flash(side, dtype, fused[:, :T, :4], fused[:, :Tk, 4:6], fused[:, :Tk, 6:], None, causal)


@cases
def test_flash_packed(side, dtype):
    """Documents shorter and longer than a tile, one empty, one of a single token, padding behind the last;
    query groups of 3."""
    cu = [0, 1, 18, 18, 53, 58]
    q, k, v = (draw(64, n, 16, side=side, dtype=dtype) for n in (3, 1, 1))
    for causal in (True, False):
        check_flash(side, dtype, q, k, v, cu, causal)
    cut = torch.tensor(cu, dtype=torch.int32, device=dev(side))
    assert (K.flash_attention(q, k, v, cut)[58:] == 0).all()
    noisy = k.clone()
    noisy[18:53] = torch.randn(35, 1, 16).to(k) * 100
    a, b = K.flash_attention(q, k, v, cut), K.flash_attention(q, noisy, v, cut)
    assert (
        torch.equal(a[:18], b[:18]) and torch.equal(a[53:], b[53:]) and not torch.equal(a[18:53], b[18:53])
    )  # documents do not leak


@cases
def test_flash_packed_with_keys_of_before(side, dtype):
    """Queries are the last rows of each document, its keys lie elsewhere (a cache): each document equals
    itself alone."""
    queries, keys = [3, 1, 40, 17], [20, 64, 40, 18]
    cu, ck = ([0, *np.cumsum(n).tolist()] for n in (queries, keys))
    q, k, v = (
        draw(sum(queries), 4, 16, side=side, dtype=dtype),
        *(draw(sum(keys), 2, 16, side=side, dtype=dtype) for _ in range(2)),
    )
    up = lambda x: torch.tensor(x, dtype=torch.int32, device=dev(side))
    for longest in (0, (40, 64)):
        out = K.flash_attention(q, k, v, cu_seqlens=up(cu), cu_keys=up(ck), longest=longest)
        assert out.shape == q.shape
        for i in range(4):
            mine, theirs = slice(cu[i], cu[i + 1]), slice(ck[i], ck[i + 1])
            seen = torch.ones(queries[i], keys[i], dtype=torch.bool).tril(keys[i] - queries[i])
            attend = lambda *t: F.scaled_dot_product_attention(
                *(x.cpu().transpose(0, 1)[None] for x in t), seen, enable_gqa=True
            )[0].transpose(0, 1)
            exact = attend(q[mine].double(), k[theirs].double(), v[theirs].double())
            hold(out[mine].cpu(), attend(q[mine], k[theirs], v[theirs]), exact, 2, f'document {i}')


@cases
def test_flash_repeats_bitwise(side, dtype):
    cut = torch.tensor([0, 21, 40], dtype=torch.int32, device=dev(side))
    q, k, v = (draw(40, n, 16, side=side, dtype=dtype).requires_grad_() for n in (2, 1, 1))
    g, runs = draw(40, 2, 16, side=side, dtype=dtype), []
    for _ in range(2):
        q.grad = k.grad = v.grad = None
        K.flash_attention(q, k, v, cut).backward(g)
        runs.append([t.grad.clone() for t in (q, k, v)])
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def paged(side, dtype, lens, nh, nkv, hs, size, blocks=30):
    """A cache whose unused slots are nan, random block tables (-1 behind the end), and the dense keys and
    values."""
    device = dev(side)
    kc, vc = (torch.full((blocks, size, nkv, hs), torch.nan, dtype=dtype, device=device) for _ in range(2))
    order, width = torch.randperm(blocks).tolist(), max(-(-n // size) for n in lens) + 1
    table, dense = torch.full((len(lens), width), -1, dtype=torch.int32), []
    for b, n in enumerate(lens):
        mine = [order.pop() for _ in range(-(-n // size))]
        table[b, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
        k, v = (draw(n, nkv, hs, side=side, dtype=dtype) for _ in range(2))
        slots = torch.tensor(
            [mine[t // size] * size + t % size for t in range(n)] + [-1], dtype=torch.int64, device=device
        )
        pad = torch.full((1, nkv, hs), 7.0, dtype=dtype, device=device)
        K.kv_write(torch.cat([k, pad]), torch.cat([v, pad]), kc, vc, slots)
        dense.append((k, v))
    return kc, vc, table.to(device), dense


@cases
@pytest.mark.parametrize('nh, nkv, hs, size', [(4, 2, 20, 4), (3, 3, 16, 16)])
def test_paged(side, dtype, nh, nkv, hs, size):
    lens = [5, 0, 70, 1]
    kc, vc, table, dense = paged(side, dtype, lens, nh, nkv, hs, size)
    filled = sum(n * nkv * hs for n in lens)
    assert (
        torch.isfinite(kc).sum() == torch.isfinite(vc).sum() == filled
    )  # each slot written once, the padding token nowhere
    q, n = draw(4, nh, hs, side=side, dtype=dtype), torch.tensor(lens, dtype=torch.int32, device=dev(side))
    out = K.paged_attention(q, kc, vc, table, n)
    for b, (k, v) in enumerate(dense):
        if lens[b] == 0:
            assert (out[b] == 0).all()
            continue
        args = q[b][None, None], k[None], v[None]
        hold(
            out[b],
            attention_ref(*args)[0, 0],
            attention_ref(*(t.double() for t in args))[0, 0],
            2,
            f'paged row {b}',
        )
    if side != 'cpu':  # the twin's library may pick another order of sums; the kernel does not
        assert all(
            torch.equal(
                K.paged_attention(
                    q[b : b + 1], kc, vc, table[b : b + 1, : -(-max(lens[b], 1) // size)], n[b : b + 1]
                )[0],
                out[b],
            )
            for b in range(4)
        )


# ---- what holds everywhere -----------------------------------------------------------------------


@cases
def test_empty(side, dtype):
    x, w = draw(0, 8, side=side, dtype=dtype).requires_grad_(), draw(8, side=side, dtype=dtype)
    y, head = (
        torch.zeros(0, dtype=torch.int64, device=dev(side)),
        draw(30, 8, side=side, dtype=dtype).requires_grad_(),
    )
    outs = [
        K.rms_norm(x, w, 1e-5),
        *K.layer_norm(x, w, w, 1e-5, x),
        K.gelu(x),
        K.swiglu(x, x),
        *K.cross_entropy(x, y),
        *K.linear_logprobs(x, head, y),
    ]
    assert all(o.size(0) == 0 for o in outs) and K.linear_cross_entropy(x, head, y) == 0
    sum(o.sum() for o in outs).backward()
    assert x.grad.shape == (0, 8) and (head.grad == 0).all()
    q = x.detach().view(0, 1, 8)
    assert K.flash_attention(q, q, q, torch.zeros(1, dtype=torch.int32, device=dev(side))).shape == (0, 1, 8)
    cache = draw(2, 4, 1, 8, side=side, dtype=dtype)
    assert K.paged_attention(q, cache, cache, y.view(0, 1), y).shape == (0, 1, 8)


@child
def test_modes():
    with pytest.raises(ValueError, match='auto, torch or triton'):
        K.use('cuda')
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match='no CUDA device|not installed'):
            K.use('triton')
        assert K.which() in ('torch and C (CPU)', 'torch (CPU)')
    K.use('torch')
    assert K.which().startswith('torch')
    with pytest.raises(ValueError, match='expected'):
        K.cross_entropy(draw(2, 3, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match='multiple of key heads'):
        K.flash_attention(draw(1, 2, 3, 4), draw(1, 2, 2, 4), draw(1, 2, 2, 4))
    with pytest.raises(ValueError, match='rope'):
        K.rope(draw(2, 3, 4), draw(2, 3, 4), draw(2, 2), draw(2, 2))
    with pytest.raises(ValueError, match='rope'):
        K.rope(draw(1, 2, 3, 4), draw(1, 2, 3, 4), draw(1, 2, 2), draw(1, 2, 2))


@child
def test_numpy_lines():
    """The NumPy beside the kernels is code: run it against the twins."""
    np_code = {'np': np}
    exec('\n'.join(re.findall(r'^#\| ?(.*)$', open(os.path.join(ROOT, 'kernels.py')).read(), re.M)), np_code)
    P = {k: v for k, v in np_code.items() if callable(v)}
    assert set(P) >= {
        'norm',
        'norm_backward',
        'rope',
        'swiglu',
        'gelu',
        'online_softmax',
        'linear_logprobs',
        'flash_row',
        'attention_backward',
        'merge',
        'draw',
    }
    x, w, b, dy = (draw(*s, dtype=torch.float64).requires_grad_() for s in ((5, 7), (7,), (7,), (5, 7)))

    def close(a, t):
        np.testing.assert_allclose(a, t.detach().numpy(), rtol=1e-9, atol=1e-9)

    for layer in (False, True):
        y = K.layer_norm(x, w, b, 1e-5) if layer else K.rms_norm(x, w, 1e-5)
        n = [t.detach().numpy() for t in (x, w, b, dy)]
        close(P['norm'](n[0], n[1], n[2] if layer else 0, 1e-5, layer), y)
        for got, want in zip(
            P['norm_backward'](n[3], n[0], n[1], 1e-5, layer),
            torch.autograd.grad(y, (x, w, b) if layer else (x, w), dy.detach()),
        ):
            close(got, want)
    q, angle = draw(3, 2, 8, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    close(
        P['rope'](q.numpy(), angle.cos().numpy(), angle.sin().numpy()),
        K.rope(q[None], q[None], angle.cos(), angle.sin())[0][0],
    )
    g, u = (draw(11, dtype=torch.float64).requires_grad_() for _ in range(2))
    close(P['swiglu'](g.detach().numpy(), u.detach().numpy()), K.swiglu(g, u))
    for got, want in zip(
        P['swiglu_backward'](1.0, g.detach().numpy(), u.detach().numpy()),
        torch.autograd.grad(K.swiglu(g, u).sum(), (g, u)),
    ):
        close(got, want)
    np.testing.assert_allclose(P['gelu'](g.detach().numpy()), K.gelu(g).detach().numpy(), atol=1e-8)
    z, y = draw(1, 10, dtype=torch.float64), torch.tensor([4])
    loss, h = K.cross_entropy(z, y)
    close(P['online_softmax'](z[0].numpy(), 4), torch.stack([-loss[0], h[0]]))
    x1, head = draw(1, 6, dtype=torch.float64), draw(10, 6, dtype=torch.float64)
    close(
        P['linear_logprobs'](x1[0].numpy(), head.numpy(), 4, 0.7),
        torch.stack([o[0] for o in K.linear_logprobs(x1, head, y, 0.7)]),
    )
    q, k, v, do = (draw(9, 8, dtype=torch.float64).requires_grad_() for _ in range(4))
    out = K.flash_attention(*(t[None, :, None] for t in (q, k, v)))[0, :, 0]
    n = [t.detach().numpy() for t in (do, q, k, v)]
    close(P['flash_row'](n[1][8], n[2], n[3], 8**-0.5), out[8])
    for got, want in zip(
        P['attention_backward'](*n, 8**-0.5, np.tril(np.ones((9, 9), bool))),
        torch.autograd.grad(out, (q, k, v), do.detach()),
    ):
        close(got, want)
    s = n[2] @ n[1][8] * 8**-0.5
    halves = [
        (m, np.exp(a - m).sum(), np.exp(a - m) @ b)
        for a, b in ((s[:4], n[3][:4]), (s[4:], n[3][4:]))
        for m in [a.max()]
    ]
    close(P['merge'](*zip(*halves)), out[8])
    z, u = draw(20, 10, dtype=torch.float64), torch.rand(20, dtype=torch.float64)
    assert [P['draw'](x, a, 0.7) for x, a in zip(z.numpy(), u.numpy())] == K.draw(
        z, u, torch.full((20,), 0.7, dtype=torch.float64)
    )[0].tolist()


@pytest.mark.slow
@cases
@pytest.mark.parametrize('turn', range(6))
def test_sweep(side, dtype, turn):
    """Random shapes, layouts and options of every kernel."""
    r = random.Random(SEED + turn)
    torch.manual_seed(SEED + turn)
    layout = lambda: r.choice(['plain', 'rows', 'strided'])
    # a row of one number has no gradient but rounding
    check_norm(
        side,
        dtype,
        (r.randint(1, 40), r.randint(2, 300)),
        layout(),
        layer := r.random() < 0.5,
        r.random() < 0.5,
        layer and r.random() < 0.5,
    )
    check_linear(
        side,
        dtype,
        r.randint(1, 60),
        r.randint(1, 70),
        r.randint(2, 150),
        r.uniform(0.3, 2),
        r.choice([None, 5000]),
        layout(),
    )
    nkv, hs = r.randint(1, 3), r.choice([5, 8, 16, 33, 64])
    nh, lens = nkv * r.randint(1, 3), [r.choice([0, 1, 5, 16, 17, 40]) for _ in range(4)]
    cu = np.cumsum([0, *lens]).tolist()
    q, k, v = (draw(max(cu[-1], 1) + r.randint(0, 3), n, hs, side=side, dtype=dtype) for n in (nh, nkv, nkv))
    k, v = (draw(len(q), nkv, hs, side=side, dtype=dtype, layout=layout()) for _ in range(2))
    check_flash(side, dtype, q, k, v, cu, causal=r.random() < 0.7)
    T, Tk = (t := r.randint(1, 40)), t + r.choice([0, 0, 13])
    q, k, v = (draw(2, n, h, hs, side=side, dtype=dtype) for n, h in ((T, nh), (Tk, nkv), (Tk, nkv)))
    check_flash(side, dtype, q, k, v)
    test_cross_entropy(side, dtype, r.randint(2, 9), r.randint(2, 5000), layout())
    test_paged(side, dtype, nh, nkv, hs, r.choice([3, 8, 16, 64]))


@cases
def test_draw(side, dtype):
    """Against float64 sums over the row: the mass before the token is at most u of all, the mass with it
    more; -inf is never drawn; greedy takes the first of the largest; nan shows."""
    if dtype != torch.float32:
        pytest.skip('logits are drawn from in float32')
    n = 12 if INTERP else 40
    for V, scale in ((1, 1.0), (5, 1.0), (64, 3.0), (65, 9.0), (1000, 0.5)):
        z = draw(n, V, side=side, scale=scale, layout='rows')
        if V > 5:
            z[::3, 1::2] = -float('inf')
            z[1] = -float('inf')
            z[1, V - 2] = 3.0  # one word has all the mass
            z[2, 3] = z[2, 4] = 100.0  # the first of two
        u = torch.rand(n, dtype=torch.float64)
        u[:2] = torch.tensor([0.0, 1 - 2**-53])
        heat = torch.tensor([1, 0.6, 0, 1.7]).repeat(n // 4)
        token, logp, raw = (t.cpu() for t in K.draw(z, u.to(z.device), heat.to(z.device)))
        for i in range(n):
            x, t = z[i].cpu().double(), int(token[i])
            p = (x / (heat[i].item() or 1)).softmax(-1)
            assert p[t] > 0 and raw[i].item() == pytest.approx(
                x.log_softmax(-1)[t].item(), abs=2e-6, rel=1e-6
            ), (V, i)
            assert logp[i].item() == pytest.approx(p[t].log().item(), abs=2e-6, rel=1e-6), (V, i)
            if heat[i] == 0:
                assert t == int((x == x.max()).nonzero()[0]), (V, i)
            else:
                assert p[:t].sum() - 2e-6 <= u[i] <= p[: t + 1].sum() + 2e-6, (V, i)
        z[7, V // 2] = float('nan')
        logp, raw = K.draw(z, u.to(z.device), heat.to(z.device))[1:]
        assert raw.isnan().nonzero().tolist() == [[7]]


COMPILE = """
import torch
torch.version.cuda = '13.0'  # a CPU-only torch: let kernels.py import triton all the same
import kernels as K
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Hopper:  # the driver of a chip that is not there: enough to compile for it
    get_current_target = lambda self: GPUTarget('cuda', 90, 32)
    get_current_device = get_current_stream = lambda self, *_: 0
driver.set_active(Hopper())
seen = {}

def launch(kernel, grid, *args, **meta):
    shared = kernel.run(*args, grid=grid, warmup=True, **meta).metadata.shared
    seen[kernel.fn.__name__] = max(shared, seen.get(kernel.fn.__name__, 0))
K._launch, K._mode, K.takes = launch, 'triton', lambda x: True
K._tensor_cores = K._roomy = lambda x: True
K.docs_in_c = lambda x: False
def d(*s): return torch.zeros(*s, dtype=torch.bfloat16).requires_grad_()
def back(*outs): torch.autograd.backward([o.sum() for o in outs])
for C in (64, 768, 8192):
    back(*K.rms_norm(d(8, C), d(C), 1e-5, d(8, C)))
back(K.rms_norm(d(8, 1024), d(1024), 1e-5))
back(*K.rope(d(1, 64, 16, 128), d(1, 64, 8, 128), torch.zeros(64, 64), torch.zeros(64, 64)))
back(K.swiglu(d(16, 1024), d(16, 1024)))
y = torch.zeros(128, dtype=torch.long)
back(*K.cross_entropy(d(128, 50304), y))
back(*K.linear_logprobs(d(128, 64), d(512, 64), y, 0.7))
back(K.linear_cross_entropy(d(128, 64), d(512, 64), y))
for hs in (64, 128, 256):
    q, k, v = d(256, 4, hs), d(256, 2, hs), d(256, 2, hs)
    back(K.flash_attention(q, k, v, torch.tensor([0, 128, 256], dtype=torch.int32)))
    with torch.no_grad():  # a prompt that goes on from a cache
        cu, keys = (torch.tensor(x, dtype=torch.int32) for x in ([0, 28, 100], [0, 128, 256]))
        K.flash_attention(q[:100], k, v, cu, cu_keys=keys, longest=(72, 128))
    cache, table = torch.zeros(8, 16, 2, hs, dtype=torch.bfloat16), torch.zeros(4, 40, dtype=torch.int32)
    K.paged_attention(q[:4].detach(), cache, cache, table, table[:, 0])
    K.kv_write(k[:4].detach(), v[:4].detach(), cache, cache, torch.arange(4))
K.draw(torch.zeros(4, 50257), torch.zeros(4, dtype=torch.float64), torch.ones(4))
print(seen)
missing = [n for n in ('_norm_fwd _norm_bwd _rope _swiglu _ce_fwd _ce_bwd _attn_fwd _attn_dq _attn_dkdv '
                       '_paged_split _paged_merge _kv_write _draw_stats '
                       '_draw_pick').split() if n not in seen]
assert not missing, missing
assert max(seen.values()) <= 227 * 1024, 'more shared memory than a Hopper block has'
seen.clear()
K._roomy = lambda x: False
cu = torch.tensor([0, 128, 256], dtype=torch.int32)
back(K.flash_attention(d(256, 4, 128), d(256, 2, 128), d(256, 2, 128), cu))
assert len(seen) == 3 and max(seen.values()) <= 99 * 1024, seen
"""


@child
@pytest.mark.slow
def test_compiles_for_hopper(tmp_path):
    """The real compiler down to machine code, at the real tile sizes, needs no GPU: what the interpreter
    forgives shows here."""
    pytest.importorskip('triton')
    if not os.path.exists(
        os.path.join(os.path.dirname(sys.modules['triton'].__file__), 'backends', 'nvidia', 'bin', 'ptxas')
    ):
        pytest.skip('this triton brings no NVIDIA assembler')
    r = subprocess.run(
        [sys.executable, '-c', COMPILE],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env=dict(os.environ, TRITON_CACHE_DIR=str(tmp_path), OMP_NUM_THREADS='1', TRITON_INTERPRET='0'),
    )
    assert r.returncode == 0, r.stdout[-1000:] + r.stderr[-3000:]


COMPILED = """
import torch
import kernels as K
from model import ARCHS, GPT, GPTConfig
K.use('triton')
for arch in ('gpt2', 'qwen3'):
    kw = dict(n_kv_head=2, n_inner=48, head_size=16, tie=True, **ARCHS['qwen3']) if arch == 'qwen3' else {}
    model = GPT(GPTConfig(arch=arch, n_layer=1, n_head=4, n_embd=32, vocab_size=257, block_size=128, **kw))
    idx, targets = torch.randint(0, 257, (2, 24)), torch.randint(0, 257, (2, 24))
    doc = torch.arange(24).div(9, rounding_mode='floor').expand(2, 24)
    grads = []
    for compiled in (False, True):
        model.zero_grad()
        model(idx, targets, doc=doc)[1].backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.compile_blocks()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*grads)), arch
print('equal')
"""


@child
@pytest.mark.slow
def test_compiled_blocks_leave_out_the_kernels():
    """torch.compile cannot look into a Triton launch of ours: inside of it the twins run, attention between
    the graphs is still the kernel."""
    pytest.importorskip('triton')
    r = subprocess.run(
        [sys.executable, '-c', COMPILED],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=900,
        env=dict(os.environ, TRITON_INTERPRET='1', OMP_NUM_THREADS='1'),
    )
    assert r.returncode == 0 and 'equal' in r.stdout, r.stdout[-1000:] + r.stderr[-3000:]


def child_pytest(*args):
    env = dict(os.environ, TRITON_INTERPRET='1', KERNEL_SEED=str(SEED), OMP_NUM_THREADS='1')
    r = subprocess.run(
        [
            sys.executable,
            '-m',
            'pytest',
            '-x',
            '-p',
            'no:cacheprovider',
            os.path.abspath(__file__),
            '-k',
            'interp',
            *args,
        ],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    print(r.stdout[-6000:], r.stderr[-2000:])
    passed = re.search(r'(\d+) passed', r.stdout)
    assert r.returncode == 0 and passed, 'the Triton source failed in the interpreter: see above'
    return int(passed[1])


@child
def test_triton_source_in_the_interpreter():
    pytest.importorskip('triton')
    assert child_pytest() >= 20


@child
@pytest.mark.slow
def test_triton_sweep_in_the_interpreter():
    pytest.importorskip('triton')
    assert child_pytest('-m', 'slow') >= 6


def test_packed_documents_run_in_c_where_they_can(monkeypatch):
    """flash_attention and Layout take the C path in float32, and agree with the other one."""
    from model import Layout

    doc = torch.tensor([0] * 5 + [1] * 40 + [2] * 9)
    at = Layout((1, 54), torch.device('cpu'), doc=doc[None])
    q, k, v = (torch.randn(54 + at.extra, n, 32) for n in (4, 2, 2))
    calls = []
    monkeypatch.setattr(K, 'doc_attention', lambda *a, f=K.doc_attention: calls.append(1) or f(*a))
    ours = at.attend(0, q, k, v), K.flash_attention(q, k, v, at.cu_seqlens)
    assert len(calls) == (2 if K.docs_in_c(q) else 0)
    monkeypatch.setattr(K, 'docs_in_c', lambda x: False)
    for a, b in zip(ours, (at.attend(0, q, k, v), K.flash_attention(q, k, v, at.cu_seqlens))):
        assert torch.allclose(a[:54], b[:54], atol=1e-6) and a[:54].any()


def test_log_probs_of_a_large_vocabulary_lose_nothing():
    """One likely word and 151,935 unlikely ones, whose sum float32 can hold and a running sum cannot:
    torch.log_softmax is 3e-5 off."""
    x, w, y = torch.ones(4, 1), torch.randn(151936, 1), torch.tensor([0, 1, 2, 3])
    w[0] = 16.0
    exact = (x.double() @ w.double().t()).log_softmax(-1).gather(1, y[:, None])[:, 0]
    for logp in (K.linear_logprobs(x, w, y)[0], -K.cross_entropy(x @ w.t(), y)[0]):
        assert (logp - exact).abs().max() < 4e-6


# ---- other cards, played -------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """card(capability, shared KB, name of the platform): tensors on the CPU that say they lie on such a
    card."""

    class OnGpu(torch.Tensor):
        is_cuda = property(lambda self: True)
        device = property(lambda self: torch.device('cuda', 1))

    def play(capability=(9, 0), shared=227, hip=None):
        monkeypatch.setattr(K, 'INTERPRET', False)
        monkeypatch.setattr(torch.version, 'hip', hip)
        monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
        monkeypatch.setattr(torch.cuda, 'current_device', lambda: 0)
        cards = {
            0: types.SimpleNamespace(major=9, shared_memory_per_block_optin=227 << 10),
            1: types.SimpleNamespace(major=capability[0], shared_memory_per_block_optin=shared << 10),
        }
        monkeypatch.setattr(
            torch.cuda,
            'get_device_properties',
            lambda d=None: cards[0 if d is None else torch.device(d).index or 0],
        )
        monkeypatch.setattr(
            torch.cuda, 'get_device_capability', lambda d=None: capability if d is not None else (9, 0)
        )
        monkeypatch.setattr(K, 'triton', K.triton or types.SimpleNamespace())
        return lambda *shape, dtype=torch.bfloat16: torch.zeros(*shape, dtype=dtype).as_subclass(OnGpu)

    clear = K._runs.cache_clear
    clear()
    yield play
    clear()


@child
@pytest.mark.parametrize(
    'capability, shared, hip, large',
    [
        ((9, 0), 227, None, True),
        ((10, 0), 227, None, True),
        ((8, 0), 163, None, False),
        ((8, 6), 99, None, False),
        ((12, 0), 99, None, False),
        ((9, 0), 64, '7.0', False),
        ((10, 3), 64, '7.0', False),
    ],
)
def test_tiles_go_by_the_memory_of_the_tensors_own_card(card, capability, shared, hip, large):
    """The current card is an H100 throughout. AMD's numbers are not NVIDIA's: an MI210 says (9, 0), an RX
    6800 (10, 3)."""
    zeros = card(capability, shared, hip)
    for hs in (64, 80, 128, 256):
        size = K._attn_sizes(zeros(8, 2, hs), False)
        need = (size['BM'] + 2 * size['num_stages'] * size['BN']) * K._pow2(hs) * 2
        assert need <= max(shared, 97) << 10 and (size['BM'] == 128) == (large and 64 < hs <= 128)


@child
@pytest.mark.parametrize(
    'capability, hip, triton',
    [
        ((7, 5), None, False),
        ((7, 0), None, False),
        ((8, 0), None, True),
        ((12, 0), None, True),
        ((9, 0), '7.0', True),
    ],
)
def test_attention_below_ampere_is_torchs(card, monkeypatch, capability, hip, triton):
    zeros = card(capability, 64, hip)
    monkeypatch.setattr(K, '_runs', lambda device: True)
    launched, asked = [], []
    monkeypatch.setattr(K, '_launch', lambda kernel, *a, **k: launched.append(kernel))
    q, k = torch.zeros(40, 4, 16, dtype=torch.bfloat16), torch.zeros(40, 2, 16, dtype=torch.bfloat16)
    monkeypatch.setattr(K, 'takes', lambda x: True)
    monkeypatch.setattr(
        K, '_tensor_cores', lambda d, f=K._tensor_cores: asked.append(f('cuda:1')) or asked[-1]
    )
    K.flash_attention(q, k, k, torch.tensor([0, 30, 40], dtype=torch.int32))
    cache = torch.zeros(4, 16, 2, 16, dtype=torch.bfloat16)
    K.paged_attention(
        q[:2], cache, cache, torch.zeros(2, 2, dtype=torch.int32), torch.tensor([3, 20], dtype=torch.int32)
    )
    assert launched == ([K._attn_fwd, K._paged_split, K._paged_merge] if triton else []) and set(asked) == {
        triton
    }
    assert K.which() == ('triton (CUDA)' if triton else 'triton (CUDA), attention by torch (before Ampere)')
    seen = []
    monkeypatch.setattr(
        F,
        'scaled_dot_product_attention',
        lambda q, k, v, mask, is_causal, scale, enable_gqa: seen.append((k.size(1), enable_gqa)) or q,
    )
    K._sdpa(zeros(1, 5, 4, 16), zeros(1, 5, 2, 16), zeros(1, 5, 2, 16), causal=True)
    assert seen == ([(2, True)] if triton else [(4, False)])


@child
def test_packed_twin_is_not_a_loop_over_documents(monkeypatch):
    lens = [random.Random(SEED).randint(1, 40) for _ in range(200)]
    cu, calls = torch.tensor([0, *np.cumsum(lens)]), []
    monkeypatch.setattr(
        F,
        'scaled_dot_product_attention',
        lambda *a, f=F.scaled_dot_product_attention, **k: calls.append(1) or f(*a, **k),
    )
    q, k, v = (draw(int(cu[-1]), n, 8) for n in (2, 1, 1))
    out = K.flash_attention(q, k, v, cu)
    assert len(calls) <= 7
    assert torch.allclose(out, attention_ref(q, k, v, cu.tolist()), atol=1e-5)


@child
@pytest.mark.parametrize(
    'why',
    [
        'Failed to find C compiler. Please specify via CC environment variable.',
        "Command '['/usr/bin/gcc', ...]' returned non-zero exit status 1.",
        "[Errno 13] Permission denied: '/.triton'",
        'no kernel image is available for execution on the device',
    ],
)
def test_triton_that_cannot_compile_is_told_once_and_replaced(card, monkeypatch, capsys, why):
    zeros = card()

    def fail(*a, **k):
        raise RuntimeError(why + '\nand more')

    monkeypatch.setattr(K, '_launch', fail)
    monkeypatch.setattr(torch, 'zeros', lambda *a, f=torch.zeros, device=None, **k: f(*a, **k))
    K._trouble.cache_clear()
    try:
        assert not K.takes(zeros(4, 4)) and not K.takes(zeros(4, 4)) and K.which() == 'torch (CUDA)'
        said = capsys.readouterr().err
        assert (
            said.count(why) == 2
            and said.count('\n') == 2
            and 'python3-dev' in said
            and 'TRITON_CACHE_DIR' in said
        ), 'once for each of two cards'
        monkeypatch.setattr(K.importlib.util, 'find_spec', lambda name: True)
        with pytest.raises(ValueError, match='kernels triton: Triton cannot run here'):
            K.use('triton')
    finally:
        K._trouble.cache_clear()


@child
def test_draw_without_float64(monkeypatch):
    """A Mac's GPU has no float64: the same tokens as on the CPU."""

    class OnMac(torch.Tensor):
        device = property(lambda self: torch.device('mps'))

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            name = getattr(func, '__name__', '')
            plain = [a.as_subclass(torch.Tensor) if isinstance(a, cls) else a for a in args]
            if name == 'cpu':
                return plain[0].clone()
            if name == 'to' and plain[1:] and plain[1] == torch.device('mps'):
                return plain[0].as_subclass(cls)
            if name in ('__get__', 'dim', 'size'):
                return super().__torch_function__(func, types, args, kwargs or {})
            raise TypeError(f'{name} on a Mac')

    z, u, heat = draw(50, 30), torch.rand(50, dtype=torch.float64), torch.tensor([0, 0.7] * 25)
    monkeypatch.setattr(
        torch.Tensor,
        'to',
        lambda self, *a, f=torch.Tensor.to, **k: self if a == (torch.device('mps'),) else f(self, *a, **k),
    )
    got = K.draw(z.as_subclass(OnMac), u, heat.as_subclass(OnMac))
    assert all(torch.equal(a, b) for a, b in zip(got, K.draw(z, u, heat)))
