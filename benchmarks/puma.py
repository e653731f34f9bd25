"""PUMA's approximations and ours on all-MiniLM-L6-v2: cosines to the float64 model, and what a query costs.

    python -m benchmarks.puma [--length 128] [--texts 24] [--fixed 5]

"alone": the approximations in float64, nothing else changed. "fixed point": the compiled Program on plain integers.
Texts are the sentences of ``benchmarks.sentences``, at 128 tokens run together until they nearly fill them.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from torch import Tensor

import secure
from approximations import APPROXIMATIONS, choose
from benchmarks.sentences import sentences
from protocols.fixedpoint import FixedPoint
from secure.cost.count import profile
from secure.frontend import lower_model
from secure.lowering.trace import evaluate
from secure.models.calibration import SENTENCES
from secure.models.sentence_encoder import load_sentence_encoder
from secure.models.served_tokenizer import load_tokenizer
from secure.models.text import PACKAGED, calibration_inputs, model_directory, text_inputs
from secure.models.tokens import TextTokenizer

Inputs = dict[str, Tensor]


def filled(tokenizer: TextTokenizer, length: int, count: int) -> list[Inputs]:
    """``count`` texts, each beginning with another sentence and going on with the next ones while they fit."""
    every, out = sentences(), []
    for start in range(count):
        text = every[start]
        for more in (*every[start + 1 :], *every[:start]):
            if len(tokenizer.tokenizer.encode(f"{text} {more}").ids) > length:
                break
            text = f"{text} {more}"
        out.append(text_inputs(tokenizer, text, length))
    return out


def cosines(found: list[Tensor], expected: list[Tensor]) -> str:
    pairs = zip(found, expected, strict=True)
    values = [float(torch.nn.functional.cosine_similarity(a.flatten(), b, dim=0)) for a, b in pairs]
    return f"{len(values)} texts: mean {statistics.fmean(values):.7f}, lowest {min(values):.7f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--texts", type=int, default=24)
    parser.add_argument("--fixed", type=int, default=5, help="how many of them in fixed point too")
    options = parser.parse_args()
    directory, length = model_directory(PACKAGED), options.length
    encoder, tokenizer = load_sentence_encoder(directory), load_tokenizer(directory)
    inputs = filled(tokenizer, length, options.texts)
    tokens = [int(x["attention_mask"].sum()) for x in inputs]
    print(f"{length} tokens, of which texts fill {min(tokens)} to {max(tokens)}")
    exact = load_sentence_encoder(directory).double()
    with torch.no_grad():
        expected = [exact(**x)[0] for x in inputs]
    samples = calibration_inputs(tokenizer, length, SENTENCES)
    for name in APPROXIMATIONS:
        lowered = lower_model(
            encoder,
            samples,
            margin_bits=FixedPoint().margin_bits,
            embedding="client-table",
            functions=choose(name),
        )
        (out,) = lowered.outputs.values()
        given = map(lowered.inputs, inputs)
        alone = [evaluate(lowered.trace, x, lowered.weights, outputs=[out.id])[0] for x in given]
        print(f"{name}: alone, {cosines(alone, expected)}")
        compiled = secure.compile_text_model(PACKAGED, length, embedding="client-table", approximations=name)
        fixed = [secure.plain_reference(compiled, x) for x in inputs[: options.fixed]]
        print(f"{name}: fixed point, {cosines(fixed, expected[: options.fixed])}")
        print(f"{name}: of these alone, {cosines(alone[: options.fixed], expected[: options.fixed])}")
        cost = profile(compiled.program).total
        print(
            f"{name}: {cost.rounds} rounds, {cost.to_first / 1e6:.1f} MB to the server, "
            f"{cost.to_second / 1e6:.1f} MB to the client, {cost.dealt / 1e6:.1f} MB offline"
        )


if __name__ == "__main__":
    main()
