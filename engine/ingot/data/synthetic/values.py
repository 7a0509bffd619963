"""Things that sentences are about: each drawn as (how people write it, what a record holds).

A pattern is a sentence with slots, `{money}`, and choices, `[send|pay]`. `choose` settles the choices, `fill` the slots.
"""

import re
from random import Random

FIRST_NAMES = (
    "Anna Paul Maria Peter Laura James Sofia Daniel Emma Lucas Nina Oscar Clara Felix Julia Martin Elena Simon Alice Victor "
    "Helen Robert Diana Thomas Irene George Sarah Henry Olga Frank Rosa Adam Nora Leo Eva Max Ida Hugo Vera Karl Amira Omar "
    "Leila Yusuf Fatima Hassan Priya Arjun Meera Ravi Sunita Kiran Mei Chen Lin Wei Yuki Kenji Hana Akira Minh Linh Jin Soo "
    "Ingrid Lars Astrid Erik Freya Sven Bruno Carla Diego Lucia Mateo Pablo Ines Rafael Beatriz Tiago Chloe Louis Amelie "
    "Pierre Giulia Marco Paola Luigi Anton Boris Katya Ivan Zofia Jan Kasia Marek Petra Milan Grace David Ruth Samuel Esther "
    "Joseph Abena Kofi Amara Chidi Zola Thabo"
).split()
LAST_NAMES = (
    "Meyer Brown Novak Garcia Smith Rossi Tanaka Patel Müller Jensen Silva Kowalski Dubois Ivanov Nguyen Kim Haddad Okafor Berg "
    "Costa Weber Martin Lopez Sato Khan Larsen Moreau Bianchi Petrov Wagner Clark Evans Hughes Turner Walker Baker Cooper Fisher "
    "Hunter Mason Parker Taylor Ward Young Hill Stone Woods Rivera Torres Vargas Mendes Santos Pereira Almeida Fontaine Laurent "
    "Bernard Girard Schulz Fischer Becker Hoffmann Koch Richter Wolf Klein Braun Lange Vogel Keller Huber Steiner Gruber Hansen "
    "Nilsson Olsen Lind Holm Dahl Virtanen Niemi Horvath Nagy Kovacs Popescu Ionescu Dimitrov Papadakis Yilmaz Demir Aydin Cohen "
    "Levi Mizrahi Rahman Ahmed Ali Hussain Singh Gupta Sharma Mehta Reddy Wang Zhang Liu Yang Suzuki Mori Ito Park Choi Tran Pham "
    "Mensah Diallo Traore Banda Moyo Nkosi"
).split()
CITIES = (
    "Berlin Paris Madrid Rome Vienna Prague Oslo Lisbon Dublin Athens Warsaw Zurich Geneva Milan Munich Hamburg Porto Seville "
    "Naples Lyon Brussels Amsterdam Stockholm Helsinki Copenhagen Budapest Bucharest Sofia London Glasgow Boston Chicago Denver "
    "Seattle Dallas Toronto Montreal Lima Bogota Santiago Havana Cairo Tunis Lagos Nairobi Accra Dakar Delhi Mumbai Jakarta Manila "
    "Bangkok Hanoi Tokyo Osaka Kyoto Seoul Beijing Shanghai Sydney Perth Auckland Dubai Doha Ankara Istanbul Riga Tallinn Vilnius"
).split()
COMPANY_HEADS = (
    "Harbor North River Green Silver Maple Sunrise Old Town Summit Blue Door Cedar Bright Stone Bridge Garden West Gate Royal "
    "Lake Orchard Falcon Copper Meadow Crystal Union Atlas Delta Nova"
).split()
COMPANY_TAILS = "Bakery Books Motors Foods Textiles Energy Travel Studio Tools Pharma Logistics Hotels Print Labs Media Farms".split()
VERBS = "call email visit thank pay ask help meet invite congratulate".split()
CHORES = (
    "water the plants|renew the passport|buy bread|wash the car|clean the kitchen|feed the cat|order new chairs|sign the contract|"
    "check the printer|update the website|return the library books|pick up the laundry|fix the bicycle|paint the fence|"
    "pack the suitcase|cancel the magazine|test the alarm|read the report|close the windows|back up the laptop|buy a gift|"
    "charge the phone|bring the keys|change the filter|count the stock|print the tickets|mow the lawn|take the medicine|"
    "cut the hedge|finish the slides|collect the keys|empty the bins"
).split("|")
OBJECTS = "the bank|the dentist|the landlord|the doctor|the school|the office|the lawyer|the plumber|the neighbours|the team".split(
    "|"
)
MONTHS = "January February March April May June July August September October November December".split()
CURRENCIES = {"EUR": ("euros", "€"), "USD": ("dollars", "$"), "GBP": ("pounds", "£"), "CHF": ("francs", "CHF "), "JPY": ("yen", "¥"),
              "INR": ("rupees", "₹")}  # fmt: skip
CODES = tuple(CURRENCIES)
SYLLABLES = "ba ke lo mi nu ra se to vi wa zo da fe gi ho ju ka le mo ni pa ri su ta ve yo".split()

Drawn = tuple[str, dict[str, object]]  # text, and what a record of it holds: kind of value -> value
_SLOT = re.compile(r"\{(\w+)\}")
_CHOICE = re.compile(r"\[([^\[\]]*)\]")


def invented(rng: Random, syllables: int) -> str:
    """A capitalised word that is in no dictionary: copying it needs reading it."""
    return "".join(rng.choice(SYLLABLES) for _ in range(syllables)).capitalize()


def person(rng: Random, odd: float = 0.0) -> str:
    """A full name; with probability `odd` an invented one."""
    if rng.random() < odd:
        return f"{invented(rng, rng.randint(2, 3))} {invented(rng, rng.randint(2, 3))}"
    return f"{rng.choice(FIRST_NAMES)} {rng.choice(LAST_NAMES)}"


def company(rng: Random) -> str:
    """A two-word company name."""
    return f"{rng.choice(COMPANY_HEADS)} {rng.choice(COMPANY_TAILS)}"


def task(rng: Random) -> str:
    """Something to do, as a verb phrase."""
    if rng.random() < 0.5:
        return rng.choice(CHORES)
    return f"{rng.choice(VERBS)} {rng.choice(OBJECTS) if rng.random() < 0.6 else rng.choice(FIRST_NAMES)}"


def order(rng: Random) -> str:
    """An order number: a letter and four digits."""
    return rng.choice("ABCDEFGHKLMNPRSTVX") + "".join(rng.choice("0123456789") for _ in range(4))


def date(rng: Random) -> tuple[str, str]:
    """(one of four ways to write a day, YYYY-MM-DD)."""
    year, month, day = rng.randint(2024, 2031), rng.randint(1, 12), rng.randint(1, 28)
    name, iso = MONTHS[month - 1], f"{year}-{month:02d}-{day:02d}"
    return rng.choice((f"{day} {name} {year}", f"{day} {name} {year}", f"{name} {day}, {year}", iso)), iso


def clock(rng: Random) -> tuple[str, str]:
    """(a way to write a time of day, HH:MM)."""
    hour, minute = rng.randint(7, 20), rng.choice((0, 0, 15, 30, 45))
    iso = f"{hour:02d}:{minute:02d}"
    if minute == 0 and rng.random() < 0.6:
        return (f"{hour} am" if hour < 12 else f"{(hour - 1) % 12 + 1} pm"), iso
    return iso, iso


def amount(rng: Random) -> tuple[str, float | int]:
    """(a number as people write it, its value): whole, in hundredths, or with a comma at the thousands."""
    kind = rng.random()
    if kind < 0.45:
        value: float | int = rng.choice((rng.randint(2, 99), rng.randint(100, 999), 10 * rng.randint(1, 99)))
        return str(value), value
    if kind < 0.85:
        whole, cents = rng.randint(1, 999), rng.randint(1, 99)
        return f"{whole}.{cents:02d}", float(f"{whole}.{cents:02d}")
    value = rng.randint(1000, 9999)
    return f"{value:,}" if rng.random() < 0.5 else str(value), value


def money(rng: Random) -> tuple[str, float | int, str]:
    """(a sum as people write it, its value, its currency's code)."""
    code = rng.choice(CODES)
    text, value = amount(rng)
    word, sign = CURRENCIES[code]
    return rng.choice((f"{text} {word}", f"{text} {word}", f"{text} {code}", f"{sign}{text}")), value, code


def choose(rng: Random, pattern: str) -> str:
    """Replace every `[a|b]` by one of its parts."""
    return _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), pattern)


def fill(rng: Random, pattern: str, odd: float = 0.0) -> Drawn:
    """Replace every slot by a value; `odd` as in `person`. Slots of one kind in one pattern get different values."""
    values: dict[str, object] = {}

    def one(found: re.Match[str]) -> str:
        slot = found[1]
        if slot == "money":
            text, values["amount"], values["currency"] = money(rng)
        elif slot == "amount":
            text, values["amount"] = amount(rng)
        elif slot == "date":
            text, values["date"] = date(rng)
        elif slot == "time":
            text, values["time"] = clock(rng)
        elif slot in ("currency", "target"):
            code = rng.choice([c for c in CODES if c not in (values.get("currency"), values.get("target"))])
            text, values[slot] = rng.choice((CURRENCIES[code][0], CURRENCIES[code][0], code)), code
        else:
            text = str(_plain(rng, slot, values, odd))
            values[slot] = text
        return text

    text = _SLOT.sub(one, pattern)
    return text[:1].upper() + text[1:], values


def _plain(rng: Random, slot: str, values: dict[str, object], odd: float) -> str:
    if slot in ("person", "other"):
        return person(rng, odd)
    if slot in ("city", "origin", "destination"):
        if rng.random() < odd:
            return invented(rng, 3)
        return rng.choice([c for c in CITIES if c not in values.values()])
    return {"company": company, "task": task, "order": order, "thing": _thing}[slot](rng)


def _thing(rng: Random) -> str:
    return rng.choice("cats|the sea|winter|old trains|love|a brave dog|the moon|autumn leaves|coffee|mountains|a lost key|summer rain|"
                      "bees|the stars|football|a small village|tigers|bread|the forest|my garden".split("|"))  # fmt: skip
