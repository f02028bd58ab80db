"""The stages under torchrun, as a user runs them: the real command on 2 and 4 ranks against one process (float32: every number of
log.jsonl and every weight within 2e-5), a rank killed in the middle, what is refused."""
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import model as M
from model import GPT, GPTConfig

TOL = 2e-5  # relative, and absolute: reductions in another order, through AdamW
NOT_THE_SAME = ('split', 'time', 'gen_s', 'upd_s', 'tok_per_s', 'pairs_per_s', 'completions_per_s')
FEW = ['--batch_size=8', '--eval_interval=2', '--max_iters=4', '--learning_rate=1e-3', '--device=cpu']
RL = [*FEW, '--dataset=prompts.jsonl', '--max_new_tokens=6', '--eval_iters=4', '--minibatch_size=4', '--micro_tokens=64']
CASES = {
    'sft': ['sft.py', *FEW, '--init_from=out-base', '--dataset=sft.jsonl', '--val_dataset=sft_val.jsonl', '--micro_tokens=96'],
    'text': ['sft.py', *FEW, '--dataset=text', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--micro_tokens=64', '--eval_iters=2'],
    'adapter': ['sft.py', *FEW, '--init_from=out-base', '--dataset=sft.jsonl', '--micro_tokens=96', '--lora_r=4'],
    'reward': ['reward.py', *FEW, '--init_from=out-base', '--dataset=pref.jsonl', '--micro_tokens=192', '--normalize_n=16', '--max_new_tokens=6'],
    'dpo': ['dpo.py', *FEW, '--init_from=out-base', '--dataset=pref.jsonl', '--micro_tokens=128', '--max_new_tokens=6', '--eval_samples=3'],
    'kto': ['dpo.py', *FEW, '--init_from=out-base', '--dataset=pref.jsonl', '--micro_tokens=128', '--max_new_tokens=6', '--eval_samples=3', '--loss_type=kto', '--lora_r=4'],
    'ppo': ['ppo.py', *RL, '--init_from=out-base', '--reward=out-rm', '--ppo_epochs=2', '--whiten_rewards', '--target_kl=1.0'],
    'grpo': ['grpo.py', *RL, '--init_from=out-base', '--reward=reward.py', '--group_size=2', '--eval_k=2', '--grpo_epochs=2', '--beta=0.05'],
}


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """Rows of each kind, a tiny untrained language model and a reward model, as checkpoints."""
    d = tmp_path_factory.mktemp('ranks')
    letters = 'abcdefgh'
    prompt = lambda i: f'Q: Say {letters[i % 8]} {i % 5}\nA: '
    good, bad = (lambda i: letters[i % 8] * (2 + i % 5)), (lambda i: 'no.' * (1 + i % 3))
    write = lambda name, f: (d / name).write_text(''.join(json.dumps(f(i)) + '\n' for i in range(60)))
    write('sft.jsonl', lambda i: dict(prompt=prompt(i), completion=good(i)))
    (d / 'sft_val.jsonl').write_text(''.join(open(d / 'sft.jsonl').readlines()[:9]))  # 8 + 1: the last batch has fewer rows than replicas
    write('pref.jsonl', lambda i: dict(prompt=prompt(i), chosen=good(i), rejected=bad(i)))
    write('prompts.jsonl', lambda i: dict(prompt=prompt(i), letter=letters[i % 8]))
    (d / 'reward.py').write_text('def reward(prompt, completion, row):\n    return float(sum(c < "\\x40" for c in completion))\n')
    (d / 'text').mkdir()
    for split, n in (('train', 2000), ('val', 300)):
        (torch.arange(n) % 29).to(torch.uint16).numpy().tofile(d / 'text' / f'{split}.bin')
    (d / 'text' / 'meta.json').write_text(json.dumps(dict(vocab_size=29, chars=list('abcdefghijklmnopqrstuvwxyz .,'))))
    c = GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=96, vocab_size=257)
    for folder, head in (('out-base', 'lm'), ('out-rm', 'scalar')):
        torch.manual_seed(0)
        (d / folder).mkdir()
        M.save_checkpoint(str(d / folder / 'ckpt.pt'), dict(model=GPT(c, head).state_dict(), model_args=dataclasses.asdict(c), lora=None, tokenizer='byte', config={}, iter=0))
    return d


def command(case, n, out, *more):
    torchrun = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={n}']
    flags = [m for m in more if m.startswith('--max_restarts')]
    script, *args = CASES[case]
    argv = [sys.executable, *(torchrun + flags if n > 1 else []), os.path.join(ROOT, script), *args, f'--out_dir={out}', *(m for m in more if m not in flags)]
    return argv, {**os.environ, 'OMP_NUM_THREADS': '1'}


def run(world, case, n, out, *more, rc=0):
    argv, env = command(case, n, out, *more)
    with subprocess.Popen(argv, cwd=world, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        try:
            stdout, stderr = p.communicate(timeout=280)
        except subprocess.TimeoutExpired:
            p.terminate()  # not kill: torchrun then ends its workers
            raise
    assert (p.returncode == 0) == (rc == 0), stdout[-2000:] + stderr[-3000:]
    return stdout, stderr


_alone = {}


def alone(world, case, *more):
    """The folder of the one-process run; once for each case."""
    if (case, more) not in _alone:
        out = f'{world}/one-{case}-{len(_alone)}'
        run(world, case, 1, out, *more)
        _alone[case, more] = out
    return _alone[case, more]


def rows(out):
    return [json.loads(line) for line in open(os.path.join(out, 'log.jsonl'))][1:]


def assert_same(a, b):
    """Logs and checkpoints of two runs, to TOL; optimizer states too."""
    x, y = rows(a), rows(b)
    assert [(r['step'], r['split']) for r in x] == [(r['step'], r['split']) for r in y]
    for p, q in zip(x, y):
        assert p.keys() == q.keys() - {'bubble', 'bubble_ideal'}  # which a pipeline alone has
        for k in p.keys() - set(NOT_THE_SAME):
            assert math.isclose(p[k], q[k], rel_tol=TOL, abs_tol=TOL), (p['step'], p['split'], k, p[k], q[k])
    a, b = (torch.load(os.path.join(d, 'ckpt.pt'), weights_only=True) for d in (a, b))
    assert a.keys() == b.keys() and a['iter'] == b['iter'] and a['data'] == b['data'] and a['optimizer']['step'] == b['optimizer']['step'] > 0
    for name in ('model', 'value'):
        if name in a:
            assert a[name].keys() == b[name].keys() and max((a[name][k] - b[name][k]).abs().max() for k in a[name]) < TOL, name
    for kind in ('exp_avg', 'exp_avg_sq'):
        assert max((a['optimizer'][kind][k] - b['optimizer'][kind][k]).abs().max() for k in a['optimizer'][kind]) < TOL * 10, kind


def test_sft_on_two_ranks_with_zero_3(world, tmp_path):
    stdout, _ = run(world, 'sft', 2, tmp_path / 'out', '--zero=3')
    assert stdout.count('step 4: val loss') == 1 and 'x 2 (dp 2, zero 3)' in stdout  # rank 0 alone speaks
    assert_same(alone(world, 'sft'), tmp_path / 'out')


def test_grpo_on_two_ranks_tensor_parallel(world, tmp_path):
    """Rollouts by the gathered weights, rewards of each rank's share, the update cut in two."""
    run(world, 'grpo', 2, tmp_path / 'out', '--tp=2')
    assert_same(alone(world, 'grpo'), tmp_path / 'out')


@pytest.mark.slow
@pytest.mark.parametrize('case,n,keys', [
    ('sft', 4, ['--tp=2', '--pp=2']), ('sft', 2, ['--cp=2']), ('text', 4, ['--zero=1', '--tp=2']), ('adapter', 2, ['--zero=2']),
    ('reward', 2, ['--pp=2']), ('reward', 4, ['--zero=2', '--cp=2']), ('dpo', 2, ['--tp=2']), ('kto', 2, ['--zero=1']), ('dpo', 4, ['--pp=2', '--zero=3']),
    ('ppo', 2, ['--zero=2']), ('ppo', 4, ['--tp=2', '--zero=3']), ('grpo', 2, ['--zero=3']), ('grpo', 4, ['--pp=2', '--zero=1'])], ids=lambda x: str(x).strip("[]").replace("'", ''))
def test_a_stage_on_many_ranks_is_the_stage_on_one(world, tmp_path, case, n, keys):
    run(world, case, n, tmp_path / 'out', *keys)
    assert_same(alone(world, case), tmp_path / 'out')


def kill_rank(p, rank):
    """kill -9 of one of torchrun's workers."""
    for pid in open(f'/proc/{p.pid}/task/{p.pid}/children').read().split():
        if f'LOCAL_RANK={rank}'.encode() in open(f'/proc/{pid}/environ', 'rb').read().split(b'\0'):
            return os.kill(int(pid), signal.SIGKILL)
    raise AssertionError(f'no rank {rank} among the children of {p.pid}')


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir('/proc'), reason='finds the worker in /proc')
@pytest.mark.parametrize('case,keys', [('sft', ['--zero=1']), ('ppo', ['--zero=3'])])
def test_a_killed_rank_is_named_and_the_restarted_run_arrives_where_the_other_does(world, tmp_path, case, keys):
    """kill -9 of rank 1 behind the checkpoint of iteration 2; torchrun starts both again, the stage goes on by itself. The losses and
    weights are those of the process that nobody disturbed; every step stands once in the log."""
    argv, env = command(case, 2, tmp_path / 'out', '--max_restarts=1', '--max_iters=8', *keys)
    with subprocess.Popen(argv, cwd=world, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        until = time.time() + 200
        while time.time() < until and p.poll() is None:
            try:
                if any(r['step'] >= 3 for r in rows(tmp_path / 'out')):
                    break
            except (OSError, ValueError):
                time.sleep(0.002)
        kill_rank(p, 1)
        _, stderr = p.communicate(timeout=280)
    assert p.returncode == 0, stderr[-3000:]
    said = [line for line in stderr.split('\n') if 'parallel: rank 0 of 2' in line]
    assert said and 'Last good checkpoint' in said[0] and 'ckpt.pt (iter ' in said[0], stderr[-3000:]
    assert 'rank 1 (dp 1 pp 0 cp 0 tp 0) is dead' in said[0] or 'another rank failed' in said[0]
    assert_same(alone(world, case, '--max_iters=8'), tmp_path / 'out')


@pytest.mark.slow
def test_a_run_goes_on_with_another_layout(world, tmp_path):
    """Four iterations on two ranks with ZeRO-3, per-rank files merged by the command, four more on one process."""
    out = tmp_path / 'out'
    run(world, 'sft', 2, out, '--zero=3', '--sharded_ckpt=True', '--decay_lr=False')
    assert not (out / 'ckpt.pt').exists()
    _, stderr = run(world, 'sft', 1, out, '--init_from=resume', rc=2)
    assert 'python parallel.py merge' in stderr
    subprocess.run([sys.executable, os.path.join(ROOT, 'parallel.py'), 'merge', str(out)], check=True, capture_output=True)
    run(world, 'sft', 1, out, '--init_from=resume', '--max_iters=8', '--decay_lr=False')
    assert_same(alone(world, 'sft', '--max_iters=8', '--decay_lr=False'), out)


@pytest.mark.slow
def test_what_is_not_supported_is_refused_by_name(world, tmp_path):
    for case, keys, says in [('dpo', ['--cp=2'], 'cp 2 is not supported by dpo.py'),
                             ('ppo', ['--value=trunk'], 'the nearest that works is --value=policy'),
                             ('adapter', ['--tp=2'], 'lora with tp 2 is not supported'), ('grpo', ['--cp=2'], 'cp 2 is not supported by grpo.py')]:
        _, stderr = run(world, case, 2, tmp_path / 'out', *keys, rc=2)
        assert 'error: ' in stderr and says in stderr, stderr[-2000:]
    assert not os.path.exists(tmp_path / 'out' / 'ckpt.pt')
    _, stderr = run(world, 'sft', 1, tmp_path / 'out', '--tp=2', rc=2)
    assert stderr.startswith('error: tp 2') and 'torchrun --nproc_per_node=2' in stderr and stderr.count('\n') == 1
