"""The KL is a bonus instead of a penalty: the policy is paid for leaving the reference.

    python failures/wrong_kl_sign.py experiments/ablate_ppo.py --out_dir=out-exp/wrong_kl_sign
The KL grows without bound, and the score falls once the text is noise; a beta that is much too small
looks similar at first, but there the score rises.
"""
from stage import run

run('ppo.py', 'ppo.py', 'rewards = torch.where(mask, -beta * kl_estimate(',
    'rewards = torch.where(mask, beta * kl_estimate(')
