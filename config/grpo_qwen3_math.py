# GRPO of the cold-started Qwen3-0.6B on MATH: the boxed answer is right or wrong (data/math/reward.py), nothing else is told. One GPU of 80 GB.
#     python sft.py config/sft_qwen3_math.py && python grpo.py config/grpo_qwen3_math.py
# 64 problems x 8 answers = 512 completions an iteration, two optimizer steps; 12,000 problems / 64 = 188 iterations an epoch.
# Memory: policy 2.4 GB float32, gradient 2.4, AdamW 4.8, the sampler's bfloat16 copy 1.2; KV cache 28 layers x 2 x 8 heads x 128
# x 2 bytes = 115 kB a token: 192 answers of 2,300 tokens = 51 GB; lower max_num_seqs on a smaller card, the result is the same.
init_from = 'out-sft-math'
out_dir = 'out-grpo-math'
dataset = 'data/math/train.jsonl'
val_dataset = 'data/math/test.jsonl'
reward = 'data/math/reward.py'
batch_size = 512
group_size = 8
minibatch_size = 256
micro_tokens = 8192
max_prompt = 512
long_prompts = 'drop'
max_new_tokens = 1792
overlong = 'mask' # an answer that was cut off says nothing about its reasoning
temperature = 1.0
loss_type = 'dapo'
clip_high = 0.28
dynamic_sampling = 1 # hard and easy problems give dead groups: one more round of prompts in their place
tis_cap = 2.0 # the sampler computes in bfloat16, the trainer under autocast: they differ a little in every token
track_kl = False
learning_rate = 1e-6
warmup_iters = 10
max_iters = 188
eval_interval = 47
eval_iters = 500 # all of MATH-500
eval_k = 1
max_num_seqs = 192
