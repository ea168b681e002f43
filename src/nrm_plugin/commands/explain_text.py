"""Arguments and entry point of ``nrm-plugin explain-text``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from .options import add_computation, add_out

if TYPE_CHECKING:
    from ..attribution.text import TextExplanation

DESCRIPTION = """\
Shows which words are evidence for the prediction of a text model: a classifier, a masked or causal language model, or
an encoder-decoder model of the transformers library. The total relevance is 1; words in red, or marked +, are positive
evidence, and words in blue, or marked -, negative evidence. By default, the command explains the difference between the
predicted output and all others (see --against). If the tokenizer has a mask token, it explains how this difference
changes relative to a text in which all words are masked (see --reference)."""

EXAMPLES = """\
examples:
  nrm-plugin explain-text "never boring , never long" --model ./film-reviews
      a classifier in a folder, written by save_pretrained of model and tokenizer: the predicted class
  nrm-plugin explain-text "The capital of France is" --model ./gpt --target Paris --against Rome
      a causal language model: what makes it say one word rather than another
  nrm-plugin explain-text "Paris is the [MASK] of France." --model ./bert
      a masked language model
  nrm-plugin explain-text "a dull film" --model ./film-reviews --reference "a fine film"
      the change from the prediction for another text with the same number of tokens
  nrm-plugin explain-text "a dull film" --model ./film-reviews --reference none
      the prediction itself, by the rules of the default composite, without a reference
  nrm-plugin explain-text "a dull film" --model ./film-reviews --sites
      the names of heads, neurons and other parts, for the next two commands
  nrm-plugin explain-text "a dull film" --model ./film-reviews --layer blocks.5.attn
      the most relevant heads of a layer, with the words that each uses
  nrm-plugin explain-text "a dull film" --model ./film-reviews --given blocks.5.attn.head.3
      only the walks through one head, or 'blocks.4.mlp.neuron[7,12] & ~blocks.5.attn'
  nrm-plugin explain-text - --model ./film-reviews < texts.txt
      one text on each line of the input

files: texts.html, a page with all texts in color, and texts.json with all numbers, in the folder of --out. They are
overwritten by the next call.

exit status: 0; 1 if some texts could not be explained; 2 if none can be explained because of the options"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``explain-text``."""
    parser.add_argument("texts", nargs="+", metavar="TEXT", help="a text in quotes; - for one text per line of stdin")
    parser.add_argument("--model", required=True, metavar="FOLDER|NAME",
                        help="folder with config.json, weights and tokenizer; or a model on the hub")  # fmt: skip
    query = parser.add_argument_group("query")
    query.add_argument("--target", metavar="CLASS|TOKEN",
                       help="class by name or index, or token to explain (default: the most likely one)")  # fmt: skip
    query.add_argument("--against", default="rest", metavar="rest|none|CLASS|TOKEN",
                       help="explain the difference from all others, weighted by their softmax (rest), or from one of "
                       "them; none: the output alone (default: %(default)s)")  # fmt: skip
    query.add_argument("--reference", metavar="TEXT|TOKEN|none",
                       help="explain the change from this text, which must have the same number of tokens, or from a "
                       "text in which this token replaces all but special tokens; none: the prediction itself "
                       "(default: the mask token, if the tokenizer has one and no --composite, --gain-limit or "
                       "--residual sink is given)")  # fmt: skip
    query.add_argument("--position", type=int, metavar="N",
                       help="token whose prediction is explained, if the model predicts several")  # fmt: skip
    query.add_argument("--layer", action="append", default=[], metavar="LAYER", dest="layers",
                       help="list the most relevant heads or channels of this layer; may be repeated")  # fmt: skip
    query.add_argument("--given", action="append", default=[], metavar="EVENT",
                       help="only the walks through these heads or neurons; may be repeated")  # fmt: skip
    query.add_argument("--sites", action="store_true",
                       help="list the names of attention, neurons and residual stream, and stop")  # fmt: skip
    query.add_argument("--color", choices=("auto", "always", "never"), default="auto",
                       help="colors in the terminal (default: in a terminal, unless NO_COLOR is set)")  # fmt: skip
    add_computation(parser, None)
    add_out(parser, "nrm-explained")


def run(options: argparse.Namespace) -> int:
    """Explains the texts and returns the exit status."""
    from .hub_names import is_offline

    is_local = is_offline(options.model)  # raises for a wrong name before anything slow is imported
    from .output_files import check_folder
    from .request import check_device
    from .resolved_options import one_line_warnings, request_of
    from .text_models import text_model
    from .texts import Texts, reference_of, texts_of, write

    with one_line_warnings():
        options.reference = reference_of(options)
        request = request_of(options)
        texts = texts_of(options.texts)
        if not options.sites:
            check_folder(options.out)
        loaded = text_model(options.model, check_device(options.device), is_local)
        for note in loaded.notes:
            print(f"nrm-plugin: warning: {note}", file=sys.stderr)
        work = Texts(loaded, request, options)
        if options.sites:
            for line in work.sites(texts[0]):
                print(line)
            return 0
        results: list[TextExplanation] = []
        problems: list[str] = []
        for text in texts:
            _explain(work, text, results, problems, options)
        if results:
            for path in write(results, loaded, request, options):
                print(f"-> {path}")
    return _problems(problems, options)


def _explain(work: Any, text: str, results: Any, problems: list[str], options: argparse.Namespace) -> None:
    from ..errors import NRMError

    try:
        explanation = work.explained(text)
    except NRMError as error:
        if len(options.texts) == 1 and options.texts != ["-"]:
            raise
        problems.append(f"{text[:60]!r}: {error}")
        return
    columns = _columns()
    for line in explanation.lines(columns, is_colored(options.color)):
        print(line)
    print(flush=True)
    results.append(explanation)


def _problems(problems: list[str], options: argparse.Namespace) -> int:
    from .image_loop import print_problems

    return print_problems(problems, options.name)


def _columns() -> int:
    import shutil

    return min(shutil.get_terminal_size((80, 24)).columns, 120)


def is_colored(choice: str) -> bool:
    """Returns True if output is to be colored: as requested or, for ``"auto"``, if the terminal supports colors."""
    if choice != "auto":
        return choice == "always"
    is_terminal = sys.stdout is not None and sys.stdout.isatty()  # None where the caller closed it
    return is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


__all__ = ["DESCRIPTION", "EXAMPLES", "add_arguments", "is_colored", "run"]
