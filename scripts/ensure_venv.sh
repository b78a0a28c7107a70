#!/usr/bin/env bash
# Makes .venv in the repository root, unless it is there and up to date, and prints the path of its interpreter.
# PYTHON chooses the interpreter to make it with. SSPFORMER_PYTHON names an interpreter that has everything installed
# already: it is used as it is, and no .venv is made.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"
stamp="$venv/sspformer-stamp"  # "incomplete" while installing, then the checksum of what was installed

say() { echo "sspformer: $*" >&2; }
fail() { say "error: $*"; exit 1; }

if [[ -n "${SSPFORMER_PYTHON:-}" ]]; then
  path="$(command -v "$SSPFORMER_PYTHON")" || fail "SSPFORMER_PYTHON is '$SSPFORMER_PYTHON', which is no program."
  [[ "$path" == /* ]] || path="$PWD/$path"
  echo "$path"
  exit
fi

python="${PYTHON:-python3}"
command -v "$python" > /dev/null || fail "'$python' is not installed: install Python 3.10 or newer, or set PYTHON."
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
  fail "'$python' is $("$python" --version 2>&1), but 3.10 or newer is needed: set PYTHON to a newer interpreter."
"$python" -c 'import ensurepip, venv' 2> /dev/null ||
  fail "'$python' has no venv module: install it (Debian and Ubuntu: apt install python3-venv), or set PYTHON."

wanted="$("$python" - "$root/constraints.txt" "$root/setup.cfg" << 'EOF'
import hashlib, pathlib, sys
contents = b"".join(pathlib.Path(name).read_bytes() for name in sys.argv[1:])
print("%d.%d" % sys.version_info[:2], hashlib.sha256(contents).hexdigest())
EOF
)"
if [[ -e "$venv" && ! -e "$stamp" ]]; then
  fail "$venv was not made by this project's scripts: remove it, or use it with SSPFORMER_PYTHON=$venv/bin/python."
fi
if [[ "$(cat "$stamp" 2> /dev/null)" != "$wanted" ]]; then
  say "installing into $venv with $("$python" --version) (once; some minutes, for the most part PyTorch) ..."
  rm -rf "$venv"
  mkdir "$venv"
  echo incomplete > "$stamp"
  "$python" -m venv "$venv"
  pins=(-c "$root/constraints.txt")
  if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    say "constraints.txt is for Python 3.11 or newer: installing what setup.cfg allows instead."
    pins=()
  fi
  pip=("$venv/bin/python" -m pip -qq --disable-pip-version-check install ${pins[@]+"${pins[@]}"})
  "${pip[@]}" torch==2.13.0 && "${pip[@]}" -e "$root[demo,test]" ||
    fail "the installation failed (see above); it starts afresh the next time."
  echo "$wanted" > "$stamp"
fi
echo "$venv/bin/python"
