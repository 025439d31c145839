# Sourced by the other scripts: goes to the project's root and puts .venv first in PATH. Where it is
# missing it is made, with what pyproject.toml lists, at the versions of constraints.txt. A fraction
# of a second when nothing is missing.
#   EXTRAS   which optional dependencies, comma-separated
#   PYTHON   the interpreter that makes the environment
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
EXTRAS=${EXTRAS:-}

if [ ! -x .venv/bin/pip ]; then # pip comes last: without it the making was cut short
    python=${PYTHON:-python3}
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "$python is not Python 3.11 or newer: name one that is, as in" \
            "PYTHON=python3.12 bash $0" >&2
        exit 1
    fi
    if ! "$python" -m venv .venv; then
        echo "no virtual environment could be made in .venv" \
            "(on Debian: apt install python3-venv)" >&2
        exit 1
    fi
fi

want=$(cat pyproject.toml constraints.txt | cksum)
missing=
for extra in "" ${EXTRAS//,/ }; do # a stamp for each: a script with fewer extras installs nothing
    if [ "$(cat ".venv/installed-$extra" 2>/dev/null)" != "$want" ]; then missing=yes; fi
done
if [ "$missing" ]; then
    .venv/bin/python - ${EXTRAS//,/ } > .venv/requirements.txt <<'PY' || exit 1
import sys, tomllib  # the project itself is no package: only its lists are read

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted = project["dependencies"]
for extra in sys.argv[1:]:
    wanted += project["optional-dependencies"][extra]
print("\n".join(wanted))
PY
    .venv/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
        -r .venv/requirements.txt || exit 1
    for extra in "" ${EXTRAS//,/ }; do echo "$want" > ".venv/installed-$extra"; done
fi
export PATH="$PWD/.venv/bin:$PATH" TOKENIZERS_PARALLELISM=false
