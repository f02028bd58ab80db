"""Every speed figure that the README states, one command each; a figure is a ratio to a named peer, measured
in the same run.

    python bench.py kernels | data | infer | actors | parallel | train | neighbour | async       # one section
    python bench.py all                     # one after the other
    python bench.py data old=FOLDER         # beside an older checkout: data, infer, actors, train, kernels
    python bench.py data quick=1            # one round of small sizes: minutes for all sections together

Each side (ours, the older checkout, a peer) is a process of its own, `python bench.py side ...`, and imports
what it measures inside its function: that may be another checkout, or another interpreter's. Sides take turns
and the median of the rounds counts, for machines are noisy. A ratio above 1 says that ours is better: more
of a rate, less of seconds and memory. A peer that is not installed is named and left out.
"""
import contextlib
import ctypes
import functools
import gc
import glob
import importlib
import itertools
import json
import os
import random
import re
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import types
import zlib

HERE = os.path.dirname(os.path.abspath(__file__))
LESS = 's', 'ms', 'ms,', 'MB', 'GB'  # units of which less is better: their first word
OURS = 'ours', 'old'          # the sides that run our code; the peers have their own


# ---- sides -------------------------------------------------------------------------------------------------
class Side:
    """`side_<what>(name, *args)` of this file in a process of its own: it returns {job: function ->
    {unit: number}}. fresh: a new process for each job; pauses: stopped while others work, since its idle
    threads poll."""
    def __init__(self, what, name, *args, root=HERE, python=sys.executable, env=(), fresh=False,
                 pauses=False):
        words = json.dumps([name, *args])
        self.command = [python, os.path.abspath(__file__), 'side', what, os.path.abspath(root), words]
        self.env = {**os.environ, **dict(env)}
        self.name, self.fresh, self.pauses = name, fresh, pauses
        self.start()

    def start(self):
        self.log = tempfile.TemporaryFile('w+', encoding='utf-8')
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.log, text=True, env=self.env, start_new_session=True)
        self.jobs = self.read()
        self.signal(signal.SIGSTOP)

    def read(self):
        """Its next answer; None: it failed."""
        return json.loads(self.process.stdout.readline() or 'null')

    def signal(self, which):
        if self.pauses:
            os.killpg(self.process.pid, which)

    def ask(self, job):
        """{unit: number}; empty if it failed."""
        if self.process.poll() is not None:
            self.start()
        self.signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(job + '\n')
            self.process.stdin.flush()
        answer = self.read()
        if answer is None:
            print(f'    {self.name}, {job}: {self.last_words()}', flush=True)
        if self.fresh:
            self.close()
        else:
            self.signal(signal.SIGSTOP)
        return answer or {}

    def last_words(self):
        self.log.seek(0)
        return (self.log.read().strip().splitlines() or ['it ended without a word'])[-1][:200]

    def close(self):
        """The end of its input ends it, and it its workers."""
        self.signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def run_side(what, root, args):
    """The process of a Side: says its jobs, then answers a job a line. What libraries print goes to
    stderr."""
    sys.path[0] = root
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)

    def say(thing):
        print(json.dumps(thing), file=answers, flush=True)
    jobs = globals()[f'side_{what}'](*json.loads(args))
    say(list(jobs))
    for line in sys.stdin:
        try:
            say(jobs[line.rstrip('\n')]())
        except (Exception, SystemExit):
            traceback.print_exc()
            say(None)


def sides(what, opts, *args, peers=(), **how):
    """{name: Side} of ours, the older checkout if one is given, and the peers that are installed."""
    made = {'ours': Side(what, 'ours', *args, **how)}
    if opts.old:
        made['old'] = Side(what, 'old', *args, root=opts.old, **how)
    made |= {peer: Side(what, peer, *args, **how) for peer in peers}
    return made


def compare(opts, sides):
    """Each job on each side in turn; a line of medians for each of its units. A side that could not start is
    named and left out."""
    for name in [name for name, side in sides.items() if side.jobs is None]:
        print(f'{name} is left out: {sides.pop(name).last_words()}')
    try:
        jobs = [(job, name) for name, side in sides.items() for job in side.jobs]
        for job in dict.fromkeys(job for job, _ in jobs):
            seen = {}  # unit: {side: numbers}
            for name in [name for known, name in jobs if known == job] * opts.rounds:
                for unit, number in sides[name].ask(job).items():
                    seen.setdefault(unit, {}).setdefault(name, []).append(number)
            for unit, numbers in seen.items():
                report(job, unit, {name: statistics.median(row) for name, row in numbers.items()})
    finally:
        for side in sides.values():
            side.close()


def report(job, unit, medians):
    columns = [f'{name} {number:,.0f}' if number >= 100 else f'{name} {number:.3g}'
               for name, number in medians.items()]
    (_, mine), *others = medians.items()
    for name, number in others:
        ratio = number / max(mine, 1e-9) if unit.split()[0] in LESS else mine / max(number, 1e-9)
        columns.append(f'{ratio:.2f}x {name}')
    print(f'  {job} ({unit})'.ljust(56) + ' | '.join(columns), flush=True)


def rate(count, unit, work):
    begin = time.perf_counter()
    work()
    return {unit: count / (time.perf_counter() - begin)}


def status(key):
    """Bytes of this process, as Linux counts them: VmRSS, VmHWM (the most so far), RssAnon ..."""
    with open('/proc/self/status', encoding='ascii') as f:
        return int(re.search(rf'{key}:\s+(\d+)', f.read())[1]) * 1024


def watch_peak():
    with open('/proc/self/clear_refs', 'w', encoding='ascii') as f:
        f.write('5')  # VmHWM counts from here


def peak(work):
    """What work() adds at its most to what this process holds now, and its seconds."""
    watch_peak()
    before, begin = status('VmRSS'), time.perf_counter()
    work()
    return {'MB': (status('VmHWM') - before) / 2**20, 's': time.perf_counter() - begin}


def options(words, *parts, **known):
    """`key=value` words over these defaults; other words, of `parts`, in .words."""
    known |= dict(quick=0, rounds=3, old='')
    plain = [word for word in words if '=' not in word]
    for word in set(plain) - set(parts):
        sys.exit(f'error: {word}: expected one of {" ".join(parts) or "no words but key=value"}')
    for word in (word for word in words if '=' in word):
        key, _, value = word.partition('=')
        try:
            known[key] = type(known[key])(value)
        except (KeyError, ValueError):
            sys.exit(f'error: {word}: expected one of ' + ' '.join(f'{k}={v}' for k, v in known.items()))
    if known['old'] and not os.path.exists(os.path.join(known['old'], 'sft.py')):
        sys.exit(f"error: old={known['old']}: no checkout of this project is there")
    if known['quick']:
        known['rounds'] = 1
    return types.SimpleNamespace(words=plain, **known)


def read_rows(*path):
    with open(os.path.join(*path), encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def write_rows(path, rows):
    with open(path, 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)


def run_stage(out, *words, env=()):
    """A stage as a command of its own -> the rows of its log.jsonl."""
    command = [sys.executable, *words, f'--out_dir={out}', '--overwrite', '--device=cpu']
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, env={**os.environ, **dict(env)})
    if done.returncode:
        sys.exit(f'error: {words[0]}: {(done.stderr.strip() or "no message").splitlines()[-1]}')
    return read_rows(out, 'log.jsonl')


# ---- data --------------------------------------------------------------------------------------------------
def data_rows(n):
    """n made-up preference rows, about 650 bytes each as JSON."""
    r = random.Random(0)
    words = [''.join(r.choices('etaoinshrdlucmf', k=r.randrange(2, 9))) for _ in range(3000)]
    words += ['naïve', '日本', 'café']
    texts = [' '.join(r.choices(words, k=r.randrange(10, 60))) for _ in range(4000)]
    for i in range(n):
        yield {'prompt': f'{i} {r.choice(texts)}', 'chosen': r.choice(texts), 'rejected': r.choice(texts)}


def data_tokens(batch):
    """Stands for a tokenizer and costs about what tiktoken does: the same on both sides."""
    texts = [prompt + chosen for prompt, chosen in zip(batch['prompt'], batch['chosen'])]
    return {'ids': [[zlib.crc32(word.encode()) % 50257 for word in text.split(' ')] for text in texts]}


def data_starts(rows, n):
    """The start of SFT: every row read and encoded; and the next start, which maps what the first one
    wrote."""
    import dataset
    from tokenizer import encode_row, get_tokenizer
    tokenizer = get_tokenizer('byte')

    def encode(row):
        return [encode_row(row, tokenizer)], ''

    def pairs():
        return dataset.load_dataset(rows).rename_column('chosen', 'completion')

    def again():
        dataset.encoded(pairs(), encode, rows, tokenizer.state)

    def first():
        for file in glob.glob(f'{rows}.*.encoded'):
            os.unlink(file)
        again()

    def in_lists():
        return [encode_row(row, tokenizer) for row in pairs()]
    return {'stage start, in lists': (n, in_lists), 'stage start, first': (n, first),
            'stage start, again': (n, again)}


def data_table(opened, folder, n, **uncached):
    """What is done to a table: {job: (rows, function)}. All but the first open it once."""
    fresh = itertools.count()
    table = functools.cache(lambda: opened(folder))
    mixed = functools.cache(lambda: table().shuffle(seed=1))
    part = functools.cache(lambda: table().select(range(min(n, 40_000))))
    some = min(n, 100_000)
    at = random.Random(0).choices(range(n), k=10_000)

    def each(items):
        for _ in items:
            continue

    def slices(of, count):
        return min(n, count), lambda: each(of()[i:i + 32] for i in range(0, min(n, count), 32))
    return {'open': (1, lambda: opened(folder)),
            'random rows': (len(at), lambda: each(table()[i] for i in at)),
            'slices of 32': slices(table, some), 'shuffled slices of 32': slices(mixed, 32_000),
            'iterate rows': (some, lambda: each(table().select(range(some)))),
            'iter(256)': (some, lambda: each(table().select(range(some)).iter(256))),
            'shuffle': (n, lambda: table().shuffle(seed=next(fresh))),
            'map': (min(n, 40_000), lambda: part().map(data_tokens, batched=True, **uncached))}


def side_data(name, folder, n, memory):
    """Rows a second of each job, or the peak memory that it adds in a process of its own."""
    rows, mine = os.path.join(folder, 'rows.jsonl'), os.path.join(folder, name)
    if name == 'json.loads':
        def load():
            with open(rows, encoding='utf-8') as f:
                for line in f:
                    json.loads(line)
        jobs = {'load': (n, load)}
    elif name == 'datasets':
        import datasets
        datasets.disable_progress_bars()

        def load():  # nothing is found in a cache folder of its own
            cache = tempfile.mkdtemp(dir=folder)
            return datasets.load_dataset('json', data_files=rows, split='train', cache_dir=cache)
        jobs = {'load': (n, load)} | data_table(datasets.load_from_disk, mine, n, load_from_cache_file=False)
    else:
        import dataset

        def load():
            return dataset.load_dataset(rows)
        jobs = {'load': (n, load), **data_starts(rows, n), **data_table(dataset.load_dataset, mine, n)}
        written = os.path.join(folder, 'datasets')
        jobs['open, written by datasets'] = 1, lambda: dataset.load_dataset(written)
    if name != 'json.loads' and not os.path.exists(mine):
        load().save_to_disk(mine)  # each side opens what it has written
    if memory:
        return {job: lambda work=work: {'MB': peak(work)['MB']} for job, (_, work) in jobs.items()}
    return {job: functools.partial(rate, count, 'rows/s', work) for job, (count, work) in jobs.items()}


def bench_data(words):
    """dataset.py beside datasets and bare json.loads: python bench.py data [rows=500000]"""
    opts = options(words, rows=500_000)
    n = 5_000 if opts.quick else opts.rows
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, 'rows.jsonl')
        write_rows(file, data_rows(n))
        print(f'{n:,} rows of prompt, chosen, rejected: {os.path.getsize(file) / 1e6:.0f} MB of JSON lines')
        peers = 'json.loads', 'datasets'
        compare(opts, sides('data', opts, folder, n, False, peers=peers))
        if os.path.exists('/proc/self/clear_refs'):
            opts.rounds = 1
            compare(opts, sides('data', opts, folder, n, True, peers=peers, fresh=True))


# ---- actors ------------------------------------------------------------------------------------------------
def family(pid):
    """The processes that pid started, and theirs. Linux."""
    found = []
    for file in glob.glob(f'/proc/{pid}/task/*/children'):
        with contextlib.suppress(OSError), open(file, encoding='ascii') as f:
            for child in f.read().split():
                found += [child, *family(child)]
    return found


def shared_memory(pids):
    """MB that these processes hold, a shared page split among its users."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError), open(f'/proc/{pid}/smaps_rollup', encoding='ascii') as f:
            total += int(re.search(r'Pss:\s+(\d+)', f.read())[1])
    return total / 1024


def actors_program(name):
    """The same program on either runtime: .rt (the runtime), .task, .Server, .Client."""
    rt = importlib.import_module('ray' if name == 'ray' else 'actors')
    quiet = dict(include_dashboard=False, logging_level='error', log_to_driver=False)
    rt.init(num_cpus=2, object_store_memory=1 << 30, **quiet if name == 'ray' else {})

    @rt.remote
    def task(x):
        return x

    @rt.remote
    class Server:
        def call(self, x):
            return x

        def total(self, a):
            return int(a[::4096].sum())

    @rt.remote
    class Client:
        def calls(self, servers, n):
            return len(rt.get([server.call.remote(i) for i in range(n) for server in servers]))

        def puts(self, blob, n):
            return len([rt.put(blob) for _ in range(n)])
    return types.SimpleNamespace(rt=rt, task=task, Server=Server, Client=Client)


def side_actors(name, quick):
    """Calls a second and GB/s, each after a tenth as many (3 at least) to warm up."""
    import numpy as np
    program = actors_program(name)
    rt, task = program.rt, program.task
    servers = [program.Server.remote() for _ in range(2)]
    clients = [program.Client.remote() for _ in range(2)]
    blob = np.random.default_rng(0).integers(0, 255, 10**8, np.uint8)
    server, small, held = servers[0], blob[:10**6], rt.put(blob)
    jobs = {  # job: (how often, unit, units each time, function)
        'tasks, one by one': (500, '1/s', 1, lambda n: [rt.get(task.remote(i)) for i in range(n)]),
        'tasks, all at once': (2000, '1/s', 1, lambda n: rt.get([task.remote(i) for i in range(n)])),
        'actor calls, one by one': (
            1000, '1/s', 1, lambda n: [rt.get(server.call.remote(i)) for i in range(n)]),
        'actor calls, pipelined': (
            5000, '1/s', 1, lambda n: rt.get([server.call.remote(i) for i in range(n)])),
        'actor calls, 2 clients to 2 actors': (
            500, '1/s', 4, lambda n: rt.get([client.calls.remote(servers, n) for client in clients])),
        'get 100 MB': (100, '1/s', 1, lambda n: [rt.get(held) for _ in range(n)]),
        'put 1 MB, 2 clients': (
            100, 'GB/s', 2 * 0.001, lambda n: rt.get([client.puts.remote(small, n) for client in clients])),
        'put 100 MB and read it in an actor': (
            5, 'GB/s', 0.1, lambda n: [rt.get(server.total.remote(rt.put(blob))) for _ in range(n)])}
    for mb, count in {1: 256, 4: 128, 16: 32, 100: 8}.items():
        put = functools.partial(actors_puts, rt.put, blob[:mb * 10**6])
        jobs[f'put {mb} MB'] = count, 'GB/s', mb / 1000, put

    def measure(job, count, unit, each, work):
        count = count // 10 + 1 if quick else count
        work(max(count // 10, 3))
        begin = time.process_time()
        found = rate(count * each, unit, lambda: work(count))
        if job.endswith(' MB') and unit == 'GB/s':  # beside other work, Ray's six copying threads get more
            found['GB/CPU-s'] = count * each / (time.process_time() - begin)
        return found
    return {job: functools.partial(measure, job, *how) for job, how in jobs.items()}


def actors_puts(put, blob, n):
    for _ in range(n):
        put(blob)


def side_actors_start(name):
    """Everything that happens once: start, first actors, their memory, memory that nobody has touched yet."""
    def start():
        import numpy as np
        begin = time.perf_counter()
        program = actors_program(name)
        rt = program.rt
        rt.get(program.task.remote(1))
        first = time.perf_counter() - begin
        begin = time.perf_counter()
        servers = [program.Server.remote() for _ in range(4)]
        rt.get([server.call.remote(1) for server in servers])
        four = time.perf_counter() - begin
        found = {'s to the first result': first, 's for 4 actors': four,
                 'MB of workers and daemons': shared_memory(family(os.getpid()))}
        blob = np.ones(10**8, np.uint8)
        kept = []
        return found | rate(0.6, 'GB/s, 6 puts of 100 MB kept',
                            lambda: kept.extend(rt.put(blob) for _ in range(6)))
    return {'start': start}


def bench_actors(words):
    """actors.py beside Ray: python bench.py actors"""
    opts = options(words)
    os.environ.pop('OMP_NUM_THREADS', None)
    compare(opts, sides('actors', opts, opts.quick, peers=['ray']))
    compare(opts, sides('actors_start', opts, peers=['ray'], fresh=True))


# ---- kernels -----------------------------------------------------------------------------------------------
def losses(name):
    """{what: f(x (N, C), w (V, C), y (N,))} as this side computes it, a scalar each."""
    import kernels
    import torch
    import torch.nn.functional as F

    def loss(x, w, y):
        return F.cross_entropy(x @ w.t(), y)

    def logprobs(x, w, y):
        return F.log_softmax(x @ w.t(), -1).gather(1, y[:, None]).sum()

    def with_entropy(x, w, y):
        logp = F.log_softmax(x @ w.t(), -1)
        return logp.gather(1, y[:, None]).sum() - (logp.exp() * logp).sum()
    eager = {'loss': loss, 'log-probs': logprobs, 'log-probs + entropy': with_entropy}
    if name in OURS:
        return {'loss': kernels.linear_cross_entropy,
                'log-probs': lambda x, w, y: kernels.linear_logprobs(x, w, y)[0].sum(),
                'log-probs + entropy': lambda x, w, y: sum(o.sum() for o in kernels.linear_logprobs(x, w, y))}
    if name == 'compile':
        return {what: torch.compile(f) for what, f in eager.items()}
    if name == 'chunked':
        how = torch.nn.LinearCrossEntropyOptions()
        return {'loss': lambda x, w, y: F.linear_cross_entropy(x, w, y, options=how)}
    return eager


def linear_inputs(N, C, V, **kind):
    import torch
    x, w = torch.randn(N, C, **kind), torch.randn(V, C, **kind) * C**-0.5
    y = torch.randint(0, V, (N,), device=kind.get('device'))
    return x.requires_grad_(), w.requires_grad_(), y


def side_kernels_memory(name, quick):
    """What logits cost and what leaving them out saves: forward + backward on the CPU, N = 1,024, C = 64."""
    jobs = {}
    for V in (5000,) if quick else (50257, 151936):
        for what, f in losses(name).items():
            x, w, y = linear_inputs(1024, 64, V)
            jobs[f'{what}, V={V}'] = functools.partial(peak, lambda f=f, x=x, w=w, y=y: f(x, w, y).backward())

    def step():
        import torch
        from model import GPT, GPTConfig
        model, idx = GPT(GPTConfig()), torch.randint(0, 50257, (2, 513))
        x, y = idx[:, :-1], idx[:, 1:].contiguous()
        if name in OURS:
            return peak(lambda: model(x, y)[1].backward())
        cross_entropy = torch.nn.functional.cross_entropy
        return peak(lambda: cross_entropy(model(x)[0].flatten(0, 1), y.flatten()).backward())
    if name in (*OURS, 'eager') and not quick:
        jobs['SFT step, GPT-2 small, 1,024 tokens'] = step
    return jobs


def side_kernels_cpu(name, quick):
    """GFLOP/s on one thread, forward + backward, of the products that a task needs: recomputing is not
    counted. The first job says what this machine could do."""
    import kernels
    import torch
    import torch.nn.functional as F
    torch.set_num_threads(1)
    if name == 'eager':
        kernels.use('torch')
    a = torch.randn(1024, 1024)
    work = {'product, 1,024 x 1,024': (2 * 1024**3, (), lambda: kernels.linear(a, a))}
    for N, C, V in ((4096, 128, 257), (4096, 192, 512), (512, 768, 50257))[:1 if quick else 3]:
        inputs = linear_inputs(N, C, V)
        for what, f in losses(name).items():
            work[f'{what}, N={N} C={C} V={V}'] = 6 * N * C * V, inputs[:2], functools.partial(f, *inputs)
    lens = torch.randint(16, 257, (16,), generator=torch.Generator().manual_seed(0))
    starts = F.pad(lens.cumsum(0), (1, 0))
    for nh, hs in ((4, 32), (12, 64)):
        qkv = [torch.randn(int(starts[-1]), nh, hs).requires_grad_() for _ in range(3)]
        attend = functools.partial(kernels.flash_attention, *qkv, cu_seqlens=starts)
        flop = 6 * nh * hs * int((lens**2).sum())
        work[f'attention, 16 documents, {nh} heads of {hs}'] = flop, qkv, lambda f=attend: f().sum()
    x, w, b = (torch.randn(*shape).requires_grad_() for shape in ((3373, 128), (512, 128), (512,)))
    work['linear, 3,373 x 128 x 512'] = 6 * 3373 * 128 * 512, (x, w, b), lambda: kernels.linear(x, w, b).sum()
    if name not in (*OURS, 'eager'):  # the others have losses only
        work = {job: how for job, how in work.items() if ' N=' in job}

    def measure(flop, inputs, f):
        end, calls = 0.0, -1  # the first call compiles
        while calls < 1 or time.perf_counter() < end:
            out = f()
            if inputs:
                torch.autograd.grad(out, inputs)
            calls += 1
            if calls == 0:
                begin = time.perf_counter()
                end = begin + (0.05 if quick else 0.3)
        return {'GFLOP/s': flop * calls / (time.perf_counter() - begin) / 1e9}
    return {job: functools.partial(measure, *how) for job, how in work.items()}


def cuda_ms(f, graph=True):
    """Median ms of f(). A CUDA graph of many calls leaves out the CPU, which takes 0.3 ms to start a
    backward; what cannot be captured (it asks the device something) is timed call by call."""
    import torch
    from triton.testing import do_bench, do_bench_cudagraph
    f()  # compiles
    torch.cuda.empty_cache()  # a graph's memory is its own
    if graph:
        return do_bench_cudagraph(f, rep=10, return_mode='median')
    return do_bench(f, warmup=10, rep=60, return_mode='median')


def cuda_copy():
    """Bytes a ms, read and written, of a copy of 2 GB."""
    import torch
    big = torch.empty(1 << 31, device='cuda', dtype=torch.uint8)
    into = torch.empty_like(big)
    return 2 * big.nbytes / cuda_ms(lambda: into.copy_(big))


def cuda_both(f, inputs, graph=True):
    """Median ms of the forward (gradients on), and of forward + backward."""
    import torch

    def listed():
        out = f()
        return out if isinstance(out, tuple) else (out,)
    grads = [torch.randn_like(out) for out in listed()]
    return cuda_ms(f, graph), cuda_ms(lambda: torch.autograd.grad(listed(), inputs, grads), graph)


def side_cuda_memory(name):
    """Kernels that memory bounds, bfloat16: bytes that must move, as a share of the copy bandwidth here.
    Tensors are far larger than L2."""
    import kernels as K
    import torch
    import torch.nn.functional as F
    K.use('triton')
    rand = functools.partial(torch.randn, device='cuda', dtype=torch.bfloat16, requires_grad=True)
    copy = cuda_copy()
    x, r = rand(16384, 4096), rand(16384, 4096)
    w, b = rand(4096), rand(4096)
    q, k = rand(4, 4096, 32, 128), rand(4, 4096, 8, 128)
    angle = torch.linspace(0, 100, 4096 * 64, device='cuda').view(4096, 64)
    cos, sin = angle.cos(), angle.sin()
    g, u = rand(16384, 12288), rand(16384, 12288)
    z, y = rand(8192, 131072), torch.arange(8192, device='cuda') * 16

    def added():
        h = x + r
        return F.rms_norm(h, (4096,), w, 1e-6), h

    def entropies():
        logp = F.log_softmax(z.float(), -1)
        return F.nll_loss(logp, y, reduction='none'), -(logp.exp() * logp).sum(-1)
    S, QK, G = x.nbytes, 2 * (q.nbytes + k.nbytes), g.nbytes
    eager = {
        'rms_norm + residual': added,
        'rms_norm': lambda: F.rms_norm(x, (4096,), w, 1e-6),
        'layer_norm': lambda: F.layer_norm(x, (4096,), w, b, 1e-5),
        'rope': lambda: (K._rotate(q, cos, sin), K._rotate(k, cos, sin)),
        'swiglu': lambda: F.silu(g) * u,
        'gelu': lambda: F.gelu(g, approximate='tanh'),
        'cross_entropy + entropy': entropies}
    ours = {
        'rms_norm + residual': lambda: K.rms_norm(x, w, 1e-6, r),
        'rms_norm': lambda: K.rms_norm(x, w, 1e-6),
        'layer_norm': lambda: K.layer_norm(x, w, b, 1e-5),
        'rope': lambda: K.rope(q, k, cos, sin),
        'swiglu': lambda: K.swiglu(g, u),
        'gelu': lambda: K.gelu(g),
        'cross_entropy + entropy': lambda: K.cross_entropy(z, y)}
    must_move = {  # bytes forward, bytes backward, what is differentiated
        'rms_norm + residual': (4 * S, 4 * S, (x, r, w)),
        'rms_norm': (2 * S, 3 * S, (x, w)),
        'layer_norm': (2 * S, 3 * S, (x, w, b)),
        'rope': (QK, QK, (q, k)),
        'swiglu': (3 * G, 5 * G, (g, u)),
        'gelu': (2 * G, 3 * G, (g,)),
        'cross_entropy + entropy': (z.nbytes, 2 * z.nbytes, (z,))}

    def measure(job):
        f = ours[job] if name in OURS else eager[job]
        forward, backward, inputs = must_move[job]
        t, both = cuda_both(torch.compile(f) if name == 'compile' else f, inputs)
        return {'% of copy': 100 * forward / t / copy,
                '% of copy, backward': 100 * backward / max(both - t, 1e-6) / copy}
    def paged(B, context):
        blocks = B * context // 16
        keys, values = rand(blocks, 16, 8, 128), rand(blocks, 16, 8, 128)
        table = torch.randperm(blocks, device='cuda').int().view(B, -1)
        lens, q = torch.full((B,), context, device='cuda', dtype=torch.int32), rand(B, 32, 128)
        with torch.no_grad():
            t = cuda_ms(lambda: K.paged_attention(q, keys, values, table, lens))
        return {'% of copy': 100 * 2 * keys.nbytes / t / copy}
    jobs = {'copy': lambda: {'GB/s': copy / 1e6}}
    jobs |= {job: functools.partial(measure, job) for job in must_move}
    if name in OURS:
        for B, context in ((64, 4096), (256, 1024), (1, 32768)):
            jobs[f'paged decode, {B} x {context}'] = functools.partial(paged, B, context)
    return jobs


def side_cuda_products(name):
    """Attention (16 documents of 2,048, 32 heads on 8), linear + softmax (4,096 rows, 131,072 words)."""
    import kernels as K
    import torch
    import torch.nn.functional as F
    K.use('triton')
    rand = functools.partial(torch.randn, device='cuda', dtype=torch.bfloat16, requires_grad=True)

    def dense(q, k, v, starts):
        rows = (t.view(16, 2048, -1, t.shape[-1]).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(*rows, is_causal=True, enable_gqa=True)

    def varlen(q, k, v, starts):
        from torch.nn.attention.varlen import varlen_attn
        return varlen_attn(q, k, v, starts, starts, 2048, 2048, window_size=(-1, 0), enable_gqa=True)

    def packed(q, k, v, starts):  # flash_attention, its one question to the device answered
        return K._Flash.apply(q, k, v, starts, starts, (2048, 2048), q.shape[-1]**-0.5)

    def attention(hs):
        attend = {'eager': dense, 'varlen': varlen}.get(name, packed)
        inputs = rand(32768, 32, hs), rand(32768, 8, hs), rand(32768, 8, hs)
        starts = torch.arange(17, device='cuda', dtype=torch.int32) * 2048
        t, both = cuda_both(lambda: attend(*inputs, starts), inputs)
        flop = 4 * 16 * 32 * hs * 2048**2 / 2
        return {'TFLOP/s': flop / t / 1e9, 'TFLOP/s, with backward': 3.5 * flop / both / 1e9}

    def linear(f):
        inputs = linear_inputs(4096, 4096, 131072, device='cuda', dtype=torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        t, both = cuda_both(lambda: f(*inputs), inputs[:2], graph=False)
        return {'ms': t, 'ms, with backward': both, 'GB': (torch.cuda.max_memory_allocated() - base) / 1e9}
    jobs = {}
    if name != 'chunked':
        jobs = {f'attention, head size {hs}': functools.partial(attention, hs) for hs in (128, 64)}
    if name != 'varlen':
        jobs |= {f'linear + {what}': functools.partial(linear, f) for what, f in losses(name).items()}
    return jobs


def bench_kernels(words):
    """kernels.py beside eager torch, torch.compile, F.linear_cross_entropy (chunked) and varlen_attn:
    python bench.py kernels [memory cpu cuda]"""
    import torch
    opts = options(words, 'memory', 'cpu', 'cuda')
    parts = opts.words or ['memory', 'cpu', *['cuda'] * torch.cuda.is_available()]
    compiled = [] if opts.quick else ['compile']
    if 'memory' in parts:
        compare(opts, sides('kernels_memory', opts, opts.quick, peers=['eager', 'chunked'], fresh=True))
    if 'cpu' in parts:
        compare(opts, sides('kernels_cpu', opts, opts.quick, peers=['eager', *compiled, 'chunked']))
    if 'cuda' in parts:
        compare(opts, sides('cuda_memory', opts, peers=['eager', *compiled]))
        compare(opts, sides('cuda_products', opts, peers=['eager', 'chunked', 'varlen']))


# ---- infer -------------------------------------------------------------------------------------------------
SHAPES = {
    'tiny': dict(arch='gpt2', n_layer=4, n_head=4, n_embd=128, vocab_size=2048, block_size=512),
    'qwen3': dict(arch='qwen3', n_layer=8, n_head=8, n_kv_head=4, n_embd=256, head_size=32, n_inner=768,
                  vocab_size=4096, block_size=512),
    'gpt2': dict(arch='gpt2'),
    'qwen3-0.6b': dict(arch='qwen3', n_layer=28, n_head=16, n_kv_head=8, n_embd=1024, head_size=128,
                       n_inner=3072, vocab_size=151936, block_size=4096, norm_eps=1e-6, rope_theta=1e6,
                       tie=True)}


def random_model(shape):
    import torch
    from model import ARCHS, GPT, GPTConfig
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**ARCHS[shape['arch']], **shape})).eval()


def side_infer(name, folder, dtype):
    """Tokens a second that were asked for: one round of requests, greedy, EOS ignored."""
    work, = read_rows(folder, 'work.jsonl')
    run = dict(continuous=infer_continuous, generate=infer_generate, vllm=infer_vllm).get(name, infer_ours)
    round_of = run(folder, dtype, work['prompts'], work['lens'])
    round_of()
    return {'output': functools.partial(rate, sum(work['lens']), 'tok/s', round_of)}


def infer_ours(folder, dtype, prompts, lens):
    import torch
    from infer import Engine, SamplingParams
    from model import GPT
    engine = Engine(GPT.from_pretrained(folder).eval().to(getattr(torch, dtype)), None)
    params = [SamplingParams(max_tokens=n, temperature=0, ignore_eos=True) for n in lens]

    def round_of():
        if hasattr(engine, 'threads'):  # an older one tries threads by itself
            engine.threads = torch.get_num_threads()
        engine.blocks.forget()
        engine.generate(prompts, params)
    return best_threads(round_of)


def infer_vllm(folder, dtype, prompts, lens):
    from vllm import LLM, SamplingParams
    llm = LLM(folder, skip_tokenizer_init=True, dtype=dtype, max_model_len=512, max_num_seqs=256,
              enable_prefix_caching=True)
    params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n, detokenize=False) for n in lens]
    requests = [dict(prompt_token_ids=prompt) for prompt in prompts]

    def round_of():
        llm.reset_prefix_cache()
        llm.generate(requests, params, use_tqdm=False)
    return round_of


def best_threads(run):
    """run() with one thread or with all, whichever is faster for it."""
    import torch
    took = {}
    for n in sorted({1, os.cpu_count()}):
        torch.set_num_threads(n)
        took[n] = rate(1, '1/s', run)['1/s']
    torch.set_num_threads(max(took, key=took.get))
    return run


def infer_generate(folder, dtype, prompts, lens):
    """transformers: one batch, padded on the left."""
    import torch
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    width = max(map(len, prompts))
    idx = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    how = dict(max_new_tokens=max(lens), min_new_tokens=max(lens), do_sample=False, eos_token_id=None)
    return best_threads(lambda: model.generate(idx, attention_mask=mask, pad_token_id=0, **how))


def infer_continuous(folder, dtype, prompts, lens):
    """transformers' continuous batching; without a limit its cache takes most of the memory there is."""
    import torch
    import transformers
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype),
                                                              attn_implementation='sdpa')
    how = transformers.GenerationConfig(do_sample=False, max_new_tokens=max(lens), eos_token_id=-1,
                                        pad_token_id=0)
    room = transformers.ContinuousBatchingConfig(num_blocks=256, block_size=256, max_batch_tokens=2048)

    def round_of():
        with model.continuous_batching_context_manager(
                generation_config=how, continuous_batching_config=room, warmup=False) as manager:
            for prompt, n in zip(prompts, lens):
                manager.add_request(prompt, max_new_tokens=n, eos_token_id=-1)
            got = 0
            while got < len(prompts):
                result = manager.get_result(timeout=1)
                got += result is not None and result.is_finished()
                if result is None and not manager.is_running():
                    raise RuntimeError('continuous batching of transformers ended early')
    return best_threads(round_of)


def side_infer_cuda(name):
    """nano-vllm's bench: 256 requests of 100 to 1,024 tokens in and out, the Qwen3-0.6B shape, random
    weights; then a decode step of 256 rows beside the time that its bytes need at the copy bandwidth."""
    import torch
    from infer import Engine, SamplingParams
    with torch.device('cuda'):
        model = random_model(SHAPES['qwen3-0.6b']).to(torch.bfloat16)
    rng, c = random.Random(0), model.config
    prompts = [rng.choices(range(10_000), k=rng.randint(100, 1024)) for _ in range(256)]
    lens = [rng.randint(100, 1024) for _ in prompts]
    engine = Engine(model, None, max_num_seqs=256, max_num_batched_tokens=16384, block_size=16)

    def seconds(prompts, lens):
        engine.blocks.forget()
        params = [SamplingParams(max_tokens=n, temperature=0.6, ignore_eos=True) for n in lens]
        torch.cuda.synchronize()
        begin = time.perf_counter()
        engine.generate(prompts, params)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    # every size of batch: kernels compile, graphs are captured
    first = seconds([[i % 100] * 600 for i in range(256)], range(1, 257))

    def steps():
        long = [(prompt * 11)[:1000] for prompt in prompts]
        prefill = seconds(long, [1] * 256)
        step = (seconds(long, [41] * 256) - prefill) / 40  # with 1,021 tokens in the middle
        moved = 2 * sum(p.numel() for p in model.parameters())
        moved += 4 * c.n_layer * c.n_kv_head * c.head_size * 256 * 1021
        floor = moved / cuda_copy()
        return {'s to prefill 256 x 1,000': prefill, 'ms': 1e3 * step, 'ms, at copy speed': floor}
    return {'first use': lambda: {'s': first}, 'decode step, 256 rows': steps,
            "nano-vllm's bench": lambda: {'tok/s': sum(lens) / seconds(prompts, lens)}}


def bench_infer(words):
    """infer.py beside transformers and vLLM: python bench.py infer [tiny qwen3 gpt2] [requests=64]
    [peers=generate,continuous] [vllm=PYTHON of its environment] [cores=auto or 0-1] [dtype=float32].
    Prompts and outputs of 16 to 128 tokens. With CUDA: nano-vllm's bench."""
    import torch
    opts = options(words, *SHAPES, requests=64, peers='generate,continuous', vllm='', cores='auto',
                   dtype='float32')
    if torch.cuda.is_available():
        return compare(opts, sides('infer_cuda', opts))
    rng = random.Random(0)
    for shape in opts.words or (['tiny'] if opts.quick else ['tiny', 'qwen3', 'gpt2']):
        model = random_model(SHAPES[shape])
        lens = [rng.randint(16, 128) for _ in range(8 if opts.quick else opts.requests)]
        prompts = [rng.choices(range(model.config.vocab_size), k=rng.randint(16, 128)) for _ in lens]
        print(f'{shape}: {len(lens)} requests, {sum(lens):,} tokens to come')
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            write_rows(os.path.join(folder, 'work.jsonl'), [dict(prompts=prompts, lens=lens)])
            named = [peer for peer in opts.peers.split(',') if peer]
            made = sides('infer', opts, folder, opts.dtype, peers=named)
            if opts.vllm:
                made['vllm'] = vllm_side(opts, folder)
            compare(opts, made)


def vllm_side(opts, folder):
    """In its own interpreter. Intel's OpenMP is loaded where the package is there, as vLLM's guide says."""
    env = dict(VLLM_CPU_KVCACHE_SPACE='2', VLLM_LOGGING_LEVEL='ERROR', HF_HUB_OFFLINE='1',
               VLLM_CPU_OMP_THREADS_BIND=opts.cores)
    omp = os.path.join(os.path.dirname(opts.vllm), '..', 'lib', 'libiomp5.so')
    if os.path.exists(omp):
        env['LD_PRELOAD'] = omp
    return Side('infer', 'vllm', folder, opts.dtype, python=opts.vllm, env=env, pauses=True)


# ---- parallel ----------------------------------------------------------------------------------------------
def spawn(world, **how):
    """parallel_steps in `world` processes over gloo, one thread each -> what rank 0 found."""
    import torch.multiprocessing as mp
    answers = mp.get_context('spawn').SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(parallel_rank, (world, f'{folder}/store', answers, how), nprocs=world)
    return answers.get()


def parallel_rank(rank, world, store, answers, how):
    import torch
    import torch.distributed as dist
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group('gloo', store=dist.FileStore(store, world), rank=rank, world_size=world)
    found = parallel_steps(**how)
    if rank == 0:
        answers.put(found)


def parallel_steps(shape, layout, B, T, micros=1, steps=1):
    """`steps` steps of `micros` micro-batches of B x T tokens a replica -> the last metrics, bytes of the
    model's training, what parallel.plan says of them."""
    import parallel
    import torch
    from model import GPT, GPTConfig
    from run import activation_bytes
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.sum().backward()
    torch.optim.AdamW([weight], fused=True).step()  # what torch loads for its first step is not the model's
    before = status('RssAnon')
    mesh = parallel.init(device='cpu', **layout)
    torch.manual_seed(0)
    full = GPT(GPTConfig(**shape))
    activations = activation_bytes(full.config, B * T, T)
    planned = parallel.plan(full, dp=mesh.dp, activations=activations, **layout)
    model = parallel.shard(full, mesh)
    optimizer = parallel.Optimizer(model, mesh, 1e-4)
    idx = torch.randint(0, 4096, (B, T + 1), generator=torch.Generator().manual_seed(0))

    def step(count):
        metrics = parallel.forward_backward(model, optimizer, [idx] * count, loss_of)
        parallel.clip_and_step([optimizer], [1e-4], 1.0)
        return metrics
    step(1)  # makes the moments
    gc.collect()
    ctypes.CDLL('libc.so.6').malloc_trim(0)
    watch_peak()
    for _ in range(steps):
        mesh.barrier()
        metrics = step(micros)
    used = status('VmHWM') - status('RssFile') - status('RssShmem') - before  # files mapped do not count
    mesh.close()
    return metrics, used, planned


def loss_of(model, rows):
    return model(rows[:, :-1], rows[:, 1:])[1], {}


def bench_parallel(words):
    """Memory beside parallel.plan, the pipeline's bubble, over gloo on the CPU:
    python bench.py parallel [memory bubble]"""
    opts = options(words, 'memory', 'bubble')
    parts = opts.words or ['memory', 'bubble']
    layouts = [(1, {}), *((2, dict(zero=z)) for z in range(4)), (2, dict(tp=2)), (2, dict(pp=2)),
               *((4, dict(zero=z)) for z in (1, 2, 3)), (4, dict(tp=4)), (4, dict(tp=2, zero=1)),
               (4, dict(tp=2, pp=2))]
    shape = dict(vocab_size=4096, block_size=512, n_layer=2 if opts.quick else 8, n_head=8, n_embd=384)
    how, steps = dict(shape=shape, B=4, T=128), 2 if opts.quick else 8
    if 'memory' in parts:
        print('GB of rank 0 above its start, GPT-2 small, float32, 1 x 64 tokens')
        os.environ['MALLOC_MMAP_THRESHOLD_'] = str(1 << 20)  # else glibc keeps holes of up to 32 MB
        for world, layout in layouts[:2] if opts.quick else layouts:
            used, planned = spawn(world, shape={}, layout=layout, B=1, T=64)[1:]
            plan = ', '.join(f'{key} {size / 1e9:.2f}' for key, size in planned.items() if size)
            print(f'  {world} ranks {layout}: measured {used / 1e9:.2f}, planned {plan}', flush=True)
        del os.environ['MALLOC_MMAP_THRESHOLD_']
    if 'bubble' in parts:
        print('share of the time that rank 0 of 2 waits, and (pp - 1) / (m + pp - 1)')
        for m in 1, 2, 4, 8:
            metrics = spawn(2, layout=dict(pp=2), micros=m, steps=steps // 2, **how)[0]
            print(f'  m={m}: {metrics["bubble"]:.0%} measured, {metrics["bubble_ideal"]:.0%} by the schedule')


# ---- train -------------------------------------------------------------------------------------------------
STAGES = {
    'sft': 'sft.py --dataset=sft.jsonl --init_from=lm',
    'reward': 'reward.py --dataset=pref.jsonl --init_from=lm --normalize=none',
    'dpo': 'dpo.py --dataset=pref.jsonl --init_from=lm --eval_samples=0',
    'grpo': 'grpo.py --dataset=prompts.jsonl --init_from=lm --reward=count.py --minibatch_size={B}'
            ' --group_size=8 --max_new_tokens=64 --eval_iters=1 --long_prompts=cut',
    'ppo': 'ppo.py --dataset=prompts.jsonl --init_from=lm --reward=rm --minibatch_size={B} --ppo_epochs=4'
           ' --max_new_tokens=64 --eval_iters=1 --missing_eos=none'}


def train_world(folder, shape):
    """512 rows of 16 to 256 tokens (a byte each) for every stage, a random model and its tokenizer: ours and
    HF's at once."""
    from model import GPT, GPTConfig
    from tokenizer import get_tokenizer
    r = random.Random(0)

    def text(low, high):
        return ''.join(r.choices('etaoin shrdlu', k=r.randrange(low, high)))
    makers = {'sft': lambda: dict(prompt=text(8, 128), completion=text(8, 127)),
              'pref': lambda: dict(prompt=text(8, 128), chosen=text(8, 127), rejected=text(8, 127) + 'b'),
              'prompts': lambda: dict(prompt=text(16, 128))}
    for name, row in makers.items():
        write_rows(os.path.join(folder, f'{name}.jsonl'), [row() for _ in range(512)])
    with open(os.path.join(folder, 'count.py'), 'w', encoding='utf-8') as f:
        f.write('def reward(prompt, completion, row):\n    return completion.count("e") / 64\n')
    ids = dict(bos_token_id=256, eos_token_id=256, pad_token_id=257, block_size=512)
    for name, head in (('lm', 'lm'), ('rm', 'scalar')):
        GPT(GPTConfig(**shape, **ids), head).save_pretrained(os.path.join(folder, name))
        get_tokenizer('byte').save(os.path.join(folder, name))


def side_train(name, stage, folder, B, steps):
    """A whole run of a stage in a process of its own: samples a second after the first step, MB above the
    imports."""
    if name.startswith('TRL'):
        return {stage: train_trl(name, stage, folder, B, steps)}
    for module in 'dataset', 'infer', 'lora', 'parallel', 'run', 'torch._dynamo':
        with contextlib.suppress(ImportError):  # an older checkout may have other rooms
            importlib.import_module(module)
    out = os.path.join(folder, 'out')

    def run():
        base = status('VmHWM')
        sys.argv = [*STAGES[stage].format(B=B).split(), f'--batch_size={B}', f'--out_dir={out}',
                    f'--max_iters={steps}', '--eval_interval=100000', '--tokenizer=byte', '--overwrite',
                    '--device=cpu']
        os.chdir(folder)
        runpy.run_path(os.path.join(sys.path[0], sys.argv[0]), run_name='__main__')
        times = [row['time'] for row in read_rows(out, 'log.jsonl') if row['split'] == 'train']
        return train_result(times, B, base)
    return {stage: run}


def train_result(times, B, base):
    rate_of = B * (len(times) - 1) / (times[-1] - times[0])
    return {'samples/s': rate_of, 'MB': (status('VmHWM') - base) / 2**20}


def train_trl(name, stage, folder, B, steps):
    """The same by TRL's trainer: rows, model, batch. TRL 0.24 is the last that has PPO in its main part."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    prefix = 'Reward' if stage == 'reward' else stage.upper()
    Trainer, Config = getattr(trl, f'{prefix}Trainer'), getattr(trl, f'{prefix}Config')
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **more):
            times.append(time.time())
            return control if more else None

    def network(kind, path):
        extra = {} if path == 'lm' else {'num_labels': 1}
        return kind.from_pretrained(os.path.join(folder, path), dtype=torch.float32, **extra)

    def run():
        base = status('VmHWM')
        rows = {'sft': 'sft', 'grpo': 'prompts', 'ppo': 'prompts'}.get(stage, 'pref')
        data = Dataset.from_list(read_rows(folder, f'{rows}.jsonl'))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(os.path.join(folder, 'lm'), pad_token='<pad>')
        lm = functools.partial(network, AutoModelForCausalLM, 'lm')
        scalar = functools.partial(network, AutoModelForSequenceClassification, 'rm')
        common = dict(output_dir=os.path.join(folder, 'trl'), per_device_train_batch_size=B, report_to=[],
                      use_cpu=True, bf16=False, save_strategy='no', logging_steps=1, disable_tqdm=True,
                      gradient_checkpointing=False, dataloader_pin_memory=False)
        common |= {'total_episodes': steps * B} if stage == 'ppo' else {'max_steps': steps}
        parts = dict(processing_class=tokenizer, train_dataset=data, callbacks=[Clock()])
        if stage == 'ppo':
            how = dict(num_ppo_epochs=4, num_mini_batches=1, response_length=64, num_sample_generations=0)
            data = data.map(lambda row: dict(input_ids=tokenizer(row['prompt'])['input_ids']),
                            remove_columns=['prompt'])
            parts |= dict(model=lm(), ref_model=lm(), reward_model=scalar(), value_model=scalar(),
                          train_dataset=data, eval_dataset=data.select(range(8)))
        elif stage == 'grpo':
            how = dict(num_generations=8, max_completion_length=64, beta=0.0, steps_per_generation=1)
            if 'continuous' in name:
                room = dict(num_blocks=256, block_size=256, max_batch_tokens=2048)
                how |= dict(use_transformers_continuous_batching=True,
                            transformers_continuous_batching_config=room)
            parts |= dict(model=lm(), reward_funcs=trl_reward)
        else:
            how = dict(max_length=256, **dict(completion_only_loss=True) if stage == 'sft' else {})
            parts['model'] = scalar() if stage == 'reward' else lm()
        Trainer(args=Config(**how, **common), **parts).train()
        return train_result(times, B, base)
    return run


def trl_reward(completions, **columns):
    assert 'prompts' in columns
    return [completion.count('e') / 64 for completion in completions]


NANO = ('--n_layer=4 --n_head=4 --n_embd=128 --dropout=0.0 --block_size=128 --batch_size=16 --max_iters=60'
        ' --eval_interval=100000 --eval_iters=1 --device=cpu --learning_rate=1e-3').split()


def side_nanogpt(name, source, folder):
    """Pretraining on tiny Shakespeare by characters, 16 x 128 tokens a step, by both train scripts. Both read
    the same train.bin."""
    words = [*NANO, '--dataset=' + os.path.join(HERE, 'data', 'shakespeare_char')]

    def ours():
        rows = run_stage(os.path.join(folder, 'out'), 'sft.py', *words)
        return {'tok/s': statistics.median(row['tok_per_s'] for row in rows if row['split'] == 'train')}

    def nano():
        extra = ['--compile=False', '--bias=False', '--gradient_accumulation_steps=1', '--log_interval=1']
        command = [sys.executable, 'train.py', *words, *extra, f'--out_dir={folder}/nano']
        done = subprocess.run(command, cwd=source, stdout=subprocess.PIPE, text=True, check=True)
        ms = [float(x) for x in re.findall(r'time ([\d.]+)ms', done.stdout)[2:]]
        return {'tok/s': 16 * 128 / statistics.median(ms) * 1e3}
    return {'pretraining, Shakespeare': nano if name == 'nanoGPT' else ours}


def bench_train(words):
    """Stages beside TRL's trainers and nanoGPT's train.py: python bench.py train [model=tiny|gpt2]
    [stages=sft,dpo] [ppo_python=PYTHON of an environment with trl==0.24.0] [nanogpt=FOLDER of a checkout]"""
    opts = options(words, model='tiny', stages='sft,reward,dpo,grpo,ppo', ppo_python='', nanogpt='')
    shape = dict(tiny=dict(n_layer=4, n_head=4, n_embd=128, vocab_size=512), gpt2={})[opts.model]
    B, steps = (16, 9) if opts.model == 'tiny' else (8, 3)
    steps = 3 if opts.quick else steps
    print(f'{opts.model}: batches of {B} rows, 16 to 256 tokens each, float32, CPU; MB above the imports')
    with tempfile.TemporaryDirectory() as folder:
        train_world(folder, shape)
        for stage in opts.stages.split(','):
            work = stage, folder, B, steps
            peers = {'grpo': ['TRL', 'TRL, continuous'], 'ppo': []}.get(stage, ['TRL'])
            made = sides('train', opts, *work, peers=peers, fresh=True)
            if stage == 'ppo' and opts.ppo_python:  # the newest TRL has no PPO
                made['TRL'] = Side('train', 'TRL', *work, fresh=True, python=opts.ppo_python)
            compare(opts, made)
        if opts.nanogpt:
            source = os.path.abspath(opts.nanogpt)
            compare(opts, sides('nanogpt', opts, source, folder, peers=['nanoGPT']))


# ---- neighbour, async --------------------------------------------------------------------------------------
def bench_neighbour(words):
    """config/pretrain_toy.py alone, and beside a process that computes without a pause, for several ways to
    wait: python bench.py neighbour [iters=20]. A thread that spins (GOMP_SPINCOUNT: how long) takes the core
    from the one that it waits for, as soon as there are fewer cores than threads. 8 minutes on two cores."""
    opts = options(words, iters=20)
    ways = {'as shipped': {}, 'passive': dict(OMP_WAIT_POLICY='PASSIVE'),
            'spin 1,000': dict(GOMP_SPINCOUNT='1000'), 'spin 100,000': dict(GOMP_SPINCOUNT='100000'),
            '1 thread': dict(OMP_NUM_THREADS='1')}
    keys = [f'--max_iters={12 if opts.quick else opts.iters}', '--eval_interval=1000000', '--eval_iters=1']
    for way, env in ways.items():
        seen = {}
        for beside in 'alone', 'beside a busy process':
            with tempfile.TemporaryDirectory() as out, contextlib.ExitStack() as stack:
                if beside != 'alone':
                    busy = subprocess.Popen([sys.executable, __file__, 'spin'])
                    stack.callback(busy.wait)
                    stack.callback(busy.kill)
                rows = run_stage(out, 'sft.py', 'config/pretrain_toy.py', *keys, env=env)
            steady = [row for row in rows if row['split'] == 'train' and row['step'] >= 10]
            seen[beside] = statistics.median(row['tok_per_s'] for row in steady)
        report(way, 'tok/s', seen)


def bench_async(words):
    """GRPO with its rollouts in the same process (sync) and in workers ahead of it (async), in turn:
    python bench.py async [iters=40] [reward_ms=5] [seeds=1337,2,3] [init_from=out-sft]. On copying words,
    with a judge that takes reward_ms an answer; from out-sft on the toy sums, whose reward costs nothing."""
    opts = options(words, init_from='', iters=40, reward_ms=5.0, seeds='1337,2,3')
    iters, seeds = (4, '1') if opts.quick else (opts.iters, opts.seeds)
    modes = {'async': '--mode=async --max_staleness=1 --rollout_workers=1 --reward_workers=4'.split(),
             'sync': ['--mode=sync']}
    keys = [f'--max_iters={iters}', f'--eval_interval={iters}', '--batch_size=128', '--minibatch_size=64']
    with tempfile.TemporaryDirectory() as folder:
        if opts.init_from:
            toy = os.path.join(HERE, 'data', 'toy')
            keys = ['config/grpo_toy.py', f'--dataset={toy}/arith_train.jsonl', f'--reward={toy}/reward.py',
                    f'--val_dataset={toy}/arith_val.jsonl', f'--init_from={opts.init_from}', *keys]
        else:
            made = [sys.executable, os.path.join(HERE, 'experiments', 'staleness.py'), 'world',
                    f'--out={folder}', f'--reward_ms={opts.reward_ms}']
            keys += json.loads(subprocess.run(made, check=True, capture_output=True, text=True).stdout)
        found = {}  # (what, unit): {mode: numbers}
        for seed, mode in itertools.product(seeds.split(','), modes):
            out = os.path.join(folder, f'{mode}-{seed}')
            env = dict(OMP_NUM_THREADS='1')
            rows = run_stage(out, 'grpo.py', *keys, *modes[mode], '--threads=1', f'--seed={seed}', env=env)
            train = [row for row in rows if row['split'] == 'train'][2:]  # the first wait for workers
            seconds = sum(row['tokens'] / row['tok_per_s'] for row in train)
            numbers = {('held-out score', '%'): 100 * rows[-1]['score'],
                       ('rollouts', 'completions/s'): 128 * len(train) / seconds,
                       ('trainer', 's idle of 100'): 100 * sum(row['gen_s'] for row in train) / seconds}
            for what, number in numbers.items():
                found.setdefault(what, {}).setdefault(mode, []).append(number)
        for what, numbers in found.items():
            report(*what, {mode: statistics.median(row) for mode, row in numbers.items()})


def spin():
    while True:
        continue


if __name__ == '__main__':
    _sections = {name[6:]: f for name, f in globals().items() if name.startswith('bench_')}
    _word = sys.argv[1] if len(sys.argv) > 1 else ''
    if _word == 'side':
        run_side(*sys.argv[2:])
    elif _word == 'spin':
        spin()
    elif _word not in (*_sections, 'all'):
        print(f'{__doc__}\nsections: {", ".join(_sections)}', file=sys.stderr)
        sys.exit(2)
    for _name in _sections if _word == 'all' else [_word] * (_word in _sections):
        _sections[_name](sys.argv[2:])
