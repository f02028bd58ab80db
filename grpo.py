"""GRPO and its kin: the group is the baseline, no value network (DeepSeekMath, Shao et al. 2024, arXiv 2402.03300)."""
import math

import torch

# ---------------------------------------------------------------------------------------------------------------------
# the equations
# ---------------------------------------------------------------------------------------------------------------------

ADVANTAGES = ('grpo', 'dr_grpo', 'rloo', 'reinforce++')
LOSSES = ('grpo', 'dr_grpo', 'dapo', 'gspo', 'cispo')


def group_advantages(rewards, group_size, kind='grpo'):
    """rewards (B,) float, prompt-major: row i belongs to prompt i // group_size. Returns (B,), every token of a completion shares it.
        grpo         (r - mean) / (std + 1e-4) within the group (2402.03300 section 4.1.2); the sample std, n - 1, as TRL's
        dr_grpo      r - mean: without the std, easy and hard prompts weigh as their rewards do (2503.20783)
        rloo         r - mean of the OTHERS = G / (G - 1) (r - mean): an unbiased baseline (2402.14740)
        reinforce++  (r - mean) / (std + 1e-4) over the whole batch (2501.03262); the only one that means something for G = 1
    A group whose rewards are all equal gets zeros (it is "dead"), and so does a group of one in the first three; never NaN.
    ValueError: unknown kind, B not a multiple of group_size. [1, 0], G=2: grpo +-0.7070, dr_grpo +-0.5, rloo +-1."""
    if kind not in ADVANTAGES:
        raise ValueError(f'advantage kind {kind!r} is unknown: one of {", ".join(ADVANTAGES)}')
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f'{len(rewards)} rewards do not divide into groups of {group_size}: make the batch a multiple of group_size')
    r = rewards.view(1, -1) if kind == 'reinforce++' else rewards.view(-1, group_size)
    n, d = r.shape[1], r - r.mean(1, keepdim=True)
    if n == 1 or kind == 'dr_grpo':
        return d.flatten()
    return (d * n / (n - 1) if kind == 'rloo' else d / (r.std(1, keepdim=True) + 1e-4)).flatten()


def grpo_loss(logp, old_logp, advantages, mask, ref_logp=None, beta=0.0, clip_low=0.2, clip_high=0.2, loss_type='grpo', max_len=None,
              weights=None, denom=None):
    """The clipped surrogate of PPO with one advantage for a whole completion. logp, old_logp, ref_logp (B, R) float, advantages (B,), mask (B, R)
    bool. r_t = pi / pi_old; per token -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) + beta * k3(pi, ref), then
        grpo     mean over a completion's tokens, mean over completions (2402.03300 eq. 3): long wrong answers are punished less per token
        dr_grpo  sum over tokens / max_len, mean over completions: no length bias (2503.20783)
        dapo     mean over all tokens of the batch; use it with clip_high > clip_low (2503.14476 eq. 8)
        gspo     ONE ratio for the completion, exp(mean_t log r_t), clipped; mean over completions (2507.18071 eq. 5)
        cispo    -clip(r_t) A logp with the weight held constant: a clipped token still learns; mean over all tokens (2506.13585 eq. 4)
    weights (B, R): importance correction between sampler and trainer (`tis_weights`). denom: what to divide by in the place of this batch's own count
    (tokens for dapo and cispo, else completions), so that the losses of micro-batches add up to the batch's. Returns (loss, stats); stats: clip_frac,
    clip_low_frac, clip_high_frac, approx_kl = mean(log r^2) / 2, kl (k3, mean over tokens; with ref_logp). ValueError: unknown loss_type, dr_grpo without max_len.
    Worked: A=[1], logp = old_logp, mask all True -> loss -1 (for dr_grpo -R / max_len); clipping and k3 are zero."""
    if loss_type not in LOSSES:
        raise ValueError(f'loss_type {loss_type!r} is unknown: one of {", ".join(LOSSES)}')
    if loss_type == 'dr_grpo' and not max_len:
        raise ValueError('dr_grpo divides by the longest possible completion: give max_len')
    A, n = advantages[:, None], mask.sum(1).clamp(min=1)
    logp = torch.where(mask, logp, 0.0)
    log_ratio = logp - torch.where(mask, old_logp, 0.0)
    if loss_type == 'gspo':
        log_ratio = (log_ratio.sum(1) / n)[:, None].expand_as(logp)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = -clipped.detach() * A * logp if loss_type == 'cispo' else -torch.min(ratio * A, clipped * A)
    if weights is not None:
        per_token = per_token * torch.where(mask, weights, 0.0)
    stats, tokens = {}, mask.sum().clamp(min=1)
    if ref_logp is not None:
        d = logp - torch.where(mask, ref_logp, 0.0)
        kl = torch.exp(-d) - 1 + d  # k3 (Schulman 2020): never negative
        stats['kl'] = kl.detach().sum() / tokens
        per_token = per_token + beta * kl if beta else per_token
    per_token = torch.where(mask, per_token, 0.0)
    if loss_type in ('dapo', 'cispo'):
        loss = per_token.sum() / (denom or tokens)
    else:
        loss = (per_token.sum(1) / (max_len if loss_type == 'dr_grpo' else n)).sum() / (denom or len(mask))
    with torch.no_grad():
        share = lambda x: (x & mask).sum() / tokens
        low, high = ratio < 1 - clip_low, ratio > 1 + clip_high
        if loss_type != 'cispo':  # the minimum keeps the unclipped term where clipping would help the objective
            low, high = low & (A < 0), high & (A > 0)
        stats |= dict(clip_frac=share(low | high), clip_low_frac=share(low), clip_high_frac=share(high),
                      approx_kl=(torch.where(mask, log_ratio, 0.0) ** 2).sum() / 2 / tokens)
    return loss, stats


def tis_weights(logp, sampler_logp, mask, cap):
    """Truncated importance sampling: the sampler's kernels (paged, another dtype) are not the trainer's, so its samples come from another policy.
    weight = min(pi_trainer / pi_sampler, cap) per token, 1 where mask is False; all (B, R), no gradient. Returns (weights, stats): mismatch_max and
    mismatch_mean of |delta log p|, tis_frac = the share that was cut. cap=2, delta=log 3 -> 2."""
    with torch.no_grad():
        d = torch.where(mask, logp - sampler_logp, 0.0)
        n = mask.sum().clamp(min=1)
        return d.exp().clamp(max=cap), dict(mismatch_max=d.abs().max(), mismatch_mean=d.abs().sum() / n,
                                            tis_frac=(d.exp() > cap).sum() / n)


def overlong_penalty(lengths, max_len, cache):
    """DAPO eq. 13: 0 up to max_len - cache tokens, then a straight line down to -1 at max_len. lengths (B,) -> (B,) float.
    max_len=100, cache=20: lengths 80, 90, 100 -> 0, -0.5, -1."""
    return ((max_len - cache - lengths.float()) / max(cache, 1)).clamp(-1, 0)


def pass_at_k(correct, group_size, k):
    """The chance that at least one of k samples is right, without bias from group_size >= k of them (Chen et al. 2021, 2107.03374 eq. 1):
    1 - C(n - c, k) / C(n, k), mean over prompts. correct (B,) bool, prompt-major. n=4, c=1: pass@1 = 0.25, pass@2 = 0.5, pass@4 = 1."""
    c = correct.view(-1, group_size).sum(1).tolist()
    return sum(1 - math.comb(group_size - x, k) / math.comb(group_size, k) for x in c) / len(c)
