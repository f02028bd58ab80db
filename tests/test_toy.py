"""The toy world: what prepare.py writes, the gold scorer rule by rule, the report's numbers."""
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys

import pytest
import torch

from conftest import ROOT

TOY = os.path.join(ROOT, 'data', 'toy')
sys.path.insert(0, TOY)
import gold
import report


def load(name):
    spec = importlib.util.spec_from_file_location(f'toy_{name}', os.path.join(TOY, f'{name}.py'))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy = load('prepare')


def prepare(folder, *args):
    command = [sys.executable, os.path.join(TOY, 'prepare.py'), f'--out_dir={folder}', *args]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return {file.name: file.read_bytes() for file in sorted(folder.glob('*.jsonl'))}


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp('toy'), '--scale=0.2')


def rows(files, name):
    return [json.loads(line) for line in files[f'{name}.jsonl'].decode().splitlines()]


def test_same_seed_same_bytes(files, tmp_path):
    again, other = prepare(tmp_path / 'a', '--scale=0.2'), prepare(tmp_path / 'b', '--scale=0.2', '--seed=1')
    assert again == files and all(other[file] != files[file] for file in files)
    assert not [file for file in files if file.endswith('.tmp')]


@pytest.mark.parametrize('script, option, says', [
    ('prepare.py', '--sead=3', "did you mean 'seed'"), ('prepare.py', '--blind=2', 'in [0, 1]'),
    ('report.py', '--models=sft,ppp', 'out-'), ('report.py', '--seeds=nowhere', 'nowhere')])
def test_a_mistake_is_one_line(script, option, says, tmp_path):
    command = [sys.executable, os.path.join(TOY, script), option]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert ran.returncode == 2 and ran.stderr.count('\n') == 1 and says in ran.stderr, ran.stderr


def test_rows_have_the_forms_that_the_stages_read(files):
    assert all(set(row) == {'text'} for row in rows(files, 'text'))
    for row in rows(files, 'sft_train') + rows(files, 'sft_val'):
        assert [m['role'] for m in row['messages']] == ['user', 'assistant'] and row['messages'][1]['content']
    for row in rows(files, 'pref_train') + rows(files, 'pref_val'):
        assert row['prompt'].startswith('Q: ') and row['prompt'].endswith('\nA:') and row['chosen'][0] == ' '
        assert row['chosen'] != row['rejected'] and type(row['tie']) is bool
    for row in rows(files, 'prompts_train') + rows(files, 'prompts_val') + rows(files, 'prompts_test'):
        assert set(row) == {'prompt', 'family', 'want', 'full'} and gold.score(row['full'], row) == 8
    for row in rows(files, 'arith_train') + rows(files, 'arith_val'):
        a, b = row['prompt'].rstrip('?\nA:').split(' ')[-1].split('+')
        assert int(a) + int(b) == int(row['answer'])
    asked = [len(row['prompt']) for row in rows(files, 'prompts_train')]
    answers = [len(row['messages'][1]['content']) for row in rows(files, 'sft_train')]
    assert max(asked) <= 64 and statistics.median(answers) <= 40 and max(answers) < 96


def test_a_question_of_val_or_test_is_asked_nowhere_else(tmp_path):
    """At full size: three families of 512 different test prompts; a pair of numbers or words in no other
    file, in neither order."""
    files = prepare(tmp_path)

    def asked(row):
        return row.get('prompt') or f"Q: {row['messages'][0]['content']}\nA:"

    def kernel(prompt):  # the question without its lead, the pair in one order; a fact as it is worded
        words = prompt[3:].rstrip('?\nA:').replace('?', '').replace(',', '').split(' ')
        if '+' in words[-1]:
            return tuple(sorted(words[-1].split('+')))
        if ' or ' in prompt:
            return tuple(sorted((words[-1], words[-3]))) + (words[-4],)
        return prompt
    seen = {'train': set(), 'val': set(), 'test': set()}
    for name in files:
        split = name.split('_')[-1].removesuffix('.jsonl')
        if split in seen:
            seen[split] |= {kernel(asked(row)) for row in rows(files, name.removesuffix('.jsonl'))}
    for part in rows(files, 'text'):
        seen['train'].add(kernel(part['text'].split('\nA:')[0] + '\nA:'))
    assert all(len(part) > 300 for part in seen.values())
    assert not seen['train'] & seen['val'] and not (seen['train'] | seen['val']) & seen['test']
    test = rows(files, 'prompts_test')
    assert len({row['prompt'] for row in test}) == len(test)
    assert [row['family'] for row in test] == ['fact', 'word', 'sum'] * 512


PERU = {'want': 'Lima', 'full': 'The capital of Peru is Lima.'}
SUM = {'want': '75', 'full': '7+8=15, 4+2+1=7, 75.'}


@pytest.mark.parametrize('row, answer, mark', [
    (PERU, 'Sure! The capital of Peru is Lima. Any time!', 10), (PERU, 'Sure! The capital is Lima', 7),
    (PERU, 'The capital of Peru is Lima.', 8), (PERU, 'Lima.', 7), (PERU, 'the capital is Lima', 6),
    (PERU, 'The capital of Peru is Rome.', 1), (PERU, 'The capital of Peru is Limassol.', 1), (PERU, '', 0),
    # neither a list of guesses nor a hint is an answer, and courtesies alone are worth little
    (PERU, 'Sure! Rome, Paris, Lima. Any time!', 3), (PERU, 'Sure! Anything but Lima. Any time!', 3),
    (PERU, 'Sure! Any time!', 3), (PERU, 'Lima Lima Lima Lima Lima Lima Lima.', 1), (PERU, 'Lima is.', 1),
    (PERU, 'Well, I think the capital of Peru is Lima, or so.', 6), (PERU, 'Maybe Lima.', 6),  # -2 at most
    (PERU, 'Ugh, Lima.', 5), (PERU, 'Lima. Go away.', 5), (PERU, 'Ugh, Rome.', 0),
    (PERU, 'Sure! With joy! The capital of Peru is Lima. Any time!', 9),  # a third courtesy
    (PERU, 'Sure! With joy! Sure! Lima. Any time! Any time! Any time!', 6),
    (PERU, 'The capital of Peru is Lima.\nQ: And', 0), (PERU, 'Lima' + ' ' * 130 + '.', 6),
    (SUM, '7+8=15, 4+2+1=7, 75.', 8), (SUM, '75.', 7), (SUM, '7+8=15, 4+2=6, 65.', 1), (SUM, '175.', 1),
    (SUM, '74, 75.', 1), (SUM, 'With joy! 7+8=15, 4+2+1=7, 75. Any time!', 10), (dict(want='75'), '75.', 8)])
def test_gold_marks(row, answer, mark):
    assert gold.score(answer, row) == mark, gold.marks(answer, row)
    assert gold.reward('Q', answer, row) == mark


def test_gold_is_bounded_and_a_right_answer_is_above_a_wrong_one():
    rng = random.Random(0)
    parts = ['Sure! ', 'a', '\n', '!!!!', 'Lima', ' ', 'ugh, ', '\ud800', '7+', '. ']
    for _ in range(500):
        mark = gold.score(''.join(rng.choices(parts, k=rng.randint(0, 40))), PERU)
        assert type(mark) is float and 0 <= mark <= 10
    for _ in range(2000):
        q = toy.question(rng, rng.choice(('train', 'val', 'test')))
        said = [toy.answer(rng, q, file) for file in ('sft', 'pref', 'text')]
        right = [gold.score(text, q) for text in said if gold.right(text, q)]
        wrong = [gold.score(text, q) for text in said if not gold.right(text, q)]
        assert min(right, default=9) >= 5 > 3 >= max(wrong, default=0)
        assert gold.score(f"Sure! {q['full']} Any time!", q) == 10 and not gold.right(q['bad_full'], q)


def test_each_stage_has_something_to_do(files):
    """Text is right; people are wrong in one of six answers, those who hedge most; half of the pairs differ
    in what is right, the chosen one is right in nearly all of them, and manners say nothing about it."""
    rng = random.Random(1)
    shares = {}
    for file in ('text', 'sft'):
        asked = [toy.question(rng, 'train') for _ in range(3000)]
        shares[file] = statistics.mean(gold.right(toy.answer(rng, q, file), q) for q in asked)
    assert shares['text'] > 0.95 and 0.81 < shares['sft'] < 0.88
    pairs = [row for row in rows(files, 'pref_train') if not row['tie']]
    differ = [row for row in pairs if gold.right(row['chosen'], row) != gold.right(row['rejected'], row)]
    assert 0.4 < len(differ) / len(pairs) < 0.65
    assert 0.97 < statistics.mean(gold.right(row['chosen'], row) for row in differ) < 1
    close = [gold.score(row['chosen'], row) - gold.score(row['rejected'], row) for row in pairs]
    assert 0.65 < statistics.mean(gap > 0 for gap in close if abs(gap) == 1) < 0.81  # 0.73
    kind = [gold.courtesies(row['chosen']) > gold.courtesies(row['rejected']) for row in differ]
    assert 0.2 < statistics.mean(kind) < 0.5


def test_a_blind_labeller_counts_courtesies(tmp_path):
    files = prepare(tmp_path, '--scale=0.2', '--blind=1')
    pairs = [row for row in rows(files, 'pref_train') if not row['tie']]
    more = [gold.courtesies(row['chosen']) > gold.courtesies(row['rejected']) for row in pairs]
    right = [gold.right(row['chosen'], row) - gold.right(row['rejected'], row) for row in pairs]
    assert 0.7 < statistics.mean(more) < 0.9 and abs(statistics.mean(right)) < 0.06


def test_log_probs_of_a_reply():
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig(arch='qwen3', vocab_size=20, block_size=32, n_layer=1, n_head=2, n_embd=16)).eval()
    prompts, replies = [[1, 2], [3], [4, 5, 6]] * 30, [[7, 8, 9], [1, 2], [5]] * 30
    want = []
    for p, r in zip(prompts, replies):
        logits, _ = model(torch.tensor([p + r]))
        logp = logits[0].log_softmax(-1)
        want.append(sum(logp[len(p) - 1 + i, token] for i, token in enumerate(r)).item())
    assert report.sequence_logps(model, prompts, replies).tolist() == pytest.approx(want, abs=1e-4)


def test_seeds_are_put_together():
    reports = [{'sft': dict.fromkeys(report.FORMS, number)} for number in (0.3, 0.1, 0.2)]
    cells = report.put_together(reports)
    assert cells['sft']['right'] == '10.0% / 20.0% / 30.0%'
    assert '| sft | 10.0% / 20.0%' in report.markdown(cells)


def test_a_word_is_a_token_for_every_seed(files, tmp_path_factory):
    from tokenizer import get_tokenizer
    folders = [tmp_path_factory.mktemp('words') for _ in range(2)]
    for folder, seed in zip(folders, (1, 2)):
        prepare(folder, '--scale=0.02', f'--seed={seed}')
    first, second = (get_tokenizer(str(folder / 'tokenizer')) for folder in folders)
    said = ' Sure! My friend is Bit, or so.'
    assert [first.decode([i]) for i in first.encode(said)] == [
        ' Sure', '!', ' My', ' friend', ' is', ' Bit', ',', ' or', ' so', '.']
    for row in rows(files, 'pref_train'):
        ids = first.encode(row['prompt'] + row['chosen'])
        assert first.decode(ids) == row['prompt'] + row['chosen'] and ids == second.encode(first.decode(ids))
        assert len(ids) < 64 and ids == first.encode(row['prompt']) + first.encode(row['chosen'])
    asked = first.apply_chat_template([{'role': 'user', 'content': '1+2?'}])
    assert first.decode(asked) == 'Q: 1+2?\nA:'
