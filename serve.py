"""OpenAI's HTTP API over the engine. /v1/completions, /v1/chat/completions, /v1/models, /health.

    python serve.py --init_from=out-ppo --port=8000
    curl localhost:8000/v1/chat/completions -d '{"messages": [{"role": "user", "content": "Hello"}]}'"""
import hmac
import http.server
import itertools
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
from tokenizer import get_tokenizer
from infer import Engine, SamplingParams
from run import load_model

# -----------------------------------------------------------------------------
init_from = 'out-sft' # an out_dir or its ckpt.pt, a Hugging Face directory or name
host = '127.0.0.1' # loopback: other machines cannot connect
port = 8000 # in [0, 65535]: of the server
api_key = '' # clients must send it when set
# engine
max_num_seqs = 256 # >= 1: requests that run together
max_num_batched_tokens = 2048 # >= 1: tokens of one step: longer prompts are prefilled in chunks
block_size = 16 # >= 1: tokens of a KV block
num_blocks = 0 # >= 0: 0 = what max_num_seqs full contexts need, within the memory at hand
prefix_caching = True # requests that begin alike share what they begin with
# system
seed = 1337
device = 'cuda' if torch.cuda.is_available() else 'cpu'
dtype = 'bfloat16' if torch.cuda.is_available() else 'float32' # 'float32', 'bfloat16', 'float16', 'float64'
threads = 0 # >= 0: CPU threads; 0 = the engine's choice
kernels = 'auto' # 'auto' | 'torch' | 'triton'
config_keys = [k for k,v in globals().items() if not k.startswith('_') and isinstance(v, (int, float, bool, str))]
exec(open(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'configurator.py')).read()) # overrides from command line or config file
config = {k: globals()[k] for k in config_keys} # will be useful for logging
# -----------------------------------------------------------------------------


class BadRequest(Exception):
    """What a client did wrong, in OpenAI's form."""

    def __init__(self, message, status=400, code=None, param=None):
        super().__init__(message)
        kind = 'authentication_error' if status == 401 else 'server_error' if status >= 500 else 'invalid_request_error'
        self.status, self.body = status, dict(error=dict(message=message, type=kind, param=param, code=code))


_NUMBER = (int, float)
_OPTIONS = {  # field: (types, lowest, highest)
    'max_tokens': ((int,), 1, 1 << 30), 'max_completion_tokens': ((int,), 1, 1 << 30), 'temperature': (_NUMBER, 0, 100), 'top_p': (_NUMBER, 0, 1), 'top_k': ((int,), -1, 1 << 30),
    'min_p': (_NUMBER, 0, 1), 'n': ((int,), 1, 128), 'presence_penalty': (_NUMBER, -2, 2), 'frequency_penalty': (_NUMBER, -2, 2), 'repetition_penalty': (_NUMBER, 1e-3, 100),
    'seed': ((int,), -(1 << 63), 1 << 63), 'min_tokens': ((int,), 0, 1 << 30), 'top_logprobs': ((int,), 0, 20), 'stream': ((bool,), None, None), 'ignore_eos': ((bool,), None, None),
    'stream_options': ((dict,), None, None), 'stop': ((str, list), None, None), 'stop_token_ids': ((list,), None, None), 'logit_bias': ((dict,), None, None), 'model': ((str,), None, None)}
_REFUSED = dict(best_of=1, echo=False, suffix=None, tools=None, functions=None, response_format={'type': 'text'}, audio=None, prediction=None)


class Server:
    """HTTP in front of an engine: Server(engine, name, port=0).start(); .url; .close(). A host that is not loopback needs an api_key."""

    def __init__(self, engine, name='model', host='127.0.0.1', port=8000, api_key='', max_body=8 << 20):
        if not api_key and host not in ('127.0.0.1', 'localhost', '::1'):
            raise ValueError(f'--host={host} lets other machines in: set --api_key=..., or serve on 127.0.0.1')
        self.engine, self.name, self.api_key, self.max_body = engine, name, api_key, max_body
        self.inbox, self.open, self.alive, self.created = queue.SimpleQueue(), {}, True, int(time.time())
        kind = type('HTTP', (http.server.ThreadingHTTPServer,), dict(request_queue_size=1024, daemon_threads=True))
        self.http = kind((host, port), type('Handler', (Handler,), dict(server_state=self)))
        self.url = f'http://{host}:{self.http.server_address[1]}'
        self.threads = [threading.Thread(target=f, daemon=True) for f in (self._work, self.http.serve_forever)]

    def start(self):
        for t in self.threads:
            t.start()
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
            except Exception as e:  # the engine has dropped all requests: their clients hear why, the server lives on
                print(f'engine: {type(e).__name__}: {e}', file=sys.stderr, flush=True)
                for request_id in list(self.open):
                    self.engine.abort(request_id)
                    self.open.pop(request_id).put(BadRequest(f'the engine failed: {e}', 500))
                continue
            for e in events:
                out = self.open.get(e['request_id'])
                if out is not None:
                    out.put(e)

    def _take(self, verb, request_id, prompt=None, params=None, out=None):
        if verb == 'abort':
            self.engine.abort(request_id)
            self.open.pop(request_id, None)
            return
        try:
            self.open[request_id] = out
            self.engine.add_request(prompt, params, request_id)
        except ValueError as e:
            del self.open[request_id]
            out.put(BadRequest(str(e)))


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, timeout, server_state = 'HTTP/1.1', 60, None  # timeout: seconds that a silent or unread connection lives

    def log_message(self, *args):
        """Nothing: prompts are the users' own."""
        return None

    # ---- plumbing ----

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(data)))
        if self.close_connection:
            self.send_header('Connection', 'close')  # said, else a client that keeps connections sends its next request into a closed one
        self.end_headers()
        self.wfile.write(data)

    def guarded(self, work):
        """Runs a request; every mistake of the client becomes an answer, a client that is gone becomes nothing."""
        self.streaming = False
        try:
            if self.server_state.api_key and not hmac.compare_digest(self.headers.get('Authorization', '').encode(), f'Bearer {self.server_state.api_key}'.encode()):
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

    def do_GET(self):
        self.guarded(self.get)

    def do_POST(self):
        self.guarded(self.post)

    def get(self):
        s, path = self.server_state, self.path.split('?')[0]
        card = dict(id=s.name, object='model', created=s.created, owned_by='plainrlhf', max_model_len=s.engine.max_len)
        if path == '/v1/models':
            return self.reply(200, dict(object='list', data=[card]))
        if path == '/health':
            return self.reply(200, dict(status='ok', **s.engine.stats()))
        if path == '/v1/models/' + s.name:
            return self.reply(200, card)
        raise BadRequest(f'There is no {path} here.', 404, 'not_found')

    def post(self):
        kinds = {'/v1/completions': self.completion, '/v1/chat/completions': self.chat}
        path = self.path.split('?')[0]
        if path not in kinds:
            raise BadRequest(f'There is no {path} here: /v1/completions, /v1/chat/completions and /v1/models are.', 404, 'not_found')
        length = self.headers.get('Content-Length', '')
        if not length.isdecimal() or self.headers.get('Transfer-Encoding'):
            raise BadRequest('A body with a Content-Length is needed.', 411)
        if int(length) > self.server_state.max_body:
            raise BadRequest(f'The body has {length} bytes, the limit is {self.server_state.max_body}.', 413)
        data = self.rfile.read(int(length))
        if len(data) < int(length):
            raise ConnectionResetError
        try:
            body = json.loads(data)
        except (ValueError, RecursionError) as e:
            raise BadRequest(f'The body is not JSON: {type(e).__name__} {e}') from None
        if not isinstance(body, dict):
            raise BadRequest(f'The body is a JSON {type(body).__name__}, expected an object.')
        if 'model' in body and body['model'] != self.server_state.name:
            raise BadRequest(f"The model {body['model']!r} does not exist; this server has {self.server_state.name!r}.", 404, 'model_not_found', 'model')
        kinds[path]({k: v for k, v in body.items() if v is not None})

    def params(self, body, default_max, logprobs):
        """SamplingParams of a request, every type and range checked."""
        for name, (types, low, high) in _OPTIONS.items():
            v = body.get(name)
            if v is None:
                continue
            if type(v) not in types:
                raise BadRequest(f"'{name}' is a {type(v).__name__}, expected {' or '.join(t.__name__ for t in types)}.", param=name)
            if low is not None and not low <= v <= high:
                raise BadRequest(f"'{name}' is {v}, expected {low} to {high}.", param=name)
        for name, fine in _REFUSED.items():
            if body.get(name) not in (None, fine, []):
                raise BadRequest(f"'{name}' is not supported by this server.", param=name)
        names = ('temperature', 'top_p', 'top_k', 'min_p', 'presence_penalty', 'frequency_penalty', 'repetition_penalty', 'seed', 'n', 'stop', 'stop_token_ids', 'min_tokens', 'ignore_eos')
        try:
            bias = {int(k): max(-100.0, min(100.0, float(v))) for k, v in body.get('logit_bias', {}).items()}
            if not all(type(t) is int for t in body.get('stop_token_ids', ())):
                raise ValueError('stop_token_ids must be integers')
            return SamplingParams(max_tokens=body.get('max_completion_tokens', body.get('max_tokens', default_max)), logprobs=logprobs, logit_bias=bias,
                                  **{k: body[k] for k in names if k in body})
        except (ValueError, TypeError) as e:
            raise BadRequest(str(e).split(', got SamplingParams')[0]) from None

    # ---- the two endpoints ----

    def completion(self, body):
        prompt, top = body.get('prompt'), body.get('logprobs')
        if type(top) not in (int, type(None)) or not 0 <= (top or 0) <= 20:
            raise BadRequest("'logprobs' is expected to be an integer from 0 to 20.", param='logprobs')
        whole = isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(t) is int for t in prompt))
        prompts = [prompt] if whole else prompt
        if not isinstance(prompts, list) or not prompts or not all(isinstance(p, str) or (isinstance(p, list) and p and all(type(t) is int for t in p)) for p in prompts):
            raise BadRequest("'prompt' is expected to be a non-empty string, list of strings, list of token ids, or list of those.", param='prompt')
        self.answer(body, prompts, self.params(body, 16, top or 0), None if top is None else self.old_logprobs, chat=False)

    def chat(self, body):
        messages, e = body.get('messages'), self.server_state.engine
        if not isinstance(messages, list) or not messages:
            raise BadRequest("'messages' is expected to be a non-empty list.", param='messages')
        plain = []
        for m in messages:
            content = m.get('content') if isinstance(m, dict) else None
            if isinstance(content, list) and all(isinstance(x, dict) and x.get('type') == 'text' and isinstance(x.get('text'), str) for x in content):
                content = ''.join(x['text'] for x in content)
            if not isinstance(content, str) or not isinstance(m.get('role'), str):
                raise BadRequest("each of 'messages' is expected to be {'role': string, 'content': string}.", param='messages')
            plain.append(dict(role=m['role'], content=content))
        if type(body.get('logprobs', False)) is not bool:
            raise BadRequest("'logprobs' is expected to be true or false.", param='logprobs')
        try:
            prompt = e.tokenizer.apply_chat_template(plain, add_generation_prompt=True)
        except ValueError as error:
            raise BadRequest(str(error), param='messages') from None
        params = self.params(body, max(1, e.max_len - len(prompt)), body.get('top_logprobs', 0))
        self.answer(body, [prompt], params, self.new_logprobs if body.get('logprobs') else None, chat=True)

    def answer(self, body, prompts, params, logprobs, chat):
        s, name = self.server_state, ('chat.completion' if chat else 'text_completion')
        try:
            ids = [s.engine._check(p, params) for p in prompts]
        except ValueError as e:
            raise BadRequest(str(e), code='context_length_exceeded' if 'context' in str(e) else None, param='messages' if chat else 'prompt') from None
        head = dict(id=('chatcmpl-' if chat else 'cmpl-') + os.urandom(12).hex(), object=name, created=int(time.time()), model=s.name)
        stream = body.get('stream', False)
        want_usage, total, done, box = (body.get('stream_options') or {}).get('include_usage', False), len(ids) * params.n, 0, queue.SimpleQueue()
        texts, reasons, count, probs = [''] * total, [None] * total, 0, [[] for _ in range(total)]
        jobs = {f"{head['id']}-{i}": i for i in range(len(ids))}
        for request_id, i in jobs.items():
            s.inbox.put(('add', request_id, ids[i], params, box))
        try:
            if stream:
                self.begin_stream()
                if chat:
                    for k in range(total):
                        self.chunk(dict(head, object=name + '.chunk', choices=[dict(index=k, delta=dict(role='assistant', content=''), logprobs=None, finish_reason=None)]))
            while done < total:
                e = self.next_event(box)
                k = jobs[e['request_id']] * params.n + e['index']
                texts[k] += e['text']
                reasons[k], done, count = e['finish_reason'], done + e['finished'], count + len(e['token_ids'])
                if logprobs is not None:
                    probs[k] += zip(e['token_ids'], e['raw_logprobs'], e['top_logprobs'] or [{}] * len(e['token_ids']))
                if stream and (e['text'] or e['finished'] or logprobs is not None):
                    piece = dict(delta=dict(content=e['text']) if e['text'] else {}) if chat else dict(text=e['text'])
                    new, probs[k] = (None if logprobs is None else logprobs(probs[k])), []
                    self.chunk(dict(head, object=name + '.chunk' * chat, choices=[dict(index=k, **piece, logprobs=new, finish_reason=e['finish_reason'])]))
        finally:  # also when the client has hung up, or one of several prompts was refused
            for request_id in jobs:
                s.inbox.put(('abort', request_id))
        prompt_tokens = sum(map(len, ids))
        usage = dict(prompt_tokens=prompt_tokens, completion_tokens=count, total_tokens=prompt_tokens + count)
        if stream:
            if want_usage:
                self.chunk(dict(head, object=name + '.chunk' * chat, choices=[], usage=usage))
            return self.end_stream()
        choices = [dict(index=k, logprobs=None if logprobs is None else logprobs(probs[k]), finish_reason=reasons[k],
                        **(dict(message=dict(role='assistant', content=texts[k], refusal=None)) if chat else dict(text=texts[k]))) for k in range(total)]
        self.reply(200, dict(head, choices=choices, usage=usage))

    def next_event(self, box):
        """Waits for the engine, and looks twice a second whether the client is still there."""
        while True:
            try:
                e = box.get(timeout=0.5)
            except queue.Empty:
                if readable([self.connection], 0) and not self.connection.recv(1, socket.MSG_PEEK):
                    raise ConnectionResetError from None
                if not self.server_state.alive:
                    raise BadRequest('The server is shutting down.', 503) from None
                continue
            if isinstance(e, BadRequest):
                raise e
            return e

    def piece(self, token):
        """Text of one token; half a character has none, it is named by its id."""
        text = self.server_state.engine.tokenizer.decode([token])
        return text if '\ufffd' not in text else f'token_id:{token}'

    def old_logprobs(self, rows):
        texts = [self.piece(t) for t, _, _ in rows]
        return dict(tokens=texts, token_logprobs=[lp for _, lp, _ in rows], text_offset=[0, *itertools.accumulate(map(len, texts))][:len(texts)],
                    top_logprobs=[{self.piece(i): lp for i, lp in top.items()} for _, _, top in rows])

    def new_logprobs(self, rows):
        def entry(t, lp):
            text = self.piece(t)
            return dict(token=text, logprob=lp, bytes=None if text.startswith('token_id:') else list(text.encode()))
        return dict(content=[dict(entry(t, lp), top_logprobs=[entry(i, x) for i, x in top.items()]) for t, lp, top in rows], refusal=None)

    # ---- server-sent events ----

    def begin_stream(self):
        self.streaming = True
        self.send_response(200)
        for k, v in (('Content-Type', 'text/event-stream'), ('Cache-Control', 'no-cache'), ('Transfer-Encoding', 'chunked')):
            self.send_header(k, v)
        self.end_headers()

    def chunk(self, body):
        data = b'data: ' + (json.dumps(body).encode() if isinstance(body, dict) else body) + b'\n\n'
        self.wfile.write(b'%x\r\n%s\r\n' % (len(data), data))

    def end_stream(self):
        self.chunk(b'[DONE]')
        self.wfile.write(b'0\r\n\r\n')


def main():
    K.use(kernels)
    torch.manual_seed(seed)
    kind = dict(float32=torch.float32, float64=torch.float64, bfloat16=torch.bfloat16, float16=torch.float16).get(dtype)
    if kind is None:
        raise ValueError(f"--dtype={dtype}: expected 'float32', 'bfloat16', 'float16' or 'float64'")
    model, tokenizer = load_model(init_from, device, kind)
    engine = Engine(model.eval(), get_tokenizer(tokenizer), max_num_seqs, max_num_batched_tokens, block_size, num_blocks, prefix_caching, seed=seed, threads=threads)
    print(engine, file=sys.stderr)
    server = Server(engine, os.path.basename(os.path.normpath(init_from)), host, port, api_key).start()
    print(f'serving {server.name} on {server.url}/v1 (Ctrl-C stops)', file=sys.stderr, flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.close()


if __name__ == '__main__':
    main()
