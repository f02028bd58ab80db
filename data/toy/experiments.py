"""What RLHF does, shown: one command a question, three seeds, a picture and a table for each in assets/; EXPERIMENTS.md says what they mean.

    python data/toy/experiments.py a                    # a question: trains what is missing, judges it, draws assets/exp_a.png and exp_a.md
    python data/toy/experiments.py a b c d e f g h      # all of them
    python data/toy/experiments.py a --seeds=1,2 --out=out-exp --assets=assets --minutes=5 --quick=True

A run is a command of a stage, printed before it starts; its folder is out-exp/NAME-sSEED. A finished run is skipped, a broken one goes on
from its checkpoint, and a run that several questions name is trained once. Every trained model answers the 250 test prompts (no training and
no setting has seen them) at temperature 1 with fixed seeds; the answers lie in judged.jsonl of its folder, the numbers in out-exp/results.jsonl:
    gold      mark of the gold scorer, 0 to 10: what people really want, never seen by a run
    proxy     the reward model trained on all pairs (of the same seed): what PPO and GRPO are paid by
    kl        nats a sequence to the SFT model, k1 on the judged answers
    ended, len, distinct2 (different word pairs among all), repeats (share of answers with a word triple twice), courtesies (an answer)
    cpu_s, rss_mb     CPU seconds (user + system) and largest resident memory of the training command, by the kernel's account
--minutes=N ends after the run that crosses N minutes, exit code 75; the same command goes on. --quick=True: two iterations each, to see it work.
"""
import json
import math
import os
import random
import subprocess
import sys
import time

_here = os.path.dirname(os.path.abspath(__file__))
_root = os.path.dirname(os.path.dirname(_here))
sys.path[:0] = [_root, _here]

from files import locked, replaced

SEEDS = (1337, 2, 3)
# name: (script, config, {key: value}, runs that must be there before). {o} is the folder of all runs, {s} the seed.
# everything, the base model too, is trained anew for each seed, by quickstart's commands
SFT, RM = {'init_from': '{o}/sft-s{s}'}, {'reward': '{o}/rm-s{s}'}
RUNS = {
    'base': ('sft.py', 'pretrain_toy', {}, ()),
    'sft': ('sft.py', 'sft_toy', {'init_from': '{o}/base-s{s}'}, ('base',)),
    'rm': ('reward.py', 'ablate_reward', SFT, ('sft',)),
    'rm10': ('reward.py', 'ablate_reward', {**SFT, 'max_rows': 600, 'epochs': 3.0}, ('sft',)),
    'rm30': ('reward.py', 'ablate_reward', {**SFT, 'max_rows': 1800, 'epochs': 1.5}, ('sft',)),
}


def _add(stage, name, needs=('sft', 'rm'), **keys):
    own = {**SFT, **(RM if stage in ('ppo', 'grpo') else {}), **keys}
    RUNS[name] = (f'{stage}.py', f'ablate_{stage}', own, needs)
    return name


BETAS = {b: _add('ppo', f'ppo-beta{b}', beta=b) for b in (0.0, 0.05, 0.2, 0.8)}
TUNED = BETAS[0.2]
HALF = dict(max_iters=16, eval_interval=16, eval_iters=48)  # half as long, for about the compute of a GRPO or DPO run below
LONGER = dict(max_iters=48, eval_interval=3)  # a and c: half as long again, so that the fall is seen to its end, and looked at more often
LEASHED, OVER = _add('ppo', 'ppo-leashed', **LONGER), {}
for _n, _rm in (('10 %', 'rm10'), ('30 %', 'rm30'), ('100 %', 'rm')):
    OVER[_n] = _rm, _add('ppo', f'ppo-over-{_rm}', ('sft', _rm), beta=0.0, reward=f'{{o}}/{_rm}-s{{s}}', **LONGER)
DETAILS = {  # what each detail of PPO buys: one key away from the first
    'as tuned': _add('ppo', 'ppo-half', **HALF),
    'no advantage whitening': _add('ppo', 'ppo-nowhiten', **HALF, whiten_advantages=False),
    'no end-token rule': _add('ppo', 'ppo-noeos', **HALF, missing_eos='none'),
    'no value clip': _add('ppo', 'ppo-novclip', **HALF, vf_clip=0.0),
    'lambda 1 (no GAE)': _add('ppo', 'ppo-lam1', **HALF, lam=1.0),
    '4 passes over half the data': _add('ppo', 'ppo-epochs4', **{**HALF, 'max_iters': 8, 'eval_interval': 8}, ppo_epochs=4),
    'adaptive beta, 3 nats': _add('ppo', 'ppo-adaptive', **HALF, target_kl=3.0, kl_horizon=500),
}
DPO, METHODS = _add('dpo', 'dpo', ('sft',)), {'PPO': 'ppo-half', **{f'GRPO, beta {b}': _add('grpo', f'grpo-beta{b}', beta=b) for b in (0.1, 0.4)}, 'DPO': 'dpo'}
LONG = {'PPO, twice as long': TUNED, 'DPO, one epoch': 'dpo-long'}
RUNS['dpo-long'] = ('dpo.py', 'dpo_toy', SFT, ('sft',))
LOSSES = {'sigmoid, beta 0.1': DPO, **{
    f'{kind}, beta {b}': _add('dpo', f'dpo-{kind}{b}', ('sft',), loss_type=kind, beta=b)
    for kind, b in (('sigmoid', 0.02), ('sigmoid', 0.5), ('ipo', 0.1), ('kto', 0.1), ('simpo', 2.0))}}
RANKS = {0: DPO, **{r: _add('dpo', f'dpo-r{r}', ('sft',), lora_r=r, learning_rate=1e-3) for r in (1, 8, 64)}}
RM_DATA = {
    '10 % of the pairs': 'rm10', '30 %': 'rm30', '100 %': 'rm',
    'margin = gold gap': 'rm-margin', 'no length bias': 'rm-fair', '30 % of labels by length': 'rm-long',
}
for _n in ('margin', 'fair', 'long'):
    RUNS[f'rm-{_n}'] = ('reward.py', 'ablate_reward', {**SFT, 'dataset': f'{{o}}/pref_{_n}.jsonl'}, ('sft',))
# one line wrong each, beside its right twin: {label: (wrong run, right run, the number that tells, 'eval', 'train' or 'judged')}
_SHORT = dict(max_iters=8, eval_interval=8, eval_iters=48)
_RIGHT = {'ppo': _add('ppo', 'ppo-short', **_SHORT), 'grpo': _add('grpo', 'grpo-short', **_SHORT, max_new_tokens=64)}


def _wrong(stage, name, **keys):
    script, config, own, needs = RUNS[_RIGHT[stage]]
    RUNS[name.replace('_', '-')] = (f'failures/{name}.py', config, {**own, **keys}, needs)
    return name.replace('_', '-')


RUNS['sft-short'] = ('sft.py', 'sft_toy', {**RUNS['sft'][2], 'max_iters': 120}, ('base',))
RUNS['pad-is-eos'] = ('failures/pad_is_eos.py', *RUNS['sft-short'][1:])
FAILURES = {
    'pad = EOS': ('pad-is-eos', 'sft-short', 'ended', 'judged'),
    'KL with the wrong sign': (_wrong('ppo', 'wrong_kl_sign'), _RIGHT['ppo'], 'kl', 'train'),
    'sampled at T = 0.5, scored at 1': (_wrong('ppo', 'temperature_mismatch'), _RIGHT['ppo'], 'mismatch', 'train'),
    'sampled with top-p 0.7, scored without': (_wrong('ppo', 'top_p_mismatch'), _RIGHT['ppo'], 'mismatch', 'train'),
    'padded on the wrong side': (_wrong('ppo', 'wrong_padding_side'), _RIGHT['ppo'], 'mismatch', 'train'),
    'a group of one': (_wrong('grpo', 'group_of_one', group_size=1), _RIGHT['grpo'], 'dead', 'train'),
}
QUESTIONS = {
    'a': ['sft', OVER['100 %'][1], LEASHED], 'b': ['sft', *BETAS.values()], 'c': ['sft', *(name for pair in OVER.values() for name in pair)],
    'd': ['sft', *METHODS.values(), *LONG.values()], 'e': list(DETAILS.values()), 'f': list(LOSSES.values()), 'g': list(RANKS.values()), 'h': list(RM_DATA.values()),
    'i': list(dict.fromkeys(n for wrong, right, _, _ in FAILURES.values() for n in (right, wrong))),
}
QUICK = {'sft': ['--max_iters=2', '--eval_interval=2', '--eval_iters=1'], 'reward': ['--max_iters=2', '--normalize_n=8'],
         'ppo': ['--max_iters=2', '--eval_interval=1', '--eval_iters=4', '--batch_size=8', '--minibatch_size=8', '--max_new_tokens=16'],
         'grpo': ['--max_iters=2', '--eval_interval=1', '--eval_iters=4', '--batch_size=16', '--minibatch_size=16', '--max_new_tokens=16'],
         'dpo': ['--max_iters=2', '--batch_size=8', '--eval_samples=4', '--eval_iters=1', '--max_new_tokens=16']}
BON, BON_PROMPTS = 64, 40  # answers of the SFT model to each of the first so many test prompts, for best-of-n


# ---------------------------------------------------------------------------------------------------------------------
# the runs


def folder(name, seed, out):
    return os.path.join(out, f'{name}-s{seed}')


def stage_of(name):
    config = RUNS[name][1]
    return {'pretrain_toy': 'sft'}.get(config, config.removeprefix('ablate_').removesuffix('_toy'))


def command(name, seed, out, quick):
    """The command line of a run, as a user would type it."""
    script, config, keys, _ = RUNS[name]
    args = [f'--{k}={str(v).format(o=out, s=seed)}' for k, v in keys.items()]
    return ['python', script, f'config/{config}.py', *args, *(QUICK[stage_of(name)] if quick else ()), f'--seed={seed}', f'--out_dir={folder(name, seed, out)}']


def preferences(out):
    """The pairs of question h with other labels, from the same rows: margin = |gold gap| / 4 (and gold's own side); fair = gold's side, 5 % flipped;
    long = 30 % labelled by length alone, the rest as fair. Ties left out."""
    import gold
    from dataset import load_dataset
    rng, made = random.Random(0), {'margin': [], 'fair': [], 'long': []}
    for row in load_dataset(os.path.join(_here, 'pref_train.jsonl')):
        a, b = sorted((row['chosen'], row['rejected']))
        gap = gold.score(a, row) - gold.score(b, row)
        if row['tie'] or gap == 0:
            continue
        good, bad = (a, b) if (gap > 0) != (rng.random() < 0.05) else (b, a)
        longer, shorter = (a, b) if len(a) > len(b) else (b, a)
        by_length = rng.random() < 0.3
        for name, (x, y) in (('fair', (good, bad)), ('long', (longer, shorter) if by_length else (good, bad))):
            made[name].append({'prompt': row['prompt'], 'chosen': x, 'rejected': y})
        made['margin'].append({'prompt': row['prompt'], 'chosen': good, 'rejected': bad, 'margin': abs(gap) / 4})
    for name, rows in made.items():
        with replaced(os.path.join(out, f'pref_{name}.jsonl'), 'w') as f:
            f.writelines(json.dumps(r) + '\n' for r in rows)


def train(name, seed, out, quick):
    """Trains a run and what it needs, once; True if anything was trained. The kernel's account of the command goes to cost.json."""
    worked = any([train(need, seed, out, quick) for need in RUNS[name][3]])
    here = folder(name, seed, out)
    with locked(os.path.join(here, 'lock')):  # commands may share a folder of runs: one of them trains each run
        return train_alone(name, seed, out, quick, here) or worked


def train_alone(name, seed, out, quick, here):
    if os.path.exists(os.path.join(here, 'finished')):
        return False
    argv = command(name, seed, out, quick)
    if os.path.exists(os.path.join(here, 'ckpt.pt')):
        argv = [*argv, '--init_from=resume']
    print('$ ' + ' '.join(argv), flush=True)
    before = json.load(open(os.path.join(here, 'cost.json'))) if os.path.exists(os.path.join(here, 'cost.json')) else {'cpu_s': 0.0, 'rss_mb': 0.0}
    with open(os.path.join(here, 'stdout.txt'), 'a') as log:
        child = subprocess.Popen([sys.executable, *argv[1:]], cwd=_root, stdout=log, stderr=log)
        _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    cost = {'cpu_s': before['cpu_s'] + used.ru_utime + used.ru_stime, 'rss_mb': max(before['rss_mb'], used.ru_maxrss / 1024)}
    with open(os.path.join(here, 'cost.json'), 'w') as f:
        json.dump(cost, f)
    if child.returncode:
        said = open(os.path.join(here, 'stdout.txt')).read().splitlines()[-3:]
        raise ValueError(f'{" ".join(argv)} ended with code {child.returncode}; its last lines: {" / ".join(said)}')
    open(os.path.join(here, 'finished'), 'w').close()
    return True


# ---------------------------------------------------------------------------------------------------------------------
# the judge


def text_metrics(texts):
    """Signs of collapse in [str]: distinct2 = different word pairs / all word pairs; repeats = share of texts that hold a word triple twice;
    courtesies = kind phrases a text. ['a b a b a b', 'c d'] -> distinct2 3/6, repeats 1/2."""
    import gold
    pairs, repeated, kind = [], 0, 0
    for text in texts:
        w = gold.words(text)
        pairs += zip(w, w[1:])
        triples = list(zip(w, w[1:], w[2:]))
        repeated += len(set(triples)) < len(triples)
        kind += sum(text.count(p) for p in gold.OPENERS + gold.CLOSERS)
    return {'distinct2': len(set(pairs)) / max(1, len(pairs)), 'repeats': repeated / len(texts), 'courtesies': kind / len(texts)}


class Judge:
    """Answers the test prompts and marks the answers; the SFT model and the reward model of a seed are loaded once."""

    def __init__(self, out, quick):
        import torch
        from dataset import load_dataset
        torch.set_num_threads(1)
        self.out, self.n_new, self.models = out, 16 if quick else 96, {}
        self.rows = list(load_dataset(os.path.join(_here, 'prompts_test.jsonl')))[:8 if quick else None]

    def model(self, name, seed, head='lm'):
        from tokenizer import get_tokenizer
        from run import load_model
        if (name, seed) not in self.models:
            net, tok = load_model(folder(name, seed, self.out), head=head)
            self.models[name, seed] = net.eval(), get_tokenizer(tok)
        return self.models[name, seed]

    def proxy(self, name, seed, sequences):
        from model import all_rewards
        return all_rewards(self.model(name, seed, 'scalar')[0], sequences)

    def answers(self, name, seed, n=1, limit=None):
        """(prompt ids [n a prompt], Completions), n a prompt, temperature 1, seeds 0, 1, ..."""
        import infer
        net, tok = self.model(name, seed)
        asked = [tok.encode(r['prompt']) for r in self.rows[:limit]]
        engine = infer.Engine(net, tok, max_num_seqs=128)
        done = engine.generate(asked, [infer.SamplingParams(max_tokens=self.n_new, temperature=1.0, seed=i, n=n) for i in range(len(asked))])
        return [p for p in asked for _ in range(n)], done

    def judge(self, name, seed):
        """One row of results.jsonl; for a reward model, its report."""
        script = RUNS[name][0]
        cost = json.load(open(os.path.join(folder(name, seed, self.out), 'cost.json')))
        if script == 'reward.py':
            seen = json.load(open(os.path.join(folder(name, seed, self.out), 'report.json')))
            return {'name': name, 'seed': seed, **cost, **{k: v for k, v in seen.items() if isinstance(v, (int, float))}, **self.judge_reward(name, seed)}
        import gold
        from report import sequence_logps
        prompts, done = self.answers(name, seed)
        replies, texts = [c.token_ids for c in done], [c.text for c in done]
        kl = sequence_logps(self.model(name, seed)[0], prompts, replies, 1.0) - sequence_logps(self.model('sft', seed)[0], prompts, replies, 1.0)
        marks, paid = [gold.score(t, r) for t, r in zip(texts, self.rows)], self.proxy('rm', seed, [p + r for p, r in zip(prompts, replies)]).tolist()
        with open(os.path.join(folder(name, seed, self.out), 'judged.jsonl'), 'w') as f:
            for r, t, g, p in zip(self.rows, texts, marks, paid):
                f.write(json.dumps({'prompt': r['prompt'], 'completion': t, 'gold': g, 'proxy': p}) + '\n')
        del self.models[name, seed]  # the SFT model comes back when asked for
        mean = lambda v: sum(v) / len(v)
        return {'name': name, 'seed': seed, 'gold': mean(marks), 'proxy': mean(paid), 'kl': kl.mean().item(), 'len': mean([len(r) for r in replies]),
                'ended': sum(c.finish_reason == 'stop' for c in done) / len(done), **text_metrics(texts), **cost}

    def judge_reward(self, name, seed):
        """What a reward model is worth, against gold on fresh answers: agreement = share of pairs of SFT answers to one prompt (gold differs) that
        it orders as gold does; extra_courtesy = its mean reward for a good answer with six courtesies minus the same with two (gold: 4 points less)."""
        import gold
        prompts, done, rows = self.samples(seed)
        n = len(done) // len(rows)
        r = self.proxy(name, seed, [p + c.token_ids for p, c in zip(prompts, done)]).view(-1, n).tolist()
        right = total = 0
        for i, row in enumerate(rows):
            marks = [gold.score(c.text, row) for c in done[i * n:i * n + 8]]
            for j in range(len(marks)):
                for k in range(j):
                    if marks[j] != marks[k]:
                        total, right = total + 1, right + ((marks[j] > marks[k]) == (r[i][j] > r[i][k]))
        tok = self.model('sft', seed)[1]
        plain = 'Sure! The capital of Peru is Lima. Any time!'
        kind = 'Sure! With joy! Glad you ask! The capital of Peru is Lima. Any time! Hope it helps! Nice day to you!'
        two, six = self.proxy(name, seed, [tok.encode('Q: What is the capital of Peru?\nA: ' + t) + [tok.eot] for t in (plain, kind)]).tolist()
        return {'agreement': right / max(1, total), 'extra_courtesy': six - two}

    def samples(self, seed):
        """BON answers of the SFT model to each of BON_PROMPTS test prompts, drawn once a seed and kept in its folder: (prompts, Completions, rows)."""
        import infer
        path = os.path.join(folder('sft', seed, self.out), f'bon{"-quick" * (self.n_new == 16)}.jsonl')
        asked = self.rows[:BON_PROMPTS]
        if not os.path.exists(path):
            prompts, done = self.answers('sft', seed, 8 if self.n_new == 16 else BON, BON_PROMPTS)
            with replaced(path, 'w') as f:
                f.writelines(json.dumps([p, c.text, c.token_ids]) + '\n' for p, c in zip(prompts, done))
        rows = [json.loads(line) for line in open(path)]
        return [p for p, _, _ in rows], [infer.Completion(text, ids, [], [], [], [], '') for _, text, ids in rows], asked

    def best_of_n(self, name, seed):
        """[{'name': 'bon-RM', 'n', 'kl', 'gold', 'proxy', 'own'}] for n = 1, 2, 4 ... BON: expected gold, proxy and own reward of the answer that
        reward model `name` ranks first among n, without bias from all BON of them (each of them is the best of n with a known chance).
        kl = log n - (n - 1) / n (Stiennon et al. 2020, appendix G.3)."""
        import gold
        t0 = time.process_time()
        prompts, done, asked = self.samples(seed)
        total = len(done) // len(asked)
        texts = [c.text for c in done]
        marks = [[gold.score(texts[i * total + j], row) for j in range(total)] for i, row in enumerate(asked)]
        seqs = [p + c.token_ids for p, c in zip(prompts, done)]
        own, proxy = (self.proxy(m, seed, seqs).view(-1, total).tolist() for m in (name, 'rm'))
        rows, seconds = [], time.process_time() - t0
        for n in [2 ** k for k in range(total.bit_length()) if 2 ** k <= total]:
            weight = best_weights(total, n)
            mean = lambda table: sum(sum(w * table[i][j] for w, j in zip(weight, sorted(range(total), key=own[i].__getitem__))) for i in range(len(own))) / len(own)
            rows.append({'name': f'bon-{name}', 'seed': seed, 'n': n, 'kl': math.log(n) - (n - 1) / n, 'gold': mean(marks), 'proxy': mean(proxy), 'own': mean(own), 'cpu_s': seconds * n / total})
        return rows


def best_weights(total, n):
    """Chance of each of `total` samples, sorted from worst to best, to be the best of n drawn without replacement: C(i, n-1) / C(total, n).
    total=3, n=2 -> [0, 1/3, 2/3]."""
    return [math.comb(i, n - 1) / math.comb(total, n) for i in range(total)]


def trajectory(name, seed, out):
    """[{'step', 'kl', 'proxy', 'gold', 'distinct2', ...}] of a PPO or GRPO run: its own evaluations on validation prompts, marked by gold now."""
    import gold
    from dataset import load_dataset
    rows = {r['prompt']: r for r in load_dataset(os.path.join(_here, 'prompts_val.jsonl'))}
    at = {}
    for s in map(json.loads, open(os.path.join(folder(name, seed, out), 'samples.jsonl'))):
        at.setdefault(s['step'], []).append(s)
    seen = {r['step']: r for r in map(json.loads, open(os.path.join(folder(name, seed, out), 'log.jsonl'))) if r['split'] == 'eval'}
    found = []
    for step, samples in sorted(at.items()):
        texts = [s['completion'].replace('<|endoftext|>', '') for s in samples]
        marks = [gold.score(t, rows[s['prompt']]) for t, s in zip(texts, samples)]
        found.append({'step': step, 'kl': seen[step]['kl'], 'proxy': seen[step]['score'], 'len': seen[step]['len'], 'gold': sum(marks) / len(marks), **text_metrics(texts)})
    return found


def results(out):
    path = os.path.join(out, 'results.jsonl')
    return [json.loads(line) for line in open(path)] if os.path.exists(path) else []


def record(out, rows):
    with open(os.path.join(out, 'results.jsonl'), 'a') as f:
        f.writelines(json.dumps(r) + '\n' for r in rows)


def work(questions, seeds, out, quick, minutes):
    """Trains and judges what the questions name, seed by seed within a question. False when the minutes are over before the end."""
    t0, judge = time.time(), None
    os.makedirs(out, exist_ok=True)
    if 'h' in questions and not os.path.exists(os.path.join(out, 'pref_long.jsonl')):
        preferences(out)
    for q in questions:
        for seed in seeds:
            todo = [*QUESTIONS[q], *(f'bon-{m}' for m in {'c': ('rm10', 'rm30', 'rm'), 'd': ('rm',)}.get(q, ()))]
            for name in todo:
                if any((r['name'], r['seed']) == (name, seed) for r in results(out)):
                    continue
                if minutes and time.time() - t0 > 60 * minutes:
                    return False
                for need in [name.removeprefix('bon-'), *(() if RUNS.get(name, ('',))[0] == 'reward.py' else ('rm',))]:
                    train(need, seed, out, quick)
                judge = judge or Judge(out, quick)
                rows = judge.best_of_n(name[4:], seed) if name.startswith('bon-') else [judge.judge(name, seed)]
                record(out, rows)
                print('  ' + ' | '.join(f'{k} {v:.3f}' if isinstance(v, float) else f'{k} {v}' for k, v in rows[-1].items()), flush=True)
    return True


def arguments(args, given):
    """['a', '--seeds=1,2'] -> (['a'], given with what was said). A mistake ends the program with one line."""
    questions = [a for a in args if not a.startswith('--')]
    for a in args:
        key, _, said = a[2:].partition('=')
        if a.startswith('--') and (key not in given or not said):
            print(f'error: unknown option {a!r}; known: ' + ' '.join(f'--{k}={v}' for k, v in given.items()), file=sys.stderr)
            raise SystemExit(2)
        given |= {key: said} if a.startswith('--') else {}
    if not questions or set(questions) - set(QUESTIONS):
        print(f'error: expected one or more questions of {" ".join(QUESTIONS)}, got {questions}', file=sys.stderr)
        raise SystemExit(2)
    return questions, given


def main():
    questions, given = arguments(sys.argv[1:], {'seeds': ','.join(map(str, SEEDS)), 'out': 'out-exp', 'assets': 'assets', 'minutes': '0', 'quick': 'False'})
    seeds = tuple(map(int, given['seeds'].split(',')))
    if not os.path.exists(os.path.join(_here, 'prompts_test.jsonl')):
        raise ValueError('no toy data yet: python data/toy/prepare.py')
    if not work(questions, seeds, given['out'], given['quick'] == 'True', float(given['minutes'])):
        print('the minutes are over; the same command goes on')
        raise SystemExit(75)
    import figures
    for q in questions:
        figures.write(q, given['out'], given['assets'], seeds)


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError) as e:
        print(f'error: {e}', file=sys.stderr)
        raise SystemExit(2)
