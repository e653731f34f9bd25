"""Random models with a head, so small that compiling them takes moments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.tiny import word_tokenizer

CLASSES = {
    "classify": "BertForSequenceClassification",
    "rerank": "BertForSequenceClassification",
    "tag": "BertForTokenClassification",
    "answer": "BertForQuestionAnswering",
}
LABELS = {
    "classify": ("negative", "neutral", "positive"),
    "rerank": ("LABEL_0",),
    "tag": ("O", "B-PER", "I-PER", "B-LOC", "I-LOC"),
    "answer": ("LABEL_0", "LABEL_1"),
}


def write_head(directory: Path, task: str, seed: int = 0, **other: Any) -> Path:
    """A random Bert of one layer with a head for a task, which tells texts apart, as files."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = LABELS[task]
    config = transformers.BertConfig(
        vocab_size=100,
        max_position_embeddings=16,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
        **{**sizes, **other},
    )
    model = getattr(transformers, CLASSES[task])(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(20 if "attention" in name else 8)
        ids = torch.randint(4, 100, (64, 8), generator=torch.Generator().manual_seed(seed))
        ids[:, 0], ids[:, -1] = 2, 3
        head = model.qa_outputs if task == "answer" else model.classifier
        logits = model(input_ids=ids)
        found = torch.stack([logits.start_logits, logits.end_logits], -1) if task == "answer" else logits.logits
        head.bias -= found.flatten(0, -2).mean(0)  # so that no class is the likeliest of every text
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """A word a token, with pairs as Bert has them."""
    from tokenizers import processors

    tokenizer = word_tokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]", "unk_token": "[UNK]", '
        '"cls_token": "[CLS]", "sep_token": "[SEP]", '
        '"model_input_names": ["input_ids", "token_type_ids", "attention_mask"], "model_max_length": 16}'
    )
