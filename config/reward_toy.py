# The reward model of the toy world: 6,000 pairs labelled by data/toy/gold.py, 5 % flipped, 8 % by length alone.
#     python reward.py config/reward_toy.py
# 5,638 pairs without the ties; 32 pairs a step, 177 steps = 1 epoch. Measured: held-out accuracy 82.7 % (78.4 to 86.3), 70 s.
# The labels agree with gold in about 91 of 100: more than that would be learning the noise.
init_from = 'out-sft'
out_dir = 'out-reward'
dataset = 'data/toy/pref_train.jsonl'
val_dataset = 'data/toy/pref_val.jsonl'
batch_size = 32
learning_rate = 5e-4 # all weights of a small model; a large one wants 5e-5 and less
warmup_iters = 10
max_new_tokens = 96
