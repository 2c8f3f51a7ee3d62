"""The command line: `puna COMMAND --flags`, also `python -m puna`.

The only place that wires the layers together.
"""

import contextlib
import json
import os
import pathlib
import re
import sys
import traceback

from absl import flags

from .configs import command_line, errors, files, schema, storage
from .configs.command_line import required
from .configs.display import print_results
from .train.resilience.background import background_log

COMMANDS = {
    "train": "train a model; the same command resumes after an interruption",
    "eval": "loss and bits per byte on held-out text, or tasks: puna's own, or lm-eval's",
    "audit": "what a model has learnt by heart; what of a benchmark stands in a corpus",
    "generate": "continue a prompt",
    "chat": "talk with a model in the terminal, or a message a line from a pipe",
    "serve": "answer requests in the form of OpenAI's API over HTTP",
    "plan": "memory, time, energy and cost of training or generating, on hardware that is not here",
    "data": "training examples as the model sees them, and which tokens bear loss",
    "launch": "-n N -- COMMAND --flags: run a command in several processes on this machine",
    "convert": "SRC DST: write a model as a Hugging Face release, or others' weights as a run",
}

_SETTINGS = ("max_tokens", "stop", "dtype")
_PLAN_SETTINGS = (
    "search budget_s tokens mfu country power_mw days context batch quantize facts".split()
)


def _train(args):
    from .eval.tasks import during
    from .models.parallel.processes import is_first
    from .models.weights import run
    from .train.loop import train

    workdir = storage.at(required(args, "workdir"))
    if (args.fresh or not args.resume) and run.holds_checkpoints(workdir):
        raise errors.UserError(
            f"--fresh: {workdir / run.CHECKPOINTS} holds checkpoints already, which puna never "
            "deletes; move it away, or take another --workdir"
        )
    train(args.config, workdir, tasks=during.During, profile=args.profile)
    if not is_first():
        return
    results = json.loads((workdir / "results.json").read_text())
    print_results(results)
    print(f"checkpoints, metrics.jsonl, loss.png and results.json are in {workdir}")


def _eval(args):
    from .eval import command

    command.evaluate(args)


def _audit(args):
    from .eval import command

    command.audit(args)


def _generate(args):
    import jax

    from .models.decode import clips, fused, pictures
    from .models.decode.engine import round_up
    from .models.decode.generate import begin_rows
    from .models.parallel import processes

    if args.prompt is None:  # an empty one is a prompt too
        raise errors.UserError("--prompt is needed; --help shows the flags")
    tokenizer, mesh = _open_tokenizer(args)
    sampling = _sampling(args, tokenizer)
    images, audio, media = args.image, args.audio, {}

    def begun(config):
        """The ids of the prompt, one for each picture and clip."""
        places = {}
        if images:
            places[pictures.PLACE] = pictures.place_id(tokenizer), len(images)
        if audio:
            places[clips.PLACE] = clips.place_id(config), len(audio)
        if places:
            return fused.with_places(tokenizer, args.prompt, places)
        return begin_rows(tokenizer, [args.prompt], args.stop)[0][0]

    def length(config):
        of_media = len(images) * pictures.longest(config) + len(audio) * config.audio.max_tokens
        return round_up(len(begun(config)) + of_media + args.max_tokens)

    engine = _open_engine(args, tokenizer, mesh, 1, length, max_images=len(images))
    config, longest = engine.config, engine.max_length
    ids = begun(config)
    if audio:
        ids, media["clips"] = clips.expand(config, ids, audio, longest)
    if images:
        ids, media["tiles"] = pictures.expand(config, tokenizer, ids, images, longest)
    text, show = "", processes.is_first()
    with jax.set_mesh(mesh):
        tokens = engine.stream(ids, sampling, args.max_tokens, args.stop, **media)
        if show:
            print(args.prompt, end="", flush=True)
        for token in tokens:
            text += token.text
            if show:
                print(token.text, end="", flush=True)
    if show:
        print()
    if args.workdir and show:
        settings = {name: getattr(args, name) for name in _SETTINGS} | sampling._asdict()
        results = {"checkpoint": args.checkpoint, "prompt": args.prompt, "text": text, **settings}
        results |= {"proposed": engine.proposed, "accepted": engine.accepted}
        _write_results(storage.at(args.workdir), results)


def _plan(args):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # what compilers say of missing hardware
    if args.fit or args.flops:
        return _scaling(args)
    import jax

    from .train.plan import plan, report

    topology = required(args, "topology")
    jax.config.update("jax_platforms", "cpu")  # whatever is here is not what is asked about
    settings = {name: args[name].value for name in _PLAN_SETTINGS if args[name].present}
    found = plan(
        args.config, topology, compile=not args.no_compile, **settings,
        tell=lambda line: print(line, file=sys.stderr, flush=True),
    )  # fmt: skip
    if args.workdir:
        found.write(storage.at(args.workdir))
    if found.fits is False:
        raise errors.UserError(found.verdict)
    print(found)
    if found.candidates:
        print(report.train_command(args["config"], found))
    if args.workdir:
        print(f"plan.json and plan.html are in {args.workdir}")


def _scaling(args):
    """Size and tokens by scaling laws, instead of a plan."""
    from .train.plan import figures, report, scaling

    found = scaling.answer(args.fit, args.flops, args.config, args.facts)
    print(report.text(found))
    if args.workdir:
        _write_results(pathlib.Path(args.workdir), figures.plain(found))


def _chat(args):
    import jax

    from .models.decode import chat
    from .models.decode.profile import Profile

    tokenizer, mesh = _open_tokenizer(args)
    # Before the weights are read: a model that cannot chat says so at once.
    tokenizer.chat([{"role": "user", "content": "?"}])
    profile = Profile(args.profile) if args.profile else None
    tools = _tools(args)
    sampling = _sampling(args, tokenizer)
    engine = _open_engine(args, tokenizer, mesh, 1, args.max_length, max_images=args.max_images)
    with jax.set_mesh(mesh):
        settings = args.system, args.max_tokens, profile, args.thinking, tools
        chat.run(chat.Chat(engine, sampling, *settings))


def _tools(args):
    """What a model may call in a chat."""
    from .eval.judging import judge
    from .models.decode import toolbox

    found = toolbox.files(args.files) if args.files else {}
    for name in args.tools:
        if name == "calculator":
            found |= toolbox.calculator()
        elif name == "python":
            judge.check_isolation()
            code = toolbox.parameters(("code",), code=("string", "what it prints is the result"))
            about = "Run a Python program, with the standard library alone, no network, no files."
            found["python"] = toolbox.Tool(about, code, judge.printed)
        else:
            raise errors.UserError(f"--tools={name} must be calculator or python")
    return found


def _serve(args):
    try:
        from .models.decode.server import app
    except ModuleNotFoundError as error:
        raise errors.UserError(
            f"puna serve needs the package {error.name}: pip install 'puna[serve]'"
        ) from None
    tokenizer, mesh = _open_tokenizer(args)
    with app.listen(args.host, args.port) as socket:
        engine = _open_engine(
            args, tokenizer, mesh, args.slots, args.max_length, max_images=args.max_images,
            cache_tokens=args.cache_tokens,
        )  # fmt: skip
        name = args.name or pathlib.Path(args.checkpoint).resolve().name
        key = args.api_key or os.environ.get("PUNA_API_KEY", "")
        with _guard(args, mesh) as guard:
            app.serve(engine, socket, mesh, name, key, args.max_waiting, guard)


@contextlib.contextmanager
def _guard(args, mesh):
    """What `--guard` names, at work; None without it."""
    import jax

    from .models.decode.load_engine import load_engine
    from .models.decode.server import guard, worker
    from .models.text.tokenizer import load_tokenizer

    if not args.guard or (found := guard.function(args.guard)):
        yield found if args.guard else None
        return
    tokenizer = load_tokenizer(args.guard)
    settings = {"dtype": args.dtype, "quantize": args.quantize, "cache_dtype": args.cache_dtype}
    # The conversation, the guard's own instructions around it and its verdict.
    most = args.max_length + guard.AROUND
    engine = load_engine(args.guard, tokenizer, mesh, args.slots, most, **settings)
    with jax.set_mesh(mesh):
        engine.warm_up()
    with worker.Worker(engine, args.max_waiting + args.slots, mesh) as running:
        yield guard.ModelGuard(running)


def _open_tokenizer(args):
    from .models.parallel import sharding
    from .models.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(required(args, "checkpoint"))
    return tokenizer, sharding.make_mesh(_mesh(args.mesh))


def _open_engine(args, tokenizer, mesh, num_slots, max_length, **settings):
    from .models.decode.load_engine import load_engine

    names = ("speculate", "draft", "dtype", "cache_dtype", "quantize", "adapter")
    settings |= {name: getattr(args, name) for name in names}
    return load_engine(args.checkpoint, tokenizer, mesh, num_slots, max_length, **settings)


def _sampling(args, tokenizer):
    from .models.decode.generate import sampling_for

    told = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p", "min_p")}
    return sampling_for(tokenizer, args.seed, **told)


def _data(args):
    import itertools

    from .train.data.preview import Preview

    preview = Preview(args.config)
    examples = itertools.islice(preview.examples(), args.count or None)
    if args.json:
        for example in examples:
            line = {"ids": example.ids.tolist(), "weights": example.weights.tolist()}
            print(json.dumps(line))
        return
    colour = sys.stdout.isatty() or bool(os.environ.get("FORCE_COLOR"))
    for number, example in enumerate(examples, 1):
        learnt = int((example.weights > 0).sum())
        cut = f", {example.cut} cut off" if example.cut else ""
        print(f"--- example {number}: {len(example.ids)} tokens, {learnt} learnt{cut}")
        print(preview.shown(example, colour))
    found = preview.summary(args.limit)
    reasons = found.pop("reasons")
    marked = "green" if colour else "in [[ ]]"
    print(f"--- at most {args.limit} examples; what is learnt is {marked}")
    print_results(found)
    for reason, count in reasons.items():
        print(f"  dropped {count}: {reason}")


def _mesh(text: str) -> schema.MeshConfig:
    """`fsdp=2,tensor=4` as the section of a configuration."""
    axes = {}
    for part in filter(None, text.split(",")):
        axis, _, size = part.partition("=")
        if not re.fullmatch("-?[0-9]+", size):
            raise errors.UserError(f"--mesh={text} must be like fsdp=2,tensor=4")
        axes[axis] = int(size)
    return schema.from_dict(axes, schema.MeshConfig, "mesh.")


def _launch(args, arguments):
    from .train.resilience.launch import launch

    if args.n < 1:
        raise errors.UserError(f"-n={args.n} must be at least 1")
    if not arguments or arguments[0] not in ("train", "eval", "generate"):
        raise errors.UserError("launch takes a command after --: train, eval or generate")
    status = launch(arguments, args.n, args.devices, args.restarts)
    if status:
        sys.exit(status)


def _join(args, command):
    """Become one of several processes, where there are several."""
    from .models.parallel import processes

    facts = {"command": command}
    if "config" in args and args.config is not None:
        facts["config"] = schema.to_dict(schema.build(args.config))
    processes.join(
        args.coordinator, args.num_processes, args.process_id, facts, args.join_timeout,
        args.heartbeat,
    )  # fmt: skip


def _convert(args, paths):
    from .models.release.convert import convert

    if len(paths) != 2:
        raise errors.UserError("convert takes two paths, SRC and DST; --help shows the flags")
    convert(
        *paths, to=args.to, name=args.name, base_licence=args.base_licence,
        ignore_licence_name=args.ignore_licence_name, dtype=args.dtype, tokenizer=args.tokenizer,
        adapter=args.adapter, quantize=args.quantize,
    )  # fmt: skip
    print(f"{paths[0]} is now in {paths[1]}")


def _write_results(workdir: pathlib.Path, results: dict) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    files.write_json(workdir / "results.json", results)
    print(f"results.json is in {workdir}")


def _usage() -> str:
    lines = ["usage: puna COMMAND --flags     (puna COMMAND --help shows them)", ""]
    return "\n".join(lines + [f"  {name:<10} {text}" for name, text in COMMANDS.items()])


def _run(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_usage())
        return
    command, *rest = argv
    if command not in COMMANDS:
        raise errors.UserError(f"{command} is not a command; one of {', '.join(COMMANDS)}")
    passed_on = []
    if command == "launch" and "--" in rest:
        at = rest.index("--")
        rest, passed_on = rest[:at], rest[at + 1 :]
    rest = ["puna", *command_line.prepare(rest)]
    try:
        args = command_line.define(command, rest)
        left = args(rest)[1:]
    except flags.Error as e:
        raise errors.UserError(f"{' '.join(str(e).split())}; --help shows the flags") from None
    if args.help:
        print(f"puna {command}: {COMMANDS[command]}\n{args.main_module_help() or args.get_help()}")
        if "config" in args:
            print("\nkeys (--config.KEY=VALUE), default, meaning:")
            for name, _, default, doc in schema.keys():
                print(f"  {name} = {default!r}: {doc}")
        return
    if command == "convert":
        _convert(args, left)
        return
    if command == "launch":
        _launch(args, passed_on)
        return
    if left:
        raise errors.UserError(f"{left[0]} is not a flag; flags are written --name=value")
    for name in ("workdir", "checkpoint", "facts"):
        if name in args and isinstance(args[name].value, str) and args[name].value:
            args[name].value = str(storage.anywhere(args[name].value, f"--{name}"))
    if "config" in args and (args.config is not None or not command_line.needs_no_config(args)):
        required(args, "config")
        if not schema.build(args.config).train.init_from:  # which completes the configuration
            schema.from_dict(args.config)
    if "coordinator" in args:
        _join(args, command)
    commands = {
        "train": _train, "eval": _eval, "generate": _generate, "chat": _chat, "serve": _serve,
        "plan": _plan, "data": _data, "audit": _audit,
    }  # fmt: skip
    commands[command](args)


# A run has a file for what threads report; what concerns a command comes back to it as an error.
@background_log(None)
def main() -> None:
    """Run the command line; a user's mistake is one line and exit status 2."""
    try:
        _run(sys.argv[1:])
        _leave("")
    except KeyboardInterrupt as e:
        from .train.resilience.signals import Interrupted

        told = isinstance(e, Interrupted)
        _leave("" if told else "interrupted")
        _end(errors.SAVED if told else errors.INTERRUPTED, f"puna: {str(e) or 'interrupted'}")
    except Exception as e:
        status = errors.status(e)
        if status != errors.MISTAKE and (found := _processes()):
            # Another process's end shows here as some error of JAX or of the network; which it was
            # is on its way.
            found.lost_contact()
        message = errors.one_line(str(e))
        _leave(message if status != 1 else f"{type(e).__name__}: {message[:500]}")
        if status == errors.MACHINE:
            message += ": the machine or the network failed; the same command can succeed later"
        _end(status, traceback.format_exc() if status == 1 else "puna: " + message)


def _processes():
    """The module of several processes, if it is in use."""
    return sys.modules.get(f"{__package__}.models.parallel.processes")


def _leave(message: str) -> None:
    """Tell the other processes of the run, if there are any."""
    if found := _processes():
        found.leave(message)


def _end(status: int, text: str) -> None:
    """End at once: threads that read or save, and JAX's own way out, would wait for others."""
    print(text, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
