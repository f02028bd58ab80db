"""Pictures and tables of experiments/study.py, from the rows of out-exp/results.jsonl and the logs of the
runs; trains nothing.

    python experiments/figures.py a b c --out=out-exp --assets=assets        # assets/exp_a.png,
    assets/exp_a.md ...; and the blocks of EXPERIMENTS.md

Every number is median (smallest to largest) over the seeds, every band and bar the same range.
"""

import math
import os
import re
import sys

import numpy as np

import runs as X
from files import replaced

RED, BLUE, GREEN, GREY, ORANGE, PURPLE = '#cb181d', '#08519c', '#238b45', '#737373', '#d94801', '#6a51a3'
COLOURS = (RED, BLUE, GREEN, ORANGE, PURPLE, GREY, '#17becf', '#bcbd22', '#e377c2')


class Rows:
    """The rows of results.jsonl by name and key, for some seeds. A row that is missing is an error that says
    which command makes it."""

    def __init__(self, out, seeds):
        self.out, self.seeds = out, seeds
        self.rows = list(
            {(r['name'], r['seed'], r.get('n')): r for r in X.results(out)}.values()
        )  # two commands may have judged a run at once

    def values(self, name, key, **where):
        found = [
            r[key]
            for s in self.seeds
            for r in self.rows
            if r['name'] == name and r['seed'] == s and all(r[k] == v for k, v in where.items())
        ]
        if len(found) != len(self.seeds):
            raise ValueError(
                f'{self.out}/results.jsonl: {len(found)} of {len(self.seeds)} seeds of {name!r} are there: '
                'python experiments/study.py trains the others'
            )
        return found

    def span(self, name, key, **where):
        v = sorted(x for x in self.values(name, key, **where) if x == x) or [
            math.nan
        ]  # nan: not measured for that seed
        return v[0], float(np.median(v)), v[-1]

    def logs(self, name, key, split='eval'):
        """(steps, values (seeds, steps)) of a key of log.jsonl."""
        tables = []
        for s in self.seeds:
            rows = X.read_rows(X.folder(name, s, self.out), 'log.jsonl')
            tables.append({r['step']: r[key] for r in rows if r['split'] == split and key in r})
        steps = sorted(set.intersection(*map(set, tables)))
        return steps, np.array([[t[s] for s in steps] for t in tables])


def text(span, digits=2, percent=False, scale=1.0):
    """(0.1, 0.2, 0.3) -> '0.20 (0.10 to 0.30)'"""
    one = lambda v: f'{v * scale:.{digits}%}' if percent else f'{v * scale:,.{digits}f}'
    if span[1] != span[1]:
        return 'not measured'
    return f'{one(span[1])} ({one(span[0])} to {one(span[2])})'


def table(head, rows):
    return '\n'.join(
        [
            '| ' + ' | '.join(head) + ' |',
            '|' + ' --- |' * len(head),
            *('| ' + ' | '.join(r) + ' |' for r in rows),
        ]
    )


def figure(columns, height=3.4, width=4.3):
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, columns, figsize=(width * columns, height), dpi=120, squeeze=False)
    for axis in axes[0]:
        axis.spines[['top', 'right']].set_visible(False)
    return fig, axes[0]


def band(axis, x, y, colour, label, style='-'):
    """Median line and range over seeds; y (seeds, len(x))."""
    axis.plot(x, np.median(y, 0), style, color=colour, lw=1.8, label=label)
    axis.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.18, lw=0)


def point(axis, x, y, colour, label, marker='o'):
    """A cross of ranges with its median; x, y are spans."""
    axis.errorbar(
        x[1],
        y[1],
        xerr=[[x[1] - x[0]], [x[2] - x[1]]],
        yerr=[[y[1] - y[0]], [y[2] - y[1]]],
        fmt=marker,
        color=colour,
        ms=6,
        lw=1.3,
        capsize=2,
        label=label,
    )


def ranges(axis, spans, labels, colours, title):
    """Horizontal ranges, one row a label; spans: [(min, median, max)]."""
    for i, (s, c) in enumerate(zip(spans, colours)):
        axis.plot([s[0], s[2]], [i, i], color=c, lw=3, alpha=0.4, solid_capstyle='round')
        axis.plot(s[1], i, 'o', color=c, ms=6)
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.set_xlabel(title, fontsize=9)
    axis.grid(axis='x', alpha=0.3)


def curves(rows, name, key):
    """(steps, (seeds, steps)) of a key of experiments.trajectory."""
    runs = [X.trajectory(name, s, rows.out) for s in rows.seeds]
    return [p['step'] for p in runs[0]], np.array([[p[key] for p in run] for run in runs])


JUDGED = (
    ('gold', 'gold', 2, False),
    ('proxy', 'proxy', 2, False),
    ('KL, nats', 'kl', 1, False),
    ('tokens', 'len', 0, False),
    ('courtesies', 'courtesies', 2, False),
    ('repeats itself', 'repeats', 0, True),
    ('distinct-2', 'distinct2', 2, False),
)


def judged(rows, names, columns=JUDGED):
    """A table of judged models. names: {label: name}."""
    return table(
        ['model', *(c[0] for c in columns)],
        [[label, *(text(rows.span(n, key), d, p) for _, key, d, p in columns)] for label, n in names.items()],
    )


def samples(rows, names, prompts=3):
    """The same test questions answered by several models of the first seed."""
    said = {
        label: X.read_rows(X.folder(n, rows.seeds[0], rows.out), 'judged.jsonl')
        for label, n in names.items()
    }
    first, picked = next(iter(said.values())), []
    for i, r in enumerate(first):
        if r['prompt'][:9] not in {first[j]['prompt'][:9] for j in picked} and len(picked) < prompts:
            picked.append(i)
    lines = []
    for i in picked:
        lines += [first[i]['prompt'].strip().replace('\nA:', '')] + [
            f"    {label:>9}: {r[i]['completion']!r} (gold {r[i]['gold']:g}, proxy {r[i]['proxy']:.1f})"
            for label, r in said.items()
        ]
    return '```\n' + '\n'.join(lines) + '\n```'


def draw_a(rows):
    names = {'SFT': 'sft', 'beta 0': X.OVER['100 %'][1], 'beta 0.2': X.LEASHED}
    fig, axes = figure(4, width=3.8)
    titles = (
        'proxy: the reward it is paid by',
        'gold: what people want (0 to 10)',
        'KL to the SFT model, nats a sequence',
    )
    for axis, key, title in zip(axes, ('proxy', 'gold', 'kl'), titles):
        for label, colour in (('beta 0', RED), ('beta 0.2', BLUE)):
            steps, y = curves(rows, names[label], key)
            band(axis, steps, y, colour, label)
        axis.set_xticks(steps[::2])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel('PPO iteration')
    over_optimised(axes[3], rows, names['beta 0'], RED, 'd ({:.2f} - {:.2f} log d), R2 {:.2f}')
    axes[3].axhline(0, color='black', lw=0.5)
    axes[3].set_title('beta 0: gold gained over d = sqrt KL', fontsize=10)
    axes[3].set_xlabel('d')
    axes[3].legend(frameon=False, fontsize=8)
    axes[0].legend(frameon=False, fontsize=9)
    return fig, judged(rows, names) + '\n\n' + samples(rows, {k: names[k] for k in names})


def draw_b(rows):
    fig, axes = figure(2)
    for axis, key in zip(axes, ('gold', 'proxy')):
        line = []
        for (beta, name), colour in zip(X.BETAS.items(), COLOURS):
            kl, y = rows.span(name, 'kl'), rows.span(name, key)
            point(axis, kl, y, colour, f'beta {beta}')
            line.append((kl[1], y[1]))
        start = (0.0, rows.span('sft', key)[1])
        line = sorted([*line, start])
        axis.plot(*zip(*line), color=GREY, lw=0.8, zorder=0)
        axis.plot(*start, 's', color='black', ms=5, label='SFT')
        axis.set_xscale('symlog', linthresh=1)
        axis.set_xlim(0, None)
        axis.set_xlabel('KL to the SFT model, nats a sequence')
        axis.set_title(key + (' mark' if key == 'gold' else ' reward'), fontsize=10)
    axes[1].legend(frameon=False, fontsize=8)
    return fig, judged(rows, {'SFT': 'sft', **{f'beta {b}': n for b, n in X.BETAS.items()}})


def fit_gao(d, gain, form):
    """Least squares of Gao et al. 2022 (2210.10760): gain = d (alpha - beta log d) for 'rl' (eq. 2), d (alpha
    - beta d) for 'bon' (eq. 1), d = sqrt KL. Returns (alpha, beta, R^2). Points at d = 0 say nothing and are
    left out."""
    d, gain = np.asarray(d, float), np.asarray(gain, float)
    keep = d > 1e-6
    d, gain = d[keep], gain[keep]
    design = np.stack([d, -d * (np.log(d) if form == 'rl' else d)], 1)
    (alpha, beta), *_ = np.linalg.lstsq(design, gain, rcond=None)
    rest = gain - design @ (alpha, beta)
    return float(alpha), float(beta), float(1 - (rest**2).sum() / ((gain - gain.mean()) ** 2).sum())


def over_optimised(axis, rows, name, colour, label):
    """Gold gained over d = sqrt KL along a run without KL penalty: every evaluation of every seed small,
    their medians over the seeds large, and Gao's form through the medians: each seed has a reward model of
    its own, and one that collapses would bend the curve of all. label takes alpha, beta, R^2. -> (alpha,
    beta, R^2, d, gain), the last two (seeds, evaluations)"""
    d, gold = np.sqrt(np.maximum(curves(rows, name, 'kl')[1], 0)), curves(rows, name, 'gold')[1]
    gain = gold - gold[:, :1]
    middle = np.median(d, 0), np.median(gain, 0)
    alpha, beta, r2 = fit_gao(*middle, 'rl')
    axis.plot(d.T, gain.T, 'o-', color=colour, ms=2.5, lw=0.6, alpha=0.35)
    axis.plot(*middle, 'o', color=colour, ms=5.5)
    x = np.linspace(0.05, middle[0].max(), 100)
    axis.plot(x, x * (alpha - beta * np.log(x)), color=colour, lw=1.6, label=label.format(alpha, beta, r2))
    return alpha, beta, r2, d, gain


def draw_c(rows):
    fig, axes = figure(3, width=4.6)
    lines = []
    for (label, (rm, ppo)), colour in zip(X.OVER.items(), (ORANGE, GREEN, BLUE)):
        alpha, beta, r2, d, gains = over_optimised(
            axes[1], rows, ppo, colour, label + ': d ({:.2f} - {:.2f} log d)'
        )
        paid = curves(rows, ppo, 'proxy')[1]
        paid = paid - paid[:, :1]
        axes[0].plot(d.T, paid.T, 'o-', color=colour, ms=2.5, lw=0.6, alpha=0.35)
        axes[0].plot(
            np.median(d, 0),
            np.median(paid, 0),
            'o-',
            color=colour,
            ms=5.5,
            lw=1,
            label=f'{label} of the pairs',
        )
        bon = [[r for r in rows.rows if r['name'] == f'bon-{rm}' and r['seed'] == s] for s in rows.seeds]
        d = np.sqrt([r['kl'] for r in bon[0]])
        gain = np.array([[r['gold'] - b[0]['gold'] for r in b] for b in bon])
        band(axes[2], d, gain, colour, None)
        ba, bb, br2 = fit_gao(np.tile(d, len(bon)), gain.flatten(), 'bon')
        x = np.linspace(0.05, d[-1], 100)
        axes[2].plot(
            x, x * (ba - bb * x), '--', color=colour, lw=1.2, label=f'{label}: d ({ba:.2f} - {bb:.2f} d)'
        )
        peak = math.exp(alpha / beta - 1) if beta > 0 else float('inf')
        best = np.median(gains, 0).max()
        lines.append(
            [
                label,
                text(rows.span(rm, 'agreement'), 1, True),
                f'{alpha:.2f}, {beta:.2f} ({r2:.2f})',
                f'{peak**2:.1f} nats, {peak * (alpha - beta * math.log(peak)):+.2f}',
                f'{best:+.2f}',
                text(rows.span(ppo, 'gold')),
                ', '.join(
                    f'{a - b:+.2f}' for a, b in zip(rows.values(ppo, 'gold'), rows.values('sft', 'gold'))
                ),
                f'{ba:.2f}, {bb:.2f} ({br2:.2f})',
                f'{np.median(gain[:, -1]):+.2f}',
            ]
        )
    for axis, title in zip(
        axes,
        (
            'PPO without KL: own proxy, gain',
            'PPO without KL: gold, gain, and the fit',
            'best of n (1 to 64): gold, gain, and the fit',
        ),
    ):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel('d = sqrt(KL to the SFT model, nats)')
        axis.axhline(0, color='black', lw=0.6)
        axis.legend(frameon=False, fontsize=8)
    head = [
        'reward model',
        'orders as gold does',
        'PPO: alpha, beta (R2)',
        'peak of the fit: KL, gold gain',
        'largest median gain',
        'gold at the end',
        'less SFT, each seed',
        'best of n: alpha, beta (R2)',
        'gold gain at n = 64',
    ]
    return fig, table(head, lines)


def draw_d(rows):
    fig, axes = figure(2, width=4.8)
    names = {**X.METHODS, **X.LONG}
    rm_cost, sft = rows.span('rm', 'cpu_s'), rows.values('sft', 'gold')
    lines, bars = (
        [['SFT', text(rows.span('sft', 'gold')), '', text(rows.span('sft', 'proxy')), '0', '', '', '']],
        [],
    )
    for (label, name), colour in zip(names.items(), (RED, BLUE, PURPLE, GREEN, RED, GREEN)):
        gold, kl, cost = rows.span(name, 'gold'), rows.span(name, 'kl'), rows.span(name, 'cpu_s')
        point(axes[0], kl, gold, colour, label, 'D' if name in X.LONG.values() else 'o')
        needs = 0 if label.startswith('DPO') else rm_cost[1]
        gain = sorted(g - s for g, s in zip(rows.values(name, 'gold'), sft))
        lines.append(
            [
                label,
                text(gold),
                f'{gain[0]:+.2f} to {gain[-1]:+.2f}',
                text(rows.span(name, 'proxy')),
                text(kl, 1),
                text(cost, 0),
                f'{needs:.0f}',
                text(rows.span(name, 'rss_mb'), 0),
            ]
        )
        bars.append((label, cost[1], needs, colour))
    for n, marker in ((4, 'v'), (16, '^'), (64, 's')):
        gold, kl = rows.span('bon-rm', 'gold', n=n), rows.span('bon-rm', 'kl', n=n)
        point(axes[0], kl, gold, GREY, f'best of {n}', marker)
        gain = sorted(
            g - s for g, s in zip(rows.values('bon-rm', 'gold', n=n), rows.values('bon-rm', 'gold', n=1))
        )
        lines.append(
            [
                f'best of {n}',
                text(gold),
                f'{gain[0]:+.2f} to {gain[-1]:+.2f}',
                text(rows.span('bon-rm', 'proxy', n=n)),
                text(kl, 1),
                '0',
                f'{rm_cost[1]:.0f}',
                f'{n} answers for one',
            ]
        )
    axes[0].plot(0, np.median(sft), 'ks', ms=5, label='SFT')
    axes[0].set_xlabel('KL to the SFT model, nats a sequence')
    axes[0].set_ylabel('gold mark')
    axes[0].legend(frameon=False, fontsize=7, ncol=2, loc='lower right')
    axes[0].set_xscale('symlog', linthresh=1)
    axes[0].set_ylim(0, 10)
    bars = [b for b in (*bars, ('best of n', 0, rm_cost[1], GREY)) if b[1] == b[1]]
    for i, (label, own, rm, colour) in enumerate(bars):
        axes[1].barh(i, own, color=colour)
        axes[1].barh(i, rm, left=own, color='#d9d9d9', label='its reward model' if i == 0 else None)
    axes[1].set_yticks(range(len(bars)), [b[0] for b in bars], fontsize=8)
    axes[1].invert_yaxis()
    axes[1].set_xlabel('CPU seconds of training')
    axes[1].legend(frameon=False, fontsize=8)
    return fig, table(
        [
            'method',
            'gold',
            'gain over SFT, each seed',
            'proxy',
            'KL, nats',
            'CPU s',
            '+ reward model',
            'memory, MB',
        ],
        lines,
    )


def draw_e(rows):
    fig, axes = figure(3, height=3.8, width=3.7)
    names = X.DETAILS
    for axis, key, title in zip(
        axes, ('gold', 'kl', 'ended'), ('gold mark', 'KL, nats a sequence', 'share of answers that end')
    ):
        ranges(
            axis,
            [rows.span(n, key) for n in names.values()],
            names if axis is axes[0] else [''] * len(names),
            [BLUE] + [GREY] * (len(names) - 1),
            title,
        )
        axis.axvline(rows.span(names['as tuned'], key)[1], color=BLUE, lw=0.8, ls=':')
    columns = (*JUDGED[:4], ('ends', 'ended', 1, True), ('CPU s', 'cpu_s', 0, False))
    return fig, judged(rows, names, columns)


def draw_f(rows):
    fig, axes = figure(2, height=3.9, width=5.0)
    lines = []
    for (label, name), colour in zip(X.LOSSES.items(), COLOURS):
        steps, fell = rows.logs(name, 'chosen_logp_change')
        band(axes[0], steps, fell, colour, label)
        known = (rows.span(name, 'kl'), rows.span(name, 'gold'))
        point(axes[1], *known, colour, None)
        last = lambda key: tuple(np.quantile(rows.logs(name, key)[1][:, -1], (0, 0.5, 1)))
        lines.append(
            [
                label,
                text(known[1]),
                text(known[0], 1),
                text(rows.span(name, 'proxy')),
                text(last('accuracy'), 1, True),
                text(tuple(np.quantile(fell[:, -1], (0, 0.5, 1))), 1),
                text(rows.span(name, 'ended'), 0, True),
                text(rows.span(name, 'len'), 0),
            ]
        )
    axes[0].axhline(0, color='black', lw=0.6)
    axes[0].set_title('log-prob of the chosen answer, change in nats', fontsize=10)
    axes[0].set_xlabel('DPO step')
    axes[0].legend(frameon=False, fontsize=7)
    axes[1].plot(0, rows.span('sft', 'gold')[1], 'ks', ms=5)
    axes[1].set_xlabel('KL to the SFT model, nats a sequence')
    axes[1].set_title('gold mark', fontsize=10)
    return fig, table(
        [
            'loss',
            'gold',
            'KL, nats',
            'proxy',
            'held-out accuracy',
            'chosen log-prob, change',
            'ends',
            'tokens',
        ],
        lines,
    )


def draw_g(rows):
    fig, axes = figure(2)
    lines, order = [], [r for r in X.RANKS if r] + [0]
    for axis, key, title in zip(axes, ('gold', 'kl'), ('gold mark', 'KL, nats a sequence')):
        ranges(
            axis,
            [rows.span(X.RANKS[r], key) for r in order],
            [f'rank {r}' if r else 'full' for r in order],
            [GREEN] * (len(order) - 1) + [BLUE],
            title,
        )
    for r in order:
        name = X.RANKS[r]
        console = os.path.join(X.folder(name, rows.seeds[0], rows.out), 'stdout.txt')
        said = open(console, encoding='utf-8').read()
        last = lambda key: tuple(np.quantile(rows.logs(name, key)[1][:, -1], (0, 0.5, 1)))
        lines.append(
            [
                f'rank {r}' if r else 'full',
                re.search(r'\(([\d,]+) trained\)', said)[1],
                text(rows.span(name, 'gold')),
                text(rows.span(name, 'kl'), 1),
                text(last('accuracy'), 1, True),
                text(last('loss'), 3),
                text(rows.span(name, 'cpu_s'), 0),
                text(rows.span(name, 'rss_mb'), 0),
            ]
        )
    return fig, table(
        [
            'DPO',
            'trained weights',
            'gold',
            'KL, nats',
            'held-out accuracy',
            'held-out loss',
            'CPU s',
            'memory, MB',
        ],
        lines,
    )


def draw_h(rows):
    fig, axes = figure(3, width=3.9)
    names = X.RM_DATA
    for axis, key, title in zip(
        axes,
        ('agreement', 'length_correlation', 'extra_courtesy'),
        (
            'orders fresh answers as gold does',
            'correlation of reward and length',
            'reward for four courtesies too many',
        ),
    ):
        ranges(
            axis,
            [rows.span(n, key) for n in names.values()],
            names if axis is axes[0] else [''] * len(names),
            COLOURS,
            title,
        )
    axes[1].axvline(0, color='black', lw=0.6), axes[2].axvline(0, color='black', lw=0.6)
    columns = (
        ('orders as gold does', 'agreement', 1, True),
        ('held-out accuracy', 'accuracy', 1, True),
        ('length correlation', 'length_correlation', 2, False),
        ('ece', 'ece', 3, False),
        ('four courtesies too many', 'extra_courtesy', 2, False),
    )
    return fig, judged(rows, names, columns).replace('| model |', '| reward model |', 1)


def draw_i(rows):
    fig, axes = figure(len(X.FAILURES), height=3.0, width=3.0)
    lines = []
    for axis, (label, (wrong, right, key, where)) in zip(axes, X.FAILURES.items()):
        told = []
        for name, colour, word in ((right, BLUE, 'right'), (wrong, RED, 'wrong')):
            if where == 'judged':
                told.append(rows.span(name, key))
                point(axis, (0, 0, 0) if name == right else (1, 1, 1), told[-1], colour, word)
            else:
                steps, y = rows.logs(name, key, where)
                band(axis, steps, y, colour, word)
                told.append((y[:, -1].min(), float(np.median(y[:, -1])), y[:, -1].max()))
        if where == 'judged':
            axis.set_xticks([0, 1], ['right', 'wrong'])
            axis.set_xlim(-0.6, 1.6)
            axis.set_ylim(-0.05, 1.05)
        else:
            axis.set_xlabel('iteration', fontsize=8)
        if key == 'mismatch':
            axis.set_yscale('log')
        axis.set_title(label, fontsize=9)
        axis.set_ylabel(
            {
                'kl': 'KL, nats',
                'mismatch': 'mismatch, nats a token',
                'dead': 'share of dead groups',
                'ended': 'share of answers that end',
            }[key],
            fontsize=8,
        )
        digits = lambda v: f'{v:.1e}' if key == 'mismatch' else f'{v:.2f}'
        say = lambda v: f'{digits(v[1])} ({digits(v[0])} to {digits(v[2])})'
        lines.append(
            [
                f'`{X.RUNS[wrong][0]}`',
                key,
                say(told[0]),
                say(told[1]),
                text(rows.span(right, 'gold')),
                text(rows.span(wrong, 'gold')),
                text(rows.span(right, 'proxy')),
                text(rows.span(wrong, 'proxy')),
            ]
        )
    axes[1].legend(frameon=False, fontsize=8)
    return fig, table(
        [
            'failure',
            'what tells',
            'right',
            'wrong',
            'gold, right',
            'gold, wrong',
            'proxy, right',
            'proxy, wrong',
        ],
        lines,
    )


DRAW = {q: globals()[f'draw_{q}'] for q in 'abcdefghi'}


def insert(path, key, block):
    """The part of a Markdown file between <!-- key --> and <!-- /key --> becomes the block; a file or a mark
    that is not there is left alone."""
    if os.path.exists(path):
        old = open(path, encoding='utf-8').read()
        new = re.sub(
            rf'(<!-- {key} -->\n).*?(<!-- /{key} -->)', lambda m: m[1] + block + '\n' + m[2], old, flags=re.S
        )
        if new != old:
            with replaced(path, 'w') as f:
                f.write(new)


def write(question, out, assets, seeds):
    """assets/exp_Q.png and exp_Q.md, and the block of EXPERIMENTS.md beside the assets."""
    fig, block = DRAW[question](Rows(out, seeds))
    os.makedirs(assets, exist_ok=True)
    fig.tight_layout()
    fig.savefig(os.path.join(assets, f'exp_{question}.png'))
    more = '' if seeds == X.SEEDS else ' --seeds=' + ','.join(map(str, seeds))
    command = f'python experiments/study.py {question}{more}'
    made = f'`{command}`: median (smallest to largest) of {len(seeds)} seeds\n\n{block}'
    with open(os.path.join(assets, f'exp_{question}.md'), 'w', encoding='utf-8') as f:
        f.write(made + '\n')
    insert(os.path.join(os.path.dirname(os.path.abspath(assets)), 'EXPERIMENTS.md'), question, made)
    print(f'{assets}/exp_{question}.png, {assets}/exp_{question}.md')


if __name__ == '__main__':
    questions, given = X.arguments(
        sys.argv[1:], {'seeds': ','.join(map(str, X.SEEDS)), 'out': 'out-exp', 'assets': 'assets'}
    )
    try:
        for q in questions:
            write(q, given['out'], given['assets'], tuple(map(int, given['seeds'].split(','))))
    except (ValueError, OSError) as e:
        print(f'error: {e}', file=sys.stderr)
        raise SystemExit(2)
