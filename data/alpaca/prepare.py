"""Stanford Alpaca: 52,002 instructions with answers by text-davinci-003 -> rows for SFT, and its prompts.

    python data/alpaca/prepare.py                           # fetches 23 MB; --src=FILE takes any {"instruction", "input", "output"} rows
    sft_{train,val}.jsonl      {"instruction", "input", "output"}: encode_row puts Alpaca's own prompt around them
    prompts_{train,val}.jsonl  {"prompt", "output"}: that prompt verbatim, for PPO and for sampling
Rows without an answer are left out (28 in the full set) and counted. Licence of the data: CC BY-NC 4.0.
"""
import os
import random
import sys

_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [_root, os.path.join(_root, 'data')]

src = '' # .json, .jsonl or .gz of rows, or a folder with alpaca*.json; '' fetches the 52k
out_dir = os.path.dirname(os.path.abspath(__file__)) # where the files go
val = 0.02 # share of the rows kept for validation
seed = 1337 # of the shuffle
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open(os.path.join(_root, 'configurator.py')).read()) # overrides from command line or config file

URL = 'https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json'


def main():
    from tokenizer import alpaca_prompt
    from download import fetch, find, rows_of, write_rows
    files = find(src, r'alpaca_?(data)?[^/]*\.jsonl?(\.gz)?$') if src else [fetch(URL, os.path.join(out_dir, 'alpaca_data.json'))]
    rows = [{k: row.get(k) or '' for k in ('instruction', 'input', 'output')} for f in files for row in rows_of(f, 'instruction', 'output')]
    kept = [r for r in rows if r['output'].strip() and r['instruction'].strip()]
    random.Random(seed).shuffle(kept)
    n = max(1, int(len(kept) * val))
    for name, part in (('val', kept[:n]), ('train', kept[n:])):
        write_rows(out_dir, f'sft_{name}.jsonl', part)
        write_rows(out_dir, f'prompts_{name}.jsonl', [{'prompt': alpaca_prompt(r), 'output': r['output']} for r in part])
    print(f'{len(rows):,} rows read, {len(rows) - len(kept):,} without an answer left out')
    there = os.path.relpath(out_dir)
    print(f'next: python sft.py --dataset={there}/sft_train.jsonl --val_dataset={there}/sft_val.jsonl --init_from=gpt2')


if __name__ == '__main__':
    from download import run
    run(main)
