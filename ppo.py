"""Proximal policy optimisation of a language model against a reward model, with a KL leash to where it started.

    maximise  E_{x ~ prompts, y ~ pi}[ r(x, y) ] - beta KL(pi || pi_ref)

PPO: Schulman et al. 2017 (1707.06347); for language models: Ziegler et al. 2019 (1909.08593), Stiennon et al. 2020
(2009.01325); the details as in lm-human-preference-details and "N+ implementation details" (2403.17031). One iteration:
  1. rollout: the policy answers batch_size prompts at `temperature`
  2. score: the reward model reads each answer at its end token; an answer without an end gets a fixed bad score
  3. log-probs under policy and reference at the SAME temperature; reward per token = -beta (logp - ref_logp), score on the last
  4. values, GAE on the response tokens only (eq. 16 of 1506.02438), advantages whitened over the batch
  5. ppo_epochs passes over minibatches: clipped policy loss (eq. 7) + vf_coef * clipped value loss, AdamW, lr linear to 0
  6. beta moves so that the KL meets target_kl (section 2.2 of 1909.08593), or stays fixed
--mode=async (AReaL, 2505.24298): step 1 runs ahead in processes of its own, at most max_staleness updates old; the loop is the same.
Changed from the papers: the value network is one of its own, started from the reward model (2009.01325) or the policy; padding is
removed before every matrix product.

    python ppo.py config/ppo_toy.py                              # CPU
    python ppo.py config/ppo_toy.py --mode=async                 # rollouts run ahead in a process of their own
    python ppo.py config/ppo_gpt2.py                             # one GPU
    torchrun --nproc_per_node=8 ppo.py config/ppo_gpt2.py --zero=1   # eight
    python ppo.py --init_from=out-sft --reward=my_reward.py --dataset=my_prompts.jsonl
"""
import copy
import json
import math
import os
import time

import torch

import kernels as K
import lora
import parallel
from dataset import load_dataset
from rollout import Answers, Rewards, means, minibatches, read_prompts, spread
from run import (RunLog, activation_bytes, check_finite, checkpoint_keys, eta, kv_cache_bytes, load_model, memory_now,
                 memory_plan, open_model, open_run, pick_device, pick_threads, training_bytes)
from tokenizer import get_tokenizer

# ---------------------------------------------------------------------------------------------------------------------
# I/O
out_dir = 'out-ppo'
init_from = 'out-sft' # 'resume' | HF name | HF directory | an out_dir: policy and reference start here
overwrite = False # start anew in an out_dir that already holds a run
eval_interval = 20 # >= 1: iterations between evaluations; a checkpoint is written at each
eval_iters = 64 # >= 0: validation prompts an evaluation answers
eval_only = False # evaluate once and stop
# data
dataset = 'data/toy/prompts_train.jsonl' # rows {"prompt", ...}; the whole row goes to a reward of your own
val_dataset = '' # '' keeps 5 % of dataset aside
tokenizer = '' # '' = the one of init_from
max_prompt = 0 # >= 0: tokens of a prompt at most; 0 = what max_new_tokens leaves of the context
long_prompts = 'error' # a prompt over that: 'error' | 'drop' | 'cut' (its beginning)
seed = 1337
# reward
reward = 'out-reward' # a reward model (out_dir, HF directory), or a Python file with reward(prompt, completion, row) -> float
missing_eos = 'score' # an answer without end token: 'score' = gets missing_eos_value | 'penalty' = it is added | 'none'
missing_eos_value = -1.0
value = 'auto' # the value network starts as: 'reward' = the reward model | 'policy' | 'auto' = the reward model if there is one
# algorithm
batch_size = 64 # >= 1: completions an iteration, over all processes
minibatch_size = 32 # >= 1: completions an optimizer step
micro_tokens = 8192 # >= 1: tokens a forward pass sees at most; the result is the same
ppo_epochs = 4 # >= 1: passes over each batch
max_new_tokens = 64 # >= 1: tokens an answer at most
temperature = 0.7 # > 0: of the samples, and of every log-prob
kl_kind = 'k1' # estimator in the reward: 'k1' | 'k2' | 'k3'
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
mode = 'sync' # 'sync': sample, then train | 'async': rollout workers sample while this process trains
max_staleness = 1 # >= 0: async: updates that a sample's weights may be behind at most; 0 = sync with workers
simulate_staleness = 0 # >= 0: async in one process, deterministic: each batch is sampled with the weights of so many updates ago; 0 = off
decoupled = True # async: the ratio is taken to the policy before the update, tis_cap's weight bridges from the sampler to that; False = naive: the ratio to the sampler
tis_cap = 2.0 # >= 0: async: that weight at most; 0 = off
rollout_workers = 1 # >= 1: async: processes that sample, an engine of max_num_seqs each, on one CPU thread or a share of the GPUs
reward_workers = 1 # >= 1: async: processes that run a reward file (a reward model scores in this process)
reward_timeout = 30.0 # > 0: async: seconds for one answer; a reward that hangs, raises, dies or is not finite is tried again
reward_retries = 2 # >= 0: async: so often; then the prompt is dropped, counted, and the next one takes its place
runtime = 'local' # async: 'local' | 'ray' | 'HOST:PORT' of python actors.py --head=True
# LoRA (2106.09685)
lora_r = 0 # >= 0: rank; 0 = train all weights; with an adapter the reference is the same model without it, for free
lora_alpha = 16.0 # > 0: the adapter is scaled by alpha / r
lora_targets = '' # HF module names, comma-separated; '' = c_attn, or q_proj,v_proj
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
dtype = 'auto' # of the matrix products: 'auto' | 'float32' | 'bfloat16'; weights and optimizer stay float32
compile = False # torch.compile of the blocks in updates; for CUDA: on the CPU torch.compile leaves oneDNN's products for slower ones
kernels = 'auto' # 'auto' | 'torch' | 'triton'
threads = 0 # >= 0: CPU threads; 0 = at most 2 for models under 5 M parameters, else torch's choice
# several processes: torchrun --nproc_per_node=N; N / (tp pp cp) data-parallel replicas share the batch
tp = 1 # >= 1: tensor parallel: heads and MLP columns shared out; they talk in every layer, so keep tp inside a node
pp = 1 # >= 1: pipeline stages of layers; wants several micro-batches an iteration
cp = 1 # >= 1: context parallel: the tokens of a micro-batch shared out, for long ones
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


def kl_estimate(logp, ref_logp, kind='k1'):
    """Per-token estimate of KL(pi || ref) from tokens sampled by pi; d = logp - ref_logp, any shape.
    k1 = d (unbiased, may be negative), k2 = d^2/2 (biased, low variance), k3 = exp(-d) - 1 + d (unbiased, never negative).
    Schulman, "Approximating KL divergence", 2020. d = 0.5 -> k1 0.5, k2 0.125, k3 0.1065."""
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
    """(x - mean) / sqrt(var + 1e-8) over True positions, biased variance; with shift_mean=False the mean is added back
    (rewards: only their scale changes). 0 where masked. [1, 3] all True -> [-1, 1]; shift_mean=False -> [1, 3]."""
    mean = masked_mean(x, mask)
    var = masked_mean((torch.where(mask, x, mean) - mean) ** 2, mask)
    out = (x - mean) * torch.rsqrt(var + 1e-8)
    return torch.where(mask, out if shift_mean else out + mean, 0.0)


def gae(rewards, values, mask, gamma, lam):
    """GAE, Schulman et al. 2015 (1506.02438) eq. 16: delta_t = r_t + gamma V_{t+1} - V_t, A_t = delta_t + gamma lam A_{t+1},
    the response ends after its last True position. rewards, values (B, R) float, mask (B, R) bool. Returns advantages and
    returns = advantages + values, (B, R), 0 where masked. ValueError on an empty row.
    R=3, r=[1,0,0], V=0, gamma=lam=1 -> A = [1,0,0]; r=[0,0,1] -> A = [1,1,1]."""
    if not bool(mask.any(1).all()):
        raise ValueError(f'gae: row {int((~mask.any(1)).nonzero()[0])} has no response token: drop empty responses before')
    rewards, values = torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0)
    advantages, last, next_value = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        last = torch.where(mask[:, t], delta + gamma * lam * last, 0.0)
        advantages[:, t], next_value = last, values[:, t]
    return advantages, torch.where(mask, advantages + values, 0.0)


def policy_loss(logp, old_logp, advantages, mask, clip, weights=None):
    """PPO's clipped surrogate, eq. 7: mean of max(-A ratio, -A clip(ratio, 1 - clip, 1 + clip)), ratio = exp(logp - old_logp).
    All (B, R). weights (B, R): importance correction between sampler and trainer (`tis_weights`), a factor of each token.
    Returns (loss, stats): clip_frac, approx_kl = mean (logp - old_logp)^2 / 2, ratio_max = largest |ratio - 1|.
    logp - old_logp = ln 2, A = 1, clip 0.2 -> loss -1.2, clip_frac 1."""
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


def tis_weights(logp, sampler_logp, mask, cap):
    """Truncated importance sampling: min(pi_trainer / pi_sampler, cap) per token, 1 where mask is False; all (B, R), no gradient.
    The sampler's kernels (paged, another dtype) are not the trainer's, and in async mode its weights are older, so the samples
    come from another policy. With pi_trainer = the policy before the update this is the decoupled objective of 2505.24298
    eq. 5: the weight leads from the policy that sampled to the one around which the loss clips. cap 0 = no bound.
    Returns (weights, stats): mismatch and mismatch_max, mean and largest |delta log p|, and tis_frac, the share that was cut.
    cap=2, delta = log 3 -> 2."""
    with torch.no_grad():
        delta = torch.where(mask, logp - sampler_logp, 0.0)
        n = mask.sum().clamp(min=1)
        weights, bound = delta.exp(), cap or math.inf
        stats = dict(mismatch=delta.abs().sum() / n, mismatch_max=delta.abs().max(), tis_frac=(weights > bound).sum() / n)
        return weights.clamp(max=bound), stats


def value_loss(values, old_values, returns, mask, clip):
    """0.5 mean max((V - R)^2, (V_clipped - R)^2), V_clipped within `clip` of old_values (clip 0: no clipping). All (B, R).
    Returns (loss, stats): vf_clip_frac, and the moments that explained_variance reads. V=1, old=0, R=0, clip=0.2 -> 0.5."""
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
    """1 - var(R - V) / var(R), 1 for perfect values, 0 for constant ones. stats: value_loss's moments, means over micro-batches,
    replicas, steps: a ratio of sums, so the cut does not matter (a mean of ratios would). var(R) = 4, var(R - V) = 1 -> 0.75."""
    rest, target = (stats[f'{name}_sq'] - stats[name] ** 2 for name in ('rest', 'target'))
    return 1 - rest / max(target, 1e-8)


def token_rewards(scores, logp, ref_logp, mask, beta, kind='k1'):
    """-beta * KL estimate at every response token, the score (B,) added at the last one -> (B, R), 0 where masked."""
    rewards = torch.where(mask, -beta * kl_estimate(logp, ref_logp, kind), 0.0)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    return rewards.index_put((torch.arange(len(scores), device=scores.device), last), scores, accumulate=True)


def end_rule(scores, ended, missing_eos, bad):
    """What an answer without end token gets, (B,): 'score': `bad` instead of its score; 'penalty': `bad` added to it; 'none': nothing.
    Without a rule stopping is not learned. scores [2, 3], ended [True, False], 'score', bad -1 -> [2, -1]."""
    if missing_eos == 'none':
        return scores
    return torch.where(ended, scores, bad if missing_eos == 'score' else scores + bad)


def adapt_beta(beta, kl, target, n, horizon):
    """Proportional controller, 1909.08593 section 2.2: beta * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon).
    0.15, KL 12, target 6, n 512, horizon 10000 -> 0.15154."""
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)


def linear_lr(it, peak, warmup, total):
    """Linear warm-up, then linear to 0 at iteration `total`."""
    return peak * min((it + 1) / (warmup + 1), max(0.0, (total - it) / max(1, total - warmup)))


# ---------------------------------------------------------------------------------------------------------------------
if __name__ == '__main__':
    # ---- process and models --------------------------------------------------------------------------------------
    config['stage'] = 'ppo'
    device, amp_dtype = pick_device(device, dtype)
    K.use(kernels)
    for key, given, known in (('long_prompts', long_prompts, ('error', 'drop', 'cut')), ('missing_eos', missing_eos, ('score', 'penalty', 'none')),
                              ('value', value, ('auto', 'reward', 'policy')), ('kl_kind', kl_kind, ('k1', 'k2', 'k3')), ('mode', mode, ('sync', 'async'))):
        if given not in known:
            raise ValueError(f'{key} {given!r}: expected one of {", ".join(known)}')
    if batch_size % minibatch_size:
        fits = [m for m in range(1, batch_size + 1) if batch_size % m == 0]
        raise ValueError(f'batch_size {batch_size} is not divisible by minibatch_size {minibatch_size}: set --minibatch_size to one of {fits}')
    if mode == 'sync' and simulate_staleness or simulate_staleness < 0:
        raise ValueError(f'simulate_staleness {simulate_staleness} with mode {mode!r}: a number of updates, with --mode=async')
    if temperature <= 0:
        raise ValueError(f'temperature {temperature}: sampling needs one above 0 (greedy samples carry no gradient information)')
    if target_kl and not beta:
        raise ValueError(f'beta 0 with target_kl {target_kl}: the controller multiplies beta, so it stays 0: start with --beta=0.05')
    parallel.accept('ppo', tp, pp, cp, compile, mode, '', rollout_tp)
    mesh = parallel.init(tp, pp, cp, zero, dist_timeout, device, seed, quiet=True)  # this process alone, or torchrun's
    device = mesh.device
    import types
    run = types.SimpleNamespace(mesh=mesh, device=device, amp=lambda: torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32))
    if not os.path.exists(dataset):
        raise ValueError(f'{dataset}: no such data; python {os.path.dirname(dataset) or "data/toy"}/prepare.py makes it (or name a file of your own)')
    ckpt = open_run(out_dir, init_from, overwrite, 'ppo', mesh)
    if init_from == 'scratch':
        raise ValueError('PPO starts from a model that can answer: --init_from=out-sft (made by python sft.py config/sft_toy.py), a name or a directory')
    config['init_from'] = ckpt['config']['init_from'] if ckpt else init_from  # resumed: the reference is what the first run started from
    policy, tokenizer = open_model(init_from, ckpt, 'lm', tokenizer, None, lora_r, lora_alpha, 0.0, lora_targets)
    tok = get_tokenizer(tokenizer)
    if tok.vocab_size > policy.config.vocab_size:
        raise ValueError(f'tokenizer {tokenizer!r} has {tok.vocab_size} tokens, the model {policy.config.vocab_size}: give the tokenizer that belongs to it, --tokenizer=...')
    if tok.eot is None:
        raise ValueError(f'tokenizer {tokenizer!r} has no end token, so no answer could ever end: PPO needs one that has')
    policy.config.dropout = 0.0  # dropout off everywhere: the ratio must be 1 before the first step
    policy = policy.to(device).eval()
    use_adapter = bool(lora.adapted(policy))
    reference = None if use_adapter else parallel.shard(load_model(config['init_from'], device)[0].requires_grad_(False).eval(), mesh)
    T = policy.config.block_size
    if max_new_tokens >= T:
        raise ValueError(f'max_new_tokens {max_new_tokens} leaves no room for a prompt in block_size {T}: lower it')
    rows, val_rows = load_dataset(dataset), load_dataset(val_dataset) if val_dataset else None
    if val_rows is None:
        parts = rows.train_test_split(0.05, seed)
        rows, val_rows = parts['train'], parts['test']
    room = min(max_prompt or T, T - max_new_tokens)
    rows, prompts = read_prompts(rows, tok, room, dataset, long_prompts)
    val_rows, val_prompts = read_prompts(val_rows, tok, room, val_dataset or dataset, long_prompts)
    longest = max(map(len, [*prompts, *val_prompts])) + max_new_tokens
    rewards = Rewards(run, reward, tok, longest, micro_tokens)
    same_ids = [name for name, (_, other) in rewards.models.items() if other is None]  # reward models that read the policy's tokens
    start_value = value if value != 'auto' else 'reward' if same_ids else 'policy'
    if start_value == 'reward' and not same_ids:
        raise ValueError(f'--value=reward needs a reward model that shares the tokenizer of the policy; {reward} does not: --value=policy')
    value_net = load_model(same_ids[0] if start_value == 'reward' else config['init_from'], device, head='scalar')[0]
    if start_value == 'policy':
        torch.nn.init.zeros_(value_net.score.weight)
    value_net.requires_grad_(True).eval()  # the ratio and the values know no dropout
    threads = pick_threads(threads, policy.num_params(), device)

    # ---- optimizer, resume, memory plan --------------------------------------------------------------------------
    if ckpt:
        value_net.load_state_dict(ckpt['value'])
    (pw, pg, pm), (vw, vg, vm) = (training_bytes(net, mesh) for net in (policy, value_net))
    rw, n_params = sum(p.nbytes for m in (reference, *(m for m, _ in rewards.models.values())) if m is not None for p in m.parameters()), policy.num_params()
    base_memory = memory_now(device) - training_bytes(policy)[0] - training_bytes(value_net)[0] - rw
    sampler = copy.deepcopy(policy).to(amp_dtype).requires_grad_(False) if simulate_staleness else parallel.sampler_of(policy, mesh, amp_dtype, rollout_tp)
    policy, value_net = parallel.shard(policy, mesh), parallel.shard(value_net, mesh)
    optimizer = parallel.Optimizer(policy, mesh, learning_rate, (beta1, beta2), adam_eps, weight_decay)
    value_optimizer = parallel.Optimizer(value_net, mesh, value_lr or learning_rate, (beta1, beta2), adam_eps, weight_decay)
    start, best = 0, -float('inf')
    answers = Answers(run, policy, reference, sampler, tok, rows, prompts, batch_size, 1, seed, max_new_tokens, temperature, max_num_seqs, micro_tokens,
                      longest, tp if rollout_tp else 1)
    given_beta = beta
    if ckpt:
        optimizer.load_state_dict(ckpt['optimizer'])
        value_optimizer.load_state_dict(ckpt['value_optimizer'])
        mesh.set_rng_state(ckpt['rng'])
        answers.load_state(ckpt['data'], ckpt.get('past', []))
        start, best = ckpt['iter'], ckpt['best']
        if beta == ckpt.get('given_beta', ckpt['config']['beta']):  # the same command: an adapted beta goes on where it was
            beta = ckpt['beta']
        else:
            best = -float('inf')
    if mode == 'async' and not eval_only:
        answers.run_ahead(tokenizer, list(rewards.files), simulate_staleness, max_staleness, rollout_workers, reward_workers,
                          reward_timeout, reward_retries, runtime)
    log = RunLog(out_dir, config, ckpt, mesh.master)
    if compile:
        policy.compile_blocks()
    sampler_bytes = 0 if sampler is getattr(policy, 'body', policy) else sum(p.nbytes for p in sampler.parameters())  # what the engine does not share
    tokens = min(max(micro_tokens, longest), minibatch_size * longest) // (tp * cp)
    planned = memory_plan(dict(policy=pw, value=vw, frozen=rw, sampler=sampler_bytes, past=simulate_staleness * pw, grads=pg + vg, adam=pm + vm,
                               kv=kv_cache_bytes(answers.engine.net.c, max_num_seqs * longest, amp_dtype.itemsize),
                               activations=activation_bytes(policy.config, tokens, longest), logits=K.logits_bytes(device, tokens, policy.config.vocab_size)))
    print(f'policy {n_params / 1e6:.2f} M parameters, reward {reward}, value from {start_value}, reference: '
          f'{"adapter disabled" if use_adapter else "frozen copy"}, {device}{mesh.words()}, {amp_dtype}, {threads} threads, kernels: {K.which()}')

    # ---- the two losses of a micro-batch, b answers of r tokens at most; see 5. -----------------------------------
    def policy_part(policy, micro):
        logp, entropy = answers.logprobs(policy, micro)  # (b, r), with gradient
        loss, stats = policy_loss(logp, micro.old_logp, micro.advantages, micro.mask, clip, micro.weights)
        entropy = masked_mean(entropy, micro.mask)
        return loss - entropy_coef * entropy, dict(stats, pg=loss, entropy=entropy)

    def value_part(value_net, micro):
        loss, stats = value_loss(answers.values(value_net, micro), micro.values, micro.returns, micro.mask, vf_clip)
        return vf_coef * loss, dict(stats, vf=loss)

    def marks(batch):
        """The score of each answer, (B,), 2. of the docstring."""
        return end_rule(rewards(batch)[0], batch.ended, missing_eos, missing_eos_value).to(device)

    # ---- loop ----------------------------------------------------------------------------------------------------
    for it in range(start, max_iters + 1):
        # ---- evaluate and save; step 0 is the baseline. Held-out prompts, fixed seeds
        if (it % eval_interval == 0 or it == max_iters or eval_only) and not (ckpt and it == start and not eval_only):
            n = eval_iters or len(val_prompts)
            seen = answers.held_out(val_rows[:n], val_prompts[:n], 1)
            scores, whole = marks(seen), [list(range(len(seen)))]
            kl = (answers.all_logprobs(policy, seen, whole) - answers.reference_logprobs(seen, whole)).sum(1).mean().item()
            sample = tok.decode(seen.prompts[0] + seen.responses[0])
            found = dict(score=scores.mean().item(), score_std=spread(scores), kl=kl, len=seen.mask.sum(1).float().mean().item(), ended=seen.ended.float().mean().item())
            check_finite(it, out_dir, **found)
            print(f"step {it}: val score {found['score']:.3f} | kl {kl:.2f} nats/seq | len {found['len']:.1f} tok | ended {found['ended']:.0%} | {sample!r}")
            log.row(it, 'eval', **found, beta=beta)
            with open(os.path.join(out_dir, 'samples.jsonl') if mesh.master else os.devnull, 'a') as f:
                for p, r, s in zip(seen.prompts, seen.responses, scores.tolist()):
                    f.write(json.dumps(dict(step=it, prompt=tok.decode(p), completion=tok.decode(r), score=s)) + '\n')
            if eval_only:
                break
            objective = found['score'] - given_beta * kl
            better, best = objective > best, max(best, objective)
            parallel.save_checkpoint(os.path.join(out_dir, 'ckpt.pt'), mesh, policy, optimizer, value_net, value_optimizer,
                                     also=os.path.join(out_dir, 'ckpt_best.pt') if better else None, **checkpoint_keys(policy),
                                     value_kind=start_value, config=config, tokenizer=tokenizer, iter=it, best=best, beta=beta, given_beta=given_beta, data=answers.state(),
                                     time=log.elapsed(), **(dict(past=answers.past) if simulate_staleness else {}))
        if it == max_iters:
            break

        # ---- 1. rollout: B answers, with the log-probs the sampler had for their tokens; R tokens the longest
        t0 = time.time()
        batch = answers.next(it)
        gen_s = time.time() - t0

        # ---- 2. score, (B,)
        batch.scores = marks(batch)

        # ---- 3. log-probs at the sampling temperature, reward per token, all (B, R)
        passes = [rows for epoch in range(ppo_epochs) for rows in minibatches(batch_size, minibatch_size, seed, it, epoch)]
        first = passes[:batch_size // minibatch_size]  # cut as the first epoch will cut them: its ratios are 1 to the bit
        batch.old_logp = answers.all_logprobs(policy, batch, first)
        batch.ref_logp = answers.reference_logprobs(batch, first)
        token_reward = token_rewards(batch.scores, batch.old_logp, batch.ref_logp, batch.mask, beta, kl_kind)
        if whiten_rewards:
            token_reward = whiten(token_reward, batch.mask, shift_mean=False)

        # ---- 4. values, advantages
        batch.values = answers.all_values(value_net, batch, first)
        batch.advantages, batch.returns = gae(token_reward, batch.values, batch.mask, gamma, lam)
        if whiten_advantages:
            batch.advantages = whiten(batch.advantages, batch.mask)
        weights, mismatch = tis_weights(batch.old_logp, batch.sampled, batch.mask, tis_cap)
        sampled_logp = batch.old_logp if mode == 'sync' else batch.sampled
        kl = (sampled_logp - batch.ref_logp).sum(1).mean().item()  # of the policy that sampled; the GPU is waited for
        if mode == 'async' and decoupled and tis_cap:
            batch.weights = weights
        elif mode == 'async' and not decoupled:
            batch.old_logp = batch.sampled  # naive: the ratio is taken to the sampler itself

        # ---- 5. the update
        t1, steps = time.time(), []
        lr, v_lr = (linear_lr(it, peak, 0, max_iters) for peak in (learning_rate, value_lr or learning_rate))
        for rows in passes:
            micros, _ = answers.micro_batches(batch, rows)
            micros = [batch[micro] for micro in micros]
            tokens = [sum(map(len, micro.responses)) for micro in micros]  # what each one counts
            # loss.backward() on each micro-batch; two networks: one's activations are gone before the other's come
            stats = parallel.forward_backward(policy, optimizer, micros, policy_part, tokens)
            stats |= parallel.forward_backward(value_net, value_optimizer, micros, value_part, tokens)
            check_finite(it, out_dir, pg=stats['pg'], vf=stats['vf'])
            # all-reduce over the ranks, clip by ONE norm over both networks, AdamW
            stats['grad_norm'] = parallel.clip_and_step([optimizer, value_optimizer], [lr, v_lr], grad_clip)
            if it == len(steps) == 0:  # the invariant of every correct PPO: before the first step nothing has moved
                print(f"first update: max |ratio - 1| = {stats['ratio_max']:.1e}, approx KL = {stats['approx_kl']:.1e} (both are 0 when rollout and update agree)")
                if stats['ratio_max'] > 1e-3 and decoupled:
                    raise ValueError(f"first update: |ratio - 1| is {stats['ratio_max']:.3g} before any step: old and new log-probs come from different computations; is dropout on?")
            steps.append(stats)
            if kl_stop and stats['approx_kl'] > kl_stop:
                break

        # ---- 6. beta follows the KL
        used_beta = beta
        if target_kl:
            beta = adapt_beta(beta, kl, target_kl, batch_size, kl_horizon)

        # ---- log
        stats, dt, n = means(steps), time.time() - t0, sum(map(len, batch.responses))
        row = dict(score=batch.scores.mean(), score_std=spread(batch.scores), kl=kl, beta=beta, len=n / batch_size, ended=batch.ended.float().mean(),
                   value_mean=masked_mean(batch.values, batch.mask), explained=explained_variance(stats), gen_s=gen_s, upd_s=time.time() - t1, tokens=n, tok_per_s=n / dt, lr=lr,
                   steps=len(steps), **mismatch)
        row |= {k: x for k, x in stats.items() if k not in ('loss', 'rest', 'rest_sq', 'target', 'target_sq')}
        if mode == 'async':
            row |= answers.report(batch, gen_s / dt)
        log.row(it, 'train', **row)
        print(f"iter {it}/{max_iters} | score {row['score']:.2f} | kl {kl:.2f} nats/seq | pg {stats['pg']:.3f} | vf {stats['vf']:.3f} | clip {stats['clip_frac']:.1%} | "
              + (f"staleness {row['staleness']:.1f} | " if mode == 'async' else '') + (f"idle {row['idle']:.0%} | dropped {row['dropped']} | " if 'idle' in row else '')
              + f"len {n / batch_size:.1f} tok | gen {gen_s:.1f}s upd {row['upd_s']:.1f}s | {n / dt:,.0f} tok/s | eta {eta((max_iters - it) * dt)}")

    # ---- end -----------------------------------------------------------------------------------------------------
    answers.close()
    peak = memory_now(device, peak=True) - max(0, base_memory)
    print(f'done: best score - beta kl {best:.3f}, peak memory {peak / 1e9:.2f} GB (planned {planned / 1e9:.2f}), checkpoint in {out_dir}/ckpt.pt, samples in {out_dir}/samples.jsonl')
    mesh.close()
