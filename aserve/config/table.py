"""Every argument as Markdown tables, for the README: ``python -m aserve.config.table``."""

from __future__ import annotations

from aserve.args import AsyncEngineArgs, ServerArgs
from aserve.config.cli import Declared, declared, default_text
from aserve.config.unbuilt import unbuilt_note


def render() -> str:
    """One table per group of arguments, the server's first: flag, default, meaning."""
    groups: dict[str, list[Declared]] = {}
    for item in declared(ServerArgs) + declared(AsyncEngineArgs):
        groups.setdefault(item.arg.group, []).append(item)
    return "\n\n".join(_table(title, items) for title, items in groups.items()) + "\n"


def _table(title: str, items: list[Declared]) -> str:
    lines = [f"**{title}**", "", "| flag | default | meaning |", "|---|---|---|"]
    for item in items:
        flags = ", ".join(f"`{flag}`" for flag in item.flags)
        lines.append(f"| {flags} | {_cell(default_text(item))} | {_cell(_meaning(item))} |")
    return "\n".join(lines)


def _meaning(item: Declared) -> str:
    sentences = [item.arg.help]
    choices = item.arg.choice_list()
    if choices is not None:
        sentences.append(f"One of {', '.join(f'`{choice}`' for choice in choices)}.")
    sentences.append(unbuilt_note(item.name))
    return " ".join(sentence for sentence in sentences if sentence)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    print(render(), end="")
