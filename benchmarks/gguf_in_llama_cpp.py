"""Does a model of ours run in llama.cpp? Ids and greedy tokens of GGUF files written here, in both.

    python benchmarks/gguf_in_llama_cpp.py            (needs the extras [reference,gguf])

Makes tiny Llamas with tokenizers of three kinds, one with Llama 3.1's RoPE scaling, writes them by
`convert(..., to="gguf")`, and lets llama.cpp (built from source in .cache/llama-cpp, five minutes
the first time) tokenize prompts and continue them by 32 greedy tokens.
"""

import json
import pathlib
import subprocess
import sys
import tempfile

import tokenizer_table

import puna
from puna.models.decode.generate import complete
from puna.models.release.convert import convert
from puna.models.text.tokenizer import train_bpe

HOME = pathlib.Path(__file__).resolve().parent.parent / ".cache" / "llama-cpp"
PROMPTS = ("The model is", "def f(x):\n    return", "héllo 🦙 world 123")
SCALED = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
# name -> (what writes the tokenizer, more of the model's configuration)
MODELS = {
    "tokenizer.json, scaled RoPE": (tokenizer_table.byte_bpe, {"rope_parameters": SCALED}),
    "tokenizer.model": (lambda folder: tokenizer_table.sentencepiece(folder, {}), {}),
    "a BPE of ours": (lambda f: train_bpe(tokenizer_table.corpus(), 700).save(f), {}),
}
ASK = """
import json, sys
from llama_cpp import Llama
path, asked = sys.argv[1], json.loads(sys.argv[2])
# Keys and values in float32 (0), as here; llama.cpp would round them to float16.
model = Llama(path, n_ctx=256, verbose=False, type_k=0, type_v=0)
for prompt, ids, wanted in asked:
    found = model.tokenize(prompt.encode(), add_bos=True, special=False)
    model.reset()
    made = []
    for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
        made.append(token)
        if len(made) >= len(wanted):
            break
    print(json.dumps([found == ids, made == wanted]))
"""


def llama_cpp() -> pathlib.Path:
    """The Python of an environment with llama.cpp, which is made if it is not there."""
    python = HOME / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", HOME], check=True)
        pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        subprocess.run([*pip, "llama-cpp-python"], check=True)
    return python


def main() -> None:
    """Compare and print; exit status 1 if anything differs."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    python, same = llama_cpp(), True
    for name, (save, more) in MODELS.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            torch.manual_seed(0)
            model = LlamaForCausalLM(LlamaConfig(
                vocab_size=700, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, **more,
            ))  # fmt: skip
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, float(parameter.ndim == 1), 0.1)
            model.save_pretrained(folder / "model")
            (folder / "model" / "generation_config.json").unlink()
            save(folder / "model")
            convert(folder / "model", folder / "model.gguf", to="gguf")
            tokenizer = puna.load_tokenizer(folder / "model")
            made = complete(*puna.load(folder / "model"), tokenizer, PROMPTS, max_tokens=32)
            asked = [
                [text, [*tokenizer.begin_ids, *tokenizer.encode(text)], row.ids]
                for text, row in zip(PROMPTS, made, strict=True)
            ]
            command = [python, "-c", ASK, folder / "model.gguf", json.dumps(asked)]
            told = subprocess.run(command, check=True, capture_output=True, text=True, cwd=folder)
        found = [json.loads(line) for line in told.stdout.splitlines()]
        same &= len(found) == len(PROMPTS) and all(map(all, found))
        ids, tokens = (sum(column) for column in zip(*found, strict=True))
        print(
            f"{name}: {ids} of {len(PROMPTS)} prompts have the same ids, {tokens} the same tokens"
        )
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
