from __future__ import annotations

from neuron.daemon.supervisor.restart_policy import RestartPolicy


def test_the_first_rebuild_is_immediate_and_later_ones_back_off() -> None:
    policy = RestartPolicy(attempts=8)
    assert [policy.delay_before(failures) for failures in range(1, 10)] == [0, 1, 2, 4, 8, 16, 30, 30, None]


def test_no_attempts_means_no_rebuild() -> None:
    assert RestartPolicy(attempts=0).delay_before(1) is None


def test_a_long_life_starts_the_count_anew() -> None:
    policy = RestartPolicy(stable_after_s=60)
    assert policy.failures_after(3, lived_s=59.9) == 4
    assert policy.failures_after(3, lived_s=60.0) == 1


def test_retry_after_is_whole_bounded_seconds() -> None:
    assert RestartPolicy.retry_after(0.0, 0.0) == 1
    assert RestartPolicy.retry_after(2.0, 3.2) == 6
    assert RestartPolicy.retry_after(30.0, 900.0) == 120
