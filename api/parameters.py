"""The base of everything that a request carries and flask-openapi3 checks: path, query, headers, body."""

from __future__ import annotations

from functools import cache
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from shared.errors import InvalidInput
from shared.faults import faults_of


class Parameters(BaseModel):
    """Unknown names are refused, and what does not fit becomes an `InvalidInput` with a pointer for each fault."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def model_validate(cls, obj: Any, **options: Any) -> Self:
        try:
            return super().model_validate(obj, **options)
        except ValidationError as error:
            accepted = [field.alias or name for name, field in cls.model_fields.items()]
            raise InvalidInput(faults_of(error, accepted, of="this request")) from None

    @classmethod
    def model_json_schema(cls, *arguments: Any, **options: Any) -> dict[str, Any]:
        # flask-openapi3 asks for it at every request
        return _schema(cls, arguments, tuple(sorted(options.items())))


class NoQuery(Parameters):
    """A route without query parameters."""


@cache
def _schema(cls: type[Parameters], arguments: tuple[Any, ...], options: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    return super(Parameters, cls).model_json_schema(*arguments, **dict(options))
