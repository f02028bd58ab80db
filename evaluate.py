"""Evaluation on held-out rows: right answers, win rate against another model, perplexity, signs of collapse.

    python evaluate.py config/eval_gsm8k.py --init_from=out-grpo-gsm8k             # pass@1, pass@k, maj@k
    python evaluate.py config/eval_toy.py --init_from=out-ppo --against=out-sft    # win rate by a gold scorer
    python evaluate.py --init_from=out-dpo --eval_file=asked.jsonl --against=said.jsonl --judge=http://host/v1
    python evaluate.py --init_from=out-sft --perplexity=data/toy/sft_val.jsonl
The model answers every row of eval_file num_samples times; its answers are written before anybody marks them:
  1. reward: the file that training used, so that answers are read by the same eyes. pass@k without bias (Chen
     et al. 2021, 2107.03374 eq. 1); maj@k: the answer that most of k samples give (Wang et al. 2203.11171)
  2. against: another model, or a file with its answers. judge: a reward file, a reward model, or an endpoint
     with OpenAI's API (data/judge.py), asked in both orders. Win rate = wins + half the ties
  3. distinct-1 to 3, the share of answers that repeat a run of four words, the share that end, the length
  4. perplexity: rows as sft.py reads them; nats a trained token, and exp of it
Intervals are of 95 %, over prompts. eval.json holds the summary, eval.jsonl every sample.
"""
import itertools
import json
import math
import os
import random
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

import infer
import kernels
from data.judge import ask_judge
from dataset import load_dataset
from files import replaced
from grpo import pass_at_k
from model import all_rewards
from reward import wilson
from rollout import load_reward
from run import load_model, pick_device, pick_threads
from tokenizer import alpaca_prompt, encode_prompt, encode_row, get_tokenizer, plain_row, template_args

# what
init_from = 'out-sft' # an out_dir or its ckpt.pt, a Hugging Face directory or name
eval_file = '' # rows {"prompt" or "question" or "instruction", ...}; '' only with perplexity
limit = 0 # >= 0: the first so many rows; 0 = all
reward = '' # file with reward(prompt, completion, row) -> float; right means above 0.5
ks = '1' # of pass@k and maj@k, by comma, none above num_samples; majority where the file has extract_answer
against = '' # a model, or a .jsonl with {"prompt", "completion"} or what this script wrote
judge = '' # who compares: a reward file, a reward model (out_dir, directory), or http://host/v1; '' = reward
judge_model = 'gpt-4o-mini' # the model's name at an http judge
# name of the environment variable with the key of an http judge; unset: none is sent
judge_key = 'JUDGE_API_KEY'
judge_tokens = 512 # >= 1: tokens that an http judge may say: it may think first
tie = 0.0 # >= 0: scores that differ by no more are a tie
perplexity = '' # rows for perplexity: {"messages"}, {"prompt", "completion"}, {"text"} ...
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
    found, out = [], []
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
    winners = [c for c in votes if votes[c] == max(votes.values())]
    return winners.count('right') / max(1, len(winners))


def maj_at_k(classes: list, k: int, draws: int = 256) -> float:
    """Mean of vote() over the subsets of k samples: all of them where there are at most `draws`, else that
    many drawn with a fixed seed. ['right', 'right', '3'], k=1 -> 2/3; k=3 -> 1."""
    subsets = itertools.combinations(classes, k)
    if math.comb(len(classes), k) > draws:
        rng = random.Random(0)
        subsets = (rng.sample(classes, k) for _ in range(draws))
    votes = [vote(subset) for subset in subsets]
    return sum(votes) / len(votes)


def interval(values, weights=None, as_share: bool = True) -> tuple:
    """(mean, low, high), 95 %, of per-prompt values (n,). Samples of one prompt are not independent, so
    prompts are counted: shares by Wilson's interval for as many independent samples as would spread like
    these (never more than there are), ten right of ten -> (1, 0.72, 1); other numbers by the normal one."""
    v = np.asarray(values, float)
    w = np.ones(len(v)) if weights is None else np.asarray(weights)
    mean = float(np.average(v, weights=w))
    error = float(np.sqrt((w**2 * (v - mean)**2).sum()) / w.sum())
    if not as_share:
        return mean, mean - 1.96 * error, mean + 1.96 * error
    n = mean * (1 - mean) / error**2 if error else len(v)
    n = min(n, len(v) * num_samples)
    low, high = wilson(mean * n, n)
    return mean, max(0.0, low), min(1.0, high)


def share(flags) -> float:
    return float(np.mean(list(flags)))


def grams(words: list, n: int) -> list:
    return list(zip(*(words[i:] for i in range(n))))


def diversity(texts: list, run: int = 4) -> dict:
    """distinct-n = different word n-grams / all of them, n = 1, 2, 3 (Li et al. 2016, 1510.03055); repeats =
    share of texts that hold a run of `run` words twice; same = share of texts that another one equals.
    ['a b', 'a b'] -> 0.5, 0.5, 0; 0; 1."""
    said = [re.findall(r'\w+|[^\w\s]', text.lower()) for text in texts]
    out, counts = {}, Counter(texts)
    for n in (1, 2, 3):
        every = [gram for words in said for gram in grams(words, n)]
        out[f'distinct-{n}'] = len(set(every)) / max(1, len(every))
    out['repeats'] = share(len(set(grams(words, run))) < len(grams(words, run)) for words in said)
    out['same'] = share(counts[text] > 1 for text in texts)
    return out


# --------------------------------------------------------------------------------------------------
# rows and answers


def read_rows(path: str) -> list:
    """Rows of a file, each with its own "prompt", a string or messages, as training reads it."""
    rows = []
    for i, row in enumerate(load_dataset(path), 1):
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
    tokens: float  # a text, mean

    def of_rows(self, values) -> list:
        """Something of each answer, by rows: [[...] of num_samples]."""
        values = list(values)
        return [values[i:i + num_samples] for i in range(0, len(values), num_samples)]


def generate(name: str, rows: list) -> Answers:
    """A model answers. An answer depends on seed, row and sample alone, never on the batch."""
    model, tok, _ = opened(name, half=True)
    prompts = [encode_prompt(row, tok) for row in rows]
    room = model.config.block_size
    for i, ids in enumerate(prompts, 1):
        if len(ids) >= room:
            raise ValueError(f'{eval_file}, row {i}: the prompt has {len(ids)} tokens, '
                             f'the context of {name} is {room}: leave the row out, or take another model')
    ways = dict(
        max_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
        stop=stop or None, n=num_samples)
    # two values of seed share no noise, not even on prompts that are alike
    params = [infer.SamplingParams(seed=seed * 1_000_003 + i, **ways) for i in range(len(rows))]
    done = infer.Engine(model, tok, max_num_seqs=max_num_seqs).generate(prompts, params)
    return Answers(
        texts=[c.text for c in done],
        ended=[c.finish_reason == 'stop' for c in done],
        tokens=float(np.mean([len(c.token_ids) for c in done])))


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
    found, texts = defaultdict(list), []
    for row in read_rows(path):
        found[key(row)].append(said_in(row))
    turns = {k: itertools.cycle(answers) for k, answers in found.items()}
    for i, row in enumerate(rows, 1):
        if key(row) not in turns:
            raise ValueError(f'{path}: no answer to row {i} of {eval_file}, {str(row["prompt"])[:80]!r}')
        said = itertools.cycle(next(turns[key(row)]))
        texts += [next(said) for _ in range(num_samples)]
    return Answers(texts, [True] * len(texts), 0.0)


# --------------------------------------------------------------------------------------------------
# who marks


def score(by: str, rows: list, answers: Answers) -> list:
    """[float] of each answer by a reward file or a reward model; what is no finite number is named with its
    row, as in training."""
    each = [row for row in rows for _ in range(num_samples)]
    if by.endswith('.py'):
        fn = load_reward(by)
        marks = [float(fn(row['prompt'], text, row)) for row, text in zip(each, answers.texts)]
    else:
        model, tok, _ = opened(by, 'scalar')
        sequences = []
        for row, text, ended in zip(each, answers.texts, answers.ended):
            ids, _ = encode_row(dict(row, completion=text, messages=None), tok)
            ids = ids if ended else ids[:-1]
            sequences.append(ids[-model.config.block_size:])
        marks = all_rewards(model, sequences).tolist()
    for mark, row, text in zip(marks, each, answers.texts):
        if not math.isfinite(mark):
            raise ValueError(f'reward {by} returned {mark} for completion {text[:60]!r} '
                             f'of row {str(row)[:120]}: rewards must be finite')
    return marks


def ask_endpoint(url: str, triples: list) -> list:
    """'wins', 'losses', 'ties', 'flipped' (the order decided) or 'unread' of each (prompt, our text, their
    text)."""
    how = dict(model=judge_model, key=os.environ.get(judge_key, ''), max_tokens=judge_tokens)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda triple: ask_judge(url, *triple, **how), triples))
    unread = [heard for verdicts, heard in found if None in verdicts]
    if 2 * len(unread) > len(triples):
        raise ValueError(f'judge {url}: no verdict in {len(unread)} of {len(triples)} pairs, '
                         f'expected A, B or TIE, got {unread[0]}; one that thinks needs more --judge_tokens')
    names = {('A', 'B'): 'wins', ('B', 'A'): 'losses', ('A', 'A'): 'flipped', ('B', 'B'): 'flipped'}
    out = []
    for verdicts, _ in found:
        out.append('unread' if None in verdicts else names.get(verdicts, 'ties'))
    return out


def compare(by: str, rows: list, ours: Answers, theirs: Answers) -> list:
    """The outcome of each of our answers against theirs."""
    if by.startswith('http'):
        prompts = [row['prompt'] for row in rows for _ in range(num_samples)]
        return ask_endpoint(by, list(zip(prompts, ours.texts, theirs.texts)))
    out = []
    for a, b in zip(score(by, rows, ours), score(by, rows, theirs)):
        better = 'wins' if a > b else 'losses'
        out.append('ties' if abs(a - b) <= tie else better)
    return out


# --------------------------------------------------------------------------------------------------
# the evaluation


def accuracy(rows: list, ours: Answers, samples: list, wanted: list) -> dict:
    """pass@k and maj@k by the reward file; the scores go to the samples, too."""
    marks = score(reward, rows, ours)
    scores = ours.of_rows(marks)
    right = ours.of_rows(mark > 0.5 for mark in marks)
    out = {'score': interval([np.mean(group) for group in scores], as_share=False)}
    for k in wanted:
        hits = [pass_at_k(torch.tensor(group), num_samples, k) for group in right]
        out[f'pass@{k}'] = interval(hits)
    names = load_reward(reward).__globals__
    if 'extract_answer' in names:
        answers = ours.of_rows(map(names['extract_answer'], ours.texts))
        classes = [classes_of(*both, names.get('equal')) for both in zip(answers, right)]
        for k in wanted:
            if k > 1:
                out[f'maj@{k}'] = interval([maj_at_k(group, k) for group in classes])
    for sample, group in zip(samples, scores):
        sample['scores'] = group
    return out


def win_rate(rows: list, ours: Answers, theirs: Answers, samples: list) -> dict:
    """Wins + half the ties, flipped ones too; what the other said and who won go to the samples, too."""
    outcomes = compare(judge or reward, rows, ours, theirs)
    worth = {'wins': 1.0, 'losses': 0.0, 'ties': 0.5, 'flipped': 0.5}
    rates = []
    for group in ours.of_rows(outcomes):
        told = [worth[name] for name in group if name in worth]
        if told:
            rates.append(np.mean(told))
    out = {'win rate': interval(rates)}
    for name in (*worth, 'unread'):
        out[name] = share(outcome == name for outcome in outcomes)
    for sample, texts, names in zip(samples, ours.of_rows(theirs.texts), ours.of_rows(outcomes)):
        sample |= dict(against=texts, outcomes=names)
    return out


def measure_perplexity(path: str) -> dict:
    """Nats a trained token of rows by the model of init_from; each row weighs what it has of them."""
    model, tok, place = opened(init_from)
    most, nats, tokens = model.config.block_size, [], []
    for row in list(load_dataset(path))[:limit or None]:
        ids, trained = encode_row(row, tok)
        counts = torch.tensor(trained[1:most])
        if counts.any():
            with torch.no_grad():
                logp = model.logprobs(torch.tensor([ids[:most]], device=place))[0].float().cpu()
            nats.append(-logp[counts].mean().item())
            tokens.append(counts.sum().item())
    if not nats:
        raise ValueError(f'{path}: no row with a trained token')
    spread = interval(nats, tokens, as_share=False)
    return {
        'nats a token': spread, 'perplexity': tuple(map(math.exp, spread)),
        'perplexity tokens': sum(tokens)}


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
    if against and not (judge or reward):
        raise ValueError('against without a judge: --judge=data/toy/gold.py, a reward model, '
                         'or http://host/v1')
    return wanted


def write_rows(path: str, rows: list):
    with replaced(path, 'w') as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)


def evaluate_rows(wanted: list, path: str) -> dict:
    """All that is measured on eval_file. The samples go to `path` before anybody marks them: answers are
    dear."""
    rows = read_rows(eval_file)[:limit or None]
    given = answers_of(against, rows) if against.endswith('.jsonl') else None
    for name in (reward, judge):
        if name.endswith('.py'):
            load_reward(name)  # a slip in it is told before the answers are made
    ours = generate(init_from, rows)
    samples = []
    for row, texts, ended in zip(rows, ours.of_rows(ours.texts), ours.of_rows(ours.ended)):
        samples.append(dict(row, completions=texts, ended=ended))
    write_rows(path, samples)
    out = {}
    try:
        if reward:
            out |= accuracy(rows, ours, samples, wanted)
        if against:
            out |= win_rate(rows, ours, given or generate(against, rows), samples)
    except ValueError as e:
        raise ValueError(f'{e}; the answers are in {path}') from e
    write_rows(path, samples)
    out |= diversity(ours.texts)
    return out | dict(ended=share(ours.ended), tokens=ours.tokens, prompts=len(rows), samples=num_samples)


def main():
    wanted = check_config()
    kernels.use('auto')
    torch.manual_seed(seed)
    here = out_dir or (init_from if os.path.isdir(init_from) else '.')
    os.makedirs(here, exist_ok=True)
    out = evaluate_rows(wanted, os.path.join(here, 'eval.jsonl')) if eval_file else {}
    if perplexity:
        out |= measure_perplexity(perplexity)
    write_rows(os.path.join(here, 'eval.json'), [dict(config=config, **out)])
    for key, value in out.items():
        if isinstance(value, tuple):
            value = '{:.4f}   95 %: {:.4f} to {:.4f}'.format(*value)
        elif isinstance(value, float):
            value = f'{value:.4f}'
        print(f'{key:>18}  {value}')
    print(f'written: {here}/eval.json', f'and {here}/eval.jsonl' if eval_file else '')


if __name__ == '__main__':
    main()
