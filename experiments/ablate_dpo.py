# DPO of the ablations: 64 steps of 32 pairs = 2,048 of the 13,000 pairs that experiments/ablate_reward.py
# learns from.
#     python dpo.py experiments/ablate_dpo.py --loss_type=ipo
init_from = 'out-sft'
out_dir = 'out-exp/dpo'
dataset = 'data/toy/blind/pref_train.jsonl'
val_dataset = 'data/toy/blind/pref_val.jsonl'
max_iters = 64
batch_size = 32
learning_rate = 1.5e-4
beta = 0.1
max_new_tokens = 48
eval_interval = 16
eval_samples = 32
eval_iters = 8
