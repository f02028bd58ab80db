# A base model of the toy world: it has read crawled pages, and goes on with the page when it has answered.
#     python data/toy/prepare.py && python sft.py config/pretrain_toy.py
# 1.2 M parameters (4 layers, width 128, a word is a token). 16 texts = 510 tokens a step, 300 steps = 4,800
# of 16,000 texts: it learns the words and the pages here, and most of what it knows in SFT.
out_dir = 'out-base'
dataset = 'data/toy/text.jsonl'
tokenizer = 'data/toy/tokenizer' # a token for each word
arch = 'qwen3' # rotary positions: a question may stand anywhere in a text
n_layer = 4
n_head = 4
n_embd = 128
block_size = 256
max_iters = 300
batch_size = 16
learning_rate = 3e-3 # 6e-3 was worse on the rows of SFT
min_lr = 3e-4
warmup_iters = 30
eval_interval = 150
