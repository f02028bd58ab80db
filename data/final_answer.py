"""Where the answer of a text stands: one reading for every reward file of data/, for training and evaluation,
base and trained model.

    1. marked(text)    the last \\boxed{...}, else what follows the last '####', to the end of its line
    2. named(text)     what follows the last 'answer is', 'answer:', 'answer =', to the end of its sentence
Both look at spoken(text) alone: a thought is no answer, and a question that a base model goes on to ask
itself is not its own.
"""
import re

LONGEST = 640  # characters of a sentence that names an answer
NAMES = re.compile(r'answer[*_\s]{0,3}(?:is|was|would be|must be|:|=)[*_\s:]{0,5}', re.I)


def spoken(text: str) -> str:
    """What follows the last </think>, '' where a thought is still open, up to a next 'Question:' or
    'Problem:' at the start of a line. '<think>7?</think>8' -> '8'; '<think>7' -> ''; '#### 12\\n\\nQuestion:
    Tom' -> '#### 12'."""
    said = text.rsplit('</think>', 1)[-1]
    if '<think>' in said:
        return ''
    own = re.split(r'\n\s{0,9}(?:Question|Problem):', said)[0]
    return own if own.strip() else said


def boxed(text: str) -> str | None:
    """The inside of the last \\boxed{...} or \\fbox{...}, braces matched; unclosed: what there is; \\boxed 7
    too; None without one."""
    start = max(text.rfind('\\boxed'), text.rfind('\\fbox'))
    if start < 0:
        return None
    rest = text[text.index('box', start):].removeprefix('boxed').removeprefix('box').lstrip()
    if not rest.startswith('{'):
        return re.match(r'[^\s$,.]*', rest)[0]
    depth = 0
    for brace in re.finditer(r'(?<!\\)[{}]', rest):
        depth += 1 if brace[0] == '{' else -1
        if depth == 0:
            return rest[1:brace.start()]
    return rest[1:]


def marked(text: str) -> str | None:
    """The answer in a box or behind '####', stripped; None without such a mark. '5 #### 72 apples\\n' -> '72
    apples'."""
    said = spoken(text)
    found = boxed(said)
    if found is None and '####' in said:
        found = said.rsplit('####', 1)[1].strip().split('\n')[0]
    return None if found is None else found.strip()


def named(text: str) -> str | None:
    """The answer that a sentence names, the last one: 'The answer is 5. No, the answer is 6. Is the answer
    clear?' -> '6'; else None."""
    said = spoken(text)
    for place in reversed(list(NAMES.finditer(said))):
        line = said[place.end():place.end() + LONGEST].split('\n')[0]
        sentence = re.split(r'[.!?](?:\s|$)', line)[0].strip(' *_')
        if sentence:
            return sentence
    return None
