"""data/math: the answer checker by tables, a second reader and hostile input; the prepare script."""
import importlib.util
import multiprocessing
import os
import re
import threading
import time
import tracemalloc

import pytest

from conftest import ROOT
from dataset import load_dataset
from test_prepare import jsonl, prepare

spec = importlib.util.spec_from_file_location('math_reward', os.path.join(ROOT, 'data/math/reward.py'))
R = importlib.util.module_from_spec(spec)
spec.loader.exec_module(R)


def pairs(table):
    """'a == b    c ~~ d' -> [('a', 'b', True), ('c', 'd', False)]: four blanks between pairs; ~~ where
    math-verify says otherwise (each was looked at: it does not read the form, or pays what is wrong)."""
    lines = [line for line in table.strip().split('\n') if not line.startswith('#')]
    cells = [cell.strip() for line in lines for cell in line.split('    ')]
    return [(*re.split(' == | ~~ ', cell), ' == ' in cell) for cell in cells]


EQUAL = pairs(r"""
# numbers and their spellings
7 == 7.0    7 ~~ 7.    -7 == −7    .38 == 0.38    1{,}200 == 1200    40,\!000 == 40000
1,234,567 == 1234567    11,\! 111,\! 100 == 11111100    1 200 ~~ 1200    \$76.80 == 76.8    \$ 10 == 10
50\% == 50    50\% == \frac12    1.5 \times 10^{6} == 1500000    0.\overline{3} ~~ \frac13
0.1\overline{6} ~~ 1/6    \frac{3}{4} == 0.75    \frac34 == \dfrac{6}{8}    \frac 43 == 4/3
\frac1{20} == .05    -\frac{1}{2} == \frac{-1}{2}    ½ ~~ 0.5    3\frac{3}{8} == \frac{27}{8}
3 \frac{3}{8} == 3.375    2 2/3 ~~ \frac83    -2 2/3 ~~ -\frac83    |-3| == 3
\frac{1}{2004!} == \frac{1}{2004 \cdot 2003!}    \binom{5}{2} == 10    2^{10} == 1024
\lfloor 3.7 \rfloor == 3    5, ~~ 5    5\ ~~ 5    \boldsymbol{5} ~~ 5    \mathbf{x+1} ~~ x+1    **5** ~~ 5
# roots, pi, functions
\frac{1}{\sqrt2} == \frac{\sqrt{2}}{2}    \sqrt{50} == 5\sqrt2    \sqrt[3]{27} == 3
\frac{3}{4}\pi == \frac{3\pi}{4}    -2\sqrt7-1 == -1 - 2\sqrt{7}    \cos 60^\circ ~~ 1/2
2\cos 15^{\circ} ~~ \frac{\sqrt6+\sqrt2}{2}    \ln e^2 == 2    \log_{2} 8 == 3    \sin^2 1 + \cos^2 1 == 1
\tan^{-1} 1 == \frac{\pi}{4}    (1+i)^2 ~~ 2i    -12 + 15i == 15i-12    8^{1/3} == 2    \sin \pi == 0
\cos\frac{\pi}{2} == 0    e^{i\pi}+1 ~~ 0    \sqrt{2}-\sqrt{2} == 0    sqrt(3)/2 == \frac{\sqrt3}{2}
# units and words
81\text{ teachers} == 81    90\text{ square units} == 90    \frac{3}{4}\pi\text{ inches} == \frac{3\pi}{4}
5 cm == 5    12\text{ cm}^2 == 12    60^\circ == 60    20\text{ degrees} == 20    9 (apples) ~~ 9
10\,\text{m} == 10    3.5\ \mathrm{g} == 3.5    7\text{ apples} == 7    \text{13} == 13    \text{(E)} == E
\text{Friday} == friday    \text{B, E, G} ~~ B, E, G    \overline{CD} == \overline{ CD }
June 20 ~~ \text{June 20}    \text{Yes} == yes
# algebra
(x+1)^2 == x^2+2x+1    2x(15x^2-4x+10) == 30x^3-8x^2+20x    \frac{x^2-1}{x-1} == x+1
3qr + 6q - 15r -30 == 3(q-5)(r+2)    \frac{3x^2}{2} == 1.5x^2    \sqrt{x} == x^{1/2}
\frac{1}{2 - x} == -\frac{1}{x-2}    2ab ~~ 2ba    p+q-r == q - r + p    x**2 ~~ x²
x_1+x_2 == x_2+x_{1}
# relations
x = 5 == 5    K=8 == 8    5 = x ~~ 5    y = -2x == -2x    y=2x == 2x-y=0
x^2+y^2=4 == \frac{x^2}{4}+\frac{y^2}{4}=1    f(x)=x^2 == x^2    x > 2 ~~ (2,\infty)
x \le 5 ~~ (-\infty, 5]    -1 < x \le 3 ~~ (-1, 3]    s^2 \le 8r^2 == 8r^2 \ge s^2
x \in [46, \infty) == [46,\infty)    x >= 2 == x \ge 2    5 > x \ge 2 ~~ [2,5)    x ≤ 2 ~~ (-\infty,2]
3 < x == x>3    (-\infty,\infty) == \mathbb{R}    x \in \mathbb{R} ~~ \mathbb R    3\cdot4=12 == 12
x = 3\cdot 4 = 12 == 12
# lists, tuples, sets, matrices
1,-2 == -2, 1    12\text{ and }13 == 13, 12    4 \text{ or } 0 == 0,4    1, 2, \text{ and } 3 == 1,2,3
2 and 3 == 3, 2    \{1\pm\sqrt{5},-2\} == -2, 1+\sqrt5, 1-\sqrt5    \pm 3 == 3, -3
(3,2,4) == \left( 3, 2, \frac{8}{2} \right)    2, -1 == (2,-1)    (x,y)=(1,2) == (1,2)
x=1, y=2 == (1,2)    y=2, x=1 == x=1, y=2    1, 2 == x=1, y=2    x=1, x=2 == 2,1
(-\infty,-8)\cup (8,\infty) == (8,\infty) \cup (-\infty,-8)
\left[0,\frac{343}{27}\right] == [0, 343/27]    5, 100 == 100, 5    1:2 == 1 : 2    4210_{5} == 4210_5
\emptyset ~~ \varnothing    \{5\} == 5
\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix} == \begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}
\begin{pmatrix} 1 & 2 \\ 6 & -1 \end{pmatrix} == \begin{bmatrix}1&2\\6&-1\end{bmatrix}
\left(\begin{array}{c} 1 \\ 2 \end{array}\right) == \begin{pmatrix} 1 \\ 2 \end{pmatrix}""")
DIFFERENT = pairs(r"""
0.333 == \frac13    0.333333333333333333333 ~~ 1/3    1.4142 == \sqrt2    1.41421356237 ~~ \sqrt2
3.14 == \pi    7 == -7    12 == 21    1,234 == 1.234    50\% == 5    75 == 0.75
\frac{1}{2^{99}} ~~ \frac{1}{2^{98}}    10^{10^{10}} == 10    i == 1
# structure
(1,2) == [1,2]    (1,2) == (2,1)    [1,2) == [1,2]    1,2 == 1,2,3    1,2,2 ~~ 1,1,2    \{1,2\} == \{1,3\}
2:1 == 1:2    (1,234) == 1234    5, 100 == 5100    1,1 ~~ 1    (1,2) ~~ \{1,2\}    [1,2] == \{1,2\}
-(\frac25,\frac12) == (\frac25,\frac12)    [-\infty,4) ~~ (-\infty,4)    2, 1 ~~ x=1, y=2
(2,1) ~~ x=1, y=2    x=2, y=1 == x=1, y=2    x=1, z=2 == x=1, y=2
\begin{pmatrix} 1 \\ 2 \end{pmatrix} == \begin{pmatrix} 2 \\ 1 \end{pmatrix}    \infty == -\infty
\begin{pmatrix} 1 \\ 2 \end{pmatrix} == \begin{pmatrix} 1 & 2 \end{pmatrix}
# algebra and relations
x+1 == x-1    2^x == x^2    x^2 == |x|x    x=5 == x=6    y=2x == y=3x    x>2 == x<2    x>2 == x \ge 2
x^2+y^2=4 == x^2+y^2=5    1202_3 ~~ 1202_4    1202_3 ~~ 1202    6=5 ~~ 5    3\cdot4=13 ~~ 13    3x == 3
sin x == x    5 > x \ge 2 == (2,5]    h(0) == g(0)
# a brace moves
\frac{11}{2} == \frac{1}{12}    2^{n}-1 == 2^{n-1}    \sqrt{x}+1 == \sqrt{x+1}    2^{3}4 == 2^{34}
x_{1}2 == x_{12}    2\sqrt3 == 23    \frac{1}{1} == 11    \frac{x}{y}+1 == \frac{x}{y+1}    (x+1)y == x+1y
# capital and small letters
r-R ~~ R-r    \frac{r}{R} ~~ \frac{R}{r}    Rr ~~ RR    AB ~~ ab    n ~~ N    R\text{ cm} ~~ r\text{ cm}
# words that say more than a unit
7\text{ or maybe 8 or 9} ~~ 7    7\text{ or more} ~~ 7    10\text{ million} ~~ 10    7\text{ eight} ~~ 7
5\text{ or six} ~~ 5    8\text{ squared} ~~ 8    7\text{ times }x == 7    9 (or eight) == 9
2\text{x} ~~ 2    3\mathrm{i} ~~ 3    4\text{ plus 1} ~~ 4    \text{June 21} == \text{June 20}
\text{Room 5} == \text{Room 6}    2\text{ June} == 2\text{ July }3    \text{Friday} == \text{Sunday}
odd == even    \text{ACF} == \text{AFC}    Monday == Mondya    none == 7
# side by side
5 6 == 30    5 6 == 56    2 2/3 ~~ \frac43    3 4 5 == 60    1 20 == 120
# small numbers
0 == e^{-40}    \frac{2\pi}{10^{12}} == \frac{\pi}{10^{12}}    \pi^{-30} == 0
\sqrt{2}\cdot 10^{-13} == 0    10^{-20}x == 0    \frac{1}{0} == 7    \sqrt{} == 0""")


@pytest.mark.parametrize('a, b, _', EQUAL)
def test_equal_answers(a, b, _):
    assert R.equal(a, b) and R.equal(b, a)


@pytest.mark.parametrize('a, b, _', [*DIFFERENT, ('', '7', 0), ('7' * 601, '7' * 600 + '8', 0)])
def test_different_answers(a, b, _):
    assert not R.equal(a, b) and not R.equal(b, a)


def test_every_answer_of_the_table_equals_itself():
    assert all(R.equal(x, x) for a, b, _ in EQUAL + DIFFERENT for x in (a, b))


@pytest.mark.slow
def test_a_second_reader_agrees_but_where_it_was_looked_at():
    math_verify = pytest.importorskip('math_verify')
    for table, right in ((EQUAL, True), (DIFFERENT, False)):
        for a, b, agrees in table:
            reference, answer = (math_verify.parse(f'\\boxed{{{text}}}') for text in (b, a))
            said = math_verify.verify(reference, answer)
            assert (said == right) == agrees, (a, b, said)


@pytest.mark.parametrize('text, want', [
    (r'so \boxed{\frac{3}{4}}.', r'\frac{3}{4}'), (r'\boxed{1} no \boxed{2}', '2'),
    (r'\boxed{\{1, 2\}}', r'\{1, 2\}'), (r'\fbox{5}', '5'), (r'\boxed 7 it is', '7'), (r'\boxed {7}', '7'),
    (r'$\boxed{x^{2}}$', 'x^{2}'), (r'\boxed{12', '12'), ('so\n#### 72\nbye', '72'),
    ('The answer is 5. Done.', '5'), ('Final answer: $x = 3$', '$x = 3$'), ('The answer is 3.5', '3.5'),
    ('it is 7', None), ('', None), (r'\boxed{}', None), ('answer', None), (r'#### 5 but \boxed{6}', '6'),
    ('The answer is 5. I hope this answer helps.', '5'), ('The answer is 4. No, the answer is 5.', '5'),
    ('**Answer:** 5', '5'), ('The answer is 5.\nThe answer is:', '5'),
    (r'<think>so \boxed{7}</think> The answer is 8.', '8'), (r'<think>maybe \boxed{7} or', None),
    (r'so \boxed{7}</think>\boxed{8}', '8'), ('<think>7</think>', None),
    ('#### 5\n\nProblem: 2+2?\nSolution: #### 4', '5'),
    ('\nQuestion: 1+1? #### 2', '2')])
def test_extract_answer(text, want):
    assert R.extract_answer(text) == want


@pytest.mark.parametrize('row', [
    {'answer': r'\frac12'}, {'answer': r'\boxed{0.5}'}, {'answer': r'We get $\boxed{\frac{1}{2}}$.'},
    {'answer': 'half of 1\n#### 0.5'}, {'answer': 0.5},
    {'reward_model': {'ground_truth': '1/2', 'style': 'rule'}}])
def test_reward_reads_every_form_of_reference(row):
    assert R.reward('Q', r'Well, \boxed{\dfrac{1}{2}}', row) == 1.0
    assert R.reward('Q', r'\boxed{2}', row) == 0.0 and R.reward('Q', 'one half', row) == 0.0


@pytest.mark.parametrize('row', [{}, {'answer': ''}, {'answer': None, 'reward_model': None}])
def test_a_row_without_reference_is_an_error(row):
    with pytest.raises(ValueError, match='row without "answer"'):
        R.reward('Q', r'\boxed{1}', row)


HOSTILE = [
    '(' * 500, '{' * 500, '\\frac{' * 100, '9' * 590, '9^{9^{9^{9}}}', '(10^{7})!', '9' * 100 + '!',
    '(((2^99)^99)^99)^99', '1' + '+1' * 250, 'x' * 590, '\\sqrt{' * 90 + '2' + '}' * 90, '-' * 500 + '1',
    '\\begin{pmatrix}' + '1&' * 200 + '\\end{pmatrix}', '1,' * 290 + '1', '\\{' * 200, '\\text{' * 90,
    '|' * 300, 'x_{' * 100, '\\boxed{' * 60, '\\pm' * 100, '1' + '\\pm1' * 80, '=' * 300, 'a<' * 200,
    '1:' * 250, '\\cup' * 100, '\ud800', '\0' * 50, '\\binom{2000}{1000}' * 9, '2000!' * 30, '\\log_{' * 60,
    '!' * 400, '%' * 400, '^' * 400, '^-' * 290, '(1+x)^{900}(1+y)^{900}', '\\sin' * 120, "'" * 300,
    ' ' * 590, '1\ue000000', '\\text{a}^2' * 50 + '$', '1 ft ' * 100, ',' * 500, '\\frac12' * 80,
    '0.\\overline{' + '3' * 500 + '}', '\\' * 300, '(' * 300 + '1' + ')' * 300, 'x=1,' * 140,
    '+'.join(f'\\frac{{1}}{{{p}^{{999}}}}' for p in range(7, 40)), '1,234' * 118, '1 1/2 ' * 90,
    '9' * 300 + '/' + '7' * 250]


def worst_and_paid():
    """(most CPU seconds of one answer, most MB of one, those of HOSTILE that are paid); each within the
    bounds and beyond."""
    seconds, megabytes, paid = 0.0, 0.0, []
    for answer in (text * repeats for text in HOSTILE for repeats in (1, 40)):
        for said in (f'\\boxed{{{answer}}}', f'#### {answer}', f'the answer is {answer}'):
            R.value_at.cache_clear()
            start = time.thread_time()
            paid += [said[:20]] * bool(R.reward('', said, {'answer': '77'}) or R.equal('77', answer))
            seconds = max(seconds, time.thread_time() - start)
        tracemalloc.start()
        R.equal(answer, f'({answer})')
        megabytes = max(megabytes, tracemalloc.get_traced_memory()[1] / 2**20)
        tracemalloc.stop()
    return seconds, megabytes, paid


def test_hostile_answers_are_fast_small_and_wrong_in_a_thread_and_in_a_worker():
    found = []
    thread = threading.Thread(target=lambda: found.append(worst_and_paid()))
    thread.start()
    thread.join()
    with multiprocessing.get_context('fork').Pool(1) as pool:
        found.append(pool.apply(worst_and_paid))
    for seconds, megabytes, paid in found:
        # 0.005 s and 0.6 MB as a rule
        assert seconds < 2 and megabytes < 50 and not paid


# ---- prepare.py ----

MATH = [{'problem': f'What is ${i}+{i}$? Say it as a number, please, and nothing more.', 'type': 'Algebra',
         'level': f'Level {1 + i % 5}', 'solution': f'It is $\\boxed{{{2 * i}}}$.'} for i in range(40)]


def rows(folder, name):
    return list(load_dataset(str(folder / f'{name}.jsonl')))


def paid(answer, row):
    return R.reward('', f'\\boxed{{{answer}}}', row) == 1


def test_prepare_math(tmp_path, monkeypatch, capsys):
    src = jsonl(tmp_path / 'a.jsonl.gz', MATH + MATH[:5])
    test = [{'problem': MATH[3]['problem'], 'answer': '6', 'subject': 'Algebra', 'level': 2}]
    prepare('math', monkeypatch, src=src, test=jsonl(tmp_path / 'b.jsonl', test), out_dir=tmp_path / 'o')
    train, held = rows(tmp_path / 'o', 'train'), rows(tmp_path / 'o', 'test')
    assert len(train) == 39 and [r['answer'] for r in held] == ['6']
    assert '5 standing twice, 1 of train that stand in test' in capsys.readouterr().out
    assert train[1]['answer'] == '2' and train[1]['level'] == 2
    assert train[1]['prompt'][0]['content'].endswith('within \\boxed{}.')
    sft = rows(tmp_path / 'o', 'sft_train') + rows(tmp_path / 'o', 'sft_val')
    said = [r['completion'][0]['content'] for r in sft]
    assert len(said) == 39 and all(R.reward('', text, {'answer': R.boxed(text)}) == 1 for text in said)
    prepare('math', monkeypatch, src=src, out_dir=tmp_path / 'p', form='text', levels='1,2', val=0.25)
    test = rows(tmp_path / 'p', 'test')
    kept = rows(tmp_path / 'p', 'train') + test
    assert len(kept) == 16 and {r['level'] for r in kept} == {1, 2} and len(test) == 4
    assert kept[0]['prompt'].startswith('Problem: What')


def test_prepare_the_forms_of_others(tmp_path, monkeypatch):
    ask = 'Please solve: {} Return it in \\boxed{{}} tags.'
    dapo = [{'prompt': ask.format(MATH[i]['problem']), 'answer': f'\\boxed{{{2 * i}}}'} for i in range(5)]
    chats = [[{'role': 'user', 'content': f'Question {i}: how much is it, said in full and in order?'}]
             for i in range(5)]
    verl = [{'data_source': 'x', 'prompt': chat, 'reward_model': {'ground_truth': str(i), 'style': 'rule'}}
            for i, chat in enumerate(chats)]
    gsm = [{'question': f'{i} and {i}?', 'answer': f'It is {2 * i}.\n#### {2 * i}'} for i in range(5)]
    asdiv = [{'body': f'Tom has {i} apples.', 'question': 'How many?', 'answer': f'{i} (apples)'}
             for i in range(5)]
    sources = ('dapo', dapo, 'asis'), ('verl', verl, 'chat'), ('gsm', gsm, 'text'), ('asdiv', asdiv, 'chat')
    for name, part, form in sources:
        src = jsonl(tmp_path / f'{name}.jsonl', part + [{k: None for k in part[0]}])
        prepare('math', monkeypatch, src=src, out_dir=tmp_path / name, form=form, val=0.2)
        test = rows(tmp_path / name, 'test')
        made = rows(tmp_path / name, 'train') + test
        assert len(made) == 5 and len(test) == 1 and all(paid(R.clean(r['answer']), r) for r in made)
    deep = [{'question': f'What is the value of {i} + {i}?', 'final_answer': answer, 'difficulty': 5.5}
            for i, answer in enumerate(('0', 'Yes', '\\frac{1}{2}', 'no.', '8'))]
    src = jsonl(tmp_path / 'deep.jsonl', deep)
    prepare('math', monkeypatch, src=src, out_dir=tmp_path / 'd', words=False, val=0.3)
    made = rows(tmp_path / 'd', 'train') + rows(tmp_path / 'd', 'test')
    assert {row['answer'] for row in made} == {'0', '\\frac{1}{2}', '8'}
    assert {row['level'] for row in made} == {5}
    src, test = str(tmp_path / 'dapo.jsonl'), jsonl(tmp_path / 't.jsonl', MATH[2:4])
    prepare('math', monkeypatch, src=src, test=test, out_dir=tmp_path / 'q', form='asis')
    left = rows(tmp_path / 'q', 'train')
    assert len(left) == 3  # the two that stand in the test inside an instruction of their own are gone
