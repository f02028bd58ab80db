# The same on one GPU of 24 GB: LoRA, shorter answers, fewer of them at a time. The reference costs nothing, so its KL is logged.
#     python grpo.py config/grpo_qwen3_gsm8k_lora.py
# Memory: policy 2.4 GB float32, adapter r = 32 with gradient and AdamW 0.3, sampler 1.2, KV 64 x 800 tokens x 115 kB = 5.9 GB.
init_from = 'Qwen/Qwen3-0.6B'
out_dir = 'out-grpo-gsm8k-lora'
dataset = 'data/gsm8k/train.jsonl'
val_dataset = 'data/gsm8k/test.jsonl'
reward = 'data/gsm8k/reward.py'
lora_r = 32
lora_alpha = 64.0
lora_targets = 'q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj'
batch_size = 256
group_size = 8
minibatch_size = 256
micro_tokens = 4096
max_prompt = 256
long_prompts = 'drop'
max_new_tokens = 512
overlong = 'mask'
learning_rate = 2e-5
warmup_iters = 10
max_iters = 350
eval_interval = 50
eval_iters = 256
eval_k = 4
max_num_seqs = 64
