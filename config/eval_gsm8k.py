# GSM8K's test set: 1,319 questions x 8 samples at temperature 0.7; pass@1, pass@8 and the majority of 8, read by the reward file of the training.
#     python evaluate.py config/eval_gsm8k.py --init_from=Qwen/Qwen3-0.6B         # before
#     python evaluate.py config/eval_gsm8k.py --init_from=out-grpo-gsm8k          # after
init_from = 'out-grpo-gsm8k'
eval_file = 'data/gsm8k/test.jsonl'
reward = 'data/gsm8k/reward.py'
num_samples = 8
ks = '1,4,8'
temperature = 0.7
max_new_tokens = 1024
stop = 'Question:' # a base model goes on with a question of its own
max_num_seqs = 256
