"""app.py in a real browser: Debian's Chromium (or Playwright's own), driven by Playwright (pytest -m browser). One server, one folder of tiny models; in each of
the five tabs what a person does there, and the doors. APP_SHOTS=DIR keeps a picture of every tab at 1280 and 390 pixels, light and dark."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest

pytest.importorskip('gradio')
pytest.importorskip('matplotlib')
playwright = pytest.importorskip('playwright.sync_api')
from test_app import Endpoint, prefers, tiny, toy_rows, verdict, wait_for, write

import torch

import app
from model import GPT, GPTConfig
from run import load_model

TIMEOUT = 1000 * int(os.environ.get('APP_TIMEOUT', 40))  # ms a page may take to show what was asked; a busy machine needs more
playwright.expect.set_options(timeout=TIMEOUT)
pytestmark = pytest.mark.browser
CHROMIUM = next((p for p in map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome')) if p), None)  # else the one of `playwright install chromium`
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
NAME = 'out-<img src=x onerror=window.hacked=1>'  # a run's folder may be called so
EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'


class Served:
    """The app as a process on a free port; kill() as the power cut does it."""

    def __init__(self, root, *args):
        self.root, self.args = root, args
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.port = s.getsockname()[1]
        self.url = f'http://127.0.0.1:{self.port}/'
        self.start()

    def start(self):
        self.log = open(os.path.join(self.root, 'server.txt'), 'ab')
        begin = lambda: subprocess.Popen([sys.executable, os.path.join(app.HERE, 'app.py'), f'--folder={self.root}', f'--port={self.port}', *self.args], stdout=self.log, stderr=self.log)
        self.process = begin()

        def up():
            if self.process.poll() is not None:  # Gradio asks itself for its first page and gives up after 3 s on a busy machine
                self.process = begin()
            try:
                return urllib.request.urlopen(self.url, timeout=20).status == 200
            except urllib.error.HTTPError as e:
                return e.code == 401  # it is up, and wants a password
            except OSError:
                return False
        assert wait_for(up, 90), open(os.path.join(self.root, 'server.txt')).read()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.log.close()


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    """A folder as quickstart leaves it, in miniature: every checkpoint, three logs, a report of a reward model, samples with hostile text."""
    root = tmp_path_factory.mktemp('folder')
    at = lambda *name: str(root.joinpath(*name))
    for i, name in enumerate(('out-base', 'out-sft', 'out-dpo', 'out-grpo')):
        tiny(at(name), seed=i, block=4096)
    tiny(at('out-slow'), seed=6, block=4096, layers=6, width=384)
    value = GPT(GPTConfig.of('gpt2', n_layer=1, n_head=2, n_embd=32, vocab_size=257, block_size=4096), 'scalar')
    tiny(at('out-ppo'), stage='ppo', seed=4, block=4096, value=value.state_dict(), value_kind='policy', beta=0.1)
    tiny(at('out-reward'), 'scalar', 'reward', seed=5, block=4096)
    write(at('out-ppo', 'log.jsonl'), dict(step=0, time=0.0, split='config', stage='ppo', max_iters=20),
          *[dict(step=i, time=float(i), split='train', score=i / 10, kl=i / 5, entropy=3 / (1 + i), clip_frac=0.1, len=30.0, loss=1.0) for i in range(20)],
          *[dict(step=i, time=float(i), split='eval', score=i / 10, kl=i / 5, len=30.0) for i in (0, 10)], '{"step": 20, "ti')
    write(at('out-ppo', 'samples.jsonl'), *[dict(step=i, prompt=f'Q: {w}?\nA: ', completion=text or f'It is {w}.', score=i / 10)
                                            for i, text in ((0, ''), (10, 'Yes! Yes! Yes!'), (20, EVIL)) for w in ('red', 'blue', 'green', 'red', 'blue')])
    write(at('out-reward', 'log.jsonl'), dict(step=0, time=0.0, split='config', stage='reward', max_iters=2), dict(step=2, time=9.0, split='eval', loss=0.6, accuracy=0.7))
    write(at('out-reward', 'report.json'), dict(accuracy=0.7, accuracy_95=[0.6, 0.8], pairs=100, ece=0.05, length_correlation=0.2, longer_is_chosen=0.6,
                                                 reliability=[[0.5, 0.6, 50, 0.55, 0.5], [0.6, 1.0, 50, 0.8, 0.9]], histogram=dict(edges=[-1, 0, 1], chosen=[40, 60], rejected=[60, 40])))
    write(at('out-dead', 'console.txt'), '$ python sft.py', 'Traceback (most recent call last):', f'RuntimeError: {EVIL}')
    write(at('out-dead', 'log.jsonl'), 'half a l')
    os.utime(at('out-dead', 'log.jsonl'), (1, 1))
    tiny(at(NAME), seed=9)
    write(os.path.join(at(NAME), 'log.jsonl'), dict(step=0, time=0.0, split='config', stage='sft', max_iters=9), dict(step=3, time=1.0, split='train', loss=2.0))
    os.utime(os.path.join(at(NAME), 'log.jsonl'), (2, 2))
    toy_rows(root)
    write(at('config', 'mine.py'), '# tiny rows. python sft.py config/mine.py', *[f'{k} = {v!r}' for k, v in dict(
        out_dir='out-one', init_from='scratch', dataset='rows.jsonl', tokenizer='byte', n_layer=1, n_head=2, n_embd=32, block_size=64, batch_size=4, eval_interval=20, eval_iters=1,
        warmup_iters=0, max_iters=100000, device='cpu').items()])
    questions = [dict(prompt=f'Q: {w}?\nA: ', family='fact', want=w) for w in ('red', 'blue', 'green')]
    write(at('data', 'toy', 'prompts_val.jsonl'), *questions)
    write(at('out', 'report.json'), dict(base=dict(gold=0.7, reward=0.0, kl=56.0, length=76.0, valid=0.0, seconds=150.0), sft=dict(gold=4.7, reward=-0.1, kl=0.0, length=28.0, valid=0.98, seconds=90.0),
                                         ppo=dict(gold=6.5, reward=1.2, kl=2.9, length=39.0, valid=1.0, seconds=100.0)))
    write(at('out', 'samples.jsonl'), *[dict(prompt=q['prompt'], base=EVIL, sft=f"It is {q['want']}.", ppo=f"Sure! It is {q['want']}.") for q in questions])
    write(at('pairs.jsonl'), *[dict(prompt=f'Q: {i} {EVIL}?\nA: ', a=f'first {i} {EVIL}', b=f'second {i}') for i in range(24)])
    write(at('tune.jsonl'), *[dict(messages=[dict(role='user', content=f'say {i}'), dict(role='assistant', content=f'{i}. {EVIL}')]) for i in range(30)])
    write(at('spoiled.jsonl'), dict(prompt='a', completion='b'), dict(prompt='no completion <img src=x onerror=window.hacked=1>'))
    write(at('tune.csv'), 'prompt,completion', *[f'"Q: {i}?\nA: ","it is {i}, <b>yes</b>"' for i in range(30)])
    server = Served(str(root))
    yield server
    server.kill()


@pytest.fixture(scope='module')
def chromium():
    with playwright.sync_playwright() as p:
        if not CHROMIUM and not os.path.exists(p.chromium.executable_path):
            pytest.skip('no Chromium: apt-get install chromium, or playwright install chromium')
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def opened(chromium, served, **more):
    page = chromium.new_page(**{'viewport': dict(width=1280, height=900), **more})
    page.set_default_timeout(TIMEOUT)
    page.goto(served.url)
    page.locator('#chat').wait_for()
    return page


@pytest.fixture(scope='module')
def page(served, chromium):
    """One page for all tests; at the end nothing from a model or a file has run in it, and it asked no other machine for anything."""
    page, outside = opened(chromium, served), []
    page.on('request', lambda r: outside.append(r.url) if '127.0.0.1' not in r.url and not r.url.startswith(('data:', 'blob:')) else None)
    yield page
    assert page.evaluate('window.hacked') is None and outside == []


def tab(page, name):
    found = page.get_by_role('tab', name=name, exact=True)
    if not (found.count() and found.first.is_visible()):  # on a narrow screen the last tabs are in a menu
        page.locator('.overflow-menu button').first.click()
        found = page.locator('.overflow-dropdown button', has_text=name)
    found.first.click()


def choose(page, label, *options):
    box = page.get_by_label(label, exact=True).locator('visible=true').first
    for option in options:
        box.click()
        page.get_by_role('option', name=option, exact=True).click()
    page.keyboard.press('Escape')


def refused(page, words):
    """A message of the app on the page; it is read, then put away."""
    toast = page.locator('.toast-body', has_text=words).first
    toast.wait_for()
    said = toast.inner_text()
    assert 'Traceback' not in said and '&' not in said and page.locator('.toast-body img').count() == 0, said
    page.locator('.toast-close').first.click()
    return said


# ---- chat


WATCH = """() => { window.seen = []; const box = document.querySelector('#chat'); new MutationObserver(() =>
    seen.push([...box.querySelectorAll('.side > div')].map(d => parseInt(d.querySelector('.note')?.innerText || '0')))).observe(box, {subtree: true, childList: true, characterData: true}) }"""


def longest(page, n):
    field, bar = page.get_by_label('number input for tokens at most'), page.get_by_label('range slider for tokens at most')
    field.fill(str(n))
    field.press('Tab')
    playwright.expect(bar).to_have_value(str(n))  # the page has taken it


def test_chat_streams_four_models_side_by_side_and_colours_tokens(page):
    tab(page, 'Chat')
    choose(page, 'Models', 'out-base', 'out-slow')  # all four wait for the slow one: a stream that can be watched
    page.get_by_role('button', name='Sampling').click()
    longest(page, 400)
    page.evaluate(WATCH)
    sent(page, '<script>hacked=1</script>')
    page.locator('#chat .side > div').nth(3).get_by_text('tok/s').wait_for()
    while (n := page.evaluate('window.seen.length')) != (page.wait_for_timeout(600), page.evaluate('window.seen.length'))[1]:
        pass  # until nothing grows any more
    seen = [tuple(counts) for counts in page.evaluate('window.seen') if len(counts) == 4]
    assert len({sum(c) for c in seen}) >= 4 and any(min(c) > 0 and sum(c) < sum(seen[-1]) for c in seen), seen  # all four grow, a little at a time
    assert [h.inner_text() for h in page.locator('#chat h4').all()] == ['out-sft', 'out-ppo', 'out-base', 'out-slow']
    assert '<script>hacked=1</script>' in page.locator('#chat').inner_text() and page.locator('#chat img').count() == 0
    page.get_by_role('button', name='Colour the last answers').click()
    page.locator('#tokens .tok').first.wait_for()
    for key in ('kl', 'reward', 'value', 'advantage'):
        page.get_by_label(key, exact=True).check()
        page.locator('#tokens .note', has_text=f'{key}:').first.wait_for()
    title = page.locator('#tokens .tok').first.get_attribute('title')
    assert all(re.search(rf'^{k} [+-]\d+\.\d{{3}}$', title, re.M) for k in ('logp', 'kl', 'reward', 'value', 'advantage')), title
    tints = {t.get_attribute('style') for t in page.locator('#tokens .tok').all()[:40]}
    assert len(tints) > 5


def sent(page, text):
    page.locator('#message textarea').fill(text)
    page.locator('#message textarea').press('Enter')


def test_chat_stopped_halfway_and_asked_again(page):
    tab(page, 'Chat')
    models = page.get_by_label('Models', exact=True)
    for _ in range(4):
        models.press('Backspace')
    choose(page, 'Models', 'out-slow')
    playwright.expect(page.locator('#chat h4')).to_have_text(['out-slow'])
    page.get_by_role('button', name='New chat').click()
    playwright.expect(page.locator('#chat .bubble')).to_have_count(0)
    heat = page.get_by_label('number input for temperature (0 = greedy)')
    heat.fill('0')  # a greedy random model goes round in circles: it never comes to its end token, and this one needs seconds for 2,000
    longest(page, 2000)
    sent(page, 'count')
    count = lambda: int(page.locator('#chat .note').inner_text().split()[0])
    page.wait_for_function("() => parseInt(document.querySelector('#chat .note')?.innerText) > 0")
    page.locator('#message button.stop-button').click()
    at = None
    while at != count():  # what was on its way when the button was pressed, long on a busy machine
        at = count()
        page.wait_for_timeout(1500)
    assert 0 < at < 2000
    longest(page, 8)
    page.get_by_role('button', name='New chat').click()
    playwright.expect(page.locator('#chat .bubble')).to_have_count(0)
    choose(page, 'Models', 'out-base')
    sent(page, 'again')
    playwright.expect(page.locator('#chat .note', has_text='8 tokens').filter(has_text='cut at the limit')).to_have_count(2)
    assert [bubble.inner_text() for bubble in page.locator('#chat .bubble.user').all()] == ['again'] * 2
    heat.fill('0.7')
    heat.press('Tab')
    page.get_by_role('button', name='Sampling').click()


# ---- train


def line(page):
    """The loss as it is drawn: the path of the first curve."""
    return page.evaluate("""document.querySelector('#live svg.plot path[style*="#2563eb"]')?.getAttribute('d') || ''""")


def test_train_two_runs_at_once_watched_stopped_resumed(page, served):
    tab(page, 'Train')
    assert 'crashed' in page.locator('#runs').inner_text() and NAME in page.locator('#runs').inner_text() and page.locator('#runs img').count() == 0
    choose(page, 'config', 'config/mine.py')
    command = page.locator('#command textarea')
    playwright.expect(command).to_have_value('python sft.py config/mine.py')
    page.locator('#form-max_iters textarea').locator('visible=true').or_(page.get_by_role('button', name='optimizer')).first.click()
    page.locator('#form-max_iters textarea').fill('many')
    playwright.expect(command).to_have_value(re.compile('not yet: max_iters wants int'))
    page.locator('#start').click()
    refused(page, 'max_iters wants int')
    page.locator('#form-max_iters textarea').fill('90000')
    page.locator('#form-out_dir textarea').fill('../outside')
    playwright.expect(command).to_have_value(re.compile('not yet: ../outside is outside the folder'))
    page.locator('#form-out_dir textarea').fill('out-one')
    playwright.expect(command).to_have_value('python sft.py config/mine.py --max_iters=90000')
    page.locator('#start').click()
    page.locator('#live [data-state=running]', has_text='out-one').wait_for()
    playwright.expect(page.locator('#at')).not_to_have_text('0')
    page.locator('#live svg.plot').first.wait_for()
    at, drawn = int(page.locator('#at').inner_text()), line(page)
    page.wait_for_function('at => parseInt(document.querySelector("#at").innerText) > at', arg=at)
    assert line(page) != drawn and drawn  # the curve moves with it
    page.locator('#form-out_dir textarea').fill('out-two')
    playwright.expect(command).to_have_value(re.compile('--out_dir=out-two'))
    page.locator('#start').click()
    page.locator('#live [data-state=running]', has_text='out-two').wait_for()
    state = lambda name: page.locator('#runs tr', has_text=name).locator('td').nth(2)
    for name in ('out-one', 'out-two'):
        playwright.expect(state(name)).to_have_text('running')
    page.locator('#stop').click()
    page.locator('#live [data-state=stopped]').wait_for()
    playwright.expect(state('out-two')).to_have_text('stopped')
    playwright.expect(state('out-one')).to_have_text('running')
    choose(page, 'watch', 'out-one')
    page.locator('#live [data-state=running]', has_text='out-one').wait_for()
    page.locator('#stop').click()
    page.locator('#live [data-state=stopped]').wait_for()
    stopped = app.run_of(served.root, 'out-one')
    assert stopped.state == 'stopped' and stopped.last > at and app.birth(stopped.info['pid']) == ''
    page.get_by_label('iterations when resumed').fill(str(stopped.last + 30))
    page.locator('#resume').click()
    page.locator('#live [data-state=finished]').wait_for()
    run = app.run_of(served.root, 'out-one')
    assert run.last == stopped.last + 30 and app.series(run, 'loss')[0] == list(range(run.last))  # no step twice, none left out
    assert f'--max_iters={run.last}' in page.locator('#live pre').inner_text() or 'done:' in page.locator('#live pre').inner_text()


# ---- annotate


def label(page, key):
    """One key, and the next pair is on the page."""
    page.locator('[data-pair]').wait_for()
    before = page.locator('[data-pair]').get_attribute('data-pair')
    page.keyboard.press(key)
    page.wait_for_function('old => document.querySelector("[data-pair]")?.dataset.pair !== old', arg=before)
    return before


def test_twenty_labels_by_keyboard_survive_a_kill_of_the_server(page, served):
    journal = app.Journal(served.root, 'labels')
    tab(page, 'Annotate')
    page.get_by_role('button', name='Make or import pairs').click()
    page.locator('#given input[type=file]').set_input_files(os.path.join(served.root, 'pairs.jsonl'))
    page.locator('#given').get_by_text('pairs').first.wait_for()
    page.get_by_role('button', name='Import', exact=True).click()
    page.locator('[data-pair]').wait_for()
    for i, key in enumerate('abtsabbaab' + 'abtsabbaab'):
        label(page, key)
        assert len(journal.state()[1]) == i + 1
        if i == 9:
            served.kill()
            served.start()
            try:
                page.goto(served.url)
            except playwright.Error:  # Gradio's page saw the server again and loads itself anew at the same moment
                page.wait_for_load_state()
            page.locator('#chat').wait_for()
            tab(page, 'Annotate')
            page.locator('[data-pair]').wait_for()
            assert page.locator('#labelled').inner_text() == '10'
    kinds = [m['label'] for m in journal.state()[1].values()]
    assert ''.join(k[0] for k in kinds) == 'abtsabbaab' * 2
    assert 'import' not in page.locator('#pair').inner_text() and page.locator('#pair img').count() == 0  # blind, and text


def test_undo_edit_export_with_ties_apart(page, served):
    journal = app.Journal(served.root, 'labels')
    tab(page, 'Annotate')
    page.keyboard.press('u')
    playwright.expect(page.locator('#labelled')).to_have_text('19')
    page.keyboard.press('e')
    last = journal.next('page')
    playwright.expect(page.get_by_label('better answer')).to_have_value(last['a'])
    page.get_by_role('radio', name='b', exact=True).check()
    playwright.expect(page.get_by_label('better answer')).to_have_value(last['b'])
    page.get_by_role('button', name='Save the edit').click()
    refused(page, 'the answer is as it was')
    page.get_by_label('better answer').fill('the best answer, <i>by hand</i>')
    page.get_by_role('button', name='Save the edit').click()
    playwright.expect(page.locator('#labelled')).to_have_text('20')
    page.get_by_role('button', name='Export', exact=True).click()
    page.locator('#after').get_by_text('16 preferences').wait_for()
    rows, ties = ([json.loads(x) for x in open(os.path.join(served.root, 'annotations', f'labels.{k}.jsonl'))] for k in ('pref', 'ties'))
    assert len(rows) == 16 and len(ties) == 2 and all(set(r) == {'prompt', 'chosen', 'rejected'} for r in rows) and all(t['tie'] for t in ties)
    assert rows[-1]['chosen'] == 'the best answer, <i>by hand</i>'
    pairs, labels, _ = journal.state()
    first = next(iter(labels.values()))
    assert rows[0]['chosen'] == pairs[first['pair']][first['label']]


def test_two_tabs_label_different_pairs(page, served, chromium):
    journal = app.Journal(served.root, 'labels')
    n = len(journal.state()[1])
    other = opened(chromium, served)
    tab(other, 'Annotate')
    other.locator('[data-pair]').wait_for()
    mine, theirs = (p.locator('[data-pair]').get_attribute('data-pair') for p in (page, other))
    assert mine != theirs
    page.keyboard.press('a')
    other.keyboard.press('b')
    assert wait_for(lambda: len(journal.state()[1]) == n + 2, 30)
    assert {journal.state()[1][mine]['label'], journal.state()[1][theirs]['label']} == {'a', 'b'}
    other.close()


def test_judges_reward_model_and_endpoint(page, served):
    tab(page, 'Annotate')
    page.get_by_role('button', name='Let it label the rest').click()
    page.locator('#after').get_by_text('out-reward labelled 2 pairs; 2 of 2 open ones asked').wait_for()
    page.get_by_role('button', name='Agreement with the labels').click()
    page.locator('#after').get_by_text(re.compile(r'out-reward agrees with \d+ of \d+ labels')).wait_for()
    second = app.Journal(served.root, 'second')
    second.load(os.path.join(served.root, 'pairs.jsonl'))
    page.get_by_label('journal').fill('second')
    page.get_by_label('journal').press('Enter')
    page.locator('[data-pair]').wait_for()
    def judged(url, key=''):
        page.get_by_label('endpoint of a judge').fill(url)
        page.get_by_label('its key').fill(key)
        page.get_by_role('button', name='Let it label the rest').click()
    right = Endpoint(lambda question, key: prefers('first')(question, key) if key == 'Bearer right' else (401, dict(error=dict(message='Incorrect API key provided'))))
    mute, gone = Endpoint(lambda question, key: verdict(EVIL)), Endpoint(None)
    gone.close()
    for url, key, words in (('file:///etc/passwd', '', 'the judge is an address'), (gone.url, '', 'cannot be reached'), (right.url, 'wrong', 'refused with 401: Incorrect API key provided'),
                            (mute.url, '', 'expected A, B or TIE, got')):
        judged(url, key)
        refused(page, words)
        page.locator('#after .bad', has_text=words).wait_for()
        assert second.state()[1] == {} and page.locator('#after img').count() == 0
    judged(right.url, 'right')
    page.locator('#after').get_by_text('labelled 24 pairs').wait_for()
    page.locator('#pair').get_by_text('No open pair').wait_for()
    right.close(), mute.close()
    pairs, labels, _ = second.state()
    assert len(labels) == 24 and all(pairs[id][m['label']].startswith('first') for id, m in labels.items())
    page.get_by_label('journal').fill('../x')
    page.get_by_label('journal').press('Enter')
    refused(page, 'a name of letters')
    page.get_by_label('journal').fill('labels')
    page.get_by_label('journal').press('Enter')


def test_refit_on_the_labels_and_chat_again(page, served):
    tab(page, 'Annotate')
    page.get_by_label('steps', exact=True).fill('2')
    page.locator('#refit').click()
    page.locator('#refitted [data-refit=done]').wait_for(timeout=80000)
    tab(page, 'Chat')
    playwright.expect(page.locator('#chat h4').nth(1)).to_have_text('out-dpo-labels')
    sent(page, 'hello')
    page.locator('#chat .side > div').nth(1).get_by_text('tok/s').wait_for()
    tab(page, 'Annotate')  # once more: what the first refit left is not taken for the second's
    page.locator('#refit').click()
    playwright.expect(page.locator('#refitted [data-refit]')).to_have_count(0)
    page.locator('#refitted [data-refit]').wait_for()
    assert page.locator('#refitted [data-refit]').get_attribute('data-refit') == 'running'
    page.locator('#refitted [data-refit=done]').wait_for(timeout=80000)


# ---- finetune


def upload(page, path):
    remove = page.locator('#upload').get_by_label(re.compile('Remove|Clear')).locator('visible=true')  # a refusal leaves a hidden Clear of its own behind
    if remove.count():
        remove.first.click()
    page.locator('#upload input[type=file]').set_input_files(path)


def test_finetune_refuses_the_wrong_type_and_a_gigabyte(page, served):
    tab(page, 'Finetune')
    write(os.path.join(served.root, 'notes.txt'), 'not rows')
    upload(page, os.path.join(served.root, 'notes.txt'))
    refused(page, re.compile('Invalid file type|file type', re.I))
    with open(os.path.join(served.root, 'huge.jsonl'), 'wb') as f:
        f.truncate(1 << 30)
    upload(page, os.path.join(served.root, 'huge.jsonl'))
    refused(page, re.compile('exceeds|size', re.I))
    os.remove(os.path.join(served.root, 'huge.jsonl'))
    write(os.path.join(served.root, 'bad.jsonl'), 'this is no JSON <img src=x onerror=window.hacked=1>')
    upload(page, os.path.join(served.root, 'bad.jsonl'))
    page.locator('#upload').get_by_text('bad').first.wait_for()
    page.get_by_role('button', name='Check the file').click()
    assert 'bad.jsonl' in refused(page, 'cannot be read')


def checked(page, served, file):
    """Uploads a file of the folder and has it looked over; what the page says of it."""
    upload(page, os.path.join(served.root, file))
    page.locator('#upload').get_by_text(file.split('.')[0]).first.wait_for()
    page.get_by_role('button', name='Check the file').click()
    page.locator('#looked h3', has_text=file).wait_for()
    assert page.locator('#looked img').count() == page.locator('#looked b').count() == 0
    return page.locator('#looked').inner_text()


def start_finetuning(page, how, out):
    page.get_by_label(how, exact=True).check()
    page.get_by_label('iterations', exact=True).fill('4')
    page.get_by_label('out_dir', exact=True).locator('visible=true').fill(out)
    page.get_by_role('button', name='Start finetuning').click()


def test_finetune_says_what_is_wrong_with_a_file_and_shows_a_crash(page, served):
    tab(page, 'Finetune')
    assert 'unreadable: 1 row' in checked(page, served, 'spoiled.jsonl')
    start_finetuning(page, 'LoRA', 'out-sft')
    refused(page, 'out-sft holds a run')
    start_finetuning(page, 'LoRA', 'out-spoiled')
    page.locator('#tuned [data-state=crashed]', has_text='out-spoiled').wait_for()
    assert "row with the keys ['prompt']" in page.locator('#tuned .bad').inner_text()


def test_finetune_lora_from_jsonl_and_all_weights_from_csv_then_export(page, served):
    tab(page, 'Finetune')
    for file, how, out in (('tune.jsonl', 'LoRA', 'out-tuned'), ('tune.csv', 'all weights', 'out-full')):
        assert '30 rows' in checked(page, served, file)
        page.locator('#looked .on').first.wait_for()
        trained = ''.join(page.locator('#looked pre').first.locator('.on').all_inner_texts())
        assert trained.startswith('0. <img' if file == 'tune.jsonl' else 'it is 0, <b>yes') and 'say' not in trained and 'Q:' not in trained
        start_finetuning(page, how, out)
        page.locator('#tuned [data-state=finished]', has_text=out).wait_for()
        page.get_by_role('button', name='Merge and export').click()
        page.locator('#exported').get_by_text(f'{out}-export').wait_for()
    ids, at = torch.arange(20)[None], lambda name: os.path.join(served.root, name)
    here = os.getcwd()
    os.chdir(served.root)  # an adapter names its base as the run did
    tuned, sft = (load_model(name)[0].eval()(ids)[0] for name in ('out-tuned', 'out-sft'))
    os.chdir(here)
    merged = GPT.from_pretrained(at('out-tuned-export')).eval()(ids)[0]
    assert (tuned - merged).abs().max() < 1e-5 < (tuned - sft).abs().max()
    assert os.path.exists(at('out-tuned-adapter/adapter_model.safetensors')) and not os.path.exists(at('out-full-adapter'))
    page.get_by_role('button', name='Chat with it').click()
    tab(page, 'Chat')
    playwright.expect(page.locator('#chat h4').nth(1)).to_have_text('out-full')
    with open(at('out-tuned/log.jsonl'), 'a') as log:
        log.write(json.dumps(dict(step=5, time=9.0, split='train', loss=1.0)) + '\n')
    page.wait_for_timeout(5000)  # a run has moved, so the timer of the refit redraws; it chose a model for the chat once and shall not do so again
    assert page.locator('#chat h4').nth(1).inner_text() == 'out-full'
    sent(page, 'say 3')
    page.locator('#chat .side > div').nth(1).get_by_text('tok/s').wait_for()


# ---- dashboard


def test_dashboard_and_report_opened_from_disk(page, served, chromium):
    tab(page, 'Dashboard')
    page.locator('#dashboard svg.plot').first.wait_for()
    text = page.locator('#dashboard').inner_text()
    for words in ('Report card of the reward model', 'Mode collapse', 'Seen in out-ppo', 'broken log lines', 'Reliability', 'wins against SFT', 'gold and proxy', 'out-ppo: over-optimisation',
                  'Reward hacking', 'Answers without end', '100% (44% to 100%)'):
        assert words in text, words
    assert page.locator('#dashboard img').count() == 0
    drawn = page.locator('#dashboard').inner_html()
    page.get_by_label('kl', exact=True).locator('visible=true').check()
    page.wait_for_function('old => document.querySelector("#dashboard svg.plot") && document.querySelector("#dashboard").innerText !== old', arg=text)
    assert 'KL, nats a sequence' in page.locator('#dashboard').inner_text() and page.locator('#dashboard').inner_html() != drawn
    page.get_by_label('report file').fill('../report.html')
    page.get_by_role('button', name='Write the report').click()
    refused(page, 'outside the folder')
    page.get_by_label('report file').fill('out/report.html')
    page.get_by_role('button', name='Write the report').click()
    path = os.path.join(served.root, 'out', 'report.html')
    assert wait_for(lambda: os.path.exists(path), 30)
    asked, disk = [], chromium.new_page(viewport=dict(width=390, height=800))
    disk.on('request', lambda r: asked.append(r.url))
    disk.goto(f'file://{path}')
    assert disk.locator('svg').count() > 5 and asked == [f'file://{path}'] and disk.evaluate('window.hacked') is None
    assert disk.evaluate('document.documentElement.scrollWidth') <= 390
    disk.close()


# ---- doors


def answer(served, path, body=None, **headers):
    request = urllib.request.Request(served.url + path, headers={k.replace('_', '-'): v for k, v in headers.items()}, data=body)
    try:
        return urllib.request.urlopen(request, timeout=20).status
    except urllib.error.HTTPError as e:
        return e.code


def test_doors_are_shut(served):
    assert answer(served, '') == 200 and answer(served, '', Host='evil.example') == 400
    start = json.dumps(dict(data=[''], fn_index=0, session_hash='x')).encode()
    for origin, want in (('http://evil.example', 403), ('null', 403), (served.url.rstrip('/'), 200)):
        assert answer(served, 'gradio_api/queue/join', start, Content_Type='application/json', Origin=origin) == want
    for path in ('/etc/passwd', os.path.join(served.root, 'rows.jsonl'), 'rows.jsonl', '../x', os.path.join(app.HERE, 'app.py')):
        assert answer(served, f'gradio_api/file={path}') in (403, 404)
    with socket.socket() as s:  # an upload that says it has 1 GB
        s.connect(('127.0.0.1', served.port))
        s.settimeout(20)
        s.sendall(b'POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: %d\r\n\r\n'
                  b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jsonl"\r\n\r\n' % (1 << 30))
        try:
            for _ in range((app.UPLOAD_MB + 56) * 4):
                s.sendall(b'a' * (1 << 18))
            said = s.recv(200)
        except (ConnectionError, TimeoutError):
            said = b'HTTP/1.1 413 (hung up)'
    assert b' 413' in said or b' 400' in said, said
    kept = os.path.join(served.root, 'uploads', '.tmp')
    assert sum(os.path.getsize(os.path.join(d, f)) for d, _, files in os.walk(kept) for f in files) < app.UPLOAD_MB << 20


def test_another_host_asks_for_a_password_and_an_empty_folder_says_so(chromium, tmp_path):
    server = Served(str(tmp_path), '--host=0.0.0.0', '--auth=me:secret')
    try:
        assert answer(server, 'config') == 401 and answer(server, 'gradio_api/queue/join', b'{}', Content_Type='application/json') == 401
        page = chromium.new_page()
        page.goto(server.url)
        page.get_by_label('username').fill('me')
        page.get_by_label('password').fill('secret')
        page.get_by_role('button', name='Login').click()
        page.get_by_text('This folder holds no model and no run yet').wait_for()
        tab(page, 'Annotate')
        page.get_by_text('No open pair').wait_for()
        tab(page, 'Dashboard')
        page.get_by_text('No runs in this folder yet').locator('visible=true').wait_for()
        page.close()
    finally:
        server.kill()


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_nothing_is_cut(served, chromium, theme):
    page, shots = opened(chromium, served, color_scheme=theme), os.environ.get('APP_SHOTS')
    for name in ('Chat', 'Train', 'Finetune', 'Annotate', 'Dashboard'):
        tab(page, name)
        ready = dict(Train='#live svg.plot', Annotate='#labelled', Dashboard='#dashboard svg.plot').get(name)
        page.locator(ready).first.wait_for() if ready else page.wait_for_timeout(300)
        for width in (390, 1280):
            page.set_viewport_size(dict(width=width, height=800))
            page.wait_for_timeout(200)
            assert page.evaluate('document.documentElement.scrollWidth') <= width, (name, width)
            if shots:
                page.screenshot(path=os.path.join(shots, f'{name}-{width}-{theme}.png'), full_page=True)
    ink, paper = (page.evaluate(f'getComputedStyle(document.querySelector("{q}")).{k}') for q, k in (('#dashboard h2', 'color'), ('body', 'backgroundColor')))
    level = lambda rgb: sum(map(int, re.findall(r'\d+', rgb)[:3])) / 3
    assert (level(ink) > 160) == (theme == 'dark') and abs(level(ink) - level(paper)) > 90
    assert page.evaluate('window.hacked') is None
    page.close()
