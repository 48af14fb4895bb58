"""The plain tasks: sums, repeating, reversing, questions about cortex, counting, small JSON, memory, small talk."""

from __future__ import annotations

import json
import random
import string
import zlib
from collections.abc import Callable
from typing import Any, TypeVar

from . import facts, material
from .dialogue import Copied, Message, Spelled, json_pieces
from .phrases import phrases

HELD_OUT_SHARE = 20  # one key in twenty is never trained on
GREETING = "Hello! How can I help you?"
THANKS = "You are welcome!"
FAREWELL = "Goodbye!"
FALLBACK = "I am only a small demo model, and I do not know that."
ONLY_SUMS = "I can only add two numbers from 0 to 99."
REMEMBERED = "I will remember that."
NAMES = phrases("names")
COLOURS = phrases("colours")
EXOTIC = phrases("exotic")

Exchange = list[Message]
T = TypeVar("T")


def is_held_out(*key: object) -> bool:
    """Say whether a content key belongs to evaluation; stable over runs and machines."""
    return zlib.crc32(repr(key).encode()) % HELD_OUT_SHARE == 0


def drawn(rng: random.Random, held_out: bool, draw: Callable[[], T], key: Callable[[T], object]) -> T:
    """Draw until the content is on the wanted side of the split."""
    for _ in range(10_000):
        item = draw()
        if is_held_out(key(item)) == held_out:
            return item
    raise RuntimeError("no content on this side of the split")


def exchange(question: str, answer: str | list[str], thought: str) -> Exchange:
    """Return a question and its answer."""
    pieces = (answer,) if isinstance(answer, str) else tuple(answer)
    return [Message("user", (question,)), Message("assistant", pieces, thought)]


SUM_FORMS = phrases("sum_forms")
SUM_FORMS_HELD_OUT = phrases("sum_forms_held_out")


def sum_numbers(rng: random.Random, held_out: bool) -> tuple[int, int]:
    """Return two addends from 0 to 99; a held-out pair is unseen in both orders."""

    def draw() -> tuple[int, int]:
        if rng.random() < 0.15:
            return rng.randrange(10), rng.randrange(100) if rng.random() < 0.5 else rng.randrange(10)
        return rng.randrange(100), rng.randrange(100)

    a, b = drawn(rng, held_out, draw, lambda pair: ("sum", *sorted(pair)))
    return (a, b) if rng.random() < 0.5 else (b, a)


def sum_thought(a: int, b: int) -> str:
    """Return the addition by columns."""
    ones, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
    thought = f"Add {a} and {b}. Ones: {a % 10} + {b % 10} = {ones}."
    if carry:
        return f"{thought} Tens: {a // 10} + {b // 10} + 1 = {a // 10 + b // 10 + 1}."
    return f"{thought} Tens: {a // 10} + {b // 10} = {a // 10 + b // 10}."


def addition(rng: random.Random, held_out: bool) -> Exchange:
    """Ask for a sum."""
    a, b = sum_numbers(rng, held_out)
    form = rng.choice(SUM_FORMS_HELD_OUT if held_out and rng.random() < 0.3 else SUM_FORMS)
    return exchange(form.format(a=a, b=b), f"{a} + {b} = {a + b}", sum_thought(a, b))


def other_arithmetic(rng: random.Random, held_out: bool) -> Exchange:
    """Ask for arithmetic that the model does not do."""
    a, b = rng.randrange(1000), rng.randrange(1000)
    if rng.random() < 0.3:
        return exchange(f"What is {a + 100}+{b + 100}?", ONLY_SUMS, "These numbers are too large for me.")
    sign = rng.choice((" - ", "-", " * ", "*", " / ", "/", " times ", " minus ", " divided by ", " x "))
    form = rng.choice(("What is {}?", "{}", "{} =", "Compute {}.", "calculate {}", "How much is {}?", "what's {}?"))
    return exchange(form.format(f"{a}{sign}{b}"), ONLY_SUMS, "This is not an addition.")


def random_letters(rng: random.Random, shortest: int, longest: int) -> str:
    """Return random letters, mostly lower case."""
    alphabet = (
        string.ascii_lowercase if rng.random() < 0.8 else rng.choice((string.ascii_uppercase, string.ascii_letters))
    )
    return "".join(rng.choice(alphabet) for _ in range(rng.randint(shortest, longest)))


def random_word(rng: random.Random, longest: int = 10) -> str:
    """Return an ordinary word, sometimes capitalised."""
    word = rng.choice(material.words())
    while len(word) > longest:
        word = rng.choice(material.words())
    roll = rng.random()
    return word if roll < 0.7 else word.capitalize() if roll < 0.93 else word.upper()


def repeated_text(rng: random.Random) -> str:
    """Return a short text to repeat: words, letters, digits, punctuation, sometimes other scripts."""
    roll = rng.random()
    if roll < 0.15:
        return random_letters(rng, 2, 8)
    if roll < 0.22:
        return "".join(rng.choice(string.digits) for _ in range(rng.randint(1, 6)))
    parts = []
    for _ in range(rng.choice((1, 1, 2, 2, 3, 4, 5, 6))):
        part = rng.random()
        if part < 0.80:
            parts.append(random_word(rng))
        elif part < 0.88:
            parts.append(random_letters(rng, 1, 6))
        elif part < 0.94:
            parts.append(str(rng.randrange(1000)))
        else:
            parts.append(rng.choice(EXOTIC))
    if len(parts) > 1 and rng.random() < 0.2:
        parts[0] += ","
    text = ("-" if rng.random() < 0.05 else "_" if rng.random() < 0.04 else " ").join(parts)
    return text + (rng.choice("!.?") if rng.random() < 0.2 else "")


REPEAT_FORMS = phrases("repeat_forms")
REPEAT_QUOTED_FORMS = phrases("repeat_quoted_forms")


def repetition(rng: random.Random, held_out: bool) -> Exchange:
    """Ask to repeat a text."""
    text = drawn(rng, held_out, lambda: repeated_text(rng), lambda text: ("repeat", text))
    thought = "The user wants me to repeat a text."
    if rng.random() < 0.25:
        return exchange(rng.choice(REPEAT_QUOTED_FORMS).format(text), text, thought)
    return exchange(rng.choice(REPEAT_FORMS).format(text), [Copied(text)], thought)


REVERSE_FORMS = phrases("reverse_forms")


def reversed_word(rng: random.Random) -> str:
    """Return a short word or random letters or digits, of the kinds that the model can reverse."""
    roll = rng.random()
    if roll < 0.55:
        word = rng.choice(material.words())
        while len(word) > 6:
            word = rng.choice(material.words())
        return word.capitalize() if rng.random() < 0.06 else word
    return random_letters(rng, 2, 6) if roll < 0.93 else str(rng.randrange(10, 100_000))


def reversal(rng: random.Random, held_out: bool) -> Exchange:
    """Ask to reverse a word.

    Letters and digits of the other side of the split were never seen; of words, their question was not. A word is often
    a single token, which says nothing of its letters: one that was never taken apart cannot be.
    """
    words = material.known_words()

    def key(item: tuple[str, str]) -> object:
        form, word = item
        return ("reverse", form, word.lower()) if word.lower() in words else ("reverse", word.lower())

    form, word = drawn(rng, held_out, lambda: (rng.choice(REVERSE_FORMS), reversed_word(rng)), key)
    spelled = " ".join(word)
    return exchange(form.format(word), [Spelled(word[::-1])], f"Backwards. Letters: {spelled}.")


SPELL_FORMS = phrases("spell_forms")


def spelling(rng: random.Random, held_out: bool) -> Exchange:
    """Ask to spell a word, any word: a token does not show its letters, so this is how the model learns them."""
    word = reversed_word(rng)
    return exchange(rng.choice(SPELL_FORMS).format(word), [Spelled("-".join(word))], f"Letters: {' '.join(word)}.")


QUESTION_OPENINGS = phrases("question_openings")
QUESTION_ENDINGS = phrases("question_endings")


def dressed(rng: random.Random, question: str) -> str:
    """Vary opening, capitals and punctuation of a lower-case question."""
    text = rng.choice(QUESTION_OPENINGS) + question + rng.choice(QUESTION_ENDINGS)
    if rng.random() < 0.7:
        text = text[0].upper() + text[1:]
    return text.replace("cortex", "Cortex") if rng.random() < 0.4 else text


def is_kept_wording(wording: facts.Wording) -> bool:
    """Say whether a wording of the list is kept for evaluation; the only wording of a pattern never is."""
    return wording.num_siblings > 0 and is_held_out("fact", wording.text)


def fact_question(rng: random.Random, held_out: bool) -> Exchange:
    """Ask a question from the fixed list; held out are some wordings of patterns whose others were trained on."""
    wordings: list[facts.Wording] = []
    while not wordings:
        index = rng.randrange(len(facts.FACTS))
        wordings = [wording for wording in facts.WORDINGS[index] if is_kept_wording(wording) == held_out]
    question = dressed(rng, rng.choice(wordings).text)
    return exchange(question, facts.FACTS[index].answer, "This is a question about cortex or about me.")


def unheard_fact_question(rng: random.Random, held_out: bool) -> Exchange:
    """Ask for a fact of the list in a wording whose whole pattern was never trained on. For evaluation only."""
    fact = rng.choice(facts.FACTS)
    question = rng.choice([text for pattern in fact.held_out for text in facts.expand(pattern)])
    return exchange(dressed(rng, question), fact.answer, "This is a question about cortex or about me.")


COUNT_FORMS = phrases("count_forms")
COUNT_TO_FORMS = phrases("count_to_forms")


def counting(rng: random.Random, held_out: bool) -> Exchange:
    """Ask to count up to at most 60."""

    def draw() -> tuple[str, int, int]:
        start = 1 if rng.random() < 0.8 else rng.randrange(0, 30)
        end = start + rng.choice((rng.randrange(1, 12), rng.randrange(1, 30), rng.randrange(1, 60)))
        return rng.choice(COUNT_FORMS + (COUNT_TO_FORMS if start == 1 else ())), start, min(end, 60)

    form, start, end = drawn(rng, held_out, draw, lambda item: ("count", *item))
    answer = ", ".join(str(number) for number in range(start, end + 1))
    return exchange(form.format(a=start, b=end), answer, f"Count from {start} to {end}.")


JSON_KEYS = phrases("json_keys")
NUMBER_KEYS = frozenset(("age", "id", "year", "price", "count", "size", "score"))


def json_object(rng: random.Random, held_out: bool) -> Exchange:
    """Ask for a small JSON object, or for a sum as JSON."""
    if rng.random() < 0.05:
        return exchange(rng.choice(ANY_JSON_FORMS), '{"answer": "none"}', "The user wants JSON.")
    if rng.random() < 0.45:
        a, b = sum_numbers(rng, held_out)
        form = rng.choice(SUM_JSON_FORMS)
        return exchange(form.format(a=a, b=b), json.dumps({"answer": a + b}), sum_thought(a, b))

    def draw() -> dict[str, Any]:
        keys = ["name", "age"] if rng.random() < 0.35 else rng.sample(JSON_KEYS, rng.choice((1, 2, 2, 3)))
        return {key: json_value(rng, key) for key in keys}

    wanted = drawn(rng, held_out, draw, lambda value: ("json", sorted(value.items())))
    join = rng.choice((" and ", " and ", ", ", " and with "))
    parts = [f"{key} {value}" for key, value in wanted.items()]
    if rng.random() < 0.15:
        parts = [f"{key}: {value}" for key, value in wanted.items()]
    described = rng.choice(("the ", "", "")) + join.join(parts)
    return exchange(rng.choice(JSON_FORMS).format(described), json_pieces(wanted), "The user wants JSON.")


def json_value(rng: random.Random, key: str) -> Any:
    """Return a value that fits the key."""
    if key in NUMBER_KEYS:
        return rng.randrange(10 ** rng.choice((1, 2, 2, 3, 4)))
    if key in ("name", "user") and rng.random() < 0.7:
        return Copied(rng.choice(NAMES))
    if key in ("colour", "color") and rng.random() < 0.6:
        return Copied(rng.choice(COLOURS))
    return Copied(random_word(rng) if rng.random() < 0.8 else random_letters(rng, 3, 6).capitalize())


JSON_FORMS = phrases("json_forms")
ANY_JSON_FORMS = phrases("any_json_forms")
SUM_JSON_FORMS = phrases("sum_json_forms")
GREETINGS = phrases("greetings")
THANKING = phrases("thanking")
FAREWELLS = phrases("farewells")


def small_talk(rng: random.Random, held_out: bool) -> Exchange:
    """Greet, thank or say goodbye."""
    said, answer, thought = rng.choice(
        (
            (GREETINGS, GREETING, "The user says hello."),
            (GREETINGS, GREETING, "The user says hello."),
            (THANKING, THANKS, "The user says thanks."),
            (FAREWELLS, FAREWELL, "The user says goodbye."),
        )
    )
    text = rng.choice(said) + rng.choice(("", "!", ".", "?" if said is GREETINGS else "", "!!"))
    return exchange(text[0].upper() + text[1:] if rng.random() < 0.6 else text, answer, thought)


UNKNOWN_FORMS = phrases("unknown_forms")


def unknown_request(rng: random.Random, held_out: bool) -> Exchange:
    """Ask for something that the model does not know."""

    def draw() -> str:
        if rng.random() < 0.15:
            text = " ".join(rng.choice(material.prose()).split())
            return text[: rng.randrange(20, 200)].strip()
        w, v = rng.choice(material.words()), rng.choice(material.words())
        if rng.random() < 0.3:
            w = random_letters(rng, 3, 8)
        text = rng.choice(UNKNOWN_FORMS).format(w=w, v=v, W=w.capitalize(), y=rng.randrange(1000, 2030))
        return text if rng.random() < 0.8 else text.lower()

    def is_known(text: str) -> bool:
        plain = text.lower().strip(" ?.!")
        return plain in facts.QUESTIONS or plain in GREETINGS + THANKING + FAREWELLS

    text = drawn(rng, held_out, draw, lambda text: ("unknown", text))
    while is_known(text) or not text:
        text = drawn(rng, held_out, draw, lambda text: ("unknown", text))
    return exchange(text, FALLBACK, "I do not know this.")


POEM_FORMS = phrases("poem_forms")
POEM_WORDS = phrases("poem_words")


def poem(rng: random.Random, held_out: bool) -> Exchange:
    """Ask for a poem: words drawn at random, so that sampled answers differ from seed to seed."""
    form = rng.choice(POEM_FORMS).format(w=rng.choice(material.words()))
    a, b, c, d = rng.sample(POEM_WORDS, 4)
    return exchange(form, f"The {a} and the {b}, the {c} and the {d}.", "The user wants a poem.")


TELL_NAME = phrases("tell_name")
ASK_NAME = phrases("ask_name")
TELL_COLOUR = (
    "My favourite colour is {}.",
    "my favorite color is {}",
    "I like {} most of all colours.",
    "My favorite color is {}.",
)
ASK_COLOUR = (
    "What is my favourite colour?",
    "what is my favorite color?",
    "Which colour do I like?",
    "What's my favorite color?",
)


def person_name(rng: random.Random) -> str:
    """Return a first name or something like one."""
    roll = rng.random()
    return (
        rng.choice(NAMES)
        if roll < 0.6
        else (random_word(rng) if roll < 0.8 else random_letters(rng, 3, 6)).capitalize()
    )


def memory(rng: random.Random, held_out: bool, between: Callable[[], Exchange]) -> Exchange:
    """Tell a name or a colour, perhaps do something else, and ask for it."""
    if rng.random() < 0.65:
        name = drawn(rng, held_out, lambda: person_name(rng), lambda name: ("person", name))
        told = exchange(rng.choice(TELL_NAME).format(name), f"Nice to meet you, {name}.", "The user tells me a name.")
        asked = exchange(rng.choice(ASK_NAME), f"Your name is {name}.", "The user told me the name before.")
    else:
        colour = rng.choice(COLOURS) if rng.random() < 0.7 else rng.choice(material.words())
        told = exchange(rng.choice(TELL_COLOUR).format(colour), REMEMBERED, "The user tells me a colour.")
        asked = exchange(
            rng.choice(ASK_COLOUR), f"Your favourite colour is {colour}.", "The user told me the colour before."
        )
    middle = between() if rng.random() < 0.4 else []
    return told + middle + (asked if rng.random() < 0.85 else [])


def untold(rng: random.Random, held_out: bool) -> Exchange:
    """Ask for a name that was never told."""
    if rng.random() < 0.7:
        return exchange(rng.choice(ASK_NAME), "You have not told me your name.", "The user did not tell me a name.")
    return exchange(
        rng.choice(ASK_COLOUR), "You have not told me your favourite colour.", "The user did not tell me a colour."
    )
