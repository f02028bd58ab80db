#!/usr/bin/env bash
# What happens when ...? Every question of EXPERIMENTS.md, answered by training on the toy world: pictures and tables in assets/.
#     bash experiments.sh                  # all questions, three seeds; interrupted? the same command goes on where it stopped
#     bash experiments.sh a c              # some: a no KL  b beta  c over-optimisation  d PPO, DPO, GRPO, best of n  e PPO's details
#                                          #       f DPO's losses  g LoRA's rank  h reward models  i failures  oracle the exact frontier
#     bash experiments.sh a --seeds=1 --out=out-mine --assets=out-mine
set -euo pipefail
cd "$(dirname "$0")"

questions=() options=()
for arg in "$@"; do
    case "$arg" in
        --*) options+=("$arg") ;;
        [a-i]|oracle) questions+=("$arg") ;;
        *) echo "error: unknown question '$arg'; known: a b c d e f g h i oracle" >&2; exit 2 ;;
    esac
done
[ ${#questions[@]} -gt 0 ] || questions=(a b c d e f g h i oracle)

if ! python -c 'import torch, numpy, tiktoken, requests, matplotlib' 2>/dev/null; then
    echo "error: torch or matplotlib is missing: pip install torch==2.13.0 && pip install -r requirements.txt -r requirements-app.txt" >&2; exit 2
fi
say() { printf '\n\033[1m$ %s\033[0m\n' "$*"; "$@"; }
[ -f data/toy/prompts_test.jsonl ] || say python data/toy/prepare.py
for q in "${questions[@]}"; do
    if [ "$q" = oracle ]; then
        own=()
        for o in "${options[@]+"${options[@]}"}"; do case "$o" in --seeds=*|--assets=*) own+=("$o") ;; esac; done
        say python data/toy/frontier.py "${own[@]+"${own[@]}"}"
    else say python data/toy/experiments.py "$q" "${options[@]+"${options[@]}"}"; fi
done
