# PPO of GPT-2 small on HH prompts, the settings of lm-human-preferences.
#     python ppo.py config/ppo_gpt2.py
# 64 completions an iteration x 64 new tokens = 4 k response tokens; 1,600 iterations = 102 k episodes.
# Memory, float32: policy 0.5 GB and value 0.5 GB, each with as much gradient and twice that of AdamW = 4.0 GB; reference
# and reward model 1.0 GB; 32 x 256 tokens of keys and values 0.6 GB, activations of 512 tokens 0.3 GB. 5.9 GB in all.
init_from = 'out-sft-gpt2'
reward = 'out-reward-gpt2'
out_dir = 'out-ppo-gpt2'
dataset = 'data/hh/prompts_train.jsonl'
val_dataset = 'data/hh/prompts_val.jsonl'
long_prompts = 'cut' # the end of a long dialogue is what is answered
max_prompt = 192 # tokens of a prompt at most
max_iters = 1600
batch_size = 64
minibatch_size = 64 # one optimizer step an epoch, as lm-human-preferences
micro_tokens = 512
ppo_epochs = 4
max_new_tokens = 64
temperature = 0.7
beta = 0.15
target_kl = 6.0 # nats a sequence
kl_horizon = 10000
whiten_rewards = True
learning_rate = 1e-5
vf_coef = 0.1
eval_interval = 100
max_num_seqs = 32
