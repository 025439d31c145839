#!/usr/bin/env bash
# Every claim on one GPU, within 9 minutes: a JSON line each on the terminal and in $OUT/gpu.jsonl. A case that fails or
# outlasts its limit says so and the rest go on.
#   bash bench/gpu.sh            PYTHON=python3 to use an environment that is there; DEVICE=cpu to try the script itself
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)} DEVICE=${DEVICE:-cuda} OUT=${OUT:-out}
mkdir -p "$OUT"
: > "$OUT/gpu.jsonl"
failed=0
try() { # seconds, script, arguments
    local limit=$1 begin=$SECONDS
    shift
    if ! timeout "$limit" "$PYTHON" "bench/$1" --device "$DEVICE" "${@:2}" 2> "$OUT/gpu.err" | tee -a "$OUT/gpu.jsonl"; then
        failed=$((failed + 1))
        echo "{\"failed\": \"$*\", \"after_seconds\": $((SECONDS - begin)), \"why\": $(tail -n 3 "$OUT/gpu.err" |
            "$PYTHON" -c 'import json, sys; print(json.dumps(sys.stdin.read()[-400:]))')}" | tee -a "$OUT/gpu.jsonl"
    fi
}
set -o pipefail
try 90 check.py # does it compute the same there? before how fast
try 60 logprob.py --repeat 3
try 60 vision.py --repeat 5
try 80 packs.py --repeat 3
try 80 packs.py --discriminator --repeat 3
try 90 sampler.py --repeat 2
try 80 sampler.py --growth
echo "$failed cases failed; lines in $OUT/gpu.jsonl"
