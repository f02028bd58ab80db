"""Supervised finetuning, and plain pretraining: maximise the log-likelihood of what the assistant wrote.

    L = - (1/|A|) sum over t in A of log p(x_t | x_<t),   A = the tokens the assistant wrote, its end token
    included

InstructGPT (Ouyang et al. 2022, 2203.02155), step 1 of three. How it goes:
  1. rows ({"messages"}, {"prompt", "completion"}, Alpaca, {"text"}) become token ids and a mask of what is
     trained on; a folder with train.bin and val.bin instead of rows is nanoGPT's pretraining, on random crops
  2. a batch is packed: documents one after the other, positions from 0 and attention inside each, no padding
     at all
  3. the loss is a mean over the batch's TRAINED TOKENS, however many micro-batches it takes (not a mean of
     means)
  4. AdamW, warm-up then cosine, gradient clipping
Changed from the paper: nothing.

    python sft.py config/sft_toy.py                              # CPU
    python sft.py config/pretrain_shakespeare_char.py            # nanoGPT's first example
    python sft.py config/sft_gpt2.py                             # one GPU
    torchrun --nproc_per_node=8 sft.py config/sft_gpt2.py --zero=1   # eight
    python sft.py --dataset=my.jsonl --init_from=gpt2 --show_masks=3
"""
import os
import math

os.environ.setdefault('GOMP_SPINCOUNT', '2000') # idle CPU threads soon sleep: python bench.py neighbour
import numpy as np
import torch

import parallel
from dataset import collate_packed
from model import GPTConfig
from run import check_finite, encode_all, Run
from tokenizer import encode_row, get_tokenizer, show_masks as coloured

# -----------------------------------------------------------------------------------------------------------
# I/O
out_dir = 'out-sft'
init_from = 'scratch' # 'scratch' | 'resume' | HF name | HF or PEFT directory | an out_dir
overwrite = False # replace the run that out_dir already holds
eval_interval = 250 # >= 1: iterations between evaluations; a checkpoint is written at each
eval_iters = 20 # >= 0: batches an evaluation; 0 = the whole validation set
eval_only = False # evaluate once and stop
save_minutes = 5.0 # >= 0: minutes between checkpoints besides those of evaluations; 0 = evaluations only
log_to = '' # also 'tensorboard', 'wandb' or FILE.py with log(step, split, metrics), by comma
show_masks = 0 # >= 0: print this many rows, trained tokens in green, and stop
# data
dataset = 'data/toy/sft_train.jsonl' # rows (.jsonl, .arrow ...), or a folder with train.bin and val.bin
val_dataset = '' # '' keeps 5 % of dataset aside
tokenizer = '' # 'byte' | 'gpt2' | 'char:meta.json' | directory; '' = init_from's, the folder's, else byte
block_size = 0 # >= 0: tokens of a row or crop; longer rows are cut; 0 = the model's (from scratch: 256)
seed = 1337 # in [0, 2147483648): of order, samples, new weights, dropout
# model from scratch (ignored when init_from names one; block_size is its context)
arch = 'gpt2' # 'gpt2' | 'llama' | 'qwen2' | 'qwen3'
n_layer = 4 # >= 1: blocks
n_head = 4 # >= 1: attention heads
n_embd = 128 # >= 1: width
bias = False # in LayerNorms and Linears (arch gpt2); False is a bit better and faster
dropout = 0.0 # in [0, 1): for pretraining 0 is good, for finetuning try 0.1+
# LoRA (2106.09685)
lora_r = 0 # >= 0: rank; 0 = train all weights
lora_alpha = 16.0 # > 0: the adapter is scaled by alpha / r
lora_targets = '' # HF module names by comma, 'all-linear', or a pattern; '' = c_attn, or q_proj,v_proj
lora_rslora = False # scale by alpha / sqrt(r) instead: a large r still learns (2312.03732)
lora_dora = False # also learn the length of each row of the weights (2402.09353)
# optimizer
max_iters = 1000 # >= 0: iterations (optimizer updates)
batch_size = 64 # >= 1: rows (or crops) an iteration, over all processes
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
# the equation


def sft_loss(logp, mask, fused=None):
    """Mean negative log-likelihood of the counted tokens. logp (B, R) float, mask (B, R) bool -> scalar; 0
    for an empty mask. logp [[-1, -3]], mask [[True, False]] -> 1.0. fused: a function that finds this very
    mean without the log-probs (in the run the model's head does, chunk by chunk: the logits of a batch would
    not fit); logp is then None."""
    if fused is not None:
        return fused()
    return -torch.where(mask, logp, 0.0).sum() / mask.sum().clamp(min=1)


def cosine_lr(it, peak, floor, warmup, total):
    """nanoGPT's schedule: linear warm-up, then cosine from peak to floor at iteration `total`."""
    if it < warmup:
        return peak * (it + 1) / (warmup + 1)
    ratio = min(1.0, (it - warmup) / max(1, total - warmup))
    return floor + 0.5 * (1 + math.cos(math.pi * ratio)) * (peak - floor)


# -----------------------------------------------------------------------------------------------------------
# data: rows, or crops of a token file


def read_row(row, tok, T):
    """One row -> ([(ids, trained)], note): two arrays of at most T tokens; [] when nothing is left to train
    on."""
    ids, trained = encode_row(row, tok)
    note = f'rows cut at {T} tokens' if len(ids) > T else ''
    ids, trained = np.asarray(ids[:T], np.int64), np.asarray(trained[:T], bool)
    if not trained[1:].any():
        return [], f'rows dropped (no trained token within {T}, raise --block_size)'
    return [(ids, trained)], note


def read_tokens(folder, T, vocab_size):
    """(train.bin, val.bin) as arrays of uint16 that stay on disk. ValueError for ids that the model lacks, or
    too few."""
    files = []
    for name in ('train.bin', 'val.bin'):
        path = os.path.join(folder, name)
        tokens = np.memmap(path, dtype=np.uint16, mode='r')
        if len(tokens) <= T:
            raise ValueError(f'{path} holds {len(tokens)} tokens, a crop takes block_size {T} + 1: lower it')
        largest = int(tokens[:1 << 20].max())
        if largest >= vocab_size:
            raise ValueError(f'{path} holds token {largest}, the model has {vocab_size}: prepare it with the '
                             f'tokenizer of the model')
        files.append(tokens)
    return files


def random_crops(tokens, n, T, seed):
    """n random pieces of T + 1 tokens, nanoGPT's: a function of the seed alone."""
    starts = torch.randint(len(tokens) - T, (n,), generator=torch.Generator().manual_seed(seed)).tolist()
    return [tokens[i:i + T + 1].astype(np.int64) for i in starts]


def micro_batch(rows):
    """Rows (ids, trained), or crops, as one forward sees them: (idx, targets, doc), targets -1 where nothing
    is learnt."""
    if isinstance(rows[0], tuple):  # packed: (1, N)
        ids, trained = zip(*rows)
        packed = collate_packed(ids, trained, [list(range(len(rows)))], sum(map(len, ids)))
        return packed['idx'], packed['targets'], packed['doc']
    x = torch.from_numpy(np.stack(rows))  # a rectangle: (n, T), the target is the next token
    return x[:, :-1], x[:, 1:], None


def micro_batches(run, rows):
    """This replica's micro-batches of a batch of rows."""
    lengths = [len(row[0]) if isinstance(row, tuple) else len(row) - 1 for row in rows]
    return [micro_batch([rows[i] for i in picked]) for picked in run.micro_batches(lengths)]


def validation_loss(run, model, batches, loss_of):
    """Mean loss over the trained tokens of all batches."""
    model.eval()  # no dropout
    micros, copies = [], []
    for rows in batches:
        made = micro_batches(run, rows)
        micros += made
        copies += [run.mesh.replicas_of(len(rows))] * len(made)  # fewer rows than replicas: all do them
    losses = parallel.evaluate(model, micros, lambda net, micro: loss_of(net, micro)[0])
    counts = [(targets >= 0).sum().item() / n for (_, targets, _), n in zip(micros, copies)]
    found = run.mesh.collect([(loss.item(), count) for loss, count in zip(losses, counts)])
    model.train()
    return sum(loss * count for loss, count in found) / max(1, sum(count for _, count in found))


# -----------------------------------------------------------------------------------------------------------
if __name__ == '__main__':
    # ---- setup. Run reads the rest of the keys: overwrite, val_dataset, eval_interval, save_minutes,
    # log_to, lora_r, lora_alpha, lora_targets, lora_rslora, lora_dora, weight_decay, beta1, beta2, device,
    # dtype, compile, checkpointing, kernels, threads, tp, pp, cp, zero, dist_timeout
    if decay_lr and min_lr > learning_rate:
        raise ValueError(f'min_lr {min_lr} is above learning_rate {learning_rate}: set it to a tenth')
    run = Run('sft', config, folder=not show_masks)
    text = os.path.exists(os.path.join(dataset, 'train.bin'))  # token files instead of rows
    scratch = None
    if init_from == 'scratch':
        meta = f'{dataset}/meta.json'
        of_folder = f'char:{meta}' if os.path.exists(meta) else 'gpt2'
        config['tokenizer'] = tokenizer or (of_folder if text else 'byte')
        tok = get_tokenizer(config['tokenizer'])
        biases = {}
        if arch == 'gpt2':  # the others have theirs fixed
            biases = dict(bias=bias, qkv_bias=bias, attn_out_bias=bias)
        shape = dict(n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size or 256)
        scratch = GPTConfig.of(arch, **shape, **biases, vocab_size=tok.vocab_size, bos_token_id=tok.eot,
                               eos_token_id=tok.eot)
    model, tok = run.model('lm', scratch, dropout)
    # tokens of a row at most
    T = min(block_size or model.config.block_size, model.config.block_size)

    # ---- 1. rows become ids and masks; or two token files, of which random crops are taken
    if text:
        train, val = read_tokens(dataset, T, model.config.vocab_size)
        run.same_rows([len(train), train[:1 << 20].tobytes()])
        print(f'{dataset}: {len(train):,} tokens; {batch_size} x {T} = {batch_size * T:,} an iteration')
    else:
        train_rows, val_rows = run.rows()
        train = encode_all(train_rows, read_row, dataset, (tok, T))
        if show_masks:
            for ids, trained in train[:show_masks]:
                print(coloured(ids.tolist(), trained.tolist(), tok) + '\n' + '-' * 80)
            raise SystemExit
        val = encode_all(val_rows, read_row, run.val_name, (tok, T))
        order = run.order(train, batch_size)
        n_tokens = sum(len(ids) for ids, _ in train)
        n_trained = sum(int(trained.sum()) for _, trained in train)
        print(f'{dataset}: {len(train):,} rows, {n_tokens:,} tokens, {n_trained:,} of them trained on; '
              f'{batch_size} rows = {n_tokens / len(train) * batch_size:,.0f} tokens an iteration')
    # what an evaluation reads: always the same batches
    if text and eval_iters:
        held_out = [random_crops(val, batch_size, T, k) for k in range(eval_iters)]
    else:
        whole = [val[i:i + T + 1].astype(np.int64) for i in range(0, len(val) - T, T)] if text else val
        held_out = [whole[i:i + batch_size] for i in range(0, len(whole), batch_size)][:eval_iters or None]
    model, optimizer = run.trained(model, learning_rate)  # of several ranks: this one's part of it
    run.plan(min(micro_tokens, batch_size * T), T)

    def loss_of(model, micro):
        """(mean loss over the trained tokens of a micro-batch, {}). The model's head finds it without holding
        logits."""
        idx, targets, doc = (x if x is None else x.to(run.device) for x in micro)
        with run.amp():
            return sft_loss(None, targets >= 0, fused=lambda: model(idx, targets, doc=doc)[1]), {}

    model.train()
    for it in run.iterations(max_iters):
        # ---- evaluate, and write a checkpoint; step 0 is the baseline
        if run.due(it):
            val_loss = validation_loss(run, model, held_out, loss_of)
            run.evaluated(it, dict(loss=val_loss), val_loss, 'loss', lower=True)  # nats a trained token
        if it == max_iters or eval_only:
            break

        # ---- 2. a batch, packed
        if text:  # crops are a function of (seed, it)
            rows = random_crops(train, batch_size, T, seed * 1000003 + it)
        else:
            rows = [train[i] for i in next(order)]
        micros = micro_batches(run, rows)

        # ---- 3. the loss: loss.backward() on each micro-batch, weighted by its trained tokens
        # trained tokens of each, its weight
        trained = [int((targets >= 0).sum()) for _, targets, _ in micros]
        loss = parallel.forward_backward(model, optimizer, micros, loss_of, trained)['loss']  # GPU is awaited

        # ---- 4. all-reduce of the gradients, clip, AdamW
        check_finite(it, out_dir, loss=loss)
        lr = cosine_lr(it, learning_rate, min_lr, warmup_iters, max_iters) if decay_lr else learning_rate
        norm = parallel.clip_and_step([optimizer], [lr], grad_clip)
        tokens = sum(run.mesh.collect([idx.numel() for idx, _, _ in micros]))  # of all replicas
        run.log(it, dict(loss=loss, grad_norm=norm, lr=lr, tokens=tokens), 'loss grad_norm lr')

    # ---- end
    run.finish(f'best val loss {run.best:.4f}' if run.best is not None else 'nothing evaluated')
