"""load_dataset and Dataset: JSON lines, JSON, CSV, parquet and Arrow as rows that come back exactly as
written; then the order of training: packing, and batches that a resumed run continues to the row.

    ds = load_dataset('data/toy/sft_train.jsonl')  # also several files, a folder of shards, 'x/*.parquet'
    ds[3] -> {'prompt': ..., }   ds[3:5], ds[[7, 1]] -> {'prompt': [.., ..], }   ds['prompt'] -> Column

A table is a list of record batches (arrow.py) and an index over their rows, so select, shuffle, split and
filter copy nothing. The verbs are those of HF datasets. Nested values keep keys, order, nulls and number
types: where they differ from row to row, they are stored as JSON, as HF's Json feature does.
"""
import bisect
import collections
import contextlib
import csv
import gc
import glob
import gzip
import hashlib
import io
import itertools
import json
import math
import os
import re
import tempfile
import zlib

import numpy as np
import torch

from files import locked, replaced
from arrow import (Array, ArrowError, Batch, Field, Mixed, Type, Writer, build, collect, guard, infer, inside,
                   map_file, read_stream, type_name, unify)

BLOCK = 1 << 20   # bytes of JSON that become one batch
SPILL = (
    64 << 20
)  # bytes of columns that a load holds in memory; what goes beyond lies in an unnamed temporary file
ENDINGS = ('.jsonl', '.json', '.ndjson', '.csv', '.tsv', '.parquet', '.arrow')

# -----------------------------------------------------------------------------------------------------------
# Dataset
# -----------------------------------------------------------------------------------------------------------


class Column:
    """One column of a Dataset, read when asked for: len, [i], [i:j], [[i, j]], iteration, ==."""

    def __init__(self, ds, name):
        self.ds = ds
        self.name = name

    def __len__(self):
        return len(self.ds)

    def __iter__(self):
        for start in range(0, len(self), 1000):
            yield from self[start:start + 1000]

    def __getitem__(self, key):
        if isinstance(key, (int, np.integer)):
            return self.ds.row(key, [self.name])[self.name]
        return self.ds.read(self.ds.places(key), [self.name])[self.name]

    def __eq__(self, other):
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    def __repr__(self):
        return f'Column {self.name!r} of {len(self)} x {type_name(self.ds.types[self.name])}'

    def numpy(self) -> np.ndarray:
        """(n,) numbers or bools; a read-only view where the rows stand together in one batch, else a copy.
        ValueError on nulls."""
        index = self.ds.index
        parts = []
        for batch, start in zip(self.ds.batches, self.ds.starts):
            values = batch.columns()[self.name].numpy()
            if isinstance(index, range) and index.step == 1:
                values = values[max(index.start - start, 0):max(index.stop - start, 0)]
            parts.append(values)
        if isinstance(index, range) and index.step == 1:
            parts = [part for part in parts if len(part)] or parts[:1]
            return parts[0] if len(parts) == 1 else np.concatenate(parts)
        return np.concatenate(parts)[np.asarray(index)]


class Dataset:
    """batches of one struct type, and the rows of them that this table shows: a range or an int64 array.
    features {column: HF feature} holds what says more than the type does (ClassLabel); sources [(first row,
    file)] tells where rows came from."""

    def __init__(self, batches, t, index=None, features=None, sources=()):
        self.batches = batches
        self.type = t
        self.types = {f.name: f.type for f in t.fields}
        self.starts = list(itertools.accumulate((batch.length for batch in batches), initial=0))
        self.index = range(self.starts[-1]) if index is None else index
        self.special = features or {}
        self.sources = sources

    @classmethod
    def from_list(cls, rows):
        """A list of dicts; a missing key is null. [{'a': 1}, {'a': 2.5}] -> a float64."""
        sink = Sink()
        for start in range(0, len(rows), 10000):
            sink.add(rows[start:start + 10000], lambda k, e, start=start: f'row {start + k}: {e}')
        return sink.dataset()

    @classmethod
    def from_dict(cls, columns):
        """{name: values}, all of one length."""
        lengths = {len(values) for values in columns.values()}
        if len(lengths) > 1:
            raise ValueError(f'columns of different lengths: { {k: len(v) for k, v in columns.items()} }')
        return cls.from_list([dict(zip(columns, row)) for row in zip(*columns.values())])

    @property
    def column_names(self):
        return list(self.types)

    @property
    def num_rows(self):
        return len(self)

    @property
    def features(self):
        """{column: HF feature as JSON}"""
        return {name: self.special.get(name) or feature(t) for name, t in self.types.items()}

    def __len__(self):
        return len(self.index)

    def __repr__(self):
        columns = ', '.join(f'{name} {type_name(t)}' for name, t in self.types.items())
        return f"Dataset of {len(self):,} row{'s' * (len(self) != 1)}: {columns}"

    # reading

    def places(self, key):
        """slice, range, numbers or bools -> rows of the batches: a range or an int64 array."""
        n = len(self)
        if isinstance(key, slice):
            return self.index[key]
        at = np.asarray(key if isinstance(key, (list, tuple, np.ndarray)) else list(key))
        if not at.size:
            at = at.astype(np.int64)
        if at.dtype == bool:
            if at.shape != (n,):
                raise IndexError(f'a mask of shape {at.shape} for a dataset of {n} rows')
            at = np.flatnonzero(at)
        if at.dtype.kind not in 'iu' or at.ndim != 1:
            raise TypeError(
                f'rows are chosen by integers, a slice or a mask, got {at.dtype} of shape {at.shape}'
            )
        at = np.where(at < 0, at + n, at).astype(np.int64)
        if at.size and not 0 <= at.min() <= at.max() < n:
            raise IndexError(
                f'row {int(at.max() if at.max() >= n else at.min() - n)} of a dataset of {n} rows'
            )
        if isinstance(self.index, np.ndarray):
            return self.index[at]
        return at * self.index.step + self.index.start

    def row(self, i, names):
        if not -len(self) <= i < len(self):
            raise IndexError(f'row {i} of a dataset of {len(self)} rows')
        place = int(self.index[i])
        b = bisect.bisect_right(self.starts, place) - 1
        columns = self.batches[b].columns()
        place -= self.starts[b]
        return {name: columns[name].item(place) for name in names}

    def read(self, places, names):
        """-> {name: list of Python values}"""
        if isinstance(places, range) and places.step == 1:
            b = bisect.bisect_right(self.starts, places.start) - 1
            if places and places.stop <= self.starts[b + 1]:  # most slices lie in one batch
                columns, first = self.batches[b].columns(), self.starts[b]
                return {name: columns[name].list(places.start - first, places.stop - first) for name in names}
            parts = [
                {name: batch.columns()[name].list(start, stop) for name in names}
                for batch, start, stop in self.pieces(places)
            ]
            return {name: list(itertools.chain.from_iterable(part[name] for part in parts)) for name in names}
        places = np.asarray(places, np.int64)
        which = np.searchsorted(self.starts, places, 'right') - 1
        local = (places - np.asarray(self.starts)[which]).tolist()
        which = which.tolist()
        columns = {b: self.batches[b].columns() for b in set(which)}
        return {name: [columns[b][name].item(row) for b, row in zip(which, local)] for name in names}

    def arrays(self, i: int) -> dict:
        """Row i of columns that are lists of numbers or bools: {name: array}, numbers without a copy."""
        b = bisect.bisect_right(self.starts, int(self.index[i])) - 1
        local = int(self.index[i]) - self.starts[b]
        return {name: column.items(local) for name, column in self.batches[b].columns().items()}

    def pieces(self, places):
        """A range of step 1 -> (batch, first row in it, one past the last)."""
        start = places.start
        b = bisect.bisect_right(self.starts, start) - 1
        while start < places.stop:
            stop = min(places.stop, self.starts[b + 1])
            if start < stop:
                yield self.batches[b], start - self.starts[b], stop - self.starts[b]
            start, b = max(start, stop), b + 1

    def __getitem__(self, key):
        if isinstance(key, (int, np.integer)):
            return self.row(key, self.types)
        if isinstance(key, str):
            self.known([key], KeyError)
            return Column(self, key)
        return self.read(self.places(key), self.types)

    def __iter__(self):
        for start in range(0, len(self), 1000):
            places = self.index[start:start + 1000]
            columns = self.read(places, self.types)
            if columns:
                yield from map(dict, map(zip, itertools.repeat(tuple(columns)), zip(*columns.values())))
            else:
                yield from ({} for _ in places)

    def iter(self, batch_size, drop_last_batch=False):
        """Batches as ds[i:j] gives them."""
        for start in range(0, len(self) - (batch_size - 1 if drop_last_batch else 0), batch_size):
            yield self.read(self.index[start:start + batch_size], self.types)

    # choosing rows and columns

    def choose(self, index):
        return Dataset(self.batches, self.type, index, self.special, self.sources)

    def select(self, indices):
        """The rows at these places: a range, numbers or a mask, any order, repeats allowed."""
        if (
            isinstance(indices, range)
            and indices.step > 0
            and 0 <= indices.start
            and indices.stop <= len(self)
        ):
            return self.choose(self.index[indices.start:indices.stop:indices.step])
        return self.choose(self.places(indices))

    def shuffle(self, seed=None):
        """A random order of the rows, HF datasets' for the same seed."""
        return self.select(np.random.default_rng(seed).permutation(len(self)))

    def train_test_split(self, test_size=0.25, seed=None, shuffle=True):
        """test_size: rows, or a share (rounded up) -> {'train', 'test'}. With one seed HF datasets makes the
        same split."""
        n = len(self)
        count = math.ceil(test_size * n) if isinstance(test_size, float) else test_size
        if not 0 < count < n:
            raise ValueError(
                f'test_size {test_size} of {n} rows leaves one side empty: give a share between 0 and '
                '1, or 1 to '
                f'{n - 1} rows (in a training run: more rows, or --val_dataset=FILE)'
            )
        order = np.random.default_rng(seed).permutation(n) if shuffle else np.roll(np.arange(n), count)
        return {'train': self.select(order[count:]), 'test': self.select(order[:count])}

    def filter(self, function, batched=False, batch_size=1000):
        """The rows for which function(row) holds (batched: function(columns) -> a list of bools)."""
        if batched:
            keep = itertools.chain.from_iterable(map(function, self.iter(batch_size)))
        else:
            keep = map(function, self)
        return self.select(np.fromiter(map(bool, keep), bool))

    def known(self, names, error=ValueError):
        for name in names:
            if name not in self.types:
                raise error(f"no column {name!r}: this dataset has {', '.join(self.types)}")

    def renamed(self, old_names):
        """{new name: old name} -> the same rows with these columns, in this order."""
        self.known(old_names.values())
        t = Type('struct', tuple(Field(new, self.types[old]) for new, old in old_names.items()))
        special = {new: self.special[old] for new, old in old_names.items() if old in self.special}
        return Dataset(
            [batch.recast(t, old_names) for batch in self.batches], t, self.index, special, self.sources
        )

    def select_columns(self, names):
        names = [names] if isinstance(names, str) else names
        return self.renamed({name: name for name in names})

    def remove_columns(self, names):
        names = [names] if isinstance(names, str) else names
        self.known(names)
        return self.renamed({name: name for name in self.types if name not in names})

    def rename_column(self, old, new):
        if new in self.types:
            raise ValueError(f'there is a column {new!r} already')
        self.known([old])
        return self.renamed({new if name == old else name: name for name in self.types})

    def map(self, function, batched=False, batch_size=1000, remove_columns=(), with_indices=False):
        """function(row) -> dict of new or changed values; batched: function(columns) -> columns, of any
        length if the old ones are all removed or replaced. In memory, each time: what is slow belongs in a
        prepare script, whose file opens at once."""
        remove_columns = [remove_columns] if isinstance(remove_columns, str) else list(remove_columns)
        self.known(remove_columns)
        sink = Sink()
        for start in range(0, len(self), batch_size):
            old = self.read(self.index[start:start + batch_size], self.types)
            numbers = range(start, min(start + batch_size, len(self)))
            kept = {name: values for name, values in old.items() if name not in remove_columns}
            if batched:
                new = {**kept, **self.answer(function(old, list(numbers)) if with_indices else function(old))}
                if len({len(values) for values in new.values()}) > 1:
                    lengths = {name: len(values) for name, values in new.items()}
                    raise ValueError(
                        f'map: columns of different lengths {lengths}: name the old ones in remove_columns'
                    )
                rows = [dict(zip(new, row)) for row in zip(*new.values())]
            else:
                rows = []
                for i, values in zip(numbers, zip(*old.values())):
                    row = dict(zip(old, values))
                    new = self.answer(function(row, i) if with_indices else function(row))
                    rows.append({**{name: value for name, value in row.items() if name in kept}, **new})
            sink.add(rows, lambda k, e, start=start: f'map, row {start + k}: {e}')
        return sink.dataset()

    def answer(self, new):
        if not isinstance(new, dict) and new is not None:
            raise ValueError(
                f'map: the function returned {type(new).__name__}, expected a dict of new values (or None)'
            )
        return new or {}

    # files

    def to_arrow(self, path):
        """One Arrow stream, the format of HF datasets' files. Whole or not at all."""
        with replaced(path) as f:
            self.write(f)

    def write(self, f):
        writer = Writer(
            f, self.type, {b'huggingface': json.dumps({'info': {'features': self.features}}).encode()}
        )
        if isinstance(self.index, range) and self.index == range(self.starts[-1]):
            for batch in self.batches:
                writer.write(list(batch.columns().values()), batch.length)
        else:
            for start in range(0, len(self), 10000):
                places = self.index[start:start + 10000]
                columns = self.read(places, self.types)
                writer.write([build(columns[name], t) for name, t in self.types.items()], len(places))
        writer.end()

    def save_to_disk(self, path):
        """A folder that HF's load_from_disk opens. ValueError if there is one already."""
        if os.path.exists(path):
            raise ValueError(f'{path} exists: give another folder, or remove it')
        os.makedirs(path)
        name = 'data-00000-of-00001.arrow'
        self.to_arrow(os.path.join(path, name))
        info = {'citation': '', 'description': '', 'homepage': '', 'license': '', 'features': self.features}
        state = {
            '_data_files': [{'filename': name}],
            '_fingerprint': os.urandom(8).hex(),
            '_format_columns': None,
            '_format_kwargs': {},
            '_format_type': None,
            '_output_all_columns': False,
            '_split': None,
        }
        for file, content in (('dataset_info.json', info), ('state.json', state)):
            with replaced(os.path.join(path, file)) as f:
                f.write(json.dumps(content, indent=2).encode())

    def to_json(self, path):
        """One JSON object a line, UTF-8; .gz compresses. Whole or not at all."""
        with (
            replaced(path) as raw,
            gzip.open(raw, 'wb') if str(path).endswith('.gz') else contextlib.nullcontext(raw) as f,
        ):
            for row in self:
                try:
                    f.write((json.dumps(row, ensure_ascii=False) + '\n').encode())
                except TypeError as e:
                    raise ValueError(
                        f'{path}: {e}: JSON has no such type; map the column to text, or write to_arrow'
                    ) from None


def concatenate(datasets):
    """Datasets end to end; columns that one lacks are null there. ValueError naming the column where the
    types do not meet."""
    t = Type('struct')
    for ds in datasets:
        t = join_types(t, ds.type)
    batches, indices, sources = [], [], []
    base = 0
    for ds in datasets:
        batches += ds.batches if ds.type == t else [batch.recast(t) for batch in ds.batches]
        sources += [(base + first, file) for first, file in ds.sources]
        indices.append(np.asarray(ds.index, np.int64) + base)
        base += ds.starts[-1]
    whole = all(ds.index == range(ds.starts[-1]) for ds in datasets if isinstance(ds.index, range))
    whole = whole and all(isinstance(ds.index, range) for ds in datasets)
    special = {name: value for name, value in datasets[0].special.items()
               if all(ds.special.get(name) == value for ds in datasets)}
    return Dataset(batches, t, None if whole else np.concatenate(indices), special, sources)


def place(rows, i: int, name: str) -> str:
    """'data.jsonl, row 57': where row i stands in the file that it was loaded from, counted from 1, whatever
    was shuffled since. A list of rows has no file: then it is row i of `name`."""
    if not isinstance(rows, Dataset) or not rows.sources:
        return f'{name}, row {i + 1}'
    row = int(rows.index[i])
    first, file = max(source for source in rows.sources if source[0] <= row)
    return f'{file}, row {row - first + 1}'


def feature(t):
    """Type -> HF feature as JSON. list<string> -> {'feature': {'dtype': 'string', '_type': 'Value'}, '_type':
    'List'}"""
    if t.kind == 'struct':
        return {f.name: feature(f.type) for f in t.fields}
    if t.kind in ('list', 'large_list'):
        return {
            'feature': feature(t.fields[0].type),
            '_type': 'LargeList' if t.kind == 'large_list' else 'List',
        }
    return {'_type': 'Json'} if t.kind.endswith('json') else {'dtype': t.kind, '_type': 'Value'}


# -----------------------------------------------------------------------------------------------------------
# load_dataset
# -----------------------------------------------------------------------------------------------------------


def join_types(a, b):
    """Two tables' struct types -> the columns of both."""
    mine, other = ({f.name: f.type for f in t.fields} for t in (a, b))
    fields = []
    for name in mine | other:
        with inside(name):
            fields.append(Field(name, unify(mine.get(name, Type('null')), other.get(name, Type('null')))))
    return Type('struct', tuple(fields))


class Sink:
    """Takes lists of rows, keeps their common type, and makes them a Dataset."""

    def __init__(self):
        self.type = Type('struct')
        self.batches = []  # (batch, its type)
        self.size = 0
        self.spill = None
        self.spans = []    # (rows, type, start, stop) of the streams in the temporary file

    def add(self, rows, where):
        """Rows become a batch. where(k, error) -> the message for a row k that does not fit."""
        try:
            self.put(rows)
        except Mixed:
            low, high = 0, len(rows)
            while low < high:  # a prefix that does not fit keeps failing: bisect for the first row
                middle = (low + high) // 2
                try:
                    self.put(rows[:middle + 1], keep=False)
                    low = middle + 1
                except Mixed as e:
                    high, error = middle, e
            raise ValueError(where(low, error)) from None

    def put(self, rows, keep=True):
        names = dict.fromkeys(itertools.chain.from_iterable(rows))
        columns = {name: [row.get(name) for row in rows] for name in names}
        fields = []
        for name, values in columns.items():
            with inside(name):
                fields.append(Field(name, infer(values)))
        common = join_types(self.type, Type('struct', tuple(fields)))
        t = Type('struct', tuple(f for f in common.fields if f.name in columns))
        arrays = {}
        for f in t.fields:
            with inside(f.name):
                arrays[f.name] = build(columns[f.name], f.type)
        if keep:
            self.type = common
            self.hold(arrays, t, len(rows))

    def hold(self, arrays, t, length):
        """Keeps a batch: in memory, or in the temporary file."""
        self.size += sum(array.nbytes() for array in arrays.values())
        if self.size <= SPILL:
            self.batches.append((Batch(length, lambda: arrays), t))
            return
        self.spill = self.spill or tempfile.TemporaryFile()
        start = self.spill.tell()
        writer = Writer(self.spill, t)
        writer.write(list(arrays.values()), length)
        writer.end()
        self.spans.append((t, start, self.spill.tell()))

    def dataset(self, sources=()):
        if self.spill:
            self.spill.flush()
            view = map_file(self.spill)
            for t, start, stop in self.spans:
                self.batches += [(batch, t) for batch in read_stream(view[start:stop], 'temporary file')[2]]
        batches = [batch if t == self.type else batch.recast(self.type) for batch, t in self.batches]
        return Dataset(batches, self.type, sources=sources)


def load_dataset(path) -> Dataset:
    """A file, or several in order as one dataset: .jsonl, .json (a list of objects, or one a line), .csv,
    .tsv (every value a text), each also .gz; .arrow (stream or file), .parquet where pyarrow is installed, a
    folder of save_to_disk, a folder or a glob of shards. A missing key is null, int and float are float64.
    ValueError of one line for what cannot be read."""
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    files = [file for p in map(os.fspath, paths) for file in shards(p)]
    if not files:
        raise ValueError('load_dataset: no files given')
    collecting = gc.isenabled()
    gc.disable()  # rows make no cycles, but so many of them would be looked for
    try:
        loaded = [load_file(file) for file in files]
    finally:
        if collecting:
            gc.enable()
    if len(loaded) == 1:
        return loaded[0]
    t = loaded[0].type
    for file, ds in zip(files, loaded):
        try:
            t = join_types(t, ds.type)
        except Mixed as e:
            raise ValueError(f'{file}: {e} in the files before') from None
    return concatenate(loaded)


def shards(path):
    """The files that a path stands for."""
    if not os.path.isdir(path):
        found = sorted(glob.glob(path)) if glob.has_magic(path) and not os.path.exists(path) else [path]
        if not found:
            raise ValueError(f'{path}: no file matches')
        return found
    splits = os.path.join(path, 'dataset_dict.json')
    if os.path.exists(splits):
        names = read_json(splits, 'splits')
        if len(names) != 1:
            raise ValueError(
                f"{path} holds the splits {', '.join(names)}: give one of them, "
                f"{os.path.join(path, names[0])}"
            )
        return shards(os.path.join(path, names[0]))
    state = os.path.join(path, 'state.json')
    if os.path.exists(state):
        with guard(state):
            found = [
                os.path.join(path, os.path.basename(str(file['filename'])))
                for file in read_json(state, '_data_files')
            ]
            missing = [file for file in found if not os.path.isfile(file)]
            if missing:
                raise ArrowError(f'{missing[0]} is missing')
        return found or [path]
    names = sorted(os.listdir(path))
    found = [
        name for name in names if name.removesuffix('.gz').endswith(ENDINGS) and not name.endswith('.json')
    ]
    kinds = sorted({re.match('train|test|val|dev|', name)[0] for name in found})
    if not found:
        raise ValueError(
            f'{path} is a folder without data files: give a folder that save_to_disk made, or one of '
            '.parquet, '
            '.jsonl or .arrow shards'
        )
    if len(kinds) > 1:
        raise ValueError(
            f"{path} holds the splits {', '.join(kinds)}: give one of them, "
            f"'{os.path.join(path, kinds[-1])}*'"
        )
    return [os.path.join(path, name) for name in found]


def read_json(path, key):
    try:
        with open(path, 'rb') as f:
            return json.load(f)[key]
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise ArrowError(f'{path}: corrupt ({type(e).__name__}: {e})') from None


def load_file(path):
    if os.path.isdir(path):  # a folder of save_to_disk with no rows, as HF writes it
        return Dataset([], Type('struct'))
    if not os.path.isfile(path):
        raise ValueError(f'{path}: no such file')
    sources = ((0, path),)
    with open(path, 'rb') as raw:
        zipped = raw.read(2) == b'\x1f\x8b'
    kind = os.path.splitext(path.removesuffix('.gz'))[1]
    with gzip.open(path) if zipped else open(path, 'rb') as f:
        try:
            head = f.read(256).removeprefix(b'\xef\xbb\xbf').lstrip()
            f.seek(0)
            if kind == '.arrow' or head[:6] == b'ARROW1' or head[:4] == b'\xff\xff\xff\xff':
                return from_arrow(map_file(f), path, sources)
            if kind == '.parquet':
                return load_parquet(path, sources)
            sink = Sink()
            if kind in ('.csv', '.tsv'):
                load_csv(f, path, sink, '\t' if kind == '.tsv' else ',')
            elif head[:1] == b'[':
                load_list(f, path, sink)
            elif head[:1] == b'{' or kind in ('.jsonl', '.json', '.ndjson'):
                load_lines(f, path, sink)
            else:
                raise ValueError(
                    f"{path}: not one of {', '.join(ENDINGS)} (each text also .gz), nor a folder of them"
                )
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise ValueError(f'{path}: corrupt gzip data ({e})') from None
    ds = sink.dataset(sources)
    if not len(ds):
        raise ValueError(f"{path}: the file is {'without rows' if os.path.getsize(path) else 'empty'}")
    return ds


def from_arrow(view, path, sources):
    t, metadata, batches = read_stream(view, path)
    special = {}
    with contextlib.suppress(
        ValueError, AttributeError, TypeError
    ):  # another program's metadata under that key
        found = json.loads(metadata.get(b'huggingface', b'{}')).get('info', {}).get('features', {})
        special = {
            f.name: found[f.name] for f in t.fields if f.name in found and found[f.name] != feature(f.type)
        }
    return Dataset(batches, t, None, special, sources)


def load_parquet(path, sources):
    """pyarrow reads it batch by batch into a temporary Arrow stream, which is mapped."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            f'{path}: parquet is read by pyarrow, which is not installed: pip install pyarrow'
        ) from None
    spill = tempfile.TemporaryFile()
    try:
        with pyarrow.parquet.ParquetFile(path) as f:
            plain = [
                field.with_type(field.type.value_type) if pyarrow.types.is_dictionary(field.type) else field
                for field in f.schema_arrow
            ]
            schema = pyarrow.schema(plain, f.schema_arrow.metadata)
            with pyarrow.ipc.new_stream(spill, schema) as writer:
                for batch in f.iter_batches():
                    writer.write_batch(batch.cast(schema))
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f'{path}: {" ".join(str(e).split())}') from None
    spill.flush()
    return from_arrow(map_file(spill), path, sources)


def load_lines(f, path, sink):
    """One JSON object a line; blank lines are skipped."""
    number = 1
    while lines := f.readlines(BLOCK):
        rows, numbers = [], []
        if number == 1:
            lines[0] = lines[0].removeprefix(b'\xef\xbb\xbf')
        for number, line in enumerate(lines, number):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                if not line.isspace():
                    raise ValueError(f'{path}:{number}{bad_line(line, e)}') from None
                continue
            if type(row) is not dict:
                shown = line.decode(errors='replace').strip()[:40]
                raise ValueError(f'{path}:{number}:1: expected an object {{...}}, got {shown}')
            rows.append(row)
            numbers.append(number)
        number += 1
        if rows:
            sink.add(rows, lambda k, e, numbers=numbers: f'{path}:{numbers[k]}: {e}')


def bad_line(line, error):
    """':column: what is wrong' with a line that is no JSON value."""
    try:
        text = line.decode().rstrip()
    except UnicodeDecodeError as e:
        return f':{e.start + 1}: not UTF-8 ({e.reason})'
    if isinstance(error, json.JSONDecodeError):
        column = min(error.pos, len(text)) + 1
        return f':{column}: {error.msg}; expected one JSON object a line, or one list of objects'
    return f': {error}'


def load_list(f, path, sink):
    """One JSON list of objects."""
    try:
        text = f.read().decode('utf-8-sig')
        rows = json.loads(text)
    except UnicodeDecodeError as e:
        raise ValueError(f'{path}: not UTF-8 at byte {e.start} ({e.reason})') from None
    except json.JSONDecodeError as e:
        raise ValueError(f'{path}:{e.lineno}:{e.colno}: {e.msg}') from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{path}: {e}') from None
    for i, row in enumerate(rows):
        if type(row) is not dict:
            raise ValueError(
                f'{path}: item {i + 1} of the list: expected an object {{...}}, got {json.dumps(row)[:40]}'
            )
    for start in range(0, len(rows), 10000):
        sink.add(
            rows[start : start + 10000],
            lambda k, e, start=start: f'{path}: item {start + k + 1} of the list: {e}',
        )


def load_csv(f, path, sink, delimiter):
    """Separated values with a header. Every value is a text, so that "02134" stays what it is; an empty one
    is null."""
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.TextIOWrapper(f, 'utf-8-sig', newline=''), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError(f'{path}:1: two columns with one name: {", ".join(names)}')
        rows = []
        for values in itertools.chain(reader, [None]):
            if values and len(values) != len(names):
                raise ValueError(
                    f'{path}:{reader.line_num}: {len(values)} fields, the header has {len(names)}'
                )
            if values:
                rows.append({name: value or None for name, value in zip(names, values)})
            if rows and (values is None or len(rows) == 10000):
                sink.add(rows, lambda k, e: f'{path}: {e}')
                rows = []
    except csv.Error as e:
        raise ValueError(f'{path}:{reader.line_num}: {e}') from None
    except UnicodeDecodeError as e:
        raise ValueError(f'{path}: behind line {reader.line_num}: not UTF-8 ({e.reason})') from None
    if sink.batches:
        sink.type = Type('struct', tuple(Field(f.name, Type('string')) for f in sink.type.fields))


# -----------------------------------------------------------------------------------------------------------
# encoded rows: 4 bytes a token, in mapped pages
# -----------------------------------------------------------------------------------------------------------

CACHED_FROM = 10_000  # rows of a table; fewer are encoded in a second


class Items:
    """What a stage makes of rows: a sequence of tuples of token ids, masks and numbers. They lie in Arrow
    batches, 4 bytes a token, in memory or in a mapped file, and are read when they are asked for: a list
    comes back as a list, an int64 or bool array as such an array. index: the entries that are shown."""

    def __init__(self, batches, index):
        self.batches = batches
        self.starts = list(itertools.accumulate((batch.length for batch in batches), initial=0))
        self.index = index

    def __len__(self):
        return len(self.index)

    def __getitem__(self, key):
        if isinstance(key, slice):
            return Items(self.batches, self.index[key])
        entry = int(self.index[key])
        b = bisect.bisect_right(self.starts, entry) - 1
        columns = list(self.batches[b].columns().items())[len(ABOUT):]
        return tuple(stored_value(name, column, entry - self.starts[b]) for name, column in columns)


# of an entry: the row that it comes from, has that row an item at all, what there is to say of the row
ABOUT = (Field('row', Type('int64')), Field('kept', Type('bool')), Field('note', Type('string')))


def item_fields(item):
    """The columns that hold a tuple's values; a name tells which Python type comes back."""
    fields = []
    for i, value in enumerate(item):
        if hasattr(value, '__len__'):
            bools = np.asarray(value).dtype == bool
            t = Type('list', (Field('item', Type('bool' if bools else 'int32')),))
        else:
            t = infer([value])
        fields.append(Field(f'{i} {type(value).__name__}', t))
    return tuple(fields)


def stored_column(values, t):
    if t.kind != 'list':
        return build(values, t)
    item = t.fields[0].type
    data = flat(values, bool if item.kind == 'bool' else np.int32)
    bits = np.packbits(data, bitorder='little') if item.kind == 'bool' else data
    offsets = np.cumsum([0, *map(len, values)], dtype=np.int32)
    return Array(t, len(values), None, None, offsets, (Array(item, len(data), None, bits),))


def stored_value(name, column, i):
    if column.type.kind != 'list':
        return column.item(i)
    values = column.items(i)
    if name.endswith('list'):
        return values.tolist()
    return values if values.dtype == bool else values.astype(np.int64)


def entries(rows, encode, name):
    """(number of the row in its table, item, note) of all rows, in order; the item of a row without one is
    (). ValueError with file and row of what encode refuses."""
    for i, row in enumerate(rows):
        try:
            items, note = encode(row)
        except ValueError as e:
            raise ValueError(f'{place(rows, i, name)}: {e}') from None
        number = int(rows.index[i]) if isinstance(rows, Dataset) else i
        for item in items or [()]:
            yield number, item, note
            note = ''


def write_items(f, rows, encode, name):
    """All entries as an Arrow stream."""
    stream, first = entries(rows, encode, name), []
    for entry in stream:
        first.append(entry)
        if entry[1]:
            break
    fields = item_fields(first[-1][1] if first else ())  # the first item tells the columns
    nothing = tuple([] if field.type.fields else 0 for field in fields)
    t = Type('struct', ABOUT + fields)
    writer, stream = Writer(f, t), itertools.chain(first, stream)
    while chunk := list(itertools.islice(stream, 1000)):
        table = [(number, bool(item), note, *(item or nothing)) for number, item, note in chunk]
        writer.write([stored_column(values, f.type) for f, values in zip(t.fields, zip(*table))], len(table))
    writer.end()


def cache_path(rows, key):
    """Where the items of these rows lie beside the first file of their table; None for a small table. The
    name is the hash of the table's values and of key(), the text of all else that the items depend on."""
    if not isinstance(rows, Dataset) or not rows.sources or rows.starts[-1] < CACHED_FROM:
        return None
    digest = hashlib.sha256(f'{rows.type}{key()}'.encode())
    for batch in rows.batches:
        nodes, buffers = [], []
        for column in batch.columns().values():
            collect(column, nodes, buffers)
        digest.update(repr(nodes).encode())
        for buffer in buffers:
            digest.update(buffer)
    return f'{rows.sources[0][1]}.{digest.hexdigest()[:16]}.encoded'


def write_cache(path, rows, encode, name):
    """One of several processes writes, the others wait for it."""
    lock = path.removesuffix('encoded') + 'lock'
    with locked(lock):
        try:
            if not os.path.exists(path):
                with replaced(path) as f:
                    write_items(f, rows, encode, name)
        finally:
            os.unlink(lock)


def encoded(rows, encode, name: str, key):
    """(Items of all rows, Counter of the notes). encode(row) -> ([item, ...], note). A large table is encoded
    once, into a file beside its own, which is mapped from then on: a million rows lie in the page cache, not
    in Python's memory. Rows that are a small part of their table, and those in a folder that cannot be
    written, stay in memory."""
    path = cache_path(rows, key)
    if path and not os.path.exists(path) and len(rows) >= 0.9 * rows.starts[-1]:
        try:
            write_cache(path, rows.choose(range(rows.starts[-1])), encode, name)
        except OSError as e:
            print(f'{path}: {e.strerror}: the encoded rows stay in memory')
    if path and os.path.exists(path):
        with open(path, 'rb') as f:
            return chosen_items(read_stream(map_file(f), path)[2], np.asarray(rows.index))
    f = io.BytesIO()
    write_items(f, rows, encode, name)
    return chosen_items(read_stream(f.getbuffer(), name)[2])


def chosen_items(batches, rows=None):
    """(Items, their notes) of all entries in order, or of those of the given rows, where `row` ascends."""
    def column(name):
        return [batch.columns()[name] for batch in batches]
    index = np.arange(sum(batch.length for batch in batches))
    if rows is not None:
        numbers = np.concatenate([c.numpy() for c in column('row')])
        first = np.searchsorted(numbers, rows)
        counts = np.searchsorted(numbers, rows, 'right') - first
        index = np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
    kept = np.concatenate([np.zeros(0, bool), *(c.numpy() for c in column('kept'))])
    notes = list(itertools.chain.from_iterable(c.list(0, c.length) for c in column('note')))
    notes = collections.Counter(notes[i] for i in index.tolist() if notes[i])
    return Items(batches, index[kept[index]]), notes


# -----------------------------------------------------------------------------------------------------------
# training: padding, packing, order
# -----------------------------------------------------------------------------------------------------------


def pad(seqs, value=0, side='right'):
    """Sequences of different lengths as one block. seqs: B lists or arrays; returns idx (B, T), mask (B, T)
    bool, True = real token, T the longest. idx is int64; float32 or bool where `value` is a float or bool
    (log-probs, masks). side 'left' for prompts that are to be continued. pad([[5, 6], [7]]) -> [[5, 6], [7,
    0]], [[True, True], [True, False]]."""
    if side not in ('left', 'right'):
        raise ValueError(f"pad: side {side!r} is neither 'left' nor 'right'")
    dtype = {bool: np.bool_, float: np.float32}.get(type(value), np.int64)
    lengths = np.fromiter(map(len, seqs), np.int64, len(seqs))
    T = int(lengths.max(initial=0))
    mask = np.arange(T) < lengths[:, None]
    if side == 'left':
        mask = mask[:, ::-1].copy()
    idx = np.full((len(seqs), T), value, dtype)
    idx[mask] = flat(seqs, dtype)
    return torch.from_numpy(idx), torch.from_numpy(mask)


def flat(seqs, dtype):
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(seq, dtype) for seq in seqs)])


def pack(lengths, capacity):
    """Best-fit decreasing: the longest first, each into the fullest bin that still has room (at most 11/9 of
    the optimum + 1 bins, Johnson 1973). Returns bins of indices. ValueError on a length > capacity. pack([3,
    5, 2, 4], 7) -> [[1, 2], [3, 0]]."""
    lengths = np.asarray(lengths, np.int64).reshape(-1)
    if (lengths > capacity).any():
        i = int(np.argmax(lengths > capacity))
        raise ValueError(
            f'sequence {i} has {lengths[i]} tokens, more than the capacity {capacity}: cut or drop it, '
            'or raise '
            'the capacity'
        )
    bins = []
    rooms = []   # the distinct free spaces, sorted
    having = {}  # free space -> the bins that have it
    order = np.argsort(-lengths, kind='stable')
    for i, length in zip(order.tolist(), lengths[order].tolist()):
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            b, room = len(bins), capacity
            bins.append([i])
        else:
            room = rooms[at]
            b = having[room].pop()
            bins[b].append(i)
            if not having[room]:
                del rooms[at], having[room]
        if room - length not in having:
            bisect.insort(rooms, room - length)
            having[room - length] = []
        having[room - length].append(b)
    return bins


def collate_packed(seqs, trained, bins, capacity):
    """Bins of documents, one row a bin, one document after another. seqs, trained: lists of token lists and
    of bool lists, equally long; bins as from pack. Returns idx, targets, doc, all (len(bins), capacity)
    int64: targets[t] = idx[t+1] where trained[t+1] is True and both stand in one document, else -1 (ignored).
    doc counts from 0 in each row; the unused tail (idx 0) is a document of its own, numbered one above the
    last. seqs [[5, 6], [7]], all trained, bins [[0, 1]], capacity 4 -> idx [5, 6, 7, 0], targets [6, -1, -1,
    -1], doc [0, 0, 1, 2]."""
    idx = np.zeros((len(bins), capacity), np.int64)
    on = np.zeros(idx.shape, bool)
    doc = np.zeros(idx.shape, np.int64)
    for row, members in enumerate(bins):
        at = 0
        for number, i in enumerate(members):
            end = at + len(seqs[i])
            if len(seqs[i]) != len(trained[i]):
                raise ValueError(
                    f'sequence {i} has {len(seqs[i])} tokens and {len(trained[i])} mask entries: they '
                    'must be as many'
                )
            if end > capacity:
                used = sum(len(seqs[i]) for i in members)
                raise ValueError(f'bin {row} holds {used} tokens, more than the capacity {capacity}')
            idx[row, at:end] = seqs[i]
            on[row, at:end] = trained[i]
            doc[row, at:end] = number
            at = end
        doc[row, at:] = len(members)
    targets = np.full(idx.shape, -1, np.int64)
    counts = on[:, 1:] & (doc[:, 1:] == doc[:, :-1])
    targets[:, :-1][counts] = idx[:, 1:][counts]
    return {'idx': torch.from_numpy(idx), 'targets': torch.from_numpy(targets), 'doc': torch.from_numpy(doc)}


class Sampler:
    """Endless batches of row numbers, int64, the same in every layout. Epoch e is the permutation drawn from
    (seed, e); the epochs are laid end to end and cut into batches, so no row is dropped and a batch may
    straddle two epochs (n < batch_size works). Batch k is a function of (seed, k) alone: the state is one
    number, a resumed run continues exactly. Sampler(5, 2, seed=0, shuffle=False) -> [0 1] [2 3] [4 0] ..."""

    def __init__(self, n, batch_size, seed, shuffle=True):
        if n < 1 or batch_size < 1:
            raise ValueError(f'Sampler: {n} rows in batches of {batch_size}: both must be at least 1')
        self.n = n
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.batch = 0
        self.orders = {}  # epoch -> its permutation; two are enough

    @property
    def epoch(self):
        """Epochs consumed, a float."""
        return self.batch * self.batch_size / self.n

    def order(self, epoch):
        if epoch not in self.orders:
            rng = np.random.default_rng((self.seed, epoch))
            new = rng.permutation(self.n) if self.shuffle else np.arange(self.n)
            self.orders = {e: order for e, order in self.orders.items() if e == epoch - 1} | {epoch: new}
        return self.orders[epoch]

    def __iter__(self):
        return self

    def __next__(self):
        start = self.batch * self.batch_size
        stop = start + self.batch_size
        self.batch += 1
        epochs = range(start // self.n, (stop - 1) // self.n + 1)
        parts = [self.order(e)[max(start - e * self.n, 0):stop - e * self.n] for e in epochs]
        return np.concatenate(parts).astype(np.int64)

    def state_dict(self):
        return {'batch': self.batch, 'n': self.n, 'batch_size': self.batch_size, 'seed': self.seed}

    def load_state_dict(self, state):
        """Goes on behind the batch that the state was taken at. ValueError if the data or the batches are
        others."""
        mine = self.state_dict()
        for key in ('n', 'batch_size', 'seed'):
            if state[key] != mine[key]:
                raise ValueError(
                    f'the data cursor was saved with {key} {state[key]}, this run has {mine[key]}: '
                    'resume with the '
                    'same, or start anew'
                )
        self.batch = int(state['batch'])
