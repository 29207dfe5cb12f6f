#!/usr/bin/env bash
# Sets up .venv and runs the tests. Arguments go to pytest: scripts/test.sh tests/test_quant.py -k nf4
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
prepare_environment llamacpp,dev
exec python -m pytest "$@"
