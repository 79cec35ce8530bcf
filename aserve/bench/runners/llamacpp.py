"""llama.cpp over a GGUF file through its C interface. Arguments: FILE THREADS [LOGITS_FOLDER].

Prompts are decoded together in batches of 512 tokens, then one token of every sequence a call, greedy by
numpy's argmax: what ``llama-batched-bench`` does. With a folder, writes the logits of the documents'
token ids that it holds (``ids.json``) there and ends.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from aserve.bench.runners import wire

BATCH = 512


class Model:
    """One context of ``sequences`` sequences that share ``tokens`` cells."""

    def __init__(self, file: str, threads: int) -> None:
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), params)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {file}")
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.threads = threads
        self.context: Any = None

    def open(self, sequences: int, tokens: int) -> None:
        if self.context is not None:
            llama_cpp.llama_free(self.context)
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = max(512, sequences * tokens)
        params.n_batch = params.n_ubatch = BATCH
        params.n_seq_max = sequences
        params.n_threads = params.n_threads_batch = self.threads
        params.kv_unified = sequences > 1
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context")

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """tokens: (id, position, sequence, whether its logits are wanted), at most BATCH of them."""
        batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = int(wanted)
        status = llama_cpp.llama_decode(self.context, batch)
        llama_cpp.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode: {status}")

    def logits(self, index: int) -> np.ndarray:
        """Logits of the token at ``index`` of the last batch, float32 ``[vocab]``; valid until the next."""
        pointer = llama_cpp.llama_get_logits_ith(self.context, index)
        return np.ctypeslib.as_array(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_float)), (self.vocab_size,))


def run(model: Model, n: int, input_len: int, output_len: int) -> dict[str, Any]:
    model.open(n, input_len + output_len)
    prompts = [wire.prompt_ids(i, input_len, model.vocab_size) for i in range(n)]
    started = time.perf_counter()
    waiting = [
        (token, position, sequence, position == input_len - 1)
        for sequence, prompt in enumerate(prompts)
        for position, token in enumerate(prompt)
    ]
    last = [0] * n
    for at in range(0, len(waiting), BATCH):
        piece = waiting[at : at + BATCH]
        model.decode(piece)
        for i, (_, _, sequence, wanted) in enumerate(piece):
            if wanted:
                last[sequence] = int(model.logits(i).argmax())
    first = time.perf_counter()
    for step in range(output_len - 1):
        model.decode([(token, input_len + step, sequence, True) for sequence, token in enumerate(last)])
        last = [int(model.logits(i).argmax()) for i in range(n)]
    ended = time.perf_counter()
    result: dict[str, Any] = {
        "seconds": ended - started,
        "prefill_seconds": first - started,
        "output_tokens": n * output_len,
    }
    if output_len > 1:
        result["decode_seconds"] = (ended - first) / (output_len - 1)
    return result


def write_logits(model: Model, folder: Path) -> None:
    """``<i>.npy``, float32 ``[tokens, vocab]``, for each list of ids in the folder's ``ids.json``."""
    for number, ids in enumerate(json.loads((folder / "ids.json").read_text())):
        model.open(1, len(ids))
        rows = np.empty((len(ids), model.vocab_size), np.float32)
        for at in range(0, len(ids), BATCH):
            piece = ids[at : at + BATCH]
            model.decode([(token, at + i, 0, True) for i, token in enumerate(piece)])
            for i in range(len(piece)):
                rows[at + i] = model.logits(i)
        np.save(folder / f"{number}.npy", rows)


def start() -> tuple[dict[str, Any], dict[str, wire.Handler]]:
    model = Model(sys.argv[1], int(sys.argv[2]))
    facts = {
        "system": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})",
        "build": llama_cpp.llama_print_system_info().decode(),
    }
    return facts, {"run": lambda **sizes: run(model, **sizes)}


if __name__ == "__main__":
    if len(sys.argv) > 3:
        write_logits(Model(sys.argv[1], int(sys.argv[2])), Path(sys.argv[3]))
    else:
        wire.serve(start)
