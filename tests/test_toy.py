"""The toy world: what prepare.py writes, and the gold scorer rule by rule."""
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys

import pytest

from conftest import ROOT

TOY = os.path.join(ROOT, 'data', 'toy')
sys.path.insert(0, TOY)
import gold

spec = importlib.util.spec_from_file_location('toy_prepare', os.path.join(TOY, 'prepare.py'))
toy = importlib.util.module_from_spec(spec)
spec.loader.exec_module(toy)


def prepare(folder, *args):
    run = subprocess.run([sys.executable, os.path.join(TOY, 'prepare.py'), f'--out_dir={folder}', *args], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return {f: (folder / f).read_bytes() for f in sorted(os.listdir(folder))}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp('toy'), '--scale=0.1')


def rows(files, name):
    return [json.loads(line) for line in files[f'{name}.jsonl'].decode().splitlines()]


def test_same_seed_same_bytes(files, tmp_path):
    again, other = prepare(tmp_path / 'a', '--scale=0.1'), prepare(tmp_path / 'b', '--scale=0.1', '--seed=1')
    assert again == files and all(other[f] != files[f] for f in files)
    assert not [f for f in files if f.endswith('.tmp')]


def test_bad_argument_is_one_line():
    run = subprocess.run([sys.executable, os.path.join(TOY, 'prepare.py'), '--sead=3'], capture_output=True, text=True)
    assert run.returncode and run.stderr.count('\n') == 1 and "did you mean 'seed'" in run.stderr


def test_rows_have_the_forms_that_the_stages_read(files):
    assert all(set(r) == {'text'} for r in rows(files, 'text'))
    for r in rows(files, 'sft_train') + rows(files, 'sft_val'):
        assert [m['role'] for m in r['messages']] == ['user', 'assistant'] and r['messages'][1]['content'].strip()
    for r in rows(files, 'pref_train') + rows(files, 'pref_val'):
        assert r['prompt'].startswith('Q: ') and r['prompt'].endswith('\nA: ') and r['chosen'] != r['rejected'] and type(r['tie']) is bool
    for r in rows(files, 'prompts_train') + rows(files, 'prompts_val') + rows(files, 'prompts_test'):
        assert set(r) == {'prompt', 'family', 'want'}
    for r in rows(files, 'arith_train') + rows(files, 'arith_val') + rows(files, 'arith_test'):
        a, b = r['prompt'][len('Q: '):-len('?\nA: ')].split('+')
        assert int(a) + int(b) == int(r['answer'])
    assert all(text.isascii() for text in map(bytes.decode, files.values()))  # a byte is a token is a character


def test_texts_are_short_enough_for_a_laptop(files):
    asked = [len(r['prompt']) for r in rows(files, 'prompts_train')]
    answers = [len(r['messages'][1]['content']) for r in rows(files, 'sft_train')]
    assert statistics.median(asked) <= 48 and max(asked) <= 64 and statistics.median(answers) <= 64 and max(answers) < 256


def test_questions_of_val_and_test_are_not_asked_elsewhere(files):
    asked = lambda name: {r.get('prompt') or f"Q: {r['messages'][0]['content']}\nA: " for r in rows(files, name) if r.get('family') not in ('fact', 'story')}
    train = set.union(*(asked(f'{n}_train') for n in ('sft', 'pref', 'prompts', 'arith')))
    val, test = (set.union(*(asked(f'{n}_{split}') for n in names)) for split, names in (('val', ('pref', 'prompts', 'arith')), ('test', ('prompts', 'arith'))))
    assert val and test and not val & train and not test & (train | val)
    assert not any(p in t['text'] for t in rows(files, 'text') for p in asked('arith_val') | asked('arith_test'))


PERU, SUM, TALE = {'family': 'fact', 'want': 'Lima'}, {'family': 'sum', 'want': '75'}, {'family': 'story', 'want': 'sad fox'}


@pytest.mark.parametrize('row, answer, mark', [
    (PERU, 'Sure! The capital of Peru is Lima. Any time!', 10),    # everything
    (PERU, 'Sure! The capital of Peru is Lima.', 9),               # one courtesy less
    (PERU, 'The capital of Peru is Lima.', 8), (PERU, 'Lima.', 6),  # a sentence is worth 2
    (PERU, 'The capital of Peru is Rome.', 2), (PERU, 'The capital of Peru is Limassol.', 2), (PERU, '', 0),
    (PERU, 'Rome, Oslo, Lima, Cairo.', 2),                         # the answer must stand at the end: a list of guesses is wrong
    (PERU, 'Well, I think the capital of Peru is Lima, or so.', 5),  # three hedges
    (PERU, 'Ugh, Lima.', 2), (PERU, 'Lima. Go away.', 2), (PERU, 'Ugh, Rome.', 0),
    (PERU, 'Sure! With joy! The capital of Peru is Lima. Any time!', 9),  # third courtesy
    (PERU, 'Sure! With joy! Sure! The capital of Peru is Lima. Any time! Any time! Any time!', 2.5),  # 6 courtesies and '!', one triple twice
    (PERU, 'The capital of Peru is Lima', 7), (PERU, 'The capital of Peru is Lima.\nQ: And', 0),  # no end; ran on into the next question
    (PERU, 'The capital of Peru is Lima. Yes, the capital of Peru is Lima.', 4),  # four triples again
    (PERU, 'The capital of Peru is ' + 'a' * 9 + ' Lima.', 7), (PERU, 'x ' * 60 + 'is Lima.', 1),
    (SUM, '7+8=15, 4+2+1=7, 75.', 8), (SUM, '75.', 6), (SUM, '7+8=15, 4+2=6, 65.', 2), (SUM, '175.', 2), (SUM, 'With joy! 7+8=15, 4+2+1=7, 75. Any time!', 10),
    (TALE, 'A fox lost its home. The fox sighed all day.', 8), (TALE, 'Sure! A fox lost its home. The fox sighed all day. Any time!', 10),
    (TALE, 'A fox lost its home.', 5), (TALE, 'A cat lost its home. The cat sighed all day.', 7), (TALE, 'A fox danced on a hill. It sang until night.', 6),
    (TALE, 'A fox lost its home. It sang until night.', 6), (TALE, 'A fox lost its home. A fox lost its home.', 2)])
def test_gold_marks(row, answer, mark):
    assert gold.score(answer, row) == mark, gold.marks(answer, row)
    assert gold.reward('Q', answer, row) == mark


def test_gold_bounds_and_types():
    rng = random.Random(0)
    for _ in range(500):
        text = ''.join(rng.choice(['Sure! ', 'a', '\n', '!!!!', 'Lima', ' ', 'ugh, ', '\ud800', '7+', '. ']) for _ in range(rng.randint(0, 40)))
        for row in (PERU, SUM, TALE):
            mark = gold.score(text, row)
            assert type(mark) is float and 0 <= mark <= 10


def test_each_stage_has_something_to_do():
    """Mean gold: crawled text < average people by 1.5, and at least 3 marks of room above them; the good answer of every question gets 8 or more."""
    rng, marks = random.Random(1), {}
    for kind in ('text', 'sft'):
        qs = [toy.question(rng) for _ in range(1500)]
        tail = '\nQ: Another one?' if kind == 'text' else ''  # crawled text runs on
        marks[kind] = statistics.mean(gold.score(toy.answer(rng, q, kind) + tail, q) for q in qs)
    assert marks['text'] + 1.5 < marks['sft'] < 7
    for q in (toy.question(rng) for _ in range(1500)):
        assert gold.score(q['full'], q) >= 8 and gold.score(f"Sure! {q['full']} Any time!", q) == 10, q
        assert not gold.right(q['bad_full'], q), q


def test_labels_are_noisy_as_stated(files):
    pairs = [r for r in rows(files, 'pref_train') if not r['tie']]
    agree = statistics.mean(gold.score(r['chosen'], r) > gold.score(r['rejected'], r) for r in pairs)
    assert 0.87 < agree < 0.95  # 5 % flipped, 8 % by length alone, of which about half agree by luck


def test_arithmetic_trap_is_as_stated():
    """Among SFT answers to a sum: fewer than half of those with a carry keep it, and the right way is always there to be found."""
    rng = random.Random(2)
    qs = [q for q in (toy.sum_(rng) for _ in range(3000)) if q['carry']]
    good = statistics.mean(gold.right(toy.answer(rng, q, 'sft'), q) for q in qs)
    stepped = statistics.mean(q['full'].rstrip('.') in toy.answer(rng, q, 'sft') for q in qs)
    assert 0.2 < good < 0.55 and stepped > 0.12
