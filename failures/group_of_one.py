"""GRPO with one answer a prompt: an answer is compared with itself, every advantage is 0, nothing is
learned. grpo.py refuses it; here it does not.

    python failures/group_of_one.py experiments/ablate_grpo.py --group_size=1 --out_dir=out-exp/group_of_one
dead 100 %, loss 0 and gradient norm 0 from the first iteration on, the score a flat line. No error
anywhere.
"""
from stage import run

run('grpo.py', 'grpo.py', "if group_size == 1 and advantage != 'reinforce++' and not teacher:", 'if False:')
