#!/usr/bin/env bash
# The embedded main job, on a CPU: the base (made once), then SFT, alignment, RLVR from both, and one table of every
# checkpoint, greedy and at temperature 1; last, a page with table, curves and rollouts: out/tiny-0/report.html.
#   bash runs/tiny.sh             base within 20 minutes, the rest within 20, on two cores
#   bash runs/tiny.sh --quick     everything smaller, within 5 minutes: shows that it runs, not that it works
# SEED=1 bash runs/tiny.sh       other pictures and questions for every stage and test, other rollouts, the same base
set -euo pipefail
EXTRAS=
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
SEED=${SEED:-0}
if [ "${1:-}" = --quick ]; then
    NAME=quick ALIGN="--warmup_steps 20 --steps 6" RLVR="--steps 6" LIMIT=30
else
    NAME=tiny ALIGN="--warmup_steps 80 --steps 40" RLVR="--steps 100" LIMIT=500
fi
BASE=ckpt/base-$NAME OUT=out/$NAME-$SEED DATA=data/$NAME
rm -rf "$OUT"
begin=$SECONDS
bash runs/base.sh $NAME
echo "=== base: $((SECONDS - begin)) s (next to nothing where it was there)"
begin=$SECONDS
if [ "$SEED" != 0 ]; then
    DATA=data/$NAME-$SEED
    python tools/scenes.py --out "$DATA" --seed "$SEED" $([ $NAME = quick ] && echo --quick)
fi
common="--seed $SEED --device cpu --max_response 128 --save_every 0"

python sft.py --policy $BASE --data "$DATA/sft.json" --out "$OUT/sft" \
    --batch 32 --lr 1e-3 --warmup 0.05 --log_every 10 --sample_every 100 $common
python align.py --policy "$OUT/sft" --disc_init $BASE --data "$DATA/align.jsonl" --out "$OUT/align" $ALIGN \
    --warmup_lr 5e-4 --prompts_per_step 16 --group_size 8 --lr 1.5e-4 --disc_lr 5e-4 --probe_every 10 \
    --sample_every 10 $common
for start in sft align; do
    python rlvr.py --policy "$OUT/$start" --data "$DATA/rl.jsonl" --out "$OUT/$start-grpo" $RLVR \
        --prompts_per_step 24 --group_size 8 --lr 1.5e-4 --sample_every 25 $common
done
python eval.py --policy $BASE "$OUT"/{sft,sft-grpo,align,align-grpo} --data "$DATA"/test_{id,hard,ood}.jsonl \
    --limit $LIMIT --samples 1 --device cpu --max_response 128 --out "$OUT/eval.json"
python tools/report.py "$OUT"/{sft,align,sft-grpo,align-grpo} --eval "$OUT/eval.json" --out "$OUT/report.html"
echo "=== stages and evaluation: $((SECONDS - begin)) s; figures in $OUT/eval.json, logs in $OUT/*/log.jsonl, a page in $OUT/report.html"
