"""Reward of GSM8K: 1 when the answer's number equals the reference's, exactly, as a rational number; else 0.

Used by grpo.py / ppo.py (`--reward=data/gsm8k/reward.py`) and by their evaluation, for the base and the trained model
alike: a parser that is kinder to one of them makes a gain out of nothing. What counts as the answer of a text, in order:
    1. the last \\boxed{...}                  "... so \\boxed{1{,}200}"       -> 1200
    2. what follows the last '####'           "... #### 1,200 apples"        -> 1200
    3. what follows the last 'answer is/:/='   "The final answer is $18.50."  -> 37/2
    4. the last number anywhere               "She has 4 left, 3 of them red" -> 3    (the fallback: generous, and the same for all)
A place named by 1 or 2 that holds no number is an answer that is wrong; the search does not go on below it.
Read as numbers: 1,200  $18.50  -3  −3  +3  (3)  .5  3/4  1 3/4  \\frac{3}{4}  50%  1e3  7.  '7 apples'  '7:30' -> 7.
50% is 1/2, and is also taken for 50: GSM8K's references leave the sign out.
"""
import re
from fractions import Fraction

_NUMBER = r'\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\d.])\.\d+'  # thousands by comma only in threes: '1,2' is two numbers
_VALUE = re.compile(
    rf'(?P<sign>(?<![\w)}}])[-+])?(?:[$€£]\s?(?P<sign2>-)?)?'
    rf'(?:(?P<whole>\d+)\s+)?(?:(?P<num>{_NUMBER})\s*/\s*(?P<den>\d[\d,]*(?:\.\d+)?)|(?P<plain>{_NUMBER})(?P<exp>[eE][-+]?\d{{1,3}}(?!\w))?)'
    r'\s?(?P<percent>%|percent\b)?', re.ASCII)


def _clean(text):
    """LaTeX and typography into plain characters; a \\frac becomes a/b, thousands written 1{,}200 or 1\\,200 lose the braces."""
    text = text.replace('\u2212', '-').replace('\u2013', '-').replace('\u00a0', ' ').replace('{,}', ',').replace('\\%', '%').replace('\\$', '$')
    text = re.sub(r'(?<=\d)\\[,! ](?=\d{3})', ',', text)
    text = re.sub(r'(?<=\d)\s*\\[dt]?frac', r' \\frac', text)  # 1\frac{3}{4} is 1 3/4
    text = re.sub(r'\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))', lambda m: f'{m[1] or m[2]}/{m[3] or m[4]}', text)
    return re.sub(r'\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}', r' \1 ', text).replace('**', '').replace('\\(', '(').replace('\\)', ')')


def _numbers(text):
    """[(Fraction, has a percent sign), ...] of every number in the text, left to right."""
    found = []
    for m in _VALUE.finditer(_clean(text)):
        if len(m[0]) > 200:
            continue  # a model gone astray writes thousands of digits: Python's int refuses them, and no answer is that long
        if m['num'] is not None:
            den = Fraction(m['den'].replace(',', ''))
            if den == 0:
                continue  # 3/0 is no number
            value = Fraction(m['num'].replace(',', '')) / den + int(m['whole'] or 0)
        else:
            value = Fraction(m['plain'].replace(',', '') + (m['exp'] or ''))
            if m['whole'] is not None:  # '12 34': two numbers, not a mixed fraction
                found.append((int(m['whole']) * (-1 if '-' in (m['sign'], m['sign2']) else 1), False))
                found.append((value, bool(m['percent'])))
                continue
        found.append((value * (-1 if '-' in (m['sign'], m['sign2']) else 1), bool(m['percent'])))
    return [(Fraction(v), p) for v, p in found]


def _boxed(text):
    """The inside of the last \\boxed{...} with its braces matched, or None; an unclosed one gives what there is."""
    start = max(text.rfind('\\boxed{'), text.rfind('\\fbox{'))
    if start < 0:
        return None
    i = begin = text.index('{', start) + 1
    depth = 1
    while i < len(text) and depth:
        depth += {'{': 1, '}': -1}.get(text[i], 0)
        i += 1
    return text[begin:i - 1] if depth == 0 else text[begin:]


def _answer(text):
    boxed = _boxed(text)
    if boxed is not None:
        inside = re.split(r'=', boxed)[-1]
        return (_numbers(inside) or [None])[0]
    if '####' in text:
        line = text.rsplit('####', 1)[1].strip().split('\n')[0]
        return (_numbers(line.split('=')[-1]) or [None])[0]
    named = list(re.finditer(r'answer\s*(?:is|:|=|was|would be|must be)\s*:?([^\n]*)', text, re.I))
    if named:
        line = re.split(r'(?<=[.!?])\s', named[-1][1].strip())[0]  # the rest of its sentence
        numbers = _numbers(line.split('=')[-1])
        if numbers:
            return numbers[0]
    return (_numbers(text) or [None])[-1]


def extract_answer(text):
    """The answer of a text (str) as a string: '1200', '-3', '37/2'; None where there is no number.

    extract_answer('48 / 2 = 24, so #### $1,200.00') -> '1200'; extract_answer('half: 1/2') -> '1/2'; extract_answer('50%') -> '1/2'."""
    found = _answer(text)
    return None if found is None else str(found[0] / (100 if found[1] else 1))


def reward(prompt: str, completion: str, row: dict) -> float:
    """1.0 where the completion's answer equals row['answer'] (a number, or a whole GSM8K solution with its '####'), else 0.0.

    reward('', 'So it is \\\\boxed{72}.', {'answer': '... #### 72'}) -> 1.0. ValueError where the reference has no number."""
    want, got = _answer(str(row['answer'])), _answer(completion)
    if want is None:
        raise ValueError(f"data/gsm8k/reward.py: no number in the reference answer {str(row['answer'])[:80]!r}: give a row with \"answer\": \"... #### 72\"")
    if got is None:
        return 0.0
    same = lambda v, p: {v} if not p else {v, v / 100}
    return float(bool(same(*want) & same(*got)))
