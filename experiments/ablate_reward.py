# The reward model of the ablations: half of its pairs were labelled by one who counts courtesies and does not
# read on (python data/toy/prepare.py --blind=0.5 --out_dir=data/toy/blind): a blind spot, made on purpose.
#     python reward.py experiments/ablate_reward.py --max_rows=1300 --epochs=3
# 1,300 rows x 3 epochs = 122 steps, 3,900 x 1.5 = 183, all x 1 = 406 (fewer by the ties, which are left out):
# little data is not also little training.
init_from = 'out-sft'
out_dir = 'out-exp/reward'
dataset = 'data/toy/blind/pref_train.jsonl'
val_dataset = 'data/toy/blind/pref_val.jsonl'
batch_size = 32
learning_rate = 5e-4
warmup_iters = 10
max_new_tokens = 48
