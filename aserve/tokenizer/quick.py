"""Token ids of short texts, from the pieces that have been seen before.

A byte-level BPE tokenizer cuts a text into pieces, about words, and merges bytes within each. Most of its
time goes into the cutting. With Python's regular expressions that takes less, and the ids of a piece never
change, so they are kept. Where no piece reaches across a space, so are those of the words between spaces: of
a text of known words only the first and the last are cut.

Used only where that is certain to give the ids that the tokenizer gives: BPE without a normalizer, cut by
the usual patterns, with added tokens that match as they are; and for texts of characters on which all
versions of Unicode agree, scripts without spaces left out. Checked by tests against the tokenizer.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterable
from itertools import chain, islice
from typing import Any

LONGEST_TEXT = 4096
"""Characters. The interpreter's lock is held meanwhile: longer texts are the tokenizer's."""

MOST_PIECES = 1 << 16
MOST_NEW = 8
"""Pieces of one text that are looked up one by one; with more of them unknown the tokenizer is quicker."""

LONGEST_PIECE = 32
"""Characters of a piece that is kept."""

MOST_WORDS = 1 << 15
MOST_NEW_WORDS = 8
"""Words of one text that are learned; with more of them unknown it is cut as a whole."""

LONGEST_WORD = 48

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""What a byte-level pre-tokenizer cuts by, unless others have cut before it."""

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_DIGITS = (r"\p{N}|[^\p{N}]+", r"\p{N}+|[^\p{N}]+")

_BY_WORDS = (_GPT2, _LLAMA3, _QWEN2)
"""Patterns by which a space begins a piece wherever the character before it is no white space.

What matches up to that character cannot go on with the space, and does not look further. That holds also
where digits have been cut off first: of " 1" the space is left, which then is a piece.
"""

_END = 0x2100
"""Behind the general punctuation; East Asian scripts come later."""


def _kinds() -> dict[str, str]:
    """The characters that are known, by what patterns tell apart: L, N, s (white space), and O for others.

    Left out are those that Unicode has added or moved since version 3.2, and those that a pattern without
    regard to case may take for an ASCII letter.
    """
    found = {"L": [], "N": [], "s": [], "O": []}  # type: dict[str, list[str]]
    for code in range(_END):
        character = chr(code)
        categories = unicodedata.category(character), unicodedata.ucd_3_2_0.category(character)
        kind, old = (
            "s" if category[0] == "Z" or 9 <= code <= 13 or code == 0x85 else category[0]
            for category in categories
        )
        folded = character.casefold() + character.upper()
        like_ascii = code > 127 and re.search("[ -~]", folded) and folded != "ssSS"
        if kind == old and "Cn" not in categories and not like_ascii:
            found[kind if kind in found else "O"].append(character)
    return {kind: "".join(map(re.escape, characters)) for kind, characters in found.items()}


_KINDS = _kinds()
_KNOWN = re.compile("[" + "".join(_KINDS.values()) + "]*").fullmatch


_SETS = {
    r"\s": (False, _KINDS["s"]),
    r"\S": (True, _KINDS["s"]),
    r"\p{L}": (False, _KINDS["L"]),
    r"\p{N}": (False, _KINDS["N"]),
}

Cut = Callable[[str], list[str]]


class QuickEncoder:
    """Ids of texts whose pieces are known."""

    def __init__(
        self,
        backend: Any,
        cuts: list[Cut],
        added: dict[str, int],
        before: list[int],
        after: list[int],
        by_words: bool = False,
    ) -> None:
        self._backend = backend
        self._cuts = cuts
        self._pieces: dict[str, list[int]] = {}
        self._words: dict[str, list[int]] = {}
        self._by_words = by_words and not any(" " in text for text in added)
        self._added = {text: [token_id] for text, token_id in added.items()}
        longest_first = sorted(added, key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")").split if added else None
        self._before, self._after = before, after

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int] | None:
        """What the tokenizer gives for ``text``; None if it has to be asked. From any thread."""
        if len(text) > LONGEST_TEXT:
            return None
        ids = self._ids_by_words(text) if self._by_words else None
        if ids is None:
            ids = self._ids_by_pieces(text)
        if ids is None or not add_special_tokens:
            return ids
        return [*self._before, *ids, *self._after]

    def _ids_by_words(self, text: str) -> list[int] | None:
        start, *between = text.split(" ")
        if not between or start != start.rstrip():
            return None
        end = between.pop()
        words = self._words
        try:
            found = [words[word] for word in between]
        except KeyError:
            new = {word for word in between if word not in words}
            fresh = self._learn_words(islice(new, MOST_NEW_WORDS))
            if len(fresh) < len(new):
                return None
            found = [fresh.get(word) or words[word] for word in between]
        first, last = self._ids_by_pieces(start), self._ids_by_pieces(" " + end)
        if first is None or last is None:
            return None
        return [*first, *chain.from_iterable(found), *last]

    def _learn_words(self, new: Iterable[str]) -> dict[str, list[int]]:
        """Ids of words, of those that can be had so; they are kept."""
        # White space at a word's end may be of one piece with the space behind it, and so may two spaces.
        usual = [word for word in new if word and len(word) <= LONGEST_WORD and word == word.rstrip()]
        made = {word: self._ids_by_pieces(" " + word, learn=False) for word in usual}
        fresh = {word: ids for word, ids in made.items() if ids is not None}
        if len(self._words) + len(fresh) > MOST_WORDS:
            self._words = {}
        self._words.update(fresh)
        return fresh

    def _ids_by_pieces(self, text: str, learn: bool = True) -> list[int] | None:
        if not (text.isascii() or _KNOWN(text)):
            return None
        pieces = self._cut(text)
        if len("".join(pieces)) != len(text):
            return None  # the pattern leaves something between its matches
        known = self._pieces
        try:
            found = [known[piece] for piece in pieces]
        except KeyError:
            if not (learn and self._learn(pieces)):
                return None
            found = [known[piece] for piece in pieces]
        return list(chain.from_iterable(found))

    def _cut(self, text: str) -> list[str]:
        if self._split is None:
            return self._cut_plain(text)
        parts = self._split(text)
        if len(parts) == 1:
            return self._cut_plain(text)
        pieces: list[str] = []
        for place, part in enumerate(parts):
            if place % 2:
                pieces.append(part)
            elif part:
                pieces += self._cut_plain(part)
        return pieces

    def _cut_plain(self, text: str) -> list[str]:
        pieces = [text]
        for cut in self._cuts:
            if len(pieces) == 1:
                pieces = cut(pieces[0])
            else:
                pieces = [each for piece in pieces for each in cut(piece)]
        return pieces

    def _learn(self, pieces: list[str]) -> bool:
        """Asks for the ids of pieces that are new; False if that is not worth it."""
        new = {piece for piece in pieces if piece not in self._pieces}
        if len(self._pieces) + len(new) > MOST_PIECES:
            self._pieces = {}
            return False
        learnt = True
        for count, piece in enumerate(new):
            if count == MOST_NEW or len(piece) > LONGEST_PIECE:
                return False
            ids = self._added.get(piece)
            if ids is None:
                # A piece that is cut otherwise when it stands alone has no ids of its own.
                if self._cut(piece) != [piece]:
                    learnt = False
                    continue
                ids = self._backend.encode(piece, add_special_tokens=False).ids
            self._pieces[piece] = ids
        return learnt


def quick_encoder(backend: Any) -> QuickEncoder | None:
    """A quick encoder beside ``backend``, a ``tokenizers.Tokenizer``; None for a kind that is not known."""
    model = backend.model
    if type(model).__name__ != "BPE" or model.dropout or backend.normalizer is not None:
        return None
    if backend.truncation is not None or backend.padding is not None or backend.pre_tokenizer is None:
        return None
    try:
        pre_tokenizer = json.loads(backend.pre_tokenizer.__getstate__())
    except Exception:  # one that is written in Python has no such form
        return None
    patterns = _patterns(pre_tokenizer)
    if patterns is None:
        return None
    cuts = [cut for pattern in patterns if (cut := _cut_by(pattern)) is not None]
    if len(cuts) != len(patterns):
        return None
    added = backend.get_added_tokens_decoder()
    if len({token.normalized for token in added.values()}) > 1:
        return None  # they are looked for in two passes
    for token in added.values():
        if token.lstrip or token.rstrip or token.single_word or not token.content:
            return None
    plain, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, True))
    places = [at for at in range(len(whole)) if whole[at : at + len(plain)] == plain]
    if len(places) != 1 or not plain:
        return None
    before, after = whole[: places[0]], whole[places[0] + len(plain) :]
    contents = {token.content: token_id for token_id, token in added.items()}
    by_words = bool(patterns) and patterns[-1] in _BY_WORDS and set(patterns[:-1]) <= set(_DIGITS)
    return QuickEncoder(backend, cuts, contents, before, after, by_words)


def _patterns(pre_tokenizer: dict[str, Any]) -> list[str] | None:
    """What the pieces of a text match, step by step; None if that cannot be said."""
    steps = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    # Bytes take the place of characters at the end, and nowhere before.
    if [step["type"] for step in steps].count("ByteLevel") != 1 or steps[-1]["type"] != "ByteLevel":
        return None
    found = []
    for step in steps:
        if step["type"] == "ByteLevel" and not step["use_regex"] and not step["add_prefix_space"]:
            continue  # others have cut
        pattern = _pattern(step)
        if pattern is None:
            return None
        found.append(pattern)
    return found


def _pattern(step: dict[str, Any]) -> str | None:
    """What a step's pieces match."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return _GPT2
    if step["type"] == "Digits":
        return _DIGITS[0] if step["individual_digits"] else _DIGITS[1]
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        regex: str | None = step["pattern"].get("Regex")
        return regex
    return None


def _cut_by(pattern: str) -> Cut | None:
    """All matches of a pattern; None for one of another dialect."""
    translated = translate(pattern)
    if translated is None:
        return None
    try:
        compiled = re.compile(translated)
    except re.error:
        return None
    return compiled.findall


_UNDERSTOOD = re.compile(r"""
      \\[rnt\\'.\[\]]                # the same in both
    | \\s | \\S | \\p\{[LN]\}         # explained below
    | \(\?:  | \(\?i:  | \(\?! | \)    # groups that capture nothing
    | \[\^? | \] | \{\d+(?:,\d*)?\}   # sets, counts
    | [?*+|] (?!\+)                   # no possessive quantifiers
    | [ A-Za-z0-9'/,<>!_-]
    """, re.VERBOSE)  # fmt: skip


def translate(pattern: str) -> str | None:
    """A pattern in the tokenizer's dialect as one in Python's that does the same to known characters.

    None if there is anything in it whose meaning is not known to be the same.
    """
    found, inside, place = [], False, 0
    while place < len(pattern):
        match = _UNDERSTOOD.match(pattern, place)
        if match is None:
            return None
        part, place = match[0], match.end()
        if part in _SETS:
            negated, characters = _SETS[part]
            if inside and negated:
                return None
            part = characters if inside else f"[{'^' if negated else ''}{characters}]"
        elif part.startswith("["):
            if inside:
                return None  # a set within a set
            inside = True
        elif part == "]":
            inside = False
        found.append(part)
    return "".join(found)
