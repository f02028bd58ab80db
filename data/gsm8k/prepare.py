"""GSM8K: 7,473 + 1,319 word problems with worked answers -> prompts with checkable answers, and rows for SFT.

    python data/gsm8k/prepare.py                            # fetches 4.9 MB
    python data/gsm8k/prepare.py --src=FOLDER --form=chat   # messages, for a model with a chat template
    train.jsonl, test.jsonl    {"prompt", "question", "answer", "final"} for GRPO and PPO: answer is the
                               worked solution, final its number; data/gsm8k/reward.py checks it
    sft_{train,val}.jsonl      {"prompt", "completion"}: the solution without the <<48/2=24>> notes; val is
                               taken from train, test stays unseen
"""
import os
import random
import re
import sys

_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [_root, os.path.join(_root, 'data')]

src = '' # folder with (gsm8k_)train, test .jsonl or .parquet, or one file (a tenth becomes test); '' fetches
out_dir = os.path.dirname(os.path.abspath(__file__)) # where the files go
form = 'text' # one of 'text', 'chat': 'Question: ...\nAnswer:' verbatim, or [{"role": "user", ...}]
val = 0.05 # in [0, 1): share of train kept for validation of SFT
seed = 1337 # of the draws
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, str))]
exec(open(os.path.join(_root, 'configurator.py'), encoding='utf-8').read()) # overrides

URL = 'https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data/{}.jsonl'
KNOWN = {'train': '17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465',
         'test': '3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14'}
ASK = 'Think step by step and put the final number after "####".'


def grpo_row(row):
    """{"question", "answer": "... #### 72"} -> the row with its prompt and final number; None where the
    answer has no #### number."""
    final = re.search(r'####\s*(-?[\d,]*\.?\d+)\s*$', row['answer'])
    if not final or not row['question'].strip():
        return None
    asked = row['question'].strip()
    prompt = f'Question: {asked}\nAnswer:' if form == 'text' else [{'role': 'user',
        'content': f'{asked}\n{ASK}'}]
    return {'prompt': prompt, 'question': row['question'], 'answer': row['answer'],
            'final': final[1].replace(',', '')}


def sft_row(row):
    """The worked solution without its calculator notes: '<<48/2=24>>24' -> '24'."""
    said = re.sub(r'<<[^<>]*>>', '', row['answer'])
    completion = ' ' + said if form == 'text' else [{'role': 'assistant', 'content': said}]
    return {'prompt': row['prompt'], 'completion': completion}


def read(split):
    """The problems of 'train' or 'test'. On the hub they are main/train-00000-of-00001.parquet."""
    from files import fetch
    from rows import find, rows_of
    if src:
        path = find(src, rf'(^|/)(gsm8k_)?{split}(-\d+-of-\d+)?\.(jsonl?(\.gz)?|parquet)$')[0]
    else:
        path = fetch(URL.format(split), os.path.join(out_dir, f'origin_{split}.jsonl'), KNOWN[split])
    return list(rows_of(path, 'question', 'answer'))


def main():
    from rows import rows_of, write_rows
    if src and os.path.isfile(src):
        rows = list(rows_of(src, 'question', 'answer'))
        random.Random(seed).shuffle(rows)
        n = max(1, len(rows) // 10)
        problems = {'test': rows[:n], 'train': rows[n:]}
    else:
        problems = {split: read(split) for split in ('train', 'test')}
    made = {split: [r for r in map(grpo_row, rows) if r] for split, rows in problems.items()}
    for s, rows in made.items():
        write_rows(out_dir, f'{s}.jsonl', rows)
    rows = made['train'][:]
    random.Random(seed).shuffle(rows)
    n = max(1, int(len(rows) * val))
    write_rows(out_dir, 'sft_val.jsonl', list(map(sft_row, rows[:n])))
    write_rows(out_dir, 'sft_train.jsonl', list(map(sft_row, rows[n:])))
    count, kept = (sum(map(len, parts.values())) for parts in (problems, made))
    print(f'{count:,} problems read, {count - kept:,} without a final number left out')
    print(f'sample: {rows[0]["prompt"]!r}\n  answer {rows[0]["answer"][-80:]!r}, final {rows[0]["final"]}')
    there = os.path.relpath(out_dir)
    print(f'next: python sft.py --dataset={there}/sft_train.jsonl --init_from=gpt2, then '
          f'python grpo.py --dataset={there}/train.jsonl --reward=data/gsm8k/reward.py')


if __name__ == '__main__':
    main()
