# PPO of the toy world against its reward model, on a leash.
#     python ppo.py config/ppo_toy.py
init_from = 'out-sft'
reward = 'out-reward'
out_dir = 'out-ppo'
dataset = 'data/toy/prompts_train.jsonl'
val_dataset = 'data/toy/prompts_val.jsonl'
max_iters = 60
batch_size = 64
minibatch_size = 32
ppo_epochs = 2
max_new_tokens = 96
temperature = 1.0
beta = 0.05
learning_rate = 3e-4
eval_interval = 30
missing_eos_value = -2.0
max_num_seqs = 64
