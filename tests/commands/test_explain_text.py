"""The command `explain-text`, with a stand-in for transformers.

Covers: nrm_plugin.commands.text_models, nrm_plugin.commands.texts.
"""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nrm_plugin import Normalized, NRMDefault, explain_text
from nrm_plugin.commands import text_models
from nrm_plugin.commands.cli import main
from nrm_plugin.commands.explain_text import is_colored
from nrm_plugin.errors import MissingExtraError
from tests.text_nets import StubTokenizer, text_net

TEXT = "a dull boring film"


class StubLibrary:
    """What the command uses of transformers: classes by name, and ``from_pretrained``."""

    logging = SimpleNamespace(set_verbosity_error=int, disable_progress_bar=int, enable_progress_bar=int)

    def __init__(self, kind: str = "class", architectures: Any = ("NetForSequenceClassification",)) -> None:
        self.kind, self.missing = kind, list[str]()
        self.config = SimpleNamespace(architectures=architectures, model_type="net")
        self.AutoConfig = SimpleNamespace(from_pretrained=lambda *_, **__: self.config)
        self.AutoTokenizer = SimpleNamespace(from_pretrained=self._tokenizer)
        model = SimpleNamespace(from_pretrained=self._model, _model_mapping={})
        self.NetForSequenceClassification = self.NetForCausalLM = self.NetModel = model
        for head in text_models.HEADS:
            setattr(self, f"AutoModel{head}", model)

    def _tokenizer(self, *_: Any, **__: Any) -> StubTokenizer:
        return StubTokenizer(has_class_token=self.kind != "next")

    def _model(self, *_: Any, **options: Any) -> Any:
        assert options["output_loading_info"]
        return text_net(self.kind), {"missing_keys": self.missing}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net").mkdir()
    (tmp_path / "net/config.json").write_text("{}")
    return tmp_path


def using(monkeypatch: pytest.MonkeyPatch, library: Any) -> None:
    monkeypatch.setattr(text_models, "extra", lambda *_: library)


@pytest.mark.medium
def test_texts_are_explained_as_by_the_function(folder, monkeypatch, capsys):
    using(monkeypatch, StubLibrary())
    assert main(["explain-text", TEXT, "never dull", "--model", "net", "--layer", "blocks.1.attn.z"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("predicted class") == 2
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) <= 80
    stored = json.loads((folder / "nrm-explained/texts.json").read_text())
    expected = explain_text(text_net("class").float(), StubTokenizer(), TEXT)
    assert stored["texts"][0]["word_relevance"] == pytest.approx(expected.words.tolist(), abs=1e-6)
    assert len(stored["texts"][0]["layers"]["blocks.1.attn.z"]) == 2
    page = (folder / "nrm-explained/texts.html").read_text()
    assert "never" in page
    assert "<h1>Relevance of words, net</h1>" in page
    assert main(["explain-text", TEXT, "--model", str(folder / "net")]) == 0
    assert "<h1>Relevance of words, net</h1>" in (folder / "nrm-explained/texts.html").read_text()


@pytest.mark.medium
def test_options_reach_the_explanation(folder, monkeypatch, capsys):
    using(monkeypatch, StubLibrary("next", ("NetForCausalLM",)))
    arguments = ["--model", "net", "--target", "film", "--against", "fine", "--given", "blocks.0.attn.head.1"]
    assert main(["explain-text", "a dull", *arguments, "--color", "always", "--out", "other"]) == 0
    out = capsys.readouterr().out
    assert 'explained: "film" rather than "fine"' in out
    assert "given blocks.0.attn.head.1" in out
    assert "\x1b[48;5;" in out
    assert (folder / "other/texts.html").exists()
    assert main(["explain-text", "a dull", "--model", "net", "--against", "none"]) == 0
    assert "rather than" not in capsys.readouterr().out
    assert main(["explain-text", "a dull", "--model", "net", "--reference", "a fine", "--target", "film"]) == 0
    out = capsys.readouterr().out
    assert 'from the reference "a fine"' in " ".join(out.split())


@pytest.mark.medium
@pytest.mark.parametrize(
    ("options", "reference", "composite"),
    [
        ([], "[MASK]", "secants"),
        (["--reference", "none"], None, "nrm_default"),
        (["--composite", "nrm_default"], None, "nrm_default"),
        (["--residual", "sink"], None, "nrm_default"),
        (["--gain-limit", "3"], None, "nrm_default"),
        (["--reference", "[UNK]"], "[UNK]", "secants"),
        (["--reference", "[MASK]", "--composite", "nrm_default"], "[MASK]", "nrm_default"),
        (["--reference", "[MASK]", "--composite", "nrm_default", "--gain-limit", "3"], "[MASK]", "nrm_default"),
    ],
)
def test_masks_are_the_reference_unless_options_say_otherwise(folder, monkeypatch, options, reference, composite):
    using(monkeypatch, StubLibrary())
    assert main(["explain-text", TEXT, "--model", "net", *options]) == 0
    stored = json.loads((folder / "nrm-explained/texts.json").read_text())
    assert stored["texts"][0]["reference"] == reference
    assert stored["settings"]["composite"] == composite
    rules: dict[str, Any] = {"composite": NRMDefault()} if composite != "secants" else {}
    if "sink" in options:
        rules = {"residual": "sink"}
    if "3" in options:
        rules = {"composite": Normalized(NRMDefault(), gain_limit=3.0)}
    expected = explain_text(text_net("class").float(), StubTokenizer(), TEXT, reference=reference, **rules)
    assert stored["texts"][0]["word_relevance"] == pytest.approx(expected.words.tolist(), abs=1e-6)
    page = (folder / "nrm-explained/texts.html").read_text()
    assert (f"from the reference “{reference}”" in page) is (reference is not None)


def test_rules_cannot_be_changed_where_there_are_none(folder, monkeypatch, capsys):
    using(monkeypatch, StubLibrary())
    assert main(["explain-text", TEXT, "--model", "net", "--reference", "[MASK]", "--gain-limit", "3"]) == 2
    assert "--gain-limit applies to the rules of a composite" in capsys.readouterr().err


def test_sites_are_listed_with_shapes(folder, monkeypatch, capsys):
    using(monkeypatch, StubLibrary())
    assert main(["explain-text", TEXT, "--model", "net", "--sites"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["blocks.0.resid_pre", "7×8"]
    assert lines[-1] == "For --given, blocks.0.attn.head.0 is one head, blocks.0.mlp.neuron.0 is one neuron."
    assert not (folder / "nrm-explained").exists()


def test_lines_of_stdin_are_texts_and_one_that_fails_does_not_stop_the_others(folder, monkeypatch, capsys):
    using(monkeypatch, StubLibrary())
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{TEXT}\n\n{'a ' * 30}\nfine film\n"))
    assert main(["explain-text", "-", "--model", "net"]) == 1
    out, err = capsys.readouterr()
    assert out.count("predicted class") == 2
    assert "1 failed" in err
    assert "has 32 tokens, but the model accepts at most 16" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "missing/", "--model", "./missing"], "there is no folder ./missing"),
        (["--model", "."], "has no config.json"),
        (["--model", "net", "--target", "nice"], "--target 'nice' is not a class of the model"),
        (["--model", "net", "--position", "3"], "--position 3 applies to models that predict tokens"),
        (["--model", "net", "--layer", "blocks.9.attn"], "--sites lists the names"),
        (["--model", "net", "--given", "blocks.0.attn["], "is not an event"),
        (["--model", "net", "--device", "quantum"], "--device quantum cannot be used"),
    ],
)
def test_options_that_do_not_fit_end_the_command_in_one_line(folder, monkeypatch, capsys, arguments, message):
    using(monkeypatch, StubLibrary())
    assert main(["explain-text", TEXT, *arguments]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_models_without_a_head_or_of_an_unknown_class_raise(folder, monkeypatch):
    using(monkeypatch, StubLibrary(architectures=("NetModel",)))
    with pytest.raises(text_models.TextModelError, match="holds NetModel, which has no head"):
        text_models.text_model("net")
    using(monkeypatch, StubLibrary(architectures=None))
    with pytest.raises(text_models.TextModelError, match="is a net of no known class with a head"):
        text_models.text_model("net")


def test_a_model_that_names_no_class_is_loaded_by_its_configuration(folder, monkeypatch):
    library = StubLibrary(architectures=None)
    library.AutoModelForCausalLM = SimpleNamespace(
        from_pretrained=library._model, _model_mapping={type(library.config): None}
    )
    using(monkeypatch, library)
    assert text_models.text_model("net").notes == ()


def test_random_weights_are_noted_and_failures_to_load_say_what(folder, monkeypatch, capsys):
    library = StubLibrary()
    library.missing = ["classifier.weight", "classifier.bias"]
    using(monkeypatch, library)
    assert main(["explain-text", TEXT, "--model", "net"]) == 0
    assert "are random: classifier.bias, classifier.weight" in capsys.readouterr().err

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError("no file named model.safetensors")

    library.AutoTokenizer.from_pretrained = fails
    with pytest.raises(text_models.TextModelError, match=r"cannot load the tokenizer of net: no file named"):
        text_models.text_model("net")
    with pytest.raises(text_models.TextModelError, match="There is no folder nets either"):
        text_models.text_model("nets")


def test_loading_leaves_the_logger_as_it_was(folder, monkeypatch):
    using(monkeypatch, StubLibrary())
    level = logging.getLogger("transformers").level
    text_models.text_model("net")
    assert logging.getLogger("transformers").level == level


def test_a_missing_package_names_the_extra(folder, monkeypatch):
    def fails(module: str, name: str) -> Any:
        raise MissingExtraError(f"this needs {module}: pip install 'nrm-plugin[{name}]'.")

    monkeypatch.setattr(text_models, "extra", fails)
    with pytest.raises(MissingExtraError, match=r"this needs transformers: pip install 'nrm-plugin\[text\]'"):
        text_models.text_model("net")


def test_colours_are_for_terminals(monkeypatch):
    assert is_colored("always")
    assert not is_colored("never")
    assert not is_colored("auto")
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert is_colored("auto")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not is_colored("auto")
    monkeypatch.setenv("NO_COLOR", "")  # no value: as if it were not set, https://no-color.org
    assert is_colored("auto")
    monkeypatch.setattr("sys.stdout", None)  # closed by the caller
    assert not is_colored("auto")
