"""Proximal policy optimisation of a language model against a reward model, on a KL leash to where it started.

    maximise  E_{x ~ prompts, y ~ pi}[ r(x, y) ] - beta KL(pi || pi_ref)

PPO: Schulman et al. 2017 (1707.06347); for language models: Ziegler et al. 2019 (1909.08593), Stiennon et al.
2020 (2009.01325); details as in lm-human-preference-details and "N+ implementation details" (2403.17031). One
iteration:
  1. rollout: the policy answers batch_size prompts at `temperature`
  2. score: the reward model reads each answer at its end token; an answer without one gets a fixed bad score
  3. log-probs under policy and reference at the SAME temperature; the reward of a token is
     -beta (logp - ref_logp), and the score comes on top at the last one
  4. values, GAE on the response tokens only (eq. 16 of 1506.02438), advantages whitened over the batch
  5. ppo_epochs passes over minibatches: clipped policy loss (eq. 7) + vf_coef * clipped value loss, AdamW,
     learning rate linear to 0
  6. beta moves so that the KL meets target_kl (section 2.2 of 1909.08593), or stays fixed
--mode=async (AReaL, 2505.24298): step 1 runs ahead in other processes, at most max_staleness updates old.
Changed from the papers: the value network is one of its own, started from the reward model (2009.01325) or
the policy; padding is removed before every matrix product.

    python ppo.py config/ppo_toy.py                              # CPU
    python ppo.py config/ppo_toy.py --mode=async                 # the rollouts in a process of their own
    python ppo.py config/ppo_gpt2.py                             # one GPU
    torchrun --nproc_per_node=8 ppo.py config/ppo_gpt2.py --zero=1   # eight
    python ppo.py --init_from=out-sft --reward=my_reward.py --dataset=my_prompts.jsonl
"""
import math
import os
import time

os.environ.setdefault('GOMP_SPINCOUNT', '2000') # idle CPU threads soon sleep: python bench.py neighbour
import torch

import parallel
from rollout import Answers, load_prompts, means, minibatches, overview, Rewards
from run import check_finite, load_model, Run

# -----------------------------------------------------------------------------------------------------------
# I/O
out_dir = 'out-ppo'
init_from = 'out-sft' # 'resume' | HF name | HF or PEFT directory | an out_dir: policy and reference
overwrite = False # replace the run that out_dir already holds
eval_interval = 20 # >= 1: iterations between evaluations; a checkpoint is written at each
eval_iters = 64 # >= 0: held-out prompts an evaluation answers; 0 = all
eval_only = False # evaluate once and stop
save_minutes = 5.0 # >= 0: minutes between checkpoints besides those of evaluations; 0 = evaluations only
log_to = '' # also 'tensorboard', 'wandb' or FILE.py with log(step, split, metrics), by comma
# data
dataset = 'data/toy/prompts_train.jsonl' # rows {"prompt", ...}; the whole row goes to a reward file
val_dataset = '' # '' keeps 5 % of dataset aside
tokenizer = '' # '' = the one of init_from
max_prompt = 0 # >= 0: tokens of a prompt at most; 0 = what max_new_tokens leaves of the context
long_prompts = 'error' # one of 'error', 'drop', 'cut': a prompt over that; 'cut' = it loses its beginning
seed = 1337 # in [0, 2147483648): of order, samples, new weights, dropout
# reward
reward = 'out-reward' # a reward model, or a file with reward(prompt, completion, row) -> float
missing_eos = 'score' # one of 'score', 'penalty', 'none': see end_rule
missing_eos_value = -1.0 # its bad score
value = 'auto' # one of 'auto', 'reward', 'policy': how the value network starts; auto: reward if it can
# algorithm
batch_size = 64 # >= 1: completions an iteration, over all processes
minibatch_size = 32 # >= 1: completions an optimizer step
micro_tokens = 8192 # >= 1: tokens a forward pass sees at most; smaller saves memory, the result is the same
ppo_epochs = 4 # >= 1: passes over each batch
max_new_tokens = 64 # >= 1: tokens an answer at most
temperature = 0.7 # > 0: of the samples, and of every log-prob
kl_kind = 'k1' # one of 'k1', 'k2', 'k3': estimator of the KL in the reward
beta = 0.05 # >= 0: weight of the KL; the start value when target_kl > 0
target_kl = 0.0 # >= 0: nats a sequence; 0 = beta stays fixed
kl_horizon = 10000 # >= 1: completions over which beta adapts
gamma = 1.0 # in [0, 1]: discount
lam = 0.95 # in [0, 1]: of GAE: 1 = Monte Carlo, 0 = one step
clip = 0.2 # > 0: of the ratio
vf_clip = 0.2 # >= 0: of the value's step; 0 = off
vf_coef = 0.1 # >= 0: weight of the value loss
whiten_rewards = False # scale the per-token rewards to unit variance, mean kept
whiten_advantages = True # over the whole batch
entropy_coef = 0.0 # >= 0: weight of the entropy bonus
kl_stop = 0.0 # >= 0: end an update's passes when its approximate KL exceeds this; 0 = off
# asynchronous rollouts (2505.24298)
mode = 'sync' # one of 'sync', 'async': sample, then train; or workers sample while this process trains
max_staleness = 1 # >= 0: async: updates that a sample's weights may be behind at most; 0 = sync with workers
simulate_staleness = 0 # >= 0: async in one process: batches sampled with the weights of n updates ago
decoupled = True # the ratio to the policy before the update, weighted by tis_cap; False: to the sampler
tis_cap = 2.0 # >= 0: bound of the importance weight between sampler and trainer; 0 = off
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
learning_rate = 1e-5 # >= 0: linear to 0
value_lr = 0.0 # >= 0: of the value network; 0 = learning_rate
weight_decay = 0.0 # >= 0: AdamW's, of matrices only
beta1 = 0.9 # in [0, 1): decay of Adam's first moment
beta2 = 0.999 # in [0, 1): decay of Adam's second moment
adam_eps = 1e-5 # > 0: large on purpose: small first steps [lm-human-preferences]
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
cp = 1 # >= 1: context parallel: the tokens of a micro-batch shared out, for long ones
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


def kl_estimate(logp, ref_logp, kind='k1'):
    """Per-token estimate of KL(pi || ref) from tokens sampled by pi; d = logp - ref_logp, any shape. k1 = d
    (unbiased, may be negative), k2 = d^2/2 (biased, low variance), k3 = exp(-d) - 1 + d (unbiased, never
    negative). Schulman, "Approximating KL divergence", 2020. d = 0.5 -> k1 0.5, k2 0.125, k3 0.1065."""
    d = logp - ref_logp
    if kind == 'k1':
        return d
    if kind == 'k2':
        return 0.5 * d * d
    if kind == 'k3':
        return torch.exp(-d) - 1 + d
    raise ValueError(f"kl_kind {kind!r}: expected 'k1', 'k2' or 'k3'")


def masked_mean(x, mask):
    """Mean of x over True positions, 0 for none. x, mask same shape. [1, 9], [True, False] -> 1.0."""
    return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)


def whiten(x, mask, shift_mean=True):
    """(x - mean) / sqrt(var + 1e-8) over True positions, biased variance; with shift_mean=False the mean is
    added back (rewards: only their scale changes). 0 where masked. [1, 3] all True -> [-1, 1];
    shift_mean=False -> [1, 3]."""
    mean = masked_mean(x, mask)
    var = masked_mean((torch.where(mask, x, mean) - mean) ** 2, mask)
    out = (x - mean) * torch.rsqrt(var + 1e-8)
    return torch.where(mask, out if shift_mean else out + mean, 0.0)


def gae(rewards, values, mask, gamma, lam):
    """GAE, Schulman et al. 2015 (1506.02438) eq. 16: delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t +
    gamma lam A_{t+1}, the response ends after its last True position. rewards, values (B, R) float, mask
    (B, R) bool. Returns advantages and returns = advantages + values, (B, R), 0 where masked. ValueError on
    an empty row. R=3, r=[1,0,0], V=0, gamma=lam=1 -> A = [1,0,0]; r=[0,0,1] -> A = [1,1,1]."""
    if not bool(mask.any(1).all()):
        row = int((~mask.any(1)).nonzero()[0])
        raise ValueError(f'gae: row {row} has no response token: drop empty responses before')
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    last = next_value = torch.zeros_like(rewards[:, 0])  # behind the end: V = 0
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        last = torch.where(mask[:, t], delta + gamma * lam * last, 0.0)
        advantages[:, t], next_value = last, values[:, t]
    return advantages, torch.where(mask, advantages + values, 0.0)


def policy_loss(logp, old_logp, advantages, mask, clip, weights=None):
    """PPO's clipped surrogate, eq. 7: mean of max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), ratio =
    exp(logp - old_logp). All (B, R). weights (B, R): importance correction between sampler and trainer
    (`tis_weights`), a factor of each token. Returns (loss, stats): clip_frac, approx_kl = mean (logp -
    old_logp)^2 / 2, ratio_max = largest |ratio - 1|. logp - old_logp = ln 2, A = 1, clip 0.2 -> loss -1.2,
    clip_frac 1."""
    if weights is not None:
        advantages = advantages * weights
    log_ratio = torch.where(mask, logp - old_logp, 0.0)
    ratio, advantages = log_ratio.exp(), torch.where(mask, advantages, 0.0)
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        stats = dict(clip_frac=masked_mean((clipped > plain).float(), mask),
                     approx_kl=0.5 * masked_mean(log_ratio * log_ratio, mask),
                     ratio_max=(ratio - 1).abs().max())
    return masked_mean(torch.maximum(plain, clipped), mask), stats


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


def value_loss(values, old_values, returns, mask, clip):
    """0.5 mean max((V - R)^2, (V_clipped - R)^2), V_clipped within `clip` of old_values (clip 0: no
    clipping). All (B, R). Returns (loss, stats): vf_clip_frac, and the moments that explained_variance
    reads. V=1, old=0, R=0, clip=0.2 -> 0.5."""
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    plain = clipped = (values - returns) ** 2
    if clip:
        clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2
    with torch.no_grad():
        stats = dict(vf_clip_frac=masked_mean((clipped > plain).float(), mask),
                     rest=masked_mean(returns - values, mask), rest_sq=masked_mean(plain, mask),
                     target=masked_mean(returns, mask), target_sq=masked_mean(returns ** 2, mask))
    return 0.5 * masked_mean(torch.maximum(plain, clipped), mask), stats


def explained_variance(stats):
    """1 - var(R - V) / var(R), 1 for perfect values, 0 for constant ones. stats: value_loss's moments,
    means over micro-batches, replicas, steps: a ratio of sums, so the cut does not matter (a mean of ratios
    would). var(R) = 4, var(R - V) = 1 -> 0.75."""
    rest, target = (stats.pop(f'{name}_sq') - stats.pop(name) ** 2 for name in ('rest', 'target'))
    return 1 - rest / max(target, 1e-8)


def token_rewards(scores, logp, ref_logp, mask, beta, kind='k1'):
    """-beta * KL estimate at every response token, the score (B,) added at the last one -> (B, R), 0 where
    masked."""
    rewards = torch.where(mask, -beta * kl_estimate(logp, ref_logp, kind), 0.0)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    return rewards.index_put((torch.arange(len(scores), device=scores.device), last), scores, accumulate=True)


def end_rule(scores, ended, missing_eos, bad):
    """What an answer without end token gets, (B,): 'score': `bad` instead of its score; 'penalty': `bad`
    added to it; 'none': nothing. Without a rule stopping is not learned. scores [2, 3], ended [True,
    False], 'score', bad -1 -> [2, -1]."""
    if missing_eos == 'none':
        return scores
    return torch.where(ended, scores, bad if missing_eos == 'score' else scores + bad)


def adapt_beta(beta, kl, target, n, horizon):
    """Proportional controller, 1909.08593 section 2.2: beta * (1 + clip(kl / target - 1, -0.2, 0.2) * n /
    horizon). 0.15, KL 12, target 6, n 512, horizon 10000 -> 0.15154."""
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)


def linear_lr(it, peak, warmup, total):
    """Linear warm-up, then linear to 0 at iteration `total`."""
    return peak * min((it + 1) / (warmup + 1), max(0.0, (total - it) / max(1, total - warmup)))


# -----------------------------------------------------------------------------------------------------------
if __name__ == '__main__':
    # ---- setup. Run reads the rest of the keys: overwrite, val_dataset, eval_interval, save_minutes,
    # log_to, lora_r, lora_alpha, lora_targets, lora_rslora, lora_dora, weight_decay, beta1, beta2, compile,
    # checkpointing, threads, tp, pp, cp, zero, dist_timeout; rollout.py reads dataset, max_prompt,
    # long_prompts, max_new_tokens, max_num_seqs, rollout_tp, max_staleness, simulate_staleness,
    # rollout_workers, reward_workers, reward_timeout, reward_retries, runtime
    if batch_size % minibatch_size:
        fits = [m for m in range(1, batch_size + 1) if batch_size % m == 0]
        raise ValueError(f'batch_size {batch_size} is not divisible by minibatch_size {minibatch_size}: '
                         f'set --minibatch_size to one of {fits}')
    if target_kl and not beta:
        raise ValueError(f'beta 0 with target_kl {target_kl}: the controller multiplies beta, so 0 stays 0: '
                         'start with --beta=0.05')
    run = Run('ppo', config)
    policy, tok = run.model()
    train, val, longest = load_prompts(run, tok, policy.config.block_size)

    # four networks: policy and value learn, reference and reward model are frozen. No dropout anywhere: the
    # ratio is 1 before the first step. With an adapter the reference is the policy without it, for free
    reference = run.reference(policy, tok, longest)
    rewards = Rewards(run, tok, longest)
    if run.ckpt:
        kind = run.ckpt['value_kind']
        if value not in ('auto', kind) or kind == 'trunk':
            raise ValueError(f'value {value}: {out_dir} was started with {kind}, a resume cannot change it')
        value = kind
    if value == 'auto':
        value = 'reward' if rewards.same_ids else 'policy'
    if value == 'reward' and not rewards.same_ids:
        raise ValueError(f'value reward: it needs a reward model that shares the tokenizer of the policy, '
                         f'{reward} does not: --value=policy')
    run.extra['value_kind'] = value
    start = rewards.same_ids[0] if value == 'reward' else config['init_from']
    value_net, _ = load_model(start, run.device, head='scalar')
    if value == 'policy':
        torch.nn.init.zeros_(value_net.score.weight)  # the first values are 0
    if run.ckpt:
        value_net.load_state_dict(run.ckpt['value'])

    # the engine reads the policy's weights where they lie, so it comes before the model is cut to ranks
    answers = Answers(run, policy.eval(), tok, train, longest)
    policy, optimizer = run.trained(policy, learning_rate, adam_eps)
    value_net, value_optimizer = run.trained(value_net.eval(), value_lr or learning_rate, adam_eps, 'value')
    answers.start(policy, reference, rewards)
    given_beta = run.extra['given_beta'] = beta
    if run.ckpt:
        if beta == run.ckpt.get('given_beta', run.ckpt['config']['beta']):
            beta = run.ckpt['beta']  # the same command: an adapted beta goes on where it was
        else:
            run.best = None  # another beta: the marks so far cannot be compared
    config['beta'] = run.extra['beta'] = beta
    tokens = min(max(micro_tokens, longest), minibatch_size * longest)
    run.plan(tokens, longest, **answers.memory())

    # the two losses of a micro-batch (b answers, the longest of r tokens), see 5.
    def policy_part(policy, micro):
        logp, entropy, _ = answers.logprobs(policy, micro)  # (b, r), with gradient
        loss, stats = policy_loss(logp, micro.old_logp, micro.advantages, micro.mask, clip, micro.weights)
        entropy = masked_mean(entropy, micro.mask)
        return loss - entropy_coef * entropy, dict(stats, pg=loss, entropy=entropy)

    def value_part(value_net, micro):
        values, _ = answers.values(value_net, micro)  # (b, r)
        loss, stats = value_loss(values, micro.values, micro.returns, micro.mask, vf_clip)
        return vf_coef * loss, dict(stats, vf=loss)

    def marks(batch):
        scores, _ = rewards(batch)
        return end_rule(scores, batch.ended, missing_eos, missing_eos_value).to(run.device)

    for it in run.iterations(max_iters):
        # ---- evaluate and save; step 0 is the baseline. Held-out prompts, fixed seeds
        if run.due(it):
            seen = answers.held_out(val[:eval_iters or None])
            seen.scores, everything = marks(seen), [list(range(len(seen)))]
            old_logp = answers.all_logprobs(policy, seen, everything)
            kl = (old_logp - answers.reference_logprobs(seen, everything)).sum(1).mean().item()
            answers.write_samples(it, seen)
            found = dict(overview(seen), kl=kl, beta=beta)
            # the best is found under ONE beta, the given one: marks under an adapted one cannot be compared
            run.evaluated(it, found, found['score'] - given_beta * kl, 'score kl len ended')
        if it == max_iters or eval_only:
            break

        # ---- 1. rollout: B answers, the longest of R tokens, with the log-probs that the sampler had
        t0 = time.time()
        batch = answers.next(it)
        gen_s = time.time() - t0

        # ---- 2. score, (B,)
        batch.scores = marks(batch)

        # ---- 3. log-probs at the sampling temperature, reward per token, all (B, R)
        passes = [rows for epoch in range(ppo_epochs)
                  for rows in minibatches(batch_size, minibatch_size, seed, it, epoch)]
        first = passes[:batch_size // minibatch_size]  # cut as epoch 0 will: its ratios are 1 to the bit
        batch.old_logp = answers.all_logprobs(policy, batch, first)
        batch.ref_logp = answers.reference_logprobs(batch, first)
        shaped = token_rewards(batch.scores, batch.old_logp, batch.ref_logp, batch.mask, beta, kl_kind)
        if whiten_rewards:
            shaped = whiten(shaped, batch.mask, shift_mean=False)

        # ---- 4. values, advantages, (B, R)
        batch.values = answers.all_values(value_net, batch, first)
        batch.advantages, batch.returns = gae(shaped, batch.values, batch.mask, gamma, lam)
        if whiten_advantages:
            batch.advantages = whiten(batch.advantages, batch.mask)
        weights, mismatch = tis_weights(batch.old_logp, batch.sampled, batch.mask, tis_cap)
        kl = batch.old_logp - batch.ref_logp
        if mode == 'async':  # older weights have sampled
            kl = batch.sampled - batch.ref_logp
            if not decoupled:
                batch.old_logp = batch.sampled  # naive: the ratio is to the sampler itself
            elif tis_cap:
                batch.weights = weights
        kl = kl.sum(1).mean().item()  # nats a sequence; here the GPU is waited for

        # ---- 5. the update
        t1, steps = time.time(), []
        lr, v_lr = (linear_lr(it, peak, 0, max_iters) for peak in (learning_rate, value_lr or learning_rate))
        for rows in passes:
            micros, _ = answers.micro_batches(batch, rows)
            micros = [batch[micro] for micro in micros]
            tokens = [micro.tokens() for micro in micros]  # what each counts in the mean
            # loss.backward() on each micro-batch; one network's activations are gone before the other's come
            stats = parallel.forward_backward(policy, optimizer, micros, policy_part, tokens)
            stats |= parallel.forward_backward(value_net, value_optimizer, micros, value_part, tokens)
            del stats['loss']  # pg and vf are told apart
            check_finite(it, out_dir, pg=stats['pg'], vf=stats['vf'])
            # all-reduce over the ranks, clip by ONE norm over both networks, AdamW
            stats['grad_norm'] = parallel.clip_and_step([optimizer, value_optimizer], [lr, v_lr], grad_clip)
            if it == len(steps) == 0:  # the invariant of every correct PPO: nothing has moved yet
                print(f"first update: max |ratio - 1| = {stats['ratio_max']:.1e}, approx KL = "
                      f"{stats['approx_kl']:.1e} (both are 0 when rollout and update agree)")
                if stats['ratio_max'] > 1e-3 and decoupled:
                    raise ValueError(f"first update: |ratio - 1| is {stats['ratio_max']:.3g} before a step: "
                                     'old and new log-probs come from different computations; is dropout on?')
            steps.append(stats)
            if kl_stop and stats['approx_kl'] > kl_stop:
                break

        # ---- 6. beta follows the KL
        if target_kl:
            beta = adapt_beta(beta, kl, target_kl, batch_size, kl_horizon)
        config['beta'] = run.extra['beta'] = beta

        # ---- log
        stats = means(steps)
        explained = explained_variance(stats)
        idle = gen_s / (time.time() - t0)
        row = dict(overview(batch), kl=kl, beta=beta, value_mean=masked_mean(batch.values, batch.mask),
                   explained=explained, lr=lr, steps=len(steps), tokens=batch.tokens(),
                   gen_s=gen_s, upd_s=time.time() - t1, **mismatch, **stats, **answers.lag(batch, idle))
        run.log(it, row, 'score kl pg vf clip_frac staleness idle dropped len gen_s upd_s')

    # ---- end
    answers.close()
    best = '' if run.best is None else f'best score - beta kl {run.best:.3f}, '
    run.finish(f'{best}samples in {out_dir}/samples.jsonl')
