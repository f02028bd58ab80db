"""What the prepare scripts share: the files of --src, rows or text out of them, and rows or tokens written
whole or not at all."""
import contextlib
import gzip
import json
import os
import re

import numpy as np

from files import replaced


def find(src, pattern):
    """The files of --src: a file, those of a folder whose path matches the pattern, or several of these with
    commas between."""
    found = []
    for given in [src] if os.path.exists(src) else src.split(','):
        if os.path.isdir(given):
            inside = sorted(os.path.join(d, f) for d, _, names in os.walk(given) for f in names)
            named = [path for path in inside if re.search(pattern, os.path.relpath(path, given))]
            if not named:
                raise ValueError(f'--src={given}: none of its {len(inside)} files is named like {pattern!r}; '
                                 'name the file itself')
            found += named
        elif os.path.exists(given):
            found.append(given)
        else:
            raise ValueError(f'--src={given}: no such file or folder')
    return found


def read_text(path):
    """The text of .txt or .txt.gz; of rows, their "text" with an empty line between."""
    if re.search(r'\.(jsonl?(\.gz)?|parquet)$', path):
        return '\n\n'.join(rows_of(path, 'text')['text'])
    with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as f:
        data = f.read()
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f'{path}: not UTF-8 at byte {error.start}') from None


def rows_of(path, *keys):
    """dataset.load_dataset, and the columns that must be there."""
    from dataset import load_dataset
    rows = load_dataset(path)
    if not set(keys) <= set(rows.column_names):
        raise ValueError(f'{path}: its rows have {rows.column_names}, expected {list(keys)}')
    return rows


def write_rows(out_dir, name, rows):
    """Rows -> JSONL, and a line that says how many and shows the first."""
    if not rows:
        raise ValueError(f'{name}: no row is left to write')
    os.makedirs(out_dir, exist_ok=True)
    path = os.path.join(out_dir, name)
    with replaced(path, 'w') as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    print(f'{name:20} {len(rows):8,} rows  {os.path.getsize(path):12,} bytes   {json.dumps(rows[0])[:110]}')


def write_tokens(out_dir, parts, tok):
    """{name: iterable of id lists} -> uint16 files as nanoGPT's, streamed; all of them, or none."""
    if tok.vocab_size > 1 << 16:
        raise ValueError(f'tokenizer {tok.name!r} has {tok.vocab_size:,} tokens, .bin files hold 16 bits: '
                         'take gpt2, byte or char, or rows with {"text"}')
    os.makedirs(out_dir, exist_ok=True)
    with contextlib.ExitStack() as opened:
        for name, pieces in parts.items():
            f = opened.enter_context(replaced(os.path.join(out_dir, name)))
            for ids in pieces:
                f.write(np.asarray(ids, np.uint16).tobytes())
            if f.tell() < 4:
                raise ValueError(f'{name}: {f.tell() // 2} tokens; the source is too short')
            print(f'{name:20} {f.tell() // 2:14,} tokens  {f.tell():14,} bytes')
