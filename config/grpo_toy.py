# GRPO on toy arithmetic: only the sum is checked, and the model finds out that one keeps the carry and shows the steps.
#     python grpo.py config/grpo_toy.py
# 32 sums x 8 answers = 256 completions = 6,000 new tokens an iteration.
init_from = 'out-sft'
out_dir = 'out-grpo'
dataset = 'data/toy/arith_train.jsonl'
val_dataset = 'data/toy/arith_val.jsonl'
reward = 'data/toy/reward.py'
max_iters = 50
batch_size = 256
group_size = 8
minibatch_size = 128
max_new_tokens = 64
learning_rate = 3e-4
warmup_iters = 3
eval_interval = 25
eval_iters = 250
eval_k = 1
track_kl = False
max_num_seqs = 128
