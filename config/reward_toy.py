# The reward model of the toy world: 6,000 pairs labelled by data/toy/gold.py, 5 % flipped, 8 % by length alone.
#     python reward.py config/reward_toy.py
# 32 pairs = 64 answers = 4,200 tokens a step; 1 epoch = 0.78 M tokens. Its ceiling is near 91 %: more than that would be learning the noise.
init_from = 'out-sft'
out_dir = 'out-reward'
dataset = 'data/toy/pref_train.jsonl'
val_dataset = 'data/toy/pref_val.jsonl'
batch_size = 32
learning_rate = 5e-4 # all weights of a small model; a large one wants 5e-5 and less
warmup_iters = 10
max_new_tokens = 96
