"""Peers of another age are understood; silence is never failure."""

from __future__ import annotations

import msgspec
from cortex_core.fleet import (
    LOAD_FEATURES,
    OLDEST_LOAD_FIELDS,
    DiscoveryResponse,
    HealthResponse,
    ModelInfo,
    ModelSpec,
    needed_features,
    status_of,
)


def test_an_old_peers_minimal_answers_are_read_with_defaults() -> None:
    models = msgspec.json.decode(
        b'[{"id":"a/b","harness":"candle","status":"loaded","devices":[0]}]', type=list[ModelInfo]
    )
    assert models[0].servable is None and models[0].limit is None and models[0].devices == (0,)
    health = msgspec.json.decode(b'{"uptime_secs":3,"devices":[],"future_field":{}}', type=HealthResponse)
    assert health.activation.state == "ready" and health.models == ()
    assert msgspec.json.decode(b"{}", type=DiscoveryResponse).max_prompt_tokens == 0


def test_a_load_request_names_the_harness_that_older_neurons_demand() -> None:
    sent = msgspec.json.decode(msgspec.json.encode(ModelSpec("a/b")))
    assert sent["model_id"] == "a/b" and sent["harness"] == "candle" and sent["quant"] is None


def test_unknown_statuses_read_as_loaded() -> None:
    assert status_of("recovering") == "recovering"
    assert status_of("something-new") == "loaded"


def test_what_the_oldest_neurons_read_needs_no_feature_and_all_else_has_one() -> None:
    assert not needed_features(ModelSpec("a/b", quant="q6k", tensor_split=(1.0, 2.0), deterministic=True))
    assert needed_features(ModelSpec("a/b", dtype="float32")) == {"load.dtype"}
    named = {feature.removeprefix("load.") for feature in LOAD_FEATURES}
    assert named.isdisjoint(OLDEST_LOAD_FIELDS)
    assert named | OLDEST_LOAD_FIELDS == set(ModelSpec.__struct_fields__)
