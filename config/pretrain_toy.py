# A base model of the toy world: it has read the crawled text, and does what text does: it goes on.
#     python data/toy/prepare.py && python sft.py config/pretrain_toy.py
# 0.8 M parameters (4 layers, width 128, a byte is a token). 7,000 texts = 0.95 M tokens; 10 texts = 1,350 tokens a step, 700 steps = 1 epoch.
# Many small steps, not few large ones: what is slow to learn here is to copy, and that takes steps (560 steps of 1,800 tokens and
# 1,000 of 900 end in the same place).
out_dir = 'out-base'
dataset = 'data/toy/text.jsonl'
tokenizer = 'byte'
arch = 'qwen3' # rotary positions and q/k norm: learns to copy twice as soon as learned positions do
n_layer = 4
n_head = 4
n_embd = 128
block_size = 256
max_iters = 900
batch_size = 10
learning_rate = 3e-3
min_lr = 3e-4
warmup_iters = 30
eval_interval = 450
