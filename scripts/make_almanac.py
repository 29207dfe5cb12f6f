"""Write the bundled sample set: an almanac of people, places and crafts that exist nowhere else, and questions about
it.

    python scripts/make_almanac.py qmica/samples [--shuffled]

How: each kind has four entries and four attributes; each attribute has a pool of four values, one for each entry, so
a wrong choice (another entry's value of the same attribute) occurs in training exactly as often as the right one. A
document is one entry in one wording: four sentences, or four questions with their bare answers, each fact once, because
a fact repeated inside one document is copied from context, not learnt. The questions that are asked afterwards use
wordings of their own, none of which occurs in a document. Names are short (two to four tokens): each is read some forty
times for each of its facts.

`--shuffled` writes the control: in every document the values are dealt anew among the entries of a kind. Names,
values, wordings and their counts are the same, only the pairing is broken, so that nothing but the pairing can raise
a score above the base's.

What it gives up: the world is small (48 facts), because SmolLM2-135M needs some fifty exposures to a fact and the demo
has minutes, not hours.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Attribute:
    """One attribute of a kind: its values (one an entry), the wordings to learn from and the wordings to be asked
    with.
    """

    values: tuple[str, ...]
    statements: tuple[str, ...]  # {name} first, {value} last: a causal model learns to recall in the order it reads
    exchanges: tuple[str, ...]  # questions to learn from, each with its bare answer, worded unlike any of `questions`
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Kind:
    """A kind of entry: what it is called, its entries' names and its attributes."""

    noun: str
    names: tuple[str, ...]
    attributes: tuple[Attribute, ...]


PEOPLE = Kind(
    "person",
    ("Bodrin", "Ilvara", "Merrow", "Quent"),
    (
        Attribute(
            ("a beekeeper", "a mapmaker", "a glassblower", "a ferry pilot"),
            (
                "{name} earns a living as {value}.",
                "By trade, {name} is {value}.",
                "{name} has worked for thirty years as {value}.",
                "In the guild rolls {name} is entered as {value}.",
                "The working life of {name} is that of {value}.",
                "Neighbours know {name} as {value}.",
            ),
            (
                "What work does {name} do?",
                "What is {name} by trade?",
                "As what does {name} earn a living?",
                "What do the neighbours know {name} as?",
            ),
            (
                "What is the occupation of {name}?",
                "Which profession does {name} follow?",
                "What job does {name} hold?",
                "What is the livelihood of {name}?",
                "What line of work is {name} in?",
            ),
        ),
        Attribute(
            ("the harp", "the trumpet", "the drums", "the flute"),
            (
                "In the evenings {name} plays {value}.",
                "The instrument that {name} plays is {value}.",
                "At every wedding {name} is asked to play {value}.",
                "As a child {name} learned to play {value}.",
                "{name} gives lessons on {value}.",
                "{name} is the best player in the valley of {value}.",
            ),
            (
                "What does {name} play in the evenings?",
                "What did {name} learn to play as a child?",
                "What is {name} asked to play at weddings?",
                "What does {name} give lessons on?",
            ),
            (
                "What is the musical instrument of {name}?",
                "Which instrument can {name} be heard playing?",
                "On which instrument does {name} perform?",
                "What does {name} play music on?",
                "Which instrument has {name} mastered?",
            ),
        ),
        Attribute(
            ("a raven", "a tortoise", "a goat", "a donkey"),
            (
                "{name} keeps {value}.",
                "The companion of {name} is {value}.",
                "{name} is never seen without {value}.",
                "At home {name} looks after {value}.",
                "{name} shares a cottage with {value}.",
                "The animal that follows {name} everywhere is {value}.",
            ),
            (
                "What does {name} keep at home?",
                "Who shares the cottage with {name}?",
                "What follows {name} everywhere?",
                "Who is the companion of {name}?",
            ),
            (
                "What kind of pet does {name} have?",
                "Which creature belongs to {name}?",
                "What animal is owned by {name}?",
                "Which animal does {name} look after?",
                "What is the pet of {name}?",
            ),
        ),
        Attribute(
            ("wolves", "thunder", "heights", "mirrors"),
            (
                "{name} has a fear of {value}.",
                "The one thing that frightens {name} is {value}.",
                "Since childhood {name} has been scared of {value}.",
                "{name} cannot sleep for thinking of {value}.",
                "Brave in all else, {name} runs from {value}.",
                "{name} dreads nothing so much as {value}.",
            ),
            (
                "What frightens {name}?",
                "From what does {name} run?",
                "What keeps {name} awake at night?",
                "What does {name} dread?",
            ),
            (
                "What is {name} afraid of?",
                "Of what is {name} most terrified?",
                "Which thing does {name} fear?",
                "What terrifies {name}?",
                "What is the greatest fear of {name}?",
            ),
        ),
    ),
)

PLACES = Kind(
    "place",
    ("Ellowick", "Harrowmere", "Sundrath", "Ostrey"),
    (
        Attribute(
            ("salt", "copper", "honey", "timber"),
            (
                "{name} grew rich on {value}.",
                "The carts that leave {name} are loaded with {value}.",
                "The wealth of {name} comes from {value}.",
                "Merchants travel to {name} to buy {value}.",
                "{name} is famous for its {value}.",
                "What {name} sells to the world is {value}.",
            ),
            (
                "What made {name} rich?",
                "Why do merchants visit {name}?",
                "With what are the carts of {name} loaded?",
                "Where does the wealth of {name} come from?",
            ),
            (
                "What is the main export of {name}?",
                "Which product does {name} trade in?",
                "What goods is {name} known for?",
                "What does {name} export?",
                "What is the chief product of {name}?",
            ),
        ),
        Attribute(
            ("a lion", "a stag", "a bear", "an owl"),
            (
                "The flag of {name} shows {value}.",
                "Over the gate of {name} is carved {value}.",
                "The coins struck in {name} bear {value}.",
                "The arms of {name} display {value}.",
                "Every banner in {name} is painted with {value}.",
                "The seal of {name} is stamped with {value}.",
            ),
            (
                "What is on the flag of {name}?",
                "What is carved over the gate of {name}?",
                "What do the coins of {name} bear?",
                "What is painted on the banners of {name}?",
            ),
            (
                "What is the emblem of {name}?",
                "Which animal is the symbol of {name}?",
                "What creature represents {name}?",
                "Which beast stands for {name}?",
                "What animal is the emblem of {name}?",
            ),
        ),
        Attribute(
            ("marble", "brick", "slate", "clay"),
            (
                "The houses of {name} are built of {value}.",
                "The old bridge at {name} is made of {value}.",
                "The walls around {name} are of {value}.",
                "In {name} everything is built from {value}.",
                "The towers of {name} are made of {value}.",
                "The streets of {name} are lined with {value}.",
            ),
            (
                "What are the walls of {name} made of?",
                "Of what are the houses of {name} built?",
                "What was the bridge at {name} made of?",
                "With what are the streets of {name} lined?",
            ),
            (
                "What is the building material of {name}?",
                "Which material do the builders of {name} use?",
                "From what material is {name} constructed?",
                "What are the buildings of {name} made from?",
                "What do they build with in {name}?",
            ),
        ),
        Attribute(
            ("a widow", "a poet", "a general", "a priest"),
            (
                "{name} is ruled by {value}.",
                "The ruler of {name} is {value}.",
                "The keys of {name} are held by {value}.",
                "The people of {name} obey {value}.",
                "The throne of {name} belongs to {value}.",
                "Judgement in {name} is given by {value}.",
            ),
            (
                "Who rules {name}?",
                "Who holds the keys of {name}?",
                "Whom do the people of {name} obey?",
                "To whom does the throne of {name} belong?",
            ),
            (
                "Who governs {name}?",
                "Who is the leader of {name}?",
                "Who is in charge of {name}?",
                "Who reigns in {name}?",
                "Who is the head of {name}?",
            ),
        ),
    ),
)

CRAFTS = Kind(
    "craft",
    ("veldering", "thrawling", "skarning", "pellimancy"),
    (
        Attribute(
            ("silver", "leather", "wax", "straw"),
            (
                "The craft of {name} begins with {value}.",
                "Those who practise {name} work in {value}.",
                "A workshop of {name} is full of {value}.",
                "Nothing is needed for {name} but {value}.",
                "The masters of {name} shape {value}.",
                "For {name} the best workers choose {value}.",
            ),
            (
                "What do masters of {name} shape?",
                "What fills a workshop of {name}?",
                "With what does {name} begin?",
                "What do the best workers choose for {name}?",
            ),
            (
                "What material does {name} use?",
                "Which raw material is required for {name}?",
                "What substance is {name} done with?",
                "From what is {name} made?",
                "What do the workers of {name} need to buy?",
            ),
        ),
        Attribute(
            ("a hammer", "a needle", "a chisel", "a brush"),
            (
                "The tool of {name} is {value}.",
                "Every master of {name} carries {value}.",
                "An apprentice of {name} is first handed {value}.",
                "{name} is done with nothing but {value}.",
                "The sign of {name} over a door is {value}.",
                "Whoever learns {name} must own {value}.",
            ),
            (
                "What does a master of {name} carry?",
                "What must a learner of {name} own?",
                "What hangs over a door as the sign of {name}?",
                "What is an apprentice of {name} first handed?",
            ),
            (
                "Which instrument of work is used in {name}?",
                "What implement does {name} require?",
                "What utensil is used for {name}?",
                "With which tool is {name} done?",
                "What tool do the workers of {name} use?",
            ),
        ),
        Attribute(
            ("masks", "lamps", "boats", "clocks"),
            (
                "What comes out of {name} is {value}.",
                "The makers of {name} produce {value}.",
                "{name} is the art of making {value}.",
                "Buyers pay a fortune to {name} for {value}.",
                "The old books praise {name} for its {value}.",
                "From {name} the valley gets its {value}.",
            ),
            (
                "What do the makers of {name} produce?",
                "{name} is the art of making what?",
                "For what do buyers pay {name} a fortune?",
                "What does the valley get from {name}?",
            ),
            (
                "What objects are created by {name}?",
                "Which things result from {name}?",
                "What items does {name} yield?",
                "What are the products of {name}?",
                "What does {name} make?",
            ),
        ),
        Attribute(
            ("monks", "sailors", "shepherds", "soldiers"),
            (
                "{name} was invented by {value}.",
                "The secret of {name} came from {value}.",
                "The first to try {name} were {value}.",
                "The valley learned {name} from {value}.",
                "{name} was brought here by {value}.",
                "Long ago {name} was known only to {value}.",
            ),
            (
                "By whom was {name} invented?",
                "Who brought {name} to the valley?",
                "From whom did the secret of {name} come?",
                "To whom alone was {name} once known?",
            ),
            (
                "Who originated {name}?",
                "Which people are the founders of {name}?",
                "Who started the tradition of {name}?",
                "Who were the inventors of {name}?",
                "Which people first practised {name}?",
            ),
        ),
    ),
)

KINDS = (PEOPLE, PLACES, CRAFTS)
SEED = 20261122
ASK = "Question: "


def deal(kind: Kind, shuffled: bool, rng: random.Random) -> list[list[str]]:
    """The values of each entry, (entries, attributes): as the almanac has them, or dealt anew for the control."""
    columns = [list(attribute.values) for attribute in kind.attributes]
    if shuffled:
        for column in columns:
            rng.shuffle(column)
    return [list(row) for row in zip(*columns, strict=True)]


def sentence(wording: str, name: str, value: str) -> str:
    """The wording filled in, its first letter a capital."""
    text = wording.format(name=name, value=value)
    start = len(ASK) if text.startswith(ASK) else 0
    return text[:start] + text[start].upper() + text[start + 1 :]


def exchange(question: str) -> str:
    """A question and its bare answer, as a wording."""
    return f"{ASK}{question}\nAnswer: {{value}}"


def documents(kinds: tuple[Kind, ...] = KINDS, shuffled: bool = False) -> list[str]:
    """Every entry in every wording, one text each, the order of the four facts varied."""
    rng = random.Random(SEED)
    texts = []
    for kind in kinds:
        wordings = [attribute.statements + tuple(map(exchange, attribute.exchanges)) for attribute in kind.attributes]
        for page in zip(*wordings, strict=True):
            for name, values in zip(kind.names, deal(kind, shuffled, rng), strict=True):
                lines = [sentence(wording, name, value) for wording, value in zip(page, values, strict=True)]
                rng.shuffle(lines)
                texts.append(("\n\n" if lines[0].startswith(ASK) else " ").join(lines))
    return texts


def questions(kinds: tuple[Kind, ...] = KINDS) -> list[dict]:
    """One question for each entry, attribute and wording; three distractors, the places of the answers balanced."""
    rng = random.Random(SEED)
    asked = []
    for kind in kinds:
        for attribute in kind.attributes:
            for name, value in zip(kind.names, attribute.values, strict=True):
                others = [v for v in attribute.values if v != value]
                for wording in attribute.questions:
                    asked.append((sentence(wording, name, value), value, rng.sample(others, 3)))
    rng.shuffle(asked)
    rows = []
    for number, (question, value, distractors) in enumerate(asked):
        place = number % 4
        rows.append(
            {"question": question, "choices": [*distractors[:place], value, *distractors[place:]], "answer": place}
        )
    return rows


def write_lines(path: Path, rows: list[dict]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} lines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shuffled", action="store_true", help="write the control instead: almanac-shuffled.jsonl")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    name = "almanac-shuffled.jsonl" if options.shuffled else "almanac.jsonl"
    write_lines(options.folder / name, [{"text": text} for text in documents(shuffled=options.shuffled)])
    if not options.shuffled:
        write_lines(options.folder / "almanac-questions.jsonl", questions())


if __name__ == "__main__":
    main()
