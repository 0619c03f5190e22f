"""Published DSA checkpoints into ``DsaModel``: which tensor fills which memory, and the FP8 weights in blocks of 128 x 128.

``docs/checkpoints.md`` walks through the tensors.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from thresher.cache.fp8 import decode_e4m3
from thresher.distributed.collectives import Alone, Collectives, own_heads, share_heads
from thresher.errors import require
from thresher.models.dsa_config import BLOCK, DsaConfig, parse_config
from thresher.models.dsa_layers import DsaAttention, DsaLayer, DsaModel
from thresher.models.dsa_moe import MoE
from thresher.models.shards import FETCH, Entry, read_entries, read_json, read_tensors

SCALE = "_scale_inv"
"""What follows an FP8 weight's name in its scales'. They multiply, whatever the name says."""
DTYPES = (torch.bfloat16, torch.float32)


def to_stderr(line: str) -> None:
    """Where a loader's remarks go unless said otherwise."""
    sys.stderr.write(line)


@dataclass(frozen=True)
class Place:
    """The memory that a published tensor fills, over ranks with the rank's share of it.

    Attributes:
        memory: written to.
        may_be_fp8: whether it may be published as FP8 with block scales.
        dim: along which ranks share it out; None where each has all of it.
        count: of what: heads, inner dims or tokens, each as many rows or columns as another.
    """

    memory: Tensor
    may_be_fp8: bool = False
    dim: int | None = None
    count: int = 1

    def own(self, values: Tensor, ranks: Collectives) -> Tensor:
        """What of the whole tensor ``values`` belongs into ``memory`` on the rank that ``ranks`` is."""
        if self.dim is None:
            return values
        unit, mine = values.shape[self.dim] // self.count, own_heads(share_heads(self.count, ranks.ranks), ranks.rank)
        return values.narrow(self.dim, unit * mine.start, unit * (mine.stop - mine.start))


def places(model: DsaModel) -> Iterator[tuple[str, Place]]:
    """Every tensor that a published checkpoint of this model holds, by its name there, layer after layer."""
    vocab = model.config.vocab_size
    yield "model.embed_tokens.weight", Place(model.embed.weight, dim=0, count=vocab)
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, DsaLayer)
        for name, place in _of_layer(layer, model.config):
            yield f"model.layers.{number}.{name}", place
    yield "model.norm.weight", Place(model.norm.weight)
    if model.head is not None:
        yield "lm_head.weight", Place(model.head.weight, dim=0, count=vocab)


def share_model(whole: DsaModel, ranks: Collectives) -> DsaModel:
    """The weights of one rank, copied out of a whole model; frozen."""
    with torch.device("meta"):
        shapes = DsaModel(whole.config, whole.embed.weight.dtype, ranks)
    model = shapes.to_empty(device=whole.device).requires_grad_(False)
    for (_, place), (_, full) in zip(places(model), places(whole), strict=True):
        place.memory.copy_(place.own(full.memory, ranks))
    return model.eval()


def load_model(
    folder: Path | str,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    write: Callable[[str], object] = to_stderr,
    ranks: Collectives | None = None,
) -> DsaModel:
    """A published checkpoint, with FP8 weights expanded to ``dtype``, frozen.

    Names, shapes and dtypes of all tensors are checked before memory is taken; then one shard is read at a time. The router, its bias and
    the indexer's head weights and key norm stay fp32. The layers for multi-token prediction are left out, which ``write`` is told.

    Args:
        folder: with ``config.json``, ``model.safetensors.index.json`` and the shards.
        dtype: bfloat16 or float32.
        device: where the model goes.
        write: takes a line.
        ranks: the ranks, of which this process is one: it reads all tensors and keeps its share of each. None for the whole model.

    Raises:
        ThresherError: naming the field, file or tensor: a config that ``parse_config`` refuses, a tensor that is missing, unknown or of
            another shape or dtype, a shard that is missing or cut short; more ranks than attention heads.
    """
    ranks = ranks or Alone()
    folder = Path(folder)
    require(dtype in DTYPES, "dtype must be bfloat16 or float32", dtype, "pass torch.bfloat16")
    config = parse_config(read_json(folder / "config.json"))
    entries = read_entries(folder)
    with torch.device("meta"):
        shapes, mine = DsaModel(config, dtype), DsaModel(config, dtype, ranks)
    scales = _check(dict(places(shapes)), entries, config)
    skipped = [name for name in entries if _is_prediction(name, config)]
    if skipped:
        write(f"{len(skipped)} tensors of the layers for multi-token prediction are left out, {min(skipped)} first\n")
    model = mine.to_empty(device=device).requires_grad_(False)
    targets = dict(places(model))
    for name, values, blocks in read_tensors(folder, entries, scales):
        values = values.to(model.device)
        whole = values if blocks is None else dequantize_blocks(values, blocks.to(model.device))
        targets[name].memory.copy_(targets[name].own(whole, ranks))
    return model.eval()


def dequantize_blocks(values: Tensor, scales: Tensor) -> Tensor:
    """FP8 weights times the scale of their block.

    Args:
        values: float8_e4m3fn ``[R, C]``.
        scales: fp32 ``[ceil(R / 128), ceil(C / 128)]``; the last blocks may be cut off.

    Returns:
        fp32 ``[R, C]``.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.
    """
    rows, columns = values.shape
    out = decode_e4m3(values, torch.float32)
    for row in range(0, rows, BLOCK):  # a strip at a time, so that no second matrix of the weights' size is held
        out[row : row + BLOCK] *= scales[row // BLOCK].repeat_interleave(BLOCK)[:columns]
    return out


def _check(wanted: dict[str, Place], entries: dict[str, Entry], config: DsaConfig) -> dict[str, str | None]:
    """Raise unless the files hold the wanted tensors, as the config says, and no others. Gives tensor -> its scales, or None."""
    scales: dict[str, str | None] = {}
    for name, place in wanted.items():
        require(name in entries, f"the checkpoint must hold the tensor {name}", "none", FETCH)
        got, shape = entries[name], tuple(place.memory.shape)
        require(got.shape == shape, f"{name} must be {list(shape)}, as config.json says", got.shape, "fetch both files again")
        quantized = got.dtype == "F8_E4M3"
        fits = place.may_be_fp8 and config.quantized if quantized else got.dtype in ("BF16", "F32")
        kinds = "BF16, F32 or F8_E4M3" if place.may_be_fp8 and config.quantized else "BF16 or F32"
        require(fits, f"{name} must be {kinds}", got.dtype, "pass a checkpoint in bf16, or in FP8 with block scales")
        scales[name] = name + SCALE if quantized else None
        if quantized:
            _check_scale(name + SCALE, entries, (-(-shape[0] // BLOCK), -(-shape[1] // BLOCK)))
    known = {*scales, *filter(None, scales.values())}
    extra = sorted(name for name in entries if name not in known and not _is_prediction(name, config))
    require(not extra, "the checkpoint must hold no tensor that this model has no place for", ", ".join(extra[:3]), "check config.json")
    return scales


def _check_scale(name: str, entries: dict[str, Entry], shape: tuple[int, int]) -> None:
    require(name in entries, f"the checkpoint must hold the block scales {name}", "none", FETCH)
    got = entries[name]
    must = f"{name} must be F32 {list(shape)}, one for a block of {BLOCK} x {BLOCK}"
    require(got.dtype == "F32" and got.shape == shape, must, f"{got.dtype} {list(got.shape)}", FETCH)


def _is_prediction(name: str, config: DsaConfig) -> bool:
    """Whether a tensor belongs to the layers after the last, which draft further tokens."""
    extra = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    return any(name.startswith(f"model.layers.{layer}.") for layer in extra)


def _of_layer(layer: DsaLayer, config: DsaConfig) -> Iterator[tuple[str, Place]]:
    yield "input_layernorm.weight", Place(layer.input_norm.weight)
    yield "post_attention_layernorm.weight", Place(layer.mlp_norm.weight)
    for name, place in _of_attention(layer.attention, config.num_attention_heads):
        yield f"self_attn.{name}", place
    if isinstance(layer.mlp, MoE):
        yield from _of_experts(layer.mlp, config)
    else:
        yield from _swiglu("mlp", layer.mlp.gate_up, layer.mlp.down, config.intermediate_size)


def _of_attention(attention: DsaAttention, heads: int) -> Iterator[tuple[str, Place]]:
    query, latent, rope, key = attention.rows
    q_a, kv_a, wk = attention.low.split([query, latent + rope, key])
    yield "q_a_proj.weight", Place(q_a, True)
    yield "q_a_layernorm.weight", Place(attention.q_norm.weight)
    yield "q_b_proj.weight", Place(attention.q_b.weight, True, 0, heads)
    yield "kv_a_proj_with_mqa.weight", Place(kv_a, True)
    yield "kv_a_layernorm.weight", Place(attention.kv_norm.weight)
    yield "kv_b_proj.weight", Place(attention.kv_b.flatten(0, 1), True, 0, heads)
    yield "o_proj.weight", Place(attention.o.weight, True, 1, heads)
    if attention.indexer is not None:
        yield "indexer.wq_b.weight", _linear(attention.indexer.wq_b)
        yield "indexer.wk.weight", Place(wk, True)
        yield "indexer.k_norm.weight", Place(attention.indexer.k_norm.weight)
        yield "indexer.k_norm.bias", Place(attention.indexer.k_norm.bias)
        yield "indexer.weights_proj.weight", Place(attention.indexer.weights_proj.weight)


def _of_experts(mlp: MoE, config: DsaConfig) -> Iterator[tuple[str, Place]]:
    inner = config.moe_intermediate_size
    yield "mlp.gate.weight", Place(mlp.router)
    yield "mlp.gate.e_score_correction_bias", Place(mlp.bias)
    yield from _swiglu("mlp.shared_experts", mlp.shared.gate_up, mlp.shared.down, inner * config.n_shared_experts)
    for expert in range(len(mlp.gate_up)):
        yield from _swiglu(f"mlp.experts.{expert}", mlp.gate_up[expert], mlp.down[expert], inner)


def _swiglu(name: str, gate_up: Tensor, down: Tensor, inner: int) -> Iterator[tuple[str, Place]]:
    gate, up = gate_up.chunk(2)
    yield f"{name}.gate_proj.weight", Place(gate, True, 0, inner)
    yield f"{name}.up_proj.weight", Place(up, True, 0, inner)
    yield f"{name}.down_proj.weight", Place(down, True, 1, inner)


def _linear(linear: nn.Linear) -> Place:
    return Place(linear.weight, True)
