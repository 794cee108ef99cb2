"""A small data set that needs no download: everyday requests by intent, and tales told by distinct speakers.

Sentences come from templates with slots, so that a quickstart learns something real in a minute: requests carry
polite openings, words of other intents and typing errors, and a quarter of the phrasings are kept from training.
The same arguments give the same sentences on every platform: all draws come from `random.Random`.
"""

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

from lora.errors import DataError
from tasks.files import Table


def _lists(text: str) -> dict[str, list[str]]:
    """Read lines of `name: item | item`; an indented line goes on with the one before."""
    joined = re.sub(r"\n +", " ", text.strip())
    pairs = (line.split(": ", 1) for line in joined.splitlines())
    return {name: items.split(" | ") for name, items in pairs}


SLOTS = _lists("""
time: 6 am | half past seven | 8:15 | noon | quarter to nine | ten tonight | 5 30 | midnight | four o'clock | eleven
day: tomorrow | on monday | on friday | this weekend | next tuesday | on sunday | later today | on the 14th
span: ten minutes | an hour | 90 seconds | half an hour | three minutes | 45 minutes | two hours | a quarter of an
    hour
person: anna | my brother | mr okafor | grandma | the plumber | lena | my boss | dad | priya | the dentist | tom |
    aunt rosa
place: the airport | leeds | the harbour | the office | the coast | oslo | the stadium | school | lisbon | the old
    town
dish: pad thai | two pizzas | sushi | a veggie burger | ramen | tacos | a curry | dumplings | falafel | fish and chips
music: some jazz | miles davis | my running playlist | the new album by adele | lullabies | abba | techno | bach
chore: water the plants | take the bins out | renew my passport | buy stamps | feed the cat | pay the gardener
amount: 50 euros | 200 dollars | thirty pounds | 1,000 kroner | the rent | twelve bucks | 80 francs | my share
account: savings | checking | joint | holiday | business | student
party: two | four | six of us | eight people | a couple | three adults and a child
news: i am running late | dinner is ready | the meeting moved | happy birthday | i found the keys | we landed
""")

INTENTS = _lists("""
set an alarm: wake me up at {time} | i have to be out of bed by {time} {day} | alarm for {time} {day} | make sure i am
    awake at {time} | ring at {time} so i do not oversleep | get me up {day} at {time} | i need an alarm {day} | buzz
    me out of sleep at {time} | do not let me sleep past {time} | start my morning at {time} | i want to rise at
    {time} {day} | rouse me {day} around {time}
start a timer: count down {span} | timer for {span} | tell me when {span} are over | give me {span} on the clock |
    start timing {span} now | let me know once {span} have passed | set a countdown of {span} | {span} for the eggs
    starting now | beep after {span} | ping me in {span} | the pasta takes {span} so keep track | measure {span} from
    now
add a reminder: remind me to {chore} | do not let me forget to {chore} {day} | note that i have to {chore} | i must
    {chore} {day} so tell me then | put {chore} on my list | nudge me {day} to {chore} | reminder to {chore} at {time}
    | bring up {day} that i should {chore} | make a note to {chore} | i keep forgetting to {chore} | jog my memory
    {day} to {chore} | {chore} has to go on the to do list
check the weather: will it rain {day} | how warm is it in {place} | do i need an umbrella {day} | what is the forecast
    for {place} | is it going to snow in {place} | how cold does it get {day} | sunny or cloudy {day} | temperature at
    {time} in {place} | should i bring a coat to {place} | is a storm coming to {place} | what is it like outside in
    {place} | can i wear shorts {day}
check the traffic: how long is the drive to {place} | are there jams on the way to {place} | is the road to {place}
    clear | any accidents near {place} | how busy are the streets around {place} | will i be stuck on the motorway
    {day} | how is the commute to {place} | fastest route to {place} at {time} | is the bridge to {place} still closed
    | when should i leave to reach {place} by {time} | am i going to hit rush hour near {place} | are cars moving
    towards {place}
play music: play {music} | put on {music} | i want to hear {music} | shuffle {music} | start {music} in the kitchen |
    let us listen to {music} | turn up {music} | queue {music} | give me {music} for {span} | i feel like {music} |
    fill the room with {music} | could use {music} right now
send a message: text {person} that {news} | tell {person} {news} | write to {person} saying {news} | let {person} know
    {news} | send {person} a note that {news} | message {person} {news} | drop {person} a line that {news} | reply to
    {person} that {news} | email {person} {news} | inform {person} that {news} | pass on to {person} that {news} |
    {person} should hear that {news}
make a phone call: call {person} | dial {person} | get {person} on the line | ring {person} {day} | phone {person} at
    {time} | i need to speak with {person} | put me through to {person} | connect me with {person} | video chat with
    {person} | give {person} a ring | i want to talk to {person} now | try the number of {person} again
transfer money: send {amount} to {person} | move {amount} to my {account} account | wire {person} {amount} | pay
    {person} back {amount} | put {amount} into {account} | give {person} {amount} from {account} | transfer {amount}
    {day} | i owe {person} {amount} so settle it | shift {amount} from {account} to {person} | make a payment of
    {amount} to {person} | {person} gets {amount} from me | let {person} have {amount}
check the account balance: how much is in my {account} account | what is my {account} balance | can i afford {amount}
    | do i have {amount} left | how much money do i have | show what is on {account} | am i overdrawn | is there more
    than {amount} in {account} | what remains on my {account} account | did my salary arrive in {account} | how rich
    am i {day} | are my {account} funds low
order food: order {dish} | get {dish} delivered by {time} | i am hungry for {dish} | have {dish} brought to {place} |
    bring me {dish} | takeaway {dish} please | i would like {dish} at home | buy {dish} for {party} | deliver {dish}
    at {time} | find someone who delivers {dish} | we want {dish} on the sofa | send {dish} to {place}
book a table: reserve a table for {party} | book dinner for {party} {day} | we want to eat out {day} | get us seats at
    the {dish} place | a reservation at {time} for {party} | find a restaurant near {place} for {party} | is there a
    free table {day} | book us in for lunch at {time} | somewhere to dine with {person} {day} | hold a spot for
    {party} at {time} | i am taking {person} out for {dish} {day} | squeeze {party} in at the bistro
""")
"""Phrasings by intent; the last quarter of each is kept from training."""

OPENINGS = _lists("""
openings: please | hey | could you | hi there | ok so | would you mind | quickly | listen | um | if you can | be a
    dear and | now
""")["openings"]

ASIDES = _lists("""
asides: never mind the alarm | before i call {person} | while the music plays | after the rain | forget the timer |
    the pizza can wait | i already sent the message | not the weather this time | once the money is in | as {person}
    texted me | since traffic is bad | on my way to the restaurant | i got the reminder | because my balance is low |
    i had {dish} already | i am at {place}
""")["asides"]
"""Clauses in the words of other intents."""

NOUNS = _lists("""
sailor: tide | mast | anchor | gull | harbour | squall | rudder | reef
baker: dough | oven | crust | flour | loaf | yeast | tray | bun
astronomer: comet | lens | nebula | orbit | eclipse | moon | meteor | dome
gardener: rose | hedge | seedling | compost | beetle | trellis | bulb | lawn
knight: sword | castle | banner | dragon | squire | helmet | joust | oath
clockmaker: spring | gear | pendulum | dial | hinge | chime | cog | hand
detective: clue | alibi | footprint | motive | witness | letter | stain | key
miner: shaft | lantern | seam | pickaxe | tunnel | ore | wagon | canary
""")
VERBS = _lists("""
sailor: hauled | moored | steered | sighted | rowed | cursed
baker: kneaded | dusted | glazed | tasted | proved | cooled
astronomer: charted | measured | sketched | tracked | awaited | named
gardener: pruned | planted | weeded | watered | raked | tied
knight: defended | besieged | praised | drew | challenged | polished
clockmaker: wound | oiled | filed | set | repaired | mended
detective: examined | doubted | followed | questioned | overlooked | solved
miner: dug | hammered | lowered | carted | lit | blasted
""")
TONES = _lists("""
sailor: salty | restless | briny | foggy | windward
baker: warm | golden | sticky | crumbly | buttery
astronomer: distant | silver | faint | spinning | ancient
gardener: muddy | blooming | thorny | mossy | shady
knight: noble | dented | gallant | royal | fearsome
clockmaker: tiny | precise | brass | ticking | rusty
detective: shadowy | curious | missing | hidden | suspicious
miner: dark | dusty | deep | glittering | damp
""")
"""Words by speaker; no two speakers share one."""

PLOTS = _lists("""
plots: the {tone} {noun} was mine, for i {verb} it at dawn. | all night we {verb} the {noun}, {tone} as ever. | no
    {noun} is as {tone} as the one my father {verb}. | i {verb} a {noun} and then another {noun}. | give me a {tone}
    {noun} and i am content. | they say the {tone} {noun} is gone, yet i {verb} it. | first the {noun}, then the
    {noun}, and both were {tone}. | who {verb} my {tone} {noun}?
""")["plots"]

USERS = 100


def builtin_tables(
    kind: Literal["classification", "causal-lm"],
    *,
    seed: int,
    train: int = 2400,
    validation: int = 300,
    test: int = 600,
) -> dict[str, Table]:
    """Make the splits: columns text, label, user (classification) or speaker, text (causal LM).

    Labels and speakers are balanced to within one row. No text occurs twice, within a split or between splits.
    Raises DataError for sizes beyond what the templates give.
    """
    sizes = {"train": train, "validation": validation, "test": test}
    make = _requests if kind == "classification" else _tales
    used: set[str] = set()
    return {
        role: Table(f"builtin ({role})", make(size, random.Random(f"{seed}:{kind}:{role}"), used, role == "train"))
        for role, size in sizes.items()
    }


def _requests(size: int, rng: random.Random, used: set[str], training: bool) -> dict[str, list[object]]:
    labels = _balanced(tuple(INTENTS), size, rng)
    users = [rng.randrange(USERS) for _ in labels]
    texts = [_new(partial(_request, labels[i], users[i], rng, training), used) for i in range(size)]
    return {"text": [*texts], "label": [*labels], "user": [f"user-{user:02d}" for user in users]}


def _tales(size: int, rng: random.Random, used: set[str], training: bool) -> dict[str, list[object]]:
    speakers = _balanced(tuple(NOUNS), size, rng)
    texts = [_new(partial(_tale, speaker, rng), used) for speaker in speakers]
    return {"speaker": [*speakers], "text": [*texts]}


def _balanced(names: Sequence[str], size: int, rng: random.Random) -> list[str]:
    column = [names[i % len(names)] for i in range(size)]
    rng.shuffle(column)
    return column


def _new(make: Callable[[], str], used: set[str]) -> str:
    for _ in range(1000):
        text = make()
        if text not in used:
            used.add(text)
            return text
    raise DataError(f"builtin: the templates give no more than about {len(used)} different texts; ask for fewer")


def _request(intent: str, user: int, rng: random.Random, training: bool) -> str:
    phrasings = INTENTS[intent]
    core = rng.choice(phrasings[: len(phrasings) * 3 // 4] if training else phrasings)
    parts = [core]
    if rng.random() < 0.6:
        parts.insert(rng.randrange(2), rng.choice(ASIDES))
    if rng.random() < 0.5:
        # Everybody has two openings of their own, so that users differ in style.
        parts.insert(0, OPENINGS[(user + rng.choice((0, 5))) % len(OPENINGS)])
    text = _filled(" ".join(parts), SLOTS, rng)
    return _mistyped(text, rng) if rng.random() < 0.3 else text


def _tale(speaker: str, rng: random.Random) -> str:
    words = {"noun": NOUNS[speaker], "verb": VERBS[speaker], "tone": TONES[speaker]}
    return " ".join(_filled(rng.choice(PLOTS), words, rng) for _ in range(rng.randint(2, 4)))


def _filled(template: str, words: Mapping[str, Sequence[str]], rng: random.Random) -> str:
    return re.sub(r"\{(\w+)\}", lambda slot: rng.choice(words[slot[1]]), template)


def _mistyped(text: str, rng: random.Random) -> str:
    """Swap, drop or double one or two letters inside words."""
    letters = list(text)
    for _ in range(rng.randint(1, 2)):
        inner = [i for i in range(1, len(letters) - 1) if letters[i - 1].isalpha() and letters[i].isalpha()]
        at = rng.choice(inner)
        slip = rng.randrange(3)
        if slip == 0:
            letters[at - 1], letters[at] = letters[at], letters[at - 1]
        elif slip == 1:
            del letters[at]
        else:
            letters.insert(at, letters[at])
    return "".join(letters)
