"""Print a completion as it is generated, by plain HTTP: `python examples/stream_client.py [PROMPT]`.

ASERVE_URL names the server; the default is http://127.0.0.1:8000.
"""

import asyncio
import json
import os
import sys
import time

import httpx

URL = os.environ.get("ASERVE_URL", "http://127.0.0.1:8000")


async def main() -> None:
    prompt = sys.argv[1] if len(sys.argv) > 1 else "Once upon a time"
    async with httpx.AsyncClient(base_url=URL, timeout=None) as client:
        models = (await client.get("/v1/models")).raise_for_status().json()
        body = {
            "model": models["data"][0]["id"],
            "prompt": prompt,
            "max_tokens": 64,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        started = time.perf_counter()
        print(prompt, end="", flush=True)
        async with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    raise SystemExit(event["error"]["message"])
                for choice in event["choices"]:
                    print(choice["text"], end="", flush=True)
                if event.get("usage"):
                    tokens = event["usage"]["completion_tokens"]
                    print(f"\n\n{tokens} tokens in {time.perf_counter() - started:.2f} s")


if __name__ == "__main__":
    asyncio.run(main())
