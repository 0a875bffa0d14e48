"""English words that tell how something moves or where it is in the picture, and words that shape a noun phrase.

Chosen from captions of video objects; `names` applies them. What no list holds is taken as a harmless noun.
"""

from __future__ import annotations


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _forms(stem: str) -> tuple[str, str]:
    """The -ing and -ed forms of a regular verb; "run+" doubles its last letter."""
    if stem.endswith("+"):
        stem = stem[:-1] + stem[-2]
    elif stem.endswith("e") and not stem.endswith("ee"):
        return stem[:-1] + "ing", stem + "d"
    return stem + "ing", (stem[:-1] + "ied" if stem.endswith("y") and stem[-2] not in "aeo" else stem + "ed")


def _third(stem: str) -> str:
    stem = stem.rstrip("+")
    if stem.endswith(("s", "sh", "ch", "x", "go")):
        return stem + "es"
    return stem[:-1] + "ies" if stem.endswith("y") and stem[-2] not in "aeo" else stem + "s"


_VERBS = """walk run+ jog+ stand sit+ drive ride fly roll slide jump dance cross turn move approach recede come go stop+
    march swim+ crawl stroll wander gallop trot+ follow chase travel enter exit climb hop+ bounce spin+ rotate swing
    drag+ push pull pass glide hover skate wait sprint proceed advance retreat circle""".split()
# Of these only the participles tell a movement: their other forms are names of things, too.
_PARTICIPLES = """leave park rest race head land step+ speed rush sway drift float fall drop+ return kneel crouch lean
    squat+ sail row paddle descend ascend rise accelerate brake reverse lie ski cycle tumble parachute back lead lift
    bike skip+ dribble throw kick steer accompany progress migrate orbit zoom patrol crash tow stay
    pace shift tread wade dive surf snowboard skateboard rollerblade scooter commute cruise steam navigate manoeuvre
    maneuver flee escape emerge disappear raise lower flow splash dig+ wave shake launch depart arrive leap
    wag+ flap+ toss""".split()
FINITE = frozenset(v.rstrip("+") for v in _VERBS) | frozenset(map(_third, _VERBS))
# Verbs that are nouns as well: "a bus stop".
NOUNS_TOO = _words("walk run ride drive jump slide swing stand stop roll turn exit fly dance climb march swim circle")
NOUNS_TOO_PLURAL = frozenset(map(_third, NOUNS_TOO))
PERHAPS_FINITE = frozenset(map(_third, _PARTICIPLES))
PARTICIPLES = frozenset(form for v in (*_VERBS, *_PARTICIPLES) for form in _forms(v)) | _words(
    """seated ridden driven flown thrown lying laying travelling travelled fallen falling unmoving opening closing ran
    drove rode flew slid swam sped"""
) - _words("sited landed raised lowered backed lifted headed leaded crossed circled staged rised standed runned")
# Participles of a clause that says where something is or what is done, not what it looks like.
CLAUSE = _words(
    """seen shown located positioned placed captured depicted pictured visible situated facing appearing found observed
    displayed viewed about shot filmed currently while heading starting beginning continuing trying preparing
    making taking getting doing performing executing looking pointing gazing staring carried being"""
)
# Participles that begin a description of the looks.
LOOKS = _words(
    """wearing holding carrying having featuring containing bearing sporting clutching dressed made painted covered
    decorated labelled labeled marked filled clad equipped adorned using"""
)
RELATIVE = _words("who which whose where when as because whilst then that and/or")
AUXILIARY = _words(
    """is are was were be been being has have had can could will would appears appear seems seem may might"""
)

# First word of a compound noun -> its heads. A participle before one of them names a kind of thing, not a motion.
COMPOUNDS = {
    kind: _words(heads)
    for kind, heads in (
        line.strip().split(": ")
        for line in """\
        walking: stick frame cane pole boot shoe cart trail
        running: shoe shorts board top tights track machine vest suit clothes gear outfit jacket jersey
        jumping: jack castle bean
        standing: lamp desk fan mirror stone light clock
        sliding: door window gate panel
        rolling: pin suitcase cart chair stock
        flying: disc disk saucer fish squirrel fox carpet
        driving: licence license glove seat wheel instructor
        riding: boot hat helmet crop mower jacket glove breeches gear outfit
        turning: table lathe
        swimming: pool trunks cap costume goggles ring suit
        dancing: shoe
        climbing: frame rope wall gear shoe harness plant
        crossing: guard gate sign
        stopping: sign
        marching: band drum
        skating: rink
        racing: car bike suit helmet wheelchair
        parking: meter lot garage sign space ticket bay
        landing: gear pad
        spinning: top wheel
        swinging: door bench
        rotating: fan
        falling: star
        resting: bench
        waiting: room
        towing: hook
        diving: board suit mask helmet
        surfing: board
        skiing: boot goggles suit gear outfit
        cycling: helmet jersey shorts suit clothes gear outfit jacket
        rowing: boat machine
        sailing: boat ship
        pushing: cart
        lifting: belt
        leading: rope
        steering: wheel
        snowboarding: boot
        still: life camera
        motion: sensor detector
        down: jacket coat vest pillow comforter
        up: light
        fast: food""".splitlines()
    )
}
# "a horse riding woman", "a man ice skating"
RIDDEN = _words("ice roller water horse horseback bike bicycle kite snow wind")
RIDING = _words("skating skiing riding surfing boarding")
ORDINALS = _words("first second third fourth fifth")
CROSSINGS = _words("zebra pedestrian railway railroad level border street road")  # "a zebra crossing"

# Things that come in a left and a right one: "the left shoe" is a side of something, not a place in the picture.
PAIRED = _words(
    """shoe boot sandal slipper sneaker sock glove mitten hand arm leg foot knee elbow shoulder wrist ankle eye ear
    wing wheel tyre tire headlight taillight door mirror pedal ski paw hoof sleeve hind fore front rear earring
    thumb thigh"""
)
SIDES = _words("left right")
# Adverbs and adjectives of motion, rest and direction; also adverbs of direction, hyphenated ones by their ending.
MOTION = _words(
    """upward upwards downward downwards forward forwards backward backwards ahead closer nearer farther further away
    furthest farthest nearest closest stationary static still motionless immobile idle motion up down fast slow
    quick speedy rapid swift leftward leftwards rightward rightwards leftmost rightmost sideways nearby oncoming
    incoming outgoing outbound inbound"""
)
TELLING_ENDINGS = _words(
    """facing pointing most bound moving going turning walking running flying driving travelling traveling"""
)
UNITS = _words("metre metres meter meters m cm km feet foot ft yard yards inch inches mile miles")
DIRECTIONAL = _words(
    """to toward towards from into onto across along through past off out away around between amongst amid until via
    upon during after before throughout"""
)
POSITION = _words(
    "in on at near behind beside besides by under underneath beneath above below over next inside outside among within "
    "against opposite beyond for like"
)
ATTRIBUTE = _words("with without")
# In a phrase of `POSITION`: places in the picture, and ways to move or rest.
REGION = _words(
    """left right middle center centre foreground background distance corner side edge front back top bottom frame
    image picture screen video scene camera viewer view motion rest direction flight air midair mid-air speed
    hurry place circle circles way foot move pursuit half clip shot first second third last end start path walk
    run ride drive jog stroll march turn jump dance swim"""
)
# Where one goes: a phrase "down the street" after a verb is skipped with it.
ON_THE_WAY = REGION | _words(
    """street road sidewalk pavement lane track corridor hallway room floor ground each other us"""
)
DETERMINERS = _words(
    """the a an some his her their its my our your this these those another several many multiple various both all each
    every any"""
)
SINGULAR = _words("a an one this each another")
SOMETHING = {"someone": "person", "somebody": "person", "something": "object"}
NOTHING = _words(
    """none nothing unknown unclear unnamed unidentified n/a null nan undefined unsure sorry no not cannot he she it
    they him them we you everyone everybody"""
)
COLOURS = _words(
    """red blue green yellow white black orange purple pink brown grey gray gold silver beige tan turquoise violet navy
    maroon teal cyan magenta cream"""
)
ADJECTIVES = COLOURS | _words(
    """dark light bright pale deep vivid colorful colourful small large big little
    tiny huge tall short long wide narrow thick thin fat slim giant mini great medium high low old young new
    middle-aged adult-sized antique modern vintage used wooden golden woollen woolen plastic steel iron
    rubber leather cotton denim ceramic concrete cardboard furry fluffy shiny dirty dusty rusty muddy glossy
    curly hairy spotty empty heavy sunny happy busy noisy tiny silvery smiling laughing round square rectangular
    oval flat straight soft hard wet dry open closed bare bald single double other same different
    two three four five six seven eight nine ten first second third fourth fifth more few
    taller shorter bigger smaller larger younger older tallest biggest smallest largest electric plain simple
    pretty cute lovely beautiful partially very mostly parked striped checkered chequered spotted patterned
    plaid transparent clear matte lone only entire whole own"""
)
ADJECTIVE_ENDINGS = (
    "ddish",
    "nish",
    "wish",
    "uish",
    "kish",
    "tish",
    "ful",
    "less",
    "ous",
    "ly",
    "'s",
    "’s",
    "-colored",
    "-coloured",
)
NOT_ADJECTIVES = _words("family butterfly dragonfly fly belly jelly dolly bully lily assembly octopus")
NOUNS_IN_ED = _words("bed shed sled moped breed seed weed reed steed thoroughbred feed speed quadruped biped")
PLURALS = _words(
    """people men women children police cattle sheep geese feet teeth mice oxen folk pedestrians others fish deer"""
)
SINGULARS_IN_S = _words("bus dress glass grass gas mattress boss lens tennis hostess waitress actress compass cross")
NOUNS_IN_ING = _words(
    """building painting ceiling string king ring thing clothing wing swing railing awning pudding dumpling earring
    drawing wedding duckling sibling being sling spring icing bedding lighting wiring scaffolding covering
    crossing"""
)
