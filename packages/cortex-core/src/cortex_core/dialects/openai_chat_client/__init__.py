"""The reverse of `openai_chat`: write a request, read an answer.

For talking to a server that speaks OpenAI chat completions and nothing else. With it, translation between dialects
is composition: one dialect's parser, `write_request`, `StreamReader` or `AnswerReader`, the first dialect's projector.
"""

from cortex_core.dialects.openai_chat_client.errors import error_of
from cortex_core.dialects.openai_chat_client.request import read_count, write_count_request, write_request
from cortex_core.dialects.openai_chat_client.stream import AnswerReader, StreamReader

__all__ = ["AnswerReader", "StreamReader", "error_of", "read_count", "write_count_request", "write_request"]
