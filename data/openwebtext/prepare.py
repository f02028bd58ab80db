"""OpenWebText in GPT-2's tokens: train.bin and val.bin (uint16), documents one after the other, each ended by <|endoftext|>, as nanoGPT's.

    python data/openwebtext/prepare.py --subsets=1          # one of 21 archives (0.6 GB); all of them: 13.5 GB, 8,013,769 documents
    python data/openwebtext/prepare.py --src=books.jsonl.gz --tokenizer=DIR      # any rows with "text", or .txt with empty lines between documents
All of it is 9,035,582,198 training tokens (nanoGPT's count; 17 GB) and takes about an hour of one core for the tokens alone. A document is for
validation by a draw seeded with `seed` (nanoGPT shuffles with the `datasets` library; the share is the same, the documents are not).
Memory stays small: archives are read as streams, tar in xz in tar, and tokens go straight to the file.
"""
import os
import random
import re
import sys
import tarfile

_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [_root, os.path.join(_root, 'data')]

src = '' # file or folder: urlsf_subset*.tar, rows with "text" (.jsonl, .json, .gz), .txt; '' fetches the archives
out_dir = os.path.dirname(os.path.abspath(__file__)) # where the files go
subsets = 21 # how many of the 21 archives to fetch
val = 0.0005 # share of the documents kept for validation
seed = 2357 # of that draw
tokenizer = 'gpt2' # 'gpt2', 'byte', or a tokenizer's directory; at most 65,536 tokens
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open(os.path.join(_root, 'configurator.py')).read()) # overrides from command line or config file

URL = 'https://huggingface.co/datasets/Skylion007/openwebtext/resolve/main/subsets/urlsf_subset{:02d}.tar'


def documents(path):
    from download import read_text, rows_of
    if path.endswith('.tar'):
        with tarfile.open(path) as outer:
            for member in outer:
                if member.name.endswith('.xz'):
                    with tarfile.open(fileobj=outer.extractfile(member), mode='r|xz') as inner:
                        for page in inner:
                            if page.isfile():
                                yield re.sub('\n\n\n+', '\n\n', inner.extractfile(page).read().decode(errors='replace')).strip()
    elif re.search(r'\.txt(\.gz)?$', path):
        yield from re.split(r'\n\s*\n', read_text(path))
    else:
        for row in rows_of(path, 'text'):
            yield row['text']


def main():
    from tokenizer import get_tokenizer
    from download import fetch, find, write_tokens
    tok, rng = get_tokenizer(tokenizer), random.Random(seed)
    if tok.eot is None:
        raise ValueError(f'tokenizer {tokenizer!r} has no end token to put between documents')
    if not 0 < subsets <= 21:
        raise ValueError(f'subsets is {subsets}, expected 1 to 21')
    files = find(src, r'\.(tar|txt|jsonl?)(\.gz)?$') if src else [fetch(URL.format(i), os.path.join(out_dir, f'urlsf_subset{i:02d}.tar')) for i in range(subsets)]
    held, seen = [], 0

    def train():
        nonlocal seen
        for path in files:
            for text in documents(path):
                if text:
                    ids, seen = tok.encode(text) + [tok.eot], seen + 1
                    if rng.random() < val or (seen == 1 and val):  # the first one always: a small source has a val.bin too
                        held.append(ids)
                    else:
                        yield ids
                    if seen % 10000 == 0:
                        print(f'\r{seen:,} documents', end='', file=sys.stderr)

    write_tokens(out_dir, {'train.bin': train(), 'val.bin': held}, tok)  # val after train: held is full by then
    print(f'{seen:,} documents, {len(held):,} of them for validation; sample: {tok.decode(held[0][:24])!r}')
    print(f'next: python sft.py --dataset={os.path.relpath(out_dir)} --tokenizer={tokenizer} --init_from=scratch')


if __name__ == '__main__':
    from download import run
    run(main)
