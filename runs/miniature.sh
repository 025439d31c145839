#!/usr/bin/env bash
# What does an alignment stage buy? All arms of the comparison, at equal numbers of policy updates,
# on any number of seeds of an embedded world: by default the one with the foreign teacher, whose
# references are varied and in a manner that the base never had (tools/teacher.py).
#   bash runs/miniature.sh                                  seed 0
#   SEEDS="0 1 2 3" JOBS=2 bash runs/miniature.sh           two seeds at a time, a core each
#   WORLD=tiny SEEDS="0 1 2" bash runs/miniature.sh         the world of runs/tiny.sh
#   REFERENCES=50 bash runs/miniature.sh                    so many references, not all 1,500
#   ARMS="sft sft-grpo" bash runs/miniature.sh              some of the arms
# A run that has ended is not repeated, nor its evaluation (<run>/eval.json), so the same command
# goes on after a stop. At the end the tables of tools/compare.py: each arm's mean, and paired
# differences with their intervals.
#
#   sft               SFT on many terse and partly wrong demonstrations and a few of the teacher's
#   sft-grpo          then GRPO, 140 updates
#   align             then alignment, 40 updates
#   align-grpo        then GRPO, 100 updates
#   refs              the rival: SFT on alignment's references, 40 updates
#   refs-grpo         then GRPO, 100 updates
#   refs-align        SFT on the references, then alignment: 40 updates each
#   refs-align-grpo   then GRPO, 60 updates
set -euo pipefail
EXTRAS=
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
WORLD=${WORLD:-miniature} SEEDS=${SEEDS:-0} JOBS=${JOBS:-1} REFERENCES=${REFERENCES:-1500}
ARMS=${ARMS:-sft sft-grpo align align-grpo refs refs-grpo refs-align refs-align-grpo}
LIMIT=${LIMIT:-1000} MAX_RESPONSE=160
NAME=$WORLD
if [ "$REFERENCES" != 1500 ]; then NAME=refs$REFERENCES-$WORLD; fi
BASE=ckpt/base-$WORLD

# One arm of one seed: arm POLICY SCRIPT FLAGS..; its name is in $run
arm() {
    local policy=$1 script=$2
    shift 2
    python "$script" --policy "$policy" --seed "$seed" --out "$out/$run" --device cpu \
        --max_response $MAX_RESPONSE --save_every 0 --resume "$@"
}

sft() { arm "$1" sft.py --config runs/tiny-sft.json "${@:2}"; }
align() { arm "$1" align.py --config runs/tiny-align.json --disc_init $BASE "${@:2}"; }
grpo() { arm "$1" rlvr.py --config runs/tiny-rlvr.json --data "$data/rl.jsonl" "${@:2}"; }

one_run() {
    case $run in
        sft) sft $BASE --data "$data/sft.json" ;;
        sft-grpo) grpo "$out/sft" --steps 140 ;;
        align) align "$out/sft" --data "$data/references.jsonl" --steps 40 ;;
        align-grpo) grpo "$out/align" --steps 100 ;;
        refs) sft "$out/sft" --data "$data/references.jsonl" --steps 40 ;;
        refs-grpo) grpo "$out/refs" --steps 100 ;;
        refs-align) align "$out/refs" --data "$data/references.jsonl" --steps 40 ;;
        refs-align-grpo) grpo "$out/refs-align" --steps 60 ;;
        *) echo "there is no arm $run" >&2 && return 1 ;;
    esac
}

one_seed() {
    local seed=$1 run data out
    data=data/$NAME-$seed out=out/$NAME-$seed
    if [ ! -f "$data/words.json" ]; then
        python tools/scenes.py --world "$WORLD" --out "$data" --seed "$seed" --tests 1000 > /dev/null
    fi
    head -n "$REFERENCES" "$data/align.jsonl" > "$data/references.jsonl"
    mkdir -p "$out"
    for run in $ARMS; do
        [ -f "$out/$run/eval.json" ] && continue # it comes last
        one_run || return 1
        python eval.py --policy "$out/$run" --data "$data"/test_{id,hard,ood}.jsonl \
            --limit "$LIMIT" --samples 1 --device cpu --max_response $MAX_RESPONSE \
            --out "$out/$run/eval.json" || return 1
    done
}

bash runs/base.sh "$WORLD"
if [ "${1:-}" = --one ]; then
    one_seed "$2"
    exit
fi
export OMP_NUM_THREADS=1 WORLD REFERENCES ARMS LIMIT
mkdir -p out
logged() { # a seed, its output in a file
    bash runs/miniature.sh --one "$1" > "out/$NAME-$1.log" 2>&1 ||
        echo "seed $1 failed: $(tail -n 1 "out/$NAME-$1.log") (out/$NAME-$1.log)"
}
export -f logged
export NAME
# shellcheck disable=SC2086  # several seeds
printf "%s\n" $SEEDS | xargs -P "$JOBS" -I{} bash -c "logged {}"
# shellcheck disable=SC2046,SC2086
python tools/compare.py $(printf "out/$NAME-%s " $SEEDS)
