#!/usr/bin/env bash
# The base of an embedded world: a tiny Qwen3-VL, from random weights to one that sees and can do
# the task in its own manner. Built once, about 8 minutes on one core; after a stop the same command
# goes on with the part that was not done. Now and then it shows what it learns.
#   bash runs/base.sh [tiny|quick|miniature|known] [SEED]
# SEED is of the weights, the rows and their order. That of seed 0, which is meant where there is no
# SEED, is ckpt/base-WORLD; others are ckpt/base-WORLD-SEED.
set -euo pipefail
EXTRAS=
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
NAME=${1:-tiny} SEED=${2:-0}
WORLD=$NAME SIZE= EPOCHS=1 SUFFIX=
if [ "$SEED" != 0 ]; then SUFFIX=-$SEED; fi
DATA=data/$NAME$SUFFIX OUT=ckpt/base-$NAME$SUFFIX
if [ "$NAME" = quick ]; then WORLD=tiny SIZE=--quick; fi
if [ "$NAME" = known ]; then EPOCHS=2; fi # there are two manners to learn

if [ ! -f "$DATA/words.json" ]; then # words.json comes last
    python tools/scenes.py --world $WORLD --out "$DATA" --seed "$SEED" $SIZE
fi
[ -f "$OUT/whole" ] && exit # last/ alone may be what a stop left

learn() { # from, file of demonstrations, run folder, epochs
    python sft.py --policy "$1" --data "$DATA/$2.jsonl" --out "$3" --batch 32 --lr 1.5e-3 \
        --warmup 0.05 --device cpu --log_every 50 --sample_every 0 --save_every 0 --resume \
        --seed "$SEED" --epochs "$4" --no-freeze_vision # it starts from random weights
    echo "=== what $3 answers"
    python eval.py --policy "$3" --data "$DATA/test_id.jsonl" --limit 100 --show 1 --device cpu \
        --max_response 128
}
# The weights come last: what a stop cut short is made again.
if [ ! -f "$OUT/init/model.safetensors" ]; then
    rm -rf "$OUT/init"
    python tools/init.py --config runs/tiny.json --corpus "$DATA/words.json" --out "$OUT/init" \
        --seed "$SEED"
fi
# Few objects first: full scenes alone taught nearly no places in the time of these two.
learn "$OUT/init" easy "$OUT/easy" 1
learn "$OUT/easy" look "$OUT/look" 1
learn "$OUT/look" base "$OUT" $EPOCHS
touch "$OUT/whole"
