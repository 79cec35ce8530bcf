"""Generate for a list of prompts in this process: `python examples/offline.py [MODEL]`."""

import sys

from aserve import LLM, SamplingParams


def main() -> None:
    prompts = [
        "The capital of France is",
        "Water boils at",
        "The three primary colours are",
    ]
    params = SamplingParams(temperature=0.0, max_tokens=16)
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "smollm2")
    for output in llm.generate(prompts, params):
        print(f"{output.prompt!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
