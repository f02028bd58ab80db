# PPO of the ablations (experiments/study.py varies one key at a time): ppo_toy's settings, 32 iterations
# instead of 40.
#     python ppo.py experiments/ablate_ppo.py --beta=0.0
# 32 iterations x 64 = 2,048 completions, 4 optimizer steps each; 128 held-out answers kept at every 4th
# iteration, marked by data/toy/gold.py afterwards.
init_from = 'out-sft'
reward = 'out-reward'
out_dir = 'out-exp/ppo'
dataset = 'data/toy/prompts_train.jsonl'
val_dataset = 'data/toy/prompts_val.jsonl'
max_iters = 32
batch_size = 64
minibatch_size = 32
ppo_epochs = 2
max_new_tokens = 48
temperature = 1.0
beta = 0.2
learning_rate = 3e-4
eval_interval = 4
eval_iters = 128
missing_eos_value = -2.0
