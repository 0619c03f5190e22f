"""``thresher bench-model``: a step of decoding at a model's true layer shapes, checked, timed and recorded; its memory against the plan."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from thresher.bench.cases import size_text
from thresher.bench.floor import LATENT_BYTES, LATENT_DIM, VALUE_DIM, floor_us, measure_ceilings
from thresher.bench.model_check import CHECKED, check_model
from thresher.bench.model_step import ModelStep, layers_of, without_indexers
from thresher.bench.plan_models import ModelShape
from thresher.bench.plan_rows import size_of
from thresher.bench.record import RESULTS, Record, append, ran_on, results_path
from thresher.bench.timing import Step, held_bytes, in_turns, interleave
from thresher.bench.work import all_preferred
from thresher.errors import require
from thresher.models.dsa_config import DsaConfig, parse_config
from thresher.models.dsa_decoder import DsaDecoder
from thresher.models.dsa_layers import DsaAttention
from thresher.models.dsa_moe import MoE
from thresher.models.published import PUBLISHED, random_model, true_shapes
from thresher.models.tiny_checkpoint import TINY
from thresher.selectors import Dense, Selector
from thresher.selectors.parse import parse

FAMILY = {"deepseek-v3.2": "deepseek_v32", "glm-5": "glm_moe_dsa"}
FOLDER = RESULTS / "model"
WEIGHT_BYTES = 2  # of a parameter: weights are bf16 here, whatever they are published in


@dataclass(frozen=True)
class Settings:
    """What the command line asks for; see ``thresher bench-model --help``.

    Attributes:
        layers, experts: how many of the model's; all of its other sizes are true ones on a GPU, and tiny ones on a CPU.
        context, batch, selector: every one of them with every other.
        out: a file to append to; None for ``benchmarks/results/model`` on a GPU, and for nothing on a CPU.
    """

    model: str
    layers: int = 2
    experts: int = 16
    context: tuple[str, ...] = ("8k", "32k", "128k", "512k")
    batch: tuple[int, ...] = (1,)
    selector: tuple[str, ...] = ("dense", "dsa", "hisa")
    device: str = "cuda"
    seed: int = 0
    repeats: int = 20
    out: Path | None = None


def run_model(settings: Settings, write: Callable[[str], None]) -> list[Record]:
    """Check the model once, then time every batch, context and selector; each record is written as soon as it is there.

    Raises:
        ThresherError: an option that does not fit (before anything runs), or a check that fails (no time is taken then).
    """
    device = torch.device(settings.device)
    contexts = [size_of(text) for text in settings.context]
    require(bool(contexts) and min(contexts) >= 2, "--context must name contexts of 2 tokens or more", settings.context, "32k, say")
    require(min(settings.batch, default=0) >= 1, "--batch must name numbers of requests", settings.batch, "1, say")
    config = config_of(settings, max(contexts))
    selectors = {text: parse(text, defaults={"topk": config.index_topk}) for text in settings.selector}
    require(bool(selectors), "--selector must name at least one", "none", "dense dsa hisa, say")
    before = held_bytes(device)
    model = random_model(config, torch.bfloat16, device, settings.seed)
    check_model(model, selectors, min(CHECKED, max(contexts)), settings.seed)
    records = []
    for batch in dict.fromkeys(settings.batch):
        for context in dict.fromkeys(contexts):
            decoder = DsaDecoder(model, context, batch)
            decoder.fill(context, settings.seed)
            for text, selector in selectors.items():
                record = _measure(settings, decoder, text.partition(":")[0].strip(), selector, before)
                path = settings.out or (FOLDER / results_path(record.gpu, record.date).name if device.type == "cuda" else None)
                if path is not None:
                    append(path, record)
                write(line_of(record))
                records.append(record)
    return records


def config_of(settings: Settings, longest: int) -> DsaConfig:
    """The model's sizes, with room for ``longest`` positions. The first layer has a dense MLP where there are several."""
    require(settings.model in FAMILY, f"--model must be one of {', '.join(FAMILY)}", repr(settings.model), "choose another")
    family = FAMILY[settings.model]
    changes = {"first_k_dense_replace": min(1, settings.layers - 1), "max_position_embeddings": longest}
    if settings.device == "cuda":
        return true_shapes(family, settings.layers, settings.experts, **changes)
    tiny = {**PUBLISHED[family], **TINY[family], **changes, "indexer_types": None}
    return parse_config({**tiny, "num_hidden_layers": settings.layers, "n_routed_experts": settings.experts})


def shape_of(config: DsaConfig) -> ModelShape:
    """The sizes as the planner has them."""
    return ModelShape(
        title=config.family, layers=config.num_hidden_layers, index_layers=len(set(config.index_layers)), hidden=config.hidden_size,
        q_lora=config.q_lora_rank, kv_lora=config.kv_lora_rank, nope=config.qk_nope_head_dim, rope=config.qk_rope_head_dim,
        v_dim=config.v_head_dim, heads=config.num_attention_heads, index_heads=config.index_n_heads, index_dim=config.index_head_dim,
        topk=config.index_topk, dense_layers=config.sparse_mlp.count(False), dense_width=config.intermediate_size,
        experts=config.n_routed_experts, shared_experts=config.n_shared_experts, expert_width=config.moe_intermediate_size,
        vocab=config.vocab_size, positions=config.max_position_embeddings, source="a config",
    )  # fmt: skip


def planned_bytes(config: DsaConfig, selector: Selector, context: int, batch: int) -> dict[str, int]:
    """What the planner says of the weights, of the caches of all requests, and of the most there is at once, which to it is both."""
    shape = shape_of(config)
    weights, caches = WEIGHT_BYTES * sum(shape.parameters), batch * shape.cache_bytes(selector, context)
    return {"weights": weights, "caches": caches, "peak": weights + caches}


def useful_work(attention: DsaAttention, selector: Selector, context: int, batch: int) -> tuple[float, float]:
    """``(flops, bytes)`` of one layer's attention block: every weight once, and what the indexer and the attention read of the caches."""
    config, dense = attention.config, isinstance(selector, Dense)
    weights = [p for name, p in attention.named_parameters() if not (dense and name.startswith("indexer."))]
    kept = min(context, selector.topk or context)
    flops = 2.0 * sum(p.numel() for p in weights) + selector.index_flops(context, config.index_n_heads, config.index_head_dim)
    flops += 2.0 * config.num_attention_heads * (LATENT_DIM + VALUE_DIM) * kept
    moved = selector.index_bytes(context, config.index_n_heads, config.index_head_dim) + LATENT_BYTES["layer"] * kept
    return batch * flops, sum(p.nbytes for p in weights) + batch * moved


def line_of(record: Record) -> str:
    """One line for the terminal: times of a layer's parts and of the whole step, and memory."""
    told = record.settings
    parts = [f"attention {record.time_us['p50']:.1f} us"]
    parts += [f"{name} {told['parts_us'][name]['p50']:.1f}" for name in ("inner", "mlp", "experts") if name in told["parts_us"]]
    text = f"{record.case} {record.selector}: a layer's {', '.join(parts)}"
    step = told["parts_us"]["step"]["p50"]
    text += f"; step of {told['layers']} layers {step:.1f} us, {told['tokens_per_second']:.0f} tokens/s"
    for name, held in told["bytes"].items():
        planned = told["planned_bytes"][name]
        text += f"; {name} {held / 1e9:.3f} GB, planned {planned / 1e9:.3f} ({held / planned - 1:+.1%})"
    return text


def _measure(settings: Settings, decoder: DsaDecoder, name: str, selector: Selector, before: int) -> Record:
    model, batch, context = decoder.model, decoder.table.num_requests, decoder.length()
    config, device = model.config, model.device
    timing = "graph" if device.type == "cuda" else "clock"
    ids = torch.randint(config.vocab_size, (batch,), generator=torch.Generator().manual_seed(settings.seed)).to(device)
    ceilings = measure_ceilings(device)
    gc.collect()  # graphs of the selector before, and what they hold
    held = held_bytes(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with without_indexers(model) if isinstance(selector, Dense) else nullcontext():
        ways = _ways(ModelStep(decoder, selector, ids))
        if timing == "graph":
            ways = {way: in_turns(steps) for way, steps in ways.items()}
        times = {way: asdict(taken) for way, taken in interleave(ways, device, settings.repeats, timing).items()}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    flops, moved = useful_work(layers_of(model)[0].attention, selector, context, batch)
    parts = {way: taken for way, taken in times.items() if way != "attention"}
    return Record(
        case=f"model-{settings.model}-{batch}x{size_text(context)}",
        op="attention",
        selector=name,
        settings={
            **asdict(selector),
            **{"timing": timing, "steps": len(ways["attention"]), "repeats": settings.repeats},
            **{"layers": settings.layers, "experts": settings.experts, "parts_us": parts},
            "tokens_per_second": round(1e6 * batch / times["step"]["p50"], 3),
            "bytes": _held(decoder) | ({} if peak is None else {"peak": peak - before}),
            "planned_bytes": planned_bytes(config, selector, context, batch),
        },
        inputs="normal",
        seed=settings.seed,
        impl=all_preferred(device),
        peer=None,
        time_us=times["attention"],
        peer_time_us=None,
        ratio=None,
        useful_flops=flops,
        useful_bytes=moved,
        floor_us=floor_us(ceilings, "layer", flops, moved),
        peak_bytes=None if peak is None else peak - held,
        rows_redone=None,
        ranks=1,
        peer_versions={},
        **ran_on(device),
    )


def _ways(step: ModelStep) -> dict[str, Sequence[Step]]:
    """The attention blocks, what lies between their projections, the MLPs, the experts, the whole step; a sample counts the mean over the
    layers that have the part."""

    def part(run: Callable[[int], object], layer: int) -> Step:
        return lambda: run(layer)

    sparse = [isinstance(layer.mlp, MoE) for layer in step.layers]
    ways: dict[str, Sequence[Step]] = {
        "attention": [part(step.attention, layer) for layer in range(len(sparse))],
        "inner": [part(step.inner, layer) for layer in range(len(sparse))],
        "mlp": [part(step.mlp, layer) for layer, routed in enumerate(sparse) if not routed],
        "experts": [part(step.mlp, layer) for layer, routed in enumerate(sparse) if routed],
        "step": [step.whole],
    }
    return {way: steps for way, steps in ways.items() if steps}


def _held(decoder: DsaDecoder) -> dict[str, int]:
    """Bytes of weights and of caches, by their tensors."""
    return {"weights": sum(p.nbytes for p in decoder.model.parameters()), "caches": sum(cache.nbytes for cache in decoder.caches)}
