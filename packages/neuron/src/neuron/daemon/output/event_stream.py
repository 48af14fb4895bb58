"""One choice's tokens become events: detokenised, split into reasoning, text and tool calls, cut at stop strings.

Every character that the detokeniser yields has exactly one fate, in order: it is shown as text, or it is reasoning,
part of a tool call, a marker, trimmed white space, or behind a stop string. Logarithmic probabilities ride along in a
queue that is consumed by the same characters, so a delta carries exactly the tokens of its text. The events of a
sequence, merged, do not depend on how its tokens are grouped into calls of `feed`. This runs in the daemon's loop: the
work of a token does not grow with what has come before it, however much is held back.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Literal

from cortex_core.conversation import Request
from cortex_core.events import Event, Finish, FinishReason, ReasoningDelta, TextDelta, TokenLogprob, TopLogprob

from neuron.daemon.output.detokenizer import Detokenizer
from neuron.daemon.output.stop_strings import StopMatcher, StopStrings
from neuron.daemon.output.tool_calls import ToolCallStream
from neuron.daemon.text.held_text import HeldText
from neuron.daemon.text.markers import MarkerPair
from neuron.daemon.text.prompts import Prompt, offered_tools
from neuron.daemon.text.token_table import TokenTable
from neuron.protocol import FinishKind, Logprobs

_BARE_FUNCTION = "<function="
_LOWEST_LOGPROB = -9999.0  # what the original API reports for "impossible"; JSON has no infinity


class _Pending:
    """A token whose characters have not all met their fate."""

    __slots__ = ("is_partly_shown", "logprob", "num_chars")

    def __init__(self, logprob: TokenLogprob | None, num_chars: int) -> None:
        self.logprob = logprob
        self.num_chars = num_chars
        self.is_partly_shown = False


class EventStream:
    """Feed token ids, get events; then `finish`. Not thread-safe, one per choice.

    is_done: nothing more will be shown (a stop string was met, or the one wanted tool call is complete): the engine's
    sequence can be cancelled, and `finish` be called with any kind. completion_tokens and reasoning_tokens count
    what was fed up to then, for `Usage`; markers count as reasoning tokens.

    answer_id: of the whole answer; the ids of tool calls follow from it. bare_function: `<function=` alone opens a
    tool call too; models taught the XML form forget the marker around it.
    """

    def __init__(
        self,
        tokens: TokenTable,
        reasoning: MarkerPair | None,
        tool_calls: MarkerPair,
        request: Request,
        prompt: Prompt,
        choice: int = 0,
        *,
        answer_id: str = "",
        bare_function: bool = False,
    ) -> None:
        self.choice = choice
        self.is_done = False
        self.completion_tokens = 0
        self.reasoning_tokens = 0
        self._tokens = tokens
        self._prompt = prompt
        self._echo = request.echo and not prompt.is_chat
        self._num_top = request.logprobs
        strips = prompt.is_chat and tokens.strips_leading_space
        self._detokenizer = Detokenizer(tokens.output_bytes, strip_leading_space=strips)
        self._stops = StopMatcher(StopStrings.shared(request.limits.stop)) if request.limits.stop else None
        self._stop_string: str | None = None

        self._reasoning = reasoning if prompt.is_chat else None
        self._tool_marker = tool_calls
        has_tools = prompt.is_chat and bool(offered_tools(request))
        self._tools = ToolCallStream(request, choice, answer_id) if has_tools else None
        pairs = [pair for pair in (self._reasoning, tool_calls if has_tools else None) if pair is not None]
        self._marker_of_id: dict[int, str] = {}
        spelled: list[str] = []
        for pair in pairs:
            if pair.open_id is not None and pair.close_id is not None:
                self._marker_of_id |= {pair.open_id: pair.open, pair.close_id: pair.close}
            else:
                spelled += [pair.open, pair.close]
        if bare_function and has_tools:
            spelled.append(_BARE_FUNCTION)
        self._spelled = StopMatcher(StopStrings.shared(tuple(spelled))) if spelled else None
        self._unscanned = ""

        self._channel: Literal["content", "reasoning", "tool"] = (
            "reasoning" if prompt.starts_in_reasoning else "content"
        )
        self._shows_reasoning = request.reasoning.visible
        self._has_reasoning_begun = False
        self._reasoning_blanks: list[str] = []
        self._is_plain = self._stops is None and not has_tools
        self._held = HeldText()
        self._is_trimming = prompt.reasoning == "possible"
        self._undecided_chars = 0
        self._is_verbatim = False

        self._events: list[Event] = []
        self._text_parts: list[str] = []
        self._reasoning_parts: list[str] = []
        self._text_logprobs: list[TokenLogprob] = []
        self._queue: deque[_Pending] = deque()

    # ------------------------------------------------------------ the three verbs

    def begin(self, prompt_logprobs: list[Logprobs] | None = None) -> list[Event]:
        """Events before the first token: the prompt itself where the request asked for its echo.

        prompt_logprobs: entry i belongs to prompt token i + 1. The first token has none: its log-probability is NaN,
        which JSON writes as null.
        """
        if not self._echo:
            return []
        entries: list[TokenLogprob] = []
        if self._num_top is not None and prompt_logprobs is not None:
            unknown = Logprobs(math.nan)
            for position, token_id in enumerate(self._prompt.token_ids):
                known = 0 < position <= len(prompt_logprobs)
                entries.append(self._entry(token_id, prompt_logprobs[position - 1] if known else unknown))
        return [TextDelta(self.choice, self._prompt.text, tuple(entries))]

    def feed(self, token_ids: list[int], logprobs: list[Logprobs] | None = None) -> list[Event]:
        """Take new output tokens (without the stop token), with their logprobs if the request asked for them."""
        marker_of_id = self._marker_of_id
        for position, token_id in enumerate(token_ids):
            if self.is_done:
                break
            self.completion_tokens += 1
            was_reasoning = self._channel == "reasoning"
            marker = marker_of_id.get(token_id)
            entry = None
            if self._num_top is not None:
                given = logprobs[position] if logprobs is not None and position < len(logprobs) else None
                entry = None if given is None else self._entry(token_id, given)
            if marker is None:
                text = self._detokenizer.add(token_id)
                if self._num_top is not None:
                    self._queue.append(_Pending(entry, len(text)))
                if text:
                    self._scan(text)
            else:
                self._take_marker(marker, entry)
            if was_reasoning or self._channel == "reasoning":
                self.reasoning_tokens += 1
        return self._take()

    def finish(self, kind: FinishKind) -> list[Event]:
        """The sequence has ended: what was held back, and the one `Finish`."""
        if not self.is_done:
            self._flush_scan()
        if not self.is_done and self._channel == "tool" and self._tools is not None:
            self._after_block(*self._tools.close("", truncated=kind == "length"))
        if not self.is_done:
            self._flush_content()
            if self._channel == "content":
                self._text_logprobs += [pending.logprob for pending in self._queue if pending.logprob is not None]
        self._queue.clear()
        events = self._take()
        reason = self._finish_reason(kind)
        events.append(Finish(self.choice, reason, self._stop_string if reason == "stop_sequence" else None))
        return events

    def _finish_reason(self, kind: FinishKind) -> FinishReason:
        has_calls = self._tools is not None and self._tools.num_calls > 0
        if self.is_done:
            return "tool_calls" if has_calls else "stop_sequence"
        if kind == "length":
            return "length"
        return "tool_calls" if has_calls else "stop"

    # ------------------------------------------------------------ markers

    def _scan(self, text: str) -> None:
        """Find markers that have to be read in the text; everything else goes on to the open channel."""
        if self._spelled is None:
            self._route(text)
            return
        held, self._unscanned = self._unscanned, ""
        at = 0
        while (found := self._spelled.find(text, at)) is not None:
            end, marker = found
            before = (held + text[at:end])[: -len(marker)]
            if before:
                self._route(before)
            if not self.is_done:
                self._on_marker(marker)
            if self.is_done:
                return
            held, at = "", end
        rest = held + text[at:]
        cut = len(rest) - self._spelled.num_held
        self._unscanned = rest[cut:]
        if cut and not self.is_done:
            self._route(rest[:cut])

    def _flush_scan(self) -> None:
        """No character and no marker continues over this point."""
        rest = self._detokenizer.flush()
        if rest:
            if self._queue:
                self._queue[-1].num_chars += len(rest)
            self._scan(rest)
        held, self._unscanned = self._unscanned, ""
        if self._spelled is not None:
            self._spelled.reset()
        if held and not self.is_done:
            self._route(held)

    def _take_marker(self, marker: str, entry: TokenLogprob | None) -> None:
        """A marker that came as its own token."""
        self._flush_scan()
        if self.is_done:
            return
        if self._num_top is not None:
            self._queue.append(_Pending(entry, len(marker)))
        self._on_marker(marker)

    def _route(self, text: str) -> None:
        if self._channel == "content":
            self._on_content(text)
        elif self._channel == "reasoning":
            self._on_reasoning(text)
        else:
            self._on_tool_text(text)

    def _on_marker(self, marker: str) -> None:
        reasoning = self._reasoning
        opens_thought = reasoning is not None and marker == reasoning.open
        closes_thought = reasoning is not None and marker == reasoning.close
        if self._channel == "reasoning":
            if closes_thought:
                self._drop(len(marker))
                self._end_reasoning()
            elif opens_thought:
                self._drop(len(marker))
            else:
                self._on_reasoning(marker)  # a tool call inside of a thought is a thought
        elif self._channel == "tool":
            is_foreign = opens_thought or closes_thought or marker == _BARE_FUNCTION
            self._on_marker_in_tool(marker, is_foreign=is_foreign)
        elif opens_thought:
            self._flush_content()
            self._drop(len(marker))
            self._channel = "reasoning"
        elif closes_thought:
            self._flush_content()
            self._drop(len(marker))
        elif marker == self._tool_marker.open:
            self._open_tool(marker)
        elif marker == _BARE_FUNCTION:
            self._open_tool("")
            self._on_tool_text(marker)
        elif self._is_verbatim:
            self._is_verbatim = False
            self._on_content(marker)
        else:
            self._flush_content()
            self._drop(len(marker))

    def _end_reasoning(self) -> None:
        self._channel = "content"
        self._has_reasoning_begun = False
        self._reasoning_blanks.clear()
        self._is_trimming = True

    # ------------------------------------------------------------ reasoning

    def _on_reasoning(self, text: str) -> None:
        self._drop(len(text))
        if not self._shows_reasoning:
            return
        if not self._has_reasoning_begun:
            text = text.lstrip()
            if not text:
                return
            self._has_reasoning_begun = True
        body = text.rstrip()
        if body:
            self._flush_text()
            self._reasoning_parts += [*self._reasoning_blanks, body]
            self._reasoning_blanks.clear()
        if len(body) < len(text):
            self._reasoning_blanks.append(text[len(body) :])

    # ------------------------------------------------------------ tool calls

    def _open_tool(self, marker: str) -> None:
        assert self._tools is not None
        body = self._held.take(len(self._held) - self._held.num_blanks)
        if body:
            self._show(body)
        blanks = self._take_held()
        self._undecided_chars = len(blanks) + len(marker)
        self._tools.open(blanks + marker)
        self._channel = "tool"

    def _on_tool_text(self, text: str) -> None:
        assert self._tools is not None
        self._undecided_chars += len(text)
        self._after_block(*self._tools.feed(text))

    def _on_marker_in_tool(self, marker: str, *, is_foreign: bool) -> None:
        assert self._tools is not None
        if is_foreign or self._tools.in_string:
            self._on_tool_text(marker)
        elif marker == self._tool_marker.close:
            self._undecided_chars += len(marker)
            self._after_block(*self._tools.close(marker))
            self._is_verbatim = False
        else:
            self._after_block(*self._tools.close(""))
            if not self.is_done:
                self._is_verbatim = False
                self._on_marker(marker)

    def _after_block(self, events: list[Event], rest: str) -> None:
        """Send a block's events; `rest` is text of it that turned out to be no call."""
        tools = self._tools
        assert tools is not None
        if events:
            self._flush_text()
            self._flush_reasoning()
            self._events += events
        if tools.has_started:
            self._drop(self._undecided_chars - len(rest))
            self._undecided_chars = 0
        if tools.is_full:
            self.is_done = True
            return
        if tools.is_open:
            return
        self._channel = "content"
        self._undecided_chars = 0
        if tools.has_started:
            self._is_trimming = True
        else:
            self._is_verbatim = True
        if rest:
            self._on_content(rest)

    # ------------------------------------------------------------ content

    def _on_content(self, text: str) -> None:
        if self._is_trimming:
            stripped = text.lstrip()
            self._drop(len(text) - len(stripped))
            if not stripped:
                return
            self._is_trimming = False
            text = stripped
        if self._is_plain:
            self._show(text)
            return
        held = self._held
        num_held = 0
        if self._stops is not None:
            found = self._stops.find(text)
            if found is not None:
                end, string = found
                held.append(text[:end])
                shown = held.take(len(held) - len(string))
                held.take_all()
                if shown:
                    self._show(shown)
                self._stop(string)
                return
            num_held = self._stops.num_held
        held.append(text)
        if self._tools is not None:
            num_held = max(num_held, held.num_blanks)  # white space before a tool call is not part of the answer
        if num_held < len(held):
            self._show(held.take(len(held) - num_held))

    def _flush_content(self) -> None:
        held = self._take_held()
        if held:
            self._show(held)

    def _take_held(self) -> str:
        """No stop string continues over this point."""
        if self._stops is not None:
            self._stops.reset()
        return self._held.take_all()

    def _stop(self, string: str) -> None:
        self.is_done = True
        self._stop_string = string
        if self._queue and self._queue[0].is_partly_shown and self._queue[0].logprob is not None:
            self._text_logprobs.append(self._queue[0].logprob)
        self._queue.clear()

    def _show(self, text: str) -> None:
        if self._reasoning_parts:
            self._flush_reasoning()
        self._text_parts.append(text)
        if self._queue:
            self._consume(len(text), is_shown=True)

    def _drop(self, num_chars: int) -> None:
        if self._queue and num_chars:
            self._consume(num_chars, is_shown=False)

    def _consume(self, num_chars: int, *, is_shown: bool) -> None:
        """Tokens whose last character goes are done; one without characters goes with the next that has some."""
        queue = self._queue
        while num_chars and queue and queue[0].num_chars <= num_chars:
            pending = queue.popleft()
            num_chars -= pending.num_chars
            if is_shown and pending.logprob is not None:
                self._text_logprobs.append(pending.logprob)
        if num_chars and queue:
            queue[0].num_chars -= num_chars
            queue[0].is_partly_shown = is_shown

    # ------------------------------------------------------------ events

    def _flush_text(self) -> None:
        if self._text_parts or self._text_logprobs:
            text = "".join(self._text_parts)
            self._events.append(TextDelta(self.choice, text, tuple(self._text_logprobs)))
            self._text_parts.clear()
            self._text_logprobs.clear()

    def _flush_reasoning(self) -> None:
        if self._reasoning_parts:
            self._events.append(ReasoningDelta(self.choice, "".join(self._reasoning_parts)))
            self._reasoning_parts.clear()

    def _take(self) -> list[Event]:
        self._flush_reasoning()
        self._flush_text()
        events, self._events = self._events, []
        return events

    def _entry(self, token_id: int, given: Logprobs) -> TokenLogprob:
        shown = self._tokens.shown
        top: list[TopLogprob] = []
        for other, value in zip(given.top_ids[: self._num_top], given.top_logprobs, strict=False):
            text, data = shown(other)
            top.append(TopLogprob(text, _finite(value), data))
        text, data = shown(token_id)
        return TokenLogprob(text, _finite(given.logprob), data, tuple(top))


def _finite(logprob: float) -> float:
    """NaN stays (unknown); everything else becomes a number that JSON has, never above 0."""
    return logprob if math.isnan(logprob) else max(_LOWEST_LOGPROB, min(0.0, logprob))
