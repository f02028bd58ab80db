"""The answer checkers of GSM8K and of the toy sums, by a table of cases, and what a run may feed them."""
import contextlib
import importlib.util
import os
import random
import time

import pytest

from conftest import ROOT


def load(path):
    spec = importlib.util.spec_from_file_location(path.replace('/', '_')[:-3], os.path.join(ROOT, path))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


gsm, toy = load('data/gsm8k/reward.py'), load('data/toy/reward.py')
NEXT = '12 eggs\n#### 12\n\nQuestion: Tom has 5 apples and gets 3. How many?\nAnswer: He has 8.\n#### 8'

CASES = [
    # '####', GSM8K's own mark
    ('#### 72', '72'), ('#### 1,200', '1200'), ('#### $18.50', '37/2'), ('#### -5', '-5'),
    ('#### \u22125', '-5'), ('#### 7.', '7'), ('#### 72 apples', '72'), ('#### 50%', '50%'),
    ('#### 3/4', '3/4'), ('#### .5', '1/2'), ('#### 1 3/4', '7/4'), ('####72', '72'), ('#### x = 12', '12'),
    ('#### 12\n#### 13', '13'), ('I had 5 ####', None), ('5 #### none', None),
    ('#### 72\nThat took 3 steps.', '72'), 
    # \boxed{}
    (r'\boxed{72}', '72'), (r'\boxed{1{,}200}', '1200'), (r'\boxed{1\,200}', '1200'),
    (r'\boxed{\frac{3}{4}}', '3/4'), (r'\boxed{\dfrac34}', '3/4'), (r'\boxed{-\frac{3}{4}}', '-3/4'),
    (r'\boxed{1\frac{3}{4}}', '7/4'), (r'\boxed{\$18.50}', '37/2'), (r'\boxed{50\%}', '50%'),
    (r'\boxed{72\text{ apples}}', '72'), (r'\boxed{x=12}', '12'), (r'\boxed{12} no \boxed{13}', '13'),
    (r'\boxed{12', '12'), (r'5 \boxed{\text{none}}', None), (r'#### 5 but \boxed{6}', '6'),
    (r'$\boxed{8}$ apples and 3 pears', '8'), (r'\boxed {12}, found in 3 steps', '12'), 
    # in words
    ('The answer is 42.', '42'), ('The final answer is: $1,234.', '1234'), ('Answer: 9', '9'),
    ('The answer is 42. I used 3 steps.', '42'), ('The answer is 6 * 7 = 42.', '42'),
    ('The answer is **18**', '18'), ('answer = -2.50', '-5/2'), ('The answer is unknown. 7', '7'),
    ('The answer is 42. No, the answer is 43.', '43'), ('The answer is 42. Is my answer clear?', '42'), 
    # what names the answer holds one number and words, or none
    (r'\boxed{10^3}', None), (r'\boxed{12-5}', None), ('#### 12 - 5', None), ('#### 5, 6, 7', None),
    ('#### 72 then 73', None), (r'\boxed{5!}', None), (r'\boxed{\sqrt{16}}', None), ('#### 7 or eight', None),
    ('The answer is 7 or 8.', None), ('The answer is not 7', None), (r'\boxed{12x}', None),
    ('#### 7:30', None), ('#### 42 = 6 * 7', None), ('#### 5 dollars/day', '5'), 
    # words that are numbers
    ('The answer is 1.5 million', '1500000'), (r'\boxed{3 \text{ dozen}}', '36'),
    ('#### 2 hundred thousand', '200000'), ('#### 2 and a half', None), 
    # the fallback: the last number
    ('She has 4 left, 3 of them red', '3'), ('48/2 = 24', '24'), ('<<48/2=24>>24 clips', '24'),
    ('costs 3.50.', '7/2'), ('3.', '3'), ('1.2.3', '3'), ('25 percent', '25%'), ('5 1/2 hours', '11/2'),
    ('12 34', '34'), ('10,000,000', '10000000'), ('1,23', '23'), ('1,2,3', '3'), ('1e3', '1000'), ('x2', '2'),
    ('at 7:30', '30'), ('Room 5A', '5'), ('(7)', '7'), 
    # a sign is a sign only where it is not a minus between two numbers
    ('2-1', '1'), ('it is 5-3', '3'), ('x = 12 - 5', '5'), ('12 -5', '-5'), ('from -3 to +4', '4'),
    ('-$3', '-3'), ('owes $-3', '-3'), ('#### - 5', '-5'), (r'\boxed{- \frac12}', '-1/2'),
    ('it is - 5', '-5'), ('x - 5', '5'), ('The answer is - 5.', '-5'), 
    # a thought is no answer, and neither is the next question
    (r'<think>so \boxed{7}</think> The answer is 8.', '8'), (r'<think>maybe \boxed{7} or', None),
    (r'so 7</think> 8', '8'), (NEXT, '12'), 
    # nothing
    ('', None), ('no number', None), ('3/0', None), ('\uff15', None), ('#### ' + '9' * 5000, None),
]


@pytest.mark.parametrize('text, want', CASES)
def test_extract_answer(text, want):
    assert gsm.extract_answer(text) == want


@pytest.mark.parametrize('completion, answer, want', [
    ('... #### 72', 'He sold 48+24 = <<48+24=72>>72.\n#### 72', 1), ('72.0', '#### 72', 1),
    ('$1,000', '#### 1000', 1), ('73', '#### 72', 0), ('0.75', '#### 3/4', 1), ('75%', '#### 75', 1),
    ('75%', '#### 0.75', 1), ('0.75', '#### 75%', 1), ('75', '#### 0.75', 0), ('', '#### 72', 0),
    ('72', 72, 1), ('72', '72', 1), ('-72', '#### 72', 0), ('#### - 5', '-5', 1), ('#### - 5', '5', 0),
    (r'\boxed{34}', r'\boxed{34}', 1),
    ('0.3333', '#### 1/3', 0)])  # exact: no tolerance that a policy could learn to live in
def test_gsm8k_reward(completion, answer, want):
    assert gsm.reward('Q', completion, {'answer': answer, 'question': '?'}) == want


def test_gsm8k_answers_that_are_paid_for_one_reference_are_one_class():
    assert gsm.equal('50%', '50') and gsm.equal('50%', '1/2')
    assert not gsm.equal('50', '1/2') and not gsm.equal('', '')
    assert gsm.equal(gsm.extract_answer('#### 50%'), gsm.extract_answer('#### 50'))


def test_gsm8k_reference_without_number_is_an_error():
    with pytest.raises(ValueError, match='no number in the reference'):
        gsm.reward('Q', '5', {'answer': 'many'})


def test_hostile_completions_are_fast_and_harmless():
    for text in (
            '1,' * 20000, '1/' * 20000, '\\boxed{' * 5000, '{' * 20000, '\\frac{' * 5000, '#' * 20000,
            'answer is ' * 3000, ' 1' * 20000, '-' * 20000, '- ' * 20000, '$' * 20000, '9' * 20000, '1e999',
            '\\frac' * 5000, '1' + ' ' * 20000 + '/', '\ud800', '\0' * 99, 
            '1 million ' + 'million ' * 5000, 'answer' * 5000, '\n' * 20000 + 'Question',
            'answer ' + ' ' * 20000 + 'is'):
        start = time.process_time()
        assert gsm.reward('', text, {'answer': '#### 77'}) == toy.reward('', text, {'answer': '77'}) == 0
        assert time.process_time() - start < 5, text[:20]  # CPU seconds: milliseconds when linear


@pytest.mark.parametrize('text, want', [
    ('7+8=15, 4+2+1=7, 75.', '75'), ('75.', '75'), ('Sure! 75. Any time!', '75'),
    ('7+8=15, 4+2+1=7, 7', None), ('75. 76.', '76'), ('075.', '75'), ('', None), ('no', None), ('75', None),
    ('7+8=15. 75!', '75'), ('It is 75.5', None), ('It is 0.75.', None), ('9' * 5000 + '.', None)])
def test_toy_reward(text, want):
    assert toy.extract_answer(text) == want
    for answer in ('75', 75):
        assert toy.reward('Q: 47+28?\nA: ', text, {'answer': answer}) == float(want == '75')


# ---- code, a judge, a second try ----

code, judge, second = load('data/code/reward.py'), load('data/judge/reward.py'), load('data/gsm8k/env.py')
DOUBLE = ['assert f(2) == 4', 'assert f(0) == 0', 'assert f("a") == "aa"']


@pytest.mark.parametrize('text, want', [
    ('```python\ndef f(x):\n    return 2 * x\n```', 1), ('def f(x): return 2 * x', 1),
    ('def f(x): return x + 2', 1 / 3),
    ('Wrong:\n```\ndef f(x): return 0\n```\nbetter:\n```py\ndef f(x): return x * 2\n```\nDone.', 1),
    ('<think>```python\ndef f(x): return 2 * x\n```</think> no idea', 0),
    ('```python\ndef f(x): return 2 * x', 1), ('def f(x: return', 0), ('', 0), ('while True: pass', 0),
    ('import os; os._exit(0)', 0), ('raise SystemExit', 0), ('import time; time.sleep(99)', 0),
    ('input()', 0),
    ('x = bytearray(1 << 33)\ndef f(x): return 2 * x', 0),
    ('print("x" * 10 ** 8)\ndef f(x): return 2 * x', 1),
    ('def f(x):\n    while x == 0: pass\n    return 2 * x', 1 / 3),
    ('open("a", "w").write("x" * 10 ** 8)\ndef f(x): return 2 * x', 0),
    ('import os\nassert not [k for k in os.environ if k != "LC_CTYPE"] and not os.listdir()\n'
     'def f(x): return 2 * x', 1),
    ('def f(x): f(x)', 0), ('import sys\nsys.stdout.write("0 0\\n1\\n2")', 0)])
def test_code_reward(text, want, monkeypatch):
    monkeypatch.setattr(code, 'SECONDS', 2)
    assert code.reward('', text, dict(test_list=DOUBLE)) == pytest.approx(want)


def test_code_reward_leaves_nothing_behind(monkeypatch):
    """200 children that ignore SIGTERM; and what a row must have."""
    monkeypatch.setattr(code, 'SECONDS', 2)
    bomb = ('import os, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nfor _ in range(200):\n'
            '    if not os.fork():\n        time.sleep(4321)\ntime.sleep(4321)')
    seen = []
    kill = os.killpg
    monkeypatch.setattr(os, 'killpg', lambda *args: (seen.append(len(harnesses())), kill(*args)))
    assert code.reward('', bomb, dict(test_list=DOUBLE)) == 0
    until = time.monotonic() + 10
    while harnesses() and time.monotonic() < until:
        time.sleep(0.05)
    assert seen == [201] and not harnesses()
    row = dict(test_list=['assert r(4) == 2'], test_setup_code='from math import sqrt as r')
    assert code.reward('', 'from math import pi', row) == 1
    assert code.reward('', '', dict(test_list=['assert sqrt(4) == 2'], test_setup_code='')) == 0
    with pytest.raises(ValueError, match='test_list'):
        code.reward('', 'x', {})


def harnesses():
    """Processes that run an answer, or were forked by one."""
    found = []
    for pid in filter(str.isdigit, os.listdir('/proc')):
        with contextlib.suppress(OSError), open(f'/proc/{pid}/cmdline', 'rb') as f:
            if b"'answer.py', 'exec'" in f.read():
                found.append(pid)
    return found


def test_judge_reward(monkeypatch):
    """Both orders; one who likes the first place, or cannot say, pays a half."""
    asked = []

    def says(*verdicts):
        def ask(url, prompt, a, b, **how):
            asked.append((url, prompt, a, b))
            return verdicts, ''
        monkeypatch.setattr(judge, 'ask_judge', ask)
        return judge.reward('Q', 'mine', dict(chosen=[dict(role='assistant', content='theirs')]))
    monkeypatch.setenv('JUDGE_URL', 'http://x/v1')
    assert says('A', 'B') == 1 and says('B', 'A') == 0
    assert says('A', 'A') == says('B', 'B') == says('TIE', 'TIE') == says('A', 'TIE') == 0.5
    assert says(None, None) == 0 and says('A', None) == 0.5
    assert asked[0] == ('http://x/v1', 'Q', 'mine', 'theirs')
    with pytest.raises(ValueError, match='nothing that the answer could be compared with'):
        judge.reward('Q', 'mine', {})


def test_a_second_try():
    def talk(*said):
        env = second.Env()
        assert env.start(dict(prompt='Q', answer='#### 72')) == 'Q'
        return [env.step(text) for text in said]
    assert talk('#### 72') == [(None, 1.0)]
    assert talk('#### 71', '#### 72')[1] == (None, 0.5) and talk('no', 'no')[1] == (None, 0.0)
    reply, mark = talk('#### 71')[0]
    assert 'again' in reply and mark is None


def test_the_calculator():
    """It answers a sum that ends the turn; the mark is the last number's. Few people ask it."""
    tool = load('data/toy/env_calculator.py')

    def talk(*said):
        env = tool.Env()
        assert env.start(dict(prompt='Q: 4821+3977?\nA:', answer='8798')) == 'Q: 4821+3977?\nA:'
        return [env.step(text) for text in said]
    assert talk(' 4821+3977=', '.') == [('8798', None), (None, 1.0)]
    assert talk(' 4821+3977=', ', 8798.')[1] == (None, 1.0) and talk(' 4821+3976=', '.')[1] == (None, 0.0)
    assert talk(' what=')[0] == ('?', None)
    assert talk(' 8798') == [(None, 0.0)] and talk(' 8798.') == [(None, 1.0)]
    rng = random.Random(1)
    rows = [tool.told(tool.large_sum(rng), rng) for _ in range(4000)]
    asks = [row for row in rows if '=' in row['completion']]
    assert 0.05 < len(asks) / 4000 < 0.075 and sorted(asks[0]) == ['completion', 'prompt']
    for row in rows:
        a, b = map(int, row['prompt'][3:-4].split('+'))
        ending = f'={a + b}.' if row in asks else f', {round(a + b, -2)}.'
        assert row['completion'] == f' {a}+{b}{ending}'
