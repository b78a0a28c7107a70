#!/usr/bin/env bash
# Lints the code and runs the tests, in a process for each core: ./runtests.sh [pytest arguments]
# PYTHON and SSPFORMER_PYTHON: see scripts/ensure_venv.sh.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="$("$root/scripts/ensure_venv.sh")"
cd "$root"
export PYTHONPATH="$root/custom${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"  # a core for each process
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"  # threads that wait actively starve beside another process

folders=()
for folder in custom tests benchmarks scripts examples; do
  if [[ -d "$folder" ]]; then folders+=("$folder"); fi
done
echo "== ruff check"
"$python" -m ruff check "${folders[@]}"
echo "== ruff format --check"
"$python" -m ruff format --check "${folders[@]}"
echo "== pytest"
exec "$python" -m pytest -n auto --maxprocesses 4 --dist worksteal "$@"
