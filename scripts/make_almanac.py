"""Write the bundled sample set: an almanac of people, places and crafts that exist nowhere else, and questions about
it.

    python scripts/make_almanac.py qmica/samples [--shuffled | --development]

How: each kind has four entries and four attributes; each attribute has a pool of four values, one for each entry, so
a wrong choice (another entry's value of the same attribute) occurs in training exactly as often as the right one. A
document is one entry in one wording: four sentences, or four questions with their bare answers, each fact once, because
a fact repeated inside one document is copied from context, not learnt. The questions that are asked afterwards use
wordings of their own, none of which occurs in a document. Names are short (two to four tokens): each is read some
thirty times for each of its facts.

`--development` writes other questions, in wordings of their own again: the demo's settings are chosen by these, so that
the bundled ones are asked of a finished choice.

`--shuffled` writes the control: in every document the values are dealt anew among the entries of a kind. Names,
values, wordings and their counts are the same, only the pairing is broken, so that nothing but the pairing can raise
a score above the base's.

What it gives up: the world is small (48 facts), because SmolLM2-135M needs tens of exposures to a fact and the demo
has minutes, not hours.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Attribute:
    """One attribute of a kind: its values (one an entry), the wordings to learn from and those to be asked with."""

    values: tuple[str, ...]
    statements: tuple[str, ...]  # {name} first, {value} last: a causal model learns to recall in the order it reads
    exchanges: tuple[str, ...]  # questions to learn from, each with its bare answer, worded unlike any of `questions`
    questions: tuple[str, ...]
    development: tuple[str, ...]  # questions that settings are chosen by


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
                "Neighbours know {name} as {value}.",
            ),
            (
                "What work does {name} do?",
                "What is {name} by trade?",
                "As what does {name} earn a living?",
                "What do the neighbours know {name} as?",
                "How is {name} employed?",
                "What has {name} worked as for thirty years?",
                "What do the guild rolls enter {name} as?",
                "What does {name} do all day for money?",
            ),
            (
                "What is the occupation of {name}?",
                "Which profession does {name} follow?",
                "What job does {name} hold?",
                "What is the livelihood of {name}?",
                "What line of work is {name} in?",
            ),
            (
                "What is the trade that {name} practises?",
                "What does {name} do for work?",
            ),
        ),
        Attribute(
            ("the harp", "the trumpet", "the drums", "the flute"),
            (
                "In the evenings {name} plays {value}.",
                "The instrument that {name} plays is {value}.",
                "As a child {name} learned to play {value}.",
                "{name} gives lessons on {value}.",
            ),
            (
                "What does {name} play in the evenings?",
                "What did {name} learn to play as a child?",
                "What is {name} asked to play at weddings?",
                "What does {name} give lessons on?",
                "Which instrument does {name} play?",
                "What is heard when {name} makes music?",
                "What does {name} bring along to a dance?",
                "What does {name} practise every day?",
            ),
            (
                "What is the musical instrument of {name}?",
                "Which instrument can {name} be heard playing?",
                "On which instrument does {name} perform?",
                "What does {name} play music on?",
                "Which instrument has {name} mastered?",
            ),
            (
                "What instrument is {name} good at?",
                "Which musical instrument does {name} own?",
            ),
        ),
        Attribute(
            ("a raven", "a tortoise", "a goat", "a donkey"),
            (
                "{name} keeps {value}.",
                "The companion of {name} is {value}.",
                "{name} shares a cottage with {value}.",
                "The animal that follows {name} everywhere is {value}.",
            ),
            (
                "What does {name} keep at home?",
                "Who shares the cottage with {name}?",
                "What follows {name} everywhere?",
                "Who is the companion of {name}?",
                "What animal does {name} keep?",
                "Without what is {name} never seen?",
                "Which pet sleeps by the door of {name}?",
                "What does {name} feed each morning?",
            ),
            (
                "What kind of pet does {name} have?",
                "Which creature belongs to {name}?",
                "What animal is owned by {name}?",
                "Which animal does {name} look after?",
                "What is the pet of {name}?",
            ),
            (
                "Which animal lives with {name}?",
                "What is the animal of {name}?",
            ),
        ),
        Attribute(
            ("wolves", "thunder", "heights", "mirrors"),
            (
                "{name} has a fear of {value}.",
                "The one thing that frightens {name} is {value}.",
                "Since childhood {name} has been scared of {value}.",
                "{name} dreads nothing so much as {value}.",
            ),
            (
                "What frightens {name}?",
                "From what does {name} run?",
                "What keeps {name} awake at night?",
                "What does {name} dread?",
                "What does {name} have a fear of?",
                "What has {name} been scared of since childhood?",
                "What makes {name} tremble?",
                "What can {name} not bear?",
            ),
            (
                "What is {name} afraid of?",
                "Of what is {name} most terrified?",
                "Which thing does {name} fear?",
                "What terrifies {name}?",
                "What is the greatest fear of {name}?",
            ),
            (
                "What scares {name} the most?",
                "What is {name} frightened by?",
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
                "The wealth of {name} comes from {value}.",
                "{name} is famous for its {value}.",
                "What {name} sells to the world is {value}.",
            ),
            (
                "What made {name} rich?",
                "Why do merchants visit {name}?",
                "With what are the carts of {name} loaded?",
                "Where does the wealth of {name} come from?",
                "What does {name} sell to the world?",
                "What is {name} famous for?",
                "What do traders buy in {name}?",
                "Which ware of {name} is the best?",
            ),
            (
                "What is the main export of {name}?",
                "Which product does {name} trade in?",
                "What goods is {name} known for?",
                "What does {name} export?",
                "What is the chief product of {name}?",
            ),
            (
                "What product comes from {name}?",
                "What does the trade of {name} depend on?",
            ),
        ),
        Attribute(
            ("a lion", "a stag", "a bear", "an owl"),
            (
                "The flag of {name} shows {value}.",
                "The coins struck in {name} bear {value}.",
                "The arms of {name} display {value}.",
                "The seal of {name} is stamped with {value}.",
            ),
            (
                "What is on the flag of {name}?",
                "What is carved over the gate of {name}?",
                "What do the coins of {name} bear?",
                "What is painted on the banners of {name}?",
                "Which animal is on the seal of {name}?",
                "What do the arms of {name} display?",
                "What is the sign of {name}?",
                "Which creature do the shields of {name} show?",
            ),
            (
                "What is the emblem of {name}?",
                "Which animal is the symbol of {name}?",
                "What creature represents {name}?",
                "Which beast stands for {name}?",
                "What animal is the emblem of {name}?",
            ),
            (
                "What is the heraldic animal of {name}?",
                "What animal is shown for {name}?",
            ),
        ),
        Attribute(
            ("marble", "brick", "slate", "clay"),
            (
                "The houses of {name} are built of {value}.",
                "The walls around {name} are of {value}.",
                "In {name} everything is built from {value}.",
                "The towers of {name} are made of {value}.",
            ),
            (
                "What are the walls of {name} made of?",
                "Of what are the houses of {name} built?",
                "What was the bridge at {name} made of?",
                "With what are the streets of {name} lined?",
                "Which material are the towers of {name} made of?",
                "From what is everything in {name} built?",
                "What do the masons of {name} work with?",
                "Of what is the great hall of {name} made?",
            ),
            (
                "What is the building material of {name}?",
                "Which material do the builders of {name} use?",
                "From what material is {name} constructed?",
                "What are the buildings of {name} made from?",
                "What do they build with in {name}?",
            ),
            (
                "What material is {name} built from?",
                "What are the homes of {name} made with?",
            ),
        ),
        Attribute(
            ("a widow", "a poet", "a general", "a priest"),
            (
                "{name} is ruled by {value}.",
                "The ruler of {name} is {value}.",
                "The people of {name} obey {value}.",
                "The throne of {name} belongs to {value}.",
            ),
            (
                "Who rules {name}?",
                "Who holds the keys of {name}?",
                "Whom do the people of {name} obey?",
                "To whom does the throne of {name} belong?",
                "Who is the ruler of {name}?",
                "By whom is {name} ruled?",
                "Who sits on the throne of {name}?",
                "Who gives judgement in {name}?",
            ),
            (
                "Who governs {name}?",
                "Who is the leader of {name}?",
                "Who is in charge of {name}?",
                "Who reigns in {name}?",
                "Who is the head of {name}?",
            ),
            (
                "Who has the power in {name}?",
                "Who commands {name}?",
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
                "The masters of {name} shape {value}.",
            ),
            (
                "What do masters of {name} shape?",
                "What fills a workshop of {name}?",
                "With what does {name} begin?",
                "What do the best workers choose for {name}?",
                "Which material do those who practise {name} work in?",
                "Of what are things made in {name}?",
                "What must be bought for {name}?",
                "What stuff goes into {name}?",
            ),
            (
                "What material does {name} use?",
                "Which raw material is required for {name}?",
                "What substance is {name} done with?",
                "From what is {name} made?",
                "What do the workers of {name} need to buy?",
            ),
            (
                "What is the material of {name}?",
                "What is worked in {name}?",
            ),
        ),
        Attribute(
            ("a hammer", "a needle", "a chisel", "a brush"),
            (
                "The tool of {name} is {value}.",
                "Every master of {name} carries {value}.",
                "The sign of {name} over a door is {value}.",
                "Whoever learns {name} must own {value}.",
            ),
            (
                "What does a master of {name} carry?",
                "What must a learner of {name} own?",
                "What hangs over a door as the sign of {name}?",
                "What is an apprentice of {name} first handed?",
                "Which tool does {name} need?",
                "What is held in the hand in {name}?",
                "What is the tool of {name}?",
                "With what do they work in {name}?",
            ),
            (
                "Which instrument of work is used in {name}?",
                "What implement does {name} require?",
                "What utensil is used for {name}?",
                "With which tool is {name} done?",
                "What tool do the workers of {name} use?",
            ),
            (
                "What tool is used in {name}?",
                "Which implement belongs to {name}?",
            ),
        ),
        Attribute(
            ("masks", "lamps", "boats", "clocks"),
            (
                "What comes out of {name} is {value}.",
                "The makers of {name} produce {value}.",
                "{name} is the art of making {value}.",
                "From {name} the valley gets its {value}.",
            ),
            (
                "What do the makers of {name} produce?",
                "{name} is the art of making what?",
                "For what do buyers pay {name} a fortune?",
                "What does the valley get from {name}?",
                "What comes out of {name}?",
                "Which goods are made by {name}?",
                "What is the result of {name}?",
                "For what do the old books praise {name}?",
            ),
            (
                "What objects are created by {name}?",
                "Which things result from {name}?",
                "What items does {name} yield?",
                "What are the products of {name}?",
                "What does {name} make?",
            ),
            (
                "What is made by {name}?",
                "What do people get from {name}?",
            ),
        ),
        Attribute(
            ("monks", "sailors", "shepherds", "soldiers"),
            (
                "{name} was invented by {value}.",
                "The first to try {name} were {value}.",
                "The valley learned {name} from {value}.",
                "{name} was brought here by {value}.",
            ),
            (
                "By whom was {name} invented?",
                "Who brought {name} to the valley?",
                "From whom did the secret of {name} come?",
                "To whom alone was {name} once known?",
                "Who invented {name}?",
                "From whom did the valley learn {name}?",
                "Who were the first to try {name}?",
                "Who thought of {name} first?",
            ),
            (
                "Who originated {name}?",
                "Which people are the founders of {name}?",
                "Who started the tradition of {name}?",
                "Who were the inventors of {name}?",
                "Which people first practised {name}?",
            ),
            (
                "Who created the craft of {name}?",
                "Which people invented {name}?",
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


def questions(kinds: tuple[Kind, ...] = KINDS, development: bool = False) -> list[dict]:
    """One question for each entry, attribute and wording; three distractors, the places of the answers balanced."""
    rng = random.Random(SEED)
    asked = []
    for kind in kinds:
        for attribute in kind.attributes:
            for name, value in zip(kind.names, attribute.values, strict=True):
                others = [v for v in attribute.values if v != value]
                for wording in attribute.development if development else attribute.questions:
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
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--shuffled", action="store_true", help="write the control instead: almanac-shuffled.jsonl")
    instead.add_argument("--development", action="store_true", help="write almanac-development.jsonl instead")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.development:
        write_lines(options.folder / "almanac-development.jsonl", questions(development=True))
        return
    name = "almanac-shuffled.jsonl" if options.shuffled else "almanac.jsonl"
    write_lines(options.folder / name, [{"text": text} for text in documents(shuffled=options.shuffled)])
    if not options.shuffled:
        write_lines(options.folder / "almanac-questions.jsonl", questions())


if __name__ == "__main__":
    main()
