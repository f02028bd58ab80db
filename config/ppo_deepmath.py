# The second step of nanoRLHF's pipeline: PPO from that SFT model on DeepMath, the boxed answer is right or
# wrong, samples one update old. It publishes 46.6 on MATH-500 after 150 steps. One GPU of 80 GB, better two.
#     hf download zwhe99/DeepMath-103K --repo-type=dataset --local-dir=deepmath
#     python data/math/prepare.py --src=deepmath --test=math500.jsonl --words=False --out_dir=data/deepmath
#     python ppo.py config/ppo_deepmath.py && python evaluate.py config/eval_math500.py
# Not run with these rows or this model here: see sft_numina.py.
# What differs: its loss holds 0.1 x KL, ours takes beta x KL from the reward of each token.
init_from = 'out-sft-numina'
out_dir = 'out-ppo-deepmath'
dataset = 'data/deepmath/train.jsonl'
val_dataset = 'data/deepmath/test.jsonl'
reward = 'data/math/reward.py'
value = 'policy' # no reward model to start it from
max_prompt = 512
long_prompts = 'drop'
max_new_tokens = 1536
temperature = 1.0
batch_size = 64
minibatch_size = 64
micro_tokens = 16384
ppo_epochs = 1
beta = 0.01
gamma = 1.0
lam = 1.0
clip = 0.2
missing_eos = 'none' # an answer that was cut off has no boxed number: 0
learning_rate = 5e-6
beta2 = 0.95
weight_decay = 1e-3
mode = 'async'
max_staleness = 1
max_iters = 200
eval_interval = 50
eval_iters = 500 # all of MATH-500
max_num_seqs = 128
checkpointing = True
