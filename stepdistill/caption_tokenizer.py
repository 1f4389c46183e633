"""A CLIP tokenizer whose words are those of the captions, written as the two files that every version reads."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"


def write_tokenizer(folder: Path, captions: Iterable[str], tokens: int) -> None:
    """Write ``vocab.json``, ``merges.txt`` and the settings of a ``CLIPTokenizer`` into the new ``folder``.

    Every word of ``captions`` is one token; any other text falls apart into bytes.  Saving a tokenizer object would
    write the one file of its transformers version, which others may not read.

    Args:
        folder: where to; created.
        captions: texts of lower-case words.
        tokens: the length that prompts are padded to and cut at, both ends included.
    """
    merges = _merges(sorted({word for text in captions for word in text.split()}))
    letters = byte_letters()
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    folder.mkdir(parents=True)
    _write_json(folder / "vocab.json", {piece: k for k, piece in enumerate(pieces)})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]) + "\n")
    _write_json(folder / "special_tokens_map.json", special)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": tokens, "do_lower_case": True}
    _write_json(
        folder / "tokenizer_config.json", {**settings, "add_prefix_space": False, "errors": "replace"} | special
    )


def _merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merges that build every word from its front, one letter at a time; each pair once."""
    pairs: dict[tuple[str, str], None] = {}
    for word in words:
        letters = [*word[:-1], f"{word[-1]}</w>"]
        for k in range(1, len(letters)):
            pairs["".join(letters[:k]), letters[k]] = None
    return list(pairs)


def byte_letters() -> list[str]:
    """The 256 printable letters that stand for bytes in byte-level BPE (GPT-2, CLIP)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + k) for k in range(len(hidden))]


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
