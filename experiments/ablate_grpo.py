# GRPO against the same reward model as experiments/ablate_ppo.py, for about the same time: 8 prompts x 8
# answers an iteration.
#     python grpo.py experiments/ablate_grpo.py
# 28 iterations x 64 = 1,792 completions, 2 optimizer steps each: no value network and no second pass, an
# iteration is cheaper than PPO's.
init_from = 'out-sft'
reward = 'out-reward'
out_dir = 'out-exp/grpo'
dataset = 'data/toy/prompts_train.jsonl'
val_dataset = 'data/toy/prompts_val.jsonl'
max_iters = 28
batch_size = 64
group_size = 8
minibatch_size = 32
max_new_tokens = 48
temperature = 1.0
beta = 0.1
learning_rate = 4e-4
warmup_iters = 3
eval_interval = 14
eval_iters = 48
eval_k = 1
