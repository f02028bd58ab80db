# GPT-2 small on the preferred answers of HH: the start of reward model and PPO.
#     python data/hh/prepare.py && python sft.py config/sft_gpt2.py
# 161 k dialogues of about 210 tokens = 34 M tokens; 128 rows = 27 k tokens an iteration, 1,250 iterations = 1 epoch.
init_from = 'gpt2'
tokenizer = 'gpt2'
out_dir = 'out-sft-gpt2'
dataset = 'data/hh/sft_train.jsonl'
val_dataset = 'data/hh/sft_val.jsonl'
block_size = 512
max_iters = 1250
batch_size = 128
micro_tokens = 4096 # 12 layers x 16 x 768 numbers a token: 2.5 GB in float32, so that 8 GB are enough; the result is the same
learning_rate = 2e-5
min_lr = 2e-6
warmup_iters = 100
weight_decay = 0.0
eval_interval = 250
eval_iters = 10
