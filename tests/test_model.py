"""model.py against transformers: every architecture at odd shapes, padded, packed, saved, loaded; broken
files."""
import copy
import functools
import json
import random
import shutil

import pytest
import torch

import lora
import model as M
import run
from helpers import equal
from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers')
SEED = 20261130


def hf_model(arch, kind='causal', **over):
    """A random HF model of odd shape with non-zero biases and norms away from one."""
    print('seed', SEED)
    torch.manual_seed(SEED)
    name = dict(gpt2='GPT2', llama='Llama', qwen2='Qwen2', qwen3='Qwen3')[arch]
    if arch == 'gpt2':
        keys = dict(n_positions=40, n_embd=36, n_layer=3, n_head=3, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    else:
        keys = dict(hidden_size=36, intermediate_size=52, num_hidden_layers=3, num_attention_heads=6,
                    num_key_value_heads=2, max_position_embeddings=40)
    if arch == 'qwen3':
        keys['head_dim'] = 10
    c = getattr(transformers, name + 'Config')(**dict(keys, vocab_size=67, **over))
    causal = 'LMHeadModel' if arch == 'gpt2' else 'ForCausalLM'
    cls = getattr(transformers, name + (causal if kind == 'causal' else 'ForSequenceClassification'))
    if kind != 'causal':
        c.num_labels, c.pad_token_id = 1, 0
    m = cls(c).eval()
    with torch.no_grad():
        for p in m.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return m


@pytest.mark.parametrize('arch', ['gpt2', 'qwen3'])
def test_weights_start_as_gpt2s_and_nanogpts(arch):
    """N(0, 0.02), on the way back into the residual stream 0.02 / sqrt(2 n_layer); the scalar head N(0, 1 /
    sqrt(C + 1)); norms 1, biases 0."""
    torch.manual_seed(SEED)
    shape = dict(n_layer=8, n_head=4, n_embd=128, vocab_size=512, block_size=64)
    for name, p in GPT(GPTConfig.of(arch, **shape), 'scalar').named_parameters():
        if p.dim() == 1:
            assert (p == (1.0 if name.endswith('weight') else 0.0)).all(), name
            continue
        back = name.split('.')[-2] in ('c_proj', 'o_proj', 'down_proj')
        want, rough = (0.02 / 4, 0.05) if back else (0.02, 0.05)
        if name == 'score.weight':
            want, rough = 129 ** -0.5, 0.25  # of 128 numbers
        assert p.std().item() == pytest.approx(want, rel=rough), name
        assert abs(p.mean()) < 5 * want / p.numel() ** 0.5, name


LLAMA3 = dict(rope_type='llama3', rope_theta=500.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=16)
CASES = [('gpt2', {}), ('gpt2', dict(activation_function='relu', tie_word_embeddings=False, n_inner=50)),
         ('llama', {}), ('llama', dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
         ('llama', dict(rope_parameters=LLAMA3)), ('qwen2', {}), ('qwen3', {}),
         ('qwen3', dict(tie_word_embeddings=True))]


@pytest.mark.parametrize('arch,over', CASES)
def test_logits_equal_transformers_dense_padded_and_packed(arch, over, tmp_path):
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
        # padding content changes nothing
        assert torch.equal(ours(again, mask=mask)[0], ours(idx, mask=mask)[0])
    docs = [torch.randint(0, 67, (1, n)) for n in (6, 1, 10)]  # packed: three documents in one row
    doc = torch.tensor([[0] * 6 + [1] + [2] * 10])
    got = ours(torch.cat(docs, 1), doc=doc)[0]
    want = torch.cat([hf(d).logits for d in docs], 1)
    assert (got - want).abs().max() < 1e-4


def test_gpt2_in_float64_to_1e10(tmp_path):
    hf = hf_model('gpt2').double()
    hf.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(str(tmp_path), dtype=torch.float64), torch.randint(0, 67, (2, 23))
    assert ours.wte.weight.dtype == torch.float64
    assert (ours(idx)[0] - hf(idx).logits).abs().max() < 1e-10


@pytest.mark.parametrize('arch,over', CASES)
def test_what_we_save_transformers_opens(arch, over, tmp_path):
    hf = hf_model(arch, **over)
    hf.save_pretrained(tmp_path / 'a', max_shard_size='20KB')
    assert len(list((tmp_path / 'a').glob('*.safetensors'))) > 1
    GPT.from_pretrained(str(tmp_path / 'a')).save_pretrained(str(tmp_path / 'b'))
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


def test_the_head_that_is_not_asked_for_is_left_out(tmp_path):
    """An untied language model under a scalar head, which starts anew; a reward model as a language model,
    whose head is its embedding."""
    hf_model('llama', tie_word_embeddings=False).save_pretrained(tmp_path / 'lm')
    hf_model('gpt2', 'scalar').save_pretrained(tmp_path / 'scalar')
    scalar = GPT.from_pretrained(str(tmp_path / 'lm'), head='scalar')
    assert scalar.fresh_head and scalar.score.weight.std() > 0.1 and not hasattr(scalar, 'lm_head')
    model = GPT.from_pretrained(str(tmp_path / 'scalar'), head='lm')
    assert model.lm_head.weight is model.wte.weight and not hasattr(model, 'score')


@pytest.mark.parametrize('arch', ['gpt2', 'llama', 'qwen3'])
def test_greedy_generation_equals_transformers(arch, tmp_path):
    hf = hf_model(arch).double()  # float64: a tie in float32 would be a matter of rounding
    hf.save_pretrained(tmp_path)
    ours, idx = GPT.from_pretrained(str(tmp_path), dtype=torch.float64), torch.randint(0, 67, (2, 5))
    want = hf.generate(idx, attention_mask=torch.ones_like(idx), max_new_tokens=20, do_sample=False,
                       eos_token_id=None, pad_token_id=0)
    for _ in range(20):
        idx = torch.cat([idx, ours(idx)[0][:, -1:].argmax(-1)], 1)
    assert torch.equal(idx, want)


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


def test_answers_in_a_row_of_their_own_are_those_that_share_their_prompt():
    """What context parallelism computes: each answer behind a prompt of its own, in one packed row."""
    torch.manual_seed(SEED)
    groups = [([1, 2, 3], [[4, 5], [6]]), ([7], [[8, 9, 10]])]
    m = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=31, block_size=24)).double()
    idx, doc, where = M._whole_answers(m, groups)
    assert idx.tolist() == [[1, 2, 3, 4, 5, 1, 2, 3, 6, 7, 8, 9, 10]]
    assert doc.tolist() == [[0] * 5 + [1] * 4 + [2] * 4]
    logp, entropy, mask = M.answer_logprobs(m, groups, 0.7)
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    found = m.logprobs(idx, 0.7, doc=doc, where=where[:, :-1], entropy=True)
    for ours, theirs in zip((logp, entropy), found):
        assert (ours[mask] - theirs[where[:, :-1]]).abs().max() < 1e-12 and not ours[~mask].any()
    packed = m.logprobs(idx, doc=doc)[0]  # nothing is predicted across a border
    apart = [m.logprobs(idx[:, doc[0] == i])[0] for i in range(3)]
    inside = [i for i in range(12) if i not in (4, 8)]
    assert not packed[[4, 8]].any() and torch.allclose(packed[inside], torch.cat(apart))


@pytest.fixture(scope='module')
def stored(tmp_path_factory):
    """folder(arch, config={}, drop=(), **tensors): a tiny HF folder with another config.json or other
    tensors."""
    @functools.cache
    def sound(arch):
        path = tmp_path_factory.mktemp(arch)
        hf_model(arch, tie_word_embeddings=True).save_pretrained(path)
        return path

    def folder(arch='llama', config=None, drop=(), **tensors):
        path = tmp_path_factory.mktemp('changed')
        shutil.copytree(sound(arch), path, dirs_exist_ok=True)
        raw = json.loads((path / 'config.json').read_text()) | (config or {})
        (path / 'config.json').write_text(json.dumps({k: v for k, v in raw.items() if k not in drop}))
        if tensors:
            file = str(path / 'model.safetensors')
            state = {k: v.clone() for k, v in M.load_safetensors(file).items()}
            M.save_safetensors(file, {k: v for k, v in (state | tensors).items() if v is not None})
        return path
    return folder


def assert_refused(path, says):
    with pytest.raises(ValueError, match=says) as e:
        GPT.from_pretrained(str(path))
    assert '\n' not in str(e.value) and len(str(e.value)) < 400, e.value


GATE, HEAD = 'model.layers.1.mlp.gate_proj.weight', 'lm_head.weight'
REFUSED = [  # what is other than in a sound folder, what the error says
    (dict(config=dict(use_sliding_window=True), arch='qwen2'), 'use_sliding_window'),
    (dict(config=dict(hidden_act='gelu')), 'hidden_act'),
    (dict(config=dict(layer_types=['sliding_attention'])), 'layer_types'),
    (dict(config=dict(model_type='bert')), 'bert'), (dict(config=dict(model_type=['llama'])), 'model_type'),
    (dict(config=dict(quantization_config={'quant_method': 'int'})), 'quantization_config'),
    ({GATE: torch.ones(52, 36, dtype=torch.int8)}, 'gate_proj.weight is torch.int8: quantised'),
    ({GATE + '_scale': torch.ones(52)}, 'no place for the tensor model.layers.1.mlp.gate_proj.weight_scale'),
    ({'v_head.summary.weight': torch.ones(1, 36)}, 'v_head.summary.weight'),
    ({'model.layers.3.mlp.up_proj.weight': torch.ones(52, 36)}, 'layers.3.mlp.up_proj'),
    ({GATE: None}, 'no weights for h.1.mlp.gate_proj.weight'),
    ({GATE: torch.ones(52, 35)}, r'gate_proj.weight has shape \(52, 35\)'),
    ({HEAD: torch.ones(66, 36)}, 'lm_head.weight has shape'),
    (dict(config=dict(tie_word_embeddings=False)), 'no weights for lm_head.weight'),
    (dict(config=dict(rope_scaling={'type': 'linear', 'factor': 2.0})),
     "type = 'linear' contradicts rope_type = 'default'"),
    (dict(config=dict(rope_theta=1e6)), 'rope_theta'), (dict(config=dict(rope_scaling=[])), 'fine'),
    (dict(config=dict(rope_parameters={'rope_type': 'yarn', 'factor': 4.0})), 'yarn'),
    (dict(config=dict(rope_parameters={**LLAMA3, 'factor': None})), 'no factor'),
    (dict(config=dict(rope_parameters={**LLAMA3, 'high_freq_factor': 1.0})), 'low_freq_factor is not below'),
    (dict(config=dict(rope_parameters={**LLAMA3, 'original_max_position_embeddings': None})),
     'original_max_pos'),
    (dict(config=dict(rope_parameters=dict(rope_theta=1e4, partial_rotary_factor=0.5))),
     'partial_rotary_factor'),
    (dict(config=dict(partial_rotary_factor=0.5)), 'partial_rotary_factor'),
    (dict(arch='gpt2', config=dict(hidden_size=48)), 'hidden_size = 48 contradicts n_embd = 36'),
    (dict(drop=['hidden_size']), 'no hidden_size'), (dict(drop=['vocab_size']), 'no vocab_size'),
    (dict(config=dict(vocab_size='67')), "vocab_size = '67', expected a positive int"),
    (dict(config=dict(num_hidden_layers=3.0)), 'num_hidden_layers = 3.0'),
    (dict(config=dict(num_hidden_layers=10 ** 8)), '100000000 layers'),
    (dict(config=dict(head_dim=7)), 'head_size 7'),
    (dict(config=dict(num_attention_heads=0)), 'num_attention_heads'),
    (dict(config=dict(bos_token_id='x')), 'bos_t'),
    (dict(config=dict(rms_norm_eps=float('nan'))), 'rms_norm_eps'),
    (dict(config=dict(mlp_bias=1)), 'mlp_bias'),
]


@pytest.mark.parametrize('change,says', REFUSED, ids=lambda x: x if isinstance(x, str) else '')
def test_what_cannot_be_honoured_is_refused_by_name(stored, change, says):
    path = stored(**{'arch': 'llama', **change})
    if says == 'fine':
        assert GPT.from_pretrained(str(path)).config.rope_scaling is None
    else:
        assert_refused(path, says)


@pytest.mark.parametrize('name,content,says', [
    ('config.json', b'{', 'config.json: not JSON'), ('config.json', b'[' * 100_000, 'config.json: not JSON'),
    ('config.json', b'\xff\xfe', 'config.json: not JSON'), ('config.json', b'[]', 'not an object'),
    ('config.json', M.LFS + b'/spec/v1\noid sha256:00', 'git-lfs'),
    ('generation_config.json', b'{', 'generation_conf'),
    ('model.safetensors', M.LFS + b'/spec/v1\noid sha256:00', 'model.safetensors: .*git-lfs pointer'),
    ('model.safetensors.index.json', b'{"metadata": {}}', 'no weight_map'),
    ('model.safetensors.index.json', b'{"weight_map": {"a": 1}}', 'no weight_map'),
    ('model.safetensors.index.json', b'{"weight_map": {"a": "../b"}}', 'outside the folder')])
def test_a_broken_folder_is_one_line(stored, name, content, says):
    path = stored()
    if 'index' in name:
        (path / 'model.safetensors').unlink()
    (path / name).write_bytes(content)
    assert_refused(path, says)


@pytest.mark.parametrize('arch,tensors,config', [
    ('llama', {HEAD: torch.eye(67, 36)}, {}), ('llama', {HEAD: torch.eye(67, 36).half()}, {}),
    ('gpt2', {HEAD: torch.eye(67, 36)}, {}),
    ('llama', {}, dict(eos_token_id=[])),
    ('llama', dict.fromkeys(['model.embed_tokens.weight'], None) | {HEAD: torch.eye(67, 36)}, {}),
    ('llama', {'model.layers.0.self_attn.rotary_emb.inv_freq': torch.ones(3)}, {}),
    ('llama', {}, dict(rope_scaling={'rope_type': 'default', 'rope_theta': 1e4}, rope_theta=1e4)),
    ('llama', {}, dict(rope_parameters=None, rope_theta=77.0,
                       rope_scaling={'type': 'linear', 'factor': 2.0})),
    ('llama', {}, dict(rope_parameters={k: v for k, v in LLAMA3.items() if 'max' not in k},
                       original_max_position_embeddings=16))], ids=str)
def test_odd_folders_are_read_and_written_as_by_transformers(stored, tmp_path, arch, tensors, config):
    """A trained head in a file that says it is tied, a file without the embedding, old buffers, settings that
    stand in two places: transformers' logits, also from what we write."""
    path, idx = stored(arch, config, **tensors), torch.randint(0, 67, (2, 11))
    want = transformers.AutoModelForCausalLM.from_pretrained(path).double()(idx).logits
    ours = GPT.from_pretrained(str(path), dtype=torch.float64)
    assert (ours(idx)[0] - want).abs().max() < 1e-6
    ours.save_pretrained(str(tmp_path))
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).double()
    assert (again(idx).logits - want).abs().max() < 1e-6


WILD = [None, '', 'x', 0, -1, 1.5, True, [], [1], {}, {'a': 1}, 10 ** 30, float('nan'), float('inf'), [[1]]]


def mutated(data, i, draw):
    """A JSON file, or a safetensors file: a key dropped, a value of another kind, a byte flipped, a piece cut
    out or repeated."""
    start = 0 if data[:1] == b'{' else 8
    end = 8 + int.from_bytes(data[:8], 'little') if start else len(data)
    raw = json.loads(data[start:end])
    key = draw.choice(list(raw))
    if i % 4 == 0:
        del raw[key]
    elif i % 4 == 1:
        inside = raw[key] if start and isinstance(raw[key], dict) else raw
        inside[draw.choice(list(inside))] = draw.choice(WILD)
    head = json.dumps(raw).encode()
    data = len(head).to_bytes(8, 'little') + head + data[end:] if start else head
    a, b = sorted(draw.randrange(len(data)) for _ in range(2))
    if i % 4 == 2:
        at = draw.randrange(min(len(data), 3000))
        data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1:]
    return draw.choice([data[:a], data[:a] + data[b:], data[:b] + data[a:]]) if i % 4 == 3 else data


def test_mutated_files_end_in_one_line(stored, tmp_path):
    """Of 840 changed files each gives a model, or one line; no other error."""
    lora.save_lora(lora.add_lora(GPT.from_pretrained(str(stored())), 2, 4), str(tmp_path), base='nowhere')
    draw, done, base = random.Random(0), 0, GPT.from_pretrained(str(stored()))
    gpt2, llama = stored('gpt2'), stored()
    for file in [path / name for path in (gpt2, llama) for name in ('config.json', 'model.safetensors')] + [
            tmp_path / 'adapter_config.json', tmp_path / 'adapter_model.safetensors']:
        sound = file.read_bytes()
        for i in range(140):
            file.write_bytes(mutated(sound, i, draw))
            try:
                if file.parent == tmp_path:
                    lora.load_lora(copy.deepcopy(base), str(tmp_path))
                else:
                    GPT.from_pretrained(str(file.parent))
            except ValueError as e:
                assert '\n' not in str(e) and len(str(e)) < 500, (file, i, e)
            done += 1
        file.write_bytes(sound)
    assert done == 840


def test_safetensors_are_those_of_the_library_and_lies_are_refused(tmp_path):
    path = str(tmp_path / 'm.safetensors')
    state = {'a': torch.randn(3, 5), 'b': torch.arange(4), 'c': torch.randn(2, 2).bfloat16(),
             'e': torch.empty(0, 3)}
    M.save_safetensors(path, state)
    theirs = pytest.importorskip('safetensors.torch').load_file(path)
    assert equal(M.load_safetensors(path), state) and equal(theirs, state)
    good = open(path, 'rb').read()
    M.save_safetensors(path, {})
    assert M.load_safetensors(path) == {}
    n = int.from_bytes(good[:8], 'little')
    head = json.loads(good[8:8 + n])
    lies = [dict(dtype='F8_E4M3'), dict(shape=[3, 6]), dict(shape=[-3, -5]), dict(data_offsets=[0, 60]),
            dict(shape='x'),
            dict(data_offsets=[0, 1 << 60]), dict(shape=[1 << 40]), dict(shape=[0, 1 << 47, 1 << 47]),
            dict(data_offsets=[4])]
    files = [good[:cut] for cut in (0, 5, 8, 40, len(good) - 1)]
    files += [good + b'x', (1 << 62).to_bytes(8, 'little') + good[8:]]
    for lie in lies:
        changed = json.dumps(head | {'a': head['a'] | lie}).encode()
        files.append(len(changed).to_bytes(8, 'little') + changed + good[8 + n:])
    for data in files:
        open(path, 'wb').write(data)
        with pytest.raises(ValueError, match='safetensors'):
            M.load_safetensors(path)


def test_gpt2_without_biases_is_written_with_zeros(tmp_path):
    torch.manual_seed(SEED)
    ours = GPT(GPTConfig.of('gpt2', n_layer=2, n_head=2, n_embd=16, vocab_size=31, block_size=24, bias=False,
                            qkv_bias=False, attn_out_bias=False))
    ours.save_pretrained(str(tmp_path))
    idx, hf = torch.randint(0, 31, (2, 9)), transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (hf(idx).logits - ours(idx)[0]).abs().max() < 1e-5
    assert torch.equal(GPT.from_pretrained(str(tmp_path))(idx)[0], ours(idx)[0])


def test_freed_heap_goes_back():
    """Blocks below malloc's mmap threshold, every other one freed: the heap cannot shrink by itself,
    trim_heap can."""
    if run.trim_heap is int:
        pytest.skip('no glibc')
    blocks = [torch.ones(12_000) for _ in range(8000)]  # 48 kB each
    held = blocks[::2]
    del blocks
    grown = run.memory_now(torch.device('cpu'))
    assert run.trim_heap(0) and len(held) == 4000
    assert run.memory_now(torch.device('cpu')) < grown - 100e6


@pytest.mark.slow
def test_compiled_blocks_change_nothing():
    """compile_blocks on packed rows of two shapes: the loss and the gradients of the plain model."""
    torch.manual_seed(0)
    plain = GPT(GPTConfig.of('qwen3', n_layer=2, n_head=2, n_kv_head=1, n_embd=32, n_inner=64, head_size=16,
                             vocab_size=64, block_size=64))
    fast = copy.deepcopy(plain)
    fast.compile_blocks('aot_eager')  # the graphs without the wait for a C++ compiler
    for T in (40, 57):
        idx, doc = torch.randint(0, 64, (1, T)), torch.arange(T)[None] // 13
        losses = [m(idx, torch.roll(idx, -1, 1), doc=doc)[1] for m in (plain, fast)]
        for loss in losses:
            loss.backward()
        assert abs(losses[0] - losses[1]) < 1e-6
    assert all(torch.allclose(a.grad, b.grad, atol=1e-6) for a,
               b in zip(plain.parameters(), fast.parameters()))
