"""Learning a byte-level BPE with Llama 3's splitting into words."""

from collections.abc import Iterable

from ...configs.errors import UserError
from .kinds import LLAMA3_PATTERN

# What is appended to a vocabulary learnt here: Llama 4's names, so that its chat and image formats
# work too.
BPE_SPECIAL = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"),
    *("<|header_start|>", "<|header_end|>", "<|eot|>", "<|eom|>"),
    *("<|image_start|>", "<|image_end|>", "<|tile_x_separator|>", "<|tile_y_separator|>"),
    *("<|image|>", "<|patch|>"),
)


def train(texts: Iterable[str], vocab_size: int):
    """Return a `tokenizers.Tokenizer` learnt from `texts`; ids are as `tokenizer.train_bpe` says.

    Raises:
      UserError: no text at all, or no room for bytes and control tokens.
    """
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    smallest = 256 + len(BPE_SPECIAL)
    if vocab_size < smallest:
        raise UserError(
            f"a vocabulary of {vocab_size} has no room for 256 bytes and {len(BPE_SPECIAL)} "
            f"control tokens: ask for at least {smallest}"
        )
    characters = 0

    def counted():
        nonlocal characters
        for text in texts:
            characters += len(text)
            yield text

    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA3_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    # The control tokens come after training, so that their ids are the last and the corpus'
    # own mentions of them are learned as plain text.
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(BPE_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    model.train_from_iterator(counted(), trainer)
    if not characters:
        raise UserError("cannot train a tokenizer: the corpus holds no text")
    model.add_special_tokens(
        [tokenizers.AddedToken(name, special=True, normalized=False) for name in BPE_SPECIAL]
    )
    begin = BPE_SPECIAL[0]
    model.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin} $B",
        special_tokens=[(begin, model.token_to_id(begin))],
    )
    return model
