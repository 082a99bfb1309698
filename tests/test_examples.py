"""The examples do what they say."""

import importlib.util
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import jsonl
from scipy.stats import spearmanr

import prism_select
from prism_select.demo.story import MODEL
from prism_select.demo.world import pairs, pool
from prism_select.models.adapters import load_adapter
from prism_select.models.loading import load

NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?")
EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def serving(networks: dict[str, Any]) -> Iterator[str]:
    """A server of vLLM's completions, as far as log-probabilities of prompts go: its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            tokens = asked["prompt"]
            with torch.no_grad():
                logits = (
                    networks[asked["model"]](input_ids=torch.tensor([tokens]))
                    .logits[0]
                    .log_softmax(-1)
                )
            each = [
                {str(token): {"logprob": float(logits[i, token])}}
                for i, token in enumerate(tokens[1:])
            ]
            body = json.dumps({"choices": [{"prompt_logprobs": [None, *each]}]}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_two_adapters_on_a_server_give_the_scores_of_a_run(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    file = jsonl(tmp_path / "pool.jsonl", pool(60, 0))
    run = prism_select.score(
        model=str(MODEL),
        pool=file,
        target=jsonl(tmp_path / "pairs.jsonl", pairs("capitals", 12, 0)),
        layers="proj",
        rank=16,
        save_adapter=str(adapter),
        out=str(tmp_path / "run"),
    )
    server_scores = example("server_scores")
    server_scores.sign(adapter, 0.05)
    networks = {}
    for side in "+-":
        model, _ = load(str(MODEL), "float32", torch.device("cpu"))
        networks[f"adapter{side}"] = load_adapter(
            model.network, tmp_path / f"adapter{side}", merge=True
        ).network
    with serving(networks) as url:
        told = list(server_scores.scores(url, str(MODEL), file, 0.05))
    assert [each["id"] for each in told] == run.scores["id"].to_pylist()
    found, expected = [each["score"] for each in told], run.scores["score"].to_pylist()
    assert spearmanr(found, expected).statistic > 0.99
    length = sum(a * b for a, b in zip(found, expected, strict=True)) / sum(a * a for a in found)
    assert max(abs(length * a - b) for a, b in zip(found, expected, strict=True)) < 0.02 * max(
        map(abs, expected)
    )


@pytest.mark.parametrize("epsilon", [0.02, 0.05])
def test_the_signed_adapters_are_the_adapter_times_epsilon(epsilon: float, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "one").mkdir()
    tensors = {"x.lora_A.weight": torch.ones(1, 2), "x.lora_B.weight": torch.ones(2, 1)}
    save_file(tensors, tmp_path / "one" / "adapter_model.safetensors")
    example("server_scores").sign(tmp_path / "one", epsilon)
    for name, scale in (("one+", epsilon), ("one-", -epsilon)):
        signed = load_file(tmp_path / name / "adapter_model.safetensors")
        moved = signed["x.lora_B.weight"] @ signed["x.lora_A.weight"]
        assert torch.allclose(moved, scale * torch.ones(2, 2))


@pytest.mark.parametrize("name", ["select", "repair"])
def test_a_notebook_runs_from_top_to_bottom_and_says_what_it_said(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line stands there, with its numbers, to rounding; of rows that are shown, whose order a
    rounding may turn, only that they are."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    cells = json.loads((EXAMPLES / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    for cell in (cell for cell in cells if cell["cell_type"] == "code"):
        capsys.readouterr()
        exec("".join(cell["source"]), names)
        printed, stands = (
            capsys.readouterr().out,
            "".join(line for o in cell["outputs"] for line in o["text"]),
        )
        assert printed.count("→") == stands.count("→")
        fixed = [
            "\n".join(line for line in text.splitlines() if "→" not in line)
            for text in (printed, stands)
        ]
        assert NUMBER.sub("#", fixed[0]).split() == NUMBER.sub("#", fixed[1]).split()
        found, told = ([float(x) for x in NUMBER.findall(text)] for text in fixed)
        assert found == pytest.approx(told, rel=0.02, abs=0.02)
