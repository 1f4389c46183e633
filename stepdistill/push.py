"""``stepdistill push``: a finished student, or its adapters, to the hub."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from .bundled import BUILTIN
from .errors import UserError, first_line
from .plain import PYTHON
from .report import CARD, PLACE
from .sources import locate
from .student import recipe


def push(run: Path, repo: str, *, adapters: bool = False, private: bool = False, dry_run: bool = False) -> str:
    """Upload a student in one commit; its card then names ``repo`` in the lines that use it.

    Args:
        run: folder of a finished run.
        repo: ``owner/name``; made if there is none.
        adapters: push ``student_lora`` in place of ``student``.
        private: make a new repository private.
        dry_run: upload nothing, and need no network.

    Returns:
        What was, or would be, uploaded: one line per file, and the address.

    Raises:
        UserError: no finished student, no valid ``repo``, or the hub refuses.
    """
    folder = run / ("student_lora" if adapters else "student")
    if not (folder / CARD).is_file():
        raise UserError(f"{run} holds no finished {folder.name}: {folder / CARD} is missing; give a run's output_dir")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"{repo!r} is no repository id: {error}") from None
    if repo.count("/") != 1:
        raise UserError(f"{repo!r} is no repository id; write owner/name")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    card = _public(folder / CARD).replace(PLACE, repo).encode()
    operations = [
        CommitOperationAdd(path.relative_to(folder).as_posix(), card if path == folder / CARD else path)
        for path in files
    ]
    lines = [f"{operation.upload_info.size:>14,}  {operation.path_in_repo}" for operation in operations]
    total = sum(operation.upload_info.size for operation in operations)
    address = f"https://huggingface.co/{repo}"
    if not dry_run:
        try:
            api = HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            api.create_commit(repo, operations, commit_message="Student distilled by stepdistill")
        except Exception as error:  # no token, no network, no right: whatever it is, it is the hub's
            raise UserError(f"the hub did not take {repo}: {first_line(error)}") from None
    done = "would be uploaded" if dry_run else "uploaded"
    return "\n".join([*lines, f"{total:>14,}  bytes in {len(lines)} files {done} to {address}"])


def _public(card: Path) -> str:
    """The text of a card in which files and folders of this machine, which its recipe names, have their names alone."""
    text, told = card.read_text(), recipe(card)
    teacher = str(told.get("teacher"))
    bundled = [locate(teacher).as_posix()] if teacher.startswith(BUILTIN) else []
    for path in [*bundled, *_paths(told)]:
        text = text.replace(path, Path(path).name)
    return text


def _paths(values: object) -> list[str]:
    """Absolute paths among the values of a recipe; of ``python:FILE.py:FUNCTION`` the file's."""
    if isinstance(values, dict | list):
        inside = values.values() if isinstance(values, dict) else values
        return sorted({path for value in inside for path in _paths(value)}, key=len, reverse=True)
    path = Path(re.sub(r"(?<=\.py):\w+$", "", values.removeprefix(PYTHON)) if isinstance(values, str) else "")
    return [str(path)] if path.is_absolute() and path != Path("/") and path.exists() else []
