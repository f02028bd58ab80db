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
decay = 0.5 # in [0, 1): of the average
rate = 1.0 # > 0: per second
kind = 'k1' # one of 'k1', 'k2': the estimator
batch_size = 4 # >= 1: rows
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

    def call(*args, config='', env=()):
        """config: the text of config/c.py, or bytes as they are."""
        (tmp_path / 'config' / 'c.py').write_bytes(config if isinstance(config, bytes) else config.encode())
        (tmp_path / 'c.json').write_text('{"max_iters": 1}')
        (tmp_path / 'c.yaml').write_text('max_iters: 1')
        r = subprocess.run([sys.executable, 'script.py', *args], cwd=tmp_path, capture_output=True, text=True,
                           env={**os.environ, **dict(env)}, encoding='utf-8', errors='replace')
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
    (['--max_iters', '3'], '', '--max_iters=10'),
    (['c.json'], '', "no config file 'c.json'"),
    (['c.yaml'], '', "no config file 'c.yaml'"),
    (['config/c.py'], '{"max_iters": 1}', 'config/c.py:1: SyntaxError: this line sets nothing'),
    (['config/c.py'], '# a comment\n\nmax_iters: 1', 'config/c.py:3: SyntaxError: this line sets nothing'),
    (['config/c.py'], 'max_iters == 1', 'config/c.py:1: SyntaxError: this line sets nothing'),
    (['config/c.py'], 'compile = True\nmax_iters =', 'config/c.py:2: SyntaxError: invalid syntax'),
    (['config/c.py'], 'import os\n\nmax_iters = 1 // 0', 'config/c.py:3: ZeroDivisionError: '),
    (['config/c.py'], 'def _f():\n    return _none\nmax_iters = _f()', "config/c.py:2: NameError: name '_none' is not"),
    (['config/c.py'], 'raise ValueError()', 'config/c.py:1: ValueError'),
    (['config/c.py'], 'import nothing_of_this_name', 'config/c.py:1: ModuleNotFoundError'),
    (['config/c.py'], b'name = "Gr\xf6\xdfe"', 'config/c.py:1: UnicodeDecodeError'),
    (['config/c.py'], b'max_iters = 1\0', 'config/c.py:1: SyntaxError'),
    (['config/c.py'], 'decay = 1.0', 'config/c.py: decay is 1.0, expected in [0, 1)'),
    (['--decay=-0.1'], '', 'the command line: decay is -0.1, expected in [0, 1)'),
    (['--rate=0'], '', 'rate is 0.0, expected > 0'),
    (['--batch_size=0'], '', 'batch_size is 0, expected >= 1'),
    (['--kind=k4'], '', "kind is 'k4', expected one of 'k1', 'k2'"),
    (['--rate=1e999'], '', 'rate is inf, expected > 0'),
    (['config/c.py'], 'learning_rate = float("nan")', 'learning_rate is nan, expected a finite number'),
])
def test_mistakes_are_one_line_and_exit_code_2(run, args, config, says):
    rc, out, err = run(*args, config=config)
    assert rc == 2 and says in err and err.count('\n') == 1 and not out


def test_what_is_allowed_passes(run):
    """The borders of ranges, a BOM, values so far in a config file, the home folder, text that is no ASCII."""
    config = b'\xef\xbb\xbf' + 'max_iters = batch_size * 3\n_n = [max_iters for _ in range(2)]\nname = "Größe"'.encode()
    rc, out, err = run('--batch_size=1', 'config/c.py', '--decay=0', '--rate=1e-9', '--kind=k2', config=config)
    assert (rc, err) == (0, '') and "'max_iters': 3" in out and "'name': 'Größe'" in out and "'decay': 0.0" in out
    for given, home in (('~/a', '/h/me/a'), ('~', '/h/me'), ('a,~/b', 'a,/h/me/b'), ('char:~/m', 'char:/h/me/m'), ('a~/b', 'a~/b')):
        assert f"'name': '{home}'" in run(f'--name={given}', env={'HOME': '/h/me'})[1]


@pytest.mark.parametrize('env', [{'PYTHONIOENCODING': 'ascii'}, {'PYTHONIOENCODING': 'latin-1'},
                                 {'LC_ALL': 'C', 'PYTHONCOERCECLOCALE': '0', 'PYTHONUTF8': '0'}], ids=['ascii', 'latin-1', 'C'])
def test_any_terminal_prints_any_text(run, env):
    rc, out, _ = run('config/c.py', config='name = "Größe \u4e2d"', env=env)
    assert rc == 0 and '\\u4e2d' in out


def test_a_bug_of_ours_keeps_its_traceback(run):
    rc, _, err = run('--name=bug')
    assert rc == 1 and 'Traceback' in err and 'KeyError' in err


def test_help_prints_docstring_keys_defaults_and_comments(run):
    rc, out, _ = run('--help')
    assert rc == 0 and 'What it does.' in out and '--learning_rate=0.001   # peak' in out and '--max_iters=10' in out


@pytest.mark.parametrize('script', SCRIPTS)
def test_every_number_has_a_range_that_its_default_keeps(script):
    """Each number's comment begins with a range, as --help prints it (a seed and a few scores have none)."""
    r = subprocess.run([sys.executable, os.path.join(ROOT, script), '--help'], capture_output=True, text=True)
    numbers = re.findall(r'^  --(\w+)=(-?[\d.e+-]+)(?:   # (.*))?$', r.stdout, re.M)
    assert len(numbers) > 3 or script == 'app.py'
    for key, default, note in numbers:
        if key in ('seed', 'missing_eos_value'):
            continue
        one = re.match(r'(>=?|<=?) ([\d.e-]+):', note)
        two = re.match(r'in ([\[(])(\S+), (\S+)([\])]):', note)
        assert one or two, f'{script}: {key} has no range'
        low, high = (two[2], two[3]) if two else (one[2], 'inf') if one[1][0] == '>' else ('-inf', one[2])
        low_open = two[1] == '(' if two else one[1] == '>'
        assert float(low) < float(default) or (float(low) == float(default) and not low_open), (script, key)
        assert float(default) <= float(high), (script, key)


@pytest.mark.parametrize('script', SCRIPTS)
def test_every_key_of_a_script_is_read(script):
    head, _, tail = open(os.path.join(ROOT, script)).read().partition('config_keys =')
    keys = [n.targets[0].id for n in ast.parse(head).body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
    body = tail.split('\n', 3)[-1]
    if 'Run(' in body:  # it hands its config to run.py's Run
        body += ' '.join(re.findall(r"config\[[^]]+\]|c\[[^]]+\]|get\([^)]+\)|(?<=_keys = ).*|(?<=fixed = ).*",
                                    open(os.path.join(ROOT, 'run.py')).read()))
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
