#!/usr/bin/env bash
# The FAME paper's Figures 5 and 6: quality by the number of heads and of experts, then the table.
#
#   experiments/sweep.sh DATA OUT toys '0 1 2'
#
# SASRec is trained with each number of HEADS. Then FAME is fine-tuned from the SASRec of the same heads
# and seed: with one expert and each of HEADS (Figure 5), and with AT_HEADS heads and each of EXPERTS
# (Figure 6). table2.sh explains DATA, OUT, JOBS, DRY, EXTRA and PYTHON, and how a sweep is resumed.
set -euo pipefail
data=${1:?folder of the data sets} out=${2:?folder of the runs} dataset=${3:-toys} seeds=${4:-0 1 2}
heads=${HEADS:-1 2 4 8 16} experts=${EXPERTS:-1 2 4 8 16 32} at=${AT_HEADS:-2}
python=${PYTHON:-python} runs=$out/$(basename "${dataset%.*}") failed=0

run() { # name of the run, its flags
  [ -f "$runs/$1/results.json" ] ||
    echo "'--workdir=$runs/$1' '--data_dir=$data' '--dataset=$dataset' ${EXTRA:-} ${*:2}"
}
backbones() {
  for h in $heads $at; do run "sasrec_h${h}_seed$1" --model=sasrec "--num_heads=$h" "--seed=$1"; done
}
fames() {
  { for h in $heads; do echo "$h 1"; done; for n in $experts; do echo "$at $n"; done; } | while read -r h n; do
    run "fame_h${h}_n${n}_seed$1" --model=fame "'--backbone=$runs/sasrec_h${h}_seed$1'" \
      "--num_heads=$h" "--num_experts=$n" "--seed=$1"
  done
}
for part in backbones fames; do
  for seed in $seeds; do $part "$seed"; done | sort -u |
    xargs -r -L 1 -P "${JOBS:-1}" ${DRY:+echo} "$python" -m fame_jax.main || failed=1
done
${DRY:+echo} "$python" -m fame_jax.report.tables "$runs"/*/results.json --no_published --out="$runs" || failed=1
exit $failed
