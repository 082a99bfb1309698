"""Scores from an inference server that returns the log-probabilities of a prompt's tokens, as
vLLM's does.

    score / ‖L‖ = (loglik under +ε adapter − loglik under −ε adapter) / 2ε + O(ε²)
    L: the part of the direction that the adapter keeps

    python examples/server_scores.py adapter 0.05                                adapter+, adapter-
    python examples/server_scores.py URL MODEL pool.jsonl 0.05 > scores.jsonl    a line a row

Choices made here:
- `adapter` is the folder of --save-adapter; the server knows both copies as `adapter+`, `adapter-`;
- MODEL is the folder of the served model: its tokenizer encodes rows here, so that the same tokens
  are supervised as in a run;
- rows that PRISM would quarantine are left out.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from prism_select.data.encoding import Encoded, Encoder
from prism_select.data.pool import Pool
from prism_select.data.records import Example
from prism_select.run.errors import BadRow

WEIGHTS = "adapter_model.safetensors"


def sign(folder: Path, epsilon: float) -> None:
    """Two copies of an adapter beside it, of scale +ε and −ε."""
    for name, scale in (("+", epsilon), ("-", -epsilon)):
        signed = folder.with_name(folder.name + name)
        shutil.copytree(folder, signed, dirs_exist_ok=True)
        tensors = load_file(folder / WEIGHTS)
        scaled = {
            key: value * scale if "lora_B" in key else value for key, value in tensors.items()
        }
        save_file(scaled, signed / WEIGHTS, metadata={"format": "pt"})


def rows(pool: str, tokenizer: Any) -> Iterator[tuple[Example, Encoded]]:
    encoder = Encoder(tokenizer, template="auto", max_length=2048)
    for _, example in Pool([pool], {}).rows():
        if isinstance(example, Example):
            try:
                yield example, encoder.encode(example)
            except BadRow as bad:
                print(bad, file=sys.stderr)


def loglik(url: str, model: str, row: Encoded) -> float:
    """Sum of log p over the supervised tokens, in nats; the first token of a row has no
    probability."""
    request = {
        "model": model,
        "prompt": list(row.tokens),
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": 0,
    }
    body, headers = json.dumps(request).encode(), {"Content-Type": "application/json"}
    with urlopen(Request(f"{url}/v1/completions", body, headers)) as answer:
        logprobs = json.load(answer)["choices"][0]["prompt_logprobs"]
    tokens = zip(row.tokens, row.supervised, logprobs, strict=True)
    return float(
        sum(
            by_token[str(token)]["logprob"] for token, loss, by_token in tokens if loss and by_token
        )
    )


def scores(url: str, model: str, pool: str, epsilon: float) -> Iterator[dict[str, Any]]:
    for example, row in rows(pool, AutoTokenizer.from_pretrained(model)):
        up, down = (loglik(url, f"adapter{side}", row) for side in "+-")
        yield {"id": example.id, "line": example.line, "score": (up - down) / (2 * epsilon)}


if __name__ == "__main__":
    if len(sys.argv) == 3:
        sign(Path(sys.argv[1]), float(sys.argv[2]))
    else:
        url, model, pool, epsilon = sys.argv[1:]
        for line in scores(url, model, pool, float(epsilon)):
            print(json.dumps(line))
