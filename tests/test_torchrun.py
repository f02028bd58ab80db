"""The stages under torchrun: on 2, 4 and 8 ranks against one process (float32: every number of log.jsonl and every weight within 2e-5),
a rank of the real command killed in the middle, what is refused. Starting costs more than training here, so one torchrun runs many layouts
one after another, each by the script itself with its own argv (MANY)."""
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
import parallel
from model import GPT, GPTConfig

TOL = 2e-5  # relative, and absolute: reductions in another order, through AdamW
NOT_THE_SAME = ('split', 'time', 'gen_s', 'upd_s', 'tok_per_s', 'pairs_per_s', 'completions_per_s')
FEW = ['--batch_size=8', '--eval_interval=3', '--max_iters=8', '--learning_rate=1e-3', '--device=cpu']
RL = [*FEW, '--dataset=prompts.jsonl', '--max_new_tokens=6', '--eval_iters=4', '--minibatch_size=4', '--micro_tokens=64']
CASES = {
    'sft': ['sft.py', *FEW, '--init_from=out-base', '--dataset=sft.jsonl', '--val_dataset=sft_val.jsonl', '--micro_tokens=96'],
    'text': ['sft.py', *FEW, '--dataset=text', '--n_layer=2', '--n_head=2', '--n_embd=32', '--block_size=32', '--micro_tokens=64', '--eval_iters=2'],
    'adapter': ['sft.py', *FEW, '--init_from=out-base', '--dataset=sft.jsonl', '--micro_tokens=96', '--lora_r=4'],
    'bfloat16': ['sft.py', *FEW, '--init_from=out-base', '--dataset=sft.jsonl', '--micro_tokens=96', '--dtype=bfloat16'],
    'reward': ['reward.py', *FEW, '--init_from=out-base', '--dataset=pref.jsonl', '--micro_tokens=192', '--normalize_n=16', '--max_new_tokens=6'],
    'dpo': ['dpo.py', *FEW, '--init_from=out-base', '--dataset=pref.jsonl', '--micro_tokens=128', '--max_new_tokens=6', '--eval_samples=3'],
    'kto': ['dpo.py', *FEW, '--init_from=out-base', '--dataset=pref.jsonl', '--micro_tokens=128', '--max_new_tokens=6', '--eval_samples=3', '--loss_type=kto', '--lora_r=4'],
    'reward_lora': ['reward.py', *FEW, '--init_from=out-base', '--dataset=pref.jsonl', '--micro_tokens=192', '--normalize=none', '--lora_r=4'],
    'ppo_lora': ['ppo.py', *RL, '--init_from=out-base', '--reward=reward.py', '--ppo_epochs=2', '--lora_r=4'],
    'grpo_lora': ['grpo.py', *RL, '--init_from=out-base', '--reward=reward.py', '--group_size=2', '--eval_k=2', '--beta=0.05', '--lora_r=4'],
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


MANY = """
import json, os, runpy, sys
import torch.distributed as dist
root, jobs, several, stdout = sys.argv[1], json.load(open(sys.argv[2])), 'WORLD_SIZE' in os.environ, sys.stdout
sys.path.insert(0, root)
if several:
    store, rank, world = next(dist.rendezvous('env://'))
for i, (script, *args) in enumerate(jobs):
    if several:
        dist.init_process_group('gloo', store=dist.PrefixStore(f'job {i}', store), rank=rank, world_size=world)
    sys.argv = [script, *args]
    runpy.run_path(os.path.join(root, script), run_name='__main__')
    sys.stdout = stdout
"""
TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone']


def command(case, n, out, *more):
    flags = [m for m in more if m.startswith('--max_restarts')]
    script, *args = CASES[case]
    start = [*TORCHRUN, f'--nproc_per_node={n}', *flags] if n > 1 else [sys.executable]
    return [*start, os.path.join(ROOT, script), *args, f'--out_dir={out}', *(m for m in more if m not in flags)]


def execute(world, argv, rc=0):
    with subprocess.Popen(argv, cwd=world, env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        try:
            stdout, stderr = p.communicate(timeout=280)
        except subprocess.TimeoutExpired:
            p.terminate()  # not kill: torchrun then ends its workers
            raise
    assert (p.returncode == 0) == (rc == 0), stdout[-2000:] + stderr[-3000:]
    return stdout, stderr


def run(world, case, n, out, *more, rc=0):
    return execute(world, command(case, n, out, *more), rc)


def run_many(world, n, jobs):
    """jobs: [(case, out_dir, *keys)], on n ranks of one torchrun, or one process after another's end."""
    file, script = world / f'jobs{time.time()}.json', world / 'many.py'
    file.write_text(json.dumps([[*CASES[case], f'--out_dir={out}', *keys] for case, out, *keys in jobs]))
    script.write_text(MANY)
    return execute(world, [*([*TORCHRUN, f'--nproc_per_node={n}'] if n > 1 else [sys.executable]), str(script), ROOT, str(file)])


def alone(world, *cases):
    """The folder of the one-process run of the last case; each is run once."""
    new = [case for case in cases if not (world / f'one-{case}').exists()]
    if new:
        run_many(world, 1, [(case, world / f'one-{case}') for case in new])
    return world / f'one-{cases[-1]}'


def rows(out):
    return [json.loads(line) for line in open(os.path.join(out, 'log.jsonl'))][1:]


def assert_same(a, b, tol=TOL):
    """Logs and checkpoints of two runs, to tol; optimizer states too."""
    x, y = rows(a), rows(b)
    assert [(r['step'], r['split']) for r in x] == [(r['step'], r['split']) for r in y]
    for p, q in zip(x, y):
        assert p.keys() == q.keys() - {'bubble', 'bubble_ideal'}  # which a pipeline alone has
        for k in p.keys() - set(NOT_THE_SAME):
            assert math.isclose(p[k], q[k], rel_tol=tol, abs_tol=tol), (p['step'], p['split'], k, p[k], q[k])
    a, b = (torch.load(os.path.join(d, 'ckpt.pt'), weights_only=True) for d in (a, b))
    assert a.keys() == b.keys() and a['iter'] == b['iter'] and a['data'] == b['data'] and a['optimizer']['step'] == b['optimizer']['step'] > 0
    for name in ('model', 'value'):
        if name in a:
            assert a[name].keys() == b[name].keys() and max((a[name][k] - b[name][k]).abs().max() for k in a[name]) < tol, name
    for kind in ('exp_avg', 'exp_avg_sq'):
        assert max((a['optimizer'][kind][k] - b['optimizer'][kind][k]).abs().max() for k in a['optimizer'][kind]) < tol * 10, kind


def test_sft_on_two_ranks_with_zero_3(world, tmp_path):
    stdout, _ = run(world, 'sft', 2, tmp_path / 'out', '--zero=3')
    assert stdout.count('step 8: val loss') == 1 and 'x 2 (dp 2, zero 3)' in stdout  # rank 0 alone speaks
    assert_same(alone(world, 'sft'), tmp_path / 'out')


def test_grpo_on_two_ranks_tensor_parallel(world, tmp_path):
    """Rollouts by an engine of two shards, rewards of each rank's share, the update cut in two."""
    run(world, 'grpo', 2, tmp_path / 'out', '--tp=2', '--rollout_tp=True')
    assert_same(alone(world, 'grpo'), tmp_path / 'out')


AXES = [[], ['--tp=2'], ['--pp=2'], ['--tp=2', '--pp=2'], ['--cp=2'], ['--tp=2', '--cp=2'], ['--pp=2', '--cp=2']]  # on 4 ranks: dp takes the rest
GRID = [(stage, *axes, f'--zero={(i + j) % 4}', *(['--rollout_tp=True'] if stage in ('ppo', 'grpo') and '--tp=2' in axes and len(axes) % 2 == i % 2 else []))
        for i, stage in enumerate(parallel.STAGES) for j, axes in enumerate(AXES) if 'cp' in parallel.STAGES[stage] or '--cp=2' not in axes]
GRID += [('sft', '--cp=2', '--zero=2'), ('reward', '--tp=2', '--cp=2', '--zero=3'), ('ppo', '--pp=2', '--cp=2', '--zero=0'), ('grpo', '--tp=4'),
         ('ppo', '--tp=2', '--cp=2', '--zero=1', '--rollout_tp=True'), ('grpo', '--tp=2', '--zero=3', '--rollout_tp=True'), ('text', '--tp=2', '--zero=1'), ('kto', '--zero=1'), ('kto', '--pp=2', '--zero=2'),
         ('adapter', '--pp=2'), ('adapter', '--cp=2', '--zero=2'), ('reward_lora', '--pp=2', '--zero=1'), ('ppo_lora', '--cp=2', '--zero=1'),
         ('ppo_lora', '--pp=2', '--zero=2'), ('grpo_lora', '--pp=2', '--zero=2'), ('bfloat16', '--tp=2', '--cp=2')]
EIGHT = [(stage, '--tp=2', '--pp=2', '--cp=2', *keys) for stage, keys in (('sft', ['--zero=3']), ('reward', []), ('ppo', ['--zero=1', '--rollout_tp=True']))]
name_of = lambda job: ' '.join(job).replace('--', '').replace('=', '')


@pytest.fixture(scope='module')
def grid(world):
    """Every layout of GRID, by one torchrun."""
    alone(world, *dict.fromkeys(case for case, *_ in GRID))
    run_many(world, 4, [(job[0], world / name_of(job), *job[1:]) for job in GRID])


def test_every_class_that_is_accepted_is_in_the_grid():
    """Of each stage: every set of its axes that fits 4 ranks, with every zero stage somewhere; every set with every zero in some stage."""
    seen = {(case, tuple(k for k in keys if 'p=' in k and 'rollout' not in k), k) for case, *keys in GRID for k in keys if 'zero' in k}
    for stage, axes in parallel.STAGES.items():
        assert {a for c, a, _ in seen if c == stage} == {tuple(a) for a in AXES if 'cp' in axes or '--cp=2' not in a}
        assert {z for c, _, z in seen if c == stage} == {f'--zero={z}' for z in range(4)}
        assert 'cp' not in axes or any(case == stage and '--cp=2' in keys and '--tp=2' in keys and '--pp=2' in keys for case, *keys in EIGHT)
    assert {(a, z) for _, a, z in seen} == {(tuple(a), f'--zero={z}') for a in AXES for z in range(4)}


@pytest.mark.slow
@pytest.mark.parametrize('job', GRID, ids=name_of)
def test_a_stage_on_four_ranks_is_the_stage_on_one(world, grid, job):
    assert_same(alone(world, job[0]), world / name_of(job), 2e-2 if job[0] == 'bfloat16' else TOL)


@pytest.mark.slow
def test_eight_ranks(world):
    run_many(world, 8, [(job[0], world / name_of(job), *job[1:]) for job in EIGHT])
    for job in EIGHT:
        assert_same(alone(world, job[0]), world / name_of(job))


def kill_rank(p, rank):
    """kill -9 of one of torchrun's workers."""
    for pid in open(f'/proc/{p.pid}/task/{p.pid}/children').read().split():
        if f'LOCAL_RANK={rank}'.encode() in open(f'/proc/{pid}/environ', 'rb').read().split(b'\0'):
            return os.kill(int(pid), signal.SIGKILL)
    raise AssertionError(f'no rank {rank} among the children of {p.pid}')


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir('/proc'), reason='finds the worker in /proc')
@pytest.mark.parametrize('case,keys', [('sft', ['--zero=1']), ('reward', ['--zero=2']), ('dpo', ['--tp=2']), ('ppo', ['--zero=3']), ('grpo', ['--pp=2'])])
def test_a_killed_rank_is_named_and_the_restarted_run_arrives_where_the_other_does(world, tmp_path, case, keys):
    """The real command; kill -9 of rank 1 behind the checkpoint of iteration 3; torchrun starts both again, the stage goes on by itself. The losses and
    weights are those of the process that nobody disturbed; every step stands once in the log."""
    argv = command(case, 2, tmp_path / 'out', '--max_restarts=1', *keys)
    with subprocess.Popen(argv, cwd=world, env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        until = time.time() + 200
        while time.time() < until and p.poll() is None:
            try:
                if any(r['step'] >= 4 for r in rows(tmp_path / 'out')):
                    break
            except (OSError, ValueError):
                time.sleep(0.002)
        kill_rank(p, 1)
        _, stderr = p.communicate(timeout=280)
    assert p.returncode == 0, stderr[-3000:]
    said = [line for line in stderr.split('\n') if 'parallel: rank 0 of 2' in line]
    assert said and 'Last good checkpoint' in said[0] and 'ckpt.pt (iter ' in said[0], stderr[-3000:]
    assert ('rank 1 (' in said[0] and ' is dead' in said[0]) or 'another rank failed' in said[0]
    assert_same(alone(world, case), tmp_path / 'out')


@pytest.mark.slow
def test_a_run_goes_on_with_another_layout(world, tmp_path):
    """Four iterations on two ranks with ZeRO-3, per-rank files merged by the command, four more on one process."""
    out = tmp_path / 'out'
    run(world, 'sft', 2, out, '--zero=3', '--sharded_ckpt=True', '--decay_lr=False', '--max_iters=4', '--eval_interval=4')
    assert not (out / 'ckpt.pt').exists()
    _, stderr = run(world, 'sft', 1, out, '--init_from=resume', rc=2)
    assert 'python parallel.py merge' in stderr
    subprocess.run([sys.executable, os.path.join(ROOT, 'parallel.py'), 'merge', str(out)], check=True, capture_output=True)
    run(world, 'sft', 1, out, '--init_from=resume', '--decay_lr=False', '--eval_interval=4')
    run(world, 'sft', 1, tmp_path / 'one', '--decay_lr=False', '--eval_interval=4')
    assert_same(tmp_path / 'one', out)


@pytest.mark.slow
def test_what_is_not_supported_is_refused_by_name(world, tmp_path):
    for case, keys, says in [('dpo', ['--cp=2'], 'cp 2 is not supported by dpo.py'),
                             ('ppo', ['--value=trunk'], 'the nearest that works is --value=policy'),
                             ('adapter', ['--tp=2'], 'lora with tp 2 is not supported')]:
        _, stderr = run(world, case, 2, tmp_path / 'out', *keys, rc=2)
        assert 'error: ' in stderr and says in stderr, stderr[-2000:]
    assert not os.path.exists(tmp_path / 'out' / 'ckpt.pt')
    for keys, says in [(dict(stage='grpo', cp=2), 'cp 2 is not supported by grpo.py'), (dict(stage='ppo', mode='async'), '--mode=sync'),
                       (dict(stage='sft', compile=True), 'compile with 2 processes'), (dict(stage='grpo', rollout_tp=True), '--tp=2 and more')]:
        with pytest.raises(ValueError, match=says), pytest.MonkeyPatch.context() as patch:
            patch.setenv('WORLD_SIZE', '2')
            parallel.accept(**keys)
    _, stderr = run(world, 'sft', 1, tmp_path / 'out', '--tp=2', rc=2)
    assert stderr.startswith('error: tp 2') and 'torchrun --nproc_per_node=2' in stderr and stderr.count('\n') == 1
