"""Reward of competition mathematics: 1 when the answer equals the reference as mathematics, else 0. One plain file, standard library only.

    python grpo.py --reward=data/math/reward.py ...          a row's "answer": '\\frac{3}{4}', '\\boxed{34}', a whole solution with its \\boxed, '#### 72'

What counts as the answer of a text, in order; training and evaluation, base and trained model are read by the same eyes:
    1. the last \\boxed{...} (braces matched)      2. what follows the last '####', to the end of its line
    3. what follows the last 'answer is' / 'answer:', to the end of its sentence. Nothing else: a text without these has no answer.
When are two answers equal? Typography goes first (\\left, \\!, \\dfrac, $, thousands 1,200 = 1{,}200 = 1,\\!200, text and units behind a number). Then
    structure    (1,2) is not [1,2] nor (2,1); sets and bare lists 1, 2 have no order ('and', 'or' are commas; \\pm makes two); unions; matrices; ratios
    relations    x = 5 is 5; y = 2x is 2x - y = 0 (proportional); x > 2 is (2, \\infty)
    expressions  parsed into a tree and computed: rational numbers exactly (0.333 is not 1/3), others and variables at fixed points to 1e-11:
                 \\frac{1}{\\sqrt2} = \\frac{\\sqrt{2}}{2}; (x+1)^2 = x^2+2x+1; \\cos 60^\\circ = 1/2; 1\\frac34 = 7/4; 0.\\overline{3} = 1/3; 10\\% = 0.1 = 10
    words        letter for letter, no case: \\text{(E)} is E; Friday is \\text{friday}
What it cannot see: units are not compared; a question echoed back is right where equal is all that is asked ("factor x^2-1"); variables are taken
positive under roots and logarithms. Bounds keep it fast on anything a model may write: {MAX_LEN} characters, depth {MAX_DEPTH}, numbers of 20,000 bits; beyond
them, answers are compared as text. Nothing is ever evaluated as Python.
"""
import cmath
import math
import re
from fractions import Fraction

MAX_LEN, MAX_DEPTH, MAX_BITS, MAX_ITEMS = 600, 40, 20000, 40
__doc__ = __doc__.replace('{MAX_LEN}', str(MAX_LEN)).replace('{MAX_DEPTH}', str(MAX_DEPTH))

UNITS = ('degrees? radians? inch inches in ft feet foot yards? miles? cm mm km dm meters? metres? kilometers? centimeters? millimeters? grams? kg '
         'kilograms? pounds? lbs? ounces? liters? litres? gallons? hours? hrs? minutes? mins? seconds? secs? days? weeks? months? years? dollars? '
         'cents? units? percent points? people students? ways? mph square sq cubic cu per').split()  # no single letters: 3m is three times m
_unit = '(?:' + '|'.join(UNITS) + ')'
_open, _close = '([{', ')]}'
GREEK = ('alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau phi varphi chi psi omega '
         'Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega infty ell').split()
FUNCTIONS = {'sin': cmath.sin, 'cos': cmath.cos, 'tan': cmath.tan, 'sec': lambda z: 1 / cmath.cos(z), 'csc': lambda z: 1 / cmath.sin(z),
             'cot': lambda z: 1 / cmath.tan(z), 'arcsin': cmath.asin, 'arccos': cmath.acos, 'arctan': cmath.atan, 'sinh': cmath.sinh,
             'cosh': cmath.cosh, 'tanh': cmath.tanh, 'ln': cmath.log, 'log': lambda z: cmath.log10(z), 'exp': cmath.exp}
TRIG = ('sin', 'cos', 'tan', 'sec', 'csc', 'cot')
RELATIONS = {'=': '=', '<': '<', '>': '>', '\\le': '<=', '\\leq': '<=', '\\leqslant': '<=', '\\ge': '>=', '\\geq': '>=', '\\geqslant': '>=',
             '\\neq': '!=', '\\ne': '!='}
NO_FACTOR = 'cup cap in le ge leq geq ne neq rfloor rceil circ to end times cdot div pm mp'.split()  # commands that end a product
FLIPPED = {'>': '<', '>=': '<='}


class Unreadable(ValueError):
    """Not an expression that this file reads; the answers are compared as text."""


# ---------------------------------------------------------------------------------------------------------------------
# the answer of a text


def boxed(text):
    """The inside of the last \\boxed{...} or \\fbox{...}, braces matched; unclosed: what there is; \\boxed 7 too; None without one."""
    start = max(text.rfind('\\boxed'), text.rfind('\\fbox'))
    if start < 0:
        return None
    rest = text[start:].split('box' if text.startswith('\\fbox', start) else 'boxed', 1)[1].lstrip()
    if not rest.startswith('{'):
        return re.match(r'[^\s$,.]*', rest)[0]
    depth = 0
    for i, c in enumerate(rest):
        escaped = i and rest[i - 1] == '\\'
        depth += 0 if escaped else {'{': 1, '}': -1}.get(c, 0)
        if depth == 0:
            return rest[1:i]
    return rest[1:]


def extract_answer(text):
    """The answer of a text (str), stripped, or None. 'so \\\\boxed{\\\\frac{3}{4}}.' -> '\\\\frac{3}{4}'; 'The answer is 5. Done.' -> '5'; '7' -> None."""
    found = boxed(text)
    if found is None and '####' in text:
        found = text.rsplit('####', 1)[1].strip().split('\n')[0]
    if found is None:
        at = text.lower().rfind('answer')
        named = re.match(r'answer\s{0,3}(?:is|:)\s{0,3}:?([^\n]{1,' + str(MAX_LEN) + '})', text[at:at + MAX_LEN + 40], re.I) if at >= 0 else None
        found = re.split(r'[.!?](?:\s|$)', named[1])[0] if named else None
    return found.strip() or None if found is not None else None


# ---------------------------------------------------------------------------------------------------------------------
# typography


def clean(text):
    """One spelling for what looks the same. '$\\\\dfrac{1}{2}$.' -> '\\\\frac{1}{2}'; '1{,}200\\\\text{ apples}' -> '1200'; '5 cm' -> '5'."""
    s = text.strip().replace('\u2212', '-').replace('\u00a0', ' ').replace('\u00b0', '^\\circ ').replace('\u03c0', '\\pi ').replace('\u221e', '\\infty ')
    s = s.replace('\u221a', '\\sqrt ').replace('\u00d7', '\\times ').replace('\u222a', '\\cup ').replace('\u00b7', '\\cdot ')
    s = s.replace('\\\\', '\ue001')  # the row ends of a matrix
    s = re.sub(r'\\(?:left|right|bigl?|bigr|Bigl?|Bigr|displaystyle|textstyle|mathstrut|limits)(?![a-zA-Z])\.?', '', s)
    s = re.sub(r'\\[dtc]frac(?![a-zA-Z])', r'\\frac', s)
    s = re.sub(r'\\[()\[\]]', '', s.replace('\\%', '%').replace('\\$', '').replace('$', '').replace('**', ''))
    s = re.sub(r'(?<=\d)(?:(?:\{,\}|,\\[!,; ]|\\[!,; ])\s?|,)(?=\d{3}(?!\d))', '\ue000', s)  # between digits, before three of them; '5, 100' is a list
    s = re.sub(r'\\[!,;:> ]|~|\\q?quad(?![a-zA-Z])|\\hspace\{[^{}]*\}', ' ', s)
    s = _thousands(s)
    s = re.sub(r'\\(?:text|mathrm|mbox|textbf|mathbf|textit|operatorname|rm|bf|textrm|hbox)(?![a-zA-Z])\s*\{([^{}]*)\}', r' \\text{\1} ', s)
    s = re.sub(r'\\text\{\s*(?:and|or)\s*\}|(?<=[\d)}\s])\s(?:and|or)\s(?=[-\d(\\\s])', ' , ', s)
    s = re.sub(r'\\text\{\s*\(?([-+.\d]+|[A-Za-z])\)?\s*\}', r' \1 ', s)
    s = re.sub(r'(?<=[\d})a-zA-Z%])\s*(?:\\text\{[^{}]*\}\s*(?:\^\s*(?:\d|\{\d\})\s*)?)+$', '', s) if re.search(r'[\d}]|\\pi', re.split(r'\\text\{', s)[0]) else s
    if re.search(_unit + r'[\s^\d{}.]*$', s):  # 5 cm, 12 cm^2, 20cm
        s = re.sub(r'(?<=\d)(?=[a-zA-Z]{2})', ' ', s)
        s = re.sub(rf'^(.*[\d}}%)])((?:\s*\b{_unit}\b\.?(?:\s*\^\s*(?:\d|\{{\d\}}))?)+)$', r'\1', s)
    s = re.sub(r'^(-?[\d./]+)\s*\(\s*[a-zA-Z][a-zA-Z .\']*\)$', r'\1', s)  # 9 (apples)
    s = re.sub(r'^\(([A-Za-z])\)$', r'\1', re.sub(r'\s+', ' ', s).strip())
    return s.rstrip('. ').replace('\ue001', '\\\\')


def _thousands(s):
    """\ue000 marks a comma that may group thousands. It does in a bare number and outside brackets; in (1,234) and 10,234,5 it separates."""
    if '\ue000' not in s:
        return s
    depth, out = 0, []
    for i, c in enumerate(s):
        depth += (c in '([') - (c in ')]')
        if c == '\ue000':
            run = re.search(r'[\d\ue000.]*$', s[:i])[0] + re.match(r'[\d\ue000.]*', s[i:])[0]
            c = '' if depth <= 0 and re.fullmatch(r'\d{1,3}(?:\ue000\d{3})+(?:\.\d+)?', run) else ','
        out.append(c)
    return ''.join(out)


def letters(s):
    """What is left for a comparison as text: no spaces, no \\text, no case. '\\\\text{Friday }' -> 'friday'"""
    return re.sub(r'\\text|[\s{}]|(?<=\d)\.0*$|^\\boxed', '', s).lower()


# ---------------------------------------------------------------------------------------------------------------------
# expressions: LaTeX -> tree -> number

_token = re.compile(r'\s*(\d+(?:\.\d*)?|\.\d+|\\[a-zA-Z]+|\\.|[a-zA-Z]|[-+*/^_!|()\[\]{}=<>:,;&%\'])')


class Parser:
    """Recursive descent over LaTeX tokens. Trees are tuples: ('num', Fraction), ('var', name), ('+', a, b), ('fn', name, a), ('pm', a, b) ..."""

    def __init__(self, text):
        if len(text) > MAX_LEN:
            raise Unreadable('too long')
        self.tokens, at = [], 0
        text = re.sub(r'\\text\{([^{}]*)\}', lambda m: ' \\' + (re.sub(r'[^a-zA-Z]', '', m[1]) + 'Word') + ' ', text.strip())
        while at < len(text):
            m = _token.match(text, at)
            if not m:
                raise Unreadable(text[at:at + 9])
            self.tokens.append(m[1])
            at = m.end()
            at += len(text[at:]) - len(text[at:].lstrip())
        self.at, self.depth = 0, 0

    def peek(self):
        return self.tokens[self.at] if self.at < len(self.tokens) else ''

    def take(self, want=None):
        t = self.peek()
        if not t or (want and t != want):
            raise Unreadable(f'{want or "more"} expected, got {t!r}')
        self.at += 1
        return t

    def whole(self):
        tree = self.sum()
        if self.peek():
            raise Unreadable(f'{self.peek()!r} is left')
        return tree

    def sum(self):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable('too deep')
        tree = self.product()
        while self.peek() in ('+', '-', '\\pm', '\\mp'):
            op = self.take()
            tree = ({'\\pm': 'pm', '\\mp': 'mp'}.get(op, op), tree, self.product())
        self.depth -= 1
        return tree

    def product(self):
        tree = self.signed()
        while True:
            t = self.peek()
            if t in ('*', '\\cdot', '\\times'):
                self.take()
                tree = ('*', tree, self.signed())
            elif t in ('/', '\\div'):
                self.take()
                tree = ('/', tree, self.signed())
            elif t and self.starts(t):
                tree = ('*', tree, self.power())
            else:
                return tree

    def starts(self, t):
        """Does token t begin a factor, so that it is multiplied by what stands before it?"""
        return t[0].isalnum() or t[0] == '.' or t in '({[' or (t == '|' and not self.bars) or t in ('\\lfloor', '\\lceil', '\\{') or \
            (t[0] == '\\' and len(t) > 1 and t[1].isalpha() and t[1:] not in NO_FACTOR)

    bars = 0

    def signed(self):
        sign, n = 1, 0
        while self.peek() in ('+', '-', '\\pm', '\\mp'):
            op, n = self.take(), n + 1
            if n > 8:
                raise Unreadable('signs')
            if op in ('\\pm', '\\mp'):
                return (op[1:], ('num', Fraction(0)), self.signed())
            sign = -sign if op == '-' else sign
        tree = self.power()
        return tree if sign > 0 else ('neg', tree)

    def power(self):
        tree = self.atom()
        while True:
            t = self.peek()
            if t == '^':
                self.take()
                if self.tokens[self.at:self.at + 1] == ['\\circ'] or self.tokens[self.at:self.at + 3] == ['{', '\\circ', '}']:
                    self.at += 1 if self.peek() == '\\circ' else 3
                    tree = ('deg', tree)
                else:
                    tree = ('^', tree, self.argument())
            elif t == '!':
                self.take()
                tree = ('!', tree)
            elif t == '%':
                self.take()
                tree = ('%', tree)
            elif t == '\\degree':
                self.take()
                tree = ('deg', tree)
            else:
                return tree

    def argument(self):
        """{...}, or the one token behind \\frac, \\sqrt, ^: \\frac12 is 1/2, 2^10 is 2^1 0 in LaTeX; people mean 2^{10}."""
        t = self.peek()
        if t == '{':
            return self.group('{', '}')
        if t == '-':
            self.take()
            return ('neg', self.argument())
        return self.atom()

    def digit(self):
        """The argument of \\frac and \\sqrt: without braces it is one digit, and the rest stays."""
        t = self.peek()
        if t.isdigit() and len(t) > 1:
            self.tokens[self.at:self.at + 1] = [t[0], t[1:]]
        return self.argument()

    def group(self, left, right):
        self.take(left)
        bars, self.bars = self.bars, 0
        tree = self.sum()
        self.bars = bars
        self.take(right)
        return tree

    def atom(self):
        t = self.take()
        if t[0].isdigit() or (t[0] == '.' and len(t) > 1):
            return self.number(t)
        if t in '({[' and t:
            self.at -= 1
            return self.group(t, _close[_open.index(t)])
        if t == '|' and not self.bars:
            self.bars += 1
            tree = self.sum()
            self.bars -= 1
            self.take('|')
            return ('fn', 'abs', tree)
        if t.isalpha():
            name = t + self.subscript()
            return ('var', name)
        if t[0] == '\\':
            return self.command(t[1:])
        raise Unreadable(t)

    def subscript(self):
        if self.peek() != '_':
            return ''
        self.take()
        if self.peek() != '{':
            return '_' + self.take()
        found, self.at = [], self.at + 1
        while self.peek() != '}':
            found.append(self.take())
        self.at += 1
        return '_' + ''.join(found)

    def number(self, t):
        if len(t) > 400:
            raise Unreadable('a number too long')
        whole = Fraction(t.rstrip('.'))
        if self.peek() == '_':  # 4210_5: digits in a base; its value is the digits and the base, not the number that it names
            return ('based', t, self.subscript())
        if self.peek() == '\\overline' and '.' in t:  # 0.1\overline{6}
            self.take()
            self.take('{')
            digits = self.take()
            self.take('}')
            if not digits.isdigit() or len(digits) > 40:
                raise Unreadable(digits)
            places = len(t.split('.')[1])
            return ('num', whole + Fraction(int(digits), (10 ** len(digits) - 1) * 10 ** places))
        if self.peek() == '\\frac' and '.' not in t:  # 1\frac{3}{4}: a mixed number where the fraction is of plain whole numbers
            at = self.at
            tree = self.command(self.take()[1:])
            if tree[0] == '/' and all(x[0] == 'num' and x[1].denominator == 1 for x in tree[1:]) and tree[1][1] < tree[2][1]:
                return ('num', whole + tree[1][1] / tree[2][1])
            self.at = at
        return ('num', whole)

    def command(self, name):
        if name == 'frac':
            top = self.digit()
            return ('/', top, self.digit())
        if name == 'sqrt':
            index = ('num', Fraction(2))
            if self.peek() == '[':
                index = self.group('[', ']')
            return ('root', self.digit(), index)
        if name in ('binom', 'dbinom', 'tbinom'):
            top = self.digit()
            return ('binom', top, self.digit())
        if name == 'pi' or name in GREEK:
            return ('var', name + self.subscript())
        if name in ('lfloor', 'lceil'):
            tree = self.sum()
            self.take('\\r' + name[1:])
            return ('fn', name[1:], tree)
        if name in ('emptyset', 'varnothing'):
            return ('var', 'emptyset')
        if name in FUNCTIONS:
            base = self.subscript_tree() if name == 'log' and self.peek() == '_' else None
            power = None
            if self.peek() == '^':
                self.take()
                power = self.argument()
            inner = self.group('(', ')') if self.peek() == '(' else self.chain()
            if power == ('neg', ('num', Fraction(1))) and 'arc' + name in FUNCTIONS:
                return ('fn', 'arc' + name, inner)
            tree = ('/', ('fn', 'ln', inner), ('fn', 'ln', base)) if base else ('fn', name, inner)
            return ('^', tree, power) if power else tree
        if name in ('overline', 'vec', 'hat', 'bar', 'mathbf', 'mathbb', 'mathcal', 'overrightarrow'):
            return ('var', name + ''.join(self.braced()))
        if name.endswith('Word') and len(name) > 5:
            return ('var', name.lower())
        raise Unreadable(name)

    def subscript_tree(self):
        self.take('_')
        return self.digit()

    def braced(self):
        """The raw tokens of one {...}, or the next token."""
        if self.peek() != '{':
            return [self.take()]
        found, depth = [], 0
        while True:
            t = self.take()
            depth += (t == '{') - (t == '}')
            if not depth:
                return found[1:]
            found.append(t)

    def chain(self):
        """The argument of a function without brackets: \\sin 2x, \\cos 13^\\circ, \\ln\\sqrt2; it ends at + - and at the next function."""
        sign = self.take() if self.peek() == '-' else ''
        tree = self.power()
        while (t := self.peek()) and self.starts(t) and t[1:] not in FUNCTIONS and t != '(':
            tree = ('*', tree, self.power())
        if self.peek() == '/' and tree[0] in ('num', 'var', '*'):
            self.take()
            tree = ('/', tree, self.power())
        return ('neg', tree) if sign else tree


def names_of(tree, found=None):
    """The nodes' heads and variables of a tree: {'var:x', 'root', ...}"""
    found = set() if found is None else found
    whole = tree[0] == '^' and tree[2][-1] if tree[0] == '^' and tree[2][0] in ('num', 'neg') else None  # x^2 has no branches, x^{1/2} has
    whole = whole[1] if isinstance(whole, tuple) and whole[0] == 'num' else whole
    found.add(f'var:{tree[1]}' if tree[0] == 'var' else f'fn:{tree[1]}' if tree[0] == 'fn' else
              'whole power' if isinstance(whole, Fraction) and whole.denominator == 1 else tree[0])
    for part in tree[1:]:
        if isinstance(part, tuple):
            names_of(part, found)
    return found


def _small(x):
    if isinstance(x, Fraction) and max(x.numerator.bit_length(), x.denominator.bit_length()) > MAX_BITS:
        raise Unreadable('a number too large')
    if isinstance(x, complex) and not (math.isfinite(x.real) and math.isfinite(x.imag)):
        raise Unreadable('not finite')
    return x


def _power(a, b):
    if isinstance(b, Fraction) and b.denominator == 1 and isinstance(a, Fraction):
        bits = max(a.numerator.bit_length(), a.denominator.bit_length(), 1)
        if abs(b) * bits > MAX_BITS:
            raise Unreadable('a power too large')
        return a ** int(b)
    if isinstance(b, Fraction) and isinstance(a, Fraction) and a >= 0 and b.denominator <= 12:
        root = [round(float(x) ** (1 / b.denominator)) if x.bit_length() < 900 else 0 for x in (a.numerator, a.denominator)]
        if root[0] ** b.denominator == a.numerator and root[1] ** b.denominator == a.denominator:  # an exact root
            return _power(Fraction(*root), Fraction(b.numerator))
    return complex(a) ** complex(b)


def value(tree, env, sign=1, trig=False):
    """A tree's number at env {variable: Fraction}: Fraction where all is rational, else complex. ZeroDivisionError, OverflowError, Unreadable."""
    kind, rest = tree[0], tree[1:]
    go = lambda t: value(t, env, sign, trig)
    if kind == 'num':
        return rest[0]
    if kind == 'var':
        return {'pi': complex(math.pi), 'i': 1j, 'e': complex(math.e)}.get(rest[0]) or env(rest[0])
    if kind == 'based':
        return env(f'{rest[0]}{rest[1]}')
    if kind == 'fn':
        x = value(rest[1], env, sign, rest[0] in TRIG)
        if rest[0] in ('floor', 'ceil'):
            return Fraction((math.floor if rest[0] == 'floor' else math.ceil)(x if isinstance(x, Fraction) else x.real))
        if rest[0] == 'abs':
            return abs(x) if isinstance(x, Fraction) else complex(abs(x))
        return _small(complex(FUNCTIONS[rest[0]](complex(x))))
    a = go(rest[0])
    if kind == 'neg':
        return -a
    if kind == 'deg':
        return a * complex(math.pi / 180) if trig else a
    if kind == '%':
        return a / 100
    if kind == '!':
        if not isinstance(a, Fraction) or a.denominator != 1 or not 0 <= a <= 2100:
            raise Unreadable('factorial')
        return _small(Fraction(math.factorial(int(a))))
    b = go(rest[1])
    if kind in ('pm', 'mp'):
        return a + b * (sign if kind == 'pm' else -sign)
    if kind == 'binom':
        if not all(isinstance(x, Fraction) and x.denominator == 1 and 0 <= x <= 2100 for x in (a, b)):
            raise Unreadable('binomial')
        return Fraction(math.comb(int(a), int(b)))
    if kind == 'root':
        return _power(a, 1 / b)
    if kind == '^':
        return _small(_power(a, b))
    return _small({'+': lambda: a + b, '-': lambda: a - b, '*': lambda: a * b, '/': lambda: a / b}[kind]())


def point(k, positive):
    """Variables' values at test point k: fixed fractions that depend on the name alone."""
    def env(name):
        h = 7 + k
        for c in name:
            h = (h * 1315423911 + ord(c) * 2654435761) % 2147483647
        x = Fraction(3 + h % 97, 11 + (h // 97) % 31)
        return -x if not positive and (sum(map(ord, name)) + k) % 2 else x  # each variable is negative at every other point
    return env


def close(a, b):
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = complex(a), complex(b)
    return abs(a - b) <= 1e-11 * max(1.0, abs(a), abs(b))


def equal_trees(x, y, ratio=False):
    """Are two trees the same function? At one point without variables, else at four; with ratio=True, up to one constant factor (equations).
    A point where either is not defined says nothing; a pair that no point can tell is not equal."""
    heads = names_of(x) | names_of(y)
    variables = [h for h in heads if h.startswith('var:') and h[4:] not in ('pi', 'i', 'e')] or 'based' in heads
    rooted = heads & {'root', 'fn:ln', 'fn:log', '^'}
    told, factors = 0, []
    for k in range(5 if variables else 1):
        env = point(k, positive=bool(rooted) and not ratio or k < 2)
        try:
            a, b = value(x, env), value(y, env)
        except (ZeroDivisionError, OverflowError, ValueError):
            continue
        told += 1
        if not ratio and not close(a, b):
            return False
        if ratio:
            if close(b, Fraction(0)) or close(a, Fraction(0)):
                return False
            factors.append(a / b)
    return told > (1 if variables else 0) and all(close(f, factors[0]) for f in factors)


# ---------------------------------------------------------------------------------------------------------------------
# structure: lists, sets, tuples, intervals, unions, matrices, relations


def split(s, *marks):
    """s cut at marks that stand outside all brackets. 'a, (b, c)' at ',' -> ['a', '(b, c)']. A half-open [1, 2) closes as it should."""
    parts, depth, start, i = [], 0, 0, 0
    while i < len(s):
        c = s[i]
        if c == '\\' and i + 1 < len(s) and s[i + 1] in '{}':
            depth += 1 if s[i + 1] == '{' else -1
            i += 2
            continue
        depth += (c in _open) - (c in _close)
        hit = next((m for m in marks if s.startswith(m, i) and not (m[0] == '\\' and s[i + len(m):i + len(m) + 1].isalpha())), None) if depth == 0 else None
        if hit:
            parts.append(s[start:i].strip())
            start = i = i + len(hit)
        else:
            i += 1
    return [*parts, s[start:].strip()]


def wrapped(s):
    """(opening, inside, closing) where one pair of brackets of any kind spans all of s, else None. '[1, 2)' -> ('[', '1, 2', ')')"""
    s = s.replace('\\langle', '(').replace('\\rangle', ')').replace('\\lbrace', '\\{').replace('\\rbrace', '\\}')
    if s.startswith('\\{') and s.endswith('\\}'):
        left, inside, right = '{', s[2:-2], '}'
    elif s and s[0] in '([' and s[-1] in ')]':
        left, inside, right = s[0], s[1:-1], s[-1]
    else:
        return None
    depth = 0
    for c in inside:
        depth += (c in _open) - (c in _close)
        if depth < 0:
            return None
    return (left, inside, right) if depth == 0 else None


def read(s, depth=0):
    """A cleaned answer -> ('set', items) | ('tuple', brackets, items) | ('union', items) | ('matrix', rows) | ('rel', op, left, right) | ('expr', tree, text)."""
    if depth > 6:
        raise Unreadable('too deep')
    again = lambda parts: [read(p, depth + 1) for p in parts[:MAX_ITEMS + 1]]
    m = re.fullmatch(r'\\begin\s*\{([pbvBV]?matrix|array)\}\s*(?:\{[lcr|]*\})?(.*?)\\end\s*\{\1\}', s.strip(), re.S)
    if m:
        return ('matrix', [again(row.split('&')) for row in re.split(r'\\\\', m[2]) if row.strip()])
    parts = split(s, '\\cup')
    if len(parts) > 1:
        return ('union', again(parts))
    parts = split(s, ',', ';')
    if len(parts) > 1 and all(parts):
        items = again(parts)
        if items[0][0] == 'rel' and items[0][1] == '=' and len(items[0]) == 4:
            items = [read_right(i) for i in items]  # x = 1, x = 2 and x = 1, 2
        return ('set', flat(items))
    found = wrapped(s)
    if found:
        left, inside, right = found
        parts = split(inside, ',', ';')
        if left == '{':
            return ('set', flat(again(parts)) if inside.strip() else [])
        if len(parts) > 1:
            return ('tuple', left + right, again(parts))
    belongs = split(s, '\\in')
    if len(belongs) == 2 and re.fullmatch(r'[a-zA-Z]', belongs[0]):
        return read(belongs[1], depth + 1)
    relation = read_relation(s, depth)
    if relation:
        return relation
    parts = split(s, ':')
    if len(parts) > 1 and all(parts):
        return ('tuple', ':', again(parts))
    return read_expression(s)


def read_relation(s, depth):
    """'y = 2x' -> ('rel', '=', left, right); 'x > 2' and '1 < x \\\\le 3' -> the interval; None without a relation."""
    ops = sorted(RELATIONS, key=len, reverse=True)
    parts = split(s, *ops)
    if len(parts) == 1:
        return None
    signs, rest = [], s
    for p in parts[:-1]:
        rest = rest[rest.index(p) + len(p):].lstrip()
        op = next(o for o in ops if rest.startswith(o))
        signs.append(RELATIONS[op])
        rest = rest[len(op):].lstrip()
    infinite = lambda sign: read_expression(sign + '\\infty')
    one = lambda p: re.fullmatch(r'[a-zA-Z]|\\theta', p)
    if len(parts) == 3 and one(parts[1]) and set(signs) <= {'<', '<='}:
        return ('tuple', '([' [signs[0] == '<='] + ')]'[signs[1] == '<='], [read_expression(parts[0]), read_expression(parts[2])])
    if len(parts) == 2 and signs[0] in ('<', '>', '<=', '>=') and (one(parts[0]) or one(parts[1])) and not (one(parts[0]) and one(parts[1])):
        sign, end = (signs[0], parts[1]) if one(parts[0]) else ({'<': '>', '>': '<', '<=': '>=', '>=': '<='}[signs[0]], parts[0])
        shut = sign.endswith('=')
        above = ('tuple', '([' [shut] + ')', [read_expression(end), infinite('')])
        return above if sign[0] == '>' else ('tuple', '(' + ')]'[shut], [infinite('-'), read_expression(end)])
    if signs[-1] == '=' and len(parts) > 2:
        parts, signs = parts[-2:], signs[-1:]  # a = b = 5
    if len(parts) != 2:
        raise Unreadable('a chain of relations')
    left, right = (read(p, depth + 1) for p in (parts if signs[0] not in FLIPPED else parts[::-1]))
    name = re.fullmatch(r"[a-zA-Z](?:_\{?\w+\}?)?'?(?:\s*\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))?|\\[a-zA-Z]+|\\text\{[^{}]*\}|[A-Z]{1,3}|"
                        r"\\angle\s*[A-Z]+", parts[0])
    return ('rel', FLIPPED.get(signs[0], signs[0]), left, right) + (('named',) if name and signs[0] == '=' else ())


def read_right(item):
    return item[3] if item[0] == 'rel' and item[1] == '=' else item


def read_expression(s):
    """('expr', tree or None, text). A bare word is text: 'Friday' is no product of six variables."""
    bare = re.sub(r'\\text|[\s{}]', '', s)
    if bare.isalpha() and len(bare) > 1 and not (len(bare) <= 3 and bare.islower()):
        return ('expr', None, s)
    try:
        return ('expr', Parser(s).whole(), s)
    except (Unreadable, RecursionError):
        return ('expr', None, s)


def flat(items):
    """Sets within sets are one; a \\pm makes two items."""
    out = []
    for item in items:
        out += item[1] if item[0] == 'set' else [item]
    both = []
    for item in out:
        if item[0] == 'expr' and item[1] is not None and names_of(item[1]) & {'pm', 'mp'}:
            both += [('expr', choose(item[1], s), item[2] + str(s)) for s in (1, -1)]
        else:
            both.append(item)
    return both


def choose(tree, sign):
    """A tree with \\pm read as + (sign 1) or - (sign -1)."""
    if not isinstance(tree, tuple):
        return tree
    head = {('pm', 1): '+', ('pm', -1): '-', ('mp', 1): '-', ('mp', -1): '+'}.get((tree[0], sign), tree[0])
    return (head, *(choose(t, sign) for t in tree[1:]))


def same(x, y):
    """Are two readings equal? Symmetric."""
    kinds = x[0], y[0]
    if kinds == ('rel', 'rel'):
        if x[1] != y[1]:
            return False
        if same(x[2], y[2]) and same(x[3], y[3]):
            return True
        trees = [(z[2][1], z[3][1]) if z[2][0] == z[3][0] == 'expr' else (None, None) for z in (x, y)]
        if x[1] not in ('=', '!=') or None in trees[0] + trees[1]:
            return False
        return equal_trees(*(('-', a, b) for a, b in trees), ratio=True)
    if 'rel' in kinds:
        rel, other = (x, y) if x[0] == 'rel' else (y, x)
        return len(rel) == 5 and same(rel[3], other)
    x, y = (('set', flat([z])) if z[0] == 'expr' and z[1] is not None and names_of(z[1]) & {'pm', 'mp'} else z for z in (x, y))
    if {x[0], y[0]} == {'set', 'expr'}:
        x, y = ((z[1][0] if z[0] == 'set' and len(z[1]) == 1 else z) for z in (x, y))
    if {x[0], y[0]} == {'set', 'tuple'}:  # 2, -1 for (2, -1): the same order is asked
        a, b = (x, y) if x[0] == 'tuple' else (y, x)
        return a[1] == '()' and len(a[2]) == len(b[1]) and all(map(same, a[2], b[1]))
    if x[0] != y[0]:
        return False
    if x[0] == 'expr':
        return same_expressions(x, y)
    if x[0] == 'matrix':
        return len(x[1]) == len(y[1]) and all(len(a) == len(b) and all(map(same, a, b)) for a, b in zip(x[1], y[1]))
    if x[0] == 'tuple':
        return x[1] == y[1] and len(x[2]) == len(y[2]) and all(map(same, x[2], y[2]))
    left = list(y[1])
    if len(x[1]) != len(left) or len(left) > MAX_ITEMS:
        return False
    for item in x[1]:
        hit = next((i for i, other in enumerate(left) if same(item, other)), None)
        if hit is None:
            return False
        left.pop(hit)
    return True


def same_expressions(x, y):
    if letters(x[2]) == letters(y[2]) and letters(x[2]):
        return True
    if x[1] is None or y[1] is None:
        return False
    percent = [z[1] for z in (x, y) if z[1][0] == '%']
    if len(percent) == 1:  # 10 % is 0.1, and also what people mean by 10
        other = (y if x[1][0] == '%' else x)[1]
        return equal_trees(percent[0], other) or equal_trees(percent[0][1], other)
    return equal_trees(x[1], y[1])


def equal(answer, reference):
    """Is one answer (str) equal to another? Symmetric, never raises, fast on any input. equal('0.75', '\\\\frac34') -> True; ('(1,2)', '[1,2]') -> False."""
    a, b = clean(answer[:4 * MAX_LEN]), clean(reference[:4 * MAX_LEN])
    if not a or not b:
        return False
    if re.sub(r'\s', '', a) == re.sub(r'\s', '', b) or letters(a) == letters(b) != '':
        return True
    if max(len(a), len(b)) > MAX_LEN:
        return False
    try:
        return same(read(a), read(b))
    except (ValueError, RecursionError, ZeroDivisionError, OverflowError):  # Unreadable, and what float() refuses
        return False


def reference_of(row):
    """The reference answer of a row: row['answer'], or verl's row['reward_model']['ground_truth']; a \\boxed or #### inside is opened."""
    given = row.get('answer', (row.get('reward_model') or {}).get('ground_truth') if isinstance(row.get('reward_model'), dict) else None)
    if given is None or not str(given).strip():
        raise ValueError(f'data/math/reward.py: row without "answer", it has {sorted(row)}: give "answer": "\\\\frac{{3}}{{4}}"')
    given = str(given)
    return (extract_answer(given) if '\\boxed' in given or '\\fbox' in given or '####' in given else None) or given


def reward(prompt: str, completion: str, row: dict) -> float:
    """1.0 where the completion's answer equals the row's, else 0.0. reward('', 'so \\\\boxed{0.5}', {'answer': '\\\\frac12'}) -> 1.0."""
    got = extract_answer(completion)
    return float(got is not None and equal(got, reference_of(row)))
