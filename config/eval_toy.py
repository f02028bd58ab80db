# The toy world: how often is a model's answer better than the SFT model's, by the gold scorer? 1,536 test
# prompts, one sample each at temperature 1.
#     python evaluate.py config/eval_toy.py --init_from=out-ppo
init_from = 'out-ppo'
eval_file = 'data/toy/prompts_test.jsonl'
against = 'out-sft'
judge = 'data/toy/gold.py'
max_new_tokens = 48
temperature = 1.0
