#!/usr/bin/env bash
# The FAME paper's Table 2 and the rivals outside of it: every model on one data set with several
# seeds, then the table.
#
#   experiments/table2.sh DATA OUT toys '0 1 2'
#
# DATA is the folder of the data sets, OUT the folder of the runs. A finished run is skipped and an
# interrupted one resumes, so the same command can be repeated. FAME's run also trains SASRec, and the
# run of FAME over BERT4Rec also trains BERT4Rec; both are rows of the table.
#
#   JOBS=2                      runs two at a time (slower than one on a GPU)
#   DRY=1                       prints the commands and runs nothing
#   MODELS='fame core'          chooses models
#   EXTRA='--pretrain_epochs=3' more flags of every run
#   AGAINST=CORE                the row of the paired tests, by default FAME; empty: no tests
#   PYTHON=.venv/bin/python     the interpreter
#
# SASRec with the binary loss is trained as in its own paper; with one negative it learns slowly, hence
# 300 epochs.
set -euo pipefail
data=${1:?folder of the data sets} out=${2:?folder of the runs} dataset=${3:-toys} seeds=${4:-0 1 2}
python=${PYTHON:-python} runs=$out/$(basename "${dataset%.*}") failed=0
declare -A flags=(
  [sasrec_bce]='--model=sasrec --loss=bce --num_negatives=1 --similarity=dot --positions=start --pretrain_epochs=300 --patience=25'
  [sasrec_sampled]='--model=sasrec --loss=sampled --num_negatives=256'
)
all='gru4rec sasrec_bce sasrec_sampled core cl4srec iclrec duorec atten_mixer msgifsr miasrec bsarec causal_bsarec tvrec causal_tvrec hstu esasrec last_item history_mean fame fame_bert4rec branched_sasrec branched_bsarec branched_tvrec branched_fame'

for seed in $seeds; do
  for model in ${MODELS:-$all}; do
    run=$runs/${model}_seed$seed
    [ -f "$run/results.json" ] ||
      echo "'--workdir=$run' '--data_dir=$data' '--dataset=$dataset' ${flags[$model]:---model=$model} ${EXTRA:-} --seed=$seed"
  done
done | xargs -r -L 1 -P "${JOBS:-1}" ${DRY:+echo} "$python" -m fame_jax.main || failed=1
${DRY:+echo} "$python" -m fame_jax.report.tables "$runs"/*/results.json --against="${AGAINST-FAME}" --out="$runs" || failed=1
exit $failed
