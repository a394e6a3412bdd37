"""Questions the shipped demo model answers, each with an answer a program can check.

Every question has a key that names its content and not its wording: "123+456" and "456+123", asked either way, share one key.
A hash of the key puts it on one side of the split, so nothing that is held out can come up in training, in any wording.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from string import ascii_lowercase

SPLIT = 20  # one key in so many is held out
HELD_OUT_SHARES = {"reverse": 0.08, "uppercase": 0.05, "repeat": 0.05, "count": 0.02}  # the rest are additions
TRAINING_WEIGHTS = {"add": 0.7, "reverse": 0.12, "uppercase": 0.06, "repeat": 0.06, "count": 0.06}
ADDITION_WORDINGS = ("What is {}+{}?", "{}+{}=", "What is {} + {}?")


@dataclass(frozen=True)
class Question:
    prompt: str
    answer: str
    key: str

    @property
    def kind(self) -> str:
        return self.key.partition(":")[0]


def check(question: Question, text: str) -> bool:
    """True if `text` is the answer to the question, up to white space around it."""
    return text.strip() == question.answer


def is_held_out(key: str) -> bool:
    """The split: a fixed function of the key, the same on every machine."""
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest()) % SPLIT == 0


def held_out_questions(n: int = 500, seed: int = 0) -> list[Question]:
    """`n` questions with different keys, none of which training can produce; all additions have three-digit operands."""
    rng = random.Random(f"held out {seed}")
    questions: list[Question] = []
    for kind, share in HELD_OUT_SHARES.items():
        questions += islice(_distinct(KINDS[kind], rng), int(n * share))
    questions += islice(_distinct(add, rng), n - len(questions))
    rng.shuffle(questions)
    return questions


def training_questions(seed: int = 0) -> Iterator[Question]:
    """An endless stream of questions whose keys are not held out."""
    rng = random.Random(f"training {seed}")
    kinds, weights = list(TRAINING_WEIGHTS), list(TRAINING_WEIGHTS.values())
    while True:
        kind = rng.choices(kinds, weights)[0]
        make = add_any_length if kind == "add" else KINDS[kind]
        question = make(rng)
        if not is_held_out(question.key):
            yield question


def training_pairs(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """The first `n` training questions as (prompt, answer)."""
    return [(question.prompt, question.answer) for question in islice(training_questions(seed), n)]


def addition(a: int, b: int, wording: str = ADDITION_WORDINGS[0]) -> Question:
    return Question(wording.format(a, b), str(a + b), f"add:{min(a, b)}+{max(a, b)}")


def add(rng: random.Random) -> Question:
    wording = rng.choices(ADDITION_WORDINGS, (45, 45, 10))[0]
    return addition(rng.randint(100, 999), rng.randint(100, 999), wording)


def add_any_length(rng: random.Random) -> Question:
    if rng.random() < 0.85:
        return add(rng)
    a, b = (rng.randrange(10 ** rng.randint(1, 3)) for _ in range(2))
    return addition(a, b, rng.choice(ADDITION_WORDINGS))


def reverse(rng: random.Random) -> Question:
    word = _word(rng, 3, 6)
    return Question(f"Reverse: {word}", word[::-1], f"reverse:{word}")


def uppercase(rng: random.Random) -> Question:
    word = _word(rng, 3, 6)
    return Question(f"Uppercase: {word}", word.upper(), f"uppercase:{word}")


def repeat(rng: random.Random) -> Question:
    times, word = rng.randint(2, 3), _word(rng, 2, 4)
    return Question(f"Repeat {times} times: {word}", " ".join([word] * times), f"repeat:{times} {word}")


def count(rng: random.Random) -> Question:
    first = rng.randint(1, 94)
    last = first + rng.randint(2, 5)
    return Question(f"Count from {first} to {last}", " ".join(map(str, range(first, last + 1))), f"count:{first}-{last}")


KINDS: dict[str, Callable[[random.Random], Question]] = {
    "add": add,
    "reverse": reverse,
    "uppercase": uppercase,
    "repeat": repeat,
    "count": count,
}


def _distinct(make: Callable[[random.Random], Question], rng: random.Random) -> Iterator[Question]:
    """Held-out questions of one kind, no key twice; ends when new ones no longer turn up."""
    seen: set[str] = set()
    misses = 0
    while misses < 10_000:
        question = make(rng)
        misses += 1
        if is_held_out(question.key) and question.key not in seen:
            seen.add(question.key)
            misses = 0
            yield question


def _word(rng: random.Random, shortest: int, longest: int) -> str:
    return "".join(rng.choices(ascii_lowercase, k=rng.randint(shortest, longest)))
