#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in under ten minutes: Shakespeare to a loss, training speed against nanoGPT, generation.
#     [PYTHON=python3] benchmarks/gpu.sh PATH_OF_NANOGPT
# Writes benchmarks/results/gpu.json and generation_cuda.json. A part that fails is said to have failed, and the others go on.
set -uo pipefail
nanogpt=$(realpath -- "${1:?usage: benchmarks/gpu.sh PATH_OF_NANOGPT}") || exit 2
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"  # also where tinygpt is not installed
python=${PYTHON:-$(command -v python || echo python3)}
"$python" -c 'import torch' || { echo "error: $python has no torch: set PYTHON" >&2; exit 2; }
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "error: there is no CUDA GPU here" >&2; exit 2; }
failed=0
part() {
    timeout -s KILL "$@" || { echo "failed: ${*:3}" >&2; failed=1; }  # a train.py would finish its step beside the next part
}
part 140 "$python" benchmarks/gpu.py --only loss --nanogpt "$nanogpt"
part 240 "$python" benchmarks/gpu.py --only speed --nanogpt "$nanogpt"
part 170 "$python" benchmarks/generation.py --device cuda --rounds 3 --nanogpt "$nanogpt"
exit $failed
