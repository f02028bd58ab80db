"""The gold scorer of the toy world: a mark from 0 to 10 for one answer, by rules that anyone can check by
hand.

It stands for "what people really want". No training sees it, only a reward model sees pairs that it has
labelled; so the distance between the two can be measured, which real annotators do not allow.
`--reward=data/toy/gold.py` trains on the truth itself, the upper bound.

Courtesies, hedges and rude phrases are cut out and counted; what is left is the content, a list of words.
    right      6    the content ends in row['want'], has no word that row['full'] (the whole sentence, or the
                    sum with its steps) lacks, and is no longer than that: neither a list of guesses nor
                    "anything but Lima" is right
    whole      1    right, and all of `full` is said
    tidy       1    one line of at most MAX_LEN characters that ends in . ! or ?
    courtesy   0..2 one point for a kind opening, one for a kind ending; each courtesy beyond two costs 1, at
                    most 3
    hedges     -1   each, at most -2
    rude       -2   once
The sum is cut to [0, 10]. A wrong answer has 3 at most; a right one that ends as it should has 5 at least.
Worked: want 'Lima', "Sure! The capital of Peru is Lima." -> right 6, whole 1, tidy 1, courtesy 1 = 9;
"Lima." -> 7;  "With joy! The capital of Peru is Rome. Any time!" -> tidy 1, courtesy 2 = 3;
"Ugh, Rome." -> 0.
"""
import re

OPENERS = ('Sure!', 'Of course!', 'Glad you ask!', 'With joy!')
CLOSERS = ('Hope it helps!', 'Any time!', 'Nice day to you!')
HEDGES = ('well,', 'i think', 'let me see,', 'maybe', 'or so', 'i guess')
RUDE = ('ugh,', 'who cares?', 'go away.', 'silly you,', 'so dull,')
MAX_LEN = 120  # characters; a good answer has 15 to 65
_cut = re.compile('|'.join(re.escape(p.lower()) for p in OPENERS + CLOSERS + HEDGES + RUDE))


def words(text: str) -> list:
    """'The sky is blue.' -> ['the', 'sky', 'is', 'blue']; '7+8=15, 75.' -> ['7+8=15', '75']"""
    return re.findall(r"[a-z0-9+='-]+", text.lower())


def content(completion: str) -> list:
    """The words without courtesies, hedges and rudeness: 'Sure! It is Lima, or so.' -> ['it', 'is', 'lima']
    """
    return words(_cut.sub(' ', completion.lower()))


def courtesies(completion: str) -> int:
    return sum(completion.lower().count(p.lower()) for p in OPENERS + CLOSERS)


def right(completion: str, row: dict) -> bool:
    """Whether the content is what the question wants. row: 'want' and, where there is a longer way to say it,
    'full'."""
    said, want, full = content(completion), words(row['want']), words(row.get('full', row['want']))
    return said[-len(want):] == want and set(said) <= set(full) and len(said) <= len(full)


def marks(completion: str, row: dict) -> dict:
    """{rule: points} of an answer."""
    text, said = completion.strip(), completion.lower()
    correct, kind = right(completion, row), courtesies(completion)
    one_line = '\n' not in text and len(text) <= MAX_LEN and text.endswith(('.', '!', '?'))
    return {
        'right': 6 * correct,
        'whole': int(correct and content(completion) == words(row.get('full', row['want']))),
        'tidy': int(one_line),
        'courtesy': text.startswith(OPENERS) + text.endswith(CLOSERS) - min(max(kind - 2, 0), 3),
        'hedges': -min(sum(said.count(p) for p in HEDGES), 2),
        'rude': -2 * any(p in said for p in RUDE),
    }


def score(completion: str, row: dict) -> float:
    """The mark, 0.0 to 10.0.
    score('Sure! It is 75.', {'want': '75', 'full': 'It is 75.'}) -> 9.0"""
    return float(min(max(sum(marks(completion, row).values()), 0), 10))


def reward(prompt, completion: str, row: dict) -> float:
    """The gold mark as a reward file: `python ppo.py config/ppo_toy.py --reward=data/toy/gold.py`."""
    return score(completion, row)
