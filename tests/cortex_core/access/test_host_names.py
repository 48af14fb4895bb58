"""The names that a host has without anybody being asked."""

from __future__ import annotations

import os

from cortex_core.access.host_names import names_of_host, own_names

HOSTS = """
127.0.0.1   localhost localhost.localdomain
127.0.1.1   GPU1.lab.example. gpu1   # by the installer
192.0.2.9   other.example other
0.0.0.0     tracker.example
192.0.2.7   models.example gpu1.lab.example
"""


def test_H6_the_names_beside_the_hostname_are_its_own_and_no_others() -> None:
    assert names_of_host("gpu1", HOSTS) == {"gpu1", "gpu1.lab.example"}
    assert names_of_host("gpu1.lab.example", HOSTS) == {"gpu1", "gpu1.lab.example", "models.example"}
    assert names_of_host("elsewhere", HOSTS) == {"elsewhere"}
    assert names_of_host("", HOSTS) == frozenset()
    assert names_of_host("localhost", "") == {"localhost"}


def test_H6_the_name_that_is_listened_on_is_its_own() -> None:
    assert "models.example" in own_names("models.example:31313")
    assert os.uname().nodename.lower() in own_names("127.0.0.1:31313")
    assert "127.0.0.1" not in own_names("127.0.0.1:31313")
    own_names("[::]:31313"), own_names("fd://3"), own_names("")
