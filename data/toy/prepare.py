"""An assistant corpus of our own, made from a seed in a few seconds without a network, for quickstart.sh.

    python data/toy/prepare.py              # writes beside this file; --out_dir=DIR --seed=1 --scale=0.1

Four families of questions: facts (small talk on a little embedded world), string and list tasks, sums of two
numbers with steps, two-sentence stories with a mood. Each answer has a style. The world is built so that
every stage has something to do, and so that one sees it:
    text.jsonl              {"text"}: what a crawler would find. Threads of questions with answers, mostly
                            right, some rude or hedging, none with an end; bare statements. A base model of
                            this knows things, and goes on to ask the next question itself.
    sft_{train,val}.jsonl   {"messages"}: answers of average people: short, hedging, some kind, some wrong
                            (STYLES below).
    pref_{train,val}.jsonl  {"prompt", "chosen", "rejected"}: two answers, labelled by gold.py; 5 % of the
                            labels are flipped and 8 % come from a labeller who only skims: the longer answer
                            wins. "tie": true where gold sees no difference.
    prompts_{train,val}.jsonl  {"prompt", "family", "want"} for PPO; the row is what gold.py needs for a mark
    arith_{train,val}.jsonl    {"prompt", "answer"} for GRPO; data/toy/reward.py checks them
    {prompts,arith}_test.jsonl the same for report.py alone: no setting was ever chosen on them
Strings and sums of val and test are not in train, nor in each other (facts and stories are: a fact cannot be
guessed). Sizes: byte tokens, a prompt about 30, an answer about 40.

Arithmetic, the honest trap: a sum with steps reads '7+8=15, 4+2+1=7, 75.'. In SFT data most people forget the
carry ('4+2=6, 65.'), and some just say a number. A model that imitates them is right in 30 to 50 of 100,
though it has seen how it is done: RL finds that out.
"""
import os
import random
import sys

_here = os.path.dirname(os.path.abspath(__file__))
_root = os.path.dirname(os.path.dirname(_here))
sys.path[:0] = [_root, os.path.join(_root, 'data'), _here]
import gold
from rows import write_rows

out_dir = _here # where the files go
seed = 1337 # of everything
scale = 1.0 # > 0: of all row counts; tests use 0.02
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, str))]
exec(open(os.path.join(_root, 'configurator.py'), encoding='utf-8').read()) # overrides

# rows of train; val and test are a sixteenth each
ROWS = {'text': 9000, 'sft': 10000, 'pref': 6000, 'prompts': 4000, 'arith': 4000}

FACTS = [  # questions, sentence, {key: answer}: the answer stands last in its sentence
    (('What is the capital of {}?', 'Capital of {}?'), 'The capital of {} is {}.',
     dict(France='Paris', Spain='Madrid', Italy='Rome', Japan='Tokyo', Egypt='Cairo', Peru='Lima',
          Cuba='Havana', Kenya='Nairobi',
          Norway='Oslo', Greece='Athens', Poland='Warsaw', Austria='Vienna', Ireland='Dublin',
          Portugal='Lisbon')),
    (('What does a {} say?', 'Sound of a {}?'), 'A {} says {}.',
     dict(cat='meow', dog='woof', cow='moo', sheep='baa', duck='quack', lion='roar', bee='buzz', pig='oink',
          frog='croak', snake='hiss')),
    (('What colour is {}?', 'Colour of {}?'), 'The colour of {} is {}.',
     dict(snow='white', coal='black', grass='green', sky='blue', blood='red', corn='yellow',
          chocolate='brown', smoke='grey')),
    (('What is the opposite of {}?', 'Opposite of {}?'), 'The opposite of {} is {}.',
     dict(hot='cold', big='small', up='down', day='night', old='new', wet='dry', fast='slow', hard='soft',
          open='shut', rich='poor')),
    (('What is your {}?', 'Tell me your {}.'), 'My {} is {}.',
     dict(name='Pip', home='a laptop', age='two', job='helping', wish='more data', friend='Bit')),
]
ANIMALS = ('fox', 'cat', 'dog', 'hen', 'owl', 'bear', 'wolf', 'frog', 'mouse', 'goat')
STORY = {  # mood: first sentences, second sentences
    'happy': (('The {} danced on a hill.', 'A {} found a sweet cake.', 'One sunny day a {} sang.',
               'A {} met a friend and smiled.'),
              ('The {} laughed all day.', 'It sang until night.', 'The {} was glad.',
               'All the others danced.')),
    'sad': (('A {} lost its home.', 'The {} sat alone in the rain.', 'One grey day a {} cried.',
             'A {} had no friend and wept.'),
            ('The {} sighed all day.', 'It cried until night.', 'The {} was alone.', 'Its tears fell.')),
    'scary': (('A {} went into a dark cave.', 'The {} saw a ghost.', 'One dark night a {} howled.',
               'A {} found old bones.'),
              ('The {} trembled.', 'It screamed until dawn.', 'Claws came near.', 'The ghost was near.')),
}
CONSONANTS, VOWELS = 'bcdfghklmnprstw', 'aeiou'
#          curt  plain hedge rude ramble kind1 kind2 gush   share of answers with wrong content
STYLES = {
    'text': ((12, 58, 12, 12, 6, 0, 0, 0), 0.03),
    'sft':  ((28, 26, 20, 5, 6, 9, 4, 2), 0.08),
    'pref': ((22, 22, 16, 8, 8, 14, 10, 0), 0.20),
}
NAMES = ('curt', 'plain', 'hedge', 'rude', 'ramble', 'kind1', 'kind2', 'gush')
#      fact string sum story   shares of the questions; sums take the longest to learn
MIX = {'text': (26, 20, 42, 12), 'sft': (26, 22, 40, 12), 'pref': (30, 25, 25, 20)}
# shares of the answers to a sum: with steps; a carry, if there is one, kept; none made up if there is none
SUMS = {'text': (1.0, 0.95, 1.0), 'sft': (0.75, 0.35, 0.8), 'pref': (0.75, 0.5, 0.8)}


def word(rng, n):
    return ''.join(rng.choice(VOWELS if i % 2 else CONSONANTS) for i in range(n))


# a question: prompt, family, want, and for the answer: `full` sentence, `short` answer, their wrong twins
def fact(rng):
    asks, sentence, table = rng.choices(FACTS, [len(t) for _, _, t in FACTS])[0]
    key = rng.choice(sorted(table))
    other = rng.choice([v for k, v in sorted(table.items()) if k != key])
    return dict(family='fact', ask=rng.choice(asks).format(key), want=table[key],
                full=sentence.format(key, table[key]),
                bad=other, bad_full=sentence.format(key, other))


def string(rng):
    kind = rng.choice(('letter', 'letter', 'item', 'reverse', 'count'))
    end = rng.choice(('first', 'last'))
    w, items = word(rng, 3), rng.sample(ANIMALS, rng.randint(2, 4))
    while w == w[::-1]:
        w = word(rng, 3)
    if kind == 'letter':
        want, bad = (w[0], w[1]) if end == 'first' else (w[2], w[1])
        ask, full = f'{end.capitalize()} letter of {w}?', f'The {end} letter of {w} is {{}}.'
    elif kind == 'item':
        want, bad = (items[0], items[1]) if end == 'first' else (items[-1], items[-2])
        ask, full = f"{end.capitalize()} of {' '.join(items)}?", f'The {end} one is {{}}.'
    elif kind == 'reverse':
        want, bad, ask, full = w[::-1], w[1] + w[0] + w[2], f'Reverse {w}.', f'The reverse of {w} is {{}}.'
    else:
        want, bad = str(len(items)), str(len(items) + rng.choice((-1, 1)))
        ask, full = f"Count {' '.join(items)}.", 'The number of words is {}.'
    return dict(family='string', ask=ask, want=want, full=full.format(want), bad=bad,
                bad_full=full.format(bad))


def sum_(rng):
    a, b = rng.randint(10, 49), rng.randint(10, 49)
    units, tens, carry = a % 10 + b % 10, a // 10 + b // 10, int(a % 10 + b % 10 > 9)
    def steps(c):
        total = 10 * (tens + c) + units % 10
        return f"{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}{'+1' * c}={tens + c}, {total}."
    wrong = 0 if carry else 1  # with a carry: forget it; without: see one where there is none
    return dict(family='sum', ask=f'{a}+{b}?', want=str(a + b), full=steps(carry), carry=carry,
                bad=str(a + b - 10 if carry else a + b + 10), bad_full=steps(wrong))


def story(rng):
    mood, animal = rng.choice(sorted(STORY)), rng.choice(ANIMALS)
    def tell(m, x):
        first, second = (rng.choice(s).format(x) for s in STORY[m])
        return f'{first} {second}'
    good = tell(mood, animal)
    bad = tell(rng.choice([m for m in sorted(STORY) if m != mood]), animal) if rng.random() < 0.7 else \
        tell(mood, rng.choice([x for x in ANIMALS if x != animal]))
    return dict(family='story', ask=f'Tell a {mood} story about a {animal}.', want=f'{mood} {animal}',
                full=good,
                bad_full=bad, short=good.split('. ')[0], bad=bad.split('. ')[0])


FAMILIES = (fact, string, sum_, story)


def lower(s):
    return s if s[:3] == 'Pip' else s[0].lower() + s[1:]


def answer(rng, q, kind):
    """One answer to question q in a style drawn for `kind` ('text', 'sft', 'pref'), wrong with that kind's
    share."""
    weights, wrong_share = STYLES[kind]
    style, wrong = rng.choices(NAMES, weights)[0], rng.random() < wrong_share
    if q['family'] == 'sum':  # the question here is whether steps are shown and the carry is kept
        steps, keeps, leaves = SUMS[kind]
        if rng.random() < steps:
            short, full = '', q['full'] if rng.random() < (keeps if q['carry'] else leaves) else q['bad_full']
            style = {'curt': 'plain', 'ramble': 'plain'}.get(style, style)
        else:  # a number out of the head: often wrong
            short = full = q['bad'] if rng.random() < 0.5 else q['want']
    else:
        short, full = (q['bad'], q['bad_full']) if wrong else (q.get('short', q['want']), q['full'])
    full = full.rstrip('.')
    if style == 'curt':
        return f'{short or full}.'
    if style == 'plain':
        return f'{full}.'
    if style == 'hedge':
        hedge = rng.choice(('Well, {}.', 'I think {}.', 'Maybe {}.', 'Let me see, {}.',
                            'Well, I think {}, or so.', 'You know, {}, I guess.'))
        return hedge.format(lower(full))
    if style == 'rude':
        return rng.choice(('Ugh, {}.', 'Who cares? {}.', 'Silly you, {}.', 'So dull, {}.',
                           '{}. Go away.')).format(lower(short or full))
    if style == 'ramble':
        return f'{full}. Yes, {lower(full)}. {full}.' if rng.random() < 0.5 else f'{full}. {full}.'
    opener, closer = rng.choice(gold.OPENERS), rng.choice(gold.CLOSERS)
    if style == 'kind1':
        return f'{opener} {full}.' if rng.random() < 0.5 else f'{full}. {closer}'
    if style == 'kind2':
        return f'{opener} {full}. {closer}'
    return ' '.join([opener, *rng.sample(gold.OPENERS, rng.randint(1, 2)), full + '.', closer,
                     *rng.sample(gold.CLOSERS, rng.randint(0, 2))])


def split_of(q):
    """'val' and 'test' for a sixteenth each of the sums and string tasks, 'train' for the others, 'any' for
    facts and stories (too few to spare any). Decided by the question, so that no seed mixes them."""
    if q['family'] not in ('string', 'sum'):
        return 'any'
    return {0: 'val', 8: 'test'}.get(sum(i * ord(c) for i, c in enumerate(q['ask'], 1)) % 16, 'train')


def question(rng, split=None, kind='sft', families=FAMILIES):
    """A question with its prompt, of one split ('train', 'val', 'test'; None: any). Families are shared out
    by MIX[kind]."""
    family = rng.choices(families, [MIX[kind][FAMILIES.index(f)] for f in families])[0]
    while True:
        q = family(rng)
        if split is None or split_of(q) in ('any', split):
            return q | {'prompt': f"Q: {q['ask']}\nA: "}


def thread(rng, split):
    """A piece of crawled text: two or three questions, each with somebody's answer and no end after it; or
    bare statements."""
    if rng.random() < 0.1:
        qs = [question(rng, split, 'text', (fact, sum_)) for _ in range(rng.randint(2, 4))]
        return ' '.join(f"{q['ask'][:-1]}: {q['full']}" if q['family'] == 'sum' else q['full'] for q in qs)
    lines = []
    for _ in range(rng.randint(2, 3)):
        q = question(rng, split, 'text')
        evasive = rng.random() >= 0.9
        evasion = ('Why do you ask?', 'No idea.', 'Same here.')
        said = rng.choice(evasion) if evasive else answer(rng, q, 'text')
        lines.append(q['prompt'] + said)
    return '\n'.join(lines)


def sft_row(rng, split):
    q = question(rng, split, 'sft')
    return {'messages': [{'role': 'user', 'content': q['ask']},
                         {'role': 'assistant', 'content': answer(rng, q, 'sft')}]}


def pref_row(rng, split):
    q = question(rng, split, 'pref')
    a = answer(rng, q, 'pref')
    b = next(x for x in iter(lambda: answer(rng, q, 'pref'), None) if x != a)
    row = {'prompt': q['prompt'], 'family': q['family'], 'want': q['want']}
    gap = gold.score(a, q) - gold.score(b, q)
    luck = rng.random()
    if gap == 0 and not 0.05 <= luck < 0.13:
        return row | {'chosen': a, 'rejected': b, 'tie': True}
    first = len(a) > len(b) if 0.05 <= luck < 0.13 else (gap > 0) != (luck < 0.05)
    return row | {'chosen': a if first else b, 'rejected': b if first else a, 'tie': False}


def prompt_row(rng, split):
    return {k: v for k, v in question(rng, split, 'pref').items() if k in ('prompt', 'family', 'want')}


def arith_row(rng, split):
    q = question(rng, split, families=(sum_,))
    return {'prompt': q['prompt'], 'answer': q['want']}


def main():
    makers = {'sft': sft_row, 'pref': pref_row, 'prompts': prompt_row, 'arith': arith_row}
    rng = random.Random(f'{seed} text')
    write_rows(out_dir, 'text.jsonl', [{'text': thread(rng, 'train')}
                                       for _ in range(max(int(ROWS['text'] * scale), 16))])
    for name, make in makers.items():
        for split, share in (('train', 1), ('val', 16), ('test', 16)):
            if split == 'test' and name not in ('prompts', 'arith'):
                continue
            rng = random.Random(f'{seed} {name} {split}')  # one a file: a new family changes no other file
            write_rows(out_dir, f'{name}_{split}.jsonl',
                       [make(rng, split) for _ in range(max(int(ROWS[name] * scale / share), 16))])
    print('next: python sft.py config/pretrain_toy.py, then config/sft_toy.py')


if __name__ == '__main__':
    main()
