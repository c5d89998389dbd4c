# Makes and reuses the virtual environment of this checkout, .venv. Sourced by demo.sh and test.sh, not run by itself.
# shellcheck shell=bash
#
# prepare_environment   leaves .venv complete, its programs first on PATH, and $device saying "cpu" or "gpu".
#
# .venv holds exactly one locked set, docker/requirements-$device.txt, and this checkout, editable. It is made anew when
# the set, the Python version or the checkout's place changes, or when an earlier installation did not finish; a change
# of pyproject.toml alone installs the checkout again. .venv/distft-stamp says what is in it and is written last.
#
# What a user may set:
#   PYTHON          the interpreter to build on (3.11 to 3.13)
#   DISTFT_DEVICE   cpu or gpu, instead of asking nvidia-smi
#   PIP_*           where pip looks: PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL can offer a CPU build of torch

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv
stamp=$venv/distft-stamp

say() { printf '%s\n' "$*" >&2; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

supported() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    if [[ -n ${PYTHON:-} ]]; then
        command -v "$PYTHON" >/dev/null || die "PYTHON is set to $PYTHON, which cannot be run"
        supported "$PYTHON" || die "PYTHON is set to $PYTHON, which is not Python 3.11, 3.12 or 3.13"
        python=$PYTHON
        return
    fi
    for python in python3.13 python3.12 python3.11 python3; do
        if supported "$python"; then return; fi
    done
    die "no Python 3.11, 3.12 or 3.13 was found; install one, or set PYTHON to its path"
}

choose_device() {
    device=${DISTFT_DEVICE:-}
    if [[ -z $device ]]; then
        device=cpu
        if [[ $(nvidia-smi -L 2>/dev/null) == *GPU* ]]; then device=gpu; fi
    fi
    case $device in
        cpu | gpu) ;;
        *) die "DISTFT_DEVICE is $device; it may be cpu or gpu" ;;
    esac
    lock=$root/docker/requirements-$device.txt
    [[ -r $lock ]] || die "the locked set $lock is missing"
}

digest() { sha256sum | cut -d ' ' -f 1; }

describe_wanted() {
    local version
    version=$("$python" -c 'import sys; print(sys.version)')
    wanted_set="set $({ printf '%s\n' "$version" "$root" "$device" && cat "$lock" "$root/launch/environment.sh"; } | digest)"
    wanted_project="project $(digest <"$root/pyproject.toml")"
}

has_stamp() { [[ -r $stamp ]] && grep -qxF "$1" "$stamp" && "$venv/bin/python" -c '' 2>/dev/null; }
is_ready() { has_stamp "$wanted_set" && has_stamp "$wanted_project"; }

pip() {
    PIP_USER=0 PIP_ROOT_USER_ACTION=ignore "$venv/bin/python" -m pip --disable-pip-version-check --no-input "$@"
}

# Only errors are printed, except that someone at a terminal sees how far the big download is.
install() {
    local what=$1 loudness=(-qq)
    shift
    if [[ $what == torch* && -t 2 ]]; then loudness=(); fi
    say "installing $what"
    pip install ${loudness[@]+"${loudness[@]}"} "$@" >&2 || die "could not install $what; what pip says about it is above"
}

pinned() { sed -n "s/^$1==\([^ ]*\).*/\1/p" "$lock"; }

make_venv() {
    local said version
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$python has no venv module; on Debian or Ubuntu, 'apt install python$version-venv' brings it"
    say "making an environment for Python $version ($device) in $venv"
    said=$("$python" -m venv --clear "$venv" 2>&1) || die "could not make $venv: ${said##*$'\n'}"
}

# torch goes first and alone, so that nothing after it can change it. With a version alone, pip prefers a local build such
# as 2.13.0+cpu to the registry's 2.13.0, which is the CUDA build.
install_torch() {
    local version offer spec
    version=$(pinned torch)
    spec="torch==$version"
    offer=$(pip install -qq --dry-run --ignore-installed --no-deps --report - "$spec" |
        "$venv/bin/python" -c 'import json, sys; print(json.load(sys.stdin)["install"][0]["metadata"]["version"])' 2>/dev/null) ||
        die "pip finds no torch $version for this Python; what it says about it is above"
    if [[ $device == gpu && $offer == *+cpu ]]; then
        spec="torch===$version"
    elif [[ $device == cpu && $offer != *+cpu ]]; then
        say "note: pip offers only the CUDA build of torch $version, several GB with its libraries. It runs without a GPU too."
        say "note: for the small CPU build, set PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL to a place that has torch $version+cpu."
    fi
    install "torch $version" -c "$lock" "$spec"
}

# reasoning-gym imports pycosat as it is imported, but calls it for its zebra puzzles alone. pycosat has no wheels and
# needs a C compiler, so it is not in the locked sets. A real pycosat, installed later, takes precedence over this module.
stand_in_for_pycosat() {
    local packages
    packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    cat >"$packages/pycosat.py" <<'PYTHON'
"""Stands in for pycosat, which needs a C compiler to install and which reasoning_gym calls for zebra puzzles alone."""


def itersolve(*args, **kwargs):
    raise ImportError("zebra puzzles need pycosat: pip install pycosat (it is built with a C compiler)")


solve = itersolve
PYTHON
}

install_set() {
    make_venv
    install "pip $(pinned pip)" "pip==$(pinned pip)"
    install_torch
    install "$(grep -c '^[^#]' "$lock") locked packages" --no-deps --build-constraint "$lock" -r "$lock"
    stand_in_for_pycosat
}

install_project() {
    local unmet
    install "this checkout" --no-deps --no-build-isolation -e "$root"
    unmet=$(pip check 2>/dev/null | grep '^distft ' | head -n 1) || true
    [[ -z $unmet ]] || die "the locked set does not fit pyproject.toml ($unmet); run launch/lock.sh"
}

prepare_environment() {
    local turn started=$SECONDS
    [[ $(uname -sm) == "Linux x86_64" ]] || die "the locked sets are for Linux on x86_64, not $(uname -sm)"
    unset PYTHONHOME
    find_python
    choose_device
    describe_wanted
    if ! is_ready; then
        # Of two scripts started at once one installs and the other waits; where files cannot be locked, neither waits.
        exec {turn}<"$root/launch/environment.sh"
        if ! flock -n "$turn" 2>/dev/null; then
            say "waiting for another installation in this checkout"
            flock "$turn" 2>/dev/null || true
        fi
        if ! has_stamp "$wanted_set"; then
            rm -f "$stamp" 2>/dev/null || die "cannot write in $venv"
            install_set
        fi
        if ! is_ready; then
            rm -f "$stamp" || die "cannot write in $venv"
            install_project
            printf '%s\n' "$wanted_set" "$wanted_project" >"$stamp.new"
            mv "$stamp.new" "$stamp"
            say "installed in $((SECONDS - started)) s"
        fi
        exec {turn}<&-
    fi
    export VIRTUAL_ENV=$venv PATH=$venv/bin:$PATH
    if [[ $device == cpu ]]; then export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}; fi
}
