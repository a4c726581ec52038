"""Tensors in tuples, lists and dicts, as batches hold them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeAlias, Union

import torch
from torch import Tensor

from solvers.errors import DataError

#: A tensor, or tensors in tuples, lists and dicts.
Tree: TypeAlias = Union[Tensor, tuple["Tree", ...], list["Tree"], dict[str, "Tree"]]  # noqa: UP007


def map_tree(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor of a tree."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        return {key: map_tree(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return rebuilt(tree, [map_tree(function, value) for value in tree])
    raise DataError(f"expected tensors in tuples, lists or dicts, found {type(tree).__name__}")


def rebuilt(like: Any, entries: list[Any]) -> Any:
    """A list, tuple or named tuple like another, of other entries."""
    return type(like)(*entries) if hasattr(like, "_fields") else type(like)(entries)


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of every tensor of a tree."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif isinstance(tree, (tuple, list)):
        for key, value in enumerate(tree):
            yield from leaves(value, f"{path}[{key}]")


def split_rows(tree: Any, rows: int, size: int) -> Any:
    """Tensors (R·b, ...) as (R, b, ...)."""
    return map_tree(lambda t: t.reshape(rows, size, *t.shape[1:]), tree)


def row_of(tree: Any, row: int) -> Any:
    """Entry `row` of the first dimension of every tensor; None stays None."""
    return None if tree is None else map_tree(lambda t: t[row], tree)


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of names, shapes, dtypes and contents, 32 hexadecimal digits."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()[:32]
