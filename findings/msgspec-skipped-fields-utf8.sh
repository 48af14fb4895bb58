#!/usr/bin/env bash
# msgspec 0.22.0: fields that a struct does not declare are skipped with half of the checks.
#
# A decoder for a struct passes over unknown fields "without decoding" them. One would expect either the full checks of a
# whole decode or none. Seen: escapes, control characters, commas and the form of numbers are checked in what is skipped,
# but bytes that are no UTF-8 (in values and in keys) and numbers beyond a double are not. A router that reads `model` of
# a body that way forwards bodies which whoever decodes them in full refuses, and the two disagree on whose fault it is.
# Fails when that changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "msgspec==0.22.0"
"$folder/venv/bin/python" - <<'PY'
import msgspec


class Named(msgspec.Struct):
    model: str


def accepts(body: bytes, **target: type) -> bool:
    try:
        msgspec.json.decode(body, **target)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True


cases = {
    "value that is no UTF-8": b'{"model": "m", "note": "\xff\xfe"}',
    "key that is no UTF-8": b'{"model": "m", "\xff": 1}',
    "number beyond a double": b'{"model": "m", "note": 1e999}',
    "unknown escape": b'{"model": "m", "note": "\\q"}',
    "raw line feed in a string": b'{"model": "m", "note": "a\nb"}',
    "leading zero": b'{"model": "m", "note": 01}',
    "trailing comma": b'{"model": "m", "note": [1,]}',
}
seen = {name: (accepts(body), accepts(body, type=Named)) for name, body in cases.items()}
print(f"msgspec {msgspec.__version__}   (whole decode accepts, struct that skips it accepts)")
for name, pair in seen.items():
    print(f"  {name:28} {pair}")
skipped_only = [name for name, pair in seen.items() if pair == (False, True)]
neither = [name for name, pair in seen.items() if pair == (False, False)]
assert skipped_only == ["value that is no UTF-8", "key that is no UTF-8", "number beyond a double"], skipped_only
assert neither == ["unknown escape", "raw line feed in a string", "leading zero", "trailing comma"], neither
PY
