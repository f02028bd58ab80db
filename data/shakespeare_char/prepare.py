"""Tiny Shakespeare by characters, nanoGPT's first job: train.bin, val.bin (uint16) and meta.json.

    python data/shakespeare_char/prepare.py     # fetches 1.1 MB; --src=FILE.txt takes any text of your own
1,115,394 characters, 65 distinct; 90 % and 10 % are 1,003,854 training and 111,540 validation tokens.
meta.json is {"vocab_size", "chars"}: id i is chars[i], sorted as nanoGPT sorts them, so the ids are nanoGPT's
(its meta.pkl is a pickle: code; ours is data).
"""
import json
import os
import sys

_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [_root, os.path.join(_root, 'data')]

src = '' # text file (.txt, .jsonl with "text", .gz) or a folder with one; '' fetches tiny Shakespeare
out_dir = os.path.dirname(os.path.abspath(__file__)) # where the files go
val = 0.1 # in (0, 1): share of the text, from its end, kept for validation
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, str))]
exec(open(os.path.join(_root, 'configurator.py'), encoding='utf-8').read()) # overrides

URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def main():
    from tokenizer import get_tokenizer
    from files import fetch, replaced
    from rows import find, read_text, write_tokens
    if src:
        paths = find(src, r'(shakespeare|(^|/)input).*\.(txt|jsonl)(\.gz)?$')
    else:
        paths = [fetch(URL, os.path.join(out_dir, 'input.txt'), SHA256)]
    text = '\n\n'.join(map(read_text, paths))
    chars, n = ''.join(sorted(set(text))), int(len(text) * (1 - val))
    meta = os.path.join(out_dir, 'meta.json')
    os.makedirs(out_dir, exist_ok=True)
    with replaced(meta, 'w') as f:
        json.dump({'vocab_size': len(chars), 'chars': chars}, f)
    tok = get_tokenizer('char:' + meta)
    print(f'{len(text):,} characters, {len(chars)} distinct: {chars[:100]!r}')
    write_tokens(out_dir, {'train.bin': [tok.encode(text[:n])], 'val.bin': [tok.encode(text[n:])]}, tok)
    print(f'sample: {text[:60]!r}\nnext: python sft.py config/pretrain_shakespeare_char.py')


if __name__ == '__main__':
    main()
