"""model.py against transformers: every architecture at odd shapes, padded, packed, cached, saved and loaded."""
import copy
import json
import os

import pytest
import torch

import model as M
import run
from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers')
SEED = int.from_bytes(os.urandom(3), 'little')


def hf_model(arch, kind='causal', **over):
    """A random HF model of odd shape with non-zero biases and norms away from one."""
    print('seed', SEED)
    torch.manual_seed(SEED)
    if arch == 'gpt2':
        c = transformers.GPT2Config(vocab_size=67, n_positions=40, n_embd=36, n_layer=3, n_head=3, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, **over)
        cls = transformers.GPT2LMHeadModel if kind == 'causal' else transformers.GPT2ForSequenceClassification
    else:
        kw = dict(vocab_size=67, hidden_size=36, intermediate_size=52, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
                  max_position_embeddings=40) | over
        name = dict(llama='Llama', qwen2='Qwen2', qwen3='Qwen3')[arch]
        if arch == 'qwen3':
            kw = dict(head_dim=10) | kw
        c = getattr(transformers, name + 'Config')(**kw)
        cls = getattr(transformers, name + ('ForCausalLM' if kind == 'causal' else 'ForSequenceClassification'))
    if kind != 'causal':
        c.num_labels, c.pad_token_id = 1, 0
    m = cls(c).eval()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return m


CASES = [('gpt2', {}), ('gpt2', dict(activation_function='relu', tie_word_embeddings=False, n_inner=50)), ('llama', {}), ('qwen2', {}),
         ('llama', dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)), ('qwen3', {}), ('qwen3', dict(tie_word_embeddings=True)),
         ('llama', dict(rope_parameters=dict(rope_type='llama3', rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                             original_max_position_embeddings=16)))]


@pytest.mark.parametrize('arch,over', CASES)
def test_logits_equal_transformers_dense_padded_packed_and_cached(arch, over, tmp_path):
    hf = hf_model(arch, **over)
    hf.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path)).eval()
    idx = torch.randint(0, 67, (3, 17))
    want = hf(idx).logits
    got = ours(idx)[0]
    assert (got - want).abs().max() < 1e-4
    for side in ('left', 'right'):  # garbage where the mask is False
        mask = torch.ones(3, 17, dtype=torch.bool)
        mask[0, :5], mask[2, :9] = False, False
        mask = mask if side == 'left' else mask.flip(1)
        pos = (mask.long().cumsum(1) - 1).clamp(min=0)
        want = hf(idx, attention_mask=mask.long(), position_ids=pos).logits
        assert (ours(idx, mask=mask)[0] - want)[mask].abs().max() < 1e-4, side
        assert (ours(idx, mask=mask)[0][~mask] == 0).all()
        again = idx.masked_fill(~mask, 3)
        assert torch.equal(ours(again, mask=mask)[0], ours(idx, mask=mask)[0])  # padding content changes nothing
    docs = [torch.randint(0, 67, (1, n)) for n in (6, 1, 10)]  # packed: three documents in one row
    doc = torch.tensor([[0] * 6 + [1] + [2] * 10])
    got = ours(torch.cat(docs, 1), doc=doc)[0]
    want = torch.cat([hf(d).logits for d in docs], 1)
    assert (got - want).abs().max() < 1e-4
    cache = M.KVCache(ours.config, 3, 17, idx.device, torch.float32)
    steps = [ours(idx[:, :7], cache=cache)[0]] + [ours(idx[:, i:i + 1], cache=cache)[0] for i in range(7, 17)]
    assert (torch.cat(steps, 1) - ours(idx)[0]).abs().max() < 1e-4


def test_gpt2_in_float64_to_1e10(tmp_path):
    hf = hf_model('gpt2').double()
    hf.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(str(tmp_path), dtype=torch.float64), torch.randint(0, 67, (2, 23))
    assert ours.wte.weight.dtype == torch.float64
    assert (ours(idx)[0] - hf(idx).logits).abs().max() < 1e-10


@pytest.mark.parametrize('arch,over', CASES)
def test_what_we_save_transformers_opens(arch, over, tmp_path):
    hf = hf_model(arch, **over)
    hf.save_pretrained(tmp_path / 'a')
    GPT.from_pretrained(str(tmp_path / 'a')).save_pretrained(str(tmp_path / 'b'), shard_bytes=20000)
    assert len(list((tmp_path / 'b').glob('*.safetensors'))) > 1
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'b')
    idx = torch.randint(0, 67, (2, 11))
    assert (back(idx).logits - hf(idx).logits).abs().max() < 1e-5


@pytest.mark.parametrize('arch', ['gpt2', 'llama', 'qwen2', 'qwen3'])
def test_scalar_head_is_sequence_classification(arch, tmp_path):
    hf = hf_model(arch, 'scalar')
    hf.save_pretrained(tmp_path / 'a')
    ours = GPT.from_pretrained(str(tmp_path / 'a'))
    assert ours.head == 'scalar'
    idx = torch.randint(1, 67, (3, 13))
    want = hf(idx).logits[:, 0]  # HF reads the last token that is not padding
    assert (ours(idx)[0][:, -1] - want).abs().max() < 1e-4
    ours.config.reward_bias = 0.75
    ours.save_pretrained(str(tmp_path / 'b'))
    back = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / 'b')
    assert (back(idx).logits[:, 0] - want).abs().max() < 1e-5
    assert (GPT.from_pretrained(str(tmp_path / 'b'))(idx)[0][:, -1] - want - 0.75).abs().max() < 1e-4


@pytest.mark.parametrize('arch', ['gpt2', 'llama', 'qwen3'])
def test_greedy_generation_equals_transformers(arch, tmp_path):
    hf = hf_model(arch).double()  # float64: a tie in float32 would be a matter of rounding
    hf.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(str(tmp_path), dtype=torch.float64), torch.randint(0, 67, (2, 5))
    want = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    cache, got, x = M.KVCache(ours.config, 2, 40, idx.device, torch.float64), idx, idx
    for _ in range(20):
        x = ours(x, cache=cache)[0][:, -1:].argmax(-1)
        got = torch.cat([got, x], 1)
    assert torch.equal(got, want)


def test_logprobs_equal_log_softmax_with_gradients_on_masked_rows():
    torch.manual_seed(SEED)
    m = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=31, block_size=24)).double()
    idx, mask = torch.randint(0, 31, (3, 12)), torch.ones(3, 12, dtype=torch.bool)
    mask[1, :4], mask[2, 9:] = False, False
    where = torch.rand(3, 11) < 0.7
    logp, ent = m.logprobs(idx, 0.7, mask, where=where, entropy=True)
    full = torch.log_softmax(m(idx, mask=mask)[0][:, :-1] / 0.7, -1)
    real = mask[:, 1:] & mask[:, :-1] & where
    want = full.gather(-1, idx[:, 1:, None])[..., 0]
    assert (logp - want)[real].abs().max() < 1e-9 and (logp[~real] == 0).all()
    assert (ent + (full.exp() * full).sum(-1))[real].abs().max() < 1e-9
    w = torch.randn(3, 11).double()
    g1 = torch.autograd.grad((logp * w).sum(), list(m.parameters()))
    g2 = torch.autograd.grad((want * w)[real].sum(), list(m.parameters()))
    assert max((a - b).abs().max() for a, b in zip(g1, g2)) < 1e-9


def test_loss_and_checkpointing_equal_cross_entropy():
    torch.manual_seed(SEED)
    m = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=31, block_size=24))
    idx, targets = torch.randint(0, 31, (2, 12)), torch.randint(0, 31, (2, 12))
    targets[0, :5] = -1
    want = torch.nn.functional.cross_entropy(m(idx)[0].reshape(-1, 31), targets.reshape(-1), ignore_index=-1)
    loss = m(idx, targets)[1]
    assert (loss - want).abs() < 1e-5 and m(idx, targets)[0] is None
    g1 = torch.autograd.grad(loss, list(m.parameters()))
    m.checkpointing = True
    g2 = torch.autograd.grad(m(idx, targets)[1], list(m.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(g1, g2))
    assert float(m(idx, torch.full_like(targets, -1))[1]) == 0.0  # a fully masked row is finite


@pytest.mark.parametrize('key,value', [('use_sliding_window', True), ('rope_scaling', {'rope_type': 'yarn', 'factor': 4.0}),
                                       ('hidden_act', 'gelu'), ('model_type', 'bert'), ('layer_types', ['sliding_attention'])])
def test_config_that_cannot_be_honoured_is_refused(key, value, tmp_path):
    hf_model('qwen2').save_pretrained(tmp_path)
    raw = json.loads((tmp_path / 'config.json').read_text())
    raw.pop('rope_parameters', None)
    (tmp_path / 'config.json').write_text(json.dumps(raw | {key: value}))
    with pytest.raises(ValueError, match=str(value if key == 'model_type' else key.split('_')[0])):
        GPT.from_pretrained(str(tmp_path))


def test_safetensors_refuses_every_damage(tmp_path):
    path = str(tmp_path / 'm.safetensors')
    state = {'a': torch.randn(3, 5), 'b': torch.arange(4), 'c': torch.randn(2, 2).bfloat16(), 'e': torch.empty(0, 3)}
    M.save_safetensors(path, state)
    back = M.load_safetensors(path)
    assert all(torch.equal(state[k], back[k]) for k in state)
    from safetensors.torch import load_file
    assert all(torch.equal(state[k], v) for k, v in load_file(path).items())
    good = open(path, 'rb').read()
    n = int.from_bytes(good[:8], 'little')
    head = json.loads(good[8:8 + n])

    def write(header, body=good[8 + n:]):
        h = json.dumps(header).encode()
        open(path, 'wb').write(len(h).to_bytes(8, 'little') + h + body)
    for cut in (0, 5, 8, 40, len(good) - 1):
        open(path, 'wb').write(good[:cut])
        with pytest.raises(ValueError, match='safetensors'):
            M.load_safetensors(path)
    open(path, 'wb').write((1 << 62).to_bytes(8, 'little') + good[8:])
    with pytest.raises(ValueError, match='header of'):
        M.load_safetensors(path)
    lies = [dict(dtype='Q4'), dict(shape=[3, 6]), dict(shape=[-3, -5]), dict(data_offsets=[0, 60]), dict(data_offsets=[0, 1 << 60]),
            dict(shape=[1 << 40]), dict(shape='x'), dict(data_offsets=[4])]
    for lie in lies:
        write(head | {'a': head['a'] | lie})
        with pytest.raises(ValueError, match='safetensors'):
            M.load_safetensors(path)
    write([1])
    with pytest.raises(ValueError, match='not a JSON object'):
        M.load_safetensors(path)


def test_gpt2_without_biases_is_written_with_zeros(tmp_path):
    torch.manual_seed(SEED)
    ours = GPT(GPTConfig.of('gpt2', n_layer=2, n_head=2, n_embd=16, vocab_size=31, block_size=24, bias=False, qkv_bias=False, attn_out_bias=False))
    ours.save_pretrained(str(tmp_path))
    idx, hf = torch.randint(0, 31, (2, 9)), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (hf(idx).logits - ours(idx)[0]).abs().max() < 1e-5 and torch.equal(GPT.from_pretrained(str(tmp_path))(idx)[0], ours(idx)[0])


def test_wrong_shape_and_missing_weight_are_named(tmp_path):
    m = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=8))
    m.save_pretrained(str(tmp_path))
    raw = json.loads((tmp_path / 'config.json').read_text())
    (tmp_path / 'config.json').write_text(json.dumps(raw | {'vocab_size': 12}))
    with pytest.raises(ValueError, match='wte.weight has shape'):
        GPT.from_pretrained(str(tmp_path))
    (tmp_path / 'config.json').write_text(json.dumps(raw | {'n_layer': 2}))
    with pytest.raises(ValueError, match='no weights for h.1'):
        GPT.from_pretrained(str(tmp_path))


def test_optimizer_groups_and_flops():
    m = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, vocab_size=11, block_size=8))
    decayed, plain = m.configure_optimizers(0.1, 1e-3, (0.9, 0.95)).param_groups
    assert all(p.dim() >= 2 for p in decayed['params']) and all(p.dim() < 2 for p in plain['params'])
    assert decayed['weight_decay'] == 0.1 and plain['weight_decay'] == 0.0
    n = 11 * 8 + 8 * 8 + (4 * 8 * 8 + 4 * 8) + (8 * 8 * 8 + 5 * 8) + 6 * 8  # wte, wpe, attention, MLP, three norms
    assert m.num_params(non_embedding=False) == n
    assert m.flops_per_token(8) == 6 * (n - 64) + 12 * 1 * 2 * 4 * 8


def test_freed_heap_goes_back():
    """Blocks below malloc's mmap threshold, every other one freed: the heap cannot shrink by itself, trim_heap can."""
    if run._malloc_trim is None:
        pytest.skip('no glibc')
    run._heap = None
    assert run.trim_heap() == 0 and run._heap > 0 and run.trim_heap() == 0  # the first call measures, the second sees no growth
    blocks = [torch.ones(12_000) for _ in range(8000)]  # 48 kB each
    held = blocks[::2]
    del blocks
    grown = run.memory_now(torch.device('cpu'))
    run._heap = grown // 2
    assert run.trim_heap() > 100e6 and run._heap is None and run.memory_now(torch.device('cpu')) < grown - 100e6 and len(held) == 4000


@pytest.mark.slow
def test_compiled_blocks_change_nothing():
    """compile_blocks on packed rows of two shapes: the loss and the gradients of the plain model."""
    torch.manual_seed(0)
    plain = GPT(GPTConfig.of('qwen3', n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_inner=64, head_size=16, vocab_size=64, block_size=64))
    fast = copy.deepcopy(plain)
    fast.compile_blocks('aot_eager')  # the graphs without the wait for a C++ compiler
    for T in (40, 57):
        idx, doc = torch.randint(0, 64, (1, T)), torch.arange(T)[None] // 13
        losses = [m(idx, torch.roll(idx, -1, 1), doc=doc)[1] for m in (plain, fast)]
        for loss in losses:
            loss.backward()
        assert abs(losses[0] - losses[1]) < 1e-6
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a, b in zip(plain.parameters(), fast.parameters()))
