"""Online DPO: three rounds of pairs that the policy itself answered, against one round of as many pairs.

    bash quickstart.sh                          # out-sft, out-reward
    python experiments/online.py                # --out=out-online --seeds=1337,2,3
    python experiments/online.py --init_from=out-sft-seed{} --reward=out-reward-seed{}   # of each seed

A round: the model answers 1,300 prompts of its own, 4 samples each at temperature 1; the reward model's best
and worst are a pair (evaluate.py --write); 1,200 pairs are 75 steps of dpo.py, whose reference is the model
that the round began with. One round: the SFT model answers all 3,900 prompts, 3,600 pairs are 225 steps. The
table holds the gold mark (0 to 10), which no model was trained on, of the test prompts, one sample each. A
command that has ended is kept.
"""
import json
import os
import sys

from runs import ROOT, gold_table, options, read_rows, run_once

ROUNDS, PROMPTS, PAIRS, STEPS = 3, 1300, 1200, 75


def write(path, rows):
    with open(path, 'w', encoding='utf-8') as f:
        f.writelines(json.dumps(row) + '\n' for row in rows)


def a_round(out, model, prompts, pairs, steps, reward, seed):
    """The model's own answers to the prompts -> pairs -> DPO from it; returns the new model's folder."""
    os.makedirs(out, exist_ok=True)
    asked, answered = os.path.join(out, 'prompts.jsonl'), os.path.join(out, 'pairs.jsonl')
    write(asked, prompts)
    run_once(os.path.join(out, 'answers'), 'evaluate.py', f'--init_from={model}', f'--eval_file={asked}',
             f'--reward={reward}', f'--write=,{answered}', '--num_samples=4', '--temperature=1',
             '--max_new_tokens=48', f'--seed={seed}')
    rows = read_rows(out, 'pairs.jsonl')
    if len(rows) < pairs:
        sys.exit(f'error: {answered} has {len(rows)} pairs, expected {pairs}: the marks are too often equal')
    write(os.path.join(out, 'some.jsonl'), rows[:pairs])
    run_once(os.path.join(out, 'model'), 'dpo.py', 'config/dpo_toy.py', f'--init_from={model}',
             f'--dataset={os.path.join(out, "some.jsonl")}', f'--max_iters={steps}', f'--seed={seed}')
    return os.path.join(out, 'model')


def train(out, seed, start, reward):
    """-> {name: model's folder} of a seed: the start, each round, and the one round of as many pairs"""
    prompts = read_rows(os.path.join(ROOT, 'data', 'toy'), 'prompts_train.jsonl')
    found = {'SFT': start}
    for i in range(ROUNDS):
        mine = prompts[i * PROMPTS:(i + 1) * PROMPTS]
        start = a_round(os.path.join(out, f'round{i + 1}-{seed}'), start, mine, PAIRS, STEPS, reward, seed)
        found[f'after round {i + 1}'] = start
    whole = ROUNDS * PAIRS, ROUNDS * STEPS
    found['one round of as many pairs'] = a_round(os.path.join(out, f'once-{seed}'), found['SFT'],
                                                  prompts[:ROUNDS * PROMPTS], *whole, reward, seed)
    return found


def main(words):
    given = options(words, out=os.path.join(ROOT, 'out-online'), seeds='1337,2,3', init_from='out-sft',
                    reward='out-reward', rows='data/toy/prompts_test.jsonl')
    out = os.path.abspath(given['out'])  # the commands run in the project's folder

    def models_of(seed):
        return train(out, seed, given['init_from'].format(seed), given['reward'].format(seed))
    gold_table(given['seeds'], models_of, out, given['rows'])


if __name__ == '__main__':
    main(sys.argv[1:])
