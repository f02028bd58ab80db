"""Every speed figure that the README states, each by one command; every figure is a ratio to a named peer in the same run.

    python bench.py kernels | data | infer | actors | parallel | train      # one section
    python bench.py all                                                     # all of them, one after the other

A peer that is not installed is named and skipped. Machines are noisy: sides alternate, the median of the rounds counts.
"""
import sys
import subprocess


def alternate(sides, rounds=3):
    """{name: fn() -> rate} run in turn `rounds` times -> {name: median rate}. Turns, not blocks: drift hits all sides."""
    seen = {name: [] for name in sides}
    for _ in range(rounds):
        for name, fn in sides.items():
            seen[name].append(fn())
    return {name: sorted(rates)[len(rates) // 2] for name, rates in seen.items()}


# one function a section, `bench_<section>(args)`, args = the words behind the section's name

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


if __name__ == '__main__':
    sections = {k[len('bench_'):]: v for k, v in globals().items() if k.startswith('bench_')}
    if len(sys.argv) < 2 or sys.argv[1] not in [*sections, 'all']:
        print(f'{__doc__}\nsections: {", ".join(sections)}', file=sys.stderr)
        sys.exit(2)
    for _name in sections if sys.argv[1] == 'all' else [sys.argv[1]]:
        sections[_name](sys.argv[2:])
