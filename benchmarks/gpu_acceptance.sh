#!/usr/bin/env bash
# The exactness tests over NCCL and the fine-tune of `make finetune`, on two GPUs; the log goes to the file named first.
#   benchmarks/gpu_acceptance.sh LOG MODEL_FOLDER
# PYTHON names an interpreter that has torch, deepspeed, transformers, pytest and this package's examples' needs.
set -uo pipefail
cd "$(dirname "$0")/.."
log=${1:?the log file} model=${2:?a Hugging Face checkpoint folder}
PYTHON=${PYTHON:-python3}
export NCCL_NVLS_ENABLE=0 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD:$PWD/integrations${PYTHONPATH:+:$PYTHONPATH}"
TORCH_EXTENSIONS_DIR=$(mktemp -d)
export TORCH_EXTENSIONS_DIR
{
    date -u +%F
    nvidia-smi -L | sed 's/ (UUID.*//'
    "$PYTHON" -c 'import deepspeed, torch, transformers as t; print(f"torch {torch.__version__}, deepspeed {deepspeed.__version__}, transformers {t.__version__}, NCCL {torch.cuda.nccl.version()}")'
    echo "\$ DS_SEQPAR_TEST_DEVICE=cuda pytest tests/kernels"
    DS_SEQPAR_TEST_DEVICE=cuda timeout 120 "$PYTHON" -m pytest -q -p no:cacheprovider tests/kernels 2>&1 | tail -3
    kernels=${PIPESTATUS[0]}
    echo "\$ DS_SEQPAR_TEST_DEVICE=cuda pytest tests/comm/test_copy_engines.py"
    DS_SEQPAR_TEST_DEVICE=cuda timeout 120 "$PYTHON" -m pytest -q -p no:cacheprovider tests/comm/test_copy_engines.py 2>&1 | tail -3
    engines=${PIPESTATUS[0]}
    echo "\$ DS_SEQPAR_TEST_DEVICE=cuda pytest tests/comm/test_exchange.py tests/test_families.py tests/test_matrix.py tests/test_modes.py tests/test_generate.py -m 'not slow'"
    DS_SEQPAR_TEST_DEVICE=cuda timeout "${TEST_SECONDS:-900}" "$PYTHON" -m pytest -q -p no:cacheprovider tests/comm/test_exchange.py tests/test_families.py tests/test_matrix.py \
        tests/test_modes.py tests/test_generate.py -m 'not slow' 2>&1
    tests=$?
    echo "tests: exit status $tests"
    echo "\$ deepspeed --num_gpus 2 examples/finetune.py --model MODEL --deepspeed-config configs/zero1_tp2.json --out OUT ${FINETUNE_ARGS:-}"
    # shellcheck disable=SC2086
    timeout "${FINETUNE_SECONDS:-600}" "$PYTHON" -m deepspeed.launcher.runner --num_gpus 2 examples/finetune.py --model "$model" \
        --deepspeed-config configs/zero1_tp2.json --out "${OUT_FOLDER:-build/gpu_finetune}" ${FINETUNE_ARGS:-} 2>&1 | tr '\r' '\n'
    finetune=$?
    echo "finetune: exit status $finetune"
    [ "$kernels" -eq 0 ] && [ "$engines" -eq 0 ] && [ "$tests" -eq 0 ] && [ "$finetune" -eq 0 ]
} | tee "$log"
