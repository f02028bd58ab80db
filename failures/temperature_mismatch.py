"""Answers are sampled at temperature 0.5, log-probs are taken at the configured one: the policy that is
updated is not the one that answered.

    python failures/temperature_mismatch.py experiments/ablate_ppo.py --out_dir=out-exp/temperature_mismatch
The ratio of the first update is still exactly 1 (both sides are wrong in the same way); only the
comparison with the sampler, `mismatch`, shows it.
"""
from stage import run

run('ppo.py', 'rollout.py', 'replace(self.params, n=self.group_size, seed=own)',
    'replace(self.params, n=self.group_size, seed=own, temperature=0.5)')
