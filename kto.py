"""KTO: learn from answers that are only called good or bad, without pairs, a reward model or sampling.

    good:  1 - sigmoid(beta (log pi/pi_ref (y) - z))        bad:  1 - sigmoid(beta (z - log pi/pi_ref (y)))
    z = KL(pi || pi_ref) >= 0                               Ethayarajh et al. 2024 (2402.01306), eq. 8

An answer is judged against a reference point, as people judge gains and losses (prospect theory). How it
goes:
  1. rows {"prompt", "completion", "label"}; a pair gives one good and one bad answer. The reference is the
     start point: a frozen copy, or the LoRA adapter switched off
  2. z: how much more the policy likes answers that belong to OTHER prompts than the reference does, the
     batch's mean; no gradient, never below 0
  3. log pi(y|x) is the sum over the answer's tokens, its end token included; the loss is a mean over answers,
     good and bad ones weighted (desirable_weight, undesirable_weight)
  4. AdamW, learning rate linear to 0
  5. held-out rewards of good and bad answers, and the KL to the reference on samples of the policy
Changed from the paper: nothing.

    python kto.py config/kto_toy.py                              # CPU
    torchrun --nproc_per_node=8 kto.py --init_from=gpt2 --dataset=my.jsonl --zero=1   # eight GPUs
    python kto.py config/kto_toy.py --lora_r=8
"""
import os
import math

os.environ.setdefault('GOMP_SPINCOUNT', '2000') # idle CPU threads soon sleep: python bench.py neighbour
import torch

import parallel
from model import answer_logprobs
from rollout import SampledKL
from run import check_finite, encode_all, reference_of, Run
from tokenizer import encode_labelled, encode_pair

# -----------------------------------------------------------------------------------------------------------
# I/O
out_dir = 'out-kto'
init_from = 'out-sft' # 'resume' | HF name | HF or PEFT directory | an out_dir: where the policy starts
overwrite = False # replace the run that out_dir already holds
eval_interval = 100 # >= 1: iterations between evaluations; a checkpoint is written at each
eval_iters = 0 # >= 0: batches an evaluation; 0 = the whole validation set
eval_only = False # evaluate once and stop
save_minutes = 5.0 # >= 0: minutes between checkpoints besides those of evaluations; 0 = evaluations only
log_to = '' # also 'tensorboard', 'wandb' or FILE.py with log(step, split, metrics), by comma
# data
dataset = 'data/toy/pref_train.jsonl' # rows {"prompt", "completion", "label": true}; a pair gives one of each
val_dataset = '' # '' keeps 5 % of dataset aside
tokenizer = '' # '' = the one of init_from
block_size = 0 # >= 0: tokens of prompt + answer; 0 = the model's; a longer prompt loses its beginning
max_rows = 0 # >= 0: train on the first rows only, this many; 0 = all
seed = 1337 # in [0, 2147483648): of order, samples, new weights, dropout
# algorithm
beta = 0.1 # > 0: strength of the pull to the reference
length_norm = False # mean instead of sum of the token log-probs
desirable_weight = 1.0 # >= 0: of good answers
undesirable_weight = 1.0 # >= 0: of bad answers
ref = '' # reference model; '' = init_from itself
eval_samples = 64 # >= 0: held-out prompts answered at each evaluation for the KL to the reference; 0 = none
max_new_tokens = 64 # >= 1: of those answers
temperature = 1.0 # > 0: of those answers
# LoRA (2106.09685)
lora_r = 0 # >= 0: rank; 0 = train all weights
lora_alpha = 16.0 # > 0: the adapter is scaled by alpha / r
lora_dropout = 0.0 # in [0, 1): on the adapter's input
lora_targets = '' # HF module names by comma, 'all-linear', or a pattern; '' = c_attn, or q_proj,v_proj
lora_rslora = False # scale by alpha / sqrt(r) instead: a large r still learns (2312.03732)
lora_dora = False # also learn the length of each row of the weights (2402.09353)
# optimizer
epochs = 1.0 # > 0: passes over the rows; ignored when max_iters is set
max_iters = 0 # >= 0: 0 = as many as epochs says
batch_size = 64 # >= 1: answers an iteration, over all processes
micro_tokens = 8192 # >= 1: tokens a forward pass sees at most; smaller saves memory, the result is the same
learning_rate = 5e-7 # >= 0: linear to 0; 5e-7 for billions of parameters, 5e-6 for GPT-2, 1e-4 for tiny ones
warmup_iters = 10 # >= 0: iterations of linear warm-up
weight_decay = 0.0 # >= 0: AdamW's, of matrices only
beta1 = 0.9 # in [0, 1): decay of Adam's first moment
beta2 = 0.999 # in [0, 1): decay of Adam's second moment
adam_eps = 1e-8 # > 0: Adam's epsilon
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
cp = 1 # >= 1: context parallel: not here, where two answers share their prompt's tokens
zero = 0 # in [0, 3]: what the replicas share out: 0 nothing | 1 optimizer | 2 + gradients | 3 + weights
dist_timeout = 120 # > 0: seconds that one rank waits for another; then the run ends and names it
# -----------------------------------------------------------------------------------------------------------
config_keys = [k for k, v in globals().items()
               if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
# overrides from the command line or a config file
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
config = {k: globals()[k] for k in config_keys} # will be useful for logging
# -----------------------------------------------------------------------------------------------------------
# the equations: log-probs of whole answers (B,) in, losses (B,) out, rewards detached


def sequence_logp(logp, mask, average=False):
    """log pi(y|x) = sum of the token log-probs that count, (B, R) float and bool -> (B,); average=True
    divides by their number. [[-1, -2, 9]], mask [[1, 1, 0]] -> -3, average -1.5. A row without a token gives
    0."""
    total = torch.where(mask, logp, 0.0).sum(1)
    return total / mask.sum(1).clamp(min=1) if average else total


def kto_loss(policy_logp, ref_logp, desirable, kl, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """KTO (Ethayarajh et al. 2024, 2402.01306 eq. 8), unpaired: each answer is good or bad (desirable (B,)
    bool), measured against the reference point kl = KL(pi || pi_ref) >= 0 (a float or 0-d, no gradient;
    estimated on mismatched prompt and answer). Returns (losses, rewards). beta=1, kl=0, log-ratio 0 -> 1 -
    s(0) = 0.5, good or bad."""
    rewards = beta * (policy_logp - ref_logp)
    z = beta * torch.as_tensor(kl, dtype=rewards.dtype, device=rewards.device).detach().clamp(min=0)
    good, bad = 1 - torch.sigmoid(rewards - z), 1 - torch.sigmoid(z - rewards)
    losses = torch.where(desirable, desirable_weight * good, undesirable_weight * bad)
    return losses, rewards.detach()


def linear_lr(it, peak, warmup, total):
    """Linear warm-up, then linear to 0 at iteration `total`."""
    return peak * min((it + 1) / (warmup + 1), max(0.0, (total - it) / max(1, total - warmup)))


# -----------------------------------------------------------------------------------------------------------
# answers with a label, their log-probs


GOOD, BAD = ('true', '1', 'good', 'yes'), ('false', '0', 'bad', 'no')


def label_of(value):
    """true, 1, "true", "good", "yes" -> True; false, 0, ... -> False. ValueError for anything else: -1,
    "maybe"."""
    if isinstance(value, float) and value in (0, 1):
        value = int(value)
    word = str(value).strip().lower()
    if word not in GOOD + BAD:
        raise ValueError(f'label {value!r}: expected true or false, or one of {", ".join(GOOD + BAD)}')
    return word in GOOD


def read_answers(row, tok, T):
    """One row -> ([(prompt, answer, good)], note). A prompt that does not fit loses its beginning; an answer
    that alone is too long is dropped."""
    if row.get('tie'):
        return [], 'ties left out'
    if row.get('label') is None:
        prompt, chosen, rejected = encode_pair(row, tok)
        answers = [(chosen, True), (rejected, False)]
    else:
        prompt, answer = encode_labelled(row, tok)
        answers = [(answer, label_of(row['label']))]
    if not prompt:
        raise ValueError('the prompt is empty: the first token of an answer needs one before it')
    kept = []
    note = ''
    for answer, good in answers:
        room = T - len(answer)
        if room < 1:
            note = f'rows with an answer that was dropped (it alone has more than {T} tokens)'
        else:
            kept.append((prompt[-room:], answer, good))
            note = note or ('prompts cut on the left' if len(prompt) > room else '')
    return kept, note


class WithOtherAnswers:
    """The sequence of (prompt, answer, label, other), made when it is asked for; other: an answer of the next
    item with another prompt, y' for x in the estimate of z."""

    def __init__(self, items, T):
        self.items = items
        self.T = T

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        prompt, answer, label = self.items[i]
        for k in range(1, len(self)):
            next_prompt, other, _ = self.items[(i + k) % len(self)]
            if next_prompt != prompt:
                return prompt, answer, label, other[:self.T - len(prompt)]
        raise ValueError('kto estimates the KL on answers to other prompts, and all rows have the same '
                         'prompt: add rows')


def logps_of(model, items, which, average):
    """log pi(answer | prompt) (B, len(which)); which: (1,) the own answer, (3,) another one, (1, 3) both."""
    logp, _, mask = answer_logprobs(model, [(item[0], [item[k] for k in which]) for item in items])
    return sequence_logp(logp, mask, average).view(-1, len(which))


def logps_in_order(run, model, items, which, average):
    """The same for any number of items, without gradient, on the CPU."""
    lengths = [len(item[0]) + sum(len(item[k]) for k in which) for item in items]

    def logps(net, rows):
        return logps_of(net, [items[i] for i in rows], which, average)
    return torch.stack(run.each(model, lengths, logps)).float()


def reference_point(run, policy, items, ref_logps, average):
    """z: the mean of log pi/pi_ref of answers to other prompts, at least 0; ref_logps (B, 2), its column 1
    theirs."""
    logps = logps_in_order(run, policy, items, (3,), average)[:, 0]
    return (logps - ref_logps[:, 1]).mean().clamp(min=0).item()


COLUMNS = ('loss', 'accuracy', 'good', 'bad',
           'chosen_reward', 'rejected_reward', 'chosen_logp', 'rejected_logp')


def judge(model, items, ref_logp, z, beta, desirable_weight, undesirable_weight, average):
    """(losses (B,) with gradient, COLUMNS of each answer (B, 8) without); 0 in the columns of the side that
    it is not on. ref_logp (B,), z a float."""
    logp = logps_of(model, items, (1,), average)[:, 0]
    label = torch.tensor([item[2] for item in items], device=logp.device)
    losses, rewards = kto_loss(logp, ref_logp.to(logp.device), label, z, beta, desirable_weight,
                               undesirable_weight)
    right = ((rewards > beta * z) == label).float()
    good = label.float()
    bad = 1 - good
    columns = [losses, right, good, bad, good * rewards, bad * rewards, good * logp, bad * logp]
    return losses, torch.stack(columns, 1).detach()


def metrics_of(means):
    """COLUMNS' means over answers -> means over the answers of each side (a batch may lack one), and their
    margin."""
    out = dict(loss=means['loss'], accuracy=means['accuracy'])
    for side, share in dict(chosen='good', rejected='bad').items():
        if means[share]:
            for column in (f'{side}_reward', f'{side}_logp'):
                out[column] = means[column] / means[share]
    if means['good'] and means['bad']:
        out['margin'] = out['chosen_reward'] - out['rejected_reward']
    return out


def held_out_answers(run, policy, items, ref_logps, batch_size, how):
    """Metrics of all held-out answers together; z is a batch's."""
    policy.eval()
    columns = []
    points = []
    for i in range(0, len(items), batch_size):
        batch = items[i:i + batch_size]
        refs = ref_logps[i:i + batch_size]
        z = reference_point(run, policy, batch, refs, how['average'])
        lengths = [len(item[0]) + len(item[1]) for item in batch]

        def judged(net, rows):
            return judge(net, [batch[k] for k in rows], refs[rows, 0], z, **how)[1]
        columns += run.each(policy, lengths, judged)
        points += [z] * len(batch)
    policy.train()
    means = torch.stack(columns).mean(0).tolist()
    seen = metrics_of(dict(zip(COLUMNS, means)))
    return dict(seen, kto_kl=sum(points) / len(points), answers=len(items))


# -----------------------------------------------------------------------------------------------------------
if __name__ == '__main__':
    # ---- setup. Run reads the rest of the keys: init_from, overwrite, tokenizer, val_dataset, max_rows,
    # eval_interval, save_minutes, log_to, lora_r, lora_alpha, lora_dropout, lora_targets, lora_rslora,
    # lora_dora, weight_decay, beta1, beta2, device, dtype, compile, checkpointing, kernels, threads, tp,
    # pp, cp, zero, dist_timeout; rollout.py reads max_new_tokens, temperature
    run = Run('kto', config)
    policy, tok = run.model()  # no dropout: policy and reference start equal
    T = min(block_size or policy.config.block_size, policy.config.block_size)

    # ---- 1. answers with their labels, and the reference: a frozen copy, or None: the policy with its
    # adapter off
    rows, val_rows = run.rows()
    items = WithOtherAnswers(encode_all(rows, read_answers, dataset, (tok, T)), T)
    val_items = WithOtherAnswers(encode_all(val_rows, read_answers, run.val_name, (tok, T)), T)
    val_items = list(val_items)[:eval_iters * batch_size or None]
    max_iters = max_iters or math.ceil(epochs * len(items) / batch_size)
    order = run.order(items, batch_size)  # endless, a function of the seed
    print(f'{dataset}: {len(items):,} answers, {sum(item[2] for item in items):,} good, {len(val_items):,} '
          f'held out; {max_iters} iterations: {max_iters * batch_size / len(items):.2f} epochs')
    prompts = [prompt for prompt, *_ in val_items]
    sampled_kl = SampledKL(run, policy, tok, prompts) if eval_samples else None
    frozen = run.reference(policy, tok, T, ref)
    policy, optimizer = run.trained(policy, learning_rate, adam_eps)
    with reference_of(policy, frozen) as reference:
        # (n, 2): of the own answer, and of another one
        val_refs = logps_in_order(run, reference, val_items, (1, 3), length_norm)
    longest = max(len(prompt) + len(answer) + len(other) for prompt, answer, _, other in items)
    run.plan(min(max(micro_tokens, longest), batch_size * longest), T)
    how = dict(beta=beta, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight,
               average=length_norm)

    def loss_of(policy, micro):
        """(mean loss of some answers, means of COLUMNS); micro: (items, their ref_logp (b,), z)."""
        with run.amp():
            losses, columns = judge(policy, *micro, **how)
        return losses.mean(), dict(zip(COLUMNS[1:], columns.mean(0)[1:]))

    policy.train()
    for it in run.iterations(max_iters):
        # ---- 5. evaluate, and write a checkpoint; step 0 is the baseline, where policy and reference are the
        # same
        if run.due(it):
            seen = held_out_answers(run, policy, val_items, val_refs, batch_size, how)
            if sampled_kl:  # the policy answers, both models read
                seen |= sampled_kl(policy, frozen)
            shown = 'loss accuracy margin chosen_logp rejected_logp kto_kl kl len'
            run.evaluated(it, seen, seen['loss'], shown, lower=True)
        if it == max_iters or eval_only:
            break

        # ---- 2. a batch, what the reference says of it, and the reference point z
        batch = [items[i] for i in next(order)]
        with reference_of(policy, frozen) as reference:
            refs = logps_in_order(run, reference, batch, (1, 3), length_norm)
        z = reference_point(run, policy, batch, refs, length_norm)
        lengths = [len(item[0]) + len(item[1]) for item in batch]
        micros = [([batch[i] for i in rows], refs[rows, 0], z) for rows in run.micro_batches(lengths)]

        # ---- 3. the loss: loss.backward() on each micro-batch, weighted by its answers (the GPU is waited
        # for here)
        sizes = [len(items) for items, _, _ in micros]
        stats = parallel.forward_backward(policy, optimizer, micros, loss_of, sizes)
        check_finite(it, out_dir, **stats)

        # ---- 4. all-reduce of the gradients, clip, AdamW
        lr = linear_lr(it, learning_rate, warmup_iters, max_iters)
        norm = parallel.clip_and_step([optimizer], [lr], grad_clip)
        metrics = dict(metrics_of(stats), kto_kl=z, grad_norm=norm, lr=lr, tokens=sum(lengths))
        run.log(it, metrics, 'loss accuracy margin chosen_logp rejected_logp kto_kl grad_norm lr')

    # ---- end
    run.finish(f'best held-out loss {run.best:.4f}' if run.best is not None else 'evaluated')
