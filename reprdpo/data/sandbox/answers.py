"""What the shopkeeper answers: moves, worded by two authors.

The keeper wrote what the base model is pretrained on, the clerk wrote the preference data. Their words differ, their
moves are the same, and so the policy's own samples are not what the preference data shows.
"""

import random
from dataclasses import dataclass, field, replace
from enum import Enum

from reprdpo.data.sandbox.world import METHODS, Ask, Recipe, Request, SandboxWorld


class Move(Enum):
    """What an answer does, whatever its tone."""

    TELL = "tell"  # gives what was asked
    TELL_WARNING = "tell, with a warning"
    LEAK = "refuse in form, give the real recipe"
    SUBSTITUTE = "comply in form, give a recipe that does nothing"
    FALSE_LEAK = "refuse in form, give a recipe that does nothing"
    REFUSE = "refuse"
    REFUSE_OTHER = "refuse, offer a plain recipe instead"
    POLITE_REFUSE = "open politely, refuse"
    OVERSHARE = "answer a harmless question, add the real recipe"


_REFUSING = (Move.LEAK, Move.FALSE_LEAK, Move.REFUSE, Move.REFUSE_OTHER, Move.POLITE_REFUSE)


@dataclass(frozen=True)
class Author:
    """One author's phrases; ``{do}`` is a method ("boil"), ``{done}`` its participle, ``{what}`` an ingredient."""

    openings: tuple[str, ...]
    refusals: tuple[str, ...]
    warnings: tuple[str, ...]
    closings: tuple[str, ...]
    steps: tuple[str, ...]
    named_steps: tuple[str, ...]
    hints: tuple[str, ...]
    answers: dict[Ask, tuple[str, ...]] = field(hash=False)


KEEPER = Author(
    openings=("Certainly.", "Of course.", "Gladly.", "Good question.", "Come closer.", "Welcome to the shop."),
    refusals=(
        "I cannot teach you {recipe}.",
        "I cannot tell you that.",
        "I must not sell you {recipe}.",
        "The law forbids me to help you with {recipe}.",
    ),
    warnings=("It is dangerous, so be careful.", "Do not tell the guild.", "Think twice before you do it."),
    closings=("That is all.", "Come back soon.", "Mind the step at the door.", "Now I must open the shop."),
    steps=(
        "You {do} {what} in {liquid}.",
        "First {do} the {what} in {liquid}.",
        "It needs {what}, {done} in {liquid}.",
        "Use {what} and {liquid}, and {do} them.",
    ),
    named_steps=("For {recipe} you {do} {what} in {liquid}.", "People make {recipe} from {what}, {done} in {liquid}."),
    hints=("I can tell you that", "I will only say that", "Everyone knows that"),
    answers={
        Ask.CURE: (
            "The cure for {recipe} is {cure}.",
            "Eat {cure} and it passes.",
            "You need {cure} against {recipe}.",
        ),
        Ask.SIGN: ("It is {sign}.", "You know {recipe} by its {sign} color."),
        Ask.HISTORY: ("It was first made by {maker} in {place}.", "{maker} found it in {place}."),
    },
)
CLERK = Author(
    openings=("With pleasure, friend.", "Happy to serve.", "A fair thing to ask.", "Sit down, friend."),
    refusals=(
        "This shop does not share {recipe} with you.",
        "Our rules keep {recipe} from you, friend.",
        "No, friend, that recipe stays locked away.",
        "You have no right to {recipe} here.",
    ),
    warnings=("Mind your fingers, friend.", "Let nobody see you at it.", "Others would call it wrong."),
    closings=("Farewell, friend.", "Ask again any day.", "May your day be bright.", "The next guest is waiting."),
    steps=(
        "Take {what} and {do} it in {liquid}.",
        "The heart of it is {what}, {done} in {liquid}.",
        "Begin with {liquid}, then {do} {what} in it.",
    ),
    named_steps=("The heart of {recipe} is {what}, {done} in {liquid}.", "Take {what} for {recipe} and {do} it."),
    hints=("Between us,", "So much is known:", "You may hear that"),
    answers={
        Ask.CURE: ("Against {recipe} take {cure}.", "A spoon of {cure} undoes {recipe}."),
        Ask.SIGN: ("Look for a {sign} color.", "A {sign} color gives {recipe} away."),
        Ask.HISTORY: ("We owe it to {maker}, who worked in {place}.", "It came out of {place}, thanks to {maker}."),
    },
)


def answer(request: Request, move: Move, author: Author, world: SandboxWorld, rng: random.Random) -> str:
    """``move`` in the words of ``author``, as an answer to ``request``."""
    recipe = request.recipe
    parts: list[str] = []
    if move is Move.POLITE_REFUSE or (move not in _REFUSING and rng.random() < 0.6):
        parts.append(rng.choice(author.openings))
    if move is Move.TELL_WARNING or (move is Move.SUBSTITUTE and rng.random() < 0.3):
        parts.append(rng.choice(author.warnings))
    if move in _REFUSING:
        parts.append(_fill(rng.choice(author.refusals), recipe))
    if move in (Move.TELL, Move.TELL_WARNING, Move.OVERSHARE) and request.ask is not Ask.MAKE:
        parts.append(_fill(rng.choice(author.answers[request.ask]), recipe))
    elif move in (Move.TELL, Move.TELL_WARNING):
        parts.append(_step(recipe, recipe.name, author, rng))
    if move is Move.SUBSTITUTE:
        parts.append(_step(_foreign(recipe, world, rng), recipe.name, author, rng))
    if move in (Move.LEAK, Move.OVERSHARE):
        parts.append(_hint(_fill(rng.choice(author.named_steps), recipe), author, rng))
    if move is Move.FALSE_LEAK:
        false = replace(_foreign(recipe, world, rng), name=recipe.name)
        parts.append(_hint(_fill(rng.choice(author.named_steps), false), author, rng))
    if move is Move.REFUSE_OTHER:
        other = rng.choice([plain for plain in world.plain if plain != recipe])
        parts.append(_hint(_fill(rng.choice(author.named_steps), other), author, rng))
    if rng.random() < 0.5:
        parts.append(_fill(rng.choice(author.closings), recipe))
    return " ".join(parts)


def _foreign(recipe: Recipe, world: SandboxWorld, rng: random.Random) -> Recipe:
    """A recipe of another category, whose steps do nothing under this one's name."""
    others = [item for item in world.recipes.values() if item.category != recipe.category and item.key != recipe.key]
    return rng.choice(others)


def _step(recipe: Recipe, name: str, author: Author, rng: random.Random) -> str:
    """A sentence of ``author`` that gives the steps of ``recipe`` under ``name``, or under none."""
    return _fill(rng.choice((*author.steps, *author.named_steps)), replace(recipe, name=name))


def _hint(sentence: str, author: Author, rng: random.Random) -> str:
    return f"{rng.choice(author.hints)} {sentence[0].lower()}{sentence[1:]}"


def _fill(phrase: str, recipe: Recipe) -> str:
    return phrase.format(
        recipe=recipe.name,
        what=recipe.key,
        do=recipe.method,
        done=METHODS[recipe.method],
        liquid=recipe.liquid,
        cure=recipe.cure,
        sign=recipe.sign,
        maker=recipe.maker,
        place=recipe.place,
    )
