# GRPO on toy arithmetic: only the sum is checked, and the model finds out that one keeps the carry and shows
# the steps.
#     python grpo.py config/grpo_toy.py
# 32 sums x 8 answers = 256 completions of about 20 tokens an iteration, two optimizer steps.
# Only sums are paid. Without a leash (beta 0) one seed of three forgot facts and words on the way (2 nats
# from the SFT model); with this one it keeps them.
init_from = 'out-sft'
out_dir = 'out-grpo'
dataset = 'data/toy/arith_train.jsonl'
val_dataset = 'data/toy/arith_val.jsonl'
reward = 'data/toy/reward.py'
beta = 0.05
loss_type = 'dr_grpo' # 'grpo' divides each answer's loss by its length: a long wrong one is punished less
max_iters = 60
batch_size = 256
group_size = 8
minibatch_size = 128
max_new_tokens = 48
learning_rate = 4e-4
warmup_iters = 3
eval_interval = 30
eval_iters = 240 # all of arith_val.jsonl
eval_k = 1
max_num_seqs = 128
