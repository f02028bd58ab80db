"""A run: device, models from anywhere, the folder and its checkpoints, the log, memory planned and measured.

What every stage does around its algorithm stands here once; a stage holds its equations and its loop:

    run = Run('sft', config)            # device, kernels, mesh, out_dir; run.ckpt: what it resumes from
    model, tok = run.model()            # from anywhere, with lora_r > 0 under an adapter
    train, val = run.rows()             # dataset and val_dataset, or 5 % of dataset kept aside
    items = encode_all(train, fn, name, (tok, T))   # by fn(row, tok, T); errors name the row of the file
    model, optimizer = run.trained(model, learning_rate)    # this rank's part of it, and its AdamW
    order = run.order(items, batch_size)    # endless batches of row numbers
    run.plan(tokens, T)                 # says what runs where and how much memory it will take
    for it in run.iterations(max_iters):    # from where the checkpoint stood; writes one every save_minutes
        if run.due(it):                 # every eval_interval iterations, at the end, with eval_only
            run.evaluated(it, metrics, mark, show)  # finite numbers are logged and saved, others stop the run
        if it == max_iters or eval_only:
            break
        ...                             # the algorithm
        run.log(it, metrics, show)      # a row of log.jsonl, and a line that shows some of it
    run.finish(said)                    # the memory that it took

A resumed run finds models, optimizers and order where they stood. The words of several processes (mesh,
replica, rank) are explained in parallel.py; a single process is a mesh of one.

What was trained leaves the project by

    python run.py export --init_from=out-ppo --to=my-model                    # a Hugging Face folder
    python run.py export --init_from=out-lora --to=my-adapter --adapter=True  # a PEFT folder
"""
import collections
import contextlib
import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import mmap
import os
import re
import runpy
import sys
import time

import torch

import files
import kernels
import lora
import parallel
from dataset import encoded, entries, load_dataset, pack, Sampler
from model import fill, GPT, GPTConfig, read_json
from tokenizer import get_tokenizer

# -----------------------------------------------------------------------------------------------------------
# models from anywhere


def checkpoint_of(name):
    """The checkpoint file that is meant: ckpt.pt of an out_dir, or the file itself; None: it is neither."""
    there = filter(os.path.isfile, (os.path.join(name, 'ckpt.pt'), name))
    return next(there, None)


def load_model(init_from, device='cpu', dtype=torch.float32, head='lm'):
    """(GPT, tokenizer name or directory) from an out_dir, a ckpt file, an HF or PEFT directory, or a hub
    name. Always a plain model: an adapter is merged into its base. A language model asked for with
    head='scalar' gets a fresh head; None: the one that it has. ValueError, one line, for what is no model."""
    file = checkpoint_of(init_from)
    adapted = None
    if file:
        ckpt = parallel.read_checkpoint(file, mmap=True)
        config, state, tokenizer = GPTConfig(**ckpt['model_args']), ckpt['model'], ckpt['tokenizer']
        if ckpt.get('lora'):
            adapted = with_adapter(ckpt, dtype)
    elif os.path.exists(os.path.join(init_from, 'adapter_config.json')):
        adapted, tokenizer = _from_peft(init_from, dtype)
    else:
        folder = files.resolve(init_from)
        return GPT.from_pretrained(folder, head, dtype).to(device), folder
    if adapted:
        merged = lora.merge_lora(adapted)
        config, state = merged.config, merged.state_dict()
    with torch.device('meta'):
        model = GPT(config, head or _head(state))
    return fill(model, state, file or init_from, dtype).to(device), tokenizer


def _head(state):
    return 'scalar' if 'score.weight' in state else 'lm'


def with_adapter(ckpt, dtype=torch.float32):
    """The model of a checkpoint that holds an adapter alone: on the base that it names, as trained."""
    base, _ = load_model(ckpt['lora']['base'], dtype=dtype, head=_head(ckpt['model']))
    return lora.load_state(base, ckpt['lora'], ckpt['model'])


def _from_peft(folder, dtype):
    """(the adapted model, tokenizer) of a PEFT directory: on the base that it names; its own tokenizer if it
    has one."""
    config = read_json(os.path.join(folder, 'adapter_config.json'))
    name = config.get('base_model_name_or_path')
    if not name:
        raise ValueError(f'{folder}: adapter_config.json names no base model (base_model_name_or_path)')
    head = 'scalar' if config.get('task_type') == 'SEQ_CLS' else 'lm'
    base, tokenizer = load_model(name, dtype=dtype, head=head)
    if any(os.path.exists(os.path.join(folder, file)) for file in ('tokenizer.json', 'vocab.json')):
        tokenizer = folder
    return lora.load_lora(base, folder), tokenizer


def check_fit(model, name, tok, T):
    """ValueError, naming the model, when ids of this tokenizer or sequences of T tokens do not fit it."""
    c = model.config
    if c.vocab_size < tok.vocab_size:
        raise ValueError(f'{name}: tokenizer {tok.name!r} has {tok.vocab_size} tokens, the model '
                         f'{c.vocab_size}: give the tokenizer that belongs to it, --tokenizer=...')
    if c.block_size < T:
        raise ValueError(f'{name} reads {c.block_size} tokens at most, this run has sequences of up to {T}: '
                         f'shorten them (block_size, max_new_tokens), or take a model with a longer context')


# -----------------------------------------------------------------------------------------------------------
# what it costs


def activation_bytes(c, tokens, T, itemsize=4, checkpointing=False):
    """What one forward pass keeps for its backward: per token and layer the inputs of norms, linears and
    activation. GPT-2 block, in units of C: x, x + attn, two norm outputs, qkv (3), attention output, 4 + 4
    around the GELU = 16. GPT-2 small, 1024 tokens, fp32: 12 * 1024 * 16 * 768 * 4 B = 604 MB."""
    qkv = (c.n_head + 2 * c.n_kv_head) * c.head_size
    block = 4 * c.n_embd + qkv + c.n_head * c.head_size + (3 if c.gated else 2) * c.n_inner
    if c.pos == 'rope':
        block += (c.n_head + c.n_kv_head) * c.head_size * (2 if c.qk_norm else 1)
    per_token = (c.n_embd * 2 * c.n_layer + block) if checkpointing else block * c.n_layer
    return tokens * (per_token + 4 * c.n_embd) * itemsize


def memory_now(device, peak=False):
    """Bytes that this process holds: torch's allocator on CUDA, the resident set on CPU (peak: the highest so
    far)."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    if peak:
        import resource
        unit = 1 if sys.platform == 'darwin' else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    try:
        with open('/proc/self/statm') as f:
            return int(f.read().split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0  # no /proc (Mac): the measured peak then includes the interpreter


# gives freed memory back to the system: batches whose lengths always differ leave glibc's heap full of holes
trim_heap = getattr(ctypes.CDLL(None), 'malloc_trim', int) if sys.platform == 'linux' else int


# -----------------------------------------------------------------------------------------------------------
# where it runs, and the folder it writes


def pick_device(device, dtype):
    """('auto' | 'cpu' | 'cuda' ..., 'auto' | 'float32' | 'bfloat16' | 'float16') -> (torch.device,
    torch.dtype). Weights stay float32; dtype is autocast's. auto: on a GPU bfloat16 where its chip has it,
    else float16, which is trained with loss scaling (nanoGPT's rule); float32 on CPU. The device becomes
    torch's current one: streams, events and graphs are made on it. ValueError names what is here."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ['cpu'] + [f'cuda:{i}' for i in range(gpus)] + ['mps'] * torch.backends.mps.is_available()
    if device == 'auto':
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        unused = next((f for f in ('/dev/nvidia0', '/dev/dxg', '/dev/kfd') if os.path.exists(f)), None)
        if device == 'cpu' and unused:
            print(f'{unused} is there, but this torch ({torch.__version__}, CUDA {torch.version.cuda}) sees '
                  f'no GPU: it runs on the CPU. Install the build for your driver.', file=sys.stderr)
    if device not in here and (device != 'cuda' or 'cuda:0' not in here):
        raise ValueError(f'device {device!r}: not here; this torch sees {", ".join(here)}')
    device = torch.device(device)
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    if dtype == 'auto':
        dtype = 'float32'
        if device.type == 'cuda':  # a T4 or RTX 2080 would only emulate bfloat16
            dtype = 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
    if dtype not in ('float32', 'bfloat16', 'float16'):
        raise ValueError(f"dtype {dtype!r}: expected 'auto', 'float32', 'bfloat16' or 'float16'")
    return device, getattr(torch, dtype)


def pick_threads(threads, n_params, device):
    """threads=0: at most two for models under 5 M parameters, whose products are too small for more (threads
    then spin on each other), else torch's choice. Sets it and returns it."""
    if device.type == 'cpu' and (threads or n_params < 5e6):
        torch.set_num_threads(threads or min(2, torch.get_num_threads()))
    return torch.get_num_threads()


def stage_of(config):
    """Which script a checkpoint's config belongs to; kto.py was a loss_type of dpo.py once."""
    return 'kto' if config.get('loss_type') == 'kto' else config['stage']


owned = {}  # folder -> its lock file, open as long as this process lives


def own_folder(out_dir, mesh):
    """One run writes a folder at a time. The kernel holds the lock and gives it back however the process
    ends, so a killed run blocks nobody; children made by fork do not keep it. ValueError where another
    process has it."""
    name = os.path.realpath(out_dir)
    taken = mesh.master and name not in owned
    for patience in (0.2, 0):  # who only looks whether it is held holds it for a moment
        if taken:
            try:
                owned[name] = lock = files.locked(os.path.join(name, '.lock'), wait=False)
                os.register_at_fork(after_in_child=lock.close)
                taken = False
            except BlockingIOError:
                time.sleep(patience)
    if mesh.everyone.share_object(taken, 0, 'lock of the folder'):
        raise ValueError(f'{out_dir} is being written by a run right now: stop that one, or give another '
                         f'--out_dir')


def open_run(out_dir, init_from, overwrite, stage, mesh=parallel.ALONE):
    """The checkpoint to resume from, or None for a fresh start. A folder that already holds a run is never
    overwritten unasked; one that torchrun has restarted goes on. mesh: of parallel.init. ValueError tells
    what to do."""
    file = os.path.join(out_dir, 'ckpt.pt')
    there = os.path.exists(file)
    resume = init_from == 'resume' or there and mesh.restarted(out_dir)
    if resume and not there:
        raise ValueError(f'{file}: nothing to resume from; start without --init_from=resume')
    if there and not resume and not overwrite:
        raise ValueError(f'{out_dir} already holds a run: --init_from=resume continues it, --out_dir=... '
                         f'starts another, --overwrite=True replaces it')
    own_folder(out_dir, mesh)
    ckpt = None
    if resume:
        ckpt = parallel.read_checkpoint(file, mmap=mesh.world > 1)  # ranks share its pages
        theirs = stage_of(ckpt['config'])
        if theirs != stage:
            raise ValueError(f'{out_dir} is a run of {theirs}.py, this is {stage}.py: give another --out_dir')
        mesh.saved(file, ckpt['iter'])
    else:
        mesh.barrier()  # all have looked
        if mesh.agent and mesh.master and there:
            os.remove(file)  # or torchrun, starting us again before the first checkpoint, would resume that
    mesh.mark(out_dir)
    return ckpt


def same_settings(config, old, out_dir):
    """On resume: what the old config has and a new one cannot change is taken over, or refused by name where
    the new one says something else. Everything else takes effect as it is given."""
    fixed = ['seed', 'batch_size', 'group_size', 'tokenizer']
    lora_keys = [key for key in config if key.startswith('lora_')]
    if config['lora_r']:
        fixed += lora_keys
    for key in fixed:
        if key in config and config[key] not in ('', old.get(key, config[key])):
            raise ValueError(f'{key} {config[key]!r}: {out_dir} was started with {old[key]!r}, which a '
                             f'resumed run cannot change; start a new run with --init_from={out_dir}')
    shape = ['init_from', 'arch', 'n_layer', 'n_head', 'n_embd', 'bias']
    config.update({key: old[key] for key in [*shape, *lora_keys] if key in old})


def digest(items):
    """SHA-256 of plain rows, or of tuples of arrays: are they the same ones?"""
    found = hashlib.sha256()
    for item in items:
        if isinstance(item, tuple) and all(hasattr(part, 'tobytes') for part in item):
            item = b''.join(part.tobytes() for part in item)
        found.update(item if isinstance(item, bytes) else repr(item).encode())
    return found.hexdigest()


def rows_before(path, ckpt):
    """The lines of a log that were written before the checkpoint. Later ones are dropped, so that no step of
    a resumed run stands there twice; so is the half line that a kill left."""
    kept = []
    if ckpt and os.path.exists(path):
        end = 2 * ckpt['iter'] + ckpt.get('evaluated', True)  # an iteration's evaluation precedes its update
        with open(path, encoding='utf-8') as f:
            lines = f.readlines()
        for text in lines:
            with contextlib.suppress(ValueError):
                row = json.loads(text)
                split = row.get('split')
                if split != 'config' and 2 * row['step'] + (split == 'train') < end:
                    kept.append(text)
    return kept


def load_function(path, name, usage):
    """The function `name` of a Python file of the user's, whose folder can be imported from while it loads.
    ValueError, with `usage` in it, when the file is missing, does not run, or has no such function."""
    if not os.path.isfile(path):
        raise ValueError(f'{name} {path}: no such file; it defines {usage}')
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
        space = runpy.run_path(path, run_name=name)
    except Exception as e:
        raise ValueError(f'{name} {path} does not run: {type(e).__name__}: {e}') from e
    finally:
        sys.path.pop(0)
    if not callable(space.get(name)):
        raise ValueError(f'{name} {path}: it defines no {usage}')
    return space[name]


def open_logger(name, out_dir, config, ckpt):
    """--log_to: a function (step, split, {metric: number}) that takes the rows of log.jsonl to 'tensorboard'
    (into out_dir), 'wandb' (project plainRLHF), or to the function `log` of FILE.py. ValueError for another
    name, and for a package that is not installed."""
    if name.endswith('.py'):
        return load_function(name, 'log', 'log(step, split, metrics)')
    if name not in ('tensorboard', 'wandb'):
        raise ValueError(f"log_to {name!r}: expected 'tensorboard', 'wandb' or a FILE.py that defines "
                         f"log(step, split, metrics)")
    try:
        if name == 'wandb':
            import wandb
        else:
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError(f'log_to {name!r}: it is not installed, pip install {name}') from None
    if name == 'wandb':
        same = hashlib.sha256(os.path.abspath(out_dir).encode()).hexdigest()[:16]  # also when resumed
        there = wandb.init(project='plainRLHF', name=os.path.basename(out_dir), dir=out_dir, config=config,
                           id=same, resume='allow' if ckpt else None)
    else:  # it forgets what it had of the checkpoint's iteration on
        there = SummaryWriter(out_dir, purge_step=ckpt['iter'] if ckpt else None)

    def log(step, split, metrics):
        row = {f'{split}/{key}': value for key, value in metrics.items()}
        if name == 'wandb':
            return there.log(row, step=step)
        for key, value in row.items():
            there.add_scalar(key, value, step)
        there.flush()
    return log


class RunLog:
    """out_dir/log.jsonl: one row an iteration and evaluation; the first row holds the config. A resumed run
    goes on behind the rows before its checkpoint, here and in samples.jsonl. The same numbers go to what
    log_to names; one that fails is told of and left out, the run goes on. master: of several ranks one
    writes."""

    def __init__(self, out_dir, config, ckpt, master):
        self.file = None
        self.began = time.time() - (ckpt['time'] if ckpt else 0)
        if not master:
            return
        first = json.dumps(dict(step=0, time=0.0, split='config', **config)) + '\n'
        for name, head in (('samples.jsonl', []), ('log.jsonl', [first])):
            path = os.path.join(out_dir, name)
            lines = head + rows_before(path, ckpt)
            with files.replaced(path, 'w') as f:
                f.writelines(lines)
        self.file = open(path, 'a', buffering=1, encoding='utf-8')
        names = filter(None, map(str.strip, config['log_to'].split(',')))
        self.others = {name: open_logger(name, out_dir, config, ckpt) for name in names}
        if ckpt and 'tensorboard' in self.others:  # see its purge_step
            for row in map(json.loads, lines[1:]):
                if row['step'] == ckpt['iter']:
                    self.send('tensorboard', row)

    def elapsed(self):
        return time.time() - self.began

    def row(self, step, split, metrics):
        """Writes one row; metrics are numbers, words or lists of them."""
        if self.file is not None:
            row = dict(step=step, time=round(self.elapsed(), 3), split=split, **metrics)
            self.file.write(json.dumps(row) + '\n')
            for name in list(self.others):
                self.send(name, row)

    def send(self, name, row):
        """The numbers of one row to another logger."""
        numbers = {key: value for key, value in row.items() if isinstance(value, (int, float))}
        step = numbers.pop('step')
        del numbers['time']
        try:
            self.others[name](step, row['split'], numbers)
        except Exception as e:
            print(f'log_to {name} failed at step {step} ({type(e).__name__}: {e}): no more rows go there')
            del self.others[name]


RESUME_LOWER = 'resume from it with a lower learning_rate or grad_clip'


def check_finite(step, out_dir, **metrics):
    """Stops the run at the first number that is not finite: JSON knows no NaN, nor should a reader."""
    for name, value in metrics.items():
        if isinstance(value, (int, float)) and not math.isfinite(value):
            raise ValueError(f'iter {step}: {name} is {value}; the last good checkpoint is '
                             f'{out_dir}/ckpt.pt: {RESUME_LOWER}')


def eta(seconds):
    if seconds < 100:
        return f'{seconds:.0f}s'
    return f'{seconds / 60:.0f}m' if seconds < 6000 else f'{seconds / 3600:.1f}h'


SHOWN = dict(  # how a metric looks on the console
    loss='loss {:.4f}', accuracy='acc {:.1%}', accuracy_95='{0[0]:.1%} to {0[1]:.1%}', margin='margin {:.3f}',
    chosen_logp='chosen {:.1f}', rejected_logp='rejected {:.1f}', grad_norm='norm {:.2f}', lr='lr {:.1e}',
    score='score {:.3f}', kl='kl {:.2f} nats/seq', len='len {:.1f} tok', ended='ended {:.0%}',
    ece='ece {:.3f}', length_correlation='length correlation {:+.2f}', pg='pg {:.3f}', vf='vf {:.3f}',
    clip_frac='clip {:.1%}', dead='dead {:.0%}', mismatch='mismatch {:.1e}', staleness='staleness {:.1f}',
    idle='idle {:.0%}', gen_s='gen {:.1f}s', upd_s='upd {:.1f}s')


def line(metrics, keys):
    """'loss 0.6931 | lr 1.0e-03' of the metrics that are there."""
    keys = dict.fromkeys(keys.split())  # each once: pass@1 may be pass@eval_k too
    return ' | '.join(SHOWN.get(k, k + ' {:.3g}').format(metrics[k]) for k in keys if k in metrics)


# -----------------------------------------------------------------------------------------------------------
# the run


def encode_all(rows, encode, name, args=None):
    """Items of all rows. encode(row) -> ([item, ...], note), the note ('' or words) is counted and printed.
    With args, (tokenizer, ...), it is encode(row, *args), and the items, tuples of token ids, masks and
    numbers, lie in mapped pages: see dataset.encoded. ValueError names file and row of what encode refuses,
    and a data set of which nothing is left."""
    if args is None:
        found = list(entries(rows, encode, name))
        items = [item for _, item, _ in found if item]
        notes = collections.Counter(note for _, _, note in found if note)
    else:
        def key():
            with open(encode.__code__.co_filename, encoding='utf-8') as f:
                return repr([encode.__name__, f.read(), args[0].state(), args[1:]])
        items, notes = encoded(rows, lambda row: encode(row, *args), name, key)
    said = ', '.join(f'{n} {note}' for note, n in notes.items())
    if not len(items):
        raise ValueError(f'{name}: no usable row of {len(rows)}: {said}')
    if said:
        print(f'{name}: {said}')
    return items


def prompt_room(model, max_new_tokens):
    """How many tokens a prompt may have when so many are to follow. ValueError when none is left."""
    room = model.config.block_size - max_new_tokens
    if room < 1:
        raise ValueError(f'max_new_tokens {max_new_tokens} leaves no room for a prompt in the context of '
                         f'{model.config.block_size} tokens: lower it')
    return room


@contextlib.contextmanager
def reference_of(policy, frozen):
    """Inside: the model that the policy is compared with, the frozen one, or (None) the policy with its
    adapter off."""
    if frozen is not None:
        yield frozen
    else:
        with lora.lora_disabled(policy):
            yield policy


class Run:
    """What all stages do around their algorithm; see the top of this file for the order. config: the keys of
    the stage; what was only typed ('resume') gives way in it to what it stands for. folder=False: writes
    nothing."""

    def __init__(self, stage, config, folder=True):
        config['stage'] = stage
        self.config, self.out_dir, self.planned = config, config['out_dir'], 0
        sys.excepthook = functools.partial(self.failed, sys.excepthook)
        device, self.dtype = pick_device(config['device'], config['dtype'])
        kernels.use(config['kernels'])
        parallel.check_stage(stage, config)
        sizes = [config[key] for key in ('tp', 'pp', 'cp', 'zero', 'dist_timeout')]
        self.mesh = parallel.init(*sizes, device, config['seed'], quiet=True)
        self.device = self.mesh.device
        data = config['dataset']
        self.val_name = config['val_dataset'] or f'{data} (5 % kept aside)'
        if not os.path.exists(data):
            raise ValueError(f'{data}: no such data; python {os.path.dirname(data) or "data/toy"}/prepare.py '
                             f'makes it (or name a file of your own)')
        self.ckpt = None
        if folder:
            self.ckpt = open_run(self.out_dir, config['init_from'], config['overwrite'], stage, self.mesh)
        if self.ckpt:
            same_settings(config, self.ckpt['config'], self.out_dir)
        self.best = self.ckpt['best'] if self.ckpt else None
        self.networks, self.memory, self.cursor = {}, collections.Counter(), None
        self.extra = {}  # further keys of the checkpoint

    def amp(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def failed(self, otherwise, kind, error, tb):
        """Python's last word on an error. Two kinds get one line of their own: memory that ran out, and
        weights that sampling found broken."""
        said = str(error)
        if issubclass(kind, FloatingPointError):
            said = f'{said}; the last good checkpoint is {self.out_dir}/ckpt.pt: {RESUME_LOWER}'
        elif kind.__name__ in ('OutOfMemoryError', 'MemoryError') or 'DefaultCPUAllocator' in said:
            asked = re.findall(r'tried to allocate [\d.]+ \w+', said, re.I)[:1]
            said = (f'{": ".join(["out of memory", *asked])}; the plan was {self.planned / 1e9:.2f} GB. What '
                    f'helps, the cheapest first: {self.savers()}')
        else:
            return otherwise(kind, error, tb)
        print(f'error: {said}', file=sys.stderr)
        sys.exit(2)

    # ---- models and rows

    def model(self, head='lm', scratch=None, dropout=0.0):
        """(model on the device, its tokenizer): resumed, loaded, or made of `scratch` (a GPTConfig); with
        lora_r frozen but for an adapter, see lora.add_lora."""
        c, name = self.config, self.config['init_from']
        self.lora = self.ckpt.get('lora') if self.ckpt else None  # what a checkpoint says of its adapter
        if self.lora:
            model, tokenizer = with_adapter(self.ckpt), self.ckpt['tokenizer']
        elif self.ckpt:
            model, tokenizer = load_model(self.out_dir, head=head)
        elif name != 'scratch':
            model, tokenizer = load_model(name, head=head)
        elif scratch:
            model, tokenizer = GPT(scratch, head), ''
        else:
            raise ValueError(f'{c["stage"]}.py starts from a model that can answer: --init_from=out-sft '
                             f'(made by python sft.py config/sft_toy.py), a name or a directory')
        if c['lora_r'] and not self.ckpt:
            keys = [key for key in c if key.startswith('lora_')]
            lora.add_lora(model, **{key.removeprefix('lora_'): c[key] for key in keys})
            base = os.path.abspath(name) if os.path.exists(name) else name  # from any folder, then
            self.lora = lora.describe(model, base)  # now: a pipeline stage will not have all layers
        self.tokenizer = c['tokenizer'] or tokenizer
        tok = get_tokenizer(self.tokenizer)
        check_fit(model, name, tok, 0)
        model.config.dropout, model.checkpointing = dropout, c['checkpointing']
        model = model.to(self.device)
        self.n_params = model.num_params()
        self.threads = pick_threads(c['threads'], self.n_params, self.device)
        if c['compile']:
            model.compile_blocks()
        return model, tok

    def reference(self, policy, tok, T, name=''):
        """The frozen model that the policy is compared with (init_from, or `name`), for sequences of T
        tokens; None where it is the policy itself with its adapter off, which costs nothing."""
        if lora.adapted(policy) and not name:
            return None
        name = name or self.config['init_from']
        model, _ = load_model(name, self.device)
        check_fit(model, name, tok, T)
        model.config.dropout = 0.0
        self.memory['reference'] += sum(p.nbytes for p in model.parameters())
        return parallel.shard(model.requires_grad_(False).eval(), self.mesh)

    def rows(self):
        """(training rows, held-out rows) of dataset and val_dataset; '' keeps 5 % of dataset aside. max_rows:
        the first ones only, to train on."""
        c = self.config
        train = load_dataset(c['dataset'])
        if c['val_dataset']:
            held_out = load_dataset(c['val_dataset'])
        elif len(train) < 2:
            raise ValueError(f'{c["dataset"]}: {len(train)} row, so none can be kept aside: add rows, or '
                             f'give --val_dataset')
        else:
            parts = train.train_test_split(0.05, c['seed'])
            train, held_out = parts['train'], parts['test']
        if 0 < c.get('max_rows', 0) < len(train):
            train = train.select(range(c['max_rows']))
        return train, held_out

    def same_rows(self, items):
        """ValueError when a resumed run is given other rows than it was trained on."""
        self.extra['rows'] = found = digest(items)
        if self.ckpt and self.ckpt.get('rows', found) != found:
            raise ValueError(f'dataset {self.config["dataset"]}: not the rows that {self.out_dir} was '
                             f'trained on (or cut otherwise): start a new run with --init_from')

    def order(self, items, batch_size):
        """Endless batches of row numbers; resumed behind the last one."""
        self.same_rows(items)
        self.cursor = Sampler(len(items), batch_size, self.config['seed'])
        if self.ckpt:
            self.cursor.load_state_dict(self.ckpt['data'])
        return self.cursor

    def trained(self, model, learning_rate, eps=1e-8, key='model'):
        """(this rank's part of the model, its AdamW). key: where they stand in a checkpoint, 'model' or
        'value'."""
        c = self.config
        if not self.networks:  # what the process holds besides models: interpreter, torch, data
            models = sum(p.nbytes for p in model.parameters()) + sum(self.memory.values())
            self.base = memory_now(self.device) - models
        part = self.mesh.plan(model)  # on the fullest rank
        gradients = part['gradients'] + part['in_flight'] * (self.mesh.world > 1)
        self.memory.update(weights=part['weights'], grads=gradients, adam=part['optimizer'])
        self.n_trained = sum(p.numel() for _, p in lora.trainable(model))
        model = parallel.shard(model, self.mesh)
        betas = c['beta1'], c['beta2']
        scale = 65536.0 if self.dtype == torch.float16 else 0.0  # of the loss; changes as it learns
        optimizer = parallel.Optimizer(model, self.mesh, learning_rate, betas, eps, c['weight_decay'], scale)
        self.mesh.split_seeds(c['seed'])
        if self.ckpt:
            optimizer.load_state_dict(self.ckpt['optimizer' if key == 'model' else 'value_optimizer'])
        self.networks[key] = model, optimizer
        return model, optimizer

    def savers(self):
        """The keys that save memory with their values, the cheapest first: micro_tokens changes no result."""
        keys = ('micro_tokens', 'checkpointing', 'max_num_seqs', 'lora_r', 'batch_size')
        return ', '.join(f'{key} (now {self.config[key]})' for key in keys if key in self.config)

    def of_a_step(self, tokens, T):
        """{what: bytes} that exist only while a micro-batch of that many tokens is trained on."""
        c = self.networks['model'][0].config
        tokens = tokens // (self.config['tp'] * self.config['cp'])
        activations = activation_bytes(c, tokens, T, checkpointing=self.config['checkpointing'])
        return dict(activations=activations, logits=kernels.logits_bytes(self.device, tokens, c.vocab_size))

    def kv_memory(self, tokens, T):
        """Bytes of the card that keys and values of an engine may take: what is free now less what training
        will take (gradients and moments are made in the first step) and 5 % that nobody plans. 0 on a CPU:
        there the engine decides."""
        if self.device.type != 'cuda':
            return 0
        free, card = torch.cuda.mem_get_info(self.device)
        to_come = self.memory['grads'] + self.memory['adam'] + sum(self.of_a_step(tokens, T).values())
        return max(1, int(free - to_come - 0.05 * card))

    def plan(self, tokens, T, **more):
        """Prints what runs where and the memory that it will take. tokens: of one micro-batch on one rank, of
        sequences of up to T; more: {what: bytes} that the stage holds besides."""
        parts = {**self.memory, **more, **self.of_a_step(tokens, T)}
        self.planned = sum(parts.values())
        said = ' + '.join(f'{what} {size / 1e9:.2f}' for what, size in parts.items() if size)
        print(f'memory plan: {said} = {self.planned / 1e9:.2f} GB')
        card = torch.cuda.mem_get_info(self.device)[1] if self.device.type == 'cuda' else math.inf
        if self.planned > card:
            over = (self.planned - card) / 1e9
            print(f'that is {over:.2f} GB more than the card has: lower {self.savers()}')
        where = f'{self.device}{self.mesh.words()}, {self.dtype}, {self.threads} threads'
        if self.device.type == 'cpu' and self.threads > 1:  # how long an idle one looks for work
            where += f' (spin {os.environ.get("GOMP_SPINCOUNT", "of libgomp")})'
        print(f'{self.n_params / 1e6:.2f} M parameters ({self.n_trained:,} trained) on {where}, '
              f'kernels: {kernels.which()}')

    # ---- micro-batches

    def micro_batches(self, lengths):
        """Row numbers of a batch in lists of at most micro_tokens tokens (or one longer row); of several
        replicas each gets its share."""
        return self.mesh.share_of(pack(lengths, max([self.config['micro_tokens'], *lengths])), lengths)

    def each(self, model, lengths, fn):
        """[what fn finds for each row], on the CPU, without gradient, on every rank. fn(model, [row numbers])
        -> tensor with one entry a row; lengths: tokens of the rows."""
        out, micros = [None] * len(lengths), self.micro_batches(lengths)
        with self.amp():
            found = parallel.evaluate(model, micros, fn)
        for rows, values in self.mesh.collect(list(zip(micros, found))):
            for i, value in zip(rows, values.cpu()):
                out[i] = value
        return out

    # ---- the loop

    def iterations(self, max_iters):
        """0 .. max_iters, or from where the checkpoint stood; at max_iters a stage only evaluates."""
        start = self.ckpt['iter'] if self.ckpt else 0
        if self.ckpt:
            self.mesh.set_rng_state(self.ckpt['rng'])
        self.log_file = RunLog(self.out_dir, self.config, self.ckpt, self.mesh.master)
        self.mesh.listen()  # from here on the first Ctrl-C or SIGTERM lets the iteration end
        self.saved = self.trimmed = time.time()
        for it in range(start, max_iters + 1):
            self.clock = time.time()
            yield it
            minutes = self.mesh.everyone.share_object((time.time() - self.saved) / 60, 0, 'clock')
            signal = self.mesh.interrupted()
            if signal or 0 < self.config['save_minutes'] < minutes:
                self.save(it + 1, evaluated=False)
            if signal:
                print(f'stopped after iteration {it}, which {self.out_dir}/ckpt.pt holds: the same command '
                      f'with --init_from=resume continues it')
                self.mesh.close()
                sys.exit(128 + signal)  # as a shell counts

    def due(self, it):
        """Is it time to evaluate? Not where a checkpoint that holds this very evaluation was resumed."""
        if self.config['eval_only']:
            return True
        if self.ckpt and it == self.ckpt['iter'] and self.ckpt.get('evaluated', True):
            return False
        return it % self.config['eval_interval'] == 0 or it == self.config['max_iters']

    def evaluated(self, it, metrics, mark, show, lower=False):
        """Ends an evaluation: numbers that are not finite stop the run, and the last good checkpoint stays;
        else they are logged and (but for eval_only) saved, the best so far also to ckpt_best.pt. mark: what
        "best" goes by, higher is better unless lower=True; show: the metrics on the console."""
        check_finite(it, self.out_dir, mark=mark, **metrics)
        print(f'step {it}: val {line(metrics, show)}')
        self.log_file.row(it, 'eval', {k: v for k, v in metrics.items() if isinstance(v, (int, float))})
        if not self.config['eval_only']:
            better = self.best is None or (mark < self.best if lower else mark > self.best)
            self.best = mark if better else self.best
            self.save(it, better)
        self.clock = time.time()

    def save(self, it, better=False, evaluated=True):
        """Writes ckpt.pt, the state before iteration `it`; better: ckpt_best.pt too."""
        best = os.path.join(self.out_dir, 'ckpt_best.pt') if better else None
        model, optimizer = self.networks['model']
        value = self.networks.get('value', (None, None))  # PPO's second network and its optimizer
        state = dict(self.extra, config=self.config, tokenizer=self.tokenizer, iter=it, best=self.best)
        state |= dict(time=self.log_file.elapsed(), evaluated=evaluated)
        state['data'] = self.cursor.state_dict() if self.cursor is not None else None
        state['model_args'] = dataclasses.asdict(model.config)
        bias = model.config.reward_bias
        state['lora'] = dict(self.lora, reward_bias=bias) if self.lora else None
        keep = lora.is_adapter if self.lora else None  # its base lies where it lay
        file = os.path.join(self.out_dir, 'ckpt.pt')
        parallel.save_checkpoint(file, self.mesh, model, optimizer, *value, keep=keep, also=best, **state)
        self.saved = time.time()

    def replace(self, path, saved):
        """Writes a checkpoint that was read and changed; whoever reads sees the old file or the new one."""
        if self.mesh.master:
            with files.replaced(path) as f:
                torch.save(saved, f)
        self.mesh.barrier()

    def log(self, it, metrics, show):
        """One row of log.jsonl, its speed added; a line of it every tenth iteration, and for each that takes
        a second."""
        now = time.time()
        seconds = now - self.clock
        if now - self.trimmed > 1:  # some ms; the step's activations are free
            trim_heap(0)
            self.trimmed = now
        metrics = {k: (v.item() if torch.is_tensor(v) else v) for k, v in metrics.items()}
        metrics['tok_per_s'] = metrics['tokens'] / seconds
        check_finite(it, self.out_dir, **metrics)
        self.log_file.row(it, 'train', metrics)
        if it % 10 == 0 or seconds > 1:
            last = self.config['max_iters']
            left = eta((last - it) * seconds)
            print(f'iter {it}/{last} | {line(metrics, show)} | {seconds * 1e3:.0f} ms | '
                  f'{metrics["tok_per_s"]:,.0f} tok/s | eta {left}')

    def finish(self, said):
        """The last line: what came out, the memory that it took beside the plan, where it is."""
        peak = memory_now(self.device, peak=True) - max(0, self.base)
        print(f'done: {said}, peak memory {peak / 1e9:.2f} GB (planned {self.planned / 1e9:.2f}), checkpoint '
              f'in {self.out_dir}/ckpt.pt')
        self.mesh.close()


# -----------------------------------------------------------------------------------------------------------
# out of the project


def export(init_from, to, adapter=False, dtype='float32'):
    """Writes what load_model reads as a Hugging Face folder, its adapter merged, with its tokenizer;
    adapter=True: the adapter of an out_dir alone, as a PEFT folder. A base that is a run of ours is exported
    beside it, into `to`/base, for PEFT to find. ValueError for a folder that is not empty."""
    if not to or (os.path.exists(to) and os.listdir(to)):
        raise ValueError(f'to {to!r}: name a folder that is new or empty, --to=DIR')
    if adapter:
        file = checkpoint_of(init_from)
        ckpt = parallel.read_checkpoint(file) if file else {}
        if not ckpt.get('lora'):
            raise ValueError(f'{init_from} was trained without an adapter: leave out --adapter=True')
        model, tokenizer, base = with_adapter(ckpt), ckpt['tokenizer'], ckpt['lora']['base']
        if checkpoint_of(base):
            beside = os.path.join(os.path.abspath(to), 'base')
            export(base, beside, dtype=dtype)
            base = beside
        lora.save_lora(model, to, base=base)
    else:
        model, tokenizer = load_model(init_from, head=None)
        model.to(getattr(torch, dtype)).save_pretrained(to)
    get_tokenizer(tokenizer).save(to)
    print(f'{to}: {", ".join(sorted(os.listdir(to)))}')


if __name__ == '__main__':
    init_from = '' # what to export: an out_dir, a ckpt file, an HF or PEFT directory, a hub name
    to = '' # the folder to write, new or empty
    adapter = False # a PEFT folder of the adapter alone, instead of a model with the adapter merged
    dtype = 'float32' # one of 'float32', 'bfloat16', 'float16': of the weights in the file
    config_keys = ['init_from', 'to', 'adapter', 'dtype']
    if sys.argv[1:2] == ['export']:
        del sys.argv[1]
    elif not {'-h', '--help'} & set(sys.argv):
        sys.exit('error: python run.py export --init_from=out-ppo --to=DIR; stages are run by their own name')
    exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
    export(init_from, to, adapter, dtype)
