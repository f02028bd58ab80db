"""A small student taught by the PPO model on its own answers, beside a twin that SFT goes on to train.

    bash quickstart.sh                                       # out-ppo, the teacher
    python experiments/students.py                           # --out=out-students --seeds=1337,2,3
    python experiments/students.py --teacher=out-ppo-seed{}  # another teacher for each seed

For each seed: a base model and an SFT model of 0.3 M parameters (the quickstart's have 1.2 M), then twice as
many optimizer steps from there on: SFT on people's answers, or grpo.py --teacher on answers of its own. The
table holds the gold mark (0 to 10) on the test prompts, one sample each at temperature 1. A run that has
ended is kept.
"""
import os
import sys

from runs import ROOT, gold_table, options, run_once

SMALL = ['--n_layer=2', '--n_head=2', '--n_embd=96']
STEPS = 400


def train(out, seed, teacher):
    """The three models of a seed -> {name: folder}"""
    found = {name: os.path.join(out, f'{name}-{seed}') for name in ('start', 'twin', 'student')}
    base = os.path.join(out, f'base-{seed}')
    more = [f'--seed={seed}', f'--max_iters={STEPS}', '--batch_size=64', f'--eval_interval={STEPS}']
    run_once(base, 'sft.py', 'config/pretrain_toy.py', f'--seed={seed}', *SMALL)
    run_once(found['start'], 'sft.py', 'config/sft_toy.py', f'--init_from={base}', *more)
    run_once(found['twin'], 'sft.py', 'config/sft_toy.py', f'--init_from={found["start"]}', *more)
    run_once(found['student'], 'grpo.py', 'config/grpo_toy.py', f'--init_from={found["start"]}', *more,
             f'--teacher={teacher}', '--dataset=data/toy/prompts_train.jsonl', '--beta=0', '--group_size=1',
             '--val_dataset=data/toy/prompts_val.jsonl', '--reward=data/toy/gold.py', '--minibatch_size=64',
             '--learning_rate=6e-4', '--advantage=reinforce++', '--max_num_seqs=64')
    return found


def main(words):
    given = options(words, out=os.path.join(ROOT, 'out-students'), seeds='1337,2,3', teacher='out-ppo',
                    rows='data/toy/prompts_test.jsonl')
    out = os.path.abspath(given['out'])  # the commands run in the project's folder

    def models_of(seed):
        teacher = given['teacher'].format(seed)
        return {'teacher': teacher, **train(out, seed, teacher)}
    gold_table(given['seeds'], models_of, out, given['rows'])


if __name__ == '__main__':
    main(sys.argv[1:])
