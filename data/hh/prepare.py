"""Anthropic's HH-RLHF: pairs of dialogues, one preferred -> preferences, prompts, preferred answers for SFT.

    python data/hh/prepare.py                   # fetches helpful-base and harmless-base (29 MB)
    python data/hh/prepare.py --src=hh_helpful_base_test.jsonl.gz      # a file, or a folder of them
    pref_{train,val}.jsonl     {"prompt", "chosen", "rejected"}: the prompt verbatim, "\\n\\nHuman: ...\\n\\n
                               Assistant:", the answers with their leading blank
    prompts_{train,val}.jsonl  {"prompt"}: the distinct ones, for PPO
    sft_{train,val}.jsonl      {"prompt", "completion"}: the preferred answer
Files named train go to train, test to val; with only one of the two, a share `val` of the prompts is held out
of it. No prompt stands on both sides. Left out and counted: equal answers, empty ones, pairs that differ
before the last answer. The dialogues contain offensive text.
"""
import os
import random
import re
import sys

_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [_root, os.path.join(_root, 'data')]

src = '' # .jsonl(.gz) with "chosen" and "rejected", or a folder of such; '' fetches
out_dir = os.path.dirname(os.path.abspath(__file__)) # where the files go
subsets = 'helpful-base,harmless-base' # also: helpful-online, helpful-rejection-sampled; in a folder too
val = 0.05 # in [0, 1): share of the prompts held out where there is no test file
seed = 1337 # of that draw and of the shuffle
max_chars = 0 # >= 0: leave out rows whose prompt and longer answer have more characters; 0 = keep all
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, str))]
exec(open(os.path.join(_root, 'configurator.py'), encoding='utf-8').read()) # overrides

URL = 'https://huggingface.co/datasets/Anthropic/hh-rlhf/resolve/main/{}/{}.jsonl.gz'
KNOWN = {('helpful-base', 'train'): '518a5bf288456fc9f3b7c980c54116fba0c52f274d3f4d344675d83e4058f6f4',
         ('helpful-base', 'test'): '8be3fc1a13b27901631696f2be6f184c799f1baeaf145f53ac5db24960adc37b'}
# (the hub itself says the hash of the others)


def sources():
    from files import fetch
    from rows import find
    wanted = [s for s in subsets.split(',') if s]
    if src:
        names = '|'.join(re.escape(s).replace(r'\-', '[-_]') for s in wanted)
        return find(src, rf'({names}).*\.(jsonl(\.gz)?|parquet)$')
    pairs = [(subset, part) for subset in wanted for part in ('train', 'test')]
    return [fetch(URL.format(*pair), os.path.join(out_dir, '{}-{}.jsonl.gz'.format(*pair)),
                  KNOWN.get(pair, ''))
            for pair in pairs]


def main():
    from tokenizer import split_pair
    from rows import rows_of, write_rows
    sides, left_out, read = {'train': [], 'val': []}, {}, 0
    for path in sources():
        rows = rows_of(path, 'chosen', 'rejected')
        print(f'{path}: {len(rows):,} rows')
        for row in rows:
            read += 1
            try:
                prompt, chosen, rejected = split_pair(row)
                if max_chars and len(prompt) + max(len(chosen), len(rejected)) > max_chars:
                    raise ValueError(f'longer than max_chars={max_chars}')
            except ValueError as e:
                why = str(e).split(':')[0]
                left_out[why] = left_out.get(why, 0) + 1
                continue
            side = 'val' if re.search(r'test[^/]*$', path) else 'train'
            sides[side].append({'prompt': prompt, 'chosen': chosen, 'rejected': rejected})
    if not sides['train'] or not sides['val']:
        rows = sides['train'] + sides['val']
        prompts = sorted({r['prompt'] for r in rows})
        random.Random(seed).shuffle(prompts)
        held = set(prompts[:max(1, int(len(prompts) * val))])
        sides = {'train': [r for r in rows if r['prompt'] not in held],
                 'val': [r for r in rows if r['prompt'] in held]}
    else:
        held = {r['prompt'] for r in sides['val']}
        both = [r for r in sides['train'] if r['prompt'] in held]
        sides['train'] = [r for r in sides['train'] if r['prompt'] not in held]
        left_out['prompt stands in the test files too'] = len(both)
    for name, rows in sides.items():
        random.Random(seed).shuffle(rows)
        write_rows(out_dir, f'pref_{name}.jsonl', rows)
        distinct = dict.fromkeys(r['prompt'] for r in rows)
        write_rows(out_dir, f'prompts_{name}.jsonl', [{'prompt': p} for p in distinct])
        preferred = [{'prompt': r['prompt'], 'completion': r['chosen']} for r in rows]
        write_rows(out_dir, f'sft_{name}.jsonl', preferred)
    rows = sides['train'] + sides['val']
    longer = sum(len(r['chosen']) > len(r['rejected']) for r in rows) / len(rows)
    print(f'{read:,} rows read, {sum(left_out.values()):,} left out')
    for why, n in left_out.items():
        if n:
            print(f'  {n:,}: {why}')
    print(f'the chosen answer is the longer one in {100 * longer:.1f} % (50 % = length says nothing)')
    print(f'sample: {rows[0]["prompt"][-200:]!r}')
    print(f'  chosen {rows[0]["chosen"][:120]!r}\n  rejected {rows[0]["rejected"][:120]!r}')
    there = os.path.relpath(out_dir)
    print(f'next: python reward.py config/reward_gpt2.py --dataset={there}/pref_train.jsonl '
          f'--val_dataset={there}/pref_val.jsonl')


if __name__ == '__main__':
    main()
