"""Tiny Shakespeare in GPT-2's tokens, for finetuning GPT-2: train.bin and val.bin (uint16), as nanoGPT's.

    python data/shakespeare/prepare.py          # fetches 1.1 MB and, once, GPT-2's vocabulary
    python data/shakespeare/prepare.py --src=my.txt --tokenizer=DIR
90 % and 10 % of the text: 301,966 training and 36,059 validation tokens.
"""
import os
import sys

_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [_root, os.path.join(_root, 'data')]

src = '' # text file (.txt, .jsonl with "text", .gz) or a folder with one; '' fetches tiny Shakespeare
out_dir = os.path.dirname(os.path.abspath(__file__)) # where the files go
val = 0.1 # in (0, 1): share of the text, from its end, kept for validation
tokenizer = 'gpt2' # 'gpt2', 'byte', or a tokenizer's directory; at most 65,536 tokens
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, str))]
exec(open(os.path.join(_root, 'configurator.py'), encoding='utf-8').read()) # overrides

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def main():
    from tokenizer import get_tokenizer
    from files import fetch
    from rows import find, read_text, write_tokens
    tok = get_tokenizer(tokenizer)
    if src:
        paths = find(src, r'(shakespeare|(^|/)input).*\.(txt|jsonl)(\.gz)?$')
    else:
        paths = [fetch(URL, os.path.join(out_dir, 'input.txt'), SHA256)]
    text = '\n\n'.join(map(read_text, paths))
    n = int(len(text) * (1 - val))
    write_tokens(out_dir, {'train.bin': [tok.encode(text[:n])], 'val.bin': [tok.encode(text[n:])]}, tok)
    ids = tok.encode(text[:60])
    print(f'sample: {text[:60]!r} -> {ids[:12]}')
    print(f'next: python sft.py --dataset={os.path.relpath(out_dir)} --tokenizer={tokenizer} '
          '--init_from=gpt2 --block_size=1024 --learning_rate=3e-5')


if __name__ == '__main__':
    main()
