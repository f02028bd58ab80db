# Supervised finetuning on answers of average people: the model learns to answer and to stop, and is as often
# wrong as they are.
#     python sft.py config/sft_toy.py
# 20,000 rows of 28 tokens, half of them answers (only those are trained on); 16 rows a step, 2,000 steps are
# 1.6 epochs. What depends on the question is learned last: half of the steps would not do.
init_from = 'out-base'
out_dir = 'out-sft'
dataset = 'data/toy/sft_train.jsonl'
val_dataset = 'data/toy/sft_val.jsonl'
max_iters = 2000
batch_size = 16
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 20
eval_interval = 500
