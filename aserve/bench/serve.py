"""``aserve bench serve``: load a running OpenAI-compatible server and time its streams."""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aserve.bench import datasets, metrics
from aserve.bench.client import Answer, Client
from aserve.errors import ConfigError

INFINITE = float("inf")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aserve bench serve", description=__doc__, allow_abbrev=False)
    server = parser.add_argument_group("Server")
    server.add_argument(
        "--base-url", help="Address of the server, such as http://host:8000; instead of --host and --port."
    )
    server.add_argument("--host", default="127.0.0.1", help="Host name. (default: 127.0.0.1)")
    server.add_argument("--port", type=int, default=8000, help="Port. (default: 8000)")
    server.add_argument(
        "--endpoint",
        default="/v1/completions",
        help="Path to post to; one ending in chat/completions gets chat messages. (default: /v1/completions)",
    )
    server.add_argument("--model", help="Model name to ask for. (default: the server's first)")
    server.add_argument(
        "--tokenizer",
        help="Tokenizer, for token ids sent as text (chat, sharegpt): a path or a packaged model's name. "
        "(default: --model)",
    )
    server.add_argument(
        "--ready-check-timeout-sec",
        type=float,
        default=0.0,
        help="Wait this long for the server to answer. (default: 0, which asks once)",
    )
    data = parser.add_argument_group("Prompts")
    data.add_argument("--dataset-name", choices=["random", "custom", "sharegpt"], default="random")
    data.add_argument("--dataset-path", help="File of the custom (JSON Lines) or sharegpt (JSON) prompts.")
    data.add_argument("--num-prompts", type=int, default=1000, help="(default: 1000)")
    data.add_argument("--seed", type=int, default=0, help="Of prompts, lengths and arrivals. (default: 0)")
    data.add_argument("--disable-shuffle", action="store_true", help="Take a file's prompts in its order.")
    data.add_argument("--random-input-len", type=int, default=1024, help="(default: 1024)")
    data.add_argument("--random-output-len", type=int, default=128, help="(default: 128)")
    data.add_argument(
        "--random-range-ratio",
        type=float,
        default=0.0,
        help="Lengths vary by this share of the length, both ways. (default: 0)",
    )
    data.add_argument(
        "--random-token-range",
        default="100:40000",
        metavar="LOW:HIGH",
        help="Token ids that random prompts are made of, HIGH excluded. (default: 100:40000)",
    )
    data.add_argument("--custom-output-len", type=int, help="Output tokens to ask for; else each line's own.")
    data.add_argument("--sharegpt-output-len", type=int, help="The same for sharegpt.")
    load = parser.add_argument_group("Load")
    load.add_argument(
        "--request-rate",
        type=float,
        default=INFINITE,
        help="Requests per second; inf sends all at once. (default: inf)",
    )
    load.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        help="Shape of the gamma distribution of the gaps: 1 is a Poisson process, less comes in bursts, "
        "more comes evenly. (default: 1)",
    )
    load.add_argument("--max-concurrency", type=int, help="Most requests at a time. (default: no limit)")
    load.add_argument("--ignore-eos", action="store_true", help="Generate the full length.")
    load.add_argument("--temperature", type=float, default=0.0, help="(default: 0, greedy)")
    load.add_argument(
        "--num-warmups", type=int, default=1, help="Requests sent before, one by one, uncounted. (default: 1)"
    )
    results = parser.add_argument_group("Results")
    results.add_argument(
        "--percentile-metrics",
        default="ttft,tpot,itl",
        help="Of ttft, tpot, itl, e2el. (default: all but e2el)",
    )
    results.add_argument("--metric-percentiles", default="99", help="Such as 50,90,99. (default: 99)")
    results.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="Also count the requests that keep within these limits, such as ttft:200 tpot:50.",
    )
    results.add_argument("--save-result", action="store_true", help="Write the result as JSON.")
    results.add_argument("--save-detailed", action="store_true", help="With every request's own times.")
    results.add_argument("--result-dir", default=".", help="(default: the current directory)")
    results.add_argument("--result-filename", help="(default: made of rate, model and time)")
    results.add_argument("--disable-tqdm", action="store_true", help="No progress bar.")
    return parser


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    chosen = metrics.parse_metrics(options.percentile_metrics)
    percentiles = metrics.parse_percentiles(options.metric_percentiles)
    goodput = metrics.parse_goodput(options.goodput)
    _check(options)
    try:
        result = asyncio.run(_measure(options, chosen, percentiles, goodput))
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        print(f"aserve bench serve: no usable server: {error}", file=sys.stderr)
        return 1
    print(
        metrics.block(
            result,
            chosen,
            percentiles,
            max_concurrency=options.max_concurrency,
            request_rate=options.request_rate,
        )
    )
    for message in dict.fromkeys(result["errors"]):
        print(f"failed: {message}", file=sys.stderr)
    if options.save_result or options.save_detailed:
        print(f"saved: {_save(options, result)}")
    return 0 if result["completed"] else 1


def _check(options: argparse.Namespace) -> None:
    for name in ("num_prompts", "random_input_len", "random_output_len"):
        if getattr(options, name) < 1:
            raise ConfigError(f"must be at least 1, got {getattr(options, name)}", param=name)
    for name in ("custom_output_len", "sharegpt_output_len", "max_concurrency"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}", param=name)
    for name in ("request_rate", "burstiness"):
        if not getattr(options, name) > 0:
            raise ConfigError(f"{name} must be above 0, got {getattr(options, name)}", param=name)
    if options.dataset_name != "random" and not options.dataset_path:
        raise ConfigError(f"dataset {options.dataset_name!r} needs --dataset-path", param="dataset_path")


async def _measure(
    options: argparse.Namespace,
    chosen: Sequence[str],
    percentiles: Sequence[float],
    goodput: dict[str, float],
) -> dict[str, Any]:
    key = os.environ.get("OPENAI_API_KEY") or os.environ.get("ASERVE_API_KEY")
    client = Client(
        options.base_url or f"http://{options.host}:{options.port}",
        {"Authorization": f"Bearer {key}"} if key else {},
    )
    try:
        models = await wait_for(client, options.ready_check_timeout_sec)
        model = options.model or models["data"][0]["id"]
        chat = options.endpoint.endswith("chat/completions")
        requests = _requests(options, model, chat)
        payloads = [
            payload(request, model, chat, ignore_eos=options.ignore_eos, temperature=options.temperature)
            for request in requests
        ]
        for index in range(options.num_warmups):
            first = await client.stream(options.endpoint, payloads[index % len(payloads)])
            if first.error is not None:
                raise ValueError(f"the first request failed: {first.error}")
        answers, seconds = await run(
            client,
            options.endpoint,
            payloads,
            gaps=arrival_gaps(len(payloads), options.request_rate, options.burstiness, options.seed),
            max_concurrency=options.max_concurrency,
            progress=not options.disable_tqdm,
        )
    finally:
        client.close()
    for answer, request in zip(answers, requests, strict=True):
        answer.prompt_tokens = answer.prompt_tokens or request.prompt_tokens
    result: dict[str, Any] = {
        "date": datetime.datetime.now().strftime("%Y%m%d-%H%M%S"),
        "endpoint": options.endpoint,
        "model_id": model,
        "num_prompts": options.num_prompts,
        "request_rate": "inf" if options.request_rate == INFINITE else options.request_rate,
        "burstiness": options.burstiness,
        "max_concurrency": options.max_concurrency,
    }
    result |= metrics.summary(answers, seconds, metrics=chosen, percentiles=percentiles, goodput=goodput)
    result["errors"] = [answer.error for answer in answers if answer.error is not None]
    if options.save_detailed:
        result["input_lens"] = [answer.prompt_tokens for answer in answers]
        result["output_lens"] = [answer.output_tokens for answer in answers]
        result["ttfts"] = [answer.ttft for answer in answers]
        result["itls"] = [answer.itl for answer in answers]
        result["start_times"] = [answer.start for answer in answers]
    return result


def _requests(options: argparse.Namespace, model: str, chat: bool) -> list[datasets.Request]:
    count, seed, shuffle = options.num_prompts, options.seed, not options.disable_shuffle
    if options.dataset_name == "custom":
        requests = datasets.custom_requests(
            options.dataset_path, count, options.custom_output_len, seed, shuffle
        )
    elif options.dataset_name == "sharegpt":
        requests = datasets.sharegpt_requests(
            options.dataset_path,
            count,
            options.sharegpt_output_len,
            seed,
            shuffle,
            _tokenizer(options, model),
        )
    else:
        requests = datasets.random_requests(
            count,
            options.random_input_len,
            options.random_output_len,
            options.random_range_ratio,
            seed,
            _token_range(options.random_token_range),
        )
    if chat and not all(isinstance(request.prompt, str) for request in requests):
        return datasets.as_text(requests, _tokenizer(options, model))
    return requests


def _token_range(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    if not (low.isdecimal() and high.isdecimal() and int(low) < int(high)):
        raise ConfigError(f"expected LOW:HIGH, got {text!r}", param="random_token_range")
    return int(low), int(high)


def _tokenizer(options: argparse.Namespace, model: str) -> Any:
    from aserve import packaged
    from aserve.tokenizer.loader import load_tokenizer

    name = options.tokenizer or model
    return load_tokenizer(packaged.resolve(name) or name)


def payload(
    request: datasets.Request, model: str, chat: bool, *, ignore_eos: bool, temperature: float = 0.0
) -> dict[str, Any]:
    """The body that asks for one request's tokens as a stream that ends with its usage."""
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": request.output_tokens,
        "temperature": temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if ignore_eos:
        body["ignore_eos"] = True
    if chat:
        body["messages"] = [{"role": "user", "content": request.prompt}]
    else:
        body["prompt"] = request.prompt
    return body


async def wait_for(client: Client, seconds: float) -> Any:
    """The server's list of models. OSError or ValueError: none within ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return await client.get("/v1/models")
        except (OSError, ValueError):
            if time.monotonic() >= deadline:
                raise
        await asyncio.sleep(0.2)


def arrival_gaps(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds to wait before each request: gamma distributed with mean ``1 / rate``."""
    if rate == INFINITE:
        return [0.0] * count
    draw = random.Random(f"arrivals {seed}")
    return [draw.gammavariate(burstiness, 1 / (rate * burstiness)) for _ in range(count)]


async def run(
    client: Client,
    endpoint: str,
    payloads: Sequence[dict[str, Any]],
    *,
    gaps: Sequence[float],
    max_concurrency: int | None = None,
    progress: bool = False,
) -> tuple[list[Answer], float]:
    """Sends every payload after its gap, at most ``max_concurrency`` at a time; answers and total seconds.

    A request that waits for its turn has not started: its times count from when it is sent.
    """
    turns = asyncio.Semaphore(max_concurrency or len(payloads))
    bar = _bar(len(payloads)) if progress else None

    async def one(body: dict[str, Any]) -> Answer:
        async with turns:
            answer = await client.stream(endpoint, body)
        if bar is not None:
            bar.update(1)
        return answer

    started = time.perf_counter()
    due = started
    tasks = []
    for body, gap in zip(payloads, gaps, strict=True):
        due += gap
        if gap and (wait := due - time.perf_counter()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.ensure_future(one(body)))
    answers = list(await asyncio.gather(*tasks))
    seconds = time.perf_counter() - started
    if bar is not None:
        bar.close()
    return answers, seconds


def _bar(total: int) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, dynamic_ncols=True)


def _save(options: argparse.Namespace, result: dict[str, Any]) -> Path:
    name = options.result_filename
    if name is None:
        model = str(result["model_id"]).rsplit("/", 1)[-1]
        name = f"{result['request_rate']}qps-{model}-{result['date']}.json"
    path = Path(options.result_dir, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return path
