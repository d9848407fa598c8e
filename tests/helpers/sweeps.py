"""Start the papers' sweeps with a stand-in for python, which records the commands and writes the files of the mains."""

import os
import shlex
import subprocess

import pytest

import main_detect
import main_finetune
import main_linprobe
import main_pretrain
import main_segment
from helpers.launch import ROOT

STAND_IN = r"""#!/bin/bash
main=$(basename "$1"); shift
printf '%q ' "$main" "$@" >> "$CALLS"; echo >> "$CALLS"
previous=
for word in "$@"; do
    case $previous in
        --output_dir) folder=$word ;; --out) file=$word ;; --epochs) epochs=$word ;;
        --config) recipe=$(sed -n 's/^epochs: *//p' "$word") ;;
    esac
    previous=$word
done
epochs=${epochs:-$recipe}
[ -z "$folder" ] || { mkdir -p "$folder"; touch "$folder/results.jsonl"; }
case $main in
    main_pretrain.py) touch "$folder/encoder.safetensors" ;;
    main_linprobe.py) touch "$folder/probe.json" "$folder/checkpoint-$((${epochs%.*} - 1)).pth" ;;
    main_finetune.py) [ -e "$STOP" ] || touch "$folder/checkpoint-$((${epochs%.*} - 1)).pth" ;;  # exit 0 all the same
    main_segment.py | main_detect.py) touch "$folder/scores.json" ;;
    knn.py | dense_probe.py) mkdir -p "$(dirname "$file")"; touch "$file" ;;
    make_lesions.py) mkdir -p "$1"; touch "$1/metadata.csv" ;;
    fewshot.py) mkdir -p "$(dirname "$file")"; touch "$file" ;;
    collect.py) [ -z "$file" ] || touch "$file" ;;
esac
"""


@pytest.fixture
def sweep(tmp_path):
    """A function start(name, *arguments) that returns exit code, output, and the started commands."""
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def start(name, *arguments, script="sweep", **environment):
        calls = tmp_path / "calls"
        calls.write_text("")
        env = {
            **os.environ,
            "PYTHON": str(stand_in),
            "CALLS": str(calls),
            "STOP": str(tmp_path / "stop"),
            **environment,
        }
        done = subprocess.run(
            ["bash", str(ROOT / "scripts" / name / f"{script}.sh"), *arguments], env=env, capture_output=True, text=True
        )
        return (
            done.returncode,
            done.stdout + done.stderr,
            [shlex.split(line) for line in calls.read_text().splitlines()],
        )

    return start


def parsed(calls, check: bool = True):
    """Return (main, parsed flags) of the mains among the commands; `check`: their values are checked, too."""
    modules = (main_pretrain, main_finetune, main_linprobe, main_segment, main_detect)
    mains = {f"{module.__name__}.py": module for module in modules}
    parsed_calls = [(name, mains[name].get_args_parser().parse_args(flags)) for name, *flags in calls if name in mains]
    for name, args in parsed_calls if check else ():
        mains[name].check(args)
    return parsed_calls
