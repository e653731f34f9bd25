"""Train a classifier of mails: a logistic head on MiniLM, which stays as it is. In the clear, by the model's owner.

python -m examples.mail_head examples/mail/labelled.mbox ./mail-head

Labels are the first ones of X-Gmail-Labels, a header that mailboxes have which were exported from Gmail.
"""

import sys
from typing import Any

import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoTokenizer, BertForSequenceClassification

from examples.classify_mailbox import messages, text_of
from secure.models.sentence_encoder import find_packaged_model


def main(mails: str, output: str, encoder: str = "", length: str = "64") -> None:
    directory, found = encoder or find_packaged_model(), list(messages(mails))
    names = sorted(set(labels := [str(mail["X-Gmail-Labels"]).split(",")[0] for mail in found]))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    classes: dict[str, Any] = {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}
    model: Any = BertForSequenceClassification.from_pretrained(directory, num_labels=len(names), **classes).eval()
    texts = tokenizer(
        [*map(text_of, found)], padding=True, truncation=True, max_length=int(length), return_tensors="pt"
    )
    with torch.no_grad():
        states = model.bert(**texts).pooler_output
        head = LogisticRegression(max_iter=1000).fit(states, [*map(names.index, labels)])
        for parameter, rows in ((model.classifier.weight, head.coef_), (model.classifier.bias, head.intercept_)):
            row = torch.from_numpy(rows)
            parameter.copy_(torch.cat([-row, row]) / 2 if len(names) == 2 else row)  # one row: their difference
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"{output}: {len(found)} mails, {', '.join(names)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
