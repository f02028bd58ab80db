"""OpenWebText in GPT-2's tokens: train.bin and val.bin (uint16), each document ended by its end token.

    python data/openwebtext/prepare.py --subsets=1      # the first file; all: 13.5 GB, 8,013,769 documents
    python data/openwebtext/prepare.py --src=books.jsonl.gz --tokenizer=DIR  # any rows with "text", or .txt
All of it is 9,035,582,198 training tokens (nanoGPT's count; 17 GB) and takes about an hour of one core for
the tokens alone. The hub has it as 21 tar archives, or as parquet: which, is asked; parquet needs pyarrow. In
a .txt an empty line ends a document. A document is for validation by a draw seeded with `seed` (nanoGPT
shuffles with the `datasets` library; the share is the same, the documents are not). Memory stays small: files
are read as streams, and tokens go straight to the file.
"""
import os
import random
import re
import sys
import tarfile

_root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [_root, os.path.join(_root, 'data')]

src = '' # file or folder: .tar, .parquet, rows with "text" (.jsonl, .json, .gz), .txt; '' fetches
out_dir = os.path.dirname(os.path.abspath(__file__)) # where the files go
subsets = 0 # >= 0: how many of the hub's files to fetch (21 archives, or some 80 of parquet); 0 = all
val = 0.0005 # in (0, 1): share of the documents kept for validation
seed = 2357 # of that draw
tokenizer = 'gpt2' # 'gpt2', 'byte', or a tokenizer's directory; at most 65,536 tokens
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, str))]
exec(open(os.path.join(_root, 'configurator.py'), encoding='utf-8').read()) # overrides

NAME = 'Skylion007/openwebtext'


def sources():
    """The files of --src, or those of the hub: archives or parquet on its main branch, else the parquet that
    the hub makes."""
    from files import HUB, fetch, listing
    from rows import find
    if src:
        return find(src, r'\.(tar|parquet|(txt|jsonl?)(\.gz)?)$')
    found = []
    for revision in ('main', 'refs/convert/parquet'):
        try:
            commit, names = listing(NAME, 'datasets', revision)
        except ValueError as error:
            raise ValueError(f'{NAME}: {error}; --src=FILE or --src=FOLDER takes what you have') from None
        for form in (r'urlsf_subset\d+\.tar', r'.*\.parquet'):
            found = found or sorted(name for name in names if re.fullmatch(form, os.path.basename(name)))
        if found:
            break
    else:
        raise ValueError(f'{NAME}: neither archives nor parquet on the hub; '
                         '--src=FILE or --src=FOLDER takes what you have')
    url = f'{HUB}/datasets/{NAME}/resolve/{commit}/'
    return [fetch(url + name, os.path.join(out_dir, name.replace('/', '_')))
            for name in found[:subsets or None]]


def pages(path):
    """The texts of an archive: text files in a tar in xz in a tar."""
    with tarfile.open(path) as outer:
        for member in outer:
            if not member.name.endswith('.xz'):
                continue
            with tarfile.open(fileobj=outer.extractfile(member), mode='r|xz') as inner:
                for page in filter(tarfile.TarInfo.isfile, inner):
                    yield inner.extractfile(page).read().decode(errors='replace')


def parquet_texts(path):
    """The texts of a parquet file, some thousand at a time (half a gigabyte of text would not be small in
    memory)."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f'{path}: parquet needs pyarrow: pip install pyarrow') from None
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(2000, columns=['text']):
            yield from batch.column(0).to_pylist()
    except (pyarrow.ArrowException, IndexError) as error:
        raise ValueError(f'{path}: expected a parquet file with a column "text" ({error})') from None


def documents(path):
    from rows import read_text, rows_of
    if path.endswith('.tar'):
        return (re.sub('\n\n\n+', '\n\n', text).strip() for text in pages(path))
    if path.endswith('.parquet'):
        return (re.sub('\n\n\n+', '\n\n', text or '').strip() for text in parquet_texts(path))
    if re.search(r'\.txt(\.gz)?$', path):
        return re.split(r'\n\s*\n', read_text(path))
    return rows_of(path, 'text')['text']


def main():
    from tokenizer import get_tokenizer
    from rows import write_tokens
    tok, rng = get_tokenizer(tokenizer), random.Random(seed)
    if tok.eot is None:
        raise ValueError(f'tokenizer {tokenizer!r} has no end token to put between documents')
    paths, held, seen = sources(), [], 0

    def train():
        nonlocal seen
        for path in paths:
            for text in documents(path):
                if text:
                    ids, seen = tok.encode(text) + [tok.eot], seen + 1
                    if rng.random() < val or (seen == 1
                                              and val):  # always the first: a small source has a val.bin too
                        held.append(ids)
                    else:
                        yield ids
                    if seen % 10000 == 0:
                        print(f'\r{seen:,} documents', end='', file=sys.stderr)

    write_tokens(out_dir, {'train.bin': train(), 'val.bin': held},
                 tok)  # val after train: held is full by then
    print(f'{seen:,} documents, {len(held):,} of them for validation; sample: {tok.decode(held[0][:24])!r}')
    there = os.path.relpath(out_dir)
    print(f'next: python sft.py --dataset={there} --tokenizer={tokenizer} --init_from=scratch')


if __name__ == '__main__':
    main()
