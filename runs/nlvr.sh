#!/usr/bin/env bash
# All three stages on real pictures and human-written statements, NLVR's towers (tools/nlvr.py),
# from random weights on a CPU: a base that learns to see and to verify (made once), then SFT,
# alignment and RLVR as in runs/tiny.sh, with the rival, SFT on alignment's references, and one
# table of every checkpoint, greedy and at temperature 1. One process at a time on one core: 35
# minutes on a machine that was busy with other runs, the base 17 of them. After a stop the same
# command goes on: updates that were made are not made again.
#   bash runs/nlvr.sh ../shared/data/nlvr [OUT]      OUT: run folders, out/nlvr-SEED by default
#   bash runs/nlvr.sh ../shared/data/nlvr --quick    everything smaller, 110 seconds of CPU: shows
#                                                    that it runs, not that it works
#   SEED=1 bash runs/nlvr.sh ../shared/data/nlvr     other rows to learn from, other rollouts; the
#                                                    same base, the same rows of NLVR for alignment,
#                                                    RLVR and tests
# Every arm that ends with GRPO makes 100 updates of the policy behind SFT. The stages' settings are
# those of runs/tiny-{sft,align,rlvr}.json but for what stands below.
set -euo pipefail
NLVR=$(realpath "${1:?the folder of NLVR: dev.jsonl, train.jsonl and images}")
SEED=${SEED:-0}
QUICK="" OUT=""
case "${2:-}" in
--quick) QUICK=yes ;;
-*)
    echo "nlvr.sh: $2 is no flag: --quick, or a folder for the runs" >&2
    exit 2
    ;;
?*) OUT=$(realpath -m "$2") ;;
esac
EXTRAS=
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

NAME=nlvr SIZE="" LIMIT=0 SAMPLES=2 WARMUP=""
EACH=40 LEFT=60 ALL=100 # updates of the policy: of a stage before GRPO, of GRPO then, of GRPO alone
if [ "$QUICK" ]; then
    NAME=nlvr-quick SIZE=--quick LIMIT=5 SAMPLES=1 WARMUP="--warmup_steps 2"
    EACH=1 LEFT=1 ALL=2
fi
DATA=data/$NAME BASE=ckpt/base-$NAME
OUT=${OUT:-out/$NAME-$SEED}
# 400 x 100 pixels become 80 x 20: 64 visual tokens, a block of a tower is 4 pixels high and wide.
SIGHT="--max_pixels 1700"

if [ ! -f "$DATA/words.json" ]; then # words.json comes last
    python tools/nlvr.py --data "$NLVR" --out "$DATA" $SIZE
fi

learn() { # from, file of demonstrations, run folder, passes
    python sft.py --policy "$1" --data "$DATA/$2.jsonl" --out "$3" --batch 32 --lr 1.5e-3 $SIGHT \
        --warmup 0.05 --device cpu --log_every 50 --sample_every 0 --save_every 0 --resume \
        --epochs "$4" --no-freeze_vision # it starts from random weights
}
begin=$SECONDS
# The weights come last: what a stop cut short is made again.
if [ ! -f "$BASE/init/model.safetensors" ]; then
    rm -rf "$BASE/init"
    python tools/init.py --config runs/nlvr.json --corpus "$DATA/words.json" --out "$BASE/init"
fi
learn "$BASE/init" easy "$BASE/easy" 1
learn "$BASE/easy" base "$BASE/base" 1
learn "$BASE/base" base "$BASE" 0.5 # test_id: .72 right behind the first pass, .75 then
echo "=== base: $((SECONDS - begin)) s (next to nothing where it was there)"

begin=$SECONDS
if [ "$SEED" != 0 ]; then
    DATA=data/$NAME-$SEED
    if [ ! -f "$DATA/words.json" ]; then
        python tools/nlvr.py --data "$NLVR" --out "$DATA" --seed "$SEED" $SIZE
    fi
fi

stage() { # stage, from, file of data, run folder, further flags
    local script=$1 from=$2 data=$3 to=$4
    shift 4
    echo "=== $to"
    python "$script.py" --config "runs/tiny-$script.json" --seed "$SEED" --policy "$from" \
        --data "$DATA/$data" --out "$to" $SIGHT --resume "$@"
}
game="--disc_init $BASE $WARMUP --steps $EACH"
grpo="--prompts_per_step 16"
stage sft "$BASE" sft.json "$OUT/sft"
stage rlvr "$OUT/sft" rl.jsonl "$OUT/sft-grpo" $grpo --steps $ALL
stage align "$OUT/sft" align.jsonl "$OUT/align" $game
stage rlvr "$OUT/align" rl.jsonl "$OUT/align-grpo" $grpo --steps $LEFT
stage sft "$OUT/sft" align.jsonl "$OUT/refs" --steps $EACH
stage rlvr "$OUT/refs" rl.jsonl "$OUT/refs-grpo" $grpo --steps $LEFT

python eval.py --policy "$BASE" "$OUT"/{sft,sft-grpo,align,align-grpo,refs,refs-grpo} \
    --data "$DATA"/test_{id,hard,ood}.jsonl --limit $LIMIT --samples $SAMPLES --device cpu $SIGHT \
    --max_response 128 --out "$OUT/eval.json"
echo "=== what to compare with: a coin is right in 50 %, who always says true in"
for test in id hard ood; do
    rows=$(wc -l < "$DATA/test_$test.jsonl")
    true=$(grep -c '"ground_truth": "true"' "$DATA/test_$test.jsonl")
    echo "    test_$test: $true of $rows"
done
echo "=== stages and evaluation: $((SECONDS - begin)) s"
echo "figures: $OUT/eval.json   logs: $OUT/*/log.jsonl"
echo "paired differences: python tools/compare.py $OUT/eval.json"
