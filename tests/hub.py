"""A hub on 127.0.0.1 that answers as the real one does, and with every fault that users met.

Real enough for huggingface_hub: repositories under /api, small files by a relative 307 to /api/resolve-cache
with git's SHA-1, large ones by a 302 with X-Linked-Etag to another host (a second server: it takes no token
and no HEAD), Range, If-Range, 416. What goes wrong stands in the repository's name: me/KIND. seen lists (host
'hub' or 'cdn', method, path, headers), sent counts bodies' bytes. """
import gzip
import hashlib
import http.server
import json
import threading
import time
from urllib.parse import unquote, urlsplit

COMMIT = 'a' * 40
CODES = {'locked': 403, 'hidden': 401, 'busy': 503, 'limited': 429, 'legal': 451, 'teapot': 418}
ODD = {'sha': {'sha': '../../../../outside'},
       'sibling': {'siblings': [{'rfilename': '../../../outside.json'}]},
       'absolute': {'siblings': [{'rfilename': '/tmp/outside.json'}]}, 'null': {'sha': None},
       'number': {'siblings': 3},
       'unnamed': {'siblings': [{'name': 'x'}]}, 'short': {'sha': 'a' * 39},
       'backslash': {'siblings': [{'rfilename': '..\\x'}]}}


def git_sha1(body):
    return hashlib.sha1(b'blob %d\0' % len(body) + body).hexdigest()


class Hub:
    """repos: {'me/plain': {file: bytes}}; any other me/KIND has the files of me/plain. urls: {path: (bytes,
    ETag)} are plain addresses."""

    def __init__(self, files, **repos):
        self.repos = {'me/plain': files, 'new/plain': files, **repos}
        self.urls, self.seen, self.sent, self.tries = {}, [], 0, {}
        self.hub, self.cdn = (http.server.ThreadingHTTPServer(('127.0.0.1', 0),
                                                              self.handler(host)) for host in ('hub', 'cdn'))
        for server in (self.hub, self.cdn):
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        self.url, self.cdn_url = (f'http://127.0.0.1:{server.server_port}' for server in (self.hub, self.cdn))

    def close(self):
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()

    def files(self, name):
        """Of all branches: the names of the files tell them apart."""
        known = [files for repo, files in self.repos.items() if (repo + '/').startswith(name + '/')]
        return {f: b for files in known for f,
                b in files.items()} or (self.repos['me/plain'] if name.startswith('me/') else {})

    def asked(self, method=None, path='', host=None):
        return [s for s in self.seen if method in (None, s[1]) and path in s[2] and host in (None, s[0])]

    def handler(hub, host):
        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = 'HTTP/1.1'

            def log_message(self, *args):
                return None  # quiet

            def answer(self, code, body=b'', stop=None, **headers):
                self.send_response(code)
                for key, value in {'Content-Length': str(len(body)), **headers}.items():
                    if value is not None:
                        self.send_header(key.replace('_', '-'), value)
                self.end_headers()
                if self.command == 'GET':
                    hub.sent += len(body[:stop])
                    self.wfile.write(body[:stop])
                    if stop is not None and stop < len(body):
                        self.close_connection = True

            def do_GET(self):
                hub.seen.append((host, self.command, self.path, dict(self.headers)))
                path = unquote(urlsplit(self.path).path)
                if path in hub.urls:
                    return self.ranged(*hub.urls[path])
                if host == 'cdn':
                    if self.command == 'HEAD' or 'Authorization' in self.headers:
                        return self.answer(400)
                    owner, name, file = path[1:].split('/', 2)
                    return self.serve(name, hub.files(f'{owner}/{name}')[file])
                parts = path.strip('/').split('/')
                if parts[:2] == ['api', 'resolve-cache']:
                    name, file = '/'.join(parts[3:5]), '/'.join(parts[6:])
                    return self.small(name, file)
                if parts[0] == 'api':
                    return self.listing(parts[1], '/'.join(parts[2:4]), parts[4:])
                if parts[0] == 'datasets':
                    parts = parts[1:]
                self.resolve('/'.join(parts[:2]), '/'.join(parts[4:]))

            do_HEAD = do_GET

            def listing(self, kind, name, rest):
                what = name.split('/')[1]
                if not hub.files(name):
                    return self.answer(404)
                if what in ('renamed', 'moved'):
                    return self.answer(307,
                                       Location=(hub.url if what == 'moved' else '')
                                       + self.path.replace(f'/me/{what}', '/new/plain'))
                if what == 'flaky':
                    hub.tries[name] = hub.tries.get(name, 0) + 1
                    if hub.tries[name] < 3:
                        return self.answer(503, Retry_After='0')
                if what in ('busy', 'hidden', 'limited', 'legal', 'teapot'):
                    return self.answer(CODES[what])
                if what in ('html', 'list'):
                    return self.answer(200, {'html': b'<html>log in</html>', 'list': b'[1]'}[what])
                branch = '/'.join([name, *rest[1:]])
                files = hub.repos.get(branch) or hub.repos.get(name) or hub.files(name)
                if rest[:1] == ['tree']:
                    rows = [dict(type='file', path=f, size=len(b), oid=git_sha1(b), **(
                        {'lfs': dict(oid=hashlib.sha256(b).hexdigest(), size=len(b),
                                     pointerSize=130)} if f.endswith('.safetensors') else {}))
                        for f, b in files.items()]
                    return self.answer(200, json.dumps(rows).encode(), Content_Type='application/json')
                said = {'id': name, 'sha': COMMIT,
                        'siblings': [{'rfilename': f} for f in files]} | ODD.get(what, {})
                self.answer(200, json.dumps(said).encode(), Content_Type='application/json')

            def resolve(self, name, file):
                what, files = name.split('/')[1], hub.files(name)
                if what == 'renamed':
                    return self.answer(307, Location=self.path.replace('/me/renamed/', '/new/plain/'))
                if what == 'moved':
                    return self.answer(308, Location=hub.url + self.path.replace('/me/moved/', '/new/plain/'))
                if what == 'circle':
                    return self.answer(307, Location=self.path)
                if what == 'away':
                    return self.answer(302, Location=f'{hub.cdn_url}/{name}/{file}', ETag=None)
                if what == 'slash':
                    return self.answer(302, Location=f'//{urlsplit(hub.cdn_url).netloc}/{name}/{file}')
                if file not in files:
                    return self.answer(404)
                if what == 'locked' and file.endswith('.safetensors'):
                    return self.answer(403, X_Error_Code='GatedRepo')
                body = files[file]
                if not file.endswith(('.safetensors', '.tar', '.parquet', '.gz')):
                    there = f'/api/resolve-cache/models/{name}/{COMMIT}/{file}?etag=%22{git_sha1(body)}%22'
                    return self.answer(307, Location=there, X_Repo_Commit=COMMIT)
                tag = {'etag': '../../outside', 'untagged': None}.get(what, hashlib.sha256(body).hexdigest())
                self.answer(302, Location=f'{hub.cdn_url}/{name}/{file}?signed=1', X_Repo_Commit=COMMIT,
                            ETag='"cdn"', X_Linked_Size=str(len(body)),
                            X_Linked_Etag=tag and f'"{tag}"')

            def small(self, name, file):
                what, body = name.split('/')[1], hub.files(name)[file]
                if what == 'gzip':
                    return self.answer(200, gzip.compress(body), ETag=f'W/"{git_sha1(body)}"',
                                       Content_Encoding='gzip', X_Repo_Commit=COMMIT)
                self.answer(200, body, ETag=f'"{git_sha1(body)}"', X_Repo_Commit=COMMIT)

            def serve(self, what, body):
                if what == 'slow':
                    time.sleep(0.5)
                if what == 'lies':
                    body = bytes(len(body))
                if what == 'packed':
                    return self.answer(200, gzip.compress(body), Content_Encoding='gzip')
                self.ranged(body, None, {'broken': 100_000, 'nameless': 100_000, 'deaf': 100_000,
                                         'dead': 0}.get(what), what not in ('deaf', 'rangeless'),
                                         7 * (what == 'shifted'), what != 'nameless')

            def ranged(self, body, etag, stop=None, ranges=True, shift=0, named=True):
                asked = self.headers.get('Range') if ranges and self.headers.get('If-Range') in (None,
                    etag) else None
                start = int(asked[6:].split('-')[0]) if asked else 0
                if start >= len(body):
                    return self.answer(416, Content_Range=f'bytes */{len(body)}')
                start = max(start - shift, 0)
                said = f'bytes {start}-{len(body) - 1}/{len(body)}' if asked and named else None
                self.answer(206 if asked else 200, body[start:], stop, ETag=etag, Content_Range=said)
        return Handler
