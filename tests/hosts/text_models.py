"""Tiny text models with tokenizers trained on a few sentences, saved to folders as transformers saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import nn

SENTENCES = (
    "A dog chased the ball across the park.",
    "The puppy ran after its toy, and the children laughed.",
    "This film is unbelievably long, and yet I was never bored.",
    "A dull story, badly told: the actors seem as bored as the audience.",
    "The capital of France is Paris; the capital of Italy is Rome.",
    "She read the whole book in one night, because it was wonderful.",
)
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
SMALL: dict[str, Any] = {"max_position_embeddings": 64, **SIZES}


def word_pieces() -> Any:
    """A tokenizer in the style of BERT: word pieces in lower case, ``[CLS]`` and ``[SEP]``."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    own = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    own.normalizer = normalizers.BertNormalizer(lowercase=True)
    own.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    own.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    own.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    own.decoder = decoders.WordPiece()
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return hf.PreTrainedTokenizerFast(tokenizer_object=own, **names)


def byte_pairs() -> Any:
    """A tokenizer in the style of GPT-2: pairs of bytes, a space at the beginning of a word."""
    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        SENTENCES, trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    )
    own.decoder = decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def sentence_pieces() -> Any:
    """A tokenizer in the style of T5: pieces of sentences, ``▁`` at the beginning of a word, ``</s>``."""
    own = Tokenizer(models.Unigram())
    own.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    own.train_from_iterator(
        SENTENCES, trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>")
    )
    own.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    own.decoder = decoders.Metaspace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=own, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def _classifier(count: int) -> nn.Module:
    labels = {0: "negative", 1: "positive"}
    return hf.BertForSequenceClassification(hf.BertConfig(vocab_size=count, id2label=labels, **SMALL))


def _masked(count: int) -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(vocab_size=count, **SMALL))


def _causal(count: int) -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=count, n_embd=32, n_layer=2, n_head=4, n_positions=64))


def _llama(count: int) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=count, num_key_value_heads=2, **SMALL))


def _decoding(count: int) -> nn.Module:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=count, decoder_start_token_id=0, **sizes))


def _tagger(count: int) -> nn.Module:
    return hf.BertForTokenClassification(hf.BertConfig(vocab_size=count, num_labels=3, **SMALL))


MODELS: dict[str, tuple[Callable[[], Any], Callable[[int], nn.Module]]] = {
    "classifier": (word_pieces, _classifier),
    "masked": (word_pieces, _masked),
    "causal": (byte_pairs, _causal),
    "llama": (byte_pairs, _llama),
    "decoding": (sentence_pieces, _decoding),
    "tagger": (word_pieces, _tagger),
}


def build(name: str) -> tuple[nn.Module, Any]:
    """A model with random weights and biases, and its tokenizer."""
    tokenizer, kind = MODELS[name][0](), MODELS[name][1]
    torch.manual_seed(0)
    model = kind(len(tokenizer)).eval()
    for parameter_name, parameter in model.named_parameters():
        if parameter.ndim == 1 and "bias" in parameter_name:
            nn.init.normal_(parameter, std=0.1)
        elif parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model, tokenizer


def saved(name: str, folder: Path) -> Path:
    """Saves a model and its tokenizer to a folder."""
    model, tokenizer = build(name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
