# Supervised finetuning on answers of average people: the base model learns to answer and to stop.
#     python sft.py config/sft_toy.py
# 10,000 rows = 0.51 M tokens (a bit more than half of them answers, only those are trained on); 24 rows = 1,215 tokens a step,
# 416 steps = 1 epoch. Measured: val loss 0.21, 56 s; gold mark 4.0 (base 0.5), sums right 30 % at temperature 1 and 58 % greedily.
init_from = 'out-base'
out_dir = 'out-sft'
dataset = 'data/toy/sft_train.jsonl'
val_dataset = 'data/toy/sft_val.jsonl'
max_iters = 416
batch_size = 24
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 20
eval_interval = 208
