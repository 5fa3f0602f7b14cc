import pytest
import tiny
from datasets import Dataset, Features, IterableDataset, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from bco_lab.data.tokenization import TokenizationReport, tokenize_dataset


def rows(*pairs, **columns) -> Dataset:
    prompts, completions = zip(*pairs, strict=True)
    labels = [True] * len(pairs)
    return Dataset.from_dict({"prompt": prompts, "completion": completions, "label": labels} | columns)


def one(tokenizer, prompt, completion, **options) -> tuple[list[int], list[int]]:
    """Ids of prompt and completion of a single row."""
    options = {"max_length": None} | options
    row = tokenize_dataset(rows((prompt, completion)), tokenizer, **options)[0][0]
    return row["input_ids"][: row["prompt_length"]], row["input_ids"][row["prompt_length"] :]


def chat(question: str, answer: str) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    return [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]


# --- boundary


def test_a_token_merged_across_the_boundary_is_the_completions(letters) -> None:
    assert one(letters(), "cb", "bc") == ([5, 4], [4, 5, 2])
    assert one(letters(), "ca", "bc") == ([5], [7, 5, 2])
    assert one(letters(), "cab", "c") == ([5, 7], [5, 2])


def test_real_subwords_merge_across_the_boundary_too(smollm2) -> None:
    whole = smollm2("The answer is yes", add_special_tokens=False)["input_ids"]
    assert one(smollm2, "The answer is", " yes") == (whole[:3], [*whole[3:], 2])
    assert one(smollm2, "The answer is ", "yes") == (whole[:3], [*whole[3:], 2])
    assert one(smollm2, "The answer is y", "es") == (whole[:3], [*whole[3:], 2])


def test_characters_of_several_bytes_stay_whole(smollm2) -> None:
    prompt, completion = one(smollm2, "a 🙂", "🙃 b")
    assert smollm2.decode(prompt) == "a 🙂"
    assert smollm2.decode(completion) == "🙃 b<|im_end|>"


def test_offsets_that_leave_out_white_space_do_not_move_the_boundary() -> None:
    vocab = {token: number for number, token in enumerate(["</s>", "Ġ", "Ċ", "a", "b", "Ġb", "ĊĊ"])}
    backend = Tokenizer(models.BPE(vocab, [("Ġ", "b"), ("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert one(tokenizer, "a\n\n", "b") == ([3, 2, 2], [4, 0])  # the pattern takes the last white space for itself
    assert one(tokenizer, "a", " b") == ([3], [5, 0])
    assert one(tokenizer, "a", "\n\n") == ([3], [6, 0])


def test_a_slow_tokenizer_compares_the_whole_with_the_prompt_alone() -> None:
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    assert one(tokenizer, "hi", " é") == ([ord("h") + 3, ord("i") + 3], [ord(" ") + 3, 0xC3 + 3, 0xA9 + 3, 1])


# --- BOS


def test_bos_is_prepended_where_the_tokenizer_itself_does(letters) -> None:
    assert one(letters(adds_bos=True), "c", "b") == ([1, 5], [4, 2])
    assert one(letters(bos=True), "c", "b") == ([5], [4, 2])


def test_bos_is_never_doubled(letters) -> None:
    assert one(letters(adds_bos=True), "<s>c", "b") == ([1, 5], [4, 2])
    assert one(letters(adds_bos=True), "", "<s>b") == ([1], [4, 2])


def test_bos_of_a_chat_template_is_not_doubled_and_a_missing_one_is_added(letters) -> None:
    writes_bos = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    leaves_it_out = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    for template in (writes_bos, leaves_it_out):
        assert one(letters(adds_bos=True, chat_template=template), *chat("c", "b")) == ([1, 5], [4, 2])
    assert one(letters(bos=True, chat_template=writes_bos), *chat("c", "b")) == ([1, 5], [4, 2])
    assert one(letters(bos=True, chat_template=leaves_it_out), *chat("c", "b")) == ([5], [4, 2])


def test_an_empty_prompt_gets_any_bos_there_is_to_predict_from(letters, smollm2) -> None:
    assert one(letters(bos=True), "", "cb") == ([1], [5, 4, 2])
    assert one(letters(), "", "cb") == ([], [5, 4, 2])
    assert one(smollm2, "", "yes") == ([1], [smollm2.convert_tokens_to_ids("yes"), 2])


# --- EOS


@pytest.mark.parametrize("completion", ["b", "b</s>", "b</s>\n", "b</s></s>", "b</s> \n</s>\n\n"])
def test_a_completion_ends_with_exactly_one_eos(letters, completion) -> None:
    assert one(letters(), "c", completion) == ([5], [4, 2])


def test_eos_inside_a_completion_and_in_the_prompt_stays(letters) -> None:
    assert one(letters(), "c</s>\n", "b</s>c") == ([5, 2, 8], [4, 2, 5, 2])
    assert one(letters(), "c</s>", "") == ([5, 2], [2])


def test_what_a_chat_template_writes_after_eos_is_removed(words, smollm2) -> None:
    tokenizer = words("user assistant q fine")
    assert one(tokenizer, *chat("q", "fine")) == ([1, 3, 5, 2, 1, 4], [6, 2])
    prompt, completion = one(smollm2, *chat("How is it?", "fine"))
    opening = smollm2.apply_chat_template(chat("How is it?", "")[0], add_generation_prompt=True)["input_ids"]
    assert prompt == opening
    assert completion == [*smollm2("fine")["input_ids"], 2]


def test_without_an_eos_token_none_is_added(letters) -> None:
    assert one(letters(eos=False), "c", "bb") == ([5], [4, 4])


def test_an_empty_completion_is_its_eos_and_an_error_without_one(letters) -> None:
    assert one(letters(), "c", "") == ([5], [2])
    with pytest.raises(ValueError, match=r"^train, row 0: no completion token, 1 tokens of which 1 are the prompt$"):
        one(letters(eos=False), "c", "")
    with pytest.raises(ValueError, match=r"^train, row 0: nothing stands before its one completion token"):
        one(letters(), "", "")


# --- length


@pytest.mark.parametrize(
    ("truncation", "max_length", "prompt", "completion"),
    [
        ("keep_start", 8, [1, 3, 5, 5], [4, 4, 4, 2]),
        ("keep_start", 7, [1, 3, 5, 5], [4, 4, 4]),
        ("keep_start", 5, [1, 3, 5, 5], [4]),
        ("keep_end", 8, [1, 3, 5, 5], [4, 4, 4, 2]),
        ("keep_end", 7, [1, 5, 5], [4, 4, 4, 2]),
        ("keep_end", 5, [1], [4, 4, 4, 2]),
        ("keep_end", 4, [1], [4, 4, 4]),
        ("keep_end", 2, [1], [4]),
    ],
)
def test_truncation_is_a_hard_cap(letters, truncation, max_length, prompt, completion) -> None:
    found = one(letters(adds_bos=True), "acc", "bbb", max_length=max_length, truncation=truncation)
    assert found == (prompt, completion)


def test_keep_end_keeps_the_prompts_last_token_where_there_is_no_bos(letters) -> None:
    assert one(letters(), "acc", "bbb", max_length=6, truncation="keep_end") == ([5, 5], [4, 4, 4, 2])
    assert one(letters(), "acc", "bbb", max_length=3, truncation="keep_end") == ([5], [4, 4])
    assert one(letters(), "", "bbb", max_length=3, truncation="keep_end") == ([], [4, 4, 4])


def test_max_completion_length_cuts_first(letters) -> None:
    assert one(letters(), "acc", "bbb", max_completion_length=2) == ([3, 5, 5], [4, 4])
    assert one(letters(), "acc", "b", max_completion_length=2) == ([3, 5, 5], [4, 2])
    options = {"max_length": 5, "max_completion_length": 2, "truncation": "drop"}
    assert one(letters(), "acc", "bbb", **options) == ([3, 5, 5], [4, 4])


def test_the_report_counts_rows_and_tokens(letters) -> None:
    dataset = rows(("c", "b"), ("c", "bbbb"), ("cc", "bbbbbb"))  # 3, 6 and 9 tokens
    kept, report = tokenize_dataset(dataset, letters(), max_length=6)
    assert report == TokenizationReport(rows=3, kept=3, truncated=1, dropped=0, longest=9, mean_tokens=5.0)
    assert [len(row["input_ids"]) for row in kept] == [3, 6, 6]
    kept, report = tokenize_dataset(dataset, letters(), max_length=6, truncation="drop")
    assert report == TokenizationReport(rows=3, kept=2, truncated=0, dropped=1, longest=9, mean_tokens=4.5)
    assert kept["example_id"][:] == [0, 1]


def test_drop_that_leaves_nothing_is_an_error(letters) -> None:
    with pytest.raises(
        ValueError, match=r"^eval: all 1 rows are longer than max_length=3 and truncation=drop leaves none"
    ):
        tokenize_dataset(rows(("ccc", "bbb")), letters(), max_length=3, truncation="drop", name="eval")


def test_a_prompt_that_leaves_no_room_is_an_error_that_names_row_and_ways_out(letters) -> None:
    dataset = rows(("c", "b"), ("cccc", "b"), example_id=[7, 9])
    with pytest.raises(ValueError, match=r"no room") as caught:
        tokenize_dataset(dataset, letters(), max_length=4, name="eval")
    assert str(caught.value) == (
        "eval, row 1 (example_id 9): the prompt has 4 tokens, which leaves no room for a completion token within "
        "max_length=4; raise it, or use truncation=keep_end or truncation=drop"
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"truncation": "middle"}, "truncation='middle' must be one of keep_start, keep_end, drop"),
        ({"max_length": 1}, "max_length=1 must be at least 2"),
        ({"max_completion_length": 0}, "max_completion_length=0 must be at least 1"),
    ],
)
def test_wrong_limits_are_errors(letters, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        one(letters(), "c", "b", **options)


# --- rows and columns


def test_columns_that_come_out(letters) -> None:
    given = rows(("c", "b"), ("c", "a"), extra=[1, 2], ref_logps=[-1.5, -2.5], example_weight=[1.0, 0.5])
    found, _report = tokenize_dataset(
        given.remove_columns("label").add_column("label", ["up", "down"]), letters(), max_length=9
    )
    assert sorted(found.column_names) == [
        "example_id",
        "example_weight",
        "input_ids",
        "label",
        "prompt_length",
        "ref_logps",
    ]
    assert found[1] == {
        "input_ids": [5, 3, 2],
        "prompt_length": 1,
        "label": False,
        "example_id": 1,
        "ref_logps": -2.5,
        "example_weight": 0.5,
    }


@pytest.mark.parametrize("labels", [[1, 0], [1, -1], [1.0, 0.0], ["👍", "👎"], ["chosen", "rejected"]])
def test_labels_of_any_form_come_out_as_bools(letters, labels) -> None:
    found, _report = tokenize_dataset(rows(("c", "b"), ("c", "a"), label=labels), letters(), max_length=9)
    assert found["label"][:] == [True, False]
    assert found.features["label"] == Value("bool")


def test_wrong_rows_are_named(letters) -> None:
    with pytest.raises(ValueError, match=r"^train, row 1, column 'label': label 'so-so' is none of true/false"):
        tokenize_dataset(rows(("c", "b"), ("c", "a"), label=["up", "so-so"]), letters(), max_length=9)
    with pytest.raises(
        ValueError, match=r"^train, row 1: completion must be a string or a list of at least one message, not"
    ):
        tokenize_dataset(rows(("c", "b"), ("c", None)), letters(), max_length=9)
    with pytest.raises(ValueError, match=r"^train, row 0: prompt is a string but completion is a list of messages"):
        tokenize_dataset(rows(("c", chat("c", "b")[1])), letters(), max_length=9)
    with pytest.raises(ValueError, match=r"^train, row 0: the tokenizer .* has no chat template"):
        tokenize_dataset(rows(chat("c", "b")), letters(), max_length=9)
    with pytest.raises(ValueError, match=r"^train, column 'example_id': values must be unique, 1 are repeated$"):
        tokenize_dataset(rows(("c", "b"), ("c", "a"), example_id=[4, 4]), letters(), max_length=9)


def test_missing_columns_and_rows_are_errors(letters) -> None:
    with pytest.raises(ValueError, match=r"^train: no column 'completion', 'label'; the data set has: prompt, text$"):
        tokenize_dataset(Dataset.from_dict({"prompt": ["c"], "text": ["b"]}), letters(), max_length=9)
    with pytest.raises(ValueError, match=r"^eval: the data set has no rows$"):
        tokenize_dataset(rows(("c", "b")).select([]), letters(), max_length=9, name="eval")


def test_tokenised_rows_pass_through_under_the_same_cap(letters) -> None:
    given = Dataset.from_dict(
        {"input_ids": [[9, 8], [1, 7, 6, 5, 4]], "prompt_length": [1, 3], "label": [1, 0], "ref_logps": [-1.0, -2.0]}
    )
    found, report = tokenize_dataset(given, letters(bos=True), max_length=4, truncation="keep_end")
    assert found["input_ids"][:] == [[9, 8], [1, 6, 5, 4]]
    assert found["prompt_length"][:] == [1, 2]
    assert found["label"][:] == [True, False]
    assert found["example_id"][:] == [0, 1]
    assert found["ref_logps"][:] == [-1.0, -2.0]
    assert report.truncated == 1
    again, _report = tokenize_dataset(found, letters(bos=True), max_length=4)
    assert again.to_list() == found.to_list()


def test_tokenised_rows_with_an_impossible_prompt_length_are_errors(letters) -> None:
    given = Dataset.from_dict({"input_ids": [[9, 8]], "prompt_length": [2], "label": [True]})
    with pytest.raises(ValueError, match=r"^train, row 0: no completion token, 2 tokens of which 2 are the prompt$"):
        tokenize_dataset(given, letters(), max_length=4)


def test_batches_and_processes_do_not_change_the_rows(letters) -> None:
    dataset = rows(*(("c" * (1 + i % 3), "ab" * (i % 4)) for i in range(1003)))
    alone, report = tokenize_dataset(dataset, letters(), max_length=6)
    together, same_report = tokenize_dataset(dataset, letters(), max_length=6, num_proc=2)
    assert together.to_list() == alone.to_list()
    assert same_report == report
    assert alone[1002] == {"input_ids": [5, 7, 7, 2], "prompt_length": 1, "label": True, "example_id": 1002}


def test_rows_of_a_data_set_on_disk_follow_the_tokenizer(letters, tmp_path) -> None:
    rows(("c", "b")).save_to_disk(tmp_path / "data")
    for tokenizer, ids in ((letters(), [5, 4, 2]), (letters(adds_bos=True), [1, 5, 4, 2])):
        found, _report = tokenize_dataset(Dataset.load_from_disk(tmp_path / "data"), tokenizer, max_length=9)
        assert found[0]["input_ids"] == ids


def test_a_stream_is_tokenised_as_it_is_read(letters) -> None:
    dataset = rows(("c", "b"), ("cc", "bbbbb"), ("ca", "b"))
    expected, _report = tokenize_dataset(dataset, letters(), max_length=6, truncation="drop")
    known, report = tokenize_dataset(dataset.to_iterable_dataset(), letters(), max_length=6, truncation="drop")
    assert report is None
    assert list(known) == expected.to_list()
    stream = IterableDataset.from_generator(lambda: iter(dataset.to_list()))
    assert list(tokenize_dataset(stream, letters(), max_length=6, truncation="drop")[0]) == expected.to_list()


def test_the_types_do_not_depend_on_the_rows(letters) -> None:
    found, _report = tokenize_dataset(rows(("c", "b"), label=[1]), letters(), max_length=9)
    assert found.features == Features(
        {"input_ids": found.features["input_ids"], "label": Value("bool"), "prompt_length": Value("int64")}
        | {"example_id": Value("int64")}
    )
    assert found.features["input_ids"].feature == Value("int32")


# --- encoder-decoder


def apart(prompt, completion, **options) -> tuple[list[int], list[int]]:
    return one(tiny.t5_tokenizer(), prompt, completion, encoder_decoder=True, **options)


def test_an_encoder_decoder_gets_two_texts_each_with_its_own_end() -> None:
    assert apart("w2 w3", "w4 w5") == ([2, 3, 1], [4, 5, 1])
    assert apart("w2", "w4<eos>") == ([2, 1], [4, 1])
    assert one(tiny.tokenizer(), "w2 w3", "w4", encoder_decoder=True) == ([2, 3], [4, 1])
    assert apart("", "w4") == ([1], [4, 1])


def test_limits_hold_for_encoder_and_decoder_together() -> None:
    assert apart("w2 w3", "w4 w5 w6", max_completion_length=2) == ([2, 3, 1], [4, 5])
    assert apart("w2 w3", "w4 w5 w6", max_length=5) == ([2, 3, 1], [4, 5])
    assert apart("w2 w3 w4", "w5 w6", max_length=5, truncation="keep_end") == ([4, 1], [5, 6, 1])


def test_messages_for_an_encoder_decoder_go_through_the_template() -> None:
    tokenizer = tiny.t5_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    prompt, completion = chat("w2 w3", "w4")
    assert one(tokenizer, prompt, completion, encoder_decoder=True) == ([2, 3, 1], [4, 1])


def test_an_encoder_with_nothing_to_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train, row 0: the prompt has no tokens, so the encoder"):
        one(tiny.tokenizer(), "", "w4", encoder_decoder=True)


def bart_style() -> PreTrainedTokenizerFast:
    """One token per word, `<s>` 0 and `</s>` 1 around every text."""
    words = {"<s>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 10)}
    backend = Tokenizer(models.WordLevel(words, unk_token="<s>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("max_length", "prompt", "completion"),
    [
        (9, [0, 2, 3, 4, 1], [0, 5, 6, 1]),
        (7, [0, 4, 1], [0, 5, 6, 1]),
        (6, [0, 1], [0, 5, 6, 1]),
        (4, [0, 1], [0, 5]),
        (3, [0, 1], [0]),
        (2, [1], [0]),
    ],
)
def test_keep_end_keeps_both_marks_of_a_text_for_the_encoder(max_length, prompt, completion) -> None:
    options = {"max_length": max_length, "truncation": "keep_end", "encoder_decoder": True}
    assert one(bart_style(), "w2 w3 w4", "w5 w6", **options) == (prompt, completion)


def test_keep_end_leaves_the_encoder_the_end_of_its_text() -> None:
    for max_length, completion in ((4, [5, 6, 1]), (3, [5, 6]), (2, [5])):
        assert apart("w2 w3", "w5 w6", max_length=max_length, truncation="keep_end") == ([1], completion)


def test_limits_of_an_encoder_decoder_drop_or_refuse() -> None:
    with pytest.raises(ValueError, match=r"^train, row 0: the prompt has 3 tokens, which leaves no room"):
        apart("w2 w3", "w4", max_length=3)
    with pytest.raises(ValueError, match=r"^train: all 1 rows are longer than max_length=4 and truncation=drop"):
        apart("w2 w3", "w4", max_length=4, truncation="drop")


def test_prepared_rows_of_an_encoder_decoder_pass_through() -> None:
    dataset = rows(("w2 w3", "w4"), ("", "w5 w6"))
    found, report = tokenize_dataset(dataset, tiny.t5_tokenizer(), max_length=9, encoder_decoder=True)
    assert [(row["input_ids"], row["prompt_length"]) for row in found] == [([2, 3, 1, 4, 1], 3), ([1, 5, 6, 1], 1)]
    again, same_report = tokenize_dataset(found, tiny.t5_tokenizer(), max_length=9, encoder_decoder=True)
    assert again.to_list() == found.to_list()
    assert same_report == report
    unread = Dataset.from_dict({"input_ids": [[4, 1]], "prompt_length": [0], "label": [True]})
    with pytest.raises(ValueError, match=r"^eval, row 0: the prompt has no tokens, so the encoder"):
        tokenize_dataset(unread, tiny.t5_tokenizer(), max_length=9, encoder_decoder=True, name="eval")
    alone, _report = tokenize_dataset(unread, tiny.tokenizer(), max_length=9)
    assert alone[0]["input_ids"] == [4, 1]


def test_batches_processes_and_streams_do_not_change_the_rows_of_an_encoder_decoder() -> None:
    dataset = rows(*((f"w{2 + i % 7} w9", "w3 " * (i % 4)) for i in range(1003)))
    options = {"max_length": 6, "encoder_decoder": True, "truncation": "keep_end"}
    alone, _report = tokenize_dataset(dataset, tiny.t5_tokenizer(), **options)
    together, _report = tokenize_dataset(dataset, tiny.t5_tokenizer(), num_proc=2, **options)
    stream, _report = tokenize_dataset(dataset.to_iterable_dataset(), tiny.t5_tokenizer(), **options)
    assert together.to_list() == list(stream) == alone.to_list()
    assert alone[1002] == {"input_ids": [3, 9, 1, 3, 3, 1], "prompt_length": 3, "label": True, "example_id": 1002}
    assert alone[1000]["input_ids"] == [8, 9, 1, 1]


def test_a_slow_tokenizer_of_an_encoder_decoder() -> None:
    h, i, space, e_acute = ord("h") + 3, ord("i") + 3, ord(" ") + 3, [0xC3 + 3, 0xA9 + 3]
    assert one(ByT5Tokenizer(), "hi", " é", encoder_decoder=True) == ([h, i, 1], [space, *e_acute, 1])
