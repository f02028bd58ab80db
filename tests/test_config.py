"""configurator.py as a user meets it, and every key of every script and config."""
import ast
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = [f for f in ('sft.py', 'reward.py', 'ppo.py', 'dpo.py', 'grpo.py', 'infer.py', 'serve.py', 'app.py') if os.path.exists(os.path.join(ROOT, f))]
SCRIPT = '''"""What it does."""
import os
learning_rate = 1e-3 # peak
max_iters = 10
compile = False
name = 'x' # a name
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
config = {k: globals()[k] for k in config_keys}
def helper():
    return 42
if __name__ == '__main__':
    if name == 'boom':
        raise ValueError('got 3,\\n expected 4')
    if name == 'bug':
        {}['no such key']
    print(config, helper())
'''


@pytest.fixture
def run(tmp_path):
    (tmp_path / 'configurator.py').write_text(open(os.path.join(ROOT, 'configurator.py')).read())
    (tmp_path / 'script.py').write_text(SCRIPT)
    (tmp_path / 'config').mkdir()

    def call(*args, config=''):
        (tmp_path / 'config' / 'c.py').write_text(config)
        r = subprocess.run([sys.executable, 'script.py', *args], cwd=tmp_path, capture_output=True, text=True)
        return r.returncode, r.stdout, r.stderr
    return call


def test_overrides_from_file_and_command_line(run):
    rc, out, err = run('config/c.py', '--max_iters=3', '--compile', config='_base = 2\nlearning_rate = _base * 1\nname = "file"\nimport math')
    assert rc == 0 and "'learning_rate': 2.0" in out and "'max_iters': 3" in out and "'compile': True" in out and "'name': 'file'" in out


@pytest.mark.parametrize('args,config,says', [
    (['--learnign_rate=3'], '', "unknown config key 'learnign_rate' in the command line, did you mean 'learning_rate'?"),
    (['config/c.py'], 'learnign_rate = 3', "unknown config key 'learnign_rate' in config/c.py, did you mean 'learning_rate'?"),
    (['config/c.py'], 'helper = 3', "unknown config key 'helper'"),
    (['--max_iters=1.5'], '', 'max_iters wants int (default 10), got float 1.5'),
    (['--max_iters=many'], '', "max_iters wants int (default 10), got str 'many'"),
    (['--compile=3'], '', 'compile wants bool (default False), got int 3'),
    (['--name'], '', '--name wants a value'),
    (['nothere.py'], '', "no config file 'nothere.py'"),
    (['--name=boom'], '', 'error: got 3, expected 4'),
])
def test_mistakes_are_one_line_and_exit_code_2(run, args, config, says):
    rc, out, err = run(*args, config=config)
    assert rc == 2 and says in err and err.count('\n') == 1 and not out


def test_a_bug_of_ours_keeps_its_traceback(run):
    rc, _, err = run('--name=bug')
    assert rc == 1 and 'Traceback' in err and 'KeyError' in err


def test_help_prints_docstring_keys_defaults_and_comments(run):
    rc, out, _ = run('--help')
    assert rc == 0 and 'What it does.' in out and '--learning_rate=0.001   # peak' in out and '--max_iters=10' in out


@pytest.mark.parametrize('script', SCRIPTS)
def test_every_key_of_a_script_is_read(script):
    head, _, tail = open(os.path.join(ROOT, script)).read().partition('config_keys =')
    keys = [n.targets[0].id for n in ast.parse(head).body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
    body = tail.split('\n', 3)[-1]
    keys = [k for k in keys if not k.startswith('_') and not k.isupper()]
    assert keys and [k for k in keys if not re.search(rf'\b{k}\b', body)] == []
    assert len(keys) == len(set(keys)), 'a key is declared twice'


@pytest.mark.parametrize('config', sorted(f for f in os.listdir(os.path.join(ROOT, 'config')) if f.endswith('.py')))
def test_every_config_sets_keys_of_its_script(config):
    source = open(os.path.join(ROOT, 'config', config)).read()
    script = re.search(r'(?:python|torchrun.*?)\s+([\w/]+\.py)\s+config/' + re.escape(config), source)
    assert script, f'config/{config} says nowhere which command it is for'
    head = open(os.path.join(ROOT, script[1])).read().partition('config_keys =')[0]
    known = {n.targets[0].id for n in ast.parse(head).body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)}
    space = {'__file__': os.path.join(ROOT, 'config', config)}
    exec(source, space)
    keys = {k for k, v in space.items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))}
    assert keys and keys <= known, keys - known
