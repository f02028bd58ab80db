"""README.md, CONTRIBUTING.md and docs/ are true: links, files, file:line references, commands that can run offline.

    python tests/test_readme.py        # rewrites line numbers after an edit
"""
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
README = os.path.join(ROOT, 'README.md')
PAGES = [README, os.path.join(ROOT, 'CONTRIBUTING.md'), *sorted(glob.glob(os.path.join(ROOT, 'docs', '*.md')))]
REF = re.compile(r'`(\w+\.py):(\d+)` `([^`]+)`')  # `ppo.py:120` `def gae`: that line holds those words
NAMED = (r'`((?:[\w-]+/)*[\w-]+\.(?:py|sh|md|png|txt|c))`', r'(?:python|bash) ([\w./-]+\.(?:py|sh))', r'\b(config/\w+\.py)')
OWN = {'my_reward.py', 'my_env.py', 'FILE.py', 'mine.py', 'console.txt'}  # a reader's own files, a run's


def text_of(page):
    with open(page, encoding='utf-8') as f:
        return f.read()


def lines_of(name):
    return text_of(os.path.join(ROOT, name)).splitlines()


def corrected(text):
    """A page with every line number put right."""
    def place(m):
        found = [i for i, line in enumerate(lines_of(m[1]), 1) if m[3] in line]
        assert found, f'{m[1]} has no line with {m[3]!r}'
        return f'`{m[1]}:{found[0]}` `{m[3]}`'
    return REF.sub(place, text)


@pytest.mark.parametrize('page', PAGES, ids=os.path.basename)
def test_what_a_page_names_exists(page):
    """Files, links, line numbers; no line too long to read."""
    text = text_of(page)
    assert corrected(text) == text, 'run: python tests/test_readme.py'
    assert max(map(len, text.splitlines())) <= 200
    names = {name for pattern in NAMED for name in re.findall(pattern, text)} - OWN
    missing = [name for name in names if not name.startswith('out') and not os.path.exists(os.path.join(ROOT, name))]
    links = [link.split('#')[0] for link in re.findall(r'\]\(([^)]+)\)', text) if '://' not in link]
    missing += [link for link in links if not os.path.exists(os.path.join(os.path.dirname(page), link))]
    assert not missing


def test_there_are_references_to_check():
    assert sum(len(REF.findall(text_of(page))) for page in PAGES) > 40


def test_the_readme_is_short():
    """About 180 lines, under 120 numbers, the first picture and the first command near its top."""
    text = text_of(README)
    picture = re.search(r'!\[.*?\]\((.*?)\)', text)
    assert len(text.splitlines()) <= 190 and len(re.findall(r'[0-9][0-9.,]*', text)) < 120
    assert text[:picture.start()].count('\n') < 5 and os.path.getsize(os.path.join(ROOT, picture[1])) > 5000
    assert 'bash quickstart.sh' in '\n'.join(text.splitlines()[:40])


def test_rows_of_the_pages_are_rows():
    """Each JSON line that a page shows is read by the stage that it is for."""
    from tokenizer import encode_pair, encode_prompt, encode_row, get_tokenizer
    tok, kinds = get_tokenizer('byte'), set()
    tok.config = {**tok.config, 'chat_template': "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
                                                 "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}>{% endif %}"}
    shown = [line for page in PAGES for block in re.findall(r'```json\n(.*?)```', text_of(page), re.S) for line in block.splitlines()]
    for row in map(json.loads, shown):
        encode = encode_pair if 'chosen' in row else encode_prompt if 'prompt' in row else encode_row
        kinds.add(encode)
        assert len(encode(row, tok)) > 1
    assert len(kinds) == 3


def test_copied_files_need_no_more_than_the_table_says(tmp_path):
    """The third column of the files' table: the file and what is named before the semicolon, alone in a folder, import."""
    table = text_of(README).split('## The files')[1].split('\n## ')[0]
    above, rows = [], []
    for name, needs in re.findall(r'^\| ([\w., ]+) \| [^|]* \| ([^|;]*)', table, re.M):
        if 'all above' in needs:
            needs = ' '.join(above)
        if re.fullmatch(r'\w+\.py', name) and needs.strip():
            rows.append((name, needs))
        above += re.findall(r'\w+\.(?:py|c)', name)
    assert {f for f, _ in rows} == {'kernels.py', 'actors.py', 'tokenizer.py', 'parallel.py', 'model.py', 'lora.py', 'infer.py'}
    for file, needs in rows:
        (tmp_path / file[:-3]).mkdir()
        for name in [file, *re.findall(r'\w+\.(?:py|c)\b', needs)]:
            shutil.copy(os.path.join(ROOT, name), tmp_path / file[:-3])
    code = ('import sys, os, importlib\nours = {f[:-3] for f in os.listdir(sys.argv[1]) if f.endswith(".py")}\nfor name in sys.argv[3:]:\n'
            '    sys.path.insert(0, os.path.join(sys.argv[2], name))\n    importlib.import_module(name)\n    del sys.path[0]\n'
            '    for m in ours & set(sys.modules):\n        assert os.path.dirname(sys.modules[m].__file__) == os.path.join(sys.argv[2], name)\n        del sys.modules[m]\n')
    r = subprocess.run([sys.executable, '-I', '-c', code, ROOT, str(tmp_path), *(f[:-3] for f, _ in rows)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-500:]


@pytest.mark.slow
def test_commands_that_run_offline(tmp_path):
    """Every script of the pages answers --help with exit code 0, and the first prepare script does its work."""
    scripts = {s for page in PAGES for s in re.findall(r'python (\w+\.py)', text_of(page)) if 'config_keys' in '\n'.join(lines_of(s))}
    assert {'sft.py', 'reward.py', 'ppo.py', 'dpo.py', 'kto.py', 'grpo.py', 'infer.py', 'serve.py', 'evaluate.py', 'run.py', 'app.py'} <= scripts
    for s in sorted(scripts):
        r = subprocess.run([sys.executable, os.path.join(ROOT, s), '--help'], capture_output=True, text=True, cwd=tmp_path)
        assert r.returncode == 0 and 'config keys:' in r.stdout, (s, r.stderr[-500:])
    r = subprocess.run([sys.executable, os.path.join(ROOT, 'data/toy/prepare.py'), f'--out_dir={tmp_path}'], capture_output=True, text=True)
    assert r.returncode == 0 and os.path.getsize(tmp_path / 'sft_train.jsonl') > 1e5
    assert subprocess.run(['bash', '-n', os.path.join(ROOT, 'quickstart.sh')]).returncode == 0


def a_folder_of_a_reader(here):
    """50 rows, a test file, a reward, and a tiny model of Qwen3's shape with a tokenizer and chat template."""
    from model import GPT, GPTConfig
    from tokenizer import get_tokenizer
    torch.manual_seed(0)
    shape = dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, head_size=16, n_inner=48, vocab_size=257, block_size=512)
    GPT(GPTConfig.of('qwen3', tie=True, eos_token_id=256, **shape)).save_pretrained(here / 'tiny-qwen3')
    tok = get_tokenizer('byte')
    template = ("{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
                "{% if add_generation_prompt %}<assistant>{% endif %}")
    tok.config = {**tok.config, 'chat_template': template}
    tok.save(here / 'tiny-qwen3')
    rows = [dict(prompt=[dict(role='system', content='Be short.'), dict(role='user', content=f'{i}+1?')], answer=str(i + 1)) for i in range(60)]
    for name, part in (('my.jsonl', rows[:50]), ('my_test.jsonl', rows[50:])):
        (here / name).write_text(''.join(json.dumps(row) + '\n' for row in part))
    (here / 'my_reward.py').write_text(re.search(r'```python\n(def reward.*?)```', text_of(README), re.S)[1])


@pytest.mark.slow
def test_the_walk_of_the_readme(tmp_path):
    """Its commands, in order, word for word but for the model's name and for few, short steps: lint, chat, train, evaluate, export, serve, ask."""
    a_folder_of_a_reader(tmp_path)
    block = re.search(r'```sh\n(python data/lint\.py my\.jsonl.*?)```', text_of(README), re.S)[1]
    commands = [line.split(' #')[0].strip() for line in block.splitlines()]
    short = {'grpo.py': ' --max_iters=2 --batch_size=8 --minibatch_size=8 --group_size=4 --max_new_tokens=8 --eval_iters=2', 'evaluate.py': ' --max_new_tokens=8',
             'infer.py': ' --max_new_tokens=8', 'serve.py': ' --port=0'}
    said = {}
    for command in commands:
        command = command.replace('Qwen/Qwen3-0.6B', 'tiny-qwen3')
        script = next((word for word in command.split() if word.endswith('.py')), 'curl')
        args = command.replace('python ', f'{sys.executable} {ROOT}/', 1) + short.get(script, '')
        if script == 'curl':
            args = args.replace('localhost:8000', said['address'])
        if script == 'serve.py':
            heard = tmp_path / 'server.txt'
            with open(heard, 'w', encoding='utf-8') as f:
                server = subprocess.Popen(args.split(), cwd=tmp_path, stdout=f, stderr=f, env={**os.environ, 'PYTHONUNBUFFERED': '1'})
            until = time.time() + 120
            while not (found := re.search(r'127\.0\.0\.1:\d+', heard.read_text())):
                assert server.poll() is None and time.time() < until, heard.read_text()
                time.sleep(0.1)
            said['address'] = found[0]
            continue
        r = subprocess.run(args, shell=True, cwd=tmp_path, input='Hello\n', capture_output=True, text=True, timeout=300)
        assert r.returncode == 0, (args, r.stdout[-500:], r.stderr[-1500:])
        said[script] = r.stdout
    server.kill()
    server.wait()
    assert 'done: ' in said['grpo.py'] and 'win rate' in said['evaluate.py'] and 'model.safetensors' in said['run.py']
    assert json.loads(said['curl'])['choices'][0]['message']['role'] == 'assistant'


if __name__ == '__main__':
    for page in PAGES:
        new = corrected(text_of(page))
        with open(page, 'w', encoding='utf-8') as f:
            f.write(new)
