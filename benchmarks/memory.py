"""Peak memory of one training step, forward and backward, against TRL 1.13.0's BCOTrainer.

    python benchmarks/memory.py                    # 8 rows of 512 tokens, vocabulary 128,256: 9 GiB, minutes
    python benchmarks/memory.py --tokens 128       # nearly the same ratios with a quarter of it

The model has a small body, so that what is measured is the vocabulary's share: logits and what is made of them. Each
measurement is a process of its own, on the CPU, in float32: the highest resident memory between the start of the step
and the optimizer's turn, less the resident memory at the start. The kernel keeps that highest value (VmHWM) and forgets
it on demand (clear_refs); malloc hands back at once what is freed, see ENVIRONMENT. What the kernel says is, within 1%,
what torch's profiler says was allocated. Needs Linux.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

STATUS = "/proc/self/status"
SIDES = ("trl", "ours")
REQUIRED_RATIO = 1 / 3
# Everything of 64 KiB or more comes from the kernel and goes back to it when freed: resident memory is memory in use.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
QUIET = {
    "TQDM_DISABLE": "1",
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}
AT_MOST = 4.5  # times the logits, what a measurement may need: TRL's 4.0 and the rest


@dataclass(frozen=True)
class Shape:
    """What one step works on.

    Attributes:
        batch: Rows.
        prompt: Tokens of each prompt.
        completion: Tokens of each completion, EOS included.
        vocabulary: Entries.
        precompute: Reference log-probs ahead, not on the fly.
    """

    batch: int
    prompt: int
    completion: int
    vocabulary: int
    precompute: bool

    @property
    def logits(self) -> int:
        """Bytes of the float32 logits of every position."""
        return self.batch * (self.prompt + self.completion) * self.vocabulary * 4


def main() -> int:
    """Measure, print; the exit status is 1 if ours needs more than a third of TRL's memory on the rows of a chat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="rows")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each row")
    parser.add_argument("--vocabulary", type=int, default=128_256, help="entries of the vocabulary")
    parser.add_argument("--only", choices=SIDES, help="measure one side alone")
    parser.add_argument("--json", action="store_true", help="print JSON, not a table")
    parser.add_argument("--measure", help=argparse.SUPPRESS)  # a process of its own: one side and shape, as JSON
    given = parser.parse_args()
    if given.measure:
        request = json.loads(given.measure)
        print(peak_of_one_step(request.pop("side"), Shape(**request)))
        return 0
    sides = (given.only,) if given.only else SIDES
    check_memory(shapes(given.batch, given.tokens, given.vocabulary)[0])
    results = [
        {**asdict(shape), "logits": shape.logits, **{side: measured(side, shape) for side in sides}}
        for shape in shapes(given.batch, given.tokens, given.vocabulary)
    ]
    print(json.dumps(results, indent=2)) if given.json else Console().print(table(results))
    chats = [row for row in results if row["prompt"] == results[0]["prompt"] and len(sides) == 2]
    return int(any(row["ours"] > REQUIRED_RATIO * row["trl"] for row in chats))


def shapes(batch: int, tokens: int, vocabulary: int) -> list[Shape]:
    """Prompts of 200 in 512 tokens, as in a chat, and rows that are nearly all completion; both references."""
    prompts = (tokens * 200 // 512, max(1, tokens // 64))
    return [
        Shape(batch, prompt, tokens - prompt, vocabulary, precompute)
        for prompt in prompts
        for precompute in (False, True)
    ]


def check_memory(shape: Shape) -> None:
    """Refuse what would end in the kernel's killing something.

    Raises:
        ValueError: Less memory is free than the larger side may need.
    """
    needed, free = AT_MOST * shape.logits, kernel_says("/proc/meminfo", "MemAvailable")
    if needed > free:
        gib = f"{needed / 2**30:.1f} GiB are needed, {free / 2**30:.1f} are free"
        raise ValueError(f"{gib}: take fewer --tokens")


def measured(side: str, shape: Shape) -> int:
    """Peak bytes of one side, found in a process of its own.

    Raises:
        ChildProcessError: It failed; a negative status is the signal that ended it, -9 when memory ran out.
    """
    request = json.dumps({"side": side, **asdict(shape)})
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(
        [sys.executable, __file__, "--measure", request],
        env=os.environ | ENVIRONMENT | QUIET | threads,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ChildProcessError(f"{side} on {shape} ended with status {done.returncode}: {done.stderr[-2000:]}")
    return int(done.stdout.split()[-1])


def table(results: list[dict[str, Any]]) -> Table:
    """One line per shape; `x` is the peak in multiples of all positions' logits."""
    first = results[0]
    title = f"Peak of one step, {first['batch']} x {first['prompt'] + first['completion']} tokens, "
    made = Table("prompt", "completion", "reference", title=f"{title}vocabulary {first['vocabulary']:,}")
    for heading in ("TRL MiB", "x", "ours MiB", "x", "ratio"):
        made.add_column(heading, justify="right")
    for row in results:
        cells = [cell for side in SIDES for cell in size(row.get(side), row["logits"])]
        ratio = f"{row['ours'] / row['trl']:.3f}" if "ours" in row and "trl" in row else "-"
        reference = "ahead" if row["precompute"] else "on the fly"
        made.add_row(str(row["prompt"]), str(row["completion"]), reference, *cells, ratio)
    return made


def size(peak: int | None, logits: int) -> tuple[str, str]:
    """MiB and multiples of the logits."""
    return ("-", "-") if peak is None else (f"{peak / 2**20:,.0f}", f"{peak / logits:.1f}")


# ---- in the measuring process ----


def peak_of_one_step(side: str, shape: Shape) -> int:
    """Train one step and return its peak above the memory at its start, bytes."""
    import datasets
    import torch
    from transformers import PrinterCallback, TrainerCallback

    class Peak(TrainerCallback):
        """Between the start of a step and the optimizer's turn."""

        start = found = 0

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
            self.start = kernel_says(STATUS, "VmRSS")

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.found = kernel_says(STATUS, "VmHWM") - self.start

    datasets.disable_progress_bars()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(side, shape, folder)
        peak = Peak()
        trainer.add_callback(peak)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return peak.found


def kernel_says(path: str, field: str) -> int:
    """A size from one of the kernel's tables of `field: value kB`, bytes."""
    lines = Path(path).read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 2**10


def make_trainer(side: str, shape: Shape, folder: str) -> Any:
    """TRL's trainer or ours, on the same model, rows and settings."""
    if side == "trl":
        from trl.experimental.bco import BCOConfig, BCOTrainer

        configure: Any = BCOConfig
    else:
        from bco_lab import BCOConfig, BCOTrainer

        configure = BCOConfig.like_trl
    args = configure(
        output_dir=folder,
        max_steps=1,
        per_device_train_batch_size=shape.batch,
        max_length=shape.prompt + shape.completion,
        precompute_ref_log_probs=shape.precompute,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        optim="sgd",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    return BCOTrainer(
        model=tiny_body(shape.vocabulary), args=args, train_dataset=text_rows(shape), processing_class=words(shape)
    )


def tiny_body(vocabulary: int) -> Any:
    """Two layers of 64 under a full vocabulary, embeddings tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config)


def words(shape: Shape) -> Any:
    """A tokenizer with one token per word: w2, w3, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    entries = {"<pad>": 0, "<eos>": 1} | {f"w{i}": i for i in range(2, shape.vocabulary)}
    backend = Tokenizer(models.WordLevel(entries, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def text_rows(shape: Shape) -> Any:
    """As many rows as a step takes, all of the full length, both labels."""
    import torch
    from datasets import Dataset

    ids = torch.randint(2, shape.vocabulary, (shape.batch, shape.prompt + shape.completion - 1)).tolist()
    texts = [[f"w{i}" for i in row] for row in ids]
    return Dataset.from_dict(
        {
            "prompt": [" ".join(row[: shape.prompt]) for row in texts],
            "completion": [" " + " ".join(row[shape.prompt :]) for row in texts],
            "label": [index % 2 == 0 for index in range(shape.batch)],
        }
    )


if __name__ == "__main__":
    sys.exit(main())
