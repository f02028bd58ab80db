"""Whole files or none: whatever is downloaded or written here, no reader ever meets half of it.

    folder = files.resolve('gpt2')                 # a model of the hub: its folder in the usual Hugging Face cache
    path = files.fetch(url, path, size, sha256)    # any file of the web
    with files.replaced('out/ckpt.pt') as f:       # written beside it, then renamed over it
    with files.locked('out/.lock'):                # the kernel gives the lock back, however the process ends

A download goes on where it stopped, its hash is checked, and of several processes one fetches while the others wait. The
cache is huggingface_hub's: what `hf download` fetched is found here, and the other way round. Of its environment we follow
HF_HOME, XDG_CACHE_HOME, HF_HUB_CACHE, HUGGINGFACE_HUB_CACHE, HF_ENDPOINT, HF_TOKEN, HUGGING_FACE_HUB_TOKEN, HF_TOKEN_PATH
(`hf auth login`), HF_HUB_DISABLE_IMPLICIT_TOKEN, HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE, HF_HUB_ETAG_TIMEOUT,
HF_HUB_DOWNLOAD_TIMEOUT, HF_HUB_DISABLE_PROGRESS_BARS, HF_HUB_DISABLE_SYMLINKS. The others are about Xet, telemetry, logging
and OIDC, which are not used here.
"""
import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import secrets
import sys
import time
from urllib.parse import quote, urljoin, urlsplit

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None

HUB = 'https://huggingface.co'
PAUSES = (1, 2, 4, 8)  # seconds before the second, third, ... try
PIECE = 1 << 14  # bytes written at a time: what a broken line costs at most
LATER = {408, 425, 429, 500, 502, 503, 504}  # answers that another try may change
REFUSALS = {
    401: 'there is no such name, or it is private: HF_TOKEN is missing or wrong',
    403: 'no access: ask for it on its page of the hub, and set HF_TOKEN',
    404: 'there is no such name or file',
    429: 'too many requests: try again later',
    500: 'the server is in trouble or busy: try again later'}
TEXTS = re.compile(
    r'(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|vocab|added_tokens)\.json'
    r'|merges\.txt|chat_template\.jinja')
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'


class Refused(ValueError):
    """Why a download cannot go on. resolve, fetch and listing add what it was, and the way that always works."""


# ---------------------------------------------------------------------------------------------------------------------
# written and locked

@contextlib.contextmanager
def replaced(path, mode='wb'):
    """Opens a new file ('wb', or 'w' in UTF-8) that takes the name `path` when the block has ended well and its bytes are on
    the disk. If the block fails, the new file is removed and `path` is what it was. A full disk is an OSError of one line,
    also where torch.save makes a RuntimeError of it. f.name is the temporary name, for writers that want a name."""
    path = os.fspath(path)
    name = f'{path}.{secrets.token_hex(4)}.tmp'
    try:
        with _open_beside(path, name, mode) as f:
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
        with contextlib.suppress(OSError):
            os.remove(name)
        if isinstance(error, OSError) and error.errno and error.filename in (None, name):
            raise OSError(error.errno, f'{error.strerror}; {path} is what it was before') from None
        raise


def _open_beside(path, name, mode):
    """Opens `name` under a lock, so that what a killed process left behind can be told from what is being written."""
    for left in glob.glob(glob.escape(path) + '.' + '[0-9a-f]' * 8 + '.tmp'):
        with contextlib.suppress(OSError), open(left, 'rb') as f:
            _flock(f, wait=False)
            if os.path.samestat(os.fstat(f.fileno()), os.stat(left)):
                os.remove(left)
    while True:
        f = open(name, mode.replace('w', 'x'), encoding=None if 'b' in mode else 'utf-8')
        _flock(f)
        if os.path.exists(name):  # else another process took it for a left one, before the lock
            return f
        f.close()


def _flock(f, wait=True):
    """BlockingIOError if another process has the lock and wait is False. File systems without locks do without."""
    if fcntl:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise


def locked(path, wait=True):
    """Takes the lock that the file `path` stands for and returns that file, open: closing it frees the lock, and so does the end
    of the process, SIGKILL included. The file stays. A child made by fork shares the lock. wait=False: a BlockingIOError if
    another holds it. Two calls in one process exclude each other, too."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    f = open(path, 'a+')
    try:
        try:
            _flock(f, wait=False)
        except BlockingIOError:
            if not wait:
                raise
            print(f'waiting for another process that holds {path}', file=sys.stderr, flush=True)
            _flock(f)
    except BaseException:
        f.close()
        raise
    return f


# ---------------------------------------------------------------------------------------------------------------------
# the environment of huggingface_hub

def _says(key):
    return os.environ.get(key, '').upper() in ('1', 'ON', 'YES', 'TRUE')


def _path(text):
    return os.path.expandvars(os.path.expanduser(text))


def _home():
    above = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
    return _path(os.environ.get('HF_HOME') or os.path.join(above, 'huggingface'))


def cache():
    """The folder that holds models--OWNER--NAME."""
    given = os.environ.get('HF_HUB_CACHE') or os.environ.get('HUGGINGFACE_HUB_CACHE')
    return _path(given or os.path.join(_home(), 'hub'))


def _endpoint():
    return (os.environ.get('HF_ENDPOINT') or HUB).rstrip('/')


def _token():
    if _says('HF_HUB_DISABLE_IMPLICIT_TOKEN'):
        return ''
    token = os.environ.get('HF_TOKEN') or os.environ.get('HUGGING_FACE_HUB_TOKEN')
    return (token or _text(_path(os.environ.get('HF_TOKEN_PATH') or os.path.join(_home(), 'token')))).strip()


def offline():
    return _says('HF_HUB_OFFLINE') or _says('TRANSFORMERS_OFFLINE')


# ---------------------------------------------------------------------------------------------------------------------
# asked: redirects, tries, words

def _number(text):
    return int(text) if re.fullmatch(r'[0-9]{1,18}', text or '') else 0


def _origin(url):
    return urlsplit(url)[:2]


def _send(method, url, stay, headers):
    """One answer, redirects followed; with stay=True those to a host of the hub only: a CDN knows nothing of the file, the hub's
    own answer does. The token goes to the hub alone (auth: or requests would send what ~/.netrc has for the host)."""
    import requests
    hub = _origin(_endpoint())
    timeout = _number(os.environ.get('HF_HUB_ETAG_TIMEOUT' if stay else 'HF_HUB_DOWNLOAD_TIMEOUT')) or 30
    for _ in range(10):
        token = _token() if _origin(url) == hub else ''
        auth = {'Authorization': 'Bearer ' + token} if token else {}
        headers = {**headers, 'Accept-Encoding': 'identity'}
        answer = requests.request(method, url, headers={**headers, **auth}, auth=lambda request: request,
                                  stream=True, allow_redirects=False, timeout=timeout)
        target = urljoin(url, answer.headers.get('Location', ''))
        if not answer.is_redirect or stay and _origin(target) not in (hub, _origin(HUB)):
            return answer
        answer.close()
        url = target
    raise Refused('the server redirects in a circle')


def _ask(method, url, stay=False, **headers):
    """The answer, its status below 400 or 416; asked again where that may help. Else Refused, with the reason in one line."""
    import requests
    for pause in (*PAUSES, None):
        wanted = 0
        try:
            answer = _send(method, url, stay, headers)
        except requests.RequestException as error:
            why = f'no answer from {urlsplit(url).netloc or url} ({type(error).__name__})'
            again = isinstance(error, (requests.ConnectionError, requests.Timeout))
        else:
            code = answer.status_code
            if code < 400 or code == 416:
                return answer
            why = f'the server answered {code}: ' + REFUSALS.get(code, REFUSALS[500 if code > 499 else 403])
            again, wanted = code in LATER, _number(answer.headers.get('Retry-After'))
            answer.close()
        if not again or pause is None:
            raise Refused(why)
        time.sleep(max(pause, min(wanted, 60)))


def _facts(url):
    """(hash, size) of a file of the hub by its HEAD: SHA-256 of large files, git's SHA-1 of small ones; '' and 0 if not said."""
    headers = _ask('HEAD', url, stay=True).headers
    tag = (headers.get('X-Linked-Etag') or headers.get('ETag') or '').removeprefix('W/').strip('"')
    size = _number(headers.get('X-Linked-Size'))
    if not size and not headers.keys() & {'Location', 'Content-Encoding'}:
        size = _number(headers.get('Content-Length'))
    return (tag if re.fullmatch('[0-9a-f]{40}|[0-9a-f]{64}', tag) else ''), size


def listing(name, kind='models', revision='main'):
    """(commit, names of the files) of a repository of the hub. What a server says may become a path here, so a commit is 40
    hexadecimal digits and a name is relative and stays below the folder. Refused if not, or if the hub does not know it."""
    if offline():
        raise Refused('HF_HUB_OFFLINE is set')
    url = f'{_endpoint()}/api/{kind}/{name}/revision/{quote(revision, safe="")}'
    answer = _ask('GET', url, stay=True)
    try:
        said = answer.json()
        commit, names = said['sha'], [sibling['rfilename'] for sibling in said['siblings']]
        odd = [commit] if not re.fullmatch('[0-9a-f]{40}', commit) else []
        odd += [text for text in names if not re.fullmatch(r'(?!.*(^|/)\.{1,2}(/|$))[^/\\]+(/[^/\\]+)*', text)]
    except (ValueError, LookupError, TypeError, OSError):
        raise Refused(f'{url} answered with something else than a list of files') from None
    if odd:
        raise Refused(f'{url} answered with a commit or a file name that cannot be one: {odd[0][:80]!r}')
    return commit, names


# ---------------------------------------------------------------------------------------------------------------------
# fetched

def _text(path):
    if not os.path.exists(path):
        return ''
    with open(path, encoding='latin-1') as f:
        return f.read().strip()


def _size(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def _digest(path, tag):
    """The hash of a file in the form of `tag`: 40 digits are git's SHA-1 of a blob, others are SHA-256."""
    digest = hashlib.sha1(b'blob %d\0' % os.path.getsize(path)) if len(tag) == 40 else hashlib.sha256()
    with open(path, 'rb') as f:
        while piece := f.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def _show(url, have, size, done=False):
    """Progress for the eye: a line that moves on a terminal, else one line at the end."""
    if (done or sys.stderr.isatty()) and not _says('HF_HUB_DISABLE_PROGRESS_BARS'):
        name = os.path.basename(urlsplit(url).path)
        print(f'\r{name} {have / 1e6:.1f}/{(size or have) / 1e6:.1f} MB', end='\n' * done, file=sys.stderr, flush=True)


def _stream(url, part, tag, size):
    """One request for what `part` lacks. Returns how long the whole is by the server's word, -1 if `part` is of no use. With no
    hash known, `part` may only be continued if the server still has the version that it began with (If-Range, RFC 9110 13.1.5)."""
    import requests
    have, mark, headers = _size(part), part + '.etag', {}
    if 0 < size <= have:
        return size  # whole since an earlier run, or too long: the hash decides
    version = '"' if tag else _text(mark)
    if have and version.startswith('"'):  # not W/"...": a weak ETag says nothing of bytes
        headers['Range'] = f'bytes={have}-'
        if not tag:
            headers['If-Range'] = version
    with _ask('GET', url, **headers) as answer:
        said = answer.headers
        begins, _, whole = said.get('Content-Range', '').removeprefix('bytes ').partition('/')
        if answer.status_code == 416:  # nothing lies behind the end of the part
            return _number(whole) or -1
        packed = 'Content-Encoding' in said  # allowed even where identity was asked for: lengths are those of the packed bytes
        if answer.status_code == 206 and (packed or not begins.startswith(f'{have}-')):
            return -1
        have = have if answer.status_code == 206 else 0
        length = 0 if packed else _number(said.get('Content-Length'))
        size = length and have + length
        if not tag:
            etag = said.get('ETag', '')
            with open(mark, 'w', encoding='latin-1') as f:
                f.write('' if packed else etag)
        with open(part, 'ab' if have else 'wb') as f:
            for count, piece in enumerate(answer.iter_content(PIECE)):
                f.write(piece)
                have += len(piece)
                if count % 64 == 0:
                    _show(url, have, size)
    if have < size:
        raise requests.ConnectionError('cut short')
    _show(url, have, size, done=True)
    return have


def _pull(url, part, tag, size):
    """_stream, again and again as long as the line breaks and each try brings something new."""
    import requests
    most, pauses = _size(part), iter(PAUSES)
    while True:
        try:
            return _stream(url, part, tag, size)
        except requests.RequestException as error:
            why = type(error).__name__
        except OSError as error:
            if error.filename or not error.errno:
                raise
            raise OSError(error.errno, f'{error.strerror}; {part} is kept, run it again to go on') from None
        if _size(part) > most:
            most, pauses = _size(part), iter(PAUSES)
        pause = next(pauses, None)
        if pause is None:
            raise Refused(f'the line breaks again and again ({why}), {most:,} bytes are kept: run it again to go on')
        time.sleep(pause)


def _complete(url, part, path, tag, size):
    """Downloads into `part` and renames it to `path` if it is right: its hash, or its length where no hash is known. A part that
    was there before and turns out wrong is begun anew."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    while True:
        fresh = not _size(part)
        size = max(size, 0)
        whole = _pull(url, part, tag, size)
        have, digest = _size(part), _digest(part, tag)
        if digest == tag or not tag and have == whole:
            break
        os.remove(part)
        if fresh:
            raise Refused(f'{have:,} bytes came with hash {digest[:12]}, expected {tag[:12]}; they were removed, run it again')
    os.replace(part, path)
    with contextlib.suppress(OSError):
        os.remove(part + '.etag')


def fetch(url, path, size=0, sha256=''):
    """Downloads url to `path`, unless it is there, and returns `path`. Files of huggingface.co come from HF_ENDPOINT, with the
    user's token. Without a sha256 the hub's own is taken, elsewhere the length is checked. ValueError in one line."""
    if os.path.exists(path):
        return path
    ours = url.startswith(HUB + '/')
    url = url.replace(HUB, _endpoint(), 1) if ours else url
    try:
        if ours and offline():
            raise Refused('HF_HUB_OFFLINE is set')
        with locked(path + '.lock') as lock:
            if not os.path.exists(path):
                if ours and not sha256:
                    sha256, size = _facts(url)
                _complete(url, path + '.part', path, sha256, size)
                os.remove(lock.name)  # who waits for it, or makes it anew, finds the whole file
    except Refused as error:
        raise ValueError(f'{url}: {error}; --src=FILE or --src=FOLDER takes what you have') from None
    return path


# ---------------------------------------------------------------------------------------------------------------------
# models by name

def resolve(name, weights=True):
    """A folder as it is; a name of the hub ('gpt2', 'Qwen/Qwen3-0.6B') -> its folder in the cache, after a download of what is
    missing there: the model with its tokenizer, or the tokenizer alone (weights=False). ValueError in one line."""
    if os.path.isdir(name):
        if 'config.json' not in os.listdir(name):
            raise ValueError(f'{name}: no config.json (nor ckpt.pt) in it: neither a Hugging Face directory nor an out_dir')
        return name
    first, _, rest = name.partition('/')
    if name.startswith('out') and (not rest or re.match('out(-|$)', first)):
        raise ValueError(f'{name}: no such checkpoint; run the stage that writes it first (--out_dir={first})')
    if not re.fullmatch(r'(?!.*(--|\.\.|\.git$))(\w[\w.-]*/)?\w[\w.-]*(?<![.-])', name, re.ASCII):
        raise ValueError(f'{name}: no such file or directory, and not a name of the hub')
    repo = os.path.join(cache(), 'models--' + name.replace('/', '--'))
    folder = _snapshot(repo)
    if _has_model(folder, weights) and _has_tokenizer(folder):
        return folder
    try:
        return _download(name, repo, weights)
    except Refused as error:
        if weights and _has_model(folder, weights):
            return folder  # without a tokenizer: it may never have had one
        raise ValueError(f'{name}: no folder of this name here, and from the hub: {error}; `hf download {name}` fills '
                         f'the same cache ({cache()}), or give a directory that you have') from None


def _snapshot(repo):
    """The folder that refs/main of the cache names, whether it is there or not."""
    return os.path.join(repo, 'snapshots', os.path.basename(_text(os.path.join(repo, 'refs', 'main'))) or '-')


def _has(folder, *names):
    return all(os.path.exists(os.path.join(folder, name)) for name in names)


def _has_tokenizer(folder):
    return _has(folder, 'tokenizer.json') or _has(folder, 'vocab.json', 'merges.txt')


def _has_model(folder, weights):
    return not weights or _has(folder, 'config.json', *(_shards(folder) or ['-']))


def _shards(folder):
    """Names of the files that hold the weights; empty if neither they nor their index are there."""
    if _has(folder, SINGLE) or not _has(folder, INDEX):
        return [SINGLE] * _has(folder, SINGLE)
    path = os.path.join(folder, INDEX)
    try:
        with open(path, encoding='utf-8') as f:
            names = sorted(set(json.load(f)['weight_map'].values()))
        if all(re.fullmatch(r'[\w.-]+\.safetensors', name) for name in names):
            return names
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise ValueError(f'{path}: expected {{"weight_map": {{tensor: file of this folder}}}}; remove it and run again')


def _download(name, repo, weights):
    """The files that are wanted and missing -> blobs/HASH, linked into snapshots/COMMIT; then refs/main names the commit."""
    commit, names = listing(name)
    folder = os.path.join(repo, 'snapshots', commit)

    def bring(file):
        if not _has(folder, file):
            _bring(f'{_endpoint()}/{name}/resolve/{commit}/{file}', repo, os.path.join(folder, file))

    if weights and not ('config.json' in names and {SINGLE, INDEX} & set(names)):
        raise Refused('it has no config.json with safetensors weights; pickled ones are not read, they can run code')
    for file in filter(TEXTS.fullmatch, names):
        bring(file)
    if weights:
        bring(SINGLE if SINGLE in names else INDEX)
        for file in _shards(folder):
            bring(file)
    with replaced(_made(os.path.join(repo, 'refs', 'main')), 'w') as f:
        f.write(commit)
    return folder


def _made(path):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path


def _bring(url, repo, link):
    """One file into the cache. Its lock is huggingface_hub's, so that its programs and ours wait for each other."""
    tag, size = _facts(url)
    if not tag:
        raise Refused(f'no checksum in the answer for {url}')
    above, folder = os.path.split(repo)
    blob = os.path.join(repo, 'blobs', tag)
    with locked(os.path.join(above, '.locks', folder, tag + '.lock')):
        if os.path.exists(link):
            return
        if not os.path.exists(blob):
            _complete(url, blob + '.incomplete', blob, tag, size)
        beside = f'{_made(link)}.{secrets.token_hex(4)}.tmp'
        try:
            if _says('HF_HUB_DISABLE_SYMLINKS'):
                raise OSError('no links wanted')
            os.symlink(os.path.relpath(blob, os.path.dirname(link)), beside)
        except OSError:  # no links here: the file itself
            beside = blob
        os.replace(beside, link)
