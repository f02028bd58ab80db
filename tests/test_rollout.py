"""rollout.py: batches, rewards from several sources, answers; and what PPO and GRPO share as runs: their orders, their
evaluations, what is refused, what a resume takes over."""
import collections
import copy
import json
import math
import os
import random
import sys
import types

import numpy as np
import pytest
import torch
from conftest import ROOT
from helpers import ckpt, equal, jsonl, log_rows, stage
from test_actors_faults import alive, soon

import grpo
import infer
import ppo
import rollout
from model import ARCHS, GPT, GPTConfig
from run import Run
from tokenizer import get_tokenizer

SEED = 1234
SUMS = 'def reward(prompt, completion, row):\n    return float(sum(map(ord, completion)) % 5)\n'
FILES = {'sums.py': SUMS, 'draws.py': SUMS.replace('    return', '    import torch\n    torch.rand(1)\n    return'),
         'a,b.py': SUMS, 'big.py': 'def reward(prompt, completion, row):\n    return 1e39\n',
         'asks.py': 'def reward(prompt, completion, row):\n    assert prompt == row["prompt"]\n    return 1.0\n'}
BASE = ['--init_from=base', '--tokenizer=byte', '--dataset=prompts.jsonl', '--val_dataset=prompts.jsonl',
        '--reward=sums.py', '--batch_size=8', '--minibatch_size=4', '--max_new_tokens=6', '--max_iters=2',
        '--eval_interval=1', '--eval_iters=3', '--learning_rate=1e-2']
PPO = ['ppo.py', *BASE, '--ppo_epochs=2']
GRPO = ['grpo.py', *BASE, '--group_size=2', '--grpo_epochs=2', '--eval_k=2']
BOTH = pytest.mark.parametrize('args', [PPO, GRPO], ids=['ppo', 'grpo'])


def tiny(head='lm', T=128, V=257, seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(arch='gpt2', n_layer=2, n_head=4, n_embd=32, vocab_size=V, block_size=T, **ARCHS['gpt2']), head)


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    d = tmp_path_factory.mktemp('rollout')
    tiny().save_pretrained(d / 'base')
    for name, model in (('rm', tiny('scalar')), ('short', tiny('scalar', T=20)), ('narrow', tiny('scalar', V=200))):
        model.save_pretrained(d / name)
        get_tokenizer('byte').save(str(d / name))
    jsonl(d / 'prompts.jsonl', [dict(prompt=f'Q: {i}\nA: ', number=i) for i in range(12)])
    jsonl(d / 'others.jsonl', [dict(prompt=f'Q: {i}?\nA: ', number=i) for i in range(12)])
    for name, text in FILES.items():
        (d / name).write_text(text)
    return d


# ---- batches -------------------------------------------------------------------------------------------------------


def batch_of(prompts, responses):
    mask = torch.arange(max(map(len, responses))) < torch.tensor([len(r) for r in responses])[:, None]
    logp = torch.where(mask, -torch.rand(mask.shape), 0.0)
    rows = [dict(prompt=str(i), number=i) for i in range(len(responses))]
    return rollout.Batch(rows, list(range(len(rows))), prompts, responses, torch.tensor([True, False] * 9)[:len(rows)],
                         mask, logp, torch.zeros(mask.shape, dtype=torch.long), [0] * len(rows))


def test_parts_of_a_batch_and_batches_put_together():
    p, q = [1, 2], [3]
    a, b = batch_of([p, p, q], [[5], [6, 7], [8, 9, 10]]), batch_of([q], [[4, 4, 4, 4]])
    a.advantages, b.advantages = torch.arange(3.0), torch.ones(1)
    part = a[[1, 0]]
    assert part.groups() == [(p, [[6, 7], [5]])] and part.mask.tolist() == [[True, True], [True, False]]
    assert torch.equal(part.sampled, a.sampled[[1, 0], :2]) and part.advantages.tolist() == [1, 0] and part.values is None
    assert [r['number'] for r in part.rows] == [1, 0] and part.ended.tolist() == [False, True] and part.tokens() == 3
    whole = grpo.concatenate([a, b])
    assert whole.mask.shape == (4, 4) and whole.responses == a.responses + b.responses
    assert torch.equal(whole[[0, 1, 2]].sampled, a.sampled) and torch.equal(whole[[3]].sampled, b.sampled)
    assert a.neighbours(range(3), room=4) == [(p, [0]), (p, [1]), (q, [2])]  # 2 + 1 + 2 tokens would be 5


def test_minibatches_are_a_function_of_seed_iteration_and_epoch():
    found = {}
    for seed, it, epoch in [(1, 0, 0), (1, 0, 1), (1, 1, 1), (2, 0, 1), (1, 0, 2)]:
        torch.rand(3)  # no matter what others draw
        rows = rollout.minibatches(12, 4, seed, it, epoch, group_size=2)
        assert rows == rollout.minibatches(12, 4, seed, it, epoch, group_size=2)
        flat = sum(rows, [])
        assert sorted(flat) == list(range(12)) and all(flat[i + 1] == flat[i] + 1 for i in range(0, 12, 2))
        found[seed, it, epoch] = tuple(flat)
    assert found[1, 0, 0] == tuple(range(12)) and len(set(found.values())) == 5


def test_means_of_steps():
    assert rollout.means([dict(a=1.0, b_max=3.0), dict(a=2.0, b_max=1.0)]) == dict(a=1.5, b_max=3.0)
    a, b = batch_of([[1]], [[2, 3]]), batch_of([[1]] * 2, [[2], [3, 4]])
    a.scores, b.scores = torch.tensor([7.0]), torch.tensor([1.0, 3.0])
    assert rollout.means([]) == {} and rollout.overview(a) == dict(score=7, score_std=0, len=2, ended=1)
    assert rollout.overview(b)['score_std'] == pytest.approx(math.sqrt(2)) and rollout.overview(b)['len'] == 1.5


# ---- rewards -------------------------------------------------------------------------------------------------------


def a_run(world, monkeypatch, reward, **more):
    monkeypatch.chdir(world)
    config = {k: ppo.config[k] for k in ppo.config_keys}
    config |= dict(dataset='prompts.jsonl', out_dir='out-alone', device='cpu', overwrite=True, reward=reward, **more)
    return Run('ppo', config)


def test_several_rewards_and_a_path_with_a_comma(world, monkeypatch):
    """Files are asked with the row's own prompt, where the answers come about; here they are added up."""
    tok = get_tokenizer('byte')
    monkeypatch.chdir(world)

    def answered(files, *texts):
        pool = rollout.Pool(tok, files=files)
        engine = types.SimpleNamespace(generate=lambda prompts, params: [
            types.SimpleNamespace(token_ids=ids, logprobs=[0.0] * len(ids), finish_reason='stop') for ids in texts])
        params = infer.SamplingParams(n=len(texts))
        return pool.answer([(0, dict(prompt='Q', number=1), [1], params)], engine)
    answers = rollout.Answers.__new__(rollout.Answers)
    answers.__dict__.update(device=torch.device('cpu'), config={}, tok=tok)
    rewards = rollout.Rewards(a_run(world, monkeypatch, 'sums.py, asks.py', reward_weights='1, 0.5'), tok, 32)
    batch = answers._batch(answered(rewards.files, [*b'ab', 256], [*b'cd']), 0)
    total, each = rewards(batch)  # 'ab' without its end token: 97 + 98 = 195; 'cd': 199
    assert each['sums.py'].tolist() == [0, 4] and each['asks.py'].tolist() == [1, 1] and total.tolist() == [0.5, 4.5]
    assert rollout.Rewards(a_run(world, monkeypatch, 'a,b.py'), tok, 32).names == ['a,b.py']
    with pytest.raises(ValueError, match='big.py returned 1e[+]39 .*finite.*row .*number'):
        answered(['big.py'], [*b'ab'])


def test_a_reward_model_with_other_tokens_reads_the_row_as_in_its_training(world, monkeypatch):
    """What the tokenizer puts in front (Llama's <s>) is there, and the end token where the answer ended."""
    tok, other = get_tokenizer('byte'), copy.copy(get_tokenizer('byte'))
    other.spec, other.prefix = 'another', [255]
    run = a_run(world, monkeypatch, 'rm')
    monkeypatch.setattr(rollout, 'get_tokenizer', lambda name: other)
    rewards = rollout.Rewards(run, tok, 32)
    batch = batch_of([list(b'Q')] * 2, [list(b'ab') + [256], list(b'c')])
    batch.rows = [dict(prompt='Q')] * 2
    model = rewards.models['rm'][0]
    want = [model(torch.tensor([[255, *ids]]))[0][0, -1].item() for ids in (b'Qab' + b'', b'Qc')]
    want[0] = model(torch.tensor([[255, *b'Qab', 256]]))[0][0, -1].item()
    assert rewards.same_ids == [] and rewards(batch)[0].tolist() == pytest.approx(want, abs=1e-5)


def test_what_is_paid_for_steps_stands_by_its_tokens(world, monkeypatch):
    """A list: lines that are not blank, or turns; one number: the last step. And what is no list as long."""
    tok = get_tokenizer('byte')
    ids = [*b'ab\n\ncd\n', 256], [*b'\nx'], [256], [*b'a\n']
    assert [rollout.line_ends(x, tok) for x in ids] == [[2, 7], [1], [0], [1]]
    assert rollout.line_ends([*b'a\nb'], tok) == [1, 2] and rollout.line_ends([*b'a\n\n', 256], tok) == [3]
    nan = pytest.approx(math.nan, nan_ok=True)
    assert rollout.at_tokens('x.py', [1.0, 2.0], [1, 3]) == [nan, 1, nan, 2] and rollout.at_tokens('x.py', 3.0, [1]) == [nan, 3]
    with pytest.raises(ValueError, match='reward x.py returned 1 numbers for an answer of 2 steps'):
        rollout.at_tokens('x.py', 1.0, [1, 2])
    rewards = rollout.Rewards(a_run(world, monkeypatch, 'sums.py, asks.py', reward_weights='2, 0.5'), tok, 32)
    batch = batch_of([[1], [1]], [[5, 6, 7], [8]])
    batch.given = {'sums.py': torch.tensor([[1.0, math.nan, 2.0], [4.0, math.nan, math.nan]]), 'asks.py': torch.tensor([1.0, 0.0])}
    total, each = rewards(batch)
    assert total.tolist() == [6.5, 8] and each['sums.py'].tolist() == [3, 4] and batch.paid[0].tolist() == [2, nan, 4]


@BOTH
@pytest.mark.parametrize('reward, says', [('short', 'reward short reads 20 tokens at most'), ('narrow', 'reward narrow: .*257')])
def test_models_that_do_not_fit_are_refused(world, args, reward, says):
    long = [*args, f'--reward={reward}', '--out_dir=out-bad', '--max_new_tokens=20']
    with pytest.raises(ValueError, match=says):
        stage(*long, cwd=world)


# ---- runs ----------------------------------------------------------------------------------------------------------


@BOTH
def test_what_a_reward_draws_changes_nothing(world, args):
    logs = []
    for reward in ('sums.py', 'draws.py'):
        stage(*args, f'--reward={reward}', '--out_dir=out-draws', cwd=world)
        logs.append((log_rows(world / 'out-draws'), ckpt(world / 'out-draws')['model']))
    assert logs[0][0] == logs[1][0] and equal(logs[0][1], logs[1][1])


@BOTH
def test_an_iteration_can_be_followed(world, args, monkeypatch):
    """From the rollout to the log: what a reader may have to open, besides engine and kernels."""
    seen, outside = set(), ('infer.py', 'kernels.py', 'native.py', 'configurator.py')

    def profile(frame, event, arg):
        code = frame.f_code
        folder, file = os.path.split(code.co_filename)
        if event == 'call' and folder == ROOT and file not in outside and not code.co_name.startswith('<'):
            seen.add((file, code.co_qualname))
    after = rollout.Answers.next
    monkeypatch.setattr(rollout.Answers, 'next', lambda *a, **k: sys.setprofile(profile) or after(*a, **k))
    before = Run.log
    monkeypatch.setattr(Run, 'log', lambda *a, **k: sys.setprofile(None) or before(*a, **k))
    stage(*args, '--max_iters=1', '--out_dir=out-trace', '--reward_workers=0', cwd=world)
    print(len(seen), sorted(seen))
    assert 20 < len(seen) <= 91 and len({file for file, _ in seen}) <= 7, sorted(seen)  # aims: 60, 5


@BOTH
def test_eval_iters_0_is_the_whole_set_and_samples_begin_with_the_run(world, args):
    for seed in (1, 2):
        stage(*args, '--out_dir=out-eval', '--eval_iters=0', '--max_iters=1', f'--seed={seed}', cwd=world)
        rows = [json.loads(line) for line in open(world / 'out-eval/samples.jsonl', encoding='utf-8')]
        each = 12 * (2 if args is GRPO else 1)
        assert [r['step'] for r in rows] == [0] * each + [1] * each
    stage(*args, '--out_dir=out-eval', '--init_from=resume', '--seed=2', '--eval_iters=1', '--overwrite=False', cwd=world)
    steps = [json.loads(line)['step'] for line in open(world / 'out-eval/samples.jsonl', encoding='utf-8')]
    assert steps == sorted(steps) and steps.count(0) == steps.count(1) == each and steps.count(2) == each // 12


@BOTH
def test_a_run_that_diverges_keeps_its_last_good_checkpoint(world, args):
    with pytest.raises(ValueError, match='is nan|is inf|not finite|last good checkpoint'):
        stage(*args, '--learning_rate=1e30', '--grad_clip=0.0', '--max_iters=9', '--out_dir=out-nan', cwd=world)
    last = ckpt(world / 'out-nan')
    assert all(v.abs().max() < 1e6 for v in last['model'].values()) and last['iter'] == 0


@BOTH
def test_one_answer_a_batch_and_every_row_is_json(world, args):
    if args is GRPO:
        with pytest.raises(ValueError, match='batch_size 1'):
            stage(*args, '--batch_size=1', '--minibatch_size=1', '--group_size=1', '--advantage=reinforce++',
                  '--out_dir=out-one', cwd=world)
        return
    stage(*args, '--batch_size=1', '--minibatch_size=1', '--out_dir=out-one', '--eval_iters=1', cwd=world)

    def strict(text):
        raise AssertionError(text)
    for line in open(world / 'out-one/log.jsonl', encoding='utf-8'):
        json.loads(line, parse_constant=strict)
    assert [r['score_std'] for r in log_rows(world / 'out-one')] == [0, 0]


@pytest.mark.parametrize('args, says', [
    ([*PPO, '--beta=0.0', '--target_kl=0.1'], 'beta 0 with target_kl 0.1'),
    ([*PPO, '--value=reward'], 'shares the tokenizer'),
    ([*GRPO, '--simulate_staleness=2'], 'simulate_staleness 2: it goes with --mode=async'),
    ([*PPO, '--max_new_tokens=128'], 'leaves no room'),
    ([*PPO, '--dataset=none.jsonl'], 'none.jsonl: no such data'),
    ([*GRPO, '--init_from=scratch'], 'starts from a model that can answer')], ids=lambda x: x if isinstance(x, str) else '')
def test_settings_without_a_sense_are_named(world, args, says):
    with pytest.raises(ValueError, match=says):
        stage(*args, '--out_dir=out-senseless', cwd=world)


def test_a_resume_takes_a_new_beta_and_goes_on_with_an_adapted_one(world):
    args = [*PPO, '--target_kl=0.001', '--kl_horizon=20', '--beta=0.05']
    stage(*args, '--out_dir=out-beta', cwd=world)
    adapted = ckpt(world / 'out-beta')['beta']
    resumed = [*args, '--out_dir=out-beta', '--init_from=resume', '--overwrite=False']
    stage(*resumed, '--max_iters=3', '--target_kl=0.0', cwd=world)
    assert adapted != 0.05 and log_rows(world / 'out-beta')[-1]['beta'] == adapted  # the same beta was given
    stage(*resumed, '--max_iters=4', '--target_kl=0.0', '--beta=0.5', cwd=world)
    assert log_rows(world / 'out-beta')[-1]['beta'] == 0.5 == ckpt(world / 'out-beta')['config']['beta']
    assert log_rows(world / 'out-beta', 'config')[0]['beta'] == 0.5


def test_the_best_of_ppo_is_found_under_one_beta(world):
    """Under an adapted beta a worse policy can win because beta fell; the given one is what all are measured with."""
    stage(*PPO, '--target_kl=5.0', '--kl_horizon=1', '--beta=0.5', '--max_iters=4', '--out_dir=out-best', cwd=world)
    evals = log_rows(world / 'out-best', 'eval')
    assert len({r['beta'] for r in evals}) > 1
    assert ckpt(world / 'out-best')['best'] == pytest.approx(max(r['score'] - 0.5 * r['kl'] for r in evals))


@BOTH
def test_a_resume_on_other_prompts_is_refused_and_so_is_another_group_size(world, args):
    stage(*args, '--out_dir=out-same', '--max_iters=1', cwd=world)
    again = [*args, '--out_dir=out-same', '--init_from=resume', '--overwrite=False']
    with pytest.raises(ValueError, match='dataset'):
        stage(*again, '--dataset=others.jsonl', cwd=world)
    if args is GRPO:
        with pytest.raises(ValueError, match='group_size'):
            stage(*again, '--group_size=4', cwd=world)
    else:
        with pytest.raises(ValueError, match='value'):
            stage(*again, '--value=reward', '--reward=rm', cwd=world)


def test_explained_variance_does_not_depend_on_the_cut(world):
    logs = []
    for tokens in (16, 8192):
        stage(*PPO, f'--micro_tokens={tokens}', '--beta=0.0', '--missing_eos=none', '--out_dir=out-cut', cwd=world)
        logs.append(log_rows(world / 'out-cut'))
    for a, b in zip(*logs):
        assert a['explained'] == pytest.approx(b['explained'], abs=1e-3) and a['vf'] == pytest.approx(b['vf'], abs=1e-5)


@pytest.mark.parametrize('loss_type', grpo.LOSSES)
def test_nothing_to_learn_is_no_step_with_a_penalty_too(world, loss_type):
    """No answer of an untrained model ends in two tokens: all are masked."""
    stage(*GRPO, '--overlong=mask', '--beta=0.1', '--max_new_tokens=2', f'--loss_type={loss_type}', '--max_iters=1',
          '--out_dir=out-mask', cwd=world)
    assert log_rows(world / 'out-mask')[0]['steps'] == 0


# ---- environments, and rewards that hang -----------------------------------------------------------------------------

ECHO = """
class Env:
    stop = ['=']

    def start(self, row):
        self.left = row['turns']
        return row['ask']

    def step(self, completion):
        self.left -= 1
        reward = None if self.left % 2 else sum(map(ord, completion)) % 7 / 10
        return (None if self.left == 0 else f'<{completion[:3]}{self.left}>'), reward
"""
BAD = """
import os, signal, time
from data.judge import ask_judge

def reward(prompt, completion, row):
    n = row['number']
    first = not os.path.exists(f'tried{n}')
    open(f'tried{n}', 'w').close()
    if n == 1:
        time.sleep(1000)
    if n == 2:
        os.kill(os.getpid(), signal.SIGKILL)  # so does the kernel to who eats too much memory
    if n == 3:
        raise KeyError('three')
    if n == 4 and first:
        1 / 0
    if n == 5:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for _ in range(200):
            child = os.fork()
            if not child:
                time.sleep(1000)
            with open('children', 'a') as f:
                f.write(f'{child} ')
        time.sleep(1000)
    if n == 6:
        ask_judge('http://127.0.0.1:9/v1', prompt, completion, 'x', model='dead')
    if n == 7:
        for _ in range(3000):
            print('storm ' * 20)
    if n == 8:
        bytearray(10 << 40)  # more than there is
    return float(n)
"""


class Scripted:
    """An engine whose answers are a function of prompt, seed and index; it remembers what it was asked."""

    def __init__(self, tok):
        self.tok, self.asked = tok, []

    def generate(self, prompts, params):
        done = []
        for prompt, p in zip(prompts, params):
            for index in range(p.n):
                rng = random.Random(f'{prompt} {p.seed} {index}')
                text = ''.join(rng.choices('abc', k=rng.randrange(1, 6)))
                ids, finish = self.tok.encode(text), 'length'
                if len(ids) < p.max_tokens and rng.random() < 0.9:
                    ids, finish = ids + rng.choice([[self.tok.eot], self.tok.encode('=')]), 'stop'
                ids = ids[:p.max_tokens]
                self.asked.append((prompt, ids, p, index))
                logps = [-0.1 * (i % 7) - 0.1 for i in ids]
                done.append(types.SimpleNamespace(token_ids=ids, logprobs=logps, finish_reason=finish))
        return done


@pytest.mark.parametrize('chat', [False, True])
def test_conversations_with_a_scripted_policy(tmp_path, chat):
    """1,000 of them against a plain loop over one at a time: ids, mask, rewards, ends; what the engine is asked is what stands there."""
    (tmp_path / 'env.py').write_text(ECHO)
    tok, rng = get_tokenizer('byte'), random.Random(SEED)
    template = ("{% for m in messages %}{% if m.role == 'assistant' %}{{ '[assistant]' }}{% generation %}{{ m.content + eos_token }}"
                "{% endgeneration %}{% else %}{{ '[user]' + m.content }}{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}")
    if chat:
        tok.config = {**tok.config, 'chat_template': template}
        tok.save(tmp_path / 'tok')
        tok = get_tokenizer(str(tmp_path / 'tok'))
    path = str(tmp_path / 'env.py')
    env, engine = rollout.load_env(path), Scripted(tok)
    room = 60 if chat else 20
    jobs = []
    for k in range(250):
        ask = [dict(role='user', content='hi')] if chat else 'hi'
        row = dict(ask=ask, turns=rng.randrange(1, 7), number=k)
        row['prompt'] = env().start(row)
        ids = tok.apply_chat_template(ask, add_generation_prompt=True) if chat else tok.encode(ask)
        jobs.append((k, row, ids, infer.SamplingParams(n=4, seed=k, max_tokens=room, stop=['='])))
    pool = rollout.Pool(tok, env=path, max_turns=4)
    made, kind = [], pool.here.env
    pool.here.env = lambda: made.append(0) or kind()
    groups = pool.answer(jobs, engine, version=3)
    assert len(made) == 1000  # none is replayed
    alone = [pool.answer([job], Scripted(tok), version=3)[0] for job in jobs]  # one after the other: the same
    assert all(a.answers == b.answers and a.marks == b.marks for a, b in zip(groups, alone))
    answers = rollout.Answers.__new__(rollout.Answers)
    answers.__dict__.update(device=torch.device('cpu'), config=dict(env=path), tok=tok)
    batch = answers._batch(groups, 5)
    assert len(batch) == 1000 and len({(p.seed, index) for _, _, p, index in engine.asked}) > 0.99 * len(engine.asked)
    said = {}
    for prompt, ids, p, _ in engine.asked:
        said.setdefault(tuple(prompt), []).append((ids, p))
    kinds = collections.Counter()
    for i in range(1000):
        row, prompt = batch.rows[i], batch.prompts[i]
        ids, own, reward, world_, ended = [], [], 0.0, env(), False
        world_.start(row)
        for turn in range(4):
            here = batch.responses[i][len(ids):]  # the policy's turn is what some call sampled behind this very text
            options = [x for x, p in said[tuple(prompt + ids)] if here[:len(x)] == x and p.max_tokens == room - len(ids) and p.stop == ['=']]
            new = max(options, key=len)
            stopped = new[-1] == tok.eot or new[-1:] == tok.encode('=')
            ids, own = ids + new, own + [True] * len(new)
            reply, mark = world_.step(tok.decode([x for x in new if x != tok.eot]))
            reward += mark or 0.0
            if reply is None or not stopped or turn == 3:
                ended = reply is None and stopped
                break
            if chat and new[-1] == tok.eot:
                words = tok.encode(f'[user]{reply}[assistant]')
            else:
                words = tok.encode(reply)
            if len(ids) + len(words) >= room:
                kinds['full'] += 1
                break
            ids, own = ids + words, own + [False] * len(words)
        kinds[turn, ended] += 1
        n = len(ids)
        assert batch.responses[i] == ids and batch.mask[i].tolist() == own + [False] * (batch.mask.shape[1] - n)
        assert batch.given[path][i].item() == pytest.approx(reward) and batch.ended[i].item() == ended
        assert batch.replied[i] == n - sum(own) and (batch.sampled[i][~batch.mask[i]] == 0).all() and (batch.sampled[i][batch.mask[i]] < 0).all()
        assert (batch.ages[i, :n] == 2).all()
    assert kinds['full'] and kinds[3, False] and kinds[0, True] and kinds[2, True] and batch.tokens() == int(batch.mask.sum())


def test_replies_take_no_part_in_loss_or_kl():
    logp, old = torch.randn(2, 4, requires_grad=True), torch.randn(2, 4)
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    for loss_type in grpo.LOSSES:
        loss, _ = grpo.grpo_loss(logp, old, torch.ones(2), mask, old, 0.1, loss_type=loss_type, max_len=4, entropy=torch.rand(2, 4), entropy_coef=0.1)
        grad, = torch.autograd.grad(loss, logp)
        assert (grad[~mask] == 0).all() and (grad[mask] != 0).all()


@pytest.mark.parametrize('more', [
    [], ['--lora_r=4', '--beta=0.1'],
    ['--reward=sums.py', '--reward_weights=1,0.01', '--minibatch_size=8', '--grpo_epochs=1']])
def test_grpo_in_an_environment(world, monkeypatch, more):
    """In this process, in a reward worker, and ahead of the trainer but never stale: the same batches, to the bit."""
    (world / 'env.py').write_text(ECHO)
    jsonl(world / 'turns.jsonl', [dict(ask=f'Q: {i}', turns=1 + i % 3) for i in range(12)])
    args = [a for a in GRPO if not a.startswith(('--dataset', '--val_dataset', '--reward'))]
    args += ['--dataset=turns.jsonl', '--val_dataset=turns.jsonl', '--env=env.py', '--reward=', '--max_new_tokens=30', *more]
    after, runs = rollout.Answers.next, []

    def spy(*args, **keys):
        batch = after(*args, **keys)
        marks = {name: x.tolist() for name, x in batch.given.items()}
        seen.append((batch.index, batch.responses, batch.mask.tolist(), batch.sampled.tolist(), batch.ended.tolist(), marks))
        return batch
    monkeypatch.setattr(rollout.Answers, 'next', spy)
    for name, mode in dict(here=['--reward_workers=0'], sync=['--reward_workers=1'],
                           ahead=['--mode=async', '--max_staleness=0', '--rollout_workers=2', '--reward_workers=2']).items():
        seen = []
        said = stage(*args, *mode, f'--out_dir=out-env-{name}', cwd=world)
        assert 'max |ratio - 1| = 0.0e+00' in said
        runs.append((seen, log_rows(world / f'out-env-{name}', 'eval'), log_rows(world / f'out-env-{name}')))
    batches, evals, rows = runs[0]
    assert runs[0] == runs[1] and runs[0][:2] == runs[2][:2] and len(batches) == len(rows) == 2 and len(evals) == 3
    assert 'pass@1' in evals[0] and all(0 < row['len'] <= 30 and row['mismatch_max'] < 1e-4 for row in rows)
    assert any(not all(own) for _, _, mask, *_ in batches for own in mask)
    for a, b in zip(rows, runs[2][2]):
        assert a == {key: b[key] for key in a} and b['staleness'] == b['dropped'] == b['restarts'] == 0


LINES = 'def reward(prompt, completion, row):\n    return [sum(map(ord, line)) % 5 / 5 for line in completion.split("\\n") if line.strip()] or [0.0]\n'


@pytest.mark.parametrize('more', [[], ['--mode=async', '--max_staleness=0'], ['--env=env.py', '--reward=turns.py']])
def test_rewards_for_steps_train_and_are_logged(world, monkeypatch, more):
    (world / 'lines.py').write_text(LINES)
    (world / 'turns.py').write_text('def reward(prompt, completion, row):\n    return [0.5] * row["turns"]\n')
    (world / 'env.py').write_text(ECHO)
    jsonl(world / 'steps.jsonl', [dict(ask=f'Q: {i}', prompt=f'Q: {i}', turns=1) for i in range(12)])
    args = [a for a in GRPO if not a.startswith(('--reward', '--dataset', '--val_dataset'))]
    stage(*args, '--reward=lines.py', '--dataset=steps.jsonl', '--val_dataset=steps.jsonl', '--out_dir=out-steps', *more, cwd=world)
    assert all(math.isfinite(row['pg']) and row['steps'] for row in log_rows(world / 'out-steps'))


def test_an_environment_that_does_not_fit_is_named(world):
    jsonl(world / 'turns.jsonl', [dict(ask=f'Q: {i}', turns=1 + i % 3) for i in range(12)])
    (world / 'env.py').write_text(ECHO)
    for args, says in ((['--env=sums.py'], 'defines no class Env'),
                       (['--val_dataset=prompts.jsonl'], "row 1: env env.py: start raised KeyError: 'turns'")):
        with pytest.raises(ValueError, match=says):
            stage(*GRPO, '--dataset=turns.jsonl', '--val_dataset=turns.jsonl', '--env=env.py', '--out_dir=out-no', *args, cwd=world)


@pytest.mark.slow
@pytest.mark.parametrize('mode', [[], ['--mode=async', '--max_staleness=0']], ids=['sync', 'async'])
def test_rewards_that_hang_die_fork_and_raise_are_dropped(world, monkeypatch, mode):
    """Groups 1, 2, 3, 5, 6 and 8 never come, 4 comes at the second try: of 12 prompts an epoch 6 train, each once, and nothing is left running."""
    (world / 'bad.py').write_text(BAD)
    for old in [*world.glob('tried*'), *world.glob('children')]:
        old.unlink()
    after, seen = rollout.Answers.next, []

    def spy(*args, **keys):
        batch = after(*args, **keys)
        seen.extend(batch.rows[i]['number'] for i in range(0, len(batch), 2))
        assert batch.given['bad.py'].tolist() == [row['number'] for row in batch.rows]
        return batch
    monkeypatch.setattr(rollout.Answers, 'next', spy)
    args = [a for a in GRPO if not a.startswith(('--reward', '--eval_iters', '--max_iters'))]
    said = stage(*args, '--reward=bad.py', '--reward_timeout=4', '--reward_retries=1', '--reward_workers=2', '--max_iters=2', '--eval_interval=9',
                 '--eval_iters=4', '--out_dir=out-bad', *mode, cwd=world)
    rows, good = log_rows(world / 'out-bad'), [0, 4, 7, 9, 10, 11]
    order = [i for epoch in range(2) for i in np.random.default_rng((1337, epoch)).permutation(12).tolist()]
    assert seen == [i for i in order if i in good][:8]
    dropped = len([i for i in order[:order.index(seen[-1], 12) + 1] if i not in good])
    assert rows[-1]['dropped'] == dropped + 3 * (not mode)  # here those of the first evaluation, too
    assert said.count('evaluation: 3 of 4 prompts left out') == 2 and said.count('a prompt is dropped, its reward failed 2 times') == dropped + 6
    for words in ("KeyError: 'three'", 'MemoryError', 'no answer for 4 s', 'judge http://127.0.0.1:9/v1: cannot be reached'):
        assert words in said
    children = (world / 'children').read_text().split()
    assert len(children) >= 200
    soon(lambda: not any(map(alive, map(int, children))), 20)


def test_a_reward_that_always_fails_ends_the_run(world):
    (world / 'never.py').write_text('def reward(prompt, completion, row):\n    return None\n')
    args = [a for a in GRPO if not a.startswith('--reward')]
    for n, says in ((3, 'evaluation: the reward failed for each prompt'), (0, 'the reward failed for 16 prompts one after the other')):
        jsonl(world / 'many.jsonl', [dict(prompt=f'Q: {i}', number=i) for i in range(20)])
        with pytest.raises(ValueError, match=f'{says}, at last with: .*never.py raised TypeError'):
            stage(*args, '--reward=never.py', f'--eval_iters={n}', '--val_dataset=many.jsonl', '--out_dir=out-never', '--reward_retries=0', '--reward_workers=1', cwd=world)


@pytest.mark.parametrize('spec', ['', 'sums.py,', ' , '])
def test_a_reward_without_a_name_is_refused(world, spec):
    args = [a for a in PPO if not a.startswith('--reward')]
    with pytest.raises(ValueError, match='expected a FILE.py or a reward model'):
        stage(*args, f'--reward={spec}', '--out_dir=out-no', cwd=world)
