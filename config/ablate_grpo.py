# GRPO against the same reward model as config/ablate_ppo.py, for about the same time: 8 prompts x 8 answers an iteration.
#     python grpo.py config/ablate_grpo.py
# No value network and no second pass: an iteration is cheaper than PPO's, so 14 of them take about its time.
init_from = 'out-sft'
reward = 'out-reward'
out_dir = 'out-exp/grpo'
dataset = 'data/toy/prompts_train.jsonl'
val_dataset = 'data/toy/prompts_val.jsonl'
max_iters = 14
batch_size = 64
group_size = 8
minibatch_size = 8
max_new_tokens = 96
temperature = 1.0
beta = 0.1
learning_rate = 5e-4
eval_interval = 7
eval_iters = 48
eval_k = 1
