"""Sort the mails of an mbox file or a Maildir, by a model that never sees them. First run `unseen dealer` and `unseen
serve ./mail-head --length 64`, of a head that `examples.mail_head` made.

python -m examples.classify_mailbox examples/mail/inbox.mbox
"""

import email
import email.policy
import mailbox
import sys
from collections.abc import Iterator
from email.message import EmailMessage
from pathlib import Path
from typing import IO

import secure
from secure.tasks.classify import Classify


def messages(path: str) -> Iterator[EmailMessage]:
    """The mails of a file or a directory, as they come."""
    kind = mailbox.Maildir if Path(path).is_dir() else mailbox.mbox

    def parsed(file: IO[bytes]) -> EmailMessage:
        return email.message_from_binary_file(file, policy=email.policy.default)

    yield from kind(path, factory=parsed, create=False)


def text_of(mail: EmailMessage) -> str:
    """Its subject and its plain text, or its HTML without tags."""
    body = mail.get_body(preferencelist=("plain", "html"))
    return f"{mail['subject']}. {body.get_content() if body else ''}"


def main(path: str, server: str = "127.0.0.1:50051", dealer: str = "127.0.0.1:50052") -> None:
    with secure.connect(secure.TwoParty(server=server, dealer=dealer)) as session:
        mails = list(messages(path))
        for mail, answer in zip(mails, session.stream(Classify(long="truncate"), map(text_of, mails)), strict=True):
            label = f"({answer})" if isinstance(answer, secure.Error) else answer["label"]
            print(f"{label:<12}{mail['subject']}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
