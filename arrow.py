"""Arrow IPC over mmap: columns of values in memory and in files, without copies. pyarrow and HF datasets read
what we write.

A column of n values is a few flat buffers. ["hi", None, "you"] as a string column:
    validity   0b101                one bit a value, lowest first; 0 is null; left out where there is no null
    offsets    0 2 2 5      int32   value i is data[offsets[i]:offsets[i + 1]]
    data       h i y o u
A list column has validity and offsets, and its values are a child column; a struct has validity and a child
for each field; numbers are validity and data. A file is a stream of messages, each a flatbuffer (what
follows) and a body (the buffers), every part padded to a multiple of 8 bytes:

    FF FF FF FF | int32 size | flatbuffer: Schema (names, types)                        |
    FF FF FF FF | int32 size | flatbuffer: RecordBatch (rows, nodes, where buffers are) | body: buffer, ...
    ...
    FF FF FF FF | 0            the end
The file format is ARROW1, 2 bytes, such a stream, a footer, its size, ARROW1.

https://arrow.apache.org/docs/format/Columnar.html, Schema.fbs, Message.fbs
"""
import contextlib
import datetime
import functools
import io
import itertools
import json
import mmap
import operator
import os
import struct
from types import NoneType
from typing import NamedTuple

import numpy as np

# -----------------------------------------------------------------------------------------------------------
# types
# -----------------------------------------------------------------------------------------------------------


class ArrowError(ValueError):
    """A file that is not what it claims to be: corrupt, cut off, or of a type or feature that is not read
    here (then it is named). A file's messages are looked at when it is opened, a batch when it is first used,
    text when it is read."""


class Mixed(ValueError):
    """No one type for these values; path leads to the column."""

    def __init__(self, message, path=()):
        super().__init__(f"column {'.'.join(path)!r}: {message}" if path else message)
        self.message = message
        self.path = path


@contextlib.contextmanager
def inside(name):
    """Puts the column's name before the errors of its values."""
    try:
        yield
    except Mixed as e:
        raise Mixed(e.message, (name, *e.path)) from None


class Type(NamedTuple):
    """Type('int64'), Type('list', (Field('item', Type('string')),)). 'json' is text in the file and any JSON
    value in a row."""
    kind: str
    fields: tuple = ()


class Field(NamedTuple):
    name: str
    type: Type
    nullable: bool = True


class Record(dict):
    """A row of a struct column. Every row has every field there, so None may stand for a key that was never
    written."""


INTS = {f'{sign}int{bits}' for sign in ('', 'u') for bits in (8, 16, 32, 64)}
FLOATS = {'float16', 'float32', 'float64'}
NUMBERS = {kind: np.dtype(kind) for kind in INTS | FLOATS}
NUMBERS |= {f'timestamp[{unit}]': np.dtype(f'M8[{unit}]') for unit in ('s', 'ms', 'us', 'ns')}
OFFSETS = {kind: np.dtype('i4') for kind in ('string', 'binary', 'list', 'json')}  # how wide the offsets are
OFFSETS |= {'large_' + kind: np.dtype('i8') for kind in OFFSETS}
TEXT = ('string', 'large_string', 'json', 'large_json')
# of exact Python types; a bool is no int here
KIND_OF = {
    bool: 'bool',
    np.bool_: 'bool',
    int: 'int64',
    float: 'float64',
    str: 'string',
    bytes: 'binary',
    dict: 'struct',
    Record: 'struct',
    list: 'list',
    tuple: 'list',
    np.ndarray: 'list',
    datetime.datetime: 'timestamp[us]',
}


def type_name(t: Type) -> str:
    """'int64', 'list<string>', 'struct<role: string>': pyarrow's words."""
    if t.kind == 'struct':
        return 'struct<' + ', '.join(f'{f.name}: {type_name(f.type)}' for f in t.fields) + '>'
    return t.kind + ('<' + type_name(t.fields[0].type) + '>' if t.fields else '')


def kind_of(value_type):
    if value_type in KIND_OF:
        return KIND_OF[value_type]
    if issubclass(value_type, np.generic) and np.dtype(value_type).name in NUMBERS:
        return np.dtype(value_type).name
    raise Mixed(f'values of type {value_type.__name__} have no column type')


def infer(values: list, nested=False) -> Type:
    """The type that gives Python values back exactly. None fits every type. Nested values whose keys, order
    of keys or types differ are json, as in HF datasets; on the first level int and float make float64,
    another mixture is Mixed. [1, None] -> int64; [{'a': 1}, {'a': 2}] -> struct<a: int64>; [{'a': 1}, {'b':
    'x'}] -> json."""
    types = set(map(type, values))
    kinds = sorted({kind_of(t) for t in types - {NoneType}})
    if len(kinds) != 1:
        return functools.reduce(lambda a, b: unify(a, b, nested), map(Type, kinds), Type('null'))
    kind = kinds[0]
    if NoneType in types:
        values = [value for value in values if value is not None]
    if kind == 'int64' and not -2**63 <= min(values) <= max(values) < 2**63:
        if nested:
            return Type('json')
        raise Mixed('an integer beyond 64 bits')
    if kind == 'list':
        return Type('list', (Field('item', infer(list(itertools.chain.from_iterable(values)), True)),))
    if kind == 'struct':
        return infer_struct(values)
    return Type(kind)


def infer_struct(rows):
    """A struct only where no row lacks a key and no value is None: a None that was written would look like a
    missing key."""
    names = tuple(rows[0])
    if not all(map(names.__eq__, map(tuple, rows))):
        return Type('json')
    fields = []
    for name in names:
        column = list(map(operator.itemgetter(name), rows))
        if not isinstance(name, str) or NoneType in set(map(type, column)):
            return Type('json')
        with inside(name):
            fields.append(Field(name, infer(column, True)))
    return Type('struct', tuple(fields))


def unify(a: Type, b: Type, nested=False) -> Type:
    """The type that holds the values of both, by the rules of infer. int64, float64 -> float64 on the first
    level, json below it."""
    if a == b or b.kind == 'null':
        return a
    if a.kind == 'null':
        return b
    short = [t.kind.removeprefix('large_') for t in (a, b)]
    kind = short[0] if a.kind == b.kind else 'large_' + short[0]
    if short[0] == short[1] == 'list':
        return Type(kind, (Field('item', unify(a.fields[0].type, b.fields[0].type, True)),))
    if short[0] == short[1] and short[0] in OFFSETS:
        return Type(kind)
    if a.kind == b.kind == 'struct' and [f.name for f in a.fields] == [f.name for f in b.fields]:
        pairs = zip(a.fields, b.fields)
        return Type('struct', tuple(Field(f.name, unify(f.type, g.type, True)) for f, g in pairs))
    if set(short) <= INTS or set(short) <= FLOATS:
        return Type(np.promote_types(*short).name)
    if set(short) <= INTS | FLOATS and not nested:
        return Type('float64')
    if nested or {'json', 'struct'} >= set(short) or {'json', 'list'} >= set(short):
        return Type('json')
    raise Mixed(f'mixed types: {type_name(a)} and {type_name(b)}')


# -----------------------------------------------------------------------------------------------------------
# arrays
# -----------------------------------------------------------------------------------------------------------


class Array:
    """length values of one type. valid: None (no nulls) or bits; data: numbers, bits (bool) or bytes
    (memoryview); offsets cut data into strings, or children[0] into lists; a struct has one child a field."""
    def __init__(self, type, length, valid=None, data=None, offsets=None, children=()):
        self.type = type
        self.length = length
        self.valid = valid
        self.data = data
        self.offsets = offsets
        self.children = children

    def item(self, i: int):
        """Value i as a Python object."""
        return self.list(i, i + 1)[0]

    def list(self, start: int, stop: int) -> list:
        """Values start..stop as Python objects, as pyarrow's to_pylist(). Nanoseconds are np.datetime64."""
        kind = self.type.kind
        if kind == 'null':
            return [None] * (stop - start)
        if self.offsets is not None and not self.children:
            values = self.strings(start, stop)
        elif kind == 'bool':
            values = unpack(self.data, start, stop).tolist()
        elif kind in NUMBERS:
            values = self.data[start:stop]
            values = list(values) if kind == 'timestamp[ns]' else values.tolist()
            if kind[0] == 't' and int in set(map(type, values)) and self.valid is None:
                raise ArrowError("a timestamp beyond Python's range")
        elif kind == 'struct':
            names = [f.name for f in self.type.fields]
            columns = [child.list(start, stop) for child in self.children]
            rows = zip(*columns) if names else itertools.repeat((), stop - start)
            values = [Record(zip(names, row)) for row in rows]
        else:
            first = int(self.offsets[start])
            ends = (self.offsets[start:stop + 1] - first).tolist()
            items = self.children[0].list(first, first + ends[-1])
            values = [items[lo:hi] for lo, hi in itertools.pairwise(ends)]
        if self.valid is None:
            return values
        valid = unpack(self.valid, start, stop).tolist()
        return [value if there else None for value, there in zip(values, valid)]

    @functools.cached_property
    def lengths(self):
        return np.diff(self.offsets)

    def strings(self, start, stop):
        kind, raw = self.type.kind, io.BytesIO(self.data[self.offsets[start]:self.offsets[stop]])
        parts = map(raw.read, self.lengths[start:stop].tolist())  # twice as fast as slices of it
        if self.valid is not None:  # what stands in a null slot need not be text
            valid = unpack(self.valid, start, stop).tolist()
            parts = [part if there else b'' for part, there in zip(parts, valid)]
        if kind not in TEXT:
            return list(parts)
        try:
            texts = list(map(bytes.decode, parts))
            return [json.loads(text or 'null') for text in texts] if 'json' in kind else texts
        except UnicodeDecodeError as e:
            raise ArrowError(f'corrupt: text that is not UTF-8 ({e.reason})') from None
        except (ValueError, RecursionError) as e:
            raise ArrowError(f'corrupt: a value that is no JSON ({e})') from None

    def items(self, i: int) -> np.ndarray:
        """Value i of a list of ints or bools as an array."""
        start, stop = self.offsets[i:i + 2].tolist()
        child = self.children[0]
        bools = child.type.kind == 'bool'
        return unpack(child.data, start, stop) if bools else child.data[start:stop].astype(np.int64)

    def numpy(self) -> np.ndarray:
        """(length,) numbers, a view without a copy (bools are a copy). ValueError on nulls and on other
        types."""
        kind = self.type.kind
        if self.valid is not None:
            raise ValueError('the column has nulls, which numpy cannot show: filter them out first')
        if kind != 'bool' and kind not in NUMBERS:
            raise ValueError(f'the column is {type_name(self.type)}: no numpy view, read it as a list')
        return unpack(self.data, 0, self.length) if kind == 'bool' else self.data


def unpack(bits, start, stop):
    """Bits start..stop as bool."""
    bools = np.unpackbits(bits[start >> 3:(stop + 7) >> 3], bitorder='little')
    return bools[start & 7:(start & 7) + stop - start].view(bool)


def build(values: list, t: Type) -> Array:
    """Python values -> Array of the type t; None is null. Mixed where a value does not fit."""
    n, valid, present = len(values), None, values
    if not isinstance(values, np.ndarray) and NoneType in set(map(type, values)):
        valid = np.packbits([value is not None for value in values], bitorder='little')
        present = [value for value in values if value is not None]
    if t.kind == 'null':
        return Array(t, n)
    if t.kind == 'struct':
        children = []
        for f in t.fields:
            with inside(f.name):
                children.append(build([(row or {}).get(f.name) for row in values], f.type))
        return Array(t, n, valid, children=tuple(children))
    if t.kind in OFFSETS:
        return build_pieces(t, n, valid, present)
    try:
        data = spread(np.array(present, NUMBERS.get(t.kind, bool)), valid, n)
    except (OverflowError, TypeError, ValueError) as e:
        raise Mixed(f'a value does not fit {type_name(t)}: {e}') from None
    return Array(t, n, valid, np.packbits(data, bitorder='little') if t.kind == 'bool' else data)


def spread(data, valid, n):
    """Numbers of the valid slots -> of all n slots, zero where there is a null."""
    if valid is None:
        return data
    full = np.zeros(n, data.dtype)
    full[unpack(valid, 0, n)] = data
    return full


def build_pieces(t, n, valid, present):
    """Strings, bytes, JSON values or lists of the valid slots."""
    parts = present
    try:
        if t.kind.endswith('json'):
            parts = [json.dumps(value, ensure_ascii=False) for value in present]
        if t.kind in TEXT:
            parts = list(map(str.encode, parts))
    except UnicodeEncodeError:
        raise Mixed('text with a lone surrogate (half a character), which UTF-8 cannot hold') from None
    except (TypeError, ValueError, RecursionError) as e:
        raise Mixed(f'a value does not fit {type_name(t)}: {e}') from None
    lengths = spread(np.fromiter(map(len, parts), np.int64), valid, n)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if offsets[-1] > np.iinfo(OFFSETS[t.kind]).max:
        raise Mixed('more than 2 GiB in one batch: write smaller batches')
    offsets = offsets.astype(OFFSETS[t.kind])
    if t.fields:
        arrays = parts and isinstance(parts[0], np.ndarray)
        items = np.concatenate(parts) if arrays else list(itertools.chain.from_iterable(parts))
        return Array(t, n, valid, None, offsets, (build(items, t.fields[0].type),))
    return Array(t, n, valid, memoryview(b''.join(parts)), offsets)


# -----------------------------------------------------------------------------------------------------------
# flatbuffers: tables of slots, each at an offset that the table's vtable names
# -----------------------------------------------------------------------------------------------------------


class Table:
    """A flatbuffer table, read in place. struct.error where it leads out of its buffer."""

    def __init__(self, buffer, at):
        self.buffer = buffer
        self.at = at
        self.vtable = at - struct.unpack_from('<i', buffer, at)[0]
        if self.vtable < 0:
            raise ArrowError('corrupt metadata')
        self.size, = struct.unpack_from('<H', buffer, self.vtable)

    def place(self, slot):
        """Where the slot's value stands, 0 if it is left out."""
        entry = 4 + 2 * slot
        offset = struct.unpack_from('<H', self.buffer, self.vtable + entry)[0] if entry < self.size else 0
        return self.at + offset if offset else 0

    def number(self, slot, form):
        at = self.place(slot)
        return struct.unpack_from('<' + form, self.buffer, at)[0] if at else 0

    def follow(self, at):
        return at + struct.unpack_from('<I', self.buffer, at)[0]

    def table(self, slot):
        at = self.place(slot)
        return Table(self.buffer, self.follow(at)) if at else None

    def vector(self, slot, width):
        """(start, count)"""
        if not self.place(slot):
            return 0, 0
        at = self.follow(self.place(slot))
        count, = struct.unpack_from('<I', self.buffer, at)
        if at + 4 + count * width > len(self.buffer):
            raise ArrowError('corrupt metadata: a vector beyond its end')
        return at + 4, count

    def text(self, slot):
        start, count = self.vector(slot, 1)
        return self.buffer[start:start + count]

    def tables(self, slot):
        start, count = self.vector(slot, 4)
        return [Table(self.buffer, self.follow(at)) for at in range(start, start + 4 * count, 4)]

    def structs(self, slot, form):
        start, count = self.vector(slot, struct.calcsize(form))
        return list(struct.iter_unpack(form, self.buffer[start:start + count * struct.calcsize(form)]))

    def pairs(self, slot):
        return {pair.text(0): pair.text(1) for pair in self.tables(slot)}


class Scalar(NamedTuple):
    form: str
    value: int


class Structs(NamedTuple):
    count: int
    raw: bytes


def append(out, item):
    """Appends item to the flatbuffer out and returns its place. bytes: a string; Structs: a vector of them;
    tuple: a vector of tables; list: a table, whose slots are None, a Scalar, or one of these."""
    if isinstance(item, list):
        return append_table(out, item)
    out += bytes(-(len(out) + 4) % 8 if isinstance(item, Structs) else -len(out) % 4)
    at = len(out)
    if isinstance(item, Structs):
        out += struct.pack('<I', item.count) + item.raw
    elif isinstance(item, bytes):
        out += struct.pack('<I', len(item)) + item + b'\0'
    else:
        out += struct.pack('<I', len(item)) + bytes(4 * len(item))
        for i, table in enumerate(item):
            point(out, at + 4 + 4 * i, append(out, table))
    return at


def append_table(out, slots):
    """vtable (its size, the table's size, an offset a slot), then the table: where its vtable is, and its
    slots, widest first."""
    forms = [getattr(slot, 'form', '' if slot is None else 'I') for slot in slots]
    offsets, size = [0] * len(slots), 4
    for i in sorted(range(len(slots)), key=lambda i: -struct.calcsize(forms[i])):
        width = struct.calcsize('<' + forms[i])
        if width:
            offsets[i] = size + -size % width
            size = offsets[i] + width
    head = 4 + 2 * len(slots)
    out += bytes(-(len(out) + head) % 8)
    at = len(out) + head
    out += struct.pack(f'<HH{len(slots)}Hi', head, size, *offsets, head) + bytes(size - 4)
    for slot, form, offset in zip(slots, forms, offsets):
        if isinstance(slot, Scalar):
            struct.pack_into('<' + form, out, at + offset, slot.value)
        elif slot is not None:
            point(out, at + offset, append(out, slot))
    return at


def point(out, where, target):
    struct.pack_into('<I', out, where, target - where)


def flatbuffer(table):
    out = bytearray(4)
    point(out, 0, append(out, table))
    return bytes(out)


# -----------------------------------------------------------------------------------------------------------
# schema
# -----------------------------------------------------------------------------------------------------------

# (id of the type, the numbers in its table) -> kind
KINDS = {
    (1,): 'null',
    (4,): 'binary',
    (5,): 'string',
    (6,): 'bool',
    (12,): 'list',
    (13,): 'struct',
    (19,): 'large_binary',
    (20,): 'large_string',
    (21,): 'large_list',
}
KINDS |= {
    (2, bits, signed): f"{'' if signed else 'u'}int{bits}" for bits in (8, 16, 32, 64) for signed in (0, 1)
}
KINDS |= {(3, i): f'float{bits}' for i, bits in enumerate((16, 32, 64))}
KINDS |= {(10, i): f'timestamp[{unit}]' for i, unit in enumerate(('s', 'ms', 'us', 'ns'))}
IDS = {kind: key for key, kind in KINDS.items()} | {'json': (5,), 'large_json': (20,)}
FORMS = {2: 'iB', 3: 'h', 10: 'h'}  # of those numbers
REFUSED = {
    7: 'decimal',
    8: 'date',
    9: 'time',
    11: 'interval',
    14: 'union',
    15: 'fixed_size_binary',
    16: 'fixed_size_list',
    17: 'map',
    18: 'duration',
    22: 'run-end encoded',
    23: 'binary_view',
    24: 'string_view',
    25: 'list_view',
    26: 'large_list_view',
}
EXTENSION = b'ARROW:extension:name'
MOST_FIELDS, DEEPEST = 10_000, 64


def field_table(f):
    number, *values = IDS[f.type.kind]
    slots = [Scalar(form, value) for form, value in zip(FORMS.get(number, ''), values)]
    extension = ([EXTENSION, b'arrow.json'],) if f.type.kind.endswith('json') else None
    children = tuple(map(field_table, f.type.fields))
    return [f.name.encode(), Scalar('B', f.nullable), Scalar('B', number), slots, None, children, extension]


def read_field(table, left, depth=0):
    """A Field table -> Field. left: how many more fields the schema may have (tables may be shared, so a
    small buffer could describe an endless tree)."""
    left[0] -= 1
    if depth > DEEPEST or left[0] < 0:
        raise ArrowError(f'a schema of more than {MOST_FIELDS} fields, or nested deeper than {DEEPEST}')
    name, number, parameters = table.text(0).decode(), table.number(2, 'B'), table.table(3)
    refused = 'dictionary' if table.table(4) else REFUSED.get(number)
    if refused:
        raise ArrowError(
            f'column {name[:40]!r} is of type {refused}, which is not read here: cast it before it is '
            'written '
            '(in pyarrow, column.cast(...); in pandas, astype(str))'
        )
    if parameters is None:
        raise ArrowError('corrupt: a field without its type')
    values = [parameters.number(i, form) for i, form in enumerate(FORMS.get(number, ''))]
    kind = KINDS.get((number, *values))
    children = tuple(read_field(child, left, depth + 1) for child in table.tables(5))
    if kind is None or len(children) != (len(children) if kind == 'struct' else kind.endswith('list')):
        raise ArrowError(
            f'corrupt: a field of type id {number} with {len(children)} children and the parameters {values}'
        )
    if kind in TEXT and table.pairs(6).get(EXTENSION) == b'arrow.json':
        kind = kind.replace('string', 'json')
    return Field(name, Type(kind, children), bool(table.number(1, 'B')))


def read_schema(table):
    """Schema table -> (struct type, metadata {bytes: bytes})"""
    if table.number(0, 'h'):
        raise ArrowError('big-endian columns, which are not read here')
    left = [MOST_FIELDS]
    fields = tuple(read_field(f, left) for f in table.tables(1))
    names = [f.name for f in fields]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ArrowError(f'two columns with the name {twice!r}: rename one')
    return Type('struct', fields), table.pairs(2)


# -----------------------------------------------------------------------------------------------------------
# reading
# -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def guard(name):
    """Whatever untrusted bytes can make the reader raise is one error."""
    try:
        yield
    except ArrowError as e:
        raise ArrowError(str(e) if str(e).startswith(f'{name}: ') else f'{name}: {e}') from None
    except (
        ValueError,
        TypeError,
        struct.error,
        LookupError,
        OverflowError,
        RecursionError,
        MemoryError,
    ) as e:
        raise ArrowError(f'{name}: corrupt ({type(e).__name__}: {e})') from None


class Message(NamedTuple):
    kind: int      # 1 schema, 2 dictionary, 3 record batch
    header: Table
    start: int     # of the body
    size: int


def read_message(view, at):
    """The message at byte `at`, or None at the end of the stream."""
    if at == len(view):
        return None
    mark, size = struct.unpack_from('<ii', view, at)
    start = at + 8
    if mark == -1 and size == 0:
        return None
    if mark != -1 or not 0 < size <= len(view) - start:
        raise ArrowError(
            f'cut off, or no Arrow data: a message of {size} bytes at {start}, the file has {len(view)}'
        )
    raw = bytes(view[start:start + size])
    message = Table(raw, struct.unpack_from('<I', raw)[0])
    header, body = message.table(2), message.number(3, 'q')
    if header is None or not 0 <= body <= len(view) - start - size:
        raise ArrowError(f'corrupt or cut off: a message at byte {at} with a body of {body} bytes')
    return Message(message.number(1, 'B'), header, start + size, body)


class Body:
    """The nodes and buffers of one batch, handed out in order; every length is checked against what is
    there."""

    def __init__(self, header, view):
        if header.table(3):
            raise ArrowError('the batches are compressed, which is not read here: write them uncompressed')
        self.nodes = iter(header.structs(1, '<qq'))
        self.buffers = iter(header.structs(2, '<qq'))
        self.view = view

    def buffer(self, least):
        start, size = next(self.buffers, (-1, 0))
        if start < 0 or size < least or start + size > len(self.view):
            raise ArrowError(
                f'corrupt: a buffer of {size} bytes at {start} in a body of {len(self.view)}, {least} '
                'are needed'
            )
        return self.view[start:start + size]

    def numbers(self, dtype, count):
        return np.frombuffer(self.buffer(count * dtype.itemsize), dtype, count)

    def bits(self, count):
        return np.frombuffer(self.buffer((count + 7) // 8), np.uint8)

    def array(self, t, most, want=None):
        """The next array; want: its length, where a parent fixes it; most: the rows that the body may claim
        at all."""
        length, nulls = next(self.nodes, (-1, 0))
        if not 0 <= length <= most or not 0 <= nulls <= length or want not in (None, length):
            raise ArrowError(
                f'corrupt: an array of {length} values, {nulls} of them null, where {want} belong'
            )
        if t.kind == 'null':
            return Array(t, length)
        valid = self.bits(length if nulls else 0)
        valid = valid if nulls else None
        if t.kind == 'bool':
            return Array(t, length, valid, self.bits(length))
        if t.kind in NUMBERS:
            return Array(t, length, valid, self.numbers(NUMBERS[t.kind], length))
        if t.kind == 'struct':
            return Array(t, length, valid, children=tuple(self.array(f.type, most, length) for f in t.fields))
        dtype = OFFSETS[t.kind]
        if length:
            offsets = self.numbers(dtype, length + 1)
        else:  # the buffer may be empty
            self.buffer(0)
            offsets = np.zeros(1, dtype)
        children = tuple(self.array(f.type, most) for f in t.fields)
        data = None if children else self.buffer(0)
        end = children[0].length if children else len(data)
        if not 0 <= offsets[0] <= offsets[-1] <= end or (offsets[1:] < offsets[:-1]).any():
            raise ArrowError(
                f'corrupt: the offsets of a {t.kind} column fall, or lead beyond its {end} values'
            )
        return Array(t, length, valid, data, offsets, children)


class Batch:
    """length rows of a table. columns() -> {name: Array}, which load() makes when they are first used."""

    def __init__(self, length, load):
        self.length = length
        self.columns = functools.cache(load)

    def recast(self, t: Type, old_names: dict = {}):
        """The same rows as the struct type t, whose field f is here called old_names[f.name]; a column that
        is not here is null."""
        def load():
            arrays = {}
            for f in t.fields:
                array = self.columns().get(old_names.get(f.name, f.name), Array(Type('null'), self.length))
                same = array.type == f.type
                arrays[f.name] = array if same else build(array.list(0, self.length), f.type)
            return arrays
        return Batch(self.length, load)


def read_stream(view: memoryview, name):
    """The bytes of a stream or a file -> (struct type, metadata, [Batch]). ArrowError with `name` in it, here
    or at first use."""
    with guard(name):
        at = 0
        if bytes(view[:6]) == b'ARROW1':
            if bytes(view[-6:]) != b'ARROW1':
                raise ArrowError('cut off: the ARROW1 mark is missing at the end')
            at = 8
        first = read_message(view, at)
        if first is None or first.kind != 1:
            raise ArrowError('corrupt: no schema at the beginning')
        t, metadata = read_schema(first.header)
        batches, claimed, at = [], 0, first.start + first.size
        most = 2**20 + 64 * len(view)  # rows: a length alone may not fill the memory
        while (message := read_message(view, at)) is not None:
            rows = message.header.number(0, 'q')
            claimed += rows
            if message.kind != 3 or rows < 0 or claimed > most:
                raise ArrowError(
                    f'corrupt: a message of kind {message.kind} with {rows} rows among the batches'
                )
            batches.append(Batch(rows, lazy(message, view, t, rows, most, name)))
            at = message.start + message.size
        return t, metadata, batches


def lazy(message, view, t, rows, most, name):
    def load():
        with guard(name):
            body = Body(message.header, view[message.start:message.start + message.size])
            columns = {f.name: body.array(f.type, most, rows) for f in t.fields}
            if next(body.nodes, None) or next(body.buffers, None):
                raise ArrowError('corrupt: more arrays or buffers than the schema has')
            return columns
    return load


def map_file(file) -> memoryview:
    """An open file's bytes, mapped: read when they are touched, shared by every process that maps them."""
    size = os.fstat(file.fileno()).st_size
    return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)) if size else memoryview(b'')


# -----------------------------------------------------------------------------------------------------------
# writing
# -----------------------------------------------------------------------------------------------------------


class Writer:
    """Writes batches of one struct type to the binary file f as a stream; every buffer stands at a multiple
    of 64 bytes."""

    def __init__(self, f, t: Type, metadata: dict = {}):
        self.f = f
        fields = tuple(map(field_table, t.fields))
        pairs = tuple([key, value] for key, value in metadata.items()) or None
        self.message(1, [Scalar('h', 0), fields, pairs], [], 0)

    def message(self, kind, header, buffers, size):
        raw = flatbuffer([Scalar('h', 4), Scalar('B', kind), header, Scalar('q', size)])
        raw += bytes(-(8 + len(raw)) % 64)
        self.f.write(struct.pack('<Ii', 2**32 - 1, len(raw)) + raw)
        for buffer in buffers:
            self.f.write(buffer)
            self.f.write(bytes(-buffer.nbytes % 64))

    def write(self, columns: list, length: int):
        """One record batch."""
        nodes, buffers, places = [], [], []
        at = 0
        for array in columns:
            collect(array, nodes, buffers)
        for buffer in buffers:
            places.append((at, buffer.nbytes))
            at += buffer.nbytes + -buffer.nbytes % 64
        vectors = [
            Structs(len(rows), b''.join(struct.pack('<qq', *row) for row in rows)) for rows in (nodes, places)
        ]
        self.message(3, [Scalar('q', length), *vectors], buffers, at)

    def end(self):
        self.f.write(struct.pack('<Ii', 2**32 - 1, 0))


def collect(array, nodes, buffers):
    """The nodes (length, nulls) and the buffers of an array and its children, depth first."""
    kind = array.type.kind
    nulls = 0 if array.valid is None else array.length - int(unpack(array.valid, 0, array.length).sum())
    nodes.append((array.length, array.length if kind == 'null' else nulls))
    if kind == 'null':
        return
    buffers.append(memoryview(b'' if array.valid is None else array.valid))
    if array.offsets is not None:
        buffers.append(memoryview(np.ascontiguousarray(array.offsets)))
    if array.data is not None:
        data = np.ascontiguousarray(array.data)
        buffers.append(memoryview(data.view('i8') if kind[0] == 't' else data))
    for child in array.children:
        collect(child, nodes, buffers)
