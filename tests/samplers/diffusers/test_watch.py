"""What counts as a change of the weights within a run."""

from __future__ import annotations

import torch

from stepcache.samplers.diffusers.watch import Watch


def test_a_weight_changed_in_place_is_a_change_even_beside_weights_made_in_inference_mode():
    layers = torch.nn.Sequential(torch.nn.Linear(1, 1))
    with torch.inference_mode():
        layers.append(torch.nn.Linear(1, 1, bias=False))
    watch = Watch(layers)
    assert [watch.changes(("cond",), 1, {}) for _ in range(2)] == [0, 0]
    with torch.no_grad():
        layers[0].bias.add_(1)
    assert [watch.changes(("cond",), 1, {}) for _ in range(2)] == [1, 1]


def test_a_weight_changed_in_place_is_a_change():
    layer = torch.nn.Linear(1, 1)
    watch = Watch(layer)
    assert watch.changes(("cond",), 1, {}) == 0
    with torch.no_grad():
        layer.weight.mul_(2)
    assert watch.changes(("cond",), 1, {}) == 1
    watch.begin()
    assert watch.changes(("cond",), 1, {}) == 1
