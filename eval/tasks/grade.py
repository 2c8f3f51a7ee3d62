"""What an answer is worth: the scores of a document from the answers to its requests."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ...configs.errors import UserError
from ..judging import judge
from . import calls, instructions, made, metrics, statistics
from .definition import Task
from .documents import Document
from .requests import Request

_WRITTEN = {
    "exact": metrics.exact, "number": metrics.number, "regex": metrics.regex,
    "contains": metrics.contains, "math": metrics.mathematics,
}  # fmt: skip


class Grade(NamedTuple):
    """scores: by metric. weight: of a mean over documents, bytes of a text. shown: the answer."""

    scores: dict[str, float]
    weight: float
    shown: str


def prepare(task: Task, documents: Sequence[Document]) -> None:
    """Refuse a task whose answers could not be graded, before a model is loaded.

    Raises:
      UserError: a package is missing, this machine isolates no program, or an instruction is not
        known.
    """
    if task.metric == "math":
        metrics.math_verify()
    if task.kind == "code":
        judge.check_isolation()
    for document in documents:
        if task.kind == "instructions":
            try:
                _instructions("x", document)
            except UserError as error:
                raise UserError(f"{task.name}: document {document.number}: {error}") from None
        elif task.kind == "tools":
            _calls("", document)
        elif task.kind == "generate" and not document.target.strip():
            raise UserError(f"{task.name}: document {document.number} has an empty target")
        elif task.metric == "regex":
            metrics.regex("", document.target)
        elif task.metric == "reasoning_gym":
            made.reasoning_dataset(document.facts["dataset"], document.facts["count"])
            break


def grade(task: Task, document: Document, requests: Sequence[Request], answers: Sequence) -> Grade:
    """The scores of a document.

    Args:
      requests, answers: of the document in order; an answer is [log p, greedy], [reward], or a
        dict of text.
    """
    if task.kind == "preference":
        values = [answer[0] for answer in answers]
        shown = document.choices[values.index(max(values))]
        return Grade({"accuracy": _credit(values, 0)}, 1.0, shown)
    if task.kind == "text":
        bits = -sum(answer[0] for answer in answers) / math.log(2)
        size = requests[0].size if requests else 0
        return Grade({"bits_per_byte": bits / size if size else 0.0}, size, f"{bits:.1f} bits")
    if task.kind == "choice":
        logprobs = [answer[0] for answer in answers]
        right = int(document.target)
        sizes = [max(len(choice.encode()), 1) for choice in document.choices]
        lengths = [len(request.continuation) for request in requests]
        scores = {
            "accuracy": _credit(logprobs, right),
            "accuracy_per_byte": _credit(_over(logprobs, sizes), right),
            "accuracy_per_token": _credit(_over(logprobs, lengths), right),
        }
        return Grade(scores, 1.0, document.choices[logprobs.index(max(logprobs))])
    texts = [answer["text"] for answer in answers]
    each = [_written(task, document, text) for text in texts]
    found = {name: sum(scores[name] for scores in each) / len(each) for name in each[0]}
    if task.at:
        right = sum(scores["passes"] for scores in each)
        found |= {f"pass_at_{k}": statistics.pass_at(k, len(each), int(right)) for k in task.at}
    return Grade(found, 1.0, texts[0])


def _written(task: Task, document: Document, text: str) -> dict[str, float]:
    if task.kind == "instructions":
        return _instructions(text, document)
    if task.kind == "tools":
        return _calls(text, document)
    if task.kind == "code":
        return {"passes": float(judge.run(program(document, text)).passed)}
    answer = metrics.filtered(task.filter, text)
    if task.metric == "reasoning_gym":
        facts = document.facts
        dataset = made.reasoning_dataset(facts["dataset"], facts["count"])
        value = dataset.score_answer(answer.strip(), dataset[facts["index"]])
        return {"reasoning_gym": float(value)}
    return {task.metric: _WRITTEN[task.metric](answer, document.target)}


def program(document: Document, answer: str) -> str:
    """The program that tests an answer: the last fenced block of it, if it has one."""
    fences = answer.split("```")
    if len(fences) > 2:
        answer = fences[-2]
        first, _, rest = answer.partition("\n")
        answer = rest if first.strip() in ("python", "py", "python3", "") else answer
    return f"{document.before}{answer}\n{document.after}\n"


def _instructions(text: str, document: Document) -> dict[str, float]:
    facts = document.facts
    return instructions.scores(text, facts["instruction_id_list"], facts["kwargs"])


def _calls(text: str, document: Document) -> dict[str, float]:
    return calls.scores(text, calls.functions(document.facts["tools"]), document.target)


def _over(values: Sequence[float], sizes: Sequence[int]) -> list[float]:
    return [value / max(size, 1) for value, size in zip(values, sizes, strict=True)]


def _credit(values: Sequence[Any], right: int) -> float:
    """1 for the right one, shared among equals: a model that cannot tell is at chance."""
    best = [i for i, value in enumerate(values) if value == max(values)]
    return (right in best) / len(best)
