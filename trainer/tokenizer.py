"""Text to token ids and back, with one face for every model: folder, GGUF file or made up.

transformers' fast tokenizers do the work, also where they are built here from a GGUF file's fields.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import tokenizers
from jinja2 import TemplateError
from tokenizers import AddedToken, Regex, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trainer.architecture import ModelError

# Llama 3's template puts today's date in the prompt unless it is given one: a run must not depend
# on the day. This is the date that the template itself falls back to.
TEMPLATE_DATE = "26 Jul 2024"

CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A model's tokenizer and chat template.

    Attributes:
        backend: transformers' tokenizer object.
        eos_ids: tokens that end a completion, at least one; the tokenizer's own first.
        pad_id: fills rows up to a common length. It may be one of `eos_ids`: masks and lengths
            tell padding from tokens, never the id.
        size: tokens it knows; the model's vocabulary is often padded to more.
    """

    backend: Any
    eos_ids: tuple[int, ...]
    pad_id: int
    size: int

    @property
    def bos_id(self) -> int | None:
        """The token that starts a text, if the model has one."""
        return self.backend.bos_token_id

    def render_chat(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The messages in the model's chat format, ending where the assistant is to answer.

        Args:
            messages: each with "role" and "content".

        Raises:
            ModelError: the model has no chat template, or its template refuses the messages.
        """
        if self.backend.chat_template is None:
            raise ModelError(
                "the model has no chat template, so prompts cannot be written for it; "
                "take its -Instruct or -chat version, or add chat_template.jinja to a local folder"
            )
        try:
            return self.backend.apply_chat_template(
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=True,
                date_string=TEMPLATE_DATE,
            )
        except TemplateError as error:
            roles = [message.get("role") for message in messages]
            raise ModelError(
                f"the chat template refuses messages of roles {roles}: {error}"
            ) from error

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of `render_chat`; the template itself writes the start token, if any."""
        return self.encode(self.render_chat(messages))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, nothing added; special tokens in the text become their ids."""
        return self.backend.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, special tokens left out, spaces as they were sampled.

        Ids past the tokenizer's size (a padded vocabulary can sample them) give no text.
        """
        known = [int(token) for token in ids if int(token) < self.size]
        return self.backend.decode(
            known, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def save(self, folder: FilePath) -> None:
        """Write the files that transformers' AutoTokenizer reads."""
        self.backend.save_pretrained(str(folder))


def from_folder(folder: FilePath, *, eos_ids: Sequence[int], pad_id: int | None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Args:
        folder: with tokenizer.json, or what AutoTokenizer makes one of.
        eos_ids: what config.json and generation_config.json name.
        pad_id: what config.json names.

    Raises:
        ModelError: no tokenizer there, or nothing says which token ends a completion.
    """
    try:
        backend = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{folder}: its tokenizer cannot be read ({error}); "
            "wanted: tokenizer.json and tokenizer_config.json beside config.json"
        ) from error
    return _finished(backend, eos_ids=eos_ids, pad_id=pad_id, source=str(folder))


def _finished(
    backend: Any, *, eos_ids: Sequence[int], pad_id: int | None, source: str
) -> Tokenizer:
    own = [] if backend.eos_token_id is None else [backend.eos_token_id]
    ends = tuple(dict.fromkeys([*own, *eos_ids]))
    if not ends:
        raise ModelError(
            f"{source}: nothing says which token ends a completion; "
            "add eos_token_id to generation_config.json"
        )
    pads = (backend.pad_token_id, pad_id, ends[0])  # Llama 3 names no pad token: any will do
    return Tokenizer(
        backend=backend,
        eos_ids=ends,
        pad_id=next(pad for pad in pads if pad is not None),
        size=len(backend),  # kept: asking takes milliseconds, it counts the whole vocabulary
    )


# How llama.cpp's names of pre-tokenizers split text: (regular expression or None, digits one by
# one, merges ignored for whole words, text normalized to NFC). From the tokenizer.json of SmolLM2,
# Qwen2.5 and Llama 3.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[str, tuple[str | None, bool, bool, bool]] = {
    "default": (None, False, False, False),
    "gpt-2": (None, False, False, False),
    "smollm": (None, True, False, False),
    "qwen2": (_WORDS % "", False, False, True),
    "llama-bpe": (_WORDS % "{1,3}", False, True, False),
}
_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types: special, and whole but ordinary text


def from_gguf(metadata: Mapping[str, Any], *, source: str) -> Tokenizer:
    """The byte-level BPE tokenizer that GGUF metadata describes.

    Args:
        metadata: the file's fields, "tokenizer.ggml.tokens" and so on.
        source: the file, for errors.

    Raises:
        ModelError: another kind of tokenizer, or a way to split text that is not known here.
    """

    def get(key: str) -> Any:
        return metadata.get(f"tokenizer.ggml.{key}")

    kind, split = get("model"), get("pre")
    if kind != "gpt2" or split not in _SPLITS:
        raise ModelError(
            f"{source}: tokenizer.ggml.model = {kind!r}, tokenizer.ggml.pre = {split!r}; "
            f"supported: 'gpt2' with one of {', '.join(_SPLITS)}; "
            "take the model's Hugging Face folder instead"
        )
    tokens, types = get("tokens"), get("token_type")
    backend = _byte_level_bpe(
        {token: id_ for id_, token in enumerate(tokens)},
        merges=[_pair(merge) for merge in get("merges")],
        split=_SPLITS[split],
        special=[t for t, kind in zip(tokens, types, strict=True) if kind == _CONTROL],
        whole=[t for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED],
    )
    named = {
        role: tokens[get(key)]
        for role, key in {
            "bos_token": "bos_token_id",
            "eos_token": "eos_token_id",
            "unk_token": "unknown_token_id",
            "pad_token": "padding_token_id",
        }.items()
        if get(key) is not None
    }
    turn_end = [] if get("eot_token_id") is None else [get("eot_token_id")]
    fast = _fast(backend, template=metadata.get("tokenizer.chat_template"), named=named)
    return _finished(fast, eos_ids=turn_end, pad_id=None, source=source)


def tiny_tokenizer() -> Tokenizer:
    """A token a byte, whose id is the byte, then the three special tokens of ChatML."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*_byte_letters(), *special]
    backend = _byte_level_bpe(
        {token: id_ for id_, token in enumerate(tokens)},
        merges=[],
        split=_SPLITS["gpt-2"],
        special=special,
        whole=[],
    )
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = _fast(backend, template=CHATML, named=named)
    return _finished(fast, eos_ids=[], pad_id=None, source="tiny")


def _pair(merge: str) -> tuple[str, str]:
    left, right = merge.split(" ", 1)
    return left, right


def _byte_letters() -> list[str]:
    """GPT-2's letter for each byte: itself if it prints, else the next free one from 256 up."""
    printing = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printing else next(others)) for byte in range(256)]


def _byte_level_bpe(
    vocab: dict[str, int],
    *,
    merges: list[tuple[str, str]],
    split: tuple[str | None, bool, bool, bool],
    special: list[str],
    whole: list[str],
) -> Any:
    """A `tokenizers.Tokenizer`; see `_SPLITS` for `split`."""
    words, digits, ignore_merges, nfc = split
    tokenizer: Any = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges)
    )
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    steps: list[Any] = [pre.Digits(individual_digits=True)] if digits else []
    if words is not None:
        steps.append(pre.Split(Regex(words), behavior="isolated"))
    steps.append(pre.ByteLevel(add_prefix_space=False, use_regex=words is None))
    tokenizer.pre_tokenizer = pre.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in whole])
    return tokenizer


def _fast(backend: Any, *, template: str | None, named: dict[str, str]) -> Any:
    fast = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **named
    )
    fast.chat_template = template
    return fast
