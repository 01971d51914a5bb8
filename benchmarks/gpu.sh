#!/usr/bin/env bash
# Everything that needs a CUDA GPU, in under ten minutes: training speed against nanoGPT, Shakespeare to a loss, generation.
#     benchmarks/gpu.sh PATH_OF_NANOGPT
# Writes benchmarks/results/gpu.json and generation-cuda.json. A part that fails is said to have failed, and the others go on.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
nanogpt=${1:?usage: benchmarks/gpu.sh PATH_OF_NANOGPT}
python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || { echo "error: there is no CUDA GPU here" >&2; exit 2; }
failed=0
timeout 360 python benchmarks/gpu.py --nanogpt "$nanogpt" || { echo "failed: benchmarks/gpu.py" >&2; failed=1; }
timeout 200 python benchmarks/generation.py --device cuda --quick --nanogpt "$nanogpt" || { echo "failed: benchmarks/generation.py" >&2; failed=1; }
exit $failed
