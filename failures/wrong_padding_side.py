"""The positions of the response are counted from the wrong side: read at the beginning of the prompt, as if
that were padding.

    python failures/wrong_padding_side.py experiments/ablate_ppo.py --out_dir=out-exp/wrong_padding_side
Log-probs at the wrong places train the right answers. First update: ratio 1, as it should be. `mismatch`,
in nats a token, shows it at once.
"""
from stage import run

run('ppo.py', 'model.py', 'path[start:] for path', 'path[:len(path) - start] for path')
