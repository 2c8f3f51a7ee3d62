"""`puna eval` and `puna audit`: from the flags to what measures, and what the terminal shows.

Several checkpoints are measured one after another, by the same compiled programs where they have
one architecture: a program depends on the configuration and never on the weights.
"""

import pathlib

from ..configs import files, paths, schema, storage
from ..configs.command_line import needs_no_config, required
from ..configs.display import print_results
from ..configs.errors import UserError
from ..models.parallel.processes import is_first
from ..models.weights.run import is_run
from . import harness, several
from .audits import contamination, memorisation, safety
from .evaluate import Evaluation
from .tasks import evaluate as task_evaluation

_REPLAY_SETTINGS = ("quantize", "adapter", "mesh_config")


def evaluate(args) -> None:
    """`puna eval`: measure a model, or several; `args` are the flags.

    Writes `results.json`, and beside it what `--tasks` and `--harness` write, of several models in
    a folder for each.
    """
    if args.compare is not None:
        _compare(args)
        return
    models = several.expand(required(args, "checkpoint"))
    if args.replay is not None:
        _replay(args, models)
        return
    workdir = storage.at(args.workdir or _beside(args, models))
    if len(models) == 1:
        found = _measure(args, workdir)(models[0], workdir)
        if is_first():
            _show(args, found, workdir)
        return
    measure = _measure(args, workdir)
    names = several.labels(models)
    results = several.measured(
        models, [measure(path, workdir / name) for path, name in zip(models, names, strict=True)]
    )
    if is_first():
        print(several.table(names, results))
        _write(workdir, "results.json", results)


def _beside(args, models) -> pathlib.Path:
    """A run's own folder; not that of a model of others, nor what grows into a bucket."""
    if len(models) > 1:
        return several.home(models)
    path = models[0]
    is_home = is_run(path) and not (needs_no_config(args) and paths.in_bucket(path))
    return path / "eval" if is_home else pathlib.Path(f"eval-{path.stem}")


def _measure(args, workdir):
    """A function of (model, folder) that gives results; what it needs is opened once."""
    if args.harness is not None:
        names = [name for name in args.harness.split(",") if name]
        return lambda path, folder: harness.evaluate_harness(
            path, names, folder, include_path=args.include_path, **_asking(args)
        )
    if args.tasks is not None:
        names = [name for name in args.tasks.split(",") if name]
        return lambda path, folder: task_evaluation.evaluate_tasks(
            path, names, folder, data_dir=args.data_dir, **_asking(args)
        )
    evaluation = Evaluation(args.config)
    return lambda path, folder: evaluation(path, args.quantize, args.adapter)


def _show(args, results, workdir) -> None:
    if args.harness is not None:
        print(harness.table(results))
        print(f"harness.json and requests.jsonl are in {workdir}")
    elif args.tasks is not None:
        print(task_evaluation.table(results))
        print(f"results.json, report.html, requests.jsonl and samples.jsonl are in {workdir}")
    else:
        print_results(results)
        _write(workdir, "results.json", results)


def _replay(args, models) -> None:
    if len(models) > 1:
        raise UserError(f"--replay takes one --checkpoint, not {len(models)}")
    settings = {k: v for k, v in _asking(args).items() if k in _REPLAY_SETTINGS}
    results = task_evaluation.replay(args.replay, models[0], **settings)
    if is_first():
        print_results(results)
        _write(pathlib.Path(args.replay), "replay.json", results)


def _compare(args) -> None:
    folders = args.compare.split(",")
    if len(folders) != 2:
        raise UserError(f"--compare={args.compare} must be two workdirs: FIRST,SECOND")
    print(task_evaluation.table(task_evaluation.compare(*folders, args.workdir)))
    print(f"comparison.json and comparison.html are in {args.workdir or folders[1]}")


def audit(args) -> None:
    """`puna audit`: what a model has learnt by heart or refuses, what of a benchmark is in data."""
    if (args.passages is not None) + (args.corpus is not None) + args.safety != 1:
        raise UserError("audit takes --passages, --corpus or --safety; --help shows the flags")
    if args.safety:
        results = safety.audit_safety(
            required(args, "checkpoint"), args.before, harmful=args.harmful, benign=args.benign,
            judge=args.judge, max_tokens=args.max_tokens, quantize=args.quantize,
            adapter=args.adapter, batch_size=args.batch_size, **_where(args),
        )  # fmt: skip
        print(safety.table(results))
        name = "safety.json"
    elif args.corpus is not None:
        results = contamination.audit_contamination(
            args.tasks, args.benchmark, args.corpus, ngram=args.ngram, share=args.share,
            data_dir=args.data_dir,
        )  # fmt: skip
        print(contamination.table(results))
        name = "contamination.json"
    else:
        if not all(prefix.isdecimal() for prefix in args.prefix):
            raise UserError(f"--prefix={','.join(args.prefix)} must be like 16,32,64")
        results = memorisation.audit_memorisation(
            required(args, "checkpoint"), args.passages, required(args, "unseen"),
            prefixes=[int(prefix) for prefix in args.prefix], suffix=args.suffix,
            quantize=args.quantize, adapter=args.adapter, batch_size=args.batch_size,
            **_where(args),
        )  # fmt: skip
        print(memorisation.table(results))
        name = "memorisation.json"
    _write(pathlib.Path(args.workdir or "audit"), name, results)


def _asking(args) -> dict:
    """What --harness and --tasks have in common."""
    names = ("quantize", "adapter", "batch_size", "max_length", "limit", "num_fewshot",
             "apply_chat_template")  # fmt: skip
    return {name: getattr(args, name) for name in names} | _where(args)


def _where(args) -> dict:
    """The mesh and the dtype to compute in, where --config says them."""
    if args.config is None:
        return {}
    config = schema.from_dict(args.config)
    return {"mesh_config": config.mesh, "compute_dtype": config.model.compute_dtype}


def _write(workdir: pathlib.Path, name: str, results) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / name, results)
    print(f"{name} is in {workdir}")
