"""README.md is true: line counts, files, file:line references, commands that can run offline.

    python tests/test_readme.py        # rewrites line counts and line numbers after an edit
"""
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
README = os.path.join(ROOT, 'README.md')
REF = re.compile(r'`(\w+\.py):(\d+)` `([^`]+)`')  # `ppo.py:120` `def gae`: that line holds those words


def lines_of(name):
    with open(os.path.join(ROOT, name), encoding='utf-8') as f:
        return f.read().splitlines()


def counts():
    """(flat files, their lines) of the root folder."""
    files = sorted(f for f in os.listdir(ROOT) if f.endswith('.py'))
    return len(files), sum(len(lines_of(f)) for f in files)


def corrected(text):
    """The README with every number that a line count decides put right."""
    n, total = counts()
    text = re.sub(r'in \d+\nflat files|in \d+ flat files', f'in {n} flat files', text)
    text = re.sub(r'flat files, [\d,]+ lines', f'flat files, {total:,} lines', text)
    text = re.sub(r'`(\w+\.py)` \((\d+)\)', lambda m: f'`{m[1]}` ({len(lines_of(m[1]))})', text)

    def place(m):
        found = [i for i, line in enumerate(lines_of(m[1]), 1) if m[3] in line]
        assert found, f'{m[1]} has no line with {m[3]!r}'
        return f'`{m[1]}:{found[0]}` `{m[3]}`'
    return REF.sub(place, text)


def test_numbers_of_lines_are_true():
    text = open(README, encoding='utf-8').read()
    assert REF.search(text) and corrected(text) == text, 'run: python tests/test_readme.py'


def test_length_and_first_picture():
    text = open(README, encoding='utf-8').read()
    picture = re.search(r'!\[.*?\]\((.*?)\)', text)
    assert len(text.splitlines()) <= 310 and text[:picture.start()].count('\n') < 5 and os.path.getsize(os.path.join(ROOT, picture[1])) > 5000
    assert 'bash quickstart.sh' in '\n'.join(text.splitlines()[:40])


def test_named_files_exist():
    text = open(README, encoding='utf-8').read()
    names = set(re.findall(r'`([\w./-]+\.(?:py|sh|md|png|txt))`', text)) | set(re.findall(r'(?:python|bash) ([\w./-]+\.(?:py|sh))', text)) | set(re.findall(r'\b(config/\w+\.py)', text))
    own = {'my_reward.py'}
    assert len(names) > 20 and not [n for n in names - own if not n.startswith('out') and not os.path.exists(os.path.join(ROOT, n))]


def test_copied_files_need_no_more_than_the_table_says(tmp_path):
    """Each row of "Copy one file": the file and what is named before the semicolon, alone in a folder, import."""
    rows = re.findall(r'^\| (\w+\.py) \| ([^|;]*)', open(README, encoding='utf-8').read().split('## Copy one file')[1], re.M)
    assert {f for f, _ in rows} == {'kernels.py', 'actors.py', 'tokenizer.py', 'parallel.py', 'model.py', 'lora.py', 'infer.py'}
    for file, needs in rows:
        (tmp_path / file[:-3]).mkdir()
        for name in [file, *re.findall(r'\w+\.py', needs)]:
            shutil.copy(os.path.join(ROOT, name), tmp_path / file[:-3])
    code = ('import sys, os, importlib\nours = {f[:-3] for f in os.listdir(sys.argv[1]) if f.endswith(".py")}\nfor name in sys.argv[3:]:\n'
            '    sys.path.insert(0, os.path.join(sys.argv[2], name))\n    importlib.import_module(name)\n    del sys.path[0]\n'
            '    for m in ours & set(sys.modules):\n        assert os.path.dirname(sys.modules[m].__file__) == os.path.join(sys.argv[2], name)\n        del sys.modules[m]\n')
    r = subprocess.run([sys.executable, '-I', '-c', code, ROOT, str(tmp_path), *(f[:-3] for f, _ in rows)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-500:]


def test_commands_that_run_offline(tmp_path):
    """Every script of the README answers --help with exit code 0, and the first prepare script does its work."""
    text = open(README, encoding='utf-8').read()
    scripts = {s for s in re.findall(r'python (\w+\.py)', text) if 'config_keys' in open(os.path.join(ROOT, s), encoding='utf-8').read()}
    assert {'sft.py', 'reward.py', 'ppo.py', 'dpo.py', 'grpo.py', 'infer.py'} <= scripts
    for s in sorted(scripts):
        r = subprocess.run([sys.executable, os.path.join(ROOT, s), '--help'], capture_output=True, text=True, cwd=tmp_path)
        assert r.returncode == 0 and 'config keys:' in r.stdout, (s, r.stderr[-500:])
    r = subprocess.run([sys.executable, os.path.join(ROOT, 'data/toy/prepare.py'), f'--out_dir={tmp_path}'], capture_output=True, text=True)
    assert r.returncode == 0 and os.path.getsize(tmp_path / 'sft_train.jsonl') > 1e5
    assert subprocess.run(['bash', '-n', os.path.join(ROOT, 'quickstart.sh')]).returncode == 0


if __name__ == '__main__':
    with open(README, encoding='utf-8') as f:
        old = f.read()
    new = corrected(old)
    with open(README, 'w', encoding='utf-8') as f:
        f.write(new)
