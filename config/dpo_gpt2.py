# DPO of GPT-2 small on HH (helpful and harmless base), from the SFT model of config/sft_gpt2.py.
#     python dpo.py config/dpo_gpt2.py
# 64 pairs an iteration, 160 k pairs = 2,500 iterations = 1 epoch. A pair is a prompt of 150 tokens and two answers of 60: the prompt
# is computed once, so 270 tokens in the place of 420, 17 k an iteration.
# Memory, float32: policy 0.5 GB with as much gradient and twice that of AdamW = 2.0 GB; the reference 0.5 GB (precompute_ref: none).
init_from = 'out-sft-gpt2'
out_dir = 'out-dpo-gpt2'
dataset = 'data/hh/pref_train.jsonl'
val_dataset = 'data/hh/pref_val.jsonl'
block_size = 512
batch_size = 64
micro_tokens = 4096 # fits 8 GB; the result is the same
learning_rate = 5e-6 # [Eric Mitchell's DPO: 5e-7 for 2.8 B; small models want more]
warmup_iters = 150
beta = 0.1
eval_interval = 250
eval_iters = 16 # 1,024 held-out pairs
max_new_tokens = 64
temperature = 0.7
