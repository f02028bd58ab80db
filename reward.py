"""The reward model: learn from pairs which of two answers people (or a gold scorer) prefer.

    L = - mean log sigmoid(r(x, chosen) - r(x, rejected) - margin)  +  center * mean (r_chosen + r_rejected)^2

Bradley & Terry 1952; Christiano et al. 2017 (1706.03741); Stiennon et al. 2020 (2009.01325); margin and
centring as in Llama 2 (2307.09288) and Eisenstein et al. 2023 (2312.09244). How it goes:
  1. a language model gets a scalar head, N(0, 1/sqrt(d+1)); the reward is read at the last real token, the
     end token
  2. chosen and rejected of a micro-batch go through ONE forward without padding, the prompt they share
     computed once
  3. the loss is a mean over pairs; one epoch, learning rate linear to 0 (more overfits: 2009.01325 section
     3.4)
  4. gain and bias: rewards of samples of the initial policy get mean 0 and standard deviation 1, folded into
     the weights of ckpt.pt and ckpt_best.pt
  5. held-out accuracy with its interval, margin, calibration, correlation of reward and length: report.json
Changed from the papers: ties are either left out or trained with both orders at half weight (ties='half').

    python reward.py config/reward_toy.py                        # CPU
    python reward.py config/reward_gpt2.py                       # one GPU
    torchrun --nproc_per_node=8 reward.py config/reward_gpt2.py --zero=1   # eight
    python reward.py --dataset=my_pairs.jsonl --init_from=gpt2
"""
import os
import math

os.environ.setdefault('GOMP_SPINCOUNT', '2000') # idle CPU threads soon sleep: python bench.py neighbour
import numpy as np
import torch
from torch.nn import functional as F

import infer
import parallel
from model import rewards_of, write_json
from rollout import answers_to
from run import check_finite, encode_all, load_model, prompt_room, Run
from tokenizer import encode_pair

# -----------------------------------------------------------------------------------------------------------
# I/O
out_dir = 'out-reward'
init_from = 'out-sft' # 'resume' | HF name | HF or PEFT directory | an out_dir: the model that gets the head
overwrite = False # replace the run that out_dir already holds
eval_interval = 100 # >= 1: iterations between evaluations; a checkpoint is written at each
eval_iters = 0 # >= 0: batches an evaluation; 0 = the whole validation set
eval_only = False # evaluate once and stop
save_minutes = 5.0 # >= 0: minutes between checkpoints besides those of evaluations; 0 = evaluations only
log_to = '' # also 'tensorboard', 'wandb' or FILE.py with log(step, split, metrics), by comma
# data
dataset = 'data/toy/pref_train.jsonl' # rows {"prompt", "chosen", "rejected"}, and "margin", "tie": true
val_dataset = '' # '' keeps 5 % of dataset aside
tokenizer = '' # '' = the one of init_from
block_size = 0 # >= 0: tokens of prompt + answer; 0 = the model's; a longer prompt loses its beginning
max_rows = 0 # >= 0: train on the first pairs only, this many; 0 = all
seed = 1337 # in [0, 2147483648): of order, samples, new weights, dropout
# algorithm
center = 0.0 # >= 0: weight of (r_chosen + r_rejected)^2; 0.01 keeps rewards around 0
margin_scale = 1.0 # >= 0: multiplies a row's "margin"
ties = 'drop' # one of 'drop', 'half': rows with "tie": true are left out, or pulled together
normalize = 'samples' # one of 'samples', 'responses', 'none': of the initial policy, of the data
normalize_n = 256 # >= 2: samples (or responses) that give gain and bias
max_new_tokens = 64 # >= 1: of those samples
temperature = 1.0 # > 0: of those samples
# LoRA (2106.09685)
lora_r = 0 # >= 0: rank; 0 = train all weights
lora_alpha = 16.0 # > 0: the adapter is scaled by alpha / r
lora_dropout = 0.0 # in [0, 1): on the adapter's input
lora_targets = '' # HF module names by comma, 'all-linear', or a pattern; '' = c_attn, or q_proj,v_proj
lora_rslora = False # scale by alpha / sqrt(r) instead: a large r still learns (2312.03732)
lora_dora = False # also learn the length of each row of the weights (2402.09353)
# optimizer
epochs = 1.0 # > 0: passes over the pairs; ignored when max_iters is set
max_iters = 0 # >= 0: 0 = as many as epochs says
batch_size = 64 # >= 1: pairs an iteration, over all processes
micro_tokens = 8192 # >= 1: tokens a forward pass sees at most; smaller saves memory, the result is the same
learning_rate = 5e-5 # >= 0: linear to 0
warmup_iters = 0 # >= 0: iterations of linear warm-up
weight_decay = 0.0 # >= 0: AdamW's, of matrices only
beta1 = 0.9 # in [0, 1): decay of Adam's first moment
beta2 = 0.999 # in [0, 1): decay of Adam's second moment
adam_eps = 1e-5 # > 0: large on purpose: small first steps [lm-human-preferences]
grad_clip = 1.0 # >= 0: global norm; 0 = off
# system
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
dist_timeout = 120 # > 0: seconds that one rank waits for another; then the run ends and names it
# -----------------------------------------------------------------------------------------------------------
config_keys = [k for k, v in globals().items()
               if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
# overrides from the command line or a config file
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
config = {k: globals()[k] for k in config_keys} # will be useful for logging
# -----------------------------------------------------------------------------------------------------------
# the equations


def bradley_terry_loss(chosen, rejected, margin=None, tie=None):
    """-log sigmoid(chosen - rejected - margin), mean over pairs. chosen, rejected (B,) rewards; margin float
    or (B,); tie (B,) bool: neither answer is better, so both orders count half. Bradley-Terry: P(chosen beats
    rejected) = sigmoid(r_chosen - r_rejected). chosen [1], rejected [0] -> 0.3133; as a tie 0.8133."""
    margin = 0.0 if margin is None else margin
    losses = -F.logsigmoid(chosen - rejected - margin)
    if tie is not None:
        other_order = -F.logsigmoid(rejected - chosen - margin)
        losses = torch.where(tie, 0.5 * (losses + other_order), losses)
    return losses.mean()


def centring_loss(chosen, rejected):
    """(r_chosen + r_rejected)^2, mean over pairs: pairs fix differences alone, this keeps rewards around
    0."""
    return ((chosen + rejected) ** 2).mean()


def gain_and_bias(rewards, bias=0.0):
    """(gain, new bias) that give rewards (n,), which hold `bias` already, mean 0 and standard deviation 1:
    gain * (r - bias) + new bias. Rewards that are all equal have no scale: gain 1. [1, 3], bias 0 -> 1,
    -2."""
    mean = rewards.mean().item()
    std = rewards.std(correction=0).item()
    gain = 1 / std if std > 1e-5 * max(1.0, abs(mean)) else 1.0
    return gain, gain * (bias - mean)


def wilson(k, n, z=1.96):
    """95 % interval of a share k/n (Wilson 1927): sensible near 0 and 1, where the normal one is not. 60 of
    100 -> (0.502, 0.691)."""
    p, w = k / n, z * z / n
    mid, half = (p + w / 2) / (1 + w), z * math.sqrt(p * (1 - p) / n + w / (4 * n)) / (1 + w)
    return mid - half, mid + half


def calibration(margins, bins=10):
    """Is sigmoid(margin) the share of pairs that it claims? margins (B,): r_chosen - r_rejected. The model's
    confidence in its own choice, sigmoid(|margin|) in [0.5, 1], against how often that choice is right.
    Returns (ECE, rows of (from, to, pairs, mean confidence, accuracy)). Guo et al. 2017 (1706.04599)."""
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    right = margins > 0
    edges = np.linspace(0.5, 1.0, bins + 1)
    which = np.clip(np.digitize(confidence, edges), 1, bins)
    rows = []
    gap = 0.0
    for b in np.unique(which):
        here = which == b
        n = int(here.sum())
        claimed = float(confidence[here].mean())
        true = float(right[here].mean())
        rows.append((float(edges[b - 1]), float(edges[b]), n, claimed, true))
        gap += n * abs(claimed - true)
    return gap / len(margins), rows


def correlation(x, y):
    """Pearson's r; 0 where one side is constant."""
    if np.std(x) == 0 or np.std(y) == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


def linear_lr(it, peak, warmup, total):
    """Linear warm-up, then linear to 0 at iteration `total`."""
    return peak * min((it + 1) / (warmup + 1), max(0.0, (total - it) / max(1, total - warmup)))


# -----------------------------------------------------------------------------------------------------------
# data, rewards of many sequences, samples


def read_preference(row, tok, T, ties):
    """One row -> ([(prompt, chosen, rejected, margin, tie)], note). A prompt that does not fit loses its
    beginning (the answer and its end token must stay)."""
    tie = bool(row.get('tie'))
    if tie and ties == 'drop':
        return [], 'ties left out'
    prompt, chosen, rejected = encode_pair(row, tok)
    room = T - max(len(chosen), len(rejected))
    if room < 1:
        return [], f'pairs dropped (an answer alone has more than {T} tokens)'
    note = 'prompts cut on the left' if len(prompt) > room else ''
    return [(prompt[-room:], chosen, rejected, float(row.get('margin') or 0.0), tie)], note


def size_of(pair):
    """Tokens of both its sequences: the prompt counts twice."""
    return 2 * len(pair[0]) + len(pair[1]) + len(pair[2])


def rewards_in_order(run, model, sequences):
    """Rewards (S,) of token lists, without gradient, in micro-batches, on the CPU of every rank."""
    lengths = [len(ids) for ids in sequences]
    found = run.each(model, lengths, lambda net, rows: rewards_of(net, [sequences[i] for i in rows]))
    return torch.stack(found).float()


def held_out_report(run, model, pairs):
    """What there is to say about a reward model on held-out pairs; docs/metrics explains the words."""
    model.eval()
    sequences = [p[0] + answer for p in pairs for answer in p[1:3]]
    both = rewards_in_order(run, model, sequences)
    model.train()
    chosen, rejected = both.view(-1, 2).numpy().astype(float).T
    margins = chosen - rejected
    ece, reliability = calibration(margins)
    right = int((margins > 0).sum())
    edges = np.histogram_bin_edges(np.nan_to_num(both.numpy()), 30)  # NaN: the run stops at the loss
    histogram = dict(edges=edges.tolist())
    for name, x in (('chosen', chosen), ('rejected', rejected)):
        histogram[name] = np.histogram(x, edges)[0].tolist()
    lengths = [len(answer) for p in pairs for answer in p[1:3]]
    longer = np.mean([len(p[1]) > len(p[2]) for p in pairs])
    return dict(
        loss=float(np.logaddexp(0, -margins).mean()),
        accuracy=right / len(pairs),
        accuracy_95=wilson(right, len(pairs)),
        pairs=len(pairs),
        margin=float(margins.mean()),
        ece=ece,
        reliability=reliability,
        length_correlation=correlation(both.numpy(), lengths),
        longer_is_chosen=float(longer),
        reward_mean=float(both.mean()),
        reward_std=float(both.std()),
        histogram=histogram)


def sampled_sequences(run, tok, pairs, n, max_new_tokens, temperature, seed):
    """n prompts of the pairs with an answer of the initial policy each."""
    policy = load_model(run.config['init_from'], run.device)[0].eval()
    room = prompt_room(policy, max_new_tokens)
    prompts = [pairs[i % len(pairs)][0][-room:] for i in range(n)]
    engine = infer.Engine(policy, tok, max_num_seqs=64)
    answers = answers_to(run, engine, prompts, max_new_tokens, temperature, seed)
    return [prompt + answer for prompt, answer in zip(prompts, answers)]


def normalise(run, model, sequences, name):
    """Folds gain and bias into the checkpoint `name` of out_dir and into the model, whose weights are then
    that file's. The weights as trained stay in it (raw_score, raw_bias): a resumed run trains those."""
    path = os.path.join(run.out_dir, name)
    saved = torch.load(path, map_location='cpu', weights_only=True)
    saved.setdefault('raw_bias', 0.0 if 'raw_score' in saved else saved['model_args']['reward_bias'])
    saved.setdefault('raw_score', saved['model']['score.weight'])
    for key, value in {**saved['model'], 'score.weight': saved['raw_score']}.items():
        parallel.set_weight(model, key, value)
    model.config.reward_bias = saved['raw_bias']
    rewards = rewards_in_order(run, model, sequences)
    gain, bias = gain_and_bias(rewards, saved['raw_bias'])
    if not math.isfinite(gain) or not math.isfinite(bias):
        raise ValueError(f'{path}: gain {gain} and bias {bias}: broken weights, left as they are')
    saved['model']['score.weight'] = saved['raw_score'] * gain
    for part in ('model_args', 'lora'):
        if saved[part]:
            saved[part]['reward_bias'] = bias
    parallel.set_weight(model, 'score.weight', saved['model']['score.weight'])
    model.config.reward_bias = bias
    run.replace(path, saved)
    rewards = rewards_in_order(run, model, sequences)
    print(f'{name} normalised on {len(sequences)} sequences: gain {gain:.3f}, bias {bias:+.3f}; their '
          f'rewards now have mean {rewards.mean():.4f} and std {rewards.std(correction=0):.4f}')


# -----------------------------------------------------------------------------------------------------------
if __name__ == '__main__':
    # ---- setup. Run reads the rest of the keys: overwrite, tokenizer, val_dataset, max_rows,
    # eval_interval, save_minutes, log_to, lora_r, lora_alpha, lora_dropout, lora_targets, lora_rslora,
    # lora_dora, weight_decay, beta1, beta2, device, dtype, compile, checkpointing, kernels, threads, tp,
    # pp, cp, zero, dist_timeout
    run = Run('reward', config)

    # ---- 1. a language model with a scalar head
    model, tok = run.model('scalar')
    if run.ckpt and 'raw_score' in run.ckpt:  # the weights as trained, before gain and bias
        model.score.weight.data.copy_(run.ckpt['raw_score'])
        model.config.reward_bias = run.ckpt.get('raw_bias', 0.0)
    if normalize == 'samples':  # said now, not after the training
        prompt_room(model, max_new_tokens)
        if not run.ckpt and not model.fresh_head:
            raise ValueError(f'{init_from} is a reward model and cannot answer: --normalize=responses, none')
    T = min(block_size or model.config.block_size, model.config.block_size)

    # ---- pairs
    rows, val_rows = run.rows()
    pairs = encode_all(rows, read_preference, dataset, (tok, T, ties))
    val_pairs = encode_all(val_rows, read_preference, run.val_name, (tok, T, 'drop'))
    max_iters = max_iters or math.ceil(epochs * len(pairs) / batch_size)
    order = run.order(pairs, batch_size)
    print(f'{dataset}: {len(pairs):,} pairs, {len(val_pairs):,} held out; {max_iters} iterations of '
          f'{batch_size} = {max_iters * batch_size / len(pairs):.2f} epochs')
    model, optimizer = run.trained(model, learning_rate, adam_eps)
    longest = max(map(size_of, pairs))
    run.plan(min(max(micro_tokens, longest), batch_size * longest), T)

    def loss_of(model, pairs):
        """(mean loss of some pairs, {share that is right, mean margin})."""
        margin = torch.tensor([margin_scale * p[3] for p in pairs], device=run.device)
        tie = torch.tensor([p[4] for p in pairs], device=run.device)
        with run.amp():
            sequences = [p[0] + answer for p in pairs for answer in p[1:3]]
            rewards = rewards_of(model, sequences)  # (2 B,)
        chosen, rejected = rewards.view(-1, 2).unbind(1)  # (B,) each
        loss = bradley_terry_loss(chosen, rejected, margin, tie)
        if center:
            loss = loss + center * centring_loss(chosen, rejected)
        gap = (chosen - rejected).detach()
        return loss, dict(accuracy=(gap > 0).float().mean(), margin=gap.mean())

    model.train()
    for it in run.iterations(max_iters):
        # ---- evaluate, and write a checkpoint; step 0 is the baseline, a coin toss
        if run.due(it):
            seen = held_out_report(run, model, val_pairs[:eval_iters * batch_size or None])
            shown = 'accuracy accuracy_95 loss margin ece length_correlation'
            run.evaluated(it, seen, seen['accuracy'], shown)
        if it == max_iters or eval_only:
            break

        # ---- 2. a batch of pairs, in micro-batches that one forward each goes through
        batch = [pairs[i] for i in next(order)]
        lengths = [size_of(pair) for pair in batch]
        micros = [[batch[i] for i in picked] for picked in run.micro_batches(lengths)]

        # ---- 3. the loss: loss.backward() on each micro-batch, weighted by its pairs (the GPU is waited for
        # here)
        stats = parallel.forward_backward(model, optimizer, micros, loss_of, [len(m) for m in micros])
        check_finite(it, out_dir, **stats)
        # all-reduce of the gradients, clip, AdamW
        lr = linear_lr(it, learning_rate, warmup_iters, max_iters)
        norm = parallel.clip_and_step([optimizer], [lr], grad_clip)
        metrics = dict(stats, grad_norm=norm, lr=lr, tokens=sum(lengths))
        run.log(it, metrics, 'loss accuracy margin grad_norm lr')

    # ---- 4. gain and bias, of both files that leave this stage; the last one stays in memory
    if not eval_only and normalize != 'none':
        if normalize == 'samples':
            sequences = sampled_sequences(run, tok, pairs, normalize_n, max_new_tokens, temperature, seed)
        else:
            sequences = [p[0] + answer for p in pairs[:normalize_n] for answer in p[1:3]][:normalize_n]
        for name in ('ckpt_best.pt', 'ckpt.pt'):
            if os.path.exists(os.path.join(out_dir, name)):
                normalise(run, model, sequences, name)

    # ---- 5. the report, on all held-out pairs
    seen = held_out_report(run, model, val_pairs)
    if run.mesh.master:
        write_json(os.path.join(out_dir, 'report.json'), seen)
    print('reliability: confidence of its choice | how often right | pairs')
    for low, high, n, confidence, accuracy in seen['reliability']:
        print(f'  {low:.2f}-{high:.2f}: {confidence:.3f} | {accuracy:.3f} | {n}')
    run.finish(f"held-out accuracy {seen['accuracy']:.1%}, report in {out_dir}/report.json")
