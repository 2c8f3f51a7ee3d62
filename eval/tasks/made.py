"""Documents that are made, not downloaded: needles in a haystack, variables that are passed on,
sums, lookups, calls of functions, drawn pictures, reasoning-gym.

A seed gives the same documents everywhere. What has a length is made for the tokenizer at hand.
"""

import functools
import json
import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ...configs.errors import UserError
from ...models.decode.pictures import PLACE
from .definition import Task

_PEOPLE = "Ana Bruno Carla Diego Elena Felipe Gloria Hugo Ines Jorge Katia Luis Marta Nico".split()
_THINGS = "blanket lantern saddle basket rope kettle hammer ladder bucket candle mirror".split()
_PLACES = "barn market bridge harbour mill station school garden tower library chapel inn".split()
_VERBS = "carried left found repaired sold painted borrowed washed lost bought".split()
_PAINTS = {
    "red": (200, 30, 30), "green": (30, 150, 50), "blue": (30, 60, 200), "yellow": (240, 210, 40),
    "black": (0, 0, 0), "brown": (120, 70, 30),
}  # fmt: skip
_COLOURS = "red blue green grey white black brown yellow".split()

# By kind, what the records must have besides prompt and target.
_NEEDS = {
    "choice": "choices", "tools": "tools", "instructions": "instruction_id_list", "code": "after",
    "preference": "chosen",
}  # fmt: skip


def records(task: Task, tokenizer) -> list[dict]:
    """The records of a made task: "prompt", "target", "choices", "images" and what else there is.

    Raises:
      UserError: there is no such maker, it has no such key or value, or it makes nothing for the
        kind of the task.
    """
    told = dict(task.made)
    maker, seed = told.pop("maker", None), told.pop("seed", 0)
    known: dict[str, Callable[..., Iterator[dict]]] = {
        "needle": functools.partial(_needles, tokenizer=tokenizer),
        "variables": functools.partial(_variables, tokenizer=tokenizer),
        "sums": _sums, "lookup": _lookup, "instructions": _instructions, "tools": _tools,
        "colours": _colours, "squares": _squares, "reasoning_gym": _reasoning_gym,
    }  # fmt: skip
    if not isinstance(maker, str) or maker not in known:
        raise UserError(f"{task.name}: made.maker={maker!r} must be one of {', '.join(known)}")
    rng = random.Random(f"{maker} {seed}")
    try:
        found = list(known[maker](rng, **told))
    except (TypeError, ValueError) as error:
        said = str(error)
        raise UserError(f"{task.name}: made: {said.partition('() ')[2] or said}") from None
    shots, count = task.shots, len(found)
    if not count:
        raise UserError(f"{task.name}: made gives no document: its counts must be at least 1")
    needs = "dataset" if task.metric == "reasoning_gym" else _NEEDS.get(task.kind, "")
    # The target of a record with choices is a number, no answer.
    if needs not in ("", *found[0]) or (task.kind == "generate" and "choices" in found[0]):
        raise UserError(
            f"{task.name}: made.maker={maker!r} makes nothing for kind={task.kind} with "
            f"metric={task.metric}"
        )
    if shots >= count:
        raise UserError(f"{task.name}: shots={shots} must be less than its {count} documents")
    examples = found[:shots]
    return [record | {"shots": examples} for record in found[shots:]] if shots else found


def _needles(rng, lengths: Sequence[int], depths: Sequence[float], *, needles: int = 1,
             repeats: int = 1, tokenizer) -> Iterator[dict]:  # fmt: skip
    """Keys and numbers in a text of made sentences; the question asks for the numbers.

    Args:
      lengths: tokens of the prompt. depths: where the first needle stands, from 0, the beginning,
        to 1, the end; the others follow at equal distances, around the end again.
    """
    if needles < 1 or not all(0 <= depth <= 1 for depth in depths):
        raise UserError("made: needles must be at least 1 and depths 0 to 1")
    for length in lengths:
        for depth in depths:
            for _ in range(repeats):
                keys = rng.sample(_PLACES, needles) if needles <= len(_PLACES) else []
                if not keys:
                    raise UserError(f"made: needles={needles} must be at most {len(_PLACES)}")
                values = [str(rng.randrange(10**6, 10**7)) for _ in keys]
                facts = [
                    f"The number of the {k} is {v}." for k, v in zip(keys, values, strict=True)
                ]
                asked = " and ".join(f"the {key}" for key in keys)
                question = f"\n\nQuestion: what is the number of {asked}?"
                question += f"\nAnswer: the number of {asked} is"
                room = length - len(tokenizer.encode("\n".join(facts) + question)) - 8
                if room < 16:
                    raise UserError(
                        f"made: lengths has {length}: that is too few for {needles} needles"
                    )
                hay = _hay(rng, tokenizer, room)
                size = len(hay)
                for n, fact in enumerate(facts):
                    at = round(((depth + n / len(facts)) % 1.0 if n else depth) * size)
                    # As sentences of their own: those before have moved by what was put in.
                    hay.insert(min(at + n, len(hay)), fact)
                yield {
                    "prompt": " ".join(hay) + question, "target": "\n".join(values),
                    "length": length, "depth": depth,
                }  # fmt: skip


def _variables(rng, lengths: Sequence[int], *, hops: int = 3, chains: int = 2, repeats: int = 4,
               tokenizer) -> Iterator[dict]:  # fmt: skip
    """Variables that are passed on, spread over a text of made sentences: which have one's value?

    As in RULER (arXiv 2404.06654), section 3.2.

    Args:
      lengths: tokens of the prompt. hops: how often a value is passed on. chains: values, of which
        one is asked for.
    """
    if hops < 1 or chains < 1:
        raise UserError("made: hops and chains must be at least 1")
    for length in lengths:
        for _ in range(repeats):
            names: list[str] = []
            while len(names) < chains * (hops + 1):
                name = "".join(rng.choice("ABCDEFGHJKLMNPQRSTUVWXYZ") for _ in range(5))
                names += [name] * (name not in names)
            values = [str(n) for n in rng.sample(range(10**4, 10**5), chains)]
            several = [names[i::chains] for i in range(chains)]
            told = [
                [f"VAR {a} = {f'VAR {before}' if before else value}."
                 for before, a in zip([None, *chain], chain, strict=False)]
                for chain, value in zip(several, values, strict=True)
            ]  # fmt: skip
            question = f"\n\nQuestion: which variables have the value {values[0]}?\nAnswer:"
            facts = [fact for chain in told for fact in chain]
            room = length - len(tokenizer.encode("\n".join(facts) + question)) - 8
            if room < 16:
                raise UserError(f"made: lengths has {length}: that is too few for its variables")
            hay = _hay(rng, tokenizer, room)
            for chain in told:
                # Each fact stands behind the one that it builds upon.
                places = sorted(rng.randrange(len(hay) + 1) for _ in chain)
                for n, (place, fact) in enumerate(zip(places, chain, strict=True)):
                    hay.insert(place + n, fact)
            yield {"prompt": " ".join(hay) + question, "target": "\n".join(several[0]),
                   "length": length}  # fmt: skip


def _hay(rng, tokenizer, room: int) -> list[str]:
    """Sentences of `room` tokens at most."""
    sentences, used = [], 0
    while True:
        made = (
            f"{rng.choice(_PEOPLE)} {rng.choice(_VERBS)} the {rng.choice(_COLOURS)} "
            f"{rng.choice(_THINGS)} near the {rng.choice(_PLACES)}."
        )
        used += len(tokenizer.encode(" " + made))
        if used > room:
            return sentences
        sentences.append(made)


def _sums(rng, count: int = 100, digits: int = 2) -> Iterator[dict]:
    """`a + b =` and `a - b =`."""
    if not 1 <= digits <= 1000:
        raise UserError(f"made: digits={digits} must be 1 to 1000")
    for _ in range(count):
        a, b = (rng.randrange(10 ** (digits - 1), 10**digits) for _ in range(2))
        sign = rng.choice("+-")
        yield {"prompt": f"{a} {sign} {b} =", "target": str(a + b if sign == "+" else a - b)}


def _lookup(rng, count: int = 100, people: int = 4) -> Iterator[dict]:
    """Who has what: a fact of the prompt is asked for; all choices stand in the prompt."""
    most = min(len(_PEOPLE), len(_THINGS))
    if not 2 <= people <= most:
        raise UserError(f"made: people={people} must be 2 to {most}")
    for _ in range(count):
        who, what = rng.sample(_PEOPLE, people), rng.sample(_THINGS, people)
        told = [f"{w} has the {t}." for w, t in zip(who, what, strict=True)]
        asked, order = rng.randrange(people), rng.sample(range(people), people)
        yield {
            "prompt": f"{' '.join(told)}\nQuestion: what does {who[asked]} have?\nAnswer: the",
            "choices": [what[i] for i in order], "target": str(order.index(asked)),
        }  # fmt: skip


def _colours(rng, count: int = 100, choices: int = 4) -> Iterator[dict]:
    """What colour the squares of a picture have."""
    if not 2 <= choices <= len(_PAINTS):
        raise UserError(f"made: choices={choices} must be 2 to {len(_PAINTS)}")
    for _ in range(count):
        offered = rng.sample(list(_PAINTS), choices)
        right = rng.randrange(choices)
        yield {
            "prompt": f"{PLACE}\nQuestion: what colour are the squares?\nAnswer: they are",
            "choices": offered, "target": str(right),
            "images": [_drawn(rng, rng.randrange(1, 6), offered[right])],
        }  # fmt: skip


def _squares(rng, count: int = 100, most: int = 5) -> Iterator[dict]:
    """How many squares a picture has."""
    if not 1 <= most <= 16:
        raise UserError(f"made: most={most} must be 1 to 16")
    for _ in range(count):
        number = rng.randrange(1, most + 1)
        yield {
            "prompt": f"{PLACE}\nQuestion: how many squares are there, as a number?\nAnswer:",
            "target": str(number), "images": [_drawn(rng, number, rng.choice(list(_PAINTS)))],
        }  # fmt: skip


def _drawn(rng, number: int, colour: str) -> bytes:
    """A picture of `number` squares that do not touch, on white, as a PPM file."""
    side, cell = 128, 32
    pixels_YXC = np.full((side, side, 3), 255, np.uint8)
    for place in rng.sample(range((side // cell) ** 2), number):
        size = rng.randrange(cell // 2, cell - 3)
        y, x = (cell * n + rng.randrange(1, cell - size) for n in divmod(place, side // cell))
        pixels_YXC[y : y + size, x : x + size] = _PAINTS[colour]
    return b"P6 %d %d 255\n" % (side, side) + pixels_YXC.tobytes()


def _instructions(rng, count: int = 60) -> Iterator[dict]:
    """A subject and one or two instructions that a program can check."""
    for _ in range(count):
        subject = f"a {rng.choice(_COLOURS)} {rng.choice(_THINGS)}"
        thing = rng.choice(_PLACES)
        number = rng.randrange(2, 6)
        forms = [
            ("punctuation:no_comma", {}, "Use no commas."),
            ("change_case:english_lowercase", {}, "Write in lower case only."),
            ("keywords:existence", {"keywords": [thing]}, f"Use the word {thing}."),
            ("length_constraints:number_words", {"relation": "less than", "num_words": 30},
             "Use fewer than 30 words."),
            ("detectable_format:number_bullet_lists", {"num_bullets": number},
             f"Write exactly {number} bullet points, each a line that begins with '* '."),
            ("startend:end_checker", {"end_phrase": "That is all."},
             "End with the exact words: That is all."),
            ("startend:quotation", {}, "Put the whole answer into double quotation marks."),
        ]  # fmt: skip
        # The lower case forbids the end, the quotation mark does too.
        pairs = [(0,), (1,), (2,), (3,), (4,), (5,), (6,), (0, 2), (0, 4), (1, 3), (2, 5), (3, 6)]
        chosen = [forms[i] for i in rng.choice(pairs)]
        yield {
            "prompt": f"Describe {subject}. {' '.join(text for _, _, text in chosen)}",
            "target": "", "instruction_id_list": [name for name, _, _ in chosen],
            "kwargs": [kwargs for _, kwargs, _ in chosen],
        }  # fmt: skip


def _tools(rng, count: int = 60, offered: int = 3) -> Iterator[dict]:
    """Requests that one call answers, with the functions that are offered."""

    def parameters(**properties):
        return {"type": "object", "properties": properties, "required": list(properties)}

    text, whole = {"type": "string"}, {"type": "integer"}
    forms = [
        ("get_weather", "The weather of a town.", parameters(town=text),
         lambda a, n: (f"What is the weather in {a}?", {"town": a})),
        ("set_timer", "Wait for some minutes.", parameters(minutes=whole),
         lambda a, n: (f"Wake me in {n} minutes.", {"minutes": n})),
        ("send_message", "Send a text to somebody.", parameters(to=text, text=text),
         lambda a, n: (f'Write "on my way" to {a}.', {"to": a, "text": "on my way"})),
        ("buy_tickets", "Buy tickets to a town.", parameters(town=text, number=whole),
         lambda a, n: (f"Buy {n} tickets to {a}.", {"town": a, "number": n})),
        ("set_light", "Switch a lamp.", parameters(state={"type": "string", "enum": ["on", "off"]}),
         lambda a, n: ("It is dark: switch the lamp on.", {"state": "on"})),
    ]  # fmt: skip
    if not 1 <= offered <= len(forms):
        raise UserError(f"made: offered={offered} must be 1 to {len(forms)}")
    towns = "Arequipa Cusco Puno Juliaca Ayacucho Tacna".split()
    for _ in range(count):
        chosen = rng.sample(forms, offered)
        name, _, _, ask = chosen[0]
        person = name == "send_message"
        question, arguments = ask(rng.choice(_PEOPLE if person else towns), rng.randrange(2, 50))
        tools = [{"name": n, "description": d, "parameters": p} for n, d, p, _ in chosen]
        yield {
            "prompt": question, "target": json.dumps({"name": name, "arguments": arguments}),
            "tools": rng.sample(tools, offered),
        }  # fmt: skip


def _reasoning_gym(rng, datasets: Sequence[str], count: int = 50) -> Iterator[dict]:
    """Questions of the package reasoning-gym, `count` of each data set."""
    del rng
    for name in datasets:
        for i in range(count):
            entry = reasoning_dataset(name, count)[i]
            yield {"prompt": entry["question"], "target": str(entry["answer"]),
                   "dataset": name, "count": count, "index": i}  # fmt: skip


@functools.cache
def reasoning_dataset(name: str, count: int):
    """A data set of reasoning-gym, with the `score_answer` that its metric calls.

    Raises:
      UserError: the package is not installed, or has none of this name.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError(
            f"a task of reasoning-gym needs the package {error.name}: pip install 'puna[reasoning]'"
        ) from None
    try:
        return reasoning_gym.create_dataset(name, size=count, seed=0)
    except ValueError as error:
        raise UserError(f"made.datasets: {error}") from None
