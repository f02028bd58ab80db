"""What actors.py does when things break: processes killed at every place, nodes lost, strangers at the port. Each count is exact."""
import gc
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import actors

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOKEN = 'a token for these tests only'


def soon(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'it did not come about'
        time.sleep(0.02)
    return True


def alive(pid):
    try:
        return open(f'/proc/{pid}/stat').read().rpartition(')')[2].split()[0] != 'Z'
    except OSError:
        return False


def descendants(pid):
    rows = {}
    for p in filter(str.isdigit, os.listdir('/proc')):
        try:
            rows.setdefault(int(open(f'/proc/{p}/stat').read().rpartition(')')[2].split()[1]), []).append(int(p))
        except OSError:
            continue
    found, todo = [], [pid]
    while todo:
        found += (children := rows.get(todo.pop(), []))
        todo += children
    return found


def holders():
    """Processes that map an arena of ours: leaked shared memory would have one."""
    found = []
    for p in filter(str.isdigit, os.listdir('/proc')):
        try:
            if any('memfd:actors' in os.readlink(f'/proc/{p}/fd/{fd}') for fd in os.listdir(f'/proc/{p}/fd')):
                found.append(int(p))
        except OSError:
            continue
    return found


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setattr(actors, 'PRELOAD', [])  # nothing here needs torch, which conftest has imported
    shm = set(os.listdir('/dev/shm'))
    actors.shutdown()
    actors.init(num_cpus=2, object_store_memory=64 << 20)
    yield actors._session.hub
    pids = descendants(os.getpid())
    actors.shutdown()
    soon(lambda: not any(map(alive, pids)))  # no orphan
    assert os.getpid() not in holders() and set(os.listdir('/dev/shm')) <= shm


def log(file):
    with open(file, 'a') as f:
        f.write(f'{os.getpid()}\n')


def lines(file):
    return open(file).read().split() if os.path.exists(file) else []


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

    def slow(self, seconds):
        time.sleep(seconds)
        return 1

    def put(self, n):
        for _ in range(1000):
            ref = actors.put(np.ones(n, np.uint8))
        return [ref]


# ---- one machine -------------------------------------------------------------------------------------------------------------------------------
def test_a_killed_worker_is_replaced_and_its_task_runs_once_more(hub, tmp_path):
    file = str(tmp_path / 'log')
    ref = slow.remote(file, 1)
    soon(lambda: lines(file))
    os.kill(int(lines(file)[0]), signal.SIGKILL)
    assert actors.get(ref, timeout=30) == 1 and len(lines(file)) == 2
    file += '0'
    ref = slow.options(max_retries=0).remote(file, 30)
    soon(lambda: lines(file))
    os.kill(int(lines(file)[0]), signal.SIGKILL)
    with pytest.raises(actors.exceptions.WorkerCrashedError, match='SIGKILL|closed'):
        actors.get(ref, timeout=30)
    assert len(lines(file)) == 1


def test_killed_in_a_put_no_memory_is_lost(hub):
    arena = hub.home.arenas[0]
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
    soon(lambda: actors.available_resources() and not arena.used and not hub.home.arenas[1].used)
    assert set(hub.objects) == {a._ref._id}


def test_killed_while_reading_weights_the_object_lives_on(hub):
    weights = actors.put(np.ones(4 << 20, np.float32))
    a, b = Holder.options(max_restarts=1).remote(), Holder.remote()
    assert actors.get([a.load.remote(weights), b.load.remote(weights)], timeout=30) == [float(4 << 20)] * 2
    os.kill(actors.get(a.pid.remote()), signal.SIGKILL)
    soon(lambda: hub.actors[a._ref._id].restarted == 1)
    assert actors.get(a.load.remote(weights), timeout=30) == float(4 << 20)
    assert actors.get(weights)[-1] == 1
    del weights
    actors.get([a.load.remote(0), b.load.remote(0)])
    soon(lambda: actors.available_resources() and not hub.home.arenas[0].used)


def test_the_zygote_dies_and_is_replaced(hub):
    pid = actors.get(Holder.remote().pid.remote(), timeout=30)
    keep = Holder.options(max_restarts=1).remote()
    actors.get(keep.pid.remote(), timeout=30)
    hub.nursery.proc.kill()
    hub.nursery.proc.wait()
    soon(lambda: not alive(pid))

    def works():
        try:
            return actors.get(keep.pid.remote(), timeout=30)
        except actors.exceptions.ActorUnavailableError:
            return False
    assert soon(works) and actors.get(node_of.remote(), timeout=30) == hub.home.id


def test_a_broken_reply_ends_one_connection_only(hub, capfd):
    @actors.remote
    def garble():
        actors._session.sock.sendall(struct.pack('<2Q', 1 << 40, 0) + b'x' * 100)
        time.sleep(20)

    with pytest.raises(actors.exceptions.WorkerCrashedError):
        actors.get(garble.options(max_retries=0).remote(), timeout=30)
    assert actors.get(node_of.remote(), timeout=30) == hub.home.id and 'dropped worker' in capfd.readouterr().err


# ---- a cluster on loopback ---------------------------------------------------------------------------------------------------------------------
def launch(*args, env=None, **popen):
    p = subprocess.Popen([sys.executable, os.path.join(ROOT, 'actors.py'), *args], stdout=subprocess.PIPE, text=True,
                         env={**os.environ, 'ACTORS_TOKEN': TOKEN, 'PYTHONPATH': os.path.dirname(__file__), **(env or {})}, **popen)
    p.line = p.stdout.readline()
    return p


class Cluster:
    def __init__(self, nodes=2, cpus=1):
        self.head = launch('--head=True', '--port=0', f'--num_cpus={cpus}', '--object_store_memory=100000000')
        self.address = self.head.line.split()[3].rstrip(',')
        self.nodes = [self.join() for _ in range(nodes)]
    def join(self):
        return launch(f'--address={self.address}', '--num_cpus=2', '--object_store_memory=100000000')
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
def test_a_program_with_many_open_files_joins(crowded, cluster):
    for _ in range(3):  # its thread that reads lives on
        assert actors.get([node_of.remote() for _ in range(4)], timeout=30)


@pytest.mark.slow
def test_nodes_share_work_and_objects_and_one_may_be_lost(cluster, tmp_path):
    ids = {n['NodeID'] for n in actors.nodes()}
    assert actors.cluster_resources()['CPU'] == 5
    assert len(set(actors.get([node_of.remote(0.5) for _ in range(5)], timeout=60))) == 3
    on = actors.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    data = np.random.default_rng(0).integers(0, 255, 5 << 20, np.uint8)
    ref = actors.put(data)  # this program has no arena: the head keeps it
    home = [Holder.options(scheduling_strategy=on(i, False)).remote() for i in ids]
    assert actors.get([h.load.remote(ref) for h in home], timeout=60) == [float(data.sum())] * 3
    assert sorted(actors.get([h.node.remote() for h in home])) == sorted(ids)

    @actors.remote
    def make(seed):
        return np.random.default_rng(seed).integers(0, 255, 3 << 20, np.uint8)

    made = [make.options(scheduling_strategy=on(i, False)).remote(k) for k, i in enumerate(ids)]
    for k, m in enumerate(made):
        assert (actors.get(m, timeout=60) == np.random.default_rng(k).integers(0, 255, 3 << 20, np.uint8)).all()
    assert actors.get([home[0].load.remote(m) for m in made], timeout=60)
    spread = actors.util.placement_group([{'CPU': 1}] * 3, strategy='STRICT_SPREAD')
    assert spread.wait(10)
    actors.util.remove_placement_group(spread)

    # one node is killed with SIGKILL, in calls: tasks run again elsewhere, restartable actors too, the others' errors say so
    victim = cluster.nodes[0]
    victim_id = next(i for i in ids if i.startswith(victim.line.split()[2]))
    mortal = Holder.options(scheduling_strategy=on(victim_id, False)).remote()
    phoenix = Holder.options(scheduling_strategy=on(victim_id, True), max_restarts=1).remote()
    assert actors.get([mortal.node.remote(), phoenix.node.remote()], timeout=60) == [victim_id] * 2
    only_there = make.options(scheduling_strategy=on(victim_id, False)).remote(9)
    actors.wait([only_there])
    files = [str(tmp_path / f'{i}') for i in range(2)]
    running = [slow.options(scheduling_strategy=on(victim_id, True)).remote(f, 2) for f in files]
    soon(lambda: all(map(lines, files)))
    pids = descendants(victim.pid)
    victim.kill()
    assert actors.get(running, timeout=60) == [1, 1] and [len(lines(f)) for f in files] == [2, 2]
    with pytest.raises(actors.exceptions.ActorDiedError):
        actors.get(mortal.node.remote(), timeout=30)
    assert actors.get(phoenix.node.remote(), timeout=60) in ids - {victim_id}
    with pytest.raises(actors.exceptions.ObjectLostError):
        actors.get(only_there, timeout=30)
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
    out = subprocess.run([sys.executable, os.path.join(ROOT, 'actors.py'), 'status', f'--address={cluster.address}'], capture_output=True, text=True, env={**os.environ})
    assert out.stdout.count('node ') >= 2 and 'actor Holder' in out.stdout, out


@pytest.mark.slow
def test_a_program_that_ends_takes_its_actors_with_it(cluster, tmp_path):
    code = f'''
import sys, os, time; sys.path.insert(0, {ROOT!r}); sys.path.insert(0, {os.path.dirname(__file__)!r})
import actors, test_actors_faults as t
actors.init(address={cluster.address!r})
a = t.Holder.options(name='kept', lifetime='detached').remote()
b = t.Holder.options(name='gone').remote()
print(*actors.get([a.pid.remote(), b.pid.remote()]), flush=True)
t.slow.remote({str(tmp_path / 'f')!r}, 60)
time.sleep(60)
'''
    p = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    kept, gone = map(int, p.stdout.readline().split())
    soon(lambda: lines(tmp_path / 'f'))
    p.kill()
    p.wait()
    p.stdout.close()
    soon(lambda: not alive(gone) and not alive(int(lines(tmp_path / 'f')[0])))
    a = actors.get_actor('kept')
    assert actors.get(a.pid.remote(), timeout=30) == kept and len(lines(tmp_path / 'f')) == 1
    actors.kill(a)
    soon(lambda: not alive(kept))


def test_the_port_is_for_those_who_know_the_token(tmp_path, monkeypatch):
    """Wrong token, wrong version, replay, a pickle bomb, a flood of noise: refused before anything is unpickled. Also what the head prints and keeps."""
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.delenv('ACTORS_TOKEN', raising=False)
    actors.shutdown()
    refused = subprocess.run([sys.executable, os.path.join(ROOT, 'actors.py'), '--head=True', '--host=0.0.0.0'], capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and 'ACTORS_TOKEN' in refused.stderr and 'Traceback' not in refused.stderr
    head = subprocess.Popen([sys.executable, os.path.join(ROOT, 'actors.py'), '--head=True', '--port=0', '--num_cpus=1'], stdout=subprocess.PIPE, text=True)
    address = head.stdout.readline().split()[3].rstrip(',')
    token = head.stdout.readline().removeprefix('token: ').strip()
    port = int(address.split(':')[1])
    file = tmp_path / '.cache' / 'actors' / f'token-{port}'
    assert file.read_text() == token and file.stat().st_mode & 0o777 == 0o600 and len(token) >= 32
    try:
        monkeypatch.setenv('ACTORS_TOKEN', 'wrong' * 5)
        with pytest.raises(actors.exceptions.AuthenticationError, match='refused the token'):
            actors.init(address=address)
        monkeypatch.delenv('ACTORS_TOKEN')

        bomb = tmp_path / 'bomb'
        class Bomb:
            def __reduce__(self):
                return os.system, (f'touch {bomb}',)
        evil = actors._frame(Bomb())
        for prefix in (b'', actors._HELLO + bytes(32), actors._HELLO + bytes(32) + bytes(32)):
            with socket.create_connection(('127.0.0.1', port)) as s:
                s.sendall(prefix + evil)
                s.settimeout(5)
                try:
                    while s.recv(1000):
                        continue
                except ConnectionError:
                    continue

        heard = []  # a proxy writes down a good handshake; played back, it is worth nothing
        with socket.create_server(('127.0.0.1', 0)) as proxy:
            def relay():
                a, _ = proxy.accept()
                with a, socket.create_connection(('127.0.0.1', port)) as b:
                    for n in (48, 32):
                        heard.append(actors._read_exactly(a, n))
                        b.sendall(heard[-1])
                        a.sendall(actors._read_exactly(b, 33))
            t = threading.Thread(target=relay)
            t.start()
            actors._connect('127.0.0.1:%d' % proxy.getsockname()[1], token).close()
            t.join()
        with socket.create_connection(('127.0.0.1', port)) as s:
            s.sendall(heard[0])
            assert actors._read_exactly(s, 33)[:1] == b'+'
            s.sendall(heard[1])
            assert actors._read_exactly(s, 33)[:1] == b'T' and not s.recv(1)
        with socket.create_connection(('127.0.0.1', port)) as s:
            s.sendall(b'actors/1 py2.7'.ljust(16) + bytes(32))
            assert actors._read_exactly(s, 33)[:1] == b'V'

        with actors._connect(address, token) as s:  # one of us, but it announces a frame of 2 ** 60 bytes, or speaks before hello
            s.sendall(struct.pack('<2Q', 1 << 60, 0))
            assert not s.recv(1)
        with actors._connect(address, token) as s:
            s.sendall(actors._frame(('kill', 1, b'x', True)))
            assert not s.recv(1)
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


@pytest.mark.slow
def test_ten_thousand_frames_of_noise(cluster):
    rng = np.random.default_rng(0)
    port = int(cluster.address.split(':')[1])
    refused = 0
    for i in range(10_000):
        noise = rng.bytes(int(rng.integers(1, 200)))
        if i % 3 == 0:
            noise = actors._HELLO + noise
        if i % 7 == 0:
            noise = struct.pack('<2Q', len(noise), 0) + pickle.dumps(['hello', 0, 'driver', {}]) + noise
        with socket.create_connection(('127.0.0.1', port)) as s:
            s.settimeout(20)
            try:
                s.sendall(noise)
                s.shutdown(socket.SHUT_WR)
                while data := s.recv(1000):
                    assert data[:1] in b'VT' or data[:1] == b'+' and data[33:34] in (b'', b'T')  # at most a nonce, never a proof
            except OSError:  # it closed while we were speaking
                refused += 1
                continue
            refused += 1
    assert refused == 10_000 and actors.get(node_of.remote(), timeout=60)
    assert len(actors.nodes()) == 3


@pytest.mark.slow
def test_frames_cut_anywhere_come_out_whole():
    rng = np.random.default_rng(1)
    for _ in range(300):
        msgs = [(('m', i, rng.bytes(int(rng.integers(0, 300)))), rng.bytes(int(rng.integers(0, 500)))) for i in range(5)]
        stream = b''.join(actors._frame(m, t) + t for m, t in msgs)
        feed, out, at = actors._Feed(), [], 0
        while at < len(stream):
            n = int(rng.integers(1, 400))
            out += feed(stream[at:at + n])
            at += n
        assert out == msgs


@pytest.mark.slow
def test_a_storm_of_kills_loses_and_doubles_nothing(hub, tmp_path):
    """Workers die at random for some seconds; every task ends, each result is right, nothing runs more often than its retries allow."""
    @actors.remote(max_retries=20)
    def work(i):
        log(tmp_path / f'{i}')
        time.sleep(0.06)
        return i * i

    stop, kills, rng = threading.Event(), [], np.random.default_rng(2)
    actors.get(work.remote(10**6))
    def killer():
        while not stop.wait(0.6):
            if workers := [p.pid for p in list(hub.peers.values()) if p.role == 'worker' and p.pid]:
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
    soon(lambda: actors.available_resources().get('CPU') == 2 and not hub.tasks)


@pytest.mark.slow
def test_allocator_never_overlaps_and_merges_all():
    rng = np.random.default_rng(3)
    free, live = actors._Free(1 << 22), {}
    for _ in range(5000):
        if live and rng.random() < 0.5:
            at = list(live)[int(rng.integers(len(live)))]
            free.give(at, live.pop(at))
        else:
            n = int(rng.integers(1, 1 << 17))
            at = free.take(n)
            if at is not None:
                assert all(at + n <= a or a + m <= at for a, m in live.items()) and at + n <= 1 << 22
                live[at] = n
    for at, n in live.items():
        free.give(at, n)
    assert free.holes == [(0, 1 << 22)] and free.used == 0
