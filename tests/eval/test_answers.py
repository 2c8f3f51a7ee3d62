"""`requests.jsonl`: what was answered before a crash is there after it."""

import json

from puna.eval.answers import Answers


def test_answers_outlive_a_crash_and_a_line_that_it_cut(tmp_path):
    path = tmp_path / "new" / "requests.jsonl"
    answers = Answers(path)
    lines = [{"task": "t", "key": "a", "answer": [-1.5, True]}, {"key": "b", "answer": "é\u2028"}]
    for line in lines:
        answers.add(line)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "c", "ans')
    answers = Answers(path)
    assert answers["a"] == [-1.5, True] and answers["b"] == "é\u2028" and "c" not in answers
    assert path.read_bytes() == whole
    answers.finish(reversed(lines))
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["b", "a"]
