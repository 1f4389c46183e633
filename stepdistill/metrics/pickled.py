"""Arrays in pickles of other tools, read without running any of their code.

A pickle is a program that may call what it names.  Here it may name containers and numpy's array rebuilding alone,
and what those names call is written below: not even numpy's own code sees the file before it is checked.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError, first_line

_CODES = frozenset({"b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"})


def read_pickle(path: Path) -> dict[str, Any]:
    """The dictionary in ``path``: text keys; numbers, text, arrays, lists and dictionaries of them as values.

    Raises:
        UserError: it holds something else, which is named, or is damaged or unreadable.
    """
    try:
        with path.open("rb") as file:
            content = _plain(_Restricted(file, encoding="latin1").load())
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # A broken pickle can fail in any way; nothing of it has been run.
        raise UserError(f"{path} is truncated or not a pickle: {first_line(error)}") from error
    return _dictionary(path, content)


def read_torch(path: Path) -> dict[str, Any]:
    """The dictionary of arrays that ``torch.save`` wrote to ``path``; a bare tensor comes as ``feats``.

    Raises:
        UserError: it holds something else, or is damaged or unreadable.
    """
    rebuild: Any = np.zeros(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in _CODES}
    names = [(rebuild, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:
        with torch.serialization.safe_globals([*names, np.ndarray, np.dtype, *kinds]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # As above.
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        reason = f"it names {named[1]}, which is not run" if named else first_line(error)
        raise UserError(f"{path} is truncated or holds more than arrays and tensors: {reason}") from error
    return {"feats": content.numpy()} if isinstance(content, torch.Tensor) else _dictionary(path, content)


def pickled(content: Mapping[str, Any]) -> bytes:
    """``content`` as a pickle that numpy 1.26 and later can read, and with it EDM2's tools."""
    return pickle.dumps(dict(content), protocol=4)


def _dictionary(path: Path, content: object) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dictionary of statistics")
    return content


class _Dtype:
    """What a pickle builds for ``numpy.dtype``."""

    def __init__(self, code: str, align: bool = False, copy: bool = False) -> None:
        if code not in _CODES:
            raise UserError(f"it holds an array of dtype {code!r}; plain numbers are read, objects are not")
        self._code, self._order = code, "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "=", "|"):
            raise UserError(f"it holds an array of byte order {state[1]!r}")
        self._order = state[1]

    def numbers(self, raw: bytes) -> np.ndarray:
        return np.frombuffer(raw, np.dtype(self._order + self._code))


class _Array:
    """What a pickle builds for ``numpy.ndarray``; filled by its state."""

    value: np.ndarray

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = dtype.numbers(raw).reshape(shape, order="F" if fortran else "C")


class _Dict(dict[str, Any]):
    """What a pickle builds for an ``EasyDict``."""

    def __setstate__(self, state: object) -> None:
        raise UserError("it holds an EasyDict with attributes besides its items")


def _empty(*_: object) -> _Array:
    return _Array()


def _filled(raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", raw))
    return array


def _scalar(dtype: _Dtype, raw: bytes) -> object:
    return dtype.numbers(raw)[0].item()


def _bytes(text: str, codec: str) -> bytes:
    return text.encode("latin1")  # The only codec that numpy writes, in protocols before 3.


_BUILDERS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _empty,
    ("numpy.core.numeric", "_frombuffer"): _filled,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("_codecs", "encode"): _bytes,
    ("collections", "OrderedDict"): dict,
    **{("builtins", kind.__name__): kind for kind in (dict, list, tuple, set, frozenset)},
}


class _Restricted(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> object:
        if global_name == "EasyDict":
            return _Dict
        builder = _BUILDERS.get((module_name.replace("numpy._core", "numpy.core"), global_name))
        if builder is None:
            raise UserError(
                f"it names {module_name}.{global_name}, which statistics do not need and which is not run; "
                "only arrays, numbers, text and their containers are read"
            )
        return builder


def _plain(value: object) -> object:
    """``value`` with arrays and dictionaries of numpy's and Python's own types."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value
