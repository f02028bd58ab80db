"""The table of all runs that EXPERIMENTS.md tells of, and how their folders are read. study.py trains them,
figures.py draws them."""

import json
import os
import statistics
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TOY = os.path.join(ROOT, 'data', 'toy')
sys.path[:0] = [ROOT, TOY]

SEEDS = (1337, 2, 3)
# name: (script, config, {key: value}, runs that must be there before). {o} is the folder of all runs, {s} the
# seed.
# everything, the base model too, is trained anew for each seed, by quickstart's commands
SFT, RM = {'init_from': '{o}/sft-s{s}'}, {'reward': '{o}/rm-s{s}'}
RUNS = {
    'base': ('sft.py', 'pretrain_toy', {}, ()),
    'sft': ('sft.py', 'sft_toy', {'init_from': '{o}/base-s{s}'}, ('base',)),
    'rm': ('reward.py', 'ablate_reward', SFT, ('sft',)),
    'rm10': ('reward.py', 'ablate_reward', {**SFT, 'max_rows': 1300, 'epochs': 3.0}, ('sft',)),
    'rm30': ('reward.py', 'ablate_reward', {**SFT, 'max_rows': 3900, 'epochs': 1.5}, ('sft',)),
}


def _add(stage, name, needs=('sft', 'rm'), **keys):
    own = {**SFT, **(RM if stage in ('ppo', 'grpo') else {}), **keys}
    RUNS[name] = (f'{stage}.py', f'ablate_{stage}', own, needs)
    return name


BETAS = {b: _add('ppo', f'ppo-beta{b}', beta=b) for b in (0.0, 0.05, 0.2, 0.8)}
TUNED = BETAS[0.2]
HALF = dict(
    max_iters=16, eval_interval=16, eval_iters=48
)  # half as long, for about the compute of a GRPO or DPO run below
LONGER = dict(
    max_iters=48, eval_interval=3
)  # a and c: half as long again, so that the fall is seen to its end, and looked at more often
LEASHED, OVER = _add('ppo', 'ppo-leashed', **LONGER), {}
for _n, _rm in (('10 %', 'rm10'), ('30 %', 'rm30'), ('100 %', 'rm')):
    OVER[_n] = (
        _rm,
        _add('ppo', f'ppo-over-{_rm}', ('sft', _rm), beta=0.0, reward=f'{{o}}/{_rm}-s{{s}}', **LONGER),
    )
DETAILS = {  # what each detail of PPO buys: one key away from the first
    'as tuned': _add('ppo', 'ppo-half', **HALF),
    'no advantage whitening': _add('ppo', 'ppo-nowhiten', **HALF, whiten_advantages=False),
    'no end-token rule': _add('ppo', 'ppo-noeos', **HALF, missing_eos='none'),
    'no value clip': _add('ppo', 'ppo-novclip', **HALF, vf_clip=0.0),
    'lambda 1 (no GAE)': _add('ppo', 'ppo-lam1', **HALF, lam=1.0),
    '4 passes over half the data': _add(
        'ppo', 'ppo-epochs4', **{**HALF, 'max_iters': 8, 'eval_interval': 8}, ppo_epochs=4
    ),
    'adaptive beta, 3 nats': _add('ppo', 'ppo-adaptive', **HALF, target_kl=3.0, kl_horizon=500),
}
DPO, METHODS = (
    _add('dpo', 'dpo', ('sft',)),
    {
        'PPO': 'ppo-half',
        **{f'GRPO, beta {b}': _add('grpo', f'grpo-beta{b}', beta=b) for b in (0.1, 0.4)},
        'DPO': 'dpo',
    },
)
LONG = {'PPO, twice as long': TUNED, 'DPO, one epoch': 'dpo-long'}
RUNS['dpo-long'] = ('dpo.py', 'ablate_dpo', {**SFT, 'max_iters': 406, 'eval_interval': 406}, ('sft',))
LOSSES = {
    'sigmoid, beta 0.1': DPO,
    **{
        f'{kind}, beta {b}': _add('dpo', f'dpo-{kind}{b}', ('sft',), loss_type=kind, beta=b)
        for kind, b in (('sigmoid', 0.02), ('sigmoid', 0.5), ('ipo', 0.1), ('simpo', 2.0))
    },
    'kto, beta 0.1': _add('kto', 'kto-beta0.1', ('sft',)),
}
RANKS = {0: DPO, **{r: _add('dpo', f'dpo-r{r}', ('sft',), lora_r=r, learning_rate=1e-3) for r in (1, 8, 64)}}
RM_DATA = {
    '10 % of the pairs': 'rm10',
    '30 %': 'rm30',
    '100 %': 'rm',
    'margin = gold gap': 'rm-margin',
    'no blind labels': 'rm-fair',
    '30 % of labels by length': 'rm-long',
}
for _n in ('margin', 'fair', 'long'):
    RUNS[f'rm-{_n}'] = ('reward.py', 'ablate_reward', {**SFT, 'dataset': f'{{o}}/pref_{_n}.jsonl'}, ('sft',))
# one line wrong each, beside its right twin:
# {label: (wrong run, right run, the number that tells, 'eval', 'train' or 'judged')}
_SHORT = dict(max_iters=8, eval_interval=8, eval_iters=48)
_RIGHT = {
    'ppo': _add('ppo', 'ppo-short', **_SHORT),
    'grpo': _add('grpo', 'grpo-short', **_SHORT),
}


def _wrong(stage, name, **keys):
    script, config, own, needs = RUNS[_RIGHT[stage]]
    RUNS[name.replace('_', '-')] = (f'failures/{name}.py', config, {**own, **keys}, needs)
    return name.replace('_', '-')


RUNS['sft-short'] = ('sft.py', 'sft_toy', {**RUNS['sft'][2], 'max_iters': 120}, ('base',))
RUNS['pad-is-eos'] = ('failures/pad_is_eos.py', *RUNS['sft-short'][1:])
FAILURES = {
    'pad = EOS': ('pad-is-eos', 'sft-short', 'ended', 'judged'),
    'KL with the wrong sign': (_wrong('ppo', 'wrong_kl_sign'), _RIGHT['ppo'], 'kl', 'train'),
    'sampled at T = 0.5, scored at 1': (
        _wrong('ppo', 'temperature_mismatch'),
        _RIGHT['ppo'],
        'mismatch',
        'train',
    ),
    'sampled with top-p 0.7, scored without': (
        _wrong('ppo', 'top_p_mismatch'),
        _RIGHT['ppo'],
        'mismatch',
        'train',
    ),
    'padded on the wrong side': (_wrong('ppo', 'wrong_padding_side'), _RIGHT['ppo'], 'mismatch', 'train'),
    'a group of one': (_wrong('grpo', 'group_of_one', group_size=1), _RIGHT['grpo'], 'dead', 'train'),
}
QUESTIONS = {
    'a': ['sft', OVER['100 %'][1], LEASHED],
    'b': ['sft', *BETAS.values()],
    'c': ['sft', *(name for pair in OVER.values() for name in pair)],
    'd': ['sft', 'rm', *METHODS.values(), *LONG.values()],
    'e': list(DETAILS.values()),
    'f': list(LOSSES.values()),
    'g': list(RANKS.values()),
    'h': list(RM_DATA.values()),
    'i': list(dict.fromkeys(n for wrong, right, _, _ in FAILURES.values() for n in (right, wrong))),
}
QUICK = {
    'sft': ['--max_iters=2', '--eval_interval=2', '--eval_iters=1'],
    'reward': ['--max_iters=2', '--normalize_n=8'],
    'ppo': [
        '--max_iters=2',
        '--eval_interval=1',
        '--eval_iters=4',
        '--batch_size=8',
        '--minibatch_size=8',
        '--max_new_tokens=16',
    ],
    'grpo': [
        '--max_iters=2',
        '--eval_interval=1',
        '--eval_iters=4',
        '--batch_size=16',
        '--minibatch_size=16',
        '--max_new_tokens=16',
    ],
    'dpo': ['--max_iters=2', '--batch_size=8', '--eval_samples=4', '--eval_iters=1', '--max_new_tokens=16'],
}
JUDGED = 252  # test prompts that every model answers: the first so many, a third of each family
BON, BON_PROMPTS = 64, 40  # answers of the SFT model to each of the first so many test prompts, for best-of-n


def read_rows(*path):
    """The rows of a .jsonl file."""
    with open(os.path.join(*path), encoding='utf-8') as f:
        return [json.loads(line) for line in f]


def folder(name, seed, out):
    return os.path.join(out, f'{name}-s{seed}')


def stage_of(name):
    config = RUNS[name][1]
    return {'pretrain_toy': 'sft'}.get(config, config.removeprefix('ablate_').removesuffix('_toy'))


def config_of(name):
    """The config file of a run: 'config/sft_toy.py', 'experiments/ablate_ppo.py'"""
    config = RUNS[name][1]
    return f'experiments/{config}.py' if config.startswith('ablate_') else f'config/{config}.py'


def command(name, seed, out, quick):
    """The command line of a run, as a user would type it."""
    script, _, keys, _ = RUNS[name]
    args = [f'--{k}={str(v).format(o=out, s=seed)}' for k, v in keys.items()]
    return [
        'python',
        script,
        config_of(name),
        *args,
        *(QUICK[stage_of(name)] if quick else ()),
        f'--seed={seed}',
        f'--out_dir={folder(name, seed, out)}',
    ]


def text_metrics(texts):
    """Signs of collapse in [str]: distinct2 = different word pairs / all word pairs; repeats = share of texts
    that hold a word triple twice; courtesies = kind phrases a text. ['a b a b a b', 'c d'] -> distinct2 3/6,
    repeats 1/2."""
    import gold

    pairs, repeated, kind = [], 0, 0
    for text in texts:
        w = gold.words(text)
        pairs += zip(w, w[1:])
        triples = list(zip(w, w[1:], w[2:]))
        repeated += len(set(triples)) < len(triples)
        kind += sum(text.count(p) for p in gold.OPENERS + gold.CLOSERS)
    return {
        'distinct2': len(set(pairs)) / max(1, len(pairs)),
        'repeats': repeated / len(texts),
        'courtesies': kind / len(texts),
    }


def trajectory(name, seed, out):
    """[{'step', 'kl', 'proxy', 'gold', 'distinct2', ...}] of a PPO or GRPO run: its own evaluations on
    validation prompts, marked by gold now."""
    import gold
    from dataset import load_dataset

    rows = {r['prompt']: r for r in load_dataset(os.path.join(TOY, 'prompts_val.jsonl'))}
    at = {}
    for s in read_rows(folder(name, seed, out), 'samples.jsonl'):
        at.setdefault(s['step'], []).append(s)
    seen = {
        r['step']: r
        for r in read_rows(folder(name, seed, out), 'log.jsonl')
        if r['split'] == 'eval'
    }
    found = []
    for step, samples in sorted(at.items()):
        texts = [s['completion'].replace('<|endoftext|>', '') for s in samples]
        marks = [gold.score(t, rows[s['prompt']]) for t, s in zip(texts, samples)]
        found.append(
            {
                'step': step,
                'kl': seen[step]['kl'],
                'proxy': seen[step]['score'],
                'len': seen[step]['len'],
                'gold': sum(marks) / len(marks),
                **text_metrics(texts),
            }
        )
    return found


def results(out):
    return read_rows(out, 'results.jsonl') if os.path.exists(os.path.join(out, 'results.jsonl')) else []


def record(out, rows):
    with open(os.path.join(out, 'results.jsonl'), 'a', encoding='utf-8') as f:
        f.writelines(json.dumps(r) + '\n' for r in rows)


def arguments(args, given):
    """['a', '--seeds=1,2'] -> (['a'], given with what was said). A mistake ends the program with one line."""
    questions = [a for a in args if not a.startswith('--')]
    given = options([a for a in args if a.startswith('--')], **given)
    known = [*QUESTIONS, 'oracle']
    if set(questions) - set(known):
        print(f'error: expected questions of {" ".join(known)}, got {" ".join(questions)}', file=sys.stderr)
        raise SystemExit(2)
    return questions or known, given


def options(words, **given):
    """['--seeds=1,2'] -> given with what was said. A mistake ends the program with one line."""
    for word in words:
        key, _, value = word.removeprefix('--').partition('=')
        if key not in given or not value:
            known = ' '.join(f'--{k}={v}' for k, v in given.items())
            print(f'error: unknown option {word!r}; known: {known}', file=sys.stderr)
            raise SystemExit(2)
        given[key] = value
    return given


def run_once(out, script, *words):
    """A command in a process of its own that writes to the folder `out`; one that has ended is kept. Where it
    fails the program ends: the command has said why."""
    last = os.path.join(out, 'done')
    if os.path.exists(last):
        return
    more = [] if script == 'evaluate.py' else ['--overwrite']
    code = subprocess.run([sys.executable, script, *words, f'--out_dir={out}', *more], cwd=ROOT).returncode
    if code:
        sys.exit(code)
    open(last, 'w', encoding='utf-8').close()


def mark(folder, rows, out):
    """The mean gold mark, 0 to 10, of a model's answers to toy prompts; evaluate.py writes them to `out`."""
    how = ['--reward=data/toy/gold.py', '--temperature=1', '--max_new_tokens=48']
    run_once(out, 'evaluate.py', f'--init_from={folder}', f'--eval_file={rows}', *how)
    with open(os.path.join(out, 'eval.json'), encoding='utf-8') as f:
        return json.load(f)['score'][0]


def gold_table(seeds, models_of, out, rows):
    """Prints the gold marks over the seeds. models_of(seed) -> {name: a trained model's folder}."""
    marks = {}
    for seed in seeds.split(','):
        for name, folder in models_of(seed).items():
            answers = os.path.join(out, f'marks-{name.replace(" ", "-")}-{seed}')
            marks.setdefault(name, []).append(mark(folder, rows, answers))
    print('gold, 0 to 10: min / median / max of the seeds\n\n| | gold |\n| --- | --- |')
    for name, of in marks.items():
        print(f'| {name} | {min(of):.2f} / {statistics.median(of):.2f} / {max(of):.2f} |')
