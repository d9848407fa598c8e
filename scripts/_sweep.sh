# shellcheck shell=bash disable=SC2154,SC2034,SC1091
# Sourced by the sweeps of the papers. A sweep is a list of runs: each is pretrained, then fine-tuned, probed linearly and
# by nearest neighbours. When the sweep is started again, finished runs are skipped and interrupted ones are resumed; with
# other flags it is refused, because the skipped runs do not have them.
#
#   OUT               output folder (first argument)
#   --data DIR        the data set (see the sweep for its name and layout); not needed with --cpu_small
#   --cpu_small       a small model on scikit-learn's digits: about two minutes a run on one core
#   --gpu_hour        the whole list on --data in about an hour of one H100: fewer epochs, mostly a smaller model
#   --only "A B"      these runs only
#   --list            print the names of the runs, with their flags
#   other flags       are passed to every pretraining
#   SEEDS (default 0), GPUS (processes, default 1) and PYTHON come from the environment.
#
# --gpu_hour is an estimate that was not measured on a GPU. tools/plan.py's formulas give the time of a step at 100 TFLOP/s
# (a guess for such narrow networks) with 0.6 ms of launches for each block; it is multiplied by the cost of the method on a
# CPU (benchmarks/README.md). Fine-tuning takes at least the time in which 12 workers prepare the images at 1,250 images/s
# each (the same page), and every command takes 12 s to start. The sweeps have the sums in seconds. Settings that a paper
# gives in epochs are scaled with the number of epochs.
#
# The sweep sets arrays of flags: `data_flags`, `pretrain`, `finetune`, `linprobe` (empty: no probes) and `encoder` (the
# model of the last two), and calls `run NAME FLAGS…` and `scratch NAME`, then `table`. The recipes are files of
# configs/, which the flags name: what depends on paths or the number of processes, and what --gpu_hour changes, is given
# as flags, which win.

GPUS=${GPUS:-1}
. "$(dirname "${BASH_SOURCE[0]}")/_torchrun.sh"
SEEDS=${SEEDS:-0}
out='' data='' only='' cpu_small='' gpu_hour='' list='' extra=()
while [ $# -gt 0 ]; do
    case $1 in
        --data | --only)
            [ $# -ge 2 ] || { echo "error: $1 needs a value" >&2; exit 2; }
            declare "${1#--}=$2"
            shift ;;
        --cpu_small) cpu_small=1 ;;
        --gpu_hour) gpu_hour=1 ;;
        --list) list=1 ;;
        -*) extra+=("$1") ;;
        *) if [ -z "$out" ] && [ ${#extra[@]} -eq 0 ]; then out=$1; else extra+=("$1"); fi ;;
    esac
    shift
done
if [ -z "$list$out" ]; then
    echo "usage: $0 OUT --data DIR [--gpu_hour] [--only \"A B\"] [--list] [pretraining flags]   or   $0 OUT --cpu_small" >&2
    exit 2
fi
if [ -n "$cpu_small" ] && [ -n "$gpu_hour" ]; then
    echo "error: --cpu_small and --gpu_hour exclude each other: choose one" >&2
    exit 2
fi
if [ -z "$list$cpu_small$data" ]; then
    echo "error: --data DIR is needed: the data set of the paper (--cpu_small needs none)" >&2
    exit 2
fi
for name in $only; do
    if ! bash "$0" --list ${cpu_small:+--cpu_small} ${gpu_hour:+--gpu_hour} | cut -d: -f1 | grep -qxF -- "$name"; then
        echo "error: --only $name is no run of this sweep; --list shows its runs" >&2
        exit 2
    fi
done
# Finished runs are skipped; with other flags, the table would show them as if they had these.
flags_file="$out/$(basename "$(dirname "$(realpath "$0")")")-$(basename "$0" .sh).flags"
flags_words=$(printf '%q ' "${SET:-}" "${cpu_small:+--cpu_small}" "${gpu_hour:+--gpu_hour}" "${extra[@]}")
if [ -z "$list" ] && [ -s "$flags_file" ] && [ "$(cat "$flags_file")" != "$flags_words" ]; then
    echo "error: $out holds runs of this sweep with other flags (see $flags_file): choose another folder" >&2
    exit 2
fi
extra_finetunes=()  # names of further arrays of fine-tuning flags, for papers with several

per_process() { # IMAGES: print the --batch_size with which the processes train so many images per step
    echo $(($1 / (GPUS * NODES)))
}

small_recipe() { # the settings of --cpu_small, the same for every run; a method is turned on by its flags
    data_flags=(--dataset digits --input_size 16 --num_workers 1)
    pretrain=(--config "$configs/small/pretrain.yaml")
    finetune=(--config "$configs/small/finetune.yaml")
    linprobe=(--cache_features --amp_dtype fp32)
    encoder=(--model vit_micro_patch4 --global_pool)
}

imagefolder_or() { # READER: print imagefolder if --data has class folders, else the reader
    if [ -d "$data/train" ]; then echo imagefolder; else echo "$1"; fi
}

once() { # FILE COMMAND…: run the command, which writes the file last, unless the file exists
    local file=$1
    shift
    [ ! -e "$file" ] || return 0
    mkdir -p "$out" && echo "$flags_words" > "$flags_file"
    "$@"
    [ -e "$file" ] || { echo "stopped before $file was written: start the sweep again to resume" >&2; exit 1; }
}

main() (torchrun_main "$@")  # in a subshell, because torchrun_main replaces the shell

last_checkpoint() { # FOLDER FLAGS…: print the checkpoint that a run with these flags writes last
    local folder=$1
    shift
    echo "$folder/checkpoint-$(($(value_of epochs "$@") - 1)).pth"
}

wanted() {
    [ -z "$only" ] || case " $only " in *" $1 "*) ;; *) return 1 ;; esac
}

chosen() { # NAME FLAGS…: succeed if this run is wanted; with --list print its name and fail
    local name=$1 words
    shift
    wanted "$name" || return 1
    words=$*
    [ -z "$list" ] || { echo "$name${words:+: ${words//"$root/"/}}"; return 1; }
}

scratch() { # NAME [CHECKPOINT]: evaluate an encoder without pretraining, of random weights or those of the checkpoint
    chosen "$1" || return 0
    for seed in $SEEDS; do
        evaluate "$1-seed$seed" "${2:-}" "$seed" model
    done
}

run() { # NAME FLAGS…: pretrain and evaluate; {seed} in a flag is replaced by the seed
    local name=$1 folder checkpoint
    shift
    chosen "$name" "$@" || return 0
    for seed in $SEEDS; do
        folder="$out/$name-seed$seed"
        checkpoint=$(last_checkpoint "$folder" "${pretrain[@]}" "${extra[@]}" "$@")
        once "$folder/encoder.safetensors" main main_pretrain.py "${data_flags[@]}" "${pretrain[@]}" --seed "$seed" \
            --keep 1 --output_dir "$folder" --resume auto "${extra[@]}" "${@//\{seed\}/$seed}"
        evaluate "$name-seed$seed" "$checkpoint" "$seed" model
        [ -z "$(value_of rc_mae "$@")" ] || evaluate "$name-ema-seed$seed" "$checkpoint" "$seed" model_ema
    done
}

evaluate() { # NAME CHECKPOINT SEED KEY
    local common=("${data_flags[@]}" "${encoder[@]}" --seed "$3")
    [ -z "$2" ] || common+=(--finetune "$2" --checkpoint_key "$4")
    local folder kind
    [ ${#linprobe[@]} -eq 0 ] || probe "$1" "$2"
    for kind in finetune "${extra_finetunes[@]}"; do
        local -n flags=$kind
        folder="$out/$kind-$1"
        once "$(last_checkpoint "$folder" "${flags[@]}")" main main_finetune.py "${common[@]}" "${flags[@]}" --keep 1 \
            --output_dir "$folder" --resume auto
    done
}

probe() { # NAME CHECKPOINT: by a linear classifier and by neighbours, with the flags `common` of evaluate
    local probe="$out/probe-$1" last again
    case " ${linprobe[*]} " in
        *" --cache_features "*) last=probe.json again=(--overwrite) ;;  # takes seconds, so it starts anew
        *) last=$(basename "$(last_checkpoint "$probe" "${linprobe[@]}")") again=(--resume auto) ;;
    esac
    once "$probe/$last" main main_linprobe.py "${common[@]}" "${linprobe[@]}" --output_dir "$probe" "${again[@]}"
    once "$probe/knn.json" "$python" "$root/tools/knn.py" "${common[@]}" --finetune "${2:-random}" --out "$probe/knn.json"
}

table() { # fine-tuning first: where all images have labels, a probe does not show what pretraining is worth on small sets
    [ -n "$list" ] || "$python" "$root/tools/collect.py" "$out"/probe-*-seed* "$out"/finetune*-seed* --by run \
        --strip probe- finetune- finetune_small- --metric finetune:eval/acc1 "${extra_finetunes[@]/%/:eval/acc1}" \
        probe:eval/acc1 knn1_acc1 knn20_acc1
}
