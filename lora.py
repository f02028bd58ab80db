"""LoRA, Hu et al. 2021 (arXiv 2106.09685): W' = W + (alpha / r) B A with W frozen; A (r, in), B (out, r), B =
0 at the start.

    add_lora(model, r=8, alpha=16)             c_attn of every block (GPT-2), q_proj and v_proj (Llama, Qwen)
    with lora_disabled(model): ...             the model before training: a reference for free
    merge_lora(model)                          W' in the place of W: a plain model again
    save_lora(model, dir)                      PEFT's adapter_config.json + adapter_model.safetensors
    load_lora(model, dir)                      and back

What it saves, GPT-2 small (124.4M weights), r = 8 on c_attn: 12 layers x 8 x (768 + 2304) = 294,912 trained
numbers, so gradients and AdamW's moments take 3.5 MB instead of 1.49 GB, and a checkpoint 1.2 MB. A layer
gives way to a subclass of nn.Linear or nn.Embedding that holds the same Parameter: the base weights keep
their names. Also here: rsLoRA (arXiv 2312.03732: alpha / sqrt(r), a large r still learns), DoRA (arXiv
2402.09353: the length of each row of W' is learned on its own), the scalar head of a reward model trained
beside the adapter (PEFT's modules_to_save). LoRA on the LM head is refused: the fused losses read its weight,
not its forward. """
import contextlib
import dataclasses
import math
import os
import re

import torch
import torch.nn as nn
import torch.nn.functional as F

import kernels
from model import hf_name, load_safetensors, read_json, save_safetensors, setting, write_json

PARTS = ('lora_A', 'lora_B', 'lora_magnitude_vector')  # PEFT's names


@dataclasses.dataclass(frozen=True)
class Spec:
    """One adapter's numbers, as in PEFT's LoraConfig. targets: see `targeted`. ValueError for what is no
    adapter."""
    r: int
    alpha: float
    dropout: float = 0.0
    targets: object = ()
    rslora: bool = False
    dora: bool = False

    def __post_init__(self):
        if type(self.r) is not int or self.r < 1:
            raise ValueError(f'LoRA wants a whole r >= 1, got {self.r!r:.40}')
        numbers = all(type(x) in (int, float) and math.isfinite(x) for x in (self.alpha, self.dropout))
        if not numbers or not 0 <= self.dropout < 1:
            raise ValueError(f'LoRA wants a number alpha and 0 <= dropout < 1, got {self.alpha!r:.40} and '
                             f'{self.dropout!r:.40}')
        names = [self.targets] if isinstance(self.targets, str) else self.targets
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f'LoRA targets {names!r:.40}: expected module names or one pattern')

    @property
    def scale(self):
        return self.alpha / (math.sqrt(self.r) if self.rslora else self.r)


class Adapted:
    """What LoraLinear and LoraEmbedding share; active: False = the base model's forward. Parameters are named
    lora_A.default ... as in PEFT."""

    def wrap(self, base, shape, spec):
        out_features, in_features = shape
        self.weight = base.weight  # the same Parameter: names, ties and memory stay
        self.spec, self.active = spec, True
        a = torch.zeros(spec.r, in_features, device=base.weight.device)  # float32 always
        b = torch.zeros(out_features, spec.r, device=base.weight.device)
        self.init(a, b)
        self.lora_A = nn.ParameterDict(dict(default=a))
        self.lora_B = nn.ParameterDict(dict(default=b))
        if spec.dora:  # starts as the length of W's rows, so the first output is the base model's
            length = self.weight.detach().float().norm(dim=1)
            self.lora_magnitude_vector = nn.ParameterDict(dict(default=length))

    def delta(self):
        return self.spec.scale * (self.lora_B.default @ self.lora_A.default)  # (out, in) float32

    @torch.no_grad()
    def merge(self):
        """For good; the layer then is a plain one, whose adapter has left the state dict."""
        self.weight.copy_(self.merged_weight())
        self.active = False
        for part in PARTS:
            self._modules.pop(part, None)


class LoraLinear(Adapted, nn.Linear):
    def __init__(self, base, spec):
        nn.Linear.__init__(self, base.in_features, base.out_features, base.bias is not None, device='meta')
        self.wrap(base, base.weight.shape, spec)
        self.bias = base.bias

    def init(self, a, b):
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))  # nn.Linear's own: uniform in +-1/sqrt(in); b stays 0

    def gain(self):
        """DoRA: m / |row of W + scale B A|, the length a constant to the gradient (its section 4.3).
        (out,)"""
        length = (self.weight + self.delta()).detach().float().norm(dim=1)
        return self.lora_magnitude_vector.default / length

    def merged_weight(self):
        weight = self.weight + self.delta()
        return weight * self.gain()[:, None] if self.spec.dora else weight

    def forward(self, x):
        y = kernels.linear(x, self.weight, self.bias)
        if not self.active:
            return y
        a, b = self.lora_A.default, self.lora_B.default
        x = F.dropout(x, self.spec.dropout, self.training)
        low = kernels.linear(x.to(a.dtype), a) * self.spec.scale  # scaled where it is small: (..., r)
        if not self.spec.dora:
            return y + kernels.linear(low, b).to(y.dtype)
        gain = self.gain()
        return y + ((gain - 1) * kernels.linear(x, self.weight) + gain * kernels.linear(low, b)).to(y.dtype)


class LoraEmbedding(Adapted, nn.Embedding):
    """A (r, num), B (dim, r); rows of A.T are looked up. A tied LM head keeps reading the base weight, as in
    PEFT. ValueError: DoRA, which is for linear layers only."""

    def __init__(self, base, spec):
        if spec.dora:
            raise ValueError('DoRA on an embedding (wte, embed_tokens ...): it is for linear layers only')
        nn.Embedding.__init__(self, base.num_embeddings, base.embedding_dim, device='meta')
        self.wrap(base, base.weight.T.shape, spec)

    def init(self, a, b):
        nn.init.normal_(b)  # a stays 0

    def merged_weight(self):
        return self.weight + self.delta().T

    def forward(self, idx):
        y = F.embedding(idx, self.weight)
        if not self.active:
            return y
        low = F.embedding(idx, self.lora_A.default.T) * self.spec.scale
        return y + kernels.linear(low, self.lora_B.default).to(y.dtype)


def paths(model):
    """{our module name: HF's}, what PEFT matches on: 'h.0.attn.q_proj' ->
    'model.layers.0.self_attn.q_proj'."""
    layers = (n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding)))
    return {n: hf_name(n, model.config.arch) for n in layers if n not in ('lm_head', 'score')}


def adapted(model):
    """{our module name: LoraLinear or LoraEmbedding}; {} without an adapter, or when it is merged. model: a
    GPT, or what parallel.shard made of it."""
    model = getattr(model, 'body', model)
    return {name: m for name, m in model.named_modules() if hasattr(m, 'lora_A')}


def targeted(model, targets):
    """Names of the modules that `targets` mean, as in PEFT: a list of ends of HF's names ('c_attn',
    'mlp.c_proj', 'wte'), of which each has to match, 'all-linear', or a regular expression for whole names.
    ValueError where one matches nothing."""
    layers, found = paths(model), []
    for target in [targets] if isinstance(targets, str) else targets:
        if target == 'all-linear':
            hits = [n for n in layers if isinstance(model.get_submodule(n), nn.Linear)]
        elif target is targets:
            hits = [n for n, path in layers.items() if re.fullmatch(target, path)]
        else:
            hits = [n for n, path in layers.items() if ('.' + path).endswith('.' + target)]
        if not hits:
            offered = ', '.join(sorted({n.split('.')[-1] for n in layers}))
            raise ValueError(f'LoRA targets {target!r}: this {model.config.arch} model offers {offered}')
        found += [n for n in hits if n not in found]
    return found


def add_lora(model, r, alpha, dropout=0.0, targets=(), rslora=False, dora=False):
    """Freezes the model and adds a trained adapter to every Linear or Embedding that `targets` name (see
    `targeted`; a text of names 'a, b' is a list of them; nothing: PEFT's default). A scalar head stays
    trained. In place and returned. ValueError on a bad number or name, when nothing matches, or where there
    is an adapter already. GPT-2 small, r=8, ('c_attn',): 294,912 trained numbers."""
    targets = targets or ('c_attn' if model.config.arch == 'gpt2' else 'q_proj,v_proj')
    if isinstance(targets, str) and re.fullmatch(r'[\w., ]+', targets):
        targets = [target.strip() for target in targets.split(',')]
    spec = Spec(r, alpha, dropout, targets, rslora, dora)
    try:
        return _attach(model, spec, dict.fromkeys(targeted(model, targets), spec))
    except re.error as e:
        raise ValueError(f'LoRA targets {targets!r}: neither names nor a regular expression ({e})') from None


def _attach(model, spec, specs):
    """specs: {module name: its Spec}; spec: the adapter's common one, which save_lora writes."""
    if adapted(model):
        raise ValueError('the model has an adapter already: merge_lora first')
    for name, own in specs.items():
        layer = model.get_submodule(name)
        layer = (LoraLinear if isinstance(layer, nn.Linear) else LoraEmbedding)(layer, own)
        parent, _, leaf = name.rpartition('.')
        setattr(model.get_submodule(parent), leaf, layer)
    for name, p in model.named_parameters():
        p.requires_grad_(is_adapter(name))
    model.lora = spec
    return model


@contextlib.contextmanager
def lora_disabled(model):
    """Inside: the model as it was before add_lora, to the bit; what is trained does not change. ValueError
    without an adapter: a model would be its own reference."""
    layers = adapted(model).values()
    if not layers:
        raise ValueError('lora_disabled: this model has no adapter')
    try:
        for m in layers:
            m.active = False
        yield model
    finally:
        for m in layers:
            m.active = True


def merge_lora(model):
    """The adapter goes into the weights, for good: the model then is a plain one for forward, state_dict and
    save_pretrained. In place and returned. An adapted embedding that the LM head is tied to is untied first,
    since the head never saw the adapter. ValueError: nothing to merge."""
    layers = adapted(model)
    if not layers:
        raise ValueError('merge_lora: this model has no adapter, or it is merged already')
    if model.config.tie and 'wte' in layers:
        model.wte.weight = nn.Parameter(model.wte.weight.detach().clone(), requires_grad=False)
        model.config.tie = False
    for layer in layers.values():
        layer.merge()
    return model


def trainable(model):
    """[(name, Parameter)] for the optimizer: everything of a plain model, else the adapter (and a scalar
    head)."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def lora_state(model):
    """{our name: tensor} of the adapter and the scalar head: what a checkpoint holds instead of the whole
    model."""
    return {k: v for k, v in model.state_dict().items() if is_adapter(k)}


def is_adapter(name):
    return any(f'.{part}.' in name for part in PARTS) or name == 'score.weight'


def describe(model, base):
    """Plain dict that with lora_state rebuilds the adapter on the model `base` (a name or folder): the key
    'lora' of a checkpoint."""
    layers = {name: dataclasses.asdict(m.spec) for name, m in adapted(model).items()}
    return dict(base=base, reward_bias=model.config.reward_bias,
                specs=dict(default=dataclasses.asdict(model.lora)), layers=dict(default=layers))


def load_state(model, info, state):
    """model: a plain one of info['base']; info from describe, state from lora_state. The adapter is added.
    Returned."""
    specs = {name: Spec(**own) for name, own in info['layers']['default'].items()}
    _attach(model, Spec(**info['specs']['default']), specs)
    model.config.reward_bias = info['reward_bias']
    _copy(lora_state(model), state, f"the adapter checkpoint on {info['base']}")
    return model


@torch.no_grad()
def _copy(slots, tensors, where):
    """tensors into slots (both by name); ValueError when a name or a shape is another model's."""
    for name in sorted(slots.keys() | tensors.keys()):
        want, got = (list(t[name].shape) if name in t else 'no such tensor' for t in (slots, tensors))
        if want != got:
            raise ValueError(f'{where} is for another model: {name} is {got} there and {want} here')
    for name, slot in slots.items():
        slot.copy_(tensors[name])


def _peft_name(path, part, embedding):
    """PEFT's name of one part of the adapter at a module; only A and B of linear layers are modules
    themselves."""
    if embedding:
        return f'base_model.model.{path}.{part.replace("_", "_embedding_")}'
    return f'base_model.model.{path}.{part}' + '.weight' * (part in PARTS[:2])


def _slots(model):
    """{PEFT's tensor name: our Parameter}"""
    slots, path = {}, paths(model)
    if model.head == 'scalar':
        slots['base_model.model.score.weight'] = model.score.weight
    for name, m in adapted(model).items():
        for part in PARTS:
            if hasattr(m, part):
                peft = _peft_name(path[name], part, isinstance(m, nn.Embedding))
                slots[peft] = getattr(m, part).default
    return slots


def save_lora(model, dir, base=''):
    """Writes the adapter as PEFT does: adapter_config.json, adapter_model.safetensors. base: its
    base_model_name_or_path. ValueError when there is none, or it is merged. GPT-2 small, r=8: 24 tensors, 1.2
    MB."""
    layers, path = adapted(model), paths(model)
    if not layers:
        raise ValueError('save_lora: this model has no adapter, or it is merged')
    spec, scalar = model.lora, model.head == 'scalar'
    odd = {path[name]: m.spec for name, m in layers.items() if m.spec != spec}
    os.makedirs(dir, exist_ok=True)
    tensors = {name: p.detach().cpu() for name, p in _slots(model).items()}
    save_safetensors(os.path.join(dir, 'adapter_model.safetensors'), tensors)
    write_json(os.path.join(dir, 'adapter_config.json'), dict(  # last: a folder with a config is a whole one
        peft_type='LORA', task_type='SEQ_CLS' if scalar else 'CAUSAL_LM',
        base_model_name_or_path=base or None, r=spec.r, lora_alpha=spec.alpha, lora_dropout=spec.dropout,
        target_modules=spec.targets, bias='none',
        use_rslora=spec.rslora, use_dora=spec.dora, fan_in_fan_out=model.config.arch == 'gpt2',
        modules_to_save=['score'] if scalar else None, inference_mode=True,
        rank_pattern={p: s.r for p, s in odd.items()}, alpha_pattern={p: s.alpha for p, s in odd.items()}))


KNOWN = set('''peft_type r lora_alpha lora_dropout target_modules use_rslora use_dora modules_to_save
    rank_pattern alpha_pattern fan_in_fan_out task_type inference_mode base_model_name_or_path revision
    peft_version auto_mapping init_lora_weights megatron_core qalora_group_size'''.split())


def _own(pattern, path, common):
    """PEFT's rank_pattern and alpha_pattern: {regular expression for the end of the path: number}."""
    return next((n for end, n in (pattern or {}).items() if re.match(rf'(.*\.)?({end})$', path)), common)


def _specs(model, c, tensors, where):
    """(the adapter's common Spec, {our module name: its own}) of PEFT's config c; the tensors say where it
    is."""
    start, saved = c.get('init_lora_weights', True), set(c.get('modules_to_save') or ())
    odd = [key for key, value in c.items() if value and key not in KNOWN and (key, value) != ('bias', 'none')]
    odd += ['peft_type'] * (c.get('peft_type') != 'LORA')
    odd += ['modules_to_save'] * bool(saved - {'score', 'classifier'})
    if start not in (True, False, None, 'gaussian', 'orthogonal', 'eva'):  # the others change the base model
        odd.append('init_lora_weights')
    if odd:
        raise ValueError('cannot honour ' + ', '.join(f'{key}={c.get(key)!r:.60}' for key in odd))
    kinds = [setting(c, where, key, bool, False) for key in ('use_rslora', 'use_dora')]
    spec, specs = Spec(c['r'], c['lora_alpha'], c.get('lora_dropout') or 0.0, c['target_modules'], *kinds), {}
    for n, path in paths(model).items():
        if any(key.startswith(f'base_model.model.{path}.lora_') for key in tensors):
            r = _own(c.get('rank_pattern'), path, spec.r)
            alpha = _own(c.get('alpha_pattern'), path, spec.alpha)
            specs[n] = dataclasses.replace(spec, r=r, alpha=alpha)
            a = tensors.get(_peft_name(path, 'lora_A', isinstance(model.get_submodule(n), nn.Embedding)))
            if a is None or a.dim() != 2 or len(a) != r:  # before a matrix of such a rank is made
                raise ValueError(f'the tensors are for another model: no lora_A of rank {r} for {path}')
    return spec, specs


def load_lora(model, dir):
    """Adds the adapter of the PEFT folder `dir`, trained. In place and returned. ValueError names the key of
    a kind of adapter that we cannot honour, or the tensor of an adapter for another model."""
    where = os.path.join(dir, 'adapter_config.json')
    try:
        c, tensors = read_json(where), load_safetensors(os.path.join(dir, 'adapter_model.safetensors'))
        spec, specs = _specs(model, c, tensors, where)
    except (OSError, KeyError, TypeError, AttributeError, re.error) as e:
        raise ValueError(f'{dir} is no PEFT adapter folder (adapter_config.json, adapter_model.safetensors): '
                         f'{type(e).__name__} {e}') from None
    except ValueError as e:
        raise ValueError(f'{dir}: {e}') from None
    _attach(model, spec, specs)
    _copy(_slots(model), tensors, f'the adapter in {dir}')
    return model
