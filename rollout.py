"""What RL stages share: prompts, answers of the policy (now, stale or ahead), rewards, the batch.

    train, val, longest = load_prompts(run, tok, context)
    rewards = Rewards(run, tok, longest)              # --reward=a.py,out-reward --reward_weights=1,0.5
    answers = Answers(run, policy, tok, train, longest, group_size=8)
    answers.start(policy, reference, rewards)         # the policy as it is trained
    batch = answers.next(it)                          # B answers in whatever mode: see Batch
    total, each = rewards(batch)                      # (B,) and {'a.py': (B,), 'out-reward': (B,)}
    logp, entropy, _ = answers.logprobs(policy, batch[rows])    # (b, r), with gradient

Asynchronous rollouts, the second half of the file, follow AReaL (2505.24298): engines in actors run ahead of
the trainer.
"""
import contextlib
import copy
import itertools
import json
import math
import os
import threading
import time
from collections import deque
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch

import infer
import lora
import parallel
from dataset import pad
from model import all_rewards, answer_logprobs, answer_values
from run import check_fit, encode_all, load_function, load_model, prompt_room, reference_of
from tokenizer import encode_prompt, encode_row, get_tokenizer

# -----------------------------------------------------------------------------------------------------------
# prompts


def load_prompts(run, tok, context):
    """(training items, held-out items, longest) of rows {"prompt", ...}: items [(row, prompt ids)], longest:
    tokens of a prompt and its answer at most. A prompt that leaves no room in a context of so many tokens is
    an error, dropped, or cut: it loses its beginning. ValueError where max_new_tokens leaves no room."""
    c = run.config
    room = context - c['max_new_tokens']
    if room < 1:
        raise ValueError(f'max_new_tokens {c["max_new_tokens"]} leaves no room for a prompt in block_size '
                         f'{context}: lower it')
    room = min(c['max_prompt'] or room, room)
    way = c['long_prompts']
    started = started_by(c.get('env'))

    def read(row):
        row = started(row)
        if 'prompt' not in row:
            raise ValueError(f'no "prompt", it has {sorted(row)}')
        ids = encode_prompt(row, tok)
        if not ids:
            raise ValueError('empty prompt')
        if len(ids) <= room:
            return [(row, ids)], ''
        if way == 'error':
            raise ValueError(f'prompt of {len(ids)} tokens, block_size minus max_new_tokens leaves {room}: '
                             f'lower --max_new_tokens, or --long_prompts=drop or cut')
        return [(row, ids[-room:])] * (way == 'cut'), f'prompts over {room} tokens, {way}'
    names = c['dataset'], c['val_dataset'] or c['dataset']
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
    paid: torch.Tensor = None  # (B, R): by reward files that pay for steps; NaN = no step ends here
    given: dict = None  # {reward file or environment: (B,) or, by steps, (B, R)}; not in parts of a batch

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
    """The function `reward(prompt, completion: str, row: dict) -> float` of a Python file of the user's, or
    -> a list, one number for each step: a turn where there is an environment, else a line that is not blank.
    prompt is the row's own: a string, or the list of messages. ValueError: see load_function."""
    return load_function(path, 'reward', 'reward(prompt, completion, row) -> float')


def ask_reward(fn, name, row, text):
    """The reward of one completion, a float that float32 can hold, or a list of them. ValueError names the
    file, what it did, and the row."""
    seen = f'for completion {text[:60]!r} of row {str(row)[:120]}'
    try:
        mark = fn(row['prompt'], text, row)
        mark = [float(x) for x in mark] if isinstance(mark, list) else float(mark)
    except Exception as e:
        raise ValueError(f'reward {name} raised {type(e).__name__}: {e}, {seen}') from e
    for x in mark if isinstance(mark, list) else [mark]:
        if not abs(x) < 3.4e38:  # nan, too
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


def started_by(path):
    """The function row -> the row with the prompt that the environment in a file starts with; '' = none."""
    env = load_env(path) if path else None

    def started(row):
        try:
            return dict(row, prompt=env().start(row)) if env else row
        except Exception as e:
            raise ValueError(f'env {path}: start raised {type(e).__name__}: {e}') from e
    return started


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


def line_ends(ids, tok):
    """Where the lines of an answer end that are not blank, [int]: their last tokens. The end token and blank
    lines belong to the line before. 'a b', newline, 'c' -> of the tokens 'a', ' b', newline, 'c' 2 and 3."""
    ends = []
    text = ''
    for i, token in enumerate(without_end(ids, tok)):
        text = (text + tok.decode([token])).lstrip()
        if '\n' in text:
            ends.append(i)
            text = ''
    if text or not ends:
        ends.append(0)
    ends[-1] = len(ids) - 1
    return ends


def at_tokens(name, paid, ends):
    """What a reward file pays for the steps that end at these tokens -> what it pays at each token, NaN where
    no step ends."""
    paid = paid if isinstance(paid, list) else [paid]
    if len(paid) != len(ends):
        raise ValueError(f'reward {name} returned {len(paid)} numbers for an answer of {len(ends)} steps '
                         f'(turns; without an environment, lines that are not blank): one each')
    found = [math.nan] * (ends[-1] + 1)
    for i, x in zip(ends, paid):
        found[i] = x
    return found


def as_trained(row, text, ended, tok):
    """Token ids of a prompt with an answer as a reward model's training reads the row, with the end token
    where the answer ended."""
    ids, _ = encode_row(dict(row, completion=text, messages=None), tok)
    return ids if ended else ids[:-1]


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
        weights = []
    if len(weights) != len(names):
        raise ValueError(f'reward_weights {text!r}: numbers, separated by commas, one weight each for '
                         f'{", ".join(names)}')
    return weights


class Rewards:
    """Reward files, an environment and reward models, several by comma, added up with one weight each.

    What files and the environment pay comes with the answers, see Pool. A model reads prompt and answer in
    its own tokens, as in its training; of several ranks each scores its share. longest: tokens of a prompt
    and its answer at most."""

    def __init__(self, run, tok, longest):
        self.run = run
        self.tok = tok
        spec = run.config['reward']
        self.env = run.config.get('env', '')
        self.names = names_of(spec) if spec or not self.env else []
        self.files = []
        self.models = {}    # {name: (model, its tokenizer)}
        self.same_ids = []  # those whose token ids are the policy's
        for name in self.names:
            if name.endswith('.py'):
                load_reward(name)  # a slip in it is told now
                self.files.append(name)
                continue
            model, tokenizer = load_model(name, run.device, head='scalar')
            own = get_tokenizer(tokenizer)
            self.models[name] = model.requires_grad_(False).eval(), own
            run.memory['reward'] += sum(p.nbytes for p in model.parameters())
            if (own.spec, own.eot) == (tok.spec, tok.eot):
                check_fit(model, f'reward {name}', tok, longest)
                self.same_ids.append(name)
        if self.env:
            self.names.insert(0, self.env)
        self.weights = weights_of(run.config.get('reward_weights', ''), self.names)

    def __call__(self, batch):
        """-> (total (B,) float32, {name: (B,)}), on the CPU. What is paid for steps adds up, and stands by
        its tokens in batch.paid."""
        each = dict(batch.given or {})
        share = range(len(batch))[self.run.mesh.slice_of(len(batch))]
        for name in self.models:
            scores = self._scores(name, batch[share]) if share else []
            scores = self.run.mesh.collect(scores, everyone=True)
            each[name] = torch.tensor(scores, dtype=torch.float32)
        total = 0.0
        for name, weight in zip(self.names, self.weights):
            if each[name].dim() == 2:
                batch.paid = weight * each[name] + (0.0 if batch.paid is None else batch.paid)
                each[name] = each[name].nansum(1)
            total = total + weight * each[name]
        return total, each

    def _scores(self, name, batch):
        model, tok = self.models[name]
        sequences = [prompt + answer for prompt, answer in zip(batch.prompts, batch.responses)]
        if name not in self.same_ids:  # other tokens: the row as the reward model's training read it
            for i, answer in enumerate(batch.responses):
                text = self.tok.decode(without_end(answer, self.tok))
                sequences[i] = as_trained(batch.rows[i], text, batch.ended[i], tok)
            check_fit(model, f'reward {name}', tok, max(map(len, sequences)))
        with self.run.amp():
            scores = all_rewards(model, sequences, self.run.config['micro_tokens'])
        if not scores.isfinite().all():
            bad = scores[~scores.isfinite()][0].item()
            raise ValueError(f'reward model {name} returned {bad}: its weights are broken; train it again')
        return scores.tolist()


# -----------------------------------------------------------------------------------------------------------
# answers


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
        stop = list(getattr(load_env(c['env']), 'stop', ())) if c.get('env') else None
        self.params = infer.SamplingParams(max_tokens=c['max_new_tokens'], temperature=c['temperature'],
                                           stop=stop)
        self.options = dict(max_num_seqs=c['max_num_seqs'], max_len=longest)
        self.stale = c['simulate_staleness']
        self.ahead = c['mode'] == 'async' and not self.stale and not c['eval_only']  # do others sample?
        self.pool = None
        if self.stale:
            self.sampler = copy.deepcopy(policy).to(run.dtype).requires_grad_(False)
        else:
            self.sampler = parallel.sampler_of(policy, run.mesh, run.dtype, c['rollout_tp'])

    def start(self, policy, reference, rewards):
        """policy: as it is trained. reference: a frozen model, or None: then it is the policy without its
        adapter."""
        c, run = self.config, self.run
        self.policy = policy
        self.reference = reference
        room = run.kv_memory(max(c['micro_tokens'], self.options['max_len']), self.options['max_len'])
        # do the workers have this card too?
        shared = self.ahead and (torch.device(self.device).index or 0) in free_gpus(self.device)
        if shared:
            room //= 1 + c['rollout_workers']
        self.engine = infer.Engine(self.sampler, self.tok, kv_memory=room, **self.options)
        run.cursor = self
        self.position = run.ckpt['data']['position'] if run.ckpt else 0
        self.jobs = self._jobs(self.position)
        if self.stale:
            self.past = run.extra['past'] = run.ckpt.get('past', []) if run.ckpt else []
        workers = {key: c[key] for key in ('reward_workers', 'reward_timeout', 'reward_retries')}
        workers |= dict(files=rewards.files, env=rewards.env, max_turns=c.get('max_turns', 1),
                        patience=max(16, self.need))
        if self.ahead and self.mesh.master:
            model = copy.deepcopy(self.sampler).cpu().requires_grad_(False)
            own = {key: c[key] for key in ('max_staleness', 'rollout_workers', 'runtime')}
            self.pool = Rollouts(model, run.tokenizer, self._jobs, self.need, position=self.position,
                                 device=self.device, **own, **workers,
                                 engine=dict(self.options, kv_memory=room if shared else 0))
        self.here = Pool(self.tok, **workers)  # behind Rollouts, whose runtime it joins

    def state_dict(self):
        """For a checkpoint: how many prompts we have used. Those that run ahead of the loop are sampled
        again."""
        return dict(position=(self.pool or self).position)

    def memory(self):
        """{what: bytes} that the sampling side holds, for Run.plan."""
        found = dict(kv=self.engine.kv_bytes)  # what it took, which may be less than it could use
        if self.sampler is not getattr(self.policy, 'body', self.policy):
            weights = sum(p.nbytes for p in self.sampler.parameters())
            found['sampler'] = (1 + self.stale) * weights
        return found

    def close(self):
        """Ends the other processes."""
        for pool in filter(None, (self.here, self.pool)):
            pool.close()

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
        """The next Batch of need * group_size answers, sampled with the weights before update `it`, or older
        ones. again: a second helping for the same update (dynamic sampling)."""
        if not again:
            self._publish(it)
        groups = self._take() if self.ahead else []
        while len(groups) < self.need:  # the next prompts take the place of those whose reward failed
            missing = self.need - len(groups)
            jobs = list(itertools.islice(self.jobs, missing))
            groups += self._answer(jobs, it - min(it, self.stale))
            self.position += missing
        return self._batch(groups, it)

    def _take(self):
        """The next Groups, on every rank. Rank 0 waits for them and says so now and then, since a rank that
        is silent for dist_timeout seconds is taken for dead."""
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
                             + self.here.why)
        return self._batch(groups, 0)

    def _publish(self, it):
        """The weights before update `it` go to whoever samples; with simulated staleness older ones do."""
        if self.ahead:
            travels = lora.is_adapter if self.run.lora else None
            state = parallel.full_state(self.policy, only_master=True, keep=travels)
            if self.pool is not None:
                self.pool.publish(state, it)
        elif self.stale:
            self.past.append({name: x.clone() for name, x in parallel.full_state(self.policy).items()})
            del self.past[:-self.stale - 1]
            self.engine.load_weights(self.past[0])
        else:
            parallel.refresh(self.engine, self.policy)

    def _answer(self, jobs, version):
        """The Groups of jobs, by the engine here; those that were dropped are left out. Each rank (with
        rollout_tp each team) answers its share, all get all."""
        mine = jobs[self.mesh.slice_of(len(jobs), self.team)]
        groups = self.here.answer(mine, self.engine, version)
        groups = self.mesh.collect(groups, everyone=True, team=self.team)
        return [group for group in groups if group is not None]

    def _batch(self, groups, it):
        """The Batch of Groups for update `it`."""
        answers = [answer for group in groups for answer in group.answers]
        rows, index, prompts = [], [], []
        for group in groups:
            n = len(group.answers)
            rows += [group.row] * n
            index += [group.index] * n
            prompts += [group.prompt] * n
        mask, _ = pad([answer.own for answer in answers], False)
        sampled, _ = pad([answer.logps for answer in answers], 0.0)
        ages, _ = pad([[it - version for version in answer.versions] for answer in answers])
        mask, sampled, ages = (x.to(self.device) for x in (mask, sampled, ages))
        ended = torch.tensor([answer.ended for answer in answers])
        replied = [len(answer.own) - sum(answer.own) for answer in answers]
        batch = Batch(rows, index, prompts, [answer.ids for answer in answers], ended, mask, sampled, ages,
                      replied, given={})
        for name in groups[0].marks:
            marks = [mark for group in groups for mark in group.marks[name]]
            if any(isinstance(mark, list) for mark in marks):
                ends = [answer.ends for answer in answers]
                if not self.config.get('env'):
                    ends = [line_ends(answer.ids, self.tok) for answer in answers]
                marks, _ = pad([at_tokens(name, *each) for each in zip(marks, ends)], math.nan)
            batch.given[name] = torch.as_tensor(marks, dtype=torch.float32)
        return batch

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
        """Log-probs and entropies of a micro-batch at the temperature that it was sampled with, (b, r), and
        its mask."""
        with self.run.amp():
            return answer_logprobs(model, micro.groups(), self.params.temperature)

    def values(self, model, micro):
        """The value before each token of a micro-batch, (b, r), and its mask."""
        with self.run.amp():
            return answer_values(model, micro.groups())

    def all_logprobs(self, model, batch, minibatches):
        """Log-probs of all answers (B, R), without gradient."""
        return self._all(self.logprobs, model, batch, minibatches)

    def reference_logprobs(self, batch, minibatches):
        """The same under the reference."""
        with reference_of(self.policy, self.reference) as model:
            return self._all(self.logprobs, model, batch, minibatches)

    def all_values(self, model, batch, minibatches):
        """Values of all answers (B, R), without gradient."""
        return self._all(self.values, model, batch, minibatches)

    def _all(self, fn, model, batch, minibatches):
        """What fn finds first for all rows of the minibatches -> (B, R), 0 elsewhere, the same on every rank.
        They are cut as the update will cut them, so that its first ratios are 1 to the bit."""
        out = torch.zeros(batch.mask.shape, device=self.device)
        for rows in minibatches:
            micros, _ = self.micro_batches(batch, rows)
            found = parallel.evaluate(model, micros, lambda model, micro: fn(model, batch[micro])[0])
            for micro, x in self.mesh.collect(list(zip(micros, found))):
                out[micro, :x.shape[1]] = x.to(out)
        return out

    # ---- what is said of a batch

    def lag(self, batch, idle):
        """Asynchronous rollouts in a row of the log; idle: the share of the time that the trainer waited
        for samples."""
        if self.config['mode'] == 'sync':
            return dict(dropped=self.here.dropped) if self.here.dropped else {}
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
# one prompt: its answers turn by turn, and their marks


@dataclass
class Answer:
    """One answer in the making; one entry a token but for `ends`, `said` and `ended`."""
    ids: list = field(default_factory=list)
    logps: list = field(default_factory=list)
    versions: list = field(default_factory=list)
    own: list = field(default_factory=list)       # True: the policy's, False: an environment's
    ends: list = field(default_factory=list)      # the last token of each of the policy's turns
    said: list = field(default_factory=list)      # these turns as text
    ended: bool = False                           # by itself

    def say(self, turn, tok):
        """A turn of the policy's, an infer.Completion."""
        self.ids += turn.token_ids
        self.logps += turn.logprobs
        self.versions += turn.weight_versions
        self.own += [True] * len(turn.token_ids)
        self.ends.append(len(self.ids) - 1)
        self.said.append(tok.decode(without_end(turn.token_ids, tok)))
        self.ended = turn.finish_reason == 'stop'  # with an end token or a stop string

    def hear(self, ids):
        """A reply: nothing of it is trained on."""
        self.ids += ids
        self.logps += [0.0] * len(ids)
        self.versions += self.versions[-1:] * len(ids)
        self.own += [False] * len(ids)


@dataclass
class Group:
    """A prompt and the answers to it. marks: {reward file or environment: one of each answer}."""
    number: int  # its place in the order of prompts
    index: int   # of its row
    row: dict
    prompt: list
    params: infer.SamplingParams
    answers: list = None
    marks: dict = field(default_factory=dict)
    talk: object = None  # the generator `converse`, while it goes on
    asks: tuple = ()     # what it asks
    tries: int = 0       # how often that failed


def converse(group, tok, env, max_turns, files):
    """How the answers of a group come about: a generator of questions. Whoever drives it sends the answers,
    so that it is the same whether they come from this process or from others, at once or in slices.

        ('sample', [(token ids, SamplingParams)])            -> [infer.Completion] of each sample
        ('step', number, row, [(answer, its turns as text)]) -> [(reply, reward)], see Scorer
        ('score', row, [text])                               -> {reward file: marks}

    env: its name, '' = none; then there is one turn. max_tokens of group.params holds turns and replies."""
    params = group.params
    chat = not isinstance(group.row['prompt'], str)
    group.answers = [Answer() for _ in range(params.n)]
    live = list(range(params.n))
    paid = [0.0] * params.n
    asked = [(group.prompt, params)]
    for turn in itertools.count(1):
        turns = yield 'sample', asked
        for i, said in zip(live, turns):
            group.answers[i].say(said, tok)
        if not env:
            break
        steps = yield 'step', group.number, group.row, [(i, group.answers[i].said) for i in live]
        before = live
        live = []
        asked = []
        for i, (reply, reward) in zip(before, steps):
            answer = group.answers[i]
            paid[i] += reward or 0.0
            more = answer.ended and reply is not None and turn < max_turns
            answer.ended = answer.ended and reply is None
            if not more:
                continue
            ids = encode_reply(tok, reply, chat, answer.ids[-1] in tok.stop_ids)
            left = params.max_tokens - len(answer.ids) - len(ids)
            if left > 0:
                answer.hear(ids)
                live.append(i)
                seed = (params.seed * 31 + i + 7919 * turn) % (1 << 31)
                how = replace(params, n=1, max_tokens=left, seed=seed)
                asked.append((group.prompt + answer.ids, how))
        if not live:
            break
    if env:
        group.marks[env] = paid
    if files:
        texts = [tok.decode(without_end(answer.ids, tok)) for answer in group.answers]
        group.marks |= yield 'score', group.row, texts


class Scorer:
    """Reward files and an environment, by paths. In an actor what they do (hang, raise, fork, end the
    process) stays there."""

    def __init__(self, files, env):
        self.fns = {name: load_reward(path) for name, path in files.items()}
        self.env = load_env(env) if env else None
        self.talks = {}  # number of a group -> {answer: (its Env, row, turns that it has seen)}

    def ready(self):
        """True once the process is up: from then on reward_timeout counts."""
        return True

    def score(self, row, texts):
        """{file: marks} of answers. ValueError as in ask_reward."""
        found = {}
        for name, fn in self.fns.items():
            found[name] = [ask_reward(fn, name, row, text) for text in texts]
        return found

    def step(self, number, row, talks):
        """[(reply or None, reward or None)] to the last of what the policy said in each of these answers of
        group `number`, [(answer, [str])]. A process that has not seen a beginning replays it."""
        known = self.talks.pop(number, {})
        found = []
        for i, said in talks:
            env, *seen = known.pop(i, (None,))
            if seen != [row, said[:-1]]:
                env = self.env()
                env.start(row)
                for text in said[:-1]:
                    env.step(text)
            reply, reward = env.step(said[-1])
            if not (reply is None or isinstance(reply, str)) or not abs(reward or 0.0) < 3.4e38:
                raise ValueError(f'Env.step returned {(reply, reward)!r}: expected (text or None, a finite '
                                 f'number or None)')
            found.append((reply, reward))
            if reply is not None:
                known[i] = env, row, said[:]
        self.talks[number] = known
        if len(self.talks) > 1000:  # the oldest have ended
            del self.talks[next(iter(self.talks))]
        return found


# -----------------------------------------------------------------------------------------------------------
# who works on groups

START = 300.0    # seconds that a worker may take to start
SILENCE = 120.0  # seconds without an answer after which a rollout worker is taken for dead
DEATHS = 8       # replacements of one worker that did nothing in between: not bad luck any more, the run ends


def start_runtime(runtime, processes, gpus=()):
    """Starts or joins what so many workers run in -> (the module actors, whether it was started here). It is
    imported where processes are wanted; they find this module imported."""
    import actors
    if not torch.cuda.is_available() and 'rollout' not in actors.PRELOAD:
        actors.PRELOAD.append('rollout')  # once for all workers; never with CUDA, before a fork
    if actors.is_initialized():
        return actors, False
    with only(gpus):
        if runtime == 'local':
            actors.init(num_cpus=processes, num_gpus=len(gpus))
        elif runtime == 'ray':
            cpus = None if os.environ.get('RAY_ADDRESS') else processes  # a cluster has its own
            actors.init(backend='ray', include_dashboard=False, num_cpus=cpus)
        elif ':' in runtime:
            actors.init(address=runtime)
        else:
            raise ValueError(f"runtime {runtime!r}: expected 'local', 'ray' or HOST:PORT of python actors.py "
                             "--head=True")
    return actors, True


class _Hand:
    """An actor and what it does: call = the ref of the call in progress, None = idle; work = the numbers of
    the groups it has; version = its weights'; deaths = how often it was replaced since it last did
    something."""

    def __init__(self, hire):
        self.hire = hire
        self.deaths = 0
        self.start()

    def start(self):
        self.actor = self.hire()
        self.work = []
        self.version = None
        self.go(self.actor.ready.remote(), START)

    def go(self, ref, seconds):
        self.call = ref
        self.seconds = seconds
        self.deadline = time.monotonic() + seconds


class Pool:
    """Groups under way, and reward workers: processes for what reward files and environments may do. A call
    that fails, or is silent for reward_timeout s, is tried reward_retries times more, in a new process if
    need be; then its group is dropped. `patience` groups dropped one after the other end the run: then it is
    the file. reward_workers=0: files and environment are asked in this process, without limits."""

    def __init__(self, tok, files=(), env='', max_turns=1, reward_workers=0, reward_timeout=30.0,
                 reward_retries=2, patience=16):
        self.tok = tok
        self.way = env, max_turns, list(files)
        self.timeout = reward_timeout
        self.retries = reward_retries
        self.patience = patience
        self.dropped = self.restarts = self.in_a_row = 0  # in_a_row: groups dropped since the last good one
        self.why = ''             # of the last failure
        self.open = {}            # number -> Group under way
        self.pending = []         # numbers of those that wait for a sampler
        self.unscored = deque()   # and for a reward worker
        self.done = {}            # number -> Group, or None: dropped
        self.scorers = []
        self.own = False
        paths = {name: os.path.abspath(name) for name in files}  # a node has a working directory of its own
        env = os.path.abspath(env) if env else ''
        if not reward_workers:
            self.here = Scorer(paths, env)
        elif files or env:
            self.actors, self.own = start_runtime('local', reward_workers)
            scorer = self.actors.remote(Scorer).options(num_cpus=0)
            self.scorers = [_Hand(lambda: scorer.remote(paths, env)) for _ in range(reward_workers)]
        self.hands = list(self.scorers)

    def answer(self, jobs, engine, version=0):
        """The groups of jobs [(row number, row, prompt ids, SamplingParams)], None for one that was dropped,
        sampled by an engine in this process: all turns that are asked for, then all replies to them."""
        for number, job in enumerate(jobs):
            self._begin(number, job)
        while self.open:
            numbers, self.pending = self.pending, []
            asked = [ask for number in numbers for ask in self.open[number].asks[1]]
            done = engine.generate([ids for ids, _ in asked], [params for _, params in asked])
            for turn in done:
                turn.weight_versions = [version] * len(turn.token_ids)
            turns = iter(done)
            for number in numbers:
                n = sum(params.n for _, params in self.open[number].asks[1])
                self._tell(number, list(itertools.islice(turns, n)))
            while self.unscored or any(hand.work for hand in self.scorers):
                self._work(START)
        return [self.done.pop(number) for number in range(len(jobs))]

    def close(self):
        """Ends the processes, and the runtime if it was started here."""
        for hand in self.hands:
            self.actors.kill(hand.actor)
        if self.own:
            self.actors.shutdown()

    def _begin(self, number, job):
        group = self.open[number] = Group(number, *job)
        group.talk = converse(group, self.tok, *self.way)
        self._tell(number, None)

    def _tell(self, number, found):
        """What a group has asked for; its next question waits for the sampler or a reward worker."""
        group = self.open[number]
        try:
            group.asks = group.talk.send(found)
        except StopIteration:
            group.talk = None
            return self._finish(number, group)
        group.tries = 0
        kind, *about = group.asks
        if kind == 'sample':
            self.pending.append(number)
        elif self.scorers:
            self.unscored.append(number)
        else:
            self._tell(number, getattr(self.here, kind)(*about))

    def _finish(self, number, group):
        """A group is ready, or dropped (None)."""
        del self.open[number]
        self.done[number] = group
        self.in_a_row = 0 if group is not None else self.in_a_row + 1

    def _work(self, seconds):
        """Gives every idle reward worker its next call, and waits for the end of a call, for so many seconds
        at most."""
        for k, hand in enumerate(self.scorers):
            if hand.call is None and self.unscored:
                # one that it may know from its last turn, else the next
                mine = [number for number in self.unscored if number % len(self.scorers) == k]
                hand.work = (mine or [*self.unscored])[:1]
                self.unscored.remove(hand.work[0])
                kind, *about = self.open[hand.work[0]].asks
                hand.go(getattr(hand.actor, kind).remote(*about), self.timeout)
        calls = {hand.call: hand for hand in self.hands if hand.call is not None}
        left = min(hand.deadline for hand in calls.values()) - time.monotonic()
        ready, _ = self.actors.wait(list(calls), num_returns=1, timeout=min(seconds, max(0.0, left)))
        for ref, hand in calls.items():
            if ref in ready or time.monotonic() > hand.deadline:
                self._collect(hand, ref in ready)

    def _collect(self, hand, came):
        """What a call came to. A process that died or is silent is replaced, and its work is done again."""
        scorer = hand in self.scorers
        result, why = None, '' if came else f'no answer for {hand.seconds:g} s'
        try:
            if came:
                result = self.actors.get(hand.call)
        except Exception as e:
            came = not isinstance(e, self.actors.exceptions.RayActorError)
            if came and not (scorer and hand.work):
                raise
            why = str(e).strip().splitlines()[-1]  # without the traceback of the process it happened in
        work = hand.work
        hand.call = None
        if not came:
            self.actors.kill(hand.actor)
            hand.start()
        elif work:
            hand.deaths = 0
        if scorer and work:
            hand.work = []
            self._failed(work[0], why) if why else self._tell(work[0], result)
        elif not came:
            hand.deaths += 1
            if hand.deaths >= DEATHS:
                kind = 'reward' if scorer else 'rollout'
                raise RuntimeError(f'a {kind} worker died {hand.deaths} times before it did anything: {why}')
            self.restarts += 1
            print(f'a worker was replaced ({why[:200]}), {len(work)} prompts start again', flush=True)
            self.pending += work
        elif work:
            for number, turns in result:
                hand.work.remove(number)
                self._tell(number, turns)

    def _failed(self, number, why):
        """A reward failed: once more at the end of the line, or the group is dropped."""
        group = self.open[number]
        group.tries += 1
        if group.tries <= self.retries:
            return self.unscored.append(number)
        print(f'a prompt is dropped, its reward failed {group.tries} times: {why[:200]} (row '
              f'{str(group.row)[:80]})')
        self.dropped += 1
        self.why = why
        self._finish(number, None)
        if self.in_a_row >= self.patience:
            raise ValueError(f'the reward failed for {self.in_a_row} prompts one after the other, at last '
                             f'with: {why}')


# -----------------------------------------------------------------------------------------------------------
# rollouts ahead of the trainer
#
#     jobs (prompts in order) --capacity--> RolloutWorker x n -turns-> Scorer x m -> done -take()-> trainer
#                                             ^          ^---- replies ---+                          |
#                                             +---- weights, one object in the store - publish() ----+

SLICE = 0.05     # seconds that a worker samples before it looks for new prompts and weights


class RolloutWorker:
    """An engine in an actor. It works in slices, so new weights wait for a slice and never for the end of
    an answer: what is in flight is interrupted, its keys and values are computed again, it continues under
    the new weights; each token knows its version."""

    def __init__(self, model, tokenizer, device, **options):
        torch.set_num_threads(1)
        self.engine = infer.Engine(model.to(device), get_tokenizer(tokenizer), **options)
        self.open = {}  # number of a group -> its requests

    def ready(self):
        """True once the process is up."""
        return True

    def run(self, jobs, version, weights, seconds):
        """Loads weights (a state dict, or with LoRA the adapter's part of one; None: all stays as it is),
        takes on jobs [(number, [(ids, SamplingParams)])], samples for `seconds` or until all is done. ->
        [(number, [infer.Completion])] of the finished ones."""
        if weights is not None:
            weights = {**self.engine.model.state_dict(), **weights}
            self.engine.load_weights(weights, version, recompute=True)
        for number, asked in jobs:
            self.open[number] = [x for ids, params in asked for x in self.engine.submit(ids, params)]
        until = time.monotonic() + seconds
        while self.engine.has_unfinished() and time.monotonic() < until:
            self.engine.step()
        done = []
        for number, requests in list(self.open.items()):
            if all(request.finish_reason for request in requests):
                done.append((number, [request.completion() for request in self.open.pop(number)]))
        return done


class Rollouts(Pool):
    """A stream of answered and scored prompts, for a trainer that does not wait for them.

    jobs(k) -> iterator of (row number, row, prompt ids, SamplingParams) from prompt k on, endless; `batch`
    of them are an update's. publish(state_dict, version) once before each update: the workers go on with
    these weights. take(n) -> the next n Groups, in the ORDER OF THE PROMPTS, so that a batch holds what
    it would hold in sync mode (first come, first trained would prefer short answers), and `position`, the
    number behind the last one taken, is all that a checkpoint needs: nothing is trained on twice, nothing is
    left out. Capacity, section 5.1 of the paper: prompts handed out <= taken + (max_staleness + 1) * batch
    at each publish, so no token that is taken is older than max_staleness versions; 0 = the workers sample
    with the weights of the update itself, as in sync mode. A worker that dies, or is silent for SILENCE
    seconds, is replaced and its unfinished turns are sampled again (`restarts`); where a reward fails, the
    next prompt takes the place of the group. runtime: 'local', 'ray', or 'HOST:PORT' of a cluster. engine:
    options of infer.Engine. The rest: see Pool."""

    def __init__(self, model, tokenizer, jobs, batch, max_staleness=1, rollout_workers=1, runtime='local',
                 position=0, device='cpu', engine=None, **pool):
        self.batch = batch
        self.max_staleness = max_staleness
        self.position = self.next = position
        self.taken = self.limit = 0  # limit: prompts handed out and not dropped, at most
        self.jobs = jobs(position)
        self.version = self.weights = self.error = None
        self.cv = threading.Condition()
        self.closed = False
        free = free_gpus(device)
        gpus = len(free)
        processes = rollout_workers + pool.get('reward_workers', 0)
        actors, own = start_runtime(runtime, processes, free)
        super().__init__(get_tokenizer(tokenizer), **pool)
        self.actors, self.own = actors, own
        tokenizer = os.path.abspath(tokenizer) if os.path.exists(tokenizer) else tokenizer
        share = dict(num_gpus=min(1, gpus / rollout_workers)) if gpus else {}
        worker = actors.remote(RolloutWorker).options(num_cpus=1, **share)
        first = actors.put(model)
        place = 'cuda' if gpus else str(device)
        options = engine or {}
        self.size = options.get('max_num_seqs', 256)

        def roller():
            return worker.remote(first, tokenizer, place, **options)
        self.rollers = [_Hand(roller) for _ in range(rollout_workers)]
        self.hands += self.rollers
        self.thread = threading.Thread(target=self._pump, name='rollouts', daemon=True)
        self.thread.start()

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
        """Waits for the next n Groups; after so many seconds (None: no limit) it returns None instead.
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
                self.position += 1
                if group is not None:
                    out.append(group)
                    self.taken += 1
        return out

    def _ready(self):
        """How many Groups lie there in the order of the prompts."""
        numbers = itertools.takewhile(self.done.__contains__, itertools.count(self.position))
        return sum(self.done[number] is not None for number in numbers)

    def close(self):
        """Ends the workers, and the runtime if it was started here."""
        with self.cv:
            self.closed = True
            self.cv.notify_all()
        self.thread.join(30)
        super().close()

    # ---- the thread that keeps the workers busy

    def _pump(self):
        try:
            while not self.closed:
                self._issue()
                if self.unscored or any(hand.call is not None for hand in self.hands):
                    self._work(0.1)
                    continue
                with self.cv:
                    if not self.closed and not self._may_issue():
                        self.cv.wait(0.5)
        except BaseException as e:
            with self.cv:
                self.error = e
                self.cv.notify_all()

    def _may_issue(self):
        waiting = sum(group is not None for group in self.done.values())
        return self.weights is not None and self.taken + len(self.open) + waiting < self.limit

    def _issue(self):
        """Hands out prompts within the capacity, and gives every idle rollout worker its next call. Each has
        an even share of all that is open, lowest number first, and as many as its engine has rows for."""
        with self.cv:
            while self._may_issue():
                self._begin(self.next, next(self.jobs))
                self.next += 1
            version = self.version
            weights = self.weights
        self.pending.sort()
        under_way = [number for hand in self.rollers for number in hand.work] + self.pending
        if not under_way:
            return
        rows = max(1, self.size // self.open[under_way[0]].params.n)
        share = min(rows, -(-len(under_way) // len(self.rollers)))
        for hand in self.rollers:
            if hand.call is None:
                new = self.pending[:max(0, share - len(hand.work))]
                del self.pending[:len(new)]
                hand.work += new
                if hand.work:
                    jobs = [(number, self.open[number].asks[1]) for number in new]
                    fresh = weights if hand.version != version else None
                    hand.version = version
                    hand.go(hand.actor.run.remote(jobs, version, fresh, SLICE), SILENCE)

    def _finish(self, number, group):
        with self.cv:  # from here on it is the trainer's
            super()._finish(number, group)
            self.cv.notify_all()


def free_gpus(device):
    """The numbers of the GPUs that no trainer has, of all where they have all. Of torchrun's ranks on this
    node the i-th has GPU i."""
    gpus = range(torch.cuda.device_count() if str(device).startswith('cuda') else 0)
    ranks = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    taken = range(ranks) if ranks > 1 else [torch.device(device).index or 0]
    return [i for i in gpus if i not in taken] or list(gpus)


@contextlib.contextmanager
def only(gpus):
    """Inside: CUDA_VISIBLE_DEVICES names these, for a runtime that reads it; torch in this process has its
    device already."""
    before = os.environ.get('CUDA_VISIBLE_DEVICES')
    if gpus:
        ids = before or ','.join(map(str, range(torch.cuda.device_count())))
        os.environ['CUDA_VISIBLE_DEVICES'] = ','.join(ids.split(',')[i] for i in gpus)
    try:
        yield
    finally:
        if gpus and before is None:
            del os.environ['CUDA_VISIBLE_DEVICES']
        elif gpus:
            os.environ['CUDA_VISIBLE_DEVICES'] = before
