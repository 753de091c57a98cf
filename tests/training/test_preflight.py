"""What can be wrong with a run is one sentence before any rank starts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from safetensors.torch import save_file

from eapo_megatron.config import Parallel, RecipeError
from eapo_megatron.data import arithmetic_tokenizer
from eapo_megatron.policy.layout_checks import check_layout
from eapo_megatron.recipe_files import parse_recipe
from eapo_megatron.records import trackers
from eapo_megatron.rollout.rollouts import Sampler
from eapo_megatron.saved_recipe import RECIPE_FILE, saved_form
from eapo_megatron.training.preflight import prepare
from eapo_megatron.weights.families import FAMILIES
from eapo_megatron.weights.huggingface import RandomWeights

ARCHITECTURE = {
    "model_type": "qwen2",
    "vocab_size": 28,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}


def settings(tmp_path: Path, **sections: Any) -> dict[str, Any]:
    base: dict[str, Any] = {
        "name": "run",
        "model": {"architecture": ARCHITECTURE},
        "data": {"task": "arithmetic", "template": "{prompt}", "max_prompt_tokens": 16},
        "rollout": {"max_response_tokens": 48},
        "logging": {"run_dir": str(tmp_path)},
    }
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, dict) else values
    return base


def refusal(tmp_path: Path, world_size: int = 1, **sections: Any) -> str:
    recipe = parse_recipe(settings(tmp_path, **sections), source="r.yaml")
    with pytest.raises(RecipeError) as caught:
        prepare(recipe, world_size, source="r.yaml")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_right_recipe_is_prepared(tmp_path: Path) -> None:
    recipe = parse_recipe(settings(tmp_path, evaluation={"num_prompts": 10}), source="r.yaml")
    ingredients = prepare(recipe, 1, source="r.yaml")
    assert len(ingredients.train) == recipe.data.arithmetic.train_size
    assert len(ingredients.evaluation) == 10
    assert not {p.text for p in ingredients.evaluation} & {p.text for p in ingredients.train.prompts}


@pytest.mark.parametrize(
    ("evaluation", "sentence"),
    [
        ({"benchmarks": ["amc", "aime23"]}, "evaluation.benchmarks: 'aime23' is none of aime24, aime25, amc"),
        ({"benchmarks": ["amc", "amc"]}, "evaluation.benchmarks: amc is there twice"),
        ({"benchmarks": ["aime24"]}, "has none of aime24.jsonl, "),
        ({"benchmarks": ["amc"]}, "no usable problem ("),
    ],
)
def test_benchmarks_are_known_and_there(tmp_path: Path, evaluation: dict, sentence: str) -> None:
    (tmp_path / "amc.jsonl").write_text('{"problem": "no answer"}\n')
    assert sentence in refusal(tmp_path, evaluation={**evaluation, "benchmarks_path": str(tmp_path)})


def test_benchmarks_are_read_with_the_runs_own_template(tmp_path: Path) -> None:
    (tmp_path / "amc.jsonl").write_text('{"problem": "1+2=", "answer": 3}\n{"problem": "no answer"}\n')
    evaluation = {"benchmarks": ["amc"], "benchmarks_path": str(tmp_path)}
    sections = {"evaluation": evaluation, "data": {"suffix": "?"}}
    (task,) = prepare(parse_recipe(settings(tmp_path, **sections), source="r.yaml"), 1, source="r.yaml").benchmarks
    assert [(problem, prompt.text, prompt.answer) for problem, prompt in task.prompts.items()] == [(0, "1+2=?", "3")]
    assert (task.n, len(task.left_out)) == (32, 1)
    recipe = parse_recipe(settings(tmp_path, **sections), source="r.yaml")
    assert prepare(recipe, 1, source="r.yaml", reads_benchmarks=False).benchmarks == []  # as ranks but the first do


@pytest.mark.parametrize(
    ("world_size", "parallel", "sentence"),
    [
        (2, {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, "= 4 does not divide the world of 2"),
        (4, {"tensor_model_parallel_size": 2, "data_parallel_size": 1}, "= 2 is not the world of 4 ranks"),
        (
            6,
            {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
            "tensor_model_parallel_size 2 x pipeline_model_parallel_size 1 x context_parallel_size 2 = 4 does not "
            "divide the world of 6 ranks",
        ),
        (
            4,
            {"context_parallel_size": 2, "data_parallel_size": 4},
            "context_parallel_size 2 x data_parallel_size 4 = 8 is not the world of 4 ranks",
        ),
        (3, {"tensor_model_parallel_size": 3}, "3 does not divide the model's num_attention_heads 4"),
        (8, {"pipeline_model_parallel_size": 8}, "leaves a stage empty"),
        (3, {"pipeline_model_parallel_size": 3}, "does not divide evenly"),
        (2, {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 4}, "leaves a stage empty"),
        (
            2,
            {
                "pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 1,
                "num_layers_in_last_pipeline_stage": 2,
            },
            "layers over",
        ),
        (
            2,
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 4},
            "virtual_pipeline_model_parallel_size 4 does not divide the 2 layers",
        ),
        (
            2,
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 2,
                "num_layers_in_last_pipeline_stage": 2,
            },
            "leaves no stage between them, which interleaving needs",
        ),
        (1, {"num_layers_in_first_pipeline_stage": 1}, "need pipeline_model_parallel_size > 1"),
    ],
)
def test_layouts_that_do_not_fit(tmp_path: Path, world_size: int, parallel: dict, sentence: str) -> None:
    assert sentence in refusal(tmp_path, world_size, parallel=parallel, train={"packing": "segments"})


MIXTURE = {**ARCHITECTURE, "model_type": "qwen3_moe"} | {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
}
SP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize(
    ("world_size", "parallel", "sentence"),
    [
        (2, {"tensor_model_parallel_size": 2}, "tensor_model_parallel_size 2 needs sequence_parallel: true"),
        (4, {"expert_model_parallel_size": 4}, "expert_model_parallel_size 4 does not divide the model's 6 experts"),
        (4, {"expert_model_parallel_size": 3}, "1 x expert_model_parallel_size 3 = 3 does not divide the 4 ranks"),
        (
            4,
            {"expert_model_parallel_size": 3, "pipeline_model_parallel_size": 2},
            "does not divide the 2 ranks of a pipeline stage",
        ),
        (
            10,
            {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 5},
            "expert_tensor_parallel_size 5 does not divide the experts' width 12",
        ),
        (
            6,
            {**SP2, "expert_model_parallel_size": 3, "expert_tensor_parallel_size": 1},
            "= 3 and tensor_model_parallel_size 2 do not divide one another",
        ),
    ],
)
def test_layouts_that_do_not_fit_experts(tmp_path: Path, world_size: int, parallel: dict, sentence: str) -> None:
    assert sentence in refusal(tmp_path, world_size, model={"architecture": MIXTURE}, parallel=parallel)


def test_layouts_that_fit_experts(tmp_path: Path) -> None:
    for parallel in (
        {"expert_model_parallel_size": 2},
        {**SP2, "expert_model_parallel_size": 2},
        {**SP2, "expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
    ):
        architecture = {**MIXTURE, "intermediate_size": 47}  # of no layer: all have experts
        check_layout(Parallel(**parallel), architecture, 4)


def test_expert_parallelism_needs_experts(tmp_path: Path) -> None:
    sentence = refusal(tmp_path, 2, parallel={"expert_model_parallel_size": 2})
    assert "parallel.expert_model_parallel_size 2: the model has no experts" in sentence


def test_key_value_heads_and_tensor_parallelism_divide_one_another(tmp_path: Path) -> None:
    architecture = {**ARCHITECTURE, "num_attention_heads": 12, "hidden_size": 48, "num_key_value_heads": 6}
    sentence = refusal(tmp_path, 4, model={"architecture": architecture}, parallel={"tensor_model_parallel_size": 4})
    assert "num_key_value_heads 6" in sentence


@pytest.mark.parametrize(
    ("algorithm", "sentence"),
    [
        ({"shaping": {"name": "eapo", "alpha": 0.0}}, "alpha"),
        ({"shaping": {"name": "eapo", "alpha": 1.5}}, "alpha"),
        ({"shaping": {"name": "eapo", "phi": 0.1}}, "phi"),
        ({"shaping": {"name": "eapo", "beta": 1}}, "beta"),
        ({"shaping": {"name": "magic"}}, "magic"),
        ({"advantage_estimator": "magic"}, "algorithm.advantage_estimator must be one of"),
        ({"loss": {"aggregation": "magic"}}, "algorithm.loss.aggregation must be one of"),
        ({"loss": {"name": "magic"}}, "algorithm.loss"),
    ],
)
def test_algorithms_are_checked_by_name_and_option(tmp_path: Path, algorithm: dict, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(settings(tmp_path, algorithm=algorithm), source="r.yaml")
    assert str(caught.value).startswith("r.yaml: algorithm.")
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "mystery"}, "model_type 'mystery' is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window is not supported"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' lacks its factor"),
        ({"num_hidden_layers": 1e9}, "model.architecture: num_hidden_layers must be an integer from 1 to 1000"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"vocab_size": 20}, "more than the model's vocab_size 20"),
        ({"max_position_embeddings": 60}, "exceeds the model's max_position_embeddings 60"),
    ],
)
def test_architectures_that_are_not_honoured(tmp_path: Path, change: dict, sentence: str) -> None:
    assert sentence in refusal(tmp_path, model={"architecture": {**ARCHITECTURE, **change}})


def test_missing_architecture_key_is_named(tmp_path: Path) -> None:
    architecture = {key: value for key, value in ARCHITECTURE.items() if key != "hidden_size"}
    assert "hidden_size is missing" in refusal(tmp_path, model={"architecture": architecture})


def test_data_files(tmp_path: Path) -> None:
    model = {"architecture": ARCHITECTURE, "tokenizer": None}

    def data_refusal(path: Path) -> str:
        data = {"task": None, "train_path": str(path), "template": "{prompt}"}
        from eapo_megatron.data import arithmetic_tokenizer

        arithmetic_tokenizer().save_pretrained(tmp_path / "tokenizer")
        return refusal(tmp_path, model={**model, "tokenizer": str(tmp_path / "tokenizer")}, data=data)

    assert "absent.jsonl" in data_refusal(tmp_path / "absent.jsonl")
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"problem": "1+1=?", "answer": "2"}\n{"problem": \n')
    sentence = data_refusal(broken)
    assert "broken.jsonl" in sentence
    assert "line 2" in sentence
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"problem": "1+" * 50 + "1=?", "answer": "51"}) + "\n")
    assert "max_prompt_tokens" in data_refusal(long)


def test_random_weights_on_a_file_need_a_tokenizer(tmp_path: Path) -> None:
    sentence = refusal(tmp_path, data={"task": None, "train_path": "x.jsonl"})
    assert "model.tokenizer is needed" in sentence


def test_a_run_folder_of_another_experiment(tmp_path: Path) -> None:
    recipe = parse_recipe(settings(tmp_path), source="r.yaml")
    recipe.run_folder.mkdir()
    (recipe.run_folder / RECIPE_FILE).write_text(json.dumps(saved_form(recipe)))
    prepare(recipe, 1, source="r.yaml")
    sentence = refusal(tmp_path, optimizer={"lr": 0.5})
    assert "holds another experiment: optimizer.lr was 1e-06 there and is 0.5 here" in sentence


def test_unknown_engines_and_missing_trackers_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "rollout.engine must be one of megatron, vllm, got 'hf'" in refusal(tmp_path, rollout={"engine": "hf"})
    monkeypatch.setattr(trackers, "find_spec", lambda package: None if package == "wandb" else package)
    assert "logging.wandb_project needs the package wandb" in refusal(tmp_path, logging={"wandb_project": "p"})


TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def model_folder(tmp_path: Path, generation: Any = None, template: str | None = None) -> Path:
    """A Hugging Face folder of random weights with the tokenizer of the arithmetic task."""
    from eapo_megatron.weights.assets import write_config

    folder = tmp_path / "model"
    folder.mkdir()
    write_config(folder, ARCHITECTURE)
    source = RandomWeights(ARCHITECTURE, seed=1)
    shapes = FAMILIES["qwen2"].hf_shapes(ARCHITECTURE)
    save_file({name: source.read(name) for name in shapes}, folder / "model.safetensors")
    tokenizer = arithmetic_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize(
    ("generation", "own", "stops"),
    [
        (None, [], (1,)),
        ({}, [3], (1, 3)),
        ({"eos_token_id": 2}, [], (1, 2)),
        ({"eos_token_id": [2, 0, 1]}, [5], (0, 1, 2, 5)),
    ],
)
def test_stop_tokens_are_those_of_tokenizer_generation_config_and_recipe(
    tmp_path: Path, generation: Any, own: list[int], stops: tuple[int, ...]
) -> None:
    model = {"path": str(model_folder(tmp_path, generation)), "architecture": None}
    recipe = parse_recipe(settings(tmp_path, model=model, rollout={"stop_token_ids": own}), source="r.yaml")
    ingredients = prepare(recipe, 1, source="r.yaml")
    assert ingredients.stop_token_ids == stops
    runtime = SimpleNamespace(is_replica_leader=False)
    sampler = Sampler(None, recipe, ingredients.tokenizer, runtime, stop_token_ids=stops)  # type: ignore[arg-type]
    assert sampler.sampling(temperature=1.0, top_p=1.0).stop_token_ids == stops


@pytest.mark.parametrize(
    ("generation", "sentence"),
    [
        ({"eos_token_id": [1, 28]}, "generation_config.json: eos_token_id: 28 is not a token of the model"),
        ({"eos_token_id": -1}, "generation_config.json: eos_token_id: -1 is not a token of the model"),
        ({"eos_token_id": "</s>"}, "generation_config.json: eos_token_id must be a token's number"),
        ([], "generation_config.json: must hold an object, got list"),
    ],
)
def test_generation_configs_that_cannot_be_followed(tmp_path: Path, generation: Any, sentence: str) -> None:
    folder = model_folder(tmp_path, generation)
    assert f"{folder}/{sentence}" in refusal(tmp_path, model={"path": str(folder), "architecture": None})


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "data.template \"chat\" needs a chat template, and tokenizer '{}' has none"),
        (
            "{{ messages[9].content.x }}",
            "data.template: the chat template of tokenizer '{}' fails on a chat of user: Unde",
        ),
        ("{% if %}", "data.template: the chat template of tokenizer '{}' fails on a chat of user: TemplateSyntaxError"),
        ("{{ '' }}", "tokenizer '{}' makes no token of the prompt ''"),
    ],
)
def test_chat_templates_that_do_not_work(tmp_path: Path, template: str | None, sentence: str) -> None:
    folder = model_folder(tmp_path, template=template)
    model, data = {"path": str(folder), "architecture": None}, {"template": "chat"}
    assert sentence.format(folder) in refusal(tmp_path, model=model, data=data)


def test_data_formats_and_their_fields(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, template=TEMPLATE)
    model = {"path": str(folder), "architecture": None}
    question = {"role": "user", "content": "1+1=?"}
    records = {
        "verl": {"prompt": [question], "reward_model": {"ground_truth": "2"}},
        "nemo_rl": {"messages": [question, {"role": "assistant", "content": "2"}]},
        "gsm8k": {"question": "1+1=?", "answer": "so #### 2"},
        "math": {"problem": "1+1=?", "answer": 2},
    }
    for format_, record in records.items():
        path = tmp_path / f"{format_}.jsonl"
        path.write_text(json.dumps(record))
        data = {"task": None, "train_path": str(path), "format": format_, "template": "chat"}
        recipe = parse_recipe(settings(tmp_path, model=model, data=data), source="r.yaml")
        (prompt,) = prepare(recipe, 1, source="r.yaml").train.prompts
        assert (prompt.text, prompt.answer) == ("1+1=?", "2")
    data |= {"answer_field": "reward_model.truth", "format": "verl", "train_path": str(tmp_path / "verl.jsonl")}
    assert "line 1: no field 'reward_model.truth'" in refusal(tmp_path, model=model, data=data)


def users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_data_set_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of a function, and what the reward function asks for of them; errors name the function and the record."""
    users_module(
        tmp_path,
        monkeypatch,
        "users_data",
        "def records(split):\n"
        "    for n in range(3 if split == 'train' else 1):\n"
        "        yield {'problem': f'{n}+1=?', 'answer': n + 1, 'level': n}\n"
        "def train_alone(split):\n"
        "    return [{'problem': '1', 'answer': '1'}] if split == 'train' else None\n"
        "def nothing(split):\n    return None\n"
        "def broken(split):\n    raise OSError('the server is away')\n"
        "def bare(split):\n    return ['1+1=2']\n"
        "def without_answers(split):\n    return [{'problem': '1+1=?'}]\n"
        "def reward(response, answer, record):\n    return record['level']\n",
    )

    def data(name: str) -> dict[str, Any]:
        return {"task": None, "function": f"users_data:{name}", "template": "{prompt}"}

    arithmetic_tokenizer().save_pretrained(tmp_path / "tokenizer")
    model = {"tokenizer": str(tmp_path / "tokenizer")}
    recipe = settings(tmp_path, model=model, data=data("records"), reward={"function": "users_data:reward"})
    ingredients = prepare(parse_recipe(recipe, source="r.yaml"), 1, source="r.yaml")
    assert [(p.text, p.answer, p.record["level"]) for p in ingredients.train.prompts if p.record] == [
        ("0+1=?", "1", 0),
        ("1+1=?", "2", 1),
        ("2+1=?", "3", 2),
    ]
    assert [p.text for p in ingredients.evaluation] == ["0+1=?"]
    recipe = settings(tmp_path, model=model, data=data("train_alone"))
    ingredients = prepare(parse_recipe(recipe, source="r.yaml"), 1, source="r.yaml")
    assert ingredients.train.prompts[0].record is None, "nothing asks for records"
    assert ingredients.evaluation == []

    for name, sentence in (
        ("nothing", 'data.function users_data:nothing returns no records for "train"'),
        ("broken", "data.function 'users_data:broken' fails for 'train': OSError: the server is away"),
        ("bare", "data.function users_data:bare (train), record 1: must be an object, got str"),
        ("without_answers", "data.function users_data:without_answers (train), record 1: no field 'answer'"),
        ("absent", "r.yaml: data.function 'users_data:absent' cannot be imported: AttributeError"),
    ):
        assert refusal(tmp_path, model=model, data=data(name)).startswith(sentence)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    assert f"tokenizer {folder} has no vocabulary" in refusal(
        tmp_path, model={"path": str(folder), "architecture": None}
    )


def test_yarn_stretches_what_prompts_and_responses_may_have(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 40}
    architecture = {**ARCHITECTURE, "max_position_embeddings": 40, "rope_scaling": yarn}
    assert "exceeds the model's max_position_embeddings 80" in refusal(
        tmp_path, model={"architecture": architecture}, rollout={"max_response_tokens": 65}
    )
    recipe = settings(tmp_path, model={"architecture": architecture}, rollout={"max_response_tokens": 64})
    prepare(parse_recipe(recipe, source="r.yaml"), 1, source="r.yaml")
