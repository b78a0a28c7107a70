#!/usr/bin/env bash
# What a lent GPU is to do, in one command that stops in time and goes on where an earlier piece stopped.
#
#   bash benchmarks/gpu/run.sh OUT MINUTES [check|speed|study|weights ...]
#
#   check  the tests that need a GPU; one epoch of each workflow through monai.bundle run; exports
#   speed  the tables of a step, the loader and inference (benchmarks/gpu/speed.py)
#   study  the runs of the study in the order of their worth (benchmarks/gpu/study.py)
#   weights  trains what is to ship, into an OUT of its own
#
# In pieces of ten minutes, each with a pack of benchmarks/gpu/pack.py, which says how they are made:
#   1. check.tar: run.sh OUT 9 check speed
#   2. study.tar: run.sh OUT 9 study, again and again until it says that no run is left
#   3. study.tar: run.sh OUT 9 weights, in the same way; with hippocampus.tar unpacked beside it the hippocampus, too
# A pack has all the code. Unpack it into an empty folder and start there, on a machine with PyTorch and a CUDA device;
# nothing is downloaded. OUT gets at most eight files: results.jsonl, speed.jsonl, check.txt and five encoders.
# What is finished is not repeated, if OUT has the files of the last piece, or PREVIOUS names the folder that has them.
# SMOKE=1 runs toy sizes on the CPU.
set -euo pipefail
usage="usage: run.sh OUT MINUTES [check|speed|study|weights ...]"
out="${1:?$usage}"
minutes="${2:?$usage}"
shift 2
(($#)) || set -- check speed study
start=$SECONDS
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
mkdir -p "$out"
out="$(cd "$out" && pwd)"
[[ -z "${PREVIOUS:-}" ]] || cp -n "$PREVIOUS"/* "$out"/
cd "$root"
if compgen -G "wheels/*.whl" > /dev/null && [[ ! -d site ]]; then
  python3 -m pip install -q --no-index --no-deps --target site wheels/*.whl
fi
export PYTHONPATH="$root/custom:$root${PYTHONPATH:+:$PYTHONPATH}:$root/site"
export TORCHINDUCTOR_CACHE_DIR="$root/compiled"  # a network is compiled once for all runs
python3 -m benchmarks.gpu.pack --unpack . --out data
left() { echo $(((minutes * 60 - (SECONDS - start)) / 60)); }
smoke=()
[[ -z "${SMOKE:-}" ]] || smoke=(--smoke)

for what in "$@"; do
  (($(left) > 0)) || break
  echo "== $what, $(left) of $minutes minutes left"
  part="$(left)"
  [[ "$what" != check || "$part" -le 5 ]] || part=5
  case "$what" in
    check | speed) python3 -m "benchmarks.gpu.$what" --out "$out" --minutes "$part" "${smoke[@]}" || true ;;
    study) python3 -m benchmarks.gpu.study --out "$out" --data data --minutes "$part" "${smoke[@]}" || true ;;
    weights) python3 -m benchmarks.gpu.study --weights --out "$out" --data data --minutes "$part" "${smoke[@]}" || true ;;
    *) echo "run.sh: '$what' is none of check, speed, study, weights" >&2; exit 2 ;;
  esac
done
echo "== finished after $((SECONDS - start)) s"
[[ ! -f "$out/results.jsonl" ]] || tail -n 12 "$out/results.jsonl" | cut -c 1-300
