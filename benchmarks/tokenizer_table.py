"""Do released tokenizers give the ids that they gave here? Sources x 200 texts, as a table.

    python benchmarks/tokenizer_table.py            (needs the extras [reference,llama,gguf])

Each source is made here, loaded by puna, released by `Tokenizer.save_for_hub`, and loaded again by
puna and by `transformers`; where `transformers` reads the source itself, that counts too. Equal
means: the same ids, text by text, with what stands around a text and with control tokens read as
such, and the same text back.
"""

import argparse
import json
import pathlib
import tempfile

import puna
from puna.models.text import tokenizer as tokenizers_of_puna

TEXTS = (
    "", " ", "  ", "\n", "\t", "\r\n", " \n \n", "a", " a", "a ", "  a  b  ", "Hello world",
    "Hello, world! 12345 67.89", "don't I'LL we've they'd", "naïve café Straße œuvre",
    "ﬁ ① Ⅳ ½", "e\u0301 a\u0308", "Привет, мир",
    "Γειά σου Κόσμε", "你好，世界", "こんにちは世界", "안녕하세요",
    "مرحبا بالعالم", "שלום עולם", "नमस्ते दुनिया", "สวัสดีชาวโลก", "🦙", "🏔️ 🦙🦙", "👩‍👩‍👧 👍🏽 🇵🇪",
    "x = [i ** 2 for i in range(10)]", "def f(a, b):\n    return a + b\n", "http://a.b/c?d=e&f=%20",
    "\u00a0\u3000\u2003", "\u200b\u200d", "\ufeff", "\ufffd", "\x00\x01\x7f", "<0x0A>", "▁a▁",
    "a" * 300, "ab" * 100, " " * 70, "\n" * 20, "1" * 40, "!" * 50, "aA" * 30, "<|", "|>", "<s",
)  # fmt: skip


def texts(names, count: int) -> list[str]:
    """Languages, emoji, white space, nothing, and control tokens by name among them."""
    mixed = []
    for name in list(names)[:8] + ["<s>", "</s>", "<|eot_id|>", "<|im_end|>"]:
        mixed += [name, f"{name}a", f"a{name}", f"a {name} b", f" {name}\n{name}  c",
                  f"{name}user\nHello there{name}\n", f"x{name}{name}"]  # fmt: skip
    made = [*TEXTS, *mixed]
    while len(made) < count:
        made.append(made[len(made) % 40] + made[(7 * len(made)) % len(made)])
    return made[:count]


def corpus():
    """What the tokenizers are trained on: the texts of this checkout."""
    root = pathlib.Path(__file__).resolve().parent.parent
    for path in sorted(root.glob("*.md")) + sorted(root.glob("models/*.py")):
        yield from path.read_text(encoding="utf-8").split("\n")


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + "
    "'\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def byte_bpe(folder: pathlib.Path, bos: bool = True, eos: bool = False, vocab: int = 700):
    """A Llama-3-like tokenizer.json and its configuration."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    folder.mkdir(parents=True, exist_ok=True)
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
             "<|eot_id|>"]  # fmt: skip
    made.train_from_iterator(corpus(), trainers.BpeTrainer(
        vocab_size=vocab - len(names), show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))  # fmt: skip
    made.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in names]
    )
    if bos or eos:
        before, after = names[0] + " " if bos else "", " " + names[1] if eos else ""
        made.post_processor = processors.TemplateProcessing(
            single=f"{before}$A{after}", pair=f"{before}$A{after} {before}$B{after}",
            special_tokens=[(name, made.token_to_id(name)) for name in names[:2]],
        )  # fmt: skip
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": names[0],
              "eos_token": names[1], "add_bos_token": True}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return made


def sentencepiece(folder: pathlib.Path, config: dict | None = None, vocab: int = 700):
    """A Llama-2-like tokenizer.model, alone or with a tokenizer_config.json."""
    import sentencepiece

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for line in corpus() if line.strip()), model_writer=file,
            vocab_size=vocab, model_type="bpe", byte_fallback=True, split_digits=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, minloglevel=2,
        )  # fmt: skip
    if config is not None:
        known = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
                 "unk_token": "<unk>", "add_bos_token": True, "add_eos_token": False}  # fmt: skip
        (folder / "tokenizer_config.json").write_text(json.dumps(known | config))


def chatml(folder: pathlib.Path, decoder: bool = True):
    """A ChatML fine-tune of a Llama 2 as a slow tokenizer saved it."""
    entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
             "special": True}  # fmt: skip
    tokens = {0: "<unk>", 1: "<s>", 2: "</s>", 700: "<|im_end|>", 701: "<|im_start|>"}
    config: dict = {"eos_token": "<|im_end|>", "chat_template": CHATML, "legacy": False}
    if decoder:
        listed = {str(i): entry | {"content": name} for i, name in tokens.items()}
        config["added_tokens_decoder"] = listed
    sentencepiece(folder, config)
    added = {"<|im_end|>": 700, "<|im_start|>": 701}
    (folder / "added_tokens.json").write_text(json.dumps(added))


def gguf_file(folder: pathlib.Path, kind: str, **flags):
    """A GGUF file of a tokenizer alone, as llama.cpp's converter writes it."""
    import gguf

    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source"
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(1)
    if kind == "gpt2":
        made = json.loads(byte_bpe(source).to_str())
        vocab = {i: piece for piece, i in made["model"]["vocab"].items()}
        special = {token["id"]: token["content"] for token in made["added_tokens"]}
        pieces = [(vocab | special)[i] for i in range(len(vocab | special))]
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_types([3 if i in special else 1 for i in range(len(pieces))])
        writer.add_token_merges([" ".join(m) for m in made["model"]["merges"]])
        ids = [next(i for i, name in special.items() if name == wanted)
               for wanted in ("<|begin_of_text|>", "<|end_of_text|>")]  # fmt: skip
    else:
        import sentencepiece as library

        sentencepiece(source)
        model = library.SentencePieceProcessor(model_file=str(source / "tokenizer.model"))
        pieces = [model.IdToPiece(i) for i in range(model.GetPieceSize())]
        types = [2 if model.IsUnknown(i) else 3 if model.IsControl(i) else 6 if model.IsByte(i)
                 else 1 for i in range(len(pieces))]  # fmt: skip
        writer.add_token_scores([model.GetScore(i) for i in range(len(pieces))])
        writer.add_token_types(types)
        ids = [1, 2]
    writer.add_tokenizer_model(kind)
    writer.add_token_list(pieces)
    writer.add_bos_token_id(ids[0])
    writer.add_eos_token_id(ids[1])
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def meta(folder: pathlib.Path, family: str):
    """Meta's own tokenizer.model of Llama 3 or 4, from the package llama-models."""
    import importlib.util

    package = importlib.util.find_spec("llama_models")
    assert package is not None and package.origin is not None, "needs the extra [llama]"
    folder.mkdir(parents=True, exist_ok=True)
    data = (pathlib.Path(package.origin).parent / family / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(data)


def saved(folder: pathlib.Path, tokenizer):
    """The tokenizer of a run of ours."""
    tokenizer.save(folder)


# name -> (how it is made, whether `transformers` reads it: "", "folder" or "gguf")
SOURCES = {
    "tokenizer.json, BOS": (byte_bpe, "folder"),
    "tokenizer.json, no BOS": (lambda f: byte_bpe(f, bos=False), "folder"),
    "tokenizer.json, BOS and EOS": (lambda f: byte_bpe(f, eos=True), "folder"),
    "tokenizer.model, Llama 2": (lambda f: sentencepiece(f, {"legacy": False}), "folder"),
    "the same, legacy": (lambda f: sentencepiece(f, {"legacy": True}), "folder"),
    "the same, no BOS": (lambda f: sentencepiece(f, {"add_bos_token": False}), "folder"),
    "the same, EOS": (lambda f: sentencepiece(f, {"add_eos_token": True}), "folder"),
    "the same, no space before": (
        lambda f: sentencepiece(f, {"add_prefix_space": False}),
        "folder",
    ),
    "Meta's Llama 2 folder": (sentencepiece, ""),
    "ChatML fine-tune of Llama 2": (chatml, "folder"),
    "the same, added_tokens.json alone": (lambda f: chatml(f, decoder=False), ""),
    "GGUF, Llama 3": (lambda f: gguf_file(f, "gpt2", add_bos_token=True), "gguf"),
    "GGUF, Llama 3, no BOS": (lambda f: gguf_file(f, "gpt2", add_bos_token=False), ""),
    "GGUF, Llama 2": (lambda f: gguf_file(f, "llama", add_bos_token=True), "gguf"),
    "bytes": (lambda f: saved(f, tokenizers_of_puna.byte_tokenizer()), ""),
    "a BPE of ours": (lambda f: saved(f, tokenizers_of_puna.train_bpe(corpus(), 600)), ""),
    "Meta's Llama 3 folder": (lambda f: meta(f, "llama3"), ""),
    "Meta's Llama 4 folder": (lambda f: meta(f, "llama4"), ""),
}


def compare(name: str, folder: pathlib.Path, count: int) -> dict:
    """How many of `count` texts have other ids, or another text back, by who reads them."""
    from transformers import AutoTokenizer

    make, read_by_others = SOURCES[name]
    make(folder / "source")
    here = puna.load_tokenizer(folder / "source")
    here.save_for_hub(folder / "release")
    released = AutoTokenizer.from_pretrained(folder / "release")
    again = puna.load_tokenizer(folder / "release")
    original = None
    if read_by_others == "gguf":
        original = AutoTokenizer.from_pretrained(folder / "source", gguf_file="model.gguf")
    elif read_by_others:
        (folder / "source" / "config.json").write_text('{"model_type": "llama"}')
        original = AutoTokenizer.from_pretrained(folder / "source")
    wrong = dict.fromkeys(("transformers", "released", "again", "plain", "text"), 0)
    ends = here.end_ids if again.end_ids else ()
    for text in texts(here.special, count):
        ids = [*here.begin_ids, *here.encode(text, allow_special=True), *ends]
        if original is not None:
            wrong["transformers"] += original(text)["input_ids"] != ids
        wrong["released"] += released(text)["input_ids"] != ids
        read = again.encode(text, allow_special=True)
        wrong["again"] += [*again.begin_ids, *read, *again.end_ids] != ids
        plain = here.encode(text)
        wrong["plain"] += again.encode(text) != plain
        theirs = released(text, add_special_tokens=False)["input_ids"]
        wrong["text"] += here.decode(plain) != again.decode(plain) or here.decode(
            theirs, show_special=True
        ) != released.decode(theirs)
    result = {"source": name, "texts": count, "wrong": wrong}
    return result | {"transformers_reads_it": original is not None}


def main():
    """Print the table; exit status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=200)
    parser.add_argument("--json", help="write the results here, too")
    args = parser.parse_args()
    print("| source | `transformers` reads the source | and the release | puna reads the release | "
          "plain text | text back |\n|---|---|---|---|---|---|")  # fmt: skip
    results = []
    for name in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            result = compare(name, pathlib.Path(folder), args.texts)
        results.append(result)
        cells = ["equal" if not n else f"{n} differ" for n in result["wrong"].values()]
        if not result["transformers_reads_it"]:
            cells[0] = "does not"
        print("| " + " | ".join([name, *cells]) + " |", flush=True)
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(results, indent=1))
    raise SystemExit(any(any(r["wrong"].values()) for r in results))


if __name__ == "__main__":
    main()
