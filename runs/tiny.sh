#!/usr/bin/env bash
# The embedded main job, on a CPU: draw the world, make the base (once), then SFT, alignment, RLVR with and without
# alignment, the evaluation of every checkpoint, one table.
#   bash runs/tiny.sh             base within 20 minutes, the rest within 20, on two cores
#   bash runs/tiny.sh --quick     everything smaller, within 5 minutes: shows that it runs, not that it works
# SEED=1 bash runs/tiny.sh repeats it with other data and rollouts; OUT: where the runs go.
set -euo pipefail
EXTRAS=
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
SEED=${SEED:-0}
if [ "${1:-}" = --quick ]; then
    NAME=quick SFT_STEPS=20 WARM_STEPS=20 ALIGN_STEPS=5 RL_STEPS=5 LIMIT=30
else
    NAME=tiny SFT_STEPS=330 WARM_STEPS=80 ALIGN_STEPS=40 RL_STEPS=60 LIMIT=500
fi
OUT=${OUT:-out/$NAME-$SEED}
DATA=data/$NAME
rm -rf "$OUT" && mkdir -p "$OUT"
begin=$SECONDS
bash runs/base.sh $NAME
echo "--- base: $((SECONDS - begin)) s (0: it was there)"
begin=$SECONDS
shared="--seed $SEED --device cpu --max_response 128 --sample_every 20 --save_every 0"

python sft.py --policy ckpt/base-$NAME --data $DATA/sft.json --out "$OUT/sft" \
    --steps $SFT_STEPS --batch 64 --lr 1e-3 --warmup 0.03 $shared
python align.py --policy "$OUT/sft" --disc_init ckpt/base-$NAME --data $DATA/align.jsonl --out "$OUT/align" \
    --warmup_steps $WARM_STEPS --warmup_pairs 128 --warmup_lr 5e-4 \
    --steps $ALIGN_STEPS --prompts_per_step 16 --group_size 8 --lr 1.5e-4 --disc_lr 5e-4 --probe_every 10 $shared
for start in sft align; do
    python rlvr.py --policy "$OUT/$start" --data $DATA/rl.jsonl --out "$OUT/${start}_grpo" \
        --steps $RL_STEPS --prompts_per_step 24 --group_size 8 --lr 1.5e-4 $shared
done
python eval.py --policy ckpt/base-$NAME "$OUT"/{sft,sft_grpo,align,align_grpo} --out "$OUT/eval.json" \
    --data $DATA/test_id.jsonl $DATA/test_hard.jsonl $DATA/test_ood.jsonl --limit $LIMIT --samples 1 \
    --device cpu --max_response 128
echo "--- stages and evaluation: $((SECONDS - begin)) s; $OUT/eval.json"
