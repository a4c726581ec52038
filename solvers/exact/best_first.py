"""Best-first branch and bound over a relaxation: the same search whatever the number of threads.

Nodes are expanded by workers, `Relaxation.window` at a time, and merged in the order in which they were taken. A node
is taken when the one `window` places before it has been merged, so what it knows (the incumbent) and which node it
is depend on the order alone. The search stops as soon as the bound meets the incumbent: nothing is open below
`Relaxation.cutoff`, or the incumbent lies at `Relaxation.floor`, which no mask can be below.

Source: Land & Doig (1960); best-first order as in Linderoth & Savelsbergh, "A computational study of search
strategies for mixed integer programming", 1999.
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from solvers.problem import Mask
from solvers.solution import Reason
from solvers.solver import Deadline

#: Seconds for the factorisations of a node of n weights, over n³, on a slow core; they cannot be interrupted.
SECONDS_OF_CUBE = 1e-9
State = TypeVar("State")
Fates = npt.NDArray[np.int8]


class Fate(IntEnum):
    """What a node has decided about a weight."""

    KEPT = 0
    PRUNED = 1
    OPEN = 2


class Incumbent(NamedTuple):
    """The best mask known, bool (n,), True = removed, and its value."""

    pruned: Mask
    value: float


@dataclass(frozen=True)
class Node(Generic[State]):
    """An open node: a lower bound on all masks below it, and whatever the relaxation needs to go on."""

    bound: float
    state: State


@dataclass(frozen=True)
class Expansion(Generic[State]):
    """What became of a node.

    Attributes
    ----------
    children : sequence of Node
        Still open.
    closed : float
        Lower bound on all masks below the node that are below no child; inf where there is none.
    found : Incumbent or None
        The best mask met.
    searched : int
        Nodes looked at.
    """

    children: Sequence[Node[State]] = ()
    closed: float = math.inf
    found: Incumbent | None = None
    searched: int = 1


class Relaxation(ABC, Generic[State]):
    """What the search needs to know about a problem. Values and bounds are in units of its own."""

    window: ClassVar[int] = 8
    """Nodes under way at once, which limits the threads that can be busy."""
    max_open: ClassVar[int] = 200_000
    """Open nodes beyond this number make the search depth-first, so that memory stays bounded."""
    floor: float = -math.inf
    """No mask has a value below this."""

    @abstractmethod
    def cutoff(self, value: float) -> float:
        """Masks of at least this value do not improve on an incumbent of value `value`; increasing in it."""

    def least_seconds(self, node: Node[State]) -> float:
        """What expanding a node takes at least; where less is left the search ends."""
        return 0.0

    @abstractmethod
    def root(self, incumbent: Incumbent) -> Expansion[State]:
        """The first open nodes."""

    @abstractmethod
    def expand(self, node: Node[State], incumbent: Incumbent) -> Expansion[State]:
        """Bound and branch; called from several threads, so it must change nothing but its own copies."""


class Search(NamedTuple):
    """How a search ended; statistics are nodes, root_bound and open_nodes."""

    incumbent: Incumbent
    bound: float
    reason: Reason
    statistics: dict[str, float]


class _Tree(Generic[State]):
    """Open nodes by bound, then by age, with the incumbent and the bound of what is closed."""

    def __init__(self, relaxation: Relaxation[State], incumbent: Incumbent) -> None:
        self.relaxation, self.incumbent = relaxation, incumbent
        self.heap: list[tuple[float, int, Node[State]]] = []
        self.serial, self.searched, self.closed = 0, 0, math.inf

    def merge(self, parent: float, expansion: Expansion[State]) -> None:
        """Take what an expansion brought."""
        self.searched += expansion.searched
        self.closed = min(self.closed, max(parent, expansion.closed))
        if expansion.found is not None and expansion.found.value < self.incumbent.value:
            self.incumbent = expansion.found
        for child in expansion.children:
            self.push(Node(max(parent, child.bound), child.state))

    def push(self, node: Node[State]) -> None:
        """File an open node."""
        heapq.heappush(self.heap, (node.bound, self.serial, node))
        self.serial += 1

    def pop(self) -> Node[State] | None:
        """The open node of the lowest bound (or, to save memory, a deep one); None where nothing is of interest."""
        cutoff = self.relaxation.cutoff(self.incumbent.value)
        while self.heap and self.incumbent.value > self.relaxation.floor:
            # The last element of the heap's array is a leaf of it: recent, deep and free to remove.
            full = len(self.heap) > self.relaxation.max_open
            node = (self.heap.pop() if full else heapq.heappop(self.heap))[2]
            if node.bound < cutoff:
                return node
            self.closed = min(self.closed, node.bound)
        return None

    def bound(self) -> float:
        """Lower bound on all masks, never above the incumbent."""
        opened = self.heap[0][0] if self.heap else math.inf
        return max(min(self.incumbent.value, self.closed, opened), self.relaxation.floor)


def best_first(
    relaxation: Relaxation[State],
    incumbent: Incumbent,
    deadline: Deadline,
    *,
    n_threads: int = 1,
    node_limit: int | None = None,
) -> Search:
    """Search until nothing is open below the cutoff, or a limit is met.

    Parameters
    ----------
    relaxation : Relaxation
    incumbent : Incumbent
    deadline : Deadline
        Looked at between expansions; those under way are waited for, and should look at it too.
    n_threads : int
        Workers. Without a time limit the result does not depend on it.
    node_limit : int, optional

    Returns
    -------
    Search
    """
    tree = _Tree(relaxation, incumbent)
    tree.merge(-math.inf, relaxation.root(incumbent))
    root_bound, reason = tree.bound(), Reason.COMPLETED
    under_way: deque[tuple[Node[State], Future[Expansion[State]]]] = deque()
    workers = ThreadPoolExecutor(max(1, n_threads))
    submit = workers.submit if n_threads > 1 else _at_once
    try:
        while True:
            while len(under_way) < relaxation.window and reason is Reason.COMPLETED:
                node = tree.pop()
                if node is None:
                    break
                late = deadline.remaining() <= relaxation.least_seconds(node)
                if late or (node_limit is not None and tree.searched >= node_limit):
                    reason = Reason.TIME_LIMIT if late else Reason.NODE_LIMIT
                    tree.push(node)
                    break
                under_way.append((node, submit(relaxation.expand, node, tree.incumbent)))
            if not under_way:
                break
            node, future = under_way.popleft()
            if reason is Reason.TIME_LIMIT and future.cancel():
                tree.push(node)
                continue
            tree.merge(node.bound, future.result())
    finally:
        workers.shutdown(cancel_futures=True)
    statistics = {
        "nodes": float(tree.searched),
        "root_bound": root_bound,
        "open_nodes": float(len(tree.heap)),
    }
    return Search(tree.incumbent, tree.bound(), reason, statistics)


def _at_once(expand: Callable[..., Expansion[State]], *arguments: Any) -> Future[Expansion[State]]:
    """A future that is done: one worker needs no thread of its own."""
    future: Future[Expansion[State]] = Future()
    future.set_result(expand(*arguments))
    return future
