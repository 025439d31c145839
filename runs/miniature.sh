#!/usr/bin/env bash
# What does an alignment stage buy? The arms of a comparison over seeds of an embedded world, at
# equal numbers of policy updates, and their table: tools/arms.py, whose --help says all.
#   bash runs/miniature.sh [--world tiny|miniature|known] [--seeds 0-9] [--jobs 2] [--table main]
set -euo pipefail
EXTRAS=
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
OMP_NUM_THREADS=1 exec python tools/arms.py "$@"
