"""A key as a gateway works with it: what it may use, and where it stands in its minute."""

from __future__ import annotations

import pytest
from cortex_core.entitlements import Budget, KeyEntry
from cortex_gateway.identity.principal import KeyMeters, Principal, duration, limit_headers, timestamp

from .fake_clock import NOW, FakeClock


def principal(meters: KeyMeters | None = None, **fields: object) -> Principal:
    return Principal(KeyEntry(key_id="ci", key="secret", **fields), meters or KeyMeters())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("models", "names", "may"),
    [
        (("*",), ("anything",), True),
        (("org/*",), ("org/name",), True),
        (("org/*",), ("other/name",), False),
        (("org/*",), ("alias", "org/name"), True),
        (("fast", "org/a?"), ("org/ab",), True),
        (("fast",), ("faster",), False),
        ((), ("anything",), False),
    ],
)
def test_a_key_may_use_what_any_of_a_models_names_allows(
    models: tuple[str, ...], names: tuple[str, ...], may: bool
) -> None:
    found = principal(models=models)
    assert found.may_use(*names) is may
    assert found.may_use_all is (models == ("*",))


def test_limits_change_without_forgetting_what_was_counted() -> None:
    meters = KeyMeters()
    principal(meters, requests_per_minute=10)
    assert meters.requests is not None and meters.tokens is None
    counted = meters.requests
    counted.settle(0, 5, 0)
    principal(meters, requests_per_minute=3, tokens_per_minute=7)
    assert meters.requests is counted and counted.cap == 3 and counted.remaining(0) == 0
    assert meters.tokens is not None and meters.tokens.cap == 7
    principal(meters)
    assert meters.requests is None


def test_accounts_have_salts_of_their_own_that_do_not_show_them() -> None:
    first = principal(account_id="acme")
    assert first.cache_salt == principal(account_id="acme", admin=True).cache_salt
    assert first.cache_salt != principal(account_id="acme2").cache_salt
    assert "acme" not in first.cache_salt and first.account_id == "acme"
    assert dict(first.upstream_headers) == {"x-helexa-account-id": "acme", "x-helexa-key-id": "ci"}


def test_tokens_are_counted_where_a_minute_or_a_budget_wants_it() -> None:
    assert not principal(requests_per_minute=1).counts_tokens
    assert principal(tokens_per_minute=1).counts_tokens
    assert principal(budgets=(Budget(tokens=5),)).counts_tokens


def test_where_a_key_stands_is_said_in_the_words_of_the_dialect() -> None:
    clock = FakeClock()
    found = principal(requests_per_minute=10, tokens_per_minute=100)
    assert found.meters.requests is not None
    found.meters.requests.settle(0, 4, clock.elapsed_ms())
    openai = dict(limit_headers(found, "openai", clock))
    assert openai[b"x-ratelimit-limit-requests"] == b"10" and openai[b"x-ratelimit-remaining-requests"] == b"6"
    assert openai[b"x-ratelimit-remaining-tokens"] == b"100" and b"x-ratelimit-reset-tokens" in openai
    anthropic = dict(limit_headers(found, "anthropic", clock))
    assert anthropic[b"anthropic-ratelimit-requests-remaining"] == b"6"
    assert anthropic[b"anthropic-ratelimit-requests-reset"] > timestamp(NOW).encode()
    assert limit_headers(principal(), "openai", clock) == []


@pytest.mark.parametrize(
    ("milliseconds", "text"),
    [(0, "0ms"), (20, "20ms"), (1500, "1.5s"), (60_000, "1m0s"), (360_000, "6m0s"), (3_600_000, "1h0m0s")],
)
def test_durations_are_written_as_openai_writes_them(milliseconds: int, text: str) -> None:
    assert duration(milliseconds) == text


@pytest.mark.parametrize(("past", "text"), [(0, "20Z"), (1, "21Z"), (1000, "21Z")])
def test_a_time_is_told_to_the_second_that_is_not_too_early(past: int, text: str) -> None:
    assert timestamp(NOW + past).endswith(text)
