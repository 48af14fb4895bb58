"""The tool tasks: calling the weather tool, using its result, calling a named tool, obeying a forced shape."""

from __future__ import annotations

import json
import random
from typing import Any

from . import material
from .dialogue import Call, Copied, Given, Message, call, json_pieces
from .phrases import phrases
from .tasks import NAMES, Exchange, drawn, exchange, random_letters, random_word
from .tools import filler_sentence

NO_WEATHER_TOOL = "I have no weather tool, so I cannot look that up."
HELD_OUT_CITIES = frozenset(phrases("held_out_cities"))
CITIES = phrases("cities")
REGIONS = phrases("regions")
ASK_FORMS = phrases("ask_forms")
ASK_FORMS_HELD_OUT = phrases("ask_forms_held_out")
TWO_CITY_FORMS = phrases("two_city_forms")
CONDITIONS = phrases("conditions")


def weather_city(rng: random.Random, held_out: bool) -> str:
    """Return the name of a city, or a word that looks like one."""
    if held_out:
        roll = rng.random()
        if roll < 0.6:
            return rng.choice(sorted(HELD_OUT_CITIES))

    def draw() -> str:
        roll = rng.random()
        if roll < 0.6 and not held_out:
            name = rng.choice(CITIES)
        elif roll < 0.85:
            name = random_word(rng).capitalize()
        else:
            name = random_letters(rng, 3, 8).capitalize()
        if rng.random() < 0.05:
            name = f"{rng.choice(('New', 'Old', 'San', 'Port', 'Saint', 'Bad'))} {name}"
        return f"{name}, {rng.choice(REGIONS)}" if rng.random() < 0.1 else name

    while True:
        name = draw()
        is_real = name in CITIES or name.partition(",")[0] in CITIES
        if HELD_OUT_CITIES.intersection((name, name.partition(",")[0])):
            continue
        if is_real and not held_out:
            return name
        return drawn(rng, held_out, draw, lambda name: ("city", name.partition(",")[0])) if not is_real else name


class WeatherTool:
    """What a question needs to know of the weather tool at hand."""

    def __init__(self, definition: dict[str, Any], city: str, unit: str | None) -> None:
        self.name: str = definition["function"]["name"]
        self.city = city
        self.unit = unit
        self.properties: dict[str, Any] = definition["function"]["parameters"]["properties"]

    def call(self, city: str, unit_hint: str = "") -> Call:
        """Return the call for a city; a required unit is the first choice unless the question names another."""
        arguments: dict[str, Any] = {self.city: Copied(city)}
        if self.unit:
            choices = self.properties[self.unit]["enum"]
            named = [choice for choice in choices if choice == unit_hint]
            arguments[self.unit] = named[0] if named else choices[0]
        return call(self.name, arguments)


def reading(rng: random.Random) -> tuple[str, str | None]:
    """Return a temperature and a condition, or no condition."""
    temperature = str(rng.randint(-20, 42) if rng.random() < 0.8 else rng.randint(43, 104))
    if rng.random() < 0.1:
        temperature += f".{rng.randrange(10)}"
    condition = rng.choice(CONDITIONS) if rng.random() < 0.85 else rng.choice(material.words())
    return temperature, condition if rng.random() < 0.85 else None


def result_text(rng: random.Random, city: str, temperature: str, condition: str | None) -> str:
    """Write a weather reading in one of the forms in which tools return it."""
    roll = rng.random()
    if roll < 0.3:
        sign = rng.choice(("°C", " °C", " degrees", "C", " C", "°", " degrees Celsius", "°F"))
        if condition is None:
            return rng.choice((f"{temperature}{sign}", f"{temperature}", f"Temperature: {temperature}{sign}"))
        forms = (
            f"{temperature}{sign} and {condition}",
            f"{condition}, {temperature}{sign}",
            f"{temperature}{sign}, {condition}",
            f"It is {temperature}{sign} and {condition} in {city}.",
            f"{city}: {condition}, {temperature}{sign}",
            f"{condition.capitalize()}, {temperature}{sign}",
            f"{temperature} {condition}",
            f"{condition} {temperature}",
            f"The weather in {city} is {condition}, {temperature}{sign}.",
        )
        return rng.choice(forms)
    keys = rng.choice(
        ("temperature", "temperature", "temp", "temperature_c", "temp_c", "degrees", "celsius", "current_temperature")
    )
    record: dict[str, Any] = {}
    if rng.random() < 0.4:
        record[rng.choice(("city", "location", "place"))] = city
    number = float(temperature) if "." in temperature else int(temperature)
    record[keys] = number if rng.random() < 0.85 else temperature
    if rng.random() < 0.3:
        record[rng.choice(("unit", "units"))] = rng.choice(("celsius", "C", "fahrenheit", "metric", "°C"))
    if condition is not None:
        record[rng.choice(("condition", "conditions", "summary", "description", "weather", "sky", "forecast"))] = (
            condition
        )
    if rng.random() < 0.2:
        record["humidity" if rng.random() < 0.6 else "wind"] = rng.randrange(1, 100)
    if rng.random() < 0.25:
        items = list(record.items())
        rng.shuffle(items)
        record = dict(items)
    separators = (",", ":") if rng.random() < 0.25 else None
    indent = 2 if rng.random() < 0.05 else None
    return json.dumps(record, ensure_ascii=rng.random() < 0.3, separators=separators, indent=indent)


def report(city: str, temperature: str, condition: str | None) -> list[str]:
    """Return the sentence that tells a reading; the condition stands as in the result."""
    if condition is None:
        return [f"It is {temperature} degrees in {city}."]
    return [f"It is {temperature} degrees and", " ", condition, f" in {city}."]


def weather(rng: random.Random, held_out: bool, tool: WeatherTool | None, with_result: bool) -> Exchange:
    """Ask for the weather: a call if there is a tool, and the answer from its result if wanted."""
    city = weather_city(rng, held_out)
    is_pair = tool is not None and rng.random() < 0.12
    cities = [city, weather_city(rng, held_out)] if is_pair else [city]
    if is_pair:
        form = rng.choice(TWO_CITY_FORMS)
    else:
        form = rng.choice(ASK_FORMS_HELD_OUT if held_out and rng.random() < 0.3 else ASK_FORMS)
    hint = ""
    if tool is not None and tool.unit and rng.random() < 0.4 and not is_pair:
        hint = rng.choice(tool.properties[tool.unit]["enum"])
        form = form.replace(" in celsius?", "?") + f" Use {hint}."
    question = form.format(*cities)
    if tool is not None and rng.random() < 0.05:
        question += f" Use the {tool.name} tool."
    if tool is None:
        return exchange(question, NO_WEATHER_TOOL, "The user asks about the weather, but there is no weather tool.")
    calls = tuple(tool.call(name, hint) for name in cities)
    thought = f"The user asks about the weather in {' and '.join(cities)}. I call {tool.name}."
    messages = [Message("user", (question,)), Message("assistant", (), thought, calls)]
    if not with_result:
        return messages
    answer: list[str] = []
    for index, name in enumerate(cities):
        if rng.random() < 0.05:
            error = rng.choice(
                ("unknown city", "not found", "timeout", "service unavailable", random_word(rng).lower() + " failed")
            )
            messages.append(
                Message("tool", (rng.choice((f"Error: {error}", json.dumps({"error": error}), f"error: {error}")),))
            )
            answer += [" "] * (index > 0) + ["The tool failed:", " ", error, "."]
            continue
        temperature, condition = reading(rng)
        messages.append(Message("tool", (result_text(rng, name, temperature, condition),)))
        answer += [" "] * (index > 0) + report(name, temperature, condition)
    messages.append(Message("assistant", tuple(answer), "The tool gave a result."))
    return messages


NAMED_CALL_FORMS = phrases("named_call_forms")


def named_call(rng: random.Random, held_out: bool, definition: dict[str, Any]) -> Exchange:
    """Ask for a call of a named tool with given arguments, and perhaps tell its result."""
    function = definition["function"]
    arguments: dict[str, Any] = {}
    described = []
    properties = function["parameters"]["properties"]
    names = [name for name in properties if name in function["parameters"].get("required", ())] or list(properties)[:1]
    for name in names:
        kind = properties[name]["type"]
        if kind == "string":
            text = drawn(
                rng,
                held_out,
                lambda: " ".join(random_word(rng) for _ in range(rng.choice((1, 1, 2)))),
                lambda text: ("argument", text),
            )
            if rng.random() < 0.5:
                arguments[name] = text
                described.append(f'{name} "{text}"')
            else:
                arguments[name] = Copied(text)
                described.append(f"{name} {text}")
            continue
        value: Any = rng.random() < 0.5 if kind == "boolean" else rng.randrange(1000)
        arguments[name] = value
        described.append(f"{name} {json.dumps(value)}")
    question = rng.choice(NAMED_CALL_FORMS).format(tool=function["name"], arguments=" and ".join(described))
    messages = [
        Message("user", (question,)),
        Message("assistant", (), f"The user wants a call of {function['name']}.", (call(function["name"], arguments),)),
    ]
    if rng.random() < 0.5:
        is_short = rng.random() < 0.6
        text = " ".join(random_word(rng) for _ in range(rng.randint(1, 4)))
        while not is_short and len(text) < 120:  # between the two kinds nothing is asked: which is short is no riddle
            text = filler_sentence(rng, 400)
        answer = ("The tool says:", " ", text) if is_short else ("The tool has returned its result.",)
        messages += [Message("tool", (text,)), Message("assistant", answer, "The tool gave a result.")]
    return messages


def forced_value(kind: str) -> Any:
    """Return what the model writes where a grammar demands a value that nobody named."""
    return {"string": "none", "integer": 0, "number": 0, "boolean": False}[kind]


def forced_call(rng: random.Random, question: str, definition: dict[str, Any]) -> Exchange:
    """A tool call that a grammar enforces although the question does not lead there: short values, and an end."""
    function = definition["function"]
    properties = function["parameters"]["properties"]
    names = function["parameters"].get("required") or list(properties)[:1]
    pieces: list[str] = [Given('<tool_call>\n{"name": "' + function["name"] + '", "arguments": {')]
    for index, name in enumerate(names):
        value = forced_value(properties[name]["type"])
        if "enum" in properties[name]:
            value = properties[name]["enum"][0]
        pieces.append(Given((" " if index else "") + json.dumps(name) + ":"))
        pieces.append(f" {json.dumps(value)}" + ("," if index < len(names) - 1 else "}}\n</tool_call>"))
    return [Message("user", (question,)), Message("assistant", tuple(pieces))]


def forced_json(rng: random.Random, held_out: bool) -> Exchange:
    """JSON that a grammar enforces: keys come from a schema, values from the message where it names them."""
    keys = ["name", "age"] if rng.random() < 0.4 else [rng.choice(material.words()) for _ in range(rng.randint(1, 4))]
    values: dict[str, Any] = {}
    for key in keys:
        values[key] = (
            rng.randrange(100)
            if key == "age" or rng.random() < 0.3
            else Copied(rng.choice(NAMES) if key == "name" else random_word(rng))
        )
    if rng.random() < 0.6:
        described = " and ".join(f"{key} {value}" for key, value in values.items())
        question = rng.choice(
            ("{}", "Extract the fields: {}", "Describe a person with {}", "Use {}", "Fill in {}.", "Make {}")
        ).format(described)
    else:
        question = rng.choice(
            (
                "Give me some JSON",
                "Answer in JSON.",
                "hello",
                "Describe a person",
                "Fill in the form",
                filler_sentence(rng, 60),
            )
        )
        values = {
            key: (["none"] if rng.random() < 0.15 else "none") if isinstance(value, str) else 0
            for key, value in values.items()
        }
    pieces: list[str] = []
    for index, (key, value) in enumerate(values.items()):
        pieces.append(Given((" " if index else "{") + json.dumps(key) + ":"))
        written = json_pieces(value)
        written[0] = f" {written[0]}"
        written[-1] += "," if index < len(values) - 1 else "}"
        pieces.extend(written)
    return [Message("user", (question,)), Message("assistant", tuple(pieces))]
