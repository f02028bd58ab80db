"""native.c and native.py: what compiles them, what runs without them, and the attention of documents
against float64."""

import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import kernels as K
from helpers import mismatch

native = pytest.importorskip('native', reason='native.py was deleted: the twins run')
ROOT = os.path.dirname(os.path.abspath(K.__file__))
PARTS = (
    ['-DDOCS', '-DHS=32'],
    ['-DDOCS', '-DHS=80'],
    ['-DFORWARD', '-DNKV=2', '-DG=2', '-DD=32'],
    ['-DFORWARD', '-DNKV=3', '-DG=1', '-DD=20'],
    ['-DDRAW'],
)
compiled = pytest.mark.skipif(not any(map(shutil.which, ('cc', 'gcc', 'clang'))), reason='no C compiler here')


@pytest.fixture
def forget():
    """Nothing is compiled yet, nothing said; afterwards again as before."""
    caches = native.library, native._say
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def flags(monkeypatch, forget):
    """The commands of compilers that went well."""
    seen, run = [], native._complaint
    monkeypatch.setattr(native, '_complaint', lambda *command: run(*command) or seen.append(command) or '')
    return seen


def child(code, timeout=300, **env):
    """(stdout, stderr) of Python code that runs in the project's root."""
    done = subprocess.run(
        [sys.executable, '-c', code],
        cwd=ROOT,
        env={**os.environ, 'OMP_NUM_THREADS': '1', **env},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


# Draws, trains and generates; prints the tokens and whether C ran.
EVERYTHING = """
import sys
import torch
sys.path.insert(0, 'tests')
import kernels as K
from helpers import mismatch
from infer import Engine, SamplingParams
from test_infer import tiny
model = tiny('qwen3', torch.float32, vocab=211, n_embd=64, head_size=16)
idx, doc = torch.arange(12)[None], torch.tensor([[0] * 5 + [1] * 7])
model(idx, targets=idx, doc=doc)[1].backward()
engine = Engine(model, None)
params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
out = engine.generate([[1, 2, 3], [4] * 40, [5]], params)
K.draw(torch.randn(3, 99), torch.rand(3, dtype=torch.float64), torch.ones(3))
print('in C' in repr(engine), [c.token_ids for c in out], mismatch(engine, out)['max'] <= 1e-5)
"""


def test_without_a_compiler_everything_runs_and_one_line_says_so(tmp_path):
    with_c, _ = child(EVERYTHING)
    line = 'no C compiler: install gcc or clang, decoding is about 4 times faster with it\n'
    without, said = child(EVERYTHING, PATH=str(tmp_path), CC='')
    assert said == line and without.startswith('False')
    assert child(EVERYTHING, PATH=str(tmp_path), CC='', RANK='1')[1] == '', 'one process of several speaks'
    gone, said = child("import sys; sys.modules['native'] = None\n" + EVERYTHING)
    assert said == 'no native.py: decoding is about 4 times faster with it\n' and gone == without
    (tmp_path / 'cc').write_text('#!/bin/sh\necho "cc: error: licence expired" >&2\nexit 1\n')
    (tmp_path / 'cc').chmod(0o755)
    broken, said = child(EVERYTHING, PATH=f'{tmp_path}:/bin', CC='')
    why = 'native.c does not compile (cc: error: licence expired)'
    assert said == why + ', decoding is about 4 times faster with it\n'
    assert broken == without and without.split(' ', 1)[1] == with_c.split(' ', 1)[1], 'the same tokens'


@pytest.mark.slow
@compiled
@pytest.mark.parametrize('compiler', ['gcc', 'clang'])
def test_no_warning(tmp_path, compiler):
    """-Wall -Wextra, with OpenMP, with its vectors only, and without; for x86-64: 4, 8 or 16 floats a
    register, and no operation is wider than the machine's (gcc would carry it out in memory, ten times
    slower)."""
    if not shutil.which(compiler):
        pytest.skip(f'no {compiler} here')
    strict = [
        '-Wall',
        '-Wextra',
        '-Werror',
        *['-Werror=vector-operation-performance'] * (compiler == 'gcc'),
        native.SOURCE,
        '-o',
        str(tmp_path / 'x.so'),
        '-lm',
    ]
    levels = (
        [f'-march=x86-64{level}' for level in ('', '-v2', '-v3', '-v4')]
        if platform.machine() == 'x86_64'
        else ['-march=native']
    )
    for openmp in ('-fopenmp', '-fopenmp-simd', '-Wno-unknown-pragmas')[compiler == 'clang' :]:
        for part in PARTS:
            for level in levels:
                done = subprocess.run(
                    [compiler, *native.FLAGS, *part, level, openmp, *strict], capture_output=True, text=True
                )
                assert done.returncode == 0, (openmp, part, level, done.stderr)


def check_engine():
    from infer import Engine, SamplingParams
    from test_infer import tiny

    for arch in ('gpt2', 'qwen3'):
        engine = Engine(tiny(arch, torch.float32, vocab=211, n_embd=64, head_size=16), None)
        out = engine.generate(
            [[1, 2, 3], [4] * 40, [5]], SamplingParams(max_tokens=20, seed=1, ignore_eos=True)
        )
        assert 'in C' in repr(engine) and mismatch(engine, out)['max'] <= 1e-5


@compiled
@pytest.mark.parametrize(
    'level, needs', [('x86-64-v2', 'ssse3'), ('x86-64-v3', 'avx2'), ('x86-64-v4', 'avx512f')]
)
def test_any_machine(monkeypatch, flags, level, needs):
    if platform.machine() != 'x86_64' or needs not in open('/proc/cpuinfo').read().split():
        pytest.skip(f'this machine does not run {level}')
    monkeypatch.setattr(native, 'MACHINE', [[f'-march={level}']])
    test_attention_of_documents(2, 2, 32)
    check_engine()
    assert flags and all(f'-march={level}' in command for command in flags)


@compiled
@pytest.mark.parametrize(
    'refused, want',
    [
        (['-fopenmp'], ['-march=native', '-fopenmp-simd']),
        (['-fopenmp', '-march=native'], ['-mcpu=native', '-fopenmp-simd']),
        (['-fopenmp', '-fopenmp-simd', '-march=native', '-mcpu=native'], []),
    ],
)
def test_other_compilers(monkeypatch, flags, tmp_path, refused, want):
    """What a Mac's clang takes, old and new, and a compiler that takes no such flag: the code runs there,
    on one thread."""
    words = '|'.join(refused)
    (tmp_path / 'cc').write_text(
        '#!/bin/sh\n'
        f'for word in "$@"; do case "$word" in {words}) '
        'echo "clang: error: unsupported option" >&2; exit 1;; '
        f'esac; done\nexec {shutil.which("cc")} "$@"\n'
    )
    (tmp_path / 'cc').chmod(0o755)
    monkeypatch.setenv('CC', str(tmp_path / 'cc'))
    test_attention_of_documents(2, 2, 32)
    check_engine()
    for command in flags:
        assert command[0] == str(tmp_path / 'cc') and not set(refused) & set(command)
        assert [x for x in command if x.startswith(('-m', '-fopenmp'))] == want


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('clang'), reason='no clang here')
def test_clang(monkeypatch, flags):
    """The same numbers from clang, which starts no threads beside torch's."""
    monkeypatch.setenv('CC', 'clang')
    for sizes in ((4, 1, 32), (1, 3, 64)):
        test_attention_of_documents(*sizes)
    check_engine()
    assert all({'-march=native', '-fopenmp-simd'} < set(command) for command in flags)


@compiled
@pytest.mark.parametrize('nkv, group, hs', [(4, 1, 32), (2, 2, 16), (1, 3, 64), (2, 1, 128)])
def test_attention_of_documents(nkv, group, hs):
    """Documents of 1 to 70 tokens, three of them with a prompt in common: values, gradients and whose bits
    do not move, against float64."""
    assert K.docs_in_c(torch.empty(1, hs)), 'the C source does not compile'
    torch.manual_seed(hs)
    paths = [
        range(0, 1),
        range(1, 8),
        range(8, 78),
        range(78, 111),
        [*range(78, 100), *range(111, 119)],
        [*range(78, 100), 119],
        range(120, 152),
    ]
    rows, cu = (
        torch.tensor([i for p in paths for i in p]),
        F.pad(torch.tensor([len(p) for p in paths]).cumsum(0), (1, 0)),
    )
    args = rows, cu, torch.tensor([0, 0, 0, 0, 22, 22, 0]), torch.tensor([0, 1, 2, 3, 6, 7]), 70
    N, nh = 154, nkv * group  # the last two rows are in no document
    x = torch.randn(N, nh + 2 * nkv, hs)
    q, k, v = (
        t.requires_grad_() for t in x.split([nh, nkv, nkv], 1)
    )  # not contiguous, as they come from one matrix product
    g = torch.randn(N, nh, hs)

    def reference(q, k, v):
        out = torch.zeros(N, nh, hs, dtype=q.dtype)
        for p, first in zip(paths, args[2].tolist()):
            at = torch.tensor([*p])
            y = F.scaled_dot_product_attention(
                *(t[at].transpose(0, 1)[None] for t in (q, k, v)), is_causal=True, enable_gqa=True
            )[0].transpose(0, 1)
            out = out.index_copy(0, at[first:], y[first:])
        return out

    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    plain = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    sides = [
        (f(*t), t)
        for f, t in (
            (lambda *t: K.doc_attention(*t, *args), (q, k, v)),
            (reference, plain),
            (reference, wide),
        )
    ]
    ours, torchs, exact = ([out, *torch.autograd.grad(out, t, g.to(out.dtype))] for out, t in sides)
    for a, b, c in zip(ours, torchs, exact):
        assert (a - c).abs().max() <= 3 * (b - c).abs().max() + 1e-6
    assert not ours[0][152:].any() and all(not t[152:].any() for t in ours[1:])
    alone = K.doc_attention(
        *(t.detach()[8:78] for t in (q, k, v)),
        torch.arange(70),
        torch.tensor([0, 70]),
        torch.tensor([0]),
        torch.tensor([0, 1]),
        70,
    )
    assert torch.equal(alone, ours[0][8:78])


# ---- no function writes behind its buffers -------------------------------------------------------


def engine(arch='qwen3', **over):
    from infer import Engine
    from test_infer import tiny

    over = dict(vocab=211, n_embd=64, head_size=16) | over
    e = Engine(tiny(arch, torch.float32, **over), None, max_num_seqs=256)
    assert e.native
    return e


def ask(e, prompts, n, **over):
    from infer import SamplingParams

    out = e.generate(prompts, SamplingParams(**dict(max_tokens=3, seed=1, n=n, ignore_eos=True) | over))
    assert mismatch(e, out)['max'] <= 2e-5
    return [c.token_ids for c in out]


@compiled
@pytest.mark.parametrize(
    'prompts, n',
    [
        ([[7]], 128),
        ([[7]], 65),
        ([[7], [1, 2]], 64),
        ([[1, 2, 3, 4, i] for i in range(16)], 8),
        ([[3] * 80, [4]], 128),
    ],
)
def test_more_samples_than_tokens(prompts, n):
    """A step draws n samples a prompt from fewer rows than that; the first eight are those of n = 8."""
    many, few = (ask(engine(block_size=128), prompts, k) for k in (n, 8))
    assert len(many) == n * len(prompts) and len(set(map(tuple, many))) > n // 2
    for i in range(len(prompts)):
        assert many[i * n : i * n + 8] == few[i * 8 : i * 8 + 8]


@compiled
@pytest.mark.parametrize(
    'arch, head_size, n_head, n_kv_head',
    [('llama', d, 3, 3) for d in (4, 10, 16, 20, 48, 64, 80, 96, 128, 256)]
    + [('gpt2', 12, 3, 3), ('llama', 24, 8, 1), ('qwen3', 128, 6, 2), ('qwen2', 40, 16, 2)],
)
def test_every_head_size(arch, head_size, n_head, n_kv_head):
    """A prompt of one token, one that leaves room for one, a chunk, and the whole context."""
    e = engine(arch, head_size=head_size, n_head=n_head, n_kv_head=n_kv_head, n_embd=36, block_size=48)
    assert [len(t) for t in ask(e, [[1], [2] * 47, [3] * 17], 2, max_tokens=47)] == [47, 47, 1, 1, 31, 31]


@compiled
def test_what_does_not_fit_is_refused_before_anything_is_written():
    """Each C function knows how many rows it may write and what its numbers may be."""
    import numpy as np

    e = engine()
    ask(e, [[1, 2, 3]], 1)
    net, kv = e.forward, torch.full((2, 2, 3, 2, 32, 16), 7.0)
    n = net.rows + 1

    def forward(n=2, ids=1, pos=1, owner=0, size=32, block=2, requests=1, width=64):
        ids, pos, owner = (np.full(max(n, 2), x, np.int64) for x in (ids, pos, owner))
        table = np.full((1, 2), block, np.int32)
        cache = native.pack(kv, table, kv.stride(0), kv.stride(1), 3, size, requests, 2)
        native.call(net.code.forward, net.net, 2, cache, ids, owner, pos, n, width)

    def logits(n=2, at=0, rows=2, width=224):
        z, at = torch.full((rows, width), 7.0), np.full(n, at, np.int64)
        native.call(net.code.logits, net.net, at, n, z, rows, width)

    for call, wrong in (
        (forward, dict(n=n)),
        (forward, dict(ids=211)),
        (forward, dict(ids=-1)),
        (forward, dict(pos=64)),
        (forward, dict(pos=-1)),
        (forward, dict(size=24)),
        (forward, dict(size=0)),
        (forward, dict(owner=1)),
        (forward, dict(owner=-1)),
        (forward, dict(block=3)),
        (forward, dict(block=-1)),
        (forward, dict(requests=0)),
        (forward, dict(pos=20, width=16)),
        (forward, dict(width=60)),
        (logits, dict(n=n, rows=n)),
        (logits, dict(n=3)),
        (logits, dict(at=net.rows)),
        (logits, dict(at=-1)),
        (logits, dict(width=211)),
    ):
        with pytest.raises(RuntimeError, match=f'native.c: {call.__name__} needs '):
            call(**wrong)
    assert (kv == 7).all()
    forward(), logits()
    with pytest.raises(RuntimeError, match='native.c: draw needs '):
        native.draw(torch.randn(3, 9), torch.rand(2, dtype=torch.float64), torch.ones(3))
    q = torch.randn(6, 2, 16)
    good = dict(
        rows=torch.arange(6),
        cu=torch.tensor([0, 4, 6]),
        first=torch.tensor([0, 0]),
        tasks=torch.tensor([0, 1, 2]),
        longest=4,
    )
    assert K.doc_attention(q, q, q, **good).isfinite().all()
    for wrong in (
        dict(rows=torch.arange(1, 7)),
        dict(rows=torch.arange(-1, 5)),
        dict(rows=torch.arange(5)),
        dict(cu=torch.tensor([0, 4, 7])),
        dict(cu=torch.tensor([0, 4, 2])),
        dict(first=torch.tensor([0])),
        dict(first=torch.tensor([0, -1])),
        dict(tasks=torch.tensor([0, 3])),
        dict(tasks=torch.tensor([1, 0])),
        dict(longest=3),
    ):
        with pytest.raises(RuntimeError, match='native.c: attend needs '):
            K.doc_attention(q, q, q, **good | wrong)
    for k, v in (
        (q[:5], q),
        (q, q[:, :1]),
        (torch.randn(6, 2, 32), torch.randn(6, 2, 32)),
        (torch.randn(6, 3, 16), torch.randn(6, 3, 16)),
    ):
        with pytest.raises(ValueError, match='do not fit together'):
            K.doc_attention(q, k, v, **good)


@compiled
@pytest.mark.slow
def test_under_the_sanitizers():
    """The C under AddressSanitizer and UndefinedBehaviorSanitizer: this file's tests, and the engine's of
    the C path. First a fault, to see that it is found."""
    libraries = (
        [
            subprocess.run(['gcc', f'-print-file-name={name}'], capture_output=True, text=True).stdout.strip()
            for name in ('libasan.so', 'libstdc++.so.6')
        ]
        if shutil.which('gcc')
        else ['']
    )
    if not all(map(os.path.isabs, libraries)):
        pytest.skip('gcc without AddressSanitizer')
    env = dict(LD_PRELOAD=' '.join(libraries), ASAN_OPTIONS='detect_leaks=0', CC='gcc')
    flags = '-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined'
    start = f'import shlex, sys, native, pytest, torch; native.FLAGS += {flags.split()}\n'
    beyond = (
        'x = torch.zeros(9); native.draw(x.view(1, 9), x[:1].double(), x[:1]); '
        'native.call(native.library("DRAW").draw, x, 9, 9, 9, 9, *[x] * 5)'
    )
    done = subprocess.run(
        [sys.executable, '-c', start + beyond],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode and 'heap-buffer-overflow' in done.stderr, 'the sanitizer sees nothing'
    names = (
        'attention_of_documents or more_samples or every_head_size or refused or c_path or in_c '
        'or packed_documents'
    )
    words = f'-q -x -p no:cacheprovider -k "not other_compilers and ({names})"'
    files = 'tests/test_native.py tests/test_infer.py tests/test_kernels.py'
    run = f'sys.exit(pytest.main(shlex.split({words + " " + files!r})))'
    said, _ = child(start + run, timeout=3000, **env)
    assert said.count('.') >= 40 and 'F' not in said
