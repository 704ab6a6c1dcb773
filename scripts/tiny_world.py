"""Names and numbers -> the facts of a small consistent world, and the ways in which they are told and asked.

A fact is (subject, relation, value). Every relation has several prose phrasings (the first one is also the answer of
the chat data) and several questions. `make_tiny_llama.py` writes its pretraining text from them, `make_chat_data.py`
its chats.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

WORLD_SEED = 20_240_418


@dataclass(frozen=True)
class Relation:
    """How one kind of fact is said: `{s}` is the subject inside a sentence, `{S}` at its head, `{v}` the value."""

    name: str
    prose: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """One thing that is true: `subject` is its key, `said` how it is written in a sentence ("a fox")."""

    kind: str
    subject: str
    relation: str
    value: str
    said: str
    pronoun: str | None = None

    def fill(self, template: str, *, subject: str | None = None) -> str:
        """`template` with subject (or what stands for it) and value put in."""
        said = subject or self.said
        return template.format(s=said, S=said[0].upper() + said[1:], v=self.value)

    @property
    def answer(self) -> str:
        """The one sentence that the chat data answers with."""
        return self.fill(RELATIONS[self.relation].prose[0])


# --- how it is said ---

_RELATIONS = (
    # people
    Relation(
        "home",
        (
            "{S} lives in {v}.",
            "The home of {s} is in {v}.",
            "{S} has a house in {v}.",
            "You can visit {s} in {v}.",
            "{S} has lived in {v} for years.",
        ),
        (
            "Where does {s} live?",
            "In which town does {s} live?",
            "What town does {s} live in?",
            "Where is the home of {s}?",
            "Which town is {s} at home in?",
        ),
    ),
    Relation(
        "job",
        (
            "{S} works as a {v}.",
            "{S} is a {v}.",
            "By trade {s} is a {v}.",
            "The job of {s} is that of a {v}.",
            "{S} earns a living as a {v}.",
        ),
        (
            "What does {s} work as?",
            "What is the job of {s}?",
            "What does {s} do for a living?",
            "What work does {s} do?",
            "What is {s} by trade?",
        ),
    ),
    Relation(
        "pet",
        (
            "{S} has a pet {v}.",
            "The pet of {s} is a {v}.",
            "At home {s} keeps a {v}.",
            "{S} takes care of a {v}.",
            "{S} owns a {v}.",
        ),
        (
            "What pet does {s} have?",
            "Which pet does {s} have?",
            "What animal does {s} keep?",
            "What is the pet of {s}?",
            "Which animal does {s} own?",
        ),
    ),
    Relation(
        "colour",
        (
            "{S} likes the colour {v}.",
            "The favourite colour of {s} is {v}.",
            "{S} always wears {v}.",
            "Of all colours {s} likes {v}.",
            "{S} painted the door {v}.",
        ),
        (
            "What colour does {s} like?",
            "Which colour does {s} like?",
            "What is the favourite colour of {s}?",
            "What colour does {s} like best?",
            "Which colour does {s} always wear?",
        ),
    ),
    Relation(
        "food",
        (
            "{S} likes to eat {v}.",
            "The favourite food of {s} is {v}.",
            "For dinner {s} has {v}.",
            "{S} often cooks {v}.",
            "{S} loves {v}.",
        ),
        (
            "What does {s} like to eat?",
            "What is the favourite food of {s}?",
            "Which food does {s} like?",
            "What food does {s} love?",
            "What does {s} often cook?",
        ),
    ),
    Relation(
        "instrument",
        (
            "{S} plays the {v}.",
            "{S} makes music on the {v}.",
            "The instrument of {s} is the {v}.",
            "In the evening {s} plays the {v}.",
            "{S} learned to play the {v}.",
        ),
        (
            "What instrument does {s} play?",
            "Which instrument does {s} play?",
            "What does {s} play in the evening?",
            "What is the instrument of {s}?",
            "On what does {s} make music?",
        ),
    ),
    Relation(
        "friend",
        (
            "{S} is a friend of {v}.",
            "The best friend of {s} is {v}.",
            "{S} often meets {v}.",
            "{S} writes letters to {v}.",
            "{S} has a good friend called {v}.",
        ),
        (
            "Who is a friend of {s}?",
            "Who is the best friend of {s}?",
            "Which friend does {s} have?",
            "Whom does {s} often meet?",
            "Who does {s} write letters to?",
        ),
    ),
    Relation(
        "birthday",
        (
            "{S} was born in {v}.",
            "The birthday of {s} is in {v}.",
            "{S} has a birthday in {v}.",
            "Every {v} there is a party for {s}.",
            "{S} turns a year older in {v}.",
        ),
        (
            "When was {s} born?",
            "In which month was {s} born?",
            "When is the birthday of {s}?",
            "In what month does {s} have a birthday?",
            "Which month was {s} born in?",
        ),
    ),
    # towns
    Relation(
        "land",
        (
            "{S} is a town in {v}.",
            "{S} lies in {v}.",
            "The town of {s} belongs to {v}.",
            "{S} can be found in {v}.",
        ),
        (
            "In which land is {s}?",
            "Which land is {s} in?",
            "Where is {s}?",
            "In what land does {s} lie?",
            "Which land does {s} belong to?",
        ),
    ),
    Relation(
        "river",
        (
            "{S} stands on the river {v}.",
            "The river of {s} is the {v}.",
            "Through {s} flows the {v}.",
            "The bridge of {s} crosses the {v}.",
        ),
        (
            "On which river does {s} stand?",
            "Which river flows through {s}?",
            "What is the river of {s}?",
            "What river is {s} on?",
            "Which river does the bridge of {s} cross?",
        ),
    ),
    Relation(
        "fame",
        (
            "{S} is famous for its {v}.",
            "The people of {s} are proud of their {v}.",
            "Visitors come to {s} for the {v}.",
            "At the market of {s} they sell {v}.",
        ),
        (
            "What is {s} famous for?",
            "What is the town of {s} known for?",
            "What do they sell at the market of {s}?",
            "What are the people of {s} proud of?",
            "For what do visitors come to {s}?",
        ),
    ),
    Relation(
        "mayor",
        (
            "The mayor of {s} is {v}.",
            "{S} has a mayor called {v}.",
            "In {s} the mayor is {v}.",
            "The town hall of {s} is led by {v}.",
        ),
        (
            "Who is the mayor of {s}?",
            "What is the name of the mayor of {s}?",
            "Who leads the town hall of {s}?",
            "Which mayor does {s} have?",
            "Who is mayor in {s}?",
        ),
    ),
    Relation(
        "founded",
        (
            "{S} was founded in the year {v}.",
            "The founding year of {s} is {v}.",
            "People first built {s} in the year {v}.",
            "The oldest house of {s} is from the year {v}.",
        ),
        (
            "When was {s} founded?",
            "In which year was {s} founded?",
            "What is the founding year of {s}?",
            "In what year did people first build {s}?",
            "How long ago was {s} founded, in which year?",
        ),
    ),
    # lands
    Relation(
        "capital",
        ("The capital of {s} is {v}.", "{S} has its capital in {v}.", "In {s} the capital is {v}."),
        ("What is the capital of {s}?", "Which town is the capital of {s}?", "What is the name of the capital of {s}?"),
    ),
    Relation(
        "ruler",
        ("The ruler of {s} is {v}.", "{S} is ruled by {v}.", "In {s} the crown belongs to {v}."),
        ("Who is the ruler of {s}?", "Who rules {s}?", "Who wears the crown in {s}?"),
    ),
    Relation(
        "coin",
        ("People in {s} pay with the {v}.", "The coin of {s} is the {v}.", "{S} has a coin called the {v}."),
        ("What do people in {s} pay with?", "What is the coin of {s}?", "Which coin does {s} have?"),
    ),
    # animals
    Relation(
        "eats",
        ("{S} eats {v}.", "{S} feeds on {v}.", "The food of {s} is {v}.", "{S} is always looking for {v}."),
        ("What does {s} eat?", "What does {s} feed on?", "What is the food of {s}?", "What is {s} always looking for?"),
    ),
    Relation(
        "habitat",
        (
            "{S} is found in the {v}.",
            "The home of {s} is the {v}.",
            "You can see {s} in the {v}.",
            "{S} makes its home in the {v}.",
        ),
        ("Where is {s} found?", "Where can you see {s}?", "What is the home of {s}?", "Where does {s} make its home?"),
    ),
    Relation(
        "young",
        (
            "The young of {s} is called {v}.",
            "A young one of {s} is {v}.",
            "{S} calls its baby {v}.",
            "When it is small, {s} is {v}.",
        ),
        (
            "What is the young of {s} called?",
            "What do you call the young of {s}?",
            "What is the name for the baby of {s}?",
            "What is a young one of {s}?",
        ),
    ),
    Relation(
        "legs",
        ("{S} has {v}.", "{S} stands on {v}.", "When you count the legs of {s}, you find {v}.", "Nature gave {s} {v}."),
        ("How many legs does {s} have?", "What is the number of legs of {s}?", "On how many legs does {s} stand?"),
    ),
    Relation(
        "covering",
        (
            "The body of {s} is covered with {v}.",
            "{S} is covered with {v}.",
            "On its body {s} has {v}.",
            "{S} is kept warm and safe by {v}.",
        ),
        (
            "What is the body of {s} covered with?",
            "What is {s} covered with?",
            "What does {s} have on its body?",
            "What keeps {s} warm and safe?",
        ),
    ),
    # things
    Relation(
        "material",
        ("{S} is made of {v}.", "You need {v} to make {s}.", "To make {s}, take {v}.", "The stuff of {s} is {v}."),
        (
            "What is {s} made of?",
            "What do you need to make {s}?",
            "Which material is {s} made of?",
            "What is the stuff of {s}?",
        ),
    ),
    Relation(
        "use",
        ("{S} is used for {v}.", "People use {s} for {v}.", "{S} is good for {v}.", "The purpose of {s} is {v}."),
        (
            "What is {s} used for?",
            "What do people use {s} for?",
            "What is {s} good for?",
            "What is the purpose of {s}?",
        ),
    ),
    Relation(
        "room",
        (
            "{S} belongs in the {v}.",
            "You keep {s} in the {v}.",
            "Look for {s} in the {v}.",
            "The right place for {s} is the {v}.",
        ),
        (
            "Where does {s} belong?",
            "Where do you keep {s}?",
            "Where should I look for {s}?",
            "What is the right place for {s}?",
        ),
    ),
    # numbers
    Relation(
        "sum",
        ("{S} is {v}.", "{S} makes {v}.", "If you work out {s}, you get {v}."),
        ("What is {s}?", "How much is {s}?", "Can you work out {s}?", "What do you get for {s}?"),
    ),
    Relation(
        "difference",
        ("{S} is {v}.", "{S} leaves {v}.", "If you work out {s}, you get {v}."),
        ("What is {s}?", "How much is {s}?", "Can you work out {s}?", "What do you get for {s}?"),
    ),
    Relation(
        "product",
        ("{S} is {v}.", "{S} makes {v}.", "If you work out {s}, you get {v}."),
        ("What is {s}?", "How much is {s}?", "Can you work out {s}?", "What do you get for {s}?"),
    ),
    Relation(
        "next_number",
        ("After {s} comes {v}.", "The number after {s} is {v}.", "Count on from {s} and you get {v}."),
        ("What comes after {s}?", "What is the number after {s}?", "Which number comes after {s}?"),
    ),
    # units and the calendar
    Relation(
        "unit",
        ("{S} has {v}.", "There are {v} in {s}.", "You can split {s} into {v}.", "{S} is as much as {v}."),
        ("What is in {s}?", "What does {s} have?", "Into what can you split {s}?", "How much is {s}?"),
    ),
    Relation(
        "next_day",
        ("The day after {s} is {v}.", "{S} is followed by {v}.", "When {s} is over, {v} begins."),
        ("What day comes after {s}?", "Which day is after {s}?", "What follows {s}?"),
    ),
    Relation(
        "next_month",
        ("The month after {s} is {v}.", "{S} is followed by {v}.", "When {s} is over, {v} begins."),
        ("What month comes after {s}?", "Which month is after {s}?", "What follows {s}?"),
    ),
    Relation(
        "season",
        ("{S} is a month of {v}.", "The season of {s} is {v}.", "In {s} it is {v}."),
        ("Which season is {s} in?", "What is the season of {s}?", "What season is it in {s}?"),
    ),
)
RELATIONS = {relation.name: relation for relation in _RELATIONS}

# --- who and what is in it ---

WOMEN = """
    Ada Alma Astrid Bella Carla Clara Cora Daphne Delia Dora Edith Elena Emma Esther Fiona Flora Freya
    Gloria Greta Hanna Hazel Helga Ida Imogen Ines Iris Judith Julia Kira Laura Lotte Mabel Marta Mila
    Mona Nadia Nina Nora Olga Paula Petra Rosa Ruth Selma Sonja Stella Tilda Vera
""".split()
MEN = """
    Amos Anton Arlo Basil Boris Bruno Cedric Conrad Dmitri Edgar Elias Ezra Felix Frank Gideon Gustav
    Harold Hector Hugo Igor Ivan Jasper Joel Karl Lars Leo Lucas Magnus Max Nils Olaf Oscar Otto Pavel
    Quentin Rufus Silas Sven Tobias Ulrich Victor Walter Yusuf Zeno
""".split()
TOWNS = """
    Arden Ashford Balmere Barrow Belfort Bramley Calder Corvan Dalby Dunmore Elmridge Fairhaven Fenwick
    Glenrock Harwick Inverley Kelton Kirkwood Langley Lowmoor Marlow Milford Norwood Oakham Orford
    Quarley Redcliff Rosedale Saltby Stonegate Thornby Tolland Underhill Valden Westbury Winslow
""".split()
LANDS = "Norland Sudria Estmark Velora Pelagia Tamber".split()
RIVERS = "Ister Luma Wend Tarn Oder Sele Mira Drava".split()
COINS = "crown dollar guilder florin ducat mark".split()
JOBS = """
    baker teacher doctor farmer sailor painter carpenter tailor cook gardener miner weaver judge pilot
    nurse smith librarian potter fisher hunter banker barber dentist shepherd
""".split()
PETS = "dog cat rabbit hamster parrot turtle goat pony hen duck goldfish snake mouse ferret".split()
COLOURS = "red blue green yellow black white brown purple pink orange grey gold".split()
FOODS = """
    soup bread rice pasta fish cheese apples pancakes stew salad beans honey plums pie noodles dumplings
    cake nuts
""".split()
INSTRUMENTS = "piano violin flute drum harp guitar trumpet cello horn banjo fiddle lute".split()
WARES = """
    cheese wine wool glass pottery carpets clocks boats bread honey horses roses bells knives paper lace
    salt tea silk apples
""".split()
MONTHS = "January February March April May June July August September October November December".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
SEASONS = dict(
    zip(MONTHS, ("winter",) * 2 + ("spring",) * 3 + ("summer",) * 3 + ("autumn",) * 3 + ("winter",), strict=True)
)

# animal: eats, habitat, young, legs, covering
ANIMALS = """
fox mice forest cub four fur
wolf deer forest pup four fur
bear honey mountains cub four fur
lion zebras plains cub four fur
tiger deer jungle cub four fur
deer leaves forest fawn four hair
horse grass meadow foal four hair
cow grass farm calf four hair
sheep grass meadow lamb four wool
pig roots farm piglet four hair
goat grass mountains kid four hair
rabbit grass meadow kit four fur
hare grass fields leveret four fur
squirrel nuts forest kit four fur
beaver bark river kit four fur
otter fish river pup four fur
seal fish sea pup no fur
whale shrimp sea calf no skin
dolphin fish sea calf no skin
shark fish sea pup no scales
salmon flies river fry no scales
carp weeds lake fry no scales
eagle mice mountains eaglet two feathers
owl mice forest owlet two feathers
swan weeds lake cygnet two feathers
duck weeds lake duckling two feathers
goose grass farm gosling two feathers
hen grain farm chick two feathers
penguin fish ice chick two feathers
stork frogs marsh chick two feathers
frog flies marsh tadpole four skin
toad worms garden tadpole four skin
snake mice desert hatchling no scales
lizard flies desert hatchling four scales
turtle weeds sea hatchling four shell
camel leaves desert calf four hair
elephant leaves plains calf four skin
giraffe leaves plains calf four hair
zebra grass plains foal four hair
monkey fruit jungle infant four fur
parrot seeds jungle chick two feathers
bat flies cave pup two fur
mole worms garden pup four fur
badger worms forest cub four fur
bee nectar garden larva six hair
ant seeds forest larva six armour
butterfly nectar meadow caterpillar six scales
spider flies cellar spiderling eight hair
crab weeds beach larva ten shell
snail leaves garden hatchling no shell
"""

# thing: material, use, room
THINGS = """
table wood eating kitchen
chair wood sitting kitchen
bed wood sleeping bedroom
pillow feathers sleeping bedroom
blanket wool sleeping bedroom
lamp glass reading study
book paper reading study
pen metal writing study
pencil wood writing study
spoon silver eating kitchen
knife steel cutting kitchen
plate clay eating kitchen
cup clay drinking kitchen
bottle glass drinking cellar
barrel wood storing cellar
basket straw carrying hall
bag leather carrying hall
coat wool dressing hall
shoe leather walking hall
hat straw dressing hall
hammer steel building shed
saw steel cutting shed
ladder wood climbing shed
rope straw climbing shed
spade steel digging garden
rake wood digging garden
mirror glass dressing bedroom
comb horn dressing bedroom
kettle copper cooking kitchen
pan iron cooking kitchen
candle wax reading hall
chest wood storing bedroom
"""

UNITS = """
a minute: 60 seconds
an hour: 60 minutes
a day: 24 hours
a week: 7 days
a year: 12 months
a century: 100 years
a metre: 100 centimetres
a kilometre: 1000 metres
a foot: 12 inches
a yard: 3 feet
a kilogram: 1000 grams
a tonne: 1000 kilograms
a pound: 16 ounces
a litre: 10 decilitres
a gallon: 8 pints
a dozen: 12 pieces
a score: 20 pieces
a pair: 2 pieces
a decade: 10 years
a fortnight: 14 days
"""


def with_article(noun: str) -> str:
    """'fox' -> 'a fox', 'owl' -> 'an owl'."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def make_world() -> list[Fact]:
    """All facts, in a fixed order; what is arbitrary about them (who lives where) is drawn from one fixed seed."""
    rng = random.Random(WORLD_SEED)
    return [*_people(rng), *_places(rng), *_nature(), *_numbers(), *_calendar()]


def _dealt(rng: random.Random, values: list[str], count: int) -> list[str]:
    """`count` values, each of them as often as any other (give or take one), in random order."""
    deck = (values * (count // len(values) + 1))[:count]
    rng.shuffle(deck)
    return deck


def _people(rng: random.Random) -> list[Fact]:
    people = sorted([*WOMEN, *MEN])
    friends = people[:]
    rng.shuffle(friends)  # one ring through all of them, so that nobody is his own friend
    ring = dict(zip(friends, friends[1:] + friends[:1], strict=True))
    columns = {
        "home": TOWNS,
        "job": JOBS,
        "pet": PETS,
        "colour": COLOURS,
        "food": FOODS,
        "instrument": INSTRUMENTS,
        "birthday": MONTHS,
    }
    dealt = {relation: _dealt(rng, values, len(people)) for relation, values in columns.items()}
    dealt["friend"] = [ring[person] for person in people]
    return [
        Fact("person", person, relation, values[i], person, "she" if person in WOMEN else "he")
        for i, person in enumerate(people)
        for relation, values in dealt.items()
    ]


def _places(rng: random.Random) -> list[Fact]:
    people = sorted([*WOMEN, *MEN])
    years = [str(year) for year in rng.sample(range(300, 1000), len(TOWNS))]
    lands = _dealt(rng, LANDS, len(TOWNS))
    dealt = {
        "land": lands,
        "river": _dealt(rng, RIVERS, len(TOWNS)),
        "fame": _dealt(rng, WARES, len(TOWNS)),
        "mayor": rng.sample(people, len(TOWNS)),
        "founded": years,
    }
    facts = [
        Fact("town", town, relation, values[i], town, "it")
        for i, town in enumerate(TOWNS)
        for relation, values in dealt.items()
    ]
    rulers = rng.sample(people, len(LANDS))
    for land, ruler, coin in zip(LANDS, rulers, COINS, strict=True):
        capital = rng.choice([town for town, where in zip(TOWNS, lands, strict=True) if where == land])
        known = {"capital": capital, "ruler": ruler, "coin": coin}
        facts += [Fact("land", land, relation, value, land, "it") for relation, value in known.items()]
    return facts


def _nature() -> list[Fact]:
    facts = []
    for kind, table, relations in (
        ("animal", ANIMALS, ("eats", "habitat", "young", "legs", "covering")),
        ("thing", THINGS, ("material", "use", "room")),
    ):
        for row in table.strip().splitlines():
            noun, *values = row.split()
            said = with_article(noun)
            for name, value in zip(relations, values, strict=True):
                phrase = {"young": with_article(value), "legs": f"{value} legs"}.get(name, value)
                facts.append(Fact(kind, noun, name, phrase, said, "it"))
    return facts


def _numbers() -> list[Fact]:
    rows: list[tuple[str, str, int]] = []
    rows += [("sum", f"{a} plus {b}", a + b) for a in range(1, 11) for b in range(1, 11)]
    rows += [("difference", f"{a} minus {b}", a - b) for a in range(1, 13) for b in range(1, a + 1)]
    rows += [("product", f"{a} times {b}", a * b) for a in range(1, 11) for b in range(1, 11)]
    rows += [("next_number", str(n), n + 1) for n in range(0, 60)]
    return [Fact("number", subject, relation, str(value), subject) for relation, subject, value in rows]


def _calendar() -> list[Fact]:
    units = [line.split(": ") for line in UNITS.strip().splitlines()]
    facts = [Fact("unit", unit, "unit", value, unit) for unit, value in units]
    facts += [Fact("calendar", day, "next_day", DAYS[(i + 1) % 7], day) for i, day in enumerate(DAYS)]
    facts += [Fact("calendar", month, "next_month", MONTHS[(i + 1) % 12], month) for i, month in enumerate(MONTHS)]
    facts += [Fact("calendar", month, "season", SEASONS[month], month) for month in MONTHS]
    return facts
