"""lora.py against peft itself: same outputs, same gradients, files both ways; merging, several adapters,
refusals."""
import json
import os

import pytest
import torch

import infer
import lora
from helpers import ckpt, jsonl, log_rows, mismatch, stage
from model import ARCHS, GPT, GPTConfig

# tiny, but with each family's peculiarities: fused qkv, GQA, qk-norm, head_size that is not n_embd / n_head
SHAPES = {
    'gpt2': dict(n_layer=2, n_head=4, n_embd=32, vocab_size=61, block_size=32),
    'llama': dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=48, vocab_size=61, block_size=32,
                  tie=False, **ARCHS['llama']),
    'qwen2': dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=48, vocab_size=61, block_size=32,
                  **ARCHS['qwen2']),
    'qwen3': dict(n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_inner=48, head_size=16, vocab_size=61,
                  block_size=32, **ARCHS['qwen3']),
}


def build(arch, head='lm', seed=0):
    torch.manual_seed(seed)
    return GPT(GPTConfig(arch=arch, **SHAPES[arch]), head)


def shake(model):
    """B starts at zero, which would let every error in A hide."""
    torch.manual_seed(7)
    for n, p in model.named_parameters():
        if 'lora_' in n:
            p.data = p.data + 0.1 * torch.randn_like(p)
    return model


def tokens(B=3, T=12):
    return torch.randint(0, 61, (B, T), generator=torch.Generator().manual_seed(1))


def under_peft(tmp_path, adapter, kind='CausalLM', **more):
    """transformers' model of tmp_path/base with a PEFT adapter."""
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    base = getattr(transformers, f'AutoModelFor{kind}').from_pretrained(tmp_path / 'base')
    return peft.PeftModel.from_pretrained(base, tmp_path / adapter, **more).eval()


CASES = [('gpt2', dict()), ('gpt2', dict(targets=('c_attn', 'c_proj', 'c_fc'), rslora=True)),
         ('gpt2', dict(targets=('mlp.c_proj', 'wte'))),
         ('gpt2', dict(targets=('c_attn',), dora=True)), ('qwen3', dict()),
         ('qwen3', dict(targets='all-linear')), ('qwen3', dict(targets='all-linear', dora=True)),
         ('qwen3', dict(targets=r'.*layers\.1\..*(up|down)_proj')),
         ('llama', dict(targets='q_proj,embed_tokens')), ('qwen2', dict(targets=('k_proj', 'gate_proj')))]


@pytest.mark.parametrize('arch, kw', CASES, ids=str)
def test_our_file_in_peft_same_outputs_and_gradients(arch, kw, tmp_path):
    model = build(arch)
    model.save_pretrained(tmp_path / 'base')
    shake(lora.add_lora(model, 4, 8, **kw))
    lora.save_lora(model, str(tmp_path / 'a'), base=str(tmp_path / 'base'))
    theirs = under_peft(tmp_path, 'a', is_trainable=True)
    x = tokens()
    ours, ref = model(x)[0], theirs(x).logits
    assert (ours - ref).abs().max() < 1e-5
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * weight).sum().backward()
    (ref * weight).sum().backward()
    grads = {k.replace('.default', ''): p.grad for k, p in theirs.named_parameters() if p.requires_grad}
    mine = {k: p.grad for k, p in lora._slots(model).items()}
    assert {k.removesuffix('.weight') for k in grads} == {k.removesuffix('.weight')
                                                          for k in mine} and len(mine) > 0
    for k, g in mine.items():
        ref = grads.get(k, grads.get(k + '.weight'))
        assert (g - ref).abs().max() <= 1e-5 * max(1.0, ref.abs().max()), k
    assert all(p.grad is None for n, p in model.named_parameters() if 'lora_' not in n)


@pytest.mark.parametrize('arch, kw', [('gpt2', dict(target_modules=['c_attn', 'wte'], use_rslora=True)),
                                      ('qwen3', dict(target_modules='all-linear', use_dora=True)),
                                      ('qwen3', dict(target_modules=['q_proj', 'up_proj'],
                                                     rank_pattern={r'layers.1.*': 2},
                                                     alpha_pattern={'up_proj': 32})),
                                      ('llama', dict(target_modules=r'.*(q|v)_proj'))], ids=str)
def test_their_file_in_ours(arch, kw, tmp_path):
    peft, transformers = pytest.importorskip('peft'), pytest.importorskip('transformers')
    build(arch).save_pretrained(tmp_path / 'base')
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base'),
                                 peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, task_type='CAUSAL_LM',
                                                 fan_in_fan_out=arch == 'gpt2', **kw)).eval()
    shake(theirs)
    theirs.save_pretrained(tmp_path / 'a')
    model = lora.load_lora(GPT.from_pretrained(str(tmp_path / 'base')), str(tmp_path / 'a')).eval()
    assert (model(tokens())[0] - theirs(tokens()).logits).abs().max() < 1e-5
    lora.save_lora(model, str(tmp_path / 'b'))  # and back again: patterns, dropout and targets survive
    again = under_peft(tmp_path, 'b')
    assert (again(tokens()).logits - theirs(tokens()).logits).abs().max() < 1e-6


@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
def test_scalar_head_travels_with_the_adapter(arch, tmp_path):
    model = build(arch, 'scalar')
    model.config.pad_token_id = 60
    model.save_pretrained(tmp_path / 'base')
    shake(lora.add_lora(model, 4, 8))
    model.score.weight.data.normal_()
    assert model.score.weight.requires_grad
    lora.save_lora(model, str(tmp_path / 'a'))
    theirs = under_peft(tmp_path, 'a', 'SequenceClassification')
    x = tokens().clamp(max=59)
    assert (model(x)[0][:, -1] - theirs(x).logits[:, 0]).abs().max() < 1e-5
    again = lora.load_lora(GPT.from_pretrained(str(tmp_path / 'base')), str(tmp_path / 'a'))
    assert torch.equal(again(x)[0], model(x)[0])


@pytest.mark.parametrize('arch, kw', CASES, ids=str)
def test_merge_is_exact_and_what_is_merged_is_plain(arch, kw, tmp_path):
    model = shake(lora.add_lora(build(arch), 4, 8, **kw))
    before = model(tokens())[0]
    with lora.lora_disabled(model):
        start = model(tokens())[0]
    assert torch.equal(start, build(arch)(tokens())[0])  # the reference for free, to the bit
    assert torch.equal(model(tokens())[0], before) and (start - before).abs().max() > 1e-3
    lora.merge_lora(model)
    assert (model(tokens())[0] - before).abs().max() < 1e-5
    assert not lora.adapted(model) and not any('lora_' in name for name in model.state_dict())
    model.save_pretrained(tmp_path)
    assert (GPT.from_pretrained(str(tmp_path))(tokens())[0] - before).abs().max() < 1e-5
    again = lora.add_lora(model, 2, 4, **kw)  # and takes a new adapter
    assert (again(tokens())[0] - before).abs().max() < 1e-5


def test_an_adapter_on_bfloat16_is_float32():
    model = shake(lora.add_lora(build('gpt2').bfloat16(), 4, 8))
    base = model.h[0].attn.c_attn.weight.clone()
    assert model.h[0].attn.c_attn.lora_A.default.dtype == torch.float32
    assert torch.isfinite(model(tokens())[0].float()).all()
    lora.merge_lora(model)
    assert not torch.equal(model.h[0].attn.c_attn.weight, base)
    assert model.h[0].attn.c_attn.weight.dtype == torch.bfloat16


def test_training_moves_the_adapter_only_and_the_checkpoint_holds_it_only(tmp_path):
    model = lora.add_lora(build('qwen3'), 4, 8, dropout=0.1)
    assert torch.equal(model.eval()(tokens())[0], build('qwen3')(tokens())[0])  # B = 0
    optimizer = torch.optim.AdamW([p for _, p in lora.trainable(model.train())], lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(tokens()[:, :-1], tokens()[:, 1:].contiguous())[1]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    fresh = build('qwen3').state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in model.state_dict().items() if k in fresh)
    state = lora.lora_state(model)
    count = sum(p.numel() for _, p in lora.trainable(model))
    assert sum(t.numel() for t in state.values()) == 2 * (4 * (32 + 64) + 4 * (32 + 32)) == count
    torch.save(dict(info=lora.describe(model, 'base'), state=state), tmp_path / 'x.pt')
    loaded = torch.load(tmp_path / 'x.pt', weights_only=True)
    again = lora.load_state(build('qwen3'), loaded['info'], loaded['state'])
    assert torch.equal(again.eval()(tokens())[0], model.eval()(tokens())[0])


def test_where_an_adapter_starts():
    """As nn.Linear: A uniform in +-1 / sqrt(in), B 0; of an embedding A 0 and B normal, as in PEFT; the scale
    is alpha / r, rsLoRA's alpha / sqrt(r)."""
    model = lora.add_lora(build('gpt2'), 16, 8, targets='mlp.c_proj,wte')
    layer, table = model.h[1].mlp.c_proj, model.wte
    a = layer.lora_A.default
    assert a.shape == (16, 128) and 0.98 < a.abs().max() * 128 ** 0.5 <= 1 and abs(a.mean()) < 0.01
    assert a.std().item() == pytest.approx((3 * 128) ** -0.5, rel=0.05) and not layer.lora_B.default.any()
    assert table.lora_B.default.std().item() == pytest.approx(1, rel=0.1) and not table.lora_A.default.any()
    assert layer.spec.scale == 0.5 and lora.Spec(16, 8, rslora=True).scale == 2.0


def test_worked_number_gpt2_small():
    with torch.device('meta'):
        model = GPT(GPTConfig())
    lora.add_lora(model, 8, 16)
    assert sum(p.numel() for _, p in lora.trainable(model)) == 294_912


def test_bad_input_is_named(tmp_path):
    model = build('gpt2')
    with pytest.raises(ValueError, match=r"'q_proj'.*c_attn"):
        lora.add_lora(model, 4, 8, targets=('q_proj',))
    with pytest.raises(ValueError, match='r >= 1'):
        lora.add_lora(model, 0, 8)
    with pytest.raises(ValueError, match='has no adapter'):
        with lora.lora_disabled(model):  # a plain model would silently be its own reference
            pass
    with pytest.raises(ValueError, match='has no adapter, or it is merged'):
        lora.merge_lora(model)
    lora.save_lora(lora.add_lora(model, 4, 8), str(tmp_path / 'a'))
    with pytest.raises(ValueError, match='an adapter already'):
        lora.add_lora(model, 4, 8)
    other = GPT(GPTConfig(**{**SHAPES['gpt2'], 'n_embd': 48}))
    with pytest.raises(ValueError, match=r'another model: .*c_attn.*\[4, 32\].*\[4, 48\]'):
        lora.load_lora(other, str(tmp_path / 'a'))
    with pytest.raises(ValueError, match='another model: .*transformer'):
        lora.load_lora(build('qwen3'), str(tmp_path / 'a'))
    with pytest.raises(ValueError, match='another model'):
        lora.load_lora(GPT(GPTConfig(**{**SHAPES['gpt2'], 'n_layer': 1})), str(tmp_path / 'a'))
    config = tmp_path / 'a' / 'adapter_config.json'
    sound = json.loads(config.read_text())
    for key, value in dict(peft_type='IA3', bias='all', layers_to_transform=[1], modules_to_save=['lm_head'],
                           lora_bias=True).items():
        config.write_text(json.dumps({**sound, key: value}))
        with pytest.raises(ValueError, match=f'cannot honour .*{key}'):
            lora.load_lora(build('gpt2'), str(tmp_path / 'a'))
    for broken in ('{"r": 4', '[]', '{}', *(json.dumps({**sound, **key}) for key in (
            dict(target_modules=None), dict(r=10 ** 9), dict(lora_alpha=None), dict(rank_pattern={'(': 1}),
            dict(rank_pattern={'c_attn': 3}), dict(use_dora=1), dict(init_lora_weights='pissa')))):
        config.write_text(broken)
        with pytest.raises(ValueError):
            lora.load_lora(build('gpt2'), str(tmp_path / 'a'))
    os.remove(config)
    with pytest.raises(ValueError, match='no PEFT adapter folder'):
        lora.load_lora(build('gpt2'), str(tmp_path / 'a'))


@pytest.mark.parametrize('targets', ['wte', 'wte,c_attn', 'all-linear', 'embed_tokens',
                                     'q_proj,embed_tokens'])
@pytest.mark.parametrize('dora', [False, True])
def test_the_sampler_reads_every_adapter(targets, dora):
    """Tokens' log-probs of the engine are the model's, also with an adapter on an embedding to which the head
    is tied."""
    model = build('qwen2' if 'embed' in targets else 'gpt2')
    if dora and ('wte' in targets or 'embed' in targets):
        with pytest.raises(ValueError, match='DoRA on an embedding'):
            lora.add_lora(model, 4, 8, targets=targets, dora=True)
        return
    engine = infer.Engine(shake(lora.add_lora(model, 4, 8, targets=targets, dora=dora)).eval(), None)
    params = infer.SamplingParams(max_tokens=12, seed=1)
    for _ in range(2):  # before and after an update
        assert mismatch(engine, engine.generate([[1, 2, 3], [4]], params), model)['max'] < 1e-5
        shake(model)
        engine.weights_changed()


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    """A folder with rows and a model's HF folder, an adapter on it, and its byte tokenizer's checkpoint."""
    d = tmp_path_factory.mktemp('lora')
    jsonl(d / 'text.jsonl', [dict(text=f'row {i} of text') for i in range(12)])
    keys = ['--n_layer=2', '--n_embd=32', '--n_head=4', '--block_size=64']
    stage('sft.py', *RUN, *keys, '--out_dir=byte', '--max_iters=1', cwd=d)
    return d


RUN = ['--dataset=text.jsonl', '--val_dataset=text.jsonl', '--batch_size=4', '--eval_iters=1',
       '--learning_rate=1e-2']


@pytest.mark.parametrize('keys, count, spec', [
    (['--lora_targets=all-linear', '--lora_rslora=True'], 8, dict(rslora=True, dora=False)),
    (['--lora_targets=.*\\.1\\.(mlp|attn)\\.c_.*', '--lora_dora=True'], 4, dict(rslora=False, dora=True)),
    (['--lora_targets=c_attn, mlp.c_fc'], 4, dict(rslora=False, dora=False))], ids=str)
def test_a_stage_trains_every_kind_of_adapter_and_goes_on(world, tmp_path, keys, count, spec):
    out = f'--out_dir={tmp_path}'
    stage('sft.py', *RUN, '--init_from=byte', '--lora_r=4', *keys, out, '--max_iters=2', cwd=world)
    saved = ckpt(tmp_path)
    assert sum('lora_A' in k for k in saved['model']) == count and os.path.isabs(saved['lora']['base'])
    assert {k: saved['lora']['specs']['default'][k] for k in spec} == spec
    assert sum('magnitude' in k for k in saved['model']) == count * spec['dora']
    stage('sft.py', *[k.replace('text.jsonl', str(world / 'text.jsonl')) for k in RUN], '--init_from=resume',
          out,
          '--max_iters=3', cwd=tmp_path)  # from another folder
    assert ckpt(tmp_path)['iter'] == 3


def test_a_peft_folder_starts_a_stage(world, tmp_path):
    """Its first loss is that of the base with the adapter merged, as transformers and peft compute it."""
    from run import load_model
    model = shake(lora.add_lora(load_model(str(world / 'byte'))[0], 4, 8, rslora=True))
    lora.save_lora(model, str(tmp_path / 'peft'), base=str(world / 'byte'))
    for more in ([], ['--lora_r=2']):
        stage('sft.py', *RUN, f'--init_from={tmp_path}/peft', f'--out_dir={tmp_path}/o', '--max_iters=1',
              *more, cwd=world)
        first = log_rows(tmp_path / 'o', 'eval')[0]['loss']
        plain = lora.merge_lora(model) if not more else model
        plain.save_pretrained(str(tmp_path / 'merged'))
        stage('sft.py', *RUN, f'--init_from={tmp_path}/merged', f'--out_dir={tmp_path}/m', '--tokenizer=byte',
              '--max_iters=1',
              cwd=world)
        assert first == pytest.approx(log_rows(tmp_path / 'm', 'eval')[0]['loss'], abs=1e-5)
