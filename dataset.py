"""load_dataset and Dataset: tables of JSON, CSV, parquet and Arrow as rows; their order, batching and packing."""
import bisect, builtins, concurrent.futures, contextlib, csv, functools, gc, gzip, hashlib, io, itertools, json, math, multiprocessing, os, pickle
import queue, re, shutil, sys, sysconfig, tempfile, threading, time, types, warnings, weakref, zlib

import numpy as np
import torch

from arrow import (Array, ArrowError, Type, _Chunk, _MAX32, _Mixed, _NUMPY, _SPILL, _Source, _Writer, _bits, _corrupt, _nbytes, _read_ipc, _table, _within, array, cast, concat, nulls, take, type_name, unify)


# --- Dataset: rows of chunks behind a lazy index -----------------------------------------------------------------------

class Column:
    """One column of a Dataset, read when asked for: len, [i], [i:j], iteration, == list. numpy() and torch() are views without a copy where
    the rows stand together in one chunk (read-only: copy before writing in place), else a copy."""

    def __init__(self, ds, name):
        self.ds, self.name = ds, name

    def __len__(self):
        return len(self.ds)

    def __iter__(self):
        for lo in range(0, len(self), 1000):
            yield from self[lo:lo + 1000]

    def __getitem__(self, key):
        if isinstance(key, (int, np.integer)):
            return self.ds._row(key, (self.name,))[self.name]
        return self.ds._read(self.ds._rows(key), (self.name,))[self.name]

    def __eq__(self, other):
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    def __repr__(self):
        return f"Column {self.name!r} of {len(self)} x {type_name(self.ds.types[self.name])}: {self[:3]}{'...' if len(self) > 3 else ''}"

    def array(self):
        """The rows as one Array."""
        return self.ds._gather(self.ds._idx, (self.name,))[self.name]

    def numpy(self):
        """(n,) numbers, times as datetime64 and timedelta64; (n, w) for fixed_size_list. ValueError on nulls, strings and ragged lists."""
        return _view(self.array(), self.name)

    def torch(self):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch warns that the map is read-only
            return torch.from_numpy(self.numpy())

    def ragged(self):
        """A column of lists of numbers as (values, offsets): row i is values[offsets[i]:offsets[i + 1]]."""
        a = self.array().check()
        if a.type.kind not in ('list', 'large_list') or a.valid is not None:
            raise ValueError(f'column {self.name!r} is {type_name(a.type)}{" with nulls" if a.valid is not None else ""}: ragged() is for lists without nulls')
        return _view(a.kids[0], self.name), a.offs


def _view(a, name):
    t = a.type
    if a.valid is not None and not _bits(a.valid, 0, a.n).all():
        raise ValueError(f'column {name!r} has nulls, which numpy cannot show: filter them out first')
    if t.kind == 'fixed_size_list':
        return _view(a.kids[0], name).reshape(a.n, -1)
    if t.kind == 'bool':
        return _bits(a.data, 0, a.n)
    if t.kind not in _NUMPY:
        raise ValueError(f'column {name!r} is {type_name(t)}: no numpy view; read it as a list, or with ragged()')
    unit = {'timestamp': 'datetime64', 'duration': 'timedelta64'}.get(t.kind)
    return a.data.view(f"{unit}[{t.arg[0] if t.kind == 'timestamp' else t.arg}]") if unit else a.data


class Dataset:
    """A table: chunks of Arrow columns, and a lazy index over their rows, so that select, shuffle, split, filter and slices copy nothing.
    The verbs are HF datasets'. Made by load_dataset, Dataset.from_dict and Dataset.from_list.
        ds[3] -> {'prompt': ..., }   ds[3:5], ds[[7, 1]] -> {'prompt': [.., ..], }   ds['prompt'] -> Column"""

    def __init__(self, chunks, t, idx=None, special=None, id=None):
        self._chunks, self._type, self._special, self._id = chunks, t, special or {}, id
        self._starts = list(itertools.accumulate((c.n for c in chunks), initial=0))
        self._begins, self._kept = np.array(self._starts[:-1]), all(c.keep for c in chunks)
        self._idx = range(self._starts[-1]) if idx is None else idx
        self.types = {f.name: f.type for f in t.fields}

    @classmethod
    def from_dict(cls, columns, types=None):
        """{name: values}, all of one length; types {name: Type} for those that are not to be inferred."""
        kids = {}
        for k, v in columns.items():
            with _within(k):
                kids[k] = array(v, (types or {}).get(k))
        table = _table(kids)
        return cls([_Chunk(table.n, lambda: table)], table.type)

    @classmethod
    def from_list(cls, rows):
        """A list of dicts, types inferred over all of them; a missing key is null. [{'a': 1}, {'a': 2.5}] -> a float64."""
        sink = _Sink()
        for lo in range(0, len(rows), 10000):
            sink.add(rows[lo:lo + 10000], lambda k, e: f'row {lo + k}: {e}')
        return sink.dataset()

    @property
    def column_names(self):
        return list(self.types)

    @property
    def num_rows(self):
        return len(self)

    @property
    def features(self):
        """{column: HF feature as JSON}; None for a type that HF datasets does not know."""
        return {k: self._special.get(k) or _feature(t) for k, t in self.types.items()}

    def __len__(self):
        return len(self._idx)

    def __repr__(self):
        return f"Dataset of {len(self):,} row{'s' * (len(self) != 1)}: {', '.join(f'{k} {type_name(t)}' for k, t in self.types.items())}"

    # reading

    def _rows(self, key):
        """slice, range, list of numbers or of bools, array -> rows of the chunks: a range or int64 array."""
        n = len(self)
        if isinstance(key, slice):
            return self._idx[key]
        if isinstance(key, range) and key.step > 0 and 0 <= key.start and key.stop <= n:
            return self._idx[key.start:key.stop:key.step]
        at = np.asarray(list(key) if not isinstance(key, (list, tuple, np.ndarray)) else key)
        at = at if at.size else at.astype(np.int64)
        if at.dtype == bool:
            if at.shape != (n,):
                raise IndexError(f'a mask of shape {at.shape} for a dataset of {n} rows')
            at = np.flatnonzero(at)
        if at.dtype.kind not in 'iu' or at.ndim != 1:
            raise TypeError(f'rows are chosen by integers, a slice or a mask, got {at.dtype} of shape {at.shape}')
        at = np.where(at < 0, at + n, at).astype(np.int64)
        if at.size and not 0 <= at.min() <= at.max() < n:
            raise IndexError(f'row {int(at.max() if at.max() >= n else at.min() - n)} of a dataset of {n} rows')
        return self._idx[at] if isinstance(self._idx, np.ndarray) else at * self._idx.step + self._idx.start

    def _row(self, i, names):
        n = len(self._idx)
        if not -n <= i < n:
            raise IndexError(f'row {i} of a dataset of {n} rows')
        row = int(self._idx[i])
        c = bisect.bisect_right(self._starts, row) - 1
        cols, row = self._chunks[c].cols(), row - self._starts[c]
        return {k: cols[k].get(row) for k in names}

    def _pieces(self, rows):
        """A range of step 1 -> (chunk, first row in it, one past the last)."""
        lo, hi = rows.start, rows.stop
        c = bisect.bisect_right(self._starts, lo) - 1
        while lo < hi:
            end = min(hi, self._starts[c + 1])
            if lo < end:
                yield self._chunks[c], lo - self._starts[c], end - self._starts[c]
            lo, c = max(lo, end), c + 1

    def _read(self, rows, names):
        """-> {name: list of Python values}"""
        together = isinstance(rows, range) and rows.step == 1
        if together and rows:
            c = bisect.bisect_right(self._starts, rows.start) - 1
            if rows.stop <= self._starts[c + 1]:  # most slices lie in one chunk
                cols, base = self._chunks[c].cols(), self._starts[c]
                return {k: cols[k].list(rows.start - base, rows.stop - base) for k in names}
        if together or not self._kept:  # chunks that are mapped anew each time: one after the other
            return {k: a.list(0, a.n) for k, a in self._gather(rows, names).items()}
        which, local = map(np.ndarray.tolist, self._find(rows))
        cols = {c: self._chunks[c].cols() for c in set(which)}
        return {k: [cols[c][k].get(r) for c, r in zip(which, local)] for k in names}

    def _find(self, rows):
        """-> (chunk, row in it) of each row."""
        rows = np.asarray(rows, np.int64)
        which = np.searchsorted(self._begins, rows, 'right') - 1
        return which, rows - self._begins[which]

    def _gather(self, rows, names):
        """-> {name: Array}, a view if the rows stand together in one chunk."""
        if isinstance(rows, range) and (rows.step == 1 or not rows):
            parts = [{k: take(cols[k], slice(lo, hi)) for k in names} for chunk, lo, hi in self._pieces(rows) for cols in [chunk.cols()]]
            return {k: concat([p[k] for p in parts]) if parts else take(nulls(self.types[k], 1), slice(0, 0)) for k in names}
        which, local = self._find(rows)
        used, back = np.unique(which, return_inverse=True)
        parts = [{k: take(cols[k], local[which == c]) for k in names} for c in used.tolist() for cols in [self._chunks[c].cols()]]
        back = np.argsort(np.argsort(back, kind='stable'), kind='stable')  # where each row went when they were sorted by chunk
        return {k: take(concat([p[k] for p in parts]), back) if len(parts) > 1 else parts[0][k] for k in names}

    def __getitem__(self, key):
        if isinstance(key, slice):
            return self._read(self._idx[key], self.types)
        if isinstance(key, str):
            if key not in self.types:
                raise KeyError(f"no column {key!r}: this dataset has {', '.join(self.types)}")
            return Column(self, key)
        if isinstance(key, (int, np.integer)):
            return self._row(key, self.types)
        return self._read(self._rows(key), self.types)

    def __iter__(self):
        for block in self.iter(1000):
            yield from (dict(zip(block, row)) for row in zip(*block.values()))

    def iter(self, batch_size, drop_last_batch=False):
        """Batches as ds[i:j] gives them."""
        for lo in range(0, len(self) - (batch_size - 1 if drop_last_batch else 0), batch_size):
            yield self._read(self._idx[lo:lo + batch_size], self.types)

    # choosing rows and columns

    def _with(self, idx):
        return Dataset(self._chunks, self._type, idx, self._special, self._id)

    def select(self, indices):
        """The rows at these places: a range, slice, list of numbers or mask, any order, repeats allowed."""
        return self._with(self._rows(indices))

    def shuffle(self, seed=None):
        """A random order of the rows, HF datasets' for the same seed."""
        return self._with(self._rows(np.random.default_rng(seed).permutation(len(self))))

    def train_test_split(self, test_size=0.25, seed=None, shuffle=True):
        """test_size: rows, or a share (rounded up) -> {'train', 'test'}. With one seed HF datasets makes the same split."""
        n = len(self)
        count = math.ceil(test_size * n) if isinstance(test_size, float) else test_size
        if not 0 < count < n:
            raise ValueError(f'test_size {test_size} of {n} rows leaves one side empty: give a share between 0 and 1, or 1 to {n - 1} rows')
        if not shuffle:
            return {'train': self.select(range(n - count)), 'test': self.select(range(n - count, n))}
        order = np.random.default_rng(seed).permutation(n)
        return {'train': self.select(order[count:]), 'test': self.select(order[:count])}

    def filter(self, function, batched=False, batch_size=1000):
        """The rows for which function(row) holds (batched: function(columns) -> a list of bools)."""
        keep = []
        for block in self.iter(batch_size):
            keep += map(bool, function(block)) if batched else [bool(function(dict(zip(block, row)))) for row in zip(*block.values())]
        return self.select(np.array(keep, bool))

    def select_columns(self, names):
        """Only these columns, in this order. ValueError on an unknown one, as in the next two."""
        return self._columns({k: k for k in ([names] if isinstance(names, str) else names)})

    def remove_columns(self, names):
        gone = self._known([names] if isinstance(names, str) else names)
        return self._columns({k: k for k in self.types if k not in gone})

    def rename_column(self, old, new):
        if new in self.types:
            raise ValueError(f'there is a column {new!r} already')
        self._known([old])
        return self._columns({new if k == old else k: k for k in self.types})

    def _known(self, names):
        for k in names:
            if k not in self.types:
                raise ValueError(f"no column {k!r}: this dataset has {', '.join(self.types)}")
        return names

    def _columns(self, names):
        self._known(names.values())
        fields = {f.name: f for f in self._type.fields}
        t = Type('struct', None, tuple(fields[old]._replace(name=new) for new, old in names.items()))
        special = {new: self._special[old] for new, old in names.items() if old in self._special}
        return Dataset([c.view(t, names) for c in self._chunks], t, self._idx, special, self._id and (self._id, tuple(names.items())))

    # new values

    def map(self, function, batched=False, batch_size=1000, remove_columns=(), num_proc=1, with_indices=False, cache=True, cache_dir=None, desc='map'):
        """function(row) -> dict of new or changed values; batched: function(columns) -> columns, of any length if the old ones are all
        removed or replaced. Columns that it leaves alone are not touched. The result lies in cache_dir (~/.cache/plainrlhf) under a
        fingerprint of the function (its code, constants, closure, the functions it calls) and the input; the next run only opens it.
        A function whose fingerprint cannot be taken (it holds a lock, a file ...) is run each time. cache=False: memory, nothing kept."""
        gone = self._known([remove_columns] if isinstance(remove_columns, str) else list(remove_columns))
        job = (self, function, batched, batch_size, gone, with_indices)
        key = _fingerprint((self._identity(), function, batched, batch_size, gone, with_indices)) if cache else None
        home = os.path.join(os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache'), 'plainrlhf')
        folder = os.path.join(cache_dir or home, f'map-{key}') if key else tempfile.mkdtemp(prefix='plainrlhf-map-')
        if not (key and os.path.isdir(folder)):
            step = batch_size * max(1, len(self) // (batch_size * 16 * max(num_proc, 1)))
            spans = [(lo, min(lo + step, len(self))) for lo in range(0, len(self), step)]
            work = folder if not key else f'{folder}.{os.getpid()}.tmp'
            os.makedirs(work, exist_ok=True)
            try:
                _pool(_map_piece, [(*s, os.path.join(work, f'{i:06d}.arrow')) for i, s in enumerate(spans)], num_proc, job, _progress(desc, len(self)))
                if key:
                    os.rename(work, folder)
            except BaseException:
                shutil.rmtree(work, ignore_errors=True)
                if not (key and os.path.isdir(folder)):  # else another process was faster, with the same result
                    raise
        try:
            out = [d for f in sorted(os.listdir(folder)) for d in _open_arrow(os.path.join(folder, f), many=True)]
        finally:
            if not key:
                shutil.rmtree(folder)
        if not out:
            return self._with(self._idx[:0])
        out = concatenate(out)
        out._special = {k: v for k, v in self._special.items() if k in out.types and out.types[k] == self.types[k]}
        return out

    def _identity(self):
        """What the values depend on: files by name, size and time, memory by content."""
        ids = self._id or tuple(_digest(self._gather(r, list(self.types))) for r in (range(lo, min(lo + 10000, self._starts[-1])) for lo in range(0, self._starts[-1], 10000)))
        return ids, tuple(self.types.items()), hashlib.sha256(np.asarray(self._idx, np.int64).tobytes()).hexdigest() if isinstance(self._idx, np.ndarray) else self._idx

    # files

    def _blocks(self):
        """The dataset as struct arrays to be written: chunk by chunk where the rows stand in order, else gathered 10,000 at a time."""
        t, names = self._type, list(self.types)
        if isinstance(self._idx, range) and self._idx.step == 1:
            todo = [range(max(lo, self._idx.start), min(hi, self._idx.stop)) for lo, hi in zip(self._starts, self._starts[1:])]
        else:
            todo = [self._idx[i:i + 10000] for i in range(0, len(self), 10000)]
        todo = [r for r in todo if len(r)][::-1]
        while todo:
            rows = todo.pop()
            try:
                cols = self._gather(rows, names)
            except OverflowError:  # more than 2 GiB of text: halves
                if len(rows) == 1:
                    raise
                todo += [rows[len(rows) // 2:], rows[:len(rows) // 2]]
                continue
            yield Array(t, len(rows), kids=tuple(cols[k] for k in names))

    def to_arrow(self, path, file=False):
        """One Arrow IPC file: the stream format (what HF datasets reads), or with file=True the random-access file format. Atomic."""
        with _atomic(path) as f:
            w = _Writer(f, self._type, self._metadata(), file)
            for table in self._blocks():
                w.batch(table.kids, table.n)
            w.end()

    def _metadata(self):
        features = self.features
        return () if None in features.values() else ((b'huggingface', json.dumps({'info': {'features': features}}).encode()),)

    def save_to_disk(self, path, max_shard_size=500 << 20):
        """A folder as HF datasets' save_to_disk makes it (load_from_disk opens it). Atomic; an older dataset there is replaced."""
        path = os.path.normpath(os.fspath(path))
        if os.path.exists(path) and not os.path.isfile(os.path.join(path, 'state.json')) and (not os.path.isdir(path) or os.listdir(path)):
            raise ValueError(f'{path} exists and is no saved dataset: give another folder, or remove it')
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        work = tempfile.mkdtemp(prefix=os.path.basename(path) + '.', dir=os.path.dirname(os.path.abspath(path)))
        os.chmod(work, 0o755)
        size = sum(_nbytes(a) for chunk in self._chunks for a in chunk.cols().values()) * len(self) / max(self._starts[-1], 1)
        k = max(min(math.ceil(size / max_shard_size), len(self)), 1)
        names = [f'data-{i:05d}-of-{k:05d}.arrow' for i in range(k)]
        for i, name in enumerate(names):
            self.select(range(len(self) * i // k, len(self) * (i + 1) // k)).to_arrow(os.path.join(work, name))
        features = {} if None in self.features.values() else {'features': self.features}
        state = {'_data_files': [{'filename': n} for n in names], '_fingerprint': os.urandom(8).hex(), '_format_columns': None, '_format_kwargs': {},
                 '_format_type': None, '_output_all_columns': False, '_split': None}
        for name, content in (('dataset_info.json', {'citation': '', 'description': '', 'homepage': '', 'license': '', **features}), ('state.json', state)):
            _write_json(os.path.join(work, name), content)
        old = tempfile.mkdtemp(prefix=os.path.basename(path) + '.old', dir=os.path.dirname(os.path.abspath(path)))
        if os.path.exists(path):
            os.rename(path, os.path.join(old, 'old'))
        os.rename(work, path)
        shutil.rmtree(old)

    def to_json(self, path):
        """One JSON object a line, UTF-8; .gz compresses. Atomic."""
        with _atomic(path) as raw, (gzip.open(raw, 'wb') if str(path).endswith('.gz') else contextlib.nullcontext(raw)) as f:
            for block in self.iter(1000):
                try:
                    f.write(''.join(json.dumps(dict(zip(block, row)), ensure_ascii=False) + '\n' for row in zip(*block.values())).encode())
                except TypeError as e:
                    raise ValueError(f'{path}: {e}: JSON has no such type; map the column to text, or write to_arrow') from None


def concatenate(datasets):
    """Datasets end to end; columns that one lacks are null there. ValueError naming the column where the types do not meet."""
    t = functools.reduce(unify, (d._type for d in datasets))
    chunks, idx, base = [], [], 0
    for d in datasets:
        chunks += d._chunks if d._type == t else [c.view(t) for c in d._chunks]
        idx.append(range(d._idx.start + base, d._idx.stop + base, d._idx.step) if isinstance(d._idx, range) else d._idx + base)
        base += d._starts[-1]
    whole = all(d._idx == range(d._starts[-1]) for d in datasets if isinstance(d._idx, range)) and all(isinstance(i, range) for i in idx)
    special = {k: v for k, v in datasets[0]._special.items() if all(d._special.get(k) == v for d in datasets)}
    ids = tuple(d._id for d in datasets)
    return Dataset(chunks, t, None if whole else np.concatenate([np.asarray(i, np.int64) for i in idx]), special, None if None in ids else ids)


def _feature(t):
    """Type -> HF feature as JSON, or None."""
    if t.kind == 'struct':
        kids = {f.name: _feature(f.type) for f in t.fields}
        return None if None in kids.values() else kids
    if t.kind in ('list', 'large_list', 'fixed_size_list'):
        kid = _feature(t.fields[0].type)
        return kid and {'feature': kid, **({'length': t.arg} if t.arg else {}), '_type': 'LargeList' if t.kind == 'large_list' else 'List'}
    return None if t.kind in ('map', 'dictionary', 'fixed_size_binary') else {'dtype': type_name(t), '_type': 'Value'}


@contextlib.contextmanager
def _atomic(path):
    """A file that is there whole or not at all: temporary name, fsync, rename."""
    temporary = f'{os.fspath(path)}.{os.getpid()}.tmp'
    try:
        with open(temporary, 'wb') as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _write_json(path, value, indent=2):
    with _atomic(path) as f:
        f.write(json.dumps(value, ensure_ascii=False, indent=indent).encode())


# --- map: workers, progress, fingerprints ---

_JOB = None  # set in each worker before its first piece: a forked child inherits it, nothing is pickled, so closures work


def _set_job(job):
    global _JOB
    _JOB = job
    gc.freeze()  # else the first collection touches, and so copies, every page that parent and child share
    torch.set_num_threads(1)  # a forked child must not wait for its parent's OpenMP threads


def _pool(work, pieces, num_proc, job, progress=lambda piece: None):
    """Runs work(job, *piece) for all pieces in num_proc processes; progress(piece) behind each."""
    if num_proc <= 1 or len(pieces) <= 1:
        for p in pieces:
            work(job, *p)
            progress(p)
        return
    if 'fork' not in multiprocessing.get_all_start_methods():
        raise ValueError(f'num_proc {num_proc}: this system cannot fork a process: set num_proc=1')
    with concurrent.futures.ProcessPoolExecutor(min(num_proc, len(pieces)), multiprocessing.get_context('fork'), _set_job, (job,)) as pool:
        futures = [pool.submit(_work, work, p) for p in pieces]
        try:
            for f, p in zip(futures, pieces):
                f.result()
                progress(p)
        except concurrent.futures.process.BrokenProcessPool:
            raise ValueError('a worker process died (killed, or out of memory): try a smaller batch_size or num_proc') from None
        finally:
            for f in futures:
                f.cancel()


def _work(work, piece):
    return work(_JOB, *piece)


def _progress(desc, total):
    start = time.time()

    def show(piece):
        if sys.stderr.isatty():
            print(f'\r{desc} {piece[1]:,}/{total:,} rows, {piece[1] / max(time.time() - start, 1e-9):,.0f} rows/s', end='' if piece[1] < total else '\n', file=sys.stderr, flush=True)
    return show


def _map_piece(job, lo, hi, path):
    """Rows lo..hi of a map into one file of streams."""
    ds, function, batched, batch_size, gone, with_indices = job
    with open(path, 'wb') as f:
        sink = _Sink(f)
        for at in range(lo, hi, batch_size):
            rows = ds._rows(slice(at, min(at + batch_size, hi)))
            old = ds._read(rows, ds.types)
            n = len(rows)
            number = range(at, at + n)
            if batched:
                new = function(dict(old), list(number)) if with_indices else function(dict(old))
            else:
                outs = [function(dict(zip(old, row)), i) if with_indices else function(dict(zip(old, row))) for i, row in zip(number, zip(*old.values()))]
                bad = [o for o in outs if not isinstance(o, dict) and o is not None]
                new = bad[0] if bad else None if None in outs else {k: [o.get(k) for o in outs] for k in dict.fromkeys(itertools.chain.from_iterable(outs))}
            if new is not None and not isinstance(new, dict):
                raise ValueError(f'map: the function returned {builtins.type(new).__name__}, expected a dict of new values (or None)')
            try:
                sink.put(_merge(ds, rows, new or {}, gone))
            except _Mixed as e:
                raise ValueError(f'map, rows {at} to {at + n}: {e}') from None
        sink.flush()


def _merge(ds, rows, new, gone):
    """The struct array of a mapped batch: old columns untouched as arrays, new ones built, with the old type where it still holds."""
    stay = [k for k in ds.types if k not in gone and k not in new]
    kids = ds._gather(rows, stay) if stay else {}
    for k, values in new.items():
        with _within(k):
            try:
                kids[k] = array(values, ds.types.get(k))
            except _Mixed:
                kids[k] = array(values)  # a new type, then
    return _table({k: kids[k] for k in [*(k for k in ds.types if k in kids), *(k for k in new if k not in ds.types)]})


class _Hasher(pickle.Pickler):
    """Pickles an object to be hashed, never to be read: functions and classes by what they do, not by their name."""
    _installed = tuple(sysconfig.get_paths()[k] for k in ('stdlib', 'purelib', 'platlib'))

    def __init__(self, out):
        super().__init__(out, 4)
        self.fast, self.seen = True, set()  # no memo: equal objects give equal bytes

    def reducer_override(self, o):
        if isinstance(o, types.ModuleType):
            return str, (o.__name__,)
        if isinstance(o, types.CodeType):
            return tuple, ((o.co_code, o.co_names, o.co_varnames, tuple(sorted(c) if isinstance(c, frozenset) else c for c in o.co_consts)),)
        if isinstance(o, types.FunctionType) and not o.__code__.co_filename.startswith(self._installed):
            if o in self.seen:
                return str, (o.__qualname__,)
            self.seen.add(o)
            names = set(_names(o.__code__))
            cells = [c.cell_contents for c in o.__closure__ or ()]
            return tuple, ((o.__code__, o.__defaults__, o.__kwdefaults__, cells, [(k, o.__globals__[k]) for k in sorted(names & o.__globals__.keys())]),)
        if isinstance(o, type) and o.__module__ not in sys.stdlib_module_names and isinstance(getattr(o, '__dict__', None), types.MappingProxyType):
            parts = [(k, getattr(v, '__func__', v)) for k, v in sorted(vars(o).items()) if isinstance(getattr(v, '__func__', v), types.FunctionType)]
            if o not in self.seen and parts and not parts[0][1].__code__.co_filename.startswith(self._installed):
                self.seen.add(o)
                return tuple, ((o.__qualname__, parts, o.__bases__),)
            return str, (f'{o.__module__}.{o.__qualname__}',)
        return NotImplemented


def _names(code):
    yield from code.co_names
    for c in code.co_consts:
        if isinstance(c, types.CodeType):
            yield from _names(c)


def _fingerprint(obj):
    """Hex digest of any Python object, functions by content; None where one cannot be taken."""
    out = io.BytesIO()
    try:
        _Hasher(out).dump(obj)
    except (pickle.PicklingError, TypeError, AttributeError, RecursionError, ValueError):
        return None
    return hashlib.sha256(out.getvalue()).hexdigest()[:32]


def _digest(arrays):
    out, table = io.BytesIO(), _table(arrays)
    _Writer(out, table.type).batch(table.kids, table.n)
    return hashlib.sha256(out.getbuffer()).hexdigest()


# --- load_dataset ------------------------------------------------------------------------------------------------------

_BLOCK, _BATCH = 256 << 10, 4 << 20  # bytes of JSON parsed at a time, to stay in the processor's cache; bytes of columns in a batch
_SCAN, _ENDS = json.JSONDecoder().scan_once, ('\n', '', '\r\n')
_FORMS = '.jsonl, .json, .csv, .tsv (each also .gz), .arrow, .parquet, a folder of save_to_disk'


class _Sink:
    """Takes record batches whose types may differ, keeps their common type. In memory up to 64 MB, then in an unnamed temporary file; or
    all of them in `file`. Memory is bounded by one batch whatever the input."""

    def __init__(self, file=None):
        self.spill, self.type, self.chunks, self.bytes, self.wait = file, Type('struct'), [], 0, []

    def add(self, rows, where):
        """A list of dicts. where(k, error) -> the message for a row k that does not fit."""
        try:
            if rows:
                self.put(array(rows))
        except _Mixed as e:
            lo, hi, worst = 0, len(rows), e  # a prefix that fails keeps failing: bisect for the first row
            while lo < hi:
                mid = (lo + hi) // 2
                try:
                    unify(self.type, array(rows[:mid + 1]).type)
                    lo = mid + 1
                except _Mixed as e:
                    hi, worst = mid, e
            raise ValueError(where(lo, worst)) from None

    def put(self, table):
        self.type = unify(self.type, table.type)
        self.wait.append((table, _nbytes(table)))
        if sum(n for _, n in self.wait) >= _BATCH:
            self.flush()

    def flush(self):
        """What waits becomes one batch, of the type that is common so far."""
        tables, size = [cast(t, self.type) for t, _ in self.wait], sum(n for _, n in self.wait)
        self.wait = []
        if not tables:
            return
        table, self.bytes = concat(tables), self.bytes + size
        if self.spill is None and self.bytes <= _SPILL:
            self.chunks.append((_Chunk(table.n, lambda: table), table.type))
            return
        self.spill = self.spill or tempfile.TemporaryFile()
        w = _Writer(self.spill, table.type)
        w.batch(table.kids, table.n)
        w.end()

    def dataset(self, id=None):
        self.flush()
        if self.spill is not None:
            self.spill.flush()
            self.chunks += [(c, t) for t, _, chunks in _read_ipc(_Source(self.spill), many=True) for c in chunks]
        return Dataset([c if t == self.type else c.view(self.type) for c, t in self.chunks], self.type, id=id)


def load_dataset(path, num_proc=1):
    """One file or several (in order, as one dataset): .jsonl, .json (a list of objects, or one a line), .csv, .tsv, .gz of these, .arrow
    (stream or file), .parquet where pyarrow is installed, or a folder that save_to_disk made. Types are inferred over all rows: null then
    string is string, int and float is float64, a missing key is null; a column of mixed types is an error that names file, line and column.
    num_proc: processes for a large .jsonl. ValueError (ArrowError for Arrow data) with one line for anything that cannot be read."""
    paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
    if not paths:
        raise ValueError('load_dataset: no files given')
    out, collecting = [], gc.isenabled()
    gc.disable()  # rows make no cycles, but so many of them would be looked for
    try:
        for p in map(os.fspath, paths):
            out += [(p, d) for d in _load(p, num_proc)]
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise ValueError(f'{p}: corrupt gzip data ({e})') from None
    finally:
        gc.enable() if collecting else None
    t = out[0][1]._type
    for p, d in out[1:]:
        try:
            t = unify(t, d._type)
        except _Mixed as e:
            raise ValueError(f'{p}: {e} in the files before') from None
    return concatenate([d for _, d in out]) if len(out) > 1 else out[0][1]


def _load(path, num_proc):
    """-> [Dataset], one entry but for a folder of several shards."""
    if os.path.isdir(path):
        return _load_folder(path)
    if not os.path.isfile(path):
        raise ValueError(f'{path}: no such file')
    id, kind = _file_id(path), os.path.splitext(path.removesuffix('.gz'))[1]
    if id[1] == 0:
        raise (ArrowError if kind == '.arrow' else ValueError)(f'{path}: the file is empty')
    with gzip.open(path) if path.endswith('.gz') else open(path, 'rb', 0) as raw:
        head = raw.read(256).removeprefix(b'\xef\xbb\xbf').lstrip()
        raw.seek(0)
        if kind == '.arrow' or head[:6] == b'ARROW1' or head[:4] == b'\xff\xff\xff\xff':
            return _open_arrow(path)
        if kind == '.parquet':
            return [_load_parquet(path)]
        sink, f = _Sink(), io.BufferedReader(raw, _BLOCK)
        if kind in ('.csv', '.tsv'):
            sink = _read_csv(f, path, '\t' if kind == '.tsv' else ',')
        elif head[:1] == b'[':
            _read_list(f, path, sink)
        elif head[:1] == b'{' or kind in ('.jsonl', '.json', '.ndjson'):
            if num_proc > 1 and id[1] > 16 * _BLOCK and not path.endswith('.gz') and (done := _parallel(path, id[1], num_proc)):
                return [Dataset(done._chunks, done._type, id=id)]
            _read_lines(f, path, sink, None)
        else:
            raise ValueError(f'{path}: not one of {_FORMS}')
    ds = sink.dataset(id)
    if not len(ds):
        raise ValueError(f'{path}: no rows in it')
    return [ds]


def _file_id(path):
    stat = os.stat(path)
    return os.path.abspath(path), stat.st_size, stat.st_mtime_ns


def _open_arrow(path, many=False):
    with _corrupt(path), open(path, 'rb') as f:
        found = _read_ipc(_Source(f), many)
    return [Dataset(chunks, t, None, _special(meta, t), _file_id(path)) for t, meta, chunks in found]


def _special(meta, t):
    """HF features out of the schema's metadata, where they say more than the types do (ClassLabel ...)."""
    try:
        found = json.loads(dict(meta).get(b'huggingface', b'{}')).get('info', {}).get('features', {})
        return {f.name: found[f.name] for f in t.fields if f.name in found and found[f.name] != _feature(f.type)}
    except (ValueError, AttributeError, TypeError):
        return {}  # another program's metadata under that key


def _load_folder(path):
    state, splits = os.path.join(path, 'state.json'), os.path.join(path, 'dataset_dict.json')
    try:
        if os.path.isfile(splits):
            with open(splits, 'rb') as f:
                names = json.load(f)['splits']
            if len(names) != 1:
                raise ValueError(f"{path} holds the splits {', '.join(names)}: give one of them, {os.path.join(path, names[0])}")
            path, state = os.path.join(path, names[0]), os.path.join(path, names[0], 'state.json')
        if not os.path.isfile(state):
            raise ValueError(f'{path} is a folder without state.json: give a folder that save_to_disk made, or a list of files')
        with open(state, 'rb') as f:
            files = [os.path.join(path, os.path.basename(x['filename'])) for x in json.load(f)['_data_files']]
    except (KeyError, TypeError, json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ArrowError(f'{path}: corrupt state ({type(e).__name__}: {e})') from None
    missing = [f for f in files if not os.path.isfile(f)]
    if missing or not files:
        raise ArrowError(f'{path}: {missing[0] if missing else "no data files"} is missing')
    return [d for f in files for d in _open_arrow(f)]


def _load_parquet(path):
    try:
        import pyarrow as pa
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f'{path}: parquet is read by pyarrow, which is not installed: pip install pyarrow') from None
    spill = tempfile.TemporaryFile()
    try:
        with pa.parquet.ParquetFile(path) as f, pa.ipc.new_stream(spill, f.schema_arrow) as w:
            for batch in f.iter_batches():
                w.write_batch(batch)
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f'{path}: {" ".join(str(e).split())}') from None
    spill.flush()
    with _corrupt(path):
        (t, meta, chunks), = _read_ipc(_Source(spill))
    return Dataset(chunks, t, None, _special(meta, t), _file_id(path))


def _read_lines(f, path, sink, end):
    """JSON lines from f (to byte `end`, where a line ends) into the sink. Each line is decoded by itself: in a block, one 漢 makes every
    character two bytes wide."""
    first, pos = 1, f.tell()
    while pos != end and (lines := f.readlines(_BLOCK)):
        rows, at, bom = [], [], pos == 0
        pos += sum(map(len, lines))
        while end is not None and pos > end:
            pos -= len(lines.pop())
        if bom:
            lines[0] = lines[0].removeprefix(b'\xef\xbb\xbf')
        for i, line in enumerate(lines, first):
            try:
                text = line.decode()
                row, stop = _SCAN(text, 0)
                row = row if text[stop:] in _ENDS and type(row) is dict else _odd_line(line, f'{path}:{i}')
            except (StopIteration, ValueError, RecursionError):
                row = _odd_line(line, f'{path}:{i}')
            if row is not None:
                rows.append(row)
                at.append(i)
        sink.add(rows, lambda k, e: f'{path}:{at[k]}: {e}')
        first += len(lines)


def _odd_line(line, place):
    """A line that is no bare object: None if it is blank, the object if spaces surround it, else what is wrong with it."""
    try:
        text = line.decode().removesuffix('\n').removesuffix('\r')
        row = json.loads(text) if text and not text.isspace() else None
    except UnicodeDecodeError as e:
        raise ValueError(f'{place}:{e.start + 1}: not UTF-8 ({e.reason})') from None
    except json.JSONDecodeError as e:
        raise ValueError(f'{place}:{e.colno}: {e.msg}; expected one JSON object a line, or one list of objects') from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{place}: {e}') from None
    if not isinstance(row, dict) and text and not text.isspace():
        raise ValueError(f'{place}:1: expected an object {{...}}, got {text.strip()[:40]}')
    return row


def _read_list(f, path, sink):
    """One JSON list of objects, parsed piece by piece: memory holds a block, not the file."""
    text, buf, space = io.TextIOWrapper(f, 'utf-8-sig', newline=''), '', json.decoder.WHITESPACE.match
    at, line, start = 0, 1, 0  # the place in buf, its line, where in buf that line starts (below 0: before it)

    def go(to):
        nonlocal at, line, start
        if (n := buf.count('\n', at, to)):
            line, start = line + n, buf.rfind('\n', at, to) + 1
        at = to

    def fail(message, to):
        go(to)
        raise ValueError(f'{path}:{line}:{at - start + 1}: {message}')

    def more():
        nonlocal buf, at, start
        try:
            new = text.read(_BLOCK)
        except UnicodeDecodeError as e:
            raise ValueError(f'{path}: behind line {line}: not UTF-8 ({e.reason})') from None
        buf, at, start = buf[at:] + new, 0, start - at
        return bool(new)

    def peek():
        """The next character that is no space, '' at the end."""
        while True:
            go(space(buf, at).end())
            if at < len(buf) or not more():
                return buf[at:at + 1]

    def value():
        """The object at `at`, and its end."""
        while True:
            try:
                return _SCAN(buf, at)
            except (StopIteration, ValueError, RecursionError) as e:  # a fault, or an object that the end of the buffer cuts
                stop = isinstance(e, StopIteration)
                ahead, why = (e.value if stop else getattr(e, 'pos', at)) - at, 'Expecting value' if stop else getattr(e, 'msg', str(e))
            if not (at + ahead > len(buf) - 16 or why.startswith('Unterminated')) or not more():
                fail(why, at + ahead)

    rows, lines, size, follows = [], [], 0, False
    peek()
    go(at + 1)  # the '[', which the caller has seen
    while (char := peek()) != ']':
        if follows:
            if char != ',':
                fail("expected ',' or ']'" if char else 'the list is cut off', at)
            go(at + 1)
            char = peek()
        if char != '{':
            fail(f'expected an object {{...}}, got {buf[at:at + 40]!r}' if char else 'the list is cut off', at)
        row, end = value()
        rows.append(row)
        lines.append(line)
        size, follows = size + end - at, True
        go(end)
        if size >= _BLOCK:
            sink.add(rows, lambda k, e: f'{path}:{lines[k]}: {e}')
            rows, lines, size = [], [], 0
    go(at + 1)
    if peek():
        fail('something stands behind the end of the list', at)
    sink.add(rows, lambda k, e: f'{path}:{lines[k]}: {e}')


def _parallel(path, size, num_proc):
    """JSON lines in num_proc processes -> Dataset, or None on any fault: the caller reads again in one, for the exact place."""
    cuts, work = [0], tempfile.mkdtemp(prefix='plainrlhf-load-')
    with open(path, 'rb') as f:
        for k in range(1, 2 * num_proc):
            f.seek(max(size * k // (2 * num_proc), cuts[-1]))
            f.readline()
            cuts.append(f.tell())
    pieces = [(path, lo, hi, os.path.join(work, f'{i:06d}.arrow')) for i, (lo, hi) in enumerate(zip(cuts, [*cuts[1:], size])) if lo < hi]
    try:
        _pool(_lines_piece, pieces, num_proc, None)
        return concatenate([d for p in pieces for d in _open_arrow(p[3], many=True)])
    except ValueError:
        return None
    finally:
        shutil.rmtree(work)


def _lines_piece(job, path, lo, hi, out):
    with open(path, 'rb', _BLOCK) as f, open(out, 'wb') as g:
        f.seek(lo)
        sink = _Sink(g)
        _read_lines(f, path, sink, hi)
        sink.flush()


_INT, _FLOAT = re.compile(r'-?(0|[1-9]\d*)').fullmatch, re.compile(r'[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?|[nN]a[nN]').fullmatch
_CSV = {'int64': (lambda v: _INT(v) and -2**63 <= int(v) < 2**63, int), 'float64': (_FLOAT, float), 'bool': (lambda v: v.lower() in ('true', 'false'), lambda v: v.lower() == 'true'),
        'string': (lambda v: True, str)}


def _read_csv(f, path, delimiter):
    """Comma- or tab-separated values with a header -> _Sink. A column is int64, float64 or bool if all its values are, else string; an
    empty field is null. Texts first, numbers in a second pass: a late word in a column of numbers must not have cost the early "007"."""
    csv.field_size_limit(_MAX32)
    reader, raw, out = csv.reader(io.TextIOWrapper(f, 'utf-8-sig', newline=''), delimiter=delimiter, strict=True), _Sink(), _Sink()
    try:
        names = next(reader)
        if len(set(names)) < len(names):
            raise ValueError(f'{path}:1: two columns with one name: {", ".join(names)}')
        kinds, rows = {k: dict(_CSV) for k in names}, []
        for row in itertools.chain(reader, [None]):
            if row and len(row) != len(names):
                raise ValueError(f'{path}:{reader.line_num}: {len(row)} fields, the header has {len(names)}')
            if row:
                rows.append(row)
            if rows and (row is None or len(rows) == 10000):
                columns = dict(zip(names, zip(*rows)))
                for k, values in columns.items():
                    kinds[k] = {n: fit for n, fit in kinds[k].items() if all(fit[0](v) for v in set(values) if v)}
                raw.add([dict(zip(names, (v or None for v in row))) for row in rows], lambda k, e: f'{path}: {e}')
                rows = []
    except StopIteration:
        raise ValueError(f'{path}: the file is empty') from None
    except csv.Error as e:
        raise ValueError(f'{path}:{reader.line_num}: {e}') from None
    except UnicodeDecodeError as e:
        raise ValueError(f'{path}: behind line {reader.line_num}: not UTF-8 ({e.reason})') from None
    for block in raw.dataset().iter(10000):
        make = {k: next(iter(kinds[k].values()))[1] for k in names}
        rows = zip(*([None if v is None else make[k](v) for v in values] for k, values in block.items()))
        out.add([dict(zip(block, row)) for row in rows], lambda k, e: f'{path}: {e}')
    return out


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
