"""The evaluation's numbers against enumeration, evaluate.py with a judge of its own, the experiments' table of runs, and the failures' one wrong line."""
import ast
import http.server
import importlib.util
import itertools
import json
import math
import os
import re
import runpy
import statistics
import subprocess
import sys
import threading
import types

import numpy as np
import pytest

from conftest import ROOT

TOY = os.path.join(ROOT, 'data', 'toy')


def load(path):
    spec = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], os.path.join(ROOT, path))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


E, X = load('data/evaluate.py'), load('data/toy/experiments.py')
F = load('data/toy/figures.py')


# ---- the numbers -----------------------------------------------------------------------------------------------------

def test_pass_at_k_is_the_share_of_subsets_with_a_hit():
    for n, c in itertools.product(range(1, 7), range(7)):
        if c <= n:
            for k in range(1, n + 1):
                subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
                assert E.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))
    with pytest.raises(ValueError, match='between 1 and num_samples'):
        E.pass_at_k(4, 1, 5)


def test_majority_vote():
    assert E.vote([0, 0, 1], [True, True, False]) == 1 and E.vote([0, 1], [True, False]) == 0.5 and E.vote([None, None], [False, False]) == 0
    assert E.vote([None, None, 0], [False, False, True]) == 1  # no answer is no vote
    classes, right = [0, 0, 1, 2, 0, 1, None, 2], [True, True, False, False, True, False, False, False]
    for k in (1, 3, 8):  # every subset, by hand
        want = statistics.mean(E.vote([classes[i] for i in s], [right[i] for i in s]) for s in itertools.combinations(range(8), k))
        assert E.maj_at_k(classes, right, k) == pytest.approx(want)
    many = [0] * 12 + [1] * 8
    assert abs(E.maj_at_k(many, [c == 0 for c in many], 5, draws=2000) - E.maj_at_k(many, [c == 0 for c in many], 5, draws=10 ** 6)) < 0.03
    assert E.classes_of(['1/2', '0.5', None, '3'], lambda a, b: eval(a) == eval(b)) == [0, 0, None, 1] and E.classes_of(['a', 'b', 'a'], None) == [0, 1, 0]


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    assert E.interval([0.3], 100) == (0.3, 0.3, 0.3) and E.interval([1, 1, 1], 200) == (1, 1, 1)
    rng, hits = np.random.default_rng(1), 0
    for i in range(200):
        mean, low, high = E.interval(rng.random(60) < 0.4, 400, i)
        assert low <= mean <= high
        hits += low <= 0.4 <= high
    assert 0.88 <= hits / 200 <= 0.99
    x = rng.normal(size=400)
    _, low, high = E.interval(x, 2000)
    assert high - low == pytest.approx(2 * 1.96 * x.std() / 20, rel=0.1)


def test_diversity_and_signs_of_collapse():
    d = E.diversity(['a b', 'a b'])
    assert (d['distinct-1'], d['distinct-2'], d['distinct-3'], d['repeats'], d['same']) == (0.5, 0.5, 0, 0, 1)
    assert E.diversity(['a b c d a b c d', 'x'])['repeats'] == 0.5 and E.diversity([''])['distinct-1'] == 0
    m = X.text_metrics(['a b a b a b', 'Sure! c. Any time!'])
    assert m['distinct2'] == pytest.approx(5 / 8) and m['repeats'] == 0.5 and m['courtesies'] == 1


def test_best_of_n_weights_by_enumeration():
    for total, n in ((3, 2), (6, 1), (6, 4), (7, 7)):
        best = [max(s) for s in itertools.combinations(range(total), n)]
        assert X.best_weights(total, n) == pytest.approx([best.count(i) / len(best) for i in range(total)])


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


# ---- the table of runs, and the failures -----------------------------------------------------------------------------

def keys_of(script):
    head = open(os.path.join(ROOT, script)).read().partition('config_keys =')[0]
    return {n.targets[0].id: ast.literal_eval(n.value) for n in ast.parse(head).body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name) and isinstance(n.value, (ast.Constant, ast.UnaryOp))}


@pytest.mark.parametrize('name', X.RUNS)
def test_every_run_has_keys_of_its_stage_and_runs_that_it_needs(name):
    script, config, keys, needs = X.RUNS[name]
    known = keys_of(f'{X.stage_of(name)}.py')
    assert set(needs) <= set(X.RUNS) and os.path.exists(os.path.join(ROOT, script)) and os.path.exists(os.path.join(ROOT, f'config/{config}.py'))
    for key, value in keys.items():
        assert key in known and (type(value) is type(known[key]) or (type(value) is int and type(known[key]) is float)), key
    assert all(n in X.RUNS for runs in X.QUESTIONS.values() for n in runs)


@pytest.mark.parametrize('name', sorted(f for f in os.listdir(os.path.join(ROOT, 'failures')) if f.endswith('.py') and f != 'stage.py'))
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
    for args, says in ((['z'], 'expected one or more questions'), (['a', '--sead=1'], "unknown option '--sead=1'"), ([], 'expected one or more questions')):
        r = subprocess.run([sys.executable, os.path.join(TOY, 'experiments.py'), *args], capture_output=True, text=True, timeout=60)
        assert r.returncode == 2 and says in r.stderr and r.stderr.count('\n') == 1


# ---- evaluate.py on a tiny model -------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    import torch

    from model import GPT, GPTConfig
    import run
    d = tmp_path_factory.mktemp('eval')
    torch.manual_seed(0)
    for name in ('a', 'b'):
        model = GPT(GPTConfig(arch='gpt2', vocab_size=257, block_size=64, n_layer=1, n_head=2, n_embd=16))
        (d / name).mkdir()
        torch.save(dict(run.checkpoint_keys(model), model=model.state_dict(), tokenizer='byte'), d / name / 'ckpt.pt')
    (d / 'rows.jsonl').write_text(''.join(json.dumps({'prompt': f'Q: {i}\nA: ', 'answer': str(i)}) + '\n' for i in range(6)))
    (d / 'given.jsonl').write_text(''.join(json.dumps({'prompt': f'Q: {i}\nA: ', 'completion': 'short'}) + '\n' for i in range(6)))
    (d / 'long.py').write_text("def extract_answer(text):\n    return str(len(text) % 2)\n\ndef reward(prompt, completion, row):\n    return float(len(completion) % 2 == 1)\n")
    return d


def evaluate(world, *args, code=0):
    r = subprocess.run([sys.executable, os.path.join(ROOT, 'data/evaluate.py'), f'--init_from={world}/a', '--device=cpu', '--bootstrap=50', '--max_new_tokens=8', *args],
                       capture_output=True, text=True, timeout=120, cwd=world, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert r.returncode == code, r.stderr[-1500:]
    return r.stderr if code else json.load(open(world / 'a' / 'eval.json'))


class Judge(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible judge that prefers the longer answer, or (model 'first') whatever stands first."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        asked = body['messages'][0]['content']
        a, b = re.search(r'\[Answer A\]\n(.*?)\n\n\[Answer B\]\n(.*?)\n\nReply', asked, re.S).groups()
        said = 'A' if body['model'] == 'first' or len(a) > len(b) else 'B' if len(a) < len(b) else 'T'
        reply = json.dumps({'choices': [{'message': {'content': f'{said}.'}}]}).encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *args):
        pass


def test_accuracy_perplexity_and_samples(world):
    out = evaluate(world, '--eval_file=rows.jsonl', '--reward=long.py', '--num_samples=4', '--ks=1,2,4', '--temperature=1.0', '--perplexity=given.jsonl')
    rows = [json.loads(line) for line in open(world / 'a' / 'eval.jsonl')]
    right = [[len(t) % 2 == 1 for t in r['completions']] for r in rows]
    assert [[s > 0.5 for s in r['scores']] for r in rows] == right and len(rows) == 6 and all(len(r['completions']) == 4 for r in rows)
    for k in (1, 2, 4):
        want = statistics.mean(statistics.mean(any(s) for s in itertools.combinations(x, k)) for x in right)
        assert out[f'pass@{k}'][0] == pytest.approx(want) and out[f'pass@{k}'][1] <= want <= out[f'pass@{k}'][2]
    assert out['maj@4'][0] == pytest.approx(statistics.mean([1.0 if sum(x) > 2 else 0.5 if sum(x) == 2 else 0.0 for x in right]))
    assert out['nats a token'][0] == pytest.approx(math.log(257), rel=0.1) and out['perplexity'][0] == pytest.approx(math.exp(out['nats a token'][0]))
    assert out['perplexity tokens'] == 6 * len('short' + 'E')  # five letters and the end token


def test_win_rate_by_an_http_judge_in_both_orders(world):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f'--judge=http://127.0.0.1:{server.server_port}/v1'
        out = evaluate(world, '--eval_file=rows.jsonl', '--against=given.jsonl', url, '--temperature=1.0')
        rows = [json.loads(line) for line in open(world / 'a' / 'eval.jsonl')]
        sign = [(len(r['completions'][0].strip()) > 5) - (len(r['completions'][0].strip()) < 5) for r in rows]
        assert out['flipped'] == 0 and out['wins'] + out['ties'] + out['losses'] == pytest.approx(1) and [r['against'] for r in rows] == [['short']] * 6
        assert abs(out['win rate'][0] - (sum(sign) / 12 + 0.5)) < 0.35  # a strip of white space may make a tie of a win
        out = evaluate(world, '--eval_file=rows.jsonl', '--against=given.jsonl', url, '--judge_model=first')
        assert out['ties'] == 1 and out['flipped'] == 1 and out['win rate'] == [0.5, 0.5, 0.5]  # a judge that likes what stands first decides nothing
    finally:
        server.shutdown()


@pytest.mark.parametrize('args, says', [
    ([], 'nothing to evaluate'), (['--eval_file=rows.jsonl', '--reward=long.py', '--ks=1,4'], '--num_samples=4'), (['--eval_file=rows.jsonl', '--num_samples=2'], 'at temperature 0'),
    (['--eval_file=rows.jsonl', '--against=given.jsonl'], 'against without a judge')])
def test_evaluation_mistakes(world, args, says, capsys, monkeypatch):
    for k, v in dict(init_from=str(world / 'a'), eval_file='', num_samples=1, temperature=0.0, against='', judge='', reward='', ks='1', perplexity='').items():
        monkeypatch.setattr(E, k, v)
    for a in args:
        k, _, v = a[2:].partition('=')
        monkeypatch.setattr(E, k, int(v) if k == 'num_samples' else v)
    with pytest.raises(ValueError, match=re.escape(says)):
        E.main()


# ---- the runner, from nothing to a picture ---------------------------------------------------------------------------

@pytest.mark.slow
def test_the_runner_trains_judges_draws_and_skips_what_is_done(tmp_path):
    if not os.path.exists(os.path.join(TOY, 'prompts_test.jsonl')):
        subprocess.run([sys.executable, os.path.join(TOY, 'prepare.py')], check=True, timeout=120)
    command = [sys.executable, os.path.join(TOY, 'experiments.py'), 'a', 'g', f'--out={tmp_path}/o', f'--assets={tmp_path}/assets', '--seeds=5', '--quick=True']
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    first = subprocess.run([*command, '--minutes=0.01'], capture_output=True, text=True, timeout=600, env=env)
    assert first.returncode == 75 and 'the same command goes on' in first.stdout
    whole = subprocess.run(command, capture_output=True, text=True, timeout=900, env=env)
    assert whole.returncode == 0, whole.stderr[-1500:]
    rows = [json.loads(line) for line in open(tmp_path / 'o' / 'results.jsonl')]
    names = [n for q in 'ag' for n in X.QUESTIONS[q]]
    assert sorted(r['name'] for r in rows) == sorted(set(names)) and all(r['cpu_s'] > 0 and 0 <= r['gold'] <= 10 for r in rows)
    for q in 'ag':
        assert os.path.getsize(tmp_path / 'assets' / f'exp_{q}.png') > 5000 and '| --- |' in (tmp_path / 'assets' / f'exp_{q}.md').read_text()
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)
    assert again.returncode == 0 and '$ python' not in again.stdout
