#!/usr/bin/env bash
# Tests, times, bytes and compute-sanitizer on a GPU, in less than nine minutes on an H100:
#
#     bench/gpu.sh [DIR]           results go to DIR, else to $OUT, else to bench/results/gpu
#     bench/gpu.sh --tiny [DIR]    every step on a CPU with tiny sizes, and stand-ins for the tools
#                                  of a GPU; no figure is that of a GPU
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
    PATH=$PWD/bench/stand_ins:$PATH
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

rm -f "$out"/{gpu,cpu}.{json,csv,png} "$out"/{dram,ncu}.csv "$out"/*.log # of an earlier run
echo step,exit_code,seconds,limit >"$out/steps.csv"

# step NAME SECONDS COMMAND...: its output in NAME.log, its exit code (124: out of time) on record.
step() {
    local name=$1 limit=$2 started=$SECONDS code
    shift 2
    timeout --kill-after=5 "$limit" "$@" >"$out/$name.log" 2>&1
    code=$?
    if ((code)) && grep -q ERR_NVGPUCTRPERM "$out/$name.log"; then
        skip "$name" "the counters of this GPU may not be read (ERR_NVGPUCTRPERM)"
        return
    fi
    echo "$name,$code,$((SECONDS - started)),$limit" >>"$out/steps.csv"
    echo "== $name: exit code $code, $((SECONDS - started)) s"
    tail -n 15 "$out/$name.log"
}
skip() {
    echo "$1,skipped: $2,," >>"$out/steps.csv"
    echo "== $1: skipped, $2"
}
pytest=("$python" -m pytest -p no:cacheprovider --durations=5)

# The tests wait for the oracle on the CPU most of the time, and the compiler uses the CPU alone: all
# at once. Nothing else runs while times are taken, or bytes.
if [[ $tiny ]]; then
    step tests 60 "${pytest[@]}" tests/kernels/test_addressing.py tests/test_bad_input.py \
        -k "rescale or error" &
else
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
    for file in tests/kernels/test_*.py tests/test_{api,bad_input,capture,operators,linear,family,dkd,kd_ratio}.py; do
        name=${file##*/test_}
        step "tests-${name%.py}" 200 "${pytest[@]}" "$file" &
    done
fi
step compile 200 "$python" -c \
    "from bench.questions import gpu; gpu.compile_all(tiny=bool('$tiny'))" &
wait

if [[ $tiny ]]; then seconds=20; else seconds=185; fi
step times $((seconds + 20)) "$python" -m bench gpu --output "$out" --seconds "$seconds" $tiny

if command -v ncu >/dev/null; then
    step dram 45 "$python" -m bench dram --output "$out" $tiny
else
    skip dram "ncu is not on PATH"
fi

if [[ $tiny ]]; then sanitized=rescale; else sanitized="unaligned and 5-2 or overwrite"; fi
for tool in memcheck racecheck synccheck; do
    if command -v compute-sanitizer >/dev/null; then
        options=(--tool "$tool" --error-exitcode 86)
        [[ $tool == memcheck ]] && options+=(--report-api-errors no)
        # PyTorch's allocator would hide an access behind the end of a tensor.
        step "$tool" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            compute-sanitizer "${options[@]}" \
            "${pytest[@]}" tests/kernels/test_addressing.py -k "$sanitized" &
    else
        skip "$tool" "compute-sanitizer is not on PATH"
    fi
done
wait

echo "== $out/steps.csv"
cat "$out/steps.csv"
! grep -qE '^[^,]+,[1-9]' "$out/steps.csv"
