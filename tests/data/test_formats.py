"""JSON and tables in any layout have the values that the standard library reads, wherever the stream is cut."""

from __future__ import annotations

import csv
import io
import json

from hypothesis import given
from hypothesis import strategies as st

from mot_jax.data.formats import ReadReport, json_values, table_documents

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


class Trickle(io.BytesIO):
    """A stream that returns a few bytes at a time."""

    def __init__(self, content: bytes, size: int):
        super().__init__(content)
        self._size = size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self._size)


@given(st.lists(JSON, max_size=6), st.sampled_from([None, 0, 2]), st.booleans(), st.integers(1, 9))
def test_json_in_any_layout(values: list, indent: int | None, ascii_only: bool, size: int) -> None:
    texts = [json.dumps(value, indent=indent, ensure_ascii=ascii_only) for value in values]
    array = json.dumps(values, indent=indent, ensure_ascii=ascii_only)
    scalars = [text for text, value in zip(texts, values, strict=True) if not isinstance(value, list)]
    for content, expected in (
        (array, values),
        ("\n".join(scalars), [value for value in values if not isinstance(value, list)]),
        (f"\n{array}\n{array}", values * 2),
    ):
        report = ReadReport()
        read = list(json_values(Trickle(content.encode(errors="surrogatepass"), size), report))
        assert [value for _, value in read] == expected and [number for number, _ in read] == list(range(len(read)))
        assert not report.skipped


@given(st.lists(st.dictionaries(st.just("text"), st.text(), min_size=1), min_size=1), st.integers(1, 60))
def test_a_json_array_is_read_up_to_any_cut(records: list[dict[str, str]], cut: int) -> None:
    content = json.dumps(records).encode()[:-cut]
    report = ReadReport()
    read = [value for _, value in json_values(io.BytesIO(content), report)]
    assert read == records[: len(read)]
    assert report.skipped["damaged_files"] == bool(content)


FIELDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))


@given(st.lists(st.tuples(FIELDS, FIELDS), min_size=1), st.sampled_from(",;\t|"), st.sampled_from(["\n", "\r\n"]))
def test_tables_as_the_csv_library_writes_them(rows: list[tuple[str, str]], delimiter: str, end: str) -> None:
    output = io.StringIO(newline="")
    writer = csv.writer(output, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([("label", "text"), *rows])
    report = ReadReport()
    documents = list(table_documents(io.BytesIO(output.getvalue().encode()), "text", report))
    assert documents == [(i, text) for i, (_, text) in enumerate(rows)]
    assert not report.skipped


@given(st.lists(st.text('a"', max_size=4), min_size=1))
def test_tables_with_tabs_whose_quotes_are_text(texts: list[str]) -> None:
    content = "id\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(texts))
    report = ReadReport()
    documents = list(table_documents(io.BytesIO(content.encode()), "text", report, "\t,;|"))
    letters = [(i, text.replace('"', "")) for i, text in documents]
    assert letters == [(i, text.replace('"', "")) for i, text in enumerate(texts)]
    assert not report.skipped
