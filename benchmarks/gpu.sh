#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in under ten minutes: Shakespeare to a loss, training speed against nanoGPT, generation.
#     [PYTHON=python3] benchmarks/gpu.sh PATH_OF_NANOGPT
# Writes benchmarks/results/gpu.json and generation_cuda.json. A part that fails is said to have failed, and the others go on.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nanogpt=${1:?usage: benchmarks/gpu.sh PATH_OF_NANOGPT}
python=${PYTHON:-$(command -v python || echo python3)}
"$python" -c 'import torch' || { echo "error: $python has no torch: set PYTHON" >&2; exit 2; }
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "error: there is no CUDA GPU here" >&2; exit 2; }
failed=0
part() {
    timeout "$@" || { echo "failed: ${*:3}" >&2; failed=1; }
}
part 150 "$python" benchmarks/gpu.py --only loss --nanogpt "$nanogpt"
part 260 "$python" benchmarks/gpu.py --only speed --nanogpt "$nanogpt"
part 180 "$python" benchmarks/generation.py --device cuda --rounds 3 --nanogpt "$nanogpt"
exit $failed
