#!/usr/bin/env bash
# Measures and tests everything on a machine with an NVIDIA GPU, in parts of under 9 minutes each; no network, no installing.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)

usage() {
  cat <<'HELP'
usage: benchmarks/gpu.sh [--dry-run] [--headline] [--minutes N] [--limit S] [--out DIR] [--wheels DIR] [--commit ID] PART...
  PART         all, or any of the parts that --dry-run lists
  --dry-run    list parts, commands and expected minutes; runs nothing, needs no GPU
  --headline   of the benchmarks only the rows that the README shows, which take about half as long
  --minutes N  be done by then: what is left is interrupted or not started, and the summary says so
  --limit S    seconds a part may take (default 520); what it has finished by then stays
  --out DIR    where log.txt, summary.txt, a file a part and page.html go (default build/gpu)
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
profile|3|
tune|5|
probe|2|bench_probe*.py
logprob|7|bench_*logprob*.py
preference|8|bench_*preference*.py
svm|2|bench_*svm*.py|datasets
overhead|7|bench_overhead*.py|datasets
step|6|bench_*step*.py|datasets'
LIMIT=520
dry=0 rows='' out=build/gpu wheels='' parts=() end=0
while (($#)); do
  case $1 in
    --dry-run) dry=1 ;;
    --headline) rows=" -m 'not secondary'" ;;
    --out | --wheels | --commit | --minutes | --limit)
      (($# > 1)) || { echo "gpu.sh: $1 needs a value" >&2; exit 2; }
      case $1 in
        --out) out=$(realpath -m "$2") ;;
        --wheels) wheels=$(realpath -m "$2") ;;
        --commit) export REPRDPO_COMMIT=$2 ;;
        --minutes | --limit)
          [[ $2 =~ ^[1-9][0-9]*$ ]] || { echo "gpu.sh: $1 must be a whole number, not $2" >&2; exit 2; }
          [[ $1 == --limit ]] && LIMIT=$2 || end=$((60 * $2 - 15)) ;; # what is left is for the page
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

has() { "$PYTHON" -c "import $1" 2>/dev/null; }

each() { has pytest_timeout && echo " --timeout $1"; } # seconds a test or a row may take
# Most of the tests' time goes into compiling kernels, which several processes share; one that hangs or has lost its CUDA
# context is replaced by another. What fills the device comes after, alone.
shared() {
  local limit
  limit=$(each 150)
  has xdist && limit=" -n 6${limit:+$limit --timeout-method thread}"
  echo "$limit"
}
ALONE='out_of_memory or past_two'

# Most telling first: the CUDA C++ ops, then those of Triton.
test_files() { (printf '%s\n' tests/gpu/test_probe_reward_cuda.py tests/gpu/test_probe_reward.py && ls tests/gpu/test_*.py) | awk '!seen[$0]++'; }

# The commands of a part, a line each: run as they are printed, the next whatever came of the last.
commands() {
  case $1 in
    build)
      echo "$PYTHON -c '$LOADS' || {" \
        "cmake -S . -B build/gpu-native -DCMAKE_BUILD_TYPE=Release -DREPRDPO_TESTS=OFF -DREPRDPO_CUDA=on" \
        "-DREPRDPO_CUDA_ARCHS=\${REPRDPO_CUDA_ARCHS:-\$($PYTHON -c '$CAPABILITY')} -DPython_EXECUTABLE=\$(command -v $PYTHON) &&" \
        "cmake --build build/gpu-native --parallel && cmake --install build/gpu-native --prefix . &&" \
        "$PYTHON -c '$LOADS'; }"
      ;;
    tests)
      echo "$PYTHON -m pytest tests/gpu -p no:cacheprovider -rfEs --continue-on-collection-errors$(shared) -k 'not ($ALONE)'"
      echo "$PYTHON -m pytest tests/gpu -p no:cacheprovider -rfEs --continue-on-collection-errors$(each 200) -k '$ALONE'"
      ;;
    memcheck)
      for file in $(test_files); do
        echo "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --report-api-errors no" \
          "--error-exitcode 1 $PYTHON -m pytest $file -p no:cacheprovider -rfE -m '$SANITIZED' -k 'not ($UNSANITIZED)'"
      done ;;
    profile)
      echo "$PYTHON -m benchmarks.profile --out $(printf %q "$out/profile.txt")"
      command -v ncu >/dev/null && echo "ncu --clock-control none --section SpeedOfLight --section Occupancy" \
        "--kernel-name-base demangled --kernel-name regex:'reprdpo|_kernel\$' --csv --log-file $(printf %q "$out/ncu.csv")" \
        "$PYTHON -m benchmarks.profile --once"
      ;;
    tune) echo "$PYTHON -m benchmarks.tune --out $(printf %q "$out/tuned.json")" ;;
    racecheck | initcheck) # our own CUDA C++ alone: the framework's kernels are not ours to mend
      echo "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $1 --check-api-memory-access no" \
        "--report-api-errors no --kernel-name kns=probe_reward --error-exitcode 1" \
        "$PYTHON -m pytest tests/gpu/test_probe_reward_cuda.py -p no:cacheprovider" \
        "-m '$SANITIZED' -k 'not ($UNSANITIZED)'"
      ;;
    *)
      local found
      found=$(bench_files "$1")
      [[ -z $found ]] || echo "$PYTHON -m pytest $found -p no:cacheprovider --continue-on-collection-errors$rows$(each 200)" \
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
    tests | profile | tune) ;;
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
    lines=$(commands "$part" | sed 's/^/  /')
    printf '%-9s about %s min\n%s\n' "$part" "$minutes" "${lines:-  nothing: no benchmarks/$(field "$part" 3)}"
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

# What came of a command, from its output: counts, what failed (the first few), what a benchmark's rows came to.
ROWS='import collections, json, sys
rows = json.load(open(sys.argv[1]))["rows"]
print(", ".join(f"{n} rows {status}" for status, n in collections.Counter(row["status"] for row in rows).items()))
for row in [row for row in rows if row["status"] == "red"][:8]: print("     ", row["name"], "|", row["reason"][:150])'
findings() { # part, log
  grep -aoE '[0-9]+ (passed|failed|errors?|skipped)[^=]* in [0-9.]+s.*' "$2" | tail -1
  grep -aE '^(FAILED|ERROR) |^========= (ERROR|RACECHECK) SUMMARY' "$2" | cut -c1-180 | sed 's/^/      /' | head -8
  [[ ! -s $out/$1.json || -z $(field "$1" 3) ]] || "$PYTHON" -c "$ROWS" "$out/$1.json"
}

# Seconds that a command of a part begun at $1 may take: the part's, and the call's.
limit() {
  local left=$(($1 + LIMIT - SECONDS))
  ((end && end - SECONDS < left)) && left=$((end - SECONDS))
  echo "$left"
}

summary=$out/summary.txt logs=$(mktemp -d) failed=0 made=()
say() { printf '%-9s %-7s %s\n' "$@" | tee -a "$summary"; }
trap 'rm -rf "$logs" ${site:+"$site"}' EXIT
for part in "${parts[@]}"; do
  echo "== $part"
  [[ ! -f $summary ]] || sed -i "/^$part /,/^[^ ]/{/^$part /d;/^  /d}" "$summary" # of an earlier call
  if why=$(lacking "$part") && [[ -n $why ]]; then
    echo "skipped: $why"
    say "$part" skipped "$why"
    continue
  fi
  start=$SECONDS
  rm -f "$out/$part.json"
  while IFS= read -r line <&3; do
    began=$SECONDS seconds=$(limit "$start") log=$logs/$part
    if ((seconds < (LIMIT < 20 ? LIMIT : 20))); then
      failed=1
      say "$part" 'not run' "no time left for: ${line:0:150}"
      continue
    fi
    timeout -s INT -k 15 "$seconds" bash -c "$line" > >(tee "$log") 2>&1 3<&-
    status=$?
    sleep 0.2 # until tee has written the last of it
    echo "== $part: $((SECONDS - began)) s, status $status"
    state=green
    ((status == 0)) || state=red
    ((status == 124 || status == 137)) && state='stopped'
    grep -qa 'Device not supported' "$log" && [[ $line == *compute-sanitizer* ]] && state=skipped
    found=$(findings "$part" "$log")
    [[ $state == green && $found == *skipped* && $found != *passed* && $found != *rows* ]] && state=skipped
    [[ $state == red || $state == stopped ]] && failed=1
    say "$part" "$state" "$((SECONDS - began)) s, status $status: $found"
  done 3< <(commands "$part")
  [[ -s $out/$part.json ]] && ! grep -q '"rows": \[\]' "$out/$part.json" && made+=("$out/$part.json")
done
if ((${#made[@]})); then
  "$PYTHON" -m benchmarks.report "${made[@]}" --page "$out/page.html" || failed=1
fi
printf '\nSummary (%s)\n' "$summary"
cat "$summary"
exit $failed
