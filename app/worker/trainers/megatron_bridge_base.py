"""A model that Megatron-Bridge builds and loads, with Transformer Engine's layers.

What comes in: a model folder. What goes out: the base that the engine asks for. It must not know:
losses, optimizers, runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from app.domain import LoraSpec
from app.errors import ConfigurationError, InvalidRequest
from app.worker.trainers.megatron_base import Linear
from app.worker.trainers.megatron_bridge import (
    AutoBridge,
    GPTModel,
    PackedSeqParams,
    model_parallel_cuda_manual_seed,
)
from app.worker.trainers.megatron_bridge_lora import Site, Wardrobe
from app.worker.trainers.megatron_core import parallel_state
from app.worker.trainers.megatron_head import Head, twice
from app.worker.trainers.megatron_packing import Packed, pack
from app.worker.trainers.megatron_shapes import Cut
from app.worker.trainers.megatron_vectors import Adapters, Local

#: Megatron's linears that Bridge's adapters know, those it cuts by rows among them.
LINEARS = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
BY_ROWS = ("linear_proj", "linear_fc2")
#: What Bridge calls the adapters of a linear that stands for several modules, by their last names.
KEYS = {f"{name}_proj": f"adapter_{name}" for name in ("q", "k", "v", "gate", "up")}


class BridgeBase:
    """Any of Bridge's dense GPT models, in one stage; see `megatron_base.Base`."""

    def __init__(
        self, folder: Path, dtype: torch.dtype, device: torch.device, *, recompute: bool
    ) -> None:
        """Have this rank's part of the model.

        Raises:
            ConfigurationError: a model that Bridge does not know, or not as we need it.
        """
        config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        self.folder = folder
        self.ranks = parallel_state.get_tensor_model_parallel_world_size()
        if device.type == "cuda":
            # Megatron draws even first weights that are replaced at once.
            model_parallel_cuda_manual_seed(0)
        self.bridge, self.model = _built(folder, dtype, device)
        self.max_length, self.hidden = config.max_position_embeddings, config.hidden_size
        self.first = self.last = True
        self.head = Head(config.vocab_size)
        _check_positions(folder, config, self.model)
        sites = list(_sites(self.bridge, self.model))
        self.linears = list(_linears(config, sites))
        if not self.linears:
            raise _refused(folder, "has no linears that Bridge's adapters know")
        self.here = {name for site in sites for name in site.modules.values()}
        self.wardrobe = Wardrobe(sites)
        if recompute:
            for layer in self.model.decoder.layers:
                _recompute(layer)
        self._try(device)

    def cuts(self, linear: Linear, rank: int) -> tuple[Cut, Cut]:
        if rank % self.ranks:
            raise InvalidRequest(
                f"An adapter's rank must be a multiple of {self.ranks}, over which this trainer "
                f"shares it (LORAGATE_WORKER_TENSOR_PARALLEL); {rank} is not.",
                param="rank",
            )
        up = Cut(0, linear.outs, linear.outs)
        return (linear.cut if linear.cut.dim == 1 else Cut(0, rank, rank)), up

    def wear(self, local: Local, weights: Tensor, gradient: Tensor | None) -> None:
        self.wardrobe.wear(local, weights, gradient)

    def bare(self) -> None:
        self.wardrobe.bare()

    def forward(
        self, packed: Packed, targets: Tensor, taken: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        lengths = list(packed.lengths)
        if spare := -len(targets) % self.ranks:
            # Bridge puts q, k and v together as if each rank had all heads of some tokens.
            lengths.append(spare)
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=targets.device)
        longest = max(lengths)
        found = self.model(
            functional.pad(packed.ids, [0, spare])[None],
            functional.pad(packed.positions, [0, spare])[None],
            None,
            packed_seq_params=PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=ends,
                cu_seqlens_kv=ends,
                max_seqlen_q=longest,
                max_seqlen_kv=longest,
            ),
            output_processor=self._scores,
            output_processor_context=targets,
        )
        return cast("tuple[Tensor, Tensor]", found)

    def _scores(
        self,
        *,
        hidden_states: Tensor,
        output_layer: Any,
        output_weight: Tensor | None,
        context: Tensor,
        **_: object,
    ) -> tuple[Tensor, Tensor]:
        """What GPTModel calls instead of making logits of everything."""
        hidden = hidden_states[: len(context)]
        return self.head.logprobs(hidden, context, output_layer, output_weight)

    def _try(self, device: torch.device) -> None:
        """What cannot be computed at all is said now and not in the first pass.

        Two sequences, with an adapter of zeros on everything.
        """
        packed = pack([torch.zeros(size, dtype=torch.int64) for size in (2, 1)], device)
        adapters = Adapters(self, self.ranks)
        layout = adapters.layout(LoraSpec(self.ranks, 1, adapters.kinds, 0))
        local = adapters.local(layout)
        try:
            self.wear(local, torch.zeros(local.size, device=device), None)
            with torch.no_grad():
                self.forward(packed, packed.ids, None)
        except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as exc:
            raise _refused(self.folder, f"cannot be computed: {_first_line(exc)}") from exc
        self.bare()


def _built(folder: Path, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """The bridge of a model, and this rank's part of it, frozen, with its weights."""
    # Bridge draws a bar and counts parameters.
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        try:
            bridge = AutoBridge.from_hf_pretrained(str(folder))
            provider = bridge.to_megatron_provider()
            if getattr(provider, "num_moe_experts", None):
                raise _refused(folder, "has experts, and only dense models are supported")
            model = _provided(provider, dtype, device)
        except (AssertionError, NotImplementedError, ValueError) as exc:
            raise _refused(folder, f"cannot be built: {_first_line(exc)}") from exc
    if not isinstance(model, GPTModel):
        raise _refused(folder, f"is a {type(model).__name__}, and only GPT models are supported")
    return bridge, model.requires_grad_(False).eval()


def _provided(provider: Any, dtype: torch.dtype, device: torch.device) -> Any:
    given = {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "sequence_parallel": False,
        # Our gradients are vectors of our own.
        "gradient_accumulation_fusion": False,
        "mtp_num_layers": None,
        "should_pad_vocab": True,
        "make_vocab_size_divisible_by": 1,
    }
    for name, value in given.items():
        setattr(provider, name, value)
    provider.finalize()
    (model,) = provider.provide_distributed_model(
        wrap_with_ddp=False,
        mixed_precision_wrapper=None,
        use_cpu_initialization=device.type == "cpu",
        bf16=dtype is torch.bfloat16,
        fp16=False,
    )
    return model


def _check_positions(folder: Path, config: Any, model: Any) -> None:
    """Not every way of stretching positions is known to Bridge, which passes over the others."""
    if model.position_embedding_type != "rope" or "rope_type" not in config.rope_parameters:
        return
    rotary, wanted = model.rotary_pos_emb, LlamaRotaryEmbedding(config).inv_freq
    found = rotary.inv_freq.cpu().float() / (rotary.seq_len_interpolation_factor or 1)
    if found.shape == wanted.shape and not torch.allclose(found, wanted, rtol=1e-4):
        kind = config.rope_parameters["rope_type"]
        raise _refused(
            folder, f"has positions of the type {kind!r}, which Bridge computes otherwise"
        )


def _sites(bridge: Any, model: Any) -> Iterator[Site]:
    """The linears of this rank's stage that adapters can be put on."""
    for task in bridge.get_conversion_tasks([model]):
        if task is None or task.megatron_module is None:
            continue
        prefix, _, name = task.param_name.removesuffix(".weight").rpartition(".")
        if name not in LINEARS or not task.param_name.endswith(".weight"):
            continue
        names = task.mapping.hf_param
        modules = [names] if isinstance(names, str) else list(names.values())
        modules = [module.removesuffix(".weight") for module in modules]
        keys = [KEYS.get(module.rpartition(".")[2]) for module in modules]
        if len(modules) == 1 and name in BY_ROWS:
            yield Site(model.get_submodule(prefix), prefix, name, {"": modules[0]})
        elif len(modules) > 1 and None not in keys:
            found = dict(zip(cast("list[str]", keys), modules, strict=True))
            yield Site(model.get_submodule(prefix), prefix, name, found)


def _linears(config: Any, sites: list[Site]) -> Iterator[Linear]:
    """All that have a site on some stage, in the order and sizes that Hugging Face gives them."""
    rows = {name: site.name in BY_ROWS for site in sites for name in site.modules.values()}
    make: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        whole = make(config)
    for name, module in whole.named_modules():
        if isinstance(module, nn.Linear) and name in rows:
            ins, outs = module.in_features, module.out_features
            yield Linear(name, ins, outs, Cut(1, ins, ins) if rows[name] else Cut(0, outs, outs))


def _recompute(layer: Any) -> None:
    """Let a layer compute its activations twice instead of keeping them."""
    once = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return once(*args, **kwargs)
        return twice(once, *args, **kwargs)

    layer.forward = forward


def _first_line(exc: Exception) -> str:
    return next(iter(str(exc).strip("✗ \n").splitlines()), type(exc).__name__)


def _refused(folder: Path, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"With Megatron-Bridge, {folder} {why}. Set LORAGATE_WORKER_MEGATRON_ENGINE=core, "
        "LORAGATE_WORKER_TRAINER=hf or another LORAGATE_WORKER_MODEL."
    )
