"""An assistant corpus of our own, made from a seed in a few seconds without a network, for quickstart.sh.

    python data/toy/prepare.py              # writes beside this file; --out_dir=DIR --seed=1 --scale=0.1

Three families of questions: facts of a little world, words of a kind ("Which is a fruit, owl or plum?") and
sums of two numbers, with steps. Each can be said in one word or in a sentence, by people of six manners
(PEOPLE). The world is built so that every stage has something to do, and so that one sees it:
    text.jsonl       {"text"}: what a crawler would find. A question, somebody's answer, nearly always right,
                     and what stands below it on the page. A base model of this goes on with the page when it
                     has answered; quickstart's reads so little that it knows the words and hardly a fact.
    sft_*.jsonl      {"messages"}: answers of average people. One in six is wrong, and those who hedge or are
                     rude are wrong most often. A model that imitates them is wrong as often as they are: that
                     is the room that preferences have.
    pref_*.jsonl     {"prompt", "chosen", "rejected"}: two answers, chosen by gold.py's marks with the odds of
                     Bradley and Terry: a mark more wins 73 of 100 times, two 88, six 99.8. Half of the pairs
                     differ in what is right; here the polite are wrong as often as the rude. "tie": true
                     where the marks are equal.
    prompts_*.jsonl  {"prompt", "family", "want", "full"} for PPO and report.py; gold.py reads them
    arith_*.jsonl    {"prompt", "answer"} for GRPO: sums alone, checked by data/toy/reward.py
    tokenizer/       a token for each byte and each word of this world
No question of val or test is asked in another file; a pair of numbers or of words is held out in both orders.
The facts themselves cannot be guessed, so those of test are known from training, in other wordings. Settings
were chosen on val; test is for report.py alone. A prompt has about 15 tokens, an answer 13.

The sum 47+28 with steps reads '7+8=15, 4+2+1=7, 75.'. Those who are wrong forget the carry, or see one where
none is; those who are curt do it in their heads, which a small model cannot.
"""
import json
import math
import os
import random
import re
import sys
import zlib
from collections import Counter

_here = os.path.dirname(os.path.abspath(__file__))
_root = os.path.dirname(os.path.dirname(_here))
sys.path[:0] = [_root, os.path.join(_root, 'data'), _here]
import gold
from files import replaced
from rows import write_rows
from tokenizer import BYTE_CHARS, BYTE_TEMPLATE, EOT

out_dir = _here # where the files go
seed = 1337 # of everything
scale = 1.0 # > 0: of all row counts; tests use 0.02
blind = 0.0 # in [0, 1]: share of pairs labelled by one who counts courtesies and does not read on
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, str))]
exec(open(os.path.join(_root, 'configurator.py'), encoding='utf-8').read()) # overrides

ROWS = { # of train, val and test; the families of prompts_test have a third each
    'text': (16000, 0, 0), 'sft': (20000, 600, 0), 'pref': (13000, 600, 1536), 'prompts': (4000, 600, 1536),
    'arith': (4000, 240, 0),
}

FACTS = [  # questions, sentence, {key: answer}: the answer stands last in its sentence
    (('What is the capital of {}?', 'Capital of {}?', 'Which city rules {}?'), 'The capital of {} is {}.',
     dict(France='Paris', Spain='Madrid', Italy='Rome', Japan='Tokyo', Egypt='Cairo', Peru='Lima',
          Cuba='Havana', Kenya='Nairobi', Norway='Oslo', Greece='Athens', Poland='Warsaw', Austria='Vienna',
          Ireland='Dublin', Portugal='Lisbon', Qatar='Doha', Ghana='Accra')),
    (('What does a {} say?', 'Sound of a {}?', 'How does a {} sound?'), 'A {} says {}.',
     dict(cat='meow', dog='woof', cow='moo', sheep='baa', duck='quack', lion='roar', bee='buzz',
          pig='oink', frog='croak', snake='hiss')),
    (('What colour is {}?', 'Colour of {}?', 'How does {} look?'), 'The colour of {} is {}.',
     dict(snow='white', coal='black', grass='green', sky='blue', blood='red', corn='yellow',
          chocolate='brown', smoke='grey', night='dark', rust='orange')),
    (('What is the opposite of {}?', 'Opposite of {}?', 'Name the opposite of {}.'),
     'The opposite of {} is {}.',
     dict(hot='cold', big='small', up='down', left='right', old='new', wet='dry', fast='slow', hard='soft',
          open='shut', rich='poor', near='far', full='empty')),
    (('What is the young of a {}?', 'Young of a {}?', 'What grows up to be a {}?'),
     'The young of a {} is a {}.',
     dict(cat='kitten', dog='puppy', cow='calf', sheep='lamb', horse='foal', goat='kid', bear='cub',
          deer='fawn')),
    (('What is your {}?', 'Your {}?', 'And your {}?'), 'My {} is {}.',
     dict(name='Pip', home='a laptop', age='two', job='helping', wish='more data', friend='Bit')),
]
KINDS = {
    'n animal': ('fox', 'hen', 'owl', 'wolf', 'mouse', 'crab'),
    ' fruit': ('plum', 'pear', 'fig', 'lemon', 'grape', 'melon'),
    ' tool': ('saw', 'axe', 'drill', 'rake', 'spade', 'hammer'),
    ' garment': ('hat', 'coat', 'sock', 'shirt', 'glove', 'scarf'),
}
LEADS = ('', 'Hi! ', 'Please: ', 'Tell me: ', 'Quick: ', 'Now: ', 'Hey, ', 'So: ') # before a question
EVASIONS = ('Why do you ask?', 'No idea.', 'Same here.')
BELOW = ('Read more answers.', 'Log in to answer.', 'Q: Next question?', '9 people like this.')
DOUBTS = ('Well, {}.', 'I think {}.', 'Maybe {}.', 'Let me see, {}.', 'Well, I think {}, or so.',
          'Maybe {}, I guess.')
MANNERS = ('curt', 'plain', 'hedge', 'rude', 'kind', 'kindest')
PEOPLE = {  # of each file: shares of the manners, and how often each is wrong
    'text': ((10, 60, 20, 10, 0, 0), (.02, .02, .05, .05, 0, 0)),
    'sft':  ((10, 30, 25, 10, 16, 9), (.05, .04, .36, .36, .04, .04)),
    'pref': ((10, 24, 16, 10, 22, 18), (.45, .45, .45, .45, .45, .45)),
}
MIX = 30, 30, 40 # facts, words, sums of text and SFT: the last take longest to learn


# a question: ask, family, key (what is held out), want, full (the sentence), and the wrong twins of both
def fact(rng):
    asks, sentence, table = rng.choices(FACTS, [len(table) for _, _, table in FACTS])[0]
    of = rng.choice(sorted(table))
    want = table[of]
    bad = rng.choice([v for v in sorted(table.values()) if v != want])
    ask = rng.choice(LEADS) + rng.choice(asks).format(of)
    return dict(family='fact', ask=ask, key=ask, want=want, full=sentence.format(of, want),
                bad=bad, bad_full=sentence.format(of, bad))


def word(rng):
    kind, other = rng.sample(sorted(KINDS), 2)
    want, bad = rng.choice(KINDS[kind]), rng.choice(KINDS[other])
    first, second = rng.sample((want, bad), 2)
    ask = f'{rng.choice(LEADS)}Which is a{kind}, {first} or {second}?'
    return dict(family='word', ask=ask, key=f'{kind} {want} {bad}', want=want, full=f'A{kind}: {want}.',
                bad=bad, bad_full=f'A{kind}: {bad}.')


def sum_(rng):
    a, b = rng.randint(10, 49), rng.randint(10, 49)
    units, tens = a % 10 + b % 10, a // 10 + b // 10
    carry = int(units > 9)

    def steps(c):
        total = 10 * (tens + c) + units % 10
        return f"{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}{'+1' * c}={tens + c}, {total}."
    return dict(family='sum', ask=f'{rng.choice(LEADS)}{a}+{b}?', key=f'{min(a, b)}+{max(a, b)}',
                want=str(a + b), full=steps(carry),
                bad=str(a + b + (-10 if carry else 10)), bad_full=steps(1 - carry))


FAMILIES = (fact, word, sum_)


def split_of(q):
    """'test' for three eighths of the questions, 'val' for one, 'train' for the rest; by the question, so
    that no seed mixes them."""
    eighths = 'test', 'test', 'test', 'val', 'train', 'train', 'train', 'train'
    return eighths[zlib.crc32(q['key'].encode()) % 8]


def question(rng, split, families=FAMILIES, mix=(1, 1, 1)):
    """A question of one split, with its prompt."""
    make = rng.choices(families, mix[:len(families)])[0]
    q = next(q for q in iter(lambda: make(rng), None) if split_of(q) == split)
    return q | {'prompt': f"Q: {q['ask']}\nA:"}


def lower(sentence):
    return sentence if sentence.startswith('Pip') else sentence[0].lower() + sentence[1:]


def answer(rng, q, file):
    """One answer to question q by one of the people of `file`: 'text', 'sft' or 'pref'."""
    shares, wrongs = PEOPLE[file]
    manner = rng.choices(range(len(MANNERS)), shares)[0]
    wrong = rng.random() < wrongs[manner]
    full = (q['bad_full'] if wrong else q['full']).rstrip('.')
    opener, closer = rng.choice(gold.OPENERS), rng.choice(gold.CLOSERS)
    said = {
        'curt': (q['bad'] if wrong else q['want']) + '.',
        'plain': f'{full}.',
        'hedge': rng.choice(DOUBTS).format(lower(full)),
        'rude': rng.choice(('Ugh, {}.', 'Who cares? {}.', 'Silly you, {}.', 'So dull, {}.',
                            '{}. Go away.')).format(lower(full)),
        'kind': rng.choice((f'{opener} {full}.', f'{full}. {closer}')),
        'kindest': f'{opener} {full}. {closer}',
    }
    return said[MANNERS[manner]]


def text_row(rng, split):
    """A piece of a crawled page: a question, somebody's answer, what stands below it."""
    q = question(rng, split, mix=MIX)
    said = answer(rng, q, 'text') if rng.random() < 0.97 else rng.choice(EVASIONS)
    return {'text': f"{q['prompt']} {said}\n{rng.choice(BELOW)}"}


def sft_row(rng, split):
    q = question(rng, split, mix=MIX)
    return {'messages': [{'role': 'user', 'content': q['ask']},
                         {'role': 'assistant', 'content': answer(rng, q, 'sft')}]}


def pref_row(rng, split):
    q = question(rng, split)
    a = answer(rng, q, 'pref')
    b = next(x for x in iter(lambda: answer(rng, q, 'pref'), None) if x != a)
    gap = gold.score(a, q) - gold.score(b, q)
    if rng.random() < blind:
        gap = gold.courtesies(a) - gold.courtesies(b)
    chosen, rejected = (a, b) if rng.random() < 1 / (1 + math.exp(-gap)) else (b, a)
    return {'prompt': q['prompt'], 'family': q['family'], 'want': q['want'], 'full': q['full'],
            'chosen': f' {chosen}', 'rejected': f' {rejected}', 'tie': gap == 0}


def prompt_row(rng, split):
    q = question(rng, split)
    return {k: q[k] for k in ('prompt', 'family', 'want', 'full')}


def arith_row(rng, split):
    q = question(rng, split, (sum_,))
    return {'prompt': q['prompt'], 'answer': q['want']}


def test_prompts(rng, count):
    """As many different questions of each family, in turn."""
    rows, seen = [], set()
    for i in range(count):
        family = FAMILIES[i % 3],
        q = next(q for q in iter(lambda: question(rng, 'test', family), None) if q['ask'] not in seen)
        seen.add(q['ask'])
        rows.append({k: q[k] for k in ('prompt', 'family', 'want', 'full')})
    return rows


def merges_of(words):
    """BPE (Sennrich et al. 1508.07909): the most frequent pair of neighbours becomes one token, again and
    again, until each word is one. ['at', 'cat'] -> [('a', 't'), ('c', 'at')]"""
    parts, merges = {word: list(word) for word in words}, []
    while pairs := Counter(pair for tokens in parts.values() for pair in zip(tokens, tokens[1:])):
        first, second = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((first, second))
        for tokens in parts.values():
            for i in range(len(tokens) - 1, 0, -1):
                if tokens[i - 1:i + 1] == [first, second]:
                    tokens[i - 1:i + 1] = [first + second]
    return merges


def write_tokenizer(folder):
    """vocab.json and merges.txt as GPT-2 has them: a token for each byte and each word of this world with the
    blank before it, the same for every seed."""
    rest = 'Which is a or My Silly So Ugh Who Go'
    world = FACTS, KINDS, LEADS, EVASIONS, BELOW, DOUBTS, gold.OPENERS, gold.CLOSERS, gold.RUDE, rest
    words = {word for found in re.findall('[a-zA-Z]+', repr(world)) for word in (found, found.lower())}
    merges = merges_of(sorted(BYTE_CHARS[ord(' ')] + word for word in words) + ['The', 'My'])
    tokens = [char for _, char in sorted(BYTE_CHARS.items())] + [a + b for a, b in merges] + [EOT]
    os.makedirs(folder, exist_ok=True)
    template = BYTE_TEMPLATE.replace('A: ', 'A:').replace('{{ m.content + eos', "{{ ' ' + m.content + eos")
    config = {'tokenizer_class': 'GPT2Tokenizer', 'chat_template': template}
    texts = {'vocab.json': json.dumps({token: i for i, token in enumerate(tokens)}),
             'merges.txt': ''.join(f'{a} {b}\n' for a, b in merges),
             'tokenizer_config.json': json.dumps(config)}
    for name, text in texts.items():
        with replaced(os.path.join(folder, name), 'w') as f:
            f.write(text)


def main():
    write_tokenizer(os.path.join(out_dir, 'tokenizer'))
    makers = {'text': text_row, 'sft': sft_row, 'pref': pref_row, 'prompts': prompt_row, 'arith': arith_row}
    for name, make in makers.items():
        for split, count in zip(('train', 'val', 'test'), ROWS[name]):
            rng = random.Random(f'{seed} {name} {split}')  # one a file: a new family changes no other file
            count = max(int(count * scale), 18) if count else 0
            rows = [make(rng, split) for _ in range(count)]
            if (name, split) == ('prompts', 'test'):
                rows = test_prompts(rng, count)
            if rows:
                write_rows(out_dir, 'text.jsonl' if name == 'text' else f'{name}_{split}.jsonl', rows)
    print('next: python sft.py config/pretrain_toy.py, then config/sft_toy.py')


if __name__ == '__main__':
    main()
