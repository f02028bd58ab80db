"""Runs a stage with one line made wrong: run('ppo.py', FILE, right, wrong), FILE being the stage or a room
that it uses.

Each file of this folder is one classic mistake; the files on disk stay as they are. The docstring says
what one would have seen, as measured:
    python failures/wrong_kl_sign.py experiments/ablate_ppo.py --out_dir=out-exp/wrong_kl_sign
The options are the stage's own. `python experiments/study.py i` trains all of them beside their right
twins.
"""
import os
import sys
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def broken(file, right, wrong):
    """The source of a file with `right` made `wrong`. ValueError where that does not stand there once."""
    with open(os.path.join(ROOT, file), encoding='utf-8') as f:
        source = f.read()
    if source.count(right) != 1:
        raise ValueError(f'{file} has {source.count(right)} places with {right!r}, expected 1: bring '
                         'the failure up to date')
    return source.replace(right, wrong)


def run(script, file, right, wrong):
    """Runs it as `python script` would, with the options of this command line."""
    sys.path.insert(0, ROOT)
    path = os.path.join(ROOT, script)
    if file != script:  # the stage then imports the wrong room
        room = types.ModuleType(file.removesuffix('.py'))
        room.__file__ = os.path.join(ROOT, file)
        sys.modules[room.__name__] = room
        exec(compile(broken(file, right, wrong), room.__file__, 'exec'), room.__dict__)
        with open(path, encoding='utf-8') as f:
            source = f.read()
    else:
        source = broken(script, right, wrong)
    module = sys.modules['__main__']
    module.__dict__.update(__file__=path, __doc__=None)
    exec(compile(source, path, 'exec'), module.__dict__)
