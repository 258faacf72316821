#!/usr/bin/env bash
# Times LLaMA-7B + CLIP ViT-L/14 (random weights, bfloat16, 32 x 128 tokens) on one GPU of 80 GB, in under nine minutes: our step and its split, against
# the PyTorch baseline with and without torch.compile, with flash attention, over batch sizes, with texts of about 48 tokens, and with int8 towers.
#
#   [OUT=FOLDER] [PYTHON=python3] bash tools/bench_gpu.sh                   # one JSON file a measurement, in FOLDER or experiments/results/gpu
#   [OUT=FOLDER] [PYTHON=python3] bash tools/bench_gpu.sh [--small] [NAME]  # --small: tiny shapes, on a CPU too; NAME: that measurement only
#
# Needs jax (with its GPU plugin), flax, optax, chex, orbax-checkpoint, torch and transformers; qwix for int8. The package need not be installed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-experiments/results/gpu}
python=${PYTHON:-python3}
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
mkdir -p "$out"
log=$out/log.txt
: >"$log"

export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} JAX_COMPILATION_CACHE_DIR=$cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export XLA_PYTHON_CLIENT_PREALLOCATE=false  # PyTorch shares the card.
text=llama-7b image=clip-vit-l-14 tokens=128 width=1024 batch=32 sweep=8,64,128 rounds=20 dtype=bfloat16 flash=cudnn
if [ "${1:-}" = --small ]; then
  shift
  text=llama-tiny image=clip-vit-tiny tokens=8 width=16 batch=4 sweep=4 rounds=1 dtype=float32 flash=xla
  export TORCHDYNAMO_DISABLE=1 JAX_PLATFORMS=cpu OMP_WAIT_POLICY=PASSIVE
  export XLA_FLAGS='--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
  # XLA aborts on a flag that it does not know, and later releases have no such flag.
  case $("$python" -c 'import importlib.metadata as m; print(m.version("jaxlib"))') in
    0.10.*) XLA_FLAGS+=' --xla_cpu_use_fusion_emitters=false' ;;
  esac
fi

only=${1:-}

# measure NAME SCRIPT FLAGS...: for 200 s at most, and until 530 s after the start; a failure is noted and the rest goes on.
measure() {
  local name=$1 left=$((530 - SECONDS)) start=$SECONDS
  shift
  if [ -n "$only" ] && [ "$only" != "$name" ]; then
    return
  fi
  if [ "$left" -gt 200 ] && [ "$text" = llama-7b ]; then
    left=200
  fi
  if [ "$left" -gt 0 ] && timeout "$left" "$python" "$@" >"$out/$name.json" 2>>"$log"; then
    echo "$name: done in $((SECONDS - start)) s"
  else
    rm -f "$out/$name.json"
    echo "$name: failed or out of time after $((SECONDS - start)) s; see $log"
    failed=1
  fi
}

bench() {
  local name=$1
  shift
  measure "$name" tools/bench_train.py --json --text=$text --image=$image --tokens=$tokens --lengths=full --width=$width --dtype=$dtype --rounds=$rounds "$@"
}

failed=0
bench baseline --batch=$batch --preset=paper,robust --contestants=live,store,baseline
bench compiled --batch=$batch --preset=paper --contestants=live,baseline_compiled
measure profile tools/profile_step.py --json --config=configs/quickstart.py --rounds=$rounds --trace="$cache/trace" \
  --config.backbones.text.path=random:$text --config.backbones.image.path=random:$image --config.backbones.dtype=$dtype --config.compute_dtype=$dtype \
  --config.text.max_tokens=$tokens --config.molt.width=$width --config.train.batch_size=$batch --config.mesh.data=1 \
  --config.features.store= --config.classifier.hidden=512
bench flash --batch=$batch --preset=robust --contestants=live --attention=$flash
bench int8 --batch=$batch --preset=robust --contestants=live --quantization=int8
bench texts --batch=$batch --preset=robust --contestants=live,live_padded,baseline --lengths=$((tokens * 3 / 8)),$((tokens / 5))
bench batches --batch=$sweep --preset=robust --contestants=live
echo "$((SECONDS)) s in all; results in $out"
exit $failed
