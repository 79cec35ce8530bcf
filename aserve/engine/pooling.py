"""The end of a request whose result is a vector."""

from __future__ import annotations

import numpy as np

from aserve.core.sequence import SequenceGroup
from aserve.errors import InvalidRequestError
from aserve.messages.inputs import PoolingParams
from aserve.messages.outputs import EmbeddingOutput, EmbeddingRequestOutput


def embedding_of(group: SequenceGroup, vector: np.ndarray) -> EmbeddingRequestOutput:
    """What the caller of ``group`` gets for its final hidden state, float32 ``[H]``."""
    return EmbeddingRequestOutput(
        group.request_id,
        EmbeddingOutput(finish(vector, group.pooling or PoolingParams()).tolist()),
        group.prompt_token_ids,
        num_cached_tokens=group.num_cached_tokens,
    )


def finish(vector: np.ndarray, params: PoolingParams) -> np.ndarray:
    """``vector`` cut and scaled as ``params`` say, float32; a vector of zeros stays one."""
    kept = vector[: params.dimensions].astype(np.float64)
    length = float(np.linalg.norm(kept))
    if params.normalize and length > 0.0:
        kept /= length
    return kept.astype(np.float32)


def checked(output: object) -> EmbeddingRequestOutput:
    """The output of a request that was asked for a vector.

    Raises InvalidRequestError if it ended without one: its prompt could never be computed.
    """
    if not isinstance(output, EmbeddingRequestOutput):
        raise InvalidRequestError("the prompt is too long for this engine", param="prompt")
    return output
