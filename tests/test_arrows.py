"""Who may import whom, what the library never does, and how long its files may be."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("stepdistill", "pipelines", "training", "eval", "benchmarks")

SHARED = {"process", "denoiser", "conditions", "samplers"}
ARROWS: dict[str, set[str]] = {
    "process": set(),
    "conditions": set(),
    "denoiser": {"process", "conditions"},
    "samplers": {"process", "conditions", "denoiser"},
    "methods.base": SHARED,
    "methods._shared": SHARED,
    "methods._grid": SHARED | {"methods._shared"},
    "methods._trigflow": SHARED | {"methods._shared"},
    "methods._adversarial": SHARED | {"methods._shared"},
    "methods._score": SHARED | {"methods.base", "methods._shared", "methods._adversarial"},
}
"""All that these modules may import of ours; beside it torch and the standard library, as for the papers."""
PAPER = SHARED | {"methods.base", "methods._shared", "methods._score", "methods._grid", "methods._trigflow"}
WRAPPERS = {"methods.disback", "methods.tscd"}
"""Papers about other papers' methods, which they may import."""
METRICS = {"metrics.frechet", "metrics.digits", "images", "evaluation", "fid"}
"""Metrics, with all of ``stepdistill/metrics``, know of images, and nothing of what made them."""
PICKLED = "stepdistill/metrics/pickled.py"
"""Reads pickles of other tools by an unpickler that runs nothing of them; no other file imports pickle."""
MODELS = {"methods", "trainer", "checkpoints", "distill", "teacher", "train_teacher", "train_text_teacher", "export"}
ACCELERATE = {"trainer", "dry_run", "checkpoints", "distill", "train_teacher", "preflight", "snapshots", "__main__"}


def is_paper(module: str) -> bool:
    return module.startswith("methods.") and module not in ARROWS


def imported(tree: ast.AST, path: str, modules: set[str]) -> Iterator[str]:
    """Absolute dotted names of everything that a file imports, at any depth; of ours, the module itself."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{source}.{alias.name}"
                yield name if name.removeprefix("stepdistill.") in modules else source


def name_of(path: str) -> str:
    """``stepdistill/methods/sid.py`` is ``methods.sid``; a package is its folder."""
    return path.removeprefix("stepdistill/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def broken_arrows(path: str, tree: ast.AST, modules: set[str]) -> Iterator[str]:
    names = set(imported(tree, path, modules))
    roots = {name.partition(".")[0] for name in names}
    others = roots - set(sys.stdlib_module_names) - {"stepdistill"}
    if path.startswith("pipelines/"):
        yield from (
            f"imports {name}" for name in roots - set(sys.stdlib_module_names) - {"torch", "diffusers", "transformers"}
        )
    if not path.startswith("stepdistill/"):
        return
    module, ours = name_of(path), {n.removeprefix("stepdistill.") for n in names if n.startswith("stepdistill.")}
    if module in ARROWS or is_paper(module):
        papers = {name for name in ours if is_paper(name)} if module in WRAPPERS else set()
        yield from (f"imports {name}" for name in ours - papers - ARROWS.get(module, PAPER))
        yield from (f"imports {name}" for name in others - {"torch"})
    if module in METRICS or module.startswith("metrics."):
        yield from (f"a metric imports {name}" for name in ours if name.partition(".")[0] in MODELS)
    if module != "methods" and module not in WRAPPERS:
        yield from (f"imports the method {name}" for name in ours if is_paper(name))
    if module not in ACCELERATE and "accelerate" in roots:
        yield "imports accelerate"
    yield from (f"imports the folder {name}" for name in roots & {*FOLDERS[1:], "tests"})


def forbidden_code(tree: ast.AST) -> Iterator[str]:
    """Constructs that the library does without; ``getattr`` may look a name up in an imported package."""
    packages = {
        alias.asname or alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            if {"pickle", "cPickle", "dill", "cloudpickle"} & set(names):
                yield "imports pickle"
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called == "hasattr" or (called == "getattr" and ast.unparse(node.args[0]) not in packages):
                yield f"line {node.lineno} calls {called}"
            if called == "torch.load" and "weights_only=True" not in map(ast.unparse, node.keywords):
                yield f"line {node.lineno} calls torch.load without weights_only=True"


def violations(sources: dict[str, str]) -> list[str]:
    """One sentence per broken rule in a tree of ``path -> source``."""
    modules = {name_of(path) for path in sources if path.startswith("stepdistill/")}
    found = []
    for path, source in sources.items():
        tree, lines = ast.parse(source), source.count("\n")
        problems = [*broken_arrows(path, tree, modules), *forbidden_code(tree)]
        limit = 200 if is_paper(name_of(path)) else 300
        if path.startswith("stepdistill/") and lines > limit:
            problems.append(f"has {lines} lines, more than {limit}")
        if path == PICKLED:
            problems = [problem for problem in problems if problem != "imports pickle"]
        problems += re.findall(r"\b(?:TODO|FIXME|XXX)\b", source)
        found += [f"{path}: {problem}" for problem in problems]
    return sorted(found)


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    files = [file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py"))]
    return {file.relative_to(ROOT).as_posix(): file.read_text() for file in files}


def test_the_tree_keeps_its_arrows_limits_and_manners(sources):
    assert {"stepdistill/process.py", "stepdistill/methods/sid.py"} <= sources.keys()
    broken = violations(sources)
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("stepdistill/process.py", "from .denoiser import Denoiser", "imports denoiser"),
        ("stepdistill/conditions.py", "from . import process", "imports process"),
        ("stepdistill/denoiser.py", "import stepdistill.samplers", "imports samplers"),
        ("stepdistill/samplers.py", "def f():\n    from .methods import base", "imports methods.base"),
        ("stepdistill/samplers.py", "import numpy.random", "imports numpy"),
        ("stepdistill/methods/_shared.py", "from .base import Batch", "imports methods.base"),
        ("stepdistill/methods/new.py", "from .sid import SiD", "imports methods.sid"),
        ("stepdistill/methods/new.py", "from . import boot", "imports methods.boot"),
        ("stepdistill/methods/_score.py", "from .sid import SiD", "imports methods.sid"),
        ("stepdistill/methods/disback.py", "from ..trainer import Trainer", "imports trainer"),
        ("stepdistill/methods/new.py", "from ..trainer import Trainer", "imports trainer"),
        ("stepdistill/methods/new.py", "from ...training import distill", "imports the folder training"),
        ("stepdistill/methods/new.py", "import diffusers", "imports diffusers"),
        ("stepdistill/trainer.py", "from .methods.sid import SiD", "imports the method methods.sid"),
        ("stepdistill/metrics/digits.py", "from ..methods import AnyMethod", "a metric imports methods"),
        ("stepdistill/fid.py", "from .teacher import load_teacher", "a metric imports teacher"),
        ("stepdistill/export.py", "from accelerate import Accelerator", "imports accelerate"),
        ("stepdistill/export.py", "import training.distill", "imports the folder training"),
        ("stepdistill/export.py", "from eval import fid", "imports the folder eval"),
        ("pipelines/new.py", "from stepdistill.process import VP", "imports stepdistill"),
        ("pipelines/new.py", "import numpy", "imports numpy"),
        ("stepdistill/new.py", "hasattr(net, 'x')", "line 1 calls hasattr"),
        ("stepdistill/new.py", "import torch\ngetattr(net, 'x')", "line 2 calls getattr"),
        ("stepdistill/new.py", "torch.load('f')", "line 1 calls torch.load without weights_only=True"),
        (
            "stepdistill/new.py",
            "torch.load('f', weights_only=False)",
            "line 1 calls torch.load without weights_only=True",
        ),
        ("stepdistill/new.py", "def f():\n    import pickle", "imports pickle"),
        ("eval/new.py", "from pickle import load", "imports pickle"),
        ("stepdistill/metrics/new.py", "import pickle", "imports pickle"),
        ("training/new.py", "x = 1  # TO" + "DO later", "TO" + "DO"),
        ("stepdistill/new.py", "x = 1\n" * 301, "has 301 lines, more than 300"),
        ("stepdistill/methods/new.py", "x = 1\n" * 201, "has 201 lines, more than 200"),
    ],
)
def test_a_broken_rule_is_reported(path, source, problem):
    neighbours = dict.fromkeys(
        [
            "stepdistill/methods/__init__.py",
            *(f"stepdistill/methods/{name}.py" for name in ("base", "_shared", "_score", "sid", "boot")),
        ],
        "",
    ) | {f"stepdistill/{name.replace('.', '/')}.py": "" for name in SHARED | METRICS | MODELS - {"methods"}}
    assert f"{path}: {problem}" in violations({**neighbours, path: source})


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "stepdistill/methods/new.py",
            "import math\nimport torch.nn.functional as F\nfrom ..samplers import sample_ode",
        ),
        ("stepdistill/methods/new.py", "from ._shared import TimeLaw\nfrom .base import Method\n" + "x = 1\n" * 198),
        ("stepdistill/methods/__init__.py", "from .new import New"),
        ("stepdistill/methods/disback.py", "from .new import New"),
        ("stepdistill/config.py", "from .methods import AnyMethod\nimport pydantic"),
        ("stepdistill/evaluation.py", "from .samplers import SampleNoise\nimport numpy"),
        ("stepdistill/trainer.py", "from accelerate import Accelerator\nfrom .methods.base import Method"),
        ("stepdistill/teacher.py", "import diffusers\ngetattr(diffusers, 'DDPMScheduler')"),
        ("stepdistill/teacher.py", "torch.load('f', map_location='cpu', weights_only=True)"),
        ("stepdistill/metrics/pickled.py", "import pickle"),
        ("pipelines/new.py", "import math\nimport torch\nfrom diffusers import DiffusionPipeline"),
        ("training/new.py", "from stepdistill.distill import distill\n" + "x = 1\n" * 400),
    ],
)
def test_what_is_allowed_is_not_reported(path, source):
    assert violations({path: source}) == []
