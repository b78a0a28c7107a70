#!/usr/bin/env bash
# Pretrains, fine-tunes, scores and draws, in about ten minutes on a CPU: ./quickstart.sh --help
# PYTHON and SSPFORMER_PYTHON: see scripts/ensure_venv.sh.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
for argument in "$@"; do
  case "$argument" in -h | --help) exec "${SSPFORMER_PYTHON:-${PYTHON:-python3}}" "$root/scripts/quickstart.py" --help ;; esac
done
python="$("$root/scripts/ensure_venv.sh")"
export PYTHONPATH="$root/custom${PYTHONPATH:+:$PYTHONPATH}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"  # threads that wait actively starve beside another process
exec "$python" "$root/scripts/quickstart.py" "$@"
