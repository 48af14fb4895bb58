"""Resolution of a model id to its source: a registry, a local folder, or the demo model of this package."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

from cortex_core.errors import ApiError, invalid
from cortex_core.fleet import ModelSpec

from neuron.daemon.common.config import EngineTables
from neuron.daemon.hub.client import ProgressCallback, Registry, SizeCheck
from neuron.daemon.hub.model_id import DEFAULT_SCHEME, FILE_SCHEME, ModelId, ModelIdError, parse_model_id

DEMO_MODEL = "cortex/demo"


class Sources:
    """Resolves ids and fetches what they name. `fetch` blocks and is thread-safe."""

    def __init__(self, config: EngineTables, *, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        self._default_scheme = config.default_source
        hub_token = environ.get("HF_TOKEN") or None
        self._registries: dict[str, Registry] = {
            DEFAULT_SCHEME: Registry(endpoint=None, token=hub_token, cache_dir=_path(config.hf_cache))
        }
        for scheme, source in config.sources.items():
            cache_dir = source.cache_dir or (config.hf_cache if scheme == DEFAULT_SCHEME else None)
            token = environ.get(source.auth_env, "") if source.auth_env else ""
            self._registries[scheme] = Registry(
                endpoint=source.endpoint.rstrip("/"), token=token or False, cache_dir=_path(cache_dir)
            )

    def parse(self, text: str) -> ModelId:
        """An id with its scheme filled in. Raises `ApiError` 400 for one that is none or of an unknown source."""
        try:
            model = parse_model_id(text)
        except ModelIdError as exc:
            raise invalid(str(exc), param="model_id") from None
        if text == DEMO_MODEL or model.scheme == FILE_SCHEME:
            return model
        scheme = model.scheme or self._default_scheme
        if scheme not in self._registries:
            known = ", ".join([*sorted(self._registries), FILE_SCHEME])
            raise invalid(f"`{text}`: there is no source `{scheme}` (known: {known})", param="model_id")
        return ModelId(scheme, org=model.org, name=model.name)

    def public_id(self, text: str) -> str:
        """The id a model is served under: `org/name` whatever its source, `file:PATH` as given."""
        model = self.parse(text)
        return str(model) if model.scheme == FILE_SCHEME else model.repo

    def fetch(
        self,
        spec: ModelSpec,
        *,
        on_progress: ProgressCallback,
        cancelled: threading.Event,
        before_weights: SizeCheck = lambda config, num_bytes: None,
    ) -> Path:
        """The folder of the checkpoint, complete where it comes from a registry; what is in it, `inspection` finds out.

        before_weights may refuse before weights are downloaded. Raises `ApiError` and `download.FetchCancelled`.
        """
        model = self.parse(spec.model_id)
        if spec.model_id == DEMO_MODEL:
            return demo_model_path()
        if model.scheme == FILE_SCHEME:
            return Path(model.path).expanduser().absolute()
        return self._registries[model.scheme].fetch(
            spec, model, on_progress=on_progress, cancelled=cancelled, before_weights=before_weights
        )


def demo_model_path() -> Path:
    """The demo model's folder inside this package. Raises `ApiError` where the package was built without it."""
    path = Path(str(resources.files("neuron") / "demo_model"))
    if not path.is_dir():
        raise ApiError("not_found", "This build of the neuron has no demo model.", code="model_not_found")
    return path


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text).expanduser()
