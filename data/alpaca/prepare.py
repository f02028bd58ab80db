"""Stanford Alpaca: 52,002 instructions with answers by text-davinci-003 -> rows for SFT, and its prompts.

    python data/alpaca/prepare.py              # fetches 23 MB
    python data/alpaca/prepare.py --src=FILE   # any rows {"instruction", "input", "output"}
    sft_{train,val}.jsonl      {"instruction", "input", "output"}; encode_row puts Alpaca's own prompt around
    prompts_{train,val}.jsonl  {"prompt", "output"}: that prompt verbatim, for PPO and for sampling
Rows without an answer are left out (28 in the full set) and counted. Licence of the data: CC BY-NC 4.0.
"""
import os
import random
import sys

_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [_root, os.path.join(_root, 'data')]

src = '' # rows (.json, .jsonl, .gz, .parquet), or a folder with alpaca*.json or train-*.parquet; '' fetches
out_dir = os.path.dirname(os.path.abspath(__file__)) # where the files go
val = 0.02 # in [0, 1): share of the rows kept for validation
seed = 1337 # of the shuffle
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, str))]
exec(open(os.path.join(_root, 'configurator.py'), encoding='utf-8').read()) # overrides

URL = 'https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/alpaca_data.json'


def main():
    from tokenizer import alpaca_prompt
    from files import fetch
    from rows import find, rows_of, write_rows
    if src:
        paths = find(src, r'(^|/)(alpaca(?!_eval)|train-)[^/]*\.(jsonl?(\.gz)?|parquet)$')
    else:
        paths = [fetch(URL, os.path.join(out_dir, 'alpaca_data.json'))]
    rows = []
    for path in paths:
        for row in rows_of(path, 'instruction', 'output'):
            rows.append({k: row.get(k) or '' for k in ('instruction', 'input', 'output')})
    kept = [r for r in rows if r['output'].strip() and r['instruction'].strip()]
    random.Random(seed).shuffle(kept)
    n = max(1, int(len(kept) * val))
    for name, part in (('val', kept[:n]), ('train', kept[n:])):
        write_rows(out_dir, f'sft_{name}.jsonl', part)
        asked = [{'prompt': alpaca_prompt(r), 'output': r['output']} for r in part]
        write_rows(out_dir, f'prompts_{name}.jsonl', asked)
    print(f'{len(rows):,} rows read, {len(rows) - len(kept):,} without an answer left out')
    there = os.path.relpath(out_dir)
    print(f'next: python sft.py --dataset={there}/sft_train.jsonl --val_dataset={there}/sft_val.jsonl '
          '--init_from=gpt2')


if __name__ == '__main__':
    main()
