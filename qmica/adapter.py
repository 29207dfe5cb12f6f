"""Attach, save, load and open adapters: PEFT's pair of files plus qmica.json.

How: `attach` wraps each chosen linear in a `MicaLinear`, its B computed from the weight as it is stored (dequantized
by rows for that moment) or from the model's files, and kept in the store for the next time. An adapter on disk is a
plain LoRA to everyone who reads PEFT's format: `adapter_config.json` says `"init_lora_weights": true`, because with
`"mica"` PEFT would compute an SVD for every layer and fail on 4- and 8-bit weights. That it is MiCA, and on which base,
stands in `qmica.json` beside it. B is read back, never recomputed: singular vectors of the small end are not
reproducible across machines.

What it gives up: DoRA, per-layer ranks and extra trained modules of PEFT adapters are refused by name.
"""

import functools
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from qmica import bases, durable, quant, runs, source, streaming, subspace, targets, tokenizer
from qmica.config import AdapterConfig, ModelConfig
from qmica.errors import QmicaError
from qmica.linear import MicaLinear
from qmica.model import Base, choose_device, load
from qmica.weights import open_weights

log = logging.getLogger(__name__)

CONFIG, TENSORS, QMICA = "adapter_config.json", "adapter_model.safetensors", "qmica.json"
PREFIX = "base_model.model."  # PEFT's names: base_model.model.<module path>.lora_A.weight
VERSIONED = ("qmica", "torch", "bitsandbytes", "transformers")
# Settings of PEFT adapters that change the arithmetic in ways that B A alone cannot say.
REFUSED = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "fan_in_fan_out",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
# Initializations that change the base's weights too, so that A and B alone are not the adapter.
REFUSED_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class Factors:
    """One linear's adapter: A (rank, in), B (out, rank), and the scale alpha / rank."""

    A: torch.Tensor
    B: torch.Tensor
    scale: float

    def delta(self) -> torch.Tensor:
        """scale · B A, (out, in) in fp32."""
        return (self.B.float() @ self.A.float()) * self.scale


@dataclass(frozen=True)
class Adapter:
    """An adapter as it lies on disk: how it was made, on what, and its factors by module path."""

    folder: Path
    options: AdapterConfig
    base: Base
    factors: Mapping[str, Factors]


def layers(model: nn.Module) -> Iterator[tuple[str, MicaLinear]]:
    """The adapted linears of a model, by module path."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MicaLinear))


@contextmanager
def switched(model: nn.Module, on: bool) -> Iterator[None]:
    """The model with its adapter on or off; on again afterwards."""
    for _, layer in layers(model):
        layer.enabled = on
    try:
        yield
    finally:
        for _, layer in layers(model):
            layer.enabled = True


def attach(
    model: nn.Module,
    options: AdapterConfig = AdapterConfig(),
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> nn.Module:
    """Put a MiCA (or LoRA) adapter on a transformers model, in place; only the adapter is trainable afterwards.
    Returns the model.

    The model may be qmica's or transformers' own, in 4, 8 or 16 bits. seed: of random components and LoRA's A.
    Raises QmicaError for unknown targets, a rank above a layer's smallest side (named), or a model that has an adapter.
    """
    _require_bare(model)
    chosen = choose(model, options)
    _freeze(model)
    generator = torch.Generator().manual_seed(seed)
    found = _bases(model, chosen, options, progress)
    adapted = {name: _adapted(model.get_submodule(name), options, found, name, generator) for name in chosen}
    for name, layer in adapted.items():  # only now: where a weight is damaged, the model is still bare
        model.set_submodule(name, layer)
    return _wire(model, options)


def choose(model: nn.Module, options: AdapterConfig) -> list[str]:
    """The paths of the linears to adapt; the model may be on the meta device. Raises QmicaError for targets that it has
    not, and for a rank above a layer's smallest side (named).
    """
    linears = _linears(model)
    chosen = targets.select(list(linears), options.targets)
    for name in chosen if options.method == "mica" else ():
        with bases.named(name):
            subspace.require_rank(options.rank, linears[name].out_features, linears[name].in_features)
    return chosen


def _require_bare(model: nn.Module) -> None:
    if any(True for _ in layers(model)):
        raise QmicaError("this model has an adapter already: load the base again, or train the one it has")


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if quant.is_linear(module)}


def _freeze(model: nn.Module) -> None:
    """Freeze every weight. All linears, not the adapted ones alone, compute through `quant`: bitsandbytes' own 4-bit
    forward may repack its weight in an evaluation, after which no gradient passes it."""
    model.requires_grad_(False)
    for module in _linears(model).values():
        quant.freeze(module)


def _bases(
    model: nn.Module, chosen: list[str], options: AdapterConfig, progress: Callable
) -> dict[str, torch.Tensor] | None:
    """The singular vectors that the options ask for, by module path; None where they ask for none."""
    model.qmica_subspaces = None
    if options.method == "lora" or options.components == "random":
        return None
    weights = _originals(model, chosen) if options.subspace_from == "original" else _stored_weights(model, chosen)
    found, model.qmica_subspaces = bases.find(weights, options.rank, options.components, model.device, progress)
    return found


def _stored_weights(model: nn.Module, chosen: list[str]) -> dict[str, bases.Weight]:
    return {name: quant.Stored.of(model.get_submodule(name)) for name in chosen}


def _originals(model: nn.Module, chosen: list[str]) -> dict[str, bases.Weight]:
    """The weights as the model's files hold them, read when they are asked for. Raises QmicaError where there are
    none.
    """
    found = getattr(model, "qmica_source", None)
    if found is None:
        raise QmicaError("--subspace-from original needs the model's files: load the model with qmica.load")
    original = open_weights(found)
    packed = [name for name in chosen if f"{name}.weight" in original.packed]
    if packed:
        raise QmicaError(
            f"--subspace-from original: {found.name} was quantized by bitsandbytes ({packed[0]} and {len(packed) - 1} "
            "more) and has no original weights: leave it out, or give the model that it was made from"
        )
    return {name: original[f"{name}.weight"] for name in chosen}


def _adapted(
    linear: nn.Module,
    options: AdapterConfig,
    found: dict[str, torch.Tensor] | None,
    name: str,
    generator: torch.Generator,
) -> MicaLinear:
    """The linear with a fresh adapter, which changes nothing yet."""
    if options.method == "lora":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            return MicaLinear.lora(linear, options.rank, options.scaling_alpha, options.dropout)
    if found is None:
        with bases.named(name):
            B = subspace.random_subspace(quant.Stored.of(linear), options.rank, generator)
    else:
        B = found[name]
    return MicaLinear.from_base(linear, B.to(linear.device), options.scaling_alpha, options.dropout)


def _wire(model: nn.Module, options: AdapterConfig) -> nn.Module:
    """Make `model.save_pretrained` write the adapter, so that Trainer and TRL save it, and pass Trainer's check.

    transformers.Trainer refuses a model whose `is_quantized` is true unless it is PEFT's, because training quantized
    weights does nothing; ours are frozen and an adapter is there, so the check's reason does not hold and the flag is
    taken down.
    """
    model.qmica_adapter = options
    model.is_quantized = False
    model.save_pretrained = functools.partial(_save_pretrained, model)
    return model


def _save_pretrained(model: nn.Module, save_directory: str | Path, is_main_process: bool = True, **_) -> None:
    """What `model.save_pretrained` does after `attach`; Trainer's further arguments concern whole models."""
    if is_main_process:
        save_adapter(model, save_directory)


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write the model's adapter: PEFT's pair and qmica.json. A in fp32, B in bf16 (LoRA's trained B in fp32). Returns
    the folder.

    Raises QmicaError where the model has no adapter.
    """
    folder = Path(folder)
    found = dict(layers(model))
    if not found:
        raise QmicaError("this model has no adapter to save: call qmica.attach(model) first")
    folder.mkdir(parents=True, exist_ok=True)
    with durable.replacing(folder / TENSORS) as part:
        save_file(tensors(model), part, metadata={"format": "pt"})
    durable.write_json(folder / CONFIG, _peft_config(model, found))
    durable.write_json(folder / QMICA, _qmica_json(model))
    return folder


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors by PEFT's names: A (rank, in) in fp32, B (out, rank) in bf16; in fp32 LoRA's trained B, and
    a B that bf16 would round (one that PEFT made)."""
    named = {}
    for name, layer in layers(model):
        named[f"{PREFIX}{name}.lora_A.weight"] = layer.A.detach().float().contiguous().cpu()
        named[f"{PREFIX}{name}.lora_B.weight"] = _stored_B(layer).contiguous().cpu()
    return named


def _stored_B(layer: MicaLinear) -> torch.Tensor:
    whole = layer.B.detach().float()
    half = whole.to(torch.bfloat16)
    exact = not isinstance(layer.B, nn.Parameter) and torch.equal(half.float(), whole)
    return half if exact else whole


def _peft_config(model: nn.Module, found: Mapping[str, MicaLinear]) -> dict:
    """adapter_config.json of a plain LoRA, as PEFT 0.21 writes it, without what stands at its default."""
    options: AdapterConfig = model.qmica_adapter
    base = base_of(model)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.id,
        "revision": base.revision,
        "r": options.rank,
        "lora_alpha": options.scaling_alpha,
        "lora_dropout": options.dropout,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in found}),
        "init_lora_weights": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def _qmica_json(model: nn.Module) -> dict:
    return {
        "adapter": asdict(model.qmica_adapter),
        "base": asdict(base_of(model)),
        "versions": {package: version(package) for package in VERSIONED},
    }


def base_of(model: nn.Module) -> Base:
    """What a model was loaded from; of a model that qmica did not load the name and the bits are known."""
    known = getattr(model, "qmica_base", None)
    return known or Base(id=getattr(model, "name_or_path", "") or "unknown", bits=quant.stored_bits(model))


def read_adapter(folder: str | Path, share: float = 1.0) -> Adapter:
    """An adapter folder of qmica's or PEFT's, its tensors in memory (a few MB). Raises QmicaError for anything else.

    share: of alpha. Weights on the line between base and tuned keep most of what was learnt and forget less (WiSE-FT,
    arXiv 2109.01903); of an adapter that line is its scale.
    """
    folder = Path(folder)
    runs.require_result(folder)
    config = _read_json(folder / CONFIG)
    ours = _read_json(folder / QMICA) if (folder / QMICA).exists() else None
    _require_plain(config, folder)
    try:
        rank, alpha = config["r"], config["lora_alpha"]
        scale = share * alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        made = _options(config, scale) if ours is None else AdapterConfig(**ours["adapter"])
        options = replace(made, alpha=scale * rank)  # what is saved again is what was read
        base = Base(id=config.get("base_model_name_or_path") or "unknown") if ours is None else Base(**ours["base"])
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise QmicaError(f"{folder}: {CONFIG} or {QMICA} is damaged, or of a newer qmica ({reason})") from error
    if base.bits is not None and base.bits not in quant.FORMATS:
        raise QmicaError(f"{folder / QMICA} is damaged, or of a newer qmica (bits {base.bits!r:.20})")
    return Adapter(folder, options, base, _read_factors(folder / TENSORS, scale, rank))


def _require_plain(config: dict, folder: Path) -> None:
    """Refuse what A and B alone cannot say."""
    refused = [key for key in REFUSED if config.get(key)]
    start = str(config.get("init_lora_weights"))
    if start.lower().startswith(REFUSED_STARTS):
        refused.append(f"init_lora_weights {start!r}, which changes the base too")
    if config.get("peft_type") != "LORA" or refused:
        reason = ", ".join(refused) or f"peft_type {config.get('peft_type')}"
        raise QmicaError(f"{folder} cannot be used: it has {reason}; qmica reads plain LoRA and MiCA adapters")


def _options(config: dict, scale: float) -> AdapterConfig:
    """How PEFT's own adapter was made: `"init_lora_weights": "mica"` says that B is frozen."""
    names = config["target_modules"]
    return AdapterConfig(
        rank=config["r"],
        alpha=scale * config["r"],
        dropout=config.get("lora_dropout", 0.0),
        targets=names if isinstance(names, str) else ",".join(sorted(names)),
        method="mica" if config.get("init_lora_weights") == "mica" else "lora",
    )


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise QmicaError(f"{path.parent} is not an adapter folder: {path.name} is missing") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise QmicaError(f"{path} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise QmicaError(f"{path} is damaged: it holds no JSON object")
    return content


def _read_factors(path: Path, scale: float, rank: int) -> dict[str, Factors]:
    """The A and B of each module. Raises QmicaError naming a file that is no whole set of pairs."""
    try:
        with safe_open(path, framework="pt") as file:
            named = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise QmicaError(f"{path} cannot be read: {error}") from error
    return _pairs(named, scale, rank, path)


def _pairs(named: Mapping[str, torch.Tensor], scale: float, rank: int, path: Path | str) -> dict[str, Factors]:
    suffix = ".lora_A.weight"
    paths = [name.removeprefix(PREFIX).removesuffix(suffix) for name in named if name.endswith(suffix)]
    lonely = [p for p in paths if f"{PREFIX}{p}.lora_B.weight" not in named]
    if lonely or len(named) != 2 * len(paths) or not paths:
        raise QmicaError(f"{path} is not a plain LoRA: {len(named)} tensors, {len(paths)} pairs of lora_A and lora_B")
    pairs = {p: Factors(named[f"{PREFIX}{p}{suffix}"], named[f"{PREFIX}{p}.lora_B.weight"], scale) for p in paths}
    for p, part in pairs.items():
        shapes = tuple(part.A.shape), tuple(part.B.shape)
        if {len(shape) for shape in shapes} != {2} or (shapes[0][0], shapes[1][1]) != (rank, rank):
            raise QmicaError(
                f"{path}: {p} has an A of {shapes[0]} and a B of {shapes[1]}, and its config says rank {rank}"
            )
        if not all(half.is_floating_point() and torch.isfinite(half).all() for half in (part.A, part.B)):
            raise QmicaError(f"{path}: {p} holds what is no number (NaN or infinite): it is broken; train again")
    return pairs


def restore(model: nn.Module, named: Mapping[str, torch.Tensor], options: AdapterConfig) -> nn.Module:
    """Put back an adapter saved by `tensors`, on the same base, in place. Returns the model."""
    factors = _pairs(named, options.scaling_alpha / options.rank, options.rank, "the checkpoint")
    return _install(model, Adapter(Path(), options, base_of(model), factors))


def load_adapter(model: nn.Module, adapter: str | Path | Adapter) -> nn.Module:
    """Put an adapter from disk on a base model, in place, trainable as it was. B is taken as stored. Returns the model.

    Raises QmicaError where the adapter's modules or shapes are not the model's (with both bases' names); warns once
    where the shapes agree but the weights are not those it was trained on.
    """
    adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    check_base(adapter, base_of(model))
    return _install(model, adapter)


def _install(model: nn.Module, adapter: Adapter) -> nn.Module:
    _require_bare(model)
    modules = dict(model.named_modules())
    wrong = [path for path, part in adapter.factors.items() if not _fits(modules.get(path), part)]
    if wrong:
        raise QmicaError(
            f"the adapter in {adapter.folder} is for {adapter.base.id}, not for {base_of(model).id}: "
            f"{len(wrong)} of {len(adapter.factors)} layers do not fit ({', '.join(wrong[:3])})"
        )
    _freeze(model)
    for path, part in adapter.factors.items():
        model.set_submodule(path, _restored(modules[path], part, adapter.options))
    return _wire(model, adapter.options)


def _fits(module: nn.Module | None, part: Factors) -> bool:
    if module is None or not quant.is_linear(module) or part.A.dim() != 2 or part.B.dim() != 2:
        return False
    (rank, columns), (out, again) = part.A.shape, part.B.shape
    return rank == again and (out, columns) == (module.out_features, module.in_features)


def _restored(linear: nn.Module, part: Factors, options: AdapterConfig) -> MicaLinear:
    """The linear with its stored A and B."""
    linear = quant.freeze(linear)
    layer = MicaLinear(
        linear,
        part.B.to(linear.device),
        part.scale,
        options.dropout,
        train_B=options.method == "lora",
    )
    with torch.no_grad():
        layer.A.copy_(part.A)
    return layer


def check_base(adapter: Adapter, base: Base) -> None:
    """Refuse a base of other shapes, warn of one with other weights. Where either side is unknown there is nothing to
    compare.
    """
    if not (adapter.base.shapes and base.shapes):
        return
    if adapter.base.shapes != base.shapes:
        raise QmicaError(
            f"the adapter in {adapter.folder} was trained on {adapter.base.id}, which {base.id} is not: their tensors "
            "differ in names or shapes; give the model that it was trained on"
        )
    if adapter.base.fingerprint != base.fingerprint:
        log.warning(
            "the adapter was trained on %s; %s has its shapes but other weights (another quantization or a sibling)",
            adapter.base.id,
            base.id,
        )


def open_run(
    run: str | Path | runs.Run | None = None, tuned: bool = True, scale: float = 1.0, **changes
) -> tuple[nn.Module, object]:
    """The model and tokenizer of a run, an adapter folder, or a name under runs/ (None: the newest run).

    tuned: with its adapter; scale: how much of it. changes: fields of ModelConfig to use in place of the run's (`bits`,
    `dtype`, `device`, `model`).
    """
    run = run if isinstance(run, runs.Run) else runs.find(run)
    adapter = read_adapter(run.adapter, scale)
    config = ModelConfig(**{**run.model_config(adapter.base), **changes})
    found = source.resolve(config.model, config.revision)
    on_cpu = choose_device(config.device).type == "cpu"
    stream = "none" if on_cpu and config.stream == "host" else config.stream  # host memory is where a CPU has them
    model = streaming.start(load(found, config.bits, config.dtype, config.device, stream=stream), stream)
    return (load_adapter(model, adapter) if tuned else model), tokenizer.load(found)
