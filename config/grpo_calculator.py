# GRPO in an environment: sums of four digits, with a calculator behind each "=".
#     python data/toy/env_calculator.py && python sft.py config/sft_calculator.py
#     python grpo.py config/grpo_calculator.py
# 32 sums x 8 answers = 256 conversations an iteration, of up to 6 turns and 40 tokens.
init_from = 'out-asks'
out_dir = 'out-calculator'
dataset = 'data/toy/large_train.jsonl'
val_dataset = 'data/toy/large_val.jsonl'
env = 'data/toy/env_calculator.py'
reward = '' # the environment's own mark
max_turns = 6
loss_type = 'dr_grpo'
max_iters = 40
batch_size = 256
group_size = 8
minibatch_size = 128
max_new_tokens = 40
learning_rate = 1e-4 # at 4e-4 it forgets how to ask
warmup_iters = 3
eval_interval = 10
eval_iters = 240 # all of large_val.jsonl
eval_k = 1
track_kl = False # spares the frozen copy
max_num_seqs = 128
