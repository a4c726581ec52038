"""Block structures: which weights may interact in the quadratic model.

H is taken to be block-diagonal over

    ``one``               all prunable weights
    ``per_layer``         a block per layer
    ``per_row``           a block per output row (neuron or filter) of each layer
    ``fixed:SIZE``        pieces of at most SIZE consecutive weights inside each layer
    ``components[:τ]``    connected components of the interaction graph
    ``clusters:SIZE``     communities of the interaction graph, cut to at most SIZE weights

The interaction graph has an edge between weights i and j where |w_i H_ij w_j| > τ · max_k H_kk w_k². With τ = 0 (the
default) its components do not interact at all, and the blocks are the exact H. Blocks of consecutive weights are views
of the gradient matrix; the last two structures gather columns, and carry the order of the weights along.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cbs_opt.network.layers import PrunableLayers
from solvers.errors import OptionError, ProblemError, UnknownNameError

Order = npt.NDArray[np.int64]

#: Most weights for which the interaction graph is looked at: it takes n² r operations.
MOST_WEIGHTS = {"components": 50_000, "clusters": 20_000}
#: Strongest interactions of each weight that clustering sees.
_NEIGHBOURS = 16
#: Entries of a slab of interactions.
_SLAB = 1 << 24


class Structure(str, Enum):
    """Kinds of block structure; see the module's docstring."""

    ONE = "one"
    PER_LAYER = "per_layer"
    PER_ROW = "per_row"
    FIXED = "fixed"
    COMPONENTS = "components"
    CLUSTERS = "clusters"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class BlockSpec:
    """A block structure with its parameter.

    Attributes
    ----------
    structure : Structure
    size : int, optional
        Most weights of a block, for ``fixed`` and ``clusters``.
    threshold : float
        τ of ``components``.
    """

    structure: Structure
    size: int | None = None
    threshold: float = 0.0

    @classmethod
    def parse(cls, text: BlockSpec | str) -> BlockSpec:
        """Read ``"per_layer"``, ``"fixed:512"``, ``"components:1e-6"`` and the like.

        Raises
        ------
        UnknownNameError, OptionError
            For a structure that does not exist, or a parameter that is missing, superfluous or out of range.
        """
        if isinstance(text, BlockSpec):
            return text
        name, colon, parameter = str(text).partition(":")
        try:
            structure = Structure(name)
        except ValueError:
            raise UnknownNameError.of("block structure", name, [s.value for s in Structure]) from None
        if structure in (Structure.FIXED, Structure.CLUSTERS):
            try:
                size = int(parameter)
            except ValueError:
                raise OptionError(f"block structure {text!r}: write {name}:SIZE, e.g. {name}:512") from None
            if size < 1:
                raise OptionError(f"block structure {text!r}: the size must be at least 1, not {size}")
            return cls(structure, size=size)
        if structure is Structure.COMPONENTS and colon:
            try:
                threshold = float(parameter)
            except ValueError:
                raise OptionError(f"block structure {text!r}: the threshold must be a number") from None
            if not 0.0 <= threshold < 1.0:
                raise OptionError(f"block structure {text!r}: the threshold must lie in [0, 1), not {threshold}")
            return cls(structure, threshold=threshold)
        if colon:
            raise OptionError(f"block structure {name!r} takes no parameter; write {name!r}, not {text!r}")
        return cls(structure)

    @property
    def contiguous(self) -> bool:
        """Whether blocks are ranges of consecutive weights, known before any gradient is."""
        return self.structure not in (Structure.COMPONENTS, Structure.CLUSTERS)

    def __str__(self) -> str:
        if self.size is not None:
            return f"{self.structure}:{self.size}"
        return f"{self.structure}:{self.threshold:g}" if self.threshold else str(self.structure)


@dataclass(frozen=True, eq=False)
class Partition:
    """Named groups of weights.

    Attributes
    ----------
    names : tuple of str
    sizes : tuple of int
    order : int64 (n,), optional
        Number in the network of each weight, group after group; None where the groups are consecutive ranges.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    order: Order | None = None

    @property
    def slices(self) -> list[slice]:
        """The range of each group in the order of the groups."""
        ends = np.cumsum(self.sizes)
        return [slice(int(end) - size, int(end)) for end, size in zip(ends, self.sizes, strict=True)]

    def to_groups(self, vector: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A vector in the network's order, in the order of the groups."""
        return vector if self.order is None else vector[self.order]

    def to_network(self, vector: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """A vector in the order of the groups, in the network's order."""
        if self.order is None:
            return vector
        back = np.empty_like(vector)
        back[self.order] = vector
        return back


def contiguous_partition(layers: PrunableLayers, spec: BlockSpec) -> Partition:
    """Groups of consecutive weights."""
    names: list[str] = []
    sizes: list[int] = []
    if spec.structure is Structure.ONE:
        return Partition(("all",), (layers.n,))
    for layer in layers:
        if spec.structure is Structure.PER_LAYER:
            pieces = [(layer.name, layer.n)]
        elif spec.structure is Structure.PER_ROW:
            pieces = [(f"{layer.name}[{row}]", layer.n // layer.n_rows) for row in range(layer.n_rows)]
        else:
            assert spec.size is not None
            starts = range(0, layer.n, spec.size)
            ends = [min(start + spec.size, layer.n) for start in starts]
            pieces = [(f"{layer.name}[{a}:{b}]", b - a) for a, b in zip(starts, ends, strict=True)]
        names.extend(name for name, _ in pieces)
        sizes.extend(size for _, size in pieces)
    return Partition(tuple(names), tuple(sizes))


def interaction_partition(factor: Tensor, weights: Tensor, spec: BlockSpec, seed: int = 0) -> Partition:
    """Groups from the interaction graph of A (r, n) and w (n,).

    Raises
    ------
    ProblemError
        If there are too many weights for it.
    """
    n = int(factor.shape[1])
    most = MOST_WEIGHTS[spec.structure.value]
    if n > most:
        raise ProblemError(
            f"block structure {str(spec)!r} looks at all pairs of weights and takes at most {most} of them, not {n}; "
            "use 'per_layer', 'fixed:SIZE' or fewer layers"
        )
    scaled = _Scaled(factor, weights)
    if spec.structure is Structure.COMPONENTS:
        groups = _components(scaled, spec.threshold)
    else:
        assert spec.size is not None
        groups = _clusters(scaled, spec.size, seed)
    components = spec.structure is Structure.COMPONENTS
    alone = [int(group[0]) for group in groups if components and len(group) == 1]
    together = sorted((np.sort(g) for g in groups if not components or len(g) > 1), key=lambda group: int(group[0]))
    names = [f"{'component' if components else 'cluster'} {number}" for number in range(len(together))]
    if alone:
        # Weights without any interaction form one block: a block of their own each would say the same.
        together.append(np.sort(np.array(alone, dtype=np.int64)))
        names.append("isolated")
    return Partition(tuple(names), tuple(len(group) for group in together), np.concatenate(together).astype(np.int64))


class _Scaled:
    """|w_i H_ij w_j| for i ≠ j, in slabs of rows."""

    def __init__(self, factor: Tensor, weights: Tensor) -> None:
        self.columns = factor * weights.to(factor.dtype).unsqueeze(0)
        self.n = int(factor.shape[1])
        self.largest = float(self.columns.square().sum(0).max())

    def rows(self, index: Tensor) -> Tensor:
        """(len(index), n) interactions of some weights with all."""
        slab = (self.columns[:, index].T @ self.columns).abs_()
        slab[torch.arange(len(index), device=slab.device), index] = 0.0
        return slab

    def pieces(self, index: Tensor) -> list[Tensor]:
        """Some weights in pieces whose slab is bounded."""
        return list(torch.split(index, max(1, _SLAB // self.n)))


def _components(scaled: _Scaled, threshold: float) -> list[Order]:
    """Connected components by a breadth-first search that never holds the graph."""
    limit = threshold * scaled.largest
    left = torch.ones(scaled.n, dtype=torch.bool, device=scaled.columns.device)
    groups = []
    for start in range(scaled.n):
        if not bool(left[start]):
            continue
        left[start] = False
        members = [torch.tensor([start], device=left.device)]
        frontier = members[0]
        while frontier.numel():
            reached = torch.zeros_like(left)
            for piece in scaled.pieces(frontier):
                reached |= (scaled.rows(piece) > limit).any(0)
            frontier = (reached & left).nonzero().squeeze(1)
            left[frontier] = False
            members.append(frontier)
        groups.append(torch.cat(members).cpu().numpy())
    return groups


def _clusters(scaled: _Scaled, size: int, seed: int) -> list[Order]:
    """Louvain communities of the strongest interactions, cut and packed into groups of at most `size` weights."""
    import networkx as nx

    graph = nx.Graph()
    graph.add_nodes_from(range(scaled.n))
    count = min(_NEIGHBOURS, scaled.n - 1)
    if count and scaled.largest > 0.0:
        for piece in scaled.pieces(torch.arange(scaled.n, device=scaled.columns.device)):
            strength, neighbour = scaled.rows(piece).topk(count, dim=1)
            for i, values, others in zip(piece.tolist(), strength.tolist(), neighbour.tolist(), strict=True):
                graph.add_weighted_edges_from(
                    (i, j, v / scaled.largest) for j, v in zip(others, values, strict=True) if v
                )
    groups: list[list[int]] = []
    pending = [sorted(community) for community in nx.community.louvain_communities(graph, seed=seed)]
    while pending:
        community = pending.pop()
        if len(community) <= size:
            groups.append(community)
            continue
        # Too large: look for communities inside it, and cut it where there are none.
        inner = nx.community.louvain_communities(graph.subgraph(community), seed=seed, resolution=2.0)
        if len(inner) > 1:
            pending.extend(sorted(part) for part in inner)
        else:
            groups.extend(community[i : i + size] for i in range(0, len(community), size))
    return [np.array(group, dtype=np.int64) for group in _pack(groups, size)]


def _pack(groups: list[list[int]], size: int) -> list[list[int]]:
    """First-fit decreasing: small groups share a block, since blocks of a few weights only cost time."""
    packed: list[list[int]] = []
    for group in sorted(groups, key=lambda g: (-len(g), g[0])):
        room = next((p for p in packed if len(p) + len(group) <= size), None)
        if room is None:
            packed.append(list(group))
        else:
            room.extend(group)
    return packed
