"""The tokenizer of a run: made once, kept in the run's folder, the same ever after."""

import shutil

from ...configs import patterns, storage
from ...configs.errors import ConfigError
from ...configs.schema import Config, DataConfig
from ...models.parallel.processes import is_first
from ...models.text.tokenizer import Tokenizer, byte_tokenizer, load_tokenizer, train_bpe
from ...models.weights import run
from ..resilience.mirror import Mirror
from .quarantine import Quarantine
from .sources import iter_text

FOLDER = "tokenizer"


def prepare_tokenizer(
    config: Config, mirror: Mirror, quarantine: Quarantine | None = None
) -> Tokenizer:
    """The run's tokenizer: that of its checkpoints, else what `data.tokenizer` says.

    Of several processes the first has to go first; the others take what it has made. The quarantine
    takes the bad records of the data that a tokenizer is trained on.

    Args:
      mirror: of the run's folder, which may have checkpoints; the tokenizer's files go into it.

    Raises:
      UserError: no such tokenizer, or one with more ids than the model has.
    """
    data, folder = config.data, mirror.folder / FOLDER
    if run.steps(mirror.home):
        tokenizer = load_tokenizer(mirror.home)
    elif not is_first():
        tokenizer = load_tokenizer(folder)
    elif data.tokenizer == "bytes":
        tokenizer = byte_tokenizer()
    elif data.tokenizer == "train":
        print(f"training a tokenizer of {data.tokenizer_vocab} ids on {data.train}", flush=True)
        texts = iter_text(data, data.train, quarantine)
        tokenizer = train_bpe(texts, data.tokenizer_vocab)
    else:
        tokenizer = load_tokenizer(storage.anywhere(data.tokenizer, "data.tokenizer"))
        tokenizer = tokenizer.with_tokens(patterns.names(data.new_tokens))
    tokenizer = with_ends(data, tokenizer)
    if tokenizer.vocab_size > config.model.embedding_rows:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size} must be at least the "
            f"{tokenizer.vocab_size} ids of data.tokenizer={data.tokenizer}"
        )
    if is_first() and not run.steps(mirror.home):
        # What an attempt with another tokenizer may have left.
        shutil.rmtree(folder, ignore_errors=True)
        tokenizer.save(folder)
    return tokenizer


def with_ends(data: DataConfig, tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with what `data.add_bos` and `data.add_eos` say of the ends of a text.

    Raises:
      UserError: they ask for a token that it lacks.
    """
    told = {"auto": None, "always": True, "never": False}
    return tokenizer.with_ends(told[data.add_bos], told[data.add_eos])


def tokenizer_files(mirror: Mirror) -> dict[str, bytes]:
    """The files of the run's tokenizer by name, for its checkpoints."""
    if run.steps(mirror.home):
        return run.tokenizer_files(run.find(mirror.home))
    return {p.name: p.read_bytes() for p in sorted((mirror.folder / FOLDER).iterdir())}
