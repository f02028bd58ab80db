"""A run: device, dtype, threads, models from anywhere, the folder and its checkpoint, the log, memory planned and measured.

What is the same in every stage stands here, so that a stage holds its equations and its loop alone.
"""
import ctypes
import dataclasses
import json
import math
import os
import sys
import time

import torch

import kernels
import lora
import parallel
from model import GPT, GPTConfig, _fill, resolve

# ---------------------------------------------------------------------------------------------------------------------
# what every stage needs: a model from anywhere, and what it will cost


def load_model(init_from, device='cpu', dtype=torch.float32, head='lm'):
    """(GPT, tokenizer name or directory) from an out_dir, a ckpt file, an HF directory or a hub name. A language model
    asked for with head='scalar' gets a fresh head; a checkpoint of an adapter is loaded onto its base and merged."""
    file = os.path.join(init_from, 'ckpt.pt') if os.path.exists(os.path.join(init_from, 'ckpt.pt')) else init_from
    if not os.path.isfile(file):
        if init_from.startswith('out') and not os.path.isdir(init_from):
            raise ValueError(f'{init_from}: no such checkpoint; run the stage that writes it first (--out_dir={init_from})')
        folder = resolve(init_from)
        return GPT.from_pretrained(folder, head, dtype).to(device), folder
    try:
        ckpt = torch.load(file, map_location='cpu', weights_only=True, mmap=True)
        config, state = GPTConfig(**ckpt['model_args']), ckpt['model']
    except (RuntimeError, KeyError, TypeError, EOFError) as e:
        raise ValueError(f'{file}: not a checkpoint of ours ({type(e).__name__}: {str(e).splitlines()[0][:80]})') from None
    if ckpt.get('lora'):
        model, _ = load_model(ckpt['lora']['base'], device, dtype, head)
        return lora.merge_lora(lora.load_state(model, ckpt['lora'], state)), ckpt['tokenizer']
    with torch.device('meta'):
        model = GPT(config, head)
    model = _fill(model, state, file, dtype, fresh_head=(head == 'scalar' and 'score.weight' not in state))
    return model.to(device), ckpt['tokenizer']


def activation_bytes(c, tokens, T, itemsize=4, checkpointing=False):
    """What one forward pass keeps for its backward: per token and layer the inputs of norms, linears and activation.
    GPT-2 block, in units of C: x, x + attn, two norm outputs, qkv (3), attention output, 4 + 4 around the GELU = 16.
    GPT-2 small, 1024 tokens, fp32: 12 * 1024 * 16 * 768 * 4 B = 604 MB."""
    qkv = (c.n_head + 2 * c.n_kv_head) * c.head_size
    block = 4 * c.n_embd + qkv + c.n_head * c.head_size + (3 if c.gated else 2) * c.n_inner
    if c.pos == 'rope':
        block += (c.n_head + c.n_kv_head) * c.head_size * (2 if c.qk_norm else 1)
    per_token = (c.n_embd * 2 * c.n_layer + block) if checkpointing else block * c.n_layer
    return tokens * (per_token + 4 * c.n_embd) * itemsize


def kv_cache_bytes(c, tokens, itemsize=4):
    return 2 * c.n_layer * tokens * c.n_kv_head * c.head_size * itemsize


def peak_flops(device, dtype=torch.bfloat16):
    """FLOP/s of the device: a table of GPUs (dense, tensor cores, bf16), on CPU a matrix product timed here and now."""
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
        return next((v for k, v in {'H200': 989e12, 'H100': 989e12, 'A100': 312e12, '4090': 165e12, '3090': 71e12}.items() if k in name), 312e12)
    a = torch.randn(1024, 1024)
    kernels.matmul_t(a, a)
    t = time.perf_counter()
    for _ in range(5):
        kernels.matmul_t(a, a)
    return 5 * 2 * 1024 ** 3 / (time.perf_counter() - t)


def pick_device(device, dtype):
    """('auto' | 'cpu' | 'cuda' ..., 'auto' | 'float32' | 'bfloat16' | 'float16') -> (torch.device, torch.dtype). Weights stay
    float32; dtype is autocast's. auto: bfloat16 on a GPU that has it (float16 would need loss scaling), float32 on CPU."""
    device = torch.device(('cuda' if torch.cuda.is_available() else 'cpu') if device == 'auto' else device)
    if device.type == 'cuda' and not torch.cuda.is_available():
        raise ValueError(f"device {device}: this torch sees no GPU; --device=cpu runs here")
    names = dict(float32=torch.float32, bfloat16=torch.bfloat16, auto=torch.bfloat16 if device.type == 'cuda' and torch.cuda.is_bf16_supported() else torch.float32)
    if dtype not in names:
        raise ValueError(f"dtype {dtype!r}: expected 'auto', 'float32' or 'bfloat16'")
    return device, names[dtype]


def pick_threads(threads, n_params, device):
    """threads=0: at most two for models under 5 M parameters, whose products are too small for more (threads then spin on each
    other), else torch's choice. Sets it and returns it."""
    if device.type == 'cpu' and (threads or n_params < 5e6):
        torch.set_num_threads(threads or min(2, torch.get_num_threads()))
    return torch.get_num_threads()


def open_run(out_dir, init_from, overwrite, stage, mesh=parallel.ALONE):
    """The checkpoint to resume from, or None for a fresh start. A folder that already holds a run is never overwritten
    unasked; one that torchrun has restarted goes on. mesh: of parallel.init. ValueError tells what to do."""
    file = os.path.join(out_dir, 'ckpt.pt')
    if mesh.restarted(out_dir) and os.path.exists(file):
        init_from = 'resume'
    if init_from == 'resume':
        if not os.path.exists(file):
            pieces = os.path.exists(os.path.join(out_dir, 'ckpt.shards.json'))
            raise ValueError(f'{file}: ' + (f'only per-rank files are there; join them: python parallel.py merge {out_dir}' if pieces else
                                            'nothing to resume from; start without --init_from=resume'))
        try:
            ckpt = torch.load(file, map_location='cpu', weights_only=True, mmap=mesh.world > 1)  # the ranks of a node share its pages
            theirs = ckpt['config']['stage']
        except (RuntimeError, KeyError, TypeError, EOFError, ValueError) as e:
            raise ValueError(f'{file}: not a checkpoint of ours ({type(e).__name__}); {out_dir}/ckpt_best.pt may still be good') from None
        if theirs != stage:
            raise ValueError(f'{out_dir} is a run of {theirs}.py, this is {stage}.py: give another --out_dir')
        mesh.mark(out_dir)
        mesh.saved(file, ckpt['iter'])
        return ckpt
    if os.path.exists(file) and not overwrite:
        raise ValueError(f'{out_dir} already holds a run: --init_from=resume goes on with it, --out_dir=... starts beside it, --overwrite=True starts anew')
    os.makedirs(out_dir, exist_ok=True)
    mesh.barrier()  # all have looked
    if mesh.torchrun and mesh.master and os.path.exists(file):
        os.remove(file)  # or torchrun, starting us again before the first checkpoint, would go on with the old run
    mesh.mark(out_dir)
    return None


class RunLog:
    """out_dir/log.jsonl: one row an iteration and evaluation; the first row holds the config. Resumed at iteration `step`,
    it drops what was logged behind the checkpoint and goes on, so that no step stands in it twice. master: of several ranks one writes."""

    def __init__(self, out_dir, config, ckpt=None, master=True):
        self.file, self.t0 = None, time.time() - (ckpt['time'] if ckpt else 0)
        if master:
            self._open(out_dir, config, ckpt)

    def _open(self, out_dir, config, ckpt):
        self.path, rows = os.path.join(out_dir, 'log.jsonl'), []
        if ckpt and os.path.exists(self.path):
            for line in open(self.path):
                try:
                    row = json.loads(line)
                except ValueError:
                    continue  # the half line of a kill
                if row['step'] < ckpt['iter'] or (row['step'] == ckpt['iter'] and row['split'] != 'train'):
                    rows.append(line)
            rows = rows[1:]
        with open(self.path + '.tmp', 'w') as f:
            f.writelines([json.dumps(dict(step=0, time=0.0, split='config', **config)) + '\n', *rows])
        os.replace(self.path + '.tmp', self.path)
        self.file = open(self.path, 'a', buffering=1)

    def elapsed(self):
        return time.time() - self.t0

    def row(self, step, split, **metrics):
        """Writes one row; a metric that is not finite ends the run with its name (JSON knows no NaN, nor should a reader)."""
        metrics = {k: (v.item() if torch.is_tensor(v) else v) for k, v in metrics.items()}
        if self.file is not None:
            self.file.write(json.dumps(dict(step=step, time=round(self.elapsed(), 3), split=split, **metrics)) + '\n')
        trim_heap()


def check_finite(step, out_dir, **metrics):
    """Stops the run at the first metric that is not finite."""
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise ValueError(f'iter {step}: {name} is {value}; the last good checkpoint is {out_dir}/ckpt.pt: resume from it with a lower '
                             f'learning_rate or a smaller grad_clip')


def eta(seconds):
    return f'{seconds:.0f}s' if seconds < 100 else f'{seconds / 60:.0f}m' if seconds < 6000 else f'{seconds / 3600:.1f}h'


def memory_plan(parts):
    """{what: bytes} -> prints one line a part and the sum; returns the sum."""
    total = sum(parts.values())
    print('memory plan: ' + ' + '.join(f'{k} {v / 1e9:.2f}' for k, v in parts.items() if v) + f' = {total / 1e9:.2f} GB')
    return total


def training_bytes(model, mesh=None, itemsize=4):
    """(weights, gradients, AdamW's two moments) in bytes; frozen parameters cost their weight only. With a mesh of several ranks: on the
    fullest rank once `parallel.shard` has cut the model."""
    if mesh is not None and mesh.world > 1:
        part = mesh.plan(model)
        return part['weights'], part['gradients'] + part['in_flight'], part['optimizer']
    n = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return sum(p.nbytes for p in model.parameters()), n * itemsize, 2 * n * itemsize


_malloc_trim = getattr(ctypes.CDLL(None), 'malloc_trim', None) if sys.platform == 'linux' else None
_heap = None  # resident bytes one step after the last trim


def trim_heap(grown=1.25):
    """Gives freed memory back to the system once the process has grown by a quarter since the last time; returns the bytes (0: not now, or no glibc).
    Batches of ever new lengths leave glibc's heap full of holes: 120 steps of a model of 0.66 M parameters held 0.54 GB in use and 1.39 GB in all.
    Called after a step, when its activations are free."""
    global _heap
    now = memory_now(torch.device('cpu'))
    if _malloc_trim is None or _heap is not None and now < grown * _heap:
        return 0
    if _heap is None:
        _heap = now  # with what one step leaves behind
        return 0
    _malloc_trim(0)
    _heap = None
    return now - memory_now(torch.device('cpu'))


def memory_now(device, peak=False):
    """Bytes that this process holds: torch's allocator on CUDA, the resident set on CPU (peak: the highest so far)."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    if peak:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
    try:
        return int(open('/proc/self/statm').read().split()[1]) * os.sysconf('SC_PAGE_SIZE')
    except OSError:
        return 0  # no /proc (Mac): the measured peak then includes the interpreter


def open_model(init_from, ckpt=None, head='lm', tokenizer='', scratch=None, lora_r=0, lora_alpha=16.0, lora_dropout=0.0, lora_targets=''):
    """(model, tokenizer name) for a stage: resumed from `ckpt` (the dict of model.open_run), new from `scratch` (a
    GPTConfig), or loaded from `init_from`; with lora_r > 0 (or an adapter in ckpt) frozen but for the adapter."""
    if ckpt and ckpt.get('lora'):
        model, _ = load_model(ckpt['lora']['base'], head=head)
        model.lora_info = ckpt['lora']
        return lora.load_state(model, ckpt['lora'], ckpt['model']), ckpt['tokenizer']
    if ckpt:
        model = GPT(GPTConfig(**ckpt['model_args']), head)
        model.load_state_dict(ckpt['model'])
        return model, ckpt['tokenizer']
    model, found = (GPT(scratch, head), tokenizer) if init_from == 'scratch' else load_model(init_from, head=head)
    if lora_r:
        lora.add_lora(model, lora_r, lora_alpha, lora_dropout, tuple(t for t in lora_targets.split(',') if t))
        model.lora_info = lora.describe(model, init_from)  # now: a pipeline stage will not have all layers
    return model, tokenizer or found


def checkpoint_keys(model):
    """The keys model_args and lora of a checkpoint, and which of the model's tensors it keeps (see parallel.save_checkpoint): all, or (LoRA)
    those of the adapters and the scalar head; `lora` then says where their base lies."""
    info = getattr(getattr(model, 'body', model), 'lora_info', None)
    if info is None:
        return dict(model_args=dataclasses.asdict(model.config), lora=None)
    return dict(model_args=dataclasses.asdict(model.config), lora={**info, 'reward_bias': model.config.reward_bias}, keep=lora.is_adapter)
