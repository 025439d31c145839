#!/usr/bin/env bash
# The paper's stages 2 and 3 from what its authors released, by the hub's names: alignment from the
# SFT checkpoint, the warmed-up discriminator and the 5.9K rows; RLVR on the filtered rows (2K at
# 4B, 10K at 8B); evaluation. Never run on the released files: tests/test_runs.py runs these commands
# on small ones of the same names, columns and forms.
#   bash runs/released.sh --dry_run [CONFIGS]   first: what is downloaded, and what each stage takes
#                                               on 1, 4 and 8 GPUs of 80 GB; CONFIGS: as in paper.sh
#   bash runs/released.sh [OUT]                 OUT: run folders, ckpt/released by default
# Started again it goes on from its last checkpoints. Settings, with their defaults:
#   SIZE=4B GPUS=8 ALGO=grpo     also 8B; any number of GPUs; dapo, gspo
#   MIRROR=                      a folder with the same files in OWNER/NAME/.., in place of the hub
#   EVAL="OWNER/NAME/FILE .."    the benchmarks' files, which hold their images
#   FROM=sft                     prism: begin with RLVR, from the released aligned checkpoint
#   WARMUP=released              own: warm a discriminator up on the released pairs
#   FLAGS= ALIGN_FLAGS= RLVR_FLAGS= EVAL_FLAGS=     more flags, of all commands or of one
# The paper's settings are the stages' defaults. Where GPUs are too few for parameters and optimiser,
# --offload keeps these on the CPU: one GPU is enough then, and slow.
set -euo pipefail
SIZE=${SIZE:-4B} GPUS=${GPUS:-8} ALGO=${ALGO:-grpo} MIRROR=${MIRROR:-}
FROM=${FROM:-sft} WARMUP=${WARMUP:-released}
EVAL=${EVAL:-"AI4Math/MathVista/data/testmini-*.parquet MathLLMs/MathVision/data/testmini-*.parquet"}
FLAGS=${FLAGS:-} ALIGN_FLAGS=${ALIGN_FLAGS:-} RLVR_FLAGS=${RLVR_FLAGS:-} EVAL_FLAGS=${EVAL_FLAGS:-}
DRY="" CONFIGS="" OUT=ckpt/released
if [ "${1:-}" = --dry_run ]; then
    DRY=yes CONFIGS=${2:+$(realpath "$2")}
elif [ "${1:-}" ]; then
    OUT=$(realpath -m "$1")
fi
if [ "$MIRROR" ]; then MIRROR=$(realpath "$MIRROR"); fi
EXTRAS=math,parquet
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
set -f # a * in EVAL is for the loader

case $SIZE in
    4B) ROWS=rl_training_data_filtered_2k.parquet ENOUGH=4 ;; # GPUs, without --offload
    8B) ROWS=rl_training_data_10k.parquet ENOUGH=8 ;;
    *) echo "SIZE is $SIZE: the released checkpoints are of 4B and 8B" >&2 && exit 2 ;;
esac
SFT=prism-vlm/Qwen3-VL-$SIZE-Instruct-SFT
DISC=prism-vlm/Qwen3-VL-2B-4X-Moe-warmup-120k
PAIRS=prism-vlm/qwen3_vl_moe_warmup_pairwise_120k
ALIGN_ROWS=prism-vlm/rl_dataset/rl_training_data_5.9k.parquet
RLVR_ROWS=prism-vlm/rl_dataset/$ROWS
game="--slots 16" # rows decoded at once
rl="--slots 24"

model() { echo "${MIRROR:+$MIRROR/}$1"; }

data() { # of each name, a line
    printf "%s\n" "${@/#/${MIRROR:-hf://datasets}/}"
}

fit_on() { # so many GPUs
    echo --dtype bfloat16 --checkpointing
    if [ "$1" -lt $ENOUGH ]; then echo --offload; fi
}

# ------------------------------------------------------------------------------- --dry_run
download() { # what is missing of a model (owner/name) or of a data set's file (owner/name/file)
    local owner name file
    IFS=/ read -r owner name file <<< "$1"
    echo "=== $1"
    HF_HUB_DISABLE_PROGRESS_BARS=1 hf download "$owner/$name" \
        ${file:+--type dataset --include "$file"} --dry-run --format human ||
        echo "the hub does not say; docs/data.md has sizes"
}

account() { # GPUs, stage, flags
    echo "=== $1 GPUs of 80 GB: ${*:2}"
    WORLD_SIZE=$1 python tools/memory.py "${@:2}"
}

if [ $DRY ]; then
    if [ ! "$MIRROR" ]; then
        needed="$SFT $DISC $ALIGN_ROWS"
        if [ "$WARMUP" = own ]; then needed="$SFT Qwen/Qwen3-VL-2B-Instruct $PAIRS/* $ALIGN_ROWS"; fi
        if [ "$FROM" = prism ]; then needed=$SFT-PRISM; fi
        for what in $needed $RLVR_ROWS $EVAL; do download "$what"; done
    fi
    policy=$(model $SFT) base=$(model Qwen/Qwen3-VL-2B-Instruct) # it has the discriminator's sizes
    if [ "$CONFIGS" ]; then policy=$CONFIGS/$SIZE base=$CONFIGS/2B; fi
    for gpus in 1 4 8; do
        account $gpus align --policy "$policy" --disc_init "$base" --warmup_steps 0 \
            $(fit_on $gpus) $game
        account $gpus rlvr --policy "$policy" $(fit_on $gpus) $rl
    done
    exit
fi

# ------------------------------------------------------------------------------- the stages
run() { torchrun --nproc_per_node="$GPUS" "$@"; }
fit="$(fit_on "$GPUS") $FLAGS"
align=(--data "$(data $ALIGN_ROWS)" $fit $game --resume $ALIGN_FLAGS)
mapfile -t benchmarks < <(data $EVAL)

if [ "$FROM" = prism ]; then
    policies=("$(model $SFT-PRISM)")
else
    policies=("$(model $SFT)" "$OUT/align")
    disc=$(model $DISC)
    if [ "$WARMUP" = own ]; then
        disc=$OUT/warmup/warmup/last
        if [ "$MIRROR" ]; then pairs=$MIRROR/$PAIRS; else pairs=$(hf download $PAIRS --type dataset -q); fi
        mkdir -p "$OUT/images" # of the pairs, which name them by their places in the archive
        find -L "$pairs" -name "*.tar.gz" -exec tar -xzf {} -C "$OUT/images" --skip-old-files \;
        run align.py --policy "${policies[0]}" --disc_init "$(model Qwen/Qwen3-VL-2B-Instruct)" \
            --pairs "$pairs/warmup_pairwise.jsonl" --image_root "$OUT/images" --max_side 560 \
            --warmup_only --out "$OUT/warmup" "${align[@]}"
    fi
    run align.py --policy "${policies[0]}" --disc_path "$disc" --out "$OUT/align" "${align[@]}"
fi
run rlvr.py --policy "${policies[-1]}" --data "$(data $RLVR_ROWS)" --algo "$ALGO" \
    --out "$OUT/rlvr-$ALGO" $fit $rl --resume $RLVR_FLAGS
run eval.py --policy "${policies[@]}" "$OUT/rlvr-$ALGO" --data "${benchmarks[@]}" \
    --max_response 8192 $rl --out "$OUT/eval.json" $FLAGS $EVAL_FLAGS
