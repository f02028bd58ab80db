"""What every stage does around its algorithm: the folder's lock, checkpoints cut short, full disks, signals, words for the device."""
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

import parallel
import run
from model import GPT, GPTConfig

TINY = ['--dataset=text.jsonl', '--val_dataset=text.jsonl', '--tokenizer=byte', '--n_layer=1', '--n_embd=32', '--n_head=2',
        '--batch_size=4', '--eval_iters=1', '--device=cpu']


def env():
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1', 'PYTHONPATH': ROOT}


def start(cwd, *args):
    return subprocess.Popen([sys.executable, os.path.join(ROOT, 'sft.py'), *TINY, *args], cwd=cwd, env=env(), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finished(process, rc=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == rc, err[-2000:]
    return out, err


def until(process, words):
    """Reads what a run prints until these words have come; everything that was read."""
    seen = ''
    while words not in seen:
        line = process.stdout.readline()
        assert line, process.stderr.read()[-2000:]
        seen += line
    return seen


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    d = tmp_path_factory.mktemp('run')
    (d / 'text.jsonl').write_text(''.join(f'{{"text": "row {i} of text"}}\n' for i in range(12)))
    finished(start(d, '--max_iters=2', '--out_dir=a'))
    return d


def test_a_folder_has_one_run(world):
    """The second is refused, however it is started; a run that was killed blocks nobody."""
    first = start(world, '--max_iters=1000000', '--eval_interval=100000', '--out_dir=one')
    until(first, 'iter 10/')
    for args in (['--overwrite=True'], ['--init_from=resume'], ['--init_from=resume', '--eval_only=True'], []):
        _, err = finished(start(world, '--max_iters=3', '--out_dir=one', *args), rc=2)
        assert ('is being written by a run right now' in err or 'already holds a run' in err) and err.count('\n') == 1
    (world / 'link').symlink_to('one')
    assert 'right now' in finished(start(world, '--overwrite=True', '--out_dir=link'), rc=2)[1]
    first.kill()
    first.wait()
    finished(start(world, '--max_iters=1', '--out_dir=one', '--overwrite=True'))


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_iteration(world, number):
    """ckpt.pt is written, the last line says how to go on, and the resumed run ends with the weights of one that ran through."""
    out = f'stopped{int(number)}'
    keys = ['--max_iters=400', '--eval_interval=1000', '--decay_lr=False']
    running = start(world, *keys, f'--out_dir={out}')
    until(running, 'iter 10/')
    running.send_signal(number)
    said, err = finished(running, rc=128 + number)
    assert 'the iteration ends' in err and f'--init_from=resume' in said.splitlines()[-1]
    ckpt = parallel.read_checkpoint(world / out / 'ckpt.pt')
    assert 10 < ckpt['iter'] < 400
    finished(start(world, *keys, f'--out_dir={out}', '--init_from=resume'))
    if not (world / 'whole').exists():
        finished(start(world, *keys, '--out_dir=whole'))
    a, b = (parallel.read_checkpoint(world / d / 'ckpt.pt')['model'] for d in (out, 'whole'))
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_second_signal_ends_at_once():
    listening = parallel.Interrupt()
    listening.listen()
    try:
        signal.raise_signal(signal.SIGINT)
        assert listening.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        listening.forget()


def test_save_minutes_writes_between_evaluations(world):
    running = start(world, '--max_iters=1000000', '--eval_interval=1000000', '--save_minutes=0.001', '--out_dir=minutes')
    file, seen = world / 'minutes' / 'ckpt.pt', set()
    for _ in range(600):
        time.sleep(0.1)
        if file.exists():
            seen.add(os.stat(file).st_ino)
        if len(seen) > 2 or running.poll() is not None:
            break
    running.kill()
    running.wait()
    assert len(seen) > 2 and parallel.read_checkpoint(file)['iter'] > 0


@pytest.mark.parametrize('share', [0, 0.04, 0.15, 0.6, 0.99], ids=str)
def test_a_checkpoint_cut_short_is_named(world, tmp_path, share):
    data = (world / 'a' / 'ckpt.pt').read_bytes()
    (tmp_path / 'ckpt.pt').write_bytes(data[:int(len(data) * share)])
    (tmp_path / 'ckpt_best.pt').write_bytes(data)
    for read in (lambda: run.open_run(str(tmp_path), 'resume', False, 'sft'), lambda: run.load_model(str(tmp_path))):
        with pytest.raises(ValueError, match='ckpt.pt: not a checkpoint.*cut short.*ckpt_best.pt may still be good') as e:
            read()
        assert '\n' not in str(e.value)


@pytest.mark.parametrize('content', [b'', b'PK\x03\x04 and more', b'\x80\x02.', b'not at all'], ids=['empty', 'zip', 'pickle', 'text'])
def test_what_is_no_checkpoint_is_named(tmp_path, content):
    (tmp_path / 'ckpt.pt').write_bytes(content)
    with pytest.raises(ValueError, match='not a checkpoint of ours'):
        run.load_model(str(tmp_path / 'ckpt.pt'))
    torch.save([1, 2], tmp_path / 'ckpt.pt')
    with pytest.raises(ValueError, match='not a checkpoint of ours'):
        run.load_model(str(tmp_path))


def test_a_full_disk_is_one_line_and_leaves_nothing_half(world):
    """A limit on the size of files stands for the disk: the checkpoint that was there stays, no temporary file remains."""
    limit = 'import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, -1))'
    code = f'{limit}; import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name="__main__")'
    args = [*TINY, '--max_iters=2', '--n_embd=64', '--n_layer=4', '--out_dir=full']
    r = subprocess.run([sys.executable, '-c', code, os.path.join(ROOT, 'sft.py'), *args], cwd=world, capture_output=True, text=True, env=env())
    assert r.returncode == 2 and 'full/ckpt.pt' in r.stderr and r.stderr.count('\n') == 1, r.stderr
    assert sorted(os.listdir(world / 'full')) == ['.lock', 'log.jsonl', 'samples.jsonl']


@pytest.mark.skipif(os.geteuid() != 0, reason='only root can become another user')
def test_a_folder_that_may_not_be_read_is_said(tmp_path):
    GPT(GPTConfig(vocab_size=16, block_size=8, n_layer=1, n_head=1, n_embd=16)).save_pretrained(tmp_path / 'm')
    os.chmod(tmp_path / 'm', 0o700)
    for folder in (tmp_path, *tmp_path.parents):
        if str(folder).startswith('/tmp/'):
            os.chmod(folder, 0o755)
    code = f'import os, run; os.setuid(65534); run.load_model({str(tmp_path / "m")!r})'
    r = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert 'Permission denied' in r.stderr.splitlines()[-1], r.stderr


@pytest.mark.parametrize('device', ['cuda', 'cuda:1', 'mps', 'gpu', 'cpu:0', ''])
def test_a_device_that_is_not_here_is_one_line(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match='not here; this torch sees cpu'):
        run.pick_device(device, 'auto')


def test_the_second_card_becomes_the_current_one(monkeypatch):
    """Played: streams, events and graphs are made on torch's current device, so the chosen one has to be it."""
    chosen = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda *a, **k: True)
    assert run.pick_device('cuda:1', 'auto') == (torch.device('cuda:1'), torch.bfloat16)
    run.pick_device('auto', 'float32')
    assert [str(d) for d in chosen] == ['cuda:1', 'cuda']
    with pytest.raises(ValueError, match='cuda:2.*cpu, cuda:0, cuda:1'):
        run.pick_device('cuda:2', 'auto')


def test_a_gpu_that_torch_cannot_use_is_spoken_of(monkeypatch, capsys):
    exists = os.path.exists
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(os.path, 'exists', lambda path: path == '/dev/nvidia0' or exists(path))
    assert run.pick_device('auto', 'auto')[0].type == 'cpu'
    assert '/dev/nvidia0 is there, but this torch' in capsys.readouterr().err
    run.pick_device('cpu', 'auto')
    assert capsys.readouterr().err == ''


@pytest.mark.parametrize('error', [
    'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 8.00 GiB")',
    'RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 9 bytes")',
    'MemoryError()'], ids=['cuda', 'cpu', 'python'])
def test_out_of_memory_is_one_line_with_what_helps(world, error):
    code = (f'import runpy, sys, torch, model\ndef full(*a, **k): raise {error}\nmodel.GPT.hidden = full\n'
            'sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name="__main__")')
    args = [sys.executable, '-c', code, os.path.join(ROOT, 'sft.py'), *TINY, '--max_iters=1', '--overwrite=True', '--out_dir=oom']
    r = subprocess.run(args, cwd=world, capture_output=True, text=True, env=env())
    assert r.returncode == 2 and r.stderr.startswith('error: out of memory') and r.stderr.count('\n') == 1, r.stderr
    assert 'micro_tokens (now 8192)' in r.stderr and 'the plan was 0.0' in r.stderr
