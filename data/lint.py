"""What spoils a run without a word, looked for before it:

    python data/lint.py FILE [--tokenizer=NAME] [--max_len=N] [--test=FILE]

Without a tokenizer: duplicates, equal pairs, a length bias, rows of the test file in FILE. With one also:
rows that cannot be read, pairs that are equal once rendered, nothing to train on, no end token, answers cut
at max_len, turns that the chat template leaves out, and control tokens (<|im_end|>) written in a text, where
they are plain text. Exit code 1 if there is a fault.
"""
import collections
import json
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from arrow import ArrowError
from dataset import load_dataset
from tokenizer import (
    encode_pair,
    encode_prompt,
    encode_row,
    get_tokenizer,
    is_messages,
    plain_row,
    template_args,
)

USAGE = 'usage: python data/lint.py FILE [--tokenizer=gpt2] [--max_len=1024] [--test=FILE]'
PROMPTS = {
    'completion',
    'chosen',
    'messages',
    'text',
    'output',
}  # a row with a prompt and none of these is one for PPO and GRPO
LEADS = ('prompt', 'messages', 'question', 'instruction', 'text', 'chosen')


def lint(ds, tok=None, max_len=None, test=None):
    """-> [(grave, message)] about a Dataset; test: the Dataset that it must not overlap with."""
    said = [(False, f'{name}: {nulls} of {len(ds)} rows are null')
            for name in ds.column_names if (nulls := sum(value is None for value in ds[name]))]
    first = {}
    again = [i for i, text in enumerate(texts(ds, ds.column_names)) if first.setdefault(text, i) != i]
    said += count('duplicates', again, ' repeat an earlier row', False)
    if test is not None:
        said += overlap(ds, test)
    if {'chosen', 'rejected'} <= set(ds.column_names):
        said += look_at_pairs(ds)
    if tok is not None:
        said += look_at_tokens(ds, tok, max_len)
    return said


def count(what, rows, why, grave=True):
    """[(grave, 'what: 2 rows (3, 7) why')], or [] if there is none."""
    if not rows:
        return []
    shown = ', '.join(map(str, rows[:5])) + (' ...' if len(rows) > 5 else '')
    return [(grave, f"{what}: {len(rows):,} row{'s' * (len(rows) != 1)} ({shown}){why}")]


def texts(ds, names):
    return [json.dumps([row[name] for name in names], default=str, ensure_ascii=False) for row in ds]


def overlap(ds, test):
    lead = [name for name in LEADS if name in ds.column_names][:1] or ds.column_names
    if set(lead) - set(test.column_names):
        raise ValueError(
            f"the test set has no column {' or '.join(lead)} to look for: it has "
            f"{', '.join(test.column_names)}"
        )
    held = set(texts(test, lead))
    both = [i for i, text in enumerate(texts(ds, lead)) if text in held]
    return count('train/test overlap', both, f" have a {' + '.join(lead)} of the test set")


def look_at_pairs(ds):
    pairs = list(zip(ds['chosen'], ds['rejected']))
    said = count(
        'chosen == rejected', [i for i, (chosen, rejected) in enumerate(pairs) if chosen == rejected], ''
    )
    sizes = np.array([[len(str(chosen)), len(str(rejected))] for chosen, rejected in pairs], float).reshape(
        -1, 2
    )
    longer = float((sizes[:, 0] > sizes[:, 1]).mean()) if len(sizes) else 0.5
    if abs(longer - 0.5) > 0.1:
        means = f'mean {sizes[:, 0].mean():.0f} against {sizes[:, 1].mean():.0f} characters'
        said.append(
            (
                False,
                f'length bias: chosen is the longer one in {longer:.0%} of the pairs ({means}): a '
                'reward model can '
                'learn length alone',
            )
        )
    return said


def look_at_tokens(ds, tok, max_len):
    found = collections.defaultdict(list)  # fault -> rows
    unreadable = {}                        # the error's first words -> (the error, rows)
    lengths = []
    pairs = {'chosen', 'rejected'} <= set(ds.column_names)
    asked = bool({'prompt', 'instruction'} & set(ds.column_names)) and not PROMPTS & set(ds.column_names)
    for i, row in enumerate(ds):
        if pairs and row['chosen'] == row['rejected']:
            continue  # said by look_at_pairs
        try:
            sequences = encoded(row, tok, pairs, asked)
        except ValueError as e:
            unreadable.setdefault(str(e).split(':')[0], (str(e), []))[1].append(i)
            continue
        lengths += [len(ids) for ids, _ in sequences]
        faults = [
            fault for ids, trained in sequences for fault in token_faults(ids, trained, tok, max_len, asked)
        ]
        for fault in {*faults, *text_faults(row, tok)}:
            found[fault].append(i)
    said = [line for why, rows in unreadable.values() for line in count('unreadable', rows, f': {why}')]
    for fault, why in FAULTS.items():
        said += count(fault, found[fault], why.format(max_len), fault not in NOTES)
    if lengths:
        unit = 'prompt' if asked else 'pair member' if pairs else 'row'
        said.append(
            (
                False,
                f'tokens a {unit}: median {int(np.median(lengths)):,}, 95 % '
                f'{int(np.quantile(lengths, 0.95)):,}, '
                f'longest {max(lengths):,}',
            )
        )
    return said


FAULTS = {
    'nothing to train on': ' have an empty mask',
    'no EOS': ' do not end in a trained end token: the model will not learn to stop',
    'long prompts': ' have tokens beyond max_len {}',
    'cut answers': ' have trained tokens beyond max_len {}',
    'turns left out': ': the chat template does not write what a message of theirs says',
    'control tokens as text': ' hold a control token of the tokenizer (<|im_end|> ...) in a text, where it '
    'is plain text: a prompt that was rendered before belongs in {{"messages"}} or {{"prompt": [...]}}',
}
NOTES = ('turns left out',)


def encoded(row, tok, pairs, asked):
    """The sequences of a row as [(ids, trained)]."""
    if pairs:
        prompt, *answers = encode_pair(row, tok)
        return [(prompt + answer, [False] * len(prompt) + [True] * len(answer)) for answer in answers]
    if asked:
        ids = encode_prompt(row, tok)
        return [(ids, [True] * len(ids))]
    return [encode_row(row, tok)]


def token_faults(ids, trained, tok, max_len, asked):
    if not any(trained):
        yield 'nothing to train on'
    elif not asked and not any(on and i in tok.stop_ids for i, on in zip(ids[-4:], trained[-4:])):
        yield 'no EOS'
    if max_len and any(trained[max_len:]):
        yield 'long prompts' if asked else 'cut answers'


def text_faults(row, tok):
    """What stands in the words of a row."""
    row = plain_row(row)
    for key in ('messages', 'prompt', 'completion', 'chosen', 'rejected', 'text', 'instruction', 'output'):
        value = row.get(key)
        if isinstance(value, str) and any(token in value for token in tok.special):
            yield 'control tokens as text'
        if is_messages(value) and key in ('messages', 'prompt'):
            try:
                text = tok.render(value, **template_args(row))
            except ValueError:
                continue  # said as unreadable, or a prompt that the template does not take alone
            words = [
                m['content'] for m in value if isinstance(m.get('content'), str) and m['role'] != 'assistant'
            ]
            if not all(word.strip() in text for word in words):
                yield 'turns left out'


def main(words):
    options = dict(word[2:].split('=', 1) for word in words if word.startswith('--') and '=' in word)
    files = [word for word in words if not word.startswith('--')]
    known = not options.keys() - {'tokenizer', 'max_len', 'test'} and options.get('max_len', '0').isdecimal()
    if len(files) != 1 or len(files) + len(options) < len(words) or not known:
        raise ValueError(USAGE)
    ds = load_dataset(files[0])
    print(ds)
    tok = get_tokenizer(options['tokenizer']) if 'tokenizer' in options else None
    test = load_dataset(options['test']) if 'test' in options else None
    try:
        said = lint(ds, tok, int(options.get('max_len', 0)) or None, test)
    except ArrowError as e:  # a value, read only now
        raise ValueError(f'{files[0]}: {e}') from None
    for grave, message in said:
        print(('FAULT  ' if grave else 'note   ') + message)
    faults = sum(grave for grave, _ in said)
    hint = '' if tok else ' (give --tokenizer=... to check masks, end tokens and lengths too)'
    print(f"{faults} fault{'s' * (faults != 1)}{hint}")
    return int(faults > 0)


if __name__ == '__main__':
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as e:
        print(f"error: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2)
