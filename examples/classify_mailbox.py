"""Classify the mails of an mbox file or a Maildir, unseen. First run `unseen dealer`, `unseen serve ./mail-head`.

python -m examples.classify_mailbox examples/mail/inbox.mbox
"""

import mailbox
import re
import sys
from collections.abc import Iterator
from contextlib import closing
from email import message_from_bytes, policy
from email.message import EmailMessage
from pathlib import Path

import secure
from secure.tasks.classify import Classify


def messages(path: str) -> Iterator[EmailMessage]:
    """The mails of a file or a directory, as they come."""
    with closing((mailbox.Maildir if Path(path).is_dir() else mailbox.mbox)(path, create=False)) as mails:
        yield from (message_from_bytes(mail.as_bytes(), policy=policy.default) for mail in mails)


def text_of(mail: EmailMessage) -> str:
    """Its subject and its text, without what stands in angle brackets: addresses, the tags of HTML."""
    body = mail.get_body(preferencelist=("plain", "html"))
    return re.sub("<[^>]*>", " ", f"{mail['subject']}. {body.get_content() if body else ''}")


def main(path: str, server: str = "127.0.0.1:50051", dealer: str = "127.0.0.1:50052") -> None:
    with secure.connect(secure.TwoParty(server=server, dealer=dealer)) as session:
        answers = session.stream(Classify(long="truncate"), map(text_of, mails := list(messages(path))))
        for mail, answer in zip(mails, answers, strict=True):
            label = f"({answer})" if isinstance(answer, secure.Error) else answer["label"]
            print(f"{label:<12}{mail['subject']}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
