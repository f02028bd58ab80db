"""Which of the classic failures does a run show, and how does it look? The dashboard of app.py asks.

    python failures/gallery.py FOLDER NEW.json      # what the runs of a folder show, as gallery.json keeps it
gallery.json holds of each failure its metric, why it happens, a command that shows it after quickstart.sh,
and the curve and the words of the run that it gave. `run` is app.py's RunFolder: series(metric, x, split),
samples(), over_optimisation(), console.
"""
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
END = '<|endoftext|>'
SIGNS = {  # failure: (metric, split, is it there?)
    'Mode collapse': ('distinct-2', '', lambda first, last, least: last < 0.5 * first),
    'Answers without end': ('ended', 'eval', lambda first, last, least: last < 0.9),
    'Length grows': ('len', 'eval', lambda first, last, least: last > 1.4 * first),
    'KL runs away': ('kl', 'train', lambda first, last, least: last > 25),
    'Dead groups': ('dead', 'train', lambda first, last, least: last > 0.6),
    'Chosen falls too': ('chosen_logp_change', 'eval', lambda first, last, least: last < -5),
    'Overfitting': ('loss', 'eval', lambda first, last, least: last > 1.05 * least),
    'Sampler and trainer disagree': ('mismatch', 'train', lambda first, last, least: last > 0.03)}


def known() -> dict:
    """{name: {metric, why, how, run, curves {label: [[iteration], [number]]}, text}}."""
    with open(os.path.join(HERE, 'gallery.json'), encoding='utf-8') as f:
        return json.load(f)


def distinct(run) -> tuple:
    """([iteration], [distinct-2 of the answers at its evaluation, as evaluate.py counts it])."""
    from evaluate import diversity
    texts = {step: [s['completion'].replace(END, '') for s in said] for step, said in run.samples().items()}
    return list(texts), [diversity(said)['distinct-2'] for said in texts.values()]


def seen_in(run, failure: str) -> bool:
    """Is the failure there? What was logged less than twice has no course."""
    if failure == 'Reward hacking':  # the proxy has climbed, the gold mark has fallen from its best
        points = run.over_optimisation()
        gold = [mark for *_, mark in points]
        return bool(points) and points[-1][2] > points[0][2] and gold[-1] < max(gold) - 1
    metric, split, there = SIGNS[failure]
    _, ys = distinct(run) if metric == 'distinct-2' else run.series(metric, 'step', split)
    return len(ys) > 1 and there(ys[0], ys[-1], min(ys))


def words(run, metric: str) -> str:
    """Three answers of a run before and after, those that show it best; its last evaluations where it kept
    none."""
    steps = list(run.samples().items())
    if len(steps) < 2:
        lines = [line[:400] for line in run.console.split('\n') if line.startswith('step ')]
        return '\n'.join(lines[:1] + ['...'] + lines[-2:]) if lines else 'nobody kept what this run wrote'

    def shows(sample):
        score = sample.get('score')
        number = isinstance(score, (int, float)) and abs(score) < 1e300
        return dict(ended=END not in sample['completion'], len=len(sample['completion']),
                    score=score if number else 0.0).get(metric, 0)
    before, after = [{sample['prompt']: sample for sample in said} for _, said in (steps[0], steps[-1])]
    both = [prompt for prompt in before if prompt in after]
    out = []
    for prompt in sorted(both, key=lambda prompt: shows(before[prompt]) - shows(after[prompt]))[:3]:
        out.append(f'{prompt.strip()}\n'
                   f'{f"iteration {steps[0][0]}:":>15} {before[prompt]["completion"][:240]}\n'
                   f'{f"iteration {steps[-1][0]}:":>15} {after[prompt]["completion"][:240]}')
    return '\n\n'.join(out)


def evidence(run, metric: str) -> dict:
    """What a run shows of a failure: {run, curves, text}; curves of about 100 points."""
    parts = {metric: run.series(metric), f'{metric}, held out': run.series(metric, 'step', 'eval')}
    points = run.over_optimisation() if metric == 'score' else []
    if points:
        steps, _, proxy, gold = zip(*points)
        parts = {'proxy: the reward trained on': (steps, proxy), 'gold mark, 0 to 10': (steps, gold)}
    if metric == 'entropy':
        parts['different word pairs among all'] = distinct(run)
    thin = {label: [list(column)[::1 + len(xs) // 100] for column in (xs, ys)]
            for label, (xs, ys) in parts.items() if xs}
    return dict(run=run.name, curves=thin, text=words(run, metric))


def record(runs: list, path: str) -> list:
    """Writes what runs show of each failure (its own command's run first) to a new file -> its names."""
    found = {}
    for name, entry in known().items():
        hits = sorted((run for run in runs if seen_in(run, name)),
                      key=lambda run: not entry['how'].endswith(run.name))
        if hits:
            found[name] = entry | evidence(hits[0], entry['metric'])
    rounded = json.loads(json.dumps(found), parse_float=lambda x: float(f'{float(x):.4g}'))
    with open(path, 'x', encoding='utf-8') as f:
        json.dump(rounded, f, ensure_ascii=False)
    return list(found)


if __name__ == '__main__':
    if len(sys.argv) != 3:
        sys.exit('error: python failures/gallery.py FOLDER NEW.json')
    sys.path.insert(0, os.path.dirname(HERE))
    folder, path = sys.argv[1:]
    from app import find_runs
    try:
        print(f'{path}: {", ".join(record(find_runs(folder), path)) or "no failure in these runs"}')
    except OSError as error:
        sys.exit(f'error: {error}')
