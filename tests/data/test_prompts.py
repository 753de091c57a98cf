import re
from pathlib import Path

import pytest

from eapo_megatron.config import RecipeError
from eapo_megatron.data import DataError, Example, arithmetic_tokenizer, build_prompts, load_tokenizer
from eapo_megatron.data.tokenizers import character_tokenizer

EXAMPLES = [Example("1+2=?", "3", "so 3"), Example("1+2+3+4+5=?", ["15", "16"]), Example("7+2=?", "9")]
CHAT = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def chat_tokenizer():
    tokenizer = character_tokenizer("abcdefghijklmnopqrstuvwxyz:0123456789+=? .\n")
    tokenizer.chat_template = CHAT
    return tokenizer


def test_plain_template() -> None:
    tokenizer = arithmetic_tokenizer()
    prompts = build_prompts(EXAMPLES, tokenizer, template="{prompt}", max_prompt_tokens=8)
    assert prompts.too_long == 1
    assert len(prompts) == 2
    assert [prompt.index for prompt in prompts.prompts] == [0, 2]
    assert [prompt.text for prompt in prompts.prompts] == ["1+2=?", "7+2=?"]
    assert [prompt.answer for prompt in prompts.prompts] == ["3", "9"]
    assert [prompt.solution for prompt in prompts.prompts] == ["so 3", None]
    assert all(tokenizer.decode(prompt.token_ids) == prompt.text for prompt in prompts.prompts)
    assert prompts[1] is prompts.prompts[1]


def test_length_limit_is_inclusive() -> None:
    tokenizer = arithmetic_tokenizer()
    assert build_prompts(EXAMPLES, tokenizer, template="{prompt}", max_prompt_tokens=11).too_long == 0
    assert build_prompts(EXAMPLES, tokenizer, template="{prompt}", max_prompt_tokens=10).too_long == 1


def test_braces_of_the_template_and_of_the_prompt_are_kept() -> None:
    template = "Put it in \\boxed{}. {prompt}{"
    prompts = build_prompts(
        [Example("{prompt} {x}", "1")], arithmetic_tokenizer(), template=template, suffix=" {}", max_prompt_tokens=100
    )
    assert prompts[0].text == "Put it in \\boxed{}. {prompt} {x} {}{"


def test_chat_template_with_system_prompt_and_suffix() -> None:
    tokenizer = chat_tokenizer()
    prompts = build_prompts(
        EXAMPLES[:1], tokenizer, template="chat", system_prompt="be brief.", suffix="\nthink", max_prompt_tokens=100
    )
    assert prompts[0].text == "system:be brief.<eos>user:1+2=?\nthink<eos>assistant:"
    eos = tokenizer.eos_token_id
    assert [i for i, token in enumerate(prompts[0].token_ids) if token == eos] == [16, 33]
    assert tokenizer.decode(prompts[0].token_ids) == prompts[0].text
    without = build_prompts(EXAMPLES[:1], tokenizer, template="chat", max_prompt_tokens=100)
    assert without[0].text == "user:1+2=?<eos>assistant:"


def test_special_tokens_of_the_tokenizer_come_once() -> None:
    from tokenizers import processors

    tokenizer = chat_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    plain = build_prompts(EXAMPLES[:1], tokenizer, template="{prompt}", max_prompt_tokens=100)
    assert tokenizer.decode(plain[0].token_ids) == "<eos>1+2=?"
    chat = build_prompts(EXAMPLES[:1], tokenizer, template="chat", max_prompt_tokens=100)
    assert tokenizer.decode(chat[0].token_ids) == "user:1+2=?<eos>assistant:"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "chat"}, "needs a chat template, and tokenizer 'some/model' has none"),
        ({"template": "question"}, 'template must be "chat" or text with one "{prompt}", got \'question\''),
        ({"template": "{prompt}{prompt}"}, 'template must be "chat" or text with one "{prompt}"'),
        ({"system_prompt": "be brief"}, 'system_prompt must be None unless template is "chat"'),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens must be at least 1, got 0"),
    ],
)
def test_unusable_settings(settings: dict, message: str) -> None:
    tokenizer = arithmetic_tokenizer()
    tokenizer.name_or_path = "some/model"
    with pytest.raises(ValueError, match=message):
        build_prompts(EXAMPLES, tokenizer, **{"template": "{prompt}", "max_prompt_tokens": 10, **settings})


def test_no_prompt_short_enough() -> None:
    with pytest.raises(DataError, match="no prompt of 3 has at most max_prompt_tokens = 4 tokens"):
        build_prompts(EXAMPLES, arithmetic_tokenizer(), template="{prompt}", max_prompt_tokens=4)


def test_loaded_tokenizer_pads_with_its_end_of_sequence(tmp_path) -> None:
    tokenizer = arithmetic_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "without_pad")
    loaded = load_tokenizer(tmp_path / "without_pad")
    assert loaded.pad_token_id == loaded.eos_token_id
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "without_eos")
    with pytest.raises(ValueError, match="without_eos has no end-of-sequence token"):
        load_tokenizer(tmp_path / "without_eos")


def test_alphabet_with_a_repeated_character() -> None:
    with pytest.raises(ValueError, match="alphabet must not repeat a character, got 'aba'"):
        character_tokenizer("aba")


CHAT_EXAMPLE = Example(
    [
        {"role": "system", "content": "be brief."},
        {"role": "user", "content": "1+1=?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "2+2=?"},
    ],
    "4",
)


def test_the_messages_of_a_record() -> None:
    prompts = build_prompts([CHAT_EXAMPLE], chat_tokenizer(), template="chat", suffix=" so", max_prompt_tokens=200)
    assert prompts[0].text == ("system:be brief.<eos>user:1+1=?<eos>assistant:2<eos>user:2+2=? so<eos>assistant:")
    replaced = build_prompts(
        [CHAT_EXAMPLE], chat_tokenizer(), template="chat", system_prompt="think.", max_prompt_tokens=200
    )
    assert replaced[0].text.startswith("system:think.<eos>user:1+1")
    with pytest.raises(DataError, match='must be "chat" for prompts of several messages: example 0 has 4'):
        build_prompts([CHAT_EXAMPLE], chat_tokenizer(), template="{prompt}", max_prompt_tokens=200)


@pytest.mark.parametrize(
    ("template", "detail"),
    [
        ("{{ raise_exception('no system role') }}", "TemplateError: no system role"),
        ("{{ messages[0].content.nothing.more }}", "UndefinedError: "),
        ("{% for m in messages %}", "TemplateSyntaxError: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError: "),
    ],
)
def test_a_chat_template_that_fails(template: str, detail: str) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.name_or_path, tokenizer.chat_template = "some/model", template
    message = f"^data.template: the chat template of tokenizer 'some/model' fails on a chat of user: {detail}"
    with pytest.raises(DataError, match=message) as refused:
        build_prompts(EXAMPLES, tokenizer, template="chat", max_prompt_tokens=100)
    assert "\n" not in str(refused.value)


def test_prompts_without_a_token_or_that_are_no_text() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.name_or_path, tokenizer.chat_template = "some/model", "{{ '' }}"
    with pytest.raises(DataError, match="tokenizer 'some/model' makes no token of the prompt ''"):
        build_prompts(EXAMPLES, tokenizer, template="chat", max_prompt_tokens=100)
    with pytest.raises(
        DataError, match=r"data.template, system_prompt or suffix holds a lone surrogate: '1\+2=\?\\ud800'"
    ):
        build_prompts(EXAMPLES, tokenizer, template="{prompt}", suffix="\ud800", max_prompt_tokens=100)


QWEN2 = '{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}'
VOCABULARY = '{"a": 0, "b": 1, "<|im_end|>": 2}'


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        ({"tokenizer_config.json": QWEN2}, "tokenizer {} has no vocabulary: is tokenizer.json missing?"),
        (
            {"tokenizer_config.json": QWEN2, "vocab.json": VOCABULARY},
            "tokenizer {} has vocab.json and neither merges.txt",
        ),
        ({"tokenizer_config.json": QWEN2, "merges.txt": "a b\n"}, "tokenizer {} has merges.txt and neither vocab.json"),
        ({"tokenizer.json": "version https://git-lfs.github.com/spec/v1\n"}, "{}/tokenizer.json is a Git LFS pointer"),
        ({"tokenizer.json": "{", "tokenizer_config.json": QWEN2}, "{}/tokenizer.json: malformed JSON"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": QWEN2}, "tokenizer {} cannot be loaded: "),
        ({"tokenizer.json": "[" * 100_000}, "{}/tokenizer.json: JSON nested too deeply"),
        ({"tokenizer_config.json": "3"}, "{}/tokenizer_config.json: must hold an object, got int"),
        ({"tokenizer.json": None, "tokenizer_config.json": QWEN2}, "{}/tokenizer.json is a folder, not a file"),
        ({}, "tokenizer {} cannot be loaded: "),
    ],
)
def test_folders_without_a_whole_tokenizer(tmp_path: Path, files: dict[str, str | None], sentence: str) -> None:
    for name, text in files.items():
        (tmp_path / name).mkdir() if text is None else (tmp_path / name).write_text(text)
    with pytest.raises(RecipeError, match="^" + re.escape(sentence.format(tmp_path))) as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)
