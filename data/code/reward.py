"""Reward of code: the share of a row's tests that an answer's Python passes.

    python grpo.py --init_from=Qwen/Qwen3-0.6B --dataset=mbpp.jsonl --reward=data/code/reward.py

Rows as MBPP has them, {"prompt", "test_list": ["assert f(2) == 4", ...]}, with "test_setup_code" where a test
needs an import. The code is the last ```python block of the answer (a <think> before it does not count), or
all of it where there is no block. It runs in a process of its own: 10 seconds of CPU and of the clock, 1 GiB
of memory, files of 1 MB at most, an empty temporary folder to work in, no environment variables, nothing to
read from and no terminal; at the end its whole process group is killed. Each test runs after the one before;
what a test prints goes nowhere.

What this is not: a sandbox. The code runs as you, it can read your files and open connections, and a process
that starts a session of its own outlives it. Train on it in a container without a network. Nor is it proof
against an answer that looks for its tests in the memory of its own process: watch samples.jsonl.
"""
import contextlib
import json
import os
import re
import resource
import secrets
import signal
import subprocess
import sys
import tempfile

SECONDS = 10
MEMORY = 1 << 30  # bytes of address space
FILE = 1 << 20    # bytes of a file

# runs the code once, then each test by itself; a test that passed is told to a pipe under a word that the
# code was not given
HARNESS = """
import os, sys
pipe, word, code, setup, tests = int(sys.argv[1]), *__import__('json').loads(sys.stdin.read())
space = dict(__name__='answer')
exec(compile(code, 'answer.py', 'exec'), space)
exec(compile(setup, 'setup.py', 'exec'), space)
for i, test in enumerate(tests):
    try:
        exec(compile(test, 'test.py', 'exec'), dict(space))
    except BaseException:
        continue
    os.write(pipe, f'{word} {i}\\n'.encode())
"""


def code_of(completion: str) -> str:
    """The last fenced block of Python (or of no language) behind a thought; the whole text without one."""
    answer = completion.rsplit('</think>', 1)[-1]
    blocks = re.findall(r'```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)', answer, re.S | re.I)
    return blocks[-1] if blocks else answer


def limits():
    """In the child, before Python starts there."""
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform != 'darwin':  # macOS has no limit of address space
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def passed(code: str, tests: list, setup: str = '') -> int:
    """How many of the tests pass. passed('f = lambda x: 2 * x', ['assert f(2) == 4', 'assert f(0)']) -> 1"""
    word = secrets.token_hex(16)
    read, write = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, '-I', '-S', '-c', HARNESS, str(write)]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, pass_fds=[write],
                                 stderr=subprocess.DEVNULL, cwd=folder, env={}, start_new_session=True,
                                 preexec_fn=limits)
        os.close(write)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):  # what has passed by then counts
                child.communicate(json.dumps([word, code, setup, tests]).encode(), timeout=SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):  # none of its group is left
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    os.set_blocking(read, False)  # a process that got away may hold the other end
    said = b''
    with open(read, 'rb', buffering=0) as pipe:
        while part := pipe.read(1 << 16):
            said += part
    numbers = {int(i) for i in re.findall(rf'^{word} (\d+)$', said.decode(errors='replace'), re.M)}
    return len(numbers & set(range(len(tests))))


def reward(prompt, completion: str, row: dict) -> float:
    """The share of row["test_list"] that passes, in [0, 1]. ValueError for a row without tests."""
    tests = row.get('test_list')
    if not tests:
        raise ValueError('no "test_list": expected a list of assertions, ["assert f(2) == 4"]')
    return passed(code_of(completion), tests, row.get('test_setup_code') or '') / len(tests)
