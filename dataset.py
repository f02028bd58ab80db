"""Columns without copies: Arrow IPC over mmap, `load_dataset`, batching and packing; below them tokenizers and chat templates."""
import bisect, builtins, collections, contextlib, csv, datetime, functools, gc, gzip, hashlib, io, itertools, json, math, mmap, operator, os, pickle
import queue, re, shutil, struct, sys, sysconfig, tempfile, threading, time, types, warnings, weakref, zlib, zoneinfo
import concurrent.futures
import multiprocessing
from types import NoneType
from typing import NamedTuple

import numpy as np
import torch

import files

# ---------------------------------------------------------------------------------------------------------------------
# part 1: Arrow IPC, load_dataset, Dataset, batching, packing, linter
# ---------------------------------------------------------------------------------------------------------------------

class ArrowError(ValueError):
    """A file that is not what it claims to be: corrupt, cut off, or of an Arrow type or feature that is not read here (then named).
    A file of up to 32 MiB is checked when it is opened: metadata, lengths, each offset and dictionary index. A larger one only as far as all of
    it is there, each batch then at first use: an open that reads 300 MB is none. In both, when the value is read: text that is not UTF-8, a
    date that Python cannot hold. Always this error; `python dataset.py lint FILE` reads every value."""


class Type(NamedTuple):
    """An Arrow type. arg: unit of time32/time64/duration; (unit, zone) of timestamp; width of fixed_size_binary and fixed_size_list; keys
    sorted, of map; (index kind, ordered) of dictionary. fields: children (list, struct; map: one struct of key and value; dictionary: the
    values). Type('timestamp', ('us', 'UTC')), Type('list', None, (Field('item', Type('int64')),))."""
    kind: str
    arg: object = None
    fields: tuple = ()


class Field(NamedTuple):
    name: str
    type: Type
    nullable: bool = True
    meta: tuple = ()  # ((key, value), ...), bytes


_NUMPY = {**{k: np.dtype(k) for k in 'int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64'.split()}, **{k: np.dtype('i4') for k in
          ('date32', 'time32')}, **{k: np.dtype('i8') for k in ('date64', 'time64', 'timestamp', 'duration')}}
_WIDE = {'string': False, 'binary': False, 'list': False, 'map': False, 'large_string': True, 'large_binary': True, 'large_list': True}  # 64-bit offsets?
_TEXT, _UNITS, _PER = ('string', 'large_string'), dict(enumerate(('s', 'ms', 'us', 'ns'))), {'s': 1, 'ms': 10**3, 'us': 10**6, 'ns': 10**9}
_EPOCH, _DAY0 = datetime.datetime(1970, 1, 1), datetime.date(1970, 1, 1).toordinal()


class Array:
    """n values of one type in Arrow's memory layout. valid: None (no nulls) or bits, LSB first; data: numbers (numpy), bits (bool), dictionary
    indices, or the bytes (memoryview) that offs cuts into strings; offs cuts kids[0] into lists; kids: children."""
    __slots__ = ('type', 'n', 'valid', 'data', 'offs', 'kids', 'ok', 'memo', 'cuts')

    def __init__(self, type, n, valid=None, data=None, offs=None, kids=(), ok=True):
        self.type, self.n, self.valid, self.data, self.offs, self.kids, self.ok = type, n, valid, data, offs, kids, ok
        self.memo = self.cuts = None

    def check(self, deep=False):
        """What costs a pass over the offsets: when a small file is opened (deep: the children too), else at first use."""
        for kid in self.kids if deep else ():
            kid.check(True)
        if not self.ok:
            o, end = self.offs, self.kids[0].n if self.kids else len(self.data or b'')
            if o is not None and not (0 <= o[0] and o[-1] <= end and (o[1:] >= o[:-1]).all()):
                raise ArrowError(f'corrupt: the offsets of a {self.type.kind} column fall, or lead beyond its {end} values')
            if self.type.kind == 'dictionary' and self.n:
                at = self.data if self.valid is None else self.data[_bits(self.valid, 0, self.n)]
                if at.size and not 0 <= at.min() <= at.max() < max(self.kids[0].n, 1):  # under a null parent 0 may stand for no value at all
                    raise ArrowError('corrupt: a dictionary index points outside of its dictionary')
            self.ok = True
        if self.cuts is None and self.valid is None and self.type.kind in _TEXT:  # the usual column
            self.cuts = memoryview(self.offs), memoryview(np.diff(self.offs))  # their items are Python's ints: get() is twice as fast
        return self

    def get(self, i):
        """Value i as a Python object."""
        if self.cuts is None:
            return self.list(i, i + 1)[0]
        o, _ = self.cuts
        try:
            return str(self.data[o[i]:o[i + 1]], 'utf-8')
        except UnicodeDecodeError as e:
            raise ArrowError(f'corrupt: text that is not UTF-8 ({e.reason})') from None

    def list(self, lo, hi):
        """Values lo..hi as Python objects, what pyarrow's to_pylist() gives; nanosecond times are np.datetime64 and np.timedelta64."""
        if self.cuts is not None:
            o, lengths = self.cuts
            return _strings(self.data[o[lo]:o[hi]], lengths[lo:hi], True, None)
        self.check()
        k, valid = self.type.kind, None if self.valid is None else _bits(self.valid, lo, hi)
        if valid is not None and valid.all():
            valid = None
        if k == 'null':
            return [None] * (hi - lo)
        if k in ('bool', 'dictionary') or k in _NUMPY:
            raw = _bits(self.data, lo, hi) if k == 'bool' else self.data[lo:hi]
            out = (raw if valid is None or k == 'bool' else np.where(valid, raw, raw.dtype.type(0))).tolist()  # a null slot may hold anything
            if k == 'dictionary' and self.memo is None:
                self.memo = self.kids[0].list(0, self.kids[0].n) or [None]
            out = [self.memo[i] for i in out] if k == 'dictionary' else _times(out, self.type) if k[:4] in ('date', 'time', 'dura') else out
        elif self.offs is not None and not self.kids:
            o = self.offs[lo:hi + 1]
            out = _strings(self.data[o[0]:o[-1]], np.diff(o).tolist(), k in _TEXT, valid)
        elif self.offs is not None:
            base = int(self.offs[lo])
            o = (self.offs[lo:hi + 1] - base).tolist()
            flat = self.kids[0].list(base, base + o[-1])
            flat = [tuple(kv.values()) for kv in flat] if k == 'map' else flat
            out = [flat[x:y] for x, y in zip(o, o[1:])]
        elif k == 'fixed_size_binary':
            w = self.type.arg
            out = [bytes(self.data[i * w:i * w + w]) for i in range(lo, hi)]
        elif k == 'fixed_size_list':
            w = self.type.arg
            flat = self.kids[0].list(lo * w, hi * w)
            out = [flat[i * w:i * w + w] for i in range(hi - lo)]
        else:
            names = [f.name for f in self.type.fields]
            out = [dict(zip(names, row)) for row in zip(*[kid.list(lo, hi) for kid in self.kids])] if names else [{} for _ in range(lo, hi)]
        return out if valid is None else [v if ok else None for v, ok in zip(out, valid.tolist())]


def _strings(data, lengths, text, valid):
    """data cut into pieces of these lengths, as str or bytes. All of it in C: a file in memory is read piece by piece, which beats slicing."""
    parts = map(io.BytesIO(data).read, lengths)
    if valid is not None:  # what stands in a null slot need not be text
        parts = [p if ok else b'' for p, ok in zip(parts, valid.tolist())]
    try:
        return list(map(bytes.decode, parts) if text else parts)
    except UnicodeDecodeError as e:
        raise ArrowError(f'corrupt: text that is not UTF-8 ({e.reason})') from None


def _times(values, t):
    """Integers to the objects of the datetime module."""
    k, unit = t.kind, t.arg[0] if t.kind == 'timestamp' else t.arg
    zone = _zone(t.arg[1]) if k == 'timestamp' and t.arg[1] else None
    try:
        if k in ('date32', 'date64'):
            return [datetime.date.fromordinal(_DAY0 + v // (1 if k == 'date32' else 86400000)) for v in values]
        if unit == 'ns' and k in ('timestamp', 'duration'):
            return [(np.datetime64 if k == 'timestamp' else np.timedelta64)(v, 'ns') for v in values]
        spans = [datetime.timedelta(microseconds=v * 10**6 // _PER[unit]) for v in values]
        if k == 'duration':
            return spans
        if k != 'timestamp':
            if spans and not datetime.timedelta(0) <= min(spans) <= max(spans) < datetime.timedelta(1):
                raise ValueError('outside of the day')
            return [(_EPOCH + s).time() for s in spans]
        return [_EPOCH + s if zone is None else (_EPOCH + s).replace(tzinfo=datetime.timezone.utc).astimezone(zone) for s in spans]
    except (OverflowError, ValueError) as e:
        raise ArrowError(f"a {k} beyond Python's range ({e})") from None


def _zone(name):
    fixed = re.fullmatch(r'([+-])(\d\d):?(\d\d)', name)
    try:
        if fixed:
            return datetime.timezone((1 if fixed[1] == '+' else -1) * datetime.timedelta(hours=int(fixed[2]), minutes=int(fixed[3])))
        return datetime.timezone.utc if name.upper() in ('UTC', 'Z') else zoneinfo.ZoneInfo(name)
    except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError):
        raise ArrowError(f'unknown time zone {name[:40]!r}') from None


def _bits(b, lo, hi):
    return np.unpackbits(b[lo >> 3:(hi + 7) >> 3], bitorder='little')[lo & 7:(lo & 7) + hi - lo].view(bool)


def _pack(mask):
    """bool (n,) -> bits, or None where all are set."""
    return None if mask.all() else np.packbits(mask, bitorder='little')


# --- arrays out of Python values, and out of each other ---

_MIX = {frozenset(('int', 'float')): 'float'}


class _Mixed(ValueError):
    """No one type for these values; .path leads to the column."""

    def __init__(self, message, path=()):
        super().__init__(f"column {'.'.join(path)!r}: {message}" if path else message)
        self.message, self.path = message, path


@contextlib.contextmanager
def _within(name):
    """Errors inside are of the column `name`."""
    try:
        yield
    except _Mixed as e:
        raise _Mixed(e.message, (name, *e.path)) from None


def _table(kids):
    """{name: Array}, all of one length -> one struct Array."""
    if len({a.n for a in kids.values()}) > 1:
        raise _Mixed(f"columns of different lengths: {', '.join(f'{k} {a.n}' for k, a in kids.items())} (in map: name the old ones in remove_columns)")
    return Array(Type('struct', None, tuple(Field(k, a.type) for k, a in kids.items())), next((a.n for a in kids.values()), 0), kids=tuple(kids.values()))


@functools.cache
def _group(t):
    for name, kinds in (('bool', (bool, np.bool_)), ('int', (int, np.integer)), ('float', (float, np.floating)), ('string', str),
                        ('binary', (bytes, bytearray, memoryview)), ('object', dict), ('list', (list, tuple, np.ndarray, torch.Tensor)), ('datetime64',
                        np.datetime64), ('timedelta64', np.timedelta64), ('datetime', datetime.datetime), ('date', datetime.date),
                        ('time', datetime.time), ('timedelta', datetime.timedelta)):
        if issubclass(t, kinds) and not (name == 'int' and issubclass(t, np.timedelta64)):
            return name
    raise _Mixed(f'values of type {t.__name__} have no column type')


def array(values, type=None):
    """A sequence of Python values (or a numpy array, a tensor) -> Array; the type is inferred from all of them, or cast to `type`. None is
    null, missing keys are null, int with float is float64. ValueError where one type cannot hold them, or a number does not fit."""
    if type is not None:
        return cast(array(_demap(values, type)), type)
    values = values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else values
    if isinstance(values, np.ndarray):
        if values.ndim > 1 and values.dtype != object:
            kid = array(values.reshape(-1, *values.shape[2:]))
            return _lists(np.arange(len(values) + 1) * values.shape[1], kid)
        if values.dtype.name in _NUMPY:
            return Array(Type(values.dtype.name), len(values), data=np.ascontiguousarray(values))
        values = values if values.dtype.kind in 'mM' else values.tolist()
    n, kinds = len(values), set(map(builtins.type, values))
    none = NoneType in kinds
    kinds.discard(NoneType)
    groups = {_group(t) for t in kinds}
    group = groups.pop() if len(groups) == 1 else _MIX.get(frozenset(groups))
    if group is None:
        if groups:
            raise _Mixed(f"mixed types: {' and '.join(sorted(groups))}")
        return Array(Type('null'), n)
    valid, rest = None, values
    if none:
        mask = np.fromiter((v is not None for v in values), bool, n)
        valid, rest = _pack(mask), [v for v in values if v is not None]
    if group == 'object':
        return _structs(values, n, valid, none)
    if group == 'list':
        rest = [v.detach().cpu().numpy() if isinstance(v, torch.Tensor) else v for v in rest] if torch.Tensor in kinds else rest
        lengths = np.fromiter((0 if v is None else len(v) for v in values) if none else map(len, values), np.int64, n)
        same = rest and all(isinstance(v, np.ndarray) and v.ndim == 1 and v.dtype == rest[0].dtype for v in rest)
        return _lists(np.concatenate([[0], np.cumsum(lengths)]), array(np.concatenate(rest) if same else list(itertools.chain.from_iterable(rest))), valid)
    if group in ('string', 'binary'):
        return _texts(rest, group == 'string', n, valid)
    kind, data = _numbers(rest, group, kinds)
    if none:
        full = np.zeros(n, data.dtype)  # null slots are zero
        full[mask] = data
        data = full
    return Array(kind, n, valid, np.packbits(data, bitorder='little') if group == 'bool' else data)


def _numbers(values, group, kinds):
    try:
        if group == 'bool':
            return Type('bool'), np.array(values, bool)
        if group in ('int', 'float'):
            name = np.dtype(next(iter(kinds))).name if len(kinds) == 1 and issubclass(next(iter(kinds)), np.generic) else None
            name = name if name in _NUMPY else 'float64' if group == 'float' else 'uint64' if max(values) > 2**63 - 1 else 'int64'
            return Type(name), np.array(values, name)
        if group in ('datetime64', 'timedelta64'):
            return Type('timestamp', ('ns', None)) if group == 'datetime64' else Type('duration', 'ns'), np.array(values, f'{group}[ns]').view('i8')
        us = datetime.timedelta(microseconds=1)
        if group == 'datetime':
            zone = values[0].tzinfo
            base = _EPOCH.replace(tzinfo=datetime.timezone.utc) if zone else _EPOCH
            return Type('timestamp', ('us', (getattr(zone, 'key', None) or str(zone).removeprefix('UTC') or 'UTC') if zone else None)), np.array([(v - base) // us for v in values])
        if group == 'date':
            return Type('date32'), np.array([v.toordinal() - _DAY0 for v in values], 'i4')
        if group == 'time':
            return Type('time64', 'us'), np.array([(datetime.datetime.combine(_EPOCH, v) - _EPOCH) // us for v in values])
        return Type('duration', 'us'), np.array([v // us for v in values])
    except (OverflowError, TypeError) as e:
        raise _Mixed('an integer beyond 64 bits' if group == 'int' else f'{group}: {e}') from None


def _texts(values, text, n, valid):
    """Strings or bytes of the valid slots -> Array."""
    try:
        parts = list(map(str.encode, values)) if text else values
    except UnicodeEncodeError:
        raise _Mixed('text with a lone surrogate (half a character), which UTF-8 cannot hold') from None
    lengths = np.zeros(n, np.int64)
    lengths[slice(None) if valid is None else _bits(valid, 0, n)] = np.fromiter(map(len, parts), np.int64, len(values))
    raw = b''.join(parts)
    wide = len(raw) > _MAX32
    offs = np.concatenate([[0], np.cumsum(lengths)]).astype('i8' if wide else 'i4')
    return Array(Type(('large_' if wide else '') + ('string' if text else 'binary')), n, valid, memoryview(raw), offs)


def _lists(offs, kid, valid=None):
    wide = offs[-1] > _MAX32
    return Array(Type('large_list' if wide else 'list', None, (Field('item', kid.type),)), len(offs) - 1, valid, None, offs.astype('i8' if wide else 'i4'), (kid,))


def _structs(values, n, valid, none):
    rows = [{} if v is None else v for v in values] if none else values
    names = list(dict.fromkeys(itertools.chain.from_iterable(rows))) if none or len(set(map(len, rows))) > 1 else list(rows[0])
    odd = [k for k in names if not isinstance(k, str)]
    if odd:
        raise _Mixed(f'the key {odd[0]!r} is not a string')
    kids = []
    for name in names:
        try:
            column = list(map(operator.itemgetter(name), rows))
        except KeyError:
            if not none and len(set(map(len, rows))) == 1:  # as many keys in each row, but not the same ones
                return _structs(values, n, valid, True)
            column = [r.get(name) for r in rows]
        with _within(name):
            kids.append(array(column))
    return Array(Type('struct', None, tuple(Field(k, kid.type) for k, kid in zip(names, kids))), n, valid, kids=tuple(kids))


def _demap(values, t):
    """Maps as lists of pairs -> lists of {'key', 'value'}, which is how Arrow stores them."""
    def has(t):
        return t.kind == 'map' or any(has(f.type) for f in t.fields)
    if not has(t):
        return values
    if t.kind == 'struct':
        return [v and {f.name: _demap([v.get(f.name)], f.type)[0] for f in t.fields} for v in values]
    pairs = (lambda v: [{'key': a, 'value': b} for a, b in (v.items() if isinstance(v, dict) else v)]) if t.kind == 'map' else (lambda v: v)
    return [None if v is None else _demap(pairs(v), t.fields[0].type) for v in values]


def nulls(t, n):
    """n nulls of a type, as cheap as they come."""
    valid, w = np.zeros((n + 7) // 8, np.uint8), t.arg if t.kind.startswith('fixed') else 0
    if t.kind == 'null':
        return Array(t, n)
    if t.kind == 'dictionary':
        return Array(t, n, valid, np.zeros(n, t.arg[0]), kids=(nulls(t.fields[0].type, 0),))
    if t.kind in _WIDE:
        return Array(t, n, valid, memoryview(b''), np.zeros(n + 1, 'i8' if _WIDE[t.kind] else 'i4'), tuple(nulls(f.type, 0) for f in t.fields))
    data = valid if t.kind == 'bool' else np.zeros(n, _NUMPY[t.kind]) if t.kind in _NUMPY else memoryview(bytes(n * w)) if t.kind == 'fixed_size_binary' else None
    return Array(t, n, valid, data, kids=tuple(nulls(f.type, n * (w or 1)) for f in t.fields))


def take(a, at):
    """The rows `at`: a slice (without a copy, but for bits) or int64 indices, -1 = null."""
    a.check()
    t, piece, lack = a.type, isinstance(at, slice), None
    if piece:
        lo, hi, _ = at.indices(a.n)
        if lo == 0 and hi == a.n:
            return a
        n = max(hi - lo, 0)
    else:
        n, miss = len(at), at < 0
        if miss.any():
            if a.n == 0 or miss.all():
                return nulls(t, n)
            lack, at = ~miss, np.where(miss, 0, at)
    if t.kind == 'null':
        return Array(t, n)
    bits = (lambda b: _bits(b, lo, hi)) if piece else (lambda b: _bits(b, 0, a.n)[at])
    valid = None if a.valid is None else bits(a.valid)
    valid = lack if valid is None else valid if lack is None else valid & lack
    valid = None if valid is None else _pack(valid)
    if t.kind == 'bool':
        return Array(t, n, valid, np.packbits(bits(a.data), bitorder='little'))
    if t.kind == 'dictionary' or t.kind in _NUMPY:
        return Array(t, n, valid, a.data[at], kids=a.kids)
    if t.kind == 'struct':
        return Array(t, n, valid, kids=tuple(take(k, at) for k in a.kids))
    if t.kind.startswith('fixed'):
        w = t.arg
        rows = slice(lo * w, hi * w) if piece else (at[:, None] * w + np.arange(w)).reshape(-1)
        data = None if a.kids else a.data[rows] if piece else memoryview(np.frombuffer(a.data, np.uint8)[rows].tobytes())
        return Array(t, n, valid, data, kids=tuple(take(k, rows) for k in a.kids))
    if piece:
        return Array(t, n, valid, a.data, a.offs[lo:hi + 1], a.kids)
    first = a.offs[:-1][at].astype('i8')
    lengths = a.offs[1:][at] - first
    offs = np.concatenate([[0], np.cumsum(lengths)])
    if a.kids:
        rows = np.arange(offs[-1]) + np.repeat(first - offs[:-1], lengths)
        return Array(t, n, valid, None, _narrow(offs, t), (take(a.kids[0], rows),))
    data = b''.join([a.data[x:y] for x, y in zip(first.tolist(), (first + lengths).tolist())])
    return Array(t, n, valid, memoryview(data), _narrow(offs, t))


def _narrow(offs, t):
    if not _WIDE[t.kind] and offs[-1] > _MAX32:
        raise OverflowError(f'more than 2 GiB in one batch of a {t.kind} column')
    return offs.astype('i8' if _WIDE[t.kind] else 'i4')


def concat(arrays):
    """Arrays of one type, end to end."""
    t, n = arrays[0].type, sum(a.n for a in arrays)
    if len(arrays) == 1 or t.kind == 'null':
        return arrays[0] if len(arrays) == 1 else Array(t, n)
    arrays = [a.check() for a in arrays]
    valid = None
    if any(a.valid is not None for a in arrays):
        valid = _pack(np.concatenate([np.ones(a.n, bool) if a.valid is None else _bits(a.valid, 0, a.n) for a in arrays]))
    if t.kind == 'dictionary':
        kids = list({id(a.kids[0]): a.kids[0] for a in arrays}.values())
        bases = dict(zip(map(id, kids), np.cumsum([0, *(k.n for k in kids)]).tolist()))
        if sum(k.n for k in kids) - 1 > np.iinfo(t.arg[0]).max:
            return cast(concat([cast(a, t.fields[0].type) for a in arrays]), t)  # too many for the index: count again
        return Array(t, n, valid, np.concatenate([a.data + _NUMPY[t.arg[0]].type(bases[id(a.kids[0])]) for a in arrays]), kids=(concat(kids),))
    if t.kind == 'bool':
        return Array(t, n, valid, np.packbits(np.concatenate([_bits(a.data, 0, a.n) for a in arrays]), bitorder='little'))
    if t.kind in _NUMPY:
        return Array(t, n, valid, np.concatenate([a.data for a in arrays]))
    if t.kind in _WIDE:
        spans = [(int(a.offs[0]), int(a.offs[-1])) for a in arrays]
        offs = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(a.offs) for a in arrays]), dtype='i8')])
        if t.fields:
            return Array(t, n, valid, None, _narrow(offs, t), (concat([take(a.kids[0], slice(*s)) for a, s in zip(arrays, spans)]),))
        return Array(t, n, valid, memoryview(b''.join(a.data[x:y] for a, (x, y) in zip(arrays, spans))), _narrow(offs, t))
    data = memoryview(b''.join(a.data[:a.n * t.arg] for a in arrays)) if t.kind == 'fixed_size_binary' else None
    return Array(t, n, valid, data, kids=tuple(concat([a.kids[i] for a in arrays]) for i in range(len(t.fields))))


def unify(a, b):
    """The type that holds both. ValueError where there is none. int64, float32 -> float64; null, x -> x; structs: all fields of both."""
    ka, kb = a.kind, b.kind
    if a == b or kb == 'null':
        return a
    if ka == 'null':
        return b
    if ka.strip('0123456789') in ('int', 'uint', 'float') and kb.strip('0123456789') in ('int', 'uint', 'float'):
        wide = np.promote_types(ka, kb).name
        if ka[0] == kb[0] == 'f' or not wide.startswith('float'):
            return Type(wide)
        if 'f' in (ka[0], kb[0]):
            return Type('float64')
    if ka == 'struct' == kb:
        mine, other = ({f.name: f for f in t.fields} for t in (a, b))
        out = []
        for name in {**mine, **other}:
            f, g = mine.get(name), other.get(name)
            with _within(name):
                both = f and g and unify(f.type, g.type)
            out.append(Field(name, both, f.nullable or g.nullable, f.meta) if both else f or g)
        return Type('struct', None, tuple(out))
    lists = ('list', 'large_list', 'fixed_size_list')
    if ka in lists and kb in lists:
        kind = ka if ka == kb and a.arg == b.arg else 'large_list' if 'large_list' in (ka, kb) else 'list'
        return Type(kind, a.arg if kind == ka else None, (Field('item', unify(a.fields[0].type, b.fields[0].type)),))
    if ka.removeprefix('large_') == kb.removeprefix('large_') in ('string', 'binary'):
        return Type('large_' + ka.removeprefix('large_'))
    if 'dictionary' in (ka, kb):
        values = unify(*(t.fields[0].type if t.kind == 'dictionary' else t for t in (a, b)))
        return a if ka == kb and a.arg == b.arg and values == a.fields[0].type else values
    raise _Mixed(f'mixed types: {type_name(a)} and {type_name(b)}')


def type_name(t):
    """'int64', 'list<string>', 'struct<role: string>': pyarrow's words, float32 for float."""
    if t.kind == 'struct':
        return f"struct<{', '.join(f'{f.name}: {type_name(f.type)}' for f in t.fields)}>"
    if t.kind == 'timestamp':
        return f"timestamp[{t.arg[0]}{f', tz={t.arg[1]}' if t.arg[1] else ''}]"
    if t.fields:
        return f"{t.kind}<{', '.join(type_name(f.type) for f in t.fields)}>" + (f'[{t.arg}]' if t.kind == 'fixed_size_list' else '')
    return t.kind + (f'[{t.arg}]' if t.arg is not None else '')


def cast(a, t):
    """The same values as another type; ValueError where a value does not survive. A field that is missing becomes null."""
    s, k = a.type, t.kind
    if s == t:
        return a
    a.check()
    if s.kind == 'null':
        return nulls(t, a.n)
    if s.kind == 'dictionary':
        at = a.data.astype('i8') if a.valid is None else np.where(_bits(a.valid, 0, a.n), a.data.astype('i8'), -1)
        return cast(take(a.kids[0], at) if a.kids[0].n else nulls(a.kids[0].type, a.n), t)
    if k == 'dictionary':
        words = {v: i for i, v in enumerate(dict.fromkeys(v for v in a.list(0, a.n) if v is not None))}
        at = np.array([words.get(v, 0) for v in a.list(0, a.n)], t.arg[0])
        return Array(t, a.n, a.valid, at, kids=(array(list(words), t.fields[0].type),))
    if s.kind == 'struct' == k:
        mine = {f.name: kid for f, kid in zip(s.fields, a.kids)}
        return Array(t, a.n, a.valid, kids=tuple(cast(mine[f.name], f.type) if f.name in mine else nulls(f.type, a.n) for f in t.fields))
    if s.kind == 'fixed_size_list' and k in ('list', 'large_list'):
        a = _lists(np.arange(a.n + 1) * s.arg, a.kids[0], a.valid)
        s = a.type
    if a.kids and k in _WIDE and t.fields:
        return Array(t, a.n, a.valid, None, _narrow(a.offs.astype('i8'), t), (cast(a.kids[0], t.fields[0].type),))
    if a.offs is not None and not a.kids and k in _WIDE and not (k in _TEXT and s.kind not in _TEXT):
        return Array(t, a.n, a.valid, a.data, _narrow(a.offs.astype('i8'), t))
    if a.offs is not None and k in ('fixed_size_list', 'fixed_size_binary'):
        on = np.ones(a.n, bool) if a.valid is None else _bits(a.valid, 0, a.n)
        if (np.diff(a.offs)[on] != t.arg).any():
            raise _Mixed(f'{s.kind}: not every value has the length {t.arg} of {type_name(t)}')
        at = np.where(on[:, None], a.offs[:-1, None] + np.arange(t.arg), -1).reshape(-1).astype('i8')
        if a.kids:
            return Array(t, a.n, a.valid, kids=(cast(take(a.kids[0], at), t.fields[0].type),))
        return Array(t, a.n, a.valid, memoryview(np.append(np.frombuffer(a.data, np.uint8), np.uint8(0))[at].tobytes()))
    if s.kind in _NUMPY and k in _NUMPY:
        return Array(t, a.n, a.valid, _renumber(a, s, t))
    raise _Mixed(f'{type_name(s)} cannot become {type_name(t)}')


def _renumber(a, s, t):
    unit = [{'date32': 86400, 'date64': 1000}.get(x.kind) or _PER.get(x.arg[0] if x.kind == 'timestamp' else x.arg) for x in (s, t)]
    old = a.data
    if s.kind == 'date32' and t.kind == 'date64':
        return old.astype('i8') * 86400000
    if s.kind.rstrip('3264') == t.kind.rstrip('3264') and unit[0] and unit[1]:  # times of one sort, another unit
        new = old.astype('i8') * (unit[1] // unit[0]) if unit[1] >= unit[0] else old.astype('i8') // (unit[0] // unit[1])
        back = new // (unit[1] // unit[0]) if unit[1] >= unit[0] else new * (unit[0] // unit[1])
        new = new.astype(_NUMPY[t.kind])
    elif unit == [None, None]:
        with np.errstate(all='ignore'):
            new = old.astype(_NUMPY[t.kind])
            back = old if new.dtype.kind == 'f' else new.astype(old.dtype) if (new < 0).sum() == (old < 0).sum() else ~old
    else:
        raise _Mixed(f'{type_name(s)} cannot become {type_name(t)}')
    same = back == old
    if not (same if a.valid is None else same | ~_bits(a.valid, 0, a.n)).all():
        raise _Mixed(f'a {type_name(s)} that {type_name(t)} cannot hold')
    return new


# --- Arrow IPC: flatbuffers in and out, messages, files ----------------------------------------------------------------
# Message: FF FF FF FF, int32 n, n bytes of flatbuffer, body. A stream is Schema, (DictionaryBatch | RecordBatch)*, end mark; a file is
# ARROW1, a stream, a footer that lists the batches. https://arrow.apache.org/docs/format/Columnar.html, Message.fbs, Schema.fbs, File.fbs

_U8, _U16, _I16, _I32, _U32, _I64 = (struct.Struct('<' + c).unpack_from for c in 'BHhiIq')
_MAX32, _SPILL, _DEEP = 2**31 - 1, 64 << 20, 32 << 20
_REFUSED = {0: 'none', 7: 'decimal', 11: 'interval', 14: 'union', 22: 'run-end encoded', 23: 'binary_view', 24: 'string_view', 25: 'list_view', 26: 'large_list_view'}


class _Table:
    """A flatbuffer table read in place. Out of bounds raises struct.error; `left` bounds what one message may make us do (subtle: tables
    and strings may be shared, so a small buffer can describe an endless tree)."""
    __slots__ = ('buf', 'pos', 'vt', 'size', 'left')

    def __init__(self, buf, pos, left):
        self.buf, self.pos, self.vt, self.left = buf, pos, pos - _I32(buf, pos)[0], left
        if self.vt < 0 or left[0] < 0:
            raise ArrowError('corrupt metadata')
        self.size = _U16(buf, self.vt)[0]
        left[0] -= 8

    def at(self, slot):
        o = _U16(self.buf, self.vt + 4 + 2 * slot)[0] if 4 + 2 * slot < self.size else 0
        return self.pos + o if o else 0

    def num(self, slot, unpack, default=0):
        at = self.at(slot)
        return unpack(self.buf, at)[0] if at else default

    def table(self, slot):
        at = self.at(slot)
        return _Table(self.buf, at + _U32(self.buf, at)[0], self.left) if at else None

    def vec(self, slot, width):
        """(start, count) of a vector."""
        at = self.at(slot)
        if not at:
            return 0, 0
        at += _U32(self.buf, at)[0]
        n = _U32(self.buf, at)[0]
        self.left[0] -= n * width
        if at + 4 + n * width > len(self.buf) or self.left[0] < 0:
            raise ArrowError('corrupt metadata: a vector beyond its end')
        return at + 4, n

    def text(self, slot):
        start, n = self.vec(slot, 1)
        return self.buf[start:start + n]

    def tables(self, slot):
        start, n = self.vec(slot, 4)
        return [_Table(self.buf, p + _U32(self.buf, p)[0], self.left) for p in range(start, start + 4 * n, 4)]

    def pairs(self, slot):
        return tuple((kv.text(0), kv.text(1)) for kv in self.tables(slot))


def _root(buf):
    return _Table(buf, _U32(buf, 0)[0], [4 * len(buf) + 1024])


def _put(out, obj):
    """Appends obj to the flatbuffer `out`, returns its position. bytes: a string; _Rows: a vector of structs; tuple: a vector of tables;
    list: a table, each slot None, (format, number) or one of these."""
    if not isinstance(obj, list):
        out += bytes(-(len(out) + 4) % 8 if isinstance(obj, _Rows) else -len(out) % 4)
        pos, n = len(out), obj.n if isinstance(obj, _Rows) else len(obj)
        out += struct.pack('<I', n) + (obj.raw if isinstance(obj, _Rows) else obj + b'\0' if isinstance(obj, bytes) else bytes(4 * n))
        refs = list(zip(range(pos + 4, len(out), 4), obj)) if type(obj) is tuple else []
    else:
        formats = ['' if v is None else v[0] if isinstance(v, tuple) and len(v) == 2 and isinstance(v[0], str) else 'I' for v in obj]
        vt, at, size = 4 + 2 * len(obj), [0] * len(obj), 4
        for i in sorted(range(len(obj)), key=lambda i: -struct.calcsize('<' + formats[i])):
            width = struct.calcsize('<' + formats[i])
            if width:
                at[i] = size + -size % width
                size = at[i] + width
        out += bytes(-(len(out) + vt) % 8)
        pos = len(out) + vt
        out += struct.pack(f'<HH{len(obj)}Hi', vt, size, *at, vt) + bytes(size - 4)
        refs = []
        for v, f, o in zip(obj, formats, at):
            if f == 'I':
                refs.append((pos + o, v))
            elif f:
                struct.pack_into('<' + f, out, pos + o, v[1])
    for where, v in refs:
        struct.pack_into('<I', out, where, _put(out, v) - where)
    return pos


class _Rows(NamedTuple):
    n: int
    raw: bytes


def _flatbuffer(table):
    out = bytearray(4)
    struct.pack_into('<I', out, 0, _put(out, table))
    return bytes(out)


# (kind, arg) -> (type id, the numbers in its table); the rest, timestamp, fixed_size_* and map, have parameters of any size
_IDS = {(k, None): (i, ()) for k, i in {'null': 1, 'binary': 4, 'string': 5, 'bool': 6, 'list': 12, 'struct': 13, 'large_binary': 19, 'large_string': 20,
                                        'large_list': 21}.items()}
_IDS |= {(f'{u}int{b}', None): (2, (b, int(not u))) for u in ('', 'u') for b in (8, 16, 32, 64)}
_IDS |= {(f'float{b}', None): (3, (i,)) for i, b in enumerate((16, 32, 64))} | {(f'date{b}', None): (8, (i,)) for i, b in enumerate((32, 64))}
_IDS |= {(f'time{32 if i < 2 else 64}', u): (9, (i, 32 if i < 2 else 64)) for i, u in enumerate(_PER)} | {('duration', u): (18, (i,)) for i, u in enumerate(_PER)}
_KINDS, _SIZED = {v: k for k, v in _IDS.items()}, {'fixed_size_binary': 15, 'fixed_size_list': 16, 'map': 17}
_SLOTS = {2: (('i', 0), ('B', 0)), 3: (('h', 0),), 8: (('h', 1),), 9: (('h', 1), ('i', 32)), 10: (('h', 0),), 15: (('i', 0),), 16: (('i', 0),), 17: (('B', 0),),
          18: (('h', 1),)}  # by type id: format and default of the numbers


def _type_out(t):
    """Type -> (type id, slots of its flatbuffer table)."""
    if t.kind == 'timestamp':
        return 10, [('h', list(_PER).index(t.arg[0])), t.arg[1].encode() if t.arg[1] else None]
    tid, numbers = _IDS.get((t.kind, t.arg)) or (_SIZED[t.kind], (t.arg or 0,))
    return tid, [(f, n) for (f, _), n in zip(_SLOTS.get(tid, ()), numbers)]


def _field_out(f, path, ids):
    t, coded = f.type, None
    if t.kind == 'dictionary':
        ids[path] = len(ids)
        coded, t = [('q', ids[path]), _type_out(Type(t.arg[0]))[1], ('B', bool(t.arg[1]))], t.fields[0].type
        path += (0,)
    tid, slots = _type_out(t)
    if t.kind == 'map':  # its pairs and their keys are never null
        key, value = t.fields[0].type.fields
        t = t._replace(fields=(Field('entries', Type('struct', None, (key._replace(nullable=False), value)), False),))
    kids = tuple(_field_out(kid, path + (i,), ids) for i, kid in enumerate(t.fields))
    return [f.name.encode(), ('B', f.nullable), ('B', tid), slots, coded, kids, tuple([k, v] for k, v in f.meta) or None]


def _type_in(f, path, ids, depth=0):
    """Field table -> Type; ids takes the dictionary ids by path."""
    if depth > 64:
        raise ArrowError('types nested deeper than 64')
    coded = f.table(4)
    if coded:
        index = coded.table(1)
        name = 'int32' if index is None else ('' if index.num(1, _U8) else 'u') + f'int{index.num(0, _I32)}'
        if name not in _NUMPY:
            raise ArrowError(f'corrupt: dictionary indices of type {name}')
        ids[path] = coded.num(0, _I64)
        return Type('dictionary', (name, bool(coded.num(2, _U8))), (Field('', _plain_in(f, path + (0,), ids, depth)),))
    return _plain_in(f, path, ids, depth)


def _plain_in(f, path, ids, depth):
    tid, t, fields = f.num(2, _U8), f.table(3), f.tables(5)
    if tid in _REFUSED:
        raise ArrowError(f'column {f.text(0)[:40].decode()!r} is of type {_REFUSED[tid]}, which is not read here: cast it before it is written')
    if t is None:
        raise ArrowError('corrupt: a field without its type')
    kids = tuple(Field(k.text(0).decode(), _type_in(k, path + (i,), ids, depth + 1), bool(k.num(1, _U8)), k.pairs(6)) for i, k in enumerate(fields))
    numbers = tuple(t.num(i, {'B': _U8, 'h': _I16, 'i': _I32}[f], default) for i, (f, default) in enumerate(_SLOTS.get(tid, ())))
    if tid == 10:
        kind, arg = 'timestamp', (_UNITS[numbers[0]], t.text(1).decode() or None)
    elif tid in _SIZED.values():
        kind, arg = next(k for k, i in _SIZED.items() if i == tid), bool(numbers[0]) if tid == 17 else numbers[0]
    else:
        kind, arg = _KINDS.get((tid, numbers), (None, None))
    want = len(kids) if kind == 'struct' else kind in ('list', 'large_list', 'fixed_size_list', 'map')
    if kind is None or len(kids) != want or (tid in (15, 16) and arg < 0) or (tid == 17 and (kids[0].type.kind, len(kids[0].type.fields)) != ('struct', 2)):
        raise ArrowError(f'corrupt: a field of type id {tid} with {len(kids)} children and the parameters {numbers}')
    return Type(kind, arg, kids)


class _Source:
    """The bytes of a file: one map of it all, or maps of parts where ulimit -v forbids the one."""

    def __init__(self, file):
        self.size, self.map, self.name = os.fstat(file.fileno()).st_size, None, file.name
        with contextlib.suppress(OSError):
            self.map = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if self.size else memoryview(b'')
        self.file = os.fdopen(os.dup(file.fileno()), 'rb') if self.map is None else None  # ours, whatever becomes of the caller's
        self.batch = functools.lru_cache(4)(lambda read: read())  # with parts: the last few batches stay mapped

    def view(self, lo, hi):
        if not 0 <= lo <= hi <= self.size:
            raise ArrowError(f'cut off, or no Arrow data: bytes {lo} to {hi} are wanted, the file has {self.size}')
        if self.map is not None or lo == hi:
            return (self.map or memoryview(b''))[lo:hi]
        page = lo - lo % mmap.ALLOCATIONGRANULARITY
        return memoryview(mmap.mmap(self.file.fileno(), hi - page, offset=page, access=mmap.ACCESS_READ))[lo - page:]


class _Body:
    """The nodes and buffers of one batch, handed out in order; every length is checked against what is there."""

    def __init__(self, header, source, lo, size, dicts, budget):
        if header.at(3):
            raise ArrowError(f"the batches are compressed with {('LZ4', 'ZSTD')[header.table(3).num(0, _U8) & 1]}, which is not read here: write them uncompressed")
        (a, n), (b, m) = header.vec(1, 16), header.vec(2, 16)
        self.nodes = iter(list(struct.iter_unpack('<qq', header.buf[a:a + 16 * n])))
        self.bufs = iter(list(struct.iter_unpack('<qq', header.buf[b:b + 16 * m])))
        self.body, self.size, self.left, self.dicts, self.budget = source.view(lo, lo + size), size, size, dicts, budget

    def node(self, want):
        n, nulls = next(self.nodes, (-1, 0))
        if n < 0 or not 0 <= nulls <= n or (want is not None and n != want):
            raise ArrowError(f'corrupt: an array of {n} values, {nulls} of them null, where {want} belong')
        return n, nulls

    def buf(self, least):
        lo, n = next(self.bufs, (-1, 0))
        self.left -= n
        if lo < 0 or n < 0 or lo + n > self.size or self.left < 0 or n < least:
            raise ArrowError(f'corrupt: a buffer of {n} bytes at {lo} in a body of {self.size}, where {least} bytes are needed')
        return self.body[lo:lo + n]

    def free(self, n):
        """Counts rows that no byte of the file vouches for (nulls, empty structs): a length field alone may not fill the memory."""
        self.budget[0] -= n
        if self.budget[0] < 0:
            raise ArrowError('corrupt: far more rows than the file has bytes for')

    def bits(self, n, nulls=1):
        raw = self.buf((n + 7) // 8 if nulls else 0)
        return np.frombuffer(raw, np.uint8) if nulls else None

    def read(self, t, path, want=None):
        n, nulls = self.node(want)
        k = t.kind
        if k == 'null':
            self.free(n)
            return Array(t, n)
        valid = self.bits(n, nulls)
        if k == 'bool':
            return Array(t, n, valid, self.bits(n))
        if k == 'dictionary' or k in _NUMPY:
            dtype = _NUMPY[t.arg[0] if k == 'dictionary' else k]
            data = np.frombuffer(self.buf(n * dtype.itemsize), dtype, n)
            if k == 'dictionary' and path not in self.dicts:
                raise ArrowError('corrupt: a column before its dictionary')
            return Array(t, n, valid, data if data.flags.aligned else data.copy(), kids=(self.dicts[path],) if k == 'dictionary' else (), ok=k != 'dictionary')
        if k in _WIDE:
            dtype = np.dtype('i8' if _WIDE[k] else 'i4')
            raw = self.buf((n + 1) * dtype.itemsize if n else 0)
            offs = np.frombuffer(raw, dtype, n + 1) if n else np.zeros(1, dtype)  # no rows: the buffer may be empty
            kid = self.read(t.fields[0].type, path + (0,)) if t.fields else None
            data = None if kid else self.buf(0)
            return Array(t, n, valid, data, offs if offs.flags.aligned else offs.copy(), (kid,) if kid else (), ok=False)
        if k == 'struct':
            if not t.fields:
                self.free(n)
            return Array(t, n, valid, kids=tuple(self.read(f.type, path + (i,), n) for i, f in enumerate(t.fields)))
        if not t.arg:
            self.free(n)
        if k == 'fixed_size_binary':
            return Array(t, n, valid, self.buf(n * t.arg))
        return Array(t, n, valid, kids=(self.read(t.fields[0].type, path + (0,), n * t.arg),))


class _Chunk:
    """n rows of a table. cols() -> {name: Array}, kept unless the chunk is read from a window of its file each time anew."""
    __slots__ = ('n', 'load', 'keep', 'kept')

    def __init__(self, n, load, keep=True):
        self.n, self.load, self.keep, self.kept = n, load, keep, None

    def cols(self):
        cols = self.kept
        if cols is None:
            table = self.load()
            cols = {f.name: kid for f, kid in zip(table.type.fields, table.kids)}
            self.kept = cols if self.keep else None
        return cols

    def view(self, t, names={}):
        """The same rows as the struct type t, whose column f.name is names[f.name] here, else of the same name; one that is not here is null."""
        def load():
            cols = self.cols()
            old = [cols.get(names.get(f.name, f.name)) for f in t.fields]
            return Array(t, self.n, kids=tuple(nulls(f.type, self.n) if a is None else cast(a, f.type) for f, a in zip(t.fields, old)))
        return _Chunk(self.n, load, self.keep)


def _message(source, pos):
    """The message at pos: (header type, header table, metadata version, start and length of the body), or None at the end."""
    if pos == source.size:
        return None
    head = source.view(pos, min(pos + 8, source.size))
    n, body = _I32(head)[0], pos + 4
    if n == -1:  # the continuation word; files from before Arrow 0.15 lack it
        n, body = _I32(head, 4)[0], pos + 8
    if n == 0:
        return None
    m, body = _root(bytes(source.view(body, body + n))), body + n
    size, header, version = m.num(3, _I64), m.table(2), m.num(0, _I16)
    if header is None or size < 0 or version not in (3, 4) or body + size > source.size:
        raise ArrowError(f'corrupt or cut off: a message at byte {pos} with a body of {size} bytes, metadata version {version + 1}')
    return m.num(1, _U8), header, body, size


def _read_ipc(source, many=False):
    """An Arrow stream or file -> [(struct type, metadata, chunks)], one entry; many: streams laid end to end, as we spill them."""
    tables, budget = [], [2**20 + 16 * source.size]  # nulls and empty structs that may be claimed without bytes of their own
    if source.size >= 8 and bytes(source.view(0, 6)) == b'ARROW1':
        return [_read_file(source, budget)]
    pos = 0
    while not tables or (many and pos < source.size):
        first = _message(source, pos)
        if first is None or first[0] != 1:
            raise ArrowError('corrupt: no schema at the beginning')
        t, meta, ids = _schema(first[1])
        dicts, chunks, pos = {}, [], first[2] + first[3]
        while (m := _message(source, pos)) is not None:
            if m[0] not in (2, 3):
                raise ArrowError(f'corrupt: a message of type {m[0]} among the batches')
            dicts = _batch(m, source, t, ids, dicts, chunks, budget)
            pos = m[2] + m[3]
        pos = min(pos + 8, source.size)
        tables.append((t, meta, chunks))
    return tables


def _schema(s):
    if s.num(0, _I16):
        raise ArrowError('big-endian columns, which are not read here')
    ids = {}
    fields = tuple(Field(f.text(0).decode(), _type_in(f, (i,), ids), bool(f.num(1, _U8)), f.pairs(6)) for i, f in enumerate(s.tables(1)))
    twice = [k for k, n in collections.Counter(f.name for f in fields).items() if n > 1]
    if twice:
        raise ArrowError(f'two columns with the name {twice[0]!r}: rename one')
    return Type('struct', None, fields), s.pairs(2), ids


def _batch(m, source, t, ids, dicts, chunks, budget):
    """Reads one message behind the schema: a dictionary changes `dicts` (a new dict: earlier batches keep theirs), a batch is appended."""
    kind, header, lo, size = m
    if kind == 2:
        number, data = header.num(0, _I64), header.table(1)
        paths = [p for p, i in ids.items() if i == number]
        if not paths or data is None:
            raise ArrowError(f'corrupt: a dictionary {number} that no column uses')
        kid = t
        for step in paths[0]:
            kid = kid.fields[step].type
        values = _Body(data, source, lo, size, dicts, budget).read(kid.fields[0].type, paths[0] + (0,), data.num(0, _I64))
        if header.num(2, _U8) and paths[0] in dicts:
            values = concat([dicts[paths[0]], values])
        return {**dicts, **dict.fromkeys(paths, values)}

    n, keep = header.num(0, _I64), source.map is not None
    budget[0] -= n
    if n < 0 or budget[0] < 0:
        raise ArrowError(f'corrupt: a batch of {n} rows in a file of {source.size} bytes')

    def load():
        body = _Body(header, source, lo, size, dicts, budget)
        table = Array(t, n, kids=tuple(body.read(f.type, (i,), n) for i, f in enumerate(t.fields)))
        if next(body.nodes, None) or next(body.bufs, None):
            raise ArrowError('corrupt: more arrays or buffers than the schema has')
        return table

    def late():
        with _corrupt(source.name):
            return load()
    if keep and source.size > _DEEP:
        chunks.append(_Chunk(n, late))
        return dicts
    table = load().check(keep)
    budget = [2**62]  # a window that is mapped again has been checked
    chunks.append(_Chunk(n, (lambda: table) if keep else (lambda: source.batch(load)), keep))
    return dicts


def _read_file(source, budget):
    n = _I32(source.view(source.size - 10, source.size - 6))[0]
    if bytes(source.view(source.size - 6, source.size)) != b'ARROW1' or n <= 0:
        raise ArrowError('cut off: the ARROW1 mark is missing at the end')
    footer = _root(bytes(source.view(source.size - 10 - n, source.size - 10)))
    schema = footer.table(1)
    if schema is None:
        raise ArrowError('corrupt: a footer without a schema')
    t, meta, ids = _schema(schema)
    dicts, chunks, used = {}, [], 0
    for kind, slot in ((2, 2), (3, 3)):
        start, count = footer.vec(slot, 24)
        for at, length, size in struct.iter_unpack('<qi4xq', footer.buf[start:start + 24 * count]):
            used += length + size
            if at < 8 or used > source.size:
                raise ArrowError('corrupt: batches that overlap')
            m = _message(source, at)
            if m is None or m[0] != kind or m[2] != at + length or m[3] != size:
                raise ArrowError(f'corrupt: the footer and the message at byte {at} disagree')
            dicts = _batch(m, source, t, ids, dicts, chunks, budget)
    return t, meta, chunks


class _Writer:
    """Writes struct arrays of one type as an Arrow stream, or as a file with its footer. Buffers stand at multiples of 64 bytes."""

    def __init__(self, f, t, meta=(), file=False):
        self.f, self.ids, self.seen, self.blocks, self.start, self.file = f, {}, {}, {2: [], 3: []}, f.tell(), file
        self.schema = [('h', 0), tuple(_field_out(x, (i,), self.ids) for i, x in enumerate(t.fields)), tuple([k, v] for k, v in meta) or None]
        if file:
            f.write(b'ARROW1\0\0')
        self.send(1, self.schema, [], 0)

    def send(self, kind, header, buffers, size):
        raw = _flatbuffer([('h', 4), ('B', kind), header, ('q', size)])
        at = self.f.tell()
        raw += bytes(-(at - self.start + 8 + len(raw)) % 64)
        self.f.write(struct.pack('<Ii', 2**32 - 1, len(raw)) + raw)
        for b in buffers:
            self.f.write(b)
            self.f.write(bytes(-memoryview(b).nbytes % 64))
        if kind > 1:
            self.blocks[kind].append(struct.pack('<qi4xq', at - self.start, 8 + len(raw), size))

    def batch(self, arrays, n, path=None, delta=None):
        """One record batch, or with delta the dictionary batch of `path`."""
        nodes, buffers = [], []
        for i, a in enumerate(arrays):
            self.flatten(a, (i,) if path is None else path + (0,), nodes, buffers)
        at, where = [], 0
        for b in buffers:
            at.append((where, memoryview(b).nbytes))
            where += at[-1][1] + -at[-1][1] % 64
        rows = [_Rows(len(x), b''.join(struct.pack('<qq', *p) for p in x)) for x in (nodes, at)]
        batch = [('q', n), *rows]
        self.send(3 if path is None else 2, batch if path is None else [('q', self.ids[path]), batch, ('B', delta)], buffers, where)

    def flatten(self, a, path, nodes, buffers):
        a.check()
        t, off = a.type, 0 if a.valid is None else a.n - int(_bits(a.valid, 0, a.n).sum())
        nodes.append((a.n, a.n if t.kind == 'null' else off))
        if t.kind == 'null':
            return
        buffers.append(a.valid[:(a.n + 7) // 8] if off else b'')
        if t.kind == 'dictionary':
            buffers.append(np.ascontiguousarray(a.data + self.dictionary(a, path), _NUMPY[t.arg[0]]))
        elif t.kind in _WIDE:
            lo, hi = int(a.offs[0]), int(a.offs[-1])
            buffers.append(a.offs - a.offs[0] if lo else np.ascontiguousarray(a.offs))
            if a.kids:
                self.flatten(take(a.kids[0], slice(lo, hi)), path + (0,), nodes, buffers)
            else:
                buffers.append(a.data[lo:hi])
        else:
            if a.data is not None:
                end = (a.n + 7) // 8 if t.kind == 'bool' else a.n * t.arg if t.kind == 'fixed_size_binary' else a.n
                buffers.append(a.data[:end] if t.kind == 'fixed_size_binary' else np.ascontiguousarray(a.data[:end]))
            for i, kid in enumerate(a.kids):
                self.flatten(kid, path + (i,), nodes, buffers)

    def dictionary(self, a, path):
        """Sends a dictionary that has not been sent yet, behind those sent before (a delta); returns where its indices start."""
        sent = self.seen.setdefault(path, [])
        for words, base in sent:
            if words is a.kids[0]:
                return _NUMPY[a.type.arg[0]].type(base)
        base = sum(w.n for w, _ in sent)
        if base + a.kids[0].n - 1 > np.iinfo(a.type.arg[0]).max:
            raise ValueError(f'the dictionaries of a column have more values together than {a.type.arg[0]} can count: cast it to its value type')
        self.batch([a.kids[0]], a.kids[0].n, path, bool(sent))
        sent.append((a.kids[0], base))
        return _NUMPY[a.type.arg[0]].type(base)

    def end(self):
        self.f.write(struct.pack('<Ii', 2**32 - 1, 0))
        if self.file:
            blocks = [_Rows(len(self.blocks[k]), b''.join(self.blocks[k])) for k in (2, 3)]
            raw = _flatbuffer([('h', 4), self.schema, *blocks])
            self.f.write(raw + struct.pack('<i', len(raw)) + b'ARROW1')


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


def _nbytes(a):
    own = sum(memoryview(b).nbytes for b in (a.valid, a.data, a.offs) if b is not None)
    return own + sum(map(_nbytes, a.kids))


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


@contextlib.contextmanager
def _corrupt(path):
    """Whatever untrusted bytes can make the reader raise is one error."""
    try:
        yield
    except (ValueError, struct.error, IndexError, KeyError, OverflowError, RecursionError, MemoryError) as e:
        raise ArrowError(f'{path}: {e if isinstance(e, ArrowError) else f"corrupt ({type(e).__name__}: {e})"}') from None


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
# --- linter ------------------------------------------------------------------------------------------------------------

def lint(ds, tok=None, max_len=None, test=None):
    """What spoils a run without a word, looked for before it: [(grave, message)]. Without a tokenizer: duplicates, equal pairs, length
    bias, overlap with `test`; with one also: rows that cannot be read, no token to train on, no EOS at the end, answers cut at max_len."""
    said, pairs = [], {'chosen', 'rejected'} <= set(ds.types)
    lead = [k for k in ('prompt', 'messages', 'question', 'instruction', 'text', 'chosen') if k in ds.types][:1] or ds.column_names

    def texts(d, names):
        return [json.dumps(row, default=str, ensure_ascii=False) for b in d.select_columns(names).iter(1000) for row in zip(*b.values())]

    def say(grave, what, rows, why):
        if rows:
            said.append((grave, f"{what}: {len(rows):,} row{'s' * (len(rows) != 1)} ({', '.join(map(str, rows[:5]))}{' ...' if len(rows) > 5 else ''}){why}"))
    said += [(False, f'{k}: {n} of {len(ds)} rows are null') for k in ds.types if (n := sum(v is None for v in ds[k]))]
    seen = {}
    say(False, 'duplicates', [i for i, k in enumerate(texts(ds, ds.column_names)) if seen.setdefault(k, i) != i], ' repeat an earlier row')
    if test is not None:
        if set(lead) - set(test.types):
            raise ValueError(f"the test set has no column {' or '.join(lead)} to look for: it has {', '.join(test.types)}")
        held = set(texts(test, lead))
        say(True, 'train/test overlap', [i for i, p in enumerate(texts(ds, lead)) if p in held], f" have a {' + '.join(lead)} of the test set")
    if pairs:
        both = list(zip(ds['chosen'], ds['rejected']))
        say(True, 'chosen == rejected', [i for i, (x, y) in enumerate(both) if x == y], '')
        sizes = np.array([[len(str(x)), len(str(y))] for x, y in both], float).reshape(-1, 2)
        longer = float((sizes[:, 0] > sizes[:, 1]).mean()) if len(sizes) else 0.5
        if abs(longer - 0.5) > 0.1:
            said.append((False, f'length bias: chosen is the longer one in {longer:.0%} of the pairs (mean {sizes[:, 0].mean():.0f} against {sizes[:, 1].mean():.0f} '
                                'characters): a reward model can learn length alone'))
    if tok is not None:
        bad, empty, open_, cut, lengths = {}, [], [], [], []
        asked = 'prompt' in ds.types and not {'completion', 'chosen', 'messages', 'text', 'instruction'} & set(ds.types)  # prompts for PPO and GRPO
        for i, row in enumerate(ds):
            try:
                if pairs:
                    p, x, y = encode_pair(row, tok) if row['chosen'] != row['rejected'] else ([], [], [])  # equal ones are in the list already
                    rows = [(p + a, [False] * len(p) + [True] * len(a)) for a in (x, y) if a]
                else:
                    rows = [encode_row(row, tok)] if not asked else [(ids := encode_prompt(_of_table(row)['prompt'], tok), [True] * len(ids))]
            except ValueError as e:
                bad.setdefault(str(e).split(':')[0], (str(e), []))[1].append(i)
                continue
            lengths += [len(ids) for ids, _ in rows]
            empty += [i] if any(not any(on) for _, on in rows) else []
            open_ += [i] if not asked and any(not (any(on) and tok.eot in [t for t, m in zip(ids[-4:], on[-4:]) if m]) for ids, on in rows) else []
            cut += [i] if max_len and any(any(on[max_len:]) for _, on in rows) else []
        for why, rows in bad.values():
            say(True, 'unreadable', rows, f': {why}')
        say(True, 'nothing to train on', empty, ' have an empty mask')
        say(True, 'no EOS', open_, ' do not end in a trained end token: the model will not learn to stop')
        say(True, 'long prompts' if asked else 'cut answers', cut, f' have {"" if asked else "trained "}tokens beyond max_len {max_len}')
        if lengths:
            said.append((False, f'tokens a {"prompt" if asked else "pair member" if pairs else "row"}: median {int(np.median(lengths)):,}, 95 % {int(np.quantile(lengths, 0.95)):,}, longest {max(lengths):,}'))
    return said


# ---------------------------------------------------------------------------------------------------------------------
# part 2: tokenizers, chat templates, which tokens are trained on
# ---------------------------------------------------------------------------------------------------------------------
import unicodedata

import jinja2  # torch brings it
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError


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

# ---------------------------------------------------------------------------------------------------------------------
# command line: python dataset.py head FILE | lint FILE
# ---------------------------------------------------------------------------------------------------------------------

def _show(key, value, most=500):
    """One column of a row for a terminal: text as it is, messages one by one."""
    if isinstance(value, list) and value and all(isinstance(m, dict) and {'role', 'content'} <= m.keys() for m in value):
        for m in value:
            _show(f'{key} | {m["role"]}', m['content'], most)
    else:
        text = value if isinstance(value, str) else repr(value)
        print(f'{key}: {text[:most]}' + (f' ... ({len(text):,} characters)' if len(text) > most else ''))


def _main(words):
    """head FILE [rows] | lint FILE [--tokenizer=NAME] [--max_len=N] [--test=FILE]"""
    usage = 'usage: python dataset.py head FILE [ROWS] | python dataset.py lint FILE [--tokenizer=gpt2] [--max_len=1024] [--test=FILE]'
    options = dict(w[2:].split('=', 1) for w in words if w.startswith('--') and '=' in w)
    plain = [w for w in words if not w.startswith('--')]
    numbers = [*plain[2:], *([options['max_len']] if 'max_len' in options else [])]
    if (len(plain) < 2 or len(plain) > 2 + (plain[0] == 'head') or plain[0] not in ('head', 'lint') or options.keys() - {'tokenizer', 'max_len', 'test'}
            or len(plain) + len(options) < len(words) or not all(n.isdecimal() for n in numbers) or (plain[0] == 'head' and options)):
        raise ValueError(usage)
    ds = load_dataset(plain[1])
    print(ds)
    try:
        if plain[0] == 'head':
            for i, row in enumerate(ds.select(range(min(int(plain[2]) if len(plain) > 2 else 3, len(ds))))):
                print(f'--- row {i}')
                for k, v in row.items():
                    _show(k, v)
            return 0
        tok = get_tokenizer(options['tokenizer']) if 'tokenizer' in options else None
        said = lint(ds, tok, int(options.get('max_len', 0)) or None, load_dataset(options['test']) if 'test' in options else None)
    except ArrowError as e:  # a value, read only now
        raise ValueError(f'{plain[1]}: {e}') from None
    for grave, message in said:
        print(('FAULT  ' if grave else 'note   ') + message)
    faults = sum(g for g, _ in said)
    print(f'{faults} fault{"s" * (faults != 1)}' + ('' if tok else ' (give --tokenizer=... to check masks, EOS and lengths too)'))
    return int(faults > 0)


if __name__ == '__main__':
    try:
        sys.exit(_main(sys.argv[1:]))
    except (ValueError, OSError) as _e:
        print(f'error: {" ".join(str(_e).split())}', file=sys.stderr)
        sys.exit(2)
