"""The window on the project: talk to the models, watch and steer runs, label preferences, see what RLHF did.

    python app.py                                  # http://127.0.0.1:7860, on the runs of this folder
    python app.py --folder=experiments --port=7000
    python app.py --report=out/report.html         # the dashboard as one file that opens anywhere, no server

Everything is read from and written to the files of the scripts (ckpt.pt, log.jsonl, samples.jsonl,
report.json), and runs are the scripts themselves as processes of their own: the app may be closed without
harm, and shows runs that it did not start. It adds to a run's folder console.txt (what the script printed),
run.json (which tab made it, its process) and .app.lock; beside them annotations/*.jsonl (labels, append-only)
and uploads/. Nothing outside --folder is read or written by request of a browser, except models named as on
the hub (gpt2, Qwen/Qwen3-0.6B), and inside nothing is overwritten that the app did not make.

    1. models in memory                       3. labels: pairs, judges, refit
    2. runs: a script's form, start, stop     4. tokens: what each model says of them
    5. the page, a tab a function             (runs as their files tell, dashboard: experiments/dashboard.py)
"""
import contextlib
import functools
import glob
import hashlib
import importlib
import inspect
import itertools
import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import torch

import files
import infer
import lora
import parallel
import ppo
from data.judge import ask_judge
from data.labels import Journal, read_rows, text_in
from data.lint import lint
from dataset import load_dataset
from experiments.dashboard import (
    dashboard, esc, find_runs, finite, folders, held, inside, kept, METRICS, read_json, RunFolder, runs_html,
    styles, unit, write_report)
from model import all_rewards, GPT, GPTConfig
from reward import wilson
from run import load_model, with_adapter
from tokenizer import encode_prompt, encode_row, get_tokenizer

# -----------------------------------------------------------------------------------------------------------
port = 7860 # in [1, 65535]: of the server
host = '127.0.0.1' # loopback: other machines cannot connect; any other host wants auth
share = False # a public address through Gradio's tunnel; wants auth
auth = '' # user:password
folder = '.' # the runs, models and data that it shows; nothing outside is touched
report = '' # write the dashboard to this file (.html) and stop
# -----------------------------------------------------------------------------------------------------------
config_keys = [k for k, v in globals().items()
               if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
# overrides from the command line or a config file
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
config = {k: globals()[k] for k in config_keys} # will be useful for logging
# -----------------------------------------------------------------------------------------------------------
HERE = os.path.dirname(os.path.abspath(__file__))
STAGES = ('sft', 'reward', 'ppo', 'dpo', 'kto', 'grpo')
UPLOAD_MB = 200
HUB_NAME = r'(?!.*\.\.)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?'


# -----------------------------------------------------------------------------------------------------------
# 1. models in memory

@functools.lru_cache(1000)
def checkpoint_kind(file: str, changed: int) -> str:
    try:
        weights = parallel.read_checkpoint(file, mmap=True)['model']
    except (ValueError, OSError):
        return 'broken'
    return 'reward' if any('score.weight' in name for name in weights) else 'lm'


def find_models(root: str) -> dict:
    """{name: 'lm' | 'reward' | 'adapter' | 'broken'}: out_dirs, Hugging Face and PEFT folders."""
    found = {}
    for name, names in folders(root):
        file = kept(root, name, 'ckpt.pt')
        if os.path.exists(file):
            found[name] = checkpoint_kind(file, os.stat(file).st_mtime_ns)
        elif 'adapter_config.json' in names:
            found[name] = 'adapter'
        elif 'config.json' in names and any(file.endswith('.safetensors') for file in names):
            made = read_json(kept(root, name, 'config.json')).get('architectures')
            found[name] = 'reward' if 'SequenceClassification' in str(made) else 'lm'
    return found


def base_of(path: str):
    """The model that an adapter's folder needs; None for a model of its own."""
    file = os.path.join(path, 'ckpt.pt')
    if os.path.exists(file):
        return (parallel.read_checkpoint(file, mmap=True).get('lora') or {}).get('base')
    return read_json(os.path.join(path, 'adapter_config.json')).get('base_model_name_or_path')


def with_bases(root: str, name: str) -> list:
    """What is read when a model is opened: its own path, and those of the bases below its adapters. A name
    of the hub stands for itself. ValueError where one of the files lies outside."""
    if not name or not os.path.exists(os.path.join(root, name)):
        if not re.fullmatch(HUB_NAME, name or ''):
            raise ValueError(f'{name!r}: no model of this folder, and not a name of the hub')
        return [name]
    path = inside(root, name)
    for file in os.listdir(path) if os.path.isdir(path) else ():
        inside(root, os.path.join(path, file))  # a link to weights elsewhere is as good as the file
    base = base_of(path)
    return [path, *(with_bases(root, base) if base and base != name else [])]


def opened(root: str, name: str, head: str = 'lm') -> SimpleNamespace:
    """A model in memory: name, model, tok, and for head 'lm' engine; head 'value': the value network of a
    PPO run. The last few are kept; one whose file has changed is read anew (a run may be going on)."""
    path = with_bases(root, name)[0]
    weights = [f for f in glob.glob(f'{glob.escape(path)}/*') if f.endswith(('.pt', '.safetensors'))]
    return _opened(root, name, path, head, max([os.stat(f).st_mtime_ns for f in weights], default=0))


@functools.lru_cache(8)
def _opened(root, name, path, head, changed):
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if head == 'value':
        return value_network(root, name, path, device)
    model, tok = load_model(path, device, head=head)
    entry = SimpleNamespace(name=name, model=model.eval(), tok=get_tokenizer(tok))
    if head == 'lm':
        entry.engine = infer.Engine(model, entry.tok, max_num_seqs=16)
    return entry


def value_network(root, name, path, device) -> SimpleNamespace:
    """name, model, and what PPO's advantages need: beta, gamma, lam, kl_kind, temperature."""
    file = os.path.join(path, 'ckpt.pt')
    ckpt = parallel.read_checkpoint(file) if os.path.exists(file) else {}
    if ckpt.get('value_kind') not in ('reward', 'policy'):
        raise ValueError(f'{name} has no value network of its own: only a run of ppo.py leaves one')
    if ckpt['value_kind'] == 'reward':
        model, _ = load_model(with_bases(root, ckpt['config']['reward'])[0], head='scalar')
    else:
        model = GPT(GPTConfig(**ckpt['model_args']), 'scalar')
    model.load_state_dict(ckpt['value'])
    how = {key: ckpt['config'][key] for key in ('gamma', 'lam', 'kl_kind', 'temperature')}
    return SimpleNamespace(name=name, model=model.eval().to(device), beta=ckpt['beta'], **how)


# -----------------------------------------------------------------------------------------------------------
# 2. runs: the form of a script, its command, start, stop, resume


def script_form(stage: str) -> list:
    """The config block of a script: [(group, key, default, comment)], as `python STAGE.py --help` has it."""
    if stage not in STAGES:
        raise ValueError(f'{stage!r} is no stage: {", ".join(STAGES)}')
    script = importlib.import_module(stage)
    form, group = [], ''
    for line in inspect.getsource(script).split('config_keys = ')[0].split('\n'):
        key, _, rest = line.partition(' = ')
        if line.startswith('# ') and not line.startswith('# --'):
            group = line[2:]
        elif key in script.config_keys:
            comment = re.sub(r"^('[^']*'|[^#'])*#?\s*", '', rest)
            form.append((group, key, getattr(script, key), comment))
    return form


def configs_for(root: str, stage: str) -> dict:
    """{name: path} of configs, of project and folder, that say `STAGE.py config/THIS.py` of themselves."""
    found = {}
    for path in [*sorted(glob.glob(f'{HERE}/config/*.py')), *sorted(glob.glob(f'{root}/config/*.py'))]:
        name = f'config/{os.path.basename(path)}'
        with open(path, encoding='utf-8', errors='replace') as f:
            if f'{stage}.py {name}' in f.read():
                found[name] = path
    return found


def settings(root: str, stage: str, config_file: str = '') -> dict:
    """{key: value} of a script under a config file, which runs with the defaults in sight."""
    values = {key: default for _, key, default, _ in script_form(stage)}
    known = configs_for(root, stage)
    if config_file and config_file not in known:
        raise ValueError(f'{config_file} is no config of {stage}.py: {", ".join(known) or "there is none"}')
    if config_file:
        try:
            space = runpy.run_path(known[config_file], values)
        except Exception as e:  # whatever a user's file may do
            raise ValueError(f'{config_file} does not run: {type(e).__name__}: {e}') from None
        values = {key: space[key] for key in values}
    return values


def command(root: str, stage: str, config_file: str = '', **keys) -> list:
    """argv of a run, its keys where they differ from script and config: max_iters='20' -> [python, sft.py,
    config/sft_toy.py, --max_iters=20]. Whether a value is right the script says; that no path leads out of
    the folder is looked at here."""
    now = settings(root, stage, config_file)
    argv = [sys.executable, os.path.join(HERE, f'{stage}.py')]
    if config_file:
        mine = os.path.exists(os.path.join(root, config_file))
        argv.append(config_file if mine else configs_for(root, stage)[config_file])
    for key, value in keys.items():
        if str(value) != str(now.get(key)):
            argv.append(f'--{key}={value}')
        for part in str(value).split(','):  # char:meta.json; the configurator makes ~ the home folder
            inside(root, os.path.expanduser(re.sub('^char:', '', part.strip())))
    return argv


def shown(argv: list) -> str:
    """argv as one would type it in the project's folder."""
    words = [os.path.relpath(word, HERE) if word.startswith(HERE + os.sep) else word for word in argv[1:]]
    return shlex.join(['python', *words])


def claim(root: str, tab: str, out_dir: str, reads: list, asked: bool) -> RunFolder:
    """The folder that a run of `tab` may write: a new one, one of a run that saved nothing yet, or one that
    the same tab made; asked: the user said that it goes on or is replaced. ValueError for any other."""
    run = RunFolder(root, out_dir)
    if run.path == os.path.realpath(root):
        raise ValueError('out_dir must be a folder of its own inside the folder')
    if run.state == 'running':
        raise ValueError(f'{out_dir} is being written by a run right now: stop it, or give another out_dir')
    there = set(os.listdir(run.path)) if os.path.isdir(run.path) else set()
    if there and not there & {'ckpt.pt', 'log.jsonl', 'run.json', 'console.txt'}:
        raise ValueError(f'{out_dir} holds files, but no run: give another out_dir')
    local = [name for name in reads if os.path.exists(os.path.join(root, name))]
    read = [path for name in local for path in with_bases(root, name) if os.path.exists(path)]
    if there and any(os.path.samefile(run.path, path) for path in read):
        raise ValueError(f'{out_dir} is read by this run: it cannot be written too, give another out_dir')
    if 'ckpt.pt' in there and not asked and not run.made_by(tab):
        raise ValueError(f'{out_dir} already holds a run that this tab did not make: give another out_dir')
    return run


def launch(root: str, tab: str, *jobs, asked: bool = False):
    """Starts jobs (stage, config file, {key: value}) one behind the other in a process group of their own:
    neither Ctrl-C nor the end of the app reaches them, stop() reaches all. They hold .app.lock in each
    out_dir as long as one of them lives; what they print goes to console.txt of the first."""
    if os.name == 'nt':
        raise ValueError('runs are process groups, as POSIX has them: on Windows start the app inside WSL')
    commands, runs, locks = [], [], []
    for stage, config_file, keys in jobs:
        argv = command(root, stage, config_file, **keys)
        out_dir = keys.get('out_dir') or settings(root, stage, config_file)['out_dir']
        reads = [keys[key] for key in ('init_from', 'reward') if keys.get(key)]
        run = claim(root, tab, out_dir, reads, asked)
        if run.has('ckpt.pt') and not asked:
            argv.append('--overwrite=True')
        if keys.get('init_from') != 'resume':  # a run that goes on stays whose it was
            run.info = dict(by=tab, stage=stage, keys=keys)
        commands.append(argv)
        runs.append(run)
    for run in runs:
        os.makedirs(run.path, exist_ok=True)
        locks.append(files.locked(inside(root, f'{run.path}/.app.lock'), wait=False))
    argv = ['sh', '-c', ' && '.join(map(shlex.join, commands))]
    with open(inside(root, f'{runs[0].path}/console.txt'), 'a', encoding='utf-8') as console:
        console.writelines(f'$ {shown(words)}\n' for words in commands)
        console.flush()
        child = subprocess.Popen(
            argv, cwd=root, stdin=subprocess.DEVNULL, stdout=console, stderr=subprocess.STDOUT,
            process_group=0, pass_fds=[f.fileno() for f in locks], env=dict(os.environ, PYTHONUNBUFFERED='1'))
    for run, lock in zip(runs, locks):
        with files.replaced(f'{run.path}/run.json', 'w') as f:
            json.dump(dict(run.info, pid=child.pid), f)
        lock.close()  # the child's copy holds it from here on
    threading.Thread(target=child.wait, daemon=True).start()  # or it stays a zombie
    return child.pid


def stop(root: str, name: str, patience: float = 5.0):
    """Ctrl-C, after which a run ends its iteration and saves; then SIGTERM, then SIGKILL. To the process
    group that this app (now or before) started for the run, and to no other."""
    run = RunFolder(root, name)
    pid = run.info.get('pid')
    if not (held(run.file('.app.lock')) and finite(pid) and pid > 1):
        raise ValueError(f'{name}: no running process that this app started; stop it where it was started')
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, sign)
        end = time.time() + patience + 3 * run.pace()
        while held(run.file('.app.lock')):
            if time.time() > end:
                break
            time.sleep(0.05)
        else:
            return


def resume(root: str, name: str, max_iters: int = 0):
    """Goes on with a run, whoever started it, with its own settings: those of its log's first row."""
    run = RunFolder(root, name)
    if run.stage not in STAGES or not run.config:
        raise ValueError(f'{name}: its log does not say what was run')
    if not run.has('ckpt.pt'):
        raise ValueError(f'{name}: it has no checkpoint to go on from; start it anew')
    keys = {key: run.config[key] for _, key, _, _ in script_form(run.stage) if key in run.config}
    keys |= dict(init_from='resume', out_dir=name, overwrite=False, eval_only=False)
    if max_iters:
        keys['max_iters'] = max_iters
    launch(root, 'Train', (run.stage, '', keys), asked=True)


# -----------------------------------------------------------------------------------------------------------
# 3. labels


def journal_of(root: str, name: str) -> Journal:
    if '/' in name or '\\' in name:
        raise ValueError(f'{name!r}: a name of letters, digits, - and _ is wanted')
    return Journal(inside(root, f'annotations/{name}.jsonl'))


def make_pairs(root, journal, prompts, names, temperature=0.9, max_tokens=96, seed=0):
    """Two answers to each prompt, of one model or of two, into the journal; equal ones are left out."""
    rng, answers = random.Random(seed or os.urandom(8)), []
    names = [names[0], names[-1]]
    for name in names:
        m = opened(root, name)
        how = dict(max_tokens=max_tokens, temperature=temperature)
        params = [infer.SamplingParams(seed=rng.getrandbits(30), **how) for _ in prompts]
        done = m.engine.generate([encode_prompt(prompt, m.tok) for prompt in prompts], params)
        answers.append([completion.text for completion in done])
    pairs = [journal.blind(prompt, x, y, *names, rng)
             for prompt, x, y in zip(prompts, *answers) if x.strip() != y.strip()]
    journal.append(*pairs)
    return len(pairs)


def score_texts(m, asked):
    """Rewards of [(prompt, answer)] under a reward model, whole answers with their end token."""
    rows = [encode_row(dict(prompt=prompt, completion=answer), m.tok)[0] for prompt, answer in asked]
    return all_rewards(m.model, [ids[-m.model.config.block_size:] for ids in rows]).tolist()


def agreement(m, journal):
    """(right, of): how often a reward model prefers what the labels prefer, its own left out."""
    rows, _ = journal.preferences(f'judge {m.name}')
    if not rows:
        return 0, 0
    marks = score_texts(m, [(row['prompt'], row[key]) for row in rows for key in ('chosen', 'rejected')])
    return sum(a > b for a, b in zip(marks[::2], marks[1::2])), len(rows)


def judge_all(root, journal, judge, url='', key='', limit=200):
    """Labels the open pairs by a reward model of the folder, or by a model at an endpoint; yields (labels
    made, pairs asked, of). A pair without a verdict stays open; three such in a row: ValueError."""
    pairs, labels, _ = journal.state()
    todo = [pair for name, pair in pairs.items() if name not in labels][:limit]
    made, mute, by = 0, 0, f'judge {judge}'
    if todo and not url:
        asked = [(pair['prompt'], pair[side]) for pair in todo for side in 'ab']
        marks = score_texts(opened(root, judge, 'scalar'), asked)
        for pair, a, b in zip(todo, marks[::2], marks[1::2]):
            journal.label(pair['id'], 'tie' if a == b else 'ab'[a < b], by)
        made, url, todo = len(todo), '', []
        yield made, made, made
    for i, pair in enumerate(todo, 1):
        how = dict(model=judge, key=key, tries=2, max_tokens=64)
        verdicts, heard = ask_judge(url, pair['prompt'], pair['a'], pair['b'], **how)
        mute = mute + 1 if None in verdicts else 0
        if mute == 3:
            raise ValueError(f'judge {url}: expected A, B or TIE, got {heard} (the third pair in a row '
                             'without a verdict): take another model')
        if not mute:  # one by one: what has been paid for is kept when the endpoint goes away
            journal.label(pair['id'], {('A', 'B'): 'a', ('B', 'A'): 'b'}.get(verdicts, 'tie'), by)
            made += 1
        yield made, i, len(todo)


def refit_jobs(root, journal, base, algorithm, steps):
    """Jobs for launch(): reward.py on the labels, then a few steps of ppo.py against it, or of dpo.py."""
    path, n, _ = journal.export()
    if n < 4:
        raise ValueError(f'{n} labels with a preference are too few: label at least 4 pairs, better 20')
    data, batch = os.path.relpath(path, os.path.realpath(root)), min(16, n // 2)
    outs = [f'out-{stage}-{journal.name}' for stage in ('reward', algorithm)]
    first = dict(init_from=base, out_dir=outs[0], dataset=data, batch_size=batch, epochs=3.0,
                 learning_rate=2e-4, normalize_n=64, max_new_tokens=96)
    second = dict(init_from=base, out_dir=outs[1], dataset=data, batch_size=batch, max_iters=steps,
                  learning_rate=1e-4)
    if algorithm == 'ppo':
        asked = sorted({pair['prompt'] for pair in journal.state()[0].values()})
        file = journal.beside('prompts', [dict(prompt=prompt) for prompt in asked])
        data = os.path.relpath(file, os.path.realpath(root))
        second |= dict(dataset=data, val_dataset=data, reward=outs[0], batch_size=32, minibatch_size=16,
                       max_new_tokens=96, temperature=1.0, eval_interval=max(1, steps // 2))
    return [('reward', '', first), (algorithm, '', second)], outs


# -----------------------------------------------------------------------------------------------------------
# 4. tokens: what policy, reference, reward model and value network say of each


TOKEN_KEYS = ('logp', 'kl', 'reward', 'value', 'advantage')


@torch.no_grad()
def token_view(m, prompt, response, reference=None, judge=None, value=None) -> list:
    """[{text, logp, kl, reward, value, advantage}] of each response token; prompt, response are ids. Keys
    only where the model for it is given: kl = logp - log-prob under reference; reward = what the reward model
    would say if the answer ended here; value, advantage as in ppo.py."""
    for role, other in (('reference', reference), ('reward model', judge), ('value network', value)):
        if other is not None and other.model.config.vocab_size != m.model.config.vocab_size:
            raise ValueError(f'{role} {other.name} has another tokenizer than {m.name}: their tokens cannot '
                             'be compared')
    device, P = next(m.model.parameters()).device, len(prompt)
    idx = torch.tensor([[*prompt, *response]], device=device)
    T = value.temperature if value is not None else 1.0
    seen = dict(logp=m.model.logprobs(idx, T)[:, P - 1:].float())  # all (1, R)
    if reference is not None:
        seen['kl'] = seen['logp'] - reference.model.logprobs(idx, T)[:, P - 1:].float()
    if judge is not None:
        seen['reward'] = judge.model(idx)[0][:, P:].float()
    if value is not None:
        seen['value'] = value.model(idx)[0][:, P - 1:-1].float()
    if {'kl', 'reward', 'value'} <= seen.keys():
        mask, ref = torch.ones_like(idx[:, P:], dtype=torch.bool), seen['logp'] - seen['kl']
        paid = ppo.token_rewards(seen['reward'][:, -1], seen['logp'], ref, mask, value.beta, value.kl_kind)
        seen['advantage'], _ = ppo.gae(paid, seen['value'], mask, value.gamma, value.lam)
    columns = {key: numbers[0].tolist() for key, numbers in seen.items()}
    return [dict(text=m.tok.decode([token]), **{key: columns[key][i] for key in columns})
            for i, token in enumerate(response)]


def tints(rows, key):
    """(value of a HighlightedText, words): each token with its number between -1 and 1."""
    if not rows or key not in rows[0]:
        return [], f'no {key}: choose the models that it needs'
    numbers = [row[key] for row in rows]
    most = max(*map(abs, numbers), 4 if key == 'logp' else 1e-6)
    words = dict(reward=f'at the end {numbers[-1]:+.3f}')
    if key in ('logp', 'kl'):
        words[key] = f'sum {sum(numbers):.2f} nats'
    span = words.get(key, f'from {min(numbers):+.2f} to {max(numbers):+.2f}')
    words = f'{key}: {span}; purple is negative, red positive'
    return [(row['text'].replace('\n', '⏎\n'), row[key] / most) for row in rows], words


# -----------------------------------------------------------------------------------------------------------
# 5. the page, a tab a function

KEYS = '''<script>
let labelled = '', since = 0
const names = {a: 'a', b: 'b', t: 'tie', s: 'skip', u: 'undo', e: 'edit'}
document.addEventListener('keydown', e => {
  const typing = /^(INPUT|TEXTAREA|SELECT)$/.test(e.target.tagName) || e.target.isContentEditable
  const key = e.key.toLowerCase(), button = document.querySelector('#key-' + names[key])
  if (typing || e.ctrlKey || e.metaKey || e.altKey || !button || button.offsetParent === null) return
  const pair = document.querySelector('[data-pair]')?.dataset.pair || ''
  // one key, one label: wait until the next pair is on the page
  if (pair && pair === labelled && Date.now() - since < 4000 && key !== 'u') return
  labelled = 'ue'.includes(key) ? '' : pair; since = Date.now(); button.click()
})
</script>'''


@contextlib.contextmanager
def polite():
    """A mistake of the user becomes a message on the page; of another error the terminal has the rest."""
    import gradio as gr
    try:
        yield
    except (ValueError, OSError) as e:
        raise gr.Error(esc(e), duration=20, print_exception=False) from None


class Page:
    """What the tabs share: Gradio, the folder, and dropdowns whose choices are looked up anew at
    each visit."""

    def __init__(self, gr, root):
        self.gr, self.root, self.picks = gr, root, []
        self.found, self.names = self.choices(), None  # names: the chat's models, set by chat_tab

    def choices(self):
        kinds = find_models(self.root)
        lms = [name for name, kind in kinds.items() if kind in ('lm', 'adapter')]
        return dict(
            lm=lms, reward=[name for name, kind in kinds.items() if kind == 'reward'],
            value=[name for name in lms if 'ppo' in name or RunFolder(self.root, name).stage == 'ppo'],
            run=[run.name for run in find_runs(self.root)])

    def pick(self, kind, label, *wanted, many=0, **more):
        """A dropdown of models or runs, with those of `wanted` that are there chosen, else the first."""
        names = self.found[kind]
        chosen = [name for name in wanted if name in names] or ([] if wanted == (None,) else names[:1])
        value = chosen if many else (chosen or [None])[0]
        how = dict(multiselect=bool(many), max_choices=many or None, allow_custom_value=True)
        box = self.gr.Dropdown(names, value=value, label=label, **how, **more)
        self.picks.append((kind, box))
        return box

    def refresh(self):
        self.found = self.choices()
        return [self.gr.Dropdown(self.found[kind]) for kind, _ in self.picks]

    def chat_with(self, *names):
        return self.gr.Dropdown(self.choices()['lm'], value=list(names))


class Live:
    """What one run is doing: words, curves, the console. parts: the components, show(run): their values."""

    def __init__(self, page, name, metrics=(*METRICS[:6], 'pg', 'vf', 'tok_per_s')):
        gr = self.gr = page.gr
        self.root, self.metrics = page.root, metrics
        words = gr.HTML(elem_classes='page', elem_id=name)
        with gr.Row():
            plots = [gr.LinePlot(x='step', y=metric, color='split', title=metric, y_title=unit(metric),
                                 height=220, min_width=300, visible=False) for metric in metrics]
        console = gr.Textbox(label='console', lines=3, max_lines=14, elem_id=f'{name}-console')
        self.parts, self.seen = [words, *plots, console], gr.State('')

    def plot(self, run, metric):
        from pandas import DataFrame
        rows = [row for row in run.rows if finite(row.get(metric))]
        return self.gr.LinePlot(DataFrame(rows, columns=['step', 'split', metric]), visible=bool(rows))

    def show(self, run, console=''):
        now = {key: f'{value:,.4g}' for key, value in (run.rows or [{}])[-1].items() if key in self.metrics
               and finite(value)}
        left = f', about {(run.total - run.last) * run.pace():.0f} s left' if run.state == 'running' else ''
        words = (f'<p><b data-state={esc(run.state)}>{esc(run.name)}: {esc(run.state)}</b>, iteration '
                 f'<span id=at>{run.last}</span> of {run.total}{left}</p>'
                 f'<p class={"bad" if run.state == "crashed" else "note"}>{esc(run.note)}</p>'
                 f'<p class=note>{" | ".join(f"{key} {value}" for key, value in now.items())}</p>')
        said = run.console or console or 'no console: this run was started elsewhere'
        return [words, *[self.plot(run, metric) for metric in self.metrics], said]

    @polite()
    def tick(self, name, seen):
        """New values when the run has moved since `seen`."""
        if not name or not os.path.isdir(inside(self.root, name)):
            return self.gr.skip()
        run = RunFolder(self.root, name)
        now = str([name, run.state, run.last, len(run.rows), run.console[-200:]])
        return self.gr.skip() if now == seen else [now, *self.show(run)]

    def watch(self, timer, name):
        timer.tick(self.tick, [name, self.seen], [self.seen, *self.parts], show_progress='hidden')


# ---- chat


def prompt_ids(m, turns, system, plain, room) -> tuple:
    """Ids of a conversation [(prompt, answer)], its last turn open; turns that no longer fit are forgotten ->
    (ids, a word on it)."""
    if plain:
        return encode_prompt(turns[-1][0], m.tok), ''
    for first in range(len(turns)):
        messages = [dict(role='system', content=system)] if system else []
        for prompt, answer in turns[first:]:
            messages += [dict(role='user', content=prompt), dict(role='assistant', content=answer)]
        ids = m.tok.apply_chat_template(messages[:-1], add_generation_prompt=True)
        if len(ids) + room <= m.model.config.block_size:
            break
    return ids, f', {first} older turns no longer fit' if first else ''


def stream(m, ids, params, answer):
    """One answer as it grows, a step of the engine at a time; closed early it leaves no request behind."""
    request = m.engine.add_request(ids, params, f'chat-{os.urandom(6).hex()}')
    try:
        while True:
            started = time.time()
            outputs = [output for output in m.engine.step() if output['request_id'] == request]
            answer['seconds'] += time.time() - started
            for output in outputs:
                answer['text'] += output['text']
                answer['ids'] += output['token_ids']
                if output['finished']:
                    answer['note'] += '' if output['finish_reason'] == 'stop' else ', cut at the limit'
                    return
            yield
    finally:
        m.engine.abort(request)


def chat(root, names, prompt, history, system, plain, *sampling):
    """Yields the history: [{prompt, answers {name: {text, ids, prompt_ids, seconds, note}}}]. All models
    answer the same prompt with the same seed, a token each in turn."""
    if not names or len(names) > 4 or not prompt.strip():
        raise ValueError('choose one to four models and write a message')
    *ways, max_tokens, seed = sampling
    keys = ('temperature', 'top_p', 'top_k', 'min_p', 'repetition_penalty')
    params = infer.SamplingParams(max_tokens=int(max_tokens), seed=int(seed), **dict(zip(keys, ways)))
    answers, live, drawn = {}, [], 0.0
    for name in names:
        m, before = opened(root, name), [turn for turn in history if name in turn['answers']]
        turns = [(turn['prompt'], turn['answers'][name]['text']) for turn in before]
        room = min(params.max_tokens, m.model.config.block_size // 2)
        ids, note = prompt_ids(m, [*turns, (prompt, '')], system, plain, room)
        answers[name] = dict(text='', ids=[], prompt_ids=ids, seconds=0.0, note=note)
        live.append(stream(m, ids, params, answers[name]))
    history = [*history, dict(prompt=prompt, answers=answers)]
    try:
        while live:
            live = [one for one in live if next(one, 'ended') is None]
            if time.time() - drawn > 0.12:
                drawn = time.time()
                yield history
    finally:  # the button Stop, a closed tab, an error of one model
        for one in live:
            one.close()
    yield history


def messages_of(history, name) -> list:
    """A Chatbot's messages: the turns of one model, each answer with its length and speed."""
    out = []
    for turn in history:
        answer = turn['answers'].get(name)
        if answer:
            rate = len(answer['ids']) / max(answer['seconds'], 1e-3)
            told = f'\n\n— {len(answer["ids"])} tokens, {rate:.0f} tok/s{answer["note"]}'
            out += [dict(role='user', content=esc(turn['prompt'])),
                    dict(role='assistant', content=esc(answer['text']) + told)]
    return out


def sampling_fields(gr) -> list:
    def slider(low, high, value, step, label):
        return gr.Slider(low, high, value, step=step, label=label)
    return [slider(0, 2, 0.7, 0.05, 'temperature (0 = greedy)'), slider(0.05, 1, 1, 0.05, 'top_p'),
            slider(0, 200, 0, 1, 'top_k (0 = off)'), slider(0, 1, 0, 0.01, 'min_p'),
            slider(0.5, 2, 1, 0.05, 'repetition penalty'), slider(1, 2048, 96, 1, 'tokens at most'),
            gr.Number(1337, label='seed', precision=0)]


def chat_tab(page):
    gr, root = page.gr, page.root
    names = page.names = page.pick('lm', 'Models', 'out-sft', 'out-ppo', many=4,
                                   info='up to four answer side by side; a hub name works too')
    history = gr.State([])
    with gr.Row(elem_id='chat'):
        plain_text = dict(render_markdown=False, latex_delimiters=[], feedback_options=None, buttons=[])
        bots = [gr.Chatbot(visible=False, min_width=280, height=420, **plain_text) for _ in range(4)]
    prompt = gr.Textbox(label='Message', max_lines=8, elem_id='message', submit_btn=True, stop_btn=True)
    rows = read_rows(kept(root, 'data', 'toy', 'prompts_val.jsonl'))[0]
    known = [re.fullmatch(r'Q: (.*)\nA: ', str(row.get('prompt'))) for row in rows[:200]]
    known = [found[1] for found in known if found][::41]  # the template adds Q and A
    if known:
        gr.Examples(known, prompt, label='questions of the toy world')
    with gr.Accordion('Sampling', open=False):
        system = gr.Textbox(label='System prompt')
        plain = gr.Checkbox(label='plain text: no chat template (for base models; only the last message)')
        with gr.Row():
            sampling = sampling_fields(gr)
    clear = gr.Button('New chat')

    def drawn(history, names):
        found = [gr.Chatbot(messages_of(history, name), label=name, visible=True) for name in names or ()]
        return found + [gr.Chatbot(visible=False)] * (4 - len(found))

    def talk(names, text, *given):  # the message leaves its box when the answer begins: one refused stays
        with polite():
            for i, history in enumerate(chat(root, names, text, *given)):
                yield *drawn(history, names), history, gr.skip() if i else ''
    going = prompt.submit(talk, [names, prompt, history, system, plain, *sampling],
                          [*bots, history, prompt], concurrency_id='engine')
    prompt.stop(None, cancels=[going])
    clear.click(lambda names: ([], *drawn([], names)), names, [history, *bots])
    for event in (names.change, page.blocks.load):
        event(drawn, [history, names], bots)
    token_rows(page, history)


def token_rows(page, history):
    """The last answers token by token: tinted, and all numbers in a table."""
    gr, root = page.gr, page.root
    gr.HTML('<h3>Token by token</h3>', elem_classes='page')
    with gr.Row():
        reference = page.pick('lm', 'reference (for kl)', 'out-sft')
        judge, value = page.pick('reward', 'reward model'), page.pick('value', 'value network of')
        key = gr.Radio(TOKEN_KEYS, value='logp', label='colour by')
    tint = gr.Button('Colour the last answers')
    view = gr.HighlightedText(elem_id='tokens', show_label=False)
    table = gr.Dataframe(headers=['model', 'token', *TOKEN_KEYS], visible=False, elem_id='numbers', wrap=True)

    @polite()
    def shade(history, reference, judge, value, key):
        if not history:
            raise ValueError('chat first: the last answer is what gets coloured')
        given = dict(reference=opened(root, reference) if reference else None,
                     judge=opened(root, judge, 'scalar') if judge else None,
                     value=opened(root, value, 'value') if value else None)
        tokens, numbers = [], []
        for name, answer in history[-1]['answers'].items():
            rows = token_view(opened(root, name), answer['prompt_ids'], answer['ids'], **given)
            marks, words = tints(rows, key)
            tokens += [(f'{name}, {words}\n', None), *marks, ('\n\n', None)]
            for row in rows:
                cells = [f'{row[k]:+.3f}' if k in row else '' for k in TOKEN_KEYS]
                numbers.append([name, repr(row['text']), *cells])
        return tokens, gr.Dataframe(numbers, visible=True)
    for event in (tint.click, key.input):
        event(shade, [history, reference, judge, value, key], [view, table], concurrency_id='engine')


# ---- train


def form(page, stage, config_file, watch):
    """The script's config block as fields, the command that they make, the button that starts it."""
    gr, root = page.gr, page.root
    now, fields, groups = settings(root, stage, config_file), {}, {}
    for group, key, _, note in script_form(stage):
        groups.setdefault(group, []).append((key, note))
    for group, keys in groups.items():
        with gr.Accordion(group, open=group == 'I/O'):
            fields_of_group = gr.Row()
        for key, note in keys:
            how = dict(label=key, info=note, interactive=True, elem_id=f'form-{key}', min_width=220)
            boolean = isinstance(now[key], bool)
            with fields_of_group:  # one by one: what is entered together shares a frame of fixed columns
                fields[key] = gr.Checkbox(now[key], **how) if boolean else gr.Textbox(str(now[key]), **how)
    typed = shown(command(root, stage, config_file))
    line = gr.Textbox(typed, label='the command', elem_id='command', lines=2)
    start = gr.Button('Start', variant='primary', elem_id='start')

    def preview(*values):
        try:
            return shown(command(root, stage, config_file, **dict(zip(fields, values))))
        except ValueError as e:
            return f'not yet: {e}'

    @polite()
    def begin(*values):
        keys = dict(zip(fields, values))
        asked = keys['overwrite'] or keys['init_from'] == 'resume'
        launch(root, 'Train', (stage, config_file, keys), asked=asked)
        names = [run.name for run in find_runs(root)]
        return gr.Dropdown(names, value=os.path.relpath(inside(root, keys['out_dir']), root))
    given = list(fields.values())
    for field in given:
        field.change(preview, given, line, show_progress='hidden', trigger_mode='always_last')
    start.click(begin, given, watch)


def train_tab(page, timer):
    gr, root = page.gr, page.root

    def configs(stage):
        names = list(configs_for(root, stage))
        toy = [name for name in names if name.endswith(f'{stage}_toy.py')]
        return gr.Dropdown(['', *names], value=(toy or [''])[0], label='config', min_width=240,
                           info="'' = the script's own defaults")
    with gr.Row():
        stage = gr.Dropdown(list(STAGES), value='sft', label='stage', min_width=240)
        conf = configs('sft')
    box = gr.Group()
    gr.HTML('<h3>Runs</h3>', elem_classes='page')
    table = gr.HTML(runs_html(find_runs(root)), elem_classes='page', elem_id='runs')
    with gr.Row():
        watched = page.pick('run', 'watch', elem_id='watch', min_width=240)
        iters = gr.Number(0, label='iterations when resumed', info='0 = as before', precision=0)
        halt, again = gr.Button('Stop', elem_id='stop'), gr.Button('Resume', elem_id='resume')
    live = Live(page, 'live')
    with box:
        @gr.render(inputs=[stage, conf])
        def _(stage, conf):
            try:
                form(page, stage, conf if conf in configs_for(root, stage) else '', watched)
            except (ValueError, OSError) as e:
                gr.HTML(f'<p class=bad>{esc(e)}</p>')

    def listed(before):
        now = runs_html(find_runs(root))
        return gr.skip() if now == before else now

    @polite()
    def stopped(name):
        stop(root, name or '')

    @polite()
    def resumed(name, iters):
        resume(root, name or '', int(iters))
    stage.change(configs, stage, conf)
    timer.tick(listed, table, table, show_progress='hidden')
    live.watch(timer, watched)
    halt.click(stopped, watched)
    again.click(resumed, [watched, iters])


# ---- finetune


def keep_upload(root, path) -> str:
    """A copy of an uploaded file in uploads/, named after it and its bytes, so that none is written over."""
    if not path:
        raise ValueError('choose a file first')
    path = inside(root, path)
    name, ending = os.path.splitext(re.sub(r'[^\w.-]', '_', os.path.basename(path)))
    if ending not in ('.jsonl', '.json', '.csv'):
        raise ValueError(f'{name}{ending}: .jsonl, .json or .csv is wanted')
    if os.path.getsize(path) > UPLOAD_MB << 20:
        raise ValueError(f'{name} is larger than {UPLOAD_MB} MB: put it into the folder, train on it there')
    with open(path, 'rb') as f:
        digest = hashlib.file_digest(f, 'sha256').hexdigest()[:8]
    copy = f'uploads/{name[-60:].lstrip(".")}-{digest}{ending}'
    os.makedirs(inside(root, 'uploads'), exist_ok=True)
    with open(path, 'rb') as f, files.replaced(inside(root, copy)) as g:
        shutil.copyfileobj(f, g)
    return copy


def look_over(root, path, base) -> tuple:
    """(the file's path in the folder, HTML: the linter's words and five rows, trained tokens marked)."""
    if not base:
        raise ValueError('choose the model that is to be finetuned')
    name, copy = os.path.basename(str(path)), keep_upload(root, path)
    try:
        rows = load_dataset(inside(root, copy))
        if not len(rows):
            raise ValueError(f'{name} holds no row')
        part = rows.select(range(min(len(rows), 5000)))
        tok = get_tokenizer(tokenizer_of(inside(root, base)))
        told = lint(part, tok)
    except ValueError as e:
        os.remove(inside(root, copy))
        raise ValueError(f'{name} cannot be read: {str(e).replace(inside(root, copy), name)}') from None
    words = [f'<li class={"bad" if grave else "note"}>{"error: " * grave}{esc(text)}</li>'
             for grave, text in told]
    more = f', the first {len(part)} looked over' if len(part) < len(rows) else ''
    shown_ = ''.join(row_html(row, tok) for row in part.select(range(min(5, len(part)))))
    return copy, (f'<h3>{esc(name)}: {len(rows)} rows{more}</h3><ul>{"".join(words)}</ul>'
                  f'<h3>Five rows; what is trained on is marked</h3>{shown_}')


def row_html(row, tok) -> str:
    try:
        ids, trained = encode_row(row, tok)
    except ValueError as e:
        return f'<p class=bad>{esc(e)}</p>'
    spans = [f'<span class={"on" if on else "off"}>{esc(tok.decode([token]))}</span>'
             for token, on in zip(ids[:600], trained)]
    return f'<pre>{"".join(spans)}</pre>'


def tokenizer_of(path) -> str:
    """The tokenizer of a model's folder."""
    file = os.path.join(path, 'ckpt.pt')
    return parallel.read_checkpoint(file, mmap=True)['tokenizer'] if os.path.exists(file) else path


def unused(root, name) -> str:
    """NAME, or the first of NAME-2, NAME-3 ... that is not there."""
    names = itertools.chain([name], (f'{name}-{n}' for n in itertools.count(2)))
    return next(name for name in names if not os.path.lexists(inside(root, name)))


def export_model(root, name) -> list:
    """NAME-export: the model with its adapter merged in, as a Hugging Face folder; NAME-adapter too (PEFT)
    where the run trained one. -> the folders written."""
    path = inside(root, name)
    ckpt = parallel.read_checkpoint(os.path.join(path, 'ckpt.pt'))
    head = 'scalar' if any('score.weight' in key for key in ckpt['model']) else 'lm'
    written = [unused(root, f'{name}-export')]
    load_model(path, head=head)[0].save_pretrained(inside(root, written[0]))
    get_tokenizer(ckpt['tokenizer']).save(inside(root, written[0]))
    if ckpt.get('lora'):
        written.append(unused(root, f'{name}-adapter'))
        lora.save_lora(with_adapter(ckpt), inside(root, written[1]), base=ckpt['lora']['base'])
    return written


def finetune_tab(page, timer):
    gr, root = page.gr, page.root
    with gr.Row():
        file = gr.File(label=f'rows: .jsonl, .json or .csv, up to {UPLOAD_MB} MB', elem_id='upload',
                       height=140, file_types=['.jsonl', '.json', '.csv'])
        base = page.pick('lm', 'model to finetune', 'out-sft')
    check, data = gr.Button('Check the file'), gr.State('')
    looked = gr.HTML(elem_classes='page', elem_id='looked')
    with gr.Row():
        how = gr.Radio(['all weights', 'LoRA'], value='LoRA', label='train')
        rank = gr.Number(16, label='LoRA rank', precision=0)
        iters = gr.Number(150, label='iterations', precision=0)
        rate, out = gr.Number(2e-3, label='learning rate'), gr.Textbox('out-finetuned', label='out_dir')
    with gr.Row():
        go, talk = gr.Button('Start finetuning', variant='primary'), gr.Button('Chat with it')
        export = gr.Button('Merge and export')
    live, done = Live(page, 'tuned', ('loss', 'tok_per_s')), gr.HTML(elem_classes='page', elem_id='exported')

    @polite()
    def begin(data, base, how, rank, iters, rate, out):
        if not data:
            raise ValueError('check a file first')
        launch(root, 'Finetune', ('sft', '', dict(
            dataset=data, init_from=base, out_dir=out, max_iters=int(iters), learning_rate=float(rate),
            min_lr=float(rate) / 10, lora_r=int(rank) if how == 'LoRA' else 0, batch_size=8, warmup_iters=2,
            eval_interval=max(1, int(iters) // 2), eval_iters=2)))

    @polite()
    def to_chat(out, base):
        if out not in find_models(root):
            raise ValueError(f'{out} has no checkpoint yet')
        return page.chat_with(base, out)

    @polite()
    def exported(name):
        return f'<p>written: {esc(", ".join(export_model(root, name)))}</p>'

    @polite()
    def looked_over(path, base):
        return look_over(root, path, base)
    check.click(looked_over, [file, base], [data, looked])
    go.click(begin, [data, base, how, rank, iters, rate, out])
    talk.click(to_chat, [out, base], page.names)
    export.click(exported, out, done)
    live.watch(timer, out)


# ---- annotate


def pair_html(journal, pair) -> str:
    """Progress, and the pair to label: blind, which model wrote what is not on the page."""
    pairs, labels, broken = journal.state()
    kinds = [mark['label'] for mark in labels.values()]
    count = ''.join(f', {kinds.count(kind)} {kind}' for kind in sorted(set(kinds)))
    count += f' ({broken} broken lines left out)' if broken else ''
    head = f'<p><b id=labelled>{len(labels)}</b> of {len(pairs)} pairs labelled{esc(count)}</p>'
    if not pair:
        return head + '<p class=note>No open pair: make or import some below.</p>'
    sides = ''.join(f'<div><h4>{side.upper()}</h4><div class=answer>{esc(pair[side].strip())}</div></div>'
                    for side in 'ab')
    return (f'{head}<div data-pair={esc(pair["id"])}><div class=bubble>{esc(pair["prompt"])}</div>'
            f'<div class=side>{sides}</div></div>')


class Desk:
    """Where labels are made: the journal, who labels (a browser; a tab of it), the pair on the page."""

    def __init__(self, page):
        gr, self.open = page.gr, functools.lru_cache(functools.partial(journal_of, page.root))
        self.name = gr.Textbox('labels', label='journal', info='annotations/NAME.jsonl, append-only; every '
                               'label is on the disk before the next pair comes')
        self.html = gr.HTML(elem_classes='page', elem_id='pair')
        self.person = gr.BrowserState('', storage_key='labeller', secret='labeller')  # stays when reloaded
        self.tab, self.pair = gr.State(lambda: os.urandom(4).hex()), gr.State(None)
        self.who, self.outs = [self.name, self.tab], [self.html, self.pair]
        page.blocks.load(lambda person: person or os.urandom(4).hex(), self.person, self.person)

    def next(self, name, tab):
        journal = self.open(name)
        pair = journal.next(tab)
        return pair_html(journal, pair), pair

    def on(self, event, fn, given=(), outs=(), **more):
        """fn(journal, *given) acts on an event; then the next pair is shown. What it returns goes to outs."""
        @polite()
        def act(name, tab, *values):
            got = fn(self.open(name), *values)
            return *self.next(name, tab), *([got] if outs else [])
        event(act, [*self.who, *given], [*self.outs, *outs], **more)


def annotate_tab(page, timer):
    gr, desk = page.gr, Desk(page)
    with gr.Row():
        names = dict(a='A is better (a)', b='B is better (b)', tie='Tie (t)', skip='Skip (s)',
                     undo='Undo (u)', edit='Edit (e)')
        buttons = {key: gr.Button(text, elem_id=f'key-{key}', min_width=90) for key, text in names.items()}
    with gr.Group(visible=False) as editor:
        side = gr.Radio(['a', 'b'], value='a', label='write a better version of')
        text, save = gr.Textbox(label='better answer', lines=3), gr.Button('Save the edit')

    def mark(kind, journal, pair, person, **more):
        if pair:
            journal.label(pair['id'], kind, 'human', person=person, **more)

    def edited(journal, pair, person, side, text):
        if pair and text.strip() == pair[side].strip():
            raise ValueError('the answer is as it was: change it, or use a, b or tie')
        if text.strip():
            mark('edit', journal, pair, person, of=side, text=text)
        return gr.Group(visible=False)

    def old(pair, side):
        return pair[side].strip() if pair else ''
    quick = dict(show_progress='hidden', concurrency_id='journal')
    for kind in ('a', 'b', 'tie', 'skip'):
        desk.on(buttons[kind].click, functools.partial(mark, kind), [desk.pair, desk.person], **quick)
    desk.on(buttons['undo'].click, Journal.undo, [desk.person], **quick)
    buttons['edit'].click(lambda pair, side: (gr.Group(visible=bool(pair)), old(pair, side)),
                          [desk.pair, side], [editor, text])
    side.input(old, [desk.pair, side], text)
    desk.on(save.click, edited, [desk.pair, desk.person, side, text], [editor], concurrency_id='journal')
    desk.on(desk.name.submit, lambda journal: None)
    pair_sources(page, desk)
    after_labels(page, desk)
    refit_part(page, desk, timer)
    return desk


def prompts_of(root, source, many) -> list:
    """Prompts of a file of the folder (drawn), or one a line, in which \\n is a line break."""
    if not re.fullmatch(r'\S+\.(jsonl|json|csv)', source.strip()):
        return [line.replace('\\n', '\n') for line in source.split('\n') if line.strip()][:many]
    rows = load_dataset(inside(root, source.strip())).shuffle(random.randrange(1 << 30))
    return [row['prompt'] for row in rows.select(range(min(many, len(rows)))) if text_in(row, 'prompt')]


def pair_sources(page, desk):
    """Pairs to label: answers of one or two models to prompts, or a file."""
    gr, root = page.gr, page.root
    with gr.Accordion('Make or import pairs', open=False):
        writers = page.pick('lm', 'one model, or two', 'out-sft', 'out-ppo', many=2)
        source = gr.Textbox('data/toy/prompts_val.jsonl', lines=2,
                            label='prompts: a file of rows with "prompt", or one prompt a line')
        with gr.Row():
            many = gr.Number(20, label='pairs', precision=0)
            heat = gr.Slider(0.1, 2, 1.0, label='temperature')
            make = gr.Button('Make pairs', elem_id='make')
        given = gr.File(label='preference rows, or prompt/a/b rows', file_types=['.jsonl', '.json', '.csv'],
                        elem_id='given', height=140)
        load = gr.Button('Import')

    def made(journal, writers, source, many, heat):
        if not writers:
            raise ValueError('choose one or two models')
        make_pairs(root, journal, prompts_of(root, source, int(many)), writers, heat)

    def imported(journal, path):
        if not path:
            raise ValueError('choose a file first')
        journal.load(inside(root, path))
    desk.on(make.click, made, [writers, source, many, heat], concurrency_id='engine')
    desk.on(load.click, imported, [given])


def after_labels(page, desk):
    """What labels are for: agreement with a reward model, a judge for the rest, export."""
    gr, root = page.gr, page.root
    out = gr.HTML(elem_classes='page', elem_id='after')
    with gr.Row():
        judge = page.pick('reward', 'reward model', info='or the name of a model at the endpoint')
        url = gr.Textbox(label='endpoint of a judge (OpenAI-compatible)', max_lines=1, min_width=260,
                         placeholder='http://127.0.0.1:8000/v1')
        key = gr.Textbox(label='its key', type='password')
    with gr.Row():
        agree, ask = [gr.Button(name, min_width=120)
                      for name in ('Agreement with the labels', 'Let it label the rest')]
        halt, export = [gr.Button(name, min_width=120) for name in ('Stop the judge', 'Export')]

    @polite()
    def agreed(name, judge):
        right, n = agreement(opened(root, judge, 'scalar'), desk.open(name))
        rate = '; label some pairs first'
        if n:
            rate = ': {:.0%} ({:.0%} to {:.0%})'.format(right / n, *wilson(right, n))
        return f'<p>{esc(judge)} agrees with {right} of {n} labels{rate}</p>'

    def asked(name, tab, judge, url, key):
        journal, made = desk.open(name), 0
        with polite():
            try:
                for made, tried, of in judge_all(root, journal, judge, url.strip(), key.strip()):
                    said = f'<p>{esc(judge)} labelled {made} pairs; {tried} of {of} open ones asked</p>'
                    yield said, gr.skip(), gr.skip()
            except ValueError as e:
                said = f'<p class=bad>{esc(e)}</p><p>{made} labels made before are kept</p>'
                yield said, *desk.next(name, tab)
                raise
            yield gr.skip(), *desk.next(name, tab)

    @polite()
    def exported(name):
        path, n, ties = desk.open(name).export()
        return f'<p>{n} preferences in {esc(os.path.relpath(path, root))}, {ties} ties beside it</p>'
    agree.click(agreed, [desk.name, judge], out)
    asking = ask.click(asked, [*desk.who, judge, url, key], [out, *desk.outs])
    halt.click(polite()(desk.next), desk.who, desk.outs, cancels=[asking])
    export.click(exported, desk.name, out)


def refit_part(page, desk, timer):
    """The one button that trains on the labels, and chats with what came out."""
    gr, root = page.gr, page.root
    with gr.Row():
        base = page.pick('lm', 'model to train', 'out-sft')
        algorithm = gr.Radio(['ppo', 'dpo'], value='dpo', label='with')
        steps = gr.Number(10, label='steps', precision=0)
        refit = gr.Button('Refit the reward model, train, chat again', variant='primary', elem_id='refit')
    live, outs = Live(page, 'refitted'), gr.State([])

    @polite()
    def refitted(name, base, algorithm, steps):
        jobs, outs = refit_jobs(root, desk.open(name), base, algorithm, int(steps))
        launch(root, 'Refit', *jobs)
        return outs, ''

    @polite()
    def tick(outs, base, seen):
        if not outs:
            return gr.skip()
        first, second = [RunFolder(root, name) for name in outs]  # one process makes both, the first's
        run = max(first, second, key=lambda run: run.changed)
        ready = 'ready' if first.state == 'finished' else ''
        now = str([ready, first.state, first.console[-200:], run.name, run.last])
        if now == seen:
            return gr.skip()
        words, *rest = live.show(run, first.console)
        word = 'trained: chat with it in the first tab' if ready else first.state
        words = f'<p data-refit={"done" if ready else first.state}>{esc(outs[1])}: {word}</p>{words}'
        chosen = page.chat_with(base, outs[1]) if ready and 'ready' not in seen else gr.skip()
        return now, words, *rest, chosen
    refit.click(refitted, [desk.name, base, algorithm, steps], [outs, live.seen])
    timer.tick(tick, [outs, base, live.seen], [live.seen, *live.parts, page.names], show_progress='hidden')


# ---- dashboard, and the whole


def dashboard_tab(page):
    gr, root = page.gr, page.root
    with gr.Row():
        which = page.pick('run', 'runs', None, many=99, info='none = all', scale=2)
        x = gr.Radio(['step', 'time', 'kl'], value='step', label='over')
        soft = gr.Slider(0, 0.98, 0.6, step=0.02, label='smoothing')
        path = gr.Textbox('out/report.html', label='report file')
    with gr.Row():
        draw, keep = gr.Button('Draw', variant='primary', elem_id='draw'), gr.Button('Write the report')
    said = gr.HTML(elem_classes='page')
    out = gr.HTML(elem_classes='page', elem_id='dashboard')

    @polite()
    def drawn(which, x, soft):
        runs = [run for run in find_runs(root) if not which or run.name in which]
        return dashboard(root, runs, x=x, smoothing=soft)

    @polite()
    def written(path):
        return f'<p>written: {esc(os.path.relpath(write_report(root, path), root))}</p>'
    keep.click(written, path, said)
    for event in (draw.click, x.input, page.tabs['Dashboard'].select):
        event(drawn, [which, x, soft], out)


def build(gr, root):
    """The page: five tabs over one folder."""
    page = Page(gr, root)
    empty = '' if any(page.found.values()) else ('<p class=note>This folder holds no model and no run yet: '
                                                 'start one in Train, or run bash quickstart.sh first.</p>')
    # what was uploaded is copied: Gradio's own goes after a day
    with gr.Blocks(title='plainRLHF', fill_width=True, delete_cache=(3600, 86400)) as page.blocks:
        gr.HTML(f'<h1>plainRLHF</h1>{empty}', elem_classes='page')
        timer, page.tabs = gr.Timer(2), {}
        for name in ('Chat', 'Train', 'Finetune', 'Annotate', 'Dashboard'):
            page.tabs[name] = gr.Tab(name)
        with page.tabs['Chat']:
            chat_tab(page)
        with page.tabs['Train']:
            train_tab(page, timer)
        with page.tabs['Finetune']:
            finetune_tab(page, timer)
        with page.tabs['Annotate']:
            desk = annotate_tab(page, timer)
        with page.tabs['Dashboard']:
            dashboard_tab(page)
        boxes = [box for _, box in page.picks]
        for event in (page.blocks.load, *(tab.select for tab in page.tabs.values())):
            event(page.refresh, None, boxes, show_progress='hidden')
        desk.on(page.tabs['Annotate'].select, lambda journal: None, show_progress='hidden')
    return page.blocks


class SameOrigin:
    """ASGI: what a page of another site asks for is refused; it would start runs in the name of whoever reads
    that page. Gradio's strict_cors hides only the answer."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        given = {key: value.decode('latin-1') for key, value in scope.get('headers', ())}
        origin = given.get(b'origin', '').split('://')[-1]
        if origin and origin not in (given.get(b'host'), given.get(b'x-forwarded-host')):
            await send(dict(type='http.response.start', status=403, headers=[]))
            await send(dict(type='http.response.body', body=b'this page is used from its own address only'))
        else:
            await self.app(scope, receive, send)


def serve(root, login):
    """Until Ctrl-C. Loopback names only as Host (a web page cannot reach in by renaming itself), no fonts or
    counters from elsewhere."""
    os.environ.update(GRADIO_TEMP_DIR=f'{root}/uploads/.tmp', GRADIO_ANALYTICS_ENABLED='False')
    try:
        import gradio as gr
    except ImportError as e:
        raise ValueError(f'the app needs gradio ({e}): pip install -r requirements-app.txt') from None
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ':' in host else socket.AF_INET).close()
    except OSError as e:
        raise ValueError(f'--port={port} on {host}: {e.strerror}; give another --port') from None
    doors = [Middleware(SameOrigin)]
    if not login:
        doors.append(Middleware(TrustedHostMiddleware, allowed_hosts=['127.0.0.1', 'localhost', '[::1]']))
    theme = gr.themes.Default(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace'])
    build(gr, root).queue(default_concurrency_limit=1).launch(
        server_name=host, server_port=port, share=share, auth=login, css=styles(), head=KEYS, theme=theme,
        show_error=False, ssr_mode=False, max_file_size=f'{UPLOAD_MB}mb', footer_links=[],
        app_kwargs=dict(middleware=doors))


def main():
    root = os.path.realpath(folder)
    if not os.path.isdir(root):
        raise ValueError(f'--folder={folder}: no such folder')
    os.chdir(root)  # older checkpoints name their base models relative to where they were trained
    torch.set_num_threads(1)
    if report:
        print(f'written: {write_report(root, report)}')
        return
    user, _, password = auth.partition(':')
    if auth and not (user and password):
        raise ValueError('--auth wants user:password')
    if not auth and (share or host not in ('127.0.0.1', 'localhost', '::1')):
        raise ValueError(f'--share and --host={host} let other machines in, and they can start runs: '
                         'they want --auth=user:password')
    serve(root, (user, password) if auth else None)


if __name__ == '__main__':
    main()
