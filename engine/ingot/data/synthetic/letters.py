"""`letters`: what a customer writes -> the topics in it, up to three of them or none. No phrase stands in two splits."""

from collections.abc import Iterator
from random import Random
from typing import Any

SIZES = {"train": 2400, "validation": 200, "test": 400}
# Topic -> phrases that tell it.
PHRASES: dict[str, tuple[str, ...]] = {
    "delivery": (
        "The parcel has not arrived yet.", "My order is five days late.", "The courier never rang the bell.",
        "Tracking has shown no movement since Monday.", "When will my order be delivered?", "Shipping took far too long.",
        "The driver left the box at the wrong house.", "I have been waiting for the package for two weeks.",
        "The shipment is stuck in a depot.", "Where is the postman with my things?",
    ),
    "damage": (
        "The screen was cracked when I opened the box.", "One leg of the chair is broken.", "The glass came in pieces.",
        "There is a deep scratch on the lid.", "The handle fell off on the first day.", "It was dented on arrival.",
        "The bottle had leaked over everything.", "The zip is torn.", "The plate arrived shattered.",
        "Its frame is bent out of shape.",
    ),
    "refund": (
        "I would like my money back.", "Please refund the full amount.", "How do I return it for a refund?",
        "I am sending it back and expect to be repaid.", "You promised a refund last week.", "Please take the item back.",
        "I want to withdraw from the purchase.", "When is the money returned to my card?",
        "I ask you to reimburse me.", "Kindly pay back what I spent.",
    ),
    "billing": (
        "I was charged twice for one order.", "The invoice shows the wrong price.", "My card was billed before I paid.",
        "The discount is missing on the bill.", "There is a fee that I never agreed to.", "The tax on the invoice is wrong.",
        "You took the amount from the wrong account.", "The receipt lists something I did not buy.",
        "My statement has two payments for it.", "The sum you debited is too high.",
    ),
    "account": (
        "I cannot log in any more.", "The password reset mail never comes.", "Please change my email address.",
        "My account was locked without a reason.", "How do I delete my profile?", "The app keeps signing me out.",
        "I forgot which user name I have.", "The code for the login does not work.",
        "Your site rejects my password.", "I need a new sign-in name.",
    ),
    "staff": (
        "Your colleague on the phone was very kind.", "The man at the desk was rude to me.", "Nobody answered my call.",
        "The support team helped me at once.", "I was on hold for an hour.", "The lady in the shop knew everything.",
        "The agent hung up on me.", "Your assistant explained it with patience.",
        "The woman at the till ignored us.", "Your helpline is always engaged.",
    ),
}  # fmt: skip
VALIDATION, TEST = 2, 2  # phrases of each topic that only these splits have, the last ones in test
OPENINGS = (
    "Hello.",
    "Good morning.",
    "Dear team,",
    "Hi there,",
    "To whom it may concern:",
    "Good evening.",
    "Hello again.",
)
FILLERS = (
    "I bought it in spring.", "It was a gift for my sister.", "I have been a customer for years.", "We live in the north.",
    "I saw you at the fair.", "The order had three items.", "I write on behalf of my father.", "It is for our kitchen.",
)  # fmt: skip
CLOSINGS = ("Thank you.", "Kind regards.", "I look forward to your answer.", "Best wishes.", "Please write soon.")
COUNTS = (0, 1, 1, 1, 2, 2, 2, 3)  # topics of a letter


def phrases_of(topic: str, split: str) -> tuple[str, ...]:
    """The phrases that tell `topic` in `split`."""
    every = PHRASES[topic]
    if split == "test":
        return every[-TEST:]
    return every[-TEST - VALIDATION : -TEST] if split == "validation" else every[: -TEST - VALIDATION]


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Rows of `split`: `text`, `labels`. No letter twice."""
    rng = Random(f"letters {split} 1")
    seen: set[str] = set()
    while len(seen) < SIZES[split]:
        topics = sorted(rng.sample(list(PHRASES), rng.choice(COUNTS)))
        told = [rng.choice(phrases_of(topic, split)) for topic in topics]
        told += rng.sample(FILLERS, rng.randint(1, 2) if topics else 3)
        rng.shuffle(told)
        text = " ".join([rng.choice(OPENINGS), *told, rng.choice(CLOSINGS)])
        if text not in seen:
            seen.add(text)
            yield {"text": text, "labels": topics}
