#!/usr/bin/env bash
# Run a command the way every test and example of this project runs: on the CPU where no GPU is found, one thread a
# rank, with a cache of compiled operators of its own (a run that was killed leaves a lock in a shared one, and every
# later run waits for it forever).
set -euo pipefail
if ! nvidia-smi >/dev/null 2>&1; then export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"; fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
# glibc gives every large tensor back to the kernel and asks for it again; on the CPU that is a third of a step.
export MALLOC_MMAP_MAX_="${MALLOC_MMAP_MAX_:-0}" MALLOC_TRIM_THRESHOLD_="${MALLOC_TRIM_THRESHOLD_:-34359738368}"
TORCH_EXTENSIONS_DIR=$(mktemp -d)
export TORCH_EXTENSIONS_DIR
trap 'rm -rf "$TORCH_EXTENSIONS_DIR"' EXIT
"$@"
