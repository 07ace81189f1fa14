#!/usr/bin/env bash
# From nothing to generated text in about six minutes: environment, corpus, tokenizer, the model of three that this machine
# trains in time, what its bits per byte are worth, samples, a plot.
# Run again, it reuses what is there and resumes. WORKDIR=DIR chooses the folder of the run, MINUTES=N how long all of this
# may take: a whole number, at least 5, by default 6.
set -euo pipefail
cd "$(dirname "$0")/.."

minutes="${MINUTES:-6}"
if [[ ! "$minutes" =~ ^[0-9]{1,6}$ ]]; then
  echo "MINUTES = $minutes is not a whole number of minutes." >&2
  exit 2
fi
minutes=$((10#$minutes)) # 08 is eight, not octal
if [ "$minutes" -lt 5 ]; then
  echo "MINUTES = $minutes is too few: the packages, the corpus and a model need at least 5." >&2
  exit 2
fi

source launch/environment.sh
workdir="${WORKDIR:-runs/stdlib}"

# What is left of the time, but for the baselines and the samples. Without the time that packages took there would be none.
budget=$((60 * minutes - SECONDS - 45))
if [ "$budget" -lt 120 ]; then budget=120; fi

config=configs/pretrain/stdlib.py
"$PYTHON" -m research train --config=$config:10m --fallback=$config:5m --fallback=$config:2m \
  --time-budget="$budget" --workdir="$workdir"
echo
"$PYTHON" -m research evaluate --workdir="$workdir"
echo
"$PYTHON" -m research sample --workdir="$workdir" --max_tokens=80 --temperature=0.7 --top_p=0.95 \
  --prompt="def __init__(self" --prompt="class Test"

cat <<TEXT

The model is in $workdir; the loss is drawn in $workdir/plots/loss.png. Three commands to try next:

  source .venv/bin/activate
  tessera sample --workdir=$workdir --prompt="import " --temperature=0.8 --seed=1
  tessera train --config=$config:2m --workdir=runs/muon --config.optim.name=muon
  tessera doctor --config=$config:2m --workdir=runs/muon
TEXT
