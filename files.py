"""Whole files or none: whatever is downloaded or written here, no reader ever meets half of it.

    folder = files.resolve('gpt2')                 # a model of the hub: its folder in the usual cache
    path = files.fetch(url, path, sha256)          # any file of the web
    with files.replaced('out/ckpt.pt') as f:       # written beside it, then renamed over it
    with files.locked('out/.lock'):                # the kernel gives the lock back, however the process ends

A download goes on where it stopped, its hash is checked, and of several processes one fetches while the
others wait. The cache is huggingface_hub's: what `hf download` fetched is found here, and the other way
round. Of its environment we follow HF_HOME, XDG_CACHE_HOME, HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE, HF_ENDPOINT,
HF_TOKEN, HUGGING_FACE_HUB_TOKEN, HF_TOKEN_PATH (`hf auth login`), HF_HUB_DISABLE_IMPLICIT_TOKEN,
HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE, HF_HUB_ETAG_TIMEOUT, HF_HUB_DOWNLOAD_TIMEOUT,
HF_HUB_DISABLE_PROGRESS_BARS and HF_HUB_DISABLE_SYMLINKS. The others are about Xet, telemetry, logging and
OIDC, which are not used here.
"""
import errno
import glob
import hashlib
import os
import re
import secrets
import sys
import time
from contextlib import contextmanager, suppress
from os.path import basename, dirname, exists, expanduser, expandvars, getmtime, getsize, relpath
from urllib.parse import quote, urljoin, urlsplit

import requests

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

HUB = 'https://huggingface.co'
PAUSES = (1, 2, 4, 8)  # seconds before the second, third, ... try
PIECE = 1 << 14  # bytes written at a time: what a broken line costs at most
GRACE = 60  # seconds in which a file that is being begun may have no lock yet
REFUSALS = {
    401: 'there is no such name, or it is private: HF_TOKEN is missing or wrong',
    403: 'no access: ask for it on its page of the hub, and set HF_TOKEN',
    404: 'there is no such name or file',
    429: 'too many requests: try again later',
    503: 'the server is busy: try again later'}
TEXTS = re.compile(
    r'(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|vocab|added_tokens)\.json'
    r'|merges\.txt|chat_template\.jinja')
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'


class Refused(ValueError):
    """Why a download cannot go on. resolve and fetch add what it was, and the way that always works."""


# ----------------------------------------------------------------------------------------------------------
# written and locked

@contextmanager
def replaced(path, mode='wb'):
    """Opens a new file ('wb', or 'w' in UTF-8) that takes the name `path` when the block has ended well and
    its bytes are on the disk. If the block fails, the new file is removed and `path` is what it was. A full
    disk is an OSError of one line, also where torch.save makes a RuntimeError of it. f.name is the temporary
    name, for writers that want a name."""
    name = f'{path}.{secrets.token_hex(4)}.tmp'
    _sweep(path)
    try:
        with open(name, mode.replace('w', 'x'), encoding=None if 'b' in mode else 'utf-8') as f:
            _flock(f)
            try:
                yield f
            except Exception:
                with open(name, 'ab') as probe:  # if it was the disk, the disk says so here
                    probe.write(bytes(1 << 20))
                raise
            f.flush()
            os.fsync(f.fileno())
            os.replace(name, path)  # before the lock is given back
    except BaseException as error:
        with suppress(OSError):
            os.remove(name)
        if isinstance(error, OSError) and error.filename in (None, name):
            error.filename = path
        raise


def _sweep(path):
    """Removes what killed writers left: who still writes holds a lock, or has only just begun."""
    for left in glob.glob(glob.escape(str(path)) + '.' + '[0-9a-f]' * 8 + '.tmp'):
        with suppress(OSError), open(left, 'rb') as f:
            _flock(f, wait=False)
            if time.time() - getmtime(left) > GRACE:
                os.remove(left)


def _flock(f, wait=True):
    if not fcntl:
        return
    try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            raise
        print(f'waiting for another process that holds {f.name}', file=sys.stderr, flush=True)
        fcntl.flock(f, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):  # file systems without locks
            raise


def locked(path, wait=True):
    """Takes the lock that the file `path` stands for and returns that file, open: closing it frees the lock,
    and so does the end of the process, SIGKILL included. The file stays. A child made by fork shares the
    lock. wait=False: a BlockingIOError if another holds it. Two calls in one process exclude each other,
    too."""
    os.makedirs(dirname(path) or '.', exist_ok=True)
    f = open(path, 'a+', encoding='utf-8')
    _flock(f, wait)
    return f


# ----------------------------------------------------------------------------------------------------------
# the environment of huggingface_hub

def _env(*keys):
    return next(filter(None, map(os.environ.get, keys)), '')


def _says(*keys):
    return _env(*keys).upper() in ('1', 'ON', 'YES', 'TRUE')


def _path(below, *keys):
    """What one of the variables says, else a place below HF_HOME."""
    home = _env('HF_HOME') or (_env('XDG_CACHE_HOME') or '~/.cache') + '/huggingface'
    return expandvars(expanduser(_env(*keys) or f'{home}/{below}'))


def cache():
    """The folder that holds models--OWNER--NAME."""
    return _path('hub', 'HF_HUB_CACHE', 'HUGGINGFACE_HUB_CACHE')


def _endpoint():
    return (_env('HF_ENDPOINT') or HUB).rstrip('/')


def _auth():
    token = _env('HF_TOKEN', 'HUGGING_FACE_HUB_TOKEN') or _text(_path('token', 'HF_TOKEN_PATH'))
    hidden = _says('HF_HUB_DISABLE_IMPLICIT_TOKEN') or not token.strip()
    return {} if hidden else {'Authorization': 'Bearer ' + token.strip()}


def offline():
    """Is the hub not to be asked?"""
    return _says('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE')


# ----------------------------------------------------------------------------------------------------------
# asked: redirects, tries, words

def _host(url):
    return urlsplit(url)[:2]


def _ask(method, url, stay=False, **headers):
    """A good answer, or 416. Redirects are followed, with stay=True to hosts of the hub only: what it says of
    a file stands in its own answer, a CDN does not know it. The token goes to the hub alone (auth: or
    requests would send what ~/.netrc has for a host). requests.HTTPError if another try may help."""
    hub = _host(_endpoint())
    headers['Accept-Encoding'] = 'identity'
    seconds = float(_env('HF_HUB_ETAG_TIMEOUT' if stay else 'HF_HUB_DOWNLOAD_TIMEOUT') or 30)
    for _ in range(10):
        ours = _host(url) == hub
        if ours and offline():
            raise Refused('HF_HUB_OFFLINE is set')
        answer = requests.request(method, url, headers={**headers, **(_auth() if ours else {})}, stream=True,
                                  auth=lambda request: request, allow_redirects=False, timeout=seconds)
        url = urljoin(url, answer.headers.get('Location', ''))
        if not answer.is_redirect or stay and _host(url) not in (hub, _host(HUB)):
            break
    code = answer.status_code
    if code < 300 or code == 416 or stay and code < 400:
        return answer
    later = code == 429 or code >= 500  # another try may change this answer
    said = REFUSALS.get(code) or REFUSALS[503] * later or 'it gives no reason'
    why = f'the server answered {code}: {said}'
    raise requests.HTTPError(why) if later else Refused(why)


def _patiently(step, part=''):
    """step(), again after each pause where that may help; as long as `part` grows, the pauses begin anew."""
    most, pauses = 0, list(PAUSES)
    while True:
        try:
            return step()
        except requests.HTTPError as error:
            why = error
        except requests.RequestException as error:
            why = f'no answer, or the line broke ({type(error).__name__})'
            if isinstance(error, ValueError):  # an address that requests cannot read
                pauses = []
        if _size(part) > most:
            most, pauses = _size(part), list(PAUSES)
        if not pauses:
            raise Refused(f'{why}; {most:,} bytes are kept, run it again to go on' if most else why)
        time.sleep(pauses.pop(0))


def _hash(url):
    """The hash of a file of the hub by its HEAD: SHA-256 of large files, git's SHA-1 of small ones, '' if it
    is not said."""
    said = _patiently(lambda: _ask('HEAD', url, stay=True)).headers
    tag = re.fullmatch('(W/)?"?([0-9a-f]{40}|[0-9a-f]{64})"?',
                       said.get('X-Linked-Etag') or said.get('ETag') or '')
    return tag[2] if tag else ''


def listing(name, kind='models', revision='main'):
    """(commit, names of the files) of a repository of the hub, kind 'models' or 'datasets'. A commit becomes
    a folder here, so it is 40 hexadecimal digits or Refused; who makes a path of a name looks at it first."""
    url = f'{_endpoint()}/api/{kind}/{name}/revision/{quote(revision, safe="")}'
    answer = _patiently(lambda: _ask('GET', url, stay=True))
    with suppress(ValueError, LookupError, TypeError, OSError):
        said = answer.json()
        names = [str(sibling['rfilename']) for sibling in said['siblings']]
        if re.fullmatch('[0-9a-f]{40}', said['sha']):
            return said['sha'], names
    raise Refused(f'{url} did not answer with a commit and its files')


# ----------------------------------------------------------------------------------------------------------
# fetched

def _size(path):
    return getsize(path) if exists(path) else 0


def _text(path):
    if not exists(path):
        return ''
    with open(path, encoding='latin-1') as f:
        return f.read()


def _digest(path, tag):
    """The hash of a file in the form of `tag`: 40 digits are git's SHA-1 of a blob, all else is SHA-256."""
    digest = hashlib.sha1(b'blob %d\0' % getsize(path)) if len(tag) == 40 else hashlib.sha256()
    with open(path, 'rb') as f:
        return hashlib.file_digest(f, lambda: digest).hexdigest()


def _show(url, have, size, end=''):
    """Progress for the eye: a line that moves on a terminal, elsewhere its end."""
    if have >> 20 and (end or sys.stderr.isatty()) and not _says('HF_HUB_DISABLE_PROGRESS_BARS'):
        name = basename(urlsplit(url).path)
        print(f'\r{name} {have / 1e6:.1f}/{size / 1e6:.1f} MB', end=end, file=sys.stderr, flush=True)


def _stream(url, part, tag):
    """One request for what `part` lacks; returns the length of the whole, 0 if the part is of no use. Without
    a hash a part is continued only if the server still has the version that it began with (If-Range, RFC 9110
    13.1.5; a weak W/"..." says nothing of bytes)."""
    have, mark, asked = _size(part), part + '.etag', {}
    version = '' if tag else _text(mark)
    if have and (tag or version.startswith('"')):
        asked = {'Range': f'bytes={have}-', 'If-Range': version or None}
    answer = _ask('GET', url, **asked)
    said = answer.headers
    span = said.get('Content-Range', '')
    if answer.status_code == 416:  # nothing lies behind the part
        return have if span == f'bytes */{have}' else 0
    if answer.status_code != 206:
        have = 0
    elif not span.startswith(f'bytes {have}-') and (span or not tag):
        return 0
    size = have + int(said.get('Content-Length') or 0)
    if 'Content-Encoding' in said:  # it may be there unasked, and then the length is that of the packed bytes
        size = 0
    if not tag:
        with open(mark, 'w', encoding='latin-1') as f:
            f.write(said.get('ETag', '') if size else '')
    with open(part, 'ab' if have else 'wb') as f:
        for piece in answer.iter_content(PIECE):
            f.write(piece)
            have += len(piece)
            if have % (1 << 20) < PIECE:
                _show(url, have, size or have)
    if have < size:
        raise requests.ConnectionError('cut short')
    _show(url, have, have, '\n')
    return have


def _complete(url, path, part, tag):
    """Makes `path` of `part`, unless it is there: right is what has the hash, or the length where no hash is
    known. What turns out wrong is begun anew, once."""
    for _ in range(2):
        if exists(path):
            return
        try:
            whole = _patiently(lambda: _stream(url, part, tag), part)
        except OSError as error:
            error.filename = error.filename or part  # the disk is full: the part stays, the next run goes on
            raise
        digest = _digest(part, tag)
        if digest == tag or not tag and whole == _size(part):
            os.replace(part, path)
        else:
            os.remove(part)
    if not exists(path):
        raise Refused(f'what came has the hash {digest[:12]}, not {tag[:12]}; it was removed, run it again')


def fetch(url, path, sha256=''):
    """Downloads url to `path`, unless it is there, and returns `path`. Files of huggingface.co come from
    HF_ENDPOINT, with the user's token. Without sha256 the hub's own is taken, elsewhere the length is
    checked. ValueError in one line."""
    if exists(path):
        return path
    try:
        if url.startswith(HUB + '/'):
            url = url.replace(HUB, _endpoint(), 1)
            sha256 = sha256 or _hash(url)
        with locked(path + '.lock'):
            _complete(url, path, path + '.part', sha256)
    except Refused as error:
        raise ValueError(f'{url}: {error}; --src=FILE or --src=FOLDER takes what you have') from None
    for used in ('.lock', '.part.etag'):
        with suppress(OSError):  # who waits for the lock, or makes it anew, finds the whole file
            os.remove(path + used)
    return path


# ----------------------------------------------------------------------------------------------------------
# models by name

def resolve(name, weights=True):
    """A folder as it is; a name of the hub ('gpt2', 'Qwen/Qwen3-0.6B') -> its folder in the cache, after a
    download of what is missing there: the model with its tokenizer, or the tokenizer alone (weights=False).
    ValueError in one line."""
    if os.path.isdir(name):
        if 'config.json' not in os.listdir(name):
            raise ValueError(f'{name}: no config.json (nor ckpt.pt), so neither a model nor an out_dir')
        return name
    if re.fullmatch('out[^/]*|out(-.*)?/.*', name):
        raise ValueError(f'{name}: no such checkpoint; first run the stage that writes it (--out_dir={name})')
    if not re.fullmatch(r'(?!.*(--|\.\.|\.git$))(\w[\w.-]*/)?\w[\w.-]*(?<![.-])', name, re.ASCII):
        raise ValueError(f'{name}: no such file or directory, and not a name of the hub')
    repo = f'{cache()}/models--' + name.replace('/', '--')
    commit = basename(_text(f'{repo}/refs/main'))
    folder = f'{repo}/snapshots/{commit or "-"}'
    whole = not weights or _has_model(folder)
    if whole and _has_tokenizer(folder):
        return folder
    try:
        return _download(name, repo, weights)
    except Refused as error:
        if weights and whole:
            return folder  # only the tokenizer is missing: it may never have had one
        raise ValueError(f'{name}: no such folder here, and from the hub: {error}; `hf download {name}` '
                         f'fills the same cache ({cache()}), or give a directory that you have') from None


def _has(folder, *names):
    return all(exists(f'{folder}/{name}') for name in names)


def _shards(folder):
    """Names of the files that hold the weights, as far as the folder says it."""
    if _has(folder, SINGLE):
        return [SINGLE]
    return sorted(set(re.findall(r'"([\w.-]+\.safetensors)"', _text(f'{folder}/{INDEX}'))))


def _has_model(folder):
    return _has(folder, 'config.json', *_shards(folder) or '-')


def _has_tokenizer(folder):
    return _has(folder, 'tokenizer.json') or _has(folder, 'vocab.json', 'merges.txt')


def _download(name, repo, weights):
    """What is wanted and missing -> blobs/HASH, linked into snapshots/COMMIT, which refs/main then names."""
    commit, names = listing(name)
    folder = f'{repo}/snapshots/{commit}'
    wanted = [file for file in names if TEXTS.fullmatch(file)]
    if weights:
        wanted += [file for file in (INDEX, SINGLE) if file in names][-1:]
    for file in wanted:
        if not _has(folder, file):
            _bring(f'{_endpoint()}/{name}/resolve/{commit}/{file}', repo, f'{folder}/{file}')
        if file == INDEX:
            wanted += _shards(folder)  # the loop goes on with them
    if weights and not _has_model(folder):
        raise Refused('no config.json with safetensors; pickled weights are not read: they can run code')
    os.makedirs(f'{repo}/refs', exist_ok=True)
    with replaced(f'{repo}/refs/main', 'w') as f:
        f.write(commit)
    return folder


def _bring(url, repo, link):
    """One file into the cache. Its lock is huggingface_hub's: its programs and ours wait for each other."""
    tag = _hash(url)
    if not tag:
        raise Refused(f'no checksum in the answer for {url}')
    blob = f'{repo}/blobs/{tag}'
    beside = f'{link}.{secrets.token_hex(4)}.tmp'
    for path in (blob, link):
        os.makedirs(dirname(path), exist_ok=True)
    with locked(f'{cache()}/.locks/{basename(repo)}/{tag}.lock'):
        if exists(link):
            return
        _complete(url, blob, blob + '.incomplete', tag)
        try:
            if _says('HF_HUB_DISABLE_SYMLINKS'):
                raise OSError('no links wanted')
            os.symlink(relpath(blob, dirname(link)), beside)
        except OSError:  # no links here: the file itself
            beside = blob
        os.replace(beside, link)
