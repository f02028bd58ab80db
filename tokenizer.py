"""Tokenizers, chat templates, and THE reading of a row: its ids, and which of them are trained.

encode_prompt(row, tok), encode_row(row, tok) and encode_pair(row, tok) are what every stage, the evaluation
and the app call, so a conversation has the same ids whatever form its row has, and what the assistant did not
write is never trained:

    <|im_start|>user\\n2+2?<|im_end|>\\n<|im_start|>assistant\\n4<|im_end|>\\n
                                                            trained: ^^^^^^^^^^^
from the end of the generation prompt to the control token that ends the turn. Where that cannot be told
exactly from what the template does, it is a ValueError that says what to add to the template.
"""
import contextlib
import datetime
import functools
import hashlib
import itertools
import json
import os
import re
import tempfile
import unicodedata

import jinja2  # torch brings it
import numpy as np
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

import files
from arrow import Record

GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
QWEN_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                r"\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2_FILES = {  # SHA-256; at OpenAI's address
    'vocab.bpe': '1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5',
    'encoder.json': '196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783',
}
EOT = '<|endoftext|>'
BYTE_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\\n' }}"
    "{% elif m.role == 'user' %}{{ 'Q: ' + m.content + '\\nA: ' }}{% elif m.role == 'assistant' %}"
    "{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('this template knows the roles system, user, assistant') }}{% endif %}"
    "{% endfor %}"
)
# GPT-2's printable stand-ins for bytes: printable Latin-1 as itself, the other 68 bytes from U+0100 on. ' '
# -> 'Ġ'
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_CHARS = {b: chr(b) for b in PRINTABLE}
BYTE_CHARS |= {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in PRINTABLE)}
CHAR_BYTES = {c: b for b, c in BYTE_CHARS.items()}

# -----------------------------------------------------------------------------------------------------------
# tokenizers
# -----------------------------------------------------------------------------------------------------------


class Tokenizer:
    """Text to ids and back; get_tokenizer makes them. spec is what stands in tokenizer.json, config what
    stands in tokenizer_config.json, whatever it was read from, so save() writes files that transformers opens
    too. eot, pad: ids or None (pad only where it is a token of its own, never eot); prefix: the ids that
    stand before a text (Llama's <s>); added {text: id}: every added token, special: those that control
    (<|im_end|>, not <think>)."""

    def __init__(self, spec, config, name):
        self.spec = spec
        self.name = name
        rows = spec.get('added_tokens') or []
        self.added = {row['content']: row['id'] for row in rows}
        self.added_texts = {i: text for text, i in self.added.items()}
        self.special = {row['content'] for row in rows if row.get('special')}
        self.split_all = any_of(self.added)
        # <think>, <tool_call>: the model writes them, text may hold them
        self.split_plain = any_of(set(self.added) - self.special)
        pieces = spec['model'].get('vocab') or {}
        vocab = self.added if isinstance(pieces, list) else {**pieces, **self.added}
        self.vocab_size = max(len(pieces), 1 + max(vocab.values(), default=-1))
        # bos_token ... in a template
        self.token_texts = {key: text['content'] if isinstance(text, dict) else text
                            for key, text in config.items() if key.endswith('_token') and text}
        self.config = {**config, **self.token_texts}
        self.eot, pad = (vocab.get(self.token_texts.get(key)) for key in ('eos_token', 'pad_token'))
        self.pad = None if pad == self.eot else pad
        self.ends = []  # what generation_config.json names besides
        self.prefix = []
        steps = spec.get('post_processor') or {}
        for step in steps.get('processors', [steps]):
            if step.get('type') == 'TemplateProcessing' and 'SpecialToken' in (step['single'] or [{}])[0]:
                self.prefix = [vocab[step['single'][0]['SpecialToken']['id']]]
        template = config.get('chat_template') or {}
        if isinstance(template, list):
            template = {row['name']: row['template'] for row in template}
        self.templates = {'default': template} if isinstance(template, str) else template

    # a kind of tokenizer has plain(str) -> [int] for text without added tokens, bytes_of(id) and normalise
    def normalise(self, text):
        return text

    def pieces(self, text, allow_special):
        """[(added token's id or None, text)]"""
        if not isinstance(text, str):
            raise ValueError(f'text to encode is {type(text).__name__}, expected str')
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise ValueError(f'lone surrogate {text[e.start]!a} at character {e.start} is no Unicode text: '
                             f'repair the data, e.g. text.encode("utf-16", "surrogatepass").decode("utf-16", '
                             f'"replace")') from None
        parts = (self.split_all if allow_special else self.split_plain).split(text)
        return [(self.added[part] if n % 2 else None, part) for n, part in enumerate(parts) if part]

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """No token is put around it. A control token written in the text (<|im_end|>) is plain text unless
        allow_special. ValueError on a lone surrogate and on a character outside a char tokenizer. 'byte':
        'hi' -> [104, 105]."""
        ids = []
        for token, piece in self.pieces(text, allow_special):
            ids += self.plain(self.normalise(piece)) if token is None else [token]
        return ids

    def decode(self, ids: list[int]) -> str:
        """Bytes that are no UTF-8 (half an emoji) become U+FFFD; an id above the vocabulary (the padding rows
        of a model's embedding) is nothing, as in HF; one below 0 is a ValueError."""
        ids = list(ids)
        if ids and min(ids) < 0:
            raise ValueError(f'token id {min(ids)}: ids start at 0 (an ignored target?)')
        return self.text_of(ids)

    def text_of(self, ids):
        return b''.join(map(self.bytes_of, ids)).decode(errors='replace')

    def encode_marked(self, text, wrote):
        """ids of a rendered chat and, per id, whether it holds a character with wrote[i] True."""
        ids, mask, at = [], [], 0
        for token, piece in self.pieces(text, True):
            flags = wrote[at:at + len(piece)]
            at += len(piece)
            if token is not None:
                ids.append(token)
                mask.append(bool(flags.any()))
                continue
            norm = self.normalise(piece)
            if norm != piece:  # a border at p moves to len(normalise(piece[:p]))
                edges = [0, *(np.flatnonzero(flags[1:] != flags[:-1]) + 1), len(piece)]
                moved = [len(self.normalise(piece[:edge])) for edge in edges]
                flags = np.repeat(flags[edges[:-1]], np.maximum(np.diff(moved), 0))[:len(norm)]
            tokens = self.plain(norm)
            first_bytes = (np.frombuffer(norm.encode(), np.uint8) & 0xC0) != 0x80
            seen = np.cumsum([0, *flags[np.cumsum(first_bytes) - 1]])  # trained bytes up to here
            ends = np.cumsum([0, *(len(self.bytes_of(i)) for i in tokens)])
            ids += tokens
            mask += (seen[ends[1:]] > seen[ends[:-1]]).tolist()
        return ids, mask

    def render(self, messages, add_generation_prompt=False, **template_args) -> str:
        """The text that the template makes of the messages, as transformers'
        apply_chat_template(tokenize=False)."""
        return Chat(self, messages, template_args).text(add_generation_prompt)

    def apply_chat_template(self, messages, add_generation_prompt=False, return_mask=False, **template_args):
        """[{"role", "content"}] (+ tools=, enable_thinking= ...) -> [int] as transformers', or with
        return_mask ([int], [bool] True = written by the assistant). ValueError where the template refuses, or
        its mask cannot be told. 'byte': [{user 'hi'}, {assistant 'yo'}] -> 'Q: hi\\nA: yo<|endoftext|>', True
        on the last three."""
        chat = Chat(self, messages, template_args)
        if return_mask:
            return self.encode_marked(*chat.wrote(gen=add_generation_prompt))
        return self.encode(chat.text(add_generation_prompt), allow_special=True)

    @functools.cached_property
    def stop_ids(self) -> list[int]:
        """Every id that ends an answer: eot, what generation_config.json names, and what the template ends a
        turn with."""
        ids = [self.eot, *self.ends]
        talk = [{'role': 'user', 'content': 'a'}, {'role': 'assistant', 'content': 'b'}]
        with contextlib.suppress(ValueError):  # no template, or one that does not tell what ends a turn
            tokens, mask = self.apply_chat_template(talk, return_mask=True)
            ids += [i for i, on in zip(tokens, mask) if on and self.added_texts.get(i) in self.special][-1:]
        return [i for i in dict.fromkeys(ids) if i is not None]

    def state(self):
        """Text that says all that its ids depend on."""
        with open(__file__, encoding='utf-8') as f:
            return json.dumps([self.spec, self.config, self.templates, self.prefix, f.read()])

    def save(self, folder):
        """tokenizer.json and tokenizer_config.json: get_tokenizer(folder) reads them back, so do transformers
        and vLLM."""
        os.makedirs(folder, exist_ok=True)
        for file, value in (('tokenizer.json', self.spec), ('tokenizer_config.json', self.config)):
            with files.replaced(os.path.join(folder, file)) as f:
                f.write(json.dumps(value, ensure_ascii=False).encode())


def any_of(texts):
    """Pattern that splits at the longest of the texts, and keeps it."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile('(' + '|'.join(map(re.escape, longest_first)) + ')' if texts else '((?!))')


class ByteTokenizer(Tokenizer):
    """The 256 bytes and added tokens: no training, no file, every text."""

    def plain(self, text):
        return list(text.encode())

    def bytes_of(self, i):
        return self.added_texts.get(i, '').encode() if i in self.added_texts or i > 255 else bytes([i])


class CharTokenizer(Tokenizer):
    """One id a character, as nanoGPT's shakespeare_char."""

    def __init__(self, *args):
        super().__init__(*args)
        self.ids = self.spec['model']['vocab']
        self.unknown = self.ids.get(self.spec['model'].get('unk_token'))
        self.chars = {i: char.encode() for char, i in {**self.ids, **self.added}.items()}

    def plain(self, text):
        ids = [self.ids.get(char, self.unknown) for char in text]
        if None in ids:
            raise ValueError(f'character {text[ids.index(None)]!r} is not among the {self.vocab_size} that '
                             f'this char tokenizer knows')
        return ids

    def bytes_of(self, i):
        return self.chars.get(i, b'')


class BpeTokenizer(Tokenizer):
    """Byte-level BPE in tiktoken (Rust). tiktoken merges by id where HF merges by the order of its list, and
    merges any pair that makes a token; the two agree where ids rise along the list and each token is what its
    own text encodes to."""

    def __init__(self, spec, config, name, pattern):
        import tiktoken
        super().__init__(spec, config, name)
        vocab = spec['model']['vocab']
        ranks = {bytes(map(CHAR_BYTES.get, text)): i for text, i in vocab.items() if text not in self.added}
        self.bpe = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=self.added)
        self.nfc = (spec.get('normalizer') or {}).get('type') == 'NFC'

    def normalise(self, text):
        return unicodedata.normalize('NFC', text) if self.nfc else text

    def plain(self, text):
        if len(text) > 50000 and re.search(r'\s{50000}', text):
            raise ValueError('a run of more than 50,000 blanks: the pattern matcher of tiktoken gives up on '
                             'it; shorten it')
        return self.bpe.encode_ordinary(text)

    def bytes_of(self, i):
        try:
            return self.bpe.decode_single_token_bytes(i)
        except KeyError:
            return b''

    def text_of(self, ids):
        try:
            return self.bpe.decode_bytes(ids).decode(errors='replace')
        except KeyError:  # an id above the vocabulary among them
            return super().text_of(ids)


class LibraryTokenizer(Tokenizer):
    """Any other kind (SentencePiece style, Unigram, WordPiece, several splits): read by the `tokenizers`
    library."""

    def __init__(self, spec, config, name):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f'{name}: a {spec["model"].get("type")} tokenizer that is no byte-level BPE is '
                             f'read by the tokenizers library: pip install tokenizers') from None
        super().__init__(spec, config, name)
        try:
            self.library = tokenizers.Tokenizer.from_str(json.dumps(spec))
        except Exception as e:  # the library raises bare Exception
            raise ValueError(f'{name}: tokenizer.json is not readable: {e}') from None
        self.vocab_size = self.library.get_vocab_size()

    def run(self, text, allow_special):
        self.pieces(text, allow_special)  # for its checks: the library splits by itself, flags and all
        self.library.encode_special_tokens = not allow_special
        return self.library.encode(text, add_special_tokens=False)

    def encode(self, text, allow_special=False):
        ids = self.run(text, allow_special).ids
        control = {self.added[special] for special in self.special}
        if allow_special or control.isdisjoint(ids):
            return ids
        # a Unigram model finds </s> as a piece all the same: cut it in two
        parts = any_of(self.special).sub(lambda found: found[0][:1] + '\0' + found[0][1:], text).split('\0')
        return [i for part in parts for i in self.run(part, False).ids]

    def text_of(self, ids):
        return self.library.decode(ids, skip_special_tokens=False)

    def encode_marked(self, text, wrote):
        found = self.run(text, True)
        return found.ids, [bool(wrote[start:stop].any()) for start, stop in found.offsets]


# -----------------------------------------------------------------------------------------------------------
# where they come from
# -----------------------------------------------------------------------------------------------------------


def get_tokenizer(name: str) -> Tokenizer:
    """'byte'; 'char:<meta.json of prepare.py, or a string's file>'; 'gpt2' (from tiktoken's cache or
    download); a directory with tokenizer.json, vocab.json + merges.txt or encoder.json + vocab.bpe; a hub
    name whose model is in the HF cache."""
    if name == 'byte':
        vocab = {char: byte for byte, char in sorted(BYTE_CHARS.items())}
        config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'eos_token': EOT,
                  'clean_up_tokenization_spaces': False, 'chat_template': BYTE_TEMPLATE}
        return from_spec(bpe_spec(vocab, [], {EOT: 256}, None), config, name)
    if name.startswith('char:'):
        return char_tokenizer(name)
    if os.path.isdir(name):
        return from_directory(name)
    tried = ''
    if re.fullmatch(r'(openai-community/)?gpt2(-medium|-large|-xl)?', name):
        try:
            vocab, merges = tiktoken_file('encoder.json'), tiktoken_file('vocab.bpe').decode()
            return from_vocab('gpt2', {}, json.loads(vocab), merges, {})
        except OSError as e:  # then from the hub, or from what `hf download gpt2` has put into its cache
            tried = f'{e}; '
    try:
        folder = files.resolve(name, weights=False)
    except ValueError as e:
        raise ValueError(f"tokenizer {name!r}: expected 'byte', 'char:<meta.json>', 'gpt2', a directory with "
                         f"tokenizer.json or a name of the hub (HF cache): {tried}{e}") from None
    return from_directory(folder)


def char_tokenizer(name):
    chars = read_json(name[5:]).get('chars')
    if not chars or len(set(chars)) != len(chars):
        raise ValueError(f'{name[5:]}: expected {{"chars": "..."}} with distinct characters, as '
                         'data/shakespeare_char/prepare.py writes it')
    spec = json.loads(CHAR_SPEC)
    spec['model']['vocab'] = {char: i for i, char in enumerate(chars)}
    config = {'tokenizer_class': 'PreTrainedTokenizerFast', 'clean_up_tokenization_spaces': False}
    return from_spec(spec, config, name)


def read_json(path, missing_ok=False):
    if missing_ok and not os.path.exists(path):
        return {}
    try:
        with open(path, encoding='utf-8') as f:
            value = json.load(f)
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{path}: not JSON: {e}') from None
    if not isinstance(value, dict):
        raise ValueError(f'{path}: holds a {type(value).__name__}, expected an object')
    return value


def from_directory(folder):
    def read(file):
        return read_json(os.path.join(folder, file), missing_ok=True)
    names, spec = os.listdir(folder), read('tokenizer.json')
    config = {**read('special_tokens_map.json'), **read('tokenizer_config.json')}
    kind = config.get('tokenizer_class') or ''
    if not kind and read('config.json').get('model_type') == 'gpt2':
        kind = 'GPT2Tokenizer'
    if kind.startswith('GPT2') and EOT in {row['content'] for row in spec.get('added_tokens', [])}:
        # the class knows them
        config = {'tokenizer_class': kind, 'eos_token': EOT, 'bos_token': EOT, **config}
    if 'chat_template.jinja' in names:
        with open(os.path.join(folder, 'chat_template.jinja'), encoding='utf-8') as f:
            config['chat_template'] = f.read()
    pair = next((pair for pair in PAIRS if set(pair) <= set(names)), None)
    if spec:
        tok = from_spec(spec, config, folder)
    elif pair:
        with open(os.path.join(folder, pair[1]), encoding='utf-8') as f:
            merges = f.read()
        tok = from_vocab(folder, config, read(pair[0]), merges, read('added_tokens.json'))
    else:
        raise ValueError(f'{folder}: no tokenizer in it: expected tokenizer.json, vocab.json + merges.txt or '
                         f'encoder.json + vocab.bpe')
    ends = read('generation_config.json').get('eos_token_id') or []
    tok.ends = ends if isinstance(ends, list) else [ends]
    return tok


def from_vocab(name, config, vocab, merges, added):
    """A vocabulary and a list of merges, as the older folders of GPT-2 and Qwen2 have them."""
    kind = config.get('tokenizer_class', 'GPT2Tokenizer').removesuffix('Fast')
    if kind not in ('GPT2Tokenizer', 'Qwen2Tokenizer'):
        raise ValueError(f'{name}: tokenizer_class {kind} with vocab.json and merges.txt is not known here: '
                         f'save it as tokenizer.json')
    merges = [line.split(' ') for line in merges.split('\n') if line and not line.startswith('#version')]
    rows = config.get('added_tokens_decoder', {})
    added = {row['content']: int(i) for i, row in rows.items()} or added
    if kind == 'GPT2Tokenizer':
        config = {'tokenizer_class': kind, 'eos_token': EOT, 'bos_token': EOT, 'unk_token': EOT, **config}
        added = added or {EOT: vocab[EOT]} if EOT in vocab else added
    plain = [row['content'] for row in rows.values() if not row.get('special')]
    pattern = None if kind == 'GPT2Tokenizer' else QWEN_PATTERN
    return from_spec(bpe_spec(vocab, merges, added, pattern, plain), config, name)


def tiktoken_file(file):
    """One of GPT-2's files through tiktoken: its cache, else its download."""
    import requests
    from tiktoken.load import read_file_cached
    url = f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{file}'
    cache = os.environ.get('TIKTOKEN_CACHE_DIR') or os.environ.get('DATA_GYM_CACHE_DIR')
    cache = cache or os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    try:
        cached = os.path.join(cache, hashlib.sha1(url.encode()).hexdigest())
        if files.offline() and not os.path.exists(cached):
            raise OSError('HF_HUB_OFFLINE is set')
        return read_file_cached(url, GPT2_FILES[file])
    except (requests.RequestException, OSError) as e:
        raise OSError(f"{file} is not in tiktoken's cache ({cache}, TIKTOKEN_CACHE_DIR) and did not come "
                      f"from its host ({type(e).__name__})") from None


PAIRS = ('vocab.json', 'merges.txt'), ('encoder.json', 'vocab.bpe')
BPE_SPEC = """{
    "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false},
    "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false},
    "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": "",
              "end_of_word_suffix": "", "fuse_unk": false, "byte_fallback": false}}"""
CHAR_SPEC = """{
    "version": "1.0", "truncation": null, "padding": null, "normalizer": null, "post_processor": null,
    "added_tokens": [], "decoder": {"type": "Fuse"}, "model": {"type": "WordLevel", "unk_token": "<unk>"},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[\\\\s\\\\S]"}, "behavior": "Isolated",
                      "invert": false}}"""


def bpe_spec(vocab, merges, added, pattern, plain=()):
    """tokenizer.json of a byte-level BPE; pattern None: GPT-2's, else Qwen's with its NFC. A byte tokenizer
    has no merges."""
    spec = json.loads(BPE_SPEC)
    flags = {'single_word': False, 'lstrip': False, 'rstrip': False, 'normalized': False}
    spec['added_tokens'] = [{'id': i, 'content': text, **flags, 'special': text not in plain}
                            for text, i in sorted(added.items(), key=lambda item: item[1])]
    spec['model'] |= {'vocab': vocab, 'merges': merges}
    level = spec['pre_tokenizer']
    level['use_regex'] = pattern is None and bool(merges)
    if pattern:
        split = {'type': 'Split', 'pattern': {'Regex': pattern}, 'behavior': 'Isolated', 'invert': False}
        spec['normalizer'] = {'type': 'NFC'}
        spec['pre_tokenizer'] = {'type': 'Sequence', 'pretokenizers': [split, level]}
    return spec


def from_spec(spec, config, name):
    try:
        pattern = byte_level_pattern(spec)
        if pattern == 'char':
            return CharTokenizer(spec, config, name)
        if pattern == 'byte':
            return ByteTokenizer(spec, config, name)
        return BpeTokenizer(spec, config, name, pattern) if pattern else LibraryTokenizer(spec, config, name)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        raise ValueError(f'{name}: tokenizer.json is not what it should be: {type(e).__name__} {e}') from None


def byte_level_pattern(spec):
    """'char', 'byte', the pattern that splits the text before a byte-level BPE, or None for a kind that is
    left to the library."""
    model, first = spec['model'], spec.get('pre_tokenizer') or {}
    *before, last = first.get('pretokenizers', [first])
    rows = spec.get('added_tokens') or []
    normal = (spec.get('normalizer') or {}).get('type')
    if normal not in (None, 'NFC') or any(row.get(key) for row in rows for key in FANCY):
        return None
    patterns = [step['pattern'].get('Regex') for step in [*before, last] if is_split(step)]
    if model['type'] == 'WordLevel' and patterns == [r'[\s\S]'] and not normal:
        return 'char'
    level = last.get('type') == 'ByteLevel' and not last.get('add_prefix_space')
    level = level and (spec.get('decoder') or {}).get('type') == 'ByteLevel'
    if model['type'] != 'BPE' or not level or model.get('byte_fallback') or model.get('dropout'):
        return None
    own = last.get('use_regex', True)
    if not before:
        patterns = [GPT2_PATTERN if own else r'[\s\S]+']
    elif own or len(before) != 1 or len(patterns) != 1:
        return None
    added = {row['content'] for row in rows}
    plain = {text: i for text, i in model['vocab'].items() if text not in added}
    if not model['merges'] and plain == CHAR_BYTES:
        return 'byte'
    return patterns[0] if ids_rise(model, added) else None


FANCY = 'lstrip', 'rstrip', 'single_word'


def is_split(step):
    return step.get('type') == 'Split' and step.get('behavior') == 'Isolated' and not step.get('invert')


def ids_rise(model, added):
    """Do the ids rise along the list of merges, and is each token a byte or the result of a merge? Then
    tiktoken merges as HF."""
    vocab = model['vocab']
    made = [''.join(merge.split(' ') if isinstance(merge, str) else merge) for merge in model['merges']]
    ids = [vocab[text] for text in made]
    if not all(char in vocab for char in CHAR_BYTES) or not set(vocab) - added <= set(made) | set(CHAR_BYTES):
        return False
    return ids == sorted(ids) and (not ids or ids[0] > max(vocab[char] for char in CHAR_BYTES))


# -----------------------------------------------------------------------------------------------------------
# chat templates
# -----------------------------------------------------------------------------------------------------------
# A template comes with a checkpoint from anywhere: Jinja2's immutable sandbox keeps it from Python's
# internals, as in transformers.
# Where the assistant's turns are is found while it renders: in every {% for %} loop, each message that the
# loop comes to writes a mark.

BEGIN, END = '\ufdd0', '\ufdd1'  # around a {% generation %} block; four of Unicode's noncharacters
# TURN loop:message CLOSE where a loop comes to a message, TURN loop: CLOSE where it leaves it
TURN, CLOSE = '\ufdd2', '\ufdd3'
MARKS = re.compile(f'({BEGIN}|{END}|{TURN}[0-9]+:[0-9]*{CLOSE})')
THOUGHTS = ('reasoning_content', 'thinking', 'reasoning')  # the same thing, as in transformers
REFUSES = (jinja2.TemplateError, RecursionError, TypeError, ValueError, ArithmeticError, LookupError,
           AttributeError, MemoryError)


@jinja2.pass_context
def turn_mark(context, value, loop, leaves=False):
    """The filter that writes the marks; '' in an ordinary render and for what is no message."""
    turns = context.get('$turns')
    if not turns or id(value) not in turns:
        return ''
    return f"{TURN}{loop}:{'' if leaves else turns[id(value)]}{CLOSE}"


class Sandbox(ImmutableSandboxedEnvironment):
    def _parse(self, *args):
        tree = super()._parse(*args)
        for number, loop in enumerate(tree.find_all(nodes.For)):
            if isinstance(loop.target, nodes.Name):
                message = nodes.Name(loop.target.name, 'load')
                marks = []
                for leaves in (False, True):
                    args = [nodes.Const(number), nodes.Const(leaves)]
                    mark = nodes.Filter(message, '$turn', args, [], None, None, lineno=loop.lineno)
                    marks.append(nodes.Output([mark]))
                loop.body = [marks[0], *loop.body, marks[1]]
        return tree


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, as in transformers."""
    tags = {'generation'}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
        call = self.call_method('wrap', [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def wrap(self, context, caller):
        return BEGIN + caller() + END if context.get('$turns') else caller()


def raise_exception(message):
    raise jinja2.TemplateError(message)


def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


@functools.lru_cache(maxsize=32)
def compiled(source):
    if tuple(map(int, re.findall(r'\d+', jinja2.__version__)[:3])) < (3, 1, 6):
        raise ValueError(f'jinja2 {jinja2.__version__} has known holes in its sandbox: pip install -U '
                         f'"jinja2>=3.1.6"')
    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, 'jinja2.ext.loopcontrols'])
    env.filters |= {'$turn': turn_mark, 'tojson': tojson}
    env.globals |= {'raise_exception': raise_exception, 'strftime_now': strftime_now}
    return env.from_string(source)


def strftime_now(form):
    return datetime.datetime.now().strftime(form)


PUT_BLOCKS = 'put {% generation %} ... {% endgeneration %} around the assistant turn in the template'


class Chat:
    """One conversation under one template: its text, and what the assistant wrote in it."""

    def __init__(self, tok, messages, args):
        if not tok.templates:
            raise ValueError(f'tokenizer {tok.name!r} has no chat template: use rows whose prompt is a '
                             f'string, or set chat_template in its tokenizer_config.json')
        if not is_messages(messages):
            raise ValueError(f'messages are a list of {{"role", "content"}}, not empty; got '
                             f'{str(messages)[:80]}')
        try:  # plain JSON values only: other objects bring methods that the sandbox does not know
            self.said = json.dumps(messages, ensure_ascii=False)
            self.messages = json.loads(self.said)
            self.args = {'tools': None, 'documents': None, **json.loads(json.dumps(args))}
        except (TypeError, ValueError, RecursionError) as e:
            raise ValueError(f'messages and template arguments are JSON values: {e}') from None
        for message in self.messages:
            thought = next((message[key] for key in THOUGHTS if message.get(key) is not None), None)
            if thought is not None:
                message |= {'reasoning_content': thought, 'thinking': message.get('thinking', thought)}
        which = 'tool_use' if self.args['tools'] and 'tool_use' in tok.templates else 'default'
        self.source = tok.templates.get(which)
        if self.source is None:
            raise ValueError(f'tokenizer {tok.name!r} has the chat templates {sorted(tok.templates)}, none '
                             f'named default')
        self.tok = tok
        try:
            self.template = compiled(self.source)
        except REFUSES as e:
            raise ValueError(f'the chat template of {tok.name}: {e}') from None
        self.join_parts()

    def join_parts(self):
        """Text parts of a content become one text, unless the template itself writes all of them."""
        lists = [(i, m['content']) for i, m in enumerate(self.messages) if isinstance(m.get('content'), list)]
        if not lists:
            return
        texts = {}
        for i, parts in lists:
            for part in parts:
                if not isinstance(part, dict) or not isinstance(part.get('text'), str):
                    raise ValueError(f'message {i}: a content part is {str(part)[:60]}, expected '
                                     f'{{"type": "text", "text": ...}}')
            texts[i] = [part['text'] for part in parts]
        written = self.attempt(self.messages) or ''
        if not all(text.strip() in written for parts in texts.values() for text in parts):
            for i, parts in texts.items():
                self.messages[i]['content'] = '\n'.join(parts)

    def text(self, gen=False, messages=None, turns=None):
        """The rendered chat; turns {id(message): number}: with marks."""
        values = {**self.tok.token_texts, **self.args, 'add_generation_prompt': gen, '$turns': turns,
                  'messages': self.messages if messages is None else messages}
        try:
            return self.template.render(values)
        except REFUSES as e:
            reason = f'{type(e).__name__}: {e}'
            raise ValueError(f'the chat template of {self.tok.name} refuses these messages: '
                             f'{reason}') from None

    def attempt(self, messages, gen=False):
        try:
            return self.text(gen, messages)
        except ValueError:
            return None  # e.g. a template that wants no turn of the assistant at the end

    def prompt(self):
        """The text of messages that an answer is to follow: with the generation prompt, or, where the last
        message is a begun turn of the assistant, up to its last word."""
        last = self.messages[-1]
        if last['role'] != 'assistant':
            return self.text(True)
        text, begun = self.text(), last.get('content') or ''
        at = text.rfind(begun.strip())
        if at < 0 or not begun.strip():
            self.untold(len(self.messages) - 1, 'content')
        whole = text.startswith(begun.lstrip(), at)
        return text[:at + len(begun.lstrip() if whole else begun.strip())]

    def untold(self, i, key):
        raise ValueError(f'message {i}: the chat template of {self.tok.name} rewrites or drops what the '
                         f'assistant said ({key!r}), so its place cannot be told: {PUT_BLOCKS}')

    def segments(self, gen):
        """(text, {message: (start, stop) of what was written while a loop was at it}, [(start, stop) of
        generation blocks])"""
        if any(mark in self.said for mark in (BEGIN, END, TURN, CLOSE)):
            raise ValueError(f'the messages hold the noncharacter {BEGIN!a}, {END!a}, {TURN!a} or {CLOSE!a}, '
                             f'with which turns are found: take it out')
        places, blocks, stack = {}, [], []
        at = 0
        parts = MARKS.split(self.text(gen, turns={id(message): i for i, message in enumerate(self.messages)}))
        for n, part in enumerate(parts):
            if n % 2 == 0:
                if stack and part:
                    places.setdefault(stack[-1][1], []).append((at, at + len(part)))
                at += len(part)
            elif part in (BEGIN, END):
                blocks.append(at)
            else:
                loop, message = part[1:-1].split(':')
                open_loops = [open_loop for open_loop, _ in stack]
                if loop in open_loops:  # its next message, also where {% continue %} kept it in the last one
                    del stack[open_loops.index(loop):]
                if message:
                    stack.append((loop, int(message)))
        return ''.join(parts[::2]), places, list(zip(blocks[::2], blocks[1::2]))

    def spans(self, first=0, gen=False):
        """(text, [(start, stop) of each turn of the assistant in messages[first:]])"""
        text, places, blocks = self.segments(gen)
        if text != self.text(gen):
            self.untold(first, 'all')
        if blocks:
            begin = len(self.attempt(self.messages[:first]) or '') if first else 0
            begin = min([place[0][0] for i, place in places.items() if i >= first] or [begin])
            return text, [(start, stop) for start, stop in blocks if start >= begin]
        found, headers = [], {}
        for i, message in enumerate(self.messages):
            if message['role'] == 'assistant' and i >= first:
                runs = places.get(i, [])
                joined = all(a[1] == b[0] for a, b in itertools.pairwise(runs))
                if not runs or not joined:
                    if not runs and not said_words(message):
                        continue
                    self.untold(i, 'content')
                start, stop = runs[0][0], runs[-1][1]
                if i == len(self.messages) - 1 and not gen:
                    stop = len(text)
                before = self.messages[i - 1]['role'] if i else None
                if before not in headers:
                    headers[before] = self.header(i, text[:start])
                found.append(self.turn(i, text[start:stop], start, headers[before]))
        return text, found

    def header(self, i, before):
        """The generation prompt of turn i: what is rendered behind the messages before it."""
        prompt = self.attempt(self.messages[:i], True) if i else None
        if prompt is None:
            return ''
        if prompt.startswith(before):
            return prompt[len(before):]
        return prompt.removeprefix(self.attempt(self.messages[:i]) or prompt)

    def turn(self, i, segment, start, header):
        """(start, stop) of what the model has to write of a turn: from the end of the generation prompt (a
        thought that the prompt opens, and this turn does not, belongs to the turn) to the last control token
        behind its words."""
        message = self.messages[i]
        if not segment.startswith(header):
            header = header[:re.search('<think>|' + self.tok.split_plain.pattern + '|$', header).start()]
        words = message.get('content') if isinstance(message.get('content'), str) else ''
        if words.strip() not in segment:
            words = words.rpartition('</think>')[2]  # history without its thoughts
        self.check(message, i, segment, words)
        at = segment.find(words.strip(), len(header)) if words.strip() else len(header)
        if not segment.startswith(header) or (not header and segment[:at].strip() and words.strip()):
            raise ValueError(f'message {i}: the chat template of {self.tok.name} begins the turn of the '
                             f'assistant with other words than add_generation_prompt adds, so its beginning '
                             f'cannot be told: {PUT_BLOCKS}')
        at = max(at + len(words.strip()), len(header))
        rest = segment[at:]
        stop = max((rest.rfind(token) + len(token) for token in self.tok.special if token in rest), default=0)
        return start + len(header), start + at + (stop or len(rest.rstrip()) or len(rest))

    def check(self, message, i, segment, words):
        """Whatever the assistant said must stand in its turn."""
        if words.strip() not in segment:
            self.untold(i, 'content')
        for call in message.get('tool_calls') or []:
            for leaf in leaves(call.get('function', call)):
                if leaf not in segment and json.dumps(leaf, ensure_ascii=False)[1:-1] not in segment:
                    self.untold(i, 'tool_calls')
        thought = message.get('reasoning_content')
        knows = any(key in self.source for key in THOUGHTS)  # then it may leave those of old turns away
        if isinstance(thought, str) and thought.strip() not in segment and not knows:
            self.untold(i, 'reasoning_content')

    def wrote(self, first=0, gen=False, begin=0):
        """(text, bool per character: written by the assistant in messages[first:], from character begin
        on)"""
        text, spans = self.spans(first, gen)
        wrote = np.zeros(len(text), bool)
        for start, stop in spans:
            wrote[max(start, begin):stop] = True
        return text, wrote


def is_messages(value):
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(m, dict) and isinstance(m.get('role'), str) for m in value)


def said_words(message):
    return any(message.get(key) for key in ('content', 'tool_calls', 'reasoning_content'))


def leaves(value):
    """The texts in a JSON value, but for ids and types."""
    if isinstance(value, str):
        return [value]
    parts = [v for key, v in value.items() if key not in ('id', 'type')] if isinstance(value, dict) else value
    return [leaf for part in parts for leaf in leaves(part)] if isinstance(parts, list) else []


# -----------------------------------------------------------------------------------------------------------
# rows
# -----------------------------------------------------------------------------------------------------------

ALPACA = ('Below is an instruction that describes a task{}. Write a response that appropriately completes '
          'the request.\n\n### Instruction:\n{}\n\n{}### Response:')
SFT_FORMS = ('{"messages": [{"role", "content"}]}, {"prompt", "completion"}, '
             '{"instruction", "input", "output"} or {"text"}')


def alpaca_prompt(row):
    """Stanford Alpaca's prompt, with or without "input"; the answer follows "### Response:" directly, as in
    their training code."""
    extra = row.get('input') or ''
    more = ', paired with an input that provides further context' if extra else ''
    return ALPACA.format(more, row['instruction'], f'### Input:\n{extra}\n\n' if extra else '')


def written(message):
    return {k: v for k, v in message.items() if v is not None or k == 'content'}  # a content may be None


def without_nulls(value):
    """Leaves out the None that a struct column holds for keys that were not written."""
    if isinstance(value, dict):
        value = written(value) if isinstance(value, Record) else value
        return {k: without_nulls(v) for k, v in value.items()}
    return [without_nulls(item) for item in value] if isinstance(value, (list, tuple)) else value


def plain_row(row):
    """A row as the functions below read it: nulls left out, "tools" and "chat_template_kwargs" read where
    they are JSON text."""
    row = {key: without_nulls(value) for key, value in row.items() if value is not None}
    for key, kind in (('tools', list), ('chat_template_kwargs', dict)):
        value = row.pop(key, None)
        if isinstance(value, str):
            try:
                value = json.loads(value) if value.strip() else None
            except ValueError as e:
                raise ValueError(f'{key!r} is text that is no JSON: {e}') from None
        if value is not None and not isinstance(value, kind):
            raise ValueError(f'{key!r} is a {type(value).__name__}, expected a {kind.__name__} (or its JSON '
                             'text)')
        if value:
            row[key] = value
    for key in ('messages', 'prompt', 'completion', 'chosen', 'rejected'):
        if is_messages(row.get(key)):
            row[key] = list(map(written, row[key]))
    return row


def template_args(row):
    """What a row says to the template, as TRL has it."""
    return {key: row[key] for key in ('tools',) if key in row} | row.get('chat_template_kwargs', {})


def prompt_of(row):
    """The prompt of a plain row: a string or messages."""
    if 'prompt' in row:
        return row['prompt']
    if 'instruction' in row:
        return alpaca_prompt(row)
    return row.get('messages')


def encode_prompt(row, tok) -> list[int]:
    """A row with "prompt" (or "messages", "instruction"), or the prompt itself. A string: verbatim (its
    control tokens are plain text) behind the tokenizer's own prefix (Llama's <s>), if it has one. Messages:
    by the chat template with its generation prompt, "tools" and "chat_template_kwargs" of the row in it;
    where the last message is the assistant's, it is continued. With 'byte', 'Q: hi\\nA: ' and [{"role":
    "user", "content": "hi"}] are the same ids."""
    row = plain_row(row if isinstance(row, dict) else {'prompt': row})
    prompt = prompt_of(row)
    if not isinstance(prompt, str) and not is_messages(prompt):
        shown = json.dumps(prompt, default=str)[:60]
        raise ValueError(f'the prompt is {shown}, expected a string or a list of {{"role", "content"}} (keys '
                         f'{sorted(row)})')
    if isinstance(prompt, str):
        return tok.prefix + tok.encode(prompt)
    return tok.encode(Chat(tok, prompt, template_args(row)).prompt(), allow_special=True)


def encode_answer(prompt, answer, tok, args):
    """-> (ids, trained) of a prompt and its answer, encoded as one text, so that every row form of it has the
    same ids. They end where the answer does: what the template writes behind it is no part of it."""
    if not isinstance(answer, str) and not is_messages(answer):
        shown = json.dumps(answer, default=str)[:60]
        raise ValueError(f'the answer is {shown}, expected str or a list of {{"role", "content"}}')
    if isinstance(prompt, str):
        answer = answer if isinstance(answer, str) else answer_text(answer)
        if tok.eot is None:
            raise ValueError(f'tokenizer {tok.name!r} has no end token, so a completion could not end: take '
                             f'one that has (byte, gpt2, an eos_token in its config)')
        ids, alone = tok.prefix + tok.encode(prompt + answer) + [tok.eot], tok.prefix + tok.encode(prompt)
        n = shared(ids, alone)
        return ids, [False] * n + [True] * (len(ids) - n)
    answer = [{'role': 'assistant', 'content': answer}] if isinstance(answer, str) else answer
    begin, first = 0, len(prompt)
    if prompt and prompt[-1]['role'] == 'assistant' == answer[0].get('role'):  # one turn, begun in the prompt
        begin = len(Chat(tok, prompt, args).prompt())
        begun = prompt[-1].get('content') or ''
        whole = {**prompt[-1], **answer[0], 'content': begun + (answer[0].get('content') or '')}
        answer = [whole, *answer[1:]]
        prompt, first = prompt[:-1], first - 1
    ids, trained = tok.encode_marked(*Chat(tok, prompt + answer, args).wrote(first, begin=begin))
    n = max((i + 1 for i, on in enumerate(trained) if on), default=0)
    if not n:
        raise ValueError('no turn of the assistant in the answer: nothing to train on')
    return ids[:n], trained[:n]


def answer_text(answer):
    """The text of an answer to a prompt that is a string."""
    said = answer[0].get('content') if len(answer) == 1 and answer[0]['role'] == 'assistant' else None
    if not isinstance(said, str):
        raise ValueError(f'the answer to a prompt that is a string is a string or one assistant message, got '
                         f'{str(answer)[:80]}')
    return said


def shared(a, b):
    """How many items two lists begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def encode_row(row, tok) -> tuple[list[int], list[bool]]:
    """One SFT row -> (ids, trained). Trained: what the assistant wrote, end tokens included; all of a
    {"text"} row. 'byte': {"prompt": "a", "completion": "b"} -> [97, 98, 256], [False, True, True]. ValueError
    on a row of no known form."""
    row = plain_row(row)
    args = template_args(row)
    if 'messages' in row:
        ids, trained = tok.apply_chat_template(row['messages'], return_mask=True, **args)
    elif 'prompt' in row and 'completion' in row:
        prompt, answer = without_repetition(row['prompt'], row['completion'])
        ids, trained = encode_answer(prompt, answer, tok, args)
    elif 'instruction' in row and 'output' in row:
        ids, trained = encode_answer(alpaca_prompt(row), row['output'], tok, args)
    elif 'text' in row:
        ids, trained = encode_answer('', row['text'], tok, args)
        trained = [True] * len(ids)
    else:
        hint = '; this is a preference row, for reward.py and dpo.py' if 'rejected' in row else ''
        raise ValueError(f'row with the keys {sorted(row)}, expected {SFT_FORMS}{hint}')
    if not any(trained):
        raise ValueError('no turn of the assistant in the row: nothing to train on')
    return ids, trained


def without_repetition(prompt, answer):
    """Answers that are whole conversations begin with the prompt once more: it is taken off."""
    if is_messages(answer) and len(answer) > 1:
        asked = [{'role': 'user', 'content': prompt}] if isinstance(prompt, str) else prompt
        if answer[:len(asked)] == asked and len(answer) > len(asked):
            return asked, answer[len(asked):]
        if answer[0]['role'] != 'assistant' and prompt:
            raise ValueError(f'the answer is a conversation that does not begin with "prompt": '
                             f'{str(answer[0])[:60]}')
    return prompt, answer


def split_pair(row):
    """A preference row as (prompt, chosen, rejected): {"prompt", "chosen", "rejected"}, the answers without
    the prompt where they repeat it; without "prompt" dialogues are cut where they part: strings of HH at
    their last "\\n\\nAssistant:", messages behind the common ones. ValueError names the row's fault."""
    for key in ('chosen', 'rejected'):
        if row.get(key) is None:
            raise ValueError(f'preference row without {key!r} (keys {sorted(row)}): expected '
                             f'{{"prompt", "chosen", "rejected"}}')
    prompt, chosen, rejected = row.get('prompt'), row['chosen'], row['rejected']
    if type(chosen) is not type(rejected) or not isinstance(chosen, (str, list)):
        raise ValueError(f'chosen is {type(chosen).__name__}, rejected {type(rejected).__name__}: expected '
                         f'two strings or two lists of messages')
    if chosen == rejected:
        raise ValueError(f'chosen and rejected are equal: {str(chosen)[:60]!r}')
    if prompt is None and 'instruction' in row:
        prompt = alpaca_prompt(row)
    if prompt is not None:
        asked, chosen = without_repetition(prompt, chosen)
        prompt, rejected = without_repetition(prompt, rejected)
        if asked != prompt:
            raise ValueError('one of chosen and rejected begins with the prompt, the other does not')
    elif isinstance(chosen, list):
        n = shared(chosen, rejected)
        prompt, chosen, rejected = chosen[:n], chosen[n:], rejected[n:]
    else:
        prompt = ''.join(chosen.rpartition('\n\nAssistant:')[:2])
        if not prompt or not rejected.startswith(prompt) or '\n\nHuman:' in rejected[len(prompt):]:
            raise ValueError('preference row without "prompt" whose two texts are no dialogues that share '
                             'all up to the last "\\n\\nAssistant:"')
        chosen, rejected = chosen[len(prompt):], rejected[len(prompt):]
    for key, answer in (('chosen', chosen), ('rejected', rejected)):
        said = [answer]
        if isinstance(answer, list):
            said = [m.get('content') or m.get('tool_calls') for m in answer]
        if not any(str(part or '').strip() for part in said):
            raise ValueError(f'empty completion: {key!r} says nothing')
    return prompt, chosen, rejected


def encode_pair(row, tok) -> tuple[list[int], list[int], list[int]]:
    """One preference row -> (prompt ids, chosen ids, rejected ids), both answers with their end token. The
    forms and faults of split_pair, and pairs that are equal once rendered. 'byte': {"prompt": "a", "chosen":
    "b", "rejected": "c"} -> [97], [98, 256], [99, 256]."""
    row = plain_row(row)
    args, (prompt, *answers) = template_args(row), split_pair(row)
    (chosen, on), (rejected, other_on) = (encode_answer(prompt, answer, tok, args) for answer in answers)
    n = min(on.index(True), other_on.index(True))
    if chosen[:n] != rejected[:n]:
        raise ValueError(f'the chat template of {tok.name} writes the prompt in two ways before the two '
                         f'answers: chosen and rejected must follow the same text')
    if chosen == rejected:
        raise ValueError('chosen and rejected are equal once rendered')
    return chosen[:n], chosen[n:], rejected[n:]


def encode_labelled(row, tok) -> tuple[list[int], list[int]]:
    """One row with a label (KTO) -> (prompt ids, answer ids). {"prompt", "completion"}, or {"messages"} that
    end with the answer."""
    row = plain_row(row)
    if 'messages' in row:
        talk = row.pop('messages')
        row |= {'prompt': talk[:-1], 'completion': talk[-1:]}
    if 'prompt' not in row or not row.get('completion'):
        raise ValueError('a row with "label" has "prompt" and "completion", or "messages" that end with the '
                         'answer')
    ids, trained = encode_row(row, tok)
    first = trained.index(True)
    return ids[:first], ids[first:]


def show_masks(ids, trained, tok):
    """The row as a terminal shows it: green trained, grey not (ANSI)."""
    runs = itertools.groupby(zip(ids, trained), key=lambda pair: bool(pair[1]))
    texts = [('\033[32m' if on else '\033[90m') + tok.decode([i for i, _ in run]) for on, run in runs]
    return ''.join(texts) + '\033[0m'
