"""app.py without a browser: paths, half-written files, commands, real runs, labels, tokens, pictures."""
import json
import math
import os
import shlex
import subprocess
import sys
import threading
import time
from dataclasses import asdict

import pytest
import torch
from helpers import Judge, jsonl

import app
from data import labels
from experiments import dashboard as board
from failures import gallery
from model import GPT, GPTConfig


def write(path, *rows, mode='w'):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, mode, encoding='utf-8') as f:
        f.writelines((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows)


def text(path):
    with open(path, encoding='utf-8') as f:
        return f.read()


def shape(layers=1, width=32, block=96):
    return GPTConfig.of('gpt2', n_layer=layers, n_head=2, n_embd=width, vocab_size=257, block_size=block)


def tiny(path, head='lm', stage='sft', seed=0, lora=None, more=(), **sizes):
    """A checkpoint of a random byte model, as the stages write it."""
    torch.manual_seed(seed)
    config = shape(**sizes)
    os.makedirs(path, exist_ok=True)
    how = dict(stage=stage, gamma=1.0, lam=0.95, kl_kind='k1', temperature=1.0)
    torch.save(dict(model=GPT(config, head).state_dict(), model_args=asdict(config), lora=lora,
                    tokenizer='byte', iter=1, config=how, **dict(more)), os.path.join(path, 'ckpt.pt'))


def wait_for(test, seconds=120):
    end = time.time() + seconds
    while time.time() < end:
        if test():
            return True
        threading.Event().wait(0.1)
    return False


def config_row(stage='sft', **more):
    return dict(step=0, time=0.0, split='config', stage=stage, **more)


def row(step, split='train', **more):
    return dict(step=step, time=float(step), split=split, **more)


def refused(words, fn, *args, **keys):
    with pytest.raises(ValueError, match=words):
        fn(*args, **keys)


# ---- the folder
def test_paths_stay_inside(tmp_path):
    root = tmp_path / 'root'
    (root / 'a').mkdir(parents=True)
    (tmp_path / 'root2').mkdir()
    os.symlink(tmp_path / 'root2', root / 'link')
    assert app.inside(root, 'a/../a/x') == str(root.resolve() / 'a' / 'x')
    for bad in ('..', '../root2', '/etc/passwd', 'link', 'link/x', 'a/../../root2', '\0'):
        refused('outside|null', app.inside, root, bad)


def test_a_link_out_of_the_folder_is_neither_read_nor_written_through(tmp_path):
    root, out = tmp_path / 'root', tmp_path / 'elsewhere'
    write(out / 'secret.txt', 'done: secret')
    write(out / 'log.jsonl', row(1, loss=1.0))
    tiny(out / 'model')
    os.rename(out / 'model' / 'ckpt.pt', out / 'model.pt')
    links = {'rows.jsonl': 'secret.txt', 'annotations/mine.jsonl': 'secret.txt',
             'out-a/log.jsonl': 'log.jsonl', 'out-a/console.txt': 'secret.txt', 'out-a/ckpt.pt': 'model.pt'}
    for name, target in links.items():
        os.makedirs((root / name).parent, exist_ok=True)
        os.symlink(out / target, root / name)
    run = app.RunFolder(root, 'out-a')
    assert (run.console, run.rows, run.state) == ('', [], 'empty') and app.find_models(root) == {}
    for act, arg in ((app.opened, 'out-a'), (app.RunFolder, '../elsewhere'), (app.journal_of, 'mine'),
                     (app.keep_upload, root / 'rows.jsonl'), (app.keep_upload, out / 'log.jsonl')):
        refused('outside the folder', act, root, arg)
    job = 'sft', '', dict(out_dir='out-a')
    refused('outside the folder', app.launch, root, 'Train', job, asked=True)
    assert text(out / 'secret.txt') == 'done: secret\n'
    write(root / 'out-b' / 'log.jsonl', row(1))
    os.symlink(root / 'out-b' / 'log.jsonl', root / 'rows.txt')
    assert board.kept(root, 'rows.txt') == str(root / 'out-b' / 'log.jsonl')  # stays inside: a file


def test_a_growing_log_is_read_from_where_it_ended(tmp_path):
    path = str(tmp_path / 'log.jsonl')
    def add(words, mode='a'):
        with open(path, mode, encoding='utf-8') as f:
            f.write(words)
        return labels.read_rows(path)

    lines = [json.dumps(dict(step=i)) + '\n' for i in range(9)]
    assert labels.read_rows(path) == ([], 0)
    assert add(lines[0] + lines[1][:5]) == ([dict(step=0)], 1)  # half a line: not read yet
    assert add(lines[1][5:] + 'rubbish\n[1]\nnull\n') == ([dict(step=0), dict(step=1)], 3) == add('')
    assert [r['step'] for r in add(lines[2])[0]] == [0, 1, 2]
    write(path + '.tmp', lines[0].strip(), *[lines[7].strip()] * 30)
    os.replace(path + '.tmp', path)  # as a resumed run does
    assert add('')[0][:2] == [dict(step=0), dict(step=7)] and add('')[1] == 0
    assert add(lines[8], 'w') == ([dict(step=8)], 0)


ENDED = [config_row(max_iters=2), row(0, loss=1.0), row(2, 'eval', loss=1.0)]


@pytest.mark.parametrize('rows, console, state, note', [
    (ENDED, [], 'finished', ''),
    (ENDED[:2], [], 'incomplete', 'ends at iteration 0 of 2'),
    (ENDED[:2], ['$ python sft.py', 'error: batch_size 3 is odd'], 'crashed', 'error: batch_size 3 is odd'),
    (ENDED[:2], ['$ python sft.py', 'stopped after iteration 0, which'], 'stopped', 'stopped at iteration 0'),
    (ENDED[:2], ['$ python sft.py', 'Traceback (most', 'KeyboardInterrupt'], 'stopped', 'stopped at'),
    (ENDED[:2], ['$ python sft.py', 'error: no', '$ python sft.py', 'iter 0/2'], 'incomplete', 'ends at'),
    ([config_row(max_iters=0), row(3)], ['9 pairs, 1 held out; 12 iterations of 4'], 'incomplete', 'of 12'),
    (['half a li'], [], 'empty', 'no row that can be read'),
    ([], ['$ python sft.py'], 'empty', 'no row that can be read'),
])
def test_states_of_a_run(tmp_path, rows, console, state, note):
    write(tmp_path / 'r' / 'log.jsonl', *rows)
    write(tmp_path / 'r' / 'run.json', dict(pid=os.getpid()))  # an id that went to another process since
    if console:
        write(tmp_path / 'r' / 'console.txt', *console)
    for clock in (time.time(), 1, time.time() + 86400):  # a log of tomorrow is no running one
        os.utime(tmp_path / 'r' / 'log.jsonl', (clock, clock))
        run = app.RunFolder(tmp_path, 'r')
        assert run.state == state and note in run.note
    lock = app.files.locked(str(tmp_path / 'r' / '.lock'))  # as run.py holds it
    run = app.RunFolder(tmp_path, 'r')
    assert (run.state, run.note) == ('running', 'started elsewhere')
    refused('no running process that this app started', app.stop, tmp_path, 'r')
    lock.close()
    assert app.RunFolder(tmp_path, 'r').state == state


def test_models_found_loaded_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny('out-sft')
    tiny('deep/out-reward', 'scalar', 'reward')
    tiny('out-lora', lora=dict(base='/etc'))
    write('out-bad/ckpt.pt', 'half a file')
    GPT(shape()).save_pretrained('hf')
    assert app.find_models('.') == {'deep/out-reward': 'reward', 'hf': 'lm', 'out-bad': 'broken',
                                    'out-lora': 'lm', 'out-sft': 'lm'}
    first = app.opened('.', 'out-sft')
    assert app.opened('.', 'out-sft') is first
    tiny('out-sft', seed=1)
    os.utime('out-sft/ckpt.pt', (5, 5))
    assert app.opened('.', 'out-sft') is not first  # written anew: read anew
    for bad, words in (('', 'no model'), ('../x', 'no model'), ('/etc', 'outside'), ('out-lora', 'outside'),
                       ('out-bad', 'not a checkpoint of ours'), ('<b>', 'no model')):
        refused(words, app.opened, '.', bad)
    refused('no value network', app.opened, '.', 'out-sft', 'value')


# ---- forms, commands, runs
@pytest.mark.parametrize('stage', app.STAGES)
def test_form_is_the_scripts_own_help(stage):
    script = os.path.join(app.HERE, f'{stage}.py')
    told = subprocess.run([sys.executable, script, '--help'], capture_output=True, text=True).stdout
    form = app.script_form(stage)
    assert len({group for group, *_ in form}) >= 4
    lines = [f'  --{key}={default!r}' + (f'   # {note}' if note else '') for _, key, default, note in form]
    assert lines == told.split('config keys:\n')[1].splitlines()
    for name in app.configs_for(app.HERE, stage):
        assert set(app.settings(app.HERE, stage, name)) == {key for _, key, _, _ in form}


def test_command_leaves_out_what_is_so_anyway_and_keeps_paths_inside(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', '/elsewhere')
    argv = app.command(tmp_path, 'sft', 'config/sft_toy.py', max_iters='7', compile=False)
    assert app.shown(argv) == 'python sft.py config/sft_toy.py --max_iters=7'
    for bad in ('/etc/passwd', 'char:/etc/passwd', '../x', 'a/../../b', 'wandb,/tmp/evil.py', '~/rows.jsonl',
                'char:~/meta.json'):
        refused('outside', app.command, tmp_path, 'sft', dataset=bad)
    refused('no config', app.command, tmp_path, 'sft', '../../etc/x.py')
    refused('no stage', app.command, tmp_path, 'os; rm')
    odd = app.command(tmp_path, 'sft', dataset='a; touch x $(y).jsonl')
    assert odd[-1] == '--dataset=a; touch x $(y).jsonl'  # one argument, no shell reads it
    write(tmp_path / 'config' / 'mine.py', '# python sft.py config/mine.py', 'warmup_iters = max_iters // 10')
    assert app.settings(tmp_path, 'sft', 'config/mine.py')['warmup_iters'] == 100
    assert app.shown(app.command(tmp_path, 'sft', 'config/mine.py')) == 'python sft.py config/mine.py'
    write(tmp_path / 'config' / 'bad.py', '# python sft.py config/bad.py', 'max_iters = 1 / 0')
    refused('config/bad.py does not run: ZeroDivisionError', app.settings, tmp_path, 'sft', 'config/bad.py')


def test_folders_that_a_run_may_write(tmp_path):
    """Whose run a folder holds stands in its run.json; nothing else is written over unasked."""
    made = dict(by='Finetune', stage='sft', keys=dict(dataset='a.jsonl', max_iters=2))
    for name, info, config in (
            ('hand', {}, {}), ('mine', made, made['keys']), ('train', dict(made, by='Train'), made['keys']),
            ('again', made, dict(dataset='a.jsonl', max_iters=9)), ('saved-nothing', {}, None)):
        write(tmp_path / name / 'log.jsonl', config_row(**(config or {})))
        write(tmp_path / name / 'run.json', info)
        if config is not None:
            tiny(tmp_path / name)
    tiny(tmp_path / 'adapted', lora=dict(base='mine'))
    write(tmp_path / 'data' / 'rows.jsonl', dict(prompt='a'))
    def claim(out, base='base', tab='Finetune', asked=False):
        return app.claim(tmp_path, tab, out, [base], asked).path == str(tmp_path / out.removeprefix('./'))
    assert claim('new') and claim('mine') and claim('./mine') and claim('saved-nothing')
    assert claim('hand', asked=True)
    for out in ('hand', 'train', 'again', './hand'):  # again: by hand since, with other settings
        refused('already holds a run', claim, out)
    refused('already holds a run', claim, 'mine', tab='Refit')
    for out, base in (('mine', 'mine'), ('./mine', 'mine'), ('mine', './mine'), ('mine', 'adapted')):
        refused('is read by this run', claim, out, base)
    refused('holds files, but no run', claim, 'data')
    refused('a folder of its own', claim, '.')
    lock = app.files.locked(str(tmp_path / 'mine' / '.lock'))
    refused('right now', claim, 'mine')
    lock.close()


SMALL = dict(dataset='rows.jsonl', tokenizer='byte', n_layer='1', n_head='2', n_embd='32', block_size='64',
             batch_size='4', eval_interval='5', eval_iters='1', warmup_iters='0', device='cpu', threads='1')


def toy_rows(folder, n=64):
    jsonl(folder / 'rows.jsonl', [dict(prompt=f'Q: {i}?\nA: ', completion=f'it is {i}.') for i in range(n)])


def test_a_real_run_started_stopped_resumed_and_crashes(tmp_path):
    toy_rows(tmp_path)
    def start(out, **more):
        app.launch(tmp_path, 'Train', ('sft', '', dict(SMALL, out_dir=out, **more)))
        return app.RunFolder(tmp_path, out)
    def ends_as(out, state):
        return wait_for(lambda: app.RunFolder(tmp_path, out).state == state)
    assert start('out-a', max_iters='100000').state == 'running'
    refused('right now', start, 'out-a')
    assert wait_for(lambda: app.RunFolder(tmp_path, 'out-a').last >= 10)
    app.stop(tmp_path, 'out-a')
    stopped = app.RunFolder(tmp_path, 'out-a')
    assert stopped.state == 'stopped' and stopped.info['by'] == 'Train'
    app.resume(tmp_path, 'out-a', stopped.last + 20)
    assert ends_as('out-a', 'finished'), app.RunFolder(tmp_path, 'out-a').console
    run = app.RunFolder(tmp_path, 'out-a')
    assert run.series('loss')[0] == list(range(stopped.last + 20)) and board.memory_of(run).endswith('GB')
    assert '--init_from=resume' in run.console and run.info['keys'] == stopped.info['keys']
    refused('already holds a run', start, 'out-a')
    for out, more, words in (('out-b', dict(dataset='no.jsonl'), 'no.jsonl: no such data'),
                             ('out-c', dict(max_iters='many'), 'max_iters wants int')):  # the script says it
        start(out, **more)
        assert ends_as(out, 'crashed') and words in app.RunFolder(tmp_path, out).note
    refused('does not say what was run', app.resume, tmp_path, 'out-b')


# ---- labels
def filled(tmp_path, n=4):
    journal = app.journal_of(tmp_path, 'mine')
    pairs = journal.append(*[dict(kind='pair', prompt=f'Q{i}', a=f'a{i}', b=f'b{i}') for i in range(n)])
    return journal, [pair['id'] for pair in pairs]


def test_labels_export_ties_skip_edit_undo(tmp_path):
    journal, ids = filled(tmp_path, 5)
    for name, label in zip(ids, ('a', 'b', 'tie', 'skip')):
        assert journal.next('s')['id'] == name
        journal.label(name, label, 'human', person='me')
    journal.label(ids[4], 'edit', 'human', person='me', text='better', of='b')
    assert journal.next('s') is None
    path, n, ties = journal.export()
    assert [json.loads(line) for line in text(path).splitlines()] == [
        dict(prompt='Q0', chosen='a0', rejected='b0'), dict(prompt='Q1', chosen='b1', rejected='a1'),
        dict(prompt='Q4', chosen='better', rejected='b4')]
    assert (n, ties) == (3, 1) and json.loads(text(path.replace('pref', 'ties')))['tie'] is True
    before = text(journal.path)
    assert journal.undo('me')['label'] == 'edit' and journal.next('s')['id'] == ids[4]
    refused('no label of yours', journal.undo, 'other')
    assert text(journal.path).startswith(before)  # an undo is one more row, nothing goes away
    assert app.journal_of(tmp_path, 'mine').undo('me')['label'] == 'skip'  # page loaded anew
    refused('no label', journal.label, ids[0], 'c', 's')
    for bad in ('', '../x', 'a/b', 'a.b', 'a.pref'):
        refused('name', app.journal_of, tmp_path, bad)


def test_two_tabs_get_different_pairs_until_one_goes_away(tmp_path):
    journal, ids = filled(tmp_path, 2)
    shown = [journal.next(tab) for tab in ('one', 'two', 'one', 'three')]
    assert [pair and pair['id'] for pair in shown] == [*ids, ids[0], None]
    journal.leases = {name: ('one', 0) for name in ids}  # the minutes are over
    assert journal.next('three')['id'] == ids[0]


KILLED = '''
import sys; sys.path.insert(0, {here!r})
from data.labels import Journal
journal = Journal({path!r})
ids = list(journal.state()[0])
for i in range(100000):
    print(journal.label(ids[i % len(ids)], 'a', sys.argv[1])['id'], flush=True)
'''


def test_what_was_acknowledged_survives_sigkill_of_two_writers(tmp_path):
    journal, ids = filled(tmp_path)
    journal.label(ids[0], 'a', 's')
    with open(journal.path, 'a', encoding='utf-8') as f:
        f.write('{"kind": "label", "pair": "' + ids[1])  # half a line, as a crash leaves it
    app.journal_of(tmp_path, 'mine').label(ids[2], 'b', 's')
    pairs, marks, broken = journal.state()
    assert len(pairs) == 4 and set(marks) == {ids[0], ids[2]} and broken == 1
    code = KILLED.format(here=app.HERE, path=journal.path)
    writers = [subprocess.Popen([sys.executable, '-c', code, name], stdout=subprocess.PIPE, text=True)
               for name in ('one', 'two')]
    said = [[writer.stdout.readline().strip() for _ in range(20)] for writer in writers]
    for writer in writers:
        writer.kill()
    for lines, writer in zip(said, writers):
        lines += [line.strip() for line in writer.stdout if line.endswith('\n')]
    rows, broken = labels.read_rows(journal.path)
    assert {name for lines in said for name in lines} <= {row['id'] for row in rows}
    assert all(len(lines) >= 20 for lines in said) and broken <= 3


def test_import_keeps_who_was_chosen(tmp_path):
    journal = app.journal_of(tmp_path, 'mine')
    rows = [dict(prompt=f'p{i}', chosen=f'good{i}', rejected=f'bad{i}') for i in range(6)]
    write(tmp_path / 'in.jsonl', *rows)
    assert journal.load(str(tmp_path / 'in.jsonl')) == (6, 6) and journal.preferences() == (rows, [])
    write(tmp_path / 'open.jsonl', dict(prompt='p', a='x', b='y'))
    assert journal.load(str(tmp_path / 'open.jsonl')) == (1, 0) and journal.next('s')['prompt'] == 'p'
    write(tmp_path / 'wrong.jsonl', dict(text='x'))
    refused('row 1: wanted "prompt"', journal.load, str(tmp_path / 'wrong.jsonl'))


def test_pairs_of_models_judge_agreement_and_refit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, (name, *kind) in enumerate((('m1',), ('m2',), ('rm', 'scalar', 'reward'))):
        tiny(name, *kind, seed=seed)
    journal, prompts = app.journal_of('.', 'mine'), [f'Q: {i}?\nA: ' for i in range(12)]
    assert app.make_pairs('.', journal, prompts, ['m1', 'm2'], max_tokens=8, seed=1) == 12
    pairs = journal.state()[0].values()
    assert {pair['model_a'] for pair in pairs} == {'m1', 'm2'}  # random order
    assert all({pair['model_a'], pair['model_b']} == {'m1', 'm2'} for pair in pairs)
    judged = [list(app.judge_all('.', journal, 'rm')) for _ in range(2)]
    assert judged == [[(12, 12, 12)], []]
    judge, marks = app.opened('.', 'rm', 'scalar'), journal.state()[1].values()
    assert app.agreement(judge, journal) == (0, 0)  # its own labels prove nothing
    for i, mark in enumerate([mark for mark in marks if mark['label'] in 'ab'][:5]):
        other = 'ba'['ab'.index(mark['label'])]
        journal.label(mark['pair'], mark['label'] if i < 3 else other, 'human')
    assert app.agreement(judge, journal) == (3, 5)
    score, = app.score_texts(judge, [('ab', 'c')])
    assert abs(score - judge.model(torch.tensor([[97, 98, 99, 256]]))[0][0, -1].item()) < 1e-5
    jobs, outs = app.refit_jobs('.', journal, 'm1', 'ppo', 3)
    assert [job[0] for job in jobs] == ['reward', 'ppo'] and jobs[1][2]['reward'] == outs[0]
    assert outs == ['out-reward-mine', 'out-ppo-mine']
    for out in outs:  # made by hand: Refit does not write over either
        tiny(out)
        refused(f'{out} already holds a run', app.launch, '.', 'Refit', *jobs)
        os.remove(f'{out}/ckpt.pt')
    tiny(outs[1])
    jobs, _ = app.refit_jobs('.', journal, './out-ppo-mine', 'ppo', 3)
    refused('is read by this run', app.launch, '.', 'Refit', *jobs)


def test_labels_of_a_judge_that_goes_away_are_kept_and_a_mute_one_is_given_up(tmp_path):
    journal, ids = filled(tmp_path, 6)
    answers, seen = [*'AB' * 2, 'hmm', 'hmm', *'BA'], []
    gone = 429, dict(error=dict(message='quota used up')), {}
    with Judge(lambda *_: answers.pop(0) if answers else gone) as judge:
        with pytest.raises(ValueError, match='429: quota used up'):
            for step in app.judge_all(None, journal, 'm', judge.url):
                seen.append(step)
        assert seen == [(1, 1, 6), (2, 2, 6), (2, 3, 6), (3, 4, 6)]
        kinds = {name: mark['label'] for name, mark in journal.state()[1].items()}
        assert kinds == {ids[0]: 'a', ids[1]: 'a', ids[3]: 'b'} and journal.next('s')['id'] == ids[2]
        answers[:] = ['I think'] * 99
        refused("expected A, B or TIE, got 'I think' and 'I think' .the third",
                lambda: list(app.judge_all(None, journal, 'm', judge.url)))
    assert len(journal.state()[1]) == 3


# ---- chat, tokens and pictures
def test_a_chat_closed_in_the_middle_leaves_no_request_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ['m1', 'm2']
    for seed, name in enumerate(names):
        tiny(name, seed=seed, block=512)
    monkeypatch.setattr(app.time, 'time', iter(range(10 ** 9)).__next__)  # every step is drawn
    def ask(n):
        return app.chat('.', names, 'hi', [], '', False, 0.0, 1.0, 0, 0.0, 1.0, n, 1)
    talk = ask(400)
    for _ in range(5):
        history = next(talk)
    assert all(app.opened('.', name).engine.has_unfinished() for name in names)
    talk.close()  # as the button Stop and a closed tab do
    assert not any(app.opened('.', name).engine.has_unfinished() for name in names)
    assert all(0 < len(answer['ids']) < 20 for answer in history[-1]['answers'].values())
    *_, history = ask(8)
    assert [len(answer['ids']) for answer in history[-1]['answers'].values()] == [8, 8]
    assert 'cut at the limit' in app.messages_of(history, 'm1')[-1]['content']
    refused('one to four models', lambda: next(app.chat('.', [], 'hi', [], '', False, *[0] * 7)))


def test_token_view_numbers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, (name, *kind) in enumerate((('m',), ('ref',), ('rm', 'scalar', 'reward'))):
        tiny(name, *kind, seed=seed)
    value = GPT(shape(), 'scalar')
    tiny('ppo', stage='ppo', more=dict(value=value.state_dict(), value_kind='policy', beta=0.1))
    m, ref, judge, val = (app.opened('.', *args) for args in (
        ('m',), ('ref',), ('rm', 'scalar'), ('ppo', 'value')))
    p, r = [1, 2, 3], [60, 98, 10]
    rows, idx = app.token_view(m, p, r, ref, judge, val), torch.tensor([p + r])
    def logp(model):
        return model(idx)[0].log_softmax(-1)[0, 2:5].gather(1, torch.tensor(r)[:, None])[:, 0]
    kl, v = logp(m.model) - logp(ref.model), value(idx)[0][0, 2:5]
    for i in range(3):
        for key, want in (('logp', logp(m.model)), ('kl', kl), ('value', v)):
            assert abs(rows[i][key] - want[i]) < 1e-4
    last = -0.1 * kl[2] + judge.model(idx)[0][0, 5] - v[2]  # GAE of the last token by hand
    assert abs(rows[2]['advantage'] - last) < 1e-4
    marks, words = app.tints(rows, 'kl')
    assert [token for token, _ in marks] == ['<', 'b', '⏎\n'] and words.startswith('kl: sum')
    assert max(abs(x) for _, x in marks) == 1
    assert app.tints([dict(text='x', logp=0.0)], 'value') == ([], 'no value: choose the models that it needs')


def test_numbers_of_curves(tmp_path):
    assert board.smooth([1, 3], 0.5) == pytest.approx([1, 7 / 3]) and board.smooth([2, 5], 0) == [2, 5]
    write(tmp_path / 'r' / 'log.jsonl', *[row(s, kl=k, score=v) for s, k, v in (
        (0, 3.0, 1.0), (1, 1.0, 2.0), (2, 2.0, math.nan), (3, 'x', 1.0))])
    run = app.RunFolder(tmp_path, 'r')
    assert run.series('score') == ([0, 1, 3], [1.0, 2.0, 1.0])
    assert run.series('score', 'kl') == ([1.0, 3.0], [2.0, 1.0])
    assert app.unit('kl') == 'kl nats/seq' and app.unit('entropy') == 'entropy'


def test_report_of_a_hostile_folder_is_one_file_without_markup_of_others(tmp_path):
    pytest.importorskip('matplotlib')
    bad, evil = '<script>alert(1)</script><img src=x onerror=alert(2)>', tmp_path / 'out-p<b>'
    write(evil / 'log.jsonl', config_row('ppo', max_iters=2), '{"half',
          *[row(i, kl=30.0 * i, score=1.0) for i in range(3)])
    write(evil / 'samples.jsonl', *[
        dict(step=step, prompt=f'{i} {bad}', completion=f'w{i} x{i} {bad}' if not step else bad, score=1.0)
        for step in (0, 2) for i in range(9)])
    write(evil / 'console.txt', f'error: {bad}')
    write(tmp_path / 'out-r' / 'log.jsonl', config_row('reward', max_iters=2))
    write(tmp_path / 'out-r' / 'report.json', '{"accuracy": 0.5, "half')
    marks = dict(base=dict(gold=1.0, kl=0.0, reward=0.0), sft=dict(gold=None, kl=0.0, reward=0.0))
    write(tmp_path / 'out' / 'report.json', marks)
    page = text(app.write_report(tmp_path, 'out/report.html'))
    assert '<script' not in page.lower() and '<img' not in page and 'out-p<b>' not in page
    assert 'onerror=alert' in page and '&lt;script&gt;' in page and '<svg' in page and 'http-equiv' in page
    page = page.replace('src=x onerror', '')
    assert not [word for word in ('src=', 'href="http', '@import') if word in page]
    assert '1 broken log lines left out' in page and page.count('Seen in out-p&lt;b&gt;') == 1


@pytest.mark.parametrize('name, there, words', [
    ('out-sft/ckpt.pt', 'weights', 'ends in .html'), ('notes.html', 'mine', 'no report of this app'),
    ('out/empty.html', '', 'no report of this app'), ('../report.html', None, 'outside'),
    ('new/report.html', None, ''), ('old.html', board.REPORT + 'of yesterday', '')])
def test_a_report_takes_a_new_name_or_the_place_of_an_older_one(tmp_path, name, there, words):
    pytest.importorskip('matplotlib')
    if there is not None:
        os.makedirs((tmp_path / name).parent, exist_ok=True)
        (tmp_path / name).write_text(there)
    if words:
        refused(words, app.write_report, tmp_path, name)
        assert there is None or (tmp_path / name).read_text() == there
    else:
        assert 'No runs in this folder yet' in text(app.write_report(tmp_path, name))


def test_exports_and_uploads_take_names_that_are_free(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny('m')
    assert app.export_model('.', 'm') == ['m-export'] and app.export_model('.', 'm') == ['m-export-2']
    ids = torch.arange(20)[None]
    with torch.no_grad():
        gap = GPT.from_pretrained('m-export').eval()(ids)[0] - app.opened('.', 'm').model(ids)[0]
    assert gap.abs().max() < 1e-5
    toy_rows(tmp_path)
    first = app.keep_upload('.', 'rows.jsonl')
    assert app.keep_upload('.', 'rows.jsonl') == first
    toy_rows(tmp_path, 3)
    second = app.keep_upload('.', 'rows.jsonl')  # other rows under the same name
    assert second != first and text(first).count('\n') == 64 and text(second).count('\n') == 3
    copy, page = app.look_over('.', 'rows.jsonl', 'm')
    assert copy == second and 'rows.jsonl: 3 rows' in page and '<span class=on>i</span>' in page
    for bad, words in (('m/ckpt.pt', '.jsonl, .json or .csv is wanted'), (None, 'choose a file')):
        refused(words, app.keep_upload, '.', bad)


def test_odd_values_in_every_file_break_nothing(tmp_path):
    pytest.importorskip('matplotlib')
    odd = [None, True, 'x', '<b>', [], {}, [1], math.nan, -math.inf, 10 ** 400]
    fields = 'step time split score kl len ended loss tokens entropy dead mismatch chosen_logp_change'.split()
    rows = [row(i, split, score=1.0 + i, kl=1.0, len=9.0, ended=0.5, loss=1.0)
            for i in range(2) for split in ('train', 'eval')]
    strange = [dict(rows[i % 4], **{key: value}) for i, key in enumerate(fields) for value in odd]
    sample = dict(step=0, prompt='Q: red?\nA: ', completion='red')
    toy = dict(prompt='Q: red?\nA: ', family='story', want='happy cat')
    mark = dict(id='2', pair='1', label='edit', of='a', text='z')
    for i, value in enumerate(odd):
        out = tmp_path / f'out-{i}'
        write(out / 'log.jsonl', config_row(('ppo', value)[i % 2], max_iters=value), *rows, *strange)
        write(out / 'samples.jsonl', *[dict(sample, score=value, **{'step': s} | {key: value})
                                       for s in (0, 1) for key in ('x', 'step', 'prompt', 'completion')])
        write(out / 'run.json', dict(pid=value, by=value, stage=value, keys=value))
        write(out / 'report.json', dict(accuracy=value, accuracy_95=value, histogram=value))
    write(tmp_path / 'out' / 'report.json', {name: dict(gold=x, kl=x, reward=x) for name, x in zip(
        ('sft', 'ppo', '../../etc', '<b>', 'x/../../..'), odd)})
    write(tmp_path / 'out' / 'samples.jsonl', *[dict(prompt=x, sft=x, ppo='red') for x in (*odd, 'Q: red?')])
    write(tmp_path / 'data' / 'toy' / 'prompts_val.jsonl', *[toy | {key: x} for key in toy for x in odd])
    write(tmp_path / 'annotations' / 'l.jsonl', dict(kind='pair', id='1', prompt='p', a='x', b='y'), *[
        mark | {'kind': kind, key: x} for kind in ('pair', 'label', 'undo') for key in mark for x in odd])
    page = app.dashboard(tmp_path, metrics=('score', 'kl'))
    assert page.count('<tr>') > len(odd) and '<b>out' not in page
    journal = app.journal_of(tmp_path, 'l')
    assert list(journal.state()[0]) == ['1'] and journal.export()[1:] in ((0, 0), (1, 0))
    assert app.pair_html(journal, journal.next('s'))


def test_failures_are_seen_where_they_are_and_only_there(tmp_path):
    names = list(gallery.known())
    def seen(name, stage, rows, said=()):
        write(tmp_path / name / 'log.jsonl', config_row(stage, max_iters=20), *rows)
        write(tmp_path / name / 'samples.jsonl', *[
            dict(step=step, prompt=f'{i}', completion=words.format(i, step), score=step + i)
            for step, words in said for i in range(9)])
        run = app.RunFolder(tmp_path, name)
        return [failure for failure in names if gallery.seen_in(run, failure)]
    course = [row(i, kl=1.0, entropy=0.3 - i / 100, dead=0.2, mismatch=1e-7) for i in range(20)]
    course += [row(0, 'eval', loss=1.0, ended=0.95, len=20.0), row(20, 'eval', loss=0.4, ended=1.0, len=25.0)]
    said = [(step, 'the answer is {0}{1}.<|endoftext|>') for step in (0, 20)]
    assert seen('good', 'grpo', course, said) == []  # the entropy has halved, the answers still differ
    assert seen('one', 'ppo', [row(0, 'eval', ended=0.0, len=9.0, loss=1.0)]) == []  # this is no course
    course = [row(i, kl=2.0 * i, entropy=3 - i / 10, dead=0.7, mismatch=0.05) for i in range(20)]
    course += [row(0, 'eval', loss=1.0, ended=0.9, len=20.0, chosen_logp_change=0.0),
               row(20, 'eval', loss=1.4, ended=0.5, len=90.0, chosen_logp_change=-9.0)]
    assert seen('bad', 'ppo', course, [(0, 'a{0} b{0} c{0}'), (20, 'so it is')]) == names[1:]
    assert names[0] == 'Reward hacking'  # which needs toy prompts
    assert gallery.record([app.RunFolder(tmp_path, 'bad')], tmp_path / 'g.json') == names[1:]
    found = json.loads(text(tmp_path / 'g.json'))
    collapse = found['Mode collapse']
    assert collapse['curves']['different word pairs among all'] == [[0, 20], [1.0, 0.1111]]  # 2 pairs of 18
    assert 'so it is' in collapse['text'] and found['KL runs away']['curves']['kl'][1][:3] == [0.0, 2.0, 4.0]


@pytest.mark.parametrize('name', gallery.known())
def test_a_kept_failure_has_a_command_of_the_scripts(name):
    known = gallery.known()[name]
    _, script, config, *args = shlex.split(known['how'])
    source = text(os.path.join(app.HERE, script))
    stage = script[:-3] if '/' not in script else source.split("run('")[1].split('.py')[0]
    given = dict(arg[2:].split('=') for arg in args)
    assert set(given) <= {key for _, key, _, _ in app.script_form(stage)}
    assert os.path.exists(os.path.join(app.HERE, config)) and given['out_dir'] == known['run']
    for xs, ys in known['curves'].values():
        assert len(xs) == len(ys) > 1 and xs == sorted(xs) and all(map(math.isfinite, ys))
    assert len(known['text']) > 60 and len(known['why']) > 150
    pytest.importorskip('matplotlib')
    assert '<svg' in board.evidence_html(known)


# ---- the command line
@pytest.mark.parametrize('args, words', [
    (['--host=0.0.0.0'], 'want --auth'), (['--share'], 'want --auth'), (['--auth=nobody'], 'user:password'),
    (['--folder=nowhere'], 'no such folder'), (['--prot=1'], "did you mean 'port'"),
    (['--report=app.py'], 'ends in .html'), (['--port={port}'], 'give another --port'),
    (['--port=0'], 'expected in [1, 65535]'), ([], 'pip install -r requirements-app.txt')])
def test_mistakes_at_the_command_line_are_one_line(tmp_path, args, words):
    env = dict(os.environ)
    if not args:  # a machine without gradio
        (tmp_path / 'gradio.py').write_text('raise ImportError("not here")')
        env['PYTHONPATH'] = str(tmp_path)
    elif '{port}' in args[0]:
        pytest.importorskip('gradio')
    with app.socket.create_server(('127.0.0.1', 0)) as taken:
        args = [arg.format(port=taken.getsockname()[1]) for arg in args]
        out = subprocess.run([sys.executable, os.path.join(app.HERE, 'app.py'), *args], capture_output=True,
                             text=True, cwd=tmp_path, env=env)
    assert out.returncode == 2 and words in out.stderr and out.stderr.count('\n') == 1, out.stderr
