"""Words of the synthetic corpus: topics, homophones, invented names, verbs.

Lists are ordered: the grammar draws earlier words more often (see ``text.zipf``). Words that only
make the language natural may occur in several lists; a homophone belongs to one topic only.
"""

from itertools import product
from typing import NamedTuple


class Topic(NamedTuple):
    """What people of one trade talk about; ``homophones`` sound like words of other topics."""

    roles: list[str]
    places: list[str]
    things: list[str]
    homophones: list[str]


def _topic(roles: str, places: str, things: str, homophones: str) -> Topic:
    return Topic(roles.split(), places.split(), things.split(), homophones.split())


# Spellings with one pronunciation in every accent of ``speech.ACCENTS`` (a test asks espeak-ng).
# All are nouns, so that syntax does not tell them apart, and each has its own topic below.
HOMOPHONES: tuple[tuple[str, ...], ...] = tuple(
    tuple(group.split())
    for group in """
    flour flower|pear pair|roll role|leek leak|steak stake|yolk yoke|currant current|plum plumb
    sweet suite|beet beat|mousse moose|dough doe|quarts quartz|jam jamb|peel peal|sun son
    scent cent|rain reign rein|rose rows|shoot chute|maze maize|sail sale|crews cruise|quay key
    mussel muscle|tow toe|beach beech|buoy boy|haul hall|oar ore|flare flair|barque bark
    surge serge|scull skull|knight night|manor manner|heir air|cannon canon|signet cygnet
    cellar seller|loot lute|creak creek|knave nave|cache cash|tail tale|plain plane
    gate gait|fair fare|vane vein|bale bail|stile style|mews muse|hare hair|paws pause|boar bore
    claws clause|lynx links|hart heart|vale veil|weight wait|feet feat|pain pane|sight site
    flu flue|waste waist|pole poll|tacks tax|storey story|piece peace|bass base
    cue queue|cymbal symbol|lyre liar|belle bell|rap wrap|principle principal|guilt gilt
    sole soul|brake break|arc ark
    """.strip()
    .replace("\n", "|")
    .split("|")
)

TOPICS: dict[str, Topic] = {
    "kitchen": _topic(
        "baker cook waiter butcher brewer",
        "bakery kitchen pantry diner brewery",
        "oven pan spoon cake bowl kettle recipe apron",
        "flour roll steak pear dough plum sweet leek yolk jam beet currant mousse peel quarts",
    ),
    "garden": _topic(
        "gardener florist beekeeper landscaper botanist",
        "garden greenhouse orchard lawn nursery",
        "rake spade seed hedge bulb basket lily fern",
        "flower sun rain rose scent shoot stake maze",
    ),
    "harbour": _topic(
        "sailor captain fisher diver helmsman",
        "harbour dock lighthouse ship shore",
        "net anchor rope boat crab deck lobster compass",
        "sail beach quay oar tow mussel leak haul current buoy crews flare surge scull barque",
    ),
    "castle": _topic(
        "king squire duke archer guard",
        "castle tower dungeon courtyard armoury",
        "shield crown banner helmet arrow torch goblet dagger",
        "knight son key hall reign manor heir cannon cellar loot creak cache knave signet",
    ),
    "farm": _topic(
        "farmer shepherd rider stablehand ploughman",
        "barn stable field paddock meadow",
        "cow goat plough tractor bucket fence chicken saddle",
        "tail gate plain fair rein yoke bale vane maize mews stile",
    ),
    "forest": _topic(
        "hunter ranger woodcutter trapper hiker",
        "forest cabin camp cave swamp",
        "tent trap owl fox badger nest trail axe",
        "hare bark paws claws creek boar doe beech moose hart vale lynx cygnet",
    ),
    "hospital": _topic(
        "doctor nurse surgeon dentist healer",
        "hospital clinic ward pharmacy surgery",
        "bandage pill needle stretcher mask crutch syringe tablet",
        "heart pain weight feet toe muscle sight vein flu skull gait",
    ),
    "workshop": _topic(
        "builder carpenter welder plumber glazier",
        "workshop quarry foundry mine sawmill",
        "hammer drill nail brick plank shovel beam chisel",
        "pole waste ore site pane air links tacks bore flue plumb chute quartz storey jamb",
    ),
    "theatre": _topic(
        "actor singer dancer drummer juggler",
        "theatre stage studio circus opera",
        "costume curtain violin drum trumpet puppet script song",
        "role tale piece cue beat pause bass suite cymbal flair lute rows feat rap muse lyre belle",
    ),
    "court": _topic(
        "judge lawyer mayor clerk senator",
        "court bank parliament treasury ministry",
        "verdict law vote contract treaty ballot budget debt",
        "tax peace poll clause principle bail guilt liar",
    ),
    "market": _topic(
        "tailor barber cobbler jeweller shopper",
        "market shop stall store salon",
        "coat shirt button ribbon mirror purse glove hat",
        "sale pair hair cash queue style sole seller cent wrap waist serge",
    ),
    "travel": _topic(
        "driver porter tourist conductor steward",
        "station airport hotel platform garage",
        "suitcase ticket passport train map engine tunnel taxi",
        "plane night wait fare brake cruise base",
    ),
    "school": _topic(
        "teacher pupil tutor student librarian",
        "school classroom library college gym",
        "pencil notebook desk exam ruler essay textbook lesson",
        "story break boy principal symbol manner arc",
    ),
    "abbey": _topic(
        "monk priest bishop pilgrim abbot",
        "abbey chapel church cloister crypt",
        "candle prayer robe sermon relic psalm rosary chalice",
        "bell soul nave peal veil canon gilt ark",
    ),
}

# (past, third person, base) of verbs that say nothing about the topic.
MENTION: list[tuple[str, str, str]] = [
    tuple(form.replace("_", " ") for form in verb.split())  # type: ignore[misc]
    for verb in """
    asked_about asks_about ask_about|looked_at looks_at look_at|talked_about talks_about talk_about
    found finds find|saw sees see|thought_of thinks_of think_of|wanted wants want
    remembered remembers remember|forgot forgets forget|heard_about hears_about hear_about
    paid_for pays_for pay_for|noticed notices notice|mentioned mentions mention
    dreamed_of dreams_of dream_of|pointed_at points_at point_at|knew_about knows_about know_about
    described describes describe|wrote_about writes_about write_about|liked likes like
    searched_for searches_for search_for|needed needs need|worried_about worries_about worry_about
    spoke_of speaks_of speak_of|chose chooses choose|laughed_at laughs_at laugh_at
    read_about reads_about read_about|argued_about argues_about argue_about
    drew draws draw|cared_for cares_for care_for|praised praises praise
    complained_about complains_about complain_about|returned_to returns_to return_to
    ignored ignores ignore|admired admires admire|blamed blames blame
    joked_about jokes_about joke_about
    """.strip()
    .replace("\n", "|")
    .split("|")
]

HANDLE = [
    "brought",
    "bought",
    "dropped",
    "carried",
    "took",
    "fixed",
    "broke",
    "moved",
    "lifted",
    "borrowed",
    "sold",
    "washed",
    "stole",
    "hid",
    "painted",
    "repaired",
    "packed",
    "threw",
    "delivered",
    "inspected",
]
ADJECTIVES = [
    "old",
    "new",
    "blue",
    "red",
    "small",
    "broken",
    "heavy",
    "dirty",
    "cheap",
    "empty",
    "green",
    "strange",
    "expensive",
    "wooden",
    "wet",
    "rusty",
    "elegant",
]
NUMBERS = [
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "twenty",
    "thirty",
]
DAYS = ["monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"]
TIMES = [
    t.replace("_", " ")
    for t in [
        "again",
        "yesterday",
        "too",
        "at_once",
        "last_week",
        "before_noon",
        "right_there",
        "after_all",
        "for_a_while",
        "all_day",
        "in_the_end",
        "once_more",
        "every_week",
        "quietly",
        "at_dawn",
        "for_no_reason",
        "in_the_dark",
        "by_accident",
        "without_delay",
        "with_great_care",
    ]
]
LEADS = [
    t.replace("_", " ")
    for t in [
        "yesterday",
        "last_week",
        "in_the_morning",
        "they_say",
        "one_day",
        "late_in_the_day",
        "here_in_the_valley",
        "through_the_winter",
    ]
]
ALWAYS = ["often", "always", "never", "rarely", "still", "sometimes", "usually", "secretly"]

TOWNS = [
    stem + end
    for end, stem in product(("ford", "ton", "by"), ["ash", "oak", "mel", "den", "har", "kel"])
]

# Invented names in families that differ by one sound; pairwise distinct for espeak-ng (a test
# checks). The last ones are rare: many of them occur in the LM text and not in the transcripts.
_FEMALE = ["bo", "da", "fi", "ka", "lo", "mi", "no", "ro", "sa", "ta", "vi", "zo"]
_MALE = ["ba", "do", "fa", "ko", "la", "mo", "na", "ra", "so", "to", "va", "za"]
FEMALE = [on + end for end, on in product(("na", "la", "ra"), _FEMALE)]
MALE = [on + end for end, on in product(("rin", "vin", "lin"), _MALE)]
RARE_FEMALE = [on + end for end, on in product(("neeta", "lissa", "mella"), _FEMALE)]
RARE_MALE = [on + end for end, on in product(("gard", "wick", "stan"), _MALE)]
