#!/usr/bin/env bash
# Installs what is needed into .venv, once, and runs the demo. Arguments go to `distft demo`.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment
exec distft demo "$@"
