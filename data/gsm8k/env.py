"""GSM8K with a second try: an answer that is wrong is told so, and may be given once more.

    python grpo.py config/grpo_qwen3_gsm8k.py --env=data/gsm8k/env.py --reward= --max_turns=2
"""
import os
import runpy

check = runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'reward.py'))['reward']
SECOND = 0.5  # what the right answer at the second try pays; the first pays 1


class Env:
    """One problem; see rollout.load_env."""

    def start(self, row):
        self.row = row
        self.tries = 0
        return row['prompt']

    def step(self, completion):
        self.tries += 1
        if check(self.row['prompt'], completion, self.row) > 0:
            return None, 1.0 if self.tries == 1 else SECOND
        if self.tries == 2:
            return None, 0.0
        return 'That is not the answer. Check your steps, then give the number again.\n', None
