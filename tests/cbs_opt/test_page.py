"""The page of a report: whole, offline, escaped."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

import cbs_opt
from cbs_opt.report.page import page
from tests.cbs_opt.networks import Mlp, build, inputs_for

VOID = {"meta", "img"}


class Balance(HTMLParser):
    """Checks that tags close in order, and collects text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(text: str) -> str:
    parser = Balance()
    parser.feed(text)
    assert parser.open == []
    return " ".join(parser.text)


@pytest.fixture(scope="module")
def result() -> cbs_opt.PruneResult:
    data = inputs_for(Mlp, 40, dtype=torch.float32)
    stages = cbs_opt.StageOptions(n_stages=3, n_polish=0)
    return cbs_opt.prune(build(Mlp, dtype=torch.float32), data, F.cross_entropy, solver="obs", stages=stages)


def test_every_saved_folder_has_a_page_that_needs_nothing_else(result, tmp_path) -> None:
    result.save(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)|url\(|@import|<script", text)
    assert "prefers-color-scheme:dark" in text and 'name="viewport"' in text
    said = read(text)
    assert "56 of 62 weights in 3 layers" in said and "in 3 stages" in said and "Loss along the plan" in said
    assert all(row.name in said for row in result.report.layers) and '"solver": "obs"' in said
    loaded = cbs_opt.load(tmp_path, build(Mlp, dtype=torch.float32))
    assert loaded._repr_html_() == result._repr_html_() and result._repr_html_() in text


def test_names_are_escaped_and_what_is_not_known_is_said() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    data = [torch.randn(8, 4) for _ in range(2)]
    options = {"solver": "magnitude", "update": "none", "curvature": "layer_inputs"}
    report = cbs_opt.prune(model, data, sparsity=0.5, **options).report
    row = replace(report.layers[0], name='<b onload="x">&')
    said = read(page(replace(report, layers=(row,), warnings=("a < b",))))
    assert '<b onload="x">&' in said and "Warning: a < b" in said and "not known" in said


def test_masks_are_drawn_as_shares_of_what_is_kept(result) -> None:
    mask = torch.zeros(200, 50, dtype=torch.bool)
    mask[:100] = True
    text = page(result.report, {"wide": mask})
    (picture,) = re.findall(r"data:image/png;base64,([^\"]+)", text)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))))
    assert pixels.shape == (96, 50) and (pixels[:47] == 255).all() and (pixels[49:] == 0).all()
    assert "wide, 200 × 50" in read(text)


def test_sensitivity_is_drawn_and_set_beside_the_layers() -> None:
    data = [inputs_for(Mlp, 16, seed, dtype=torch.float32) for seed in range(8)]
    model = build(Mlp, dtype=torch.float32)
    options = {"solver": "sweep", "update": "own", "curvature": "layer_inputs", "allocation": "measured"}
    report = cbs_opt.prune(model, data, F.cross_entropy, sparsity=0.5, **options).report
    text = report._repr_html_()
    assert text.count("<polyline") == 3 and "of it alone" in read(text)
    key = read(text.split('<p class="key">')[1].split("</p>")[0])
    assert key.split() == [row.name for row in report.layers]


def test_what_came_after_pruning_is_in_the_sentence() -> None:
    data = inputs_for(Mlp, 40, dtype=torch.float32)
    options = {"solver": "magnitude", "update": "none", "finetune": cbs_opt.FineTune(steps=2, batch_size=8)}
    report = cbs_opt.prune(build(Mlp, dtype=torch.float32), data, F.cross_entropy, sparsity=0.5, **options).report
    assert "then fine-tuned; the calibration loss" in read(page(report))
