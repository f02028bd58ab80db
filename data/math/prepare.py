"""Competition mathematics -> prompts with checkable answers for GRPO and PPO, and worked solutions for SFT.

    python data/math/prepare.py                 # MATH: 12,000 problems and the 500 of MATH-500 (11.3 MB)
    python data/math/prepare.py --src=train.jsonl.gz --test=math500.jsonl   # files or folders that you have
    python data/math/prepare.py --src=deepscaler.parquet --form=asis        # with their own instruction
    train.jsonl, test.jsonl    {"prompt", "answer", "level", "subject"}; data/math/reward.py checks the answer
    sft_{train,val}.jsonl      {"prompt", "completion"}: the worked solutions, where there are any (a cold
                               start); val is taken from train
Rows that are read:
    MATH {"problem", "solution"} (the answer is its last \\boxed), MATH-500 (with "answer")
    ASDiv {"body", "question", "answer"}, GSM8K {"question", "answer": "... #### 72"}
    DAPO and AReaL {"prompt", "answer": "\\boxed{34}"}
    verl and DeepScaleR {"prompt": [messages], "reward_model": {"ground_truth"}}
    NuminaMath {"problem", "solution"}, DeepMath {"question", "final_answer", "difficulty"}: the configs
    sft_numina.py and ppo_deepmath.py say how they are fetched
Left out and counted: rows without an answer, problems that stand twice, problems of train that stand in test.
"""
import os
import random
import re
import runpy
import sys

_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [_root, os.path.join(_root, 'data')]
_checker = runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'reward.py'))

src = '' # training files (.jsonl, .gz, .json, .parquet) or a folder with *train*, by comma; '' fetches MATH
test = '' # test files or a folder with *test*, likewise; '' fetches MATH-500, or takes a share of src aside
out_dir = os.path.dirname(os.path.abspath(__file__)) # where the files go
form = 'chat' # one of 'chat', 'text', 'asis': messages with ASK, 'Problem: ...\nSolution:', or as it is
levels = '' # '1,2,3' keeps the problems of these levels (rows that have one); '' = all
words = True # keep problems whose answer is yes, no, true or false: half of them are guessed right
max_chars = 0 # >= 0: leave out problems with more characters; 0 = keep all
val = 0.05 # in [0, 1): share kept aside: of src for test if none is given, of train for the validation of SFT
seed = 1337 # of the draws
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, str))]
exec(open(os.path.join(_root, 'configurator.py'), encoding='utf-8').read()) # overrides

URL = 'https://media.githubusercontent.com/media/openai/prm800k/main/prm800k/math_splits/{}.jsonl'
KNOWN = {'train': '90d96daeac3fe343ebb1e22ce93dd99690f75983e957f88de42f87cffe1e8076',
         'test': '35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132'}
# what the model cards of Qwen ask with
ASK = 'Please reason step by step, and put your final answer within \\boxed{}.'


def problem_of(row):
    """The question's text, or the messages, of any known row; None if there is none. The last user turn of
    messages is the question."""
    if row.get('body') and row.get('question'):
        return f'{row["body"].strip()} {row["question"].strip()}'
    return next((row[k] for k in ('problem', 'question', 'prompt') if row.get(k)), None)


def answer_of(row):
    """The reference answer: '34' of '\\\\boxed{34}' and of '... #### 34'; None where the row has none."""
    if 'final_answer' in row:
        row = dict(row, answer=row['final_answer'])
    try:
        given = _checker['reference_of'](row)
    except ValueError:
        given = _checker['boxed'](row['solution']) if row.get('solution') else None
    return given.strip() or None if given else None


def prompt_of(problem):
    """The prompt in the wanted form. Messages stay messages; their instruction is their own, so form 'chat'
    adds none."""
    if not isinstance(problem, str):
        return [{'role': m['role'], 'content': m['content']} for m in problem]
    if form == 'asis':
        return [{'role': 'user', 'content': problem}]
    if form == 'text':
        return f'Problem: {problem.strip()}\nSolution:'
    problem = problem.strip()
    return [{'role': 'user', 'content': problem if 'boxed' in problem else f'{problem}\n{ASK}'}]


def completion_of(row):
    """The worked solution in the form of the row's prompt."""
    return [{'role': 'assistant', 'content': row['solution']}] if isinstance(row['prompt'],
        list) else ' ' + row['solution']


def identity(problem):
    """What two rows share that ask the same: the letters and digits of the question."""
    text = problem if isinstance(problem, str) else ' '.join(m['content'] for m in problem
                                                             if m['role'] == 'user')
    return re.sub(r'[^a-z0-9]', '', text.replace(ASK, '').lower())


def leaked(rows, held, width=40):
    """Identities of the rows that hold a test problem: as a whole, or within instructions of their own.
    Windows of `width` characters are looked up, so 30,000 rows take a second or two; test problems under that
    length are found only whole."""
    starts, whole = {}, {k for k, _ in held}
    for k in whole:
        starts.setdefault(k[:width], []).append(k)

    def holds(k):
        return any(k.startswith(t, i) for i in range(len(k) - width) for t in starts.get(k[i:i + width], ()))
    return {k for k, _ in rows if k in whole or holds(k)}


def read(paths, counts):
    """Files -> [(identity, row with prompt, answer, level, subject, solution)], counted in counts."""
    from rows import rows_of
    wanted, found = {int(x) for x in levels.split(',') if x}, []
    for path in paths:
        for row in rows_of(path):
            counts['read'] += 1
            problem, answer = problem_of(row), answer_of(row)
            level = re.search(r'\d+', str(row.get('level') or row.get('difficulty') or ''))
            level = int(level[0]) if level else 0
            if not problem or not answer:
                counts['without problem or answer'] += 1
            elif not words and answer.strip('.').lower() in ('yes', 'no', 'true', 'false'):
                counts['answered by one word'] += 1
            elif (wanted and level and level not in wanted) or (max_chars
                and len(identity(problem)) > max_chars):
                counts['of another level, or too long'] += 1
            else:
                subject = row.get('subject') or row.get('type') or ''
                found.append((identity(problem), dict(prompt=prompt_of(problem), answer=answer, level=level,
                                                      solution=row.get('solution'), subject=subject)))
    return found


def sources(given, split):
    from files import fetch
    from rows import find
    if given:
        return find(given, rf'(^|/)[^/]*{split}[^/]*\.(jsonl?(\.gz)?|parquet)$')
    return [fetch(URL.format(split), os.path.join(out_dir, f'origin_{split}.jsonl'), KNOWN[split])]


def main():
    from rows import write_rows
    counts = dict.fromkeys(('read', 'without problem or answer', 'answered by one word',
                            'of another level, or too long', 'standing twice'), 0)
    rows = read(sources(src, 'train'), counts)
    held = read(sources(test, 'test'), counts) if test or not src else []
    unique = {}
    for k, r in rows:
        unique.setdefault(k, r)
    counts['standing twice'] += len(rows) - len(unique)
    rows = list(unique.items())
    if not held:
        random.Random(seed).shuffle(rows)
        n = max(1, int(len(rows) * val))
        held, rows = rows[:n], rows[n:]
    seen = leaked(rows, held)
    counts['of train that stand in test'] = len(seen)
    made = {'train': [r for k, r in rows if k not in seen], 'test': list({k: r for k, r in held}.values())}
    for name, part in made.items():
        write_rows(out_dir, f'{name}.jsonl', [{k: v for k, v in r.items() if k != 'solution'} for r in part])
    worked = [r for r in made['train'] if r['solution']]
    if len(worked) > 1:
        random.Random(seed).shuffle(worked)
        n = max(1, int(len(worked) * val))
        for name, part in (('sft_val', worked[:n]), ('sft_train', worked[n:])):
            write_rows(out_dir, f'{name}.jsonl', [{'prompt': r['prompt'], 'completion': completion_of(r)}
                                                  for r in part])
    print(f'{counts.pop("read"):,} rows read; left out: '
          + ', '.join(f'{v:,} {k}' for k, v in counts.items()))
    there = os.path.relpath(out_dir)
    print(f'sample: {str(made["train"][0]["prompt"])[:160]!r}, answer {made["train"][0]["answer"]!r}')
    if worked:
        print(f'next: python sft.py config/sft_qwen3_math.py --dataset={there}/sft_train.jsonl '
              f'--val_dataset={there}/sft_val.jsonl, then config/grpo_qwen3_math.py')
    else:
        print(f'next: python grpo.py config/grpo_qwen3_math.py --dataset={there}/train.jsonl '
              f'--val_dataset={there}/test.jsonl')


if __name__ == '__main__':
    main()
