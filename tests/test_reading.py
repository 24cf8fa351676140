"""The reading blocks of data.py, the same in all projects: a server of faults, broken pictures."""

import ast
import hashlib
import http.server
import io
import os
import struct
import tarfile
import threading
import time
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from projects import ROOT, load_project

WHOLE = bytes(range(256)) * 64
SUM = f"sha256:{hashlib.sha256(WHOLE).hexdigest()}"


def module_with(name: str) -> ModuleType:
    """data.py of a project that has the function; test_house.py holds that all have the same."""
    for path in sorted(ROOT.glob("*/data.py")):
        if name in {getattr(node, "name", "") for node in ast.parse(path.read_text()).body}:
            return load_project(path.parent.name).data
    raise AssertionError(f"no project reads with {name}")


# --- downloads --------------------------------------------------------------------------------


class Faults(http.server.BaseHTTPRequestHandler):
    """What is asked for names the fault."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.asked.append(self.path)
        fault = self.path.rsplit("/", 1)[-1]
        if fault in ("", "forbidden"):
            self.send_error(403)
            return
        if fault == "mute":
            time.sleep(3)
            return
        body = b"<html>log in</html>" if fault == "html" else WHOLE
        self.send_response(200)
        if fault != "no-length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault in ("broken", "stalled"):
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            time.sleep(3 if fault == "stalled" else 0)
            return
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faults)
    listener.daemon_threads = True
    threading.Thread(target=listener.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listener.server_port}"
    listener.shutdown()


@pytest.fixture
def reader(monkeypatch) -> ModuleType:
    module = module_with("download")
    monkeypatch.setattr(module, "TIMEOUT", 0.5)
    return module


@pytest.mark.parametrize("name", ["whole", "no-length"])
def test_a_file_is_fetched_once_although_the_hosts_root_is_forbidden(
    reader, server, tmp_path, capsys, name
):
    path = tmp_path / "deep" / "file"
    for _ in range(2):
        assert reader.download(f"{server}/{name}", path, "the file", SUM) == path
    assert path.read_bytes() == WHOLE
    assert Faults.asked.count(f"/{name}") == 1
    said = capsys.readouterr().err
    size = " (0.0 MB)" if name == "whole" else ""
    assert f"downloading the file{size} from {server}/{name} to {path}" in said
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("broken", "broke off at 8192 of 16384 bytes"),
        ("stalled", "timed out"),
        ("mute", "timed out"),
        ("html", "damaged, or another file: its sha256 is not"),
        ("forbidden", "HTTP Error 403"),
    ],
)
def test_a_fault_is_one_line_and_leaves_nothing(reader, server, tmp_path, fault, reason):
    path = tmp_path / "set" / "file"
    began = time.monotonic()
    with pytest.raises(reader.DataError, match=reason) as error:
        reader.download(f"{server}/{fault}", path, "the file", SUM)
    assert time.monotonic() - began < 2.5
    said = str(error.value)
    assert said.startswith(f"the file is not in {path.parent} and could not be downloaded from")
    assert said.endswith(f"by hand: {path}") and len(said.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_no_host_and_no_sense_are_one_line(reader, tmp_path):
    for url in ("http://127.0.0.1:9/file", "nonsense://x", "no address"):
        with pytest.raises(reader.DataError, match="could not be downloaded from"):
            reader.download(url, tmp_path / "file", "the file")
    assert tmp_path.is_dir()  # it was there before


def test_a_transfer_that_trickles_is_given_up(reader, tmp_path, monkeypatch):
    class Trickle:
        def read1(self, _: int) -> bytes:
            return b"x"

    clock = iter(range(0, 10**6, 20))
    monkeypatch.setattr(reader.time, "monotonic", lambda: next(clock))
    with pytest.raises(OSError, match="stalled at"):
        reader.copy_stream(Trickle(), tmp_path / "file", 10**6)


def test_the_usual_proxy_variables_count(reader, server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it reads them once per process
    reader.download("http://nowhere.invalid/whole", tmp_path / "file", "the file", SUM)
    assert "http://nowhere.invalid/whole" in Faults.asked


def test_a_damaged_file_that_lies_there_is_named_and_not_replaced(reader, server, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"half")
    with pytest.raises(reader.DataError, match="file: damaged, or another file: its sha256"):
        reader.download(f"{server}/whole", path, "the file", SUM)
    assert path.read_bytes() == b"half"


def test_a_checksum_may_be_a_beginning(reader, tmp_path):
    (tmp_path / "file").write_bytes(WHOLE)
    reader.check_sum(tmp_path / "file", SUM[:15])
    reader.check_sum(tmp_path / "file", "")
    reader.check_sum(tmp_path / "file", f"md5:{hashlib.md5(WHOLE).hexdigest()}")
    with pytest.raises(reader.DataError):
        reader.check_sum(tmp_path / "file", "sha256:00000000")


def write_archive(path: Path) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name in ("set/one", "set/two"):
            info = tarfile.TarInfo(name)
            info.size = len(WHOLE)
            tar.addfile(info, io.BytesIO(WHOLE))


def test_an_archive_is_unpacked_whole_or_not_at_all(tmp_path, monkeypatch):
    reader = module_with("unpack")
    archive = tmp_path / "set.tar.gz"
    write_archive(archive)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "one").write_bytes(b"half")  # of a start that was killed

    class Killed(BaseException):
        pass

    def killed(tar: tarfile.TarFile, path: str, **_: object) -> None:
        Path(path, "set").mkdir()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extractall", killed)
        with pytest.raises(Killed):
            reader.unpack(archive, tmp_path)
    assert (tmp_path / "set" / "one").read_bytes() == b"half"
    reader.unpack(archive, tmp_path)
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == {
        "one": WHOLE,
        "two": WHOLE,
    }
    archive.write_bytes(archive.read_bytes()[:200])
    with pytest.raises(reader.DataError, match=r"set.tar.gz: damaged"):
        reader.unpack(archive, tmp_path)


def test_a_text_that_is_not_utf8_is_named(tmp_path):
    reader = module_with("read_text")
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n")
    assert reader.read_text(tmp_path / "a.txt") == "one\n"
    (tmp_path / "a.txt").write_bytes(b"f\xfcr\n")
    for name, reason in (("a.txt", "expected a text in UTF-8"), ("b.txt", "no such file")):
        with pytest.raises(reader.DataError, match=f"{name}: .*{reason}"):
            reader.read_text(tmp_path / name)


# --- pictures ---------------------------------------------------------------------------------


def ramp() -> np.ndarray:
    return np.arange(256, dtype=np.uint8).reshape(16, 16)


def opened(path: Path) -> np.ndarray:
    return np.asarray(module_with("open_picture").open_picture(path))


def test_16_bit_greys_look_as_in_8_bits(tmp_path):
    grey, path = ramp(), tmp_path / "a.png"
    expected = np.repeat(grey[:, :, None], 3, 2)
    for deep in ((grey.astype("uint16") + 1) * 200, grey.astype("uint16") * 257):
        Image.fromarray(deep).save(path)
        assert np.array_equal(opened(path), expected)
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "a.tiff")
    assert np.array_equal(opened(tmp_path / "a.tiff"), expected)
    Image.fromarray(np.full((4, 4), 77, np.uint16)).save(path)
    assert opened(path).shape == (4, 4, 3)
    Image.fromarray(np.array([[0.0, np.nan]], np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(module_with("open_picture").DataError, match="not finite"):
        opened(tmp_path / "a.tiff")


def test_a_picture_is_turned_as_its_exif_data_say(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    colours = np.zeros((4, 8, 3), np.uint8)
    colours[:, :4] = 255
    Image.fromarray(colours).save(tmp_path / "a.png", exif=exif)
    turned = opened(tmp_path / "a.png")
    assert turned.shape == (8, 4, 3)
    assert turned[:4].min() == 255 and turned[4:].max() == 0


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    suffix = "tiff" if mode in ("CMYK", "YCbCr", "HSV") else "png"
    picture = Image.fromarray(ramp()).convert("RGB")
    if mode == "HSV":
        mode = "RGB"
    grey = Image.fromarray(ramp().astype(np.uint16))
    (grey if mode == "I;16" else picture.convert(mode)).save(tmp_path / f"a.{suffix}")
    assert opened(tmp_path / f"a.{suffix}").shape == (16, 16, 3)


def png_chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def write_broken(folder: Path) -> list[Path]:
    """Files that Pillow answers in as many ways."""
    Image.fromarray(ramp()).save(folder / "whole.png")
    whole = (folder / "whole.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("a text")
    Image.new("1", (20000, 10000)).save(folder / "bomb.png")
    comment = PngImagePlugin.PngInfo()
    comment.add_text("comment", "x" * 2_000_000, zip=True)
    Image.new("L", (4, 4)).save(folder / "comment.png", pnginfo=comment)
    header = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")
    (folder / "nothing.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    (folder / "tiff.tif").write_bytes(b"II*\x00\x08\x00\x00\x00\xff\xff")
    (folder / "whole.png").unlink()
    return sorted(folder.iterdir())


def test_whatever_pillow_raises_names_the_file(tmp_path):
    reader = module_with("open_picture")
    for path in write_broken(tmp_path):
        with pytest.raises(reader.DataError) as error:
            reader.open_picture(path)
        assert str(error.value).startswith(f"{path} (")
        assert len(str(error.value).splitlines()) == 1


def test_a_tag_of_the_wrong_type_is_no_traceback(tmp_path):
    """Orientation 6 and an XResolution that is a text, on which Pillow raises TypeError."""
    tags = struct.pack("<HHHII", 2, 0x0112, 3, 1, 6) + struct.pack("<HHII", 0x011A, 2, 5, 38)
    exif = b"Exif\x00\x00II*\x00" + struct.pack("<I", 8) + tags + bytes(4) + b"text\x00"
    Image.new("RGB", (4, 8)).save(tmp_path / "a.jpg", exif=exif)
    reader = module_with("open_picture")
    with pytest.raises(reader.DataError, match=r"a.jpg \(TypeError"):
        reader.open_picture(tmp_path / "a.jpg")


def test_shrink_keeps_the_whole_picture():
    reader = module_with("shrink")
    wide = np.zeros((4, 16, 3), np.uint8)
    wide[:, 8:] = 255
    small = reader.shrink(Image.fromarray(wide), (4, 4))
    assert small.shape == (3, 4, 4) and small.dtype == torch.uint8
    assert small[:, :, 0].max() == 0 and small[:, :, 3].min() == 255


def test_folders_are_classes_but_for_hidden_ones_and_links_are_followed(tmp_path):
    reader = module_with("class_folders")
    for name in ("b", "a", ".ipynb_checkpoints", "__MACOSX", "c/deep"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(tmp_path / "set" / name / "1.png")
    (tmp_path / "set" / "a" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    Image.new("L", (4, 4)).save(tmp_path / "elsewhere" / "2.png")
    (tmp_path / "set" / "d").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "a" / "round").symlink_to(tmp_path / "set" / "a")
    (tmp_path / "set" / "Cafe\u0301").mkdir()  # as macOS spells it
    Image.new("L", (4, 4)).save(tmp_path / "set" / "Cafe\u0301" / "1.png")
    found = reader.class_folders(tmp_path / "set")
    assert list(found) == ["Caf\u00e9", "a", "b", "c", "d"]
    assert {name: len(paths) for name, paths in found.items()} == dict.fromkeys(found, 1)


def test_links_to_nothing_and_to_a_folder_above_and_pipes_are_no_pictures(tmp_path):
    """A class's link to `..` holds the other classes' pictures."""
    reader = module_with("decode")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name / "1.png")
    (tmp_path / "a" / "round").symlink_to("..")
    (tmp_path / "a" / "lost.png").symlink_to("nothing.png")
    os.mkfifo(tmp_path / "a" / "pipe.png")  # reading it would never end
    files = reader.class_folders(tmp_path)["a"]
    assert [path.name for path in files] == ["1.png", "lost.png", "pipe.png"]
    x, places, bad = reader.decode(files, (4, 4), tmp_path)
    assert len(x) == 1 and places.tolist() == [0] and len(bad) == 2
    assert all("there is no such file" in line for line in bad)


def test_class_folders_that_are_none_are_named(tmp_path):
    reader = module_with("class_folders")
    for path, reason in ((tmp_path / "no", "no such folder"), (tmp_path, "at least 2 classes")):
        with pytest.raises(reader.DataError, match=f"{path}: .*{reason}"):
            reader.class_folders(path)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "1").write_bytes(b"x")
    with pytest.raises(reader.DataError, match="b: there is no picture"):
        reader.class_folders(tmp_path)


def test_decoded_pictures_are_kept_by_all_that_decides_them(tmp_path, monkeypatch):
    reader = module_with("decode")
    for number in range(3):
        Image.new("L", (8, 4), 100 * number).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"x")
    files = sorted(tmp_path.glob("*.png"))
    x, places, bad = reader.decode(files, (4, 4), tmp_path)
    assert x[:, 0, 0, 0].tolist() == [0, 100, 200] and places.tolist() == [0, 1, 2]
    assert len(bad) == 1 and "broken.png" in bad[0]
    assert "unreadable files left out: 1" in reader.left_out(bad) and not reader.left_out([])

    with monkeypatch.context() as patch:
        patch.setattr(reader, "open_picture", None)
        again = reader.decode(files, (4, 4), tmp_path)
    assert torch.equal(again[0], x) and again[2] == bad
    assert reader.decode(files, (2, 2), tmp_path)[0].shape == (3, 3, 2, 2)

    old = files[0].stat()
    Image.new("RGB", (8, 4), (255, 1, 1)).save(files[0])
    os.utime(files[0], ns=(old.st_atime_ns, old.st_mtime_ns))  # the same time stamp
    assert reader.decode(files, (4, 4), tmp_path)[0][0, 0, 0, 0] == 255
    assert len(reader.visible_files(tmp_path)) == 4, "the cache is none of the pictures"
    for cache in tmp_path.glob(".decoded-*.pt"):
        cache.write_bytes(cache.read_bytes()[:100])
    assert torch.equal(reader.decode(files, (4, 4), tmp_path)[0][1:], x[1:])
    assert not list(tmp_path.glob("*.part"))


def test_a_full_or_closed_folder_costs_only_the_cache(tmp_path, monkeypatch):
    reader = module_with("cached")

    def full(*_: object) -> None:
        raise RuntimeError("no space left")

    monkeypatch.setattr(torch, "save", full)
    assert reader.cached(tmp_path, "x", 1, lambda: 5) == 5
    assert reader.cached(tmp_path / "nowhere", "x", 1, lambda: 5) == 5
    assert not list(tmp_path.iterdir())


def test_sizes_that_differ_are_refused_without_a_size(tmp_path):
    reader = module_with("decode")
    Image.new("L", (4, 4)).save(tmp_path / "1.png")
    Image.new("L", (4, 5)).save(tmp_path / "2.png")
    with pytest.raises(reader.DataError, match=r"2.png: its size differs .* image_size"):
        reader.decode(sorted(tmp_path.glob("*.png")), None, tmp_path)


def test_inputs_have_different_names_whatever_they_are(tmp_path):
    reader = module_with("find_pictures")
    for name in ("a/x", "b/x", "b/c/y"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "1.png").write_bytes(b"x")
    both = reader.find_pictures([str(tmp_path / "a" / "x"), str(tmp_path / "b" / "x")])
    assert list(both) == ["a/x/1.png", "b/x/1.png"]
    assert list(reader.find_pictures([str(tmp_path / "b")])) == ["c/y/1.png", "x/1.png"]
    assert list(reader.find_pictures([str(tmp_path / "a/x/1.png")])) == ["1.png"]
    for wrong in ([str(tmp_path / "none")], []):
        with pytest.raises(reader.DataError):
            reader.find_pictures(wrong)


def test_pictures_come_a_batch_at_a_time(tmp_path):
    reader = module_with("picture_batches")
    for number in range(5):
        Image.new("L", (8, 4), 10 * number).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_bytes(b"x")
    bad: list[str] = []
    parts = list(reader.picture_batches([str(tmp_path)], (4, 4), 3, bad))
    assert [names for names, _ in parts] == [["0.png", "1.png", "3.png"], ["4.png"]]
    assert [x[:, 0, 0, 0].tolist() for _, x in parts] == [[0, 10, 30], [40]]
    assert len(bad) == 1 and "2.png" in bad[0]


# --- MNIST's files and weights ----------------------------------------------------------------


def write_idx(folder: Path, images: int, labels: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("train", "t10k"):
        head = struct.pack(">IIII", 2051, images, 28, 28)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(head + bytes(images * 784))
        head = struct.pack(">II", 2049, labels)
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(head + bytes(labels))


def test_damaged_files_of_mnist_are_named(tmp_path, monkeypatch):
    reader = module_with("read_idx")
    raw = tmp_path / "MNIST" / "raw"
    write_idx(raw, 4, 4)
    (x, y), _ = reader.read_idx("MNIST", tmp_path)
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((4, 1, 28, 28), torch.uint8, (4,), torch.long)
    write_idx(raw, 4, 3)
    with pytest.raises(reader.DataError, match="not as many images as classes"):
        reader.read_idx("MNIST", tmp_path)
    write_idx(raw, 4, 4)
    path = raw / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(reader.DataError, match="t10k-images-idx3-ubyte: damaged"):
        reader.read_idx("MNIST", tmp_path)
    path.unlink()
    path.with_name(path.name + ".gz").write_bytes(b"no gzip")
    with pytest.raises(reader.DataError, match=r"ubyte.gz: damaged"):
        reader.read_idx("MNIST", tmp_path)
    path.with_name(path.name + ".gz").unlink()
    monkeypatch.setattr(reader, "urlopen", lambda *_, **__: (_ for _ in ()).throw(OSError("off")))
    with pytest.raises(reader.DataError, match=r"could not be downloaded .*off; by hand"):
        reader.read_idx("MNIST", tmp_path)


def test_weights_are_checked_by_the_hash_in_their_name_and_run_no_code(tmp_path, monkeypatch):
    reader = module_with("pretrained_weights")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save({"w": torch.ones(2)}, folder / "x.pth")
    digest = hashlib.sha256((folder / "x.pth").read_bytes()).hexdigest()[:8]
    (folder / "x.pth").rename(folder / f"net-{digest}.pth")
    url = f"https://example.org/net-{digest}.pth"
    assert reader.pretrained_weights(url, tmp_path)["w"].tolist() == [1, 1]

    class Code:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Code(), folder / f"net-{digest}.pth")
    with pytest.raises(reader.DataError, match="damaged, or another file"):
        reader.pretrained_weights(url, tmp_path)
    for content in (b"", b"<html>"):
        (tmp_path / "own.pth").write_bytes(content)
        with pytest.raises(reader.DataError, match=r"own.pth: not a file of weights"):
            reader.read_weights(tmp_path / "own.pth")
    torch.save(Code(), tmp_path / "own.pth")
    with pytest.raises(reader.DataError, match=r"own.pth: not a file of weights"):
        reader.read_weights(tmp_path / "own.pth")
    assert not (tmp_path / "ran").exists()
