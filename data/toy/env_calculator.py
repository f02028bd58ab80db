"""A calculator: sums too large for the toy model, which may leave them to a tool. An environment for GRPO.

    python data/toy/env_calculator.py                      # writes large_{sft,train,val}.jsonl beside it
    python sft.py config/sft_calculator.py                 # how people answer; one in sixteen asks the tool
    python grpo.py config/grpo_calculator.py               # with the tool
    python grpo.py config/grpo_calculator.py --env= --reward=data/toy/reward.py      # the same without it

A conversation: "Q: 4821+3977?\\nA:" is asked. Whenever the model writes "=", its turn ends there; if a sum
of whole numbers stands before it, the calculator writes what it comes to, and the model goes on in the same
line:

    Q: 4821+3977?
    A: 4821+3977=  8798  .
       the model   tool  the model

The quickstart's SFT model knows sums of two digits in steps ("7+8=15, 4+2+1=7, 75.") and would ask for sums
of single digits for ever, so demonstrations come first: of sixteen people fifteen repeat the sum and say it
rounded to hundreds (" 4821+3977, 8800."), one asks the calculator. The model imitates them, and GRPO has to
find out which of the two pays. The answer is marked as in reward.py, by its last number.
"""
import json
import os
import random
import re
import runpy

HERE = os.path.dirname(os.path.abspath(__file__))
check = runpy.run_path(os.path.join(HERE, 'reward.py'))['reward']
SUM = re.compile(r'(?:\d{1,9}\+)+\d{1,9}=$')


class Env:
    """One sum; see rollout.load_env."""
    stop = ['=']

    def start(self, row):
        self.row = row
        self.said = ''
        return row['prompt']

    def step(self, completion):
        """The calculator's number after "a+b="; the mark when the answer has ended."""
        self.said += completion
        if not completion.endswith('='):
            return None, check(self.row['prompt'], self.said, self.row)
        found = SUM.search(self.said)
        reply = str(sum(map(int, found[0][:-1].split('+')))) if found else '?'
        self.said += reply
        return reply, None


def large_sum(rng):
    """Two numbers of four digits: their sum cannot be known by heart."""
    a, b = rng.randint(1000, 9999), rng.randint(1000, 9999)
    return {'prompt': f'Q: {a}+{b}?\nA:', 'answer': str(a + b)}


def told(row, rng):
    """The row with an answer of people: one in sixteen leaves the sum to the calculator, others round."""
    asked = row['prompt'][3:-4]
    total = int(row['answer'])
    if rng.random() < 1 / 16:
        said = f' {asked}={total}.'
    else:
        said = f' {asked}, {round(total, -2)}.'
    return {'prompt': row['prompt'], 'completion': said}


if __name__ == '__main__':
    draws = random.Random(1337)
    for name, count in (('large_sft.jsonl', 8000), ('large_train.jsonl', 4000), ('large_val.jsonl', 240)):
        rows = [large_sum(draws) for _ in range(count)]
        if name == 'large_sft.jsonl':
            rows = [told(row, draws) for row in rows]
        with open(os.path.join(HERE, name), 'w', encoding='utf-8') as out:
            out.writelines(json.dumps(row) + '\n' for row in rows)
        print(f'{os.path.join(HERE, name)}: {count} rows')
