# shellcheck shell=bash
# Sourced by every script: with --help (or -h) it prints the comment at the top of the script, and ends with 0.
for word in "$@"; do
    case $word in
        -h | --help)
            sed -n '2,${/^#/!q; /^# shellcheck/d; s/^# \{0,1\}//; p}' "$0"
            exit 0 ;;
    esac
done
