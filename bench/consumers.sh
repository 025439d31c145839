#!/usr/bin/env bash
# Other projects' tools on what a run leaves, each in an environment of its own: a line for each,
# and for one that fails its last words. It installs several GB, and is not part of CI.
#
#   bash bench/consumers.sh                              on out/tiny-0/align
#   bash bench/consumers.sh ckpt/align polars trl        on another run; some of the tools
#   ENVIRONMENTS=/tmp/mine bash bench/consumers.sh       where the environments are made, and kept
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
RUN=${1:-out/tiny-0/align}
shift || true
ENVIRONMENTS=${ENVIRONMENTS:-/tmp/prism-consumers}
if [ $# -eq 0 ]; then set -- jq datasets pandas duckdb polars pyarrow pipeline serve trl; fi
failed=0

# environment NAME PACKAGE..: makes it where it is not there
environment() {
    local name=$1
    shift
    if [ ! -e "$ENVIRONMENTS/$name/made" ]; then
        python3 -m venv "$ENVIRONMENTS/$name"
        "$ENVIRONMENTS/$name/bin/pip" install -q "$@"
        touch "$ENVIRONMENTS/$name/made"
    fi
}

# Beside a torch for CPUs the torchvision of PyPI lacks its own operators and cannot be imported.
# Nobody here calls them: names for the two that it asks for are enough.
name_nms() {
    if ! "$ENVIRONMENTS/models/bin/python" -c "import torchvision" 2> /dev/null; then
        cat > "$(echo "$ENVIRONMENTS"/models/lib/python3*/site-packages)/sitecustomize.py" <<'PY'
import torch

library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
PY
    fi
}

# jq has no environment: it reads every line, or says where it cannot.
ask_jq() {
    local rows
    rows=$(jq -c 'select(.loss) | .loss' "$RUN/log.jsonl" | wc -l)
    echo "jq ($(jq --version)): $rows losses in log.jsonl," \
        "$(jq -c '.rollouts | length' "$RUN/rollouts.jsonl" | wc -l) groups in rollouts.jsonl"
}

try() {
    local name=$1 place=models
    if [ "$name" = jq ]; then
        ask_jq
        return
    fi
    case $name in
        datasets | pandas | duckdb | polars | pyarrow) place=readers ;;
    esac
    if [ $place = readers ]; then
        environment readers datasets pandas duckdb polars pyarrow
    else
        environment models torch torchvision transformers==5.23.0 trl accelerate datasets openai \
            fastapi uvicorn pillow
        name_nms
    fi
    "$ENVIRONMENTS/$place/bin/python" bench/consumers.py "$name" "$RUN" 2> "$ENVIRONMENTS/errors"
}

for name in "$@"; do
    if ! try "$name"; then
        failed=1
        echo "$name FAILED: $(tail -1 "$ENVIRONMENTS/errors")"
    fi
done
exit $failed
