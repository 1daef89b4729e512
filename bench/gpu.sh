#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in one command, with no network and the Python that is there:
# build, suite, compute-sanitizer, benchmark. Results go to bench/results/<GPU>/, machine described.
#
#   STEPS="build test sanitize bench"   which parts to run (default: all)
#   PYTHON=python3                      with torch, triton, pytest, hypothesis, pybind11, cmake, ninja
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
STEPS=${STEPS:-build test sanitize bench}
SITE=$PWD/build/gpu-site
BUILD=$PWD/build/gpu-cmake
export PYTHONPATH=$SITE:$PWD/tests PYTHONUNBUFFERED=1

GPU=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name(0))') || {
  echo "make gpu needs an NVIDIA GPU that torch sees." >&2
  exit 2
}
SLUG=$(echo "$GPU" | tr '[:upper:] ' '[:lower:]-' | tr -cd 'a-z0-9-')
RESULTS=bench/results/$SLUG
mkdir -p "$RESULTS"
failed=()

# Runs a step's command, keeps its output, and goes on: a failure is reported at the end.
step() {
  local name=$1
  shift
  echo "== $name"
  if ! "$@" 2>&1 | tee "$RESULTS/$name.log"; then failed+=("$name"); fi
}

build() {
  # The build directory is this script's own; staging by hand needs neither pip nor a network.
  local capability
  capability=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability(0))')
  cmake -G Ninja -S . -B "$BUILD" -DWARPSTEP_CUDA=ON -DWARPSTEP_CUDA_ARCHS="$capability" \
    -DPython_EXECUTABLE="$(command -v "$PYTHON")" -DCMAKE_INSTALL_PREFIX="$SITE/warpstep" \
    -Dpybind11_DIR="$("$PYTHON" -m pybind11 --cmakedir)" &&
    rm -rf "$SITE" && mkdir -p "$SITE/warpstep/kernels" &&
    cp python/warpstep/*.py* python/warpstep/py.typed "$SITE/warpstep/" &&
    cp kernels/*.py "$SITE/warpstep/kernels/" &&
    cmake --build "$BUILD" && cmake --install "$BUILD" &&
    "$PYTHON" -m warpstep && nvidia-smi && nvcc --version
}

sanitize() {
  local tool status=0
  for tool in memcheck racecheck initcheck; do
    echo "-- $tool"
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$PYTHON" tests/sanitize.py || status=1
  done
  return $status
}

for name in $STEPS; do
  case $name in
    build) step build build ;;
    test) step test "$PYTHON" -m pytest tests -p no:cacheprovider -m "not slow" ;;
    sanitize) step sanitize sanitize ;;
    bench) step bench "$PYTHON" -m bench.run --device cuda --record ;;
    *) echo "no such step: $name" >&2 && exit 2 ;;
  esac
done

if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]} (see $RESULTS/)" >&2
  exit 1
fi
echo "all passed: $STEPS. Results: $RESULTS/. Next: make report, and commit both."
