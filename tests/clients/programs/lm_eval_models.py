"""lm-eval's local-completions and local-chat-completions, on tasks of its own kind with local data."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from kit import BASE, MODEL, WORK, check, main

os.environ.setdefault("HF_HOME", str(WORK / "huggingface"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import requests
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

QUESTIONS = [
    ("The capital of France is", ["Paris", "banana", "seventeen"], 0),
    ("The sun rises in the", ["shoe", "east", "carpet of numbers"], 1),
    ("Two plus two equals", ["purple", "window", "four"], 2),
    ("Water freezes and turns into", ["ice", "a trumpet", "Tuesday"], 0),
    ("The opposite of hot is", ["bicycle", "cold", "parliament"], 1),
]
TEXTS = ["The quick brown fox jumps over the lazy dog.", "Bread is made of flour, water and yeast. " * 20]

CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
num_fewshot: 0
metric_list: [{{metric: acc}}]
"""
GENERATE = """
task: local_generate
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[answer]}}}}"
generation_kwargs: {{until: ["\\n\\n", "."], max_gen_toks: 12, do_sample: false}}
num_fewshot: 0
metric_list:
  - metric: exact_match
    ignore_case: true
filter_list:
  - name: first
    filter: [{{function: regex, regex_pattern: "(\\\\w+)"}}, {{function: take_first}}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


def tasks() -> TaskManager:
    """The tasks, written where their data is."""
    folder = WORK / "tasks"
    folder.mkdir(exist_ok=True)
    for name, text in (("choice", CHOICE), ("generate", GENERATE), ("rolling", ROLLING)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    questions = [dict(zip(("question", "choices", "answer"), each, strict=True)) for each in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    return TaskManager(include_path=str(folder), include_defaults=False)


def evaluate(model: str, path: str, task: str, **values: Any) -> tuple[dict[str, Any], list[Any]]:
    settings = {"base_url": BASE + path, "model": MODEL, "num_concurrent": 4, "max_retries": 1, **values}
    chat = model == "local-chat-completions"
    found = simple_evaluate(
        model=model, model_args=settings, tasks=[task], task_manager=tasks(), apply_chat_template=chat,
        batch_size=1 if chat else 2, log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    return found["results"][task], found["samples"][task]


def log_likelihood(prompt: str, rest: str) -> float:
    """What the server gives ``rest`` after ``prompt``, asked for by itself."""

    def ids(text: str) -> list[int]:
        body = {"model": MODEL, "prompt": text, "add_special_tokens": False}
        found: list[int] = requests.post(BASE.removesuffix("/v1") + "/tokenize", json=body).json()["tokens"]
        return found

    body = {"model": MODEL, "prompt": ids(prompt + rest), "max_tokens": 0, "echo": True, "logprobs": 1}
    logprobs = requests.post(BASE + "/completions", json=body).json()["choices"][0]["logprobs"]
    return sum(logprobs["token_logprobs"][len(ids(prompt)) :])


@check("local-completions: loglikelihood of a multiple-choice task, tokens by the server")
def choice() -> None:
    results, samples = evaluate("local-completions", "/completions", "local_choice")
    assert results["acc,none"] == 1, results
    for sample in samples:
        for (prompt, rest), answer in zip(
            (each.values() for each in sample["arguments"].values())
            if isinstance(sample["arguments"], dict)
            else sample["arguments"],
            sample["resps"],
            strict=True,
        ):
            found, greedy = answer[0]
            assert math.isclose(float(found), log_likelihood(prompt, rest), abs_tol=1e-4), (prompt, rest)
            assert str(greedy) in ("True", "False")


@check("local-completions: rolling loglikelihood")
def rolling() -> None:
    results, _ = evaluate("local-completions", "/completions", "local_rolling", max_length=128)
    assert 0 < results["bits_per_byte,none"] < 3, results


@check("local-completions: generation")
def generate() -> None:
    results, samples = evaluate("local-completions", "/completions", "local_generate")
    assert results["exact_match,first"] > 0, samples
    assert all(sample["resps"][0][0] for sample in samples), samples


@check("local-chat-completions: generation")
def chat() -> None:
    _, samples = evaluate("local-chat-completions", "/chat/completions", "local_generate")
    assert len(samples) == len(QUESTIONS)
    assert all(sample["resps"][0][0] for sample in samples), samples


main("lm-eval")
