"""``aserve bench throughput``: tokens per second of many prompts given at once, in this process."""

from __future__ import annotations

from aserve.bench import offline

OPTIONS = {
    "input_len": (1024, "Tokens of each prompt."),
    "output_len": (128, "Tokens to generate for each sequence."),
    "num_prompts": (1000, "Prompts."),
    "n": (1, "Sequences for each prompt."),
}


def main(argv: list[str]) -> int:
    options = offline.parse("aserve bench throughput", __doc__, OPTIONS, argv)
    with offline.open_llm(options) as llm:
        offline.check_fits(llm, options.input_len, options.output_len)
        offline.generate(llm, 1, options.input_len, 2)  # first use of every kernel
        seconds, outputs = offline.generate(
            llm,
            options.num_prompts,
            options.input_len,
            options.output_len,
            n=options.n,
            seed=options.seed,
            progress=True,
        )
    output_tokens = offline.count_tokens(outputs)
    prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    total = output_tokens + prompt_tokens
    print(
        f"Throughput: {len(outputs) / seconds:.2f} requests/s, {total / seconds:.2f} total tokens/s, "
        f"{output_tokens / seconds:.2f} output tokens/s"
    )
    print(f"Total num prompt tokens:  {prompt_tokens}")
    print(f"Total num output tokens:  {output_tokens}")
    offline.save(
        options.output_json,
        {
            "elapsed_time": seconds,
            "num_requests": len(outputs),
            "total_num_tokens": total,
            "requests_per_second": len(outputs) / seconds,
            "tokens_per_second": total / seconds,
            "output_tokens_per_second": output_tokens / seconds,
        },
    )
    return 0
