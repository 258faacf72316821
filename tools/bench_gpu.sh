#!/usr/bin/env bash
# Times LLaMA-7B + CLIP ViT-L/14 (random weights, bfloat16, 32 x 128 tokens) on one GPU of 80 GB, in under nine minutes: our step and its split, against
# the PyTorch baseline with and without torch.compile, with flash attention, over batch sizes, with texts of about 48 tokens, and with int8 towers.
#
#   [OUT=FOLDER] [PYTHON=python3] [LIMIT=530] bash tools/bench_gpu.sh [--small] [NAME ...]
#
# Writes one JSON file a measurement, in FOLDER or experiments/results/gpu. --small: tiny shapes, on a CPU too; NAMEs: those measurements only; LIMIT:
# seconds after which it stops what still runs.
#
# Compiling takes most of the time. The steps are compiled first, all at once, and found again by the measurements, which run one by one;
# log.txt says how long each program took to compile. What is cut off keeps the cases that were done.
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

only=" $* "
known=' robust flash int8 paper profile texts batches compiled '
for name in "$@"; do
  if [[ $known != *" $name "* ]]; then
    echo "error: '$name' is no measurement; give one or several of$known" >&2
    exit 2
  fi
done

# is_wanted NAME
is_wanted() {
  [[ $only = *[a-z]* ]] || return 0
  [[ $only = *" $1 "* ]]
}

# within SECONDS COMMAND...: stops it after so long, and LIMIT seconds after the start of all.
within() {
  local left=$((${LIMIT:-530} - SECONDS))
  timeout "$((left < $1 ? (left > 0 ? left : 1) : $1))" "${@:2}"
}

# measure NAME SECONDS SCRIPT FLAGS...: a failure is noted and the rest goes on.
measure() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  is_wanted "$name" || return 0
  rm -f "$out/$name.json"  # Of an earlier call.
  echo "-- $name" >>"$log"
  if within "$limit" "$python" "$@" >/dev/null 2>>"$log"; then
    echo "$name: done in $((SECONDS - start)) s"
  else
    echo "$name: failed or cut off after $((SECONDS - start)) s; see $log"
    failed=1
  fi
}

bench() {
  local name=$1 limit=$2
  shift 2
  measure "$name" "$limit" "${train[@]}" --out="$out/$name.json" --rounds=$rounds "$@"
}

# compile NAME SCRIPT FLAGS...: fills the cache with what a measurement runs.
compile() {
  local name=$1
  shift
  is_wanted "$name" || return 0
  JAX_LOG_COMPILES=1 within 240 "$python" "$@" 2>&1 >/dev/null | sed -n "s/.*Finished XLA compilation of/$name compiled/p" >>"$log" &
}

sizes=(--text=$text --image=$image --tokens=$tokens --width=$width --dtype=$dtype)
robust=(--batch=$batch --preset=robust --lengths=full)
short=(--batch=$batch --preset=robust --lengths="$((tokens * 3 / 8)),$((tokens / 5))")
paper=(--batch=$batch --preset=paper --lengths=full)

step=(tools/profile_step.py --trace="$cache/trace" --config=configs/quickstart.py --config.backbones.text.path=random:$text
  --config.backbones.image.path=random:$image --config.backbones.dtype=$dtype --config.compute_dtype=$dtype --config.text.max_tokens=$tokens
  --config.molt.width=$width --config.train.batch_size=$batch --config.mesh.data=1 --config.features.store= --config.classifier.hidden=512)

failed=0
train=(tools/bench_train.py "${sizes[@]}")
compile robust "${train[@]}" "${robust[@]}" --contestants=live,store --compile
compile flash "${train[@]}" "${robust[@]}" --contestants=live --attention=$flash --compile
compile int8 "${train[@]}" "${robust[@]}" --contestants=live --quantization=int8 --compile
compile paper "${train[@]}" "${paper[@]}" --contestants=live,store --compile
compile texts "${train[@]}" "${short[@]}" --contestants=live --compile
compile texts "${train[@]}" "${short[@]}" --contestants=live_padded --compile
for size in ${sweep//,/ }; do
  compile batches "${train[@]}" --batch=$size --preset=robust --lengths=full --contestants=live --compile
done
compile profile "${step[@]}" --rounds=1
wait
echo "programs compiled after $SECONDS s"
bench robust 80 "${robust[@]}" --contestants=live,store,baseline
bench flash 40 "${robust[@]}" --contestants=live --attention=$flash
bench int8 40 "${robust[@]}" --contestants=live --quantization=int8
bench paper 80 "${paper[@]}" --contestants=live,store,baseline
measure profile 120 "${step[@]}" --rounds=$rounds --out="$out/profile.json"
bench texts 120 "${short[@]}" --contestants=live,live_padded,baseline
bench batches 200 --batch=$sweep --preset=robust --lengths=full --contestants=live
bench compiled 130 "${paper[@]}" --contestants=live,baseline_compiled
echo "$((SECONDS)) s in all; results in $out"
exit $failed
