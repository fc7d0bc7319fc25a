#!/usr/bin/env bash
# Tests, times and compute-sanitizer on a GPU, in less than nine minutes on an H100:
#
#     bench/gpu.sh [DIR]           results go to DIR, else to $OUT, else to bench/results/gpu
#     bench/gpu.sh --tiny [DIR]    every step on a CPU with tiny sizes; no figure is that of a GPU
#
# It needs this checkout, PyTorch, Triton, pytest, numpy and matplotlib, and no network; PYTHON
# chooses the interpreter. A step that fails is recorded in DIR/steps.csv and the rest goes on; the
# exit code is 0 if no step failed.
set -uo pipefail
cd "$(dirname "$0")/.."

tiny=
if [[ ${1-} == --tiny ]]; then
    tiny=--tiny
    shift
fi
mkdir -p "${1:-${OUT:-bench/results/gpu}}" || exit 2
out=$(cd "${1:-${OUT:-bench/results/gpu}}" && pwd)
python=${PYTHON:-python3}
export PYTHONPATH=$PWD
export GLOO_SOCKET_IFNAME=lo # the test of DTensor logits; a machine without a network has no other
unset AKL_AUTOTUNE TRITON_INTERPRET

if [[ -z $tiny ]] && ! "$python" -c 'import torch; assert torch.cuda.is_available()'; then
    echo "bench/gpu.sh: PyTorch sees no GPU here; --tiny runs every step on a CPU" >&2
    exit 2
fi

rm -f "$out"/{gpu,cpu}.{json,csv,png} "$out"/*.log # of an earlier run
echo step,exit_code,seconds >"$out/steps.csv"

# step NAME SECONDS COMMAND...: its output in NAME.log, its exit code (124: out of time) on record.
step() {
    local name=$1 limit=$2 started=$SECONDS code
    shift 2
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    echo "$name,$code,$((SECONDS - started))" >>"$out/steps.csv"
    echo "== $name: exit code $code, $((SECONDS - started)) s"
    tail -n 15 "$out/$name.log"
}
skip() {
    echo "$1,skipped: $2," >>"$out/steps.csv"
    echo "== $1: skipped, $2"
}
pytest=("$python" -m pytest -p no:cacheprovider --durations=5)

# The tests wait for the oracle on the CPU most of the time, and the compiler uses the CPU alone: all
# at once. Nothing else runs while times are taken.
if [[ $tiny ]]; then
    step tests 60 "${pytest[@]}" tests/kernels/test_addressing.py tests/test_bad_input.py \
        -k "rescale or error"
    skip compile "a CPU runs no kernels here"
else
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
    step tests-oracle 230 "${pytest[@]}" tests/kernels/test_oracle.py &
    step tests-kernels 230 "${pytest[@]}" tests/kernels --ignore=tests/kernels/test_oracle.py &
    step tests-api 230 "${pytest[@]}" tests/test_api.py tests/test_bad_input.py \
        tests/test_operators.py &
    step tests-linear 230 "${pytest[@]}" tests/test_linear.py &
    step compile 230 "$python" -c "from bench.questions import gpu; gpu.compile_all()" &
    wait
fi

if [[ $tiny ]]; then seconds=20; else seconds=205; fi
step times $((seconds + 30)) "$python" -m bench gpu --output "$out" --seconds "$seconds" $tiny

if [[ $tiny ]]; then
    skip sanitizer "there is no GPU"
elif ! command -v compute-sanitizer >/dev/null; then
    skip sanitizer "compute-sanitizer is not on PATH"
else
    # PyTorch's allocator would hide an access behind the end of a tensor.
    step sanitizer 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
        compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 86 \
        "${pytest[@]}" tests/kernels/test_addressing.py -k "unaligned and 5-2 or overwrite"
fi

echo "== $out/steps.csv"
cat "$out/steps.csv"
! grep -qE '^[^,]+,[1-9]' "$out/steps.csv"
