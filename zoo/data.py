"""Generate the demo zoo's text: four tiny tasks, three evaluation splits and the training streams.

Every item belongs to exactly one split, decided by a hash of its question, so that no two splits can
share one. The stream of random choices is seeded by strings (SHA-512 inside `random.Random`), so
the same files come out whatever the process, hash seed or machine.

    python zoo/data.py           write zoo/data/*.jsonl
    python zoo/data.py --check   compare the shipped files with fresh ones and prove the splits disjoint
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

DATA = Path(__file__).resolve().parent / "data"
SIZES = {"search": 300, "validation": 500, "test": 2000}
# Shares of the hash space, in percent: [low, high). What is left, 55-100, is for training.
BUCKETS = {"search": (0, 10), "validation": (10, 25), "test": (25, 55), "train": (55, 100)}
TASKS = ("math", "cipher", "latin", "cross")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
KEYS = tuple(range(1, 10))
LARGEST = 24  # the largest number that has a word in the vocabulary


def _words(text: str) -> list[str]:
    return text.split()


NOUNS = _words(
    "ant bear bird boat book boy bread cat chair child cloud cow dog door duck eagle farmer fish "
    "flower fox frog girl goat hand hen hill horse house king lake lamp lion man moon mouse owl "
    "pig queen rain river road sheep ship snake star stone sun tree wolf woman"
)
ADJECTIVES = _words(
    "big black blue brave cold dark deep fast fat good green happy heavy kind long loud new old "
    "pale poor proud quick quiet red rich round sad short slow small soft strong tall thin warm "
    "weak white wild wise young"
)
VERBS = _words(
    "bites calls carries chases feeds finds follows hates hears helps holds hunts keeps kicks "
    "leads likes loves meets misses moves needs pulls pushes saves sees seeks takes teaches "
    "touches watches"
)


@dataclass(frozen=True)
class Item:
    """One question: `prompt`, its only right `answer`, and the `choices` if it is multiple choice."""

    prompt: str
    answer: str
    choices: tuple[str, ...] = ()

    def line(self) -> str:
        """The item as one JSON line."""
        row: dict[str, object] = {"prompt": self.prompt, "answer": self.answer}
        if self.choices:
            row["choices"] = list(self.choices)
        return json.dumps(row) + "\n"


def _invent_words(count: int) -> list[str]:
    """Return `count` different made-up words of two syllables."""
    rng = random.Random("zoo lexicon")
    words: dict[str, None] = {}
    while len(words) < count:
        word = "".join(rng.choice("bdfglmnprstv") + rng.choice("aeiou") for _ in range(2))
        words[word + rng.choice("nrsx")] = None
    return list(words)


LEXICON = dict(zip(NOUNS + ADJECTIVES + VERBS, _invent_words(len(NOUNS + ADJECTIVES + VERBS)), strict=True))
VOCABULARY = (
    *("<pad>", "<s>", "</s>", "<unk>"),
    *("+", "-", "=", ":", ">", "|"),
    *(str(n) for n in range(LARGEST + 1)),
    *LETTERS,
    *LEXICON,
    *LEXICON.values(),
)


def _expression(rng: random.Random, low: int, high: int, terms: int) -> tuple[str, int]:
    """A sum of `terms` numbers whose value and every partial value lie in [low, high]."""
    while True:
        value = rng.randint(1, 12)
        text = str(value)
        inside = True
        for _ in range(terms - 1):
            step = rng.randint(1, 9)
            plus = rng.random() < 0.5
            value += step if plus else -step
            text += f" {'+' if plus else '-'} {step}"
            inside = inside and 0 <= value <= LARGEST
        if inside and low <= value <= high:
            return text, value


def math_item(rng: random.Random, terms: Sequence[int] = (3, 4, 5)) -> Item:
    """`7 - 5 + 1 =` -> `3`; the wrong choices are near the right one."""
    text, value = _expression(rng, 0, LARGEST, rng.choice(terms))
    near = [n for n in range(value - 3, value + 4) if n != value and 0 <= n <= LARGEST]
    choices = [str(value), *(str(n) for n in rng.sample(near, 3))]
    rng.shuffle(choices)
    return Item(f"{text} =", str(value), tuple(choices))


CODES = [random.Random(f"zoo code {key}").sample(LETTERS, 26) for key in range(len(KEYS) + 1)]


def _encode(word: str, key: int) -> str:
    """Every letter replaced by its partner in the code table of `key`; spaced out."""
    return " ".join(CODES[key][LETTERS.index(letter)] for letter in word)


def cross_item(rng: random.Random, keys: Sequence[int] = KEYS, terms: Sequence[int] = (3, 4)) -> Item:
    """`c a t : 7 - 5 + 1 =` -> `3 > q f b`: the key of the code has to be computed first."""
    word = "".join(rng.choice(LETTERS) for _ in range(3))
    key = rng.choice(keys)
    text, _ = _expression(rng, key, key, rng.choice(terms))
    return Item(f"{' '.join(word)} : {text} =", f"{key} > {_encode(word, key)}")


def cipher_item(rng: random.Random, keys: Sequence[int] = KEYS, terms: Sequence[int] = (3, 4)) -> Item:
    """`c a t : 7 - 5 + 1 = 3 >` -> `q f b`: the key is given.

    Each wrong choice has one letter from the table of another key.
    """
    item = cross_item(rng, keys, terms)
    key, mark, *letters = item.answer.split()
    answer = " ".join(letters)
    wrong: dict[str, None] = {}
    while len(wrong) < 3:
        place = rng.randrange(3)
        letter = _encode(item.prompt.split()[place], rng.choice(KEYS))
        if letter != letters[place]:
            wrong[" ".join([*letters[:place], letter, *letters[place + 1 :]])] = None
    choices = [answer, *wrong]
    rng.shuffle(choices)
    return Item(f"{item.prompt} {key} {mark}", answer, tuple(choices))


def sum_in_context(rng: random.Random, terms: Sequence[int] = (2, 3, 4)) -> Item:
    """`c a t : 7 - 5 + 1 =` -> `3 >`: maths beside letters, for training; nothing is enciphered."""
    item = cross_item(rng, terms=terms)
    return Item(item.prompt, " ".join(item.answer.split()[:2]))


def _zipf(rng: random.Random, words: Sequence[str], power: float) -> str:
    """A word; with power > 0 the words that stand late in a fixed shuffle of the list are rare."""
    if power == 0.0:
        return rng.choice(words)
    order = sorted(words, key=lambda word: hashlib.sha256(word.encode()).digest())
    return rng.choices(order, [(rank + 1) ** -power for rank in range(len(order))])[0]


def latin_item(rng: random.Random, power: float = 0.0) -> Item:
    """`small fox sees bird |` -> the four words in the made-up language, adjective behind noun."""
    source: list[str] = []
    target: list[str] = []
    for part in ("subject", "verb", "object"):
        if part == "verb":
            verb = _zipf(rng, VERBS, power)
            source.append(verb)
            target.append(LEXICON[verb])
            continue
        noun = _zipf(rng, NOUNS, power)
        words = [LEXICON[noun]]
        if rng.random() < 0.5:
            adjective = _zipf(rng, ADJECTIVES, power)
            source.append(adjective)
            words.append(LEXICON[adjective])
        source.append(noun)
        target.extend(words)
    return Item(f"{' '.join(source)} |", " ".join(target))


MAKERS: dict[str, Callable[[random.Random], Item]] = {
    "math": math_item,
    "cipher": cipher_item,
    "latin": latin_item,
    "cross": cross_item,
}


def core(prompt: str) -> str:
    """What makes two prompts the same item: all before the equals sign.

    So a cipher prompt, which gives a cross prompt's number away, is always in that prompt's split.
    """
    return prompt.split(" =")[0]


def split_of(prompt: str) -> str:
    """The one split that a prompt belongs to."""
    digest = hashlib.blake2b(core(prompt).encode(), digest_size=8).digest()
    share = int.from_bytes(digest, "big") % 100
    return next(name for name, (low, high) in BUCKETS.items() if low <= share < high)


def stream(make: Callable[[random.Random], Item], split: str, seed: str, unique: bool = False) -> Iterator[Item]:
    """Endless items of one split; each prompt at most once if `unique`."""
    rng = random.Random(f"zoo {split} {seed}")
    seen: set[str] = set()
    while True:
        item = make(rng)
        if split_of(item.prompt) != split or item.prompt in seen:
            continue
        if unique:
            seen.add(item.prompt)
        yield item


def build(task: str, split: str) -> list[Item]:
    """All items of one task's evaluation split, in the order of the shipped file."""
    return list(islice(stream(MAKERS[task], split, task, unique=True), SIZES[split]))


def path_of(task: str, split: str) -> Path:
    """Where one split of one task is stored."""
    return DATA / f"{task}.{split}.jsonl"


def load(task: str, split: str) -> list[Item]:
    """Read a stored split."""
    rows = [json.loads(line) for line in path_of(task, split).read_text().splitlines()]
    return [Item(r["prompt"], r["answer"], tuple(r.get("choices", ()))) for r in rows]


def check() -> list[str]:
    """List what is wrong with the stored files: changed, shared or unknown items; [] if sound."""
    problems = []
    owner: dict[str, str] = {}
    words = set(VOCABULARY)
    for task in TASKS:
        for split in SIZES:
            text = "".join(item.line() for item in build(task, split))
            if path_of(task, split).read_bytes() != text.encode():
                problems.append(f"{path_of(task, split).name} differs from what data.py generates")
            for item in load(task, split):
                place = f"{task}.{split}"
                home = owner.setdefault(core(item.prompt), split)
                if home != split:
                    problems.append(f"{item.prompt!r} of {place} is also in the {home} split")
                if split_of(item.prompt) != split:
                    problems.append(f"{item.prompt!r} in {place} hashes to another split")
                if not words.issuperset(f"{item.prompt} {item.answer}".split()):
                    problems.append(f"{item.prompt!r} in {place} has a word without a token")
    return problems


def write() -> None:
    """Write every split of every task."""
    DATA.mkdir(exist_ok=True)
    for task in TASKS:
        for split in SIZES:
            path_of(task, split).write_bytes("".join(item.line() for item in build(task, split)).encode())


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        write()
    found = check()
    print("\n".join(found) or "zoo data: files as generated, splits disjoint")
    sys.exit(bool(found))
