"""Every speed figure that the README states, each by one command; every figure is a ratio to a named peer in the same run.

    python bench.py kernels | data | infer | actors | parallel | train      # one section
    python bench.py all                                                     # all of them, one after the other

A peer that is not installed is named and skipped. Machines are noisy: sides alternate, the median of the rounds counts.
"""
import os
import sys
import time
import subprocess


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


def _data_tokens(batch):
    """A stand-in for a tokenizer that costs about what tiktoken does: the same for both sides."""
    from zlib import crc32
    return {'ids': [[crc32(w.encode()) % 50257 for w in (p + c).split(' ')] for p, c in zip(batch['prompt'], batch['chosen'])]}


def _data_peak(code):
    """Peak memory in MB that the code adds to a process of its own (its maps of files count as far as they are touched). Linux."""
    import subprocess
    head = 'import dataset, json\npeak = lambda: int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])\nbase = peak()\n'
    tail = '\nprint((peak() - base) // 1024)'
    return int(subprocess.run([sys.executable, '-c', head + code + tail], capture_output=True, text=True, check=True).stdout.split()[-1])


def bench_data(args):
    """dataset.py against HF datasets and bare json.loads: python bench.py data [rows=500000]."""
    import json
    import os
    import tempfile
    import time
    import numpy as np
    import dataset
    try:
        import datasets as hf
        hf.disable_progress_bars()
    except ImportError:
        hf = None
        print('datasets is not installed: its side is skipped (pip install -r requirements-test.txt)')
    n = int(args[0]) if args else 500_000
    with tempfile.TemporaryDirectory() as tmp:
        path = os.path.join(tmp, 'rows.jsonl')
        with open(path, 'w', encoding='utf-8') as f:
            f.writelines(_data_rows(n))
        fresh = iter(range(10**9))

        def rate(fn, count):
            def measure():
                start = time.perf_counter()
                fn()
                return count / (time.perf_counter() - start)
            return measure

        def floor():
            with open(path, 'rb') as f:
                for line in f:
                    json.loads(line)

        def show(name, sides, unit, rounds=3):
            found = alternate({k: v for k, v in sides.items() if v}, rounds)
            first, *rest = found
            print(f'{name:22}' + ' | '.join(f'{k} {v:,.0f} {unit}' for k, v in found.items())
                  + ''.join(f' | {found[first] / found[k]:.2f}x {k}' for k in rest), flush=True)
        print(f'{n:,} rows of prompt/chosen/rejected, {os.path.getsize(path) / 1e6:.0f} MB of JSON lines')
        show('load, one process', {'ours': rate(lambda: dataset.load_dataset(path), n), 'json.loads': rate(floor, n),
                                   'HF': hf and rate(lambda: hf.load_dataset('json', data_files=path, split='train', cache_dir=os.path.join(tmp, f'hf{next(fresh)}')), n)}, 'rows/s')
        show('load, two processes', {'ours': rate(lambda: dataset.load_dataset(path, num_proc=2), n), 'json.loads': rate(floor, n)}, 'rows/s')
        peaks = {'ours': f'dataset.load_dataset({path!r})', 'list of json.loads': f'rows = [json.loads(l) for l in open({path!r}, "rb")]'}
        if hf:
            peaks['HF'] = f'import datasets; datasets.load_dataset("json", data_files={path!r}, split="train", cache_dir={os.path.join(tmp, "hfp")!r})'
        print('peak memory of load    ' + ' | '.join(f'{k} {_data_peak(v)} MB' for k, v in peaks.items()), flush=True)
        mine = dataset.load_dataset(path)
        folders = {'ours': os.path.join(tmp, 'mine'), 'HF': os.path.join(tmp, 'theirs')}
        mine.save_to_disk(folders['ours'])
        if hf:
            hf.load_from_disk(folders['ours']).save_to_disk(folders['HF'])  # each side opens what it writes itself
        show('open', {'ours': rate(lambda: dataset.load_dataset(folders['ours']), 1), 'HF': hf and rate(lambda: hf.load_from_disk(folders['HF']), 1),
                      "ours, HF's file": hf and rate(lambda: dataset.load_dataset(folders['HF']), 1)}, 'times/s', 5)
        sides = {'ours': dataset.load_dataset(folders['ours'])} | ({'HF': hf.load_from_disk(folders['HF'])} if hf else {})
        at = np.random.default_rng(0).integers(0, n, 10_000).tolist()
        show('random rows', {k: rate(lambda d=d: [d[i] for i in at], len(at)) for k, d in sides.items()}, 'rows/s')
        show('slices of 32', {k: rate(lambda d=d: [d[i:i + 32] for i in range(0, min(n, 200_000), 32)], min(n, 200_000)) for k, d in sides.items()}, 'rows/s')
        show('iterate', {k: rate(lambda d=d: [None for _ in d.select(range(min(n, 100_000)))], min(n, 100_000)) for k, d in sides.items()}, 'rows/s')
        show('shuffle', {k: rate(lambda d=d: d.shuffle(seed=next(fresh)), n) for k, d in sides.items()}, 'rows/s')
        mixed = {k: d.shuffle(seed=1) for k, d in sides.items()}
        show('shuffled slices of 32', {k: rate(lambda d=d: [d[i:i + 32] for i in range(0, 32_000, 32)], 32_000) for k, d in mixed.items()}, 'rows/s')
        part = {k: d.select(range(min(n, 100_000))) for k, d in sides.items()}
        for procs in (1, 2):
            show(f'tokenising map, {procs} proc', {k: rate(lambda d=d, k=k: d.map(_data_tokens, batched=True, num_proc=procs, **({'cache_dir': os.path.join(tmp, f'c{next(fresh)}')} if k == 'ours' else
                 {'load_from_cache_file': False})), len(d)) for k, d in part.items()}, 'rows/s')


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

    def put(rt, n):
        for _ in range(n):
            rt.put(blob)

    cases = {
        'tasks, one by one (1/s)': lambda rt, f, a: rate(500, lambda n: [rt.get(f.remote(i)) for i in range(n)]),
        'tasks, all at once (1/s)': lambda rt, f, a: rate(2000, lambda n: rt.get([f.remote(i) for i in range(n)])),
        'actor calls, one by one (1/s)': lambda rt, f, a: rate(1000, lambda n: [rt.get(a.call.remote(i)) for i in range(n)]),
        'actor calls, pipelined (1/s)': lambda rt, f, a: rate(5000, lambda n: rt.get([a.call.remote(i) for i in range(n)])),
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
    for i, case in enumerate(('start to first result (s)', 'start of an actor, 4 at once (s each)', 'memory of workers and daemons, 4 actors (MB)')):
        seen = {name: sorted(row[i] for row in rows)[1] for name, rows in starts.items()}
        print(f'{case:44}' + ''.join(f'{seen[name]:12.3f}' for name in sides) + (f'{seen["ray"] / seen["actors"]:11.1f}x' if ray else ''))


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
    return GPTConfig(**{'gpt2': {}, 'mid': dict(vocab_size=4096, block_size=256, n_layer=8, n_head=8, n_embd=384),
                        'Qwen3-0.6B': dict(qwen, n_layer=28, n_embd=1024, n_inner=3072, n_head=16),
                        'Qwen3-8B': dict(qwen, n_layer=36, n_embd=4096, n_inner=12288, n_head=32, tie=False)}[name])


def _parallel_steps(rank, name, layout, B, T, micros, steps, overlap=(True,), measure_memory=False):
    """Trains `steps` steps of `micros` microbatches of B x T tokens a replica. -> {overlap: [seconds a step]}, metrics, bytes, planned."""
    import gc, time, torch, parallel
    from model import GPT, activation_bytes, memory_now
    cpu = torch.device('cpu')
    idx = torch.randint(0, 4096, (B, T + 1), generator=torch.Generator().manual_seed(0))
    loss_of = lambda model, mb: (model(mb[:, :-1], mb[:, 1:])[1], {})
    torch.manual_seed(0)
    before = memory_now(cpu)
    mesh = parallel.init(device='cpu', **layout)
    full = GPT(_parallel_config(name))
    planned = parallel.plan(full, dp=mesh.dp, activations=activation_bytes(full.config, B * T, T), **layout)
    model = parallel.shard(full, mesh)
    seconds, metrics = {o: [] for o in overlap}, {}
    for o in overlap:
        optimizer = parallel.Optimizer(model, mesh, 1e-4, overlap=o)
        if measure_memory:  # a first step makes the moments; then the high-water mark is set back
            import ctypes
            parallel.accumulate(model, optimizer, [idx], loss_of)
            optimizer.step(1e-4, 1.0)
            gc.collect()
            ctypes.CDLL('libc.so.6').malloc_trim(0)
            with open('/proc/self/clear_refs', 'w') as f:
                f.write('5')
    for step in range(steps * len(overlap)):
        optimizer.overlap = overlap[step % len(overlap)]  # the sides take turns
        mesh.barrier()
        t = time.perf_counter()
        metrics = parallel.accumulate(model, optimizer, [idx] * micros, loss_of)
        optimizer.step(1e-4, 1.0)
        seconds[optimizer.overlap].append(time.perf_counter() - t)
    with open('/proc/self/status') as f:
        peak = next(int(line.split()[1]) * 1024 for line in f if line.startswith('VmHWM'))
    waited = {g.name: g.waited for g in (mesh.tp, mesh.data, mesh.pp, mesh.pp_back)}
    return seconds, metrics, peak - before, planned, waited


def _parallel_link(rank, sizes):
    """Seconds of an all-reduce of so many floats between two gloo processes: latency and bandwidth of this machine's `link`."""
    import time, torch, torch.distributed as dist
    out = []
    for n in sizes:
        x, best = torch.zeros(n), 9e9
        for _ in range(8):
            dist.barrier()
            t = time.perf_counter()
            dist.all_reduce(x)
            best = min(best, time.perf_counter() - t)
        out.append(best)
    return out


PARALLEL_FORMULA = """
step = compute + tensor + context + bubble + data (exposed)       S = tokens a microbatch, m microbatches, L layers, C width, P parameters, w bytes
  compute   m (6 P S + 12 L nh hs T S) / (tp pp cp) / (peak mfu)
  tensor    m 8 (L / pp) [S C w / cp] (tp - 1) / tp / node_link + latency       all-gather and reduce-scatter, 2 each way twice a layer
  context   m 3 (cp - 1) (L / pp) 2 nkv hs w S / cp / tp / link                 K, V round the ring; with their gradients on the way back
  bubble    (compute + tensor + context) (pp - 1) / m + sends                   1F1B
  data      (4 + w) P / (tp pp) (n - 1) / n / link, n = dp cp                   reduce-scatter of float32 gradients, all-gather of weights;
            ZeRO-2 scatters and ZeRO-3 also gathers twice a microbatch; hidden behind 2/3 of the compute (the backward) as far as it goes"""


def _parallel_predict(c, P, layout, dp, S, T, m, chip):
    """Seconds of one step by PARALLEL_FORMULA, by part. chip: peak x mfu in FLOP/s, link bytes/s in and between nodes, latency s, weight bytes."""
    tp, pp, cp, zero = (layout.get(k, d) for k, d in (('tp', 1), ('pp', 1), ('cp', 1), ('zero', 0)))
    n, w, layers = dp * cp, chip['w'], c.n_layer / pp
    link = chip['node_link'] if tp * pp * cp * dp <= chip['node'] else chip['link']
    compute = m * (6 * P * S + 12 * c.n_layer * c.n_head * c.head_size * T * S) / (tp * pp * cp) / chip['flops']
    tensor = m * 8 * layers * ((S * c.n_embd * w / cp) * (tp - 1) / tp / chip['node_link'] + chip['latency'] * (tp - 1)) if tp > 1 else 0.0
    ring = chip['node_link'] if tp * cp <= chip['node'] else chip['link']
    context = m * 3 * (cp - 1) * layers * (2 * c.n_kv_head * c.head_size * w * S / cp / tp / ring + chip['latency'])
    bubble = (compute + tensor + context) * (pp - 1) / m + (2 * m * (S * c.n_embd * w / cp / tp / link + chip['latency']) if pp > 1 else 0.0)
    sends = {0: 8 / w if w < 4 else 2, 1: 1 + 4 / w, 2: m * 4 / w + 1, 3: m * (4 / w + 2)}[zero if n > 1 else 0]  # in units of w bytes a parameter
    data = (sends * w * P / (tp * pp) * (n - 1) / n / link + layers * chip['latency'] * n) if n > 1 else 0.0
    return dict(compute=compute, tensor=tensor, context=context, bubble=bubble, data=max(data - chip['overlap'] * compute, 0.1 * data))


def _parallel_simulate():
    """Predicted step time and memory for GPUs that are not here, best layouts first."""
    import torch, parallel
    from model import GPT, activation_bytes
    chip = dict(flops=989e12 * 0.45, node=8, node_link=400e9, link=45e9, latency=15e-6, w=2, overlap=2 / 3, memory=141e9)
    print(PARALLEL_FORMULA)
    print('H200: 989 TFLOP/s bf16 at 45 % use in the matmuls, 141 GB; NVLink 400 GB/s and 400 Gbit/s InfiniBand (45 GB/s) a GPU, one way, as achieved; 15 us.')
    print('Stated assumptions, not measurements: bf16 weights, float32 masters, activations kept, T = 4096, 4 M tokens a step, at most 95 % of memory.')
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
                            need = parallel.plan(model, dp=dp, itemsize=2, activations=activation_bytes(c, T, T, 2), **layout)['total']
                            if need < 0.95 * chip['memory']:
                                parts = _parallel_predict(c, P, layout, dp, T, T, m, chip)
                                rows.append((sum(parts.values()), need, {**layout, 'dp': dp}, parts))
            rows.sort(key=lambda r: r[0])
            print(f'\n{name} ({P / 1e9:.2f} B) on {world} GPUs: {len(rows)} layouts fit')
            for t, need, layout, parts in rows[:3]:
                mfu = 6 * P * tokens / t / world / 989e12
                print('  ' + ' '.join(f'{k}={v}' for k, v in layout.items() if v > 1 or k in ('dp', 'zero')) + f': {t:.2f} s a step, {tokens / t / 1e3:,.0f} k tok/s, MFU '
                      f'{100 * mfu:.0f} %, {need / 1e9:.0f} GB a GPU; ' + ' '.join(f'{k} {v:.2f}' for k, v in parts.items() if v > 0.005))


def bench_parallel(args):
    """--simulate: the formula and its predictions; else memory, overlap, bubble as measured here, and the formula against them."""
    import statistics, torch
    if '--simulate' in args:
        _parallel_simulate()
        if args == ['--simulate']:
            return
    med = statistics.median
    print('GPT-2 small, float32, B=1 T=64, GB on the fullest rank: resident memory over the start, beside parallel.plan')
    for world, layouts in ((1, [{}]), (2, [dict(zero=z) for z in range(4)] + [dict(tp=2), dict(pp=2)]), (4, [dict(zero=3), dict(tp=4), dict(tp=2, zero=1)])):
        for layout in layouts:
            _, _, got, planned, _ = _parallel_spawn(world, _parallel_steps, 'gpt2', layout, 1, 64, 1, 2, (True,), True)
            print(f'  {world} ranks {layout or "one process"}: measured {got / 1e9:.2f}, planned {planned["total"] / 1e9:.2f}  (weights '
                  f'{planned["weights"] / 1e9:.2f}, gradients {planned["gradients"] / 1e9:.2f}, Adam {planned["optimizer"] / 1e9:.2f})', flush=True)
    print('overlap: seconds a step, reductions inside the backward against after it, the sides alternating (8 layers of 384, 2 ranks)')
    for zero in (0, 2):
        seconds, *_ = _parallel_spawn(2, _parallel_steps, 'mid', dict(zero=zero), 4, 128, 1, 8, (True, False))
        print(f'  zero={zero}: {med(seconds[True]):.3f} overlapped, {med(seconds[False]):.3f} not: {med(seconds[False]) / med(seconds[True]):.2f} x', flush=True)
    print('pipeline: share of the time that rank 0 of 2 waits for the other, beside (pp - 1) / (m + pp - 1)')
    for m in (1, 2, 4, 8):
        _, metrics, *_ = _parallel_spawn(2, _parallel_steps, 'mid', dict(pp=2), 4, 128, m, 3)
        print(f'  m={m}: {100 * metrics["bubble"]:.0f} % measured, {100 * metrics["bubble_ideal"]:.0f} % by the schedule', flush=True)
    print('the formula against this machine (8 layers of 384, 4 x 128 tokens, 2 microbatches): FLOP/s from one process, link from an all-reduce')
    c, B, T, m = _parallel_config('mid'), 4, 128, 2
    from model import GPT
    with torch.device('meta'):
        P = sum(p.numel() for p in GPT(c).parameters())
    one = med(_parallel_spawn(1, _parallel_steps, 'mid', {}, B, T, m, 4)[0][True])
    small, large = _parallel_spawn(2, _parallel_link, [1, 1 << 22])
    work = m * (6 * P * B * T + 12 * c.n_layer * c.n_head * c.head_size * T * B * T)
    chip = dict(flops=work / one, node=99, node_link=(4 << 22) / (large - small), link=(4 << 22) / (large - small), latency=small, w=4, overlap=0.0)
    print(f'  {work / one / 1e9:.1f} GFLOP/s, {chip["link"] / 1e9:.2f} GB/s, {small * 1e6:.0f} us; one process {one:.3f} s a step')
    for layout in (dict(zero=0), dict(zero=2), dict(tp=2), dict(pp=2), dict(cp=2)):
        got = med(_parallel_spawn(2, _parallel_steps, 'mid', layout, B, T, m, 4)[0][True])
        dp = 2 // (layout.get('tp', 1) * layout.get('pp', 1) * layout.get('cp', 1))
        want = sum(_parallel_predict(c, P, layout, dp, B * T, T, m, chip).values())
        print(f'  {layout}: measured {got:.3f} s, predicted {want:.3f}, ratio {got / want:.2f}', flush=True)


if __name__ == '__main__':
    sections = {k[len('bench_'):]: v for k, v in globals().items() if k.startswith('bench_')}
    if len(sys.argv) < 2 or sys.argv[1] not in [*sections, 'all']:
        print(f'{__doc__}\nsections: {", ".join(sections)}', file=sys.stderr)
        sys.exit(2)
    for _name in sections if sys.argv[1] == 'all' else [sys.argv[1]]:
        sections[_name](sys.argv[2:])
