"""Every axis of parallelism on torch.distributed, each proven equal to the single process: tensor + sequence
(Megatron, 1909.08053, 2205.05198), pipeline (1F1B, 2104.04473), data with ZeRO 0-3 (1910.02054), context
(keys and values gathered as for Llama 3, 2407.21783; ring attention, 2310.01889, sends them round instead and
never holds them all).

A stage has the same lines for one process and for many; with one, every operation is the identity:

    mesh = parallel.init(tp, pp, cp, zero)              # torchrun's processes, or this one alone
    sampler = parallel.sampler_of(model, mesh)          # what a rollout engine reads; before the model is cut
    model = parallel.shard(model.to(mesh.device), mesh) # this rank's part; called as before
    optimizer = parallel.Optimizer(model, mesh, learning_rate, betas, eps, weight_decay)
    mesh.split_seeds(seed)                              # weights come from one seed, dropout from one a rank
    optimizer.load_state_dict(ckpt['optimizer'])        # on resume; the model's own comes before shard
    while True:
        bins = mesh.share_of(pack(lengths, n), lengths) # this replica's micro-batches; as many on each
        micros = [...]                                  # made of them: whatever loss_of takes
        def loss_of(model, mb): ...; return loss, dict(clip_frac=...)   # mean over mb; calls the model once
        metrics = parallel.forward_backward(model, optimizer, micros, loss_of, weights)  # weights: tokens
        norm = parallel.clip_and_step([optimizer], [lr], grad_clip)     # global norm over all axes
        outputs = parallel.evaluate(model, micros, fn)  # [fn(model, mb)] without gradients, on every rank
        state = parallel.full_state(model)              # plain state dict on every rank
        parallel.save_checkpoint(path, mesh, model, optimizer, iter=...)    # one file whatever the layout
        values = mesh.collect([...])                    # the replicas' lists, on every rank

Gradients are sum_i weight_i * grad_i / sum_i weight_i over all micro-batches of all replicas: token-weighted,
whatever the split.

How the axes meet. Ranks form a grid (dp, pp, cp, tp), tp innermost (it talks most, so it stays inside a
node). model.py works on N flat tokens, and so do we: context parallelism gives each cp rank N / cp of them
(zig-zag, so that causal work is even), tensor parallelism gives each rank some heads and MLP columns, and
keeps N / (cp tp) tokens in between (sequence parallel). Everything that a Parameter needs to know is in its
`Part`: which piece of which full tensor, who sums its gradient. What cannot be done is refused by
`check_stage` (stages) and `_check_fit` (models). """
import atexit
import contextlib
import copy
import dataclasses
import errno
import math
import os
import signal
import sys
import time
from collections import Counter, deque
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn import functional as F

import files
import kernels

_gather_into = getattr(dist, 'all_gather_single', dist.all_gather_into_tensor)  # torch 2.13 renamed them
_scatter_into = getattr(dist, 'reduce_scatter_single', dist.reduce_scatter_tensor)

# ----------------------------------------------------------------------------------------------------
# signals, groups and the mesh


class Failure(RuntimeError):
    """A collective did not come back. The message names it, who is silent, and the last good checkpoint; a
    process that died is named by torchrun too."""


class Interrupt:
    """Ctrl-C and SIGTERM for a training loop: the first lets the iteration end, so that the run can write its
    checkpoint; the second ends at once. `number` is the signal that has come, 0 before."""

    def __init__(self):
        self.number = 0

    def listen(self):
        """From now on signals are noted."""
        self.number = 0
        self._answer(self._note, self._note)

    def forget(self):
        """The usual answers again."""
        self._answer(signal.default_int_handler, signal.SIG_DFL)

    def _answer(self, to_int, to_term):
        with contextlib.suppress(ValueError):  # only the main thread may: a stage in another one goes without
            signal.signal(signal.SIGINT, to_int)
            signal.signal(signal.SIGTERM, to_term)

    def _note(self, number, frame):
        if self.number:
            self.forget()
            signal.raise_signal(number)
        self.number = number
        said = b'\nthe iteration ends, then ckpt.pt is written; once more ends at once\n'
        os.write(2, said)  # print may not be entered twice


class Group:
    """Some ranks and the collectives over them, on dimension 0. One rank: every operation is the identity."""

    def __init__(self, name, ranks=(0,), rank=0, pg=None, mesh=None):
        self.name, self.pg, self.mesh = name, pg, mesh
        self.ranks = list(ranks)
        self.size, self.rank, self.waited = len(self.ranks), self.ranks.index(rank), 0.0

    def share(self, n):
        """Borders of this rank's share of n things in a row. n=5, size=2 -> (0, 2) and (2, 5)."""
        return n * self.rank // self.size, n * (self.rank + 1) // self.size

    def run(self, what, fn):
        """fn(), whose failure names this call."""
        start = time.perf_counter()
        try:
            return fn()
        except RuntimeError as e:
            raise self.mesh.failure(self, what, time.perf_counter() - start, e) from None
        finally:
            self.waited += time.perf_counter() - start

    def all_reduce(self, x, what='all_reduce', op=dist.ReduceOp.SUM, wait=True):
        """In place; returns x, or with wait=False a handle for `wait`."""
        work = None
        if self.size > 1 and x.numel():
            work = self.run(what, lambda: dist.all_reduce(x, op, self.pg, async_op=not wait))
        return x if wait else work

    def all_gather(self, x, what='all_gather', out=None, wait=True):
        """(n, ...) of each rank -> (size n, ...), in rank order."""
        return self._into(_gather_into, x, self.size * len(x), what, out, wait)

    def reduce_scatter(self, x, what='reduce_scatter', out=None, wait=True):
        """(size n, ...) -> (n, ...): rows r n .. (r+1) n of the sum."""
        return self._into(_scatter_into, x, len(x) // self.size, what, out, wait)

    def _into(self, collective, x, rows, what, out, wait):
        if self.size == 1:
            return x if wait else None
        if out is None:
            out = x.new_empty(rows, *x.shape[1:])
        work = self.run(what, lambda: collective(out, x.contiguous(), group=self.pg, async_op=not wait))
        return out if wait else work

    def wait(self, work, what):
        if work is not None:
            self.run(what, work.wait)

    def send(self, x, to, what):
        """Starts sending to the group's rank `to`; returns a function that waits until x has left."""
        work = self.run(what, lambda: dist.isend(x, self.ranks[to], self.pg))

        def arrived():
            self.run(what, work.wait)
            return x  # alive until then
        return arrived

    def recv(self, x, frm, what):
        self.run(what, lambda: dist.recv(x, self.ranks[frm], self.pg))
        return x

    def broadcast(self, x, frm=0, what='broadcast'):
        """In place: what the group's rank `frm` holds; returns x."""
        if self.size > 1:
            self.run(what, lambda: dist.broadcast(x, self.ranks[frm], self.pg))
        return x

    def least(self, n, device):
        """The smallest of the ranks' whole numbers."""
        return int(self.all_reduce(torch.tensor([n], device=device), 'least', dist.ReduceOp.MIN))

    def share_object(self, obj, frm, what):
        """A small Python object of the group's rank `frm`, on all of them."""
        box = [obj]
        if self.size > 1:
            self.run(what, lambda: dist.broadcast_object_list(box, self.ranks[frm], self.pg))
        return box[0]


def _move(o, device):
    """Tensors in (lists and tuples of) lists and tuples to a device."""
    if isinstance(o, torch.Tensor):
        return o.to(device)
    return type(o)(_move(x, device) for x in o) if type(o) in (list, tuple) else o


class Mesh:
    """Who this process is in the grid (dp, pp, cp, tp), and its groups. Made by `init`. Also: master, rank,
    world, dp (how many replicas), dp_rank, device."""
    AXES = ('dp', 'pp', 'cp', 'tp')

    def __init__(self, sizes, zero, device, dist_timeout=120, agent=None):
        self.device, self.agent = device, agent
        self.timeout = timedelta(seconds=dist_timeout)  # a new group would wait for half an hour
        self.grid = torch.arange(math.prod(sizes)).view(sizes)
        self.world = self.grid.numel()
        self.rank = dist.get_rank() if self.world > 1 else 0
        self.master, self.checkpoint, self.failed = self.rank == 0, 'none yet', False
        self.interrupt, self._made = Interrupt(), {}
        self.tp, self.cp = self.group('tp'), self.group('cp')
        self.data, self.copies = self.group('dp', 'cp'), self.group('dp')
        self.zero = zero if self.data.size > 1 else 0  # else there is nobody to share with
        self.pp, self.pp_back = self.group('pp'), self.group('pp', tag='back')  # a channel per direction
        self.inside, self.everyone = self.group('pp', 'tp'), self.group(*self.AXES)
        self.dp, self.dp_rank = self.copies.size, self.copies.rank
        if self.world > 1:
            atexit.register(self._leave)

    def group(self, *axes, tag='', split=None):
        """The group of this rank along `axes`; split (with one axis): runs of that many ranks along it."""
        rest = [i for i, axis in enumerate(self.AXES) if axis not in axes]
        along = [i for i, axis in enumerate(self.AXES) if axis in axes]
        rows = self.grid.permute(*rest, *along).flatten(len(rest))
        return self._of('x'.join(axes), rows.reshape(-1, split or rows.shape[-1]), (tag, split))

    def ends(self):
        """The first and the last stage, on which a tied embedding lives."""
        ranks = self.grid[:, ::max(1, self.pp.size - 1)].transpose(1, -1)
        return self._of('first and last stage', ranks.reshape(-1, ranks.shape[-1]))

    def _of(self, name, rows, tag=()):
        """This rank's of the groups `rows` (n, ranks), or one of itself; made at the first call."""
        key = name, tag
        if key not in self._made:
            self._made[key] = Group(name, mesh=self)
            for ranks in rows.tolist():  # new_group is a collective of ALL ranks: all walk through one list
                pg = dist.new_group(ranks, self.timeout) if len(ranks) > 1 else None
                if self.rank in ranks:
                    self._made[key] = Group(name, ranks, self.rank, pg, self)
        return self._made[key]

    # ---- whose share of the work

    def share_of(self, bins, lengths):
        """Of the bins (lists of row numbers, as `pack` makes them) into which EVERY rank has cut the same
        global batch, those of this replica: as many for each, the largest first, halved until their number
        divides. lengths: tokens of a row. With fewer rows than replicas each does them all (see
        `replicas_of`). bins [[0, 1, 2]], dp=2 -> [[0, 2]] on the first, [[1]] on the second."""
        if self.dp == 1 or self.replicas_of(sum(map(len, bins))) > 1:
            return bins

        def size(some):
            return sum(int(lengths[i]) for i in some)
        bins = list(bins)
        while len(bins) % self.dp:
            largest = max((some for some in bins if len(some) > 1), key=size)
            bins.remove(largest)
            bins += [largest[0::2], largest[1::2]]
        bins.sort(key=size, reverse=True)
        turn = 2 * self.dp  # forth and back, so that nobody always gets the largest
        return bins[self.dp_rank::turn] + bins[turn - 1 - self.dp_rank::turn]

    def replicas_of(self, rows):
        """How many replicas compute each of `rows` rows: 1, or all where there are fewer rows than
        replicas."""
        return self.dp if rows < self.dp else 1

    def slice_of(self, n, team=1):
        """The slice of n things (prompts to answer) that falls to this rank of all, or to its team: `team`
        neighbours that do the same (tp, for a sharded engine). n=5, world=2 -> slice(0, 2), slice(2, 5);
        team=2: slice(0, 5)."""
        teams, me = self.world // team, self.rank // team
        return slice(n * me // teams, n * (me + 1) // teams)

    def collect(self, mine, everyone=False, team=1):
        """The replicas' lists (everyone: those of all ranks, or of all teams) one behind the other, on every
        rank. For small things: they travel pickled, tensors by way of the CPU. Of the ranks of a replica the
        last pipeline stage speaks: it has the outputs. [1] and [2, 3] -> [1, 2, 3]."""
        if self.world == 1:
            return mine
        lists = self._all_objects(_move(mine, 'cpu'), 'exchange of results')
        speakers = self.grid.view(-1)[::team] if everyone else self.grid[:, -1, 0, 0]
        return [x for rank in speakers.tolist() for x in lists[rank]]

    def _all_objects(self, obj, what):
        found = [obj] * self.world
        if self.world > 1:
            self.everyone.run(what, lambda: dist.all_gather_object(found, obj))
        return found

    # ---- random numbers

    def split_seeds(self, seed):
        """From here on each rank of several draws its own numbers (dropout); seed + rank * 100003 as in
        lm-human-preferences."""
        if self.world > 1:
            torch.manual_seed(seed + 100003 * self.rank)

    def rng_state(self):
        """[random state of rank 0, of rank 1, ...] for a checkpoint. All ranks call it."""
        mine = dict(cpu=torch.get_rng_state())
        if self.device.type == 'cuda':
            mine['cuda'] = torch.cuda.get_rng_state(self.device)
        return self._all_objects(mine, 'random states')

    def set_rng_state(self, states):
        """Each rank goes on with its own numbers if as many ranks run as wrote them, all with the same ones
        if all had the same (no dropout); else from its own seed."""
        as_many = len(states) == self.world
        if as_many or all(torch.equal(s['cpu'], states[0]['cpu']) for s in states):
            state = states[self.rank if as_many else 0]
            torch.set_rng_state(state['cpu'])
            if self.device.type == 'cuda' and 'cuda' in state:
                torch.cuda.set_rng_state(state['cuda'], self.device)

    # ---- the run: what it says, how it ends

    def words(self):
        """'' for one process, else ' x 4 (dp 2, tp 2, zero 1)'."""
        axes = [f'{axis} {n}' for axis, n in zip(self.AXES, self.grid.shape) if n > 1]
        axes += [f'zero {self.zero}'] * bool(self.zero)
        return f' x {self.world} ({", ".join(axes)})' if self.world > 1 else ''

    def plan(self, model):
        """`plan` for this layout; the model is still whole."""
        return plan(model, self.tp.size, self.pp.size, self.cp.size, self.dp, self.zero)

    def place(self, rank):
        """'rank 5 (dp 2 pp 0 cp 0 tp 1)'"""
        at = (self.grid == rank).nonzero()[0].tolist()
        return f'rank {rank} ({" ".join(f"{a} {i}" for a, i in zip(self.AXES, at))})'

    def failure(self, group, what, seconds, error):
        """The exception for a collective that failed. Each rank that meets one says so in the store that all
        share: who of the group stays silent has died, or hangs."""
        self.failed, silent = True, group.ranks
        with contextlib.suppress(RuntimeError):  # the store's host may be gone
            store = dist.PrefixStore('failed', dist.distributed_c10d._get_default_store())
            store.set(str(self.rank), what)
            time.sleep(2)
            silent = [rank for rank in group.ranks if not store.check([str(rank)])]
        silent = ', '.join(map(self.place, silent)) or 'none of its ranks now'
        return Failure(f'parallel: {self.place(self.rank)} of {self.world}: {what} over {group.name} '
                       f'{group.ranks} failed after {seconds:.1f} s: no word from {silent}. '
                       f'[{str(error).splitlines()[0][:160]}] Last good checkpoint: {self.checkpoint}. '
                       f'The same command with --init_from=resume goes on from it.')

    def restarted(self, out_dir):
        """True when torchrun has started this very run again after a failure: what lies in out_dir is its
        own. The store of torchrun outlives its workers; see `mark`."""
        return self.agent is not None and self.agent.check([f'run {out_dir}'])

    def mark(self, out_dir):
        """From now on out_dir is this run's."""
        if self.agent is not None and self.master:
            self.agent.set(f'run {out_dir}', '')

    def saved(self, path, it):
        """What a failure names as the last good checkpoint."""
        self.checkpoint = f'{path} (iter {it})'

    def listen(self):
        """From now on the first Ctrl-C or SIGTERM is only noted; see `interrupted`. torchrun waits 30 s
        before it kills."""
        self.interrupt.listen()

    def interrupted(self):
        """The number of the signal that has come to any rank since `listen`, 0 for none. All ranks call it:
        they leave the loop at the same iteration."""
        came = torch.tensor([self.interrupt.number])
        return int(self.everyone.all_reduce(came, 'interrupts', dist.ReduceOp.MAX))

    def barrier(self):
        self.everyone.all_reduce(torch.zeros(1), 'barrier')

    def close(self):
        """At the end of the run, so that no rank leaves while another still talks to it."""
        self.interrupt.forget()
        if self.world > 1:
            self.barrier()
            self._leave(closing=True)

    def _leave(self, closing=False):
        """subtle: gloo's threads live as long as somebody holds a group, and one that still lets go of the
        last collective's tensor when Python ends can abort the process. After a failure leaving the groups
        would wait for the dead, so the process just goes; what it had to say is printed by then."""
        if self.failed:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        if dist.is_initialized() and (closing or self.device.type == 'cpu'):
            for group in self._made.values():
                group.pg = None
            dist.destroy_process_group()


def _world_size():
    said = os.environ.get('WORLD_SIZE') or '1'
    if not said.isdecimal() or said == '0':
        raise ValueError(f'WORLD_SIZE is {said!r} in the environment, expected the number of processes: '
                         f'unset it')
    missing = [name for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]
    if int(said) > 1 and missing:
        raise ValueError(f'WORLD_SIZE is {said} in the environment, but {", ".join(missing)} is not: start '
                         f'with torchrun --nproc_per_node={said}, or unset WORLD_SIZE to run one process')
    return int(said)


def _own_device(device, world):
    """'cpu', 'mps', 'cuda' or None -> this process's: rank i of a node takes GPU i."""
    kind = str(device or ('cuda' if torch.cuda.is_available() else 'cpu'))
    if world == 1 or not kind.startswith('cuda'):
        return torch.device(kind)
    local = int(os.environ.get('LOCAL_RANK', 0))
    if kind != 'cuda':
        raise ValueError(f'device {kind} with {world} processes: --device=cuda, each takes the GPU of its '
                         f'number')
    if local >= torch.cuda.device_count():
        raise ValueError(f'process {local} of this node has no GPU of its own, '
                         f'{torch.cuda.device_count()} are here: lower --nproc_per_node')
    torch.cuda.set_device(local)
    return torch.device('cuda', local)


def init(tp=1, pp=1, cp=1, zero=0, dist_timeout=120, device=None, seed=1337, quiet=False):
    """The mesh of this run: torchrun's processes if there are several (dp = world / (tp pp cp)), else this
    one alone.

    device: 'cpu', 'cuda', 'mps' or None (cuda where there is one; rank i of a node takes GPU i). zero 0-3:
    what the replicas share out: nothing, optimizer, + gradients, + weights. Seeds torch alike everywhere (see
    Mesh.split_seeds). A collective that waits longer than dist_timeout seconds ends the run. quiet: what
    ranks other than 0 print is dropped (errors are not). ValueError when the numbers do not fit the
    processes. torchrun --nproc_per_node=8 with tp=2 -> dp=4; rank 5 is (dp 2, pp 0, cp 0, tp 1)."""
    if min(tp, pp, cp) < 1 or zero not in range(4):
        raise ValueError(f'tp {tp}, pp {pp}, cp {cp}: expected 1 (off) or more; zero {zero}: expected 0 to 3')
    world = dist.get_world_size() if dist.is_initialized() else _world_size()
    part, agent = tp * pp * cp, None
    if world % part:
        raise ValueError(f'tp {tp} x pp {pp} x cp {cp} = {part} processes (or a multiple), but {world} run: '
                         f'torchrun --nproc_per_node={part} SCRIPT.py ...')
    device = _own_device(device, world)
    if world > 1 and not dist.is_initialized():
        timeout = timedelta(seconds=dist_timeout)
        store, rank, _ = next(dist.rendezvous('env://', timeout=timeout))
        attempt = os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)
        if 'TORCHELASTIC_RUN_ID' in os.environ:
            agent = getattr(store, 'underlying_store', store)
        store = dist.PrefixStore(f'attempt {attempt}', store)  # or a restart finds the addresses of the dead
        hook = sys.excepthook  # torch wraps it, and loses what a hook that ends the process has printed
        backend = 'cpu:gloo,cuda:nccl' if device.type == 'cuda' else 'gloo'  # small objects stay on the CPU
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
        sys.excepthook = hook
    torch.manual_seed(seed)
    mesh = Mesh((world // part, pp, cp, tp), zero, device, dist_timeout, agent)
    if quiet and not mesh.master:
        sys.stdout = open(os.devnull, 'w', encoding='utf-8')
    return mesh


ALONE = Mesh((1, 1, 1, 1), 0, torch.device('cpu'))  # for functions that somebody calls outside a run

# ----------------------------------------------------------------------------------------------------
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


# (n, ...) of each rank -> (size n, ...). Every rank then uses the rows differently: gradients are added up.
gather_rows = _mirror(Group.all_gather, Group.reduce_scatter)
# (size n, ...) partial sums -> (n, ...), this rank's rows of the whole sum
scatter_rows = _mirror(Group.reduce_scatter, Group.all_gather)
# as gather_rows, but every rank then does the SAME with the rows: each gradient is whole, take one's own rows
join_rows = _mirror(Group.all_gather, lambda group, g: g.chunk(group.size)[group.rank].contiguous())
# partial results -> their sum, with which every rank then does the same
sum_parts = _mirror(lambda group, x: group.all_reduce(x.clone(), 'sum of parts'), lambda group, g: g)

# ----------------------------------------------------------------------------------------------------
# tensor + sequence parallel: some heads, some MLP columns, some words; N / tp tokens between the blocks


class Row(nn.Module):
    """Linear over a slice of its inputs: partial sums of all N tokens -> this rank's rows of the sum; the
    bias is added once."""

    def __init__(self, linear, group):
        super().__init__()
        self.weight, self.bias, self.group = linear.weight, linear.bias, group

    def forward(self, x):
        y = scatter_rows(kernels.linear(x, self.weight, None), self.group)
        return y if self.bias is None else y + self.bias.to(y.dtype)


class VocabEmbedding(nn.Module):
    """Words lo .. lo + len(weight) of the table. A foreign word gives zeros; the sum over the ranks is the
    embedding."""

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
    """log p(target) and entropy where each rank has the logits of its own words only; (n, V / tp) exists a
    block at a time. Two all-reduces for all rows: the maximum, then [sum exp, sum exp * z, z of the target],
    each moved to that maximum."""
    @staticmethod
    def forward(ctx, x, weight, targets, lo, temperature, group):
        wide = torch.promote_types(x.dtype, torch.float32)
        rows = max(64, (1 << 23) // len(weight))  # 32 MiB of float32 logits
        mine = (targets >= lo) & (targets < lo + len(weight))
        word, found = torch.where(mine, targets - lo, 0), []
        for part, at, here in zip(x.split(rows), word.split(rows), mine.split(rows)):
            z = (part @ weight.t()).to(wide).div_(temperature)
            top = z.amax(1)
            e = (z - top[:, None]).exp_()
            found.append(torch.stack([top, e.sum(1), (e * z).sum(1), z.gather(1, at[:, None])[:, 0] * here]))
        top, sums = torch.cat(found, 1).split([1, 3])
        whole = group.all_reduce(top.clone(), 'maximum of logits', dist.ReduceOp.MAX)
        sums[:2] *= (top - whole).exp()
        total, weighted, chosen = group.all_reduce(sums, 'sums of logits')
        lse = whole[0] + total.log()
        logp, entropy = chosen - lse, lse - weighted / total
        ctx.save_for_backward(x, weight, word, mine, lse, entropy)
        ctx.rows, ctx.temperature = rows, temperature
        return logp, entropy

    @staticmethod
    def backward(ctx, g_logp, g_entropy):
        """dz = g_logp (1[target] - p) - g_entropy p (log p + H), this rank's words; dx is partial: the gather
        behind x sums it."""
        x, weight, word = ctx.saved_tensors[:3]
        mine, lse, entropy = ctx.saved_tensors[3:]
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


# ----------------------------------------------------------------------------------------------------
# context parallel: the tokens of one batch shared out; chunks r and 2 cp - 1 - r belong to rank r (zig-zag)


def zigzag(n, size, rank, device=None):
    """Rows of rank `rank` when n flat tokens (a multiple of 2 size) are shared out. n=8, size=2, rank=0 ->
    [0, 1, 6, 7]."""
    chunks = torch.arange(n, device=device).view(2 * size, -1)
    return torch.cat([chunks[rank], chunks[2 * size - 1 - rank]])


def _gathered_attend(group, pos, dropout, tile=1024):
    """Attention of this rank's rows against the keys of all ranks: one all-gather of K and V, backward one
    reduce-scatter. A segment (sequence or packed document) begins where pos is 0, so row i sees the keys
    i - pos[i] .. i; a tile is some neighbouring rows (a, b) and the keys from the first one's start."""
    n, device = len(pos), pos.device
    natural = torch.cat([zigzag(n, group.size, r, device) for r in range(group.size)]).argsort()
    start, tiles = torch.arange(n, device=device) - pos, []
    for half in zigzag(n, group.size, group.rank, device).chunk(2):
        for rows in half.split(tile):
            first, end = int(start[rows[0]]), int(rows[-1]) + 1
            key = torch.arange(first, end, device=device)
            tiles.append((slice(first, end), (key <= rows[:, None]) & (key >= start[rows, None])))

    def attend(layer, q, k, v):
        k, v = (gather_rows(t, group).index_select(0, natural).transpose(0, 1)[None] for t in (k, v))
        out, grouped = [], q.shape[1] != k.shape[1]
        for rows, (keys, mask) in zip(q.split([len(mask) for _, mask in tiles]), tiles):
            rows = rows.transpose(0, 1)[None]
            y = F.scaled_dot_product_attention(rows, k[:, :, keys], v[:, :, keys], attn_mask=mask,
                                               dropout_p=dropout, enable_gqa=grouped)
            out.append(y[0].transpose(0, 1))
        return torch.cat(out)
    return attend


# ----------------------------------------------------------------------------------------------------
# the parts: which piece of which full tensor a rank holds


@dataclasses.dataclass
class Part:
    """One Parameter of this rank: `ranges` along `dim` of the full tensor `name`, one after another (fused q,
    k, v have three). Of that, elements lo .. hi (flattened) are what this rank's optimizer updates: `weight`,
    the Parameter itself or a slice of its bucket; None where no optimizer trains it."""
    name: str
    param: nn.Parameter
    shape: tuple                # of the full tensor
    dim: int = 0
    ranges: tuple = ()          # () = the whole
    sums: tuple = ()            # groups over which the gradients of copies are partial sums
    owner: bool = True          # of several equal copies one counts: in the norm, in checkpoints
    weight: torch.Tensor = None
    lo: int = 0
    hi: int = 0
    start: int = 0              # where the Parameter begins in its bucket

    def take(self, full):
        if not self.ranges:
            return full
        return torch.cat([full.narrow(self.dim, a, b - a) for a, b in self.ranges], self.dim)

    def put(self, full, local):
        if not self.ranges:
            return full.copy_(local)
        for (a, b), piece in zip(self.ranges, local.split([b - a for a, b in self.ranges], self.dim)):
            full.narrow(self.dim, a, b - a).copy_(piece)


def _ranges(name, c, group):
    """(dim, ranges) of this tp rank's slice of a parameter, (0, ()) where all of the group hold the whole.
    With fewer kv heads than tp, tp / nkv ranks share one. nh=4, nkv=2, hs=8, tp=4, rank 1: q_proj rows 8..16,
    k_proj rows 0..8."""
    if group.size == 1:
        return 0, ()
    inner, words = group.share(c.n_inner), group.share(c.vocab_size)
    first, end = group.share(c.n_kv_head)
    kv = first * c.head_size, max(first + 1, end) * c.head_size
    lo, hi = (n * c.head_size for n in group.share(c.n_head))
    heads, wide = (lo, hi), c.n_head * c.head_size  # q, k and v lie one behind the other in c_attn
    fused = [(lo + at, hi + at) for at in (0, wide, 2 * wide)]
    cuts = {
        'wte': (0, words), 'lm_head': (0, words), 'attn.c_attn': (0, *fused), 'attn.q_proj': (0, heads),
        'attn.k_proj': (0, kv), 'attn.v_proj': (0, kv), 'mlp.c_fc': (0, inner), 'mlp.gate_proj': (0, inner),
        'mlp.up_proj': (0, inner), 'attn.o_proj': (1, heads), 'attn.c_proj': (1, heads),
        'mlp.down_proj': (1, inner), 'mlp.c_proj': (1, inner)}
    *path, kind = name.split('.')
    dim, *ranges = cuts.get('.'.join(path[-2:]), (0,))
    return (0, ()) if dim and kind == 'bias' else (dim, tuple(ranges))


def _check_fit(c, mesh, model):
    """ValueError, with the nearest that works, for a model that this mesh cannot cut."""
    tp, pp = mesh.tp.size, mesh.pp.size
    heads, kv = c.n_head, c.n_kv_head
    fits = [t for t in range(tp, 0, -1) if heads % t == 0 and (kv % t == 0 or t % kv == 0)]
    lora = any('lora_' in name for name, _ in model.named_parameters())
    refuse(fits[0] != tp, f'tp {tp} does not divide {heads} heads ({kv} key-value heads)', f'--tp={fits[0]}')
    refuse(c.n_inner % tp, f'tp {tp} does not divide the MLP width {c.n_inner}',
           f'--tp={math.gcd(tp, c.n_inner)}')
    refuse(lora and tp > 1, f'lora with tp {tp} is not supported', f'--tp=1 with --zero=2 or --pp={tp}')
    refuse(lora and mesh.zero == 3, 'lora with zero 3 is not supported (frozen weights stay whole)',
           '--zero=2')
    refuse(pp > 1 and c.dropout and model.training, f'pp {pp} with dropout {c.dropout} is not supported',
           '--dropout=0.0 (RL wants that anyway) or --pp=1')
    refuse(pp > c.n_layer, f'pp {pp} stages for {c.n_layer} layers: each needs one', f'--pp={c.n_layer}')


def refuse(wrong, what, nearest):
    if wrong:
        raise ValueError(f'{what}: the nearest that works is {nearest}')


STAGES = dict(sft='tp pp cp', reward='tp pp cp', dpo='tp pp', kto='tp pp', ppo='tp pp cp', grpo='tp pp')


def check_stage(stage, config):
    """ValueError, with the nearest that works, for what a stage cannot do on several processes, before
    anything is loaded. The rest, the axes of STAGES in all mixtures with zero 0 to 3, is what
    tests/test_torchrun.py runs."""
    cp, world = config['cp'], os.environ.get('WORLD_SIZE') or '1'
    refuse(cp > 1 and 'cp' not in STAGES[stage],
           f'cp {cp} is not supported by {stage}.py, where answers share the tokens of their prompt',
           f'--cp=1 with --tp={cp}, or a smaller micro_tokens')
    refuse(config.get('rollout_tp') and config['tp'] == 1,
           'rollout_tp without tensor parallelism: there is nothing to shard',
           '--rollout_tp=False, or --tp=2 and more')
    refuse(config.get('rollout_tp') and config.get('mode') == 'async',
           "rollout_tp with mode 'async': each rollout worker holds the whole model", '--rollout_tp=False')
    refuse(config['compile'] and world != '1', f'compile with {world} processes is not supported',
           '--compile=False')


# ----------------------------------------------------------------------------------------------------
# pipeline parallel: what stands in for the modules that another stage has


class _Handoff(Exception):
    """Carries a stage's activations, its argument, out of the loss function, which goes no further than
    model.hidden on this rank."""


class _Receive(nn.Module):
    """Instead of the embedding on later stages: what the previous stage sent, (N / (cp tp), C)."""

    def __init__(self, mesh, width, dtype):
        super().__init__()
        self.mesh, self.width, self.dtype = mesh, width, dtype
        self.x = None

    def forward(self, idx):
        if self.x is not None:
            raise ValueError('the loss function called the model twice on one micro-batch; with pp > 1 once '
                             'is all: call forward_backward twice')
        x = torch.empty(len(idx) // self.mesh.tp.size, self.width, dtype=self.dtype, device=idx.device)
        self.mesh.pp.recv(x, self.mesh.pp.rank - 1, 'activations')
        self.x = x.requires_grad_(torch.is_grad_enabled())
        return self.x


class _Send(nn.Module):
    """Instead of the last norm on earlier stages."""

    def forward(self, delta, x):
        raise _Handoff(x + delta)


# ----------------------------------------------------------------------------------------------------
# a GPT cut along all axes


class Head(nn.Module):
    """The output layer with this rank's words: a module, so that ZeRO-3 can fetch its weight round the
    call."""

    def __init__(self, body, mesh):
        super().__init__()
        self.body, self.tp = [body], mesh.tp  # in a list: the body's parameters are not ours
        self.lo, _ = mesh.tp.share(body.config.vocab_size)

    def forward(self, x, targets=None, temperature=1.0):
        """Values (n,), logits (n, V), or with targets (log p, entropy), each (n,)."""
        body = self.body[0]
        if body.head == 'scalar':
            return body.values(x)
        if targets is None:
            z = kernels.linear(x, body.lm_head.weight, None)
            return z if self.tp.size == 1 else gather_words(z, body.config.vocab_size, self.tp)
        x, weight = body.head_weight(x)
        if self.tp.size == 1:
            return kernels.linear_logprobs(x, weight, targets, temperature)
        return _VocabLogprobs.apply(x, weight, targets, self.lo, temperature, self.tp)


def cut(body, tp):
    """Tensor parallelism, in place: slices every parameter of a GPT that has ranges, then puts the
    communication around it."""
    c, tied, body.tp = body.config, body.config.tie and body.head == 'lm', tp
    for name, p in list(body.named_parameters()):  # a tied head once, as the embedding
        dim, ranges = _ranges(name, c, tp)
        if ranges:
            module, _, leaf = name.rpartition('.')
            local = Part(name, p, tuple(p.shape), dim, ranges).take(p.detach()).clone()
            setattr(body.get_submodule(module), leaf, nn.Parameter(local, p.requires_grad))

    def gather(module, args):
        return gather_rows(args[0], tp), *args[1:]
    for block in body.h:
        attn, mlp = block.attn, block.mlp
        attn.n_head, attn.n_kv_head = attn.n_head // tp.size, max(1, attn.n_kv_head // tp.size)
        attn.register_forward_pre_hook(gather)
        mlp.register_forward_pre_hook(gather)
        for module, name in ((attn, 'c_proj'), (attn, 'o_proj'), (mlp, 'c_proj'), (mlp, 'down_proj')):
            if hasattr(module, name):
                setattr(module, name, Row(getattr(module, name), tp))
    lo, _ = tp.share(c.vocab_size)
    body.wte = VocabEmbedding(body.wte.weight, lo, tp)
    if tied:
        body.lm_head.weight = body.wte.weight
    if body.wpe is not None:
        body.wpe = RowsEmbedding(body.wpe.weight, tp)


def gather_words(z, V, tp):
    """Logits of this rank's words (n, V / tp) -> (n, V), on every rank; with a gradient."""
    counts = [V * (t + 1) // tp.size - V * t // tp.size for t in range(tp.size)]
    z = join_rows(F.pad(z.t(), (0, 0, 0, max(counts) - z.shape[1])), tp)
    return torch.cat([p[:n] for p, n in zip(z.chunk(tp.size), counts)]).t()


def _check_alike(model, mesh):
    """All ranks must start from the same weights: a different seed or file is found here, not in the loss
    curve."""
    sums = torch.stack([p.detach().double().sum().cpu() for p in model.parameters()])
    extremes = torch.stack([sums, -sums]).float()  # one maximum finds the largest, and minus the smallest
    mesh.everyone.all_reduce(extremes, 'check of the weights', dist.ReduceOp.MAX)
    for (name, _), high, low in zip(model.named_parameters(), *extremes):
        if high != -low:
            raise ValueError(f'the ranks hold different weights ({name}): same seed, same checkpoint on '
                             f'each?')


class Sharded(nn.Module):
    """This rank's part of a GPT behind the GPT's own calls: forward and logprobs are the GPT's, with an
    `encode` and heads that know of the other ranks. Made by `shard`.

    The body is the GPT itself, cut in place: smaller Linears, a hook that gathers the tokens before attention
    and MLP, Row instead of the projections back, and on pipeline stages Receive and Send instead of embedding
    and last norm."""

    def __init__(self, model, mesh):
        super().__init__()
        c, tp, pp = model.config, mesh.tp, mesh.pp
        _check_fit(c, mesh, model)
        _check_alike(model, mesh)
        self.config, self.head, self.layout = c, model.head, model.layout
        self.mesh, self.body, self.cp = mesh, model, mesh.cp.size
        self.running = False
        # of the whole model, in the same order on every rank
        self.full = {n: (tuple(p.shape), p.dtype, p.requires_grad) for n, p in model.named_parameters()}
        lo, hi = pp.share(c.n_layer)  # this stage's layers
        self.last = pp.rank == pp.size - 1
        self.tied = c.tie and model.head == 'lm'
        self.ends = mesh.ends()
        kv = mesh.group('tp', split=max(1, tp.size // c.n_kv_head))  # ranks that hold the same kv head
        if tp.size > 1:
            cut(model, tp)
        if pp.size > 1:
            self._stage(lo, hi)
        self.parts = [self._part(n, p, lo, kv) for n, p in model.named_parameters()]
        self.out = Head(model, mesh) if self.last else None
        modules = [m for m in (model.wte, model.wpe, *model.h, model.ln_f) if m is not None]
        self.units = [(m, list(m.parameters())) for m in modules]  # what ZeRO-3 fetches at once
        if self.last:
            head = model.lm_head if model.head == 'lm' else model.score
            self.units.append((self.out, [head.weight]))
        self.train(model.training)

    def _stage(self, lo, hi):
        """Keeps layers lo .. hi. A tied head on the last stage is a copy of the embedding; their gradients
        are added."""
        body, like = self.body, self.body.wte.weight
        body.h = nn.ModuleList(list(body.h)[lo:hi])
        if self.last and self.tied:
            body.lm_head.weight = nn.Parameter(like.detach().clone(), like.requires_grad)
        if self.mesh.pp.rank:
            body.wte = _Receive(self.mesh, self.config.n_embd, like.dtype)
            body.wpe = None
        if not self.last:
            body.ln_f, body.lm_head, body.score = _Send(), None, None

    def _part(self, name, p, lo, kv):
        tp, tied_copy = self.mesh.tp, name == 'lm_head.weight' and self.tied
        if name.startswith('h.'):
            _, i, rest = name.split('.', 2)
            name = f'h.{int(i) + lo}.{rest}'
        name = 'wte.weight' if tied_copy else name
        shape = self.full[name][0]
        dim, ranges = _ranges(name, self.config, tp)
        shared = kv.size > 1 and ('k_proj' in name or 'v_proj' in name)
        partial = {tp: not ranges and not name.startswith('score'), kv: shared,
                   self.ends: name == 'wte.weight' and self.tied}
        sums = tuple(group for group, yes in partial.items() if yes and group.size > 1)
        owner = not tied_copy and (tp.rank == 0 or bool(ranges)) and (not shared or kv.rank == 0)
        return Part(name, p, shape, dim, ranges, sums, owner)

    def state_dict(self):
        """The whole model's, on rank 0 (see full_state): what a plain GPT would save. All ranks call it."""
        return full_state(self, only_master=True)

    # ---- forward ---------------------------------------------------------------------------------

    def encode(self, idx, mask=None, doc=None):
        """As GPT.encode, with this rank's tokens only: tp ranks have the same ones, cp ranks their zig-zag
        share, for which Layout's pick and put then stand. On earlier pipeline stages _Handoff leaves from
        here."""
        if self.cp == 1:
            return type(self.body).encode(self, idx, mask, doc)
        at, group = self.layout(idx, mask, doc), self.mesh.cp
        n = len(at.pos)
        rest = -n % (2 * self.cp * self.mesh.tp.size)
        ids, pos = (F.pad(t, (0, rest)) for t in (at.pick(idx), at.pos))  # dummies: segments of one token
        own = zigzag(n + rest, self.cp, group.rank, idx.device)
        x = self._rows(ids[own], pos[own], _gathered_attend(group, pos, at.dropout))
        real = own < n
        at.keep = own[real] if at.keep is None else at.keep[own[real]]
        return x[real], at

    def hidden(self, ids, pos, attend):
        """As GPT.hidden, for whoever lays its tokens out itself: all N rows on every tp rank."""
        n, rest = len(ids), -len(ids) % self.mesh.tp.size
        if self.cp > 1:
            raise ValueError(f'cp {self.cp}: answers that share their prompt cannot be cut along '
                             f'the context: take --cp=1 with --tp, or a smaller micro_tokens')

        def padded(layer, q, k, v):
            return F.pad(attend(layer, q[:n], k[:n], v[:n]), (0, 0, 0, 0, 0, rest))
        return self._rows(F.pad(ids, (0, rest)), F.pad(pos, (0, rest)), padded)[:n]

    def _rows(self, ids, pos, attend):
        if self.mesh.pp.size > 1 and not self.running:
            raise RuntimeError('with pp > 1 call the model inside parallel.forward_backward or '
                               'parallel.evaluate')
        x = self.body.hidden(ids, pos, attend)
        if self.mesh.tp.size == 1:
            return x
        # a scalar head does the same work on every rank, an LM head its own words
        return (join_rows if self.head == 'scalar' else gather_rows)(x, self.mesh.tp)

    def values(self, x):
        """As GPT.values."""
        return self.out(x)

    logits = values

    def token_logprobs(self, x, targets, temperature=1.0):
        """As GPT.token_logprobs."""
        return self.out(x, targets, temperature)

    def loss(self, x, at, targets):
        """As GPT.loss: of all tokens, though x holds this rank's; `forward` adds them up."""
        own = at.pick(targets)
        counted = own >= 0
        logp, _ = self.out(x[counted], own[counted])  # called even for no token: ZeRO-3 fetches inside
        total = self.mesh.cp.all_reduce(counted.sum(), 'counted tokens')
        return -logp.sum() / max(1, int(total))

    def forward(self, idx, targets=None, mask=None, doc=None):
        """As GPT.forward, the same on every rank of the last stage."""
        return self._whole(type(self.body).forward(self, idx, targets, mask, doc))

    def logprobs(self, *args, entropy=False, **rest):
        """As GPT.logprobs."""
        found = self._whole(type(self.body).logprobs(self, *args, entropy=True, **rest))
        return found if entropy else found[0]

    def _whole(self, found):
        """What each cp rank has of its tokens (0 elsewhere) -> what all have."""
        if self.cp == 1:
            return found
        return tuple(None if x is None else sum_parts(x, self.mesh.cp) for x in found)


def shard(model, mesh):
    """This rank's part of a GPT: the GPT itself in a world of one, else a Sharded with the same calls. The
    model is cut in place. ValueError for what does not fit, with the nearest that does."""
    return model if mesh.world == 1 else Sharded(model, mesh)


def sampler_of(model, mesh, dtype=torch.float32, shard=False):
    """What a rollout engine on this rank reads, to be asked for BEFORE `shard`. shard=False: the plain GPT.
    shard=True: this rank's tensor-parallel part of all layers; the ranks of a tp group then run one engine in
    step, each with its heads' keys and values (see infer.Forward). In both cases the trained model itself
    where that holds it in this dtype (pp = 1, below ZeRO-3; the plain GPT also wants tp = 1), so that no
    weight lies in memory twice; else a copy that `refresh` fills."""
    _check_fit(model.config, mesh, model)
    whole = mesh.pp.size == 1 and mesh.zero < 3 and (shard or mesh.tp.size == 1)
    if whole and dtype == torch.float32:
        return model
    sampler = copy.deepcopy(model).to(dtype).requires_grad_(False)
    if shard:
        cut(sampler, mesh.tp)
    return sampler


@torch.no_grad()
def refresh(engine, model):
    """A rollout engine takes over the model's weights: in place where what it reads is the model itself (see
    sampler_of), else by a copy."""
    body = engine.model
    if body is getattr(model, 'body', model):
        engine.weights_changed()
    elif engine.tp.size == 1:
        engine.load_weights(full_state(model))
    else:
        own = dict(body.named_parameters())
        for name, full in _full_tensors(model):  # one full tensor at a time: no rank ever holds them all
            place = _ranges(name, body.config, engine.tp)
            own[name].copy_(Part(name, own[name], full.shape, *place).take(full))
        engine.weights_changed()


@torch.no_grad()
def set_weight(model, name, value):
    """Puts the full tensor `value` into parameter `name`, whatever the layout. All ranks call it with the
    same one."""
    for part in _parts(model):
        if part.name == name:
            local = part.take(value).to(part.param)
            if part.param.untyped_storage().nbytes():  # freed by ZeRO-3: only the pieces are there
                part.param.copy_(local)
            if part.weight is not None:
                part.weight.view(-1).copy_(local.reshape(-1)[part.lo:part.hi])


def _parts(model):
    """The parts of a Sharded; of a plain GPT the parameters, whole, noted on it at the first call."""
    if not isinstance(model, Sharded):
        params = list(model.named_parameters())
        if [id(p.param) for p in getattr(model, 'parts', ())] != [id(p) for _, p in params]:
            model.parts = [Part(n, p, tuple(p.shape)) for n, p in params]
    return model.parts


# ----------------------------------------------------------------------------------------------------
# data parallel: a flat bucket a layer; ZeRO decides what of it a rank keeps


class Bucket:
    """One layer's parameters end to end in one flat tensor `full`, of which the Parameters are views. This
    rank is in charge of `local`: everything (zero 0) or 1 / n. Gradients collect in a float32 buffer and are
    reduced when the layer's last one is in.

        zero   weights kept   gradients kept              optimizer kept   sent per step (params, each way)
        0      all            all                         all              all-reduce 2
        1      all            all until reduced           1/n              reduce-scatter 1 + all-gather 1
        2      all            1/n (+ a layer in flight)   1/n              as 1, a scatter each micro-batch
        3      1/n (+ 2)      1/n (+ a layer in flight)   1/n              as 2, + 2 gathers each micro-batch
    """

    def __init__(self, parts, mesh):
        self.parts, self.group, self.zero = parts, mesh.data, mesh.zero
        p, total = parts[0].param, 0
        for part in parts:
            part.start = total
            total += part.param.numel()
        total = -(-total // self.group.size) * self.group.size
        self.full = torch.zeros(total, dtype=p.dtype, device=p.device)
        for part in parts:
            view = self.full[part.start:part.start + part.param.numel()].view(part.param.shape)
            part.param.data = view.copy_(part.param.data)
        size = total // self.group.size if self.zero else total
        self.lo = size * self.group.rank if self.zero else 0
        self.local = self.full[self.lo:self.lo + size]
        if self.zero == 3:
            self.local = self.local.clone()
        for part in parts:
            part.lo = max(0, self.lo - part.start)
            end = min(part.param.numel(), self.lo + size - part.start)
            part.hi = max(part.lo, end)  # lo: nothing of it is ours
            part.weight = self.of(part, self.local)
        self.grad = self.shard_grad = self.incoming = self.work = self.fetching = None
        self.pending, self.held, self.in_backward = 0, True, False
        self.release()

    def of(self, part, local):
        """What belongs to part.weight in the bucket's share."""
        at = part.start - self.lo
        return local[at + part.lo:at + part.hi]

    # zero 3: the weights come and go; the views stay valid because the storage object stays the same
    def gather(self, wait=True):
        if not self.held:
            self.full.untyped_storage().resize_(self.full.nbytes)
            self.fetching = self.group.all_gather(self.local, 'weights', out=self.full, wait=False)
            self.held = True
        if wait:
            self.group.wait(self.fetching, 'weights')
            self.fetching = None

    def release(self):
        if self.zero == 3 and self.held:
            self.gather()  # never free what is still arriving
            self.full.untyped_storage().resize_(0)
            self.held = False

    def buffer(self):
        """The gradient of the whole layer, zeros at first."""
        if self.grad is None:
            self.grad = self.full.new_zeros(len(self.full))
        return self.grad

    def collect(self, part):
        """A parameter's gradient has just been completed by this backward: into the buffer with it."""
        grad = part.param.grad.reshape(-1)
        self.buffer()[part.start:part.start + len(grad)].add_(grad)
        part.param.grad = None

    def reduce(self):
        """Starts the sum over the replicas."""
        grad = self.buffer()
        if not self.zero or grad.device.type == 'cpu':  # gloo would scatter by summing a copy of the whole
            self.work = self.group.all_reduce(grad, 'gradients', wait=False)
        else:
            self.incoming = torch.empty_like(self.local)
            self.work = self.group.reduce_scatter(grad, 'gradients', out=self.incoming, wait=False)

    def reduced(self):
        """Ends it: shard_grad holds the sum, over all micro-batches so far."""
        self.group.wait(self.work, 'gradients')
        if not self.zero:
            self.shard_grad = self.grad
            return
        if self.incoming is None:
            self.incoming = self.grad[self.lo:self.lo + len(self.local)].clone()
        self.shard_grad = self.incoming if self.shard_grad is None else self.shard_grad.add_(self.incoming)
        self.grad = self.incoming = None


class Optimizer:
    """AdamW (matrices decayed, vectors not) over whatever this rank is in charge of.

    One process: torch's AdamW on the parameters, nothing else. Several: one Bucket a layer; reductions start
    during the backward, in the same order on every rank; the norm counts every element of the model once.
    Weights are float32 (or float64), whatever dtype the products have.

    scale: loss scaling for a forward in float16, whose gradients would vanish below 6e-8 (1710.03740): the
    loss is multiplied by it before the backward and the gradients divided after. As torch's GradScaler: a
    gradient that overflows halves it, and that step is skipped; 2,000 good steps in a row double it. 0 =
    off."""

    def __init__(self, model, mesh, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, scale=0.0):
        self.model, self.mesh = model, mesh
        self.scale, self.good = scale, 0
        self.parts = [part for part in _parts(model) if part.param.requires_grad]
        if any(part.param.dtype.itemsize < 4 for part in self.parts):
            raise ValueError('weights are trained in float32: model.float(), and autocast for the products')
        self.flat = mesh.world > 1
        self.buckets, self.fetches = [], []
        if self.flat:
            self._fill()
        else:
            for part in self.parts:
                part.weight, part.hi = part.param, part.param.numel()
        self.pieces = [part for part in self.parts if part.lo < part.hi]
        matrices = [p.weight for p in self.pieces if p.param.dim() >= 2]
        vectors = [p.weight for p in self.pieces if p.param.dim() < 2]
        groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=vectors, weight_decay=0.0)]
        self.adam = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.sync, self.next, self.running = True, 0, deque()

    def _fill(self):
        """A bucket a layer, in the order in which a backward finishes them."""
        part_of, bucket_of = {part.param: part for part in self.parts}, {}
        for module, params in self.model.units:
            params = [p for p in params if p.requires_grad]
            new = [p for p in params if p not in bucket_of]  # not a tied head
            if new:
                bucket = Bucket([part_of[p] for p in new], self.mesh)
                self.buckets.insert(0, bucket)
                bucket_of |= dict.fromkeys(new, bucket)
            for b in dict.fromkeys(bucket_of[p] for p in params):
                if b.zero == 3:
                    j = len(self.fetches)
                    self.fetches.append(b)
                    module.register_forward_pre_hook(lambda m, args, j=j: self._fetch(j, 1))
                    module.register_forward_hook(lambda m, args, out, j=j: self._used(j, out))
        for b in self.buckets:
            for p in b.parts:
                p.param.register_post_accumulate_grad_hook(lambda _, b=b, p=p: self._arrived(b, p))

    # ---- ZeRO-3: fetch a layer, start fetching the next, free it after use; the same backwards
    def _fetch(self, j, step):
        self.fetches[j].gather()
        if 0 <= j + step < len(self.fetches):
            self.fetches[j + step].gather(wait=False)

    def _used(self, j, out):
        for t in out if isinstance(out, tuple) else [out]:
            if t.requires_grad:
                t.register_hook(lambda g: self._again(j))
        if not self.fetches[j].in_backward:  # else: recomputed inside a backward (activation checkpointing)
            self.fetches[j].release()

    def _again(self, j):
        self.fetches[j].in_backward = True
        self._fetch(j, -1)

    # ---- around a backward
    def backward(self, out, gradient=None, last=True):
        """loss.backward(); last: of this step, so zero 0 and 1 reduce now."""
        self.sync, self.next = last or self.mesh.zero >= 2, 0
        for b in self.buckets:
            b.pending = len(b.parts)
        torch.autograd.backward(out * self.scale if self.scale and gradient is None else out, gradient)
        while self.sync and self.next < len(self.buckets):  # what had no gradient is reduced too
            self._launch()
        while self.running:
            self.running.popleft().reduced()
        for b in self.buckets:
            b.in_backward = False
            b.release()

    def _arrived(self, b, part):
        b.collect(part)
        b.pending -= 1
        if not b.pending:
            b.in_backward = False
            b.release()
            while self.sync and self.next < len(self.buckets) and not self.buckets[self.next].pending:
                self._launch()

    def _launch(self):
        """The next bucket in the fixed order: collectives must not depend on which gradient came first."""
        b = self.buckets[self.next]
        self.next += 1
        b.reduce()
        self.running.append(b)
        if len(self.running) > 2:
            self.running.popleft().reduced()

    # ---- the step: its parts, which clip_and_step puts together
    def gradients(self):
        """Those that there are, unscaled, where AdamW looks for them."""
        for b in self.buckets:
            for p in b.parts:
                p.weight.grad = b.of(p, b.shard_grad)
        grads = [p.weight.grad for p in self.pieces if p.weight.grad is not None]
        if self.scale and grads:
            torch._foreach_div_(grads, self.scale)
        return grads

    def square(self):
        """Adds the partial gradients of copies -> the sum of squares over all axes, every element once."""
        mesh = self.mesh
        for group in dict.fromkeys(g for p in self.pieces for g in p.sums):
            grads = [p.weight.grad for p in self.pieces if group in p.sums]
            whole = group.all_reduce(torch.cat(grads), 'gradients of copies')
            for g, s in zip(grads, whole.split([len(g) for g in grads])):
                g.copy_(s)
        owned = [p.weight.grad for p in self.pieces if p.owner and p.weight.grad is not None]
        found = torch.zeros((), dtype=torch.float64)
        if owned:
            found = torch.stack(torch._foreach_norm(owned)).cpu().double().square().sum()
        group = mesh.everyone if mesh.zero else mesh.inside
        return float(group.all_reduce(found, 'gradient norm'))

    def rescale(self, finite):
        """After a step that was done, or skipped because of this network's gradients."""
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.scale /= 2
            print(f'the gradients overflowed in float16: step skipped, loss scale {self.scale:g}')
        elif self.scale and self.good == 2000:
            self.scale, self.good = self.scale * 2, 0

    def update(self, lr):
        for group in self.adam.param_groups:
            group['lr'] = lr
        self.adam.step()
        self.drop()
        for b in self.buckets:
            if b.zero in (1, 2):
                b.group.all_gather(b.local.clone(), 'weights', out=b.full)

    def drop(self):
        for p in self.parts:
            p.weight.grad = None
        for b in self.buckets:
            b.grad = b.shard_grad = None

    # ---- state, layout-free: {'step': n, 'exp_avg': {name: full tensor}, ...}
    def state_dict(self):
        """All ranks call it; rank 0 gets the full tensors on the CPU, the others empty dicts. The same
        whatever the layout."""
        state = dict(step=self.mesh.everyone.share_object(self.steps(), 0, 'steps'))
        for kind in ('exp_avg', 'exp_avg_sq'):
            whole = _full_tensors(self.model, lambda part, kind=kind: self.read(part, kind))
            state[kind] = {name: full.cpu() for name, full in whole if self.mesh.master}
        if self.scale:
            state['scale'] = [self.scale, self.good]
        return state

    def read(self, part, kind):
        """The moments that belong to part.weight, flat; zeros before the first step."""
        state = self.adam.state.get(part.weight) or {kind: torch.zeros_like(part.weight)}
        return state[kind].view(-1)

    def steps(self):
        state = next(iter(self.adam.state.values()), {'step': 0})
        return int(state['step'])

    @torch.no_grad()
    def load_state_dict(self, saved):
        """Takes its pieces out of a layout-free state."""
        if not isinstance(saved, dict) or not {'step', 'exp_avg', 'exp_avg_sq'} <= saved.keys():
            raise ValueError('checkpoint: no optimizer state by name in it (ckpt_best.pt has none, older '
                             'versions kept it by number): start a new run from it with --init_from=FILE')
        if self.scale and 'scale' in saved:
            self.scale, self.good = saved['scale']
        for p in self.pieces:
            step = torch.tensor(float(saved['step']), device=p.weight.device)
            state = dict(step=step)
            for kind in ('exp_avg', 'exp_avg_sq'):
                if p.name not in saved[kind]:
                    raise ValueError(f'checkpoint: no optimizer state for {p.name}: another lora_r?')
                flat = p.take(saved[kind][p.name]).reshape(-1)[p.lo:p.hi]
                state[kind] = flat.to(p.weight).view(p.weight.shape).clone()
            if step:
                self.adam.state[p.weight] = state


@torch.no_grad()
def clip_and_step(optimizers, lrs, grad_clip=0.0):
    """One update of one network or several (policy and value), clipped by ONE global norm over all of them;
    returns that norm before clipping (float). grad_clip 0 = off. A norm that is not finite raises ValueError
    and leaves the weights as they were; with loss scaling the step is skipped instead, and the norm returned
    is 0. g = (3, 4), clip 1 -> returns 5, g becomes (0.6, 0.8)."""
    grads = [g for o in optimizers for g in o.gradients()]
    scaled = any(o.scale for o in optimizers)
    if scaled or optimizers[0].flat:
        squares = [o.square() for o in optimizers]
        norm = math.sqrt(sum(squares))
        if 0 < grad_clip < norm < math.inf and grads:
            torch._foreach_mul_(grads, min(1.0, grad_clip / (norm + 1e-6)))
    else:
        params = [p.weight for o in optimizers for p in o.pieces]
        norm = torch.nn.utils.clip_grad_norm_(params, grad_clip or math.inf).item()
    finite = math.isfinite(norm)
    for i, (o, lr) in enumerate(zip(optimizers, lrs)):
        if finite:
            o.update(lr)
        else:
            o.drop()
        if scaled:
            o.rescale(finite or math.isfinite(squares[i]))
    if not finite and not scaled:
        raise ValueError(f'step {optimizers[0].steps()}: the gradient norm is {norm}: weights left as they '
                         f'were; the last good checkpoint is {optimizers[0].mesh.checkpoint}: resume from '
                         f'it with a lower learning_rate or a smaller grad_clip')
    return norm if finite else 0.0


# ----------------------------------------------------------------------------------------------------
# one optimizer step's worth of micro-batches


def all_forward_all_backward(stage, m):
    """GPipe's schedule (1811.06965), the simplest: activations of all m micro-batches are kept."""
    for i in range(m):
        stage.forward(i)
    for i in range(m):
        stage.backward(i)


def one_forward_one_backward(stage, m):
    """1F1B (PipeDream-flush): at most pp - stage micro-batches are in flight, so activations do not grow with
    their number.

        stage 0   F0 F1 F2 .. B0 F3 B1 F4 B2 .. B3 B4        pp = 3, m = 5; a stage is idle for 2 of 7 slots
        stage 1      F0 F1 B0 F2 B1 F3 B2 F4 B3 .. B4
        stage 2         F0 B0 F1 B1 F2 B2 F3 B3 F4 B4
    """
    warm = min(stage.later, m)
    for i in range(warm):               # 1. warm-up: fill the pipe
        stage.forward(i)
    for i in range(m - warm):           # 2. steady: one forward, one backward
        stage.forward(warm + i)
        stage.backward(i)
    for i in range(m - warm, m):        # 3. cool-down: empty it
        stage.backward(i)


def forward_backward(model, optimizer, micros, loss_of, weights=None, summed=False,
                     schedule=one_forward_one_backward):
    """Forward and backward of all micro-batches of this replica (loss.backward() on each); then
    clip_and_step. Returns {'loss': ..., stats ...} as floats over all micro-batches of all replicas, the same
    on every rank (a name that ends in _max: the largest); with pp also 'bubble', the share of the time that
    this rank waited for another stage, beside the schedule's own 'bubble_ideal' = (pp - 1) / (m + pp - 1).

    loss_of(model, micro) -> (loss, {name: number}): means over the micro-batch, and weights: how much each
    one counts (its tokens); or with summed=True its share of the whole batch's loss and statistics, which are
    only added up (see mesh.replicas_of). schedule: of a pipeline, one_forward_one_backward. ValueError when
    the replicas hold unequal numbers of micro-batches or nothing counts. Two replicas, losses 1.0 and 4.0
    with weights 3 and 1 -> loss 1.75, gradient 3/4 g_1 + 1/4 g_2; summed: 5.0, g_1 + g_2."""
    mesh = optimizer.mesh
    weights = [float(w) for w in weights or [1] * len(micros)]
    total = sum(weights)
    if mesh.dp > 1:
        mine = torch.tensor([[total, len(micros)]], dtype=torch.float64)
        totals, counts = mesh.copies.all_gather(mine, 'weights of the batch').unbind(1)
        total = float(totals.sum())
        if counts.min() < counts.max():
            raise ValueError(f'the replicas hold {counts.int().tolist()} micro-batches: each needs as many '
                             f'as the others')
    if not total > 0:
        raise ValueError(f'nothing to learn from in this batch: the weights of its {len(micros)} '
                         f'micro-batches add up to {total}')
    scales = [1.0 if summed else w / total for w in weights]
    start, waited = time.perf_counter(), mesh.pp.waited + mesh.pp_back.waited
    stage = Stage(model, optimizer, micros, loss_of, scales)
    schedule(stage, len(micros))
    stage.finish()
    metrics = _metrics(mesh, stage.results, scales)
    if optimizer.scale and mesh.pp.size == 1:
        for micro, result in zip(micros, stage.results):
            if not math.isfinite(result['loss']):
                raise ValueError(_overflow(model, micro, loss_of))
    if mesh.pp.size > 1:
        metrics['bubble'] = (mesh.pp.waited + mesh.pp_back.waited - waited) / (time.perf_counter() - start)
        metrics['bubble_ideal'] = (mesh.pp.size - 1) / (len(micros) + mesh.pp.size - 1)
    return metrics


@torch.no_grad()
def _overflow(model, micro, loss_of):
    """Which layer's output is not finite in float16 (largest number 65,504): loss scaling cannot help
    there."""
    names, seen = {m: name for name, m in model.named_modules()}, []

    def look(module, args, out):  # a layer comes before the block that it is part of
        found = out if isinstance(out, tuple) else [out]
        if not all(bool(t.isfinite().all()) for t in found):
            seen.append(names.get(module))
    hook = nn.modules.module.register_module_forward_hook(look)
    loss_of(model, micro)
    hook.remove()
    where = (seen or ['the loss'])[0]
    return f'the output of {where} is not finite in float16: set --dtype=float32, or bfloat16'


def _metrics(mesh, results, scales):
    """One dict of floats out of what the micro-batches have found on the last stage: the loss is a share of
    the whole already, means become one. A float() waits for the GPU, so it comes here, behind them all."""
    found = []
    for result, scale in zip(results, scales):
        numbers = {}
        for name, x in result.items():
            x = float(x.detach() if isinstance(x, torch.Tensor) else x)
            numbers[name] = x if name == 'loss' or name.endswith('_max') else x * scale
        found.append(numbers)
    found = mesh.pp.share_object(found, mesh.pp.size - 1, 'metrics')
    if any(numbers.keys() != found[0].keys() for numbers in found):
        raise ValueError(f'the loss function must return the same statistics for every micro-batch, got '
                         f'{[sorted(numbers) for numbers in found]}')
    metrics = {}
    for name in found[0]:
        values = [numbers[name] for numbers in found]
        metrics[name] = max(values) if name.endswith('_max') else sum(values)
    if mesh.dp > 1:
        row = torch.tensor([list(metrics.values())], dtype=torch.float64)
        for name, column in zip(metrics, mesh.copies.all_gather(row, 'metrics').unbind(1)):
            metrics[name] = float(column.max() if name.endswith('_max') else column.sum())
    return metrics


class Stage:
    """One stage's part of a step: forward(i) and backward(i) of micro-batch i, which the schedules order. A
    model that is not cut into stages is the first and the last one."""

    def __init__(self, model, optimizer, micros, loss_of, scales):
        self.model, self.optimizer, self.loss_of = model, optimizer, loss_of
        self.micros, self.scales = micros, scales
        self.pp, self.back = optimizer.mesh.pp, optimizer.mesh.pp_back
        self.later = self.pp.size - 1 - self.pp.rank  # stages behind this one
        self.inflight, self.sending, self.results = {}, deque(), []

    def forward(self, i):
        found, out = _through(self.model, self.loss_of, self.micros[i])
        if out is None:
            loss, stats = found
            out = loss * self.scales[i]
            self.results.append({'loss': out.detach(), **stats})
        else:
            self.sending.append(self.pp.send(out.detach(), self.pp.rank + 1, 'activations'))
        self.inflight[i] = self.model.body.wte.x if self.pp.rank else None, out

    def backward(self, i):
        x, out = self.inflight.pop(i)
        g = None
        if self.later:
            g = self.back.recv(torch.empty_like(out), self.back.rank + 1, 'gradients of activations')
        self.optimizer.backward(out, g, last=i == len(self.micros) - 1)
        if x is not None:
            self.sending.append(self.back.send(x.grad, self.back.rank - 1, 'gradients of activations'))
        self.finish(2 * self.pp.size)

    def finish(self, left=0):
        """Waits until at most `left` messages are on their way."""
        while len(self.sending) > left:
            self.sending.popleft()()


def _through(model, fn, micro):
    """fn(model, micro) on this stage -> (what it returns, None), or on earlier stages (None, activations). fn
    may call the model once."""
    if not isinstance(model, Sharded):
        return fn(model, micro), None
    model.running, model.body.wte.x = True, None
    try:
        return fn(model, micro), None
    except _Handoff as h:
        return None, h.args[0]
    finally:
        model.running = False


@torch.no_grad()
def evaluate(model, micros, fn):
    """[fn(model, micro) for micro in micros] without gradients, on every rank of the replica. fn returns a
    tensor or a tuple of them."""
    mesh = getattr(model, 'mesh', ALONE)
    outputs = []
    for micro in micros:
        found, x = _through(model, fn, micro)
        if x is None:
            outputs.append(found)
        else:
            mesh.pp.send(x, mesh.pp.rank + 1, 'activations')()
    if mesh.pp.size == 1:
        return outputs
    return _move(mesh.pp.share_object(_move(outputs, 'cpu'), mesh.pp.size - 1, 'outputs'), mesh.device)


# ----------------------------------------------------------------------------------------------------
# full tensors out of any layout, checkpoints


@torch.no_grad()
def _full_tensors(model, read=None, keep=None):
    """Yields (name, full tensor) on every rank: owners fill in what they hold, the world adds up (x + 0 = x:
    exact). `read(part)` -> flat tensor, for the optimizer's kinds of the trained parameters; without it the
    weights of all. keep(name): which of them."""
    if not isinstance(model, Sharded):
        for part in _parts(model):
            if (read is None or part.weight is not None) and (keep is None or keep(part.name)):
                yield part.name, part.param.detach() if read is None else read(part).view(part.shape)
        return
    mesh, owned = model.mesh, {part.name: part for part in model.parts if part.owner}
    for name, (shape, dtype, trained) in model.full.items():
        if (read is not None and not trained) or (keep is not None and not keep(name)):
            continue
        full = torch.zeros(shape, dtype=dtype, device=mesh.device)
        part = owned.get(name)
        if part is not None and (mesh.zero and part.weight is not None or mesh.data.rank == 0):
            local = part.param
            if part.weight is not None:
                local = full.new_zeros(local.shape)
                if part.lo < part.hi:
                    local.view(-1)[part.lo:part.hi] = part.weight if read is None else read(part)
            part.put(full, local)
        mesh.everyone.all_reduce(full, 'full weights')
        yield name, full


def full_state(model, only_master=False, keep=None):
    """The plain state dict of the whole model whatever the layout, on every rank (only_master: rank 0, on the
    CPU; {} elsewhere; keep(name) -> bool). All ranks must call it. It is what GPT.load_state_dict,
    save_pretrained and a rollout engine's load_weights take."""
    state, wanted = {}, not only_master or getattr(model, 'mesh', ALONE).master
    for name, full in _full_tensors(model, keep=keep):
        if wanted:
            state[name] = full.cpu() if only_master else full
    if model.config.tie and model.head == 'lm' and 'wte.weight' in state:
        state['lm_head.weight'] = state['wte.weight']
    return state


def _write(saved, path):
    """torch.save into a whole file or none: a full disk is one line with the name, and the file that was
    there stays."""
    try:
        with files.replaced(path) as f:
            torch.save(saved, f)
    except RuntimeError as e:  # torch's word for a failed write
        raise OSError(errno.EIO, f'could not be written ({str(e).splitlines()[0][:100]})', path) from None


def read_checkpoint(path, mmap=False):
    """The one reader of checkpoints: a dict, on the CPU. mmap: its tensors stay on the disk until they are
    used. ValueError, one line, for a file that is none of ours or was cut short; OSError for one that may not
    be read."""
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
        why = f'{type(e).__name__}: {str(e)[:100]}'.splitlines()[0]
        raise ValueError(f'{path}: not a checkpoint of ours, or cut short ({why}){other}') from None


def save_checkpoint(path, mesh, model, optimizer, value=None, value_optimizer=None, keep=None, also=None,
                    **rest):
    """One file, the same whatever the layout: model, optimizer (and value, value_optimizer: PPO's second
    network), rng (one state a rank) and what is given in `rest` (config, iter, data, best, model_args,
    tokenizer: plain types and tensors). Atomic. All ranks call it. Full tensors are made one at a time; rank
    0 holds them all (12 bytes a parameter: 8B -> 96 GB of host memory). keep(name) -> bool: which of the
    model's tensors are written (an adapter's). also: a second file, without the optimizer (the best so
    far)."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    saved = dict(rest, rng=mesh.rng_state(), model=full_state(model, only_master=True, keep=keep))
    optimizers = dict(optimizer=optimizer)
    if value is not None:
        saved['value'] = full_state(value, only_master=True)
        optimizers['value_optimizer'] = value_optimizer
    moments = {key: each.state_dict() for key, each in optimizers.items()}
    if mesh.master:
        _write(saved | moments, path)
        if also:
            _write(saved | dict.fromkeys(moments), also)
    mesh.barrier()
    mesh.saved(path, rest.get('iter', '?'))


# ----------------------------------------------------------------------------------------------------
# what it will cost


def plan(model, tp=1, pp=1, cp=1, dp=1, zero=0, activations=0):
    """Bytes on the fullest rank: {'weights', 'gradients', 'optimizer', 'in_flight', 'activations', 'total'};
    n = dp cp ranks share under ZeRO. model: an unsharded GPT, one on torch.device('meta') is enough;
    activations: of one micro-batch in a world of one (run.activation_bytes), divided here by tp and cp; 1F1B
    holds pp micro-batches of L / pp layers, so pp cancels. Weights and gradients 4 bytes a parameter, Adam's
    moments 8; ZeRO-3 holds two fetched layers; in flight is the largest gradient on its way into the sum (of
    a tied embedding the head's, beside the table's). GPT-2 small, one process: 498 + 498 + 996 + 154 MB."""
    c, zero = model.config, zero if dp * cp > 1 else 0
    n = dp * cp if zero else 1
    held = [0] * pp  # parameters of a tp rank, on each stage
    trained = [Counter() for _ in range(pp)]  # of each layer
    for name, p in model.named_parameters():
        dim, ranges = _ranges(name, c, Group('tp', range(tp)))
        here = p.numel()
        if ranges:
            here = here // p.shape[dim] * sum(b - a for a, b in ranges)
        unit, i, *_ = name.split('.')
        stages = {pp - 1}
        if unit == 'h':
            unit += i
            stages = {next(s for s in range(pp) if int(i) < c.n_layer * (s + 1) // pp)}
        elif unit in ('wte', 'wpe'):
            stages = {0, pp - 1} if unit == 'wte' and c.tie and model.head == 'lm' else {0}
        for stage in stages:
            held[stage] += here
            trained[stage][unit] += here * p.requires_grad
    plans = []
    for everything, layers in zip(held, trained):
        local, large = sum(layers.values()), max(layers.values())
        weights = local / n + sum(sorted(layers.values())[-2:]) if zero == 3 else local
        gradients = local / n + large if zero >= 2 else local
        parts = dict(weights=4 * (everything - local + weights), gradients=4 * gradients,
                     optimizer=8 * local / n, in_flight=4 * large, activations=activations / (tp * cp))
        plans.append(dict(parts, total=sum(parts.values())))
    return max(plans, key=lambda parts: parts['total'])
