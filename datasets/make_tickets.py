"""Makes the demo data set: messages of customers of an invented online shop, each with the queue it belongs in.

    python3 datasets/make_tickets.py --labels 8 --out datasets/tickets

Writes train.jsonl, eval.jsonl and test.jsonl in the chat format. Same options, same bytes, on any machine: every
queue has a random generator of its own, so a ninth queue leaves the rows of the eight others as they are.
Half of the eval and test rows are phrased in ways that no training row uses. Standard library only.
"""

import argparse
import json
import random
from pathlib import Path

INSTRUCTION = "Route the customer's message to one queue. Answer with the queue's name only."
ROWS = {"train": 40, "eval": 8, "test": 8}  # of each queue

SLOTS = {
    "item": [
        "coffee grinder", "desk lamp", "rain jacket", "backpack", "kettle", "yoga mat", "wall clock", "bike helmet",
        "bookshelf", "teapot", "frying pan", "wool blanket", "office chair", "tent", "alarm clock", "toaster",
        "linen shirt", "garden chair", "bread knife", "hair dryer", "picture frame", "suitcase", "blender", "rug",
    ],
    "wear": [
        "rain jacket", "winter boots", "linen shirt", "running shoes", "wool jumper", "jeans", "gloves", "sun hat",
        "hiking trousers", "summer dress", "leather belt", "sandals", "raincoat", "cardigan",
    ],
    "device": [
        "coffee grinder", "desk lamp", "kettle", "hand mixer", "alarm clock", "toaster", "hair dryer", "blender",
        "vacuum cleaner", "electric toothbrush", "fan heater", "bluetooth speaker", "rice cooker", "sewing machine",
    ],
    "colour": ["green", "navy blue", "black", "mustard", "white", "grey", "dark red", "beige"],
    "size": ["36", "38", "40", "42", "44", "S", "M", "L", "XL"],
    "day": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "last week", "the 3rd", "the 12th"],
    "time": [
        "two weeks", "a month", "three days", "six weeks", "half a year", "ten days", "a few hours", "four months",
    ],
    "city": ["Leeds", "Porto", "Gdansk", "Lyon", "Cork", "Turin", "Ghent", "Malmo", "Graz", "Bergen"],
    "person": ["my mother", "my son", "a friend", "my neighbour", "my wife", "my brother", "a colleague", "my aunt"],
    "money": ["18.90", "24.50", "39.00", "59.99", "74.20", "112.00", "149.00", "9.95"],
    "order": [f"{number}" for number in range(40117, 49999, 271)],
    "count": ["25", "40", "60", "80", "120", "150", "200", "300"],
    "group": ["our office", "our hotel", "a school", "our cafe", "our sports club", "a conference", "our new branch"],
}  # fmt: skip

OPENERS = ["", "", "", "Hi, ", "Hello, ", "Hello there, ", "Good morning, ", "Dear team, ", "Hey, ", "Good evening, "]
CLOSERS = ["", "", "", " Thanks.", " Order {order}.", " Please let me know.", " Regards, a customer from {city}.",
           " My order number is {order}.", " I look forward to your answer."]  # fmt: skip

# Of each queue: phrasings for all splits, then phrasings that only eval and test rows use.
QUEUES = {
    "delivery": (
        [
            "my {item} should have come on {day} and there is still no parcel.",
            "where is my {item}? The tracking page has not moved for {time}.",
            "the courier says the {item} was delivered, but nobody here has seen it.",
            "can the parcel with the {item} be left with {person} in {city}?",
            "I typed the wrong street for the {item}; can you still send it to my flat in {city}?",
            "how many days does a {item} take to get to {city}?",
            "the driver rang on {day} when I was out. When will he bring the {item} again?",
            "is my {item} on its way already? I ordered it {time} ago.",
            "tracking says my {item} is stuck in a depot near {city}.",
            "could the {item} arrive on {day} instead? I am away before that.",
            "only one of two boxes came on {day}; the {item} is missing from the shipment.",
            "which courier brings the {item}, and will I get a tracking link?",
        ],
        [
            "I have been waiting at the door for the {item} since {day}. Any news of the van?",
            "the parcel went to {city}, and I do not live there. How do I get my {item}?",
            "has the {item} left your warehouse yet?",
            "please send the {item} to a pickup point in {city}.",
        ],
    ),
    "refund": (
        [
            "I sent the {item} back {time} ago and have not got my money yet.",
            "I do not want the {item} any more and would like my {money} euros back.",
            "please cancel the {item} and pay me back.",
            "the {item} is not what the photo showed. I want to return it for my money.",
            "when will the {money} euros for the returned {item} reach my bank?",
            "how do I return a {item} and get the full price back?",
            "you paid back only part of the {money} euros for the {item} that I returned.",
            "I changed my mind about the {item}. How do I give it back and get paid back?",
            "the {item} was a gift from {person} that I do not need; can I have the money for it?",
            "my return of the {item} arrived at your place on {day}. Please release the {money} euros.",
            "I cancelled the {item} on {day}, so where is my money?",
            "please send me a return label for the {item}, I want my {money} euros again.",
        ],
        [
            "it has been {time} since you took back the {item}, and my account shows no repayment.",
            "I am sending the {item} back to you and expect the {money} euros to be returned.",
            "can I still give back the {item} after {time} and be reimbursed?",
            "take the {item} back, please, and return what I paid.",
        ],
    ),
    "exchange": (
        [
            "the {wear} is too small. Can I swap it for size {size}?",
            "I would like the {wear} in {colour} instead of {colour}.",
            "you sent the {wear} in size {size}, I need one size up.",
            "can I trade the {wear} for the same one in {colour}?",
            "the {wear} is too tight for {person}; please change it for size {size}.",
            "I picked the wrong colour for the {wear}. Can I have {colour} instead?",
            "may I send the {wear} back and get size {size} in its place?",
            "the {wear} fits badly. How do I swap it for a larger one?",
            "please replace the {colour} {wear} by a {colour} one.",
            "I ordered size {size} by mistake, please swap the {wear} for the next size.",
            "is it possible to change the {wear} for another model in size {size}?",
            "the sleeves of the {wear} are too long, could I get it in {size} instead?",
        ],
        [
            "{person} needs the {wear} in size {size}, not the one that came. Can we switch?",
            "the {colour} of the {wear} does not suit me, I would rather take it in {colour}.",
            "could you switch my {wear} to a smaller size, {size} perhaps?",
            "I want a different size of the {wear}: {size}.",
        ],
    ),
    "billing": (
        [
            "my card was charged twice for the {item}.",
            "I need an invoice with our company's name for the {item}.",
            "your page declined my card when I paid for the {item}.",
            "there is a charge of {money} euros on my card that I do not know.",
            "can I pay for the {item} in three instalments?",
            "the invoice for the {item} says {money} euros, but the shop showed less.",
            "the discount code was not taken off the price of the {item}.",
            "I paid {money} euros by bank transfer on {day}, and the order still says unpaid.",
            "please put our VAT number on the bill for the {item}.",
            "do you take PayPal for a {item}, or only credit cards?",
            "why did the payment of {money} euros for the {item} fail on {day}?",
            "the bill lists two of the {item}, although I bought one.",
        ],
        [
            "you debited {money} euros two times on {day}.",
            "where can I download the receipt for the {item}?",
            "the checkout will not accept my credit card for the {item}.",
            "I was billed {money} euros too much for the {item}.",
        ],
    ),
    "account": (
        [
            "I forgot my password and the reset mail does not come.",
            "please change the email address of my profile, I lost access to the old one {time} ago.",
            "I cannot log in since {day}; it says that my user is locked.",
            "how do I delete my profile and all of my data?",
            "I moved to {city}; where in my profile do I change my home address?",
            "somebody from {city} logged in with my user name on {day}.",
            "please stop the newsletter, I have had it every day for {time}.",
            "I have two profiles with different emails. Can you merge them?",
            "the code for signing in never arrives on my phone.",
            "my surname has changed; how do I change it in my user profile?",
            "the app signs me out every time, and I have to type my password again since {day}.",
            "can {person} and I use one login together?",
        ],
        [
            "signing in fails with 'unknown user' since {day}.",
            "I want to close my profile with you for good.",
            "how can I set a new password? The link is dead since {day}.",
            "my login was blocked after {time} without use.",
        ],
    ),
    "repair": (
        [
            "the {device} stopped working after {time}.",
            "the switch of my {device} broke on {day}; is that under warranty?",
            "my {device} makes a burning smell. Can somebody mend it?",
            "do you sell spare parts for the {device}? The lid is cracked.",
            "the {device} will not turn on any more. I bought it {time} ago.",
            "where do I send a broken {device} to have it fixed?",
            "the cable of the {device} has come loose, can your workshop fix it?",
            "since {day} the {device} switches itself off after a minute.",
            "how long is the warranty on the {device}? Mine is defective.",
            "the motor of my {device} rattles, please have a technician look at it.",
            "the {device} leaks and sparks; I want it fixed under the guarantee.",
            "after {time} the battery of the {device} is dead. Can you put in a new one?",
        ],
        [
            "my {device} is faulty: the display went dark on {day}.",
            "can your technicians fix a {device} that no longer gets warm?",
            "a part of the {device} snapped off after {time}; does the guarantee cover that?",
            "the button of the {device} is jammed. Who mends such things?",
        ],
    ),
    "stock": (
        [
            "when will the {colour} {item} be available again?",
            "is the {item} still in stock in {colour}?",
            "your page says that the {item} is sold out. Will there be more by {day}?",
            "please tell me as soon as the {item} is back in the shop.",
            "do you have the {item} in your store in {city}?",
            "will you ever sell the {item} in {colour}?",
            "how many of the {item} have you got left?",
            "can I reserve a {item} until {day} before they are all gone?",
            "the {colour} {item} has been out of stock for {time}. Is a new batch coming?",
            "do you carry a smaller {item} too? I cannot find one on the page.",
            "has the {item} been discontinued? I have not seen it for {time}.",
            "is there a waiting list for the {colour} {item}?",
        ],
        [
            "I would buy the {item} at once, but it has been unavailable for {time}.",
            "are there any {colour} ones of the {item} left in {city}?",
            "will the {item} be restocked before {day}?",
            "does your range include a {colour} {item}?",
        ],
    ),
    "praise": (
        [
            "I just want to say that the {item} is wonderful.",
            "thank you so much, the {item} came quickly and {person} loves it!",
            "great service on {day}, your colleague was very kind.",
            "the best {item} that I ever had, well done!",
            "five stars from {city}: the {item} is lovely.",
            "I am really happy with my {colour} {item}, keep it up!",
            "compliments to your team, {person} is delighted with the {item}.",
            "no problem at all, I only wanted to tell you how good the {item} is.",
            "what a beautiful {item}! I will recommend your shop to everyone in {city}.",
            "after {time} the {item} still looks like new. Excellent quality!",
            "your packing of the {item} was so pretty, a big thank you.",
            "we love the {item}, and {person} wants one too. Fantastic shop!",
        ],
        [
            "a pleasure to buy from you: the {item} exceeded all that I hoped for.",
            "hats off, you solved it all on {day} within minutes.",
            "{person} has not stopped smiling since the {item} came. Brilliant!",
            "your {item} is simply perfect, I am a fan.",
        ],
    ),
    "wholesale": (
        [
            "we need {count} of the {item} for {group}. What would you charge?",
            "do you give a quantity discount on {count} pieces of the {item}?",
            "please send an offer for {count} times the {item} for {group}.",
            "I want to resell your {item} in my shop in {city}. Who handles traders?",
            "could we order {count} of the {item} with our logo on them?",
            "what is the price per piece if {group} takes {count} of the {item}?",
            "we are a retailer from {city} and look for a supplier of the {item}.",
            "can {group} have a frame contract for {count} of the {item} a year?",
            "is there a trade price list? {group} wants to buy {count} of the {item}.",
            "we would like a quotation for a bulk order: {count} pieces, {item}, {colour}.",
            "as a business from {city} we plan to buy {count} of the {item} by {day}.",
            "what is the smallest number of the {item} that a dealer may order?",
        ],
        [
            "{group} is going to equip every room with a {item}, {count} in all. Can you quote?",
            "how cheap does the {item} get at {count} pieces?",
            "I run a store in {city} and would like to stock your {item} as a reseller.",
            "we want {count} of the {item} on a pallet for {group}.",
        ],
    ),
}


def main() -> None:
    options = read_options()
    splits = make_splits(list(QUEUES)[: options.labels])
    options.out.mkdir(parents=True, exist_ok=True)
    for split, rows in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (options.out / f"{split}.jsonl").write_text(text, encoding="utf-8")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Make the demo data set of customers' messages.")
    parser.add_argument("--labels", type=int, choices=range(2, len(QUEUES) + 1), default=8, help="how many queues")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl, eval.jsonl, test.jsonl")
    return parser.parse_args()


def make_splits(queues: list[str]) -> dict[str, list[dict[str, object]]]:
    """Rows of each split, the queues mixed."""
    made = {queue: make_messages(queue) for queue in queues}
    splits = {}
    for split in ROWS:
        rows = [chat(message, queue) for queue in queues for message in made[queue][split]]
        random.Random(split).shuffle(rows)
        splits[split] = rows
    return splits


def make_messages(queue: str) -> dict[str, list[str]]:
    """Different messages for each split of one queue; every second one outside of train has an unseen phrasing."""
    source = random.Random(queue)
    known, unseen = QUEUES[queue]
    seen: set[str] = set()
    messages: dict[str, list[str]] = {}
    for split, count in ROWS.items():
        messages[split] = []
        for number in range(count):
            phrasing = pick(known, unseen, split, number)
            messages[split].append(new_message(source, phrasing, seen))
    return messages


def pick(known: list[str], unseen: list[str], split: str, number: int) -> str:
    if split == "train":
        return known[number % len(known)]
    return known[number % len(known)] if number % 2 else unseen[number // 2 % len(unseen)]


def new_message(source: random.Random, phrasing: str, seen: set[str]) -> str:
    """The phrasing with its slots filled, unlike any message before."""
    while True:
        opener = source.choice(OPENERS)
        message = fill(source, opener + phrasing + source.choice(CLOSERS))
        message = message[0].upper() + message[1:]
        if message not in seen:
            seen.add(message)
            return message


def fill(source: random.Random, text: str) -> str:
    """Every {slot} replaced by a word; the same slot twice gets two different words."""
    for slot, words in SLOTS.items():
        for word in source.sample(words, text.count("{" + slot + "}")):
            text = text.replace("{" + slot + "}", word, 1)
    return text


def chat(message: str, queue: str) -> dict[str, object]:
    return {
        "messages": [
            {"role": "system", "content": INSTRUCTION},
            {"role": "user", "content": message},
            {"role": "assistant", "content": queue},
        ]
    }


if __name__ == "__main__":
    main()
