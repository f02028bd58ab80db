"""The stages under torchrun: on 2, 4 and 8 ranks against one process (float32: every number of log.jsonl and
every weight within 2e-5), a rank of the real command killed in the middle, what is refused. Starting costs
more than training here, so one start serves many layouts one after another, each by the script itself with
its own argv (see many)."""
import dataclasses
import functools
import itertools
import json
import math
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import ROOT

import infer  # noqa: F401 (for the server that the ranks are forked from)
import parallel
from helpers import jsonl
from model import GPT, GPTConfig

TOL = 2e-5  # relative, and absolute: reductions in another order, through AdamW
NOT_THE_SAME = ('split', 'time', 'gen_s', 'upd_s', 'tok_per_s', 'pairs_per_s', 'completions_per_s', 'idle')
FEW = ['--batch_size=8', '--eval_interval=2', '--max_iters=2', '--learning_rate=1e-3', '--device=cpu']
RL = [*FEW, '--dataset=prompts.jsonl', '--max_new_tokens=6', '--eval_iters=3', '--minibatch_size=4',
      '--micro_tokens=64', '--reward_workers=0']
CASES = {
    'sft': ['sft.py', *FEW, '--init_from=out-base', '--dataset=sft.jsonl', '--val_dataset=sft_val.jsonl',
            '--micro_tokens=96'],
    'text': ['sft.py', *FEW, '--dataset=text', '--n_layer=2', '--n_head=4', '--n_embd=32', '--block_size=32',
             '--micro_tokens=64', '--eval_iters=2'],
    'adapter': ['sft.py', *FEW, '--init_from=out-base', '--dataset=sft.jsonl', '--micro_tokens=96',
                '--lora_r=4'],
    'bfloat16': ['sft.py', *FEW, '--init_from=out-base', '--dataset=sft.jsonl', '--micro_tokens=96',
                 '--dtype=bfloat16'],
    'reward': ['reward.py', *FEW, '--init_from=out-base', '--dataset=pref.jsonl', '--micro_tokens=192',
               '--normalize_n=16', '--max_new_tokens=6'],
    'dpo': ['dpo.py', *FEW, '--init_from=out-base', '--dataset=pref.jsonl', '--micro_tokens=128',
            '--max_new_tokens=6', '--eval_samples=3'],
    'kto': ['kto.py', *FEW, '--init_from=out-base', '--dataset=pref.jsonl', '--micro_tokens=128',
            '--max_new_tokens=6', '--eval_samples=3'],
    'kto_lora': ['kto.py', *FEW, '--init_from=out-base', '--dataset=pref.jsonl', '--micro_tokens=128',
                 '--max_new_tokens=6',
                 '--eval_samples=3', '--lora_r=4'],
    'reward_lora': ['reward.py', *FEW, '--init_from=out-base', '--dataset=pref.jsonl', '--micro_tokens=192',
                    '--normalize=none', '--lora_r=4'],
    'ppo_lora': ['ppo.py', *RL, '--init_from=out-base', '--reward=reward.py', '--ppo_epochs=2', '--lora_r=4'],
    'grpo_lora': ['grpo.py', *RL, '--init_from=out-base', '--reward=reward.py', '--group_size=2',
                  '--eval_k=2', '--beta=0.05', '--lora_r=4'],
    'ppo': ['ppo.py', *RL, '--init_from=out-base', '--reward=out-rm', '--ppo_epochs=2', '--whiten_rewards',
            '--target_kl=1.0'],
    'grpo': ['grpo.py', *RL, '--init_from=out-base', '--reward=reward.py', '--group_size=2', '--eval_k=2',
             '--grpo_epochs=2', '--beta=0.05', '--reward_workers=1'],
}
ASYNC = ['--mode=async', '--max_staleness=0', '--reward_workers=1']  # samples of the very weights
for case in ('ppo', 'grpo', 'grpo_lora'):
    CASES[f'{case}_async'] = [*CASES[case], *ASYNC]
CASES['grpo_stale'] = [*CASES['grpo'], '--mode=async', '--simulate_staleness=1']


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """Rows of each kind, a tiny untrained language model and a reward model, as checkpoints."""
    d = tmp_path_factory.mktemp('ranks')
    letters = 'abcdefgh'

    def prompt(i):
        return f'Q: Say {letters[i % 8]} {i % 5}\nA: '
    good, bad = (lambda i: letters[i % 8] * (2 + i % 5)), (lambda i: 'no.' * (1 + i % 3))

    def write(name, f):
        jsonl(d / name, map(f, range(60)))
    write('sft.jsonl', lambda i: dict(prompt=prompt(i), completion=good(i)))
    # 8 + 1: the last batch has fewer rows than replicas
    jsonl(d / 'sft_val.jsonl', (dict(prompt=prompt(i), completion=good(i)) for i in range(9)))
    write('pref.jsonl', lambda i: dict(prompt=prompt(i), chosen=good(i), rejected=bad(i)))
    write('prompts.jsonl', lambda i: dict(prompt=prompt(i), letter=letters[i % 8]))
    (d / 'reward.py').write_text('def reward(prompt, completion, row):\n'
                                 '    return float(sum(c < "\\x40" for c in completion))\n')
    (d / 'text').mkdir()
    for split, n in (('train', 2000), ('val', 300)):
        (torch.arange(n) % 29).to(torch.uint16).numpy().tofile(d / 'text' / f'{split}.bin')
    (d / 'text' / 'meta.json').write_text(json.dumps(dict(vocab_size=29,
                                                          chars=list('abcdefghijklmnopqrstuvwxyz .,'))))
    c = GPTConfig(n_layer=2, n_head=4, n_embd=32, block_size=96, vocab_size=257)
    for folder, head in (('out-base', 'lm'), ('out-rm', 'scalar')):
        torch.manual_seed(0)
        (d / folder).mkdir()
        torch.save(dict(model=GPT(c, head).state_dict(), model_args=dataclasses.asdict(c), lora=None,
                        tokenizer='byte', config={}, iter=0), d / folder / 'ckpt.pt')
    return d


def many(rank, world, folder, jobs, file=None):
    """In each of `world` processes: every job (script and argv) in a process group of its own; file: of a
    FileStore, else torchrun's store."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ['WORLD_SIZE'], stdout = str(world), sys.stdout
    store = None if world == 1 else dist.FileStore(file,
                                                   world) if file else next(dist.rendezvous('env://'))[0]
    for i, (script, *args) in enumerate(jobs):
        if store:
            dist.init_process_group('gloo', store=dist.PrefixStore(f'job {i}', store), rank=rank,
                                    world_size=world)
        sys.argv = [script, *args]
        runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
        sys.stdout = stdout


TORCHRUN = [sys.executable, '-m', 'torch.distributed.run', '--standalone']


def command(case, n, out, *more):
    flags = [m for m in more if m.startswith('--max_restarts')]
    script, *args = CASES[case]
    start = [*TORCHRUN, f'--nproc_per_node={n}', *flags] if n > 1 else [sys.executable]
    return [*start, os.path.join(ROOT, script), *args, f'--out_dir={out}',
            *(m for m in more if m not in flags)]


def execute(world, argv, rc=0):
    with subprocess.Popen(argv, cwd=world, env={**os.environ, 'OMP_NUM_THREADS': '1'}, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as p:
        try:
            stdout, stderr = p.communicate(timeout=280)
        except subprocess.TimeoutExpired:
            p.terminate()  # not kill: torchrun then ends its workers
            raise
    assert (p.returncode == 0) == (rc == 0), stdout[-2000:] + stderr[-3000:]
    return stdout, stderr


def run(world, case, n, out, *more, rc=0):
    return execute(world, command(case, n, out, *more), rc)


def run_many(world, n, jobs, torchrun=False):
    """jobs: [(case, out_dir, *keys)], one after another in the same n processes: torchrun's, or forked from a
    server that has imported torch."""
    jobs, stamp = [[*CASES[case], f'--out_dir={out}', *keys] for case, out, *keys in jobs], time.time()
    if torchrun:
        script = world / f'many{stamp}.py'
        script.write_text(f'import os, sys\nsys.path[:0] = {[ROOT, os.path.dirname(__file__)]!r}\n'
                          f'from test_torchrun import many\n'
                          f'many(int(os.environ["RANK"]), {n}, {str(world)!r}, {jobs!r})\n')
        execute(world, [*TORCHRUN, f'--nproc_per_node={n}', str(script)])
    else:
        multiprocessing.set_forkserver_preload(['test_torchrun'])
        mp.start_processes(many, (n, str(world), jobs, str(world / f'store{stamp}')), nprocs=n,
                           start_method='forkserver')


def alone(world, *cases, keys=()):
    """The folder of the one-process run of the last case; each is run once."""
    def folder(case):
        return world / ' '.join(['one', case, *keys])
    new = [case for case in cases if not folder(case).exists()]
    if new:
        run_many(world, 1, [(case, folder(case), *keys) for case in new])
    return folder(cases[-1])


def rows(out):
    return [json.loads(line) for line in (Path(out) / 'log.jsonl').read_text('utf-8').splitlines()][1:]


def assert_same(a, b, tol=TOL):
    """Logs and checkpoints of two runs, to tol; optimizer states too."""
    x, y = rows(a), rows(b)
    assert [(r['step'], r['split']) for r in x] == [(r['step'], r['split']) for r in y]
    for p, q in zip(x, y):
        assert p.keys() == q.keys() - {'bubble', 'bubble_ideal'}  # which a pipeline alone has
        for k in p.keys() - set(NOT_THE_SAME):
            if k == 'accuracy' and abs(p.get('margin', 1)) < 1e-6:
                # before the first step the rewards are 0 but for the order of sums: their signs are noise
                continue
            same = p[k] == q[k] or math.isclose(p[k], q[k], rel_tol=tol, abs_tol=tol)
            assert same, (p['step'], p['split'], k, p[k], q[k])
    a, b = (torch.load(os.path.join(d, 'ckpt.pt'), weights_only=True) for d in (a, b))
    assert a.keys() == b.keys() and a['iter'] == b['iter'] and a['data'] == b['data']
    assert a['optimizer']['step'] == b['optimizer']['step'] > 0
    for name in ('model', 'value'):
        if name in a:
            assert a[name].keys() == b[name].keys() and max((a[name][k] - b[name][k]).abs().max()
                                                            for k in a[name]) < tol, name
    for kind in ('exp_avg', 'exp_avg_sq'):
        assert max((a['optimizer'][kind][k] - b['optimizer'][kind][k]).abs().max()
                   for k in a['optimizer'][kind]) < tol * 10, kind


def test_sft_on_two_ranks_with_zero_3(world, tmp_path):
    stdout, _ = run(world, 'sft', 2, tmp_path / 'out', '--zero=3')
    assert stdout.count('step 2: val loss') == 1 and 'x 2 (dp 2, zero 3)' in stdout  # rank 0 alone speaks
    assert_same(alone(world, 'sft'), tmp_path / 'out')


@pytest.mark.slow
def test_grpo_on_two_ranks_tensor_parallel(world, tmp_path):
    """Rollouts by an engine of two shards, rewards of each rank's share, the update cut in two."""
    run(world, 'grpo', 2, tmp_path / 'out', '--tp=2', '--rollout_tp=True')
    assert_same(alone(world, 'grpo'), tmp_path / 'out')


@pytest.mark.slow
def test_async_on_two_ranks_and_two_workers_is_async_on_one_and_one(world, tmp_path):
    """Rank 0 owns the rollouts: each batch, step, evaluation and weight is that of one process, whose own are
    those of sync mode."""
    run(world, 'grpo_async', 2, tmp_path / 'out', '--rollout_workers=2', '--zero=1')
    assert_same(alone(world, 'grpo_async'), tmp_path / 'out')
    batches = [row['prompts'] for row in rows(tmp_path / 'out') if row['split'] == 'train']
    assert len(batches) == 2 and batches[0] != batches[1]


AXES = [[], ['--tp=2'], ['--pp=2'], ['--cp=2']]  # on 2 ranks
# on 4 ranks: dp takes the rest
PAIRS = [['--tp=2'], ['--pp=2'], ['--tp=2', '--pp=2'], ['--tp=2', '--cp=2'], ['--pp=2', '--cp=2']]


def layouts(axes, zero):
    """(stage, axes, a ZeRO stage) of every stage that takes such axes; half of the samplers are cut as
    well."""
    for i, stage in enumerate(parallel.STAGES):
        for j, keys in enumerate(axes):
            if 'cp' in parallel.STAGES[stage] or '--cp=2' not in keys:
                cut = axes is PAIRS and stage in ('ppo',
                                                  'grpo') and '--tp=2' in keys and len(keys) % 2 == i % 2
                yield stage, *keys, f'--zero={zero(i, j, keys) % 4}', *['--rollout_tp=True'] * cut


GRID = {  # ranks: [(case, *keys)]
    2: [*layouts(AXES, lambda i, j, keys: i + 3 * len(keys)), *layouts([[]], lambda i, j, keys: i + 1),
        ('text', '--zero=3'), ('kto_lora', '--zero=1'), ('adapter', '--pp=2'),
        ('adapter', '--cp=2', '--zero=2'),
        ('reward_lora', '--pp=2'), ('kto_lora', '--pp=2'), ('ppo_lora', '--cp=2', '--zero=1'),
        ('ppo_lora', '--pp=2'),
        ('grpo_lora', '--zero=2'), ('grpo_lora', '--pp=2'), ('bfloat16', '--tp=2'), ('bfloat16', '--cp=2'),
        ('grpo_async', '--tp=2'), ('grpo_async', '--pp=2', '--rollout_workers=2'), ('ppo_async', '--zero=3'),
        ('ppo_async', '--cp=2'), ('grpo_lora_async', '--zero=2'), ('grpo_lora_async', '--pp=2'),
        ('grpo_stale', '--zero=3')],
    4: [*layouts(PAIRS, lambda i, j, keys: i + j + 2), ('grpo', '--tp=2', '--zero=3', '--rollout_tp=True'),
        ('ppo', '--tp=2', '--cp=2', '--zero=1', '--rollout_tp=True')],
    8: [('sft', '--tp=2', '--pp=2', '--cp=2', '--zero=3'), ('reward', '--tp=2', '--pp=2', '--cp=2'),
        ('ppo', '--tp=2', '--pp=2', '--cp=2', '--zero=1', '--rollout_tp=True')]}
GRID = {n: list(dict.fromkeys(jobs)) for n, jobs in GRID.items()}  # a layout that two lines name runs once


def name_of(job):
    return ' '.join(map(str, job)).replace('--', '').replace('=', '')


def test_every_class_that_is_accepted_is_in_the_grid():
    """Of each stage every set of its axes, and every zero stage where there is something to share out."""
    jobs = [(n, case, {k for k in keys if k[2:5] in ('tp=', 'pp=', 'cp=')},
             [int(k[7:]) for k in keys if 'zero' in k]) for n in GRID for case, *keys in GRID[n]]
    for stage, axes in parallel.STAGES.items():
        sets = {frozenset(f'--{a}=2' for a in s) for k in range(4)
                for s in itertools.combinations(axes.split(), k)}
        assert {frozenset(keys) for _, case, keys, _ in jobs if case == stage} == sets
        assert {zero for n, case, keys, zeros in jobs for zero in zeros if case == stage
                and n > 2 ** len(keys - {'--cp=2'})} == {0, 1, 2, 3}, stage


@pytest.fixture(scope='module')
def grid(world):
    """Every layout of GRID for so many ranks, by one start (4: of torchrun)."""
    @functools.cache
    def start(n):
        alone(world, *dict.fromkeys(case for case, *_ in GRID[n]))
        run_many(world, n, [(job[0], world / name_of((n, *job)), *job[1:]) for job in GRID[n]],
                 torchrun=n == 4)
    return start


@pytest.mark.slow
@pytest.mark.parametrize('n,job', [(n, job) for n in GRID for job in GRID[n]], ids=lambda x: str(x)
                         if isinstance(x, int) else name_of(x))
def test_a_stage_on_many_ranks_is_the_stage_on_one(world, grid, n, job):
    grid(n)
    assert_same(alone(world, job[0]), world / name_of((n, *job)), 2e-2 if job[0] == 'bfloat16' else TOL)


def rank_of(p, rank):
    """Process id of one of torchrun's workers."""
    for pid in Path(f'/proc/{p.pid}/task/{p.pid}/children').read_text('utf-8').split():
        if f'LOCAL_RANK={rank}'.encode() in Path(f'/proc/{pid}/environ').read_bytes().split(b'\0'):
            return int(pid)
    raise AssertionError(f'no rank {rank} among the children of {p.pid}')


FATES = [('sft', ['--zero=1'], signal.SIGKILL)] + [pytest.param(*fate, marks=pytest.mark.slow) for fate in (
    ('reward', ['--zero=2'], signal.SIGKILL), ('dpo', ['--tp=2'], signal.SIGKILL),
    ('ppo', ['--zero=3'], signal.SIGKILL),
    ('grpo', ['--pp=2'], signal.SIGKILL), ('grpo_async', ['--rollout_workers=2'], signal.SIGKILL),
    ('sft', ['--tp=2', '--dist_timeout=12'], signal.SIGSTOP))]


@pytest.mark.skipif(not os.path.isdir('/proc'), reason='finds the worker in /proc')
@pytest.mark.parametrize('case,keys,number', FATES, ids=str)
def test_a_rank_that_dies_or_hangs_is_named_and_the_run_goes_on(world, tmp_path, case, keys, number):
    """The real command; rank 1 is killed, or stopped, behind the checkpoint of iteration 3. The other one
    says in which collective, who is silent and from what to resume, torchrun who died of what. It starts both
    again, the stage goes on by itself, to the losses and weights of the process that nobody disturbed; every
    step stands once in the log."""
    longer = ['--max_iters=8', '--eval_interval=3']
    argv = command(case, 2, tmp_path / 'out', '--max_restarts=1', *longer, *keys)
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    with subprocess.Popen(argv, cwd=world, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as p:
        until = time.time() + 200
        while time.time() < until and p.poll() is None:
            try:
                if any(r['step'] >= 4 for r in rows(tmp_path / 'out')):
                    break
            except (OSError, ValueError):
                time.sleep(0.002)
        os.kill(rank_of(p, 1), number)
        _, stderr = p.communicate(timeout=280)
    assert p.returncode == 0, stderr[-3000:]
    said = [line for line in stderr.split('\n') if 'parallel: rank 0 (' in line]
    assert said and 'ckpt.pt (iter ' in said[0] and '--init_from=resume' in said[0], stderr[-3000:]
    assert re.search(r' over \w+ \[0, 1\] failed after [\d.]+ s: no word from rank 1 \(', said[0]), said
    assert number == signal.SIGSTOP or 'local_rank: 1' in stderr and '-9' in stderr
    assert_same(alone(world, case, keys=longer), tmp_path / 'out')


@pytest.mark.slow
def test_a_run_goes_on_with_another_layout(world, tmp_path):
    """One iteration on two ranks with ZeRO-3, one more on one process."""
    out, keys = tmp_path / 'out', ['--decay_lr=False', '--eval_interval=1']
    run(world, 'sft', 2, out, '--zero=3', *keys, '--max_iters=1')
    run_many(world, 1, [('sft', out, '--init_from=resume', *keys)])
    assert_same(alone(world, 'sft', keys=keys), out)


@pytest.mark.slow
def test_what_is_not_supported_is_refused_by_name(world, tmp_path):
    _, stderr = run(world, 'ppo', 2, tmp_path / 'out', '--mode=async', '--tp=2', '--rollout_tp=True', rc=2)
    assert "error: rollout_tp with mode 'async': each rollout worker holds the whole model" in stderr, stderr
    assert not os.path.exists(tmp_path / 'out')
    usual = dict(tp=1, cp=1, compile=False)
    for stage, keys, says in [('grpo', dict(cp=2), 'cp 2 is not supported by grpo.py'),
                              ('dpo', dict(cp=2), 'cp 2 is not supported by dpo.py'),
                              ('sft', dict(compile=True), 'compile with 2 processes'),
                              ('grpo', dict(rollout_tp=True), '--tp=2 and more')]:
        with pytest.raises(ValueError, match=says), pytest.MonkeyPatch.context() as patch:
            patch.setenv('WORLD_SIZE', '2')
            parallel.check_stage(stage, usual | keys)
    _, stderr = run(world, 'sft', 1, tmp_path / 'out', '--tp=2', rc=2)
    assert stderr.startswith('error: tp 2') and 'torchrun --nproc_per_node=2' in stderr
    assert stderr.count('\n') == 1
