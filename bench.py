"""Every speed figure that the README states, each by one command; every figure is a ratio to a named peer in the same run.

    python bench.py kernels | data | infer | actors | async | staleness | parallel | train | neighbour     # one section
    python bench.py all                         # one after the other; but for staleness, which draws a picture

A peer that is not installed is named and skipped. Machines are noisy: sides alternate, the median of the rounds counts.
"""
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time


def alternate(sides, rounds=3):
    """{name: fn() -> rate} run in turn `rounds` times -> {name: median rate}. Turns, not blocks: drift hits all sides."""
    seen = {name: [] for name in sides}
    for _ in range(rounds):
        for name, fn in sides.items():
            seen[name].append(fn())
    return {name: sorted(rates)[len(rates) // 2] for name, rates in seen.items()}


# one function a section, `bench_<section>(args)`, args = the words behind the section's name

def _data_rows(n, seed=0):
    """n made-up preference rows as JSON lines, about 650 bytes each."""
    import json
    import random
    r = random.Random(seed)
    words = [''.join(r.choice('etaoinshrdlucmf') for _ in range(r.randrange(2, 9))) for _ in range(3000)] + ['naïve', '日本', 'caf\u00e9']
    text = [' '.join(r.choices(words, k=r.randrange(10, 60))) for _ in range(4000)]
    for i in range(n):
        yield json.dumps({'prompt': f'{i} {r.choice(text)}', 'chosen': r.choice(text), 'rejected': r.choice(text)}, ensure_ascii=False) + '\n'


def _data_jobs(side, folder, n):
    """What one side does: {name: (rows it handles, function)}."""
    import functools
    import numpy as np
    path, table = os.path.join(folder, 'rows.jsonl'), os.path.join(folder, side)
    if side == 'json.loads':
        def load():
            with open(path, 'rb') as f:
                for line in f:
                    json.loads(line)
        return {'load': (n, load)}
    if side == 'ours':
        from dataset import load_dataset
        load, open_table = functools.partial(load_dataset, path), functools.partial(load_dataset, table)
    else:
        import datasets
        datasets.disable_progress_bars()
        open_table = functools.partial(datasets.load_from_disk, table)

        def load():
            with tempfile.TemporaryDirectory() as cache:  # an empty one: nothing is found there
                return datasets.load_dataset('json', data_files=path, split='train', cache_dir=cache)
    opened = functools.cache(open_table)  # by the first round, which the median leaves out
    places = np.random.default_rng(0).integers(0, n, 10_000).tolist()
    some = min(n, 100_000)

    def random_rows():
        for i in places:
            opened()[i]

    def slices():
        for i in range(0, some, 32):
            opened()[i:i + 32]

    def iterate():
        for _ in opened().select(range(some)):
            pass
    return {'open': (1, open_table), 'random rows': (len(places), random_rows),
            'slices of 32': (some, slices), 'iterate': (some, iterate), 'load': (n, load)}


def _data_peak(side, job, folder, n):
    """Run by a process of its own: prints the MB that a job adds at its peak to what the imports take; the
    parts of mapped files that it touched count. Linux."""
    def resident(key):
        with open('/proc/self/status') as f:
            return int(next(line for line in f if line.startswith(key)).split()[1])
    work = _data_jobs(side, folder, n)[job][1]
    with open('/proc/self/clear_refs', 'w') as f:
        f.write('5')  # the peak counts from here
    base = resident('VmRSS')
    held = work()  # what it has made is alive at the end
    print(max(resident('VmHWM') - base, 0) // 1024, file=sys.stderr)
    del held


def _data_lists(path):
    """The peer of a stage's start: all rows encoded into Python lists."""
    from dataset import load_dataset
    from tokenizer import encode_row, get_tokenizer
    tok = get_tokenizer('byte')
    print(sum(len(encoded[0]) for encoded in [encode_row(row, tok) for row in load_dataset(path)]))


def _data_stage(folder, n):
    """Prints seconds and peak memory of one step of sft.py on n rows: the first start, which encodes them,
    and the next, which maps what the first has written; beside the same rows encoded into Python lists."""
    path = os.path.join(folder, 'sft.jsonl')
    with open(path, 'w', encoding='utf-8') as f:
        for line in _data_rows(n):
            row = json.loads(line)
            f.write(json.dumps({'prompt': row['prompt'], 'completion': row['chosen']}) + '\n')
    model = ['--tokenizer=byte', '--n_layer=1', '--n_head=1', '--n_embd=16', '--block_size=1024', '--device=cpu']
    run = ['--max_iters=1', '--batch_size=8', '--eval_iters=1', '--overwrite', f'--out_dir={folder}/out']
    stage = [sys.executable, 'sft.py', f'--dataset={path}', *model, *run]
    lists = [sys.executable, '-c', f'import bench; bench._data_lists({path!r})']
    for name, command in (('in lists', lists), ('first start', stage), ('second start', stage)):
        begin = time.perf_counter()
        child = subprocess.Popen(command, cwd=os.path.dirname(os.path.abspath(__file__)), stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        if status:
            raise RuntimeError(f'{name}: {" ".join(command)} ended with {status}')
        seconds, peak = time.perf_counter() - begin, usage.ru_maxrss / 1024
        print(f'sft.py, {n:,} rows, {name:12} {seconds:6.1f} s | {peak:,.0f} MB', flush=True)


def bench_data(args):
    """dataset.py against HF datasets and bare json.loads, speed and peak memory, then the start of a stage:
    python bench.py data [rows=500000]."""
    from dataset import load_dataset
    n, sides = int(args[0]) if args else 500_000, ['ours', 'json.loads', 'HF']
    try:
        import datasets
    except ImportError:
        sides.remove('HF')
        print('datasets is not installed: its side is skipped (pip install -r requirements-test.txt)')

    def rate(count, work):
        def measure():
            start = time.perf_counter()
            work()
            return count / (time.perf_counter() - start)
        return measure

    def peak(side, job, folder):
        command = f'import bench; bench._data_peak({side!r}, {job!r}, {folder!r}, {n})'
        done = subprocess.run([sys.executable, '-c', command], capture_output=True, text=True,
                              cwd=os.path.dirname(os.path.abspath(__file__)))
        if done.returncode:
            raise RuntimeError(f'{side}, {job}: {done.stderr[-2000:]}')
        return done.stderr.split()[-1]

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'rows.jsonl')
        with open(path, 'w', encoding='utf-8') as f:
            f.writelines(_data_rows(n))
        print(f'{n:,} preference rows, {os.path.getsize(path) / 1e6:.0f} MB of JSON lines: rows/s, median of '
              f'3, sides in turn; peak MB above the imports')
        load_dataset(path).save_to_disk(os.path.join(folder, 'ours'))
        if 'HF' in sides:  # each side opens what it has written
            datasets.load_from_disk(os.path.join(folder, 'ours')).save_to_disk(os.path.join(folder, 'HF'))
        jobs = {side: _data_jobs(side, folder, n) for side in sides}
        for job in jobs['ours']:
            found = alternate({side: rate(*jobs[side][job]) for side in sides if job in jobs[side]})
            said = f'{job:13}'
            for side, value in found.items():
                memory = f' {peak(side, job, folder)} MB' if os.path.exists('/proc/self/clear_refs') else ''
                said += f'{side} {value:,.0f}{memory} | '
            others = [f'{found["ours"] / value:.2f}x {side}' for side, value in found.items() if side != 'ours']
            print(said + ', '.join(others), flush=True)
        _data_stage(folder, n)


def _actors_pss(pids):
    """MB of memory that these processes hold, shared pages split among their users; Ray's daemons counted, ours have none."""
    total = 0
    for pid in pids:
        try:
            total += sum(int(line.split()[1]) for line in open(f'/proc/{pid}/smaps_rollup') if line.startswith('Pss:'))
        except OSError:
            continue
    return total / 1024


def _actors_descendants(pid):
    rows = {}
    for p in filter(str.isdigit, os.listdir('/proc')):
        try:
            rows.setdefault(int(open(f'/proc/{p}/stat').read().rpartition(')')[2].split()[1]), []).append(int(p))
        except OSError:
            continue
    found, todo = [], [pid]
    while todo:
        children = rows.get(todo.pop(), [])
        found += children
        todo += children
    return found


_ACTORS_START = """
import time, sys, os
t = time.perf_counter()
sys.path.insert(0, {root!r})
import {name} as rt
rt.init(num_cpus=2{options})
@rt.remote
def f(x): return x
@rt.remote
class A:
    def pid(self): return os.getpid()
assert rt.get(f.remote(1)) == 1
first = time.perf_counter() - t
t = time.perf_counter()
handles = [A.remote() for _ in range(4)]
rt.get([h.pid.remote() for h in handles])
print(first, (time.perf_counter() - t) / 4)
import bench
print(bench._actors_pss(bench._actors_descendants(os.getpid())))
import numpy as np
blob = np.ones(100 << 20, np.uint8)
t = time.perf_counter()
kept = [rt.put(blob) for _ in range(6)]
print(6 * blob.nbytes / 1e9 / (time.perf_counter() - t))
"""


def bench_actors(args):
    """actors.py beside Ray in one run on this machine: calls a second, GB/s into the store, start-up, memory. Same functions, sides alternate."""
    import numpy as np
    import actors
    try:
        import ray
    except ImportError:
        ray = print('ray is not installed: its side is skipped')
    os.environ.pop('OMP_NUM_THREADS', None)
    quiet = dict(include_dashboard=False, logging_level='error', log_to_driver=False)
    sides = {'actors': (actors, {}), **({'ray': (ray, quiet)} if ray else {})}
    work, blob = {}, np.random.default_rng(0).integers(0, 255, 100 << 20, np.uint8)
    for name, (rt, options) in sides.items():
        rt.init(num_cpus=2, object_store_memory=1 << 30, **options)
        @rt.remote
        def task(x):
            return x
        @rt.remote
        class Actor:
            def call(self, x):
                return x
            def total(self, a):
                return int(a[::4096].sum())
        work[name] = rt, task, Actor.remote()

    def rate(n, once):
        once(n // 10 + 1)
        t = time.perf_counter()
        once(n)
        return n / (time.perf_counter() - t)

    def put(rt, n, blob=blob):
        for _ in range(n):
            rt.put(blob)

    cases = {
        'tasks, one by one (1/s)': lambda rt, f, a: rate(500, lambda n: [rt.get(f.remote(i)) for i in range(n)]),
        'tasks, all at once (1/s)': lambda rt, f, a: rate(2000, lambda n: rt.get([f.remote(i) for i in range(n)])),
        'actor calls, one by one (1/s)': lambda rt, f, a: rate(1000, lambda n: [rt.get(a.call.remote(i)) for i in range(n)]),
        'actor calls, pipelined (1/s)': lambda rt, f, a: rate(5000, lambda n: rt.get([a.call.remote(i) for i in range(n)])),
        **{f'put {mb} MB (GB/s)': lambda rt, f, a, part=blob[:mb << 20]: rate(256, lambda n: put(rt, n, part)) * part.nbytes / 1e9 for mb in (1, 4, 16)},
        'put 100 MB (GB/s)': lambda rt, f, a: rate(8, lambda n: put(rt, n)) * blob.nbytes / 1e9,
        'put 100 MB and read it in an actor (GB/s)': lambda rt, f, a: rate(5, lambda n: [rt.get(a.total.remote(rt.put(blob))) for _ in range(n)]) * blob.nbytes / 1e9,
        'get 100 MB (1/s)': lambda rt, f, a: (lambda ref: rate(100, lambda n: [rt.get(ref) for _ in range(n)]))(rt.put(blob)),
    }
    print(f'{"":44}' + ''.join(f'{name:>12}' for name in sides) + '       ratio')
    for case, run in cases.items():
        seen = alternate({name: lambda name=name: run(*work[name]) for name in sides})
        print(f'{case:44}' + ''.join(f'{seen[name]:12.1f}' for name in sides) + (f'{seen["actors"] / seen["ray"]:11.1f}x' if ray else ''))
    for rt, _, _ in work.values():
        rt.shutdown()
    del work
    starts = {}
    for _ in range(3):
        for name, (rt, options) in sides.items():
            code = _ACTORS_START.format(root=os.path.dirname(os.path.abspath(__file__)), name=name, options=''.join(f', {k}={v!r}' for k, v in options.items()))
            out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
            starts.setdefault(name, []).append([float(x) for x in out])
    for i, case in enumerate(('start to first result (s)', 'start of an actor, 4 at once (s each)', 'memory of workers and daemons, 4 actors (MB)', 'put 100 MB into fresh memory, all kept (GB/s)')):
        seen = {name: sorted(row[i] for row in rows)[1] for name, rows in starts.items()}
        times = lambda: seen['actors'] / seen['ray'] if 'GB/s' in case else seen['ray'] / seen['actors']
        print(f'{case:44}' + ''.join(f'{seen[name]:12.3f}' for name in sides) + (f'{times():11.1f}x' if ray else ''))


def _async_run(folder, script, args, apart=True):
    """One run of a stage on one thread -> its log rows; a finished one is kept, a broken one begins anew. apart: in a process of its own, which is
    fair to a clock; else in this one, since importing torch takes longer than a small run."""
    import contextlib
    import io
    import json
    import runpy
    here, log = os.path.dirname(os.path.abspath(__file__)), os.path.join(folder, 'log.jsonl')
    read = lambda: [json.loads(line) for line in open(log)] if os.path.exists(log) else []
    rows, argv = read(), [os.path.join(here, script), *args, f'--out_dir={folder}', '--device=cpu', '--threads=1', '--overwrite']
    if rows and rows[-1]['split'] == 'eval' and rows[-1]['step'] == rows[0]['max_iters']:
        return rows
    if apart:
        done = subprocess.run([sys.executable, *argv], capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        if done.returncode:
            sys.exit(f'error: {folder}: {(done.stderr.strip() or "no message").splitlines()[-1]}')
        return read()
    before = sys.argv, sys.excepthook
    sys.path[:0], sys.argv = [here], argv
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(argv[0], run_name='__main__')
    finally:
        sys.argv, sys.excepthook = before
        del sys.path[0]
    return read()


def _async_args(args, **known):
    """key=value words over the defaults, in order."""
    for word in args:
        key, _, value = word.partition('=')
        if key not in known:
            sys.exit(f'error: {word!r}: expected one of {" ".join(f"{k}={v}" for k, v in known.items())}')
        known[key] = type(known[key])(value)
    return known.values()


def _async_range(values, form):
    values = sorted(values)
    return ' / '.join(format(v, form) for v in (values[0], values[len(values) // 2], values[-1]))


def _staleness_world(out):
    """Words of four letters, to be copied; the demonstrations copy a letter right in 3 of 10 cases and else write the next one of the alphabet.
    The reward is the share of right letters. SFT of a model of 0.1 M parameters on that; RL then has a habit to unlearn: 30 % -> 100 %."""
    import json
    import random
    r, letters = random.Random(0), 'abcdefgh'
    words = [''.join(r.choices(letters, k=4)) for _ in range(4200)]
    slip = lambda w: ''.join(c if r.random() < 0.3 else letters[(letters.index(c) + 1) % 8] for c in w)
    os.makedirs(out, exist_ok=True)
    for name, rows in (('sft', [dict(prompt=w + '=', completion=slip(w)) for w in words[:4000]]), ('train', [dict(prompt=w + '=', word=w) for w in words[:2000]]),
                       ('val', [dict(prompt=w + '=', word=w) for w in words[4000:]])):
        with open(os.path.join(out, f'{name}.jsonl'), 'w') as f:
            f.writelines(json.dumps(row) + '\n' for row in rows)
    with open(os.path.join(out, 'reward.py'), 'w') as f:
        f.write('def reward(prompt, completion, row):\n    return sum(a == b for a, b in zip(completion, row["word"])) / 4 if len(completion) == 4 else 0.0\n')
    _async_run(os.path.join(out, 'sft'), 'sft.py', [f'--dataset={out}/sft.jsonl', '--n_layer=2', '--n_head=4', '--n_embd=64', '--block_size=32', '--batch_size=64',
                                                    '--max_iters=300', '--eval_interval=300', '--learning_rate=3e-3'], apart=False)


def bench_staleness(args):
    """GRPO on samples that are 0, 1, 4, 8 updates old (--simulate_staleness), naive and decoupled objective, 3 seeds -> table and assets/staleness.png."""
    out, iters, lr, seeds = _async_args(args, out='out-staleness', iters=20, learning_rate=3e-4, seeds='1337,2,3')
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    _staleness_world(out)
    ages, runs, seeds = (0, 1, 4, 8), {}, seeds.split(',')
    common = [f'--init_from={out}/sft', f'--dataset={out}/train.jsonl', f'--val_dataset={out}/val.jsonl', f'--reward={out}/reward.py', '--batch_size=128', '--minibatch_size=64',
              f'--max_iters={iters}', '--eval_interval=5', '--eval_iters=200', '--eval_k=1', '--max_new_tokens=5', f'--learning_rate={lr}', '--warmup_iters=3', '--max_num_seqs=128', '--track_kl=False']
    for seed in seeds:
        for age in ages:
            for kind in ('naive', 'decoupled'):
                mode = ['--mode=async', f'--simulate_staleness={age}'] if age else []
                rows = _async_run(os.path.join(out, f'{kind}-{age}-{seed}'), 'grpo.py', [*common, *mode, f'--decoupled={kind == "decoupled"}', f'--seed={seed}'], apart=False)
                runs.setdefault((kind, age), []).append([r for r in rows if r['split'] == 'eval'])
                print(f"seed {seed}, staleness {age}, {kind}: {rows[-1]['score']:.1%} of held-out letters right", flush=True)
    print(f"\nheld-out letters right after {iters} updates (from {runs['naive', 0][0][0]['score']:.1%}), min / median / max of {len(seeds)} seeds, learning rate {lr:g}\n")
    print('| samples are old by | ' + ' | '.join(f'{a} update{"s" * (a != 1)}' for a in ages) + ' |\n|' + ' --- |' * (len(ages) + 1))
    for kind in ('naive', 'decoupled'):
        print(f'| {kind} | ' + ' | '.join(_async_range([r[-1]['score'] for r in runs[kind, a]], '.1%') for a in ages) + ' |')
    fig, axes = plt.subplots(1, 2, figsize=(10.4, 3.6), dpi=120, sharey=True)
    for axis, kind in zip(axes, ('naive', 'decoupled')):
        for color, age in zip(('#08519c', '#41ab5d', '#fd8d3c', '#cb181d'), ages):
            for i, rows in enumerate(runs[kind, age]):
                axis.plot([r['step'] for r in rows], [r['score'] for r in rows], 'o-', ms=3, color=color, lw=1.1, alpha=0.8, label=f'{age} update{"s" * (age != 1)} old' if i == 0 else None)
        axis.set_title('naive: the ratio to the sampler' if kind == 'naive' else 'decoupled: the ratio to the policy before the update', fontsize=10)
        axis.set_xlabel('GRPO update')
        axis.set_xticks(range(0, iters + 1, 5))
        axis.spines[['top', 'right']].set_visible(False)
        axis.set_ylim(0, 1)
    axes[0].set_ylabel('held-out letters right')
    axes[0].legend(loc='lower right', frameon=False, fontsize=8, title='samples')
    fig.tight_layout()
    fig.savefig(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'assets', 'staleness.png'))


def bench_async(args):
    """GRPO with its rollouts in the same process (sync) and in workers ahead of it (async), in turn: accuracy, samples/s, the trainer's idle share. On copying
    words with a reward that takes reward_ms an answer (a judge elsewhere); init_from=out-sft: on the toy sums, whose reward costs nothing."""
    out, init_from, iters, staleness, workers, judges, ms, seeds = _async_args(args, out='out-async', init_from='', iters=40, max_staleness=1, rollout_workers=1, reward_workers=4,
                                                                               reward_ms=5.0, seeds='1337,2,3')
    here, common = os.path.dirname(os.path.abspath(__file__)), [f'--max_iters={iters}', f'--eval_interval={iters}', '--batch_size=128', '--minibatch_size=64']
    if not init_from:
        _staleness_world(out)
        with open(os.path.join(out, 'reward.py')) as f, open(os.path.join(out, 'judge.py'), 'w') as g:
            g.write(f.read().replace('\n', f'\n    time.sleep({ms / 1000})\n', 1).replace('def', 'import time\ndef', 1))
        common += [f'--init_from={out}/sft', f'--dataset={out}/train.jsonl', f'--val_dataset={out}/val.jsonl', f'--reward={out}/judge.py', '--eval_iters=200', '--eval_k=1',
                   '--max_new_tokens=5', '--learning_rate=3e-4', '--warmup_iters=3', '--max_num_seqs=128', '--track_kl=False']
    elif os.path.exists(os.path.join(init_from, 'ckpt.pt')):
        data = os.path.join(here, 'data', 'toy')
        common = ['config/grpo_toy.py', f'--dataset={data}/arith_train.jsonl', f'--val_dataset={data}/arith_val.jsonl', f'--reward={data}/reward.py', f'--init_from={init_from}', *common]
    else:
        sys.exit(f'error: {init_from}: no checkpoint; bash quickstart.sh makes out-sft (or python data/toy/prepare.py, sft.py config/pretrain_toy.py, sft.py config/sft_toy.py)')
    runs = {'sync': [], 'async': []}
    for seed in seeds.split(','):
        for mode in runs:
            extra = ['--mode=async', f'--max_staleness={staleness}', f'--rollout_workers={workers}', f'--reward_workers={judges}'] if mode == 'async' else []
            runs[mode].append(_async_run(os.path.join(out, f'{mode}-{seed}'), 'grpo.py', [*common, *extra, f'--seed={seed}'], apart=bool(init_from)))
            print(f"seed {seed}, {mode}: score {runs[mode][-1][-1]['score']:.1%}", flush=True)
    print(f'\n{iters} updates of 128 completions, seeds {seeds}, min / median / max; rates from the third update on (the first ones wait for the workers to start)\n')
    print('| rollouts | held-out score | completions/s | trainer idle | staleness, updates |\n| --- | --- | --- | --- | --- |')
    for mode, logs in runs.items():
        trains = [[r for r in rows if r['split'] == 'train'][2:] for rows in logs]
        seconds = lambda rows: sum(r['tokens'] / r['tok_per_s'] for r in rows)
        print(f"| {mode} | {_async_range([rows[-1]['score'] for rows in logs], '.1%')} | {_async_range([128 * len(t) / seconds(t) for t in trains], '.0f')} | "
              f"{_async_range([sum(r['gen_s'] for r in t) / seconds(t) for t in trains], '.0%')} | {_async_range([sum(r.get('staleness', 0) for r in t) / len(t) for t in trains], '.2f')} |")


def _parallel_spawn(world, fn, *args):
    """fn(mesh settings ...) in `world` processes over gloo, one thread each; returns what rank 0 put into the queue."""
    import tempfile, torch.multiprocessing as mp
    queue = mp.get_context('spawn').SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_parallel_enter, (world, folder + '/store', queue, fn, args), nprocs=world)
    return queue.get()


def _parallel_enter(rank, world, store, queue, fn, args):
    import torch, torch.distributed as dist
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group('gloo', store=dist.FileStore(store, world), rank=rank, world_size=world)
    out = fn(rank, *args)
    if rank == 0:
        queue.put(out)


def _parallel_config(name):
    from model import GPTConfig
    qwen = dict(arch='qwen3', vocab_size=151936, block_size=40960, head_size=128, n_kv_head=8, norm='rms', norm_eps=1e-6, pos='rope', rope_theta=1e6,
                act='silu', gated=True, qkv_bias=False, attn_out_bias=False, bias=False, qk_norm=True)
    return GPTConfig(**{'gpt2': {}, 'mid': dict(vocab_size=4096, block_size=512, n_layer=8, n_head=8, n_embd=384),
                        'Qwen3-0.6B': dict(qwen, n_layer=28, n_embd=1024, n_inner=3072, n_head=16),
                        'Qwen3-8B': dict(qwen, n_layer=36, n_embd=4096, n_inner=12288, n_head=32, tie=False)}[name])


def _parallel_steps(rank, name, layout, B, T, micros, steps, overlap=(True,), measure_memory=False):
    """Trains `steps` steps of `micros` microbatches of B x T tokens a replica. -> {overlap: [seconds a step]}, metrics, bytes, planned."""
    import gc, time, torch, parallel
    from model import GPT
    from run import activation_bytes
    idx = torch.randint(0, 4096, (B, T + 1), generator=torch.Generator().manual_seed(0))
    loss_of = lambda model, mb: (model(mb[:, :-1], mb[:, 1:])[1], {})
    torch.manual_seed(0)
    torch.nn.Parameter(torch.zeros(2)).sum().backward()
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))], fused=True).step()  # what torch loads for its first step is not the model's
    before = _parallel_resident()['RssAnon']
    mesh = parallel.init(device='cpu', **layout)
    full = GPT(_parallel_config(name))
    planned = parallel.plan(full, dp=mesh.dp, activations=activation_bytes(full.config, B * T, T), **layout)
    model = parallel.shard(full, mesh)
    seconds, metrics, optimizer = {o: [] for o in overlap}, {}, parallel.Optimizer(model, mesh, 1e-4)
    if measure_memory:  # a first step makes the moments; then the high-water mark is set back
        import ctypes
        parallel.forward_backward(model, optimizer, [idx], loss_of)
        parallel.clip_and_step([optimizer], [1e-4], 1.0)
        gc.collect()
        ctypes.CDLL('libc.so.6').malloc_trim(0)
        with open('/proc/self/clear_refs', 'w') as f:
            f.write('5')
    for step in range(steps * len(overlap)):
        optimizer.overlap = overlap[step % len(overlap)]  # the sides take turns
        mesh.barrier()
        t = time.perf_counter()
        metrics = parallel.forward_backward(model, optimizer, [idx] * micros, loss_of)
        parallel.clip_and_step([optimizer], [1e-4], 1.0)
        seconds[optimizer.overlap].append(time.perf_counter() - t)
    now = _parallel_resident()
    mesh.close()
    return seconds, metrics, now['VmHWM'] - now['RssFile'] - now['RssShmem'] - before, planned  # pages of programs that were read in do not count


def _parallel_resident():
    """Bytes of this process by kind, as Linux counts them: VmHWM (the most so far), RssAnon (memory asked for), RssFile (files mapped) ..."""
    with open('/proc/self/status') as f:
        return {k: int(v.split()[0]) * 1024 for k, v in (line.split(':', 1) for line in f) if v.endswith(' kB\n')}


def _parallel_link(rank, large, rows, width):
    """Between two gloo processes: seconds of the smallest all-reduce, bytes/s of a large one, bytes/s of gathering and scattering (rows, width)
    activations with work in between; medians."""
    import time, torch, parallel
    from statistics import median
    mesh, x, y = parallel.init(device='cpu'), torch.zeros(large), torch.zeros(rows, width)

    def usual(fn):
        out = []
        for _ in range(31):
            t = time.perf_counter()
            fn(mesh.data)
            out.append(time.perf_counter() - t)
        return median(out)
    latency = usual(lambda g: g.all_reduce(x[:1]))
    summed = usual(lambda g: g.all_reduce(x))
    moved = usual(lambda g: (g.all_gather(y[:rows // 2]), y.exp(), g.reduce_scatter(y))) - usual(lambda g: y.exp())
    mesh.close()
    return latency, x.nbytes / (summed - latency), y.nbytes / (moved - 2 * latency)  # each moves half of y, there are two


PARALLEL_FORMULA = """
step = compute + tensor + context + bubble + data + optimizer      S tokens a microbatch, m microbatches, L layers, C width, w bytes a weight, n = dp cp
  compute    m S F / (tp cp) / (peak use)     F of the fullest stage, FLOP a token: 6 x (parameters of its matrices; the last stage has the head) + 12 L/pp nh hs T
  tensor     m 8 (L/pp) [(S C w / cp) (tp - 1) / tp / link + (tp - 1) latency]      all-gather and reduce-scatter, each twice a layer, both ways
  context    m (L/pp) [(2 nkv hs S / cp / tp) ((cp - 1) w + 8 cp) / link + (2 cp - 1) latency]      ring: K, V forth; K, V, dK, dV in float32 back
  bubble     (compute + tensor + context) (pp - 1) / m + 2 m [(S C w / cp / tp) / link + latency]      1F1B, and what it sends
  data       bytes a parameter x P / (tp pp) (n - 1) / n / link + (n - 1) latency a bucket and collective
             gradients  zero 0: 8 (all-reduce of float32)   1: 4   2: 4 m   3: 4 m     weights  1, 2: w, after the step   3: 2 w m
             behind the backward (2/3 of the compute; zero 0 and 1: of the last microbatch, which reduces) the gradients are hidden, with zero 3 behind
             all of the compute gradients and weights; at least a tenth shows
  optimizer  30 bytes (P / (tp pp), zero: / n) / memory bandwidth      gradient, two moments, master, weight
  link       of the node where the axis fits inside (ranks are laid out dp, pp, cp, tp: tp innermost); else the network's, times the ranks of the
             group in one node where each has a network card of its own (data)"""


def _parallel_flops(c, T, pp=1):
    """FLOP a token of forward and backward on the fullest of pp stages (PaLM, appendix B; a table that is only looked up costs none)."""
    attn, ffn = c.n_embd * c.head_size * (2 * c.n_head + 2 * c.n_kv_head), c.n_embd * c.n_inner * (3 if c.gated else 2)
    layers = [c.n_layer * (i + 1) // pp - c.n_layer * i // pp for i in range(pp)]
    return max(n * (6 * (attn + ffn) + 12 * c.n_head * c.head_size * T) + (6 * c.n_embd * c.vocab_size if i == pp - 1 else 0) for i, n in enumerate(layers))


def _parallel_predict(c, P, layout, dp, S, T, m, chip):
    """Seconds of one step by PARALLEL_FORMULA, by part. chip: flops = peak x use, link bytes/s in and between nodes, ranks a node, latency s, weight
    bytes w, memory bytes/s, overlap (1: communication runs beside the compute, 0: it does not)."""
    tp, pp, cp, zero = (layout.get(k, d) for k, d in (('tp', 1), ('pp', 1), ('cp', 1), ('zero', 0)))
    n, w, layers, node, latency = dp * cp, chip['w'], c.n_layer / pp, chip['node'], chip['latency']
    link = lambda ranks: chip['node_link'] if ranks <= node else chip['link']
    compute = m * S * _parallel_flops(c, T, pp) / (tp * cp) / chip['flops']
    tensor = m * 8 * layers * ((S * c.n_embd * w / cp) * (tp - 1) / tp / link(tp) + latency * (tp - 1))
    ring = 2 * max(1, c.n_kv_head / tp) * c.head_size * S / cp * ((cp - 1) * w + 8 * cp) / link(tp * cp) + latency * (2 * cp - 1)
    context = m * layers * ring if cp > 1 else 0.0
    sends = 2 * m * (S * c.n_embd * w / cp / tp / link(tp * cp * pp) + latency) if pp > 1 else 0.0
    inside = max(1, min(cp, node // tp)) * max(1, node // (tp * cp * pp))  # ranks of a data group in one node
    data_link = chip['node_link'] if tp * pp * n <= node else min(chip['node_link'], chip['link'] * inside)
    time = lambda size, times: size * P / (tp * pp) * (n - 1) / n / data_link + (layers + 2) * times * (n - 1) * latency
    grads, weights = time(*{0: (8, 2), 1: (4, 1), 2: (4 * m, m), 3: (4 * m, m)}[zero]), time(*{0: (0, 0), 1: (w, 1), 2: (w, 1), 3: (2 * w * m, 2 * m)}[zero])
    beside, after = (grads + weights, 0.0) if zero == 3 else (grads, weights)
    room = chip['overlap'] * compute * (1 if zero == 3 else 2 / 3 if zero == 2 else 2 / 3 / m)
    return dict(compute=compute, tensor=tensor, context=context, bubble=(compute + tensor + context) * (pp - 1) / m + sends,
                data=max(beside - room, 0.1 * beside) + after, optimizer=30 * P / (tp * pp) / (n if zero else 1) / chip['memory_speed'])


def _parallel_simulate():
    """Predicted step time and memory for GPUs that are not here, best layouts first."""
    import torch, parallel
    from model import GPT
    from run import activation_bytes
    chip = dict(flops=989e12 * 0.45, node=8, node_link=400e9, link=45e9, latency=15e-6, w=2, overlap=1.0, memory=141e9, memory_speed=4.3e12)
    print(PARALLEL_FORMULA)
    print('H200: 989 TFLOP/s bf16 at 45 % use, 141 GB at 4.3 TB/s; NVLink 400 GB/s and one 400 Gbit/s InfiniBand card (45 GB/s) a GPU, one way, as achieved; 15 us.')
    print('Stated assumptions, not measurements: bf16 weights, float32 masters, activations kept, T = 4096, 4 M tokens a step, at most 95 % of memory; in brackets the '
          'memory with the float32 weights that the stages keep.')
    for name in ('Qwen3-0.6B', 'Qwen3-8B'):
        c = _parallel_config(name)
        with torch.device('meta'):
            model = GPT(c)
        P, T, tokens = sum(p.numel() for p in model.parameters()), 4096, 4 << 20
        for world in (8, 64, 512):
            rows = []
            for tp in (1, 2, 4, 8):
                for pp in (1, 2, 4):
                    for cp in (1, 2, 4, 8):
                        dp = world // (tp * pp * cp)
                        if dp * tp * pp * cp != world or tokens % (dp * T):
                            continue
                        m = tokens // (dp * T)  # microbatches of one sequence
                        for zero in (0, 1, 2, 3):
                            layout = dict(tp=tp, pp=pp, cp=cp, zero=zero)
                            need, stages = (parallel.plan(model, dp=dp, itemsize=size, activations=activation_bytes(c, T, T, 2), **layout)['total'] for size in (2, 4))
                            if need < 0.95 * chip['memory']:
                                parts = _parallel_predict(c, P, layout, dp, T, T, m, chip)
                                rows.append((sum(parts.values()), need, {**layout, 'dp': dp}, parts, stages))
            rows.sort(key=lambda r: (round(r[0], 2), r[1]))  # of equally fast ones the smallest first
            print(f'\n{name} ({P / 1e9:.2f} B) on {world} GPUs: {len(rows)} layouts fit')
            for t, need, layout, parts, stages in rows[:3]:
                mfu = _parallel_flops(c, T) * tokens / t / world / 989e12
                print('  ' + ' '.join(f'{k}={v}' for k, v in layout.items() if v > 1 or k in ('dp', 'zero')) + f': {t:.2f} s a step, {tokens / t / 1e3:,.0f} k tok/s, MFU '
                      f'{100 * mfu:.0f} %, {need / 1e9:.0f} GB a GPU ({stages / 1e9:.0f}); ' + ' '.join(f'{k} {v:.2f}' for k, v in parts.items() if v > 0.005))


def _parallel_memory():
    print('GPT-2 small, float32, B=1 T=64, GB on the first rank: resident memory over the start, beside parallel.plan; the allocator gives blocks of 1 MB back at once')
    os.environ['MALLOC_MMAP_THRESHOLD_'] = str(1 << 20)  # glibc otherwise keeps holes of up to 32 MB: 0.1 to 0.2 GB here
    for world, layouts in ((1, [{}]), (2, [dict(zero=z) for z in range(4)] + [dict(tp=2), dict(pp=2)]),
                           (4, [dict(zero=z) for z in (1, 2, 3)] + [dict(tp=4), dict(tp=2, zero=1), dict(tp=2, pp=2)])):
        for layout in layouts:
            _, _, got, planned = _parallel_spawn(world, _parallel_steps, 'gpt2', layout, 1, 64, 1, 1, (True,), True)
            print(f'  {world} ranks {layout or "one process"}: measured {got / 1e9:.2f}, planned {planned["total"] / 1e9:.2f} ({got / planned["total"] - 1:+.0%}; weights '
                  f'{planned["weights"] / 1e9:.2f}, gradients {planned["gradients"] / 1e9:.2f}, Adam {planned["optimizer"] / 1e9:.2f}, in flight {planned["in_flight"] / 1e9:.2f})', flush=True)
    del os.environ['MALLOC_MMAP_THRESHOLD_']


def _parallel_overlap():
    from statistics import median
    print('overlap: seconds a step, reductions inside the backward against after it, the sides alternating (8 layers of 384, 2 ranks)')
    for zero in (0, 2):
        seconds, *_ = _parallel_spawn(2, _parallel_steps, 'mid', dict(zero=zero), 4, 128, 1, 8, (True, False))
        on, off = median(seconds[True]), median(seconds[False])
        print(f'  zero={zero}: {on:.3f} overlapped, {off:.3f} not: {off / on:.2f} x', flush=True)


def _parallel_bubble():
    print('pipeline: share of the time that rank 0 of 2 waits for the other, beside (pp - 1) / (m + pp - 1)')
    for m in (1, 2, 4, 8):
        _, metrics, *_ = _parallel_spawn(2, _parallel_steps, 'mid', dict(pp=2), 4, 128, m, 3)
        print(f'  m={m}: {100 * metrics["bubble"]:.0f} % measured, {100 * metrics["bubble_ideal"]:.0f} % by the schedule', flush=True)


def _parallel_check():
    import torch
    from statistics import median
    from model import GPT
    print('the formula against this machine (8 layers of 384, 2 microbatches of 512 tokens): FLOP/s from one process, link from an all-reduce')
    c, B, T, m = _parallel_config('mid'), 1, 512, 2
    with torch.device('meta'):
        P = sum(p.numel() for p in GPT(c).parameters())
    one = median(_parallel_spawn(1, _parallel_steps, 'mid', {}, B, T, m, 6)[0][True])
    latency, large, small = _parallel_spawn(2, _parallel_link, 1 << 22, B * T, c.n_embd)
    work = m * B * T * _parallel_flops(c, T)
    chip = dict(flops=work / one, node=99, latency=latency, w=4, overlap=0.0, memory_speed=math.inf)  # one process's time holds its optimizer's
    print(f'  {work / one / 1e9:.1f} GFLOP/s, {large / 1e9:.2f} GB/s for gradients, {small / 1e9:.2f} GB/s for activations, {latency * 1e6:.0f} us; one process {one:.3f} s a step')
    for layout in (dict(zero=0), dict(zero=2), dict(tp=2), dict(pp=2), dict(cp=2)):
        dp = 2 // (layout.get('tp', 1) * layout.get('pp', 1) * layout.get('cp', 1))
        got = median(_parallel_spawn(2, _parallel_steps, 'mid', layout, B, T, m, 6)[0][True])
        parts = _parallel_predict(c, P, layout, dp, B * T, T, m, dict(chip, node_link=small if 'tp' in layout else large))
        want = sum(parts.values())
        print(f'  {layout}: measured {got:.3f} s, predicted {want:.3f} ({" ".join(f"{k} {v:.3f}" for k, v in parts.items() if v)}), ratio {got / want:.2f}', flush=True)


def bench_parallel(args):
    """Words: memory, overlap, bubble, check (the formula against this machine), --simulate (its predictions); none: all but the last."""
    parts = dict(memory=_parallel_memory, overlap=_parallel_overlap, bubble=_parallel_bubble, check=_parallel_check)
    for name, part in {**parts, '--simulate': _parallel_simulate}.items():
        if name in args or (not args and name in parts):
            part()


def _kernels_peak(code):
    """MB that `code` adds to the peak of a process of its own, from the line `# ---` in it on; and its seconds."""
    setup, work = code.split('# ---\n')
    read = "__import__('resource').getrusage(__import__('resource').RUSAGE_SELF).ru_maxrss // 1024"
    full = f'import torch, time, kernels as K\nimport torch.nn.functional as F\n{setup}base, t = {read}, time.perf_counter()\n{work}print({read} - base, time.perf_counter() - t)\n'
    out = subprocess.run([sys.executable, '-c', full], capture_output=True, text=True, check=True, cwd=os.path.dirname(os.path.abspath(__file__))).stdout
    return [float(x) for x in out.split()[-2:]]


def _kernels_memory():
    """What the logits cost and what leaving them out saves, on CPU, forward and backward together, peak resident set."""
    print('peak memory added by forward + backward, CPU, N=1024 tokens, C=64 (MB)')
    setup = 'torch.manual_seed(0); V, T = {V}, 1.0\nx, w = torch.randn(1024, 64).requires_grad_(), torch.randn(V, 64).requires_grad_()\ny = torch.randint(0, V, (1024,))\n# ---\n'
    sides = {'eager log_softmax of the logits': 'z = x @ w.t()\nF.log_softmax(z / T, -1).gather(1, y[:, None]).sum().backward()\n',
             'linear_logprobs': 'K.linear_logprobs(x, w, y, T)[0].sum().backward()\n', 'linear_cross_entropy': 'K.linear_cross_entropy(x, w, y).backward()\n',
             'F.linear_cross_entropy, chunked': 'F.linear_cross_entropy(x, w, y, options=torch.nn.LinearCrossEntropyOptions()).backward()\n'}
    for V in (50257, 151936):
        print(f'  V={V}: float32 logits {1024 * V * 4 / 2**20:.0f}, gradient of the weight {V * 64 * 4 / 2**20:.0f}')
        for name, code in sides.items():
            if hasattr(__import__('torch').nn, 'LinearCrossEntropyOptions') or not name.startswith('F.'):
                print('    {:34s} {:6.0f} MB   {:.2f} s'.format(name, *_kernels_peak(setup.format(V=V) + code)))
    setup = 'import model\ntorch.manual_seed(0); m = model.GPT(model.GPTConfig())\nidx = torch.randint(0, 50257, (2, 513))\n# ---\n'
    for name, loss in {'model(idx, targets)': 'm(idx[:, :-1], idx[:, 1:].contiguous())[1]',
                       'cross entropy of logits': 'F.cross_entropy(m(idx[:, :-1])[0].flatten(0, 1), idx[:, 1:].flatten())'}.items():
        print('  GPT-2 small, one SFT step of 1024 tokens, {:24s} {:6.0f} MB   {:.1f} s'.format(name, *_kernels_peak(setup + loss + '.backward()\n')))


def _kernels_cpu():
    """The CPU paths against eager, torch.compile and F.linear_cross_entropy; forward + backward, float32, one thread. GFLOP/s of the products that
    the task needs (2 of 6 N C V forward, recomputation not counted) and their share of the best product of matrices measured here."""
    import torch
    import torch.nn.functional as F
    import kernels as K
    torch.set_num_threads(1)
    chunked = dict(options=torch.nn.LinearCrossEntropyOptions()) if hasattr(torch.nn, 'LinearCrossEntropyOptions') else {}

    def rate(fn, inputs, seconds=0.3):
        def go():
            n, t = 0, time.perf_counter()
            while n == 0 or time.perf_counter() - t < seconds:
                for i in inputs:
                    i.grad = None
                out = fn()
                if inputs:
                    out.backward()
                n += 1
            return n / (time.perf_counter() - t)
        return go
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    ceiling = 2 * 1024 ** 3 * max(alternate({'torch': rate(lambda: a @ b, ()), 'oneDNN': rate(lambda: K.linear(a, b), ())}, 5).values())

    def table(title, flop, sides, inputs):
        for f in sides.values():
            rate(f, inputs, 0)()  # compilation, first touch
        rates = alternate({k: rate(f, inputs) for k, f in sides.items()}, rounds=5)
        first = next(iter(rates.values()))
        print(f'  {title}')
        for k, r in rates.items():
            print(f'    {k:24s}{1e3 / r:8.1f} ms   {flop * r / 1e9:6.1f} GFLOP/s, {100 * flop * r / ceiling:3.0f} % of the ceiling   {r / first:.2f}x of eager', flush=True)
    print(f'CPU, one thread, forward + backward; ceiling: {ceiling / 1e9:.0f} GFLOP/s (a 1024 x 1024 product of matrices)')
    for N, C, V in ((4096, 128, 257), (4096, 192, 512), (512, 768, 50257)):
        x, w, y = torch.randn(N, C).requires_grad_(), (torch.randn(V, C) * C ** -0.5).requires_grad_(), torch.randint(0, V, (N,))

        def eager_stats():
            logp = F.log_softmax(x @ w.t(), -1)
            return (logp.gather(1, y[:, None])[:, 0] - (logp.exp() * logp).sum(-1)).sum()
        loss, logp = lambda: F.cross_entropy(x @ w.t(), y), lambda: F.log_softmax(x @ w.t(), -1).gather(1, y[:, None]).sum()
        flop = 6 * N * C * V
        table(f'loss, N={N} C={C} V={V}', flop, {'eager': loss, 'torch.compile': torch.compile(loss), 'F.linear_cross_entropy': lambda: F.linear_cross_entropy(x, w, y, **chunked),
                                                 'linear_cross_entropy': lambda: K.linear_cross_entropy(x, w, y)}, (x, w))
        table('log-prob', flop, {'eager': logp, 'torch.compile': torch.compile(logp), 'linear_logprobs': lambda: K.linear_logprobs(x, w, y)[0].sum()}, (x, w))
        table('log-prob + entropy', flop, {'eager': eager_stats, 'torch.compile': torch.compile(eager_stats),
                                           'linear_logprobs': lambda: sum(o.sum() for o in K.linear_logprobs(x, w, y))}, (x, w))
    x, w, b = torch.randn(3373, 128).requires_grad_(), torch.randn(512, 128).requires_grad_(), torch.randn(512).requires_grad_()
    linear = lambda: F.linear(x, w, b).sum()
    lens = torch.randint(16, 257, (16,), generator=torch.Generator().manual_seed(0))
    cu = F.pad(lens.cumsum(0), (1, 0))

    def attention(mode):
        K.use(mode)
        try:
            return K.flash_attention(q, k, v, cu_seqlens=cu).sum()
        finally:
            K.use('auto')
    for nh, hs in ((4, 32), (12, 64)):
        q, k, v = (torch.randn(int(cu[-1]), nh, hs).requires_grad_() for _ in range(3))
        table(f'attention, 16 packed documents of 16 to 256 tokens, {nh} heads of {hs}', 6 * nh * hs * int((lens ** 2).sum()),
              {'eager': lambda: attention('torch'), 'doc_attention': lambda: attention('auto')}, (q, k, v))
    table('linear (3373, 128) x (128, 512)', 6 * 3373 * 128 * 512, {'eager': linear, 'torch.compile': torch.compile(linear), 'kernels.linear': lambda: K.linear(x, w, b).sum()}, (x, w, b))


def _kernels_cuda():
    """Each kernel's time, GB/s or TFLOP/s and its share of the ceiling measured here, against eager, torch.compile and torch's own. A measure is a CUDA
    graph of many calls: the CPU, which needs 0.3 ms to start a backward, has no part in it. Nothing clears L2 in between: tensors are larger by far."""
    import torch
    import kernels as K
    from triton.testing import do_bench, do_bench_cudagraph
    end = time.perf_counter() + 30  # torch.compile takes 5 s a kernel: its sides stop here, so that what follows is measured too
    dice = torch.Generator('cuda').manual_seed(0)  # a capture that fails leaves torch's own generator unusable

    def ms(f, graph=True, strict=False):
        """Median ms of f(). Where it cannot be captured: by do_bench, or nan if strict."""
        f()  # compiles
        torch.cuda.empty_cache()  # a graph's memory is its own
        try:
            if graph:
                return do_bench_cudagraph(f, rep=10, return_mode='median')
        except Exception as e:
            print(f' [no graph: {type(e).__name__}]', end='', flush=True)
            torch.cuda.synchronize()
        return math.nan if graph and strict else do_bench(f, warmup=10, rep=60, return_mode='median')

    def rand(*s):
        return torch.randn(*s, device='cuda', dtype=torch.bfloat16, generator=dice).requires_grad_()

    def both(fn, inputs, **how):
        """ms of the forward (gradients on: torch.compile would compile another one without), ms of forward + backward."""
        listed = lambda out: out if isinstance(out, tuple) else (out,)
        grads = [torch.randn(o.shape, dtype=o.dtype, device='cuda', generator=dice) for o in listed(fn())]
        return ms(fn, **how), ms(lambda: torch.autograd.grad(listed(fn()), inputs, grads), **how)
    big = torch.randn(1 << 30, device='cuda', dtype=torch.bfloat16, generator=dice)
    into = torch.empty_like(big)
    copy = 2 * big.nbytes / ms(lambda: into.copy_(big)) / 1e6
    a = torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16, generator=dice)
    matmul = 2 * 8192 ** 3 / ms(lambda: a @ a) / 1e9
    del big, into, a
    print(f'{torch.cuda.get_device_name()}: copy {copy:.0f} GB/s, bf16 matmul {matmul:.0f} TFLOP/s; bf16 below, median ms', flush=True)
    K.use('triton')
    _kernels_cuda_memory(copy, rand, both, end)
    _kernels_cuda_attention(rand, both)
    _kernels_cuda_paged(ms, rand, copy)
    _kernels_cuda_linear(ms, rand, both)


def _kernels_cuda_memory(copy, rand, both, end):
    """Kernels that memory bounds: the share is of the copy bandwidth measured above."""
    import torch
    import torch.nn.functional as F
    import kernels as K

    def memory(name, nbytes, nbytes_back, fn, eager, inputs):
        """nbytes: the fewest that the forward must move; nbytes_back: the backward."""
        print(f'  {name:24s}', end='', flush=True)
        for how, f in (('ours', fn), ('eager', eager), ('compile', torch.compile(eager))):
            if how == 'compile' and time.perf_counter() > end:
                print('   compile left out: no time', end='')
                continue
            try:
                t, tt = both(f, inputs, strict=how == 'compile')
                print(f'   {how} {t:.3f} / {tt:.3f} ms, {nbytes / t / 1e6:.0f} GB/s {100 * nbytes / t / 1e6 / copy:.0f} %'
                      f' (back {100 * nbytes_back / max(tt - t, 1e-6) / 1e6 / copy:.0f} %)', end='', flush=True)
            except Exception as e:  # one side less, not the end of the table
                print(f'   {how} failed: {type(e).__name__}', end='', flush=True)
        print(flush=True)
    N, C, I = 16384, 4096, 12288
    x, r, w, b = rand(N, C), rand(N, C), rand(C), rand(C)
    S = x.nbytes

    def eager_rms():
        h = x + r
        return F.rms_norm(h, (C,), w, 1e-6), h
    memory('rms_norm + residual', 4 * S, 4 * S, lambda: K.rms_norm(x, w, 1e-6, r), eager_rms, (x, r, w))
    memory('rms_norm', 2 * S, 3 * S, lambda: K.rms_norm(x, w, 1e-6), lambda: F.rms_norm(x, (C,), w, 1e-6), (x, w))
    memory('layer_norm', 2 * S, 3 * S, lambda: K.layer_norm(x, w, b, 1e-5), lambda: F.layer_norm(x, (C,), w, b, 1e-5), (x, w, b))
    q, k = rand(4, 4096, 32, 128), rand(4, 4096, 8, 128)
    angle = torch.linspace(0, 100, 4096 * 64, device='cuda').view(4096, 64)
    cos, sin = angle.cos(), angle.sin()
    memory('rope', 2 * (q.nbytes + k.nbytes), 2 * (q.nbytes + k.nbytes), lambda: K.rope(q, k, cos, sin),
           lambda: (K._rotate(q, cos, sin), K._rotate(k, cos, sin)), (q, k))
    g, u = rand(N, I), rand(N, I)
    memory('swiglu', 3 * g.nbytes, 5 * g.nbytes, lambda: K.swiglu(g, u), lambda: F.silu(g) * u, (g, u))
    memory('gelu', 2 * g.nbytes, 3 * g.nbytes, lambda: K.gelu(g), lambda: F.gelu(g, approximate='tanh'), (g,))
    z, y = rand(8192, 131072), torch.arange(8192, device='cuda') * 16

    def eager_ce():
        logp = F.log_softmax(z.float(), -1)
        return F.nll_loss(logp, y, reduction='none'), -(logp.exp() * logp).sum(-1)
    memory('cross_entropy + entropy', z.nbytes, 2 * z.nbytes, lambda: K.cross_entropy(z, y), eager_ce, (z,))


def _kernels_cuda_attention(rand, both):
    import inspect
    import torch
    import torch.nn.functional as F
    import kernels as K
    print('  attention, causal, 16 documents of 2048, 32 heads on 8, hs 128 / 64: TFLOP/s forward, forward + backward', flush=True)
    for hs in (128, 64):
        q, k, v = rand(32768, 32, hs), rand(32768, 8, hs), rand(32768, 8, hs)
        cu = torch.arange(17, device='cuda', dtype=torch.int32) * 2048
        ours = lambda: K._Flash.apply(q, k, v, cu, cu, (2048, 2048), hs ** -0.5)  # flash_attention, its one host sync done
        dense = lambda: F.scaled_dot_product_attention(*(t.view(16, 2048, -1, hs).transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True)
        sides = {'ours, packed': (ours, (q, k, v)), 'SDPA, dense': (dense, (q, k, v))}
        try:
            from torch.nn.attention.varlen import varlen_attn
            takes = inspect.signature(varlen_attn).parameters  # they differ from version to version
            how = {**({'window_size': (-1, 0)} if 'window_size' in takes else {'is_causal': True}), **({'enable_gqa': True} if 'enable_gqa' in takes else {})}
            kk, vv = (t if 'enable_gqa' in takes else t.detach().repeat_interleave(4, 1).requires_grad_() for t in (k, v))
            sides['varlen_attn' if kk is k else 'varlen_attn, keys repeated'] = (lambda: varlen_attn(q, kk, vv, cu, cu, 2048, 2048, **how), (q, kk, vv))
        except ImportError as e:
            print(f'    varlen_attn left out: {e}', flush=True)
        flop = 4 * 16 * 32 * hs * 2048 * 2048 / 2
        for name, (f, inputs) in sides.items():
            try:
                t, tt = both(f, inputs)
                print(f'    hs={hs} {name:28s} {t:.2f} / {tt:.2f} ms, {flop / t / 1e9:.0f} / {3.5 * flop / tt / 1e9:.0f} TFLOP/s', flush=True)
            except Exception as e:
                print(f'    hs={hs} {name} failed: {type(e).__name__}: {str(e)[:80]}', flush=True)


def _kernels_cuda_paged(ms, rand, copy):
    import torch
    import kernels as K
    print('  paged decode, block 16, 32 heads on 8, hs 128', flush=True)
    for B, ctx in ((64, 4096), (256, 1024), (1, 32768)):
        blocks = B * ctx // 16
        kc, vc = (rand(blocks, 16, 8, 128).detach() for _ in range(2))
        table, lens = torch.rand(blocks).argsort().int().view(B, -1).cuda(), torch.full((B,), ctx, device='cuda', dtype=torch.int32)
        q = rand(B, 32, 128).detach()
        t = ms(lambda: K.paged_attention(q, kc, vc, table, lens))
        print(f'    B={B} context {ctx}: {t:.3f} ms, {2 * kc.nbytes / t / 1e6:.0f} GB/s, {100 * 2 * kc.nbytes / t / 1e6 / copy:.0f} % of copy', flush=True)


def _kernels_cuda_linear(ms, rand, both):
    """No graphs: leaving ignored tokens out asks the device how many they are, and beside products of 6 ms a launch is nothing."""
    import torch
    import torch.nn.functional as F
    import kernels as K
    N, C, V = 4096, 4096, 131072
    print(f'  linear + softmax, N={N}, C={C}, V={V}: ms forward / forward + backward, TFLOP/s of the forward, peak GB', flush=True)
    x, w, y = rand(N, C), (rand(V, C).detach() / 64).requires_grad_(), torch.arange(N, device='cuda') * 32
    sides = {'linear_logprobs': lambda: K.linear_logprobs(x, w, y)[0].mean(), 'linear_logprobs, no gradient': torch.no_grad()(lambda: K.linear_logprobs(x, w, y)[0]),
             'linear_cross_entropy': lambda: K.linear_cross_entropy(x, w, y), 'eager': lambda: F.cross_entropy((x @ w.t()).float(), y)}
    if hasattr(torch.nn, 'LinearCrossEntropyOptions'):
        sides['F.linear_cross_entropy'] = lambda: F.linear_cross_entropy(x, w, y, options=torch.nn.LinearCrossEntropyOptions())
    for name, f in sides.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        try:
            t, tt = (ms(f, graph=False), math.nan) if 'no gradient' in name else both(f, (x, w), graph=False)
            print(f'    {name:28s} {t:.2f} / {tt:.2f} ms, {2 * N * C * V / t / 1e9:.0f} TFLOP/s, {(torch.cuda.max_memory_allocated() - base) / 1e9:.2f} GB', flush=True)
        except Exception as e:
            print(f'    {name} failed: {type(e).__name__}: {str(e)[:80]}', flush=True)


def bench_kernels(args):
    """kernels.py: python bench.py kernels [memory | cpu | cuda]. Without a word: all that this machine can run."""
    import torch
    if not args or 'memory' in args:
        _kernels_memory()
    if not args or 'cpu' in args:
        _kernels_cpu()
    if torch.cuda.is_available() and (not args or 'cuda' in args):
        _kernels_cuda()
    elif 'cuda' in args:
        print('no CUDA device here', file=sys.stderr)


_INFER_SHAPES = {  # name: (GPTConfig overrides, requests)
    'tiny': dict(arch='gpt2', n_layer=4, n_head=4, n_embd=128, vocab_size=2048, block_size=512),
    'qwen3': dict(arch='qwen3', n_layer=8, n_head=8, n_kv_head=4, n_embd=256, head_size=32, n_inner=768, vocab_size=4096, block_size=512),
    'gpt2': dict(arch='gpt2')}
_INFER_VLLM = '''
import json, sys, time
from vllm import LLM, SamplingParams
work = json.load(open(sys.argv[1] + '/work.json'))
llm = LLM(sys.argv[1], skip_tokenizer_init=True, dtype=sys.argv[2], max_model_len=512, max_num_seqs=256, enable_prefix_caching=True)
params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n, detokenize=False) for n in work['lens']]
run = lambda: llm.generate([dict(prompt_token_ids=p) for p in work['prompts']], params, use_tqdm=False)
run()
print('ready', flush=True)
for line in sys.stdin:
    llm.reset_prefix_cache()
    t = time.perf_counter()
    assert sum(len(o.outputs[0].token_ids) for o in run()) == sum(work['lens'])
    print('seconds', time.perf_counter() - t, flush=True)
'''


class _infer_Peer:
    """vLLM in its own interpreter: one line in, one round's seconds out. cores: those that compute, '0-1', or 'auto' (all but one). Intel's OpenMP
    is loaded where the package is there, as vLLM's guide says."""

    def __init__(self, python, folder, dtype, cores):
        env = {**os.environ, 'VLLM_CPU_KVCACHE_SPACE': '2', 'VLLM_LOGGING_LEVEL': 'ERROR', 'HF_HUB_OFFLINE': '1', 'VLLM_CPU_OMP_THREADS_BIND': cores}
        omp = os.path.join(os.path.dirname(python), '..', 'lib', 'libiomp5.so')
        env |= {'LD_PRELOAD': omp} if os.path.exists(omp) else {}
        self.p = subprocess.Popen([python, '-c', _INFER_VLLM, folder, dtype], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env,
                                  start_new_session=True)
        self.wait('ready')
        os.killpg(self.p.pid, signal.SIGSTOP)  # idle, its workers poll and take the cores from the others' rounds

    def wait(self, word):
        for line in self.p.stdout:
            if line.startswith(word):
                return line.split()[-1]
        raise RuntimeError('vllm ended; run its interpreter by hand to see why')

    def seconds(self):
        os.killpg(self.p.pid, signal.SIGCONT)
        self.p.stdin.write('go\n')
        self.p.stdin.flush()
        seconds = float(self.wait('seconds'))  # by its own clock
        os.killpg(self.p.pid, signal.SIGSTOP)
        return seconds

    def close(self):
        """The end of its input ends it, and it its workers; killed, it would leave them behind."""
        os.killpg(self.p.pid, signal.SIGCONT)
        self.p.stdin.close()
        self.p.wait(60)


def _infer_transformers(folder, prompts, lens):
    """{name: round()} of transformers: generate over a left-padded batch, and its continuous batching."""
    try:
        import torch
        import transformers
    except ImportError:
        print('transformers is not installed: skipped (pip install -r requirements-test.txt)')
        return {}
    transformers.logging.set_verbosity_error()
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    width = max(map(len, prompts))
    idx, mask = (torch.tensor([[fill] * (width - len(p)) + (p if fill == 0 and not ones else [1] * len(p)) for p in prompts]) for fill, ones in ((0, False), (0, True)))

    def batch():
        with torch.inference_mode():
            plain.generate(idx, attention_mask=mask, max_new_tokens=max(lens), min_new_tokens=max(lens), do_sample=False, eos_token_id=None, pad_token_id=0)
    continuous = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation='sdpa')
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=max(lens), eos_token_id=-1, pad_token_id=0)

    room = transformers.ContinuousBatchingConfig(num_blocks=256, block_size=256, max_batch_tokens=2048)  # it takes most of the memory of the machine otherwise

    def stream():
        with continuous.continuous_batching_context_manager(generation_config=config, continuous_batching_config=room, warmup=False) as manager:
            for p, n in zip(prompts, lens):
                manager.add_request(p, max_new_tokens=n, eos_token_id=-1)
            got = 0
            while got < len(prompts):
                result = manager.get_result(timeout=1)
                got += result is not None and result.is_finished()
                if result is None and not manager.is_running():
                    raise RuntimeError('continuous batching of transformers ended early')
    return {'transformers generate': batch, 'transformers continuous': stream}


def _infer_best_threads(run, large):
    """`run` under the thread count, 1 or all, that is faster for it; a large model's is all. Returns (run, that count)."""
    import torch
    counts, took = sorted({1, os.cpu_count()})[-1 if large else 0:], []

    def under(n):
        before = torch.get_num_threads()
        torch.set_num_threads(n)
        try:
            run()
        finally:
            torch.set_num_threads(before)
    for n in counts if len(counts) > 1 else ():
        t = time.perf_counter()
        under(n)
        took.append(time.perf_counter() - t)
    n = counts[took.index(min(took)) if took else 0]
    return (lambda: under(n)), n


def bench_infer(args):
    """infer.py against transformers and vLLM: python bench.py infer [tiny qwen3 gpt2] [rounds=3] [requests=64] [threads=0] [peers=generate,continuous] [vllm=/its/python]
    [cores=auto] [dtype=float32].
    Mixed prompts of 16-128 and outputs of 16-128 tokens, greedy, EOS ignored; tokens that were asked for, per second of wall time.
    With CUDA: nano-vllm's bench on the Qwen3-0.6B shape instead."""
    import json
    import random
    import tempfile
    import torch
    from infer import Engine, SamplingParams
    from model import ARCHS, GPT, GPTConfig
    opts = dict(rounds='3', requests='64', threads='0', vllm='', peers='generate,continuous', dtype='float32', cores='auto') | dict(a.split('=', 1) for a in args if '=' in a)
    if torch.cuda.is_available():
        return _infer_cuda()
    if int(opts['threads']):
        torch.set_num_threads(int(opts['threads']))
    for name in [a for a in args if '=' not in a] or list(_INFER_SHAPES):
        kw, rng = _INFER_SHAPES[name], random.Random(0)
        torch.manual_seed(0)
        model = GPT(GPTConfig(**{**ARCHS[kw['arch']], **kw})).eval()
        lens = [rng.randint(16, 128) for _ in range(int(opts['requests']))]
        prompts = [[rng.randrange(model.config.vocab_size) for _ in range(rng.randint(16, 128))] for _ in lens]
        params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in lens]
        engine = Engine(model.to(getattr(torch, opts['dtype'])), None, threads=int(opts['threads']))

        def ours():
            engine.blocks.forget()
            engine.generate(prompts, params)
        with tempfile.TemporaryDirectory() as folder:
            model.float().save_pretrained(folder)
            with open(os.path.join(folder, 'work.json'), 'w') as f:
                json.dump(dict(prompts=prompts, lens=lens), f)
            ours()
            sides = {'infer.py': ours}
            for side, run in (_infer_transformers(folder, prompts, lens) if opts['peers'] else {}).items():
                if side.split()[-1] not in opts['peers']:
                    continue
                run, n = _infer_best_threads(run, name == 'gpt2')
                sides[f'{side}, {n} thread' + 's' * (n > 1)] = run
            peer = _infer_Peer(opts['vllm'], folder, opts['dtype'], opts['cores']) if opts['vllm'] else None

            def rate(run):
                def round():
                    t = time.perf_counter()
                    run()
                    return sum(lens) / (time.perf_counter() - t)
                return round
            timed = {k: rate(run) for k, run in sides.items()}
            if peer:
                timed[f'vllm, cores {opts["cores"]}'] = lambda peer=peer: sum(lens) / peer.seconds()
            seen = alternate(timed, int(opts['rounds']))
            if peer:
                peer.close()
        print(f'{name}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, {len(lens)} requests, {sum(lens)} output tokens; {engine!r}')
        for side, r in seen.items():
            print(f'    {side:36s} {r:8.0f} tok/s' + ('' if side == 'infer.py' else f'   infer.py is {seen["infer.py"] / r:.2f} x'), flush=True)


def _infer_cuda():
    """nano-vllm's bench: 256 requests, 100-1024 tokens in and out, Qwen3-0.6B with random weights, bf16; and a decode step of 256 rows beside the
    time that its bytes (weights once, keys and values of every row) need at the copy bandwidth measured here."""
    import random
    import torch
    from infer import Engine, SamplingParams
    from model import ARCHS, GPT, GPTConfig
    torch.manual_seed(0)
    c = GPTConfig(**{**ARCHS['qwen3'], 'arch': 'qwen3', 'n_layer': 28, 'n_head': 16, 'n_kv_head': 8, 'n_embd': 1024, 'head_size': 128, 'n_inner': 3072, 'vocab_size': 151936,
                     'block_size': 4096, 'norm_eps': 1e-6, 'rope_theta': 1e6, 'tie': True})
    with torch.device('cuda'):
        model = GPT(c).eval().to(torch.bfloat16)
    rng = random.Random(0)
    prompts = [[rng.randrange(10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    params = [SamplingParams(max_tokens=rng.randint(100, 1024), temperature=0.6, ignore_eos=True) for _ in prompts]
    engine = Engine(model, None, max_num_seqs=256, max_num_batched_tokens=16384, block_size=16)
    t = time.perf_counter()
    short = [SamplingParams(max_tokens=1 + i, ignore_eos=True) for i in range(256)]  # every size of batch: kernels compile, graphs are captured
    engine.generate([[i % 100] * 600 for i in range(256)], short)
    engine.blocks.forget()
    torch.cuda.synchronize()
    print(f'first use: {time.perf_counter() - t:.1f} s')
    t = time.perf_counter()
    n = sum(len(x.token_ids) for x in engine.generate(prompts, params))
    dt = time.perf_counter() - t
    print(f'nano-vllm bench on {torch.cuda.get_device_name()}: {n} tokens in {dt:.1f} s: {n / dt:.0f} tok/s; {engine!r}')
    engine.blocks.forget()
    a = torch.empty(1 << 30, dtype=torch.uint8, device='cuda')
    b = torch.empty_like(a)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    b.copy_(a)
    start.record()
    for _ in range(10):
        b.copy_(a)
    end.record()
    torch.cuda.synchronize()
    bandwidth = 20 * a.nbytes / (start.elapsed_time(end) / 1e3)
    for p in prompts:
        engine.add_request((p * 11)[:1000], SamplingParams(max_tokens=60, ignore_eos=True))
    t = time.perf_counter()
    while engine.scheduler.waiting or any(r.n < r.P for r in engine.scheduler.running):
        engine.step()
    torch.cuda.synchronize()
    print(f'prefill of 256 x 1,000 tokens: {time.perf_counter() - t:.2f} s')
    engine.step()
    torch.cuda.synchronize()
    t, context = time.perf_counter(), sum(r.n for r in engine.scheduler.running)
    for _ in range(20):
        engine.step()
    torch.cuda.synchronize()
    step = (time.perf_counter() - t) / 20
    moved = 2 * sum(p.numel() for p in model.parameters()) + 2 * 2 * c.n_layer * c.n_kv_head * c.head_size * context
    print(f'decode step of 256 rows, {context / 256:.0f} tokens each: {step * 1e3:.2f} ms; floor {moved / bandwidth * 1e3:.2f} ms = {moved / 1e9:.1f} GB at {bandwidth / 1e12:.2f} TB/s')


def _train_world(folder, model):
    """Rows of 16 to 256 tokens (a byte is a token) for every stage, a random model of the shape, its tokenizer: ours and HF's."""
    import json
    import random
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    from tokenizer import get_tokenizer
    from model import GPT, GPTConfig
    r = random.Random(0)
    text = lambda lo, hi: ''.join(r.choice('etaoin shrdlu') for _ in range(r.randrange(lo, hi)))
    write = lambda name, rows: open(os.path.join(folder, name), 'w').write(''.join(json.dumps(x) + '\n' for x in rows))
    write('sft.jsonl', ({'prompt': text(8, 128), 'completion': text(8, 127)} for _ in range(512)))
    write('pref.jsonl', ({'prompt': text(8, 128), 'chosen': text(8, 127) + 'a', 'rejected': text(8, 127) + 'b'} for _ in range(512)))
    write('prompts.jsonl', ({'prompt': text(16, 128)} for _ in range(512)))
    with open(os.path.join(folder, 'count.py'), 'w') as f:
        f.write('def reward(prompt, completion, row):\n    return completion.count("e") / 64\n')
    shape = dict(tiny=dict(n_layer=4, n_head=4, n_embd=128, vocab_size=512, block_size=512),
                 gpt2=dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, block_size=512))[model]
    config = GPTConfig(**shape, bos_token_id=256, eos_token_id=256, pad_token_id=257)
    for name, head in (('lm', 'lm'), ('rm', 'scalar')):
        GPT(config, head).save_pretrained(os.path.join(folder, name))
        get_tokenizer('byte').save(os.path.join(folder, name))


_TRAIN_OURS = {
    'sft': 'sft.py --dataset=sft.jsonl --init_from=lm --batch_size={B}',
    'reward': 'reward.py --dataset=pref.jsonl --init_from=lm --batch_size={B} --normalize=none',
    'dpo': 'dpo.py --dataset=pref.jsonl --init_from=lm --batch_size={B} --eval_samples=0',
    'grpo': 'grpo.py --dataset=prompts.jsonl --init_from=lm --reward=count.py --batch_size={B} --minibatch_size={B} --group_size=8 --max_new_tokens=64 --eval_iters=1 --long_prompts=cut',
    'ppo': 'ppo.py --dataset=prompts.jsonl --init_from=lm --reward=rm --batch_size={B} --minibatch_size={B} --ppo_epochs=4 --max_new_tokens=64 --eval_iters=1 --missing_eos=none',
}


def _train_ours(stage, folder, B, steps):
    """(samples/s, peak MB above the imports) of our own command."""
    import json
    args = _TRAIN_OURS[stage].format(B=B).split()
    here, out = os.path.dirname(os.path.abspath(__file__)), os.path.join(folder, 'out')
    code = (f'import sys, resource, runpy, torch, numpy; sys.argv = {args + [f"--out_dir={out}", f"--max_iters={steps}", "--eval_interval=100000", "--tokenizer=byte", "--overwrite", "--device=cpu"]!r}; '
            f'sys.path.insert(0, {here!r}); import kernels, model, dataset, infer, lora; a = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; '
            f'runpy.run_path({os.path.join(here, args[0])!r}, run_name="__main__"); print("peak", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - a) // 1024)')
    done = subprocess.run([sys.executable, '-c', code], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f'{stage}: {done.stderr[-600:]}')
    t = [r['time'] for r in map(json.loads, open(os.path.join(out, 'log.jsonl'))) if r['split'] == 'train']
    return B * (len(t) - 1) / (t[-1] - t[0]), int(done.stdout.split()[-1])


def _train_trl(stage, folder, B, steps, python=sys.executable):
    """The same of TRL's trainer on the same rows, model and batch, in a process of its own."""
    done = subprocess.run([python, os.path.abspath(__file__), 'trl_side', stage, folder, str(B), str(steps)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f'TRL {stage}: {done.stderr[-800:]}')
    rate, peak = done.stdout.split()[-2:]
    return float(rate), int(peak)


def bench_neighbour(args):
    """Training on a machine that another program uses too: python bench.py neighbour [iters=60] [rounds=2].

    The default run of config/pretrain_toy.py, alone and beside one process that computes without a pause, for several
    ways to wait: GOMP_SPINCOUNT (how long a thread of OpenMP looks for work before it sleeps), OMP_WAIT_POLICY, one thread.
    A thread that spins takes the core from the thread that it waits for as soon as there are fewer cores than threads."""
    given = dict(arg.split('=', 1) for arg in args)
    iters, rounds = int(given.get('iters', 60)), int(given.get('rounds', 2))
    ways = {'as shipped': {}, 'active': dict(OMP_WAIT_POLICY='ACTIVE'), 'passive': dict(OMP_WAIT_POLICY='PASSIVE')}
    ways.update({f'spin {n:,}': dict(GOMP_SPINCOUNT=str(n)) for n in (1000, 3000, 10000, 30000, 100000)})
    ways['1 thread'] = dict(OMP_NUM_THREADS='1')
    found = {way: {False: [], True: []} for way in ways}
    for _ in range(rounds):
        for way, env in ways.items():
            for busy in (False, True):
                found[way][busy].append(_pretrain_speed(iters, env, busy))
    best = max(max(seen[False]) for seen in found.values())
    for way, seen in found.items():
        alone, beside = (sorted(seen[busy])[rounds // 2] for busy in (False, True))
        print(f'{way:>12}: alone {alone:7,.0f} tok/s ({alone / best:.0%} of the best) | beside one busy process {beside:7,.0f} '
              f'({alone / beside:.1f} times slower)', flush=True)


def _pretrain_speed(iters, env, busy):
    """Median tokens a second of the toy pretraining, after its first ten iterations."""
    with tempfile.TemporaryDirectory() as folder:
        other = subprocess.Popen([sys.executable, '-c', 'while True: pass']) if busy else None
        keys = [f'--max_iters={iters}', '--eval_interval=1000000', '--eval_iters=1', f'--out_dir={folder}', '--overwrite=True']
        try:
            subprocess.run([sys.executable, 'sft.py', 'config/pretrain_toy.py', *keys], env={**os.environ, **env}, check=True,
                           stdout=subprocess.DEVNULL)
        finally:
            if other:
                other.kill()
                other.wait()
        with open(os.path.join(folder, 'log.jsonl'), encoding='utf-8') as f:
            rows = [json.loads(line) for line in f]
    return statistics.median(row['tok_per_s'] for row in rows if row['split'] == 'train' and row['step'] >= 10)


def bench_trl_side(args):
    """One TRL run (called by `train`): python bench.py trl_side STAGE FOLDER BATCH STEPS."""
    import json
    import resource
    if not args or args[0] == 'all':
        return
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback
    stage, folder, B, steps = args[0], args[1], int(args[2]), int(args[3])
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *a, **k):
            assert k is not None
            times.append(time.time())
    rows = [json.loads(x) for x in open(os.path.join(folder, {'sft': 'sft.jsonl', 'grpo': 'prompts.jsonl', 'ppo': 'prompts.jsonl'}.get(stage, 'pref.jsonl')))]
    tok = PreTrainedTokenizerFast.from_pretrained(os.path.join(folder, 'lm'), pad_token='<pad>')
    lm = lambda: AutoModelForCausalLM.from_pretrained(os.path.join(folder, 'lm'), dtype=torch.float32)
    common = dict(output_dir=os.path.join(folder, 'trl'), max_steps=steps, per_device_train_batch_size=B, report_to=[], use_cpu=True, bf16=False, save_strategy='no', logging_steps=1,
                  disable_tqdm=True, gradient_checkpointing=False, dataloader_pin_memory=False)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    data = Dataset.from_list(rows)
    if stage == 'sft':
        trainer = trl.SFTTrainer(lm(), trl.SFTConfig(max_length=256, completion_only_loss=True, **common), train_dataset=data, processing_class=tok, callbacks=[Clock()])
    elif stage == 'reward':
        rm = AutoModelForSequenceClassification.from_pretrained(os.path.join(folder, 'rm'), dtype=torch.float32, num_labels=1)
        trainer = trl.RewardTrainer(rm, trl.RewardConfig(max_length=256, **common), train_dataset=data, processing_class=tok, callbacks=[Clock()])
    elif stage == 'dpo':
        trainer = trl.DPOTrainer(lm(), args=trl.DPOConfig(max_length=256, **common), train_dataset=data, processing_class=tok, callbacks=[Clock()])
    elif stage == 'ppo':  # TRL 0.24 is the last that was seen with this trainer in its main part
        data = data.map(lambda r: dict(input_ids=tok(r['prompt'])['input_ids']), remove_columns=['prompt'])
        rm, value = (AutoModelForSequenceClassification.from_pretrained(os.path.join(folder, 'rm'), dtype=torch.float32, num_labels=1) for _ in range(2))
        args = trl.PPOConfig(num_ppo_epochs=4, num_mini_batches=1, response_length=64, temperature=1.0, total_episodes=steps * B, num_sample_generations=0,
                             **{k: v for k, v in common.items() if k != 'max_steps'})
        trainer = trl.PPOTrainer(args=args, processing_class=tok, model=lm(), ref_model=lm(), reward_model=rm, value_model=value, train_dataset=data, eval_dataset=data.select(range(8)),
                                 callbacks=[Clock()])
    else:
        count = lambda completions, **_: [c.count('e') / 64 for c in completions]
        trainer = trl.GRPOTrainer(lm(), count, trl.GRPOConfig(num_generations=8, max_completion_length=64, temperature=1.0, beta=0.0, steps_per_generation=1, **common),
                                  train_dataset=data, processing_class=tok, callbacks=[Clock()])
    trainer.train()
    print((len(times) - 1) * B / (times[-1] - times[0]), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) // 1024)


def _train_nano_data(source, name, tokens, vocab_size):
    """Tokens as nanoGPT's train.py reads them: train.bin, val.bin (uint16), meta.pkl with the vocabulary size."""
    import pickle
    import numpy as np
    data = os.path.join(source, 'data', name)
    os.makedirs(data, exist_ok=True)
    for split, part in (('train', tokens[:len(tokens) * 9 // 10]), ('val', tokens[len(tokens) * 9 // 10:])):
        np.asarray(part, np.uint16).tofile(os.path.join(data, split + '.bin'))
    with open(os.path.join(data, 'meta.pkl'), 'wb') as f:
        pickle.dump(dict(vocab_size=vocab_size, itos={}, stoi={}), f)


def _train_nano(folder, source, rounds):
    """{job: {'ours', 'nanogpt'}: tokens/s} through both train scripts, a checkout of nanoGPT in `source`: pretraining on tiny Shakespeare by characters
    (data/shakespeare_char, prepared), and SFT on the toy rows: nanoGPT reads them as one stream in blocks of 256 and pads nothing either; its
    step has 5 x 256 tokens, ours 24 rows = 1,215 tokens on average, and counts prompts as well as answers."""
    import json
    import re
    import numpy as np
    here, out = os.path.dirname(os.path.abspath(__file__)), os.path.join(folder, 'out')
    shakespeare, toy = os.path.join(here, 'data', 'shakespeare_char'), os.path.join(folder, 'toy')
    if not os.path.exists(os.path.join(shakespeare, 'train.bin')):
        raise SystemExit('error: no data/shakespeare_char/train.bin: python data/shakespeare_char/prepare.py (or --src=FILE) first')
    _train_nano_data(source, 'bench_shakespeare', np.fromfile(os.path.join(shakespeare, 'train.bin'), np.uint16), 65)
    subprocess.run([sys.executable, os.path.join(here, 'data', 'toy', 'prepare.py'), f'--out_dir={toy}'], check=True, capture_output=True)
    rows = [json.loads(line)['messages'] for line in open(os.path.join(toy, 'sft_train.jsonl'))]
    _train_nano_data(source, 'bench_toy', [t for r in rows for t in [*f"Q: {r[0]['content']}\nA: {r[1]['content']}".encode(), 256]], 258)
    net, run = '--n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0'.split(), '--max_iters=60 --eval_interval=100000 --eval_iters=1 --device=cpu --learning_rate=1e-3'.split()
    jobs = {'pretraining': (['--block_size=128', '--batch_size=16'], 'bench_shakespeare', ['--block_size=128', '--batch_size=16', f'--dataset={shakespeare}'], 16 * 128),
            'SFT, toy rows': (['--block_size=256', '--batch_size=5'], 'bench_toy', ['--block_size=256', '--batch_size=24', f'--dataset={toy}/sft_train.jsonl', '--tokenizer=byte'], 5 * 256)}

    def nano(shape, name, tokens):
        done = subprocess.run([sys.executable, 'train.py', *net, *run, *shape, '--compile=False', f'--dataset={name}', '--gradient_accumulation_steps=1', '--log_interval=1', f'--out_dir={out}n', '--bias=False'],
                              cwd=source, capture_output=True, text=True)
        ms = sorted(float(x) for x in re.findall(r'time ([\d.]+)ms', done.stdout)[2:])
        if not ms:
            raise SystemExit(f'nanoGPT: {done.stderr[-600:]}')
        return tokens / ms[len(ms) // 2] * 1e3

    def ours(shape):
        done = subprocess.run([sys.executable, os.path.join(here, 'sft.py'), *net, *run, *shape, f'--out_dir={out}', '--overwrite'], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f'sft.py: {done.stderr[-600:]}')
        rates = sorted(r['tok_per_s'] for r in map(json.loads, open(os.path.join(out, 'log.jsonl'))) if r['split'] == 'train')
        return rates[len(rates) // 2]
    return {job: alternate(dict(ours=lambda: ours(mine), nanogpt=lambda: nano(theirs, name, tokens)), rounds) for job, (theirs, name, mine, tokens) in jobs.items()}


def bench_train(args):
    """Stages against TRL's trainers and nanoGPT's train.py: python bench.py train [model=tiny|gpt2] [stages=sft,dpo] [rounds=3]
    [ppo_python=PYTHON of an environment with trl==0.24.0, the newest have no PPO, 1.12 still has one] [nanogpt=FOLDER of its checkout]."""
    import tempfile
    given = dict(a.split('=', 1) for a in args)
    model, rounds = given.get('model', 'tiny'), int(given.get('rounds', 3))
    B, steps = (16, 9) if model == 'tiny' else (8, 3)
    folder = tempfile.mkdtemp()
    _train_world(folder, model)
    print(f'{model}: batches of {B}, lengths 16 to 256, float32, CPU; samples/s, peak memory above the imports; median of {rounds} rounds in turn')
    try:
        import trl
        known = [s for s in ('sft', 'reward', 'dpo', 'grpo') if hasattr(trl, dict(sft='SFTTrainer', reward='RewardTrainer', dpo='DPOTrainer', grpo='GRPOTrainer')[s])]
    except ImportError:
        known = []
        print('trl is not installed: pip install -r requirements-test.txt; ours alone')
    for stage in filter(None, given.get('stages', 'sft,reward,dpo,grpo,ppo').split(',')):
        seen = {'ours': [], 'trl': []}
        for _ in range(rounds):
            seen['ours'].append(_train_ours(stage, folder, B, steps))
            if stage in known or stage == 'ppo' and 'ppo_python' in given:
                seen['trl'].append(_train_trl(stage, folder, B, steps, given['ppo_python'] if stage == 'ppo' else sys.executable))
        mid = {k: (sorted(r for r, _ in v)[len(v) // 2], max(p for _, p in v)) for k, v in seen.items() if v}
        peer = f"TRL {mid['trl'][0]:8.1f}/s {mid['trl'][1]:6d} MB | ratio {mid['ours'][0] / mid['trl'][0]:.2f}x" if 'trl' in mid else 'no peer (this TRL has no trainer for it; ppo_python=PYTHON of an environment with trl==0.24.0)'
        print(f"{stage:>7}: ours {mid['ours'][0]:8.1f}/s {mid['ours'][1]:6d} MB | {peer}", flush=True)
    if 'nanogpt' in given:
        for job, r in _train_nano(folder, given['nanogpt'], rounds).items():
            print(f"{job}: ours {r['ours']:,.0f} tok/s | nanoGPT's train.py {r['nanogpt']:,.0f} | ratio {r['ours'] / r['nanogpt']:.2f}x", flush=True)


if __name__ == '__main__':
    sections = {k[len('bench_'):]: v for k, v in globals().items() if k.startswith('bench_')}
    if len(sys.argv) < 2 or sys.argv[1] not in [*sections, 'all']:
        print(f'{__doc__}\nsections: {", ".join(sections)}', file=sys.stderr)
        sys.exit(2)
    for _name in [s for s in sections if s not in ('trl_side', 'staleness')] if sys.argv[1] == 'all' else [sys.argv[1]]:
        sections[_name](sys.argv[2:])
