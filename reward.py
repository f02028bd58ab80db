"""The reward model: learn from pairs which of two answers people (or a gold scorer) prefer.

    L = - mean log sigmoid(r(x, chosen) - r(x, rejected) - margin)  +  center * mean (r_chosen + r_rejected)^2

Bradley & Terry 1952; Christiano et al. 2017 (1706.03741); Stiennon et al. 2020 (2009.01325); margin and centring as in
Llama 2 (2307.09288) and Eisenstein et al. 2023 (2312.09244). How it goes:
  1. a language model gets a scalar head, N(0, 1/sqrt(d+1)); the reward is read at the last real token, the end token
  2. chosen and rejected of a micro-batch go through ONE forward without padding, in which the prompt they share is computed once
  3. one epoch, learning rate linear to 0 (more epochs overfit: 2009.01325 section 3.4)
  4. held-out accuracy with its interval, margin, calibration, correlation of reward and length, histograms: report.json
  5. gain and bias: rewards of samples of the initial policy get mean 0 and standard deviation 1, folded into the weights
Changed from the papers: ties are either left out or trained with both orders at half weight (ties='half').

    python reward.py config/reward_toy.py                        # CPU
    python reward.py config/reward_gpt2.py                       # one GPU
    torchrun --nproc_per_node=8 reward.py config/reward_gpt2.py --zero=1   # eight
    python reward.py --dataset=my_pairs.jsonl --init_from=gpt2
"""
import os
import math
import time

import numpy as np
import torch
from torch.nn import functional as F

import infer
import kernels as K
import parallel
from dataset import Sampler, load_dataset, pack
from tokenizer import encode_pair, get_tokenizer
from model import Layout, write_json
from run import (activation_bytes, check_finite, checkpoint_keys, eta, load_model, memory_now, memory_plan,
                 open_model, open_run, pick_device, pick_threads, RunLog, training_bytes)

# ---------------------------------------------------------------------------------------------------------------------
# I/O
out_dir = 'out-reward'
init_from = 'out-sft' # 'resume' | HF name | HF directory | an out_dir: the language model that gets the head
overwrite = False # start anew in an out_dir that already holds a run
eval_interval = 100 # >= 1: iterations between evaluations; a checkpoint is written at each
eval_iters = 0 # >= 0: batches an evaluation; 0 = the whole validation set
eval_only = False # evaluate once and stop
# data
dataset = 'data/toy/pref_train.jsonl' # rows {"prompt", "chosen", "rejected"}, optionally "margin", "tie": true
val_dataset = '' # '' keeps 5 % of dataset aside
tokenizer = '' # '' = the one of init_from
block_size = 0 # >= 0: tokens of prompt + answer; 0 = the model's; a longer prompt loses its beginning
max_rows = 0 # >= 0: train on the first so many pairs; 0 = all
seed = 1337
# algorithm
center = 0.0 # >= 0: weight of (r_chosen + r_rejected)^2; 0.01 keeps rewards around 0
margin_scale = 1.0 # >= 0: multiplies a row's "margin"
ties = 'drop' # 'drop' | 'half': rows with "tie": true are left out, or pulled together
normalize = 'samples' # after training: 'samples' of the initial policy | 'responses' of the data | 'none'
normalize_n = 256 # >= 2: samples (or responses) that give gain and bias
max_new_tokens = 64 # >= 1: of those samples
temperature = 1.0 # > 0: of those samples
# LoRA (2106.09685)
lora_r = 0 # >= 0: rank; 0 = train all weights
lora_alpha = 16.0 # > 0: the adapter is scaled by alpha / r
lora_dropout = 0.0 # in [0, 1): on the adapter's input
lora_targets = '' # HF module names, comma-separated; '' = c_attn, or q_proj,v_proj
# optimizer
epochs = 1.0 # > 0: passes over the pairs; ignored when max_iters is set
max_iters = 0 # >= 0: 0 = as many as epochs says
batch_size = 64 # >= 1: pairs an iteration, over all processes
micro_tokens = 8192 # >= 1: tokens a forward pass sees at most
learning_rate = 5e-5 # >= 0: linear to 0
warmup_iters = 0 # >= 0: iterations of linear warm-up
weight_decay = 0.0 # >= 0: AdamW's, of matrices only
beta1 = 0.9 # in [0, 1): decay of Adam's first moment
beta2 = 0.999 # in [0, 1): decay of Adam's second moment
adam_eps = 1e-5 # > 0: large on purpose: small first steps [lm-human-preferences]
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
cp = 1 # >= 1: context parallel: the tokens of a micro-batch shared out, for long ones
zero = 0 # in [0, 3]: what the replicas share out: 0 nothing | 1 optimizer | 2 + gradients | 3 + weights
dist_timeout = 120 # > 0: seconds that one rank waits for another; then the run ends and says which, and in what
sharded_ckpt = False # each rank writes its own part of ckpt.pt; python parallel.py merge OUT_DIR joins them
# ---------------------------------------------------------------------------------------------------------------------
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read()) # overrides from command line or config file
config = {k: globals()[k] for k in config_keys} # will be useful for logging
# ---------------------------------------------------------------------------------------------------------------------
# the equations


def bradley_terry_loss(chosen, rejected, margin=None):
    """-log sigmoid(chosen - rejected - margin), mean over pairs. chosen, rejected (B,) rewards; margin float or (B,).
    Bradley-Terry: P(chosen beats rejected) = sigmoid(r_chosen - r_rejected). chosen [1], rejected [0] -> 0.3133."""
    return -F.logsigmoid(chosen - rejected - (0.0 if margin is None else margin)).mean()


def pair_losses(chosen, rejected, margin, tie, center):
    """(B,) loss of each pair: Bradley-Terry, a tie as the mean over both orders, plus the centring term."""
    d = chosen - rejected
    win, lose = -F.logsigmoid(d - margin), -F.logsigmoid(-d - margin)
    return torch.where(tie, 0.5 * (win + lose), win) + center * (chosen + rejected) ** 2


def wilson(k, n, z=1.96):
    """95 % interval of a share k/n (Wilson 1927): sensible near 0 and 1, where the normal one is not. 60 of 100 -> (0.502, 0.691)."""
    p, w = k / n, z * z / n
    mid, half = (p + w / 2) / (1 + w), z * math.sqrt(p * (1 - p) / n + w / (4 * n)) / (1 + w)
    return mid - half, mid + half


def calibration(margins, bins=10):
    """Is sigmoid(margin) the share of pairs that it claims? margins (B,): r_chosen - r_rejected. The model's confidence in
    its own choice, sigmoid(|margin|) in [0.5, 1], against how often that choice is right. Returns (ECE, rows of
    (from, to, pairs, mean confidence, accuracy)). Guo et al. 2017 (1706.04599)."""
    confidence, right = 1 / (1 + np.exp(-np.abs(margins))), margins > 0
    edges = np.linspace(0.5, 1.0, bins + 1)
    which = np.clip(np.digitize(confidence, edges) - 1, 0, bins - 1)
    rows = [(float(edges[b]), float(edges[b + 1]), int(m.sum()), float(confidence[m].mean()), float(right[m].mean()))
            for b in range(bins) if (m := which == b).any()]
    return sum(n * abs(conf - acc) for _, _, n, conf, acc in rows) / len(margins), rows


def correlation(x, y):
    """Pearson's r; 0 where one side is constant."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if scale else 0.0


def linear_lr(it, peak, warmup, total):
    """Linear warm-up, then linear to 0 at iteration `total`."""
    return peak * min((it + 1) / (warmup + 1), max(0.0, (total - it) / max(1, total - warmup)))


# ---------------------------------------------------------------------------------------------------------------------
# data


def encode_pairs(rows, tok, block_size, name, ties):
    """Rows -> [(chosen ids, rejected ids, answer lengths, margin, tie)]. A prompt that does not fit loses its beginning
    (the answer and its end token must stay); a pair whose answer alone is too long is dropped and counted."""
    pairs, cut, dropped, tied = [], 0, 0, 0
    for i, row in enumerate(rows):
        if row.get('tie') and ties == 'drop':
            tied += 1
            continue
        try:
            prompt, chosen, rejected = encode_pair(row, tok)
        except ValueError as e:
            raise ValueError(f'{name}, row {i + 1}: {e}') from None
        longest = max(len(chosen), len(rejected))
        if longest >= block_size:
            dropped += 1
            continue
        cut += len(prompt) + longest > block_size
        prompt = prompt[-(block_size - longest):]
        pairs.append((prompt + chosen, prompt + rejected, len(chosen), len(rejected), float(row.get('margin') or 0.0), bool(row.get('tie'))))
    if not pairs:
        raise ValueError(f'{name}: no usable pair of {len(rows)} within block_size {block_size} ({dropped} too long, {tied} ties)')
    if cut or dropped or tied:
        print(f'{name}: {cut} prompts cut on the left, {dropped} pairs dropped (answer longer than {block_size}), {tied} ties left out')
    return pairs


def packed_rewards(model, sequences, device):
    """Rewards (S,) of token lists, read at the last token of each, by one forward without padding. What a sequence and the one before
    it begin with is computed ONCE: a pair's prompt, say.

        flat tokens   p p p a a | b b b | ...        what embeddings, linear layers and norms see: N = P + 2 + 3
        attention     p p p a a | p p p b b b | ...  gathered for the attention alone"""
    sequences = [np.asarray(s, np.int64) for s in sequences]
    lengths = torch.tensor([len(s) for s in sequences])
    if getattr(model, 'mesh', parallel.ALONE).cp.size > 1:  # cut along the context, where no token can belong to two sequences
        idx, doc = torch.from_numpy(np.concatenate(sequences))[None], torch.arange(len(sequences)).repeat_interleave(lengths)[None]
        return model(idx.to(device), doc=doc.to(device))[0][0, (lengths.cumsum(0) - 1).to(device)]
    tokens, pos, gather, slot, n, m, before = [], [], [], [], 0, 0, sequences[0][:0]
    path = before
    for s in sequences:
        k = min(len(s) - 1, len(before))  # its last token is always its own
        k = int(np.argmin(np.append(s[:k] == before[:k], False)))  # so many are the same
        path = np.concatenate([path[:k], np.arange(n, n + len(s) - k)])
        tokens.append(s[k:]), pos.append(np.arange(k, len(s))), gather.append(path), slot.append(np.arange(m + k, m + len(s)))
        n, m, before = n + len(s) - k, m + len(s), s
    extra = np.zeros(K.extra_rows(n), np.int64)  # dummy rows that nobody reads: few shapes for oneDNN
    tokens.append(extra), pos.append(extra), slot.append(extra)
    last = torch.tensor([path[-1] for path in gather], device=device)
    tokens, pos, gather, slot = (torch.from_numpy(np.concatenate(x)).to(device) for x in (tokens, pos, gather, slot))
    at = Layout((1, m), torch.device(device), doc=torch.arange(len(lengths)).repeat_interleave(lengths)[None].to(device))
    return model.values(model.hidden(tokens, pos, at.through(gather, slot).attend())[last])


def reward_of(model, sequences, device, micro_tokens, mesh=parallel.ALONE):
    """The same for any number of sequences, without gradient, in micro-batches (of several replicas each does its share); float32
    on the CPU, in their order."""
    out = torch.empty(len(sequences))
    lengths = [len(s) for s in sequences]
    bins = mesh.deal(pack(lengths, max([micro_tokens, *lengths])), lengths)
    found = parallel.evaluate(model, bins, lambda model, bin: packed_rewards(model, [sequences[i] for i in bin], device).float().cpu())
    for bin, r in mesh.collect(list(zip(bins, found))):
        out[bin] = r.cpu()
    return out


# ---------------------------------------------------------------------------------------------------------------------
if __name__ == '__main__':
    # ---- process, model, data ------------------------------------------------------------------------------------
    config['stage'] = 'reward'
    device, amp_dtype = pick_device(device, dtype)
    K.use(kernels)
    parallel.accept('reward', tp, pp, cp, compile)
    mesh = parallel.init(tp, pp, cp, zero, dist_timeout, device, seed, quiet=True)  # this process alone, or torchrun's
    device = mesh.device
    for key, value, known in (('ties', ties, ('drop', 'half')), ('normalize', normalize, ('samples', 'responses', 'none'))):
        if value not in known:
            raise ValueError(f'{key} {value!r}: expected one of {", ".join(known)}')
    if not os.path.exists(dataset):
        raise ValueError(f'{dataset}: no such data; python {os.path.dirname(dataset) or "data/toy"}/prepare.py makes it (or name a file of your own)')
    ckpt = open_run(out_dir, init_from, overwrite, 'reward', mesh)
    if init_from == 'scratch':
        raise ValueError('a reward model starts from a language model: --init_from=out-sft (made by python sft.py config/sft_toy.py), a name or a directory')
    model, tokenizer = open_model(init_from, ckpt, 'scalar', tokenizer, None, lora_r, lora_alpha, lora_dropout, lora_targets)
    tok = get_tokenizer(tokenizer)
    if tok.vocab_size > model.config.vocab_size:
        raise ValueError(f'tokenizer {tokenizer!r} has {tok.vocab_size} tokens, the model {model.config.vocab_size}: give the tokenizer that belongs to it, --tokenizer=...')
    model.config.dropout, T = 0.0, min(block_size or model.config.block_size, model.config.block_size)
    model = model.to(device)
    threads = pick_threads(threads, model.num_params(), device)
    rows, val_rows = load_dataset(dataset), load_dataset(val_dataset) if val_dataset else None
    if val_rows is None:
        parts = rows.train_test_split(0.05, seed)
        rows, val_rows = parts['train'], parts['test']
    pairs = encode_pairs(rows.select(range(min(max_rows or len(rows), len(rows)))), tok, T, dataset, ties)
    val_pairs = encode_pairs(val_rows, tok, T, val_dataset or f'{dataset} (5 % kept aside)', 'drop')
    max_iters = max_iters or math.ceil(epochs * len(pairs) / batch_size)
    sampler = Sampler(len(pairs), batch_size, seed)
    print(f'{dataset}: {len(pairs):,} pairs, {len(val_pairs):,} held out; {max_iters} iterations of {batch_size} = {max_iters * batch_size / len(pairs):.2f} epochs')

    def evaluate(part):
        """What there is to say about a reward model on held-out pairs; see the glossary of the README."""
        model.eval()
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            r = reward_of(model, [s for p in part for s in p[:2]], device, micro_tokens, mesh).view(-1, 2)
        model.train()
        chosen, rejected = r[:, 0].numpy().astype(float), r[:, 1].numpy().astype(float)
        margins = chosen - rejected
        ece, table = calibration(margins)
        right = int((margins > 0).sum())
        edges = np.histogram_bin_edges(r.numpy(), 30)
        return dict(loss=float(np.logaddexp(0, -margins).mean()), accuracy=right / len(part), accuracy_95=wilson(right, len(part)), pairs=len(part),
                    margin=float(margins.mean()), ece=ece, reliability=table, length_correlation=correlation(r.flatten(), [n for p in part for n in p[2:4]]),
                    longer_is_chosen=float(np.mean([p[2] > p[3] for p in part])), reward_mean=float(r.mean()), reward_std=float(r.std()),
                    histogram=dict(edges=edges.tolist(), chosen=np.histogram(chosen, edges)[0].tolist(), rejected=np.histogram(rejected, edges)[0].tolist()))

    # ---- optimizer, resume ---------------------------------------------------------------------------------------
    if ckpt:
        with torch.no_grad():  # the weights as trained, before gain and bias
            model.score.weight.copy_(ckpt['raw_score'])
        model.config.reward_bias = 0.0
    weights, grads, moments = training_bytes(model, mesh)
    base_memory, n_params = memory_now(device) - training_bytes(model)[0], model.num_params()
    model = parallel.shard(model, mesh)
    optimizer = parallel.Optimizer(model, mesh, learning_rate, (beta1, beta2), adam_eps, weight_decay)
    mesh.split_seeds(seed)
    start, best = 0, 0.0
    if ckpt:
        optimizer.load_state_dict(ckpt['optimizer'])
        mesh.set_rng_state(ckpt['rng'])
        sampler.load_state_dict(ckpt['data'])
        start, best = ckpt['iter'], ckpt['best']
    log = RunLog(out_dir, config, ckpt, mesh.master)
    longest = max(len(p[0]) + len(p[1]) for p in pairs)
    planned = memory_plan(dict(weights=weights, grads=grads, adam=moments, activations=activation_bytes(model.config, min(max(micro_tokens, longest), batch_size * longest) // (tp * cp), T)))
    print(f'{n_params / 1e6:.2f} M parameters on {device}{mesh.words()}, {amp_dtype}, {threads} threads, kernels: {K.which()}')
    if compile:
        model.compile_blocks()

    def score_weight():
        return parallel.full_state(model, keep=lambda name: name == 'score.weight')['score.weight'].clone()

    def checkpoint(it, raw, better=False):
        parallel.save_checkpoint(os.path.join(out_dir, 'ckpt.pt'), mesh, model, optimizer, also=os.path.join(out_dir, 'ckpt_best.pt') if better else None,
                                 sharded=sharded_ckpt, **checkpoint_keys(model), raw_score=raw.cpu(), config=config, tokenizer=tokenizer, iter=it,
                                 best=best, data=sampler.state_dict(), time=log.elapsed())

    def loss_of(model, mine):
        """The share of some pairs in the batch's loss; how many are right, the sum of their margins."""
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            r = packed_rewards(model, [s for p in mine for s in p[:2]], device).view(-1, 2)
        margins, tie = torch.tensor([margin_scale * p[4] for p in mine], device=device), torch.tensor([p[5] for p in mine], device=device)
        d = (r[:, 0] - r[:, 1]).detach()
        return pair_losses(r[:, 0], r[:, 1], margins, tie, center).sum() / pairs_a_step, dict(right=(d > 0).sum(), margin=d.sum())
    pairs_a_step = batch_size * mesh.copies(batch_size)

    # ---- loop ----------------------------------------------------------------------------------------------------
    model.train()
    for it in range(start, max_iters + 1):
        if (it % eval_interval == 0 or it == max_iters or eval_only) and not (ckpt and it == start and not eval_only and it < max_iters):
            seen = evaluate(val_pairs[:eval_iters * batch_size or None])
            lo, hi = seen['accuracy_95']
            print(f"step {it}: held-out accuracy {seen['accuracy']:.1%} ({lo:.1%} to {hi:.1%}), loss {seen['loss']:.4f}, margin {seen['margin']:.3f}, "
                  f"ece {seen['ece']:.3f}, length correlation {seen['length_correlation']:+.2f}")
            log.row(it, 'eval', **{k: v for k, v in seen.items() if isinstance(v, (int, float))})
            check_finite(it, out_dir, val_loss=seen['loss'])
            if eval_only:
                break
            better, best = seen['accuracy'] > best, max(best, seen['accuracy'])
            checkpoint(it, score_weight(), better)
        if it == max_iters:
            break
        t0 = time.time()
        lr = linear_lr(it, learning_rate, warmup_iters, max_iters)
        batch = [pairs[i] for i in next(sampler)]
        lengths = [len(p[0]) + len(p[1]) for p in batch]
        micros = [[batch[i] for i in bin] for bin in mesh.deal(pack(lengths, max([micro_tokens, *lengths])), lengths)]
        found = parallel.forward_backward(model, optimizer, micros, loss_of, summed=True)
        loss, accuracy, margin, tokens = found['loss'], found['right'] / pairs_a_step, found['margin'] / pairs_a_step, sum(lengths)
        check_finite(it, out_dir, loss=loss)
        norm = parallel.clip_and_step([optimizer], [lr], grad_clip)
        dt = time.time() - t0
        log.row(it, 'train', loss=loss, accuracy=accuracy, margin=margin, grad_norm=norm, lr=lr, tokens=tokens, tok_per_s=tokens / dt)
        if it % 10 == 0:
            print(f'iter {it}/{max_iters} | loss {loss:.4f} | acc {accuracy:.1%} | margin {margin:.3f} | norm {norm:.2f} | lr {lr:.1e} | '
                  f'{dt * 1e3:.0f} ms | {tokens / dt:,.0f} tok/s | eta {eta((max_iters - it) * dt)}')

    # ---- gain and bias, report -----------------------------------------------------------------------------------
    if not eval_only and normalize != 'none':
        sequences = [s for p in pairs for s in p[:2]][:normalize_n]
        if normalize == 'samples':
            policy_name = (ckpt['config'] if ckpt else config)['init_from']
            policy = load_model(policy_name, device)[0].eval()
            engine = infer.Engine(policy, tok, max_num_seqs=64)
            prompts = [p[:-a] for p, _, a, _, _, _ in (pairs[i % len(pairs)] for i in range(normalize_n))]
            prompts = [p[-(T - max_new_tokens):] for p in prompts]
            mine = range(len(prompts))[mesh.mine(len(prompts))]  # each rank answers its share
            done = engine.generate([prompts[i] for i in mine], [infer.SamplingParams(max_tokens=max_new_tokens, temperature=temperature, seed=seed + i) for i in mine])
            sequences = mesh.collect([prompts[mine[c.prompt_index]] + c.token_ids for c in done], everyone=True)
            del engine, policy
        r = reward_of(model, sequences, device, micro_tokens, mesh)
        gain = 1 / r.std(correction=0).clamp(min=1e-6).item()
        raw_score, bias = score_weight(), -gain * r.mean().item()
        parallel.set_weight(model, 'score.weight', raw_score * gain)
        model.config.reward_bias = bias
        r = reward_of(model, sequences, device, micro_tokens, mesh)
        print(f'normalised on {len(sequences)} {normalize}: gain {gain:.3f}, bias {bias:+.3f}; their rewards now have mean {r.mean():.4f} and std {r.std(correction=0):.4f}')
        checkpoint(max_iters, raw_score)
    seen = evaluate(val_pairs)
    if mesh.master:
        write_json(os.path.join(out_dir, 'report.json'), seen)
    print('reliability: confidence of its choice | how often right | pairs')
    for lo, hi, n, conf, acc in seen['reliability']:
        print(f'  {lo:.2f}-{hi:.2f}: {conf:.3f} | {acc:.3f} | {n}')
    peak = memory_now(device, peak=True) - max(0, base_memory)
    print(f"done: held-out accuracy {seen['accuracy']:.1%}, peak memory {peak / 1e9:.2f} GB (planned {planned / 1e9:.2f}), checkpoint in {out_dir}/ckpt.pt, report in {out_dir}/report.json")
    mesh.close()
