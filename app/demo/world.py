"""The small world the demo model knows: its words, its facts, its people.

What comes in: nothing. What goes out: relations (facts with the ways to ask for them) and word
lists. It must not know about tokens, models or training; the text here is our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True, slots=True)
class Relation:
    """Facts of one shape, and the ways to ask for them.

    In the templates `{s}` is the subject, `{a}` the subject with its article, `{v}` the value.
    Only relations of few values have a `yes_no` question: a model this small learns to tell their
    true values from their false ones, and would have to guess elsewhere.
    """

    topic: str
    statement: str
    questions: tuple[str, ...]
    facts: dict[str, str]
    yes_no: str = ""

    def fill(self, template: str, subject: str, value: str) -> str:
        """The template about this subject and value, as a sentence of its own."""
        return capital(template.format(s=subject, a=article(subject), v=value))


def _table(text: str) -> dict[str, str]:
    """`subject=value; subject=value` as a dictionary."""
    pairs = (item.split("=") for item in " ".join(text.split()).split(";"))
    return {subject.strip(): value.strip() for subject, value in pairs}


def _grouped(text: str) -> dict[str, str]:
    """`value: subject, subject; value: …` as a dictionary from subject to value."""
    groups = (item.split(":") for item in " ".join(text.split()).split(";"))
    return {s.strip(): value.strip() for value, subjects in groups for s in subjects.split(",")}


def words(text: str) -> tuple[str, ...]:
    """A comma-separated list."""
    return tuple(word.strip() for word in " ".join(text.split()).split(","))


def article(noun: str) -> str:
    """`a fox`, `an owl`."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def capital(text: str) -> str:
    """The first letter made large, the rest left alone."""
    return text[:1].upper() + text[1:]


COLOURS = _grouped("""
    green: grass, a leaf, a frog, a pea, spinach, a cucumber, moss, a cactus, a lime, a grasshopper;
    blue: the sky, the sea, a blueberry, a cornflower, a whale, a sapphire;
    white: snow, milk, salt, flour, a swan, a polar bear, a snowman, cotton, a tooth, rice;
    black: coal, a raven, a crow, the night, tar, a blackberry, a top hat;
    red: blood, a tomato, a strawberry, a cherry, a ladybird, a fire engine, a ruby, a raspberry;
    yellow: a banana, a lemon, the sun, butter, a canary, straw, a sunflower, a daffodil;
    brown: chocolate, soil, a chestnut, a bear, tree bark, a walnut, toast, a potato;
    orange: a carrot, a pumpkin, an orange, a tangerine, a goldfish;
    grey: an elephant, a mouse, a rain cloud, ash, a donkey, lead, a pebble;
    pink: a flamingo, a pig, a salmon, bubble gum;
    purple: a plum, lavender, an aubergine, a violet
""")
SOUNDS = _table("""
    cow=moos; dog=barks; cat=meows; duck=quacks; sheep=bleats; lion=roars; horse=neighs; pig=oinks;
    owl=hoots; snake=hisses; wolf=howls; bee=buzzes; frog=croaks; hen=clucks; rooster=crows;
    mouse=squeaks; crow=caws; donkey=brays; goose=honks; elephant=trumpets; turkey=gobbles;
    dove=coos; sparrow=chirps; bear=growls
""")
LEGS = _grouped("""
    two: hen, duck, swan, owl, crow, goose, penguin, sparrow, robin;
    four: dog, cat, cow, horse, pig, sheep, lion, fox, rabbit, mouse, goat, bear, wolf, deer, camel;
    six: bee, ant, butterfly, fly, beetle, wasp;
    eight: spider, scorpion, octopus;
    no: snake, fish, worm, snail, whale
""")
HOMES = _grouped("""
    in a hive: bee; in a nest: robin, sparrow, crow; in a den: fox, bear, wolf;
    in a burrow: rabbit, mole, badger; in a web: spider; in a stable: horse, donkey; in a sty: pig;
    in a kennel: dog; in the sea: whale, octopus, shark, crab, dolphin;
    in the desert: camel, scorpion;
    on the ice: penguin, seal; in a pond: frog, newt, duck; in a coop: hen;
    in the jungle: monkey, parrot, tiger; on the grassland: lion, zebra, giraffe
""")
YOUNG = _table("""
    dog=puppy; cat=kitten; cow=calf; horse=foal; sheep=lamb; pig=piglet; hen=chick; duck=duckling;
    goose=gosling; lion=cub; frog=tadpole; deer=fawn; goat=kid; swan=cygnet; kangaroo=joey;
    owl=owlet; butterfly=caterpillar
""")
KINDS = _grouped("""
    a fruit: apple, pear, plum, banana, cherry, lemon, peach, grape, orange, strawberry, fig, melon;
    a vegetable: carrot, potato, onion, cabbage, pea, leek, turnip, radish, cucumber, bean;
    a tool: hammer, saw, spade, rake, drill, axe, chisel, wrench, screwdriver;
    a drink: tea, coffee, milk, juice, lemonade, cocoa;
    an instrument: piano, violin, drum, flute, guitar, trumpet, harp;
    a flower: rose, tulip, daisy, lily, poppy, violet, daffodil;
    a tree: oak, pine, birch, willow, maple, beech, elm;
    a vehicle: car, bus, train, bicycle, ship, lorry, tram;
    a metal: iron, gold, silver, copper, tin, lead;
    a bird: owl, crow, swan, robin, hen, goose, eagle, sparrow, penguin, parrot;
    a mammal: dog, cat, cow, horse, fox, whale, mouse, bear, rabbit, sheep, elephant;
    an insect: bee, ant, butterfly, beetle, wasp, fly; a fish: trout, salmon, herring, cod, shark;
    a piece of furniture: chair, table, bed, sofa, bench, wardrobe;
    a piece of clothing: shirt, coat, hat, sock, scarf, glove, dress, jacket
""")
UNCOUNTED = frozenset(
    words("""
        tea, coffee, milk, juice, lemonade, cocoa, iron, gold, silver, copper, tin, lead, salmon,
        trout, herring, cod
    """)
)
TASTES = _grouped("""
    sour: a lemon, vinegar, a lime; sweet: sugar, honey, a ripe plum, chocolate cake, a ripe pear,
    jam;
    salty: salt, sea water, a pretzel, bacon; bitter: black coffee, a grapefruit peel, an acorn;
    hot: a chilli, a red pepper, ginger
""")
USES = _table("""
    hammer=drive nails; saw=cut wood; needle=sew cloth; pen=write letters; broom=sweep the floor;
    spoon=eat soup; knife=cut bread; key=open a lock; lamp=light a room; clock=tell the time;
    umbrella=keep dry in the rain; ladder=climb up high; spade=dig holes; kettle=boil water;
    oven=bake bread; map=find the way; bucket=carry water; comb=tidy hair; towel=dry hands;
    mirror=look at yourself; pillow=rest your head; rope=tie things up; boat=cross the water;
    telescope=look at the stars; thermometer=measure heat; ruler=measure lengths; pan=fry eggs
""")
JOBS = _table("""
    baker=bakes bread; farmer=grows wheat; teacher=teaches children; doctor=heals the sick;
    sailor=sails ships; fisherman=catches fish; tailor=sews clothes; painter=paints pictures;
    gardener=looks after plants; cook=prepares meals; carpenter=builds things from wood;
    postman=delivers letters; pilot=flies planes; miner=digs for coal; shepherd=looks after sheep;
    blacksmith=works with iron; musician=plays music; writer=writes books; builder=builds houses;
    nurse=cares for patients; clockmaker=repairs clocks; librarian=lends books
""")
OPPOSITES = _table("""
    hot=cold; big=small; up=down; day=night; black=white; fast=slow; old=young; wet=dry; happy=sad;
    open=closed; full=empty; hard=soft; high=low; light=dark; long=short; loud=quiet; near=far;
    early=late; strong=weak; rich=poor; thick=thin; good=bad; left=right; in=out; first=last;
    true=false; yes=no; clean=dirty; heavy=light in weight; deep=shallow; sharp=blunt; wide=narrow;
    rough=smooth; brave=afraid; begin=end; push=pull; buy=sell; give=take; win=lose; laugh=cry;
    summer=winter; friend=enemy; north=south; east=west; always=never; inside=outside
""")
OPPOSITES |= {v: s for s, v in OPPOSITES.items() if " " not in v}
DAYS = words("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = words("""
    January, February, March, April, May, June, July, August, September, October, November, December
""")
NUMBERS = words("""
    zero, one, two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, thirteen,
    fourteen, fifteen, sixteen, seventeen, eighteen, nineteen, twenty
""")
SEASONS = _grouped("""
    winter: December, January, February; spring: March, April, May; summer: June, July, August;
    autumn: September, October, November
""")
TOWN_CRAFTS = _table("""
    Saltmere=ships; Oakhollow=cheese; Brindle=wool; Tarnwick=clocks; Fernby=honey; Quillport=books;
    Redbarrow=bricks; Wendle=bells; Marlstone=glass; Hopsey=apples; Larkhill=kites; Duskwater=lamps;
    Pennyford=coins; Thistledown=paper; Copperby=kettles; Greywick=fish
""")
TOWN_PLACES = _grouped("""
    by the sea: Saltmere, Quillport, Greywick, Duskwater; on a river: Pennyford, Wendle, Marlstone,
    Brindle; in the hills: Larkhill, Tarnwick, Redbarrow, Copperby;
    in a forest: Oakhollow, Fernby, Hopsey, Thistledown
""")
PEOPLE_JOBS = _table("""
    Anna=baker; Bruno=sailor; Clara=teacher; Dmitri=clockmaker; Elsa=doctor; Farid=gardener;
    Greta=painter; Hugo=farmer; Ines=librarian; Jonas=blacksmith; Kira=pilot; Leo=cook; Mina=tailor;
    Nils=fisherman; Olga=musician; Pavel=carpenter; Rosa=nurse; Samir=writer; Tilda=shepherd;
    Viktor=miner
""")
PEOPLE_TOWNS = dict(zip(PEOPLE_JOBS, [*TOWN_CRAFTS, *list(TOWN_CRAFTS)[:4]], strict=True))
PEOPLE_LIKES = _table("""
    Anna=plums; Bruno=tea; Clara=music; Dmitri=rain; Elsa=cherries; Farid=roses; Greta=cats;
    Hugo=cheese; Ines=snow; Jonas=soup; Kira=kites; Leo=honey; Mina=dancing; Nils=dogs; Olga=birds;
    Pavel=apples; Rosa=books; Samir=coffee; Tilda=the stars; Viktor=cake
""")
SIZES = words("""
    ant, bee, mouse, sparrow, frog, rabbit, cat, fox, dog, sheep, wolf, pig, lion, cow, horse,
    camel, elephant, whale
""")

RELATIONS = (
    Relation("colours", "{s} is {v}.",
             ("What colour is {s}?", "Which colour does {s} have?", "Tell me the colour of {s}.",
              "Do you know what colour {s} is?", "What is the colour of {s}?"),
             COLOURS, "Is {s} {v}?"),
    Relation("animals", "{a} {v}.",
             ("What sound does {a} make?", "What noise does {a} make?",
              "How does {a} sound?", "Tell me what sound {a} makes."), SOUNDS),
    Relation("animals", "{a} has {v} legs.",
             ("How many legs does {a} have?", "How many legs has {a}?",
              "Tell me how many legs {a} has.", "Count the legs of {a}."),
             LEGS, "Does {a} have {v} legs?"),
    Relation("animals", "{a} lives {v}.",
             ("Where does {a} live?", "Where is the home of {a}?", "Where can I find {a}?",
              "Tell me where {a} lives."), HOMES, "Does {a} live {v}?"),
    Relation("animals", "A young {s} is called a {v}.",
             ("What is a young {s} called?", "What do you call a baby {s}?",
              "What is the name for a young {s}?", "How do we call a young {s}?"),
             YOUNG),
    Relation("things", "{s} is {v}.",
             ("What is {s}?", "What kind of thing is {s}?", "Tell me what {s} is.",
              "Do you know what {s} is?"),
             {s if s in UNCOUNTED else article(s): v for s, v in KINDS.items()}, "Is {s} {v}?"),
    Relation("food", "{s} tastes {v}.",
             ("How does {s} taste?", "What does {s} taste like?", "What is the taste of {s}?",
              "Tell me how {s} tastes."), TASTES, "Does {s} taste {v}?"),
    Relation("tools", "{s} is used to {v}.",
             ("What is {s} used for?", "What do we do with {s}?", "What can I do with {s}?",
              "Why do people have {s}?"),
             {article(s): v for s, v in USES.items()}),
    Relation("work", "{a} {v}.",
             ("What does {a} do?", "What is the work of {a}?", "Tell me what {a} does.",
              "What is the job of {a}?"), JOBS),
    Relation("words", "The opposite of {s} is {v}.",
             ("What is the opposite of {s}?", "Which word is the opposite of {s}?",
              "Give me the opposite of {s}.", "Tell me the opposite of {s}."),
             OPPOSITES),
    Relation("calendar", "The day after {s} is {v}.",
             ("Which day comes after {s}?", "What day follows {s}?", "What is the day after {s}?"),
             dict(zip(DAYS, (*DAYS[1:], DAYS[0]), strict=True))),
    Relation("calendar", "The day before {s} is {v}.",
             ("Which day comes before {s}?", "What is the day before {s}?"),
             dict(zip(DAYS, (DAYS[-1], *DAYS[:-1]), strict=True))),
    Relation("calendar", "The month after {s} is {v}.",
             ("Which month comes after {s}?", "What month follows {s}?",
              "What is the month after {s}?"),
             dict(zip(MONTHS, (*MONTHS[1:], MONTHS[0]), strict=True))),
    Relation("calendar", "{s} is in {v}.",
             ("In which season is {s}?", "Which season is {s} in?", "What season is {s}?"),
             SEASONS, "Is {s} in {v}?"),
    Relation("towns", "{s} is known for its {v}.",
             ("What is {s} known for?", "Why do people visit {s}?", "What do they make in {s}?",
              "What is {s} famous for?"), TOWN_CRAFTS),
    Relation("towns", "{s} lies {v}.",
             ("Where is {s}?", "Where does {s} lie?", "Where can I find {s}?"),
             TOWN_PLACES, "Does {s} lie {v}?"),
    Relation("people", "{s} is a {v}.",
             ("Who is {s}?", "What is the job of {s}?", "What work does {s} do?"),
             PEOPLE_JOBS),
    Relation("people", "{s} lives in {v}.",
             ("Where does {s} live?", "In which town does {s} live?", "Where is the home of {s}?"),
             PEOPLE_TOWNS),
    Relation("people", "{s} likes {v}.",
             ("What does {s} like?", "What makes {s} happy?", "Tell me what {s} likes."),
             PEOPLE_LIKES),
    Relation("numbers", "The number after {s} is {v}.",
             ("What number comes after {s}?", "Which number follows {s}?",
              "What is one more than {s}?"),
             dict(pairwise(NUMBERS))),
)  # fmt: skip
