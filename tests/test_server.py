"""The HTTP API with the official client, with raw sockets, and under load; the terminal commands."""

import contextlib
import ctypes
import gc
import http.client
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
import types

import pytest
import torch

import infer
import serve
from tokenizer import encode_prompt, get_tokenizer
from infer import Engine, SamplingParams
from serve import Server
from test_infer import graphs, idle, tiny, twins  # noqa: F401 (fixtures)

ROOT = os.path.dirname(os.path.abspath(infer.__file__))


def make(name='tiny', on=lambda engine: engine, max_num_seqs=32, **kw):
    tok = get_tokenizer('byte')
    model = tiny('llama', torch.float32, vocab=tok.vocab_size, block_size=256)
    return Server(on(Engine(model, tok, max_num_seqs=max_num_seqs, threads=1)), name, port=0, **kw).start()


@pytest.fixture(scope='module')
def server():
    s = make()
    yield s
    s.close()


def call(server, path, body=None, raw=None, headers=None, method='POST'):
    """-> (status, JSON or text)"""
    c = http.client.HTTPConnection('127.0.0.1', server.server_address[1], timeout=60)
    data = raw if raw is not None else json.dumps(body).encode()
    c.request(
        method,
        path,
        data if method == 'POST' else None,
        {'Content-Type': 'application/json', **(headers or {})},
    )
    r = c.getresponse()
    text = r.read().decode()
    c.close()
    return r.status, json.loads(text) if text.startswith('{') else text


def streamed(server, ask):
    """The first choice of each event of a stream."""
    status, text = call(server, '/v1/completions', dict(ask, stream=True))
    assert status == 200 and text.endswith('data: [DONE]\n\n')
    return [json.loads(part[6:])['choices'][0] for part in text.split('\n\n') if part.startswith('data: {')]


def settle(server, seconds=20):
    """Until nothing runs; then nothing may be leaked."""
    end = time.time() + seconds
    while time.time() < end and (server.boxes or server.engine.requests):
        threading.Event().wait(0.02)
    return idle(server.engine) and not server.boxes


def test_health_models_and_greedy_equals_generate(server):
    status, body = call(server, '/v1/models', method='GET')
    assert status == 200 and body['data'][0]['id'] == 'tiny' and body['data'][0]['max_model_len'] == 256
    assert (
        call(server, '/v1/models/tiny', method='GET')[1]['id'] == 'tiny'
        and call(server, '/health', method='GET')[1]['status'] == 'ok'
    )
    want = server.engine.generate(['hello'], SamplingParams(max_tokens=20, temperature=0))[0]
    for prompt in ('hello', ['hello'], list(b'hello'), [list(b'hello')]):
        status, body = call(
            server, '/v1/completions', dict(model='tiny', prompt=prompt, max_tokens=20, temperature=0)
        )
        assert (
            status == 200
            and body['choices'][0]['text'] == want.text
            and body['choices'][0]['finish_reason'] == want.finish_reason
        )
        assert body['usage'] == dict(
            prompt_tokens=5, completion_tokens=len(want.token_ids), total_tokens=5 + len(want.token_ids)
        )
    assert settle(server)


def test_a_hundred_samples_of_one_letter():
    server = make(max_num_seqs=128)
    many, few = (
        call(server, '/v1/completions', dict(prompt='a', n=n, max_tokens=3, seed=5)) for n in (100, 8)
    )
    assert many[0] == few[0] == 200 and len(many[1]['choices']) == 100 and settle(server)
    assert [c['text'] for c in many[1]['choices'][:8]] == [c['text'] for c in few[1]['choices']]
    server.close()


BAD = [
    ('/v1/completions', dict(prompt=5), 400, 'prompt'),
    ('/v1/completions', {}, 400, 'prompt'),
    ('/v1/completions', dict(prompt=''), 400, 'prompt'),
    ('/v1/completions', dict(prompt=[]), 400, 'prompt'),
    ('/v1/completions', dict(prompt=['a', 3]), 400, 'prompt'),
    ('/v1/completions', dict(prompt=[1.5]), 400, 'prompt'),
    ('/v1/completions', dict(prompt=[[None]]), 400, 'prompt'),
    ('/v1/completions', dict(prompt={}), 400, 'prompt'),
    ('/v1/completions', dict(prompt=[999999]), 400, 'vocabulary'),
    ('/v1/completions', dict(prompt='x' * 1000), 400, 'context'),
    ('/v1/completions', dict(prompt='a', max_tokens='7'), 400, 'max_tokens'),
    ('/v1/completions', dict(prompt='a', max_tokens=0), 400, 'max_tokens'),
    ('/v1/completions', dict(prompt='a', max_tokens=True), 400, 'max_tokens'),
    ('/v1/completions', dict(prompt='a', temperature=-1), 400, 'temperature'),
    ('/v1/completions', dict(prompt='a', temperature=float('nan')), 400, 'temperature'),
    ('/v1/completions', dict(prompt='a', top_p=0), 400, 'top_p'),
    ('/v1/completions', dict(prompt='a', n=1000), 400, 'n'),
    ('/v1/completions', dict(prompt='a', stop=[1]), 400, 'stop'),
    ('/v1/completions', dict(prompt='a', stop=''), 400, 'stop'),
    ('/v1/completions', dict(prompt='a', logit_bias={'x': 1}), 400, 'logit_bias'),
    ('/v1/completions', dict(prompt='a', logit_bias={'1': None}), 400, 'logit_bias'),
    ('/v1/completions', dict(prompt='a', logit_bias={'99999': 1}), 400, 'vocabulary'),
    ('/v1/completions', dict(prompt='a', stop_token_ids=['a']), 400, 'stop_token_ids'),
    ('/v1/completions', dict(prompt='a', logprobs=True), 400, 'logprobs'),
    ('/v1/completions', dict(prompt='a', echo=1), 400, 'echo'),
    ('/v1/completions', dict(prompt='a', stream='yes'), 400, 'stream'),
    ('/v1/completions', dict(prompt='a', seed=1.5), 400, 'seed'),
    ('/v1/completions', dict(prompt='a', model='other'), 404, 'other'),
    ('/v1/nothing', dict(prompt='a'), 404, 'nothing'),
    ('/v1/chat/completions', {}, 400, 'messages'),
    ('/v1/chat/completions', dict(messages=[]), 400, 'messages'),
    ('/v1/chat/completions', dict(messages=['hi']), 400, 'messages'),
    ('/v1/chat/completions', dict(messages=[dict(role='user')]), 400, 'messages'),
    ('/v1/chat/completions', dict(messages=[dict(role='user', content='x' * 900)]), 400, 'context'),
    ('/v1/chat/completions', dict(messages=[dict(role='king', content='x')]), 400, 'king'),
    *(
        ('/v1/completions', dict(prompt='a', **{k: v}), 400, k)
        for k, v in dict(
            logit_bias={'1': float('nan')},
            top_k=-2,
            max_token=1,
            prompt_logprobs=1,
            guided_json={},
            best_of=2,
            suffix='x',
            stream_options=[],
            messages=[],
            min_tokens=20,
        ).items()
    ),
    ('/v1/completions', dict(prompt='a', max_completion_tokens=0), 400, 'max_tokens'),
    ('/v1/completions', dict(prompt='a', logit_bias={'1': 1e300}), 400, 'logit_bias'),
    *(
        ('/v1/chat/completions', dict(messages=[dict(role='user', content='x')], **{k: v}), 400, k)
        for k, v in dict(
            tools={},
            tool_choice='required',
            structured_outputs={},
            add_generation_prompt=False,
            continue_final_message=True,
            prompt='a',
            logprobs=1,
            chat_template_kwargs=1,
            reasoning_effort='low',
            response_format={'type': 'json_object'},
        ).items()
    ),
    *(
        ('/v1/chat/completions', dict(messages=[m]), 400, word)
        for m, word in (
            (dict(role='user', content=None), 'content'),
            (dict(role='user', content=[dict(type='image_url')]), 'text'),
            (dict(role='user', content='x', audio={'id': 1}), 'audio'),
            (dict(role='assistant', content='x', function_call={'name': 'f'}), 'function_call'),
        )
    ),
]


def test_every_mistake_has_an_answer_in_openais_form(server):
    for path, body, want, word in BAD:
        status, answer = call(server, path, body)
        assert (
            status == want
            and word in answer['error']['message']
            and set(answer['error']) == {'message', 'type', 'param', 'code'}
        ), (path, body, status, answer)
    for raw in (b'{', b'', b'[1]', b'"a"', b'\xff\xfe', b'{"prompt": "\\ud800"}', b'[' * 100000):
        status, answer = call(server, '/v1/completions', raw=raw)
        assert status == 400 and 'message' in answer['error'], raw[:20]
    assert call(server, '/v1/completions', raw=b'x', headers={'Content-Length': str(1 << 40)})[0] == 413
    assert call(server, '/v1/nothing', method='GET')[0] == 404 and settle(server)


def test_api_key_and_other_hosts():
    with pytest.raises(ValueError, match='api_key'):
        make(host='0.0.0.0')
    s = make(api_key='sesame')
    try:
        assert (
            call(s, '/v1/models', method='GET')[0] == 401
            and call(s, '/v1/completions', dict(prompt='a'))[0] == 401
        )
        assert (
            call(s, '/v1/completions', dict(prompt='a'), headers={'Authorization': 'Bearer sesam'})[1][
                'error'
            ]['code']
            == 'invalid_api_key'
        )
        assert (
            call(s, '/v1/completions', dict(prompt='a'), headers={'Authorization': 'Bearer sesame'})[0] == 200
        )
    finally:
        s.close()


def test_official_client(server):
    openai = pytest.importorskip('openai')
    client = openai.OpenAI(base_url=server.url + '/v1', api_key='none', max_retries=0)
    assert client.models.list().data[0].id == 'tiny'
    one = client.completions.create(model='tiny', prompt='hello', max_tokens=12, temperature=0, logprobs=3)
    pieces = list(
        client.completions.create(
            model='tiny',
            prompt='hello',
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options=dict(include_usage=True),
        )
    )
    assert (
        ''.join(p.choices[0].text for p in pieces if p.choices) == one.choices[0].text
        and pieces[-1].usage.completion_tokens == one.usage.completion_tokens
    )
    lp = one.choices[0].logprobs
    assert (
        len(lp.tokens) == len(lp.token_logprobs) == len(lp.top_logprobs) == one.usage.completion_tokens
        and lp.text_offset[0] == 0
    )
    assert all(
        max(top.values()) == pytest.approx(x) for top, x in zip(lp.top_logprobs, lp.token_logprobs)
    )  # greedy: the best one
    talk = dict(
        model='tiny',
        messages=[
            dict(role='system', content='be brief'),
            dict(role='user', content=[dict(type='text', text='hi')]),
        ],
        max_completion_tokens=9,
        seed=3,
    )
    whole = client.chat.completions.create(**talk, n=3, logprobs=True, top_logprobs=2)
    assert (
        [c.index for c in whole.choices] == [0, 1, 2]
        and len({c.message.content for c in whole.choices}) == 3
        and whole.choices[0].message.role == 'assistant'
    )
    assert all(
        len(x.top_logprobs) == 2 and (x.bytes is None or bytes(x.bytes).decode() == x.token)
        for x in whole.choices[1].logprobs.content
    )
    parts = list(client.chat.completions.create(**talk, n=3, stream=True))
    for k in range(3):
        mine = [p.choices[0] for p in parts if p.choices[0].index == k]
        assert (
            ''.join(c.delta.content or '' for c in mine) == whole.choices[k].message.content
            and mine[-1].finish_reason == whole.choices[k].finish_reason
        )
    many = client.completions.create(model='tiny', prompt=['a', 'b'], n=2, max_tokens=5, seed=1)
    assert [c.index for c in many.choices] == [0, 1, 2, 3] and many.usage.prompt_tokens == 2
    stopped = client.completions.create(
        model='tiny', prompt='a', max_tokens=30, temperature=0, stop=[one.choices[0].text[3:5] or 'zz']
    )
    assert stopped.choices[0].finish_reason in ('stop', 'length')
    default = client.chat.completions.create(model='tiny', messages=[dict(role='user', content='x')])
    assert default.choices[0].finish_reason in ('stop', 'length')
    for error, kw in (
        (openai.NotFoundError, dict(model='gpt-5', prompt='a')),
        (openai.BadRequestError, dict(model='tiny', prompt='a', temperature=-3)),
        (openai.BadRequestError, dict(model='tiny', prompt='x' * 5000)),
    ):
        with pytest.raises(error):
            client.completions.create(**kw)
    assert settle(server)


def test_harmless_fields_are_accepted(server):
    fine = dict(
        user='me',
        metadata={},
        store=False,
        service_tier='auto',
        parallel_tool_calls=True,
        seed=None,
        tools=[],
        tool_choice='none',
        stop=None,
        response_format=dict(type='text'),
        add_generation_prompt=True,
    )
    status, answer = call(
        server, '/v1/chat/completions', dict(messages=[dict(role='user', content='x')], max_tokens=2, **fine)
    )
    assert status == 200, answer


CALL = dict(
    role='assistant',
    content=None,
    tool_calls=[dict(id='c1', type='function', function=dict(name='f', arguments='{"x": 1}'))],
)
TALKS = [
    ([dict(role='developer', content='Be brief.'), dict(role='user', content='hi')], {}),
    ([dict(role='user', content='hi'), CALL, dict(role='tool', tool_call_id='c1', content='42')], {}),
    (
        [
            dict(role='user', content='hi'),
            dict(CALL, content='', refusal=None),
            dict(role='tool', tool_call_id='c1', content='42'),
        ],
        {},
    ),
    (
        [
            dict(role='user', content='hi'),
            {k: v for k, v in CALL.items() if k != 'content'} | dict(reasoning_content='A sum.'),
            dict(role='tool', content='42'),
        ],
        {},
    ),
    (
        [dict(role='user', content=[dict(type='text', text='h'), dict(type='text', text='i')], name='Ann')],
        dict(enable_thinking=False),
    ),
]


@pytest.mark.parametrize('messages, extra', TALKS)
def test_all_that_a_message_says_reaches_the_template(monkeypatch, server, messages, extra):
    """The server hands over the row that a stage would read; a template that does not know developers sees
    system."""
    seen, tools = [], [dict(type='function', function=dict(name='f'))]
    monkeypatch.setattr(serve, 'encode_prompt', lambda row, tok: seen.append(row) or [1, 2, 3])
    ask = dict(messages=messages, chat_template_kwargs=extra, tools=tools)
    status, answer = call(server, '/v1/chat/completions', dict(ask, max_tokens=1))
    want = [dict(m, role=m['role'].replace('developer', 'system')) for m in messages]
    assert status == 200 and answer['usage']['prompt_tokens'] == 3 and seen == [dict(ask, messages=want)]


def test_a_begun_answer_goes_on(server):
    """As in every stage: where the last message is the assistant's, its text is continued."""
    talk = [dict(role='user', content='hi'), dict(role='assistant', content='I am')]
    usage = call(server, '/v1/chat/completions', dict(messages=talk, max_tokens=1))[1]['usage']
    assert (
        usage['prompt_tokens'] == len(encode_prompt(talk, server.engine.tokenizer)) == len('Q: hi\nA: I am')
    )


@pytest.mark.slow
@pytest.mark.parametrize('messages, extra', TALKS)
def test_a_chat_is_read_as_in_transformers(messages, extra):
    transformers = pytest.importorskip('transformers')
    folder = os.path.join(ROOT, '..', 'shared', 'data', 'tokenizers', 'qwen3')
    if not os.path.isdir(folder):
        pytest.skip('the real tokenizers are not beside this checkout')
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), get_tokenizer(folder)
    plain = [dict(m, role=m['role'].replace('developer', 'system')) for m in messages]
    plain = [dict(m, content='h\ni') if isinstance(m.get('content'), list) else m for m in plain]
    want = theirs.apply_chat_template(plain, add_generation_prompt=True, tokenize=False, **extra)
    assert ours.decode(serve.chat_prompt(dict(messages=messages, chat_template_kwargs=extra), ours)) == want


def test_logprobs_are_those_of_the_very_tokens(server):
    """Tokens join to the text; offsets go on in a stream; the drawn token is always among the top ones;
    numbers are the plain log-softmax."""
    ask = dict(prompt='hello', max_tokens=24, temperature=2, seed=1, logprobs=3)
    choice = call(server, '/v1/completions', ask)[1]['choices'][0]
    lp, model = choice['logprobs'], server.engine.model.requires_grad_(False)
    ids = server.engine.generate(['hello'], SamplingParams(max_tokens=24, temperature=2, seed=1))[0].token_ids
    assert ''.join(lp['tokens']) == choice['text'] and lp['text_offset'] == [
        len(''.join(lp['tokens'][:i])) for i in range(24)
    ]
    dense = model(torch.tensor([[*b'hello', *ids]]))[0][0, 4:].log_softmax(-1)
    for i, (token, x, top) in enumerate(zip(ids, lp['token_logprobs'], lp['top_logprobs'], strict=True)):
        assert (
            x == pytest.approx(float(dense[i, token]), abs=1e-4) and 3 <= len(top) <= 4 and x in top.values()
        )
        assert sorted(top.values(), reverse=True)[:3] == pytest.approx(dense[i].topk(3)[0].tolist(), abs=1e-4)
    parts = [part['logprobs'] for part in streamed(server, ask)]
    assert [x for part in parts for x in part['text_offset']] == lp['text_offset'] and [
        x for part in parts for x in part['tokens']
    ] == lp['tokens']


class Odd:
    """Three tokens are one euro sign, 3 and 4 have one text, 5 loses its blank at the beginning of what is
    decoded."""

    def decode(self, ids):
        text = b''.join([b'\xe2', b'\x82', b'\xac', b'n', b'n', b' there'][i] for i in ids).decode(
            errors='replace'
        )
        return text[1:] if text.startswith(' ') else text


def test_texts_of_tokens_in_their_context():
    rows = [
        (5, -1.0, {3: -2.0, 4: -2.5}),
        (0, -1.0, {0: -1.0}),
        (1, -1.0, {3: -9.0}),
        (2, -1.0, {}),
        (4, -4.0, {3: -1.0}),
    ]

    def told(chat):
        engine = types.SimpleNamespace(tokenizer=Odd(), text_of=lambda *a: Engine.text_of(engine, *a))
        handler = types.SimpleNamespace(server=types.SimpleNamespace(engine=engine, name='odd'))
        answer = serve.Answer(handler, dict(logprobs=True), [[3]], SamplingParams(), chat)
        choice = answer.choices[0]
        for token, logprob, top in rows:
            answer.add(choice, token, engine.text_of(token, choice.tokens), logprob, top)
        return answer.news(choice)['logprobs']

    lp = told(chat=False)
    assert lp['tokens'] == [' there', '', '', '\u20ac', 'n'] and lp['text_offset'] == [0, 6, 6, 6, 7]
    assert lp['top_logprobs'][0] == {'n': -2.0, 'token_id:4': -2.5, ' there': -1.0} and lp['top_logprobs'][
        1
    ] == {'token_id:0': -1.0}
    assert lp['top_logprobs'][4] == {'n': -1.0, 'token_id:4': -4.0}
    chat = told(chat=True)['content']
    assert (
        [x['token'] for x in chat] == lp['tokens']
        and [len(x['top_logprobs']) for x in chat] == [2, 1, 1, 0, 1]
        and bytes(chat[3]['bytes']).decode() == '\u20ac'
    )


def test_echo_scores_the_prompt(server):
    """As lm-eval's local-completions asks: log-probs of the prompt's own tokens."""
    ids = [*b'the cat sat'] * 30
    choice = call(
        server, '/v1/completions', dict(prompt=ids[:200], max_tokens=1, temperature=0, logprobs=1, echo=True)
    )[1]['choices'][0]
    lp = choice['logprobs']
    want = server.engine.model.logprobs(torch.tensor([ids[:200]]))[0].tolist()
    assert (
        lp['token_logprobs'][0] is None
        and lp['top_logprobs'][0] is None
        and lp['token_logprobs'][1:200] == pytest.approx(want, abs=1e-4)
    )
    assert (
        len(lp['tokens']) == 201
        and choice['text'].startswith('the cat sat')
        and ''.join(lp['tokens']) == choice['text']
    )
    plain = call(server, '/v1/completions', dict(prompt='ab', max_tokens=2, temperature=0, echo=True, n=2))[
        1
    ]['choices']
    assert [c['text'][:2] for c in plain] == ['ab'] * 2 and plain[0]['logprobs'] is None
    parts = streamed(server, dict(prompt=ids[:200], max_tokens=1, temperature=0, logprobs=1, echo=True))
    assert ''.join(part['text'] for part in parts) == choice['text'] and parts[0]['logprobs'] == lp


@pytest.mark.parametrize(
    'more', [dict(n=16), dict(stream=True, logit_bias={'120': 100}, stop=['x' * 600]), dict(stream=True)]
)
def test_who_hangs_up_is_not_computed_for(server, monkeypatch, more):
    """Also while the engine talks, and while the text is held back for a stop string."""
    step, before = server.engine.step, server.engine.counts['output_tokens']
    monkeypatch.setattr(server.engine, 'step', lambda: time.sleep(0.01) or step())
    hang_up(server, **more)
    assert settle(server) and server.engine.counts['output_tokens'] - before < 0.6 * 240 * more.get('n', 1)


def raw(server, data):
    with socket.create_connection(server.server_address[:2], timeout=20) as c:
        c.sendall(data)
        c.shutdown(socket.SHUT_WR) if b'POST' not in data else None
        return b''.join(iter(lambda: c.recv(65536), b'')).decode()


def test_http_of_any_age_and_method(capsys):
    s = make(api_key='k', cors='https://page.example')
    try:
        body = json.dumps(dict(prompt='a', max_tokens=5, stream=True)).encode()
        said = raw(
            s,
            b'POST /v1/completions HTTP/1.0\r\nAuthorization: Bearer k\r\nContent-Length: %d\r\n\r\n'
            % len(body)
            + body,
        )
        head, _, rest = said.partition('\r\n\r\n')
        assert (
            'Transfer-Encoding' not in head
            and rest.startswith('data: {')
            and rest.endswith('data: [DONE]\n\n')
        )
        for method, path, status in (
            ('HEAD', '/health', 200),
            ('GET', '/health', 200),
            ('OPTIONS', '/v1/chat/completions', 204),
            ('HEAD', '/v1/models', 401),
            ('PUT', '/v1/models', 501),
        ):
            c = http.client.HTTPConnection('127.0.0.1', s.server_address[1], timeout=20)
            c.request(method, path)
            r = c.getresponse()
            data = r.read()
            assert (
                r.status == status and r.getheader('Access-Control-Allow-Origin') == 'https://page.example'
            ), (method, r.status)
            assert (data == b'') == (method in ('HEAD', 'OPTIONS')) and (
                status < 400 or not data or json.loads(data)['error']['message']
            )
            c.close()
        assert '"message"' in raw(s, b'nonsense\r\n\r\n') and '"message"' in raw(
            s, b'GET /' + b'x' * 70000 + b' HTTP/1.1\r\n\r\n'
        )
        c = socket.create_connection(s.server_address[:2])
        c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')
        c.sendall(b'GET /heal')
        c.close()  # a reset
        c = http.client.HTTPConnection('127.0.0.1', s.server_address[1], timeout=20)  # a kept connection
        for _ in range(3):
            c.request('GET', '/health')
            assert c.getresponse().read()
        c.close()
    finally:
        s.close()
    assert capsys.readouterr().err == ''


def test_small_answers_do_not_wait_for_an_acknowledgement(server, monkeypatch):
    seen, get = [], serve.Handler.get
    monkeypatch.setattr(
        serve.Handler,
        'get',
        lambda self: (
            seen.append(self.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)) or get(self)
        ),
    )
    call(server, '/health', method='GET')
    assert seen[0] != 0


def test_ipv6_loopback():
    try:
        s = make(host='::1')
    except OSError:
        pytest.skip('no IPv6 here')
    try:
        assert s.url.startswith('http://[::1]:')
        with socket.create_connection(s.server_address[:2], timeout=20) as c:
            c.sendall(b'GET /health HTTP/1.0\r\n\r\n')
            assert b'200 OK' in c.recv(100)
    finally:
        s.close()


def test_a_failing_engine_answers_and_lives_on():
    s = make()
    try:
        good = {k: v.clone() for k, v in s.engine.model.state_dict().items()}
        s.engine.load_weights({k: v * float('nan') for k, v in good.items()})
        status, answer = call(s, '/v1/completions', dict(prompt='a'))
        assert status == 500 and 'not finite' in answer['error']['message']
        s.engine.load_weights(good)
        assert call(s, '/v1/completions', dict(prompt='a', max_tokens=3))[0] == 200 and settle(s)
    finally:
        s.close()


def hang_up(server, **more):
    """A long request whose client leaves after a moment."""
    body = json.dumps(dict(prompt='hello', max_tokens=240, ignore_eos=True, **more)).encode()
    with socket.create_connection(('127.0.0.1', server.server_address[1])) as c:
        c.sendall(
            b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n' % len(body) + body
        )
        if more.get('stream'):
            assert c.recv(20)


def load(server, clients, seed):
    """`clients` at once: a third leaves midway, some send nonsense, the others must get what generate()
    gives. -> right answers"""
    rng = random.Random(seed)
    kinds = [
        rng.choice(['good', 'good', 'chat', 'leave', 'leave', 'leave', 'bad', 'giant', 'raw'])
        for _ in range(clients)
    ]
    prompts = [''.join(rng.choice('abcdefgh ') for _ in range(rng.randint(1, 60))) for _ in range(clients)]
    lens = [rng.randint(1, 40) for _ in range(clients)]
    p = lambda i: SamplingParams(max_tokens=lens[i], temperature=0.9, seed=i)
    tok = server.engine.tokenizer
    ids = [
        tok.apply_chat_template([dict(role='user', content=x)], add_generation_prompt=True)
        if k == 'chat'
        else x
        for k, x in zip(kinds, prompts)
    ]
    want = server.engine.generate(ids, [p(i) for i in range(clients)])
    got, errors = [None] * clients, []

    def client(i):
        try:
            ask = dict(max_tokens=lens[i], temperature=0.9, seed=i, stream=False)
            if kinds[i] == 'good':
                got[i] = (
                    call(server, '/v1/completions', dict(ask, prompt=prompts[i]))[1]['choices'][0]['text']
                    == want[i].text
                )
            elif kinds[i] == 'chat':
                got[i] = (
                    call(
                        server,
                        '/v1/chat/completions',
                        dict(ask, messages=[dict(role='user', content=prompts[i])]),
                    )[1]['choices'][0]['message']['content']
                    == want[i].text
                )
            elif kinds[i] == 'leave':
                hang_up(server, stream=i % 2 == 0)
            elif kinds[i] == 'bad':
                path, body, status, _ = BAD[i % len(BAD)]
                got[i] = call(server, path, body)[0] == status
            elif kinds[i] == 'giant':
                got[i] = call(server, '/v1/completions', dict(prompt='x' * 2_000_000))[0] == 400
            else:
                got[i] = call(server, '/v1/completions', raw=os.urandom(50))[0] == 400
        except Exception as e:
            errors.append((i, kinds[i], repr(e)))

    threads = [threading.Thread(target=client, args=(i,)) for i in range(clients)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert not errors, errors[:3]
    wrong = [(i, kinds[i]) for i in range(clients) if kinds[i] != 'leave' and got[i] is not True]
    assert not wrong, wrong[:5]
    assert settle(server)
    return sum(x is True for x in got)


def test_clients_at_once_some_leave_some_send_nonsense(server):
    assert load(server, 40, seed=random.randrange(1 << 30)) > 10


def test_clients_at_once_on_graphs(graphs, twins):
    """As on CUDA: a client that hangs up while the step behind its last token is on its way takes nothing
    from the others."""
    twins()
    s = make(on=graphs.on)
    try:
        assert load(s, 40, seed=random.randrange(1 << 30)) > 10 and graphs.replays > 50
    finally:
        s.close()


def test_a_client_that_waits_behind_many_open_files(crowded):
    """The server looks twice a second whether its clients are still there: one is, one is not."""
    s, got = make(), []

    def until(n, seconds):
        end = time.time() + seconds
        while len(s.engine.requests) != n and time.time() < end:
            time.sleep(0.01)
        return len(s.engine.requests) == n

    try:
        step, s.engine.step = s.engine.step, lambda: time.sleep(0.01) or []
        waits = threading.Thread(
            target=lambda: got.append(
                call(s, '/v1/completions', dict(prompt='hello', max_tokens=9, temperature=0))
            )
        )
        waits.start()
        assert until(1, 20)
        hang_up(s, stream=False)
        until(2, 5)
        assert until(1, 20) and not got
        s.engine.step = step
        waits.join(30)
        assert (
            got[0][0] == 200
            and got[0][1]['choices'][0]['text']
            == s.engine.generate(['hello'], SamplingParams(max_tokens=9, temperature=0))[0].text
            and settle(s)
        )
    finally:
        s.close()


class Mallinfo(ctypes.Structure):
    """glibc's struct mallinfo2; sizes in bytes, over all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in 'arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost'.split()
    ]


def held():
    """-> MB that this process has allocated and not freed. Resident memory would be no measure: what 200
    threads have freed and malloc's arenas keep differs by 100 MB from one time to the next."""
    gc.collect()
    count = ctypes.CDLL(None).mallinfo2
    count.restype = Mallinfo
    info = count()
    small = 64 * sys.getallocatedblocks()  # Python's own small blocks, at 64 bytes each
    return (info.uordblks + info.hblkhd + small) / 1e6


def grown(work):
    """Runs work() twice -> (threads, MB of memory) that the second time has left behind."""
    threads, seen = threading.active_count(), []
    for _ in range(2):
        work()
        until = time.time() + 20
        while threading.active_count() > threads and time.time() < until:
            time.sleep(0.1)
        seen.append(held())
    return threading.active_count() - threads, seen[1] - seen[0]


@pytest.mark.slow
def test_two_hundred_clients_at_once():
    """A third hang up, half of them without a stream; nothing is left of them."""
    s = make()
    try:
        threads, memory = grown(lambda: [load(s, 200, seed) for seed in range(2)])
        assert threads <= 0 and memory < 2
    finally:
        s.close()


def mangled(rng):
    """A request that is wrong in its JSON, in its keys, in its headers or in its length; some are only
    odd."""
    paths = ['/v1/completions', '/v1/chat/completions'] * 4 + ['/v1/models', '/', '/%00?\xff', '*']
    path = rng.choice(paths)
    numbers = 'null, true, -1, 0, 0.5, 1e400, 1208925819614629174706176'
    texts = r'"", "x", "\ud800", [], [[]], [{}], {}, {"a": [1]}, [1, "a"]'
    values = json.loads(f'[{numbers}, {texts}, {"[" * 400 + "]" * 400}]') + ['x' * 300]
    body = {} if rng.random() < 0.2 else dict(prompt='a', max_tokens=2)
    if 'chat' in path:
        body = dict(messages=[dict(role='user', content='a')], max_tokens=2)
    for key in rng.sample(
        [*serve.KEYS['/v1/completions'], *serve.CHAT, *serve.FINE, 'role', ''], rng.randint(1, 3)
    ):
        body[key] = rng.choice(values)
    if rng.random() < 0.3:
        body['messages'] = [
            {rng.choice(['role', 'content', 'tool_calls']): rng.choice(values + ['user'])} for _ in range(2)
        ]
    data = json.dumps(body).encode()
    if rng.random() < 0.3:
        data = bytes(rng.choice(data + b'{[\x00\xff"') for _ in range(rng.randint(0, 60)))
    wrong = ['-1', '', 'x', '1e3', '9' * 5000, '99999999', '3']
    length = str(len(data)) if rng.random() < 0.8 else rng.choice(wrong)
    odd = ['Transfer-Encoding: chunked', 'X: ' + 'y' * 70000, ': ', 'Y', 'Authorization: \xff']
    more = rng.choice(['Z: 1'] * 6 + odd)
    method = rng.choice(['POST'] * 9 + ['GET', 'PUT', 'P\0ST'])
    version = rng.choice(['HTTP/1.1', 'HTTP/1.1', 'HTTP/1.1', 'HTTP/1.0', 'HTTP/9.9', ''])
    line = f'{method} {path} {version}'
    return f'{line}\r\nContent-Length: {length}\r\n{more}\r\n'.encode('latin-1', 'replace') + data


@pytest.mark.slow
def test_ten_thousand_bad_requests(capsys):
    """Each has an answer, none of them the server's own fault, and nothing is left of them."""
    s, rng, codes = make(), random.Random(0), {}

    def many():
        for _ in range(5000):
            with (
                socket.create_connection(s.server_address[:2], timeout=20) as c,
                contextlib.suppress(ConnectionError),
            ):
                c.sendall(mangled(rng))
                with contextlib.suppress(OSError):  # the server has already reset the connection
                    c.shutdown(socket.SHUT_WR)
                said = b''.join(iter(lambda: c.recv(65536), b''))
                code = said.split()[1].decode() if said.startswith(b'HTTP') else 'none'
                codes[code] = codes.get(code, 0) + 1

    try:
        threads, memory = grown(many)
        assert threads <= 0 and memory < 2 and settle(s)
        assert not {code for code in codes if code.startswith('5')} - {'501', '505'}, codes
        assert codes['400'] > 1000 and sum(codes.values()) > 8000, codes
        assert call(s, '/v1/completions', dict(prompt='a', max_tokens=3))[0] == 200
    finally:
        s.close()
    assert capsys.readouterr().err == ''


# ---- the command ----


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A checkpoint as a stage leaves it."""
    out = tmp_path_factory.mktemp('cli')
    model = tiny('gpt2', torch.float32, vocab=get_tokenizer('byte').vocab_size, block_size=128)
    (out / 'm').mkdir()
    torch.save(
        dict(model=model.state_dict(), model_args=vars(model.config), config={}, tokenizer='byte'),
        out / 'm' / 'ckpt.pt',
    )
    return out


def run(folder, *args, text=None):
    return subprocess.run(
        [
            sys.executable,
            os.path.join(ROOT, 'infer.py'),
            f'--init_from={folder / "m"}',
            '--device=cpu',
            '--dtype=float32',
            *args,
        ],
        input=text,
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=120,
    )


def test_command_samples(folder):
    r = run(folder, '--start=abc', '--max_new_tokens=9', '--seed=1')
    assert r.returncode == 0 and r.stdout.startswith('abc') and 'tok/s' in r.stderr, r.stderr
    assert r.stdout == run(folder, '--start=abc', '--max_new_tokens=9', '--seed=1', '--max_num_seqs=1').stdout
    several = run(folder, '--start=abc', '--max_new_tokens=9', '--seed=1', '--num_samples=3').stdout.split(
        '\n---------------\n'
    )
    assert (
        len(several) == 3 and all(text.startswith('abc') for text in several) and len(set(several)) > 1
    )  # each with its prompt, as nanoGPT prints them
    for key, way in (('--serve', 'serve.py'), ('--ngram=1', 'dropped')):
        r = run(folder, key)
        assert r.returncode == 2 and way in r.stderr and r.stderr.count('\n') == 1


@pytest.mark.slow
def test_command_chats_and_says_what_is_wrong(folder):
    r = run(folder, '--chat', '--max_new_tokens=9', text='hello\n/reset\nyou\n\n')
    assert r.returncode == 0 and r.stderr.count('tok/s)') == 2, r.stderr
    for args, word in (
        (['--init_from=out-none'], 'no such checkpoint'),
        (['--temprature=1'], 'temperature'),
        (['--dtype=int8'], 'float32'),
        (['--max_new_tokens=0'], 'max_new_tokens is 0'),
    ):
        r = run(folder, *args)
        assert r.returncode == 2 and word in r.stderr and 'Traceback' not in r.stderr, (args, r.stderr)
    assert run(folder, '--help').stdout.count('--') > 20
