#!/usr/bin/env bash
# Trains a recipe with torchrun; the same command on each node of the recipe's cluster section:
#
#     MASTER_ADDR=HOST launch/torchrun.sh recipes/NAME.yaml [key=value ...]
#
# HOST is one of the nodes and reached from all. PYTHON names the interpreter that has eapo_megatron (default python3).
# On SIGTERM torchrun gives the ranks 30 seconds for their step and checkpoint.
set -euo pipefail

python=${PYTHON:-python3}
read -r nodes ranks < <("$python" -c '
import sys
from eapo_megatron.recipe_files import load_recipe
cluster = load_recipe(sys.argv[1], sys.argv[2:]).cluster
print(cluster.num_nodes, cluster.gpus_per_node)
' "$@")

exec "$python" -m torch.distributed.run --nnodes="$nodes" --nproc-per-node="$ranks" \
    --rdzv-backend=c10d --rdzv-endpoint="${MASTER_ADDR:-localhost}:${MASTER_PORT:-29500}" --rdzv-id=eapo \
    -m eapo_megatron.cli train "$@"
