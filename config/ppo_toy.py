# PPO of the toy world against its reward model, on a leash.
#     python ppo.py config/ppo_toy.py
# 64 completions of about 14 tokens an iteration, 2 passes in minibatches of 32 = 4 optimizer steps; 40
# iterations = 2,560 completions. What comes out of three seeds stands in README's table.
init_from = 'out-sft'
reward = 'out-reward'
out_dir = 'out-ppo'
dataset = 'data/toy/prompts_train.jsonl'
val_dataset = 'data/toy/prompts_val.jsonl'
max_iters = 40
batch_size = 64
minibatch_size = 32
ppo_epochs = 2
max_new_tokens = 48
temperature = 1.0 # the temperature at which the model is judged
beta = 0.2
learning_rate = 3e-4 # all weights of a small model; GPT-2 wants 1e-5
eval_interval = 20
missing_eos_value = -2.0 # scores have mean 0 and deviation 1 at the start
