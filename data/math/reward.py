"""Reward of competition mathematics: 1 when the answer equals the reference as mathematics, else 0. Standard
library only.

    python grpo.py --reward=data/math/reward.py ...
A row's "answer": '\\frac{3}{4}', '\\boxed{34}', a whole solution, '#### 72'.

What counts as the answer of a text stands in data/final_answer.py: the last \\boxed{...}, else what follows
the last '####', else what follows the last 'answer is' / 'answer:'. Nothing else: a text without these has no
answer.
When are two answers equal? Typography goes first (\\left, \\!, \\dfrac, $, 1,200 = 1{,}200, units behind a
number). Then
    words        \\text{(E)} is E; Friday is \\text{friday}. Only what is words alone is compared without case
    structure    (1,2) is not [1,2], (2,1) or \\{1,2\\}; sets and bare lists 1, 2 have no order ('and', 'or'
                 are commas, \\pm makes two), but x = 1, y = 2 has; unions; matrices; ratios
    relations    x = 5 is 5; y = 2x is 2x - y = 0 (proportional); x > 2 is (2, \\infty)
    expressions  computed while they are read: rational numbers exactly (0.333 is not 1/3), others and
                 variables at fixed points to 1e-12 of their size: \\frac{1}{\\sqrt2} = \\frac{\\sqrt{2}}{2};
                 (x+1)^2 = x^2+2x+1; \\cos 60^\\circ = 1/2; 1\\frac34 = 7/4; 0.\\overline{3} = 1/3;
                 10\\% = 0.1 = 10
What it cannot see: units are not compared; a question echoed back is right where equal is all that is asked
("factor x^2-1"); variables are taken positive under roots and logarithms. Bounds keep it fast on anything
that a model may write: MAX_LEN characters, MAX_DEPTH, MAX_ITEMS, numbers of MAX_BITS; beyond them, answers
are compared token by token. Nothing is evaluated as Python.
"""
import cmath
import functools
import math
import os
import random
import re
import sys
from fractions import Fraction

sys.path.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from final_answer import boxed, marked, named  # noqa: F401 (boxed: prepare.py asks for it)

MAX_LEN, MAX_DEPTH, MAX_BITS, MAX_ITEMS = 600, 40, 20000, 40

# --------------------------------------------------------------------------------------------------
# typography: one spelling for what looks the same

SYMBOLS = {
    '\u2212': '-', '\u00a0': ' ', '\u00b0': '\\degree ', '\u03c0': '\\pi ', '\u221e': '\\infty ',
    '\u221a': '\\sqrt ', '\u00d7': '\\times ', '\u222a': '\\cup ', '\u00b7': '\\cdot ', '\u2264': '\\le ',
    '\u2265': '\\ge ', '\u2260': '\\ne ', '\u00b2': '^2 ', '\u00b3': '^3 ', '\u00bd': '\\frac12 ',
    '\u2205': '\\emptyset ', '\u2208': '\\in '}
ROW, MARKS = '\ue001', '.,;:$ \\'  # the end of a matrix row; what may stand at the end of an answer


def without_commas(match):
    return match[0].replace(',', '')


SPELLINGS = [(re.compile(pattern), made) for pattern, made in (
    (r'\\\\', ROW),
    (r'\\(?:left|right|[bB]ig+[lrm]?|displaystyle|textstyle|mathstrut|limits)(?![a-zA-Z])\.?', ''),
    (r'\\(?:boldsymbol|bm|mathbf|mathit|mathsf|pmb)(?![a-zA-Z])', ' '),
    (r'\\[dtc]frac(?![a-zA-Z])', r'\\frac'),
    (r'\\%', '%'),
    (r'\\?\$|\\[()\[\]]|^\s*\*\*|\*\*\s*$', ''),
    (r'\*\*', '^'),
    (r'(?<![\\a-z])sqrt(?=\()', r'\\sqrt'),
    (r'(?<![\\a-z])pi(?![a-z])', r'\\pi '),
    (r'>=', r'\\ge '),
    (r'<=', r'\\le '),
    (r'!=', r'\\ne '),
    (r'\\langle(?![a-z])', '('),
    (r'\\rangle(?![a-z])', ')'),
    (r'\\lbrace(?![a-z])', r'\\{'),
    (r'\\rbrace(?![a-z])', r'\\}'),
    (r'(?<=\d)(?:\{,\}|,\\!|\\[!, ])\s?(?=\d{3}(?!\d))', ''),
    # but (1,234) is a pair, and 5, 100 is a list
    (r'(?<![\d,(\[])(?<!\\\{)\d{1,3}(?:,\d{3})+(?![\d,])', without_commas),
    (r'^(-?\d{1,3})\s(?=\d{3}(?:\s\d{3})*$)', r'\1'),
    (r'\\[!,;:> ]|~|\\q?quad(?![a-zA-Z])|\\hspace\{[^{}]*\}', ' '),
    (r'\^\s*(?:\\circ(?![a-z])|\{\s*\\circ\s*\})', r'\\degree '),
    (r'\\(?:text|mathrm|mbox|textbf|textit|operatorname|rm|bf|textrm|hbox)(?![a-zA-Z])\s*\{([^{}]*)\}',
     r' \\text{\1} '),
    (r',?\s*(?:\\text\{[\s,]*(?:and|or)[\s,]*\}|(?<=[\d)}\s])\s(?:and|or)\s(?=[-\d(\\\s]))\s*,?', ' , '))]
# \text{(E)}, \text{B, E}
LETTERS = re.compile(r'\\text\{\s*(\(?[-+.\d]+\)?|\(?[A-Za-z]\)?(?:\s*,\s*\(?[A-Za-z]\)?)*)\s*\}')
MIXED = re.compile(  # 1\frac{3}{4}, 1\frac34, 1 3/4
    r'(?<![\w.}^])(\d+)(?:\s*\\frac\s*(?:\{(\d+)\}|(\d))\s*(?:\{(\d+)\}|(\d))|\s+(\d+)/(\d+)(?![\w.^]))')

UNITS = (
    'degrees? radians? inch inches in ft feet foot yards? miles? cm mm km dm meters? metres? '
    'kilometers? centimeters? millimeters? grams? kg kilograms? pounds? lbs? ounces? liters? litres? '
    'gallons? hours? hrs? minutes? mins? seconds? secs? days? weeks? months? years? dollars? cents? '
    'units? percent points? people students? ways? mph square sq cubic cu per')
UNIT = '(?:' + '|'.join(UNITS.split()) + ')'  # without \text no single letters: 3m is three times m
SAYS_MORE = (
    r'or and not nor no but if maybe perhaps either plus minus times over to than more less most least '
    r'about is are was squared cubed factorial base mod zero one two three four five six seven eight '
    r'nine ten eleven twelve \w+teen (?:twen|thir|for|fif|six|seven|eigh|nine)ty hundreds? thousands? '
    r'\w*illions? dozens? half halves thirds fourths fifths tenths infinity x y z i e n pi')
NO_UNITS = re.compile(r"[^a-zA-Z\s./^{}()'-]|\b(?:" + '|'.join(SAYS_MORE.split()) + r')\b', re.I)
BEHIND = re.compile(r'(?<=[\d})a-zA-Z%])\s*(?:\\text\{([^{}]*)\}\s*(?:\^\s*(?:\d|\{\d\})\s*)?)$')


def clean(text: str) -> str:
    """'$\\\\dfrac{1}{2}$.' -> '\\\\frac{1}{2}'; '1{,}200\\\\text{ apples}' -> '1200'; '5 cm' -> '5';
    '7\\\\text{ or 8}' keeps its words."""
    s = text.strip().rstrip(MARKS)
    for symbol, made in SYMBOLS.items():
        s = s.replace(symbol, made)
    for pattern, made in SPELLINGS:
        s = pattern.sub(made, s)
    s = without_units(s)
    s = LETTERS.sub(r' \1 ', s)
    s = MIXED.sub(mixed_number, s)
    s = re.sub(r'^\(([A-Za-z])\)$', r'\1', re.sub(r'\s+', ' ', s).strip())
    return s.rstrip(MARKS).replace(ROW, '\\\\')


def without_units(s):
    """The words behind a number are its unit, unless they say more: '10\\\\text{ km}' -> '10', '10\\\\text{
    million}' stays."""
    if re.search(r'[\d}]|\\pi', s.split('\\text{')[0]):
        while (unit := BEHIND.search(s)) and not NO_UNITS.search(unit[1]):
            s = s[:unit.start()]
    if re.search(UNIT + r'[\s^\d{}.]*$', s):  # 5 cm, 12 cm^2, 20cm
        s = re.sub(r'(?<=\d)(?=[a-zA-Z]{2})', ' ', s)
        s = re.sub(rf'^(.*[\d}}%)])((?:\s*\b{UNIT}\b\.?(?:\s*\^\s*(?:\d|\{{\d\}}))?)+)$', r'\1', s)
    counted = re.fullmatch(r"(-?[\d./]+)\s*\(\s*([a-zA-Z][a-zA-Z .']*)\)", s)  # 9 (apples)
    return counted[1] if counted and not NO_UNITS.search(counted[2]) else s


def mixed_number(match):
    """1\\frac{3}{4} and 1 3/4 -> (1+\\frac{3}{4}), where the fraction is of whole numbers and below one."""
    whole, top, bottom = [part for part in match.groups() if part][:3]
    return f'({whole}+\\frac{{{top}}}{{{bottom}}})' if int(top) < int(bottom) else match[0]


def words(s):
    """(['june', '20'], True) of '\\text{June 20}': words and numbers alone, and whether they are said to be
    words (by \\text, a capital, four letters) and no product; (None, False) of anything else. Single letters
    keep their case."""
    if not re.fullmatch(r'(?:\\text\{[^{}\\]*\}|[a-zA-Z\d\s,.:])+', s):
        return None, False
    said = re.search(r'\\text|[A-Z][a-z]{2}|^\D*[a-zA-Z]{4}\D*$|^no$', s)
    runs = re.findall(r'[a-zA-Z]+|\d+', s.replace('\\text', ' '))
    return [run.lower() if len(run) > 1 else run for run in runs], bool(said)


# --------------------------------------------------------------------------------------------------
# expressions: LaTeX -> number

TOKEN = re.compile(
    r"\s*(\\text\{[^{}]*\}|\d+(?:\.\d*)?|\.\d+|\\[a-zA-Z]+|\\.|[a-zA-Z]|[-+*/^_!|()\[\]{}=<>:,;&%'])")
CLOSING = {'(': ')', '[': ']', '{': '}'}
GREEK = (
    'alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma '
    'tau phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega infty ell pi').split()
CONSTANTS = {'pi': complex(math.pi), 'i': 1j, 'e': complex(math.e)}
TRIG = {
    'sin': cmath.sin, 'cos': cmath.cos, 'tan': cmath.tan,
    'csc': lambda z: 1 / cmath.sin(z), 'sec': lambda z: 1 / cmath.cos(z), 'cot': lambda z: 1 / cmath.tan(z)}
FUNCTIONS = {
    **TRIG, 'arcsin': cmath.asin, 'arccos': cmath.acos, 'arctan': cmath.atan, 'sinh': cmath.sinh,
    'cosh': cmath.cosh, 'tanh': cmath.tanh, 'ln': cmath.log, 'log': cmath.log10, 'exp': cmath.exp}
# commands that make a name of what they hold
NAMED = 'overline vec hat bar mathbb mathcal overrightarrow'.split()
STARTERS = {
    'frac', 'sqrt', 'binom', 'dbinom', 'tbinom', 'lfloor', 'lceil', 'emptyset', 'varnothing',
    *GREEK, *FUNCTIONS, *NAMED}
UNKNOWN = re.compile(r'(?<![\\a-zA-Z])(?!(?:e|i|pi)(?![a-zA-Z]))[a-zA-Z]')
# has branches: variables are taken positive
ROOTED = re.compile(r'\\(?:sqrt|ln|log)|\^(?!\s*(?:\d+(?!\.)|\{\s*-?\d+\s*\}))')


class Unreadable(ValueError):
    """Not an expression that this file reads; the answers are compared token by token."""


def tokens_of(s):
    """'2\\\\pi r' -> ['2', '\\\\pi', 'r']; Unreadable at a sign that is no mathematics."""
    found, at = [], 0
    while at < len(s.rstrip()):
        token = TOKEN.match(s, at)
        if not token:
            raise Unreadable(s[at:at + 9])
        found.append(token[1])
        at = token.end()
    return found


def bounded(x):
    """The number itself; Unreadable where it is too large to go on with."""
    if isinstance(x, Fraction):
        if max(x.numerator.bit_length(), x.denominator.bit_length()) > MAX_BITS:
            raise Unreadable('a number too large')
    elif not cmath.isfinite(x):
        raise Unreadable('not finite')
    return x


def add(a, b):
    """a + b; what is left of a cancellation, below 1e-13 of what was added, is 0."""
    total = a + b
    if isinstance(total, complex) and abs(total) <= 1e-13 * abs(a):
        return Fraction(0)
    return bounded(total)


def power(a, b):
    """a ** b, exactly where both are rational and the root is; else complex."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        bits = max(a.numerator.bit_length(), a.denominator.bit_length())
        if b.denominator == 1:
            if abs(b) * bits > MAX_BITS:
                raise Unreadable('a power too large')
            return a ** int(b)
        if a >= 0 and b.denominator <= 12 and bits < 900:
            top, bottom = (round(float(x) ** (1 / b.denominator)) for x in (a.numerator, a.denominator))
            root = Fraction(top, bottom)
            if root ** b.denominator == a:
                return power(root, Fraction(b.numerator))
    return bounded(complex(a) ** complex(b))


def small_whole(x):
    """A whole number up to 2,100, for factorials and binomials."""
    if not isinstance(x, Fraction) or x.denominator != 1 or not 0 <= x <= 2100:
        raise Unreadable('a small whole number is wanted')
    return int(x)


class Reader:
    """Computes an expression while it reads it: recursive descent over LaTeX tokens, at one point of the
    variables. Numbers are Fractions as long as they are rational, else complex. sign is what \\pm stands
    for."""

    def __init__(self, tokens, point, sign):
        self.tokens, self.point = tokens, point
        self.signs = {'+': 1, '-': -1, '\\pm': sign, '\\mp': -sign}
        self.at = self.depth = 0
        self.in_bars = self.in_trig = False

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else ''

    def take(self, want=''):
        token = self.peek()
        if not token or (want and token != want):
            raise Unreadable(f'{want or "more"} expected, got {token!r}')
        self.at += 1
        return token

    def sum(self):
        total = self.product()
        while self.peek() in self.signs:
            sign = self.signs[self.take()]
            total = add(total, sign * self.product())
        return total

    def product(self):
        value = self.signed()
        while token := self.peek():
            if token in ('*', '\\cdot', '\\times'):
                self.take()
                value = value * self.signed()
            elif token in ('/', '\\div'):
                self.take()
                value = value / self.signed()
            elif self.starts(token):
                value = value * self.power()
            else:
                break
            bounded(value)
        return value

    def starts(self, token):
        """Does it begin a factor, so that it is multiplied by what stands before it? Two numbers side by side
        are no product."""
        if token[0].isdigit() and self.tokens[self.at - 1][-1].isdigit():
            raise Unreadable('two numbers side by side')
        if token == '|':
            return not self.in_bars
        if token[0] == '\\':
            return token[1:] in STARTERS or token.startswith('\\text{')
        return token[0].isalnum() or token[0] == '.' or token in CLOSING

    def signed(self):
        sign = 1
        while self.peek() in self.signs:
            sign *= self.signs[self.take()]
        return sign * self.power()

    def power(self):
        value = self.atom()
        while (token := self.peek()) in ('^', '!', '%', '\\degree'):
            self.take()
            if token == '^':
                value = power(value, self.argument())
            elif token == '!':
                value = bounded(Fraction(math.factorial(small_whole(value))))
            elif token == '%':
                value = value / 100
            elif self.in_trig:
                value = value * complex(math.pi / 180)
        return value

    def argument(self):
        """What stands behind ^: {...} or a token. 2^10 is 2^1 0 in LaTeX; people mean 2^{10}."""
        sign = self.take() if self.peek() == '-' else ''
        return -self.atom() if sign else self.atom()

    def digit(self):
        """The argument of \\frac and \\sqrt: without braces it is one digit, and the rest stays. \\frac12 is
        1/2."""
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            self.tokens[self.at:self.at + 1] = [token[0], token[1:]]
        return self.argument()

    def atom(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable('too deep')
        value = self.atom_of(self.take())
        self.depth -= 1
        return value

    def atom_of(self, token):
        if token[0].isdigit() or token[0] == '.':
            return self.number(token)
        if token in CLOSING:
            return self.between(CLOSING[token], in_bars=False)
        if token == '|' and not self.in_bars:
            inside = self.between('|', in_bars=True)
            return abs(inside) if isinstance(inside, Fraction) else complex(abs(inside))
        if token.isalpha():
            return self.variable(token + self.subscript())
        if token.startswith('\\text{'):
            return self.variable('text ' + re.sub(r'[^a-z0-9]', '', token[5:].lower()))
        if token[0] == '\\':
            return self.command(token[1:])
        raise Unreadable(token)

    def between(self, closing, in_bars):
        before, self.in_bars = self.in_bars, in_bars
        value = self.sum()
        self.in_bars = before
        self.take(closing)
        return value

    def variable(self, name):
        """pi, i, e; else a fraction that depends on the name and the point alone; each is negative at every
        other late point."""
        if name in CONSTANTS:
            return CONSTANTS[name]
        number, positive = self.point
        draw = random.Random(f'{number} {name}').randint
        x = Fraction(draw(3, 99), draw(11, 41))
        return -x if not positive and (number + ord(name[-1])) % 2 else x

    def subscript(self):
        if self.peek() != '_':
            return ''
        self.take()
        return '_' + ''.join(self.raw())

    def raw(self):
        """The tokens of one {...}, or the next token."""
        if self.peek() != '{':
            return [self.take()]
        start, depth = self.at, 0
        while True:
            depth += {'{': 1, '}': -1}.get(self.take(), 0)
            if not depth:
                return self.tokens[start + 1:self.at - 1]

    def number(self, token):
        if self.peek() == '_':  # 4210_5: digits and base, not the number that they name
            return self.variable(token + self.subscript())
        if len(token) > 400:
            raise Unreadable('a number too long')
        value = Fraction(token.rstrip('.'))
        if self.peek() == '\\overline' and '.' in token:  # 0.1\overline{6}
            self.take()
            digits = ''.join(self.raw())
            if not digits.isdigit() or len(digits) > 40:
                raise Unreadable(digits)
            value += Fraction(int(digits), 10 ** len(digits) - 1) / 10 ** len(token.split('.')[1])
        return value

    def command(self, name):
        if name == 'frac':
            top = self.digit()
            return bounded(top / self.digit())
        if name == 'sqrt':
            index = Fraction(2)
            if self.peek() == '[':
                index = self.atom()
            return power(self.digit(), 1 / index)
        if name in ('binom', 'dbinom', 'tbinom'):
            top = small_whole(self.digit())
            return Fraction(math.comb(top, small_whole(self.digit())))
        if name in ('lfloor', 'lceil'):
            value = self.between('\\r' + name[1:], in_bars=False)
            cut = math.floor if name == 'lfloor' else math.ceil
            return Fraction(cut(value if isinstance(value, Fraction) else value.real))
        if name in ('emptyset', 'varnothing'):
            return self.variable('emptyset')
        if name in FUNCTIONS:
            return self.function(name)
        if name in NAMED:
            return self.variable(name + ''.join(self.raw()))
        if name in GREEK:
            return self.variable(name + self.subscript())
        raise Unreadable(name)

    def function(self, name):
        """\\sin 2x, \\sin^2 x, \\tan^{-1} x, \\log_2 8"""
        base = exponent = None
        if name == 'log' and self.peek() == '_':
            self.take()
            base = self.digit()
        if self.peek() == '^':
            self.take()
            exponent = self.argument()
        if exponent == -1 and 'arc' + name in FUNCTIONS:
            name, exponent = 'arc' + name, None
        before, self.in_trig = self.in_trig, name in TRIG
        x = complex(self.atom() if self.peek() == '(' else self.operand())
        self.in_trig = before
        value = cmath.log(x) / cmath.log(complex(base)) if base else FUNCTIONS[name](x)
        if name in TRIG and abs(value) <= 1e-15 * abs(x):
            value = Fraction(0)  # \sin\pi
        return bounded(value) if exponent is None else power(value, exponent)

    def operand(self):
        """The argument of a function without brackets: it ends at + - and at the next function."""
        sign = -1 if self.peek() == '-' and self.take() else 1
        value = self.power()
        while (token := self.peek()) and token != '(' and token[1:] not in FUNCTIONS and self.starts(token):
            value = value * self.power()
        if self.peek() == '/':
            self.take()
            value = value / self.power()
        return sign * value


@functools.lru_cache(maxsize=1024)
def value_at(text, point, sign):
    """The number of an expression at a test point; None where it has none there, or is not read."""
    try:
        reader = Reader(tokens_of(text), point, sign)
        value = reader.sum()
    except (ValueError, ArithmeticError, RecursionError):
        return None
    return None if reader.peek() else value


def close(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    return abs(a - b) <= 1e-12 * max(abs(a), abs(b))


def same_function(x, y, ratio=False):
    """Do two expressions, (text, sign), agree at five points? With ratio=True, up to one constant factor
    (equations). A point where either is not defined says nothing, and 0 h(0) = 0 g(0) does not either; a pair
    that fewer than two points tell is not equal."""
    both = x[0] + y[0]
    factors = []
    for number in range(5):
        point = number, number < 2 or bool(ROOTED.search(both) and not ratio)
        a, b = (value_at(text, point, sign) for text, sign in (x, y))
        if a is None or b is None or (a == b == 0 and UNKNOWN.search(both)):
            continue
        if ratio and (a == 0 or b == 0) or not ratio and not close(a, b):
            return False
        factors.append(a / b if ratio else Fraction(1))
    return len(factors) > 1 and all(close(factor, factors[0]) for factor in factors)


# --------------------------------------------------------------------------------------------------
# structure: lists, sets, tuples, intervals, unions, matrices, relations

RELATIONS = {
    '=': '=', '<': '<', '\\le': '<=', '\\leq': '<=', '\\leqslant': '<=', '\\ne': '!=', '\\neq': '!=',
    '>': '>', '\\ge': '>=', '\\geq': '>=', '\\geqslant': '>='}
UNORDERED = 'list', 'set', 'union', 'named'
TURNED = {'>': '<', '>=': '<=', '=': '='}
MATRIX = re.compile(
    r'[(\[]?\s*\\begin\s*\{([pbvBV]?matrix|array)\}\s*(?:\{[lcr|]*\})?(.*?)\\end\s*\{\1\}\s*[)\]]?', re.S)
VARIABLE = re.compile(r'[a-zA-Z]|\\theta')
NAME = re.compile(  # x, x_1, f(x), \theta, \text{area}, ABC, \angle ABC, (x, y)
    r"[a-zA-Z](?:_\{?\w+\}?)?'?(?:\s*\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))?|\\[a-zA-Z]+|\\text\{[^{}]*\}|"
    r'[A-Z]{1,3}|\\angle\s*[A-Z]+|\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])+\s*\)')


def split(s, *marks):
    """s cut at marks outside all brackets -> (parts, the marks between them). 'a, (b, c)' at ',' -> (['a',
    '(b, c)'], [','])."""
    parts, found = [''], []
    depth = 0
    for piece in re.findall(r'\\[a-zA-Z]+|\\.|.', s, re.S):
        opens, closes = piece in ('(', '[', '{', '\\{'), piece in (')', ']', '}', '\\}')
        depth += opens - closes
        if depth == 0 and piece in marks:
            found.append(piece)
            parts.append('')
        else:
            parts[-1] += piece
    return [p.strip() for p in parts], found


def wrapped(s):
    """(opening, inside, closing) where one pair of brackets of any kind spans all of s. '[1, 2)' -> ('[', '1,
    2', ')'); else None."""
    found = re.fullmatch(r'(\\\{)(.*)(\\\})|([(\[])(.*)([)\]])', s, re.S)
    if not found:
        return None
    left, inside, right = [part for part in found.groups() if part is not None]
    depth = 0
    for c in inside:
        depth += (c in '([{') - (c in ')]}')
        if depth < 0:
            return None
    return (left, inside, right) if depth == 0 else None


def read(s, depth=0):
    """A cleaned answer -> ('expr', text, sign of its \\pm) | ('rel', op, left, right, named) | (kind, items),
    where kind is 'list', 'set', 'union', 'named', 'matrix', 'row', ':', or the brackets '()', '[)' ... of a
    tuple or an interval."""
    if depth > 6:
        raise Unreadable('too deep')

    def again(parts):
        if len(parts) > MAX_ITEMS:
            raise Unreadable('too many items')
        return [read(part, depth + 1) for part in parts]

    matrix = MATRIX.fullmatch(s)
    if matrix and '\\begin' not in matrix[2]:
        rows = [row.split('&') for row in matrix[2].split('\\\\') if row.strip()]
        return 'matrix', [('row', again([cell.strip() for cell in row])) for row in rows]
    parts, found = split(s, '\\cup')
    if found:
        return 'union', again(parts)
    parts, found = split(s, ',', ';')
    if found and all(parts):
        return listed(again(parts))
    outer = wrapped(s)
    if outer:
        left, inside, right = outer
        parts, found = split(inside, ',', ';')
        if left == '\\{':
            return 'set', flat(again(parts)) if inside.strip() else []
        if found:
            return left + right, again(parts)
    if re.fullmatch(r'\\mathbb\s*\{?\s*R\s*\}?|\\R', s):
        return read('(-\\infty,\\infty)', depth + 1)
    parts, found = split(s, '\\in')
    if len(found) == 1 and VARIABLE.fullmatch(parts[0]):
        return read(parts[1], depth + 1)
    parts, found = split(s, *RELATIONS)
    if found:
        return read_relation(parts, [RELATIONS[mark] for mark in found], depth)
    parts, found = split(s, ':')
    if found and all(parts):
        return ':', again(parts)
    return 'expr', s, 0


def listed(items):
    """A bare list. x = 1, x = 2 and x = 1, 2 are their right sides; x = 1, y = 2 keeps the names."""
    if items[0][0] == 'rel' and items[0][4]:
        rights = [item[3] if item[0] == 'rel' else item for item in items]
        names = {item[2][1] for item in items if item[0] == 'rel' and item[4]}
        if len(names) == len(items):
            return 'named', [('=', [item[2], item[3]]) for item in items]
        items = rights
    return 'list', flat(items)


def read_relation(parts, ops, depth):
    """'y = 2x' -> ('rel', '=', left, right, True); 'x > 2', '1 < x \\le 3' and '3 \\ge x > 1' -> the
    interval."""
    if len(parts) > 2 and ops[-1] == '=':
        parts, ops = parts[-2:], ops[-1:]  # a = b = 5
    named = ops == ['='] and [bool(NAME.fullmatch(part)) for part in parts]
    if all(op[0] == '>' for op in ops) or named == [False, True]:
        parts, ops = parts[::-1], [TURNED[op] for op in ops[::-1]]
    variables = [bool(VARIABLE.fullmatch(part)) for part in parts]
    if all(op[0] == '<' for op in ops) and sum(variables) == 1:
        low, high = parts[0], parts[-1]
        if variables[0]:
            low, ops = '-\\infty', ['<', *ops]
        elif variables[-1]:
            high, ops = '\\infty', [*ops, '<']
        brackets = '(['[ops[0] == '<='] + ')]'[ops[-1] == '<=']
        return brackets, [('expr', low, 0), ('expr', high, 0)]
    if len(parts) != 2:
        raise Unreadable('a chain of relations')
    left, right = (read(part, depth + 1) for part in parts)
    return 'rel', ops[0], left, right, bool(named and any(named))


def plus_minus(item):
    """An expression with \\pm is the list of its two values."""
    if item[0] == 'expr' and not item[2] and re.search(r'\\(?:pm|mp)(?![a-z])', item[1]):
        return 'list', [('expr', item[1], 1), ('expr', item[1], -1)]
    return item


def flat(items):
    """Lists and sets within a list are one; a \\pm makes two items."""
    out = []
    for item in map(plus_minus, items):
        out += item[1] if item[0] in ('list', 'set') else [item]
    return out


def in_order(x, y):
    return len(x) == len(y) and all(map(same, x, y))


def in_any_order(x, y):
    left = list(y)
    for item in x:
        hit = next((i for i, other in enumerate(left) if same(item, other)), None)
        if hit is None:
            return False
        left.pop(hit)
    return not left


def same(x, y):
    """Are two readings equal? Symmetric."""
    if 'rel' in (x[0], y[0]):
        return same_relation(x, y)
    if x == y and x[0] == 'expr':
        return True
    x, y = sorted(map(plus_minus, (x, y)), key=lambda item: item[0])
    kinds = x[0], y[0]
    if kinds == ('expr', 'expr'):
        return same_expressions(x[1:], y[1:])
    if 'expr' in kinds:
        return kinds == ('expr', 'set') and len(y[1]) == 1 and same(x, y[1][0])
    if kinds == ('list', 'set') or x[0] == y[0] in UNORDERED:
        return in_any_order(x[1], y[1])
    if kinds in (('()', 'named'), ('list', 'named')):  # 1, 2 or (1, 2) for x = 1, y = 2
        return in_order(x[1], [right for _, (_, right) in y[1]])
    # 2, -1 for (2, -1): the same order is asked
    return (x[0] == y[0] or kinds == ('()', 'list')) and in_order(x[1], y[1])


def same_relation(x, y):
    if x[0] != y[0]:  # x = 5 for 5; 3 * 4 = 12 for 12; but 6 = 5 is not 5
        relation, other = (x, y) if x[0] == 'rel' else (y, x)
        _, op, left, right, named = relation
        return op == '=' and same(right, other) and (named or same(left, right))
    if x[1] != y[1]:
        return False
    if same(x[2], y[2]) and same(x[3], y[3]):
        return True
    if x[1] not in ('=', '!=') or any(side[0] != 'expr' for side in (*x[2:4], *y[2:4])):
        return False
    return same_function(*((f'({left[1]})-({right[1]})', 1) for _, _, left, right, _ in (x, y)), ratio=True)


def same_expressions(x, y):
    """Two expressions, (text, sign): as words, token by token, or computed."""
    (x_words, x_said), (y_words, y_said) = words(x[0]), words(y[0])
    if x_words and y_words and (x_said or y_said):
        return x_words == y_words
    if x[1] == y[1] and same_tokens(x[0], y[0]):
        return True
    if any(re.fullmatch(r'[a-zA-Z\s{}]*[A-Z][a-zA-Z\s{}]*', text) and len(text) > 1 for text, _ in (x, y)):
        return False  # ABC is a name, no product
    percent = x[0].endswith('%'), y[0].endswith('%')
    if any(percent) and not all(percent):  # 10 % is 0.1, and also what people mean by 10
        bare = [(text.removesuffix('%'), sign) for text, sign in (x, y)]
        return same_function(*bare) or same_function(x, y)
    return same_function(x, y)


def same_tokens(a, b):
    try:
        return tokens_of(a) == tokens_of(b)
    except Unreadable:
        return a.split() == b.split()


# --------------------------------------------------------------------------------------------------
# the reward


def extract_answer(text: str) -> str | None:
    """'so \\\\boxed{\\\\frac{3}{4}}.' -> '\\\\frac{3}{4}'; 'The answer is 5. Done.' -> '5'; '7' -> None."""
    found = marked(text)
    return (named(text) if found is None else found) or None


def equal(answer: str, reference: str) -> bool:
    """Is one answer equal to another? Symmetric, never raises, fast on any input.
    equal('0.75', '\\\\frac34') -> True; equal('(1,2)', '[1,2]') -> False."""
    if max(len(answer), len(reference)) > MAX_LEN:
        return answer.split() == reference.split()
    a, b = clean(answer), clean(reference)
    if not a or not b:
        return False
    try:
        return same(read(a), read(b))
    except (Unreadable, RecursionError):
        return same_tokens(a, b)


def reference_of(row: dict) -> str:
    """The reference answer of a row: row['answer'], or verl's row['reward_model']['ground_truth']; a \\boxed
    or #### inside is opened. ValueError without one."""
    verl = row.get('reward_model')
    given = row.get('answer', verl.get('ground_truth') if isinstance(verl, dict) else None)
    if given is None or not str(given).strip():
        raise ValueError(
            f'data/math/reward.py: row without "answer", it has {sorted(row)}: '
            'give "answer": "\\\\frac{3}{4}"')
    return marked(str(given)) or str(given)


def reward(prompt: str, completion: str, row: dict) -> float:
    """1.0 where the completion's answer equals the row's, else 0.0. reward('', 'so \\\\boxed{0.5}',
    {'answer': '\\\\frac12'}) -> 1.0."""
    got = extract_answer(completion)
    return float(got is not None and equal(got, reference_of(row)))
