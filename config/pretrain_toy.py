# A base model of the toy world: it has read the crawled text, and does what text does: it goes on.
#     python data/toy/prepare.py && python sft.py config/pretrain_toy.py
# 1.1 M parameters (4 layers, width 128, a byte is a token). 9,000 texts, 5 % of them kept aside = 1.0 M tokens;
# 10 texts = 1,160 tokens a step, 900 steps = 1.05 epochs. Measured: val loss 0.28, 110 s (one thread of a busy 2-core machine).
out_dir = 'out-base'
dataset = 'data/toy/text.jsonl'
tokenizer = 'byte'
arch = 'qwen3' # rotary positions: a question may stand anywhere in a text
n_layer = 4
n_head = 4
n_embd = 128
block_size = 256
max_iters = 900
batch_size = 10
learning_rate = 3e-3 # 6e-3 was worse on the rows of SFT
min_lr = 3e-4
warmup_iters = 30
eval_interval = 450
