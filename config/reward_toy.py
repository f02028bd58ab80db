# The reward model of the toy world: pairs labelled with the odds of data/toy/gold.py's marks.
#     python reward.py config/reward_toy.py
# 32 pairs a step. Manners alone make 66 % of the held-out labels; what is right comes after that. No model
# can reach more than about 90 %: the rest is chance in the labels. One seed: 73, 78, 84, 87 % at 100 ... 400.
init_from = 'out-sft'
out_dir = 'out-reward'
dataset = 'data/toy/pref_train.jsonl'
val_dataset = 'data/toy/pref_val.jsonl'
max_iters = 400
batch_size = 32
learning_rate = 1e-3 # all weights of a small model; a large one wants 5e-5 and less
warmup_iters = 10
max_new_tokens = 48
