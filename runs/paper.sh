#!/usr/bin/env bash
# The paper's three stages for Qwen3-VL-4B on 8 x 80 GB. Never run: there was no such machine. What
# it takes is counted.
#   bash runs/paper.sh DATA [OUT]           DATA: a folder with sft.json, pairs.jsonl, align.parquet
#                                           and rl.parquet (8B: rl_10k.parquet); OUT: ckpt/paper
#   bash runs/paper.sh --dry_run [CONFIGS]   the memory accounts alone, of 2B, 4B and 8B; CONFIGS: a
#                                           folder with their config.json in 2B/, 4B/ and 8B/ (the
#                                           hub's, without it); takes a minute on a laptop
# Started again it goes on from its last checkpoints. Other sizes and numbers:
#   POLICY=Qwen/Qwen3-VL-8B-Instruct GPUS=16 bash runs/paper.sh DATA
#
# The paper's settings are the defaults, so that few flags stand here:
#   SFT        AdamW, lr 1e-5, cosine, 10 % warm-up, 1 epoch, 2048 + 6144 = 8192 tokens; batch 128
#              and weight decay 0 are our choice
#   warm-up    120,000 pairs, 128 a step (940 steps at most), lr 1e-5, cosine, 10 % warm-up, weight
#              decay 0.01, clip 1
#   alignment  4 prompts of 16 rollouts, temperature 1, lr 1e-6 for both players, weight decay 0.01,
#              alpha 0.5, 500 steps
#   RLVR       GRPO (ALGO=dapo, gspo), 32 prompts of 16 rollouts of at most 8192 tokens, lr 1e-6,
#              1500 steps
# and those given: the discriminator is upcycled from the 2B model; sides of 560 pixels at most in
# the warm-up; RLVR takes the prompts that the aligned policy solves in 20 to 80 % of 16 tries (at
# 8B DATA/rl_10k.parquet, which is filtered already, as the released script does: ROWS, FILTER).
# The baseline, SFT -> RLVR, trains on the same prompts for as many more steps as alignment had:
# each arm updates the policy equally often. BASELINE= leaves it out.
# What fits in 80 GB: bfloat16, checkpointing, and --slots below the rows that a rank has to decode
# where their keys and values would not fit. FLAGS, and SFT_FLAGS, ALIGN_FLAGS, RLVR_FLAGS and
# EVAL_FLAGS, are more flags, of all commands or of one's.
set -euo pipefail
MEMORY="" CONFIGS=""
if [ "${1:-}" = --dry_run ]; then
    MEMORY=yes CONFIGS=${2:+$(realpath "$2")}
else
    DATA=${1:?the folder with sft.json, pairs.jsonl, align.parquet, rl.parquet (or --dry_run)}
    DATA=$(realpath "$DATA") OUT=$(realpath -m "${2:-$(dirname "$0")/../ckpt/paper}")
fi
EXTRAS=math,parquet
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
POLICY=${POLICY:-Qwen/Qwen3-VL-4B-Instruct} DISC=${DISC:-Qwen/Qwen3-VL-2B-Instruct}
GPUS=${GPUS:-8} ALGO=${ALGO:-grpo} BASELINE=${BASELINE-yes}
FLAGS=${FLAGS:-} SFT_FLAGS=${SFT_FLAGS:-} ALIGN_FLAGS=${ALIGN_FLAGS:-}
RLVR_FLAGS=${RLVR_FLAGS:-} EVAL_FLAGS=${EVAL_FLAGS:-}
ALIGN_STEPS=500 RLVR_STEPS=1500
case $POLICY in
    *8B*) ROWS=${ROWS:-rl_10k.parquet} FILTER=${FILTER-} ;;
    *) ROWS=${ROWS:-rl.parquet} FILTER=${FILTER-0.2 0.8} ;; # pass rates, the bounds included
esac
fit="--dtype bfloat16 --checkpointing $FLAGS"
game="--slots 8" # a rank has 4 * 16 / 8 rows
rl="--slots 24 --algo $ALGO" # of 32 * 16 / 8 = 64 rows: more do not fit beside the 8B model

account() { # of a stage, from the configuration alone
    echo "=== $*"
    WORLD_SIZE=$GPUS python tools/memory.py "$@" $fit
}

accounts() { # policy, discriminator
    account sft --policy "$1"
    account align --policy "$1" --disc_init "$2" $game
    account rlvr --policy "$1" $rl
}

if [ $MEMORY ]; then
    for size in 2B 4B 8B; do
        if [ "$CONFIGS" ]; then
            accounts "$CONFIGS/$size" "$CONFIGS/2B"
        else
            accounts "Qwen/Qwen3-VL-$size-Instruct" "$DISC"
        fi
    done
    exit
fi
accounts "$POLICY" "$DISC"

run() { torchrun --nproc_per_node="$GPUS" "$@"; }
run sft.py --policy "$POLICY" --data "$DATA/sft.json" --out "$OUT/sft" $fit --resume $SFT_FLAGS
run align.py --policy "$OUT/sft" --disc_init "$DISC" --pairs "$DATA/pairs.jsonl" --warmup_only \
    --max_side 560 --data "$DATA/align.parquet" --out "$OUT/warmup" $fit $game --resume $ALIGN_FLAGS
run align.py --policy "$OUT/sft" --disc_path "$OUT/warmup/warmup/last" --steps $ALIGN_STEPS \
    --data "$DATA/align.parquet" --out "$OUT/align" $fit $game --resume $ALIGN_FLAGS

rows=$DATA/$ROWS
if [ "$FILTER" ]; then
    rows=$OUT/rl.parquet
    if [ ! -f "$rows" ]; then
        run eval.py --policy "$OUT/align" --data "$DATA/$ROWS" --no-greedy --samples 16 \
            --slots 24 --max_response 8192 --filter $FILTER --filter_out "$rows" $FLAGS $EVAL_FLAGS
    fi
fi
run rlvr.py --policy "$OUT/align" --data "$rows" --steps $RLVR_STEPS --out "$OUT/rlvr-$ALGO" \
    $fit $rl --resume $RLVR_FLAGS
if [ "$BASELINE" ]; then
    run rlvr.py --policy "$OUT/sft" --data "$rows" --steps $((RLVR_STEPS + ALIGN_STEPS)) \
        --out "$OUT/sft-rlvr-$ALGO" $fit $rl --resume $RLVR_FLAGS
fi
