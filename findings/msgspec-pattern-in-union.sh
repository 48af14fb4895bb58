#!/usr/bin/env bash
# msgspec 0.22.0: a union of a text with a `pattern` and an array frees the compiled pattern while others hold it.
#
# Each conversion (or a struct's first use) releases references to the regular expression that it never took. `re` hands
# out one cached object for equal patterns, so others are left with freed memory: `AttributeError: ' ' object has no
# attribute 'search'`, or a segmentation fault a while later, far from its cause. Here the count of references to a pattern
# that this process holds becomes a number like 139797050408193. Patterns in plain texts, arrays and unions of scalars are
# fine; so a setting that is one place of a secret or a list of them is `str | tuple[str, ...]`, and checked by us.
# Fails when that changes.
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "msgspec==0.22.0"
cat >"$folder/union.py" <<'PY'
import os
import re
import sys
from typing import Annotated, Union

import msgspec

Place = Annotated[str, msgspec.Meta(pattern="^(env|file):.+$")]
pattern = re.compile("^(env|file):.+$")  # the object that msgspec gets, too
before = sys.getrefcount(pattern)
for _ in range(3):
    msgspec.convert("env:A", Union[Place, tuple[Place, ...]])
after = sys.getrefcount(pattern)
print(f"msgspec {msgspec.__version__}: {before} references before, {after} after")
sys.stdout.flush()
os._exit(0 if 0 < after < 100 else 3)  # what is broken must not be collected
PY
status=0
"$folder/venv/bin/python" "$folder/union.py" || status=$?
test "$status" -ne 0
