"""What is said about a scene: descriptions in many forms, and questions of seven kinds with their answers.

Descriptions come as sentences, lists, with and without articles, place first or last, items in any order, so that a
language model pretrained on them reads their content and not their form.
"""

import random
from collections.abc import Callable, Iterator

from qformer.shapes.world import COLOURS, PLACES, SHAPES, SIZES, Item, Scene, draw_scene

NUMBERS = ("zero", "one", "two", "three")
QUESTION_TYPES = ("colour", "shape", "size", "place", "count", "existence", "relation")
RELATIONS: dict[str, Callable[[Item, Item], bool]] = {
    "to the left of": lambda a, b: a.xy[0] < b.xy[0],
    "to the right of": lambda a, b: a.xy[0] > b.xy[0],
    "above": lambda a, b: a.xy[1] < b.xy[1],
    "below": lambda a, b: a.xy[1] > b.xy[1],
}
QA = tuple[str, str]


def plural(count: int, noun: str) -> str:
    suffix = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{NUMBERS[count]} {noun}{suffix}"


FORMS: tuple[Callable[[Item], str], ...] = (
    lambda i: f"a {i.size} {i.colour} {i.shape} {i.place}",
    lambda i: f"{i.size} {i.colour} {i.shape} {i.place}",
    lambda i: f"{i.place} a {i.size} {i.colour} {i.shape}",
    lambda i: f"there is a {i.size} {i.colour} {i.shape} {i.place}",
    lambda i: f"the {i.size} {i.colour} {i.shape} is {i.place}",
    lambda i: f"the {i.shape} {i.place} is {i.size} and {i.colour}",
    lambda i: f"{i.colour} {i.size} {i.shape} {i.place}",
    lambda i: f"{i.place} {i.size} {i.colour} {i.shape}",
)


def describe(scene: Scene, rng: random.Random, forms=FORMS, separators=(" , ", " and ")) -> str:
    """Say every item once, in random order, in one form drawn from `forms`."""
    form, separator = rng.choice(forms), rng.choice(separators)
    text = separator.join(form(item) for item in rng.sample(scene, len(scene)))
    if rng.random() < 0.25:
        text = f"{plural(len(scene), 'shape')} , {text}"
    return text


def fact(scene: Scene, rng: random.Random) -> str:
    """State one thing about the scene as a whole: a number, an absence or a relation."""
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    facts = [
        f"there {'is' if len(scene) == 1 else 'are'} {plural(len(scene), 'shape')}",
        plural(sum(i.shape == shape for i in scene), shape),
        plural(sum(i.colour == colour for i in scene), f"{colour} shape"),
    ]
    if all(i.shape != shape for i in scene):
        facts.append(f"there is no {shape}")
    if all(i.colour != colour for i in scene):
        facts.append(f"nothing is {colour}")
    for a, b in _pairs(scene):
        facts += [f"the {a} is {name} the {b}" for name, holds in RELATIONS.items() if holds(*_items(scene, a, b))]
    return rng.choice(facts)


def caption(scene: Scene, rng: random.Random) -> str:
    """A caption as people would write it beside the picture: the items, now and then a fact before or after them."""
    text = describe(scene, rng)
    if len(scene) < 3 and rng.random() < 0.3:
        parts = [text, fact(scene, rng)]
        rng.shuffle(parts)
        text = " , ".join(parts)
    return text.replace(" ,", ",")


def _names(scene: Scene, item: Item) -> list[str]:
    """Noun phrases that fit this item and no other one of the scene."""
    phrases = {
        item.shape: lambda o: o.shape == item.shape,
        f"{item.colour} {item.shape}": lambda o: (o.colour, o.shape) == (item.colour, item.shape),
        f"{item.size} {item.shape}": lambda o: (o.size, o.shape) == (item.size, item.shape),
    }
    return [phrase for phrase, fits in phrases.items() if sum(map(fits, scene)) == 1]


def _pairs(scene: Scene) -> Iterator[tuple[str, str]]:
    """Pairs of unique short names of two different items."""
    for a in scene:
        for b in scene:
            if a is not b:
                short_a, short_b = _names(scene, a)[:1], _names(scene, b)[:1]
                if short_a and short_b:
                    yield short_a[0], short_b[0]


def _items(scene: Scene, *names: str) -> list[Item]:
    return [next(i for i in scene if name in _names(scene, i)) for name in names]


def _colour(scene: Scene, rng: random.Random) -> QA | None:
    item = rng.choice(scene)
    names = [n for n in _names(scene, item) if item.colour not in n]
    where = [f"the shape {item.place}", *(f"the {n}" for n in names for _ in range(2))]
    it = rng.choice(where)
    return rng.choice((f"what colour is {it}?", f"what is the colour of {it}?")), item.colour


def _shape(scene: Scene, rng: random.Random) -> QA | None:
    item = rng.choice(scene)
    questions = [f"what shape is {item.place}?", f"what is {item.place}?"]
    if sum(i.colour == item.colour for i in scene) == 1:
        questions += [f"what shape is {item.colour}?", f"what is the {item.colour} shape?"]
    return rng.choice(questions), item.shape


def _size(scene: Scene, rng: random.Random) -> QA | None:
    item = rng.choice(scene)
    names = [n for n in _names(scene, item) if item.size not in n]
    it = rng.choice([f"the shape {item.place}", *(f"the {n}" for n in names for _ in range(2))])
    return rng.choice((f"how big is {it}?", f"is {it} small or large?", f"what size is {it}?")), item.size


def _place(scene: Scene, rng: random.Random) -> QA | None:
    item = rng.choice(scene)
    names = _names(scene, item)
    if sum(i.colour == item.colour for i in scene) == 1:
        names.append(f"{item.colour} shape")
    return (f"where is the {rng.choice(names)}?", item.place) if names else None


def _count(scene: Scene, rng: random.Random) -> QA | None:
    attribute = rng.choice(("all", "shape", "colour"))
    if attribute == "all":
        return rng.choice(("how many shapes are there?", "how many shapes can you see?")), NUMBERS[len(scene)]
    present = rng.random() < 0.75
    if attribute == "shape":
        noun = rng.choice([i.shape for i in scene] if present else list(SHAPES))
        return f"how many {plural(2, noun)[4:]} are there?", NUMBERS[sum(i.shape == noun for i in scene)]
    colour = rng.choice([i.colour for i in scene] if present else list(COLOURS))
    return f"how many {colour} shapes are there?", NUMBERS[sum(i.colour == colour for i in scene)]


def _existence(scene: Scene, rng: random.Random) -> QA | None:
    item = rng.choice(scene)
    colour, shape, place, absent = item.colour, item.shape, item.place, rng.random() < 0.5
    kind = rng.choice(("shape", "colour", "both", "place"))
    if absent:
        if kind in ("colour", "both"):
            colour = rng.choice(list(COLOURS))
        if kind in ("shape", "both"):
            shape = rng.choice(SHAPES)
        place = rng.choice(list(PLACES))
    question, fits = {
        "shape": (f"is there a {shape}?", lambda i: i.shape == shape),
        "colour": (f"is there a {colour} shape?", lambda i: i.colour == colour),
        "both": (f"is there a {colour} {shape}?", lambda i: (i.colour, i.shape) == (colour, shape)),
        "place": (f"is there a shape {place}?", lambda i: i.place == place),
    }[kind]
    yes = any(map(fits, scene))
    return (question, "yes" if yes else "no") if yes is not absent else None


def _relation(scene: Scene, rng: random.Random) -> QA | None:
    pairs = list(_pairs(scene))
    if not pairs:
        return None
    (a, b), want = rng.choice(pairs), rng.random() < 0.5
    one, other = _items(scene, a, b)
    name = rng.choice((*RELATIONS, "colour", "size"))
    if name in RELATIONS:
        axis = 1 if name in ("above", "below") else 0
        if one.xy[axis] == other.xy[axis]:
            return None
        question, yes = f"is the {a} {name} the {b}?", RELATIONS[name](one, other)
    else:
        question = f"are the {a} and the {b} the same {name}?"
        yes = getattr(one, name) == getattr(other, name)
    return (question, "yes" if yes else "no") if yes is want else None


ASK = dict(zip(QUESTION_TYPES, (_colour, _shape, _size, _place, _count, _existence, _relation), strict=True))


def ask(scene: Scene, rng: random.Random, question_type: str | None = None, tries: int = 20) -> QA | None:
    """A question about the scene with its answer; yes and no equally often. None if the scene has none of that type."""
    for _ in range(tries):
        pair = ASK[question_type or rng.choice(QUESTION_TYPES)](scene, rng)
        if pair:
            return pair
    return None


def vocabulary() -> list[str]:
    """Every word of the world's language, sorted."""
    words = set(" ".join((*SIZES, *COLOURS, *SHAPES, *PLACES, *NUMBERS)).split())
    words |= set(
        [
            "yes",
            "question",
            "short",
            "answer",
            "long",
            "caption",
            "a",
            "photo",
            "of",
            "picture",
            "shows",
            ",",
            ".",
            ":",
            "?",
            "!",
            "the",
            "this",
            "in",
            "with",
            "is",
            "are",
            "it",
        ]
    )
    rng = random.Random(0)
    for _ in range(5000):
        scene = draw_scene(rng)
        texts = [caption(scene, rng), fact(scene, rng), describe(scene, rng)]
        texts += [q.replace("?", " ?") for q, _ in filter(None, [ask(scene, rng)])]
        words.update(w for t in texts for w in t.replace(",", " , ").split())
    return sorted(words)
