#!/usr/bin/env bash
# Every claim on one GPU, within 10 minutes: a JSON line each on the terminal and in $OUT/gpu.jsonl.
# A case that fails or outlasts its limit says so, and the rest go on.
#
#   bash bench/gpu.sh
#   DEVICE=cpu bash bench/gpu.sh            to try the script itself, with small models
#   PYTHON=python3 bash bench/gpu.sh        to use an environment that is there
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
DEVICE=${DEVICE:-cuda}
OUT=${OUT:-out}
errors="$OUT/gpu.err"
lines="$OUT/gpu.jsonl"
mkdir -p "$OUT"
: > "$lines"
set -o pipefail
failed=0

try() { # seconds, script, arguments
    local limit=$1 script=$2 begin=$SECONDS
    shift 2
    if timeout "$limit" "$PYTHON" "bench/$script" --device "$DEVICE" "$@" 2> "$errors" |
        tee -a "$lines"; then
        return
    fi
    failed=$((failed + 1))
    local why
    why=$(tail -n 3 "$errors" |
        "$PYTHON" -c 'import json, sys; print(json.dumps(sys.stdin.read()[-400:]))')
    echo "{\"failed\": \"$script $*\", \"after_seconds\": $((SECONDS - begin)), \"why\": $why}" |
        tee -a "$lines"
}

small() { # on a CPU: these flags, so that a try of the script ends within minutes
    [ "$DEVICE" != cpu ] || echo "$@"
}

# shellcheck disable=SC2046  # several flags each
{
    try 90 check.py # does it compute the same there? before how fast
    try 50 logprob.py --repeat 3 $(small --repeat 1 --tokens 64 --vocabulary 2000)
    try 50 vision.py --repeat 5 $(small --repeat 1)
    try 60 freeze.py --repeat 3 $(small --repeat 1 --batch 2)
    try 80 packs.py --repeat 3 $(small --repeat 1 --rollouts 4 --response 16)
    try 80 packs.py --discriminator --repeat 3 $(small --repeat 1 --rollouts 4 --response 16)
    try 90 sampler.py --random --repeat 2 $(small --repeat 1 --most 32)
    try 80 sampler.py --growth $(small --most 256)
}
echo "$failed cases failed; lines in $lines"
