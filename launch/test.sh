#!/usr/bin/env bash
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'TEXT'
Usage: ./launch/test.sh [pytest arguments]

Without arguments: the linter, the formatter's check, the type checker, then the tests that every change must pass.
With arguments: pytest alone, with those arguments; paths are seen from the checkout's root.

    ./launch/test.sh tests/unit -k store
    ./launch/test.sh -m slow       tests that take minutes
    ./launch/test.sh -m gpu        tests that need a CUDA device
    ./launch/test.sh -m s3real     tests that need a real S3 server
    ./launch/test.sh -m bench      measurements; they print times and assert none
    ./launch/test.sh -m peers      objectives against other projects' published losses (README says what to install)

The first run makes .venv and installs the locked set for this machine, with or without a GPU; later runs reuse it.
DISTFT_TEST_PROCESSES is how many processes share the tests of every change: 2, or 0 for none but the one; each takes up to 4 GB.
PYTHON chooses the interpreter (3.11 to 3.13); DISTFT_DEVICE=cpu or gpu overrides what nvidia-smi says; PIP_FIND_LINKS
and PIP_EXTRA_INDEX_URL are pip's own.
TEXT
}

lint() {
    local failed=()
    ruff check . || failed+=("ruff check")
    ruff format --check . || failed+=("ruff format")
    pyright --pythonpath "$venv/bin/python" || failed+=("pyright")
    if ((${#failed[@]})); then
        printf -v failed '%s, ' "${failed[@]}"
        die "${failed%, } found something; it is above. The tests were not run"
    fi
}

case ${1:-} in
    -h | --help)
        usage
        exit
        ;;
esac

prepare_environment
cd -- "$root"

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0 PYRIGHT_PYTHON_IGNORE_WARNINGS=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Anyone who reaches a Ray cluster can run code on it, on loopback too: the tests' clusters ask for a token of this run,
# as real ones do. Given in the environment it is not written to the home directory.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
if [[ $RAY_AUTH_MODE == token && -z ${RAY_AUTH_TOKEN:-}${RAY_AUTH_TOKEN_PATH:-} ]]; then
    RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
    export RAY_AUTH_TOKEN
fi

if (($# == 0)); then
    lint
    # A file at a time by each of two processes. Eight failures: something is wrong with the machine or with everything; say so while
    # someone still waits.
    set -- --numprocesses="${DISTFT_TEST_PROCESSES:-2}" --dist=loadfile --durations=12 --maxfail=8
fi
exec python -m pytest "$@"
