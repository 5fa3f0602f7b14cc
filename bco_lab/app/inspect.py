"""`bco-lab inspect`: what a data set holds and what training would make of it, before any training."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import concatenate_datasets
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from bco_lab.app import run_directory
from bco_lab.app.checks import build
from bco_lab.app.pipeline import log_to, read_data
from bco_lab.cache import ArtifactCache
from bco_lab.config import BCOConfig
from bco_lab.data.sources import FeedbackData
from bco_lab.data.weights import PROBABILITY, WEIGHT
from bco_lab.files import write_json, write_text
from bco_lab.inspection import inspect_rows
from bco_lab.matching import DistributionMatching
from bco_lab.models import PolicySource
from bco_lab.report.inspection import render_inspection, write_inspection_html

logger = logging.getLogger(__name__)

JSON, HTML = "inspect.json", "inspect.html"


def inspect(cfg: DictConfig, run_dir: Path, overrides: list[str]) -> None:
    """Read, measure, print, and write the page.

    Raises:
        ValueError: A row that breaks a rule; or the folder holds something else.
    """
    if any((run_dir / name).exists() for name in (run_directory.CONFIG, run_directory.RESULT)):
        raise ValueError(f"{run_dir} holds a run: choose another hydra.run.dir")
    log_to(run_dir, main=True)
    source: PolicySource = build(cfg, "model")
    arguments: BCOConfig = build(cfg, "trainer", output_dir=str(run_dir))
    read = read_data(cfg, few_rows=True)
    data = whole(read)
    if data.rejected:
        write_text(run_dir / run_directory.REJECTED, "".join(f"{json.dumps(row)}\n" for row in data.rejected))
    content = measure(cfg, data, source, arguments, held_out=len(read.eval) if read.eval is not None else 0)
    content["command"] = ["bco-lab", "inspect", *overrides]
    write_text(run_dir / run_directory.OVERRIDES, OmegaConf.to_yaml(OmegaConf.create(overrides)))
    write_json(run_dir / JSON, content)
    page = write_inspection_html(content, run_dir / HTML)
    console = Console()
    render_inspection(console, content)
    console.print(f"\n page  {page}\n JSON  {run_dir / JSON}", soft_wrap=True, highlight=False)


def whole(data: FeedbackData) -> FeedbackData:
    """All rows as one set, without the copies that balancing added."""
    copies = data.report.oversampled if data.report is not None else 0
    train = data.train.select(range(len(data.train) - copies))
    if data.eval is None:
        return replace(data, train=train)
    ids = data.eval["example_id"][:]
    if data.split_by == "file":  # each file numbers its own rows
        ids = [1 + max(train["example_id"]) + each for each in ids]
    held_out = data.eval.remove_columns("example_id").add_column("example_id", ids)
    return replace(data, train=concatenate_datasets([train, held_out]), eval=None)


def measure(
    cfg: DictConfig, data: FeedbackData, source: PolicySource, arguments: BCOConfig, *, held_out: int
) -> dict[str, Any]:
    """Everything the page says."""
    tokenizer = source.load_tokenizer()
    matching = build(cfg, "udm")
    found, embedded = None, None
    if isinstance(matching, DistributionMatching):
        own = [column for column in (WEIGHT, PROBABILITY) if column in data.train.column_names]
        if own:
            logger.info("What UDM would do is shown as if the log had no %s", " and no ".join(own))
        found, embedded = matching.match(replace(data, train=data.train.remove_columns(own)), ArtifactCache())
    inspection = inspect_rows(
        data.train,
        tokenizer,
        max_length=arguments.max_length,
        max_completion_length=arguments.max_completion_length,
        truncation=arguments.truncation,
        p_desirable=found.p_desirable if found is not None else None,
        diagnostics=found.fit.diagnostics if found is not None else None,
        min_density_ratio=matching.min_density_ratio,
        max_density_ratio=matching.max_density_ratio,
        encoder_decoder=bool(getattr(source.load_config(), "is_encoder_decoder", False)),
        name=data.name,
        loading=data.report.to_dict() if data.report is not None else None,
        held_out=held_out,
    )
    if isinstance(matching, DistributionMatching) and matching.target != "desirable":
        logger.warning("What UDM would do is shown for udm.target=desirable, not for %s", matching.target)
    if embedded is not None and embedded.truncated:
        logger.info("%d of %d prompts were cut to the embedder's limit", embedded.truncated, len(embedded.prompts))
    content = inspection.to_dict()
    content["embedder"] = {
        "udm": OmegaConf.to_container(cfg.udm, resolve=True),
        "prompts": len(embedded.prompts) if embedded is not None else 0,
        "truncated_prompts": embedded.truncated if embedded is not None else None,
    }
    return content
