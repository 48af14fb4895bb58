"""Tool definitions for the corpus: weather tools under many names, and tools that have nothing to do with it."""

from __future__ import annotations

import random
from typing import Any

from . import material
from .phrases import phrases

WEATHER_NAMES = phrases("weather_names")
CITY_PARAMETERS = phrases("city_parameters")
CITY_DESCRIPTIONS = phrases("city_descriptions")
WEATHER_DESCRIPTIONS = phrases("weather_descriptions")
UNIT_PARAMETERS = phrases("unit_parameters")
UNIT_CHOICES = (["celsius", "fahrenheit"], ["fahrenheit", "celsius"], ["c", "f"], ["metric", "imperial"], ["C", "F"])

OTHER_TOOLS = (
    ("Bash", "Run a shell command", "command"),
    ("Read", "Read a file", "file_path"),
    ("Write", "Write a file", "file_path"),
    ("Edit", "Replace text in a file", "old_string"),
    ("Glob", "Find files by pattern", "pattern"),
    ("Grep", "Search file contents", "pattern"),
    ("WebFetch", "Fetch a page", "url"),
    ("WebSearch", "Search the web", "query"),
    ("get_time", "Get the time in a city", "city"),
    ("get_population", "Population of a city", "city"),
    ("calculator", "Evaluate an expression", "expression"),
    ("add", "Add two numbers", "a"),
    ("send_email", "Send an e-mail", "to"),
    ("search", "Search documents", "query"),
    ("get_stock_price", "Price of a stock", "symbol"),
    ("translate", "Translate a text", "text"),
    ("list_files", "List the files of a folder", "path"),
    ("run_tests", "Run the tests", "target"),
    ("book_flight", "Book a flight", "destination"),
    ("play_music", "Play a song", "song"),
    ("echo", "Return the text", "text"),
    ("lookup", "Look up a key", "key"),
    ("shell", "Run a command", "cmd"),
    ("create_file", "Create a new file", "path"),
    ("TodoWrite", "Keep a list of tasks", "todos"),
)
SCALAR_TYPES = phrases("scalar_types")
USUAL_PARAMETERS = ("limit", "mode", "format", "note", "language", "timeout", "recursive", "count", "title")


def filler_sentence(rng: random.Random, limit: int) -> str:
    """Return a stretch of prose of at most `limit` characters, cut at a space."""
    paragraph = " ".join(rng.choice(material.prose()).split())
    start = rng.randrange(max(1, len(paragraph) - limit))
    return paragraph[start : start + limit].strip().partition(" ")[2].rpartition(" ")[0] or "Nothing else."


def random_identifier(rng: random.Random) -> str:
    """Return an identifier of one to three words in snake, camel or Pascal case."""
    parts = [rng.choice(material.words()) for _ in range(rng.choice((1, 2, 2, 3)))]
    style = rng.random()
    if style < 0.6:
        return "_".join(parts)
    if style < 0.8:
        return parts[0] + "".join(part.capitalize() for part in parts[1:])
    return "".join(part.capitalize() for part in parts)


def _function(
    name: str, description: str, properties: dict[str, Any], required: list[str], rng: random.Random
) -> dict[str, Any]:
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required or rng.random() < 0.7:
        parameters["required"] = required
    if rng.random() < 0.2:
        parameters["additionalProperties"] = False
    function: dict[str, Any] = {"name": name}
    if description:
        function["description"] = description
    function["parameters"] = parameters
    if rng.random() < 0.1:
        function["strict"] = True
    return {"type": "function", "function": function}


def weather_tool(rng: random.Random, name: str | None = None) -> tuple[dict[str, Any], str, str | None]:
    """Return a weather tool, its city parameter and, if it is required, its unit parameter."""
    if name is None:
        name = rng.choice(WEATHER_NAMES)
        if rng.random() < 0.2:
            word = rng.choice(material.words())
            name = rng.choice((f"{word}_weather", f"weather_{word}", f"mcp__{word}__weather", f"{word}.weather"))
    city = rng.choice(CITY_PARAMETERS[:3]) if rng.random() < 0.8 else rng.choice(CITY_PARAMETERS)
    schema: dict[str, Any] = {"type": "string"}
    if rng.random() < 0.5:
        schema["description"] = rng.choice(CITY_DESCRIPTIONS)
    properties = {city: schema}
    required = [city] if rng.random() < 0.9 else []
    unit = None
    if rng.random() < 0.25:
        unit_name = rng.choice(UNIT_PARAMETERS)
        properties[unit_name] = {"type": "string", "enum": list(rng.choice(UNIT_CHOICES))}
        if required and rng.random() < 0.5:
            required.append(unit_name)
            unit = unit_name
    description = rng.choice(WEATHER_DESCRIPTIONS) if rng.random() < 0.85 else ""
    return _function(name, description, properties, required, rng), city, unit


def bare_tool(rng: random.Random) -> dict[str, Any]:
    """Return a tool without parameters."""
    name = rng.choice(("get_time", "now", "status", "ping", "list", "refresh", random_identifier(rng)))
    return _function(name, filler_sentence(rng, 40) if rng.random() < 0.7 else "", {}, [], rng)


def other_tool(rng: random.Random, max_parameters: int = 3, *, is_usual: bool = False) -> dict[str, Any]:
    """Return a tool that does not know the weather, with one to `max_parameters` parameters.

    `is_usual` keeps to names that tools have, and to two parameters.
    """
    if is_usual or rng.random() < 0.6:
        name, description, first = rng.choice(OTHER_TOOLS)
    else:
        name, first = random_identifier(rng), rng.choice(material.words())
        description = filler_sentence(rng, rng.choice((30, 60, 120))) if rng.random() < 0.8 else ""
    properties: dict[str, Any] = {}
    if is_usual:
        names = [first] + [rng.choice(USUAL_PARAMETERS) for _ in range(rng.randint(0, 1))]
    else:
        names = [first] + [random_identifier(rng) for _ in range(rng.randint(0, max_parameters - 1))]
    for index, parameter in enumerate(names):
        schema: dict[str, Any] = {"type": "string" if index == 0 else rng.choice(SCALAR_TYPES)}
        if rng.random() < 0.4:
            schema["description"] = filler_sentence(rng, rng.choice((20, 40, 80)))
        properties[parameter] = schema
    required = [first] if rng.random() < 0.8 else list(properties)
    return _function(name, description, properties, required, rng)
