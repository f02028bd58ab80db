# Cold start of Qwen3-0.6B-Base on MATH's worked solutions: it learns to reason to a \boxed{} and to stop there, so that GRPO finds rewards. One GPU of 24 GB.
#     python data/math/prepare.py && python sft.py config/sft_qwen3_math.py
# 11,400 solutions of about 250 tokens = 2.9 M tokens an epoch; 32 rows = 8 k tokens a step, 356 steps = 1 epoch. More epochs copy the style and cost diversity.
# Memory: weights 2.4 GB float32, gradient 2.4, AdamW 4.8, activations of 8 k tokens with 28 layers about 8 GB.
init_from = 'Qwen/Qwen3-0.6B-Base'
out_dir = 'out-sft-math'
dataset = 'data/math/sft_train.jsonl'
val_dataset = 'data/math/sft_val.jsonl'
block_size = 2048
max_iters = 356
batch_size = 32
micro_tokens = 8192
learning_rate = 1e-5
min_lr = 1e-6
warmup_iters = 20
weight_decay = 0.0
eval_interval = 100
eval_iters = 20
