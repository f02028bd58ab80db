# DPO on the same pairs, no reward model, no sampling.
#     python dpo.py config/dpo_toy.py
init_from = 'out-sft'
out_dir = 'out-dpo'
dataset = 'data/toy/pref_train.jsonl'
val_dataset = 'data/toy/pref_val.jsonl'
batch_size = 32
learning_rate = 1e-4
beta = 0.1
max_new_tokens = 96
