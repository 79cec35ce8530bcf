"""instructor over the openai package."""

from __future__ import annotations

from typing import Literal

import instructor
import openai
from kit import BASE, KEY, MODEL, USER, check, main
from pydantic import BaseModel, Field

SETTINGS = {"base_url": BASE, "api_key": KEY, "max_retries": 0, "timeout": 120}
ASKED = {"model": MODEL, "messages": USER, "temperature": 0, "max_tokens": 80, "max_retries": 0}
MODES = (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA)


class Visit(BaseModel):
    city: Literal["Paris", "Oslo"]
    days: int = Field(ge=1, le=9)


@check("response_model in the modes TOOLS, TOOLS_STRICT and JSON_SCHEMA")
def modes() -> None:
    for mode in MODES:
        client = instructor.from_openai(openai.OpenAI(**SETTINGS), mode=mode)
        found = client.chat.completions.create(**ASKED, response_model=Visit)
        assert isinstance(found, Visit), mode


@check("create_partial, streamed")
def partial() -> None:
    for mode in MODES[::2]:
        client = instructor.from_openai(openai.OpenAI(**SETTINGS), mode=mode)
        *_, last = client.chat.completions.create_partial(**ASKED, response_model=Visit)
        Visit.model_validate(last.model_dump())


@check("create_iterable, streamed")
def several() -> None:
    client = instructor.from_openai(openai.OpenAI(**SETTINGS), mode=instructor.Mode.TOOLS)
    found = []
    # How many there are is the model's choice: two will do.
    for each in client.chat.completions.create_iterable(**{**ASKED, "max_tokens": 200}, response_model=Visit):
        found.append(each)
        if len(found) == 2:
            break
    assert found
    assert all(isinstance(each, Visit) for each in found)


@check("the asynchronous client")
async def asynchronous() -> None:
    client = instructor.from_openai(openai.AsyncOpenAI(**SETTINGS), mode=instructor.Mode.JSON_SCHEMA)
    assert isinstance(await client.chat.completions.create(**ASKED, response_model=Visit), Visit)


main("instructor", "openai")
