# nanoGPT's first example: a character model of Shakespeare, from scratch.
#     python data/shakespeare_char/prepare.py && python sft.py config/pretrain_shakespeare_char.py
# 64 crops x 256 characters = 16,384 tokens an iteration, 5,000 iterations = 82 M tokens = 82 epochs of 1.0 M; nanoGPT: 1.4697.
# On a CPU take nanoGPT's small one, 12 x 64 = 768 tokens an iteration, 2,000 iterations; nanoGPT: 1.88:
#     python sft.py config/pretrain_shakespeare_char.py --n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --max_iters=2000 --dropout=0.0 --eval_iters=20
out_dir = 'out-shakespeare-char'
dataset = 'data/shakespeare_char'
n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 64
dropout = 0.2
max_iters = 5000
learning_rate = 1e-3 # with baby networks one can afford to go a bit higher
min_lr = 1e-4
warmup_iters = 100
beta2 = 0.99 # a bit bigger because the number of tokens per iteration is small
eval_interval = 250
eval_iters = 200
micro_tokens = 16384
