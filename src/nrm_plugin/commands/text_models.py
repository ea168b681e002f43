"""Loading of Hugging Face Transformers models and their tokenizers from a local folder or by name."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..errors import extra, printable
from .hub_names import TextModelError, is_offline

HEADS = ("ForSequenceClassification", "ForMaskedLM", "ForCausalLM", "ForSeq2SeqLM", "ForTokenClassification")
"""Suffixes of ``AutoModel`` classes, tried in this order if the configuration names no class."""
REASON = 240
"""Maximum number of characters shown from a transformers message."""


@dataclass(frozen=True)
class TextModel:
    """A text model and its tokenizer.

    Attributes:
        name: Model name or path, as given by the user.
        model: The model with its prediction head, in evaluation mode.
        tokenizer: The tokenizer that belongs to the model.
        notes: Messages for the user.
    """

    name: str
    model: nn.Module
    tokenizer: Any
    notes: tuple[str, ...] = ()


def text_model(name: str, device: Any = "cpu", is_local: bool | None = None) -> TextModel:
    """Loads a model and its tokenizer.

    Args:
        name: A folder with ``config.json``, weights and tokenizer, or a model name on the Hugging Face Hub.
        device: Device on which to run the model.
        is_local: Whether to load the model without the network. None calls
            :func:`~nrm_plugin.commands.hub_names.is_offline` to find out.

    Raises:
        MissingExtraError: If transformers is not installed.
        TextModelError: If a file is missing, the name is unknown, or the model has no prediction head.
    """
    library = extra("transformers", "text")
    if is_local is None:
        is_local = is_offline(name)
    with _quiet(library):
        config = _loaded(
            name, "configuration", lambda: library.AutoConfig.from_pretrained(name, local_files_only=is_local)
        )
        kind = _class_of(library, config, name)
        options = {"local_files_only": is_local, "output_loading_info": True}
        model, info = _loaded(name, "weights", lambda: kind.from_pretrained(name, **options))
        tokenizer = _loaded(
            name, "tokenizer", lambda: library.AutoTokenizer.from_pretrained(name, local_files_only=is_local)
        )
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # built from the configuration alone
        raise TextModelError(
            f"{printable(name)} contains no tokenizer. Save it there: tokenizer.save_pretrained(folder)."
        )
    missing = sorted(info.get("missing_keys", ()))
    notes = [f"these weights are not in {printable(name)} and are random: {', '.join(missing[:5])}"] if missing else []
    return TextModel(name, model.float().to(device).eval(), tokenizer, tuple(notes))


def _class_of(library: Any, config: Any, name: str) -> Any:
    """Returns the class that saved the model, or the first ``AutoModel`` class that supports its configuration."""
    for architecture in getattr(config, "architectures", None) or ():
        kind = getattr(library, architecture, None)
        if kind is not None:
            if not any(part in architecture for part in ("For", "LMHead", "DoubleHeads")):
                raise TextModelError(
                    f"{printable(name)} holds {architecture}, which has no head and predicts nothing. Give a "
                    "fine-tuned model that was saved with its head, such as AutoModelForSequenceClassification."
                )
            return kind
    for end in HEADS:
        kind = getattr(library, f"AutoModel{end}")
        if type(config) in kind._model_mapping:
            return kind
    raise TextModelError(
        f"{printable(name)} is a {getattr(config, 'model_type', 'model')} of no known class with a head. Give a model "
        f"of: {', '.join(f'AutoModel{end}' for end in HEADS)}; in Python, explain_text(model, tokenizer, text) takes "
        "any."
    )


def _loaded(name: str, what: str, load: Any) -> Any:
    try:
        return load()
    except MemoryError:
        raise
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and errors of the hub's client
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= REASON else f"{reason[:REASON]}…"
        hint = "" if Path(name).exists() else f" There is no folder {printable(name)} either: check the path."
        raise TextModelError(f"cannot load the {what} of {printable(name)}: {printable(reason)}{hint}") from error


@contextlib.contextmanager
def _quiet(library: Any) -> Iterator[None]:
    """Context manager that silences the transformers library. Missing weights are reported as notes instead."""
    logger = logging.getLogger("transformers")
    level = logger.level
    library.logging.set_verbosity_error()
    library.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
        library.logging.enable_progress_bar()


__all__ = ["TextModel", "TextModelError", "text_model"]
