import pytest
import torch


@pytest.fixture(scope="session")
def real_model():
    """SmolLM2-135M-Instruct in fp32."""
    pytest.importorskip("gguf")
    from thresher.models.smollm2 import load_model

    return load_model(dtype=torch.float32)


@pytest.fixture(scope="session")
def real_tokenizer():
    pytest.importorskip("gguf")
    from thresher.models.smollm2 import load_tokenizer

    return load_tokenizer()
