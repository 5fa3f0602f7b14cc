import random
from functools import partial
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from tiny_bert import Encoder, tokenizer

from bco_lab.data.weights import with_density_ratio
from bco_lab.embedding import embed_prompts
from bco_lab.prompt_classifier import UdmDiagnostics
from bco_lab.udm import PromptMatching, UdmReport, add_p_desirable, match_prompts

BOUNDS = {"min_density_ratio": 0.5, "max_density_ratio": 10.0}


def feedback(count: int = 160, seed: int = 0) -> Dataset:
    """Desirable prompts mostly of words w4 to w9, undesirable ones mostly of w50 to w55; some prompts come twice."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        label = number % 2 == 0
        low = draw.random() < (0.9 if label else 0.1)
        words = [f"w{draw.randint(4, 9) if low else draw.randint(50, 55)}" for _ in range(draw.randint(4, 9))]
        rows.append({"prompt": " ".join(words), "completion": "w4", "label": label})
    return Dataset.from_list(rows + rows[:10])


def embedder(encoder: Encoder) -> Any:
    return partial(embed_prompts, embedding_func=encoder, embedding_tokenizer=tokenizer(), batch_size=16)


def match(dataset: Any, encoder: Encoder | None = None, **settings: Any) -> PromptMatching:
    settings = {"prompt_sample_size": 1024, "seed": 0, "name": "train", **settings}
    return match_prompts(dataset, embedder(encoder or Encoder()), **settings)


def add(dataset: Any, **settings: Any) -> tuple[Dataset, UdmReport]:
    settings = {"prompt_sample_size": 1024, "seed": 0, **BOUNDS, **settings}
    return add_p_desirable(dataset, Encoder(), tokenizer(), **settings)


# ---- training rows ----


def test_the_column_tells_the_classes_apart_and_weighs_undesirable_rows() -> None:
    dataset = feedback()
    added, report = add(dataset)
    assert added.remove_columns("p_desirable").to_list() == dataset.to_list()
    p, labels = np.array(added["p_desirable"]), np.array(added["label"])
    assert p[labels].mean() > 0.55 > 0.45 > p[~labels].mean()
    weights = np.array(with_density_ratio(added, **BOUNDS, name="train")["example_weight"])
    assert weights[labels].tolist() == [1.0] * labels.sum()
    assert weights[~labels] == pytest.approx(np.clip(p / (1 - p), 0.5, 10)[~labels])
    assert report.weights.rows == (~labels).sum()
    assert report.weights.mean == pytest.approx(weights[~labels].mean())
    assert report.weights.effective_sample_size == pytest.approx(
        weights[~labels].sum() ** 2 / (weights[~labels] ** 2).sum()
    )
    assert report.diagnostics.prompts == len(set(dataset["prompt"]))
    assert report.diagnostics.auc_low > 0.5
    assert report.recommendation.startswith("UDM is indicated because desirable and undesirable rows come from differ")
    for least, advised in ((0.05, False), (5.0, True)):  # far below the ratios, and above nearly all of them
        sentence = match(dataset).report(min_density_ratio=least, max_density_ratio=10.0).recommendation
        assert ("lower min_density_ratio" in sentence) is advised


def test_rows_in_another_order_and_another_process_get_the_same_probabilities() -> None:
    dataset = feedback(60)
    found = dict(zip(dataset["prompt"], match(dataset).p_desirable, strict=True))
    shuffled = dataset.shuffle(seed=1)
    assert match(shuffled).p_desirable == [found[prompt] for prompt in shuffled["prompt"]]


def test_messages_are_matched_by_what_the_user_wrote() -> None:
    dataset = feedback()
    talk = dataset.map(
        lambda row: {
            "chat": [{"role": "system", "content": "w5"}, {"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": "w4"}],
        }
    )
    talk = talk.remove_columns("prompt").rename_column("chat", "prompt")
    assert match(talk).p_desirable == match(dataset).p_desirable


def test_labels_are_read_as_everywhere_else() -> None:
    dataset = feedback()
    words = ["👍" if label else "down" for label in dataset["label"]]
    assert match(dataset.remove_columns("label").add_column("label", words)).p_desirable == match(dataset).p_desirable


def test_other_bounds_neither_embed_nor_fit_again() -> None:
    encoder = Encoder()
    matching = match(feedback(), encoder)
    calls = len(encoder.calls)
    wide, narrow = (matching.report(min_density_ratio=1 / bound, max_density_ratio=bound) for bound in (1e6, 1.0))
    assert len(encoder.calls) == calls
    assert wide.diagnostics is narrow.diagnostics is matching.fit.diagnostics
    assert wide.weights.mean == pytest.approx(wide.weights.unclamped_mean, rel=1e-12)
    assert (wide.weights.share_below_min, wide.weights.share_above_max) == (0, 0)
    assert narrow.weights.mean == pytest.approx(1, rel=1e-12)
    assert narrow.weights.effective_sample_size == pytest.approx(narrow.weights.rows)
    assert narrow.weights.share_below_min + narrow.weights.share_above_max == pytest.approx(1)


# ---- evaluation rows ----


def test_evaluation_rows_are_judged_by_training_rows_alone() -> None:
    train = feedback()
    seen = set(train["prompt"])
    other = Dataset.from_list([row for row in feedback(seed=1).to_list() if row["prompt"] not in seen])
    encoder = Encoder()
    matching = match(train, encoder)
    mixed = Dataset.from_list([*train.select(range(5)).to_list(), *other.to_list()])
    found = matching.predict(mixed, embedder(encoder), name="eval")
    assert found[:5] == matching.p_desirable[:5]  # held out, though the final classifier knows these rows
    expected = matching.fit.predict(embedder(encoder)(list(other["prompt"])))
    assert found[5:] == pytest.approx(expected.tolist(), abs=1e-5)
    flipped = mixed.map(lambda row: {"label": not row["label"]})
    assert matching.predict(flipped, embedder(encoder), name="eval") == found
    assert matching.predict(mixed.remove_columns("label"), embedder(encoder), name="eval") == found
    labels = np.array(other["label"])
    judged = np.array(found[5:])
    assert judged[labels].mean() > judged[~labels].mean() + 0.1


def test_known_evaluation_prompts_cost_no_embedding() -> None:
    encoder = Encoder()
    matching = match(feedback(), encoder)
    calls = len(encoder.calls)
    assert matching.predict(feedback(), embedder(encoder), name="eval") == matching.p_desirable
    assert matching.predict(feedback().select([]), embedder(encoder), name="eval") == []
    assert len(encoder.calls) == calls


# ---- the report ----


def test_equal_classes_need_no_matching() -> None:
    dataset = feedback(200)
    dealt = [random.Random(number).random() < 0.5 for number in range(len(dataset))]
    _, report = add(dataset.remove_columns("label").add_column("label", dealt))
    assert report.recommendation.startswith(
        "UDM is not indicated because the prompts of both classes cannot be told apart (held-out AUC 0."
    )


def test_one_prompt_cannot_be_matched_and_weighs_one() -> None:
    dataset = Dataset.from_list([{"prompt": "w4 w5", "label": number % 2 == 0} for number in range(8)])
    added, report = add(dataset)
    assert added["p_desirable"] == [0.5] * 8
    assert report.recommendation == (
        "UDM is not indicated because it does nothing here, all weights are equal: the rows of a class share one "
        "prompt, or nearly so, and cannot be both learnt from and held out."
    )


def test_the_report_is_plain_data() -> None:
    report = add(feedback())[1]
    found = report.to_dict()
    assert set(found) == {"classifier", "weights", "recommendation"}
    assert UdmDiagnostics(**found["classifier"]) == report.diagnostics
    assert found["weights"]["mean"] == report.weights.mean


# ---- what is refused ----


def test_a_stream_is_refused() -> None:
    message = r"^train: a stream cannot be matched, because all prompts must be seen before the first step: load it "
    with pytest.raises(ValueError, match=message):
        add(feedback().to_iterable_dataset())


@pytest.mark.parametrize("column", ["p_desirable", "example_weight"])
def test_weights_that_are_there_already_win(column: str) -> None:
    dataset = feedback()
    weighed = dataset.add_column(column, [0.5] * len(dataset))
    message = rf"^eval: the column '{column}' is there already and would win over matching: remove the column, or "
    with pytest.raises(ValueError, match=message):
        match(weighed, name="eval")
    with pytest.raises(ValueError, match=message):
        match(dataset).predict(weighed, embedder(Encoder()), name="eval")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "w4", "label": True}, {"prompt": None, "label": False}], r"^train, row 1, column 'prompt': "),
        ([{"prompt": "w4", "label": "up"}, {"prompt": "w5", "label": "hm"}], r"^train, row 1, column 'label': .*'hm'"),
        ([{"prompt": "w4", "label": True}] * 3, r"^train: only one class present, all 3 labels are desirable"),
        (
            [{"input_ids": [4], "label": True}],
            r"^train: matching needs the column 'prompt'; there are input_ids, label",
        ),
    ],
)
def test_a_bad_row_names_data_set_row_and_column(rows: list[dict[str, Any]], message: str) -> None:
    encoder = Encoder()
    with pytest.raises(ValueError, match=message):
        match(Dataset.from_list(rows), encoder)
    assert encoder.calls == []


def test_an_embedder_that_loses_prompts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^the embedder returned the shape \[2, 3\] for \d+ prompts, not \[prompts, "):
        match_prompts(feedback(), lambda prompts: np.ones((2, 3)), prompt_sample_size=9, seed=0, name="train")
