"""Whatever goes wrong is a `secure.Error`: at compiling, at asking, at connecting.

python -m examples.errors
"""

import torch
from torch import Tensor, nn

import secure


class Sorted(nn.Module):
    """Sorting has no protocol."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sort().values


def main() -> None:
    sample = {"x": torch.randn(1, 8)}
    try:
        secure.compile(Sorted(), sample, deployment=secure.TwoParty())
    except secure.UnsupportedOperation as error:
        print(f"at compiling: {error}")

    compiled = secure.compile(nn.Linear(8, 2), {"input": sample["x"]}, deployment=secure.TwoParty())
    with secure.insecure_in_process(compiled) as session:
        try:
            session.query({"input": torch.randn(1, 9)})
        except secure.Error as error:
            print(f"at asking: {error}")

    try:
        secure.connect(secure.TwoParty(server="127.0.0.1:1", dealer="127.0.0.1:2"))
    except secure.Error as error:
        print(f"at connecting: {error}")


if __name__ == "__main__":
    main()
