"""DPO and its kin: learn from preferences without a reward model and without sampling.

    L = - log sigmoid(beta (log pi/pi_ref (chosen) - log pi/pi_ref (rejected)))

Rafailov et al. 2023 (2305.18290), eq. 7. The optimum of "reward minus beta KL" is pi_ref exp(r / beta) / Z.
Solved for r, the reward is beta log pi/pi_ref plus a constant that cancels in Bradley-Terry's difference: the
policy is its own reward model. How it goes:
  1. the reference is the start point: a frozen copy, the adapter switched off, or its log-probs on the disk
  2. chosen and rejected of a micro-batch go through ONE forward without padding, their prompt computed once
  3. log pi(y|x) is the sum over the answer's tokens, its end token included; the loss is a mean over pairs:
     sigmoid (smoothed: cDPO), robust, ipo, hinge, apo_zero; simpo and orpo need no reference
  4. AdamW, learning rate linear to 0
  5. held-out accuracy, margin, log-probs, and the KL to the reference on samples of the policy. The chosen
     log-prob may fall while the margin grows (it often does): the log says so; sft_coef holds it up
Changed from the paper: nothing in the equation; RMSprop is AdamW here.

    python dpo.py config/dpo_toy.py                  # CPU: held-out accuracy 50 -> 90 %, one seed
    python dpo.py config/dpo_gpt2.py                 # one GPU
    torchrun --nproc_per_node=8 dpo.py config/dpo_gpt2.py --zero=1   # eight
Measured on a CPU: 0.66 M TinyStories model, 1,630 pairs of HH helpful-base, one epoch, three seeds: accuracy
on 531 held-out pairs 50 -> 62.1 / 60.5 / 60.5 % (each within 4). "The longer answer" is right in 60 %.
"""
import os
import math
import itertools

os.environ.setdefault('GOMP_SPINCOUNT', '2000') # idle CPU threads soon sleep: python bench.py neighbour
import torch
from torch.nn import functional as F

import parallel
from lora import is_adapter
from model import answer_logprobs, load_safetensors, save_safetensors
from rollout import SampledKL
from run import check_finite, digest, encode_all, reference_of, Run
from tokenizer import encode_pair

# -----------------------------------------------------------------------------------------------------------
# I/O
out_dir = 'out-dpo'
init_from = 'out-sft' # 'resume' | HF name | HF or PEFT directory | an out_dir: where the policy starts
overwrite = False # replace the run that out_dir already holds
eval_interval = 100 # >= 1: iterations between evaluations; a checkpoint is written at each
eval_iters = 0 # >= 0: batches an evaluation; 0 = the whole validation set
eval_only = False # evaluate once and stop
save_minutes = 5.0 # >= 0: minutes between checkpoints besides those of evaluations; 0 = evaluations only
log_to = '' # also 'tensorboard', 'wandb' or FILE.py with log(step, split, metrics), by comma
# data
dataset = 'data/toy/pref_train.jsonl' # rows {"prompt", "chosen", "rejected"}
val_dataset = '' # '' keeps 5 % of dataset aside
tokenizer = '' # '' = the one of init_from
block_size = 0 # >= 0: tokens of prompt + answer; 0 = the model's; a longer prompt loses its beginning
max_rows = 0 # >= 0: train on the first rows only, this many; 0 = all
seed = 1337 # in [0, 2147483648): of order, samples, new weights, dropout
# algorithm
loss_type = 'sigmoid' # 'sigmoid' | 'robust' | 'ipo' | 'hinge' | 'apo_zero' | 'simpo' | 'orpo'; kto: kto.py
beta = 0.1 # > 0: strength of the pull to the reference; simpo wants 2.0 to 2.5, orpo 0.1
label_smoothing = 0.0 # in [0, 0.5): share of swapped labels that is expected (sigmoid, robust, simpo)
length_norm = False # mean instead of sum of the token log-probs (simpo and orpo: always); TRL's ipo has it
gamma = 1.0 # >= 0: the margin that simpo asks for
sft_coef = 0.0 # >= 0: weight of an SFT loss on the chosen answer (2404.19733); 0 = off
ref = '' # reference model; '' = init_from itself
precompute_ref = False # its log-probs once, to out_dir/ref_*.safetensors: no second model in memory
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
batch_size = 64 # >= 1: pairs an iteration, over all processes
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

PAIRED = ('sigmoid', 'robust', 'ipo', 'hinge', 'apo_zero')  # against a reference
REFERENCE_FREE = ('simpo', 'orpo')  # length-normalised by definition


def sequence_logp(logp, mask, average=False):
    """log pi(y|x) = sum of the token log-probs that count, (B, R) float and bool -> (B,); average=True
    divides by their number. [[-1, -2, 9]], mask [[1, 1, 0]] -> -3, average -1.5. A row without a token gives
    0."""
    total = torch.where(mask, logp, 0.0).sum(1)
    return total / mask.sum(1).clamp(min=1) if average else total


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, loss_type='sigmoid',
             label_smoothing=0.0):
    """DPO (Rafailov et al. 2023, eq. 7) and its kin. Returns (losses, chosen_rewards, rejected_rewards),
    rewards = beta log pi/pi_ref (eq. 5). With h = chosen reward - rejected reward and e = label_smoothing,
    the share of swapped labels that is expected:
        sigmoid   -(1 - e) log s(h) - e log s(-h)               e > 0: conservative DPO (Mitchell 2023)
        robust    (-(1 - e) log s(h) + e log s(-h)) / (1 - 2e)  unbiased if swapped (2403.00409 eq 9)
        ipo       (h / beta - 1 / (2 beta))^2                   a target margin (2310.12036 eq. 17)
        hinge     max(0, 1 - h)                                 SLiC (2305.10425)
        apo_zero  1 - s(chosen reward) + s(rejected reward)     chosen up, rejected down (2408.06266 eq. 7)
    ValueError: unknown loss_type; label_smoothing outside [0, 0.5) or where it has no meaning. TRL's 'ipo' is
    this with averaged log-probs. beta=1, all (B,) equal but policy_chosen one nat higher -> h=1, sigmoid loss
    -log s(1) = 0.3133."""
    if loss_type not in PAIRED:
        raise ValueError(f'loss_type {loss_type!r} is unknown here: one of {", ".join(PAIRED)}')
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type not in ('sigmoid', 'robust')):
        raise ValueError(f"label_smoothing {label_smoothing} with loss_type {loss_type!r}: it lies in "
                         f"[0, 0.5), for 'sigmoid' (cDPO) and 'robust' only")
    chosen, rejected = beta * (policy_chosen - ref_chosen), beta * (policy_rejected - ref_rejected)
    h, e = chosen - rejected, label_smoothing
    if loss_type == 'sigmoid':
        losses = -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)
    elif loss_type == 'robust':
        losses = (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)
    elif loss_type == 'ipo':
        losses = (h / beta - 1 / (2 * beta)) ** 2
    elif loss_type == 'hinge':
        losses = F.relu(1 - h)
    else:
        losses = 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)
    return losses, chosen.detach(), rejected.detach()


def simpo_loss(policy_chosen, policy_rejected, beta, gamma, label_smoothing=0.0):
    """SimPO (Meng et al. 2024, 2405.14734 eq. 6): no reference, the mean log-prob of a token is the reward,
    gamma the margin it wants. AVERAGED log-probs in; returns (losses, chosen_rewards, rejected_rewards).
    beta=2, gamma=1, -1 against -2 -> -log s(2 - 1) = 0.3133."""
    h = beta * (policy_chosen - policy_rejected) - gamma
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return losses, (beta * policy_chosen).detach(), (beta * policy_rejected).detach()


def orpo_loss(policy_chosen, policy_rejected, beta, chosen_nll=None):
    """ORPO (Hong et al. 2024, 2403.07691 eq. 6 and 7): SFT on the chosen answer + beta * -log s(log odds
    ratio), odds p = p / (1 - p), p the mean token probability. AVERAGED log-probs in; chosen_nll (B,) is the
    SFT term, by default -policy_chosen (the answer only). Returns (losses, chosen_rewards, rejected_rewards).
    p 1/2 against 1/3, beta=1: odds 1 and 1/2, loss 0.6931 - log s(log 2) = 0.6931 + 0.4055."""
    def log_odds(logp):  # log p - log(1 - p), exact for p near 0 and near 1; p = 1 itself has no odds
        logp = logp.clamp(max=-1e-6)
        return logp - torch.log(-torch.expm1(logp))
    nll = -policy_chosen if chosen_nll is None else chosen_nll
    losses = nll - beta * F.logsigmoid(log_odds(policy_chosen) - log_odds(policy_rejected))
    return losses, (beta * policy_chosen).detach(), (beta * policy_rejected).detach()


def wilson(k, n, z=1.96):
    """95 % interval of a share k/n (Wilson 1927): sensible near 0 and 1, where the normal one is not. 60 of
    100 -> (0.502, 0.691)."""
    p, w = k / n, z * z / n
    mid, half = (p + w / 2) / (1 + w), z * math.sqrt(p * (1 - p) / n + w / (4 * n)) / (1 + w)
    return mid - half, mid + half


def linear_lr(it, peak, warmup, total):
    """Linear warm-up, then linear to 0 at iteration `total`."""
    return peak * min((it + 1) / (warmup + 1), max(0.0, (total - it) / max(1, total - warmup)))


# -----------------------------------------------------------------------------------------------------------
# pairs, their losses, the reference's log-probs


def read_pair(row, tok, T):
    """One row -> ([(prompt, chosen, rejected)], note). A prompt that does not fit loses its beginning; a pair
    with an answer that alone is too long is dropped."""
    if row.get('tie'):
        return [], 'ties left out'
    prompt, chosen, rejected = encode_pair(row, tok)
    room = T - max(len(chosen), len(rejected))
    if room < 1:
        return [], f'pairs dropped (an answer alone has more than {T} tokens)'
    if not prompt:
        raise ValueError('the prompt is empty: the first token of an answer needs one before it')
    return [(prompt[-room:], chosen, rejected)], 'prompts cut on the left' if len(prompt) > room else ''


def tokens_of(pairs):
    """What a forward computes for each: prompt once, both answers."""
    return [len(prompt) + len(chosen) + len(rejected) for prompt, chosen, rejected in pairs]


def pair_logps(model, pairs, average):
    """log pi(chosen | prompt) and log pi(rejected | prompt): (B, 2), and the mean log-prob of a chosen token
    (B,)."""
    logp, _, mask = answer_logprobs(model, [(prompt, answers) for prompt, *answers in pairs])
    both = sequence_logp(logp, mask, average).view(-1, 2)
    return both, sequence_logp(logp, mask, True).view(-1, 2)[:, 0]


COLUMNS = ('loss', 'accuracy', 'chosen_reward', 'rejected_reward', 'chosen_logp', 'rejected_logp', 'margin')


def compare(model, pairs, ref_logps, loss_type, beta, label_smoothing, gamma, sft_coef, average):
    """(losses (B,) with gradient, COLUMNS of each pair (B, 7) without). ref_logps (B, 2), None for simpo and
    orpo."""
    logps, chosen_mean = pair_logps(model, pairs, average)
    chosen, rejected = logps.unbind(1)
    if loss_type == 'simpo':
        losses, *rewards = simpo_loss(chosen, rejected, beta, gamma, label_smoothing)
    elif loss_type == 'orpo':
        losses, *rewards = orpo_loss(chosen, rejected, beta)
    else:
        ref_logps = ref_logps.to(logps.device)
        losses, *rewards = dpo_loss(chosen, rejected, *ref_logps.unbind(1), beta, loss_type, label_smoothing)
    if sft_coef:
        losses = losses - sft_coef * chosen_mean
    margin = rewards[0] - rewards[1]
    right = (margin.sign() + 1) / 2  # step 0: no margin yet, half a point each
    return losses, torch.stack([losses, right, *rewards, chosen, rejected, margin], 1).detach()


def reference_logps(run, policy, frozen, pairs, average):
    """(n, 2) of the reference, on the CPU."""
    with reference_of(policy, frozen) as reference:
        def logps(net, rows):
            return pair_logps(net, [pairs[i] for i in rows], average)[0]
        found = run.each(reference, tokens_of(pairs), logps)
    return torch.stack(found).float()


def stored_logps(run, policy, frozen, pairs, average, split):
    """The same from out_dir/ref_<split>.safetensors; computed when that file belongs to other weights or
    pairs."""
    file = os.path.join(run.out_dir, f'ref_{split}.safetensors')
    with reference_of(policy, frozen) as reference:
        weights = parallel.full_state(reference, only_master=True)  # names may lie, weights do not
    weights = [weights[name].numpy().tobytes() for name in sorted(weights) if not is_adapter(name)]
    found = digest(itertools.chain(weights, pairs, [average, run.dtype]))
    name = run.mesh.everyone.share_object(found, 0, 'reference')
    name = torch.frombuffer(bytearray.fromhex(name), dtype=torch.uint8)
    if os.path.exists(file):
        stored = load_safetensors(file)
        if torch.equal(stored.get('belongs_to', name[:0]), name):
            return stored['logps'].clone()
        print(f'{file} belongs to other data or another reference: computed again')
    logps = reference_logps(run, policy, frozen, pairs, average)
    if run.mesh.master:  # the others have looked for the file: all took part in the log-probs
        save_safetensors(file, dict(logps=logps, belongs_to=name))
    return logps


def held_out_pairs(run, policy, pairs, ref_logps, how):
    """Means of COLUMNS over held-out pairs, and the interval of the accuracy."""
    policy.eval()

    def columns(net, rows):
        refs = None if ref_logps is None else ref_logps[rows]
        return compare(net, [pairs[i] for i in rows], refs, **how)[1]
    found = torch.stack(run.each(policy, tokens_of(pairs), columns)).mean(0)
    policy.train()
    seen = dict(zip(COLUMNS, found.tolist()))
    return dict(seen, pairs=len(pairs), accuracy_95=wilson(round(seen['accuracy'] * len(pairs)), len(pairs)))


# -----------------------------------------------------------------------------------------------------------
if __name__ == '__main__':
    # ---- setup. Run reads the rest of the keys: init_from, overwrite, tokenizer, val_dataset, max_rows,
    # eval_interval, save_minutes, log_to, lora_r, lora_alpha, lora_dropout, lora_targets, lora_rslora,
    # lora_dora, weight_decay, beta1, beta2, device, dtype, compile, checkpointing, kernels, threads, tp,
    # pp, cp, zero, dist_timeout; rollout.py reads max_new_tokens, temperature
    if loss_type == 'kto':
        raise ValueError("loss_type 'kto' is a script of its own: python kto.py, with the same keys")
    if loss_type not in (*PAIRED, *REFERENCE_FREE):
        known = ', '.join(PAIRED + REFERENCE_FREE)
        raise ValueError(f'loss_type {loss_type!r} is unknown: one of {known}')
    if label_smoothing and loss_type not in ('sigmoid', 'robust', 'simpo'):
        raise ValueError(f'label_smoothing {label_smoothing} with loss_type {loss_type!r}: for '
                         f'sigmoid, robust and simpo only')
    needs_ref, average = loss_type in PAIRED, length_norm or loss_type in REFERENCE_FREE
    for key in () if needs_ref else ('precompute_ref', 'ref'):
        if config[key]:
            raise ValueError(f'{key}={config[key]} means nothing to loss_type {loss_type!r}: leave it out')
    if sft_coef and loss_type == 'orpo':
        raise ValueError(f"sft_coef={sft_coef} means nothing to loss_type 'orpo': leave it out")
    run = Run('dpo', config)
    policy, tok = run.model()  # no dropout: policy and reference start equal
    T = min(block_size or policy.config.block_size, policy.config.block_size)

    # ---- pairs
    rows, val_rows = run.rows()
    pairs = encode_all(rows, read_pair, dataset, (tok, T))
    val_pairs = encode_all(val_rows, read_pair, run.val_name, (tok, T))
    val_pairs = val_pairs[:eval_iters * batch_size or None]
    max_iters = max_iters or math.ceil(epochs * len(pairs) / batch_size)
    order = run.order(pairs, batch_size)  # endless, a function of the seed
    print(f'{dataset}: {len(pairs):,} pairs, {len(val_pairs):,} held out; {max_iters} iterations of '
          f'{batch_size} = {max_iters * batch_size / len(pairs):.2f} epochs')

    # ---- 1. the reference: a frozen copy, or None: the policy with its adapter off; its log-probs may lie on
    # the disk
    with_kl = eval_samples and needs_ref
    sampled_kl = SampledKL(run, policy, tok, [prompt for prompt, _, _ in val_pairs]) if with_kl else None
    frozen = run.reference(policy, tok, T, ref) if needs_ref else None
    policy, optimizer = run.trained(policy, learning_rate, adam_eps)
    # (n, 2) log-probs of the reference; those of the held-out pairs are asked for once
    ref_logps = val_ref_logps = None
    if precompute_ref:
        ref_logps = stored_logps(run, policy, frozen, pairs, average, 'train')
        val_ref_logps = stored_logps(run, policy, frozen, val_pairs, average, 'val')
    elif needs_ref:
        val_ref_logps = reference_logps(run, policy, frozen, val_pairs, average)
    way = 'adapter disabled' if frozen is None else 'frozen copy'
    if precompute_ref:
        way = 'precomputed'
        frozen, run.memory['reference'] = None, 0  # an evaluation loads it for the moment
    print(f'reference: {way if needs_ref else "none"}')
    longest = max(tokens_of(pairs))  # of a pair
    run.plan(min(max(micro_tokens, longest), batch_size * longest), T)
    how = dict(loss_type=loss_type, beta=beta, label_smoothing=label_smoothing, gamma=gamma)
    how |= dict(sft_coef=sft_coef, average=average)

    def loss_of(policy, micro):
        """(mean loss of some pairs, means of COLUMNS)."""
        with run.amp():
            losses, columns = compare(policy, *micro, **how)
        return losses.mean(), dict(zip(COLUMNS[1:], columns.mean(0)[1:]))

    first_logp = run.ckpt['first_logp'] if run.ckpt else None
    policy.train()
    for it in run.iterations(max_iters):
        # ---- 5. evaluate, and write a checkpoint; step 0 is the baseline, where policy and reference are the
        # same
        if run.due(it):
            seen = held_out_pairs(run, policy, val_pairs, val_ref_logps, how)
            first_logp = seen['chosen_logp'] if first_logp is None else first_logp
            run.extra['first_logp'], seen['chosen_logp_change'] = first_logp, seen['chosen_logp'] - first_logp
            if sampled_kl:  # the policy answers, both models read
                seen |= sampled_kl(policy, run.reference(policy, tok, T, ref) if frozen is None else frozen)
            shown = 'loss accuracy accuracy_95 margin chosen_logp rejected_logp kl len'
            run.evaluated(it, seen, seen['loss'], shown, lower=True)
            if -seen['chosen_logp_change'] > 0.05 * abs(first_logp):
                fell = -seen['chosen_logp_change']
                print(f'  the chosen log-prob has fallen by {fell:.2f} nats since step 0: DPO widens the '
                      f'margin by pushing both down; sft_coef, a larger beta or fewer steps hold it')
        if it == max_iters or eval_only:
            break

        # ---- 2. a batch of pairs, in micro-batches; what the reference says of them
        picked = next(order).tolist()  # (B,) row numbers
        batch = [pairs[i] for i in picked]
        refs = ref_logps[picked] if precompute_ref else None  # (B, 2)
        if needs_ref and not precompute_ref:
            refs = reference_logps(run, policy, frozen, batch, average)
        lengths = tokens_of(batch)
        micros = []
        for rows in run.micro_batches(lengths):
            micros.append(([batch[i] for i in rows], None if refs is None else refs[rows]))

        # ---- 3. the loss: loss.backward() on each micro-batch, weighted by its pairs (the GPU is waited for
        # here)
        sizes = [len(pairs) for pairs, _ in micros]
        stats = parallel.forward_backward(policy, optimizer, micros, loss_of, sizes)
        check_finite(it, out_dir, **stats)

        # ---- 4. all-reduce of the gradients, clip, AdamW
        lr = linear_lr(it, learning_rate, warmup_iters, max_iters)
        norm = parallel.clip_and_step([optimizer], [lr], grad_clip)
        tokens = sum(len(prompt) for prompt, _, _ in batch) + sum(lengths)  # of both sequences of each pair
        run.log(it, dict(stats, grad_norm=norm, lr=lr, tokens=tokens),
                'loss accuracy margin chosen_logp rejected_logp grad_norm lr')

    # ---- end
    run.finish(f'best held-out loss {run.best:.4f}' if run.best is not None else 'evaluated')
