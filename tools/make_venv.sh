#!/bin/sh
# Make or update the virtual environment $1 from pyproject.toml and constraints.txt. The Makefile calls it.
# PYTHON names the interpreter; TORCH_INDEX one more package index.
set -eu
venv=$1

works() { # a Python of the right version that can make a virtual environment (pyenv's shims may name one that is not there)
    "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    if ! works "$PYTHON"; then
        echo "error: PYTHON=$PYTHON is not a Python 3.11 to 3.13 with venv: name another one" >&2
        exit 2
    fi
    # another interpreter than the one that the environment has: make it again
    if [ -x "$venv/bin/python" ]; then
        wanted=$("$PYTHON" -c 'import sys; print(sys.base_prefix, sys.version)')
        has=$("$venv/bin/python" -c 'import sys; print(sys.base_prefix, sys.version)' || true)
        [ "$wanted" = "$has" ] || rm -rf "$venv"
    fi
fi

if ! { [ -x "$venv/bin/python" ] && works "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; }; then
    if [ -z "${PYTHON:-}" ]; then
        for candidate in python3.11 python3.12 python3.13 python3; do
            if works "$candidate"; then
                PYTHON=$candidate
                break
            fi
        done
    fi
    if [ -z "${PYTHON:-}" ]; then
        echo "error: no Python 3.11 to 3.13 with venv here: install one (Debian: apt install python3-venv)" \
            "or say make PYTHON=/path/to/python" >&2
        exit 2
    fi
    echo "making $venv with $("$PYTHON" --version)"
    "$PYTHON" -m venv --clear "$venv"
fi

echo "installing what pyproject.toml and constraints.txt ask for"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -c constraints.txt -e '.[dev]'
