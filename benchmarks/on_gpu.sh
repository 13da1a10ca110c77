#!/usr/bin/env bash
# Everything worth knowing from a real card, in one command and at most eight minutes:
#
#     benchmarks/on_gpu.sh DIRECTORY
#
# In this order: the environment; floors, which nothing can be quicker than; every kernel against float64, then timed;
# what cuBLASLt offers; whole steps beside their peers; hardware counters of their kernels; MNIST to 98 % and counts of
# launches, allocations and copies; small cases under compute-sanitizer; the rest of the tests.
#
# Writes DIRECTORY/results.jsonl, a line a result, and DIRECTORY/summary.md. Needs CuPy, no network; the package need not
# be installed. PYTHON says which Python (python3). Exits with 0 where every part that could run is green.
set -uo pipefail

if [ $# -ne 1 ]; then
    echo "usage: benchmarks/on_gpu.sh DIRECTORY" >&2
    exit 2
fi
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
mkdir -p -- "$1" && directory=$(cd -- "$1" && pwd) || exit 2
cd -- "$root" || exit 2
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" -m benchmarks.on_gpu "$directory"
