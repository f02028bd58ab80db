# KTO of the ablations: 64 steps of 64 answers, those of the pairs that ablate_dpo.py learns from.
#     python kto.py experiments/ablate_kto.py
init_from = 'out-sft'
out_dir = 'out-exp/kto'
dataset = 'data/toy/blind/pref_train.jsonl'
val_dataset = 'data/toy/blind/pref_val.jsonl'
max_iters = 64
batch_size = 64
learning_rate = 1.5e-4
beta = 0.1
max_new_tokens = 48
eval_interval = 16
eval_samples = 32
eval_iters = 8
