"""Columns without copies: Arrow IPC over mmap, `load_dataset`, batching and packing; below them tokenizers and chat templates."""
import bisect
import gzip
import json
import math
import os
import queue
import threading
import weakref

import numpy as np
import torch

# ---------------------------------------------------------------------------------------------------------------------
# part 1: Arrow IPC, load_dataset, Dataset, batching, packing, linter
# ---------------------------------------------------------------------------------------------------------------------

class Dataset:
    """Rows of one table. ds[i] a dict, ds[i:j] a dict of columns, ds['col'] a column."""

    def __init__(self, rows, names=None):
        self._rows = rows
        self.column_names = list(dict.fromkeys(k for r in rows for k in r)) if names is None else names

    def __len__(self):
        return len(self._rows)

    def __getitem__(self, key):
        if isinstance(key, str):
            if key not in self.column_names:
                raise KeyError(f'no column {key!r}: this table has {", ".join(self.column_names)}')
            return [r.get(key) for r in self._rows]
        if isinstance(key, (int, np.integer)):
            return {k: self._rows[key].get(k) for k in self.column_names}
        picked = self.select(range(*key.indices(len(self))) if isinstance(key, slice) else key)
        return {k: picked[k] for k in self.column_names}

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def select(self, indices):
        return Dataset([self._rows[i] for i in indices], self.column_names)

    def shuffle(self, seed=None):
        return self.select(np.random.default_rng(seed).permutation(len(self)).tolist())

    def filter(self, function):
        return self.select([i for i, row in enumerate(self) if function(row)])

    def map(self, function, batched=False, batch_size=1000, remove_columns=None):
        gone, rows = set([remove_columns] if isinstance(remove_columns, str) else remove_columns or []), []
        for i in range(0, len(self), batch_size if batched else 1):
            old = self[i:i + batch_size] if batched else {k: [v] for k, v in self[i].items()}
            new = function(old) if batched else {k: [v] for k, v in function(self[i]).items()}
            cols = {k: v for k, v in old.items() if k not in gone} | dict(new)
            rows += [dict(zip(cols, vals)) for vals in zip(*cols.values(), strict=True)]
        return Dataset(rows)

    def train_test_split(self, test_size, seed=None):
        n = math.ceil(test_size * len(self)) if isinstance(test_size, float) else test_size
        order = np.random.default_rng(seed).permutation(len(self)).tolist()
        return {'train': self.select(order[n:]), 'test': self.select(order[:n])}

    def to_json(self, path):
        with open(path + '.tmp', 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in self)
        os.replace(path + '.tmp', path)


def load_dataset(path):
    """JSONL, JSON (a list of objects or one object a line), .gz of these; one path or several."""
    paths, rows = [path] if isinstance(path, (str, os.PathLike)) else path, []
    for p in map(os.fspath, paths):
        if not os.path.isfile(p):
            raise ValueError(f'{p}: no such file')
        with (gzip.open if p.endswith('.gz') else open)(p, 'rb') as f:
            data = f.read()
        if not data.strip():
            raise ValueError(f'{p}: empty file, expected one JSON object a line')
        if data.lstrip()[:1] == b'[':
            try:
                found = list(enumerate(json.loads(data), 1))
            except ValueError as e:
                raise ValueError(f'{p}:{e.lineno}:{e.colno}: {e.msg}' if hasattr(e, 'lineno') else f'{p}: {e}') from None
        else:
            found = []
            for i, line in enumerate(data.split(b'\n'), 1):
                if line.strip():
                    try:
                        found.append((i, json.loads(line)))
                    except ValueError as e:
                        raise ValueError(f'{p}:{i}:{getattr(e, "colno", 1)}: {getattr(e, "msg", e)}') from None
        for i, row in found:
            if not isinstance(row, dict):
                raise ValueError(f'{p}:{i}:1: expected an object {{...}}, got {json.dumps(row)[:40]}')
            rows.append(row)
    return Dataset(rows)


# --- training side: order, packing, collation, prefetch ---------------------------------------------------------------

def pad(seqs, value=0, side='right'):
    """Sequences of different lengths as one block. seqs: B lists or arrays; returns idx (B, T), mask (B, T) bool, True = real token, T the
    longest. idx is int64; float32 or bool where `value` is a float or bool (log-probs, masks). side 'left' for prompts that are to be
    continued. pad([[5, 6], [7]]) -> [[5, 6], [7, 0]], [[True, True], [True, False]]."""
    if side not in ('left', 'right'):
        raise ValueError(f"pad: side {side!r} is neither 'left' nor 'right'")
    kind = np.bool_ if isinstance(value, bool) else np.float32 if isinstance(value, float) else np.int64
    lengths = np.fromiter(map(len, seqs), np.int64, len(seqs))
    T = int(lengths.max(initial=0))
    mask = np.arange(T) < lengths[:, None] if side == 'right' else np.arange(T) >= T - lengths[:, None]
    idx = np.full((len(seqs), T), value, kind)
    idx[mask] = _flat(seqs, kind)
    return torch.from_numpy(idx), torch.from_numpy(mask)


def _flat(seqs, kind):
    return np.concatenate([np.zeros(0, kind), *(np.asarray(s, kind) for s in seqs)])


def pack(lengths, capacity):
    """Best-fit decreasing: the longest first, each into the fullest bin that still has room (at most 11/9 of the optimum + 1 bins, Johnson
    1973). Returns bins of indices. ValueError on a length > capacity. pack([3, 5, 2, 4], 7) -> [[1, 2], [3, 0]]."""
    lengths = np.asarray(lengths, np.int64).reshape(-1)
    if (lengths > capacity).any():
        i = int(np.argmax(lengths > capacity))
        raise ValueError(f'sequence {i} has {lengths[i]} tokens, more than the capacity {capacity}: cut or drop it, or raise the capacity')
    bins, rooms, having = [], [], {}  # rooms: the distinct free spaces, sorted; having[room]: the bins that have it
    for i, n in zip((order := np.argsort(-lengths, kind='stable')).tolist(), lengths[order].tolist()):
        at = bisect.bisect_left(rooms, n)
        if at == len(rooms):
            bins.append([i])
            b, room = len(bins) - 1, capacity
        else:
            room = rooms[at]
            b = having[room].pop()
            bins[b].append(i)
            if not having[room]:
                del rooms[at], having[room]
        if room - n not in having:
            bisect.insort(rooms, room - n)
            having[room - n] = []
        having[room - n].append(b)
    return bins


def collate_packed(seqs, trained, bins, capacity):
    """Bins of documents, one row a bin, one document after another. seqs, trained: lists of token lists and of bool lists, equally long;
    bins as from pack. Returns idx, targets, doc, all (len(bins), capacity) int64: targets[t] = idx[t+1] where trained[t+1] is True and both
    stand in one document, else -1 (ignored). doc counts from 0 in each row and never falls; the unused tail (idx 0) is a document of its
    own, numbered one above the last. seqs [[5, 6], [7]], all trained, bins [[0, 1]], capacity 4 -> idx [5, 6, 7, 0], targets [6, -1, -1, -1],
    doc [0, 0, 1, 2]."""
    rows = np.repeat(np.arange(len(bins)), [len(b) for b in bins])
    order = [i for b in bins for i in b]
    lengths = np.array([len(seqs[i]) for i in order], np.int64)
    used = np.bincount(rows, lengths, len(bins)).astype(np.int64) if order else np.zeros(len(bins), np.int64)
    if (used > capacity).any():
        raise ValueError(f'bin {int(np.argmax(used > capacity))} holds {used.max()} tokens, more than the capacity {capacity}')
    wrong = [i for i in order if len(seqs[i]) != len(trained[i])]
    if wrong:
        raise ValueError(f'sequence {wrong[0]} has {len(seqs[wrong[0]])} tokens and {len(trained[wrong[0]])} mask entries: they must be as many')
    first = np.cumsum([0, *(len(b) for b in bins)])[rows]  # the number of the row's first document
    slots = np.arange(len(bins) * capacity).reshape(len(bins), capacity)
    live = slots - slots[:, :1] < used[:, None]  # documents stand back to back, so the live slots in order are the tokens in order
    idx, on = np.zeros(live.shape, np.int64), np.zeros(live.shape, bool)
    doc = np.repeat(np.bincount(rows, minlength=len(bins))[:, None], capacity, 1)
    idx[live], on[live] = _flat([seqs[i] for i in order], np.int64), _flat([trained[i] for i in order], np.bool_)
    doc[live] = np.repeat(np.arange(len(order)) - first, lengths)
    targets = np.full(live.shape, -1, np.int64)
    good = on[:, 1:] & (doc[:, 1:] == doc[:, :-1])
    targets[:, :-1][good] = idx[:, 1:][good]
    return {'idx': torch.from_numpy(idx), 'targets': torch.from_numpy(targets), 'doc': torch.from_numpy(doc.astype(np.int64))}


class Sampler:
    """Endless batches of row numbers, int64. The order is that of the GLOBAL batches and the same in every layout: rank r of `world` takes
    the r-th contiguous share of each. Epoch e is the permutation drawn from (seed, e); the epochs are laid end to end and cut into batches,
    so no row is dropped and a batch may straddle two epochs (n < batch_size works). With lengths and bucket, each window of `bucket` batches
    is sorted by length, cut, and its batches shuffled: like lengths meet, little is padded. Batch k is a function of (seed, k) alone:
    the state is one number, a resumed run continues exactly. Sampler(5, 2, seed=0, shuffle=False) -> [0 1] [2 3] [4 0] ..."""

    def __init__(self, n, batch_size, seed, shuffle=True, rank=0, world=1, lengths=None, bucket=0):
        if n < 1 or batch_size < 1:
            raise ValueError(f'Sampler: {n} rows in batches of {batch_size}: both must be at least 1')
        if batch_size % world or not 0 <= rank < world:
            raise ValueError(f'batch_size {batch_size} does not divide over rank {rank} of {world}: make it a multiple of {world}')
        if bucket and (lengths is None or len(lengths) != n):
            raise ValueError(f'Sampler: bucket={bucket} needs the lengths of all {n} rows, got {None if lengths is None else len(lengths)}')
        self.n, self.batch_size, self.seed, self.shuffle, self.rank, self.world = n, batch_size, seed, shuffle, rank, world
        self.lengths, self.bucket = (np.asarray(lengths), bucket) if bucket else (None, 1)
        self.batch, self._epochs, self._window = 0, {}, (-1, None)

    @property
    def epoch(self):
        """Epochs consumed, a float."""
        return self.batch * self.batch_size / self.n

    def _stream(self, lo, hi):
        """Positions lo..hi of the epochs laid end to end."""
        parts = []
        for e in range(lo // self.n, (hi - 1) // self.n + 1):
            if e not in self._epochs:
                order = np.random.default_rng((self.seed, e)).permutation(self.n) if self.shuffle else np.arange(self.n)
                self._epochs = {k: v for k, v in self._epochs.items() if k == e - 1} | {e: order}  # two epochs are enough
            parts.append(self._epochs[e][max(lo - e * self.n, 0):hi - e * self.n])
        return np.concatenate(parts)

    def __iter__(self):
        return self

    def __next__(self):
        w, B = self.batch // self.bucket, self.batch_size
        if self._window[0] != w:
            rows = self._stream(w * self.bucket * B, (w + 1) * self.bucket * B)
            if self.lengths is not None:
                rows = rows[np.argsort(self.lengths[rows], kind='stable')].reshape(self.bucket, B)
                rows = rows[np.random.default_rng((self.seed, w, 1)).permutation(self.bucket)] if self.shuffle else rows
            self._window = w, rows.reshape(self.bucket, B)
        rows, share = self._window[1][self.batch % self.bucket], B // self.world
        self.batch += 1
        return rows[self.rank * share:(self.rank + 1) * share].astype(np.int64)

    def state_dict(self):
        return {'batch': self.batch, 'n': self.n, 'batch_size': self.batch_size, 'seed': self.seed, 'bucket': self.bucket}

    def load_state_dict(self, state):
        """Goes on behind the batch that the state was taken at; rank and world may differ. ValueError if the data or the batches do."""
        mine = self.state_dict()
        for key in mine.keys() - {'batch'}:
            if state[key] != mine[key]:
                raise ValueError(f'the data cursor was saved with {key} {state[key]}, this run has {mine[key]}: resume with the same, or start anew')
        self.batch = int(state['batch'])


class prefetch:
    """Runs `iterator` in a background thread, `depth` items ahead; its exception is raised where its item would have come. state_dict() is
    the state of `sampler` (default: the iterator itself) as of the last item CONSUMED, whatever has been fetched ahead, so a checkpoint
    resumes at the right batch. close() (or `with`, or dropping it) ends the thread.
        batches = prefetch((collate(i) for i in sampler), sampler=sampler)"""

    def __init__(self, iterator, depth=2, sampler=None):
        read = getattr(iterator if sampler is None else sampler, 'state_dict', lambda: None)
        self._state, self._queue, self._room, self._stop = read(), queue.SimpleQueue(), threading.Semaphore(depth), threading.Event()
        self._thread = threading.Thread(target=_fetch, args=(iter(iterator), read, self._queue, self._room, self._stop), daemon=True)
        self._end = weakref.finalize(self, lambda stop, room: (stop.set(), room.release()), self._stop, self._room)
        self._thread.start()

    def __iter__(self):
        return self

    def __next__(self):
        if self._queue is None:
            raise StopIteration
        item, state, error = self._queue.get()
        if error is not None:
            self.close()
            raise error
        self._state = state
        self._room.release()
        return item

    def state_dict(self):
        return self._state

    def close(self):
        self._end()
        self._thread.join()
        self._queue = None

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()


def _fetch(iterator, read, out, room, stop):  # a function, not a method: the thread must not keep its owner alive
    error = None
    while error is None:
        room.acquire()
        if stop.is_set():
            break
        try:
            item = next(iterator)
            out.put((item, read(), None))
        except BaseException as e:
            error = e
            out.put((None, None, e))
    if hasattr(iterator, 'close'):
        iterator.close()


# ---------------------------------------------------------------------------------------------------------------------
# part 2: tokenizers, chat templates, which tokens are trained on
# ---------------------------------------------------------------------------------------------------------------------
import functools
import itertools
import re
import unicodedata

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
        self.spec, self.config, self.name = spec, config, name
        rows = spec.get('added_tokens') or []
        self.added = {t['content']: t['id'] for t in rows}
        self.special = {t['content'] for t in rows if t.get('special')}
        self._all = _any_of(self.added)
        self._plain_added = _any_of(set(self.added) - self.special)  # <think>, <tool_call>: the model writes them, text may hold them
        vocab = {**{t: i for t, i in spec['model']['vocab'].items()}, **self.added} if isinstance(spec['model'].get('vocab'), dict) else self.added
        self.vocab_size = max(len(spec['model'].get('vocab') or ()), 1 + max(vocab.values(), default=-1))
        text = {k: v['content'] if isinstance(v, dict) else v for k, v in config.items() if k.endswith('_token')}
        self.token_texts = {k: v for k, v in text.items() if isinstance(v, str)}  # what a template knows: bos_token, eos_token ...
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
        model's embedding) is nothing, as in HF."""
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
        text = chat.text(add_generation_prompt)
        if not return_mask:
            return self.encode(text, allow_special=True)
        wrote = np.zeros(len(text), bool)
        for a, b in chat.spans(text, gen=add_generation_prompt):
            wrote[a:b] = True
        return self._encode_marked(text, wrote)

    def save(self, folder):
        """tokenizer.json and tokenizer_config.json: get_tokenizer(folder) reads them back, so do transformers and vLLM."""
        os.makedirs(folder, exist_ok=True)
        for file, value in (('tokenizer.json', self.spec), ('tokenizer_config.json', self.config)):
            with open(os.path.join(folder, file + '.tmp'), 'w', encoding='utf-8') as f:
                json.dump(value, f, ensure_ascii=False, indent=None if file == 'tokenizer.json' else 2)
            os.replace(os.path.join(folder, file + '.tmp'), os.path.join(folder, file))


def _blank_words(text, words):
    for w in sorted(words, key=len, reverse=True):
        text = text.replace(w, ' ' * len(w))
    return text


def _any_of(texts):
    """Pattern that splits at the longest of the texts, and keeps it."""
    return re.compile('(' + '|'.join(map(re.escape, sorted(texts, key=len, reverse=True))) + ')' if texts else '((?!))')


class ByteTokenizer(Tokenizer):
    """The 256 bytes and <|endoftext|>: no training, no file, every text."""

    def _plain(self, text):
        return list(text.encode())

    def _bytes(self, i):
        return bytes([i]) if 0 <= i < 256 else EOT.encode() if i == 256 else b''


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

    def decode(self, ids):
        try:
            return self._bpe.decode_bytes(ids).decode(errors='replace')
        except KeyError:
            return super().decode(ids)


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
        return self._run(text, allow_special).ids

    def decode(self, ids):
        return self._lib.decode(list(ids), skip_special_tokens=False)

    def _encode_marked(self, text, wrote):
        got = self._run(text, True)
        return got.ids, [bool(wrote[a:b].any()) for a, b in got.offsets]


def get_tokenizer(name):
    """'byte'; 'char:<meta.json of prepare.py, or a string's file>'; 'gpt2' (from tiktoken's cache or download); a directory with
    tokenizer.json, vocab.json + merges.txt or encoder.json + vocab.bpe; a hub name whose model is in the HF cache."""
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
    if re.fullmatch(r'(openai-community/)?gpt2(-medium|-large|-xl)?', name):
        return _from_spec(*_gpt2(_tiktoken_file), 'gpt2')
    home = os.environ.get('HF_HUB_CACHE') or os.path.join(os.environ.get('HF_HOME') or os.path.expanduser('~/.cache/huggingface'), 'hub')
    repo = os.path.join(home, 'models--' + name.replace('/', '--'))
    if os.path.exists(os.path.join(repo, 'refs', 'main')):
        with open(os.path.join(repo, 'refs', 'main')) as f:
            return _from_dir(os.path.join(repo, 'snapshots', f.read().strip()))
    raise ValueError(f"tokenizer {name!r}: no such directory, and no model of that name in the HF cache; expected 'byte', 'char:<meta.json>', 'gpt2', "
                     'a directory with tokenizer.json, or a hub name whose model was loaded before (--init_from downloads both)')


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
    import hashlib
    import tempfile
    import requests
    from tiktoken.load import read_file_cached
    url = f'https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/{file}'
    cache = os.environ.get('TIKTOKEN_CACHE_DIR') or os.environ.get('DATA_GYM_CACHE_DIR') or os.path.join(tempfile.gettempdir(), 'data-gym-cache')
    try:
        if os.environ.get('HF_HUB_OFFLINE') == '1' and not os.path.exists(os.path.join(cache, hashlib.sha1(url.encode()).hexdigest())):
            raise OSError('offline by HF_HUB_OFFLINE=1')
        return read_file_cached(url, GPT2_FILES[file])
    except (requests.RequestException, OSError) as e:
        raise ValueError(f"tokenizer 'gpt2': {file} is not in tiktoken's cache ({cache}) and could not be downloaded ({type(e).__name__}): give a directory that "
                         'holds encoder.json + vocab.bpe (or tokenizer.json) instead of the name, or set TIKTOKEN_CACHE_DIR') from None


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
BUDGET, MAX_TEMPLATE = 20_000_000, 200_000
GROWS = {'replace', 'join', 'indent', 'center', 'wordwrap', 'format', 'format_map', 'batch', 'slice', 'ljust', 'rjust', 'zfill', 'expandtabs', 'urlize', 'round'}
BEGIN, END = '\U000fffec', '\U000fffed'  # around a {% generation %} block while its place is wanted


@functools.lru_cache(maxsize=32)
def _template(source, thread):
    """(template, words that it contains), compiled once a thread: the budget lives in the environment."""
    import datetime
    import jinja2
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
    if tuple(int(x) for x in re.findall(r'\d+', jinja2.__version__)[:3]) < (3, 1, 6):
        raise ValueError(f'jinja2 {jinja2.__version__} has known holes in its sandbox: pip install -U "jinja2>=3.1.6"')
    if len(source) > MAX_TEMPLATE:
        raise ValueError(f'chat template of {len(source):,} characters, at most {MAX_TEMPLATE:,}')

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(['+', '*', '**', '%'])
        spent, want = 0, False

        def metered(self, value, weight=1, call=0):
            if weight > 1 and hasattr(value, '__iter__') and not hasattr(value, '__len__'):
                value = list(value)  # a lazy filter under a loop
            self.spent += call + weight * (1 + (len(value) if hasattr(value, '__len__') else 0))
            if self.spent > BUDGET:
                raise SecurityError('it computes more than a chat template may: a loop or a text that grows without end?')
            return value

        def product(self, *values):
            cost = 1
            for v in values:
                cost *= max(1, len(v) if isinstance(v, (str, list, tuple, dict)) else min(abs(v), BUDGET) if type(v) is int else 1)
                if isinstance(v, str) and re.search(r'[%{:][^a-z}]*(\d{5}|\*)', v):
                    raise SecurityError('a field width of more than four digits')
            self.metered(None, cost)

        def call_binop(self, context, operator, left, right):
            if operator in '%**' and (isinstance(left, (str, list)) or isinstance(right, (str, list))):
                self.product(left, right)
            if operator == '**' and type(left) is int and type(right) is int and left.bit_length() * abs(right) > 4096:
                raise SecurityError('a power of that size')
            return self.metered(super().call_binop(context, operator, left, right))

        def call(self, context, obj, *args, **kwargs):
            owner = getattr(obj, '__self__', None)
            if getattr(obj, '__name__', '') in GROWS:
                self.product(owner, *args, *kwargs.values())
            self.metered(owner if isinstance(owner, (str, list, dict)) else None, call=50)
            return self.metered(super().call(context, obj, *args, **kwargs))

        def _parse(self, *args):
            tree = super()._parse(*args)
            pay = lambda n, weight=1: nodes.Filter(n, 'metered', [nodes.Const(weight)], [], None, None, lineno=n.lineno)
            for n in list(tree.find_all((nodes.For, nodes.Output, nodes.Concat, nodes.Compare, nodes.Operand, nodes.Filter, nodes.Slice, nodes.Getitem))):
                if isinstance(n, nodes.For):
                    n.iter = pay(n.iter, 1 + sum(1 for b in n.body for _ in b.find_all(nodes.Node)))
                elif isinstance(n, (nodes.Output, nodes.Concat)):
                    n.nodes = [c if isinstance(c, nodes.TemplateData) else pay(c) for c in n.nodes]
                elif isinstance(n, (nodes.Compare, nodes.Operand)):
                    n.expr = pay(n.expr)
                elif getattr(n, 'node', None) is not None and (isinstance(n, nodes.Filter) or isinstance(n.arg, nodes.Slice)):
                    n.node = pay(n.node)
            return tree

    class Generation(Extension):
        tags = {'generation'}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.CallBlock(self.call_method('wrap'), [], [], parser.parse_statements(['name:endgeneration'], drop_needle=True)).set_lineno(line)

        def wrap(self, caller):
            return BEGIN + caller() + END if self.environment.want else caller()

    class Namespace(jinja2.utils.Namespace):  # as in transformers: a name with an underscore would lead to Python's internals
        def __init__(*args, **kwargs):
            jinja2.utils.Namespace.__init__(args[0])
            for key, value in dict(*args[1:], **kwargs).items():
                args[0][key] = value

        def __setitem__(self, key, value):
            if str(key).startswith('_'):
                raise SecurityError(f'namespace attribute {key!r}')
            super().__setitem__(key, value)

    def guarded(f):
        @functools.wraps(f)  # keeps the marks of filters that want the context
        def run(*args, **kwargs):
            env.product(*args, *kwargs.values())
            return f(*args, **kwargs)
        return run

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=min(indent, 16) if isinstance(indent, int) else None, separators=separators, sort_keys=sort_keys)

    env = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, 'jinja2.ext.loopcontrols'])
    env.filters = {k: guarded(f) if k in GROWS else f for k, f in env.filters.items()} | {'metered': env.metered, 'tojson': tojson}
    env.globals.pop('lipsum')
    env.globals |= {'raise_exception': raise_exception, 'strftime_now': lambda form: datetime.datetime.now().strftime(form), 'namespace': Namespace,
                    'dict': lambda *args, **kwargs: dict(*args, **kwargs)}  # the class itself would be a way out
    words = {n.value for n in env.parse(source).find_all(nodes.Const) if isinstance(n.value, str) and n.value.strip()}
    return env.from_string(source), words


class _Chat:
    """One conversation under one template: its text, and the place of each assistant turn in it."""

    def __init__(self, tok, messages, args):
        if not tok.templates:
            raise ValueError(f'tokenizer {tok.name!r} has no chat template: use rows whose prompt is a string, or set chat_template in its tokenizer_config.json')
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) and isinstance(m.get('role'), str) for m in messages):
            raise ValueError(f'messages are a list of {{"role", "content"}}, not empty; got {str(messages)[:80]}')
        try:  # plain JSON values only: other objects bring methods that the sandbox does not know
            self.messages, self.args = json.loads(json.dumps(messages)), {'tools': None, 'documents': None, **json.loads(json.dumps(args))}
        except (TypeError, ValueError) as e:
            raise ValueError(f'messages and template arguments are JSON values: {e}') from None
        for m in self.messages:
            thought = next((m[k] for k in ('reasoning_content', 'thinking', 'reasoning') if m.get(k) is not None), None)
            if thought is not None:  # its three names, as in transformers
                m.update(reasoning_content=thought, thinking=m.get('thinking', thought))
        source = tok.templates.get('tool_use' if self.args['tools'] and 'tool_use' in tok.templates else 'default')
        if source is None:
            raise ValueError(f'tokenizer {tok.name!r} has the chat templates {sorted(tok.templates)}, none named default')
        import jinja2
        self.tok, self.errors = tok, (jinja2.TemplateError, RecursionError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, MemoryError)
        try:
            self.template, self.words = _template(source, threading.get_ident())
        except self.errors as e:
            raise ValueError(f'the chat template of {tok.name}: {e}') from None

    def text(self, gen=False, messages=None, want=False):
        env = self.template.environment
        env.spent, env.want = 0, want
        try:
            return self.template.render(messages=self.messages if messages is None else messages, add_generation_prompt=gen, **{**self.tok.token_texts, **self.args})
        except self.errors as e:
            raise ValueError(f'the chat template of {self.tok.name} refuses these messages: {type(e).__name__}: {e}') from None

    def attempt(self, messages, gen=False):
        try:
            return self.text(gen, messages)
        except ValueError:
            return None  # e.g. a template that wants no turn of the assistant at the end

    def spans(self, text, first=0, gen=False):
        """[(start, end)] in text = self.text(gen) of what the assistant wrote, turns of messages[first:]. A template with {% generation %}
        blocks says so itself. Of any other: find each character's message (_origin), then each turn's start and end (_start, _end)."""
        marked = self.text(gen, want=True)
        if BEGIN in marked:
            head, at, out = len(self.attempt(self.messages[:first]) or '') if first else 0, 0, []
            for n, part in enumerate(re.split(f'[{BEGIN}{END}]', marked)):
                out += [(at, at + len(part))] if n % 2 and at >= head else []
                at += len(part)
            return out
        turns = [i for i, m in enumerate(self.messages) if m['role'] == 'assistant']
        where = self._origin(text, turns, gen)
        return [(self._start(text, where, i), self._end(text, where, i)) for i in turns if i >= first and i in where]

    def _marked(self, text, gen, which, words, fields=None):
        """{message: positions of its characters in text}. In the messages `which` every character but blanks, quotes and the words that the
        template itself contains (it may look for '</think>') becomes one private character a message, and the chat is rendered again.
        Where the two texts agree in all the rest, a private character shows a place; where they do not, the template looked into the
        content, and there is no answer: a wrong one cannot pass."""
        def mark(value, key, char):
            if isinstance(value, str) and key not in ('role', 'type') and (fields is None or key in fields):
                out = re.sub(r'[^\s"\\\x00-\x1f]', char, value)
                for w in words:
                    at = value.find(w)
                    while at >= 0:
                        out, at = out[:at] + w + out[at + len(w):], value.find(w, at + 1)
                return out
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
            prompt = '' if i in where or i not in turns or m.get('content') or m.get('tool_calls') else self.attempt(self.messages[:i], True)
            if prompt and text.startswith(prompt):  # an empty turn: its end token behind the prompt
                where[i] = np.array([len(prompt) - 0.5])
            if i not in where and i in turns and isinstance(m.get('content'), str):  # no word of its own, or empty: an inserted character shows the place
                got = self.attempt([*self.messages[:i], {**m, 'content': m['content'] + '\U00100000'}, *self.messages[i + 1:]], gen) or ''
                at = got.find('\U00100000')
                if at >= 0 and text == got.replace('\U00100000', ''):
                    said = len(m['content']) if text.endswith(m['content'], 0, at) else 0
                    where[i] = np.arange(at - said, at) if said else np.array([at - 0.5])
            if i not in where and i in turns and self.attempt(self.messages[:i] + self.messages[i + 1:], gen) != text:
                raise ValueError(f'message {i}: the chat template of {self.tok.name} rewrites or drops what the assistant said, so its place cannot be told: '
                                 'put {% generation %} ... {% endgeneration %} around the assistant turn in the template')
        return where

    def _start(self, text, where, i):
        """Where the generation prompt ends: it is rendered, and stands in the text as a whole, or (history rewritten) as its own last part."""
        a = int(np.ceil(where[i][0]))
        with_prompt, without = (self.attempt(self.messages[:i], gen) for gen in (True, False))
        if with_prompt is not None and with_prompt != without and text.startswith(with_prompt):
            return len(with_prompt)
        if with_prompt is not None and with_prompt == without and text.startswith(without) and not text[len(without):a].strip():
            return len(without)  # a template without generation prompt, '[INST] hi [/INST]': the blank after it is the assistant's
        prompt = (with_prompt or '')[len(os.path.commonprefix([with_prompt or '', without or ''])):]
        lower = max((int(at[at < a].max()) + 1 for j, at in where.items() if j != i and (at < a).any()), default=0)
        found = text.rfind(prompt, lower, a) if prompt else -1
        return found + len(prompt) if found >= 0 else a

    def _end(self, text, where, i):
        """After the last control token that the template puts behind the turn (<|im_end|>), else after its last mark that is no blank."""
        alone = self.attempt(self.messages[:i + 1])
        at = where[i][where[i] < len(alone)] if alone is not None and text.startswith(alone) else where[i]
        b = int(np.floor(at[-1])) + 1
        content = self.messages[i].get('content')
        tail = re.sub(r'^.*[^\s"\\]', '', _blank_words(content.strip(), self.words), flags=re.S) if isinstance(content, str) else ''
        b += len(tail) if tail and text.startswith(content.strip()[-len(tail):], b) else 0
        if alone is not None and text.startswith(alone):
            own = text[b:len(alone)]
        else:  # rewritten once more turns follow: what stands behind it both then and at the end of a conversation cut here
            own = os.path.commonprefix([text[b:], (alone or '')[b:]]) if alone and alone.startswith(text[:b]) else ''
            for n in range(len(text) if alone and not own else 0, b, -1):
                if alone.endswith(text[b:n]):
                    own = text[b:n]
                    break
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
    text = chat.text()
    spans = chat.spans(text, len(prompt))
    if not spans:
        raise ValueError(f'no turn of the assistant in the answer {str(answer)[:80]}')
    return tok.encode(text[spans[0][0]:spans[-1][1]], allow_special=True)


def alpaca_prompt(row):
    """Stanford Alpaca's prompt, with or without "input"; the answer follows "### Response:" directly, as in their training code."""
    extra = row.get('input') or ''
    return ALPACA.format(', paired with an input that provides further context' if extra else '', row['instruction'], f'### Input:\n{extra}\n\n' if extra else '')


def encode_row(row, tok, **template_args):
    """One SFT row -> (ids [int], trained [bool]). Trained: what the assistant wrote, end tokens included; all of a {"text"} row.
    'byte': {"prompt": "a", "completion": "b"} -> [97, 98, 256], [False, True, True]. ValueError on a row of no known form."""
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
            raise ValueError('row without "prompt" whose two dialogues do not share all up to the last "\\n\\nAssistant:"')
        chosen, rejected = chosen[len(prompt):], rejected[len(prompt):]
    for key, answer in (('chosen', chosen), ('rejected', rejected)):
        said = answer if isinstance(answer, str) else ''.join(str(m.get('content') or m.get('tool_calls') or '') for m in answer)
        if not said.strip():
            raise ValueError(f'empty completion: {key!r} says nothing')
    return prompt, chosen, rejected


def encode_pair(row, tok, **template_args):
    """One preference row -> (prompt_ids, chosen_ids, rejected_ids), both answers with their end token. The forms and faults of split_pair.
    'byte': {"prompt": "a", "chosen": "b", "rejected": "c"} -> [97], [98, 256], [99, 256]."""
    prompt, chosen, rejected = split_pair(row)
    return (encode_prompt(prompt, tok, **template_args), *(encode_reply(prompt, answer, tok, **template_args) for answer in (chosen, rejected)))


def show_masks(ids, trained, tok):
    """The row as a terminal shows it: green trained, grey not (ANSI)."""
    runs = itertools.groupby(zip(ids, trained), key=lambda pair: bool(pair[1]))
    return ''.join(('\033[32m' if t else '\033[90m') + tok.decode([i for i, _ in run]) for t, run in runs) + '\033[0m'

# ---------------------------------------------------------------------------------------------------------------------
# command line: python dataset.py head FILE | lint FILE
# ---------------------------------------------------------------------------------------------------------------------
