# A cold start for config/grpo_calculator.py: demonstrations of how one asks the calculator, few on purpose.
#     python data/toy/env_calculator.py && python sft.py config/sft_calculator.py
# 140 iterations of 32 rows: the form is learned, the copying of four digits hardly (8 % right, one seed;
# after 90 iterations none, after 200 61 %).
init_from = 'out-sft'
out_dir = 'out-asks'
dataset = 'data/toy/large_sft.jsonl'
max_iters = 140
batch_size = 32
learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 5
eval_interval = 140
