"""What the documents show runs."""

import re
from pathlib import Path
from typing import Any

import pytest

from stepdistill.__main__ import main

TRAINING = Path(__file__).parent.parent / "training/README.md"


def test_a_network_of_your_own_is_distilled_as_the_document_says(tmp_path, monkeypatch):
    section = re.search(r"## A network of your own.*?\n## ", TRAINING.read_text(), re.DOTALL)
    assert section is not None
    blocks = re.findall(r"```(python)?\n(.*?)```", section[0], re.DOTALL)
    (mine, use), commands = ([code for kind, code in blocks if kind == wanted] for wanted in ("python", ""))
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(mine)
    for words in (line.split() for line in commands[0].splitlines()):
        fast = ["training.trackers=[]", "training.batch_size=4"] if words[1] == "distill" else ["--count", "2"]
        with pytest.raises(SystemExit) as stopped:
            main([*words[1:], *fast])
        assert stopped.value.code == 0
    assert len(list(tmp_path.glob("runs/*_images/*.png"))) == 4
    space: dict[str, Any] = {}
    exec(mine + use, space)
    assert space["samples"].shape == (16, 1, 8, 8)
