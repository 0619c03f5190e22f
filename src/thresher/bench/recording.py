"""``thresher record``: a real model's index queries, keys and head weights on file, for ``thresher bench --inputs recorded``.

SmolLM2 reads the demo's text, with a fact planted in the middle and a question about it at the end, densely. What the shipped indexers make
of it is stored layer by layer; a benchmark takes each layer as a request. The layout is in docs/formats.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from thresher.cache.fp8 import decode_e4m3
from thresher.errors import ThresherError, require
from thresher.eval.needle import build_needle
from thresher.eval.rundir import atomic_path
from thresher.eval.source import source_state
from thresher.models.checkpoint import SHIPPED, load_indexers, load_record
from thresher.models.indexer import Indexer, indexer_at
from thresher.models.llama import LayerInput, Llama, causal_attention
from thresher.models.smollm2 import CONFIG, load_model, load_tokenizer
from thresher.ops import hadamard, quantize_fp8

LAYERS = tuple(range(0, CONFIG.num_hidden_layers, 4))
LENGTH = 7680
QUERIES = 1024
DEPTH = 0.5


def record_inputs(
    out: str | Path,
    layers: Sequence[int] = LAYERS,
    length: int = LENGTH,
    queries: int = QUERIES,
    device: str = "cpu",
    weights: Path = SHIPPED,
) -> str:
    """Run the model over a real text and write what its indexers make of it.

    Args:
        out: a safetensors file that does not exist yet; it is there whole or not at all.
        layers: which layers, each once; one request of the file each, in this order.
        length: tokens of context.
        queries: of the first layer named, those of the last ``queries`` tokens are kept (a prefill reads the first request); of the
            others only the last token's, which is all that a decoding step reads.
        device: "cpu" or "cuda".
        weights: the indexers.

    Returns:
        one line: what was written.

    Raises:
        ThresherError: numbers that do not fit, a file that exists already or cannot be written, or weights that cannot be read.
    """
    from safetensors.torch import save_file
    from tqdm import tqdm

    path = Path(out)
    record = load_record(weights)
    known, limit = record["num_layers"], CONFIG.max_position_embeddings
    fitting = len(layers) > 0 and len(set(layers)) == len(layers) and all(0 <= layer < known for layer in layers)
    require(fitting, f"layers must be different ones of 0..{known - 1}", " ".join(map(str, layers)) or "none", "name each once")
    require(1 <= length <= limit, f"length must lie in 1..{limit}, the model's positions", length, "change --length")
    require(1 <= queries <= length, f"queries must lie in 1..{length}, the last of the context", queries, "change --queries")
    require(not path.exists(), "the file to record to must not exist yet", path, "choose another name or remove it")
    indexers = load_indexers(weights, device)
    tokenizer, model = load_tokenizer(), load_model(device=device)
    needle = build_needle(tokenizer, length, DEPTH)
    ids = torch.tensor(needle.context_ids + needle.question_ids, device=device)
    with tqdm(total=CONFIG.num_hidden_layers, unit="layer", dynamic_ncols=True) as bar:
        tensors = recorded_tensors(model, indexers, ids, layers, queries, bar.update)
    commit, _ = source_state()
    made_by = {
        "model": "SmolLM2-135M-Instruct",
        "indexers_sha256": record["sha256"],
        "text": f"pydoc_data.topics, a fact at {DEPTH}",
        "layers": " ".join(map(str, layers)),
        "device": device,
        "torch": torch.__version__,
        "commit": commit or "unknown",
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, made_by)
    except OSError as error:
        raise ThresherError(f"the file to record to must be writable; got {path} ({error.strerror}); choose another place") from error
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    return f"{path}: {shapes}; {path.stat().st_size / 1e6:.1f} MB"


@torch.no_grad()
def recorded_tensors(
    model: Llama,
    indexers: nn.ModuleList,
    ids: Tensor,
    layers: Sequence[int],
    queries: int,
    done: Callable[[], object] = lambda: None,
) -> dict[str, Tensor]:
    """What the file holds, on a CPU, from one dense pass.

    Args:
        model: the dense model.
        indexers: one a layer.
        ids: int64 ``[N]``, the context.
        layers: R of them.
        queries: kept of the first layer named, at most N.
        done: called after each layer of the model.

    Returns:
        ``q`` bf16 ``[sum(rows), H, D]``, ``weights`` fp32 ``[sum(rows), H]``, ``rows`` int64 ``[R]`` and ``k`` bf16 ``[R, N, D]``.
    """
    parts: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def attend(given: LayerInput) -> Tensor:
        if given.layer in layers:
            parts[given.layer] = _layer(indexer_at(indexers, given.layer), given, queries if given.layer == layers[0] else 1)
        done()
        return causal_attention(given)

    model(ids, torch.arange(len(ids), device=ids.device), attend)
    q, weights, k = zip(*(parts[layer] for layer in layers), strict=True)
    return {"q": torch.cat(q), "weights": torch.cat(weights), "rows": torch.tensor([len(part) for part in q]), "k": torch.stack(k)}


def _layer(indexer: Indexer, given: LayerInput, queries: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden, positions = given.hidden[-queries:], given.positions[-queries:]
    q, _ = indexer.queries(hidden, positions)
    k = storable(*indexer.index_keys(given.hidden, given.positions))
    return storable(*quantize_fp8(hadamard(q))).cpu(), indexer.head_weights(hidden).cpu(), k.cpu()


def storable(values: Tensor, scales: Tensor) -> Tensor:
    """bf16 that ``quantize_fp8`` turns back into these very bytes and scales.

    ``value * scale`` is exact in bf16. But where a vector's largest value was rounded down to 224, twice the values under half the scale
    are the same numbers, and quantising would choose those. So its largest are stored as 225, which rounds to 224 and keeps the scale.

    Args:
        values: float8_e4m3fn ``[..., D]`` as ``quantize_fp8`` gives them.
        scales: fp32 ``[...]``.
    """
    x = decode_e4m3(values, torch.float32)
    size = x.abs()
    x = torch.where((size == 224) & (size.amax(-1, keepdim=True) == 224), x.sign() * 225, x)
    return (x * scales.unsqueeze(-1)).bfloat16()
