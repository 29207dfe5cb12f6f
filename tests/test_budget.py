"""What is chosen for a budget: no more is given up than must be, and what is chosen is within it."""

from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig

from qmica import budget, memory, model, pace
from qmica.config import AdapterConfig, TrainingConfig
from qmica.errors import QmicaError

LAYERS, ROWS = 12, 8
SIZES = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
RATES = dict.fromkeys(pace.WORK, 1e11) | {"dequantizing": 1e9, "elementwise": 1e10, "logits": 1e10}


@pytest.fixture(scope="module")
def case():
    config = AutoConfig.for_model("llama", vocab_size=8000, num_hidden_layers=LAYERS, tie_word_embeddings=True, **SIZES)
    empty = model.on_meta(config, torch.float32)
    rows = memory.Rows(ROWS, 256, packed=False)
    matrices = [name for name, weight in empty.named_parameters() if weight.dim() == 2]
    return memory.Case(empty, 4, AdapterConfig(), TrainingConfig(), rows, torch.float32, mapped=matrices)


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """A machine whose rates are known: where seconds decide, they are the same on every one."""
    monkeypatch.setattr(pace, "calibrate", lambda case: RATES)


def total(case, modes, parts=1):
    rows = memory.Rows(-(-ROWS // parts), 256, packed=False)
    return memory.plan(memory.Case(**{**vars_of(case), "modes": tuple(modes), "rows": rows})).total


def vars_of(case):
    return {name: getattr(case, name) for name in case.__dataclass_fields__}


def test_with_memory_to_spare_nothing_is_given_up(case, monkeypatch):
    monkeypatch.setattr(pace, "calibrate", lambda case: pytest.fail("there is nothing to choose"))
    choice = budget.choose(case, 1e12)
    assert choice.modes == ("plain",) * LAYERS and choice.parts == 1 and choice.fits
    assert str(choice) == "all layers keep their activations"
    assert choice.plan.total == total(case, choice.modes)


@pytest.mark.parametrize("share", [0.95, 0.8, 0.6, 0.4, 0.25, 0.1])
def test_no_more_is_given_up_than_must_be(case, share):
    """Within the budget; and with one layer less given up, in as many parts, it would not be."""
    most, least = total(case, ["plain"] * LAYERS), total(case, ["checkpoint"] * LAYERS, ROWS)
    nbytes = least + share * (most - least)
    choice = budget.choose(case, nbytes)
    assert choice.fits and choice.plan.total <= nbytes < most
    ladder = budget._ladder(case, None)
    rung = ladder.index(choice.modes)
    assert rung == 0 or total(case, ladder[rung - 1], choice.parts) > nbytes


def test_the_fastest_way_to_fit_is_taken(case):
    """Against every rung of the ladder and every number of parts, one by one."""
    nbytes = 0.5 * total(case, ["plain"] * LAYERS)
    ways = {
        (parts, modes): parts * sum(pace.seconds(step_of(case, modes, parts), RATES).values())
        for parts in (1, 2, 4, 8)
        for modes in budget._ladder(case, None)
        if total(case, modes, parts) <= nbytes
    }
    choice = budget.choose(case, nbytes)
    chosen = ways[choice.parts, choice.modes]
    assert len(ways) > 10 and chosen == pytest.approx(min(ways.values()), rel=1e-9)


def step_of(case, modes, parts):
    rows = memory.Rows(-(-ROWS // parts), 256, packed=False)
    part = memory.Case(**{**vars_of(case), "modes": tuple(modes), "rows": rows})
    return pace.Step(part, rows.tokens)


def test_the_ladder_goes_down_step_by_step(case):
    """But where the first layer does: what a layer computes again is held for that moment beside what others keep."""
    totals = [total(case, modes) for modes in budget._ladder(case, None)]
    rises = [rung for rung, (one, other) in enumerate(pairwise(totals)) if other > one]
    assert set(rises) <= {0, LAYERS} and totals[-1] < 0.7 * totals[0]


def test_what_cannot_fit_takes_the_least_there_is(case):
    choice = budget.choose(case, 1e6)
    assert not choice.fits and choice.parts == ROWS and choice.modes == ("checkpoint",) * LAYERS
    assert choice.plan.total == memory.plan(budget.least(case)).total
    assert str(choice) == "all layers are computed again in the backward; a batch is computed in 8 parts"


@pytest.mark.parametrize(("forced", "mode"), [(True, "checkpoint"), (False, "plain")])
def test_grad_checkpoint_leaves_the_parts_to_choose(case, forced, mode):
    nbytes = total(case, [mode] * LAYERS, 2) * 1.001
    choice = budget.choose(case, nbytes, forced)
    assert choice.modes == (mode,) * LAYERS and choice.parts == 2 and choice.fits


def test_a_mixture_is_told(case):
    modes = ("checkpoint",) * 2 + ("products",) * 10
    said = str(budget.Choice(memory.Case(**{**vars_of(case), "modes": modes}), 2, memory.Plan(), 1e9))
    assert said == (
        "10 layers keep the products of their linears and attention, 2 layers are computed again in the backward; "
        "a batch is computed in 2 parts"
    )


def test_a_resumed_run_keeps_its_parts(case):
    nbytes = total(case, ["products"] * LAYERS, 2) * 1.01
    assert budget.choose(case, nbytes, None, 1).parts == 1 and budget.choose(case, nbytes, None, 8).parts == 8


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GB", 8e9), ("7.5G", 7.5e9), ("8GiB", 8 * 2**30), ("900MB", 9e8), ("2", 2e9), (1.5, 1.5e9), ("900 B", 900)],
)
def test_sizes(text, nbytes):
    assert TrainingConfig(memory=text).memory_bytes == nbytes


@pytest.mark.parametrize("text", ["lots", "", "-1", "0", "8000000000", "8 GBB"])
def test_what_is_no_size(text):
    with pytest.raises(
        QmicaError, match=r"^--memory .*: give a size such as 8GB, 7.5G, 8GiB or 900MB, or a number of GB$"
    ):
        TrainingConfig(memory=text)


def test_what_may_be_taken():
    """What --memory names, if it is there, else four fifths of what is free; beside what is held already."""
    device = torch.device("cpu")
    assert budget.allowed(123, device) == 123 and budget.allowed(10**18, device) < 10**15
    free, held = memory.available(device), memory.measure(device)
    assert budget.allowed(None, device) == pytest.approx(0.8 * free + held, rel=0.1)
