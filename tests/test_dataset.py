"""dataset.py against HF datasets and plain Python: loading, verbs, files; order, packing and padding against enumeration; the linter."""
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import random
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import arrow
import dataset as D
from data import lint as L
from dataset import Dataset, Sampler, load_dataset

pa = pytest.importorskip('pyarrow')
pq = pytest.importorskip('pyarrow.parquet')
from hypothesis import HealthCheck, given, settings, strategies as st

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
TEXT = st.text(st.characters(codec='utf-8'), max_size=4)
JSONS = st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT, lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3), max_leaves=8)


# --- loading ---

@QUICK
@given(rows=st.lists(st.dictionaries(st.sampled_from('abc'), JSONS, max_size=3), min_size=1, max_size=6), form=st.sampled_from(['jsonl', 'json', 'gz']))
def test_json_comes_back_as_it_was_written(rows, form, tmp_path_factory):
    """Missing keys are None and, on the first level, ints among floats are floats; all else is as json.loads gives it, keys in their order."""
    path = str(tmp_path_factory.getbasetemp() / f'x.{"jsonl.gz" if form == "gz" else form}')
    text = json.dumps(rows, indent=random.Random(len(rows)).choice([None, 1])) if form == 'json' else ''.join(json.dumps(r, ensure_ascii=False) + '\n' for r in rows)
    with (gzip.open if form == 'gz' else open)(path, 'wb') as f:
        f.write(text.encode())
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns, mixed = {name: [row.get(name) for row in rows] for name in names}, []
    for name, values in columns.items():
        types = {type(v) for v in values if v is not None}
        if types == {int, float}:
            columns[name] = [float(v) if type(v) is int else v for v in values]
        if len(types) > 1 and types != {int, float} or types == {int} and not all(-2**63 <= v < 2**63 for v in values if v is not None):
            mixed.append(name)
    if mixed:
        with pytest.raises(ValueError, match="column '(" + '|'.join(mixed) + ')'):
            load_dataset(path)
    else:
        assert json.dumps(list(load_dataset(path))) == json.dumps([dict(zip(names, row)) for row in zip(*columns.values())] if names else rows)


def test_types_meet_across_blocks(tmp_path, monkeypatch):
    """Null first, then ints, then floats; keys that come late; nested keys that differ: each block has another type."""
    rows = [{'a': None if i < 50 else i if i < 100 else i + 0.5, 'l': [] if i < 70 else [{'k': 'x'}] if i < 110 else [{'j': i}, None], **({'late': 'é'} if i > 120 else {})} for i in range(150)]
    path = tmp_path / 'x.jsonl'
    path.write_text(''.join(json.dumps(r) + '\n' for r in rows))
    monkeypatch.setattr(D, 'BLOCK', 200)
    want = [{'a': r['a'], 'l': r['l'], 'late': r.get('late')} for r in rows]
    ds, order = load_dataset(path), np.random.default_rng(0).permutation(150)
    assert list(ds) == want and len(ds.batches) > 5
    assert [ds[i] for i in (149, 0, 60)] == [want[i] for i in (149, 0, 60)]
    assert ds.shuffle(0)[3:9]['a'] == [want[i]['a'] for i in order[3:9]]


def test_lines_in_blocks_of_a_file(tmp_path, monkeypatch):
    """Each line once, whatever the block: a byte order mark, CRLF, blank lines, a line longer than many blocks; gzip is known by its bytes."""
    r, rows, text = random.Random(2), [], '\ufeff'
    for i in range(300):
        rows.append({'i': i, 't': 'xé漢😀\n'[i % 5] * (5000 if i == 150 else r.randrange(20))})
        text += ' ' * (i % 7 == 0) + json.dumps(rows[-1], ensure_ascii=i % 3 == 0) + r.choice(['\n', '\r\n', '\n\n', '\n \n']) * (i < 299)
    (tmp_path / 'x.jsonl').write_bytes(text.encode())
    for name in ('x.jsonl.gz', 'zipped.jsonl'):
        (tmp_path / name).write_bytes(gzip.compress(text.encode()))
    for block in (1, 500):
        monkeypatch.setattr(D, 'BLOCK', block)
        assert all(list(load_dataset(tmp_path / name)) == rows for name in ('x.jsonl', 'x.jsonl.gz', 'zipped.jsonl'))


BAD = [('{"a": 1}\n{"a": 2\n', 'x.jsonl:2:8: '), ('{"a": 1}\n\n[1]\n', 'x.jsonl:3:1: expected an object'), ('{"a": 1}\n{"a": "x"}\n', "x.jsonl:2: column 'a': mixed types: "),
       ('{"a": 18446744073709551616}\n', 'x.jsonl:1: column .a.: an integer beyond'),
       ('{"a": "\\ud800"}\n', 'x.jsonl:1: column .a.: text with a lone surrogate'), ('', 'x.jsonl: the file is empty'), ('\n \n', 'x.jsonl: the file is without rows'),
       ('{"a": 1\n"b": 2}\n{},{}\n', 'x.jsonl:1:8: '), ('[{"a": 1},\n {"a": }]', 'x.jsonl:2:8: '), ('[{"a": 1}', 'x.jsonl:1:10: '),
       ('[{"a": 1}] x', 'x.jsonl:1:12: Extra data'), ('[{"a": 1}, 3]', 'x.jsonl: item 2 of the list: expected an object'), ('[{"a": 1},]', 'x.jsonl:1:1'),
       ('[{"a":1},\n{"a":"x"}]', "x.jsonl: item 2 of the list: column 'a': mixed"), ('{"a": 1}\n{\n"a": 1}\n', 'x.jsonl:2:2: .*expected one JSON object a line'), ('hello', 'x.jsonl:1:1: '), (b'{"a": "\xff"}\n', 'x.jsonl:1:8: not UTF-8'),
       (b'{"a": 1}\n{"a": "\xff"}\n', 'x.jsonl:2:8: not UTF-8'), ('{"a":' * 100000, 'x.jsonl:1: '), ('[' * 100000, 'x.jsonl: ')]


@pytest.mark.parametrize('text,message', BAD)
def test_errors_name_file_line_and_column(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    with open('x.jsonl', 'wb') as f:
        f.write(text if isinstance(text, bytes) else text.encode())
    for block in (1 << 20, 7):
        monkeypatch.setattr(D, 'BLOCK', block)
        with pytest.raises(ValueError, match=message) as e:
            load_dataset('x.jsonl')
        assert '\n' not in str(e.value) and len(str(e.value)) < 300


def test_the_row_of_the_file_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, n in (('a.jsonl', 100), ('b.jsonl', 50)):
        (tmp_path / name).write_text(''.join(json.dumps({'i': f'{name}, row {i + 1}'}) + '\n' for i in range(n)))
    both = load_dataset(['a.jsonl', 'b.jsonl'])
    for rows in (both, both.shuffle(3), both.train_test_split(0.1, seed=1)['test'], D.concatenate([both.shuffle(1), both])):
        assert [D.place(rows, i, 'x') for i in range(len(rows))] == list(rows['i'])
    assert D.place([{}], 0, 'x') == D.place(Dataset.from_list([{}]), 0, 'x') == 'x, row 1'


def test_csv_is_text(tmp_path):
    """Digits stay what they are (02134 is a post code); an empty field is null; quotes and lines in a field."""
    (tmp_path / 'a.csv').write_text('zip,n,z\n02134,9223372036854775808,"a ""q"", b"\n00501,1e5,"two\nlines"\n,,\n')
    rows = [{'zip': '02134', 'n': '9223372036854775808', 'z': 'a "q", b'}, {'zip': '00501', 'n': '1e5', 'z': 'two\nlines'}, dict.fromkeys(('zip', 'n', 'z'))]
    assert list(load_dataset(tmp_path / 'a.csv')) == rows
    with gzip.open(tmp_path / 't.tsv.gz', 'wt', newline='') as f:
        csv.writer(f, delimiter='\t').writerows([list(rows[0]), *(row.values() for row in rows)])
    assert list(load_dataset([tmp_path / 't.tsv.gz', tmp_path / 'a.csv'])) == rows * 2


def test_folders_and_globs_of_shards(tmp_path):
    rows = [{'messages': [{'role': 'user', 'content': str(i)}], 'f': i / 2} for i in range(10)]
    (tmp_path / 'set').mkdir()
    for k in range(2):
        pq.write_table(pa.Table.from_pylist(rows[5 * k:5 * k + 5]), tmp_path / 'set' / f'train-{k:05d}-of-00002.parquet')
    for path in (tmp_path / 'set', tmp_path / 'set' / 'train-*.parquet', sorted((tmp_path / 'set').iterdir())):
        assert list(load_dataset(path)) == rows
    Dataset.from_list(rows).to_json(tmp_path / 'set' / 'test-00000-of-00001.jsonl')
    with pytest.raises(ValueError, match='holds the splits test, train: give one of them'):
        load_dataset(tmp_path / 'set')
    categories = pa.table({'c': pa.array(['x', 'y', 'x']).dictionary_encode(), 'f': pa.array([1, 2, None], pa.float32())})
    pq.write_table(categories, tmp_path / 'pandas.parquet')
    assert list(load_dataset(tmp_path / 'pandas.parquet')) == categories.to_pylist()


def test_empty_sets_and_empty_rows(tmp_path):
    hf = pytest.importorskip('datasets')
    (tmp_path / 'x.jsonl').write_text('{}\n{}\n')
    ds = load_dataset(tmp_path / 'x.jsonl')
    assert len(ds) == 2 and list(ds) == [{}, {}] == [ds[0], ds[1]]
    hf.Dataset.from_dict({'a': []}).save_to_disk(tmp_path / 'hf')
    Dataset.from_list([{'a': 1}]).select([]).save_to_disk(tmp_path / 'ours')
    assert list(load_dataset(tmp_path / 'hf')) == list(load_dataset(tmp_path / 'ours')) == [] == list(hf.load_from_disk(tmp_path / 'ours'))


def test_other_inputs_and_their_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open('r.csv', 'w', encoding='utf-8').write('a,b\n1,2\n3\n')
    open('junk.bin', 'wb').write(b'\x01\x02junk')
    open('a.jsonl', 'w', encoding='utf-8').write('{"a": 1}\n')
    open('b.jsonl', 'w', encoding='utf-8').write('{"a": "x"}\n')
    open('cut.jsonl.gz', 'wb').write(gzip.compress(b'{"a": 1}\n' * 1000)[:40])
    open('not.parquet', 'w', encoding='utf-8').write('PAR1 not')
    os.mkdir('folder')
    for path, message in (('none.jsonl', 'none.jsonl: no such file'), ('r.csv', 'r.csv:3: 1 fields'), ('junk.bin', 'not one of .jsonl'), ('folder', 'without data files'), ('*.tsv', 'no file matches'),
                          (['a.jsonl', 'b.jsonl'], "b.jsonl: column 'a': mixed types: int64 and string"), ('cut.jsonl.gz', 'cut.jsonl.gz: corrupt gzip'), ('not.parquet', 'not.parquet: '), ([], 'no files')):
        with pytest.raises(ValueError, match=message):
            load_dataset(path)
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(ValueError, match='pip install pyarrow'):
        load_dataset('not.parquet')


# --- HF datasets ---

def test_hf_datasets_both_ways(tmp_path):
    hf = pytest.importorskip('datasets')
    hf.disable_progress_bars()
    calls = [{'messages': [{'role': 'user', 'content': 'q'}, {'role': 'assistant', 'content': None, 'tool_calls': [{'function': {'name': 'w', 'arguments': a}}]}]} for a in ({'a': 2, 'u': None}, {'city': 1.5})]
    rows = [{'text': f'é{i}', 'label': i % 2, 'w': [i / 2, 0.5], **calls[i % 2]} for i in range(50)]
    features = hf.Features({'text': hf.Value('string'), 'label': hf.ClassLabel(names=['neg', 'pos']), 'w': hf.List(hf.Value('float32')), 'messages': hf.List(hf.Json())})
    theirs = hf.Dataset.from_list(rows, features=features)
    theirs.save_to_disk(tmp_path / 'hf', num_shards=3)
    theirs.to_parquet(tmp_path / 'hf.parquet')
    mine = load_dataset(tmp_path / 'hf')
    assert json.dumps(list(mine)) == json.dumps(rows) == json.dumps(list(load_dataset(tmp_path / 'hf.parquet')))  # keys in their order
    cut = mine.rename_column('label', 'y').remove_columns('w').shuffle(3).select(range(40))
    cut.save_to_disk(tmp_path / 'ours')
    back = hf.load_from_disk(tmp_path / 'ours')
    assert list(back) == list(cut) == list(load_dataset(tmp_path / 'ours')) and back.features['y'] == features['label'] and back.features['messages'] == features['messages']
    with pytest.raises(ValueError, match='exists'):
        cut.save_to_disk(tmp_path / 'ours')
    Dataset.from_list(rows).to_json(tmp_path / 'x.jsonl')
    from_json = hf.load_dataset('json', data_files=str(tmp_path / 'x.jsonl'), split='train', cache_dir=str(tmp_path / 'cache'))
    assert list(from_json) == list(load_dataset(tmp_path / 'x.jsonl')) == rows
    mine.to_arrow(tmp_path / 'one.arrow')
    assert list(hf.Dataset.from_file(str(tmp_path / 'one.arrow'))) == rows
    for seed in (0, 7):  # the same permutation and split for the same seed
        assert list(theirs.shuffle(seed=seed)) == list(mine.shuffle(seed=seed))
        a, b = theirs.train_test_split(test_size=0.13, seed=seed), mine.train_test_split(test_size=0.13, seed=seed)
        assert list(a['train']) == list(b['train']) and list(a['test']) == list(b['test'])
    both = [d.map(lambda b: {'n': [len(t) for t in b['text']], 'w': b['w']}, batched=True, batch_size=7, remove_columns=['messages']) for d in (theirs, mine)]
    assert list(both[0]) == list(both[1])
    both = [d.map(lambda r: {'n': len(r['text'])}, remove_columns='text') for d in (theirs, mine)]
    assert list(both[0]) == list(both[1])
    hf.DatasetDict({'train': theirs, 'test': theirs}).save_to_disk(tmp_path / 'splits')
    with pytest.raises(ValueError, match='holds the splits test, train'):
        load_dataset(tmp_path / 'splits')
    assert len(load_dataset(tmp_path / 'splits' / 'test')) == 50
    for function, message in ((lambda r: 5, 'returned int'), (lambda r: {'text': 'x' if r['label'] else 3}, 'map, row 1: ')):
        with pytest.raises(ValueError, match=message):
            mine.map(function)


# --- verbs ---

def test_numpy_views_copy_nothing(tmp_path):
    Dataset.from_list([{'x': i / 2, 'b': i % 3 == 0, 's': 'x'} for i in range(1000)]).to_arrow(tmp_path / 'x.arrow')
    ds = load_dataset(tmp_path / 'x.arrow')
    view = ds['x'].numpy()
    assert np.shares_memory(view, ds.select(range(10, 900))['x'].numpy()) and view.ctypes.data % 64 == 0 and not view.flags.writeable
    assert (ds.select(range(10, 900))['x'].numpy() == np.arange(10, 900) / 2).all() and ds['b'].numpy().sum() == 334
    assert (ds.shuffle(0)['x'].numpy() == np.random.default_rng(0).permutation(1000) / 2).all() and (D.concatenate([ds, ds])['x'].numpy() == [*view, *view]).all()
    for column, message in ((ds['s'], 'no numpy view'), (Dataset.from_list([{'a': 1}, {'a': None}])['a'], 'has nulls')):
        with pytest.raises(ValueError, match=message):
            column.numpy()


def table(n=100):
    return Dataset.from_list([{'i': i, 's': f's{i}', 'l': list(range(i % 4))} for i in range(n)])


def test_verbs():
    ds, rows = table(), list(table())
    assert len(ds) == ds.num_rows == 100 and ds.column_names == ['i', 's', 'l'] and ds[-1] == rows[-1]
    assert ds[3:6] == {'i': [3, 4, 5], 's': ['s3', 's4', 's5'], 'l': [[0, 1, 2], [], [0]]} and ds[90:200]['i'] == list(range(90, 100)) and ds[::-40]['i'] == [99, 59, 19]
    assert ds[[7, -1, 7]]['i'] == [7, 99, 7] and ds[np.arange(100) > 97]['i'] == [98, 99] and ds['i'] == list(range(100)) and ds['s'][2:4] == ['s2', 's3']
    a = ds.select(range(50, 10, -5)).select([0, 2]).select(range(1, -1, -1))
    assert a['i'] == [40, 50] and ds.shuffle(1).shuffle(2)['i'] == [np.random.default_rng(1).permutation(100)[k] for k in np.random.default_rng(2).permutation(100)]
    assert list(ds.filter(lambda r: r['i'] % 2)) == rows[1::2]
    assert [len(b['i']) for b in ds.iter(30)] == [30, 30, 30, 10]
    both = D.concatenate([ds.select([5]), ds.remove_columns('l').rename_column('s', 't'), ds])
    assert both[0] == {**rows[5], 't': None} and both[6] == {'i': 5, 's': None, 'l': None, 't': 's5'} and len(both) == 201 and both[106]['s'] == 's5'
    parts = ds.train_test_split(0.2, shuffle=False)
    assert list(parts['train']) == rows[:80] and list(parts['test']) == rows[80:]
    for bad, kind in ((lambda: ds[100], IndexError), (lambda: ds[[0, 100]], IndexError), (lambda: ds['x'], KeyError), (lambda: ds.remove_columns('x'), ValueError),
                      (lambda: ds.train_test_split(1.0), ValueError), (lambda: ds.rename_column('i', 's'), ValueError), (lambda: ds[[0.5]], TypeError),
                      (lambda: Dataset.from_list([{'a': 1}, {'a': 'x'}]), ValueError),
                      (lambda: D.concatenate([ds, Dataset.from_list([{'i': 'x'}])]), ValueError)):
        with pytest.raises(kind):
            bad()


def test_to_json_round_trip(tmp_path):
    ds = Dataset.from_list([{'t': 'é\u2028\n"', 'n': None, 'm': [{'role': 'user', 'k': 1.5}]}, {'t': '', 'n': None, 'm': []}])
    for name in ('x.jsonl', 'x.jsonl.gz'):
        ds.to_json(tmp_path / name)
        assert list(load_dataset(tmp_path / name)) == list(ds)
    with pytest.raises(ValueError, match='JSON has no such type'):
        Dataset.from_list([{'b': b'x'}]).to_json(tmp_path / 'y.jsonl')
    assert sorted(os.listdir(tmp_path)) == ['x.jsonl', 'x.jsonl.gz']


def test_larger_than_the_memory_it_may_have(tmp_path):
    """Memory for 100 MB more than Python and torch take, a file of 400 MB: opened, iterated, read at random, filtered, saved."""
    x = np.arange(12_500_000)
    t = arrow.Type('struct', tuple(arrow.Field(name, arrow.Type('int64')) for name in 'xyzw'))
    with open(tmp_path / 'big.arrow', 'wb') as f:
        writer = arrow.Writer(f, t)
        for i in range(0, len(x), 250_000):
            part = x[i:i + 250_000]
            writer.write([arrow.Array(arrow.Type('int64'), len(part), data=values) for values in (part, -part, part, part)], len(part))
        writer.end()
    assert os.path.getsize(tmp_path / 'big.arrow') > 400e6
    code = f"""
import resource, sys
sys.path.insert(0, {ROOT!r})
import numpy as np
from dataset import load_dataset
now = int(next(line for line in open('/proc/self/status') if line.startswith('VmData')).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (now + 100_000_000,) * 2)
ds = load_dataset({str(tmp_path / 'big.arrow')!r})
total = sum(sum(b['x']) for b in ds.select(range(0, len(ds), 50)).iter(10000))
seen = sum(len(b['x']) for b in ds.select(range(10_000_000, 12_500_000)).iter(20000))
assert ds[12_345_678] == dict(x=12_345_678, y=-12_345_678, z=12_345_678, w=12_345_678) and ds.select([7, 9_999_999, 8])['y'] == [-7, -9_999_999, -8]
print(len(ds), total, seen)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == ['12500000', str(int(x[::50].sum())), '2500000']


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
    assert np.concatenate(list(itertools.islice(Sampler(3, 8, seed=0, shuffle=False), 2))).tolist() == [0, 1, 2] * 5 + [0]
    with pytest.raises(ValueError, match='0 rows'):
        Sampler(0, 4, 0)


@pytest.mark.parametrize('options', [{}, {'shuffle': False}])
def test_sampler_resumes_exactly(options):
    for stop in (0, 1, 5, 11, 12, 40):
        a = Sampler(37, 4, seed=5, **options)
        for _ in range(stop):
            next(a)
        state = json.loads(json.dumps(a.state_dict()))
        b = Sampler(37, 4, seed=5, **options)
        b.load_state_dict(state)
        for _ in range(30):
            assert next(a).tolist() == next(b).tolist()
    with pytest.raises(ValueError, match='saved with n 37, this run has 36'):
        Sampler(36, 4, seed=5).load_state_dict(Sampler(37, 4, seed=5).state_dict())


# --- linter ---

def run(*words):
    """(exit code, what was printed, error line) of `python data/lint.py words`, in this process: see command() for the real one."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            return L.main(list(map(str, words))), out.getvalue(), ''
    except ValueError as e:
        return 2, out.getvalue(), str(e)


def command(*words):
    done = subprocess.run([sys.executable, os.path.join(ROOT, 'data', 'lint.py'), *map(str, words)], capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout, done.stderr


def test_lint(tmp_path):
    good = [{'prompt': f'Q{i} ', 'chosen': 'yes, ' + 'x' * (i % 2), 'rejected': 'no' + 'x' * (i % 3)} for i in range(30)]
    bad = good + [{'prompt': 'Q ', 'chosen': 'same', 'rejected': 'same'}, good[3], {'prompt': 'Q ', 'chosen': 'a' * 300, 'rejected': 'b'}]
    for name, rows in (('good', good), ('bad', bad), ('test', [{'prompt': 'Q7 ', 'chosen': 'a', 'rejected': 'b'}])):
        Dataset.from_list(rows).to_json(tmp_path / f'{name}.jsonl')
    code, out, _ = run(tmp_path / 'bad.jsonl', '--tokenizer=byte', '--max_len=100', f'--test={tmp_path / "test.jsonl"}')
    assert code == 1 and 'chosen == rejected: 1 row (30)' in out and 'duplicates: 1 row (31) repeat' in out and 'cut answers: 1 row (32)' in out
    assert 'train/test overlap: 1 row (7)' in out and 'length bias: chosen' in out
    Dataset.from_list([{'messages': [{'role': 'user', 'content': 'x'}]}, {'messages': [{'role': 'user', 'content': 'x'}, {'role': 'assistant', 'content': 'y'}]}]).to_json(tmp_path / 'm.jsonl')
    code, out, _ = run(tmp_path / 'm.jsonl', '--tokenizer=byte')
    assert code == 1 and ('nothing to train on: 1 row (0)' in out or 'unreadable: 1 row (0)' in out)
    code, out, _ = run(tmp_path / 'test.jsonl', '--tokenizer=byte')
    assert code == 0 and '0 faults' in out
    Dataset.from_list([{'prompt': 'Q' * (1 + 50 * (i == 3)), 'answer': i} for i in range(9)]).to_json(tmp_path / 'asked.jsonl')  # rows for PPO and GRPO
    code, out, _ = run(tmp_path / 'asked.jsonl', '--tokenizer=byte', '--max_len=40')
    assert code == 1 and 'long prompts: 1 row (3)' in out and 'tokens a prompt: median 1, ' in out and out.count('FAULT') == 1
    Dataset.from_list([{'prompt': 'Q', 'chosen': c, 'rejected': r} for c, r in (('a', 'a'), ('', 'b'), ('x', ' '), ('m', 'n'))]).to_json(tmp_path / 'odd.jsonl')
    code, out, _ = run(tmp_path / 'odd.jsonl', '--tokenizer=byte')  # each reason once, an equal pair is no second fault
    assert "unreadable: 2 rows (1, 2): empty completion: 'chosen' says nothing" in out and 'chosen == rejected: 1 row (0)' in out and '2 faults' in out
    for words in ((), (tmp_path / 'm.jsonl', 'x'), (tmp_path / 'm.jsonl', '--tokenizr=byte'), (tmp_path / 'm.jsonl', '--max_len=x')):
        code, _, err = run(*words)
        assert code == 2 and err.startswith('usage: python data/lint.py')
    assert run(tmp_path / 'good.jsonl', f'--test={tmp_path / "m.jsonl"}')[2] == 'the test set has no column prompt to look for: it has messages'
    code, out, err = command(tmp_path / 'none')
    assert code == 2 and err.startswith('error: ') and err.endswith('none: no such file\n') and err.count('\n') == 1


def test_lint_looks_at_what_is_rendered():
    from test_tokenizers import CHATML, chat, tooled
    tok = tooled("{% for m in messages %}{% if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endif %}{% endfor %}"
                 + CHATML[CHATML.index('{% if add_generation'):])
    pairs = Dataset.from_list([{'prompt': chat('u:ok?'), 'chosen': chat('a:yes'), 'rejected': chat(f'a:{word}')} for word in ('yes\n', 'no')])
    assert any('unreadable: 1 row (0): chosen and rejected are equal once rendered' in message for grave, message in L.lint(pairs, tok) if grave)
    for row, fault in (({'prompt': '<|im_start|>user\nhi<|im_end|>', 'completion': 'yo'}, 'control tokens as text: 1 row (0)'), ({'prompt': chat('s:Be kind.', 'u:hi'), 'completion': 'yo'}, 'turns left out: 1 row (0)')):
        faults = [message for _, message in L.lint(Dataset.from_list([row]), tok)]
        assert any(fault in message for message in faults) and not any('no EOS' in message for message in faults)
    assert not any(grave for grave, _ in L.lint(Dataset.from_list([{'prompt': chat('u:hi'), 'completion': chat('a:yo')}]), tok))
