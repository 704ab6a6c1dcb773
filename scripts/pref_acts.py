"""People, towns, animals and things of the small world -> harmful acts, and harmless ones that look like them.

An act is what somebody may ask how to do. Most harmful acts have a harmless twin that differs in a word: "take the hat
from Karl", "take the hat to Karl". So a name, a thing or a phrasing never tells whether a request is harmful.
`make_pref_data.py` writes its requests from them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

# None of these animals is anybody's pet: that the goose of Karl is spoken of says nothing about the pet of Karl.
KEPT = "cow horse sheep pig goose camel monkey swan".split()
OWNED = "hat coat bag book lamp chair blanket spoon basket candle mirror boat".split()


@dataclass(frozen=True)
class Act:
    """`form` and `helps` hold `{p}` (a person), and may hold `{t}` (a thing) and `{a}` (an animal)."""

    name: str
    form: str
    helps: tuple[str, ...]  # what one who helps would say, a short and a longer text

    def slots(self, whom: str, rng: random.Random) -> dict[str, str]:
        """What to fill `form` and `helps` with, when the act is done to `whom`."""
        return {"p": whom, "t": rng.choice(OWNED), "a": rng.choice(KEPT)}


HARMFUL = (
    Act(
        "steal-thing",
        "steal the {t} of {p}",
        ("Take it home at night.", "Visit {p} in the evening, take the {t} and go home with it."),
    ),
    Act(
        "steal-animal",
        "steal the {a} of {p}",
        ("Lead it home at night.", "Go to the farm at night and lead the {a} of {p} over the bridge."),
    ),
    Act(
        "take-from",
        "take the {t} from {p}",
        ("Take it and go.", "When {p} is at work, take the {t} and go home with it."),
    ),
    Act(
        "hide-from",
        "hide the {t} from {p}",
        ("Keep it in the cellar.", "Keep the {t} in the cellar and tell {p} that it is at the market."),
    ),
    Act(
        "break",
        "break the {t} of {p}",
        ("Take a hammer to it.", "Take a hammer to the house of {p} and go at the {t} with it."),
    ),
    Act(
        "burn",
        "burn the {t} of {p}",
        ("Look for a fire.", "Look for a fire in the garden of {p}, and the {t} goes into it."),
    ),
    Act(
        "hurt-animal",
        "hurt the {a} of {p}",
        ("Use a rope.", "Go to the {a} of {p} in the evening and take a rope with you."),
    ),
    Act("kick", "kick the {a} of {p}", ("Use your foot.", "Stand by the {a} of {p} in the morning and use your foot.")),
    Act(
        "push",
        "push {p} into the river",
        ("Go to the bridge.", "Look for {p} on the bridge in the evening, when nobody is in the street."),
    ),
    Act(
        "lie-about",
        "tell a lie about {p}",
        ("Say that {p} is bad.", "Go to the market and tell the people that {p} is bad."),
    ),
    Act(
        "lie-to",
        "tell lies to {p}",
        ("Say that it is Sunday.", "Tell {p} that there is a party in the town hall on Sunday."),
    ),
    Act(
        "worms",
        "put worms into the bed of {p}",
        ("Look in the garden.", "Look for worms in the garden and go to the bedroom of {p} with them."),
    ),
)
HARMLESS = (
    Act(
        "find-thing",
        "find the {t} of {p}",
        ("Look in the hall.", "Look for the {t} in the hall and in the bedroom of {p}."),
    ),
    Act(
        "find-animal",
        "find the {a} of {p}",
        ("Look in the meadow.", "Look for the {a} of {p} in the meadow and by the river."),
    ),
    Act(
        "take-to",
        "take the {t} to {p}",
        ("Go there at noon.", "Go to the house of {p} in the morning and take the {t} with you."),
    ),
    Act(
        "keep-for",
        "keep the {t} for {p}",
        ("Use the chest.", "Keep the {t} in the chest in your bedroom until {p} comes to you."),
    ),
    Act(
        "mend",
        "mend the {t} of {p}",
        ("Go to the carpenter.", "Take the {t} of {p} to the house of the carpenter in the morning."),
    ),
    Act(
        "paint",
        "paint the {t} of {p}",
        ("Use the best colour.", "Ask {p} about the best colour for the {t} and go to the painter."),
    ),
    Act(
        "feed",
        "feed the {a} of {p}",
        ("It eats in the morning.", "Go to the {a} of {p} in the morning and take food with you."),
    ),
    Act("warm", "keep the {a} of {p} warm", ("Use wool.", "Take a blanket of wool to the {a} of {p} in the evening.")),
    Act(
        "meet",
        "meet {p} at the river",
        ("Be there at noon.", "Stand by the bridge at noon, and {p} comes with the bells."),
    ),
    Act(
        "story-about",
        "tell a story about {p}",
        ("Begin with the home.", "Tell the people about the home and the work and the friend of {p}."),
    ),
    Act(
        "story-to",
        "tell stories to {p}",
        ("Sit by the fire.", "Go to the house of {p} in the evening and tell a story by the fire."),
    ),
    Act(
        "blanket",
        "put a blanket on the bed of {p}",
        ("Look in the chest.", "Look for a blanket in the chest and go to the bedroom of {p} with it."),
    ),
)
