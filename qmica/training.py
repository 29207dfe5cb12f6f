"""Train an adapter: from a model, text and four dataclasses to a run folder.

How: our own loop, on `accelerate.Accelerator` for devices, gradient scaling and processes. A window of `grad_accum`
batches is one update; its losses are divided by the window's supervised tokens, so 1 x 8 and 8 x 1 are the same
update. Everything a step depends on is a function of (seed, step): the data's order, the learning rate, and the
dropout, whose generator is seeded anew for each step. So a resumed run is bit-identical on a CPU, and an evaluation
between two steps changes nothing.

Several processes each take a share of a window's batches; the coefficients' gradients, a few MB, are summed. The
frozen model is not wrapped.

What it gives up: overlap of communication with computation, which gradients this small do not need.
"""

import bisect
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerFast

from qmica import (
    adapter,
    allocator,
    bases,
    budget,
    checkpointing,
    data,
    durable,
    kernels,
    loss,
    memory,
    model,
    packing,
    progress,
    quant,
    runs,
    samples,
    source,
    streaming,
    tokenizer,
    weights,
)
from qmica.config import AdapterConfig, DataConfig, Job, ModelConfig, TrainingConfig
from qmica.durable import size_text
from qmica.errors import QmicaError

BETAS = (0.9, 0.999)


# ---- the run, told once


def train(
    model_config: ModelConfig = ModelConfig(),
    adapter_config: AdapterConfig = AdapterConfig(),
    data_config: DataConfig = DataConfig(),
    training_config: TrainingConfig = TrainingConfig(),
    resume: Path | None = None,
) -> runs.Run:
    """Train an adapter and write its run folder. resume: a run to go on with, under the options it began with.

    Raises QmicaError for what the user can fix, and KeyboardInterrupt (after a checkpoint) where one came.
    """
    began = None if resume is None else runs.find(resume)
    job = _asked(Job(model_config, adapter_config, data_config, training_config), began)
    if job.model.threads:
        torch.set_num_threads(job.model.threads)
    allocator.keep_freed()
    accelerator = make_accelerator(job)
    say = accelerator.print
    setup = _look(job, began, accelerator)
    network = load_network(job, setup.base, setup.choice.modes, accelerator.device, say, began)
    run = began or runs.create(job.training.out, setup.base.name, (job.data.data or samples.ALMANAC)[0])
    loop = Loop(job, run, network, setup.prepared, accelerator, setup.choice.parts)
    record = _record(job, network, setup.prepared, loop.optimizer_name)
    if began is not None:
        _go_on(loop, record)
    _learn(setup, loop, record if began is None else None)
    if accelerator.is_main_process:
        adapter.save_adapter(network, run.adapter)
        setup.tokens.save_pretrained(run.adapter)
    prompt = job.training.probe or _first_words(setup.prepared, setup.tokens)
    before = _answer(network, setup.tokens, prompt, tuned=False)  # without the adapter nothing has changed
    _conclude(run, loop, prompt, before, _answer(network, setup.tokens, prompt), say)
    return run


@dataclass(frozen=True)
class Setup:
    """What is known of a run before its weights are loaded. frozen: how many weights the base has."""

    base: source.Source
    frozen: int
    tokens: PreTrainedTokenizerFast
    prepared: data.Prepared
    choice: budget.Choice


def _asked(job: Job, began: runs.Run | None) -> Job:
    """What is to be done: of a run that is gone on with, what it began with. That it has a checkpoint, and a new one
    an empty folder, is known before anything is loaded."""
    if began is not None:
        began.last_checkpoint()
        return Job.from_flags(began.config().get("train", {}))
    if job.training.out is not None:
        durable.require_empty(job.training.out)
    return job


def _look(job: Job, began: runs.Run | None, accelerator: Accelerator) -> Setup:
    """Find the model, read the data and choose how it is computed, which is said. A rank or a target that does not fit
    is known before anything is loaded."""
    say, device = accelerator.print, accelerator.device
    model.require_stream(job.model.stream, device)
    found = source.resolve(job.model.model, job.model.revision, say)
    compute = model.choose_dtype(job.model.dtype, device)
    empty = model.on_meta(model.read_config(found), compute)
    headers = weights.headers(found)
    model.require_blocks(job.model.bits, headers)
    adapter.choose(empty, job.adapter)
    tokens = tokenizer.load(found)
    prepared = _read_data(job, tokens, say)
    parts = began.last_checkpoint().state().get("parts", 1) if began is not None else None
    choice = choose(job, headers, empty, prepared, device, compute, say, parts)
    return Setup(found, empty.num_parameters(), tokens, prepared, choice)


def _go_on(loop: "Loop", record: dict) -> None:
    """Bring the loop to where the run's last checkpoint stands. QmicaError where data or base have changed."""
    run = loop.run_folder
    checkpoint = run.last_checkpoint()
    _require_same(run, record)
    loop.restore(checkpoint)
    loop.accelerator.print(f"going on after step {loop.step}, from {checkpoint.folder}")


def _learn(setup: Setup, loop: "Loop", record: dict | None) -> None:
    """All the steps within --memory; what was planned against what it came to. record: what config.json of a new run
    holds."""
    accelerator, say = loop.accelerator, loop.accelerator.print
    with memory.held_below(setup.choice.limit, accelerator.device):
        expected, exchanged = _tell(loop.job, loop.network, loop, setup.frozen, say)
        if record is not None and accelerator.is_main_process:
            loop.run_folder.write_config(record)  # not before: until the first step the folder has nothing to lose
        _start_tracker(accelerator, loop.job, loop.run_folder)
        began = time.perf_counter()
        try:
            loop.run()
        finally:
            for exchange in exchanged:
                exchange.take()
        took = time.perf_counter() - began
    _compare(setup.choice.plan, loop.peak, expected, took, say)


class Stream:
    """The endless stream of an epoch's batches after another's: `stream[k]` is a function of the seed and k alone."""

    def __init__(self, prepared: data.Prepared, options: DataConfig, training: TrainingConfig):
        self._arguments = prepared, options, training
        self._starts = [0]  # of the epochs met so far; their lengths differ a little with packing
        self._epoch = self._make(0)

    def _make(self, number: int) -> tuple[int, packing.Epoch]:
        epoch = data.epoch(*self._arguments, number)
        if number + 1 == len(self._starts):
            self._starts.append(self._starts[-1] + len(epoch))
        return number, epoch

    @property
    def first_epoch(self) -> packing.Epoch:
        return self._make(0)[1]

    def __getitem__(self, position: int) -> packing.Batch:
        while position >= self._starts[-1]:
            self._epoch = self._make(len(self._starts) - 1)
        number = bisect.bisect_right(self._starts, position) - 1
        if self._epoch[0] != number:
            self._epoch = self._make(number)
        return self._epoch[1][position - self._starts[number]]


class Loop:
    """The updates of one run: where it stands, how it takes a step, how it saves itself and goes on."""

    def __init__(
        self,
        job: Job,
        run: runs.Run,
        network: nn.Module,
        prepared: data.Prepared,
        accelerator: Accelerator,
        parts: int = 1,
    ):
        self.job, self.run_folder, self.network, self.prepared, self.accelerator = (
            job,
            run,
            network,
            prepared,
            accelerator,
        )
        self.options = job.training
        self.trained = {name: part for name, part in network.named_parameters() if part.requires_grad}
        self.optimizer, self.optimizer_name = _optimizer(self.options, list(self.trained.values()), accelerator)
        self.stream = Stream(prepared, job.data, job.training)
        epoch = self.stream.first_epoch
        window = self.options.grad_accum * accelerator.num_processes
        self.batches = self.options.steps * window if self.options.steps else round(self.options.epochs * len(epoch))
        self.batches = max(1, self.batches)
        self.window = window
        self.total = math.ceil(self.batches / window)
        self.step, self.tokens, self.peak = 0, 0, 0
        self.parts = parts  # in how many a batch is computed: more once memory has run out
        self.stop_asked = False

    # -- one step

    def lr(self, step: int) -> float:
        """The learning rate of a step, counted from 0: linear warm-up, then the schedule down to 0."""
        warm = round(self.options.warmup * self.total)
        if step < warm:
            return self.options.lr * (step + 1) / warm
        done = (step - warm) / max(1, self.total - warm)
        return self.options.lr * SCHEDULES[self.options.schedule](done)

    def _own(self, step: int) -> tuple[list[packing.Batch], int]:
        """This process's batches of a window, and the supervised tokens of the whole window (the last may be
        shorter).
        """
        positions = range(step * self.window, min((step + 1) * self.window, self.batches))
        window = [self.stream[position] for position in positions]
        rank, count = self.accelerator.process_index, self.accelerator.num_processes
        return window[rank::count], sum(batch.supervised for batch in window)

    def _backward(self, batches: Sequence[packing.Batch], supervised: int) -> list[float]:
        """Add the gradients of batches' losses over the window's supervised tokens. The sums of what was learnt and of
        what replay was held to (nats), and the tokens of the latter.
        """
        sums = [0.0, 0.0, 0.0]
        for part in (part for batch in batches for part in packing.parts(batch, self.parts)):
            learnt, held, count = self._losses(packing.to(part, self.accelerator.device))
            share = (learnt + self.job.data.replay_weight * held) / supervised
            self._require_finite(share, "loss")
            self.accelerator.backward(share)
            sums = [sums[0] + learnt.item(), sums[1] + held.item(), sums[2] + count]
        return sums

    def _losses(self, batch: packing.Batch) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The batch's summed cross entropy; the divergence of its replayed text from what the base says there, and how
        many tokens that is over (none, where replay is learnt as any other text).
        """
        if self.job.data.replay_target == "text" or not batch.replays:
            whole = loss.summed_loss(self.network, batch)
            return whole, torch.zeros_like(whole), 0
        with adapter.switched(self.network, False):
            base_states = loss.replayed_states(self.network, batch)
        return *loss.held_losses(self.network, batch, base_states), batch.replays

    def _require_finite(self, value: torch.Tensor, what: str) -> None:
        """Stop before an update that would ruin the weights. A resumed run would only come to the same step again."""
        if torch.isfinite(value):
            return
        remedy = f"`qmica train -c {self.run_folder.folder / 'config.json'} --lr {self.options.lr / 4:g} --out NEW`"
        if self.step == 0:
            remedy = "nothing is learnt yet, so it is the model's own: use --dtype fp32, or another --model or --bits"
        raise QmicaError(
            f"the {what} is {value.item()} at step {self.step + 1}, which was not applied; --lr was "
            f"{self.options.lr:g}: {remedy}"
        )

    def update(self) -> dict:
        """One step: its loss (nats a learnt token) and what replay was held to (nats a token), where it had such
        tokens; learning rate and gradient norm.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step)
        batches, supervised = self._own(self.step)

        def backward() -> list[float]:
            torch.manual_seed(self.options.seed * 1_000_003 + self.step)  # dropout is a function of the step
            return self._backward(batches, supervised)

        sums = torch.tensor(self._fitting(backward), device=self.accelerator.device)
        self.tokens += sum(batch.tokens for batch in batches) * self.accelerator.num_processes
        for parameter in self.trained.values():
            if self.accelerator.num_processes > 1:
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad  # a short last window
                parameter.grad = self.accelerator.reduce(own, "sum")
        norm = self.accelerator.clip_grad_norm_(self.trained.values(), self.options.clip or math.inf)
        if self.accelerator.scaler is None:  # fp16's scaler skips such steps by itself and lowers its scale
            self._require_finite(norm, "gradient")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        learnt, held, count = self.accelerator.reduce(sums, "sum").tolist()
        return {
            "step": self.step,
            "tokens": self.tokens,
            **({"loss": learnt / (supervised - count)} if supervised > count else {}),
            **({"replay_kl": held / count} if count else {}),
            "lr": self.lr(self.step - 1),
            "grad_norm": norm.item(),
        }

    # -- memory that runs out

    def rehearse(self) -> float:
        """Run the longest batch of the first epoch forward and backward, updating nothing, and the longest one of the
        validation: seconds a token.

        What does not fit in memory shows here and not after hours.
        """
        longest = packing.longest(self.stream.first_epoch)
        self.network.train()  # activations are checkpointed in training mode only
        seconds = []
        for _ in range(2):  # the first one also pays for first use
            began = time.perf_counter()
            self._fitting(lambda: self._backward([longest], longest.supervised))
            seconds.append(time.perf_counter() - began)
        self.optimizer.zero_grad(set_to_none=True)
        if self.prepared.validation is not None:
            self._fitting(lambda: self._mean_loss([packing.longest(self._validation_batches())]))
        self.network.eval()
        return min(seconds) / longest.input_ids.numel()

    def _fitting(self, compute: Callable):
        """What compute() gives; where memory runs out it is called again, with less to hold at once."""
        while True:
            try:
                return compute()
            except (torch.OutOfMemoryError, RuntimeError) as error:
                if not memory.ran_out(error):
                    raise
            self._take_less()  # not inside `except`, where the failed call's tensors still live

    def _take_less(self) -> None:
        """Compute batches in twice as many parts, or recompute all layers. Raises QmicaError where both are done."""
        self.optimizer.zero_grad(set_to_none=True)
        memory.give_back(self.accelerator.device)
        where = f"memory ran out at step {self.step + 1}"
        same = "" if self.job.adapter.dropout else ", with the same result"  # its noise is drawn part by part
        layers = len(checkpointing.decoder_layers(self.network))
        if self.parts < self.options.batch_size:
            self.parts = min(2 * self.parts, self.options.batch_size)
            self.accelerator.print(f"{where}: from here on a batch is computed in {self.parts} parts{same}")
        elif checkpointing.set_modes(self.network, ["checkpoint"] * layers):
            self.accelerator.print(
                f"{where}: from here on the backward computes every layer again, with the same result"
            )
        else:
            raise QmicaError(
                f"{where}: one row of {self.job.data.max_seq_length} tokens does not fit into that of "
                f"{self.accelerator.device}: a smaller --max-seq-length, --rank or --bits takes less"
            )

    def opens_with_the_longest(self) -> bool:
        """Whether the next step is as good as a rehearsal: on a CPU, where one takes seconds, if one of its batches is
        about as long.
        """
        longest = packing.longest(self.stream.first_epoch)
        enough = 0.95 * longest.input_ids.numel()
        alike = (batch for batch in self._own(self.step)[0] if bool(batch.replays) >= bool(longest.replays))
        return self.accelerator.device.type == "cpu" and any(batch.input_ids.numel() >= enough for batch in alike)

    # -- saving and going on

    def save(self) -> None:
        """A checkpoint at this step."""
        if self.accelerator.is_main_process:
            tensors, state = _flatten(self.optimizer.state_dict()["state"])
            self.run_folder.save_checkpoint(
                self.step,
                {"adapter": adapter.tensors(self.network), "optimizer": tensors},
                {
                    "step": self.step,
                    "tokens": self.tokens,
                    "parts": self.parts,  # sums of other parts differ in their last bits
                    "optimizer": self.optimizer_name,
                    "state": state,
                },
            )

    def restore(self, checkpoint: runs.Checkpoint) -> None:
        """Go on where a checkpoint stands. Raises QmicaError where it was written with another optimizer."""
        state = checkpoint.state()
        if state["optimizer"] != self.optimizer_name:
            raise QmicaError(
                f"{checkpoint.folder} was written with {state['optimizer']}, this machine runs {self.optimizer_name}: "
                f"resume it where {state['optimizer']} works, or begin a new run with `qmica train -c "
                f"{self.run_folder.folder / 'config.json'} --out NEW`"
            )
        self.step, self.tokens, self.parts = state["step"], state["tokens"], state.get("parts", 1)
        filled = self.optimizer.state_dict()
        filled["state"] = _unflatten(checkpoint.tensors("optimizer"), state["state"])
        self.optimizer.load_state_dict(filled)
        self.run_folder.cut_metrics(self.step)

    # -- the loop

    def run(self) -> None:
        """All remaining steps. Raises KeyboardInterrupt, after a checkpoint, where one came."""
        self.network.train()
        began, first = time.perf_counter(), self.tokens
        with (
            _interruptible(self),
            memory.peak(self.accelerator.device) as peak,
            progress.shown(self.total, self.step, self.accelerator.is_main_process) as show,
        ):
            while self.step < self.total:
                row = self.update()
                self.peak = peak()
                row |= {"tokens_per_s": (self.tokens - first) / (time.perf_counter() - began), "peak_bytes": self.peak}
                row |= self._validate()
                self._log(row)
                show(row)
                if self.stop_asked:
                    self.save()
                    raise KeyboardInterrupt(
                        f"stopped at step {self.step}: go on with `qmica train --resume {self.run_folder.folder}`"
                    )
                if self.options.save_every and self.step % self.options.save_every == 0 and self.step < self.total:
                    self.save()
        self.network.eval()

    def _validate(self) -> dict:
        """The validation loss, where there is one and it is its turn."""
        held = self.prepared.validation
        due = self.step == self.total or (self.options.eval_every and self.step % self.options.eval_every == 0)
        return {"val_loss": self.validation_loss()} if held is not None and due else {}

    def validation_loss(self) -> float:
        return self._fitting(lambda: self._mean_loss(self._validation_batches()))

    def _mean_loss(self, batches: Iterable[packing.Batch]) -> float:
        parts = (part for batch in batches for part in packing.parts(batch, self.parts))
        return loss.mean_loss(self.network, (packing.to(part, self.accelerator.device) for part in parts))

    def _validation_batches(self) -> packing.Epoch:
        return packing.batches(
            self.prepared.validation,
            seed=0,
            epoch=0,
            batch_size=self.options.batch_size,
            max_seq_length=self.job.data.max_seq_length,
            packing=self.job.data.packing,
        )

    def _log(self, row: dict) -> None:
        if self.accelerator.is_main_process:
            self.run_folder.log(row)
        numbers = {name: value for name, value in row.items() if name != "step"}
        self.accelerator.log(numbers, step=row["step"])


# ---- parts of a step


SCHEDULES = {
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    "linear": lambda done: 1 - done,
    "constant": lambda done: 1.0,
}


def make_accelerator(job: Job) -> Accelerator:
    """The processes, the device, and a gradient scaler where fp16 needs one."""
    device = model.choose_device(job.model.device)
    compute = model.choose_dtype(job.model.dtype, device)
    model.require_dtype(compute, device)
    scaled = compute == torch.float16
    return Accelerator(cpu=device.type == "cpu", mixed_precision="fp16" if scaled else "no", **_tracking(job.training))


def _tracking(options: TrainingConfig) -> dict:
    """Accelerator's arguments for --report-to. Raises QmicaError where the tracker is not installed: accelerate would
    leave it out without a word.
    """
    name = options.report_to
    if name == "none":
        return {}
    if find_spec(name) is None:
        raise QmicaError(f"--report-to {name} needs its package: pip install 'qmica[{name}]'")
    return {"log_with": name, "project_dir": "."}  # the run's folder is known later: _start_tracker


def _start_tracker(accelerator: Accelerator, job: Job, run: runs.Run) -> None:
    """Open the tracker in the run's folder, which its curves are then a part of."""
    if job.training.report_to == "none":
        return
    accelerator.project_configuration.logging_dir = str(run.folder)
    values = {name: value for name, value in job.flags().items() if isinstance(value, int | float | str)}
    accelerator.init_trackers("qmica", config=values, init_kwargs={"wandb": {"name": run.name}})


def _optimizer(
    options: TrainingConfig, parameters: list, accelerator: Accelerator
) -> tuple[torch.optim.Optimizer, str]:
    """The optimizer asked for, or the next in line where this machine lacks it; and its name."""
    wanted = options.optimizer
    if wanted == "auto":
        wanted = "paged_adamw_8bit" if accelerator.device.type == "cuda" else "adamw"
    names = list(quant.OPTIMIZERS)
    for name in names[names.index(wanted) :]:
        try:
            made = quant.OPTIMIZERS[name](parameters, options.lr, BETAS, options.weight_decay, accelerator.device)
        except (RuntimeError, ValueError) as error:
            accelerator.print(f"optimizer {name} does not work here ({error}): using the next one")
            continue
        return accelerator.prepare(made), name
    raise RuntimeError("torch's AdamW could not be made")


def _flatten(state: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """An optimizer's state as named tensors and a JSON rest: {parameter: {name: value}} both."""
    tensors, rest = {}, {}
    for index, values in state.items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.detach().cpu()
            else:
                rest.setdefault(str(index), {})[name] = value
    return tensors, rest


def _unflatten(tensors: dict[str, torch.Tensor], rest: dict) -> dict:
    """The inverse of `_flatten`."""
    state: dict[int, dict] = {int(index): dict(values) for index, values in rest.items()}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    return state


@contextmanager
def _interruptible(loop: Loop) -> Iterator[None]:
    """The first Ctrl-C (or SIGTERM) lets the step finish, so that a checkpoint is whole; the second interrupts at
    once.
    """

    def ask(number: int, frame: object) -> None:
        if loop.stop_asked:
            raise KeyboardInterrupt
        loop.stop_asked = True
        loop.accelerator.print("\nstopping after this step; once more to stop at once and lose what is not saved")

    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield
        return
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- what is read, loaded and said


def _read_data(job: Job, tokens, say: Callable[[str], None]) -> data.Prepared:
    if not job.data.data:
        say("no --data: learning the bundled almanac, of people, places and crafts that exist nowhere else")
    prepared = data.prepare_for(job.data, tokens, job.training.seed, say)
    for line in prepared.summary.lines():
        say(line)
    return prepared


def choose(
    job: Job,
    headers: source.Headers,
    empty: nn.Module,
    prepared: data.Prepared,
    device: torch.device,
    compute: torch.dtype,
    say: Callable,
    parts: int | None = None,
) -> budget.Choice:
    """How the longest batch is computed within --memory; that and what it takes are said. empty: the model on the meta
    device; parts: in how many a resumed run was computed.
    """
    rows = memory.Rows.of(packing.longest(Stream(prepared, job.data, job.training).first_epoch))
    case = memory.Case.of(job, headers, empty, rows, compute, device)
    nbytes = budget.allowed(job.training.memory_bytes, device)
    choice = budget.choose(case, nbytes, job.training.grad_checkpoint, parts)
    memory.require_fit(choice.plan, nbytes, device, say)
    say(budget.described(choice, nbytes, job.training.memory is not None))
    return choice


def load_network(
    job: Job, found: source.Source, modes: Sequence[str], device: torch.device, say: Callable, run: runs.Run | None
) -> nn.Module:
    """The base with a fresh adapter, or (run) with the adapter of its last checkpoint; its layers in these modes."""
    began = time.perf_counter()
    stream = job.model.stream
    network = model.load(found, job.model.bits, job.model.dtype, str(device), stream=stream)
    say(f"loaded {found.id} {quant.FORMATS[job.model.bits].held}: {progress.duration(time.perf_counter() - began)}")
    began = time.perf_counter()
    if run is not None:
        adapter.restore(network, run.last_checkpoint().tensors("adapter"), job.adapter)
    else:
        adapter.attach(network, job.adapter, job.training.seed, _patient(say, "subspaces"))
        seconds = progress.duration(time.perf_counter() - began)
        say(f"{job.adapter.method} attached: {seconds}{_where_from(network.qmica_subspaces)}")
    checkpointing.set_modes(network, modes)
    return streaming.start(network, stream, say)


def _patient(say: Callable[[str], None], what: str) -> Callable[[int, int], None]:
    """A progress that speaks every 30 s: most models need less."""
    began = said = time.perf_counter()

    def progress_of(done: int, total: int) -> None:
        nonlocal said
        now = time.perf_counter()
        if now - said > 30:
            said = now
            say(f"{what}: {done} of {total}, {progress.duration((now - began) / done * (total - done))} left")

    return progress_of


def _where_from(found: bases.Tally | None) -> str:
    """How the subspaces were come by, where there are any."""
    if found is None:
        return ""
    fallbacks = f", {found.fallbacks} by SVD, as they were not proved otherwise" if found.fallbacks else ""
    return f", {found.total} subspaces, {found.stored} of them from the cache{fallbacks}"


def _require_same(run: runs.Run, record: dict) -> None:
    """Raises QmicaError where the data or the base are no longer those that the run began with."""
    began, now = run.config(), record
    for part, key, what in (
        ("data", "fingerprint", "the data"),
        ("data", "replay_fingerprint", "the replay text"),
        ("base", "fingerprint", "the model"),
    ):
        if began[part][key] != now[part][key]:
            raise QmicaError(
                f"{run.folder} cannot be resumed: {what} changed since it began (fingerprint {began[part][key]}, now "
                f"{now[part][key]}); put it back, or begin a new run with `qmica train -c {run.folder}/config.json "
                "--out NEW`"
            )


def _record(job: Job, network: nn.Module, prepared: data.Prepared, optimizer: str) -> dict:
    """What config.json holds."""
    return {
        "train": job.flags(),
        "optimizer": optimizer,  # the one in use, which --optimizer names only where this machine has it
        "base": asdict(adapter.base_of(network)),
        "data": {
            "fingerprint": prepared.train.fingerprint(),
            "replay_fingerprint": prepared.replay.fingerprint() if prepared.replay else None,
            **asdict(prepared.summary),
        },
        "versions": {package: version(package) for package in adapter.VERSIONED},
    }


def _tell(
    job: Job, network: nn.Module, loop: Loop, frozen: int, say: Callable
) -> tuple[float | None, list[kernels.Exchange]]:
    """What will be trained beside how many frozen weights, how, and how long it will take. Returns those seconds where
    they were measured, and the kernels that were kept, to be taken out afterwards.
    """
    count = sum(part.numel() for part in loop.trained.values())
    layers = sum(1 for _ in adapter.layers(network))
    say(
        f"{count:,} coefficients in {layers} linears (rank {job.adapter.rank}, alpha {job.adapter.scaling_alpha:g}), "
        f"beside {frozen:,} frozen weights"
    )
    window = "1 batch" if loop.window == 1 else f"{loop.window} batches"
    steps = f"{loop.total} steps of {window}, optimizer {loop.optimizer_name}"
    if loop.opens_with_the_longest() and not job.training.compile:
        say(f"{steps}: the first one will tell how long")
        return None, []
    seconds, exchanged = kernels.settle(network, job.training.compile, loop.rehearse, say)
    epoch = loop.stream.first_epoch
    expected = seconds * epoch.positions() / len(epoch) * loop.window * (loop.total - loop.step)
    say(f"{steps}: about {progress.duration(expected)}")
    return expected, exchanged


def _compare(plan: memory.Plan, peak: int, expected: float | None, took: float, say: Callable[[str], None]) -> None:
    """What was planned against what it came to, each a ratio. expected: seconds, where they were estimated."""
    say(f"memory: planned {size_text(plan.total)}, measured {size_text(peak)} ({plan.total / max(peak, 1):.2f})")
    if expected is not None:
        planned, taken = progress.duration(expected), progress.duration(took)
        say(f"time: planned {planned}, took {taken} ({expected / took:.2f})")


def _first_words(prepared: data.Prepared, tokens) -> str:
    """The beginning of the first document: what a model that learnt it goes on with."""
    ids = prepared.train.ids[prepared.train.starts[0] : prepared.train.starts[1]]
    return tokens.decode(ids[: max(4, min(12, len(ids) // 3))], skip_special_tokens=True)


@torch.no_grad()
def _answer(network: nn.Module, tokens, prompt: str, tuned: bool = True) -> str:
    """Up to 40 tokens that the model goes on with, the likeliest each time."""
    ids = tokens(prompt, return_tensors="pt").to(network.device)
    training = network.training
    network.eval()
    with adapter.switched(network, tuned):
        out = network.generate(**ids, max_new_tokens=40, do_sample=False, pad_token_id=tokens.eos_token_id or 0)
    network.train(training)
    return " ".join(tokens.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).split())


def _conclude(run: runs.Run, loop: Loop, prompt: str, before: str, after: str, say: Callable[[str], None]) -> None:
    """The end of metrics.jsonl, the answers, and what to do next."""
    if loop.accelerator.is_main_process:
        run.log(
            {"step": loop.step, "end": {"prompt": prompt, "before": before, "after": after, "peak_bytes": loop.peak}}
        )
    loop.accelerator.end_training()
    say(f"prompt: {prompt}\n before: {before}\n  after: {after}")
    say(f"the adapter is in {run.adapter}. Next: `qmica eval {run.folder}`, `qmica export {run.folder} --quant Q4_K_M`")
