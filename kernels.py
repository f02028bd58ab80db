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

CHUNK_BYTES = 32 << 20  # the most that a block of logits may take on CPU; GPUs get 16 times that
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
    """z (n, V) float -> log p(target), logsumexp, entropy, each (n,). One exp: H = lse - sum_j p_j z_j."""
    m = z.amax(1, keepdim=True).clamp_min(-1e30)  # a row of -inf only: -inf - (-1e30), never -inf - -inf = nan
    e = (z - m).exp_()
    s = e.sum(1)
    lse = m[:, 0] + s.log()
    ez = torch.linalg.vecdot(e, z)
    if not torch.isfinite(ez).all():  # 0 * -inf: a masked word has no share in the entropy
        ez = torch.where(e > 0, e * z, 0).sum(1)
    logp = z.gather(1, targets.clamp_min(0)[:, None])[:, 0] - lse
    return logp, lse, (lse - ez / s).nan_to_num(0.0)


def _softmax_grad(z, targets, lse, entropy, g_logp, g_entropy):
    """d/dz of g_logp . logp + g_entropy . entropy, (n, V):  g_l (1[target] - p) - g_H p (log p + H)."""
    logp = z - lse[:, None]
    if g_entropy is None:
        d = logp.exp_().mul_(-g_logp[:, None])
    else:
        p = logp.exp()
        d = logp.clamp_min_(-1e30).add_(entropy[:, None]).mul_(g_entropy[:, None]).add_(g_logp[:, None]).mul_(p).neg_()
    return d.scatter_add_(1, targets.clamp_min(0)[:, None], g_logp[:, None])


def _mask_grads(valid, g_logp, g_entropy, like):
    """Gradients of the two outputs, zero where the target is ignored; None entropy gradient = not asked for."""
    g_logp = torch.zeros_like(like) if g_logp is None else torch.where(valid, g_logp, 0)
    return g_logp, None if g_entropy is None else torch.where(valid, g_entropy, 0)


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, ignore_index):
        ctx.set_materialize_grads(False)
        valid = targets != ignore_index
        z = logits.to(_wide(logits.dtype))
        logp, lse, entropy = _softmax_stats(z, torch.where(valid, targets, 0))
        ctx.save_for_backward(logits, targets, valid, lse, entropy)
        return torch.where(valid, -logp, 0), torch.where(valid, entropy, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_loss, g_entropy):
        logits, targets, valid, lse, entropy = ctx.saved_tensors
        g_logp, g_entropy = _mask_grads(valid, None if g_loss is None else -g_loss, g_entropy, lse)
        d = _softmax_grad(logits.to(lse.dtype), torch.where(valid, targets, 0), lse, entropy, g_logp, g_entropy)
        return d.to(logits.dtype), None, None


def cross_entropy(logits, targets, ignore_index=-1):
    """-> (loss, entropy), each (N,) float32, for logits (N, V) and targets (N,); both 0 where targets == ignore_index."""
    return _CrossEntropy.apply(logits, targets, ignore_index)


def _rows(x, V):
    """Rows of logits that fit into the memory budget: V=50257 -> 166 rows of float32 in 32 MiB on CPU."""
    return max(64, (CHUNK_BYTES << (4 if x.is_cuda else 0)) // (4 * V))


class _LinearLogprobs(torch.autograd.Function):
    """Blocks of rows. The backward computes each block of logits again (4 matmuls for 3) unless one block was enough to hold them all."""
    @staticmethod
    def forward(ctx, x, weight, targets, temperature, ignore_index):
        ctx.set_materialize_grads(False)
        n, wide, valid = _rows(x, weight.size(0)), _wide(x.dtype), targets != ignore_index
        safe = torch.where(valid, targets, 0)
        logp, lse, entropy = (torch.empty(len(x), dtype=wide, device=x.device) for _ in range(3))
        z = None
        for i in range(0, len(x), n):
            z = (x[i:i + n] @ weight.t()).to(wide).div_(temperature)
            logp[i:i + n], lse[i:i + n], entropy[i:i + n] = _softmax_stats(z, safe[i:i + n])
        ctx.save_for_backward(x, weight, safe, valid, lse, entropy, z if len(x) <= n else None)
        ctx.temperature, ctx.n = temperature, n
        return torch.where(valid, logp, 0), torch.where(valid, entropy, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_logp, g_entropy):
        x, weight, targets, valid, lse, entropy, held = ctx.saved_tensors
        g_logp, g_entropy = _mask_grads(valid, g_logp, g_entropy, lse)
        dx = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=lse.dtype) if ctx.needs_input_grad[1] else None
        for i in range(0, len(x), ctx.n):
            s = slice(i, i + ctx.n)
            z = held if held is not None else (x[s] @ weight.t()).to(lse.dtype).div_(ctx.temperature)
            d = _softmax_grad(z, targets[s], lse[s], entropy[s], g_logp[s], None if g_entropy is None else g_entropy[s])
            d = d.div_(ctx.temperature).to(x.dtype)
            if dx is not None:
                torch.mm(d, weight, out=dx[s])
            if dw is not None:
                dw.addmm_(d.t().to(dw.dtype), x[s].to(dw.dtype))
        return dx, None if dw is None else dw.to(weight.dtype), None, None, None


class _LinearCrossEntropy(torch.autograd.Function):
    """Mean loss. A scalar's gradient is known but for one factor, so it is computed with the loss: 3 matmuls, as without blocks."""
    @staticmethod
    def forward(ctx, x, weight, targets, ignore_index, grad):
        n, wide, valid = _rows(x, weight.size(0)), _wide(x.dtype), targets != ignore_index
        count = valid.sum().clamp_min(1)
        safe, share = torch.where(valid, targets, 0), valid.to(wide) / count
        loss = torch.zeros((), dtype=wide, device=x.device)
        dx = torch.empty_like(x) if grad and ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight, dtype=wide) if grad and ctx.needs_input_grad[1] else None
        for i in range(0, len(x), n):
            s = slice(i, i + n)
            z = (x[s] @ weight.t()).to(wide)
            y = safe[s, None]
            z_y = z.gather(1, y)
            m = z.amax(1, keepdim=True)
            e = z.sub_(m).exp_()
            total = e.sum(1, keepdim=True)
            loss += ((m + total.log() - z_y)[:, 0] * share[s]).sum()
            if dx is None and dw is None:
                continue
            d = e.mul_(share[s, None] / total).scatter_add_(1, y, -share[s, None]).to(x.dtype)
            if dx is not None:
                torch.mm(d, weight, out=dx[s])
            if dw is not None:
                dw.addmm_(d.t().to(wide), x[s].to(wide))
        ctx.save_for_backward(dx, None if dw is None else dw.to(weight.dtype))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dx, dw = ctx.saved_tensors
        return None if dx is None else dx * g.to(dx.dtype), None if dw is None else dw * g.to(dw.dtype), None, None, None


def _one_dtype(x, weight):
    """Matmul operands share a dtype: autocast's, where that is on, else x's."""
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return x.to(dtype), weight.to(dtype)


def linear_cross_entropy(x, weight, targets, ignore_index=-1):
    """Mean over the counted tokens of -log softmax(x @ weight.T)[target], without holding the (N, V) logits.
    x (..., C), weight (V, C), targets (...) int64 -> float32 scalar; 0 when every target is ignored."""
    x, weight = _one_dtype(x.reshape(-1, x.size(-1)), weight)
    return _LinearCrossEntropy.apply(x, weight, targets.reshape(-1), ignore_index, torch.is_grad_enabled())


def linear_logprobs(x, weight, targets, temperature=1.0, ignore_index=-1):
    """Log-probability of each target and the entropy of its distribution under softmax(x @ weight.T / temperature), without
    holding the (N, V) logits; both differentiable. x (..., C), weight (V, C), targets (...) -> (logp (...), entropy (...))
    float32, both 0 where targets == ignore_index."""
    flat, weight = _one_dtype(x.reshape(-1, x.size(-1)), weight)
    logp, entropy = _LinearLogprobs.apply(flat, weight, targets.reshape(-1), temperature, ignore_index)
    return logp.view(targets.shape), entropy.view(targets.shape)


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
