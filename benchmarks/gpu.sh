#!/usr/bin/env bash
# On a GPU: the kernel's tests, all benchmarks and short training runs, the most important
# first. The same command continues with what has not ended well.
#
#     timeout 9m benchmarks/gpu.sh gpu_results --data DIR [--mae_repo DIR]
#
# Output: FOLDER/NAME.log, renamed to FOLDER/NAME.txt when the command has ended well.
# Further flags are those of bench.py: photographs, and a copy of facebookresearch/mae.
set -u
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh FOLDER --data DIR}") && shift
cd "$(dirname "$0")/.." && mkdir -p "$out"

run() {
    local log=$out/$1.log code
    if [ -e "$out/$1.txt" ]; then return; fi
    echo "$1: python ${*:2}"
    python "${@:2}" >"$log" 2>&1
    code=$?
    if [ $code = 0 ]; then mv "$log" "$out/$1.txt"; else echo "exit code $code, see $log"; fi
}

train=(attg_mae.py --log_every 1 --epochs 1)
large=(--model vit_large --batch_size 1024 --accum 4)
run tests -m pytest -q tests/test_kernel.py tests/test_loss.py
run kernel bench.py kernel --batch_size 256
run step bench.py step --precision bf16 --models vit_base vit_large "$@"
run headline -m torch.distributed.run --standalone --nproc_per_node=1 \
    "${train[@]}" "${large[@]}" --out "$out/headline"
run step-compiled bench.py step --precision bf16 --models vit_base --compile "$@"
run maps bench.py maps
run knn bench.py knn
run data bench.py data "$@"
run fp16 "${train[@]}" --out "$out/fp16" --precision fp16
run compiled "${train[@]}" --out "$out/compiled" --compile
