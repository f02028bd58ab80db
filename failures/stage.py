"""Runs a stage with one line of it made wrong: run('ppo.py', (right, wrong), ...). The file on disk stays as it is.

Each file of this folder is one classic mistake, one line away from the stage; its docstring says what one would have seen, as measured:
    python failures/wrong_kl_sign.py experiments/ablate_ppo.py --out_dir=out-exp/wrong_kl_sign
The options are the stage's own. `python experiments/study.py i` trains all of them beside their right twins.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def broken(script, *edits):
    """The source of a stage with each (right, wrong) pair applied; `right` must stand there exactly once, or the failure is out of date: ValueError."""
    with open(os.path.join(ROOT, script), encoding='utf-8') as f:
        source = f.read()
    for right, wrong in edits:
        if source.count(right) != 1:
            raise ValueError(f'{script} has {source.count(right)} places with {right!r}, expected 1: the stage has changed, bring the failure up to date')
        source = source.replace(right, wrong)
    return source


def run(script, *edits):
    """Runs it as `python script` would, with the options of this command line."""
    sys.path.insert(0, ROOT)
    path = os.path.join(ROOT, script)
    module = sys.modules['__main__']
    module.__dict__.update(__file__=path, __doc__=None)
    exec(compile(broken(script, *edits), path, 'exec'), module.__dict__)
