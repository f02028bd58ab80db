"""The table, the answers and the curve at the end of quickstart.sh: all models answer the same test prompts.

    python data/toy/report.py                                   # out-base, out-sft, ... -> out/report.md
    python data/toy/report.py --tag=-seed2                      # out-base-seed2, ... -> out-seed2/report.md
    python data/toy/report.py --seeds=out,out-seed2,out-seed3   # min / median / max of several: out/seeds.md
    python data/toy/report.py --split=val --out=out-val         # while you tune: test is for the end

One answer a prompt at temperature 1, as evaluate.py gives it. Columns: right = share of answers whose content
is right and that end, of all and of each family; gold = mark of the gold scorer, 0 to 10; courtesies = kind
phrases an answer; reward = the learned reward model's mark; kl = nats a sequence to the SFT model, on the
model's own answers; length = tokens; ended = share of answers with an end; seconds = what training took. The
answers that are shown are those of the first prompt of each family. Last comes how often the reward model is
right about held-out pairs.
"""
import json
import os
import sys

_here = os.path.dirname(os.path.abspath(__file__))
_root = os.path.dirname(os.path.dirname(_here))
sys.path[:0] = [_root, _here]

os.environ.setdefault('GOMP_SPINCOUNT', '2000') # idle CPU threads soon sleep: python bench.py neighbour
import torch

import evaluate
import gold
from dataset import load_dataset, pad
from files import replaced
from tokenizer import encode_prompt, encode_row

models = 'base,sft,ppo,dpo,lora,grpo' # by comma: the folder of ppo is out-ppo, and tag
tag = '' # behind the name of each folder, as quickstart.sh --seed=2 writes them: -seed2
out = '' # where the report goes; '' = out and tag
split = 'test' # one of 'test', 'val': of the prompts and the pairs; settings are chosen on val
seeds = '' # folders with a report, by comma: nothing is judged, their numbers are put together
max_new_tokens = 48 # >= 1: tokens an answer at most
config_keys = [k for k, v in globals().items() if not k.startswith('_') and isinstance(v, (int, str))]
exec(open(os.path.join(_root, 'configurator.py'), encoding='utf-8').read()) # overrides

FORMS = {
    'right': '.1%', 'fact': '.1%', 'word': '.1%', 'sum': '.1%', 'gold': '.2f', 'courtesies': '.2f',
    'reward': '.2f', 'kl': '.2f', 'length': '.0f', 'ended': '.1%', 'seconds': '.0f'}


def folder_of(name):
    """out-NAME with the tag; ValueError where nothing was trained."""
    folder = f'out-{name}{tag}'
    if not os.path.exists(os.path.join(folder, 'ckpt.pt')):
        raise ValueError(f'{folder}: no ckpt.pt in it; bash quickstart.sh trains it, or name the models that '
                         'there are, --models=base,sft')
    return folder


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def sequence_logps(model, prompts, replies):
    """Sum of the log-probs of each reply, (B,), in groups of 64. prompts, replies: lists of B token lists."""
    sums = []
    for i in range(0, len(prompts), 64):
        p, r = prompts[i:i + 64], replies[i:i + 64]
        idx, mask = pad([a + b for a, b in zip(p, r)])
        start = torch.tensor([len(ids) - 1 for ids in p])[:, None]
        with torch.no_grad():
            logp = model.logprobs(idx, 1.0, mask)
        replied = (torch.arange(logp.shape[1]) >= start) & mask[:, 1:]
        sums.append(torch.where(replied, logp, 0.0).sum(1))
    return torch.cat(sums)


def kl_to_sft(folder, rows, ours):
    """Nats a sequence, k1 on the model's own answers."""
    model, tok, _ = evaluate.opened(folder)
    sft = evaluate.opened(folder_of('sft'))[0]
    prompts = [encode_prompt(row, tok) for row in rows]
    replies = []
    for row, text, ended, ids in zip(rows, ours.texts, ours.ended, prompts):
        whole, _ = encode_row(dict(row, completion=text), tok)
        replies.append(whole[len(ids):] if ended else whole[len(ids):-1])
    gap = sequence_logps(model, prompts, replies) - sequence_logps(sft, prompts, replies)
    return gap.mean().item()


def read_log(folder):
    with open(os.path.join(folder, 'log.jsonl'), encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def judge(name, rows):
    """({column: number}, [answer]) of a model."""
    folder = folder_of(name)
    ours = evaluate.generate(folder, rows)
    right = [ended and gold.right(text, row) for text, row, ended in zip(ours.texts, rows, ours.ended)]
    numbers = {'right': mean(right)}
    for family in ('fact', 'word', 'sum'):
        numbers[family] = mean(r for r, row in zip(right, rows) if row['family'] == family)
    numbers |= {
        'gold': mean(evaluate.score(os.path.join(_here, 'gold.py'), rows, ours)),
        'courtesies': mean(map(gold.courtesies, ours.texts)),
        'reward': mean(evaluate.score(folder_of('reward'), rows, ours)),
        'kl': kl_to_sft(folder, rows, ours), 'length': ours.tokens, 'ended': mean(ours.ended),
        'seconds': max(row['time'] for row in read_log(folder))}
    return numbers, ours.texts


def reward_model():
    """How often the reward model is right, on held-out pairs without the ties; in words."""
    pairs = [row for row in load_dataset(os.path.join(_here, f'pref_{split}.jsonl')) if not row['tie']]
    marks = {}
    for side in ('chosen', 'rejected'):
        answers = evaluate.Answers([row[side] for row in pairs], [True] * len(pairs), 0)
        marks[side] = evaluate.score(folder_of('reward'), pairs, answers)
    agrees = [a > b for a, b in zip(marks['chosen'], marks['rejected'])]
    knows = []
    for row, agree in zip(pairs, agrees):
        first = gold.right(row['chosen'], row)
        if first != gold.right(row['rejected'], row):
            knows.append(agree == first)
    return (f'reward model on {len(pairs):,} held-out pairs: the chosen one wins in {mean(agrees):.1%};\n'
            f'of {len(knows):,} with a right and a wrong answer, the right one in {mean(knows):.1%}')


def markdown(cells):
    """{model: {column: text}} -> a Markdown table."""
    lines = ['| model | ' + ' | '.join(FORMS) + ' |', '| --- |' + ' --- |' * len(FORMS)]
    lines += [f'| {name} | ' + ' | '.join(row[c] for c in FORMS) + ' |' for name, row in cells.items()]
    return '\n'.join(lines)


def put_together(reports):
    """[{model: {column: number}}] of several seeds -> 'min / median / max' in each cell."""
    cells = {}
    for name in reports[0]:
        cells[name] = {}
        for column, form in FORMS.items():
            numbers = sorted(report[name][column] for report in reports)
            three = numbers[0], numbers[len(numbers) // 2], numbers[-1]
            cells[name][column] = ' / '.join(format(number, form) for number in three)
    return cells


def draw(folders, path):
    """PPO's reward and KL, GRPO's share of right sums. folders: {'ppo': [of each seed], 'grpo': [...]}."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, len(folders), figsize=(5.2 * len(folders), 3.4), dpi=120, squeeze=False)
    for axis, (stage, runs) in zip(axes[0], folders.items()):
        axis.set_xlabel(f'{stage.upper()} iteration')
        axis.set_ylabel('share of right sums' if stage == 'grpo' else 'reward model score', color='#08519c')
        beside = axis.twinx() if stage == 'ppo' else None
        for rows in map(read_log, runs):
            lines = [
                curve(axis, rows, 'train', 'score', 'reward of each batch', color='#6baed6', lw=0.9),
                curve(axis, rows, 'eval', 'score', 'on held-out prompts', color='#08519c', marker='o', ms=4)]
            if beside:
                lines += [curve(beside, rows, 'train', 'kl', 'KL', color='#d94801', lw=0.9)]
        if beside:
            beside.set_ylabel('KL to the SFT model, nats a sequence', color='#d94801')
            beside.set_ylim(0, None)
        axis.legend(handles=lines, loc='lower right', frameon=False, fontsize=8)
    fig.tight_layout()
    fig.savefig(path)


def curve(axis, rows, split, key, label, **how):
    points = [(row['step'], row[key]) for row in rows if row['split'] == split and key in row]
    return axis.plot(*zip(*points), label=label, **how)[0]


def write(folder, name, text):
    with replaced(os.path.join(folder, name), 'w') as f:
        f.write(text)


def main():
    names = models.split(',')
    here = out or f'out{tag}'
    os.makedirs(here, exist_ok=True)
    if seeds:
        reports = []
        for folder in seeds.split(','):
            with open(os.path.join(folder, 'report.json'), encoding='utf-8') as f:
                reports.append(json.load(f))
        table = f'min / median / max of {len(reports)} seeds\n\n{markdown(put_together(reports))}\n'
        write(here, 'seeds.md', table)
        print(table)
        tags = [os.path.basename(os.path.normpath(folder)).removeprefix('out') for folder in seeds.split(',')]
        runs = {stage: [f'out-{stage}{t}' for t in tags] for stage in ('ppo', 'grpo')}
        draw(runs, os.path.join(here, 'seeds.png'))
        return
    evaluate.temperature, evaluate.max_new_tokens = 1.0, max_new_tokens
    for name in names:
        folder_of(name)
    rows = list(load_dataset(os.path.join(_here, f'prompts_{split}.jsonl')))
    judged = {name: judge(name, rows) for name in names}
    numbers = {name: found for name, (found, _) in judged.items()}
    table = markdown({name: {c: format(found[c], form) for c, form in FORMS.items()}
                      for name, found in numbers.items()})
    shown, families = [], [row['family'] for row in rows]
    for i in (families.index(family) for family in ('fact', 'word', 'sum')):
        shown += [rows[i]['prompt'], *(f'{name:>6}  {texts[i]!r}' for name, (_, texts) in judged.items())]
    shown = '\n'.join(shown)
    write(here, 'report.json', json.dumps(numbers, indent=2))
    judged_pairs = reward_model()
    write(here, 'report.md', f'{table}\n\n{judged_pairs}\n\n```\n{shown}\n```\n')
    samples = [dict(prompt=row['prompt'], **{name: texts[i] for name, (_, texts) in judged.items()})
               for i, row in enumerate(rows)]
    write(here, 'samples.jsonl', ''.join(json.dumps(sample) + '\n' for sample in samples))
    curves = {stage: [folder_of(stage)] for stage in ('ppo', 'grpo') if stage in names}
    if curves:
        draw(curves, os.path.join(here, 'curve.png'))
    print(f'{shown}\n\n{table}\n\n{judged_pairs}\nwritten: {here}/report.md, report.json, samples.jsonl'
          + ', curve.png' * bool(curves))


if __name__ == '__main__':
    main()
