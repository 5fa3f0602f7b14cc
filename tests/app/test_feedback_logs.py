"""Logs of every shape through the command line."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from omegaconf import OmegaConf
from runs import TINY, metrics_of, write_log

from bco_lab.app.checks import build, check
from bco_lab.app.main import conf_folder
from bco_lab.data.sources import FeedbackData

WANDB = ["wandb.tags=[]"]  # what Hydra knows only when it runs
SAMPLES = Path(__file__).parent.parent / "data" / "samples"


def composed(*overrides: str) -> Any:
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return compose("config", overrides=["model=tiny_llama", "name=test", *WANDB, *overrides])


def load(*overrides: str) -> FeedbackData:
    cfg = composed(*overrides)
    check(cfg)
    return build(cfg, "dataset").load()


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# Records as the hub's data sets have them, and the rows they should give.
PUBLIC = {
    "ultrafeedback": (
        [
            {
                "prompt": f"q{i}",
                "prompt_id": "x",
                "chosen": [*user(f"q{i}"), *answer("good")],
                "rejected": [*user(f"q{i}"), *answer("bad")],
                "messages": [*user(f"q{i}"), *answer("good")],
                "score_chosen": 8.5,
                "score_rejected": 3.0,
            }
            for i in range(2)
        ],
        [(user("q0"), answer("good"), True), (user("q0"), answer("bad"), False)],
    ),
    "ultrafeedback_unpaired": (
        [{"prompt": user("q0"), "completion": answer(text), "label": text == "good"} for text in ("good", "bad")],
        [(user("q0"), answer("good"), True), (user("q0"), answer("bad"), False)],
    ),
    "capybara": (
        [
            {
                "source": "GOAT",
                "prompt": "another text",
                "chosen": [*user("q0"), *answer("r"), *user("q1"), *answer("good")],
                "rejected": [*user("q0"), *answer("r"), *user("q1"), *answer("bad")],
                "rating_chosen": 5,
                "rating_rejected": 1,
            },
            {"prompt": "x", "chosen": [*user("q"), *answer("same")], "rejected": [*user("q"), *answer("same")]},
        ],
        [
            ([*user("q0"), *answer("r"), *user("q1")], answer("good"), True),
            ([*user("q0"), *answer("r"), *user("q1")], answer("bad"), False),
        ],
    ),
    "helpsteer2": (
        [
            {"prompt": "q0", "response": f"a{score}", "helpfulness": score, "correctness": 4, "verbosity": 2}
            for score in (4, 3, 0)
        ],
        [(user("q0"), answer("a4"), True), (user("q0"), answer("a3"), False), (user("q0"), answer("a0"), False)],
    ),
    "hh_rlhf": (
        [
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Help\n\nAssistant: Sure.",
                "rejected": "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Help\n\nAssistant: No.",
            },
            {"chosen": "\n\nHuman: Same\n\nAssistant: x", "rejected": "\n\nHuman: Same\n\nAssistant: x"},
        ],
        [
            ([*user("Hi"), *answer("Hello!"), *user("Help")], answer("Sure."), True),
            ([*user("Hi"), *answer("Hello!"), *user("Help")], answer("No."), False),
        ],
    ),
}


def load_sample(*overrides: str) -> FeedbackData:
    return load("dataset.eval_fraction=0", *(each.replace("SAMPLES", str(SAMPLES)) for each in overrides))


@pytest.mark.parametrize(
    ("overrides", "rows", "up"),
    [
        (["dataset=unpaired", "dataset.path=SAMPLES/unpaired.jsonl"], 4, 2),
        (["dataset=paired", "dataset.path=SAMPLES/paired.jsonl"], 4, 2),
        (
            [
                *("dataset=rated", "dataset.path=SAMPLES/rated.jsonl", "dataset.completion=response"),
                *("dataset.score=helpfulness", "dataset.threshold=4"),
            ],
            4,
            2,
        ),
        (
            [
                *("dataset=columns", "dataset.path=SAMPLES/columns.csv", "dataset.columns.prompt=question"),
                *("dataset.columns.completion=answer", "dataset.columns.label=thumb", "+dataset.columns.source=model"),
                "dataset.label_map={up: true, 1: true, down: false, -1: false}",
            ],
            4,
            2,
        ),
        (["dataset=open_webui", "dataset.path=SAMPLES/open_webui.json"], 4, 2),
        (
            [
                *("dataset=langfuse", "dataset.path=SAMPLES/langfuse_scores.csv"),
                *("dataset.traces=SAMPLES/langfuse_traces.csv", "dataset.score_name=user-feedback"),
                "dataset.observations=SAMPLES/langfuse_observations.jsonl",
            ],
            4,
            3,
        ),
        (
            [
                *("dataset=langsmith", "dataset.path=SAMPLES/langsmith_feedback.jsonl", "dataset.key=user_score"),
                "dataset.runs=SAMPLES/langsmith_runs.jsonl",
            ],
            4,
            2,
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_each_shape_has_its_group(overrides: list[str], rows: int, up: int) -> None:
    data = load_sample(*overrides)
    assert (len(data.train), sum(data.train["label"])) == (rows, up)


def test_every_dataset_group_lists_every_key_of_its_source() -> None:
    for path in sorted((conf_folder() / "dataset").glob("*.yaml")):
        if path.stem == "movie_reviews":
            continue
        cfg = composed(f"dataset={path.stem}", *(["dataset.traces=text"] if path.stem == "langfuse" else []))
        for key in OmegaConf.missing_keys(cfg):
            OmegaConf.update(cfg, key, {"dataset.label_map": {"up": True}, "dataset.threshold": 1}.get(key, "text"))
        source, plain = instantiate(cfg.dataset, _convert_="all"), cfg.dataset
        assert {field.name for field in dataclasses.fields(source)} == set(map(str, plain)) - {"_target_"}, path.stem


@pytest.mark.parametrize("name", PUBLIC)
def test_a_copy_of_a_public_set_is_read_like_the_hubs(tmp_path: Path, name: str) -> None:
    records, expected = PUBLIC[name]
    log = write_log(tmp_path / "copy.jsonl", records)
    data = load(f"dataset={name}", f"dataset.path={log}", "dataset.eval_fraction=0")
    found = [(row["prompt"], row["completion"], row["label"]) for row in data.train]
    assert found[: len(expected)] == expected


def test_bad_rows_end_up_beside_the_run(bco_lab: Any, environment: Path) -> None:
    rows = [{"prompt": f"Question {i}?", "completion": f"a{i}", "label": i % 2} for i in range(20)]
    rows[3]["label"], rows[7]["completion"], rows[11]["label"] = "meh", None, None
    log = write_log(environment / "log.jsonl", rows)
    settings = [*TINY, "dataset=unpaired", f"dataset.path={log.name}", "generation.count=0"]
    stopped = bco_lab(*settings, "hydra.run.dir=stopped")
    assert stopped.status == 2
    assert stopped.error.startswith(
        "bco-lab: error: dataset: log.jsonl, line 4, column 'label': label 'meh' is none of"
    )
    ended = bco_lab(*settings, "dataset.on_error=skip", "dataset.balance=oversample", "hydra.run.dir=run")
    assert ended.status == 0, ended.err
    run = environment / "run"
    rejected = [json.loads(line) for line in (run / "rejected_rows.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"], row["column"], row["record"]) for row in rejected] == [
        ("log.jsonl", 4, "label", rows[3]),
        ("log.jsonl", 8, "completion", rows[7]),
    ]
    report = json.loads((run / "environment.json").read_text())["data"]["report"]
    assert (report["records"], report["rejected"], report["left_out"], report["rows"]) == (20, 2, {"no label": 1}, 17)
    assert report["split_by"] == "prompt"
    assert "log: 1 records left out: no label" in ended.err
    assert "log: 2 records break a rule and were skipped" in ended.err


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dataset=rated", "dataset.path=a.csv"], "dataset.threshold must be given"),
        (["dataset=columns", "dataset.path=a.csv"], "dataset.columns.completion must be given"),
        (["dataset=unpaired", "dataset.path=a.csv", "dataset.balance=up"], "dataset.balance=up must be one of none"),
        (["dataset=paired", "dataset.path=none.csv"], "dataset: none.csv: no such file"),
        (["dataset=paired", "dataset.path=null"], "dataset.path=null must be a file"),
        (["dataset=unpaired", "dataset.path=a.csv", "+dataset.label_maps={}"], "did you mean dataset.label_map?"),
        (
            ["udm=lexical", "udm.min_density_ratio=20"],
            "udm.min_density_ratio=20 must be in (0, udm.max_density_ratio=10",
        ),
        (["udm=custom"], "udm.embedder._target_ must be given"),
        (["udm=custom", "udm.embedder._target_=json.dumb"], "udm.embedder._target_=json.dumb cannot be found"),
        (["udm=lexical", "udm.embedder.dim=0"], "udm: dim=0 must be"),
    ],
)
def test_wrong_settings_are_one_clear_line(bco_lab: Any, environment: Path, overrides: list[str], message: str) -> None:
    ended = bco_lab(*TINY, *overrides, "hydra.run.dir=run")
    assert ended.status == 2
    assert message in ended.error


def test_a_run_with_matching_leaves_its_figures(bco_lab: Any, environment: Path) -> None:
    topics = ["password reset login account", "refund invoice payment card"]
    rows = [
        {
            "prompt": f"{topics[(i % 10 < 8) == (i % 2 == 0)]} {i}",
            "completion": f"answer {i}",
            "label": i % 2 == 0,
        }
        for i in range(120)
    ]
    log = write_log(environment / "log.jsonl", rows)
    settings = [*TINY, "dataset=unpaired", f"dataset.path={log.name}", "udm=lexical", "generation.count=0"]
    first = bco_lab(*settings, "hydra.run.dir=first")
    assert first.status == 0, first.err
    assert "UDM is indicated because desirable and undesirable rows come from different prompts" in first.err
    found = json.loads((environment / "first" / "udm.json").read_text())
    assert found["classifier"]["auc_low"] > 0.5
    assert (environment / "first" / "plots" / "udm.png").stat().st_size > 10_000
    result = json.loads((environment / "first" / "result.json").read_text())
    assert result["udm"]["weight_mean"] == pytest.approx(found["weights"]["mean"])
    uses = {use["kind"]: use["reused"] for use in result["artifacts"]}
    assert uses["prompt-embeddings"] is uses["p-desirable"] is False

    second = bco_lab(*settings, "udm.max_density_ratio=1.5", "hydra.run.dir=second")
    assert second.status == 0, second.err
    assert "cache: prompt-embeddings reused" in second.err
    assert "cache: p-desirable reused" in second.err
    clamped = json.loads((environment / "second" / "udm.json").read_text())
    assert clamped["classifier"] == found["classifier"]
    assert clamped["weights"]["share_above_max"] > found["weights"]["share_above_max"]


def test_two_processes_embed_once_and_weigh_alike(bco_lab: Any, environment: Path) -> None:
    topics = ["password reset login", "refund invoice payment"]
    rows = [
        {"prompt": f"{topics[(i % 5 < 4) == (i % 2 == 0)]} {i}", "completion": f"a{i}", "label": i % 2 == 0}
        for i in range(60)
    ]
    log = write_log(environment / "log.jsonl", rows)
    settings = [*TINY, "dataset=unpaired", f"dataset.path={log.name}", "udm=lexical", "generation.count=0"]
    batch = ["trainer.per_device_train_batch_size=2", "trainer.gradient_accumulation_steps=2"]
    two = bco_lab(*settings, *batch, "launcher=ddp", "launcher.num_processes=2", "hydra.run.dir=two")
    assert two.status == 0, two.err
    assert two.err.count("cache: prompt-embeddings") == 1  # the other process says nothing, and reads
    one = bco_lab(
        *settings, "trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=1", "hydra.run.dir=one"
    )
    assert one.status == 0, one.err
    uses = {
        use["kind"]: use["reused"] for use in json.loads((environment / "one" / "result.json").read_text())["artifacts"]
    }
    assert uses["prompt-embeddings"] is uses["p-desirable"] is True
    losses = [[row["loss"] for row in metrics_of(environment / run)] for run in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_inspect_writes_a_page_and_trains_nothing(bco_lab: Any, environment: Path) -> None:
    log = SAMPLES / "columns.csv"
    ended = bco_lab(
        "inspect",
        "model=tiny_llama",
        "dataset=columns",
        f"dataset.path={log}",
        "dataset.columns.prompt=question",
        "dataset.columns.completion=answer",
        "dataset.columns.label=thumb",
        "dataset.label_map={up: true, 1: true, down: false, -1: false}",
        "hydra.run.dir=seen",
        "dataset.eval_fraction=0",
    )
    assert ended.status == 0, ended.err
    found = json.loads((environment / "seen" / "inspect.json").read_text())
    assert (found["counts"]["rows"], found["counts"]["desirable"], found["counts"]["prompts"]) == (4, 2, 2)
    assert found["loading"]["left_out"] == {"no label": 1}
    assert found["recommendation"].startswith("UDM is not indicated because")
    assert "UDM is not indicated because" in (environment / "seen" / "inspect.html").read_text()
    assert "UDM is not indicated because" in " ".join(ended.out.split())
    assert sorted(path.name for path in (environment / "seen").iterdir()) == [
        "inspect.html",
        "inspect.json",
        "overrides.yaml",
        "run.log",
    ]


def test_inspect_can_leave_matching_out_and_explains_itself(bco_lab: Any, environment: Path) -> None:
    log = SAMPLES / "unpaired.jsonl"
    settings = ["model=tiny_llama", "dataset=unpaired", f"dataset.path={log}", "dataset.eval_fraction=0"]
    ended = bco_lab("inspect", *settings, "udm=off", "hydra.run.dir=seen")
    assert ended.status == 0, ended.err
    assert json.loads((environment / "seen" / "inspect.json").read_text())["prompt_shift"] is None
    assert bco_lab("inspect", *settings).status == 0
    assert len(list((environment / "outputs" / "inspect").glob("unpaired-*/inspect.html"))) == 1
    shown = bco_lab("inspect", "--help")
    assert shown.status == 0
    assert "usage: bco-lab inspect" in shown.out
    wrong = bco_lab("inspect", "dataset=unpaired", "dataset.path=none.csv")
    assert (wrong.status, "dataset: none.csv: no such file" in wrong.error) == (2, True)
    several = bco_lab("inspect", "-m", "seed=1,2")
    assert (several.status, several.error) == (2, "bco-lab: error: inspect looks at one data set: leave out -m")


def test_inspect_takes_a_second_file_too(bco_lab: Any, environment: Path) -> None:
    for name, start in (("train", 0), ("test", 50)):
        rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i % 2, "p": 0.5} for i in range(start, start + 20)]
        write_log(environment / f"{name}.jsonl", rows)
    files = ["dataset=unpaired", "dataset.path=train.jsonl", "dataset.eval_path=test.jsonl"]
    own = "+dataset.columns.p_desirable=p"
    ended = bco_lab("inspect", "model=tiny_llama", *files, own, "hydra.run.dir=seen")
    assert ended.status == 0, ended.err
    assert "as if the log had no p_desirable" in ended.err
    counts = json.loads((environment / "seen" / "inspect.json").read_text())["counts"]
    assert (counts["rows"], counts["prompts"], counts["held_out"]) == (40, 40, 20)


def test_inspect_looks_at_rows_that_are_too_few_to_train_on(bco_lab: Any, environment: Path) -> None:
    rows = [{"prompt": f"q{i}", "completion": f"a{i}", "label": i} for i in range(2)]
    log = write_log(environment / "log.jsonl", rows)
    settings = ["model=tiny_llama", "dataset=unpaired", f"dataset.path={log}", "hydra.run.dir=seen"]
    ended = bco_lab("inspect", *settings)
    assert ended.status == 0, ended.err
    assert "A run would stop here: " in ended.err
    assert "holds out none of 2 rows" in ended.err
    assert json.loads((environment / "seen" / "inspect.json").read_text())["counts"]["rows"] == 2
