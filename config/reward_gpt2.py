# GPT-2 small as a reward model of HH (helpful and harmless base, 86 k pairs).
#     python reward.py config/reward_gpt2.py
# 64 pairs x 2 answers x 210 tokens = 27 k tokens an iteration, 1,350 iterations = 1 epoch. Published, GPT-2 large: 72.6 %
# helpful, 73.7 % harmless.
init_from = 'out-sft-gpt2'
out_dir = 'out-reward-gpt2'
dataset = 'data/hh/pref_train.jsonl'
val_dataset = 'data/hh/pref_val.jsonl'
block_size = 512
batch_size = 64
micro_tokens = 4096 # fits 8 GB; the result is the same
learning_rate = 5e-5
normalize_n = 1024
max_new_tokens = 64
temperature = 0.7
eval_interval = 250
