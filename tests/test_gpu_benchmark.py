"""The benchmark of GPUs, in small on a processor: it runs, and its figures are there."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def test_in_small_it_has_a_finite_figure_of_each_kind(gpu: Any, tmp_path: Path) -> None:
    gpu.main(["--small", "--out", str(tmp_path / "small.json")])
    content = json.loads((tmp_path / "small.json").read_text(encoding="utf-8"))
    figures = {line["name"]: line for line in content["figures"]}
    assert all(math.isfinite(line["value"]) for line in figures.values())
    for kind in ("1B, bfloat16", "8B, bfloat16", "1B, float32"):
        for tokens in gpu.SMALL.batch_tokens:
            at = f"{kind}, reverse, rank 4, {tokens} tokens"
            assert figures[at]["value"] > 0 and figures[f"{at}: time"]["value"] > 1
            assert 0.8 < figures[f"{at}: peak memory"]["value"] < 1.2
    assert any("forward, full" in name for name in figures)
    assert any("float32, difference" in name for name in figures)
    assert 0 < figures["1B, a run: time beside scoring"]["value"] < 1
    missing = [row for row in content["rows"] if "missing" in row]
    assert {row["missing"] for row in missing if "two GPUs" in row["part"]} == {
        "fewer than two GPUs"
    }
    assert not (BENCHMARKS / "results" / "gpu.json").exists()


def test_without_a_gpu_it_ends_in_one_line(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"no GPU here.*--small"):
        gpu.main([])


def test_a_part_without_memory_or_time_is_a_row_that_says_so(
    gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_large() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    bench = gpu.Bench(gpu.SMALL, torch.device("cpu"))
    bench.part("large", too_large)
    monkeypatch.setattr(gpu, "LAST", -1.0)
    bench.part("late", pytest.fail)
    large, late = bench.rows[-2:]
    assert large["out_of_memory"] and "Tried to allocate 2 GiB" in large["missing"]
    assert not late["out_of_memory"] and "not begun" in late["missing"]
    assert not bench.figures
