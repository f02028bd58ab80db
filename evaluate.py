"""Evaluation on held-out rows: right answers, win rate against another model, perplexity, signs of collapse.

    python evaluate.py config/eval_gsm8k.py --init_from=out-grpo-gsm8k             # pass@1, pass@k, maj@k
    python evaluate.py config/eval_toy.py --init_from=out-ppo --against=out-sft    # win rate by a gold scorer
    python evaluate.py --init_from=out-dpo --eval_file=asked.jsonl --against=said.jsonl --judge=http://host/v1
    python evaluate.py --init_from=out-sft --perplexity=data/toy/sft_val.jsonl
    python evaluate.py --init_from=out-sft --eval_file=asked.jsonl --reward=out-reward --num_samples=8 \\
        --temperature=1 --write=best.jsonl,pairs.jsonl     # rows for rejection-sampling SFT and online DPO
The model answers every row of eval_file num_samples times; its answers are written before anybody marks them:
  1. reward: the file that training used, so that answers are read by the same eyes; or env: conversations of
     several turns in the environment that training used, which marks them. pass@k without bias (Chen
     et al. 2021, 2107.03374 eq. 1); maj@k: the answer that most of the k samples give (2203.11171)
  2. against: another model, or a file with its answers. judge: a reward file, a reward model, or an endpoint
     with OpenAI's API (data/judge.py), asked in both orders. Win rate = wins + half the ties
  3. distinct-1 to 3, the share of answers that repeat a run of four words, the share that end, the length
  4. perplexity: rows as sft.py reads them; nats a trained token, and exp of it
  5. write: the best answer of each prompt, and the best against the worst (or the judge's verdicts) as pairs
Intervals are of 95 %, over prompts. eval.json holds the summary, eval.jsonl every sample.
"""
import itertools
import json
import math
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from statistics import fmean

os.environ.setdefault('GOMP_SPINCOUNT', '2000') # idle CPU threads soon sleep: python bench.py neighbour
import numpy as np
import torch

import infer
import kernels
from data.judge import outcomes_of
from dataset import load_dataset
from files import replaced
from grpo import pass_at_k
from model import all_rewards, write_json
from reward import wilson
from rollout import as_trained, ask_reward, load_env, load_reward, Pool, started_by, without_end
from run import load_model, pick_device, pick_threads
from tokenizer import alpaca_prompt, encode_prompt, encode_row, get_tokenizer, plain_row, template_args

# what
init_from = 'out-sft' # an out_dir or its ckpt.pt, a Hugging Face directory or name
eval_file = '' # rows {"prompt" or "question" or "instruction", ...}; '' only with perplexity
limit = 0 # >= 0: the first so many rows; 0 = all
reward = '' # file with reward(prompt, completion, row) -> float, right means above 0.5; or a reward model
env = '' # FILE.py with a class Env (see rollout.load_env): what it pays is the mark, unless there is a reward
max_turns = 4 # >= 1: of the model in a conversation; max_new_tokens holds all turns and replies
ks = '1' # of pass@k, by comma, none above num_samples
against = '' # a model, or a .jsonl with {"prompt", "completion"} or what this script wrote
judge = '' # who compares: a reward file, a reward model (out_dir, directory), or http://host/v1; '' = reward
judge_model = 'gpt-4o-mini' # the model's name at an http judge
# name of the environment variable with the key of an http judge; unset: none is sent
judge_key = 'JUDGE_API_KEY'
judge_tokens = 512 # >= 1: tokens that an http judge may say: it may think first
tie = 0.0 # >= 0: scores that differ by no more are a tie
perplexity = '' # rows for perplexity: {"messages"}, {"prompt", "completion"}, {"text"} ...
write = '' # 'best.jsonl,pairs.jsonl': answers as rows for sft.py, and for dpo.py; ',pairs.jsonl': pairs alone
out_dir = '' # for eval.jsonl and eval.json; '' = init_from if it is a folder, else here
# sampling
num_samples = 1 # >= 1: answers a prompt
max_new_tokens = 256 # >= 1: tokens an answer at most
temperature = 0.0 # >= 0: 0 = greedy; pass@k and maj@k want 0.6 to 1
top_p = 1.0 # in (0, 1]: of the likeliest tokens, so much of the probability
stop = '' # a string that ends an answer: a base model goes on with 'Question:'
max_num_seqs = 64 # >= 1: answers generated at once
# system
seed = 1337 # >= 0: of the samples
device = 'auto' # 'auto' = cuda if there is one | 'cpu' | 'cuda'
dtype = 'auto' # 'auto' | 'float32' | 'bfloat16'
threads = 0 # >= 0: CPU threads; 0 = 1 for models under 5 M parameters, else torch's choice
config_keys = [k for k, v in globals().items()
               if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
# overrides from the command line or a config file
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
config = {k: globals()[k] for k in config_keys} # will be useful for logging


# --------------------------------------------------------------------------------------------------
# the numbers


def classes_of(answers: list, right: list, equal=None) -> list:
    """Answers [str or None], right [bool] -> [class]: 'right' (what is paid for one reference is one class,
    however it looks), else the first wrong answer that it equals, else None. ['1/2', '0.5', '3', None], two
    right -> ['right', 'right', '3', None]."""
    found = []
    out = []
    for answer, paid in zip(answers, right):
        if paid:
            answer = 'right'
        elif answer is not None:
            alike = [other for other in found if answer == other or (equal and equal(answer, other))]
            answer = alike[0] if alike else answer
            found.append(answer)
        out.append(answer)
    return out


def vote(classes: list) -> float:
    """Chance that a majority vote is right: the largest class wins, ties share; None does not vote.
    ['right', 'right', '3'] -> 1; ['right', '3'] -> 0.5; [None] -> 0."""
    votes = Counter(c for c in classes if c is not None)
    most = max(votes.values(), default=0)
    winners = [c for c in votes if votes[c] == most]
    return winners.count('right') / max(1, len(winners))


def spread(values, weights=None) -> tuple:
    """(mean, standard error) of per-prompt values (n,). Samples of one prompt are not independent, so prompts
    are counted. [0, 1], [1, 3] -> (0.75, 0.26)."""
    v = np.asarray(values, float)
    w = np.ones(len(v)) if weights is None else np.asarray(weights)
    mean = np.average(v, weights=w)
    error = np.linalg.norm(w * (v - mean)) / w.sum()
    return float(mean), float(error)


def around(values, weights=None) -> tuple:
    """(mean, low, high), 95 %, of any numbers."""
    mean, error = spread(values, weights)
    return mean, mean - 1.96 * error, mean + 1.96 * error


def interval(values) -> tuple:
    """(mean, low, high), 95 %, of shares: Wilson's interval for as many independent samples as would spread
    like these, never more than there are. Ten right of ten -> (1, 0.72, 1)."""
    mean, error = spread(values)
    n = len(values)
    if error:
        n = min(mean * (1 - mean) / error**2, n * num_samples)
    low, high = wilson(mean * n, n)
    return mean, max(0.0, low), min(1.0, high)


def grams(words: list, n: int) -> list:
    return list(zip(*(words[i:] for i in range(n))))


def diversity(texts: list, run: int = 4) -> dict:
    """distinct-n = different word n-grams / all of them, n = 1, 2, 3 (Li et al. 2016, 1510.03055); repeats =
    share of texts that hold a run of `run` words twice; same = share of texts that another one equals.
    ['a b', 'a b'] -> 0.5, 0.5, 0; 0; 1."""
    said = [re.findall(r'\w+|[^\w\s]', text.lower()) for text in texts]
    out = {}
    counts = Counter(texts)
    for n in (1, 2, 3):
        every = [gram for words in said for gram in grams(words, n)]
        out[f'distinct-{n}'] = len(set(every)) / max(1, len(every))
    runs = [grams(words, run) for words in said]
    out['repeats'] = fmean(len(set(found)) < len(found) for found in runs)
    out['same'] = fmean(counts[text] > 1 for text in texts)
    return out


# --------------------------------------------------------------------------------------------------
# rows and answers


def read_rows(path: str) -> list:
    """Rows of a file, each with its own "prompt", a string or messages, as training reads it."""
    rows = []
    for i, row in enumerate(map(started_by(env), load_dataset(path)), 1):
        prompt = row.get('prompt') or row.get('question')
        if not prompt and row.get('instruction'):
            prompt = alpaca_prompt(row)
        if not prompt:
            raise ValueError(f'{path}, row {i}: "prompt", "question" or "instruction" is wanted, '
                             f'got {", ".join(row)}')
        rows.append(dict(row, prompt=prompt))
    if not rows:
        raise ValueError(f'{path}: it is empty')
    return rows


def opened(name: str, head: str = 'lm', half: bool = False) -> tuple:
    """(model, tokenizer, device); the weights in `dtype` where half, else float32."""
    place, kind = pick_device(device, dtype)
    model, tokenizer = load_model(name, place, kind if half else torch.float32, head)
    pick_threads(threads, model.num_params(), place)
    return model.eval(), get_tokenizer(tokenizer), place


@dataclass
class Answers:
    """num_samples answers to each row, one after the other."""
    texts: list    # [str]
    ended: list    # [bool]: by an end token or a stop string, not at the limit
    tokens: float  # of the model's in an answer, mean
    paid: list = None  # [float] by the environment


def by_row(values: list) -> list:
    """Something of each answer -> [[...] of num_samples] of each row."""
    return [values[i:i + num_samples] for i in range(0, len(values), num_samples)]


def generate(name: str, rows: list) -> Answers:
    """A model answers, turn by turn where there is an environment. An answer depends on seed, row and sample
    alone, never on the batch. A row whose environment fails is taken out of `rows`."""
    model, tok, _ = opened(name, half=True)
    stops = getattr(load_env(env), 'stop', None) if env else stop or None
    ways = dict(temperature=temperature, top_p=top_p, stop=stops, n=num_samples)
    jobs = []
    for i, row in enumerate(rows):
        ids = encode_prompt(row, tok)
        room = model.config.block_size - len(ids)
        if room < 1:
            raise ValueError(f'{eval_file}, row {i + 1}: the prompt has {len(ids)} tokens, the context of '
                             f'{name} is {room + len(ids)}: leave the row out, or take another model')
        # two values of seed share no noise, not even on prompts that are alike
        params = infer.SamplingParams(min(max_new_tokens, room), seed=seed * 1_000_003 + i, **ways)
        jobs.append((i, row, ids, params))
    engine = infer.Engine(model, tok, max_num_seqs=max_num_seqs)
    pool = Pool(tok, env=env, max_turns=max_turns, reward_workers=1 if env else 0)
    try:
        groups = [group for group in pool.answer(jobs, engine) if group]
    finally:
        pool.close()
    if len(groups) < len(rows):
        print(f'{len(rows) - len(groups)} of {len(rows)} rows left out, the environment failed')
        rows[:] = [rows[group.index] for group in groups]
    answers = [answer for group in groups for answer in group.answers]
    texts = [tok.decode(without_end(answer.ids, tok)) for answer in answers]
    return Answers(
        texts=[text.partition(stop)[0] for text in texts] if stop and not env else texts,
        ended=[answer.ended for answer in answers],
        tokens=fmean(sum(answer.own) for answer in answers),
        paid=[paid for group in groups for paid in group.marks[env]] if env else None)


def said_in(row: dict) -> list:
    """[str] of a row with "completions" or "completion", each a text or a list with one message."""
    out = []
    for said in row.get('completions') or [row.get('completion')]:
        text = said[-1].get('content') if isinstance(said, list) and said else said
        if not isinstance(text, str):
            raise ValueError(f'{against}: "completion", a text or one message, is wanted, '
                             f'got {str(row)[:80]}')
        out.append(text)
    return out


def answers_of(path: str, rows: list) -> Answers:
    """Answers of a .jsonl to the same prompts. A prompt is its whole row: messages, tools. One that stands
    twice gets its answers in order, and so do samples; one that is missing is an error."""
    def key(row):
        return json.dumps([row['prompt'], template_args(plain_row(row))], sort_keys=True)
    found = defaultdict(list)
    texts = []
    for row in read_rows(path):
        found[key(row)] += said_in(row)
    turns = {k: itertools.cycle(answers) for k, answers in found.items()}
    for i, row in enumerate(rows, 1):
        if key(row) not in turns:
            raise ValueError(f'{path}: no answer to row {i} of {eval_file}, {str(row["prompt"])[:80]!r}')
        texts += itertools.islice(turns[key(row)], num_samples)
    return Answers(texts, [True] * len(texts), 0.0)


# --------------------------------------------------------------------------------------------------
# who marks


def score(by: str, rows: list, answers: Answers) -> list:
    """[float] of each answer by a reward file or a reward model; what is no finite number is an error."""
    if by.endswith('.py'):
        fn = load_reward(by)
        marks = [ask_reward(fn, by, rows[i // num_samples], text) for i, text in enumerate(answers.texts)]
        return [float(np.sum(mark)) for mark in marks]  # a list: one number a step
    model, tok, _ = opened(by, 'scalar')
    sequences = []
    for i, (text, ended) in enumerate(zip(answers.texts, answers.ended)):
        ids = as_trained(rows[i // num_samples], text, ended, tok)
        sequences.append(ids[-model.config.block_size:])
    marks = all_rewards(model, sequences)
    if not marks.isfinite().all():
        raise ValueError(f'reward model {by}: a mark is not finite; its training went wrong')
    return marks.tolist()


def compare(by: str, rows: list, ours: Answers, theirs: Answers) -> list:
    """The outcome of each of our answers against theirs."""
    if by.startswith('http'):
        prompts = [row['prompt'] for row in rows for _ in range(num_samples)]
        key = os.environ.get(judge_key, '')
        asked = list(zip(prompts, ours.texts, theirs.texts))
        return outcomes_of(by, asked, model=judge_model, key=key, max_tokens=judge_tokens)
    gaps = np.subtract(score(by, rows, ours), score(by, rows, theirs))
    better = np.where(gaps > 0, 'wins', 'losses')
    return np.where(abs(gaps) <= tie, 'ties', better).tolist()


# --------------------------------------------------------------------------------------------------
# the evaluation


def accuracy(rows: list, ours: Answers, wanted: list, columns: dict) -> dict:
    """pass@k, and maj@ of all samples, by the reward file or the environment; the scores go to the
    columns."""
    columns['scores'] = score(reward, rows, ours) if reward else ours.paid
    out = {'score': around([fmean(marks) for marks in by_row(columns['scores'])])}
    if not (reward or env).endswith('.py'):
        return out  # a reward model does not say what is right
    right = [mark > 0.5 for mark in columns['scores']]
    for k in wanted:
        hits = [pass_at_k(torch.tensor(paid), num_samples, k) for paid in by_row(right)]
        out[f'pass@{k}'] = interval(hits)
    names = load_reward(reward).__globals__ if reward else {}
    if num_samples > 1 and 'extract_answer' in names:
        answers = by_row([names['extract_answer'](text) for text in ours.texts])
        equal = names.get('equal')
        votes = [vote(classes_of(*both, equal)) for both in zip(answers, by_row(right))]
        out[f'maj@{num_samples}'] = interval(votes)
    return out


def win_rate(rows: list, ours: Answers, theirs: Answers, columns: dict) -> dict:
    """Wins + half the ties, flipped ones too; what the other said and who won go to the columns."""
    outcomes = compare(judge or reward, rows, ours, theirs)
    columns['against'] = theirs.texts
    columns['outcomes'] = outcomes
    worth = {'wins': 1.0, 'losses': 0.0, 'ties': 0.5, 'flipped': 0.5}
    told = [[worth[name] for name in names if name in worth] for names in by_row(outcomes)]
    out = {'win rate': interval([fmean(marks) for marks in told if marks])}
    return out | {name: outcomes.count(name) / len(outcomes) for name in (*worth, 'unread')}


@torch.no_grad()
def measure_perplexity(path: str) -> dict:
    """Nats a trained token of rows by the model of init_from; each row weighs what it has of them."""
    model, tok, place = opened(init_from)
    room = model.config.block_size
    nats = []
    tokens = []
    for row in list(load_dataset(path))[:limit or None]:
        ids, trained = encode_row(row, tok)
        counts = torch.tensor(trained[1:room])
        if counts.any():
            idx = torch.tensor([ids[:room]], device=place)
            logp = model.logprobs(idx)[0].cpu()
            nats.append(-logp[counts].mean().item())
            tokens.append(counts.sum().item())
    if not nats:
        raise ValueError(f'{path}: no row with a trained token')
    found = around(nats, tokens)
    exps = tuple(map(math.exp, found))
    return {'nats a token': found, 'perplexity': exps, 'perplexity tokens': sum(tokens)}


def best_answers(rows: list, texts: list, scores: list) -> list:
    """{"prompt", "completion", "score"} of each row's best answer; those that a file calls wrong (0.5 and
    less) are left out."""
    found = []
    for row, answers, marks in zip(rows, by_row(texts), by_row(scores)):
        said = worded(answers, marks)
        if not said:
            continue
        best, answer = said[0]
        if best > 0.5 or not (reward or env).endswith('.py'):
            found.append(asked(row) | dict(completion=answer, score=best))
    return found


def worded(answers: list, marks: list) -> list:
    """(mark, text) of the answers that say something, the best first: no stage takes a row with an empty
    one."""
    said = [(mark, text) for mark, text in zip(marks, answers) if text.strip()]
    return sorted(said, key=lambda one: -one[0])


def preference_pairs(rows: list, columns: dict) -> list:
    """{"prompt", "chosen", "rejected"}: of each row the best answer against the worst, where their scores
    differ; with `against` each answer against the other model's, as the judge has it."""
    pairs = []
    texts = columns['completions']
    if 'outcomes' in columns:
        for i, (ours, theirs) in enumerate(zip(texts, columns['against'])):
            told = dict(wins=(ours, theirs), losses=(theirs, ours))
            sides = told.get(columns['outcomes'][i])  # chosen, rejected
            empty = not ours.strip() or not theirs.strip()
            if sides and ours != theirs and not empty:
                pairs.append((rows[i // num_samples], *sides))
    else:
        for row, answers, marks in zip(rows, by_row(texts), by_row(columns['scores'])):
            said = worded(answers, marks)
            if not said:
                continue
            best, chosen = said[0]
            worst, rejected = said[-1]
            if best > worst + tie:
                pairs.append((row, chosen, rejected))
    return [dict(asked(row), chosen=chosen, rejected=rejected) for row, chosen, rejected in pairs]


def asked(row: dict) -> dict:
    """What of a row belongs to its prompt."""
    return {key: row[key] for key in ('prompt', 'tools', 'chat_template_kwargs') if key in row}


def write_rows(path: str, rows: list):
    with replaced(path, 'w') as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)


def check_config() -> list:
    """The numbers of ks; ValueError where the keys do not fit together."""
    if not eval_file and not perplexity:
        raise ValueError('nothing to evaluate: give --eval_file=rows.jsonl (with --reward or --against), '
                         'or --perplexity=rows.jsonl')
    if not re.fullmatch(r'\d+(,\d+)*', ks):
        raise ValueError(f'ks {ks!r}: whole numbers by comma, like 1,4,8')
    wanted = sorted({int(k) for k in ks.split(',')})
    if wanted[0] < 1 or wanted[-1] > num_samples:
        raise ValueError(f'ks {ks!r} with num_samples {num_samples}: every k is between 1 and num_samples; '
                         f'--num_samples={max(1, wanted[-1])}')
    if num_samples > 1 and temperature == 0:
        raise ValueError(f'{num_samples} samples at temperature 0 are {num_samples} times the same: '
                         '--temperature=0.8, or --num_samples=1')
    if write.count(',') > 1:
        raise ValueError(f"write {write!r}: two files at most, 'best.jsonl,pairs.jsonl'")
    if write and not (reward or env) and (not against or write.split(',')[0]):
        raise ValueError(f'write {write!r}: which answer is the best, a reward says: --reward=FILE.py or a '
                         'reward model (pairs may also come from --against and --judge)')
    if write and not against and num_samples == 1:
        raise ValueError(f'write {write!r} with one sample a prompt: nothing to choose from; --num_samples=8 '
                         '--temperature=1')
    if env and against:
        raise ValueError('env with against: conversations are told apart by what they are paid; '
                         "--against=''")
    if against and not (judge or reward):
        raise ValueError('against without a judge: --judge=data/toy/gold.py, a reward model, '
                         'or http://host/v1')
    return wanted


def write_samples(path: str, rows: list, columns: dict):
    """The rows, each with its samples of every column."""
    samples = zip(*map(by_row, columns.values()))
    write_rows(path, [row | dict(zip(columns, own)) for row, own in zip(rows, samples)])


def evaluate_rows(wanted: list, path: str) -> dict:
    """All that is measured on eval_file. The samples go to `path` before anybody marks them: answers are
    dear."""
    rows = read_rows(eval_file)[:limit or None]
    given = answers_of(against, rows) if against.endswith('.jsonl') else None
    for name in (reward, judge):
        if name.endswith('.py'):
            load_reward(name)  # a slip in it is told before the answers are made
    ours = generate(init_from, rows)
    columns = dict(completions=ours.texts, ended=ours.ended)
    write_samples(path, rows, columns)
    out = {}
    try:
        if reward or env:
            out |= accuracy(rows, ours, wanted, columns)
        if against:
            out |= win_rate(rows, ours, given or generate(against, rows), columns)
    except ValueError as e:
        raise ValueError(f'{e}; the answers are in {path}') from e
    write_samples(path, rows, columns)
    best, _, pairs = write.partition(',')
    if best:
        write_rows(best, best_answers(rows, columns['completions'], columns['scores']))
    if pairs:
        write_rows(pairs, preference_pairs(rows, columns))
    out |= diversity(ours.texts)
    return out | dict(ended=fmean(ours.ended), tokens=ours.tokens, prompts=len(rows), samples=num_samples)


def main():
    wanted = check_config()
    kernels.use('auto')
    torch.manual_seed(seed)
    here = out_dir or (init_from if os.path.isdir(init_from) else '.')
    os.makedirs(here, exist_ok=True)
    out = evaluate_rows(wanted, os.path.join(here, 'eval.jsonl')) if eval_file else {}
    if perplexity:
        out |= measure_perplexity(perplexity)
    write_json(os.path.join(here, 'eval.json'), dict(config=config, **out))
    for key, value in out.items():
        if isinstance(value, tuple):
            value = '{:.4f}   95 %: {:.4f} to {:.4f}'.format(*value)
        print(f'{key:>18}  {value:.4f}' if isinstance(value, float) else f'{key:>18}  {value}')
    print(f'written: {here}/eval.json' + f' and {here}/eval.jsonl' * bool(eval_file))


if __name__ == '__main__':
    main()
