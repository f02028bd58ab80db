"""Tokenizers, chat templates, and THE reading of a row: its ids, and which of them are trained."""
import datetime, functools, hashlib, itertools, json, math, os, re, tempfile, threading, time
import unicodedata

import jinja2  # torch brings it
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

import files
from dataset import _write_json


GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_FILES = {'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',  # SHA-256; at OpenAI's address
              'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783'}
EOT = '<|endoftext|>'
BYTE_TEMPLATE = ("{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\\n' }}{% elif m.role == 'user' %}{{ 'Q: ' + m.content + '\\nA: ' }}"
                 "{% elif m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
                 "{% else %}{{ raise_exception('this template knows the roles system, user, assistant') }}{% endif %}{% endfor %}")
# GPT-2's printable stand-ins for bytes: printable Latin-1 as itself, the other 68 bytes from U+0100 on. ' ' -> 'Ġ'
_printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_CHARS = {b: chr(b) for b in _printable} | {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in _printable)}
CHAR_BYTES = {c: b for b, c in BYTE_CHARS.items()}


class Tokenizer:
    """Text to ids and back; get_tokenizer makes them. spec is what stands in tokenizer.json, config what stands in
    tokenizer_config.json, whatever file or code it came from, so `save` writes files that transformers opens too.
    eot, bos, pad: ids or None (pad only where it is a token of its own, never eot); prefix: the ids that the tokenizer puts
    before a text (Llama's <s>); added {text: id} holds every added token, special those that control (<|im_end|>, not <think>)."""

    def __init__(self, spec, config, name):
        self.spec, self.name = spec, name
        rows = spec.get('added_tokens') or []
        self.added = {t['content']: t['id'] for t in rows}
        self.special = {t['content'] for t in rows if t.get('special')}
        self._all = _any_of(self.added)
        self._plain_added = _any_of(set(self.added) - self.special)  # <think>, <tool_call>: the model writes them, text may hold them
        vocab = {**{t: i for t, i in spec['model']['vocab'].items()}, **self.added} if isinstance(spec['model'].get('vocab'), dict) else self.added
        self.vocab_size = max(len(spec['model'].get('vocab') or ()), 1 + max(vocab.values(), default=-1))
        text = {k: v['content'] if isinstance(v, dict) else v for k, v in config.items() if k.endswith('_token')}
        self.token_texts = {k: v for k, v in text.items() if isinstance(v, str)}  # what a template knows: bos_token, eos_token ...
        self.config = {**config, **self.token_texts}
        self.eot, self.bos, pad = (vocab.get(self.token_texts.get(k)) for k in ('eos_token', 'bos_token', 'pad_token'))
        self.pad = None if pad == self.eot else pad
        steps = spec.get('post_processor') or {}
        first = next((s['single'][0] for s in steps.get('processors', [steps]) if s.get('type') == 'TemplateProcessing' and s['single']), {})
        self.prefix = [vocab[first['SpecialToken']['id']]] if 'SpecialToken' in first else []
        template = config.get('chat_template')
        self.templates = {t['name']: t['template'] for t in template} if isinstance(template, list) else {'default': template} if template else {}

    # a kind of tokenizer has _plain(str) -> [int] for text without added tokens, _bytes(id) -> bytes, and _norm(str) -> str
    def _norm(self, text):
        return text

    def _pieces(self, text, allow_special):
        """[(added token's id or None, text)]"""
        if not isinstance(text, str):
            raise ValueError(f'text to encode is {type(text).__name__}, expected str')
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ValueError(f'lone surrogate {text[e.start]!a} at character {e.start} is no Unicode text: repair the data, '
                             'e.g. text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")') from None
        for n, piece in enumerate((self._all if allow_special else self._plain_added).split(text)):
            if piece:
                yield self.added[piece] if n % 2 else None, piece

    def encode(self, text, allow_special=False):
        """str -> [int], no token put around it. A control token written in the text (<|im_end|>) is plain text unless
        allow_special. ValueError on a lone surrogate and on a character outside a char tokenizer. 'byte': 'hi' -> [104, 105]."""
        return [i for token, piece in self._pieces(text, allow_special) for i in ([token] if token is not None else self._plain(self._norm(piece)))]

    def decode(self, ids):
        """[int] -> str. Bytes that are no UTF-8 (half an emoji) become U+FFFD; an id above the vocabulary (the padding rows of a
        model's embedding) is nothing, as in HF; one below 0 is a ValueError."""
        ids = list(ids)
        if ids and min(ids) < 0:
            raise ValueError(f'token id {min(ids)}: ids start at 0 (an ignored target?)')
        return self._decode(ids)

    def _decode(self, ids):
        return b''.join(map(self._bytes, ids)).decode(errors='replace')

    def _encode_marked(self, text, wrote):
        """ids of a rendered chat and, per id, whether it holds a character with wrote[i] True."""
        ids, mask, at = [], [], 0
        for token, piece in self._pieces(text, True):
            flags, at = wrote[at:at + len(piece)], at + len(piece)
            if token is not None:
                ids.append(token)
                mask.append(bool(flags.any()))
                continue
            norm = self._norm(piece)
            if norm != piece:  # borders move with the text: a border at p stands at len(norm(piece[:p])) afterwards
                edges = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1), len(piece)]
                moved = [len(self._norm(piece[:e])) for e in edges[:-1]] + [len(norm)]
                flags = np.repeat(flags[edges[:-1]], np.maximum(np.diff(moved), 0))[:len(norm)]
            got = self._plain(norm)
            data = np.frombuffer(norm.encode(), np.uint8)
            seen = np.concatenate([[0], np.cumsum(flags[np.cumsum((data & 0xC0) != 0x80) - 1])])  # wrote, per byte, summed
            ends = np.cumsum([0] + [len(self._bytes(i)) for i in got])
            ids += got
            mask += (seen[ends[1:]] > seen[ends[:-1]]).tolist()
        return ids, mask

    def render(self, messages, add_generation_prompt=False, **template_args):
        """The chat as the text that the template makes of it, as transformers' apply_chat_template(tokenize=False)."""
        return _Chat(self, messages, template_args).text(add_generation_prompt)

    def apply_chat_template(self, messages, add_generation_prompt=False, return_mask=False, **template_args):
        """[{"role", "content"}] (+ tools=, enable_thinking= ...) -> [int] as transformers', or ([int], [bool] True = written by the
        assistant, from the end of its generation prompt to its end token) with return_mask. ValueError where the template refuses.
        'byte': [{user 'hi'}, {assistant 'yo'}] -> 'Q: hi\\nA: yo<|endoftext|>', True on the last three."""
        chat = _Chat(self, messages, template_args)
        if not return_mask:
            return self.encode(chat.text(add_generation_prompt), allow_special=True)
        text, spans = chat.spans(gen=add_generation_prompt)
        wrote = np.zeros(len(text), bool)
        for a, b in spans:
            wrote[a:b] = True
        return self._encode_marked(text, wrote)

    def save(self, folder):
        """tokenizer.json and tokenizer_config.json: get_tokenizer(folder) reads them back, so do transformers and vLLM."""
        os.makedirs(folder, exist_ok=True)
        _write_json(os.path.join(folder, 'tokenizer.json'), self.spec, None)
        _write_json(os.path.join(folder, 'tokenizer_config.json'), self.config)


def _any_of(texts):
    """Pattern that splits at the longest of the texts, and keeps it."""
    return re.compile('(' + '|'.join(map(re.escape, sorted(texts, key=len, reverse=True))) + ')' if texts else '((?!))')


class ByteTokenizer(Tokenizer):
    """The 256 bytes and <|endoftext|>: no training, no file, every text."""

    def _plain(self, text):
        return list(text.encode())

    def _bytes(self, i):
        return bytes([i]) if i < 256 else EOT.encode() if i == 256 else b''


class CharTokenizer(Tokenizer):
    """One id a character, as nanoGPT's shakespeare_char."""

    def __init__(self, *args):
        super().__init__(*args)
        self._ids = self.spec['model']['vocab']
        self._unk = self._ids.get(self.spec['model'].get('unk_token'))
        self._chars = {i: c.encode() for c, i in {**self._ids, **self.added}.items()}

    def _plain(self, text):
        ids = [self._ids.get(c, self._unk) for c in text]
        if None in ids:
            raise ValueError(f'character {text[ids.index(None)]!r} is not among the {self.vocab_size} that this char tokenizer knows')
        return ids

    def _bytes(self, i):
        return self._chars.get(i, b'')


class BpeTokenizer(Tokenizer):
    """Byte-level BPE in tiktoken (Rust). tiktoken merges by id where HF merges by the order of its list, and merges any pair that makes a
    token; the two agree where ids rise along the list and each token is what its own text encodes to, as BPE training leaves it."""

    def __init__(self, spec, config, name, pattern):
        import tiktoken
        super().__init__(spec, config, name)
        ranks = {bytes(map(CHAR_BYTES.__getitem__, t)): i for t, i in spec['model']['vocab'].items() if t not in self.added}
        self._bpe = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.added)
        self._nfc = (spec.get('normalizer') or {}).get('type') == 'NFC'

    def _norm(self, text):
        return unicodedata.normalize('NFC', text) if self._nfc else text

    def _plain(self, text):
        if len(text) > 50000 and re.search(r'\s{50000}', text):
            raise ValueError('a run of more than 50,000 blanks: the pattern matcher of tiktoken gives up on it; shorten it')
        return self._bpe.encode_ordinary(text)

    def _bytes(self, i):
        try:
            return self._bpe.decode_single_token_bytes(i)
        except KeyError:
            return b''

    def _decode(self, ids):
        try:
            return self._bpe.decode_bytes(ids).decode(errors='replace')
        except KeyError:  # an id above the vocabulary among them
            return super()._decode(ids)


class LibraryTokenizer(Tokenizer):
    """Any other kind (SentencePiece style, Unigram, WordPiece, several splits): read by the `tokenizers` library."""

    def __init__(self, spec, config, name):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f'{name}: a {spec["model"].get("type")} tokenizer that is no byte-level BPE is read by the tokenizers library: '
                             'pip install tokenizers') from None
        super().__init__(spec, config, name)
        try:
            self._lib = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f'{name}: tokenizer.json is not readable: {e}') from None
        self.vocab_size = self._lib.get_vocab_size()

    def _run(self, text, allow_special):
        list(self._pieces(text, allow_special))  # only its checks: the library splits by itself, flags and all
        self._lib.encode_special_tokens = not allow_special
        return self._lib.encode(text, add_special_tokens=False)

    def encode(self, text, allow_special=False):
        ids = self._run(text, allow_special).ids
        if not allow_special and not {self.added[t] for t in self.special}.isdisjoint(ids):  # a Unigram finds </s> as a piece all the same:
            parts = re.sub('|'.join(map(re.escape, self.special)), lambda m: m[0][:1] + '\0' + m[0][1:], text).split('\0')  # cut it in two, for safety
            return [i for part in parts for i in self._run(part, False).ids]
        return ids

    def _decode(self, ids):
        return self._lib.decode(ids, skip_special_tokens=False)

    def _encode_marked(self, text, wrote):
        got = self._run(text, True)
        return got.ids, [bool(wrote[a:b].any()) for a, b in got.offsets]


def get_tokenizer(name):
    """'byte'; 'char:<meta.json of prepare.py, or a string's file>'; 'gpt2' (from tiktoken's cache or download); a directory with
    tokenizer.json, vocab.json + merges.txt or encoder.json + vocab.bpe; a name of the hub, of which the tokenizer's files are fetched."""
    if name == 'byte':
        vocab = {c: b for b, c in sorted(BYTE_CHARS.items())}
        config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': EOT, 'clean_up_tokenization_spaces': False, 'chat_template': BYTE_TEMPLATE}
        return _from_spec(_bpe_spec(vocab, [], {EOT: 256}, None), config, name)
    if name.startswith('char:'):
        chars = _json(name[5:]).get('chars')
        if not chars or len(set(chars)) != len(chars):
            raise ValueError(f'{name[5:]}: expected {{"chars": "..."}} with distinct characters, as data/shakespeare_char/prepare.py writes it')
        spec = {'version': '1.0', 'truncation': None, 'padding': None, 'added_tokens': [], 'normalizer': None, 'post_processor': None,
                'pre_tokenizer': {'type': 'Split', 'pattern': {'Regex': r'[\s\S]'}, 'behavior': 'Isolated', 'invert': False}, 'decoder': {'type': 'Fuse'},
                'model': {'type': 'WordLevel', 'vocab': {c: i for i, c in enumerate(chars)}, 'unk_token': '<unk>'}}
        return _from_spec(spec, {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}, name)
    if os.path.isdir(name):
        return _from_dir(name)
    tried = ''
    if re.fullmatch(r'(openai-community/)?gpt2(-medium|-large|-xl)?', name):
        try:
            return _from_spec(*_gpt2(_tiktoken_file), 'gpt2')
        except OSError as error:  # then from the hub, or from what `hf download gpt2` has put into its cache
            tried = f'{error}; '
    try:
        folder = files.resolve(name, weights=False)
    except ValueError as error:
        raise ValueError(f"tokenizer {name!r}: expected 'byte', 'char:<meta.json>', 'gpt2', a directory with tokenizer.json or a name of the hub "
                         f'(HF cache): {tried}{error}') from None
    return _from_dir(folder)


def _json(path):
    try:
        with open(path, encoding='utf-8') as f:
            value = json.load(f)
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{path}: not JSON: {e}') from None
    if not isinstance(value, dict):
        raise ValueError(f'{path}: holds a {type(value).__name__}, expected an object')
    return value


def _from_dir(folder):
    has = lambda f: os.path.exists(os.path.join(folder, f))
    read = lambda f: _json(os.path.join(folder, f)) if has(f) else {}
    config = {**read('special_tokens_map.json'), **read('tokenizer_config.json')}
    kind = config.get('tokenizer_class') or {'gpt2': 'GPT2Tokenizer'}.get(read('config.json').get('model_type'), '')
    if kind.startswith('GPT2') and EOT in {t['content'] for t in read('tokenizer.json').get('added_tokens', [])}:
        config = {'tokenizer_class': kind, 'eos_token': EOT, 'bos_token': EOT, **config}  # the class knows them, gpt2's own files do not say it
    if has('chat_template.jinja'):
        with open(os.path.join(folder, 'chat_template.jinja'), encoding='utf-8') as f:
            config['chat_template'] = f.read()
    if has('tokenizer.json'):
        return _from_spec(read('tokenizer.json'), config, folder)
    if has('encoder.json') and has('vocab.bpe'):
        return _from_spec(*_gpt2(lambda f: open(os.path.join(folder, f), 'rb').read()), folder)
    if has('vocab.json') and has('merges.txt'):
        with open(os.path.join(folder, 'merges.txt'), encoding='utf-8') as f:
            merges = _merges(f.read())
        vocab, kind = read('vocab.json'), config.get('tokenizer_class', 'GPT2Tokenizer').removesuffix('Fast')
        if kind not in ('GPT2Tokenizer', 'Qwen2Tokenizer'):
            raise ValueError(f'{folder}: tokenizer_class {kind} with vocab.json and merges.txt is not known here: save it as tokenizer.json')
        rows = {t['content']: int(i) for i, t in config.get('added_tokens_decoder', {}).items()} or {**read('added_tokens.json')}
        if kind == 'GPT2Tokenizer':
            config = {'eos_token': EOT, 'bos_token': EOT, **config}
            rows = rows or {EOT: vocab[EOT]} if EOT in vocab else rows
        plain = [t['content'] for t in config.get('added_tokens_decoder', {}).values() if not t.get('special')]
        return _from_spec(_bpe_spec(vocab, merges, rows, None if kind == 'GPT2Tokenizer' else QWEN_PATTERN, plain), config, folder)
    raise ValueError(f'{folder}: no tokenizer in it: expected tokenizer.json, vocab.json + merges.txt or encoder.json + vocab.bpe')


def _merges(text):
    return [line.split(' ') for line in text.split('\n') if line and not line.startswith('#version')]


def _gpt2(read):
    """(spec, config) of GPT-2's two files."""
    vocab = json.loads(read('encoder.json'))
    config = {'tokenizer_class': 'GPT2Tokenizer', 'eos_token': EOT, 'bos_token': EOT, 'unk_token': EOT, 'model_max_length': 1024, 'add_prefix_space': False,
              'clean_up_tokenization_spaces': False}
    return _bpe_spec(vocab, _merges(read('vocab.bpe').decode()), {EOT: vocab[EOT]}, None), config


def _tiktoken_file(file):
    """One of GPT-2's files through tiktoken: its cache, else its download."""
    import requests
    from tiktoken.load import read_file_cached
    url = f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{file}'
    cache = os.environ.get('TIKTOKEN_CACHE_DIR') or os.environ.get('DATA_GYM_CACHE_DIR') or os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    try:
        if files.offline() and not os.path.exists(os.path.join(cache, hashlib.sha1(url.encode()).hexdigest())):
            raise OSError('HF_HUB_OFFLINE is set')
        return read_file_cached(url, GPT2_FILES[file])
    except (requests.RequestException, OSError) as e:
        raise OSError(f"{file} is not in tiktoken's cache ({cache}, TIKTOKEN_CACHE_DIR) and did not come from its host ({type(e).__name__})") from None


def _bpe_spec(vocab, merges, added, pattern, plain=()):
    """tokenizer.json of a byte-level BPE; pattern None: GPT-2's, else Qwen's with its NFC. Byte tokenizers have no merges and no pattern."""
    level = {'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': False, 'use_regex': pattern is None and bool(merges)}
    split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
    flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
    return {'version': '1.0', 'truncation': None, 'padding': None,
            'added_tokens': [{'id': i, 'content': t, **flags, 'special': t not in plain} for t, i in sorted(added.items(), key=lambda kv: kv[1])],
            'normalizer': {'type': 'NFC'} if pattern else None, 'post_processor': None, 'decoder': level,
            'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [split, level]} if pattern else level,
            'model': {'type': 'BPE', 'dropout': None, 'unk_token': None, 'continuing_subword_prefix': '', 'end_of_word_suffix': '', 'fuse_unk': False,
                      'byte_fallback': False, 'vocab': vocab, 'merges': merges}}


def _from_spec(spec, config, name):
    try:
        return _kind_of(spec, config, name)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f'{name}: tokenizer.json is not what it should be: {type(e).__name__} {e}') from None


def _kind_of(spec, config, name):
    model, pre = spec['model'], spec.get('pre_tokenizer') or {}
    steps = pre.get('pretokenizers', [pre])
    split = steps[0].get('pattern', {}).get('Regex') if steps[0].get('type') == 'Split' and steps[0].get('behavior') == 'Isolated' and not steps[0].get('invert') else None
    fancy = any(t.get('lstrip') or t.get('rstrip') or t.get('single_word') for t in spec.get('added_tokens') or [])
    normal = (spec.get('normalizer') or {}).get('type')
    if model['type'] == 'WordLevel' and split == r'[\s\S]' and not normal and not fancy:
        return CharTokenizer(spec, config, name)
    level = steps[-1].get('type') == 'ByteLevel' and not steps[-1].get('add_prefix_space') and (spec.get('decoder') or {}).get('type') == 'ByteLevel'
    if model['type'] == 'BPE' and level and not fancy and normal in (None, 'NFC') and not model.get('byte_fallback') and not model.get('dropout'):
        byte_level, regex = steps[-1].get('use_regex', True), None
        if len(steps) == 1:
            regex = GPT2_PATTERN if byte_level else r'[\s\S]+'
        elif len(steps) == 2 and split and not byte_level:
            regex = split
        added = {t['content'] for t in spec.get('added_tokens') or []}
        if not model['merges'] and {t: i for t, i in model['vocab'].items() if t not in added} == CHAR_BYTES and regex:
            return ByteTokenizer(spec, config, name)
        if regex and _rises(model, added):
            return BpeTokenizer(spec, config, name, regex)
    return LibraryTokenizer(spec, config, name)


def _rises(model, added):
    """Do the ids rise along the list of merges, and is each token a byte or the result of a merge? Then tiktoken merges as HF does."""
    vocab, merges = model['vocab'], model['merges']
    made = [a + b for a, b in (m.split(' ') if isinstance(m, str) else m for m in merges)]
    ids = [vocab[t] for t in made]
    return (all(a <= b for a, b in zip(ids, ids[1:])) and all(c in vocab for c in CHAR_BYTES) and
            set(vocab) - added <= set(made) | set(CHAR_BYTES) and (not ids or ids[0] > max(vocab[c] for c in CHAR_BYTES)))



# ---- chat templates: HF's Jinja2 sandbox, metered; and which characters the assistant wrote ----
# A template comes with a checkpoint from anywhere, so it is hostile code. The immutable sandbox keeps it from Python's internals. Besides,
# what it loops over, compares, joins, slices or prints is paid for by length (a loop: by length x nodes in its body) out of one budget a render,
# and what could multiply its arguments pays before it runs. What is left unmetered is linear in what was paid: a render ends in seconds.
BUDGET, SECONDS, MAX_TEMPLATE = 50_000_000, 3, 200_000
GROWS = {'replace', 'join', 'indent', 'center', 'wordwrap', 'format', 'format_map', 'batch', 'slice', 'ljust', 'rjust', 'zfill', 'expandtabs', 'urlize', 'round', 'sum'}
BEGIN, END = '\ufdd0', '\ufdd1'  # around a {% generation %} block while its place is wanted: two of Unicode's noncharacters
METER = '$meter'  # a filter by that name cannot be written in a template


def _written(value):
    """Length of a value written out, each part as often as it would be printed: a list of two lists of two lists ... is small in memory."""
    known = {}

    def size(x):
        if not isinstance(x, (list, tuple, dict)):
            return len(x) if isinstance(x, str) else 1
        if id(x) not in known:
            known[id(x)] = BUDGET  # one that holds itself
            known[id(x)] = 1 + sum(map(size, x)) + (sum(map(size, x.values())) if isinstance(x, dict) else 0)
        return known[id(x)]
    return size(value)


class _Sandbox(ImmutableSandboxedEnvironment):
    """HF's sandbox with a meter in it."""
    intercepted_binops = frozenset(['+', '*', '**', '%'])
    spent, steps, until, want = 0, 0, 0.0, False

    def metered(self, value, cost=1):
        """value, paid for: by its length, or (cost 1) by what it is when written out. A lazy filter's result becomes a list."""
        if hasattr(value, '__next__'):
            value = list(itertools.islice(value, BUDGET))
        self.spend(1 + _written(value) if cost == 1 else cost * (1 + (len(value) if hasattr(value, '__len__') else 0)))
        return value

    def spend(self, cost):
        self.spent, self.steps = self.spent + cost, self.steps + 1
        if self.spent > BUDGET or ((cost > 10000 or self.steps % 64 == 0) and time.thread_time() > self.until):
            raise SecurityError('it computes more than a chat template may: a loop or a text that grows without end?')

    def product(self, name, *values):
        if name in ('format', 'format_map', '%') and any(isinstance(v, str) and re.search(r'[%{:][^a-z}]*(\d{5}|\*)', v) for v in values[:1]):
            raise SecurityError('a field width of more than four digits')
        self.spend(math.prod(max(1, min(abs(v), BUDGET) if type(v) is int else _written(v)) for v in values))

    def call_binop(self, context, operator, left, right):
        if operator in '%**' and (isinstance(left, (str, list)) or isinstance(right, (str, list))):
            self.product(operator, left, right)
        if operator == '**' and type(left) is int and type(right) is int and left.bit_length() * abs(right) > 4096:
            raise SecurityError('a power of that size')
        return self.metered(super().call_binop(context, operator, left, right), 2)

    def call(self, context, obj, *args, **kwargs):
        owner = getattr(getattr(obj, '__wrapped__', obj), '__self__', None)
        if getattr(obj, '__name__', '') in GROWS:
            self.product(obj.__name__, owner, *args, *kwargs.values())
        self.metered(owner if isinstance(owner, (str, list, dict)) else None, 2)
        return self.metered(super().call(context, obj, *args, **kwargs), 2)

    def _parse(self, *args):
        tree = super()._parse(*args)
        pay = lambda n, cost=1: nodes.Filter(n, METER, [nodes.Const(cost)], [], None, None, lineno=n.lineno)
        for n in list(tree.find_all((nodes.For, nodes.Output, nodes.Concat, nodes.Compare, nodes.Operand, nodes.Filter, nodes.Test, nodes.Getitem))):
            if isinstance(n, nodes.For):
                n.iter = pay(n.iter, 2 + sum(1 for b in n.body for _ in b.find_all(nodes.Node)))
            elif isinstance(n, (nodes.Output, nodes.Concat)):
                n.nodes = [c if isinstance(c, nodes.TemplateData) else pay(c) for c in n.nodes]
            elif isinstance(n, (nodes.Compare, nodes.Operand)):
                n.expr = pay(n.expr)
            elif isinstance(n, nodes.Getitem):
                n.node = pay(n.node, 2) if isinstance(n.arg, nodes.Slice) else n.node
            elif n.node is not None and n.name not in ('defined', 'undefined', 'none', 'string', 'mapping', 'iterable'):
                n.node = pay(n.node, 2 if n.name in ('length', 'count', 'first', 'last', 'default', 'd') else 1)
        return tree


class _Generation(Extension):
    tags = {'generation'}

    def parse(self, parser):
        line = next(parser.stream).lineno
        return nodes.CallBlock(self.call_method('wrap'), [], [], parser.parse_statements(['name:endgeneration'], drop_needle=True)).set_lineno(line)

    def wrap(self, caller):
        return BEGIN + caller() + END if self.environment.want else caller()


class _Namespace(jinja2.utils.Namespace):  # as in transformers: a name with an underscore would lead to Python's internals
    def __init__(*args, **kwargs):
        jinja2.utils.Namespace.__init__(args[0])
        for key, value in dict(*args[1:], **kwargs).items():
            args[0][key] = value

    def __setitem__(self, key, value):
        if str(key).startswith('_'):
            raise SecurityError(f'namespace attribute {key!r}')
        super().__setitem__(key, value)


def _raise_exception(message):
    raise jinja2.TemplateError(message)


def _tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=min(indent, 16) if isinstance(indent, int) else None, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=32)
def _template(source, thread):
    """(template, words that it contains, has it generation blocks), compiled once a thread: the budget lives in the environment."""
    if tuple(int(x) for x in re.findall(r'\d+', jinja2.__version__)[:3]) < (3, 1, 6):
        raise ValueError(f'jinja2 {jinja2.__version__} has known holes in its sandbox: pip install -U "jinja2>=3.1.6"')
    if len(source) > MAX_TEMPLATE:
        raise ValueError(f'{len(source):,} characters, at most {MAX_TEMPLATE:,}')

    def guarded(name, f):
        @functools.wraps(f)  # keeps the marks of filters that want the context
        def run(*args, **kwargs):
            values = [v for v in args if not isinstance(v, (jinja2.Environment, nodes.EvalContext))]
            env.product(name, *values, *kwargs.values(), *(values[:1] if name == 'sum' else ()))  # a sum of lists copies as it goes
            return env.metered(f(*args, **kwargs), 2)
        return run

    env = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, 'jinja2.ext.loopcontrols'])
    env.until = time.thread_time() + SECONDS  # constants are folded while it is compiled
    env.filters = {k: guarded(k, f) if k in GROWS else f for k, f in env.filters.items()} | {METER: env.metered, 'tojson': _tojson}
    env.globals.pop('lipsum')
    env.globals |= {'raise_exception': _raise_exception, 'strftime_now': lambda form: datetime.datetime.now().strftime(form), 'namespace': _Namespace,
                    'dict': lambda *args, **kwargs: dict(*args, **kwargs)}  # the class itself would be a way out
    words = {n.value for n in env.parse(source).find_all(nodes.Const) if isinstance(n.value, str) and n.value.strip()}
    return env.from_string(source), words, bool(re.search(r'{%[-+]?\s*generation\b', source))


def _mark(text, words, char):
    out = re.sub(r'[^\s"\\\x00-\x1f]', char, text)
    for w in words:
        at = text.find(w)
        while at >= 0:
            out, at = out[:at] + w + out[at + len(w):], text.find(w, at + 1)
    return out


class _Chat:
    """One conversation under one template: its text, and the place of each assistant turn in it."""

    def __init__(self, tok, messages, args):
        if not tok.templates:
            raise ValueError(f'tokenizer {tok.name!r} has no chat template: use rows whose prompt is a string, or set chat_template in its tokenizer_config.json')
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and isinstance(m.get('role'), str) for m in messages):
            raise ValueError(f'messages are a list of {{"role", "content"}}, not empty; got {str(messages)[:80]}')
        try:  # plain JSON values only: other objects bring methods that the sandbox does not know
            self.said = json.dumps(messages, ensure_ascii=False)
            self.messages, self.args = json.loads(self.said), {'tools': None, 'documents': None, **json.loads(json.dumps(args))}
        except (TypeError, ValueError, RecursionError) as e:
            raise ValueError(f'messages and template arguments are JSON values: {e}') from None
        for m in self.messages:
            thought = next((m[k] for k in ('reasoning_content', 'thinking', 'reasoning') if m.get(k) is not None), None)
            if thought is not None:  # its three names, as in transformers
                m.update(reasoning_content=thought, thinking=m.get('thinking', thought))
        source = tok.templates.get('tool_use' if self.args['tools'] and 'tool_use' in tok.templates else 'default')
        if source is None:
            raise ValueError(f'tokenizer {tok.name!r} has the chat templates {sorted(tok.templates)}, none named default')
        self.tok, self.errors = tok, (jinja2.TemplateError, RecursionError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, MemoryError)
        try:
            self.template, self.words, self.blocks = _template(source, threading.get_ident())
        except self.errors as e:
            raise ValueError(f'the chat template of {tok.name}: {e}') from None

    def text(self, gen=False, messages=None, want=False):
        env = self.template.environment
        env.spent, env.until, env.want = 0, time.thread_time() + SECONDS, want
        try:
            return self.template.render(messages=self.messages if messages is None else messages, add_generation_prompt=gen, **{**self.tok.token_texts, **self.args})
        except self.errors as e:
            raise ValueError(f'the chat template of {self.tok.name} refuses these messages: {type(e).__name__}: {e}') from None

    def attempt(self, messages, gen=False):
        try:
            return self.text(gen, messages)
        except ValueError:
            return None  # e.g. a template that wants no turn of the assistant at the end

    def spans(self, first=0, gen=False):
        """(text, [(start, end) of what the assistant wrote in it, turns of messages[first:]]). A template with {% generation %} blocks says
        so itself. Of any other: find each character's message (_origin), then each turn's start and end (_start, _end)."""
        if self.blocks:
            if BEGIN in self.said or END in self.said:
                raise ValueError(f'the messages hold the noncharacter {BEGIN!a} or {END!a}, with which generation blocks are found: take it out')
            head, at, out = len(self.attempt(self.messages[:first]) or '') if first else 0, 0, []
            parts = re.split(f'[{BEGIN}{END}]', self.text(gen, want=True))
            for n, part in enumerate(parts):
                out += [(at, at + len(part))] if n % 2 and at >= head else []
                at += len(part)
            return ''.join(parts), out
        text, turns = self.text(gen), [i for i, m in enumerate(self.messages) if m['role'] == 'assistant']
        where = self._origin(text, turns, gen)
        return text, [(self._start(text, where, i), self._end(text, where, i, gen)) for i in turns if i >= first and i in where]

    def _marked(self, text, gen, which, words, fields=None):
        """{message: positions of its characters in text}. In the messages `which` every character but blanks, quotes and the words that the
        template itself contains (it may look for '</think>') becomes one private character a message, and the chat is rendered again.
        Where the two texts agree in all the rest, a private character shows a place; where they do not, the template looked into the
        content, and there is no answer: a wrong one cannot pass."""
        def mark(value, key, char):
            if isinstance(value, str):
                return value if key in ('role', 'type') or fields and key not in fields else _mark(value, words, char)
            return [mark(v, key, char) for v in value] if isinstance(value, list) else {k: mark(v, k, char) for k, v in value.items()} if isinstance(value, dict) else value

        got = self.attempt([mark(m, '', chr(0x100000 + i)) if i in which else m for i, m in enumerate(self.messages)], gen)
        if got is None or len(got) != len(text):
            return {}
        x, y = (np.frombuffer(s.encode('utf-32-le', 'surrogatepass'), np.uint32).astype(np.int64) for s in (text, got))
        if not np.isin(y[x != y] - 0x100000, list(which)).all():
            return {}
        return {i: at for i in which if len(at := np.flatnonzero((x != y) & (y == 0x100000 + i)))}

    def _origin(self, text, turns, gen):
        where = self._marked(text, gen, range(len(self.messages)), self.words)
        for i, m in enumerate(self.messages):
            for words, fields in ((self.words, None), ((), None), (self.words, ('content', 'text')), ((), ('name', 'arguments'))):
                where |= {} if i in where else self._marked(text, gen, [i], words, fields)
            said = m['content'] if isinstance(m.get('content'), str) else ''
            if i in where:  # its first and last characters, where they were words of the template
                at, said, marked = where[i], said.strip(), _mark(said.strip(), self.words, BEGIN)
                head, tail = said[:marked.find(BEGIN)] if BEGIN in marked else '', said[marked.rfind(BEGIN) + 1:]
                more = head if text.endswith(head, 0, at[0]) and not text.startswith(said, at[0]) else ''
                rest = tail if text.startswith(tail, at[-1] + 1) and not text.endswith(said, 0, at[-1] + 1) else ''
                where[i] = np.arange(at[0] - len(more), at[-1] + 1 + len(rest)) if more or rest else at
            elif i in turns:  # blank, or quotes and such alone: the place of the prompt, else of an inserted character
                prompt, end = None if said.strip() else self.attempt(self.messages[:i], True), len(said.rstrip())
                got = self.attempt([*self.messages[:i], {**m, 'content': said[:end] + END + said[end:]}, *self.messages[i + 1:]], gen) or ''
                if prompt and text.startswith(prompt):
                    where[i] = np.array([len(prompt) - 0.5])
                elif END in got and text == got.replace(END, ''):
                    at = got.index(END)
                    where[i] = np.arange(at - end, at) if said.strip() and text.endswith(said[:end], 0, at) else np.array([at - 0.5])
            if i not in where and i in turns and self.attempt(self.messages[:i] + self.messages[i + 1:], gen) != text:
                raise ValueError(f'message {i}: the chat template of {self.tok.name} rewrites or drops what the assistant said, so its place cannot be told: '
                                 'put {% generation %} ... {% endgeneration %} around the assistant turn in the template')
        return where

    def _start(self, text, where, i):
        """Where the generation prompt ends: it is rendered, and stands in the text as a whole, or (history rewritten) as its own last part."""
        a = int(np.ceil(where[i][0]))
        with_prompt = self.attempt(self.messages[:i], True)
        if with_prompt is not None and text.startswith(with_prompt) and not text[len(with_prompt):a].strip():
            return len(with_prompt)
        without = self.attempt(self.messages[:i])
        if with_prompt is not None and with_prompt != without and text.startswith(with_prompt):
            return len(with_prompt)  # and what the template puts in between ("<think>\n\n</think>"), the assistant has to write
        prompt = (with_prompt or '')[len(os.path.commonprefix([with_prompt or '', without or ''])):]
        lower = max((int(at[at < a].max()) + 1 for j, at in where.items() if j != i and (at < a).any()), default=0)
        found = text.rfind(prompt, lower, a) if prompt else -1
        return found + len(prompt) if found >= 0 else a

    def _end(self, text, where, i, gen):
        """After the last control token that the template puts behind the turn (<|im_end|>), else after its last mark that is no blank."""
        alone = text if i == len(self.messages) - 1 and not gen else self.attempt(self.messages[:i + 1])
        whole = alone is not None and text.startswith(alone)
        at = where[i][where[i] < len(alone)] if whole else where[i]
        b = int(np.floor((at if len(at) else where[i])[-1])) + 1
        if whole:
            own = text[b:len(alone)]
        else:  # written in another way once more turns follow: what stands behind it both here and where the conversation is cut after it
            upper = min((int(np.ceil(at[at > b - 1][0])) for j, at in where.items() if j != i and (at > b - 1).any()), default=len(text))
            own = next((text[b:n] for n in range(upper, b, -1) if alone and alone.endswith(text[b:n])), '')
            own = own or os.path.commonprefix([text[b:upper], alone[b:]] if alone and alone.startswith(text[:b]) else [''])
            own = re.match(r'.*[\s>\]}]|', own, re.S)[0]  # not half of a token that differs
        stop = max((own.rfind(t) + len(t) for t in self.tok.special if t in own), default=len(own.rstrip()) or len(own))
        return b + stop


# ---- rows: what a stage reads, as ids ----
ALPACA = 'Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n### Instruction:\n{}\n\n{}### Response:'
SFT_FORMS = '{"messages": [{"role", "content"}]}, {"prompt", "completion"}, {"instruction", "input", "output"} or {"text"}'


def encode_prompt(prompt, tok, **template_args):
    """str: verbatim (its control tokens are plain text) behind the tokenizer's own prefix (Llama's <s>), if it has one; messages: by the chat
    template with its generation prompt. -> [int]. With 'byte', 'Q: hi\\nA: ' and [{"role": "user", "content": "hi"}] are the same ids."""
    if isinstance(prompt, str):
        return tok.prefix + tok.encode(prompt)
    return tok.apply_chat_template(prompt, add_generation_prompt=True, **template_args)


def encode_completion(completion, tok, eot=True):
    """str, or a list with one assistant message -> [int], the end token behind it unless eot=False. 'byte': 'ok' -> [111, 107, 256]."""
    if isinstance(completion, list):
        if len(completion) != 1 or not isinstance(completion[0], dict) or completion[0].get('role') != 'assistant':
            raise ValueError(f'a completion is a string or a list with one assistant message, got {str(completion)[:80]}')
        completion = completion[0].get('content')
    if eot and tok.eot is None:
        raise ValueError(f'tokenizer {tok.name!r} has no end token, so a completion could not end: take one that has (byte, gpt2, an eos_token in its config)')
    return tok.encode(completion) + ([tok.eot] if eot else [])


def encode_reply(prompt, answer, tok, **template_args):
    """The ids of an answer to a prompt, with its end: the answer's place in the rendered chat where the prompt is a list of messages."""
    if isinstance(prompt, str):
        return encode_completion(answer, tok)
    chat = _Chat(tok, prompt + ([{'role': 'assistant', 'content': answer}] if isinstance(answer, str) else answer), template_args)
    text, spans = chat.spans(len(prompt))
    if not spans:
        raise ValueError(f'no turn of the assistant in the answer {str(answer)[:80]}')
    return tok.encode(text[spans[0][0]:spans[-1][1]], allow_special=True)


def alpaca_prompt(row):
    """Stanford Alpaca's prompt, with or without "input"; the answer follows "### Response:" directly, as in their training code."""
    extra = row.get('input') or ''
    return ALPACA.format(', paired with an input that provides further context' if extra else '', row['instruction'], f'### Input:\n{extra}\n\n' if extra else '')


def _of_table(value, key=''):
    """A table gives every message every key that one of them has: leave out what is null (content may be: a turn of tool calls)."""
    if isinstance(value, dict):
        return {k: _of_table(v, k) for k, v in value.items() if v is not None or k == 'content'}
    return [_of_table(v) for v in value] if isinstance(value, (list, tuple)) else value


def _row_args(row, given):
    """Template arguments of a row, as TRL has them: "tools", "chat_template_kwargs"."""
    return {**({'tools': _of_table(row['tools'])} if row.get('tools') else {}), **_of_table(row.get('chat_template_kwargs') or {}), **given}


def encode_row(row, tok, **template_args):
    """One SFT row -> (ids [int], trained [bool]). Trained: what the assistant wrote, end tokens included; all of a {"text"} row.
    'byte': {"prompt": "a", "completion": "b"} -> [97, 98, 256], [False, True, True]. ValueError on a row of no known form."""
    row, template_args = _of_table(row), _row_args(row, template_args)
    if row.get('messages') is not None:
        ids, trained = tok.apply_chat_template(row['messages'], return_mask=True, **template_args)
        if not any(trained):
            raise ValueError('messages without a turn of the assistant: nothing to train on')
        return ids, trained
    if row.get('prompt') is not None and row.get('completion') is not None:
        p, c = encode_prompt(row['prompt'], tok, **template_args), encode_reply(row['prompt'], row['completion'], tok, **template_args)
    elif row.get('instruction') is not None and row.get('output') is not None:
        p, c = encode_prompt(alpaca_prompt(row), tok), encode_completion(row['output'], tok)
    elif row.get('text') is not None:
        p, c = [], tok.prefix + encode_completion(row['text'], tok)
    else:
        raise ValueError(f'row with the keys {sorted(row)}, expected {SFT_FORMS}' + ('; this is a preference row, for reward.py and dpo.py' if 'rejected' in row else ''))
    return p + c, [False] * len(p) + [True] * len(c)


def split_pair(row):
    """A preference row as (prompt, chosen, rejected): {"prompt", "chosen", "rejected"} as it is, whole dialogues without "prompt" cut where
    they part: strings of HH at their last "\\n\\nAssistant:", lists of messages behind the common ones. ValueError names the row's fault."""
    for key in ('chosen', 'rejected'):
        if row.get(key) is None:
            raise ValueError(f'preference row without {key!r} (keys {sorted(row)}): expected {{"prompt", "chosen", "rejected"}}')
    prompt, chosen, rejected = row.get('prompt'), row['chosen'], row['rejected']
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise ValueError(f'chosen is {type(chosen).__name__}, rejected {type(rejected).__name__}: expected two strings or two lists of messages')
    if chosen == rejected:
        raise ValueError(f'chosen and rejected are equal: {str(chosen)[:60]!r}')
    if prompt is None and isinstance(chosen, list):
        n = next((i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b), min(len(chosen), len(rejected)))
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    elif prompt is None:
        prompt = ''.join(chosen.rpartition('\n\nAssistant:')[:2])
        if not prompt or not rejected.startswith(prompt) or '\n\nHuman:' in rejected[len(prompt):]:
            raise ValueError('preference row without "prompt" whose two texts are no dialogues that share all up to the last "\\n\\nAssistant:"')
        chosen, rejected = chosen[len(prompt):], rejected[len(prompt):]
    for key, answer in (('chosen', chosen), ('rejected', rejected)):
        said = answer if isinstance(answer, str) else ''.join(str(m.get('content') or m.get('tool_calls') or '') for m in answer)
        if not said.strip():
            raise ValueError(f'empty completion: {key!r} says nothing')
    return prompt, chosen, rejected


def encode_pair(row, tok, **template_args):
    """One preference row -> (prompt_ids, chosen_ids, rejected_ids), both answers with their end token. The forms and faults of split_pair.
    'byte': {"prompt": "a", "chosen": "b", "rejected": "c"} -> [97], [98, 256], [99, 256]."""
    row, template_args = _of_table(row), _row_args(row, template_args)
    prompt, chosen, rejected = split_pair(row)
    return (encode_prompt(prompt, tok, **template_args), *(encode_reply(prompt, answer, tok, **template_args) for answer in (chosen, rejected)))


def show_masks(ids, trained, tok):
    """The row as a terminal shows it: green trained, grey not (ANSI)."""
    runs = itertools.groupby(zip(ids, trained), key=lambda pair: bool(pair[1]))
    return ''.join(('\033[32m' if t else '\033[90m') + tok.decode([i for i, _ in run]) for t, run in runs) + '\033[0m'
