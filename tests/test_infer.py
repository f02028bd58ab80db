"""The engine against dense forwards: same log-probs, same tokens whatever the schedule; sampling against
plain formulas."""

import contextlib
import copy
import json
import math
import os
import random
import threading
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import infer
import kernels
from helpers import mismatch
from infer import Blocks, Engine, SamplingParams, uniform
from tokenizer import get_tokenizer
from model import ARCHS, GPT, GPTConfig

SEED = int(os.environ.get('TEST_SEED', 20261201))  # TEST_SEED tries another one


def tiny(arch='gpt2', dtype=torch.float64, vocab=23, seed=0, **over):
    """A random model whose logits are far apart enough that a token never hangs on the last bit."""
    torch.manual_seed(seed)
    kw = dict(
        block_size=64,
        vocab_size=vocab,
        n_layer=2,
        n_head=4,
        n_kv_head=4 if arch == 'gpt2' else 2,
        n_embd=32,
        head_size=8,
        n_inner=48,
    )
    model = GPT(GPTConfig(**{**ARCHS[arch], **kw, **over, 'arch': arch})).eval()
    for name, p in model.named_parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(
                p, std=0.25 if dtype == torch.float64 else 0.12
            )  # float32: scores of a size that training gives, 1e-5 is its last bits
        elif 'bias' in name:
            torch.nn.init.normal_(p, std=0.1)
    return model.to(dtype)


def idle(engine):
    """Nothing runs, nothing leaked: free + cached = all, every reference count is 0."""
    s = engine.stats()
    assert s['running'] == s['waiting'] == 0 and not engine.requests
    assert s['free_blocks'] + s['cached_blocks'] == s['num_blocks']
    assert not any(engine.blocks.ref) and sorted(engine.blocks.free + list(engine.blocks.cached)) == list(
        range(s['num_blocks'])
    )
    assert set(engine.blocks.table.values()) == set(engine.blocks.cached)
    return True


def distribution(logits, tokens, P, p):
    """What the next token is drawn from, by the contract's order, one row, the plain way. -> probabilities
    (V,) float64"""
    z = logits.double().clone()
    for t, b in p.logit_bias.items():
        z[t] += b
    for t in set(tokens):
        if p.repetition_penalty != 1:
            z[t] = z[t] / p.repetition_penalty if z[t] > 0 else z[t] * p.repetition_penalty
    for t in set(tokens[P:]):
        z[t] -= p.presence_penalty + p.frequency_penalty * tokens[P:].count(t)
    if p.temperature == 0:
        return torch.nn.functional.one_hot(z.argmax(), len(z)).double()
    z = z / p.temperature
    if p.min_p:
        probs = z.softmax(-1)
        z[probs < p.min_p * probs.max()] = -math.inf
    if p.top_k:
        z[torch.argsort(z, descending=True)[p.top_k :]] = -math.inf
    if p.top_p < 1:
        order = torch.argsort(z, descending=True)
        probs = z.softmax(-1)[order]
        z[order[(probs.cumsum(-1) - probs) >= p.top_p]] = -math.inf
    return z.softmax(-1)


def dense(model, prompt, p, index=0, eot=None):
    """One request by dense forwards over the whole sequence: tokens, processed and raw log-probs."""
    tokens, lps, raws, key = list(prompt), [], [], infer._mix(p.seed or 0, index)
    while len(tokens) - len(prompt) < p.max_tokens and len(tokens) < model.config.block_size:
        with torch.no_grad():
            logits = model(torch.tensor([tokens]))[0][0, -1]
        probs = distribution(logits, tokens, len(prompt), p)
        u = uniform(np.array([key], np.uint64), np.array([len(tokens) - len(prompt)], np.uint64))[0]
        t = (
            int(
                torch.searchsorted(
                    probs.cumsum(-1), torch.tensor(u, dtype=torch.float64) * probs.sum(), right=True
                )
            )
            if p.temperature
            else int(probs.argmax())
        )
        raws.append(float(logits.double().log_softmax(-1)[t]))
        lps.append(raws[-1] if p.temperature == 0 else float(probs[t].log()))
        tokens.append(t)
        if t in p.stop_token_ids or (t == eot and not p.ignore_eos):
            break
    return tokens[len(prompt) :], lps, raws


CASES = [
    dict(temperature=0),
    dict(),
    dict(temperature=0.7),
    dict(top_k=5),
    dict(top_p=0.8),
    dict(min_p=0.1, temperature=1.3),
    dict(top_k=9, top_p=0.7, min_p=0.02, temperature=0.9),
    dict(repetition_penalty=1.3),
    dict(presence_penalty=0.7, frequency_penalty=0.4),
    dict(temperature=0, repetition_penalty=1.5, frequency_penalty=0.3),
    dict(logit_bias={3: 2.5, 7: -100}),
    dict(stop_token_ids=[4, 9]),
]


@pytest.fixture(scope='module')
def truth():
    """{arch: (model, [(prompt, params, [(tokens, logprobs, raw) of each of n samples])])} by dense
    forwards; prompts share beginnings."""
    rng, out = random.Random(SEED), {}
    for arch in ARCHS:
        model, rows = tiny(arch), []
        trunk = [rng.randrange(23) for _ in range(40)]
        for i in range(16):
            n = rng.choice([1, 2, 3, 7, 8, 9, 16, 17, 30, 45])
            prompt = trunk[:n] if i % 2 else [rng.randrange(23) for _ in range(n)]
            p = SamplingParams(
                max_tokens=rng.choice([1, 2, 5, 12, 25]),
                seed=rng.randrange(1 << 40),
                n=rng.choice([1, 1, 1, 3]),
                **CASES[i % len(CASES)],
            )
            rows.append((prompt, p, [dense(model, prompt, p, j) for j in range(p.n)]))
        out[arch] = model, rows
    return out


def schedule(model, rows, rng, cuda=None, **over):
    """One random schedule of random requests through a random engine; every sample must be what the dense
    forward says. cuda: see graphs."""
    kw = dict(
        block_size=rng.choice([1, 2, 3, 4, 8, 16]),
        max_num_seqs=rng.choice([1, 2, 3, 5, 16]),
        max_num_batched_tokens=rng.choice([1, 2, 5, 16, 64, 500]),
        prefix_caching=rng.random() < 0.7,
    )
    kw.update(over)
    kw['num_blocks'] = kw.get('num_blocks') or -(-64 // kw['block_size']) + rng.choice([0, 1, 3, 20, 200])
    engine = Engine(model, None, **kw)
    if cuda:
        cuda.on(engine)
    elif rng.random() < 0.4:  # as on CUDA: each step starts before the one before it is read
        engine.ahead = True
    if engine.ahead:
        rows = [
            x
            for x in rows
            if not any((x[1].repetition_penalty != 1, x[1].presence_penalty, x[1].frequency_penalty))
            or rng.random() < 0.1
        ]
    todo, got, gone = [rng.choice(rows) for _ in range(rng.randint(1, 8))], {}, set()
    arrivals, checked = list(enumerate(todo)), 0
    while arrivals or engine.has_unfinished():
        while arrivals and (rng.random() < 0.3 or not engine.has_unfinished()):
            i, (prompt, p, _) = arrivals.pop()
            engine.add_request(prompt, p, request_id=i)
        if rng.random() < 0.02:
            gone.add(i := rng.randrange(len(todo)))
            engine.abort(i)
            arrivals = [a for a in arrivals if a[0] != i]
        for e in engine.step():
            row = got.setdefault((e['request_id'], e['index']), ([], [], []))
            for a, b in zip(row, (e['token_ids'], e['logprobs'], e['raw_logprobs'])):
                a += b
    for i, (prompt, p, want) in enumerate(todo):
        for j in range(p.n):
            if i not in gone:
                for a, b in zip(got[i, j], want[j]):
                    assert a == pytest.approx(b, abs=1e-8), (SEED, kw, i, j, len(prompt), p.max_tokens)
                checked += 1
    assert idle(engine)
    return checked, engine.counts


@pytest.fixture
def graphs(monkeypatch):
    """CUDA's graphs played on a CPU: a replay makes the captured calls anew over the buffers of the
    capture, and what was to be copied there may be read as late as the step is. All graphs share one pool
    of memory, the largest comes first."""
    seen = types.SimpleNamespace(engine=None, replays=0, copied=[], pools=[], sizes=[])

    class Graph:
        def replay(self):
            graphs = seen.engine.graphs
            (ids, pos, *rest), stages, out = next(
                mine for graph, *mine in graphs.graphs.values() if graph is self
            )
            staged = stages[0][:3] + [stages[0][3].tensor]
            seen.replays, seen.copied = seen.replays + 1, [(t, t.clone()) for t in staged]
            out.copy_(graphs.forward.run(ids, pos, graphs.cache.decode_attention(*rest)))

    def on(engine):
        seen.engine, engine.graphs, engine.ahead = (
            engine,
            infer.Graphs(engine.forward, engine.scheduler.max_num_seqs),
            True,
        )
        return engine

    seen.on, init, read = on, infer.Drawn.__init__, infer.Drawn.read

    def drawn(self, *a):
        init(self, *a)
        self.copied, seen.copied = seen.copied, []

    def late(self):
        assert all(torch.equal(now, then) for now, then in self.copied)
        return read(self)

    def capture(graph, pool):
        seen.pools.append(pool)
        return contextlib.nullcontext()

    monkeypatch.setattr(infer.Drawn, '__init__', drawn)
    monkeypatch.setattr(infer.Drawn, 'read', late)
    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in dict(
        CUDAGraph=Graph,
        graph=capture,
        graph_pool_handle=object,
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda s: contextlib.nullcontext(),
    ).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return seen


@pytest.mark.parametrize('arch', ARCHS)
def test_any_schedule_on_graphs(truth, graphs, arch):
    """The program of a CUDA engine: a graph for each power of two of rows, its inputs in memory that is
    written anew for every other step."""
    rng, checked, steps = random.Random(SEED + 3), 0, 0
    for _ in range(25):
        n, counts = schedule(*truth[arch], rng, cuda=graphs)
        checked, steps = checked + n, steps + counts['steps']
    assert checked > 10 and graphs.replays > steps / 4, (SEED, graphs.replays, steps)


def test_graphs_share_one_pool_and_the_largest_comes_first(graphs):
    engine = graphs.on(Engine(tiny(), None, max_num_seqs=6))
    engine.generate([[1]] * 5, [SamplingParams(max_tokens=n, ignore_eos=True) for n in (3, 5, 7, 9, 11)])
    assert (
        list(engine.graphs.graphs) == [8, 4, 2, 1] and len(set(graphs.pools)) == 1 and len(graphs.pools) == 4
    )
    engine.weights_changed()
    assert engine.graphs.graphs  # the weights lie where they lay
    engine.model.wte.weight = torch.nn.Parameter(engine.model.wte.weight.detach().clone())
    engine.weights_changed()
    assert not engine.graphs.graphs


@pytest.mark.parametrize('arch', ARCHS)
def test_any_schedule_gives_the_tokens_of_the_dense_forward(truth, arch):
    rng = random.Random(SEED + 1)
    checked = sum(
        schedule(*truth[arch], rng, **[{}, dict(prefix_caching=True, num_blocks=300)][i % 2])[0]
        for i in range(18)
    )
    assert checked > 10, SEED


def test_memory_that_runs_out_costs_time_not_tokens():
    """Seven requests that grow to 26 tokens each in memory for 66: some are thrown out and start over."""
    model, p = tiny('qwen3'), SamplingParams(max_tokens=25, temperature=0, seed=0)
    engine = Engine(model, None, num_blocks=33, block_size=2)
    out = engine.generate([[i] for i in range(7)], p)
    assert engine.counts['preemptions'] > 0 and idle(engine)
    assert [c.token_ids for c in out] == [dense(model, [i], p)[0] for i in range(7)]


@pytest.mark.slow
def test_thousands_of_schedules(truth):
    rng, checked, seen = random.Random(SEED + 2), 0, dict(preemptions=0, cached_tokens=0)
    while checked < 3000:
        n, counts = schedule(*truth[rng.choice(list(ARCHS))], rng)
        checked, seen = checked + n, {k: v + counts[k] for k, v in seen.items()}
    assert all(seen.values()), (SEED, seen)  # the schedules did preempt and share


@pytest.mark.parametrize('native', [True, False])
@pytest.mark.parametrize('arch', ARCHS)
def test_logprobs_in_float32(arch, native, twins):
    if not native:
        twins()
    model = tiny(arch, torch.float32, vocab=211)
    engine = Engine(model, None, max_num_batched_tokens=40, max_num_seqs=7)
    assert isinstance(engine.forward, infer.Forward) != (native and has_c())
    rng = random.Random(SEED)
    prompts = [[rng.randrange(211) for _ in range(n)] for n in (1, 2, 15, 16, 17, 40, 63, 31)]
    out = engine.generate(prompts, SamplingParams(max_tokens=30, temperature=0.7, n=2, seed=3))
    delta = mismatch(engine, out)
    assert delta['max'] <= 1e-5, delta
    for c in out:  # the processed ones are those of the temperature that RL divides by
        idx = torch.tensor([c.prompt_token_ids + c.token_ids])
        want = model.logprobs(idx, temperature=0.7)[0, len(c.prompt_token_ids) - 1 :]
        assert torch.allclose(want, torch.tensor(c.logprobs), atol=1e-5)
    assert idle(engine)


def has_c():
    return kernels.native is not None and kernels.native.library('DRAW') is not None


@pytest.fixture
def twins():
    """Call it, and PyTorch's twins run in the place of C until the test ends."""
    yield lambda: kernels.use('torch')
    kernels.use('auto')


@pytest.fixture
def compiler():
    if not has_c():
        pytest.skip('no C compiler: the twin runs, which the other tests hold against dense forwards')


@pytest.mark.parametrize(
    'arch, nkv, group, hs, over',
    [
        ('gpt2', 3, 1, 16, {}),
        ('gpt2', 12, 1, 64, dict(act='relu', bias=False)),
        ('llama', 3, 2, 32, {}),
        ('qwen2', 2, 4, 48, dict(tie=False)),
        ('qwen3', 1, 3, 128, {}),
        ('qwen3', 2, 2, 10, dict(n_embd=24, n_inner=40)),
    ],
)
def test_forward_in_c_against_plain_float64(compiler, arch, nkv, group, hs, over):
    """Requests whose blocks lie anywhere, decoding tokens and chunks that see their own beginning; what no
    token wrote is nan. Widths that fill no panel."""
    rng, g = random.Random(SEED), torch.Generator().manual_seed(SEED)
    n_layer, size, blocks, lens = 2, 16, 40, [1, 16, 17, 40, 64, 150, 208]
    model = tiny(
        arch,
        torch.float32,
        vocab=211,
        **dict(n_head=nkv * group, n_kv_head=nkv, head_size=hs, n_embd=72, n_inner=112, block_size=208)
        | over,
    )
    width = kernels.native.padded(hs)
    cache = infer.KVCache(replace(model.config, head_size=width), blocks, size, 208, 16, torch.empty(0))
    net, plain = kernels.native.Forward(model, cache), copy.deepcopy(model).double()
    cache.kv.fill_(math.nan)
    kv, free, decode, chunks = cache.kv, rng.sample(range(blocks), blocks), [], []
    for n in lens:
        r = infer.Request(0, 0, [rng.randrange(211) for _ in range(n)], SamplingParams())
        r.blocks, new = [free.pop() for _ in range(-(-n // size))], rng.choice([1, 1, min(n, 5)])
        for p in range(n - new):
            slot = kv[:, :, r.blocks[p // size], :, p % size]
            slot[..., :hs], slot[..., hs:] = torch.randn(2, n_layer, nkv, hs, generator=g) * 2, 0
        if new == 1:
            decode.append(r)
        else:
            chunks.append((r, n - new, new))
    batch, done, seen = infer.Batch(decode, chunks), kv.clone().double(), []

    def at(owner, p):
        return batch.requests[owner].blocks[p // size], p % size

    def attend(layer, q, k, v):
        out, pairs = [], list(zip(batch.owner.tolist(), batch.pos.tolist()))
        for i, (owner, p) in enumerate(pairs):
            block, offset = at(owner, p)
            done[:, layer, block, :, offset] = torch.stack([F.pad(x[i], (0, width - hs)) for x in (k, v)])
        for i, (owner, p) in enumerate(pairs):
            keys, values = torch.stack(
                [done[:, layer, b, :, o] for b, o in (at(owner, t) for t in range(p + 1))], 2
            )[..., :hs].repeat_interleave(group, 1)
            out.append(((keys @ q[i][:, :, None])[..., 0] / hs**0.5).softmax(-1)[:, None] @ values)
        seen.append(torch.stack(out).view(len(pairs), -1, hs))
        return seen[-1]

    with torch.no_grad():
        want = plain.hidden(torch.tensor(batch.ids()), torch.from_numpy(batch.pos), attend)
    x = net.hidden(batch)
    got, rows = net.logits(x, range(len(x))).clone(), len(x)  # valid until the next call
    assert torch.allclose(got.double(), plain.lm_head(want), rtol=1e-4, atol=2e-4), (
        SEED,
        float((got - plain.lm_head(want)).abs().max()),
    )
    att = net.work[3, :rows, : nkv * group * hs].view(rows, -1, hs).double()  # of the last layer
    assert torch.allclose(att, seen[-1], rtol=1e-4, atol=1e-4), SEED
    assert torch.equal(
        kv.isnan(), done.isnan()
    )  # new keys and values are where they belong, and nothing else has changed
    assert torch.allclose(kv.nan_to_num(9.0).double(), done.nan_to_num(9.0), rtol=1e-4, atol=1e-4)
    assert torch.equal(net.logits(net.hidden(batch), [3, 0, rows - 1]), got[[3, 0, rows - 1]])
    with pytest.raises(AssertionError, match='rows of logits'):
        net.logits(x, [0] * (rows + 1))


def test_draw_in_c_against_the_plain_formula(compiler):
    g = torch.Generator().manual_seed(SEED)
    for V, scale in ((1, 1.0), (5, 1.0), (512, 3.0), (513, 9.0), (3000, 0.5)):
        z = (torch.randn(40, V + 3, generator=g) * scale)[:, :V]
        if V > 5:
            z[::3, 1::2] = -math.inf
        rows = [
            infer.Request(
                i, 0, [1], SamplingParams(seed=i, temperature=[0, 1, 0.6, 1.7][i % 4]), infer._mix(SEED, i)
            )
            for i in range(40)
        ]
        s, outs = infer.Settings(rows, [], z.device, z.dtype), np.arange(40)
        assert kernels.native.draw(z, torch.zeros(40, dtype=torch.float64), s.heat) is not None
        tokens, lp, raw, _ = infer.sample(z, s, outs)
        u = uniform(s.keys, outs.astype(np.uint64))
        for i, r in enumerate(rows):
            probs, t = distribution(z[i], [], 0, r.params), int(tokens[i])
            end = float(probs[: t + 1].sum())
            assert probs[t] > 0 and (
                r.params.temperature == 0 or end - float(probs[t]) - 1e-6 <= u[i] <= end + 1e-6
            ), (SEED, V, i)
            assert float(raw[i]) == pytest.approx(float(z[i].double().log_softmax(-1)[t]), abs=2e-6, rel=1e-6)
            assert float(lp[i]) == pytest.approx(
                float(raw[i]) if r.params.temperature == 0 else math.log(probs[t]), abs=2e-6, rel=1e-6
            )
        z[7, V // 2] = math.nan
        with pytest.raises(FloatingPointError, match='1 of 40'):
            infer.Drawn(s, outs, *infer.sample(z, s, outs)).read()


@pytest.mark.parametrize('arch', ARCHS)
def test_c_path_in_any_schedule(compiler, arch):
    """float32: whatever the schedule, tokens and log-probs are to the last bit those of the request alone;
    the dense forward's within its rounding; and with the twin in its place the tokens are the same."""
    model = tiny(
        arch,
        torch.float32,
        vocab=211,
        n_embd=64,
        head_size=16,
        n_head=4,
        n_kv_head=4 if arch == 'gpt2' else 2,
    )
    rng, seen = random.Random(SEED), dict(preemptions=0, cached_tokens=0)
    single = Engine(model, None, max_num_seqs=1, prefix_caching=False, threads=1)
    for i in range(6):
        kw = dict(
            max_num_batched_tokens=rng.choice([3, 17, 500]),
            max_num_seqs=rng.choice([2, 5, 16]),
            block_size=16,
            num_blocks=200,
            threads=1,
        )
        if i % 3 == 0:
            kw |= dict(
                max_num_seqs=16, max_num_batched_tokens=500, num_blocks=6
            )  # too few: somebody must wait
        trunk = [rng.randrange(4) for _ in range(30)]
        prompts = [
            trunk[: rng.randint(1, 30)] + [rng.randrange(4) for _ in range(rng.randint(0, 9))]
            for _ in range(12)
        ]
        params = [
            SamplingParams(
                max_tokens=rng.randint(1, 22),
                temperature=0.7,
                seed=j,
                top_k=5,
                logit_bias={t: 5 for t in range(4)},
            )
            for j in range(12)
        ]
        if i % 2:
            params = [
                SamplingParams(max_tokens=p.max_tokens, temperature=rng.choice([0, 0.3, 1]), seed=p.seed)
                for p in params
            ]
        engine = Engine(model, None, **kw)
        assert 'in C' in repr(engine)
        out, alone = engine.generate(prompts, params), single.generate(prompts, params)
        assert [(c.token_ids, c.raw_logprobs, c.logprobs) for c in out] == [
            (c.token_ids, c.raw_logprobs, c.logprobs) for c in alone
        ], (SEED, kw)
        assert mismatch(engine, out)['max'] <= 1e-5 and idle(engine), (SEED, kw)
        seen = {k: v + engine.counts[k] for k, v in seen.items()}
        kernels.use('torch')
        try:
            twin = Engine(model, None, **kw)
            same = [a.token_ids == b.token_ids for a, b in zip(out, twin.generate(prompts, params))]
        finally:
            kernels.use('auto')
        assert 'in C' not in repr(twin) and sum(same) >= 11, (
            SEED,
            kw,
            same,
        )  # a draw within a rounding of its border may fall on either side
    assert all(seen.values()), (SEED, seen)


def test_c_path_to_the_bit_with_any_number_of_threads(compiler):
    model, p = tiny('qwen3', torch.float32, vocab=211, head_size=16), SamplingParams(max_tokens=5, seed=1)
    one, three = (Engine(model, None, threads=n).generate([[1, 2, 3], [4] * 30], p) for n in (1, 3))
    assert [(c.token_ids, c.logprobs) for c in one] == [(c.token_ids, c.logprobs) for c in three]


def test_grouped_heads_untied_long_and_bfloat16():
    """Odd shapes: 6 heads on 3, head_size that is not C / nh, long prompts; bfloat16 stays near float32."""
    model = tiny(
        'qwen3',
        torch.float32,
        vocab=50,
        n_head=6,
        n_kv_head=3,
        head_size=10,
        n_embd=24,
        block_size=700,
        tie=False,
    )
    engine = Engine(model, None, max_num_seqs=3, block_size=16)
    out = engine.generate([list(range(50)) * 8, [1, 2, 3], [4] * 60], SamplingParams(max_tokens=250, seed=1))
    out += engine.generate(
        [list(range(50)) + [7] * 300], SamplingParams(max_tokens=20, seed=1)
    )  # and behind what the prefix cache has
    assert mismatch(engine, out)['max'] <= 2e-5 and engine.counts['cached_tokens'] == 48
    half = Engine(tiny('qwen3', torch.bfloat16, vocab=50), None)
    assert (
        mismatch(
            half,
            half.generate([[1, 2, 3]] * 3, SamplingParams(max_tokens=40, seed=1)),
            tiny('qwen3', torch.float32, vocab=50),
        )['mean']
        < 0.1
    )


# ---- blocks ----


def test_block_manager_never_loses_a_block():
    rng, m, held = random.Random(SEED), Blocks(20, 4), []
    for i in range(3000):
        if rng.random() < 0.55 and m.available():
            b = m.take()
            if rng.random() < 0.5:
                m.publish(b, b'%d' % rng.randrange(30), [1, 2, 3, i])
            held.append(b)
        elif held and rng.random() < 0.2:
            held.append(rng.choice(held))
            m.hold(held[-1])
        elif held:
            m.drop([held.pop(rng.randrange(len(held)))])
        assert sorted(m.free + list(m.cached) + list(set(held))) == list(range(20))
        assert all(m.name[b] == n for n, b in m.table.items())
    m.drop(held)
    m.forget()
    assert len(m.free) == 20 and not m.table


def test_prefix_names_hold_tokens_history_and_version():
    m = Blocks(8, 2)
    a, b = m.names([1, 2, 3, 4, 5], [], 0), m.names([9, 9, 3, 4], [], 0)
    assert len(a) == 2 and a[1] != b[1] and a != m.names([1, 2, 3, 4], [], 1)
    blocks = [m.take(), m.take()]
    for block, name, tokens in zip(blocks, a, ([1, 2], [3, 4])):
        m.publish(block, name, tokens)
    assert m.match(m.names([1, 2, 3, 4, 7], [], 0), [1, 2, 3, 4, 7]) == blocks
    assert m.match(a, [1, 2, 3, 4]) == blocks[:1]  # the last token is computed, for its logits
    m.tokens[blocks[0]] = [1, 3]  # a collision: the name fits, the tokens do not
    assert m.match(a, [1, 2, 3, 4, 5]) == []


def test_prefix_is_computed_once_and_survives_a_full_hit():
    engine = Engine(tiny(), None, block_size=4)
    prompt, p = list(range(16)), SamplingParams(max_tokens=3, temperature=0)
    first = engine.generate([prompt], p)[0]
    assert engine.generate([prompt], p)[0].token_ids == first.token_ids
    assert engine.counts['cached_tokens'] == 12  # of 16: the last block is computed again
    engine.generate([prompt[:9]], SamplingParams(max_tokens=1))
    assert engine.counts['cached_tokens'] == 20
    engine.weights_changed()
    engine.generate([prompt], p)
    assert engine.counts['cached_tokens'] == 20 and idle(engine)


def test_n_samples_share_one_prefill_and_are_distinct_and_repeatable():
    engine = Engine(tiny(), None, prefix_caching=False)
    p = SamplingParams(max_tokens=12, n=6, seed=5)
    out = engine.generate([[1, 2, 3, 4, 5]], p)
    assert engine.counts['prompt_tokens'] == 5 and [c.index for c in out] == list(range(6))
    assert len({tuple(c.token_ids) for c in out}) == 6
    assert [
        c.token_ids for c in Engine(tiny(), None, max_num_seqs=2).generate([[7], [1, 2, 3, 4, 5]], p)[6:]
    ] == [c.token_ids for c in out]
    assert [c.prompt_index for c in engine.generate([[1], [2]], SamplingParams(n=2, max_tokens=1))] == [
        0,
        0,
        1,
        1,
    ]
    a, b = (Engine(tiny(), None, seed=s).generate([[1], [1]], SamplingParams(max_tokens=20)) for s in (1, 1))
    assert [c.token_ids for c in a] == [c.token_ids for c in b] and a[0].token_ids != a[
        1
    ].token_ids  # seed None: the engine's, in order


# ---- sampling ----


def test_uniform_is_uniform():
    u = uniform(
        np.array([infer._mix(i, 0) for i in range(2000)], np.uint64)[:, None], np.arange(100, dtype=np.uint64)
    )
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.004 and abs(u.var() - 1 / 12) < 0.002
    assert abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]) < 0.1 and abs(np.corrcoef(u[0], u[1])[0, 1]) < 0.4
    counts = np.histogram(u, 20, (0, 1))[0]
    assert ((counts - 10000) ** 2 / 10000).sum() < 50  # chi-square, 19 degrees: 43.8 at 0.1 %


def test_filters_against_the_plain_formula():
    """Large vocabularies go through the top few hundred; ties at the border stay together, so inputs have
    none."""
    g = torch.Generator().manual_seed(SEED)
    for V, scale in ((5, 1.0), (300, 3.0), (5000, 0.3), (5000, 6.0)):
        z = torch.randn(40, V, generator=g, dtype=torch.float64) * scale
        k = torch.tensor([random.choice([0, 0, 1, 3, 50, V, V + 7]) for _ in range(40)])
        p = torch.tensor([random.choice([1.0, 0.9, 0.5, 0.05, 0.99]) for _ in range(40)], dtype=torch.float64)
        m = torch.tensor([random.choice([0.0, 0.0, 0.01, 0.3]) for _ in range(40)], dtype=torch.float64)
        got = infer._cut(z.clone(), k, p, m).softmax(-1)
        for i in range(40):
            want = distribution(
                z[i], [], 0, SamplingParams(top_k=int(k[i]), top_p=float(p[i]), min_p=float(m[i]))
            )
            assert torch.allclose(got[i], want, atol=1e-12), (SEED, V, k[i], p[i], m[i])


def test_every_setting_keeps_to_itself_in_one_batch():
    """All cases at once in one batch; each row draws from its own distribution, its log-prob is that
    distribution's."""
    model = tiny(vocab=23)
    params = [SamplingParams(max_tokens=10, seed=i, logprobs=i % 4, **case) for i, case in enumerate(CASES)]
    out = Engine(model, None).generate([[i, 5, 6] for i in range(len(CASES))], params)
    for i, (c, p) in enumerate(zip(out, params)):
        tokens, lps, raws = dense(model, [i, 5, 6], p)
        assert (
            c.token_ids == tokens
            and c.logprobs == pytest.approx(lps, abs=1e-9)
            and c.raw_logprobs == pytest.approx(raws, abs=1e-9)
        )
        assert all(
            len(top) == p.logprobs and list(top.values()) == sorted(top.values(), reverse=True)
            for top in c.top_logprobs
        )
        if p.logprobs and p.temperature == 0 and not p.frequency_penalty:
            assert all(
                top[t] == pytest.approx(raw)
                for top, t, raw in zip(c.top_logprobs, c.token_ids, c.raw_logprobs)
            )


def chi_square(counts, probs):
    """-> the statistic divided by its 99.99 % bound (Wilson-Hilferty), over cells that expect 5 or more."""
    n = sum(counts.values())
    cells = [(counts.get(k, 0), n * q) for k, q in probs.items() if n * q >= 5]
    rest = n - sum(o for o, _ in cells), n - sum(e for _, e in cells)
    cells += [rest] if rest[1] >= 5 else []
    df = len(cells) - 1
    return sum((o - e) ** 2 / e for o, e in cells) / (
        df * (1 - 2 / (9 * df) + 3.72 * math.sqrt(2 / (9 * df))) ** 3
    )


def exact(model, prompt, n, p):
    """{tokens: probability} of all continuations of n tokens, by enumeration of the vocabulary."""
    probs = {(): 1.0}
    for _ in range(n):
        step = {}
        for head, q in probs.items():
            with torch.no_grad():
                logits = model(torch.tensor([prompt + list(head)]))[0][0, -1]
            for t, x in enumerate(distribution(logits, prompt + list(head), len(prompt), p).tolist()):
                step[head + (t,)] = q * x
        probs = step
    return probs


def test_samples_follow_the_exact_distribution():
    """Vocabulary of 3, all 27 continuations enumerated."""
    model, p = tiny(vocab=3), SamplingParams(max_tokens=3, temperature=0.8, seed=SEED, n=3000)
    engine = Engine(model, None, prefix_caching=False, num_blocks=20000, max_num_batched_tokens=8192)
    out = engine.generate([[0, 1, 2, 0, 1]], p)
    counts = {}
    for c in out:
        counts[tuple(c.token_ids)] = counts.get(tuple(c.token_ids), 0) + 1
    assert chi_square(counts, exact(model, [0, 1, 2, 0, 1], 3, p)) < 1, SEED


def test_top_p_of_zero_temperature_and_a_peaked_model():
    """A distribution with all mass on one token, and u at its ends, never draws a token of probability 0."""
    z = torch.full((4, 9), -80.0)
    z[:, 4] = 80.0
    rows = [
        infer.Request(i, 0, [1], SamplingParams(max_tokens=3, seed=i), infer._mix(i, 0)) for i in range(4)
    ]
    s = infer.Settings(rows, [], z.device, z.dtype)
    tokens, lp, raw, _ = infer.sample(z, s, np.zeros(4, np.int64))
    assert tokens.tolist() == [4] * 4 and lp.abs().max() < 1e-6 and raw.abs().max() < 1e-6
    infer_uniform, ends = infer.uniform, np.array([0.0, 1 - 2.0**-53, 0.5, 1 - 2.0**-53])
    try:
        infer.uniform = lambda keys, t: ends
        z = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]] * 4)
        assert infer.sample(z, s, np.zeros(4, np.int64))[0].tolist()[:2] == [1, 2]
    finally:
        infer.uniform = infer_uniform


# ---- where it ends ----


@pytest.fixture(scope='module')
def byte_engine():
    tok = get_tokenizer('byte')
    return Engine(tiny('llama', torch.float32, vocab=tok.vocab_size, block_size=200), tok)


def test_eos_is_an_action_without_text(byte_engine):
    tok = byte_engine.tokenizer
    force = {tok.eot: 1000.0}
    c = byte_engine.generate(['ab'], SamplingParams(max_tokens=9, logit_bias=force))[0]
    assert (c.token_ids, c.text, c.finish_reason) == ([tok.eot], '', 'stop')
    c = byte_engine.generate(['ab'], SamplingParams(max_tokens=9, logit_bias=force, min_tokens=4))[0]
    assert len(c.token_ids) == 5 and tok.eot not in c.token_ids[:4] and c.finish_reason == 'stop'
    c = byte_engine.generate(['ab'], SamplingParams(max_tokens=9, logit_bias=force, ignore_eos=True))[0]
    assert c.token_ids == [tok.eot] * 9 and c.finish_reason == 'length'
    c = byte_engine.generate(
        ['ab'], SamplingParams(max_tokens=9, logit_bias={66: 1000.0}, stop_token_ids=[66])
    )[0]
    assert (c.token_ids, c.text, c.finish_reason) == ([66], '', 'stop')


def script(engine, text):
    """The engine's sampler draws the bytes of `text`, whatever the logits."""
    plan = list(text.encode())

    def draw(logits, s, outs):
        tokens, lp, raw, top = infer_sample(logits, s, outs)
        return torch.tensor([plan[o % len(plan)] for o in outs.tolist()]), lp, raw, top

    return draw


infer_sample = infer.sample


@pytest.mark.parametrize(
    'stop, text, tokens',
    [
        ('lo w', 'hel', 7),
        ('world', 'hello ', 11),
        ('zzz', 'hello world!', 12),
        (['wor', 'o'], 'hell', 5),
        ('ab', 'hello world!', 12),
        (['d!', 'world!'], 'hello ', 12),
    ],
)
def test_stop_strings_cut_text_not_tokens(byte_engine, monkeypatch, stop, text, tokens):
    """'ab' ends the prompt and would match only there; two strings that end together: the earlier beginning
    cuts."""
    monkeypatch.setattr(infer, 'sample', script(byte_engine, 'hello world!'))
    p = SamplingParams(max_tokens=12, stop=stop)
    c = byte_engine.generate(['xxab'], p)[0]
    assert (c.text, len(c.token_ids)) == (text, tokens) and c.finish_reason == (
        'length' if tokens == 12 and stop in ('zzz', 'ab') else 'stop'
    )
    byte_engine.add_request('xxab', p)
    pieces = []
    while byte_engine.has_unfinished():
        pieces += [e['text'] for e in byte_engine.step()]
    assert ''.join(pieces) == text  # streamed text never shows the beginning of what is cut later


def test_streamed_text_waits_for_whole_characters(byte_engine, monkeypatch):
    monkeypatch.setattr(infer, 'sample', script(byte_engine, 'aé€🙂'))
    byte_engine.add_request('x', SamplingParams(max_tokens=10))
    events = []
    while byte_engine.has_unfinished():
        events += byte_engine.step()
    assert [e['text'] for e in events] == ['a', '', 'é', '', '', '€', '', '', '', '🙂']
    assert [e['finished'] for e in events] == [False] * 9 + [True] and sum(
        len(e['token_ids']) for e in events
    ) == 10


def test_what_can_never_run_is_refused(byte_engine):
    engine = Engine(byte_engine.model, byte_engine.tokenizer, num_blocks=2, block_size=16)
    for prompt, p, word in (
        ([], {}, 'empty'),
        ('', {}, 'empty'),
        ([1] * 200, {}, 'context'),
        ([999], {}, 'vocabulary'),
        ([-1], {}, 'vocabulary'),
        ([1] * 10, dict(max_tokens=23), 'blocks'),
        ([1], dict(logit_bias={999: 1.0}), 'vocabulary'),
    ):
        with pytest.raises(ValueError, match=word):
            engine.add_request(prompt, SamplingParams(**p))
        with pytest.raises(ValueError, match=word):
            engine.generate([[1], prompt], SamplingParams(**p))
    for bad in (
        dict(top_k=-2),
        dict(max_tokens=1.5),
        dict(presence_penalty=float('nan')),
        dict(repetition_penalty=0),
        dict(logit_bias={1: math.nan}),
        dict(logit_bias={1: math.inf}),
        dict(max_tokens=0),
        dict(temperature=-1),
        dict(temperature=float('nan')),
        dict(top_p=0),
        dict(top_p=1.1),
        dict(min_p=2),
        dict(n=0),
        dict(stop=''),
        dict(min_tokens=99),
    ):
        with pytest.raises(ValueError, match='SamplingParams') as e:
            SamplingParams(**bad)
        assert next(iter(bad)) in str(e.value) and str(e.value).endswith(
            f'got {[""] if "stop" in bad else next(iter(bad.values()))!r}'
        )
    with pytest.raises(ValueError, match='list'):
        engine.generate('text')
    with pytest.raises(ValueError, match='2 prompts'):
        engine.generate([[1], [2]], [SamplingParams()])
    with pytest.raises(ValueError, match='already'):
        engine.add_request([1], request_id='a')
        engine.add_request([1], request_id='a')
    engine.abort('a')
    engine.abort('a')
    assert len(
        engine.generate([[1] * 10], SamplingParams(max_tokens=22, ignore_eos=True))[0].token_ids
    ) == 22 and idle(engine)


def test_context_caps_the_length():
    engine = Engine(tiny(), None)
    c = engine.generate([[1] * 60], SamplingParams(max_tokens=500))[0]
    assert len(c.token_ids) == 4 and c.finish_reason == 'length' and len(c.weight_versions) == 4


@pytest.mark.parametrize('temperature', [1e-42, 1e-39, 1e-38, 1e-12, 1e-6])
@pytest.mark.parametrize('native', [True, False])
def test_a_temperature_near_zero_is_zero(byte_engine, twins, native, temperature):
    if not native:
        twins()
    engine = Engine(byte_engine.model, None)
    cold, near = (
        engine.generate([[1, 2, 3]], SamplingParams(max_tokens=9, temperature=t, top_p=p, seed=1))[0]
        for t, p in ((0, 1), (temperature, 0.9))
    )
    assert (
        near.token_ids == cold.token_ids
        and near.logprobs == cold.logprobs
        and np.isfinite(near.logprobs).all()
    )


@pytest.mark.parametrize('native', [True, False])
def test_more_samples_than_tokens_of_a_step(twins, native):
    """One row of logits for all samples of a prompt: the work space is as large as the step has tokens."""
    if not native:
        twins()
    engine = Engine(tiny('qwen3', torch.float32, vocab=211, head_size=16), None, max_num_seqs=300)
    many, few = (engine.generate([[1], [2]], SamplingParams(max_tokens=6, n=n, seed=3)) for n in (128, 64))
    assert [c.token_ids for c in many[:64] + many[128:192]] == [c.token_ids for c in few] and len(
        {tuple(c.token_ids) for c in many[:128]}
    ) > 100


def test_each_end_token_ends(byte_engine):
    """The tokenizer's, all of generation_config.json's (or config.json's), with min_tokens and ignore_eos
    for each."""
    model, tok = (
        copy.copy(byte_engine.model),
        types.SimpleNamespace(
            eot=256,
            stop_ids=[256, 70],
            encode=byte_engine.tokenizer.encode,
            decode=byte_engine.tokenizer.decode,
        ),
    )
    for eos, ends in ((None, [70, 256]), (65, [65, 70, 256]), ([65, 66, 9999], [65, 66, 70, 256])):
        model.config = copy.copy(byte_engine.model.config)
        model.config.eos_token_id = eos
        engine = Engine(model, tok)
        assert engine.end_ids() == ends
        for end in ends:
            p = dict(max_tokens=6, logit_bias={end: 1000.0, 67: 900.0})
            ended, later, never = engine.generate(
                ['x'] * 3,
                [
                    SamplingParams(**p),
                    SamplingParams(**p, min_tokens=3),
                    SamplingParams(**p, ignore_eos=True),
                ],
            )
            assert (ended.token_ids, ended.text, ended.finish_reason) == (
                [end],
                '',
                'stop',
            ) and never.token_ids == [end] * 6
            assert later.finish_reason == 'stop' and later.token_ids == [67] * 3 + [end]


@pytest.mark.parametrize(
    'eos, generation, want',
    [
        (2, None, 2),
        ([2, 5], None, [2, 5]),
        (2, dict(eos_token_id=[2, 7]), [2, 7]),
        (2, dict(temperature=1), 2),
    ],
)
def test_end_tokens_of_a_folder(tmp_path, eos, generation, want):
    model = tiny('llama', torch.float32)
    model.config.eos_token_id = eos
    model.save_pretrained(tmp_path)
    if generation:
        (tmp_path / 'generation_config.json').write_text(json.dumps(generation))
    model = GPT.from_pretrained(tmp_path)
    assert model.config.eos_token_id == want
    model.save_pretrained(tmp_path / 'again')
    assert json.loads((tmp_path / 'again' / 'config.json').read_text())['eos_token_id'] == want


def test_held_back_text_against_brute_force():
    """Random texts and stop strings over two letters: a stream never shows what a stop string cuts, and
    shows all that can no longer be cut."""
    rng = random.Random(SEED)
    for _ in range(300):
        stops = [''.join(rng.choice('ab') for _ in range(rng.randint(1, 5))) for _ in range(2)] + [
            'a' * 150_000
        ]
        r, shown = (
            infer.Request(
                0,
                0,
                [1],
                SamplingParams(max_tokens=40, stop=stops),
                tokenizer=types.SimpleNamespace(decode=lambda ids: ''.join(ids)),
                stream=True,
            ),
            '',
        )
        r.tokens, text = [''], ''
        for _ in range(12):
            r.tokens.append(rng.choice(['a', 'b', 'ab', 'ba']))
            text = ''.join(r.tokens)
            if r.hits_stop():
                r.finish_reason = 'stop'
            shown += r.event()['text']
            hits = [text.find(s) for s in stops if s in text]
            held = max((n for s in stops for n in range(1, 30) if s[:n] == text[-n:]), default=0)
            assert shown == (text[: min(hits)] if hits else text[: len(text) - held]), (SEED, stops, text)
            if hits:
                break


def test_free_memory_without_linux(monkeypatch):
    """macOS knows no free pages, another system none at all; both get an engine."""
    for missing in (
        ['SC_AVPHYS_PAGES', 'SC_PAGE_SIZE'],
        ['SC_AVPHYS_PAGES', 'SC_PAGE_SIZE', 'SC_PHYS_PAGES'],
    ):
        names = {k: v for k, v in os.sysconf_names.items() if k not in missing}
        real = os.sysconf
        monkeypatch.setattr(os, 'sysconf_names', names)
        monkeypatch.setattr(os, 'sysconf', lambda name, real=real, names=names: real(names[name]))
        assert infer._free_memory(torch.device('cpu')) > 1 << 28 and Engine(tiny(), None).generate(
            [[1]], SamplingParams(max_tokens=2)
        )
        monkeypatch.undo()


def test_keys_and_values_take_what_they_may():
    """kv_memory bounds the blocks; what they take is said; less than one block is one block."""
    model = tiny()
    whole = Engine(model, max_num_seqs=8)
    each = whole.kv_bytes // whole.num_blocks
    half = Engine(model, max_num_seqs=8, kv_memory=whole.kv_bytes // 2 + each - 1)
    assert half.num_blocks == whole.num_blocks // 2 and half.kv_bytes == half.num_blocks * each
    assert f'{half.kv_bytes / 1e6:.0f} MB' in repr(half)
    assert Engine(model, max_num_seqs=8, kv_memory=1).num_blocks == 1


def test_a_device_without_float64_draws_on_the_cpu(monkeypatch):
    """Apple's GPUs, played: nothing of float64 is made on the device, and the tokens are the CPU's."""
    model, p = (
        tiny('llama', torch.float32),
        [SamplingParams(max_tokens=9, seed=i, top_p=0.8, repetition_penalty=1.2) for i in range(4)],
    )
    want = Engine(model, None).generate([[1, 2]] * 4, p)
    sent = []

    class Apple:
        """Logits that say they lie on an Apple GPU."""

        def __init__(self, z):
            self.z, self.device = z, torch.device('mps')

        def cpu(self):
            sent.append(self.z)
            return self.z

    monkeypatch.setattr(kernels, 'product', lambda a, b: Apple(a @ b.t()))
    kernels.use('torch')
    try:
        got = Engine(model, None).generate([[1, 2]] * 4, p)
    finally:
        kernels.use('auto')
    assert [c.token_ids for c in got] == [c.token_ids for c in want] and sent


# ---- the verbs of RL ----


def test_load_weights_between_tokens():
    """Weights change after 5 tokens: versions tell which made which; later tokens are the new model's on
    the old cache; nothing of the old prefix cache is found, nothing computed before is published."""
    a, b = tiny(seed=0), tiny(seed=1)
    state = {k: v.clone() for k, v in b.state_dict().items()}
    engine = Engine(a, None, block_size=4)
    p = SamplingParams(max_tokens=12, temperature=0)
    engine.add_request(list(range(9)), p)
    out = [engine.step()[0] for _ in range(5)]
    engine.load_weights(state)
    while engine.has_unfinished():
        out += engine.step()
    tokens = [e['token_ids'][0] for e in out]
    old = dense(tiny(seed=0), list(range(9)), SamplingParams(max_tokens=12, temperature=0, seed=0))[0]
    assert (
        tokens[:5] == old[:5]
        and engine.stats()['weight_version'] == 1
        and engine.stats()['cached_blocks'] == 0
    )
    fresh = engine.generate([list(range(9))], p)[0]
    assert engine.counts['cached_tokens'] == 0 and fresh.weight_versions == [1] * 12
    assert (
        fresh.token_ids == dense(b, list(range(9)), SamplingParams(max_tokens=12, temperature=0, seed=0))[0]
    )
    with pytest.raises(ValueError, match='wte.weight'):
        engine.load_weights({**state, 'wte.weight': torch.zeros(2, 2)})
    with pytest.raises(ValueError, match='nonsense'):
        engine.load_weights({**state, 'nonsense': torch.zeros(1)})
    assert idle(engine)


def test_tables_hold_the_blocks_of_now():
    """Rows come, go, grow, change places and lose their blocks (a request thrown out and let in again):
    what is copied to the GPU is always theirs."""
    rng, rows, tables = random.Random(SEED), [], infer.Tables(8, 12)
    for _ in range(400):
        if len(rows) < 8 and (not rows or rng.random() < 0.3):
            rows.append(infer.Request(0, 0, [1], SamplingParams()))
        if len(rows) > 1 and rng.random() < 0.2:
            rows.pop(rng.randrange(len(rows)))
        if rng.random() < 0.1:
            rng.shuffle(rows)
        for r in rows:
            if not r.blocks or rng.random() < 0.1:
                r.blocks = [rng.randrange(99) for _ in range(rng.randint(1, 12))]
            elif len(r.blocks) < 12 and rng.random() < 0.5:
                r.blocks.append(rng.randrange(99))
        table = tables.fill(rows).tolist()
        assert all(row[: len(r.blocks)] == r.blocks for row, r in zip(table, rows))


@pytest.mark.parametrize('when', range(1, 7))
def test_a_step_started_ahead_changes_no_token(monkeypatch, graphs, when):
    """Every decode step starts before the one before it is read, as on CUDA. Ends by an end token, a stop
    token and the limit, an abort and new weights in between: tokens, versions and blocks are those of an
    engine that waits."""
    rng, started = random.Random(SEED + when), []
    ahead = Engine._start_ahead
    monkeypatch.setattr(
        Engine, '_start_ahead', lambda self, drawn: started.append(ahead(self, drawn)) or started[-1]
    )
    prompts = [[rng.randrange(23) for _ in range(rng.randint(1, 20))] for _ in range(9)]
    params = [
        SamplingParams(
            max_tokens=rng.choice([1, 3, 20, 40]) if i else 40,
            seed=i,
            temperature=rng.choice([0, 0.8]),
            stop_token_ids=[rng.randrange(23)] if i % 2 else [],
        )
        for i in range(9)
    ]
    events, versions = [], []
    for waits in (True, False):
        engine = Engine(tiny(seed=0), None, block_size=4, num_blocks=70)
        if not waits:
            graphs.on(engine)
        for i, (x, p) in enumerate(zip(prompts, params)):
            engine.add_request(x, p, request_id=i)
        seen = {}

        def read(until):
            """Steps until request 3 has so many tokens or is over (an engine that is ahead shows a token
            one step later)."""
            while engine.has_unfinished() and len(seen.get(3, ())) < until:
                for e in engine.step():
                    seen.setdefault(e['request_id'], []).extend(zip(e['token_ids'], e['raw_logprobs']))

        read(when)
        engine.abort(4)
        gone = len(seen.pop(4, ()))
        if when % 2:
            engine.load_weights(
                {k: v.clone() for k, v in tiny(seed=1).state_dict().items()}, recompute=when % 4 == 1
            )
            for group in engine.requests.values():
                versions += [(waits, r.id, r) for r in group]
        read(99)
        assert idle(engine) and gone <= params[4].max_tokens
        events.append(seen)
    assert any(d is not None for d in started)
    if not when % 2:
        assert events[0].keys() == events[1].keys()
        for i in events[0]:
            assert [t for t, _ in events[0][i]] == [t for t, _ in events[1][i]] and [
                p for _, p in events[0][i]
            ] == pytest.approx([p for _, p in events[1][i]], abs=1e-9)
    else:  # what was on its way belongs to the old weights: the new ones make the token behind it
        assert all(r.versions == sorted(r.versions) and set(r.versions) <= {0, 1} for *_, r in versions)
        for i, row in events[1].items():
            old, start = (
                dense(tiny(seed=0), prompts[i], params[i])[0],
                next((r.versions.count(0) for w, j, r in versions if not w and j == i), len(row)),
            )
            assert [t for t, _ in row[:start]] == old[:start]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
def test_weights_are_read_where_the_trainer_writes_them(arch, dtype):
    model = tiny(arch, dtype)
    engine = Engine(model, None)
    engine.generate([[1, 2]], SamplingParams(max_tokens=3))
    opt = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.0)
    model(torch.tensor([[1, 2, 3, 4]]), torch.tensor([[2, 3, 4, 5]]))[1].backward()
    opt.step()
    assert engine.weights_changed() == 1
    out = engine.generate([[1, 2, 3]] * 2, SamplingParams(max_tokens=20, n=2))
    assert mismatch(engine, out)['max'] < 1e-5 and out[0].weight_versions == [1] * 20


def test_lora_runs_merged():
    import lora

    model = lora.add_lora(tiny('llama', torch.float32), 4, 8, targets=('q_proj', 'v_proj', 'down_proj'))
    for name, p in model.named_parameters():
        if 'lora_B' in name:
            torch.nn.init.normal_(p, std=0.3)
    engine = Engine(model, None)
    assert mismatch(engine, engine.generate([[1, 2, 3]] * 2, SamplingParams(max_tokens=20)))['max'] < 1e-5
    with lora.lora_disabled(model):
        base = model.logprobs(torch.tensor([[1, 2, 3, 4]]))
        engine.weights_changed()
        out = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=1, logit_bias={4: 1000.0}))[0]
        assert out.raw_logprobs[0] == pytest.approx(float(base[0, 2]), abs=1e-5)


def test_another_thread_loads_weights():
    """A rollout thread generates while a trainer thread swaps weights: all tokens are accounted to a
    version, in order."""
    engine, result = Engine(tiny(dtype=torch.float32), None), []
    p = SamplingParams(max_tokens=50, ignore_eos=True)
    worker = threading.Thread(target=lambda: result.extend(engine.generate([[i] for i in range(20)] * 3, p)))
    worker.start()
    for seed in range(1, 6):
        engine.load_weights(tiny(dtype=torch.float32, seed=seed).state_dict(), version=seed * 10)
    worker.join(60)
    assert len(result) == 60 and all(
        len(c.weight_versions) == len(c.token_ids) == 50 and c.weight_versions == sorted(c.weight_versions)
        for c in result
    )
    assert {v for c in result for v in c.weight_versions} <= {0, 10, 20, 30, 40, 50} and idle(engine)


def test_generate_and_streams_do_not_steal_from_each_other():
    engine = Engine(tiny(), None)
    engine.add_request([1, 2], SamplingParams(max_tokens=30, temperature=0), request_id='s')
    assert len(engine.generate([[3]], SamplingParams(max_tokens=5, temperature=0))[0].token_ids) == 5
    tokens = []
    while engine.has_unfinished():
        tokens += [t for e in engine.step() for t in e['token_ids']]
    assert tokens == dense(engine.model, [1, 2], SamplingParams(max_tokens=30, temperature=0, seed=0))[0]


def test_logits_that_are_not_finite_stop_the_run():
    model = tiny(dtype=torch.float32)
    engine = Engine(model, None)
    good = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5, temperature=0))[0].token_ids
    state = {k: v.clone() for k, v in model.state_dict().items()}
    engine.load_weights({k: v * float('nan') for k, v in state.items()})
    with pytest.raises(FloatingPointError, match='not finite'):
        engine.generate([[1, 2, 3]] * 4, SamplingParams(max_tokens=5))
    assert idle(engine)
    engine.load_weights(state)
    assert engine.generate([[1, 2, 3]], SamplingParams(max_tokens=5, temperature=0))[0].token_ids == good


def test_a_step_on_its_way_that_is_not_finite_stops_new_weights_too(twins):
    twins()
    model = tiny(dtype=torch.float32)
    state, engine = {k: v.clone() for k, v in model.state_dict().items()}, Engine(model, None)
    engine.ahead = True
    good = engine.generate([[1, 2, 3]], SamplingParams(max_tokens=9, temperature=0))[0].token_ids
    engine.add_request([1, 2, 3], SamplingParams(max_tokens=9, temperature=0))
    seen = []
    while len(seen) < 3:
        seen += [t for e in engine.step() for t in e['token_ids']]
    with torch.no_grad():
        model.ln_f.weight.mul_(float('nan'))
    engine.step()  # reads a good step, starts one that is not
    with pytest.raises(FloatingPointError, match='1 of 1'):
        engine.load_weights(state)
    assert (
        seen == good[:3] and idle(engine) and engine.weight_version == 0 and model.ln_f.weight.isnan().all()
    )
    engine.load_weights(state)
    assert engine.generate([[1, 2, 3]], SamplingParams(max_tokens=9, temperature=0))[0].token_ids == good


# ---- against transformers ----

MODELS = os.path.join(os.path.dirname(infer.__file__), '..', 'shared', 'data', 'models')


@pytest.mark.slow
def test_greedy_equals_transformers_on_a_random_model(tmp_path):
    transformers = pytest.importorskip('transformers')
    for arch in ARCHS:
        model = tiny(arch, torch.float32, vocab=97)
        model.save_pretrained(tmp_path / arch)
        check_greedy(transformers, tmp_path / arch, model, [[5, 6, 7], [1], list(range(40))], 20)


def check_greedy(transformers, folder, model, prompts, n):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    engine = Engine(model, None, max_num_batched_tokens=16)
    for prompt, c in zip(prompts, engine.generate(prompts, SamplingParams(max_tokens=n, temperature=0))):
        idx = torch.tensor([prompt])
        want = theirs.generate(
            idx,
            attention_mask=torch.ones_like(idx),
            max_new_tokens=len(c.token_ids),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert c.token_ids == want[0, len(prompt) :].tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    'name',
    [
        'stories260k',
        'tinystories-656k',
        'tinystories-656k-qwen2',
        'shakespeare-char-gpt2',
        'makemore-names-gpt2',
        'gpt-nano-sort',
    ],
)
def test_greedy_equals_transformers_on_real_models(name):
    transformers = pytest.importorskip('transformers')
    folder = os.path.join(MODELS, name)
    if not os.path.isdir(folder):
        pytest.skip('the real models are not beside this checkout')
    model = GPT.from_pretrained(folder)
    V, T = model.config.vocab_size, model.config.block_size
    rng = random.Random(1)
    prompts = [[1], [0, 2, 1, 0, 2, 1]] + [
        [rng.randrange(V) for _ in range(rng.randint(1, T // 2))] for _ in range(6)
    ]
    check_greedy(transformers, folder, model, prompts, min(60, T // 2))


@pytest.mark.slow
def test_penalties_and_filters_equal_transformers_processors():
    transformers = pytest.importorskip('transformers')
    g = torch.Generator().manual_seed(SEED)
    z, ids = torch.randn(6, 400, generator=g) * 3, torch.randint(0, 400, (6, 30), generator=g)
    want = transformers.RepetitionPenaltyLogitsProcessor(1.3)(ids, z.clone())
    want = transformers.TemperatureLogitsWarper(0.7)(ids, want)
    want = transformers.TopPLogitsWarper(0.8)(ids, transformers.TopKLogitsWarper(40)(ids, want)).softmax(-1)
    got = torch.stack(
        [
            distribution(
                z[i],
                ids[i].tolist(),
                30,
                SamplingParams(repetition_penalty=1.3, temperature=0.7, top_k=40, top_p=0.8),
            )
            for i in range(6)
        ]
    )
    assert torch.allclose(
        got.float(), want, atol=1e-6
    )  # the plain formula that everything above is held against


# ---- CUDA ----


@pytest.mark.gpu
@pytest.mark.parametrize('arch', ARCHS)
def test_cuda_paged_graphs_against_dense(arch):
    model = tiny(arch, torch.float32, head_size=16, n_embd=64).cuda()
    engine = Engine(model, None, max_num_seqs=16, block_size=16)
    rng = random.Random(SEED)
    prompts = [[rng.randrange(23) for _ in range(rng.randint(1, 40))] for _ in range(30)]
    out = engine.generate(prompts, SamplingParams(max_tokens=24, seed=1))
    assert (
        engine.graphs and mismatch(engine, out)['max'] < 2e-3 and idle(engine)
    )  # TF32 and online softmax against eager
    waits = Engine(model, None, max_num_seqs=16, block_size=16)
    waits.ahead = False
    again = waits.generate(prompts, SamplingParams(max_tokens=24, seed=1))
    assert engine.ahead and [x.token_ids for x in again] == [
        x.token_ids for x in out
    ]  # a step that starts before the last one is read changes nothing
    model.wte.weight.data.mul_(1.1)
    engine.weights_changed()
    assert mismatch(engine, engine.generate(prompts, SamplingParams(max_tokens=24, seed=1)))['max'] < 2e-3
