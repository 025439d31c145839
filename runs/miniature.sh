#!/usr/bin/env bash
# What does an alignment stage buy? Arms of a comparison on any number of seeds of an embedded world
# (tools/scenes.py), at equal numbers of policy updates.
#   bash runs/miniature.sh                          the main table on seed 0 of the world "miniature"
#   bash runs/miniature.sh --seeds 0-9 --jobs 2     ten seeds, two at a time, a core each
#   bash runs/miniature.sh --world tiny             the world of runs/tiny.sh; or known
#   bash runs/miniature.sh --table cost             main, algorithms, ablations or cost
#   bash runs/miniature.sh --arms sft,align         some arms, and none of a table
#   bash runs/miniature.sh --references 50          so many references, not all 1,500
#   bash runs/miniature.sh --show                   print the commands and run nothing
# An arm of a seed is a run folder with an eval.json, out/WORLD-SEED/ARM. What is there is not made
# again, so the same command goes on after a stop, and a table uses what another has made. How long
# it will take is printed first; at the end come the tables of tools/compare.py: each arm's mean, and
# paired differences with their intervals.
#
# An arm's name says what follows what. All but the first end with 140 updates of the policy in all
# behind SFT: 40 in each stage before GRPO, and what is left in GRPO.
#   sft               SFT on many terse and partly wrong demonstrations and a few of the teacher's
#   sft-grpo          then GRPO
#   sft-grpo-tokens   the same run, on until it has generated as many tokens as align-grpo in both
#                     its stages
#   align             alignment behind SFT
#   align-grpo        then GRPO
#   refs              the rival: SFT on alignment's references
#   refs-grpo         then GRPO
#   refs-align        SFT on the references, then alignment
#   refs-align-grpo   then GRPO
# -dapo and -gspo are other algorithms in GRPO's place. `base-` begins without SFT, `half-` with half
# of it. The variants of alignment (align-dense, align-constant ..) are in the function `variant`.
set -euo pipefail

usage() {
    sed -n "2,/^set/{/^#/s/^# \{0,1\}//p}" "$0"
    exit "$1"
}

# A list of seeds: 0-3,7 is 0 1 2 3 7
seeds_of() {
    local part
    for part in ${1//,/ }; do
        [[ $part =~ ^[0-9]+(-[0-9]+)?$ ]] || return 1
        seq "${part%-*}" "${part#*-}"
    done
}

arms_of() { # of a table
    local name
    case $1 in
        main) echo sft sft-grpo align align-grpo sft-grpo-tokens refs refs-grpo refs-align \
            refs-align-grpo ;;
        algorithms) echo sft align refs {sft,align,refs}-{dapo,gspo} ;;
        cost) echo sft align align-{constant,nodecay,nofloor,short,slow,group16,clip} \
            align-{discslow,discfast} ;;
        ablations)
            echo sft align align-grpo base-align base-align-grpo half half-align half-align-grpo
            for name in dense blind experts whole sum alpha0 alpha1; do
                echo align-$name align-$name-grpo
            done
            ;;
        *) return 1 ;;
    esac
}

# What a variant of alignment changes
variant() {
    case $1 in
        "") ;;
        dense | experts) echo "--disc $1" ;;
        blind) echo "--disc_blind" ;;
        whole) echo "--spans whole" ;;
        sum) echo "--normalize sum" ;;
        alpha0) echo "--alpha 0" ;;
        alpha1) echo "--alpha 1" ;;
        constant) echo "--schedule constant --std_floor 0" ;;
        nodecay) echo "--schedule constant" ;;
        nofloor) echo "--std_floor 0" ;;
        short) echo "--steps 20" ;;
        slow) echo "--lr 5e-5" ;;
        group16) echo "--group_size 16 --prompts_per_step 8" ;;
        clip) echo "--score_clip 1" ;;
        discslow) echo "--disc_lr 1.5e-4" ;;
        discfast) echo "--disc_lr 1.5e-3" ;;
        *) return 1 ;;
    esac
}

world=miniature seeds=0 jobs=1 table=main arms="" references=1500 limit=1000 show=""
while [ $# != 0 ]; do
    case $1 in
        --show) show=yes && shift && continue ;;
        -h | --help) usage 0 ;;
        --world | --seeds | --jobs | --table | --arms | --references | --limit) ;;
        *) echo "there is no flag $1" >&2 && usage 2 >&2 ;;
    esac
    if [ $# = 1 ]; then
        echo "$1 needs a value" >&2
        exit 2
    fi
    printf -v "${1#--}" %s "$2"
    shift 2
done
seeds=$(seeds_of "$seeds") || { echo "--seeds: write 0-9 or 0,3,5-7" >&2 && exit 2; }
if [ ! "$arms" ]; then
    arms=$(arms_of "$table") ||
        { echo "--table $table: there are main, algorithms, ablations, cost" >&2 && exit 2; }
fi
arms=${arms//,/ }

EXTRAS=
if [ "$show" ]; then
    cd "$(dirname "${BASH_SOURCE[0]}")/.."
else
    source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
fi
MAX_RESPONSE=160 UPDATES=140 EACH=40 # updates in all behind SFT, and in a stage before RLVR
name=$world
if [ "$references" != 1500 ]; then name=refs$references-$world; fi
base=ckpt/base-$world

# One stage, from a policy to the run folder of the arm $arm: stage SCRIPT POLICY FLAGS..
stage() {
    local script=$1 policy=$2
    shift 2
    run python "$script" --policy "$policy" --seed "$seed" --out "$out/$arm" --device cpu \
        --max_response $MAX_RESPONSE --save_every 0 --resume "$@"
}

run() { # a command, or print it
    if [ "$show" ]; then echo "$*"; else "$@"; fi
}

sft() { stage sft.py "$1" --config runs/tiny-sft.json "${@:2}"; }
align() { # POLICY VARIANT
    local flags
    flags=$(variant "$2") || { echo "there is no variant $2 of alignment" >&2 && return 1; }
    # shellcheck disable=SC2086  # several flags; the last of two counts
    stage align.py "$1" --config runs/tiny-align.json --disc_init "$base" \
        --data "$data/references.jsonl" --steps $EACH $flags
}
# After alignment or SFT on references, each stage with $EACH updates
rlvr() { # ALGORITHM FLAGS..
    local before=${arm%-"$1"} spent=0 word
    for word in ${before//-/ }; do
        case $word in align | refs) spent=$((spent + EACH)) ;; esac
    done
    stage rlvr.py "$(policy_of "$before")" --config runs/tiny-rlvr.json --data "$data/rl.jsonl" \
        --steps $((UPDATES - spent)) --algo "$@"
}

policy_of() { # an arm
    if [ "$1" = base ]; then echo "$base"; else echo "$out/$1"; fi
}

one_arm() {
    case $arm in
        sft) sft "$base" --data "$data/sft.json" ;;
        half) sft "$base" --data "$data/sft.json" --steps 200 ;;
        refs) sft "$out/sft" --data "$data/references.jsonl" --steps $EACH ;;
        *-grpo-tokens) go_on "${arm%-tokens}" ;;
        *-grpo) rlvr grpo ;;
        *-dapo) rlvr dapo --overlong 32 --prompts_per_draw 48 ;;
        *-gspo) rlvr gspo ;;
        base-align | half-align | refs-align) align "$(policy_of "${arm%-align}")" "" ;;
        align) align "$out/sft" "" ;;
        align-*) align "$out/sft" "${arm#align-}" ;;
        *) echo "there is no arm $arm" >&2 && return 1 ;;
    esac
}

# GRPO behind SFT, on from where it ended, to as many tokens as alignment and the GRPO behind it
go_on() {
    local steps='(as the tokens allow)'
    if [ ! "$show" ]; then
        steps=$(python tools/budget.py "$out/align" "$out/align-grpo" --as_updates_of "$out/$1") ||
            return 1
        if [ ! -d "$out/$arm" ] && [ "$steps" -gt $UPDATES ]; then
            cp -r "$out/$1" "$out/$arm.part"
            rm -f "$out/$arm.part/eval.json"
            mv "$out/$arm.part" "$out/$arm"
        fi
    fi
    stage rlvr.py "$out/sft" --config runs/tiny-rlvr.json --data "$data/rl.jsonl" --algo grpo \
        --steps "$steps"
}

one_seed() {
    local seed=$1 arm
    local data=data/$name-$seed out=out/$name-$seed
    if [ ! -f "$data/words.json" ]; then # it comes last
        run python tools/scenes.py --world "$world" --out "$data" --seed "$seed" --tests 1000
    fi
    if [ ! "$show" ]; then
        head -n "$references" "$data/align.jsonl" > "$data/references.jsonl"
        mkdir -p "$out"
    fi
    for arm in $arms; do
        [ -f "$out/$arm/eval.json" ] && continue
        one_arm || return 1
        run python eval.py --policy "$out/$arm" --data "$data"/test_{id,hard,ood}.jsonl \
            --limit "$limit" --samples 1 --device cpu --max_response $MAX_RESPONSE \
            --out "$out/$arm/eval.json" || return 1
    done
}

# Minutes that what is not there will take, on one core each, from a run on an AMD EPYC: GRPO about a
# second an update, 80 an alignment with its warm-up, 25 an evaluation; miniature twice as much
minutes() {
    local seconds=0 seed arm
    for seed in $seeds; do
        for arm in $arms; do
            [ -f "out/$name-$seed/$arm/eval.json" ] && continue
            case $arm in
                *-tokens | refs) seconds=$((seconds + 60)) ;;
                *-dapo) seconds=$((seconds + 300)) ;;
                *-grpo | *-gspo) seconds=$((seconds + 140)) ;;
                *) seconds=$((seconds + 105)) ;;
            esac
        done
    done
    if [ "$world" != tiny ]; then seconds=$((seconds * 2)); fi
    echo $(((seconds + 59) / 60 / jobs))
}

export OMP_NUM_THREADS=1
if [ "$show" ]; then
    for seed in $seeds; do one_seed "$seed"; done
    exit
fi
bash runs/base.sh "$world"
mkdir -p out
echo "=== about $(minutes) minutes; what happens is in out/$name-SEED.log"
running=0
for seed in $seeds; do
    if [ $running = "$jobs" ]; then
        wait -n || true # its seed has been named
        running=$((running - 1))
    fi
    {
        one_seed "$seed" > "out/$name-$seed.log" 2>&1 ||
            echo "seed $seed failed: $(tail -n 1 "out/$name-$seed.log") (out/$name-$seed.log)"
    } &
    running=$((running + 1))
done
wait
# shellcheck disable=SC2046,SC2086
python tools/compare.py $(printf "out/$name-%s " $seeds) --arms $arms
