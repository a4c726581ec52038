"""Budgets of attention heads: they go whole, and shrink takes out as many as the report says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt.structured.head_costs import head_labels
from solvers.errors import OptionError


class SelfAttention(nn.Module):
    """Heads of four, two query heads to a key and value head where `shared`."""

    head_dim = 4

    def __init__(self, shared: int = 1) -> None:
        super().__init__()
        self.shared = shared
        self.q_proj, self.o_proj = nn.Linear(12, 24), nn.Linear(24, 12)
        self.k_proj, self.v_proj = nn.Linear(12, 24 // shared), nn.Linear(12, 24 // shared)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (t.repeat_interleave(self.shared, 1) for t in (k, v))
        out: torch.Tensor = self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    def __init__(self, shared: int) -> None:
        super().__init__()
        self.first, self.second = SelfAttention(shared), SelfAttention(shared)
        self.up, self.head = nn.Linear(12, 20), nn.Linear(20, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.first(x)
        x = x + self.second(x)
        out: torch.Tensor = self.head(torch.tanh(self.up(x)).mean(1))
        return out


def network(shared: int = 1) -> Block:
    torch.manual_seed(0)
    return Block(shared).eval()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 7, 12, generator=generator), torch.randint(0, 5, (64,), generator=generator)


FISHER = cbs_opt.FisherOptions(n_rows=48, damping=1e-3)
ATTENTION = ("first.*", "second.*")


@pytest.mark.parametrize("shared", [1, 2])
def test_labels_partition_the_projections_by_heads(shared: int) -> None:
    model = network(shared)
    layers = cbs_opt.find_layers(model)
    labels = {
        layer.name: part.numpy()
        for layer, part in zip(
            layers, torch.from_numpy(head_labels(model, layers)).split([layer.n for layer in layers]), strict=True
        )
    }
    heads = 6 // shared
    for part in ("first", "second"):
        by_rows = labels[f"{part}.v_proj"].reshape(-1, 12)
        by_columns = labels[f"{part}.o_proj"].reshape(12, -1)
        assert (by_rows == by_rows[:, :1]).all()
        assert (by_columns == by_columns[:1]).all()
        assert np.array_equal(np.repeat(by_rows[:, 0], shared), by_columns[0])
        assert np.array_equal(labels[f"{part}.q_proj"].reshape(-1, 12)[:, 0], by_columns[0])
        assert len(set(by_rows[:, 0])) == heads
        assert (by_rows == -1).sum() == 4 * 12
    assert (labels["up"] == -1).all()
    assert max(part.max() for part in labels.values()) == 2 * (heads - 1) - 1


@pytest.mark.parametrize("solver", ["magnitude", "obd", "greedy_ls", "best_swap"])
@pytest.mark.parametrize("shared", [1, 2])
def test_heads_go_whole_and_the_limit_holds(solver: str, shared: int) -> None:
    options = {"include": ATTENTION, "fisher": FISHER, "budget": cbs_opt.Bytes(0.5, groups="heads")}
    result = cbs_opt.prune(network(shared), data(), F.cross_entropy, solver=solver, **options)  # type: ignore[arg-type]
    gone = {name: ~mask for name, mask in result.masks.items()}
    assert 0.5 - 1 / (12 // shared) < result.report.costs["bytes_kept"] <= 0.5
    for part in ("first", "second"):
        rows = gone[f"{part}.v_proj"]
        assert torch.equal(rows.all(1), rows.any(1))

        columns = rows[:, 0].reshape(-1, 4).repeat_interleave(shared, 0).reshape(-1)
        assert torch.equal(gone[f"{part}.o_proj"], columns.expand(12, -1))
        assert torch.equal(gone[f"{part}.k_proj"], rows)


def test_the_smaller_network_has_the_heads_that_stay() -> None:
    pytest.importorskip("torch_pruning")
    result = cbs_opt.prune(
        network(), data(), F.cross_entropy, solver="obd", include=ATTENTION, fisher=FISHER, budget="flops:0.6:heads"
    )
    small, report = cbs_opt.shrink(result.model, data()[0][:4])
    stay = sum(int(mask.any(1).sum()) for name, mask in result.masks.items() if name.endswith("q_proj"))
    assert sum(small.get_submodule(f"{part}.q_proj").out_features for part in ("first", "second")) == stay  # type: ignore[misc]
    assert stay < 48
    assert report.difference < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": ("up",)}, "no attention head"),
        ({"budget": "flops:0.05:heads"}, "stay when all heads that can are gone"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, object], message: str) -> None:
    asked = {"solver": "obd", "fisher": FISHER, "budget": "flops:0.5:heads", **options}
    with pytest.raises(OptionError, match=message):
        cbs_opt.prune(network(), data(), F.cross_entropy, **asked)  # type: ignore[arg-type]
