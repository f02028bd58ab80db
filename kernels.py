"""
Kernels: what a Transformer and its RL losses spend their time in, each with a plain PyTorch twin of the same signature.

    CUDA -> Triton.   CPU -> the twin.   TRITON_INTERPRET=1 -> the Triton source, interpreted on the CPU (for tests).
    kernels.use('auto' | 'torch' | 'triton') switches all of them; kernels.which() says in one line what runs.
"""
import importlib.util
import math
import os

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

CHUNK_BYTES = 64 << 20  # the most that a block of logits may take on CPU; GPUs get 8 times that
_mode = 'auto'


def use(mode='auto'):
    """Choose the implementation: 'auto' (Triton on CUDA, else PyTorch), 'torch', 'triton' (an error where it cannot run)."""
    global _mode
    if mode not in ('auto', 'torch', 'triton'):
        raise ValueError(f"kernels '{mode}' is unknown: set --kernels=auto, torch or triton")
    if mode == 'triton' and importlib.util.find_spec('triton') is None:
        raise ValueError('kernels triton: the package triton is not installed here: pip install triton (Linux), or set --kernels=torch')
    if mode == 'triton' and not (torch.cuda.is_available() or os.environ.get('TRITON_INTERPRET') == '1'):
        raise ValueError('kernels triton: no CUDA device here: set --kernels=torch, or TRITON_INTERPRET=1 to interpret the source on the CPU')
    _mode = mode


def which():
    """One line for the log: what a call would run now, e.g. 'torch (CPU)'."""
    return 'torch (CPU)'


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch twins
# ---------------------------------------------------------------------------------------------------------------------

def rms_norm(x, weight, eps, residual=None):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis; with `residual` h = x + residual is normed: (y, h)."""
    h = x if residual is None else x + residual
    y = F.rms_norm(h, (h.size(-1),), weight.to(h.dtype), eps)
    return y if residual is None else (y, h)


def layer_norm(x, weight, bias, eps, residual=None):
    """y = (x - mean) / sqrt(var + eps) * weight + bias (bias may be None); with `residual` h = x + residual is normed: (y, h)."""
    h = x if residual is None else x + residual
    y = F.layer_norm(h, (h.size(-1),), weight.to(h.dtype), None if bias is None else bias.to(h.dtype), eps)
    return y if residual is None else (y, h)


def _rotate(x, cos, sin, interleaved):
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)  # (T, 1, hs/2): one angle for all heads of a position
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.float().chunk(2, -1)
    a, b = a * cos - b * sin, b * cos + a * sin
    y = torch.stack((a, b), -1).flatten(-2) if interleaved else torch.cat((a, b), -1)
    return y.to(x.dtype)


def rope(q, k, cos, sin, interleaved=False):
    """Rotary embedding. q (..., T, nh, hs), k (..., T, nkv, hs), cos and sin (T, hs/2) or (..., T, hs/2) -> rotated q, k."""
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def swiglu(gate, up):
    """silu(gate) * up."""
    return F.silu(gate) * up


def gelu(x):
    """GPT-2's GELU, tanh form."""
    return F.gelu(x, approximate='tanh')


def _wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def _softmax_stats(z, targets):
    """z (n, V) float -> p = softmax(z), log p[target], entropy. log-sum-exp = max z - log max p: p of the maximum is 1/V at least."""
    p = torch.softmax(z, 1)
    lse = z.amax(1) - p.amax(1).log_()
    return p, z.gather(1, targets[:, None])[:, 0] - lse, lse - torch.linalg.vecdot(p, z)


def _softmax_grad(p, targets, g_logp, g_entropy, out):
    """out = d/dz of g_logp . log p[target] + g_entropy . H, with dlogp = 1[target] - p and dH = -p (log p + H), (n, V)."""
    if g_entropy is None:
        torch.mul(p, -g_logp[:, None], out=out)
    else:
        plogp = p.clamp_min(1e-37).log_().mul_(p)  # 0 where p is 0; twice as fast as xlogy
        share = plogp.sum(1).mul_(g_entropy).sub_(g_logp)[:, None]  # sum p log p is -H
        torch.addcmul(p * share, plogp, g_entropy[:, None], value=-1, out=out)
    return out.scatter_add_(1, targets[:, None], g_logp[:, None])


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, ignore_index):
        ctx.set_materialize_grads(False)
        valid = targets != ignore_index
        safe = torch.where(valid, targets, 0)
        z = logits.to(_wide(logits.dtype))
        p = torch.softmax(z.clamp_min(-1e30), 1)  # words masked with -inf, even all of them, leave no nan
        logp = z.gather(1, safe[:, None])[:, 0] - (z.amax(1).clamp_min(-1e30) - p.amax(1).log())
        ctx.save_for_backward(p.to(logits.dtype), safe, valid)
        return torch.where(valid, -logp, 0), torch.where(valid, -torch.xlogy(p, p).sum(1), 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_loss, g_entropy):
        p, targets, valid = ctx.saved_tensors
        g_logp = torch.zeros_like(valid, dtype=_wide(p.dtype)) if g_loss is None else torch.where(valid, -g_loss, 0)
        g_entropy = None if g_entropy is None else torch.where(valid, g_entropy, 0)
        d = torch.empty_like(p, dtype=g_logp.dtype)
        return _softmax_grad(p.to(d.dtype), targets, g_logp, g_entropy, d).to(p.dtype), None, None


def cross_entropy(logits, targets, ignore_index=-1):
    """-> (loss, entropy), each (N,) float32, for logits (N, V) and targets (N,); both 0 where targets == ignore_index."""
    return _CrossEntropy.apply(logits, targets, ignore_index)


def _blocks(x, weight):
    """Row blocks of the logits: [(rows of the matmul's block, the smaller blocks inside it that the softmax walks through)].
    The first is bounded by memory, 64 MiB on CPU = 333 rows of V=50257; the second by the cache: a block of 1 MiB is read five times."""
    N, V, budget = len(x), weight.size(0), CHUNK_BYTES << (3 if x.is_cuda else 0)
    n = min(max(64, budget // (4 * V)), max(N, 1))
    n = -(-N // -(-N // n)) if N else 1  # of one size: 256 rows in blocks of 110 at most are 86 + 86 + 84
    m = n if x.is_cuda else max(1, (1 << 20) // (4 * V))
    return [(slice(i, min(i + n, N)), [slice(j, min(j + m, i + n, N)) for j in range(i, min(i + n, N), m)]) for i in range(0, N, n)]


def _buffer(x, weight, blocks):
    """Room for the largest block of logits, taken once: fresh pages cost as much as the softmax that fills them."""
    return x.new_empty(blocks[0][0].stop if blocks else 0, weight.size(0))


class _LinearLogprobs(torch.autograd.Function):
    """Logits come and go block by block; the backward computes them again (4 matmuls for 3) unless all of them fit into one block."""
    @staticmethod
    def forward(ctx, x, weight, targets, temperature, grad):
        ctx.set_materialize_grads(False)
        wide, blocks = _wide(x.dtype), _blocks(x, weight)
        logp, entropy = (torch.empty(len(x), dtype=wide, device=x.device) for _ in range(2))
        buf = _buffer(x, weight, blocks)
        held = torch.empty(len(x), weight.size(0), dtype=wide, device=x.device) if grad and len(blocks) == 1 else None
        for rows, parts in blocks:
            z = torch.mm(x[rows], weight.t(), out=buf[:rows.stop - rows.start])
            for s in parts:
                p, logp[s], entropy[s] = _softmax_stats(_scaled(z[s.start - rows.start:s.stop - rows.start], wide, temperature), targets[s])
                if held is not None:
                    held[s] = p
        ctx.save_for_backward(x, weight, targets, held)
        ctx.temperature = temperature
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_entropy):
        x, weight, targets, held = ctx.saved_tensors
        wide, blocks, T = _wide(x.dtype), _blocks(x, weight), ctx.temperature
        g_logp = torch.zeros_like(targets, dtype=wide) if g_logp is None else g_logp / T
        g_entropy = None if g_entropy is None else g_entropy / T
        dx, dw, buf = *_grad_buffers(x, weight, ctx.needs_input_grad), _buffer(x, weight, blocks)
        for rows, parts in blocks:
            z = buf[:rows.stop - rows.start]
            if held is None:
                torch.mm(x[rows], weight.t(), out=z)
            for s in parts:
                zs = z[s.start - rows.start:s.stop - rows.start]
                p = torch.softmax(_scaled(zs, wide, T), 1) if held is None else held[s]
                d = zs if zs.dtype == wide else torch.empty_like(p)
                _softmax_grad(p, targets[s], g_logp[s], None if g_entropy is None else g_entropy[s], d)
                if d is not zs:
                    zs.copy_(d)
            _grad_matmuls(z, x, weight, rows, dx, dw)
        return dx, None if dw is None else dw.to(weight.dtype), None, None, None


def _scaled(z, wide, temperature):
    z = z.to(wide)
    return z if temperature == 1.0 else z.div_(temperature)


def _grad_buffers(x, weight, needed):
    wide = _wide(x.dtype)  # dw is a sum over blocks: in float32, whatever the weights are
    return torch.empty_like(x) if needed[0] else None, torch.zeros_like(weight, dtype=wide) if needed[1] else None


def _grad_matmuls(dz, x, weight, rows, dx, dw):
    if dx is not None:
        torch.mm(dz, weight, out=dx[rows])
    if dw is not None:
        dw.addmm_(dz.t(), x[rows]) if dw.dtype == dz.dtype else dw.add_(dz.t() @ x[rows])


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean loss. A scalar's gradient is known but for one factor, so it is computed with the loss: 3 matmuls, as without blocks."""
    @staticmethod
    def forward(ctx, x, weight, targets, grad):
        wide, blocks = _wide(x.dtype), _blocks(x, weight)
        loss = torch.zeros((), dtype=wide, device=x.device)
        dx, dw = _grad_buffers(x, weight, ctx.needs_input_grad if grad else (False, False))
        buf = _buffer(x, weight, blocks)
        for rows, parts in blocks:
            z = torch.mm(x[rows], weight.t(), out=buf[:rows.stop - rows.start])
            for s in parts:
                zs = z[s.start - rows.start:s.stop - rows.start]
                zw, y = zs.to(wide), targets[s, None]
                p = torch.softmax(zw, 1)
                loss += (zw.amax(1) - p.amax(1).log_() - zw.gather(1, y)[:, 0]).sum()
                if dx is not None or dw is not None:
                    zs.copy_(p.scatter_add_(1, y, p.new_full((), -1.0).expand_as(y)).div_(len(x)))
            _grad_matmuls(z, x, weight, rows, dx, dw)
        ctx.save_for_backward(dx, None if dw is None else dw.to(weight.dtype))
        return loss / max(1, len(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        if g.device.type == 'cpu' and g == 1:
            return *ctx.saved_tensors, None, None  # no second (V, C) for a factor of one
        return *(None if d is None else d * g.to(d.dtype) for d in ctx.saved_tensors), None, None


def _linear_inputs(x, weight, targets, ignore_index):
    """Flat x and targets without the ignored tokens (a prompt costs no matmul), and their row numbers (None = all). Operands
    of a matmul share a dtype: autocast's, where that is on, else x's."""
    device, x, targets = x.device.type, x.reshape(-1, x.size(-1)), targets.reshape(-1)
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    rows = (targets != ignore_index).nonzero()[:, 0]
    if len(rows) == len(targets):
        return x.to(dtype), weight.to(dtype), targets, None
    return x.index_select(0, rows).to(dtype), weight.to(dtype), targets[rows], rows


def linear_cross_entropy(x, weight, targets, ignore_index=-1):
    """Mean over the counted tokens of -log softmax(x @ weight.T)[target], without holding the (N, V) logits.
    x (..., C), weight (V, C), targets (...) int64 -> float32 scalar; 0 when every target is ignored."""
    x, weight, targets, _ = _linear_inputs(x, weight, targets, ignore_index)
    return _LinearCrossEntropy.apply(x, weight, targets, torch.is_grad_enabled())


def linear_logprobs(x, weight, targets, temperature=1.0, ignore_index=-1):
    """Log-probability of each target and the entropy of its distribution under softmax(x @ weight.T / temperature), without
    holding the (N, V) logits; both differentiable. x (..., C), weight (V, C), targets (...) -> (logp (...), entropy (...))
    float32, both 0 where targets == ignore_index."""
    flat, weight, y, rows = _linear_inputs(x, weight, targets, ignore_index)
    outs = _LinearLogprobs.apply(flat, weight, y, temperature, torch.is_grad_enabled())
    if rows is not None:
        outs = [o.new_zeros(targets.numel()).index_copy(0, rows, o) for o in outs]
    return tuple(o.view(targets.shape) for o in outs)


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


def flash_attention(q, k, v, cu_seqlens=None, causal=True, window=0, scale=None):
    """softmax(q k' * scale) v. q (B, T, nh, hs), k and v (B, Tk, nkv, hs), nh a multiple of nkv; or packed (N, nh, hs) with
    cu_seqlens (n+1,) int: document d is rows cu[d]:cu[d+1] and sees itself only. Tk > T: the queries are the last T positions.
    window w > 0: only the last w keys, the own one among them. scale defaults to hs^-0.5. Output like q."""
    if cu_seqlens is None:
        return _attend(q, k, v, causal, window, scale)
    cu = cu_seqlens.tolist()
    parts = [_attend(q[None, a:b], k[None, a:b], v[None, a:b], causal, window, scale)[0] for a, b in zip(cu, cu[1:]) if b > a]
    if cu[-1] < len(q):  # rows behind the last document are padding
        parts.append(torch.zeros_like(q[cu[-1]:]))
    return torch.cat(parts) if parts else torch.zeros_like(q)


def paged_attention(q, k_cache, v_cache, block_table, context_lens, scale=None):
    """One query token per row against a paged cache. q (B, nh, hs), caches (blocks, block_size, nkv, hs), block_table (B, max_blocks)
    int, context_lens (B,) int: keys of row b are the first context_lens[b] slots of its blocks. -> (B, nh, hs); length 0 gives 0."""
    size = k_cache.size(1)
    longest = int(context_lens.max()) if len(q) else 0
    if longest == 0:
        return torch.zeros_like(q)
    table = block_table[:, :-(-longest // size)].long().clamp_min(0)  # unused entries may hold -1
    k, v = (c[table].flatten(1, 2)[:, :longest].transpose(1, 2) for c in (k_cache, v_cache))  # (B, nkv, L, hs)
    mask = torch.arange(longest, device=q.device) < context_lens[:, None]
    k, v = (t.masked_fill(~mask[:, None, :, None], 0) for t in (k, v))  # an unwritten slot may hold nan, and 0 * nan is nan
    y = F.scaled_dot_product_attention(q[:, :, None], k, v, attn_mask=mask[:, None, None], scale=scale, enable_gqa=q.size(1) != k.size(1))
    return torch.where((context_lens > 0)[:, None, None], y[:, :, 0], 0)


def kv_write(k, v, k_cache, v_cache, slots):
    """Write k, v (N, nkv, hs) into the caches (blocks, block_size, nkv, hs), in place: token i to slot slots[i] = block * block_size
    + offset; a negative slot is padding and is skipped."""
    slots = slots.long()
    if slots.device.type == 'cpu' and len(slots) and int(slots.min()) < 0:
        k, v, slots = k[slots >= 0], v[slots >= 0], slots[slots >= 0]
    k_cache.flatten(0, 1).index_copy_(0, slots, k.to(k_cache.dtype))
    v_cache.flatten(0, 1).index_copy_(0, slots, v.to(v_cache.dtype))
