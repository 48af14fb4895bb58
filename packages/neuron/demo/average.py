"""Average the weights of training runs that began with the same ones: `python -m demo.average --out FOLDER WORK…`.

Where one run has unlearnt something rare, the others still know it (Wortsman et al., "Model soups", 2022).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .encoding import Encoder
from .model import DemoModel, ModelConfig
from .tokenizer import DEMO_MODEL
from .train import export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to export to")
    parser.add_argument("works", type=Path, nargs="+", help="folders that `demo.train --work` has filled")
    arguments = parser.parse_args()
    runs = [torch.load(work / "checkpoint.pt", weights_only=True)["average"] for work in arguments.works]
    model = DemoModel(ModelConfig())
    model.load_state_dict({name: torch.stack([run[name] for run in runs]).mean(0) for name in runs[0]})
    export(model, Encoder(DEMO_MODEL / "tokenizer.json"), arguments.out)


if __name__ == "__main__":
    main()
