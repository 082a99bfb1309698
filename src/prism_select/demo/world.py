"""The demo world: eight small skills in plain English, with the right answer and a typical mistake
about every fact.

    skill → facts (subject, right, wrong)
          → question (opener × wording), answer (right or wrong, in a form)

    pairs     a behaviour: right over wrong            pool      rows to select from
    mixture   rows to repair, some of them wrong       corpus    what the tiny model reads

Choices made here:
- everything is made from tables and a seed: nothing is downloaded and no model is called;
- a wrong answer is a near miss: the same form, about the same length, another value of the same
  kind (another city of the same country, a sum that is one too high), because pairs that differ in
  form would measure the form;
- pairs share no prompt with the rows that are scored: a checksum reserves a quarter of all prompts
  for `pairs`, and `pool` and `mixture` draw from the remaining ones, whatever the seeds;
- pairs do share facts with these rows, in different words, and the wrong rows of the mixture make
  the mistakes of the rejected answers: PRISM finds known facts in new wordings here, and does
  clearly worse on facts that no pair mentions;
- in `corpus` each fact has a reliability, drawn once per seed: how often the text is right about
  it, so the model has strong and weak preferences; the corpus uses all prompts, reserved or not.
"""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations

__all__ = ["DEMO_SKILL", "FACTS", "SKILLS", "Fact", "corpus", "mixture", "pairs", "pool"]

# One entry is: subject, right answer, typical mistake.
CAPITALS = """
    France Paris Lyon, Italy Rome Milan, Spain Madrid Seville, Japan Tokyo Osaka,
    Egypt Cairo Alexandria, Canada Ottawa Toronto, Peru Lima Cusco, Kenya Nairobi Mombasa,
    Norway Oslo Bergen, Sweden Stockholm Uppsala, Poland Warsaw Krakow, Greece Athens Patras,
    Austria Vienna Salzburg, Portugal Lisbon Porto, Ireland Dublin Cork,
    Denmark Copenhagen Aarhus, Finland Helsinki Turku, Germany Berlin Munich,
    Hungary Budapest Debrecen, Turkey Ankara Istanbul, Morocco Rabat Casablanca,
    Australia Canberra Sydney, Ghana Accra Kumasi, Nepal Kathmandu Pokhara"""
PLURALS = """
    mouse mice mouses, goose geese gooses, child children childs, ox oxen oxes, foot feet foots,
    tooth teeth tooths, leaf leaves leafs, knife knives knifes, wolf wolves wolfs,
    shelf shelves shelfs, loaf loaves loafs, thief thieves thiefs, half halves halfs,
    box boxes boxs, bus buses buss, city cities citys, baby babies babys, berry berries berrys,
    story stories storys, potato potatoes potatos, hero heroes heros, fox foxes foxs,
    penny pennies pennys, dish dishes dishs"""
PAST_TENSES = """
    go went goed, see saw seed, eat ate eated, run ran runned, sing sang singed,
    swim swam swimmed, write wrote writed, drive drove drived, take took taked, give gave gived,
    come came comed, fly flew flied, grow grew growed, know knew knowed, break broke breaked,
    speak spoke speaked, teach taught teached, catch caught catched, think thought thinked,
    bring brought bringed, buy bought buyed, sleep slept sleeped, keep kept keeped,
    feel felt feeled"""
OPPOSITES = """
    hot cold warm, big small large, fast slow quick, wet dry damp, hard soft firm, happy sad glad,
    loud quiet noisy, strong weak sturdy, clean dirty tidy, rich poor wealthy, begin end start,
    smooth rough even, near far close, dark light dim, sharp blunt pointed, shout whisper yell,
    push pull shove, above below over, ancient modern old, difficult easy tough,
    empty full vacant, brave timid bold, true false correct, first last initial"""
YOUNG = """
    dog puppy joey, cat kitten joey, cow calf cub, horse foal cub, sheep lamb pup, goat kid pup,
    pig piglet pup, deer fawn cub, duck duckling owlet, goose gosling owlet, swan cygnet eaglet,
    hen chick eaglet"""
SOUNDS = """
    dog barks brays, cat meows neighs, cow moos chirps, sheep bleats trumpets, pig oinks coos,
    wolf howls gobbles, frog croaks tweets, duck quacks growls, hen clucks rattles,
    crow caws purrs, owl hoots whinnies, bee buzzes whistles"""
UNITS = """
    days week 7, seconds minute 60, hours day 24, months year 12, centimetres metre 100,
    grams kilogram 1000"""
SIZES = "an ant, a mouse, a cat, a sheep, a horse, a house, a mountain"

OPENERS = (
    "",
    "Quick question: ",
    "Please answer. ",
    "For school: ",
    "I forgot. ",
    "Tell me, please. ",
)
# One kind of fact has four questions about {x}, and three forms in which the answer {y} may come.
WORDINGS: dict[str, tuple[str, str]] = {
    "sum": (
        "What is {x}? | Work out {x}. | How much is {x}? | Give the value of {x}.",
        "Answer: {y} | It is {y} | The result is {y}",
    ),
    "capital": (
        "What is the capital of {x}? | Name the capital of {x}. | "
        "Which is {x}'s capital? | {x} has which capital?",
        "Answer: {y} | It is {y} | The city is {y}",
    ),
    "plural": (
        "What is the plural of {x}? | One {x}, two what? | "
        "Give the plural of {x}. | More than one {x} is what?",
        "Answer: {y} | It is {y} | Two {y}",
    ),
    "past": (
        "What is the past tense of {x}? | Put {x} into the past. | "
        "Today I {x}. And yesterday? | Give the past of {x}.",
        "Answer: {y} | It is {y} | Yesterday I {y}",
    ),
    "opposite": (
        "What is the opposite of {x}? | Which word is opposite to {x}? | "
        "Not {x}, but what? | Give the reverse of {x}.",
        "Answer: {y} | It is {y} | The word is {y}",
    ),
    "young": (
        "What is a young {x} called? | Name the young of a {x}. | "
        "What do you call a baby {x}? | A young {x} is what?",
        "Answer: {y} | We say {y} | The word is {y}",
    ),
    "sound": (
        "What does the {x} do? | How does the {x} call? | "
        "What is the sound of the {x}? | Name the noise of the {x}.",
        "Answer: {y} | It {y} | This animal {y}",
    ),
    "unit": (
        "How many {x}? | Say how many {x}. | Do you know how many {x}? | Count: how many {x}?",
        "Answer: {y} | It is {y} | There are {y}",
    ),
    "size": (
        "Which is bigger, {x}? | Which is larger: {x}? | "
        "What takes more space, {x}? | Compare in size {x}.",
        "Answer: {y} | It is {y} | The bigger is {y}",
    ),
}


@dataclass(frozen=True)
class Fact:
    """One thing that the world knows, and the typical mistake; `kind` is that of its wording."""

    kind: str
    subject: str
    right: str
    wrong: str

    def prompts(self) -> list[str]:
        """Every way to ask for this fact."""
        questions = WORDINGS[self.kind][0].replace("{x}", self.subject).split(" | ")
        return [opener + question for opener in OPENERS for question in questions]

    def answers(self, rng: random.Random) -> tuple[str, str]:
        """The right answer and the mistake, both in the same form, drawn at random."""
        form = rng.choice(WORDINGS[self.kind][1].split(" | "))
        return form.replace("{y}", self.right), form.replace("{y}", self.wrong)


def _table(kind: str, text: str) -> list[Fact]:
    return [Fact(kind, *entry.split()) for entry in text.split(",")]


def _arithmetic() -> list[Fact]:
    """Small sums and differences; the mistake is one too many."""
    sums = [
        Fact("sum", f"{a} + {b}", str(a + b), str(a + b + 1))
        for a in range(6, 10)
        for b in range(3, 6)
    ]
    differences = [
        Fact("sum", f"{a} - {b}", str(a - b), str(a - b + 1))
        for a in range(12, 16)
        for b in range(4, 7)
    ]
    return sums + differences


def _units() -> list[Fact]:
    """How many small units are in some large ones; the mistake is one large unit too many."""
    rows = [
        (small, large, int(factor))
        for small, large, factor in (entry.split() for entry in UNITS.split(","))
    ]
    return [
        Fact("unit", f"{small} are in {n} {large}s", str(n * factor), str((n + 1) * factor))
        for small, large, factor in rows
        for n in range(2, 6)
    ]


def _sizes() -> list[Fact]:
    """Which of two is bigger, named in either order; the mistake is the smaller one."""
    couples = combinations(SIZES.split(", "), 2)
    return [
        Fact("size", f"{small} or {big}" if i % 2 else f"{big} or {small}", big, small)
        for i, (small, big) in enumerate(couples)
    ]


FACTS: dict[str, list[Fact]] = {
    "arithmetic": _arithmetic(),
    "capitals": _table("capital", CAPITALS),
    "plurals": _table("plural", PLURALS),
    "past tense": _table("past", PAST_TENSES),
    "opposites": _table("opposite", OPPOSITES),
    "animals": _table("young", YOUNG) + _table("sound", SOUNDS),
    "units": _units(),
    "sizes": _sizes(),
}
SKILLS: tuple[str, ...] = tuple(FACTS)
DEMO_SKILL = "capitals"


def _is_reserved(prompt: str) -> bool:
    """A quarter of all prompts, chosen by a checksum, belongs to the pairs."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 64


@cache
def _prompts(skill: str, reserved: bool) -> tuple[tuple[Fact, tuple[str, ...]], ...]:
    """Each fact of a skill with its prompts: those reserved for pairs, or those that are not."""
    return tuple(
        (fact, tuple(p for p in fact.prompts() if _is_reserved(p) == reserved))
        for fact in FACTS[skill]
    )


@dataclass(frozen=True)
class _Question:
    """A prompt with the right and the wrong answer to it, in the same form."""

    skill: str
    prompt: str
    right: str
    wrong: str


def _questions(skill: str, count: int, rng: random.Random, reserved: bool) -> list[_Question]:
    """`count` distinct questions of a skill, one of each fact in turn, in random order."""
    decks = [
        (fact, rng.sample(prompts, len(prompts))) for fact, prompts in _prompts(skill, reserved)
    ]
    rng.shuffle(decks)
    dealt: list[_Question] = []
    while len(dealt) < count:
        before = len(dealt)
        for fact, deck in decks:
            if deck:
                dealt.append(_Question(skill, deck.pop(), *fact.answers(rng)))
        if len(dealt) == before:
            raise ValueError(
                f"{skill!r} has {before} distinct prompts here; {count} are needed: ask for fewer"
            )
    return dealt[:count]


def _all_skills(count: int, rng: random.Random) -> list[_Question]:
    """Questions of all skills, in shares that differ by one at most and in random order; none is
    reserved for pairs."""
    shares = [(count + i) // len(SKILLS) for i in range(len(SKILLS))]
    dealt = [
        q
        for skill, share in zip(SKILLS, shares, strict=True)
        for q in _questions(skill, share, rng, False)
    ]
    rng.shuffle(dealt)
    return dealt


def pairs(skill: str, count: int, seed: int) -> list[dict[str, str]]:
    """Pairs of one skill: `chosen` is right, `rejected` is the typical mistake in the same form."""
    dealt = _questions(skill, count, random.Random(f"pairs {skill} {seed}"), reserved=True)
    return [{"prompt": q.prompt, "chosen": q.right, "rejected": q.wrong} for q in dealt]


def pool(count: int, seed: int) -> list[dict[str, str]]:
    """Right answers to all skills in equal shares; `source` names the skill."""
    dealt = _all_skills(count, random.Random(f"pool {seed}"))
    return [
        {"id": f"pool-{i:05d}", "prompt": q.prompt, "completion": q.right, "source": q.skill}
        for i, q in enumerate(dealt)
    ]


def mixture(
    count: int, seed: int, wrong: float = 0.15, skills: Sequence[str] = SKILLS
) -> list[dict[str, str | bool]]:
    """A fine-tuning set in which the share `wrong`, rounded to whole rows, is wrong: `is_bad` marks
    those rows, which are questions of `skills`."""
    rng = random.Random(f"mixture {seed}")
    dealt = _all_skills(count, rng)
    of_skills = [i for i, q in enumerate(dealt) if q.skill in skills]
    bad = set(rng.sample(of_skills, round(wrong * count)))
    return [
        {
            "id": f"mix-{i:05d}",
            "prompt": q.prompt,
            "completion": q.wrong if i in bad else q.right,
            "source": q.skill,
            "is_bad": i in bad,
        }
        for i, q in enumerate(dealt)
    ]


def corpus(count: int, seed: int) -> list[dict[str, str]]:
    """What the tiny model reads: right or wrong as often as the reliability of each fact says."""
    rng = random.Random(f"corpus {seed}")
    reliability = {fact: rng.uniform(0.3, 0.99) for skill in SKILLS for fact in FACTS[skill]}
    rows = []
    for i in range(count):
        fact = rng.choice(FACTS[SKILLS[i % len(SKILLS)]])
        right, wrong = fact.answers(rng)
        answer = right if rng.random() < reliability[fact] else wrong
        rows.append({"prompt": rng.choice(fact.prompts()), "completion": answer})
    rng.shuffle(rows)
    return rows
