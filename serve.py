"""OpenAI's HTTP API over the engine: /v1/completions, /v1/chat/completions, /v1/models, /health.

    python serve.py --init_from=out-ppo --port=8000
    curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello"}]}'

One thread makes the engine's steps. Each connection has a thread of its own, which checks the request, hands
it over and waits on a queue; ten times a second it looks whether its client is still there. What is not
honoured is refused by name, never ignored.
"""
import hmac
import http.server
import json
import os
import queue
import socket
import sys
import threading
import time
from multiprocessing.connection import wait as readable  # select.select takes no descriptor above 1,023

import torch

import kernels as K
from infer import SamplingParams, open_engine

# -----------------------------------------------------------------------------
init_from = 'out-sft' # an out_dir or its ckpt.pt, a Hugging Face directory or name
host = '127.0.0.1' # loopback: other machines cannot connect
port = 8000 # in [0, 65535]: 0 = any that is free
api_key = '' # clients must send it when set
cors = '' # pages of this origin may call the server from a browser; '*' = all pages
# engine
max_num_seqs = 256 # >= 1: requests that run together
max_num_batched_tokens = 2048 # >= 1: tokens of one step: longer prompts are prefilled in chunks
block_size = 0 # >= 0: tokens of a block of keys and values; 0 = 64 on a CPU, 16 on a GPU
num_blocks = 0 # >= 0: 0 = what max_num_seqs full contexts need, within half of the free memory
prefix_caching = True # requests that begin alike share what they begin with
# system
seed = 1337
device = 'auto' # 'auto' = cuda if there is one | 'cpu' | 'cuda' | 'cuda:1'
dtype = 'auto' # of the weights: 'auto' | 'float32' | 'bfloat16' | 'float16' | 'float64'
threads = 0 # >= 0: CPU threads; 0 = the engine's choice
kernels = 'auto' # 'auto' | 'torch' | 'triton'
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read()) # overrides from command line or config file
config = {k: globals()[k] for k in config_keys} # will be useful for logging
# -----------------------------------------------------------------------------

LOOK = 0.1  # seconds between two looks at a client
LONG = 1 << 30
NUMBER = (int, float)
SAMPLING = {  # fields that are settings of SamplingParams: (types, lowest, highest)
    'temperature': (NUMBER, 0, 100),
    'top_p': (NUMBER, 1e-9, 1),
    'top_k': ((int,), -1, LONG),
    'min_p': (NUMBER, 0, 1),
    'presence_penalty': (NUMBER, -2, 2),
    'frequency_penalty': (NUMBER, -2, 2),
    'repetition_penalty': (NUMBER, 1e-3, 100),
    'seed': ((int,), -1 << 63, 1 << 63),
    'n': ((int,), 1, 128),
    'min_tokens': ((int,), 0, LONG),
    'ignore_eos': ((bool,), False, True),
    'stop': ((str, list), None, None),
    'stop_token_ids': ((list,), None, None),
}
OTHER = {  # fields that the server reads itself
    'max_tokens': ((int,), 1, LONG),
    'max_completion_tokens': ((int,), 1, LONG),
    'logit_bias': ((dict,), None, None),
    'stream': ((bool,), False, True),
    'stream_options': ((dict,), None, None),
    'model': ((str,), None, None),
}
OF_PATH = {
    '/v1/completions': {
        'prompt': ((str, list), None, None),
        'logprobs': ((int,), 0, 20),
        'echo': ((bool,), False, True),
    },
    '/v1/chat/completions': {
        'messages': ((list,), None, None),
        'logprobs': ((bool,), False, True),
        'top_logprobs': ((int,), 0, 20),
        'chat_template_kwargs': ((dict,), None, None),
    },
}
HARMLESS = {
    'user',
    'metadata',
    'store',
    'service_tier',
    'parallel_tool_calls',
    'safety_identifier',
    'prompt_cache_key',
}
FINE = {  # fields that we do not have, with the value that asks for nothing
    'best_of': 1,
    'suffix': '',
    'tools': [],
    'functions': [],
    'tool_choice': 'none',
    'response_format': {'type': 'text'},
    'modalities': ['text'],
    'add_generation_prompt': True,
    'continue_final_message': False,
}
ROLES = ('system', 'developer', 'user', 'assistant', 'tool')


class BadRequest(Exception):
    """What a client did wrong, in OpenAI's form."""

    def __init__(self, message, status=400, code=None, param=None):
        super().__init__(message)
        kind = 'server_error' if status >= 500 else 'invalid_request_error'
        if status == 401:
            kind = 'authentication_error'
        self.status = status
        self.body = dict(error=dict(message=message, type=kind, param=param, code=code))


# -----------------------------------------------------------------------------
# what a request says


def check_fields(body, path):
    """Every field is known, of its type and in its range: else BadRequest. Nulls are left out of the
    answer."""
    body = {name: value for name, value in body.items() if value is not None}
    known = {**SAMPLING, **OTHER, **OF_PATH[path]}
    for name, value in body.items():
        if name in HARMLESS or (name in FINE and value == FINE[name]):
            continue
        if name not in known:
            raise BadRequest(f"'{name}' is not supported by this server.", param=name)
        types, low, high = known[name]
        if type(value) not in types:
            wanted = ' or '.join(t.__name__ for t in types)
            raise BadRequest(f"'{name}' is expected to be {wanted}, got {type(value).__name__}.", param=name)
        if low is not None and not low <= value <= high:
            raise BadRequest(f"'{name}' is {value}, expected {low} to {high}.", param=name)
    odd = body.get('stream_options', {}).keys() - {'include_usage', 'include_obfuscation'}
    if odd:
        raise BadRequest(
            f"'stream_options.{min(odd)}' is not supported by this server.", param='stream_options'
        )
    return body


def sampling_params(body, max_tokens, logprobs):
    """SamplingParams of a checked body."""
    settings = {name: body[name] for name in SAMPLING if name in body}
    limit = body.get('max_completion_tokens', body.get('max_tokens', max_tokens))
    try:
        bias = {int(token): float(value) for token, value in body.get('logit_bias', {}).items()}
        if not all(-100 <= value <= 100 for value in bias.values()):
            raise ValueError("'logit_bias' is expected to map token ids to numbers from -100 to 100.")
        if not all(type(token) is int for token in settings.get('stop_token_ids', ())):
            raise ValueError("'stop_token_ids' are expected to be integers.")
        return SamplingParams(max_tokens=limit, logprobs=logprobs, logit_bias=bias, **settings)
    except (ValueError, TypeError, OverflowError) as e:
        raise BadRequest(str(e)) from None


def prompts_of(body):
    """-> [str or [int]]"""
    prompt = body.get('prompt')

    def single(x):
        return isinstance(x, str) or (isinstance(x, list) and len(x) > 0 and all(type(t) is int for t in x))
    prompts = [prompt] if single(prompt) else prompt
    if not isinstance(prompts, list) or not prompts or not all(map(single, prompts)):
        wanted = 'a non-empty string, list of strings, list of token ids, or list of those'
        raise BadRequest(f"'prompt' is expected to be {wanted}.", param='prompt')
    return prompts


def messages_of(body, tokenizer):
    """The messages as the chat template takes them: all that a message says goes there, but for nulls."""
    messages = body.get('messages')
    if not messages:
        raise BadRequest("'messages' is expected to be a non-empty list.", param='messages')
    return [message_of(m, f'messages[{i}]', tokenizer) for i, m in enumerate(messages)]


def message_of(m, where, tokenizer):
    def expect(fine, wanted):
        if not fine:
            raise BadRequest(f"'{where}' is expected to have {wanted}.", param='messages')
    expect(isinstance(m, dict) and isinstance(m.get('role'), str), 'a role and a content')
    templates = ' '.join(tokenizer.templates.values())
    expect(
        m['role'] in ROLES or repr(m['role']) in templates, f"a role of {', '.join(ROLES)}, not {m['role']!r}"
    )
    expect(
        not m.get('audio') and not m.get('function_call'),
        "no 'audio' and no 'function_call': this server has neither",
    )
    calls, content = m.get('tool_calls') or [], m.get('content')
    expect(
        isinstance(calls, list) and all(map(is_call, calls)), "tool_calls {'function': {'name', 'arguments'}}"
    )
    if isinstance(content, list):
        expect(all(is_text(part) for part in content), 'parts of type text only')
        content = ''.join(part['text'] for part in content)
    silent = content is None and (calls or m.get('reasoning_content'))
    expect(silent or isinstance(content, str), 'a content: a string, or a list of text parts')
    message = {key: value for key, value in m.items() if value is not None} | dict(content=content)
    if m['role'] == 'developer' and 'developer' not in templates:
        message['role'] = 'system'  # its newer name, which this template does not know
    return message


def is_text(part):
    return isinstance(part, dict) and part.get('type') == 'text' and isinstance(part.get('text'), str)


def is_call(call):
    function = call.get('function') if isinstance(call, dict) else None
    named = isinstance(function, dict) and isinstance(function.get('name'), str)
    return named and isinstance(function.get('arguments', ''), (str, dict))


# -----------------------------------------------------------------------------
# log-probs: the text of single tokens


class Pieces:
    """Texts of one answer's tokens, each in the light of the tokens before: they join to the text. A token
    that holds only a part of a UTF-8 character has the text '', the one that completes it has the
    character."""

    def __init__(self, tokenizer, prompt, silent=()):
        self.tokenizer, self.tokens = tokenizer, list(prompt)
        self.silent = silent  # end tokens: they have no text
        self.whole = None     # the answer's text once it is complete: its last token has what is left of it
        self.read = len(prompt)
        self.prefix = max(self.read - 5, 0)  # text = decode(prefix:) minus decode(prefix:read)
        self.offset = 0  # characters so far

    def text(self, token):
        """The text of `token` if it came next."""
        before = self.tokenizer.decode(self.tokens[self.prefix:self.read])
        after = self.tokenizer.decode(self.tokens[self.prefix:] + [token])
        return '' if after.endswith('\ufffd') else after[len(before):]

    def name(self, token):
        return self.text(token) or f'token_id:{token}'

    def add(self, token, last=False):
        text = '' if token in self.silent else self.text(token)
        if last and self.whole is not None:
            text = self.whole[self.offset:]
        self.tokens.append(token)
        if not self.tokenizer.decode(self.tokens[self.prefix:]).endswith('\ufffd'):
            self.prefix, self.read = self.read, len(self.tokens)
        self.offset += len(text)
        return text

    def completion(self, rows):
        """rows [(token, log-prob, {token: log-prob})] -> logprobs of /v1/completions. The token itself is
        always among the top ones."""
        out = dict(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for i, (token, logprob, top) in enumerate(rows, 1):
            named = {}
            for t, x in {**top, token: logprob}.items() if top is not None else ():
                name = self.name(t)
                named[f'token_id:{t}' if name in named else name] = x  # two tokens may have one text
            out['text_offset'].append(self.offset)
            out['tokens'].append(self.add(token, i == len(rows)))
            out['token_logprobs'].append(logprob)
            out['top_logprobs'].append(named if top is not None else None)
        return out

    def chat(self, rows):
        """The same -> logprobs of /v1/chat/completions."""
        def entry(text, logprob):
            return dict(token=text, logprob=logprob, bytes=list(text.encode()))
        content = []
        for i, (token, logprob, top) in enumerate(rows, 1):
            best = [entry(self.text(t), x) for t, x in top.items()]
            content.append(dict(entry(self.add(token, i == len(rows)), logprob), top_logprobs=best))
        return dict(content=content, refusal=None)


@torch.inference_mode()
def score_prompt(engine, ids, top):
    """[(token, log-prob, {token: log-prob} of the `top` largest)] of a prompt by the plain model, for `echo`.
    The first has none."""
    rows, model = [(ids[0], None, None)], engine.model
    with engine.lock:
        x = model.encode(torch.tensor([ids], device=engine.device))[0]
        for first in range(0, len(ids) - 1, 256):  # logits of 256 tokens at a time
            part = x[first:first + 256]
            logp = K.product(part, model.lm_head.weight).log_softmax(-1)
            best = logp.topk(min(top, logp.shape[1]), -1)
            for i, token in enumerate(ids[first + 1:first + 257]):
                tops = dict(zip(best.indices[i].tolist(), best.values[i].tolist()))
                rows.append((token, float(logp[i, token]), tops))
    return rows


# -----------------------------------------------------------------------------
# the server


class HTTP(http.server.ThreadingHTTPServer):
    request_queue_size, daemon_threads = 1024, True

    def handle_error(self, request, client_address):
        """A client's reset is nobody's fault; anything else is one line."""
        error = sys.exception()
        if not isinstance(error, (ConnectionError, TimeoutError)):
            print(f'server: {type(error).__name__}: {error}', file=sys.stderr, flush=True)


class Server:
    """HTTP in front of an engine: Server(engine, name, port=0).start(); .url; .close(). A host that is not
    loopback needs an api_key."""

    def __init__(
        self, engine, name='model', host='127.0.0.1', port=8000, api_key='', cors='', max_body=8 << 20
    ):
        if not api_key and host not in ('127.0.0.1', 'localhost', '::1'):
            raise ValueError(
                f'--host={host} lets other machines in: set --api_key=..., or serve on 127.0.0.1'
            )
        self.engine, self.name, self.created = engine, name, int(time.time())
        self.api_key, self.cors, self.max_body = api_key, cors, max_body
        self.inbox, self.alive = queue.SimpleQueue(), True
        self.open = {}  # request id -> the queue of the connection that waits for it
        family = socket.AF_INET6 if ':' in host else socket.AF_INET
        kind = type('HTTP', (HTTP,), dict(address_family=family))
        self.http = kind((host, port), type('Handler', (Handler,), dict(server_state=self)))
        shown = f'[{host}]' if ':' in host else host
        self.url = f'http://{shown}:{self.http.server_address[1]}'
        self.threads = [
            threading.Thread(target=f, daemon=True) for f in (self._work, self.http.serve_forever)
        ]

    def start(self):
        for thread in self.threads:
            thread.start()
        return self

    def close(self):
        self.alive = False
        self.http.shutdown()
        self.http.server_close()
        self.inbox.put(None)
        self.threads[0].join(10)

    def _work(self):
        """Requests and hang-ups in, one step, events out; sleeps on the inbox when there is nothing to do."""
        while self.alive:
            while self.alive and not (self.inbox.empty() and self.engine.has_unfinished()):
                job = self.inbox.get()
                if job is not None:
                    self._take(*job)
            try:
                events = self.engine.step()
            # the engine has dropped all requests: their clients hear why, the server lives on
            except Exception as e:
                self._fail(e)
                continue
            for event in events:
                box = self.open.get(event['request_id'])
                if box is not None:
                    box.put(event)

    def _fail(self, error):
        print(f'engine: {type(error).__name__}: {error}', file=sys.stderr, flush=True)
        for request_id, box in list(self.open.items()):
            self.engine.abort(request_id)
            box.put(BadRequest(f'the engine failed: {error}', 500))
        self.open.clear()

    def _take(self, verb, request_id, prompt=None, params=None, box=None):
        if verb == 'abort':
            self.engine.abort(request_id)
            self.open.pop(request_id, None)
            return
        try:
            self.engine.add_request(prompt, params, request_id)
            self.open[request_id] = box
        except ValueError as e:
            box.put(BadRequest(str(e)))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    timeout = 60  # seconds that a silent or unread connection lives
    # header and body are two small writes: the second would wait 40 ms for the first
    disable_nagle_algorithm = True
    server_state = None

    def log_message(self, *args):
        """Nothing: prompts are the users' own."""

    # ---- HTTP ----

    def do_GET(self):
        self.guarded(self.get)

    do_HEAD = do_GET  # reply() leaves the body out

    def do_POST(self):
        self.guarded(self.post)

    def do_OPTIONS(self):
        self.guarded(lambda: self.reply(204, None), needs_key=False)

    def send_error(self, code, message=None, explain=None):
        """What the standard library refuses by itself, in OpenAI's form too."""
        self.close_connection = True
        self.reply(code, BadRequest(message or self.responses.get(code, ('error',))[0], code).body)

    def guarded(self, work, needs_key=True):
        """Runs a request; every mistake of the client becomes an answer, a client that is gone becomes
        nothing."""
        self.streaming = False
        try:
            given, key = self.headers.get('Authorization', ''), self.server_state.api_key
            if (
                key
                and needs_key
                and self.path != '/health'
                and not hmac.compare_digest(given.encode(), f'Bearer {key}'.encode())
            ):
                raise BadRequest('Incorrect API key provided.', 401, 'invalid_api_key')
            work()
        except BadRequest as e:
            if self.streaming:
                self.chunk(e.body)
                self.end_stream()
            else:
                self.close_connection = True  # a body that was not read would be taken for the next request
                self.reply(e.status, e.body)
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def head(self, status, **headers):
        self.send_response(status)
        if self.server_state.cors:
            headers |= {
                'Access-Control-Allow-Origin': self.server_state.cors,
                'Access-Control-Allow-Headers': '*',
                'Access-Control-Allow-Methods': 'GET, HEAD, POST, OPTIONS',
            }
        if self.close_connection:
            # said, else a client sends its next request into a closed connection
            headers['Connection'] = 'close'
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.end_headers()

    def reply(self, status, body):
        data = b'' if body is None else json.dumps(body).encode()
        length = {} if status == 204 else dict(Content_Type='application/json', Content_Length=str(len(data)))
        self.head(status, **length, **(dict(Allow='GET, HEAD, POST, OPTIONS') if status == 204 else {}))
        if self.command != 'HEAD':
            self.wfile.write(data)

    def begin_stream(self):
        self.streaming, self.chunked = True, self.request_version != 'HTTP/1.0'
        if not self.chunked:  # the end of the connection is the end of the answer (RFC 9112, 6.1)
            self.close_connection = True
        encoding = dict(Transfer_Encoding='chunked') if self.chunked else {}
        self.head(200, Content_Type='text/event-stream', Cache_Control='no-cache', **encoding)

    def chunk(self, body):
        data = b'data: ' + (json.dumps(body).encode() if isinstance(body, dict) else body) + b'\n\n'
        self.wfile.write(b'%x\r\n%s\r\n' % (len(data), data) if self.chunked else data)

    def end_stream(self):
        self.chunk(b'[DONE]')
        if self.chunked:
            self.wfile.write(b'0\r\n\r\n')

    # ---- requests ----

    def get(self):
        state, path = self.server_state, self.path.split('?')[0]
        card = dict(
            id=state.name,
            object='model',
            created=state.created,
            owned_by='plainrlhf',
            max_model_len=state.engine.max_len,
        )
        pages = {
            '/health': dict(status='ok', **state.engine.stats()),
            '/v1/models': dict(object='list', data=[card]),
            '/v1/models/' + state.name: card,
        }
        if path not in pages:
            raise BadRequest(f'There is no {path} here.', 404, 'not_found')
        self.reply(200, pages[path])

    def post(self):
        path, name = self.path.split('?')[0], self.server_state.name
        if path not in OF_PATH:
            raise BadRequest(
                f'There is no {path} here: {", ".join(OF_PATH)} and /v1/models are.', 404, 'not_found'
            )
        body = self.read_json()
        if body.get('model') not in (None, name):
            raise BadRequest(
                f"The model {body['model']!r} does not exist; this server has {name!r}.",
                404,
                'model_not_found',
                'model',
            )
        body = check_fields(body, path)
        if path == '/v1/completions':
            params = sampling_params(body, 16, body.get('logprobs', 0))
            return Answer(self, body, prompts_of(body), params, chat=False).send()
        tokenizer, most = self.server_state.engine.tokenizer, self.server_state.engine.max_len
        try:
            messages, extra = messages_of(body, tokenizer), body.get('chat_template_kwargs', {})
            prompt = tokenizer.apply_chat_template(messages, **{'add_generation_prompt': True, **extra})
        except (ValueError, TypeError) as e:
            raise BadRequest(str(e), param='messages') from None
        params = sampling_params(body, max(1, most - len(prompt)), body.get('top_logprobs', 0))
        Answer(self, body, [prompt], params, chat=True).send()

    def read_json(self):
        length, limit = self.headers.get('Content-Length', ''), self.server_state.max_body
        if not length.isdecimal() or self.headers.get('Transfer-Encoding'):
            raise BadRequest('A body with a Content-Length is needed.', 411)
        if int(length) > limit:
            raise BadRequest(f'The body has {length} bytes, the limit is {limit}.', 413)
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise ConnectionResetError
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as e:
            raise BadRequest(f'The body is not JSON: {type(e).__name__} {e}') from None
        if not isinstance(body, dict):
            raise BadRequest(f'The body is a JSON {type(body).__name__}, expected an object.')
        return body

    def look(self):
        """ConnectionResetError when the client is gone."""
        if readable([self.connection], 0) and not self.connection.recv(1, socket.MSG_PEEK):
            raise ConnectionResetError
        if not self.server_state.alive:
            raise BadRequest('The server is shutting down.', 503)


class Answer:
    """One request on its way through the engine: `choices` samples, whole or streamed."""

    def __init__(self, handler, body, prompts, params, chat):
        self.handler, self.state = handler, handler.server_state
        self.body, self.params, self.chat = body, params, chat
        engine = self.state.engine
        try:
            self.ids = [engine.check(p, params) for p in prompts]
        except ValueError as e:
            code = 'context_length_exceeded' if 'context' in str(e) else None
            raise BadRequest(str(e), code=code, param='messages' if chat else 'prompt') from None
        self.stream, self.echo = body.get('stream', False), body.get('echo', False)
        if self.stream and self.echo:
            raise BadRequest("'echo' is not supported by this server with 'stream'.", param='echo')
        self.with_logprobs = body.get('logprobs', False) if chat else 'logprobs' in body
        kind = 'chat.completion' if chat else 'text_completion'
        self.frame = dict(
            id=('chatcmpl-' if chat else 'cmpl-') + os.urandom(12).hex(),
            object=kind,
            created=int(time.time()),
            model=self.state.name,
        )
        self.choices = len(self.ids) * params.n
        self.silent = () if params.ignore_eos else (*engine.end_ids(), *params.stop_token_ids)
        self.pieces = [
            Pieces(engine.tokenizer, self.ids[k // params.n], self.silent) for k in range(self.choices)
        ]
        self.texts, self.reasons, self.rows = (
            [''] * self.choices,
            [None] * self.choices,
            [[] for _ in range(self.choices)],
        )
        self.count = 0  # tokens so far

    def send(self):
        box = queue.SimpleQueue()
        jobs = {f"{self.frame['id']}-{i}": i for i in range(len(self.ids))}
        if self.echo:
            self.begin_with_prompts()
        for request_id, i in jobs.items():
            self.state.inbox.put(('add', request_id, self.ids[i], self.params, box))
        try:
            if self.stream:
                self.begin()
            while None in self.reasons:
                event = self.next_event(box)
                self.take(event, jobs[event['request_id']] * self.params.n + event['index'])
        finally:  # also when the client has hung up, or one of several prompts was refused
            for request_id in jobs:
                self.state.inbox.put(('abort', request_id))
        self.end()

    def next_event(self, box):
        """Waits for the engine. By the clock, not by the engine's silence: a look whether the client is still
        there."""
        while True:
            if time.monotonic() > getattr(self, 'looked', 0) + LOOK:
                self.handler.look()
                self.looked = time.monotonic()
            try:
                event = box.get(timeout=LOOK)
            except queue.Empty:
                continue
            if isinstance(event, BadRequest):
                raise event
            return event

    def take(self, event, k):
        self.texts[k] += event['text']
        self.reasons[k] = event['finish_reason']
        self.count += len(event['token_ids'])
        if self.with_logprobs:
            tops = event['top_logprobs'] or [{}] * len(event['token_ids'])
            self.rows[k] += zip(event['token_ids'], event['raw_logprobs'], tops)
        if self.stream and (event['text'] or event['finished'] or self.with_logprobs):
            self.tell(k, event['text'], event['finish_reason'])

    def logprobs(self, k):
        """Of what is new."""
        if not self.with_logprobs:
            return None
        rows, self.rows[k] = self.rows[k], []
        if self.reasons[k] == 'length':
            self.pieces[k].whole = self.texts[k]
        return self.pieces[k].chat(rows) if self.chat else self.pieces[k].completion(rows)

    def begin_with_prompts(self):
        """echo: the text begins with the prompt, its tokens and their log-probs too."""
        tokenizer = self.state.engine.tokenizer
        for k in range(self.choices):
            ids = self.ids[k // self.params.n]
            self.pieces[k] = Pieces(tokenizer, [], self.silent)
            self.texts[k] = tokenizer.decode(ids)
            if self.with_logprobs:
                self.rows[k] = score_prompt(self.state.engine, ids, self.params.logprobs)

    # ---- in OpenAI's form ----

    def begin(self):
        self.handler.begin_stream()
        for k in range(self.choices if self.chat else 0):
            self.piece(
                dict(index=k, delta=dict(role='assistant', content=''), logprobs=None, finish_reason=None)
            )

    def tell(self, k, text, reason):
        said = dict(text=text)
        if self.chat:
            said = dict(delta=dict(content=text) if text else {})
        self.piece(dict(index=k, **said, logprobs=self.logprobs(k), finish_reason=reason))

    def piece(self, *choices, **more):
        kind = 'chat.completion.chunk' if self.chat else 'text_completion'
        self.handler.chunk({**self.frame, 'object': kind, 'choices': list(choices), **more})

    def end(self):
        prompt_tokens = sum(map(len, self.ids))
        usage = dict(
            prompt_tokens=prompt_tokens, completion_tokens=self.count, total_tokens=prompt_tokens + self.count
        )
        if self.stream:
            if self.body.get('stream_options', {}).get('include_usage'):
                self.piece(usage=usage)
            return self.handler.end_stream()
        choices = []
        for k, text in enumerate(self.texts):
            said = (
                dict(message=dict(role='assistant', content=text, refusal=None))
                if self.chat
                else dict(text=text)
            )
            choices.append(dict(index=k, **said, logprobs=self.logprobs(k), finish_reason=self.reasons[k]))
        self.handler.reply(200, dict(self.frame, choices=choices, usage=usage))


def main():
    engine = open_engine(
        init_from,
        device,
        dtype,
        kernels,
        seed,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        block_size=block_size,
        num_blocks=num_blocks,
        prefix_caching=prefix_caching,
        threads=threads,
    )
    name = os.path.basename(os.path.normpath(init_from))
    server = Server(engine, name, host, port, api_key, cors).start()
    print(f'serving {name} on {server.url}/v1 (Ctrl-C stops)', file=sys.stderr, flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.close()


if __name__ == '__main__':
    main()
