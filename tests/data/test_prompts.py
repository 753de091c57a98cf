import pytest

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
