"""Megatron's own text generation servers on a CPU, with a tiny model of random weights.

What comes in: `static` or `dynamic`, and a port. What goes out: Megatron-Core's real routes on it,
until the process is killed. A program of its own: what it does to torch, to run without CUDA, must
not reach a test. The dynamic server's engine needs a GPU; here its routes are answered by the
static engine.

`python -m tests.worker.megatron_server static 5000`
"""

from __future__ import annotations

import inspect
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

VOCABULARY = 260
_FIRST_BYTE = 3


class Bytes:
    """A tokenizer with a token for each byte, shown as Latin-1 so that each is one character."""

    eod, bos, pad, vocab_size = 1, 0, 0, VOCABULARY
    unique_identifiers: dict[str, str] = {}  # noqa: RUF012  # Megatron reads it of any tokenizer

    def tokenize(self, text: str) -> list[int]:
        return [_FIRST_BYTE + byte for byte in text.encode("latin-1")]

    def detokenize(self, ids: list[int], **_: object) -> str:
        shown = [min(max(int(id) - _FIRST_BYTE, 0), 255) for id in ids]
        return bytes(shown).decode("latin-1")

    def offsets(self, ids: list[int], text: str) -> list[int]:
        return list(range(len(ids)))

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> list[int]:
        return self.tokenize("".join(f"<{m['role']}>{m['content']}" for m in messages) + "<>")


class _Event:
    """Stands for a CUDA event."""

    def __init__(self, **_: object) -> None:
        self._at = 0.0

    def record(self, *_: object) -> None:
        self._at = time.monotonic()

    def elapsed_time(self, other: _Event) -> float:
        return (other._at - self._at) * 1000

    def synchronize(self) -> None:
        """Nothing is asynchronous here."""


def without_cuda() -> None:
    """Let Megatron's inference run on a CPU: it asks for CUDA by name in these places."""
    import megatron.core.inference.communication_utils as communication

    def on_cpu(function: Any) -> Any:
        def made(*args: Any, device: Any = None, **options: Any) -> Any:
            wanted = "cpu" if str(device).startswith("cuda") else device
            return function(*args, device=wanted, **options)

        return made

    swapped: Any = torch
    swapped.cuda.current_device = lambda: torch.device("cpu")
    swapped.cuda.synchronize = lambda *_, **__: None
    swapped.cuda.Event = _Event
    swapped.Tensor.cuda = lambda self, *_, **__: self
    swapped.tensor, swapped.ones = on_cpu(torch.tensor), on_cpu(torch.ones)
    communication._is_cuda = lambda _: None
    communication._is_cuda_contiguous = lambda _: None


def engine() -> Any:
    """Megatron's static engine over a model of two layers."""
    import torch.distributed as dist
    from megatron.core import parallel_state
    from megatron.core.inference.contexts import StaticInferenceContext
    from megatron.core.inference.engines import StaticInferenceEngine
    from megatron.core.inference.model_inference_wrappers.gpt.gpt_inference_wrapper import (
        GPTInferenceWrapper,
    )
    from megatron.core.inference.text_generation_controllers.text_generation_controller import (
        TextGenerationController,
    )
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.transformer_config import TransformerConfig

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    random.initialize_rng_tracker(inference_rng_tracker=True)
    torch.manual_seed(7)
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=2,
        ffn_hidden_size=64,
        use_cpu_initialization=True,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        pipeline_dtype=torch.float32,
        params_dtype=torch.float32,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCABULARY,
        max_sequence_length=512,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    )
    context = StaticInferenceContext(160, 512)
    wanted = inspect.signature(GPTInferenceWrapper.__init__).parameters
    before = [_wrapper_config()] if "inference_wrapper_config" in wanted else []
    wrapped = GPTInferenceWrapper(model.eval(), *before, context)
    controller = TextGenerationController(inference_wrapped_model=wrapped, tokenizer=Bytes())
    return StaticInferenceEngine(text_generation_controller=controller, legacy=True)


def _wrapper_config() -> Any:
    """What the wrapper takes beside the context up to 0.16."""
    from megatron.core.inference.model_inference_wrappers.inference_wrapper_config import (
        InferenceWrapperConfig,
    )

    return InferenceWrapperConfig(
        hidden_size=64,
        inference_batch_times_seqlen_threshold=-1,
        fp32_residual_connection=False,
        params_dtype=torch.float32,
        padded_vocab_size=VOCABULARY,
    )


class StaticClient:
    """Stands for the client of the dynamic engine: the static one answers, a request at a time."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    async def add_request(self, prompt_tokens: list[int], params: Any) -> Any:
        from megatron.core.inference.inference_request import InferenceRequest

        params.return_segments = False
        request = InferenceRequest(
            prompt=Bytes().detokenize(prompt_tokens),
            prompt_tokens=prompt_tokens,
            sampling_params=params,
            request_id=self._engine.get_new_request_id(),
        )
        (done,) = self._engine.generate(inference_requests=[request])
        shown = SimpleNamespace(
            generated_text=done.generated_text,
            prompt_tokens=prompt_tokens,
            generated_tokens=done.generated_tokens.tolist(),
            prompt_log_probs=done.prompt_log_probs,
            generated_log_probs=done.generated_log_probs,
            log_probs=done.generated_log_probs,
            generated_top_n_logprobs=done.generated_top_n_logprobs,
            prompt_top_n_logprobs=done.prompt_top_n_logprobs,
        )
        return SimpleNamespace(requests=[shown])


def main(kind: str, port: int) -> None:
    without_cuda()
    if kind == "static":
        from megatron.core.inference.text_generation_server import MegatronServer

        MegatronServer(engine(), None).run("127.0.0.1", port)
        return
    from flask import Flask
    from megatron.core.inference.text_generation_server.dynamic_text_gen_server import endpoints

    app = Flask(__name__)
    app.config |= {"client": StaticClient(engine()), "tokenizer": Bytes()}
    for blueprint in endpoints.__all__:
        app.register_blueprint(blueprint)
    app.run("127.0.0.1", port, threaded=False)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
