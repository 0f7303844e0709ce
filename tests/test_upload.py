"Uploads: hostile and careless archives and tables; tables that leave for a spreadsheet."
import csv
from io import BytesIO, StringIO
import os
import stat
import struct
import zipfile

import numpy as np
import pandas as pd
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
import pytest

from clip_lab.data.export import csv_text, safe_cell
from clip_lab.data.upload import Limits, UploadError, read_folder, read_table, read_zip

GOOD = "file,gender\n" + "\n".join(f"{i}.png,{'woman' if i % 2 else 'man'}" for i in range(6))


def picture(i=0, size=(8, 6), kind="PNG"):
    Image.new("RGB", size, (40 * i % 256, 90, 200)).save(file := BytesIO(), kind)
    return file.getvalue()


def pack(path, entries, compress=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compress) as z:
        for name, data in entries: z.writestr(name, data)
    return path


@pytest.fixture
def zipped(tmp_path):
    "zipped(more, table) -> the path of an archive with six pictures and whatever else."
    def make(*more, table=GOOD, n=6, folder=""):
        return pack(tmp_path / "set.zip", [(f"{folder}{i}.png", picture(i)) for i in range(n)] + [(folder + "table.csv", table)] * (table is not None) + list(more))
    return make


def why(upload): return dict(zip(upload.report.file, upload.report.what))


# ---- hostile archives

@pytest.mark.parametrize("name", ["../a.png", "a/../../b.png", "/etc/passwd", "\\\\server\\a.png", "C:/a.png", "c:\\a.png", "a\\..\\..\\b.png", "..", "x/.."])
def test_names_that_lead_out_are_refused_before_anything_is_read(zipped, name, monkeypatch):
    path = zipped((name, picture()))
    monkeypatch.setattr(zipfile.ZipFile, "open", lambda *a, **k: pytest.fail("something was read"))
    with pytest.raises(UploadError, match="leads out of the archive. Nothing was read"): read_zip(path)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_links_and_devices_are_refused(zipped, kind):
    info = zipfile.ZipInfo("link.png")
    info.external_attr = (kind | 0o777) << 16
    with pytest.raises(UploadError, match="'link.png' is a link or a device"): read_zip(zipped((info, "/etc/passwd")))


def test_sizes_that_are_declared(zipped):
    with pytest.raises(UploadError, match="'bomb.png' would grow to .* times its size"): read_zip(zipped(("bomb.png", bytes(3_000_000))))
    with pytest.raises(UploadError, match="'big.png' unpacks to 2 MB; the limit is 1 MB"): read_zip(zipped(("big.png", os.urandom(2_000_000))), limits=Limits(file_bytes=1_000_000))
    with pytest.raises(UploadError, match="set.zip unpacks to 2 MB; the limit is 1 MB"): read_zip(zipped(*[(f"{i}x.png", os.urandom(500_000)) for i in range(4)]), limits=Limits(total_bytes=1_000_000))
    with pytest.raises(UploadError, match="7 entries; the limit is 6"): read_zip(zipped(), limits=Limits(entries=6))
    with pytest.raises(UploadError, match="set.zip has 0 MB; the limit is 0 MB"): read_zip(zipped(), limits=Limits(archive_bytes=10))


def test_an_archive_that_lies_about_sizes(zipped):
    "The directory says ten bytes; the entry unpacks to five million."
    path = zipped(("lie.png", bytes(5_000_000)))
    data = bytearray(path.read_bytes())
    size = struct.pack("<I", 5_000_000)
    for at in [i for i in range(len(data) - 4) if data[i:i + 4] == size]: data[at:at + 4] = struct.pack("<I", 10)
    path.write_bytes(data)
    lied = GOOD + "\nlie.png,man"
    with pytest.raises(UploadError, match="'lie.png' (cannot be unpacked|is not as large)"): read_zip(path, lied.encode())


def test_encrypted_damaged_and_foreign_files(zipped, tmp_path):
    path = zipped()
    data = bytearray(path.read_bytes())
    for start in (b"PK\x03\x04", b"PK\x01\x02"):      # the flag of both headers
        at = data.find(start)
        data[at + (6 if start == b"PK\x03\x04" else 8)] |= 1
    path.write_bytes(data)
    with pytest.raises(UploadError, match="is encrypted. Nothing was read"): read_zip(path)
    path = zipped()
    data = bytearray(path.read_bytes())
    data[30 + len("0.png") + 20] ^= 255                # inside the first entry, behind its header and name
    path.write_bytes(data)
    with pytest.raises(UploadError, match="cannot be unpacked .*Pack it again"): read_zip(path)
    with pytest.raises(UploadError, match="packed in an unusual way"): read_zip(pack(tmp_path / "lzma.zip", [("a.png", picture())], zipfile.ZIP_LZMA))
    for name in ("\0", ".", "./.", ".\\", " "):
        with pytest.raises(UploadError, match="entry without a name"): read_zip(zipped((zipfile.ZipInfo(name), picture())))
    for junk in (b"", b"PK\x05\x06", b"Rar!\x1a\x07", os.urandom(500), path.read_bytes()[:300]):
        (tmp_path / "junk.zip").write_bytes(junk)
        with pytest.raises(UploadError, match="junk.zip is not a zip|has no pictures"): read_zip(tmp_path / "junk.zip")
    with pytest.raises(UploadError, match="gone.zip is not there"): read_zip(tmp_path / "gone.zip")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(0, 255)), min_size=1, max_size=6))
def test_no_damage_gives_anything_but_a_sentence(zipped, flips):
    path = zipped()
    data = bytearray(path.read_bytes())
    for at, value in flips: data[at % len(data)] = value
    path.write_bytes(data)
    try: upload = read_zip(path)
    except UploadError as error: assert str(error).endswith(".") or "'" in str(error)
    else: assert len(upload.data) >= 2


# ---- what is counted

def test_what_is_left_out_is_named(zipped):
    table = GOOD + "\n7.png,man\n6.png,woman\n0.png,woman\n,man"
    upload = read_zip(zipped(("notes.txt", "x"), ("more.tar.gz", "x"), ("6.png", b"no picture"), ("__MACOSX/._0.png", "x"), (".DS_Store", "x"), ("8.png", picture()), ("9.png", b""), table=table))
    assert len(upload.data) == 6 and upload.attributes == ["gender"]
    assert why(upload) == {"notes.txt": "files that are no pictures", "more.tar.gz": "archives inside the archive", "7.png": "rows without a picture", "6.png": "not readable as pictures",
                           "0.png": "rows repeat a picture", "row 10": "rows without a picture", "8.png": "pictures without a row", "9.png": "pictures without a row"}
    told = " ".join(upload.told())
    assert told.startswith("6 pictures were read; they can be grouped by gender.") and "7.png, row 10" in told and "__MACOSX" not in told
    assert [upload.data.pictures[i].size for i in range(6)] == [(8, 6)] * 6


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_twice_is_used_once(zipped):
    upload = read_zip(zipped(("0.png", picture(5)), ("SUB/0.PNG", picture())))
    assert len(upload.data) == 6 and why(upload)["0.png"] == "names were there twice"
    assert upload.data.pictures.encoded(0) == picture(0)


@pytest.mark.parametrize("data", [picture(0, (300, 200)), picture(0, (300, 200), "GIF"), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", picture()[:45]], ids=["large", "large gif", "postscript", "cut"])
def test_pictures_that_cannot_be_used(zipped, data):
    upload = read_zip(zipped(("6.png", data), table=GOOD + "\n6.png,man"), limits=Limits(pixels=10_000))
    assert len(upload.data) == 6 and why(upload)["6.png"] in ("too large (300 x 200 pixels)", "not readable as pictures")


@pytest.mark.parametrize("write", [lambda i: f"{i}.png", lambda i: f"set/{i}.png", lambda i: f".\\set\\{i}.PNG", lambda i: f"./{i}.Png"])
def test_rows_find_their_pictures_however_they_are_written(zipped, write):
    table = "gender,Picture\n" + "\n".join(f"{'woman' if i % 2 else 'man'},{write(i)}" for i in range(6))
    upload = read_zip(zipped(table=table, folder="set/"))
    assert upload.data.pictures.names == [f"set/{i}.png" for i in range(6)] and not len(upload.report)


def test_a_name_that_two_pictures_have_is_not_guessed(zipped):
    upload = read_zip(zipped(("a/x.png", picture()), ("b/x.png", picture()), table=GOOD + "\nx.png,man"))
    assert why(upload)["x.png"] == "rows without a picture"


# ---- tables

@pytest.mark.parametrize("text", [GOOD, GOOD.replace(",", ";"), GOOD.replace(",", "\t"), "\ufeff" + GOOD, GOOD.replace("\n", "\r\n") + "\r\n\r\n", GOOD.replace("file", '"file"')], ids=["comma", "semicolon", "tab", "bom", "crlf", "quotes"])
def test_tables_as_spreadsheets_save_them(zipped, text):
    upload = read_zip(zipped(table=None), text.encode())
    assert len(upload.data) == 6 and upload.data.table.gender.tolist() == ["man", "woman"] * 3
    assert read_table(text.encode("utf-16"))[0].equals(read_table(text.encode())[0])


@pytest.mark.parametrize("table, message", [
    (b"", "has no lines"), (b"file,gender\n", "a header and no rows"), (b"\n\n ,\n , ", "has no name|no rows"), (b"file,gender\n1.png,woman,x", "line 2: 3 cells, but there are 2 columns"),
    (b"file,,x\n1.png,a,b", "column 2 has no name"), (b"file,x,x\n1.png,a,b", "two columns named 'x'"), (b"PK\x03\x04\0\0xlsx", "its own format. Save it as CSV"),
    ("file,who\n1.png," .encode() + b"x" * 400, "line 2: a cell has 400 characters"), (b"file,who\n" + b"1.png,a\n" * 10_001, "more than 10,000 rows"),
    (",".join(map(str, range(61))).encode() + b"\n1", "61 columns; the limit is 60"), (b'file,who\n1.png,"' + b"x" * 200_000, "(cell has|field larger)"), (b"\xff\xfea", "not a text"),
], ids=range(12))
def test_tables_that_cannot_be_read(table, message):
    with pytest.raises(UploadError, match=message): read_table(table)


def test_columns_that_are_not_there_or_make_no_groups(zipped):
    with pytest.raises(UploadError, match="no column 'age'. It has file, gender"): read_zip(zipped(), attributes=["age"])
    with pytest.raises(UploadError, match="no column 'who'. It has file, gender"): read_zip(zipped(), column="who")
    with pytest.raises(UploadError, match="no column names a picture"): read_zip(zipped(table="who,what\na,b\nc,d"))
    with pytest.raises(UploadError, match="0 of 2 rows have a readable picture"): read_zip(zipped(table="file,what\na.png,b\nc.png,d"))
    with pytest.raises(UploadError, match="set.zip has 2 tables: table.csv, b.csv"): read_zip(zipped(("b.csv", GOOD)))
    with pytest.raises(UploadError, match="set.zip has no tables"): read_zip(zipped(table=None))
    with pytest.raises(UploadError, match="set.zip has no pictures"): read_zip(zipped(n=0))
    upload = read_zip(zipped(table="file,gender,id,age\n" + "\n".join(f"{i}.png,{'ab'[i % 2]},{i},{'old' if i else ''}" for i in range(6))))
    assert upload.attributes == ["gender", "age"] and why(upload) == {"id": "columns that make no groups"}
    assert upload.data.table.age[0] is None or pd.isna(upload.data.table.age[0])


def test_windows_encoding_is_guessed_and_said(zipped):
    upload = read_zip(zipped(table=None), GOOD.replace("woman", "Fräulein").encode("cp1252"))
    assert set(upload.data.table.gender) == {"man", "Fräulein"} and why(upload) == {"the table": "table was not in UTF-8"}


# ---- folders

def test_a_folder_is_read_in_place_and_links_out_of_it_are_not_followed(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "secret.png").write_bytes(picture())
    for i in range(6): (tmp_path / "set" / f"{i}.png").write_bytes(picture(i))
    (tmp_path / "set" / "link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "t.csv").write_text(GOOD + "\nlink.png,man")
    upload = read_folder(tmp_path / "set", tmp_path / "t.csv")
    assert len(upload.data) == 6 and why(upload) == {"link.png": "rows without a picture"} and str(upload.data.pictures.sources[0]) == str((tmp_path / "set" / "0.png").resolve())
    with pytest.raises(UploadError, match="is not a folder"): read_folder(tmp_path / "gone")
    with pytest.raises(UploadError, match="t2.csv is not there"): read_folder(tmp_path / "set", tmp_path / "t2.csv")
    with pytest.raises(UploadError, match="6 files; the limit is 3"): read_folder(tmp_path / "set", tmp_path / "t.csv", limits=Limits(entries=3))


# ---- tables that leave

@given(st.text(max_size=30))
def test_no_cell_is_a_formula(text):
    safe = safe_cell(text)
    assert safe in (text, "'" + text) and not safe.lstrip(" \u00a0\u3000").startswith(tuple("=+-@\t\r\n＝＋－＠"))


@settings(deadline=None)
@given(st.lists(st.tuples(st.text(st.characters(blacklist_characters="\0\r", blacklist_categories=("Cs",)), max_size=12), st.floats(allow_nan=False, allow_infinity=False, width=32)), min_size=1, max_size=6))
def test_numbers_stay_numbers_and_text_comes_back(rows):
    table = pd.DataFrame(rows, columns=["=name", "difference"])
    back = list(csv.reader(StringIO(csv_text(table))))
    assert back[0] == ["'=name", "difference"]
    for (name, number), (got, value) in zip(rows, back[1:], strict=True): assert got == safe_cell(name) and np.float32(value) == np.float32(number)
