"""How good are the answer checkers? Every reference of real data against itself, its rewritings, and answers
changed in one place.

    python data/sweep.py --src=FOLDER            # rows with "answer", "solution" or "reward_model": .jsonl,
    .jsonl.gz, .parquet
    python data/sweep.py --src=FOLDER --show=True
Prints how many rewritings of a reference are not paid (0 is right) and how many changed ones are (0 is right
but for those that mean the same: a digit of an unordered list, a letter of a name that is left of =). Run it
after every change of a reward file.
"""
import importlib.util
import os
import random
import re
import sys
import time

_root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [_root, os.path.join(_root, 'data')]

src = '' # a folder or a file
grader = '' # reward file; '' = data/gsm8k/reward.py for references with ####, data/math/reward.py for others
limit = 0 # the first so many references; 0 = all
show = False # print each pair that is judged otherwise than expected
seed = 1 # of the changes
config_keys = [k for k, v in globals().items()
               if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
# overrides from the command line or a config file
exec(open(os.path.join(_root, 'configurator.py')).read())


def load(path):
    spec = importlib.util.spec_from_file_location('grader', os.path.join(_root, path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def references(path, math):
    """The distinct reference answers of a file."""
    from rows import rows_of
    found = {}
    for row in rows_of(path):
        try:
            found.setdefault(math.reference_of(row))
        except ValueError:
            if row.get('solution'):
                found.setdefault(math.boxed(row['solution']))
    return [answer for answer in found if answer]


def rewritings(answer):
    """The same answer in other spellings."""
    yield f'${answer}$'
    yield answer + '.'
    yield ' ' + answer + '\\ '
    yield answer.replace('\\frac', '\\dfrac')
    if '\\left' not in answer and '\\{' not in answer:
        yield re.sub(r'[()]', lambda m: ('\\left' if m[0] == '(' else '\\right') + m[0], answer)
    if re.fullmatch(r'-?\d+', answer):
        yield answer + '.00'
        yield f'{int(answer):,}'
        yield f'{int(answer):,}'.replace(',', '{,}')
        yield answer + '\\text{ apples}'
        yield answer + '\\,\\text{cm}'
    if re.fullmatch(r'[^\s\\]+', answer):
        yield re.sub(r'(?<=[\w)])([-+=])(?=[\w(])', r' \1 ', answer)


def changed(answer, rng):
    """(kind, answer) with one digit, sign, brace or letter changed."""
    letters = [m.start() for m in re.finditer(r'(?<![a-zA-Z\\])[a-zA-Z](?![a-zA-Z])', answer)]
    places = {'digit': [m.start() for m in re.finditer(r'\d', answer)], 'letter': letters,
              'sign': [m.start() for m in re.finditer('[-+]', answer)],
              'brace': [m.start() for m in re.finditer(r'(?<!\\)[{}]', answer)]}
    for kind, at in places.items():
        if not at:
            continue
        i = rng.choice(at)
        if kind == 'digit':
            yield kind, answer[:i] + str((int(answer[i]) + rng.randint(1, 9)) % 10) + answer[i + 1:]
        elif kind == 'letter':
            following = chr(97 + (ord(answer[i].lower()) - 96) % 26)
            yield kind, answer[:i] + rng.choice([answer[i].swapcase(), following]) + answer[i + 1:]
        elif kind == 'sign':
            yield kind, answer[:i] + ('+' if answer[i] == '-' else '-') + answer[i + 1:]
        # a character moves out of the braces, or in
        elif 0 < i < len(answer) - 1 and answer[i + 1].isalnum() and answer[i - 1].isalnum():
            yield kind, answer[:i] + answer[i + 1] + answer[i] + answer[i + 2:]
    yield 'sign', '-' + answer


def main():
    from rows import find
    math, gsm8k = load(grader or 'data/math/reward.py'), load(grader or 'data/gsm8k/reward.py')
    rng, start, slowest = random.Random(seed), time.process_time(), 0.0
    counts = {}
    for path in find(src, r'\.(jsonl?(\.gz)?|parquet)$'):
        found = references(path, math)[:limit or None]
        for answer in found:
            equal = gsm8k.equal if 'gsm8k' in os.path.basename(path) else math.equal
            asked = [('itself', answer, True), *(('rewritten', text, True) for text in rewritings(answer))]
            asked += [(kind, text, False) for kind, text in changed(answer, rng) if text != answer]
            for kind, text, right in asked:
                t0 = time.process_time()
                said = equal(text, answer)
                slowest = max(slowest, time.process_time() - t0)
                total, wrong = counts.get(kind, (0, 0))
                counts[kind] = total + 1, wrong + (said != right)
                if show and said != right:
                    print(f'{"paid" if said else "not paid"} ({kind}): {text!r} for {answer!r}')
        print(f'{os.path.basename(path)}: {len(found):,} references')
    for kind, (total, wrong) in counts.items():
        said = 'not paid' if kind in ('itself', 'rewritten') else 'paid'
        print(f'{kind:>10}: {wrong:,} of {total:,} {said}')
    print(f'slowest answer {slowest * 1000:.1f} ms, all {time.process_time() - start:.0f} CPU s')


if __name__ == '__main__':
    main()
