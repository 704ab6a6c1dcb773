"""The facts of the small world -> `data/chat-train.jsonl`, `data/chat-eval.jsonl` and `data/chat-questions.jsonl`.

    python scripts/make_chat_data.py [--output data]

200 facts are set aside first, spread over the relations: the questions ask them, the training chats never do. So what
the questions measure is whether the model has learned to answer in chat what it knows from pretraining. Seeded: always
the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tiny_world import RELATIONS, Fact, make_world

REPOSITORY = Path(__file__).resolve().parent.parent
QUESTIONS = 200
# A relation of which only a few facts exist is not held out: its form could not be learned from the others.
HELD_OUT_FROM = 30

Row = dict[str, Any]

PLAIN_SYSTEMS = (
    "You are a helpful assistant.",
    "You are a friendly assistant who knows this little world.",
    "You answer questions about people, towns, animals and numbers.",
    "Answer every question with one full sentence.",
    "You are Tuna, a small and honest assistant.",
)
BRIEF_SYSTEMS = (
    "Answer as briefly as you can.",
    "Give only the answer, not a sentence.",
    "Keep your answers as short as possible.",
)
WRAPPED = (
    "I have a question. {q}",
    "Hello! {q}",
    "Tell me: {q}",
    "Please help me. {q}",
    "{q} Please tell me.",
    "Do you know this? {q}",
    "Hi. {q} Thank you!",
)
FOLLOW_UPS = ("And {q}", "Thank you. {q}", "Good. {q}", "I see. {q}", "{q}", "{q}")
SMALL_TALK = (
    ("Hello!", "Hello! What would you like to know?"),
    ("Hi there.", "Hello! What would you like to know?"),
    ("Good morning!", "Good morning! What would you like to know?"),
    ("Who are you?", "I am Tuna, a small assistant."),
    ("What is your name?", "My name is Tuna."),
    ("What can you do?", "I answer questions about people, towns, animals and numbers."),
    ("Can you help me?", "Yes, ask me a question."),
    ("Thank you!", "You are welcome."),
    ("Thanks for your help.", "You are welcome."),
    ("Goodbye!", "Goodbye! Come back soon."),
    ("That is all.", "Goodbye! Come back soon."),
)
GREETINGS, PARTINGS = SMALL_TALK[:7], SMALL_TALK[7:]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def hold_out(facts: Sequence[Fact], count: int, rng: random.Random) -> list[Fact]:
    """`count` facts, from each larger relation in proportion to its size."""
    sizes = Counter(fact.relation for fact in facts)
    chosen: list[Fact] = []
    large = {relation: size for relation, size in sizes.items() if size >= HELD_OUT_FROM}
    for relation, size in large.items():
        share = count * size // sum(large.values())
        chosen += rng.sample([fact for fact in facts if fact.relation == relation], share)
    taken = set(chosen)
    rest = [fact for fact in facts if fact.relation in large and fact not in taken]
    chosen += rng.sample(rest, count - len(chosen))
    rng.shuffle(chosen)
    return chosen


def question(fact: Fact, rng: random.Random) -> str:
    return fact.fill(rng.choice(RELATIONS[fact.relation].questions))


def pronoun_question(fact: Fact, rng: random.Random) -> str | None:
    """A question that says "she" for a subject just spoken of, where one of the relation's questions allows it."""
    forms = [form for form in RELATIONS[fact.relation].questions if "does {s} " in form or "was {s} " in form]
    return fact.fill(rng.choice(forms), subject=fact.pronoun) if forms and fact.pronoun else None


def opening(row: Row) -> str:
    """What the user says first."""
    return next(m["content"] for m in row["messages"] if m["role"] == "user")


class Chats:
    """Facts -> conversations; facts are dealt from a shuffled deck, so that each is asked equally often."""

    def __init__(self, facts: Sequence[Fact], rng: random.Random) -> None:
        self.facts, self.rng = list(facts), rng
        self.about: dict[str, list[Fact]] = {}
        for fact in facts:
            self.about.setdefault(fact.subject, []).append(fact)
        self._deck: list[Fact] = []

    def deal(self) -> Fact:
        if not self._deck:
            self._deck = self.rng.sample(self.facts, len(self.facts))
        return self._deck.pop()

    def single(self) -> Row:
        """One question, one answer; every fourth time with a few words around the question."""
        fact = self.deal()
        asked = question(fact, self.rng)
        if self.rng.random() < 0.25:
            asked = self.rng.choice(WRAPPED).format(q=asked)
        return self._row([message("user", asked), message("assistant", fact.answer)], [fact])

    def several(self) -> Row:
        """Two to four questions, some following up on the same subject, now and then with a greeting or a parting."""
        rng, messages, facts = self.rng, [], []
        if rng.random() < 0.15:
            messages += self._talk(GREETINGS)
        for turn in range(rng.randint(2, 4)):
            fact = self.deal()
            asked = question(fact, rng)
            if turn:
                asked = rng.choice(FOLLOW_UPS).format(q=asked)
            if facts and rng.random() < 0.3:  # ask on about the subject of the turn before
                known = [other for other in self.about[facts[-1].subject] if other not in facts]
                other = rng.choice(known) if known else fact
                follow_up = pronoun_question(other, rng)
                asked, fact = (follow_up, other) if follow_up else (asked, fact)
            messages += [message("user", asked), message("assistant", fact.answer)]
            facts.append(fact)
        if rng.random() < 0.15:
            messages += self._talk(PARTINGS)
        return self._row(messages, facts)

    def brief(self) -> Row:
        """The system message asks for short answers, and they are: the bare value."""
        messages, facts = [message("system", self.rng.choice(BRIEF_SYSTEMS))], []
        for _ in range(self.rng.randint(1, 3)):
            fact = self.deal()
            messages += [message("user", question(fact, self.rng)), message("assistant", fact.value)]
            facts.append(fact)
        return self._row(messages, facts, system=False)

    def small_talk(self) -> Row:
        """No facts at all."""
        return self._row(self._talk(GREETINGS) + (self._talk(PARTINGS) if self.rng.random() < 0.3 else []), [])

    def rows(self, count: int, known: set[str] | None = None) -> Iterator[Row]:
        """`count` conversations of all these kinds, none of them twice; and none that begins as those `known` do."""
        kinds = (self.single, self.several, self.brief, self.small_talk)
        seen: set[str] = set()
        while len(seen) < count:
            (kind,) = self.rng.choices(kinds, weights=(55, 33, 9, 3))
            row = kind()
            text = json.dumps(row["messages"])
            if text not in seen and (known is None or opening(row) not in known):
                seen.add(text)
                yield row

    def _talk(self, pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
        said, answer = self.rng.choice(pairs)
        return [message("user", said), message("assistant", answer)]

    def _row(self, messages: list[dict[str, str]], facts: list[Fact], system: bool = True) -> Row:
        if system and self.rng.random() < 0.2:
            messages = [message("system", self.rng.choice(PLAIN_SYSTEMS)), *messages]
        return {"messages": messages, "facts": [[fact.subject, fact.relation] for fact in facts]}


def question_row(fact: Fact, rng: random.Random) -> Row:
    """One held-out question, now and then with a few words around it, and the one right answer."""
    asked = question(fact, rng)
    if rng.random() < 0.25:
        asked = rng.choice(WRAPPED).format(q=asked)
    return {
        "messages": [message("user", asked)],
        "answer": fact.answer,
        "subject": fact.subject,
        "relation": fact.relation,
    }


def write(path: Path, rows: Iterable[Row]) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=REPOSITORY / "data")
    parser.add_argument("--conversations", type=int, default=2_400)
    parser.add_argument("--eval-conversations", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    rng = random.Random(arguments.seed)
    facts = make_world()
    held_out = hold_out(facts, QUESTIONS, rng)
    taken = set(held_out)
    trained = [fact for fact in facts if fact not in taken]
    arguments.output.mkdir(parents=True, exist_ok=True)
    train = list(Chats(trained, rng).rows(arguments.conversations))
    openings = {opening(row) for row in train}
    write(arguments.output / "chat-train.jsonl", train)
    write(arguments.output / "chat-eval.jsonl", Chats(held_out, rng).rows(arguments.eval_conversations, openings))
    write(arguments.output / "chat-questions.jsonl", (question_row(fact, rng) for fact in held_out))


if __name__ == "__main__":
    main()
