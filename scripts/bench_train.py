"""Steps of training against PEFT + bitsandbytes: tokens a second, CPU seconds, peak memory, losses, and the share of
the machine's own matrix rate.

    python scripts/bench_train.py --against peft                      # SmolLM2, 2 x 512 tokens, checkpointing on
    python scripts/bench_train.py --against peft --no-grad-checkpoint
    python scripts/bench_train.py --against lora                      # qmica's own LoRA
    python scripts/bench_train.py --against peft --memory 1GB         # qmica within a budget, PEFT with checkpointing
    python scripts/bench_train.py --model FOLDER --batch-size 1 --length 256 --steps 2    # alone: any model
    python scripts/bench_train.py --against peft --model FOLDER --batch-size 8 --length 2048 --device cuda

How: each side is a process of its own: load, attach, one step to warm up. Then they step in turn (ours first, theirs
first, ...), the other one waiting, so that a machine that slows down slows both; ratios are medians over the pairs of
steps. The token ids and batches are the same, with no padding and no dropout. Both train rank 16 on all linears beside
NF4 weights with double quantization and torch's AdamW (CUDA: paged 8-bit), attend by sdpa and compute in the same
dtype. qmica's side is the loop of `qmica train`; PEFT's is what its documentation gives for 4 bits
(prepare_model_for_kbit_training, get_peft_model, non-reentrant checkpointing) and the model's own loss. Memory is the
peak of anonymous memory less what it was after the imports (sampled every 5 ms); on CUDA the allocator's peak. FLOPs
are counted as 2 a weight and token for each pass that the setting calls for: forward, backward, and with checkpointing
the forward again; adapters, attention and dequantizing are not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch is there: DESIGN's rule for benchmarks
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from qmica import allocator, data, durable, memory, model, packing, quant, samples, source, tokenizer, training, weights
from qmica.config import AdapterConfig, DataConfig, Job, ModelConfig, TrainingConfig
from qmica.errors import QmicaError

WARM_UP = 1
TALL = Console(width=200)


def main() -> None:
    options = _options()
    if options.child:
        for row in CHILDREN[options.child](options):
            print(json.dumps(row), flush=True)
            sys.stdin.readline()
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--against", choices=("peft", "lora"))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=512, help="tokens a row")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="that count, behind one that does not")
    parser.add_argument("--grad-checkpoint", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--components", default="minor", help="random: a 7B's minor subspaces take minutes on a CPU")
    parser.add_argument("--memory", help="qmica's own choice within this, in place of checkpointing all or nothing")
    parser.add_argument("--stream", choices=("none", "host", "disk"), default="none")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--child", choices=tuple(CHILDREN), help=argparse.SUPPRESS)
    return parser.parse_args()


# ---- the parent


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Have the sides step in turn, print a row for each and the ratios."""
    sides = ["qmica"] + ([options.against] if options.against else [])
    arguments = sys.argv[1:]
    if options.against == "peft":
        arguments += ["--model", str(_as_folder(options.model, folder))]
    children = {side: _Child([sys.executable, __file__, *arguments, "--child", side]) for side in sides}
    for turn in range(options.steps):
        for side in sides if turn % 2 == 0 else reversed(sides):
            children[side].step()
    for child in children.values():
        child.end()
    checkpointing = f"--memory {options.memory}" if options.memory else "on" if options.grad_checkpoint else "off"
    TALL.print(
        f"{options.model}, {options.bits} bits, rank {options.rank}, {options.batch_size} x {options.length} tokens, "
        f"checkpointing {checkpointing}, {options.device}; {options.steps} steps of each in turn, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads"
    )
    TALL.print(_table(options, children))
    TALL.print(f"qmica: {children['qmica'].first['how']}")
    if options.against:
        ours, theirs = (children[side] for side in sides)
        speed, cpu = (_ratio(theirs.column(name), ours.column(name)) for name in ("seconds", "cpu"))
        held = ours.steps[-1]["peak"] / theirs.steps[-1]["peak"]
        TALL.print(
            f"qmica / {options.against}: tokens/s x {speed:.2f}, CPU seconds x {1 / cpu:.2f}, memory x {held:.2f}"
        )


class _Child:
    """A side's process, up to the end of its first step; it does nothing until it is asked for the next one."""

    def __init__(self, command: list[str]):
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (as long as the child)
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.first = self._read()
        self.steps: list[dict] = []

    def step(self) -> None:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        self.steps.append(self._read())

    def end(self) -> None:
        self.process.communicate("\n")

    def column(self, name: str) -> list[float]:
        return [step[name] for step in self.steps]

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise SystemExit(self.errors.read())
        return json.loads(line)


def _ratio(above: list[float], below: list[float]) -> float:
    """The median ratio of what was measured in turn."""
    return statistics.median(one / other for one, other in zip(above, below, strict=True))


def _as_folder(name: str, folder: Path) -> Path:
    """The model as a folder of safetensors in bf16, which transformers can quantize itself."""
    found = source.resolve(name)
    if found.kind != "gguf":
        return found.folder
    opened = weights.open_weights(found)
    place = folder / "model"
    place.mkdir()
    weights.write_sharded(opened, place, torch.bfloat16)
    durable.write_json(place / "config.json", opened.config)
    tokenizer.load(found).save_pretrained(place)
    return place


def _table(options: argparse.Namespace, children: dict[str, _Child]) -> Table:
    table = Table("", "tokens/s (range)", "CPU s a step", "peak memory", "losses", "matrix rate used", "of")
    tokens = options.batch_size * options.length
    for side, child in children.items():
        seconds, rate = child.column("seconds"), statistics.median(child.column("rate"))
        speed = tokens / statistics.median(seconds)
        table.add_row(
            side,
            f"{speed:.0f} ({tokens / max(seconds):.0f}-{tokens / min(seconds):.0f})",
            f"{statistics.median(child.column('cpu')):.2f}",
            durable.size_text(child.steps[-1]["peak"]),
            f"{child.first['loss']:.4f} ... {child.steps[-1]['loss']:.4f}",
            f"{speed * child.first['flops'] / rate:.0%}",
            f"{rate / 1e9:.0f} GFLOP/s",
        )
    return table


# ---- the children


def run_qmica(options: argparse.Namespace, method: str = "mica") -> Iterator[dict]:
    """Steps of the loop of `qmica train`."""
    before = _start(options.device)
    allocator.keep_freed()
    job = _job(options, method)
    accelerator = training.make_accelerator(job)
    say = lambda text: print(text, file=sys.stderr)  # noqa: E731
    with memory.peak(accelerator.device) as peak:
        found = source.resolve(options.model)
        compute = model.choose_dtype("auto", accelerator.device)
        empty = model.on_meta(model.read_config(found), compute)
        prepared = data.Prepared(_examples(options, found, empty.config.vocab_size), None, None, None)
        choice = training.choose(job, weights.headers(found), empty, prepared, accelerator.device, compute, say)
        network = training.load_network(job, found, choice.modes, accelerator.device, say, None)
        loop = training.Loop(job, None, network, prepared, accelerator, choice.parts)
        network.train()
        with memory.held_below(choice.limit, accelerator.device):
            yield from _measured(options, network, lambda: loop.update()["loss"], peak, before, str(choice))


def run_lora(options: argparse.Namespace) -> Iterator[dict]:
    return run_qmica(options, "lora")


def run_peft(options: argparse.Namespace) -> Iterator[dict]:
    """Steps of LoRA by PEFT beside bitsandbytes' 4-bit linears, as PEFT's guide to quantization has it."""
    import torch._dynamo  # part of PEFT's imports: bitsandbytes asks for it, unless qmica was there first
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    before = _start(options.device)
    device = torch.device(options.device)
    dtype = model.choose_dtype("auto", device)
    with memory.peak(device) as peak:
        four = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
        network = AutoModelForCausalLM.from_pretrained(
            options.model, quantization_config=four, dtype=dtype, device_map={"": options.device}
        )
        network = prepare_model_for_kbit_training(
            network, options.grad_checkpoint, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", lora_dropout=0.0)
        network = get_peft_model(network, lora)
        network.config.use_cache = False
        trained = [part for part in network.parameters() if part.requires_grad]
        name = "paged_adamw_8bit" if device.type == "cuda" else "adamw"
        optimizer = quant.OPTIMIZERS[name](trained, 1e-3, training.BETAS, 0.01, device)
        examples = _examples(options, source.resolve(options.model), network.config.vocab_size)
        job = _job(options, "lora")
        stream = training.Stream(data.Prepared(examples, None, None, None), job.data, job.training)
        network.train()
        steps = iter(range(WARM_UP + options.steps))

        def step() -> float:
            batch = packing.to(stream[next(steps)], device)
            loss = network(input_ids=batch.input_ids, labels=batch.labels).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        yield from _measured(options, network, step, peak, before, "")


def _job(options: argparse.Namespace, method: str) -> Job:
    return Job(
        ModelConfig(options.model, bits=options.bits, device=options.device, stream=options.stream),
        AdapterConfig(rank=options.rank, method=method, components=options.components if method == "mica" else "minor"),
        DataConfig(max_seq_length=options.length),
        TrainingConfig(
            steps=WARM_UP + options.steps,
            batch_size=options.batch_size,
            grad_checkpoint=None if options.memory else options.grad_checkpoint,
            memory=options.memory,
            schedule="constant",
            warmup=0,
        ),
    )


def _start(device: str) -> int:
    """Bytes held after the imports."""
    return memory.measure(torch.device(device))


def _examples(options: argparse.Namespace, found: source.Source, vocabulary: int) -> packing.Examples:
    """Whole windows of the bundled texts; of random tokens where the model has no tokenizer."""
    count = options.batch_size * (WARM_UP + options.steps)
    try:
        tokens = tokenizer.load(found)
    except QmicaError:
        ids = np.random.default_rng(0).integers(vocabulary, size=count * options.length, dtype=np.int32)
        supervised = np.arange(len(ids)) % options.length > 0
        return packing.Examples(
            ids, supervised, np.arange(count + 1) * options.length, np.arange(count, dtype=np.int32)
        )
    texts = (*samples.ALMANAC, *samples.REPLAY)
    read = data.prepare(texts, tokens, max_seq_length=options.length, say=lambda text: None).train
    whole = np.flatnonzero(read.lengths == options.length)[:count]
    return read.select(np.isin(np.arange(len(read)), whole))


def _measured(
    options: argparse.Namespace, network: torch.nn.Module, step, peak, before: int, how: str
) -> Iterator[dict]:
    """A row for each step, the first one to warm up: what it took, and what a matrix product takes right after it."""
    cpu = options.device == "cpu"
    for number in range(WARM_UP + options.steps):
        began, used = time.perf_counter(), time.process_time()
        loss = step()
        if not cpu:
            torch.cuda.synchronize()
        row = {"loss": loss, "seconds": time.perf_counter() - began, "cpu": time.process_time() - used}
        if number == 0:
            row |= {"how": how, "flops": _flops(network.config, options)}
        yield row | {"peak": peak() - (before if cpu else 0), "rate": _matrix_rate(network.config, options)}


def _flops(config, options: argparse.Namespace) -> float:
    """FLOPs a token of the weights' own products."""
    empty = model.on_meta(config, torch.float32)
    inside = sum(
        part.weight.numel() for name, part in empty.named_modules() if quant.is_linear(part) and ".layers." in name
    )
    head = empty.get_output_embeddings().weight.numel()
    return 2 * ((3 if options.grad_checkpoint else 2) * inside + 2 * head)


def _matrix_rate(config, options: argparse.Namespace) -> float:
    """FLOPs a second of the batch times a matrix of the feed-forward's shape, in the dtype of the run: the median of
    as many as take a third of a second.
    """
    device = torch.device(options.device)
    dtype = model.choose_dtype("auto", device)
    x = torch.randn(options.batch_size * options.length, config.hidden_size, device=device, dtype=dtype)
    w = torch.randn(config.intermediate_size, config.hidden_size, device=device, dtype=dtype)
    y = torch.empty(len(x), len(w), device=device, dtype=dtype)
    took, until = [], time.perf_counter() + 0.3
    while time.perf_counter() < until or len(took) < 3:
        began = time.perf_counter()
        torch.mm(x, w.T, out=y)
        if device.type == "cuda":
            torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
    return 2 * len(x) * w.numel() / statistics.median(took)


CHILDREN = {"qmica": run_qmica, "lora": run_lora, "peft": run_peft}


if __name__ == "__main__":
    main()
