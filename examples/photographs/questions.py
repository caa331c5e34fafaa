"""Questions about captioned photographs, derived from their captions by rule; the answers of every question are balanced.

python examples/photographs/questions.py DEV.tar --out questions.jsonl --images FOLDER

Beside this file, questions.jsonl has those of Flickr8k's 1,000 development photographs: names, questions and answers, no captions.
With --images the photographs themselves are left in a folder and named, so that stages/evaluate.py can ask about them, and the
captions stand with them, the one first that shares most with the others.

A photograph has several captions. A word counts as true of it when at least AGREE of them say so, as false when none says it
or anything that might mean it. Kinds of questions:

| kind | question | answer |
|---|---|---|
| object | is there a dog? | yes, no |
| colour | is the dog brown? | yes; no where the captions agree on another colour |
| action | is someone running? | yes, no |
| which colour | what color is the dog? | the colour that the captions agree on |
| count | how many dogs are there? | one, two, three |

Every yes/no question is asked with the same words of as many photographs with yes as with no, so that its text alone is
worth 50 %. The other two are asked of at most as many photographs of one answer as of another.
"""

import argparse
import itertools
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from qformer.config.help import HelpFormatter
from qformer.data import Record, read_records
from qformer.files import atomic_file

AGREE = 3  # captions of five
AGREE_ON_PAIR = 2  # for two words next to each other
NOUNS = {  # what is asked for: what else a caption may call it, or what may be one
    "dog": "dogs puppy puppies poodle retriever terrier hound animal animals greyhound greyhounds collie shepherd",
    "cat": "cats kitten kittens animal animals",
    "horse": "horses pony ponies animal animals",
    "man": "men guy guys male gentleman person people someone adult rider player biker skier climber snowboarder surfer",
    "woman": "women lady ladies female person people someone adult rider player biker girl girls",
    "boy": "boys child children kid kids toddler baby person people player",
    "girl": "girls child children kid kids toddler baby person people woman women lady",
    "ball": "balls football basketball soccer tennis baseball volleyball softball frisbee toy",
    "bike": "bikes bicycle bicycles cycle motorcycle motorbike biker bikers cyclist bmx",
    "car": "cars vehicle truck van racecar automobile jeep taxi",
    "snow": "snowy ski skis skier skiing snowboard snowboarder sled ice winter",
    "water": "ocean sea lake river pool wave waves beach stream surf puddle pond fountain splash wet",
    "grass": "grassy lawn field meadow yard park",
    "beach": "sand sandy shore coast ocean sea",
    "rock": "rocks rocky cliff mountain boulder boulders stone stones climber",
    "street": "road sidewalk city pavement crosswalk",
    "tree": "trees woods forest branch branches log",
    "hat": "hats cap helmet helmets",
    "stick": "sticks branch log",
    "mountain": "mountains mountainside hill cliff peak peaks",
}
ACTIONS = {
    "running": "run runs race races racing chase chases chasing jogging play playing plays walking",
    "jumping": "jump jumps leap leaps leaping air midair flying trick",
    "swimming": "swim swims pool swimmer",
    "sitting": "sit sits seated sat",
    "climbing": "climb climbs climber climbers",
    "smiling": "smile smiles laugh laughing laughs grin grinning",
    "riding": "ride rides rider riders biking bike bicycle",
    "playing": "play plays player players game",
}
COLOURS = ("black", "white", "brown", "red", "blue", "yellow", "green", "orange", "pink")
THINGS = ("dog", "shirt", "ball", "jacket", "dress", "hat", "car", "horse", "helmet")
NUMBERS = {"a": "one", "an": "one", "one": "one", "two": "two", "three": "three"}
CHOICES = {
    "which colour": COLOURS,
    "count": ("one", "two", "three"),
}  # to choose an answer from; of other kinds yes and no
COUNTED = {"dog": "dogs", "man": "men", "woman": "women", "boy": "boys", "girl": "girls", "horse": "horses"}

Question = tuple[str, str, str]  # kind, question, answer


def ask(captions: Sequence[str]) -> Iterator[Question]:
    """Everything that the captions answer."""
    texts = [re.findall(r"[a-z]+", caption.lower()) for caption in captions]
    words = [set(text) for text in texts]
    for kind, names, question in (("object", NOUNS, "is there a {}?"), ("action", ACTIONS, "is someone {}?")):
        for name, others in names.items():
            forms = {name, name + "s"} if kind == "object" else {name}
            if sum(bool(forms & w) for w in words) >= AGREE:
                yield kind, question.format(name), "yes"
            elif not any((forms | set(others.split())) & w for w in words):
                yield kind, question.format(name), "no"
    for thing in THINGS:
        pairs = [{first for first, second in itertools.pairwise(t) if second == thing} & set(COLOURS) for t in texts]
        counts = {colour: sum(colour in pair for pair in pairs) for colour in COLOURS}
        named = [colour for colour in COLOURS if counts[colour]]
        if len(named) == 1 and counts[named[0]] >= AGREE_ON_PAIR:
            yield "which colour", f"what color is the {thing}?", named[0]
            for colour in COLOURS:
                if colour == named[0] or not any(colour in w for w in words):
                    yield "colour", f"is the {thing} {colour}?", "yes" if colour == named[0] else "no"
    for one, several in COUNTED.items():
        numbers = [
            NUMBERS[first]
            for text in texts
            for first, *rest in zip(text, text[1:], [*text[2:], ""], strict=False)
            if first in NUMBERS and {one, several} & set(rest) and (NUMBERS[first] == "one") == (one in rest)
        ]
        if len(numbers) >= AGREE and len(set(numbers)) == 1:
            yield "count", f"how many {several} are there?", numbers[0]


def balance(asked: dict[Question, list[str]], rng: random.Random) -> Iterator[tuple[Question, str]]:
    """Questions with the photograph they are asked of: as many of each answer to the same words."""
    answers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for kind, question, answer in sorted(asked):
        answers[kind, question].append(answer)
    for (kind, question), choices in answers.items():
        if len(choices) < 2:
            continue
        sizes = sorted((len(asked[kind, question, answer]) for answer in choices), reverse=True)
        for answer in choices:
            names = sorted(asked[kind, question, answer])
            for name in rng.sample(names, min(len(names), sizes[1] if len(choices) > 2 else sizes[-1])):
                yield (kind, question, answer), name


def derive(records: Sequence[Record], count: int, seed: int) -> list[dict[str, object]]:
    """`count` questions about the photographs, as records; kinds as evenly as there are questions of them."""
    asked: dict[Question, list[str]] = defaultdict(list)
    for record in records:
        for question in ask(record.captions):
            asked[question].append(record.image_id)
    rng = random.Random(seed)
    pairs: dict[str, dict[str, list[tuple[Question, str]]]] = defaultdict(lambda: defaultdict(list))
    for question, name in balance(asked, rng):
        pairs[question[0]][question[1]].append((question, name))
    chosen: list[tuple[Question, str]] = []
    for number, kind in enumerate(sorted(pairs, key=lambda kind: sum(map(len, pairs[kind].values())))):
        quota = (count - len(chosen)) // (len(pairs) - number)
        chosen += _take_evenly(pairs[kind], quota, rng)
    return [
        {
            "image_id": name, "question": question, "answers": [answer], "choices": list(CHOICES.get(kind, ("yes", "no"))),
            "question_type": kind, "question_id": i,
        }
        for i, ((kind, question, answer), name) in enumerate(chosen)
    ]  # fmt: skip


def _take_evenly(
    by_words: dict[str, list[tuple[Question, str]]], quota: int, rng: random.Random
) -> list[tuple[Question, str]]:
    """Pairs of the same words with different answers, one question after the other, until the quota is full."""
    turns: list[list[tuple[Question, str]]] = []
    for words in sorted(by_words):
        by_answer: dict[str, list[tuple[Question, str]]] = defaultdict(list)
        for pair in by_words[words]:
            by_answer[pair[0][2]].append(pair)
        columns = sorted(by_answer.values(), key=len)
        turns += [list(group) for group in zip(*columns, strict=False)] if len(columns) == 2 else [
            [pair for column in columns for pair in column[i : i + 1]] for i in range(len(columns[-1]))
        ]  # fmt: skip
    rng.shuffle(turns)
    taken: list[tuple[Question, str]] = []
    for group in turns:
        if len(group) > 1 and len(taken) + len(group) <= quota:
            taken += group
    return taken


def add_images(questions: list[dict[str, object]], records: Sequence[Record], folder: Path) -> None:
    """Name in each question its photograph, which is left in `folder` where it travels inside the records, and its captions."""
    by_id = {record.image_id: record for record in records}
    folder.mkdir(parents=True, exist_ok=True)
    for question in questions:
        record = by_id[str(question["image_id"])]
        path = Path(record.image)
        if record.image_bytes is not None:
            path = folder / f"{re.sub(r'[^A-Za-z0-9.-]', '_', record.image_id)}.jpg"
            if not path.exists():
                with atomic_file(path) as scratch:
                    scratch.write_bytes(record.image_bytes)
        question |= {"image": str(path.resolve()), "caption": most_agreed(record.captions)}


def most_agreed(captions: Sequence[str]) -> list[str]:
    """The captions, those first whose words most of the others have too."""
    words = [set(re.findall(r"[a-z]+", caption.lower())) for caption in captions]

    def agreement(i: int) -> float:
        return sum(len(words[i] & other) / max(1, len(words[i] | other)) for other in words)

    return [captions[i] for i in sorted(range(len(captions)), key=agreement, reverse=True)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("records", nargs="+", help="records with several captions an image")
    parser.add_argument("--out", type=Path, default=Path("questions.jsonl"), help="file to write (questions.jsonl)")
    parser.add_argument(
        "--images", type=Path, help="leave the photographs in this folder and name them and their captions"
    )
    parser.add_argument("--count", type=int, default=1000, help="questions at most (1000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        rows = read_records(args.records, key="RECORDS")
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    records = [rows[i] for i in range(len(rows))]
    questions = derive(records, args.count, args.seed)
    if args.images:
        add_images(questions, records, args.images)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(args.out) as scratch:
        scratch.write_text("".join(json.dumps(question) + "\n" for question in questions))
    print(f"{len(questions)} questions about {len({q['image_id'] for q in questions})} photographs in {args.out}")


if __name__ == "__main__":
    main()
