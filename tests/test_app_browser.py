"""app.py in a real browser: Debian's Chromium, driven by Playwright (pytest -m browser). One server, one folder of tiny models: chat, labels, refit, upload, doors."""
import os
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
from test_app import tiny, toy_rows, wait_for, write

import app
from model import GPT, GPTConfig

playwright.expect.set_options(timeout=30000)
pytestmark = pytest.mark.browser
CHROMIUM = next((p for p in ('/usr/bin/chromium', '/usr/bin/chromium-browser') if os.path.exists(p)), None)
FLAGS = ['--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync']
EVIL = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'


class Served:
    """The app as a process on a free port; kill() as the power cut does it."""

    def __init__(self, root):
        self.root = root
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            self.port = s.getsockname()[1]
        self.url = f'http://127.0.0.1:{self.port}/'
        self.start()

    def start(self):
        self.log = open(os.path.join(self.root, 'server.txt'), 'ab')
        begin = lambda: subprocess.Popen([sys.executable, os.path.join(app.HERE, 'app.py'), f'--folder={self.root}', f'--port={self.port}'], stdout=self.log, stderr=self.log)
        self.process = begin()

        def up():
            if self.process.poll() is not None:  # Gradio asks itself for its first page and gives up after 3 s on a busy machine
                self.process = begin()
            try:
                return urllib.request.urlopen(self.url, timeout=20).status == 200
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
        tiny(at(name), seed=i)
    value = GPT(GPTConfig.of('gpt2', n_layer=1, n_head=2, n_embd=32, vocab_size=257, block_size=96), 'scalar')
    tiny(at('out-ppo'), stage='ppo', seed=4, value=value.state_dict(), value_kind='policy', beta=0.1)
    tiny(at('out-reward'), 'scalar', 'reward', seed=5)
    write(at('out-ppo', 'log.jsonl'), dict(step=0, time=0.0, split='config', stage='ppo', max_iters=20),
          *[dict(step=i, time=float(i), split='train', score=i / 10, kl=i / 5, entropy=3 / (1 + i), clip_frac=0.1, len=30.0, loss=1.0) for i in range(20)], '{"step": 20, "ti')
    write(at('out-ppo', 'samples.jsonl'), dict(step=20, prompt='Q: hi\nA: ', completion=EVIL, score=1.0))
    write(at('out-reward', 'log.jsonl'), dict(step=0, time=0.0, split='config', stage='reward', max_iters=2), dict(step=2, time=9.0, split='eval', loss=0.6, accuracy=0.7))
    write(at('out-reward', 'report.json'), dict(accuracy=0.7, accuracy_95=[0.6, 0.8], pairs=100, ece=0.05, length_correlation=0.2, longer_is_chosen=0.6,
                                                 reliability=[[0.5, 0.6, 50, 0.55, 0.5], [0.6, 1.0, 50, 0.8, 0.9]], histogram=dict(edges=[-1, 0, 1], chosen=[40, 60], rejected=[60, 40])))
    write(at('out-dead', 'console.txt'), '$ python sft.py', 'Traceback (most recent call last):', f'RuntimeError: {EVIL}')
    write(at('out-dead', 'log.jsonl'), 'half a l')
    os.utime(at('out-dead', 'log.jsonl'), (1, 1))
    toy_rows(root)
    write(at('prompts.jsonl'), *[dict(prompt=f'Q: {i} plus {i}?\nA: ') for i in range(40)])
    write(at('pairs.jsonl'), *[dict(prompt=f'Q: {i} {EVIL}?\nA: ', a=f'first {i} {EVIL}', b=f'second {i}') for i in range(24)])
    write(at('tune.jsonl'), *[dict(messages=[dict(role='user', content=f'say {i}'), dict(role='assistant', content=f'{i}. {EVIL}')]) for i in range(30)], dict(prompt='no completion'))
    server = Served(str(root))
    yield server
    server.kill()


@pytest.fixture(scope='module')
def chromium():
    if CHROMIUM is None:
        pytest.skip('no Chromium: apt-get install chromium')
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope='module')
def page(served, chromium):
    """One page for all tests; at the end nothing from a model or a file has run in it, and it asked no other machine for anything."""
    page, outside = chromium.new_page(viewport=dict(width=1280, height=900)), []
    page.on('request', lambda r: outside.append(r.url) if '127.0.0.1' not in r.url and not r.url.startswith(('data:', 'blob:')) else None)
    page.set_default_timeout(60000)
    page.goto(served.url)
    page.get_by_role('tab', name='Chat', exact=True).wait_for()
    yield page
    assert page.evaluate('window.hacked') is None and outside == []


def tab(page, name):
    page.get_by_role('tab', name=name, exact=True).click()


def test_chat_four_models_side_by_side_and_tokens(page):
    tab(page, 'Chat')
    box = page.get_by_label('Models')
    for name in ('out-base', 'out-dpo'):
        box.click()
        page.get_by_role('option', name=name, exact=True).click()
    page.keyboard.press('Escape')
    sizes = []
    page.locator('#message textarea').fill(f'hello {EVIL}')
    page.locator('#message textarea').press('Enter')
    page.locator('#chat .side > div').nth(3).get_by_text('tok/s').wait_for()
    end = time.time() + 30
    while time.time() < end and (not sizes or page.locator('#chat').inner_text() != sizes[-1]):
        sizes.append(page.locator('#chat').inner_text())
        page.wait_for_timeout(150)
    assert [h.inner_text() for h in page.locator('#chat h4').all()] == ['out-sft', 'out-ppo', 'out-base', 'out-dpo']
    assert '<script>window.hacked=1</script>' in page.locator('#chat').inner_text() and page.locator('#chat img').count() == 0
    page.get_by_role('button', name='Colour the last answers').click()
    page.locator('#tokens .tok').first.wait_for()
    page.get_by_label('advantage').check()
    page.locator('#tokens .note', has_text='advantage').first.wait_for()
    title = page.locator('#tokens .tok').first.get_attribute('title')
    assert all(k in title for k in ('logp', 'kl', 'reward', 'value', 'advantage'))


def test_twenty_labels_by_keyboard_survive_a_kill_of_the_server(page, served):
    journal = app.Journal(served.root, 'labels')
    journal.load(os.path.join(served.root, 'pairs.jsonl'))
    tab(page, 'Annotate')
    for i, key in enumerate('abtsabbaab' + 'abtsabbaab'):
        page.locator('[data-pair]').wait_for()
        before = page.locator('[data-pair]').get_attribute('data-pair')
        page.keyboard.press(key)
        page.wait_for_function('old => document.querySelector("[data-pair]")?.dataset.pair !== old', arg=before)
        assert len(journal.state()[1]) == i + 1
        if i == 9:
            served.kill()
            served.start()
            page.reload()
            tab(page, 'Annotate')
            page.locator('[data-pair]').wait_for()
            assert page.locator('#labelled').inner_text() == '10'
    kinds = [m['label'] for m in journal.state()[1].values()]
    assert sorted(set(kinds)) == ['a', 'b', 'skip', 'tie'] and kinds.count('tie') == 2 and len(kinds) == 20
    page.keyboard.press('u')
    playwright.expect(page.locator('#labelled')).to_have_text('19')
    assert 'model_a' not in page.content() and page.locator('#pair img').count() == 0


def test_two_tabs_label_different_pairs(page, served, chromium):
    journal = app.Journal(served.root, 'labels')
    n = len(journal.state()[1])
    other = chromium.new_page()
    other.goto(served.url)
    tab(other, 'Annotate')
    other.locator('[data-pair]').wait_for()
    mine, theirs = (p.locator('[data-pair]').get_attribute('data-pair') for p in (page, other))
    assert mine != theirs
    page.keyboard.press('a')
    other.keyboard.press('b')
    assert wait_for(lambda: len(journal.state()[1]) == n + 2, 30)
    assert {journal.state()[1][mine]['label'], journal.state()[1][theirs]['label']} == {'a', 'b'}
    other.close()


def test_refit_on_the_labels_and_chat_again(page, served):
    tab(page, 'Annotate')
    page.get_by_label('steps', exact=True).fill('2')
    page.locator('#refit').click()
    page.locator('#refitted [data-refit=done]').wait_for(timeout=80000)
    tab(page, 'Chat')
    playwright.expect(page.locator('#chat h4').nth(1)).to_have_text('out-dpo-labels')


def test_finetune_upload_lint_and_refusals(page, served):
    tab(page, 'Finetune')
    page.locator('#upload input[type=file]').set_input_files(os.path.join(served.root, 'tune.jsonl'))
    page.locator('#upload').get_by_text('tune').first.wait_for()
    page.get_by_role('button', name='Check the file').click()
    page.locator('#looked .on').first.wait_for()
    seen = page.locator('#looked').inner_text()
    assert '31 rows' in seen and 'unreadable: 1 row' in seen and page.locator('#looked img').count() == 0


def test_doors_are_shut(served):
    def answer(path, host='127.0.0.1', body=None):
        request = urllib.request.Request(served.url + path, headers={'Host': host}, data=body)
        try:
            return urllib.request.urlopen(request, timeout=20).status
        except urllib.error.HTTPError as e:
            return e.code
    assert answer('') == 200 and answer('', 'evil.example') == 400
    for path in ('/etc/passwd', os.path.join(served.root, 'rows.jsonl'), 'rows.jsonl', '../x', os.path.join(app.HERE, 'app.py')):
        assert answer(f'gradio_api/file={path}') in (403, 404)
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
