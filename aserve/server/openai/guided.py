"""What a body asks of the form of its output.

``guided_json`` (an object or its text), ``guided_regex``, ``guided_choice`` and ``guided_grammar`` (Lark or
GBNF), with ``guided_decoding_backend`` and ``guided_whitespace_pattern``; and ``response_format`` as OpenAI
has it: ``text``, ``json_object``, or ``json_schema``, which is followed whether ``strict`` is set or not. At
most one of them may ask for something.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aserve.errors import InvalidRequestError
from aserve.messages.params import GuidedParams

if TYPE_CHECKING:
    from aserve.server.openai.protocol import ResponseFormat, SamplingBody

_FIELDS = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}


def guided_params(body: SamplingBody) -> GuidedParams | None:
    """The guide of a request; None for one that has none. Raises InvalidRequestError naming the field."""
    asked = [name for name in _FIELDS if getattr(body, name) is not None]
    format = body.response_format
    values = {} if format is None else _of_format(format)
    if values:
        asked.append("response_format")
    if len(asked) > 1:
        raise InvalidRequestError(
            f"{asked[1]} cannot be combined with {asked[0]}: only one may guide the output", param=asked[1]
        )
    options: dict[str, Any] = {
        "backend": body.guided_decoding_backend,
        "whitespace_pattern": body.guided_whitespace_pattern,
    }
    if not asked:
        for name, value in options.items():
            if value is not None and name != "backend":
                raise InvalidRequestError(
                    f"guided_{name} needs guided_json or response_format", param=f"guided_{name}"
                )
        return None
    if not values:
        values = {_FIELDS[asked[0]]: getattr(body, asked[0])}
    return GuidedParams(**values, **options, source=asked[0])


def _of_format(format: ResponseFormat) -> dict[str, Any]:
    if format.type == "text":
        return {}
    if format.type == "json_object":
        return {"json_object": True}
    if format.type != "json_schema":
        raise InvalidRequestError(
            "response_format.type must be text, json_object or json_schema", param="response_format"
        )
    given = format.json_schema
    if given is None:
        raise InvalidRequestError("response_format.json_schema is missing", param="response_format")
    if given.schema_ is None:  # a name alone: OpenAI then asks for any object
        return {"json_object": True}
    return {"json": given.schema_}
