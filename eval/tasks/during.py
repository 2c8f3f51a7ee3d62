"""Tasks that a run is asked while it trains: `eval.tasks`, every `eval.tasks_every` steps.

Everything is read, rendered and tokenised once, before the first step, each process its own share
of the documents; they tell each other ids and, of every evaluation, scores. Nothing of it enters
the training.
"""

import jax

from ...configs import schema
from ...configs.errors import ConfigError
from ...configs.patterns import names
from ...models.decode.engine import for_decoding
from ...models.parallel import processes
from ..answers import Answers
from . import documents, evaluate, grade
from .definition import load_tasks
from .pictures import Pictures
from .requests import Asker, Asking, Request


class During:
    """The tasks of `eval.tasks`, ready to be asked; see `train.loop.Tasks`.

    Raises:
      UserError: a task or its data is not there, or the model cannot be asked.
    """

    def __init__(self, config: schema.Config, tokenizer, mesh):
        c = config.eval
        if config.model.router == "expert_choice" and config.model.moe_interval:
            raise ConfigError(
                f"eval.tasks={c.tasks}: model.router=expert_choice cannot be asked: its experts "
                "choose among later tokens too"
            )
        self.steps, self.every, self.batch_size = config.train.steps, c.tasks_every, c.batch_size
        self.tokenizer, self.mesh = tokenizer, mesh
        self.tasks = load_tasks(names(c.tasks), c.tasks_dir or None, key="eval.tasks")
        part = jax.process_index(), jax.process_count()
        self.pictures = Pictures(config.model, tokenizer)
        asking = Asking(
            tokenizer, config.model.max_positions, as_chat=False, pictures=self.pictures
        )  # fmt: skip
        # Of this process: (task, document, its requests).
        self.own = []
        for task in self.tasks:
            if task.kind == "preference" and config.train.objective != "reward":
                raise ConfigError(
                    f"eval.tasks={c.tasks}: {task.name} needs train.objective=reward, not "
                    f"{config.train.objective}"
                )
            found = documents.documents(task, tokenizer, c.tasks_limit or None, part)
            grade.prepare(task, found)
            self.own += [(task, d, asking.requests(task, d)) for d in found]
        self.pictures.share()
        told = processes.gather([r._asdict() for _, _, made in self.own for r in made])
        self.requests = [
            Request(**{k: tuple(v) if isinstance(v, list) else v for k, v in line.items()})
            for lines in told for line in lines
        ]  # fmt: skip
        # Where those of this process begin in all of them.
        self.first = sum(map(len, told[: part[0]]))

    def due(self, step: int) -> bool:
        """Whether it is the last step, or one of `eval.tasks_every`."""
        return step == self.steps or self.every > 0 and step > 0 and step % self.every == 0

    def __call__(self, model, params) -> dict[str, float]:
        """Each metric of each task, as `tasks_TASK_METRIC`."""
        asker = Asker(
            for_decoding(model), params, self.tokenizer, self.mesh, self.batch_size, Answers(None),
            "", self.pictures,
        )  # fmt: skip
        processes.wait("tasks")
        answers = iter([line["answer"] for line in asker.ask(self.requests)][self.first :])
        samples = []
        for task, document, made in self.own:
            given = grade.grade(task, document, made, [next(answers) for _ in made])
            cut = max((r.cut for r in made), default=0)
            samples.append(
                {"task": task.name, "document": document.number, "scores": given.scores,
                 "weight": given.weight, "cut": cut}
            )  # fmt: skip
        everyone = [line for part in processes.gather(samples) for line in part]
        # In one order, so that sums do not depend on how many processes there are.
        everyone.sort(key=lambda line: line["document"])
        found = evaluate.summarise(self.tasks, everyone)
        return {
            f"tasks_{task.name}_{metric}": found[task.name][metric]["value"]
            for task in self.tasks for metric in task.metrics
        }  # fmt: skip
