"""Sequences are padded on the left, the positions of the response are counted from the left as if they were padded on the right.

    python failures/wrong_padding_side.py experiments/ablate_ppo.py --out_dir=out-exp/wrong_padding_side
Log-probs of the wrong tokens train the right answers. First update: ratio 1, as it should be. `mismatch`, in nats a token, shows it at once.
"""
from stage import run

run('ppo.py', ('idx, mask = pad([p + r for p, r in zip(prompts, responses)])', "idx, mask = pad([p + r for p, r in zip(prompts, responses)], side='left')"))
