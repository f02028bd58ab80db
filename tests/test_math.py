"""data/math: the answer checker by tables of equal and of different answers, its extraction, hostile input; the prepare script on every form of row."""
import importlib.util
import json
import os
import time

import pytest

from conftest import ROOT
from dataset import load_dataset
from test_prepare import jsonl, prepare

spec = importlib.util.spec_from_file_location('math_reward', os.path.join(ROOT, 'data/math/reward.py'))
R = importlib.util.module_from_spec(spec)
spec.loader.exec_module(R)

EQUAL = [
    # numbers and their spellings
    ('7', '7.0'), ('7', '7.'), ('-7', '\u22127'), ('.38', '0.38'), (r'1{,}200', '1200'), (r'40,\!000', '40000'), ('1,234,567', '1234567'), (r'11,\! 111,\! 100', '11111100'),
    (r'\$76.80', '76.8'), (r'\$ 10', '10'), (r'50\%', '50'), (r'50\%', r'\frac12'), ('1.5 \\times 10^{6}', '1500000'), (r'0.\overline{3}', r'\frac13'), (r'0.1\overline{6}', '1/6'),
    (r'\frac{3}{4}', '0.75'), (r'\frac34', r'\dfrac{6}{8}'), (r'\frac 43', '4/3'), (r'\frac1{20}', '.05'), (r'-\frac{1}{2}', r'\frac{-1}{2}'), (r'3\frac{3}{8}', r'\frac{27}{8}'),
    (r'3 \frac{3}{8}', '3.375'), (r'\frac{1}{2004!}', r'\frac{1}{2004 \cdot 2003!}'), (r'\binom{5}{2}', '10'), (r'2^{10}', '1024'), (r'\lfloor 3.7 \rfloor', '3'), ('|-3|', '3'),
    # roots, pi, functions
    (r'\frac{1}{\sqrt2}', r'\frac{\sqrt{2}}{2}'), (r'\sqrt{50}', r'5\sqrt2'), (r'\sqrt[3]{27}', '3'), (r'\frac{3}{4}\pi', r'\frac{3\pi}{4}'), (r'-2\sqrt7-1', r'-1 - 2\sqrt{7}'),
    (r'\cos 60^\circ', '1/2'), (r'2\cos 15^{\circ}', r'\frac{\sqrt6+\sqrt2}{2}'), (r'\ln e^2', '2'), (r'\log_{2} 8', '3'), (r'\sin^2 1 + \cos^2 1', '1'), (r'\tan^{-1} 1', r'\frac{\pi}{4}'),
    (r'(1+i)^2', '2i'), (r'-12 + 15i', '15i-12'), ('8^{1/3}', '2'),
    # units and words
    (r'81\text{ teachers}', '81'), ('90\\text{ square\nunits}', '90'), (r'\frac{3}{4}\pi\text{ inches}', r'\frac{3\pi}{4}'), ('5 cm', '5'), ('12\\text{ cm}^2', '12'), (r'60^\circ', '60'),
    (r'20\text{ degrees}', '20'), ('9 (apples)', '9'), (r'\text{13}', '13'), (r'\text{(E)}', 'E'), (r'\text{Friday}', 'friday'), (r'\text{B, E, G}', 'B, E, G'), (r'\overline{CD}', r'\overline{ CD }'),
    # algebra
    ('(x+1)^2', 'x^2+2x+1'), ('2x(15x^2-4x+10)', '30x^3-8x^2+20x'), (r'\frac{x^2-1}{x-1}', 'x+1'), ('3qr + 6q - 15r -30', '3(q-5)(r+2)'), (r'\frac{3x^2}{2}', '1.5x^2'), (r'\sqrt{x}', 'x^{1/2}'),
    (r'\frac{1}{2 - x}', r'-\frac{1}{x-2}'), ('2ab', '2ba'), (r'p+q-r', r'q - r + p'),
    # relations
    ('x = 5', '5'), ('K=8', '8'), (r'y = -2x', '-2x'), ('y=2x', '2x-y=0'), ('x^2+y^2=4', r'\frac{x^2}{4}+\frac{y^2}{4}=1'), ('f(x)=x^2', 'x^2'), ('x > 2', r'(2,\infty)'), (r'x \le 5', r'(-\infty, 5]'),
    (r'-1 < x \le 3', r'(-1, 3]'), (r's^2 \le 8r^2', r'8r^2 \ge s^2'), (r'x \in [46, \infty)', r'[46,\infty)'),
    # lists, tuples, sets, matrices
    ('1,-2', '-2, 1'), (r'12\text{ and }13', '13, 12'), (r'4 \text{ or } 0', '0,4'), (r'\{1\pm\sqrt{5},-2\}', r'-2, 1+\sqrt5, 1-\sqrt5'), ('(3,2,4)', r'\left( 3, 2, \frac{8}{2} \right)'), ('2, -1', '(2,-1)'),
    (r'(-\infty,-8)\cup (8,\infty)', r'(8,\infty) \cup (-\infty,-8)'), (r'\left[0,\frac{343}{27}\right]', '[0, 343/27]'), ('x=1, x=2', '1,2'), ('5, 100', '100, 5'), ('1:2', '1 : 2'), ('4210_{5}', '4210_5'),
    (r'\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}', r'\begin{pmatrix} 0.2 \\ -3.6 \end{pmatrix}'), (r'\begin{pmatrix} 1 & 2 \\ 6 & -1 \end{pmatrix}', r'\begin{bmatrix}1&2\\6&-1\end{bmatrix}'), (r'\emptyset', r'\varnothing'),
]
DIFFERENT = [
    ('0.333', r'\frac13'), ('0.3333333333', '1/3'), ('1.4142', r'\sqrt2'), ('3.14', r'\pi'), ('7', '-7'), ('12', '21'), ('1,234', '1.234'), (r'50\%', '5'), ('75', '0.75'),
    ('(1,2)', '[1,2]'), ('(1,2)', '(2,1)'), ('[1,2)', '[1,2]'), ('1,2', '1,2,3'), ('1,2,2', '1,1,2'), (r'\{1,2\}', r'\{1,3\}'), ('2:1', '1:2'), ('(1,234)', '1234'), ('5, 100', '5100'),
    ('x+1', 'x-1'), ('2^x', 'x^2'), ('x^2', '|x|x'), ('x=5', 'x=6'), ('y=2x', 'y=3x'), ('x>2', 'x<2'), ('x>2', r'x \ge 2'), ('x^2+y^2=4', 'x^2+y^2=5'), ('1202_3', '1202_4'), ('1202_3', '1202'),
    (r'\text{Friday}', r'\text{Sunday}'), ('odd', 'even'), (r'\text{ACF}', r'\text{AFC}'), ('Monday', 'Mondya'), (r'\begin{pmatrix} 1 \\ 2 \end{pmatrix}', r'\begin{pmatrix} 2 \\ 1 \end{pmatrix}'),
    (r'\begin{pmatrix} 1 \\ 2 \end{pmatrix}', r'\begin{pmatrix} 1 & 2 \end{pmatrix}'), (r'\infty', r'-\infty'), ('', '7'), ('7', ''), ('none', '7'), (r'\frac{1}{0}', '7'), (r'\sqrt{}', '0'), (r'2\sqrt3', '23'),
    ('3x', '3'), (r'\frac{1}{1}', '11'), (r'10^{10^{10}}', '10'), ('i', '1'), ('sin x', 'x'),
]


@pytest.mark.parametrize('a, b', EQUAL)
def test_equal_answers(a, b):
    assert R.equal(a, b) and R.equal(b, a)


@pytest.mark.parametrize('a, b', DIFFERENT)
def test_different_answers(a, b):
    assert not R.equal(a, b) and not R.equal(b, a)


def test_every_answer_of_the_table_equals_itself():
    assert all(R.equal(x, x) for pair in EQUAL + DIFFERENT for x in pair if x)


@pytest.mark.parametrize('text, want', [
    (r'so \boxed{\frac{3}{4}}.', r'\frac{3}{4}'), (r'\boxed{1} no \boxed{2}', '2'), (r'\boxed{\{1, 2\}}', r'\{1, 2\}'), (r'\fbox{5}', '5'), (r'\boxed 7 it is', '7'), (r'$\boxed{x^{2}}$', 'x^{2}'),
    (r'\boxed{12', '12'), ('so\n#### 72\nbye', '72'), ('The answer is 5. Done.', '5'), ('Final answer: $x = 3$', '$x = 3$'), ('The answer is 3.5', '3.5'), ('it is 7', None), ('', None),
    (r'\boxed{}', None), ('answer', None), (r'#### 5 but \boxed{6}', '6')])
def test_extract_answer(text, want):
    assert R.extract_answer(text) == want


@pytest.mark.parametrize('row', [{'answer': r'\frac12'}, {'answer': r'\boxed{0.5}'}, {'answer': r'We get $\boxed{\frac{1}{2}}$.'}, {'answer': 'half of 1\n#### 0.5'}, {'answer': 0.5},
                                 {'reward_model': {'ground_truth': '1/2', 'style': 'rule'}}])
def test_reward_reads_every_form_of_reference(row):
    assert R.reward('Q', r'Well, \boxed{\dfrac{1}{2}}', row) == 1.0 and R.reward('Q', r'\boxed{2}', row) == 0.0 and R.reward('Q', 'one half', row) == 0.0


@pytest.mark.parametrize('row', [{}, {'answer': ''}, {'answer': None, 'reward_model': None}])
def test_a_row_without_reference_is_an_error(row):
    with pytest.raises(ValueError, match='row without "answer"'):
        R.reward('Q', r'\boxed{1}', row)


def test_hostile_answers_are_fast_and_wrong():
    hostile = ['(' * 500, '{' * 500, '\\frac{' * 100, '9' * 590, '9^{9^{9^9}}', '9' * 100 + '!', '(((2^99)^99)^99)^99', '1' + '+1' * 250, 'x' * 590, '\\sqrt{' * 90 + '2' + '}' * 90,
               '-' * 500 + '1', '\\begin{pmatrix}' + '1&' * 200 + '\\end{pmatrix}', '1,' * 290 + '1', '\\{' * 200, '\\text{' * 90, '|' * 300, 'x_{' * 100, '\\boxed{' * 60, '\\pm' * 100,
               '1\\pm' + '1\\pm' * 80 + '1', '=' * 300, 'a<' * 200, '1:' * 250, '\\cup' * 100, '\ud800', '\0' * 50, '\\binom{2000}{1000}' * 9, '2000!' * 30, '\\log_{' * 60, '!' * 400, '%' * 400, '^' * 400,
               '(1+x)^{900}(1+y)^{900}', '\\sin' * 120, "'" * 300, ' ' * 590, '1\ue000000', '\\text{a}^2' * 50 + '$', '1 ft ' * 100, ',' * 500, '\\frac12' * 80, '0.\\overline{' + '3' * 500 + '}', '\\' * 300]
    for text in hostile:
        for a in (text, text * 40):  # within the bounds, and far beyond
            start = time.process_time()
            assert not R.equal(a, '77') and not R.equal('77', a), text[:20]
            R.equal(a, text), R.equal(text, '(' + text + ')'), R.reward('', f'\\boxed{{{a}}} #### {a} the answer is {a}', {'answer': '77'})
            assert time.process_time() - start < 2, text[:20]  # CPU seconds: milliseconds as a rule


# ---- prepare.py ------------------------------------------------------------------------------------------------------

MATH = [{'problem': f'What is ${i}+{i}$? Say it as a number, please, and nothing more.', 'level': f'Level {1 + i % 5}', 'type': 'Algebra', 'solution': f'It is $\\boxed{{{2 * i}}}$.'} for i in range(40)]


def rows(folder, name):
    return list(load_dataset(str(folder / f'{name}.jsonl')))


def test_prepare_math(tmp_path, monkeypatch, capsys):
    test = [{'problem': MATH[3]['problem'], 'answer': '6', 'subject': 'Algebra', 'level': 2}]
    prepare('math', monkeypatch, src=jsonl(tmp_path / 'a.jsonl.gz', MATH + MATH[:5]), test=jsonl(tmp_path / 'b.jsonl', test), out_dir=tmp_path / 'o')
    train, held = rows(tmp_path / 'o', 'train'), rows(tmp_path / 'o', 'test')
    assert len(train) == 39 and [r['answer'] for r in held] == ['6'] and '5 standing twice, 1 of train that stand in test' in capsys.readouterr().out
    assert train[1]['answer'] == '2' and train[1]['level'] == 2 and train[1]['prompt'][0]['content'].endswith('within \\boxed{}.')
    sft = rows(tmp_path / 'o', 'sft_train') + rows(tmp_path / 'o', 'sft_val')
    assert len(sft) == 39 and all(R.reward('', r['completion'][0]['content'], {'answer': R.boxed(r['completion'][0]['content'])}) == 1 for r in sft)
    prepare('math', monkeypatch, src=str(tmp_path / 'a.jsonl.gz'), out_dir=tmp_path / 'p', form='text', levels='1,2', val=0.25)
    kept = rows(tmp_path / 'p', 'train') + rows(tmp_path / 'p', 'test')
    assert len(kept) == 16 and {r['level'] for r in kept} == {1, 2} and len(rows(tmp_path / 'p', 'test')) == 4 and kept[0]['prompt'].startswith('Problem: What')


def test_prepare_the_forms_of_others(tmp_path, monkeypatch):
    dapo = [{'prompt': f'Please solve: {MATH[i]["problem"]} Return it in \\boxed{{}} tags.', 'answer': f'\\boxed{{{2 * i}}}'} for i in range(5)]
    verl = [{'data_source': 'x', 'prompt': [{'role': 'user', 'content': f'Question {i}: how much is it, said in full and in order?'}], 'reward_model': {'ground_truth': str(i), 'style': 'rule'}} for i in range(5)]
    gsm = [{'question': f'{i} and {i}?', 'answer': f'It is {2 * i}.\n#### {2 * i}'} for i in range(5)]
    asdiv = [{'body': f'Tom has {i} apples.', 'question': 'How many?', 'answer': f'{i} (apples)'} for i in range(5)]
    for name, part, form in (('dapo', dapo, 'asis'), ('verl', verl, 'chat'), ('gsm', gsm, 'text'), ('asdiv', asdiv, 'chat')):
        prepare('math', monkeypatch, src=jsonl(tmp_path / f'{name}.jsonl', part + [{k: None for k in part[0]}]), out_dir=tmp_path / name, form=form, val=0.2)
        made = rows(tmp_path / name, 'train') + rows(tmp_path / name, 'test')
        assert len(made) == 5 and len(rows(tmp_path / name, 'test')) == 1 and all(R.reward('', f'\\boxed{{{R.clean(r["answer"])}}}', r) == 1 for r in made)
    prepare('math', monkeypatch, src=str(tmp_path / 'dapo.jsonl'), test=jsonl(tmp_path / 't.jsonl', MATH[2:4]), out_dir=tmp_path / 'q', form='asis')
    assert len(rows(tmp_path / 'q', 'train')) == 3  # the two that stand in the test inside an instruction of their own are gone


@pytest.mark.parametrize('options, says', [(dict(form='x'), 'expected chat, text or asis'), (dict(src='nothere.jsonl'), 'no such file')])
def test_prepare_mistakes(options, says, monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit) as e:
        prepare('math', monkeypatch, out_dir=tmp_path, **{'src': jsonl(tmp_path / 'a.jsonl', MATH), **options})
    assert e.value.code == 2 and says in capsys.readouterr().err
