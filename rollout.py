"""What RL stages share: prompts, answers of the policy (now, stale or ahead), rewards, the batch.

    train, val, longest = load_prompts(run, tok, context)
    rewards = Rewards(run, tok, longest)              # --reward=a.py,out-reward --reward_weights=1,0.5
    answers = Answers(run, policy, tok, train, longest, group_size=8)
    answers.start(policy, reference, rewards)         # the policy as it is trained
    batch = answers.next(it)                          # B answers in whatever mode: see Batch
    total, each = rewards(batch)                      # (B,) and {'a.py': (B,), 'out-reward': (B,)}
    logp, entropy = answers.logprobs(policy, batch[rows])       # (b, r), with gradient

Asynchronous rollouts, the second half of the file, follow AReaL (2505.24298): engines in actors run ahead of
the trainer.
"""
import copy
import itertools
import json
import math
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import numpy as np
import torch

import infer
import lora
import parallel
from dataset import pad
from model import all_rewards, answer_logprobs, answer_values
from run import check_fit, encode_all, kv_cache_bytes, load_function, load_model, prompt_room, reference_of
from tokenizer import encode_prompt, encode_row, get_tokenizer

# -----------------------------------------------------------------------------------------------------------
# prompts


def read_prompt(row, tok, room, long_prompts):
    """A row {"prompt", ...} -> ([(row, prompt ids)], note). A prompt over `room` tokens is an error,
    dropped, or cut: it loses its beginning."""
    if 'prompt' not in row:
        raise ValueError(f'no "prompt", it has {sorted(row)}')
    ids = encode_prompt(row, tok)
    if not ids:
        raise ValueError('empty prompt')
    if len(ids) <= room:
        return [(row, ids)], ''
    if long_prompts == 'error':
        raise ValueError(f'prompt of {len(ids)} tokens, block_size minus max_new_tokens leaves {room}: lower '
                         f'--max_new_tokens, or --long_prompts=drop or cut')
    kept = [(row, ids[-room:])] if long_prompts == 'cut' else []
    return kept, f'prompts over {room} tokens, {long_prompts}'


def load_prompts(run, tok, context):
    """(training items, held-out items, longest): items [(row, prompt ids)], longest: tokens of a prompt and
    its answer at most. ValueError where max_new_tokens leaves no room in a context of so many tokens."""
    c = run.config
    room = context - c['max_new_tokens']
    if room < 1:
        raise ValueError(f'max_new_tokens {c["max_new_tokens"]} leaves no room for a prompt in block_size '
                         f'{context}: lower it')
    room = min(c['max_prompt'] or room, room)
    names = c['dataset'], c['val_dataset'] or c['dataset']
    env = load_env(c['env']) if c.get('env') else None

    def read(row):
        if env:
            try:
                row = dict(row, prompt=env().start(row))
            except Exception as e:
                raise ValueError(f'env {c["env"]}: start raised {type(e).__name__}: {e}') from e
        return read_prompt(row, tok, room, c['long_prompts'])
    train, val = (encode_all(rows, read, name) for rows, name in zip(run.rows(), names))
    run.same_rows([ids for _, ids in train])
    longest = max(len(ids) for _, ids in train + val)
    return train, val, longest + c['max_new_tokens']


# -----------------------------------------------------------------------------------------------------------
# the batch


@dataclass
class Batch:
    """B answers, those to one prompt beside each other, and what is known of them; R = tokens of the
    longest answer.

        rows       [dict]          the data set's row of each answer, for reward files
        index      [int]           its number
        prompts    [[int]]         token ids; the answers to one prompt hold the same list object
        responses  [[int]]         token ids, the end token included where there is one
        ended      (B,) bool       whether the answer ended by itself, with an end token
        mask       (B, R) bool     True = response token; answers are padded on the right
        sampled    (B, R) float    log-prob that the sampler had for each token, 0 elsewhere
        ages       (B, R) int      updates that the sampler's weights were behind
        replied    [int]           tokens of each that an environment wrote; mask is False there
    The rest a stage fills in as it goes; None until then. `batch[rows]` is a Batch of some answers, cut to
    the longest."""
    rows: list
    index: list
    prompts: list
    responses: list
    ended: torch.Tensor
    mask: torch.Tensor
    sampled: torch.Tensor
    ages: torch.Tensor
    replied: list
    scores: torch.Tensor = None      # (B,)
    advantages: torch.Tensor = None  # (B,) or (B, R), as are those below
    old_logp: torch.Tensor = None
    ref_logp: torch.Tensor = None
    values: torch.Tensor = None
    returns: torch.Tensor = None
    weights: torch.Tensor = None
    given: dict = None  # {reward file or environment: (B,)}, come with the answers; not in parts of a batch

    def __len__(self):
        return len(self.responses)

    def tokens(self):
        """How many the policy wrote."""
        return sum(map(len, self.responses)) - sum(self.replied)

    def __getitem__(self, rows):
        longest = max(len(self.responses[i]) for i in rows)
        part = {}
        for each in fields(self):
            x = getattr(self, each.name)
            if isinstance(x, list):
                part[each.name] = [x[i] for i in rows]
            elif torch.is_tensor(x):
                part[each.name] = x[rows] if x.dim() == 1 else x[rows, :longest]
        return Batch(**part)

    def neighbours(self, rows, room=math.inf):
        """[(prompt, [row number, ...])]: those that answer the same prompt, of at most `room` tokens, the
        prompt counted once."""
        found = []
        tokens = 0
        for i in rows:
            prompt = self.prompts[i]
            size = len(self.responses[i])
            if found and found[-1][0] is prompt and tokens + size <= room:
                found[-1][1].append(i)
                tokens += size
            else:
                found.append((prompt, [i]))
                tokens = len(prompt) + size
        return found

    def groups(self):
        """[(prompt, [answer, ...])], as answer_logprobs wants them."""
        found = self.neighbours(range(len(self)))
        return [(prompt, [self.responses[i] for i in rows]) for prompt, rows in found]


def minibatches(batch_size, size, seed, it, epoch, group_size=1):
    """The row numbers of an epoch's minibatches, [[int]]; groups stay together. Epoch 0 takes the batch as
    it lies, later ones an order that is a function of (seed, it, epoch): no other draw can change it, and
    every rank has the same."""
    order = np.arange(batch_size).reshape(-1, group_size)
    if epoch:
        order = np.random.default_rng((seed, it, epoch)).permutation(order)
    return order.reshape(-1, size).tolist()


def means(steps):
    """[{name: number}], one of each optimizer step -> {name: mean}; of a name that ends in _max the
    largest."""
    found = {}
    for key in steps[0] if steps else ():
        values = [step[key] for step in steps]
        found[key] = max(values) if key.endswith('_max') else sum(values) / len(values)
    return found


def overview(batch):
    """What every row of the log says of answers; score_std is the sample's (n - 1), 0 for a single answer."""
    spread = batch.scores.std().item() if len(batch) > 1 else 0.0
    return dict(score=batch.scores.mean().item(), score_std=spread, len=batch.tokens() / len(batch),
                ended=batch.ended.float().mean().item())


# -----------------------------------------------------------------------------------------------------------
# rewards


def load_reward(path):
    """The function `reward(prompt, completion: str, row: dict) -> float` of a Python file of the user's.
    prompt is the row's own: a string, or the list of messages. ValueError: see load_function."""
    return load_function(path, 'reward', 'reward(prompt, completion, row) -> float')


def ask_reward(fn, name, row, text):
    """The reward of one completion, a float that float32 can hold. ValueError names the file, what it did,
    and the row."""
    seen = f'for completion {text[:60]!r} of row {str(row)[:120]}'
    try:
        mark = float(fn(row['prompt'], text, row))
    except Exception as e:
        raise ValueError(f'reward {name} raised {type(e).__name__}: {e}, {seen}') from e
    if not abs(mark) < 3.4e38:  # nan, too
        raise ValueError(f'reward {name} returned {mark} (rewards must be finite, in float32) {seen}')
    return mark


def load_env(path):
    """The class `Env` of a Python file of the user's, an environment of several turns:

        start(row) -> the prompt, a string or a list of messages
        step(completion: str) -> (reply: str or None, reward: float or None)     None: it is over; no mark yet
        stop = ['=']            optional: strings that end a turn, besides the end tokens

    One object is one conversation, and its rewards add up. The reply to a turn that an end token ended is
    the user's next message; to one that a stop string ended (a tool call) it is text in the same turn. After
    a failure the conversation so far is replayed in a new object, so a step depends on nothing else."""
    return load_function(path, 'Env', 'class Env: start(row), step(completion) -> (reply, reward)')


def encode_reply(tok, reply, chat, ended):
    """Token ids of an environment's reply, up to where the model goes on. chat: the prompt is messages;
    ended: by an end token. Nothing that was sampled is encoded again: in a chat the reply is what the
    template writes behind an assistant's turn. ValueError where it changes what came before."""
    if not chat or not ended:
        return tok.encode(reply)
    talk = [dict(role='user', content='?'), dict(role='assistant', content='x')]
    before, mask = tok.apply_chat_template(talk, return_mask=True)
    end = len(mask) - mask[::-1].index(True)  # behind the end token of the assistant's turn
    ids = tok.apply_chat_template(talk + [dict(role='user', content=reply)], add_generation_prompt=True)
    if ids[:end] != before[:end]:
        raise ValueError(f'tokenizer {tok.name!r}: its chat template rewrites earlier turns, so a '
                         f'conversation cannot go on token by token: take a template that does not')
    return ids[end:]


def without_end(ids, tok):
    """The token ids of an answer that are text: all but the end token, where there is one."""
    return ids[:-1] if ids and ids[-1] in tok.stop_ids else ids


def names_of(spec):
    """'a.py, out-reward' -> ['a.py', 'out-reward']; a path with a comma that exists is one name."""
    names = [spec] if os.path.exists(spec) else [name.strip() for name in spec.split(',')]
    if not all(names):
        raise ValueError(f"reward {spec!r}: expected a FILE.py or a reward model, several by comma ('' only "
                         f"with --env)")
    return names


def weights_of(text, names):
    """'1,0.5' -> [1.0, 0.5], one for each name; '' -> 1 each."""
    try:
        weights = [float(x) for x in text.split(',')] if text else [1.0] * len(names)
    except ValueError:
        raise ValueError(f'reward_weights {text!r}: numbers, separated by commas') from None
    if len(weights) != len(names):
        raise ValueError(f'{len(names)} rewards ({", ".join(names)}) but {len(weights)} reward_weights '
                         f'({text}): one weight each')
    return weights


class Rewards:
    """Reward files and reward models, several by comma, added up with one weight each.

    Files (and an environment) are asked in the processes of a RewardPool, and their marks come with the
    answers; with reward_workers=0 here, one completion after the other. A model reads prompt and answer in
    its own tokens, as in its training. Of several ranks each scores its share. longest: tokens of a prompt
    and its answer at most."""

    def __init__(self, run, tok, longest):
        self.run = run
        self.tok = tok
        self.env = run.config.get('env', '')
        self.names = [self.env] if self.env else []
        if run.config['reward'] or not self.env:
            self.names += names_of(run.config['reward'])
        self.weights = weights_of(run.config.get('reward_weights', ''), self.names)
        self.files = {}   # {name: function}
        self.models = {}  # {name: (model, its tokenizer)}
        for name in self.names:
            if name == self.env:
                continue  # its marks come with the answers
            if name.endswith('.py'):
                self.files[name] = load_reward(name)
            else:
                model, tokenizer = load_model(name, run.device, head='scalar')
                self.models[name] = model.requires_grad_(False).eval(), get_tokenizer(tokenizer)
                run.memory['reward'] += sum(p.nbytes for p in model.parameters())
        self.same_ids = []  # the models whose token ids are the policy's
        for name, (model, own) in self.models.items():
            if (own.spec, own.eot) == (tok.spec, tok.eot):
                check_fit(model, f'reward {name}', tok, longest)
                self.same_ids.append(name)

    def __call__(self, batch):
        """-> (total (B,) float32, {name: (B,)}), on the CPU."""
        share = range(len(batch))[self.run.mesh.slice_of(len(batch))]
        each = dict(batch.given or {})
        for name in self.names:
            if name not in each:
                scores = self._scores(name, batch[share]) if share else []
                scores = self.run.mesh.collect(scores, everyone=True)
                each[name] = torch.tensor(scores, dtype=torch.float32)
        total = sum(weight * each[name] for name, weight in zip(self.names, self.weights))
        return total, each

    def _scores(self, name, batch):
        if name in self.same_ids:
            model, _ = self.models[name]
            sequences = [prompt + answer for prompt, answer in zip(batch.prompts, batch.responses)]
        else:
            texts = [self.tok.decode(without_end(ids, self.tok)) for ids in batch.responses]
            if name in self.files:
                fn = self.files[name]
                return [ask_reward(fn, name, row, text) for row, text in zip(batch.rows, texts)]
            model, tok = self.models[name]
            sequences = [self._reread(*read, tok) for read in zip(batch.rows, texts, batch.ended.tolist())]
            check_fit(model, f'reward {name}', tok, max(map(len, sequences)))
        with self.run.amp():
            scores = all_rewards(model, sequences, self.run.config['micro_tokens'])
        if not scores.isfinite().all():
            bad = scores[~scores.isfinite()][0].item()
            raise ValueError(f'reward model {name} returned {bad}: its weights are broken; train it again')
        return scores.tolist()

    def _reread(self, row, text, ended, tok):
        """Other tokens: the row as the reward model's training read it, with the end token where the answer
        ended."""
        ids, _ = encode_row(dict(row, completion=text, messages=None), tok)
        return ids if ended else ids[:-1]


# -----------------------------------------------------------------------------------------------------------
# answers


class Answer(NamedTuple):
    """What is known of one answer before it stands in a Batch; one entry a token but for `ended`."""
    ids: list
    logps: list   # that the sampler had
    ages: list    # updates that its weights were behind
    ended: bool   # by itself
    own: list     # True: the policy's, False: an environment's


class Answers:
    """The policy's answers to the prompts, in the order of the data: one `next(it)` for all modes.

        sync                  an engine in this process answers with the weights before update `it`
        async                 engines in other processes run ahead, see Rollouts below; of several ranks
                              rank 0 owns them and tells the others what it took
        simulated staleness   the engine here answers with the weights of n updates ago: async's samples, but
                              deterministic
    Which prompt is number k, and what is sampled for it, are functions of (seed, k). So all modes ask the
    same, and the state to resume from is one number. items: [(row, prompt ids)]; longest: tokens of prompt
    and answer at most. Made before the policy is cut to ranks, started after."""

    def __init__(self, run, policy, tok, items, longest, group_size=1):
        c = self.config = run.config
        if c['simulate_staleness'] and c['mode'] == 'sync':
            raise ValueError(f'simulate_staleness {c["simulate_staleness"]}: it goes with --mode=async')
        self.run = run
        self.mesh = run.mesh
        self.device = run.device
        self.tok = tok
        self.items = items
        self.group_size = group_size
        self.need = c['batch_size'] // group_size      # prompts an iteration
        self.team = c['tp'] if c['rollout_tp'] else 1  # ranks that run one engine together
        self.params = infer.SamplingParams(max_tokens=c['max_new_tokens'], temperature=c['temperature'])
        self.options = dict(max_num_seqs=c['max_num_seqs'], max_len=longest)
        self.stale = c['simulate_staleness']
        self.past = []
        self.ahead = False                             # do other processes sample?
        self.travels = lora.is_adapter if lora.adapted(policy) else None  # which weights are sent to them
        self.pool = self.judges = None
        self.chats = 0
        if c.get('env') and c['mode'] != 'sync':
            raise ValueError(f'env {c["env"]}: conversations are led in this process: --mode=sync')
        if c.get('env') and not c['reward_workers']:
            raise ValueError(f'env {c["env"]}: it steps in processes of its own: --reward_workers=1 or more')
        if self.stale:
            self.sampler = copy.deepcopy(policy).to(run.dtype).requires_grad_(False)
        else:
            self.sampler = parallel.sampler_of(policy, run.mesh, run.dtype, c['rollout_tp'])

    def start(self, policy, reference, rewards):
        """policy: as it is trained. reference: a frozen model, or None: then it is the policy without its
        adapter."""
        self.policy = policy
        self.reference = reference
        self.engine = infer.Engine(self.sampler, self.tok, **self.options)
        self.position = 0
        self.run.cursor = self
        if self.run.ckpt:
            state = self.run.ckpt['data']
            self.position = state['position'] if 'position' in state else state['batch'] * state['batch_size']
            self.past = self.run.ckpt.get('past', [])
        self.jobs = self._jobs(self.position)
        files, env = list(rewards.files), rewards.env
        if self.stale:
            self.run.extra['past'] = self.past
        elif self.config['mode'] == 'async' and not self.config['eval_only']:
            self.ahead = True
        if self.ahead and self.mesh.master:
            model = copy.deepcopy(self.sampler).cpu().requires_grad_(False)
            keys = 'max_staleness rollout_workers reward_workers reward_timeout reward_retries runtime'
            workers = {key: self.config[key] for key in keys.split()}
            self.pool = Rollouts(model, self.run.tokenizer, self._jobs, self.need, files, **workers,
                                 position=self.position, device=self.device, **self.options)
        if self.config['reward_workers'] and (files or env):  # behind Rollouts, whose runtime it joins
            self.env = load_env(env) if env else None
            self.judges = RewardPool(self.run, files, env, max(16, self.need))

    def state_dict(self):
        """For a checkpoint: how many prompts we have used. Those that run ahead of the loop are sampled
        again."""
        return dict(position=self.position if self.pool is None else self.pool.position)

    def memory(self):
        """{what: bytes} that the sampling side holds, for Run.plan."""
        rows = self.options['max_num_seqs'] * self.options['max_len']
        found = dict(kv=kv_cache_bytes(self.sampler.config, rows, self.run.dtype.itemsize))
        if self.sampler is not getattr(self.policy, 'body', self.policy):
            weights = sum(p.nbytes for p in self.sampler.parameters())
            found['sampler'] = (1 + self.stale) * weights
        return found

    def close(self):
        """Ends the other processes."""
        for workers in (self.judges, self.pool):
            if workers is not None:
                workers.close()

    # ---- sampling

    def _jobs(self, k):
        """Endless: (row number, row, prompt ids, how to sample) of prompt number k, k + 1, ..."""
        seed = self.config['seed']
        n = len(self.items)
        epoch = -1
        for k in itertools.count(k):
            if k // n != epoch:  # a permutation an epoch, laid end to end
                epoch = k // n
                order = np.random.default_rng((seed, epoch)).permutation(n).tolist()
            own = (seed * 1000003 + k) % (1 << 31)
            i = order[k % n]
            row, prompt = self.items[i]
            yield i, row, prompt, replace(self.params, n=self.group_size, seed=own)

    def next(self, it, again=False):
        """The next Batch of need * group_size answers, sampled with the weights before update `it` or older
        ones. again: a second helping for the same update (dynamic sampling)."""
        if not again:
            self._publish(it)
        if self.ahead:
            groups = []
            for group in self._take():
                answers = []
                for ids, logp, versions, ended in group.answers:
                    ages = [it - version for version in versions]
                    answers.append(Answer(ids, logp, ages, ended, [True] * len(ids)))
                groups.append(((group.index, *self.items[group.index]), answers, group.scores))
            return self._batch(groups)
        groups = []
        while len(groups) < self.need:  # the next prompts take the place of those whose reward failed
            missing = self.need - len(groups)
            groups += self._answer(list(itertools.islice(self.jobs, missing)), min(it, self.stale))
            self.position += missing
        return self._batch(groups)

    def _take(self):
        """The next Rollouts, on every rank. Rank 0 waits for them and says so now and then, since a rank
        that is silent for dist_timeout seconds is taken for dead."""
        found = None
        while found is None:
            if self.pool is not None:
                found = self.pool.take(self.need, self.config['dist_timeout'] / 4)
            found = self.mesh.everyone.share_object(found, 0, 'answers')
        return found

    def held_out(self, items, n=1):
        """A Batch of n answers to each of some other prompts, sampled with today's weights and seeds of
        their own; prompts whose reward fails are left out."""
        parallel.refresh(self.engine, self.policy)
        jobs = []
        for i, (row, prompt) in enumerate(items):
            jobs.append((i, row, prompt, replace(self.params, n=n, seed=i)))
        groups = self._answer(jobs, 0)
        if len(groups) < len(jobs):
            lost = len(jobs) - len(groups)
            print(f'evaluation: {lost} of {len(jobs)} prompts left out, their reward failed')
        if not groups:
            raise ValueError('evaluation: the reward failed for each prompt, at last with: '
                             + self.judges.why)
        return self._batch(groups)

    def _publish(self, it):
        """The weights before update `it` go to whoever samples; with simulated staleness older ones do."""
        if self.ahead:
            state = parallel.full_state(self.policy, only_master=True, keep=self.travels)
            if self.pool is not None:
                self.pool.publish(state, it)
        elif self.stale:
            self.past.append({name: x.clone() for name, x in parallel.full_state(self.policy).items()})
            del self.past[:-self.stale - 1]
            self.engine.load_weights(self.past[0])
        else:
            parallel.refresh(self.engine, self.policy)

    def _answer(self, jobs, age):
        """[((row number, row, prompt), [Answer, ...], {file or environment: marks})] of jobs, by the engine
        here. Those that the RewardPool drops are left out. Each rank (with rollout_tp each team) answers its
        share, all get all."""
        mine = jobs[self.mesh.slice_of(len(jobs), self.team)]
        if self.judges is not None and self.judges.env:
            found = self._converse(mine, age)
        else:
            done = iter(self.engine.generate([job[2] for job in mine], [job[3] for job in mine]))
            found = []
            for job in mine:
                answers = []
                for c in itertools.islice(done, job[3].n):
                    size = len(c.token_ids)
                    ended = c.finish_reason == 'stop'
                    answers.append(Answer(c.token_ids, c.logprobs, [age] * size, ended, [True] * size))
                found.append((answers, {}))
        if self.judges is not None and self.judges.files:
            asked = []
            for job, (answers, _) in zip(mine, found):
                asked.append((job[1], [answer.ids for answer in answers]))
            for i, marks in enumerate(self.judges.ask('score', asked)):
                answers, given = found[i]
                found[i] = answers, None if None in (marks, given) else given | marks
        found = self.mesh.collect(found, everyone=True, team=self.team)
        return [(job[:3], *group) for job, group in zip(jobs, found) if group[1] is not None]

    def _converse(self, jobs, age):
        """[([Answer, ...], {environment: marks})] of conversations: the policy's turns by the engine (those
        that go on, at once), the environment's by its processes. Marks are None where a step failed."""
        c, talks = self.config, []
        for _, row, prompt, params in jobs:
            for copy_ in range(params.n):
                seed = (params.seed * 31 + copy_) % (1 << 31)
                talks.append(Talk(self.chats + len(talks), row, prompt, seed))
        self.chats += len(talks)
        stop = list(getattr(self.env, 'stop', ()))
        live = talks
        for turn in range(c['max_turns']):
            params = []
            for talk in live:
                left = c['max_new_tokens'] - len(talk.ids)
                seed = (talk.seed + 7919 * turn) % (1 << 31)
                params.append(replace(self.params, n=1, max_tokens=left, seed=seed, stop=stop))
            done = self.engine.generate([talk.prompt + talk.ids for talk in live], params)
            for talk, completion in zip(live, done):
                talk.say(completion, self.tok)
            steps = self.judges.ask('step', [(talk.number, talk.row, talk.said) for talk in live])
            going = []
            for talk, completion, step in zip(live, done, steps):
                if step is None:
                    talk.failed = True
                    continue
                reply, reward = step
                talk.reward += reward or 0.0
                talk.ended = reply is None and completion.finish_reason == 'stop'
                if reply is None or completion.finish_reason != 'stop' or turn + 1 == c['max_turns']:
                    continue
                ended = talk.ids[-1] in self.tok.stop_ids
                ids = encode_reply(self.tok, reply, not isinstance(talk.row['prompt'], str), ended)
                if len(talk.ids) + len(ids) < c['max_new_tokens']:  # else no room is left for a turn
                    talk.hear(ids)
                    going.append(talk)
            live = going
            if not live:
                break
        found, talks = [], iter(talks)
        for job in jobs:
            group = list(itertools.islice(talks, job[3].n))
            answers = [Answer(t.ids, t.logps, [age] * len(t.ids), t.ended, t.own) for t in group]
            marks = {self.judges.env: [t.reward for t in group]}
            found.append((answers, None if any(t.failed for t in group) else marks))
        return found

    def _batch(self, groups):
        """The Batch of what _answer found."""
        answers = [answer for _, group, _ in groups for answer in group]
        index, rows, prompts = zip(*(job for job, group, _ in groups for _ in group))
        mask, _ = pad([answer.own for answer in answers], False)
        sampled, _ = pad([answer.logps for answer in answers], 0.0)
        ages, _ = pad([answer.ages for answer in answers])
        mask, sampled, ages = (x.to(self.device) for x in (mask, sampled, ages))
        ended = torch.tensor([answer.ended for answer in answers])
        replied = [len(answer.own) - sum(answer.own) for answer in answers]
        given = {}
        for name in groups[0][2]:
            given[name] = torch.tensor([mark for *_, marks in groups for mark in marks[name]]).float()
        return Batch(list(rows), list(index), list(prompts), [answer.ids for answer in answers], ended, mask,
                     sampled, ages, replied, given=given)

    # ---- a forward pass over a batch

    def micro_batches(self, batch, rows):
        """Some row numbers in groups of at most micro_tokens tokens, always cut the same way; neighbours
        share their prompt. Of several replicas each gets its share -> ([[int]], how many replicas compute
        the same ones)."""
        units = batch.neighbours(rows, self.config['micro_tokens'])
        sizes = [len(prompt) + sum(len(batch.responses[i]) for i in mine) for prompt, mine in units]
        bins = self.run.micro_batches(sizes)
        micros = []
        for some in bins:
            micros.append([i for unit in some for i in units[unit][1]])
        return micros, self.mesh.replicas_of(len(units))

    def logprobs(self, model, micro):
        """(log-probs, entropies) of a micro-batch at the temperature that it was sampled with, (b, r)."""
        with self.run.amp():
            logp, entropy, _ = answer_logprobs(model, micro.groups(), self.params.temperature)
        return logp, entropy

    def values(self, model, micro):
        """The value before each token of a micro-batch, (b, r)."""
        with self.run.amp():
            values, _ = answer_values(model, micro.groups())
        return values

    def all_logprobs(self, model, batch, minibatches):
        """Log-probs of all answers (B, R), without gradient."""
        return self._all(lambda model, micro: self.logprobs(model, micro)[0], model, batch, minibatches)

    def reference_logprobs(self, batch, minibatches):
        """The same under the reference."""
        with reference_of(self.policy, self.reference) as model:
            return self.all_logprobs(model, batch, minibatches)

    def all_values(self, model, batch, minibatches):
        """Values of all answers (B, R), without gradient."""
        return self._all(self.values, model, batch, minibatches)

    def _all(self, fn, model, batch, minibatches):
        """fn(model, micro-batch) for all rows of the minibatches -> (B, R), 0 elsewhere, the same on every
        rank. They are cut as the update will cut them, so that its first ratios are 1 to the bit."""
        out = torch.zeros(batch.mask.shape, device=self.device)
        for rows in minibatches:
            micros, _ = self.micro_batches(batch, rows)
            found = parallel.evaluate(model, micros, lambda model, micro: fn(model, batch[micro]).float())
            for micro, x in self.mesh.collect(list(zip(micros, found))):
                out[micro, :x.shape[1]] = x.to(self.device)
        return out

    # ---- what is said of a batch

    def lag(self, batch, idle):
        """Asynchronous rollouts in a row of the log; idle: the share of the time that the trainer waited
        for samples."""
        if self.config['mode'] == 'sync':
            lost = self.judges.dropped if self.judges is not None else 0
            return dict(dropped=lost) if lost else {}
        ages = batch.ages[batch.mask].float()
        row = dict(staleness=ages.mean(), staleness_max=ages.max())
        row['prompts'] = batch.index[::self.group_size]
        if self.pool is not None:
            row |= dict(idle=idle, dropped=self.pool.dropped, restarts=self.pool.restarts,
                        position=self.pool.position)
        return row

    def write_samples(self, it, batch):
        """Held-out answers into samples.jsonl; one of them is printed."""
        prompts = [self.tok.decode(ids) for ids in batch.prompts]
        texts = [self.tok.decode(ids) for ids in batch.responses]
        print(f'sample: {prompts[0] + texts[0]!r}')
        if self.mesh.master:
            file = os.path.join(self.run.out_dir, 'samples.jsonl')
            with open(file, 'a', encoding='utf-8') as f:
                for prompt, text, score in zip(prompts, texts, batch.scores.tolist()):
                    row = dict(step=it, prompt=prompt, completion=text, score=score)
                    f.write(json.dumps(row) + '\n')


# -----------------------------------------------------------------------------------------------------------
# answers of one moment, for the evaluations of reward.py, dpo.py and kto.py


def answers_to(run, engine, prompts, max_new_tokens, temperature, seed=0):
    """Token ids of one answer to each prompt, in order, on every rank; each answers its share. Row i has
    seed + i."""
    mine = range(len(prompts))[run.mesh.slice_of(len(prompts))]
    params = infer.SamplingParams(max_tokens=max_new_tokens, temperature=temperature)
    params = [replace(params, seed=seed + i) for i in mine]
    done = engine.generate([prompts[i] for i in mine], params)
    return run.mesh.collect([c.token_ids for c in done], everyone=True)


class SampledKL:
    """KL(policy || reference) on the policy's own answers to `eval_samples` held-out prompts, always with the
    same seeds. Made before the policy is cut to ranks; a prompt that stands there twice is asked once."""

    def __init__(self, run, policy, tok, prompts):
        c = self.config = run.config
        self.run, self.tok = run, tok
        room = prompt_room(policy, c['max_new_tokens'])
        once = dict.fromkeys(tuple(prompt[-room:]) for prompt in prompts)
        self.prompts = [list(prompt) for prompt in once][:c['eval_samples']]
        self.engine = infer.Engine(parallel.sampler_of(policy, run.mesh), tok, max_num_seqs=64)

    def __call__(self, policy, frozen):
        """{'kl': nats a sequence, 'len': tokens of an answer}; prints the first. k3 of each token (see
        ppo.kl_estimate): unbiased, never negative. frozen: see reference_of."""
        temperature = self.config['temperature']
        parallel.refresh(self.engine, policy)
        answers = answers_to(self.run, self.engine, self.prompts, self.config['max_new_tokens'], temperature)
        groups = [(prompt, [answer]) for prompt, answer in zip(self.prompts, answers)]
        lengths = [len(prompt) + len(answer) for prompt, answer in zip(self.prompts, answers)]

        def logps(net, rows):
            return answer_logprobs(net, [groups[i] for i in rows], temperature)[0]  # 0 behind an end token
        own = self.run.each(policy, lengths, logps)
        with reference_of(policy, frozen) as reference:
            theirs = self.run.each(reference, lengths, logps)
        nats = 0.0
        for a, b in zip(own, theirs):
            nats += (torch.exp(b - a) - 1 + a - b).sum().item()
        print(f'  sample: {self.tok.decode(self.prompts[0] + answers[0])!r}')
        return dict(kl=nats / len(groups), len=sum(map(len, answers)) / len(answers))


# -----------------------------------------------------------------------------------------------------------
# conversations, and processes in which rewards and environments may hang


@dataclass
class Talk:
    """One conversation with an environment: what the policy said and the environment replied, as token ids
    behind the prompt. own: which of them the policy sampled; said: its turns as text."""
    number: int
    row: dict
    prompt: list
    seed: int
    ids: list = field(default_factory=list)
    logps: list = field(default_factory=list)
    own: list = field(default_factory=list)
    said: list = field(default_factory=list)
    reward: float = 0.0
    ended: bool = False
    failed: bool = False

    def say(self, completion, tok):
        """A turn of the policy's."""
        ids = completion.token_ids
        self.ids += ids
        self.logps += completion.logprobs
        self.own += [True] * len(ids)
        self.said.append(tok.decode(without_end(ids, tok)))

    def hear(self, ids):
        """A reply: nothing of it is trained on."""
        self.ids += ids
        self.logps += [0.0] * len(ids)
        self.own += [False] * len(ids)


def with_actors():
    """The module actors, imported where processes are wanted; its workers find this module imported."""
    import actors
    if not torch.cuda.is_available() and 'rollout' not in actors.PRELOAD:
        actors.PRELOAD.append('rollout')  # once for all workers; never with CUDA, before a fork
    return actors


class RewardPool:
    """Reward files and an environment in processes of their own, for answers that are sampled in this one:
    what they do there (hang, raise, fork, end the process) stays there. A call that fails, or is silent for
    reward_timeout s, is tried reward_retries times more, in a new process if need be; then it is dropped.
    `patience` failures one after the other end the run: then it is the file."""

    def __init__(self, run, files, env, patience):
        c = run.config
        self.actors = actors = with_actors()
        self.files = files
        self.env = env
        self.patience = patience
        self.timeout = c['reward_timeout']
        self.retries = c['reward_retries']
        self.dropped = self.in_a_row = 0
        self.why = ''  # of the last failure
        self.own = not actors.is_initialized()
        if self.own:
            actors.init(num_cpus=c['reward_workers'], num_gpus=0)
        paths = {name: os.path.abspath(name) for name in files}
        scorer = actors.remote(Scorer).options(num_cpus=0)
        env = os.path.abspath(env) if env else ''
        workers = range(c['reward_workers'])
        self.hands = [_Hand(lambda: scorer.remote(paths, run.tokenizer, env)) for _ in workers]

    def ask(self, method, jobs):
        """Scorer.method(*job) of each job, in order; None for one that was dropped."""
        found = [None] * len(jobs)
        tries = [0] * len(jobs)
        waiting = deque(range(len(jobs)))
        while waiting or any(hand.work for hand in self.hands):
            for k, hand in enumerate(self.hands):
                if hand.call is None and waiting:
                    # one that it may know from its last turn, else the next
                    number = next((i for i in waiting if i % len(self.hands) == k), waiting[0])
                    waiting.remove(number)
                    hand.work = [number]
                    hand.go(getattr(hand.actor, method).remote(*jobs[number]), self.timeout)
            calls = {hand.call: hand for hand in self.hands if hand.call is not None}
            wait = min(hand.deadline for hand in calls.values()) - time.monotonic()
            ready, _ = self.actors.wait(list(calls), num_returns=1, timeout=max(0.0, wait))
            for ref, hand in calls.items():
                if ref not in ready and time.monotonic() < hand.deadline:
                    continue
                work = hand.work
                result, why = self._outcome(hand, ref in ready)
                if work and not why:
                    self.in_a_row = 0
                    found[work[0]] = result
                elif work:
                    tries[work[0]] += 1
                    if tries[work[0]] <= self.retries:
                        waiting.append(work[0])
                    else:
                        self._drop(jobs[work[0]], tries[work[0]], why)
        return found

    def _outcome(self, hand, came):
        """(result, '') of a call, or (None, why it failed); a process that died or is silent is replaced."""
        try:
            if came:
                result = self.actors.get(hand.call)
                hand.call = None
                hand.work = []
                hand.deaths = 0
                return result, ''
            why = f'no answer for {hand.seconds:g} s'
        except self.actors.exceptions.RayActorError as e:
            why = str(e).strip().splitlines()[-1]
        except Exception as e:
            hand.call = None
            hand.work = []
            return None, str(e).strip().splitlines()[-1]
        self.actors.kill(hand.actor)
        hand.deaths += not hand.work
        if hand.deaths >= DEATHS:
            raise RuntimeError(f'a reward worker died {hand.deaths} times before it did anything: {why}')
        hand.start()
        return None, why

    def _drop(self, job, tries, why):
        self.dropped += 1
        self.in_a_row += 1
        self.why = why
        row = next(part for part in job if isinstance(part, dict))
        print(f'a prompt is dropped, its reward failed {tries} times: {why[:200]} (row {str(row)[:80]})')
        if self.in_a_row >= self.patience:
            raise ValueError(f'the reward failed for {self.in_a_row} prompts one after the other, at last '
                             f'with: {why}')

    def close(self):
        """Ends the processes, and the runtime if it was started here."""
        for hand in self.hands:
            self.actors.kill(hand.actor)
        if self.own:
            self.actors.shutdown()


# -----------------------------------------------------------------------------------------------------------
# rollouts ahead of the trainer
#
#     jobs (prompts in order) --capacity--> RolloutWorker x n -answers-> Scorer x m -> done -take()-> trainer
#                                                 ^                                                   |
#                                                 +---- weights, one object in the store - publish() +

SLICE = 0.05     # seconds that a worker samples before it looks for new prompts and weights
START = 300.0    # seconds that a worker may take to start
SILENCE = 120.0  # seconds without an answer after which a worker is taken for dead
DEATHS = 8       # replacements of one worker that did nothing in between: not bad luck any more, the run ends


@dataclass
class Rollout:
    """All answers to one prompt. number: its place in the order of prompts, `index`: its row. answers:
    [(token ids, log-probs they were sampled with, weight version of each, ended by itself)]. scores:
    {reward file: [float]}."""
    number: int
    index: int
    answers: list
    scores: dict


class RolloutWorker:
    """An engine in an actor. It works in slices, so new weights wait for a slice and never for the end of
    an answer: what is in flight is interrupted, its keys and values are computed again, it continues under
    the new weights; each token knows its version."""

    def __init__(self, model, tokenizer, device, **options):
        torch.set_num_threads(1)
        self.engine = infer.Engine(model.to(device), get_tokenizer(tokenizer), **options)
        self.open = {}  # number -> its requests

    def ready(self):
        """Answers once the process is up."""

    def run(self, jobs, version, weights, seconds):
        """Loads weights (a state dict, or with LoRA the adapter's part of one; None: all stays as it is),
        takes on jobs [(number, prompt ids, SamplingParams)], samples for `seconds` or until all is done. ->
        [(number, answers as in Rollout)] of the finished ones."""
        if weights is not None:
            weights = {**self.engine.model.state_dict(), **weights}
            self.engine.load_weights(weights, version, recompute=True)
        for number, prompt, params in jobs:
            self.open[number] = self.engine.submit(prompt, params)
        until = time.monotonic() + seconds
        while self.engine.has_unfinished() and time.monotonic() < until:
            self.engine.step()
        done = []
        for number, group in list(self.open.items()):
            if all(request.finish_reason for request in group):
                found = [request.completion() for request in self.open.pop(number)]
                answers = [(c.token_ids, c.logprobs, c.weight_versions, c.finish_reason == 'stop')
                           for c in found]
                done.append((number, answers))
        return done


class Scorer:
    """Reward files in an actor: what they do there (hang, raise, kill the process) stays there."""

    def __init__(self, files, tokenizer, env=''):
        """files {name in the log: path}, a path that holds in any process of any node; env: a path, too."""
        self.fns = {name: load_reward(path) for name, path in files.items()}
        self.tok = get_tokenizer(tokenizer)
        self.env = load_env(env) if env else None
        self.talks = {}  # number of a conversation -> (its Env, turns seen)

    def ready(self):
        """Answers once the process is up: from then on reward_timeout counts."""

    def score(self, row, answers):
        """{file: [float]} for answers, [token ids]. ValueError as in ask_reward."""
        texts = [self.tok.decode(without_end(ids, self.tok)) for ids in answers]
        found = {}
        for name, fn in self.fns.items():
            found[name] = [ask_reward(fn, name, row, text) for text in texts]
        return found

    def step(self, number, row, said):
        """(reply or None, reward or None) of conversation `number` to the last of what the policy said,
        [str]. A process that has not seen its beginning replays it."""
        env, seen = self.talks.pop(number, (None, 0))
        if env is None or seen != len(said) - 1:
            env = self.env()
            env.start(row)
            for text in said[:-1]:
                env.step(text)
        reply, reward = env.step(said[-1])
        if not (reply is None or isinstance(reply, str)) or not abs(reward or 0.0) < 3.4e38:
            raise ValueError(f'Env.step returned {(reply, reward)!r}: expected (text or None, a finite '
                             f'number or None)')
        if reply is not None:
            self.talks[number] = env, len(said)
            if len(self.talks) > 1000:  # of conversations that ended for want of room
                del self.talks[next(iter(self.talks))]
        return reply, reward


class _Hand:
    """An actor and what it does: call = the ref of the call in progress, None = idle; work = the groups it
    has; version = its weights'; deaths = how often it was replaced since it last did something."""

    def __init__(self, hire):
        self.hire = hire
        self.deaths = 0
        self.start()

    def start(self):
        self.actor = self.hire()
        self.work = []
        self.version = None
        self.up = False
        self.go(self.actor.ready.remote(), START)

    def go(self, ref, seconds):
        self.call = ref
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds


class Rollouts:
    """A stream of answered and scored prompts, for a trainer that does not wait for them.

    jobs(k) -> iterator of (row number, row, prompt ids, SamplingParams) from prompt k on, endless; `batch`
    of them are an update's. publish(state_dict, version) once before each update: the workers go on with
    these weights. take(n) -> the next n Rollouts, in the ORDER OF THE PROMPTS, so that a batch holds what
    it would hold in sync mode (first come, first trained would prefer short answers), and `position`, the
    number behind the last one taken, is all that a checkpoint needs: nothing is trained on twice, nothing is
    left out. Capacity, section 5.1 of the paper: prompts handed out <= taken + (max_staleness + 1) * batch
    at each publish, so no token that is taken is older than max_staleness versions; 0 = the workers sample
    with the weights of the update itself, as in sync mode. Faults: a worker that dies, or is silent for
    SILENCE seconds, is replaced and its unfinished prompts are sampled again (`restarts`); a reward that
    raises, hangs for reward_timeout s, is not finite or takes its process along is tried reward_retries
    times more, then the whole group is left out and the next one takes its place (`dropped`). runtime:
    'local', 'ray', or 'HOST:PORT' of a cluster."""

    def __init__(self, model, tokenizer, jobs, batch, rewards=(), max_staleness=1, rollout_workers=1,
                 reward_workers=1, reward_timeout=30.0, reward_retries=2, runtime='local', position=0,
                 device='cpu', **engine):
        self.actors = actors = with_actors()
        self.batch = batch
        self.max_staleness = max_staleness
        self.reward_timeout = reward_timeout
        self.retries = reward_retries
        self.position = self.next = position
        self.taken = self.limit = 0                   # limit: prompts handed out and not dropped, at most
        self.dropped = self.restarts = self.in_a_row = 0  # in_a_row: groups dropped since the last good one
        self.jobs = jobs(position)
        self.work = {}
        self.pending = []
        self.unscored = deque()
        self.done = {}
        self.tries = {}
        self.version = self.weights = self.error = None
        self.cv = threading.Condition()
        self.closed = False
        self.own = not actors.is_initialized()
        scorers = reward_workers if rewards else 0
        gpus = self._init(runtime, rollout_workers + scorers, device)
        files = {name: os.path.abspath(name) for name in rewards}  # a node has a working directory of its own
        tokenizer = os.path.abspath(tokenizer) if os.path.exists(tokenizer) else tokenizer
        share = dict(num_gpus=min(1, gpus / rollout_workers)) if gpus else {}
        worker = actors.remote(RolloutWorker).options(num_cpus=1, **share)
        scorer = actors.remote(Scorer).options(num_cpus=1)
        first = actors.put(model)
        place = 'cuda' if gpus else str(device)
        def roller():
            return worker.remote(first, tokenizer, place, **engine)
        self.rollers = [_Hand(roller) for _ in range(rollout_workers)]
        self.scorers = [_Hand(lambda: scorer.remote(files, tokenizer)) for _ in range(scorers)]
        self.hands = self.rollers + self.scorers
        self.size = engine.get('max_num_seqs', 256)
        self.thread = threading.Thread(target=self._pump, name='rollouts', daemon=True)
        self.thread.start()

    def _init(self, runtime, processes, device):
        """Starts or joins the runtime -> GPUs for the rollout workers: those that no trainer has, else they
        share theirs. The runtime reads CUDA_VISIBLE_DEVICES; torch in this process has its device already."""
        gpus = range(torch.cuda.device_count() if str(device).startswith('cuda') else 0)
        before = os.environ.get('CUDA_VISIBLE_DEVICES')
        ranks = int(os.environ.get('LOCAL_WORLD_SIZE', 1))  # torchrun's: rank i of this node has GPU i
        taken = range(ranks) if ranks > 1 else [torch.device(device).index or 0]
        free = [i for i in gpus if i not in taken] or list(gpus)
        if free:
            ids = before.split(',') if before else [str(i) for i in gpus]
            os.environ['CUDA_VISIBLE_DEVICES'] = ','.join(ids[i] for i in free)
        try:
            if self.own:
                self._start(runtime, processes, len(free))
        finally:
            if free and before is None:
                del os.environ['CUDA_VISIBLE_DEVICES']
            elif free:
                os.environ['CUDA_VISIBLE_DEVICES'] = before
        return len(free)

    def _start(self, runtime, processes, gpus):
        if runtime == 'local':
            self.actors.init(num_cpus=processes, num_gpus=gpus)
        elif runtime == 'ray':
            cpus = None if os.environ.get('RAY_ADDRESS') else processes  # a cluster has its own
            self.actors.init(backend='ray', include_dashboard=False, num_cpus=cpus)
        elif ':' in runtime:
            self.actors.init(address=runtime)
        else:
            raise ValueError(f"runtime {runtime!r}: expected 'local', 'ray' or HOST:PORT of python actors.py "
                             "--head=True")

    # ---- the trainer's side

    def publish(self, state, version):
        """New weights (a state dict) for all that is sampled from now on, answers in flight included."""
        weights = self.actors.put({name: x.detach().cpu() for name, x in state.items()})
        with self.cv:
            self.version = version
            self.weights = weights
            self.limit = self.taken + (self.max_staleness + 1) * self.batch
            self.cv.notify_all()

    def take(self, n, seconds=None):
        """Waits for the next n Rollouts; after so many seconds (None: no limit) it returns None instead.
        Raises what went wrong with the workers."""
        out = []
        with self.cv:
            self.limit = max(self.limit, self.taken + n)  # a second helping in one update (dynamic sampling)
            self.cv.notify_all()
            if not self.cv.wait_for(lambda: self.error is not None or self._ready() >= n, seconds):
                return None
            if self.error is not None:
                raise self.error
            while len(out) < n:
                group = self.done.pop(self.position)
                if group is not None:
                    out.append(group)
                    del self.work[self.position]
                    self.taken += 1
                self.position += 1
        return out

    def _ready(self):
        """How many Rollouts lie there in the order of the prompts."""
        numbers = itertools.takewhile(self.done.__contains__, itertools.count(self.position))
        return sum(self.done[number] is not None for number in numbers)

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

    # ---- the thread that keeps the workers busy

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
                wait = min(0.1, max(0.0, wait))
                ready, _ = self.actors.wait(list(calls), num_returns=1, timeout=wait)
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
        """Hands out prompts within the capacity, lowest number first, and gives every idle worker its next
        call."""
        with self.cv:
            while self._may_issue():
                self.work[self.next] = next(self.jobs)
                self.pending.append(self.next)
                self.next += 1
            version = self.version
            weights = self.weights
        for hand in self.rollers:
            if hand.call is None and (hand.work or self.pending):
                new = self._share(hand)
                fresh = weights if hand.version != version else None
                hand.version = version
                jobs = [(number, *self.work[number][2:]) for number in new]
                hand.go(hand.actor.run.remote(jobs, version, fresh, SLICE), SILENCE)
        for hand in self.scorers:
            if hand.call is None and self.unscored:
                hand.work = [self.unscored.popleft()]
                number, answers = hand.work[0]
                row = self.work[number][1]
                sampled = [ids for ids, *_ in answers]
                hand.go(hand.actor.score.remote(row, sampled), self.reward_timeout)

    def _share(self, hand):
        """Moves prompts from `pending` to a worker: an even share of all that is open, as many as its
        engine has rows for."""
        open_ = len(self.pending) + sum(len(other.work) for other in self.rollers)
        answers = self.work[(hand.work or self.pending)[0]][3].n
        most = min(-(-open_ // len(self.rollers)), max(1, self.size // answers))
        new = self.pending[:max(0, most - len(hand.work))]
        self.pending = self.pending[len(new):]
        hand.work += new
        return new

    def _collect(self, hand):
        """What a call came to."""
        try:
            result = self.actors.get(hand.call, timeout=SILENCE)
        except self.actors.exceptions.RayActorError as e:
            return self._replace(hand, str(e).strip().splitlines()[-1])
        except Exception as e:
            if hand in self.rollers or not hand.work:
                raise
            hand.call = None
            why = str(e).strip().splitlines()[-1]
            return self._again(hand.work.pop(), why)
        hand.call = None
        if not hand.up:  # it has started, that is all
            hand.up = True
            return
        hand.deaths = 0
        if hand in self.scorers:
            number, answers = hand.work.pop()
            return self._finish(number, Rollout(number, self.work[number][0], answers, result))
        for number, answers in result:
            hand.work.remove(number)
            if self.scorers:
                self.unscored.append((number, answers))
            else:
                self._finish(number, Rollout(number, self.work[number][0], answers, {}))

    def _finish(self, number, group):
        """A group is ready, or dropped (None). From here on it is the trainer's."""
        with self.cv:
            self.in_a_row = 0 if group is not None else self.in_a_row + 1
            self.tries.pop(number, None)
            self.done[number] = group
            if group is None:
                del self.work[number]
                self.dropped += 1
            self.cv.notify_all()

    def _again(self, work, why):
        """A reward failed: once more at the end of the line, or the group is dropped."""
        number = work[0]
        self.tries[number] = self.tries.get(number, 0) + 1
        if self.tries[number] <= self.retries:
            return self.unscored.append(work)
        row = self.work[number][0] + 1
        tries = self.tries[number]
        print(f'rollouts: prompt {number} (row {row}) is dropped, its reward failed {tries} times: '
              + why[:200])
        self._finish(number, None)
        if self.in_a_row >= max(16, self.batch):
            raise ValueError(f'the reward failed for {self.in_a_row} prompts one after the other, at last '
                             f'with: {why}')

    def _replace(self, hand, why):
        """Another actor takes the place of one that died or fell silent, and its work."""
        self.actors.kill(hand.actor)
        work = hand.work
        hand.start()
        if hand in self.scorers and work:
            return self._again(work[0], why)
        hand.deaths += 1
        if hand.deaths >= DEATHS:
            kind = 'rollout' if hand in self.rollers else 'reward'
            raise RuntimeError(f'a {kind} worker died {hand.deaths} times before it did anything: {why}')
        self.restarts += 1
        print(f'rollouts: a worker was replaced ({why[:200]}), {len(work)} prompts start again', flush=True)
        self.pending = sorted(work + self.pending)
