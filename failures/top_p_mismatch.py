"""Answers are sampled with top_p = 0.7, log-probs are taken over the whole vocabulary: rare tokens never
come, the policy learns that they need not.

    python failures/top_p_mismatch.py experiments/ablate_ppo.py --out_dir=out-exp/top_p_mismatch
`mismatch` shows it, and the entropy falls faster than it should.
"""
from stage import run

run('ppo.py', 'rollout.py', 'replace(self.params, n=self.group_size, seed=own)',
    'replace(self.params, n=self.group_size, seed=own, top_p=0.7)')
