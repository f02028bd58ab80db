"""OpenAI's HTTP API over the engine: /v1/completions, /v1/chat/completions, /v1/models, /health.

    python serve.py --init_from=out-ppo --port=8000
    curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello"}]}'

One thread makes the engine's steps. Each connection has a thread of its own, which checks the request, hands
it over and waits on a queue; ten times a second it looks whether its client is still there. Messages, tools
and chat_template_kwargs are read as the stages read a row; a tool call comes back as the text that the model
wrote. What is not honoured is refused by name, never ignored.
"""
import dataclasses
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

from infer import SamplingParams, open_engine
from tokenizer import encode_prompt

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
num_blocks = 0 # >= 0: 0 = for max_num_seqs contexts, in 90 % of a GPU's free memory (CPU: half)
prefix_caching = True # requests that begin alike share what they begin with
# system
seed = 1337
device = 'auto' # 'auto' = cuda if there is one | 'cpu' | 'cuda' | 'cuda:1'
dtype = 'auto' # of the weights: 'auto' | 'float32' | 'bfloat16' | 'float16' | 'float64'
threads = 0 # >= 0: CPU threads; 0 = the engine's choice
kernels = 'auto' # 'auto' | 'torch' | 'triton'
config_keys = [k for k, v in globals().items()
               if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
# overrides from the command line or a config file
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read())
config = {k: globals()[k] for k in config_keys} # will be useful for logging
# -----------------------------------------------------------------------------

# what a request may say, and of which type: every setting of SamplingParams, which also knows their ranges
NUMBER = {float: int | float}  # JSON writes 1.0 as 1
SETTINGS = {s.name: NUMBER.get(s.type, s.type) for s in dataclasses.fields(SamplingParams)}
SHARED = {**SETTINGS, 'max_completion_tokens': int, 'model': str, 'stream': bool, 'stream_options': dict}
CHAT = {'messages': list, 'tools': list, 'chat_template_kwargs': dict, 'logprobs': bool, 'top_logprobs': int}
KEYS = {
    '/v1/completions': {**SHARED, 'prompt': str | list, 'echo': bool},
    '/v1/chat/completions': {**SHARED, **CHAT},
}
MOST = {'n': 128, 'logprobs': 20, 'top_logprobs': 20}
FINE = {  # keys that we do not have, with the values that ask for nothing
    'best_of': [1],
    'tool_choice': ['none', 'auto'],
    'response_format': [{'type': 'text'}],
    'add_generation_prompt': [True],
    'continue_final_message': [False],
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
ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
MAX_BODY = 8 << 20  # bytes
LOOK = 0.1  # seconds between two looks at a client


class BadRequest(ValueError):
    """What a client did wrong. Any other ValueError while its request is read is one with status 400."""

    def __init__(self, message, status=400, code=None):
        super().__init__(message)
        self.status, self.code = status, code


# -----------------------------------------------------------------------------
# what a request says


def checked(body, path):
    """The body without its nulls. BadRequest for a key that is unknown, of another type or too large."""
    body = {key: value for key, value in body.items() if value is not None}
    for key, value in body.items():
        kind = KEYS[path].get(key)
        if key in HARMLESS or value in FINE.get(key, ()):
            continue
        if kind is None:
            raise BadRequest(f"'{key}' is not supported by this server.")
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = getattr(kind, '__name__', kind)
            raise BadRequest(f"'{key}' is expected to be {wanted}, got {type(value).__name__}.")
        if key in MOST and value > MOST[key]:
            raise BadRequest(f"'{key}' is {value}, expected at most {MOST[key]}.")
    return body


def prompts_of(body):
    """-> [str or [int]]; the engine looks at each."""
    prompt = body.get('prompt', '')
    several = isinstance(prompt, list) and any(isinstance(part, (str, list)) for part in prompt)
    return prompt if several else [prompt]


def chat_prompt(body, tokenizer):
    """-> [int]"""
    templates = ' '.join(tokenizer.templates.values())
    if not body.get('messages'):
        raise BadRequest("'messages' is expected to be a non-empty list.")
    for i, message in enumerate(body['messages']):
        check_message(message, f"'messages[{i}]'", templates)
    row = {key: body[key] for key in ('messages', 'tools', 'chat_template_kwargs') if key in body}
    return encode_prompt(row, tokenizer)


def check_message(message, where, templates):
    """BadRequest for what no template can honour. 'developer' becomes 'system', its older name, where the
    template does not know it."""
    role = message.get('role') if isinstance(message, dict) else None
    if role not in ROLES and not (isinstance(role, str) and repr(role) in templates):
        raise BadRequest(f"{where} is expected to have a role of {', '.join(ROLES)}, not {role!r}.")
    if role == 'developer' and role not in templates:
        message['role'] = 'system'
    content = message.get('content')
    silent = content is None and (message.get('tool_calls') or message.get('reasoning_content'))
    if not silent and not isinstance(content, (str, list)):
        raise BadRequest(f'{where} is expected to have a content: a string, or a list of text parts.')
    for key in ('audio', 'function_call'):
        if message.get(key):
            raise BadRequest(f'{where} has {key!r}, which is not supported by this server.')


# -----------------------------------------------------------------------------
# the server


class Server(http.server.ThreadingHTTPServer):
    """HTTP in front of an engine: Server(engine, name, port=0).start(); .url; .close(). A host that is not
    loopback needs an api_key."""
    request_queue_size = 1024  # connections that wait to be accepted

    def __init__(self, engine, name='model', host='127.0.0.1', port=8000, api_key='', cors=''):
        if not api_key and host not in ('127.0.0.1', 'localhost', '::1'):
            raise ValueError(
                f'--host={host} lets other machines in: set --api_key=..., or serve on 127.0.0.1'
            )
        if ':' in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, port), Handler)
        self.engine, self.name = engine, name
        self.api_key, self.cors = api_key, cors
        self.inbox = queue.SimpleQueue()  # what the engine's thread shall do between two steps
        self.boxes = {}  # request id -> the queue of the connection that waits for it
        self.url = f'http://{f"[{host}]" if ":" in host else host}:{self.server_address[1]}'
        self.worker = threading.Thread(target=self._work, daemon=True)

    def start(self):
        self.worker.start()
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def close(self):
        self.shutdown()
        self.server_close()
        self.inbox.put(None)
        self.worker.join(10)
        self._fail(BadRequest('The server is shutting down.', 503))

    def handle_error(self, request, client_address):
        """A client's reset is nobody's fault; anything else is one line."""
        error = sys.exception()
        if not isinstance(error, OSError):
            print(f'server: {type(error).__name__}: {error}', file=sys.stderr, flush=True)

    def submit(self, request_id, prompt, params, box):
        self.boxes[request_id] = box
        self.inbox.put(lambda: self.engine.add_request(prompt, params, request_id))

    def drop(self, request_id):
        self.boxes.pop(request_id, None)
        self.inbox.put(lambda: self.engine.abort(request_id))

    def _work(self):
        """Requests and hang-ups in, one step, events out; sleeps on the inbox when there is nothing to do."""
        while True:
            try:
                while not (self.inbox.empty() and self.engine.has_unfinished()):
                    job = self.inbox.get()
                    if job is None:
                        return
                    job()
                for event in self.engine.step():
                    box = self.boxes.get(event['request_id'])
                    if box:
                        box.put(event)
            except Exception as error:  # all clients hear why, the server lives on
                print(f'engine: {type(error).__name__}: {error}', file=sys.stderr, flush=True)
                self._fail(BadRequest(f'the engine failed: {error}', 500))

    def _fail(self, error):
        for request_id, box in list(self.boxes.items()):
            self.engine.abort(request_id)
            box.put(error)


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    timeout = 60  # seconds that a silent or unread connection lives
    # header and body are two small writes: the second would wait 40 ms for the first
    disable_nagle_algorithm = True
    streaming = False

    def log_message(self, *said):
        return  # prompts are the users' own

    # ---- HTTP ----

    def do_GET(self):
        self.guarded(self.get)

    do_HEAD = do_GET  # reply() leaves the body out

    def do_POST(self):
        self.guarded(self.post)

    def do_OPTIONS(self):
        self.send_response(204)
        self.end_headers()

    def guarded(self, work):
        """Runs a request; a mistake of the client becomes an answer."""
        given, key = self.headers.get('Authorization', ''), self.server.api_key
        known = hmac.compare_digest(given.encode(), f'Bearer {key}'.encode())
        try:
            if key and not known and self.path != '/health':
                raise BadRequest('Incorrect API key provided.', 401, 'invalid_api_key')
            work()
        except (ValueError, RecursionError) as error:
            self.refuse(error)

    def send_error(self, code, message=None, explain=None):
        """What the standard library refuses by itself."""
        self.refuse(BadRequest(message or self.responses[code][0], code))

    def refuse(self, error):
        message, status, code = str(error), getattr(error, 'status', 400), getattr(error, 'code', None)
        if 'the context is' in message:
            code = 'context_length_exceeded'
        kind = 'server_error' if status >= 500 else 'invalid_request_error'
        body = dict(error=dict(message=message, type=kind, param=None, code=code))
        if self.streaming:
            self.tell(body)
            return self.end_stream()
        self.close_connection = True  # a body that was not read would be taken for the next request
        self.reply(status, body)

    def end_headers(self):
        if self.server.cors:
            self.send_header('Access-Control-Allow-Origin', self.server.cors)
            self.send_header('Access-Control-Allow-Headers', 'Authorization, *')
        if self.close_connection:  # said, else a client sends its next request into a closed connection
            self.send_header('Connection', 'close')
        super().end_headers()

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', len(data))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(data)

    def begin_stream(self):
        """Server-sent events; where the connection ends, they end (RFC 9112, 6.3)."""
        self.streaming = self.close_connection = True
        self.send_response(200)
        self.send_header('Content-Type', 'text/event-stream')
        self.send_header('Cache-Control', 'no-cache')
        self.end_headers()

    def tell(self, body):
        self.wfile.write(b'data: %s\n\n' % json.dumps(body).encode())

    def end_stream(self):
        self.wfile.write(b'data: [DONE]\n\n')

    # ---- requests ----

    def get(self):
        server, path = self.server, self.path.split('?')[0]
        card = dict(
            id=server.name,
            object='model',
            created=int(time.time()),
            owned_by='plainrlhf',
            max_model_len=server.engine.max_len,
        )
        pages = {
            '/health': dict(status='ok', **server.engine.stats()),
            '/v1/models': dict(object='list', data=[card]),
            '/v1/models/' + server.name: card,
        }
        if path not in pages:
            raise BadRequest(f'There is no {path} here.', 404)
        self.reply(200, pages[path])

    def post(self):
        path, name, engine = self.path.split('?')[0], self.server.name, self.server.engine
        if path not in KEYS:
            raise BadRequest(f'There is no {path} here, but {" and ".join(KEYS)}.', 404)
        body = checked(self.read_json(), path)
        if body.get('model', name) != name:
            raise BadRequest(
                f"The model {body['model']!r} does not exist; this server has {name!r}.",
                404,
                'model_not_found',
            )
        chat = 'messages' in KEYS[path]
        prompts = [chat_prompt(body, engine.tokenizer)] if chat else prompts_of(body)
        limit = body.get('max_tokens', engine.max_len if chat else 16)
        settings = {key: body[key] for key in SETTINGS if key in body}
        settings['max_tokens'] = body.get('max_completion_tokens', limit)
        settings['logprobs'] = body.get('top_logprobs' if chat else 'logprobs', 0)
        params = SamplingParams(**settings)
        prompts = [engine.check(prompt, params) for prompt in prompts]
        Answer(self, body, prompts, params, chat).send()

    def read_json(self):
        length = self.headers.get('Content-Length', '')
        if not length.isdecimal():
            raise BadRequest('A body with a Content-Length is needed.', 411)
        if int(length) > MAX_BODY:
            raise BadRequest(f'The body has {length} bytes, the limit is {MAX_BODY}.', 413)
        try:
            body = json.loads(self.rfile.read(int(length)))
        except ValueError as e:
            raise BadRequest(f'The body is not JSON: {e}') from None
        if not isinstance(body, dict):
            raise BadRequest(f'The body is a JSON {type(body).__name__}, expected an object.')
        return body


@dataclasses.dataclass
class Choice:
    """One sample. text, entries (log-probs): what its client has not been told yet."""
    index: int
    tokens: list  # so far, the prompt's too
    text: str = ''
    entries: list = dataclasses.field(default_factory=list)
    offset: int = 0  # characters of all entries so far
    begun: bool = False  # its client has heard of it
    finish_reason: str | None = None


class Answer:
    """One request on its way through the engine: its choices, whole or streamed."""

    def __init__(self, handler, body, prompts, params, chat):
        self.handler, self.server, self.engine = handler, handler.server, handler.server.engine
        self.body, self.prompts, self.params = body, prompts, params
        self.chat, self.stream = chat, body.get('stream', False)
        self.with_logprobs = body.get('logprobs', False) is not False  # 0: of the drawn tokens alone
        kind = 'chat.completion' + '.chunk' * self.stream if chat else 'text_completion'
        self.id = ('chatcmpl-' if chat else 'cmpl-') + os.urandom(12).hex()
        self.frame = dict(id=self.id, object=kind, created=int(time.time()), model=self.server.name)
        self.choices = [Choice(k, list(prompts[k // params.n])) for k in range(len(prompts) * params.n)]
        self.looked = self.count = 0  # when the client was last looked at; tokens so far

    def send(self):
        box, unfinished = queue.SimpleQueue(), len(self.choices)
        if self.body.get('echo'):
            self.begin_with_prompts()
        if self.stream:
            self.handler.begin_stream()
        try:
            for i, prompt in enumerate(self.prompts):
                self.server.submit((self.id, i), prompt, self.params, box)
            while unfinished:
                event = self.next_event(box)
                self.take(event)
                unfinished -= event['finished']
        finally:  # also when the client has hung up
            for i in range(len(self.prompts)):
                self.server.drop((self.id, i))
        self.end()

    def next_event(self, box):
        """Waits for the engine. By the clock, not by the engine's silence: a look whether the client is still
        there."""
        client = self.handler.connection
        while True:
            if time.monotonic() > self.looked + LOOK:
                if readable([client], 0) and not client.recv(1, socket.MSG_PEEK):
                    raise ConnectionResetError
                self.looked = time.monotonic()
            try:
                event = box.get(timeout=LOOK)
            except queue.Empty:
                continue
            if isinstance(event, BadRequest):
                raise event
            return event

    def take(self, event):
        choice = self.choices[event['request_id'][1] * self.params.n + event['index']]
        choice.text += event['text']
        choice.finish_reason = event['finish_reason']
        self.count += len(event['token_ids'])
        if self.with_logprobs:
            tops = event['top_logprobs'] or [{}]
            for row in zip(event['token_ids'], event['pieces'], event['raw_logprobs'], tops):
                self.add(choice, *row)
        if self.stream and (event['text'] or event['finished'] or self.with_logprobs):
            self.handler.tell(dict(self.frame, choices=[self.news(choice)]))

    def begin_with_prompts(self):
        """echo: the text begins with the prompt, its tokens and their log-probs too."""
        for choice in self.choices:
            prompt, choice.tokens = choice.tokens, []
            choice.text = self.engine.tokenizer.decode(prompt)
            if self.with_logprobs:
                scores = self.engine.score(prompt, self.params.logprobs)
                for token, (logprob, top) in zip(prompt, scores):
                    self.add(choice, token, self.engine.text_of(token, choice.tokens), logprob, top)

    # ---- in OpenAI's form ----

    def add(self, choice, token, text, logprob, top):
        """What is to be told of a token. top: {token: log-prob} of the largest; /v1/completions wants the
        token itself among them."""
        if self.chat:
            best = [entry(self.engine.text_of(t, choice.tokens), x) for t, x in top.items()]
            choice.entries.append(dict(entry(text, logprob), top_logprobs=best))
        else:
            named = {}
            for t, x in {**top, token: logprob}.items():
                name = self.engine.text_of(t, choice.tokens)
                named[name if name and name not in named else f'token_id:{t}'] = x  # two may have one text
            named = None if logprob is None else named
            choice.entries.append((text, logprob, named, choice.offset))
        choice.tokens.append(token)
        choice.offset += len(text)

    def news(self, choice):
        """What is new of a choice."""
        logprobs = None
        if self.with_logprobs and self.chat:
            logprobs = dict(content=choice.entries, refusal=None)
        elif self.with_logprobs:
            columns = map(list, zip(*choice.entries))
            logprobs = dict(zip(('tokens', 'token_logprobs', 'top_logprobs', 'text_offset'), columns))
        said = dict(text=choice.text)
        if self.chat:
            role = {} if choice.begun else dict(role='assistant')
            said = {'delta' if self.stream else 'message': dict(role, content=choice.text)}
        choice.text, choice.entries, choice.begun = '', [], True
        return dict(index=choice.index, **said, logprobs=logprobs, finish_reason=choice.finish_reason)

    def end(self):
        asked = sum(map(len, self.prompts))
        usage = dict(prompt_tokens=asked, completion_tokens=self.count, total_tokens=asked + self.count)
        if not self.stream:
            choices = [self.news(choice) for choice in self.choices]
            return self.handler.reply(200, dict(self.frame, choices=choices, usage=usage))
        if self.body.get('stream_options', {}).get('include_usage'):
            self.handler.tell(dict(self.frame, choices=[], usage=usage))
        self.handler.end_stream()


def entry(text, logprob):
    return dict(token=text, logprob=logprob, bytes=list(text.encode()))


def main():
    # it reads init_from, max_num_seqs, max_num_batched_tokens, block_size, num_blocks, prefix_caching, seed,
    # device, dtype, threads, kernels
    engine = open_engine(config)
    name = os.path.basename(os.path.normpath(init_from))
    server = Server(engine, name, host, port, api_key, cors).start()
    print(f'serving {name} on {server.url}/v1 (Ctrl-C stops)', file=sys.stderr, flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.close()


if __name__ == '__main__':
    main()
