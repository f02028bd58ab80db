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
import json
import re

import numpy as np

BYTE_TEMPLATE = ("{% for m in messages %}{% if m.role == 'system' %}{{ m.content + '\\n' }}{% elif m.role == 'user' %}{{ 'Q: ' + m.content + '\\nA: ' }}"
                 "{% elif m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
                 "{% else %}{{ raise_exception('this template knows the roles system, user and assistant') }}{% endif %}{% endfor %}")
BEGIN, END = '\U000ffffc', '\U000ffffd'  # around a {% generation %} block while a mask is wanted; noncharacters-to-be, never in text


def _check_text(text):
    if not isinstance(text, str):
        raise ValueError(f'text to encode is {type(text).__name__}, expected str')
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise ValueError(f'lone surrogate {text[e.start]!a} at character {e.start}: not text; repair the data (errors="replace")') from None


class Tokenizer:
    """Text to ids and back. Attributes: eot (id or None), pad (its own token or None, never eot), bos, vocab_size, special {text: id}, chat_template."""
    name, chat_template, eot, pad, bos = '', None, None, None, None

    def __init__(self, special):
        self.special = special
        self._texts = {i: t for t, i in special.items()}
        self._split = re.compile('(' + '|'.join(map(re.escape, sorted(special, key=len, reverse=True))) + ')') if special else None

    def encode(self, text, allow_special=False):
        """str -> [int]. A special token written in the text is plain text unless allow_special. ValueError: lone surrogates, unknown characters."""
        _check_text(text)
        if not allow_special or not self._split:
            return self._plain(text)
        return [i for n, piece in enumerate(self._split.split(text)) for i in ([self.special[piece]] if n % 2 else self._plain(piece))]

    def decode(self, ids):
        """[int] -> str; bytes that are not UTF-8 (a cut emoji) become U+FFFD."""
        return b''.join(self.token_bytes(i) for i in ids).decode(errors='replace')

    def apply_chat_template(self, messages, add_generation_prompt=False, return_mask=False, **template_args):
        """[{"role", "content"}] -> [int], or ([int], [bool] True = written by the assistant) with return_mask."""
        text, spans = _render(self, messages, add_generation_prompt, template_args, return_mask)
        ids = self.encode(text, allow_special=True)
        if not return_mask:
            return ids
        wrote = np.zeros(len(text.encode()), bool)
        for a, b in spans:
            wrote[len(text[:a].encode()):len(text[:b].encode())] = True
        ends = np.cumsum([len(self.token_bytes(i)) for i in ids], dtype=np.int64)
        return ids, [bool(wrote[a:b].any()) for a, b in zip(np.concatenate([[0], ends[:-1]]).astype(int), ends)]


class ByteTokenizer(Tokenizer):
    """The 256 bytes and <|endoftext|> (256): no training, no file, every text."""
    name, eot, vocab_size, chat_template = 'byte', 256, 257, BYTE_TEMPLATE

    def __init__(self):
        super().__init__({'<|endoftext|>': 256})

    def _plain(self, text):
        return list(text.encode())

    def token_bytes(self, i):
        return b'<|endoftext|>' if i == 256 else bytes([i])


class CharTokenizer(Tokenizer):
    """One id a character, as nanoGPT's shakespeare_char; has no end token."""
    name = 'char'

    def __init__(self, chars):
        super().__init__({})
        self.chars, self.vocab_size = list(chars), len(chars)
        self.ids = {c: i for i, c in enumerate(self.chars)}

    def _plain(self, text):
        try:
            return [self.ids[c] for c in text]
        except KeyError as e:
            raise ValueError(f'character {e.args[0]!r} is not among the {self.vocab_size} of this char tokenizer') from None

    def token_bytes(self, i):
        return self.chars[i].encode()


@functools.lru_cache(maxsize=16)
def _template(source):
    """Compiled once; Jinja2's immutable sandbox set up as HF does."""
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {'generation'}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(['name:endgeneration'], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method('_wrap', [jinja2.nodes.Name('_marks', 'load')]), [], [], body).set_lineno(line)

        def _wrap(self, marks, caller):
            return BEGIN + caller() + END if marks is True else caller()

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, 'jinja2.ext.loopcontrols'])
    env.globals['raise_exception'] = raise_exception
    return env.from_string(source)


def _render(tok, messages, gen, args, want_spans):
    """(text, [(start, end) of what the assistant wrote])"""
    import jinja2
    if not tok.chat_template:
        raise ValueError(f'tokenizer {tok.name!r} has no chat template: use prompts that are strings, or set one in its tokenizer_config.json')
    try:
        text = _template(tok.chat_template).render(messages=messages, add_generation_prompt=gen, _marks=want_spans, eos_token=tok._texts.get(tok.eot, ''), **args)
    except jinja2.TemplateError as e:
        raise ValueError(f'chat template: {e}') from None
    parts, spans, at = re.split(f'[{BEGIN}{END}]', text), [], 0
    for n, part in enumerate(parts):
        if n % 2:
            spans.append((at, at + len(part)))
        at += len(part)
    return ''.join(parts), spans


def get_tokenizer(name):
    """'byte', 'char:<meta.json>'."""
    if name == 'byte':
        return ByteTokenizer()
    if name.startswith('char:'):
        with open(name[5:]) as f:
            return CharTokenizer(json.load(f)['chars'])
    raise ValueError(f"tokenizer {name!r}: expected 'byte' or 'char:<meta.json>'")


# ---- rows: what a stage reads, as ids ----
ALPACA = ('Below is an instruction that describes a task{}. Write a response that appropriately completes the request.\n\n### Instruction:\n{}\n\n{}### Response:')
SFT_FORMS = ('{"messages": [{"role", "content"}]}, {"prompt", "completion"}, {"instruction", "input", "output"} or {"text"}')


def encode_prompt(prompt, tok, **template_args):
    """str: verbatim, special tokens in it are plain text; [{"role", "content"}]: chat template with its generation prompt. -> [int]"""
    if isinstance(prompt, str):
        return tok.encode(prompt)
    return tok.apply_chat_template(prompt, add_generation_prompt=True, **template_args)


def encode_completion(completion, tok, eot=True):
    """str, or a list with one assistant message -> [int] with the end token. 'ok' with 'byte' -> [111, 107, 256]."""
    if isinstance(completion, list):
        if len(completion) != 1 or completion[0].get('role') != 'assistant':
            raise ValueError(f'a completion list holds one assistant message, got roles {[m.get("role") for m in completion]}')
        completion = completion[0]['content']
    if eot and tok.eot is None:
        raise ValueError(f'tokenizer {tok.name!r} has no end token, so a completion cannot end: use one that has (byte, gpt2 ...)')
    return tok.encode(completion) + ([tok.eot] if eot else [])


def alpaca_prompt(row):
    extra = row.get('input') or ''
    return ALPACA.format(', paired with an input that provides further context' if extra else '', row['instruction'], f'### Input:\n{extra}\n\n' if extra else '')


def encode_row(row, tok, **template_args):
    """One SFT row -> (ids [int], trained [bool]); trained = what the assistant wrote and its end token; all of {"text"}."""
    if 'messages' in row:
        return tok.apply_chat_template(row['messages'], return_mask=True, **template_args)
    if 'prompt' in row and 'completion' in row:
        p, c = encode_prompt(row['prompt'], tok, **template_args), encode_completion(row['completion'], tok)
    elif 'instruction' in row and 'output' in row:
        p, c = encode_prompt(alpaca_prompt(row), tok), encode_completion(row['output'], tok)
    elif 'text' in row:
        p, c = [], encode_completion(row['text'], tok)
    else:
        raise ValueError(f'row has the keys {sorted(row)}, expected {SFT_FORMS}')
    return p + c, [False] * len(p) + [True] * len(c)


def encode_pair(row, tok, **template_args):
    """A preference row -> (prompt_ids, chosen_ids, rejected_ids), both answers with their end token."""
    for key in ('chosen', 'rejected'):
        if row.get(key) is None:
            raise ValueError(f'preference row without {key!r} (it has {sorted(row)}): expected {{"prompt", "chosen", "rejected"}}')
    prompt, chosen, rejected = row.get('prompt'), row['chosen'], row['rejected']
    if prompt is None:
        head, mark, chosen = chosen.rpartition('\n\nAssistant:')
        other, _, rejected = rejected.rpartition('\n\nAssistant:')
        if not mark or head != other:
            raise ValueError('row without "prompt" whose two dialogues differ before their last "\\n\\nAssistant:"')
        prompt = head + mark
    if chosen == rejected:
        raise ValueError(f'chosen and rejected are equal: {str(chosen)[:60]!r}')
    for key, answer in (('chosen', chosen), ('rejected', rejected)):
        if isinstance(answer, str) and not answer.strip():
            raise ValueError(f'empty completion: {key!r} has no text')
    return encode_prompt(prompt, tok, **template_args), encode_completion(chosen, tok), encode_completion(rejected, tok)


def show_masks(ids, trained, tok):
    """The row as a terminal shows it: trained tokens green, the rest grey (ANSI)."""
    out, colour = [], None
    for i, t in zip(ids, trained):
        if t != colour:
            out.append('\033[32m' if t else '\033[90m')
            colour = t
        out.append(tok.decode([i]))
    return ''.join(out) + '\033[0m'

# ---------------------------------------------------------------------------------------------------------------------
# command line: python dataset.py head FILE | lint FILE
# ---------------------------------------------------------------------------------------------------------------------
