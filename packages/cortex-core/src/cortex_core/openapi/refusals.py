"""Refusals that a schema cannot express: bodies that fit it and are refused all the same, by surface, and why.

They stand in the document as `x-refusals` of an operation. `param` is a regular expression for the field that the
error names, in the words of the dialect.
"""

from __future__ import annotations

import re

import msgspec

from cortex_core.errors import ApiError

SHAPE_CODES = ("invalid_type", "missing_required_parameter", "missing_model_field")
"""Codes of bodies of the wrong shape. Schemas speak of shape, so nothing that fits one gets these."""


class Refusal(msgspec.Struct, frozen=True):
    """A reason to refuse a body that fits its schema; `param` is a pattern of the field's path."""

    param: str
    why: str


_TOOLS = Refusal("tool_choice.*", "A tool that is chosen must be declared in `tools`, and `required` needs one.")
_SCHEMAS = "A JSON Schema or grammar must be valid, satisfiable, and of the keywords that can be enforced."
_BIAS = Refusal(r"logit_bias.*", "A token id must be in the model's vocabulary.")
_STOPS = Refusal("stop", "There is a limit to the characters of all stop sequences together.")
_VARIABLES = Refusal("chat_template_kwargs", "There is a limit to their bytes.")
_PROMPT = "The model's chat template must accept the turns, a text model takes no images, and the prompt must fit."

CHAT = (
    _TOOLS,
    Refusal("top_logprobs", "It needs `logprobs`."),
    Refusal("continue_final_message", "The last message must be the assistant's, without tool calls."),
    _BIAS,
    _STOPS,
    _VARIABLES,
    Refusal(r"response_format.*|guided_json|tools\[\d+\].*", _SCHEMAS),
    Refusal(r"messages.*", _PROMPT),
)
COMPLETIONS = (
    Refusal("best_of", "Only as many candidates are generated as are returned."),
    Refusal("n", "There is a limit to the choices over all prompts."),
    Refusal("max_tokens", "0 makes sense with `echo` and without `logprobs` only."),
    Refusal("suffix", "The model must be able to fill in the middle."),
    _BIAS,
    _STOPS,
    Refusal(r"prompt.*", "Token ids must be in the model's vocabulary, and a prompt must hold a token and fit."),
)
RESPONSES = (
    _TOOLS,
    _BIAS,
    _STOPS,
    _VARIABLES,
    Refusal(r"(tools|input)\[\d+\].*", "There is a limit to all tools, and to what namespaces say of theirs."),
    Refusal(r"text.*|(tools|input)\[\d+\].*(parameters|format).*", _SCHEMAS),
    Refusal(r"input.*", f"At least one item must hold content. {_PROMPT}"),
)
MESSAGES = (
    _TOOLS,
    Refusal("stop_sequences", "There is a limit to the characters of all stop sequences together."),
    Refusal(r"(tools|messages)\[\d+\].*", "There is a limit to all tools, those in messages too."),
    Refusal("max_tokens", "It must be greater than `thinking.budget_tokens`."),
    Refusal(r"output_config.*|output_format.*|(tools|messages)\[\d+\].*input_schema.*", _SCHEMAS),
    Refusal(r"messages.*", f"At least one message must hold content. {_PROMPT}"),
)


def explained(error: ApiError, refusals: tuple[Refusal, ...]) -> bool:
    """Whether an error of a body that fits its schema is one of these."""
    if error.code in SHAPE_CODES:
        return False
    return any(re.fullmatch(refusal.param, error.param or "") for refusal in refusals)
