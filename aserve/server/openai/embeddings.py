"""``POST /v1/embeddings``: the final hidden state of each input's last token, as a unit vector."""

from __future__ import annotations

import base64
import time
from contextlib import closing
from typing import Any, ClassVar, Literal

import numpy as np
import orjson
from quart import Blueprint, Response

from aserve.engine import pooling
from aserve.errors import InvalidRequestError
from aserve.messages.inputs import OutputKind, PoolingParams, RequestOptions
from aserve.messages.outputs import EmbeddingRequestOutput
from aserve.server.openai import generation, prompts
from aserve.server.openai.models import served_model
from aserve.server.openai.protocol import MAX_PROMPTS, Body, Bool, Float, Int, PositiveInt, read
from aserve.server.service import log_client_id, new_id, service

blueprint = Blueprint("embeddings", __name__)


class EmbeddingBody(Body):
    most: ClassVar[dict[str, int]] = {"input": MAX_PROMPTS}
    ids = "input"

    model: str
    input: Any
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: PositiveInt | None = None
    truncate_prompt_tokens: PositiveInt | None = None
    add_special_tokens: Bool = True
    priority: Int = 0
    timeout: Float | None = None
    cache_salt: str | None = None
    # Without effect.
    user: Any = None
    additional_data: Any = None
    input_type: Any = None


@blueprint.post("/v1/embeddings")
async def create_embeddings() -> Response:
    body = await read(EmbeddingBody)
    engine = await service().ready_engine()
    model = served_model(engine, body.model)
    params = PoolingParams(dimensions=body.dimensions)
    options = RequestOptions(body.priority, body.timeout, body.cache_salt)
    items = prompts.split(body.input, "input")
    await engine.check_room()
    longest = engine.model_config.max_model_len
    asked = await prompts.tokenise_all(
        engine,
        items,
        add_special_tokens=body.add_special_tokens,
        truncate=body.truncate_prompt_tokens,
        want_text=False,
        param="input",
    )
    most = max(len(prompt.ids) for prompt in asked)
    if most > longest:
        raise InvalidRequestError(
            f"the model's context holds {longest} tokens and an input has {most}; "
            "truncate_prompt_tokens keeps an input's last tokens",
            param="input",
        )
    request_id = new_id("embd")
    log_client_id(request_id)
    kind = OutputKind.FINAL_ONLY
    streams = await generation.submit(engine, request_id, asked, [params] * len(asked), kind, options)
    with closing(streams):
        results = [pooling.checked(output) for output in await streams.finals()]
    data = [
        {"object": "embedding", "index": index, "embedding": _shown(result, body.encoding_format)}
        for index, result in enumerate(results)
    ]
    count = sum(len(prompt.ids) for prompt in asked)
    answer = {
        "id": request_id,
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": data,
        "usage": {"prompt_tokens": count, "total_tokens": count, "completion_tokens": 0},
    }
    return Response(orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY), content_type="application/json")


def _shown(result: EmbeddingRequestOutput, form: str) -> Any:
    """The vector as numbers, or as little-endian float32 in base64."""
    vector = np.array(result.outputs.embedding, dtype="<f4")
    return vector if form == "float" else base64.b64encode(vector.tobytes()).decode()
