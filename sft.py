"""Supervised finetuning, and plain pretraining: maximise the log-likelihood of what the assistant wrote.

    L = - (1/|A|) sum over t in A of log p(x_t | x_<t),   A = the tokens the assistant wrote, its end token included

InstructGPT (Ouyang et al. 2022, 2203.02155), step 1 of three. How it goes:
  1. rows ({"messages"}, {"prompt","completion"}, Alpaca, {"text"}) become token ids and a mask of what is trained on
  2. each batch is packed: documents one behind the other, positions from 0 and attention inside each, no padding at all
  3. the loss is a mean over the batch's TRAINED TOKENS, whatever the number of micro-batches (not a mean of means)
  4. AdamW, warm-up then cosine, gradient clipping; evaluation and checkpoint every eval_interval
  5. a folder with train.bin / val.bin instead of rows: nanoGPT's pretraining on random crops, the same loop
Changed from the paper: nothing; it trained on prompts' completions just so.

    python sft.py config/sft_toy.py                              # CPU
    python sft.py config/pretrain_shakespeare_char.py            # nanoGPT's first example
    python sft.py config/sft_gpt2.py                             # one GPU
    torchrun --nproc_per_node=8 sft.py config/sft_gpt2.py --zero=1   # eight
    python sft.py --dataset=my.jsonl --init_from=gpt2 --show_masks=3
"""
import os
import math
import time

import numpy as np
import torch

import kernels as K
import parallel
from dataset import Sampler, collate_packed, load_dataset, pack
from tokenizer import encode_row, get_tokenizer, show_masks as coloured
from model import GPTConfig
from run import (activation_bytes, check_finite, checkpoint_keys, eta, memory_now, memory_plan, open_model,
                 open_run, peak_flops, pick_device, pick_threads, RunLog, training_bytes)

# ---------------------------------------------------------------------------------------------------------------------
# I/O
out_dir = 'out-sft'
init_from = 'scratch' # 'scratch' | 'resume' | HF name | HF directory | an out_dir
overwrite = False # start anew in an out_dir that already holds a run
eval_interval = 250 # >= 1: iterations between evaluations; a checkpoint is written at each
eval_iters = 20 # >= 0: batches an evaluation (rows: at most the whole validation set)
eval_only = False # evaluate once and stop
show_masks = 0 # >= 0: print so many rows, trained tokens in green, and stop
# data
dataset = 'data/toy/sft_train.jsonl' # rows (.jsonl, .json, .arrow ...), or a folder with train.bin and val.bin
val_dataset = '' # rows; '' keeps 5 % of dataset aside (folders: val.bin)
tokenizer = '' # 'byte' | 'gpt2' | 'char:meta.json' | directory; '' = the one of init_from or of the folder, byte from scratch
seed = 1337
# model from scratch (ignored when init_from names one)
arch = 'gpt2' # 'gpt2' | 'llama' | 'qwen2' | 'qwen3'
n_layer = 4 # >= 1: blocks
n_head = 4 # >= 1: attention heads
n_embd = 128 # >= 1: width
block_size = 256 # >= 1: context, tokens
bias = False # in LayerNorms and Linears (arch gpt2); False is a bit better and faster
dropout = 0.0 # in [0, 1): for pretraining 0 is good, for finetuning try 0.1+
# LoRA (2106.09685)
lora_r = 0 # >= 0: rank; 0 = train all weights
lora_alpha = 16.0 # > 0: the adapter is scaled by alpha / r
lora_targets = '' # HF module names, comma-separated; '' = c_attn, or q_proj,v_proj
# optimizer
max_iters = 1000 # >= 0: iterations (optimizer updates)
batch_size = 64 # >= 1: rows (or crops of block_size) an iteration, over all processes
micro_tokens = 8192 # >= 1: tokens a forward pass sees at most; smaller saves memory, the result is the same
learning_rate = 1e-3 # >= 0: peak; small models want 1e-3, GPT-2 size 2e-5 when finetuning
min_lr = 1e-4 # >= 0: about learning_rate / 10
warmup_iters = 50 # >= 0: iterations of linear warm-up
decay_lr = True # cosine to min_lr at max_iters
weight_decay = 0.1 # >= 0: AdamW's, of matrices only
beta1 = 0.9 # in [0, 1): decay of Adam's first moment
beta2 = 0.95 # in [0, 1): decay of Adam's second moment
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
# the equation


def sft_loss(logp, mask):
    """Mean negative log-likelihood of the counted tokens. logp (B, R) float, mask (B, R) bool -> scalar; 0 for an empty
    mask. logp [[-1, -3]], mask [[True, False]] -> 1.0."""
    return -torch.where(mask, logp, 0.0).sum() / mask.sum().clamp(min=1)


def cosine_lr(it, peak, floor, warmup, total):
    """nanoGPT's schedule: linear warm-up, then cosine from peak to floor at iteration `total`."""
    if it < warmup:
        return peak * (it + 1) / (warmup + 1)
    ratio = min(1.0, (it - warmup) / max(1, total - warmup))
    return floor + 0.5 * (1 + math.cos(math.pi * ratio)) * (peak - floor)


# ---------------------------------------------------------------------------------------------------------------------
# data: rows packed without padding, or nanoGPT's random crops


def encode_rows(rows, tok, block_size, name):
    """Rows -> ([ids], [trained]). A row longer than block_size is cut; one with nothing left to train on is dropped;
    both are counted in words. ValueError names file and row of a malformed one."""
    ids, trained, cut, dropped = [], [], 0, 0
    for i, row in enumerate(rows):
        try:
            x, y = encode_row(row, tok)
        except ValueError as e:
            raise ValueError(f'{name}, row {i + 1}: {e}') from None
        cut += len(x) > block_size
        x, y = x[:block_size], y[:block_size]
        if not any(y[1:]):
            dropped += 1
            continue
        ids.append(np.asarray(x, dtype=np.int64))
        trained.append(np.asarray(y, dtype=bool))
    if not ids:
        raise ValueError(f'{name}: no row of {len(rows)} has a trained token within block_size {block_size}: raise --block_size or shorten the prompts')
    if cut or dropped:
        print(f'{name}: {cut} rows cut at {block_size} tokens, {dropped} of them dropped (nothing left to train on)')
    return ids, trained


def packed_batches(ids, trained, rows, micro_tokens, mesh=parallel.ALONE):
    """One batch of rows -> [(idx, targets, doc)] micro-batches, each (1, N) with N <= micro_tokens (or one longer row); of
    several replicas each gets its share of them."""
    lengths = [len(ids[i]) for i in rows]
    out = []
    for bin in mesh.deal(pack(lengths, max([micro_tokens, *lengths])), lengths):
        mine = [rows[i] for i in bin]
        b = collate_packed([ids[i] for i in mine], [trained[i] for i in mine], [list(range(len(mine)))], sum(lengths[i] for i in bin))
        out.append((b['idx'], b['targets'], b['doc']))
    return out


def crops(tokens, n, block_size, generator, micro_tokens, mesh=parallel.ALONE):
    """n random crops of nanoGPT's token file -> [(idx, targets, None)] micro-batches; of several replicas each gets its share."""
    at = torch.randint(len(tokens) - block_size, (n,), generator=generator).tolist()
    x = torch.stack([torch.from_numpy(tokens[i:i + block_size + 1].astype(np.int64)) for i in at])
    k = max(1, micro_tokens // block_size)
    bins = mesh.deal([list(range(i, min(i + k, n))) for i in range(0, n, k)], [block_size] * n)
    return [(x[bin, :-1], x[bin, 1:], None) for bin in bins]


# ---------------------------------------------------------------------------------------------------------------------
if __name__ == '__main__':
    # ---- process and data ----------------------------------------------------------------------------------------
    config['stage'] = 'sft'
    device, amp_dtype = pick_device(device, dtype)
    K.use(kernels)
    parallel.accept('sft', tp, pp, cp, compile)
    mesh = parallel.init(tp, pp, cp, zero, dist_timeout, device, seed, quiet=True)  # this process alone, or torchrun's
    device = mesh.device
    if not os.path.exists(dataset):
        raise ValueError(f'{dataset}: no such data; python {os.path.dirname(dataset) or "data/toy"}/prepare.py makes it (or name a file of your own)')
    text = os.path.isdir(dataset) and os.path.exists(os.path.join(dataset, 'train.bin'))
    ckpt = None if show_masks else open_run(out_dir, init_from, overwrite, 'sft', mesh)

    # ---- model ---------------------------------------------------------------------------------------------------
    scratch = None
    if init_from == 'scratch':
        meta = os.path.join(dataset, 'meta.json')
        tokenizer = tokenizer or (('char:' + meta if os.path.exists(meta) else 'gpt2') if text else 'byte')
        tok = get_tokenizer(tokenizer)
        biases = dict(bias=bias, qkv_bias=bias, attn_out_bias=bias) if arch == 'gpt2' else {}
        scratch = GPTConfig.of(arch, n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, vocab_size=tok.vocab_size,
                               bos_token_id=tok.eot, eos_token_id=tok.eot, **biases)
    model, tokenizer = open_model(init_from, ckpt, 'lm', tokenizer, scratch, lora_r, lora_alpha, dropout, lora_targets)
    tok = get_tokenizer(tokenizer)
    if tok.vocab_size > model.config.vocab_size:
        raise ValueError(f'tokenizer {tokenizer!r} has {tok.vocab_size} tokens, the model {model.config.vocab_size}: give the tokenizer that belongs to it, --tokenizer=...')
    model.config.dropout, T = dropout, min(block_size, model.config.block_size)
    model = model.to(device)
    threads = pick_threads(threads, model.num_params(), device)

    # ---- rows or tokens ------------------------------------------------------------------------------------------
    if text:
        train_tokens, val_tokens = (np.memmap(os.path.join(dataset, f'{s}.bin'), dtype=np.uint16, mode='r') for s in ('train', 'val'))
        if int(train_tokens[:1 << 20].max()) >= model.config.vocab_size:
            raise ValueError(f'{dataset}/train.bin holds token {int(train_tokens[:1 << 20].max())}, the model has {model.config.vocab_size}: prepare it with the tokenizer of the model')
        print(f'{dataset}: {len(train_tokens):,} training tokens, {len(val_tokens):,} validation tokens; {batch_size} x {T} = {batch_size * T:,} tokens an iteration')
        generator = torch.Generator()
    else:
        train_rows, val_rows = load_dataset(dataset), load_dataset(val_dataset) if val_dataset else None
        if val_rows is None:
            parts = train_rows.train_test_split(0.05, seed)
            train_rows, val_rows = parts['train'], parts['test']
        ids, trained = encode_rows(train_rows, tok, T, dataset)
        if show_masks:
            for i in range(min(show_masks, len(ids))):
                print(coloured(ids[i].tolist(), trained[i].tolist(), tok) + '\n' + '-' * 80)
            raise SystemExit
        val_ids, val_trained = encode_rows(val_rows, tok, T, val_dataset or f'{dataset} (5 % kept aside)')
        sampler = Sampler(len(ids), batch_size, seed)
        n = sum(map(len, ids))
        print(f'{dataset}: {len(ids):,} rows, {n:,} tokens, {sum(int(t.sum()) for t in trained):,} trained on; {batch_size} rows = {n / len(ids) * batch_size:,.0f} tokens an iteration')

    def training_batch(it):
        """Iteration `it`'s micro-batches: a function of (seed, it) for crops, of the sampler's cursor for rows."""
        if text:
            return crops(train_tokens, batch_size, T, generator.manual_seed(seed * 1000003 + it), micro_tokens, mesh)
        return packed_batches(ids, trained, next(sampler), micro_tokens, mesh)

    def validation():
        """The same micro-batches each time, and how many replicas do each of them (see mesh.copies)."""
        for k in range(eval_iters if text else min(eval_iters, math.ceil(len(val_ids) / batch_size))):
            rows = list(range(len(val_ids)))[k * batch_size:(k + 1) * batch_size] if not text else range(batch_size)
            for micro in (crops(val_tokens, batch_size, T, generator.manual_seed(k), micro_tokens, mesh) if text else
                          packed_batches(val_ids, val_trained, rows, micro_tokens, mesh)):
                yield *micro, mesh.copies(len(rows))

    def loss_of(model, micro):
        """(mean loss, {}) over the trained tokens of a micro-batch."""
        x, y, d = micro[:3]
        with torch.autocast(device.type, amp_dtype, enabled=amp_dtype != torch.float32):
            return model(x.to(device), y.to(device), doc=None if d is None else d.to(device))[1], {}

    def evaluate():
        """Mean loss over trained tokens."""
        model.eval()
        pairs = parallel.evaluate(model, validation(), lambda model, micro: (loss_of(model, micro)[0], (micro[1] >= 0).sum() / micro[3]))
        total = count = 0
        for loss, n in mesh.collect([(loss.item(), n.item()) for loss, n in pairs]):
            total += loss * n
            count += n
        model.train()
        return total / max(1, count)

    # ---- optimizer, resume ---------------------------------------------------------------------------------------
    weights, grads, moments = training_bytes(model, mesh)
    base_memory = memory_now(device) - training_bytes(model)[0]
    n_params, trains = model.num_params(), sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = model.flops_per_token(T)
    model = parallel.shard(model, mesh)
    optimizer = parallel.Optimizer(model, mesh, learning_rate, (beta1, beta2), weight_decay=weight_decay)
    mesh.split_seeds(seed)
    start, best = 0, float('inf')
    if ckpt:
        optimizer.load_state_dict(ckpt['optimizer'])
        mesh.set_rng_state(ckpt['rng'])
        start, best = ckpt['iter'], ckpt['best']
        if not text:
            sampler.load_state_dict(ckpt['data'])
    log = RunLog(out_dir, config, ckpt, mesh.master)
    tokens = min(micro_tokens, batch_size * T) // (tp * cp)
    planned = memory_plan(dict(weights=weights, grads=grads, adam=moments, activations=activation_bytes(model.config, tokens, T),
                               logits=K.logits_bytes(device, tokens, model.config.vocab_size)))
    print(f'{n_params / 1e6:.2f} M parameters ({trains / 1e6:.2f} M trained) on {device}{mesh.words()}, {amp_dtype}, {threads} threads, kernels: {K.which()}')
    if compile:
        model.compile_blocks()

    # ---- loop ----------------------------------------------------------------------------------------------------
    model.train()
    rates = []
    for it in range(start, max_iters + 1):
        if (it % eval_interval == 0 or it == max_iters or eval_only) and not (ckpt and it == start and not eval_only):
            val = evaluate()
            print(f'step {it}: val loss {val:.4f} nats/token')
            log.row(it, 'eval', loss=val)
            check_finite(it, out_dir, val_loss=val)
            if eval_only:
                break
            better, best = val < best, min(val, best)
            parallel.save_checkpoint(os.path.join(out_dir, 'ckpt.pt'), mesh, model, optimizer, also=os.path.join(out_dir, 'ckpt_best.pt') if better else None,
                                     sharded=sharded_ckpt, **checkpoint_keys(model), config=config, tokenizer=tokenizer, iter=it, best=best,
                                     data=None if text else sampler.state_dict(), time=log.elapsed())
        if it == max_iters:
            break
        t0 = time.time()
        lr = cosine_lr(it, learning_rate, min_lr, warmup_iters, max_iters) if decay_lr else learning_rate
        micro = training_batch(it)
        loss = parallel.forward_backward(model, optimizer, micro, loss_of, [int((y >= 0).sum()) for _, y, _ in micro])['loss']  # a mean over trained tokens
        check_finite(it, out_dir, loss=loss)
        norm = parallel.clip_and_step([optimizer], [lr], grad_clip)
        dt, n = time.time() - t0, sum(mesh.collect([x.numel() for x, _, _ in micro]))
        rates.append(n / dt)
        log.row(it, 'train', loss=loss, grad_norm=norm, lr=lr, tokens=n, tok_per_s=n / dt)
        if it % 10 == 0:
            print(f'iter {it}/{max_iters} | loss {loss:.4f} | norm {norm:.2f} | lr {lr:.1e} | {dt * 1e3:.0f} ms | {n / dt:,.0f} tok/s | eta {eta((max_iters - it) * dt)}')

    # ---- end -----------------------------------------------------------------------------------------------------
    peak = memory_now(device, peak=True) - max(0, base_memory)
    if rates:
        rate = sorted(rates)[len(rates) // 2]
        print(f'{rate:,.0f} tok/s on the median, {flops * rate / peak_flops(device) / mesh.world:.0%} of what one matrix product after the other would reach here')
    print(f'done: best val loss {best:.4f}, peak memory {peak / 1e9:.2f} GB (planned {planned / 1e9:.2f}), checkpoint in {out_dir}/ckpt.pt')
    mesh.close()
