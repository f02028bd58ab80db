"""The window on the project: talk to the models, watch and steer runs, label preferences, see what RLHF did. In the browser.

    python app.py                                  # http://127.0.0.1:7860, on the runs of this folder
    python app.py --folder=experiments --port=7000
    python app.py --report=out/report.html         # the dashboard as one file that opens anywhere, no server

Everything is read from and written to the files of the scripts (ckpt.pt, log.jsonl, samples.jsonl, report.json) and runs are the scripts
themselves as processes of their own: the app may be closed without harm, and shows runs that it did not start. It adds to a run's folder
console.txt (what the script printed) and run.json (its process), and beside them annotations/*.jsonl (labels, append-only) and uploads/.
Nothing outside --folder is read or written by request of a browser, except models named as on the hub (gpt2, Qwen/Qwen3-0.6B).
"""
import ast
import difflib
import functools
import glob
import html
import inspect
import io
import json
import math
import os
import random
import re
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import OrderedDict
from types import SimpleNamespace

try:
    import fcntl
except ImportError:  # Windows: launch() refuses there, the rest works
    fcntl = None

import torch

import evaluate
import infer
import lora
import ppo
import reward as rm
from data.judge import ask_judge
from data.lint import lint
from dataset import load_dataset
from tokenizer import encode_row, get_tokenizer
from model import all_rewards, GPT, GPTConfig
from run import load_model, open_model

# ---------------------------------------------------------------------------------------------------------------------
port = 7860 # in [0, 65535]: of the server
host = '127.0.0.1' # loopback: other machines cannot connect; any other host wants auth
share = False # a public address through Gradio's tunnel; wants auth
auth = '' # user:password
folder = '.' # the runs, models and data that it shows; nothing outside is touched
report = '' # write the dashboard to this file and stop
gallery_file = '' # write what the runs of the folder show of each failure to this file and stop: failures/gallery.json is made so
# ---------------------------------------------------------------------------------------------------------------------
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read()) # overrides from command line or config file
config = {k: globals()[k] for k in config_keys} # will be useful for logging
# ---------------------------------------------------------------------------------------------------------------------
HERE = os.path.dirname(os.path.abspath(__file__))
STAGES = ('sft', 'reward', 'ppo', 'dpo', 'grpo')
SKIP = {'node_modules', '__pycache__', 'venv', 'tests', 'assets', 'uploads', 'annotations'}
UPLOAD_MB = 200
esc = lambda text: html.escape(str(text), quote=True)

# ---------------------------------------------------------------------------------------------------------------------
# 1. the folder: paths, logs, runs, models


def inside(root, path):
    """Absolute path of `path` (relative ones start at root), links followed. ValueError where that leaves the folder."""
    root = os.path.realpath(root)
    full = os.path.realpath(os.path.join(root, str(path)))
    if full != root and not full.startswith(root.rstrip(os.sep) + os.sep):
        raise ValueError(f'{path} is outside the folder of this app: put the file into it, or start with --folder=... around both')
    return full


def kept(root, *parts):
    """Path of a file of the folder, '' (which opens as no file at all) where a link leads out of it."""
    try:
        return inside(root, os.path.join(*parts))
    except ValueError:
        return ''


def finite(x):
    """Whether a field of a log is a number that can be drawn."""
    return isinstance(x, (int, float)) and not isinstance(x, bool) and -1e300 < x < 1e300  # NaN, infinity and 10 ** 400 are not


def parse_rows(lines):
    """(rows, broken): the JSON objects among the lines; what is none is counted."""
    rows, broken = [], 0
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows.append(row)
        else:
            broken += bool(line.strip())
    return rows, broken


def read_rows(path):
    """parse_rows of a .jsonl that another process may be writing right now; none where there is no file."""
    try:
        with open(path, encoding='utf-8', errors='replace') as f:
            return parse_rows(f)
    except OSError:
        return [], 0


def read_json(path):
    """The object in a .json; {} where there is none, or half of one."""
    try:
        with open(path, encoding='utf-8') as f:
            got = json.load(f)
        return got if isinstance(got, dict) else {}
    except (OSError, ValueError):
        return {}


def tail(path, n=4000):
    """The last n bytes of a text file, whole lines, progress bars' carriage returns folded."""
    try:
        with open(path, 'rb') as f:
            cut = f.seek(0, 2) > n
            f.seek(-n if cut else 0, 2 if cut else 0)
            text = f.read().decode('utf-8', 'replace').split('\n', 1)[-1] if cut else f.read().decode('utf-8', 'replace')
    except OSError:
        return ''
    return '\n'.join(line.rsplit('\r', 1)[-1] for line in re.sub(r'\x1b\[[\d;]*m', '', text).split('\n'))


def folders(root, depth=3):
    """Folders under root, relative, down to `depth`; hidden ones, environments and caches left out."""
    for path, dirs, files in os.walk(root):
        here = os.path.relpath(path, root)
        level = 0 if here == '.' else here.count(os.sep) + 1
        dirs[:] = sorted(d for d in dirs if not d.startswith('.') and d not in SKIP and level < depth)
        if level:
            yield here, set(files)


def birth(pid):
    """When a process began, in words of the system: two processes with one id differ in it. '' when there is none, or only its zombie."""
    try:
        with open(f'/proc/{pid}/stat') as f:
            fields = f.read().rsplit(')', 1)[1].split()
        return '' if fields[0] in 'ZX' else fields[19]
    except FileNotFoundError:
        if os.path.isdir('/proc/self'):
            return ''
        return subprocess.run(['ps', '-o', 'lstart=', '-p', str(pid)], capture_output=True, text=True).stdout.strip()
    except (OSError, IndexError):
        return ''


_logs, _children = {}, []  # log files as far as they were read; processes of ours, polled so that none stays a zombie


def log_rows(path):
    """read_rows of a log that grows: only what is new since the last call is parsed (a run of days has 100 MB). A log begun anew is another file."""
    try:
        with open(path, 'rb') as f:
            stat = os.fstat(f.fileno())
            file, at, rows, broken = _logs.get(path, (0, 0, [], 0))
            if file != stat.st_ino or stat.st_size < at:
                at, rows, broken = 0, [], 0
            f.seek(at)
            whole, newline, half = f.read().rpartition(b'\n')
    except OSError:
        return [], 0
    new, bad = parse_rows(whole.decode('utf-8', 'replace').split('\n'))
    _logs[path] = stat.st_ino, at + len(whole + newline), rows + new, broken + bad
    return rows + new, broken + bad + bool(half.strip())


def run_of(root, name):
    """What is known of a run's folder: stage, config, rows (train and eval), broken lines, state, a word on it. Never raises on bad files."""
    path = inside(root, name)
    log, info = kept(root, name, 'log.jsonl'), read_json(kept(root, name, 'run.json'))
    mtime = os.stat(log).st_mtime if os.path.exists(log) else 0
    rows, broken = log_rows(log)
    cfg = next((r for r in rows if r.get('split') == 'config'), {})
    rows = [r for r in rows if r.get('split') in ('train', 'eval') and isinstance(r.get('step'), int) and finite(r['step']) and finite(r.get('time'))]
    run = SimpleNamespace(root=root, name=name, path=path, stage=cfg.get('stage', info.get('stage', '?')), config=cfg, rows=rows, broken=broken, info=info,
                          last=rows[-1]['step'] if rows else 0, total=int(cfg['max_iters']) if finite(cfg.get('max_iters')) else 0, mtime=mtime,
                          console=tail(kept(root, name, 'console.txt')).strip(), file=lambda file: kept(root, name, file))
    run.total = run.total or max([run.last, *(int(n) for n in re.findall(r'(?:iter \d+/|; )(\d+)(?: iterations)?', run.console))])
    run.state, run.note = _state(run)
    return run


def _state(run):
    for child in list(_children):
        if child.poll() is not None:
            _children.remove(child)
    if run.info.get('birth') and birth(run.info.get('pid')) == run.info['birth']:
        return 'running', ''
    words = run.console.split('\n')[-1][:400]
    if finite(run.info.get('stopped')) and run.info['stopped'] >= run.mtime - 1:
        return 'stopped', f'stopped at iteration {run.last}'
    if re.search(r'^error: |^Traceback |Error: ', run.console[-2000:], re.M) and not words.startswith('done:'):
        return 'crashed', words
    if run.rows and run.total and run.last >= run.total and run.rows[-1]['split'] == 'eval' or words.startswith('done:'):
        return 'finished', ''
    last = run.rows[-4:]
    pace = [b['time'] - a['time'] for a, b in zip(last, last[1:])]
    if run.mtime > time.time() - max([30, *(3 * p for p in pace)]):  # silent for no longer than its iterations take
        return 'running', 'started elsewhere'
    if not run.rows:
        return 'empty', 'no log yet' if not run.mtime else 'its log holds no row that can be read'
    return 'incomplete', f'ends at iteration {run.last}' + (f' of {run.total}' if run.total else '') + '; resume goes on from its checkpoint'


def find_runs(root):
    """Every folder with a log or a console, in order of their last word."""
    runs = [run_of(root, name) for name, files in folders(root) if files & {'log.jsonl', 'run.json'}]
    return sorted(runs, key=lambda r: -r.mtime)


def checkpoint_info(file):
    """(stage, head, base of an adapter, tokenizer) of a ckpt.pt without reading its weights; ValueError when it is none of ours."""
    try:
        ckpt = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
        return ckpt['config']['stage'], 'scalar' if any('score.weight' in k for k in ckpt['model']) else 'lm', (ckpt.get('lora') or {}).get('base'), ckpt['tokenizer']
    except Exception as e:  # torch raises a dozen kinds on a broken file; which one helps nobody
        raise ValueError(f'{file}: not a whole checkpoint of ours ({type(e).__name__})') from None


_infos = {}


def find_models(root):
    """{name: kind}, kind 'lm' | 'reward' | 'adapter' | 'broken': out_dirs with a checkpoint, Hugging Face and PEFT folders."""
    found = {}
    for name, files in folders(root):
        file = kept(root, name, 'ckpt.pt')
        if os.path.exists(file):
            key = (file, os.stat(file).st_mtime_ns)
            if key not in _infos:
                try:
                    _infos[key] = 'reward' if checkpoint_info(file)[1] == 'scalar' else 'lm'
                except ValueError:
                    _infos[key] = 'broken'
            found[name] = _infos[key]
        elif 'adapter_config.json' in files:
            found[name] = 'adapter'
        elif 'config.json' in files and any(f.endswith('.safetensors') for f in files):
            kinds = read_json(kept(root, name, 'config.json')).get('architectures') or ['']
            found[name] = 'reward' if 'SequenceClassification' in str(kinds[0]) else 'lm'
    return found


class Models:
    """Models in memory, the last few used; read anew when the file has changed since (a run goes on while one chats)."""

    def __init__(self, root, keep=8):
        self.root, self.keep, self.held, self.lock = root, keep, OrderedDict(), threading.Lock()
        self.device = 'cuda' if torch.cuda.is_available() else 'cpu'

    def get(self, name, head='lm'):
        """name -> model, tok, and for head 'lm' engine. head 'value': the value network of a PPO run. ValueError says what is wrong."""
        local = os.path.exists(os.path.join(self.root, name or '.'))
        if not name or not (local or re.fullmatch(r'[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?', name)) or '..' in name:
            raise ValueError(f'{name!r}: no model of this folder, and not a name of the hub')
        path = inside(self.root, name) if local else name
        for f in os.listdir(path) if os.path.isdir(path) and local else ():
            inside(self.root, os.path.join(path, f))  # a link to weights elsewhere is refused as the file itself would be
        file = next((f for f in (os.path.join(path, n) for n in ('ckpt.pt', 'adapter_model.safetensors', 'model.safetensors')) if os.path.exists(f)), path)
        stamp = os.stat(file).st_mtime_ns if os.path.exists(file) else 0
        with self.lock:
            if (name, head) not in self.held or self.held[name, head].stamp != stamp:
                self.held[name, head] = self._load(name, path, file, head)
                self.held[name, head].stamp = stamp
            self.held.move_to_end((name, head))
            while len(self.held) > self.keep:
                self.held.popitem(last=False)
            return self.held[name, head]

    def _base(self, base):
        return inside(self.root, base) if os.path.exists(os.path.join(self.root, base)) else base

    def _load(self, name, path, file, head):
        if head == 'value':
            return self._value(name, file)
        if file.endswith('adapter_model.safetensors'):
            base = read_json(os.path.join(path, 'adapter_config.json')).get('base_model_name_or_path')
            if not base:
                raise ValueError(f'{name}: the adapter does not say which base model it belongs to (base_model_name_or_path)')
            model, tok = load_model(self._base(base), head=head)
            model = lora.merge_lora(lora.load_lora(model, path))
        else:
            if file.endswith('.pt'):
                base = checkpoint_info(file)[2]
                if base:
                    self._base(base)
            model, tok = load_model(path, head=head)
        model, tok = model.eval().to(self.device), get_tokenizer(tok)
        engine = infer.Engine(model, tok, max_num_seqs=16) if head == 'lm' else None
        return SimpleNamespace(name=name, model=model, tok=tok, engine=engine)

    def _value(self, name, file):
        ckpt = torch.load(file, map_location='cpu', weights_only=True) if file.endswith('.pt') else {}
        if 'value' not in ckpt:
            raise ValueError(f'{name} has no value network: only a run of ppo.py leaves one')
        if ckpt['value_kind'] == 'trunk':
            raise ValueError(f'{name}: its value is a head on the policy trunk, which this view does not read; --value=reward or policy has one of its own')
        if ckpt['value_kind'] == 'reward':
            model = load_model(self._base(ckpt['config']['reward']), head='scalar')[0]
        else:
            model = GPT(GPTConfig(**ckpt['model_args']), 'scalar')
        model.load_state_dict(ckpt['value'])
        cfg = {k: ckpt['config'][k] for k in ('gamma', 'lam', 'kl_kind', 'temperature')}
        return SimpleNamespace(name=name, model=model.eval().to(self.device), beta=ckpt['beta'], **cfg)


# ---------------------------------------------------------------------------------------------------------------------
# 2. runs: the form of a script, its command, start, stop, resume


def script_form(stage):
    """The config block of a script as it stands there: [(group, key, default, comment)]. Read as text, nothing is run."""
    if stage not in STAGES:
        raise ValueError(f'{stage!r} is no stage: {", ".join(STAGES)}')
    with open(os.path.join(HERE, f'{stage}.py')) as f:
        lines = f.read().split('config_keys = ')[0].split('\n')
    out, group, block = [], '', False
    for line in lines:
        block = block or line.startswith('# ---')
        m = re.match(r'([a-zA-Z]\w*) = (.*?)(?:\s+#\s*(.*))?$', line) if block else None
        if m:
            try:
                out.append((group, m[1], ast.literal_eval(m[2]), m[3] or ''))
            except (ValueError, SyntaxError):
                continue  # computed, such as "cuda if there is one": the script's own default stands
        elif block and line.startswith('# ') and not line.startswith('# ---'):
            group = line[2:]
    return out


def configs_for(root, stage):
    """Config files, of the project and of the folder, that say of themselves `SCRIPT.py config/THIS.py`."""
    found = {}
    for base in (HERE, root):
        for path in sorted(glob.glob(os.path.join(base, 'config', '*.py'))):
            if f'{stage}.py config/{os.path.basename(path)}' in open(path, encoding='utf-8', errors='replace').read():
                found[os.path.join('config', os.path.basename(path))] = path
    return found


def config_values(path):
    """What a config file sets, as the configurator reads it: {key: value}."""
    try:
        return {k: v for k, v in runpy.run_path(path).items() if not k.startswith('_') and isinstance(v, (bool, int, float, str))}
    except Exception as e:
        raise ValueError(f'{os.path.basename(path)} does not run: {type(e).__name__}: {e}') from None


def typed(key, text, default):
    """What a form field holds, in the type of the script's default. ValueError as the configurator would put it."""
    if isinstance(default, str) or not isinstance(text, str):
        value = text
    else:
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError):
            value = text
    value = float(value) if isinstance(default, float) and type(value) is int else int(value) if type(default) is int and type(value) is float and value.is_integer() else value
    if type(value) is not type(default):
        raise ValueError(f'{key} wants {type(default).__name__} (default {default!r}), got {value!r}')
    return value


def command(root, stage, config_file='', overrides=()):
    """argv of a run. overrides {key: value or text}: those that the script (with its config file) has already are left out. Unknown keys,
    wrong types and paths outside the folder are refused: {'max_iters': '20'} -> [python, sft.py, config/sft_toy.py, --max_iters=20]."""
    defaults = {key: value for _, key, value, _ in script_form(stage)}
    argv, now = [sys.executable, os.path.join(HERE, f'{stage}.py')], dict(defaults)
    if config_file:
        known = configs_for(root, stage)
        if config_file not in known:
            raise ValueError(f'{config_file} is no config of {stage}.py: {", ".join(known) or "there is none"}')
        argv.append(config_file if os.path.exists(os.path.join(root, config_file)) else known[config_file])
        now.update(config_values(known[config_file]))
    for key, text in dict(overrides).items():
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, 1)
            raise ValueError(f'unknown key {key!r}' + (f', did you mean {near[0]!r}?' if near else ''))
        now_is, value = now[key], typed(key, text, defaults[key])
        now[key] = value
        if value != now_is:
            argv.append(f'--{key}={value}')
    for key, value in now.items():
        if isinstance(value, str) and key != 'lora_targets':
            for part in value.split(','):  # char:meta.json, path:weight
                inside(root, re.sub(r'^char:', '', part.strip()))
    if now['out_dir'] in ('', '.') or inside(root, now['out_dir']) == os.path.realpath(root):
        raise ValueError('out_dir must be a folder of its own inside the folder')
    return argv


def shown(argv):
    """argv as one would type it in the project's folder."""
    words = ['python', *(os.path.relpath(a, HERE) if a.startswith(HERE + os.sep) else a for a in argv[1:])]
    return shlex.join(words)


def launch(root, stage, out_dir, commands):
    """Starts the commands one behind the other in a process group of their own: neither Ctrl-C nor the end of the app reaches them, and stop()
    reaches all of them. What they print goes to console.txt."""
    path = inside(root, out_dir)
    os.makedirs(path, exist_ok=True)
    if os.name == 'nt':
        raise ValueError('runs are started and stopped as POSIX process groups: on Windows start the app inside WSL')
    if run_of(root, out_dir).state == 'running':
        raise ValueError(f'{out_dir} is being written by a run right now: stop it, or give another out_dir')
    argv = commands[0] if len(commands) == 1 else ['sh', '-c', ' && '.join(shlex.join(c) for c in commands)]
    with open(inside(root, os.path.join(path, 'console.txt')), 'ab') as console:
        console.write(''.join(f'$ {shown(c)}\n' for c in commands).encode())
        console.flush()
        child = subprocess.Popen(argv, cwd=root, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT, process_group=0,
                                 env=dict(os.environ, PYTHONUNBUFFERED='1'))
    _children.append(child)
    write_whole(os.path.join(path, 'run.json'), json.dumps(dict(pid=child.pid, birth=birth(child.pid), stage=stage, started=time.time(),
                                                                commands=[shown(c) for c in commands])))
    return child.pid


def write_whole(path, text):
    """The file is the old one or the new one, never half of it."""
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(path + '.tmp', path)


def stop(root, name, patience=5):
    """Ctrl-C, then SIGTERM, then SIGKILL, to the process group that this app (now or before) started for the run, and to no other."""
    run = run_of(root, name)
    pid = run.info.get('pid')
    if run.state != 'running' or not pid or birth(pid) != run.info.get('birth'):
        raise ValueError(f'{name}: no running process that this app started; stop it where it was started')
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(pid, sign)
        except ProcessLookupError:
            break
        end = time.time() + patience
        while time.time() < end and birth(pid) == run.info['birth']:
            for child in _children:
                child.poll()
            time.sleep(0.05)
        if birth(pid) != run.info['birth']:
            break
    write_whole(os.path.join(run.path, 'run.json'), json.dumps(dict(run.info, stopped=time.time())))


def resume_command(root, name, max_iters=None):
    """The command that goes on with a run, whoever started it: its own settings, from the first row of its log."""
    run = run_of(root, name)
    if run.stage not in STAGES or not run.config:
        raise ValueError(f'{name}: its log does not say what was run')
    if not os.path.exists(os.path.join(run.path, 'ckpt.pt')):
        raise ValueError(f'{name}: it has no checkpoint to go on from; start it anew')
    keys = {key: value for _, key, value, _ in script_form(run.stage)}
    same = {k: v for k, v in run.config.items() if k in keys and k not in ('init_from', 'overwrite', 'eval_only')}
    return command(root, run.stage, '', {**same, **(dict(max_iters=max_iters) if max_iters else {}), 'init_from': 'resume', 'out_dir': name})


# ---------------------------------------------------------------------------------------------------------------------
# 3. labels: an append-only journal


def lock(f):
    """Holds an open file against other processes that ask for it too, until it is closed. Where there is no flock (Windows) one app writes alone."""
    if fcntl:
        fcntl.flock(f, fcntl.LOCK_EX)


class Journal:
    """annotations/NAME.jsonl. Rows: {"kind": "pair", "id", "prompt", "a", "b", "model_a", "model_b"}, {"kind": "label", "id", "pair", "label":
    "a" | "b" | "tie" | "skip" | "edit", "by", "time"} and {"kind": "undo", "label": id}. Nothing is ever changed or removed. Every row is on
    the disk (fsync) before the page says so; several processes may append at once (flock); half a line left by a crash is fenced off."""

    def __init__(self, root, name):
        if not re.fullmatch(r'[\w-]{1,60}', name or ''):
            raise ValueError(f'{name!r}: a name of letters, digits, - and _ is wanted')
        self.path = inside(root, os.path.join('annotations', f'{name}.jsonl'))
        self.name, self.leases = name, {}
        os.makedirs(os.path.dirname(self.path), exist_ok=True)

    def append(self, *rows):
        """Rows get an id and the time; returned with them."""
        rows = [dict(dict(id=os.urandom(6).hex(), time=round(time.time(), 3)), **r) for r in rows]
        with open(self.path, 'a+b') as f:
            lock(f)
            if f.seek(0, 2):
                f.seek(-1, 2)
                if f.read(1) != b'\n':
                    f.write(b'\n')
            f.write(''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows).encode('utf-8', 'replace'))
            f.flush()
            os.fsync(f.fileno())
        return rows

    def state(self):
        """(pairs {id: row}, labels {pair id: its last label that was not undone}, broken lines)."""
        rows, broken = read_rows(self.path)
        has = lambda r, kind, *keys: r.get('kind') == kind and all(isinstance(r.get(k), str) for k in keys)
        undone = {r['label'] for r in rows if has(r, 'undo', 'label')}
        pairs = {r['id']: r for r in rows if has(r, 'pair', 'id', 'prompt', 'a', 'b')}
        labels = {}  # in the order of the file: clocks are too coarse to say which label was the last
        for r in rows:
            if has(r, 'label', 'id', 'pair', 'label') and r['pair'] in pairs and r['id'] not in undone and (r['label'] != 'edit' or has(r, 'label', 'of', 'text')):
                labels.pop(r['pair'], None)
                labels[r['pair']] = r
        return pairs, labels, broken

    def next(self, session, seconds=300):
        """The first pair without a label that no other browser tab was shown in the last minutes; None when all are labelled."""
        pairs, labels, _ = self.state()
        now, mine = time.time(), None
        for id in pairs:
            holder, until = self.leases.get(id, (session, 0))
            if id not in labels and (holder == session or until < now):
                mine = id
                break
        if mine:
            self.leases[mine] = (session, now + seconds)
        return pairs.get(mine)

    def label(self, pair, label, by, **more):
        if label not in ('a', 'b', 'tie', 'skip', 'edit'):
            raise ValueError(f'{label!r} is no label')
        return self.append(dict(kind='label', pair=pair, label=label, by=by, **more))[0]

    def undo(self, by):
        """Takes back the last label of this session; its pair comes again. None when there is none."""
        mine = [r for r in self.state()[1].values() if by in (r.get('by'), r.get('session'))]
        last = mine[-1] if mine else None
        if last:
            self.append(dict(kind='undo', label=last['id']))
            self.leases.pop(last['pair'], None)
        return last

    def preferences(self, besides=''):
        """(rows {"prompt", "chosen", "rejected"}, ties the same with "tie": true), without the labels by `besides`. An edited answer beats the one
        it was made from."""
        pairs, labels, _ = self.state()
        out, ties = [], []
        for id, mark in labels.items():
            if besides and mark.get('by') == besides:
                continue
            p, kind = pairs[id], mark['label']
            if kind in ('a', 'b'):
                out.append(dict(prompt=p['prompt'], chosen=p[kind], rejected=p['ab'.replace(kind, '')]))
            elif kind == 'edit' and mark.get('text') != p.get(mark.get('of')):
                out.append(dict(prompt=p['prompt'], chosen=mark['text'], rejected=p[mark['of']]))
            elif kind == 'tie':
                ties.append(dict(prompt=p['prompt'], chosen=p['a'], rejected=p['b'], tie=True))
        return out, ties

    def export(self):
        """Writes NAME.pref.jsonl and NAME.ties.jsonl beside the journal; (path, rows, ties)."""
        rows, ties = self.preferences()
        base = self.path[:-len('.jsonl')]
        for end, part in (('.pref.jsonl', rows), ('.ties.jsonl', ties)):
            write_whole(base + end, ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in part))
        return base + '.pref.jsonl', len(rows), len(ties)

    def load(self, path):
        """Imports a file of preference rows (labelled ones: kept so) or of {"prompt", "a", "b"} pairs to label -> (pairs, labels)."""
        new, marks = [], []
        for i, row in enumerate(load_dataset(path)):
            a, b = row.get('chosen', row.get('a')), row.get('rejected', row.get('b'))
            if not all(isinstance(x, str) for x in (row.get('prompt'), a, b)):
                raise ValueError(f'row {i + 1}: wanted "prompt" with "chosen" and "rejected" (or "a" and "b"), all text; it has {", ".join(row)}')
            swap = bool(random.getrandbits(1))  # blind here too
            id = os.urandom(6).hex()
            new.append(dict(kind='pair', id=id, prompt=row['prompt'], a=b if swap else a, b=a if swap else b, model_a='import', model_b='import'))
            if 'chosen' in row:
                marks.append(dict(kind='label', pair=id, label='tie' if row.get('tie') else 'b' if swap else 'a', by='import'))
        self.append(*new, *marks)
        return len(new), len(marks)


def make_pairs(models, journal, prompts, names, temperature=0.9, max_tokens=96, seed=0):
    """Two answers to each prompt, from one model or from two, in random order, into the journal. Equal answers are left out -> pairs made."""
    names, rng, rows = (list(names) * 2)[:2], random.Random(seed or os.urandom(8)), []
    answers = []
    for k, name in enumerate(names):
        m = models.get(name)
        params = [infer.SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=rng.getrandbits(30) + k) for _ in prompts]
        answers.append([c.text for c in m.engine.generate([infer.encode_prompt(p, m.tok) for p in prompts], params)])
    for prompt, x, y in zip(prompts, *answers):
        if x.strip() != y.strip():
            (a, ma), (b, mb) = rng.sample([(x, names[0]), (y, names[1])], 2)
            rows.append(dict(kind='pair', prompt=prompt, a=a, b=b, model_a=ma, model_b=mb))
    if rows:
        journal.append(*rows)
    return len(rows)


def score_texts(m, pairs):
    """Rewards of [(prompt, answer)] under reward model m, the end token behind each answer."""
    seqs = [infer.encode_prompt(p, m.tok) + m.tok.encode(a) + [m.tok.eot] * (m.tok.eot is not None) for p, a in pairs]
    room = m.model.config.block_size
    return all_rewards(m.model, [s[-room:] for s in seqs]).tolist()


def agreement(m, journal):
    """How often the reward model prefers what the labels prefer, those that it made itself left out: (right, of)."""
    rows, _ = journal.preferences(f'judge {m.name}')
    if not rows:
        return 0, 0
    r = score_texts(m, [(row['prompt'], row[k]) for row in rows for k in ('chosen', 'rejected')])
    return sum(a > b for a, b in zip(r[::2], r[1::2])), len(rows)


def judge_all(models, journal, judge, url='', key='', limit=200):
    """Labels the open pairs by a reward model of the folder, or by a model at an endpoint; yields (labels made, pairs asked, of). A pair without
    a verdict stays open; three such in a row: ValueError."""
    pairs, labels, _ = journal.state()
    todo = [p for id, p in pairs.items() if id not in labels][:limit]
    made, mute, by = 0, 0, f'judge {judge}'
    if todo and not url:
        r = score_texts(models.get(judge, 'scalar'), [(p['prompt'], p[k]) for p in todo for k in 'ab'])
        journal.append(*(dict(kind='label', pair=p['id'], label='a' if x > y else 'b' if y > x else 'tie', by=by) for p, x, y in zip(todo, r[::2], r[1::2])))
    if not todo or not url:
        yield len(todo), len(todo), len(todo)
        return
    for i, p in enumerate(todo):
        verdicts, said = ask_judge(url, p['prompt'], p['a'], p['b'], model=judge, key=key, tries=2, max_tokens=64)
        label = None if None in verdicts else {('A', 'B'): 'a', ('B', 'A'): 'b'}.get(verdicts, 'tie')
        if label:
            journal.label(p['id'], label, by)  # one by one: what has been paid for is kept when the endpoint goes away
        made, mute = (made + 1, 0) if label else (made, mute + 1)
        if mute == 3:
            raise ValueError(f'judge {url}: expected A, B or TIE, got {said} (the third pair in a row without a verdict): take another model')
        yield made, i + 1, len(todo)


def refit_commands(root, journal, base, algorithm, steps, tag):
    """[reward.py on the labels, then a few steps of ppo.py against it | of dpo.py on the labels] and the two out_dirs."""
    path, n, _ = journal.export()
    if n < 4:
        raise ValueError(f'{n} labels with a preference are too few: label at least 4 pairs (20 and more make sense)')
    data, block = os.path.relpath(path, os.path.realpath(root)), 96
    outs = [f'out-reward-{tag}', f'out-{algorithm}-{tag}']
    common = dict(init_from=base, overwrite=True)
    first = command(root, 'reward', '', dict(common, out_dir=outs[0], dataset=data, batch_size=min(16, n // 2), epochs=3.0, learning_rate=2e-4,
                                             normalize_n=64, max_new_tokens=block))
    if algorithm == 'dpo':
        second = command(root, 'dpo', '', dict(common, out_dir=outs[1], dataset=data, batch_size=min(16, n // 2), max_iters=steps, learning_rate=1e-4))
    else:
        prompts = os.path.join('annotations', f'{journal.name}.prompts.jsonl')
        rows = {p['prompt'] for p in journal.state()[0].values()}
        write_whole(inside(root, prompts), ''.join(json.dumps(dict(prompt=p)) + '\n' for p in sorted(rows)))
        second = command(root, 'ppo', '', dict(common, out_dir=outs[1], dataset=prompts, val_dataset=prompts, reward=outs[0], batch_size=32, minibatch_size=16,
                                               max_iters=steps, learning_rate=1e-4, max_new_tokens=block, temperature=1.0, eval_interval=max(1, steps // 2)))
    return [first, second], outs


# ---------------------------------------------------------------------------------------------------------------------
# 4. tokens: what policy, reference, reward model and value network say of each


@torch.no_grad()
def token_view(m, prompt, response, reference=None, judge=None, value=None):
    """[{text, logp, kl, reward, value, advantage}] of each response token; prompt, response are ids. Keys only where the model for it is given:
    kl = logp - log-prob under reference; reward = what the reward model would say if the answer ended here; value, advantage as in ppo.py."""
    dev, P = next(m.model.parameters()).device, len(prompt)
    idx = torch.tensor([list(prompt) + list(response)], device=dev)
    rows = [dict(text=m.tok.decode([t])) for t in response]
    for name, other in (('reference', reference), ('reward model', judge), ('value network', value)):
        if other is not None and other.model.config.vocab_size != m.model.config.vocab_size:
            raise ValueError(f'{name} {other.name} has another tokenizer than {m.name}: their tokens cannot be compared')
    T = value.temperature if value is not None else 1.0
    logp = m.model.logprobs(idx, T)[0, P - 1:].float()
    columns = dict(logp=logp)
    if reference is not None:
        columns['kl'] = logp - reference.model.logprobs(idx, T)[0, P - 1:].float()
    if judge is not None:
        columns['reward'] = judge.model(idx)[0][0, P:].float()
    if value is not None:
        columns['value'] = value.model(idx)[0][0, P - 1:-1].float()
        if judge is not None and reference is not None:
            mask = torch.ones(1, len(response), dtype=torch.bool, device=dev)
            per_token = ppo.token_rewards(columns['reward'][-1:], logp[None], (logp - columns['kl'])[None], mask, value.beta, value.kl_kind)
            columns['advantage'] = ppo.gae(per_token, columns['value'][None], mask, value.gamma, value.lam)[0][0]
    for key, numbers in columns.items():
        for row, x in zip(rows, numbers.tolist()):
            row[key] = x
    return rows


def tokens_html(rows, key):
    """The answer with each token on a tint: red below zero (or unlikely), blue above; all its numbers on hover."""
    if not rows or key not in rows[0]:
        return f'<div class=note>no {esc(key)}: choose the models that it needs</div>'
    most = max(max(abs(r[key]) for r in rows), 1e-6)
    out = []
    for r in rows:
        x = r[key] / (max(most, 4) if key == 'logp' else most)
        title = f"{r['text']!r}\n" + '\n'.join(f'{k} {v:+.3f}' for k, v in r.items() if k != 'text')
        tint = f'rgba(37,99,235,{min(0.6, 0.6 * x):.2f})' if x > 0 else f'rgba(220,38,38,{min(0.6, -0.6 * x):.2f})'
        text = esc(r['text']).replace('\n', '&#9166;\n') or '&#183;'
        out.append(f'<span class=tok title="{esc(title)}" style="background:{tint}">{text}</span>')
    total = sum(r[key] for r in rows)
    last = {'logp': f'sum {total:.2f} nats', 'kl': f'sum {total:.2f} nats', 'reward': f'at the end {rows[-1][key]:+.3f}'}
    last = last.get(key, f'from {min(r[key] for r in rows):+.2f} to {max(r[key] for r in rows):+.2f}')
    return f'<div class=answer>{"".join(out)}</div><div class=note>{esc(key)}: {last}; red is negative, blue positive; hover for the numbers</div>'


# ---------------------------------------------------------------------------------------------------------------------
# 5. the dashboard: pictures and tables out of the logs

COLOURS = ('#2563eb', '#dc2626', '#16a34a', '#d97706', '#9333ea', '#0891b2', '#db2777', '#65a30d', '#78716c', '#4f46e5')
INK = '#0a0b0c'  # replaced by the colour of the page's text: one picture for light and dark
UNITS = dict(score='reward', kl='KL, nats a sequence', loss='loss, nats', len='tokens an answer', tok_per_s='tokens/s', clip_frac='share of tokens clipped', pg='policy loss',
             vf='value loss', ended='share that ends', accuracy='accuracy', margin='reward margin', entropy='entropy, nats a token', grad_norm='gradient norm', lr='learning rate',
             time='seconds', step='iteration', chosen_logp_change='change of the chosen log-prob, nats', dead='share of dead groups', mismatch='nats a token')


def series(run, metric, x='step', split='train'):
    """([x], [y]) of a metric over a run: x 'step' | 'time' | 'kl'. Rows without a finite number are left out."""
    points = [(r[x], r[metric]) for r in run.rows if r['split'] == split and finite(r.get(x)) and finite(r.get(metric))]
    points = sorted(points) if x == 'kl' else points
    return [p[0] for p in points], [p[1] for p in points]


def smooth(ys, a):
    """Exponential moving average without the bias of its start: a = 0 is none. [1, 3], a = 0.5 -> [1, 2.333]."""
    out, s, w = [], 0.0, 0.0
    for y in ys:
        s, w = a * s + (1 - a) * y, a * w + (1 - a)
        out.append(s / w)
    return out


def picture(draw, xlabel='', ylabel='', title=''):
    """An SVG string: draw(ax) fills it. Text stays text, its colour is the page's."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError('the pictures need matplotlib: pip install -r requirements-app.txt') from None
    matplotlib.rcParams.update({'svg.fonttype': 'none', 'text.parse_math': False, 'font.size': 10, 'font.family': 'sans-serif'})
    fig = Figure(figsize=(4.7, 3.1))
    ax = fig.add_subplot()
    draw(ax)
    ax.set_xlabel(xlabel, color=INK)
    ax.set_ylabel(ylabel, color=INK)
    ax.set_title(title, color=INK, fontsize=11, loc='left')
    ax.spines[['top', 'right']].set_visible(False)
    for s in ax.spines.values():
        s.set_color(INK)
    ax.tick_params(colors=INK, labelcolor=INK)
    ax.grid(alpha=0.2)
    handles, labels = ax.get_legend_handles_labels()
    if len(labels) > 1:
        fig.legend(handles, labels, loc='outside lower center', ncols=1 if max(map(len, labels)) > 24 else 2, frameon=False, labelcolor=INK, fontsize=9)
    fig.set_layout_engine('constrained')
    out = io.StringIO()
    fig.savefig(out, format='svg', transparent=True)
    svg = out.getvalue()
    svg = re.sub(r'<metadata>.*?</metadata>', '', svg[svg.index('<svg'):], flags=re.S).replace(INK, 'currentColor')
    return re.sub(r'^<svg ([^>]*?)width="[^"]*"', r'<svg \1class=plot role=img', re.sub(r'(<svg [^>]*?)height="[^"]*"', r'\1', svg, count=1), count=1)


def curves(runs, metric, x='step', smoothing=0.0):
    """One metric of all runs, overlaid: train as a line, eval as dots. '' when no run has it."""
    runs = [(COLOURS[i % len(COLOURS)], r) for i, r in enumerate(runs) if series(r, metric, x)[0] or series(r, metric, x, 'eval')[0]]

    def draw(ax):
        for colour, run in runs:  # a run has one colour in all pictures of a page
            xs, ys = series(run, metric, x)
            ax.plot(xs, smooth(ys, smoothing), color=colour, lw=1.3, label=run.name)
            if smoothing:
                ax.plot(xs, ys, color=colour, lw=0.7, alpha=0.25)
            ax.plot(*series(run, metric, x, 'eval'), 'o', color=colour, ms=4)
    return picture(draw, UNITS.get(x, x), UNITS.get(metric, metric), metric) if runs else ''


def table_html(head, rows, caption=''):
    """A table that scrolls sideways where it must; on a telephone (CSS) a row is a block of "head: cell" lines. Cells are text, never markup."""
    cells = ''.join('<tr>' + ''.join(f'<td data-head="{esc(h)}">{esc(c)}</td>' for h, c in zip(head, row)) + '</tr>' for row in rows)
    return f'<p class=note>{esc(caption)}</p><div class=scroll><table><tr>{"".join(f"<th>{esc(h)}</th>" for h in head)}</tr>{cells}</table></div>'


def report_card(root, run):
    """Accuracy, ECE, length correlation of a reward model, its histograms and reliability diagram, from its report.json. '' without one."""
    r = read_json(run.file('report.json'))
    try:
        lo, hi = r['accuracy_95']
        head = table_html(('reward model', 'accuracy', '95 %', 'pairs', 'ECE', 'length correlation', 'longer is chosen'),
                          [(run.name, f"{r['accuracy']:.1%}", f'{lo:.1%} to {hi:.1%}', r['pairs'], f"{r['ece']:.3f}", f"{r['length_correlation']:+.2f}", f"{r['longer_is_chosen']:.0%}")],
                          'Report card of the reward model, on held-out pairs')
        h, rel = r['histogram'], r['reliability']
        hist = picture(lambda ax: [ax.stairs(h[k], h['edges'], fill=True, alpha=0.45, color=c, label=k) for k, c in (('chosen', COLOURS[0]), ('rejected', COLOURS[1]))],
                       'reward', 'answers', f'{run.name}: rewards')

        def reliability(ax):
            ax.plot([0.5, 1], [0.5, 1], '--', color='#888888', lw=1, label='calibrated')
            ax.plot([b[3] for b in rel], [b[4] for b in rel], 'o-', color=COLOURS[0], label=run.name)
        return head + f"<div class=plots>{hist}{picture(reliability, 'confidence in its choice', 'how often right', 'Reliability')}</div>"
    except (KeyError, TypeError, ValueError, IndexError):
        return ''


@functools.lru_cache(maxsize=4)
def gold_of(root):
    """(score(completion, row), {prompt: row}) of the toy world whose prompts lie in the folder, or (None, {}): its gold scorer has seen no training."""
    rows = [r for f in ('prompts_test', 'prompts_val', 'prompts_train') for r in read_rows(kept(root, 'data', 'toy', f'{f}.jsonl'))[0]]
    rows = {r['prompt']: r for r in rows if all(isinstance(r.get(k), str) for k in ('prompt', 'family', 'want')) and (r['family'] != 'story' or len(r['want'].split()) == 2)}
    return runpy.run_path(os.path.join(HERE, 'data', 'toy', 'gold.py'))['score'] if rows else None, rows


def win_rates(root, path, against='sft'):
    """{model: (share, low, high)}: how often its answer to a prompt gets a better gold mark than `against`'s; an equal mark is half a win."""
    samples, (gold, rows) = read_rows(path)[0], gold_of(root)
    samples = [(s, rows[s['prompt']]) for s in samples if gold and isinstance(s.get('prompt'), str) and s['prompt'] in rows and isinstance(s.get(against), str)]
    out = {}
    for name in [k for k in (samples[0][0] if samples else {}) if k not in ('prompt', against)]:
        marks = [(gold(s[name], r), gold(s[against], r)) for s, r in samples if isinstance(s.get(name), str)]
        if marks:
            out[name] = evaluate.interval([(a > b) + 0.5 * (a == b) for a, b in marks])
    return out


def memory_of(root, name):
    """The largest peak that a run printed (a resumed one prints several); '–' where nobody kept what it printed."""
    found = [float(x) for x in re.findall(r'peak memory ([\d.]+) GB', tail(kept(root, name, 'console.txt'), 1 << 20))]
    return f'{max(found):.2f} GB' if found else '–'


def comparison(root):
    """(table, plot) of data/toy/report.py's report.json and samples.jsonl, with win rate, tokens trained on and memory. '' without one."""
    out = plots = ''
    for name, files in folders(root):
        rep = read_json(kept(root, name, 'report.json')) if 'report.json' in files else {}
        rep = {k: v for k, v in rep.items() if isinstance(v, dict) and 'gold' in v}
        if not rep:
            continue
        wins, rows = win_rates(root, kept(root, name, 'samples.jsonl')), []
        tag = name[3:] if name.startswith('out') else ''
        num = lambda v, form: format(v, form) if finite(v) else '–'
        for model, r in rep.items():
            w, run = wins.get(model), 'out-' + re.sub(r'[^\w.-]', '_', model).replace('dpo_lora', 'lora') + tag
            tokens = sum(r['tokens'] for r in run_of(root, run).rows if finite(r.get('tokens')))
            rows.append((model, num(r.get('gold'), '.2f'), num(r.get('reward'), '.2f'), num(r.get('kl'), '.1f'), f'{w[0]:.0%} ({w[1]:.0%} to {w[2]:.0%})' if w else '–',
                         num(r.get('length'), '.0f'), num(r.get('valid'), '.0%'), num(r.get('seconds'), '.0f'), f'{tokens:,}' if tokens else '–', memory_of(root, run)))
        out += table_html(('model', 'gold, 0 to 10', 'reward model', 'KL, nats', 'wins against SFT (95 %)', 'tokens', 'ends well', 'seconds', 'tokens trained', 'peak memory'), rows,
                          f'The models of {name} on held-out prompts. Win: a better gold mark than the SFT model on the same prompt, equal marks half')

        def points(ax):
            for i, (model, r) in enumerate(rep.items()):
                if not all(finite(r.get(k)) for k in ('kl', 'gold', 'reward')):
                    continue
                x = math.sqrt(max(r['kl'], 0))
                ax.plot(x, r['gold'], 'o', color=COLOURS[i % len(COLOURS)], label=f'{model}')
                ax.plot(x, r['reward'], '^', color=COLOURS[i % len(COLOURS)], alpha=0.5)
        plots += picture(points, 'sqrt(KL to SFT)', 'gold ●, reward model ▲', f'{name}: gold and proxy of each model')
    return out, plots


def over_optimisation(run):
    """[(step, sqrt KL, proxy, gold)] at each evaluation: proxy and KL from the log, gold from the samples that the run kept (toy prompts only)."""
    gold, rows = gold_of(run.root)
    marks = lambda samples: [gold(s['completion'].replace('<|endoftext|>', ''), rows[s['prompt']]) for s in samples if gold and s['prompt'] in rows]
    by_step = {step: m for step, samples in samples_at(run).items() if (m := marks(samples))}
    return [(r['step'], math.sqrt(max(r['kl'], 0.0)), r['score'], sum(by_step[r['step']]) / len(by_step[r['step']]))
            for r in run.rows if r['split'] == 'eval' and r['step'] in by_step and finite(r.get('kl')) and finite(r.get('score'))]


def over_optimisation_plots(runs):
    """Proxy and gold against sqrt KL, Gao et al. 2022 (2210.10760) figure 1: where gold turns down while proxy climbs, the model games its judge."""
    out = ''
    for run in runs:
        points = over_optimisation(run) if run.stage in ('ppo', 'grpo') else []
        if len(points) < 2:
            continue
        _, x, proxy, gold = zip(*points)

        def draw(ax):
            ax.plot(x, proxy, 'o-', color=COLOURS[0], label='proxy: reward trained on')
            ax.plot(x, gold, 's-', color=COLOURS[3], label='gold, 0 to 10')
        out += picture(draw, 'sqrt(KL to where it started)', 'mark', f'{run.name}: over-optimisation')
    return out


def ends(run, metric, split='train'):
    """(first, last, smallest) of a metric; NaN, which is neither above nor below anything, where it was logged less than twice."""
    ys = series(run, metric, 'step', split)[1]
    return (ys[0], ys[-1], min(ys)) if len(ys) > 1 else (math.nan,) * 3


def samples_at(run):
    """{iteration: [sample]} of the answers that a run kept at its evaluations, in their order."""
    out = {}
    for s in read_rows(run.file('samples.jsonl'))[0]:
        if isinstance(s.get('step'), int) and finite(s['step']) and isinstance(s.get('prompt'), str) and isinstance(s.get('completion'), str):
            out.setdefault(s['step'], []).append(s)
    return dict(sorted(out.items()))


def distinct(samples):
    """Share of the word pairs of all answers that are different ones (distinct-2): ['a b c', 'a b'] -> 2 of 3."""
    pairs = [pair for s in samples for w in [s['completion'].replace('<|endoftext|>', '').split()] for pair in zip(w, w[1:])]
    return len(set(pairs)) / max(1, len(pairs))


def collapsed(run):
    shares = [distinct(samples) for samples in samples_at(run).values()]
    return len(shares) > 1 and shares[-1] < 0.5 * shares[0]


def hacked(run):
    points = over_optimisation(run)
    return bool(points) and points[-1][2] > points[0][2] and points[-1][3] < max(p[3] for p in points) - 1


# is a failure of failures/gallery.json there in this run?
SEEN = {
    'Reward hacking': hacked,
    'Mode collapse': collapsed,
    'Answers without end': lambda r: ends(r, 'ended', 'eval')[1] < 0.9,
    'Length grows': lambda r: ends(r, 'len', 'eval')[1] > 1.4 * ends(r, 'len', 'eval')[0],
    'KL runs away': lambda r: ends(r, 'kl')[1] > 25,
    'Dead groups': lambda r: ends(r, 'dead')[1] > 0.6,
    'Chosen falls too': lambda r: ends(r, 'chosen_logp_change', 'eval')[1] < -5,
    'Overfitting': lambda r: ends(r, 'loss', 'eval')[1] > 1.05 * ends(r, 'loss', 'eval')[2],
    'Sampler and trainer disagree': lambda r: ends(r, 'mismatch')[1] > 0.03}
# (name, metric of the curve, is it there?, why, a command that provokes it after quickstart.sh)
GALLERY = [(name, known['metric'], SEEN[name], known['why'], known['how'])
           for name, known in read_json(os.path.join(HERE, 'failures', 'gallery.json')).items()]


def words_of(run, metric):
    """Three answers of a run before and after, those that show it best; its last evaluations where it kept none."""
    steps = samples_at(run)
    if len(steps) < 2:
        said = [line[:400] for line in tail(run.file('console.txt'), 1 << 18).split('\n') if line.startswith('step ')]
        return '\n'.join([*said[:1], '...', *said[-2:]]) if len(said) > 3 else '\n'.join(said) or 'nobody kept what this run wrote'
    (a, first), *_, (b, last) = steps.items()
    before = {s['prompt']: s for s in first}
    best = {'ended': lambda s: '<|endoftext|>' not in s['completion'], 'len': lambda s: len(s['completion']), 'score': lambda s: s['score'] if finite(s.get('score')) else 0.0}
    gain = best.get(metric, lambda s: 0)  # no order: the first three
    picked = sorted({s['prompt']: s for s in last if s['prompt'] in before}.values(), key=lambda s: gain(before[s['prompt']]) - gain(s))[:3]
    return '\n\n'.join(f"{s['prompt'].strip()}\n{f'iteration {a}:':>15} {before[s['prompt']]['completion'][:240]}\n{f'iteration {b}:':>15} {s['completion'][:240]}" for s in picked)


def evidence(run, metric):
    """What a run shows of a failure, as kept in failures/gallery.json: {run, curves {label: [[iteration], [number]]}, text}."""
    parts = {metric: series(run, metric), f'{metric}, held out': series(run, metric, 'step', 'eval')}
    if metric == 'score' and (points := over_optimisation(run)):
        steps, _, proxy, gold = zip(*points)
        parts = {'proxy: the reward trained on': (steps, proxy), 'gold mark, 0 to 10': (steps, gold)}
    if metric == 'entropy':
        parts['different word pairs among all'] = list(samples_at(run)), [distinct(samples) for samples in samples_at(run).values()]
    thin = {label: [list(column)[::1 + len(xs) // 100] for column in (xs, ys)] for label, (xs, ys) in parts.items() if xs}
    return dict(run=run.name, curves=thin, text=words_of(run, metric))


def evidence_html(seen, metric):
    def draw(ax):
        for i, (label, (xs, ys)) in enumerate(seen['curves'].items()):
            ax.plot(xs, ys, 'o-' if len(xs) < 12 else '-', color=COLOURS[i], ms=4, lw=1.3, label=label)
        if all(y >= 0 for _, ys in seen['curves'].values() for y in ys):
            ax.set_ylim(bottom=0)
    return f'<div class=plots>{picture(draw, UNITS["step"], UNITS.get(metric, metric), seen["run"])}<pre>{esc(seen["text"])}</pre></div>'


def gallery(runs):
    """Each failure with the paragraph why, a curve and a text: of a run of the folder that shows it, else of the one that was kept."""
    out, recorded = '', read_json(os.path.join(HERE, 'failures', 'gallery.json'))
    for name, metric, there, why, how in GALLERY:
        hit = next((r for r in runs if there(r)), None)
        seen = evidence(hit, metric) if hit else recorded.get(name)
        word = f'<b>Seen in {esc(hit.name)}</b>' if hit else f'Not seen in these runs. {"Recorded from" if seen else "This provokes it:"} <code>{esc(how)}</code>'
        out += f'<section><h3>{esc(name)}</h3><p>{esc(why)}</p><p>{word}</p>{evidence_html(seen, metric) if seen else ""}</section>'
    return out


def write_gallery(root, path):
    """What the runs of a folder show of each failure (its own command's run first), to a file as failures/gallery.json -> the names found."""
    runs = find_runs(root)
    seen = {}
    for name, metric, there, why, how in GALLERY:
        for hit in sorted(filter(there, runs), key=lambda r: not how.endswith(r.name))[:1]:
            seen[name] = dict(metric=metric, why=why, how=how, **evidence(hit, metric))
    rounded = json.loads(json.dumps(seen), parse_float=lambda x: float(f'{float(x):.4g}'))
    write_whole(inside(root, path), json.dumps(rounded, ensure_ascii=False) + '\n')
    return list(seen)


def runs_html(runs):
    rows = [(r.name, r.stage, r.state, f'{r.last}/{r.total}' if r.total else r.last, f'{r.rows[-1]["time"]:.0f}' if r.rows else '–',
             r.note + (f' ({r.broken} broken log lines left out)' if r.broken else '')) for r in runs]
    return table_html(('run', 'stage', 'state', 'iteration', 'seconds', 'note'), rows) if rows else '<p>No runs in this folder yet: start one in the tab Train, or run bash quickstart.sh.</p>'


def dashboard(root, runs=None, metrics=('score', 'kl', 'loss', 'accuracy', 'len', 'clip_frac', 'entropy', 'ended', 'tok_per_s'), x='step', smoothing=0.6):
    """The whole page as HTML: table, over-optimisation, curves, report cards, failures."""
    runs = find_runs(root) if runs is None else runs
    gold_of.cache_clear()
    drawn = [c for c in (curves(runs, m, x, smoothing) for m in metrics) if c]
    cards = ''.join(report_card(root, r) for r in runs if r.stage == 'reward')
    (table, plots), hacking = comparison(root), over_optimisation_plots(runs)
    note = lambda there, words: '' if there else f'<p class=note>{words}</p>'
    return (f'<h2>Runs</h2>{runs_html(runs)}<h2>Before and after</h2>{table}{note(table, "No table yet: python data/toy/report.py writes it at the end of quickstart.sh.")}'
            f'<div class=plots>{plots}{hacking}</div>{note(hacking, "Over-optimisation: needs a ppo or grpo run on toy prompts with two evaluations and a KL in its log.")}'
            f'<h2>Curves</h2><div class=plots>{"".join(drawn)}</div>{note(drawn, "Nothing to draw: no run has logged any of these.")}'
            f'<h2>Reward model</h2>{cards}{note(cards, "No report of a reward model yet.")}<h2>Failures and why</h2>{gallery(runs)}')


CSS = '''
:root{--block-info-text-color:#52525b}.dark{--block-info-text-color:#a1a1aa}.dark input:is([type=checkbox],[type=radio]){border-color:#a1a1aa!important}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:12px;align-items:start}
.plot{width:100%;max-width:560px;height:auto;color:inherit}.scroll{overflow-x:auto;margin:8px 0}
.scroll table{border-collapse:collapse;font-size:14px;width:auto;color:inherit}.scroll td,.scroll th{padding:4px 10px;border:0!important;border-bottom:1px solid #8886!important;text-align:left;white-space:nowrap}
.scroll table,.scroll tr,.scroll tbody{border:0!important}.scroll td:first-child,.scroll td:last-child{white-space:normal;overflow-wrap:anywhere;min-width:90px}.scroll td:nth-child(6):last-child{min-width:220px}
.note{font-size:13px;opacity:.8}.answer,.bubble{white-space:pre-wrap;overflow-wrap:anywhere}.tok{border-radius:2px}
.side{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,280px),1fr));gap:10px}.side>div{border:1px solid #8886;border-radius:8px;padding:8px 10px;min-width:0}
.side h4{margin:0 0 6px}.bubble{border-radius:8px;padding:6px 9px;margin:4px 0;background:#8882}.bubble.user{background:#2563eb33}
.bad{color:#dc2626;white-space:pre-wrap;overflow-wrap:anywhere}.on{background:#16a34a44}.off{opacity:.65}
.page pre,pre.page{white-space:pre-wrap;overflow-wrap:anywhere;background:#8882;border-radius:8px;padding:8px;font-size:13px;max-height:380px;overflow-y:auto}
[data-testid=status-tracker] .error,[data-testid=status-tracker] .clear-status{display:none}
.page .console{display:flex;flex-direction:column-reverse}.label-wrap{text-align:left!important;gap:8px}.label-wrap .icon{flex:none;align-self:center}.label-wrap>span:first-child{flex:1;min-width:0;overflow-wrap:anywhere}
.page h2{margin:18px 0 6px;font-size:20px}.page h3{margin:12px 0 4px;font-size:16px}.page p{margin:4px 0;max-width:80ch}.page code{overflow-wrap:anywhere}
@media(max-width:480px){.tab-container button,.tab-wrapper button{padding:0 6px!important;font-size:13px!important}main.fillable,.gradio-container main{padding:8px!important}
.scroll table,.scroll tbody,.scroll tr,.scroll td{display:block;width:100%}.scroll tr:has(th){display:none}.scroll tr{padding:6px 0;border-bottom:1px solid #8886!important}
.scroll td{padding:1px 4px;border:0!important;white-space:normal!important;overflow-wrap:anywhere;min-width:0!important;box-sizing:border-box}.scroll td:empty{display:none}
.scroll td::before{content:attr(data-head) ": ";opacity:.7}.scroll td:first-child{font-weight:600}.scroll td:first-child::before{content:""}}
'''


def write_report(root, path):
    """The dashboard as one HTML file: pictures inlined, no script, nothing loaded from anywhere."""
    path = inside(root, path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    body = dashboard(root)
    write_whole(path, '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width,initial-scale=1">'
                f'<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'"><title>plainRLHF report</title><style>{CSS}'
                'body{font:15px/1.5 system-ui,sans-serif;margin:0 auto;max-width:1240px;padding:12px;color:#111;background:#fff}'
                '@media(prefers-color-scheme:dark){body{color:#eee;background:#16181d}}</style>'
                f'<body class=page><h1>plainRLHF: what the runs did</h1><p class=note>written {time.strftime("%Y-%m-%d %H:%M")}</p>{body}')
    return path


# ---------------------------------------------------------------------------------------------------------------------
# 6. the page. Text of models and files reaches it only through esc(); mistakes come as a message, never as a stack trace

KEYS = '''<script>
let labelled = '', since = 0
document.addEventListener('keydown', e => {
  if (e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|TEXTAREA|SELECT)$/.test(e.target.tagName) || e.target.isContentEditable) return
  const button = document.querySelector('#key-' + ({a: 'a', b: 'b', t: 'tie', s: 'skip', u: 'undo', e: 'edit'})[e.key.toLowerCase()])
  if (!button || button.offsetParent === null) return
  const pair = document.querySelector('[data-pair]')?.dataset.pair || ''
  if (pair && pair === labelled && Date.now() - since < 4000 && e.key !== 'u') return  // one key, one label: wait until the next pair is on the page
  labelled = 'ue'.includes(e.key.toLowerCase()) ? '' : pair; since = Date.now(); button.click()
})
</script>'''


def polite(fn):
    """A mistake of the user becomes a message on the page; anything else one too, and its traceback goes to the terminal."""
    import gradio as gr

    def said(e):
        if not isinstance(e, (ValueError, OSError)):
            traceback.print_exc()
            e = f'{type(e).__name__}: the terminal of the app has the rest'
        return gr.Error(esc(e), duration=20, print_exception=False)

    @functools.wraps(fn)
    def call(*args):
        try:
            return fn(*args)
        except Exception as e:
            raise said(e) from None

    @functools.wraps(fn)
    def stream(*args):
        try:
            yield from fn(*args)
        except Exception as e:
            raise said(e) from None
    return stream if inspect.isgeneratorfunction(fn) else call


def chat_html(history, names):
    """The turns of each model in a column of its own."""
    columns = []
    for name in names:
        turns = ''
        for turn in history:
            a = turn['answers'].get(name)
            if a is not None:
                rate = f"{len(a['ids'])} tokens, {len(a['ids']) / max(a['seconds'], 1e-3):.0f} tok/s{a['note']}"
                turns += f"<div class='bubble user'>{esc(turn['prompt'])}</div><div class=bubble>{esc(a['text'])}</div><div class=note>{esc(rate)}</div>"
        columns.append(f'<div><h4>{esc(name)}</h4>{turns}</div>')
    return f'<div class=side>{"".join(columns)}</div>' if columns else '<p class=note>Choose a model, up to four to compare.</p>'


def prompt_ids(m, history, name, system, plain, room):
    """Ids of the conversation of one model, its last turn open; turns that no longer fit are forgotten -> (ids, a word on it)."""
    turns = [t for t in history if name in t['answers']]
    for first in range(len(turns)):
        if plain:
            ids = infer.encode_prompt(turns[-1]['prompt'], m.tok)
            return ids, ''
        messages = [dict(role='system', content=system)] * bool(system)
        for t in turns[first:]:
            messages += [dict(role='user', content=t['prompt'])] + [dict(role='assistant', content=t['answers'][name]['text'])] * (t is not turns[-1])
        ids = m.tok.apply_chat_template(messages, add_generation_prompt=True)
        if len(ids) + room <= m.model.config.block_size:
            break
    return ids, f', {first} older turns no longer fit' if first else ''


def chat(models, names, prompt, history, system, plain, *sampling):
    """Streams (page, history): all models answer the same prompt with the same seed, a token each in turn."""
    temperature, top_p, top_k, min_p, penalty, max_tokens, seed = sampling
    if not names or len(names) > 4 or not prompt.strip():
        raise ValueError('choose one to four models and write a message')
    turn = dict(prompt=prompt, answers={n: dict(text='', ids=[], prompt_ids=[], seconds=0.0, note='') for n in names})
    history, live = [*history, turn], {}
    try:
        for n in names:
            m = models.get(n)
            ids, note = prompt_ids(m, history, n, system, plain, min(int(max_tokens), m.model.config.block_size // 2))
            params = infer.SamplingParams(max_tokens=int(max_tokens), temperature=temperature, top_p=top_p, top_k=int(top_k), min_p=min_p,
                                          repetition_penalty=penalty, seed=int(seed))
            turn['answers'][n].update(prompt_ids=ids, note=note)
            live[n] = m.engine, m.engine.add_request(ids, params, f'chat-{os.urandom(6).hex()}')
        drawn = 0.0
        while live:
            for n, (engine, request) in list(live.items()):
                t0 = time.time()
                for e in engine.step():
                    if e['request_id'] == request:
                        turn['answers'][n]['text'] += e['text']
                        turn['answers'][n]['ids'] += e['token_ids']
                        if e['finished']:
                            turn['answers'][n]['note'] += '' if e['finish_reason'] == 'stop' else ', cut at the limit'
                            live.pop(n)
                turn['answers'][n]['seconds'] += time.time() - t0
            if time.time() - drawn > 0.12:
                drawn = time.time()
                yield chat_html(history, names), history
    finally:  # the button Stop, a closed tab, an error of one model
        for engine, request in live.values():
            engine.abort(request)
    yield chat_html(history, names), history


def colour(models, names, history, reference, judge, value, key):
    """The last answers with their tokens tinted."""
    if not history:
        raise ValueError('chat first: the last answer is what gets coloured')
    given = dict(reference=models.get(reference) if reference else None, judge=models.get(judge, 'scalar') if judge else None, value=models.get(value, 'value') if value else None)
    out = ''
    for name, a in history[-1]['answers'].items():
        rows = token_view(models.get(name), a['prompt_ids'], a['ids'], **given) if a['ids'] else []
        out += f'<div><h4>{esc(name)}</h4>{tokens_html(rows, key)}</div>'
    return f'<div class=side>{out}</div>'


def chat_tab(gr, models, lms, rewards, values, lists):
    start_ = [n for n in ('out-sft', 'out-ppo') if n in lms] or lms[:1]
    names = gr.Dropdown(lms, value=start_, multiselect=True, max_choices=4, allow_custom_value=True, label='Models', info='up to four answer side by side; a hub name works too')
    page, history = gr.HTML(chat_html([], start_), elem_classes='page', elem_id='chat'), gr.State([])
    prompt = gr.Textbox(label='Message', lines=1, max_lines=8, elem_id='message', submit_btn=True, stop_btn=True)
    known = [m[1] for r in read_rows(kept(models.root, 'data', 'toy', 'prompts_val.jsonl'))[0] if (m := re.fullmatch(r'Q: (.*)\nA: ', str(r.get('prompt'))))]  # the template adds Q and A
    if known:
        gr.Examples(random.Random(0).sample(known, min(5, len(known))), prompt, label='questions of the toy world')
    with gr.Accordion('Sampling', open=False):
        system = gr.Textbox(label='System prompt')
        plain = gr.Checkbox(label='plain text: no chat template (for base models; only the last message is seen)')
        with gr.Row():
            sampling = [gr.Slider(0, 2, 0.7, step=0.05, label='temperature (0 = greedy)'), gr.Slider(0.05, 1, 1, step=0.05, label='top_p'), gr.Slider(0, 200, 0, step=1, label='top_k (0 = off)'),
                        gr.Slider(0, 1, 0, step=0.01, label='min_p'), gr.Slider(0.5, 2, 1, step=0.05, label='repetition penalty'),
                        gr.Slider(1, 2048, 96, step=1, label='tokens at most'), gr.Number(1337, label='seed', precision=0)]
    clear = gr.Button('New chat')
    gr.HTML('<h3>Token by token</h3>', elem_classes='page')
    with gr.Row():
        reference = gr.Dropdown(lms, value='out-sft' if 'out-sft' in lms else None, allow_custom_value=True, label='reference (for kl)')
        judge = gr.Dropdown(rewards, value=rewards[0] if rewards else None, label='reward model')
        value = gr.Dropdown(values, value=values[0] if values else None, label='value network of', allow_custom_value=True)
        key = gr.Radio(['logp', 'kl', 'reward', 'value', 'advantage'], value='logp', label='colour by')
    tint, view = gr.Button('Colour the last answers'), gr.HTML(elem_classes='page', elem_id='tokens')

    def talk(*given):  # the message leaves its box when the answer begins: one sent too early, or refused, is still there
        for i, shown_ in enumerate(chat(models, *given)):
            yield *shown_, gr.skip() if i else ''
    going = prompt.submit(polite(talk), [names, prompt, history, system, plain, *sampling], [page, history, prompt], concurrency_id='engine')
    prompt.stop(None, cancels=[going])
    clear.click(lambda n: ([], chat_html([], n)), names, [history, page])
    names.change(lambda h, n: chat_html(h, n), [history, names], page)
    shade = polite(lambda *a: colour(models, *a))
    tint.click(shade, [names, history, reference, judge, value, key], view)
    key.input(shade, [names, history, reference, judge, value, key], view)
    lists['lm'] += [names, reference]
    lists['reward'] += [judge]
    lists['value'] += [value]
    return names


def live_html(root, name, metrics=('score', 'kl', 'loss', 'accuracy', 'pg', 'vf', 'clip_frac', 'len', 'tok_per_s'), console=''):
    """State, remaining time, curves and console (of the run before it in one command, where that has it) of one run."""
    run = run_of(root, name)
    train = [r for r in run.rows if r['split'] == 'train']
    last = train[-20:]
    pace = (last[-1]['time'] - last[0]['time']) / max(1, last[-1]['step'] - last[0]['step']) if len(last) > 1 else 0
    left = f', about {(run.total - run.last) * pace:.0f} s left' if run.state == 'running' and pace and run.total else ''
    now = ' | '.join(f'{k} {v:,.0f}' if abs(v) >= 1000 else f'{k} {v:.3g}' for k, v in (train[-1] if train else {}).items() if k in metrics and isinstance(v, (int, float)))
    bad = 'bad' if run.state == 'crashed' else 'note'
    head = f'<p><b data-state={esc(run.state)}>{esc(name)}: {esc(run.state)}</b>, iteration <span id=at>{run.last}</span>{f" of {run.total}" if run.total else ""}{left}</p>'
    head += f'<p class={bad}>{esc(run.note)}</p><p class=note>{esc(now)}</p>'
    drawn = ''.join(curves([run], m, 'step', 0.3) for m in metrics)
    return f'{head}<div class=plots>{drawn}</div><pre class=console><span>{esc(run.console or console) or "no console: this run was started elsewhere"}</span></pre>'


def signature(root, *names):
    """Changes when a run starts, ends or logs, or when a named one prints: pictures are drawn anew only then."""
    runs = find_runs(root)
    return str([(r.name, r.state, r.last, len(r.rows)) for r in runs] + [(n, run_of(root, n).console[-200:]) for n in names])


def form(gr, root, stage, config_file, started):
    """The script's config block as fields, the command that they make, the button that starts it."""
    known = configs_for(root, stage)
    now = config_values(known[config_file]) if config_file in known else {}
    fields, group, box = {}, None, None
    for section, key, default, note in script_form(stage):
        if section != group:
            group = section
            with gr.Accordion(section or 'keys', open=section == 'I/O'):
                box = gr.Row()
        with box:
            shown_ = now.get(key, default)
            fields[key] = (gr.Checkbox(bool(shown_), label=key, info=note, interactive=True, elem_id=f'form-{key}', min_width=220) if isinstance(default, bool)
                           else gr.Textbox(str(shown_), label=key, info=note, interactive=True, elem_id=f'form-{key}', min_width=220))
    line = gr.Textbox(label='the command', interactive=False, elem_id='command', lines=2, value=shown(command(root, stage, config_file)))
    go = gr.Button('Start', variant='primary', elem_id='start')

    def argv(values):
        return command(root, stage, config_file, dict(zip(fields, values)))

    def preview(*values):
        try:
            return shown(argv(values))
        except ValueError as e:
            return f'not yet: {e}'

    def begin(*values):
        out = dict(zip(fields, values))['out_dir']
        launch(root, stage, out, [argv(values)])
        return gr.Dropdown([r.name for r in find_runs(root)], value=os.path.relpath(inside(root, out), root))
    for f in fields.values():
        f.change(preview, list(fields.values()), line, show_progress='hidden', trigger_mode='always_last')
    go.click(polite(begin), list(fields.values()), started)


def train_tab(gr, root, lists):
    with gr.Row():
        stage = gr.Dropdown(list(STAGES), value='sft', label='stage', min_width=240)
        conf = gr.Dropdown(['', *configs_for(root, 'sft')], value='config/sft_toy.py', label='config', info="'' = the script's own defaults", min_width=240)
    stage.change(lambda s: gr.Dropdown(['', *(c := list(configs_for(root, s)))], value=next((x for x in c if x.endswith(f'{s}_toy.py')), '')), stage, conf)
    names = [r.name for r in find_runs(root)]
    box = gr.Group()
    gr.HTML('<h3>Runs</h3>', elem_classes='page')
    table = gr.HTML(runs_html(find_runs(root)), elem_classes='page', elem_id='runs')
    with gr.Row():
        which = gr.Dropdown(names, value=names[0] if names else None, label='watch', elem_id='watch', min_width=240)
        iters = gr.Number(0, label='iterations when resumed', info='0 = as before', precision=0)
        halt, go_on = gr.Button('Stop', elem_id='stop'), gr.Button('Resume', elem_id='resume')
    view, seen = gr.HTML(elem_classes='page', elem_id='live'), gr.State('')
    with box:
        @gr.render(inputs=[stage, conf])
        def _(stage, conf):
            try:
                form(gr, root, stage, conf if conf in configs_for(root, stage) else '', which)
            except (ValueError, OSError) as e:
                gr.HTML(f'<p class=bad>{esc(e)}</p>')

    def tick(name, before):
        if not name:
            return gr.skip(), gr.skip(), gr.skip()
        now = signature(root, name)
        return (gr.skip(), gr.skip(), gr.skip()) if now == before else (runs_html(find_runs(root)), live_html(root, name), now)

    def halt_(name):
        stop(root, name or '')
        return ''

    def resume_(name, n):
        run = run_of(root, name or '')
        launch(root, run.stage, name, [resume_command(root, name, int(n) or None)])
        return ''
    gr.Timer(1.5).tick(polite(tick), [which, seen], [table, view, seen], show_progress='hidden')
    halt.click(polite(halt_), which, seen)
    go_on.click(polite(resume_), [which, iters], seen)
    lists['run'] += [which]


def check_upload(root, path, base):
    """Copies an uploaded file into uploads/ and looks it over -> (its path in the folder, page with the linter's words and five rows, trained tokens marked)."""
    if not path:
        raise ValueError('choose a file first')
    name = re.sub(r'[^\w.-]', '_', os.path.basename(inside(root, path)))[-80:].lstrip('.')
    if not re.search(r'\.(jsonl|json|csv)$', name):
        raise ValueError(f'{name}: .jsonl, .json or .csv is wanted')
    if os.path.getsize(path) > UPLOAD_MB << 20:
        raise ValueError(f'{name} is larger than {UPLOAD_MB} MB: put it into the folder and train on it there')
    kept = inside(root, os.path.join('uploads', name))
    os.makedirs(os.path.dirname(kept), exist_ok=True)
    with open(path, 'rb') as f, open(kept + '.tmp', 'wb') as g:
        while block := f.read(1 << 20):
            g.write(block)
    os.replace(kept + '.tmp', kept)
    try:
        ds = load_dataset(kept)
        if not len(ds):
            raise ValueError(f'{name} holds no row')
        part = ds.select(range(min(len(ds), 5000)))
        tok = get_tokenizer(base_tokenizer(root, base))
        said = lint(part, tok)
    except ValueError as e:
        os.remove(kept)
        raise ValueError(f'{name} cannot be read: {str(e).replace(kept, name)}') from None
    words = ''.join(f'<li class={"bad" if grave else "note"}>{"error: " if grave else ""}{esc(m)}</li>' for grave, m in said)
    rows = ''
    for row in part.select(range(min(5, len(part)))):
        try:
            ids, on = encode_row(row, tok)
            rows += '<pre>' + ''.join(f'<span class={"on" if t else "off"}>{esc(tok.decode([i]))}</span>' for i, t in zip(ids[:600], on)) + '</pre>'
        except ValueError as e:
            rows += f'<p class=bad>{esc(e)}</p>'
    more = f', the first {len(part)} looked over' if len(part) < len(ds) else ''
    return os.path.join('uploads', name), f'<h3>{esc(name)}: {len(ds)} rows{more}</h3><ul>{words}</ul><h3>Five rows; what is trained on is marked</h3>{rows}'


def base_tokenizer(root, base):
    if not base:
        raise ValueError('choose the model that is to be finetuned')
    path = inside(root, base)
    return checkpoint_info(os.path.join(path, 'ckpt.pt'))[3] if os.path.exists(os.path.join(path, 'ckpt.pt')) else path


def export_model(root, name):
    """NAME-export/: the model with its adapter merged in, as a Hugging Face folder; NAME-adapter/ too (PEFT) where the run trained one."""
    path, said = inside(root, name), []
    file = os.path.join(path, 'ckpt.pt')
    _, head, base, tokenizer = checkpoint_info(file)
    if base:
        ckpt = torch.load(file, map_location='cpu', weights_only=True)
        model, _ = open_model('', ckpt, head)
        lora.save_lora(model, path + '-adapter', base=base)
        said.append(f'{name}-adapter (PEFT)')
    load_model(path, head=head)[0].save_pretrained(path + '-export')
    get_tokenizer(tokenizer).save(path + '-export')
    return f'<p>written: {esc(", ".join([name + "-export (Hugging Face)", *said]))}</p>'


def finetune_tab(gr, root, lms, chat_names, lists):
    with gr.Row():
        file = gr.File(label=f'rows: .jsonl, .json or .csv, up to {UPLOAD_MB} MB', file_types=['.jsonl', '.json', '.csv'], type='filepath', elem_id='upload', height=140)
        base = gr.Dropdown(lms, value='out-sft' if 'out-sft' in lms else (lms or [None])[0], label='model to finetune')
    check, looked, kept = gr.Button('Check the file'), gr.HTML(elem_classes='page', elem_id='looked'), gr.State('')
    with gr.Row():
        how = gr.Radio(['all weights', 'LoRA'], value='LoRA', label='train')
        rank, iters = gr.Number(16, label='LoRA rank', precision=0), gr.Number(150, label='iterations', precision=0)
        rate, out = gr.Number(2e-3, label='learning rate'), gr.Textbox('out-finetuned', label='out_dir')
    with gr.Row():
        go, talk, export = gr.Button('Start finetuning', variant='primary'), gr.Button('Chat with it'), gr.Button('Merge and export')
    view, seen, done = gr.HTML(elem_classes='page', elem_id='tuned'), gr.State(''), gr.HTML(elem_classes='page', elem_id='exported')

    def begin(data, base, how, rank, iters, rate, out):
        if not data:
            raise ValueError('check a file first')
        if os.path.exists(inside(root, os.path.join(out, 'ckpt.pt'))) and (out == base or not run_of(root, out).info):
            raise ValueError(f'{out} holds a run that was not started here: give another out_dir, this one would be written over')
        keys = dict(dataset=data, init_from=base, out_dir=out, max_iters=int(iters), learning_rate=float(rate), min_lr=float(rate) / 10, lora_r=int(rank) if how == 'LoRA' else 0,
                    batch_size=8, warmup_iters=2, eval_interval=max(1, int(iters) // 2), eval_iters=2, overwrite=True)
        launch(root, 'sft', out, [command(root, 'sft', '', keys)])
        return ''

    def tick(out, before):
        if not re.fullmatch(r'[\w./-]+', out or '') or not os.path.exists(os.path.join(inside(root, out), 'run.json')):
            return gr.skip(), gr.skip()
        now = signature(root, out)
        return (gr.skip(), gr.skip()) if now == before else (live_html(root, out, ('loss', 'tok_per_s')), now)

    def to_chat(out, base):
        if out not in find_models(root):
            raise ValueError(f'{out} has no checkpoint yet')
        return gr.Dropdown(list(find_models(root)), value=[base, out])
    check.click(polite(lambda f, b: check_upload(root, f, b)), [file, base], [kept, looked])
    go.click(polite(begin), [kept, base, how, rank, iters, rate, out], seen)
    talk.click(polite(to_chat), [out, base], chat_names)
    export.click(polite(lambda o: export_model(root, o)), out, done)
    lists['lm'] += [base]
    gr.Timer(2).tick(polite(tick), [out, seen], [view, seen], show_progress='hidden')


def pair_html(journal, pair):
    """Progress, and the pair to label: blind, which model wrote what is not on the page."""
    pairs, labels, broken = journal.state()
    kinds = [m['label'] for m in labels.values()]
    count = ', '.join(f'{kinds.count(k)} {k}' for k in ('a', 'b', 'tie', 'skip', 'edit') if k in kinds)
    head = f'<p><b id=labelled>{len(labels)}</b> of {len(pairs)} pairs labelled{esc(": " + count if count else "")}{f" ({broken} broken lines left out)" if broken else ""}</p>'
    if not pair:
        return head + '<p class=note>No open pair: make or import some below.</p>'
    sides = ''.join(f'<div><h4>{k.upper()}</h4><div class=answer>{esc(pair[k].strip())}</div></div>' for k in 'ab')
    return f'{head}<div data-pair={esc(pair["id"])}><div class="bubble user">{esc(pair["prompt"])}</div><div class=side>{sides}</div></div>'


def annotate_tab(gr, root, models, lms, rewards, chat_names, lists):
    journals, session, current = {}, gr.State(lambda: os.urandom(4).hex()), gr.State(None)

    def of(name):
        if name not in journals:
            journals[name] = Journal(root, name)
        return journals[name]
    name = gr.Textbox('labels', label='journal', info='annotations/NAME.jsonl, append-only; every label is on the disk before the next pair comes')
    page = gr.HTML(elem_classes='page', elem_id='pair')
    with gr.Row():
        buttons = {k: gr.Button(text, elem_id=f'key-{k}', min_width=90) for k, text in (('a', 'A is better (a)'), ('b', 'B is better (b)'), ('tie', 'Tie (t)'), ('skip', 'Skip (s)'),
                                                                                        ('undo', 'Undo (u)'), ('edit', 'Edit (e)'))}
    with gr.Group(visible=False) as editor:
        side = gr.Radio(['a', 'b'], value='a', label='write a better version of')
        text, save = gr.Textbox(label='better answer', lines=3), gr.Button('Save the edit')

    def show(name, who):
        pair = of(name).next(who)
        return pair_html(of(name), pair), pair

    def mark(kind):
        def act(name, who, pair):
            if pair:
                of(name).label(pair['id'], kind, 'human', session=who)
            return show(name, who)
        return polite(act)

    def undo(name, who):
        of(name).undo(who)
        return show(name, who)
    for kind in ('a', 'b', 'tie', 'skip'):
        buttons[kind].click(mark(kind), [name, session, current], [page, current], show_progress='hidden', concurrency_id='journal')
    buttons['undo'].click(polite(undo), [name, session], [page, current], show_progress='hidden', concurrency_id='journal')
    buttons['edit'].click(lambda p: (gr.Group(visible=bool(p)), p['a'].strip() if p else '', 'a'), current, [editor, text, side])
    side.input(lambda p, s: p[s].strip() if p else '', [current, side], text)

    def keep(name, who, pair, side, text):
        if pair and text.strip() == pair[side].strip():
            raise ValueError('the answer is as it was: change it, or use a, b or tie')
        if pair and text.strip():
            of(name).label(pair['id'], 'edit', 'human', session=who, of=side, text=text)
        return *show(name, who), gr.Group(visible=False)
    save.click(polite(keep), [name, session, current, side, text], [page, current, editor], concurrency_id='journal')
    name.submit(polite(show), [name, session], [page, current])
    desk = SimpleNamespace(of=of, name=name, session=session, page=page, current=current, show=show)
    pair_sources(gr, root, models, desk, lms, lists)
    after_labels(gr, root, models, desk, lms, rewards, chat_names, lists)
    return show, [name, session], [page, current]


def pair_sources(gr, root, models, desk, lms, lists):
    """Pairs to label: answers of one or two models to prompts, or a file."""
    with gr.Accordion('Make or import pairs', open=False):
        writers = gr.Dropdown(lms, value=[n for n in ('out-sft', 'out-ppo') if n in lms], multiselect=True, max_choices=2, label='one model, or two')
        source = gr.Textbox('data/toy/prompts_val.jsonl', label='prompts: a file of rows with "prompt", or one prompt a line', lines=2)
        with gr.Row():
            many, heat = gr.Number(20, label='pairs', precision=0), gr.Slider(0.1, 2, 1.0, label='temperature')
            make = gr.Button('Make pairs', elem_id='make')
        given = gr.File(label='preference rows, or prompt/a/b rows', file_types=['.jsonl', '.json', '.csv'], type='filepath', elem_id='given', height=140)
        load = gr.Button('Import')

    def made(name, who, writers, source, many, heat):
        if not writers:
            raise ValueError('choose one or two models')
        if re.fullmatch(r'\S+\.(jsonl|json|csv)', source.strip()):
            rows = load_dataset(inside(root, source.strip()))
            prompts = [r['prompt'] for r in rows.shuffle(random.randrange(1 << 30)).select(range(min(int(many), len(rows)))) if isinstance(r.get('prompt'), str)]
        else:
            prompts = [p.replace('\\n', '\n') for p in source.split('\n') if p.strip()][:int(many)]  # \\n typed into a line is a line break of the prompt
        make_pairs(models, desk.of(name), prompts, writers, heat)
        return desk.show(name, who)

    def imported(name, who, path):
        if not path:
            raise ValueError('choose a file first')
        desk.of(name).load(inside(root, path))
        return desk.show(name, who)
    make.click(polite(made), [desk.name, desk.session, writers, source, many, heat], [desk.page, desk.current], concurrency_id='engine')
    load.click(polite(imported), [desk.name, desk.session, given], [desk.page, desk.current])
    lists['lm'] += [writers]


def after_labels(gr, root, models, desk, lms, rewards, chat_names, lists):
    """What labels are for: agreement with a reward model, a judge for the rest, export, and the one button that trains on them."""
    out = gr.HTML(elem_classes='page', elem_id='after')
    with gr.Row():
        judge = gr.Dropdown(rewards, value=rewards[0] if rewards else None, label='reward model', allow_custom_value=True, info='or the name of a model at the endpoint')
        url = gr.Textbox(label='endpoint of a judge (OpenAI-compatible)', placeholder='http://127.0.0.1:8000/v1', max_lines=1, min_width=260)
        key = gr.Textbox(label='its key', type='password')
    with gr.Row():
        agree, ask, halt, export = (gr.Button(text, min_width=120) for text in ('Agreement with the labels', 'Let it label the rest', 'Stop the judge', 'Export'))
    with gr.Row():
        base = gr.Dropdown(lms, value='out-sft' if 'out-sft' in lms else None, label='model to train')
        algorithm, steps = gr.Radio(['ppo', 'dpo'], value='dpo', label='with'), gr.Number(10, label='steps', precision=0)
        refit = gr.Button('Refit the reward model, train, chat again', variant='primary', elem_id='refit')
    view, seen, outs = gr.HTML(elem_classes='page', elem_id='refitted'), gr.State(''), gr.State([])

    def agreed(name, judge):
        right, n = agreement(models.get(judge, 'scalar'), desk.of(name))
        lo, hi = rm.wilson(right, n) if n else (0, 0)
        return f'<p>{esc(judge)} agrees with {right} of {n} labels' + (f': {right / n:.0%} ({lo:.0%} to {hi:.0%})</p>' if n else '; label some pairs first</p>')

    def asked(name, who, judge, url, key):
        made = 0
        try:
            for made, tried, of in judge_all(models, desk.of(name), judge, url.strip(), key.strip()):
                yield f'<p>{esc(judge)} labelled {made} pairs; {tried} of {of} open ones asked</p>', gr.skip(), gr.skip()
        except ValueError as e:
            yield f'<p class=bad>{esc(e)}</p><p>{made} labels that {esc(judge)} made before are kept</p>', *desk.show(name, who)
            raise
        yield gr.skip(), *desk.show(name, who)

    def exported(name):
        path, n, ties = desk.of(name).export()
        return f'<p>{n} preferences in {esc(os.path.relpath(path, root))}, {ties} ties beside it</p>'

    def refitted(name, base, algorithm, steps):
        commands, outs = refit_commands(root, desk.of(name), base, algorithm, int(steps), name)
        launch(root, 'reward', outs[0], commands)
        return outs, '', '', f'<pre>{esc(chr(10).join(map(shown, commands)))}</pre>'

    def tick(outs, base, before):
        if not outs:
            return gr.skip(), gr.skip(), gr.skip()
        now, was_ready = signature(root, *outs), before.endswith('ready')
        if now == before.removesuffix('ready'):
            return gr.skip(), gr.skip(), gr.skip()
        first = run_of(root, outs[0])  # its process makes both; the second may be finished from an earlier time
        ready = first.state == 'finished' and outs[1] in find_models(root) and run_of(root, outs[1]).state == 'finished'
        page = f'<p data-refit={"done" if ready else first.state}>{esc(outs[1])}: {"trained: chat with it in the first tab" if ready else esc(first.state)}</p>{live_html(root, outs[1] if run_of(root, outs[1]).rows else outs[0], console=first.console)}'
        return page, now + 'ready' * ready, gr.Dropdown([n for n, k in find_models(root).items() if k != 'reward'], value=[base, outs[1]]) if ready and not was_ready else gr.skip()
    lists['lm'] += [base]
    lists['reward'] += [judge]
    agree.click(polite(agreed), [desk.name, judge], out)
    asking = ask.click(polite(asked), [desk.name, desk.session, judge, url, key], [out, desk.page, desk.current])
    halt.click(polite(desk.show), [desk.name, desk.session], [desk.page, desk.current], cancels=[asking])
    export.click(polite(exported), desk.name, out)
    refit.click(polite(refitted), [desk.name, base, algorithm, steps], [outs, seen, view, out])
    gr.Timer(2).tick(polite(tick), [outs, base, seen], [view, seen, chat_names], show_progress='hidden')


def dashboard_tab(gr, root, lists):
    with gr.Row():
        which = gr.Dropdown([r.name for r in find_runs(root)], value=[], multiselect=True, label='runs', info='none = all', scale=2)
        x = gr.Radio(['step', 'time', 'kl'], value='step', label='over')
        soft = gr.Slider(0, 0.98, 0.6, step=0.02, label='smoothing')
        path = gr.Textbox('out/report.html', label='report file')
    with gr.Row():
        draw, keep = gr.Button('Draw', variant='primary', elem_id='draw'), gr.Button('Write the report')
    said, page = gr.HTML(elem_classes='page'), gr.HTML(elem_classes='page', elem_id='dashboard')

    def drawn(which, x, soft):
        return dashboard(root, [r for r in find_runs(root) if not which or r.name in which], x=x, smoothing=soft)
    act = polite(drawn)
    draw.click(act, [which, x, soft], page)
    x.input(act, [which, x, soft], page)
    lists['run'] += [which]
    keep.click(polite(lambda p: f'<p>written: {esc(os.path.relpath(write_report(root, p), root))}</p>'), path, said)
    return act, [which, x, soft], page


def build(gr, root):
    """The page: five tabs over one folder. What can be chosen is looked up anew at each load and each change of the tab."""
    models, lists = Models(root), dict(lm=[], reward=[], value=[], run=[])

    def listed():
        kinds = find_models(root)
        lms = [n for n, k in kinds.items() if k in ('lm', 'adapter')]
        return dict(lm=lms, reward=[n for n, k in kinds.items() if k == 'reward'],
                    value=[n for n in lms if 'ppo' in n or run_of(root, n).stage == 'ppo'], run=[r.name for r in find_runs(root)])

    def refresh():
        now = listed()
        return [gr.Dropdown(now[kind]) for kind, boxes in lists.items() for _ in boxes]
    now = listed()
    lms, rewards = now['lm'], now['reward']
    with gr.Blocks(title='plainRLHF', fill_width=True, delete_cache=(3600, 86400)) as page:  # what was uploaded is copied: Gradio's own goes after a day
        empty = '' if lms or rewards or now['run'] else '<p class=note>This folder holds no model and no run yet: start one in Train, or run bash quickstart.sh first.</p>'
        gr.HTML(f'<h1>plainRLHF</h1>{empty}', elem_classes='page')
        with gr.Tab('Chat') as talking:
            names = chat_tab(gr, models, lms, rewards, now['value'], lists)
        with gr.Tab('Train') as training:
            train_tab(gr, root, lists)
        with gr.Tab('Finetune') as tuning:
            finetune_tab(gr, root, lms, names, lists)
        with gr.Tab('Annotate') as labelling:
            show, ins, outs = annotate_tab(gr, root, models, lms, rewards, names, lists)
        with gr.Tab('Dashboard') as looking:
            act, dash_in, dash_out = dashboard_tab(gr, root, lists)
        for event in (page.load, *(t.select for t in (talking, training, tuning, labelling, looking))):
            event(polite(refresh), None, [box for boxes in lists.values() for box in boxes], show_progress='hidden')
        labelling.select(polite(show), ins, outs, show_progress='hidden')
        looking.select(act, dash_in, dash_out)
    return page


class SameOrigin:
    """ASGI: what a page of another site asks for is refused; it would start runs in the name of whoever reads that page."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        given = {k: v.decode('latin-1') for k, v in scope.get('headers', ())}
        if b'origin' in given and given[b'origin'].split('://')[-1] not in (given.get(b'host'), given.get(b'x-forwarded-host')):
            await send({'type': 'http.response.start', 'status': 403, 'headers': [(b'content-type', b'text/plain')]})
            await send({'type': 'http.response.body', 'body': b'this page is used from its own address only'})
        else:
            await self.app(scope, receive, send)


def serve(root, login):
    """Until Ctrl-C. Loopback names only as Host (a web page cannot reach in by renaming itself), no fonts or counters from elsewhere."""
    os.environ.update(GRADIO_TEMP_DIR=os.path.join(root, 'uploads', '.tmp'), GRADIO_ANALYTICS_ENABLED='False')
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    fonts = dict(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace'])
    doors = [Middleware(SameOrigin)] + [Middleware(TrustedHostMiddleware, allowed_hosts=['127.0.0.1', 'localhost', '[::1]'])] * (not login)
    build(gr, root).queue(default_concurrency_limit=1).launch(
        server_name=host, server_port=port, share=share, auth=login, css=CSS, head=KEYS, theme=gr.themes.Default(**fonts), show_error=False, ssr_mode=False,
        max_file_size=f'{UPLOAD_MB}mb', footer_links=[], app_kwargs=dict(middleware=doors))


def main():
    root = os.path.realpath(folder)
    if not os.path.isdir(root):
        raise ValueError(f'--folder={folder}: no such folder')
    os.chdir(root)  # checkpoints name their base models relative to where they were trained
    torch.set_num_threads(1)
    if report:
        print(f'written: {write_report(root, report)}')
        return
    if gallery_file:
        print(f'{gallery_file}: {", ".join(write_gallery(root, gallery_file)) or "no failure in these runs"}')
        return
    user, colon, password = auth.partition(':')
    if auth and not (user and password):
        raise ValueError('--auth wants user:password')
    if not auth and (share or host not in ('127.0.0.1', 'localhost', '::1')):
        raise ValueError(f'--share and --host={host} let other machines in, and they can start runs: they want --auth=user:password')
    try:
        import gradio
    except ImportError as e:
        raise ValueError(f'the app needs gradio ({e}): pip install -r requirements-app.txt') from None
    serve(root, (user, password) if auth else None)


if __name__ == '__main__':
    main()
