"""Labels of preference in an append-only journal, and the reader of a .jsonl that may be growing. For app.py.

    journal = Journal('annotations/labels.jsonl')
    journal.append(journal.blind('What is 2+2?', '4', '5'))     # a pair; which answer is "a" is drawn
    journal.label(journal.next('me')['id'], 'a', by='human')
    path, rows, ties = journal.export()                         # annotations/labels.pref.jsonl, for dpo.py
"""
import json
import os
import random
import re
import time
from typing import NamedTuple

import files
from dataset import load_dataset


class Read(NamedTuple):
    """How far a .jsonl was read: which file it was, bytes, its rows, lines that are no row."""
    inode: int
    at: int
    rows: list
    broken: int


_read = {}  # path -> Read


def parse(line):
    """The object in a text, None where it holds none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def read_rows(path: str) -> tuple:
    """(rows, broken): the objects of a .jsonl that may be growing, and how many lines are none. Only what is
    new since the last call is parsed: the log of a run of days has 100 MB. A log begun anew is another
    file."""
    try:
        with open(path, 'rb') as f:
            stat = os.fstat(f.fileno())
            before = _read.get(path)
            if before is None or before.inode != stat.st_ino or stat.st_size < before.at:
                before = Read(stat.st_ino, 0, [], 0)
            f.seek(before.at)
            whole, newline, half = f.read().rpartition(b'\n')
    except OSError:
        return [], 0
    lines = [line for line in whole.decode('utf-8', 'replace').split('\n') if line.strip()]
    found = [parse(line) for line in lines]
    rows = before.rows + [row for row in found if row is not None]
    broken = before.broken + found.count(None)
    _read[path] = Read(stat.st_ino, before.at + len(whole + newline), rows, broken)
    return rows, broken + bool(half.strip())


def text_in(row: dict, *keys) -> bool:
    """Are these fields of a row all texts? Rows come from files that anybody may have written."""
    return all(isinstance(row.get(key), str) for key in keys)


class Journal:
    """NAME.jsonl. Rows: {"kind": "pair", "id", "prompt", "a", "b", "model_a", "model_b"}, {"kind": "label",
    "id", "pair", "label": "a" | "b" | "tie" | "skip" | "edit", "by", "time"} and {"kind": "undo", "label":
    id}. Nothing is ever changed or removed. A row is on the disk before append() returns; several processes
    may append at once; half a line of a crash is fenced off."""

    def __init__(self, path: str):
        self.name = os.path.basename(path).removesuffix('.jsonl')
        if not re.fullmatch(r'[\w-]{1,60}', self.name):
            raise ValueError(f'{self.name!r}: a name of letters, digits, - and _ is wanted')
        self.path, self.leases = path, {}

    def append(self, *rows):
        """Rows get an id and the time; returned with them."""
        rows = [dict(id=os.urandom(6).hex(), time=round(time.time(), 3)) | row for row in rows]
        lines = ''.join(json.dumps(row) + '\n' for row in rows)
        with files.locked(self.path) as f, open(self.path, 'rb') as written:
            if written.seek(0, 2):
                written.seek(-1, 2)
                lines = lines if written.read() == b'\n' else '\n' + lines
            f.write(lines)
            f.flush()
            os.fsync(f.fileno())
        return rows

    def state(self) -> tuple:
        """(pairs {id: row}, labels {pair id: its last label that was not undone}, broken lines)."""
        rows, broken = read_rows(self.path)
        kinds = {kind: [row for row in rows if row.get('kind') == kind] for kind in ('pair', 'label', 'undo')}
        pairs = {row['id']: row for row in kinds['pair'] if text_in(row, 'id', 'prompt', 'a', 'b')}
        undone = {row['label'] for row in kinds['undo'] if text_in(row, 'label')}
        labels = {}  # in the order of the file: clocks are too coarse to say which label was the last
        for row in kinds['label']:
            whole = text_in(row, 'id', 'pair', 'label') and row['pair'] in pairs
            if whole and row['id'] not in undone and (row['label'] != 'edit' or text_in(row, 'of', 'text')):
                labels.pop(row['pair'], None)
                labels[row['pair']] = row
        return pairs, labels, broken

    def next(self, tab: str, seconds: float = 300):
        """The first pair without a label that no other tab of a browser was shown in the last minutes; None
        without one."""
        pairs, labels, _ = self.state()
        for name in pairs:
            holder, until = self.leases.get(name, (tab, 0))
            if name not in labels and (holder == tab or until < time.time()):
                self.leases[name] = tab, time.time() + seconds
                return pairs[name]
        return None

    def label(self, pair: str, label: str, by: str, **more):
        if label not in ('a', 'b', 'tie', 'skip', 'edit'):
            raise ValueError(f'{label!r} is no label')
        return self.append(dict(kind='label', pair=pair, label=label, by=by, **more))[0]

    def undo(self, who: str) -> dict:
        """Takes back the last label of this person; its pair comes again. ValueError when there is none."""
        mine = [row for row in self.state()[1].values() if who in (row.get('by'), row.get('person'))]
        if not mine:
            raise ValueError(f'no label of yours to take back in {self.name}')
        self.append(dict(kind='undo', label=mine[-1]['id']))
        self.leases.pop(mine[-1]['pair'], None)
        return mine[-1]

    def preferences(self, besides: str = '') -> tuple:
        """(rows {"prompt", "chosen", "rejected"}, ties the same with "tie": true), without the labels by
        `besides`. An edited answer beats the one it was made from."""
        pairs, labels, _ = self.state()
        rows, ties = [], []
        for name, mark in labels.items():
            pair, kind = pairs[name], mark['label']
            if besides and mark.get('by') == besides:
                continue
            if kind in ('a', 'b'):
                loser = 'b' if kind == 'a' else 'a'
                rows.append(dict(prompt=pair['prompt'], chosen=pair[kind], rejected=pair[loser]))
            elif kind == 'edit' and mark['of'] in ('a', 'b') and mark['text'] != pair[mark['of']]:
                rows.append(dict(prompt=pair['prompt'], chosen=mark['text'], rejected=pair[mark['of']]))
            elif kind == 'tie':
                ties.append(dict(prompt=pair['prompt'], chosen=pair['a'], rejected=pair['b'], tie=True))
        return rows, ties

    def beside(self, ending: str, rows: list) -> str:
        """Writes rows to NAME.ENDING.jsonl, a file of the journal's own; returns its path."""
        path = f'{self.path.removesuffix(".jsonl")}.{ending}.jsonl'
        with files.replaced(path, 'w') as f:
            f.writelines(json.dumps(row) + '\n' for row in rows)
        return path

    def export(self) -> tuple:
        """NAME.pref.jsonl and NAME.ties.jsonl -> (path of the first, rows, ties)."""
        rows, ties = self.preferences()
        self.beside('ties', ties)
        return self.beside('pref', rows), len(rows), len(ties)

    def load(self, path: str) -> tuple:
        """Imports preference rows (labelled ones: kept so) or {"prompt", "a", "b"} -> (pairs, labels)."""
        pairs, marks = [], []
        for i, row in enumerate(load_dataset(path), 1):
            given = [row.get('chosen', row.get('a')), row.get('rejected', row.get('b'))]
            if not text_in(row, 'prompt') or not all(isinstance(text, str) for text in given):
                raise ValueError(f'row {i}: wanted "prompt" with "chosen" and "rejected" (or "a" and "b"), '
                                 f'all text; it has {", ".join(row)}')
            pair = self.blind(row['prompt'], *given)
            pairs.append(pair)
            if 'chosen' in row:
                label = 'a' if pair['a'] == given[0] else 'b'
                label = 'tie' if row.get('tie') else label
                marks.append(dict(kind='label', pair=pair['id'], label=label, by='import'))
        self.append(*pairs, *marks)
        return len(pairs), len(marks)

    def blind(self, prompt, x, y, wrote_x='import', wrote_y='import', rng=random) -> dict:
        """A pair of two answers in random order."""
        (a, model_a), (b, model_b) = rng.sample([(x, wrote_x), (y, wrote_y)], 2)
        return dict(kind='pair', id=os.urandom(6).hex(), prompt=prompt, a=a, b=b,
                    model_a=model_a, model_b=model_b)
