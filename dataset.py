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
import functools
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
from arrow import (ArrowError, Field, Mixed, Type, Writer, build, collect, guard, infer, inside, map_file,
                   read_stream, type_name, unify)

BLOCK = 1 << 20   # bytes of JSON that become one batch
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
        return self.ds.get(key, [self.name])[self.name]

    def __eq__(self, other):
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    def __repr__(self):
        return f'Column {self.name!r} of {len(self)} x {type_name(self.ds.types[self.name])}'

    def numpy(self) -> np.ndarray:
        """(n,) numbers or bools; of rows that follow each other in one batch a read-only view, else a copy.
        ValueError on nulls."""
        parts = [batch.columns()[self.name].numpy() for batch in self.ds.batches]
        values, index = parts[0] if len(parts) == 1 else np.concatenate(parts), self.ds.index
        if isinstance(index, range) and index.step == 1:
            return values[index.start:index.stop]
        return values[np.asarray(index)]


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
        sink.add(rows, lambda k, e: f'row {k}: {e}')
        return sink.dataset()

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
        """slice, range, numbers or a mask of bools -> rows of the batches: a range or an int64 array."""
        if isinstance(key, slice):
            return self.index[key]
        n, index = len(self), self.index
        if isinstance(key, range) and key.step > 0 and 0 <= key.start and key.stop <= n:
            return index[key.start:key.stop:key.step]
        at = np.asarray(key)
        if at.dtype == bool and at.shape == (n,):
            at = np.flatnonzero(at)
        if at.ndim != 1 or at.size and at.dtype.kind not in 'iu':
            raise TypeError(f'rows are chosen by integers, a slice or {n} bools, got {at.dtype} of shape '
                            f'{at.shape}')
        at = np.where(at < 0, at + n, at).astype(np.int64)
        if ((at < 0) | (at >= n)).any():
            raise IndexError(f'rows {at.min()} to {at.max()} of a dataset of {n} rows')
        return index.start + at * index.step if isinstance(index, range) else index[at]

    def find(self, place):
        """(batch, row in it)"""
        b = bisect.bisect_right(self.starts, place) - 1
        return self.batches[b], place - self.starts[b]

    def get(self, key, names):
        """These columns of one row, or of several: {name: value or list}."""
        if not isinstance(key, (int, np.integer)):
            return self.read(self.places(key), names)
        if not -len(self) <= key < len(self):
            raise IndexError(f'row {key} of a dataset of {len(self)} rows')
        batch, row = self.find(int(self.index[key]))
        columns = batch.columns()
        return {name: columns[name].item(row) for name in names}

    def read(self, places, names):
        """{name: list of Python values}; rows that stand together in a batch are read together."""
        if not isinstance(places, range) or places.step != 1:
            found = [(batch.columns(), row) for batch, row in map(self.find, map(int, places))]
            return {name: [columns[name].item(row) for columns, row in found] for name in names}
        parts, at = [], places.start
        while at < places.stop:
            batch, start = self.find(at)
            stop = min(batch.length, start + places.stop - at)
            at += stop - start
            columns = batch.columns()
            parts.append({name: columns[name].list(start, stop) for name in names})
        if len(parts) == 1:  # nearly always
            return parts[0]
        return {name: [value for part in parts for value in part[name]] for name in names}

    def __getitem__(self, key):
        if isinstance(key, str):
            self.known([key], KeyError)
            return Column(self, key)
        return self.get(key, self.types)

    def __iter__(self):
        for start in range(0, len(self), 1000):
            places = self.index[start:start + 1000]
            yield from rows_of(self.read(places, self.types), len(places))

    def iter(self, batch_size):
        """Batches as ds[i:j] gives them."""
        for start in range(0, len(self), batch_size):
            yield self.read(self.index[start:start + batch_size], self.types)

    # choosing rows and columns

    def choose(self, index):
        return Dataset(self.batches, self.type, index, self.special, self.sources)

    def select(self, indices):
        """The rows at these places: a range, numbers or a mask, any order, repeats allowed."""
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
            raise ValueError(f'test_size {test_size} of {n} rows leaves one side empty: give a share between '
                             f'0 and 1, or 1 to {n - 1} rows (in a run: more rows, or --val_dataset=FILE)')
        order = np.random.default_rng(seed).permutation(n) if shuffle else np.roll(np.arange(n), count)
        return {'train': self.select(order[count:]), 'test': self.select(order[:count])}

    def filter(self, function):
        """The rows for which function(row) holds."""
        return self.select(np.fromiter(map(bool, map(function, self)), bool))

    def known(self, names, error=ValueError):
        for name in names:
            if name not in self.types:
                raise error(f"no column {name!r}: this dataset has {', '.join(self.types)}")

    def renamed(self, old_names):
        """{new name: old name} -> the same rows with these columns, in this order."""
        self.known(old_names.values())
        t = Type('struct', tuple(Field(new, self.types[old]) for new, old in old_names.items()))
        special = {new: self.special[old] for new, old in old_names.items() if old in self.special}
        batches = [batch.recast(t, old_names) for batch in self.batches]
        return Dataset(batches, t, self.index, special, self.sources)

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

    def map(self, function, batched=False, batch_size=1000, remove_columns=()):
        """function(row) -> dict of new or changed values; batched: function(columns) -> columns, of any
        length if the old ones are all removed or replaced. In memory, each time: what is slow belongs in a
        prepare script, whose file opens at once."""
        removed = {remove_columns} if isinstance(remove_columns, str) else set(remove_columns)
        self.known(removed)
        sink = Sink()
        for start in range(0, len(self), batch_size):
            places = self.index[start:start + batch_size]
            old = self.read(places, self.types)
            kept = [name for name in old if name not in removed]
            if batched:
                columns = {name: old[name] for name in kept} | self.answer(function(old))
                lengths = {name: len(values) for name, values in columns.items()}
                if len(set(lengths.values())) > 1:
                    raise ValueError(f'map: columns of different lengths {lengths}: name the old ones in '
                                     f'remove_columns')
                rows = rows_of(columns, 0)
            else:
                rows = [{name: row[name] for name in kept} | self.answer(function(row))
                        for row in rows_of(old, len(places))]
            sink.add(rows, lambda k, e, start=start: f'map, row {start + k}: {e}')
        return sink.dataset()

    def answer(self, new):
        if not isinstance(new, dict) and new is not None:
            raise ValueError(f'map: the function returned {type(new).__name__}, expected a dict of new '
                             f'values (or None)')
        return new or {}

    # files

    def to_arrow(self, path):
        """One Arrow stream, the format of HF datasets' files. Whole or not at all."""
        features = json.dumps({'info': {'features': self.features}})
        with replaced(path) as f:
            writer = Writer(f, self.type, {b'huggingface': features.encode()})
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
        state = dict.fromkeys(('_format_columns', '_format_type', '_split'))
        state |= {'_data_files': [{'filename': name}], '_fingerprint': os.urandom(8).hex(),
                  '_format_kwargs': {}, '_output_all_columns': False}
        for file, content in (('dataset_info.json', {'features': self.features}), ('state.json', state)):
            with replaced(os.path.join(path, file)) as f:
                f.write(json.dumps(content, indent=2).encode())

    def to_json(self, path):
        """One JSON object a line, UTF-8; .gz compresses. Whole or not at all."""
        zipped = functools.partial(gzip.open, mode='wb')
        opened = zipped if str(path).endswith('.gz') else contextlib.nullcontext
        with replaced(path) as raw, opened(raw) as f:
            for row in self:
                try:
                    f.write((json.dumps(row, ensure_ascii=False) + '\n').encode())
                except TypeError as e:
                    raise ValueError(f'{path}: {e}: JSON has no such type; map the column to text, or write '
                                     f'to_arrow') from None


def rows_of(columns, count):
    """{name: values} -> [{name: value}]; count rows of a table without columns."""
    rows = zip(*columns.values()) if columns else [()] * count
    return [dict(zip(columns, row)) for row in rows]


def concatenate(datasets):
    """Datasets end to end; columns that one lacks are null there. ValueError naming the column where the
    types do not meet."""
    t = Type('struct')
    for ds in datasets:
        t = join_types(t, ds.type)
    batches, indices, sources = [], [], []
    base = 0
    for ds in datasets:
        batches += [batch if ds.type == t else batch.recast(t) for batch in ds.batches]
        sources += [(base + first, file) for first, file in ds.sources]
        indices.append(base + np.asarray(ds.index, np.int64))
        base += ds.starts[-1]
    index = np.concatenate(indices)
    in_order = len(index) == base and (index == np.arange(base)).all()
    special = datasets[0].special if all(ds.special == datasets[0].special for ds in datasets) else {}
    return Dataset(batches, t, None if in_order else index, special, sources)


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
    """Takes lists of rows, keeps their common type, and makes them a Dataset. Its batches lie in an unnamed
    temporary file, so that a file larger than the memory can be loaded."""

    def __init__(self):
        self.type = Type('struct')
        self.file = tempfile.TemporaryFile()
        self.ends = [0]  # of the batches in the file; each is a stream of its own

    def add(self, rows, where):
        """Rows become batches. where(k, error) -> the message for a row k that does not fit."""
        for start in range(0, len(rows), 10000):
            part = rows[start:start + 10000]
            try:
                self.put(part)
            except Mixed:
                low, high = 0, len(part)
                while low < high:  # a prefix that does not fit keeps failing: bisect for the first row
                    middle = (low + high) // 2
                    try:
                        self.put(part[:middle + 1], keep=False)
                        low = middle + 1
                    except Mixed as e:
                        high, error = middle, e
                raise ValueError(where(start + low, error)) from None

    def put(self, rows, keep=True):
        names = dict.fromkeys(itertools.chain.from_iterable(rows))
        columns = {name: [row.get(name) for row in rows] for name in names}
        fields = []
        for name, values in columns.items():
            with inside(name):
                fields.append(Field(name, infer(values)))
        common = join_types(self.type, Type('struct', tuple(fields)))
        t = Type('struct', tuple(f for f in common.fields if f.name in columns))
        arrays = []
        for f in t.fields:
            with inside(f.name):
                arrays.append(build(columns[f.name], f.type))
        if keep:
            self.type = common
            writer = Writer(self.file, t)
            writer.write(arrays, len(rows))
            writer.end()
            self.ends.append(self.file.tell())

    def dataset(self, sources=()):
        self.file.flush()
        view, batches = map_file(self.file), []
        for start, stop in itertools.pairwise(self.ends):
            t, _, found = read_stream(view[start:stop], 'temporary file')
            batches += [batch if t == self.type else batch.recast(self.type) for batch in found]
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
    state = os.path.join(path, 'state.json')
    if os.path.exists(state):  # of save_to_disk
        with guard(state), open(state, 'rb') as f:
            names = [os.path.basename(file['filename']) for file in json.load(f)['_data_files']]
            found = [os.path.join(path, name) for name in names]
            if not all(map(os.path.isfile, found)):
                raise ArrowError(f'not all of {", ".join(names)} are there')
        return found or [path]
    names = sorted(os.listdir(path))
    if 'dataset_dict.json' in names:
        splits = [name for name in names if os.path.isdir(os.path.join(path, name))]
        raise ValueError(f"{path} holds the splits {', '.join(splits)}: give one of them, "
                         f"{os.path.join(path, splits[0])}")
    found = [name for name in names if name.removesuffix('.gz').endswith(ENDINGS) and name[-5:] != '.json']
    kinds = sorted({re.match('train|test|val|dev|', name)[0] for name in found})
    if not found:
        raise ValueError(f'{path} is a folder without data files: give a folder that save_to_disk made, or '
                         f'one of .parquet, .jsonl or .arrow shards')
    if len(kinds) > 1:
        raise ValueError(f"{path} holds the splits {', '.join(kinds)}: give one of them, "
                         f"'{os.path.join(path, kinds[-1])}*'")
    return [os.path.join(path, name) for name in found]


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
            if kind == '.arrow' or head.startswith((b'ARROW1', b'\xff\xff\xff\xff')):
                return from_arrow(map_file(f), path, sources)
            if kind == '.parquet':
                return load_parquet(path, sources)
            if kind not in ENDINGS and head[:1] not in (b'[', b'{'):
                raise ValueError(f"{path}: not one of {', '.join(ENDINGS)} (each text also .gz), nor a "
                                 f"folder of them")
            load = load_list if head[:1] == b'[' else load_lines
            if kind in ('.csv', '.tsv'):
                load = load_csv
            sink = Sink()
            load(f, path, sink)
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise ValueError(f'{path}: corrupt gzip data ({e})') from None
    ds = sink.dataset(sources)
    if not len(ds):
        raise ValueError(f"{path}: the file is {'without rows' if os.path.getsize(path) else 'empty'}")
    return ds


def from_arrow(view, path, sources):
    t, metadata, batches = read_stream(view, path)
    special = {}
    with contextlib.suppress(ValueError, LookupError, TypeError):  # no, or another program's metadata
        features = json.loads(metadata[b'huggingface'])['info']['features']
        special = {f.name: features[f.name] for f in t.fields if features[f.name] != feature(f.type)}
    return Dataset(batches, t, None, special, sources)


def load_parquet(path, sources):
    """pyarrow reads it batch by batch into a temporary Arrow stream, which is mapped."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        message = f'{path}: parquet is read by pyarrow, which is not installed: pip install pyarrow'
        raise ValueError(message) from None
    file = tempfile.TemporaryFile()
    try:
        with pyarrow.parquet.ParquetFile(path) as f:
            schema = f.schema_arrow
            for i, field in enumerate(schema):
                if pyarrow.types.is_dictionary(field.type):  # pandas' categories
                    schema = schema.set(i, field.with_type(field.type.value_type))
            with pyarrow.ipc.new_stream(file, schema) as writer:
                for batch in f.iter_batches():
                    writer.write_batch(batch.cast(schema))
    except (pyarrow.ArrowException, OSError) as e:
        raise ValueError(f'{path}: {" ".join(str(e).split())}') from None
    file.flush()
    return from_arrow(map_file(file), path, sources)


def load_lines(f, path, sink):
    """One JSON object a line; blank lines are skipped."""
    number, parse = 1, json.JSONDecoder().decode  # json.loads asks each line for its encoding
    while lines := f.readlines(BLOCK):
        rows, numbers = [], []
        if number == 1:
            lines[0] = lines[0].removeprefix(b'\xef\xbb\xbf')
        for number, line in enumerate(lines, number):
            try:
                row = parse(line.decode())
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
            raise ValueError(f'{path}: item {i + 1} of the list: expected an object {{...}}, got '
                             f'{json.dumps(row)[:40]}')
    sink.add(rows, lambda k, e: f'{path}: item {k + 1} of the list: {e}')


def load_csv(f, path, sink):
    """Separated values with a header. Every value is a text, so that "02134" stays what it is; an empty one
    is null."""
    csv.field_size_limit(2**31 - 1)
    delimiter = '\t' if '.tsv' in path[-7:] else ','
    reader = csv.reader(io.TextIOWrapper(f, 'utf-8-sig', newline=''), delimiter=delimiter, strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise ValueError(f'{path}:1: two columns with one name: {", ".join(names)}')
        rows = []
        for values in filter(None, reader):
            if len(values) != len(names):
                raise ValueError(f'{path}:{reader.line_num}: {len(values)} fields, the header has '
                                 f'{len(names)}')
            rows.append({name: value or None for name, value in zip(names, values)})
        sink.add(rows, lambda k, e: f'{path}: {e}')
    except csv.Error as e:
        raise ValueError(f'{path}:{reader.line_num}: {e}') from None
    except UnicodeDecodeError as e:
        raise ValueError(f'{path}: behind line {reader.line_num}: not UTF-8 ({e.reason})') from None
    sink.type = Type('struct', tuple(Field(f.name, Type('string')) for f in sink.type.fields))


# -----------------------------------------------------------------------------------------------------------
# encoded rows: 4 bytes a token, in mapped pages
# -----------------------------------------------------------------------------------------------------------

CACHED_FROM = 10_000  # rows of a table; fewer are encoded in a second


class Items:
    """What a stage makes of rows: a sequence of tuples of token ids, masks and numbers. table holds them,
    4 bytes a token, in memory or mapped, and they are read when they are asked for: a list comes back as a
    list, an int64 or bool array as such an array."""

    def __init__(self, table):
        self.table = table

    def __len__(self):
        return len(self.table)

    def __getitem__(self, key):
        if isinstance(key, slice):
            return Items(self.table.select(range(len(self))[key]))
        batch, row = self.table.find(int(self.table.index[key]))
        columns = list(batch.columns().items())[len(ABOUT):]
        return tuple(column.item(row) if name[0] != 'a' else column.items(row) for name, column in columns)


# of an entry: the row that it comes from, has that row an item at all, what there is to say of the row
DTYPES = {'bool': np.dtype(bool), 'int32': np.dtype('i4')}
ABOUT = (Field('row', Type('int64')), Field('kept', Type('bool')), Field('note', Type('string')))


def item_field(i, value):
    """The column of a tuple's value i; its name tells whether a list or an array comes back."""
    if not hasattr(value, '__len__'):
        return Field(f'value {i}', infer([value]))
    kind = 'bool' if np.asarray(value).dtype == bool else 'int32'
    form = 'array' if isinstance(value, np.ndarray) else 'list'
    return Field(f'{form} {i}', Type('list', (Field('item', Type(kind)),)))


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
    """All entries as an Arrow stream; the first item tells the columns."""
    stream, passed = entries(rows, encode, name), []
    for entry in stream:
        passed.append(entry)
        if entry[1]:
            break
    fields = tuple(itertools.starmap(item_field, enumerate(passed[-1][1] if passed else ())))
    nothing = tuple([] if field.type.fields else 0 for field in fields)
    stream, t = itertools.chain(passed, stream), Type('struct', ABOUT + fields)
    writer = Writer(f, t)
    while chunk := list(itertools.islice(stream, 1000)):
        table = [(row, bool(item), note, *(item or nothing)) for row, item, note in chunk]
        columns = []
        for field, values in zip(t.fields, zip(*table)):
            if field.type.fields:  # ids, masks: as arrays, which are joined without a look at each token
                values = [np.asarray(value, DTYPES[field.type.fields[0].type.kind]) for value in values]
            columns.append(build(list(values), field.type))
        writer.write(columns, len(table))
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
            table = from_arrow(map_file(f), path, ())
        numbers = table['row'].numpy()  # ascending: find those of the rows, none or several each
        first = np.searchsorted(numbers, rows.index)
        counts = np.searchsorted(numbers, rows.index, 'right') - first
        table = table.select(np.repeat(first - np.cumsum(counts) + counts, counts) + np.arange(counts.sum()))
    else:
        f = io.BytesIO()
        write_items(f, rows, encode, name)
        table = from_arrow(f.getbuffer(), name, ())
    notes = collections.Counter(filter(None, table['note']))
    return Items(table.select(table['kept'].numpy())), notes


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
        raise ValueError(f'sequence {i} has {lengths[i]} tokens, more than the capacity {capacity}: cut or '
                         f'drop it, or raise the capacity')
    bins, rooms = [], []  # rooms: (free space, -when it arose, bin), sorted
    order = np.argsort(-lengths, kind='stable').tolist()
    for when, i in enumerate(order):
        at = bisect.bisect_left(rooms, (lengths[i],))
        if at == len(rooms):
            bins.append([])
        room, _, b = rooms.pop(at) if at < len(rooms) else (capacity, 0, len(bins) - 1)
        bins[b].append(i)
        bisect.insort(rooms, (room - lengths[i], -when, b))
    return bins


def collate_packed(seqs, trained, bins, capacity):
    """Bins of documents, one row a bin, one document after another. seqs, trained: lists of token lists and
    of bool lists, equally long; bins as from pack. Returns idx, targets, doc, all (len(bins), capacity)
    int64: targets[t] = idx[t+1] where trained[t+1] is True and both stand in one document, else -1 (ignored).
    doc counts from 0 in each row; the unused tail (idx 0) is a document of its own, numbered one above the
    last. seqs [[5, 6], [7]], all trained, bins [[0, 1]], capacity 4 -> idx [5, 6, 7, 0], targets [6, -1, -1,
    -1], doc [0, 0, 1, 2]."""
    shape = len(bins), capacity
    idx, on, doc = np.zeros(shape, np.int64), np.zeros(shape, bool), np.zeros(shape, np.int64)
    for row, members in enumerate(bins):
        at = 0
        for number, i in enumerate(members):
            span = slice(at, at + len(seqs[i]))
            if len(seqs[i]) != len(trained[i]):
                raise ValueError(f'sequence {i} has {len(seqs[i])} tokens and {len(trained[i])} mask '
                                 f'entries: they must be as many')
            if span.stop > capacity:
                used = sum(len(seqs[i]) for i in members)
                raise ValueError(f'bin {row} holds {used} tokens, more than the capacity {capacity}')
            idx[row, span], on[row, span], doc[row, span] = seqs[i], trained[i], number
            at = span.stop
        doc[row, at:] = len(members)
    targets = np.full(shape, -1, np.int64)
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
                raise ValueError(f'the data cursor was saved with {key} {state[key]}, this run has '
                                 f'{mine[key]}: resume with the same, or start anew')
        self.batch = int(state['batch'])
