#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU pod slice, through gcloud's own fan-out.
#
#   TPU=NAME ZONE=ZONE [SETUP=1] [DRY_RUN=1] tpu_pod.sh --workdir=DIR [FLAGS]
#
# From the root of a clone. SETUP=1 first copies the last commit to every host
# and installs it there. FLAGS are those of experiments.train. DRY_RUN=1 prints
# the commands, and refuses what the launcher would.
set -euo pipefail

: "${TPU:?the name of the TPU VM}" "${ZONE:?its zone}"
PYTHON=${PYTHON:-python3.11} # to make the environment with, on the hosts
case " $* " in
  *" --workdir="*) ;;
  *) echo 'error: --workdir=DIR is missing: a folder that all hosts share' >&2
     exit 2 ;;
esac

if [[ ${DRY_RUN:-} ]]; then
  # The folder is the hosts'; all else can be looked at here.
  JAX_PLATFORMS=cpu "${CHECK_PYTHON:-.venv/bin/python}" -m experiments.train \
    "$@" "--workdir=${TMPDIR:-/tmp}/outplay-check" --check >/dev/null
fi

run() {
  if [[ ${DRY_RUN:-} ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_all() {
  run gcloud compute tpus tpu-vm ssh "$TPU" "--zone=$ZONE" --worker=all \
    "--command=$1"
}

if [[ ${SETUP:-} ]]; then
  archive=$(mktemp -d)/outplay.tar.gz
  trap 'rm -rf "$(dirname "$archive")"' EXIT
  run git archive --format=tar.gz "--output=$archive" HEAD
  run gcloud compute tpus tpu-vm scp "$archive" "$TPU:outplay.tar.gz" \
    "--zone=$ZONE" --worker=all
  on_all "mkdir -p outplay && tar -xzf outplay.tar.gz -C outplay &&
    cd outplay && $PYTHON -m venv .venv &&
    .venv/bin/pip install -q -c constraints.txt -e '.[tpu]'"
fi

code=0
on_all "cd outplay && exec .venv/bin/python -m experiments.train \
--distributed=auto$(printf ' %q' "$@")" || code=$?
case $code in
  130 | 143)
    echo 'stopped with a checkpoint; the same command resumes from there' >&2 ;;
esac
exit "$code"
