"""Limits on the parts of a request, one constant each; beyond one is a 400 that names the field and the limit.

Parts are counted before anything is made of them, so that no request takes more than in proportion to its bytes, and
nothing that is said once and used often (a name, a description, a stop string) is large. How long a text may be is not
for these to say: the model's window decides (`neuron.daemon.text.limits`).
"""

from __future__ import annotations

# ---------------------------------------------------------------- any body

MAX_DEPTH = 128
"""Containers within containers. Deeper values would exhaust the stack of template engines and schema compilers."""
MAX_CONTAINERS = 250_000
"""Objects and arrays of one body. An empty one is two bytes, and takes fifty."""
MAX_VALUES = 1_000_000
"""Values of one body, token ids among them."""
MAX_MODEL_NAME = 512
"""Characters of a model's name. Names end up in caches, log lines and messages."""

# ---------------------------------------------------------------- the conversation

MAX_MESSAGES = 10_000
"""Messages, or items of responses."""
MAX_PARTS = 50_000
"""Content parts, tool calls and results, in all messages together."""
MAX_DATA_URL_HEAD = 1_024
"""Characters of an image's data URL before its data."""
MAX_TEMPLATE_KWARGS_BYTES = 65_536
"""Of `chat_template_kwargs`, as JSON."""

# ---------------------------------------------------------------- tools

MAX_TOOLS = 1_024
"""Tools that can be offered, those of namespaces and of items among them; and references to them in a choice."""
MAX_NAME = 256
"""Characters of the name of a tool, a namespace or a call. Templates write it with each result, too."""
MAX_NAMESPACE_CHARACTERS = 2**20
"""Of the descriptions of namespaces, each counted for every member, which it is put before."""

# ---------------------------------------------------------------- sampling

MAX_STOP_SEQUENCES = 64
"""The official limit is four; editors send more."""
MAX_STOP_CHARACTERS = 1_024
"""Of one stop sequence."""
MAX_ALL_STOP_CHARACTERS = 8_192
"""Of all stop sequences of a request together."""
REPETITION_PENALTIES = (0.01, 10.0)
"""Least and greatest; a logit is divided by it, in float32."""
MAX_LOGIT_BIAS = 1_024
"""Token ids in `logit_bias`. Each is looked up at every step of every choice."""
MAX_CHOICES = 128
"""`n`; and the choices of all prompts of a completion together."""
MAX_PROMPTS = 128
MAX_TOP_LOGPROBS = 20
"""`top_logprobs` of chat and responses."""
MAX_LOGPROBS = 5
"""`logprobs` of completions."""
MAX_TOKENS_CEILING = 2**31 - 1
"""Larger token limits are cut to this: a limit is clamped to the window, never refused for being large."""
MAX_TOKEN_ID = 2**31 - 1
MAX_TOKEN_ID_DIGITS = 9
"""No vocabulary has a thousand million tokens."""

MAX_CACHE_SALT = 256
"""Characters."""

# ---------------------------------------------------------------- answers of other servers

MAX_WHOLE_ANSWER_BYTES = 16 * 2**20
"""Of an answer that is not streamed, which is held until it is whole."""
MAX_FOREIGN_EVENT_BYTES = 2 * 2**20
"""Of one chunk of a stream. A whole answer of 100,000 tokens is a quarter of it."""
MAX_FOREIGN_CONTAINERS = 200_000
"""Objects and arrays in one chunk, or in a whole answer: each takes up to half a microsecond to read."""
MAX_FOREIGN_ERROR_BYTES = 64 * 1024
"""What is longer is no error answer that anybody wrote, and is not read."""
MAX_FOREIGN_CHOICES = MAX_CHOICES
"""Choices that a stream may tell apart."""
