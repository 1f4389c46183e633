"""What the documents show runs."""

import re
from pathlib import Path
from typing import Any

import torch

TRAINING = Path(__file__).parent.parent / "training/README.md"


def test_a_network_of_your_own_is_distilled_as_the_document_says():
    code = re.search(r"## A network of your own.*?```python\n(.*?)```", TRAINING.read_text(), re.DOTALL)
    assert code is not None
    space: dict[str, Any] = {}
    exec(code[1], space)
    samples = space["samples"]
    assert samples.shape == (16, 2)
    assert torch.isfinite(samples).all()
    assert space["trainer"].progress.step == 20
