"""Downloads from a hub with faults, files that are replaced whole, locks."""
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import files
from conftest import ROOT
from hub import COMMIT, Hub
from model import GPT, GPTConfig
from tokenizer import get_tokenizer

WEIGHTS = 'model.safetensors'


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    """The files of a model of 0.3 MB, whose tokenizer says as little as GPT-2's own on the hub."""
    folder = tmp_path_factory.mktemp('served')
    torch.manual_seed(0)
    GPT(GPTConfig(n_layer=1, n_head=2, n_embd=64, vocab_size=257, block_size=64)).save_pretrained(str(folder))
    get_tokenizer('byte').save(str(folder))
    (folder / 'tokenizer_config.json').write_text('{"model_max_length": 64}')
    return {f: (folder / f).read_bytes() for f in os.listdir(folder)}


@pytest.fixture
def hub(served, tmp_path, monkeypatch):
    unwanted = {'evil.py': b'import os', 'pytorch_model.bin': b'pickle', 'consolidated.safetensors': bytes(9),
                'onnx/model.onnx': b'x'}
    half = len(served[WEIGHTS]) // 2
    shards = {f'model-0000{i}-of-00002.safetensors': served[WEIGHTS][:half] + bytes([i]) for i in (1, 2)}
    index = {'model.safetensors.index.json': json.dumps({'weight_map': dict(zip('ab', shards))}).encode()}
    texts = {f: b for f, b in served.items() if f != WEIGHTS}
    hub = Hub(served | unwanted, **{'me/sharded': texts | shards | index,
                                    'me/mute': {f: served[f] for f in ('config.json', WEIGHTS)},
                                    'me/pickled': texts | unwanted,
                                    'me/outside': texts | {files.INDEX: b'{"a": "../../x.safetensors"}'},
                                    'outlier/tiny': served})
    for key in [k for k in os.environ if k.startswith(('HF_', 'HUGGING', 'TRANSFORMERS_', 'XDG_'))]:
        monkeypatch.delenv(key)
    for key, value in {'HF_ENDPOINT': hub.url, 'HF_HOME': str(tmp_path / 'home'),
                       'NO_PROXY': '127.0.0.1'}.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(files, 'PAUSES', (0, 0, 0))
    yield hub
    hub.close()


def read(folder):
    return {f: open(os.path.join(folder, f), 'rb').read() for f in os.listdir(folder)}


def everything(folder):
    return sorted(os.path.relpath(os.path.join(d, f), folder) for d, _,
                  names in os.walk(folder) for f in names)


def blob(tmp_path, name, body):
    folder = tmp_path / f'home/hub/models--{name.replace("/", "--")}/blobs'
    folder.mkdir(parents=True, exist_ok=True)
    return folder / hashlib.sha256(body).hexdigest()


def python(code, env=(), **more):
    return subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, env={**os.environ, **dict(env)},
                            text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


# ---- E1, E3 to E7: what comes, comes whole ----

@pytest.mark.parametrize('kind', ['plain', 'renamed', 'moved', 'flaky', 'gzip', 'packed', 'broken',
                                  'nameless', 'sharded', 'slow'])
def test_a_model_comes_whole(hub, served, tmp_path, monkeypatch, kind):
    monkeypatch.setenv('HF_TOKEN', 'secret')
    (tmp_path / 'netrc').write_text('machine 127.0.0.1 login a password b')
    monkeypatch.setenv('NETRC', str(tmp_path / 'netrc'))
    folder = files.resolve(f'me/{kind}')
    wanted = {f: b for f,
              b in hub.files(f'me/{kind}').items() if files.TEXTS.fullmatch(f) or f.startswith('model')}
    assert read(folder) == wanted
    assert folder == str(tmp_path / f'home/hub/models--me--{kind}/snapshots/{COMMIT}')
    assert not [f for f in everything(tmp_path) if f.endswith(('.incomplete', '.tmp', '.etag'))]
    assert {(host, headers.get('Authorization')) for host, _, _, headers in hub.seen} == {
        ('hub', 'Bearer secret'), ('cdn', None)}
    assert not hub.asked('HEAD', host='cdn')  # where large files lie nobody knows their hash
    asked = len(hub.seen)
    assert files.resolve(f'me/{kind}') == folder and len(hub.seen) == asked  # no request for what is there


def test_a_model_and_its_tokenizer_under_an_old_name(hub, served):
    model = GPT.from_pretrained('me/renamed')
    assert model.config.vocab_size == 257 and model.wte.weight.shape == (257, 64)
    tok = get_tokenizer('me/renamed')
    # its class says what its files do not
    assert tok.eot == 256 and tok.decode(tok.encode('héllo')) == 'héllo'


def test_a_tokenizer_alone_and_the_model_later(hub, served):
    assert get_tokenizer('me/plain').encode('ab') == [97, 98] and not hub.asked(path='safetensors')
    assert set(read(files.resolve('me/plain'))) == set(served) and len(hub.asked('GET',
        'resolve-cache')) == len(served) - 1


@pytest.mark.parametrize('kind, have, gets', [
    ('plain', 'half', 1), ('plain', 'whole', 1), ('plain', 'longer', 2), ('plain', 'wrong', 2),
    ('plain', 'empty', 1), ('rangeless', 'half', 1),
    ('shifted', 'half', 2), ('packed', 'half', 1), ('broken', 'half', 2), ('plain', 'wrong whole', 2)])
def test_a_part_goes_on_or_begins_anew(hub, served, tmp_path, kind, have, gets):
    body = served[WEIGHTS]
    half = len(body) // 2
    part = {'half': body[:half], 'whole': body, 'longer': body + b'x', 'wrong': bytes(half), 'empty': b'',
            'wrong whole': bytes(len(body))}[have]
    path = blob(tmp_path, f'me/{kind}', body)
    path.with_name(path.name + '.incomplete').write_bytes(part)
    assert read(files.resolve(f'me/{kind}'))[WEIGHTS] == body
    asked = [headers.get('Range') for _, _, _, headers in hub.asked('GET', WEIGHTS, 'cdn')]
    assert len(asked) == gets and (have != 'half' or asked[0] == f'bytes={half}-')
    if (kind, have) == ('plain', 'half'):
        assert hub.sent < len(body)  # the half that was there did not come again


def test_a_line_that_always_breaks_keeps_what_came(hub, served, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match='the line broke.*98,304 bytes are kept.*hf download me/deaf'):
        files.resolve('me/deaf')  # it breaks after 100 kB and starts from the beginning each time
    part = blob(tmp_path, 'me/deaf', served[WEIGHTS])
    assert os.path.getsize(f'{part}.incomplete') >= 100_000 - files.PIECE
    monkeypatch.setattr(files, 'PAUSES', ())
    for _ in range(4):  # no patience: four starts, as a user would
        try:
            folder = files.resolve('me/broken')
        except ValueError as error:
            assert 'are kept' in str(error)
    assert read(folder) == served


def test_processes_that_download_one_model_at_once(hub, served):
    runs = [python('import files; print(files.resolve("me/slow"))') for _ in range(4)]
    said = {run.communicate(timeout=60)[0] for run in runs}
    assert [run.returncode for run in runs] == [0] * 4 and len(said) == 1
    assert read(said.pop().strip()) == served
    gets = [path.split('?')[0] for _, method, path,
            _ in hub.seen if method == 'GET' and '/revision/' not in path and '/resolve/' not in path]
    assert len(gets) == len(set(gets)) == len(served)  # each byte once


def test_a_download_that_was_killed_is_taken_over(hub, served, tmp_path):
    one = python('import files; files.resolve("me/slow")')
    while not hub.asked(path=WEIGHTS, host='cdn'):
        time.sleep(0.01)
    two = python('import files; files.resolve("me/slow")')
    one.send_signal(signal.SIGKILL)
    assert one.wait(30) == -9 and two.wait(60) == 0, two.communicate()
    one.communicate(), two.communicate()
    assert read(files.resolve('me/slow')) == served


@pytest.mark.slow
def test_two_ranks_and_a_model_that_is_not_in_the_cache(hub, served, tmp_path):
    rows = tmp_path / 'text.jsonl'
    rows.write_text(''.join(json.dumps({'text': f'row {i} of text'}) + '\n' for i in range(12)))
    run = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2',
                          'sft.py', '--init_from=me/slow', f'--dataset={rows}',
                          f'--val_dataset={rows}', '--batch_size=4', '--max_iters=1', '--eval_iters=1',
                          '--device=cpu', f'--out_dir={tmp_path}/ranks'],
                         cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]
    assert len(hub.asked('GET', WEIGHTS, 'cdn')) == 1 and (tmp_path / 'ranks/ckpt.pt').exists()


# ---- E1, E2, E6, E8, E10: refusals, in one line that ends with the way that always works ----

@pytest.mark.parametrize('kind, words', [
    ('locked', '403: no access'), ('hidden', '401: .*private.*HF_TOKEN'), ('busy', '503: .*busy'),
    ('limited', '429: too many'), ('legal', '451'), ('teapot', '418'),
    ('circle', 'no checksum'), ('away', 'no checksum'), ('slash', 'no checksum'), ('untagged', 'no checksum'),
    ('etag', 'no checksum'), ('lies', 'what came has the hash'),
    ('html', 'did not answer'), ('list', 'did not answer'), ('null', 'did not answer'),
    ('number', 'did not answer'), ('unnamed', 'did not answer'),
    ('sha', 'did not answer'), ('short', 'did not answer'), ('sibling', 'no config.json'),
    ('absolute', 'no config.json'), ('backslash', 'no config.json'),
    ('pickled', 'no config.json with safetensors'), ('outside', 'no config.json with safetensors')])
def test_a_refusal_is_one_line_and_writes_nothing_outside(hub, tmp_path, monkeypatch, kind, words):
    monkeypatch.setenv('HF_TOKEN', 'secret')
    with pytest.raises(ValueError, match=words) as error:
        files.resolve(f'me/{kind}')
    assert '\n' not in str(error.value) and f'`hf download me/{kind}`' in str(error.value)
    written = [f for f in everything(tmp_path) if not f.startswith((f'home/hub/models--me--{kind}/',
        f'home/hub/.locks/models--me--{kind}/'))]
    assert not written and not (tmp_path / f'home/hub/models--me--{kind}/refs').exists()
    assert not os.path.exists('/tmp/outside.json')
    assert not any('Authorization' in headers for host, _, _, headers in hub.seen if host == 'cdn')
    assert len(hub.asked('GET', '/api/models')) == (4 if kind in ('busy', 'limited') else 1)


def test_no_network_is_one_line(hub, monkeypatch):
    for address, words in (('http://127.0.0.1:9', 'no answer, or the line broke .ConnectionError'),
                           ('mirror', 'MissingSchema'), ('ftp://x', 'InvalidSchema')):
        monkeypatch.setenv('HF_ENDPOINT', address)
        with pytest.raises(ValueError, match=f'{words}.*hf download me/plain'):
            files.resolve('me/plain')


def test_offline_is_heard(hub, monkeypatch):
    for key, value in (('HF_HUB_OFFLINE', '1'), ('HF_HUB_OFFLINE', 'yes'), ('TRANSFORMERS_OFFLINE', 'True')):
        with monkeypatch.context() as patch:
            patch.setenv(key, value)
            for ask in (lambda: files.resolve('me/plain'), lambda: get_tokenizer('me/plain'),
                        lambda: files.fetch(f'{files.HUB}/x', '/nonexistent/x')):
                with pytest.raises(ValueError, match='HF_HUB_OFFLINE is set'):
                    ask()
    assert not hub.seen
    monkeypatch.setenv('HF_HUB_OFFLINE', '0')
    folder = files.resolve('me/plain')
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert files.resolve('me/plain') == folder


def test_the_environment_of_huggingface_hub(hub, served, tmp_path, monkeypatch):
    home = tmp_path / 'home'
    for env, where in (({'HF_HUB_CACHE': str(tmp_path / 'a')}, 'a'),
                       ({'HUGGINGFACE_HUB_CACHE': '$BASE/b'}, 'b'), ({'HF_HOME': '~/c'}, 'c/hub'),
                       ({'HF_HOME': '', 'XDG_CACHE_HOME': str(tmp_path / 'd')}, 'd/huggingface/hub')):
        with monkeypatch.context() as patch:
            patch.setenv('HOME', str(tmp_path))
            patch.setenv('BASE', str(tmp_path))
            for key, value in env.items():
                patch.setenv(key, value)
            assert files.cache() == str(tmp_path / where)
    home.mkdir()
    (home / 'token').write_text('filed\n')
    (tmp_path / 'other').write_text('other')
    for env, token in (({}, 'filed'), ({'HF_TOKEN': ' mine\n'}, 'mine'),
                       ({'HUGGING_FACE_HUB_TOKEN': 'old'}, 'old'),
                       ({'HF_TOKEN_PATH': str(tmp_path / 'other')}, 'other'),
                       ({'HF_TOKEN': 'mine', 'HF_HUB_DISABLE_IMPLICIT_TOKEN': '1'}, None)):
        with monkeypatch.context() as patch:
            for key, value in env.items():
                patch.setenv(key, value)
            hub.seen.clear()
            files.listing('me/plain')
            assert hub.seen[0][3].get('Authorization') == (token and f'Bearer {token}')
    monkeypatch.setenv('HF_HUB_DISABLE_SYMLINKS', '1')
    folder = files.resolve('me/plain')
    assert read(folder) == served and not any(os.path.islink(os.path.join(folder,
        f)) for f in os.listdir(folder))


@pytest.mark.parametrize('name, words', [
    ('out-sft', 'run the stage'), ('out', 'run the stage'), ('out-sft/ckpt_best.pt', 'run the stage'),
    ('outlier', 'run the stage'), ('../x', 'not a name'),
    ('a--b', 'not a name'), ('a/b/c', 'not a name'), ('me/..', 'not a name'), ('me/x.git', 'not a name'),
    ('-x', 'not a name'), ('', 'not a name'), ('größe/x', 'not a name'),
    ('you/none', '404')])
def test_names(hub, served, name, words):
    with pytest.raises(ValueError, match=words):
        files.resolve(name)
    assert words == '404' or not hub.seen


def test_a_name_that_begins_with_out(hub, served, tmp_path):
    assert read(files.resolve('outlier/tiny')) == served
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='no config.json'):
        files.resolve(str(tmp_path / 'empty'))


# ---- E9: what others have put into the cache ----

def test_half_a_cache_is_filled(hub, served, tmp_path):
    folder = files.resolve('me/sharded')
    whole = read(folder)
    for missing in ('model-00001-of-00002.safetensors', 'model.safetensors.index.json', 'tokenizer.json',
                    'config.json'):
        os.remove(os.path.join(folder, missing))
        assert files.resolve('me/sharded') == folder and read(folder) == whole
    link = os.path.join(folder, 'model-00002-of-00002.safetensors')
    os.remove(os.path.realpath(link))  # a link to nothing
    assert files.resolve('me/sharded') == folder and read(folder) == whole
    for ref in ('', '../../../outside', 'b' * 40):  # what stands in the cache is checked as well
        (tmp_path / 'home/hub/models--me--sharded/refs/main').write_text(ref)
        assert files.resolve('me/sharded') == folder


def test_a_model_without_a_tokenizer(hub, monkeypatch):
    folder = files.resolve('me/mute')
    assert set(read(folder)) == {'config.json', WEIGHTS} and files.resolve('me/mute') == folder
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    assert files.resolve('me/mute') == folder
    with pytest.raises(ValueError, match='HF_HUB_OFFLINE'):
        get_tokenizer('me/mute')


def test_huggingface_hub_and_we_share_hub_and_cache(hub, served, tmp_path):
    pytest.importorskip('huggingface_hub')
    code = ('import sys; from huggingface_hub import snapshot_download\n'
            'print(snapshot_download(sys.argv[1], local_files_only=len(sys.argv) > 2))')

    def theirs(*args):
        env = {k: v for k, v in os.environ.items() if k != 'HF_HUB_OFFLINE'}
        return subprocess.run([sys.executable, '-c', code, *args], capture_output=True, text=True, env=env,
                              timeout=120)
    for kind in ('plain', 'renamed', 'sharded'):
        run = theirs(f'me/{kind}')
        assert run.returncode == 0, run.stderr[-2000:]
        folder, asked = run.stdout.strip(), len(hub.seen)
        assert files.resolve(f'me/{kind}') == folder and len(hub.seen) == asked
        assert all(open(os.path.join(folder, f), 'rb').read() == b for f,
                   b in hub.files(f'me/{kind}').items())
    folder = files.resolve('me/other')
    assert theirs('me/other', 'here').stdout.strip() == folder


# ---- E5: any address ----

def test_fetch_goes_on_with_the_same_version_only(hub, tmp_path):
    body, good, path = bytes(range(256)) * 1000, '"v2"', tmp_path / 'deep/file'
    part, mark = tmp_path / 'deep/file.part', tmp_path / 'deep/file.part.etag'
    path.parent.mkdir()
    for tag, old, etag, sent in ((good, 100_000, None, 256_000), (good, 100_000, '"v1"', 256_000),
                                 (good, 100_000, good, 156_000), (good, 256_000, good, 0),
                                 (good, 256_001, good, 256_000), ('W/"v2"', 100_000, 'W/"v2"', 256_000),
                                 (None, 100_000, '', 256_000)):
        hub.urls, hub.sent = {'/file': (body, tag)}, 0
        part.write_bytes((body if etag == good else bytes(256_000))[:old].ljust(old, b'x'))
        if etag is not None:
            mark.write_text(etag)
        assert files.fetch(hub.cdn_url + '/file', str(path)) == str(path)
        assert path.read_bytes() == body and hub.sent == sent and everything(path.parent) == ['file'], (tag,
            old, etag)
        assert files.fetch('http://127.0.0.1:9/none', str(path)) == str(path)  # there already
        path.unlink()


def test_fetch_checks_a_hash_and_says_what_to_do(hub, tmp_path):
    body = b'x' * 1000
    hub.urls = {'/file': (body, '"v1"')}
    good, path = hashlib.sha256(body).hexdigest(), str(tmp_path / 'file')
    for url, sha256, words in (('/file', '0' * 64, 'what came has the hash'),
                               ('/none/none/none', good, '404'), ('/me/circle/resolve/x/y', '', '307')):
        with pytest.raises(ValueError, match=f'{words}.*--src='):
            files.fetch(hub.url + url, path, sha256)
        assert not os.path.exists(path)
    assert files.fetch(hub.url + '/file', path, good) == path
    runs = [python(f'import files; files.fetch({hub.url + "/file"!r}, {path + "2"!r})') for _ in range(3)]
    assert [run.wait(60) for run in runs] == [0] * 3 and len(hub.asked('GET', '/file')) == 4
    assert everything(tmp_path) == ['file', 'file2'] and [run.communicate() for run in runs]


def test_fetch_from_the_hub_knows_its_hash(hub, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'secret')
    hub.repos['me/data'] = {'a.gz': b'rows' * 999, 'b.json': b'[]'}
    for file, body in hub.repos['me/data'].items():
        path = str(tmp_path / file)
        assert open(files.fetch(f'{files.HUB}/datasets/me/data/resolve/main/{file}', path),
                    'rb').read() == body
    hub.repos['me/lies'] = hub.repos['me/data']
    with pytest.raises(ValueError, match='what came has the hash'):
        files.fetch(f'{files.HUB}/datasets/me/lies/resolve/main/a.gz', str(tmp_path / 'c'))
    assert files.listing('me/data', 'datasets', 'refs/convert/parquet') == (COMMIT, ['a.gz', 'b.json'])
    hub.urls['/secret'] = (b'x', None)
    files.fetch(hub.cdn_url + '/secret', str(tmp_path / 'd'))
    assert not any('Authorization' in headers for host, _, _, headers in hub.seen if host == 'cdn')


# ---- E12: files that are replaced ----

def limited(code, size=100_000):
    return python(f'import resource, files; resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))\n'
                  + code)


@pytest.mark.parametrize('writer', [
    'import torch\nwith files.replaced(path) as f: torch.save({"a": torch.zeros(100_000)}, f)',
    'import torch\nwith files.replaced(path) as f: torch.save({"a": torch.zeros(100_000)}, f.name)',
    'with files.replaced(path) as f: f.write(bytes(400_000))',
    'with files.replaced(path, "w") as f: f.writelines(["line\\n"] * 50_000)',
    'import numpy as np\nwith files.replaced(path) as f: np.zeros(100_000).tofile(f)'])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, writer):
    path = tmp_path / 'file'
    path.write_text('older')
    run = limited(f'path = {str(path)!r}\n{writer}')
    out, err = run.communicate(timeout=60)
    assert err.strip().split('\n')[-1] == f"OSError: [Errno 27] File too large: '{path}'"
    assert everything(tmp_path) == ['file'] and path.read_text() == 'older'


def test_what_fails_in_the_block_is_not_blamed_on_the_disk(tmp_path):
    path = str(tmp_path / 'file')
    for error in (RuntimeError('mine'), KeyboardInterrupt(), FileNotFoundError(2, 'none', 'source')):
        with pytest.raises(type(error)) as raised, files.replaced(path):
            raise error
        assert raised.value is error and not everything(tmp_path)
    with pytest.raises(OSError, match='No such file or directory.*none/file'):
        with files.replaced(str(tmp_path / 'none/file')):
            raise AssertionError
    with files.replaced(path, 'w') as f:
        f.write('größe')
        assert not os.path.exists(path)
    assert open(path, encoding='utf-8').read() == 'größe'
    (tmp_path / 'plain').touch()
    assert os.stat(path).st_mode == os.stat(tmp_path / 'plain').st_mode


def test_writers_at_once_and_what_a_killed_one_left(tmp_path, monkeypatch):
    monkeypatch.setattr(files, 'GRACE', 0)
    path = str(tmp_path / 'file')
    (tmp_path / 'file.previous.tmp').write_text('of somebody else')
    with files.replaced(path, 'w') as f:
        f.write('first')
    (tmp_path / 'file.previous.tmp').unlink()  # it is still there
    writer = 'import files, time\nfor i in range({}):\n  '
    writer += f'with files.replaced({path!r}, "w") as f:\n    f.write({{!r}} * 99999)'
    slow = python(writer.format(1, 'x') + '; f.flush(); print("on", flush=True); time.sleep(60)')
    slow.stdout.readline()
    with files.replaced(path, 'w') as f:
        f.write('mine')
    assert len(everything(tmp_path)) == 2  # the other one still writes
    slow.kill()
    slow.communicate()
    with files.replaced(path, 'w') as f:
        f.write('mine again')
    assert everything(tmp_path) == ['file'] and (tmp_path / 'file').read_text() == 'mine again'
    many = [python(writer.format(50, letter)) for letter in 'abc']
    assert [p.wait(60) for p in many] == [0] * 3 and len(set((tmp_path / 'file').read_text())) == 1
    assert everything(tmp_path) == ['file']
    assert [p.communicate() for p in many]


# ---- E11: locks ----

def test_a_lock_excludes_and_comes_back(tmp_path):
    path = str(tmp_path / 'run/.lock')
    held = files.locked(path, wait=False)
    with pytest.raises(BlockingIOError):
        files.locked(path, wait=False)
    held.close()
    other = python(f'import files, time; f = files.locked({path!r}); print("on", flush=True); time.sleep(60)')
    other.stdout.readline()
    with pytest.raises(BlockingIOError):
        files.locked(path, wait=False)
    waits = python(f'import files; files.locked({path!r})')
    assert 'waiting for another process' in waits.stderr.readline()
    other.kill()  # SIGKILL: the kernel gives the lock back
    other.communicate()
    assert waits.wait(30) == 0 and waits.communicate()
    with files.locked(path, wait=False) as f:
        f.write('pid')
