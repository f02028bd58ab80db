"""LoRA, Hu et al. 2021 (arXiv 2106.09685): W' = W + (alpha / r) B A with W frozen; A (r, in), B (out, r), B = 0 at the start.

    add_lora(model, r=8, alpha=16)             c_attn of every block (GPT-2), q_proj and v_proj (Llama, Qwen): PEFT's defaults
    with lora_disabled(model): ...             the model before training: the reference of DPO, GRPO and PPO, for free
    with merged(model): engine.generate(...)   merged for the sampler, restored to the bit afterwards
    save_lora(model, dir); load_lora(model, dir)   PEFT's adapter_config.json + adapter_model.safetensors, both ways

What it saves, GPT-2 small (124.4M weights), r = 8 on c_attn: 12 layers x 8 x (768 + 2304) = 294,912 trained numbers, so gradients and
AdamW's moments take 3.5 MB in the place of 1.49 GB, and a checkpoint 1.2 MB. A layer gives way to a subclass of nn.Linear or nn.Embedding
that holds the same Parameter: the base weights keep their names. Also here: several adapters by name, rsLoRA (arXiv 2312.03732: alpha /
sqrt(r), a large r still learns), DoRA (arXiv 2402.09353: the length of each row of W' is learned on its own), the scalar head of a reward
model trained beside the adapter (PEFT's modules_to_save). LoRA on the LM head is refused: the fused losses read its weight, not its forward.
"""
import contextlib
import dataclasses
import json
import math
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from model import hf_names, load_safetensors, save_safetensors, write_json

PARTS = ('lora_A', 'lora_B', 'lora_magnitude_vector')  # PEFT's names


@dataclasses.dataclass(frozen=True)
class Spec:
    """One adapter's numbers, as in PEFT's LoraConfig. targets: suffixes of HF module names; or 'all-linear', 'a,b', a regular expression."""
    r: int
    alpha: float
    dropout: float = 0.0
    targets: object = ()
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self):
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class Adapted:
    """What LoraLinear and LoraEmbedding share: adapters by name, the one in force (`active`, None = the base model), merging."""

    def wrap(self, base, shape):
        self.weight, self.shape = base.weight, shape  # the same Parameter: names, ties and memory stay as they were
        for part in PARTS:
            setattr(self, part, nn.ParameterDict())
        self.specs, self.active, self.kept = {}, None, None

    def add(self, name, spec):
        out_features, in_features = self.shape
        a, b = (torch.zeros(*size, device=self.weight.device) for size in ((spec.r, in_features), (out_features, spec.r)))  # float32 always
        self.init(a, b)
        self.lora_A[name], self.lora_B[name], self.specs[name] = nn.Parameter(a), nn.Parameter(b), spec
        if spec.dora:  # starts as the length of W's rows, so the first output is the base model's
            self.lora_magnitude_vector[name] = nn.Parameter(self.weight.detach().float().norm(dim=1))

    def delta(self, name):
        return self.specs[name].scale * (self.lora_B[name] @ self.lora_A[name])  # (out, in) float32

    @torch.no_grad()
    def merge(self):
        """In place; the original is kept, because W + d - d is not W in floats. A merged layer's adapters leave the state dict."""
        new = self.merged_weight()
        self.kept = self.weight.clone(), {part: self._modules.pop(part) for part in PARTS}
        self.weight.copy_(new)

    @torch.no_grad()
    def unmerge(self):
        self.weight.copy_(self.kept[0])
        self._modules.update(self.kept[1])
        self.kept = None


class LoraLinear(Adapted, nn.Linear):
    def __init__(self, base):
        nn.Linear.__init__(self, base.in_features, base.out_features, bias=base.bias is not None, device='meta')
        self.wrap(base, (base.out_features, base.in_features))
        self.bias = base.bias

    def init(self, a, b):
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # nn.Linear's own: uniform in +-1/sqrt(in); b stays 0

    def gain(self, name):
        """DoRA: m / |row of W + scale B A|, the length a constant to the gradient (its section 4.3). (out,)"""
        return self.lora_magnitude_vector[name] / (self.weight + self.delta(name)).detach().float().norm(dim=1)

    def merged_weight(self):
        weight = self.weight + self.delta(self.active)
        return weight * self.gain(self.active)[:, None] if self.specs[self.active].dora else weight

    def forward(self, x):
        y = kernels.linear(x, self.weight, self.bias)
        if self.active is None or self.kept:
            return y
        spec, a, b = self.specs[self.active], self.lora_A[self.active], self.lora_B[self.active]
        x = F.dropout(x, spec.dropout, self.training)
        low = kernels.linear(x.to(a.dtype), a) * spec.scale  # scaled where it is small: (..., r)
        if not spec.dora:
            return y + kernels.linear(low, b).to(y.dtype)
        gain = self.gain(self.active)
        return y + ((gain - 1) * kernels.linear(x, self.weight) + gain * kernels.linear(low, b)).to(y.dtype)


class LoraEmbedding(Adapted, nn.Embedding):
    """A (r, num), B (dim, r); rows of A.T are looked up. A tied LM head keeps reading the base weight, as in PEFT."""

    def __init__(self, base):
        nn.Embedding.__init__(self, base.num_embeddings, base.embedding_dim, device='meta')
        self.wrap(base, (base.embedding_dim, base.num_embeddings))

    def init(self, a, b):
        nn.init.normal_(b)  # a stays 0

    def merged_weight(self):
        return self.weight + self.delta(self.active).T

    def forward(self, idx):
        y = F.embedding(idx, self.weight)
        if self.active is None or self.kept:
            return y
        low = F.embedding(idx, self.lora_A[self.active].T) * self.specs[self.active].scale
        return y + kernels.linear(low, self.lora_B[self.active]).to(y.dtype)


def paths(model):
    """{our module name: HF's}, what PEFT matches on: 'h.0.attn.q_proj' -> 'model.layers.0.self_attn.q_proj'."""
    return {n[:-7]: hf[:-7] for n, hf in hf_names(model.config).items() if n.endswith('.weight')}


def adapted(model):
    """{our module name: LoraLinear or LoraEmbedding}; {} without adapters. model: a GPT, or what parallel.shard made of it."""
    model = getattr(model, 'body', model)
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapted)}


def add_lora(model, r, alpha, dropout=0.0, targets=(), rslora=False, dora=False, name='default'):
    """Freezes the model and adds a trained, active adapter `name` to every Linear or Embedding that `targets` names ('c_attn', 'mlp.c_proj',
    'wte' ... as PEFT matches them; () = PEFT's default). A scalar head stays trained. In place and returned. ValueError on a bad number or
    name, or when nothing matches. GPT-2 small, r=8, ('c_attn',): 294,912 trained numbers."""
    if r < 1 or not 0 <= dropout < 1 or not name.isidentifier():
        raise ValueError(f'LoRA wants r >= 1, 0 <= dropout < 1 and a plain name, got r={r}, dropout={dropout}, name={name!r}')
    spec = Spec(r, alpha, dropout, targets or (('c_attn',) if model.config.arch == 'gpt2' else ('q_proj', 'v_proj')), rslora, dora)
    names = spec.targets.split(',') if isinstance(spec.targets, str) and re.fullmatch(r'[\w.,]+', spec.targets) else spec.targets

    def hit(path, module, name):
        if name == 'all-linear':
            return isinstance(module, nn.Linear)
        return re.fullmatch(names, path) if name == names else ('.' + path).endswith('.' + name)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding)) and n not in ('lm_head', 'score')}
    specs = {}
    for name_of_target in [names] if isinstance(names, str) else names:
        found = [n for n, path in paths(model).items() if n in layers and hit(path, layers[n], name_of_target)]
        if not found or (dora and any(isinstance(layers[n], nn.Embedding) for n in found)):  # each name is to match
            offered = ', '.join(sorted({n.split('.')[-1] for n in layers}))
            raise ValueError(f'LoRA targets {name_of_target!r}: this {model.config.arch} model offers {offered}'
                             + ' (DoRA: linear ones only)' * dora)
        specs.update(dict.fromkeys(found, spec))
    return _attach(model, name, spec, specs)


def _attach(model, name, spec, specs):
    """specs: {module name: its Spec}; spec: the adapter's common one, which save_lora writes."""
    if name in getattr(model, 'lora', {}) or any(m.kept for m in adapted(model).values()):
        raise ValueError(f'cannot add adapter {name!r}: the model has one of this name, or its adapters are merged (unmerge_lora first)')
    for n, s in specs.items():
        layer = model.get_submodule(n)
        if not isinstance(layer, Adapted):
            layer = (LoraLinear if isinstance(layer, nn.Linear) else LoraEmbedding)(layer)
            parent, _, leaf = n.rpartition('.')
            setattr(model.get_submodule(parent), leaf, layer)
        layer.add(name, s)
    model.lora = {**getattr(model, 'lora', {}), name: spec}
    return set_adapter(model, name)


def set_adapter(model, name):
    """Adapter `name` becomes the active and the only trained one (beside a scalar head). In place and returned. ValueError: no such adapter."""
    if name not in getattr(model, 'lora', {}):
        raise ValueError(f'no adapter {name!r} here: there are {sorted(getattr(model, "lora", ())) or "none"}')
    for key, p in model.named_parameters():
        p.requires_grad_(key.endswith(tuple(f'{part}.{name}' for part in PARTS)) or key == 'score.weight')
    for m in adapted(model).values():
        m.active = name if name in m.specs else None
    return model


@contextlib.contextmanager
def lora_active(model, name):
    """Inside: adapter `name` (None = the base model) is in force; what is trained does not change. ValueError: no such adapter, or merged."""
    layers = list(adapted(model).values())
    if not layers or name not in (None, *getattr(model, 'body', model).lora) or any(m.kept for m in layers):
        raise ValueError(f'adapter {name!r} cannot be put in force: the model has no such adapter, or its adapters are merged')
    before = [m.active for m in layers]
    try:
        for m in layers:
            m.active = name if name in m.specs else None
        yield model
    finally:
        for m, active in zip(layers, before):
            m.active = active


def lora_disabled(model):
    """Context: the model as it was before add_lora, to the bit."""
    return lora_active(model, None)


def merge_lora(model):
    """The active adapter goes into the weights; the model then is a plain one for forward, state_dict and save_pretrained. In place and
    returned. An adapted embedding that the LM head is tied to is untied first, since the head never saw the adapter. ValueError: nothing to merge."""
    layers = [m for m in adapted(model).values() if m.active is not None and not m.kept]
    if not layers:
        raise ValueError('merge_lora: this model has no active adapter, or is merged already')
    if model.config.tie and any(m is model.wte for m in layers):
        model.wte.weight, model.config.tie = nn.Parameter(model.wte.weight.detach().clone(), requires_grad=False), False
        model.wte.untied = True
    for m in layers:
        m.merge()
    return model


def unmerge_lora(model):
    """Undoes merge_lora to the bit. In place and returned."""
    for m in adapted(model).values():
        if m.kept:
            m.unmerge()
    if getattr(model.wte, 'untied', False):
        model.wte.weight, model.config.tie, model.wte.untied = model.lm_head.weight, True, False
    return model


@contextlib.contextmanager
def merged(model):
    """Inside: merged weights, in place, so a sampler that shares the memory sees them. Without adapters nothing happens."""
    plain = not adapted(model)
    try:
        yield model if plain else merge_lora(model)
    finally:
        plain or unmerge_lora(model)


def trainable(model):
    """[(name, Parameter)] for the optimizer: everything of a plain model, else the active adapter (and a scalar head)."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def lora_state(model):
    """{our name: tensor} of all adapters and the scalar head: what a checkpoint holds in the place of the whole model."""
    return {k: v for k, v in model.state_dict().items() if is_adapter(k)}


def is_adapter(name):
    return any(f'.{part}.' in name for part in PARTS) or name == 'score.weight'


def load_lora_state(model, state, where='the adapter state'):
    """The counterpart of lora_state. In place and returned. ValueError when a name or a shape is another model's."""
    _copy(lora_state(model), state, where)
    return model


def describe(model, base):
    """Plain dict that with lora_state rebuilds the adapters on the model `base` (a name or folder): the key 'lora' of a checkpoint."""
    layers = {name: {n: dataclasses.asdict(m.specs[name]) for n, m in adapted(model).items() if name in m.specs} for name in model.lora}
    return dict(base=base, reward_bias=model.config.reward_bias, specs={k: dataclasses.asdict(s) for k, s in model.lora.items()}, layers=layers)


def load_state(model, info, state):
    """model: a plain one of info['base']; info from describe, state from lora_state. Adapters added, the last one active. Returned."""
    for name, spec in info['specs'].items():
        _attach(model, name, Spec(**spec), {n: Spec(**s) for n, s in info['layers'][name].items()})
    model.config.reward_bias = info['reward_bias']
    return load_lora_state(model, state, f"the adapter checkpoint on {info['base']}")


@torch.no_grad()
def _copy(slots, tensors, where):
    for k in sorted(slots.keys() | tensors.keys()):
        want, got = (list(t[k].shape) if k in t else 'no such tensor' for t in (slots, tensors))
        if want != got:
            raise ValueError(f'{where} is for another model: {k} is {got} there and {want} here')
    for k, slot in slots.items():
        slot.copy_(tensors[k])


def _slots(model, name):
    """{PEFT's tensor name: our Parameter} of adapter `name`."""
    slots, path = {'base_model.model.score.weight': model.score.weight} if model.head == 'scalar' else {}, paths(model)
    for n, m in adapted(model).items():
        for part in (p for p in PARTS if not m.kept and name in getattr(m, p)):
            key = part.replace('_', '_embedding_') if isinstance(m, LoraEmbedding) else part + '.weight' * (part in PARTS[:2])
            slots[f'base_model.model.{path[n]}.{key}'] = getattr(m, part)[name]
    return slots


def save_lora(model, dir, name='default', base=''):
    """Writes adapter `name` as PEFT does: adapter_config.json, adapter_model.safetensors. base: its base_model_name_or_path.
    ValueError when there is no such adapter, or it is merged. GPT-2 small, r=8: 24 tensors, 1.2 MB."""
    if name not in getattr(model, 'lora', {}) or any(m.kept for m in adapted(model).values()):
        raise ValueError(f'no adapter {name!r} to save: there are {sorted(getattr(model, "lora", ())) or "none"}; merged ones need unmerge_lora first')
    spec, scalar, path = model.lora[name], model.head == 'scalar', paths(model)
    odd = {path[n]: m.specs[name] for n, m in adapted(model).items() if m.specs.get(name, spec) != spec}
    targets = spec.targets.split(',') if isinstance(spec.targets, str) and ',' in spec.targets else spec.targets
    os.makedirs(dir, exist_ok=True)
    save_safetensors(os.path.join(dir, 'adapter_model.safetensors'), {k: p.detach().cpu() for k, p in _slots(model, name).items()})
    write_json(os.path.join(dir, 'adapter_config.json'), dict(  # last: a folder with a config is a whole one
        peft_type='LORA', task_type='SEQ_CLS' if scalar else 'CAUSAL_LM', base_model_name_or_path=base or None, r=spec.r, lora_alpha=spec.alpha,
        lora_dropout=spec.dropout, target_modules=targets if isinstance(targets, str) else list(targets), bias='none', use_rslora=spec.rslora,
        use_dora=spec.dora, fan_in_fan_out=model.config.arch == 'gpt2', modules_to_save=['score'] if scalar else None, inference_mode=True,
        rank_pattern={p: s.r for p, s in odd.items()}, alpha_pattern={p: s.alpha for p, s in odd.items()}))


KNOWN = set('''peft_type r lora_alpha lora_dropout target_modules use_rslora use_dora modules_to_save rank_pattern alpha_pattern fan_in_fan_out task_type
    inference_mode base_model_name_or_path revision peft_version auto_mapping init_lora_weights megatron_core qalora_group_size'''.split())


def load_lora(model, dir, name='default'):
    """Adds the PEFT folder `dir` as adapter `name`, active and trained. In place and returned. ValueError names the key of a kind of adapter that
    we cannot honour, or the tensor of an adapter for another model (the model may then hold a part of it and is not to be used)."""
    try:
        with open(os.path.join(dir, 'adapter_config.json')) as f:
            c = json.load(f)
        tensors = load_safetensors(os.path.join(dir, 'adapter_model.safetensors'))
        odd = [k for k, v in c.items() if v and k not in KNOWN and (k, v) != ('bias', 'none')] + ['peft_type'] * (c['peft_type'] != 'LORA') \
            + ['modules_to_save'] * bool(set(c.get('modules_to_save') or ()) - {'score', 'classifier'})
        if odd:
            raise ValueError(f'{dir}: cannot honour ' + ', '.join(f'{k}={c[k]!r}' for k in odd))
        targets = c['target_modules'] if isinstance(c['target_modules'], str) else tuple(c['target_modules'])
        spec = Spec(c['r'], c['lora_alpha'], c.get('lora_dropout') or 0.0, targets, bool(c.get('use_rslora')), bool(c.get('use_dora')))
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f'{dir} is no PEFT adapter folder (adapter_config.json, adapter_model.safetensors): {type(e).__name__} {e}') from e

    def own(key, path, common):  # PEFT's rank_pattern and alpha_pattern: {regular expression for the end of the path: number}
        return next((v for k, v in (c.get(key) or {}).items() if re.match(rf'(.*\.)?({k})$', path)), common)
    specs = {n: dataclasses.replace(spec, r=own('rank_pattern', p, spec.r), alpha=own('alpha_pattern', p, spec.alpha)) for n, p in paths(model).items()
             if n not in ('lm_head', 'score') and any(k.startswith(f'base_model.model.{p}.lora_') for k in tensors)}  # the tensors say where
    if specs:
        _attach(model, name, spec, specs)
    _copy(_slots(model, name), tensors, f'the adapter in {dir}')
    return model
