"""parallel.py against the single process: processes of their own over gloo, fp64 to 1e-10, fp32 to 1e-5; one
start runs many layouts.

Each rank also runs the single process by itself, so that what is compared comes from GPT and torch's AdamW
alone: the loss of every step, the full gradients and their norm after the first, the full weights after the
third."""
import copy
import json
import multiprocessing
import os
import pathlib
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import infer
import kernels
import lora
import parallel
from helpers import ckpt, equal, jsonl, log_rows, mismatch, stage
from model import GPT, GPTConfig

TOL = {torch.float64: 1e-10, torch.float32: 1e-5}
# Adam divides noise by |g| + eps: RLHF's 1e-5 for float32
EPS = {torch.float64: 1e-8, torch.float32: 1e-5}
GPT2 = dict(arch='gpt2', vocab_size=53, block_size=64, n_layer=4, n_head=4, n_embd=32)
QWEN3 = dict(arch='qwen3', vocab_size=50, block_size=64, n_layer=3, n_head=4, n_kv_head=2, n_embd=32,
             head_size=16, n_inner=48, norm='rms',
             pos='rope', act='silu', gated=True, qkv_bias=False, attn_out_bias=False, bias=False,
             qk_norm=True, tie=False)
QWEN2 = {**QWEN3, 'arch': 'qwen2', 'qkv_bias': True, 'qk_norm': False, 'tie': True, 'n_kv_head': 1,
         'norm_eps': 1e-6}


def make(shape, head='lm', dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{k: v for k, v in shape.items() if k != 'lora'}), head).to(dtype)
    if 'lora' in shape:
        lora.add_lora(model, shape['lora'], 8, targets=('c_attn', 'c_fc'))
        model.to(dtype)
    with torch.no_grad():  # biases and norms away from 0 and 1, or mistakes in them would not show
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


# ---- four kinds of batch and loss, as the stages have them


def batch_lm(g, rows):
    idx = torch.randint(0, 50, (rows, 13), generator=g)
    targets = torch.where(torch.rand(rows, 13, generator=g) < 0.6,
                          torch.randint(0, 50, (rows, 13), generator=g), -1)
    targets[:, 5] = 7
    return dict(idx=idx, targets=targets)


def loss_lm(model, mb):
    _, loss = model(mb['idx'], mb['targets'])
    return loss, {'twice': 2 * loss.detach()}


def batch_packed(g, rows):
    mb = batch_lm(g, rows)
    cut = torch.randint(2, 10, (rows, 1), generator=g)
    mb['doc'] = (torch.arange(13) >= cut).long() + (torch.arange(13) >= cut + 2).long()
    return mb


def loss_packed(model, mb):
    _, loss = model(mb['idx'], mb['targets'], doc=mb['doc'])
    return loss, {}


def batch_rl(g, rows):
    """Left-padded rows with garbage in the padding."""
    mb = batch_lm(g, rows)
    mb['mask'] = torch.arange(13) >= torch.randint(0, 6, (rows, 1), generator=g)
    mb['where'] = mb['mask'][:, 1:] & mb['mask'][:, :-1] & (torch.arange(12) >= 5)
    mb['adv'] = torch.randn(rows, 12, generator=g)
    return mb


def loss_rl(model, mb):
    logp, entropy = model.logprobs(mb['idx'], temperature=0.7, mask=mb['mask'], where=mb['where'],
                                   entropy=True)
    n = mb['where'].sum()
    loss = -((logp * mb['adv'] + 0.1 * entropy) * mb['where']).sum() / n
    return loss, {'entropy': (entropy * mb['where']).sum().detach() / n}


def loss_value(model, mb):
    values, _ = model(mb['idx'], mask=mb['mask'])
    return ((values[:, 1:] - mb['adv']) ** 2 * mb['where']).sum() / mb['where'].sum(), {}


def count(mb):
    return float(mb['where'].sum() if 'where' in mb else (mb['targets'] >= 0).sum())


def batch_long(g, rows):
    return dict(idx=torch.randint(0, 50, (rows, 41), generator=g),
                targets=torch.randint(0, 50, (rows, 41), generator=g))


def batch_sparse(g, rows):
    """One counted token in two rows: most cp ranks have nothing for the head to do."""
    mb = batch_rl(g, rows)
    mb['targets'] = torch.where(torch.arange(13) == 9, mb['targets'].clamp(0), -1)
    mb['targets'][1::2] = -1
    mb['where'] = mb['targets'][:, :-1] >= 0
    return mb


def loss_sparse(model, mb):
    kind = loss_lm if mb['idx'].sum() % 2 else loss_rl
    return kind(model, mb)[0], {}


CASES = dict(sparse=('lm', batch_sparse, loss_sparse), long=('lm', batch_long, loss_lm),
             lm=('lm', batch_lm, loss_lm),
             packed=('lm', batch_packed, loss_packed), rl=('lm', batch_rl, loss_rl),
             value=('scalar', batch_rl, loss_value))


def micros_of(case, step, mesh=parallel.ALONE, rows=8, size=2):
    """This replica's rows of a global batch of 8 as micro-batches: the same numbers in every layout."""
    size = 1 if case == 'long' else size
    whole = CASES[case][1](torch.Generator().manual_seed(100 + step), 8)
    lo, hi = rows * mesh.dp_rank // mesh.dp, rows * (mesh.dp_rank + 1) // mesh.dp
    return [{k: v[i:min(i + size, hi)] for k, v in whole.items()} for i in range(lo, hi, size)]


def single(case, shape, dtype, steps=3, clip=0.05):
    """torch alone -> losses, gradients and norm of step 0, final weights."""
    head, _, loss_of = CASES[case]
    model = make(shape, head, dtype)
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in params if p.dim() >= 2], weight_decay=0.1),
              dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]
    opt = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), eps=EPS[dtype], fused=True)
    out = dict(loss=[], norm=[])
    for step in range(steps):
        micros = micros_of(case, step)
        total, loss_sum = sum(count(mb) for mb in micros), 0.0
        for mb in micros:
            loss = loss_of(model, mb)[0] * (count(mb) / total)
            loss.backward()
            loss_sum += loss.item()
        if step == 0:
            out['grads'] = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
        out['loss'].append(loss_sum)
        out['norm'].append(float(torch.nn.utils.clip_grad_norm_([p for p in model.parameters()
                                                                 if p.requires_grad], clip)))
        opt.step()
        opt.zero_grad()
    out['weights'] = {n: p.detach().clone() for n, p in model.named_parameters()}
    return out


def run_layout(case, shape, dtype, layout, steps=3, clip=0.05, checkpointing=False,
               schedule=parallel.one_forward_one_backward):
    """The same through parallel -> the same dictionary, and (mesh, model, optimizer)."""
    head, _, loss_of = CASES[case]
    mesh, full = parallel.init(device='cpu', **layout), make(shape, head, dtype)
    full.checkpointing = checkpointing
    model = parallel.shard(full, mesh)
    opt = parallel.Optimizer(model, mesh, 1e-2, (0.9, 0.95), EPS[dtype], 0.1)
    out, hook = dict(loss=[], norm=[]), 'square' if opt.flat else 'gradients'  # behind the sums over copies
    before = getattr(opt, hook)

    def spy():
        found = before()
        if 'grads' not in out:
            whole = parallel._full_tensors(model, lambda p: p.weight.grad.view(-1))
            out['grads'] = {n: t.clone() for n, t in whole}
        return found
    setattr(opt, hook, spy)
    for step in range(steps):
        micros = micros_of(case, step, mesh)
        counts = [count(mb) for mb in micros]
        metrics = parallel.forward_backward(model, opt, micros, loss_of, counts, schedule=schedule)
        out['loss'].append(metrics['loss'])
        out['norm'].append(parallel.clip_and_step([opt], [1e-2], clip))
    out['weights'] = {n: t.clone() for n, t in parallel._full_tensors(model)}
    return out, (mesh, model, opt)


def worst(a, b):
    """Largest difference, relative to the largest entry of its tensor (or 1)."""
    err = max(abs(x - y) for k in ('loss', 'norm') for x, y in zip(a[k], b[k]))
    for k in ('grads', 'weights'):
        assert a[k].keys() == b[k].keys()
        err = max([err] + [float((a[k][n] - b[k][n]).abs().max() / max(1.0, float(b[k][n].abs().max())))
                           for n in b[k]])
    return err


def check_ranks(world, tmp_path, *calls):
    """Runs fn(rank, *args) of each (fn, *args) in `world` processes over a FileStore; an exception in any of
    them fails the test. The processes are forked from a clean server that has imported torch once: three
    seconds less for each of them."""
    multiprocessing.set_forkserver_preload(['test_parallel'])
    mp.start_processes(_enter, (world, str(tmp_path / f'store{time.time()}'), calls), nprocs=world,
                       start_method='forkserver')


def _enter(rank, world, store, calls):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', store=dist.FileStore(store, world), rank=rank, world_size=world,
                            timeout=timedelta(seconds=60))
    for fn, *args in calls:
        fn(rank, *args)
    if dist.is_initialized():
        dist.destroy_process_group()


def references(tmp_path, jobs):
    """The single process, once for each model and batch, in a file for the ranks to read."""
    keys = {(case, json.dumps(shape), dtype): (case, shape, dtype) for case, shape, dtype, *_ in jobs}
    torch.save({str(k): single(*v) for k, v in keys.items()}, tmp_path / 'references.pt')
    return str(tmp_path / 'references.pt')


def leave(mesh):
    """A mesh goes, the processes stay for the next."""
    mesh.barrier()
    for group in mesh._made.values():
        if group.pg is not None:
            dist.destroy_process_group(group.pg)
            group.pg = None


def check_all(rank, jobs, refs):
    refs = torch.load(refs, weights_only=True)
    for case, shape, dtype, layout, extra in jobs:
        got, (mesh, *_) = run_layout(case, shape, dtype, layout, **extra)
        err = worst(got, refs[str((case, json.dumps(shape), dtype))])
        leave(mesh)
        if os.environ.get('SHOW') and rank == 0:
            print(f'{case:7s} {shape["arch"]:6s} {str(dtype)[6:]} {layout} {extra or ""} '
                  f'{err:.1e}', flush=True)
        assert err < TOL[dtype], f'{case} {shape["arch"]} {layout} {extra}: off by {err:.2e}'


f64, f32 = torch.float64, torch.float32


def layouts(world):
    return [dict(tp=tp, pp=pp, cp=cp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4) for cp in (1, 2, 4, 8)
            if world % (tp * pp * cp) == 0]


def test_world_of_one():
    for case in CASES:
        got, (mesh, model, opt) = run_layout(case, GPT2, f64, dict(zero=2))
        assert type(model) is GPT and not opt.flat and worst(got, single(case, GPT2, f64)) < 1e-12


SIMPLE = dict(schedule=parallel.all_forward_all_backward)


def test_two_ranks(tmp_path):
    """Every axis alone, every ZeRO stage, every kind of loss."""
    jobs = [('lm', GPT2, f64, dict(zero=z), {}) for z in (0, 1, 2, 3)]
    jobs += [('rl', QWEN3, f64, dict(tp=2), {}), ('value', GPT2, f64, dict(tp=2), {}),
             ('packed', QWEN2, f64, dict(tp=2), {})]
    jobs += [('lm', GPT2, f64, dict(pp=2), {}), ('rl', QWEN3, f64, dict(pp=2), {})]
    jobs += [('value', GPT2, f32, dict(pp=2), {}), ('lm', GPT2, f64, dict(pp=2), SIMPLE)]
    jobs += [('rl', QWEN3, f64, dict(cp=2, zero=1), {}), ('packed', QWEN2, f64, dict(cp=2), {})]
    jobs += [('long', QWEN3, f64, dict(cp=2, zero=3), {}), ('value', GPT2, f64, dict(cp=2), {})]
    jobs += [('sparse', GPT2, f64, dict(cp=2, zero=3), {}), ('sparse', GPT2, f64, dict(tp=2), {})]
    jobs += [('lm', dict(GPT2, lora=2), f64, dict(zero=2), {}),
             ('rl', dict(GPT2, lora=2), f64, dict(pp=2), {})]
    jobs += [('lm', GPT2, f64, dict(zero=3), dict(checkpointing=True)), ('rl', QWEN3, f32, dict(zero=2), {})]
    tensor = [(GPT2, dict(tp=2), f32, True), (QWEN3, dict(tp=2), f32, True)]
    check_ranks(2, tmp_path, (check_all, jobs, references(tmp_path, jobs)), (zero3_holds_two_layers,),
                (reductions_are_few,), (dropout_differs,), (frozen_dropout,), (engines, tensor))


@pytest.mark.slow
def test_three_ranks(tmp_path):
    """Numbers that are no powers of two; and 1F1B beside the simple schedule, to the bit."""
    three = {**GPT2, 'n_head': 3, 'n_embd': 48, 'n_layer': 5}
    jobs = [('rl', three, f64, dict(tp=3), {}), ('lm', three, f64, dict(pp=3), {}),
            ('packed', three, f64, dict(cp=3), {}),
            ('value', three, f64, dict(pp=3), SIMPLE), ('lm', three, f64, dict(cp=3, zero=3), {})]
    check_ranks(3, tmp_path, (check_all, jobs, references(tmp_path, jobs)), (schedules_agree,))


def schedules_agree(rank):
    found = []
    for schedule in (parallel.one_forward_one_backward, parallel.all_forward_all_backward):
        got, (mesh, *_) = run_layout('lm', GPT2, f64, dict(pp=3), schedule=schedule)
        leave(mesh)
        found.append(got)
    assert equal(*found)


def leaves_no_thread(rank):
    """A thread of gloo's that is still busy when Python ends aborts the process."""
    before = len(os.listdir('/proc/self/fd'))
    mesh = parallel.init(tp=2, device='cpu')
    mesh.barrier()
    mesh.close()
    assert not any('gloo' in path.read_text() for path in pathlib.Path('/proc/self/task').glob('*/comm'))
    assert len(os.listdir('/proc/self/fd')) <= before


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='counts threads in /proc')
def test_close_leaves_no_thread(tmp_path):
    check_ranks(2, tmp_path, (leaves_no_thread,))


# ---- the rest of the interface


def interface(rank, world):
    mesh = parallel.init(pp=2, tp=2, device='cpu', seed=3)
    first = torch.rand(3)
    mesh.split_seeds(3)
    every = mesh.everyone.all_gather(torch.stack([first, torch.rand(3)])[None])
    assert all(torch.equal(e[0], first) for e in every) and len({tuple(e[1].tolist())
                                                                 for e in every}) == world
    full = make(QWEN2)
    whole, reference = dict(full.state_dict()), {k: v.clone() for k, v in full.state_dict().items()}
    micros = micros_of('rl', 0, size=4)

    def fn(model, mb):
        return model.logprobs(mb['idx'], mask=mb['mask'], entropy=True)
    with torch.no_grad():
        want, logits = [fn(full, mb) for mb in micros], full(micros[0]['idx'], mask=micros[0]['mask'])[0]
    model = parallel.shard(full, mesh)
    for got, ref in zip(parallel.evaluate(model, micros, fn), want):
        assert all((g - r).abs().max() < 1e-12 for g, r in zip(got, ref))
    got, = parallel.evaluate(model, micros[:1], lambda m, mb: m(mb['idx'], mask=mb['mask'])[0])
    assert (got - logits)[micros[0]['mask']].abs().max() < 1e-12  # vocabulary of 50 on 2 ranks, gathered
    assert equal(parallel.full_state(model), reference)
    assert whole.keys() == reference.keys()
    assert set(model.state_dict()) == (set(reference) if mesh.master else set())
    opt = parallel.Optimizer(model, mesh, 1e-2)
    out = parallel.forward_backward(model, opt, micros, loss_rl, [count(mb) for mb in micros])
    assert out['bubble_ideal'] == 1 / 3 and 0 < out['bubble'] < 1 and out['entropy'] > 0
    # the model cannot be called outside the pipeline, nor twice inside
    with pytest.raises(RuntimeError, match='inside parallel.forward_backward'):
        model.logprobs(micros[0]['idx'])
    mesh.barrier()
    bad = make(GPT2, seed=rank)
    with pytest.raises(ValueError, match='different weights .wte.weight.'):
        parallel.shard(bad, mesh)
    for shape, message in [
            (dict(GPT2, n_head=3, n_embd=48), 'nearest that works is --tp=1'),
            (dict(GPT2, n_inner=33), 'MLP width 33'),
            (dict(GPT2, n_layer=1), 'nearest that works is --pp=1'),
            (dict(GPT2, dropout=0.1), 'dropout 0.1 is not supported'),
            (dict(GPT2, lora=2), 'lora with tp 2 is not supported')]:
        with pytest.raises(ValueError, match=message):
            parallel.shard(make(shape), mesh)
    leave(mesh)


def zero3_holds_two_layers(rank):
    """While it trains, ZeRO-3 has the weights of the layer in use and of the one being fetched; afterwards of
    none."""
    mesh = parallel.init(zero=3, device='cpu')
    model = parallel.shard(make(dict(GPT2, n_layer=8), dtype=f32), mesh)
    opt = parallel.Optimizer(model, mesh, 1e-3)
    size, most, gather = (lambda: sum(b.full.untyped_storage().nbytes()
                                      for b in opt.buckets)), [0], parallel.Bucket.gather

    def spy(self, wait=True):
        gather(self, wait)
        most[0] = max(most[0], size())
    parallel.Bucket.gather = spy
    assert size() == 0
    micros = micros_of('lm', 0)
    parallel.forward_backward(model, opt, micros, loss_lm, [count(mb) for mb in micros])
    layer, table = (max(b.full.nbytes for b in opt.buckets if b.parts[0].name.startswith(part))
                    for part in ('h.', 'wte'))
    assert size() == 0 and 2 * layer <= most[0] < 2.5 * layer + table
    assert most[0] < 0.6 * sum(b.full.nbytes for b in opt.buckets)
    parallel.Bucket.gather = gather
    leave(mesh)


def reductions_are_few(rank):
    """Two microbatches: without ZeRO and with ZeRO-1 each layer is reduced once a step, whatever their
    number."""
    for zero, times in ((0, 1), (1, 1), (2, 2)):
        mesh = parallel.init(zero=zero, device='cpu')
        opt = parallel.Optimizer(parallel.shard(make(GPT2, dtype=f32), mesh), mesh, 1e-3)
        seen, reduce = [], parallel.Bucket.reduce
        parallel.Bucket.reduce = lambda self: (seen.append(self), reduce(self))
        micros = micros_of('lm', 0, mesh)
        parallel.forward_backward(opt.model, opt, micros, loss_lm)
        parallel.Bucket.reduce = reduce
        assert len(micros) == 2 and len(seen) == times * len(opt.buckets)
        assert seen[:len(opt.buckets)] == opt.buckets
        leave(mesh)


def dropout_differs(rank):
    """tp and cp ranks hold different tokens and heads, so their dropout must differ; the mean of many draws
    is the loss without it."""
    for axis in ('tp', 'cp'):
        mesh = parallel.init(device='cpu', **{axis: 2})
        model = parallel.shard(make(dict(GPT2, dropout=0.1), dtype=f32), mesh)
        mesh.split_seeds(7)
        drawn = mesh.everyone.all_gather(torch.rand(4)[None])
        assert not torch.equal(drawn[0], drawn[1])
        mb = micros_of('lm', 0, size=8)[0]
        with torch.no_grad():
            losses = torch.tensor([float(loss_lm(model, mb)[0]) for _ in range(30)])
            exact = float(loss_lm(model.eval(), mb)[0])
        assert losses.std() > 1e-3 and abs(losses.mean() - exact) < 0.05 * exact
        leave(mesh)


def frozen_dropout(rank):
    """A model in eval mode has no dropout, whatever its config says: a pipeline takes it."""
    mesh = parallel.init(pp=2, device='cpu')
    shape = dict(GPT2, dropout=0.1)
    want = loss_lm(make(shape).eval(), micros_of('lm', 0, size=8)[0])[0]
    model = parallel.shard(make(shape).eval(), mesh)
    got = parallel.evaluate(model, micros_of('lm', 0, size=8), lambda m, mb: loss_lm(m, mb)[0])
    assert abs(got[0] - want) < 1e-12
    leave(mesh)


def engines(rank, cases):
    """infer.Engine on tensor-parallel weights, the ranks of a group in step: tokens and log-probs of the
    plain engine, before and after an update; greedy, filtered, penalised, several samples a prompt, memory so
    short that requests are thrown out and start over."""
    shared, P = [3, 7, 7, 1, 9, 4, 4, 20, 21, 3, 7, 7, 1, 9, 4, 4, 20, 22], infer.SamplingParams
    prompts = [shared[:5], shared, [5], list(range(30))]
    params = [P(12, seed=1, logprobs=2), P(12, 0.7, top_k=9, top_p=0.9, seed=2, n=3),
              P(12, 0.0, repetition_penalty=1.3), P(12, 1.3, min_p=0.02, seed=3, n=2, logit_bias={4: 2.0})]
    options = dict(num_blocks=14, block_size=4, max_num_batched_tokens=24)
    for shape, layout, dtype, in_place in cases:
        mesh, full = parallel.init(device='cpu', **layout), make(shape, dtype=f32)
        kernels.use('torch')  # blocks of 4 tokens are too small for C
        plain = infer.Engine(copy.deepcopy(full).to(dtype), **options) if rank == 0 else None
        kernels.use('auto')
        sampler = parallel.sampler_of(full, mesh, dtype, shard=True)
        model = parallel.shard(full, mesh)
        opt, engine = parallel.Optimizer(model, mesh, 1e-2), infer.Engine(sampler, **options)
        assert (sampler is model.body) == in_place
        for step in range(2):
            parallel.refresh(engine, model)
            state, done = parallel.full_state(model), engine.generate(prompts, params)
            assert mesh.everyone.share_object([c.token_ids for c in done], 0,
                                              'tokens') == [c.token_ids for c in done]
            # sums in another order round otherwise: the log-probs are the trainer's to bfloat16's precision
            if dtype != f32:
                assert mismatch(engine, done, model)['max'] < 0.05
            elif rank == 0:
                plain.load_weights(state)
                for a, b in zip(done, plain.generate(prompts, params), strict=True):
                    assert (a.token_ids, a.finish_reason) == (b.token_ids,
                                                              b.finish_reason), (layout, step, a, b)
                    for x, y in ((a.logprobs, b.logprobs), (a.raw_logprobs, b.raw_logprobs)):
                        assert (torch.tensor(x) - torch.tensor(y)).abs().max() < 1e-5
                assert engine.stats() == plain.stats()
            parallel.forward_backward(model, opt, micros_of('lm', step, mesh), loss_lm)
            parallel.clip_and_step([opt], [1e-2], 1.0)
        assert engine.stats()['preemptions'] > 0
        leave(mesh)


# ---- checkpoints: written on one layout, read on another


def resumed(path, mesh, shape=GPT2, dtype=f64):
    """(model, optimizer, the file), as a stage resumes."""
    saved, full = parallel.read_checkpoint(path, mmap=True), make(shape, 'lm', dtype, seed=9)
    full.load_state_dict(saved['model'])
    model = parallel.shard(full, mesh)
    opt = parallel.Optimizer(model, mesh, 1e-2, (0.9, 0.95), EPS[dtype], 0.1)
    opt.load_state_dict(saved['optimizer'])
    mesh.set_rng_state(saved['rng'])
    return model, opt, saved


def checkpoints(rank, folder):
    def path(name):
        return os.path.join(folder, name, 'ckpt.pt')
    for dtype in (f64, f32):
        name = str(dtype)[6:]
        _, (mesh, model, opt) = run_layout('lm', GPT2, dtype, dict(tp=2, zero=1), steps=2)
        parallel.save_checkpoint(path(f'{name}-a'), mesh, model, opt, iter=2, config={'seed': 1})
        leave(mesh)
        draw = torch.rand(1)  # the state after the checkpoint, on the layout that wrote it
        mesh = parallel.init(pp=2, cp=2, zero=3, device='cpu')
        model, opt, saved = resumed(path(f'{name}-a'), mesh, dtype=dtype)
        assert saved['iter'] == 2 and saved['config'] == {'seed': 1}
        # as many ranks as wrote it: each goes on with its own numbers
        assert torch.equal(torch.rand(1), draw)
        parallel.save_checkpoint(path(f'{name}-b'), mesh, model, opt, iter=2, config={'seed': 1})
        if dtype == f64:  # and it goes on as the single process does
            micros = micros_of('lm', 2)
            loss = parallel.forward_backward(model, opt, micros, loss_lm,
                                             [count(mb) for mb in micros])['loss']
            parallel.clip_and_step([opt], [1e-2], 0.05)
            parallel.save_checkpoint(path('after'), mesh, model, opt, iter=3)
            assert abs(loss - single('lm', GPT2, f64)['loss'][2]) < 1e-10
        leave(mesh)


@pytest.mark.slow
def test_four_ranks(tmp_path):
    """Axes together; then the interface on a grid; then checkpoints across layouts, read here by one
    process."""
    jobs = [('lm', GPT2, f64, dict(tp=2, zero=3), {}), ('packed', QWEN2, f64, dict(tp=4), {}),
            ('rl', QWEN3, f64, dict(tp=4), {}),
            ('lm', GPT2, f64, dict(pp=2, zero=2), {}), ('rl', GPT2, f64, dict(pp=4), {}),
            ('lm', QWEN2, f64, dict(tp=2, pp=2), {}),
            ('value', QWEN3, f64, dict(tp=2, cp=2), {}), ('long', GPT2, f64, dict(cp=4), {}),
            ('packed', GPT2, f64, dict(pp=2, cp=2), {}),
            ('rl', QWEN3, f32, dict(cp=2, zero=3), {}), ('lm', GPT2, f64, dict(pp=2, zero=3), {}),
            ('long', QWEN3, f64, dict(tp=2, cp=2), {})]
    check_ranks(4, tmp_path, (check_all, jobs, references(tmp_path, jobs)), (interface, 4),
                (checkpoints, str(tmp_path)),
                (engines, [(QWEN2, dict(tp=2, pp=2), f32, False)]))
    for name in ('float64', 'float32'):
        a, b = ckpt(tmp_path / f'{name}-a'), ckpt(tmp_path / f'{name}-b')
        assert set(a) == {'model', 'optimizer', 'iter', 'config', 'rng'} and len(a['rng']) == 4
        assert equal(a['model'], b['model']) and equal(a['optimizer'], b['optimizer'])
    # one process reads it, trains on, and arrives where four ranks and where torch alone arrive
    mesh = parallel.init(device='cpu')
    model, opt, _ = resumed(str(tmp_path / 'float64-a' / 'ckpt.pt'), mesh)
    micros = micros_of('lm', 2)
    parallel.forward_backward(model, opt, micros, loss_lm, [count(mb) for mb in micros])
    parallel.clip_and_step([opt], [1e-2], 0.05)
    reference, after = single('lm', GPT2, f64)['weights'], ckpt(tmp_path / 'after')['model']
    for n, p in model.named_parameters():
        assert (p - reference[n]).abs().max() < 1e-10 and (after[n] - reference[n]).abs().max() < 1e-10, n
    # what four ranks wrote exports to Hugging Face's format
    model.save_pretrained(str(tmp_path / 'hf'))
    assert torch.equal(GPT.from_pretrained(str(tmp_path / 'hf')).wte.weight, model.wte.weight.float())


def test_a_stage_in_float16_goes_on_with_its_scale(tmp_path):
    """A stage trains in float16 near its float32 losses; its checkpoint holds the loss scale, and a resumed
    run has it."""
    jsonl(tmp_path / 'text.jsonl', [dict(text=f'row {i} of text') for i in range(12)])
    keys = ['--dataset=text.jsonl', '--val_dataset=text.jsonl', '--batch_size=4', '--eval_iters=1',
            '--n_layer=2',
            '--n_embd=32', '--n_head=2', '--block_size=32', '--learning_rate=1e-2', '--eval_interval=2']
    for dtype in ('float32', 'float16'):
        stage('sft.py', *keys, f'--dtype={dtype}', f'--out_dir={dtype}', '--max_iters=4', cwd=tmp_path)
    losses = [[row['loss'] for row in log_rows(tmp_path / dtype, 'eval')] for dtype in ('float32', 'float16')]
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    saved = ckpt(tmp_path / 'float16')
    assert saved['optimizer']['scale'] == [65536.0, 4] and all(v.dtype == torch.float32
                                                               for v in saved['model'].values())
    stage('sft.py', *keys, '--dtype=float16', '--init_from=resume', '--out_dir=float16', '--max_iters=6',
          cwd=tmp_path)
    assert ckpt(tmp_path / 'float16')['optimizer']['scale'] == [65536.0, 6]


@pytest.mark.parametrize('shape', [GPT2, QWEN3], ids=['gpt2', 'qwen3'])
def test_float16_skips_a_step_and_halves_its_scale(shape):
    """autocast and loss scaling: gradients as in float32; a scale that overflows skips the step; the scale is
    resumed; a value that overflows in the forward is named."""
    mesh, model, exact = parallel.init(device='cpu'), make(shape, dtype=f32), make(shape, dtype=f32)

    def loss_half(m, mb):
        with torch.autocast('cpu', torch.float16):
            return loss_rl(m, mb)
    micros = micros_of('rl', 0)
    opt = parallel.Optimizer(model, mesh, 1e-2, scale=2.0 ** 16)
    plain = parallel.Optimizer(exact, mesh, 1e-2)
    for loss_of, m, o in ((loss_half, model, opt), (loss_rl, exact, plain)):
        parallel.forward_backward(m, o, micros, loss_of)
    grads, want = opt.gradients(), plain.gradients()
    assert all((a - b).norm() < 0.02 * b.norm() + 1e-4 for a, b in zip(grads, want))
    opt.drop()
    before, opt.scale = model.wte.weight.clone(), 2.0 ** 126
    parallel.forward_backward(model, opt, micros, loss_half)
    assert parallel.clip_and_step([opt], [1e-2], 1.0) == 0.0 and opt.scale == 2.0 ** 125 and opt.steps() == 0
    assert torch.equal(before, model.wte.weight)
    opt.scale, opt.good = 1024.0, 1999
    parallel.forward_backward(model, opt, micros, loss_half)
    assert parallel.clip_and_step([opt], [1e-2], 1.0) > 0 and (opt.scale,
                                                               opt.good) == (2048.0, 0) and opt.steps() == 1
    again = parallel.Optimizer(make(shape, dtype=f32), mesh, 1e-2, scale=2.0 ** 16)
    again.load_state_dict(opt.state_dict())
    assert again.scale == 2048.0
    model.h[1].mlp.get_submodule('c_fc' if shape is GPT2 else 'up_proj').weight.data.mul_(1e6)
    with pytest.raises(ValueError, match=r'output of h.1.mlp.(c_fc|up_proj) is not finite in float16'):
        parallel.forward_backward(model, opt, micros, loss_half)


def test_refusals_of_one_process():
    for wrong, message in [(dict(tp=2), 'torchrun --nproc_per_node=2'), (dict(zero=4), 'zero 4'),
                           (dict(cp=0), 'cp 0')]:
        with pytest.raises(ValueError, match=message):
            parallel.init(device='cpu', **wrong)
    mesh, model = parallel.init(device='cpu'), make(GPT2)
    opt = parallel.Optimizer(model, mesh, 1e-2)
    with pytest.raises(ValueError, match='nothing to learn from'):
        parallel.forward_backward(model, opt, micros_of('lm', 0, rows=4), loss_lm, [0, 0])
    with pytest.raises(ValueError, match='weights are trained in float32'):
        parallel.Optimizer(make(GPT2, dtype=torch.bfloat16), mesh, 1e-2)
    before = model.wte.weight.clone()
    parallel.forward_backward(model, opt, micros_of('lm', 0, rows=2), lambda m,
                              mb: (loss_lm(m, mb)[0] * float('nan'), {}))
    with pytest.raises(ValueError, match='gradient norm is nan'):
        parallel.clip_and_step([opt], [1e-2])
    assert torch.equal(before, model.wte.weight)


def test_zigzag():
    assert parallel.zigzag(8, 2, 0).tolist() == [0, 1, 6,
                                                 7] and parallel.zigzag(8, 2, 1).tolist() == [2, 3, 4, 5]
    assert sorted(sum((parallel.zigzag(24, 4, r).tolist() for r in range(4)), [])) == list(range(24))


def test_plan_counts_what_shard_cuts():
    """The plan's weights are what the layouts of the other tests hold: tp halves the matrices, pp the layers,
    zero the rest."""
    model = make(GPT2, dtype=f32)
    n = sum(p.numel() for p in model.parameters())
    one = parallel.plan(model)
    assert one['weights'] == one['gradients'] == 4 * n and one['optimizer'] == 8 * n
    assert 16 * n < one['total'] < 18 * n
    assert parallel.plan(model, dp=4, zero=1)['optimizer'] == 2 * n
    assert parallel.plan(model, tp=2)['weights'] < 0.6 * 4 * n


@pytest.mark.slow
def test_eight_ranks(tmp_path):
    jobs = [('lm', GPT2, f64, dict(tp=2, pp=2, cp=2), {}), ('rl', QWEN3, f64, dict(tp=2, pp=2, zero=3), {}),
            ('packed', QWEN2, f64, dict(tp=2, cp=2, zero=2), {}),
            ('value', QWEN2, f64, dict(pp=2, cp=2, zero=1), {}), ('long', GPT2, f64, dict(tp=4, cp=2), {}),
            ('lm', GPT2, f64, dict(zero=3), {}),
            ('lm', {**GPT2, 'n_head': 8}, f64, dict(tp=8), {})]
    check_ranks(8, tmp_path, (check_all, jobs, references(tmp_path, jobs)))


@pytest.mark.slow
def test_every_combination_of_four_ranks(tmp_path):
    jobs = [(case, shape, f64, dict(lay, zero=zero), {}) for i, lay in enumerate(layouts(4))
            for zero in (0, 1, 2, 3)
            for k, (case, shape) in enumerate([('lm', GPT2), ('rl', {**QWEN3, 'n_layer': 4}),
                                               ('packed', {**QWEN2, 'n_layer': 4}), ('value', GPT2)])
                                               if (i + k + zero) % 4 == 0]
    check_ranks(4, tmp_path, (check_all, jobs, references(tmp_path, jobs)),
                (engines, [(QWEN3, dict(tp=4), f32, True), (GPT2, dict(tp=2, zero=3), f32, False),
                           (QWEN3, dict(tp=2), torch.bfloat16, False)]))
