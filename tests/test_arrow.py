"""arrow.py against pyarrow and HF datasets on generated nested tables, both ways; refused types; mutated files."""
import datetime
import io
import json
import os
import random
import resource
import time

import numpy as np
import pytest

import arrow
from arrow import ArrowError
from dataset import Dataset, load_dataset

pa = pytest.importorskip('pyarrow')
from hypothesis import HealthCheck, given, reject, settings, strategies as st

QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
LEAVES = [pa.null(), pa.bool_(), *(getattr(pa, f'{u}int{b}')() for u in ('', 'u') for b in (8, 16, 32, 64)), pa.float16(), pa.float32(), pa.float64(), pa.string(),
          pa.large_string(), pa.binary(), pa.large_binary(), pa.timestamp('s'), pa.timestamp('ms'), pa.timestamp('us'), pa.timestamp('ns'), pa.json_()]
TYPES = st.recursive(st.sampled_from(LEAVES), lambda t: st.one_of(t.map(pa.list_), t.map(pa.large_list), st.lists(t, max_size=3).map(
    lambda ts: pa.struct([(f'f{i}', x) for i, x in enumerate(ts)]))), max_leaves=5)


def write_pa(table, path, file=False, **options):
    with pa.OSFile(str(path), 'wb') as f, (pa.ipc.new_file if file else pa.ipc.new_stream)(f, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as w:
        w.write_table(table, max_chunksize=4)


def read_pa(path):
    with pa.OSFile(str(path), 'rb') as f:
        table = pa.ipc.open_stream(f).read_all()
    table.validate(full=True)
    return table


def value(t, r):
    """A random Python value of the pyarrow type t, now and then None."""
    p = pa.types
    if r.random() < 0.2 or p.is_null(t):
        return None
    if t == pa.json_():
        return json.dumps(r.choice([1, 1.0, 'x', {'b': None, 'a': [1, 2.5, {}]}, [], True]))
    if p.is_boolean(t):
        return r.random() < 0.5
    if p.is_integer(t):
        low = 0 if p.is_unsigned_integer(t) else -2**(t.bit_width - 1)
        return r.choice([low, low + 2**t.bit_width - 1, r.randrange(low, low + 2**t.bit_width), 1])
    if p.is_floating(t):
        return r.choice([0.0, -1.5, 2.0**-3, float('inf'), float(np.float16(r.random()))])
    if p.is_string(t) or p.is_large_string(t):
        return ''.join(r.choice('aé\n"漢😀\0') for _ in range(r.randrange(5)))
    if p.is_binary(t) or p.is_large_binary(t):
        return r.randbytes(r.randrange(4))
    if p.is_timestamp(t):
        return datetime.datetime(1900, 1, 1) + datetime.timedelta(seconds=r.randrange(2**32))
    if p.is_struct(t):
        return {f.name: value(f.type, r) for f in t}
    return [value(t.value_type, r) for _ in range(r.randrange(4))]


def made(values, t):
    """pa.array, which does not build nested JSON itself."""
    array = pa.array(values, stored(t))
    try:
        return array if array.type == t else array.cast(t)
    except pa.ArrowInvalid:  # lists of nulls beside JSON: pyarrow's cast fails
        reject()


def stored(t):
    if pa.types.is_struct(t):
        return pa.struct([(f.name, stored(f.type)) for f in t])
    if pa.types.is_list(t) or pa.types.is_large_list(t):
        return (pa.list_ if pa.types.is_list(t) else pa.large_list)(stored(t.value_type))
    return pa.string() if t == pa.json_() else t


def decoded(x, t):
    """pyarrow's to_pylist() with JSON decoded and nanoseconds as np.datetime64, as we give them."""
    if x is None:
        return None
    if t == pa.json_():
        return json.loads(x)
    if pa.types.is_struct(t):
        return {f.name: decoded(x[f.name], f.type) for f in t}
    if pa.types.is_list(t) or pa.types.is_large_list(t):
        return [decoded(v, t.value_type) for v in x]
    return np.datetime64(x.value if hasattr(x, 'value') else x, 'ns') if t == pa.timestamp('ns') else x


def a_table(t, n, seed):
    r = random.Random(seed)
    return pa.table({'x': made([value(t, r) for _ in range(n)], t), 'i': pa.array(range(n), pa.int64())})


@settings(QUICK, max_examples=400)
@given(t=TYPES, n=st.integers(0, 11), seed=st.integers(0, 2**32), file=st.booleans())
def test_both_ways_with_pyarrow(t, n, seed, file, tmp_path_factory):
    path = str(tmp_path_factory.getbasetemp() / 'in.arrow')
    table = a_table(t, n, seed)
    table = pa.concat_tables([table, table]).slice(n // 2) if n > 3 else table  # offsets that do not start at 0
    write_pa(table, path, file)
    ds, want = load_dataset(path), decoded(table.to_pylist(), pa.list_(pa.struct(table.schema)))
    assert list(ds) == want and [ds[i] for i in range(len(ds))] == want and json.dumps(list(ds), default=str) == json.dumps(want, default=str)
    order = np.random.default_rng(seed).permutation(len(ds))
    assert ds[order]['x'] == [want[i]['x'] for i in order] == list(ds.shuffle(seed)['x'])
    for mine, rows in ((ds, want), (ds.shuffle(seed), [want[i] for i in order])):  # batches as they were read, and built anew
        mine.to_arrow(path + '2')
        back = read_pa(path + '2')
        assert decoded(back.to_pylist(), pa.list_(pa.struct(back.schema))) == rows and back.schema.field('x').type == t
        assert list(load_dataset(path + '2')) == rows


@settings(QUICK, max_examples=40)
@given(t=TYPES, n=st.integers(1, 9), seed=st.integers(0, 2**32), shards=st.integers(1, 3))
def test_both_ways_through_hf_folders(t, n, seed, shards, tmp_path_factory):
    """Any nested table that HF datasets knows the types of: its folder in our hands, ours in its, values and features."""
    hf = pytest.importorskip('datasets')
    hf.disable_progress_bars()
    base, table = tmp_path_factory.mktemp('hf'), a_table(t, n, seed)
    try:
        theirs = hf.Dataset(table)
    except ValueError:  # a struct without fields and such
        return
    theirs.save_to_disk(base / 'hf', num_shards=min(shards, n))
    mine, want = load_dataset(base / 'hf'), decoded(table.to_pylist(), pa.list_(pa.struct(table.schema)))
    assert list(mine) == want and mine.features == json.loads(json.dumps(theirs.features.to_dict()).replace(', "decode": true', ''))
    mine.shuffle(seed=1).save_to_disk(base / 'ours')
    back = hf.load_from_disk(base / 'ours')
    assert back.features == theirs.features and back.data.to_pylist() == theirs.shuffle(seed=1).flatten_indices().data.to_pylist()


def test_a_stream_by_hand():
    """['hi', None, 'you'] as the drawing at the top of arrow.py has it."""
    array = arrow.build(['hi', None, 'you'], arrow.Type('string'))
    assert (array.valid.tolist(), array.offsets.tolist(), bytes(array.data)) == ([0b101], [0, 2, 2, 5], b'hiyou')
    f = io.BytesIO()
    writer = arrow.Writer(f, arrow.Type('struct', (arrow.Field('x', array.type),)))
    writer.write([array], 3)
    writer.end()
    assert f.getvalue()[:4] == b'\xff' * 4 and f.getvalue()[-8:] == b'\xff' * 4 + bytes(4) and len(f.getvalue()) % 8 == 0
    assert pa.ipc.open_stream(f.getvalue()).read_all().to_pydict() == {'x': ['hi', None, 'you']}


SAME, JSON = ([1, None, 3], [True], [1.5, None], ['a', None], [b'x'], [[1], [], None], [{'a': 1, 'b': 'x'}, {'a': 2, 'b': ''}], [{}, {}], [[[]]], [None]), (
    [{'a': 1}, {'b': 1}], [{'a': 1, 'b': 2}, {'b': 2, 'a': 1}], [{'a': 1}, {'a': 2.5}], [{'a': None}, {'a': 1}], [[1, 'x', None]], [[1, 2.5]], [{'a': [{}, {'x': 2**80}]}], [[True, 0]])


@pytest.mark.parametrize('values', SAME + JSON)
def test_values_come_back_as_they_were(values):
    t = arrow.infer(values)
    back = arrow.build(values, t).list(0, len(values))
    assert back == values and json.dumps(back, default=str) == json.dumps(values, default=str)
    assert ('json' in arrow.type_name(t)) == (values in JSON)
    for cut in range(len(values) + 1):  # the type of two batches is that of both, or json
        joined = arrow.unify(arrow.infer(values[:cut]), arrow.infer(values[cut:]))
        assert json.dumps(arrow.build(values, joined).list(0, len(values)), default=str) == json.dumps(values, default=str)


@pytest.mark.parametrize('values, message', [([1, 'x'], 'int64 and string'), ([{'a': 1}, 'x'], 'string and struct'), ([2**64], 'beyond 64 bits'), ([object()], 'have no column type'),
                                             ([[b'x', 1]], 'does not fit'), (['\ud800'], 'lone surrogate'), ([{'a': '\ud800'}], 'lone surrogate')])
def test_values_without_a_type(values, message):
    with pytest.raises(arrow.Mixed, match=message):
        arrow.build(values, arrow.infer(values))


def test_refused_by_name(tmp_path):
    import decimal
    cases = [({'d': pa.array([decimal.Decimal('1.5')])}, 'decimal', {}), ({'v': pa.array(['x'], pa.string_view())}, 'string_view', {}), ({'d': pa.array(['x']).dictionary_encode()}, 'dictionary', {}),
             ({'r': pa.RunEndEncodedArray.from_arrays([2], [1])}, 'run-end', {}), ({'s': ['x' * 100]}, 'compressed', {'compression': 'lz4'}), ({'s': ['x' * 100]}, 'compressed', {'compression': 'zstd'}),
             ({'m': pa.array([[('a', 1)]], pa.map_(pa.string(), pa.int8()))}, 'map', {}), ({'t': pa.array([datetime.time(1)])}, 'time', {}), ({'t': pa.array([datetime.date(2020, 1, 1)])}, 'date', {}),
             ({'f': pa.array([[1, 2]], pa.list_(pa.int8(), 2))}, 'fixed_size_list', {}), ({'f': pa.array([b'ab'], pa.binary(2))}, 'fixed_size_binary', {}),
             ({'u': pa.UnionArray.from_dense(pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([1])])}, 'union', {})]
    for columns, message, options in cases:
        write_pa(pa.table(columns), tmp_path / 'x.arrow', **options)
        with pytest.raises(ArrowError, match=message):
            load_dataset(tmp_path / 'x.arrow')[0]
    write_pa(pa.Table.from_arrays([pa.array([1]), pa.array([2])], ['a', 'a']), tmp_path / 'x.arrow')
    with pytest.raises(ArrowError, match="two columns with the name 'a'"):
        load_dataset(tmp_path / 'x.arrow')


# --- corrupt files ---

def seeds_for_fuzz():
    """Valid files of all sorts of columns, small, both formats, of pyarrow's making."""
    r, out = random.Random(5), []
    kinds = [*LEAVES, pa.list_(pa.int64()), pa.large_list(pa.string()), pa.struct([('a', pa.string()), ('b', pa.null())]), pa.list_(pa.null()), pa.struct([]),
             pa.list_(pa.struct([('role', pa.string()), ('content', pa.string())])), pa.list_(pa.json_())]
    for k in range(24):
        t = pa.table({f'c{i}': made([value(x, r) for _ in range(5)], x) for i, x in enumerate(r.sample(kinds, r.randrange(1, 5)))})
        for file in (False, True):
            f = io.BytesIO()
            with (pa.ipc.new_file if file else pa.ipc.new_stream)(f, t.schema) as w:
                w.write_table(t)
            out.append(f.getvalue())
    return out


def mutate(data, r):
    data, kind = bytearray(data), r.randrange(6)
    if kind == 0:
        return data[:r.randrange(len(data))]
    for _ in range(r.choice([1, 1, 2, 5])):
        at = r.randrange(len(data) - 8)
        if kind == 1:
            data[at] ^= 1 << r.randrange(8)
        elif kind == 2:
            data[at] = r.randrange(256)
        elif kind == 3:
            at -= at % 4
            data[at:at + 4] = r.choice([0, 1, 0xff, 2**31 - 1, 2**31, 2**32 - 1, r.randrange(2**32), len(data)]).to_bytes(4, 'little')
        elif kind == 4:
            at -= at % 8
            data[at:at + 8] = r.choice([0, 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**40, r.randrange(300)]).to_bytes(8, 'little')
        else:
            data[at:at + 8] = data[(b := r.randrange(len(data) - 8)):b + 8]
    return data


def fuzz(tmp_path, count, seed):
    """count mutated inputs, every third in a folder of save_to_disk whose state.json is mutated too now and then: each is the one error
    type, or a table that can be read to its end; none slow, none large."""
    folder = tmp_path / 'folder'
    Dataset.from_list([{'a': 1}]).save_to_disk(folder)
    state, data_file = (folder / 'state.json').read_bytes(), next(folder.glob('*.arrow'))
    path, files, r, read, slowest = str(tmp_path / 'f.arrow'), seeds_for_fuzz(), random.Random(seed), 0, 0
    f = os.fdopen(os.memfd_create('fuzz'), 'r+b') if hasattr(os, 'memfd_create') else open(path, 'w+b')
    if hasattr(os, 'memfd_create'):  # memory, not disk: ten times as fast
        os.symlink(f'/proc/self/fd/{f.fileno()}', path)
    data_file.unlink()
    os.symlink(path, data_file)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for k in range(count):
        broken = k % 9 == 0
        f.seek(0)
        f.truncate()
        f.write(r.choice(files) if broken else mutate(r.choice(files), r))
        f.flush()
        if k % 9 < 2:
            (folder / 'state.json').write_bytes(mutate(state, r) if broken else state)
        start = time.process_time()
        try:
            for block in load_dataset(path if k % 3 else folder).iter(4096):
                assert len({len(v) for v in block.values()}) <= 1
            read += 1
        except ArrowError as e:
            assert '\n' not in str(e)
        slowest = max(slowest, time.process_time() - start)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000, 'a memory bomb'
    return read, slowest


@pytest.mark.parametrize('count', [4000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_mutated_files(tmp_path, count):
    read, slowest = fuzz(tmp_path, count, 1)
    assert 0.02 < read / count < 0.9 and slowest < 5


def test_what_a_corrupt_value_does_and_when(tmp_path):
    """Cut files: when opened. Falling offsets, false lengths: at the batch's first use. Bad UTF-8: when that value is read. Always ArrowError."""
    Dataset.from_list([{'s': 'abcd'}, {'s': 'efgh'}, {'s': 'ijkl'}]).to_arrow(tmp_path / 'x.arrow')
    good, offsets = (tmp_path / 'x.arrow').read_bytes(), np.array([0, 4, 8, 12], 'i4').tobytes()
    falling, beyond, longer = ([0, 8, 4, 12], [0, 4, 8, 130], [3, 0])
    bad = [good.replace(offsets, np.array(o, 'i4').tobytes()) for o in (falling, beyond)]
    bad.append(good.replace(np.array(longer, 'i8').tobytes(), np.array([9, 0], 'i8').tobytes()))

    def opened(data):
        (tmp_path / 'x.arrow').write_bytes(data)
        return load_dataset(tmp_path / 'x.arrow')
    for data in (good[:-70], good[:100]):
        with pytest.raises(ArrowError, match='x.arrow: c'):
            opened(data)
    for data in bad:
        for use in (lambda d: d[0], lambda d: d[:2], lambda d: list(d.shuffle(0)), lambda d: d.to_arrow(tmp_path / 'y')):
            assert data != good
            with pytest.raises(ArrowError, match='x.arrow: corrupt'):
                use(opened(data))
    ds = opened(good.replace(b'efgh', b'e\xff\xffh'))
    assert ds[0]['s'] == 'abcd' and ds[2] == {'s': 'ijkl'}
    for use in (lambda: ds[1], lambda: ds[:2], lambda: list(ds.shuffle(0)), lambda: ds.to_json(tmp_path / 'y.jsonl')):
        with pytest.raises(ArrowError, match='not UTF-8'):
            use()


def test_memory_bombs(tmp_path):
    """A length field alone may not fill the memory: raised to 2^31 wherever it stands, the file is refused, fast."""
    for values in ([[None] * 3], [None] * 3, [{}] * 3):
        Dataset.from_list([{'x': value} for value in values]).to_arrow(tmp_path / 'x.arrow')
        good = (tmp_path / 'x.arrow').read_bytes()
        for width in (4, 8):
            (tmp_path / 'x.arrow').write_bytes(good.replace((3).to_bytes(width, 'little'), (2**31 - 1).to_bytes(width, 'little')))
            with pytest.raises(ArrowError):
                list(load_dataset(tmp_path / 'x.arrow'))


def test_a_type_tree_that_shares_its_branches():
    """Levels of structs whose two children are one and the same table: 2^60 fields in a few KB of metadata."""
    out = bytearray(4)
    number = arrow.Scalar('B', 1)
    tables = [arrow.append(out, [b'x', number, arrow.Scalar('B', 13 if level < 60 else 1), [], None, ([], []) if level < 60 else ()]) for level in range(61)]
    for parent, child in zip(tables, tables[1:]):
        start, _ = arrow.Table(bytes(out), parent).vector(5, 4)
        for at in (start, start + 4):
            arrow.point(out, at, child)
    start = time.process_time()
    with pytest.raises(ArrowError, match='more than'):
        arrow.read_field(arrow.Table(bytes(out), tables[0]), [arrow.MOST_FIELDS])
    assert time.process_time() - start < 2
