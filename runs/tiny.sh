#!/usr/bin/env bash
# The embedded main job, on a CPU: the base (made once), then SFT, alignment, RLVR from both (with
# equally many updates in all), and one table of every checkpoint, greedy and at temperature 1;
# last, a page with table, curves and rollouts: out/tiny-0/report.html. RLVR without alignment runs
# beside alignment, a core each; its output is in out/tiny-0/sft-grpo.txt.
#   bash runs/tiny.sh             15 minutes on two cores: the base about 8, the rest about 6
#   bash runs/tiny.sh --quick     everything smaller, within 5 minutes: shows that it runs, not that
#                                 it works
#   SEED=1 bash runs/tiny.sh      other pictures and questions for every stage and test, other
#                                 rollouts, the same base
# The stages' settings are in runs/tiny-{sft,align,rlvr}.json, which the stages read by themselves
# where no --data is given. Runs are kept in out/. With seed 0 the weights of the three stages are
# also left in ckpt/sft, ckpt/align and ckpt/rlvr, so that any stage can be run again by itself:
#   torchrun --nproc_per_node=8 align.py --policy ckpt/sft
set -euo pipefail
EXTRAS=
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
SEED=${SEED:-0}
NAME=tiny SIZE="" ALIGN="" LIMIT=500
RLVR="--steps 100" CONTROL="--steps 140" # as many updates as alignment and RLVR together
if [ "${1:-}" = --quick ]; then
    NAME=quick SIZE=--quick
    ALIGN="--warmup_steps 20 --steps 6" RLVR="--steps 6" CONTROL="--steps 12" LIMIT=30
fi
BASE=ckpt/base-$NAME OUT=out/$NAME-$SEED DATA=data/$NAME

# Leave the weights of a run where the stages look: leave RUN STAGE
leave() {
    local to=ckpt/$2
    if [ -e "$to" ] && ! is_ours "$to"; then
        echo "$to stays as it is: it holds a run that is not of this script"
        return
    fi
    rm -rf "$to"
    mkdir -p "$to/last"
    touch "$to/last/.from-tiny"
    cp -r "$1/last/." "$to/last/"
    rm -rf "$to/last/resume" # a run of one's own starts there, it does not go on with this one
}

# A folder with nothing but what this script left. A run of one's own adds its log, and replaces
# last/ with the mark in it.
is_ours() {
    [ -f "$1/last/.from-tiny" ] && [ "$(ls -A "$1")" = last ]
}

rm -rf "$OUT"
begin=$SECONDS
bash runs/base.sh $NAME
echo "=== base: $((SECONDS - begin)) s (next to nothing where it was there)"
begin=$SECONDS
if [ "$SEED" != 0 ]; then
    DATA=data/$NAME-$SEED
    python tools/scenes.py --out "$DATA" --seed "$SEED" $SIZE
fi

python sft.py --config runs/tiny-sft.json --seed "$SEED" --policy $BASE \
    --data "$DATA/sft.json" --out "$OUT/sft"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # two at a time from here on
python rlvr.py --config runs/tiny-rlvr.json --seed "$SEED" --policy "$OUT/sft" \
    --data "$DATA/rl.jsonl" --out "$OUT/sft-grpo" $CONTROL > "$OUT/sft-grpo.txt" 2>&1 &
control=$!
trap 'kill $control 2> /dev/null || true' EXIT # where this script ends before it
python align.py --config runs/tiny-align.json --seed "$SEED" --policy "$OUT/sft" --disc_init $BASE \
    --data "$DATA/align.jsonl" --out "$OUT/align" $ALIGN
python rlvr.py --config runs/tiny-rlvr.json --seed "$SEED" --policy "$OUT/align" \
    --data "$DATA/rl.jsonl" --out "$OUT/align-grpo" $RLVR
echo "=== waiting for RLVR without alignment (its output: $OUT/sft-grpo.txt)"
wait $control || {
    tail -n 20 "$OUT/sft-grpo.txt"
    exit 1
}
torchrun --nproc_per_node=2 eval.py --policy $BASE "$OUT"/{sft,sft-grpo,align,align-grpo} \
    --data "$DATA"/test_{id,hard,ood}.jsonl --limit $LIMIT --samples 1 --device cpu \
    --max_response 128 --out "$OUT/eval.json"
python tools/report.py "$OUT"/{sft,align,sft-grpo,align-grpo} --eval "$OUT/eval.json" \
    --out "$OUT/report.html"

if [ "$NAME-$SEED" = tiny-0 ]; then
    leave "$OUT/sft" sft
    leave "$OUT/align" align
    leave "$OUT/align-grpo" rlvr
fi
echo "=== stages and evaluation: $((SECONDS - begin)) s"
echo "figures: $OUT/eval.json   logs: $OUT/*/log.jsonl   a page: $OUT/report.html"
