"""One program, two backends: the first part runs on our runtime and on real Ray, and must see the same."""
import dataclasses
import enum
import functools
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_actors_faults import alive, descendants, lines, log, soon, works

import actors


@pytest.fixture(scope='module', params=['local', 'ray'])
def rt(request):
    """The runtime, started once per backend: 4 CPUs, 2 GPUs (pretended), 2 of a custom resource."""
    options = {}
    if request.param == 'ray':
        pytest.importorskip('ray')
        options = dict(include_dashboard=False, logging_level='error', log_to_driver=False)
    options |= dict(num_cpus=4, num_gpus=2, resources={'slot': 2}, object_store_memory=200 << 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv('OMP_NUM_THREADS', raising=False)
        patch.setenv('PYTHONPATH', os.path.dirname(__file__))  # Ray's workers find test_actors_faults there
        actors.init(backend=request.param, **options)
        yield request.param
        actors.shutdown()
    assert not actors.is_initialized()


def raises(kind, ref, timeout=30):
    with pytest.raises(kind) as info:
        actors.get(ref, timeout=timeout)
    return info.value


# these start many processes, and a process of Ray's takes a second: on Ray they are in the slow set
ray_is_slow_here = pytest.mark.parametrize('rt', ['local', pytest.param('ray', marks=pytest.mark.slow)],
                                           indirect=True, scope='module')


@actors.remote
def echo(x):
    return x


@actors.remote
def nap(seconds, value=None):
    time.sleep(seconds)
    return value


@actors.remote
class Counter:
    def __init__(self, start=0):
        self.n = start

    def add(self, d=1):
        self.n += d
        return self.n

    def nap(self, seconds):
        time.sleep(seconds)
        return self.n

    def die(self):
        os._exit(1)

    def pid(self):
        return os.getpid()

    def boom(self):
        raise KeyError('k')

    @actors.method(num_returns=2)
    def two(self):
        return 1, 2


# ---- both backends -----------------------------------------------------------------------------------------
def test_values_go_and_come(rt):
    assert actors.get(echo.remote(1)) == 1
    assert actors.get([echo.remote('a'), echo.remote({'b': [1.5, None]})]) == ['a', {'b': [1.5, None]}]
    assert actors.get(echo.remote(x=2)) == 2 and actors.get([]) == []
    assert actors.get(actors.put((1, 2))) == (1, 2)


def test_refs_as_arguments_are_values_at_the_top_level_only(rt):
    a = echo.remote(5)
    assert actors.get(echo.remote(a)) == 5 and actors.get(echo.remote(x=a)) == 5
    inner = actors.get(echo.remote([a]))[0]
    assert isinstance(inner, actors.ObjectRef) and inner == a and hash(inner) == hash(a)
    assert actors.get(inner) == 5
    assert actors.get(actors.get(actors.put({'r': a}))['r']) == 5


def test_misuse_raises_what_ray_raises(rt):
    ref = echo.remote(1)
    for call in (lambda: echo(1), echo.remote, lambda: echo.remote(1, 2), Counter,
                 lambda: Counter.remote(1, 2), lambda: actors.get([3]), lambda: actors.put(ref),
                 lambda: actors.wait(ref), lambda: echo.remote(threading.Lock())):
        with pytest.raises(TypeError):
            call()
    for call in (lambda: actors.get((ref,)), lambda: actors.get(3), lambda: actors.wait([ref, ref]),
                 lambda: actors.wait([ref], num_returns=2), lambda: actors.wait([ref], num_returns=0),
                 lambda: actors.wait([ref], timeout=-1), lambda: echo.options(num_cpus=-1).remote(1),
                 lambda: actors.kill(3), lambda: actors.get_actor('nobody')):
        with pytest.raises(ValueError):
            call()
    assert actors.wait([]) == ([], [])


def test_an_error_is_both_raytaskerror_and_the_users_class(rt):
    class Mine(Exception):
        pass

    @actors.remote
    def bad(x):
        raise Mine(f'bad {x}')

    e = raises(Mine, bad.remote(7))
    assert isinstance(e, actors.exceptions.RayTaskError) and isinstance(e, actors.exceptions.RayError)
    assert 'bad 7' in str(e) and 'in bad' in str(e)
    assert isinstance(e.cause, Mine) and e.cause.args == ('bad 7',)
    raises(Mine, echo.remote(bad.remote(8)))  # an argument that failed fails the task


def test_closures_lambdas_recursion_and_nested_classes_travel(rt):
    base = 10

    @dataclasses.dataclass
    class Point:
        x: int
        y: list = dataclasses.field(default_factory=list)

        @property
        def double(self):
            return self.x * 2

    class Colour(enum.Enum):
        RED = 1
        BLUE = 'b'

        def loud(self):
            return self.name + '!'

    def helper(n):
        return 1 if n < 2 else n * helper(n - 1)

    @actors.remote
    def work(p):
        return helper(5) + base, Point(p.double, [Colour.RED]), (lambda v: v + base)(1), Colour.BLUE.loud()

    a, p, c, d = actors.get(work.remote(Point(4)))
    assert (a, c, d) == (130, 11, 'BLUE!') and p == Point(8, [Colour.RED])
    assert type(p) is Point and p.y[0] is Colour.RED
    assert [f.name for f in dataclasses.fields(type(p))] == ['x', 'y']

    @actors.remote
    def fib(n):
        return n if n < 2 else sum(actors.get([fib.remote(n - 1), fib.remote(n - 2)]))

    assert actors.get(fib.remote(5), timeout=60) == 5  # 15 tasks, most of them waiting for others, on 4 CPUs


def test_num_returns(rt):
    a, b = echo.options(num_returns=2).remote((1, [2]))
    assert actors.get([b, a]) == [[2], 1]
    assert echo.options(num_returns=0).remote(1) is None
    raises(ValueError, echo.options(num_returns=2).remote((1, 2, 3))[0])
    raises(TypeError, echo.options(num_returns=2).remote(3)[1])


def test_wait_and_timeouts(rt):
    fast, slow = [echo.remote(i) for i in range(3)], nap.remote(1.5)
    ready, rest = actors.wait([slow, *fast], num_returns=3, timeout=20)
    assert ready == fast and rest == [slow]
    ready, rest = actors.wait(fast, num_returns=2)
    assert len(ready) == 2 and len(rest) == 1
    assert actors.wait([slow], timeout=0) == ([], [slow])
    t = time.monotonic()
    e = raises(actors.exceptions.GetTimeoutError, slow, timeout=0.1)
    assert isinstance(e, TimeoutError) and time.monotonic() - t < 1
    assert actors.wait([slow], timeout=20) == ([slow], [])


def test_actor_keeps_state_and_order(rt):
    a = Counter.remote(5)
    assert actors.get([a.add.remote(), a.add.remote(2), a.add.remote(d=3)]) == [6, 8, 11]
    assert actors.get([a.add.remote() for _ in range(300)]) == list(range(12, 312))
    e = raises(KeyError, a.boom.remote())
    assert 'in boom' in str(e)
    assert actors.get(a.two.remote()) == [1, 2] and actors.get(a.add.remote()) == 312  # alive after an error
    slow = nap.remote(0.5, 100)
    # a call that waits for its argument holds up the next
    assert actors.get([a.add.remote(slow), a.add.remote()]) == [412, 413]
    for wrong in [lambda: a.nope, lambda: a.add()]:
        with pytest.raises((AttributeError, TypeError)):
            wrong()
    with pytest.raises(TypeError):
        a.add.remote(1, 2)


@ray_is_slow_here
def test_handles_travel_and_the_last_one_ends_the_actor(rt):
    a = Counter.remote()

    @actors.remote
    def use(handle, n):
        return actors.get([handle.add.remote() for _ in range(n)])[-1]

    assert sorted(actors.get([use.remote(a, 5), use.remote(a, 5)]))[-1] == 10
    pid = actors.get(a.pid.remote())
    last = a.nap.remote(0.3)
    del a
    assert actors.get(last) == 10  # what was asked for is still done
    soon(lambda: not alive(pid))


def test_named_actors(rt):
    a = Counter.options(name='the one').remote(3)
    assert actors.get(actors.get_actor('the one').add.remote()) == 4
    with pytest.raises(ValueError):
        Counter.options(name='the one').remote(0)
    b = Counter.options(name='the one', get_if_exists=True).remote(0)
    assert actors.get(b.add.remote()) == 5
    actors.kill(a)

    # Ray's kill returns before the actor is gone: a call right behind it may still be answered
    soon(lambda: not works(lambda: actors.get(a.add.remote(), timeout=30), actors.exceptions.ActorDiedError))
    soon(lambda: not works(lambda: actors.get_actor('the one'), ValueError))


@ray_is_slow_here
def test_a_constructor_that_fails(rt):
    @actors.remote
    class Bad:
        def __init__(self):
            raise RuntimeError('in the constructor')

        def m(self):
            return 1

    b = Bad.remote()
    for _ in range(2):
        e = raises(actors.exceptions.ActorDiedError, b.m.remote())
        assert 'in the constructor' in str(e) and isinstance(e, actors.exceptions.RayActorError)

    @actors.remote
    def fails():
        raise ValueError('no argument')

    raises(actors.exceptions.ActorDiedError, Counter.remote(fails.remote()).add.remote())
    gone = actors.util.scheduling_strategies.NodeAffinitySchedulingStrategy('ab' * 28, soft=False)
    raises((actors.exceptions.ActorUnschedulableError, actors.exceptions.ActorDiedError),
           Counter.options(scheduling_strategy=gone).remote().add.remote())


@ray_is_slow_here
def test_an_actor_that_dies(rt):
    a = Counter.remote()
    assert actors.get(a.add.remote()) == 1
    raises(actors.exceptions.ActorDiedError, a.die.remote())
    raises(actors.exceptions.ActorDiedError, a.add.remote())

    b = Counter.options(max_restarts=1).remote(10)
    assert actors.get(b.add.remote()) == 11
    raises(actors.exceptions.ActorUnavailableError, b.die.remote())
    unavailable = actors.exceptions.ActorUnavailableError
    soon(lambda: works(lambda: actors.get(b.add.remote(0), timeout=20), unavailable))
    assert actors.get(b.add.remote()) == 11  # a fresh state
    raises(actors.exceptions.ActorDiedError, b.die.remote())


@ray_is_slow_here
def test_calls_in_flight_are_retried_if_allowed(rt, tmp_path):
    @actors.remote(max_restarts=2, max_task_retries=2)
    class Fragile:
        def once(self, file):
            log(file)
            if len(lines(file)) < 2:
                os._exit(1)
            return 'done'

    file = str(tmp_path / 'count')
    assert actors.get(Fragile.remote().once.remote(file), timeout=60) == 'done' and len(lines(file)) == 2


@ray_is_slow_here
def test_kill_in_a_call(rt):
    a = Counter.remote()
    actors.get(a.add.remote())
    ref = a.nap.remote(20)
    actors.kill(a)
    raises(actors.exceptions.ActorDiedError, ref)


@ray_is_slow_here
def test_a_crash_is_retried_as_often_as_allowed(rt, tmp_path):
    @actors.remote
    def crash(file):
        log(file)
        os._exit(1)

    @actors.remote
    def fails(file, enough):
        log(file)
        if len(lines(file)) < enough:
            raise OSError('not yet')
        return 'ok'

    for retries in (0, 2):
        file = str(tmp_path / f'crash{retries}')
        ref = crash.options(max_retries=retries).remote(file)
        raises(actors.exceptions.WorkerCrashedError, ref, timeout=60)
        assert len(lines(file)) == retries + 1
    raises(OSError, fails.remote(str(tmp_path / 'a'), 3))
    assert len(lines(tmp_path / 'a')) == 1  # a user's exception is not retried by default
    assert actors.get(fails.options(retry_exceptions=True).remote(str(tmp_path / 'b'), 3)) == 'ok'
    assert actors.get(fails.options(retry_exceptions=[OSError]).remote(str(tmp_path / 'c'), 2)) == 'ok'
    raises(OSError, fails.options(retry_exceptions=[KeyError]).remote(str(tmp_path / 'd'), 2))


@ray_is_slow_here
def test_cancel(rt, tmp_path, request):
    if 'ray' in request.node.name and signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip('Ray cancels by an interrupt, which a background job (SIGINT ignored) never sees')
    gone = actors.exceptions.TaskCancelledError
    @actors.remote
    def busy(file):
        log(file)
        for _ in range(3000):
            time.sleep(0.01)

    for force in (False, True):
        file = str(tmp_path / f'{force}')
        running = busy.remote(file)
        soon(lambda: os.path.exists(file))
        actors.cancel(running, force=force)
        raises(gone, running)
    blockers = [nap.options(num_cpus=4).remote(1.0)]
    queued = echo.remote(1)
    actors.cancel(queued)
    raises(gone, queued)
    a = Counter.remote()
    assert actors.get(a.add.remote()) == 1
    first, second = a.nap.remote(1), a.add.remote()
    time.sleep(0.2)  # both are in its process by now
    actors.cancel(second)
    with pytest.raises(ValueError):
        actors.cancel(first, force=True)
    raises(gone, second)
    assert actors.get(first) == 1 and actors.get(blockers) == [None]
    assert actors.get(a.pid.remote(), timeout=30)  # it goes on


@ray_is_slow_here
def test_max_concurrency(rt):
    @actors.remote(max_concurrency=4)
    class Wide:
        def __init__(self):
            self.barrier = threading.Barrier(4)

        def meet(self):
            return self.barrier.wait(20) in range(4)

    wide = Wide.remote()
    assert actors.get([wide.meet.remote() for _ in range(4)], timeout=30) == [True] * 4


def test_coroutines_are_rays(rt):
    """As many as wait, one that is ready is answered at once; here they are refused, with the way out."""
    @actors.remote(max_concurrency=100)
    class Co:
        def __init__(self):
            import asyncio
            self.event = asyncio.Event()

        async def wait(self):
            await self.event.wait()
            return 'woken'

        async def wake(self, ref):
            value = await ref[0]
            self.event.set()
            return value

    with pytest.raises(ValueError, match='asyncio'):
        @actors.remote
        async def task():
            return 1
        task.remote()
    if rt == 'local':
        with pytest.raises(ValueError, match=r"Co\.wait is a coroutine: .*backend='ray'.*max_concurrency"):
            Co.remote()
        with pytest.raises(TypeError, match='await ref.*actors.get'):
            actors.put(1).__await__()
        return
    co = Co.remote()
    waiting = [co.wait.remote() for _ in range(20)]
    assert actors.get(co.wake.remote([echo.remote(3)]), timeout=30) == 3
    assert actors.get(waiting, timeout=30) == ['woken'] * 20


@ray_is_slow_here
def test_gpus_and_threads_are_given_out(rt):
    @actors.remote
    def env():
        return os.environ.get('CUDA_VISIBLE_DEVICES'), os.environ.get('OMP_NUM_THREADS')

    assert actors.get(env.options(num_gpus=1).remote())[0] in ('0', '1')
    assert sorted(actors.get(env.options(num_gpus=2).remote())[0].split(',')) == ['0', '1']
    assert [actors.get(env.options(num_cpus=n).remote())[1] for n in (0.5, 1, 2)] == ['1', '1', '2']

    @actors.remote(num_gpus=1)
    class OnGpu:
        def where(self):
            ids = actors.get_runtime_context().get_accelerator_ids()['GPU']
            assert list(map(str, ids)) == list(map(str, actors.get_gpu_ids()))
            return os.environ['CUDA_VISIBLE_DEVICES']

    a, b = OnGpu.remote(), OnGpu.remote()
    assert sorted(actors.get([a.where.remote(), b.where.remote()])) == ['0', '1']
    assert actors.available_resources().get('GPU', 0) == 0
    del a, b
    soon(lambda: actors.available_resources().get('GPU', 0) == 2)


def test_resources_limit_what_runs(rt):
    assert actors.cluster_resources()['CPU'] == 4 and actors.cluster_resources()['slot'] == 2
    holders = [nap.options(resources={'slot': 1}, num_cpus=0).remote(1.0) for _ in range(2)]
    soon(lambda: actors.available_resources().get('slot', 0) == 0)
    third = nap.options(resources={'slot': 1}, num_cpus=0).remote(0)
    assert actors.wait([third], timeout=0.2) == ([], [third])
    actors.get([*holders, third])
    never = echo.options(num_cpus=100).remote(1)
    raises(actors.exceptions.GetTimeoutError, never, timeout=0.3)
    actors.cancel(never)
    soon(lambda: actors.available_resources().get('CPU', 0) == 4)


@ray_is_slow_here
def test_placement_groups_reserve(rt):
    from_group = actors.util.scheduling_strategies.PlacementGroupSchedulingStrategy
    soon(lambda: actors.available_resources().get('CPU', 0) == 4)
    pg = actors.util.placement_group([{'CPU': 1}, {'CPU': 2}], strategy='PACK')
    actors.get(pg.ready(), timeout=20)
    assert pg.wait(5) and pg.bundle_count == 2
    soon(lambda: actors.available_resources().get('CPU', 0) == 1)
    assert actors.get(echo.options(scheduling_strategy=from_group(pg, 0)).remote(1)) == 1
    with pytest.raises(ValueError):
        echo.options(num_cpus=3, scheduling_strategy=from_group(pg)).remote(1)
    with pytest.raises(ValueError):
        echo.options(scheduling_strategy=from_group(pg, 5)).remote(1)
    other = actors.util.placement_group([{'CPU': 1}, {'CPU': 1}])  # only one CPU is left: all or nothing
    assert not other.wait(0.3)
    soon(lambda: actors.available_resources().get('CPU', 0) == 1)
    a = Counter.options(num_cpus=2, scheduling_strategy=from_group(pg, 1)).remote()
    assert actors.get(a.add.remote()) == 1
    actors.util.remove_placement_group(pg)
    assert other.wait(20)
    raises(actors.exceptions.ActorDiedError, a.add.remote())
    actors.util.remove_placement_group(other)
    spread = actors.util.placement_group([{'CPU': 1}, {'CPU': 1}], strategy='STRICT_SPREAD')
    assert not spread.wait(0.3)  # one node cannot
    actors.util.remove_placement_group(spread)
    soon(lambda: actors.available_resources().get('CPU', 0) == 4)
    for bundles, strategy in ([], 'PACK'), ([{'CPU': 1}], 'X'), ([{'CPU': 0}], 'PACK'):
        with pytest.raises(ValueError):
            actors.util.placement_group(bundles, strategy=strategy)
    here = actors.nodes()[0]['NodeID']
    affinity = actors.util.scheduling_strategies.NodeAffinitySchedulingStrategy
    assert actors.get(echo.options(scheduling_strategy=affinity(here, soft=False)).remote(2)) == 2
    gone = affinity('ab' * 28, soft=False)
    raises(actors.exceptions.TaskUnschedulableError, echo.options(scheduling_strategy=gone).remote(1))


def test_arrays_and_tensors(rt):
    big, small = np.arange(1 << 18, dtype=np.float32), np.arange(3)
    square = big.reshape(512, 512)
    for a in (big, small, np.asfortranarray(square), square[:, ::2], np.zeros((0, 3)), np.array(2.5),
              np.array(['a', None], object)):
        b, c = actors.get(actors.put(a)), actors.get(echo.remote(a))
        assert b.dtype == a.dtype and b.shape == a.shape and (b == a).all() and (c == a).all()
    for a in big, small:
        with pytest.raises(ValueError):
            actors.get(actors.put(a))[0] = 1
    t = {'w': torch.randn(300, 300), 'b': torch.randn(4).bfloat16(), 's': torch.tensor(3),
         'e': torch.empty(0, 2), 'p': torch.nn.Parameter(torch.ones(3))}
    ref = actors.put(t)
    u, v = actors.get(ref), actors.get(echo.remote(t))
    for k in t:
        assert type(u[k]) is type(t[k]) and u[k].dtype == t[k].dtype
        assert torch.equal(u[k], t[k]) and torch.equal(v[k], t[k])
    u['w'].zero_()  # the reader's own page, not the shared object
    assert torch.equal(actors.get(ref)['w'], t['w'])


@ray_is_slow_here
def test_pool_and_context(rt):
    pool = actors.util.ActorPool([Counter.remote(i) for i in (10, 20)])
    assert sorted(pool.map_unordered(lambda a, v: a.add.remote(v), [0, 0])) == [10, 20]
    assert list(pool.map(lambda a, v: a.add.remote(v * 0), range(6))).count(10) >= 1

    @actors.remote
    class Me:
        def ids(self):
            c = actors.get_runtime_context()
            return c.get_actor_id(), c.get_node_id(), c.get_actor_name(), c.get_task_id()

    me = Me.options(name='me').remote()
    actor_id, node_id, name, task_id = actors.get(me.ids.remote())
    assert actor_id and node_id == actors.nodes()[0]['NodeID'] and name == 'me' and task_id
    assert actors.get(actors.get_actor('me').ids.remote())[0] == actor_id


# ---- ours only ---------------------------------------------------------------------------------------------
@pytest.fixture
def alone():
    """No session: the last of the two backends has done its tests."""
    actors.shutdown()
    yield
    actors.shutdown()


@pytest.fixture
def local(alone):
    actors.init(num_cpus=2, object_store_memory=32 << 20)
    yield actors._session.runtime
    actors.shutdown()


def functions():
    return {ref._id for ref in actors._session.exported.values()}


def test_the_store_is_shared_counted_and_reused(local):
    space, objects = local.space, local.objects
    a = np.random.default_rng(0).integers(0, 255, 8 << 20, np.uint8)
    ref = actors.put(a)
    assert space.used() == (8 << 20) + 4096
    view, first = actors.get(ref), objects[ref._id].data
    del ref
    actors.available_resources()
    assert space.used() and (view == a).all()  # the view keeps the object
    del view
    actors.available_resources()
    assert not space.taken
    refs = [actors.put(a + i) for i in range(2)]
    assert objects[refs[0]._id].data == first  # the same pages
    for i, ref in enumerate(refs):
        assert (actors.get(ref) == a + i).all() and actors.get(echo.remote(ref))[5] == a[5] + i
    nested = actors.put([refs.pop()])
    assert actors.get(actors.get(nested)[0])[0] == a[0] + 1
    del refs, ref, nested
    soon(lambda: actors.available_resources() and not space.taken)
    assert set(objects) == functions()


def test_a_ref_without_a_session_or_of_another_is_refused_everywhere(alone, capfd):
    actors.init(num_cpus=1)
    ref, counter = actors.put(1), Counter.remote()
    actors.shutdown()
    with pytest.raises(actors.exceptions.RaySystemError):
        actors.ObjectRef(b'x' * 16)
    gc.collect()
    assert 'AttributeError' not in capfd.readouterr().err  # of a __del__ after a failed __init__
    actors.init(num_cpus=1)
    for use in (lambda: actors.get(ref), lambda: actors.wait([ref]), lambda: actors.cancel(ref),
                lambda: echo.remote(ref), lambda: echo.remote([ref]), lambda: actors.put([ref]),
                lambda: actors.kill(counter), counter.add.remote, lambda: echo.remote(counter)):
        with pytest.raises(ValueError, match='earlier session'):
            use()
    assert actors.get(echo.remote(2)) == 2


def test_long_chains_are_no_deep_stacks(local):
    @actors.remote
    def fails():
        time.sleep(0.3)
        raise ValueError('first')

    ref = fails.remote()
    for _ in range(3000):
        ref = echo.remote(ref)
    raises(ValueError, ref)
    ref = actors.put(0)
    for _ in range(3000):
        ref = actors.put([ref])
    assert len(local.objects) >= 3000
    del ref
    actors.available_resources()
    assert set(local.objects) == functions() and not local.tasks


def test_a_cancelled_call_holds_up_nobody(local):
    """Neither the calls behind it, though its argument never comes, nor the end of its actor."""
    never, a = echo.options(num_cpus=100).remote(1), Counter.remote()
    first, second = a.add.remote(never), a.add.remote()
    actors.cancel(first)
    assert actors.get(second, timeout=30) == 1
    pid, last = actors.get(a.pid.remote()), a.add.remote(never)
    del a
    actors.available_resources()
    assert alive(pid)
    actors.cancel(last)
    soon(lambda: not alive(pid))


def test_a_worker_returns_large_things_and_its_threads_are_its_own(local):
    @actors.remote
    def make(n):
        ones = torch.ones(600, 600)
        assert torch.allclose(ones @ ones, torch.tensor(600.0))  # its own threads, after the fork
        return np.full(n, 7, np.uint8), torch.get_num_threads(), np.random.rand()

    (a, t1, r1), (b, t2, r2) = actors.get([make.options(num_cpus=n).remote(1 << 20) for n in (1, 2)])
    assert a.sum() == 7 << 20 and not a.flags.writeable and (t1, t2) == (1, 2) and r1 != r2


def test_many_open_files(crowded, alone):
    actors.init(num_cpus=2)
    counter = Counter.remote(1)
    assert actors.get([echo.remote(3), counter.add.remote()], timeout=30) == [3, 2]
    actors.kill(counter)
    raises(actors.RayActorError, counter.add.remote())
    actors.shutdown()


def test_nothing_of_a_session_outlives_it(alone):
    actors.init(num_cpus=2)
    ref = echo.remote(1)
    actors.get([ref, Counter.remote().pid.remote()])
    pids = descendants(os.getpid())
    assert len(pids) >= 2
    actors.shutdown()
    assert not any(map(alive, pids))
    actors.shutdown()
    assert actors.get(echo.remote(2)) == 2 and actors.get_gpu_ids() == []  # starts by itself, as Ray does
    actors.shutdown()


def test_what_is_not_honoured_is_refused_by_name(alone, monkeypatch):
    monkeypatch.setenv('ACTORS_TOKEN', 'x' * 16)
    rays, pip = "use backend='ray'", functools.partial(echo.options(runtime_env={'pip': []}).remote, 1)
    for match, call in {
            'num_cpu: expected num_cpus, num_gpus,': lambda: echo.options(num_cpu=1),
            "backend 'spark'": lambda: actors.init(backend='spark'),
            "namespace: only backend='ray'": lambda: actors.init(namespace='a'),
            'num_cpus: for the head': lambda: actors.init(address='127.0.0.1:1', num_cpus=2),
            "address 'x': expected HOST:PORT": lambda: actors.init(address='x'),
            r"memory: .*init\(backend='ray'\) first": lambda: echo.options(memory=5),
            f"'pip': .*all but env_vars {rays.replace('use', 'needs')}": pip,
            r"lifetime: .*init\(backend='ray'\) first": lambda: Counter.options(lifetime='detached'),
            f"namespace='n': .*{rays}": lambda: actors.get_actor('a', namespace='n'),
            f"name='p', lifetime=None: .*{rays}": lambda: actors.util.placement_group([{'CPU': 1}], name='p'),
            'num_gpus 1.5: a share below 1': lambda: echo.options(num_gpus=1.5).remote(1)}.items():
        with pytest.raises(ValueError, match=match):
            call()
    actors.shutdown()
    with pytest.raises(ConnectionError, match='--head=True'):
        actors.init(address='127.0.0.1:1')
    with pytest.raises(TypeError, match='generator'):
        @actors.remote
        def g():
            yield 1
    for thing in (lambda: actors.timeline, lambda: actors.get_runtime_context().get_job_id,
                  lambda: actors.actor.exit_actor):
        with pytest.raises(AttributeError, match="use backend='ray'"):
            thing()
    actors.shutdown()
    actors.init(num_cpus=1)
    ref = actors.put(1)
    assert actors.wait([ref], fetch_local=False) == ([ref], [])


def test_by_value_pickling_round_trips(alone):
    import abc
    import collections

    class Base(abc.ABC):
        @abc.abstractmethod
        def f(self):
            return 'abstract'

    class Slotted(Base):
        __slots__ = 'a', 'b'

        def f(self):
            return super().__class__, self.a

        @staticmethod
        def s():
            return 's'

        @classmethod
        def c(cls):
            return cls.__name__

    Pair = collections.namedtuple('Pair', 'x y')
    Pair.__module__ = '__main__'

    @functools.lru_cache
    def cached(n):
        return n + 1

    count = 0

    def counter():
        nonlocal count
        count += 1
        return count

    def twins():
        n = 0

        def up():
            nonlocal n
            n += 1
        return up, lambda: n

    def lens(x, *, k=os.path.sep):
        return len(x), k, cached(1)

    def copy(obj):
        return actors._unpack(actors._Packed(obj).join())

    o = Slotted()
    o.a, o.b = 1, [2]
    p = copy(o)
    assert type(p) is Slotted and p.a == 1 and p.s() == 's' and p.c() == 'Slotted'
    assert copy(Pair(1, 2)) == (1, 2) and copy(counter)() == 1 and copy(lens)('abc') == (3, '/', 2)
    up, see = copy(twins())
    up()
    assert see() == 1
    assert copy(os) is os and copy([np.float64, torch.float16]) == [np.float64, torch.float16]
    actors.init(num_cpus=1)
    with pytest.raises(TypeError, match='count'):
        pickle.dumps(actors.put(1))


def test_main_functions_travel_and_the_driver_takes_all_with_it(tmp_path):
    """A script: its functions and classes are in __main__; SIGKILL ends it, and every process it started."""
    script = tmp_path / 'script.py'
    script.write_text(f'''
import sys; sys.path.insert(0, {ROOT!r})
import actors, os, subprocess, time
LIMIT = 3
class Oops(Exception): pass
def helper(x):
    if x > LIMIT: raise Oops(x)
    return x + LIMIT
@actors.remote
def f(x): return helper(x)
@actors.remote
class A:
    def pid(self): return os.getpid()
    def spin(self): subprocess.Popen(['sleep', '100'], start_new_session=True), time.sleep(100)
if __name__ == '__main__':
    actors.init(num_cpus=2)
    try: actors.get(f.remote(9))
    except Oops as e: print('caught', e.cause.args, flush=True)
    a = A.remote()
    print(actors.get(f.remote(1)), actors.get(a.pid.remote()), flush=True)
    a.spin.remote()
    time.sleep(100)
''')
    p = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline().strip() == 'caught (9,)'
    value, pid = p.stdout.readline().split()
    assert value == '4'
    soon(lambda: descendants(int(pid)))
    pids = descendants(p.pid)
    assert int(pid) in pids
    p.send_signal(signal.SIGKILL)
    p.wait()
    p.stdout.close()
    soon(lambda: not any(map(alive, pids)))
