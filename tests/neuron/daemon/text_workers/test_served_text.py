"""A model's text, served by workers."""

from __future__ import annotations

import json
from pathlib import Path

from neuron.daemon.text_workers.messages import Count, Detokenize, Tokenize

from tests.neuron.daemon.text_workers.checkpoints import chat
from tests.neuron.daemon.text_workers.harness import WINDOW, prepare, served


async def test_requests_are_prepared_counted_and_tokenised(tmp_path: Path) -> None:
    async with served(tmp_path) as text:
        request, (choice,) = await prepare(text, "hello world", max_tokens=3, stop=["x"])
        assert request.limits.stop == ("x",) and choice.max_tokens == 3 and choice.prompt.token_ids
        body = chat("hello world", max_tokens=3)
        assert await text.count(Count("messages", WINDOW), body, principal=None) == choice.prompt.num_tokens
        body = json.dumps({"model": "m", "prompt": "hello"}).encode()
        tokens = json.loads(await text.answer(Tokenize(WINDOW), body, principal=None))
        body = json.dumps({"model": "m", "tokens": tokens["tokens"]}).encode()
        assert json.loads(await text.answer(Detokenize(), body, principal=None)) == {"prompt": "hello"}
        assert tokens["max_model_len"] == WINDOW and tokens["count"] == len(tokens["tokens"])
