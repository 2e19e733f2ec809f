#!/usr/bin/env bash
# All measurements on one accelerator, in under nine minutes: gpu-output/gpu.md and gpu.json.
#
#   benchmarks/gpu.sh [--dry-run] [--out FOLDER] [--images FOLDER] [--networks "sdxl flux wan"]
#
# --dry-run   miniatures on the CPU: does it run?
# --images    the emoji of examples/train_emoji.py; without them the larger network learns coloured discs
#
# Needs pip install -e ".[demo,cache-dit]", and diffusers from 0.36 on. PYTHON names another interpreter.
# Each part has its time: what does not end is broken off, and what was measured until then stays.
set -uo pipefail

out=gpu-output images=() networks="sdxl flux wan" dry=""
while (($#)); do
  case $1 in
    --dry-run) dry=yes; shift ;;
    --out) out=$2; shift 2 ;;
    --images) images=(--images "$(realpath "$2")"); shift 2 ;;
    --networks) networks=$2; shift 2 ;;
    *) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2; exit 2 ;;
  esac
done
mkdir -p "$out"
out=$(realpath "$out")
rm -f "$out"/{sdxl,flux,wan,overhead,train,gpu}.json "$out"/{overhead,gpu}.md "$out/faults.txt"
cd "$(dirname "$0")/.." || exit 1
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
python=${PYTHON:-python3}

if [[ $dry ]]; then
  total=900 after=120 device=(--device cpu) tiny=(--tiny)
  declare -A seconds=([sdxl]=90 [flux]=90 [wan]=90 [overhead]=120 [train]=5)
  overhead=(--repeats 5 --shapes 1x4x8x8) train=(--batch 8 --samples 10 --widths 32 32 32)
else
  total=525 after=40 device=(--device cuda) tiny=()
  declare -A seconds=([sdxl]=75 [flux]=140 [wan]=115 [overhead]=50 [train]=60)
  overhead=() train=()
fi

# part NAME SECONDS COMMAND...: at most so long, and no longer than what is left of all
part() {
  local name=$1 limit=$2 left=$((total - SECONDS)) code=0
  shift 2
  ((limit > left)) && limit=$left
  echo "== $name: at most $limit s"
  if ((limit < 5)); then
    echo "- $name: not run, the $total s were over" >>"$out/faults.txt"
    return
  fi
  timeout --kill-after 5 "$limit" "$@" || code=$?
  ((code)) && echo "- $name: exit code $code ($([[ $code == 124 ]] && echo "broken off after $limit s" || echo failed))" >>"$out/faults.txt"
}

for name in $networks; do # a measurement in progress may end after its time, within 20 s
  part "$name" $((seconds[$name] + 20)) "$python" benchmarks/gpu.py "$name" "${tiny[@]}" "${device[@]}" \
    --seconds "${seconds[$name]}" --out "$out"
done
part overhead "${seconds[overhead]}" "$python" benchmarks/overhead.py "${device[@]}" "${overhead[@]}" \
  --json "$out/overhead.json" --markdown "$out/overhead.md"
part train $((seconds[train] + after)) "$python" benchmarks/gpu_train.py "${device[@]}" "${train[@]}" "${images[@]}" \
  --seconds "${seconds[train]}" --out "$out"
"$python" benchmarks/gpu_report.py "$out" && echo "== $SECONDS s, $out/gpu.md"
