"""Evaluation as a user expects it: right answers, win rate against another model, perplexity, and signs of collapse. Every sample is written.

    python data/evaluate.py config/eval_gsm8k.py --init_from=out-grpo-gsm8k                     # pass@1, pass@k, maj@k
    python data/evaluate.py config/eval_toy.py --init_from=out-ppo --against=out-sft            # held-out win rate by the gold scorer
    python data/evaluate.py --init_from=out-dpo --eval_file=prompts.jsonl --against=answers.jsonl --judge=http://127.0.0.1:8000/v1
    python data/evaluate.py --init_from=out-sft --perplexity=data/toy/sft_val.jsonl
One run of the model answers every row of eval_file num_samples times; then, as far as they are asked for:
  1. reward: a Python file, the one that training used, so its extraction of the answer is the same. accuracy = pass@1; pass@k without bias (Chen et al. 2021,
     2107.03374 eq. 1); maj@k: the answer that most of k samples give (Wang et al. 2022, 2203.11171), ties shared
  2. against: another model, or a file with its answers; judge: a reward file (gold scorer), a reward model, or an OpenAI-compatible endpoint, which is asked in
     both orders: a win that does not survive the swap is a tie. Win rate = wins + half the ties
  3. distinct-1 to 3 over all answers, the share of answers that repeat a run of four words, the share that end, the length
  4. perplexity: rows as sft.py reads them; nats a trained token, and exp of it
Intervals are 95 % by bootstrap over PROMPTS (samples of one prompt are not independent). Summary: eval.json beside the samples.
"""
import json
import math
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, _root)

import numpy as np
import torch

import infer
import kernels as K
from dataset import load_dataset, pack
from tokenizer import encode_prompt, encode_row, get_tokenizer
from run import load_model, pick_device, pick_threads
from rollout import load_reward

# what
init_from = 'out-sft' # an out_dir or its ckpt.pt, a Hugging Face directory or name
eval_file = '' # rows {"prompt" or "question" or "instruction", ...}; '' only with perplexity
limit = 0 # the first so many rows; 0 = all
reward = '' # file with reward(prompt, completion, row) -> float; right means above 0.5
ks = '1' # of pass@k and maj@k, by comma, none above num_samples; majority where the reward file has extract_answer
against = '' # a model, or a .jsonl with {"prompt", "completion"} (or what this script wrote): its answers to the same prompts
judge = '' # who compares: a reward file, a reward model (out_dir, directory), or http://host/v1; '' = the reward file
judge_model = 'gpt-4o-mini' # the model's name at an http judge
judge_key = 'JUDGE_API_KEY' # name of the environment variable with the key of an http judge; unset: no key is sent
tie = 0.0 # scores that differ by no more are a tie
perplexity = '' # rows for perplexity: {"messages"}, {"prompt", "completion"}, {"text"} ...
out_dir = '' # for eval.jsonl and eval.json; '' = init_from if it is a folder, else here
# sampling
num_samples = 1 # answers a prompt
max_new_tokens = 256
temperature = 0.0 # 0 = greedy; pass@k and maj@k want 0.6 to 1
top_p = 1.0
max_num_seqs = 64 # answers generated at once
# system
bootstrap = 1000 # draws of the intervals
seed = 1337
device = 'auto' # 'auto' = cuda if there is one | 'cpu' | 'cuda'
dtype = 'auto' # 'auto' | 'float32' | 'bfloat16'
threads = 0 # CPU threads; 0 = 1 for models under 5 M parameters, else torch's choice
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open(os.path.join(_root, 'configurator.py')).read()) # overrides from command line or config file
config = {k: globals()[k] for k in config_keys} # will be useful for logging


# ---------------------------------------------------------------------------------------------------------------------
# the numbers


def pass_at_k(n, c, k):
    """Chance that at least one of k samples is right, from n of which c are: 1 - C(n - c, k) / C(n, k). n=4, c=1: k=1 0.25, k=2 0.5, k=4 1."""
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f'pass@{k} of {n} samples, {c} right: k must be between 1 and num_samples')
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def vote(classes, right):
    """Chance that a majority vote is right: classes [int or None] (None: no answer, no vote), right [bool]. The largest class wins, ties share.
    [0, 0, 1], [True, True, False] -> 1; [0, 1], [True, False] -> 0.5; all None -> 0."""
    votes = {}
    for c, r in zip(classes, right):
        if c is not None:
            n, _ = votes.get(c, (0, r))
            votes[c] = n + 1, r
    if not votes:
        return 0.0
    top = max(n for n, _ in votes.values())
    winners = [r for n, r in votes.values() if n == top]
    return sum(winners) / len(winners)


def maj_at_k(classes, right, k, draws=256):
    """Mean of vote() over the subsets of k samples: all of them where there are at most `draws`, else that many drawn with a fixed seed.
    [0, 0, 1], right for 0, k=1 -> 2/3; k=3 -> 1."""
    import itertools
    n = len(classes)
    if math.comb(n, k) <= draws:
        subsets = list(itertools.combinations(range(n), k))
    else:
        rng = np.random.default_rng(0)
        subsets = [rng.choice(n, k, replace=False) for _ in range(draws)]
    return sum(vote([classes[i] for i in s], [right[i] for i in s]) for s in subsets) / len(subsets)


def classes_of(answers, equal):
    """Answers [str or None] -> class numbers, one for all that are equal to the first of their class; None stays. ['1/2', '0.5', None] -> [0, 0, None]."""
    found, out = [], []
    for a in answers:
        if a is None:
            out.append(None)
            continue
        i = next((i for i, b in enumerate(found) if a == b or (equal and equal(a, b))), len(found))
        if i == len(found):
            found.append(a)
        out.append(i)
    return out


def interval(values, draws, seed=0):
    """(mean, low, high): 95 % percentile bootstrap of the mean of per-prompt values (n,). One value, or no draws: the mean alone, three times."""
    v = np.asarray(values, float)
    if len(v) < 2 or not draws:
        return (float(v.mean()),) * 3
    rng = np.random.default_rng(seed)
    means = np.concatenate([v[rng.integers(0, len(v), (min(100, draws - i), len(v)))].mean(1) for i in range(0, draws, 100)])
    return float(v.mean()), *map(float, np.quantile(means, (0.025, 0.975)))


def diversity(texts):
    """distinct-n = different word n-grams / all of them over [str], n = 1, 2, 3 (Li et al. 2016, 1510.03055); repeats = share of texts that hold a run of
    four words twice; same = share of texts that another one equals. ['a b', 'a b'] -> distinct-1 0.5, distinct-2 0.5, distinct-3 0, same 1."""
    split = [re.findall(r'\w+|[^\w\s]', t.lower()) for t in texts]
    grams = lambda words, n: list(zip(*(words[i:] for i in range(n))))
    out = {}
    for n in (1, 2, 3):
        every = [g for w in split for g in grams(w, n)]
        out[f'distinct-{n}'] = len(set(every)) / max(1, len(every))
    out['repeats'] = sum(len(set(g)) < len(g) for g in (grams(w, 4) for w in split)) / max(1, len(split))
    counts = {}
    for t in texts:
        counts[t] = counts.get(t, 0) + 1
    out['same'] = sum(counts[t] > 1 for t in texts) / max(1, len(texts))
    return out


# ---------------------------------------------------------------------------------------------------------------------
# who answers


@dataclass
class Answers:
    texts: list   # [[str] of a prompt]
    ended: list   # [[bool]]
    tokens: int


def prompt_key(rows):
    key = next((k for k in ('prompt', 'question', 'instruction') if rows and k in rows[0]), None)
    if key is None:
        raise ValueError(f'{eval_file}: rows with "prompt", "question" or "instruction" are wanted, ' + (f'got {", ".join(rows[0])}' if rows else 'it is empty'))
    return key


def shown(prompt):
    return prompt if isinstance(prompt, str) else prompt[-1]['content']


def generate(name, asked, n):
    """n answers of a model to each prompt, fixed seeds (prompt i, sample j: the same whatever the model's batch)."""
    kind = pick_device(device, dtype)
    model, tokenizer = load_model(name, kind[0], kind[1])
    pick_threads(threads, model.num_params(), kind[0])
    tok = get_tokenizer(tokenizer)
    engine = infer.Engine(model.eval(), tok, max_num_seqs=max_num_seqs)
    params = [infer.SamplingParams(max_new_tokens, temperature, top_p=top_p, seed=seed + i, n=n) for i in range(len(asked))]
    done = engine.generate([encode_prompt(p, tok) for p in asked], params)
    groups = [done[i:i + n] for i in range(0, len(done), n)]
    return Answers([[c.text for c in g] for g in groups], [[c.finish_reason == 'stop' for c in g] for g in groups], sum(len(c.token_ids) for c in done))


def from_file(path, asked):
    """Answers of a .jsonl to the same prompts: rows with "completion" or "completions". A prompt that it lacks is an error."""
    found = {}
    for row in load_dataset(path):
        p = next((row[k] for k in ('prompt', 'question', 'instruction') if row.get(k)), None)
        said = row.get('completions') or ([row['completion']] if row.get('completion') is not None else None)
        if p is None or said is None:
            raise ValueError(f'{path}: rows with "prompt" and "completion" (or "completions") are wanted, got {", ".join(row)}')
        found[shown(p)] = said
    missing = [p for p in asked if shown(p) not in found]
    if missing:
        raise ValueError(f'{path}: no answer to {len(missing)} of {len(asked)} prompts, the first is {shown(missing[0])[:80]!r}')
    return Answers([found[shown(p)] for p in asked], [[True] * len(found[shown(p)]) for p in asked], 0)


# ---------------------------------------------------------------------------------------------------------------------
# who judges


def score_all(spec, rows, asked, answers):
    """Scores [[float]] of every answer by a reward file or a reward model."""
    if spec.endswith('.py'):
        fn = load_reward(spec)
        return [[float(fn(shown(p), t, r)) for t in texts] for r, p, texts in zip(rows, asked, answers.texts)]
    kind = pick_device(device, dtype)
    model, tokenizer = load_model(spec, kind[0], head='scalar')
    tok = get_tokenizer(tokenizer)
    seqs = [encode_prompt(p, tok) + tok.encode(t) + [tok.eot] * e for p, texts, ends in zip(asked, answers.texts, answers.ended) for t, e in zip(texts, ends)]
    seqs, out = [s[-model.config.block_size:] for s in seqs], np.empty(len(seqs))
    for bin in pack([len(s) for s in seqs], max(8192, max(map(len, seqs)))):
        lengths = torch.tensor([len(seqs[i]) for i in bin])
        idx = torch.tensor([t for i in bin for t in seqs[i]])[None].to(kind[0])
        with torch.no_grad():
            values = model.eval()(idx, doc=torch.arange(len(bin)).repeat_interleave(lengths)[None].to(kind[0]))[0][0]
        out[bin] = values[(lengths.cumsum(0) - 1).to(kind[0])].float().cpu().numpy()
    flat = iter(out.tolist())
    return [[next(flat) for _ in texts] for texts in answers.texts]


QUESTION = ('Two assistants answered the same user. Which answer is better: more helpful, correct and honest? Length is no merit.\n\n'
            '[User]\n{prompt}\n\n[Answer A]\n{a}\n\n[Answer B]\n{b}\n\nReply with one letter: A, B, or T for a tie.')


def ask_judge(url, prompt, a, b):
    """1.0 for A, 0.0 for B, 0.5 for a tie or an answer that is none of them; OpenAI's chat API. ValueError after three failures."""
    import requests
    key = os.environ.get(judge_key, '')
    body = dict(model=judge_model, temperature=0, max_tokens=4, messages=[dict(role='user', content=QUESTION.format(prompt=prompt, a=a, b=b))])
    for attempt in range(3):
        try:
            r = requests.post(url.rstrip('/') + '/chat/completions', json=body, headers={'Authorization': f'Bearer {key}'} if key else {}, timeout=120)
            r.raise_for_status()
            said = re.search(r'\b[ABT]\b', r.json()['choices'][0]['message']['content'] or '')
            return {'A': 1.0, 'B': 0.0}.get(said[0] if said else 'T', 0.5)
        except (requests.RequestException, KeyError, IndexError, ValueError) as e:
            error = e
    raise ValueError(f'judge {url}: {type(error).__name__}: {str(error)[:120]}; is the endpoint up, --judge_model known, the key in ${judge_key}?')


def win_rate(rows, asked, ours, theirs):
    """[{'wins', 'ties', 'losses', 'flipped'}] of each prompt: sample j of ours against sample j of theirs.
    flipped: an http judge changed its mind with the order."""
    pairs = [(i, a, b) for i, (x, y) in enumerate(zip(ours.texts, theirs.texts)) for a, b in zip(x, y)]
    found = [dict(wins=0, ties=0, losses=0, flipped=0) for _ in rows]
    if judge.startswith('http'):
        with ThreadPoolExecutor(8) as pool:
            first = list(pool.map(lambda p: ask_judge(judge, shown(asked[p[0]]), p[1], p[2]), pairs))
            second = list(pool.map(lambda p: 1 - ask_judge(judge, shown(asked[p[0]]), p[2], p[1]), pairs))
        for (i, _, _), x, y in zip(pairs, first, second):
            both = 'ties' if x != y or x == 0.5 else 'wins' if x == 1 else 'losses'
            found[i][both] += 1
            found[i]['flipped'] += {x, y} == {0.0, 1.0}
        return found
    a, b = (score_all(judge or reward, rows, asked, x) for x in (ours, theirs))
    for i, (x, y) in enumerate(zip(a, b)):
        for u, v in zip(x, y):
            found[i]['ties' if abs(u - v) <= tie else 'wins' if u > v else 'losses'] += 1
    return found


def measure_perplexity(path):
    """Nats a trained token of rows, by the model of init_from; (mean, low, high) by bootstrap over rows, weighted by their tokens."""
    kind = pick_device(device, dtype)
    model, tokenizer = load_model(init_from, kind[0])
    pick_threads(threads, model.num_params(), kind[0])
    tok, sums = get_tokenizer(tokenizer), []
    rows = [encode_row(r, tok) for r in load_dataset(path)][:limit or None]
    model.eval()
    for ids, trained in rows:
        ids, trained = ids[:model.config.block_size], torch.tensor(trained[1:model.config.block_size])
        if len(ids) > 1 and trained.any():
            with torch.no_grad():
                logp = model.logprobs(torch.tensor(ids, device=kind[0])[None])[0].float().cpu()
            sums.append((-logp[trained].sum().item(), int(trained.sum())))
    if not sums:
        raise ValueError(f'{path}: no row with a trained token')
    nll, n = np.array(sums, float).T
    rng = np.random.default_rng(seed)
    draws = [(lambda i: nll[i].sum() / n[i].sum())(rng.integers(0, len(n), len(n))) for _ in range(bootstrap)] or [nll.sum() / n.sum()]
    return (float(nll.sum() / n.sum()), *map(float, np.quantile(draws, (0.025, 0.975)))), int(n.sum())


# ---------------------------------------------------------------------------------------------------------------------


def accuracy(rows, asked, ours, wanted, out):
    """pass@k and maj@k of our answers into out; returns the scores [[float]]."""
    fn = load_reward(reward)
    extract, equal = fn.__globals__.get('extract_answer'), fn.__globals__.get('equal')
    scores = [[float(fn(shown(p), t, r)) for t in texts] for r, p, texts in zip(rows, asked, ours.texts)]
    right = [[s > 0.5 for s in x] for x in scores]
    out['score'] = interval([np.mean(s) for s in scores], bootstrap, seed)
    for k in wanted:
        out[f'pass@{k}'] = interval([pass_at_k(len(r), sum(r), k) for r in right], bootstrap, seed)
    if extract and max(wanted) > 1:
        classes = [classes_of([extract(t) for t in texts], equal) for texts in ours.texts]
        for k in wanted[1:] if wanted[0] == 1 else wanted:
            out[f'maj@{k}'] = interval([maj_at_k(c, r, k) for c, r in zip(classes, right)], bootstrap, seed)
    return scores


def main():
    K.use('auto')
    torch.manual_seed(seed)
    if not eval_file and not perplexity:
        raise ValueError('nothing to evaluate: give --eval_file=rows.jsonl (with --reward or --against), or --perplexity=rows.jsonl')
    try:
        wanted = sorted({int(k) for k in ks.split(',') if k})
    except ValueError:
        raise ValueError(f'ks {ks!r}: whole numbers by comma, like 1,4,8') from None
    if not wanted or wanted[0] < 1 or wanted[-1] > num_samples:
        raise ValueError(f'ks {ks!r} with num_samples {num_samples}: every k is between 1 and num_samples; --num_samples={wanted[-1] if wanted else 1}')
    if num_samples > 1 and temperature == 0:
        raise ValueError(f'{num_samples} samples at temperature 0 are {num_samples} times the same: --temperature=0.8, or --num_samples=1')
    if against and not (judge or reward):
        raise ValueError('against without a judge: --judge=data/toy/gold.py, a reward model, or http://host/v1')
    here, out = out_dir or (init_from if os.path.isdir(init_from) else '.'), {}
    os.makedirs(here, exist_ok=True)
    if eval_file:
        rows = [dict(r) for r in load_dataset(eval_file)][:limit or None]
        key = prompt_key(rows)
        asked = [r[key] for r in rows]
        ours = generate(init_from, asked, num_samples)
        scores = accuracy(rows, asked, ours, wanted, out) if reward else [[] for _ in rows]
        wins = [{} for _ in rows]
        if against:
            theirs = from_file(against, asked) if against.endswith('.jsonl') else generate(against, asked, num_samples)
            wins = win_rate(rows, asked, ours, theirs)
            n = [w['wins'] + w['ties'] + w['losses'] for w in wins]
            out['win rate'] = interval([(w['wins'] + 0.5 * w['ties']) / m for w, m in zip(wins, n)], bootstrap, seed)
            out |= {k: sum(w[k] for w in wins) / sum(n) for k in ('wins', 'ties', 'losses', 'flipped')}
        flat = [t for texts in ours.texts for t in texts]
        out |= diversity(flat) | dict(ended=float(np.mean([e for ends in ours.ended for e in ends])), tokens=ours.tokens / len(flat),
                                      prompts=len(rows), samples=num_samples)
        with open(os.path.join(here, 'eval.jsonl.tmp'), 'w', encoding='utf-8') as f:
            for i, row in enumerate(rows):
                more = dict(against=theirs.texts[i], **wins[i]) if against else {}
                f.write(json.dumps(dict(row, completions=ours.texts[i], scores=scores[i], ended=ours.ended[i], **more), ensure_ascii=False) + '\n')
        os.replace(os.path.join(here, 'eval.jsonl.tmp'), os.path.join(here, 'eval.jsonl'))
    if perplexity:
        nats, tokens = measure_perplexity(perplexity)
        out |= {'nats a token': nats, 'perplexity': tuple(map(math.exp, nats)), 'perplexity tokens': tokens}
    with open(os.path.join(here, 'eval.json'), 'w') as f:
        json.dump(dict(config=config, **out), f, indent=2)
    for k, v in out.items():
        print(f'{k:>18}  ' + (f'{v[0]:.4f}   95 %: {v[1]:.4f} to {v[2]:.4f}' if isinstance(v, tuple) else f'{v:.4f}' if isinstance(v, float) else f'{v:,}'))
    print(f'written: {here}/eval.json' + (f', samples in {here}/eval.jsonl' if eval_file else ''))


if __name__ == '__main__':
    main()
