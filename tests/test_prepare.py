"""The prepare scripts on sources made here (no network: a hub on 127.0.0.1 stands in)."""
import gzip
import io
import json
import os
import runpy
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from conftest import ROOT
from dataset import load_dataset
from tokenizer import encode_pair, encode_prompt, encode_row, get_tokenizer

from hub import Hub


def prepare(name, monkeypatch, **options):
    """The script as its command runs it, in this process."""
    monkeypatch.setattr(sys, 'argv', ['prepare.py', *(f'--{k}={v}' for k, v in options.items())])
    monkeypatch.setattr(sys, 'excepthook', sys.excepthook)  # the configurator sets it; undone with the test
    monkeypatch.setattr(sys, 'path', sys.path[:])
    return runpy.run_path(os.path.join(ROOT, 'data', name, 'prepare.py'), run_name='__main__')


def refused(name, monkeypatch, capsys, **options):
    """(exit code, stderr) of a script that cannot do it; the configurator's hook speaks as it does for the
    command."""
    with pytest.raises(SystemExit) as ended:
        try:
            prepare(name, monkeypatch, **options)
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)
    return ended.value.code, capsys.readouterr().err


def jsonl(path, rows):
    with (gzip.open if str(path).endswith('.gz') else open)(path, 'wt', encoding='utf-8') as f:
        f.writelines(json.dumps(r) + '\n' for r in rows)
    return str(path)


# ---- the scripts ----

def test_shakespeare_char(tmp_path, monkeypatch, capsys):
    text = 'First Citizen:\nBefore we proceed any further, hear me speak. é\n' * 30
    (tmp_path / 'my.txt').write_text(text, encoding='utf-8')
    prepare('shakespeare_char', monkeypatch, src=tmp_path / 'my.txt', out_dir=tmp_path / 'out')
    tok = get_tokenizer(f'char:{tmp_path}/out/meta.json')
    train, val = (np.fromfile(tmp_path / 'out' / f, np.uint16) for f in ('train.bin', 'val.bin'))
    assert tok.decode(train.tolist()) + tok.decode(val.tolist()) == text
    assert len(train) == int(len(text) * 0.9)
    meta = json.loads((tmp_path / 'out' / 'meta.json').read_text())
    assert meta == {'vocab_size': len(set(text)),
                    'chars': ''.join(sorted(set(text)))} and train.max() < meta['vocab_size']
    assert 'next: python sft.py' in capsys.readouterr().out


def test_shakespeare_and_openwebtext_by_bytes(tmp_path, monkeypatch):
    tok = get_tokenizer('byte')
    (tmp_path / 'my.txt').write_text('To be, or not to be.\n\nThat is it.\n \n\nNo: this.' * 5)
    prepare('shakespeare', monkeypatch, src=tmp_path / 'my.txt', out_dir=tmp_path / 'a', tokenizer='byte',
            val=0.5)
    both = b''.join(open(tmp_path / 'a' / f, 'rb').read() for f in ('train.bin', 'val.bin'))
    assert tok.decode(np.frombuffer(both, np.uint16).tolist()) == (tmp_path / 'my.txt').read_text()
    rows = [{'text': f'document {i} é'} for i in range(50)]
    prepare('openwebtext', monkeypatch, src=jsonl(tmp_path / 'rows.jsonl.gz', rows), out_dir=tmp_path / 'b',
            tokenizer='byte', val=0.2)
    train, val = (tok.decode(np.fromfile(tmp_path / 'b' / f,
                                         np.uint16).tolist()).split('<|endoftext|>')[:-1]
                                         for f in ('train.bin', 'val.bin'))
    assert sorted(train + val) == sorted(r['text'] for r in rows) and 2 <= len(val) <= 25


def tar(files, mode):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as t:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            t.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_openwebtext_archives(tmp_path, monkeypatch):
    """Text files in a tar in xz in a tar, as the corpus comes."""
    inner = [tar({f'{k}-{i}.txt': f'page {k}{i}\n\n\n\nend '.encode() for i in range(4)},
                 'w:xz') for k in 'ab']
    (tmp_path / 'urlsf_subset00.tar').write_bytes(tar({'openwebtext/a_data.xz': inner[0],
                                                       'openwebtext/b_data.xz': inner[1]}, 'w'))
    prepare('openwebtext', monkeypatch, src=tmp_path, out_dir=tmp_path / 'out', tokenizer='byte')
    tok = get_tokenizer('byte')
    got = ''.join(tok.decode(np.fromfile(tmp_path / 'out' / f, np.uint16).tolist()) for f in ('val.bin',
        'train.bin'))
    assert got == ''.join(f'page {k}{i}\n\nend<|endoftext|>' for k in 'ab' for i in range(4))


def test_alpaca(tmp_path, monkeypatch, capsys):
    rows = [{'instruction': f'Do {i}.', 'input': 'x' if i % 2 else '',
             'output': '' if i == 3 else f'done {i}'} for i in range(20)]
    (tmp_path / 'a.json').write_text(json.dumps(rows))
    prepare('alpaca', monkeypatch, src=tmp_path / 'a.json', out_dir=tmp_path, val=0.1)
    train, val, prompts = (list(load_dataset(str(tmp_path / f))) for f in ('sft_train.jsonl', 'sft_val.jsonl',
        'prompts_train.jsonl'))
    assert sorted(r['output'] for r in train + val) == sorted(r['output'] for r in rows if r['output'])
    assert len(val) == 1
    tok = get_tokenizer('byte')
    for row, prompt in zip(train, prompts):
        ids, trained = encode_row(row, tok)
        assert tok.decode([i for i, t in zip(ids, trained) if not t]) == prompt['prompt']
        assert ('### Input:' in prompt['prompt']) == bool(row['input'])
    assert '1 without an answer left out' in capsys.readouterr().out


def dialogue(i, last='', turn=''):
    return f'\n\nHuman: question {i}\n\nAssistant: well\n\nHuman: {turn or "and"} then?\n\nAssistant: {last}'


def test_hh(tmp_path, monkeypatch, capsys):
    rows = [{'chosen': dialogue(i // 2, f'good {i}'), 'rejected': dialogue(i // 2, 'bad')} for i in range(80)]
    odd = [{'chosen': dialogue(0, 'same'), 'rejected': dialogue(0, 'same')},
           {'chosen': dialogue(0, 'x'), 'rejected': dialogue(0, 'y', 'but')},
           {'chosen': dialogue(0, 'x'), 'rejected': dialogue(0)}]
    jsonl(tmp_path / 'helpful-base_test.jsonl.gz', rows + odd)
    jsonl(tmp_path / 'other.jsonl', [{'x': 1}])
    prepare('hh', monkeypatch, src=tmp_path, out_dir=tmp_path / 'out', val=0.25)
    out, tok = capsys.readouterr().out, get_tokenizer('byte')
    assert '83 rows read, 3 left out' in out and '1: empty completion' in out
    assert '1: chosen and rejected are equal' in out
    pref, prompts = ({s: list(load_dataset(str(tmp_path / 'out' / f'{k}_{s}.jsonl'))) for s in ('train',
        'val')} for k in ('pref', 'prompts'))
    assert len(pref['train']) == 60 and len(pref['val']) == 20
    assert not {r['prompt'] for r in pref['train']} & {r['prompt'] for r in pref['val']}
    assert len(prompts['train']) == 30
    assert {r['prompt'] for r in prompts['train']} == {r['prompt'] for r in pref['train']}
    raw = {r['chosen']: r for r in rows}
    for r in pref['train'] + pref['val']:
        assert r['prompt'].startswith('\n\nHuman: ') and r['prompt'].endswith('\n\nAssistant:')
        assert raw[r['prompt'] + r['chosen']]['rejected'] == r['prompt'] + r['rejected']
        assert encode_pair(r, tok) == encode_pair(raw[r['prompt'] + r['chosen']], tok)
    sft = list(load_dataset(str(tmp_path / 'out' / 'sft_val.jsonl')))
    assert [(r['prompt'], r['completion']) for r in sft] == [(r['prompt'], r['chosen']) for r in pref['val']]


def test_hh_train_and_test_files_share_no_prompt(tmp_path, monkeypatch):
    jsonl(tmp_path / 'harmless-base-train.jsonl', [{'chosen': dialogue(i, 'a'),
                                                    'rejected': dialogue(i, 'b')} for i in range(10)])
    jsonl(tmp_path / 'harmless-base-test.jsonl', [{'chosen': dialogue(i, 'a'),
                                                   'rejected': dialogue(i, 'b')} for i in range(8, 12)])
    prepare('hh', monkeypatch, src=tmp_path, out_dir=tmp_path, subsets='harmless-base')
    assert len(load_dataset(str(tmp_path / 'pref_train.jsonl'))) == 8
    assert len(load_dataset(str(tmp_path / 'pref_val.jsonl'))) == 4


@pytest.mark.parametrize('form', ['text', 'chat'])
def test_gsm8k(tmp_path, monkeypatch, form):
    problems = [{'question': f'What is {i} + 1000? ',
                 'answer': f'{i}+1000 = <<{i}+1000={i + 1000}>>{i + 1000}\n#### {i + 1000:,}'}
                for i in range(40)]
    odd = {'question': 'x', 'answer': 'no number'}
    jsonl(tmp_path / 'gsm8k_train.jsonl', [*problems, odd])
    jsonl(tmp_path / 'gsm8k_test.jsonl', [*problems[:10], odd])
    prepare('gsm8k', monkeypatch, src=tmp_path, out_dir=tmp_path / 'out', form=form)
    reward = runpy.run_path(os.path.join(ROOT, 'data', 'gsm8k', 'reward.py'))['reward']
    rows, tok = {f: list(load_dataset(str(tmp_path / 'out' / f'{f}.jsonl'))) for f in ('train', 'test',
        'sft_train', 'sft_val')}, get_tokenizer('byte')
    assert {f: len(r) for f, r in rows.items()} == {'train': 40, 'test': 10, 'sft_train': 38, 'sft_val': 2}
    for r in rows['train']:
        assert encode_prompt(r['prompt'], tok) and reward('', f'it is #### {r["final"]}',
                                                          r) == 1.0 and reward('', '#### 7', r) == 0.0
    ids, trained = encode_row(rows['sft_train'][0], tok)
    said = tok.decode([i for i, t in zip(ids, trained) if t])
    assert '<<' not in said and '####' in said and said.endswith('<|endoftext|>')
    assert any(not t for t in trained)
    assert not {json.dumps(r['prompt']) for r in rows['sft_val']} & {json.dumps(r['prompt'])
        for r in rows['sft_train']}


def test_the_same_seed_makes_the_same_files(tmp_path, monkeypatch):
    src = jsonl(tmp_path / 'helpful-base.jsonl', [{'chosen': dialogue(i, 'a'),
                                                   'rejected': dialogue(i, 'b')} for i in range(50)])
    for d in ('a', 'b', 'c'):
        prepare('hh', monkeypatch, src=src, out_dir=tmp_path / d, seed=2 if d == 'c' else 1)
    a, b, c = ((tmp_path / d / 'pref_train.jsonl').read_bytes() for d in 'abc')
    assert a == b != c


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / 'empty.jsonl').write_text('')
    (tmp_path / 'broken.jsonl').write_text('{"chosen": "a", "rejected": "b"}\n{"chosen": \n')
    (tmp_path / 'latin.txt').write_bytes(b'caf\xe9' * 10)
    wrong = jsonl(tmp_path / 'wrong.jsonl', [{'a': 1}])
    for name, options, words in (('hh', {'src': tmp_path / 'none'}, 'no such file or folder'),
                                 ('hh', {'src': tmp_path}, 'none of its'),
                                 ('hh', {'src': tmp_path / 'empty.jsonl'}, 'empty'),
                                 ('hh', {'src': tmp_path / 'broken.jsonl'}, '2'),
                                 ('hh', {'src': wrong}, 'expected'), ('alpaca', {'src': wrong}, 'expected'),
                                 ('gsm8k', {'src': wrong}, 'expected'),
                                 ('gsm8k', {'src': wrong, 'form': 'x'}, "expected one of 'text', 'chat'"),
                                 ('shakespeare_char', {'src': tmp_path / 'latin.txt'}, 'not UTF-8 at byte 3'),
                                 ('shakespeare', {'src': wrong, 'tokenizer': 'nothing'}, 'name of the hub'),
                                 ('openwebtext', {'src': wrong, 'tokenizer': 'byte'}, 'expected'),
                                 ('hh', {'sorce': 'x'}, "did you mean 'src'")):
        code, err = refused(name, monkeypatch, capsys, **{'out_dir': tmp_path / 'out', **options})
        assert code == 2 and err.startswith('error: ') and err.count('\n') == 1 and words in err, (name,
            options, err)
    assert not list(tmp_path.glob('out/*.jsonl')) and not list(tmp_path.glob('out/*.bin'))


ALL = ('alpaca', 'gsm8k', 'hh', 'math', 'openwebtext', 'shakespeare', 'shakespeare_char', 'toy')
ROWS = {'alpaca': [{'instruction': f'Do {i}.', 'input': '', 'output': f'done {i}'} for i in range(9)],
        'gsm8k': [{'question': f'q{i}', 'answer': f'#### {i}'} for i in range(40)],
        'hh': [{'chosen': dialogue(i, 'a'), 'rejected': dialogue(i, 'b')} for i in range(9)],
        'math': [{'problem': f'p{i}', 'answer': f'{i}'} for i in range(30)],
        'openwebtext': [{'text': f'page {i}\n\n\n\nend'} for i in range(40)],
        'shakespeare': [{'text': f'line {i}'} for i in range(40)]}
ROWS['shakespeare_char'] = ROWS['shakespeare']
TOKENIZER = {'openwebtext': {'tokenizer': 'byte'}, 'shakespeare': {'tokenizer': 'byte'}}


@pytest.mark.parametrize('name', ALL)
def test_where_one_may_not_write(tmp_path, monkeypatch, capsys, name):
    """A file stands where the folder should be; a folder that belongs to another (root may write anywhere:
    then only the first)."""
    options = {'src': jsonl(tmp_path / 'rows.jsonl', ROWS[name]),
               **TOKENIZER.get(name, {})} if name != 'toy' else {'scale': 0.001}
    (tmp_path / 'closed').mkdir(mode=0o500)
    for folder in ('rows.jsonl/x', 'closed/x')[:1 if os.getuid() == 0 else 2]:
        (tmp_path / 'rows.jsonl').touch()
        code, err = refused(name, monkeypatch, capsys, out_dir=tmp_path / folder, **options)
        assert code == 2 and err.startswith('error: [Errno') and err.count('\n') == 1
        assert str(tmp_path / folder) in err


@pytest.mark.parametrize('name, file', [('alpaca', 'data/train-00000-of-00001-a09b.parquet'),
                                        ('gsm8k', 'main/{}-00000-of-00001.parquet'),
                                        ('hh', 'helpful-base/train.jsonl.gz'),
                                        ('math', 'data/train-00000-of-00001.parquet'),
                                        ('openwebtext', 'plain_text/train-00000-of-00080.parquet'),
                                        ('shakespeare', 'my shakespeare, all.jsonl'),
                                        ('shakespeare_char', 'input.jsonl')])
def test_a_folder_as_hf_download_leaves_it(tmp_path, monkeypatch, capsys, name, file):
    folder = tmp_path / 'snapshot, of today'  # a comma in a path that is there separates nothing
    for split in ('train', 'test'):
        path = folder / file.format(split)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == '.parquet':
            table = pytest.importorskip('pyarrow').Table.from_pylist(ROWS[name])
            pytest.importorskip('pyarrow.parquet').write_table(table, path)
        else:
            jsonl(path, ROWS[name])
    (folder / 'README.md').write_text('train test')
    prepare(name, monkeypatch, src=folder, out_dir=tmp_path / 'out', **TOKENIZER.get(name, {}))
    assert 'next: python' in capsys.readouterr().out and len(list((tmp_path / 'out').glob('*.*'))) >= 2


@pytest.mark.parametrize('main, converted, read', [
    (['subsets/urlsf_subset00.tar', 'subsets/urlsf_subset01.tar'], [], 2),
    (['plain_text/train-00000-of-00002.parquet', 'plain_text/train-00001-of-00002.parquet'], [], 2),
    (['openwebtext.py'], ['plain_text/partial-train/0000.parquet'], 1), (['README.md'], [], 0)])
def test_openwebtext_from_the_hub_in_either_form(tmp_path, monkeypatch, capsys, main, converted, read):
    pyarrow, parquet = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    parquet.write_table(pyarrow.Table.from_pylist(ROWS['openwebtext']), tmp_path / 'x')
    inner = tar({f'{i}.txt': row['text'].encode() for i, row in enumerate(ROWS['openwebtext'])}, 'w:xz')
    bodies = {'tar': tar({'openwebtext/a_data.xz': inner}, 'w'), 'parquet': (tmp_path / 'x').read_bytes(),
              'py': b'', 'md': b''}
    name = 'Skylion007/openwebtext'
    hub = Hub({}, **{name: {f: bodies[f.rsplit('.')[-1]] for f in main},
                     f'{name}/refs/convert/parquet': {f: bodies['parquet'] for f in converted} or {'x': b''}})
    for key, value in {'HF_ENDPOINT': hub.url, 'HF_HUB_OFFLINE': '0', 'NO_PROXY': '127.0.0.1'}.items():
        monkeypatch.setenv(key, value)
    try:
        if not read:
            assert 'neither archives nor parquet' in refused('openwebtext', monkeypatch, capsys,
                                                             out_dir=tmp_path / 'out', tokenizer='byte')[1]
            return
        for subsets, files_read in ((0, read), (1, 1)):
            prepare('openwebtext', monkeypatch, out_dir=tmp_path / 'out', tokenizer='byte', subsets=subsets,
                    val=0.1)
            assert f'{40 * files_read} documents' in capsys.readouterr().out
        assert len(hub.asked('GET', host='cdn')) == read  # what is there is not fetched again
        text = get_tokenizer('byte').decode(np.fromfile(tmp_path / 'out/val.bin', np.uint16).tolist())
        assert text.startswith('page 0\n\nend<|endoftext|>')
        monkeypatch.setenv('HF_HUB_OFFLINE', '1')
        code, err = refused('openwebtext', monkeypatch, capsys, out_dir=tmp_path / 'new', tokenizer='byte')
        assert code == 2 and 'HF_HUB_OFFLINE is set; --src=' in err and err.count('\n') == 1
    finally:
        hub.close()


def test_hh_from_the_hub(tmp_path, monkeypatch, capsys):
    served = {}
    for part in ('train', 'test'):
        path = tmp_path / f'{part}.jsonl.gz'
        asked = [f'{part} {i}' for i in range(9)]
        jsonl(path, [{'chosen': dialogue(q, 'a'), 'rejected': dialogue(q, 'b')} for q in asked])
        served[f'harmless-base/{part}.jsonl.gz'] = path.read_bytes()
    hub = Hub({}, **{'Anthropic/hh-rlhf': served})
    for key, value in {'HF_ENDPOINT': hub.url, 'HF_HUB_OFFLINE': '0', 'NO_PROXY': '127.0.0.1'}.items():
        monkeypatch.setenv(key, value)
    try:
        prepare('hh', monkeypatch, out_dir=tmp_path / 'out', subsets='harmless-base')
        assert len(load_dataset(str(tmp_path / 'out/pref_train.jsonl'))) == 9
        assert '18 rows read, 0 left out' in capsys.readouterr().out
        code, err = refused('hh', monkeypatch, capsys, out_dir=tmp_path / 'out', subsets='helpful-online')
        assert code == 2 and '404' in err and '--src=' in err and err.count('\n') == 1
    finally:
        hub.close()


def test_the_command_from_another_folder(tmp_path):
    src = jsonl(tmp_path / 'q.jsonl', [{'question': f'q{i}', 'answer': f'#### {i}'} for i in range(20)])
    run = subprocess.run([sys.executable, os.path.join(ROOT, 'data/gsm8k/prepare.py'), f'--src={src}',
                          '--out_dir=made'], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and 'next: python sft.py --dataset=made/sft_train.jsonl' in run.stdout
    assert len(load_dataset(str(tmp_path / 'made/test.jsonl'))) == 2
