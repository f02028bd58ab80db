#!/usr/bin/env bash
# The whole of RLHF on a laptop: base model, SFT, reward model, PPO, DPO, a LoRA variant, GRPO; then how often each is
# right on questions that it has not seen, their answers to three of them, a curve, a report.
#     bash quickstart.sh                 # interrupted? the same command goes on where it stopped
#     bash quickstart.sh --seed=2        # another seed, its folders end in -seed2
# Everything is plain commands, printed before they run; copy one and change it.
set -euo pipefail
cd "$(dirname "$0")"

seed=1337 tag=""
for arg in "$@"; do
    case "$arg" in
        --seed=*) seed="${arg#--seed=}"; tag="-seed$seed" ;;
        *) echo "error: unknown option '$arg'; known: --seed=N" >&2; exit 2 ;;
    esac
done

say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; }
# run OUT_DIR COMMAND...: once; a half-done one is resumed from its checkpoint, a finished one skipped
run() {
    local out="$1"; shift
    if [ -f "$out/finished" ]; then echo "$out is finished already"; return; fi
    if [ -f "$out/ckpt.pt" ]; then set -- "$@" --init_from=resume; fi
    say "$@"
    mkdir -p "$out"
    PYTHONUNBUFFERED=1 "$@" 2>&1 | tee -ai "$out/console.txt"  # app.py shows it, and takes the peak memory of its table from it
    touch "$out/finished"
}

if [ -z "${VIRTUAL_ENV:-}" ]; then
    # a .venv that was interrupted while it was made is half a one: it counts when its python and pip answer
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1 || [ ! -f .venv/bin/activate ]; then
        say python3 -m venv --clear .venv
        python3 -m venv --clear .venv || { echo 'error: no virtual environment (on Debian: apt install python3-venv)' >&2; exit 2; }
    fi
    . .venv/bin/activate
fi
if ! python -c 'import torch, numpy, tiktoken, requests, gradio, matplotlib' 2>/dev/null; then
    say pip install torch==2.13.0 '&&' pip install -r requirements.txt -r requirements-app.txt
    pip install -q torch==2.13.0  # first, so that nothing below pulls another build
    pip install -q -r requirements.txt -r requirements-app.txt
fi
started=$(date +%s)

if [ ! -f data/toy/pref_test.jsonl ]; then say python data/toy/prepare.py; python data/toy/prepare.py; fi
run "out-base$tag"   python sft.py    config/pretrain_toy.py --seed=$seed --out_dir="out-base$tag"
run "out-sft$tag"    python sft.py    config/sft_toy.py      --seed=$seed --out_dir="out-sft$tag"    --init_from="out-base$tag"
run "out-reward$tag" python reward.py config/reward_toy.py   --seed=$seed --out_dir="out-reward$tag" --init_from="out-sft$tag"
run "out-ppo$tag"    python ppo.py    config/ppo_toy.py      --seed=$seed --out_dir="out-ppo$tag"    --init_from="out-sft$tag" --reward="out-reward$tag"
run "out-dpo$tag"    python dpo.py    config/dpo_toy.py      --seed=$seed --out_dir="out-dpo$tag"    --init_from="out-sft$tag"
run "out-lora$tag"   python dpo.py    config/dpo_toy.py      --seed=$seed --out_dir="out-lora$tag"   --init_from="out-sft$tag" --lora_r=16 --learning_rate=5e-4
run "out-grpo$tag"   python grpo.py   config/grpo_toy.py     --seed=$seed --out_dir="out-grpo$tag"   --init_from="out-sft$tag"
say python data/toy/report.py --tag="$tag"
python data/toy/report.py --tag="$tag"
say python app.py --report="out$tag/report.html"
python app.py --report="out$tag/report.html"
echo
echo "$(( $(date +%s) - started )) seconds, not counting the installation. Now: python infer.py --init_from=out-ppo$tag --chat   or   python app.py"
