"""Whether a document is OpenAPI 3.1, as far as the libraries here can tell, and hangs together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import schemathesis


def check_document(document: dict[str, Any]) -> None:
    """Raises what is wrong with it."""
    loaded = schemathesis.openapi.from_dict(document)
    loaded.validate()  # against the official schema of OpenAPI 3.1
    assert str(loaded.specification.version).startswith("3.1")
    operations = [operation.ok() for operation in loaded.get_all_operations()]
    assert len(operations) == sum(len(methods) for methods in document["paths"].values())
    names = [each["operationId"] for methods in document["paths"].values() for each in methods.values()]
    assert len(names) == len(set(names))
    schemas = document["components"]["schemas"]
    used = set(references(document))
    there = {f"#/components/{kind}/{name}" for kind, named in document["components"].items() for name in named}
    unused = {name for name in there - used if "/securitySchemes/" not in name}
    assert used <= there and not unused, "every reference leads somewhere, and every component is used"
    for name in schemas:
        jsonschema_rs.Draft202012Validator(
            {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        )


def references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "$ref" and isinstance(inner, str):
                yield inner
            else:
                yield from references(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references(inner)
