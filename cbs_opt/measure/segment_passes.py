"""The passes over the data that measure a network segment by segment, those before already pruned.

In the pass for segment j each batch runs through segment j − 1, pruned by now, whose output is kept, and through
segment j as it is, whose layers are watched. Kept outputs lie on the CPU, and only the two segments that run are on the
device. In order, a segment takes a pass for each of its steps (`Chain`), so that each layer sees what all before it
have become.

Where targets are asked for, the same batch runs through the dense network too, whose kept outputs double; its weights
take the place of those of the segments that run, for that time. So each layer gets, beside C = E[x xᵀ] of its inputs x
in the network pruned so far, the cross moment D = E[x̂ xᵀ] with its inputs x̂ in the dense one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from cbs_opt.measure.layer_inputs import Accumulator, Batch, InputMoment, Recorded, Streamed, quiet
from cbs_opt.measure.segments import Chain, PathError, filled, inside, outputs_of, replaced
from cbs_opt.network.layers import Layer
from solvers.errors import CBSError


@dataclass(eq=False)
class _Track:
    """By batch: the output of the last cut passed, and those of cuts before it without values."""

    kept: list[Any] = field(default_factory=list)
    shapes: list[list[Any]] = field(default_factory=list)


class SegmentPasses:
    """See the module's docstring.

    Parameters
    ----------
    network : Streamed
    chain : Chain
    in_order : bool
        Measure a segment step by step.
    dense : callable, optional
        The weights that a layer had before it was pruned, as its module holds them; None measures no cross moments.
    """

    def __init__(
        self,
        network: Streamed,
        chain: Chain,
        *,
        in_order: bool = False,
        dense: Callable[[Layer], Tensor] | None = None,
    ) -> None:
        self.network, self.chain, self._in_order, self._weights = network, chain, in_order, dense
        self._track, self._dense_track = _Track(), _Track()

    def __iter__(self) -> Iterator[list[InputMoment]]:
        """Moments of the layers of each segment, in order of each step of it.

        When the next ones are asked for, these are taken to be pruned.

        Raises
        ------
        PathError
            If a batch takes another path than that by which the segments were found.
        DataError, ModelError
        """
        for segment, layers in enumerate(self.chain.segments):
            for step, part in enumerate(self.chain.in_steps(segment) if self._in_order else [layers]):
                yield self._measure(segment, step, part)

    @torch.no_grad()
    def _measure(self, segment: int, step: int, layers: Sequence[Layer]) -> list[InputMoment]:
        # What comes first sees the same in both networks.
        paired = self._weights is not None and segment + step > 0
        accumulator = Accumulator(self.network, layers, paired=paired)
        self._place(segment)
        with quiet(self.network.model):
            for number, batch in enumerate(self.network.batches()):
                try:
                    recorded = None
                    if paired:
                        recorded = Recorded(self.network, layers)
                        with self._dense(segment), recorded.watching():
                            self._run(self._dense_track, segment, step, number, batch)
                    elif self._weights is not None:
                        self._begin(self._dense_track)
                    with accumulator.watching(batch, number, recorded):
                        self._run(self._track, segment, step, number, batch)
                except CBSError as error:
                    if not segment:
                        raise
                    # What was left out may be what this batch needs: the network as a whole will tell.
                    raise PathError(str(error)) from error
        return list(accumulator.moments.values())

    @staticmethod
    def _begin(track: _Track) -> None:
        track.kept.append(None)
        track.shapes.append([])

    def _run(self, track: _Track, segment: int, step: int, number: int, batch: Batch) -> None:
        """One batch through the segment before, whose output is kept, and this one; later steps through this alone."""
        cuts = self.chain.cuts
        first = segment if step else max(segment - 1, 0)
        stubs, through = self._stubs(track, number, segment if step else segment - 1), cuts[first : segment + 1]
        with replaced(self.network.model, stubs):
            found = outputs_of(self.network, batch, through, stop=segment < len(cuts))
        if len(found) != len(through):
            raise PathError(f"batch {number} does not pass through {', '.join(set(through) - set(found))}")
        if step:
            return
        if segment == 0:
            self._begin(track)
            return
        if segment >= 2:
            track.shapes[number].append(tree_map_only(Tensor, lambda t: t.to("meta"), track.kept[number]))
        track.kept[number] = tree_map_only(Tensor, lambda t: t.cpu(), found[cuts[segment - 1]])

    def _stubs(self, track: _Track, number: int, done: int) -> dict[str, Any]:
        """What the first `done` cuts return for a batch: the last of them what was kept, the others nothing."""
        if done < 1:
            return {}
        cuts = self.chain.cuts
        before = zip(cuts, track.shapes[number], strict=False)
        # What is called inside of another cut is not called any more.
        apart = [name for name in cuts[:done] if not inside(name, cuts[:done])]
        stubs = {name: tree_map_only(Tensor, self._nothing, shape) for name, shape in before if name in apart}
        stubs[cuts[done - 1]] = tree_map_only(Tensor, self._here, track.kept[number])
        return stubs

    @contextmanager
    def _dense(self, segment: int) -> Iterator[None]:
        """The layers of the segments that run have their dense weights."""
        assert self._weights is not None
        layers = [layer for part in self.chain.segments[max(segment - 1, 0) : segment + 1] for layer in part]
        held = [(getattr(*layer.held(self.network.model)), layer) for layer in layers]
        now = [weight.detach().clone() for weight, _ in held]
        try:
            for weight, layer in held:
                weight.copy_(self._weights(layer))
            yield
        finally:
            for (weight, _), value in zip(held, now, strict=True):
                weight.copy_(value)

    @torch.no_grad()
    def outputs(self, segment: int) -> Iterator[tuple[Batch, Any]]:
        """Batches and the outputs of the network, once segment `segment` was measured, run from there to the end.

        All of the network is put on the device.
        """
        self.network.model.to(self.network.device)
        with quiet(self.network.model):
            for number, batch in enumerate(self.network.batches()):
                with replaced(self.network.model, self._stubs(self._track, number, segment)):
                    output = self.network.call(batch)
                yield batch, output

    def _here(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.network.device)

    def _nothing(self, tensor: Tensor) -> Tensor:
        return filled(torch.empty_like(tensor, device=self.network.device))

    def _place(self, segment: int) -> None:
        """Put what runs on the device, and cuts that do not run back to the CPU."""
        if self.network.device.type == "cpu":
            return
        cuts = self.chain.cuts
        idle = set(cuts) - set(cuts[max(segment - 1, 0) : segment + 1])
        # A cut that holds another one may have to run for that.
        idle = {name for name in idle if not any(inside(cut, [name]) for cut in cuts)}
        for name, module in self.network.model.named_modules():
            away = name in idle or inside(name, tuple(idle))
            place = torch.device("cpu") if away else self.network.device
            module._apply(lambda t, place=place: t.to(place), recurse=False)
