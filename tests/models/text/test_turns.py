"""Which tokens the assistant said, in every chat format, token by token."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from puna.configs.errors import UserError
from puna.models.text.tokenizer import Tokenizer, load_tokenizer, train_bpe
from puna.models.text.turns import assistant_turns

TEXTS = ["The llama walks over the puna.", "What is 3 + 4? It is 7, été 🦙 yes no"]
BPE = train_bpe(TEXTS * 3, 330)
CHATML = """\
{% for m in messages %}{{ '<|header_start|>' + m['role'] + '\\n' + m['content'] + '<|eot|>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|header_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """\
{{ bos_token }}{% if messages[0]['role'] != 'system' %}\
{{ '<|header_start|>system<|header_end|>\\n\\nToday: ' + (date_string or '') + '<|eot|>' }}\
{% endif %}\
{% for m in messages %}{{ '<|header_start|>' + m['role'] + '<|header_end|>\\n\\n' }}\
{{ m['content'] | trim + '<|eot|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\\n\\n' }}{% endif %}"""
MARKED = """\
{% for m in messages %}<|header_start|>{{ m['role'] }}<|header_end|>\
{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}\
{% else %}{{ m['content'] }}{% endif %}<|eot|>{% endfor %}"""
LLAMA2 = """\
{% for m in messages %}\
{% if m['role'] == 'user' %}{{ '<|begin_of_text|>[INST] ' + m['content'] + ' [/INST]' }}\
{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + ' ' + '<|eot|>' }}{% endif %}\
{% endfor %}"""
FORMATS = {"built in": None, "chatml": CHATML, "llama3": LLAMA3, "marked": MARKED, "llama2": LLAMA2}


def tokenizer(name):
    return Tokenizer(BPE._kind, chat_template=FORMATS[name])


WORDS = st.text("ab été\n 3<|eot|>", min_size=1, max_size=10).filter(lambda text: text.strip())


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None)
@given(system=st.none() | WORDS, texts=st.lists(WORDS, min_size=2, max_size=6))
def test_the_assistants_tokens_and_no_others(name, system, texts):
    t = tokenizer(name)
    roles = itertools.cycle(["user", "assistant"])
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    if system and name != "llama2":
        messages.insert(0, {"role": "system", "content": system})
    turns = assistant_turns(t, messages, variables={"date_string": "today"})
    assert turns.ids == t.chat(messages, add_generation_prompt=False,
                               variables={"date_string": "today"})  # fmt: skip
    said = [m["content"] for m in messages if m["role"] == "assistant"]
    assert len(turns.spans) == len(said)
    end = t.special["<|eot|>"]
    for (start, stop), content in zip(turns.spans, said, strict=True):
        # All of the turn: its last id ends it. Nothing else: what is left is the content alone.
        assert turns.ids[stop - 1] == end
        text = t.decode(turns.ids[start : stop - 1], continuation=True)
        # A token may span the border to the header's last blanks.
        assert text.strip() == content.strip() and len(text) <= len(content) + 2
        assert start and turns.ids[start - 1] != end


def test_prefix_and_marks_agree():
    other = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    other += "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>{% endif %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]
    marked = assistant_turns(tokenizer("marked"), messages)
    assert marked == assistant_turns(Tokenizer(BPE._kind, chat_template=other), messages)


ASKED = [
    {"role": "user", "content": "What?"}, {"role": "assistant", "content": "<think>x</think> Yes."},
    {"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."},
]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        # Earlier turns lose their thoughts.
        (CHATML.replace("m['content'] + '<|eot|>", "(m['content'] if loop.last else "
                        "m['content'].split('</think>')[-1]) + '<|eot|>"),
         "writes earlier turns otherwise|leaves out or changes"),
        (CHATML.replace("+ m['content'] +", "+ m['content'] | upper +"), "leaves out or changes"),
        (CHATML.replace("{% if add_generation_prompt %}", "{% if false %}"),
         "ignores add_generation_prompt"),
        (CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'user' %}"),
         r"messages\[0\].*this user message"),
    ],
)  # fmt: skip
def test_what_could_be_wrong_is_refused(template, reason):
    with pytest.raises(UserError, match=reason) as error:
        assistant_turns(Tokenizer(BPE._kind, chat_template=template), ASKED)
    assert "\n" not in str(error.value)


def test_tool_calls_are_learnt():
    template = (
        "{% for m in messages %}<|header_start|>{{ m.role }}<|header_end|>{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|eot|>{% endfor %}"
        "{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>{% endif %}"
    )
    t = Tokenizer(BPE._kind, chat_template=template)
    call = {"function": {"name": "weather", "arguments": {"city": "Cusco"}}}
    messages = [
        {"role": "user", "content": "Rain?"}, {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "sun"}, {"role": "assistant", "content": "No."},
    ]  # fmt: skip
    turns = assistant_turns(t, messages)
    said = [t.decode(turns.ids[a:b]) for a, b in turns.spans]
    assert said == ['{"name": "weather", "arguments": {"city": "Cusco"}}', "No."]


LOSES = [
    ([{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}], None,
     r"messages\[1\]: the chat template leaves out the call of 'f'"),
    ([{"role": "assistant", "content": "b"}], [{"name": "f"}], "leaves out the tool 'f'"),
    ([{"role": "assistant", "content": "b", "reasoning_content": "Hm."}], None,
     r"messages\[1\]: the chat template leaves out its reasoning_content"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "tools", "reason"), LOSES)
def test_what_a_template_has_no_place_for_is_refused(answer, tools, reason):
    messages = [{"role": "user", "content": "a"}, *answer]
    with pytest.raises(UserError, match=reason):
        assistant_turns(tokenizer("chatml"), messages, tools)


def test_a_control_name_in_a_message_changes_no_other_token(table, tmp_path):
    """A space before the first word of a whole text only, also where a message needs protection."""
    pytest.importorskip("sentencepiece")
    table.chatml(tmp_path)
    t = load_tokenizer(tmp_path)
    plain = t.chat([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    other = t.chat([{"role": "user", "content": "a</s>"}, {"role": "assistant", "content": "b"}])
    assert other[-8:] == plain[-8:] and other[:4] == plain[:4]
