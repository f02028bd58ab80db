"""What spoils a run without a word, looked for before it: python data/lint.py FILE [--tokenizer=NAME] [--max_len=N] [--test=FILE]"""
import json
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from arrow import ArrowError
from dataset import load_dataset
from tokenizer import encode_pair, encode_prompt, encode_row, get_tokenizer, _of_table


def lint(ds, tok=None, max_len=None, test=None):
    """What spoils a run without a word, looked for before it: [(grave, message)]. Without a tokenizer: duplicates, equal pairs, length
    bias, overlap with `test`; with one also: rows that cannot be read, no token to train on, no EOS at the end, answers cut at max_len."""
    said, pairs = [], {'chosen', 'rejected'} <= set(ds.types)
    lead = [k for k in ('prompt', 'messages', 'question', 'instruction', 'text', 'chosen') if k in ds.types][:1] or ds.column_names

    def texts(d, names):
        return [json.dumps(row, default=str, ensure_ascii=False) for b in d.select_columns(names).iter(1000) for row in zip(*b.values())]

    def say(grave, what, rows, why):
        if rows:
            said.append((grave, f"{what}: {len(rows):,} row{'s' * (len(rows) != 1)} ({', '.join(map(str, rows[:5]))}{' ...' if len(rows) > 5 else ''}){why}"))
    said += [(False, f'{k}: {n} of {len(ds)} rows are null') for k in ds.types if (n := sum(v is None for v in ds[k]))]
    seen = {}
    say(False, 'duplicates', [i for i, k in enumerate(texts(ds, ds.column_names)) if seen.setdefault(k, i) != i], ' repeat an earlier row')
    if test is not None:
        if set(lead) - set(test.types):
            raise ValueError(f"the test set has no column {' or '.join(lead)} to look for: it has {', '.join(test.types)}")
        held = set(texts(test, lead))
        say(True, 'train/test overlap', [i for i, p in enumerate(texts(ds, lead)) if p in held], f" have a {' + '.join(lead)} of the test set")
    if pairs:
        both = list(zip(ds['chosen'], ds['rejected']))
        say(True, 'chosen == rejected', [i for i, (x, y) in enumerate(both) if x == y], '')
        sizes = np.array([[len(str(x)), len(str(y))] for x, y in both], float).reshape(-1, 2)
        longer = float((sizes[:, 0] > sizes[:, 1]).mean()) if len(sizes) else 0.5
        if abs(longer - 0.5) > 0.1:
            said.append((False, f'length bias: chosen is the longer one in {longer:.0%} of the pairs (mean {sizes[:, 0].mean():.0f} against {sizes[:, 1].mean():.0f} '
                                'characters): a reward model can learn length alone'))
    if tok is not None:
        bad, empty, open_, cut, lengths = {}, [], [], [], []
        asked = 'prompt' in ds.types and not {'completion', 'chosen', 'messages', 'text', 'instruction'} & set(ds.types)  # prompts for PPO and GRPO
        for i, row in enumerate(ds):
            try:
                if pairs:
                    p, x, y = encode_pair(row, tok) if row['chosen'] != row['rejected'] else ([], [], [])  # equal ones are in the list already
                    rows = [(p + a, [False] * len(p) + [True] * len(a)) for a in (x, y) if a]
                else:
                    rows = [encode_row(row, tok)] if not asked else [(ids := encode_prompt(_of_table(row)['prompt'], tok), [True] * len(ids))]
            except ValueError as e:
                bad.setdefault(str(e).split(':')[0], (str(e), []))[1].append(i)
                continue
            lengths += [len(ids) for ids, _ in rows]
            empty += [i] if any(not any(on) for _, on in rows) else []
            open_ += [i] if not asked and any(not (any(on) and tok.eot in [t for t, m in zip(ids[-4:], on[-4:]) if m]) for ids, on in rows) else []
            cut += [i] if max_len and any(any(on[max_len:]) for _, on in rows) else []
        for why, rows in bad.values():
            say(True, 'unreadable', rows, f': {why}')
        say(True, 'nothing to train on', empty, ' have an empty mask')
        say(True, 'no EOS', open_, ' do not end in a trained end token: the model will not learn to stop')
        say(True, 'long prompts' if asked else 'cut answers', cut, f' have {"" if asked else "trained "}tokens beyond max_len {max_len}')
        if lengths:
            said.append((False, f'tokens a {"prompt" if asked else "pair member" if pairs else "row"}: median {int(np.median(lengths)):,}, 95 % {int(np.quantile(lengths, 0.95)):,}, longest {max(lengths):,}'))
    return said


def _show(key, value, most=500):
    """One column of a row for a terminal: text as it is, messages one by one."""
    if isinstance(value, list) and value and all(isinstance(m, dict) and {'role', 'content'} <= m.keys() for m in value):
        for m in value:
            _show(f'{key} | {m["role"]}', m['content'], most)
    else:
        text = value if isinstance(value, str) else repr(value)
        print(f'{key}: {text[:most]}' + (f' ... ({len(text):,} characters)' if len(text) > most else ''))


def _main(words):
    """head FILE [rows] | lint FILE [--tokenizer=NAME] [--max_len=N] [--test=FILE]"""
    usage = 'usage: python data/lint.py head FILE [ROWS] | python data/lint.py lint FILE [--tokenizer=gpt2] [--max_len=1024] [--test=FILE]'
    options = dict(w[2:].split('=', 1) for w in words if w.startswith('--') and '=' in w)
    plain = [w for w in words if not w.startswith('--')]
    numbers = [*plain[2:], *([options['max_len']] if 'max_len' in options else [])]
    if (len(plain) < 2 or len(plain) > 2 + (plain[0] == 'head') or plain[0] not in ('head', 'lint') or options.keys() - {'tokenizer', 'max_len', 'test'}
            or len(plain) + len(options) < len(words) or not all(n.isdecimal() for n in numbers) or (plain[0] == 'head' and options)):
        raise ValueError(usage)
    ds = load_dataset(plain[1])
    print(ds)
    try:
        if plain[0] == 'head':
            for i, row in enumerate(ds.select(range(min(int(plain[2]) if len(plain) > 2 else 3, len(ds))))):
                print(f'--- row {i}')
                for k, v in row.items():
                    _show(k, v)
            return 0
        tok = get_tokenizer(options['tokenizer']) if 'tokenizer' in options else None
        said = lint(ds, tok, int(options.get('max_len', 0)) or None, load_dataset(options['test']) if 'test' in options else None)
    except ArrowError as e:  # a value, read only now
        raise ValueError(f'{plain[1]}: {e}') from None
    for grave, message in said:
        print(('FAULT  ' if grave else 'note   ') + message)
    faults = sum(g for g, _ in said)
    print(f'{faults} fault{"s" * (faults != 1)}' + ('' if tok else ' (give --tokenizer=... to check masks, EOS and lengths too)'))
    return int(faults > 0)


if __name__ == '__main__':
    try:
        sys.exit(_main(sys.argv[1:]))
    except (ValueError, OSError) as _e:
        print(f'error: {" ".join(str(_e).split())}', file=sys.stderr)
        sys.exit(2)
