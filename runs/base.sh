#!/usr/bin/env bash
# The base of the embedded world: a tiny Qwen3-VL, from random weights to one that sees and can do the task in the
# references' manner. Built once, from seed 0, about 8 minutes on one core: bash runs/base.sh [tiny|quick]
set -euo pipefail
EXTRAS=
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
NAME=${1:-tiny}
DATA=data/$NAME OUT=ckpt/base-$NAME
[ -f $DATA/words.json ] || python tools/scenes.py --out $DATA $([ $NAME = quick ] && echo --quick)
[ -d $OUT/last ] && exit
python init.py --config runs/tiny.json --corpus $DATA/words.json --out $OUT/init
from=$OUT/init
for file in easy look base; do # few objects first: full scenes alone taught nearly no places in the time of these two
    to=$OUT/$file
    [ $file = base ] && to=$OUT
    python sft.py --policy $from --data $DATA/$file.jsonl --out $to --batch 32 --lr 1.5e-3 --warmup 0.05 \
        --device cpu --log_every 50 --sample_every 0 --save_every 0
    from=$to
done
