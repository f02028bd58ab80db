"""The experiments' table of runs, their numbers against enumeration, and the failures' one wrong line."""
import ast
import importlib.util
import itertools
import json
import os
import runpy
import subprocess
import sys
import types

import numpy as np
import pytest

from conftest import ROOT

STUDY = os.path.join(ROOT, 'experiments', 'study.py')


def load(path):
    spec = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], os.path.join(ROOT, path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


import figures as F
import runs as X
import study


def test_text_metrics():
    m = X.text_metrics(['a b a b a b', 'Sure! c. Any time!'])
    assert m['distinct2'] == pytest.approx(5 / 8) and m['repeats'] == 0.5 and m['courtesies'] == 1


def test_best_of_n_weights_by_enumeration():
    for total, n in ((3, 2), (6, 1), (6, 4), (7, 7)):
        best = [max(s) for s in itertools.combinations(range(total), n)]
        share = [best.count(i) / len(best) for i in range(total)]
        assert study.best_weights(total, n) == pytest.approx(share)


@pytest.mark.parametrize('form', ['rl', 'bon'])
def test_gao_fit_finds_what_made_the_points(form):
    d = np.linspace(0, 5, 30)
    gain = d * (1.7 - 0.6 * (np.log(np.maximum(d, 1e-9)) if form == 'rl' else d))
    alpha, beta, r2 = F.fit_gao(d, gain, form)
    assert (alpha, beta, r2) == pytest.approx((1.7, 0.6, 1.0), abs=1e-9)


def test_the_block_of_a_markdown_file_is_replaced_alone(tmp_path):
    (tmp_path / 'x.md').write_text('one\n<!-- a -->\nold\n<!-- /a -->\ntwo\n')
    F.insert(str(tmp_path / 'x.md'), 'a', r'new \1')
    F.insert(str(tmp_path / 'x.md'), 'b', 'nowhere')
    assert (tmp_path / 'x.md').read_text() == 'one\n<!-- a -->\nnew \\1\n<!-- /a -->\ntwo\n'


# ---- the table of runs, and the failures ----

def keys_of(script):
    head = open(os.path.join(ROOT, script), encoding='utf-8').read().partition('config_keys =')[0]
    keys = {}
    for n in ast.parse(head).body:
        if isinstance(n, ast.Assign) and isinstance(n.value, (ast.Constant, ast.UnaryOp)):
            keys[n.targets[0].id] = ast.literal_eval(n.value)
    return keys


@pytest.mark.parametrize('name', X.RUNS)
def test_every_run_has_keys_of_its_stage_and_runs_that_it_needs(name):
    script, config, keys, needs = X.RUNS[name]
    known = keys_of(f'{X.stage_of(name)}.py')
    assert set(needs) <= set(X.RUNS)
    assert all(os.path.exists(os.path.join(ROOT, file)) for file in (script, X.config_of(name)))
    for key, value in keys.items():
        assert type(value) is type(known[key]) or (type(value) is int and type(known[key]) is float), key
    assert all(n in X.RUNS for runs in X.QUESTIONS.values() for n in runs)


FILES = os.listdir(os.path.join(ROOT, 'failures'))
MISTAKES = sorted(f for f in FILES if f.endswith('.py') and f not in ('stage.py', 'gallery.py'))


@pytest.mark.parametrize('name', MISTAKES)
def test_a_failure_is_one_wrong_line_of_todays_stage(name, monkeypatch):
    stage, seen = load('failures/stage.py'), []
    monkeypatch.setitem(sys.modules, 'stage', types.SimpleNamespace(run=lambda *a: seen.append(a)))
    runpy.run_path(os.path.join(ROOT, 'failures', name))
    (script, file, *edit), = seen
    wrong, right = stage.broken(file, *edit), open(os.path.join(ROOT, file), encoding='utf-8').read()
    ast.parse(wrong)
    changed = [i for i, (a, b) in enumerate(zip(right.splitlines(), wrong.splitlines())) if a != b]
    assert len(changed) == 1 and len(right.splitlines()) == len(wrong.splitlines())
    with pytest.raises(ValueError, match='bring the failure up to date'):
        stage.broken(script, 'no such line of code', '')


def test_mistakes_of_the_command_line_are_one_line():
    mistakes = (['z'], 'expected questions of a b'), (['a', '--sead=1'], "unknown option '--sead=1'")
    for args, says in mistakes:
        r = subprocess.run([sys.executable, STUDY, *args], capture_output=True, text=True, timeout=60)
        assert r.returncode == 2 and says in r.stderr and r.stderr.count('\n') == 1


@pytest.mark.parametrize('script', ('calculator', 'online', 'students'))
def test_mistakes_in_a_small_experiment_are_one_line(script):
    command = [sys.executable, os.path.join(os.path.dirname(STUDY), f'{script}.py'), '--sedes=1']
    r = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert r.returncode == 2 and "unknown option '--sedes=1'" in r.stderr and r.stderr.count('\n') == 1


def test_a_command_runs_once_and_its_failure_ends_the_program(tmp_path):
    from runs import run_once
    with pytest.raises(SystemExit) as end:
        run_once(str(tmp_path / 'out'), 'evaluate.py', '--no_such_key=1')
    assert end.value.code == 2 and not (tmp_path / 'out' / 'done').exists()
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'done').touch()
    run_once(str(tmp_path / 'out'), 'evaluate.py', '--no_such_key=1')  # it is there: nothing runs


# ---- the runner, from nothing to a picture ----

@pytest.mark.slow
def test_the_runner_trains_judges_draws_and_skips_what_is_done(tmp_path):
    command = [sys.executable, STUDY, 'a', 'g', f'--out={tmp_path}/o', f'--assets={tmp_path}/assets',
               '--seeds=5', '--quick=True']
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    first = subprocess.run([*command, '--minutes=0.01'], capture_output=True, text=True, timeout=600, env=env)
    assert first.returncode == 75 and 'the same command goes on' in first.stdout
    whole = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
    assert whole.returncode == 0, whole.stderr[-1500:]
    rows = [json.loads(line) for line in open(tmp_path / 'o' / 'results.jsonl', encoding='utf-8')]
    names = [n for q in 'ag' for n in X.QUESTIONS[q]]
    assert sorted(r['name'] for r in rows) == sorted(set(names))
    assert all(r['cpu_s'] > 0 and 0 <= r['gold'] <= 10 for r in rows)
    for q in 'ag':
        assert os.path.getsize(tmp_path / 'assets' / f'exp_{q}.png') > 5000
        assert '| --- |' in (tmp_path / 'assets' / f'exp_{q}.md').read_text()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert again.returncode == 0 and '$ python' not in again.stdout
