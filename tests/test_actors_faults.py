"""When things break: processes killed at every place, nodes lost, strangers at the port. Counts are exact."""
import builtins
import gc
import glob
import os
import pathlib
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import types
import urllib.error
from contextlib import suppress

import numpy as np
import pytest

import actors

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # workers import this file: not conftest
TOKEN = 'a token for these tests only'
SCRIPT = os.path.join(ROOT, 'actors.py')


def soon(condition, seconds=20):
    """Wait for a condition that another process brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it did not come about'
        time.sleep(0.02)
    return True


def works(call, error):
    """Whether the call goes through, or raises what it may."""
    try:
        call()
        return True
    except error:
        return False


def stat(pid):
    """[state, parent, ...] of a process; of one that is gone, Z."""
    try:
        return pathlib.Path(f'/proc/{pid}/stat').read_text('utf-8').rpartition(')')[2].split()
    except OSError:
        return ['Z', 0]


def alive(pid):
    return stat(pid)[0] != 'Z'


def descendants(pid):
    parents = {int(p): int(stat(p)[1]) for p in os.listdir('/proc') if p.isdigit()}
    found = [pid]
    for parent in found:  # it grows
        found += [child for child in parents if parents[child] == parent]
    return found[1:]


def holders():
    """Processes that hold or map an arena of ours: leaked shared memory would have one."""
    found = set()
    for fd in glob.glob('/proc/[0-9]*/fd/*'):
        with suppress(OSError):
            if 'memfd:actors' in os.readlink(fd):
                found.add(int(fd.split('/')[2]))
    return found


@pytest.fixture
def runtime(monkeypatch):
    monkeypatch.setattr(actors, 'PRELOAD', [])  # nothing here needs torch, which conftest has imported
    shm = set(os.listdir('/dev/shm'))
    actors.shutdown()
    actors.init(num_cpus=2, object_store_memory=64 << 20)
    yield actors._session.runtime
    pids = descendants(os.getpid())
    actors.shutdown()
    assert not any(map(alive, pids))  # no orphan
    gc.collect()
    assert os.getpid() not in holders() and set(os.listdir('/dev/shm')) <= shm


def log(file):
    with open(file, 'a', encoding='ascii') as f:
        f.write(f'{os.getpid()}\n')


def lines(file):
    return pathlib.Path(file).read_text('ascii').split() if os.path.exists(file) else []


def freed(runtime):
    return actors.available_resources() and not runtime.space.taken


@actors.remote
def slow(file, seconds, value=1):
    log(file)
    time.sleep(seconds)
    return value


@actors.remote
def node_of(seconds=0):
    time.sleep(seconds)
    return actors.get_runtime_context().get_node_id()


@actors.remote
class Holder:
    def __init__(self):
        self.x = 0

    def pid(self):
        return os.getpid()

    def node(self):
        return actors.get_runtime_context().get_node_id()

    def load(self, x):
        self.x = x
        return float(np.sum(x))

    def put(self, n):
        for _ in range(1000):
            ref = actors.put(np.ones(n, np.uint8))
        return [ref]

    def start(self, how):
        return START[how]()

    def crash(self):
        os._exit(1)


# ---- one machine -------------------------------------------------------------------------------------------
def test_a_killed_worker_is_replaced_and_its_task_runs_once_more(runtime, tmp_path):
    file = str(tmp_path / 'log')
    ref = slow.remote(file, 1)
    soon(lambda: lines(file))
    os.kill(int(lines(file)[0]), signal.SIGKILL)
    assert actors.get(ref, timeout=30) == 1 and len(lines(file)) == 2
    file += '0'
    ref = slow.options(max_retries=0).remote(file, 30)
    soon(lambda: lines(file))
    os.kill(int(lines(file)[0]), signal.SIGKILL)
    with pytest.raises(actors.exceptions.WorkerCrashedError, match='its process ended'):
        actors.get(ref, timeout=30)
    assert len(lines(file)) == 1


def test_killed_in_a_put_no_memory_is_lost(runtime):
    a = Holder.options(max_restarts=-1).remote()
    for delay in (0.05, 0.11, 0.17):
        pid = actors.get(a.pid.remote())
        ref = a.put.remote(8 << 20)
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(actors.exceptions.ActorUnavailableError):
            actors.get(ref, timeout=30)
        soon(lambda: actors.get(a.pid.remote(), timeout=30) != pid)
    del ref
    gc.collect()  # the raised errors' tracebacks hold the refs
    soon(lambda: freed(runtime))
    exported = [ref._id for ref in actors._session.exported.values()]
    assert set(runtime.objects) == {a._ref._id, *exported}


def test_killed_while_reading_weights_the_object_lives_on(runtime):
    weights = actors.put(np.ones(4 << 20, np.float32))
    a, b = Holder.options(max_restarts=1).remote(), Holder.remote()
    assert actors.get([a.load.remote(weights), b.load.remote(weights)], timeout=30) == [float(4 << 20)] * 2
    os.kill(actors.get(a.pid.remote()), signal.SIGKILL)
    soon(lambda: runtime.objects[a._ref._id].actor.create.retries == 0)
    assert actors.get(a.load.remote(weights), timeout=30) == float(4 << 20)
    assert actors.get(weights)[-1] == 1
    del weights
    actors.get([a.load.remote(0), b.load.remote(0)])
    soon(lambda: freed(runtime))


def test_the_zygote_dies_and_is_replaced(runtime):
    pid = actors.get(Holder.remote().pid.remote(), timeout=30)
    keep = Holder.options(max_restarts=1).remote()
    child = actors.get(keep.start.remote('own session'), timeout=30)
    runtime.nursery.process.kill()
    runtime.nursery.process.wait()
    soon(lambda: not alive(pid) and not alive(child))

    soon(lambda: works(lambda: actors.get(keep.pid.remote(), timeout=30),
                       actors.exceptions.ActorUnavailableError))
    assert actors.get(node_of.remote(), timeout=30) == runtime.home.id


def test_a_broken_frame_ends_one_connection_only(runtime, capfd):
    @actors.remote
    def garble(how):
        long, fd = struct.pack('!iQ', -1, 1 << 60), actors._session.connection.fileno()
        os.write(fd, long if how == 'oversized' else struct.pack('!i', 9) + b'no pickle')
        time.sleep(20)

    for how in 'oversized', 'garbled':
        with pytest.raises(actors.exceptions.WorkerCrashedError):
            actors.get(garble.options(max_retries=0).remote(how), timeout=30)
        assert actors.get(node_of.remote(), timeout=30) == runtime.home.id
    assert capfd.readouterr().err.count('dropped worker') == 2


def test_a_stopped_worker_holds_up_nobody(runtime):
    """More is said to it than its pipe can hold; the driver and the others go on, and kill() still ends
    it."""
    a, b = Holder.remote(), Holder.remote()
    pid = actors.get(a.pid.remote())
    os.kill(pid, signal.SIGSTOP)
    refs = [a.load.remote(np.ones(10_000)) for _ in range(100)]
    assert actors.get([b.load.remote(np.ones(10)) for _ in range(20)], timeout=30) == [10.0] * 20
    actors.kill(a)
    with pytest.raises(actors.exceptions.ActorDiedError):
        actors.get(refs[-1], timeout=30)
    soon(lambda: not alive(pid))


def sleeper(**options):
    return subprocess.Popen(['sleep', '60'], **options).pid


def forked():
    """A grandchild that nobody waits for, in a session of its own."""
    heard, say = os.pipe()
    if not os.fork():
        os.setsid()
        if pid := os.fork():
            os.write(say, str(pid).encode())
            os._exit(0)
        time.sleep(60)
    return int(os.read(heard, 99))


START = {'child': sleeper, 'own session': lambda: sleeper(start_new_session=True), 'fork': forked}


@pytest.mark.parametrize('how', START)
@pytest.mark.parametrize('end', ['kill', 'crash', 'handle', 'shutdown', 'task'])
def test_what_a_worker_started_ends_with_it(runtime, how, end):
    """A worker that crashes cannot take what left its process group along: that is ended with the session."""
    if end == 'task':
        child = actors.get(actors.remote(lambda: START[how]()).remote(), timeout=30)
    else:
        a = Holder.remote()
        child = actors.get(a.start.remote(how), timeout=30)
    assert alive(child)
    if end == 'kill':
        actors.kill(a)
    elif end == 'crash':
        a.crash.remote()
    elif end == 'handle':
        del a
        actors.available_resources()
    if end in ('shutdown', 'task') or how == 'fork' or (end, how) == ('crash', 'own session'):
        actors.shutdown()
        assert not alive(child)
    else:
        soon(lambda: not alive(child))


class Full(Exception):
    def __init__(self, what, code):
        super().__init__(what)
        self.code = code


class Bad:
    """Its pickle cannot be read."""
    def __reduce__(self):
        return divmod, (1, 0)


class Sealed(Exception):
    def __reduce__(self):
        raise OSError('not for pickling')


ERRORS = {'constructor': lambda: Full('disk full', 28), 'in it': lambda: ValueError('disk full', Bad()),
          'http': lambda: urllib.error.HTTPError('http://x', 429, 'disk full', {}, None),
          'unpicklable': lambda: Sealed('disk full'),
          'lock': lambda: ValueError('disk full', threading.Lock())}


@pytest.mark.parametrize('name', ERRORS)
def test_an_exception_that_does_not_travel_keeps_its_words(runtime, name):
    """As a task's error, an actor's, one that two tasks hand on, and a value: pickled or unpickled, nothing
    is lost but the class."""
    class Raiser:
        def go(self):
            raise ERRORS[name]()

    go = actors.remote(lambda x=None: Raiser().go())
    for ref in go.remote(), actors.remote(Raiser).remote().go.remote(), go.remote(go.remote()):
        with pytest.raises(actors.exceptions.RayTaskError, match='disk full') as info:
            actors.get(ref, timeout=30)
        assert ' in go' in str(info.value) and 'itself could not be' in str(info.value) or name == 'http'
        assert pickle.loads(pickle.dumps(info.value)).traceback_str == info.value.traceback_str


def test_a_value_that_cannot_be_read_is_a_ray_error(runtime):
    ref, echo = actors.remote(lambda: Bad()).remote(), actors.remote(lambda x: 1)
    for broken in ref, actors.put(Bad()), actors.put([np.ones(1 << 16), Bad()]):
        with pytest.raises(actors.exceptions.RaySystemError, match='ZeroDivisionError'):
            actors.get(broken, timeout=30)
        with pytest.raises(actors.exceptions.RayTaskError, match='ZeroDivisionError'):
            actors.get(echo.remote(broken), timeout=30)
    with pytest.raises(actors.exceptions.RayTaskError, match='ZeroDivisionError'):
        actors.get(echo.remote(Bad()), timeout=30)


def test_a_full_store_says_so_and_goes_on(runtime):
    kept = [actors.put(np.zeros(8 << 20, np.uint8)) for _ in range(7)]
    make = actors.remote(lambda n: np.ones(n, np.uint8))
    for big in (lambda: actors.put(np.ones(16 << 20, np.uint8)), lambda: actors.get(make.remote(16 << 20)),
                lambda: make.remote(np.ones(16 << 20))):
        with pytest.raises(actors.exceptions.ObjectStoreFullError, match=r'of 67\.1 MB hold .*store_memory'):
            big()
    kept.pop()
    assert actors.get(make.remote(8 << 20)).sum() == 8 << 20 and actors.get(kept[0]).sum() == 0
    gc.collect()


def test_a_pool_goes_on_without_its_dead(runtime):
    class Part:
        def __init__(self, mortal):
            self.mortal = mortal

        def work(self, x):
            if self.mortal:
                os._exit(1)
            if x < 0:
                raise ValueError('negative')
            return x

    def results(pool, values):
        for value in values:
            pool.submit(lambda a, v: a.work.remote(v), value)
        while pool.has_next():
            try:
                yield pool.get_next(timeout=30)
            except (actors.exceptions.ActorDiedError, ValueError) as e:
                yield type(e).__name__
                if not pool._busy:
                    return

    part = actors.remote(Part)
    pool = actors.util.ActorPool([part.remote(False), part.remote(True)])
    got = list(results(pool, range(6)))
    assert got.count('ActorDiedError') == 1 and got[1:] == [1, 2, 3, 4, 5]
    assert [str(x) for x in results(pool, [1, -1, 2])][::2] == ['1', '2']  # what the user raises is no death
    lost = actors.util.ActorPool([part.remote(True)])
    assert list(results(lost, [1, 2])) == ['ActorDiedError']
    with pytest.raises(actors.exceptions.ActorDiedError, match='every actor .* is dead, 1 values wait'):
        lost.get_next_unordered()
    lost.push(part.remote(False))
    assert lost.get_next(timeout=30) == 2 and not lost.has_next()


def test_gpus_are_counted_as_torch_counts_them(monkeypatch):
    """Without /proc/driver/nvidia (WSL2, AMD) too: one number everywhere, and torch is imported only where
    there is a card."""
    actors.shutdown()
    torch = types.SimpleNamespace(cuda=types.SimpleNamespace(device_count=lambda: 2))
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    monkeypatch.setitem(sys.modules, 'torch', torch)
    assert actors._count_gpus() == ['0', '1'] and actors._machine(1, None, None, 1)[0]['GPU'] == 2
    assert list(actors._machine(1, 3, None, 1)[1]) == ['0', '1', '2']
    assert not actors._machine(1, 0, None, 1)[1]
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3,GPU-7')
    assert actors._count_gpus() == ['3', 'GPU-7'] and actors._machine(1, 1, None, 1)[1] == {'3': 1}
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES')
    for card in None, '/dev/nvidiactl', '/dev/dxg', '/dev/kfd':
        monkeypatch.setattr(os.path, 'exists', lambda path: path == card)
        monkeypatch.delitem(sys.modules, 'torch')
        monkeypatch.setattr(builtins, '__import__', lambda name, *a: sys.modules.setdefault('torch', torch))
        found = actors._count_gpus()
        monkeypatch.undo()
        monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
        monkeypatch.setitem(sys.modules, 'torch', torch)
        assert found == ['0', '1'] * bool(card)


# ---- a cluster on loopback ---------------------------------------------------------------------------------
def launch(*args):
    env = {**os.environ, 'ACTORS_TOKEN': TOKEN, 'PYTHONPATH': os.path.dirname(__file__)}
    p = subprocess.Popen([sys.executable, SCRIPT, *args], stdout=subprocess.PIPE, text=True, env=env)
    p.line = p.stdout.readline()
    return p


class Cluster:
    def __init__(self, nodes=2, cpus=1):
        self.head = launch('--head=True', '--port=0', f'--num_cpus={cpus}', '--object_store_memory=100000000')
        self.address = self.head.line.split()[3].rstrip(',')
        self.nodes = [self.join() for _ in range(nodes)]

    def join(self):
        return launch(f'--address={self.address}', '--num_cpus=2')

    def close(self):
        processes = [self.head, *self.nodes]
        pids = [d for p in processes for d in descendants(p.pid)]
        self.head.send_signal(signal.SIGTERM)
        for p in processes:  # the nodes go with their head
            p.wait(20)
            p.stdout.close()
        soon(lambda: not any(map(alive, pids)))


@pytest.fixture
def cluster(monkeypatch):
    monkeypatch.setenv('ACTORS_TOKEN', TOKEN)
    actors.shutdown()
    c = Cluster()
    actors.init(address=c.address)
    soon(lambda: len(actors.nodes()) == 3)
    yield c
    actors.shutdown()
    c.close()


@pytest.mark.slow
def test_nodes_share_work_and_one_may_be_lost(cluster, tmp_path):
    ids = {n['NodeID'] for n in actors.nodes()}
    assert actors.cluster_resources()['CPU'] == 5
    assert len(set(actors.get([node_of.remote(0.5) for _ in range(5)], timeout=60))) == 3
    on = actors.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    data = np.random.default_rng(0).integers(0, 255, 5 << 20, np.uint8)
    ref = actors.put(data)  # the head keeps it
    home = [Holder.options(scheduling_strategy=on(i, False)).remote() for i in ids]
    assert actors.get([h.load.remote(ref) for h in home], timeout=60) == [float(data.sum())] * 3
    assert sorted(actors.get([h.node.remote() for h in home])) == sorted(ids)

    @actors.remote
    def make(seed):
        return np.random.default_rng(seed).integers(0, 255, 3 << 20, np.uint8)

    made = [make.options(scheduling_strategy=on(i, False)).remote(k) for k, i in enumerate(ids)]
    for k, m in enumerate(made):
        there = np.random.default_rng(k).integers(0, 255, 3 << 20, np.uint8)
        assert (actors.get(m, timeout=60) == there).all()
    assert actors.get([home[0].load.remote(m) for m in made], timeout=60)
    huge = actors.remote(lambda: np.ones(200 << 20, np.uint8))
    with pytest.raises(actors.exceptions.ObjectStoreFullError):  # a node's worker is told so too
        actors.get(huge.options(scheduling_strategy=on(cluster_node(ids, cluster.nodes[0]), False)).remote())
    spread = actors.util.placement_group([{'CPU': 1}] * 3, strategy='STRICT_SPREAD')
    assert spread.wait(10)
    actors.util.remove_placement_group(spread)

    # one node is killed with SIGKILL, in calls: tasks run again elsewhere, restartable actors too, the
    # others' errors say so, and no object is lost
    victim = cluster.nodes[0]
    victim_id = cluster_node(ids, victim)
    mortal = Holder.options(scheduling_strategy=on(victim_id, False)).remote()
    phoenix = Holder.options(scheduling_strategy=on(victim_id, True), max_restarts=1).remote()
    assert actors.get([mortal.node.remote(), phoenix.node.remote()], timeout=60) == [victim_id] * 2
    made_there = make.options(scheduling_strategy=on(victim_id, False)).remote(9)
    actors.wait([made_there])
    files = [str(tmp_path / f'{i}') for i in range(2)]
    running = [slow.options(scheduling_strategy=on(victim_id, True)).remote(f, 2) for f in files]
    soon(lambda: all(map(lines, files)))
    pids = descendants(victim.pid)
    victim.kill()
    assert actors.get(running, timeout=60) == [1, 1] and [len(lines(f)) for f in files] == [2, 2]
    with pytest.raises(actors.exceptions.ActorDiedError):
        actors.get(mortal.node.remote(), timeout=30)
    assert actors.get(phoenix.node.remote(), timeout=60) in ids - {victim_id}
    assert actors.get(made_there, timeout=30).size == 3 << 20
    soon(lambda: not any(map(alive, pids)))  # its workers went with it
    assert len(actors.nodes()) == 2

    # one falls silent: no connection ends, only the heartbeat tells
    frozen = cluster.nodes[1]
    os.kill(frozen.pid, signal.SIGSTOP)
    soon(lambda: len(actors.nodes()) == 1, 30)
    os.kill(frozen.pid, signal.SIGCONT)
    assert frozen.wait(20)  # it sees that it was given up, and ends
    cluster.nodes.append(cluster.join())
    soon(lambda: len(actors.nodes()) == 2)


def cluster_node(ids, process):
    return next(i for i in ids if i.startswith(process.line.split()[2]))


@pytest.mark.slow
def test_a_program_that_ends_takes_its_actors_with_it(cluster, tmp_path):
    code = f'''
import sys, os, time; sys.path[:0] = {[ROOT, os.path.dirname(__file__)]!r}
import actors, test_actors_faults as t
actors.init(address={cluster.address!r})
a = t.Holder.options(name='gone').remote()
print(*actors.get([a.pid.remote(), a.start.remote('child')]), flush=True)
t.slow.remote({str(tmp_path / 'f')!r}, 60)
time.sleep(60)
'''
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    gone = list(map(int, p.stdout.readline().split()))
    soon(lambda: lines(tmp_path / 'f'))
    p.kill()
    p.wait()
    p.stdout.close()
    soon(lambda: not any(map(alive, [*gone, int(lines(tmp_path / 'f')[0])])))
    with pytest.raises(ValueError):
        actors.get_actor('gone')
    assert len(lines(tmp_path / 'f')) == 1


class Bomb:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f'touch {self.file}',)


def frame(message):
    data = pickle.dumps(message)
    return struct.pack('!i', len(data)) + data


def test_the_port_is_for_those_who_know_the_token(tmp_path, monkeypatch):
    """Wrong token, wrong version, replay, a pickle bomb, an oversized frame: refused before anything is
    unpickled. Also what the head prints and keeps."""
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.delenv('ACTORS_TOKEN', raising=False)
    actors.shutdown()
    for args, said in [(['--head=True', '--host=0.0.0.0'], 'ACTORS_TOKEN'), (['status'], 'ray status'),
                       (['--address=h:1', '--object_store_memory=9'], 'a node has none')]:
        refused = subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True, timeout=60)
        assert refused.returncode == 2 and said in refused.stderr and refused.stderr.count('\n') == 1, refused
    head = subprocess.Popen([sys.executable, SCRIPT, '--head=True', '--port=0', '--num_cpus=1'],
                            stdout=subprocess.PIPE, text=True)
    address = head.stdout.readline().split()[3].rstrip(',')
    token = head.stdout.readline().removeprefix('token: ').strip()
    port = int(address.split(':')[1])
    file, bomb = tmp_path / '.cache' / 'actors' / f'token-{port}', tmp_path / 'bomb'
    assert file.read_text() == token and file.stat().st_mode & 0o777 == 0o600 and len(token) >= 32

    def dial():
        return socket.create_connection(('127.0.0.1', port), timeout=10)

    try:
        monkeypatch.setenv('ACTORS_TOKEN', 'wrong' * 5)
        with pytest.raises(actors.exceptions.AuthenticationError, match='refused the token'):
            actors.init(address=address)
        monkeypatch.delenv('ACTORS_TOKEN')

        hello = b'\0\0\0\x30' + actors._HELLO + bytes(32)
        huge = struct.pack('!iQ', -1, 1 << 60)
        for prefix in b'', hello, hello + b'\0\0\0\x20' + bytes(32), hello[:9], huge:
            with dial() as s:
                s.sendall(prefix + frame(Bomb(bomb)) + bytes(99))
                assert len(ended(s)) in (0, 52, 56)  # at most its own hello and an empty proof

        ours, theirs = socket.socketpair()
        with monkeypatch.context() as patch, ours, theirs, pytest.raises((EOFError, OSError)):
            patch.setattr(actors, 'HANDSHAKE', 0.5)  # a stranger that drips has so many seconds in all
            link = actors.Connection(os.dup(theirs.fileno()))
            threading.Timer(0.3, ours.sendall, [b'\0\0']).start()
            actors._shake(link, token, b'server', b'client')

        heard = []  # a proxy writes down a good handshake; played back, it is worth nothing
        with socket.create_server(('127.0.0.1', 0)) as proxy:
            def relay():
                a, b = (actors._open(s) for s in (proxy.accept()[0], dial()))
                for _ in range(2):
                    heard.append(a.recv_bytes())
                    b.send_bytes(heard[-1])
                    a.send_bytes(b.recv_bytes())
            t = threading.Thread(target=relay)
            t.start()
            actors._connect('127.0.0.1:%d' % proxy.getsockname()[1], token).close()
            t.join()
        old = b'actors/2 py2.7  ' + bytes(32)
        for hello, proof in heard, (old, heard[1]), (actors._HELLO + bytes(9), heard[1]):
            link = actors._open(dial())
            link.send_bytes(hello)
            assert link.recv_bytes()[:16] == actors._HELLO
            link.send_bytes(proof)
            assert link.recv_bytes() == b''
            with suppress(OSError):
                link.send_bytes(pickle.dumps(Bomb(bomb)))
            with pytest.raises((EOFError, ConnectionError)):
                link.recv_bytes()

        # one of us, but it announces a frame of 2 ** 60 bytes, speaks before hello, or says no list of
        # messages
        for noise in huge, frame([('kill', 1, b'x', True)]), frame(7), b'\0\0\0\4noise':
            link = actors._connect(address, token)
            os.write(link.fileno(), noise)
            with pytest.raises((EOFError, ConnectionError)):
                link.recv_bytes()
        assert not bomb.exists()
        actors.init(address=address)  # token from the file; and the head still works
        assert len(actors.nodes()) == 1 and actors.get(node_of.remote(), timeout=60)
        actors.shutdown()
    finally:
        pids = descendants(head.pid)
        head.terminate()
        head.wait(20)
        head.stdout.close()
    soon(lambda: not any(map(alive, pids)))
    assert not file.exists()


def ended(sock):
    """All that the other side says until it hangs up."""
    said = b''
    try:
        while more := sock.recv(1000):
            said += more
    except ConnectionError:
        return said
    return said


@pytest.mark.slow
def test_ten_thousand_frames_of_noise(cluster):
    rng = np.random.default_rng(0)
    port, refused = int(cluster.address.split(':')[1]), 0
    for i in range(10_000):
        noise = rng.bytes(int(rng.integers(1, 200)))
        if i % 3 == 0:
            noise = b'\0\0\0\x30' + actors._HELLO + noise
        if i % 7 == 0:
            noise = frame([('hello', 0, 'driver', {'id': b'x'})]) + noise
        with socket.create_connection(('127.0.0.1', port), timeout=20) as s:
            with suppress(OSError):  # it closed while we were speaking
                s.sendall(noise)
                s.shutdown(socket.SHUT_WR)
            refused += len(ended(s)) in (0, 52, 56)  # at most a hello and an empty proof
    assert refused == 10_000 and actors.get(node_of.remote(), timeout=60)
    assert len(actors.nodes()) == 3


@pytest.mark.slow
def test_a_storm_of_kills_loses_and_doubles_nothing(runtime, tmp_path):
    """Workers die at random for some seconds; every task ends, each result is right, nothing runs more often
    than its retries allow."""
    @actors.remote(max_retries=20)
    def work(i):
        log(tmp_path / f'{i}')
        time.sleep(0.06)
        return i * i

    stop, kills, rng = threading.Event(), [], np.random.default_rng(2)
    actors.get(work.remote(10**6))

    def killer():
        while not stop.wait(0.6):
            if workers := descendants(runtime.nursery.process.pid):
                try:
                    os.kill(int(rng.choice(workers)), signal.SIGKILL)
                    kills.append(1)
                except OSError:
                    continue
    t = threading.Thread(target=killer)
    t.start()
    try:
        assert actors.get([work.remote(i) for i in range(120)], timeout=120) == [i * i for i in range(120)]
    finally:
        stop.set()
        t.join()
    runs = sum(len(lines(tmp_path / f'{i}')) for i in range(120))
    assert 120 <= runs <= 120 + len(kills) and len(kills) >= 3
    soon(lambda: actors.available_resources().get('CPU') == 2 and not runtime.tasks)


def test_allocator_never_overlaps_and_gives_all_back():
    rng = np.random.default_rng(3)
    free, live = actors._Free(1 << 22), {}
    for _ in range(5000):
        if live and rng.random() < 0.5:
            at = list(live)[int(rng.integers(len(live)))]
            free.give((at, live.pop(at)))
            continue
        n = int(rng.integers(1, 1 << 17))
        with suppress(actors.exceptions.ObjectStoreFullError):
            at = free.take(n)
            assert all(at + n <= a or a + m <= at for a, m in live.items()) and at + n <= 1 << 22
            live[at] = n
    for place in live.items():
        free.give(place)
    assert free.taken == [] and free.take(1 << 22) == 0


def test_an_answer_that_comes_as_its_time_is_up_is_taken():
    """The thread that reads has the box already, and puts the answer into it a moment later."""
    def post(operation, request, *args):
        threading.Timer(0.2, session.boxes.pop(request).put, ['late']).start()
    session = types.SimpleNamespace(boxes={}, error=None, post=post, count=iter(range(9)))
    assert actors._Session.call(session, 'wait', timeout=0.05) == 'late'
