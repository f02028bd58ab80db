"""native.c and native.py: what compiles them, what runs without them, and the attention of documents against float64."""
import os
import platform
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import kernels as K

native = pytest.importorskip('native', reason='native.py was deleted: the twins run')
ROOT = os.path.dirname(os.path.abspath(K.__file__))
PARTS = ['-DDOCS', '-DHS=32'], ['-DDOCS', '-DHS=80'], ['-DFORWARD', '-DNKV=2', '-DG=2', '-DD=32'], ['-DFORWARD', '-DNKV=3', '-DG=1', '-DD=20'], ['-DDRAW']
compiled = pytest.mark.skipif(not any(map(shutil.which, ('cc', 'gcc', 'clang'))), reason='no C compiler here')


@pytest.fixture
def forget():
    """Nothing is compiled yet, nothing said; afterwards again as before."""
    caches = native._compiler, native.library, native.docs, native._say
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def child(code, **env):
    """(stdout, stderr) of Python code that runs in the project's root."""
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, env={**os.environ, 'OMP_NUM_THREADS': '1', **env}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


# Draws, trains and generates; prints the tokens and whether C ran.
EVERYTHING = """
import sys
import torch
sys.path.insert(0, 'tests')
import kernels as K
from infer import Engine, SamplingParams
from test_infer import tiny
model = tiny('qwen3', torch.float32, vocab=211, n_embd=64, head_size=16)
model(torch.arange(12)[None], targets=torch.arange(12)[None], doc=torch.tensor([[0] * 5 + [1] * 7]))[1].backward()
engine = Engine(model, None)
out = engine.generate([[1, 2, 3], [4] * 40, [5]], SamplingParams(max_tokens=20, temperature=0, ignore_eos=True))
K.draw(torch.randn(3, 99), torch.rand(3, dtype=torch.float64), torch.ones(3))
print(engine.native, [c.token_ids for c in out], engine.mismatch(out)['max'] <= 1e-5)
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
    assert said == 'native.c does not compile (cc: error: licence expired), decoding is about 4 times faster with it\n'
    assert broken == without and without.split(' ', 1)[1] == with_c.split(' ', 1)[1], 'the same tokens'


@compiled
@pytest.mark.parametrize('compiler', ['gcc', 'clang'])
def test_no_warning(tmp_path, compiler):
    """-Wall -Wextra, with OpenMP, with its vectors only, and without; for x86-64: 4, 8 or 16 floats a register, and no operation is wider than the machine's
    (gcc would carry it out in memory, ten times slower)."""
    if not shutil.which(compiler):
        pytest.skip(f'no {compiler} here')
    strict = ['-Wall', '-Wextra', '-Werror', *['-Werror=vector-operation-performance'] * (compiler == 'gcc'), native.SOURCE, '-o', str(tmp_path / 'x.so'), '-lm']
    levels = [f'-march=x86-64{level}' for level in ('', '-v2', '-v3', '-v4')] if platform.machine() == 'x86_64' else ['-march=native']
    for openmp in ('-fopenmp', '-fopenmp-simd', '-Wno-unknown-pragmas'):
        for part in PARTS:
            for level in levels:
                done = subprocess.run([compiler, *native.FLAGS, *part, level, openmp, *strict], capture_output=True, text=True)
                if 'omp.h' in done.stderr:
                    pytest.skip('clang without the headers of OpenMP')
                assert done.returncode == 0, (openmp, part, level, done.stderr)


def check_engine():
    from infer import Engine, SamplingParams
    from test_infer import tiny
    for arch in ('gpt2', 'qwen3'):
        engine = Engine(tiny(arch, torch.float32, vocab=211, n_embd=64, head_size=16), None)
        out = engine.generate([[1, 2, 3], [4] * 40, [5]], SamplingParams(max_tokens=20, seed=1, ignore_eos=True))
        assert engine.native and engine.mismatch(out)['max'] <= 1e-5


@compiled
@pytest.mark.parametrize('level, needs', [('x86-64-v2', 'ssse3'), ('x86-64-v3', 'avx2'), ('x86-64-v4', 'avx512f')])
def test_any_machine(monkeypatch, forget, level, needs):
    if platform.machine() != 'x86_64' or needs not in open('/proc/cpuinfo').read().split():
        pytest.skip(f'this machine does not run {level}')
    monkeypatch.setattr(native, 'MACHINE', [f'-march={level}'])
    assert f'-march={level}' in native._compiler()
    test_attention_of_documents(2, 2, 32)
    check_engine()


@compiled
@pytest.mark.parametrize('refused, want', [(['-fopenmp'], ['-march=native', '-fopenmp-simd']), (['-fopenmp', '-march=native'], ['-mcpu=native', '-fopenmp-simd']),
                                           (['-fopenmp', '-fopenmp-simd', '-march=native', '-mcpu=native'], [])])
def test_other_compilers(monkeypatch, forget, tmp_path, refused, want):
    """What a Mac's clang takes, old and new, and a compiler that takes no such flag: the code runs there, on one thread."""
    words = '|'.join(refused)
    (tmp_path / 'cc').write_text(f'#!/bin/sh\nfor word in "$@"; do case "$word" in {words}) echo "clang: error: unsupported option" >&2; exit 1;; esac; done\n'
                                 f'exec {shutil.which("cc")} "$@"\n')
    (tmp_path / 'cc').chmod(0o755)
    monkeypatch.setenv('CC', str(tmp_path / 'cc'))
    assert native._compiler() == [str(tmp_path / 'cc'), *want]
    test_attention_of_documents(2, 2, 32)
    check_engine()


@pytest.mark.skipif(not shutil.which('clang'), reason='no clang here')
def test_clang(monkeypatch, forget):
    """The same numbers from clang, which starts no threads beside torch's."""
    monkeypatch.setenv('CC', 'clang')
    assert native._compiler()[1:] == ['-march=native', '-fopenmp-simd']
    for sizes in ((4, 1, 32), (1, 3, 64)):
        test_attention_of_documents(*sizes)
    check_engine()


@compiled
@pytest.mark.parametrize('nkv, group, hs', [(4, 1, 32), (2, 2, 16), (1, 3, 64), (2, 1, 128)])
def test_attention_of_documents(nkv, group, hs):
    """Documents of 1 to 70 tokens, three of them with a prompt in common: values, gradients and whose bits do not move, against float64."""
    assert K.docs_in_c(torch.empty(1, hs)), 'the C source does not compile'
    torch.manual_seed(hs)
    paths = [range(0, 1), range(1, 8), range(8, 78), range(78, 111), [*range(78, 100), *range(111, 119)], [*range(78, 100), 119], range(120, 152)]
    rows, cu = torch.tensor([i for p in paths for i in p]), F.pad(torch.tensor([len(p) for p in paths]).cumsum(0), (1, 0))
    args = rows, cu, torch.tensor([0, 0, 0, 0, 22, 22, 0]), torch.tensor([0, 1, 2, 3, 6, 7]), 70
    N, nh = 154, nkv * group  # the last two rows are in no document
    x = torch.randn(N, nh + 2 * nkv, hs)
    q, k, v = (t.requires_grad_() for t in x.split([nh, nkv, nkv], 1))  # not contiguous, as they come from one matrix product
    g = torch.randn(N, nh, hs)

    def reference(q, k, v):
        out = torch.zeros(N, nh, hs, dtype=q.dtype)
        for p, first in zip(paths, args[2].tolist()):
            at = torch.tensor([*p])
            y = F.scaled_dot_product_attention(*(t[at].transpose(0, 1)[None] for t in (q, k, v)), is_causal=True, enable_gqa=True)[0].transpose(0, 1)
            out = out.index_copy(0, at[first:], y[first:])
        return out
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    plain = [t.detach().clone().requires_grad_() for t in (q, k, v)]
    sides = [(f(*t), t) for f, t in ((lambda *t: K.doc_attention(*t, *args), (q, k, v)), (reference, plain), (reference, wide))]
    ours, torchs, exact = ([out, *torch.autograd.grad(out, t, g.to(out.dtype))] for out, t in sides)
    for a, b, c in zip(ours, torchs, exact):
        assert (a - c).abs().max() <= 3 * (b - c).abs().max() + 1e-6
    assert not ours[0][152:].any() and all(not t[152:].any() for t in ours[1:])
    alone = K.doc_attention(*(t.detach()[8:78] for t in (q, k, v)), torch.arange(70), torch.tensor([0, 70]), torch.tensor([0]), torch.tensor([0, 1]), 70)
    assert torch.equal(alone, ours[0][8:78])
