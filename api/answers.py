"""The base of everything that the API answers with."""

from __future__ import annotations

from datetime import UTC, datetime
from http import HTTPStatus
from typing import Annotated

from flask import Response
from pydantic import AfterValidator, BaseModel, ConfigDict

#: a moment, always told in UTC
Time = Annotated[datetime, AfterValidator(lambda moment: moment.astimezone(UTC))]


class Answer(BaseModel):
    """One JSON document that the API sends. Its schema is what the OpenAPI document shows."""

    model_config = ConfigDict(frozen=True)

    def response(self, status: HTTPStatus = HTTPStatus.OK, **headers: str) -> Response:
        """The HTTP answer. Header names are written with `_`."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return Response(self.model_dump_json(by_alias=True), status, named, content_type="application/json")
