"""GRPO with a calculator and without: three seeds of each, the table and assets/calculator.png.

    bash quickstart.sh && python data/toy/env_calculator.py       # out-sft, and the sums
    python experiments/calculator.py                       # half an hour; --out=out-calculators --seeds=1,2,3
    python experiments/calculator.py --init_from=out-sft-seed{}   # another SFT model for each seed

Each seed has a cold start of its own (config/sft_calculator.py), and both runs of config/grpo_calculator.py
begin from it: one in the environment, one with data/toy/reward.py on the answer that the model gives alone.
A run that has ended is kept.
"""
import os
import statistics
import sys

from figures import figure
from runs import ROOT, options, read_rows, run_once

ALONE = ['--env=', '--reward=data/toy/reward.py']
COLOURS = {'with the calculator': '#08519c', 'without': '#cb181d'}


def run(out, script, config, *words):
    """-> the evaluations in the log of a command that writes to `out`"""
    run_once(out, script, f'config/{config}.py', *words)
    return [row for row in read_rows(out, 'log.jsonl') if row['split'] == 'eval']


def measure(out, seeds, init_from):
    """{'with the calculator' or 'without': the evaluations of each seed}"""
    found = {name: [] for name in COLOURS}
    for seed in seeds:
        asks = os.path.join(out, f'asks-{seed}')
        run(asks, 'sft.py', 'sft_calculator', f'--seed={seed}', f'--init_from={init_from.format(seed)}')
        for name, more in zip(COLOURS, ([], ALONE)):
            folder = os.path.join(out, f'{name.split()[0]}-{seed}')
            words = [f'--seed={seed}', f'--init_from={asks}', *more]
            found[name].append(run(folder, 'grpo.py', 'grpo_calculator', *words))
    return found


def draw(found, path):
    fig, (axis,) = figure(1, width=5.6)
    for name, runs in found.items():
        for i, rows in enumerate(runs):
            steps = [row['step'] for row in rows]
            axis.plot(steps, [row['pass@1'] for row in rows], 'o-', ms=3, lw=1.2, color=COLOURS[name],
                      label=name if i == 0 else None)
    axis.set_xlabel('GRPO iteration of 256 conversations')
    axis.set_ylabel('pass@1, 240 held-out sums')
    axis.set_ylim(0, 1)
    axis.legend(frameon=False)
    fig.tight_layout()
    fig.savefig(path)


def main(words):
    given = options(words, out=os.path.join(ROOT, 'out-calculators'), seeds='1337,2,3', init_from='out-sft')
    found = measure(os.path.abspath(given['out']), given['seeds'].split(','), given['init_from'])
    print('pass@1, min / median / max of the seeds\n\n| | before | after |\n| --- | --- | --- |')
    for name, runs in found.items():
        cells = []
        for at in (0, -1):
            marks = [rows[at]['pass@1'] for rows in runs]
            cells.append(f'{min(marks):.1%} / {statistics.median(marks):.1%} / {max(marks):.1%}')
        print(f'| {name} | {cells[0]} | {cells[1]} |')
    draw(found, os.path.join(ROOT, 'assets', 'calculator.png'))


if __name__ == '__main__':
    main(sys.argv[1:])
