"""`puna eval --harness`: the tasks of EleutherAI's lm-evaluation-harness, in this process.

`harness_model.py` has how a request is answered.
"""

import dataclasses
import json
import os
from collections.abc import Sequence

from ..configs import files, paths, schema, storage
from ..configs.errors import UserError
from ..models.parallel import processes, sharding
from ..models.text.tokenizer import load_tokenizer
from ..models.transformer import Transformer
from ..models.weights.load import load
from .answers import Answers
from .harness_model import harness_model


def evaluate_harness(path, tasks: Sequence[str], workdir, *, mesh_config=None,
                     compute_dtype: str = "float32", quantize: str = "", adapter: str = "",
                     include_path=None, batch_size: int = 8, max_length: int | None = None,
                     **options) -> dict:  # fmt: skip
    """Evaluate a model on tasks of lm-eval.

    Args:
      path: run, checkpoint or model that `puna.load` reads.
      tasks: names of tasks, groups or tags.
      workdir: gets `harness.json`, lm-eval's own results, and `requests.jsonl`, a line with task,
        document, kind and answer for each request. Answers that are there already for the same
        model are not computed again.
      mesh_config: a `schema.MeshConfig`; all devices by default.
      quantize, adapter: as of `puna.load`.
      include_path: folder with more tasks as YAML files.
      batch_size: rows at a time; no answer depends on it.
      max_length: longest context in tokens, the model's own by default.
      options: of `lm_eval.simple_evaluate`: limit, num_fewshot, apply_chat_template, ...

    Returns:
      What `harness.json` holds.

    Raises:
      UserError: lm-eval is not installed, a task does not exist or asks for what is not there.
    """
    lm_eval = _lm_eval()
    from lm_eval.utils import handle_non_serializable

    path, workdir = storage.anywhere(path, "checkpoint"), paths.local(workdir, "--workdir")
    # The weights last: they may take minutes to load.
    tokenizer = load_tokenizer(path)
    manager = _task_manager(tasks, include_path)
    mesh = sharding.make_mesh(mesh_config or schema.MeshConfig())
    model, params = load(path, mesh=mesh, quantize=quantize, adapter=adapter)
    model = Transformer(dataclasses.replace(model.config, compute_dtype=compute_dtype))
    answers = Answers(workdir / "requests.jsonl")
    lm = harness_model(model, params, tokenizer, mesh, batch_size, max_length, answers, str(path))
    # lm-eval would fork for its bootstraps, which may hang beside the threads of JAX.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    options.setdefault("fewshot_as_multiturn", bool(options.get("apply_chat_template")))
    results = lm_eval.simple_evaluate(
        model=lm, tasks=list(tasks), task_manager=manager, batch_size=batch_size,
        log_samples=False, **options,
    )  # fmt: skip
    results = json.loads(json.dumps(results, default=handle_non_serializable))
    answers.finish(lm.lines)
    if processes.is_first():
        files.write_json(workdir / "harness.json", results)
    return results


def table(results: dict) -> str:
    """lm-eval's own table of results."""
    from lm_eval.utils import make_table

    groups = make_table(results, "groups") if results.get("groups") else ""
    return "\n".join(filter(None, [make_table(results), groups]))


def _lm_eval():
    try:
        import lm_eval
    except ImportError:
        raise UserError(
            "--harness needs the package lm-eval: pip install 'puna[harness]'"
        ) from None
    return lm_eval


def _task_manager(tasks: Sequence[str], include_path):
    """lm-eval's list of tasks; its own ones, which take a while to list, only where asked for.

    Raises:
      UserError: a task is in neither, or no folder is there.
    """
    from lm_eval.tasks import TaskManager

    if not tasks:
        raise UserError("--harness is empty: name tasks, separated by commas")
    if include_path is not None:
        include_path = str(paths.local(include_path, "--include_path"))
        if not os.path.isdir(include_path):
            raise UserError(f"--include_path={include_path} is not a folder")
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if set(tasks) <= set(manager.all_tasks):
            return manager
    manager = TaskManager(include_path=include_path)
    for name in tasks:
        if name not in manager.all_tasks:
            raise UserError(
                f"--harness={name} is not a task of lm-eval; `lm-eval ls tasks` lists them, and "
                "--include_path=DIR adds others"
            )
    return manager
