"""DPO and its kin: learn from preferences without a reward model and without sampling.

    L = - log sigmoid(beta (log pi/pi_ref (chosen) - log pi/pi_ref (rejected)))         Rafailov et al. 2023 (2305.18290), eq. 7

The optimum of "reward minus beta KL" is pi_ref exp(r / beta) / Z; solved for r, the reward is beta log pi/pi_ref + const, and the
constant cancels in Bradley-Terry's difference: the policy is its own reward model. How it goes:
  1. the reference is the start point: a frozen copy, the LoRA adapter switched off, or its log-probs computed once, to disk
  2. chosen and rejected of a micro-batch go through ONE forward without padding, in which the prompt they share is computed once
  3. log pi(y|x) is the sum over the answer's tokens, its end token included; the loss is a mean over pairs
  4. losses: sigmoid (smoothed: cDPO), robust, ipo, hinge, apo_zero; simpo and orpo need no reference, kto no pairs
  5. the chosen log-prob may fall while the margin grows (it often does): the log says so; sft_coef holds it up
  6. held-out accuracy, margin, log-probs, and the KL to the reference on samples of the policy
Changed from the paper: nothing in the equation; RMSprop is AdamW here.

    python dpo.py config/dpo_toy.py                              # CPU: held-out accuracy 50 -> 79 %, about a minute
    python dpo.py config/dpo_gpt2.py                             # one GPU
    torchrun --nproc_per_node=8 dpo.py config/dpo_gpt2.py --zero=1   # eight
    python dpo.py config/dpo_toy.py --loss_type=kto --lora_r=8
Measured on real preferences, CPU, seeds 1337, 2, 3: a 0.66 M TinyStories model, 1,630 pairs of HH helpful-base (prepare.py --subsets=helpful-base --val=0.25), one epoch:
    python dpo.py config/dpo_gpt2.py --init_from=DIR --block_size=256 --batch_size=32 --learning_rate=3e-4 --warmup_iters=5 --epochs=1 --eval_iters=0
accuracy on 531 held-out pairs 50 -> 62.1 / 60.5 / 60.5 % (each within 4), margin 0 -> 0.18 / 0.21 / 0.19. A model so small finds little more than length:
"the longer answer" is right in 60 %. Adapter off, frozen copy and disk agree in every loss to the last digit.
"""
import os
import math
import time
import hashlib
import contextlib

import numpy as np
import torch
from torch.nn import functional as F

import infer
import kernels as K
import lora
import parallel
from dataset import Sampler, load_dataset, pack
from tokenizer import encode_completion, encode_pair, encode_prompt, get_tokenizer
from model import Layout, load_safetensors, save_safetensors
from run import (activation_bytes, check_finite, checkpoint_keys, eta, load_model, memory_now, memory_plan,
                 open_model, open_run, pick_device, pick_threads, RunLog, training_bytes)

# ---------------------------------------------------------------------------------------------------------------------
# I/O
out_dir = 'out-dpo'
init_from = 'out-sft' # 'resume' | HF name | HF directory | an out_dir: where the policy starts
overwrite = False # start anew in an out_dir that already holds a run
eval_interval = 100 # >= 1: iterations between evaluations; a checkpoint is written at each
eval_iters = 0 # >= 0: batches an evaluation; 0 = the whole validation set
eval_only = False # evaluate once and stop
# data
dataset = 'data/toy/pref_train.jsonl' # rows {"prompt", "chosen", "rejected"}; kto also {"prompt", "completion", "label": true}
val_dataset = '' # '' keeps 5 % of dataset aside
tokenizer = '' # '' = the one of init_from
block_size = 0 # >= 0: tokens of prompt + answer; 0 = the model's; a longer prompt loses its beginning
max_rows = 0 # >= 0: train on the first so many rows; 0 = all
seed = 1337
# algorithm
loss_type = 'sigmoid' # 'sigmoid' | 'robust' | 'ipo' | 'hinge' | 'apo_zero' | 'simpo' | 'orpo' | 'kto'
beta = 0.1 # > 0: strength of the pull to the reference; simpo wants 2.0 to 2.5, orpo 0.1
label_smoothing = 0.0 # in [0, 0.5): share of swapped labels that is expected (sigmoid, robust, simpo)
length_norm = False # mean instead of sum of the token log-probs (simpo and orpo: always); TRL's ipo has it
gamma = 1.0 # >= 0: the margin that simpo asks for
sft_coef = 0.0 # >= 0: adds so much SFT loss on the chosen answer (2404.19733); 0 = off
desirable_weight = 1.0 # >= 0: of good answers in kto
undesirable_weight = 1.0 # >= 0: of bad answers in kto
ref = '' # reference model; '' = init_from itself
precompute_ref = False # its log-probs once, to out_dir/ref_*.safetensors: no second model in memory
eval_samples = 64 # >= 0: held-out prompts answered at each evaluation for the KL to the reference; 0 = none
max_new_tokens = 64 # >= 1: of those answers
temperature = 1.0 # > 0: of those answers
# LoRA (2106.09685)
lora_r = 0 # >= 0: rank; 0 = train all weights
lora_alpha = 16.0 # > 0: the adapter is scaled by alpha / r
lora_dropout = 0.0 # in [0, 1): on the adapter's input
lora_targets = '' # HF module names, comma-separated; '' = c_attn, or q_proj,v_proj
# optimizer
epochs = 1.0 # > 0: passes over the rows; ignored when max_iters is set
max_iters = 0 # >= 0: 0 = as many as epochs says
batch_size = 64 # >= 1: pairs (kto: answers) an iteration, over all processes
micro_tokens = 8192 # >= 1: tokens a forward pass sees at most
learning_rate = 5e-7 # >= 0: linear to 0; 5e-7 for billions of parameters, 5e-6 for GPT-2, 1e-4 for tiny ones
warmup_iters = 10 # >= 0: iterations of linear warm-up
weight_decay = 0.0 # >= 0: AdamW's, of matrices only
beta1 = 0.9 # in [0, 1): decay of Adam's first moment
beta2 = 0.999 # in [0, 1): decay of Adam's second moment
adam_eps = 1e-8 # > 0: Adam's epsilon
grad_clip = 1.0 # >= 0: global norm; 0 = off
# system
device = 'auto' # 'auto' = cuda if there is one | 'cpu' | 'cuda' | 'cuda:1'
dtype = 'auto' # of the matrix products: 'auto' | 'float32' | 'bfloat16'; weights and optimizer stay float32
compile = False # torch.compile of the blocks; for CUDA: on the CPU torch.compile leaves oneDNN's products for slower ones
kernels = 'auto' # 'auto' | 'torch' | 'triton'
threads = 0 # >= 0: CPU threads; 0 = at most 2 for models under 5 M parameters, else torch's choice
# several processes: torchrun --nproc_per_node=N; N / (tp pp cp) data-parallel replicas share the batch
tp = 1 # >= 1: tensor parallel: heads and MLP columns shared out; they talk in every layer, so keep tp inside a node
pp = 1 # >= 1: pipeline stages of layers; wants several micro-batches an iteration
cp = 1 # >= 1: context parallel: not here, where two answers share their prompt's tokens
zero = 0 # in [0, 3]: what the replicas share out: 0 nothing | 1 optimizer | 2 + gradients | 3 + weights
dist_timeout = 120 # > 0: seconds that one rank waits for another; then the run ends and says which, and in what
sharded_ckpt = False # each rank writes its own part of ckpt.pt; python parallel.py merge OUT_DIR joins them
# ---------------------------------------------------------------------------------------------------------------------
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read()) # overrides from command line or config file
config = {k: globals()[k] for k in config_keys} # will be useful for logging
# ---------------------------------------------------------------------------------------------------------------------
# the equations: log-probs of whole answers (B,) in, losses (B,) out, rewards detached

PAIRED = ('sigmoid', 'robust', 'ipo', 'hinge', 'apo_zero')  # against a reference
REFERENCE_FREE = ('simpo', 'orpo')  # length-normalised by definition
LOSSES = (*PAIRED, *REFERENCE_FREE, 'kto')


def sequence_logp(logp, mask, average=False):
    """log pi(y|x) = sum of the token log-probs that count, (B, R) float and bool -> (B,); average=True divides by their number.
    [[-1, -2, 9]], mask [[1, 1, 0]] -> -3, average -1.5. A row without a token gives 0."""
    total = torch.where(mask, logp, 0.0).sum(1)
    return total / mask.sum(1).clamp(min=1) if average else total


def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta, loss_type='sigmoid', label_smoothing=0.0):
    """DPO (Rafailov et al. 2023, eq. 7) and its kin. Returns (losses, chosen_rewards, rejected_rewards), rewards = beta log pi/pi_ref (eq. 5).
    With h = chosen reward - rejected reward and e = label_smoothing, the share of swapped labels that is expected:
        sigmoid   -(1 - e) log s(h) - e log s(-h)               e > 0: conservative DPO (Mitchell 2023)
        robust    (-(1 - e) log s(h) + e log s(-h)) / (1 - 2e)  unbiased under swapped labels (2403.00409 eq. 9)
        ipo       (h / beta - 1 / (2 beta))^2                   a target margin, no way to infinity (2310.12036 eq. 17)
        hinge     max(0, 1 - h)                                 SLiC (2305.10425)
        apo_zero  1 - s(chosen reward) + s(rejected reward)     chosen up, rejected down (2408.06266 eq. 7)
    ValueError: unknown loss_type; label_smoothing outside [0, 0.5) or where it has no meaning. TRL's 'ipo' is this with averaged log-probs.
    beta=1, all (B,) equal but policy_chosen one nat higher -> h=1, sigmoid loss -log s(1) = 0.3133."""
    if loss_type not in PAIRED:
        raise ValueError(f'loss_type {loss_type!r} is unknown here: one of {", ".join(PAIRED)}')
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type not in ('sigmoid', 'robust')):
        raise ValueError(f"label_smoothing {label_smoothing} with loss_type {loss_type!r}: it is in [0, 0.5), for 'sigmoid' (cDPO) and 'robust' only")
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
    """SimPO (Meng et al. 2024, 2405.14734 eq. 6): no reference, the mean log-prob of a token is the reward, gamma the margin it wants.
    AVERAGED log-probs in; returns (losses, chosen_rewards, rejected_rewards). beta=2, gamma=1, -1 against -2 -> -log s(2 - 1) = 0.3133."""
    h = beta * (policy_chosen - policy_rejected) - gamma
    losses = -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)
    return losses, (beta * policy_chosen).detach(), (beta * policy_rejected).detach()


def orpo_loss(policy_chosen, policy_rejected, beta, chosen_nll=None):
    """ORPO (Hong et al. 2024, 2403.07691 eq. 6 and 7): SFT on the chosen answer + beta * -log s(log odds ratio), odds p = p / (1 - p), p the mean
    token probability. AVERAGED log-probs in; chosen_nll (B,) is the SFT term, by default -policy_chosen (the answer only). Returns (losses,
    chosen_rewards, rejected_rewards). p 1/2 against 1/3, beta=1: odds 1 and 1/2, loss 0.6931 - log s(log 2) = 0.6931 + 0.4055."""
    def log_odds(logp):  # log p - log(1 - p), exact for p near 0 and near 1; p = 1 itself has no odds
        logp = logp.clamp(max=-1e-6)
        return logp - torch.log(-torch.expm1(logp))
    nll = -policy_chosen if chosen_nll is None else chosen_nll
    losses = nll - beta * F.logsigmoid(log_odds(policy_chosen) - log_odds(policy_rejected))
    return losses, (beta * policy_chosen).detach(), (beta * policy_rejected).detach()


def kto_loss(policy_logp, ref_logp, desirable, kl, beta, desirable_weight=1.0, undesirable_weight=1.0):
    """KTO (Ethayarajh et al. 2024, 2402.01306 eq. 8), unpaired: each answer is good or bad (desirable (B,) bool), measured against the reference
    point kl = KL(pi || pi_ref) >= 0 (a float or 0-d, no gradient; estimated on mismatched prompt and answer). Returns (losses, rewards).
    beta=1, kl=0, log-ratio 0 -> 1 - s(0) = 0.5, good or bad."""
    rewards = beta * (policy_logp - ref_logp)
    z = beta * torch.as_tensor(kl, dtype=rewards.dtype, device=rewards.device).detach().clamp(min=0)
    losses = torch.where(desirable, desirable_weight * (1 - torch.sigmoid(rewards - z)), undesirable_weight * (1 - torch.sigmoid(z - rewards)))
    return losses, rewards.detach()


def wilson(k, n, z=1.96):
    """95 % interval of a share k/n (Wilson 1927): sensible near 0 and 1, where the normal one is not. 60 of 100 -> (0.502, 0.691)."""
    p, w = k / n, z * z / n
    mid, half = (p + w / 2) / (1 + w), z * math.sqrt(p * (1 - p) / n + w / (4 * n)) / (1 + w)
    return mid - half, mid + half


def linear_lr(it, peak, warmup, total):
    """Linear warm-up, then linear to 0 at iteration `total`."""
    return peak * min((it + 1) / (warmup + 1), max(0.0, (total - it) / max(1, total - warmup)))


# ---------------------------------------------------------------------------------------------------------------------
# data: items (prompt ids, [two answers' ids], label); kto's second answer belongs to another prompt


def encode_items(rows, tok, block_size, name, unpaired):
    """Rows -> items. Pairs: [chosen, rejected], label None. unpaired: [answer, an answer to another prompt], label True for
    good; a pair gives two. A prompt that does not fit loses its beginning; an item whose answer alone is too long is dropped."""
    items, cut, dropped, tied = [], 0, 0, 0
    for i, row in enumerate(rows):
        try:
            if row.get('tie'):
                tied += 1
                continue
            if unpaired and row.get('label') is not None:
                talk = row.get('messages')
                prompt, answer = (talk[:-1], talk[-1:]) if talk else (row.get('prompt'), row.get('completion'))
                if prompt is None or not answer:
                    raise ValueError('a row with "label" has "prompt" and "completion", or "messages" that end with the answer')
                found = [(encode_prompt(prompt, tok), [encode_completion(answer, tok)], bool(row['label']))]
            else:
                prompt, chosen, rejected = encode_pair(row, tok)
                found = [(prompt, [chosen], True), (prompt, [rejected], False)] if unpaired else [(prompt, [chosen, rejected], None)]
        except ValueError as e:
            raise ValueError(f'{name}, row {i + 1}: {e}') from None
        for prompt, answers, label in found:
            longest = max(map(len, answers))
            if longest >= block_size:
                dropped += 1
                continue
            cut += len(prompt) + longest > block_size
            if not prompt:
                raise ValueError(f'{name}, row {i + 1}: the prompt is empty: the first token of an answer needs one before it')
            items.append((prompt[-(block_size - longest):], answers, label))
    if not items:
        raise ValueError(f'{name}: no usable row of {len(rows)} within block_size {block_size} ({dropped} too long, {tied} ties)')
    if cut or dropped or tied:
        print(f'{name}: {cut} prompts cut on the left, {dropped} answers dropped (longer than {block_size}), {tied} ties left out')
    if unpaired:
        items = [(p, a + [stranger(items, i)[:block_size - len(p)]], label) for i, (p, a, label) in enumerate(items)]
    return items


def stranger(items, i):
    """An answer to the next item with another prompt: y' for x in KTO's estimate of KL(pi || pi_ref)."""
    for k in range(1, len(items)):
        prompt, answers, _ = items[(i + k) % len(items)]
        if prompt != items[i][0]:
            return answers[0]
    raise ValueError('kto estimates the KL on answers to other prompts, and all rows have the same prompt: add rows')


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


def logps_of(model, groups, device, micro_tokens, average, mesh=parallel.ALONE):
    """log pi(answer | prompt) of groups with the same number A of answers each, (len(groups), A), without gradient, on the CPU; of
    several replicas each does its share."""
    out = torch.empty(len(groups), len(groups[0][1]))
    lengths = [len(p) + sum(map(len, answers)) for p, answers in groups]
    bins = mesh.deal(pack(lengths, max([micro_tokens, *lengths])), lengths)

    def one(model, bin):
        logp, _, mask = answer_logps(model, [groups[i] for i in bin], device)
        return sequence_logp(logp, mask, average).view(len(bin), -1).float().cpu()
    for bin, found in mesh.collect(list(zip(bins, parallel.evaluate(model, bins, one)))):
        out[bin] = found.cpu()
    return out


# ---------------------------------------------------------------------------------------------------------------------
if __name__ == '__main__':
    # ---- process and models --------------------------------------------------------------------------------------
    config['stage'] = 'dpo'
    device, amp_dtype = pick_device(device, dtype)
    amp = lambda: torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32)
    K.use(kernels)
    parallel.accept('dpo', tp, pp, cp, compile)
    mesh = parallel.init(tp, pp, cp, zero, dist_timeout, device, seed, quiet=True)  # this process alone, or torchrun's
    device = mesh.device
    if loss_type not in LOSSES:
        raise ValueError(f'loss_type {loss_type!r} is unknown: one of {", ".join(LOSSES)}')
    unpaired, needs_ref, average = loss_type == 'kto', loss_type not in REFERENCE_FREE, length_norm or loss_type in REFERENCE_FREE
    if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss_type not in ('sigmoid', 'robust', 'simpo')):
        raise ValueError(f"label_smoothing {label_smoothing} with loss_type {loss_type!r}: it is in [0, 0.5), for sigmoid (cDPO), robust and simpo only")
    for key, given, fine in (('precompute_ref', precompute_ref, needs_ref), ('ref', ref, needs_ref), ('sft_coef', sft_coef, loss_type not in ('kto', 'orpo'))):
        if given and not fine:
            raise ValueError(f'{key}={given} means nothing to loss_type {loss_type!r}: leave it out, or take another loss_type')
    if beta <= 0:
        raise ValueError(f'beta {beta}: wants to be above 0')
    if not os.path.exists(dataset):
        raise ValueError(f'{dataset}: no such data; python {os.path.dirname(dataset) or "data/toy"}/prepare.py makes it (or name a file of your own)')
    ckpt = open_run(out_dir, init_from, overwrite, 'dpo', mesh)
    if init_from == 'scratch':
        raise ValueError('DPO starts from a model that can answer: --init_from=out-sft (made by python sft.py config/sft_toy.py), a name or a directory')
    config['init_from'] = ckpt['config']['init_from'] if ckpt else init_from  # resumed: the reference is what the first run started from
    policy, tokenizer = open_model(init_from, ckpt, 'lm', tokenizer, None, lora_r, lora_alpha, lora_dropout, lora_targets)
    tok = get_tokenizer(tokenizer)
    if tok.vocab_size > policy.config.vocab_size:
        raise ValueError(f'tokenizer {tokenizer!r} has {tok.vocab_size} tokens, the model {policy.config.vocab_size}: give the tokenizer that belongs to it, --tokenizer=...')
    policy.config.dropout, T = 0.0, min(block_size or policy.config.block_size, policy.config.block_size)
    policy = policy.to(device)
    use_adapter = bool(lora.adapted(policy)) and not ref
    threads = pick_threads(threads, policy.num_params(), device)
    if compile:
        policy.compile_blocks()

    # ---- data ----------------------------------------------------------------------------------------------------
    rows, val_rows = load_dataset(dataset), load_dataset(val_dataset) if val_dataset else None
    if val_rows is None:
        parts = rows.train_test_split(0.05, seed)
        rows, val_rows = parts['train'], parts['test']
    items = encode_items(rows.select(range(min(max_rows or len(rows), len(rows)))), tok, T, dataset, unpaired)
    val_items = encode_items(val_rows, tok, T, val_dataset or f'{dataset} (5 % kept aside)', unpaired)
    max_iters = max_iters or math.ceil(epochs * len(items) / batch_size)
    sampler = Sampler(len(items), batch_size, seed)
    print(f'{dataset}: {len(items):,} {"answers" if unpaired else "pairs"}, {len(val_items):,} held out; {max_iters} iterations of {batch_size} = {max_iters * batch_size / len(items):.2f} epochs')

    # ---- this rank's part of the policy ---------------------------------------------------------------------------
    weights, grads, moments = training_bytes(policy, mesh)
    base_memory, n_params, trains = memory_now(device) - training_bytes(policy)[0], policy.num_params(), sum(p.numel() for _, p in lora.trainable(policy))
    sampler_model = parallel.sampler_of(policy, mesh) if eval_samples and needs_ref else None
    policy = parallel.shard(policy, mesh)
    optimizer = parallel.Optimizer(policy, mesh, learning_rate, (beta1, beta2), adam_eps, weight_decay)
    mesh.split_seeds(seed)

    # ---- reference: three ways to the same numbers ----------------------------------------------------------------
    def load_reference():
        return parallel.shard(load_model(ref or config['init_from'], device)[0].requires_grad_(False).eval(), mesh)  # eval: no dropout

    @contextlib.contextmanager
    def reference():
        """The reference model, wherever it comes from; a precomputed one is loaded for the moment (evaluation samples)."""
        if use_adapter:
            with lora.lora_disabled(policy):
                yield policy
        else:
            yield frozen if frozen is not None else load_reference()

    def reference_logps(items):
        """(n, 2) of the items' two answers."""
        with reference() as m, amp():
            return logps_of(m, [(p, a) for p, a, _ in items], device, micro_tokens, average, mesh)

    def precomputed(items, split):
        """The same from disk, computed if it is not there; the file names the data and the reference that it belongs to."""
        file = os.path.join(out_dir, f'ref_{split}.safetensors')
        name = hashlib.sha256(repr((ref or config['init_from'], average, str(amp_dtype), items)).encode()).digest()
        name = torch.frombuffer(bytearray(name), dtype=torch.uint8)
        if os.path.exists(file):
            stored = load_safetensors(file)
            if torch.equal(stored.get('belongs_to', name[:0]), name):
                return stored['logps'].clone()
            print(f'{file} belongs to other data or another reference: computed anew')
        logps = reference_logps(items)
        if mesh.master:  # the others have looked for the file: all took part in the log-probs
            save_safetensors(file, dict(logps=logps, belongs_to=name))
        return logps
    frozen = load_reference() if needs_ref and not use_adapter and not precompute_ref else None
    ref_logps = val_ref_logps = None
    if precompute_ref:
        ref_logps, val_ref_logps = precomputed(items, 'train'), precomputed(val_items, 'val')

    # ---- the loss of a few items ----------------------------------------------------------------------------------
    def losses_of(policy, items, ref_logps, kl):
        """(losses (b,), rewards (b, 2), log-probs (b, 2)) with gradient; ref_logps (b, 2). kto: one answer, column 0."""
        with amp():
            logp, _, mask = answer_logps(policy, [(p, a[:1] if unpaired else a) for p, a, _ in items], device)
        logps = sequence_logp(logp, mask, average).view(len(items), -1)
        ref_logps = None if ref_logps is None else ref_logps.to(device)
        if unpaired:
            label = torch.tensor([label for _, _, label in items], device=device)
            losses, rewards = kto_loss(logps[:, 0], ref_logps[:, 0], label, kl, beta, desirable_weight, undesirable_weight)
            return losses, rewards[:, None], logps.detach()
        if loss_type == 'simpo':
            losses, chosen, rejected = simpo_loss(*logps.unbind(1), beta, gamma, label_smoothing)
        elif loss_type == 'orpo':
            losses, chosen, rejected = orpo_loss(*logps.unbind(1), beta)
        else:
            losses, chosen, rejected = dpo_loss(*logps.unbind(1), *ref_logps.unbind(1), beta, loss_type, label_smoothing)
        if sft_coef:
            losses = losses - sft_coef * (sequence_logp(logp, mask, True).view(len(items), 2)[:, 0])
        return losses, torch.stack([chosen, rejected], 1), logps.detach()

    def run_batch(items, ref_logps, train):
        """The batch in micro-batches (with gradients added up when training) -> metrics."""
        if needs_ref and ref_logps is None:
            ref_logps = reference_logps(items)
        kl, found = 0.0, []
        if unpaired:  # KTO's reference point: how far the policy is from the reference on answers that have nothing to do with the prompt
            with amp():
                kl = (logps_of(policy, [(p, a[1:]) for p, a, _ in items], device, micro_tokens, average, mesh)[:, 0] - ref_logps[:, 1]).mean().clamp(min=0).item()
        lengths = [len(p) + sum(map(len, a[:1] if unpaired else a)) for p, a, _ in items]
        bins, n = mesh.deal(pack(lengths, max([micro_tokens, *lengths])), lengths), len(items) * mesh.copies(len(items))

        def loss_of(policy, bin):
            losses, rewards, logps = losses_of(policy, [items[i] for i in bin], None if ref_logps is None else ref_logps[bin], kl)
            found.append((losses.detach().float().cpu(), rewards.float().cpu(), logps.float().cpu()))
            return losses.sum() / n, {}
        if train:
            parallel.forward_backward(policy, optimizer, bins, loss_of, summed=True)
        else:
            parallel.evaluate(policy, bins, lambda policy, bin: loss_of(policy, bin)[0])
        found, bins = mesh.collect(found), mesh.collect(bins)
        losses, rewards, logps = (torch.cat(x) for x in zip(*found))
        if unpaired:
            good = torch.tensor([items[i][2] for bin in bins for i in bin])
            split = lambda x: (x[good, 0], x[~good, 0])
            right = ((rewards[:, 0] > beta * kl) == good).float()
        else:
            split = lambda x: x.unbind(1)
            right = ((rewards[:, 0] - rewards[:, 1]).sign() + 1) / 2  # step 0: no margin yet, half a point each
        out = dict(loss=losses.mean(), accuracy=right.mean())
        for name, x in (('reward', rewards), ('logp', logps)):
            out |= {f'{side}_{name}': v.mean() for side, v in zip(('chosen', 'rejected'), split(x)) if len(v)}  # kto: a batch may lack one side
        if 'chosen_reward' in out and 'rejected_reward' in out:
            out['margin'] = out['chosen_reward'] - out['rejected_reward']
        return {k: v.item() for k, v in out.items()} | ({'kto_kl': kl} if unpaired else {})

    def kl_on_samples():
        """KL(policy || reference), nats a sequence, and length, on the policy's own answers to held-out prompts, fixed seeds."""
        asked = list(dict.fromkeys(tuple(p[-(policy.config.block_size - max_new_tokens):]) for p, _, _ in val_items))[:eval_samples]
        parallel.refresh(engine, policy)
        mine = range(len(asked))[mesh.mine(len(asked))]  # each rank answers its share
        done = engine.generate([list(asked[i]) for i in mine], [infer.SamplingParams(max_tokens=max_new_tokens, temperature=temperature, seed=i) for i in mine])
        answers = mesh.collect([c.token_ids for c in done], everyone=True)
        groups = [(list(p), [a]) for p, a in zip(asked, answers)]
        lengths = [len(p) + len(a[0]) for p, a in groups]
        bins = mesh.deal(pack(lengths, max([micro_tokens, *lengths])), lengths)

        def token_logps(m):
            with amp():
                return parallel.evaluate(m, bins, lambda m, bin: answer_logps(m, [groups[i] for i in bin], device, temperature)[0])
        own = token_logps(policy)
        with reference() as m:
            d = [a - b for a, b in zip(own, token_logps(m))]
        kl = sum(mesh.collect([(torch.exp(-x) - 1 + x).sum().item() for x in d])) / len(groups) / mesh.copies(len(groups))  # k3: unbiased, never negative
        return dict(kl=kl, len=sum(map(len, answers)) / len(answers)), tok.decode(groups[0][0] + groups[0][1][0])

    def evaluate():
        """Means over held-out items, batch by batch; the KL on samples."""
        policy.eval()
        n = min(eval_iters * batch_size or len(val_items), len(val_items))
        total, seen = {}, {}
        for i in range(0, n, batch_size):
            part = val_items[i:min(i + batch_size, n)]
            for k, v in run_batch(part, None if val_ref_logps is None else val_ref_logps[i:i + len(part)], train=False).items():
                total[k], seen[k] = total.get(k, 0.0) + v * len(part), seen.get(k, 0) + len(part)
        out, sample = {k: v / seen[k] for k, v in total.items()}, ''
        if eval_samples and needs_ref:
            more, sample = kl_on_samples()
            out |= more
        policy.train()
        return out | dict(pairs=n, accuracy_95=wilson(round(out['accuracy'] * n), n)), sample

    # ---- resume, memory plan --------------------------------------------------------------------------
    start, best, first_logp = 0, float('inf'), None
    if ckpt:
        optimizer.load_state_dict(ckpt['optimizer'])
        mesh.set_rng_state(ckpt['rng'])
        sampler.load_state_dict(ckpt['data'])
        start, best, first_logp = ckpt['iter'], ckpt['best'], ckpt['first_logp']
    log = RunLog(out_dir, config, ckpt, mesh.master)
    engine = infer.Engine(sampler_model, tok, max_num_seqs=64) if sampler_model is not None else None
    frozen_bytes = sum(p.nbytes for p in frozen.parameters()) if frozen is not None else 0
    longest = max(len(p) + sum(map(len, a)) for p, a, _ in items)
    tokens = min(max(micro_tokens, longest), batch_size * longest) // tp
    planned = memory_plan(dict(weights=weights, reference=frozen_bytes, grads=grads, adam=moments,
                               activations=activation_bytes(policy.config, tokens, T), logits=K.logits_bytes(device, tokens, policy.config.vocab_size)))
    way = 'none' if not needs_ref else 'precomputed' if precompute_ref else 'adapter disabled' if use_adapter else 'frozen copy'
    print(f'{n_params / 1e6:.2f} M parameters ({trains:,} trained), reference: {way}, {device}{mesh.words()}, {amp_dtype}, {threads} threads, kernels: {K.which()}')

    # ---- loop ----------------------------------------------------------------------------------------------------
    policy.train()
    for it in range(start, max_iters + 1):
        if (it % eval_interval == 0 or it == max_iters or eval_only) and not (ckpt and it == start and not eval_only):
            seen, sample = evaluate()
            first_logp = seen['chosen_logp'] if first_logp is None else first_logp
            lo, hi = seen['accuracy_95']
            print(f"step {it}: held-out loss {seen['loss']:.4f}, accuracy {seen['accuracy']:.1%} ({lo:.1%} to {hi:.1%}), margin {seen.get('margin', 0):.3f}, "
                  f"log-prob chosen {seen['chosen_logp']:.2f} rejected {seen.get('rejected_logp', 0):.2f} nats" + (f", kl {seen['kl']:.2f} nats/seq, len {seen['len']:.1f} tok | {sample!r}" if sample else ''))
            fell = first_logp - seen['chosen_logp']
            if fell > 0.05 * abs(first_logp):
                print(f'  the chosen log-prob has fallen by {fell:.2f} nats since step 0: DPO widens the margin by pushing both down; sft_coef, a larger beta or fewer steps hold it')
            log.row(it, 'eval', chosen_logp_change=-fell, **{k: v for k, v in seen.items() if isinstance(v, (int, float))})
            check_finite(it, out_dir, val_loss=seen['loss'])
            if eval_only:
                break
            better, best = seen['loss'] < best, min(best, seen['loss'])
            parallel.save_checkpoint(os.path.join(out_dir, 'ckpt.pt'), mesh, policy, optimizer, also=os.path.join(out_dir, 'ckpt_best.pt') if better else None,
                                     sharded=sharded_ckpt, **checkpoint_keys(policy), config=config, tokenizer=tokenizer, iter=it, best=best,
                                     first_logp=first_logp, data=sampler.state_dict(), time=log.elapsed())
        if it == max_iters:
            break
        t0 = time.time()
        lr = linear_lr(it, learning_rate, warmup_iters, max_iters)
        picked = next(sampler).tolist()
        batch = [items[i] for i in picked]
        stats = run_batch(batch, None if ref_logps is None else ref_logps[picked], train=True)
        check_finite(it, out_dir, loss=stats['loss'])
        norm = parallel.clip_and_step([optimizer], [lr], grad_clip)
        dt, tokens = time.time() - t0, sum(len(p) + len(a) for p, answers, _ in batch for a in answers[:1 if unpaired else 2])
        log.row(it, 'train', grad_norm=norm, lr=lr, tokens=tokens, tok_per_s=tokens / dt, pairs_per_s=batch_size / dt, **stats)
        if it % 10 == 0:
            print(f"iter {it}/{max_iters} | loss {stats['loss']:.4f} | acc {stats['accuracy']:.1%} | margin {stats.get('margin', 0):.3f} | logp {stats.get('chosen_logp', 0):.1f} / "
                  f"{stats.get('rejected_logp', 0):.1f} | norm {norm:.2f} | lr {lr:.1e} | {dt * 1e3:.0f} ms | {tokens / dt:,.0f} tok/s | eta {eta((max_iters - it) * dt)}")

    # ---- end -----------------------------------------------------------------------------------------------------
    peak = memory_now(device, peak=True) - max(0, base_memory)
    print(f'done: best held-out loss {best:.4f}, peak memory {peak / 1e9:.2f} GB (planned {planned / 1e9:.2f}), checkpoint in {out_dir}/ckpt.pt')
    mesh.close()
