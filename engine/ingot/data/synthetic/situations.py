"""What people in `nano-corpus` want and do: requests, statements, and words that mean the same.

`[a|b]` is a choice, `{slot}` a value (see values.py). Nothing here knows the tools of `tool-calls`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Situation:
    """One kind of everyday business. `fields`: what a record calls a value -> the kind of value."""

    topic: str
    fields: dict[str, str]
    orders: tuple[str, ...]
    """What stands after "please" or "I want to": begins with a verb in its base form."""
    sentences: tuple[str, ...]
    """Whole requests."""
    weight: int = 1
    """How often it is met, beside the others."""


SITUATIONS: tuple[Situation, ...] = (
    Situation(
        "payment",
        {"payee": "person", "sum": "amount", "money": "currency"},
        (
            "[transfer|send|wire|remit|forward|move|pay|give|hand] {money} to {person}",
            "[transfer|send|wire|remit|forward|pay|give|lend] {person} {money}",
            "[move|forward|wire|remit|transfer|send] {money} [over to|into the account of|to our friend|across to] {person}",
            "let {person} [have|get|receive] {money}",
            "[settle|pay] what I owe to {person}, {money}",
            "[make|do|start] a [transfer|payment|wire|remittance] of {money} to {person}",
            "[make|do|start] a [transfer|payment|wire] to {person}, {money}",
        ),
        (
            "I [owe|still owe] {money} to {person}[.|, settle it.|, so pay it.]",
            "I owe {person} {money}[.| and want to settle it.]",
            "{person} [should|must|has to|shall] [get|have|receive] {money}[| from my account| from us].",
            "{person} is [still owed|owed|waiting for|missing] {money}[.|, send it.|, remit it.|, wire it.]",
            "the [payment|transfer|remittance|wire] [for|to] {person} is {money}.",
            "[wiring|sending|remitting|forwarding|moving|paying] {money} to {person} is the job.",
        ),
    ),
    Situation(
        "bill",
        {"client": "company", "sum": "amount", "money": "currency", "deadline": "date"},
        (
            "[bill|charge|invoice] {company} {money}[ with payment due on| by| until| to be paid by|, deadline|, payable by|, due] {date}",
            "[bill|charge|invoice] {company} for {money}[ with payment due on| by| until|, deadline|, due] {date}",
            "[issue|draw up|write|make|prepare|send] [a bill|an invoice] [of|over|for] {money} [to|for] {company}[, due| due on| that falls due on| "
            "payable until|, deadline| no later than] {date}",
            "[issue|draw up|write|make|prepare|send] [a bill|an invoice] [to|for] {company}[:| of| over] {money}, "
            "[due|payable by|payable no later than|to be paid by|deadline|due date] {date}",
        ),
        (
            "our [client|customer] {company} [must pay|owes us|has to pay|ought to pay|should pay|ought to be charged|is to be billed] {money} "
            "[by|until|no later than|before] {date}.",
            "{company} [ought to be|must be|should be|has to be|will be] [billed|invoiced|charged] {money} [by|until|, due] {date}.",
            "the [bill|invoice] for {company} is {money} and [due on|falls due on|has the deadline] {date}.",
            "we did work for {company}, {money}, [deadline|due|payable until] {date}, so [bill|charge|invoice] them.",
        ),
        weight=2,
    ),
    Situation(
        "appointment",
        {"guest": "person", "day": "date", "hour": "time"},
        (
            "[schedule|arrange|organise|plan|book|fix|set up] [a meeting|an appointment|a conversation|a call|a chat|a talk|a get-together|a visit] with "
            "{person} [on|for] {date}[ at|,] {time}",
            "[schedule|arrange|organise|plan|book|fix|set up] [a meeting|an appointment|a conversation|a call|a chat|a get-together] with {person} "
            "[at|for] {time} on {date}",
            "[schedule|arrange|organise|fix] [a conversation|a meeting|a talk|a chat] between [me|us] and {person} [on|for] {date} at {time}",
            "[reserve|block|hold|keep] {time} on {date} [for|so that I can see|to meet|to talk with] {person}",
            "[reserve|block|hold|keep] [my calendar|my diary|an hour|a room] [on|for] {date} at {time} [for|to see|because of] {person}",
            "[meet|see|visit] {person} on {date} at {time}",
        ),
        (
            "{person} [is visiting me|comes to see me|will come|wants to meet] on {date} at {time}.",
            "on {date} at {time} [there is a talk|I have an appointment|I see the guest|a chat is planned] with {person}.",
            "my [appointment|get-together|meeting|conversation] with {person} is [on|fixed for] {date} at {time}.",
            "at {time} on {date} {person} [is here|visits|comes][.|, block my calendar.|, organise it.]",
        ),
        weight=2,
    ),
    Situation(
        "note",
        {"work": "task", "day": "date"},
        (
            "[nudge|remind|alert|warn|ping|tell] me to {task} on {date}",
            "[nudge|remind|alert|warn|ping|tell] me on {date} [that I have to|that I ought to|that I must|so that I] {task}",
            "[nudge|remind|alert|warn|ping] me when [it is {date}|{date} comes], I [have to|must|should|ought to] {task}",
            "[make|write|keep|take] a [note|reminder|memo] [to|that I have to|that I must|that I should] {task} [on|for] {date}",
            "[make|write|set|keep] [a note|an alert|a warning|a reminder|a memo] [for|on] {date}[:| to] {task}",
            "[not let me forget|make sure that I remember|help me not to forget] to {task} on {date}",
        ),
        (
            "it would be [bad|a pity|terrible] to [forget|miss it]: {task} on {date}.",
            "I [must|may|should] not forget to {task} on {date}[.|, so nudge me.|, so alert me.|, so ping me.]",
            "I [tend to forget|always forget] to {task}, so [alert|warn|nudge|ping|remind] me on {date}.",
            "[a note|a warning|a nudge|an alert] on {date} [would help|is what I need]: {task}.",
        ),
    ),
    Situation(
        "weather",
        {"place": "city", "day": "date"},
        (
            "[look up|check|find|show|see] the [forecast|weather|temperature|outlook|rain|sun] [for|in|of|over] {city} [on|for] {date}",
            "[give|tell] me the [forecast|weather|temperature|outlook] [on|for] {date} [for|in|above] {city}",
            "know [whether|if] it [rains|snows|is sunny|is cold|is windy|is cloudy|storms] in {city} on {date}",
            "know [whether|if] [I need an umbrella|there are storms|there are clouds|there is sun|it is warm] [in|over|above] {city} on {date}",
        ),
        (
            "[do I need|should I bring|must I pack|will I need] [an umbrella|a coat|a sun hat|warm clothes] in {city} on {date}?",
            "[are|will] there [be |]clouds or sun [over|above|in] {city} on {date}?",
            "on {date}, [is there|do we get|can we expect] [a storm|snow|sun|rain|wind|fog] [in|over|above] {city}?",
            "what [is|will be] the [temperature|outlook|forecast] [of|for|in] {city} on {date}?",
            "the [forecast|outlook|weather] for {date} [in|over] {city}, [sun or clouds|storms or sun|cold or warm]?",
            "[storms|rain|clouds|snow|sun] in {city} on {date}?",
        ),
    ),
    Situation(
        "journey",
        {"start": "origin", "goal": "destination", "day": "date"},
        (
            "[fly|travel by air|go by plane|travel by plane|take a plane] from {origin} to {destination} on {date}",
            "[purchase|buy|get|reserve|book|arrange] [a seat|a ticket|an air ticket|a flight|a plane ticket|air travel|a place on a plane] "
            "from {origin} to {destination}[ on| for|, departing|, leaving on] {date}",
            "[purchase|buy|get|reserve|book|arrange] [a seat|a ticket|an air ticket|a flight] to {destination} from {origin} [on|for] {date}",
            "[reserve|book|arrange] my [journey|travel|trip] by [air|plane] on {date} from {origin} to {destination}",
        ),
        (
            "my [journey|trip|travel] [by air |by plane |]begins in {origin} on {date} and ends in {destination}.",
            "the [journey|trip] [starts|begins] in {origin} and [ends|stops] in {destination}[ on|, it is on|, departing] {date}.",
            "I am [travelling|flying|going by plane] to {destination} on {date}, [I start in|departing from|leaving] {origin}[.|, get the ticket.]",
            "on {date} I am [travelling|flying] from {origin} to {destination}[.|, reserve a seat.|, purchase the ticket.]",
        ),
    ),
    Situation(
        "exchange",
        {"sum": "amount", "money": "currency", "wanted": "target"},
        (
            "[exchange|swap|convert|change|turn|switch] {money} [for|into|to] {target}",
            "[express|state|work out|compute|calculate|see] [what {money} is worth|the worth of {money}|the equivalent of {money}|the value of {money}] "
            "in {target}",
            "[work out|know|compute|find] how [many|much] {target} {money} [is worth|are worth|is|are]",
            "get {target} for {money}",
        ),
        (
            "what [is|are] {money} worth[ today| now|] in {target}?",
            "what [would be|is] the [equivalent|worth|value|price] of {money} in {target}?",
            "{money}, [expressed|stated|worked out|as an equivalent] in {target}[.|?]",
            "[swapping|exchanging|changing] {money} [for|into] {target} [would give what|brings how much]?",
            "how [much|many] {target} [would I get|is it|are they] for {money}?",
        ),
        weight=2,
    ),
    Situation(
        "parcel",
        {"number": "order"},
        (
            "[locate|find|track|follow|trace|look up|check] [my |the |our |]"
            "[parcel|package|shipment|delivery|order][| number| with the number| called] {order}",
            "know [where|how far] [parcel|package|shipment|delivery|the order] {order} [is|has come|has travelled]",
            "[see|hear|get] [the news|news|the state] [on|of|about] [parcel|package|shipment|the delivery of|order] {order}",
        ),
        (
            "how far [is|has] [my |the |][parcel|package|shipment|delivery|order] {order}[| come| gone| moved]?",
            "[is there|do you have|have you] [any |some |]news [on|about|of] [parcel|package|shipment|delivery|order] {order}?",
            "[parcel|package|shipment|delivery] {order} [is late|has not come|did not arrive|is still travelling][.|, locate it.|, follow it.|, find it.]",
            "when [does|will] [parcel|package|shipment|delivery|the delivery of] {order} [arrive|come|reach me]?",
        ),
    ),
    Situation(
        "small talk",
        {},
        (
            "[compose|write|tell|read] [a poem|a limerick|a story|a song|a rhyme|a tale|a joke|a riddle] about {thing}",
            "[recommend|name|find|suggest] [a novel|a book|a film|a song|a game] about {thing}",
            "[entertain|amuse|surprise] [me|us|{person}] with [a joke|a riddle|a story|a song|a trick]",
            "[describe|explain|tell me] the [history|people|food|streets|past] of {city}",
            "know who [invented|made|loved|found|painted] {thing}",
            "[sing|play|dance|paint|draw|cook] something [about {thing}|for {person}|nice]",
            "[describe|explain|discuss|praise] {thing}",
        ),
        (
            "who [invented|discovered|likes|painted|made] {thing}?",
            "[does|did] {person} [love|like|know|hate] {thing}?",
            "I [ask myself|wonder] [who made|why we need|what is] {thing}.",
            "[why|when] [do people like|did people invent] {thing}?",
            "what is the [history|name|best street|oldest house|nicest part] of {city}?",
            "what [is|was] {person} like?",
            "[hello|good evening|hi], [how are you|nice to see you|who are you]?",
        ),
    ),
)

SAME_WORDS: tuple[tuple[str, ...], ...] = (
    ("transfer", "send", "wire", "remit", "forward", "pay"),
    ("payment", "transfer", "remittance", "wire"),
    ("bill", "invoice", "charge"),
    ("client", "customer"),
    ("deadline", "due date"),
    ("issue", "draw up", "write", "create", "make"),
    ("schedule", "arrange", "organise", "plan", "fix", "set up"),
    ("meeting", "appointment", "get-together", "conversation", "chat", "talk", "call"),
    ("remind", "nudge", "alert", "warn", "ping"),
    ("note", "reminder", "memo"),
    ("weather", "forecast", "outlook"),
    ("rain", "storm", "clouds"),
    ("flight", "air travel", "journey by plane"),
    ("book", "reserve", "purchase", "get"),
    ("fly", "travel by air", "go by plane"),
    ("convert", "exchange", "swap", "change"),
    ("worth", "value", "equivalent"),
    ("order", "parcel", "package", "shipment", "delivery"),
    ("track", "locate", "follow", "trace", "look up"),
    ("poem", "limerick", "rhyme"),
    ("story", "tale", "novel"),
)

OPENERS = (
    "|please |please |can you |could you |would you |would you please |I want to |I would like to |we need to |we want to |kindly |I have to |help me to |"
    "you should |you must |try to |it is time to |my boss asks you to |I need you to |let us |someone should |"
).split("|")
CLOSERS = "||||| today| for me|, please| as soon as you can|, thank you| now| soon".split("|")

STATEMENTS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    (
        "{person} [wired|sent|paid|remitted|transferred] {money} to {other} on {date}.",
        (("who [paid|sent the money|gave the money]?", "person"), ("who [got|received] the money?", "other"), ("on which day?", "date")),
    ),
    (
        "{person} [travelled|flew|went] from {origin} to {destination} on {date}.",
        (("where did the [journey|trip] begin?", "origin"), ("where did it end?", "destination"), ("who [travelled|flew]?", "person")),
    ),
    (
        "{person} and {other} [met|talked|had a chat|had an appointment] in {city} on {date} at {time}.",
        (("at what time?", "time"), ("on which day?", "date"), ("in which city?", "city"), ("who met {person}?", "other")),
    ),
    (
        "{company} [billed|charged|invoiced] {person} {money}, [due|payable by|deadline] {date}.",
        (("who has to pay?", "person"), ("who gets the money?", "company"), ("what is the deadline?", "date"), ("how much?", "amount")),
    ),
    (
        "the [parcel|package|shipment] {order} for {person} [left|reached] {city} on {date}.",
        (("what is its number?", "order"), ("who waits for it?", "person"), ("which city?", "city"), ("which day?", "date")),
    ),
    (
        "{person} [has to|must|wants to] {task} on {date}.",
        (("what is to be done?", "task"), ("who does it?", "person"), ("which day?", "date")),
    ),
    (
        "in {city} it was [sunny|cold|rainy|windy|warm] on {date}, said {person}.",
        (("where?", "city"), ("when?", "date"), ("who said so?", "person")),
    ),
)  # fmt: skip

PROSE = (
    "{person} lives in {city}. Every [morning|evening|Sunday] [he|she] goes to the [market|station|park] and [buys bread|meets {other}|reads the news].",
    "the [forecast|outlook] for {city} was [good|bad]. There were [clouds|storms|rain] in the morning and [sun|wind|snow] in the evening. "
    "{person} took [an umbrella|a coat].",
    "{company} is a [small|large|new] company in {city}. {person} works there and [writes the bills|answers the clients|sends the parcels].",
    "a [client|customer] gets a [bill|invoice]. On it stands the sum, {money}, and the [deadline|due date], {date}.",
    "{person} had to {task}, but forgot it. {other} wrote a [note|reminder|memo] and [nudged|alerted|warned|reminded] {person}.",
    "to fly from {origin} to {destination} one needs a [seat|ticket]. {person} [bought|purchased|reserved|booked] it on {date}.",
    "a [parcel|package|shipment] travels from {origin} to {destination}. With the number {order} one can [follow|locate|trace|track] it.",
    "{person} [swapped|exchanged|changed] {money} for {target} at the bank in {city}.",
    "{person} [likes|loves|knows a lot about] {thing}. {other} [likes|loves] {thing} more.",
    "a calendar holds the [meetings|appointments|visits] of a day. {person} comes at {time}, {other} comes later.",
)
