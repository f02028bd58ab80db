# GRPO of Qwen3-0.6B on GSM8K: the answer's number is right or wrong, nothing else is told. One GPU of 80 GB.
#     python data/gsm8k/prepare.py --form=chat && python grpo.py config/grpo_qwen3_gsm8k.py
# 64 questions x 8 answers = 512 completions an iteration, 7,473 questions / 64 = 117 iterations an epoch; 350 iterations = 3 epochs.
# Memory: policy 2.4 GB float32, gradient 2.4, AdamW 4.8, the sampler's bfloat16 copy 1.2; KV cache 28 layers x 2 x 8 heads x 128
# x 2 bytes = 115 kB a token: 256 answers of 1,300 tokens = 38 GB; micro-batches of 8 k tokens: the rest.
# Published on this task: Qwen2.5-0.5B-Instruct from 49.6 % to 54.3 % (GRPO with LoRA) and 56.7 % (PPO), verl's tables.
init_from = 'Qwen/Qwen3-0.6B'
out_dir = 'out-grpo-gsm8k'
dataset = 'data/gsm8k/train.jsonl'
val_dataset = 'data/gsm8k/test.jsonl'
reward = 'data/gsm8k/reward.py'
batch_size = 512
group_size = 8
minibatch_size = 256 # two optimizer steps an iteration
micro_tokens = 8192
max_prompt = 256
long_prompts = 'drop'
max_new_tokens = 1024
overlong = 'mask' # an answer that was cut off says nothing about its reasoning
temperature = 1.0
loss_type = 'dapo'
clip_high = 0.28
tis_cap = 2.0 # the sampler computes in bfloat16, the trainer under autocast: they differ a little in every token
track_kl = False
learning_rate = 1e-6
warmup_iters = 10
max_iters = 350
eval_interval = 50
eval_iters = 1319 # the whole test set
eval_k = 4
max_num_seqs = 256
