"""Reads prompts from arguments, files and standard input: text, CSV and JSON lines, with errors that name the line."""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from shared.errors import FarmError

#: JSON schema of each parameter of a model, by name; None asks for the model of rows that name none
ParametersOf = Callable[[str | None], Mapping[str, Mapping[str, Any]]]

#: what people call a parameter, and its name
ALIASES = {"steps": "num_inference_steps", "guidance": "guidance_scale", "class": "class_index"}

#: what stands in `PromptRow.where` of a prompt from the command line, before its number
ARGUMENT = "argument"

#: endings of files in which people keep data, though not as prompts
_NO_PROMPT_FILES = {".json", ".yaml", ".yml", ".xls", ".xlsx", ".ods", ".parquet", ".md", ".docx", ".pdf"}

_DELIMITERS = (",", ";", "\t", "|")
_YES, _NO = {"true", "yes", "1"}, {"false", "no", "0"}
_MAX_FAULTS = 10


class PromptError(FarmError):
    """A prompt file is not right."""

    code = "prompts"


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt, its own parameters, the model it asks for, and where it stands."""

    where: str
    prompt: str
    model: str | None
    parameters: Mapping[str, Any]


def read_arguments(
    arguments: Sequence[str], stdin: Callable[[], bytes], parameters_of: ParametersOf
) -> list[PromptRow]:
    """The prompts that the arguments of `submit` mean: texts, files by their ending, `-` for standard input.

    Raises `PromptError`.
    """
    rows: list[PromptRow] = []
    for number, argument in enumerate(arguments, 1):
        path = Path(argument)
        if argument == "-":
            rows += parse(stdin(), "standard input", "", parameters_of)
        elif path.suffix.lower() in _PARSERS:
            rows += parse(_read(path), path.name, path.suffix.lower(), parameters_of)
        elif _is_meant_as_file(argument):
            kind = "is a folder" if path.is_dir() else "this kind of file is not known"
            raise PromptError(f"{argument}: {kind}; use {', '.join(_PARSERS)}, or - for standard input")
        else:
            rows.append(PromptRow(f"{ARGUMENT} {number}", argument, None, {}))
    return rows


def _is_meant_as_file(argument: str) -> bool:
    """Whether an argument that is no file of prompts is hardly a prompt either."""
    if len(argument) > 1024 or "\x00" in argument:
        return False
    path = Path(argument)
    return (
        path.is_dir()
        or (path.suffix != "" and path.is_file())
        or (path.suffix.lower() in _NO_PROMPT_FILES and not any(map(str.isspace, argument)))
    )


def parse(data: bytes, name: str, kind: str, parameters_of: ParametersOf) -> list[PromptRow]:
    """The prompts in `data`. `kind` is a file's ending; empty: JSON lines where the first line is one, else text."""
    text = _decode(data, name)
    if not kind:
        kind = ".jsonl" if _looks_like_json(text) else ".txt"
    rows = list(_PARSERS[kind](text, name, parameters_of))
    if not rows:
        raise PromptError(f"{name}: holds no prompts")
    return rows


def convert(text: str, schema: Mapping[str, Any], decimal_comma: bool = False) -> Any:
    """A text as the value that a parameter's schema asks for. Raises `ValueError` with the reason."""
    kinds = _kinds(schema)
    if "string" in kinds or not kinds:
        return text
    if "boolean" in kinds:
        if text.lower() in _YES | _NO:
            return text.lower() in _YES
        raise ValueError(f"{text!r} is neither true nor false")
    number = text.replace(",", ".") if decimal_comma else text
    if "integer" in kinds or "number" in kinds:
        try:
            return int(number)
        except ValueError:
            if "number" not in kinds:
                raise ValueError(f"{text!r} is not a whole number") from None
        try:
            value = float(number)
        except ValueError:
            raise ValueError(f"{text!r} is not a number") from None
        if not math.isfinite(value):
            raise ValueError(f"{text!r} is not a number")
        return value
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{text!r} is not JSON") from None


def parameter_name(text: str, known: Mapping[str, Any]) -> str:
    """The parameter that a heading or option means. Raises `ValueError` with the nearest names."""
    name = text.strip().lower().replace(" ", "_").replace("-", "_")
    if name in known:
        return name
    if ALIASES.get(name) in known:
        return ALIASES[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    raise ValueError(f"{text!r} is not a parameter of this model; {hint}")


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    found = {schema["type"]} if isinstance(schema.get("type"), str) else set()
    for branch in schema.get("anyOf", ()):
        found |= _kinds(branch)
    if "enum" in schema or "const" in schema:
        found.add("string")
    return found - {"null"}


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise PromptError(f"{path}: no such file") from None
    except OSError as error:
        raise PromptError(f"{path}: cannot be read: {error.strerror}") from None


def _decode(data: bytes, name: str) -> str:
    # UTF-16 is what spreadsheets call "Unicode text"
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    if encoding != "utf-16" and b"\x00" in data:
        raise PromptError(f"{name}: is not a text file")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PromptError(f"{name} line {line}: is not UTF-8 text; save the file as UTF-8") from None


def _looks_like_json(text: str) -> bool:
    first = text.lstrip().split("\n", 1)[0].strip()
    if first[:1] not in {"{", '"'}:
        return False
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return False
    return True


def _text_rows(text: str, name: str, parameters_of: ParametersOf) -> Iterator[PromptRow]:
    # not splitlines(): a prompt may hold one of the rarer line separators
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            yield PromptRow(f"{name} line {number}", prompt, None, {})


class _Faults(list[str]):
    """Collects what is wrong, so that a long file is mended in one go."""

    def note(self, text: str) -> None:
        self.append(text)
        if len(self) >= _MAX_FAULTS:
            self.report()

    def report(self) -> None:
        if self:
            raise PromptError("\n".join(self))


def _json_rows(text: str, name: str, parameters_of: ParametersOf) -> Iterator[PromptRow]:
    faults = _Faults()
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            item = json.loads(line, parse_constant=_no_number, parse_float=_finite)
        except RecursionError:
            faults.note(f"{where}: is nested too deeply")
            continue
        except ValueError as error:
            reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            faults.note(f"{where}: is not JSON: {reason}")
            continue
        if isinstance(item, str):
            item = {"prompt": item}
        if not isinstance(item, dict):
            faults.note(f"{where}: must be a text or an object with a prompt")
            continue
        prompt, model = item.pop("prompt", ""), item.pop("model", None)
        if not isinstance(prompt, str) or not (model is None or isinstance(model, str)):
            faults.note(f"{where}: prompt and model must be texts")
            continue
        yield PromptRow(where, prompt, model, item)
    faults.report()


def _no_number(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large")
    return value


def _csv_rows(text: str, name: str, parameters_of: ParametersOf) -> Iterator[PromptRow]:
    delimiter = _delimiter(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    faults = _Faults()
    header: list[str] | None = None
    header_where = ""
    converters: dict[str | None, _Columns] = {}
    line = 1
    try:
        for cells in reader:
            where, line = f"{name} line {line}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header, header_where = _header(cells, where), where
                continue
            if any(cell.strip() for cell in cells[len(header) :]):
                hint = f"quote cells that hold {delimiter!r}"
                faults.note(f"{where}: has {len(cells)} cells, the header {len(header)}; {hint}")
                continue
            row = dict(zip(header, cells, strict=False))
            model = row.pop("model", "").strip() or None
            prompt = row.pop("prompt", "").strip()
            if model not in converters:
                converters[model] = _Columns(row, header, header_where, parameters_of(model), delimiter)
            parameters = converters[model].values(row, where, faults)
            yield PromptRow(where, prompt, model, parameters)
    except csv.Error as error:
        hint = "; is a quotation mark never closed?" if "end of data" in str(error) or "limit" in str(error) else ""
        raise PromptError(f"{name} line {line}: {error}{hint}") from None
    faults.report()


def _delimiter(text: str) -> str:
    """The separator under which the first line has a column `prompt`, else the one that splits it most."""
    first = next((line for line in text.split("\n") if line.strip()), "")

    def fitness(delimiter: str) -> tuple[bool, int]:
        cells = [cell.strip().strip('"').lower() for cell in first.split(delimiter)]
        return "prompt" in cells, len(cells)

    return max(_DELIMITERS, key=fitness)


def _header(cells: list[str], where: str) -> list[str]:
    names = [cell.strip() for cell in cells]
    while names and not names[-1]:  # spreadsheets like to add empty columns
        names.pop()
    names = [name.lower() if name.lower() in {"prompt", "model"} else name for name in names]
    if "" in names:
        raise PromptError(f"{where}: column {names.index('') + 1} has no heading")
    for name in names:
        if names.count(name) > 1:
            raise PromptError(f"{where}: the column {name!r} is there twice")
    return names


class _Columns:
    """The parameter columns of a CSV file, for the rows of one model."""

    def __init__(
        self,
        columns: Iterable[str],
        header: Sequence[str],
        where: str,
        known: Mapping[str, Mapping[str, Any]],
        delimiter: str,
    ) -> None:
        # where ';' separates, ',' is the decimal sign of the country's spreadsheet
        self._decimal_comma = delimiter == ";"
        self._schemas: dict[str, tuple[str, Mapping[str, Any]]] = {}
        self._unknown: dict[str, str] = {}
        for column in columns:
            try:
                parameter = parameter_name(column, known)
                self._schemas[column] = (parameter, known[parameter])
            except ValueError as error:
                if "prompt" not in header:
                    raise PromptError(f"{where}: there is no column 'prompt', only {', '.join(header)}") from None
                self._unknown[column] = str(error)

    def values(self, row: Mapping[str, str], where: str, faults: _Faults) -> dict[str, Any]:
        """The row's parameters; an empty cell leaves the default."""
        found = {}
        for column, cell in row.items():
            text = cell.strip()
            if not text:
                continue
            if column in self._unknown:
                faults.note(f"{where}: column {self._unknown[column]}")
                continue
            parameter, schema = self._schemas[column]
            try:
                found[parameter] = convert(text, schema, self._decimal_comma)
            except ValueError as error:
                faults.note(f"{where}, column {column}: {error}")
        return found


_PARSERS: dict[str, Callable[[str, str, ParametersOf], Iterator[PromptRow]]] = {
    ".txt": _text_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
}
