# A cold start for config/grpo_calculator.py: how people answer large sums. One in sixteen asks the
# calculator, the others round; a model that imitates them is right as seldom.
#     python data/toy/env_calculator.py && python sft.py config/sft_calculator.py
# 300 iterations of 32 rows = 1.2 epochs of 8,000: fewer do not learn to copy four digits.
init_from = 'out-sft'
out_dir = 'out-asks'
dataset = 'data/toy/large_sft.jsonl'
max_iters = 300
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 5
eval_interval = 300
