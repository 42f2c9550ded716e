"""Items of every kind of source, and the errors of wrong ones."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from distill_media import CaptionsConfig, MediaItem, SourceConfig, read_items
from distill_protocols import DataError
from media_files import write_tar

SKIP = CaptionsConfig()


def items(captions: CaptionsConfig = SKIP, **source) -> dict[str, MediaItem]:
    return {item.id: item for item in read_items([SourceConfig(**source)], captions)}


def touch(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_a_folder_is_walked_in_one_order_whatever_its_names(tmp_path):
    names = ["b.mp4", "a clip.mp4", "Ä 🦊.png", "sub/line\nbreak.webm", "sub/B.MOV"]
    touch(tmp_path, *names, ".hidden.mp4", ".cache/c.mp4", "notes.pdf")
    found = items(CaptionsConfig(missing="empty"), folder=str(tmp_path))
    assert list(found) == sorted(names, key=str.encode)
    assert found["Ä 🦊.png"].place.is_picture
    assert not found["sub/B.MOV"].place.is_picture


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a red fox\n", ("a red fox",)),
        (b"\xef\xbb\xbfa red fox\r\n", ("a red fox",)),
        ("ein Füchslein 🦊".encode("utf-16"), ("ein Füchslein 🦊",)),
        (b"two\r\nlines\r\n", ("two lines",)),
    ],
    ids=["plain", "bom-crlf", "utf16", "lines"],
)
def test_captions_beside_clips(tmp_path, content, expected):
    touch(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_bytes(content)
    assert items(folder=str(tmp_path))["a.mp4"].captions == expected


def test_several_captions_and_a_prefix(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.mp4.txt").write_text("three")
    found = items(CaptionsConfig(prefix="sks, "), folder=str(tmp_path), caption_lines=True)
    assert found["a.mp4"].captions == ("sks, one", "sks, two")
    assert found["b.mp4"].captions == ("sks, three",)


def test_missing_captions(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "a.txt").write_text(" \n")
    assert "no caption" in items(folder=str(tmp_path))["a.mp4"].problem
    empty = items(CaptionsConfig(missing="empty", prefix="sks"), folder=str(tmp_path))["b.mp4"]
    assert (empty.captions, empty.problem) == (("sks",), None)
    with pytest.raises(DataError, match=r"2 of 2 clips have no caption: 'a.mp4', 'b.mp4'"):
        items(CaptionsConfig(missing="error"), folder=str(tmp_path))


def test_a_caption_that_is_no_text_is_the_clips_problem(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfa\x00\x01\x02")
    (tmp_path / "b.txt").write_text("b")
    found = items(folder=str(tmp_path))
    assert "no UTF-8 text" in found["a.mp4"].problem
    assert found["b.mp4"].problem is None


@pytest.mark.skipif(os.name != "posix", reason="names of bytes")
def test_a_name_that_is_no_text_can_be_shown(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.mp4")).write_bytes(b"x")
    [item] = items(CaptionsConfig(missing="empty"), folder=str(tmp_path)).values()
    assert item.id == "caf\\xe9.mp4"
    assert item.place.open().read() == b"x"


TABLE = [("a.mp4", 'say "hi", fox'), ("sub/b c.mp4", "line\nbreak 🦊")]


def write_csv(file: Path, columns: str, separator: str = ",") -> None:
    rows = [columns.replace(",", separator)]
    for name, caption in TABLE:
        quoted = caption.replace('"', '""')
        rows.append(f'{name}{separator}"{quoted}"')
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(rows).encode() + b"\r\n")


def write_parquet(file: Path) -> None:
    columns = {"file_name": [a for a, _ in TABLE], "text": [b for _, b in TABLE]}
    pyarrow.parquet.write_table(pyarrow.table(columns), file)


WRITERS = {
    "diffsynth.csv": lambda file: write_csv(file, "video,prompt"),
    "table.tsv": lambda file: write_csv(file, "path,caption", "\t"),
    "lines.jsonl": lambda file: file.write_text(
        "\ufeff" + "\r\n".join(json.dumps({"path": a, "caption": b}) for a, b in TABLE)
    ),
    "list.json": lambda file: file.write_text(
        json.dumps([{"media": a, "captions": [b]} for a, b in TABLE])
    ),
    "columns.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_tables(tmp_path, name):
    touch(tmp_path, "a.mp4", "sub/b c.mp4")
    WRITERS[name](tmp_path / name)
    found = items(table=str(tmp_path / name))
    assert {i: item.captions for i, item in found.items()} == {a: (b,) for a, b in TABLE}
    assert all(item.problem is None for item in found.values())
    assert found["sub/b c.mp4"].place.path == tmp_path / "sub/b c.mp4"


def test_named_columns_other_root_and_segments(tmp_path):
    touch(tmp_path, "clips/a.mp4")
    rows = ["file,long,short,start,end", "a.mp4,L,S,0.5,2", "./a.mp4,L2,,,", "a.mp4,x,y,3,1"]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    source = {"table": str(tmp_path / "t.csv"), "root": str(tmp_path / "clips"), "media": "file",
              "caption": ("short", "long")}  # fmt: skip
    found = items(**source)
    assert found["a.mp4"].captions == ("S", "L")
    assert found["a.mp4"].segment == (0.5, 2.0)
    assert found["./a.mp4"].captions == ("L2",)
    assert found["./a.mp4"].segment is None
    assert "the end after the start" in found["a.mp4@2"].problem


def test_a_table_opens_nothing_outside_its_folder(tmp_path):
    touch(tmp_path, "secret.mp4", "data/in.mp4")
    absolute = tmp_path / "secret.mp4"
    lines = ["video,prompt", "../secret.mp4,x", f"{absolute},x", "gone.mp4,x", ",x", "in.mp4,x"]
    (tmp_path / "data/t.csv").write_text("\n".join(lines))
    found = items(table=str(tmp_path / "data/t.csv"))
    assert "lies outside" in found["../secret.mp4"].problem
    assert found[str(absolute)].problem is None  # as its writer meant
    assert "there is no such file (row 3 of t.csv)" in found["gone.mp4"].problem
    assert "row 4 of t.csv has no text" in found["t.csv:4"].problem
    assert found["in.mp4"].problem is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "no column"),
        ("t.csv", b"video,prompt\n", "no row|no column"),
        ("t.csv", b"clip,words\na,b\n", "there is no column video or path"),
        ("t.csv", b'video,prompt\na.mp4,"never closed\nb.mp4,x\n', "unexpected end"),
        ("t.csv", b"video,video\na,b\n", "two columns of one name"),
        ("t.csv", b"\xff\xfa\x00", "no UTF-8 text"),
        ("t.jsonl", b"[1]\n", "line 1 is no object"),
        ("t.jsonl", b'{"path": 1\n', "line 1 is no JSON"),
        ("t.json", b"{}", "no list of objects"),
        ("t.parquet", b"PAR1", "no parquet file"),
        ("t.xlsx", b"PK", ".xlsx is no table that is read"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_tables_that_are_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        items(table=str(tmp_path / name))


def test_a_tar_is_read_by_keys_and_never_extracted(tmp_path):
    members = {
        "000/a.b.txt": b"not the caption of a.mp4",
        "000/a.mp4": b"AAAA",
        "000/a.txt": b"first\r\n",
        "000/a.json": b'{"caption": "of the json"}',
        "b.webm": b"BB",
        "b.json": b'{"prompt": "second", "fps": 24}',
        "../c.png": b"C",
        "../c.txt": b"third",
        "d.mp4": b"D",
        "d.json": b"{",
        "e.cls": b"7",
        "001/a.mp4": b"A",
        "001/a.txt": b"of another folder",
    }
    write_tar(tmp_path / "000.tar", members)
    found = items(tars=str(tmp_path))
    assert {name: item.captions for name, item in found.items()} == {
        "000/000/a.mp4": ("first",), "000/b.webm": ("second",), "000/../c.png": ("third",),
        "000/d.mp4": (), "000/001/a.mp4": ("of another folder",),
    }  # fmt: skip
    assert "d.json" in found["000/d.mp4"].problem
    with found["000/b.webm"].place.open() as file:
        assert file.read() == b"BB"
        file.seek(-1, os.SEEK_END)
        assert (file.tell(), file.read(5)) == (1, b"B")


@pytest.mark.parametrize("content", [b"\x1f\x8b\x08\x00" + bytes(600), b"no tar" * 200])
def test_tars_that_are_wrong(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(DataError, match="no whole tar without compression"):
        items(tars=str(tmp_path))


def test_prompts(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbfa fox\r\n\r\n a hare \r\n")
    found = items(prompts=str(tmp_path / "p.txt"))
    assert {name: item.captions for name, item in found.items()} == {
        "p.txt:1": ("a fox",), "p.txt:3": ("a hare",),
    }  # fmt: skip
    assert all(item.place is None for item in found.values())


def test_ids_are_unique_over_sources(tmp_path):
    touch(tmp_path, "one/a.mp4", "two/a.mp4")
    sources = [SourceConfig(folder=str(tmp_path / name)) for name in ("one", "two")]
    with pytest.raises(DataError, match="Give each source a name of its own"):
        read_items(sources, CaptionsConfig(missing="empty"))
    named = [SourceConfig(folder=str(tmp_path / n), name=n) for n in ("one", "two")]
    found = read_items(named, CaptionsConfig(missing="empty"))
    assert [item.id for item in found] == ["one/a.mp4", "two/a.mp4"]


def test_missing_sources_are_named(tmp_path):
    for kind in ("folder", "table", "tars", "prompts"):
        with pytest.raises(DataError, match="gone"):
            items(**{kind: str(tmp_path / "gone.csv")})
    with pytest.raises(DataError, match="holds no clip or picture"):
        items(folder=str(tmp_path))
    with pytest.raises(ValueError, match="folder and table"):
        SourceConfig(folder="a", table="b")
    with pytest.raises(ValueError, match="none of folder"):
        SourceConfig()
