"""The stage scripts as a user runs them: the real command, tiny data, what it wrote read back; kill -9 and resume; mistakes."""
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT

import model as M
from run import load_model

TINY = ['--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=96', '--device=cpu']
REWARD = 'def reward(prompt, completion, row):\n    return float(completion.count(row["letter"]))\n'


def command(script, *args, cwd):
    return [sys.executable, os.path.join(ROOT, script), *args], dict(cwd=cwd, env={**os.environ, 'OMP_NUM_THREADS': '1'}, text=True)


def run(script, *args, cwd, rc=0):
    argv, kw = command(script, *args, cwd=cwd)
    r = subprocess.run(argv, capture_output=True, timeout=300, **kw)
    assert r.returncode == rc, r.stdout[-3000:] + r.stderr[-3000:]
    return r.stdout if rc == 0 else r.stderr


def rows(out):
    return [json.loads(line) for line in open(os.path.join(out, 'log.jsonl'))]


def timeless(out):
    return [{k: v for k, v in r.items() if k not in ('time', 'gen_s', 'upd_s', 'tok_per_s', 'init_from', 'out_dir')} for r in rows(out)]


def ckpt(out):
    return torch.load(os.path.join(out, 'ckpt.pt'), weights_only=True)


def equal(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """Data of three forms and a folder with sft, reward trained for a few iterations."""
    d = tmp_path_factory.mktemp('world')
    letters = 'abcdefgh'
    prompt = lambda i: f'Q: Say {letters[i % 8]} {i % 5}\nA: '
    good, bad = (lambda i: letters[i % 8] * (2 + i % 5)), (lambda i: 'no.' * (1 + i % 3))
    write = lambda name, f: (d / name).write_text(''.join(json.dumps(f(i)) + '\n' for i in range(60)))
    write('sft.jsonl', lambda i: dict(messages=[dict(role='user', content=f'Say {letters[i % 8]} {i % 5}'), dict(role='assistant', content=good(i))]))
    write('pref.jsonl', lambda i: dict(prompt=prompt(i), chosen=good(i), rejected=bad(i), **({'tie': True} if i % 9 == 0 else {})))
    write('prompts.jsonl', lambda i: dict(prompt=prompt(i), letter=letters[i % 8]))
    (d / 'reward.py').write_text(REWARD)
    run('sft.py', '--dataset=sft.jsonl', '--max_iters=6', '--eval_interval=3', '--batch_size=8', *TINY, cwd=d)
    run('reward.py', '--dataset=pref.jsonl', '--max_iters=4', '--eval_interval=2', '--batch_size=8', '--normalize_n=24', '--max_new_tokens=8', '--learning_rate=1e-3', '--device=cpu', cwd=d)
    return d


def test_sft_writes_log_and_checkpoint(world):
    log, c = rows(world / 'out-sft'), ckpt(world / 'out-sft')
    assert log[0]['split'] == 'config' and log[0]['max_iters'] == 6 and [r['step'] for r in log if r['split'] == 'eval'] == [0, 3, 6]
    train = [r for r in log if r['split'] == 'train']
    assert [r['step'] for r in train] == list(range(6)) and train[-1]['loss'] < train[0]['loss'] and {'lr', 'grad_norm', 'tok_per_s'} <= train[0].keys()
    assert {'model', 'optimizer', 'config', 'iter', 'rng', 'data', 'best', 'model_args', 'tokenizer'} <= c.keys() and c['iter'] == 6
    loaded, tok = load_model(str(world / 'out-sft'))
    assert tok == 'byte' and torch.equal(loaded.wte.weight, c['model']['wte.weight'])
    assert os.path.exists(world / 'out-sft/ckpt_best.pt')


def test_reward_report_and_normalisation(world):
    report, c = json.load(open(world / 'out-reward/report.json')), ckpt(world / 'out-reward')
    assert report['accuracy_95'][0] <= report['accuracy'] <= report['accuracy_95'][1] and 0 <= report['ece'] <= 1
    assert sum(report['histogram']['chosen']) == report['pairs'] == sum(r[2] for r in report['reliability'])
    assert c['model_args']['reward_bias'] != 0 and not torch.equal(c['raw_score'], c['model']['score.weight'])
    rm, _ = load_model(str(world / 'out-reward'), head='scalar')
    rm.save_pretrained(str(world / 'rm-hf'))
    again, _ = load_model(str(world / 'rm-hf'), head='scalar')
    idx = torch.randint(0, 257, (1, 9))
    assert torch.equal(rm(idx)[0], again(idx)[0])


def test_gain_and_bias_give_mean_0_and_std_1(world, tmp_path):
    out = run('reward.py', '--dataset=pref.jsonl', f'--out_dir={tmp_path}/rm', '--max_iters=2', '--batch_size=8', '--normalize=responses', '--device=cpu', cwd=world)
    line = next(x for x in out.splitlines() if x.startswith('normalised'))
    assert 'have mean 0.0000 and std 1.0000' in line.replace('-0.0000', '0.0000')


def test_ppo_checks_its_invariant_and_logs(world, tmp_path):
    out = run('ppo.py', '--dataset=prompts.jsonl', '--batch_size=8', '--minibatch_size=4', '--max_new_tokens=6', '--max_iters=2', '--eval_interval=1', '--eval_iters=4',
              '--target_kl=1.0', '--whiten_rewards', '--kl_kind=k3', '--entropy_coef=0.01', '--kl_stop=5.0', f'--out_dir={tmp_path}/ppo', '--device=cpu', cwd=world)
    assert 'max |ratio - 1| = 0.0e+00, approx KL = 0.0e+00' in out
    train = [r for r in rows(tmp_path / 'ppo') if r['split'] == 'train']
    assert len(train) == 2 and {'score', 'kl', 'clip_frac', 'approx_kl', 'mismatch', 'entropy', 'explained', 'len', 'beta', 'vf', 'pg'} <= train[0].keys()
    assert train[0]['kl'] == 0 and train[0]['mismatch'] < 1e-4 and train[0]['ratio_max'] > 0
    assert len([json.loads(x) for x in open(tmp_path / 'ppo/samples.jsonl')]) == 3 * 3  # evaluations at 0, 1, 2 of the three prompts kept aside
    c = ckpt(tmp_path / 'ppo')
    assert c['value_kind'] == 'reward' and 'score.weight' in c['value']


@pytest.mark.parametrize('value', ['trunk', 'policy'])
def test_ppo_with_a_reward_file_and_other_value_networks(world, tmp_path, value):
    run('ppo.py', '--dataset=prompts.jsonl', '--reward=reward.py', f'--value={value}', '--batch_size=8', '--minibatch_size=8', '--max_new_tokens=6', '--max_iters=2',
        '--eval_interval=2', '--eval_iters=4', '--missing_eos=penalty', f'--out_dir={tmp_path}/ppo', '--device=cpu', cwd=world)
    c = ckpt(tmp_path / 'ppo')
    assert c['value_kind'] == value and all(v.isfinite().all() for v in c['value'].values())


CASES = {
    'sft': ('sft.py', ['--dataset=sft.jsonl', '--batch_size=8', '--eval_interval=3', *TINY]),
    'reward': ('reward.py', ['--dataset=pref.jsonl', '--batch_size=8', '--eval_interval=3', '--normalize=responses', '--device=cpu']),
    'ppo': ('ppo.py', ['--dataset=prompts.jsonl', '--batch_size=8', '--minibatch_size=4', '--max_new_tokens=6', '--eval_interval=3', '--eval_iters=4', '--target_kl=1.0', '--device=cpu']),
}


@pytest.mark.parametrize('stage', CASES)
def test_kill_and_resume_is_bit_exact(world, tmp_path, stage):
    """Run A is left alone; run B gets kill -9 some time after its checkpoint at iteration 3, is resumed, killed never again."""
    script, args = CASES[stage]
    n = 12 if stage != 'ppo' else 9
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(run, script, *args, f'--max_iters={n}', f'--out_dir={tmp_path}/a', cwd=world)
        argv, kw = command(script, *args, f'--max_iters={n}', f'--out_dir={tmp_path}/b', cwd=world)
        p = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **kw)
        until = time.time() + 200
        while p.poll() is None and time.time() < until:
            try:
                if any(json.loads(x)['step'] >= 4 for x in open(tmp_path / 'b/log.jsonl')):
                    break
            except (OSError, ValueError):
                time.sleep(0.001)
        p.send_signal(signal.SIGKILL)
        p.wait()
        assert ckpt(tmp_path / 'b')['iter'] in (3, 6, 9, 12)
        whole.result()
    run(script, *args, f'--max_iters={n}', f'--out_dir={tmp_path}/b', '--init_from=resume', cwd=world)
    a, b = ckpt(tmp_path / 'a'), ckpt(tmp_path / 'b')
    assert all(equal(a[k], b[k]) for k in ('model', 'optimizer', 'iter', 'rng', 'data', 'best')), stage
    assert equal(a.get('value'), b.get('value')) and timeless(tmp_path / 'a')[1:] == timeless(tmp_path / 'b')[1:]


def test_mistakes_are_one_line_and_exit_code_2(world, tmp_path):
    """Every mistake of the list: exit code 2, one line that says what to do, the user's files as they were."""
    (tmp_path / 'empty.jsonl').write_text('')
    (tmp_path / 'broken.jsonl').write_text('{"messages": []}\n{"messages": [}\n')
    (tmp_path / 'odd.jsonl').write_text('{"question": "x"}\n')
    (tmp_path / 'long.jsonl').write_text(json.dumps(dict(prompt='x' * 200)) + '\n' + json.dumps(dict(prompt='y')) + '\n')
    (tmp_path / 'half.jsonl').write_text(json.dumps(dict(prompt='x', chosen='y')) + '\n')
    (tmp_path / 'same.jsonl').write_text(json.dumps(dict(prompt='x', chosen='y', rejected='y')) + '\n')
    (tmp_path / 'nan.py').write_text('def reward(prompt, completion, row):\n    return float("nan")\n')
    hf = tmp_path / 'hf'
    M.GPT(M.GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=96)).save_pretrained(str(hf))
    cut = tmp_path / 'cut'
    M.GPT(M.GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=300, block_size=96)).save_pretrained(str(cut))
    (cut / 'model.safetensors').write_bytes((cut / 'model.safetensors').read_bytes()[:-5])
    before = {p: p.read_bytes() for p in [*world.glob('out-*/*'), *world.glob('*.jsonl')]}
    ppo = ['--batch_size=4', '--minibatch_size=4', '--max_new_tokens=4', '--max_iters=1', f'--out_dir={tmp_path}/o', '--device=cpu']
    cases = [
        ('sft.py', ['--learnign_rate=1'], 'did you mean'),
        ('sft.py', ['--max_iters=x'], 'wants int'),
        ('sft.py', ['--dataset=nothere/x.jsonl'], 'nothere/prepare.py makes it'),
        ('sft.py', [f'--dataset={tmp_path}/empty.jsonl', f'--out_dir={tmp_path}/o'], 'empty'),
        ('sft.py', [f'--dataset={tmp_path}/broken.jsonl', f'--out_dir={tmp_path}/o'], ':2'),
        ('sft.py', [f'--dataset={tmp_path}/odd.jsonl', f'--val_dataset={tmp_path}/odd.jsonl', f'--out_dir={tmp_path}/o'], 'row 1'),
        ('sft.py', ['--dataset=sft.jsonl'], 'already holds a run'),
        ('sft.py', ['--dataset=sft.jsonl', '--init_from=resume', '--out_dir=out-reward'], 'is a run of reward.py'),
        ('sft.py', ['--dataset=sft.jsonl', f'--init_from={cut}', '--tokenizer=byte', f'--out_dir={tmp_path}/o'], 'not a sound safetensors file'),
        ('sft.py', ['--dataset=sft.jsonl', f'--init_from={hf}', '--tokenizer=byte', f'--out_dir={tmp_path}/o'], 'has 257 tokens, the model 11'),
        ('sft.py', ['--dataset=sft.jsonl', f'--out_dir={tmp_path}/nan', '--learning_rate=1e30', '--max_iters=9', '--grad_clip=0.0', '--warmup_iters=0', *TINY], 'last good checkpoint'),
        ('sft.py', ['--dataset=sft.jsonl', '--out_dir=/proc/nowhere', *TINY], '/proc/nowhere'),
        ('reward.py', [f'--dataset={tmp_path}/half.jsonl', f'--val_dataset={tmp_path}/half.jsonl', f'--out_dir={tmp_path}/o'], 'rejected'),
        ('reward.py', [f'--dataset={tmp_path}/same.jsonl', f'--val_dataset={tmp_path}/same.jsonl', f'--out_dir={tmp_path}/o'], 'equal'),
        ('reward.py', ['--dataset=pref.jsonl', '--init_from=out-none', f'--out_dir={tmp_path}/o'], 'run the stage that writes it first'),
        ('ppo.py', ['--dataset=prompts.jsonl', '--reward=out-none', *ppo], 'run the stage that writes it first'),
        ('ppo.py', [f'--dataset={tmp_path}/long.jsonl', f'--val_dataset=prompts.jsonl', *ppo], 'prompt of 200 tokens'),
        ('ppo.py', ['--dataset=prompts.jsonl', *ppo, '--minibatch_size=3'], 'set --minibatch_size to one of [1, 2, 4]'),
        ('ppo.py', ['--dataset=prompts.jsonl', f'--reward={tmp_path}/nan.py', *ppo], 'must be finite'),
    ]

    def one(case):
        script, args, says = case
        err = run(script, *args, cwd=world, rc=2)
        return None if says in err and err.startswith('error: ') and err.strip().count('\n') == 0 else (case, err)
    with ThreadPoolExecutor(2) as pool:
        wrong = [w for w in pool.map(one, cases) if w]
    assert not wrong, wrong
    assert {p: p.read_bytes() for p in before} == before


def test_pretraining_on_token_files_and_eval_only(world, tmp_path):
    import numpy as np
    text = 'to be or not to be, that is the question. ' * 60
    chars = sorted(set(text))
    ids = np.array([chars.index(c) for c in text], dtype=np.uint16)
    ids[:2000].tofile(tmp_path / 'train.bin')
    ids[2000:].tofile(tmp_path / 'val.bin')
    (tmp_path / 'meta.json').write_text(json.dumps(dict(vocab_size=len(chars), chars=chars)))
    args = [f'--dataset={tmp_path}', f'--out_dir={tmp_path}/out', '--n_layer=1', '--n_head=2', '--n_embd=32', '--block_size=32', '--batch_size=8', '--device=cpu']
    run('sft.py', *args, '--max_iters=40', '--eval_interval=20', '--eval_iters=2', '--warmup_iters=2', '--learning_rate=1e-2', cwd=tmp_path)
    loss = {r['step']: r['loss'] for r in rows(tmp_path / 'out') if r['split'] == 'eval'}
    assert loss[40] < 2.3 < loss[0]
    out = run('sft.py', *args, '--init_from=resume', '--eval_only', '--eval_iters=2', cwd=tmp_path)
    assert f'val loss {loss[40]:.4f}' in out
