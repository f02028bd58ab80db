"""The table and the curve at the end of quickstart.sh: every model answers the same test prompts of the toy world.

    python data/toy/report.py --out=out base=out-base sft=out-sft ppo=out-ppo ...      # one run: out/report.md, out/curve.png
    python data/toy/report.py --out=out --seeds out out-seed2 out-seed3                # several: min / median / max, out/seeds.md and out/seeds.png

Columns: gold = mark of the gold scorer, 0 to 10, which no training run has seen; reward = the learned reward model's;
KL = nats a sequence between the model and the SFT model, on the model's own samples; valid = share of answers that end,
on one line, with a full stop; sums = share of right answers to test sums, greedy; sums T=1 = the same of samples at
temperature 1; tok/s = the engine's output; seconds = what training took. All other samples at temperature 0.7, same seeds.
The prompts are prompts_test.jsonl and arith_test.jsonl, which no training and no choice of a setting has seen.
"""
import json
import os
import sys
import time

_here = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(os.path.dirname(_here)), _here]

import torch

import gold
import infer
from dataset import load_dataset, pad
from tokenizer import get_tokenizer
from model import all_rewards
from run import load_model
from rollout import load_reward

COLUMNS = ('gold', 'reward', 'kl', 'length', 'valid', 'sums', 'sums T=1', 'tok/s', 'seconds')


def sequence_logps(model, prompts, responses, temperature):
    """Sum of the response's log-probs of each row (B,), in groups of 64 rows."""
    out = []
    for i in range(0, len(prompts), 64):
        p, r = prompts[i:i + 64], responses[i:i + 64]
        idx, mask = pad([a + b for a, b in zip(p, r)])
        start = torch.tensor([len(a) - 1 for a in p])[:, None]
        with torch.no_grad():
            logp = model.logprobs(idx, temperature, mask)
        out.append(torch.where((torch.arange(logp.shape[1]) >= start) & mask[:, 1:], logp, 0.0).sum(1))
    return torch.cat(out)


def train_seconds(out_dir):
    try:
        return max(json.loads(line)['time'] for line in open(os.path.join(out_dir, 'log.jsonl')))
    except (OSError, ValueError, KeyError):
        return float('nan')


def judge(out_dir, sft, rm, rows, sums, n_new=80, temperature=0.7):
    """One row of the table, and the answers."""
    model, name = load_model(out_dir)
    tok = get_tokenizer(name)
    engine = infer.Engine(model.eval(), tok, max_num_seqs=64)
    prompts, t0 = [tok.encode(r['prompt']) for r in rows], time.time()
    done = engine.generate(prompts, [infer.SamplingParams(max_tokens=n_new, temperature=temperature, seed=i) for i in range(len(rows))])
    rate = sum(len(c.token_ids) for c in done) / (time.time() - t0)
    responses = [c.token_ids for c in done]
    kl = (sequence_logps(model, prompts, responses, temperature) - sequence_logps(sft, prompts, responses, temperature)).mean().item()
    asked = [r['prompt'] for r in sums]
    greedy = engine.generate(asked, infer.SamplingParams(max_tokens=n_new, temperature=0.0))
    sampled = engine.generate(asked, [infer.SamplingParams(max_tokens=n_new, temperature=1.0, seed=i) for i in range(len(sums))])
    sys.path.insert(0, _here)
    arithmetic = load_reward(os.path.join(_here, 'reward.py'))
    exact = lambda answers: sum(arithmetic(r['prompt'], c.text, r) if c.finish_reason == 'stop' else 0.0 for c, r in zip(answers, sums)) / len(sums)
    ended = [c.finish_reason == 'stop' for c in done]
    tidy = [e and gold.marks(c.text, r)['tidy'] == 2 for e, c, r in zip(ended, done, rows)]
    row = {'gold': sum(gold.score(c.text, r) for c, r in zip(done, rows)) / len(rows),
           'reward': all_rewards(rm, [p + r for p, r in zip(prompts, responses)]).mean().item(), 'kl': kl,
           'length': sum(map(len, responses)) / len(rows), 'valid': sum(tidy) / len(rows),
           'sums': exact(greedy), 'sums T=1': exact(sampled), 'tok/s': rate, 'seconds': train_seconds(out_dir)}
    return row, [c.text for c in done]


def cell(column, value):
    return {'gold': f'{value:.2f}', 'reward': f'{value:.2f}', 'kl': f'{value:.2f}', 'length': f'{value:.0f}', 'valid': f'{value:.0%}', 'sums': f'{value:.1%}', 'sums T=1': f'{value:.1%}',
            'tok/s': f'{value:,.0f}', 'seconds': f'{value:.0f}'}[column]


def markdown(table):
    """{name: {column: text}} -> a Markdown table."""
    lines = ['| model | ' + ' | '.join(COLUMNS) + ' |', '| --- |' + ' --- |' * len(COLUMNS)]
    return '\n'.join(lines + [f'| {name} | ' + ' | '.join(row[c] for c in COLUMNS) + ' |' for name, row in table.items()])


def draw(runs, path):
    """PPO's reward and KL, GRPO's share of right sums, over the iterations. runs: {'ppo': [out_dir of each seed], 'grpo': [...]}."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    def series(folder, split, key):
        rows = [json.loads(line) for line in open(os.path.join(folder, 'log.jsonl'))]
        return zip(*((r['step'], r[key]) for r in rows if r['split'] == split and key in r))
    fig, axes = plt.subplots(1, len(runs), figsize=(5.2 * len(runs), 3.4), dpi=120, squeeze=False)
    for axis, (stage, folders) in zip(axes[0], runs.items()):
        axis.set_xlabel(f'{stage.upper()} iteration')
        axis.spines[['top', 'right']].set_visible(False)
        for i, folder in enumerate(folders):
            label = lambda text: text if i == 0 else None
            axis.plot(*series(folder, 'train', 'score'), color='#6baed6', lw=0.9, alpha=0.8, label=label('reward of each batch'))
            axis.plot(*series(folder, 'eval', 'score'), 'o-', color='#08519c', lw=1.8, ms=4, label=label('on held-out prompts'))
        axis.set_ylabel('reward model score' if stage == 'ppo' else 'share of right sums', color='#08519c')
        handles = axis.get_lines()[:2]
        if stage == 'ppo':
            right = axis.twinx()
            right.spines['top'].set_visible(False)
            right.set_ylabel('KL to the SFT model, nats a sequence', color='#d94801')
            for i, folder in enumerate(folders):
                right.plot(*series(folder, 'train', 'kl'), color='#d94801', lw=0.9, alpha=0.8, label='KL')
            right.set_ylim(0, None)
            handles = [*handles, right.get_lines()[0]]
        axis.legend(handles, [h.get_label() for h in handles], loc='lower right', frameon=False, fontsize=8)
    fig.tight_layout()
    fig.savefig(path)


def merge(folders, out):
    """report.json of several seeds -> min / median / max in each cell."""
    reports = [json.load(open(os.path.join(f, 'report.json'))) for f in folders]
    table = {}
    for name in reports[0]:
        table[name] = {c: ' / '.join(cell(c, v) for v in (min(vs), sorted(vs)[len(vs) // 2], max(vs)))
                       for c in COLUMNS for vs in [[r[name][c] for r in reports]]}
    text = f'min / median / max of {len(folders)} seeds\n\n{markdown(table)}\n'
    with open(os.path.join(out, 'seeds.md'), 'w') as f:
        f.write(text)
    print(text)
    tags = [os.path.basename(os.path.normpath(f)).removeprefix('out') for f in folders]  # out-seed2 stands beside out-ppo-seed2
    draw({stage: [os.path.join(os.path.dirname(f), f'out-{stage}{t}') for f, t in zip(folders, tags)] for stage in ('ppo', 'grpo')}, os.path.join(out, 'seeds.png'))


if __name__ == '__main__':
    out, args = 'out', sys.argv[1:]
    if args and args[0].startswith('--out='):
        out = args.pop(0)[6:]
    os.makedirs(out, exist_ok=True)
    if args and args[0] == '--seeds':
        merge(args[1:], out)
        raise SystemExit
    models = dict(a.split('=', 1) for a in args)
    if 'sft' not in models or 'reward' not in models or not all(map(os.path.isdir, models.values())):
        print(f'error: expected name=out_dir pairs with sft= and reward= among them, all of them trained; got {args}', file=sys.stderr)
        raise SystemExit(2)
    torch.set_num_threads(1)
    sft, rm = load_model(models['sft'])[0], load_model(models.pop('reward'), head='scalar')[0]
    rows, sums = (list(load_dataset(os.path.join(_here, f))) for f in ('prompts_test.jsonl', 'arith_test.jsonl'))
    numbers, texts = {}, {}
    for name, folder in models.items():
        numbers[name], texts[name] = judge(folder, sft, rm, rows, sums)
    table = markdown({name: {c: cell(c, v) for c, v in row.items()} for name, row in numbers.items()})
    shown, seen = [], set()
    for i, r in enumerate(rows):
        if r['family'] not in seen:
            seen.add(r['family'])
            shown.append(f"{r['prompt']}\n" + '\n'.join(f'    {name:>9}: {texts[name][i]!r}' for name in models))
    with open(os.path.join(out, 'report.md'), 'w') as f:
        f.write(table + '\n\n```\n' + '\n'.join(shown) + '\n```\n')
    with open(os.path.join(out, 'report.json'), 'w') as f:
        json.dump(numbers, f, indent=2)
    with open(os.path.join(out, 'samples.jsonl'), 'w') as f:
        for i, r in enumerate(rows):
            f.write(json.dumps(dict(prompt=r['prompt'], **{name: texts[name][i] for name in models})) + '\n')
    runs = {stage: [models[stage]] for stage in ('ppo', 'grpo') if stage in models}
    if runs:
        draw(runs, os.path.join(out, 'curve.png'))
    print('\n'.join(shown) + '\n\n' + table + f'\n\nwritten: {out}/report.md, {out}/report.json, {out}/samples.jsonl' + (f', {out}/curve.png' if runs else ''))
