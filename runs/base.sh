#!/usr/bin/env bash
# The base of the embedded world: a tiny Qwen3-VL, from random weights to one that sees and can do
# the task in the references' manner. Built once, from seed 0, about 8 minutes on one core; after a
# stop the same command goes on with the part that was not done.
#   bash runs/base.sh [tiny|quick]
set -euo pipefail
EXTRAS=
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
NAME=${1:-tiny}
DATA=data/$NAME OUT=ckpt/base-$NAME SIZE=
if [ "$NAME" = quick ]; then SIZE=--quick; fi

[ -f "$DATA/words.json" ] || python tools/scenes.py --out "$DATA" $SIZE # words.json comes last
[ -d "$OUT/last" ] && exit

learn() { # from, file of demonstrations, run folder
    python sft.py --policy "$1" --data "$DATA/$2.jsonl" --out "$3" --batch 32 --lr 1.5e-3 \
        --warmup 0.05 --device cpu --log_every 50 --sample_every 0 --save_every 0 --resume \
        --no-freeze_vision # it starts from random weights
}
python tools/init.py --config runs/tiny.json --corpus "$DATA/words.json" --out "$OUT/init"
# Few objects first: full scenes alone taught nearly no places in the time of these two.
learn "$OUT/init" easy "$OUT/easy"
learn "$OUT/easy" look "$OUT/look"
learn "$OUT/look" base "$OUT"
