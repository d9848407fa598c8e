# shellcheck shell=bash
# Sourced by the launchers: `torchrun_main MAIN FLAGS…` starts a main on one GPU, one node or several.
#   GPUS    processes on this node (default: the number of GPUs, at least one)
#   NODES   nodes of the run (default 1); on each: NODE_RANK (0, 1, …) and MASTER (host:port of node 0)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
if ! command -v "$python" > /dev/null; then
    [ -z "${PYTHON:-}" ] || { echo "error: PYTHON=$PYTHON is not a program: give the name or path of Python" >&2; exit 2; }
    python=python
fi
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}  # see _venv.sh
configs="$root/configs"  # the recipes
NODES=${NODES:-1}
GPUS=${GPUS:-$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}

# value_of NAME FLAGS…: print the value of a flag as the mains see it: the last one of the words, else of the last --config
# file that has it. A switch is `true`. Prints nothing where it is not given.
value_of() {
    local name=$1 given='' filed='' here previous='' word
    shift
    for word in "$@"; do
        case $word in
            "--$name") given=true ;;
            "--$name="*) given=${word#*=} ;;
        esac
        case $previous in
            "--$name") case $word in --*) ;; *) given=$word ;; esac ;;
            --config)
                here=$(sed -n "s/^[ \"]*$name\"\{0,1\}: *\([^ ,#]*\).*/\1/p" "$word")
                filed=${here:-$filed} ;;
        esac
        previous=$word
    done
    echo "${given:-$filed}"
}

# images_of FILE…: print the images of an optimizer step of a recipe, of which later files win
images_of() {
    local flags=() file accumulated
    for file in "$@"; do flags+=(--config "$file"); done
    accumulated=$(value_of accum_iter "${flags[@]}")
    echo $(($(value_of batch_size "${flags[@]}") * ${accumulated:-1}))
}

# accumulation_of FILE: print the --accum_iter with which the processes train the images of a recipe per step, each with
# its --batch_size
accumulation_of() {
    accumulate "$(images_of "$1")" "$(value_of batch_size --config "$1")"
}

# accumulate EFFECTIVE BATCH: print the --accum_iter for which the processes reach the effective batch size
accumulate() {
    local together=$(($2 * GPUS * NODES))
    echo $((together < $1 ? $1 / together : 1))
}

# split_batch EFFECTIVE LARGEST: print "BATCH ACCUM", the largest batch of a process up to LARGEST, and the --accum_iter,
# with which the processes train exactly EFFECTIVE images per step
split_batch() {
    local processes=$((GPUS * NODES)) images batch
    if [ $(($1 % processes)) -ne 0 ]; then
        echo "error: a batch of $1 images cannot be divided among $processes processes: choose another number of GPUS" >&2
        return 2
    fi
    images=$(($1 / processes))
    batch=$(($2 < images ? $2 : images))
    while [ $((images % batch)) -ne 0 ]; do batch=$((batch - 1)); done
    echo "$batch $((images / batch))"
}

torchrun_main() {
    local main=$1
    shift
    if [ "$NODES" -gt 1 ]; then
        exec "$python" -m torch.distributed.run --nnodes="$NODES" --nproc_per_node="$GPUS" \
            --node_rank="${NODE_RANK:?NODE_RANK is the number of this node, from 0}" --rdzv_id=mae \
            --rdzv_backend=c10d --rdzv_endpoint="${MASTER:?MASTER is host:port of node 0}" "$root/$main" "$@"
    elif [ "$GPUS" -gt 1 ]; then
        exec "$python" -m torch.distributed.run --standalone --nproc_per_node="$GPUS" "$root/$main" "$@"
    fi
    exec "$python" "$root/$main" "$@"
}
