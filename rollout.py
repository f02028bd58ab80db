"""Answers and rewards of the RL stages: reward files, and rollouts that run ahead of the trainer (--mode=async).

AReaL, 2505.24298: engines in actors; an asynchronous stage takes its batches from here."""
import os
import runpy
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

import parallel
from infer import Engine, SamplingParams
from model import answer_logprobs
from run import reference_of
from tokenizer import get_tokenizer


def load_reward(path):
    """The function `reward(prompt: str, completion: str, row: dict) -> float` of a Python file of the user's. Its folder can be imported
    from while it loads. ValueError when the file is missing, does not run, or has no such function."""
    if not os.path.isfile(path):
        raise ValueError(f'reward {path}: no such file; it should define reward(prompt, completion, row) -> float')
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    try:
        space = runpy.run_path(path, run_name='reward')
    except Exception as e:
        raise ValueError(f'reward {path} does not run: {type(e).__name__}: {e}') from e
    finally:
        sys.path.pop(0)
    if not callable(space.get('reward')):
        raise ValueError(f'reward {path}: it defines no function reward(prompt, completion, row)')
    return space['reward']


# -----------------------------------------------------------------------------
# rollouts ahead of the trainer
#
#     jobs (prompts in order) --capacity--> RolloutWorker x n --finished groups--> Scorer x m --> done --take()--> trainer
#                                                 ^                                                                   |
#                                                 +-------- weights, one object in the store, a version --- publish() +

SLICE = 0.05     # seconds that a worker samples before it looks for new prompts and weights
START = 300.0    # seconds that a worker may take to start
SILENCE = 120.0  # seconds without an answer after which a worker is taken for dead
DEATHS = 8       # replacements of one worker that did nothing in between: not bad luck any more, the run ends


@dataclass
class Rollout:
    """All answers to one prompt. id: its place in the order of prompts, `index`: its row. answers: [(token ids, log-probs they were sampled
    with, weight version of each, ended by itself)]. scores: {reward file: [float]}, of reward files only."""
    id: int
    index: int
    answers: list
    scores: dict


class RolloutWorker:
    """An engine in an actor. It works in slices, so new weights wait for a slice and never for the end of an answer: what is in flight is
    interrupted, its keys and values are made anew, and it goes on under the new weights; every token knows its version."""

    def __init__(self, model, eot, device, **options):
        torch.set_num_threads(1)
        self.engine, self.open = Engine(model.to(device), **options), {}
        self.engine.eot = eot

    def ready(self):
        """Answers once the process is up."""

    def run(self, jobs, version, weights, seconds):
        """Loads weights (a state dict; None: stays as it is), takes on jobs [(id, prompt ids, SamplingParams)], samples for `seconds` or until all
        is done. -> [(id, answers as in Rollout)] of the finished ones."""
        if weights is not None:
            self.engine.load_weights(weights, version, recompute=True)
        for id, prompt, params in jobs:
            left = [params.n]
            self.open[id] = left, self.engine._add(self.engine._check(prompt, params), params, left=left)
        until = time.monotonic() + seconds
        while self.engine.has_unfinished() and time.monotonic() < until:
            with self.engine.lock:
                self.engine._step()
        done = [id for id, (left, _) in self.open.items() if not left[0]]
        out = [(id, [self.engine._completion(r) for r in self.open.pop(id)[1]]) for id in done]
        return [(id, [(c.token_ids, c.logprobs, c.weight_versions, c.finish_reason == 'stop') for c in group]) for id, group in out]


class Scorer:
    """Reward files in an actor: what they do there (hang, raise, kill the process) stays there."""

    def __init__(self, files, tokenizer):
        """files {name in the log: path}, a path that holds in any process of any node."""
        self.fns, self.tok = {name: load_reward(path) for name, path in files.items()}, get_tokenizer(tokenizer)

    def ready(self):
        """Answers once the process is up: from then on reward_timeout counts."""

    def score(self, row, prompt, answers):
        """{file: [float]} for the token ids of each answer. ValueError for a score that is not finite."""
        asked, texts = self.tok.decode(prompt), [self.tok.decode([t for t in a if t != self.tok.eot]) for a in answers]
        out = {file: [float(fn(asked, text, row)) for text in texts] for file, fn in self.fns.items()}
        for file, scores in out.items():
            if not np.isfinite(scores).all():
                raise ValueError(f'reward {file} returned {scores[int(np.argmin(np.isfinite(scores)))]}: rewards must be finite')
        return out


class _Hand:
    """An actor and what it does: call = the ref of the call in progress, None = idle; work = the groups it has; version = its weights';
    deaths = how often it was replaced since it last did something."""

    def __init__(self, hire):
        self.hire, self.deaths = hire, 0
        self.start()

    def start(self):
        self.actor, self.work, self.version, self.up = self.hire(), [], None, False
        self.go(self.actor.ready.remote(), START)

    def go(self, ref, seconds):
        self.call, self.deadline, self.seconds = ref, time.monotonic() + seconds, seconds


class Rollouts:
    """A stream of answered and scored prompts, for a trainer that does not wait for them.

    jobs(k) -> iterator of (row number, row, prompt ids, SamplingParams) from prompt k on, endless; `batch` of them are an update's.
    publish(state_dict, version) once before each update: the workers go on with these weights. take(n) -> the next n Rollouts, in the
    ORDER OF THE PROMPTS, so that a batch holds what it would hold in sync mode (first come, first trained would prefer short answers),
    and `position`, the id behind the last one taken, is all that a checkpoint needs: nothing is trained on twice, nothing is left out.
    Capacity, section 5.1 of the paper: prompts handed out <= taken + (max_staleness + 1) * batch at each publish, so no token that is
    taken is older than max_staleness versions; 0 = the workers sample with the weights of the update itself, as in sync mode.
    Faults: a worker that dies, or is silent for SILENCE seconds, is replaced and its unfinished prompts begin anew (`restarts`); a
    reward that raises, hangs for reward_timeout s, is not finite or takes its process along is tried reward_retries times more, then
    the whole group is left out and the next one takes its place (`dropped`). runtime: 'local', 'ray', or 'HOST:PORT' of a cluster."""

    def __init__(self, model, tokenizer, eot, jobs, batch, max_staleness=1, workers=1, rewards=(), reward_workers=1, reward_timeout=30.0,
                 reward_retries=2, runtime='local', position=0, device='cpu', **engine):
        for name, value, least in (('max_staleness', max_staleness, 0), ('rollout_workers', workers, 1), ('reward_workers', reward_workers, 1), ('reward_retries', reward_retries, 0)):
            if value < least:
                raise ValueError(f'{name} must be at least {least}, got {value}')
        if reward_timeout <= 0:
            raise ValueError(f'reward_timeout must be above 0 seconds, got {reward_timeout}')
        import actors  # here: a synchronous stage starts nothing and imports nothing of it
        self.actors, self.batch, self.max_staleness, self.reward_timeout, self.retries = actors, batch, max_staleness, reward_timeout, reward_retries
        self.position = self.next = position
        self.dropped = self.restarts = self.taken = self.limit = 0  # limit: prompts handed out and not dropped, at most
        self.jobs, self.work, self.pending, self.unscored, self.done = jobs(position), {}, [], deque(), {}
        self.tries, self.in_a_row = {}, 0
        self.version = self.weights = self.error = None
        self.cv, self.closed, self.own = threading.Condition(), False, not actors.is_initialized()
        if not torch.cuda.is_available() and 'rollout' not in actors.PRELOAD:  # imported once for all workers; with a GPU it would start CUDA before the fork
            actors.PRELOAD.append('rollout')
        gpus = self._init(runtime, workers + (reward_workers if rewards else 0), device)
        first, options = actors.put(model), dict(eot=eot, device='cuda' if gpus else str(device), **engine)
        worker = actors.remote(RolloutWorker).options(num_cpus=1, **(dict(num_gpus=min(1, gpus / workers)) if gpus else {}))
        scorer = actors.remote(Scorer).options(num_cpus=1)
        self.rollers = [_Hand(lambda: worker.remote(first, **options)) for _ in range(workers)]
        files = {f: os.path.abspath(f) for f in rewards}  # a node has a working directory of its own
        tokenizer = os.path.abspath(tokenizer) if os.path.exists(tokenizer) else tokenizer
        self.scorers = [_Hand(lambda: scorer.remote(files, tokenizer)) for _ in range(reward_workers if rewards else 0)]
        self.hands, self.size = self.rollers + self.scorers, engine.get('max_num_seqs', 256)
        self.thread = threading.Thread(target=self._pump, name='rollouts', daemon=True)
        self.thread.start()

    def _init(self, runtime, processes, device):
        """Starts or joins the runtime -> GPUs for the rollout workers: all but the trainer's where there are several, else they share it."""
        gpus = torch.cuda.device_count() if str(device).startswith('cuda') else 0
        seen, mine = os.environ.get('CUDA_VISIBLE_DEVICES'), torch.device(device).index or 0
        if gpus > 1:
            ids = seen.split(',') if seen else [str(i) for i in range(gpus)]
            os.environ['CUDA_VISIBLE_DEVICES'] = ','.join(ids[:mine] + ids[mine + 1:])  # read by the runtime; torch here has its device already
        try:
            if not self.own:
                return gpus - (gpus > 1)
            if runtime == 'local':
                self.actors.init(num_cpus=processes)
            elif runtime == 'ray':
                cluster = os.environ.get('RAY_ADDRESS')  # a cluster has its own CPUs
                self.actors.init(backend='ray', include_dashboard=False, **({} if cluster else dict(num_cpus=processes)))
            elif ':' in runtime:
                self.actors.init(address=runtime)
            else:
                raise ValueError(f"runtime {runtime!r}: expected 'local', 'ray' or HOST:PORT of python actors.py --head=True")
        finally:
            if gpus > 1:
                os.environ.pop('CUDA_VISIBLE_DEVICES') if seen is None else os.environ.update(CUDA_VISIBLE_DEVICES=seen)
        return gpus - (gpus > 1)

    # ---- the trainer's side --------------------------------------------------------------------------------------

    def publish(self, state, version):
        """New weights (a state dict) for all that is sampled from now on, answers in flight included."""
        weights = self.actors.put({k: v.detach().cpu() for k, v in state.items()})
        with self.cv:
            self.version, self.weights, self.limit = version, weights, self.taken + (self.max_staleness + 1) * self.batch
            self.cv.notify_all()

    def take(self, n):
        """Waits for the next n Rollouts. Raises what went wrong with the workers."""
        out = []
        with self.cv:
            self.limit = max(self.limit, self.taken + n)  # a second helping within one update (dynamic sampling)
            self.cv.notify_all()
            while len(out) < n:
                if self.error is not None:
                    raise self.error
                if self.position in self.done:
                    group = self.done.pop(self.position)
                    if group is not None:
                        out.append(group)
                        del self.work[self.position]
                        self.taken += 1
                    self.position += 1
                else:
                    self.cv.wait(1.0)
        return out

    def close(self):
        """Ends the workers, and the runtime if it was started here."""
        if self.closed:
            return
        with self.cv:
            self.closed = True
            self.cv.notify_all()
        self.thread.join(30)
        for hand in self.hands:
            self.actors.kill(hand.actor)
        if self.own:
            self.actors.shutdown()

    # ---- the thread that keeps the workers busy ------------------------------------------------------------------

    def _pump(self):
        try:
            while not self.closed:
                self._issue()
                calls = {hand.call: hand for hand in self.hands if hand.call is not None}
                if not calls:
                    with self.cv:
                        if not self.closed and not self._may_issue():
                            self.cv.wait(0.5)
                    continue
                wait = min(hand.deadline for hand in calls.values()) - time.monotonic()
                ready, _ = self.actors.wait(list(calls), num_returns=1, timeout=min(0.1, max(0.0, wait)))
                for ref in ready:
                    self._collect(calls[ref])
                for hand in self.hands:
                    if hand.call is not None and hand.call not in ready and time.monotonic() > hand.deadline:
                        self._replace(hand, f'no answer for {hand.seconds:g} s')
        except BaseException as e:
            with self.cv:
                self.error = e
                self.cv.notify_all()

    def _may_issue(self):
        return self.weights is not None and self.taken + len(self.work) < self.limit

    def _issue(self):
        """Hands out prompts within the capacity, lowest id first, and gives every idle worker its next call."""
        with self.cv:
            while self._may_issue():
                self.work[self.next] = next(self.jobs)
                self.pending.append(self.next)
                self.next += 1
            version, weights = self.version, self.weights
        for hand in self.rollers:
            if hand.call is None and (hand.work or self.pending):
                share = -(-(len(self.pending) + sum(len(h.work) for h in self.rollers)) // len(self.rollers))
                room = min(share, max(1, self.size // self.work[(hand.work or self.pending)[0]][3].n)) - len(hand.work)
                new, self.pending = self.pending[:max(0, room)], self.pending[max(0, room):]
                hand.work += new
                fresh = (version, weights if hand.version != version else None)
                hand.version = version
                hand.go(hand.actor.run.remote([(id, *self.work[id][2:]) for id in new], *fresh, SLICE), SILENCE)
        for hand in self.scorers:
            if hand.call is None and self.unscored:
                hand.work = [self.unscored.popleft()]
                id, answers = hand.work[0]
                _, row, prompt, _ = self.work[id]
                hand.go(hand.actor.score.remote(row, prompt, [a[0] for a in answers]), self.reward_timeout)

    def _collect(self, hand):
        """What a call came to."""
        ref = hand.call
        try:
            result = self.actors.get(ref, timeout=SILENCE)
        except self.actors.exceptions.RayActorError as e:
            return self._replace(hand, str(e).strip().splitlines()[-1])
        except Exception as e:
            if hand in self.rollers or not hand.work:
                raise
            hand.call = None
            return self._again(hand.work.pop(), str(e).strip().splitlines()[-1])
        hand.call = None
        if not hand.up:
            hand.up = True
            return
        hand.deaths = 0
        if hand in self.scorers:
            id, answers = hand.work.pop()
            return self._finish(id, Rollout(id, self.work[id][0], answers, result))
        for id, answers in result:
            hand.work.remove(id)
            if self.scorers:
                self.unscored.append((id, answers))
            else:
                self._finish(id, Rollout(id, self.work[id][0], answers, {}))

    def _finish(self, id, group):
        """A group is ready, or dropped (None). From here on it is the trainer's."""
        with self.cv:
            self.in_a_row = 0 if group is not None else self.in_a_row + 1
            self.tries.pop(id, None)
            self.done[id] = group
            if group is None:
                del self.work[id]
                self.dropped += 1
            self.cv.notify_all()

    def _again(self, work, why):
        """A reward failed: once more at the end of the line, or the group is dropped."""
        id = work[0]
        self.tries[id] = self.tries.get(id, 0) + 1
        if self.tries[id] <= self.retries:
            return self.unscored.append(work)
        print(f'rollouts: prompt {id} (row {self.work[id][0] + 1}) is dropped, its reward failed {self.tries[id]} times: {why[:200]}', flush=True)
        self._finish(id, None)
        if self.in_a_row >= max(16, self.batch):
            raise ValueError(f'the reward failed for {self.in_a_row} prompts one after the other, at last with: {why[:200]}')

    def _replace(self, hand, why):
        """Another actor takes the place of one that died or fell silent, and its work."""
        self.actors.kill(hand.actor)
        work = hand.work
        hand.start()
        if hand in self.scorers and work:
            return self._again(work[0], why)
        hand.deaths += 1
        if hand.deaths >= DEATHS:
            raise RuntimeError(f'a {"rollout" if hand in self.rollers else "reward"} worker died {hand.deaths} times before it did anything, at last: {why}')
        self.restarts += 1
        print(f'rollouts: a worker was replaced ({why[:200]}), {len(work)} prompts begin anew', flush=True)
        self.pending = sorted(work + self.pending)


# -----------------------------------------------------------------------------------------------------------
# answers of one moment, for the evaluations of reward.py, dpo.py and kto.py


def answers_to(run, engine, prompts, max_new_tokens, temperature, seed=0):
    """Token ids of one answer to each prompt, in order, on every rank; each answers its share. Row i has seed + i."""
    mine = range(len(prompts))[run.mesh.mine(len(prompts))]
    params = [SamplingParams(max_tokens=max_new_tokens, temperature=temperature, seed=seed + i) for i in mine]
    done = engine.generate([prompts[i] for i in mine], params)
    return run.mesh.collect([c.token_ids for c in done], everyone=True)


def kl_on_samples(run, engine, policy, frozen, prompts, max_new_tokens, temperature):
    """({'kl': KL(policy || reference) in nats a sequence, 'len': tokens}, ids of the first prompt and its answer), on the
    policy's own answers with fixed seeds. k3 of each token: unbiased, never negative. frozen: see reference_of."""
    parallel.refresh(engine, policy)
    answers = answers_to(run, engine, prompts, max_new_tokens, temperature)
    groups = [(prompt, [answer]) for prompt, answer in zip(prompts, answers)]
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers)]

    def logps(net, rows):
        return answer_logprobs(net, [groups[i] for i in rows], temperature)[0]  # 0 behind an answer's end
    own = run.each(policy, lengths, logps)
    with reference_of(policy, frozen) as reference:
        theirs = run.each(reference, lengths, logps)
    nats = sum((torch.exp(b - a) - 1 + a - b).sum().item() for a, b in zip(own, theirs))
    return dict(kl=nats / len(groups), len=sum(map(len, answers)) / len(answers)), prompts[0] + answers[0]
