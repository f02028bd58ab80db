"""Arrow IPC over mmap: arrays in Arrow's memory layout, the schema's flatbuffers, a reader and a writer of streams and files."""
import builtins, collections, contextlib, datetime, functools, io, itertools, mmap, operator, os, re, struct, zoneinfo
from types import NoneType
from typing import NamedTuple

import numpy as np
import torch


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


def _nbytes(a):
    own = sum(memoryview(b).nbytes for b in (a.valid, a.data, a.offs) if b is not None)
    return own + sum(map(_nbytes, a.kids))


@contextlib.contextmanager
def _corrupt(path):
    """Whatever untrusted bytes can make the reader raise is one error."""
    try:
        yield
    except (ValueError, struct.error, IndexError, KeyError, OverflowError, RecursionError, MemoryError) as e:
        raise ArrowError(f'{path}: {e if isinstance(e, ArrowError) else f"corrupt ({type(e).__name__}: {e})"}') from None
