# KTO on the same answers as dpo_toy.py, each judged alone: good or bad.
#     python kto.py config/kto_toy.py
# A pair is two answers; 64 a step, one epoch.
init_from = 'out-sft'
out_dir = 'out-kto'
dataset = 'data/toy/pref_train.jsonl'
val_dataset = 'data/toy/pref_val.jsonl'
batch_size = 64
learning_rate = 1e-4
beta = 0.1
max_new_tokens = 48
