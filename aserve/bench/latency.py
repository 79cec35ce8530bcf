"""``aserve bench latency``: the time one batch takes from prompt to last token, in this process."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from aserve.bench import offline

OPTIONS = {
    "input_len": (32, "Tokens of each prompt."),
    "output_len": (128, "Tokens to generate for each sequence."),
    "batch_size": (8, "Prompts in the batch."),
    "n": (1, "Sequences for each prompt."),
    "num_iters_warmup": (10, "Runs before the timed ones."),
    "num_iters": (30, "Timed runs."),
}

PERCENTILES = (10, 25, 50, 75, 90, 99)


def main(argv: list[str]) -> int:
    options = offline.parse("aserve bench latency", __doc__, OPTIONS, argv)

    def once() -> float:
        return offline.generate(
            llm,
            options.batch_size,
            options.input_len,
            options.output_len,
            n=options.n,
            seed=options.seed,
        )[0]

    with offline.open_llm(options) as llm:
        offline.check_fits(llm, options.input_len, options.output_len)
        for _ in tqdm(range(options.num_iters_warmup), desc="Warmup iterations"):
            once()
        latencies = [once() for _ in tqdm(range(options.num_iters), desc="Profiling iterations")]
    percentiles = {p: float(np.percentile(latencies, p)) for p in PERCENTILES}
    average = float(np.mean(latencies))
    print(f"Avg latency: {average} seconds")
    for percentage, value in percentiles.items():
        print(f"{percentage}% percentile latency: {value} seconds")
    offline.save(
        options.output_json,
        {
            "avg_latency": average,
            "latencies": latencies,
            "percentiles": {str(p): value for p, value in percentiles.items()},
        },
    )
    return 0
