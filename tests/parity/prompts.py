"""Thirty-two varied prompts: registers, scripts, code, numbers, lengths from one token to a few hundred."""

from __future__ import annotations

_STORY = (
    "The lighthouse keeper counted the ships each evening and wrote their names in a book that nobody "
    "had asked him to keep. On clear nights he could see the harbour lights across the bay. "
)

PROMPTS = [
    "Hello",
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\nclass Matrix:\n    def __init__(self, rows, cols):",
    "SELECT name, COUNT(*) FROM orders",
    "1, 1, 2, 3, 5, 8, 13,",
    "Q: What is 17 times 23?\nA:",
    "La ville de Lyon est connue pour",
    "Der schnelle braune Fuchs springt über",
    "El perro corre por el parque y",
    "東京は日本の",
    "Москва является столицей",
    "The emoji 😀 means happy, 😢 means sad, and 🎉 means",
    "Dear Sir or Madam,\n\nI am writing to",
    "Ingredients:\n- 2 cups of flour\n- 1 cup of sugar\n-",
    '{"name": "Alice", "age": 30, "city":',
    "<html>\n<head>\n<title>",
    "BREAKING NEWS: Scientists have discovered",
    "Roses are red,\nViolets are blue,\n",
    "The mitochondria is",
    "To be, or not to be, that is",
    "How do I sort a list in Python?",
    "List three reasons to learn mathematics:\n1.",
    "The chemical symbol for gold is",
    "        leading spaces and\ttabs\n\n\n",
    "a a a a a a a a",
    "ALL CAPITAL LETTERS ARE",
    "User: Hi!\nAssistant: Hello, how can I help?\nUser: Tell me a joke.\nAssistant:",
    _STORY * 2 + "One night,",
    _STORY * 5 + "In the end",
    "Translate to French: 'Good morning, how are you?'",
]

NUM_TOKENS = 64
