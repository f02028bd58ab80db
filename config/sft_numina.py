# The first step of nanoRLHF's pipeline (hyunwoongko/nanoRLHF): Qwen3-0.6B-Base on the worked solutions of
# NuminaMath-CoT-Small-Hard. It publishes 43.4 on MATH-500 after 2,000 steps. One GPU of 80 GB, or torchrun.
#     hf download NotASI/NuminaMath-CoT-Small-Hard-200k --repo-type=dataset --local-dir=numina
#     python data/math/prepare.py --src=numina --test=math500.jsonl --val=0.005 --out_dir=data/numina
#     python sft.py config/sft_numina.py
#     python evaluate.py config/eval_math500.py --init_from=out-sft-numina
# Not run with these rows or this model here: no GPU was at hand. The three commands (SFT, asynchronous PPO,
# evaluation) ran on a CPU with a model of 0.66 M parameters, 5,000 rows of MATH and 21,801 of another set.
# 128 solutions of about 400 tokens = 50 k tokens a step; 180,000 rows / 128 = 1,400 steps an epoch.
init_from = 'Qwen/Qwen3-0.6B-Base'
out_dir = 'out-sft-numina'
dataset = 'data/numina/sft_train.jsonl'
val_dataset = 'data/numina/sft_val.jsonl'
block_size = 2048
max_iters = 2109
batch_size = 128
micro_tokens = 16384
learning_rate = 5e-6
min_lr = 0.0
warmup_iters = 211
beta2 = 0.95
weight_decay = 1e-3
eval_interval = 200
eval_iters = 20
checkpointing = True
