"""Rollouts ahead of the trainer: the decoupled objective against exact sums, the pool of workers under every fault, --mode=async as a user runs it."""
import ast
import collections
import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
import types

import pytest
import torch
from conftest import ROOT

import actors
import grpo
import infer
import parallel
import ppo
import rollout
from dataset import Sampler
from helpers import ckpt
from oracle import World, central_difference, gradient
from test_actors_faults import alive, descendants, holders, soon
from test_dpo import jsonl, log_rows, stage, tiny_model

# ---- the objective -------------------------------------------------------------------------------------------------


def visits(w, theta):
    """(P,) probability that a policy comes by each prefix, by the chain rule from its table: no sequence is looked at."""
    p, out = torch.softmax(theta, -1), torch.zeros(w.P, dtype=torch.float64)
    prefixes = {y[:t]: w.prefix[s, t].item() for s, y in enumerate(w.rows) for t in range(len(y))}
    for prefix, i in sorted(prefixes.items(), key=lambda x: len(x[0])):
        out[i] = out[prefixes[prefix[:-1]]] * p[prefixes[prefix[:-1]], prefix[-1]] if prefix else 1.0
    return out


@pytest.fixture(scope='module')
def far():
    """A world, a behaviour policy far from the proximal one, an advantage for every action."""
    w, g = World(3, 3), torch.Generator().manual_seed(7)
    behaviour = w.ref + 1.5 * torch.randn(w.ref.shape, generator=g, dtype=torch.float64)
    return w, behaviour, w.ref, torch.randn(w.P, w.V, generator=g, dtype=torch.float64)


def expected(w, behaviour, theta, advantages, proximal, decoupled, cap=1e9):
    """PPO's loss summed over tokens, in expectation over the behaviour policy's sequences, all of them; and the largest share that was clipped."""
    new, old, sampled = w.token_logp(theta), w.token_logp(proximal), w.token_logp(behaviour)
    a, p, total, clipped = advantages[w.prefix, w.tokens], w.logp(behaviour).exp(), 0.0, 0.0
    weights = ppo.tis_weights(old, sampled, w.mask, cap)[0] if decoupled else None
    for y in range(w.S):
        row = slice(y, y + 1)
        loss, stats = ppo.policy_loss(new[row], (old if decoupled else sampled)[row], a[row], w.mask[row], 0.2, None if weights is None else weights[row])
        total, clipped = total + p[y] * w.mask[y].sum() * loss, max(clipped, stats['clip_frac'].item())
    return total, clipped


def test_decoupled_gradient_is_the_proximal_policys_and_the_naive_one_is_not(far):
    """At theta = proximal the truth is -sum_s visits_behaviour(s) sum_a pi(a|s) A(s, a): the weight puts right what each action's chance was."""
    w, behaviour, proximal, A = far
    d = visits(w, behaviour)
    truth = gradient(lambda t: -(d[:, None] * torch.softmax(t, -1) * A).sum(), proximal)
    got = gradient(lambda t: expected(w, behaviour, t, A, proximal, True)[0], proximal)
    naive = gradient(lambda t: expected(w, behaviour, t, A, proximal, False)[0], proximal)
    assert truth.abs().max() > 0.1 and (got - truth).abs().max() < 1e-10
    assert (naive - truth).abs().max() > 0.05
    # before the step nothing is clipped, however old the samples; the naive ratio is, and what is clipped has no gradient
    assert expected(w, behaviour, proximal, A, proximal, True)[1] == 0 and expected(w, behaviour, proximal, A, proximal, False)[1] > 0.3


def test_decoupled_gradient_by_central_differences(far):
    w, behaviour, proximal, A = far
    theta = proximal + 0.15 * torch.randn(proximal.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for cap in (1e9, 1.3):
        fn = lambda t: expected(w, behaviour, t, A, proximal, True, cap)[0]
        assert (gradient(fn, theta) - central_difference(fn, theta)).abs().max() < 1e-7
    assert expected(w, behaviour, theta, A, proximal, True)[1] > 0


def test_the_weight_is_capped_and_padding_is_nothing():
    g = torch.Generator().manual_seed(0)
    new, old, sampled, a = (torch.randn(4, 5, generator=g, dtype=torch.float64) for _ in range(4))
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 2])[:, None]
    weights, stats = ppo.tis_weights(old, sampled, mask, 1.5)
    assert weights.max() == 1.5 and torch.equal(weights.clamp(max=1.49), (old - sampled).exp().clamp(max=1.49).where(mask, torch.ones_like(weights)))
    assert stats['tis_frac'].item() == pytest.approx(((old - sampled).exp() > 1.5)[mask].double().mean().item())
    rows = []
    for junk in (0.0, 1e6):
        x = torch.where(mask, new, junk).requires_grad_(True)
        loss, _ = ppo.policy_loss(x, torch.where(mask, old, -junk), torch.where(mask, a, junk), mask, 0.2, torch.where(mask, weights, junk))
        rows.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
    assert torch.equal(rows[0][0], rows[1][0]) and torch.equal(rows[0][1], rows[1][1]) and (rows[0][1][~mask] == 0).all()


# ---- the engine between two versions -------------------------------------------------------------------------------


def moved(model, seed, size=0.05):
    other, g = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(size * torch.randn(p.shape, generator=g))
    return other


def test_an_interrupted_answer_goes_on_and_each_token_knows_its_weights():
    """New weights every few tokens, for answers that run, wait, and share a prompt: each log-prob is that of a dense forward by the very weights named."""
    models = [tiny_model()]
    for v in range(1, 5):
        models.append(moved(models[-1], v, 0.1))
    worker = rollout.RolloutWorker(copy.deepcopy(models[0]), 'byte', 'cpu', max_num_seqs=4, max_len=80)
    jobs = [(i, [([1 + i, 2, 3] * (1 + 3 * i), infer.SamplingParams(max_tokens=20, n=3, seed=i))]) for i in range(3)]
    done = worker.run(jobs, 0, None, 0.0)
    for version in range(1, 5):
        for _ in range(7):
            worker.engine.step()
        done += worker.run([], version, models[version].state_dict(), 0.0)
    done += worker.run([], 4, None, 60.0)
    stats = worker.engine.stats()
    assert sorted(id for id, _ in done) == [0, 1, 2] and not worker.open and stats['free_blocks'] + stats['cached_blocks'] == stats['num_blocks']
    several = 0
    for id, answers in done:
        for answer in answers:
            ids, logps, versions = answer.token_ids, answer.logprobs, answer.weight_versions
            several += len(set(versions)) > 1
            assert len(ids) == len(logps) == len(versions) == 20
            assert versions == sorted(versions) and answer.finish_reason == 'length'
            prompt = jobs[id][1][0][0]
            idx, P = torch.tensor([prompt + ids]), len(prompt)
            for v in set(versions):
                dense = models[v].logprobs(idx)[0, P - 1:].tolist()
                assert all(abs(a - b) < 1e-4 for a, b, own in zip(dense, logps, versions) if own == v)
    assert several >= 3


# ---- the pool ------------------------------------------------------------------------------------------------------


def jobs_of(n=2, tokens=16, start=0):
    def jobs(k):
        while True:
            yield k % 10, dict(number=k, prompt='?'), [1 + k % 50, 7] * (1 + k % 4), infer.SamplingParams(max_tokens=tokens, n=n, seed=k)
            k += 1
    return jobs


def one_engine(model, jobs, k, n):
    """Token ids of the answers to prompts k .. k + n by an engine in this process."""
    todo, engine = jobs(k), infer.Engine(model, None, max_len=64)
    engine.eot = 256
    return [c.token_ids for c in engine.generate(*map(list, zip(*[next(todo)[2:] for _ in range(n)])))]


@pytest.fixture
def pool():
    """Rollouts of a tiny model that is closed at the end; none of its processes is left, no shared memory is held."""
    made, before = [], os.getpid() in holders()

    def make(jobs=None, batch=4, **kw):
        made.append(rollout.Rollouts(tiny_model(), 'byte', jobs or jobs_of(), batch, engine=dict(max_num_seqs=16, max_len=64), **kw))
        return made[-1]
    yield make
    for p in made:
        p.close()
    if made[0].own:
        soon(lambda: not any(map(alive, descendants(os.getpid()))), 60)
        assert before or os.getpid() not in holders()


def test_without_staleness_it_is_the_engine_itself(pool):
    """max_staleness 0: prompts in order, none before its turn, token for token what one engine answers."""
    p, model = pool(max_staleness=0, rollout_workers=2), tiny_model()
    for it in range(3):
        model = moved(model, it)
        p.publish(model.state_dict(), it)
        got = p.take(4)
        assert [g.number for g in got] == list(range(4 * it, 4 * it + 4)) and not p.open and not p.done and p.position == 4 * it + 4
        assert [a.ids for g in got for a in g.answers] == one_engine(model, jobs_of(), 4 * it, 4)
        assert {v for g in got for a in g.answers for v in a.versions} == {it}


def test_who_waits_for_the_pool_can_say_so(pool):
    """take(n, seconds): None while fewer than n are there, and nothing is lost by asking."""
    p = pool()
    assert p.take(4, 0.05) is None
    p.publish(tiny_model().state_dict(), 0)
    found = None
    while found is None:
        found = p.take(4, 0.05)
    assert [group.number for group in found] == [0, 1, 2, 3] and p.taken == p.position == 4


def test_rank_0_says_that_it_waits():
    """Every quarter of dist_timeout, however long the pool takes: the others hear None, then the answers."""
    waits, said = [], []
    pool = types.SimpleNamespace(take=lambda n, seconds: (waits.append((n, seconds)), ['answers'] if len(waits) == 3 else None)[1])
    mesh = types.SimpleNamespace(everyone=types.SimpleNamespace(share_object=lambda obj, frm, what: (said.append((obj, frm)), obj)[1]))
    answers = types.SimpleNamespace(pool=pool, need=4, config=dict(dist_timeout=120), mesh=mesh)
    assert rollout.Answers._take(answers) == ['answers'] and waits == [(4, 30.0)] * 3 and said == [(None, 0), (None, 0), (['answers'], 0)]


@pytest.mark.parametrize('gpus,ranks,index,seen', [(0, 1, None, None), (1, 1, 0, '3'), (4, 1, 1, '3,5,6'), (4, 2, 0, '5,6'), (2, 2, 0, '3,4')], ids=str)
def test_rollout_workers_get_the_gpus_that_no_trainer_has(monkeypatch, gpus, ranks, index, seen):
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: gpus)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', str(ranks))
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,4,5,6') if gpus else monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    free = rollout.free_gpus('cpu' if index is None else f'cuda:{index}')
    with rollout.only(free):
        assert os.environ.get('CUDA_VISIBLE_DEVICES') == seen and len(free) == len((seen or '').split(',')) * bool(seen)
    assert os.environ.get('CUDA_VISIBLE_DEVICES') == ('3,4,5,6' if gpus else None)


def test_capacity_and_staleness(pool):
    """A trainer slower than the workers: they run ahead exactly as far as the rule lets them, and nothing is older than max_staleness."""
    p, ages, ids = pool(max_staleness=2, rollout_workers=2), [], []
    for it in range(6):
        p.publish(tiny_model().state_dict(), it)
        soon(lambda: len(p.done) == 12, 120)  # (version + max_staleness + 1) * batch handed out in all, (version) * batch of them taken
        time.sleep(0.05)
        assert not p.open and p.next == (it + 3) * 4
        got = p.take(4)
        ids += [g.number for g in got]
        ages += [it - v for g in got for a in g.answers for v in a.versions]
    assert ids == list(range(24)) and max(ages) == 2 and min(ages) == 0
    p.take(12)
    assert p.position == 36  # a second helping within one update


@pytest.mark.slow
def test_it_goes_on_in_the_middle_of_a_batch(pool):
    p = pool(max_staleness=0, position=7)
    p.publish(tiny_model().state_dict(), 0)
    assert [g.number for g in p.take(4)] == [7, 8, 9, 10] and p.position == 11


REWARD = '''import os, time
def reward(prompt, completion, row):
    n, file = row['number'], os.path.join({folder!r}, str(row['number']))
    with open(file, 'a') as f:
        f.write('x')
    tries = os.path.getsize(file) // 2  # two answers a prompt; the first fault of a group ends its try
    if n == 3:
        os._exit(1)
    if n == 5:
        return float('nan')
    if n == 6:
        raise KeyError('no such answer')
    if n == 8 and os.path.getsize(file) == 1:
        raise OSError('the network, once')
    if n == 9 and os.path.getsize(file) == 1:
        time.sleep(60)
    return float(n)
'''


def test_bad_rewards_are_tried_again_then_dropped_and_counted(pool, tmp_path, capfd):
    """Rows 3 (kills its process), 5 (not a number), 6 (raises) never succeed; 8 (raises once) and 9 (hangs once) do at the second try."""
    (tmp_path / 'reward.py').write_text(REWARD.format(folder=str(tmp_path)))
    p = pool(files=[str(tmp_path / 'reward.py')], reward_workers=2, reward_timeout=2.0, reward_retries=1, max_staleness=2)
    p.publish(tiny_model().state_dict(), 0)
    got = p.take(4) + p.take(4)
    assert [g.number for g in got] == [0, 1, 2, 4, 7, 8, 9, 10] and p.position == 11 and (p.dropped, p.restarts) == (3, 0)
    assert all(g.marks == {str(tmp_path / 'reward.py'): [float(g.number)] * 2} and len(g.answers) == 2 for g in got)
    asked = {n: os.path.getsize(tmp_path / str(n)) for n in range(10)}
    assert asked == {0: 2, 1: 2, 2: 2, 3: 2, 4: 2, 5: 2, 6: 2, 7: 2, 8: 3, 9: 3}  # a try of 3, 5, 6 sees the first answer only
    said = capfd.readouterr().out
    assert said.count('is dropped, its reward failed 2 times') == 3 and 'KeyError' in said and 'must be finite' in said


@pytest.mark.slow
def test_a_reward_that_always_fails_ends_the_run(pool, tmp_path):
    (tmp_path / 'reward.py').write_text('def reward(prompt, completion, row):\n    return 1 / 0\n')
    p = pool(files=[str(tmp_path / 'reward.py')], reward_workers=1, reward_retries=0)
    p.publish(tiny_model().state_dict(), 0)
    with pytest.raises(ValueError, match='failed for 16 prompts one after the other, at last with: .*ZeroDivisionError'):
        p.take(4)


def workers_among(pids):
    """Those that the zygote forked: a compiler that a worker has started ends by itself."""
    parents = {}
    for pid in pids:
        try:
            with open(f'/proc/{pid}/stat', encoding='utf-8') as f:
                parents[pid] = int(f.read().rsplit(')', 1)[1].split()[1])
        except OSError:
            continue
    return [pid for pid, parent in parents.items() if parent == min(pids)]


@pytest.mark.parametrize('how', [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)], ids=['dies', 'hangs'])
def test_a_worker_that_dies_or_hangs_is_replaced(pool, monkeypatch, how):
    """Killed in the middle of its answers: each prompt is answered once, by the same tokens as if nothing had happened."""
    monkeypatch.setattr(rollout, 'SILENCE', 120.0 if how == signal.SIGKILL else 4.0)
    monkeypatch.setattr(rollout, 'SLICE', 0.01)
    before = set(descendants(os.getpid()))
    p = pool(jobs=jobs_of(tokens=50), batch=8, rollout_workers=2, max_staleness=0)
    p.publish(tiny_model().state_dict(), 0)
    got = p.take(8)  # both work
    victim = max(workers_among(set(descendants(os.getpid())) - before))
    p.publish(tiny_model().state_dict(), 1)
    time.sleep(0.02)
    os.kill(victim, how)
    got += p.take(8)
    p.publish(tiny_model().state_dict(), 2)
    got += p.take(8)
    assert p.restarts == 1 and p.dropped == 0 and [g.number for g in got] == list(range(24))
    assert [a.ids for g in got for a in g.answers] == one_engine(tiny_model(), jobs_of(tokens=50), 0, 24)
    soon(lambda: not alive(victim), 60)


@pytest.mark.slow
def test_a_storm_of_kills_loses_and_doubles_nothing(pool, tmp_path):
    """Workers and reward workers are killed twenty times at random moments while batches are taken."""
    (tmp_path / 'reward.py').write_text('def reward(prompt, completion, row):\n    return float(row["number"])\n')
    before, stop, killed = set(descendants(os.getpid())), threading.Event(), []
    p = pool(jobs=jobs_of(tokens=40), rollout_workers=2, max_staleness=3, files=[str(tmp_path / 'reward.py')], reward_workers=2, reward_retries=50)
    zygote = min(set(descendants(os.getpid())) - before)

    def storm():
        while len(killed) < 20 and not stop.wait(0.4):
            mine = sorted(set(descendants(os.getpid())) - before - {zygote} - set(killed))
            if len(mine) >= 4:
                killed.append(mine[len(killed) * 7 % len(mine)])
                os.kill(killed[-1], signal.SIGKILL)
    thread = threading.Thread(target=storm)
    thread.start()
    ids, it = [], 0
    while thread.is_alive() or it < 20:
        p.publish(tiny_model().state_dict(), it)
        got = p.take(4)
        assert all(list(g.marks.values())[0] == [float(g.row['number'])] * 2 for g in got)
        ids, it = ids + [g.number for g in got], it + 1
    thread.join()
    assert len(killed) == 20 and p.restarts > 0 and p.dropped == 0 and ids == list(range(len(ids)))


def test_a_worker_that_always_dies_ends_the_run(pool):
    class Dies:
        def ready(self):
            pass

        def run(self, *args):
            os._exit(1)
    p = pool(max_staleness=0)
    hand = p.rollers[0]
    hand.hire = lambda: actors.remote(Dies).remote()
    actors.kill(hand.actor)
    p.publish(tiny_model().state_dict(), 0)
    with pytest.raises(RuntimeError, match=f'a rollout worker died {rollout.DEATHS} times before it did anything'):
        p.take(4)


def test_an_unknown_runtime_is_named():
    with pytest.raises(ValueError, match="runtime 'x': expected 'local', 'ray' or HOST:PORT"):
        rollout.Rollouts(tiny_model(), 'byte', jobs_of(), 4, runtime='x')
    assert not actors.is_initialized()


# ---- the stages ----------------------------------------------------------------------------------------------------

N, NEED = 40, 4  # prompts, prompts an iteration
GRPO = ['--init_from=base', '--tokenizer=byte', '--dataset=prompts.jsonl', '--val_dataset=prompts.jsonl', '--reward=letters.py', '--batch_size=16', '--group_size=4',
        '--minibatch_size=16', '--max_iters=4', '--eval_interval=2', '--eval_iters=4', '--eval_k=2', '--learning_rate=3e-3', '--max_new_tokens=12', '--track_kl=False']
PPO = [a for a in GRPO if not a.startswith(('--group', '--eval_k', '--track', '--batch', '--mini'))] + ['--batch_size=4', '--minibatch_size=4', '--ppo_epochs=1']


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    d = tmp_path_factory.mktemp('async')
    tiny_model().save_pretrained(d / 'base')
    jsonl(d / 'prompts.jsonl', [dict(prompt=f'Q: Say {"abcd"[i % 4]} {i}\nA: ', letter='abcd'[i % 4], number=i) for i in range(N)])
    (d / 'letters.py').write_text('def reward(prompt, completion, row):\n    return sum(c <= row["letter"] for c in completion) / max(1, len(completion))\n')
    return d


def in_order(n):
    """The prompts of n iterations in sync mode."""
    order = Sampler(N, NEED, 1337)
    return [next(order).tolist() for _ in range(n)]


def test_sync_mode_and_the_simulation_start_no_process(world, monkeypatch):
    monkeypatch.setattr(actors, 'init', lambda *a, **k: pytest.fail('actors were started'))
    stage('grpo.py', *GRPO, '--out_dir=out-none', '--max_iters=1', cwd=world)
    stage('grpo.py', *GRPO, '--out_dir=out-none', '--max_iters=1', '--mode=async', '--simulate_staleness=1', '--reward_workers=0', cwd=world)
    for module in (infer, rollout, grpo, ppo):  # and none of them imports it before it is needed
        top = ast.parse(open(module.__file__).read()).body
        assert 'actors' not in [alias.name for node in top if isinstance(node, (ast.Import, ast.ImportFrom)) for alias in node.names]


@pytest.mark.parametrize('keys', [(), ('--lora_r=2', '--lora_targets=all-linear')], ids=['all', 'lora'])
def test_the_loop_is_the_same_when_nothing_is_stale(world, tmp_path, monkeypatch, keys):
    """--mode=async --max_staleness=0 and sync mode: the same prompts, the same tokens, the same steps. With LoRA the adapter alone travels."""
    sent, publish = [], rollout.Rollouts.publish
    monkeypatch.setattr(rollout.Rollouts, 'publish', lambda self, state, version: (sent.append(state), publish(self, state, version)))
    stage('grpo.py', *GRPO, *keys, f'--out_dir={tmp_path}/sync', cwd=world)
    said = stage('grpo.py', *GRPO, *keys, f'--out_dir={tmp_path}/zero', '--mode=async', '--max_staleness=0', '--rollout_workers=2', cwd=world)
    assert len(sent) == 4 and all(('lora_' in name) == bool(keys) for state in sent for name in state) and sent[0].keys() == ckpt(tmp_path / 'zero')['model'].keys()
    a, b = log_rows(tmp_path / 'sync'), log_rows(tmp_path / 'zero')
    assert len(a) == len(b) == 4 and [r['prompts'] for r in b] == in_order(4) and all(r['staleness'] == r['dropped'] == r['restarts'] == 0 for r in b)
    for x, y in zip(a, b):
        assert x['tokens'] == y['tokens'] and x['score'] == pytest.approx(y['score'], abs=1e-6) and x['grad_norm'] == pytest.approx(y['grad_norm'], rel=1e-3)
        assert 0 <= y['idle'] <= 1 and y['mismatch_max'] < 1e-4 and 'staleness' not in x
    assert 'staleness 0.0 | idle' in said and not actors.is_initialized()


def test_simulated_staleness_repeats_resumes_and_is_what_it_says(world, monkeypatch):
    """Bit for bit the same twice and when cut in between; the samples of update v come from the weights that update v - 2 started from."""
    args, loaded, saved = [*GRPO, '--mode=async', '--simulate_staleness=2', '--eval_interval=1', '--minibatch_size=8', '--max_iters=6'], [], []
    load, save = infer.Engine.load_weights, parallel.save_checkpoint

    def spy_load(self, state, *a, **k):
        loaded.append(state['wte.weight'].double().sum().item())
        return load(self, state, *a, **k)

    def spy_save(path, mesh, model, *args, **rest):
        save(path, mesh, model, *args, **rest)
        saved.append(model.wte.weight.double().sum().item())
    monkeypatch.setattr(infer.Engine, 'load_weights', spy_load)
    monkeypatch.setattr(parallel, 'save_checkpoint', spy_save)
    stage('grpo.py', *args, '--out_dir=out-sim', cwd=world)
    assert len(set(saved)) == 7 and loaded[0::2] == saved  # the evaluation reads the weights of its own iteration ...
    assert loaded[1::2] == [saved[max(0, v - 2)] for v in range(6)]  # ... the rollout those of two before
    monkeypatch.undo()
    stage('grpo.py', *args, '--out_dir=out-again', cwd=world, die_at_save=5)
    assert log_rows(world / 'out-again')[-1]['step'] == 3
    stage('grpo.py', *args[1:], '--out_dir=out-again', '--init_from=resume', cwd=world)
    rows = log_rows(world / 'out-sim')
    assert rows == log_rows(world / 'out-again') and [r['staleness'] for r in rows] == [0, 1, 2, 2, 2, 2] and rows[3]['mismatch_max'] > 1e-3 > rows[0]['mismatch_max']
    a, b = (torch.load(world / f'out-{x}/ckpt.pt', weights_only=True) for x in ('sim', 'again'))
    assert all(torch.equal(a['model'][k], b['model'][k]) for k in a['model']) and len(a['past']) == 3
    naive = stage('grpo.py', *args, '--out_dir=out-naive', '--decoupled=False', cwd=world) and log_rows(world / 'out-naive')
    assert naive[2]['clip_frac'] != rows[2]['clip_frac'] and naive[3]['ratio_max'] > rows[3]['ratio_max']


def test_ppo_with_old_samples(world):
    stage('ppo.py', *PPO, '--out_dir=out-old', '--mode=async', '--simulate_staleness=2', '--decoupled=False', cwd=world)
    assert [r['staleness'] for r in log_rows(world / 'out-old')] == [0, 1, 2, 2]


@pytest.mark.slow
def test_ppo_runs_ahead_too(world):
    stage('ppo.py', *PPO, '--out_dir=out-ppo', '--mode=async', '--max_staleness=2', cwd=world)
    rows = log_rows(world / 'out-ppo')
    assert [r['prompts'] for r in rows] == in_order(4) and max(r['staleness_max'] for r in rows) <= 2 and rows[0]['staleness'] == 0 and rows[0]['kl'] == pytest.approx(0, abs=1e-4)
    assert {'idle', 'dropped', 'restarts', 'mismatch', 'score'} <= rows[0].keys()


def test_mistakes_are_named(world):
    for script, common in (('grpo.py', GRPO), ('ppo.py', PPO)):
        with pytest.raises(ValueError, match='with --mode=async'):
            stage(script, *common, '--out_dir=out-bad', '--simulate_staleness=4', cwd=world)


@pytest.mark.slow
@pytest.mark.parametrize('script', ['grpo.py', 'ppo.py'])
def test_kill_9_of_the_driver_and_resume(world, tmp_path, script):
    """Killed twice between checkpoints, resumed each time: over all, every prompt was trained on once, in order; nobody is left behind."""
    out, n = tmp_path / 'out', 20
    args = [sys.executable, os.path.join(ROOT, script), *(GRPO if script == 'grpo.py' else PPO), f'--out_dir={out}', '--mode=async', '--max_staleness=2', '--rollout_workers=2',
            f'--max_iters={n}', '--eval_interval=5', '--device=cpu']
    for cut in (7, 13, None):
        p = subprocess.Popen(args, cwd=world, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        if cut is not None:
            soon(lambda: out.joinpath('log.jsonl').exists() and any(f'"step": {cut},' in line for line in open(out / 'log.jsonl')), 300)
            family = descendants(p.pid)
            assert len(family) >= 4  # zygote, two rollout workers, a reward worker
            p.kill()
            soon(lambda: not any(map(alive, family)), 60)
            assert not {p.pid, *family} & set(holders())
        assert p.wait(300) == (0 if cut is None else -9)
        args = [a for a in args if not a.startswith('--init_from')] + ['--init_from=resume']
    rows = log_rows(out)
    assert [r['step'] for r in rows] == list(range(n)) and all(r['staleness_max'] <= 2 for r in rows)
    seen = [i for r in rows for i in r['prompts']]
    assert seen == sum(in_order(n), []) and collections.Counter(seen) == {i: 2 for i in range(N)}  # 80 prompts, 2 epochs of 40
    assert [r['position'] for r in rows] == [NEED * (i + 1) for i in range(n)]


@pytest.mark.slow
def test_dropped_prompts_and_a_resume_in_their_midst(world, tmp_path):
    """A reward that never works for some rows: the next prompts take their place; position and drops add up across a resume."""
    (tmp_path / 'some.py').write_text('def reward(prompt, completion, row):\n    assert row["number"] % 7\n    return completion.count("a") / 9\n')
    args = [*GRPO, f'--reward={tmp_path}/some.py', '--mode=async', '--reward_retries=0', '--val_dataset=ok.jsonl', f'--out_dir={tmp_path}/out']
    jsonl(world / 'ok.jsonl', [dict(prompt='Q: Say a\nA: ', letter='a', number=1)])
    stage('grpo.py', *args, '--max_iters=6', cwd=world, die_at_save=3)
    actors.shutdown()  # the run was cut by an exception: a process would be gone
    stage('grpo.py', *args[1:], '--max_iters=6', '--init_from=resume', cwd=world)
    rows, order = log_rows(tmp_path / 'out'), sum(in_order(12), [])
    want = [i for i in order if i % 7][:6 * NEED]
    assert [i for r in rows for i in r['prompts']] == want
    assert rows[-1]['position'] == next(k for k in range(len(order)) if len([i for i in order[:k] if i % 7]) == 6 * NEED)


@pytest.mark.slow
def test_on_ray_and_on_a_cluster_it_is_the_same_program(world, tmp_path):
    pytest.importorskip('ray')
    said = subprocess.run([sys.executable, os.path.join(ROOT, 'grpo.py'), *GRPO, '--out_dir=out-ray', '--mode=async', '--runtime=ray', '--rollout_workers=2', '--device=cpu'],
                          cwd=world, capture_output=True, text=True, timeout=240, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert said.returncode == 0, said.stderr[-3000:]
    rows = log_rows(world / 'out-ray')
    assert [r['prompts'] for r in rows] == in_order(4) and all(r['staleness_max'] <= 1 and r['dropped'] == 0 for r in rows)
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'ACTORS_TOKEN': 'a token for this test', 'PYTHONPATH': ROOT}
    head = subprocess.Popen([sys.executable, os.path.join(ROOT, 'actors.py'), '--head=True', '--port=0', '--num_cpus=0'], stdout=subprocess.PIPE, text=True, env=env)
    nodes = []
    try:
        address = next(w for line in head.stdout for w in line.split() if w.startswith('127.0.0.1:')).strip('.,')
        nodes = [subprocess.Popen([sys.executable, os.path.join(ROOT, 'actors.py'), f'--address={address}', '--num_cpus=2'], env=env, stdout=subprocess.DEVNULL) for _ in range(2)]
        said = subprocess.run([sys.executable, os.path.join(ROOT, 'grpo.py'), *GRPO, '--out_dir=out-cluster', '--mode=async', f'--runtime={address}', '--rollout_workers=2', '--device=cpu'],
                              cwd=world, capture_output=True, text=True, timeout=240, env=env)
        assert said.returncode == 0, said.stderr[-3000:]
        assert [r['prompts'] for r in log_rows(world / 'out-cluster')] == in_order(4)
    finally:
        for p in [*nodes, head]:
            p.kill()
            p.wait()
