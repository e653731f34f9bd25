"""The lesson of a language model: texts, or what its original writes; its loss; and perplexities."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secure.errors import InvalidInput
from secure.models.causal import load_language_model
from secure.models.checkpoints import quiet_transformers
from secure.models.decoder import looks_positions_up, most_positions, prompt_inputs, vocabulary
from secure.models.served_tokenizer import load_tokenizer
from secure.models.tokens import TextTokenizer
from secure.polynomial.forms import padded_before
from secure.polynomial.swap import seen_keys
from secure.progress import Told, silent
from secure.training.lesson import Lesson
from secure.training.trainer import Batch, Loss

LENGTH = 128  # tokens of a row that a decoder learns from, unless it is asked for another number
TOGETHER = 256  # rows that it writes at a time
HIDDEN = 0.1  # weight of the hidden states' error in the loss, beside that of the next token's distribution
KINDS = 4  # of so many batches one has padding
HELD_OUT_SEED = 1 << 20  # rows to check on are written with other seeds than those to learn from

Row = Tensor  # the token ids of a row


@dataclass(frozen=True)
class Perplexities:
    """The perplexities of a model and its original on the same texts, e to the mean loss of a token.

    same: share of places at which both find the same token most likely. divergence: mean Kullback-Leibler divergence of
    the model's distribution from the original's, in nats a token.
    """

    tokens: int
    original: float
    model: float
    same: float
    divergence: float

    @property
    def ratio(self) -> float:
        """The model's perplexity in parts of the original's."""
        return self.model / self.original


@dataclass(frozen=True)
class Padding:
    """A function that makes a batch of rows, one in ``KINDS`` with padding as prompts have it: before the text.

    The ranges of what is computed for padding have to hold as well. places: see ``prompt_inputs``.
    """

    places: bool

    def __call__(self, chosen: Sequence[Row]) -> Batch:
        together = torch.stack(list(chosen))
        if int(together.sum()) % KINDS:
            return {"input_ids": together}
        generator = torch.Generator().manual_seed(int(together.sum()))  # for training; nothing here is a secret
        length = together.shape[1]
        kept = torch.randint(1, length + 1, (len(chosen),), generator=generator).tolist()
        each = [
            prompt_inputs(row[:count].tolist(), length, places=self.places)
            for row, count in zip(chosen, kept, strict=True)
        ]
        return {name: torch.cat([inputs[name] for inputs in each]) for name in each[0]}


def lesson(directory: Path, texts: Sequence[str], samples: int, length: int = 0, told: Told = silent) -> Lesson:
    """Make the lesson of a language model: rows of texts, and ``samples`` rows that it writes itself.

    length: the tokens of a row; LENGTH for 0.

    Raises what loading a model and its tokenizer raises.
    """
    teacher, student = load_language_model(directory), load_language_model(directory)
    length = row_length(teacher, length)
    data = rows_of_texts(load_tokenizer(directory), texts, length) if texts else []
    data += rows_written(teacher, samples, length, 0, told)
    loss = language_loss(teacher, student)
    padding = Padding(not looks_positions_up(teacher))
    return Lesson(teacher, student, student, "", data, padding, loss, lambda batch: run(student, batch))


def row_length(model: nn.Module, length: int = 0) -> int:
    """Return the tokens of a row: ``length`` or, for 0, LENGTH, or as many as the model has places for if it has fewer.

    Raises InvalidInput if the model has no places for ``length`` tokens.
    """
    most = most_positions(model) or max(length, LENGTH)
    if length > most:
        raise InvalidInput(f"the model takes no rows of {length} tokens: it has {most} places", "give fewer")
    return length or min(LENGTH, most)


def rows_of_texts(tokenizer: TextTokenizer, texts: Sequence[str], length: int) -> list[Row]:
    """Join the tokens of texts, and cut them into rows of ``length`` tokens; a rest that is shorter is dropped.

    Each row begins with the token with which the tokenizer begins every text, if there is one.
    """
    encoded = [tokenizer.tokenizer.encode(text).ids for text in texts]
    firsts = {ids[0] for ids in encoded if ids}
    begin = list(firsts) if len(firsts) == 1 and len(encoded) > 1 else []
    joined = torch.tensor([id for ids in encoded for id in ids], dtype=torch.int64)
    first, each = torch.tensor(begin, dtype=torch.int64), length - len(begin)
    return [torch.cat([first, part]) for part in joined.split(each) if len(part) == each]


def rows_written(model: nn.Module, count: int, length: int, seed: int, told: Told = silent) -> list[Row]:
    """Let a language model write ``count`` rows of ``length`` tokens by sampling, the same at every call.

    They begin with the token of a text's beginning, and an end of a text is followed by whatever the model writes then.
    """
    from transformers import GenerationConfig

    writer: Any = copy.copy(model)
    begin = getattr(writer.config, "bos_token_id", None)
    begin = begin if isinstance(begin, int) and 0 <= begin < vocabulary(model) else 0
    writer.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=begin)
    device = next(model.parameters()).device
    found: list[Row] = []
    with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet_transformers():
        torch.manual_seed(seed)
        for start in range(0, count, TOGETHER):
            ids = torch.full((min(TOGETHER, count - start), 1), begin, device=device)
            rows = writer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=length - 1,
                do_sample=True,
                top_k=0,
            )
            found += rows.cpu().unbind()
            told(len(found), count, "rows that the original writes")
    return found


def run(model: nn.Module, batch: Batch) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the scores of all tokens at all places, and the hidden states of every layer.

    A mask in the batch is that of ``Padding``.
    """
    with padded_before(model):
        found: Any = model(**batch, output_hidden_states=True, use_cache=False)
    return found.logits, found.hidden_states


def language_loss(teacher: nn.Module, student: nn.Module) -> Loss:
    """Make the loss: the divergence of the next token's distribution, and the relative error of hidden states."""

    def loss(batch: Batch) -> tuple[Tensor, dict[str, float]]:
        with torch.no_grad():
            wanted, theirs = run(teacher, batch)
        found, ours = run(student, batch)
        with torch.autocast(wanted.device.type, enabled=False):
            real = _real(batch)
            divergence = (_divergence(found.float(), wanted.float()) * real).sum() / real.sum()
            pairs = zip(ours[1:], theirs[1:], strict=True)
            hidden = torch.stack([_energy(a - b, real) / _energy(b, real) for a, b in pairs]).mean()
        return divergence + HIDDEN * hidden, {"divergence": divergence.item(), "hidden": hidden.item()}

    return loss


def _real(batch: Batch) -> Tensor:
    """Return ones for tokens and zeros for padding, which the last row of a mask tells; of shape (rows, tokens)."""
    mask, ids = batch.get("attention_mask"), batch["input_ids"]
    return torch.ones(ids.shape, device=ids.device) if mask is None else seen_keys(mask[:, 0, -1], torch.float32)


def _energy(states: Tensor, real: Tensor) -> Tensor:
    return (states.square().sum(-1) * real).sum()


def _divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """Return the divergence of the first distribution from the second at each place, in nats."""
    return F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True).sum(-1)


def perplexities(model: nn.Module, original: nn.Module, rows: Sequence[Row], batch: int = 16) -> Perplexities:
    """Compare a model with its original on rows of tokens. Raises InvalidInput if there are none."""
    if not rows:
        raise InvalidInput("no text to compare on is long enough", f"give texts of {LENGTH} tokens or more together")
    ours = theirs = divergence = torch.zeros((), dtype=torch.float64)
    same = count = 0
    with torch.no_grad():
        for start in range(0, len(rows), batch):
            given = {"input_ids": torch.stack(list(rows[start : start + batch]))}
            found, wanted = (run(m, given)[0][:, :-1] for m in (model, original))
            targets = given["input_ids"][:, 1:].flatten()
            ours = ours + F.cross_entropy(found.flatten(0, 1), targets, reduction="sum").double()
            theirs = theirs + F.cross_entropy(wanted.flatten(0, 1), targets, reduction="sum").double()
            divergence = divergence + _divergence(found, wanted).sum().double()
            same += int((found.argmax(-1) == wanted.argmax(-1)).sum())
            count += len(targets)
    return Perplexities(
        count, float((theirs / count).exp()), float((ours / count).exp()), same / count, float(divergence / count)
    )
