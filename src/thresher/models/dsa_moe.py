"""The feed-forward part of the DSA models: SwiGLU, and experts that a token is routed to (DeepSeek-V3, arXiv 2412.19437, section 2.1.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thresher.distributed.collectives import Collectives, own_share
from thresher.models.dsa_config import DsaConfig


class MLP(nn.Module):
    """SwiGLU; the rows of gate and up stand in one matrix. A rank has some of its inner dims, and makes a part of a sum."""

    def __init__(self, hidden: int, inner: int, dtype: torch.dtype, ranks: Collectives) -> None:
        super().__init__()
        inner = own_share(inner, ranks)
        self.gate_up = nn.Parameter(torch.empty(2 * inner, hidden, dtype=dtype))
        self.down = nn.Parameter(torch.empty(hidden, inner, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return _swiglu(x, self.gate_up, self.down)


class MoE(nn.Module):
    """Routed experts, and a shared one that every token goes through. The router is fp32.

    A rank has some inner dims of every expert, so that all ranks have as much to do whatever is routed, and makes a part of a sum.
    """

    def __init__(self, config: DsaConfig, dtype: torch.dtype, ranks: Collectives) -> None:
        super().__init__()
        self.config = config
        experts, hidden, inner = config.n_routed_experts, config.hidden_size, own_share(config.moe_intermediate_size, ranks)
        self.router = nn.Parameter(torch.empty(experts, hidden, dtype=torch.float32))
        self.bias = nn.Parameter(torch.empty(experts, dtype=torch.float32))
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, hidden, dtype=dtype))
        self.down = nn.Parameter(torch.empty(experts, hidden, inner, dtype=dtype))
        self.shared = MLP(hidden, config.moe_intermediate_size * config.n_shared_experts, dtype, ranks)

    def forward(self, x: Tensor) -> Tensor:
        experts, weights = route(F.linear(x.float(), self.router), self.bias, self.config)
        routed = self.grouped if x.is_cuda else self.looped
        return (self.shared(x).float() + routed(x, experts, weights)).to(x.dtype)

    def looped(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """What the routed experts add, one after the other: fp32 ``[T, hidden]``. Experts and weights are as ``route`` gives them."""
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in experts.unique().tolist():
            token, place = (experts == expert).nonzero(as_tuple=True)
            out[token] += _swiglu(x[token], self.gate_up[expert], self.down[expert]).float() * weights[token, place, None]
        return out

    def grouped(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """As ``looped``, all experts in one product. In bf16 on compute capability 9.0 or newer no value is read on the host, so that a
        CUDA graph can hold it."""
        chosen, order = experts.flatten().sort(stable=True)
        ends = torch.searchsorted(chosen, torch.arange(len(self.gate_up), device=x.device), right=True, out_int32=True)
        given = x[order // experts.shape[1]]
        gate, up = F.grouped_mm(given, self.gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
        made = F.grouped_mm(F.silu(gate) * up, self.down.transpose(1, 2), offs=ends)
        each = torch.empty_like(made)
        each[order] = made
        return (each.unflatten(0, experts.shape).float() * weights[..., None]).sum(1)


def route(logits: Tensor, bias: Tensor, config: DsaConfig) -> tuple[Tensor, Tensor]:
    """Which experts a token goes to, and what each of them weighs.

    The bias takes part in the choice alone. A group is worth its two best experts; only the ``topk_group`` best groups are open.

    Args:
        logits: fp32 ``[T, experts]``.
        bias: fp32 ``[experts]``.
        config: how many groups, experts, and how weights are scaled.

    Returns:
        int64 and fp32 ``[T, num_experts_per_tok]``, the best first; ties to the smaller expert or group.
    """
    scores = logits.sigmoid()
    choice = scores + bias
    worth = choice.unflatten(-1, (config.n_group, -1)).topk(2, dim=-1).values.sum(-1)
    open_groups = torch.zeros_like(worth, dtype=torch.bool).scatter_(1, _best(worth, config.topk_group), True)
    closed = ~open_groups.repeat_interleave(config.n_routed_experts // config.n_group, dim=1)
    experts = _best(choice.masked_fill(closed, -torch.inf), config.num_experts_per_tok)
    weights = scores.gather(1, experts)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts, weights * config.routed_scaling_factor


def _best(worth: Tensor, count: int) -> Tensor:
    return worth.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def _swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(F.silu(gate) * up, down)
