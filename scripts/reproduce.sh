#!/usr/bin/env bash
# A paper's table: its sweep (missing runs only; interrupted ones are resumed), then our numbers beside the published ones,
# with a column of differences in the setting; printed, and in OUT/reproduced.md and .csv.
#
#   bash scripts/reproduce.sh PAPER OUT --budget cpu_small                   (scikit-learn's digits; maws: --data CIFAR10)
#   bash scripts/reproduce.sh PAPER OUT --budget gpu_hour --data DIR         (about an hour of one H100, by estimate)
#   bash scripts/reproduce.sh PAPER OUT --budget paper --data DIR            (the paper's model and lengths)
#
# PAPER is bootstrap_mae, dmae, rc_mae, mlo_mae or maws. All other arguments go to scripts/PAPER/sweep.sh,
# whose comment names its data set: --only "RUN …", --list, flags for the pretraining, SET, TEACHER, WEAK, SEEDS, GPUS. A
# folder holds one budget.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/_help.sh"
GPUS=${GPUS:-1}
. "$(dirname "${BASH_SOURCE[0]}")/_torchrun.sh"
refuse() { echo "error: $*" >&2; exit 2; }

paper='' out='' budget='' list='' own=() rest=()
while [ $# -gt 0 ]; do
    case $1 in
        --budget | --data | --only)
            [ $# -ge 2 ] || refuse "$1 needs a value"
            if [ "$1" = --budget ]; then budget=$2; else own+=("$1" "$2"); fi
            shift ;;
        --cpu_small | --gpu_hour) refuse "write --budget ${1#--} instead of $1" ;;
        --list) list=1 rest+=("$1") ;;
        -*) rest+=("$1") ;;
        *) if [ -z "$paper" ]; then paper=$1
           elif [ -z "$out" ] && [ ${#rest[@]} -eq 0 ]; then out=$1
           else rest+=("$1"); fi ;;
    esac
    shift
done
case $paper in
    bootstrap_mae | dmae | rc_mae | mlo_mae | maws) ;;
    *) refuse "PAPER is '$paper', and must be bootstrap_mae, dmae, rc_mae, mlo_mae or maws" ;;
esac
case $budget in
    cpu_small | gpu_hour) size=("--$budget") ;;
    paper) size=() ;;
    *) refuse "--budget is '$budget', and must be cpu_small, gpu_hour or paper" ;;
esac
sweep="$root/scripts/$paper/sweep.sh"
rest=("${size[@]}" "${own[@]}" "${rest[@]}")
[ -z "$list" ] || exec bash "$sweep" "${rest[@]}"
[ -n "$out" ] || refuse "OUT is missing: bash $0 PAPER OUT --budget BUDGET [--data DIR]"
[ "$paper" != mlo_mae ] || paper=mlo_mae/${SET:-cifar10}
before=$(cat "$out/reproduce.txt" 2> /dev/null || true)
[ -z "$before" ] || [ "$before" = "$paper $budget" ] ||
    refuse "$out holds runs of $before, whose names are the same: choose another folder"

names=$(bash "$sweep" --list "${size[@]}" | cut -d: -f1)
trap '[ ! -d "$out" ] || echo "$paper $budget" > "$out/reproduce.txt"' EXIT
status=0
bash "$sweep" "$out" "${rest[@]}" || status=$?
[ -n "$(find "$out" -name results.jsonl -print -quit 2> /dev/null)" ] || exit "$status"
echo
# shellcheck disable=SC2086  # one word for each run
"$python" "$root/tools/reproduce.py" "$out" --paper "$paper" --runs $names
exit "$status"
