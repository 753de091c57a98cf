#!/usr/bin/env bash
# The built wheel in a fresh environment: beside torch alone, then with the extra `train`, each from an empty folder.
# PYTHON is the interpreter that makes it (default python3), KEEP a folder that is kept (default: a temporary one).
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
work=${KEEP:-$(mktemp -d)}
if [[ -z ${KEEP:-} ]]; then trap 'rm -rf "$work"' EXIT; fi
unset PYTHONPATH
install=("$work/env/bin/pip" install --quiet -c "$root/constraints/cpu.txt")
expect() { # NAME CODE COMMAND...: runs it in an empty folder
    local name=$1 code=$2 found=0
    shift 2
    mkdir "$work/$name"
    (cd "$work/$name" && "$@") >"$work/$name.log" 2>&1 || found=$?
    if [[ $found != "$code" ]]; then
        echo "$name: exit code $found, not $code" >&2
        tail -30 "$work/$name.log" >&2
        exit 1
    fi
    echo "$name: as promised"
}

"$python" -m venv "$work/env"
cp -rL eapo_megatron setup.py pyproject.toml README.md LICENSE "$work/" # no build folders in the repository
"$work/env/bin/pip" wheel --quiet --no-deps -w "$work/dist" "$work"
rm -rf "$work/eapo_megatron" "$work/build"
wheel=("$work"/dist/eapo_megatron-*.whl)

"${install[@]}" torch==2.13.0 "${wheel[0]}"
# The library's ten lines, as README has them.
sed -n '/^.\{3\}python$/,/^.\{3\}$/p' README.md | sed '1d;$d' >"$work/ten_lines.py"
grep -q eapo_advantages "$work/ten_lines.py"
expect torch-alone 0 "$work/env/bin/python" "$work/ten_lines.py"
expect example 0 "$work/env/bin/python" "$root/examples/torch_loop.py"
expect nothing-else 0 "$work/env/bin/python" -c '
from importlib.util import find_spec
assert not [name for name in ("megatron", "transformers", "pydantic", "typer") if find_spec(name)]
import eapo_megatron.algorithms.credit, eapo_megatron.vocab_parallel
print(eapo_megatron.__version__)'
expect command-without-extra 2 "$work/env/bin/eapo-megatron" doctor

"${install[@]}" "${wheel[0]}[train]"
expect rewards 0 "$work/env/bin/python" -c '
from eapo_megatron.rewards import math_reward
assert math_reward("so it is \\boxed{\\frac{1}{2}}", "0.5") == 1.0'
expect doctor 0 "$work/env/bin/eapo-megatron" doctor
expect first-recipe 0 "$work/env/bin/eapo-megatron" train eapo-qwen2-tiny-arithmetic-1n2g-tp2 \
    warm_start.steps=4 train.steps=2 train.num_prompts_per_step=4 train.mini_batch_prompts=2
test -f "$work/first-recipe/runs/eapo-qwen2-tiny-arithmetic-1n2g-tp2/summary.json"
expect demo 0 "$work/env/bin/eapo-megatron" report --demo
expect job 0 "$work/env/bin/eapo-megatron" submit eapo-qwen2-tiny-arithmetic-1n2g-tp2 --dry-run
