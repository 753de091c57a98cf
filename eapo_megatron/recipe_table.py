"""recipes/README.md: every built-in recipe with its cluster, its layout and the memory that `plan` gives it."""

from __future__ import annotations

from collections.abc import Iterator

from eapo_megatron.config import Recipe
from eapo_megatron.planning.plan import make_plan
from eapo_megatron.recipe_files import built_in_recipes, load_recipe

GIB = 2**30

_HEAD = """# Recipes

Written by `eapo-megatron recipes --markdown` from the recipes and from what `plan` gives for them.

```text
eapo-megatron recipes                       # this list
eapo-megatron recipes --copy NAME           # a copy here, to edit
eapo-megatron plan NAME                     # its memory, work and communication in full
eapo-megatron train NAME [key.path=value ...]
```

A recipe holds overrides of its parent, which `defaults` names; `base.yaml` is the parent of all. A name ends in nodes,
GPUs a node and layout: `1n8g-tp2` is one node of eight GPUs at TP=2."""

_ON_CPU = """## On CPU

These run on two CPU cores, the second with vLLM's CPU build (`make train-vllm`). The third asks for a folder first: its
first lines say how to make it."""

_ON_GPUS = """## On GPUs

These are planned and were not run: memory is predicted for the fullest rank, and each fits the GPU that it names. They
read `/models/NAME` and `/data/deepscaler.json` unless `model.path`, `data.train_path` and `data.validation_path` say
otherwise."""

_PARENTS = """## Parents

Recipes inherit from these; they are not runs of their own."""

_ELSEWHERE = """## Elsewhere in this folder

| folder | what it is |
|---|---|
| `study/` | the recipe of the paper's study on the built-in task ([docs/study.md](../docs/study.md)) |
| `helpers/` | makes the small random model of the recipe with real prompts |
| `nemo/`, `nemo_aligner/`, `nemo_rl/` | launch scripts and configurations: [docs/nemo.md](../docs/nemo.md) |"""


def recipe_page() -> str:
    """The page: three tables of the built-in recipes."""
    on_cpu, on_gpus, parents = [], [], []
    for name, about in built_in_recipes().items():
        if not _is_run(name):
            parents.append(f"| [`{name}`]({name}.yaml) | {about} |")
            continue
        recipe = load_recipe(name)
        cells = [f"[`{name}`]({name}.yaml)", about, _layout(recipe)]
        if recipe.cluster.device == "cpu":
            on_cpu.append(f"| {' | '.join([*cells, str(recipe.cluster.world_size)])} |")
        else:
            on_gpus.append(f"| {' | '.join([*cells, *_planned(recipe, name)])} |")
    sections = (
        [_HEAD],
        [_ON_CPU, "", "| recipe | what it is | layout | ranks |", "|---|---|---|---|", *on_cpu],
        [
            _ON_GPUS,
            "",
            "| recipe | what it is | layout | GPUs | response tokens | GiB a GPU, training / rollout |",
            "|---|---|---|---|---|---|",
            *on_gpus,
        ],
        [_PARENTS, "", "| recipe | what it is |", "|---|---|", *parents],
        [_ELSEWHERE],
    )
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _is_run(name: str) -> bool:
    """Parents are named by what they hold, runs by method, model, cluster and layout."""
    return "-" in name


def _layout(recipe: Recipe) -> str:
    return ", ".join(_sizes(recipe))


def _sizes(recipe: Recipe) -> Iterator[str]:
    parallel = recipe.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    for name, size in {"TP": tp, "PP": pp, "CP": cp, "EP": parallel.expert_model_parallel_size}.items():
        if size > 1:
            yield f"{name} {size}"
    yield f"DP {recipe.cluster.world_size // (tp * pp * cp)}"


def _planned(recipe: Recipe, name: str) -> list[str]:
    memory = make_plan(recipe, source=name).memory
    return [
        f"{recipe.cluster.world_size} x {recipe.cluster.gpu}",
        f"{recipe.rollout.max_response_tokens:,}",
        f"{memory.training_peak / GIB:.0f} / {memory.rollout_peak / GIB:.0f}",
    ]
