"""List the nouns of the task; a rule gives their plurals."""

_LIST = """
actor album angle animal apple apron arrow artist atom author award baby badge bag baker ball banana
band bank barrel basket battery beach bean bear bed bell belt bench berry bike bird blanket board
boat body book boot bottle bowl box boy branch bridge brother brush bucket building bus bush button
cable cake camel camera camp candle captain car card carpet carrot castle cat cave chain chair
cherry church circle city class clock cloud coat coin color comet computer cookie corner cottage
country cousin cow crowd crown cup curtain daughter day desk diary dish doctor dog doll donkey door
dragon dream dress driver drum duck eagle ear egg elephant emperor engine envelope eye factory
family farm farmer fence field finger flag flower fly forest fork fox friend frog fruit game garden
gate ghost gift girl glass glove goal goat grape guest guitar hammer hand hat hill hobby holiday
horse hospital hotel house idea insect island jacket jar jewel joke judge key king kitchen kite
ladder lady lake lamp lawyer leg lemon lesson letter library lion lip list machine magnet map market
mask match meal message mirror monkey month moon mountain movie museum nail name neck needle nest
network nose note number nurse ocean office onion orange oven owl painter palace parent park party
path peach pen pencil phone picture pillow pilot pirate planet plant plate pocket poem pony port
potato prince prize puppy queen question rabbit radio ring river road robot rocket roof room root
rope rose sailor sandwich school secret ship shirt shoe shop sister sky snake soldier song spider
spoon stamp star station stone story street student table task teacher tent ticket tiger tomato tool
tower town toy train tree truck tunnel turtle uncle valley village visitor wall watch wheel window
wing winter witch word worker writer yard zebra
"""
NOUNS: tuple[str, ...] = tuple(_LIST.split())


def plural(noun: str) -> str:
    """Return the plural of a listed noun; the rule covers this list, not English."""
    if noun in ("potato", "tomato"):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun + "s"
