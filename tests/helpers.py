"""What several test files share."""
import contextlib
import http.server
import io
import json
import os
import re
import runpy
import sys
import threading

import torch
from conftest import ROOT

import parallel


def stage(script, *args, cwd, die_at_save=0):
    """The script run as __main__ in this process (a subprocess costs seconds): what it printed. die_at_save:
    killed after its n-th ckpt.pt. Rewards are asked in this process, too, unless args say otherwise."""
    class Killed(Exception):
        """Stands for kill -9 in this process."""
    argv, hook, threads, here, saves = sys.argv, sys.excepthook, torch.get_num_threads(), os.getcwd(), []
    save = parallel.save_checkpoint
    running = 'actors' in sys.modules and sys.modules['actors'].is_initialized()

    def counted(path, *args, **rest):
        save(path, *args, **rest)
        saves.append(path)
        if die_at_save and sum(p.endswith('ckpt.pt') for p in saves) == die_at_save:
            raise Killed
    out = io.StringIO()
    try:
        quick = script in ('ppo.py', 'grpo.py') and '--mode=async' not in args
        always = ['--device=cpu', '--overwrite=True', *(['--reward_workers=0'] if quick else [])]
        parallel.save_checkpoint, sys.argv = counted, [script, *always, *args]
        os.chdir(cwd)
        with contextlib.redirect_stdout(out):
            runpy.run_path(os.path.join(ROOT, script), run_name='__main__')
    except Killed:
        out.write('killed')
    finally:
        parallel.save_checkpoint, sys.argv, sys.excepthook = save, argv, hook
        if 'actors' in sys.modules and sys.modules['actors'].is_initialized() and not running:
            sys.modules['actors'].shutdown()  # of a stage that ended in an error: its process would end here
        torch.set_num_threads(threads)
        os.chdir(here)
    return out.getvalue()


def log_rows(folder, split='train'):
    """Rows of log.jsonl of one split, without what the clock says."""
    with open(os.path.join(folder, 'log.jsonl'), encoding='utf-8') as f:
        rows = [json.loads(line) for line in f]
    timed = ('time', 'gen_s', 'upd_s', 'tok_per_s', 'pairs_per_s')
    return [{k: v for k, v in row.items() if k not in timed} for row in rows if row['split'] == split]


def ckpt(folder, name='ckpt.pt'):
    return torch.load(os.path.join(folder, name), weights_only=True)


def jsonl(path, rows):
    with open(path, 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row) + '\n' for row in rows)


def equal(a, b):
    """Are two trees of dicts, lists and tensors the same to the bit?"""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@torch.no_grad()
def mismatch(engine, completions, model=None):
    """Parity meter: |raw log-prob of the engine - model.logprobs| over the completions' tokens -> {'max',
    'mean'} nats."""
    model, differences = model or engine.model, [torch.zeros(1, dtype=torch.float64)]
    for c in completions:
        tokens = torch.tensor([c.prompt_token_ids + c.token_ids], device=engine.device)
        logp = model.logprobs(tokens)[0, len(c.prompt_token_ids) - 1:].double().cpu()
        differences.append((logp - torch.tensor(c.raw_logprobs, dtype=torch.float64)).abs())
    differences = torch.cat(differences)
    return dict(max=float(differences.max()), mean=float(differences.mean()))


class Judge:
    """An OpenAI-compatible endpoint. says(answer A, answer B, question) -> text, or (status, object,
    headers)."""

    def __init__(self, says):
        self.asked, self.keys = [], []
        asked, keys = self.asked, self.keys

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                asked.append(json.loads(self.rfile.read(int(self.headers['Content-Length']))))
                keys.append(self.headers.get('Authorization'))
                question = asked[-1]['messages'][0]['content']
                fenced = re.findall(r'^(-----\w+)\n(.*?)\n\1$', question, re.S | re.M)
                a, b = fenced[-2][1], fenced[-1][1]
                said = says(a, b, question)
                if not isinstance(said, tuple):
                    said = 200, {'choices': [{'message': {'content': said}}]}, {}
                status, reply, headers = said
                data = json.dumps(reply).encode()
                self.send_response(status)
                for key, value in {**headers, 'Content-Length': str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_):
                return None
        self.server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
        self.url = f'http://127.0.0.1:{self.server.server_port}/v1'
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
