#!/usr/bin/env bash
# Two machines in one: two network namespaces that see each other only through a virtual cable, a torchrun of one process in
# each. Their run must come to the losses of a run by one process. Linux, as root; elsewhere it says so and ends with 0.
#     benchmarks/two_nodes.sh [key=value ...]
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name="tinygpt$$"
a="${name}a" b="${name}b"
work=$(mktemp -d)

clean() {
    ip netns del "$a" 2>/dev/null || true
    ip netns del "$b" 2>/dev/null || true
    rm -rf "$work"
}
trap clean EXIT

connect() {
    ip netns add "$a" && ip netns add "$b" &&
        ip link add "v$$a" netns "$a" type veth peer name "v$$b" netns "$b" &&
        for end in a b; do
            space="$name$end" link="v$$$end"
            ip -n "$space" link set lo up && ip -n "$space" link set "$link" up || return 1
        done &&
        ip -n "$a" addr add 10.77.0.1/24 dev "v$$a" && ip -n "$b" addr add 10.77.0.2/24 dev "v$$b"
}

if ! command -v ip >/dev/null || ! connect 2>"$work/why"; then
    echo "skipped: no network namespaces here (they need Linux, iproute2 and root): $(tail -n 1 "$work/why" 2>/dev/null)" >&2
    exit 0
fi

settings=(cache_dir=cache model.n_layer=1 model.n_embd=32 data.val_tokens=20000 trainer.max_steps=20
    trainer.val_check_interval=10 trainer.log_every_n_steps=1 "$@")
cd "$work"
export OMP_NUM_THREADS=1

machine() { # rank
    local end=$([[ $1 == 0 ]] && echo a || echo b)
    ip netns exec "$name$end" env GLOO_SOCKET_IFNAME="v$$$end" python -m torch.distributed.run --nnodes 2 --node-rank "$1" \
        --nproc-per-node 1 --master-addr 10.77.0.1 --master-port 29500 \
        "$root/train.py" trainer=ddp_cpu hydra.run.dir=two "${settings[@]}" >"said.$1" 2>&1
}

python "$root/train.py" trainer=cpu hydra.run.dir=one "${settings[@]}" >/dev/null 2>&1
machine 1 &
if ! machine 0 || ! wait $!; then
    echo "error: the run of two machines failed" >&2
    cat said.0 said.1 >&2
    exit 1
fi
if grep -v 'c10d.*hostname' said.1 >&2; then # which torch itself cannot find here
    echo "error: the second machine spoke" >&2
    exit 1
fi
python - <<'PYTHON'
import csv
import sys

runs = [list(csv.DictReader(open(f"{name}/metrics.csv"))) for name in ("one", "two")]
worst = max(
    abs(float(a[name]) - float(b[name])) for a, b in zip(*runs, strict=True) for name in ("train/loss", "val/loss") if a[name]
)
print(f"{len(runs[0])} lines of metrics.csv; largest difference between one process and two machines: {worst:.1e}")
sys.exit(worst > 1e-5)
PYTHON
