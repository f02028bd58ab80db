"""app.py in a real browser: Chromium, driven by Playwright (pytest -m browser). One server over one folder of
tiny models; in each tab what a person does there, and the doors. APP_SHOTS=DIR keeps a picture of every tab
at 1280 and 390 pixels, light and dark."""
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

pytest.importorskip('gradio')
pytest.importorskip('matplotlib')
playwright = pytest.importorskip('playwright.sync_api')
import torch
from helpers import Judge
from test_app import config_row, row, shape, SMALL, text, tiny, toy_rows, wait_for, write

import app
from model import GPT
from run import load_model

TIMEOUT = 1000 * int(os.environ.get('APP_TIMEOUT', 60))  # ms a page may take to show what was asked
playwright.expect.set_options(timeout=TIMEOUT)
pytestmark = pytest.mark.browser
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--no-first-run', '--disable-background-networking',
         '--disable-component-update', '--disable-sync', '--disable-quic']
NAME = 'out-<img src=x onerror=window.hacked=1>'  # a run's folder may be called so
EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'


class Served:
    """The app as a process on a free port; kill() as a power cut does it."""

    def __init__(self, root, *args):
        self.root, self.args = root, args
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.port = s.getsockname()[1]
        self.url = f'http://127.0.0.1:{self.port}/'
        self.start()

    def start(self):
        command = [sys.executable, f'{app.HERE}/app.py', f'--folder={self.root}', f'--port={self.port}']
        with open(f'{self.root}/server.txt', 'ab') as log:
            self.process = subprocess.Popen([*command, *self.args], stdout=log, stderr=log)
        assert wait_for(lambda: answer(self, '') in (200, 401)), text(f'{self.root}/server.txt')

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def answer(served, path, body=None, **headers):
    """The status of one request, 0 where nobody listens."""
    headers = {key.replace('_', '-'): value for key, value in headers.items()}
    request = urllib.request.Request(served.url + path, body, headers)
    try:
        return urllib.request.urlopen(request, timeout=30).status
    except urllib.error.HTTPError as e:
        return e.code
    except OSError:
        return 0


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    """A folder as quickstart leaves it, in miniature, with hostile text wherever text may stand."""
    root = tmp_path_factory.mktemp('folder')
    for seed, name in enumerate(('out-base', 'out-sft', 'out-dpo', NAME)):
        tiny(root / name, seed=seed, block=4096)
    tiny(root / 'out-slow', seed=6, block=4096, layers=6, width=384)
    value = GPT(shape(block=4096), 'scalar').state_dict()
    value = dict(value=value, value_kind='policy', beta=0.1)
    tiny(root / 'out-ppo', stage='ppo', seed=4, block=4096, more=value)
    tiny(root / 'out-reward', 'scalar', 'reward', seed=5, block=4096)
    course = [row(i, score=i / 10, kl=i / 5, entropy=3 / (1 + i), len=30.0, loss=1.0) for i in range(20)]
    course += [row(i, 'eval', score=i / 10, kl=i / 5, len=30.0) for i in (0, 10)]
    write(root / 'out-ppo' / 'log.jsonl', config_row('ppo', max_iters=20), *course, '{"step": 20, "ti')
    said = {0: 'It is {0}.', 10: 'Yes! Yes! Yes!', 20: EVIL}
    write(root / 'out-ppo' / 'samples.jsonl', *[
        dict(step=step, prompt=f'Q: {word}?\nA: ', completion=words.format(word), score=step / 10)
        for step, words in said.items() for word in ('red', 'blue', 'green')])
    write(root / 'out-reward' / 'log.jsonl', config_row('reward', max_iters=2), row(2, 'eval', accuracy=0.7))
    write(root / 'out-reward' / 'report.json', dict(
        accuracy=0.7, accuracy_95=[0.6, 0.8], pairs=100, ece=0.05, longer_is_chosen=0.6,
        length_correlation=0.2, reliability=[[0.5, 0.6, 50, 0.55, 0.5], [0.6, 1.0, 50, 0.8, 0.9]],
        histogram=dict(edges=[-1, 0, 1], chosen=[40, 60], rejected=[60, 40])))
    write(root / 'out-dead' / 'console.txt', '$ python sft.py', 'Traceback (most', f'RuntimeError: {EVIL}')
    write(root / 'out-dead' / 'log.jsonl', 'half a l')
    write(root / NAME / 'log.jsonl', config_row(max_iters=9), row(3, loss=2.0))
    toy_rows(root)
    keys = [f'{key} = {value if value.isdigit() else repr(value)}' for key, value in SMALL.items()]
    write(root / 'config' / 'mine.py', '# python sft.py config/mine.py', *keys, "out_dir = 'out-one'",
          'max_iters = 100000')
    asked = [dict(prompt=f'Q: {word}?\nA: ', family='fact', want=word) for word in ('red', 'blue', 'green')]
    write(root / 'data' / 'toy' / 'prompts_val.jsonl', *asked)
    write(root / 'out' / 'report.json', {name: dict(gold=gold, reward=gold / 5, kl=kl) for name, gold, kl in (
        ('base', 0.7, 56.0), ('sft', 4.7, 0.0), ('ppo', 6.5, 2.9))})
    write(root / 'out' / 'samples.jsonl', *[
        dict(prompt=q['prompt'], base=EVIL, sft=f"It is {q['want']}.", ppo=f"Sure! It is {q['want']}.")
        for q in asked])
    write(root / 'pairs.jsonl', *[
        dict(prompt=f'Q: {i} {EVIL}?\nA: ', a=f'first {i} {EVIL}', b=f'second {i}') for i in range(24)])
    for i in range(30):
        turns = dict(role='user', content=f'say {i}'), dict(role='assistant', content=f'{i}. {EVIL}')
        write(root / 'tune.jsonl', dict(messages=turns), mode='a')
    write(root / 'spoiled.jsonl', dict(prompt='a', completion='b'), dict(prompt=f'no completion {EVIL}'))
    lines = [f'"Q: {i}?\nA: ","it is {i}, <b>yes</b>"' for i in range(30)]
    write(root / 'tune.csv', 'prompt,completion', *lines)
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
    page.locator('#chat').wait_for(state='attached')
    return page


@pytest.fixture(scope='module')
def page(served, chromium):
    """One page for all tests; at the end nothing from a model or a file has run in it, and it asked no other
    machine for anything."""
    page, outside = opened(chromium, served), []
    page.on('request', lambda r: outside.append(r.url))
    yield page
    known = (served.url, 'data:', 'blob:')
    assert page.evaluate('window.hacked') is None and [u for u in outside if not u.startswith(known)] == []


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


def press(page, name):
    page.get_by_role('button', name=re.compile('^' + name)).locator('visible=true').first.click()


def refused(page, words):
    toast = page.locator('.toast-body', has_text=words).first
    toast.wait_for()
    said = toast.inner_text()
    assert 'Traceback' not in said and '&' not in said and page.locator('.toast-body img').count() == 0, said
    page.locator('.toast-close').first.click()


def at(served, *names):
    return os.path.join(served.root, *names)


# ---- chat
def longest(page, n):
    page.get_by_label('number input for tokens at most').fill(str(n))
    page.get_by_label('number input for tokens at most').press('Tab')
    playwright.expect(page.get_by_label('range slider for tokens at most')).to_have_value(str(n))


def sent(page, words):
    page.locator('#message textarea').fill(words)
    page.locator('#message textarea').press('Enter')


def bots(page):
    return [name.strip() for name in page.locator('#chat [data-testid=block-label]').all_inner_texts()]


def answers(page):
    return page.locator('#chat [data-testid=bot]')


def settled(page):
    """Waits until the answers grow no more; what they are."""
    before = None
    while before != page.locator('#chat').inner_text():
        before = page.locator('#chat').inner_text()
        page.wait_for_timeout(2500)
    return before


def test_chat_streams_four_models_side_by_side_and_colours_tokens(page):
    choose(page, 'Models', 'out-base', 'out-slow')  # all four wait for the slow one: a stream to be watched
    playwright.expect(page.locator('#chat [data-testid=block-label]')).to_have_count(4)
    assert bots(page) == ['out-sft', 'out-ppo', 'out-base', 'out-slow']
    press(page, 'Sampling')
    longest(page, 120)
    page.evaluate("""() => { window.seen = new Set(); window.watch = setInterval(() =>
        window.seen.add(document.querySelector('#chat').textContent.length), 150) }""")
    sent(page, EVIL)
    page.wait_for_function("() => document.querySelector('#chat').textContent.split('tok/s').length == 5")
    settled(page)
    assert page.evaluate('clearInterval(window.watch), window.seen.size') >= 4  # a little at a time
    assert EVIL in page.locator('#chat').inner_text() and page.locator('#chat img').count() == 0
    press(page, 'Colour the last answers')
    page.locator('#tokens .score-token').first.wait_for()
    assert 'advantage' in page.locator('#numbers').inner_text()
    for key in ('kl', 'reward', 'value', 'advantage', 'logp'):
        page.get_by_label(key, exact=True).locator('visible=true').first.check()
        page.locator('#tokens').get_by_text(f'{key}:').first.wait_for()
    tints = page.locator('#tokens .score-token').evaluate_all('all => all.map(t => t.style.backgroundColor)')
    assert len(set(tints)) > 5 and page.locator('#tokens img').count() == 0


def test_chat_stopped_halfway_and_asked_again(page):
    for _ in range(4):
        page.get_by_label('Models', exact=True).press('Backspace')
    choose(page, 'Models', 'out-slow')
    press(page, 'New chat')
    playwright.expect(answers(page)).to_have_count(0)
    heat = page.get_by_label('number input for temperature (0 = greedy)')
    heat.fill('0')  # a greedy random model goes round in circles and never ends
    longest(page, 2000)
    sent(page, 'count')
    page.wait_for_function("() => /[1-9]\\d* tokens/.test(document.querySelector('#chat').textContent)")
    page.locator('#message button.stop-button').click()
    assert 0 < int(re.search(r'(\d+) tokens', settled(page))[1]) < 2000
    longest(page, 8)
    press(page, 'New chat')
    playwright.expect(answers(page)).to_have_count(0)
    choose(page, 'Models', 'out-base')
    sent(page, 'again')
    again = answers(page).filter(has_text=re.compile('8 tokens.*cut at the limit'))
    playwright.expect(again).to_have_count(2)


# ---- train
def test_train_two_runs_at_once_watched_stopped_resumed(page, served):
    tab(page, 'Train')
    runs, command = page.locator('#runs'), page.locator('#command textarea')
    playwright.expect(runs).to_contain_text(NAME)
    assert 'crashed' in runs.inner_text() and runs.locator('img').count() == 0
    choose(page, 'config', 'config/mine.py')
    playwright.expect(command).to_have_value('python sft.py config/mine.py')
    page.locator('#form-out_dir textarea').fill('../outside')
    playwright.expect(command).to_have_value(re.compile('not yet: ../outside is outside the folder'))
    page.locator('#start').click()
    refused(page, 'outside the folder')
    page.locator('#form-out_dir textarea').fill('out-sft')
    page.locator('#start').click()
    refused(page, 'already holds a run')
    state, live = '#live [data-state={}]', page.locator('#live')
    for name in ('out-one', 'out-two'):
        page.locator('#form-out_dir textarea').fill(name)
        playwright.expect(command).to_have_value(re.compile(name if name == 'out-two' else 'config/mine.py$'))
        page.locator('#start').click()
        page.locator(state.format('running'), has_text=name).wait_for()
    page.wait_for_function("() => parseInt(document.querySelector('#at').innerText) > 5")
    page.locator('.plot-container, .vega-embed, canvas').locator('visible=true').first.wait_for()
    cells = [runs.locator('tr', has_text=name).locator('td').nth(2) for name in ('out-one', 'out-two')]
    for cell in cells:
        playwright.expect(cell).to_have_text('running')
    page.locator('#stop').click()
    playwright.expect(live).to_contain_text('out-two: stopped')
    playwright.expect(cells[0]).to_have_text('running')
    choose(page, 'watch', 'out-one')
    playwright.expect(live).to_contain_text('out-one: running')
    page.locator('#stop').click()
    playwright.expect(live).to_contain_text('out-one: stopped')
    stopped = app.RunFolder(served.root, 'out-one')
    page.get_by_label('iterations when resumed').fill(str(stopped.last + 30))
    page.locator('#resume').click()
    playwright.expect(live).to_contain_text('out-one: finished')
    run = app.RunFolder(served.root, 'out-one')
    assert run.series('loss')[0] == list(range(stopped.last + 30))  # no step twice, none left out
    assert 'done:' in page.locator('#live-console textarea').input_value()


# ---- annotate
def label(page, key):
    page.locator('[data-pair]').wait_for()
    before = page.locator('[data-pair]').get_attribute('data-pair')
    page.keyboard.press(key)
    page.wait_for_function('old => document.querySelector("[data-pair]")?.dataset.pair !== old', arg=before)


def test_twenty_labels_by_keyboard_survive_a_kill_of_the_server_and_a_reload(page, served):
    journal, keys = app.journal_of(served.root, 'labels'), 'abtsabbaab' * 2
    tab(page, 'Annotate')
    press(page, 'Make or import pairs')
    page.locator('#given input[type=file]').set_input_files(at(served, 'pairs.jsonl'))
    page.locator('#given').get_by_text('pairs').first.wait_for()
    press(page, 'Import')
    for i, key in enumerate(keys):
        label(page, key)
        assert len(journal.state()[1]) == i + 1
        if i == 9:
            served.kill()
            served.start()
            try:
                page.goto(served.url)
            except playwright.Error:  # Gradio's page saw the server again and loads itself anew
                page.wait_for_load_state()
            page.locator('#chat').wait_for(state='attached')
            tab(page, 'Annotate')
            playwright.expect(page.locator('#labelled')).to_have_text('10')
    kinds = [mark['label'] for mark in journal.state()[1].values()]
    assert ''.join(kind[0] for kind in kinds) == keys
    assert 'import' not in page.locator('#pair').inner_text()  # blind
    assert page.locator('#pair img').count() == 0
    page.goto(served.url)
    tab(page, 'Annotate')
    page.locator('[data-pair]').wait_for()
    page.keyboard.press('u')  # the last label of this browser, though the page is a new one
    playwright.expect(page.locator('#labelled')).to_have_text('19')


def test_edit_and_export_with_ties_apart(page, served):
    page.keyboard.press('e')
    better = page.get_by_label('better answer')
    last = app.journal_of(served.root, 'labels').next('page')
    playwright.expect(better).to_have_value(last['a'])
    page.get_by_role('radio', name='b', exact=True).check()
    playwright.expect(better).to_have_value(last['b'])
    press(page, 'Save the edit')
    refused(page, 'the answer is as it was')
    better.fill('the best answer, <i>by hand</i>')
    press(page, 'Save the edit')
    playwright.expect(page.locator('#labelled')).to_have_text('20')
    press(page, 'Export')
    page.locator('#after').get_by_text('16 preferences').wait_for()
    pref, ties = (at(served, 'annotations', f'labels.{kind}.jsonl') for kind in ('pref', 'ties'))
    rows, ties = text(pref).splitlines(), text(ties).splitlines()
    assert len(rows) == 16 and len(ties) == 2 and all(json.loads(tie)['tie'] for tie in ties)
    assert json.loads(rows[-1])['chosen'] == 'the best answer, <i>by hand</i>'


def test_judges_reward_model_and_endpoint(page, served):
    press(page, 'Let it label the rest')
    page.locator('#after').get_by_text('out-reward labelled 4 pairs; 4 of 4 open ones asked').wait_for()
    press(page, 'Agreement with the labels')
    page.locator('#after').get_by_text(re.compile(r'out-reward agrees with \d+ of \d+ labels')).wait_for()
    second, journal = app.journal_of(served.root, 'second'), page.get_by_label('journal')
    second.load(at(served, 'pairs.jsonl'))
    journal.fill('second')
    journal.press('Enter')
    page.locator('[data-pair]').wait_for()

    with Judge(lambda a, b, _: ('A' if 'first' in a else 'B') if judge.keys[-1] else EVIL) as judge:
        for url, key, words in (('file:///etc/passwd', '', 'the judge is an address'),
                                (judge.url, '', 'expected A, B or TIE'), (judge.url, 'right', '')):
            page.get_by_label('endpoint of a judge').fill(url)
            page.get_by_label('its key').fill(key)
            press(page, 'Let it label the rest')
            if words:
                refused(page, words)
                page.locator('#after .bad', has_text=words).wait_for()
                assert second.state()[1] == {} and page.locator('#after img').count() == 0
        page.locator('#after').get_by_text('labelled 24 pairs').wait_for()
    page.locator('#pair').get_by_text('No open pair').wait_for()
    pairs, marks, _ = second.state()
    assert len(marks) == 24
    assert all(pairs[name][mark['label']].startswith('first') for name, mark in marks.items())
    for name in ('../x', 'labels'):
        journal.fill(name)
        journal.press('Enter')
    refused(page, 'a name of letters')


def test_refit_on_the_labels_and_chat_again(page, served):
    page.get_by_label('steps', exact=True).fill('2')
    for _ in range(2):  # what the first refit left is not taken for the second's
        page.locator('#refit').click()
        playwright.expect(page.locator('#refitted [data-refit=running]')).to_have_count(1)
        page.locator('#refitted [data-refit=done]').wait_for(timeout=4 * TIMEOUT)
    tab(page, 'Chat')
    playwright.expect(page.locator('#chat')).to_contain_text('out-dpo-labels')
    sent(page, 'hello')
    playwright.expect(answers(page).filter(has_text='tok/s')).to_have_count(2)


# ---- finetune
def checked(page, served, file):
    remove = page.locator('#upload').get_by_label(re.compile('Remove|Clear')).locator('visible=true')
    if remove.count():
        remove.first.click()
    page.locator('#upload input[type=file]').set_input_files(at(served, file))
    page.locator('#upload').get_by_text(file.split('.')[0]).first.wait_for()
    press(page, 'Check the file')


def start_finetuning(page, how, out):
    page.get_by_label(how, exact=True).check()
    page.get_by_label('iterations', exact=True).fill('4')
    page.get_by_label('out_dir', exact=True).locator('visible=true').fill(out)
    press(page, 'Start finetuning')


def test_finetune_refuses_what_it_cannot_read_and_shows_a_crash(page, served):
    tab(page, 'Finetune')
    write(at(served, 'bad.jsonl'), 'this is no JSON <img src=x onerror=window.hacked=1>')
    checked(page, served, 'bad.jsonl')
    refused(page, 'bad.jsonl cannot be read')
    checked(page, served, 'spoiled.jsonl')
    page.locator('#looked').get_by_text('unreadable: 1 row').wait_for()
    for out, words in (('out-dpo', 'already holds a run'), ('./out-sft', 'is read by this run')):
        start_finetuning(page, 'LoRA', out)
        refused(page, words)
    start_finetuning(page, 'LoRA', 'out-spoiled')
    page.locator('#tuned [data-state=crashed]', has_text='out-spoiled').wait_for()
    assert "row with the keys ['prompt']" in page.locator('#tuned .bad').inner_text()


def test_finetune_lora_from_jsonl_and_all_weights_from_csv_then_export(page, served):
    tab(page, 'Finetune')
    for file, how, out, trained in (('tune.jsonl', 'LoRA', 'out-tuned', '0. <img'),
                                    ('tune.csv', 'all weights', 'out-full', 'it is 0, <b>yes')):
        checked(page, served, file)
        page.locator('#looked h3', has_text=f'{file}: 30 rows').wait_for()
        on = ''.join(page.locator('#looked pre').first.locator('.on').all_inner_texts())
        assert on.startswith(trained) and 'say' not in on and 'Q:' not in on
        assert page.locator('#looked img').count() == page.locator('#looked b').count() == 0
        start_finetuning(page, how, out)
        page.locator('#tuned [data-state=finished]', has_text=out).wait_for()
        press(page, 'Merge and export')
        page.locator('#exported').get_by_text(f'{out}-export').wait_for()
    ids = torch.arange(20)[None]
    tuned, sft = (load_model(at(served, name))[0].eval()(ids)[0] for name in ('out-tuned', 'out-sft'))
    merged = GPT.from_pretrained(at(served, 'out-tuned-export')).eval()(ids)[0]
    assert (tuned - merged).abs().max() < 1e-5 < (tuned - sft).abs().max()
    assert os.path.exists(at(served, 'out-tuned-adapter', 'adapter_model.safetensors'))
    assert not os.path.exists(at(served, 'out-full-adapter'))
    press(page, 'Chat with it')
    tab(page, 'Chat')
    playwright.expect(page.locator('#chat')).to_contain_text('out-full')
    with open(at(served, 'out-dpo-labels', 'log.jsonl'), 'a', encoding='utf-8') as log:
        log.write(json.dumps(row(5, loss=1.0)) + '\n')
    page.wait_for_timeout(5000)  # a refit's run has moved: it chose the chat's models once, and not again
    assert bots(page)[-1] == 'out-full'


# ---- dashboard
def test_dashboard_and_report_opened_from_disk(page, served, chromium):
    tab(page, 'Dashboard')
    page.locator('#dashboard h2').first.wait_for()
    words = page.locator('#dashboard').inner_text()
    for part in ('Report card of the reward model', 'Mode collapse', 'Seen in out-ppo', 'broken log lines',
                 'Reliability', 'wins against SFT', 'gold and proxy', 'out-ppo: over-optimisation',
                 'Reward hacking', 'Answers without end', '100% (44% to 100%)'):
        assert part in words, part
    page.get_by_label('kl', exact=True).locator('visible=true').check()
    page.locator('#dashboard').get_by_text('kl nats/seq').nth(1).wait_for()
    for path, refusal in (('../report.html', 'outside the folder'), ('out-sft/ckpt.pt', 'ends in .html'),
                          ('out/report.html', '')):
        page.get_by_label('report file').fill(path)
        press(page, 'Write the report')
        if refusal:
            refused(page, refusal)
    path = at(served, 'out', 'report.html')
    assert wait_for(lambda: os.path.exists(path))
    asked, disk = [], chromium.new_page(viewport=dict(width=390, height=800))
    disk.on('request', lambda r: asked.append(r.url))
    disk.goto(f'file://{path}')
    assert disk.locator('svg').count() > 5 and disk.locator('img').count() == 0
    assert asked == [f'file://{path}'] and disk.evaluate('document.documentElement.scrollWidth') <= 390
    disk.close()


# ---- doors
def test_doors_are_shut(served):
    assert answer(served, '') == 200 and answer(served, '', Host='evil.example') == 400
    start = json.dumps(dict(data=[''], fn_index=0, session_hash='x')).encode()
    for origin, want in (('http://evil.example', 403), ('null', 403), (served.url.rstrip('/'), 200)):
        how = dict(Content_Type='application/json', Origin=origin)
        assert answer(served, 'gradio_api/queue/join', start, **how) == want
    for path in ('/etc/passwd', at(served, 'rows.jsonl'), 'rows.jsonl', '../x', f'{app.HERE}/app.py'):
        assert answer(served, f'gradio_api/file={path}') in (403, 404)
    with socket.create_connection(('127.0.0.1', served.port), timeout=20) as s:  # it says it has 1 GB
        s.sendall(b'POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: %d\r\n'
                  b'Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n'
                  b'Content-Disposition: form-data; name="files"; filename="a.jsonl"\r\n\r\n' % (1 << 30))
        try:
            for _ in range((app.UPLOAD_MB + 56) * 4):
                s.sendall(b'a' * (1 << 18))
            said = s.recv(200)
        except (ConnectionError, TimeoutError):
            said = b'HTTP/1.1 413 (hung up)'
    assert b' 413' in said or b' 400' in said, said
    left = [os.path.join(d, f) for d, _, names in os.walk(at(served, 'uploads', '.tmp')) for f in names]
    assert sum(map(os.path.getsize, left)) < app.UPLOAD_MB << 20


def test_another_host_asks_for_a_password_and_an_empty_folder_says_so(chromium, tmp_path):
    server = Served(str(tmp_path), '--host=0.0.0.0', '--auth=me:secret')
    try:
        join = dict(body=b'{}', Content_Type='application/json')
        assert answer(server, 'config') == 401 == answer(server, 'gradio_api/queue/join', **join)
        page = chromium.new_page(viewport=dict(width=1280, height=900))
        page.set_default_timeout(TIMEOUT)
        page.goto(server.url)
        page.get_by_label('username').fill('me')
        page.get_by_label('password').fill('secret')
        page.get_by_role('button', name='Login').click()
        page.get_by_text('This folder holds no model and no run yet').wait_for()
        tab(page, 'Dashboard')
        page.get_by_text('No runs in this folder yet').locator('visible=true').first.wait_for()
        page.close()
    finally:
        server.kill()


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_nothing_is_cut(served, chromium, theme):
    page, shots = opened(chromium, served, color_scheme=theme), os.environ.get('APP_SHOTS')
    for name in ('Chat', 'Train', 'Finetune', 'Annotate', 'Dashboard'):
        tab(page, name)
        ready = dict(Train='#start', Annotate='#labelled', Dashboard='#dashboard h2')
        page.locator(ready.get(name, '#message, #upload')).locator('visible=true').first.wait_for()
        for width in (390, 1280):
            page.set_viewport_size(dict(width=width, height=800))
            page.wait_for_timeout(400)
            assert page.evaluate('document.documentElement.scrollWidth') <= width, (name, width)
            if shots:
                page.screenshot(path=os.path.join(shots, f'{name}-{width}-{theme}.png'), full_page=True)
    page.locator('#dashboard h2').first.wait_for()
    ink, paper = (page.evaluate(f'getComputedStyle(document.querySelector("{q}")).{style}')
                  for q, style in (('#dashboard h2', 'color'), ('body', 'backgroundColor')))
    ink, paper = (sum(map(int, re.findall(r'\d+', colour)[:3])) / 3 for colour in (ink, paper))
    assert (ink > 160) == (theme == 'dark') and abs(ink - paper) > 90
    assert page.evaluate('window.hacked') is None
    page.close()
