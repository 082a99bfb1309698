"""Tiny random models with tokenizers of their own, small files, and the command as a function."""

import gc
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterable, Mapping
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from prism_select.cli.app import main

os.environ["OMP_NUM_THREADS"] = "1"  # for commands that run apart
torch.set_num_threads(1)  # tiny models are slower with more
transformers.utils.logging.disable_progress_bar()

Row: TypeAlias = Mapping[str, object]

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
WORDS = (
    "the capital of France is Paris, and two plus three makes five; please answer with a polite "
    "word, or do not: assistant user system thank you very much no way go away Rome Italy water "
    "boils at hundred degrees"
)

# Bytes at the highest, for a process apart; what `resource` tells of it begins with the memory of
# its parent.
PEAK = """import sys
def peak():
    with open("/proc/self/status") as lines:
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
"""


def pytest_sessionfinish() -> None:
    """Plugins may be parsed after this: Python 3.11 may miscount the depth of that when it collects
    garbage meanwhile (gh-106905)."""
    gc.disable()


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


def build_tokenizer(chat_template: str | None = None, bos: bool = True) -> Any:
    """Byte-level BPE with a few merges: any text goes in and comes out."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment, unused-ignore]
    core.decoder = decoders.ByteLevel()  # type: ignore[assignment, unused-ignore]
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([WORDS], trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment, unused-ignore]
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    end = "<|im_end|>" if chat_template else "</s>"
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token=end
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def build_network(vocabulary: int) -> Any:
    """Four blocks, two query heads for each key head, random weights large enough for answers to
    differ."""
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.15,
        tie_word_embeddings=False,
        dtype="float32",
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config)


def save_model(folder: Path, chat_template: str | None = None) -> Path:
    tokenizer = build_tokenizer(chat_template)
    build_network(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def without_memory() -> list[Exception]:
    """What torch raises on a GPU, as it writes it, and what it raises here."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    return [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore of it."),
        caught.value,
    ]


def random_adapter(folder: Path, network: Any, config: Any) -> Path:
    """A folder with an adapter as PEFT saves it, no number of it zero."""
    from peft import get_peft_model

    torch.manual_seed(1)
    adapted: Any = get_peft_model(network, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn_like(weight))
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    return folder


def jsonl(path: Path, rows: Iterable[Row | str | bytes]) -> str:
    """One row a line; a text, or bytes, is a line as it is."""
    with path.open("wb") as file:
        for row in rows:
            line = row if isinstance(row, str | bytes) else json.dumps(row, ensure_ascii=False)
            file.write((line if isinstance(line, bytes) else line.encode()) + b"\n")
    return str(path)


def prism(*words: object) -> Outcome:
    """The command, in this process."""
    out, err, before = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    try:
        with (
            redirect_stdout(out),
            redirect_stderr(err),
            warnings.catch_warnings(),
            pytest.raises(SystemExit) as ended,
        ):
            main([str(word) for word in words])
    finally:
        signal.signal(signal.SIGTERM, before)
    code = ended.value.code
    assert isinstance(code, int)
    return Outcome(code, out.getvalue(), err.getvalue())


def prism_apart(*words: object, cwd: Path | None = None, module: bool = True) -> Outcome:
    """The command as a process of its own; without `module`, words for Python itself."""
    command = [sys.executable, *(["-m", "prism_select"] if module else []), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model whose tokenizer writes BOS and has no chat template."""
    return save_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a ChatML template; an answer ends with <|im_end|>."""
    return save_model(tmp_path_factory.mktemp("chat"), CHATML)
