"""Chat in the terminal through the openai client: `python examples/chat.py`; an empty line ends it.

ASERVE_URL names the server (default http://127.0.0.1:8000), ASERVE_API_KEY its key if it wants one.
"""

import os

from openai import OpenAI


def main() -> None:
    url = os.environ.get("ASERVE_URL", "http://127.0.0.1:8000")
    client = OpenAI(base_url=url + "/v1", api_key=os.environ.get("ASERVE_API_KEY", "none"))
    model = client.models.list().data[0].id
    messages = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            break
        if not question:
            break
        messages.append({"role": "user", "content": question})
        answer = ""
        for chunk in client.chat.completions.create(model=model, messages=messages, stream=True):
            for choice in chunk.choices:
                piece = choice.delta.content or ""
                answer += piece
                print(piece, end="", flush=True)
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
