"""`TextModel`: everything the daemon knows of a model's text, from its checkpoint folder and without torch.

A request passes through it twice: `render` and `resolve` make what the engine needs, and one `EventStream` per choice
turns what the engine answers into events.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from cortex_core.conversation import Request

from neuron.daemon.grammar.constraints import GrammarBuilder
from neuron.daemon.output.event_stream import EventStream
from neuron.daemon.prompt.chat_template import ChatTemplate
from neuron.daemon.prompt.render import Renderer
from neuron.daemon.prompt.sampling_defaults import (
    GenerationDefaults,
    check_scored,
    choice_seed,
    request_seed,
    resolve_max_tokens,
    resolve_sampling,
)
from neuron.daemon.prompt.tokenizer import Tokenizer
from neuron.daemon.text import limits
from neuron.daemon.text.markers import reasoning_markers, tool_call_markers
from neuron.daemon.text.prompts import Choice, Prompt
from neuron.protocol import GrammarSpec

LoadStage = Literal["tokenizer", "chat template", "generation defaults"]


class TextModel:
    """One model's tokenizer, template, defaults and markers. Immutable and thread-safe once loaded."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate, defaults: GenerationDefaults) -> None:
        self.tokenizer = tokenizer
        self.template = template
        self.defaults = defaults
        self.reasoning = reasoning_markers(tokenizer, template.all_sources)
        self.tool_calls = tool_call_markers(tokenizer)
        self._renderer = Renderer(tokenizer, template, self.reasoning)
        self._grammars = GrammarBuilder(self.reasoning, self.tool_calls)

    @classmethod
    def load(cls, path: Path, *, at: Callable[[LoadStage], None] = lambda stage: None) -> TextModel:
        """Read a checkpoint folder; `at` is told of each stage as it begins.

        Raises `TokenizerError` if it has no tokenizer that can be read. Takes up to a second or two for a large
        vocabulary, and as long as the checkpoint's own programs like: they are tried out.
        """
        at("tokenizer")
        tokenizer = Tokenizer.load(path)
        at("chat template")
        template = ChatTemplate.load(path, tokenizer.special_tokens)
        at("generation defaults")
        return cls(tokenizer, template, GenerationDefaults.load(path, tokenizer))

    @property
    def tokenizer_json(self) -> str:
        """The fast tokenizer's serialised form, for `EngineConfig.tokenizer_json`."""
        return self.tokenizer.tokenizer_json

    @property
    def renders_tools(self) -> bool:
        return self.template.renders_tools

    @property
    def can_reason(self) -> bool:
        """The chat template knows a reasoning block."""
        pair = self.reasoning
        return pair is not None and (pair.open in self.template.all_sources or pair.close in self.template.all_sources)

    def render(self, request: Request, *, max_model_len: int | None = None, windows: int = 1) -> list[Prompt]:
        """One prompt for a conversation, one per raw prompt of a completion; the same for prefill and for counting.

        max_model_len, windows: a text that is sure to be longer than so many windows is refused untokenised. Raises
        `ApiError`. Takes some milliseconds per 1,000 tokens.
        """
        return self._renderer.render(request, max_model_len, windows=windows)

    def encode(self, text: str, *, max_model_len: int | None = None, windows: int = 1) -> list[int]:
        """Ids of a text alone; max_model_len, windows: as for `render`. Raises `ApiError`."""
        return self._renderer.encode(text, max_model_len, windows=windows)

    def count_tokens(self, request: Request, *, max_model_len: int | None = None) -> int:
        """Prompt tokens as they will be billed; of several windows' worth of text at most. Raises `ApiError`."""
        prompts = self.render(request, max_model_len=max_model_len, windows=limits.COUNTED_WINDOWS)
        return sum(prompt.num_tokens for prompt in prompts)

    def resolve(self, request: Request, prompts: list[Prompt], *, max_model_len: int) -> list[Choice]:
        """One `Choice` per choice, prompt-major (`choice = prompt_index * num_choices + i`).

        Raises `ApiError`: a prompt too long, a bad schema, an unknown tool, a logit_bias outside the vocabulary.
        Compiles grammars, so it may take some milliseconds: call it in an executor when there is a schema.
        """
        scores = request.echo and request.logprobs is not None
        if scores:
            check_scored(prompts, request.num_choices)
        seed = request_seed(request)
        choices: list[Choice] = []
        grammars: dict[str, GrammarSpec | None] = {}
        for prompt in prompts:
            max_tokens = resolve_max_tokens(request, prompt.num_tokens, max_model_len, self.defaults)
            if prompt.reasoning not in grammars:
                grammars[prompt.reasoning] = self._grammars.build(request, prompt)
            grammar = grammars[prompt.reasoning]
            # a grammar ends with a stop token: ignoring those would leave it nothing to end with
            ignores_eos = request.limits.ignore_eos and grammar is None
            for _ in range(request.num_choices):
                choice = len(choices)
                sampling = resolve_sampling(
                    request, self.defaults, self.tokenizer.vocab_size, choice_seed(seed, choice)
                )
                choices.append(
                    Choice(
                        choice=choice,
                        prompt=prompt,
                        sampling=sampling,
                        max_tokens=max_tokens,
                        stop_token_ids=() if ignores_eos else self.defaults.stop_token_ids,
                        grammar=grammar,
                        prompt_logprobs=scores,
                    )
                )
        return choices

    def event_stream(self, request: Request, prompt: Prompt, choice: int = 0, *, answer_id: str = "") -> EventStream:
        """A fresh stream for one choice; answer_id is that of the answer it is part of."""
        return EventStream(
            self.tokenizer.table,
            self.reasoning,
            self.tool_calls,
            request,
            prompt,
            choice,
            answer_id=answer_id,
            bare_function=self.template.uses_xml_calls,
        )
