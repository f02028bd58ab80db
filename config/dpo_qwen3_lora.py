# DPO of Qwen3-0.6B with LoRA on HH: the reference is the model without its adapter, so no second copy is held.
#     python dpo.py config/dpo_qwen3_lora.py
# r = 16 on all linear layers: 10.1 M trained of 596 M, so gradients and AdamW take 0.12 GB in the place of 7.2 GB, a checkpoint 40 MB.
init_from = 'Qwen/Qwen3-0.6B'
out_dir = 'out-dpo-qwen3'
dataset = 'data/hh/pref_train.jsonl'
val_dataset = 'data/hh/pref_val.jsonl'
block_size = 1024
lora_r = 16
lora_alpha = 32.0
lora_targets = 'q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj'
batch_size = 64
micro_tokens = 8192
learning_rate = 1e-4 # ten to a hundred times that of all weights
warmup_iters = 50
max_iters = 1000
beta = 0.1
eval_interval = 200
eval_iters = 8
