"""Limits on the work that one request or one checkpoint may ask of text processing, one constant each.

Every algorithm here is linear in what these bound. What a client exceeds is a 400 that names the field, the limit and
what was asked; what it exceeds in the form of the *output* (a schema that no compiler finishes) is loosened instead,
since its result is still JSON of the kind that was asked for. `cortex_core.dialects.limits` has those of the bodies.
"""

from __future__ import annotations

# ---------------------------------------------------------------- JSON schemas

MAX_SCHEMA_BYTES = 512 * 1024
"""Of one schema, as compact JSON; and of all schemas of one request that are enforced, together."""
MAX_SCHEMA_DEPTH = 64
"""Schemas within schemas."""
MAX_SCHEMA_NODES = 5_000
"""Subschemas of one schema. The compiler takes about 10 kB of stack and of heap for each."""
MAX_REQUEST_SCHEMA_NODES = 20_000
"""Of all schemas of one request that are enforced: those of its tools, and that of its answer."""
MAX_SCHEMA_BRANCHES = 1_000
"""Entries of one `properties`, `required`, `anyOf`, `oneOf`, `allOf` or `prefixItems`: the compiler compares them with
each other."""
MAX_PATTERN_PROPERTIES = 64
"""Of one `patternProperties`: each is intersected with each other."""
MAX_ENUM_VALUES = 10_000
"""Of all `enum` lists of one schema."""
MAX_PATTERN_CHARACTERS = 4_096
"""Of one regular expression."""
MAX_PATTERNS_CHARACTERS = 32_768
"""Of all regular expressions of one schema."""

MAX_SCHEMA_LEVELS = 256
"""Beyond so many schemas within each other, references followed, references are let go: the compiler walks them on its
stack, which 900 overflow (8 MiB)."""
MAX_CONJOINED_PATTERNS = 4
"""Beyond so many regular expressions that one string has to match at once, none is enforced: whether some string
matches them all takes time exponential in their number."""
MAX_MATCHED_ENUM_VALUES = 256
"""Beyond so many values of an `enum` that has to match a regular expression too, the expression is not enforced."""
MAX_FOLDED_CLASSES = 64
"""Classes of characters in regular expressions that ignore case: each letter of their ranges is looked up."""
MAX_MERGE_WORK = 50_000
"""Comparisons in making one schema of those that hold at once: pattern properties with each other, names of properties,
wherever a definition is put together with others."""
MAX_MULTIPLE_STATES = 32_768
"""Of the automata that tell multiples of whole numbers: one for each remainder."""
MAX_SCHEMA_NODES_TRIED_OFTEN = 500
"""A schema of more subschemas that does not compile is not loosened step by step, but at once as far as it goes."""

MAX_TYPE_STEPS = 32_768
"""Schemas and values that are looked at, in one answer, to find out of which types arguments are."""

# ---------------------------------------------------------------- texts

MAX_BYTES_PER_TOKEN = 32
"""A text with more bytes than this for each token of the window is too long for it, whatever its tokens are: those that
are longer (runs of blanks, of dashes) are exceptions in any text. It is refused before it is rendered or tokenised."""
COUNTED_WINDOWS = 4
"""A text that is sure to have more tokens than so many windows is not tokenised to be counted."""
MAX_SCORED_TOKENS = 8_192
"""Of a prompt that comes back with log-probabilities (completions with `echo` and `logprobs`): all of its answer is one
event."""
MAX_ALL_SCORED_TOKENS = 65_536
"""Of all choices of such a request together."""
ASSUMED_WINDOW = 131_072
"""Tokens, where the window of a model is not known."""

# ---------------------------------------------------------------- tokenizers

MAX_VOCABULARY = 2**22
"""One more than the largest id of a token: tables of that size are made. The largest of the field have 2^18."""
MAX_MERGED_CHARACTERS = 128
"""Of a piece that merges are sought for: every way to cut it in two is tried."""

# ---------------------------------------------------------------- grammars

MAX_CACHED_GRAMMAR_BYTES = 16 * 2**20
"""Of compiled schemas and grammars that a model keeps, so that the tools an agent sends each time are compiled once."""
