# Supervised finetuning on answers of average people: the model learns to answer and to stop, and is as often
# wrong as they are.
#     python sft.py config/sft_toy.py
# 20,000 rows of 28 tokens, half of them answers (only those are trained on); 16 rows a step, 3,200 steps are
# 2.6 epochs. What depends on the question is learned last, words at the very end: after 2,000 steps two of
# three seeds had less than 70 % of val right.
init_from = 'out-base'
out_dir = 'out-sft'
dataset = 'data/toy/sft_train.jsonl'
val_dataset = 'data/toy/sft_val.jsonl'
max_iters = 3200
batch_size = 16
learning_rate = 2e-3
min_lr = 2e-4
warmup_iters = 20
eval_interval = 800
