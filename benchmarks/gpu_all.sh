#!/usr/bin/env bash
# Everything that waits for one GPU, in order of value: about 11 minutes of an H200. Each part leaves its file in FOLDER.
#
#     POISE_DATA=... POISE_INCEPTION=... benchmarks/gpu_all.sh FOLDER [SECONDS]
#
# SECONDS: no part is begun after so many, and the one that runs then is stopped (default 800).
set -u
cd "$(dirname "$0")/.."
out="$1" ends=$(($(date +%s) + ${2:-800}))
mkdir -p "$out"
export PYTHONPATH="$PWD/src:${PYTHONPATH:-}" PYTHONUNBUFFERED=1

part() { # NAME, the most seconds it may take, command
    local name="$1" most="$2" left=$((ends - $(date +%s)))
    shift 2
    [ "$left" -gt 15 ] || { echo "$name: no time left"; return; }
    echo "== $name, $left s left"
    timeout --signal TERM --kill-after 10 $((most < left ? most : left)) "$@" > "$out/$name.log" 2>&1
    echo "   exit code $?"
    tail -n 3 "$out/$name.log"
}

# 1. A recorded step equals an eager one, a network that cannot be recorded falls back.
part tests 100 python3 -m pytest -m gpu tests/test_captured.py -q -p no:cacheprovider
# 2. Seconds of an evaluation by part, TF32 against float32, the check against 50,000 training images (3.15).
part evaluation 120 python3 benchmarks/evaluation.py --json "$out/bench-evaluation.json"
# 3. One balance alone, then five at once: the same figures, and how much longer.
compare="python3 -m poise compare cifar10 --extractor inception --device cuda --seeds 1 --epochs 10 --second-epochs 20"
part one 90 $compare --balances computed --jobs 1 --out "$out/one"
part five 240 $compare --balances computed released learned learned:rate=100 optimal --jobs 5 --out "$out/five"
# 4. What TF32 and bfloat16 do to the result: three seeds each, stage 1 alone.
for precision in float32 ieee bfloat16; do
    part "$precision" 70 python3 -m poise compare cifar10 --extractor pixels --device cuda --balances computed --seeds 3 \
        --epochs 3 --stages 1 --priors normal --precision "$precision" --jobs 3 --out "$out/$precision"
done
# 5. Milliseconds of a step of every engine, and of five side by side.
part steps 200 python3 benchmarks/gpu.py --seconds 1 --json "$out/bench-gpu-steps.json" --only matrix "tf32 / stage" \
    "bfloat16 / stage" "side by side" "ieee / stage 1 / captured" "ieee / stage 2 / captured"
