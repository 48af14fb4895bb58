"""The catalogue (`models.toml`): model profiles, aliases, feasibility, residency classes. Pure functions.

Feasibility says where a model may live, residency who may displace whom; neither says that it must.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Container
from pathlib import Path
from typing import Annotated

import msgspec

from cortex_core.config import ConfigError, parse_config, read_text
from cortex_core.fleet import ContextLimit, DiscoveryResponse, Dtype, ModelCost, ModelSpec

DEFAULT_RESIDENCY_PRIORITY = 100
PINNED_RESIDENCY_PRIORITY = 1000


class ModelProfile(msgspec.Struct, frozen=True):
    """What the operator says of one model.

    vram_mb is an estimate over all devices, min_devices > 1 asks for tensor parallelism, pinned_on is affinity
    (and, without an explicit priority, the pinned residency class), source a registry scheme. idle_unload_s: unload
    after so many seconds without a request; 0 is never, None what the gateway's configuration says.
    """

    id: str
    harness: str = "candle"
    quant: str | None = None
    dtype: Dtype | None = None
    vram_mb: int | None = None
    min_devices: Annotated[int, msgspec.Meta(ge=1)] = 1
    min_device_vram_mb: int | None = None
    pinned_on: tuple[str, ...] = ()
    residency_priority: int | None = None
    idle_unload_s: Annotated[float, msgspec.Meta(ge=0)] | None = None
    source: str | None = None
    limit: ContextLimit | None = None
    cost: ModelCost | None = None
    capabilities: tuple[str, ...] = ()

    @property
    def residency(self) -> int:
        """The residency class: a higher one is never displaced by a lower one."""
        if self.residency_priority is not None:
            return self.residency_priority
        return PINNED_RESIDENCY_PRIORITY if self.pinned_on else DEFAULT_RESIDENCY_PRIORITY


class Catalogue(msgspec.Struct, frozen=True):
    """Profiles and aliases. An alias key with `*` or `?` is a wildcard (`claude-*haiku*`)."""

    models: tuple[ModelProfile, ...] = ()
    aliases: dict[str, str] = {}

    def profile(self, model_id: str) -> ModelProfile | None:
        for profile in self.models:
            if profile.id == model_id:
                return profile
        return None

    def resolve(self, name: str, served: Container[str] = ()) -> str:
        """The concrete model id behind `name`: one flat lookup, no chaining.

        A model of the catalogue, or one that some node has (`served`), stands for itself; then exact aliases;
        then wildcards in file order.
        """
        if name in served or self.profile(name) is not None:
            return name
        exact = self.aliases.get(name)
        if exact is not None:
            return exact
        for pattern, target in self.aliases.items():
            if is_wildcard(pattern) and fnmatch.fnmatchcase(name, pattern):
                return target
        return name

    def residency(self, model_id: str) -> int:
        profile = self.profile(model_id)
        return DEFAULT_RESIDENCY_PRIORITY if profile is None else profile.residency


def is_wildcard(alias: str) -> bool:
    return "*" in alias or "?" in alias


def is_feasible(profile: ModelProfile, node: str, discovery: DiscoveryResponse) -> bool:
    """Whether `node` could ever serve the profile, whatever is loaded there now.

    Affinity admits the node, it has enough devices, and enough of them are large enough. A host without devices
    serves from its CPU: it counts as one device whose size is the host's memory (0 = unknown = no objection).
    """
    if profile.pinned_on and node not in profile.pinned_on:
        return False
    if not discovery.devices:
        if profile.min_devices > 1:
            return False
        need = max(profile.min_device_vram_mb or 0, profile.vram_mb or 0)
        return discovery.memory_total_mb == 0 or need <= discovery.memory_total_mb
    if len(discovery.devices) < profile.min_devices:
        return False
    if profile.min_device_vram_mb is None:
        return True
    large = [device for device in discovery.devices if device.vram_total_mb >= profile.min_device_vram_mb]
    return len(large) >= profile.min_devices


def may_displace(catalogue: Catalogue, incoming: str, resident: str) -> bool:
    """Equal rank may displace both ways: that is what a cold swap is."""
    return catalogue.residency(incoming) >= catalogue.residency(resident)


def load_spec(profile: ModelProfile, discovery: DiscoveryResponse) -> ModelSpec:
    """The load request for a profile on a host: the first devices that are large enough."""
    model_id = f"{profile.source}:{profile.id}" if profile.source else profile.id
    floor = profile.min_device_vram_mb or 0
    large = [device.index for device in discovery.devices if device.vram_total_mb >= floor]
    if len(large) < profile.min_devices:
        large = [device.index for device in discovery.devices]
    devices = tuple(large[: profile.min_devices]) if large else None
    return ModelSpec(
        model_id=model_id,
        harness=profile.harness,
        quant=profile.quant,
        dtype=profile.dtype,
        tensor_parallel=profile.min_devices if profile.min_devices > 1 else None,
        devices=devices,
    )


def load_catalogue(path: Path | str) -> Catalogue:
    """Read `models.toml`. A missing file is an empty catalogue; a broken one raises `ConfigError`.

    Refused: two profiles of one id, and an alias of an existing model's name (it would never apply).
    """
    return parse_catalogue(read_text(path, required=False), path)


def parse_catalogue(text: str, path: Path | str) -> Catalogue:
    """`load_catalogue` on text already read."""
    catalogue = parse_config(Catalogue, text, name=str(path))
    faults: list[str] = []
    seen: set[str] = set()
    for index, profile in enumerate(catalogue.models):
        if profile.id in seen:
            faults.append(f"{path}: models[{index}].id: `{profile.id}` is listed twice")
        seen.add(profile.id)
    faults.extend(
        f"{path}: aliases.{alias}: a model of this name exists, the alias would never apply"
        for alias in catalogue.aliases
        if alias in seen
    )
    if faults:
        raise ConfigError(faults)
    return catalogue
