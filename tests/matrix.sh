#!/usr/bin/env bash
# The README's two commands, in a fresh clone and a fresh environment each, over versions of torch and of Python: by hand,
# and before a release. Its table goes to docs/installation.md.
#
#   bash tests/matrix.sh                                all of RUNS below, for the Pythons that are here
#   bash tests/matrix.sh 3.12:2.13.0 3.13:newest        these: a Python, and a torch or `newest`
#
# Each run takes as long as the test-suite, and some gigabytes of disk for as long as it lasts; where there is an nvcc, the
# CUDA kernels are compiled besides, unless MOEKERNELS_CUDA=off. PYTHONS may name more folders with a python3.X in them,
# MATRIX_PYTEST more words for pytest.
set -uo pipefail
cd "$(dirname "$0")/.."

RUNS="3.10:2.11.0 3.11:2.13.0 3.12:2.13.0 3.13:newest 3.14:newest"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The command in the README's code block that follows the line `<!-- ci: NAME -->`.
readme_command() {
  awk -v marker="<!-- ci: $1 -->" '$0 == marker {found = 1; next} found && /^```/ {if (inside) exit; inside = 1; next} inside' README.md
}

# Where a Python of a version is: on the path, in a folder of PYTHONS, or one that pyenv keeps.
python_at() {
  local folder
  for folder in ${PYTHONS:-} "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin; do
    if [ -x "$folder/python$1" ]; then echo "$folder/python$1"; return; fi
  done
  command -v "python$1"
}

machine() {
  sed -n 's/^model name[^:]*: //p' /proc/cpuinfo 2>/dev/null | sort -u | head -1
}

# The result of one command: `passed`, with what pytest counted, or `failed`.
result() {
  local status=$1 log=$2 counts
  counts=$(grep -oE '[0-9]+ (passed|failed|error)[^=]* in [0-9.]+s.*' "$log" 2>/dev/null | tail -1 | sed 's/ in .*//')
  if [ "$status" = 0 ]; then echo "${counts:-passed}"; else echo "**${counts:-failed}**"; fi
}

failed=0
rows=()
for run in ${*:-$RUNS}; do
  version=${run%%:*} torch=${run#*:}
  if ! python=$(python_at "$version"); then
    echo "--- no Python $version here" >&2
    continue
  fi
  folder="$work/$version-$torch"
  git clone --quiet . "$folder/checkout"
  (
    set -e
    "$python" -m venv "$folder/venv"
    # shellcheck disable=SC1091
    source "$folder/venv/bin/activate"
    cd "$folder/checkout"
    requirement=$([ "$torch" = newest ] && echo torch || echo "torch==$torch")
    python -m pip install --quiet "$requirement"
    python - >"$folder/versions" <<'PYTHON'
import platform

import torch

print(platform.python_version(), "|", torch.__version__)
PYTHON
    set +e
    (eval "$(readme_command run)") >"$folder/run.log" 2>&1
    echo $? >"$folder/run.status"
    (export PYTEST_ADDOPTS="${MATRIX_PYTEST:-}"; eval "$(readme_command test)") >"$folder/test.log" 2>&1
    echo $? >"$folder/test.status"
    python -c 'import moekernels; print(moekernels.build_info()["cpu_isa"])' >"$folder/isa"
  )
  for part in run test; do
    status=$(cat "$folder/$part.status" 2>/dev/null || echo 1)
    if [ "$status" != 0 ]; then
      failed=1
      echo "--- $run, $part: the end of its output" >&2
      tail -n 40 "$folder/$part.log" >&2
    fi
  done
  row="| $(cat "$folder/versions" 2>/dev/null || echo "$version | $torch") | $(cat "$folder/isa" 2>/dev/null || echo –)"
  row="$row | $(result "$(cat "$folder/run.status" 2>/dev/null || echo 1)" "$folder/run.log")"
  row="$row | $(result "$(cat "$folder/test.status" 2>/dev/null || echo 1)" "$folder/test.log") |"
  rows+=("$row")
  echo "$row" >&2
  rm -rf "$folder"
done

echo "$(date +%F), $(machine), $(nproc) cores, revision $(git rev-parse --short HEAD):"
echo
echo "| Python | torch | kernels | install and run | install and test |"
echo "| --- | --- | --- | --- | --- |"
printf '%s\n' "${rows[@]}"
exit $failed
