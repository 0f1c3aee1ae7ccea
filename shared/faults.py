"""Turns pydantic's validation errors into our faults: stable codes, JSON pointers, and a hint for a misspelled name."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any

from pydantic import ValidationError

from shared.errors import Fault

#: faults listed in one answer
MAX_FAULTS = 100

#: longest name for which a near one is looked up
_MAX_NAME = 64

_CODES = {
    "extra_forbidden": "unknown-field",
    "finite_number": "not-finite",
    "greater_than": "out-of-range",
    "greater_than_equal": "out-of-range",
    "int_parsing_size": "out-of-range",
    "less_than": "out-of-range",
    "less_than_equal": "out-of-range",
    "string_too_long": "too-long",
    "string_unicode": "invalid-text",
    "too_long": "too-many",
}


_LONE_SURROGATE = "must be valid Unicode (it holds a lone surrogate)"


def pointer(*parts: object) -> str:
    """The JSON pointer (RFC 6901) of a path of names and positions."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)


def faults_of(error: ValidationError, accepted: Collection[str], *, of: str, base: str = "") -> list[Fault]:
    """The first faults of `error`, with pointers below `base`.

    `accepted` are the names that may be given, `of` is what they belong to, as texts say it.
    """
    found = islice(error.errors(include_url=False, include_input=False), MAX_FAULTS)
    return [_fault(fault, accepted, of, base) for fault in found]


def _fault(fault: Mapping[str, Any], accepted: Collection[str], of: str, base: str) -> Fault:
    kind, where = fault["type"], base + pointer(*fault["loc"])
    code = _CODES.get(kind, kind.replace("_", "-"))
    if kind == "string_unicode":
        return Fault(where, code, _LONE_SURROGATE)
    if kind != "extra_forbidden":
        return Fault(where, code, fault["msg"].removeprefix("Value error, "))
    name = str(fault["loc"][-1])
    close = difflib.get_close_matches(name, accepted, n=1) if len(name) <= _MAX_NAME else []
    known = f"known are {', '.join(accepted)}" if accepted else "there are none"
    hint = f"did you mean {close[0]}?" if close else known
    return Fault(where, code, f"{name[:_MAX_NAME]} is not a parameter of {of}; {hint}")
