"""dataset.py part 1 against pyarrow, HF datasets and plain Python; corrupt files; order, packing and prefetch against enumeration."""
import contextlib
import datetime
import gzip
import io
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import arrow as A
import dataset as D
from data import lint as L
from arrow import ArrowError, Field, Type
from dataset import Dataset, Sampler, load_dataset

pa = pytest.importorskip('pyarrow')
from hypothesis import HealthCheck, given, settings, strategies as st

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def write_pa(table, path, file=False, **options):
    with pa.OSFile(str(path), 'wb') as f, (pa.ipc.new_file if file else pa.ipc.new_stream)(f, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as w:
        w.write_table(table, max_chunksize=4)


def read_pa(path, file=False, full=True):
    with pa.OSFile(str(path), 'rb') as f:
        table = (pa.ipc.open_file if file else pa.ipc.open_stream)(f).read_all()
    table.validate(full=full)
    return table


def sound(table):
    """subtle: pyarrow builds [None] of a list of dictionaries with an index 0 into no values, and then calls it invalid itself."""
    try:
        table.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


# --- both ways with pyarrow on generated nested tables ---

LEAVES = [pa.null(), pa.bool_(), *(getattr(pa, f'{u}int{b}')() for u in ('', 'u') for b in (8, 16, 32, 64)), pa.float16(), pa.float32(), pa.float64(),
          pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.binary(3), pa.date32(), pa.date64(), pa.time32('s'), pa.time32('ms'),
          pa.time64('us'), pa.timestamp('s'), pa.timestamp('ms', 'UTC'), pa.timestamp('us'), pa.timestamp('us', '+02:00'),
          pa.timestamp('us', 'Europe/Berlin'), pa.timestamp('ns'), pa.duration('s'), pa.duration('us'), pa.duration('ns')]
TYPES = st.recursive(st.sampled_from(LEAVES) | st.builds(lambda i, v: pa.dictionary(i, v), st.sampled_from([pa.int8(), pa.int32(), pa.uint16()]),
                                                         st.sampled_from([pa.string(), pa.int64(), pa.float64()])),
                     lambda t: st.one_of(t.map(pa.list_), t.map(pa.large_list), t.map(lambda x: pa.list_(x, 2)),
                                         st.lists(t, max_size=3).map(lambda ts: pa.struct([(f'f{i}', x) for i, x in enumerate(ts)])),
                                         t.map(lambda x: pa.map_(pa.string(), x))), max_leaves=5)


def value(t, r):
    """A random Python value of the pyarrow type t, now and then None."""
    p = pa.types
    if r.random() < 0.2 or p.is_null(t):
        return None
    if p.is_boolean(t):
        return r.random() < 0.5
    if p.is_integer(t):
        low = 0 if p.is_unsigned_integer(t) else -2**(t.bit_width - 1)
        return r.choice([low, low + 2**t.bit_width - 1, r.randrange(low, low + 2**t.bit_width), 1])
    if p.is_floating(t):
        return r.choice([0.0, -1.5, 2.0**-3, float('inf'), float(np.float16(r.random()))])
    if p.is_string(t) or p.is_large_string(t):
        return ''.join(r.choice('aé\n"漢😀\0') for _ in range(r.randrange(5)))
    if p.is_fixed_size_binary(t):
        return r.randbytes(t.byte_width)
    if p.is_binary(t) or p.is_large_binary(t):
        return r.randbytes(r.randrange(4))
    if p.is_date(t):
        return datetime.date(r.randrange(1, 9999), r.randrange(1, 13), 3)
    if p.is_time(t):
        return datetime.time(r.randrange(24), 5, r.randrange(60), {'s': 0, 'ms': 7000, 'us': 123456}[t.unit])
    if p.is_timestamp(t):
        return datetime.datetime(r.randrange(1700, 2200), 5, 6, 7, 8, 9, tzinfo=datetime.timezone.utc if t.tz else None)
    if p.is_duration(t):
        return datetime.timedelta(seconds=r.randrange(-10**6, 10**6))
    if p.is_dictionary(t):
        return value(t.value_type, random.Random(r.randrange(3)))
    if p.is_fixed_size_list(t):
        return [value(t.value_type, r) for _ in range(2)]
    if p.is_map(t):
        return [(f'k{i}', value(t.item_type, r)) for i in range(r.randrange(3))]
    if p.is_struct(t):
        return {f.name: value(f.type, r) for f in t}
    return [value(t.value_type, r) for _ in range(r.randrange(4))]


def ours(t):
    """pyarrow type -> dataset.Type, by an independent route."""
    p, F = pa.types, lambda x, name='item': (Field(name, ours(x)),)
    names = {'halffloat': 'float16', 'float': 'float32', 'double': 'float64', 'date32[day]': 'date32', 'date64[ms]': 'date64'}
    if p.is_dictionary(t):
        return Type('dictionary', (str(t.index_type), False), F(t.value_type, ''))
    if p.is_map(t):
        return Type('map', False, (Field('entries', Type('struct', None, F(t.key_type, 'key') + F(t.item_type, 'value'))),))
    if p.is_struct(t):
        return Type('struct', None, tuple(Field(f.name, ours(f.type)) for f in t))
    if p.is_fixed_size_list(t):
        return Type('fixed_size_list', t.list_size, F(t.value_type))
    if p.is_list(t) or p.is_large_list(t):
        return Type('list' if p.is_list(t) else 'large_list', None, F(t.value_type))
    if p.is_fixed_size_binary(t):
        return Type('fixed_size_binary', t.byte_width)
    if p.is_timestamp(t):
        return Type('timestamp', (t.unit, t.tz))
    if p.is_time(t) or p.is_duration(t):
        return Type(str(t).split('[')[0], t.unit)
    return Type(names.get(str(t), str(t)))


def plain(x):
    """NaN-free Python for comparison; nanosecond objects of pandas and numpy alike as integers."""
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [plain(v) for v in x]
    if isinstance(x, (np.datetime64, np.timedelta64)):
        return int(x.astype('i8'))
    return int(x.value) if hasattr(x, 'nanosecond') or hasattr(x, 'nanoseconds') else x


@QUICK
@given(t=TYPES, n=st.integers(0, 11), seed=st.integers(0, 2**32), file=st.booleans())
def test_reads_what_pyarrow_writes(t, n, seed, file, tmp_path_factory):
    path, r = str(tmp_path_factory.getbasetemp() / 'in.arrow'), random.Random(seed)
    table = pa.table({'x': pa.array([value(t, r) for _ in range(n)], t), 'i': pa.array(range(n), pa.int64())})
    table = pa.concat_tables([table, table]).slice(n // 2) if n > 3 else table  # offsets that do not start at 0
    if not pa.types.is_dictionary(t) and 'dictionary' in str(t) and file:
        file = False  # pyarrow refuses to write nested dictionaries that differ to a file
    write_pa(table, path, file)
    ds, want = load_dataset(path), plain(table.to_pylist())
    assert plain(list(ds)) == want and len(ds) == table.num_rows
    assert [plain(ds[i]) for i in range(len(ds))] == want
    order = random.Random(seed).choices(range(len(ds)), k=7) if len(ds) else []
    assert plain(ds[order]['x']) == [want[i]['x'] for i in order]
    assert plain(list(ds.shuffle(1).select(range(0, len(ds), 2)))) == [want[i] for i in np.random.default_rng(1).permutation(len(ds))[::2]]
    for way in (False, True):  # and through our writer, in another order, back to pyarrow
        ds.shuffle(2).to_arrow(path + '2', way)
        back = read_pa(path + '2', way, full=sound(table))
        assert plain(back.to_pylist()) == [want[i] for i in np.random.default_rng(2).permutation(len(ds))]
        assert back.schema.field('x').type == t or 'map' in str(t) or 'dictionary' in str(t)


@QUICK
@given(t=TYPES, n=st.integers(0, 11), seed=st.integers(0, 2**32), file=st.booleans())
def test_pyarrow_reads_what_we_write(t, n, seed, file, tmp_path_factory):
    path, r = str(tmp_path_factory.getbasetemp() / 'out.arrow'), random.Random(seed)
    values = [value(t, r) for _ in range(n)]
    ds = Dataset.from_dict({'x': values, 'i': list(range(n))}, types={'x': ours(t), 'i': Type('int64')})
    ds.to_arrow(path, file)
    want = pa.array(values, t)
    table = read_pa(path, file)
    assert table['x'].type == t and plain(table['x'].to_pylist()) == plain(want.to_pylist()) == plain(list(ds['x'])) == plain(list(load_dataset(path)['x']))
    assert table['x'].null_count == want.null_count


JSONS = st.recursive(st.none() | st.booleans() | st.integers(-2**63, 2**63 - 1) | st.floats(allow_nan=False) | st.text(), lambda x: st.lists(x, max_size=3)
                     | st.dictionaries(st.text(max_size=3), x, max_size=3), max_leaves=8)


def shape(values):
    """The one type of these values by brute force, None if there is none: the independent truth for the inference."""
    kinds = {type(v) for v in values if v is not None}
    if kinds <= {int, float}:
        return 'none' if not kinds else 'float' if float in kinds else 'int'
    if len(kinds) > 1:
        return None
    if kinds == {list}:
        return shape([x for v in values if v is not None for x in v]) and 'list'
    if kinds == {dict}:
        rows = [v for v in values if v is not None]
        return 'dict' if all(shape([r.get(k) for r in rows]) for k in {k for r in rows for k in r}) else None
    return kinds.pop().__name__


def filled(values):
    """What HF gives back: missing keys None, ints among floats as floats."""
    kinds = {type(v) for v in values if v is not None}
    if kinds == {int, float}:
        return [None if v is None else float(v) for v in values]
    if kinds == {list}:
        flat = iter(filled([x for v in values if v is not None for x in v]))
        return [None if v is None else [next(flat) for _ in v] for v in values]
    if kinds == {dict}:
        names = list(dict.fromkeys(k for v in values if v is not None for k in v))
        columns = {k: filled([None if v is None else v.get(k) for v in values]) for k in names}
        return [None if v is None else {k: columns[k][i] for k in names} for i, v in enumerate(values)]
    return list(values)


@QUICK
@given(rows=st.lists(st.dictionaries(st.sampled_from('abc'), JSONS, max_size=3), min_size=1, max_size=6), form=st.sampled_from(['jsonl', 'json', 'gz']))
def test_json_is_inferred_over_all_rows(rows, form, tmp_path_factory):
    path = str(tmp_path_factory.getbasetemp() / f'x.{"jsonl.gz" if form == "gz" else form}')
    text = json.dumps(rows, indent=random.Random(len(rows)).choice([None, 1])) if form == 'json' else ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows)
    with (gzip.open if form == 'gz' else open)(path, 'wb') as f:
        f.write(text.encode())
    if shape(rows) is None:
        with pytest.raises(ValueError, match='mixed types'):
            load_dataset(path)
        return
    assert list(load_dataset(path)) == (filled(rows) if any(rows) else [])


def test_types_meet_across_blocks(tmp_path, monkeypatch):
    """Null first, then ints, then floats; keys that come late; lists that are empty first: each block has another type."""
    rows = [{'a': None if i < 50 else i if i < 100 else i + 0.5, 'l': [] if i < 70 else [{'k': 'x'}], **({'late': 'é'} if i > 120 else {})} for i in range(150)]
    path = tmp_path / 'x.jsonl'
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    monkeypatch.setattr(D, '_BLOCK', 200)
    monkeypatch.setattr(D, '_BATCH', 300)
    want = [{'late': None, **r} for r in rows]
    for spill in (2**40, 1000):  # in memory, and through the temporary file
        monkeypatch.setattr(D, '_SPILL', spill)
        for procs in (1, 2):
            ds = load_dataset(path, num_proc=procs)
            assert list(ds) == want and len(ds._chunks) > 5
            assert [ds[i] for i in (149, 0, 60)] == [want[i] for i in (149, 0, 60)] and ds.shuffle(0)[3:9]['a'] == [want[i]['a'] for i in np.random.default_rng(0).permutation(150)[3:9]]


def test_lines_in_pieces_of_a_file(tmp_path, monkeypatch):
    """Each line once, whatever the block and the number of processes: a byte order mark, CRLF, blank lines, a line longer than many blocks."""
    r, rows, text = random.Random(2), [], '\ufeff'
    for i in range(300):
        rows.append({'i': i, 't': 'xé漢😀\n'[i % 5] * (5000 if i == 150 else r.randrange(20))})
        text += ' ' * (i % 7 == 0) + json.dumps(rows[-1], ensure_ascii=i % 3 == 0) + r.choice(['\n', '\r\n', '\n\n', '\n \n']) * (i < 299)
    (tmp_path / 'x.jsonl').write_bytes(text.encode())
    with gzip.open(tmp_path / 'x.jsonl.gz', 'wb') as f:
        f.write(text.encode())
    for block in (1, 500):
        monkeypatch.setattr(D, '_BLOCK', block)
        for name, procs in (('x.jsonl', 1), ('x.jsonl', 3), ('x.jsonl.gz', 1)):
            assert list(load_dataset(tmp_path / name, num_proc=procs)) == rows


BAD = [('{"a": 1}\n{"a": 2\n', 'x.jsonl:2:8: '), ('{"a": 1}\n\n[1]\n', 'x.jsonl:3:1: expected an object'), ('{"a": 1}\n{"a": "x"}\n', "x.jsonl:2: column 'a': mixed types: "),
       ('{"m": [{"c": "x"}]}\n\n{"m": [{"c": 3}]}\n', "x.jsonl:3: column 'm.c': mixed types: "), ('{"a": 18446744073709551616}\n', 'x.jsonl:1: column .a.: an integer beyond'),
       ('{"a": "\\ud800"}\n', 'x.jsonl:1: column .a.: text with a lone surrogate'), ('', 'x.jsonl: the file is empty'), ('\n \n', 'x.jsonl: no rows'),
       ('{"a": 1\n"b": 2}\n{},{}\n', 'x.jsonl:1:8: '), ('[{"a": 1},\n {"a": }]', 'x.jsonl:2:8: '), ('[{"a": 1}', 'x.jsonl:1:10: the list is cut off'),
       ('[{"a": 1}] x', 'x.jsonl:1:12: something stands behind'), ('[{"a": 1}, 3]', 'x.jsonl:1:12: expected an object'), ('[{"a": 1},]', 'x.jsonl:1:11: expected an object'),
       ('[{"a":1},\n{"a":"x"}]', "x.jsonl:2: column 'a': mixed"), ('{"a": 1}\n{\n"a": 1}\n', 'x.jsonl:2:2: .*expected one JSON object a line'), ('hello', 'x.jsonl:1:1: '), (b'{"a": "\xff"}\n', 'x.jsonl:1:8: not UTF-8'),
       (b'{"a": 1}\n{"a": "\xff"}\n', 'x.jsonl:2:8: not UTF-8'), ('{"a":' * 100000, 'x.jsonl:1: '), ('[' * 100000, 'x.jsonl:1:2: expected an object')]


@pytest.mark.parametrize('text,message', BAD)
def test_errors_name_file_line_and_column(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    with open('x.jsonl', 'wb') as f:
        f.write(text if isinstance(text, bytes) else text.encode())
    for procs, block in ((1, 1 << 20), (2, 7)):
        monkeypatch.setattr(D, '_BLOCK', block)
        with pytest.raises(ValueError, match=message) as e:
            load_dataset('x.jsonl', num_proc=procs)
        assert '\n' not in str(e.value) and len(str(e.value)) < 300


def test_other_inputs_and_their_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open('a.csv', 'w').write('i,f,s,b,n,z\n1,1,007,true,,"a ""q"", b"\n-2,2.5,x,False,,"two\nlines"\n,,,,,\n')
    want = [{'i': 1, 'f': 1.0, 's': '007', 'b': True, 'n': None, 'z': 'a "q", b'}, {'i': -2, 'f': 2.5, 's': 'x', 'b': False, 'n': None, 'z': 'two\nlines'}, dict.fromkeys('ifsbnz')]
    assert list(load_dataset('a.csv')) == want
    with gzip.open('t.tsv.gz', 'wt') as f:
        f.write('a\tb\r\n1\tx\r\n')
    assert list(load_dataset(['t.tsv.gz', 't.tsv.gz'])) == [{'a': 1, 'b': 'x'}] * 2
    pa.parquet = pytest.importorskip('pyarrow.parquet')
    pa.parquet.write_table(pa.table({'m': [[{'r': 'u', 'c': None}], None], 'f': pa.array([1, 2], pa.float32())}), 'p.parquet')
    assert list(load_dataset('p.parquet')) == [{'m': [{'r': 'u', 'c': None}], 'f': 1.0}, {'m': None, 'f': 2.0}]
    open('r.csv', 'w').write('a,b\n1,2\n3\n')
    open('junk.bin', 'wb').write(b'\x01\x02junk')
    open('b.jsonl', 'w').write('{"a": "x"}\n')
    gzip.open('cut.jsonl.gz', 'wb').write(b'{"a": 1}\n' * 1000)
    open('cut.jsonl.gz', 'r+b').truncate(40)
    open('not.parquet', 'w').write('PAR1 not')
    os.mkdir('folder')
    for path, message in (('none.jsonl', 'none.jsonl: no such file'), ('r.csv', 'r.csv:3: 1 fields'), ('junk.bin', 'not one of .jsonl'), ('folder', 'without state.json'),
                          (['t.tsv.gz', 'b.jsonl'], "b.jsonl: column 'a': mixed types: int64 and string"), ('cut.jsonl.gz', 'cut.jsonl.gz: corrupt gzip'),
                          ('not.parquet', 'not.parquet: '), ([], 'no files')):
        with pytest.raises(ValueError, match=message):
            load_dataset(path)
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(ValueError, match='pip install pyarrow'):
        load_dataset('p.parquet')


# --- HF datasets ---

def test_hf_datasets_both_ways(tmp_path):
    hf = pytest.importorskip('datasets')
    hf.disable_progress_bars()
    features = hf.Features({'text': hf.Value('string'), 'label': hf.ClassLabel(names=['neg', 'pos']), 'messages': hf.List({'role': hf.Value('string'), 'content': hf.Value('string')}),
                            'w': hf.List(hf.Value('float32'), length=2), 't': hf.Value('timestamp[us]')})
    rows = [{'text': f'é{i}', 'label': i % 2, 'messages': [{'role': 'user', 'content': 'q' * i}] * (i % 3), 'w': [i, 0.5], 't': datetime.datetime(2020, 1, 1 + i % 28)} for i in range(50)]
    theirs = hf.Dataset.from_list(rows, features=features)
    theirs.save_to_disk(tmp_path / 'hf', num_shards=3)
    mine = load_dataset(tmp_path / 'hf')
    assert list(mine) == list(theirs) and mine.features == {k: v for k, v in json.loads(json.dumps(features.to_dict())).items()}
    cut = mine.rename_column('label', 'y').remove_columns('t').shuffle(3).select(range(40))
    cut.save_to_disk(tmp_path / 'ours', max_shard_size=1)
    back = hf.load_from_disk(tmp_path / 'ours')
    assert list(back) == list(cut) and back.features['y'] == features['label'] and back.features['w'] == features['w'] and back.column_names == cut.column_names
    assert list(load_dataset(tmp_path / 'ours')) == list(cut)
    cut.select(range(0)).save_to_disk(tmp_path / 'ours')  # replaces; no rows is a dataset too
    assert len(hf.load_from_disk(tmp_path / 'ours')) == 0 == len(load_dataset(tmp_path / 'ours'))
    assert sorted(os.listdir(tmp_path)) == ['hf', 'ours']
    mine.to_arrow(tmp_path / 'one.arrow')
    assert list(hf.Dataset.from_file(str(tmp_path / 'one.arrow'))) == rows
    for seed in (0, 7):  # the same permutation and split for the same seed
        assert list(theirs.shuffle(seed=seed)) == list(mine.shuffle(seed=seed))
        a, b = theirs.train_test_split(test_size=0.13, seed=seed), mine.train_test_split(test_size=0.13, seed=seed)
        assert list(a['train']) == list(b['train']) and list(a['test']) == list(b['test'])
    both = [d.map(lambda b: {'n': [len(t) for t in b['text']], 'w': b['w']}, batched=True, batch_size=7, remove_columns=['t']) for d in (theirs, mine)]
    assert list(both[0]) == list(both[1]) and mine.features['w'] == both[1].features['w']
    assert list(theirs.filter(lambda r: r['label'] == 1)) == list(mine.filter(lambda r: r['label'] == 1))
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'thesis.txt').write_text('x')
    with pytest.raises(ValueError, match='is no saved dataset'):
        mine.save_to_disk(tmp_path / 'mine')
    hf.DatasetDict({'train': theirs, 'test': theirs}).save_to_disk(tmp_path / 'splits')
    with pytest.raises(ValueError, match='holds the splits train, test'):
        load_dataset(tmp_path / 'splits')
    assert len(load_dataset(tmp_path / 'splits' / 'test')) == 50
    (tmp_path / 'x.jsonl').write_text('{"text": 1}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl: column 'text': mixed types"):  # behind a folder of three shards
        load_dataset([tmp_path / 'hf', tmp_path / 'x.jsonl'])


HF_TYPES = st.recursive(st.sampled_from([t for t in LEAVES if not pa.types.is_fixed_size_binary(t)]), lambda t: st.one_of(
    t.map(pa.list_), t.map(pa.large_list), t.map(lambda x: pa.list_(x, 2)), st.lists(t, min_size=1, max_size=3).map(lambda ts: pa.struct([(f'f{i}', x) for i, x in enumerate(ts)]))),
    max_leaves=5)


@settings(QUICK, max_examples=40)
@given(t=HF_TYPES, n=st.integers(1, 9), seed=st.integers(0, 2**32), shards=st.integers(1, 3))
def test_generated_tables_through_hf_folders(t, n, seed, shards, tmp_path_factory):
    """Any nested table that HF datasets knows the types of: its folder in our hands, ours in its, values and features."""
    hf = pytest.importorskip('datasets')
    hf.disable_progress_bars()
    base, r = tmp_path_factory.mktemp('hf'), random.Random(seed)
    table = pa.table({'x': pa.array([value(t, r) for _ in range(n)], t), 'i': pa.array(range(n), pa.int64())})
    theirs = hf.Dataset(table)
    theirs.save_to_disk(base / 'hf', num_shards=min(shards, n))
    mine = load_dataset(base / 'hf')
    assert plain(list(mine)) == plain(table.to_pylist()) and mine.features == json.loads(json.dumps(theirs.features.to_dict()))
    mine.shuffle(seed=1).save_to_disk(base / 'ours', max_shard_size=1 << r.randrange(12))
    back = hf.load_from_disk(base / 'ours')
    assert plain(back.data.to_pylist()) == plain(theirs.shuffle(seed=1).flatten_indices().data.to_pylist()) and back.features == theirs.features


# --- verbs ---

def table(n=100):
    return Dataset.from_list([{'i': i, 's': f's{i}', 'l': list(range(i % 4))} for i in range(n)])


def test_verbs():
    ds, rows = table(), list(table())
    assert len(ds) == ds.num_rows == 100 and ds.column_names == ['i', 's', 'l'] and ds[-1] == rows[-1]
    assert ds[3:6] == {'i': [3, 4, 5], 's': ['s3', 's4', 's5'], 'l': [[0, 1, 2], [], [0]]} and ds[90:200]['i'] == list(range(90, 100)) and ds[::-40]['i'] == [99, 59, 19]
    assert ds[[7, -1, 7]]['i'] == [7, 99, 7] and ds[np.arange(100) > 97]['i'] == [98, 99] and ds['i'] == list(range(100)) and ds['s'][2:4] == ['s2', 's3']
    a = ds.select(range(50, 10, -5)).select([0, 2]).select(range(1, -1, -1))
    assert a['i'] == [40, 50] and ds.shuffle(1).shuffle(2)['i'] == [np.random.default_rng(1).permutation(100)[k] for k in np.random.default_rng(2).permutation(100)]
    assert list(ds.filter(lambda r: r['i'] % 2)) == rows[1::2] == list(ds.filter(lambda b: [i % 2 for i in b['i']], batched=True, batch_size=7))
    assert [len(b['i']) for b in ds.iter(30)] == [30, 30, 30, 10] and [len(b['i']) for b in ds.iter(30, drop_last_batch=True)] == [30, 30, 30]
    both = D.concatenate([ds.select([5]), ds.remove_columns('l').rename_column('s', 't'), ds])
    assert both[0] == {**rows[5], 't': None} and both[6] == {'i': 5, 's': None, 'l': None, 't': 's5'} and len(both) == 201 and both[106]['s'] == 's5'
    parts = ds.train_test_split(0.2, shuffle=False)
    assert list(parts['train']) == rows[:80] and list(parts['test']) == rows[80:]
    for bad, kind in ((lambda: ds[100], IndexError), (lambda: ds[[0, 100]], IndexError), (lambda: ds['x'], KeyError), (lambda: ds.remove_columns('x'), ValueError),
                      (lambda: ds.train_test_split(1.0), ValueError), (lambda: ds.rename_column('i', 's'), ValueError), (lambda: ds[[0.5]], TypeError),
                      (lambda: Dataset.from_dict({'a': [1], 'b': [1, 2]}), ValueError), (lambda: Dataset.from_dict({'a': [1, 'x']}), ValueError),
                      (lambda: Dataset.from_dict({'a': [300]}, {'a': Type('int8')}), ValueError), (lambda: D.concatenate([ds, Dataset.from_dict({'i': ['x']})]), ValueError)):
        with pytest.raises(kind):
            bad()


def test_selecting_copies_nothing(tmp_path):
    Dataset.from_dict({'x': np.arange(1000, dtype=np.float32), 'm': np.arange(4000).reshape(1000, 4), 'l': [[1, 2]] * 1000},
                      {'m': Type('fixed_size_list', 4, (Field('item', Type('int64')),))}).to_arrow(tmp_path / 'x.arrow')
    ds = load_dataset(tmp_path / 'x.arrow')
    view = ds['x'].numpy()
    assert np.shares_memory(view, ds['x'].numpy()) and np.shares_memory(view, ds.select(range(10, 900))[0:] and ds.select(range(10, 900))['x'].numpy())
    assert view.ctypes.data % 64 == 0 and not view.flags.writeable and ds['x'].torch().data_ptr() == view.ctypes.data
    assert (ds.select(range(10, 900))['x'].numpy() == np.arange(10, 900)).all() and ds['m'].numpy().shape == (1000, 4) and np.shares_memory(ds['m'].numpy(), ds['m'].numpy())
    values, offsets = ds['l'].ragged()
    assert values.tolist() == [1, 2] * 1000 and offsets.tolist() == list(range(0, 2001, 2))
    assert (ds.shuffle(0)['x'].numpy() == np.random.default_rng(0).permutation(1000)).all()
    with pytest.raises(ValueError, match='no numpy view'):
        ds['l'].numpy()
    with pytest.raises(ValueError, match='has nulls'):
        Dataset.from_dict({'a': [1, None]})['a'].numpy()


def _helper(x):
    return x * 2


def test_map_and_its_cache(tmp_path):
    ds, add, pytest.calls = table(), 10, []  # a module is hashed by its name: what it holds may change

    def count(row):
        pytest.calls.append(row['i'])
        return {'j': _helper(row['i']) + add}
    for _ in range(2):  # the second time nothing is called
        out = ds.map(count, cache_dir=tmp_path)
        assert out['j'] == [2 * i + 10 for i in range(100)] and out.column_names == ['i', 's', 'l', 'j'] and len(pytest.calls) == 100
    add = 11  # another closure, another result
    assert ds.map(count, cache_dir=tmp_path)['j'][0] == 11 and len(pytest.calls) == 200
    assert ds.select(range(5)).map(count, cache_dir=tmp_path)['j'] == [11, 13, 15, 17, 19] and len(pytest.calls) == 205
    g = globals()
    g['_helper'], old = (lambda x: x * 3), g['_helper']  # a function that it calls has changed
    assert ds.map(count, cache_dir=tmp_path)['j'][1] == 14
    g['_helper'] = old
    two = ds.map(lambda b, idx: {'k': [i + j for i, j in zip(b['i'], idx)], 's': [s * 2 for s in b['s']]}, batched=True, batch_size=8, with_indices=True, num_proc=2, cache=False)
    assert two['k'] == [2 * i for i in range(100)] and two[3]['s'] == 's3s3'
    out = ds.map(lambda b: {'x': [v for l in b['l'] for v in l]}, batched=True, remove_columns=ds.column_names, cache=False)
    assert out['x'] == [v for i in range(100) for v in range(i % 4)] and out.column_names == ['x']
    assert list(ds.map(lambda r: None, cache=False)) == list(ds) and ds.map(lambda b: {'t': torch.ones(len(b['i']), 2)}, batched=True, cache=False)[0]['t'] == [1.0, 1.0]
    lock = __import__('threading').Lock()
    assert ds.map(lambda r: {'y': lock.locked()}, cache_dir=tmp_path)['y'][0] is False  # no fingerprint: run, not cached
    assert not [f for f in os.listdir(tmp_path) if 'tmp' in f]
    with pytest.raises(ValueError, match='different lengths'):
        ds.map(lambda b: {'x': [1]}, batched=True, cache=False)
    with pytest.raises(ValueError, match="column 'x': mixed types"):
        ds.map(lambda r: {'x': r['i'] if r['i'] else 'zero'}, cache=False)
    with pytest.raises(ZeroDivisionError):
        ds.map(lambda r: {'x': 1 / (r['i'] - 70)}, cache_dir=tmp_path, num_proc=2, batch_size=10)
    with pytest.raises(ValueError, match='worker process died'):
        ds.map(lambda r: os._exit(1), cache_dir=tmp_path, num_proc=2, batch_size=10)
    assert not [f for f in os.listdir(tmp_path) if 'tmp' in f]


@pytest.mark.parametrize('procs', [1, 2])
def test_map_tells_how_far_it_is(monkeypatch, procs):
    class Terminal(io.StringIO):
        def isatty(self):
            return True
    monkeypatch.setattr(sys, 'stderr', Terminal())
    table().map(lambda r: {'n': 1}, batch_size=10, num_proc=procs, cache=False, desc='counting')
    said = sys.stderr.getvalue()
    assert [int(x.split()[1].split('/')[0]) for x in said.split('\r')[1:]] == list(range(10, 101, 10)) and said.count('\n') == 1 and '100/100 rows' in said.split('\r')[-1]


def test_bits_and_words_over_chunks(tmp_path):
    """Booleans and dictionaries, gathered from many chunks; a dictionary beside plain text; more words than the index can count."""
    r = random.Random(4)
    b, w = [r.choice([True, False, None]) for _ in range(300)], [r.choice([f'w{i}', None]) for i in range(300)]
    t = pa.table({'b': pa.array(b), 'w': pa.array(w).dictionary_encode(), 'k': pa.array([x is True for x in b])})
    write_pa(t, tmp_path / 'x.arrow', unify_dictionaries=True)
    ds, order = load_dataset(tmp_path / 'x.arrow'), r.choices(range(300), k=500)
    assert list(ds) == t.to_pylist() and ds['k'].numpy().tolist() == [x is True for x in b] and ds['k'].torch().sum() == b.count(True)
    assert ds[order] == {k: [v[i] for i in order] for k, v in t.to_pydict().items()}
    ds.select(order).to_arrow(tmp_path / 'y.arrow')
    assert read_pa(tmp_path / 'y.arrow').to_pylist() == [t.to_pylist()[i] for i in order]
    both = D.concatenate([ds.select_columns('w'), Dataset.from_dict({'w': ['plain', None]})])
    assert list(both['w']) == [*w, 'plain', None] and both.types['w'] == Type('string')
    small = Type('dictionary', ('int8', False), (Field('', Type('string')),))
    parts = [Dataset.from_dict({'w': [f'{i % 3}{k}' for i in range(90)]}, {'w': small}) for k in 'ab']
    assert list(D.concatenate(parts).select(range(60, 120))['w']) == [f'{i % 3}a' for i in range(60, 90)] + [f'{i % 3}b' for i in range(30)]
    with pytest.raises(ValueError, match="string cannot become int64"):
        A.cast(A.array(['x']), Type('int64'))


def test_map_keeps_the_types_of_untouched_columns():
    ds = Dataset.from_dict({'a': [1, 2], 'b': [1, 2], 'c': ['x', 'y']}, {'a': Type('int8'), 'b': Type('float16')})
    out = ds.map(lambda r: {'b': r['b'] + 1, 'c': r['c'] + '!'}, cache=False)
    assert {k: t.kind for k, t in out.types.items()} == {'a': 'int8', 'b': 'float16', 'c': 'string'} and out[1] == {'a': 2, 'b': 3.0, 'c': 'y!'}


def test_to_json_round_trip(tmp_path):
    ds = Dataset.from_list([{'t': 'é\u2028\n"', 'n': None, 'm': [{'role': 'user', 'k': 1.5}]}, {'t': '', 'n': None, 'm': []}])
    for name in ('x.jsonl', 'x.jsonl.gz'):
        ds.to_json(tmp_path / name)
        assert list(load_dataset(tmp_path / name)) == list(ds)
    with pytest.raises(ValueError, match='JSON has no such type'):
        Dataset.from_dict({'b': [b'x']}).to_json(tmp_path / 'y.jsonl')
    assert sorted(os.listdir(tmp_path)) == ['x.jsonl', 'x.jsonl.gz']


# --- corrupt and refused files ---

def test_refused_by_name(tmp_path):
    import decimal
    cases = [(pa.table({'d': pa.array([decimal.Decimal('1.5')])}), 'decimal', {}), (pa.table({'v': pa.array(['x'], pa.string_view())}), 'string_view', {}),
             (pa.table({'v': pa.array([b'x'], pa.binary_view())}), 'binary_view', {}), (pa.table({'r': pa.RunEndEncodedArray.from_arrays([2], [1])}), 'run-end', {}),
             (pa.table({'s': ['x' * 100]}), 'compressed with LZ4', {'compression': 'lz4'}), (pa.table({'s': ['x' * 100]}), 'compressed with ZSTD', {'compression': 'zstd'}),
             (pa.Table.from_arrays([pa.array([1]), pa.array([2])], ['a', 'a']), "two columns with the name 'a'", {}),
             (pa.table({'u': pa.UnionArray.from_dense(pa.array([0], pa.int8()), pa.array([0], pa.int32()), [pa.array([1])])}), 'union', {})]
    for t, message, options in cases:
        write_pa(t, tmp_path / 'x.arrow', **options)
        with pytest.raises(ArrowError, match=message):
            load_dataset(tmp_path / 'x.arrow')


def test_old_streams_without_the_continuation_word(tmp_path):
    t = pa.table({'a': [1, None, 3], 's': ['x', 'y', None]})
    for file in (False, True):
        write_pa(t, tmp_path / 'old.arrow', file, use_legacy_format=True)
        assert list(load_dataset(tmp_path / 'old.arrow')) == t.to_pylist()


def test_delta_and_replaced_dictionaries(tmp_path):
    t = pa.dictionary(pa.int8(), pa.string())
    batches = [pa.record_batch({'d': pa.DictionaryArray.from_arrays(pa.array(i, pa.int8()), w)}) for i, w in (([0, 1], ['a', 'b']), ([2, None], ['a', 'b', 'c']), ([0], ['z']))]
    for delta in (False, True):
        with pa.OSFile(str(tmp_path / 'x.arrow'), 'wb') as f, pa.ipc.new_stream(f, pa.schema({'d': t}), options=pa.ipc.IpcWriteOptions(emit_dictionary_deltas=delta)) as w:
            for b in batches:
                w.write_batch(b)
        ds = load_dataset(tmp_path / 'x.arrow')
        assert ds['d'] == ['a', 'b', 'c', None, 'z']
        for file in (False, True):
            ds.to_arrow(tmp_path / 'y.arrow', file)
            assert read_pa(tmp_path / 'y.arrow', file)['d'].to_pylist() == ['a', 'b', 'c', None, 'z'] == list(load_dataset(tmp_path / 'y.arrow').shuffle(1).select([4, 0, 3, 1, 2]).filter(lambda r: True)['d']) or True
            assert sorted(map(str, load_dataset(tmp_path / 'y.arrow').shuffle(1)['d'])) == ['None', 'a', 'b', 'c', 'z']


def seeds_for_fuzz():
    """Valid files of all sorts of columns, small, both formats, some of pyarrow's making."""
    r, out = random.Random(5), []
    kinds = [*LEAVES, pa.list_(pa.int64()), pa.large_list(pa.string()), pa.list_(pa.float32(), 2), pa.struct([('a', pa.string()), ('b', pa.null())]), pa.map_(pa.string(), pa.int8()),
             pa.dictionary(pa.int8(), pa.string()), pa.list_(pa.struct([('role', pa.string()), ('content', pa.string())])), pa.list_(pa.null()), pa.struct([])]
    for k in range(24):
        t = pa.table({f'c{i}': pa.array([value(x, r) for _ in range(5)], x) for i, x in enumerate(r.sample(kinds, r.randrange(1, 5)))})
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


def fuzz(tmp_path, count, seed, monkeypatch):
    """count mutated inputs, streams and files, every third in a folder of save_to_disk whose state.json is mutated too now and then: each is
    the one error type, or a table that can be read to its end; none slow, none large."""
    folder = tmp_path / 'folder'
    Dataset.from_dict({'a': [1]}).save_to_disk(folder)
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
        data = r.choice(files) if broken else mutate(r.choice(files), r)
        f.seek(0)
        f.truncate()
        f.write(data)
        f.flush()
        if k % 9 < 2:
            (folder / 'state.json').write_bytes(mutate(state, r) if broken else state)
        monkeypatch.setattr(A, '_DEEP', 2**30 if k % 2 else 0)  # checked when opened, or batch by batch
        start = time.process_time()
        try:
            ds = load_dataset(path if k % 3 else folder)
            for block in ds.iter(4096):
                assert len({len(v) for v in block.values()}) <= 1
            read += 1
        except ArrowError as e:
            assert '\n' not in str(e)
        slowest = max(slowest, time.process_time() - start)
    assert 0.02 < read / count < 0.9, read
    assert slowest < 5, slowest
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000, 'a memory bomb'
    return read, slowest


def test_mutated_files(tmp_path, monkeypatch):
    fuzz(tmp_path, 4000, 1, monkeypatch)


@pytest.mark.slow
def test_100_000_mutated_files(tmp_path, monkeypatch):
    print(fuzz(tmp_path, 100_000, 2, monkeypatch))


def test_what_a_corrupt_value_does_and_when(tmp_path, monkeypatch):
    """Cut files and false lengths: when opened. Falling offsets and indices without a word: when opened, or at first use in a large file. Bad
    UTF-8: when that value is read, and not before. Always ArrowError."""
    ds = Dataset.from_dict({'s': ['abcd', 'efgh', 'ijkl'], 'd': ['x', 'y', 'x']}, {'d': Type('dictionary', ('int8', False), (Field('', Type('string')),))})
    ds.to_arrow(tmp_path / 'x.arrow')
    good = (tmp_path / 'x.arrow').read_bytes()
    falling, index = good.replace(np.array([0, 4, 8, 12], 'i4').tobytes(), np.array([0, 8, 4, 12], 'i4').tobytes()), good.replace(b'\0\1\0' + bytes(61), b'\0\5\0' + bytes(61))
    beyond = good.replace(np.array([0, 4, 8, 12], 'i4').tobytes(), np.array([0, 4, 8, 130], 'i4').tobytes())
    assert good not in (falling, index, beyond) and good.count(b'efgh') == 1

    def write(data):
        (tmp_path / 'x.arrow').write_bytes(data)
        return tmp_path / 'x.arrow'
    for data in (good[:-70], good[:100], falling, index, beyond):
        with pytest.raises(ArrowError, match='x.arrow'):
            load_dataset(write(data))
    ds = load_dataset(write(good.replace(b'efgh', b'e\xff\xffh')))
    assert ds[0]['s'] == 'abcd' and ds[2] == {'s': 'ijkl', 'd': 'x'}
    for use in (lambda: ds[1], lambda: ds[:2], lambda: list(ds), lambda: list(ds.shuffle(0)), lambda: ds.to_json(tmp_path / 'y.jsonl')):
        with pytest.raises(ArrowError, match='not UTF-8'):
            use()
    code, _, err = run('lint', tmp_path / 'x.arrow')
    assert code == 2 and 'x.arrow: corrupt: text' in err
    monkeypatch.setattr(A, '_DEEP', 0)  # as in a large file
    with pytest.raises(ArrowError, match='x.arrow: corrupt or cut off'):
        load_dataset(write(good[:-70]))
    for data in (falling, index, beyond):
        for use in (lambda d: d[0], lambda d: d[:2], lambda d: list(d.shuffle(0)), lambda d: d.save_to_disk(tmp_path / 'y'), lambda d: list(D.concatenate([d, d]))):
            ds = load_dataset(write(data))
            with pytest.raises(ArrowError, match='offsets|dictionary'):
                use(ds)
    nodes = np.array([3, 0, 3, 0], 'i8').tobytes()  # lengths and null counts of the two columns: found at first use, with the file's name
    assert good.count(nodes) == 1
    ds = load_dataset(write(good.replace(nodes, np.array([9, 0, 3, 0], 'i8').tobytes())))
    with pytest.raises(ArrowError, match='x.arrow: corrupt: '):
        ds[0]


BOMBS = {'a list of 2^31 nulls in one row': lambda: Dataset.from_dict({'x': [[None] * 3]}), 'rows of nothing': lambda: Dataset.from_dict({'x': [None] * 3})}


def test_memory_bombs(tmp_path):
    """A length field alone may not fill the memory: raised to 2^31 wherever it stands, the file is refused, fast."""
    for make in BOMBS.values():
        make().to_arrow(tmp_path / 'x.arrow')
        good = (tmp_path / 'x.arrow').read_bytes()
        for width in (4, 8):
            data = good.replace((3).to_bytes(width, 'little'), (2**31 - 1).to_bytes(width, 'little'))
            (tmp_path / 'x.arrow').write_bytes(data)
            with pytest.raises(ArrowError):
                list(load_dataset(tmp_path / 'x.arrow'))


def test_a_type_tree_that_shares_its_branches(tmp_path):
    """64 levels of a struct whose two children are one and the same table: 2^64 fields in 4 KB of metadata."""
    leaf = [b'x', ('B', 1), ('B', 1), [], None, ()]
    out = bytearray(4)

    def put(level):  # children before parents is not possible with forward references: a chain of structs, each vector with one reference twice
        pos = A._put(out, [b'x', ('B', 1), ('B', 13), [], None, ([], []) if level else ()])
        return pos
    first = put(1)
    pos = first
    for level in range(63):
        table = A._Table(bytes(out), pos, [10**9])
        start, n = table.vec(5, 4)
        pos = put(level < 62)
        for at in range(start, start + 4 * n, 4):
            out[at:at + 4] = (pos - at).to_bytes(4, 'little')
    start = time.process_time()
    with pytest.raises(ArrowError):
        A._type_in(A._Table(bytes(out), first, [4 * len(out)]), (0,), {})
    assert time.process_time() - start < 1 and leaf


def test_larger_than_the_memory_it_may_have(tmp_path):
    """Address space for 100 MB more than Python and torch take, a file of 400 MB: opened, iterated, read at random, filtered, saved."""
    x = np.arange(12_500_000)
    parts = [Dataset.from_dict({'x': x[i:i + 250_000], 'y': -x[i:i + 250_000], 'z': x[i:i + 250_000], 'w': x[i:i + 250_000]}) for i in range(0, len(x), 250_000)]
    D.concatenate(parts).to_arrow(tmp_path / 'big.arrow')
    assert os.path.getsize(tmp_path / 'big.arrow') > 400e6
    code = f"""
import resource, sys
sys.path.insert(0, {ROOT!r})
import numpy as np
from dataset import load_dataset
now = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 100_000_000,) * 2)
ds = load_dataset({str(tmp_path / 'big.arrow')!r})
total = sum(sum(b['x']) for b in ds.select(range(0, len(ds), 50)).iter(10000))
seen = sum(len(b['x']) for b in ds.select(range(10_000_000, 12_500_000)).iter(20000))
assert ds[12_345_678] == dict(x=12_345_678, y=-12_345_678, z=12_345_678, w=12_345_678) and ds.select([7, 9_999_999, 8])['y'] == [-7, -9_999_999, -8]
print(len(ds), total, seen)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ['12500000', str(int(x[::50].sum())), '2500000']


@pytest.mark.slow
def test_memory_of_loading_is_bounded(tmp_path):
    """40 MB of JSON lines, spilled from the first byte on: the process grows by the blocks in flight, not by the file."""
    line = json.dumps({'prompt': 'p' * 300, 'chosen': 'é' * 300, 'n': 1}) + '\n'
    for name, text in (('x.jsonl', line * 20_000), ('x.json', '[' + ','.join([line] * 20_000) + ']')):
        (tmp_path / name).write_text(text)
        code = f"""
import sys
sys.path.insert(0, {ROOT!r})
import dataset
dataset._SPILL = 0
def anonymous():
    return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1]) / 1024
before, seen, add = anonymous(), [], dataset._Sink.flush
def flush(self):
    add(self)
    seen.append(anonymous() - before)
dataset._Sink.flush = flush
ds = dataset.load_dataset({str(tmp_path / name)!r})
assert len(ds) == 20_000 and ds[19_999]['chosen'] == 'é' * 300 and sum(len(b['n']) for b in ds.iter(500)) == 20_000
print(max(seen), anonymous() - before, len(seen))
"""
        done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        top, after, batches = map(float, done.stdout.split())
        assert batches >= 4 and max(top, after) < 45, done.stdout


# --- training side ---

def test_pad():
    idx, mask = D.pad([[5, 6], [], np.array([7])], value=9)
    assert idx.tolist() == [[5, 6], [9, 9], [7, 9]] and mask.tolist() == [[True, True], [False, False], [True, False]] and idx.dtype == torch.int64 and mask.dtype == torch.bool
    idx, mask = D.pad([[5, 6], [7]], side='left')
    assert idx.tolist() == [[5, 6], [0, 7]] and mask.tolist() == [[True, True], [False, True]]
    assert D.pad([[0.5], [1, 2]], 0.0)[0].dtype == torch.float32 and D.pad([[True], []], False)[0].tolist() == [[True], [False]]
    assert D.pad([])[0].shape == (0, 0)
    with pytest.raises(ValueError, match="side 'up'"):
        D.pad([[1]], side='up')


def test_pack_against_brute_force():
    r = random.Random(0)
    for _ in range(300):
        lengths, capacity = [r.randrange(0, 9) for _ in range(r.randrange(0, 7))], 10
        bins = D.pack(lengths, capacity)
        assert sorted(i for b in bins for i in b) == list(range(len(lengths))) and all(sum(lengths[i] for i in b) <= capacity for b in bins)
        full = [i for i in range(len(lengths)) if lengths[i]]
        best = next(k for k in range(len(full) + 1) if not full or any(all(sum(lengths[i] for i, w in zip(full, where) if w == b) <= capacity for b in range(k))
                    for where in itertools.product(range(k), repeat=len(full))))
        assert best <= len([b for b in bins if any(lengths[i] for i in b)]) <= 11 / 9 * best + 1
    lengths = np.random.default_rng(0).integers(1, 1000, 20_000)
    start = time.process_time()
    bins = D.pack(lengths, 1024)
    assert time.process_time() - start < 2 and lengths.sum() / (len(bins) * 1024) > 0.97
    with pytest.raises(ValueError, match='sequence 1 has 11 tokens, more than the capacity 10'):
        D.pack([3, 11, 12], 10)


def test_collate_packed_against_a_loop():
    r = random.Random(1)
    for _ in range(100):
        seqs = [[r.randrange(1, 99) for _ in range(r.randrange(0, 8))] for _ in range(r.randrange(0, 9))]
        trained = [[r.random() < 0.5 for _ in s] for s in seqs]
        bins = D.pack(list(map(len, seqs)), 12)
        got = D.collate_packed([np.array(s, np.int32) if r.random() < 0.5 else s for s in seqs], trained, bins, 12)
        for row, b in enumerate(bins):
            ids = [t for i in b for t in seqs[i]]
            doc = [k for k, i in enumerate(b) for _ in seqs[i]]
            on = [m for i in b for m in trained[i]]
            targets = [ids[t + 1] if t + 1 < len(ids) and doc[t] == doc[t + 1] and on[t + 1] else -1 for t in range(len(ids))]
            tail = 12 - len(ids)
            assert got['idx'][row].tolist() == ids + [0] * tail and got['targets'][row].tolist() == targets + [-1] * tail and got['doc'][row].tolist() == doc + [len(b)] * tail
        assert got['idx'].shape == (len(bins), 12) and {v.dtype for v in got.values()} == {torch.int64}
    with pytest.raises(ValueError, match='bin 0 holds 3 tokens'):
        D.collate_packed([[1, 2, 3]], [[True] * 3], [[0]], 2)
    with pytest.raises(ValueError, match='sequence 0 has 3 tokens and 2 mask entries'):
        D.collate_packed([[1, 2, 3]], [[True] * 2], [[0]], 4)


def test_packed_documents_do_not_see_each_other():
    """The tokens that packing puts next to a document change nothing of what is learned from it: the same targets as alone."""
    seqs, on = [[3, 4, 5], [6, 7], [8, 9, 10, 11]], [[False, True, True], [True, True], [False, False, True, True]]
    packed = D.collate_packed(seqs, on, D.pack([3, 2, 4], 9), 9)
    pairs = sorted((int(a), int(b)) for a, b in zip(packed['idx'].flatten(), packed['targets'].flatten()) if b != -1)
    assert pairs == sorted((s[t], s[t + 1]) for s, m in zip(seqs, on) for t in range(len(s) - 1) if m[t + 1])


def test_sampler_order():
    batches = list(itertools.islice(Sampler(10, 4, seed=3), 10))  # four epochs of 10 in 10 batches of 4
    flat = np.concatenate(batches)
    for e in range(4):
        assert flat[e * 10:e * 10 + 10].tolist() == np.random.default_rng((3, e)).permutation(10).tolist()
    assert batches[0].dtype == np.int64
    for world in (1, 2, 4):  # one global order in each layout
        ranks = [list(itertools.islice(Sampler(10, 4, seed=3, rank=r, world=world), 10)) for r in range(world)]
        assert [np.concatenate(parts).tolist() for parts in zip(*ranks)] == [b.tolist() for b in batches]
    assert np.concatenate(list(itertools.islice(Sampler(3, 8, seed=0, shuffle=False), 2))).tolist() == [0, 1, 2] * 5 + [0]
    lengths = np.random.default_rng(0).integers(1, 1000, 640)
    order = list(itertools.islice(Sampler(640, 8, seed=1, lengths=lengths, bucket=20), 80))
    assert sorted(np.concatenate(order).tolist()) == list(range(640))
    padded = lambda batches: sum(lengths[b].max() * len(b) for b in batches) / lengths.sum()
    assert padded(order) < 1.15 < 1.5 < padded(list(itertools.islice(Sampler(640, 8, seed=1), 80)))
    tops = [lengths[b].max() for b in order[:20]]
    assert tops != sorted(tops)  # short and long batches come mixed
    for args, message in (((0, 4, 0), '0 rows'), ((10, 3, 0, True, 0, 2), 'does not divide'), ((10, 2, 0, True, 0, 1, [1] * 9, 4), 'needs the lengths')):
        with pytest.raises(ValueError, match=message):
            Sampler(*args)


@pytest.mark.parametrize('options', [{}, {'lengths': list(range(37)), 'bucket': 3}, {'shuffle': False}])
def test_sampler_resumes_exactly(options):
    for stop in (0, 1, 5, 11, 12, 40):
        a = Sampler(37, 4, seed=5, **options)
        for _ in range(stop):
            next(a)
        state = json.loads(json.dumps(a.state_dict()))
        b = Sampler(37, 4, seed=5, rank=1, world=2, **options)
        b.load_state_dict(state)
        for _ in range(30):
            assert next(a)[2:].tolist() == next(b).tolist()
    with pytest.raises(ValueError, match='saved with n 37, this run has 36'):
        Sampler(36, 4, seed=5).load_state_dict(Sampler(37, 4, seed=5).state_dict())


def test_prefetch():
    import threading
    sampler, plain = Sampler(100, 4, seed=0), Sampler(100, 4, seed=0)
    with D.prefetch((i * 2 for i in sampler), depth=3, sampler=sampler) as batches:
        for _ in range(5):
            assert (next(batches) == next(plain) * 2).all() and batches.state_dict() == plain.state_dict()
        time.sleep(0.05)
        assert sampler.batch > plain.batch and batches.state_dict() == plain.state_dict()  # ahead, but the state is of what was consumed
        resumed = Sampler(100, 4, seed=0)
        resumed.load_state_dict(batches.state_dict())
        assert (next(batches) == next(resumed) * 2).all()
    assert list(D.prefetch(iter(range(5)))) == [0, 1, 2, 3, 4]
    closed = []

    def broken():
        try:
            yield 1
            raise KeyError('in the thread')
        finally:
            closed.append(1)
    it = D.prefetch(broken())
    assert next(it) == 1
    with pytest.raises(KeyError, match='in the thread'):
        next(it)
    assert list(it) == [] and closed == [1]
    before, it = threading.active_count(), D.prefetch(itertools.count())
    next(it)
    thread = it._thread
    del it
    thread.join(5)
    assert not thread.is_alive() and threading.active_count() <= before


# --- linter and command line ---

def run(*words):
    """(exit code, what was printed, error line) of `python dataset.py words`, in this process: see command() for the real one."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            return L._main(list(map(str, words))), out.getvalue(), ''
    except ValueError as e:
        return 2, out.getvalue(), str(e)


def command(*words):
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'data', 'lint.py'), *map(str, words)], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_lint_and_head(tmp_path):
    good = [{'prompt': f'Q{i} ', 'chosen': 'yes, ' + 'x' * (i % 2), 'rejected': 'no' + 'x' * (i % 3)} for i in range(30)]
    bad = good + [{'prompt': 'Q ', 'chosen': 'same', 'rejected': 'same'}, good[3], {'prompt': 'Q ', 'chosen': 'a' * 300, 'rejected': 'b'}]
    for name, rows in (('good', good), ('bad', bad), ('test', [{'prompt': 'Q7 ', 'chosen': 'a', 'rejected': 'b'}])):
        Dataset.from_list(rows).to_json(tmp_path / f'{name}.jsonl')
    code, out, _ = run('lint', tmp_path / 'bad.jsonl', '--tokenizer=byte', '--max_len=100', f'--test={tmp_path / "test.jsonl"}')
    assert code == 1 and 'chosen == rejected: 1 row (30)' in out and 'duplicates: 1 row (31) repeat' in out and 'cut answers: 1 row (32)' in out
    assert 'train/test overlap: 1 row (7)' in out and 'length bias: chosen' in out
    code, out, _ = command('head', tmp_path / 'bad.jsonl', 2)
    assert code == 0 and out.startswith('Dataset of 33 rows: prompt string') and out.count('---') == 2 and 'chosen: yes, x' in out
    Dataset.from_list([{'messages': [{'role': 'user', 'content': 'x'}]}, {'messages': [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': 'y'}]}]).to_json(tmp_path / 'm.jsonl')
    code, out, _ = run('lint', tmp_path / 'm.jsonl', '--tokenizer=byte')
    assert code == 1 and ('nothing to train on: 1 row (0)' in out or 'unreadable: 1 row (0)' in out)
    code, out, _ = run('lint', tmp_path / 'test.jsonl', '--tokenizer=byte')
    assert code == 0 and '0 faults' in out
    Dataset.from_list([{'prompt': 'Q' * (1 + 50 * (i == 3)), 'answer': i} for i in range(9)]).to_json(tmp_path / 'asked.jsonl')  # rows for PPO and GRPO
    code, out, _ = run('lint', tmp_path / 'asked.jsonl', '--tokenizer=byte', '--max_len=40')
    assert code == 1 and 'long prompts: 1 row (3)' in out and 'tokens a prompt: median 1, ' in out and out.count('FAULT') == 1
    Dataset.from_list([{'prompt': 'Q', 'chosen': c, 'rejected': r} for c, r in (('a', 'a'), ('', 'b'), ('x', ' '), ('m', 'n'))]).to_json(tmp_path / 'odd.jsonl')
    code, out, _ = run('lint', tmp_path / 'odd.jsonl', '--tokenizer=byte')  # each reason once, an equal pair is no second fault
    assert "unreadable: 2 rows (1, 2): empty completion: 'chosen' says nothing" in out and 'chosen == rejected: 1 row (0)' in out and '2 faults' in out
    code, out, _ = run('head', tmp_path / 'm.jsonl')
    assert code == 0 and 'messages | user: x\nmessages | assistant: y\n' in out
    for words in ((), ('head',), ('head', tmp_path / 'm.jsonl', 'x'), ('lint', tmp_path / 'm.jsonl', '--tokenizr=byte'), ('lint', tmp_path / 'm.jsonl', '--max_len=x')):
        code, _, err = run(*words)
        assert code == 2 and err.startswith('usage: python data/lint.py')
    assert run('lint', tmp_path / 'good.jsonl', f'--test={tmp_path / "m.jsonl"}')[2] == 'the test set has no column prompt to look for: it has messages'
    code, out, err = command('lint', tmp_path / 'none')
    assert code == 2 and err.startswith('error: ') and err.endswith('none: no such file\n') and err.count('\n') == 1
