"""Every axis of parallelism on torch.distributed, each proven equal to the single process: tensor + sequence (Megatron,
1909.08053, 2205.05198), pipeline (1F1B, 2104.04473), data with ZeRO 0-3 (1910.02054), context (ring attention, 2310.01889).

A stage has the same lines for one process and for many; with one, every operation is the identity:

    mesh = parallel.init(tp, pp, cp, zero)              # torchrun's processes, or this one alone
    sampler = parallel.sampler_of(model, mesh)          # what a rollout engine reads; before shard cuts the model
    model = parallel.shard(model.to(mesh.device), mesh) # this rank's part; called as before: model(idx, targets), model.logprobs(idx)
    optimizer = parallel.Optimizer(model, mesh, learning_rate, betas, eps, weight_decay)
    mesh.split_seeds(seed)                              # weights are made from one seed, dropout and sampling from one per rank
    rest = parallel.load_checkpoint(path, mesh, model, optimizer)   # on resume: what save_checkpoint was given, and the RNGs
    while True:
        bins = mesh.deal(pack(lengths, n), lengths)     # of the global batch's microbatches this replica's; tp, pp and cp ranks see the same
        micros = [...]                                  # made of them: whatever loss_of takes; as many on every rank
        def loss_of(model, mb): ...; return loss, dict(clip_frac=...)    # mean over the microbatch; calls model ONCE (needed by pp only)
        metrics = parallel.forward_backward(model, optimizer, micros, loss_of, weights)  # weights: counted tokens (or pairs) of each microbatch
        norm = parallel.clip_and_step([optimizer], [lr], grad_clip)  # global gradient norm, clipped across all axes; gradients are gone after it
                                                        # (parallel.clip_and_step([a, b], [lr_a, lr_b], clip): two networks under one norm)
        outputs = parallel.evaluate(model, micros, fn)  # [fn(model, mb)] without gradients, on every rank of the replica
        state = parallel.full_state(model)              # plain state dict on every rank: HF export, a rollout engine's load_weights
        parallel.save_checkpoint(path, mesh, model, optimizer, config=..., iter=..., data=..., best=...)   # one file whatever the layout
        values = mesh.collect([...])                    # the replicas' lists one behind the other, on every rank
                                                        # also: mesh.master, .rank, .world, .dp, .dp_rank, .device, .barrier(), .log('...'),
                                                        # .restarts (times torchrun has started us again)

Gradients are sum_i weight_i * grad_i / sum_i weight_i over all microbatches of all replicas: token-weighted, whatever the split.

How the axes meet. Ranks form a grid (dp, pp, cp, tp), tp innermost (it talks most, so it stays inside a node). model.py works
on N flat tokens, and so do we: context parallelism gives each cp rank N / cp of them (zig-zag, so that causal work is even),
tensor parallelism gives each rank some heads and MLP columns, and keeps N / (cp tp) tokens in between (sequence parallel).
Everything that a Parameter needs to know is in its `Part`: which piece of which full tensor, who sums its gradient.

What is accepted is what tests run: see `accept` (the stages) and `_check_fit` (the models); both refuse with the nearest that works.
"""
import atexit, collections, contextlib, copy, dataclasses, errno, json, math, os, signal, socket, sys, threading, time
from datetime import timedelta
from multiprocessing.connection import wait as readable  # select.select takes no descriptor above 1,023

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F

import files
import kernels

_gather_into = getattr(dist, 'all_gather_single', dist.all_gather_into_tensor)  # torch 2.13 renamed them
_scatter_into = getattr(dist, 'reduce_scatter_single', dist.reduce_scatter_tensor)

# ---------------------------------------------------------------------------------------------------------------------
# failure: every rank knows what the others are doing, so that the one which died or hangs can be named


class Failure(RuntimeError):
    """A collective did not come back. The message names the rank at fault, the collective and the last good checkpoint."""


class Watch:
    """Each rank writes `host, pid, calls so far, what it is in` to the store twice a second, from a thread. When a collective
    fails, the survivors read what the others wrote. SIGTERM (torchrun ending us) is answered from the thread too: the main
    thread sits in C++ at that moment and would never say where."""
    EVERY = 0.5

    def __init__(self, store, coords, timeout, groups):
        self.groups = groups  # the mesh's, made and to be made
        self.store, self.coords, self.timeout, self.calls, self.what, self.since = store, coords, timeout, 0, 'starting', time.time()
        self.rank, self.world, self.checkpoint = dist.get_rank(), dist.get_world_size(), 'none yet'
        self.pipe = os.pipe()
        os.set_blocking(self.pipe[1], False)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: None)
            signal.set_wakeup_fd(self.pipe[1], warn_on_full_buffer=False)  # the C handler writes at once, whatever the main thread does
        self.thread = threading.Thread(target=self._beat, daemon=True)
        self.thread.start()
        self.failed, self.grace = False, 0
        atexit.register(self.stop, leave=True)

    def stop(self, leave=False, gloo=not torch.cuda.is_available()):
        """Threads caught inside C++ by the end of Python abort the process: ours ends here, gloo's when the groups are left. After a
        failure that would wait for the dead for ever (seen), so the process just goes; what it had to say is printed by then."""
        if leave and self.failed:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        if leave and gloo and dist.is_initialized():
            self.destroy_groups()
        if self.what != 'closed':
            self.what = 'closed'
            os.write(self.pipe[1], b'\0')
            self.thread.join()
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.set_wakeup_fd(-1)
            for end in self.pipe:
                os.close(end)

    def destroy_groups(self):
        """subtle: gloo's threads live as long as somebody holds a group, and one that still lets go of the last collective's tensor
        when Python ends can abort the process."""
        for group in self.groups.values():
            group.pg = None
        dist.destroy_process_group()

    def _beat(self):
        told = 0  # when SIGTERM came
        while self.what != 'closed':
            try:
                self.store.set(f'beat{self.rank}', json.dumps([socket.gethostname(), os.getpid(), time.time(), self.calls, self.what, self.since]))
            except RuntimeError as e:  # the store's host is gone; the main thread will meet that too
                self.what = f'{self.what} (store: {type(e).__name__})'[:200]
            if self.calls and self.what not in ('computing', 'closed') and time.time() - self.since > self.timeout + 10:  # the collective's own timeout should have come
                print(self.failure(TimeoutError('given up by the watch')), file=sys.stderr, flush=True)
                os._exit(1)
            if readable([self.pipe[0]], self.EVERY) and signal.SIGTERM in os.read(self.pipe[0], 64):
                told = told or time.time()
            if told and time.time() - told > self.grace:  # the loop has not come to its end: it waits for a dead rank
                print(f'{self._me()} was told to end (SIGTERM) while in {self.what}: another rank failed, '
                      f'or the job was stopped. {self._advice()}', file=sys.stderr, flush=True)
                os._exit(143)

    def _me(self):
        return f'parallel: rank {self.rank} of {self.world} ({self.coords[self.rank]})'

    def _advice(self):
        return f'Last good checkpoint: {self.checkpoint}. The same command with --init_from=resume goes on from it.'

    def enter(self, what):
        self.calls, self.what, self.since = self.calls + 1, what, time.time()

    def leave(self):
        self.what, self.since = 'computing', time.time()

    def _state(self, rank):
        """'' when the rank lives, else what is wrong with it."""
        key = f'beat{rank}'
        if not self.store.check([key]):
            return 'never started'
        host, pid, at, calls, what, since = json.loads(self.store.get(key))
        if host == socket.gethostname() and os.path.isdir('/proc'):
            try:
                with open(f'/proc/{pid}/stat') as f:
                    state = f.read().rpartition(')')[2].split()[0]
            except OSError:
                state = 'X'
            if state in 'XZT':
                return f'{"is stopped" if state == "T" else "is dead"} (pid {pid} on {host}, last in {what})'
        if time.time() - at > 6 * self.EVERY:
            return f'is silent for {time.time() - at:.0f} s ({host}, last in {what})'
        return f'is behind: {self.calls - calls} calls less, in {what} for {time.time() - since:.0f} s' if calls < self.calls else ''

    def failure(self, error):
        """The exception for a collective that failed: who is at fault, where, and what to do."""
        bad, self.failed = [], True
        try:
            for _ in range(4):  # a dying process may need a moment to be seen dead
                bad = [f'rank {r} ({self.coords[r]}) {s}' for r in range(self.world) if r != self.rank and (s := self._state(r))]
                if any('behind' not in b for b in bad):
                    break
                time.sleep(self.EVERY)
        except (RuntimeError, ValueError) as e:
            bad = [f"the store is gone ({type(e).__name__}): rank 0's host or torchrun has ended"]
        first = [b for b in bad if 'behind' not in b] or bad or ['no rank is missing now']
        return Failure(f'{self._me()}: {self.what} failed after {time.time() - self.since:.1f} s: {"; ".join(first)}. '
                       f'[{str(error).splitlines()[0][:160]}] {self._advice()}')


class Interrupt:
    """Ctrl-C and SIGTERM for a training loop: the first lets the iteration end, so that the run can write its checkpoint;
    the second ends at once. `number` is the signal that has come, 0 before."""

    def __init__(self):
        self.number = 0

    def listen(self):
        """From now on signals are noted. Only the main thread may (a stage that somebody runs in another one goes without)."""
        if threading.current_thread() is threading.main_thread():
            self.number = 0
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, self._note)

    def forget(self):
        """The usual answers again."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _note(self, number, frame):
        if self.number:
            self.forget()
            signal.raise_signal(number)
        self.number = number
        os.write(2, b'\nthe iteration ends, then ckpt.pt is written; once more ends at once\n')  # print may not be entered twice


# ---------------------------------------------------------------------------------------------------------------------
# groups and the mesh


class Group:
    """Some ranks and the collectives over them, on dimension 0. One rank: every operation is the identity."""

    def __init__(self, name, ranks=(0,), rank=0, pg=None, watch=None):
        self.name, self.ranks, self.pg, self.watch = name, list(ranks), pg, watch
        self.size, self.rank, self.waited = len(self.ranks), self.ranks.index(rank), 0.0

    def run(self, what, fn):
        """fn() under the watch: its failure names this call."""
        self.watch.enter(f'{what} over {self.name} {self.ranks}')
        start = time.perf_counter()
        try:
            return fn()
        except RuntimeError as e:
            raise self.watch.failure(e) from None
        finally:
            self.waited += time.perf_counter() - start
            self.watch.leave()

    def all_reduce(self, x, what='all_reduce', op=dist.ReduceOp.SUM, wait=True):
        """In place; returns x, or with wait=False a handle for `wait`."""
        if self.size == 1 or not x.numel():
            return x if wait else None
        work = self.run(what, lambda: dist.all_reduce(x, op, self.pg, async_op=not wait))
        return x if wait else work

    def all_gather(self, x, what='all_gather', out=None, wait=True):
        """(n, ...) of each rank -> (size n, ...), in rank order."""
        if self.size == 1:
            return x if wait else None
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:]) if out is None else out
        work = self.run(what, lambda: _gather_into(out, x.contiguous(), self.pg, async_op=not wait))
        return out if wait else work

    def reduce_scatter(self, x, what='reduce_scatter', out=None, wait=True):
        """(size n, ...) -> (n, ...): rows r n .. (r+1) n of the sum."""
        if self.size == 1:
            return x if wait else None
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:]) if out is None else out
        work = self.run(what, lambda: _scatter_into(out, x.contiguous(), group=self.pg, async_op=not wait))
        return out if wait else work

    def wait(self, work, what):
        if work is not None:
            self.run(what, work.wait)

    def send(self, x, to, what):
        """Starts sending to the group's rank `to`; the handle keeps x alive."""
        return self.run(what, lambda: dist.isend(x, self.ranks[to], self.pg)), x

    def recv(self, x, frm, what):
        self.run(what, lambda: dist.recv(x, self.ranks[frm], self.pg))
        return x

    def shift(self, x, what):
        """Ring step: starts sending x to the next rank and receiving its like from the previous one -> (buffer, [handles])."""
        out, nxt, prv = torch.empty_like(x), self.ranks[(self.rank + 1) % self.size], self.ranks[self.rank - 1]
        ops = [dist.P2POp(dist.isend, x, nxt, self.pg), dist.P2POp(dist.irecv, out, prv, self.pg)]
        return out, self.run(what, lambda: dist.batch_isend_irecv(ops))

    def broadcast(self, x, frm=0, what='broadcast'):
        """In place: what the group's rank `frm` holds; returns x."""
        if self.size > 1:
            self.run(what, lambda: dist.broadcast(x, self.ranks[frm], self.pg))
        return x

    def least(self, n, device, what='least'):
        """The smallest of the ranks' whole numbers."""
        return int(self.all_reduce(torch.tensor([n], device=device), what, dist.ReduceOp.MIN)) if self.size > 1 else n

    def share_object(self, obj, frm, what):
        """A small Python object of the group's rank `frm`, on all of them."""
        if self.size == 1:
            return obj
        box = [obj]
        self.run(what, lambda: dist.broadcast_object_list(box, self.ranks[frm], self.pg))
        return box[0]


def _move(o, device):
    """Tensors in (lists and tuples of) lists and tuples to a device."""
    return type(o)(_move(x, device) for x in o) if type(o) in (list, tuple) else o.to(device) if isinstance(o, torch.Tensor) else o


class Mesh:
    """Who this process is in the grid (dp, pp, cp, tp), and its groups. Made by `init`."""
    AXES = ('dp', 'pp', 'cp', 'tp')

    def __init__(self, sizes, zero, device, dist_timeout=120):
        self.zero, self.device, self.restarts = zero, device, int(os.environ.get('TORCHELASTIC_RESTART_COUNT', 0))
        self.timeout = timedelta(seconds=dist_timeout)  # given to each group: a new one would wait for half an hour, whatever the first was told
        self.world, self.rank, self.watch, self._made = math.prod(sizes), 0, None, {}
        self.torchrun = 'TORCHELASTIC_RUN_ID' in os.environ
        self.grid = torch.arange(self.world).view(sizes)
        if self.world > 1:
            self.rank = dist.get_rank()
            store = dist.PrefixStore('plain', dist.distributed_c10d._get_default_store())
            coords = {int(r): ' '.join(f'{a} {int((self.grid == r).nonzero()[0][i])}' for i, a in enumerate(self.AXES)) for r in self.grid.view(-1)}
            self.watch = Watch(store, coords, dist_timeout, self._made)
        self.tp, self.cp, self.data = self.group('tp'), self.group('cp'), self.group('dp', 'cp')
        self.replicas, self.inside = self.group('dp'), self.group('pp', 'tp')
        self.pp, self.pp_back = self.group('pp'), self.group('pp', tag='back')  # one channel per direction: no order to get wrong
        self.everyone = self.group('dp', 'pp', 'cp', 'tp')
        self.dp, self.dp_rank, self.master, self.checkpoint = self.replicas.size, self.replicas.rank, self.rank == 0, 'none yet'
        self.interrupt = Interrupt()

    def group(self, *axes, tag='', split=None):
        """The group of this rank along `axes`; split (with one axis): runs of that many ranks along it."""
        key = (axes, tag, split)
        if key not in self._made:
            rest = [i for i, a in enumerate(self.AXES) if a not in axes]
            rows = self.grid.permute(*rest, *[i for i, a in enumerate(self.AXES) if a in axes])
            rows = rows.reshape(-1, split or math.prod(self.grid.shape[self.AXES.index(a)] for a in axes)).tolist()
            for ranks in rows:  # new_group is a collective of ALL ranks: each walks through the same list
                pg = dist.new_group(ranks, self.timeout) if len(ranks) > 1 else None
                if self.rank in ranks:
                    self._made[key] = Group('x'.join(axes), ranks, self.rank, pg, self.watch)
        return self._made[key]

    def ends(self):
        """The first and the last stage, on which a tied embedding lives."""
        if 'ends' not in self._made:
            for first, last in zip(self.grid[:, 0].reshape(-1).tolist(), self.grid[:, -1].reshape(-1).tolist()):
                pg = dist.new_group([first, last], self.timeout)
                if self.rank in (first, last):
                    self._made['ends'] = Group('first and last stage', [first, last], self.rank, pg, self.watch)
            self._made.setdefault('ends', Group('middle stage'))
        return self._made['ends']

    def share(self, n):
        """The slice of a global batch of n rows that belongs to this replica. n=8, dp=2 -> slice(4, 8) on the second."""
        if n % self.dp:
            raise ValueError(f'a batch of {n} cannot be divided among {self.dp} data-parallel replicas: set batch_size to a multiple of {self.dp}')
        return slice(n // self.dp * self.dp_rank, n // self.dp * (self.dp_rank + 1))

    def deal(self, bins, lengths):
        """Of the bins (lists of row numbers, as `pack` makes them) into which EVERY rank has cut the same global batch, those of this
        replica: as many for each, the largest first, halved until their number divides. lengths: tokens of a row. With fewer rows than
        replicas each does them all (see `copies`). bins [[0, 1, 2]], dp=2 -> [[0, 2]] on the first, [[1]] on the second."""
        if self.dp == 1 or self.copies(sum(map(len, bins))) > 1:
            return bins
        size, bins = (lambda b: sum(int(lengths[i]) for i in b)), [list(b) for b in bins]
        while len(bins) % self.dp:
            largest = max((b for b in bins if len(b) > 1), key=size)
            bins.remove(largest)
            bins += [largest[0::2], largest[1::2]]
        bins.sort(key=size, reverse=True)
        return [bins[k + (self.dp_rank if k // self.dp % 2 == 0 else self.dp - 1 - self.dp_rank)] for k in range(0, len(bins), self.dp)]

    def copies(self, rows):
        """How many replicas compute each of `rows` rows that were dealt out: 1, or all where there are fewer rows than replicas."""
        return self.dp if rows < self.dp else 1

    def collect(self, mine, everyone=False, team=1):
        """The replicas' lists (everyone: those of all ranks, or of all teams) one behind the other, on every rank. For small things: they
        travel pickled, tensors by way of the CPU. Of the ranks of a replica the last pipeline stage speaks: it has the outputs. [1] and
        [2, 3] -> [1, 2, 3]."""
        if self.world == 1:
            return mine
        lists, mine = [None] * self.world, _move(mine, 'cpu')
        self.everyone.run('exchange of results', lambda: dist.all_gather_object(lists, mine))
        return [x for r in (self.grid.view(-1)[::team] if everyone else self.grid[:, -1, 0, 0]).tolist() for x in lists[r]]

    def mine(self, n, team=1):
        """The slice of n things (prompts to answer) that falls to this rank of all, or to its team: `team` neighbours that do the same
        (tp, for a sharded engine). n=5, world=2 -> slice(0, 2), slice(2, 5); team=2 -> slice(0, 5) for both."""
        teams, me = self.world // team, self.rank // team
        return slice(n * me // teams, n * (me + 1) // teams)

    def split_seeds(self, seed):
        """From here on each rank of several draws its own numbers (dropout); seed + rank * 100003 as in lm-human-preferences."""
        if self.world > 1:
            torch.manual_seed(seed + 100003 * self.rank)

    def words(self):
        """'' for one process, else ' x 4 (dp 2, tp 2, zero 1)'."""
        axes = [f'{a} {n}' for a, n in zip(self.AXES, self.grid.shape) if n > 1] + [f'zero {self.zero}'] * bool(self.zero)
        return f' x {self.world} ({", ".join(axes)})' if self.world > 1 else ''

    def plan(self, model):
        """`plan` for this layout; the model is still whole."""
        return plan(model, self.tp.size, self.pp.size, self.cp.size, self.dp, self.zero)

    def saved(self, path, it):
        """What a failure names as the last good checkpoint."""
        self.checkpoint = f'{path} (iter {it})'
        if self.watch:
            self.watch.checkpoint = self.checkpoint

    def restarted(self, out_dir):
        """True when torchrun has started this very run again after a failure: what lies in out_dir is its own. See `mark`."""
        file = os.path.join(out_dir, '.torchrun')
        mine = bool(self.restarts and os.path.exists(file) and open(file).read() == self._run())
        return self.everyone.share_object(mine, 0, 'restart')

    def mark(self, out_dir):
        """Notes in out_dir that its run is this one."""
        if self.torchrun and self.master:
            with open(os.path.join(out_dir, '.torchrun'), 'w') as f:
                f.write(self._run())

    def _run(self):
        return f'{os.environ.get("TORCHELASTIC_RUN_ID", "")} {socket.gethostname()} {os.getppid()}'  # torchrun itself stays the same process

    def rng_state(self):
        """[random state of rank 0, of rank 1, ...] for a checkpoint. All ranks call it."""
        mine = dict(cpu=torch.get_rng_state(), **({'cuda': torch.cuda.get_rng_state(self.device)} if self.device.type == 'cuda' else {}))
        states = [mine] * self.world
        if self.world > 1:
            self.everyone.run('random states', lambda: dist.all_gather_object(states, mine))
        return states

    def set_rng_state(self, states):
        """Each rank goes on with its own numbers if as many ranks run as wrote them, all with the same ones if all had the same (no
        dropout); else from its own seed."""
        alike = bool(states) and all(torch.equal(s['cpu'], states[0]['cpu']) for s in states)
        if len(states) == self.world or alike:
            state = states[self.rank if len(states) == self.world else 0]
            torch.set_rng_state(state['cpu'])
            if self.device.type == 'cuda' and 'cuda' in state:
                torch.cuda.set_rng_state(state['cuda'], self.device)

    def listen(self):
        """From now on the first Ctrl-C or SIGTERM is only noted; see `interrupted`. torchrun waits 30 s before it kills."""
        self.interrupt.listen()
        if self.watch:
            self.watch.grace = 25

    def interrupted(self):
        """The number of the signal that has come to any rank since `listen`, 0 for none. All ranks call it: they leave the
        loop at the same iteration."""
        came = self._near(torch.tensor([float(self.interrupt.number)]))
        return int(self.everyone.all_reduce(came, 'interrupts', dist.ReduceOp.MAX))

    def _near(self, x):
        return x.float().to(self.device) if self.device.type == 'mps' else x.to(self.device)

    def barrier(self):
        self.everyone.all_reduce(self._near(torch.zeros(1)), 'barrier')

    def log(self, text):
        if self.master:
            print(text, flush=True)

    def close(self):
        """At the end of the run, so that no rank leaves while another still talks to it."""
        self.interrupt.forget()
        if self.world > 1:
            self.barrier()
            self.watch.stop()
            self.watch.destroy_groups()


def _world_size():
    said = os.environ.get('WORLD_SIZE') or '1'
    if not said.isdecimal() or said == '0':
        raise ValueError(f'WORLD_SIZE is {said!r} in the environment, expected the number of processes: unset it')
    return int(said)


def init(tp=1, pp=1, cp=1, zero=0, dist_timeout=120, device=None, seed=1337, quiet=False):
    """The mesh of this run: torchrun's processes if there are several (dp = world / (tp pp cp)), else this one alone.

    device: 'cpu', 'cuda', 'mps' or None (cuda where there is one; rank i of a node takes GPU i). zero 0-3: what the replicas
    share out: nothing, optimizer, + gradients, + weights. Seeds torch alike everywhere (see Mesh.split_seeds). A collective
    that waits longer than dist_timeout seconds ends the run. quiet: what ranks other than 0 print is dropped (errors are not).
    ValueError when the numbers do not fit the processes.
    torchrun --nproc_per_node=8 with tp=2 -> dp=4; rank 5 is (dp 2, pp 0, cp 0, tp 1)."""
    for name, n in (('tp', tp), ('pp', pp), ('cp', cp)):
        if n < 1:
            raise ValueError(f'{name} {n}: expected 1 (off) or more')
    if zero not in (0, 1, 2, 3):
        raise ValueError(f'zero {zero}: expected 0, 1 (optimizer), 2 (+ gradients) or 3 (+ weights)')
    world = dist.get_world_size() if dist.is_initialized() else _world_size()
    missing = [name for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]
    if world > 1 and not dist.is_initialized() and missing:
        raise ValueError(f'WORLD_SIZE is {world} in the environment, but {", ".join(missing)} is not: start it with '
                         f'torchrun --nproc_per_node={world}, or unset WORLD_SIZE to run one process')
    if world % (tp * pp * cp):
        raise ValueError(f'tp {tp} x pp {pp} x cp {cp} = {tp * pp * cp} processes (or a multiple), but {world} run: '
                         f'torchrun --nproc_per_node={tp * pp * cp} SCRIPT.py ...')
    if dist_timeout < 1:
        raise ValueError(f'dist_timeout {dist_timeout}: seconds, at least 1')
    kind, local = str(device or ('cuda' if torch.cuda.is_available() else 'cpu')), int(os.environ.get('LOCAL_RANK', 0))
    if world > 1 and kind.startswith('cuda:'):
        raise ValueError(f'device {kind} with {world} processes: --device=cuda, each takes the GPU of its number')
    if kind == 'cuda' and world > 1:
        if local >= torch.cuda.device_count():
            raise ValueError(f'process {local} of this node has no GPU of its own, {torch.cuda.device_count()} are here: lower --nproc_per_node')
        torch.cuda.set_device(local)
        kind = f'cuda:{local}'
    if world > 1 and not dist.is_initialized():  # gloo beside nccl: metrics and small objects stay on the CPU
        store, rank, _ = next(dist.rendezvous('env://', timeout=timedelta(seconds=dist_timeout)))
        store = dist.PrefixStore(f'attempt {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)  # or a restart finds the addresses of the dead
        hook = sys.excepthook  # torch wraps it, and loses what a hook that ends the process has printed
        dist.init_process_group('cpu:gloo,cuda:nccl' if kind.startswith('cuda') else 'gloo', store=store, rank=rank, world_size=world,
                                timeout=timedelta(seconds=dist_timeout))
        sys.excepthook = hook
    torch.manual_seed(seed)
    mesh = Mesh((world // (tp * pp * cp), pp, cp, tp), zero, torch.device(kind), dist_timeout)
    if quiet and not mesh.master:
        sys.stdout = open(os.devnull, 'w')
    return mesh


ALONE = Mesh((1, 1, 1, 1), 0, torch.device('cpu'))  # for functions of a stage that somebody calls outside a run

# ---------------------------------------------------------------------------------------------------------------------
# communication with a gradient: each pair is its own mirror image


def _mirror(forward, backward):
    """A differentiable f(x, group) = forward(group, x), whose gradient is backward(group, gradient)."""
    class Op(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, group):
            ctx.group = group
            return forward(group, x)

        @staticmethod
        def backward(ctx, g):
            return backward(ctx.group, g), None
    return Op.apply


# (n, ...) of each rank -> (size n, ...). Every rank then uses the rows differently, so their gradients must be added up.
gather_rows = _mirror(Group.all_gather, Group.reduce_scatter)
# (size n, ...) partial sums -> (n, ...), this rank's rows of the whole sum
scatter_rows = _mirror(Group.reduce_scatter, Group.all_gather)
# as gather_rows, but every rank then does the SAME with the rows, so each gradient is whole already: take one's own rows
join_rows = _mirror(Group.all_gather, lambda group, g: g.chunk(group.size)[group.rank].contiguous())
# partial results -> their sum, with which every rank then does the same
sum_parts = _mirror(lambda group, x: group.all_reduce(x.clone(), 'sum of parts'), lambda group, g: g)

# ---------------------------------------------------------------------------------------------------------------------
# tensor + sequence parallel: some heads, some MLP columns, some words; N / tp tokens between the blocks


class Row(nn.Module):
    """Linear over a slice of its inputs: partial sums of all N tokens -> this rank's rows of the sum; the bias is added once."""

    def __init__(self, linear, group):
        super().__init__()
        self.weight, self.bias, self.group = linear.weight, linear.bias, group

    def forward(self, x):
        y = scatter_rows(kernels.linear(x, self.weight, None), self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class VocabEmbedding(nn.Module):
    """Words lo .. lo + len(weight) of the table. A foreign word gives zeros; the sum over the ranks is the embedding."""

    def __init__(self, weight, lo, group):
        super().__init__()
        self.weight, self.lo, self.group = weight, lo, group

    def forward(self, idx):
        here = (idx >= self.lo) & (idx < self.lo + len(self.weight))
        x = F.embedding(torch.where(here, idx - self.lo, 0), self.weight) * here[:, None]
        return scatter_rows(x, self.group)


class RowsEmbedding(nn.Module):
    """A whole table (positions), looked up for this rank's rows only."""

    def __init__(self, weight, group):
        super().__init__()
        self.weight, self.group = weight, group

    def forward(self, pos):
        return F.embedding(pos.chunk(self.group.size)[self.group.rank], self.weight)


class _VocabLogprobs(torch.autograd.Function):
    """log p(target) and entropy where each rank has the logits of its own words only; (n, V / tp) exists a block at a time.
    Two all-reduces for all rows: the maximum, then [sum exp, sum exp * z, z of the target], each moved to that maximum."""
    @staticmethod
    def forward(ctx, x, weight, targets, lo, temperature, group):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = max(64, (1 << 23) // len(weight))  # 32 MiB of float32 logits
        top, sums = torch.empty(len(x), dtype=wide, device=x.device), torch.empty(3, len(x), dtype=wide, device=x.device)
        mine = (targets >= lo) & (targets < lo + len(weight))
        word = torch.where(mine, targets - lo, 0)
        for i in range(0, len(x), rows):
            s = slice(i, i + rows)
            z = (x[s] @ weight.t()).to(wide).div_(temperature)
            top[s] = z.amax(1)
            e = (z - top[s, None]).exp_()
            sums[0, s], sums[1, s], sums[2, s] = e.sum(1), (e * z).sum(1), z.gather(1, word[s, None])[:, 0] * mine[s]
        whole = group.all_reduce(top.clone(), 'maximum of logits', dist.ReduceOp.MAX)
        sums[:2] *= (top - whole).exp()
        group.all_reduce(sums, 'sums of logits')
        lse, mean_z = whole + sums[0].log(), sums[1] / sums[0]
        logp, entropy = sums[2] - lse, lse - mean_z
        ctx.save_for_backward(x, weight, word, mine, lse, entropy)
        ctx.rows, ctx.temperature = rows, temperature
        return logp, entropy

    @staticmethod
    def backward(ctx, g_logp, g_entropy):
        """dz = g_logp (1[target] - p) - g_entropy p (log p + H), this rank's words; dx is partial: the gather behind x sums it."""
        x, weight, word, mine, lse, entropy = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.zeros_like(weight, dtype=lse.dtype)
        for i in range(0, len(x), ctx.rows):
            s = slice(i, i + ctx.rows)
            logp = (x[s] @ weight.t()).to(lse.dtype).div_(ctx.temperature).sub_(lse[s, None])
            d = -logp.exp() * (g_logp[s, None] + g_entropy[s, None] * (logp + entropy[s, None]))
            d.scatter_add_(1, word[s, None], (g_logp[s] * mine[s])[:, None])
            d = d.div_(ctx.temperature).to(x.dtype)
            torch.mm(d, weight, out=dx[s])
            dw.addmm_(d.t().to(dw.dtype), x[s].to(dw.dtype))
        return dx, dw.to(weight.dtype), None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# context parallel: the tokens of one batch shared out; chunk r and chunk 2 cp - 1 - r belong to rank r (zig-zag)


def zigzag(n, size, rank, device=None):
    """Rows of rank `rank` when n flat tokens (a multiple of 2 size) are shared out. n=8, size=2, rank=0 -> [0, 1, 6, 7]."""
    if size == 1:
        return torch.arange(n, device=device)
    a, b = torch.arange(n, device=device).view(2 * size, -1)[[rank, 2 * size - 1 - rank]]
    return torch.cat([a, b])


def _gathered_attend(group, pos, dropout, tile=1024):
    """Attention of this rank's rows against the keys of all ranks: one all-gather of K and V, backward one reduce-scatter.
    A segment (sequence or packed document) begins where pos is 0, so row i sees the keys i - pos[i] .. i."""
    n, dev = len(pos), pos.device
    natural = torch.cat([zigzag(n, group.size, r, dev) for r in range(group.size)]).argsort()
    start = torch.arange(n, device=dev) - pos
    chunk, tiles = n // (2 * group.size), []
    for c in (group.rank, 2 * group.size - 1 - group.rank):
        for a in range(c * chunk, (c + 1) * chunk, tile):
            b = min(a + tile, (c + 1) * chunk)
            lo, key = int(start[a]), torch.arange(int(start[a]), b, device=dev)
            row = torch.arange(a, b, device=dev)[:, None]
            tiles.append((lo, b, (key <= row) & (key >= start[a:b, None])))

    def attend(layer, q, k, v):
        k, v = (gather_rows(t, group).index_select(0, natural).transpose(0, 1)[None] for t in (k, v))
        out = []
        for rows, (lo, b, mask) in zip(q.split([m.shape[0] for *_, m in tiles]), tiles):
            y = F.scaled_dot_product_attention(rows.transpose(0, 1)[None], k[:, :, lo:b], v[:, :, lo:b], attn_mask=mask,
                                               dropout_p=dropout, enable_gqa=q.shape[1] != k.shape[1])
            out.append(y[0].transpose(0, 1))
        return torch.cat(out)
    return attend


class _Ring(torch.autograd.Function):
    """Ring attention: K and V travel round the ring while each rank works on the block that it has; running softmax.
    Per block: new = logaddexp(lse, block_lse); out = out e^(lse - new) + block e^(block_lse - new). Backward: a second round in
    which dK and dV travel with their K and V and arrive at home after `size` steps."""
    @staticmethod
    def blocks(group, n, src, tile=1024):
        """(rows of mine, rows of the visitor, where both begin in the whole) of the chunk pairs that causality leaves."""
        size, c, r = group.size, n // 2, group.rank
        for i, qc in enumerate((r, 2 * size - 1 - r)):
            for j, kc in enumerate((src, 2 * size - 1 - src)):
                for a in range(0, c if kc <= qc else 0, tile):
                    yield slice(i * c + a, i * c + min(a + tile, c)), slice(j * c, j * c + c), qc * c + a, kc * c

    @staticmethod
    def scores(q, k, q0, k0, pos):
        """(nkv, group, rows, keys) scaled scores, -inf where row q0 + i may not see key k0 + j."""
        s = torch.einsum('qhgd,khd->hgqk', q, k) / math.sqrt(q.shape[-1])
        row = torch.arange(q0, q0 + len(q), device=q.device)
        key = torch.arange(k0, k0 + len(k), device=q.device)
        seen = (key <= row[:, None]) & (key >= (row - pos[q0:q0 + len(q)])[:, None])
        return s.masked_fill(~seen, -math.inf)

    @staticmethod
    def forward(ctx, q, k, v, pos, group):
        n, nh, hs = q.shape
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        qg, kv = q.view(n, k.shape[1], -1, hs).to(wide), torch.stack([k, v])
        out, lse = torch.zeros_like(qg), torch.full((n, *qg.shape[1:3]), -math.inf, dtype=wide, device=q.device)
        for step in range(group.size):
            if step + 1 < group.size:
                nxt, works = group.shift(kv, 'ring K and V')
            for mine, theirs, q0, k0 in _Ring.blocks(group, n, (group.rank - step) % group.size):
                s = _Ring.scores(qg[mine], kv[0, theirs].to(wide), q0, k0, pos)
                block_lse = s.logsumexp(-1)
                p = (s - block_lse.nan_to_num(neginf=0.0)[..., None]).exp()  # a row that sees nothing here: all zeros, no NaN
                new = torch.logaddexp(lse[mine], block_lse.permute(2, 0, 1))
                y = torch.einsum('hgqk,khd->qhgd', p, kv[1, theirs].to(wide))
                old, fresh = ((a - new.nan_to_num(neginf=0.0)).exp()[..., None] for a in (lse[mine], block_lse.permute(2, 0, 1)))
                out[mine], lse[mine] = out[mine] * old + y * fresh, new
            if step + 1 < group.size:
                for w in works:
                    group.wait(w, 'ring K and V')
                kv = nxt
        ctx.group = group
        ctx.save_for_backward(q, k, v, out, lse, pos)
        return out.reshape(n, nh, hs).to(q.dtype)

    @staticmethod
    def backward(ctx, g):
        q, k, v, out, lse, pos = ctx.saved_tensors
        group, (n, nh, hs), wide = ctx.group, q.shape, out.dtype
        qg, g = (t.reshape(n, k.shape[1], -1, hs).to(wide) for t in (q, g))
        delta, dq, scale = (g * out).sum(-1), torch.zeros_like(qg), 1 / math.sqrt(hs)
        kv = torch.stack([k, v]).to(wide)
        travel = torch.cat([kv, torch.zeros_like(kv)])  # K, V, dK, dV
        for step in range(group.size):
            for mine, theirs, q0, k0 in _Ring.blocks(group, n, (group.rank - step) % group.size):
                p = (_Ring.scores(qg[mine], travel[0, theirs], q0, k0, pos) - lse[mine].permute(1, 2, 0)[..., None]).exp()
                travel[3, theirs] += torch.einsum('hgqk,qhgd->khd', p, g[mine])
                ds = p * (torch.einsum('qhgd,khd->hgqk', g[mine], travel[1, theirs]) - delta[mine].permute(1, 2, 0)[..., None]) * scale
                dq[mine] += torch.einsum('hgqk,khd->qhgd', ds, travel[0, theirs])
                travel[2, theirs] += torch.einsum('hgqk,qhgd->khd', ds, qg[mine])
            nxt, works = group.shift(travel, 'ring gradients')
            for w in works:
                group.wait(w, 'ring gradients')
            travel = nxt
        return dq.reshape(n, nh, hs).to(q.dtype), travel[2].to(k.dtype), travel[3].to(v.dtype), None, None


# ---------------------------------------------------------------------------------------------------------------------
# the parts: which piece of which full tensor a rank holds


@dataclasses.dataclass
class Part:
    """One Parameter of this rank: `ranges` along `dim` of the full tensor `name`, one after another (fused q, k, v have three)."""
    name: str
    param: nn.Parameter
    shape: tuple                # of the full tensor
    dim: int = 0
    ranges: tuple = ()          # () = the whole
    sums: tuple = ()            # groups over which the gradients of copies are partial sums
    owner: bool = True          # of several equal copies one counts: in the norm, in checkpoints
    pieces: list = dataclasses.field(default_factory=list)   # what of it this rank's optimizer is in charge of
    bucketed: bool = False      # an optimizer trains it

    def take(self, full):
        return torch.cat([full.narrow(self.dim, a, b - a) for a, b in self.ranges], self.dim) if self.ranges else full

    def put(self, full, local):
        if not self.ranges:
            return full.copy_(local)
        for (a, b), piece in zip(self.ranges, local.split([b - a for a, b in self.ranges], self.dim)):
            full.narrow(self.dim, a, b - a).copy_(piece)


def _ranges(name, c, tp, t):
    """(dim, ranges) of rank t's slice of a parameter, (0, ()) where all tp ranks hold the whole. With fewer kv heads than tp,
    tp / nkv ranks share one. nh=4, nkv=2, hs=8, tp=4, t=1: q_proj rows 8..16, k_proj rows 0..8."""
    cut = lambda n: (n * t // tp, n * (t + 1) // tp)
    q = tuple(x * c.head_size for x in cut(c.n_head))
    kv = tuple(x * c.head_size for x in (cut(c.n_kv_head) if c.n_kv_head >= tp else (t * c.n_kv_head // tp, t * c.n_kv_head // tp + 1)))
    at = lambda base, r: (base + r[0], base + r[1])
    module, _, kind = name.rpartition('.')
    leaf = module.rpartition('.')[2]
    rows = {'q_proj': (q,), 'k_proj': (kv,), 'v_proj': (kv,), 'gate_proj': (cut(c.n_inner),), 'up_proj': (cut(c.n_inner),), 'c_fc': (cut(c.n_inner),),
            'c_attn': (q, at(c.n_head * c.head_size, kv), at((c.n_head + c.n_kv_head) * c.head_size, kv)),
            'wte': (cut(c.vocab_size),), 'lm_head': (cut(c.vocab_size),)}
    cols = {'o_proj': (q,), 'attn.c_proj': (q,), 'down_proj': (cut(c.n_inner),), 'mlp.c_proj': (cut(c.n_inner),)}
    if leaf in rows:
        return 0, rows[leaf]
    return 1, next((r for end, r in cols.items() if module.endswith(end) and kind == 'weight'), ())


def _check_fit(c, mesh, model, layers):
    tp, pp = mesh.tp.size, mesh.pp.size
    lora = any('lora_' in n for n, _ in model.named_parameters())
    if c.n_head % tp or (c.n_kv_head % tp and tp % c.n_kv_head):
        fits = [t for t in range(tp, 0, -1) if c.n_head % t == 0 and (c.n_kv_head % t == 0 or t % c.n_kv_head == 0)]
        raise ValueError(f'tp {tp} does not divide {c.n_head} heads ({c.n_kv_head} key-value heads): the nearest that works is --tp={fits[0]}')
    if c.n_inner % tp:
        raise ValueError(f'tp {tp} does not divide the MLP width {c.n_inner}: the nearest that works is --tp={math.gcd(tp, c.n_inner)}')
    if lora and tp > 1:
        raise ValueError(f'lora with tp {tp} is not supported: the nearest that works is --tp=1 with --zero=2 or --pp={tp}')
    if lora and mesh.zero == 3:
        raise ValueError('lora with zero 3 is not supported (the frozen weights would stay whole anyway): the nearest that works is --zero=2')
    if pp > 1 and c.dropout:
        raise ValueError(f'pp {pp} with dropout {c.dropout} is not supported: the nearest that works is --dropout=0.0 (RL wants that anyway) or --pp=1')
    if pp > c.n_layer or (layers and (len(layers) != pp or sum(layers) != c.n_layer or min(layers) < 1)):
        raise ValueError(f'pp {pp} stages for {c.n_layer} layers{f" as {list(layers)}" if layers else ""}: each stage needs at least one, '
                         f'and together they are {c.n_layer}; the nearest that works is --pp={min(pp, c.n_layer)}')


STAGES = dict(sft='tp pp cp', reward='tp pp cp', dpo='tp pp', kto='tp pp', ppo='tp pp cp', grpo='tp pp')


def accept(stage, tp=1, pp=1, cp=1, compile=False, mode='sync', value='', rollout_tp=False):
    """ValueError, with the nearest that works, for what a stage cannot do on several processes, before anything is loaded.

    Accepted, and run by tests/test_torchrun.py against one process: the axes of STAGES, each alone and in all mixtures, with zero 0 to 3,
    and (but for tp and zero 3) with lora. tests/test_parallel.py runs each mixture with each zero for the model under them."""
    world = int(os.environ.get('WORLD_SIZE', 1))
    odd = next(((k, n, sizes) for k, n, sizes in (('tp', tp, (1, 2, 4, 8)), ('pp', pp, (1, 2, 4)), ('cp', cp, (1, 2, 4))) if n > 1 and n not in sizes), ('tp', 0, (1,)))
    for wrong, what, nearest in (
            (odd[1], f'{odd[0]} {odd[1]} is not tested ({odd[2]} are)', f'--{odd[0]}={max(n for n in odd[2] if n <= max(odd[1], 1))}'),
            (cp > 1 and 'cp' not in STAGES[stage], f'cp {cp} is not supported by {stage}.py, where answers share the tokens of their prompt',
             f'--cp=1 with --tp={cp}, or a smaller micro_tokens'),
            (rollout_tp and tp == 1, 'rollout_tp without tensor parallelism: there is nothing to shard', '--rollout_tp=False, or --tp=2 and more'),
            (compile and world > 1, f'compile with {world} processes is not supported', '--compile=False'),
            (mode == 'async' and world > 1, f"mode 'async' with {world} ranks is not supported: it trains in one process",
             '--mode=sync, or one process with the other GPUs given to --rollout_workers'),
            (value == 'trunk' and world > 1, f'value trunk with {world} processes is not supported', '--value=policy')):
        if wrong:
            raise ValueError(f'{what}: the nearest that works is {nearest}')


class _Handoff(Exception):
    """Carries a stage's activations out of the loss function, which goes no further than model.hidden on this rank."""

    def __init__(self, x):
        super().__init__('with pp > 1 the model runs inside parallel.forward_backward or parallel.evaluate')
        self.x = x


class _Receive(nn.Module):
    """In the place of the embedding on later stages: what the previous stage sent, (N / (cp tp), C)."""

    def __init__(self, mesh, width, dtype):
        super().__init__()
        self.mesh, self.width, self.dtype, self.x = mesh, width, dtype, None

    def forward(self, idx):
        if self.x is not None:
            raise ValueError('the loss function called the model twice on one microbatch; with pp > 1 once is all: call forward_backward twice')
        x = torch.empty(len(idx) // self.mesh.tp.size, self.width, dtype=self.dtype, device=idx.device)
        self.x = self.mesh.pp.recv(x, self.mesh.pp.rank - 1, 'activations').requires_grad_(torch.is_grad_enabled())
        return self.x


class _Nothing(nn.Module):
    def forward(self, pos):
        return 0.0


class _Send(nn.Module):
    """In the place of the last norm on earlier stages."""

    def forward(self, delta, x):
        raise _Handoff(x + delta)


class Head(nn.Module):
    """The output layer with this rank's words: a module, so that ZeRO-3 can fetch its weight round the call."""

    def __init__(self, body, mesh):
        super().__init__()
        self.body, self.tp = [body], mesh.tp  # in a list: the body's parameters are not ours
        self.lo = _ranges('lm_head.weight', body.config, mesh.tp.size, mesh.tp.rank)[1][0][0]

    def forward(self, x, targets=None, temperature=1.0, reduce=False):
        body = self.body[0]
        if body.head == 'scalar':
            return body.score(x)[:, 0].to(_wide(x.dtype))
        if targets is None:
            z = kernels.linear(x, body.lm_head.weight, None)
            return z if self.tp.size == 1 else gather_words(z, body.config.vocab_size, self.tp)
        x, weight = body.head_weight(x)
        if self.tp.size == 1:
            return kernels.linear_cross_entropy(x, weight, targets) if reduce else kernels.linear_logprobs(x, weight, targets, temperature)
        logp, entropy = _VocabLogprobs.apply(x, weight, targets, self.lo, temperature, self.tp)
        return -logp.sum() / max(1, len(logp)) if reduce else (logp, entropy)


def cut(body, tp):
    """Tensor parallelism, in place: slices every parameter of a GPT that has ranges, then puts the communication around it."""
    c, tied, body.tp = body.config, body.config.tie and body.head == 'lm', tp
    for name, p in list(body.named_parameters(remove_duplicate=False)):
        dim, ranges = _ranges(name, c, tp.size, tp.rank)
        if ranges and not (name == 'lm_head.weight' and tied):
            owner = body.get_submodule(name.rpartition('.')[0])
            local = Part(name, p, tuple(p.shape), dim, ranges).take(p.detach()).clone()
            setattr(owner, name.rpartition('.')[2], nn.Parameter(local, p.requires_grad))
    gather = lambda module, args: (gather_rows(args[0], tp), *args[1:])
    for block in body.h:
        a, m = block.attn, block.mlp
        a.n_head, a.n_kv_head = a.n_head // tp.size, max(1, a.n_kv_head // tp.size)
        a.register_forward_pre_hook(gather)
        m.register_forward_pre_hook(gather)
        for module, name in ((a, 'c_proj'), (a, 'o_proj'), (m, 'c_proj'), (m, 'down_proj')):
            if hasattr(module, name):
                setattr(module, name, Row(getattr(module, name), tp))
    body.wte = VocabEmbedding(body.wte.weight, _ranges('wte.weight', c, tp.size, tp.rank)[1][0][0], tp)
    if tied:
        body.lm_head.weight = body.wte.weight
    if body.wpe is not None:
        body.wpe = RowsEmbedding(body.wpe.weight, tp)


def gather_words(z, V, tp):
    """Logits of this rank's words (n, V / tp) -> (n, V), on every rank; with a gradient."""
    counts = [V * (t + 1) // tp.size - V * t // tp.size for t in range(tp.size)]
    z = join_rows(F.pad(z.t(), (0, 0, 0, max(counts) - z.shape[1])), tp)
    return torch.cat([p[:n] for p, n in zip(z.chunk(tp.size), counts)]).t()


def _check_replicas(model, mesh):
    """All ranks must start from the same weights: a different seed or file is found here, not in the loss curve."""
    sums = torch.stack([p.detach().double().sum() for p in model.parameters()]).cpu().float()
    low, high = (mesh.everyone.all_reduce(mesh._near(sums.clone()), 'check of the weights', op) for op in (dist.ReduceOp.MIN, dist.ReduceOp.MAX))
    if not torch.equal(low, high):
        bad = int((low != high).nonzero()[0])
        raise ValueError(f'the ranks hold different weights ({[n for n, _ in model.named_parameters()][bad]}): same seed, same checkpoint on every rank?')


class Sharded(nn.Module):
    """This rank's part of a GPT behind the GPT's own calls: forward, logprobs, encode. Made by `shard`.

    The body is the GPT itself, cut in place: smaller Linears, a hook that gathers the tokens before attention and MLP, Row in the
    place of the projections back, and on pipeline stages Receive and Send in the place of embedding and last norm."""

    def __init__(self, model, mesh, layers=None, attention='auto'):
        super().__init__()
        c, tp, pp = model.config, mesh.tp, mesh.pp
        _check_fit(c, mesh, model, layers)
        if attention not in ('auto', 'ring', 'gather'):
            raise ValueError(f"attention {attention!r}: expected 'auto', 'ring' or 'gather'")
        if attention == 'ring' and c.dropout:
            raise ValueError(f"attention 'ring' with dropout {c.dropout} is not supported: set --dropout=0.0, or attention 'gather'")
        self.config, self.head, self.mesh, self.attention, self.body, self.running = c, model.head, mesh, attention, model, False
        self.full = [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in model.named_parameters()]  # the same list on every rank
        _check_replicas(model, mesh)
        layers = list(layers) if layers else [c.n_layer * (i + 1) // pp.size - c.n_layer * i // pp.size for i in range(pp.size)]
        self.first, self.last, lo = pp.rank == 0, pp.rank == pp.size - 1, sum(layers[:pp.rank])
        self.tied = c.tie and model.head == 'lm'
        self.ends = mesh.ends() if pp.size > 1 else None
        kv = mesh.group('tp', split=tp.size // c.n_kv_head) if tp.size > c.n_kv_head else Group('kv')
        if tp.size > 1:
            cut(model, tp)
        if pp.size > 1:
            self._stage(lo, lo + layers[pp.rank])
        self.parts = [self._part(n, p, lo, kv) for n, p in model.named_parameters()]
        self.out = Head(model, mesh) if self.last else None
        self.units = [(m, list(m.parameters())) for m in (model.wte, model.wpe, *model.h, model.ln_f) if m is not None]
        if self.last:
            self.units.append((self.out, [model.lm_head.weight if model.head == 'lm' else model.score.weight]))
        self.train(model.training)

    def _stage(self, lo, hi):
        """Keeps layers lo .. hi. A tied head on the last stage is a copy of the embedding; their gradients are added."""
        body, like = self.body, self.body.wte.weight
        body.h = nn.ModuleList(list(body.h)[lo:hi])
        if self.last and self.tied and not self.first:
            body.lm_head.weight = nn.Parameter(like.detach().clone(), like.requires_grad)
        if not self.first:
            body.wte = _Receive(self.mesh, self.config.n_embd, like.dtype)
            body.wpe = None if body.wpe is None else _Nothing()
        if not self.last:
            body.ln_f, body.lm_head, body.score = _Send(), None, None

    def _part(self, local_name, p, lo, kv):
        mesh, name, c = self.mesh, local_name, self.config
        if name.startswith('h.'):
            _, i, rest = name.split('.', 2)
            name = f'h.{int(i) + lo}.{rest}'
        tied_copy = name == 'lm_head.weight' and self.tied
        name = 'wte.weight' if tied_copy else name
        shape = next(s for n, s, *_ in self.full if n == name)
        dim, ranges = _ranges(name, c, mesh.tp.size, mesh.tp.rank) if mesh.tp.size > 1 else (0, ())
        shared = kv.size > 1 and any(k in name for k in ('k_proj', 'v_proj'))
        sums = ((mesh.tp,) if not ranges and not name.startswith('score') else ()) + ((kv,) if shared else ())
        if name == 'wte.weight' and self.tied and mesh.pp.size > 1 and (self.first or self.last):
            sums += (self.ends,)
        owner = not tied_copy and (mesh.tp.rank == 0 or bool(ranges)) and (not shared or kv.rank == 0)
        return Part(name, p, shape, dim, ranges, tuple(g for g in sums if g.size > 1), owner)

    def state_dict(self):
        """The whole model's, on rank 0 (see full_state): what a plain GPT would save. All ranks call it."""
        return full_state(self, only_master=True)

    # ---- forward ---------------------------------------------------------------------------------------------------

    def encode(self, idx, mask=None, doc=None):
        """((x (n, C), own (n,)), Layout), for `logprobs(encoded=)`: rows `own` of the batch's N real tokens. tp ranks get the same
        rows, cp ranks their zig-zag share; on earlier pipeline stages _Handoff leaves from here."""
        mesh, body, at = self.mesh, self.body, self.body.layout(idx, mask, doc)
        if mesh.pp.size > 1 and not self.running:
            raise RuntimeError('with pp > 1 call the model inside parallel.forward_backward or parallel.evaluate')
        n, padded, cp = len(at.pos), len(at.pos) + at.extra, mesh.cp.size
        rest = -padded % (mesh.tp.size * (2 * cp if cp > 1 else 1))
        ids, pos = (F.pad(t, (0, at.extra + rest)) for t in (at.pick(idx), at.pos))  # dummies: segments of one token, nobody sees them
        own = zigzag(padded + rest, cp, mesh.cp.rank, idx.device)
        dropout = self.config.dropout if self.training else 0.0
        inner = at.attend(dropout)
        if cp > 1:
            ring = self.attention == 'ring' or (self.attention == 'auto' and not dropout and int((at.pos == 0).sum()) == 1)
            attend = (lambda layer, q, k, v: _Ring.apply(q, k, v, pos, mesh.cp)) if ring else _gathered_attend(mesh.cp, pos, dropout)
        else:
            attend = inner if not rest else lambda layer, q, k, v: F.pad(inner(layer, q[:padded], k[:padded], v[:padded]), (0, 0, 0, 0, 0, rest))
        x = body.hidden(ids[own], pos[own], attend) if cp > 1 else body.hidden(ids, pos, attend)
        if mesh.tp.size > 1:  # a scalar head does the same work on every rank, an LM head its own words
            x = (join_rows if self.head == 'scalar' else gather_rows)(x, mesh.tp)
        keep = own < n
        return ((x, own) if padded + rest == n else (x[keep], own[keep])), at

    def hidden(self, ids, pos, attend):
        """As GPT.hidden, for a stage that lays its tokens out itself: all N rows on every tp rank."""
        n, tp = len(ids), self.mesh.tp.size
        if self.mesh.cp.size > 1:
            raise ValueError(f'cp {self.mesh.cp.size}: answers that share their prompt cannot be cut along the context; the nearest that works is --cp=1 '
                             f'with --tp or a smaller micro_tokens')
        if self.mesh.pp.size > 1 and not self.running:
            raise RuntimeError('with pp > 1 call the model inside parallel.forward_backward or parallel.evaluate')
        rest = -n % tp
        padded = attend if not rest else lambda layer, q, k, v: F.pad(attend(layer, q[:n], k[:n], v[:n]), (0, 0, 0, 0, 0, rest))
        x = self.body.hidden(F.pad(ids, (0, rest)), F.pad(pos, (0, rest)), padded)
        return (join_rows if self.head == 'scalar' else gather_rows)(x, self.mesh.tp)[:n] if tp > 1 else x

    def values(self, x):
        """As GPT.values."""
        return self.out(x) + self.config.reward_bias

    def token_logprobs(self, x, targets, temperature=1.0):
        """As GPT.token_logprobs."""
        return self.out(x, targets, temperature)

    def _whole(self, values, own, n):
        """This rank's rows (len(own), ...) -> all n rows, on every cp rank."""
        if self.mesh.cp.size == 1:
            return values
        full = values.new_zeros(n, *values.shape[1:]).index_copy(0, own, values)
        return sum_parts(full, self.mesh.cp)

    def forward(self, idx, targets=None, mask=None, doc=None):
        """As GPT.forward: (logits, None), (None, mean loss) or (values, None); the same on every rank of the last stage."""
        (x, own), at = self.encode(idx, mask, doc)
        if self.head == 'scalar' or targets is None:
            y = at.put(self._whole(self.out(x), own, len(at.pos)))
            return (y + self.config.reward_bias if self.head == 'scalar' else y), None
        targets = at.pick(targets)
        total, mine = int((targets >= 0).sum()), targets[own]
        counted = mine >= 0
        x, mine = x[counted], mine[counted]
        loss = self.out(x, mine, reduce=True) * (len(mine) / max(1, total))  # called even for no token: ZeRO-3 fetches inside
        return None, sum_parts(loss, self.mesh.cp) if self.mesh.cp.size > 1 else loss

    def logprobs(self, idx, temperature=1.0, mask=None, doc=None, where=None, entropy=False, encoded=None):
        """As GPT.logprobs: (B, T-1), or (logp, entropy)."""
        (x, own), at = encoded or self.encode(idx, mask, doc)
        B, T = idx.shape
        real = torch.ones_like(idx[:, 1:], dtype=torch.bool) if mask is None else mask[:, 1:] & mask[:, :-1]
        if doc is not None:
            real = real & (doc[:, 1:] == doc[:, :-1])
        if where is not None:
            real = real & where
        flat = F.pad(real, (0, 1)).reshape(-1).nonzero()[:, 0]
        row = flat if at.keep is None else torch.searchsorted(at.keep, flat)
        local = torch.full((len(at.pos),), -1, device=idx.device).index_copy(0, own, torch.arange(len(own), device=idx.device))[row]
        flat, local = flat[local >= 0], local[local >= 0]
        both = self.out(x[local], idx.reshape(-1)[flat + 1], temperature)
        out = [torch.zeros(B * T, device=idx.device, dtype=y.dtype).index_copy(0, flat, y) for y in both[:1 + entropy]]
        if self.mesh.cp.size > 1:
            out = [sum_parts(y, self.mesh.cp) for y in out]
        out = [y.view(B, T)[:, :-1] for y in out]
        return tuple(out) if entropy else out[0]


def shard(model, mesh, layers=None, attention='auto'):
    """This rank's part of a GPT: the GPT itself in a world of one, else a Sharded with the same calls. The model is cut in place.

    layers: how many each pipeline stage gets, (4, 5, 3); default as even as can be. attention with cp: 'ring', 'gather' (keys and
    values of all ranks at once: packed batches) or 'auto' (ring when the batch is one long sequence). ValueError for what does not
    fit, with the nearest that does."""
    if mesh.world == 1:
        return model
    return Sharded(model, mesh, layers, attention)


def sampler_of(model, mesh, dtype=torch.float32, shard=False):
    """What a rollout engine on this rank reads, to be asked for BEFORE `shard`. shard=False: the plain GPT. shard=True: this rank's
    tensor-parallel part of all layers; the ranks of a tp group then run one engine in step, each with its heads' keys and values (see
    infer.Forward). In both cases the trained model itself where that holds it in this dtype (pp = 1, below ZeRO-3; the plain GPT
    also wants tp = 1), so that no weight lies in memory twice; else a copy that `refresh` fills."""
    _check_fit(model.config, mesh, model, None)
    whole = mesh.pp.size == 1 and (mesh.zero < 3 or mesh.data.size == 1) and (shard or mesh.tp.size == 1)
    if whole and dtype == torch.float32:
        return model
    sampler = copy.deepcopy(model).to(dtype).requires_grad_(False)
    if shard:
        cut(sampler, mesh.tp)
    return sampler


@torch.no_grad()
def refresh(engine, model):
    """A rollout engine takes over the model's weights: in place where what it reads is the model itself (see sampler_of), else by a copy."""
    body = engine.model
    if body is getattr(model, 'body', model):
        engine.weights_changed()
    elif engine.tp.size == 1:
        engine.load_weights(full_state(model))
    else:
        own, c, tp = dict(body.named_parameters()), body.config, engine.tp
        for name, full in _full_tensors(model):  # one full tensor at a time: no rank ever holds them all
            own[name].copy_(Part(name, own[name], full.shape, *_ranges(name, c, tp.size, tp.rank)).take(full))
        engine.weights_changed()


def set_weight(model, name, value):
    """Puts the full tensor `value` in the place of parameter `name`, whatever the layout. All ranks call it with the same one."""
    _load_network({name: value}, model, name, only=name)


def _parts(model):
    """The parts of a Sharded; of a plain GPT the parameters, whole, noted on it at the first call."""
    if not isinstance(model, Sharded):
        params = list(model.named_parameters())
        if [id(p.param) for p in getattr(model, 'parts', ())] != [id(p) for _, p in params]:
            model.parts = [Part(n, p, tuple(p.shape)) for n, p in params]
    return model.parts


# ---------------------------------------------------------------------------------------------------------------------
# data parallel: a flat bucket a layer; ZeRO decides what of it a rank keeps


@dataclasses.dataclass
class Piece:
    """Elements lo .. hi of a flattened Part that this rank's optimizer is in charge of."""
    part: Part
    lo: int
    hi: int
    weight: torch.Tensor        # in the model's dtype
    master: torch.Tensor        # what AdamW updates: the same memory, or a float32 copy of bf16 weights
    at: int = 0                 # where it begins in the bucket's share


class Bucket:
    """One layer's parameters end to end in one flat tensor `full`, of which the Parameters are views. This rank is in charge of
    `local`: everything (zero 0) or 1 / n. Gradients collect in a float32 buffer and are reduced when the layer's last one is in.

        zero      weights kept   gradients kept              optimizer kept      sent per step (params of n ranks, each way)
        0         all            all                         all                 all-reduce 2
        1         all            all until reduced           1/n                 reduce-scatter 1 + all-gather 1
        2         all            1/n (+ a layer in flight)   1/n                 as 1, the scatter once a microbatch
        3         1/n (+ 2)      1/n (+ a layer in flight)   1/n                 as 2, + 2 all-gathers a microbatch
    """

    def __init__(self, parts, group, zero):
        self.parts, self.group, self.zero = parts, group, zero if group.size > 1 else 0
        p = parts[0].param
        sizes = [part.param.numel() for part in parts]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        total = -(-sum(sizes) // group.size) * group.size
        self.full = torch.zeros(total, dtype=p.dtype, device=p.device)
        for part, at in zip(parts, self.starts):
            view = self.full[at:at + part.param.numel()].view(part.param.shape)
            part.param.data = view.copy_(part.param.data)
        share = total // group.size if self.zero else total
        self.lo = share * group.rank if self.zero else 0
        self.local = self.full[self.lo:self.lo + share]
        if self.zero == 3:
            self.local = self.local.clone()
        self.master = self.local if _wide(p.dtype) == p.dtype else self.local.to(_wide(p.dtype))
        self.pieces = []
        for part, at in zip(parts, self.starts):
            part.bucketed, part.pieces = True, []
            a, b = max(at, self.lo), min(at + part.param.numel(), self.lo + share)
            if a < b:
                s = slice(a - self.lo, b - self.lo)
                self.pieces.append(Piece(part, a - at, b - at, self.local[s], self.master[s], s.start))
                part.pieces.append(self.pieces[-1])
        self.grad = self.shard_grad = self.incoming = self.work = self.fetching = None
        self.pending, self.held, self.in_backward = 0, True, False
        if self.zero == 3:
            self.release()

    # zero 3: the weights come and go; the views stay valid because the storage object stays the same
    def gather(self, wait=True):
        if not self.held:
            self.full.untyped_storage().resize_(self.full.numel() * self.full.itemsize)
            self.fetching, self.held = self.group.all_gather(self.local, 'weights', out=self.full, wait=False), True
        if wait and self.fetching is not None:
            self.group.wait(self.fetching, 'weights')
            self.fetching = None

    def release(self):
        if self.zero == 3 and self.held:
            self.gather()  # never free what is still arriving
            self.full.untyped_storage().resize_(0)
            self.held = False

    def collect(self, i):
        """The gradient of parameter i has just been completed by this backward: into the buffer with it."""
        p, at = self.parts[i].param, self.starts[i]
        if self.grad is None:
            self.grad = torch.zeros(len(self.full), dtype=self.master.dtype, device=self.full.device)
        self.grad[at:at + p.numel()].add_(p.grad.reshape(-1))
        p.grad = None

    def reduce(self):
        """Starts the sum over the replicas."""
        if self.grad is None:
            self.grad = torch.zeros(len(self.full), dtype=self.master.dtype, device=self.full.device)
        if not self.zero or self.grad.device.type == 'cpu':  # gloo scatters by summing a copy of the whole: without the copy, then
            self.work = self.group.all_reduce(self.grad, 'gradients', wait=False)
        else:
            self.incoming = torch.empty_like(self.master)
            self.work = self.group.reduce_scatter(self.grad, 'gradients', out=self.incoming, wait=False)

    def reduced(self):
        """Ends it: shard_grad holds the sum, over all microbatches so far."""
        self.group.wait(self.work, 'gradients')
        self.work = None
        if not self.zero:
            self.shard_grad = self.grad
            return
        mine = self.grad[self.lo:self.lo + len(self.local)].clone() if self.incoming is None else self.incoming
        self.shard_grad = mine if self.shard_grad is None else self.shard_grad.add_(mine)
        self.grad = self.incoming = None


class Optimizer:
    """AdamW (matrices decayed, vectors not) over whatever this rank is in charge of.

    One process with float32 weights: torch's AdamW on the parameters, nothing else. Otherwise one Bucket a layer: reductions
    start during the backward, in the same order on every rank; bf16 weights get float32 masters; the norm counts every
    element of the model once. overlap=False reduces at the end of the backward instead (for measuring what overlap brings)."""

    def __init__(self, model, mesh, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, overlap=True):
        self.model, self.mesh, self.overlap, self.parts = model, mesh, overlap, [p for p in _parts(model) if p.param.requires_grad]
        self.flat = mesh.world > 1 or any(p.param.dtype not in (torch.float32, torch.float64) for p in self.parts)
        if self.flat:
            self.buckets = self._fill()
            self.pieces = [piece for b in self.buckets for piece in b.pieces]
        else:
            for p in self.parts:
                p.pieces, p.bucketed = [Piece(p, 0, p.param.numel(), p.param, p.param)], True
            self.buckets, self.pieces = [], [piece for p in self.parts for piece in p.pieces]
        groups = [dict(params=[p.master for p in self.pieces if (p.part.param.dim() >= 2) == decays], weight_decay=weight_decay if decays else 0.0)
                  for decays in (True, False)]
        self.adam = torch.optim.AdamW([g for g in groups if g['params']] or groups[:1], lr=lr, betas=betas, eps=eps, fused=True) \
            if self.pieces else None
        self.sync, self.next, self.running = True, 0, collections.deque()

    def _fill(self):
        model, mesh = self.model, self.mesh
        units = model.units if isinstance(model, Sharded) else [(model, list(model.parameters()))]
        part_of, bucket_of, buckets, fetches = {id(p.param): p for p in self.parts}, {}, [], []
        for module, params in units:
            params = [p for p in params if p.requires_grad]
            for dtype in dict.fromkeys(p.dtype for p in params):
                mine = [p for p in params if p.dtype == dtype and id(p) not in bucket_of]
                if mine:
                    buckets.append(Bucket([part_of[id(p)] for p in mine], mesh.data, mesh.zero))
                    bucket_of.update({id(p): buckets[-1] for p in mine})
            fetches += [(module, b) for b in dict.fromkeys(bucket_of[id(p)] for p in params)]
        buckets.reverse()  # the order in which a backward finishes them
        for b in buckets:
            for i, part in enumerate(b.parts):
                part.param.register_post_accumulate_grad_hook(lambda p, b=b, i=i: self._arrived(b, i))
        if mesh.zero == 3 and mesh.data.size > 1:
            self.fetches = [b for _, b in fetches]
            for j, (module, _) in enumerate(fetches):
                module.register_forward_pre_hook(lambda m, args, j=j: self._fetch(j, 1))
                module.register_forward_hook(lambda m, args, out, j=j: self._used(j, out))
        return buckets

    # ---- ZeRO-3: fetch a layer, start fetching the next, free it after use; the same backwards
    def _fetch(self, j, step):
        self.fetches[j].gather()
        if 0 <= j + step < len(self.fetches):
            self.fetches[j + step].gather(wait=False)

    def _used(self, j, out):
        for t in out if isinstance(out, tuple) else (out,):
            if isinstance(t, torch.Tensor) and t.requires_grad:
                t.register_hook(lambda g: self._again(j))
        if not self.fetches[j].in_backward:  # else: recomputed inside a backward (activation checkpointing)
            self.fetches[j].release()

    def _again(self, j):
        self.fetches[j].in_backward = True
        self._fetch(j, -1)

    # ---- around a backward
    def begin(self, sync):
        """Before each backward; sync: the last of this step, so zero 0 and 1 reduce now."""
        self.sync, self.next = sync or self.mesh.zero >= 2, 0
        for b in self.buckets:
            b.pending = len(b.parts)

    def _arrived(self, b, i):
        b.collect(i)
        b.pending -= 1
        if not b.pending:
            b.in_backward = False
            b.release()
            while self.overlap and self.sync and self.next < len(self.buckets) and not self.buckets[self.next].pending:
                self._launch()

    def _launch(self):
        """The next bucket in the fixed order: collectives must not depend on which gradient came first."""
        b = self.buckets[self.next]
        self.next += 1
        b.reduce()
        self.running.append(b)
        if len(self.running) > 2:
            self.running.popleft().reduced()

    def end(self):
        """After each backward: what had no gradient is reduced too, and everything is awaited."""
        while self.sync and self.next < len(self.buckets):
            self._launch()
        while self.running:
            self.running.popleft().reduced()
        for b in self.buckets:
            b.in_backward = False
            b.release()

    # ---- the step: its parts, which clip_and_step puts together
    def _ready(self):
        """The gradients where AdamW looks for them -> [those that there are]."""
        for b in self.buckets:
            for p in b.pieces:
                p.master.grad = b.shard_grad[p.at:p.at + p.hi - p.lo]
        return [p.master.grad for p in self.pieces if p.master.grad is not None]

    def _update(self, lr):
        if self.adam:
            for group in self.adam.param_groups:
                group['lr'] = lr
            self.adam.step()
        self._drop()
        works = collections.deque()
        for b in self.buckets:
            if b.master is not b.local:
                b.local.copy_(b.master)
            if b.zero in (1, 2):
                works.append(b.group.all_gather(b.local.clone(), 'weights', out=b.full, wait=False))
            if len(works) > 2:
                b.group.wait(works.popleft(), 'weights')
        for work in works:
            self.mesh.data.wait(work, 'weights')

    def _drop(self):
        for p in self.pieces:
            p.master.grad = None
        for b in self.buckets:
            b.grad = b.shard_grad = None

    def _square(self):
        """Adds the partial gradients of copies -> the sum of squares over all axes, every element once."""
        for group in dict.fromkeys(g for p in self.pieces for g in p.part.sums):
            grads = [p.master.grad for p in self.pieces if group in p.part.sums]
            whole = group.all_reduce(torch.cat(grads), 'gradients of copies')
            for g, s in zip(grads, whole.split([len(g) for g in grads])):
                g.copy_(s)
        owned = [p.master.grad for p in self.pieces if p.part.owner and p.master.grad is not None]
        square = torch.stack(torch._foreach_norm(owned)).double().square().sum() if owned else torch.zeros((), dtype=torch.float64)
        if self.mesh.world == 1:
            return float(square)
        zero = self.mesh.zero and self.mesh.data.size > 1
        return float((self.mesh.everyone if zero else self.mesh.inside).all_reduce(self.mesh._near(square.reshape(1)), 'gradient norm'))

    # ---- state, layout-free: {'step': n, 'exp_avg': {name: full tensor}, ...}
    def state_dict(self):
        """All ranks call it; rank 0 gets the full tensors on the CPU, the others empty dicts. The same whatever the layout."""
        state = {kind: {n: t.cpu() for n, t in _full_tensors(self.model, lambda p, k=kind: self.read(p, k)) if self.mesh.master} for kind in self.kinds()}
        return {'step': self.mesh.everyone.share_object(self.steps(), 0, 'steps'), **state}

    def kinds(self):
        return ('exp_avg', 'exp_avg_sq') + (('master',) if any(_wide(p.param.dtype) != p.param.dtype for p in self.parts) else ())

    def read(self, piece, kind):
        """The flat tensor of one kind of one piece; zeros before the first step."""
        if kind == 'master':
            return piece.master.detach().view(-1)
        state = self.adam.state.get(piece.master)
        return state[kind].view(-1) if state else torch.zeros_like(piece.master.detach()).view(-1)

    def steps(self):
        state = next(iter(self.adam.state.values()), None) if self.adam else None
        return int(state['step']) if state else 0

    @torch.no_grad()
    def load_state_dict(self, saved, where='checkpoint'):
        """Takes its pieces out of a layout-free state."""
        if not isinstance(saved, dict) or not {'step', 'exp_avg', 'exp_avg_sq'} <= saved.keys():
            raise ValueError(f'{where}: no optimizer state by name in it (ckpt_best.pt has none, older versions kept it by number): '
                             f'start a new run from its weights with --init_from=FILE')
        for p in self.pieces:
            name = p.part.name
            if any(name not in saved[k] for k in ('exp_avg', 'exp_avg_sq')):
                raise ValueError(f'{where}: no optimizer state for {name}: was it trained with other settings (lora_r)?')
            cut = lambda full: p.part.take(full).reshape(-1)[p.lo:p.hi].to(p.master).view(p.master.shape).clone()
            if saved['step']:
                self.adam.state[p.master] = dict(step=torch.tensor(float(saved['step']), device=p.master.device),
                                                 exp_avg=cut(saved['exp_avg'][name]), exp_avg_sq=cut(saved['exp_avg_sq'][name]))
            if name in saved.get('master', {}) and p.master is not p.weight:
                p.master.copy_(cut(saved['master'][name]))


@torch.no_grad()
def clip_and_step(optimizers, lrs, grad_clip=0.0):
    """One update of one network or several (policy and value), clipped by ONE global norm over all of them; returns that norm before
    clipping (float). grad_clip 0 = off. A norm that is not finite raises ValueError and leaves the weights as they were.
    g = (3, 4), clip 1 -> returns 5, g becomes (0.6, 0.8)."""
    mesh, grads = optimizers[0].mesh, [g for o in optimizers for g in o._ready()]
    if any(o.flat for o in optimizers):
        norm = math.sqrt(sum(o._square() for o in optimizers))
        if grad_clip and grad_clip < norm < math.inf and grads:
            torch._foreach_mul_(grads, min(1.0, grad_clip / (norm + 1e-6)))
    else:
        norm = torch.nn.utils.clip_grad_norm_([p.master for o in optimizers for p in o.pieces], grad_clip or math.inf).item()
    if not math.isfinite(norm):
        for o in optimizers:
            o._drop()
        raise ValueError(f'step {optimizers[0].steps()}: the gradient norm is {norm}: weights left as they were; the last good checkpoint is '
                         f'{mesh.checkpoint}: resume from it with a lower learning_rate or a smaller grad_clip')
    for o, lr in zip(optimizers, lrs):
        o._update(lr)
    return norm


# ---------------------------------------------------------------------------------------------------------------------
# one optimizer step's worth of microbatches


def forward_backward(model, optimizer, micros, loss_of, weights=None, summed=False):
    """Forward and backward of all microbatches of this replica (loss.backward() on each); then clip_and_step. Returns {'loss': ..., stats ...} as floats over
    all microbatches of all replicas, the same on every rank (a name that ends in _max: the largest); with pp also 'bubble', the share of
    the time that this rank waited for another stage, beside the schedule's own 'bubble_ideal' = (pp - 1) / (m + pp - 1).

    loss_of(model, micro) -> (loss, {name: number}): means over the microbatch, and weights: how much each one counts (its tokens); or
    with summed=True its share of the whole batch's loss and statistics, which are only added up (see mesh.copies).
    ValueError when the replicas hold unequal numbers of microbatches or nothing counts.
    Two replicas, losses 1.0 and 4.0 with weights 3 and 1 -> loss 1.75, gradient 3/4 g_1 + 1/4 g_2; summed: 5.0, g_1 + g_2."""
    mesh = optimizer.mesh
    weights = [float(w) for w in weights] if weights is not None else [1.0] * len(micros)
    total = sum(weights)
    if mesh.dp > 1:
        seen = mesh.replicas.all_gather(mesh._near(torch.tensor([[total, len(micros)]], dtype=torch.float64)), 'weights of the batch').cpu()
        total = float(seen[:, 0].sum())
        if len(seen[:, 1].unique()) > 1:
            raise ValueError(f'the replicas hold {seen[:, 1].int().tolist()} microbatches: each needs as many as the others')
    if not total > 0:
        raise ValueError(f'nothing to learn from in this batch: the weights of its {len(micros)} microbatches add up to {total}')
    scales = [1.0 if summed else w / total for w in weights]
    start, waited = time.perf_counter(), mesh.pp.waited + mesh.pp_back.waited
    if mesh.pp.size > 1:
        results = _one_forward_one_backward(model, optimizer, micros, loss_of, scales)
        results = mesh.pp.share_object(results, mesh.pp.size - 1, 'metrics')
    else:
        results = []
        for i, (micro, scale) in enumerate(zip(micros, scales)):
            loss, stats = loss_of(model, micro)
            part = loss * scale
            optimizer.begin(sync=i == len(micros) - 1)
            part.backward()
            optimizer.end()
            results.append({'loss': part.detach(), **stats})
        results = _numbers(results)
    metrics = _over_replicas(mesh, results, scales)
    if mesh.pp.size > 1:
        metrics['bubble'] = (mesh.pp.waited + mesh.pp_back.waited - waited) / (time.perf_counter() - start)
        metrics['bubble_ideal'] = (mesh.pp.size - 1) / (len(micros) + mesh.pp.size - 1)
    return metrics


def _over_replicas(mesh, results, scales):
    """One dict of floats out of those of the microbatches; the loss is scaled already."""
    if any(r.keys() != results[0].keys() for r in results):
        raise ValueError(f'the loss function must return the same statistics for every microbatch, got {[sorted(r) for r in results]}')
    most = lambda k: k.endswith('_max')
    out = {k: max(r[k] for r in results) if most(k) else sum(r[k] if k == 'loss' else r[k] * s for r, s in zip(results, scales)) for k in results[0]}
    if mesh.dp == 1:
        return out
    rows = mesh.replicas.all_gather(mesh._near(torch.tensor([list(out.values())], dtype=torch.float64)), 'metrics').cpu()
    return {k: (rows[:, i].max() if most(k) else rows[:, i].sum()).item() for i, k in enumerate(out)}


def _numbers(results):
    return [{k: float(v.detach() if isinstance(v, torch.Tensor) else v) for k, v in r.items()} for r in results]  # only now: a float() waits for the GPU


def _one_forward_one_backward(model, optimizer, micros, loss_of, scales):
    """1F1B (PipeDream-flush): at most pp - stage microbatches are in flight, so activations do not grow with their number.

        stage 0   F0 F1 F2 .. B0 F3 B1 F4 B2 .. B3 B4        pp = 3, m = 5; a stage is idle for 2 of 7 slots
        stage 1      F0 F1 B0 F2 B1 F3 B2 F4 B3 .. B4
        stage 2         F0 B0 F1 B1 F2 B2 F3 B3 F4 B4
    """
    pp, back, m = model.mesh.pp, model.mesh.pp_back, len(micros)
    inflight, sending, results = collections.deque(), collections.deque(), []

    def forward(i):
        with _running(model):
            try:
                loss, stats = loss_of(model, micros[i])
                out = loss * scales[i]
                results.append({'loss': out.detach(), **stats})
            except _Handoff as h:
                out = h.x
                sending.append((pp, pp.send(out.detach(), pp.rank + 1, 'activations')))
            inflight.append((None if model.first else model.body.wte.x, out))

    def backward(i):
        x, out = inflight.popleft()
        g = None if model.last else back.recv(torch.empty_like(out), back.rank + 1, 'gradients of activations')
        optimizer.begin(sync=i == m - 1)
        torch.autograd.backward(out, g)
        optimizer.end()
        if x is not None:
            sending.append((back, back.send(x.grad, back.rank - 1, 'gradients of activations')))
        while len(sending) > 2 * pp.size:
            _sent(sending)

    warm = min(pp.size - 1 - pp.rank, m)
    for i in range(warm):               # 1. warm-up: fill the pipe
        forward(i)
    for i in range(m - warm):           # 2. steady: one forward, one backward
        forward(warm + i)
        backward(i)
    for i in range(m - warm, m):        # 3. cool-down: empty it
        backward(i)
    while sending:
        _sent(sending)
    return _numbers(results)


def _sent(sending):
    group, (work, _) = sending.popleft()
    group.wait(work, 'send')


@contextlib.contextmanager
def _running(model):
    """Inside: the model may be called (once) by a loss function of the pipeline."""
    model.running = True
    if isinstance(model.body.wte, _Receive):
        model.body.wte.x = None
    try:
        yield
    finally:
        model.running = False


@torch.no_grad()
def evaluate(model, micros, fn):
    """[fn(model, micro) for micro in micros] without gradients, on every rank of the replica. fn returns a tensor or a tuple of them."""
    mesh = getattr(model, 'mesh', None)
    if mesh is None or mesh.pp.size == 1:
        return [fn(model, micro) for micro in micros]
    outputs, sending = [], collections.deque()
    for micro in micros:
        with _running(model):
            try:
                outputs.append(fn(model, micro))
            except _Handoff as h:
                sending.append((mesh.pp, mesh.pp.send(h.x, mesh.pp.rank + 1, 'activations')))
    while sending:
        _sent(sending)
    return _move(mesh.pp.share_object(_move(outputs, 'cpu'), mesh.pp.size - 1, 'outputs'), mesh.device)


# ---------------------------------------------------------------------------------------------------------------------
# full tensors out of any layout, checkpoints


def _wide(dtype):
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


@torch.no_grad()
def _full_tensors(model, read=None, keep=None):
    """Yields (name, full tensor) on every rank: owners fill in what they hold, the world adds up (x + 0 = x: exact). `read(piece)`
    -> flat tensor, for the optimizer's kinds of the trained parameters; without it the weights of all. keep(name): which of them."""
    if not isinstance(model, Sharded):
        for part in _parts(model):
            if (read is None or part.pieces) and (keep is None or keep(part.name)):
                yield part.name, part.param.detach() if read is None else read(part.pieces[0]).view(part.shape)
        return
    mesh, owned = model.mesh, {p.name: p for p in model.parts if p.owner}
    split = mesh.zero > 0 and mesh.data.size > 1
    for name, shape, dtype, trained in model.full:
        if (read is not None and not trained) or (keep is not None and not keep(name)):
            continue
        full, part = torch.zeros(shape, dtype=dtype if read is None else _wide(dtype), device=mesh.device), owned.get(name)
        if part is not None and (split and part.bucketed or mesh.data.rank == 0):
            local = torch.zeros(part.param.shape, dtype=full.dtype, device=mesh.device)
            for p in part.pieces:
                local.view(-1)[p.lo:p.hi] = p.weight if read is None else read(p)
            part.put(full, local if part.bucketed else part.param)
        mesh.everyone.all_reduce(full, 'full weights')
        yield name, full


def full_state(model, only_master=False, keep=None):
    """The plain state dict of the whole model whatever the layout, on every rank (only_master: rank 0, on the CPU; {} elsewhere; keep(name) -> bool).
    All ranks must call it. It is what GPT.load_state_dict, save_pretrained and a rollout engine's load_weights take."""
    state, mine = {}, not only_master or getattr(model, 'mesh', None) is None or model.mesh.master
    for name, full in _full_tensors(model, keep=keep):
        if mine:
            state[name] = full.cpu() if only_master else full
    if hasattr(model, 'config') and model.config.tie and model.head == 'lm' and 'wte.weight' in state:
        state['lm_head.weight'] = state['wte.weight']
    return state


def _write(saved, path):
    """torch.save into a whole file or none: a full disk is one line with the name, and the file that was there stays."""
    try:
        with files.replaced(path) as f:
            torch.save(saved, f)
    except RuntimeError as e:  # torch's word for a failed write
        raise OSError(errno.EIO, f'could not be written ({str(e).splitlines()[0][:100]})', path) from None


def read_checkpoint(path, mmap=False):
    """The one reader of checkpoints: a dict, on the CPU. mmap: its tensors stay on the disk until they are used.
    ValueError, one line, for a file that is none of ours or was cut short; OSError for one that may not be read."""
    with open(path, 'rb'):  # no such file, permission denied: the system's own word
        pass
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)
        if not isinstance(saved, dict) or 'model' not in saved:
            raise ValueError('no "model" in it')
        return saved
    except Exception as e:  # torch raises whatever its readers of zip and pickle meet
        best = os.path.join(os.path.dirname(path), 'ckpt_best.pt')
        other = f'; {best} may still be good' if os.path.exists(best) and best != path else ''
        why = f'{type(e).__name__}: {(str(e).splitlines() or [""])[0][:100]}'
        raise ValueError(f'{path}: not a checkpoint of ours, or cut short ({why}){other}') from None


def save_checkpoint(path, mesh, model, optimizer, value=None, value_optimizer=None, keep=None, also=None, **rest):
    """One file, the same whatever the layout: model, optimizer (and value, value_optimizer: PPO's second network), rng (one state a
    rank) and what is given in `rest` (config, iter, data, best, model_args, tokenizer: plain types and tensors). Atomic. All
    ranks call it. Full tensors are made one at a time; rank 0 holds them all (12 bytes a parameter: 8B -> 96 GB of host memory).
    keep(name) -> bool: which of the model's tensors are written (an adapter's). also: a second file, without the optimizer (the best so
    far)."""
    networks = {'model': model, 'value': value}
    optimizers = {'optimizer': optimizer, 'value_optimizer': value_optimizer}
    rest = {**rest, 'rng': mesh.rng_state()}
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    out = {key: full_state(net, only_master=True, keep=keep if key == 'model' else None) for key, net in networks.items() if net is not None}
    moments = {key: opt.state_dict() for key, opt in optimizers.items() if opt is not None}
    if mesh.master:
        _write({**out, **moments, **rest}, path)
        if also:
            _write({**out, **dict.fromkeys(moments), **rest}, also)
    mesh.barrier()
    mesh.saved(path, rest.get('iter', '?'))


def load_checkpoint(path, mesh, model, optimizer=None, value=None, value_optimizer=None):
    """Puts a file of save_checkpoint into models and optimizers of ANY layout, bitwise, and returns the rest of it (a dict). The
    random states are restored when as many ranks run as wrote it; another layout draws on from its own seeds. ValueError for a
    file that is not ours or does not fit."""
    saved = read_checkpoint(path, mmap=True)
    try:
        for key, net in (('model', model), ('value', value)):
            if net is not None:
                _load_network(saved[key], net, path)
        for key, opt in (('optimizer', optimizer), ('value_optimizer', value_optimizer)):
            if opt is not None:
                opt.load_state_dict(saved[key], path)
    except KeyError as e:
        raise ValueError(f'{path}: a checkpoint without {e}') from None
    mesh.set_rng_state(saved.get('rng', ()))
    mesh.saved(path, saved.get('iter', '?'))
    return {k: v for k, v in saved.items() if k not in ('model', 'value', 'optimizer', 'value_optimizer', 'rng')}


@torch.no_grad()
def _load_network(state, model, where, only=None):
    for part in (p for p in _parts(model) if only in (None, p.name)):
        if part.name not in state or tuple(state[part.name].shape) != tuple(part.shape):
            raise ValueError(f'{where}: {part.name} is {tuple(state[part.name].shape) if part.name in state else "missing"}, this model wants {tuple(part.shape)}')
        local = part.take(state[part.name]).to(part.param)
        if part.param.untyped_storage().nbytes():  # freed by ZeRO-3: only the pieces are there
            part.param.copy_(local)
        for p in part.pieces:
            p.weight.view(-1).copy_(local.reshape(-1)[p.lo:p.hi])
            if p.master is not p.weight:
                p.master.copy_(p.weight)


# ---------------------------------------------------------------------------------------------------------------------
# what it will cost


def plan(model, tp=1, pp=1, cp=1, dp=1, zero=0, itemsize=4, activations=0):
    """Bytes on the fullest rank: {'weights', 'gradients', 'optimizer', 'in_flight', 'activations', 'total'}; n = dp cp ranks share
    under ZeRO. model: an unsharded GPT, one on torch.device('meta') is enough; activations: of one microbatch in a world of one
    (model.activation_bytes), divided here by tp and cp; 1F1B holds pp microbatches of L / pp layers, so pp cancels. Gradients 4
    bytes a parameter, Adam's moments 8, float32 masters of bf16 weights 4; ZeRO-3 holds two fetched layers; in flight is the
    largest gradient on its way into the sum (of a tied embedding the head's, beside the table's). GPT-2 small, one process,
    float32: 498 + 498 + 996 + 154 MB."""
    c, n, worst = model.config, dp * cp if zero else 1, {'total': -1}
    bounds, tied = [c.n_layer * (i + 1) // pp for i in range(pp)], c.tie and model.head == 'lm'
    for stage in range(pp):
        sizes, trained = collections.Counter(), collections.Counter()
        for name, p in model.named_parameters():
            dim, ranges = _ranges(name, c, tp, 0)
            unit = '.'.join(name.split('.')[:2]) if name.startswith('h.') else name.split('.')[0]
            at = {next(i for i in range(pp) if int(name.split('.')[1]) < bounds[i])} if unit.startswith('h.') else {0} if unit in ('wte', 'wpe') else {pp - 1}
            if stage in (at | {pp - 1} if tied and unit == 'wte' else at):
                n_here = p.numel() // p.shape[dim] * sum(b - a for a, b in ranges) if ranges and tp > 1 else p.numel()
                sizes[unit] += n_here
                trained[unit] += n_here * p.requires_grad
        frozen, local, large = sum(sizes.values()) - sum(trained.values()), sum(trained.values()), max(trained.values())
        out = dict(weights=itemsize * (frozen + (local / n + sum(sorted(trained.values())[-2:]) if zero == 3 and n > 1 else local)),
                   gradients=4 * (local if zero < 2 or n == 1 else local / n + large), optimizer=(12 if itemsize == 2 else 8) * local / n,
                   in_flight=4 * large, activations=activations / (tp * cp))
        out['total'] = sum(out.values())
        worst = max(worst, out, key=lambda o: o['total'])
    return worst
