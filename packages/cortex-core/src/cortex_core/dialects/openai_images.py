"""The `image_url` content part."""

from __future__ import annotations

import re

from cortex_core.conversation import ImagePart
from cortex_core.dialects import limits
from cortex_core.dialects.json_body import Fields, missing, wrong_type
from cortex_core.errors import invalid

DETAILS = ("auto", "low", "high", "original")

_DATA_URL = re.compile(r"data:(?P<media_type>image/[\w.+-]+)(?:;[\w-]+=[^;,]*)*;base64,", re.IGNORECASE)


def image_part(part: Fields) -> ImagePart:
    """An image by http(s) URL or by base64 data URL. The data itself is decoded where images are decoded."""
    value = part.get("image_url")
    if value is None:
        raise missing(part.at("image_url"))
    if type(value) is str:
        return _image(value, part.at("image_url"), None)
    if type(value) is not dict:
        raise wrong_type(part.at("image_url"), "an object", value)
    image_url = Fields(value, part.at("image_url"))
    detail = image_url.choice("detail", DETAILS)
    return _image(image_url.required_string("url"), image_url.at("url"), detail)


def _image(url: str, path: str, detail: str | None) -> ImagePart:
    if url[:8].lower().startswith(("http://", "https://")):
        return ImagePart(url=url, detail=detail)
    match = _DATA_URL.match(url, 0, limits.MAX_DATA_URL_HEAD)
    if match is None or match.end() == len(url):
        raise invalid(f"{path}: must be an http or https URL, or a URL of the form data:image/png;base64,…", param=path)
    return ImagePart(data=url[match.end() :], media_type=match["media_type"].lower(), detail=detail)
