"""What the prepare scripts share: find or fetch the source, write rows or tokens whole or not at all, say what was made.

    fetch(url, path)   resumes a broken download, checks size and SHA-256, shows progress; HF_ENDPOINT and HF_TOKEN as in huggingface_hub
"""
import gzip
import hashlib
import json
import os
import re
import sys
import time

import numpy as np


def fetch(url, path, size=0, sha256=''):
    """url -> path (returned). A part that an earlier run left is continued; only a file of the right size and hash gets its name.
    Unknown size and hash are taken from what the server says (Content-Length; the hub's X-Linked-Etag is the SHA-256 of its large files)."""
    import requests
    hub = os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')
    url = url.replace('https://huggingface.co', hub)
    headers = {'Accept-Encoding': 'identity'}
    if os.environ.get('HF_TOKEN') and url.startswith(hub + '/'):  # the hub's secret is for the hub alone
        headers['Authorization'] = 'Bearer ' + os.environ['HF_TOKEN']
    if os.path.exists(path):
        return path
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    part, t0 = path + '.part', time.time()
    try:
        if url.startswith(hub + '/') and not sha256:
            said = requests.head(url, headers=headers, timeout=30).headers
            tag = said.get('X-Linked-Etag', '').strip('"')
            sha256, size = tag if re.fullmatch('[0-9a-f]{64}', tag) else '', int(said.get('X-Linked-Size') or size)
        have = os.path.getsize(part) if os.path.exists(part) else 0
        with requests.get(url, headers={**headers, **({'Range': f'bytes={have}-'} if have else {})}, stream=True, timeout=60) as r:
            if r.status_code != 416:  # 416: the part is whole already
                r.raise_for_status()
                have = have if r.status_code == 206 else 0
                size = size or have + int(r.headers.get('Content-Length') or 0)
                with open(part, 'ab' if have else 'wb') as f:
                    for n, piece in enumerate(r.iter_content(1 << 16)):  # small pieces: what a broken line cuts short is lost
                        f.write(piece)
                        have += len(piece)
                        if n % 64 == 0 or have == size:
                            print(f'\r{os.path.basename(path)} {have / 1e6:.1f}/{size / 1e6:.1f} MB', end='', file=sys.stderr)
                print(f' in {time.time() - t0:.0f} s', file=sys.stderr)
    except requests.RequestException as e:
        status = getattr(e.response, 'status_code', None)
        raise ValueError(f'{url}: {f"the server answered {status}" if status else f"could not be fetched ({type(e).__name__})"}; run it again to go on, '
                         'or give a file that you have with --src=') from None
    if size and have < size:
        raise ValueError(f'{url}: {have:,} of {size:,} bytes came; run it again to go on')
    digest = hashlib.sha256()
    with open(part, 'rb') as f:
        while piece := f.read(1 << 22):
            digest.update(piece)
    if (size and have != size) or (sha256 and digest.hexdigest() != sha256):
        os.remove(part)
        raise ValueError(f'{url}: {have:,} bytes with SHA-256 {digest.hexdigest()[:12]}, expected {size or have:,} with {sha256[:12] or "any"}; removed, run it again')
    os.replace(part, path)
    return path


def find(src, pattern):
    """The files of --src: the file itself, or those below a folder whose path matches the pattern."""
    if os.path.isfile(src):
        return [src]
    if not os.path.isdir(src):
        raise ValueError(f'--src={src}: no such file or folder')
    all_of = sorted(os.path.relpath(os.path.join(d, f), src) for d, _, files in os.walk(src) for f in files)
    found = [os.path.join(src, f) for f in all_of if re.search(pattern, f)]
    if not found:
        raise ValueError(f'--src={src}: none of its {len(all_of)} files is named like {pattern!r}; name the file itself')
    return found


def read_text(path):
    """.txt or .txt.gz as it is; rows with "text" joined by an empty line."""
    if not re.search(r'\.jsonl?(\.gz)?$', path):
        with (gzip.open if path.endswith('.gz') else open)(path, 'rb') as f:
            data = f.read()
        try:
            return data.decode()
        except UnicodeDecodeError as e:
            raise ValueError(f'{path}: not UTF-8 at byte {e.start}') from None
    return '\n\n'.join(rows_of(path, 'text')['text'])


def rows_of(path, *keys):
    """dataset.load_dataset, and the columns that are wanted."""
    from dataset import load_dataset
    rows = load_dataset(path)
    missing = [k for k in keys if k not in rows.column_names]
    if missing:
        raise ValueError(f'{path}: its rows have {rows.column_names}, expected {list(keys)}')
    return rows


def write_rows(out_dir, name, rows):
    if not rows:
        raise ValueError(f'{name}: no row is left to write')
    path = os.path.join(out_dir, name)
    os.makedirs(out_dir, exist_ok=True)
    with open(path + '.tmp', 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
    os.replace(path + '.tmp', path)  # atomic: an interrupted run leaves no half file
    print(f'{name:20} {len(rows):8,} rows  {os.path.getsize(path):12,} bytes   {json.dumps(rows[0])[:110]}')


def write_tokens(out_dir, parts, tok):
    """{name: iterable of id lists} -> uint16 files as nanoGPT's, streamed. Returns {name: tokens}."""
    if tok.vocab_size > 1 << 16:
        raise ValueError(f'tokenizer {tok.name!r} has {tok.vocab_size:,} tokens; .bin files hold 16 bits: use gpt2, byte or char, or rows with {{"text"}}')
    os.makedirs(out_dir, exist_ok=True)
    counts = {}
    for name, pieces in parts.items():
        with open(os.path.join(out_dir, name + '.tmp'), 'wb') as f:
            counts[name] = sum(f.write(np.asarray(ids, np.uint16).tobytes()) for ids in pieces) // 2
    for name, n in counts.items():
        if n < 2:
            raise ValueError(f'{name}: {n} tokens; the source is too short')
        os.replace(os.path.join(out_dir, name + '.tmp'), os.path.join(out_dir, name))
        print(f'{name:20} {n:14,} tokens  {2 * n:14,} bytes')
    return counts


def run(main):
    """main(); a mistake of the user is one line and exit code 2, as in the stages."""
    try:
        main()
    except (ValueError, OSError) as e:
        print(f'error: {" ".join(str(e).split())}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print('\ninterrupted; run it again, downloads go on where they stopped', file=sys.stderr)
        sys.exit(130)
