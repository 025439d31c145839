#!/usr/bin/env bash
# Style and tests, in the environment with all extras: three minutes on two cores.
#   bash runs/test.sh [--slow] [arguments for pytest]        --slow: the slow tests too
set -euo pipefail
EXTRAS=math,parquet,plot,wandb,tensorboard,test
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

if [ "${1:-}" = --slow ]; then
    shift
    set -- -m "slow or not slow" "$@"
fi
python -m ruff check .
python -m ruff format --check .
OMP_NUM_THREADS=1 python -m pytest -q -n 2 "$@" # one thread for each of the two workers
