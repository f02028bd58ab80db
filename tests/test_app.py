"""app.py without a browser: paths, half-written files, forms and commands, real runs started and stopped, the journal, the pictures."""
import http.server
import json
import math
import os
import shlex
import subprocess
import sys
import threading
import time

import pytest
import torch

import app
from model import GPT, GPTConfig
from dataclasses import asdict


def write(path, *rows):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as f:
        f.write('\n'.join(r if isinstance(r, str) else json.dumps(r) for r in rows) + '\n')


def tiny(path, head='lm', stage='sft', seed=0, block=96, layers=1, width=32, **more):
    """A checkpoint of a random byte model, as the stages write it."""
    torch.manual_seed(seed)
    c = GPTConfig.of('gpt2', n_layer=layers, n_head=2, n_embd=width, vocab_size=257, block_size=block)
    os.makedirs(path, exist_ok=True)
    torch.save(dict(model=GPT(c, head).state_dict(), model_args=asdict(c), lora=None, tokenizer='byte', iter=1,
                    config=dict(stage=stage, gamma=1.0, lam=0.95, kl_kind='k1', temperature=1.0), **more), os.path.join(path, 'ckpt.pt'))


def wait_for(test, seconds=90):
    end = time.time() + seconds
    while time.time() < end:
        if test():
            return True
        threading.Event().wait(0.1)
    return False


# ---- the folder


def test_paths_stay_inside(tmp_path):
    root = tmp_path / 'root'
    (root / 'a').mkdir(parents=True)
    (tmp_path / 'root2').mkdir()
    os.symlink(tmp_path / 'root2', root / 'link')
    assert app.inside(root, 'a/../a/x') == str(root.resolve() / 'a' / 'x')
    for bad in ('..', '../root2', '/etc/passwd', 'link', 'link/x', 'a/../../root2', '\0'):
        with pytest.raises(ValueError):
            app.inside(root, bad)


def test_logs_half_written_missing_and_strange(tmp_path):
    write(tmp_path / 'out-x' / 'log.jsonl', dict(step=0, time=0.0, split='config', stage='ppo', max_iters=10), dict(step=0, time=1.0, split='train', kl=1.0),
          'rubbish', '[1, 2]', 'null', dict(step='no', time=1, split='train'), dict(split='train'), '{"step": 1, "ti')
    run = app.run_of(tmp_path, 'out-x')
    assert (run.stage, run.last, run.total, run.broken, len(run.rows)) == ('ppo', 0, 10, 4, 1)
    os.utime(tmp_path / 'out-x' / 'log.jsonl', (1, 1))
    assert app.run_of(tmp_path, 'out-x').state == 'incomplete'
    write(tmp_path / 'out-y' / 'log.jsonl', 'half a li')
    os.utime(tmp_path / 'out-y' / 'log.jsonl', (1, 1))
    assert app.run_of(tmp_path, 'out-y').state == 'empty'
    assert app.run_of(tmp_path, 'nowhere').state == 'empty'
    assert {r.name for r in app.find_runs(tmp_path)} == {'out-x', 'out-y'}


def test_a_link_out_of_the_folder_is_neither_read_nor_written_through(tmp_path):
    root, out = tmp_path / 'root', tmp_path / 'elsewhere'
    row = dict(step=1, time=1.0, split='train', loss=1.0)
    write(out / 'secret.txt', 'done: secret')
    write(out / 'log.jsonl', row)
    tiny(out / 'model')
    for name, target in (('console.txt', 'secret.txt'), ('log.jsonl', 'log.jsonl'), ('report.json', 'secret.txt'), ('ckpt.pt', 'model/ckpt.pt')):
        os.makedirs(root / 'out-a', exist_ok=True)
        os.symlink(out / target, root / 'out-a' / name)
    run = app.run_of(root, 'out-a')
    assert (run.console, run.rows, run.state) == ('', [], 'empty') and app.find_models(root) == {} and 'secret' not in app.live_html(root, 'out-a')
    for act in (lambda: app.Models(root).get('out-a'), lambda: app.launch(root, 'sft', 'out-a', [['true']]), lambda: app.run_of(root, '../elsewhere')):
        with pytest.raises(ValueError, match='outside the folder'):
            act()
    assert (out / 'secret.txt').read_text() == 'done: secret\n'
    os.symlink(out / 'secret.txt', root / 'rows.jsonl')
    os.makedirs(root / 'annotations')
    os.symlink(out / 'secret.txt', root / 'annotations' / 'mine.jsonl')
    for act in (lambda: app.check_upload(root, str(root / 'rows.jsonl'), 'out-a'), lambda: app.Journal(root, 'mine'), lambda: app.check_upload(root, str(out / 'log.jsonl'), 'out-a')):
        with pytest.raises(ValueError, match='outside the folder'):
            act()
    write(root / 'out-b' / 'log.jsonl', row)
    os.symlink(root / 'out-b' / 'log.jsonl', root / 'rows.txt')
    assert app.kept(root, 'rows.txt') == str(root / 'out-b' / 'log.jsonl')  # a link that stays inside is as good as the file


def test_a_growing_log_is_read_from_where_it_ended(tmp_path):
    path = str(tmp_path / 'log.jsonl')
    row = lambda i: json.dumps(dict(step=i)) + '\n'
    add = lambda text: open(path, 'a').write(text)
    assert app.log_rows(path) == ([], 0)
    add(row(0) + row(1)[:5])
    assert app.log_rows(path) == ([dict(step=0)], 1)  # half a line: not read yet
    add(row(1)[5:] + 'rubbish\n')
    assert app.log_rows(path) == ([dict(step=0), dict(step=1)], 1) == app.log_rows(path)
    add(row(2))
    assert [r['step'] for r in app.log_rows(path)[0]] == [0, 1, 2]
    open(path + '.tmp', 'w').write(row(0) + row(7) * 30)
    os.replace(path + '.tmp', path)  # as a resumed run does
    assert app.log_rows(path) == app.read_rows(path) and app.log_rows(path)[0][1] == dict(step=7)
    open(path, 'w').write(row(9))
    assert app.log_rows(path) == ([dict(step=9)], 0)


def test_a_slow_run_of_elsewhere_is_not_taken_for_dead(tmp_path):
    rows = [dict(step=0, time=0.0, split='config', stage='sft', max_iters=9), *[dict(step=i, time=100.0 * i, split='train', loss=1.0) for i in range(3)]]
    write(tmp_path / 'slow' / 'log.jsonl', *rows)
    for ago, state in ((200, 'running'), (400, 'incomplete')):
        os.utime(tmp_path / 'slow' / 'log.jsonl', (time.time() - ago,) * 2)
        assert app.run_of(tmp_path, 'slow').state == state


def test_run_states(tmp_path):
    rows = [dict(step=0, time=0.0, split='config', stage='sft', max_iters=2), dict(step=0, time=1.0, split='train', loss=1.0), dict(step=2, time=2.0, split='eval', loss=1.0)]
    write(tmp_path / 'done' / 'log.jsonl', *rows)
    write(tmp_path / 'dead' / 'log.jsonl', *rows[:2])
    write(tmp_path / 'dead' / 'console.txt', '$ python sft.py', 'error: batch_size 3 is odd')
    write(tmp_path / 'fresh' / 'log.jsonl', *rows[:2])
    assert app.run_of(tmp_path, 'done').state == 'finished'
    dead = app.run_of(tmp_path, 'dead')
    assert dead.state == 'crashed' and dead.note == 'error: batch_size 3 is odd'
    fresh = app.run_of(tmp_path, 'fresh')
    assert fresh.state == 'running' and fresh.note == 'started elsewhere'
    with pytest.raises(ValueError, match='no running process that this app started'):
        app.stop(tmp_path, 'fresh')


def test_a_process_id_that_went_to_another_process_is_never_stopped(tmp_path):
    write(tmp_path / 'r' / 'run.json', dict(pid=os.getpid(), birth='another', stage='sft'))
    with pytest.raises(ValueError, match='no running process'):
        app.stop(tmp_path, 'r')
    assert app.birth(os.getpid()) and not app.birth(2 ** 22 + 1)


def test_models_found_loaded_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny('out-sft')
    tiny('deep/out-reward', 'scalar', 'reward')
    os.makedirs('out-bad')
    open('out-bad/ckpt.pt', 'wb').write(b'half a file')
    GPT(GPTConfig.of('gpt2', n_layer=1, n_head=2, n_embd=16, vocab_size=257, block_size=16)).save_pretrained('hf')
    assert app.find_models('.') == {'deep/out-reward': 'reward', 'hf': 'lm', 'out-bad': 'broken', 'out-sft': 'lm'}
    models = app.Models('.')
    first = models.get('out-sft')
    assert models.get('out-sft') is first
    tiny('out-sft', seed=1)
    os.utime('out-sft/ckpt.pt', (5, 5))
    assert models.get('out-sft') is not first  # written anew: read anew
    for bad, words in (('', 'no model'), ('../x', 'no model'), ('/etc', 'outside'), ('out-bad', 'not a whole checkpoint'), ('out-sft/../..', 'outside|no model'), ('<b>', 'no model')):
        with pytest.raises(ValueError, match=words):
            models.get(bad)
    with pytest.raises(ValueError, match='no value network'):
        models.get('out-sft', 'value')


# ---- forms, commands, runs


@pytest.mark.parametrize('stage', app.STAGES)
def test_form_is_the_scripts_own_help(stage):
    help_ = subprocess.run([sys.executable, os.path.join(app.HERE, f'{stage}.py'), '--help'], capture_output=True, text=True).stdout
    form = app.script_form(stage)
    assert len(form) > 30 and len({g for g, *_ in form}) >= 4
    for group, key, default, note in form:
        assert f'--{key}={default!r}' + (f'   # {note}' if note else '') in help_
    assert app.configs_for(app.HERE, stage)
    for path in app.configs_for(app.HERE, stage).values():
        assert set(app.config_values(path)) <= {key for _, key, _, _ in form}, path


def test_command_leaves_out_what_is_so_anyway_and_refuses(tmp_path):
    argv = app.command(tmp_path, 'sft', 'config/sft_toy.py', dict(max_iters='7', learning_rate=1, out_dir='out-sft', compile=False))
    assert argv[1].endswith('sft.py') and argv[2].endswith('sft_toy.py') and argv[3:] == ['--max_iters=7', '--learning_rate=1.0']
    assert app.shown(argv) == 'python sft.py config/sft_toy.py --max_iters=7 --learning_rate=1.0'
    for bad, words in ((dict(max_itres='7'), "did you mean 'max_iters'"), (dict(max_iters='many'), 'wants int'), (dict(max_iters='1.5'), 'wants int'), (dict(compile='maybe'), 'wants bool'),
                       (dict(dataset='/etc/passwd'), 'outside'), (dict(tokenizer='char:/etc/passwd'), 'outside'), (dict(out_dir='../x'), 'outside'), (dict(out_dir=''), 'out_dir'),
                       (dict(init_from='a/../../b'), 'outside')):
        with pytest.raises(ValueError, match=words):
            app.command(tmp_path, 'sft', '', bad)
    with pytest.raises(ValueError, match='outside'):
        app.command(tmp_path, 'ppo', '', dict(reward='/tmp/evil.py'))
    with pytest.raises(ValueError, match='no config'):
        app.command(tmp_path, 'sft', '../../etc/x.py')
    with pytest.raises(ValueError, match='no stage'):
        app.command(tmp_path, 'os; rm', '')
    odd = app.command(tmp_path, 'sft', '', dict(dataset='a; touch x $(y).jsonl'))
    assert odd[-1] == '--dataset=a; touch x $(y).jsonl'  # one argument, no shell reads it


def toy_rows(tmp_path, n=64):
    write(tmp_path / 'rows.jsonl', *[dict(prompt=f'Q: {i}?\nA: ', completion=f'it is {i}.') for i in range(n)])


SMALL = dict(dataset='rows.jsonl', tokenizer='byte', n_layer='1', n_head='2', n_embd='32', block_size='64', batch_size='4', eval_interval='5', eval_iters='1', warmup_iters='0', device='cpu')


def test_a_real_run_started_stopped_resumed_and_a_crash(tmp_path):
    toy_rows(tmp_path)
    argv = app.command(tmp_path, 'sft', '', dict(SMALL, out_dir='out-a', max_iters='100000'))
    app.launch(tmp_path, 'sft', 'out-a', [argv])
    assert app.run_of(tmp_path, 'out-a').state == 'running'
    with pytest.raises(ValueError, match='right now'):
        app.launch(tmp_path, 'sft', 'out-a', [argv])
    assert wait_for(lambda: app.run_of(tmp_path, 'out-a').last >= 10), app.tail(tmp_path / 'out-a' / 'console.txt')
    app.stop(tmp_path, 'out-a')
    stopped = app.run_of(tmp_path, 'out-a')
    assert stopped.state == 'stopped' and app.birth(stopped.info['pid']) == ''
    again = app.resume_command(tmp_path, 'out-a', stopped.last + 20)
    assert '--init_from=resume' in again and f'--max_iters={stopped.last + 20}' in again
    app.launch(tmp_path, 'sft', 'out-a', [again])
    assert wait_for(lambda: app.run_of(tmp_path, 'out-a').state == 'finished'), app.tail(tmp_path / 'out-a' / 'console.txt')
    steps = app.series(app.run_of(tmp_path, 'out-a'), 'loss')[0]
    assert steps == list(range(stopped.last + 20)) and app.memory_of(tmp_path, 'out-a').endswith('GB')
    app.launch(tmp_path, 'sft', 'out-b', [app.command(tmp_path, 'sft', '', dict(SMALL, out_dir='out-b', dataset='missing.jsonl'))])
    assert wait_for(lambda: app.run_of(tmp_path, 'out-b').state == 'crashed')
    assert 'missing.jsonl: no such data' in app.run_of(tmp_path, 'out-b').note
    with pytest.raises(ValueError, match='does not say what was run'):
        app.resume_command(tmp_path, 'out-b')


# ---- the journal


def filled(tmp_path, n=4):
    j = app.Journal(tmp_path, 'mine')
    pairs = j.append(*[dict(kind='pair', prompt=f'Q{i}', a=f'a{i}', b=f'b{i}', model_a='x', model_b='y') for i in range(n)])
    return j, [p['id'] for p in pairs]


def test_labels_export_ties_skip_edit_undo(tmp_path):
    j, ids = filled(tmp_path, 5)
    for id, label in zip(ids, ('a', 'b', 'tie', 'skip')):
        assert j.next('s')['id'] == id
        j.label(id, label, 's')
    j.label(ids[4], 'edit', 's', text='better', of='b')
    assert j.next('s') is None
    path, n, ties = j.export()
    rows = [json.loads(line) for line in open(path)]
    assert rows == [dict(prompt='Q0', chosen='a0', rejected='b0'), dict(prompt='Q1', chosen='b1', rejected='a1'), dict(prompt='Q4', chosen='better', rejected='b4')]
    assert (n, ties) == (3, 1) and json.loads(open(path.replace('pref', 'ties')).read())['tie'] is True
    before = open(j.path).read()
    assert j.undo('s')['label'] == 'edit' and j.next('s')['id'] == ids[4] and j.undo('other') is None
    assert open(j.path).read().startswith(before)  # an undo is one more row, nothing goes away
    with pytest.raises(ValueError, match='no label'):
        j.label(ids[0], 'c', 's')
    for bad in ('', '../x', 'a/b', 'a.b', None):
        with pytest.raises(ValueError, match='name'):
            app.Journal(tmp_path, bad)


def test_two_tabs_get_different_pairs_until_one_goes_away(tmp_path):
    j, ids = filled(tmp_path, 2)
    assert j.next('one')['id'] == ids[0] and j.next('two')['id'] == ids[1] and j.next('one')['id'] == ids[0] and j.next('three') is None
    j.leases = {i: ('one', 0) for i in ids}  # the minutes are over
    assert j.next('three')['id'] == ids[0]


def test_a_kill_in_the_middle_of_a_write_loses_no_label(tmp_path):
    j, ids = filled(tmp_path)
    j.label(ids[0], 'a', 's')
    with open(j.path, 'a') as f:
        f.write('{"kind": "label", "pair": "' + ids[1])  # half a line, no end
    again = app.Journal(tmp_path, 'mine')
    again.label(ids[2], 'b', 's')
    pairs, labels, broken = again.state()
    assert len(pairs) == 4 and set(labels) == {ids[0], ids[2]} and broken == 1


KILLED = '''
import sys; sys.path.insert(0, {here!r})
import app
j = app.Journal({root!r}, 'mine')
ids = list(j.state()[0])
for i in range(100000):
    print(j.label(ids[i % len(ids)], 'a', sys.argv[1])['id'], flush=True)
'''


def test_what_was_acknowledged_survives_sigkill_of_two_writers(tmp_path):
    j, ids = filled(tmp_path)
    code = KILLED.format(here=app.HERE, root=str(tmp_path))
    writers = [subprocess.Popen([sys.executable, '-c', code, name], stdout=subprocess.PIPE, text=True) for name in ('one', 'two')]
    said = [[w.stdout.readline().strip() for _ in range(20)] for w in writers]
    for w in writers:
        w.kill()
    said = [s + [line.strip() for line in w.stdout if line.endswith('\n')] for s, w in zip(said, writers)]
    rows, broken = app.read_rows(j.path)
    kept = {r['id'] for r in rows}
    assert all(id in kept for s in said for id in s) and all(len(s) >= 20 for s in said) and broken <= 2


def test_import_keeps_who_was_chosen(tmp_path):
    j = app.Journal(tmp_path, 'mine')
    rows = [dict(prompt=f'p{i}', chosen=f'good{i}', rejected=f'bad{i}') for i in range(6)]
    write(tmp_path / 'in.jsonl', *rows)
    assert j.load(str(tmp_path / 'in.jsonl')) == (6, 6) and j.preferences() == (rows, [])
    write(tmp_path / 'open.jsonl', dict(prompt='p', a='x', b='y'))
    assert j.load(str(tmp_path / 'open.jsonl')) == (1, 0) and j.next('s')['prompt'] == 'p'
    write(tmp_path / 'wrong.jsonl', dict(text='x'))
    with pytest.raises(ValueError, match='row 1: wanted "prompt"'):
        j.load(str(tmp_path / 'wrong.jsonl'))


def test_pairs_of_models_judge_and_agreement(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny('m1', seed=1), tiny('m2', seed=2), tiny('rm', 'scalar', 'reward', seed=3)
    models, j = app.Models('.'), app.Journal('.', 'mine')
    prompts = [f'Q: {i}?\nA: ' for i in range(12)]
    assert app.make_pairs(models, j, prompts, ['m1', 'm2'], max_tokens=8, seed=1) == 12
    pairs = j.state()[0].values()
    assert {p['model_a'] for p in pairs} == {'m1', 'm2'} and all({p['model_a'], p['model_b']} == {'m1', 'm2'} for p in pairs)  # random order
    assert list(app.judge_all(models, j, 'rm')) == [(12, 12, 12)] and list(app.judge_all(models, j, 'rm')) == [(0, 0, 0)]
    judge, (_, labels, _) = models.get('rm', 'scalar'), j.state()
    assert app.agreement(judge, j) == (0, 0)  # its own labels prove nothing
    for i, mark in enumerate([m for m in labels.values() if m['label'] in 'ab'][:5]):
        j.label(mark['pair'], mark['label'] if i < 3 else 'ba'['ab'.index(mark['label'])], 'human')
    assert app.agreement(judge, j) == (3, 5)
    text = app.score_texts(models.get('rm', 'scalar'), [('ab', 'c')])
    ids = torch.tensor([[97, 98, 99, 256]])
    assert abs(text[0] - models.get('rm', 'scalar').model(ids)[0][0, -1].item()) < 1e-5
    commands, outs = app.refit_commands('.', j, 'm1', 'ppo', 3, 'mine')
    assert [app.shown(c).split()[1] for c in commands] == ['reward.py', 'ppo.py'] and f'--reward={outs[0]}' in commands[1]


class Endpoint:
    """An OpenAI-compatible endpoint on a free port: reply(question, key) -> (status, object or text); what it was asked is kept in .asked."""

    def __init__(self, reply):
        asked = self.asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
                asked.append((self.path, self.headers.get('Authorization'), body))
                status, said = reply(body['messages'][0]['content'], asked[-1][1])
                said = (said if isinstance(said, str) else json.dumps(said)).encode()
                self.send_response(status)
                self.send_header('Content-Length', str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_):
                pass
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}/v1'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def verdict(text):
    return 200, dict(choices=[dict(message=dict(role='assistant', content=text))])


def prefers(word):
    """A judge that takes the answer with `word` in it."""
    return lambda question, key: verdict('A' if word in question.split('Answer A:')[1].split('Answer B:')[0] else 'B')


def test_labels_of_a_judge_that_goes_away_are_kept_and_a_mute_one_is_given_up(tmp_path):
    j, ids = filled(tmp_path, 6)
    answers = [*'AB' * 2, 'hmm', 'hmm', *'BA']
    end = Endpoint(lambda question, key: verdict(answers.pop(0)) if answers else (429, dict(error=dict(message='quota used up'))))
    seen = []
    with pytest.raises(ValueError, match='429: quota used up'):
        for step in app.judge_all(None, j, 'm', end.url):
            seen.append(step)
    assert seen == [(1, 1, 6), (2, 2, 6), (2, 3, 6), (3, 4, 6)]
    assert {id: m['label'] for id, m in j.state()[1].items()} == {ids[0]: 'a', ids[1]: 'a', ids[3]: 'b'} and j.next('s')['id'] == ids[2]
    answers[:] = ['I think'] * 99
    with pytest.raises(ValueError, match="expected A, B or TIE, got 'I think' and 'I think' .the third"):
        list(app.judge_all(None, j, 'm', end.url))
    assert len(j.state()[1]) == 3
    end.close()


# ---- chat, tokens and pictures


def test_a_chat_closed_in_the_middle_leaves_no_request_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny('m1', seed=1, block=512), tiny('m2', seed=2, block=512)
    models, ask = app.Models('.'), lambda n: app.chat(models, ['m1', 'm2'], 'hi', [], '', False, 0.0, 1.0, 0, 0.0, 1.0, n, 1)
    monkeypatch.setattr(app.time, 'time', iter(range(10 ** 9)).__next__)  # every step is drawn
    talk = ask(400)
    for _ in range(5):
        _, history = next(talk)
    assert all(models.get(n).engine.has_unfinished() for n in ('m1', 'm2'))
    talk.close()  # as the button Stop and a closed tab do
    assert not any(models.get(n).engine.has_unfinished() for n in ('m1', 'm2'))
    assert all(0 < len(a['ids']) < 20 for a in history[-1]['answers'].values())
    *_, (page, history) = ask(8)
    assert [len(a['ids']) for a in history[-1]['answers'].values()] == [8, 8] and page.count('cut at the limit') == 2


def test_token_view_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny('m', seed=1), tiny('ref', seed=2), tiny('rm', 'scalar', 'reward', seed=3)
    value = GPT(GPTConfig.of('gpt2', n_layer=1, n_head=2, n_embd=32, vocab_size=257, block_size=96), 'scalar')
    tiny('ppo', stage='ppo', seed=1, value=value.state_dict(), value_kind='policy', beta=0.1)
    models = app.Models('.')
    m, ref, judge, val = models.get('m'), models.get('ref'), models.get('rm', 'scalar'), models.get('ppo', 'value')
    p, r = [1, 2, 3], [60, 98, 10]
    rows = app.token_view(m, p, r, ref, judge, val)
    idx = torch.tensor([p + r])
    logp = m.model(idx)[0].log_softmax(-1)[0, 2:5].gather(1, torch.tensor(r)[:, None])[:, 0]
    refp = ref.model(idx)[0].log_softmax(-1)[0, 2:5].gather(1, torch.tensor(r)[:, None])[:, 0]
    v, score = value(idx)[0][0, 2:5], judge.model(idx)[0][0, 5].item()
    for i in range(3):
        assert abs(rows[i]['logp'] - logp[i]) < 1e-4 and abs(rows[i]['kl'] - (logp - refp)[i]) < 1e-4 and abs(rows[i]['value'] - v[i]) < 1e-4
    last = -0.1 * (logp - refp)[2] + score - v[2]  # GAE of the last token by hand
    assert abs(rows[2]['advantage'] - last) < 1e-4
    page = app.tokens_html(rows, 'kl')
    assert '&lt;' in page and '<span class=tok title=' in page and 'advantage' in page and '>b</span>' in page
    assert 'choose the models' in app.tokens_html([dict(text='x', logp=0.0)], 'value')


def test_numbers_of_curves():
    assert app.smooth([1, 3], 0.5) == pytest.approx([1, 7 / 3]) and app.smooth([2, 5], 0) == [2, 5]
    run = type('R', (), dict(rows=[dict(step=s, split='train', kl=k, score=v) for s, k, v in ((0, 3.0, 1.0), (1, 1.0, 2.0), (2, 2.0, math.nan), (3, 'x', 1.0))]))
    assert app.series(run, 'score') == ([0, 1, 3], [1.0, 2.0, 1.0]) and app.series(run, 'score', 'kl') == ([1.0, 3.0], [2.0, 1.0])


def test_report_of_a_hostile_folder_is_one_file_without_markup_of_others(tmp_path):
    pytest.importorskip('matplotlib')
    bad = '<script>alert(1)</script><img src=x onerror=alert(2)>'
    os.makedirs(tmp_path / 'out')
    write(tmp_path / 'out-p<b>' / 'log.jsonl', dict(step=0, time=0.0, split='config', stage='ppo', max_iters=2),
          *[dict(step=i, time=float(i), split='train', entropy=3.0 - 1.4 * i, kl=1.0, score=1.0) for i in range(3)], '{"half')
    write(tmp_path / 'out-p<b>' / 'samples.jsonl', *[dict(step=step, prompt=f'{i} {bad}', completion=f'w{i} x{i} {bad}' if not step else bad, score=1.0) for step in (0, 2) for i in range(9)])
    write(tmp_path / 'out-p<b>' / 'console.txt', f'error: {bad}')
    write(tmp_path / 'out-r' / 'log.jsonl', dict(step=0, time=0.0, split='config', stage='reward', max_iters=2))
    write(tmp_path / 'out-r' / 'report.json', '{"accuracy": 0.5, "half')
    write(tmp_path / 'out' / 'report.json', dict(base=dict(gold=1.0, kl=0.0, reward=0.0), sft=dict(gold=None, kl=0.0, reward=0.0)))
    page = open(app.write_report(tmp_path, 'out/report.html')).read()
    assert '<script' not in page.lower() and '<img' not in page and 'onerror=alert' in page and '&lt;script&gt;' in page and 'out-p<b>' not in page
    assert '<svg' in page and 'http-equiv' in page and not [x for x in ('src=', 'href="http', '@import') if x in page.replace('src=x onerror', '')]
    assert '1 broken log lines left out' in page and 'Mode collapse' in page and page.count('Seen in out-p&lt;b&gt;') == 1
    with pytest.raises(ValueError, match='outside'):
        app.write_report(tmp_path, '../report.html')


def test_odd_values_in_every_file_break_nothing(tmp_path):
    pytest.importorskip('matplotlib')
    odd = [None, True, 'x', '<b>', [], {}, [1], math.nan, -math.inf, 10 ** 400]
    rows = [dict(step=i, time=float(i), split=split, score=1.0 + i, kl=1.0, len=9.0, ended=0.5, loss=1.0) for i in range(2) for split in ('train', 'eval')]
    fields = 'step time split score kl len ended loss tokens entropy dead mismatch chosen_logp_change'.split()
    strange = [dict(rows[i % 4], **{k: v}) for i, k in enumerate(fields) for v in odd]
    for i, v in enumerate(odd):
        write(tmp_path / f'out-{i}' / 'log.jsonl', dict(step=0, time=0.0, split='config', stage=('ppo', v)[i % 2], max_iters=v), *rows, *strange)
        write(tmp_path / f'out-{i}' / 'samples.jsonl', *[dict(dict(step=s, prompt='Q: red?\nA: ', completion='red', score=v), **{k: v}) for s in (0, 1) for k in ('x', 'step', 'prompt', 'completion')])
        write(tmp_path / f'out-{i}' / 'run.json', dict(pid=v, birth=v, stage=v, stopped=v))
        write(tmp_path / f'out-{i}' / 'report.json', dict(accuracy=v, accuracy_95=v, histogram=v))
    write(tmp_path / 'out' / 'report.json', {name: dict(gold=v, kl=v, reward=v, seconds=v) for name, v in zip(('sft', 'ppo', '../../etc', '<b>', 'x/../../..'), odd)})
    write(tmp_path / 'out' / 'samples.jsonl', *[dict(prompt=v, sft=v, ppo='red') for v in ('Q: red?\nA: ', *odd)])
    write(tmp_path / 'data' / 'toy' / 'prompts_val.jsonl', *[dict(dict(prompt='Q: red?\nA: ', family='story', want='happy cat'), **{k: v}) for k in ('prompt', 'family', 'want') for v in odd])
    write(tmp_path / 'annotations' / 'l.jsonl', dict(kind='pair', id='1', prompt='p', a='x', b='y'),
          *[dict(dict(kind=kind, id='2', pair='1', label='edit', of='a', text='z'), **{k: v}) for kind in ('pair', 'label', 'undo') for k in ('id', 'pair', 'label', 'of', 'text') for v in odd])
    page = app.dashboard(tmp_path, metrics=('score', 'kl'))
    assert page.count('<tr>') > len(odd) and '<b>out' not in page and all(app.live_html(tmp_path, f'out-{i}', ('score',)) for i in range(len(odd)))
    journal = app.Journal(tmp_path, 'l')
    assert list(journal.state()[0]) == ['1'] and journal.export()[1:] in ((0, 0), (1, 0)) and app.pair_html(journal, journal.next('s'))


def test_failures_are_seen_where_they_are_and_only_there(tmp_path):
    config = lambda stage: dict(step=0, time=0.0, split='config', stage=stage, max_iters=20)
    row = lambda i, split='train', **more: dict(step=i, time=float(i), split=split, **more)
    good = [row(i, kl=1.0, entropy=0.3 - i / 100, dead=0.2, mismatch=1e-7, loss=1.0 - i / 30) for i in range(20)]
    write(tmp_path / 'good' / 'log.jsonl', config('grpo'), *good, row(0, 'eval', loss=1.0, ended=0.95, len=20.0), row(20, 'eval', loss=0.4, ended=1.0, len=25.0))
    write(tmp_path / 'good' / 'samples.jsonl', *[dict(step=s, prompt=f'{i}', completion=f'the answer is {i * (1 + s)}.<|endoftext|>', score=0.0) for s in (0, 20) for i in range(20)])
    run = app.run_of(tmp_path, 'good')
    assert [name for name, _, there, *_ in app.GALLERY if there(run)] == []  # the entropy fell by more than a half, the answers are still different ones
    write(tmp_path / 'one' / 'log.jsonl', config('ppo'), row(0, 'eval', ended=0.0, len=9.0, loss=1.0))
    assert [name for name, _, there, *_ in app.GALLERY if there(app.run_of(tmp_path, 'one'))] == []  # one evaluation is no course
    write(tmp_path / 'bad' / 'log.jsonl', config('ppo'), *[row(i, kl=2.0 * i, entropy=3 - i / 10, dead=0.7, mismatch=0.05, loss=1.0) for i in range(20)],
          row(0, 'eval', loss=1.0, ended=0.9, len=20.0, chosen_logp_change=0.0), row(20, 'eval', loss=1.4, ended=0.5, len=90.0, chosen_logp_change=-9.0))
    write(tmp_path / 'bad' / 'samples.jsonl', *[dict(step=s, prompt=f'{i}', completion=f'a{i} b{i} c{i}' if not s else 'so it is', score=s + i) for s in (0, 20) for i in range(9)])
    names = [name for name, *_ in app.GALLERY]
    assert [name for name, _, there, *_ in app.GALLERY if there(app.run_of(tmp_path, 'bad'))] == names[1:] and names[0] == 'Reward hacking'  # which needs toy prompts
    assert app.write_gallery(tmp_path, 'g.json') == names[1:]
    seen = json.loads((tmp_path / 'g.json').read_text())
    assert seen['Mode collapse']['curves']['different word pairs among all'] == [[0, 20], [1.0, 0.1111]] and 'so it is' in seen['Mode collapse']['text']  # 2 pairs of 18
    assert seen['KL runs away']['curves']['kl'][1][:3] == [0.0, 2.0, 4.0]


def test_the_kept_failures_are_all_there_and_their_commands_are_ones_of_the_scripts():
    kept = json.load(open(os.path.join(app.HERE, 'failures', 'gallery.json')))
    assert list(kept) == [name for name, *_ in app.GALLERY]
    for name, metric, _, why, how in app.GALLERY:
        python, script, config, *args = shlex.split(how)
        source = open(os.path.join(app.HERE, script)).read()
        stage = os.path.basename(script)[:-3] if '/' not in script else source.split("run('")[1].split('.py')[0]
        keys = app.config_values(os.path.join(app.HERE, config)) | dict(a[2:].split('=') for a in args)
        assert python == 'python' and set(keys) <= {key for _, key, _, _ in app.script_form(stage)} and keys['out_dir'] == kept[name]['run'], name
        for label, (xs, ys) in kept[name]['curves'].items():
            assert len(xs) == len(ys) > 1 and xs == sorted(xs) and all(math.isfinite(y) for y in ys), (name, label)
        assert len(kept[name]['text']) > 60 and len(why) > 150
        assert '<svg' in app.evidence_html(kept[name], metric)


def test_report_of_an_empty_folder_says_so(tmp_path):
    pytest.importorskip('matplotlib')
    out = subprocess.run([sys.executable, os.path.join(app.HERE, 'app.py'), f'--folder={tmp_path}', '--report=r.html'], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    page = (tmp_path / 'r.html').read_text()
    assert 'No runs in this folder yet' in page and 'Traceback' not in page


def test_mistakes_at_the_command_line_are_one_line(tmp_path):
    for args, words in ((['--host=0.0.0.0'], 'want --auth'), (['--share'], 'want --auth'), (['--auth=nobody'], 'user:password'), (['--folder=nowhere'], 'no such folder'),
                        (['--prot=1'], "did you mean 'port'")):
        out = subprocess.run([sys.executable, os.path.join(app.HERE, 'app.py'), *args], capture_output=True, text=True, cwd=tmp_path)
        assert out.returncode == 2 and words in out.stderr and out.stderr.count('\n') == 1, out.stderr


def test_without_gradio_one_line_says_what_to_install(tmp_path):
    (tmp_path / 'gradio.py').write_text('raise ImportError("not here")')
    out = subprocess.run([sys.executable, os.path.join(app.HERE, 'app.py')], capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ, PYTHONPATH=str(tmp_path)))
    assert out.returncode == 2 and 'pip install -r requirements-app.txt' in out.stderr and out.stderr.count('\n') == 1, out.stderr
