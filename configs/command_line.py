"""The flags of each command of `puna`, and how --config and its keys are read."""

import re

from absl import flags

from . import find, get_config, names, schema
from .errors import UserError

# Of quantised weights, see `models/quantize.py`.
KINDS = ["", "int8", "int4", "nf4"]


def define(command: str, arguments: list[str]) -> flags.FlagValues:
    """The flags of a command; `arguments` say which keys --config.KEY=VALUE are there."""
    args = flags.FlagValues()
    text = {"flag_values": args}
    flags.DEFINE_bool("help", False, "show the flags", short_name="h", **text)
    if command in ("train", "eval", "audit", "data", "plan"):
        from ml_collections import config_flags

        config_flags.DEFINE_config_file(
            "config", None, f"one of {', '.join(names())}, or a config file; with :VARIANT",
            sys_argv=arguments, **text,
        )  # fmt: skip
    if command in ("train", "eval", "audit", "generate", "plan"):
        flags.DEFINE_string("workdir", None, "folder for what the command writes", **text)
    if command in ("train", "eval", "generate"):
        flags.DEFINE_string(
            "coordinator",
            "",
            "HOST:PORT of the first of several processes; clusters set it",
            **text,
        )
        flags.DEFINE_integer(
            "num_processes", 0, "how many; 1 = alone, even inside a cluster", **text
        )
        flags.DEFINE_integer("process_id", -1, "number of this process, from 0", **text)
        flags.DEFINE_integer("join_timeout", 300, "seconds to wait for the others", **text)
        flags.DEFINE_integer(
            "heartbeat", 100, "seconds of silence after which a process counts as dead", **text
        )
    if command == "train":
        flags.DEFINE_bool("resume", True, "resume from the newest checkpoint in --workdir", **text)
        flags.DEFINE_string(
            "init_from", None, "weights to start from: a model, a run or RUN@STEP; the same as "
            "--config.train.init_from", **text,
        )  # fmt: skip
        flags.DEFINE_bool("with_optimizer", False, "keep the moments of that run, too", **text)
        flags.DEFINE_bool(
            "fresh", False, "start a new run; refuses a --workdir with checkpoints", **text
        )
        flags.DEFINE_integer(
            "profile", 0, "trace so many steps: a folder for xprof and Perfetto in --workdir, and "
            "the costliest operations as a table", **text,
        )  # fmt: skip
    if command == "plan":
        flags.DEFINE_string(
            "topology",
            None,
            "what to plan for, such as v5p-256, 2xv5e-256, h100-8 or cpu-8; auto or v5p-auto = the "
            "cheapest that fits",
            **text,
        )
        flags.DEFINE_bool("no_compile", False, "arithmetic alone, in seconds", **text)
        flags.DEFINE_bool(
            "search", False, "look for the mesh, remat and microbatches that fit and take least "
            "time", **text,
        )  # fmt: skip
        flags.DEFINE_float("budget_s", 900.0, "seconds that all compiles may take", **text)
        flags.DEFINE_float("tokens", 0.0, "of a run: its time, energy, carbon and cost", **text)
        flags.DEFINE_float("mfu", 0.4, "share of the peak FLOP/s that such a run reaches", **text)
        flags.DEFINE_string("country", "us", "whose electricity it uses", **text)
        flags.DEFINE_float("power_mw", 0.0, "of a site: how many devices that is", **text)
        flags.DEFINE_float("days", 60.0, "of that site: which Llamas it trains in them", **text)
        flags.DEFINE_integer("context", 0, "tokens of a row; plans generation instead", **text)
        flags.DEFINE_integer("batch", 1, "rows that are generated at one time", **text)
        flags.DEFINE_enum(
            "quantize", "none", ["none", *KINDS[1:], "auto"], "weights of generation; auto = the "
            "first of them that fits", **text,
        )  # fmt: skip
        flags.DEFINE_float(
            "flops", 0.0, "of training: the best size and tokens by scaling laws, nothing else; "
            "--config says how many experts", **text,
        )  # fmt: skip
        flags.DEFINE_multi_string(
            "fit", [], "folders of runs, such as runs/*: the law that fits them instead", **text
        )
        flags.DEFINE_string("facts", None, "published numbers, edited: a TOML file", **text)
    if command == "data":
        flags.DEFINE_string("init_from", None, "weights whose tokenizer is used", **text)
        flags.DEFINE_integer("count", 3, "examples to print; 0 = all", **text)
        flags.DEFINE_integer("limit", 1000, "examples that the summary is of", **text)
        flags.DEFINE_bool("json", False, 'print {"ids", "weights"} a line, nothing else', **text)
    if command == "eval":
        flags.DEFINE_multi_string(
            "checkpoint", None, "a run's --workdir, or a model; several by a pattern such as "
            "'runs/a/checkpoints/*', or by giving it again", **text,
        )  # fmt: skip
    if command in ("audit", "generate", "chat", "serve"):
        flags.DEFINE_string("checkpoint", None, "a run's --workdir, or a model", **text)
    if command in ("eval", "audit", "generate", "chat", "serve"):
        flags.DEFINE_enum("quantize", "", KINDS, "how to keep matrices", **text)
    if command in ("eval", "audit", "generate"):
        flags.DEFINE_string(
            "adapter", "", "PEFT adapter to lay on the model, or several: 0.7*DIR,0.3*DIR", **text
        )
    if command in ("chat", "serve"):
        flags.DEFINE_multi_string(
            "adapter", [], "PEFT adapter to lay on the model, or several: 0.7*DIR,0.3*DIR; "
            "NAME=DIR offers it beside the model and can be repeated", **text,
        )  # fmt: skip
    if command == "eval":
        flags.DEFINE_string(
            "harness", None, "tasks of lm-eval, separated by commas, instead of held-out text; "
            "--config then gives the mesh and the compute_dtype and may be left out", **text,
        )  # fmt: skip
        flags.DEFINE_string(
            "tasks", None, "tasks of puna's own, and TOML or JSON files that define some, with "
            "commas between; --config as with --harness", **text,
        )  # fmt: skip
        flags.DEFINE_string("data_dir", None, "--tasks: what their paths are relative to", **text)
        flags.DEFINE_string(
            "compare", None, "two workdirs of --tasks, separated by a comma: which model is better "
            "on the same documents; needs no checkpoint", **text,
        )  # fmt: skip
        flags.DEFINE_string(
            "replay", None, "workdir of --tasks, whose requests are asked again", **text
        )
        flags.DEFINE_string("include_path", None, "--harness: folder with more tasks", **text)
        # Of both --harness and --tasks.
        flags.DEFINE_integer("limit", None, "documents of each task", **text)
        flags.DEFINE_integer("num_fewshot", None, "examples in a prompt", **text)
        flags.DEFINE_integer("batch_size", 8, "rows at a time", **text)
        flags.DEFINE_integer("max_length", None, "longest context, tokens", **text)
        flags.DEFINE_bool("apply_chat_template", False, "ask in a chat", **text)
    if command == "audit":
        flags.DEFINE_string(
            "passages", None, 'memorisation: records that were trained on, with "text" and, if '
            'known, "repeats"', **text,
        )  # fmt: skip
        flags.DEFINE_string("unseen", None, "memorisation: the same, never trained on", **text)
        flags.DEFINE_list("prefix", ["16", "32", "64"], "tokens that the model is given", **text)
        flags.DEFINE_integer("suffix", 32, "tokens that it must give back", **text)
        flags.DEFINE_integer("batch_size", 8, "rows at a time", **text)
        flags.DEFINE_bool("safety", False, "what the model refuses, harmful and benign", **text)
        flags.DEFINE_string("before", "", "safety: a model to compare with, side by side", **text)
        flags.DEFINE_string("harmful", "", 'safety: records with a "prompt", for ours', **text)
        flags.DEFINE_string("benign", "", "safety: the same of harmless ones", **text)
        flags.DEFINE_string("judge", "rules", "safety: rules, model:PATH or guard:PATH", **text)
        flags.DEFINE_integer("max_tokens", 64, "safety: of an answer", **text)
        flags.DEFINE_string(
            "corpus", None, "contamination: the data in which --tasks or --benchmark is looked "
            "for; needs no checkpoint", **text,
        )  # fmt: skip
        flags.DEFINE_list("tasks", [], "contamination: tasks, as of puna eval", **text)
        flags.DEFINE_string("benchmark", "", "contamination: records to look for", **text)
        flags.DEFINE_string("data_dir", None, "what paths of tasks are relative to", **text)
        flags.DEFINE_integer("ngram", 13, "words of a run", **text)
        flags.DEFINE_float("share", 0.5, "of its runs, in a contaminated document", **text)
    if command == "generate":
        flags.DEFINE_string("prompt", None, "text to continue", **text)
        flags.DEFINE_multi_string(
            "image", [], "picture for the next <|image|> of the prompt, or before it all; can be "
            "repeated", **text,
        )  # fmt: skip
        flags.DEFINE_multi_string(
            "audio", [], "WAV file of 16 kHz for the next <|audio|> of the prompt, or before it "
            "all; can be repeated", **text,
        )  # fmt: skip
        flags.DEFINE_integer("max_tokens", 64, "most tokens to write", **text)
        flags.DEFINE_multi_string("stop", [], "end before this text; can be repeated", **text)
    if command == "chat":
        flags.DEFINE_string("system", "", "the system message", **text)
        flags.DEFINE_string("profile", "", "file of what you tell about yourself, for it", **text)
        flags.DEFINE_bool("thinking", True, "show what a reasoning model thinks", **text)
        flags.DEFINE_list("tools", [], "that the model may call: calculator, python", **text)
        flags.DEFINE_string("files", "", "folder whose texts the model may list and read", **text)
        flags.DEFINE_integer("max_tokens", 0, "of an answer; 0 = 1024 or what fits", **text)
    if command in ("generate", "chat"):
        flags.DEFINE_float(
            "temperature", None, "0 = always the likeliest token; unless told, this and the next "
            "three are as the model's generation_config.json says, else 0", **text,
        )  # fmt: skip
        flags.DEFINE_integer("top_k", None, "sample from the k likeliest; 0 = all", **text)
        flags.DEFINE_float("top_p", None, "sample from the likeliest of this mass", **text)
        flags.DEFINE_float("min_p", None, "least probability / the largest", **text)
        flags.DEFINE_integer("seed", 0, "of the sampling", **text)
    if command == "serve":
        flags.DEFINE_string("host", "127.0.0.1", "address to listen at; 0.0.0.0 = all", **text)
        flags.DEFINE_integer("port", 8000, "0 = one that is free", **text)
        flags.DEFINE_string("name", "", "of the model; that of its folder by default", **text)
        flags.DEFINE_string("api_key", "", "that clients must have; PUNA_API_KEY is safer", **text)
        flags.DEFINE_string(
            "guard", "", "model such as Llama Guard, or module:function, that may refuse what is "
            "asked and what is answered", **text,
        )  # fmt: skip
        flags.DEFINE_integer("slots", 8, "texts written at a time", **text)
        flags.DEFINE_integer(
            "cache_tokens", 0, "of all texts together that there is room for, in layers without "
            "chunks; 0 = --slots times --max_length", **text,
        )  # fmt: skip
        flags.DEFINE_integer("max_waiting", 64, "texts that may wait for a slot", **text)
    if command in ("chat", "serve"):
        flags.DEFINE_integer("max_length", 4096, "tokens of a prompt and its answer", **text)
        flags.DEFINE_integer(
            "max_images", 1, "pictures of a conversation that there is room for, with models whose "
            "layers attend to pictures (Llama 3.2 Vision)", **text,
        )  # fmt: skip
    if command in ("generate", "chat", "serve"):
        flags.DEFINE_string("mesh", "", "sizes of mesh axes, such as fsdp=2,tensor=4", **text)
        flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "of the model", **text)
        flags.DEFINE_enum(
            "cache_dtype", "", ["", "float32", "bfloat16", "int8", "float8_e4m3fn"],
            "of keys and values; --dtype by default", **text,
        )  # fmt: skip
        flags.DEFINE_integer(
            "speculate", None, "tokens proposed and checked at a time, which changes the speed and "
            "not the text; 4 with --draft, else 0", **text,
        )  # fmt: skip
        flags.DEFINE_string(
            "draft", "", "smaller model with the same tokenizer that proposes them; without one "
            "they are looked up in the text so far", **text,
        )  # fmt: skip
    if command == "launch":
        flags.DEFINE_integer("n", 2, "processes", **text)
        flags.DEFINE_integer("devices", 0, "of each process: GPUs, or simulated on CPU", **text)
        flags.DEFINE_integer("restarts", 0, "times to start again after a failure", **text)
    if command == "convert":
        args.set_gnu_getopt(True)  # flags may follow the paths
        flags.DEFINE_enum(
            "to", "hf", ["hf", "puna", "meta", "gguf", "peft"], "format of DST", **text
        )
        flags.DEFINE_enum(
            "dtype", None, ["bfloat16", "float16", "float32", "q8_0"],
            "of all tensors of DST, q8_0 with --to=gguf; by default each keeps its own", **text,
        )  # fmt: skip
        flags.DEFINE_string("name", None, "of the release; DST's own by default", **text)
        flags.DEFINE_string(
            "adapter", "", "folder of a PEFT adapter to merge, or several: 0.7*DIR,0.3*DIR", **text
        )
        flags.DEFINE_string(
            "base_licence", None, "llama2, llama3, llama3.1, llama3.2, llama3.3, llama4 or none: "
            "of the model that SRC comes from; by default what stands beside its weights", **text,
        )  # fmt: skip
        flags.DEFINE_string(
            "tokenizer", None, "where the tokenizer lies, or none; by default beside the weights",
            **text,
        )  # fmt: skip
        flags.DEFINE_bool(
            "ignore_licence_name", False, "write a name that the base licence forbids", **text
        )
        flags.DEFINE_enum("quantize", "", KINDS, "--to=puna: how matrices are kept", **text)
    return args


def prepare(arguments: list[str]) -> list[str]:
    """Check --config.KEY=VALUE against the schema and turn --config=NAME into a file.

    `config_flags` would do the first with a traceback and knows no names.
    """
    left, out = list(arguments), []
    while left:
        argument = left.pop(0)
        if found := re.fullmatch(r"--?(init_from|with_optimizer)(=.*)?", argument, re.DOTALL):
            argument = f"--config.train.{found[1]}{found[2] or ''}"
            if found[1] == "with_optimizer" and not found[2]:
                argument += "=true"
        if argument in ("--config", "-config") and left:
            argument += "=" + left.pop(0)
        if match := re.fullmatch(r"--?config\.([^=]*)(?:=(.*))?", argument, re.DOTALL):
            name, value = match.groups()
            schema.parse(name, (left or [""])[0] if value is None else value)
        elif match := re.fullmatch(r"--?config=(.*)", argument, re.DOTALL):
            get_config(match[1])
            path, variant = find(match[1])
            argument = f"--config={path}" + ("" if variant is None else f":{variant}")
        out.append(argument)
    return out


def needs_no_config(args: flags.FlagValues) -> bool:
    """Whether this needs no configuration: an audit, some forms of `puna eval` and `puna plan`."""
    if "passages" in args or ("fit" in args and (args.fit or args.flops)):
        return True
    forms = ("harness", "tasks", "compare", "replay")
    return "harness" in args and any(getattr(args, form) is not None for form in forms)


def required(args: flags.FlagValues, name: str):
    """The value of a flag.

    Raises:
      UserError: it is not given.
    """
    value = getattr(args, name)
    if value in (None, "", []):
        raise UserError(f"--{name} is needed; --help shows the flags")
    return value
