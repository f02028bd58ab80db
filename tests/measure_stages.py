"""What a reader of a stage has before them, measured; `python tests/measure_stages.py` prints the table.

Per script: thousands of Python tokens (no comments, docstrings, blanks), tokens a line of code, the longest
line, the lines of the run and how many of them carry a comment, names that functions inside the run read from
outside, and the named functions of ours that one iteration passes through (traced, outside infer and
kernels)."""
import ast
import builtins
import io
import os
import tokenize

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
BUDGET = dict(run=3.2, sft=1.9, reward=2.3, dpo=2.8, kto=1.7, ppo=3.3, grpo=3.6)  # thousand tokens wanted


def code(path):
    """(Python tokens, lines of code) of a file."""
    with open(path, encoding='utf-8') as f:
        text = f.read()
    kinds = (tokenize.NAME, tokenize.NUMBER, tokenize.STRING, tokenize.OP)
    found = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type in kinds]
    docs = [t for t in found if t.type == tokenize.STRING and t.line.strip().startswith(t.string[:3])]
    found = [t for t in found if t not in docs]
    return len(found), len({t.start[0] for t in found})


def run_of(path):
    """Lines of `if __name__ == '__main__'` that are not blank."""
    with open(path, encoding='utf-8') as f:
        lines = f.read().split('\n')
    starts = [i for i, line in enumerate(lines) if line.startswith("if __name__ == '__main__'")]
    return [line for line in lines[starts[0]:] if line.strip()] if starts else []


def closures(path):
    """{function defined inside the run: names that it reads from the run around it}."""
    with open(path, encoding='utf-8') as f:
        tree = ast.parse(f.read())
    top = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    top |= set(dir(builtins))
    imports = [n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))]
    top |= {a.asname or a.name for n in imports for a in n.names}
    top |= {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets
            if isinstance(t, ast.Name) and t.id.isupper()}
    found = {}
    for run in (n for n in tree.body if isinstance(n, ast.If)):
        for node in (n for n in ast.walk(run) if isinstance(n, ast.FunctionDef)):
            names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
            own = {n.id for n in names if isinstance(n.ctx, ast.Store)}
            own |= {a.arg for a in ast.walk(node) if isinstance(a, ast.arg)}
            found[node.name] = {n.id for n in names} - own - top
    return found


def measure(stage):
    path = os.path.join(ROOT, f'{stage}.py')
    tokens, lines = code(path)
    run = run_of(path)
    with open(path, encoding='utf-8') as f:
        widest = max(len(line) for line in f.read().split('\n'))
    return dict(tokens=tokens / 1000, density=tokens / lines, widest=widest, run=len(run),
                said=sum('#' in line for line in run) / max(1, len(run)), closures=closures(path))


def passes(seen, skip=('infer.py', 'kernels.py', 'native.py')):
    """A profile function: puts (file, function) of ours that are called into the set `seen`; lambdas,
    comprehensions and the files of `skip` left out."""
    def look(frame, event, arg):
        file, name = os.path.split(frame.f_code.co_filename), frame.f_code.co_name
        if event == 'call' and file[0] == ROOT and file[1] not in skip and not name.startswith('<'):
            seen.add((file[1], name))
    return look


if __name__ == '__main__':
    print('          tokens    of  a line  widest   run  said  names that closures read')
    for stage, budget in BUDGET.items():
        m = measure(stage)
        inner = ', '.join(f'{name} {len(names)}' for name, names in m['closures'].items())
        size = f'{m["tokens"]:8.2f}{budget:6.1f}{m["density"]:8.1f}{m["widest"]:8}'
        print(f'{stage:8}{size}{m["run"]:6}{m["said"]:6.0%}  {inner}')
