"""The Megatron trainer, as the worker sees it: rank 0 of a model that may be cut over many.

What comes in: settings, and what every engine can do. What goes out: the same from all ranks, and
files. It must not know: HTTP, how ranks talk, what they compute.

Files are read and written here alone, so the other ranks need not see the worker's disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import AutoConfig

from app.domain import LoraSpec, Probe
from app.errors import (
    ConfigurationError,
    InvalidRequest,
    RequestError,
    RunLost,
    TrainingFailed,
)
from app.ops import OptimStep
from app.settings import Settings, TorchrunSettings
from app.worker import losses
from app.worker.trainers import runfiles
from app.worker.trainers.base import Facts, Pass, PassResult
from app.worker.trainers.lora import Layout
from app.worker.trainers.megatron_launch import Plan, launch
from app.worker.trainers.megatron_shapes import check_shared, shapes

if TYPE_CHECKING:
    # Not before `start`: the worker of another engine has no Megatron.
    from app.worker.trainers.megatron_ranks import Team

#: The vectors of a run that its state holds.
KINDS = ("weights", "gradient", "exp_avg", "exp_avg_sq")


_IMAGE = "use an image that has it, as NVIDIA NeMo's, set LORAGATE_WORKER_MEGATRON_ENGINE=core"
_CORE = ("megatron.core", "Megatron-Core", "pip install 'loragate[megatron]'")
_BRIDGE = ("megatron.bridge", "Megatron-Bridge", _IMAGE)
_LAYERS = ("transformer_engine.pytorch", "NVIDIA's Transformer Engine", _IMAGE)
#: Module, its name, and how to have it, by engine.
_NEEDED = {"core": (_CORE,), "bridge": (_CORE, _BRIDGE, _LAYERS)}


class MegatronTrainer:
    """An engine over tensor-, pipeline- and data-parallel ranks; see `base.Trainer`."""

    def __init__(self, team: Team, base_model: str) -> None:
        self._team = team
        self._base = base_model
        self._layouts: dict[str, Layout] = {}
        plan, engine = team.ranks.plan, team.engine
        self._facts = Facts(
            kind="megatron",
            dtype=plan.dtype,
            max_length=engine.base.max_length,
            target_modules=engine.adapters.kinds,
            parallel={"tp": plan.tp, "pp": plan.pp, "dp": plan.dp},
        )

    @classmethod
    def start(
        cls, settings: Settings, folder: Path, *, base_model: str | None = None
    ) -> MegatronTrainer:
        """Have the model of a folder on every rank the settings ask for; blocks until it is.

        `base_model` is the name by which adapters say what they are for; the folder if not given.

        Raises:
            ConfigurationError: what the settings ask for cannot be had; the message names them.
            TrainerUnavailable: a rank did not start.
        """
        _require(settings)
        wanted = plan(settings, folder)
        given = TorchrunSettings()
        if given.world_size not in (None, wanted.ranks):
            raise ConfigurationError(
                f"torchrun started {given.world_size} ranks, but LORAGATE_WORKER_TENSOR_PARALLEL, "
                f"_PIPELINE_PARALLEL and _DATA_PARALLEL ask for {wanted.tp} * {wanted.pp} * "
                f"{wanted.dp}. Make them equal."
            )
        launched = launch(wanted, settings) if given.rank is None else None
        from app.worker.trainers.megatron_ranks import lead

        return cls(lead(wanted, launched), base_model or str(folder))

    @property
    def facts(self) -> Facts:
        return self._facts

    def create(self, run: str, spec: LoraSpec) -> None:
        layout = self._team.engine.adapters.layout(spec)
        self._team.call("create", run, layout, spec.seed)
        self._layouts[run] = layout

    def drop(self, run: str) -> None:
        self._team.call("drop", run)
        self._layouts.pop(run, None)

    def forward_backward(self, passes: Sequence[Pass]) -> list[PassResult | RequestError]:
        return [self._pass(each) for each in passes]

    def optim_step(self, run: str, step: OptimStep) -> Mapping[str, float]:
        self._layout(run)
        return cast(Mapping[str, float], self._team.call("optim_step", run, step))

    def save_state(self, run: str, folder: Path) -> None:
        layout = self._layout(run)
        vectors = self._whole(run, KINDS)
        runfiles.save_state(folder, layout, vectors, steps=self._team.engine.steps(run))

    def load_state(self, run: str, folder: Path, *, optimizer: bool) -> None:
        vectors, steps = runfiles.load_state(folder, self._layout(run))
        if not optimizer:
            vectors, steps = {"weights": vectors["weights"]}, 0
        self._team.call("restore", run, vectors, steps)

    def save_adapter(self, run: str, folder: Path) -> None:
        layout = self._layout(run)
        runfiles.save_adapter(folder, layout, self._whole(run, ("weights",))["weights"], self._base)

    def probe(self, run: str, token_ids: Sequence[Sequence[int]]) -> Probe:
        self._layout(run)
        rows = self._team.call("score", run, token_ids)
        return Probe(
            tuple(map(tuple, token_ids)),
            tuple(tuple(row.tolist()) for row in rows),
            self._facts.dtype,
        )

    def close(self) -> None:
        self._team.close()

    def _layout(self, run: str) -> Layout:
        if run not in self._layouts:
            raise RunLost(f"This trainer has no run {run!r}.")
        return self._layouts[run]

    def _whole(self, run: str, kinds: Sequence[str]) -> dict[str, Tensor]:
        """Whole vectors of a run by kind: the same whatever the layout of ranks."""
        layout = self._layouts[run]
        cuts = self._team.engine.adapters.cuts(layout)
        parts = self._team.call("pieces", run, kinds)
        whole = {kind: torch.zeros(layout.size) for kind in kinds}
        for kind, vector in whole.items():
            for name, tensor in layout.tensors(vector):
                # The ranks that have a piece of it follow each other in the order of the pieces.
                pieces = [part[kind][name] for part in parts if name in part.get(kind, ())]
                tensor.copy_(cuts[name].whole(pieces))
        return whole

    def _pass(self, asked: Pass) -> PassResult | RequestError:
        self._layout(asked.run)
        try:
            losses.check(asked.loss, asked.config, asked.examples)
            return cast("PassResult | RequestError", self._team.call("forward_backward", asked))
        except InvalidRequest as exc:
            return exc
        except RuntimeError as exc:
            # Of one rank: where there are more, the process does not outlive it.
            return TrainingFailed(f"A pass of run {asked.run!r} failed: {str(exc).splitlines()[0]}")


def plan(settings: Settings, folder: Path) -> Plan:
    """What the settings come to on this machine.

    Raises:
        ConfigurationError: a setting this engine cannot have.
    """
    device = device_of(settings)
    dtype = settings.worker_dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    if dtype == "float16":
        raise ConfigurationError(
            "LORAGATE_WORKER_DTYPE is float16, which the Megatron trainer cannot train in without "
            "scaling its losses; it knows float32 and bfloat16."
        )
    tp, pp = settings.worker_tensor_parallel, settings.worker_pipeline_parallel
    engine = settings.worker_megatron_engine
    # Here already: it would be a pity to start ranks for a model they cannot have.
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if engine == "bridge":
        check_shared(config, folder, tp, pp)
    else:
        shapes(config, folder, tp, pp)
    return Plan(
        engine=engine,
        folder=str(folder),
        device=device,
        dtype=dtype,
        tp=tp,
        pp=pp,
        dp=settings.worker_data_parallel,
        train_tokens=settings.worker_train_tokens,
        recompute=settings.worker_gradient_checkpointing,
        threads=settings.worker_threads or (1 if device == "cpu" else None),
    )


def device_of(settings: Settings) -> str:
    """`cpu`, `cuda` or `cuda:N`; with more than one rank, N is that of the first."""
    if settings.worker_device != "auto":
        return settings.worker_device
    return "cuda" if torch.cuda.is_available() else "cpu"


def follow(settings: Settings) -> bool:
    """Under torchrun, be one of the other ranks until rank 0 ends. False: this is rank 0."""
    _require(settings)
    from app.worker.trainers import megatron_ranks

    return megatron_ranks.follow(device_of(settings))


def _require(settings: Settings) -> None:
    """Refuse what is not installed."""
    for module, what, way in _NEEDED[settings.worker_megatron_engine]:
        if not _installed(module):
            raise ConfigurationError(
                f"LORAGATE_WORKER_TRAINER=megatron with LORAGATE_WORKER_MEGATRON_ENGINE="
                f"{settings.worker_megatron_engine} needs {what}, which is not installed: {way}, "
                "or set LORAGATE_WORKER_TRAINER=hf."
            )


def _installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    package = module.rpartition(".")[0]
    return (not package or _installed(package)) and find_spec(module) is not None
