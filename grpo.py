"""GRPO and its kin: PPO without a value network; the other answers to the same prompt are the baseline.

    A_i = (r_i - mean(r_1 .. r_G)) / std(r_1 .. r_G)       DeepSeekMath, Shao et al. 2024 (2402.03300), eq. 3; DeepSeek-R1 (2501.12948)

One iteration:
  1. rollout: the policy answers batch_size / group_size prompts, group_size times each; the prompt is prefilled once
  2. score: reward functions of your own (a Python file each, weighted), or reward models
  3. advantage of an answer = its reward against its group's; a group of equal rewards is dead: it teaches nothing
     (dynamic_sampling asks further prompts in its place; what is dead is counted, and not computed when beta = 0)
  4. log-probs of the trainer against the sampler's: the mismatch is in every log line, tis_cap corrects for it
  5. clipped policy loss on every token of the answer, beta * k3 to the reference if beta > 0, AdamW, lr linear to 0
  6. evaluation: pass@1 and pass@k on held-out prompts, read by the same reward function from step 0 on
Variants are one key each: --advantage=dr_grpo, rloo or reinforce++; --loss_type=dr_grpo, dapo, gspo or cispo.
--mode=async (AReaL, 2505.24298): step 1 runs ahead in processes of its own, at most max_staleness updates old; the loop is the same.
Changed from the paper: beta is 0 by default (2503.20783, 2503.14476: verifiable rewards need no leash, and no second model).

    python grpo.py config/grpo_toy.py                            # CPU: pass@1 30 -> 95 % and more in 120 iterations
    torchrun --nproc_per_node=8 grpo.py config/grpo_qwen3_gsm8k.py --zero=2   # eight GPUs
    python grpo.py config/grpo_toy.py --mode=async               # rollouts run ahead in a process of their own
    python grpo.py config/grpo_qwen3_gsm8k.py                    # one GPU
    python grpo.py --init_from=Qwen/Qwen3-0.6B --reward=right.py,short.py --reward_weights=1,0.1 --dataset=my_prompts.jsonl
"""
import os
import copy
import math
import time
import json

import numpy as np
import torch

import infer
import kernels as K
import lora
import parallel
from dataset import Sampler, load_dataset, pack, pad
from tokenizer import encode_prompt, get_tokenizer
from model import Layout
from run import (activation_bytes, check_finite, checkpoint_keys, eta, kv_cache_bytes, load_model, memory_now,
                 memory_plan, open_model, open_run, pick_device, pick_threads, RunLog, training_bytes)
from rollout import Rollouts, load_reward

# ---------------------------------------------------------------------------------------------------------------------
# I/O
out_dir = 'out-grpo'
init_from = 'out-sft' # 'resume' | HF name | HF directory | an out_dir: where policy (and reference) start
overwrite = False # start anew in an out_dir that already holds a run
eval_interval = 20 # >= 1: iterations between evaluations; a checkpoint is written at each
eval_iters = 64 # >= 0: validation prompts an evaluation answers
eval_k = 4 # >= 1: answers to each of them: pass@1 and pass@eval_k
eval_only = False # evaluate once and stop
# data
dataset = 'data/toy/arith_train.jsonl' # rows {"prompt", ...}; the whole row goes to the reward
val_dataset = '' # '' keeps 5 % of dataset aside
tokenizer = '' # '' = the one of init_from
max_prompt = 0 # >= 0: tokens of a prompt at most; 0 = what max_new_tokens leaves of the context
long_prompts = 'error' # a prompt over that: 'error' | 'drop' | 'cut' (its beginning)
seed = 1337
# reward
reward = 'data/toy/reward.py' # Python files with reward(prompt, completion, row) -> float, or reward models; several by comma, the first says what is correct
reward_weights = '' # '1,0.2': one weight each; '' = 1 each
overlong = 'none' # an answer cut off at max_new_tokens: 'none' = as any other | 'mask' = not trained on | 'shape' = length penalty (2503.14476 eq. 13)
overlong_cache = 16 # >= 0: tokens before max_new_tokens over which 'shape' falls from 0 to -1
# algorithm
batch_size = 64 # >= 1: completions an iteration, over all processes
group_size = 8 # >= 1: completions a prompt
minibatch_size = 64 # >= 1: completions an optimizer step; batch_size = on policy, no ratio to clip
micro_tokens = 8192 # >= 1: tokens a forward pass sees at most; the result is the same
grpo_epochs = 1 # >= 1: passes over each batch
max_new_tokens = 64 # >= 1: tokens an answer at most
temperature = 1.0 # > 0: of the samples, and of every log-prob
advantage = 'grpo' # 'grpo' | 'dr_grpo' | 'rloo' | 'reinforce++'
loss_type = 'grpo' # 'grpo' | 'dr_grpo' | 'dapo' | 'gspo' | 'cispo'
clip_low = 0.2 # >= 0: the ratio stays above 1 - clip_low; gspo wants 3e-4
clip_high = 0.2 # >= 0: and below 1 + clip_high; dapo 0.28, gspo 4e-4
beta = 0.0 # >= 0: weight of k3 to the reference; 0 = off
dynamic_sampling = 0 # >= 0: further rounds of prompts at most, to replace dead groups; 0 = off
tis_cap = 2.0 # >= 0: truncated importance weight between sampler and trainer; 0 = off
decoupled = True # the ratio is taken to the policy before the update, tis_cap's weight bridges from the sampler to that; False = naive: the ratio to the sampler
track_kl = True # KL to the reference at evaluations also when beta = 0 (costs the memory of a frozen copy)
# asynchronous rollouts (2505.24298)
mode = 'sync' # 'sync': sample, then train | 'async': rollout workers sample while this process trains
max_staleness = 1 # >= 0: async: updates that a sample's weights may be behind at most; 0 = sync with workers
simulate_staleness = 0 # >= 0: async in one process, deterministic: each batch is sampled with the weights of so many updates ago; 0 = off
rollout_workers = 1 # >= 1: async: processes that sample, an engine of max_num_seqs each, on one CPU thread or a share of the GPUs
reward_workers = 1 # >= 1: async: processes that run the reward files
reward_timeout = 30.0 # > 0: async: seconds for the answers to one prompt; a reward that hangs, raises, dies or is not finite is tried again
reward_retries = 2 # >= 0: async: so often; then the prompt is dropped, counted, and the next one takes its place
runtime = 'local' # async: 'local' | 'ray' | 'HOST:PORT' of python actors.py --head=True
# LoRA (2106.09685)
lora_r = 0 # >= 0: rank; 0 = train all weights; with an adapter the reference is the same model without it, for free
lora_alpha = 16.0 # > 0: the adapter is scaled by alpha / r
lora_targets = '' # HF module names, comma-separated; '' = c_attn, or q_proj,v_proj
# optimizer
max_iters = 100 # >= 0: iterations: one batch of completions each
learning_rate = 1e-6 # >= 0: linear to 0; 1e-6 for billions of parameters, 1e-4 and more for tiny ones
warmup_iters = 0 # >= 0: iterations of linear warm-up
weight_decay = 0.0 # >= 0: AdamW's, of matrices only
beta1 = 0.9 # in [0, 1): decay of Adam's first moment
beta2 = 0.999 # in [0, 1): decay of Adam's second moment
adam_eps = 1e-8 # > 0: Adam's epsilon
grad_clip = 1.0 # >= 0: global norm; 0 = off
# system
max_num_seqs = 64 # >= 1: completions generated at once
device = 'auto' # 'auto' = cuda if there is one | 'cpu' | 'cuda' | 'cuda:1'
dtype = 'auto' # of the matrix products: 'auto' | 'float32' | 'bfloat16'; weights and optimizer stay float32
compile = False # torch.compile of the blocks in updates; for CUDA: on the CPU torch.compile leaves oneDNN's products for slower ones
kernels = 'auto' # 'auto' | 'torch' | 'triton'
threads = 0 # >= 0: CPU threads; 0 = at most 2 for models under 5 M parameters, else torch's choice
# several processes: torchrun --nproc_per_node=N; N / (tp pp cp) data-parallel replicas share the batch
tp = 1 # >= 1: tensor parallel: heads and MLP columns shared out; they talk in every layer, so keep tp inside a node
pp = 1 # >= 1: pipeline stages of layers; wants several micro-batches an iteration
cp = 1 # >= 1: context parallel: not here, where the answers to a prompt share its tokens
rollout_tp = False # with tp: False = each rank gathers the whole policy and answers its share of the prompts | True = each keeps its part, a tp group answers together
zero = 0 # in [0, 3]: what the replicas share out: 0 nothing | 1 optimizer | 2 + gradients | 3 + weights
dist_timeout = 120 # > 0: seconds that one rank waits for another; then the run ends and says which, and in what
# ---------------------------------------------------------------------------------------------------------------------
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read()) # overrides from command line or config file
config = {k: globals()[k] for k in config_keys} # will be useful for logging
# ---------------------------------------------------------------------------------------------------------------------
# the equations. (B, R) arrays: R response tokens, right-padded, mask (B, R) bool, True = counts. A masked position may hold
# any finite value; it changes neither results nor gradients.


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
    n, d = r.shape[1], torch.where(r.amax(1, keepdim=True) == r.amin(1, keepdim=True), 0.0, r - r.mean(1, keepdim=True))  # 0 exactly
    if n == 1 or kind == 'dr_grpo':
        return d.flatten()
    return (d * n / (n - 1) if kind == 'rloo' else d / (r.std(1, keepdim=True) + 1e-4)).flatten()


def k3(logp, ref_logp):
    """Schulman's estimate of KL(pi || ref) from tokens sampled by pi: exp(-d) - 1 + d, d = logp - ref_logp. Unbiased, never negative. d=0.5 -> 0.1065."""
    d = logp - ref_logp
    return torch.exp(-d) - 1 + d


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
    clip_low_frac, clip_high_frac, approx_kl = mean(log r^2) / 2, ratio_max = largest |r - 1|, kl (k3, mean over tokens; with ref_logp). ValueError: unknown loss_type, dr_grpo without max_len.
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
        kl = k3(logp, torch.where(mask, ref_logp, 0.0))
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
                      approx_kl=(torch.where(mask, log_ratio, 0.0) ** 2).sum() / 2 / tokens,
                      ratio_max=torch.where(mask, ratio - 1, 0.0).abs().max())
    return loss, stats


def tis_weights(logp, sampler_logp, mask, cap):
    """Truncated importance sampling: the sampler's kernels (paged, another dtype) are not the trainer's, in async mode its weights are older too, so
    its samples come from another policy. weight = min(pi_trainer / pi_sampler, cap) per token, 1 where mask is False; all (B, R), no gradient. With
    pi_trainer = the policy before the update this is the decoupled objective of 2505.24298 eq. 5: the weight carries samples of the behaviour policy
    over to the proximal one, around which the loss clips. Returns (weights, stats): mismatch_max and mismatch_mean of |delta log p|, tis_frac = the
    share that was cut. cap=2, delta=log 3 -> 2."""
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


def masked_mean(x, mask):
    """Mean of x over True positions, 0 for none. x, mask same shape. [1, 9], [True, False] -> 1.0."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def linear_lr(it, peak, warmup, total):
    """Linear warm-up, then linear to 0 at iteration `total`."""
    return peak * min((it + 1) / (warmup + 1), max(0.0, (total - it) / max(1, total - warmup)))


# ---------------------------------------------------------------------------------------------------------------------
# data and reward


def encode_prompts(rows, tok, room, name, long_prompts):
    """Rows -> ([row], [prompt ids]); a prompt over `room` tokens is an error, dropped, or loses its beginning."""
    kept, prompts, long = [], [], 0
    for i, row in enumerate(rows):
        if 'prompt' not in row:
            raise ValueError(f'{name}, row {i + 1}: no "prompt", it has {sorted(row)}')
        ids = encode_prompt(row['prompt'], tok)
        if not ids:
            raise ValueError(f'{name}, row {i + 1}: empty prompt')
        if len(ids) > room:
            if long_prompts == 'error':
                raise ValueError(f'{name}, row {i + 1}: prompt of {len(ids)} tokens, block_size minus max_new_tokens leaves {room}: '
                                 f'lower --max_new_tokens, or --long_prompts=drop or cut')
            long += 1
            if long_prompts == 'drop':
                continue
            ids = ids[-room:]
        kept.append(row)
        prompts.append(ids)
    if long:
        print(f'{name}: {long} prompts over {room} tokens, {long_prompts}')
    if not prompts:
        raise ValueError(f'{name}: no prompt left')
    return kept, prompts


def score_with_model(model, sequences, device, micro_tokens):
    """Rewards (S,) of token lists, read at the last token of each; packed without padding, float32 on the CPU."""
    out, lengths = torch.empty(len(sequences)), [len(s) for s in sequences]
    for bin in pack(lengths, max([micro_tokens, *lengths])):
        n = torch.tensor([lengths[i] for i in bin])
        idx = torch.from_numpy(np.concatenate([np.asarray(sequences[i], np.int64) for i in bin]))[None]
        doc = torch.arange(len(bin)).repeat_interleave(n)[None]
        with torch.no_grad():
            out[bin] = model(idx.to(device), doc=doc.to(device))[0][0, (n.cumsum(0) - 1).to(device)].float().cpu()
    return out


def score_with_files(fn, name, rows, prompts, texts):
    """(S,) float32 of a reward function; what it raises, and what is no finite number, is named with the row."""
    out = []
    for row, prompt, text in zip(rows, prompts, texts):
        try:
            out.append(float(fn(prompt, text, row)))
        except Exception as e:
            raise ValueError(f'reward {name} raised {type(e).__name__}: {e}, for completion {text[:60]!r} of row {str(row)[:120]}') from e
        if not math.isfinite(out[-1]):
            raise ValueError(f'reward {name} returned {out[-1]} for completion {text[:60]!r} of row {str(row)[:120]}: rewards must be finite')
    return torch.tensor(out, dtype=torch.float32)


def answer_logps(model, groups, device, temperature=1.0):
    """Token log-probs of answers by one forward without padding, in which a prompt is computed ONCE for all its answers.
    groups: [(prompt ids, [answer ids, ...])]. Returns (logp, entropy, mask), all (S, R), S answers in order, padded on the right.

        flat tokens   p p p | a a | b b b | ...        what embeddings, linear layers and norms see: N = P + 2 + 3
        attention     p p p a a | p p p b b b | ...    gathered for the attention alone: each answer sees its prompt and itself
    An answer's last token predicts nothing that counts, so it is not in the input at all."""
    tokens, pos, gather, slot, predict, lengths, n, m = [], [], [], [], [], [], 0, 0
    for prompt, answers in groups:
        P, head = len(prompt), np.arange(n, n + len(prompt))
        tokens.append(prompt), pos.append(np.arange(P)), slot.append(np.arange(m, m + P))
        n += P
        for a in answers:
            k = len(a) - 1
            path = np.concatenate([head, np.arange(n, n + k)])
            tokens.append(a[:-1]), pos.append(np.arange(P, P + k)), slot.append(np.arange(m + P, m + P + k))
            gather.append(path), predict.append(path[P - 1:]), lengths.append(P + k)
            n, m = n + k, m + P + k
    extra = np.zeros(K.extra_rows(n), np.int64)  # dummy rows that nobody reads: few shapes for oneDNN
    tokens.append(extra), pos.append(extra), slot.append(extra)
    tokens, pos, gather, slot, predict = (torch.from_numpy(np.concatenate(x).astype(np.int64)).to(device) for x in (tokens, pos, gather, slot, predict))
    answers = [a for _, answers in groups for a in answers]
    at = Layout((1, m), torch.device(device), doc=torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[None].to(device))
    x = model.hidden(tokens, pos, at.through(gather, slot).attend())
    targets = torch.from_numpy(np.concatenate(answers).astype(np.int64)).to(device)
    found = model.token_logprobs(x[predict], targets, temperature)
    sizes = torch.tensor([len(a) for a in answers], device=device)
    mask = torch.arange(int(sizes.max()), device=device) < sizes[:, None]
    where = mask.reshape(-1).nonzero()[:, 0]
    logp, entropy = (f.new_zeros(mask.numel()).index_copy(0, where, f).view(mask.shape) for f in found)
    return logp, entropy.detach(), mask


# ---------------------------------------------------------------------------------------------------------------------
if __name__ == '__main__':
    # ---- process and models --------------------------------------------------------------------------------------
    config['stage'] = 'grpo'
    device, amp_dtype = pick_device(device, dtype)
    amp = lambda: torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32)
    K.use(kernels)
    for key, given, known in (('long_prompts', long_prompts, ('error', 'drop', 'cut')), ('overlong', overlong, ('none', 'mask', 'shape')),
                              ('advantage', advantage, ADVANTAGES), ('loss_type', loss_type, LOSSES), ('mode', mode, ('sync', 'async'))):
        if given not in known:
            raise ValueError(f'{key} {given!r}: expected one of {", ".join(known)}')
    if batch_size % minibatch_size or minibatch_size % group_size:
        fits = [m for m in range(group_size, batch_size + 1, group_size) if batch_size % m == 0]
        raise ValueError(f'batch_size {batch_size}, minibatch_size {minibatch_size}, group_size {group_size}: each must divide the one before; set --minibatch_size to '
                         + (f'one of {fits}' if fits else f'a multiple of {group_size}, --batch_size to a multiple of that'))
    if group_size == 1 and advantage != 'reinforce++':
        raise ValueError(f"group_size 1 with advantage {advantage!r}: a group of one has no baseline, every advantage would be 0; --group_size=8, or --advantage=reinforce++")
    if mode == 'sync' and simulate_staleness or simulate_staleness < 0:
        raise ValueError(f'simulate_staleness {simulate_staleness} with mode {mode!r}: a number of updates, with --mode=async')
    if temperature <= 0:
        raise ValueError(f'temperature {temperature}: sampling needs one above 0 (greedy samples carry no gradient information)')
    parallel.accept('grpo', tp, pp, cp, compile, mode, rollout_tp=rollout_tp)
    mesh = parallel.init(tp, pp, cp, zero, dist_timeout, device, seed, quiet=True)  # this process alone, or torchrun's
    device = mesh.device
    if not os.path.exists(dataset):
        raise ValueError(f'{dataset}: no such data; python {os.path.dirname(dataset) or "data/toy"}/prepare.py makes it (or name a file of your own)')
    names = [r.strip() for r in reward.split(',')]
    try:
        reward_w = [float(w) for w in reward_weights.split(',')] if reward_weights else [1.0] * len(names)
    except ValueError:
        raise ValueError(f'reward_weights {reward_weights!r}: numbers, separated by commas') from None
    if len(reward_w) != len(names):
        raise ValueError(f'{len(names)} rewards ({reward}) but {len(reward_w)} reward_weights ({reward_weights}): one weight each')
    ckpt = open_run(out_dir, init_from, overwrite, 'grpo', mesh)
    if init_from == 'scratch':
        raise ValueError('GRPO starts from a model that can answer: --init_from=out-sft (made by python sft.py config/sft_toy.py), a name or a directory')
    config['init_from'] = ckpt['config']['init_from'] if ckpt else init_from  # resumed: the reference is what the first run started from
    policy, tokenizer = open_model(init_from, ckpt, 'lm', tokenizer, None, lora_r, lora_alpha, 0.0, lora_targets)
    tok = get_tokenizer(tokenizer)
    if tok.vocab_size > policy.config.vocab_size:
        raise ValueError(f'tokenizer {tokenizer!r} has {tok.vocab_size} tokens, the model {policy.config.vocab_size}: give the tokenizer that belongs to it, --tokenizer=...')
    if tok.eot is None:
        raise ValueError(f'tokenizer {tokenizer!r} has no end token, so no answer could ever end: GRPO needs one that has')
    policy.config.dropout = 0.0  # dropout off everywhere: the ratio must be 1 before the first step
    policy = policy.to(device)
    use_adapter = bool(lora.adapted(policy))
    reference = parallel.shard(load_model(config['init_from'], device)[0].requires_grad_(False).eval(), mesh) if (beta or track_kl) and not use_adapter else None
    sources = []  # (name, weight, function or None, model, its tokenizer or None where the ids are the same)
    for name, w in zip(names, reward_w):
        if name.endswith('.py'):
            sources.append((name, w, load_reward(name), None, None))
        else:
            m, t = load_model(name, device, head='scalar')
            t = get_tokenizer(t)
            sources.append((name, w, None, m.requires_grad_(False).eval(), None if (t.spec, t.eot) == (tok.spec, tok.eot) else t))
    threads = pick_threads(threads, policy.num_params(), device)

    # ---- prompts -------------------------------------------------------------------------------------------------
    T = policy.config.block_size
    if max_new_tokens >= T:
        raise ValueError(f'max_new_tokens {max_new_tokens} leaves no room for a prompt in block_size {T}: lower it')
    rows, val_rows = load_dataset(dataset), load_dataset(val_dataset) if val_dataset else None
    if val_rows is None:
        parts = rows.train_test_split(0.05, seed)
        rows, val_rows = parts['train'], parts['test']
    room = min(max_prompt or T, T - max_new_tokens)
    rows, prompts = encode_prompts(rows, tok, room, dataset, long_prompts)
    val_rows, val_prompts = encode_prompts(val_rows, tok, room, val_dataset or dataset, long_prompts)
    need = batch_size // group_size  # prompts an iteration
    cursor = Sampler(len(prompts), need, seed)

    def jobs(k):
        """Prompts for rollout workers, endless, from number k on: (row number, row, prompt, how to sample), in the order and with the seeds of sync mode."""
        order = Sampler(len(prompts), need, seed)
        order.batch = k // need
        for picked in order:
            for i in picked[k % need:].tolist():
                yield i, rows[i], prompts[i], infer.SamplingParams(max_tokens=max_new_tokens, temperature=temperature, n=group_size, seed=(seed * 1000003 + k) % (1 << 31))
                k += 1

    # ---- optimizer, resume, memory plan --------------------------------------------------------------------------
    pw, pg, pm = training_bytes(policy, mesh)
    frozen = sum(p.nbytes for m in (reference, *(s[3] for s in sources)) if m is not None for p in m.parameters())
    base_memory, n_params, trains = memory_now(device) - training_bytes(policy)[0] - frozen, policy.num_params(), sum(p.numel() for _, p in lora.trainable(policy))
    sampler = copy.deepcopy(policy).to(amp_dtype).requires_grad_(False) if simulate_staleness else parallel.sampler_of(policy, mesh, amp_dtype, rollout_tp)  # shared with the engine where it can be
    policy = parallel.shard(policy, mesh)
    optimizer = parallel.Optimizer(policy, mesh, learning_rate, (beta1, beta2), adam_eps, weight_decay)
    start, best = 0, -float('inf')
    if ckpt:
        optimizer.load_state_dict(ckpt['optimizer'])
        mesh.set_rng_state(ckpt['rng'])
        cursor.load_state_dict(ckpt['data'])
        start, best = ckpt['iter'], ckpt['best']
    log = RunLog(out_dir, config, ckpt, mesh.master)
    longest = max(map(len, [*prompts, *val_prompts])) + max_new_tokens
    engine = infer.Engine(sampler, tok, max_num_seqs=max_num_seqs, max_len=longest)
    team, pool, past = tp if rollout_tp else 1, None, ckpt.get('past', []) if ckpt else []
    if mode == 'async' and not simulate_staleness and not eval_only:
        position = ckpt['data'].get('position', ckpt['data']['batch'] * need) if ckpt else 0
        pool = Rollouts(copy.deepcopy(sampler).cpu().requires_grad_(False), tokenizer, tok.eot, jobs, need, max_staleness, rollout_workers,
                              [name for name, _, fn, *_ in sources if fn is not None], reward_workers, reward_timeout, reward_retries, runtime, position, device,
                              max_num_seqs=max_num_seqs, max_len=longest)
    if compile:
        policy.compile_blocks()
    sampler_bytes = 0 if sampler is getattr(policy, 'body', policy) else sum(p.nbytes for p in sampler.parameters())  # what the engine does not share
    tokens = min(max(micro_tokens, longest), minibatch_size * longest) // tp
    planned = memory_plan(dict(policy=pw, sampler=sampler_bytes, past=simulate_staleness * pw, frozen=frozen, grads=pg, adam=pm,
                               kv=kv_cache_bytes(engine.config, max_num_seqs * longest, amp_dtype.itemsize),
                               activations=activation_bytes(policy.config, tokens, longest), logits=K.logits_bytes(device, tokens, policy.config.vocab_size)))
    print(f'policy {n_params / 1e6:.2f} M parameters ({trains:,} trained), reward {reward}, reference: '
          f'{"adapter disabled" if use_adapter else "frozen copy" if reference is not None else "none"}, {device}{mesh.words()}, {amp_dtype}, {threads} threads, kernels: {K.which()}')

    # ---- the phases of an iteration ------------------------------------------------------------------------------
    def rollout(prompts, n, seeds):
        """n completions a prompt, prompt-major -> (responses [[int]], ended [bool], log-probs that the engine sampled with). Each rank (rollout_tp: each tp group) answers its share."""
        mine = mesh.mine(len(prompts), team)
        done = engine.generate(prompts[mine], [infer.SamplingParams(max_tokens=max_new_tokens, temperature=temperature, n=n, seed=int(s)) for s in seeds[mine]])
        ids, ended, logps = zip(*mesh.collect([(c.token_ids, c.finish_reason == 'stop', c.logprobs) for c in done], everyone=True, team=team))
        return list(ids), torch.tensor(ended), list(logps)

    def publish(it):
        """The weights before update `it` go to whoever samples for the loop; simulate_staleness: those of that many updates ago do."""
        if pool is not None:
            pool.publish(policy.state_dict(), it)
        elif simulate_staleness:
            past.append({k: v.clone() for k, v in policy.state_dict().items()})
            del past[:-simulate_staleness - 1]
            engine.load_weights(past[0])
        else:
            parallel.refresh(engine, policy)

    def next_batch(it, rounds):
        """(row numbers, responses, ended, log-probs sampled with, {reward file: (B,)} where already scored, age of each token in updates)."""
        if pool is None:
            picked = next(cursor).tolist()
            seeds = (seed * 1000003 + (it * (1 + dynamic_sampling) + rounds) * need + np.arange(need)) % (1 << 31)
            return picked, *rollout([prompts[i] for i in picked], group_size, seeds), {}, [min(it, simulate_staleness)]
        groups = pool.take(need)
        ids, logps, versions, ended = zip(*(a for g in groups for a in g.answers))
        scored = {name: torch.tensor([s for g in groups for s in g.scores[name]], dtype=torch.float32) for name in groups[0].scores}
        return [g.index for g in groups], list(ids), torch.tensor(ended), list(logps), scored, [it - v for vs in versions for v in vs]

    def score(rows, prompts, responses, ended, scored={}):
        """(total reward (B,) float32, {name: (B,)}): the weighted sum of all sources, and the length penalty if overlong = 'shape'. Each rank scores its share."""
        mine = mesh.mine(len(prompts))
        asked, plain = [tok.decode(p) for p in prompts[mine]], [tok.decode([t for t in r if t != tok.eot]) for r in responses[mine]]
        each = dict(scored)
        for name, _, fn, model, other_tok in sources:
            if name in each:
                continue
            if fn is not None:
                each[name] = score_with_files(fn, name, rows[mine], asked, plain)
                continue
            seqs = [p + r for p, r in zip(prompts[mine], responses[mine])]
            if other_tok is not None:  # another tokenizer: the text is read anew, ended answers get its end token
                seqs = [other_tok.encode(p + t) + [other_tok.eot] * e for p, t, e in zip(asked, plain, ended[mine].int().tolist())]
            with amp():
                each[name] = score_with_model(model, seqs, device, micro_tokens)
            if not each[name].isfinite().all():
                raise ValueError(f'reward model {name} returned {each[name][~each[name].isfinite()][0].item()}: its weights are broken; train it again')
        each = {name: torch.tensor(mesh.collect(s.tolist(), everyone=True), dtype=torch.float32) for name, s in each.items()}
        total = sum(w * each[name] for name, w, *_ in sources)
        if overlong == 'shape':
            total = total + overlong_penalty(torch.tensor([len(r) for r in responses]) + (~ended).long(), max_new_tokens + 1, overlong_cache)
        return total, each

    def micro_batches(picked, asked, responses):
        """Completions `picked` in groups of at most micro_tokens tokens -> [([completion], [(prompt, [answers])])]; neighbours share their
        prompt. Of several replicas each gets its share. Also: how many replicas do the same ones (see mesh.copies)."""
        units = []  # [tokens, prompt, completions]
        for i in picked:
            if units and units[-1][1] is asked[i] and units[-1][0] + len(responses[i]) <= micro_tokens:
                units[-1][0] += len(responses[i])
                units[-1][2].append(i)
            else:
                units.append([len(asked[i]) + len(responses[i]), asked[i], [i]])
        sizes = [u[0] for u in units]
        bins = mesh.deal(pack(sizes, max([micro_tokens, *sizes])), sizes) if units else []
        return [([i for u in bin for i in units[u][2]], [(units[u][1], [responses[i] for i in units[u][2]]) for u in bin]) for bin in bins], mesh.copies(len(units))

    def logps_of(model, picked, asked, responses):
        """Token log-probs (B, R) of the picked completions of a batch, without gradient; 0 elsewhere."""
        out = torch.zeros(len(responses), max(map(len, responses)), device=device)
        micros, _ = micro_batches(picked, asked, responses)
        with amp():
            found = parallel.evaluate(model, micros, lambda model, micro: answer_logps(model, micro[1], device, temperature)[0].float())
        for m, logp in mesh.collect([(m, logp) for (m, _), logp in zip(micros, found)]):
            out[m, :logp.shape[1]] = logp.to(device)
        return out

    def reference_logp(picked, asked, responses):
        if reference is not None:
            return logps_of(reference, picked, asked, responses)
        with lora.lora_disabled(policy):
            return logps_of(policy, picked, asked, responses)

    def evaluate(it):
        """Validation prompts answered eval_k times each, with fixed seeds: pass@1, pass@k, score, KL to the reference; samples are written."""
        n = min(eval_iters, len(val_prompts))
        parallel.refresh(engine, policy)
        responses, ended, _ = rollout(val_prompts[:n], eval_k, range(n))
        mine, asked = [r for r in val_rows[:n] for _ in range(eval_k)], [p for p in val_prompts[:n] for _ in range(eval_k)]
        total, each = score(mine, asked, responses, ended)
        out = dict(score=total.mean().item(), len=sum(map(len, responses)) / len(responses), ended=ended.float().mean().item())
        if sources[0][2] is not None:
            correct = each[names[0]] > 0.5
            out |= {f'pass@{k}': pass_at_k(correct, eval_k, k) for k in (1, eval_k)}
        if reference is not None or use_adapter:
            picked = list(range(0, len(asked), eval_k))  # one answer a prompt is enough for the KL
            out['kl'] = k3(logps_of(policy, picked, asked, responses), reference_logp(picked, asked, responses)).sum().item() / n
        with open(os.path.join(out_dir, 'samples.jsonl') if mesh.master else os.devnull, 'a') as f:
            for i in range(n * eval_k):
                f.write(json.dumps(dict(step=it, prompt=tok.decode(asked[i]), completion=tok.decode(responses[i]), score=total[i].item())) + '\n')
        return out, tok.decode(asked[0] + responses[0])

    # ---- loop ----------------------------------------------------------------------------------------------------
    on_policy, checked = grpo_epochs == 1 and minibatch_size == batch_size, start > 0
    for it in range(start, max_iters + 1):
        if (it % eval_interval == 0 or it == max_iters or eval_only) and not (ckpt and it == start and not eval_only):
            seen, sample = evaluate(it)
            print(f"step {it}: val score {seen['score']:.3f} | " + ' | '.join(f'{k} {v:.1%}' for k, v in seen.items() if k.startswith('pass'))
                  + (f" | kl {seen['kl']:.2f} nats/seq" if 'kl' in seen else '') + f" | len {seen['len']:.1f} tok | ended {seen['ended']:.0%} | {sample!r}")
            log.row(it, 'eval', **seen)
            if eval_only:
                break
            better, best = seen['score'] > best, max(best, seen['score'])
            data = cursor.state_dict()
            if pool is not None:  # prompts handed out ahead of the loop are not in it: they are sampled anew after a resume
                data |= dict(batch=-(-pool.position // need), position=pool.position)
            parallel.save_checkpoint(os.path.join(out_dir, 'ckpt.pt'), mesh, policy, optimizer, also=os.path.join(out_dir, 'ckpt_best.pt') if better else None,
                                     **checkpoint_keys(policy), config=config, tokenizer=tokenizer, iter=it, best=best, data=data,
                                     time=log.elapsed(), **(dict(past=past) if simulate_staleness else {}))
        if it == max_iters:
            break

        # ---- rollout and score: groups until enough of them are alive --------------------------------------------
        t0 = time.time()
        publish(it)
        alive, dead, all_scores, all_each, all_ages, all_rows, rounds = [], [], [], [], [], [], 0
        while rounds == 0 or (len(alive) < need and rounds <= dynamic_sampling):
            picked, responses, ended, sampled, scored, ages = next_batch(it, rounds)
            asked = [prompts[i] for i in picked for _ in range(group_size)]
            scores, each = score([rows[i] for i in picked for _ in range(group_size)], asked, responses, ended, scored)
            all_ages += ages
            all_rows += picked
            for g in range(0, len(asked), group_size):
                s = slice(g, g + group_size)
                (alive if scores[s].max() > scores[s].min() else dead).append((asked[s], responses[s], ended[s], sampled[s], scores[s]))
            all_scores.append(scores), all_each.append(each)
            rounds += 1
        asked, responses, ended, sampled, scores = zip(*(alive + dead)[:need])
        asked, responses, sampled = ([x for group in part for x in group] for part in (asked, responses, sampled))
        ended, scores, t_gen = torch.cat(ended), torch.cat(scores), time.time() - t0

        # ---- advantages and old log-probs ------------------------------------------------------------------------
        t1 = time.time()
        advantages = group_advantages(scores, group_size, advantage).to(device)
        resp, sampled = pad(responses)[1].to(device), pad(sampled, 0.0)[0].to(device)
        mask = resp & (ended[:, None].to(device) | (overlong != 'mask'))
        counts = ((mask.any(1) & (advantages != 0)) | (beta > 0)).tolist()  # a dead or masked row has no gradient: it is not computed
        picked = [i for i in range(batch_size) if counts[i]]
        old_logp = None if on_policy or not decoupled else logps_of(policy, picked, asked, responses)  # of the proximal policy
        ref_logp = reference_logp(picked, asked, responses) if beta else None

        # ---- update ----------------------------------------------------------------------------------------------
        lr = linear_lr(it, learning_rate, warmup_iters, max_iters)
        stats, steps = {}, 0
        for epoch in range(grpo_epochs):
            order = (torch.arange(need) if epoch == 0 else torch.randperm(need)).mul(group_size)[:, None].add(torch.arange(group_size)).flatten().tolist()
            for mb in (order[i:i + minibatch_size] for i in range(0, batch_size, minibatch_size)):
                live = [i for i in mb if counts[i]]
                if not live:
                    continue
                micros, copies = micro_batches(live, asked, responses)
                tokens = mask[live].sum().item() * copies
                denom = (mask[mb].sum() if loss_type in ('dapo', 'cispo') else len(mb)) * copies

                def loss_of(policy, micro):
                    """The share of some completions in the minibatch's loss and statistics."""
                    m, groups = micro
                    with amp():
                        logp, entropy, _ = answer_logps(policy, groups, device, temperature)
                    own, R = mask[m][:, :logp.shape[1]], logp.shape[1]
                    behaviour, old = sampled[m][:, :R], logp.detach() if old_logp is None else old_logp[m][:, :R]
                    weights, ts = tis_weights(old, behaviour, own, tis_cap or float('inf'))
                    loss, ps = grpo_loss(logp, old if decoupled else behaviour, advantages[m], own, None if ref_logp is None else ref_logp[m][:, :R], beta, clip_low, clip_high,
                                         loss_type, max_new_tokens, weights if tis_cap and decoupled else None, denom)
                    share = own.sum().item() / tokens
                    return loss, {k: x.item() if k.endswith('_max') else x.item() * share for k, x in dict(**ps, **ts, entropy=masked_mean(entropy, own)).items()}
                step_stats = parallel.forward_backward(policy, optimizer, micros, loss_of, summed=True)
                step_stats['pg'] = step_stats.pop('loss')
                check_finite(it, out_dir, pg=step_stats['pg'])
                norm = parallel.clip_and_step([optimizer], [lr], grad_clip)
                if not checked:
                    checked = True
                    print(f"first update: max |ratio - 1| = {step_stats['ratio_max']:.1e}, loss {step_stats['pg']:.1e}, gradient norm {norm:.2f}"
                          + (' (a loss of 0 is right: at ratio 1 it is a mean of advantages; its gradient is what trains)' if abs(step_stats['pg']) < 1e-3 else ''))
                    if step_stats['ratio_max'] > 1e-3 and decoupled:
                        raise ValueError(f"first update: |ratio - 1| is {step_stats['ratio_max']:.3g} before any step: old and new log-probs come from different computations; is dropout on?")
                steps += 1
                for k, x in {**step_stats, 'grad_norm': norm}.items():
                    stats[k] = max(stats.get(k, 0.0), x) if k.endswith('_max') else stats.get(k, 0.0) + x
        stats = {k: x if k.endswith('_max') else x / steps for k, x in stats.items()}

        # ---- log -------------------------------------------------------------------------------------------------
        dt, n, every = time.time() - t0, int(resp.sum()), torch.cat(all_scores)
        row = dict(score=every.mean(), score_std=every.std(), dead=len(dead) / (len(alive) + len(dead)), rounds=rounds, len=n / batch_size, ended=ended.float().mean(),
                   gen_s=t_gen, upd_s=time.time() - t1, tokens=n, tok_per_s=n / dt, completions_per_s=batch_size / dt, lr=lr, steps=steps,
                   **{dict(mismatch_mean='mismatch', kl='k3').get(k, k): v for k, v in stats.items()})
        if beta:
            row['kl'] = torch.where(resp, k3(sampled, ref_logp), 0.0).sum(1).mean()
        if len(names) > 1:
            row |= {f'score/{os.path.basename(name)}': torch.cat([e[name] for e in all_each]).mean() for name in names}
        if mode == 'async':
            row |= dict(staleness=sum(all_ages) / len(all_ages), staleness_max=max(all_ages), prompts=all_rows)
        if pool is not None:  # idle: the share of the time that the trainer waited for samples
            row |= dict(idle=t_gen / dt, dropped=pool.dropped, restarts=pool.restarts, position=pool.position)
        log.row(it, 'train', **row)
        print(f"iter {it}/{max_iters} | score {row['score']:.3f} | dead {row['dead']:.0%}" + (f" | kl {row['kl']:.2f} nats/seq" if beta else '')
              + (f" | pg {stats['pg']:.3f} | clip {stats['clip_frac']:.1%} | norm {stats['grad_norm']:.2f} | mismatch {stats['mismatch_mean']:.1e} max {stats['mismatch_max']:.1e}" if steps else ' | no group alive, no step')
              + (f" | staleness {row['staleness']:.1f}" if mode == 'async' else '') + (f" | idle {row['idle']:.0%} | dropped {pool.dropped}" if pool is not None else '')
              + f" | len {n / batch_size:.1f} tok | gen {t_gen:.1f}s upd {row['upd_s']:.1f}s | {n / dt:,.0f} tok/s | eta {eta((max_iters - it) * dt)}")

    # ---- end -----------------------------------------------------------------------------------------------------
    if pool is not None:
        pool.close()
    peak = memory_now(device, peak=True) - max(0, base_memory)
    print(f'done: best val score {best:.3f}, peak memory {peak / 1e9:.2f} GB (planned {planned / 1e9:.2f}), checkpoint in {out_dir}/ckpt.pt, samples in {out_dir}/samples.jsonl')
    mesh.close()
