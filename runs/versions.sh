#!/usr/bin/env bash
# The fast tests on the oldest and the newest versions that pyproject.toml allows, each in an
# environment of its own, one after the other: a line for each at the end, and in docs/tested.md by
# hand. An environment takes up to 7 GB and is removed afterwards.
#   bash runs/versions.sh [CASE ..]       "oldest 3.11", "newest 3.11", "oldest 3.13", "newest 3.13"
#   ENVS=/tmp/prism-versions bash runs/versions.sh       where the environments are made
#   KEEP=yes bash runs/versions.sh "newest 3.13"         leaves them, and takes those that are there
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
ENVS=${ENVS:-/tmp/prism-versions} KEEP=${KEEP:-}
if [ $# = 0 ]; then set -- "oldest 3.11" "newest 3.11" "oldest 3.13" "newest 3.13"; fi

required() { # oldest or newest, as pip takes it
    "$1" - "$2" <<'PY'
import sys, tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
lines = project["dependencies"]
for extra in ("math", "parquet", "plot", "tensorboard", "test"):
    lines += project["optional-dependencies"][extra]
for line in lines:
    if sys.argv[1] == "oldest":  # of those that have a lower bound
        line = line.split(",")[0].replace(">=", "==")
    print(line)
PY
}

try() { # oldest or newest, Python's version
    local env="$ENVS/$1-$2"
    local python=$env/bin/python
    if [ ! -e "$env/installed" ]; then
        "python$2" -m venv --clear "$env" || return 1
        required "$python" "$1" > "$env/requirements.txt" || return 1
        "$python" -m pip install -q --disable-pip-version-check -r "$env/requirements.txt" ||
            return 1
        touch "$env/installed"
    fi
    local versions result
    versions=$("$python" -c 'import torch, transformers
print(f"torch {torch.__version__}, transformers {transformers.__version__}")')
    OMP_NUM_THREADS=1 "$python" -m pytest -q -p no:cacheprovider > "$env.txt" 2>&1 || true
    result=$(tail -n 1 "$env.txt")
    lines+=("$1 on Python $2: $versions: $result")
    if [ ! "$KEEP" ]; then rm -rf "$env"; fi
}

lines=()
mkdir -p "$ENVS"
for case in "$@"; do
    # shellcheck disable=SC2086  # two words
    try $case || lines+=("$case: could not be installed")
done
printf "%s\n" "${lines[@]}"
echo "what failed: $ENVS/*.txt"
