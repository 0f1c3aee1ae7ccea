"""Reading prompts: every format, every common accident of spreadsheets, and errors that name the line."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from imagefarm.prompt_files import PromptError, PromptRow, convert, parse, read_arguments
from shared.specs import Limits, accepted_fields

DIFFUSION = accepted_fields("stable_diffusion", Limits())
GAN = accepted_fields("gan", Limits(num_classes=7))
HOSTED = accepted_fields("openai_images", Limits())


def parameters_of(model: str | None) -> dict[str, Any]:
    return GAN if model == "demo-gan" else DIFFUSION


def read(text: str | bytes, kind: str = ".csv") -> list[PromptRow]:
    return parse(text.encode() if isinstance(text, str) else text, f"f{kind}", kind, parameters_of)


def refused(text: str | bytes, kind: str = ".csv") -> str:
    with pytest.raises(PromptError) as caught:
        read(text, kind)
    return caught.value.detail


def test_text_skips_comments_and_blank_lines_and_keeps_line_numbers() -> None:
    rows = read("# colors\n\na red circle\r\n  a blue star  \n", ".txt")
    assert [(row.where, row.prompt) for row in rows] == [
        ("f.txt line 3", "a red circle"),
        ("f.txt line 4", "a blue star"),
    ]


def test_json_that_is_too_deep_or_too_large_is_told() -> None:
    deep = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"
    assert refused(deep, ".jsonl") == "f.jsonl line 1: is nested too deeply"
    assert refused('{"prompt": "a", "guidance_scale": 1e999}', ".jsonl").endswith("1e999 is too large")


@pytest.mark.parametrize("argument", ["prompts.json", "Prompts.XLSX", "folder", "known.dat"])
def test_what_is_meant_as_a_file_is_not_taken_for_a_prompt(
    argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("known.dat").write_text("a")
    with pytest.raises(PromptError, match=r"is a folder|this kind of file is not known"):
        read_arguments([argument], bytes, parameters_of)
    for prompt in ("see prompts.json", "a St. Bernard", "v1.5", "x" * 5000):
        assert [row.prompt for row in read_arguments([prompt], bytes, parameters_of)] == [prompt]


def test_text_line_may_hold_rare_separators() -> None:
    assert [row.prompt for row in read("a\u2028b\x0bc\nd", ".txt")] == ["a\u2028b\x0bc", "d"]


def test_csv_converts_by_the_schema_of_the_model() -> None:
    (row,) = read("prompt,seed,guidance_scale,negative_prompt,scheduler\na red circle,7,3,0012,ddim\n")
    assert row.prompt == "a red circle"
    assert row.parameters == {"seed": 7, "guidance_scale": 3, "negative_prompt": "0012", "scheduler": "ddim"}


def test_csv_empty_cells_leave_the_defaults() -> None:
    rows = read("prompt,seed,width\na,,\nb, ,64\n")
    assert [row.parameters for row in rows] == [{}, {"width": 64}]


def test_csv_with_byte_order_mark_semicolons_and_decimal_comma() -> None:
    (row,) = read("\ufeffPrompt;Guidance Scale;steps;;\r\nein Kreis, rot;7,5;20;;\r\n")
    assert row.prompt == "ein Kreis, rot"
    assert row.parameters == {"guidance_scale": 7.5, "num_inference_steps": 20}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_delimiter_is_found(delimiter: str) -> None:
    (row,) = read(f"seed{delimiter}prompt\n3{delimiter}a red circle\n")
    assert (row.prompt, row.parameters) == ("a red circle", {"seed": 3})


def test_csv_in_utf_16_as_spreadsheets_export_it() -> None:
    (row,) = read("prompt\tseed\nein großer Stern\t1\n".encode("utf-16"), ".tsv")
    assert row.prompt == "ein großer Stern"


def test_csv_cells_may_hold_quotes_and_newlines_and_lines_stay_right() -> None:
    rows = read('prompt,seed\n"a ""big""\nstar, red",1\n\nb,2\n')
    assert [(row.where, row.prompt) for row in rows] == [
        ("f.csv line 2", 'a "big"\nstar, red'),
        ("f.csv line 5", "b"),
    ]
    assert "f.csv line 5, column seed" in refused('prompt,seed\n"a\nb",1\n\nb,x\n')


def test_csv_bad_numbers_are_told_all_at_once() -> None:
    told = refused("prompt,seed,guidance_scale\na,x,1\nb,1.5,2\nc,1,nan\nd,1,inf\ne,1,1e3\n")
    assert told.splitlines() == [
        "f.csv line 2, column seed: 'x' is not a whole number",
        "f.csv line 3, column seed: '1.5' is not a whole number",
        "f.csv line 4, column guidance_scale: 'nan' is not a number",
        "f.csv line 5, column guidance_scale: 'inf' is not a number",
    ]


def test_csv_faults_are_limited() -> None:
    assert len(refused("prompt,seed\n" + "a,x\n" * 1000).splitlines()) == 10


def test_csv_unknown_column_is_told_with_the_nearest_name() -> None:
    assert "'sede' is not a parameter of this model; did you mean seed?" in refused("prompt,sede\na,1\n")


def test_csv_without_prompt_column() -> None:
    assert refused("text,seed\na,1\n") == "f.csv line 1: there is no column 'prompt', only text, seed"


def test_csv_for_a_model_without_prompts() -> None:
    rows = read("model,class_index,seed\ndemo-gan,0,1\ndemo-gan,6,2\n")
    assert [(row.model, row.parameters["class_index"]) for row in rows] == [("demo-gan", 0), ("demo-gan", 6)]


def test_csv_rows_of_several_models_use_the_schema_of_each() -> None:
    rows = read("prompt,model,class_index,width\na,,,64\nb,demo-gan,3,\n")
    assert [(row.model, dict(row.parameters)) for row in rows] == [
        (None, {"width": 64}),
        ("demo-gan", {"class_index": 3}),
    ]
    assert "f.csv line 2: column 'width' is not a parameter" in refused("prompt,model,width\na,demo-gan,64\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prompt,seed\na,1,2\n", "line 2: has 3 cells, the header 2"),
        ("prompt,prompt\na,b\n", "line 1: the column 'prompt' is there twice"),
        ("prompt,,seed\na,b,1\n", "line 1: column 2 has no heading"),
        ('prompt\n"never closed\n', "is a quotation mark never closed?"),
        ('prompt\n"a" b\n', "line 2:"),
        ("", "holds no prompts"),
        ("prompt\n", "holds no prompts"),
        ("\n\n", "holds no prompts"),
    ],
)
def test_csv_accidents(text: str, said: str) -> None:
    assert said in refused(text)


@pytest.mark.parametrize("kind", [".txt", ".csv", ".jsonl", ""])
@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n\x00\x00", b"\x00" * 100, b"prompt\ncaf\xe9\n", b"\xff\xfe\x00"])
def test_binary_rubbish_is_refused(kind: str, data: bytes) -> None:
    told = refused(data, kind)
    assert "is not" in told
    assert f"f{kind}" in told


def test_wrong_encoding_names_the_line() -> None:
    assert refused(b"prompt\na\ncaf\xe9\n") == "f.csv line 3: is not UTF-8 text; save the file as UTF-8"


def test_json_lines_hold_texts_and_objects() -> None:
    rows = read('"a"\n\n{"prompt": "b", "seed": 1, "model": "demo-gan"}\n', ".jsonl")
    assert rows == [
        PromptRow("f.jsonl line 1", "a", None, {}),
        PromptRow("f.jsonl line 3", "b", "demo-gan", {"seed": 1}),
    ]


def test_json_lines_faults() -> None:
    told = refused('{"prompt": 3}\nfoo\n{"seed": NaN}\n[1]\n{"prompt": "a", "model": 2}\n', ".jsonl").splitlines()
    assert told == [
        "f.jsonl line 1: prompt and model must be texts",
        "f.jsonl line 2: is not JSON: Expecting value at column 1",
        "f.jsonl line 3: is not JSON: NaN is not a number",
        "f.jsonl line 4: must be a text or an object with a prompt",
        "f.jsonl line 5: prompt and model must be texts",
    ]


@pytest.mark.parametrize(
    ("data", "prompts"),
    [
        (b"a red circle\na blue star\n", ["a red circle", "a blue star"]),
        (b'{"prompt": "a"}\n"b"\n', ["a", "b"]),
        (b'"quoted" words\nmore\n', ['"quoted" words', "more"]),
        (b"{curly} words\n", ["{curly} words"]),
    ],
)
def test_standard_input_is_told_by_its_content(data: bytes, prompts: list[str]) -> None:
    rows = read_arguments(["-"], lambda: data, parameters_of)
    assert [row.prompt for row in rows] == prompts


def test_arguments_mix_texts_and_files(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("from the file\n")
    rows = read_arguments(["a red circle", str(tmp_path / "p.txt"), "cat.png"], bytes, parameters_of)
    assert [row.prompt for row in rows] == ["a red circle", "from the file", "cat.png"]


def test_missing_and_unknown_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no such file"):
        read_arguments([str(tmp_path / "none.csv")], bytes, parameters_of)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(PromptError, match="cannot be read"):
        read_arguments([str(tmp_path / "folder.csv")], bytes, parameters_of)
    (tmp_path / "prompts.xlsx").write_bytes(b"PK")
    with pytest.raises(PromptError, match="this kind of file is not known"):
        read_arguments([str(tmp_path / "prompts.xlsx")], bytes, parameters_of)


def test_long_argument_is_a_prompt() -> None:
    prompt = "a very long. prompt " * 300
    assert read_arguments([prompt], bytes, parameters_of)[0].prompt == prompt


@pytest.mark.parametrize(
    ("text", "schema", "value"),
    [
        ("true", {"type": "boolean"}, True),
        ("No", {"type": "boolean"}, False),
        ("7", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, 7),
        ("0.5", {"type": "number"}, 0.5),
        ("high", HOSTED["quality"], "high"),
        ("1024x1024", HOSTED["size"], "1024x1024"),
        ("[1, 2]", {"type": "array"}, [1, 2]),
        ("anything", {}, "anything"),
    ],
)
def test_convert(text: str, schema: dict[str, Any], value: object) -> None:
    assert convert(text, schema) == value


def test_the_examples_that_come_with_the_project_are_right() -> None:
    folder = Path(__file__).parents[2] / "examples"
    for path in folder.glob("prompts.*"):
        rows = parse(path.read_bytes(), path.name, path.suffix, parameters_of)
        assert rows, path
    assert len(parse((folder / "prompts.csv").read_bytes(), "prompts.csv", ".csv", parameters_of)) >= 28


@pytest.mark.parametrize("kind", [".csv", ".jsonl", ".txt"])
def test_a_hundred_thousand_lines_are_read_quickly(kind: str) -> None:
    lines = {
        ".csv": "prompt,seed,guidance_scale\n" + "".join(f"a red circle {n},{n},3.5\n" for n in range(100_000)),
        ".jsonl": "".join(json.dumps({"prompt": f"a red circle {n}", "seed": n}) + "\n" for n in range(100_000)),
        ".txt": "".join(f"a red circle {n}\n" for n in range(100_000)),
    }[kind]
    began = time.perf_counter()
    rows = read(lines, kind)
    assert len(rows) == 100_000
    # about 0.7 s on one slow core; the limit only catches what grows faster than the file
    assert time.perf_counter() - began < 10
