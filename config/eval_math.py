# MATH-500 x 4 samples at temperature 0.7: pass@1, pass@4, maj@4.
#     python evaluate.py config/eval_math.py --init_from=out-sft-math             # before GRPO
#     python evaluate.py config/eval_math.py --init_from=out-grpo-math            # after
init_from = 'out-grpo-math'
eval_file = 'data/math/test.jsonl'
reward = 'data/math/reward.py'
num_samples = 4
ks = '1,2,4'
temperature = 0.7
max_new_tokens = 2048
max_num_seqs = 128
