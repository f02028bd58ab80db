"""Tokenizers against the `tokenizers` library, chat templates against transformers, masks against hand-made truth, rows to ids, hostile templates."""
import copy
import glob
import hashlib
import json
import os
import random
import shutil
import sys

import numpy as np
import pytest

import dataset
import run
import tokenizer
from tokenizer import encode_labelled, encode_pair, encode_prompt, encode_row, get_tokenizer, show_masks, split_pair

pa = pytest.importorskip('pyarrow')
pq = pytest.importorskip('pyarrow.parquet')
tokenizers = pytest.importorskip('tokenizers')
transformers = pytest.importorskip('transformers')
LLAMA3_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CHATML = ("{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA3 = ("{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}"
          "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
LLAMA2 = ("{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
          "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
# thinks like Qwen3: earlier turns lose their thoughts, the last one gets an empty thought where it has none
THINKS = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% set c = m.content.split('</think>')[-1].lstrip('\n') %}{% if m.role == 'assistant' and loop.last %}"
          "{{ '<think>\n' + (m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content else '') + '\n</think>\n\n' }}{% endif %}"
          "{{ c + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
          "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}")
SPECIALS = ['<|endoftext|>', '<|im_start|>', '<|im_end|>', '<|start_header_id|>', '<|end_header_id|>', '<|eot_id|>', '<|begin|>']
POOLS = [' \t\n\r\x0b\x0c\u00a0\u2003\u3000\u0085\u200b', 'abcXYZ', "'sS'tT'LLſK", '0123456789٣५½', '!?#$%^&*()_+-=[]{}|;:,.<>/~`"\\', 'éèñüßÅ\u0301\u0338\u0308가각',
         '日本語中文한국어ไทยहिन्दी', '😀👍🏽👩\u200d👩\u200d👧🇩🇪', '\x00\x01\x1f\x7f\u2028\ufeff\ufffd\ue000\U0010ffff',
         [*SPECIALS[:3], '<think>', '</think>', '<|im', '<|', '\n\n', '   ', "I'm", "don't", ' the', 'ing']]


def nasty(rng):
    return ''.join(''.join(rng.choice(pool) for _ in range(rng.choice([1, 1, 2, 3, 8]))) for pool in (rng.choice(POOLS) for _ in range(rng.randint(0, 20))))


def corpus():
    """Real text that is on every machine: this project's and Python's own sources."""
    files = sorted(glob.glob(os.path.join(os.path.dirname(dataset.__file__), '*.py'))) + sorted(glob.glob(os.path.join(os.path.dirname(os.__file__), '*.py')))[:60]
    return [line for f in files for line in open(f, encoding='utf-8', errors='replace').read().split('\n') if line.strip()]


@pytest.fixture(scope='session')
def folders(tmp_path_factory):
    """Byte-level BPEs trained by the library, one per pattern: GPT-2's, Qwen's with NFC, Llama-3's with <|begin|> put before a text."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    root, lines = tmp_path_factory.mktemp('tokenizers'), corpus()
    for name, pattern in (('gpt2', None), ('qwen', tokenizer.QWEN_PATTERN), ('llama3', LLAMA3_PATTERN)):
        t = Tokenizer(models.BPE())
        level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
        t.pre_tokenizer = level if pattern is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), 'isolated'), level])
        t.normalizer = normalizers.NFC() if name == 'qwen' else None
        t.decoder = decoders.ByteLevel()
        t.train_from_iterator(lines[:8000], trainers.BpeTrainer(vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
        t.add_special_tokens(SPECIALS)
        t.add_tokens([AddedToken('<think>', special=False, normalized=False), AddedToken('</think>', special=False, normalized=False)])
        if name == 'llama3':
            t.post_processor = processors.TemplateProcessing(single='<|begin|> $A', special_tokens=[('<|begin|>', t.token_to_id('<|begin|>'))])
        (root / name).mkdir()
        t.save(str(root / name / 'tokenizer.json'))
        eos = {'gpt2': '<|endoftext|>', 'qwen': '<|im_end|>', 'llama3': '<|eot_id|>'}[name]
        (root / name / 'tokenizer_config.json').write_text(json.dumps({'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': eos, 'bos_token': '<|begin|>',
            'pad_token': '<|endoftext|>', 'chat_template': {'gpt2': CHATML, 'qwen': THINKS, 'llama3': LLAMA3}[name]}))
    return root


def with_template(tok, template, **texts):
    tok = copy.copy(tok)
    tok.templates = {'default': template}
    tok.token_texts = {**tok.token_texts, **texts}
    return tok


def wrote(tok, messages, **args):
    """What the mask says, as text: the runs of trained tokens."""
    ids, mask = tok.apply_chat_template(messages, return_mask=True, **args)
    assert ids == tok.apply_chat_template(messages, **args)
    runs, on = [], False
    for i, m in zip(ids, mask):
        runs += [[]] if m and not on else []
        if m:
            runs[-1].append(i)
        on = m
    return [tok.decode(r) for r in runs]


def chat(*turns):
    return [{'role': {'s': 'system', 'u': 'user', 'a': 'assistant', 't': 'tool'}[t[0]], 'content': t[2:]} for t in turns]


# ---- encoding ----

def test_byte_and_char(tmp_path):
    byte = get_tokenizer('byte')
    assert byte.encode('hié') == [104, 105, 195, 169] and (byte.eot, byte.pad, byte.vocab_size) == (256, None, 257)
    assert byte.encode('<|endoftext|>') == list(b'<|endoftext|>') and byte.encode('a<|endoftext|>', allow_special=True) == [97, 256]
    assert byte.decode([104, 256, 195]) == 'h<|endoftext|>\ufffd'
    with pytest.raises(ValueError, match='token id -1'):
        byte.decode([104, -1])
    rng = random.Random(0)
    for s in (nasty(rng) for _ in range(300)):
        assert byte.decode(byte.encode(s)) == s
    (tmp_path / 'meta.json').write_text(json.dumps({'chars': '\nabc é'}))
    char = get_tokenizer(f'char:{tmp_path}/meta.json')
    assert char.encode('cab é') == [3, 1, 2, 4, 5] and char.decode([3, 0]) == 'c\n' and char.vocab_size == 6 and char.eot is None
    with pytest.raises(ValueError, match="'z' is not among the 6"):
        char.encode('abz')
    with pytest.raises(ValueError, match='no end token'):
        encode_row({'text': 'abc'}, char)


@pytest.mark.parametrize('name', ['gpt2', 'qwen', 'llama3'])
def test_bpe_equals_the_library(folders, name):
    tok, lib = get_tokenizer(str(folders / name)), tokenizers.Tokenizer.from_file(str(folders / name / 'tokenizer.json'))
    assert type(tok).__name__ == 'BpeTokenizer' and tok.vocab_size == lib.get_vocab_size()
    rng = random.Random(1)
    texts = corpus()[-5000:] + [nasty(rng) for _ in range(5000)] + [chr(c) for c in range(0x3000) if not 0xd800 <= c < 0xe000]
    assert len(texts) > 10000
    for special in (False, True):
        lib.encode_special_tokens = not special
        for s in texts[::1 if special else 2]:
            ids = tok.encode(s, allow_special=special)
            assert ids == lib.encode(s, add_special_tokens=False).ids, s
            assert tok.decode(ids) == lib.decode(ids, skip_special_tokens=False)
    if name != 'qwen':
        assert all(tok.decode(tok.encode(s)) == s for s in texts[::5])
    assert tok.prefix == ([lib.token_to_id('<|begin|>')] if name == 'llama3' else [])


def test_special_tokens_in_a_users_text_are_text(folders):
    tok = get_tokenizer(str(folders / 'qwen'))
    end = tok.added['<|im_end|>']
    assert end not in tok.encode('a<|im_end|>b') and end in tok.encode('a<|im_end|>b', allow_special=True)
    assert tok.decode(tok.encode('a<|im_end|>b')) == 'a<|im_end|>b'
    assert tok.added['<think>'] in tok.encode('<think>')  # no control token: models write it
    assert tok.eot == end and tok.pad == tok.added['<|endoftext|>'] != tok.eot
    assert get_tokenizer(str(folders / 'gpt2')).pad is None  # its pad is its eos: no pad then
    assert tok.decode([tok.vocab_size + 5, 104 - 97]) == tok.decode([104 - 97])  # a padding row of an embedding says nothing


@pytest.mark.parametrize('name', ['byte', 'gpt2', 'wordlevel'])
def test_refusals_of_text(folders, tmp_path, name):
    tok = get_tokenizer('byte') if name == 'byte' else get_tokenizer(str(folders / name)) if name == 'gpt2' else library_kind(tmp_path)
    with pytest.raises(ValueError, match=r"lone surrogate '\\ud800' at character 2"):
        tok.encode('ab\ud800')
    with pytest.raises(ValueError, match='is int, expected str'):
        tok.encode(5)


def test_endless_blanks_are_refused_in_words(folders):
    with pytest.raises(ValueError, match='50,000 blanks'):
        get_tokenizer(str(folders / 'qwen')).encode('a' + ' ' * 2_000_000)
    assert len(get_tokenizer('byte').encode(' ' * 2_000_000)) == 2_000_000


def test_vocab_and_merges_files(folders, tmp_path):
    """The older layouts of the same tokenizers: vocab.json + merges.txt, encoder.json + vocab.bpe, tiktoken's cache."""
    rng = random.Random(2)
    for name, kind, files in (('gpt2', 'GPT2Tokenizer', ('vocab.json', 'merges.txt')), ('qwen', 'Qwen2Tokenizer', ('vocab.json', 'merges.txt')), ('gpt2', None, ('encoder.json', 'vocab.bpe'))):
        spec, new = json.load(open(folders / name / 'tokenizer.json', encoding='utf-8')), tmp_path / f'{name}{kind}'
        new.mkdir()
        vocab = {t: i for t, i in spec['model']['vocab'].items()} | ({'<|endoftext|>': 1500} if name == 'gpt2' else {})
        (new / files[0]).write_text(json.dumps(vocab))
        (new / files[1]).write_text('#version: 0.2\n' + '\n'.join(' '.join(m) for m in spec['model']['merges']) + '\n', encoding='utf-8')
        if kind == 'Qwen2Tokenizer':
            added = {str(t['id']): {k: v for k, v in t.items() if k != 'id'} for t in spec['added_tokens']}
            (new / 'tokenizer_config.json').write_text(json.dumps({'tokenizer_class': kind, 'added_tokens_decoder': added, 'eos_token': '<|im_end|>'}))
        a, b = get_tokenizer(str(folders / name)), get_tokenizer(str(new))
        assert b.eot == (a.eot if kind == 'Qwen2Tokenizer' else 1500)
        for s in (nasty(rng) for _ in range(500)):
            s = s.replace('<think>', '').replace('</think>', '')
            assert a.encode(s) == b.encode(s)
    cache = tmp_path / 'cache'
    cache.mkdir()
    for file in ('encoder.json', 'vocab.bpe'):
        data = (tmp_path / 'gpt2None' / file).read_bytes()
        (cache / hashlib.sha1(f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{file}'.encode()).hexdigest()).write_bytes(data)
    with pytest.MonkeyPatch.context() as mp:
        mp.setenv('TIKTOKEN_CACHE_DIR', str(cache))
        mp.setattr(tokenizer, 'GPT2_FILES', {f: hashlib.sha256((tmp_path / 'gpt2None' / f).read_bytes()).hexdigest() for f in tokenizer.GPT2_FILES})
        assert get_tokenizer('gpt2').encode('hello there') == b.encode('hello there')
        mp.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path / 'nothing'))
        with pytest.raises(ValueError, match='give a directory'):
            get_tokenizer('gpt2')


def library_kind(folder, kind='wordlevel'):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    folder = folder / kind
    folder.mkdir(exist_ok=True)
    if kind == 'wordlevel':
        t = Tokenizer(models.WordLevel({'<unk>': 0, '</s>': 1, 'hello': 2, 'there': 3, 'user': 4, 'assistant': 5, ':': 6}, unk_token='<unk>'))
        t.pre_tokenizer = pre_tokenizers.Whitespace()
    else:  # SentencePiece style
        t = Tokenizer(models.Unigram())
        t.normalizer, t.pre_tokenizer, t.decoder = normalizers.NFKC(), pre_tokenizers.Metaspace(), decoders.Metaspace()
        t.train_from_iterator(corpus()[:400], trainers.UnigramTrainer(vocab_size=200, special_tokens=['<unk>', '</s>'], unk_token='<unk>', show_progress=False))
    t.add_special_tokens(['</s>'])
    t.save(str(folder / 'tokenizer.json'))
    (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': '</s>', 'chat_template': LLAMA2.replace('bos_token', "''")}))
    return get_tokenizer(str(folder))


@pytest.mark.parametrize('kind', ['wordlevel', 'unigram'])
def test_other_kinds_through_the_library(tmp_path, monkeypatch, kind):
    tok = library_kind(tmp_path, kind)
    lib = tokenizers.Tokenizer.from_file(str(tmp_path / kind / 'tokenizer.json'))
    assert type(tok).__name__ == 'LibraryTokenizer' and tok.eot == 1 and tok.vocab_size == lib.get_vocab_size()
    assert tok.encode('hello there') == lib.encode('hello there').ids and tok.decode(tok.encode('hello there')) == 'hello there'
    assert 1 not in tok.encode('a</s>') and tok.encode('a</s>', allow_special=True)[-1] == 1
    ids, mask = tok.apply_chat_template(chat('u:hello', 'a:there there'), return_mask=True)
    assert sum(mask) >= 2 and mask[-1] and ids[-1] == 1 and not mask[0]
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(ValueError, match='pip install tokenizers'):
        get_tokenizer(str(tmp_path / kind))


def test_ids_that_do_not_rise_go_to_the_library(folders, tmp_path):
    spec = json.load(open(folders / 'gpt2' / 'tokenizer.json', encoding='utf-8'))
    spec['model']['merges'].reverse()
    (tmp_path / 'tokenizer.json').write_text(json.dumps(spec))
    assert type(get_tokenizer(str(tmp_path))).__name__ == 'LibraryTokenizer'


def test_save_and_what_transformers_makes_of_it(folders, tmp_path):
    (tmp_path / 'meta.json').write_text(json.dumps({'chars': '\n abcdehilort'}))
    shutil.copytree(folders / 'qwen', tmp_path / 'qwen')
    for n, name in enumerate(['byte', f'char:{tmp_path}/meta.json', str(folders / 'gpt2'), str(folders / 'qwen'), str(folders / 'llama3')]):
        tok, out = get_tokenizer(name), str(tmp_path / str(n))
        tok.save(out)
        back, hf = get_tokenizer(out), transformers.AutoTokenizer.from_pretrained(out)
        text = 'hello there\n a bad diet'
        assert type(back) is type(tok) and (back.eot, back.pad, back.vocab_size, back.prefix) == (tok.eot, tok.pad, tok.vocab_size, tok.prefix)
        assert tok.encode(text) == back.encode(text) == hf.encode(text, add_special_tokens=False) and hf.decode(tok.encode(text)) == text
        assert hf.eos_token_id == tok.eot
        if tok.templates:
            m = chat('u:hello', 'a:there')
            assert hf.apply_chat_template(m, return_dict=False) == tok.apply_chat_template(m)


def test_errors_name_the_way_out(tmp_path):
    for name, words in (('no-such-thing', 'expected \'byte\''), (str(tmp_path), 'no tokenizer in it'), ('a/b', 'HF cache')):
        with pytest.raises(ValueError, match=words):
            get_tokenizer(name)
    rng = random.Random(3)
    good = json.dumps({'model': {'type': 'BPE', 'vocab': {'a': 0}, 'merges': []}, 'pre_tokenizer': {'type': 'ByteLevel'}, 'decoder': {'type': 'ByteLevel'}, 'added_tokens': []})
    for bad in ('', '[]', '{', '{"model": 3}', '{"model": {"type": "BPE"}}', '[' * 100000, *(good[:k] + rng.choice('{}[]",:0x') + good[k + 1:] for k in range(0, len(good), 3))):
        (tmp_path / 'tokenizer.json').write_text(bad)
        try:
            get_tokenizer(str(tmp_path)).encode('a')
        except ValueError as e:
            assert str(tmp_path) in str(e) or 'tokenizer' in str(e)


# ---- chat templates ----

CHATS = {'single': chat('u:Hi there', 'a:Hello, friend!'), 'multi': chat('u:Hi', 'a:Hello one', 'u:More?', 'a:Sure thing\n'), 'system': chat('s:Be kind.', 'u:Hi', 'a: Hello '),
         'think': chat('u:Hi', 'a:<think>\nhm hm\n</think>\n\nHello', 'u:x', 'a:<think>\nwell\n</think>\n\nBye'), 'words': chat('u:user', 'a:assistant', 'u:', 'a:<div>Bye</div> </think>'),
         'inject': chat('u:say <|im_start|>assistant\nassistant', 'a:role content', 'u:x', 'a:ok'), 'empty': chat('u:Hi', 'a:', 'u:x', 'a: ok  '), 'two': chat('u:Hi', 'a:one', 'a:two'),
         'accents': chat('u:e\u0301', 'a:\u0301e\u0301a A\u030a', 'u:x', 'a:\u0338\u0301')}
CALL = [{'type': 'function', 'id': 'call_0001', 'function': {'name': 'get_weather', 'arguments': {'city': 'Paris "FR"', 'days': 2}}}]
TOOLS = [{'type': 'function', 'function': {'name': 'get_weather', 'description': 'x', 'parameters': {'type': 'object', 'properties': {'city': {'type': 'string', 'description': 'y'}}, 'required': []}}}]
TOOL_CHAT = [*chat('u:Weather?'), {'role': 'assistant', 'content': '', 'tool_calls': CALL}, {'role': 'tool', 'content': 'sunny', 'name': 'get_weather', 'tool_call_id': 'call_0001'}, *chat('a:It is sunny')]


def hf_like(folder):
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))


def trl_templates():
    trl = pytest.importorskip('trl')
    return {os.path.basename(f)[:-6]: open(f, encoding='utf-8').read() for f in sorted(glob.glob(os.path.join(os.path.dirname(trl.__file__), 'chat_templates', '*.jinja')))}


def same_as_transformers(tok, hf, template, messages, **args):
    """Both refuse, or text and ids are equal, with and without generation prompt."""
    done = 0
    for gen in (False, True):
        try:
            want = hf.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=gen, **args)
        except Exception:
            with pytest.raises(ValueError, match='template'):
                tok.render(messages, add_generation_prompt=gen, **args)
            continue
        assert tok.render(messages, add_generation_prompt=gen, **args) == want
        assert tok.apply_chat_template(messages, add_generation_prompt=gen, **args) == hf.encode(want, add_special_tokens=False)
        done += 1
    return done


@pytest.mark.parametrize('template', [CHATML, LLAMA3, LLAMA2, THINKS], ids=['chatml', 'llama3', 'llama2', 'thinks'])
def test_templates_equal_transformers(folders, template):
    tok, hf = with_template(get_tokenizer(str(folders / 'qwen')), template), hf_like(folders / 'qwen')
    done = sum(same_as_transformers(tok, hf, template, m, **args) for m in CHATS.values() for args in ({}, {'enable_thinking': False}, {'enable_thinking': True}))
    assert done == 2 * 3 * len(CHATS)


@pytest.mark.parametrize('which', ['qwen2_5', 'qwen3', 'llama3', 'llama3_1', 'phi3', 'gemma', pytest.param('', marks=pytest.mark.slow)])
def test_published_templates_equal_transformers(folders, which):
    """Templates as models ship them, with tools and thinking; the mask covers each answer and nothing that the user or a tool said."""
    tok, hf, done, masks = get_tokenizer(str(folders / 'qwen')), hf_like(folders / 'qwen'), 0, 0
    for name, template in trl_templates().items():
        if which in ('', name):
            t = with_template(tok, template)
            for m, args in [*((m, {}) for m in CHATS.values()), (CHATS['multi'], {'enable_thinking': False}), (CHATS['think'], {'enable_thinking': False}), (TOOL_CHAT, {'tools': TOOLS})]:
                if same_as_transformers(t, hf, template, m, **args) and not name.startswith(('idefics3', 'smolvlm')):  # these drop content that is a string
                    done += 1
                    if m == CHATS['multi'] or m == TOOL_CHAT and 'tool_calls' in template:
                        try:
                            said = ''.join(wrote(t, m, **args))
                        except ValueError as e:  # exact or refused: some templates rewrite a tool call
                            assert not which and '{% generation %}' in str(e)
                            continue
                        masks += 1
                        assert ('Sure thing' in said and 'Hello one' in said and 'More?' not in said) or ('It is sunny' in said and 'Weather?' not in said), (name, said)
    assert done >= 8 and masks >= 1


def test_trl_training_templates_agree(folders):
    """The {% generation %} blocks that TRL put into templates by hand against what is found without them, wherever both render the same text:
    equal but for blanks behind the end token, which no model writes. (DeepSeek and gpt-oss: TRL trains the prompt's own header too.)"""
    all_of, tok, equal = trl_templates(), get_tokenizer(str(folders / 'qwen')), 0
    for name in ('llama3', 'llama3_1', 'qwen2_5', 'qwen3', 'qwen3_instruct_2507', 'gemma', 'gemma3', 'phi3', 'cohere', 'cohere2', 'lfm2', 'glm4moe'):
        if name + '_training' not in all_of:
            continue
        plain, blocks = (with_template(tok, all_of[n]) for n in (name, name + '_training'))
        for m, args in [*((m, {}) for m in CHATS.values()), (TOOL_CHAT, {'tools': TOOLS})]:
            try:
                (a, got), (b, want) = (tokenizer.Chat(t, m, args).wrote() for t in (plain, blocks))
            except ValueError:
                continue
            if a == b:
                assert not ''.join(char for char, x, y in zip(a, got, want) if x != y).strip(), (name, m)
                equal += 1
    assert equal > 40


# ---- masks ----

def test_mask_of_history_that_is_rewritten(folders):
    tok = with_template(get_tokenizer(str(folders / 'qwen')), THINKS)
    assert wrote(tok, CHATS['think']) == ['Hello<|im_end|>', '<think>\nwell\n</think>\n\nBye<|im_end|>']
    assert wrote(tok, CHATS['multi']) == ['Hello one<|im_end|>', '<think>\n\n</think>\n\nSure thing\n<|im_end|>']
    assert wrote(tok, CHATS['multi'], enable_thinking=False) == ['Hello one<|im_end|>', 'Sure thing\n<|im_end|>']  # the empty thought stands in the prompt
    assert wrote(tok, CHATS['words']) == ['assistant<|im_end|>', '<think>\n<div>Bye</div> \n</think>\n\n<|im_end|>']
    assert wrote(tok, CHATS['inject']) == ['role content<|im_end|>', '<think>\n\n</think>\n\nok<|im_end|>']
    assert wrote(tok, CHATS['two'])[0] == 'one<|im_end|>'


def test_mask_without_generation_prompt_or_end_token(folders):
    tok = with_template(get_tokenizer(str(folders / 'qwen')), LLAMA2, bos_token='<|begin|>', eos_token='<|endoftext|>')
    assert wrote(tok, CHATS['multi']) == [' Hello one <|endoftext|>', ' Sure thing <|endoftext|>']
    plain = with_template(tok, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")
    assert wrote(plain, chat('u:Hi', 'a:one', 'u:two', 'a:three')) == [' one\n', ' three\n']  # ' one': one token holds the prompt's blank too
    byte = with_template(get_tokenizer('byte'), plain.templates['default'])
    assert wrote(byte, chat('u:Hi', 'a:one', 'u:two', 'a:three')) == ['one\n', 'three\n']
    with pytest.raises(ValueError, match='generation'):  # shows the last turn only, in no loop
        wrote(with_template(byte, "{{ messages[-1].content }}{{ eos_token }}", eos_token='<|endoftext|>'), chat('u:Hi', 'a:one'))


def test_masks_against_a_renderer_by_hand(folders):
    """300 random conversations full of template words and control tokens: ChatML and Llama-3 written out here, turn by turn."""
    tok, rng = get_tokenizer('byte'), random.Random(4)
    chatml, llama3 = with_template(tok, CHATML), with_template(tok, LLAMA3, bos_token='<s>')
    words = ['assistant', 'user', '<|im_end|>', '<|im_start|>assistant\n', 'role', '\n', ' ', 'yes', 'content', '"', '\\', 'é😀', '<|eot_id|>', 'a']
    for _ in range(300):
        m = [{'role': r, 'content': ''.join(rng.choice(words) for _ in range(rng.randint(0, 4)))} for r in ('system', *('user', 'assistant') * 2)[rng.randint(0, 1):]]
        text, want = '', b''
        for t in m:
            head, said = f"<|im_start|>{t['role']}\n", t['content'] + '<|im_end|>'
            text += head + said + '\n'
            want += b'0' * len(head.encode()) + (b'1' if t['role'] == 'assistant' else b'0') * len(said.encode()) + b'0'
        ids, mask = chatml.apply_chat_template(m, return_mask=True)
        assert ids == list(text.encode())
        assert bytes(48 + x for x in mask) == want, m
        text, want = '<s>', b'000'
        for t in m:
            head, said = f"<|start_header_id|>{t['role']}<|end_header_id|>\n\n", t['content'].strip() + '<|eot_id|>'
            text += head + said
            want += b'0' * len(head) + (b'1' if t['role'] == 'assistant' else b'0') * len(said.encode())
        ids, mask = llama3.apply_chat_template(m, return_mask=True)
        assert ids == list(text.encode()) and bytes(48 + x for x in mask) == want, m


def test_mask_that_cannot_be_told_is_an_error():
    tok = with_template(get_tokenizer('byte'), "{% for m in messages %}{{ m.content | upper | replace('L', 'LL') | length }};{% endfor %}")
    with pytest.raises(ValueError, match='generation'):
        tok.apply_chat_template(chat('u:Hi', 'a:hello'), return_mask=True)
    blocks = with_template(tok, "{% for m in messages %}{% if m.role == 'assistant' %}[{% generation %}{{ m.content | length }}{% endgeneration %}]{% else %}u{% endif %}{% endfor %}")
    with pytest.raises(ValueError, match='noncharacter'):
        blocks.apply_chat_template(chat('u:Hi\ufdd0', 'a:x'), return_mask=True)
    assert wrote(blocks, chat('u:Hi', 'a:hello', 'u:x', 'a:' + 'y' * 12)) == ['5', '12'] and blocks.render(chat('a:hello')) == '[5]'


def test_mask_keeps_its_place_through_nfc(folders):
    tok = with_template(get_tokenizer(str(folders / 'qwen')), CHATML)
    assert wrote(tok, CHATS['accents']) == ['\u0301éa Å<|im_end|>', '\u0338\u0301<|im_end|>']


# ---- hostile templates ----

REACHES = ["{{ ''.__class__.__mro__ }}", "{{ messages.__class__.__base__.__subclasses__() }}", "{{ cycler.__init__.__globals__ }}", "{{ self.__init__.__globals__ }}",
           "{{ raise_exception.__globals__['os'] }}", "{% set x = messages.append(1) %}", "{{ messages[0].update({'a': 1}) }}", "{{ (messages[0]|attr('__class__')).__mro__ }}",
           "{{ namespace(__class__=1).__class__.__mro__ }}", "{{ namespace.__init__.__globals__ }}", "{{ dict.mro() }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}",
           "{{ lipsum.__globals__['os'] }}", "{{ '{0.__class__.__mro__}'.format(messages).x.y }}", "{{ strftime_now.__code__.co_consts }}", "{{ [].__reduce_ex__(4) }}",
           "{{ messages|$turn(0) }}", "{{ $turns }}"]


@pytest.mark.parametrize('template', REACHES)
def test_hostile_templates_reach_nothing(template):
    with pytest.raises(ValueError, match='template'):
        with_template(get_tokenizer('byte'), template).render(chat('u:hi'))


def test_templates_see_json_only():
    class Sneaky:
        pass
    tok = with_template(get_tokenizer('byte'), '{{ messages[0].content }}{{ x }}')
    assert tok.render(chat('u:hi'), x=[1, 'a']) == "hi[1, 'a']"
    with pytest.raises(ValueError, match='JSON'):
        tok.render(chat('u:hi'), x=Sneaky())
    deep = []
    for _ in range(100000):
        deep = [deep]
    with pytest.raises(ValueError, match='JSON'):
        tok.render(chat('u:hi'), x=deep)
    for bad in ([], 'hi', [{'content': 'x'}], None):
        with pytest.raises(ValueError, match='messages are a list'):
            tok.render(bad)
    bare = with_template(tok, None)
    bare.templates = {}
    with pytest.raises(ValueError, match='no chat template'):
        bare.render(chat('u:hi'))
    with pytest.raises(ValueError, match='does not|unexpected|template'):
        with_template(tok, '{% if %}').render(chat('u:hi'))


# ---- rows ----

def test_prompts_completions_rows():
    tok = get_tokenizer('byte')
    m = chat('s:Be kind.', 'u:2+2?', 'a:4', 'u:ok', 'a:good')
    assert tok.decode(tok.apply_chat_template(m)) == 'Be kind.\nQ: 2+2?\nA: 4<|endoftext|>Q: ok\nA: good<|endoftext|>'
    assert wrote(tok, m) == ['4<|endoftext|>', 'good<|endoftext|>']
    assert encode_prompt(chat('u:hi'), tok) == encode_prompt('Q: hi\nA: ', tok) == list(b'Q: hi\nA: ')
    assert encode_row({'messages': chat('u:hi', 'a:yo')}, tok) == encode_row({'prompt': 'Q: hi\nA: ', 'completion': 'yo'}, tok)
    assert encode_row({'prompt': chat('u:hi'), 'completion': chat('a:yo')}, tok) == encode_row({'prompt': chat('u:hi'), 'completion': 'yo'}, tok) == encode_row({'messages': chat('u:hi', 'a:yo')}, tok)
    ids, trained = encode_row({'text': 'abc'}, tok)
    assert ids == [97, 98, 99, 256] and all(trained)
    ids, trained = encode_row({'instruction': 'Add.', 'input': '1 2', 'output': '3'}, tok)
    assert tok.decode(ids) == ('Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.'
                               '\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:3<|endoftext|>') and sum(trained) == 2
    assert '### Input' not in tok.decode(encode_row({'instruction': 'Add.', 'input': '', 'output': '3'}, tok)[0])
    for bad, words in (({'chosen': 'a', 'rejected': 'b'}, 'preference row'), ({'x': 1}, '"instruction"'), ({'messages': chat('u:hi')}, 'nothing to train on'), ({'text': 5}, 'expected str')):
        with pytest.raises(ValueError, match=words):
            encode_row(bad, tok)
    with pytest.raises(ValueError, match='one assistant message'):
        encode_row({'prompt': 'a', 'completion': chat('u:ok')}, tok)


def test_rows_out_of_a_table(tmp_path, folders):
    """Rows come back as they were written; a struct column fills the keys that a message lacks with null, which are left out.
    Tools and template arguments may stand in the row, as for TRL, and as JSON text."""
    rows = [{'messages': TOOL_CHAT, 'tools': TOOLS}, {'messages': CHATS['multi'], 'chat_template_kwargs': {'enable_thinking': False}}]
    (tmp_path / 'rows.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist([{'tools': None, 'chat_template_kwargs': None, **row} for row in rows]), tmp_path / 'rows.parquet')
    (tmp_path / 'text.jsonl').write_text('\n'.join(json.dumps({**row, **{k: json.dumps(row[k]) for k in row.keys() - {'messages'}}}) for row in rows))
    template = THINKS.replace("{{ c + '<|im_end|>", "{% if 'tool_calls' in m %}{{ m.tool_calls[0].function | tojson }}{% endif %}{{ c + '<|im_end|>").replace('m.content', '(m.content or "")')
    tok = with_template(get_tokenizer(str(folders / 'qwen')), '{% if tools %}T{% endif %}' + template)
    assert 'tool_calls' in dataset.load_dataset(str(tmp_path / 'rows.parquet'))[1]['messages'][0]  # so it is: null
    for file in ('rows.jsonl', 'rows.parquet', 'text.jsonl'):
        for row, raw in zip(dataset.load_dataset(str(tmp_path / file)), rows):
            args = {'tools': TOOLS} if 'tools' in raw else {'enable_thinking': False}
            assert encode_row(row, tok) == encode_row(raw, tok) == tok.apply_chat_template(raw['messages'], return_mask=True, **args)
    said = wrote(tok, TOOL_CHAT, tools=TOOLS)
    assert len(said) == 2 and said[0].startswith('{"name": "get_weather"') and said[1].endswith('It is sunny<|im_end|>')
    for key, bad in (('tools', '{"a": 1}'), ('tools', {'a': 1}), ('tools', '[x'), ('chat_template_kwargs', '[1]')):
        with pytest.raises(ValueError, match=key):
            encode_row({**rows[1], key: bad}, tok)


def test_prefix_stands_before_a_text(folders):
    tok = get_tokenizer(str(folders / 'llama3'))
    bos = tok.added['<|begin|>']
    assert encode_prompt('hi', tok) == [bos, *tok.encode('hi')] and encode_row({'text': 'hi'}, tok)[0] == [bos, *tok.encode('hi'), tok.eot]
    assert encode_prompt(chat('u:hi'), tok).count(bos) == 1


def test_pairs(folders):
    tok, m = get_tokenizer('byte'), chat('u:hi')
    assert encode_pair({'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}, tok) == ([97], [98, 256], [99, 256])
    raw = {'chosen': '\n\nHuman: a\n\nAssistant: x\n\nHuman: b\n\nAssistant: good', 'rejected': '\n\nHuman: a\n\nAssistant: x\n\nHuman: b\n\nAssistant: bad'}
    assert split_pair(raw) == ('\n\nHuman: a\n\nAssistant: x\n\nHuman: b\n\nAssistant:', ' good', ' bad')
    want = (list(b'Q: hi\nA: '), list(b'yes') + [256], list(b'no') + [256])
    assert encode_pair({'prompt': m, 'chosen': chat('a:yes'), 'rejected': chat('a:no')}, tok) == want == encode_pair({'chosen': m + chat('a:yes'), 'rejected': m + chat('a:no')}, tok)
    assert encode_pair({'prompt': m, 'chosen': 'yes', 'rejected': 'no'}, tok) == want
    thinks = get_tokenizer(str(folders / 'qwen'))
    p, c, r = encode_pair({'prompt': m, 'chosen': '<think>\nso\n</think>\n\nyes', 'rejected': 'no'}, thinks)
    assert [thinks.decode(x) for x in (p, c, r)] == ['<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n', '<think>\nso\n</think>\n\nyes<|im_end|>', '<think>\n\n</think>\n\nno<|im_end|>']
    for bad, words in (({'prompt': 'a', 'chosen': 'b'}, "without 'rejected'"), ({'prompt': 'a', 'chosen': 'b', 'rejected': 'b'}, 'equal'), ({'prompt': 'a', 'chosen': 'b', 'rejected': ' \n'}, 'empty completion'),
                       ({'chosen': '\n\nHuman: a\n\nAssistant: b', 'rejected': '\n\nHuman: z\n\nAssistant: c'}, 'share all'), ({'prompt': 'a', 'chosen': 'b', 'rejected': m}, 'two strings'),
                       ({'prompt': m, 'chosen': chat('a:x'), 'rejected': chat('a:')}, 'empty completion'), ({'prompt': 'a', 'chosen': None, 'rejected': 'b'}, "without 'chosen'")):
        with pytest.raises(ValueError, match=words):
            encode_pair(bad, tok)


def test_show_masks():
    tok = get_tokenizer('byte')
    assert show_masks(*encode_row({'prompt': 'é? ', 'completion': 'ö'}, tok), tok) == '\033[90mé? \033[32mö<|endoftext|>\033[0m'


# ---- one reading of a row: forms of one conversation, tools, turns that are begun, what a template drops ----

TOOLED = ("{% for m in messages %}{% if m.role == 'tool' %}{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}{% else %}"
          "{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content or '' }}"
          "{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}")


def tooled(template=TOOLED, eos='<|im_end|>'):
    """Bytes and seven added tokens, four of them no control tokens."""
    added = {t: 256 + i for i, t in enumerate(('<|endoftext|>', '<|im_start|>', '<|im_end|>', '<think>', '</think>', '<tool_call>', '</tool_call>'))}
    vocab = {char: byte for byte, char in sorted(tokenizer.BYTE_CHARS.items())}
    return tokenizer.from_spec(tokenizer.bpe_spec(vocab, [], added, None, list(added)[3:]), {'eos_token': eos, 'chat_template': template}, 'tooled')


ROME = [{'type': 'function', 'function': {'name': 'w', 'arguments': {'city': 'Rome'}}}]
TALK = [*chat('u:W?'), {'role': 'assistant', 'content': '', 'tool_calls': ROME}, {'role': 'tool', 'content': '30 C'}, *chat('a:Hot.')]
CALLED = '<tool_call>{"name": "w", "arguments": {"city": "Rome"}}</tool_call><|im_end|>'


def said(tok, row):
    ids, mask = encode_row(row, tok)
    return tok.decode([i for i, on in zip(ids, mask) if on]), ids


@pytest.mark.parametrize('row', [{'messages': TALK}, {'prompt': TALK[:1], 'completion': TALK[1:]}, {'prompt': 'W?', 'completion': TALK}, {'prompt': TALK[:1], 'completion': TALK}])
def test_every_form_of_a_conversation_is_read_alike(row):
    """Tool replies and questions inside an answer are never trained; an answer that repeats its prompt loses it."""
    tok = tooled()
    assert said(tok, row)[0] == CALLED + '<think>\n\n</think>\n\nHot.<|im_end|>'
    (ids, mask), (whole, marks) = encode_row(row, tok), encode_row({'messages': TALK}, tok)
    assert (ids, mask) == (whole[:len(ids)], marks[:len(ids)]) and whole[len(ids):] in ([], [10])  # but the last line's end
    ids, _ = encode_row({'messages': TALK}, tok)
    other = [*TALK[:-1], *chat('a:Cold.')]
    for pair in ({'chosen': TALK, 'rejected': other}, {'prompt': TALK[:3], 'chosen': TALK, 'rejected': other}, {'prompt': TALK[:3], 'chosen': 'Hot.', 'rejected': 'Cold.'}):
        prompt, chosen, rejected = encode_pair(pair, tok)
        assert prompt + chosen == ids[:-1] and prompt == encode_prompt({'prompt': TALK[:3]}, tok) and rejected[-6:] == [*b'Cold.', 258]  # but the last line's end
    assert encode_labelled({'messages': TALK, 'label': True}, tok) == (prompt, chosen) == encode_labelled({'prompt': TALK[:3], 'completion': 'Hot.', 'label': 1}, tok)


def test_prompts_with_tools_arguments_and_begun_turns():
    tok = tooled("{% if tools %}{{ tools | tojson }}{% endif %}" + TOOLED)
    row = {'prompt': chat('u:W?'), 'tools': json.dumps(TOOLS), 'chat_template_kwargs': '{"enable_thinking": false}'}
    assert tok.decode(encode_prompt(row, tok)) == tok.render(row['prompt'], True, tools=TOOLS, enable_thinking=False) and 'get_weather' in tok.decode(encode_prompt(row, tok))
    assert tok.decode(encode_prompt({'prompt': chat('u:2+2?', 'a:Let me think. ')}, tok)).endswith('</think>\n\nLet me think. ')  # to its last blank
    trim = tooled(TOOLED.replace("m.content or ''", "(m.content or '') | trim"))
    assert trim.decode(encode_prompt({'prompt': chat('u:2+2?', 'a: Let me think. ')}, trim)).endswith('</think>\n\nLet me think.')
    ids, mask = encode_row({'prompt': chat('u:2+2?', 'a:Let me'), 'completion': chat('a: think')}, tok)
    assert [*ids, 10] == encode_row({'messages': chat('u:2+2?', 'a:Let me think')}, tok)[0] and tok.decode([i for i, on in zip(ids, mask) if on]) == ' think<|im_end|>'
    for bad in (None, [], 5, [1], [{'content': 'x'}]):
        with pytest.raises(ValueError, match='the prompt is'):
            encode_prompt({'prompt': bad}, tok)


def test_mask_begins_behind_the_header_whatever_the_prompt_opens():
    """The generation prompt holds a thought that the turn lacks: the model has to write the template's words before the call, too."""
    assert said(tooled(), {'messages': TALK, 'chat_template_kwargs': {'enable_thinking': False}})[0] == CALLED + 'Hot.<|im_end|>'
    always = tooled(TOOLED.replace("{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}", "{{ '<think>\n' }}"))
    assert said(always, {'messages': TALK})[0] == CALLED + '\n</think>\n\nHot.<|im_end|>'
    with pytest.raises(ValueError, match='add_generation_prompt'):
        tooled(CHATML.replace('add_generation_prompt', 'false')).apply_chat_template(chat('u:a', 'a:b'), return_mask=True)


@pytest.mark.parametrize('message, key', [(dict(content='4', reasoning_content='add'), 'reasoning_content'), (dict(content='', tool_calls=ROME), 'tool_calls'), (dict(content='LOUD'), 'content')])
def test_what_a_template_drops_is_named(message, key):
    tok = tooled(CHATML.replace("m['content']", "m['content'] | lower"))
    with pytest.raises(ValueError, match=f'message 1: .*{key}'):
        encode_row({'messages': [*chat('u:a'), {'role': 'assistant', **message}]}, tok)


def test_text_parts_are_joined():
    tok, parts = tooled(CHATML), lambda *texts: [{'type': 'text', 'text': text} for text in texts]
    assert tok.render([{'role': 'user', 'content': parts('yo', 'ho')}]) == tok.render(chat('u:yo\nho'))
    assert said(tok, {'messages': [*chat('u:a'), {'role': 'assistant', 'content': parts('b')}]})[0] == 'b<|im_end|>'
    lists = tooled(CHATML.replace("m['content']", "(m.content if m.content is string else m.content | map(attribute='text') | join)"))
    assert lists.render([{'role': 'user', 'content': parts('yo', 'ho')}]) == lists.render(chat('u:yoho'))  # as the template has it
    with pytest.raises(ValueError, match='content part'):
        tok.render([{'role': 'user', 'content': [{'type': 'image', 'image': 'x.png'}]}])


def test_prompt_and_answer_are_one_text(tmp_path):
    tok = library_kind(tmp_path, 'unigram')
    ids, mask = encode_row({'prompt': 'hello', 'completion': 'there'}, tok)
    assert ids[:-1] == tok.prefix + tok.encode('hellothere') and mask[-2:] == [True, True] and ids[-1] == tok.eot
    assert encode_pair({'prompt': 'hello', 'chosen': 'there', 'rejected': 'hello'}, tok)[0] + encode_pair({'prompt': 'hello', 'chosen': 'there', 'rejected': 'hello'}, tok)[1] == ids


def test_pairs_of_many_layouts():
    tok = tooled(CHATML.replace("m['content']", "m['content'] | trim"))
    with pytest.raises(ValueError, match='equal once rendered'):
        encode_pair({'prompt': chat('u:ok?'), 'chosen': chat('a:yes'), 'rejected': chat('a:yes\n')}, tok)
    want = encode_pair({'prompt': chat('u:Sky?'), 'chosen': 'Blue.', 'rejected': 'Red.'}, tok)
    assert encode_pair({'prompt': 'Sky?', 'chosen': chat('u:Sky?', 'a:Blue.'), 'rejected': chat('u:Sky?', 'a:Red.')}, tok) == want  # ultrafeedback_binarized
    history = chat('u:Hi', 'a:Hello', 'u:Sky?')
    _, chosen, _ = encode_pair({'prompt': history, 'chosen': history + chat('a:Blue.'), 'rejected': history + chat('a:Red.')}, tok)
    assert tok.decode(chosen) == 'Blue.<|im_end|>'
    prompt, _, rejected = encode_pair({'instruction': 'Add.', 'input': '', 'output': 'Five.', 'chosen': 'Five.', 'rejected': 'No.'}, tok)
    assert tok.decode(prompt).endswith('### Instruction:\nAdd.\n\n### Response:') and tok.decode(rejected) == 'No.<|im_end|>'
    with pytest.raises(ValueError, match='does not begin with "prompt"'):
        encode_pair({'prompt': 'Sky?', 'chosen': chat('u:Sea?', 'a:Blue.'), 'rejected': chat('u:Sea?', 'a:Red.')}, tok)


def test_end_tokens_and_added_tokens(tmp_path):
    tok = tooled(eos='<|endoftext|>')
    assert tok.eot == 256 and tok.stop_ids == [256, 258] and tooled().stop_ids == [258] and get_tokenizer('byte').stop_ids == [256]
    text = '<|im_start|>user\nhi<|im_end|><think>x</think>'
    assert tok.decode(tok.encode(text, allow_special=True)) == text and tok.decode([300]) == ''
    tok.save(tmp_path)
    (tmp_path / 'generation_config.json').write_text('{"eos_token_id": [256, 257]}')
    assert get_tokenizer(str(tmp_path)).stop_ids == [256, 257, 258]


def test_masks_take_time_in_proportion():
    """Renders are counted, not seconds: as many for 40 exchanges as for 4."""
    tok, counts = tooled(), []
    for n in (4, 40):
        calls, text = [], tokenizer.Chat.text
        with pytest.MonkeyPatch.context() as mp:
            mp.setattr(tokenizer.Chat, 'text', lambda self, *args, **kw: calls.append(1) or text(self, *args, **kw))
            assert said(tok, {'messages': chat('u:q', 'a:r') * n})[0].count('r<|im_end|>') == n
        counts.append(len(calls))
    assert counts[0] == counts[1] <= 6


def read_sft(row, tok, T):
    ids, on = map(np.asarray, encode_row(row, tok))
    return ([], 'rows dropped') if len(ids) > T else ([(ids, on), (ids[::-1], ~on)], '')


def read_kto(row, tok):
    return [(*encode_row(row, tok), True, 0.5)], 'all of them'


def as_lists(items):
    return [tuple(part.tolist() if hasattr(part, 'tolist') else part for part in item) for item in items]


def test_encoded_rows_are_written_once(tmp_path, monkeypatch, capsys):
    """The second start opens the file; another byte of the data, template, reading or argument makes another
    one; the items of a shuffled part are what they are without a file."""
    tok, path = tooled(), tmp_path / 'x.jsonl'
    rows = [{'messages': chat(f'u:q{i}', f'a:{"é" * i}r')} for i in range(40)]
    path.write_text('\n'.join(map(json.dumps, rows)))
    parts = dataset.load_dataset(path).train_test_split(0.05, 1)
    want = {name: as_lists(run.encode_all(part, read_sft, name, (tok, 99))) for name, part in parts.items()}
    assert len(list(tmp_path.iterdir())) == 1 and ' rows dropped' in capsys.readouterr().out  # small: no file
    found = [item for row in parts['train'] for item in read_sft(row, tok, 99)[0]]
    assert want['train'] == as_lists(found)
    monkeypatch.setattr(dataset, 'CACHED_FROM', 1)
    for start in range(2):
        for name, part in parts.items():
            items = run.encode_all(part, read_sft, name, (tok, 99))
            assert as_lists(items) == want[name] and as_lists(items[1:3]) == want[name][1:3]
            assert items[0][0].dtype == np.int64 and items[-1][1].dtype == bool
        assert len(list(tmp_path.iterdir())) == 2 and ' rows dropped' in capsys.readouterr().out
        monkeypatch.setattr(tokenizer.Chat, 'text', None)  # nothing is rendered again
    monkeypatch.undo()
    monkeypatch.setattr(dataset, 'CACHED_FROM', 1)
    ds, other = dataset.load_dataset(path), tooled('{# another #}' + TOOLED)
    for n, (read, *args) in enumerate([(read_sft, tok, 98), (read_kto, tok), (read_kto, other)]):
        items = run.encode_all(ds, read, 'x', tuple(args))
        assert len(list(tmp_path.iterdir())) == n + 3
    assert items[3] == (*encode_row(rows[3], tok), True, 0.5)
    assert [type(part) for part in items[3]] == [list, list, bool, float]
    path.write_text(path.read_text().replace('q3', 'q4'))
    ds = dataset.load_dataset(path)
    run.encode_all(ds.select(range(9)), read_kto, 'x', (tok,))  # a few rows of many: in memory
    denied = PermissionError(13, 'Permission denied')
    monkeypatch.setattr(dataset, 'replaced', lambda path: (_ for _ in ()).throw(denied))
    assert len(run.encode_all(ds, read_kto, 'x', (tok,))) == 40 and len(list(tmp_path.iterdir())) == 5
    assert 'stay in memory' in capsys.readouterr().out


@pytest.mark.parametrize('cached_from', [1, 1000])
def test_a_bad_row_is_named_by_its_place_in_the_file(tmp_path, monkeypatch, cached_from):
    monkeypatch.setattr(dataset, 'CACHED_FROM', cached_from)
    rows = [{'prompt': f'a{i}:', 'completion': None if i == 56 else 'b'} for i in range(100)]
    for name, part in (('one', rows[:60]), ('two', rows[60:])):
        (tmp_path / f'{name}.jsonl').write_text('\n'.join(map(json.dumps, part)))
    train = dataset.load_dataset([tmp_path / 'two.jsonl', tmp_path / 'one.jsonl']).train_test_split(0.05, 1)['train']
    for args in ((tooled(),), None):
        with pytest.raises(ValueError, match='one.jsonl, row 57: '):
            run.encode_all(train, (lambda row: read_kto(row, tooled())) if args is None else read_kto, 'x', args)
    assert sorted(f.name for f in tmp_path.iterdir()) == ['one.jsonl', 'two.jsonl']
