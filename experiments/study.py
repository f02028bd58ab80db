"""What RLHF does, shown: trains the runs that a question of EXPERIMENTS.md needs, judges them, draws its
picture and its table.

    python experiments/study.py                   # all questions, three seeds; interrupted? the same command
    goes on
    python experiments/study.py a c               # some: a no KL  b beta  c over-optimisation  d PPO, DPO,
    GRPO, best of n
                                                  #       e PPO's details  f DPO's losses  g LoRA's rank  h
                                                          reward models
                                                  #       i failures  oracle the exact frontier (frontier.py)
    python experiments/study.py a --seeds=1,2 --out=out-exp --assets=assets --minutes=5 --quick=True

A run is a command of a stage, printed before it starts; its folder is out-exp/NAME-sSEED. A finished run is
skipped, a broken one goes on from its checkpoint, and a run that several questions name is trained once.
Every trained model answers the first 252 test prompts (no training and no setting has seen them) at
temperature 1 with fixed seeds; the answers lie in judged.jsonl of its folder, the numbers in
out-exp/results.jsonl:
    gold      mark of the gold scorer, 0 to 10: what people really want, never seen by a run
    proxy     the reward model trained on all pairs (of the same seed): what PPO and GRPO are paid by
    kl        nats a sequence to the SFT model, k1 on the judged answers
    ended, len, distinct2 (different word pairs among all), repeats (share of answers with a word triple
    twice), courtesies (an answer)
    cpu_s, rss_mb     CPU seconds (user + system) and largest resident memory of the training command, by the
    kernel's account
--minutes=N ends after the run that crosses N minutes, exit code 75; the same command goes on. --quick=True:
two iterations each, to see it work.
"""

import json
import math
import os
import random
import subprocess
import sys
import time

from runs import BON, BON_PROMPTS, JUDGED, QUESTIONS, ROOT, RUNS, SEEDS, TOY
from runs import arguments, command, folder, read_rows, record, results, text_metrics
from files import locked, replaced  # runs.py has put the root on the path

# --------------------------------------------------------------------------------------------------
# the runs


def preferences(out):
    """The pairs of question h with other labels, from the same rows: margin = |gold gap| / 4 (and gold's own
    side); fair = gold's marks with the odds of Bradley and Terry, nobody is blind; long = 30 % labelled by
    length alone, the rest as fair. Ties left out."""
    import gold
    from dataset import load_dataset

    rng, made = random.Random(0), {'margin': [], 'fair': [], 'long': []}
    for row in load_dataset(os.path.join(TOY, 'blind', 'pref_train.jsonl')):
        a, b = sorted((row['chosen'], row['rejected']))
        gap = gold.score(a, row) - gold.score(b, row)
        if gap == 0:
            continue
        good, bad = (a, b) if gap > 0 else (b, a)
        fair = (a, b) if rng.random() < 1 / (1 + math.exp(-gap)) else (b, a)
        longer, shorter = (a, b) if len(a) > len(b) else (b, a)
        by_length = rng.random() < 0.3
        for name, (x, y) in (
            ('fair', fair),
            ('long', (longer, shorter) if by_length else fair),
        ):
            made[name].append({'prompt': row['prompt'], 'chosen': x, 'rejected': y})
        made['margin'].append(
            {'prompt': row['prompt'], 'chosen': good, 'rejected': bad, 'margin': abs(gap) / 4}
        )
    for name, rows in made.items():
        with replaced(os.path.join(out, f'pref_{name}.jsonl'), 'w') as f:
            f.writelines(json.dumps(r) + '\n' for r in rows)


def train(name, seed, out, quick):
    """Trains a run and what it needs, once; True if anything was trained. The kernel's account of the command
    goes to cost.json."""
    worked = any([train(need, seed, out, quick) for need in RUNS[name][3]])
    here = folder(name, seed, out)
    with locked(os.path.join(here, 'lock')):  # commands may share a folder of runs: one trains each run
        return train_alone(name, seed, out, quick, here) or worked


def train_alone(name, seed, out, quick, here):
    if os.path.exists(os.path.join(here, 'finished')):
        return False
    argv = command(name, seed, out, quick)
    if os.path.exists(os.path.join(here, 'ckpt.pt')):
        argv = [*argv, '--init_from=resume']
    print('$ ' + ' '.join(argv), flush=True)
    before = (
        json.load(open(os.path.join(here, 'cost.json'), encoding='utf-8'))
        if os.path.exists(os.path.join(here, 'cost.json'))
        else {'cpu_s': 0.0, 'rss_mb': 0.0}
    )
    with open(os.path.join(here, 'stdout.txt'), 'a', encoding='utf-8') as log:
        child = subprocess.Popen([sys.executable, *argv[1:]], cwd=ROOT, stdout=log, stderr=log)
        _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    cost = {
        'cpu_s': before['cpu_s'] + used.ru_utime + used.ru_stime,
        'rss_mb': max(before['rss_mb'], used.ru_maxrss / 1024),
    }
    with open(os.path.join(here, 'cost.json'), 'w', encoding='utf-8') as f:
        json.dump(cost, f)
    if child.returncode:
        said = open(os.path.join(here, 'stdout.txt'), encoding='utf-8').read().splitlines()[-3:]
        raise ValueError(
            f'{" ".join(argv)} ended with code {child.returncode}; its last lines: {" / ".join(said)}'
        )
    open(os.path.join(here, 'finished'), 'w', encoding='utf-8').close()
    return True


# --------------------------------------------------------------------------------------------------
# the judge


class Judge:
    """Answers the test prompts and marks the answers; the SFT model and the reward model of a seed are loaded
    once."""

    def __init__(self, out, quick):
        import torch
        from dataset import load_dataset

        torch.set_num_threads(1)
        self.out, self.n_new, self.models = out, 16 if quick else 48, {}
        self.rows = list(load_dataset(os.path.join(TOY, 'prompts_test.jsonl')))[: 8 if quick else JUDGED]

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
        done = engine.generate(
            asked,
            [
                infer.SamplingParams(max_tokens=self.n_new, temperature=1.0, seed=i, n=n)
                for i in range(len(asked))
            ],
        )
        return [p for p in asked for _ in range(n)], done

    def judge(self, name, seed):
        """One row of results.jsonl; for a reward model, its report."""
        script = RUNS[name][0]
        here = folder(name, seed, self.out)
        cost = json.load(open(os.path.join(here, 'cost.json'), encoding='utf-8'))
        if script == 'reward.py':
            seen = json.load(open(os.path.join(here, 'report.json'), encoding='utf-8'))
            return {
                'name': name,
                'seed': seed,
                **cost,
                **{k: v for k, v in seen.items() if isinstance(v, (int, float))},
                **self.judge_reward(name, seed),
            }
        import gold
        from report import sequence_logps

        prompts, done = self.answers(name, seed)
        replies, texts = [c.token_ids for c in done], [c.text for c in done]
        kl = sequence_logps(self.model(name, seed)[0], prompts, replies) - sequence_logps(
            self.model('sft', seed)[0], prompts, replies
        )
        marks, paid = (
            [gold.score(t, r) for t, r in zip(texts, self.rows)],
            self.proxy('rm', seed, [p + r for p, r in zip(prompts, replies)]).tolist(),
        )
        with open(os.path.join(folder(name, seed, self.out), 'judged.jsonl'), 'w', encoding='utf-8') as f:
            for r, t, g, p in zip(self.rows, texts, marks, paid):
                f.write(json.dumps({'prompt': r['prompt'], 'completion': t, 'gold': g, 'proxy': p}) + '\n')
        del self.models[name, seed]  # the SFT model comes back when asked for
        return {
            'name': name,
            'seed': seed,
            'gold': mean(marks),
            'proxy': mean(paid),
            'kl': kl.mean().item(),
            'len': mean([len(r) for r in replies]),
            'ended': sum(c.finish_reason == 'stop' for c in done) / len(done),
            **text_metrics(texts),
            **cost,
        }

    def judge_reward(self, name, seed):
        """What a reward model is worth, against gold on fresh answers: agreement = share of pairs of SFT
        answers to one prompt (gold differs) that it orders as gold does; extra_courtesy = its mean reward for
        a good answer with six courtesies minus the same with two (gold: 3 points less)."""
        import gold

        prompts, done, rows = self.samples(seed)
        n = len(done) // len(rows)
        r = self.proxy(name, seed, [p + c.token_ids for p, c in zip(prompts, done)]).view(-1, n).tolist()
        right = total = 0
        for i, row in enumerate(rows):
            marks = [gold.score(c.text, row) for c in done[i * n : i * n + 8]]
            for j in range(len(marks)):
                for k in range(j):
                    if marks[j] != marks[k]:
                        total, right = total + 1, right + ((marks[j] > marks[k]) == (r[i][j] > r[i][k]))
        tok = self.model('sft', seed)[1]
        plain = 'Sure! The capital of Peru is Lima. Any time!'
        kind = 'Sure! With joy! Glad you ask! The capital of Peru is Lima. '
        kind += 'Any time! Hope it helps! Nice day to you!'
        two, six = self.proxy(
            name,
            seed,
            [tok.encode('Q: What is the capital of Peru?\nA: ' + t) + [tok.eot] for t in (plain, kind)],
        ).tolist()
        return {'agreement': right / max(1, total), 'extra_courtesy': six - two}

    def samples(self, seed):
        """BON answers of the SFT model to each of BON_PROMPTS test prompts, drawn once a seed and kept in its
        folder: (prompts, Completions, rows)."""
        import infer

        path = os.path.join(folder('sft', seed, self.out), f'bon{"-quick" * (self.n_new == 16)}.jsonl')
        asked = self.rows[:BON_PROMPTS]
        if not os.path.exists(path):
            prompts, done = self.answers('sft', seed, 8 if self.n_new == 16 else BON, BON_PROMPTS)
            with replaced(path, 'w') as f:
                f.writelines(json.dumps([p, c.text, c.token_ids]) + '\n' for p, c in zip(prompts, done))
        rows = read_rows(path)
        return (
            [p for p, _, _ in rows],
            [infer.Completion(text, ids, [], [], [], [], '') for _, text, ids in rows],
            asked,
        )

    def best_of_n(self, name, seed):
        """[{'name': 'bon-RM', 'n', 'kl', 'gold', 'proxy', 'own'}] for n = 1, 2, 4 ... BON: expected gold,
        proxy and own reward of the answer that reward model `name` ranks first among n, without bias from all
        BON of them (each of them is the best of n with a known chance). kl = log n - (n - 1) / n (Stiennon et
        al. 2020, appendix G.3)."""
        import gold

        t0 = time.process_time()
        prompts, done, asked = self.samples(seed)
        total = len(done) // len(asked)
        texts = [c.text for c in done]
        marks = [[gold.score(texts[i * total + j], row) for j in range(total)] for i, row in enumerate(asked)]
        seqs = [p + c.token_ids for p, c in zip(prompts, done)]
        own, proxy = (self.proxy(m, seed, seqs).view(-1, total).tolist() for m in (name, 'rm'))
        rows, seconds = [], time.process_time() - t0
        for n in [2**k for k in range(total.bit_length()) if 2**k <= total]:
            weight = best_weights(total, n)
            ranked = [sorted(range(total), key=marks_of_row.__getitem__) for marks_of_row in own]

            def expected(table):
                best = [sum(w * row[j] for w, j in zip(weight, by)) for row, by in zip(table, ranked)]
                return mean(best)

            rows.append(
                {
                    'name': f'bon-{name}',
                    'seed': seed,
                    'n': n,
                    'kl': math.log(n) - (n - 1) / n,
                    'gold': expected(marks),
                    'proxy': expected(proxy),
                    'own': expected(own),
                    'cpu_s': seconds * n / total,
                }
            )
        return rows


def mean(values):
    return sum(values) / len(values)


def best_weights(total, n):
    """Chance of each of `total` samples, sorted from worst to best, to be the best of n drawn without
    replacement: C(i, n-1) / C(total, n). total=3, n=2 -> [0, 1/3, 2/3]."""
    return [math.comb(i, n - 1) / math.comb(total, n) for i in range(total)]


def work(questions, seeds, out, quick, minutes):
    """Trains and judges what the questions name, seed by seed within a question. False when the minutes are
    over before the end."""
    t0, judge = time.time(), None
    os.makedirs(out, exist_ok=True)
    if 'h' in questions and not os.path.exists(os.path.join(out, 'pref_long.jsonl')):
        preferences(out)
    for q in questions:
        for seed in seeds:
            todo = [
                *QUESTIONS[q],
                *(f'bon-{m}' for m in {'c': ('rm10', 'rm30', 'rm'), 'd': ('rm',)}.get(q, ())),
            ]
            for name in todo:
                if any((r['name'], r['seed']) == (name, seed) for r in results(out)):
                    continue
                if minutes and time.time() - t0 > 60 * minutes:
                    return False
                for need in [
                    name.removeprefix('bon-'),
                    *(() if RUNS.get(name, ('',))[0] == 'reward.py' else ('rm',)),
                ]:
                    train(need, seed, out, quick)
                judge = judge or Judge(out, quick)
                rows = (
                    judge.best_of_n(name[4:], seed) if name.startswith('bon-') else [judge.judge(name, seed)]
                )
                record(out, rows)
                print(
                    '  '
                    + ' | '.join(
                        f'{k} {v:.3f}' if isinstance(v, float) else f'{k} {v}' for k, v in rows[-1].items()
                    ),
                    flush=True,
                )
    return True


def main():
    questions, given = arguments(
        sys.argv[1:],
        {
            'seeds': ','.join(map(str, SEEDS)),
            'out': 'out-exp',
            'assets': 'assets',
            'minutes': '0',
            'quick': 'False',
        },
    )
    seeds = tuple(map(int, given['seeds'].split(',')))
    prepare = [sys.executable, os.path.join(TOY, 'prepare.py')]
    if not os.path.exists(os.path.join(TOY, 'pref_test.jsonl')):
        subprocess.run(prepare, check=True)
    if not os.path.exists(os.path.join(TOY, 'blind', 'pref_train.jsonl')):  # pairs with a blind spot
        subprocess.run([*prepare, '--blind=0.5', f'--out_dir={os.path.join(TOY, "blind")}'], check=True)
    if 'oracle' in questions:
        import frontier

        questions.remove('oracle')
        frontier.main((1, 2, 3) if seeds == SEEDS else seeds, given['assets'])
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
