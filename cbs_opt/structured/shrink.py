"""A smaller network that computes what the masked one does; see `shrink`."""

from __future__ import annotations

import io
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cbs_opt.formats.record import Example, compared, output_of, plain_copy, timed
from cbs_opt.network.masks import apply_masks, masks_from_zeros, read_masks
from cbs_opt.structured.channels import GroupRecord, remove_channels
from cbs_opt.structured.heads import attentions, remove_heads
from cbs_opt.structured.observe import dead_inputs
from solvers.arguments import instance
from solvers.errors import ModelError

#: Largest difference of outputs, relative to the largest output.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class ShrinkReport:
    """What is gone; ``print`` it.

    Attributes
    ----------
    groups : tuple of GroupRecord
        Every group of tied channels, and every attention module, in which something was dead.
    parameters_before, parameters_after : int
    flops_before, flops_after : int
        Of a call on the example, counted by `torch.utils.flop_counter`.
    seconds_before, seconds_after : float
        Of such a call, on this machine.
    difference : float
        Largest, of the outputs, relative to the largest one.
    """

    groups: tuple[GroupRecord, ...]
    parameters_before: int
    parameters_after: int
    flops_before: int
    flops_after: int
    seconds_before: float
    seconds_after: float
    difference: float

    def __rich__(self) -> Table:
        table = Table(
            title=f"{self.parameters_before:,} -> {self.parameters_after:,} parameters, {self.flops_before:,} -> "
            f"{self.flops_after:,} operations, {self.seconds_before * 1e3:.3g} -> {self.seconds_after * 1e3:.3g} ms a "
            f"call; outputs differ by {self.difference:.1e}"
        )
        for heading in ("channels of", "before", "dead", "removed", "why others stay"):
            table.add_column(heading, justify="right" if heading in ("before", "dead", "removed") else "left")
        for row in self.groups:
            table.add_row(Text(row.name), str(row.n), str(row.n_dead), str(row.n_removed), Text(row.why))
        return table

    def __str__(self) -> str:
        file = io.StringIO()
        Console(file=file, width=120, color_system=None).print(self)
        return file.getvalue().rstrip()


def shrink(model: nn.Module, example: object) -> tuple[nn.Module, ShrinkReport]:
    """A smaller network: channels and heads that the masks have wholly removed are taken out of its modules.

    Constants that they leave behind (biases, batch norms) are put into biases or into a channel that stays, so that the
    network computes the same. Channels that others are tied to, by additions and concatenations, go together or not at
    all, and the report says which stay and why. Extra ``[structured]``.

    Parameters
    ----------
    model : nn.Module
        Masked or not (zeros count); not changed.
    example : tensor, tuple or dict
        What the network is called with; a batch of two or more samples.

    Returns
    -------
    (nn.Module, ShrinkReport)
        The network in eval mode, with masks on the zeros that are left if the one given had masks.

    Raises
    ------
    OptionError
        If torch-pruning is not installed.
    ModelError
        If it cannot follow the network, or the example is too small.
    BackendError
        If the smaller network computes something else.
    """
    instance("model", model, nn.Module, error=ModelError)
    given = Example.of(example)
    if any(len(t) < 2 for t in given.tensors if t.ndim) or not given.tensors:
        raise ModelError("the example must hold two samples or more, by which constants are told from signals")
    masked = bool(read_masks(model))
    plain, small = plain_copy(model), plain_copy(model)
    expected = output_of(plain, given)
    known = list(attentions(small))
    records = [record for attention in known if (record := remove_heads(attention)) is not None]
    dead = dead_inputs(small, given)
    leave = [layer for attention in known for layer in attention.layers]
    records += remove_channels(small, given, dead, leave)
    difference = compared("the smaller network", expected, output_of(small, given), TOLERANCE)
    before, after = timed(lambda: output_of(plain, given), lambda: output_of(small, given))
    report = ShrinkReport(
        groups=tuple(records),
        parameters_before=sum(p.numel() for p in plain.parameters()),
        parameters_after=sum(p.numel() for p in small.parameters()),
        flops_before=_flops(plain, given),
        flops_after=_flops(small, given),
        seconds_before=before,
        seconds_after=after,
        difference=difference,
    )
    if masked:
        apply_masks(small, masks_from_zeros(small))
    return small, report


def _flops(model: nn.Module, example: Example) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*example.args, **example.kwargs)
    return int(counter.get_total_flops())
