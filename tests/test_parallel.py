"""parallel.py against the single process: mp.spawn + gloo, fp64 to 1e-10, fp32 to 1e-5; one spawn runs many layouts.

Each rank also runs the single process by itself, so that what is compared comes from GPT and torch's AdamW alone: the loss of
every step, the full gradients and their norm after the first, the full weights after the third."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import conftest
import parallel
from model import GPT, GPTConfig

TOL = {torch.float64: 1e-10, torch.float32: 1e-5}
GPT2 = dict(arch='gpt2', vocab_size=53, block_size=64, n_layer=4, n_head=4, n_embd=32)
QWEN3 = dict(arch='qwen3', vocab_size=50, block_size=64, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, head_size=16, n_inner=48, norm='rms',
             pos='rope', act='silu', gated=True, qkv_bias=False, attn_out_bias=False, bias=False, qk_norm=True, tie=False)
QWEN2 = {**QWEN3, 'arch': 'qwen2', 'qkv_bias': True, 'qk_norm': False, 'tie': True, 'n_kv_head': 1, 'norm_eps': 1e-6}


def make(shape, head='lm', dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**shape), head).to(dtype)
    with torch.no_grad():  # biases and norms away from 0 and 1, or mistakes in them would not show
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


# ---- four kinds of batch and loss, as the stages have them -----------------------------------------------------------


def batch_lm(g, rows):
    idx = torch.randint(0, 50, (rows, 13), generator=g)
    targets = torch.where(torch.rand(rows, 13, generator=g) < 0.6, torch.randint(0, 50, (rows, 13), generator=g), -1)
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
    logp, entropy = model.logprobs(mb['idx'], temperature=0.7, mask=mb['mask'], where=mb['where'], entropy=True)
    n = mb['where'].sum()
    return -((logp * mb['adv'] + 0.1 * entropy) * mb['where']).sum() / n, {'entropy': (entropy * mb['where']).sum().detach() / n}


def loss_value(model, mb):
    values, _ = model(mb['idx'], mask=mb['mask'])
    return ((values[:, 1:] - mb['adv']) ** 2 * mb['where']).sum() / mb['where'].sum(), {}


def count(mb):
    return float(mb['where'].sum() if 'where' in mb else (mb['targets'] >= 0).sum())


CASES = {'lm': ('lm', batch_lm, loss_lm), 'packed': ('lm', batch_packed, loss_packed), 'rl': ('lm', batch_rl, loss_rl),
         'value': ('scalar', batch_rl, loss_value)}


def micros_of(case, step, lo, hi, size=2):
    """Rows lo .. hi of a global batch of 8 as microbatches: the same numbers in every layout."""
    whole = CASES[case][1](torch.Generator().manual_seed(100 + step), 8)
    return [{k: v[i:i + size] for k, v in whole.items()} for i in range(lo, hi, size)]


def single(case, shape, dtype, steps=3, clip=0.05):
    """torch alone -> losses, gradients and norm of step 0, final weights."""
    head, _, loss_of = CASES[case]
    model = make(shape, head, dtype)
    opt = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95))
    out = dict(loss=[], norm=[])
    for step in range(steps):
        micros = micros_of(case, step, 0, 8)
        total, loss_sum = sum(count(mb) for mb in micros), 0.0
        for mb in micros:
            loss = loss_of(model, mb)[0] * (count(mb) / total)
            loss.backward()
            loss_sum += loss.item()
        if step == 0:
            out['grads'] = {n: p.grad.clone() for n, p in model.named_parameters()}
        out['loss'].append(loss_sum)
        out['norm'].append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)))
        opt.step()
        opt.zero_grad()
    out['weights'] = {n: p.detach().clone() for n, p in model.named_parameters()}
    return out


def run_layout(case, shape, dtype, layout, steps=3, clip=0.05, layers=None, attention='auto', overlap=True, mesh=None, checkpointing=False):
    """The same through parallel -> the same dictionary, and (mesh, model, optimizer)."""
    head, _, loss_of = CASES[case]
    mesh = mesh or parallel.init(device='cpu', **layout)
    full = make(shape, head, dtype)
    full.checkpointing = checkpointing
    model = parallel.shard(full, mesh, layers=layers, attention=attention)
    opt = parallel.Optimizer(model, mesh, 1e-2, (0.9, 0.95), weight_decay=0.1, overlap=overlap)
    out, norm_of = dict(loss=[], norm=[]), opt._norm

    def spy():
        norm = norm_of()
        if 'grads' not in out:
            out['grads'] = dict((n, t.clone()) for n, t in parallel._full_tensors(model, lambda p: p.master.grad.view(-1)))
        return norm
    opt._norm = spy
    for step in range(steps):
        s = mesh.share(8)
        micros = micros_of(case, step, s.start, s.stop)
        metrics = parallel.accumulate(model, opt, micros, loss_of, [count(mb) for mb in micros])
        out['loss'].append(metrics['loss'])
        out['norm'].append(opt.step(1e-2, clip))
    out['weights'] = {n: t.clone() for n, t in parallel._full_tensors(model)}
    return out, (mesh, model, opt)


def worst(a, b):
    """Largest difference, relative to the largest entry of its tensor (or 1)."""
    err = max(abs(x - y) for k in ('loss', 'norm') for x, y in zip(a[k], b[k]))
    for k in ('grads', 'weights'):
        assert a[k].keys() == b[k].keys()
        err = max([err] + [float((a[k][n] - b[k][n]).abs().max() / max(1.0, float(b[k][n].abs().max()))) for n in b[k]])
    return err


def spawn(world, fn, *args, tmp_path=None):
    """fn(rank, *args) in `world` processes over a FileStore; an exception of any fails the test."""
    mp.spawn(_enter, (world, str(tmp_path / f'store-{fn.__name__}-{time.time()}'), fn, args), nprocs=world)


def _enter(rank, world, store, fn, args):
    torch.set_num_threads(1)
    dist.init_process_group('gloo', store=dist.FileStore(store, world), rank=rank, world_size=world,
                            timeout=__import__('datetime').timedelta(seconds=60))
    fn(rank, *args)
    dist.destroy_process_group()


def check_all(rank, jobs):
    refs = {}
    for case, shape, dtype, layout, extra in jobs:
        key = (case, json.dumps(shape), dtype)
        if key not in refs:
            refs[key] = single(case, shape, dtype)
        got, (mesh, *_) = run_layout(case, shape, dtype, layout, **extra)
        err = worst(got, refs[key])
        mesh.watch.what = 'closed'
        if os.environ.get('SHOW') and rank == 0:
            print(f'{case:7s} {shape["arch"]:6s} {str(dtype)[6:]} {layout} {extra or ""} {err:.1e}', flush=True)
        assert err < TOL[dtype], f'{case} {shape["arch"]} {layout} {extra}: off by {err:.2e}'


f64, f32 = torch.float64, torch.float32


def layouts(world):
    return [dict(tp=tp, pp=pp, cp=cp) for tp in (1, 2, 4, 8) for pp in (1, 2, 4) for cp in (1, 2, 4, 8) if world % (tp * pp * cp) == 0]


def test_world_of_one():
    for case in CASES:
        got, (mesh, model, opt) = run_layout(case, GPT2, f64, dict(zero=2))
        assert type(model) is GPT and not opt.flat and worst(got, single(case, GPT2, f64)) < 1e-12


def test_two(tmp_path):
    jobs = [(case, shape, f64, dict(lay, zero=zero), {}) for i, (case, shape) in enumerate([('lm', GPT2), ('rl', QWEN3), ('packed', QWEN2), ('value', GPT2)])
            for j, lay in enumerate([dict(), dict(tp=2), dict(pp=2), dict(cp=2)]) for zero in ((0, 1, 2, 3) if lay in ({}, dict(cp=2)) else (0,))
            if (i + j + zero) % 2 == 0 or zero == 3 or not lay]
    spawn(2, check_all, jobs, tmp_path=tmp_path)
