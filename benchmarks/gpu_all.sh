#!/usr/bin/env bash
# Run the measurements that wait for one GPU (about 35 minutes of an H200), or some of them. Each
# part writes its files into FOLDER.
#
#     POISE_DATA=... POISE_INCEPTION=... benchmarks/gpu_all.sh FOLDER [SECONDS] [PART...]
#
# SECONDS: the time limit (default 800). The running part is stopped then, and no other begins.
# PART: defaults, balances, tests, evaluation, one, five, precisions, steps (default: all of them).
set -u
cd "$(dirname "$0")/.."
out="$1" ends=$(($(date +%s) + ${2:-800})) chosen=" ${*:3} "
mkdir -p "$out"
export PYTHONPATH="$PWD/src:${PYTHONPATH:-}" PYTHONUNBUFFERED=1

part() { # NAME, its time limit in seconds, COMMAND...
    local name="$1" most="$2" left=$((ends - $(date +%s)))
    shift 2
    [[ "$chosen" == "  " || "$chosen" == *" ${name%%-*} "* ]] || return
    [ "$left" -gt 15 ] || { echo "$name: no time left"; return; }
    echo "== $name, $left s left"
    timeout --signal TERM --kill-after 10 $((most < left ? most : left)) "$@" > "$out/$name.log" 2>&1
    echo "   exit code $?"
    tail -n 3 "$out/$name.log"
}

poise="python3 -m poise compare cifar10 --extractor inception --device cuda"
# 1. The default for photographs: the units without results, measured as soon as they are trained.
# Those of 60 minutes come last: beside others they take longer than the usual limit.
mkdir -p "$out/defaults"
cp -n results/defaults-*.json "$out/defaults/"
part defaults 780 python3 benchmarks/defaults.py train "$POISE_DATA" \
    '*-10-?' '*-5-0' '*-20-0' '*-2-0' '*' \
    --device cuda --jobs 6 --measure --runs "$out/defaults-runs" --results "$out/defaults"
# 2. The released network: five balances, standard latents, and a flow on the same codes.
part balances 720 python3 benchmarks/balances.py "$out/balances"
# 3. GPU tests: a captured step equals an eager one; a network that cannot be captured falls back.
part tests 100 python3 -m pytest -m gpu tests/test_captured.py -q -p no:cacheprovider
# 4. Seconds of each part of an evaluation, TF32 against float32, and the FID of test against
#    training images of CIFAR-10 (expected: 3.15).
part evaluation 120 python3 benchmarks/evaluation.py --json "$out/bench-evaluation.json"
# 5. One balance alone, then five at once: compare their figures and times.
compare="$poise --seeds 1 --epochs 10 --second-epochs 20"
part one 90 $compare --balances computed --jobs 1 --out "$out/one"
part five 300 $compare --balances computed released learned learned:rate=100 optimal --jobs 5 --out "$out/five"
# 6. The effect of TF32 and bfloat16 on a trained model: three seeds each, stage 1 only.
for precision in float32 ieee bfloat16; do
    part "precisions-$precision" 70 python3 -m poise compare cifar10 --extractor pixels --device cuda --balances computed \
        --seeds 3 --epochs 3 --stages 1 --priors normal --precision "$precision" --jobs 3 --out "$out/$precision"
done
# 7. Milliseconds per step of each engine, and of five runs side by side.
part steps 200 python3 benchmarks/gpu.py --seconds 1 --json "$out/bench-gpu-steps.json" --only matrix "tf32 / stage" \
    "bfloat16 / stage" "side by side" "ieee / stage 1 / captured" "ieee / stage 2 / captured"
