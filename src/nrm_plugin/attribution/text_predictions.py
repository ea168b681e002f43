"""Prediction tasks of Hugging Face Transformers models: classes, masked tokens and next tokens."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import InputError, NRMError, TargetError, brief, is_out_of_memory
from .words import Tokens, merged

Kind = Literal["class", "mask", "next", "token"]
MOST_TOKENS = 1 << 20


@dataclass(frozen=True)
class Task:
    """Prediction task: a text and the prediction of a model for it.

    Attributes:
        kind: ``"class"`` for the class of the text, ``"mask"`` for the token at a mask, ``"next"`` for the next token,
            or ``"token"`` for the class of one token.
        text: The text with its tokens and words.
        inputs: Token ids keyed by model argument. Their embeddings receive relevance.
        others: Additional keyword arguments for the model.
        position: Index of the token whose prediction is explained, or None if the class of the text is explained.
        logits: Logits of the prediction, of shape ``(K,)``.
        labels: Names of the classes, or empty if each class is a token of the tokenizer.
        tokenizer: Tokenizer that produced the token ids.
    """

    kind: Kind
    text: Tokens
    inputs: dict[str, Tensor]
    others: dict[str, Any]
    position: int | None
    logits: Tensor
    labels: tuple[str, ...]
    tokenizer: Any

    def output(self, returned: Any) -> Tensor:
        """Extracts the prediction logits, with shape ``(1, K)``, from the model's return value."""
        logits: Tensor = returned["logits"] if isinstance(returned, dict) else returned
        return logits if self.position is None else logits[:, self.position]

    def name(self, index: int) -> str:
        """Returns the name of a class, or the text of a token."""
        if self.labels:
            return self.labels[index]
        token = str(self.tokenizer.convert_ids_to_tokens(index))
        decoded = str(self.tokenizer.decode([index]))
        return decoded if decoded.strip() and "\ufffd" not in decoded else token

    def index(self, wanted: Any, argument: str) -> int:
        """Returns the output index of a class or token.

        Args:
            wanted: Name or index.
            argument: Name of the argument, for error messages.

        Raises:
            TargetError: If there is no such class or the word is not a single token.
        """
        count = len(self.logits)
        if isinstance(wanted, str) and self.labels and wanted.strip().isdecimal() and wanted not in self.labels:
            wanted = int(wanted)
        if isinstance(wanted, int) and not isinstance(wanted, bool):
            if not 0 <= wanted < count:
                raise TargetError(
                    f"{argument}={wanted} is out of range: the model has {count} outputs, 0 to {count - 1}."
                )
            return wanted
        if not isinstance(wanted, str) or not wanted:
            raise TargetError(f"{argument}={brief(wanted)} is neither a name nor an index of an output.")
        return self._label(wanted, argument) if self.labels else self._token(wanted, argument)

    def _label(self, wanted: str, argument: str) -> int:
        folded = [label.casefold() for label in self.labels]
        exact = [number for number, label in enumerate(self.labels) if label == wanted]
        matches = exact or [number for number, label in enumerate(folded) if label == wanted.casefold()]
        if len(matches) > 1:
            raise TargetError(
                f"{argument}={wanted!r} is the name of {len(matches)} classes. Give the index: {matches}."
            )
        if matches:
            return matches[0]
        near = difflib.get_close_matches(wanted.casefold(), folded, n=3, cutoff=0.4) or folded[:8]
        listed = ", ".join(repr(self.labels[folded.index(name)]) for name in near)
        raise TargetError(
            f"{argument}={wanted!r} is not a class of the model. Its classes are {listed}. An index is also accepted."
        )

    def _token(self, wanted: str, argument: str) -> int:
        """Returns the id of a single-token word, preferring the token with a leading space."""
        known = self.tokenizer.get_vocab()
        for spelling in (f"Ġ{wanted}", f"▁{wanted}", wanted):
            if spelling in known and not wanted.startswith((" ", "Ġ", "▁")):
                return int(known[spelling])
        ids = self.tokenizer.encode(wanted, add_special_tokens=False)
        if len(ids) == 1 and (ids[0] != self.tokenizer.unk_token_id or wanted == self.tokenizer.unk_token):
            return int(ids[0])
        if not ids or self.tokenizer.unk_token_id in ids:
            raise TargetError(
                f"{argument}={wanted!r} is not in the vocabulary. Give another word, or the id of a token."
            )
        parts = self.tokenizer.convert_ids_to_tokens(ids)
        raise TargetError(
            f"{argument}={wanted!r} consists of {len(ids)} tokens, {', '.join(map(repr, parts))}, but the model "
            f"predicts one token at a time. Give one of them, such as {argument}={parts[0]!r}, or a word of one token."
        )


def _first_token(model: nn.Module) -> int:
    """Returns the decoder's start token, as used by ``generate`` in transformers."""
    for name in ("decoder_start_token_id", "bos_token_id"):
        for settings in ("config", "generation_config"):
            token = getattr(getattr(model, settings, None), name, None)
            if isinstance(token, int):
                return token
    raise InputError(
        f"{type(model).__name__} has neither decoder_start_token_id nor bos_token_id in its config, so it is not known "
        "where decoding starts. Set model.config.decoder_start_token_id."
    )


def task_of(model: nn.Module, tokenizer: Any, text: str, position: int | None) -> Task:
    """Tokenizes a text and infers the prediction task by running the model.

    Raises:
        InputError: If the model does not return logits for classes or tokens or ``position`` is missing or invalid.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    tokens, others = tokenized(tokenizer, text, device)
    others = _accepted(model, others)
    inputs, config = {"input_ids": tokens.ids}, getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) and not _is_classifier(model):
        start = _first_token(model)
        # A text of one token has two start tokens, so that the shapes differ. The first does not attend to the second.
        inputs["decoder_input_ids"] = torch.full((1, 2 if tokens.ids.shape[1] == 1 else 1), start, device=device)
    logits = _logits(model, inputs, others)
    labels = _labels(config, logits.shape[-1])
    if logits.ndim == 2:
        if position is not None:
            raise InputError(
                f"position={position} applies to models that predict tokens, but this model predicts one class per "
                "text."
            )
        _check_classes(model, logits, tokens)
        return Task("class", tokens, inputs, others, None, logits[0], labels, tokenizer)
    if "decoder_input_ids" in inputs:
        return Task("next", tokens, inputs, others, 0, logits[0, 0], (), tokenizer)
    is_vocabulary = logits.shape[-1] >= len(tokenizer) or logits.shape[-1] == getattr(config, "vocab_size", None)
    masks = (tokens.ids[0] == (-1 if tokenizer.mask_token_id is None else tokenizer.mask_token_id)).nonzero().flatten()
    kind: Kind
    if not is_vocabulary:
        kind, place = "token", _place(position, tokens, "the class of each token")
    elif len(masks) and position is None:
        if len(masks) > 1:
            raise InputError(f"the text has {len(masks)} masks; choose one by position=, from {masks.tolist()}.")
        kind, place = "mask", int(masks[0])
    elif _looks_ahead(model, inputs, others, logits):
        mask = tokenizer.mask_token or "a mask"
        hint = f"the tokens behind masks. Put {mask} into the text, or give position="
        kind, place = "mask", _place(position, tokens, hint)
    else:
        kind, place = "next", -1 % tokens.ids.shape[1] if position is None else _place(position, tokens, "")
    return Task(kind, tokens, inputs, others, place, logits[0, place], () if is_vocabulary else labels, tokenizer)


def tokenized(tokenizer: Any, text: str, device: torch.device) -> tuple[Tokens, dict[str, Tensor]]:
    """Tokenizes a text. Returns the tokens and all other outputs of the tokenizer, such as the attention mask.

    Raises:
        InputError: If the text is not a string, has no tokens, or has more tokens than the model accepts.
    """
    if not isinstance(text, str):
        raise InputError(f"text is {brief(text)}, expected a string.")
    if not text.isascii() and text != text.encode("utf-8", "replace").decode("utf-8"):
        raise InputError(f"the text {ascii(text)[:60]} is not valid Unicode: it contains a surrogate. Remove it.")
    encoded = tokenizer(text, return_tensors="pt")
    ids = encoded["input_ids"].to(device)
    if not ids.numel():
        raise InputError(f"the text {text!r} has no tokens. Give at least one word.")
    longest = int(getattr(tokenizer, "model_max_length", MOST_TOKENS))
    if ids.shape[1] > longest:
        raise InputError(
            f"the text has {ids.shape[1]} tokens, but the model accepts at most {longest}. Shorten the text."
        )
    listed: list[int] = ids[0].tolist()
    fast = encoded.encodings[0] if getattr(encoded, "encodings", None) else None
    names = tuple(str(token) for token in tokenizer.convert_ids_to_tokens(listed))
    words = merged(text, listed, names, set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}, fast)
    others = {key: value.to(device) for key, value in encoded.items() if key != "input_ids"}
    return Tokens(text, ids, names, words), others


def _accepted(model: nn.Module, others: dict[str, Any]) -> dict[str, Any]:
    """Returns the tokenizer outputs that the model accepts. DistilBERT and T5, for example, take no segment ids."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return others
    return {key: value for key, value in others.items() if key in parameters}


def _check_classes(model: nn.Module, logits: Tensor, tokens: Tokens) -> None:
    """Raises :class:`InputError` for a model with one number per token, such as the discriminator of ELECTRA."""
    known = getattr(getattr(model, "config", None), "num_labels", logits.shape[1])
    if logits.shape[1] == tokens.ids.shape[1] != known:
        raise InputError(
            f"{type(model).__name__} returns one number for each of the {logits.shape[1]} tokens, not one for each of "
            "its classes. Wrap it in a module that returns the logits of one class of interest, (1, K)."
        )


def _logits(model: nn.Module, inputs: dict[str, Tensor], others: dict[str, Any]) -> Tensor:
    try:
        with torch.no_grad():
            returned = model(**inputs, **others)
    except Exception as error:  # anything that a model raises for ids that it does not expect
        if isinstance(error, NRMError) or is_out_of_memory(error):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:240]
        raise InputError(f"{_misfit(model, inputs['input_ids'])} ({reason})") from error
    logits = returned.get("logits") if isinstance(returned, dict) else returned
    if not isinstance(logits, Tensor) or logits.ndim not in (2, 3) or len(logits) != 1:
        keys = f" with {', '.join(returned)}" if isinstance(returned, dict) else ""
        raise InputError(
            f"{type(model).__name__} returned {type(returned).__name__}{keys}, but logits of a class, (1, K), or of "
            "tokens, (1, T, K), are needed. Load the model with its head, such as AutoModelForSequenceClassification."
        )
    return logits


def _misfit(model: nn.Module, ids: Tensor) -> str:
    """Describes why a model fails on token ids: too many ids, ids from another tokenizer, or an unknown reason."""
    config, name = getattr(model, "config", None), type(model).__name__
    count, largest = ids.shape[1], int(ids.max())
    rows = getattr(config, "vocab_size", None) or largest + 1
    if largest >= rows:
        return (
            f"the tokenizer has the id {largest}, but the ids of {name} end at {rows - 1}. Give the tokenizer of this "
            "model."
        )
    places = getattr(config, "max_position_embeddings", None) or count
    if count > places:
        return f"the text has {count} tokens, but {name} has {places} positions. Shorten the text."
    return (
        f"{name} fails on the {count} tokens of the text. A model of transformers for a class or for tokens is needed, "
        "such as AutoModelForSequenceClassification, with its tokenizer."
    )


def _is_classifier(model: nn.Module) -> bool:
    return type(model).__name__.endswith("ForSequenceClassification")


def _labels(config: Any, count: int) -> tuple[str, ...]:
    known = getattr(config, "id2label", None) or {}
    return tuple(str(known.get(index, known.get(str(index), f"class {index}"))) for index in range(count))


def _looks_ahead(model: nn.Module, inputs: dict[str, Tensor], others: dict[str, Any], logits: Tensor) -> bool:
    """Returns True if the logits of the first token depend on the last token, as in masked language models."""
    ids = inputs["input_ids"]
    if ids.shape[1] < 2:
        return False
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % max(2, logits.shape[-1])
    other = _logits(model, {**inputs, "input_ids": changed}, others)
    return not torch.allclose(other[0, 0], logits[0, 0], rtol=1e-4, atol=1e-5)


def _place(position: int | None, tokens: Tokens, predicted: str) -> int:
    count = len(tokens.tokens)
    if position is None:
        listed = _enumerated(tokens.tokens)
        raise InputError(
            f"this model predicts {predicted}{'' if predicted.endswith('=') else ': give position='}, one of {listed}."
        )
    if not isinstance(position, int) or isinstance(position, bool):
        raise InputError(
            f"position={brief(position)} is not the index of a token, one of {_enumerated(tokens.tokens)}."
        )
    if not -count <= position < count:
        raise InputError(
            f"position={position} is out of range: the text has {count} tokens, {_enumerated(tokens.tokens)}."
        )
    return position % count


def _enumerated(tokens: Sequence[str], most: int = 30) -> str:
    text = ", ".join(f"{number} {token!r}" for number, token in enumerate(tokens[:most]))
    return text + (", …" if len(tokens) > most else "")


__all__ = ["Kind", "Task", "task_of", "tokenized"]
