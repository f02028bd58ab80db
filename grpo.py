"""GRPO and its kin: PPO without a value network; the other answers to the same prompt are the baseline.

    A_i = (r_i - mean(r_1 .. r_G)) / std(r_1 .. r_G)

DeepSeekMath, Shao et al. 2024 (2402.03300), eq. 3; DeepSeek-R1 (2501.12948). One iteration:
  1. rollout: the policy answers batch_size / group_size prompts, group_size times each
  2. score: reward functions of your own (a Python file each, weighted), or reward models
  3. advantage of an answer = its reward against its group's; a group of equal rewards is dead, it teaches
     nothing (dynamic_sampling asks further prompts instead; what is dead is counted, but not computed)
  4. log-probs before the update and under the reference; the mismatch of trainer and sampler is in every log
     line, and tis_cap corrects for it
  5. clipped policy loss on every token of the answer, beta * k3 to the reference if beta > 0, AdamW, learning
     rate linear to 0
  6. evaluation: pass@1 and pass@k on held-out prompts, read by the same reward function from step 0 on
Variants are one key each: --advantage=dr_grpo, rloo or reinforce++; --loss_type=dr_grpo, dapo, gspo or cispo;
--teacher=NAME (on-policy distillation): what another model thinks of each token is its advantage.
--mode=async (AReaL, 2505.24298): step 1 runs ahead in other processes, at most max_staleness updates old.
Changed from the paper: beta is 0 by default (2503.20783, 2503.14476: verifiable rewards need no leash, and no
second model).

    python grpo.py config/grpo_toy.py                            # CPU: pass@1 68 -> 98 %, one seed
    python grpo.py config/grpo_toy.py --mode=async               # the rollouts in a process of their own
    python grpo.py config/grpo_qwen3_gsm8k.py                    # one GPU
    torchrun --nproc_per_node=8 grpo.py config/grpo_qwen3_gsm8k.py --zero=2   # eight
    python grpo.py --init_from=gpt2 --dataset=my.jsonl --reward=right.py,short.py --reward_weights=1,0.1
"""
import dataclasses
import math
import os
import time

os.environ.setdefault('GOMP_SPINCOUNT', '2000') # idle CPU threads soon sleep: python bench.py neighbour
import torch
import torch.nn.functional as F

import lora
import parallel
from rollout import Answers, Batch, load_prompts, means, minibatches, overview, Rewards
from run import check_finite, Run

# -----------------------------------------------------------------------------------------------------------
# I/O
out_dir = 'out-grpo'
init_from = 'out-sft' # 'resume' | HF name | HF or PEFT directory | an out_dir: policy and reference
overwrite = False # replace the run that out_dir already holds
eval_interval = 20 # >= 1: iterations between evaluations; a checkpoint is written at each
eval_iters = 64 # >= 0: held-out prompts an evaluation answers; 0 = all
eval_k = 4 # >= 1: answers to each of them: pass@1 and pass@eval_k
eval_only = False # evaluate once and stop
save_minutes = 5.0 # >= 0: minutes between checkpoints besides those of evaluations; 0 = evaluations only
log_to = '' # also 'tensorboard', 'wandb' or FILE.py with log(step, split, metrics), by comma
# data
dataset = 'data/toy/arith_train.jsonl' # rows {"prompt", ...}; the whole row goes to a reward file
val_dataset = '' # '' keeps 5 % of dataset aside
tokenizer = '' # '' = the one of init_from
max_prompt = 0 # >= 0: tokens of a prompt at most; 0 = what max_new_tokens leaves of the context
long_prompts = 'error' # one of 'error', 'drop', 'cut': a prompt over that; 'cut' = it loses its beginning
seed = 1337 # in [0, 2147483648): of order, samples, new weights, dropout
# reward
reward = 'data/toy/reward.py' # as in ppo.py, several by comma; the first says what is correct
reward_weights = '' # '1,0.2': one weight each; '' = 1 each
env = '' # FILE.py with a class Env: conversations of several turns, see rollout.load_env; '' = none
max_turns = 4 # >= 1: of the policy in a conversation; with env, max_new_tokens holds all turns and replies
overlong = 'none' # one of 'none', 'mask', 'shape': a cut-off answer is not trained on; overlong_penalty
overlong_cache = 16 # >= 0: tokens before max_new_tokens over which 'shape' falls from 0 to -1
# algorithm
batch_size = 64 # >= 1: completions an iteration, over all processes
group_size = 8 # >= 1: completions a prompt
minibatch_size = 64 # >= 1: completions an optimizer step; batch_size = on policy, no ratio to clip
micro_tokens = 8192 # >= 1: tokens a forward pass sees at most; smaller saves memory, the result is the same
grpo_epochs = 1 # >= 1: passes over each batch
max_new_tokens = 64 # >= 1: tokens an answer at most
temperature = 1.0 # > 0: of the samples, and of every log-prob
advantage = 'grpo' # one of 'grpo', 'dr_grpo', 'rloo', 'reinforce++': see group_advantages
loss_type = 'grpo' # one of 'grpo', 'dr_grpo', 'dapo', 'gspo', 'cispo': see grpo_loss
clip_low = 0.2 # >= 0: the ratio stays above 1 - clip_low; gspo wants 3e-4
clip_high = 0.2 # >= 0: and below 1 + clip_high; dapo 0.28, gspo 4e-4
beta = 0.0 # >= 0: weight of k3 to the reference; 0 = off
dynamic_sampling = 0 # >= 0: further rounds of prompts at most, to replace dead groups; 0 = off
entropy_coef = 0.0 # >= 0: bonus for the entropy of each token's distribution; 0 = off
teacher = '' # model whose log-prob minus ours is each token's advantage, instead of the rewards; '' = off
track_kl = True # KL to the reference at evaluations also when beta = 0 (costs the memory of a frozen copy)
# asynchronous rollouts (2505.24298)
mode = 'sync' # one of 'sync', 'async': sample, then train; or workers sample while this process trains
max_staleness = 1 # >= 0: async: updates that a sample's weights may be behind at most; 0 = sync with workers
simulate_staleness = 0 # >= 0: async in one process: batches sampled with the weights of n updates ago
decoupled = True # the ratio to the policy before the update, weighted by tis_cap; False: to the sampler
tis_cap = 2.0 # >= 0: bound of the importance weight between sampler and trainer; 0 = off
tis_mode = 'token' # one of 'token', 'sequence': a weight for each token | one for the whole answer
tis_rule = 'truncate' # one of 'truncate', 'mask': a weight over tis_cap is cut to it | becomes 0
rollout_workers = 1 # >= 1: async: processes that sample, each with an engine of its own
reward_workers = 1 # >= 0: processes that run the reward files; 0 = this one, without a time limit
reward_timeout = 30.0 # > 0: seconds for the answers to one prompt; then the reward is tried again
reward_retries = 2 # >= 0: times; then the prompt is dropped, and the next one takes its place
runtime = 'local' # async: 'local' | 'ray' | 'HOST:PORT' of python actors.py --head=True
# LoRA (2106.09685)
lora_r = 0 # >= 0: rank; 0 = train all weights
lora_alpha = 16.0 # > 0: the adapter is scaled by alpha / r
lora_targets = '' # HF module names by comma, 'all-linear', or a pattern; '' = c_attn, or q_proj,v_proj
lora_rslora = False # scale by alpha / sqrt(r) instead: a large r still learns (2312.03732)
lora_dora = False # also learn the length of each row of the weights (2402.09353)
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
dtype = 'auto' # 'auto' | 'float32' | 'bfloat16' | 'float16': of the matrix products; weights stay float32
compile = False # torch.compile of the blocks; for CUDA: on a CPU oneDNN's own products are faster
checkpointing = False # recompute each block in the backward: less memory, a third more time
kernels = 'auto' # 'auto' | 'torch' | 'triton'
threads = 0 # >= 0: CPU threads; 0 = at most 2 for models under 5 M parameters, else torch's choice
# several processes: torchrun --nproc_per_node=N; N / (tp pp cp) data-parallel replicas share the batch
tp = 1 # >= 1: tensor parallel: heads and MLP columns shared out; talks in every layer, so keep it in a node
pp = 1 # >= 1: pipeline stages of layers; wants several micro-batches an iteration
cp = 1 # >= 1: context parallel: not here, where the answers to a prompt share its tokens
zero = 0 # in [0, 3]: what the replicas share out: 0 nothing | 1 optimizer | 2 + gradients | 3 + weights
rollout_tp = False # with tp: a tp group answers together, each rank holds its part of the policy
dist_timeout = 120 # > 0: seconds that one rank waits for another; then the run ends and names it
# -----------------------------------------------------------------------------------------------------------
config_keys = [k for k, v in globals().items()
               if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
# overrides from the command line or a config file
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
config = {k: globals()[k] for k in config_keys} # will be useful for logging
# -----------------------------------------------------------------------------------------------------------
# the equations. (B, R) arrays: R response tokens, right-padded, mask (B, R) bool, True = counts. A masked
# position may hold any finite value; it changes neither results nor gradients.


ADVANTAGES = ('grpo', 'dr_grpo', 'rloo', 'reinforce++')
LOSSES = ('grpo', 'dr_grpo', 'dapo', 'gspo', 'cispo')
PER_TOKEN = ('dapo', 'cispo')  # their loss is a mean over tokens, the others' over completions


def group_advantages(rewards, group_size, kind='grpo'):
    """rewards (B,) float, prompt-major: row i belongs to prompt i // group_size. Returns (B,), every token
    of a completion shares it.
        grpo         (r - mean) / (std + 1e-4) within the group (2402.03300 section 4.1.2); the sample std,
                     n - 1, as TRL's
        dr_grpo      r - mean: without the std, easy and hard prompts weigh as their rewards do (2503.20783)
        rloo         r - mean of the OTHERS = G / (G - 1) (r - mean): an unbiased baseline (2402.14740)
        reinforce++  (r - mean) / (std + 1e-4) over the whole batch (2501.03262); the only one that means
                     something for G = 1
    A group whose rewards are all equal gets zeros (it is "dead"), and so does a group of one in the first
    three; never NaN. ValueError: unknown kind, B not a multiple of group_size. [1, 0], G=2: grpo +-0.7070,
    dr_grpo +-0.5, rloo +-1."""
    if kind not in ADVANTAGES:
        raise ValueError(f'advantage kind {kind!r} is unknown: one of {", ".join(ADVANTAGES)}')
    if group_size < 1 or len(rewards) % group_size:
        raise ValueError(f'{len(rewards)} rewards do not divide into groups of {group_size}: make the batch '
                         'a multiple of group_size')
    r = rewards.view(1, -1) if kind == 'reinforce++' else rewards.view(-1, group_size)
    n = r.shape[1]
    equal = r.amax(1, keepdim=True) == r.amin(1, keepdim=True)
    centred = torch.where(equal, 0.0, r - r.mean(1, keepdim=True))  # 0 exactly, whatever the mean rounds to
    if n == 1 or kind == 'dr_grpo':
        return centred.flatten()
    if kind == 'rloo':
        return (centred * n / (n - 1)).flatten()
    return (centred / (r.std(1, keepdim=True) + 1e-4)).flatten()


def step_advantages(scores, paid, group_size, kind='grpo'):
    """Process supervision (2402.03300 section 4.1.3): what is paid for a step is compared with all steps of
    the group, and a token has the sum over its own step and those that follow. scores (B,): what the answers
    are paid in all; paid (B, R): that part of it which is paid for steps, at their last tokens, NaN
    elsewhere; the rest counts with the last step. kind as above, rloo (the mean of the OTHER answers) has no
    meaning here. Returns (B, R). Steps paid [1, 0] and [0], G=2, dr_grpo: the mean is 1/3, so the tokens of
    the first answer have 2/3 - 1/3 = 1/3 and -1/3, those of the second -1/3."""
    if kind == 'rloo':
        raise ValueError('advantage rloo with a reward file that pays for steps: --advantage=dr_grpo')
    steps = ~paid.isnan()
    last = steps.long().cumsum(1).argmax(1, keepdim=True)
    rest = (scores - paid.nansum(1))[:, None]
    rewards = torch.where(steps, paid, 0.0).scatter_add(1, last, rest)
    groups = 1 if kind == 'reinforce++' else len(paid) // group_size
    r = rewards.view(groups, -1)
    own = steps.view(groups, -1)
    n = own.sum(1, keepdim=True)
    centred = torch.where(own, r - r.sum(1, keepdim=True) / n, 0.0)
    if kind != 'dr_grpo':
        deviation = centred.norm(dim=1, keepdim=True) / (n - 1).clamp(min=1).sqrt()
        centred = centred / (deviation + 1e-4)
    return centred.view(paid.shape).flip(1).cumsum(1).flip(1)


def k3(logp, ref_logp):
    """Schulman's estimate of KL(pi || ref) from tokens sampled by pi: exp(-d) - 1 + d, d = logp - ref_logp.
    Unbiased, never negative. d=0.5 -> 0.1065."""
    d = logp - ref_logp
    return torch.exp(-d) - 1 + d


def grpo_loss(logp, old_logp, advantages, mask, ref_logp=None, beta=0.0, clip_low=0.2, clip_high=0.2,
              loss_type='grpo', max_len=None, weights=None, denom=None, entropy=None, entropy_coef=0.0):
    """PPO's clipped surrogate with one advantage for a whole completion. logp, old_logp, ref_logp (B, R)
    float, advantages (B,), or (B, R) for one a token, mask (B, R) bool. r_t = pi / pi_old; per token
    -min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A) + beta * k3(pi, ref), then
        grpo     mean over a completion's tokens, mean over completions (2402.03300 eq. 3): long wrong
                 answers are punished less per token
        dr_grpo  sum over tokens / max_len, mean over completions: no length bias (2503.20783)
        dapo     mean over all tokens of the batch; use it with clip_high > clip_low (2503.14476 eq. 8)
        gspo     ONE ratio for the completion, exp(mean_t log r_t), clipped; mean over completions
                 (2507.18071 eq. 5)
        cispo    -clip(r_t) A logp with the weight held constant: a clipped token still learns; mean over
                 all tokens (2506.13585 eq. 4)
    weights (B, R): importance correction between sampler and trainer (`tis_weights`). entropy (B, R) of each
    token's distribution: entropy_coef times it is taken off the loss, averaged alike. denom: what to divide
    by instead of this batch's own count (tokens for dapo and cispo, else completions), so that the losses
    of micro-batches add up to the batch's. Returns (loss, stats); stats: clip_frac, clip_low_frac,
    clip_high_frac, approx_kl = mean(log r^2) / 2, ratio_max = largest |r - 1|, kl (k3, mean over tokens;
    with ref_logp). ValueError: unknown loss_type, dr_grpo without max_len. Worked: A=[1], logp = old_logp,
    mask all True -> loss -1 (for dr_grpo -R / max_len); clipping and k3 are zero."""
    if loss_type not in LOSSES:
        raise ValueError(f'loss_type {loss_type!r} is unknown: one of {", ".join(LOSSES)}')
    if loss_type == 'dr_grpo' and not max_len:
        raise ValueError('dr_grpo divides by the longest possible completion: give max_len')
    A = advantages if advantages.dim() == 2 else advantages[:, None]
    A = torch.where(mask, A, 0.0)
    n = mask.sum(1).clamp(min=1)
    logp = torch.where(mask, logp, 0.0)
    log_ratio = logp - torch.where(mask, old_logp, 0.0)
    if loss_type == 'gspo':
        log_ratio = (log_ratio.sum(1) / n)[:, None].expand_as(logp)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    per_token = -clipped.detach() * A * logp if loss_type == 'cispo' else -torch.min(ratio * A, clipped * A)
    if weights is not None:
        per_token = per_token * torch.where(mask, weights, 0.0)
    stats = {}
    tokens = mask.sum().clamp(min=1)
    if ref_logp is not None:
        kl = k3(logp, torch.where(mask, ref_logp, 0.0))
        stats['kl'] = kl.detach().sum() / tokens
        per_token = per_token + beta * kl if beta else per_token
    if entropy_coef:
        per_token = per_token - entropy_coef * torch.where(mask, entropy, 0.0)
    per_token = torch.where(mask, per_token, 0.0)
    if loss_type in PER_TOKEN:
        loss = per_token.sum() / (denom or tokens)
    else:
        loss = (per_token.sum(1) / (max_len if loss_type == 'dr_grpo' else n)).sum() / (denom or len(mask))
    with torch.no_grad():
        low = (ratio < 1 - clip_low) & mask
        high = (ratio > 1 + clip_high) & mask
        if loss_type != 'cispo':  # the minimum keeps the unclipped term where clipping would help
            low &= A < 0
            high &= A > 0
        stats.update(clip_frac=(low | high).sum() / tokens,
                     clip_low_frac=low.sum() / tokens, clip_high_frac=high.sum() / tokens,
                     approx_kl=(torch.where(mask, log_ratio, 0.0) ** 2).sum() / 2 / tokens,
                     ratio_max=torch.where(mask, ratio - 1, 0.0).abs().max())
    return loss, stats


def tis_weights(logp, sampler_logp, mask, cap, mode='token', rule='truncate'):
    """Importance sampling, bounded: pi_trainer / pi_sampler (B, R) of each token, or (mode 'sequence') of the
    whole answer at each of its tokens; over `cap` it is cut to it, or (rule 'mask') 0. No gradient. The
    sampler's kernels (paged, another dtype) are not the trainer's, and in async mode its weights are older,
    so the samples come from another policy. With pi_trainer = the policy before the update this is the
    decoupled objective of 2505.24298 eq. 5: the weight leads from the policy that sampled to the one around
    which the loss clips. cap 0 = no bound. Returns (weights, stats): mismatch and mismatch_max, mean and
    largest |delta log p| of a token, and tis_frac, the share of weights over the cap. cap=2, delta =
    [log 3, -log 2]: token [2, 0.5], masked [0, 0.5]; sequence [1.5, 1.5]."""
    with torch.no_grad():
        delta = torch.where(mask, logp - sampler_logp, 0.0)
        n = mask.sum().clamp(min=1)
        log_weights = delta.sum(1, keepdim=True).expand_as(delta) if mode == 'sequence' else delta
        weights, bound = torch.where(mask, log_weights, 0.0).exp(), cap or math.inf
        over = mask & (weights > bound)
        stats = dict(mismatch=delta.abs().sum() / n, mismatch_max=delta.abs().max(), tis_frac=over.sum() / n)
        return torch.where(over, 0.0 if rule == 'mask' else bound, weights), stats


def teacher_advantages(logp, teacher_logp, mask):
    """On-policy distillation (2306.13649): the advantage of each token is the teacher's log-prob minus our
    own of before the update, (B, R) -> (B, R), 0 where mask is False. Its expectation over our own samples is
    minus the reverse KL, token by token, and so is the policy gradient. logp log 1/2, teacher log 1/4 ->
    -0.6931."""
    return torch.where(mask, teacher_logp - logp, 0.0)


def overlong_penalty(lengths, max_len, cache):
    """DAPO eq. 13: 0 up to max_len - cache tokens, then a straight line down to -1 at max_len. lengths (B,)
    -> (B,) float. max_len=100, cache=20: lengths 80, 90, 100 -> 0, -0.5, -1."""
    return ((max_len - cache - lengths.float()) / max(cache, 1)).clamp(-1, 0)


def pass_at_k(correct, group_size, k):
    """The chance that at least one of k samples is right, without bias from group_size >= k of them (Chen
    et al. 2021, 2107.03374 eq. 1): 1 - C(n - c, k) / C(n, k), mean over prompts. correct (B,) bool,
    prompt-major. n=4, c=1: pass@1 = 0.25, pass@2 = 0.5, pass@4 = 1."""
    c = correct.view(-1, group_size).sum(1).tolist()
    return sum(1 - math.comb(group_size - x, k) / math.comb(group_size, k) for x in c) / len(c)


def masked_mean(x, mask):
    """Mean of x over True positions, 0 for none. x, mask same shape. [1, 9], [True, False] -> 1.0."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def linear_lr(it, peak, warmup, total):
    """Linear warm-up, then linear to 0 at iteration `total`."""
    return peak * min((it + 1) / (warmup + 1), max(0.0, (total - it) / max(1, total - warmup)))


# -----------------------------------------------------------------------------------------------------------
# dynamic sampling


def concatenate(batches):
    """One Batch of several, padded to the longest answer of all."""
    longest = max(batch.mask.shape[1] for batch in batches)

    def join(name):
        parts = [getattr(batch, name) for batch in batches]
        if isinstance(parts[0], list):
            return sum(parts, [])
        if not torch.is_tensor(parts[0]):
            return None
        empty = math.nan if name == 'paid' else 0
        return torch.cat([x if x.dim() == 1 else F.pad(x, (0, longest - x.shape[1]), value=empty)
                          for x in parts])
    return Batch(*(join(field.name) for field in dataclasses.fields(Batch)))


# -----------------------------------------------------------------------------------------------------------
if __name__ == '__main__':
    # ---- setup. Run reads the rest of the keys: init_from, overwrite, tokenizer, val_dataset,
    # eval_interval, save_minutes, log_to, lora_r, lora_alpha, lora_targets, lora_rslora, lora_dora,
    # weight_decay, beta1, beta2, compile, checkpointing, threads, tp, pp, cp, zero, dist_timeout;
    # rollout.py reads dataset, env, max_turns, max_prompt, long_prompts, reward_weights, temperature,
    # max_num_seqs, rollout_tp, max_staleness, simulate_staleness, rollout_workers, reward_workers,
    # reward_timeout, reward_retries, runtime
    if batch_size % minibatch_size or minibatch_size % group_size:
        fits = [m for m in range(group_size, batch_size + 1, group_size) if batch_size % m == 0]
        way = f'one of {fits}' if fits else f'a multiple of {group_size}, --batch_size to a multiple of that'
        raise ValueError(f'batch_size {batch_size}, minibatch_size {minibatch_size}, group_size {group_size}:'
                         f' each must divide the one before; set --minibatch_size to {way}')
    if teacher and dynamic_sampling:
        raise ValueError(f'dynamic_sampling {dynamic_sampling} replaces groups of equal rewards, and with a '
                         'teacher none is dead: --dynamic_sampling=0')
    if group_size == 1 and advantage != 'reinforce++' and not teacher:
        raise ValueError(f'group_size 1 with advantage {advantage!r}: a group of one has no baseline, every '
                         'advantage would be 0; --group_size=8, or --advantage=reinforce++')
    if batch_size == 1:
        raise ValueError('batch_size 1: one answer has nothing to be compared with, its advantage would be 0')
    run = Run('grpo', config)
    policy, tok = run.model()  # no dropout: the ratio is 1 before the first step
    train, val, longest = load_prompts(run, tok, policy.config.block_size)
    wanted = beta > 0 or track_kl
    reference = run.reference(policy, tok, longest) if wanted else None  # with an adapter: None, it is free
    compared = reference is not None or bool(lora.adapted(policy))
    teaching = run.reference(policy, tok, longest, teacher) if teacher else None
    rewards = Rewards(run, tok, longest)

    # the engine reads the policy's weights where they lie, so it comes before the model is cut to ranks
    answers = Answers(run, policy.eval(), tok, train, longest, group_size)
    policy, optimizer = run.trained(policy, learning_rate, adam_eps)
    answers.start(policy, reference, rewards)
    tokens = min(max(micro_tokens, longest), minibatch_size * longest)
    run.plan(tokens, longest, **answers.memory())

    def marks(batch):
        """2. of the docstring: (total (B,), {reward: (B,)}), the length penalty in the total."""
        total, each = rewards(batch)
        if overlong == 'shape':  # an answer that was cut off counts as one token longer than any that ended
            lengths = torch.tensor([len(r) for r in batch.responses]) + (~batch.ended).long()
            total = total + overlong_penalty(lengths, max_new_tokens + 1, overlong_cache)
        return total, each

    # the loss of a micro-batch (b answers, the longest of r tokens), see 5.
    surrogate = dict(beta=beta, clip_low=clip_low, clip_high=clip_high, loss_type=loss_type,
                     max_len=max_new_tokens, entropy_coef=entropy_coef)
    correction = dict(cap=tis_cap, mode=tis_mode, rule=tis_rule)

    def part(policy, item):
        """The share of some answers in the minibatch's loss and statistics."""
        micro, denom, share = item
        logp, entropy, _ = answers.logprobs(policy, micro)  # (b, r), with gradient
        before = logp.detach() if micro.old_logp is None else micro.old_logp  # the policy before the update
        weights, mismatch = tis_weights(before, micro.sampled, micro.mask, **correction)
        if not decoupled:
            before = micro.sampled  # naive: the ratio is to the sampler itself
        if not decoupled or not tis_cap:
            weights = None
        loss, stats = grpo_loss(logp, before, micro.advantages, micro.mask, micro.ref_logp, weights=weights,
                                denom=denom, entropy=entropy, **surrogate)
        stats |= dict(mismatch, entropy=masked_mean(entropy, micro.mask))
        return loss, {k: x if k.endswith('_max') else x * share for k, x in stats.items()}

    on_policy = grpo_epochs == 1 and minibatch_size == batch_size  # one step a batch
    need = batch_size // group_size  # groups an iteration
    for it in run.iterations(max_iters):
        # ---- 6. evaluate and save; step 0 is the baseline. Held-out prompts, fixed seeds
        if run.due(it):
            seen = answers.held_out(val[:eval_iters or None], eval_k)
            seen.scores, each = marks(seen)
            answers.write_samples(it, seen)
            found = overview(seen)
            if rewards.names[0].endswith('.py'):  # a file says what is correct
                correct = each[rewards.names[0]] > 0.5
                found |= {f'pass@{k}': pass_at_k(correct, eval_k, k) for k in (1, eval_k)}
            if compared:
                some = [list(range(0, len(seen), eval_k))]  # one answer a prompt is enough for the KL
                kl = k3(answers.all_logprobs(policy, seen, some), answers.reference_logprobs(seen, some))
                found['kl'] = kl[seen.mask].sum().item() / len(some[0])  # it is 0 for the others
            run.evaluated(it, found, found['score'], f'score pass@1 pass@{eval_k} kl len ended')
        if it == max_iters or eval_only:
            break

        # ---- 1. rollout   2. score: groups until enough of them are alive
        t0 = time.time()
        asked = []
        alive = torch.zeros(0)
        while not asked or alive.sum() < need and len(asked) <= dynamic_sampling:
            batch = answers.next(it, again=bool(asked))
            batch.scores, batch.given = marks(batch)
            asked.append(batch)
            everyone = concatenate(asked)
            grouped = everyone.scores.view(-1, group_size)
            alive = grouped.amax(1) > grouped.amin(1)  # (groups,)
        picked = torch.cat([alive.nonzero(), (~alive).nonzero()])[:need]  # (need, 1); the dead fill up
        batch = everyone[(picked * group_size + torch.arange(group_size)).flatten().tolist()]
        gen_s = time.time() - t0

        # ---- 3. advantages, (B,), or (B, R) where steps are paid for; what has no gradient is not computed
        t1 = time.time()
        credit = group_advantages(batch.scores, group_size, advantage)
        if batch.paid is not None:
            credit = step_advantages(batch.scores, batch.paid, group_size, advantage)
        batch.advantages = credit.to(run.device)
        if overlong == 'mask':
            batch.mask &= batch.ended[:, None].to(run.device)
        moves = batch.advantages.view(batch_size, -1).any(1) | bool(beta or entropy_coef or teacher)
        teaches = (batch.mask.any(1) & moves).tolist()
        sizes = batch.mask.sum(1).tolist()  # trained tokens; waits for the GPU

        # ---- 4. log-probs before the update and under the reference, (B, R)
        passes = [rows for epoch in range(grpo_epochs)
                  for rows in minibatches(batch_size, minibatch_size, seed, it, epoch, group_size)]
        first = passes[:batch_size // minibatch_size]  # cut as epoch 0 will: its ratios are 1 to the bit
        first = [[i for i in rows if teaches[i]] for rows in first]
        if decoupled and not on_policy:
            batch.old_logp = answers.all_logprobs(policy, batch, first)
        if beta:
            batch.ref_logp = answers.reference_logprobs(batch, first)
        if teacher:
            own = answers.all_logprobs(policy, batch, first) if batch.old_logp is None else batch.old_logp
            theirs = answers.all_logprobs(teaching, batch, first)
            batch.advantages = teacher_advantages(own, theirs, batch.mask)

        # ---- 5. the update
        lr = linear_lr(it, learning_rate, warmup_iters, max_iters)
        steps = []
        for rows in passes:
            live = [i for i in rows if teaches[i]]
            if not live:
                continue
            micros, copies = answers.micro_batches(batch, live)
            tokens = sum(sizes[i] for i in live) * copies
            # a mean over the whole minibatch: the dead count in what the loss is divided by
            denom = (sum(sizes[i] for i in rows) if loss_type in PER_TOKEN else len(rows)) * copies
            items = [(batch[micro], denom, sum(sizes[i] for i in micro) / tokens) for micro in micros]
            # loss.backward() on each micro-batch
            stats = parallel.forward_backward(policy, optimizer, items, part, summed=True)
            stats['pg'] = stats.pop('loss')
            check_finite(it, out_dir, pg=stats['pg'])
            # all-reduce over the ranks, clip, AdamW
            stats['grad_norm'] = parallel.clip_and_step([optimizer], [lr], grad_clip)
            if it == len(steps) == 0:
                print(f"first update: max |ratio - 1| = {stats['ratio_max']:.1e}, loss {stats['pg']:.1e} (a "
                      'loss of 0 is right: at ratio 1 it is a mean of advantages; its gradient trains)')
                if stats['ratio_max'] > 1e-3 and decoupled:
                    raise ValueError(f"first update: |ratio - 1| is {stats['ratio_max']:.3g} before a step: "
                                     'old and new log-probs come from different computations; is dropout on?')
            steps.append(stats)
        if not steps:
            print(f'iter {it}: no group alive, no step')

        # ---- log
        stats = means(steps)
        if 'kl' in stats:
            stats['k3'] = stats.pop('kl')  # nats a token, as trained; kl: nats a sequence, as it was sampled
            stats['kl'] = k3(batch.sampled, batch.ref_logp)[batch.mask].sum() / len(batch)
        if teacher:
            stats['teacher_kl'] = -batch.advantages.sum(1).mean()  # nats a sequence to the teacher, k1
        idle = gen_s / (time.time() - t0)
        row = dict(overview(batch), dead=1 - alive.float().mean().item(), rounds=len(asked), lr=lr,
                   steps=len(steps), tokens=batch.tokens(), gen_s=gen_s, upd_s=time.time() - t1, **stats,
                   **answers.lag(everyone, idle))
        whole = overview(everyone)
        row |= dict(score=whole['score'], score_std=whole['score_std'])  # of the dead, too
        if len(rewards.names) > 1:
            for name in rewards.names:
                scores = torch.cat([part.given[name] for part in asked])
                row[f'score/{os.path.basename(name)}'] = scores.mean()
        run.log(it, row, 'score dead kl teacher_kl pg clip_frac grad_norm mismatch mismatch_max staleness '
                         'idle dropped len gen_s upd_s')

    # ---- end
    answers.close()
    best = '' if run.best is None else f'best val score {run.best:.3f}, '
    run.finish(f'{best}samples in {out_dir}/samples.jsonl')
