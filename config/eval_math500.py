# MATH-500, one greedy answer each: pass@1.
#     python evaluate.py config/eval_math500.py --init_from=out-sft-numina        # before PPO
#     python evaluate.py config/eval_math500.py                                   # after
init_from = 'out-ppo-deepmath'
eval_file = 'data/deepmath/test.jsonl'
reward = 'data/math/reward.py'
max_new_tokens = 1536
max_num_seqs = 128
