#!/usr/bin/env bash
# Measures and tests everything on a machine with an NVIDIA GPU, in parts of under 9 minutes each; no network, no installing.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

usage() {
  cat <<'HELP'
usage: benchmarks/gpu.sh [--dry-run] [--headline] [--out DIR] [--wheels DIR] [--commit ID] PART...
  PART         all, or any of the parts that --dry-run lists
  --dry-run    list parts, commands and expected minutes; runs nothing, needs no GPU
  --headline   of the benchmarks only the rows that the README shows, which take about half as long
  --out DIR    where log.txt, a JSON file a part and page.html go (default build/gpu)
  --wheels DIR peers and what else is missing as wheels, put beside the source for this run alone
  --commit ID  the commit that is measured, where the tree has no history ("ID+" if it has uncommitted changes)
HELP
}

# part | expected minutes | benchmark files | what they import beside torch and transformers
PARTS='build|3|
tests|4|
memcheck|6|
racecheck|4|
initcheck|4|
ceilings|1|bench_ceilings*.py
probe|2|bench_probe*.py
logprob|7|bench_*logprob*.py
preference|8|bench_*preference*.py
svm|2|bench_*svm*.py|datasets
overhead|7|bench_overhead*.py|datasets
step|6|bench_*step*.py|datasets'
LIMIT=520 # seconds a part, at most; then it is interrupted and what it has finished stays

dry=0 rows='' out=build/gpu wheels='' parts=()
while (($#)); do
  case $1 in
    --dry-run) dry=1 ;;
    --headline) rows=" -m 'not secondary'" ;;
    --out | --wheels | --commit)
      (($# > 1)) || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
      case $1 in
        --out) out=$(realpath -m "$2") ;;
        --wheels) wheels=$(realpath -m "$2") ;;
        --commit) export REPRDPO_COMMIT=$2 ;;
      esac
      shift ;;
    -h | --help) usage; exit 0 ;;
    -*) echo "gpu.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    *) parts+=("$1") ;;
  esac
  shift
done
((dry && ${#parts[@]} == 0)) && parts=(all)
((${#parts[@]})) || { usage >&2; exit 2; }
[[ " ${parts[*]} " == *" all "* ]] && mapfile -t parts < <(cut -d'|' -f1 <<<"$PARTS")
for part in "${parts[@]}"; do
  grep -q "^$part|" <<<"$PARTS" || { echo "gpu.sh: no part $part; there are: all $(cut -d'|' -f1 <<<"$PARTS" | xargs)" >&2; exit 2; }
done
cd "$root" || exit 2
[[ -z $wheels || -d $wheels ]] || { echo "gpu.sh: --wheels $wheels is no folder" >&2; exit 2; }

PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin" # nvcc and compute-sanitizer lie there, on PATH or not
CAPABILITY='import torch; print("".join(map(str, torch.cuda.get_device_capability())))'
LOADS='import sys; from reprdpo.ops import native; print(native.status("cuda")); sys.exit(not native.loaded("cuda"))'

field() { grep "^$1|" <<<"$PARTS" | cut -d'|' -f"$2"; }
files() { (cd benchmarks && compgen -G "$1" | sed 's|^|benchmarks/|'); }
bench_files() { for pattern in $(field "$1" 3); do files "$pattern"; done | sort -u | xargs; }

# Not under a sanitizer: what captures graphs (without a caching allocator no memory can be had meanwhile), asks CUPTI
# (there can be one tool), compiles, or fills the device.
SANITIZED='gpu and not slow'
UNSANITIZED='graph or captur or launch or compile or out_of_memory or past_two'

# The commands of a part, a line each: run as they are printed.
commands() {
  case $1 in
    build)
      echo "$PYTHON -c '$LOADS' || {" \
        "cmake -S . -B build/gpu-native -DCMAKE_BUILD_TYPE=Release -DREPRDPO_TESTS=OFF -DREPRDPO_CUDA=on" \
        "-DREPRDPO_CUDA_ARCHS=\${REPRDPO_CUDA_ARCHS:-\$($PYTHON -c '$CAPABILITY')} -DPython_EXECUTABLE=\$(command -v $PYTHON) &&" \
        "cmake --build build/gpu-native --parallel && cmake --install build/gpu-native --prefix . &&" \
        "$PYTHON -c '$LOADS'; }"
      ;;
    tests) echo "$PYTHON -m pytest tests/gpu -p no:cacheprovider -rs --continue-on-collection-errors" ;;
    memcheck)
      echo "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1" \
        "$PYTHON -m pytest tests/gpu -p no:cacheprovider --continue-on-collection-errors" \
        "-m '$SANITIZED' -k 'not ($UNSANITIZED)'"
      ;;
    racecheck | initcheck) # our own CUDA C++ alone: the framework's kernels are not ours to mend
      echo "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $1 --check-api-memory-access no" \
        "--report-api-errors no --kernel-name kns=probe_reward --error-exitcode 1" \
        "$PYTHON -m pytest tests/gpu/test_probe_reward_cuda.py -p no:cacheprovider" \
        "-m '$SANITIZED' -k 'not ($UNSANITIZED)'"
      ;;
    *)
      local found
      found=$(bench_files "$1")
      [[ -z $found ]] || echo "$PYTHON -m pytest $found -p no:cacheprovider --continue-on-collection-errors$rows" \
        "--benchmark-quiet --benchmark-json $(printf %q "$out/$1.json")"
      ;;
  esac
}

# Why a part cannot run here; nothing where it can.
lacking() {
  case $1 in
    build)
      "$PYTHON" -c "$LOADS" >/dev/null 2>&1 && return
      for tool in nvcc cmake c++; do command -v $tool >/dev/null || { echo "no $tool, and no library built before"; return; }; done ;;
    memcheck | racecheck | initcheck) command -v compute-sanitizer >/dev/null || echo 'no compute-sanitizer' ;;
    tests) ;;
    *)
      [[ -n $(bench_files "$1") ]] || { echo "no benchmarks/$(field "$1" 3)"; return; }
      for module in pytest_benchmark $(field "$1" 4); do
        "$PYTHON" -c "import $module" 2>/dev/null || { echo "no ${module/_/-}; give it in --wheels"; return; }
      done ;;
  esac
}

if ((dry)); then
  total=0
  for part in "${parts[@]}"; do
    minutes=$(field "$part" 2)
    total=$((total + minutes))
    line=$(commands "$part")
    printf '%-9s about %s min\n  %s\n' "$part" "$minutes" "${line:-nothing: no benchmarks/$(field "$part" 3)}"
  done
  echo "together  about $total min; each part is interrupted after $((LIMIT / 60)) min $((LIMIT % 60)) s; results go to $out"
  exit 0
fi

"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
  { echo "gpu.sh: $PYTHON finds no CUDA device (or no torch); --dry-run lists what would be done" >&2; exit 2; }
mkdir -p "$out" || exit 2
exec > >(tee "$out/log.txt") 2>&1
if [[ -n $wheels ]]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  for wheel in "$wheels"/*.whl; do # one by one: a wheel that does not fit leaves the others
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$wheel" || echo "left out: $wheel"
  done
  export PYTHONPATH="$PYTHONPATH:$site"
  for folder in "$site"/nvidia/*/bin; do PATH="$PATH:$folder"; done # of NVIDIA's own wheels
fi

date -u
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
"$PYTHON" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda)'
"$PYTHON" -c 'import triton; print("triton", triton.__version__)'

failed=0 made=()
for part in "${parts[@]}"; do
  echo "== $part"
  if why=$(lacking "$part") && [[ -n $why ]]; then
    echo "skipped: $why"
    continue
  fi
  start=$SECONDS
  rm -f "$out/$part.json"
  timeout -s INT -k 15 "$LIMIT" bash -c "$(commands "$part")"
  status=$?
  echo "== $part: $((SECONDS - start)) s, status $status"
  ((status == 0)) || failed=1
  [[ -s $out/$part.json ]] && ! grep -q '"rows": \[\]' "$out/$part.json" && made+=("$out/$part.json")
done
if ((${#made[@]})); then
  "$PYTHON" -m benchmarks.report "${made[@]}" --page "$out/page.html" || failed=1
fi
exit $failed
