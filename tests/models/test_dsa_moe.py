"""Routing and experts against a definition in plain Python."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from thresher.distributed import Alone
from thresher.models.dsa_config import parse_config
from thresher.models.dsa_moe import MoE, route
from thresher.models.published import PUBLISHED
from thresher.models.tiny_checkpoint import TINY

CONFIG = parse_config({**PUBLISHED["deepseek_v32"], **TINY["deepseek_v32"], "n_routed_experts": 24, "n_group": 6, "topk_group": 3})


def defined(logits: list[float], bias: list[float], config) -> dict[int, float]:
    """Expert -> weight of one token."""
    scores = [1 / (1 + math.exp(-x)) for x in logits]
    choice = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(logits) // config.n_group
    worth = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(config.n_group)]
    groups = sorted(range(config.n_group), key=lambda g: (-worth[g], g))[: config.topk_group]
    experts = sorted((e for g in groups for e in range(g * size, (g + 1) * size)), key=lambda e: (-choice[e], e))
    experts = experts[: config.num_experts_per_tok]
    total = sum(scores[e] for e in experts) if config.norm_topk_prob else 1.0
    return {e: scores[e] / total * config.routed_scaling_factor for e in experts}


@pytest.mark.parametrize("normed", [True, False])
def test_routes_as_defined(normed):
    config = dataclasses.replace(CONFIG, norm_topk_prob=normed)
    draw = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(200, 24, generator=draw), torch.randn(24, generator=draw) * 0.3
    experts, weights = route(logits, bias, config)
    for t in range(200):
        wanted = defined(logits[t].tolist(), bias.tolist(), config)
        assert dict(zip(experts[t].tolist(), weights[t].tolist(), strict=True)) == pytest.approx(wanted, rel=1e-5)


def test_the_bias_chooses_but_does_not_weigh():
    logits, bias = torch.zeros(1, 24), torch.zeros(24)
    bias[[5, 7, 20]] = 10.0
    experts, weights = route(logits, bias, CONFIG)
    assert set(experts[0].tolist()) == {5, 7, 20}
    torch.testing.assert_close(weights, torch.full((1, 3), CONFIG.routed_scaling_factor / 3))


def test_a_closed_group_gives_no_expert():
    """One strong expert does not open a group: its two best count."""
    logits = torch.full((1, 24), -2.0)
    logits[0, 0] = 1.5  # alone in group 0
    for group in (1, 2, 3):
        logits[0, 4 * group : 4 * group + 2] = 1.0
    experts, _ = route(logits, torch.zeros(24), CONFIG)
    assert set(experts[0].tolist()) == {4, 5, 8}, "ties go to the smaller expert"


def test_negative_choices_are_not_taken_for_closed():
    experts, _ = route(torch.zeros(1, 24), torch.full((24,), -3.0), CONFIG)
    assert experts.tolist() == [[0, 1, 2]]


def random_experts() -> tuple[MoE, torch.Generator]:
    draw = torch.Generator().manual_seed(1)
    mlp = MoE(CONFIG, torch.float32, Alone()).requires_grad_(False)
    for p in mlp.parameters():
        p.normal_(std=0.1, generator=draw)
    return mlp, draw


@pytest.mark.parametrize("tokens", [1, 2, 60])
def test_one_product_for_all_experts_is_a_product_for_each(tokens):
    """What a GPU runs, on a CPU: experts that nobody goes to, and one that several do."""
    mlp, draw = random_experts()
    x = torch.randn(tokens, CONFIG.hidden_size, generator=draw)
    routed = route(x @ mlp.router.T, mlp.bias, CONFIG)
    torch.testing.assert_close(mlp.grouped(x, *routed), mlp.looped(x, *routed), rtol=1e-4, atol=1e-5)


def test_experts_add_up():
    mlp, draw = random_experts()
    x = torch.randn(9, CONFIG.hidden_size, generator=draw)
    got = mlp(x)

    def swiglu(row, gate_up, down):
        gate, up = (gate_up.double() @ row).chunk(2)
        return down.double() @ (gate * gate.sigmoid() * up)

    for t, row in enumerate(x.double()):
        wanted = swiglu(row, mlp.shared.gate_up, mlp.shared.down)
        for expert, weight in defined((mlp.router.double() @ row).tolist(), mlp.bias.tolist(), CONFIG).items():
            wanted = wanted + weight * swiglu(row, mlp.gate_up[expert], mlp.down[expert])
        torch.testing.assert_close(got[t].double(), wanted, rtol=1e-4, atol=1e-5)
