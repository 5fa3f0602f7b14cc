import pytest

from bco_lab.data.chat import apply_template, check_chat_template, check_pair, check_text

USER = [{"role": "user", "content": "q"}]


def answer(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def split(tokenizer, prompt, completion) -> tuple[str, str]:
    text, boundary = apply_template(tokenizer, prompt, completion)
    return text[:boundary], text[boundary:]


def test_the_completion_starts_where_generation_would(smollm2) -> None:
    system = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert split(smollm2, USER, answer("fine")) == (
        system + "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
        "fine<|im_end|>\n",
    )


def test_a_prompt_that_ends_with_the_assistant_is_continued(smollm2) -> None:
    opening, completion = split(smollm2, [*USER, *answer("Sure, ")], answer("here"))
    assert opening.endswith("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\nSure, ")
    assert completion == "here<|im_end|>\n"


def test_a_continued_prompt_keeps_its_end_out_of_the_completion(words) -> None:
    plain = words("", chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert split(plain, [*USER, *answer(" a")], answer("ab")) == ("q a", "ab")
    trims = words("", chat_template="{% for m in messages %}<{{ m['content'] | trim }}>{% endfor %}")
    assert split(trims, [*USER, *answer("Sure, ")], answer("here ")) == ("<q><Sure, ", "here>")


def test_later_messages_of_a_completion_belong_to_it(words) -> None:
    completion = [*answer("a"), {"role": "tool", "content": "b"}, *answer("c")]
    assert split(words(""), USER, completion)[1] == (
        "a<|im_end|>\n<|im_start|>tool\nb<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
    )


def test_a_template_that_opens_a_reasoning_block_only_to_generate(words) -> None:
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'].split('</think>')[-1] | trim }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
    )
    tokenizer = words("", chat_template=template)
    assert split(tokenizer, USER, answer("fine")) == ("<user>q<assistant>", "fine")
    assert split(tokenizer, USER, answer("<think>hm</think> fine")) == ("<user>q<assistant>", "fine")
    # The characters that the answer shares with what generation would open are the answer's.
    assert split(tokenizer, USER, answer("<this>")) == ("<user>q<assistant>", "<this>")
    assert split(tokenizer, USER, answer("\ue000x")) == ("<user>q<assistant>", "\ue000x")


def test_a_template_that_keeps_the_reasoning_block_counts_it_as_generated(words) -> None:
    template = (
        "{% for m in messages %}<{{ m['role'] }}>"
        "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}"
        "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    assert split(words("", chat_template=template), USER, answer("fine")) == (
        "<user>q<assistant>",
        "<think></think>fine",
    )


def test_a_template_that_rewrites_history_once_an_answer_follows(words) -> None:
    template = (
        "{% set last = messages | selectattr('role', 'equalto', 'assistant') | list | last %}"
        "{% for m in messages %}<{{ m['role'] }}>"
        "{% if m['role'] == 'assistant' and m != last %}{{ m['content'].split('</think>')[-1] }}"
        "{% else %}{{ m['content'] }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    prompt = [*USER, *answer("<think>t</think>one"), {"role": "user", "content": "r"}]
    # Only the answer is the completion, not also the history from where the two renderings part.
    assert split(words("", chat_template=template), prompt, answer("two")) == (
        "<user>q<assistant>one<user>r<assistant>",
        "two",
    )


def test_messages_a_template_refuses_are_an_error_of_one_line(words) -> None:
    tokenizer = words("", chat_template="{{ raise_exception('roles must alternate\nsee the manual') }}")
    with pytest.raises(ValueError, match=r"^the chat template refuses the messages: roles must alternate$"):
        apply_template(tokenizer, USER, answer("x"))


def test_a_tokenizer_without_chat_template_is_refused_with_what_to_do(letters) -> None:
    tokenizer = letters()
    with pytest.raises(
        ValueError, match=r"the tokenizer .* has no chat template.*set tokenizer.chat_template, or write"
    ):
        check_chat_template(tokenizer)
    tokenizer.name_or_path = "my/model"
    with pytest.raises(ValueError, match=r"the tokenizer 'my/model' has no chat template"):
        check_chat_template(tokenizer)


@pytest.mark.parametrize("value", ["", "text", USER, [*USER, *answer("x")]])
def test_check_text_accepts_strings_and_messages(value) -> None:
    check_text(value, "prompt")


@pytest.mark.parametrize(
    ("value", "part", "message"),
    [
        (None, "prompt", "prompt must be a string or a list of at least one message, not null"),
        (3, "prompt", "prompt must be a string or a list of at least one message, not int 3"),
        ([], "completion", r"completion must be a string or a list of at least one message, not list \[\]"),
        (["hi"], "prompt", r"prompt\[0\] must be a message with a string 'role', not 'hi'"),
        ([{"role": "user"}], "prompt", r"prompt\[0\] must be a message with a string 'content'"),
        ([{"role": "user", "content": None}], "prompt", r"prompt\[0\] must be a message with a string 'content'"),
        (
            [*USER, {"role": "asistant", "content": ""}],
            "prompt",
            r"prompt\[1\] has the role 'asistant', which is none of",
        ),
        (USER, "completion", r"completion\[0\] must have the role 'assistant', not 'user'"),
        ([{**USER[0], "tool_calls": [1]}], "prompt", r"prompt\[0\] has 'tool_calls'; only role and content are used"),
    ],
)
def test_check_text_names_what_is_wrong(value, part, message) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        check_text(value, part)


def test_check_pair_refuses_a_string_beside_messages() -> None:
    check_pair("q", "a")
    check_pair(USER, answer("a"))
    with pytest.raises(
        ValueError, match=r"^prompt is a string but completion is a list of messages; both must be of one"
    ):
        check_pair("q", answer("a"))
