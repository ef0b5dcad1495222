#!/usr/bin/env bash
# Builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer (-DMOEKERNELS_SANITIZE=ON), and runs every op
# on random cases on every instruction set of this machine. Ends with the first access or operation that is not allowed.
#
#   tests/robustness/sanitize.sh [CASES] [SEED]
#
# PYTHON is an interpreter with torch and hypothesis (default: python), and without an editable moekernels. SITE keeps the
# build in a folder, and uses it again.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python}
site=${SITE:-}
if [ -z "$site" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
fi

if [ ! -e "$site/moekernels" ]; then
  MOEKERNELS_CUDA=off "$python" -m pip install --quiet --no-deps --target "$site" \
    -C cmake.define.MOEKERNELS_SANITIZE=ON -C cmake.build-type=RelWithDebInfo -C build-dir="$site/build" .
fi

export LD_PRELOAD ASAN_OPTIONS UBSAN_OPTIONS
# The program is Python, which links none of them; libstdc++ has to be there when libasan looks for its exceptions.
LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libstdc++.so)"
ASAN_OPTIONS=detect_leaks=0:abort_on_error=0
UBSAN_OPTIONS=print_stacktrace=1
# Tensors that end where their memory does, and not in memory kept from others.
export MOEKERNELS_KEEP_MEMORY=off OMP_NUM_THREADS=1 PYTHONPATH="$site:$PWD" PYTHONWARNINGS=ignore
"$python" -c 'import sys, moekernels; assert moekernels.__file__.startswith(sys.argv[1]), moekernels.__file__' "$site"
"$python" -m tests.robustness.fuzz_ops --cases "${1:-600}" --seed "${2:-0}"
