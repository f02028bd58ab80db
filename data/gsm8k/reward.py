"""Reward of GSM8K: 1 when the answer's number equals the reference's, exactly, as a rational number; else 0.

Used by grpo.py / ppo.py (`--reward=data/gsm8k/reward.py`) and by their evaluation, for the base and the
trained model alike: a parser that is kinder to one of them makes a gain out of nothing. What counts as the
answer of a text, in order:
    1. the last \\boxed{...}                  "... so \\boxed{1{,}200}"       -> 1200
    2. what follows the last '####'           "... #### 1,200 apples"        -> 1200
    3. what follows the last 'answer is/:/='  "The final answer is $18.50."  -> 37/2
    4. the last number anywhere               "She has 4 left, 3 of them red" -> 3    (generous, but to all)
A place named by 1 to 3 holds one number and words. '5, 6, 7', '7 or 8', '12-5' and '10^3' are no number, and
the search does not go on below them; neither does it below an empty box. '6 * 7 = 42' is 42.
Read as numbers: 1,200  $18.50  -3  - 3  −3  +3  (3)  .5  3/4  1 3/4  \\frac{3}{4}  50%  1e3  7.  '7 apples'
1.5 million  3 dozen.
50% is 1/2, and is also taken for 50: GSM8K's references leave the sign out.
"""
import os
import re
import sys
from fractions import Fraction

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from final_answer import marked, named, spoken

LONGEST = 200  # characters of a number: Python's int refuses thousands of digits, and no answer is that long
SCALES = {
    'dozen': 12, 'hundred': 100, 'thousand': 10**3, 'million': 10**6, 'billion': 10**9, 'trillion': 10**12}
# thousands in threes: '1,2' is two numbers
_NUMBER = r'\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|(?<![\d.])\.\d+'
_VALUE = re.compile(
    r'(?P<sign>[-+]\s?)?(?:[$€£]\s?(?P<sign2>-)?)?'
    rf'(?:(?:(?P<whole>\d+)\s+)?(?P<top>{_NUMBER})\s*/\s*(?P<bottom>\d[\d,]*(?:\.\d+)?)'
    rf'|(?P<plain>{_NUMBER})(?P<exp>[eE][-+]?\d{{1,3}}(?!\w))?)'
    rf'(?P<scales>(?:\s{{0,3}}(?:{"|".join(SCALES)})s?\b)*)\s?(?P<percent>%|percent\b)?', re.ASCII | re.I)
# beside the one number of a named place: more digits, operators, unknowns, words that make a choice of it
_MORE = re.compile(
    r'[\\^*+<>!]|/(?!\s?[a-z])|\d|-\s*\w\b|(?<![a-z])[xyz](?![a-z])|'
    r'\b(?:or|and|not|half|maybe|either)\b', re.I)


def _clean(text):
    """LaTeX and typography into plain characters; a \\frac becomes a/b, thousands written 1{,}200 or 1\\,200
    get their comma."""
    text = text.replace('\u2212', '-').replace('\u2013', '-').replace('\u00a0', ' ').replace('{,}', ',')
    text = re.sub(r'(?<=\d)\\[,! ](?=\d{3})', ',', text)
    text = re.sub(r'(?<=\d)\s*\\[dt]?frac', r' \\frac', text)  # 1\frac{3}{4} is 1 3/4
    text = re.sub(r'\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))', r'\1\2/\3\4', text)
    text = re.sub(r'\\(?:text|mathrm|mbox|textbf|mathbf|boldsymbol)\s*\{([^{}]*)\}', r' \1 ', text)
    return re.sub(r'\\(?=[%$()])|\\[,;:! ]|\^\{?\\circ\}?|\*\*', ' ', text)


def _value(match):
    """The number of a match of _VALUE as a Fraction, without its sign; None where it is none: 3/0, thousands
    of digits."""
    digits = {key: Fraction(match[key].replace(',', '')) for key in ('whole', 'top', 'bottom') if match[key]}
    if digits.get('bottom') == 0:
        return None
    if match['plain']:
        value = Fraction(match['plain'].replace(',', '') + (match['exp'] or ''))
    else:
        value = digits['top'] / digits['bottom'] + digits.get('whole', 0)
    for word in match['scales'].lower().split():
        value *= SCALES[word.removesuffix('s')]
    return value


def _numbers(text):
    """[(Fraction, has a percent sign, start, end), ...] of every number in cleaned text, left to right."""
    found = []
    for m in _VALUE.finditer(text):
        value = _value(m) if len(m[0]) <= LONGEST else None
        if value is None:
            continue
        sign, before = m['sign'] or '', text[max(0, m.start() - 9):m.start()]
        between = r'[\w)}\]]$' if sign == sign.strip() else r'([\d)}\]%]|\b\w)\s*$'
        minus = '-' in sign and not re.search(between, before)  # 12-5, x - 5: no sign, but a minus
        if minus or m['sign2']:
            value = -value
        found.append((value, bool(m['percent']), m.start(), m.end()))
    return found


def _only_number(place):
    """(Fraction, has a percent sign) of a place that names the answer; None where it does not hold one number
    and words."""
    text = _clean(place).split('=')[-1].strip()
    found = _numbers(text)
    if len(found) != 1:
        return None
    value, percent, start, end = found[0]
    return None if _MORE.search(text[:start] + ' ' + text[end:]) else (value, percent)


def _answer(text):
    place = marked(text)
    if place is not None:
        return _only_number(place)
    place = named(text)
    if place is not None and _numbers(_clean(place)):
        return _only_number(place)
    found = _numbers(_clean(spoken(text)[-4000:]))  # the last number is all that counts
    return found[-1][:2] if found else None


def extract_answer(text: str) -> str | None:
    """The answer of a text as a string: '1200', '-3', '37/2', '50%'; None where there is no number.

    '48 / 2 = 24, so #### $1,200.00' -> '1200'; 'half: 1/2' -> '1/2'; '#### 5, 6' -> None."""
    found = _answer(text)
    return None if found is None else f'{found[0]}{"%" * found[1]}'


def _meanings(value, percent):
    return {value, value / 100} if percent else {value}


def equal(answer: str, reference: str) -> bool:
    """Do two answers of extract_answer mean the same? equal('50%', '1/2') and equal('50%', '50') are True,
    equal('50', '1/2') is not."""
    got, want = _answer(answer), _answer(reference)
    return None not in (got, want) and bool(_meanings(*got) & _meanings(*want))


def reward(prompt: str, completion: str, row: dict) -> float:
    """1.0 where the completion's answer equals row['answer'] (a number, or a whole GSM8K solution with its
    '####'), else 0.0.

    reward('', 'So it is \\boxed{72}.', {'answer': '... #### 72'}) -> 1.0. ValueError where the reference has
    no number."""
    reference = str(row['answer'])
    if _answer(reference) is None:
        raise ValueError(f'data/gsm8k/reward.py: no number in the reference answer {reference[:80]!r}: '
                         'give a row with "answer": "... #### 72"')
    return float(equal(completion, reference))
