"""``thresher bench-model``: a step of decoding at a model's true layer shapes, checked, timed and recorded; its memory against the plan.

Started by ``torchrun`` the model and the caches are shared out over the ranks; a time is the slowest rank's, and rank 0 has the record.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from thresher.bench.cases import size_text
from thresher.bench.floor import LATENT_BYTES, LATENT_DIM, VALUE_DIM, floor_us, measure_ceilings
from thresher.bench.model_check import CHECKED, check_model, check_over_ranks
from thresher.bench.model_step import ModelStep, layers_of, without_indexers
from thresher.bench.plan_models import ModelShape
from thresher.bench.plan_rows import WAYS, size_of
from thresher.bench.rank_run import exchange_of
from thresher.bench.ranks import together
from thresher.bench.record import RESULTS, Record, append, ran_on, results_path
from thresher.bench.timing import Quantiles, Step, held_bytes, in_turns, interleave, interleave_ranks
from thresher.bench.work import all_preferred
from thresher.distributed.collectives import Alone, Collectives, ProcessGroup
from thresher.distributed.group import agree
from thresher.distributed.parse import place
from thresher.errors import require
from thresher.models.dsa_config import DsaConfig, parse_config
from thresher.models.dsa_decoder import DsaDecoder
from thresher.models.dsa_layers import DsaAttention, DsaModel
from thresher.models.dsa_moe import MoE
from thresher.models.dsa_weights import share_model
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
        placement: of the tokens over ranks, as for ``DsaDecoder``, every one with all of these; without ranks there is none to name.
        out: a file to append to; None for ``benchmarks/results/model`` on a GPU, and for nothing on a CPU.
    """

    model: str
    layers: int = 2
    experts: int = 16
    context: tuple[str, ...] = ("8k", "32k", "128k", "512k")
    batch: tuple[int, ...] = (1,)
    selector: tuple[str, ...] = ("dense", "dsa", "hisa")
    placement: tuple[str, ...] = ()
    device: str = "cuda"
    seed: int = 0
    repeats: int = 20
    out: Path | None = None


def run_model(settings: Settings, write: Callable[[str], None], ranks: Collectives | None = None) -> list[Record]:
    """Check the model once, then time every placement, batch, context and selector; each record is written as soon as it is there.

    Args:
        settings: what is asked for.
        write: takes a line for each record; of rank 0 alone.
        ranks: what carries the exchanges, where there are several processes, of the default process group.

    Raises:
        ThresherError: an option that does not fit (before anything runs), or a check that fails, on all ranks alike; no time is taken then.
    """
    ranks = ranks or Alone()
    device = torch.device("cuda", torch.cuda.current_device()) if settings.device == "cuda" else torch.device(settings.device)
    group = Alone() if ranks.ranks == 1 else ProcessGroup()
    if ranks.ranks > 1:
        agree(group, {"version": version("thresher"), "options": settings}, settings.device)
    contexts = [size_of(text) for text in settings.context]
    require(bool(contexts) and min(contexts) >= 2, "--context must name contexts of 2 tokens or more", settings.context, "32k, say")
    require(min(settings.batch, default=0) >= 1, "--batch must name numbers of requests", settings.batch, "1, say")
    config = config_of(settings, max(contexts))
    selectors = {text: parse(text, defaults={"topk": config.index_topk}) for text in settings.selector}
    require(bool(selectors), "--selector must name at least one", "none", "dense dsa hisa, say")
    placements = placements_of(settings, ranks.ranks)
    before = held_bytes(device)
    model = together(group, device, lambda: _checked_model(settings, config, selectors, placements, min(CHECKED, max(contexts)), ranks))
    records = []
    for placement, batch, context in product(placements, dict.fromkeys(settings.batch), dict.fromkeys(contexts)):
        decoder = together(group, device, partial(_filled, settings, model, placement, batch, context))
        for text, selector in selectors.items():
            record = _measure(settings, decoder, text.partition(":")[0].strip(), selector, before, group)
            if ranks.rank == 0:
                path = settings.out or (FOLDER / results_path(record.gpu, record.date).name if device.type == "cuda" else None)
                if path is not None:
                    append(path, record)
                write(line_of(record))
            records.append(record)
    return records


def placements_of(settings: Settings, ranks: int) -> tuple[str, ...]:
    """Where tokens may live: over ranks all three ways unless some are named.

    Raises:
        ThresherError: a placement without ranks, or one that cannot be read or is for another number of them.
    """
    if ranks == 1:
        do = "torchrun --nproc-per-node 2 -m thresher bench-model starts two"
        require(not settings.placement, "--placement must come with several processes", " ".join(settings.placement), do)
        return WAYS[:1]
    named = tuple(dict.fromkeys(settings.placement or WAYS))
    for text in named:
        (where,) = place(text, [Dense()], ranks)
        must = f"a placement must be for the {ranks} ranks there are"
        require(where.placement.ranks == ranks, must, repr(text), "leave out how many")
    return named


def _checked_model(
    settings: Settings, config: DsaConfig, selectors: dict[str, Selector], placements: Sequence[str], length: int, ranks: Collectives
) -> DsaModel:
    """This rank's share of a random model; the whole one is checked by rank 0, and what the ranks make of it by all."""
    device = torch.device(settings.device)
    whole = random_model(config, torch.bfloat16, device, settings.seed)
    model = whole if ranks.ranks == 1 else share_model(whole, ranks)
    for made in {whole, model} if device.type == "cuda" else ():
        for layer in layers_of(made):
            layer.compile()
    for batch in dict.fromkeys(settings.batch):  # each is compiled for itself
        if ranks.rank == 0:
            check_model(whole, selectors, batch, length, settings.seed)
        for placement in placements if ranks.ranks > 1 else ():
            check_over_ranks(whole, model, placement, selectors, batch, length, settings.seed)
    return model


def _filled(settings: Settings, model: DsaModel, placement: str, batch: int, context: int) -> DsaDecoder:
    decoder = DsaDecoder(model, context, batch, placement=placement)
    decoder.fill(context, settings.seed)
    return decoder


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


def planned_bytes(
    config: DsaConfig, selector: Selector, context: int, batch: int, ranks: int = 1, dealt: bool = False
) -> dict[str, int]:
    """What the planner says a rank holds of the weights and of the caches of all requests, and the most there is at once, which to it is
    both. With ``dealt`` tokens are shared out as the weights are."""
    shape = shape_of(config)
    split, full = shape.parameters
    held = -(-context // ranks) if dealt else context
    weights, caches = WEIGHT_BYTES * (-(-split // ranks) + full), batch * shape.cache_bytes(selector, held)
    return {"weights": weights, "caches": caches, "peak": weights + caches}


def useful_work(
    attention: DsaAttention, selector: Selector, context: int, batch: int, ranks: int = 1, dealt: bool = False
) -> tuple[float, float]:
    """``(flops, bytes)`` of one layer's attention block on a rank: every weight it has once, and what its indexer and attention read of the
    caches. With ``dealt`` it holds a share of the tokens, and attends to its share of those selected with all heads."""
    config, dense = attention.config, isinstance(selector, Dense)
    weights: list[Tensor] = [p for name, p in attention.named_parameters() if not (dense and name.startswith("indexer."))]
    if dense:  # nor the index key's rows
        weights = [p[: sum(attention.rows[:3])] if p is attention.low else p for p in weights]
    kept = min(context, selector.topk or context)
    held, heads = context, len(attention.kv_b)
    if dealt:
        held, kept, heads = -(-context // ranks), -(-kept // ranks), config.num_attention_heads
    flops = 2.0 * sum(p.numel() for p in weights) + selector.index_flops(held, config.index_n_heads, config.index_head_dim)
    flops += 2.0 * heads * (LATENT_DIM + VALUE_DIM) * kept
    moved = selector.index_bytes(held, config.index_n_heads, config.index_head_dim) + LATENT_BYTES["layer"] * kept
    return batch * flops, sum(p.nbytes for p in weights) + batch * moved


def line_of(record: Record) -> str:
    """One line for the terminal: times of a layer's parts and of the whole step, and memory."""
    told = record.settings
    way = f" {told['placement']}" if record.ranks > 1 else ""
    parts = [f"attention {record.time_us['p50']:.1f} us"]
    parts += [f"{name} {told['parts_us'][name]['p50']:.1f}" for name in ("inner", "mlp", "experts") if name in told["parts_us"]]
    text = f"{record.case} {record.selector}{way}: a layer's {', '.join(parts)}"
    step = told["parts_us"]["step"]["p50"]
    text += f"; step of {told['layers']} layers {step:.1f} us, {told['tokens_per_second']:.0f} tokens/s"
    for name, held in told["bytes"].items():
        planned = told["planned_bytes"][name]
        text += f"; {name} {held / 1e9:.3f} GB, planned {planned / 1e9:.3f} ({held / planned - 1:+.1%})"
    return text


def _measure(settings: Settings, decoder: DsaDecoder, name: str, selector: Selector, before: int, group: Collectives) -> Record:
    model, batch, context = decoder.model, decoder.table.num_requests, decoder.length()
    config, device = model.config, model.device
    timing = "graph" if device.type == "cuda" else "clock"
    count = group.ranks
    ids = torch.randint(config.vocab_size, (batch,), generator=torch.Generator().manual_seed(settings.seed)).to(device)
    ceilings = together(group, device, lambda: measure_ceilings(device))
    gc.collect()  # graphs of the selector before, and what they hold
    held = held_bytes(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with without_indexers(model) if isinstance(selector, Dense) else nullcontext():
        ways = together(group, device, lambda: _ways(ModelStep(decoder, selector, ids)))
        if timing == "graph":
            ways = {way: in_turns(steps) for way, steps in ways.items()}
        taken = together(group, device, lambda: _times(ways, device, settings, timing, group))
    times = {way: asdict(quantiles) for way, quantiles in taken.items()}
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    shared_out = (count, decoder.dealt)
    flops, moved = useful_work(layers_of(model)[0].attention, selector, context, batch, *shared_out)
    parts = {way: quantiles for way, quantiles in times.items() if way != "attention"}
    return Record(
        case=f"model-{settings.model}-{batch}x{size_text(context)}" + (f"-r{count}" if count > 1 else ""),
        op="attention",
        selector=name,
        settings={
            **asdict(selector),
            **{"timing": timing, "steps": len(ways["attention"]), "repeats": settings.repeats},
            **{"layers": settings.layers, "experts": settings.experts, "compiled": device.type == "cuda", "parts_us": parts},
            "tokens_per_second": round(1e6 * batch / times["step"]["p50"], 3),
            "bytes": _held(decoder) | ({} if peak is None else {"peak": peak - before}),
            "planned_bytes": planned_bytes(config, selector, context, batch, *shared_out),
            **({"placement": decoder.placement, "exchange": exchange_of(decoder.ranks)} if count > 1 else {}),
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
        ranks=count,
        peer_versions={},
        **ran_on(device),
    )


def _times(
    ways: dict[str, Sequence[Step]], device: torch.device, settings: Settings, timing: str, group: Collectives
) -> dict[str, Quantiles]:
    if group.ranks == 1:
        return interleave(ways, device, settings.repeats, timing)
    return interleave_ranks(ways, device, settings.repeats, timing, group)


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
