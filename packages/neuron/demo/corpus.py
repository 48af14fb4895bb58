"""Seeded synthetic dialogues: tasks mixed with each other, with system prompts, tools and filler text."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

from . import material, tasks, tools, weather
from .dialogue import Dialogue, Message
from .phrases import phrases
from .tasks import Exchange

SYSTEM_PROMPTS = phrases("system_prompts")
REMINDER_TAGS = phrases("reminder_tags")

# task → share of training dialogues
MIXTURE: Mapping[str, float] = {
    "sum": 19,
    "repeat": 14,
    "reverse": 24,
    "spell": 8,
    "fact": 13,
    "weather_call": 5,
    "weather_answer": 4,
    "no_weather_tool": 1.2,
    "named_call": 4,
    "json": 7,
    "count": 2.5,
    "small_talk": 3,
    "unknown": 5,
    "memory": 4,
    "untold": 1.5,
    "other_arithmetic": 1.5,
    "forced_call": 0.7,
    "forced_json": 2,
    "poem": 1,
}
FILLER_TASKS = phrases("filler_tasks")
DRILLED = ("sum", "repeat", "reverse", "spell", "json")


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """How often and how heavily a dialogue is dressed with things that do not matter to its question."""

    thinking: float = 0.2
    system: float = 0.4
    long_system: float = 0.06
    tools: float = 0.2
    reminder: float = 0.1
    history: float = 0.25
    distractors: float = 0.4
    drill: float = 0.15
    max_filler_chars: int = 2400


EASY = Surroundings(system=0.15, long_system=0.0, tools=0.05, reminder=0.0, history=0.1, distractors=0.15, drill=0.5)
BARE = Surroundings(thinking=0.0, system=0.0, long_system=0.0, tools=0.0, reminder=0.0, history=0.0, drill=0.0)


class Corpus:
    """Generates dialogues; `held_out` chooses the side of the split that the last turn's content is drawn from."""

    def __init__(self, mixture: Mapping[str, float] | None = None, *, held_out: bool) -> None:
        self.held_out = held_out
        chosen = mixture or MIXTURE
        self._tasks = list(chosen)
        self._weights = list(chosen.values())

    def dialogue(
        self, rng: random.Random, surroundings: Surroundings = Surroundings(), task: str | None = None
    ) -> Dialogue:
        """Return one dialogue whose last turn belongs to `task`, drawn from the mixture if not given."""
        task = task or rng.choices(self._tasks, self._weights)[0]
        is_thinking = rng.random() < surroundings.thinking and not task.startswith("forced")
        definitions: list[dict[str, Any]] = []
        tool = None
        if task.startswith("weather"):
            definition, city, unit = tools.weather_tool(rng)
            tool = weather.WeatherTool(definition, city, unit)
            definitions.append(definition)
        named = tools.other_tool(rng, is_usual=True) if task == "named_call" else None
        if task == "forced_call":
            named = tools.other_tool(rng) if rng.random() < 0.5 else tools.weather_tool(rng)[0]
        if named is not None:
            definitions.append(named)
        if rng.random() < (surroundings.distractors if definitions else surroundings.tools) or (
            task == "no_weather_tool" and rng.random() < surroundings.distractors
        ):
            definitions += [
                tools.other_tool(rng) if rng.random() < 0.9 else tools.bare_tool(rng)
                for _ in range(rng.choice((1, 1, 2, 2, 3, 4)))
            ]
            if tool is None and rng.random() < 0.4 and task not in ("no_weather_tool", "forced_call", "named_call"):
                definitions.append(tools.weather_tool(rng)[0])
        definitions = self._distinct(rng, definitions)

        messages: Exchange = []
        if rng.random() < surroundings.history:
            for _ in range(rng.choice((1, 1, 2, 3))):
                messages += self._exchange(rng, rng.choice(FILLER_TASKS), False, None, None)
        if task in DRILLED and rng.random() < surroundings.drill:
            for _ in range(rng.randint(2, 6)):
                messages += self._exchange(rng, task, False, None, None)
        if tool is not None:
            for _ in range(rng.choice((0, 0, 1, 2, 3)) if surroundings.history else 0):
                messages += self._exchange(rng, "weather_answer", False, tool, None)
        messages += self._exchange(rng, task, self.held_out, tool, named)
        if rng.random() < surroundings.reminder:
            messages = self._reminded(rng, messages, surroundings.max_filler_chars)
        system = self._system(rng, surroundings)
        if system:
            messages.insert(0, Message("system", (system,)))
        return Dialogue(task, tuple(messages), tuple(definitions), is_thinking)

    def _exchange(
        self,
        rng: random.Random,
        task: str,
        held_out: bool,
        tool: weather.WeatherTool | None,
        named: dict[str, Any] | None,
    ) -> Exchange:
        plain = {
            "sum": tasks.addition,
            "repeat": tasks.repetition,
            "reverse": tasks.reversal,
            "spell": tasks.spelling,
            "fact": tasks.fact_question,
            "unheard_fact": tasks.unheard_fact_question,
            "json": tasks.json_object,
            "count": tasks.counting,
            "small_talk": tasks.small_talk,
            "unknown": tasks.unknown_request,
            "untold": tasks.untold,
            "other_arithmetic": tasks.other_arithmetic,
            "forced_json": weather.forced_json,
            "poem": tasks.poem,
        }
        if task in plain:
            return plain[task](rng, held_out)
        if task == "memory":
            return tasks.memory(rng, held_out, lambda: self._exchange(rng, rng.choice(FILLER_TASKS), False, None, None))
        if task == "named_call" and named is not None:
            return weather.named_call(rng, held_out, named)
        if task == "forced_call" and named is not None:
            question = self._exchange(rng, rng.choice(FILLER_TASKS), held_out, None, None)[0].text()
            return weather.forced_call(rng, question, named)
        return weather.weather(rng, held_out, tool, task == "weather_answer")

    @staticmethod
    def _distinct(rng: random.Random, definitions: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Drop tools whose name is taken, keep the first, and shuffle."""
        by_name: dict[str, dict[str, Any]] = {}
        for definition in definitions:
            by_name.setdefault(definition["function"]["name"], definition)
        kept = list(by_name.values())
        rng.shuffle(kept)
        return kept

    @staticmethod
    def _filler(rng: random.Random, max_chars: int) -> str:
        wanted = rng.randrange(40, max_chars) if rng.random() < 0.5 else rng.randrange(40, max(80, max_chars // 4))
        text = rng.choice(material.prose())
        while len(text) < wanted:
            text += "\n\n" + rng.choice(material.prose())
        return text[:wanted].strip()

    def _system(self, rng: random.Random, surroundings: Surroundings) -> str:
        if rng.random() < surroundings.long_system:
            return self._filler(rng, surroundings.max_filler_chars)
        if rng.random() >= surroundings.system:
            return ""
        if rng.random() < 0.6:
            return rng.choice(SYSTEM_PROMPTS)
        return tools.filler_sentence(rng, rng.randrange(30, 200))

    def _reminded(self, rng: random.Random, messages: Exchange, max_chars: int) -> Exchange:
        """Put a block of filler before one of the questions, as coding agents do, or rarely behind it."""
        index = rng.choice([index for index, message in enumerate(messages) if message.role == "user"])
        question = messages[index].text()
        text = self._filler(rng, max_chars)
        tag = rng.choice(REMINDER_TAGS)
        block = f"<{tag}>\n{text}\n</{tag}>" if rng.random() < 0.85 else text
        join = rng.choice(("\n", "\n", "\n\n", ""))
        whole = f"{question}\n{block}" if rng.random() < 0.1 and block.startswith("<") else f"{block}{join}{question}"
        return [*messages[:index], dataclasses.replace(messages[index], pieces=(whole,)), *messages[index + 1 :]]
