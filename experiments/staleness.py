"""GRPO on samples that are 0, 1, 4, 8 updates old, with the naive and the decoupled objective.

    python experiments/staleness.py                            # 24 runs -> the table, assets/staleness.png
    python experiments/staleness.py --out=out-staleness --iters=20 --learning_rate=3e-4 --seeds=1337,2,3
    python experiments/staleness.py world --out=FOLDER --reward_ms=5     # only the task: prints its keys

The task: words of four letters, to be copied. The demonstrations copy a letter right in 3 of 10 cases and
else write the next one of the alphabet; the reward is the share of right letters. SFT of a model of 0.1 M
parameters on that; RL then has a habit to unlearn, from 30 % to 100 %. A finished run is kept, a broken one
begins anew.
"""

import contextlib
import io
import json
import os
import random
import runpy
import statistics
import sys

from runs import ROOT, read_rows
from figures import figure

LETTERS = 'abcdefgh'
AGES, KINDS = (0, 1, 4, 8), ('naive', 'decoupled')


def run(out, script, *words):
    """A stage in this process (importing torch takes longer than a small run) -> the rows of its log."""
    rows = read_rows(out, 'log.jsonl') if os.path.exists(os.path.join(out, 'log.jsonl')) else []
    if rows and rows[-1]['split'] == 'eval' and rows[-1]['step'] == rows[0]['max_iters']:
        return rows
    before = sys.argv, sys.excepthook
    sys.argv = [script, *words, f'--out_dir={out}', '--device=cpu', '--threads=1', '--overwrite']
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
    finally:
        sys.argv, sys.excepthook = before
    return read_rows(out, 'log.jsonl')


def world(out, reward_ms=0.0):
    """The rows, the reward and the SFT model -> the keys that a GRPO run on them needs."""
    rng = random.Random(0)
    words = [''.join(rng.choices(LETTERS, k=4)) for _ in range(4200)]

    def slip(word):
        wrong = {letter: LETTERS[(i + 1) % 8] for i, letter in enumerate(LETTERS)}
        return ''.join(letter if rng.random() < 0.3 else wrong[letter] for letter in word)
    rows = {
        'sft': [dict(prompt=f'{word}=', completion=slip(word)) for word in words[:4000]],
        'train': [dict(prompt=f'{word}=', word=word) for word in words[:2000]],
        'val': [dict(prompt=f'{word}=', word=word) for word in words[4000:]],
    }
    os.makedirs(out, exist_ok=True)
    for name in rows:
        with open(os.path.join(out, f'{name}.jsonl'), 'w', encoding='utf-8') as f:
            f.writelines(json.dumps(row) + '\n' for row in rows[name])
    with open(os.path.join(out, 'reward.py'), 'w', encoding='utf-8') as f:
        f.write(
            f'import time\n\n\ndef reward(prompt, completion, row):\n    time.sleep({reward_ms / 1000})\n'
            '    right = sum(a == b for a, b in zip(completion, row["word"]))\n'
            '    return right / 4 if len(completion) == 4 else 0.0\n'
        )
    network = ['--n_layer=2', '--n_head=4', '--n_embd=64', '--block_size=32']
    steps = ['--batch_size=64', '--max_iters=300', '--eval_interval=300', '--learning_rate=3e-3']
    run(os.path.join(out, 'sft'), 'sft.py', f'--dataset={out}/sft.jsonl', *network, *steps)
    return [
        f'--init_from={out}/sft', f'--dataset={out}/train.jsonl', f'--val_dataset={out}/val.jsonl',
        f'--reward={out}/reward.py', '--eval_iters=200', '--eval_k=1', '--max_new_tokens=5',
        '--learning_rate=3e-4', '--warmup_iters=3', '--max_num_seqs=128', '--track_kl=False',
    ]  # fmt: skip


def train(out, iters, learning_rate, seeds):
    """{(kind, age): the eval rows of each seed}"""
    keys = [*world(out), '--batch_size=128', '--minibatch_size=64', f'--max_iters={iters}']
    keys += ['--eval_interval=5', f'--learning_rate={learning_rate}']
    found = {}
    for seed in seeds:
        for age in AGES:
            for kind in KINDS:
                mode = ['--mode=async', f'--simulate_staleness={age}'] if age else []
                mode += [f'--decoupled={kind == "decoupled"}', f'--seed={seed}']
                rows = run(os.path.join(out, f'{kind}-{age}-{seed}'), 'grpo.py', *keys, *mode)
                found.setdefault((kind, age), []).append([row for row in rows if row['split'] == 'eval'])
                score = rows[-1]['score']
                print(f'seed {seed}, {age} updates old, {kind}: {score:.1%} of letters right', flush=True)
    return found


def table(found, iters, seeds):
    start = found['naive', 0][0][0]['score']
    print(f'\nheld-out letters right after {iters} updates, from {start:.1%}; min / median / max of {seeds}')
    print()
    print('| samples are old by | ' + ' | '.join(f'{age} updates' for age in AGES) + ' |')
    print('|' + ' --- |' * (len(AGES) + 1))
    for kind in KINDS:
        cells = []
        for age in AGES:
            scores = [rows[-1]['score'] for rows in found[kind, age]]
            cells.append(f'{min(scores):.1%} / {statistics.median(scores):.1%} / {max(scores):.1%}')
        print(f'| {kind} | ' + ' | '.join(cells) + ' |')


def draw(found, path):
    fig, axes = figure(2, height=3.6, width=5.2)
    titles = {
        'naive': 'naive: the ratio to the sampler',
        'decoupled': 'decoupled: the ratio to the policy before the update',
    }
    for axis, kind in zip(axes, KINDS):
        for colour, age in zip(('#08519c', '#41ab5d', '#fd8d3c', '#cb181d'), AGES):
            for i, rows in enumerate(found[kind, age]):
                label = f'{age} updates old' if i == 0 else None
                x, y = [row['step'] for row in rows], [row['score'] for row in rows]
                axis.plot(x, y, 'o-', ms=3, color=colour, lw=1.1, alpha=0.8, label=label)
        axis.set_title(titles[kind], fontsize=10)
        axis.set_xlabel('GRPO update')
        axis.set_ylim(0, 1)
    axes[0].set_ylabel('held-out letters right')
    axes[0].legend(loc='lower right', frameon=False, fontsize=8, title='samples')
    fig.tight_layout()
    fig.savefig(path)


def main(words):
    given = dict(out='out-staleness', iters=20, learning_rate=3e-4, seeds='1337,2,3', reward_ms=0.0)
    only_world = words[:1] == ['world']
    for word in words[only_world:]:
        key, _, value = word.removeprefix('--').partition('=')
        if key not in given or not value:
            sys.exit(f'error: {word}: expected one of {" ".join(f"--{k}={v}" for k, v in given.items())}')
        given[key] = type(given[key])(value)
    out, reward_ms = given['out'], given.pop('reward_ms')
    if only_world:
        print(json.dumps(world(out, reward_ms)))
        return
    seeds = given['seeds'].split(',')
    found = train(out, given['iters'], given['learning_rate'], seeds)
    table(found, given['iters'], f'{len(seeds)} seeds')
    draw(found, os.path.join(ROOT, 'assets', 'staleness.png'))


if __name__ == '__main__':
    main(sys.argv[1:])
