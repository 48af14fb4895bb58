"""The demo model's files: they load, stay small, and speak ChatML in the shapes that clients send."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import jinja2.sandbox
import pytest
from tokenizers import Tokenizer

DEMO_MODEL = Path(__file__).parents[2] / "packages" / "neuron" / "src" / "neuron" / "demo_model"
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Current weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
NO_THOUGHT = "<think>\n\n</think>\n\n"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))


@pytest.fixture(scope="module")
def template() -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string((DEMO_MODEL / "chat_template.jinja").read_text(encoding="utf-8"))


def read_json(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((DEMO_MODEL / name).read_text(encoding="utf-8"))
    return value


def call_of(arguments: object) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}


def test_weights_have_the_names_and_shapes_that_the_config_promises() -> None:
    weights = DEMO_MODEL / "model.safetensors"
    assert weights.stat().st_size <= 8_000_000
    with weights.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    config = read_json("config.json")
    hidden, inner, size = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    expected = {"model.embed_tokens.weight": [config["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "self_attn.q_proj": [heads * size, hidden],
            "self_attn.k_proj": [kv_heads * size, hidden],
            "self_attn.v_proj": [kv_heads * size, hidden],
            "self_attn.o_proj": [hidden, heads * size],
            "self_attn.q_norm": [size],
            "self_attn.k_norm": [size],
            "mlp.gate_proj": [inner, hidden],
            "mlp.up_proj": [inner, hidden],
            "mlp.down_proj": [hidden, inner],
            "input_layernorm": [hidden],
            "post_attention_layernorm": [hidden],
        }.items():
            expected[f"model.layers.{layer}.{name}.weight"] = shape
    assert {name: entry["shape"] for name, entry in header.items()} == expected
    assert {entry["dtype"] for entry in header.values()} == {"BF16"}
    parameters = sum(math.prod(shape) for shape in expected.values())
    assert parameters < 4_000_000, "the model says that it has fewer than four million parameters"


def test_config_is_a_qwen3_with_65536_positions(tokenizer: Tokenizer) -> None:
    config = read_json("config.json")
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["model_type"] == "qwen3"
    assert config["max_position_embeddings"] == 65536
    assert config["tie_word_embeddings"] is True
    assert config["vocab_size"] == tokenizer.get_vocab_size() == 4096
    generation = read_json("generation_config.json")
    assert generation["eos_token_id"] == [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    assert generation["pad_token_id"] == tokenizer.token_to_id("<|endoftext|>")
    assert generation["do_sample"] is False


def test_only_the_control_tokens_are_special(tokenizer: Tokenizer) -> None:
    added = tokenizer.get_added_tokens_decoder()
    assert {token.content: token.special for token in added.values()} == {
        **dict.fromkeys(CONTROL_TOKENS, True),
        **dict.fromkeys(MARKUP_TOKENS, False),
    }
    declared = read_json("tokenizer_config.json")["added_tokens_decoder"]
    assert {int(id_): entry["content"] for id_, entry in declared.items()} == {
        id_: token.content for id_, token in added.items()
    }
    for token in CONTROL_TOKENS + MARKUP_TOKENS:
        assert len(tokenizer.encode(f"a{token}b").ids) == 3


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world!",
        "  indented\n\n\n\tcode(x) += 1  # trailing  \n",
        "naïve café Zürich ß 日本語 привет Ελλάδα",
        "🙂🚀👩‍👩‍👧 €→",
        "\x00\x01\x7f\r\n\r\r\n\u2028\u200b\ufeff",
        '{"a": [1, 2.5e-3, true, null], "b": "\\"x\\""}',
        "".join(chr(code) for code in range(32, 1024)),
        " ",
        "",
    ],
)
def test_text_survives_a_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False) == text


def test_every_byte_has_a_token_of_its_own(tokenizer: Tokenizer) -> None:
    singles = [token for token in tokenizer.get_vocab() if len(token) == 1]
    assert len(singles) == 256


def test_every_digit_is_a_token(tokenizer: Tokenizer) -> None:
    assert [tokenizer.decode([id_]) for id_ in tokenizer.encode("12+3045").ids] == ["1", "2", "+", "3", "0", "4", "5"]
    assert not [
        token
        for token in tokenizer.get_vocab()
        if sum(map(str.isascii, token)) > 1 and any("0" <= c <= "9" for c in token)
    ]


def test_an_agent_prompt_of_50_kb_stays_below_20_000_tokens(tokenizer: Tokenizer) -> None:
    design = "\n".join(
        f"- Use the {verb} tool when you want to {verb.lower()} something in the repository. Do not guess: look at the "
        "files first, keep changes small, and explain what you did in one or two sentences. If a command fails, read "
        "its output before you try again, and never delete files that you did not create yourself."
        for verb in ("Read", "Search", "Change", "Build", "Test", "Review", "Plan", "Describe")
    )
    tools = json.dumps(
        [
            {
                "type": "function",
                "function": {
                    "name": name,
                    "description": f"Runs {name.lower()} and returns its output, up to 30000 characters.",
                    "parameters": {
                        "$schema": "http://json-schema.org/draft-07/schema#",
                        "type": "object",
                        "properties": {
                            "file_path": {"type": "string", "description": "The absolute path to the file"},
                            "timeout": {
                                "type": "number",
                                "description": "Optional timeout in milliseconds (max 600000)",
                            },
                            "replace_all": {"type": "boolean", "default": False},
                        },
                        "required": ["file_path"],
                        "additionalProperties": False,
                    },
                },
            }
            for name in ("Bash", "Glob", "Grep", "Read", "Edit", "Write", "WebFetch")
        ]
    )
    prompt = (design + "\n" + tools + "\n") * 20
    prompt = prompt[:50_000]
    assert len(tokenizer.encode(prompt).ids) < 20_000


def test_plain_chat(template: jinja2.Template) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": [{"type": "text", "text": "What is"}, {"type": "text", "text": "12+30?"}]},
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>user\nWhat is\n12+30?<|im_end|>\n"
    )
    assert template.render(messages=messages) == expected
    opened = expected + "<|im_start|>assistant\n"
    assert template.render(messages=messages, add_generation_prompt=True) == opened + NO_THOUGHT
    assert template.render(messages=messages, add_generation_prompt=True, enable_thinking=False) == opened + NO_THOUGHT
    assert template.render(messages=messages, add_generation_prompt=True, enable_thinking=True) == opened


def test_tools_are_listed_behind_the_system_prompt(template: jinja2.Template) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    text = template.render(messages=messages, tools=[WEATHER_TOOL], add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n\n")
    assert f"<tools>\n{json.dumps(WEATHER_TOOL)}\n</tools>" in text
    assert text.endswith("<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n" + NO_THOUGHT)
    alone = template.render(messages=messages[1:], tools=[WEATHER_TOOL])
    assert alone.startswith("<|im_start|>system\n# Tools\n\n")


@pytest.mark.parametrize("arguments", [{"city": "Oslo"}, '{"city": "Oslo"}'], ids=["object", "string"])
@pytest.mark.parametrize("content", ["", None], ids=["empty", "null"])
def test_tool_calls_and_results(template: jinja2.Template, arguments: object, content: str | None) -> None:
    messages = [
        {"role": "user", "content": "weather in Oslo and Rome"},
        {"role": "assistant", "content": content, "tool_calls": [call_of(arguments), call_of({"city": "Rome"})]},
        {"role": "tool", "tool_call_id": "call_1", "content": "cloudy"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "sunny"}]},
    ]
    assert template.render(messages=messages, add_generation_prompt=True) == (
        "<|im_start|>user\nweather in Oslo and Rome<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>\ncloudy\n</tool_response>\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n" + NO_THOUGHT
    )


def test_text_before_a_tool_call_is_kept_on_a_line_of_its_own(template: jinja2.Template) -> None:
    messages = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": "I look.", "tool_calls": [call_of({})]},
    ]
    assert '\nI look.\n<tool_call>\n{"name": "get_weather", "arguments": {}}' in template.render(messages=messages)


def test_past_reasoning_is_dropped_and_that_of_a_running_tool_loop_kept(template: jinja2.Template) -> None:
    answered = {"role": "assistant", "reasoning_content": "Add.", "content": "42"}
    inline = {"role": "assistant", "content": "<think>\nAdd.\n</think>\n\n42"}
    question = {"role": "user", "content": "12+30"}
    for past in (answered, inline):
        text = template.render(messages=[question, past, question], add_generation_prompt=True, enable_thinking=True)
        assert "<think>" not in text
        assert "<|im_start|>assistant\n42<|im_end|>" in text
    calling = {"role": "assistant", "reasoning_content": "Look.", "content": "", "tool_calls": [call_of({})]}
    text = template.render(messages=[question, calling, {"role": "tool", "content": "1"}], add_generation_prompt=True)
    assert "<|im_start|>assistant\n<think>\nLook.\n</think>\n\n<tool_call>" in text


def test_conversations_without_messages_or_with_late_system_turns_render(template: jinja2.Template) -> None:
    assert template.render(messages=[]) == ""
    messages = [
        {"role": "user", "content": "a"},
        {"role": "system", "content": "b"},
        {"role": "developer", "content": "c"},
    ]
    assert template.render(messages=messages) == (
        "<|im_start|>user\na<|im_end|>\n<|im_start|>system\nb<|im_end|>\n<|im_start|>system\nc<|im_end|>\n"
    )


def test_transformers_reads_the_files_and_renders_the_same_prompt(
    template: jinja2.Template, tokenizer: Tokenizer
) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "weather in São Paulo?"}]
    text = loaded.apply_chat_template(messages, tools=[WEATHER_TOOL], add_generation_prompt=True, tokenize=False)
    assert text == template.render(messages=messages, tools=[WEATHER_TOOL], add_generation_prompt=True)
    assert loaded(text)["input_ids"] == tokenizer.encode(text, add_special_tokens=False).ids
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")
    config = transformers.AutoConfig.from_pretrained(DEMO_MODEL)
    assert config.rope_parameters["rope_theta"] == read_json("config.json")["rope_theta"]
