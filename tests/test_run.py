"""What every stage does around its algorithm: the folder's lock, checkpoints cut short, full disks, signals, words for the device."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
from conftest import ROOT
from helpers import jsonl, stage

import lora
import parallel
import run
from model import GPT, GPTConfig
from tokenizer import get_tokenizer

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
    for args in (['--overwrite=True'], ['--init_from=resume', '--eval_only=True']):
        _, err = finished(start(world, '--max_iters=3', '--out_dir=one', *args), rc=2)
        assert 'is being written by a run right now' in err and err.count('\n') == 1
    (world / 'link').symlink_to('one')  # the folder by another name
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
    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', lambda including_emulation=True: including_emulation)
    assert run.pick_device('cuda:0', 'auto')[1] == torch.float16  # a T4, which only emulates bfloat16
    run.pick_device('auto', 'float32')
    assert [str(d) for d in chosen] == ['cuda:1', 'cuda:0', 'cuda']
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


@pytest.mark.parametrize('env,says', [
    (dict(WORLD_SIZE='2'), 'WORLD_SIZE is 2 in the environment, but RANK, MASTER_ADDR, MASTER_PORT is not'),
    (dict(WORLD_SIZE='2', RANK='0', MASTER_ADDR='localhost'), 'but MASTER_PORT is not'),
    (dict(WORLD_SIZE='two'), "WORLD_SIZE is 'two'"), (dict(WORLD_SIZE='0'), "WORLD_SIZE is '0'")])
def test_half_an_environment_of_torchrun_is_said(monkeypatch, env, says):
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    with pytest.raises(ValueError, match=says):
        parallel.init()


MAC = """
import builtins, os, sys, sysconfig, requests, tiktoken, torch, zoneinfo, torch.distributed, torch._dynamo
sysconfig.get_config_vars()
sys.modules['triton'] = None
for name in ('memfd_create', 'sched_getaffinity', 'eventfd', 'pidfd_open', 'posix_fallocate', 'getrandom'):
    if hasattr(os, name):
        delattr(os, name)
sysconf, opened, exists, isdir = os.sysconf, builtins.open, os.path.exists, os.path.isdir
def asked(name):
    if name in ('SC_AVPHYS_PAGES', 'SC_PAGE_SIZE'):
        raise ValueError('unrecognized configuration name')
    return sysconf(name)
def no_proc(path, *args, **kw):
    if str(path).startswith(('/proc', '/dev/shm')):
        raise FileNotFoundError(2, 'No such file or directory', path)
    return opened(path, *args, **kw)
os.sysconf, builtins.open = asked, no_proc
os.sysconf_names = {k: v for k, v in os.sysconf_names.items() if k not in ('SC_AVPHYS_PAGES', 'SC_PAGE_SIZE')}
os.path.exists = lambda path: not str(path).startswith('/proc') and exists(path)
os.path.isdir = lambda path: not str(path).startswith('/proc') and isdir(path)
sys.platform = 'darwin'
import runpy
for line in sys.stdin:
    sys.argv = line.split()
    runpy.run_path(sys.argv[0], run_name='__main__')
"""


def test_every_stage_runs_without_what_linux_alone_has(tmp_path):
    """Played: no /proc, no SC_AVPHYS_PAGES, no memfd, no affinity, no Triton; each stage takes two iterations."""
    (tmp_path / 'text.jsonl').write_text(''.join(f'{{"text": "row {i} of text"}}\n' for i in range(12)))
    pair = '{{"prompt": "a{0}:", "chosen": "good", "rejected": "bad{0}", "completion": "x{0}", "label": {1}}}\n'
    (tmp_path / 'pairs.jsonl').write_text(''.join(pair.format(i, ('true', 'false')[i % 2]) for i in range(12)))
    (tmp_path / 'sums.py').write_text('def reward(prompt, completion, row):\n    return float(len(completion) % 5)\n')
    tail = '--dataset=pairs.jsonl --val_dataset=pairs.jsonl --init_from=base --max_iters=2 --eval_iters=1 --batch_size=4 --device=cpu'
    rl = f'{tail} --reward=sums.py --minibatch_size=4 --max_new_tokens=4'
    lines = [f'sft.py {" ".join(TINY)} --max_iters=2 --out_dir=base',
             f'reward.py {tail} --out_dir=rm --normalize=responses', f'dpo.py {tail} --out_dir=dpo --eval_samples=2 --max_new_tokens=4',
             f'kto.py {tail} --out_dir=kto --eval_samples=2 --max_new_tokens=4', f'ppo.py {rl} --out_dir=ppo',
             f'grpo.py {rl} --group_size=2 --out_dir=grpo', 'infer.py --init_from=ppo --start=a1: --max_new_tokens=4 --device=cpu']
    text = ''.join(os.path.join(ROOT, line) + '\n' for line in lines)
    r = subprocess.run([sys.executable, '-c', MAC], input=text, cwd=tmp_path, capture_output=True, text=True, env=env())
    assert r.returncode == 0, r.stderr[-2000:]
    assert all((tmp_path / name / 'ckpt.pt').exists() for name in ('base', 'rm', 'dpo', 'kto', 'ppo', 'grpo'))


SHAPES = {'gpt2': dict(arch='gpt2'), 'qwen3': dict(arch='qwen3', n_layer=28, n_head=16, n_kv_head=8, head_size=128, n_embd=1024, n_inner=3072,
                                                   vocab_size=151936, block_size=40960)}


def test_the_plan_is_compared_with_the_card(monkeypatch, capsys):
    """A card that is played: what training will take is kept free of keys and values, what exceeds the card
    is said with the keys that help."""
    import collections
    import types
    from model import GPT, GPTConfig
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, vocab_size=64, block_size=64))
    config = dict(tp=1, cp=1, checkpointing=False, micro_tokens=512, max_num_seqs=8)
    mesh = types.SimpleNamespace(words=lambda: '')
    fake = types.SimpleNamespace(device=torch.device('cuda'), config=config, networks={'model': (model,)}, mesh=mesh,
                                 memory=collections.Counter(weights=10**9, grads=2 * 10**9, adam=4 * 10**9), dtype='',
                                 threads=1, n_params=1, n_trained=1)
    monkeypatch.setattr(run.kernels, 'logits_bytes', lambda device, tokens, words: 8 * tokens * words)
    monkeypatch.setattr(run.kernels, 'which', lambda: 'played')
    for name in ('savers', 'of_a_step'):
        setattr(fake, name, getattr(run.Run, name).__get__(fake))
    step = sum(fake.of_a_step(512, 64).values())
    assert step > run.activation_bytes(model.config, 512, 64) > 0
    card = 24 * 10**9
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (20 * 10**9, card))
    assert run.Run.kv_memory(fake, 512, 64) == int(20e9 - 6e9 - step - 1.2e9)
    config['checkpointing'] = True  # keeps less for the backward, so more for the cache
    assert run.Run.kv_memory(fake, 512, 64) > int(20e9 - 6e9 - step - 1.2e9)
    run.Run.plan(fake, 512, 64, kv=10**9)
    assert 'more than the card' not in capsys.readouterr().out
    run.Run.plan(fake, 512, 64, kv=20 * 10**9)
    said = capsys.readouterr().out
    assert 'that is 3.0' in said and 'lower micro_tokens (now 512), checkpointing (now True)' in said
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (10**9, card))
    assert run.Run.kv_memory(fake, 512, 64) == 1  # one block: the plan then says what is too much
    fake.device = torch.device('cpu')
    assert run.Run.kv_memory(fake, 512, 64) == 0


def planned(config):
    """Bytes that the memory plan of a run by this config file adds up, on a GPU; PPO has two trained networks and two frozen."""
    keys = dict(micro_tokens=8192, max_num_seqs=0, max_prompt=0, max_new_tokens=0, dtype_bytes=4)
    with open(os.path.join(ROOT, config), encoding='utf-8') as f:
        exec(f.read(), {}, keys)
    with torch.device('meta'):
        model = GPT(GPTConfig.of(**SHAPES['qwen3' if 'qwen3' in config else 'gpt2']))
    if keys.get('lora_r'):
        lora.add_lora(model, keys['lora_r'], 1.0, 0.0, keys.get('lora_targets', ''))
    c, part = model.config, parallel.plan(model)
    weights, trained = part['weights'], part['weights'] + part['gradients'] + part['optimizer']
    several = {'ppo': 2 * trained + 2 * weights, 'dpo': trained + weights, 'grpo': trained + weights // 2}
    networks = several.get(os.path.basename(config).split('_')[0], trained)
    activations = run.activation_bytes(c, keys['micro_tokens'], 512)
    cached = keys['max_num_seqs'] * (keys['max_prompt'] + keys['max_new_tokens'])
    cache = 2 * 2 * c.n_layer * c.n_kv_head * c.head_size * cached  # keys and values in two bytes
    return networks + activations + cache + min(2 << 30, 4 * keys['micro_tokens'] * c.vocab_size)


def test_each_config_fits_the_memory_that_readme_promises():
    with open(os.path.join(ROOT, 'README.md'), encoding='utf-8') as f:
        rows = re.findall(r'^\| [^|]+\|([^|]+)\| (\d+) GB \|', f.read(), re.M)
    configs = [(config, int(size)) for commands, size in rows for config in re.findall(r'config/\w+\.py', commands)]
    assert len(configs) >= 5
    for config, size in configs:
        assert 0.1 * size * 1e9 < planned(config) < size * 1e9, (config, planned(config) / 1e9)


# ---- the log, elsewhere; out of the project ----------------------------------------------------------------------


def sft_args(out, *more):
    return ['sft.py', '--dataset=text.jsonl', '--val_dataset=text.jsonl', '--tokenizer=byte', '--n_layer=1', '--n_head=2', '--n_embd=16',
            '--batch_size=4', '--eval_interval=2', '--device=cpu', f'--out_dir={out}', *more]


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
    d = tmp_path_factory.mktemp('elsewhere')
    jsonl(d / 'text.jsonl', [dict(text=f'row {i} of text') for i in range(12)])
    (d / 'mine.py').write_text('import json\ndef log(step, split, metrics):\n    open("mine.jsonl", "a").write(json.dumps([step, split, metrics]) + "\\n")\n')
    (d / 'breaks.py').write_text('def log(step, split, metrics):\n    1 / (step < 2)\n')
    return d


def numbers_of(out):
    rows = [json.loads(line) for line in open(out / 'log.jsonl', encoding='utf-8')]
    return {(row['split'], key, row['step']): value for row in rows if row['split'] != 'config'
            for key, value in row.items() if key not in ('step', 'split', 'time') and isinstance(value, (int, float))}


def test_rows_go_where_log_to_says(texts, capsys):
    """Also after a resume from an earlier checkpoint: every number of log.jsonl once, and no other."""
    accumulator = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    out = texts / 'out-log'
    stage(*sft_args('out-log', '--max_iters=4', '--log_to=tensorboard, mine.py'), cwd=texts)
    assert {(row[1], key, row[0]) for row in map(json.loads, open(texts / 'mine.jsonl', encoding='utf-8')) for key in row[2]} == set(numbers_of(out))
    shutil.copy(out / 'ckpt.pt', texts / 'at4.pt')
    stage(*sft_args('out-log', '--max_iters=7', '--init_from=resume', '--log_to=tensorboard'), cwd=texts)
    shutil.copy(texts / 'at4.pt', out / 'ckpt.pt')
    stage(*sft_args('out-log', '--max_iters=6', '--init_from=resume', '--log_to=tensorboard'), cwd=texts)
    seen = accumulator.EventAccumulator(str(out), size_guidance=dict(scalars=0)).Reload()
    found = {(*tag.split('/', 1), event.step): event.value for tag in seen.Tags()['scalars'] for event in seen.Scalars(tag)}
    want = numbers_of(out)
    assert found.keys() == want.keys() and max(step for _, _, step in want) == 6
    assert all(found[key] == pytest.approx(value, rel=1e-6) for key, value in want.items())


def test_a_logger_that_fails_does_not_end_the_run(texts, monkeypatch):
    said = stage(*sft_args('out-breaks', '--max_iters=4', '--log_to=breaks.py'), cwd=texts)
    assert said.count('log_to breaks.py failed at step 2 (ZeroDivisionError') == 1 and 'done:' in said
    for name, says in (('nowhere', "expected 'tensorboard', 'wandb'"), ('gone.py', 'no such file'), ('text.jsonl', 'expected')):
        with pytest.raises(ValueError, match=says):
            stage(*sft_args('out-no', '--max_iters=1', f'--log_to={name}'), cwd=texts)
    monkeypatch.setitem(sys.modules, 'wandb', None)
    with pytest.raises(ValueError, match='pip install wandb'):
        stage(*sft_args('out-no', '--max_iters=1', '--log_to=wandb'), cwd=texts)


def test_wandb_gets_the_config_and_goes_on_when_resumed(texts, monkeypatch):
    calls, rows = [], []

    def init(**options):
        calls.append(options)
        return types.SimpleNamespace(log=lambda row, step: rows.append((step, row)))
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
    stage(*sft_args('out-w', '--max_iters=2', '--log_to=wandb'), cwd=texts)
    stage(*sft_args('out-w', '--max_iters=4', '--init_from=resume', '--log_to=wandb'), cwd=texts)
    assert calls[0]['id'] == calls[1]['id'] and calls[0]['resume'] is None and calls[1]['resume'] == 'allow'
    assert calls[0]['config']['max_iters'] == 2 and [step for step, _ in rows] == [0, 0, 1, 2, 2, 3, 4]
    assert {'train/loss', 'train/lr', 'train/tok_per_s'} <= rows[1][1].keys() and 'eval/loss' in rows[0][1]


def test_export(texts):
    """What leaves opens in transformers and PEFT, to the same log-probs; the reward model keeps its head."""
    transformers, peft = pytest.importorskip('transformers'), pytest.importorskip('peft')
    stage(*sft_args('out-base', '--max_iters=3'), cwd=texts)
    stage('sft.py', '--dataset=text.jsonl', '--val_dataset=text.jsonl', '--init_from=out-base', '--out_dir=out-lora', '--batch_size=4', '--device=cpu',
          '--max_iters=3', '--lora_r=4', '--learning_rate=1e-1', cwd=texts)
    here = os.getcwd()
    os.chdir(texts)
    try:
        run.export('out-lora', 'merged')
        run.export('out-lora', 'adapter', adapter=True)
        ids = torch.tensor([[104, 101, 108, 108, 111]])
        want = run.load_model('out-lora')[0].eval()(ids)[0]
        tok = transformers.AutoTokenizer.from_pretrained('merged')
        assert tok('hello')['input_ids'] == ids[0].tolist() and tok.decode(ids[0]) == 'hello'
        merged = transformers.AutoModelForCausalLM.from_pretrained('merged')
        adapted = peft.AutoPeftModelForCausalLM.from_pretrained('adapter')
        plain = run.load_model('out-base')[0].eval()(ids)[0]
        for model in (merged, adapted):
            assert (model.eval()(ids).logits - want).abs().max() < 1e-5 < (want - plain).abs().max()
        run.export('merged', 'half', dtype='bfloat16')
        assert transformers.AutoModelForCausalLM.from_pretrained('half', dtype='auto').dtype == torch.bfloat16
        scalar = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, vocab_size=257, block_size=32), 'scalar')
        scalar.save_pretrained('rm')
        get_tokenizer('byte').save('rm')
        run.export('rm', 'rm2')
        assert transformers.AutoModelForSequenceClassification.from_pretrained('rm2').config.num_labels == 1
        for args, says in ((('out-base', 'merged'), 'new or empty'), (('out-base', ''), 'new or empty'), (('out-base', 'x', True), 'without an adapter')):
            with pytest.raises(ValueError, match=says):
                run.export(*args)
    finally:
        os.chdir(here)
