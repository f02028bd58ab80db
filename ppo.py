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
Changed from the papers: the value network may be one of its own, started from the reward model (2009.01325) or a head on
the policy's trunk (1909.08593); padding is removed before every matrix product.

    python ppo.py config/ppo_toy.py                              # CPU
    python ppo.py config/ppo_toy.py --mode=async                 # rollouts run ahead in a process of their own
    python ppo.py config/ppo_gpt2.py                             # one GPU
    torchrun --nproc_per_node=8 ppo.py config/ppo_gpt2.py --zero=1   # eight
    python ppo.py --init_from=out-sft --reward=my_reward.py --dataset=my_prompts.jsonl
"""
import os
import math
import time
import json
import copy
import contextlib

import numpy as np
import torch
import torch.nn as nn

import infer
import kernels as K
import lora
import parallel
from dataset import Sampler, load_dataset, pack, pad
from tokenizer import encode_prompt, get_tokenizer
from run import (activation_bytes, check_finite, checkpoint_keys, eta, kv_cache_bytes, load_model, memory_now,
                 memory_plan, open_model, open_run, pick_device, pick_threads, RunLog, training_bytes)
from rollout import Rollouts, load_reward

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
value = 'auto' # value network: 'reward' = starts as the reward model | 'policy' = as the policy | 'trunk' = a head on the policy; auto: reward if there is one, else policy
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
    d = torch.where(mask, logp - old_logp, 0.0)
    advantages = advantages if weights is None else advantages * weights
    ratio, a = d.exp(), torch.where(mask, advantages, 0.0)
    plain, clipped = -a * ratio, -a * ratio.clamp(1 - clip, 1 + clip)
    with torch.no_grad():
        stats = dict(clip_frac=masked_mean((clipped > plain).float(), mask), approx_kl=0.5 * masked_mean(d * d, mask), ratio_max=(ratio - 1).abs().max())
    return masked_mean(torch.maximum(plain, clipped), mask), stats


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


def value_loss(values, old_values, returns, mask, clip):
    """0.5 mean max((V - R)^2, (V_clipped - R)^2), V_clipped within `clip` of old_values (clip 0: no clipping). All (B, R).
    Returns (loss, stats): vf_clip_frac, explained = 1 - var(R - V)/var(R). V=1, old=0, R=0, clip=0.2 -> 0.5."""
    values, old_values, returns = (torch.where(mask, x, 0.0) for x in (values, old_values, returns))
    plain = (values - returns) ** 2
    clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns) ** 2 if clip else plain
    with torch.no_grad():
        rest = returns - values
        var = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
        explained = 1 - masked_mean((rest - masked_mean(rest, mask)) ** 2, mask) / var.clamp(min=1e-8)
        stats = dict(vf_clip_frac=masked_mean((clipped > plain).float(), mask), explained=explained)
    return 0.5 * masked_mean(torch.maximum(plain, clipped), mask), stats


def token_rewards(scores, logp, ref_logp, mask, beta, kind='k1'):
    """-beta * KL estimate at every response token, the score (B,) added at the last one -> (B, R), 0 where masked."""
    rewards = torch.where(mask, -beta * kl_estimate(logp, ref_logp, kind), 0.0)
    last = mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    return rewards.index_put((torch.arange(len(scores), device=scores.device), last), scores, accumulate=True)


def adapt_beta(beta, kl, target, n, horizon):
    """Proportional controller, 1909.08593 section 2.2: beta * (1 + clip(kl / target - 1, -0.2, 0.2) * n / horizon).
    0.15, KL 12, target 6, n 512, horizon 10000 -> 0.15154."""
    return beta * (1 + min(max(kl / target - 1, -0.2), 0.2) * n / horizon)


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


def collate(prompts, responses):
    """Token lists -> idx (B, T) right-padded, mask (B, T), at (B, R): the position that PREDICTS response token j, P + j - 1
    (state once: the logits at t predict token t + 1), resp (B, R) bool. Prompt [5, 6], response [7] -> at [[1]]."""
    idx, mask = pad([p + r for p, r in zip(prompts, responses)])
    _, resp = pad(responses)
    at = torch.tensor([len(p) - 1 for p in prompts])[:, None] + torch.arange(resp.shape[1])
    return idx, mask, at.clamp(max=idx.shape[1] - 2), resp


def response_positions(mask, at, resp):
    """(B, T-1) bool: the positions `at` that predict a response token; the head is computed there and nowhere else."""
    return torch.zeros_like(mask[:, 1:], dtype=torch.int32).scatter_add(1, at, resp.int()) > 0


# ---------------------------------------------------------------------------------------------------------------------
if __name__ == '__main__':
    # ---- process and models --------------------------------------------------------------------------------------
    config['stage'] = 'ppo'
    device, amp_dtype = pick_device(device, dtype)
    amp = lambda: torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32)
    K.use(kernels)
    for key, given, known in (('long_prompts', long_prompts, ('error', 'drop', 'cut')), ('missing_eos', missing_eos, ('score', 'penalty', 'none')),
                              ('value', value, ('auto', 'reward', 'policy', 'trunk')), ('kl_kind', kl_kind, ('k1', 'k2', 'k3')), ('mode', mode, ('sync', 'async'))):
        if given not in known:
            raise ValueError(f'{key} {given!r}: expected one of {", ".join(known)}')
    if batch_size % minibatch_size:
        fits = [m for m in range(1, batch_size + 1) if batch_size % m == 0]
        raise ValueError(f'batch_size {batch_size} is not divisible by minibatch_size {minibatch_size}: set --minibatch_size to one of {fits}')
    if mode == 'sync' and simulate_staleness or simulate_staleness < 0:
        raise ValueError(f'simulate_staleness {simulate_staleness} with mode {mode!r}: a number of updates, with --mode=async')
    if temperature <= 0:
        raise ValueError(f'temperature {temperature}: sampling needs one above 0 (greedy samples carry no gradient information)')
    parallel.accept('ppo', tp, pp, cp, compile, mode, value, rollout_tp)
    mesh = parallel.init(tp, pp, cp, zero, dist_timeout, device, seed, quiet=True)  # this process alone, or torchrun's
    device = mesh.device
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
    policy = policy.to(device)
    use_adapter = bool(lora.adapted(policy))
    reference = None if use_adapter else parallel.shard(load_model(config['init_from'], device)[0].requires_grad_(False).eval(), mesh)  # eval: no dropout
    if reward.endswith('.py'):
        reward_fn, reward_model, reward_tok = load_reward(reward), None, None
    else:
        reward_model, reward_tok = load_model(reward, device, head='scalar')
        reward_model.requires_grad_(False).eval()
        reward_tok = get_tokenizer(reward_tok)
        if (reward_tok.spec, reward_tok.eot) == (tok.spec, tok.eot):
            reward_tok = None  # the same ids, nothing to re-encode
    start_value = value if value != 'auto' else 'reward' if reward_model is not None else 'policy'
    if start_value == 'trunk':
        value_net = nn.Linear(policy.config.n_embd, 1).to(device)
        nn.init.zeros_(value_net.weight)
        nn.init.zeros_(value_net.bias)
    elif start_value == 'reward':
        if reward_model is None or reward_tok is not None:
            raise ValueError(f'--value=reward needs a reward model that shares the tokenizer of the policy; {reward} does not: --value=policy')
        value_net = load_model(reward, device, head='scalar')[0]
    else:
        value_net = load_model(config['init_from'], device, head='scalar')[0]
        nn.init.zeros_(value_net.score.weight)
    value_net.requires_grad_(True).eval()  # the ratio and the values know no dropout
    policy.eval()
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
    cursor = Sampler(len(prompts), batch_size, seed)

    def jobs(k):
        """Prompts for rollout workers, endless, from number k on: (row number, row, prompt, how to sample), in the order and with the seeds of sync mode."""
        order = Sampler(len(prompts), batch_size, seed)
        order.batch = k // batch_size
        for picked in order:
            for i in picked[k % batch_size:].tolist():
                yield i, rows[i], prompts[i], infer.SamplingParams(max_tokens=max_new_tokens, temperature=temperature, seed=(seed * 1000003 + k) % (1 << 31))
                k += 1

    # ---- optimizer, resume, memory plan --------------------------------------------------------------------------
    if ckpt:
        value_net.load_state_dict(ckpt['value'])
    (pw, pg, pm), (vw, vg, vm) = (training_bytes(net, mesh if start_value != 'trunk' else None) for net in (policy, value_net))
    rw, n_params = sum(p.nbytes for m in (reference, reward_model) if m is not None for p in m.parameters()), policy.num_params()
    base_memory = memory_now(device) - training_bytes(policy)[0] - training_bytes(value_net)[0] - rw
    sampler = copy.deepcopy(policy).to(amp_dtype).requires_grad_(False) if simulate_staleness else parallel.sampler_of(policy, mesh, amp_dtype, rollout_tp)  # shared with the engine where it can be
    policy, value_net = parallel.shard(policy, mesh), parallel.shard(value_net, mesh)
    optimizer = parallel.Optimizer(policy, mesh, learning_rate, (beta1, beta2), adam_eps, weight_decay)
    value_optimizer = parallel.Optimizer(value_net, mesh, value_lr or learning_rate, (beta1, beta2), adam_eps, weight_decay)
    start, best = 0, -float('inf')
    if ckpt:
        optimizer.load_state_dict(ckpt['optimizer'])
        value_optimizer.load_state_dict(ckpt['value_optimizer'])
        mesh.set_rng_state(ckpt['rng'])
        cursor.load_state_dict(ckpt['data'])
        start, best, beta = ckpt['iter'], ckpt['best'], ckpt['beta']
    log = RunLog(out_dir, config, ckpt, mesh.master)
    longest = max(map(len, [*prompts, *val_prompts])) + max_new_tokens
    engine = infer.Engine(sampler, tok, max_num_seqs=max_num_seqs, max_len=longest)
    team, pool, past = tp if rollout_tp else 1, None, ckpt.get('past', []) if ckpt else []
    if mode == 'async' and not simulate_staleness and not eval_only:
        position = ckpt['data'].get('position', ckpt['data']['batch'] * batch_size) if ckpt else 0
        pool = Rollouts(copy.deepcopy(sampler).cpu().requires_grad_(False), tokenizer, tok.eot, jobs, batch_size, max_staleness, rollout_workers,
                              [reward] if reward_model is None else [], reward_workers, reward_timeout, reward_retries, runtime, position, device,
                              max_num_seqs=max_num_seqs, max_len=longest)
    if compile:
        policy.compile_blocks()
    sampler_bytes = 0 if sampler is getattr(policy, 'body', policy) else sum(p.nbytes for p in sampler.parameters())  # what the engine does not share
    tokens = min(max(micro_tokens, longest), minibatch_size * longest) // (tp * cp)
    planned = memory_plan(dict(policy=pw, value=vw, frozen=rw, sampler=sampler_bytes, past=simulate_staleness * pw, grads=pg + vg, adam=pm + vm,
                               kv=kv_cache_bytes(engine.config, max_num_seqs * longest, amp_dtype.itemsize),
                               activations=activation_bytes(policy.config, tokens, longest), logits=K.logits_bytes(device, tokens, policy.config.vocab_size)))
    print(f'policy {n_params / 1e6:.2f} M parameters, reward {reward}, value from {start_value}, reference: '
          f'{"adapter disabled" if use_adapter else "frozen copy"}, {device}{mesh.words()}, {amp_dtype}, {threads} threads, kernels: {K.which()}')

    # ---- the phases of an iteration ------------------------------------------------------------------------------
    def rollout(prompts, seeds):
        """One completion a prompt -> (responses [[int]], ended [bool], log-probs that the engine sampled with). Each rank (rollout_tp: each tp group) answers its share."""
        mine = mesh.mine(len(prompts), team)
        done = engine.generate(prompts[mine], [infer.SamplingParams(max_tokens=max_new_tokens, temperature=temperature, seed=int(s)) for s in seeds[mine]])
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

    def next_batch(it):
        """(row numbers, responses, ended, log-probs sampled with, (B,) scores of a reward file if already there, age of each token in updates)."""
        if pool is None:
            picked = next(cursor).tolist()
            seeds = (seed * 1000003 + it * batch_size + np.arange(batch_size)) % (1 << 31)
            return picked, *rollout([prompts[i] for i in picked], seeds), None, [min(it, simulate_staleness)]
        groups = pool.take(batch_size)
        ids, logps, versions, ended = zip(*(g.answers[0] for g in groups))
        scored = torch.tensor([g.scores[reward][0] for g in groups], dtype=torch.float32) if reward_model is None else None
        return [g.index for g in groups], list(ids), torch.tensor(ended), list(logps), scored, [it - v for vs in versions for v in vs]

    def score(rows, prompts, responses, ended, scored=None):
        """Reward of each completion, the end-token rule applied -> (B,) float32 on the device. Each rank scores its share."""
        mine = mesh.mine(len(prompts))
        rows, prompts, responses, ended = rows[mine], prompts[mine], responses[mine], ended[mine]
        plain = [tok.decode([t for t in r if t != tok.eot]) for r in responses]
        if scored is not None:
            s = scored
        elif reward_model is None:
            s = score_with_files(reward_fn, reward, rows, [tok.decode(p) for p in prompts], plain)
        else:
            seqs = [p + r for p, r in zip(prompts, responses)]
            if reward_tok is not None:  # another tokenizer: the text is read anew, ended answers get its end token
                seqs = [reward_tok.encode(tok.decode(p) + a) + [reward_tok.eot] * e for p, a, e in zip(prompts, plain, ended.int().tolist())]
            with amp():
                s = score_with_model(reward_model, seqs, device, micro_tokens)
            if not s.isfinite().all():
                raise ValueError(f'reward model {reward} returned {s[~s.isfinite()][0].item()}: its weights are broken; train it again')
        if missing_eos != 'none':
            s = torch.where(ended, s, missing_eos_value if missing_eos == 'score' else s + missing_eos_value)
        return torch.tensor(mesh.collect(s.tolist(), everyone=True), dtype=torch.float32, device=device)

    def policy_forward(policy, rows, batch):
        """(log-probs, entropies (b, R), values or None) of some rows, at the sampling temperature; values only of a shared trunk."""
        idx, mask, at, resp = (x[rows].to(device) for x in batch)
        x, layout = policy.encode(idx, mask)
        logp, entropy = policy.logprobs(idx, temperature, mask, where=response_positions(mask, at, resp), entropy=True, encoded=(x, layout))
        v = layout.put(value_net(x)[:, 0].float()).gather(1, at) if start_value == 'trunk' else None
        return logp.gather(1, at), entropy.gather(1, at), v

    def value_forward(value_net, rows, batch):
        """Values (b, R) by the network of their own."""
        idx, mask, at, _ = (x[rows].to(device) for x in batch)
        return value_net(idx, mask=mask)[0].gather(1, at)

    def micro_batches(rows, lengths):
        """Rows of a minibatch in groups of at most micro_tokens tokens, always cut the same way; of several replicas each gets its share."""
        own = [lengths[i] for i in rows]
        return [[rows[i] for i in bin] for bin in mesh.deal(pack(own, max([micro_tokens, *own])), own)]

    def in_micro_batches(model, fn, rows, lengths):
        """fn(model, micro rows) -> tuple of (b, R); the whole put together in the order of rows, on every rank."""
        micros = micro_batches(rows, lengths)
        parts = mesh.collect(list(zip(micros, parallel.evaluate(model, micros, fn))))
        parts = parts[:len(parts) // mesh.copies(len(rows))]
        order = torch.tensor([i for m, _ in parts for i in m]).argsort()
        return [torch.cat(p).to(device)[order.to(device)] for p in zip(*(out for _, out in parts))]

    def old_quantities(rows, batch, lengths):
        """[log-probs, values, reference log-probs], what an update compares with."""
        if start_value == 'trunk':
            logp, values = in_micro_batches(policy, lambda net, m: policy_forward(net, m, batch)[::2], rows, lengths)
        else:
            logp, = in_micro_batches(policy, lambda net, m: policy_forward(net, m, batch)[:1], rows, lengths)
            values, = in_micro_batches(value_net, lambda net, m: (value_forward(net, m, batch),), rows, lengths)
        return logp, values, reference_logp(rows, batch, lengths)

    def reference_logp(rows, batch, lengths):
        def one(model, m):
            idx, mask, at, resp = (x[m].to(device) for x in batch)
            return (model.logprobs(idx, temperature, mask, where=response_positions(mask, at, resp)).gather(1, at),)
        with lora.lora_disabled(policy) if use_adapter else contextlib.nullcontext():
            return in_micro_batches(policy if use_adapter else reference, one, rows, lengths)[0]

    def evaluate(it):
        """Validation prompts answered with fixed seeds: score, KL to the reference, length; the samples are written."""
        n = min(eval_iters, len(val_prompts))
        parallel.refresh(engine, policy)
        responses, ended, _ = rollout(val_prompts[:n], range(n))
        scores = score(val_rows[:n], val_prompts[:n], responses, ended)
        batch = collate(val_prompts[:n], responses)
        lengths = [len(p) + len(r) for p, r in zip(val_prompts, responses)]
        with torch.no_grad(), amp():
            logp = in_micro_batches(policy, lambda net, m: policy_forward(net, m, batch)[:1], list(range(n)), lengths)[0]
            ref = reference_logp(list(range(n)), batch, lengths)
        resp = batch[3].to(device)
        kl = torch.where(resp, logp - ref, 0.0).sum(1).mean().item()
        with open(os.path.join(out_dir, 'samples.jsonl') if mesh.master else os.devnull, 'a') as f:
            for p, r, s in zip(val_prompts, responses, scores.tolist()):
                f.write(json.dumps(dict(step=it, prompt=tok.decode(p), completion=tok.decode(r), score=s)) + '\n')
        return dict(score=scores.mean().item(), score_std=scores.std().item() if n > 1 else 0.0, kl=kl, len=resp.sum(1).float().mean().item(), ended=ended.float().mean().item()), tok.decode(val_prompts[0] + responses[0])

    # ---- loop ----------------------------------------------------------------------------------------------------
    checked = start > 0
    for it in range(start, max_iters + 1):
        if (it % eval_interval == 0 or it == max_iters or eval_only) and not (ckpt and it == start and not eval_only):
            seen, sample = evaluate(it)
            print(f"step {it}: val score {seen['score']:.3f} | kl {seen['kl']:.2f} nats/seq | len {seen['len']:.1f} tok | ended {seen['ended']:.0%} | {sample!r}")
            log.row(it, 'eval', **seen, beta=beta)
            if eval_only:
                break
            objective = seen['score'] - beta * seen['kl']
            better, best = objective > best, max(best, objective)
            data = cursor.state_dict()
            if pool is not None:  # prompts handed out ahead of the loop are not in it: they are sampled anew after a resume
                data |= dict(batch=-(-pool.position // batch_size), position=pool.position)
            parallel.save_checkpoint(os.path.join(out_dir, 'ckpt.pt'), mesh, policy, optimizer, value_net, value_optimizer,
                                     also=os.path.join(out_dir, 'ckpt_best.pt') if better else None, **checkpoint_keys(policy),
                                     value_kind=start_value, config=config, tokenizer=tokenizer, iter=it, best=best, beta=beta, data=data,
                                     time=log.elapsed(), **(dict(past=past) if simulate_staleness else {}))
        if it == max_iters:
            break

        # ---- rollout and score -----------------------------------------------------------------------------------
        t0 = time.time()
        publish(it)
        picked, responses, ended, engine_logp, scored, ages = next_batch(it)
        mine = [prompts[i] for i in picked]
        t_gen = time.time() - t0
        scores = score([rows[i] for i in picked], mine, responses, ended, scored)

        # ---- log-probs, values, advantages -----------------------------------------------------------------------
        batch = collate(mine, responses)
        resp, lengths = batch[3].to(device), [len(p) + len(r) for p, r in zip(mine, responses)]
        minibatches = [list(range(i, i + minibatch_size)) for i in range(0, batch_size, minibatch_size)]
        with torch.no_grad(), amp():  # minibatch by minibatch as the first epoch will cut them: its ratios are 1 to the bit
            parts = [old_quantities(mb, batch, lengths) for mb in minibatches]
            old_logp, old_values, ref_logp = (torch.cat(p) for p in zip(*parts))
            rewards = token_rewards(scores, old_logp, ref_logp, resp, beta, kl_kind)
            if whiten_rewards:
                rewards = whiten(rewards, resp, shift_mean=False)
            advantages, returns = gae(rewards, old_values, resp, gamma, lam)
            if whiten_advantages:
                advantages = whiten(advantages, resp)
        sampled = pad(engine_logp, 0.0)[0].to(device)
        mismatch = torch.where(resp, (old_logp - sampled).abs(), 0.0)
        weights = tis_weights(old_logp, sampled, resp, tis_cap)[0] if mode == 'async' and decoupled and tis_cap else None
        proximal = old_logp if decoupled or mode == 'sync' else sampled  # the policy around which the update is clipped
        kl = torch.where(resp, (old_logp if mode == 'sync' else sampled) - ref_logp, 0.0).sum(1).mean().item()  # of the policy that sampled

        # ---- update ----------------------------------------------------------------------------------------------
        t1 = time.time()
        lr, v_lr = (linear_lr(it, peak, 0, max_iters) for peak in (learning_rate, value_lr or learning_rate))

        def value_loss_of(net, m, v=None):
            if v is None:
                with amp():
                    v = value_forward(net, m, batch)
            vf_loss, vs = value_loss(v, old_values[m], returns[m], resp[m], vf_clip)
            return vf_coef * vf_loss, dict(**vs, vf=vf_loss)

        def policy_loss_of(net, m):
            with amp():
                logp, entropy, v = policy_forward(net, m, batch)
            pg_loss, ps = policy_loss(logp, proximal[m], advantages[m], resp[m], clip, None if weights is None else weights[m])
            ent = masked_mean(entropy, resp[m])
            vf_loss, vs = (0.0, {}) if v is None else value_loss_of(None, m, v)  # a head on the trunk: one backward for both
            return pg_loss - entropy_coef * ent + vf_loss, dict(**ps, **vs, pg=pg_loss, entropy=ent)
        stats, stop, steps = {}, False, 0
        for epoch in range(ppo_epochs):
            order = list(range(batch_size)) if epoch == 0 else torch.randperm(batch_size).tolist()
            for mb in (order[i:i + minibatch_size] for i in range(0, batch_size, minibatch_size)):
                micros = micro_batches(mb, lengths)
                tokens = [resp[m].sum().item() for m in micros]
                step_stats = parallel.forward_backward(policy, optimizer, micros, policy_loss_of, tokens)
                if start_value != 'trunk':  # two networks: one's activations are gone before the other's come
                    step_stats |= parallel.forward_backward(value_net, value_optimizer, micros, value_loss_of, tokens)
                step_stats.pop('loss')
                check_finite(it, out_dir, pg=step_stats['pg'], vf=step_stats['vf'])
                if not checked:  # the invariant of every correct PPO: before the first step nothing has moved
                    checked = True
                    print(f"first update: max |ratio - 1| = {step_stats['ratio_max']:.1e}, approx KL = {step_stats['approx_kl']:.1e} (both are 0 when rollout and update agree)")
                    if step_stats['ratio_max'] > 1e-3 and decoupled:
                        raise ValueError(f"first update: |ratio - 1| is {step_stats['ratio_max']:.3g} before any step: old and new log-probs come from different computations; is dropout on?")
                norm = parallel.clip_and_step([optimizer, value_optimizer], [lr, v_lr], grad_clip)  # clipped by the norm over both
                steps += 1
                for k, x in {**step_stats, 'grad_norm': norm}.items():
                    stats[k] = stats.get(k, 0.0) + x
                stop = bool(kl_stop) and step_stats['approx_kl'] > kl_stop
                if stop:
                    break
            if stop:
                break
        stats = {k: x / steps for k, x in stats.items()}
        if target_kl:
            beta = adapt_beta(beta, kl, target_kl, batch_size, kl_horizon)

        # ---- log -------------------------------------------------------------------------------------------------
        dt, n = time.time() - t0, int(resp.sum())
        row = dict(score=scores.mean(), score_std=scores.std(), kl=kl, beta=beta, len=n / batch_size, ended=ended.float().mean(), mismatch=mismatch.sum().item() / n,
                   mismatch_max=mismatch.max(), value_mean=masked_mean(old_values, resp), gen_s=t_gen, upd_s=time.time() - t1, tokens=n, tok_per_s=n / dt, lr=lr, steps=steps, **stats)
        if mode == 'async':
            row |= dict(staleness=sum(ages) / len(ages), staleness_max=max(ages), prompts=picked)
        if pool is not None:  # idle: the share of the time that the trainer waited for samples
            row |= dict(idle=t_gen / dt, dropped=pool.dropped, restarts=pool.restarts, position=pool.position)
        log.row(it, 'train', **row)
        print(f"iter {it}/{max_iters} | score {row['score']:.2f} | kl {kl:.2f} nats/seq | pg {stats['pg']:.3f} | vf {stats['vf']:.3f} | clip {stats['clip_frac']:.1%} | "
              + (f"staleness {row['staleness']:.1f} | " if mode == 'async' else '') + (f"idle {row['idle']:.0%} | dropped {pool.dropped} | " if pool is not None else '')
              + f"len {n / batch_size:.1f} tok | gen {t_gen:.1f}s upd {row['upd_s']:.1f}s | {n / dt:,.0f} tok/s | eta {eta((max_iters - it) * dt)}")

    # ---- end -----------------------------------------------------------------------------------------------------
    if pool is not None:
        pool.close()
    peak = memory_now(device, peak=True) - max(0, base_memory)
    print(f'done: best score - beta kl {best:.3f}, peak memory {peak / 1e9:.2f} GB (planned {planned / 1e9:.2f}), checkpoint in {out_dir}/ckpt.pt, samples in {out_dir}/samples.jsonl')
    mesh.close()
