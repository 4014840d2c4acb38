"""Labelled data sets as people send them, whole and damaged, each with what the reader makes of it.

A new kind of data set is a line of one of the makers below; the tests and whoever reads the list find it there.
"""

import bz2
import gzip
import io
import lzma
import tarfile
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

Contents = dict[str, bytes]
Read = Mapping[str, Mapping[str, int]]
"""How many pictures of each class each part has."""

SIDE: Final = 32


def drawn(seed: int, kind: str = "PNG", mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


PNG, JPEG = drawn(0), drawn(1, "JPEG")
TWO: Final[Contents] = {"cat/1.png": PNG, "dog/1.png": drawn(2)}
BOTH: Final = {"cat": 1, "dog": 1}


@dataclass(frozen=True)
class WildSet:
    """One data set.

    Attributes:
      name: unique.
      write: puts it into an empty folder and says where it is.
      read: what is read of it; None where it is refused.
      message: a regular expression: of the refusal, or of one of the lines that tell what was passed over.
    """

    name: str
    write: Callable[[Path], Path]
    read: Read | None
    message: str = ""


def wild_sets() -> list[WildSet]:
    """All of them, by distinct names."""
    makers = (layouts, others_files, numbers, spellings, links, containers, damaged, arrays, cifars)
    return [example for maker in makers for example in maker()]


# Writers


def folder(contents: Contents, name: str = "set") -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        for file, data in contents.items():
            path = root / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return root / name

    return write


def file_of(data: bytes, name: str) -> Callable[[Path], Path]:
    def write(root: Path) -> Path:
        (root / name).write_bytes(data)
        return root / name

    return write


def zipped(contents: Contents, method: int = zipfile.ZIP_STORED, *also: tuple[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name twice
        for name, data in (*contents.items(), *also):
            archive.writestr(name, data)
    return stream.getvalue()


def tarred(contents: Contents, *others: tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for other in others:
            archive.addfile(other)
    return stream.getvalue()


def saved(**named: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **named)
    return stream.getvalue()


def changed(data: bytes, place: int) -> bytes:
    """With one byte flipped."""
    return data[:place] + bytes((data[place] ^ 255,)) + data[place + 1 :]


def under(prefix: str, contents: Contents) -> Contents:
    return {prefix + name: data for name, data in contents.items()}


# What makes a part, and what a class


def layouts() -> Iterator[WildSet]:
    def parts(*names: str) -> Contents:
        return {f"{part}/{name}": data for part in names for name, data in TWO.items()}

    yield WildSet("classes alone", folder(TWO), {"all": BOTH})
    yield WildSet("train and val", folder(parts("train", "val")), {"train": BOTH, "val": BOTH})
    yield WildSet("parts in capitals", folder(parts("Train", "VALID")), {"train": BOTH, "val": BOTH})
    yield WildSet("dev and eval", folder(parts("train", "dev", "eval")), {"train": BOTH, "val": BOTH, "test": BOTH})
    nested = under("seg_train/", parts("seg_train")) | under("seg_test/", parts("seg_test"))
    yield WildSet("parts with a word before them", folder(nested), {"train": BOTH, "test": BOTH})
    nested = under("training_set/", parts("training_set")) | under("test_set/", parts("test_set"))
    yield WildSet("parts with a word behind them", folder(nested), {"train": BOTH, "test": BOTH})
    tubes = {"test_tube/a/1.png": PNG, "express_train/a/1.png": PNG, "cup/a/1.png": PNG}
    one_of_each = {"cup": 1, "express_train": 1, "test_tube": 1}
    yield WildSet("classes with a part's word in them", folder(tubes), {"all": one_of_each})
    trains = {"train/1.png": PNG, "plane/1.png": PNG}
    yield WildSet("a class called train", folder(trains), {"all": {"plane": 1, "train": 1}})
    flat = {f"train/{kind}.{number}.jpg": JPEG for kind in ("cat", "dog") for number in range(3)}
    yield WildSet("classes in the files' names", folder(flat), None, r"6 pictures in no class's folder, such as train/")
    both = {f"images/{part}/{number}.jpg": JPEG for part in ("train", "val") for number in range(2)}
    yield WildSet("parts without classes", folder(both), None, r"4 pictures in no class's folder")
    table = {"train/1.png": PNG, "trainLabels.csv": b"id,label\n1,cat\n"}
    yield WildSet("a table of labels", folder(table), None, r"a table trainLabels.csv; tables are not read: move each")
    unlabelled = parts("train") | {"test/1.png": PNG}
    yield WildSet("a test part without labels", folder(unlabelled), {"train": BOTH}, r"1 files .* in no class's folder")


def others_files() -> Iterator[WildSet]:
    system = {
        "__MACOSX/cat/._1.png": b"x",
        "cat/._1.png": b"x",
        "cat/.ipynb_checkpoints/1-checkpoint.png": PNG,
        "cat/@eaDir/1.png/SYNOPHOTO_THUMB.jpg": JPEG,
        "dog/Thumbs.db": b"x",
        ".DS_Store": b"x",
    }
    message = r"6 files passed over: files of an operating system or a notebook"
    yield WildSet("files of operating systems", file_of(zipped(TWO | system), "set.zip"), {"all": BOTH}, message)
    kinds = {f"cat/1.{suffix}": b"x" for suffix in ("heic", "svg", "ppm", "jp2", "jxl", "txt")}
    yield WildSet("files of other kinds", folder(TWO | kinds), {"all": BOTH}, r"6 files passed over: .* kind not read")
    several = {f"cat/{kind}.{kind}": drawn(3, kind) for kind in ("gif", "bmp", "tiff", "avif", "webp")}
    several["cat/a.jfif"] = JPEG
    message = r"converted to RGB: 1 of mode P"
    yield WildSet("every kind that is read", folder(TWO | several), {"all": {"cat": 7, "dog": 1}}, message)
    wrong = {"cat/1.png": JPEG, "dog/1.jpg": drawn(3, "WEBP")}
    yield WildSet("suffixes of other formats", folder(wrong), {"all": BOTH})
    yield WildSet("hidden folders", folder(TWO | {".git/objects/1.png": PNG}), {"all": BOTH}, r"1 files .* hidden")
    yield WildSet("an archive in a folder", folder({"set.zip": zipped(TWO)}), None, r"an archive set\.zip; give that")


def numbers() -> Iterator[WildSet]:
    def classes(*names: str) -> Callable[[Path], Path]:
        return folder({f"{name}/1.png": PNG for name in names})

    def once(*names: str) -> Read:
        return {"all": dict.fromkeys(names, 1)}

    yield WildSet("numbers", classes(*map(str, range(12))), once(*map(str, range(12))))
    yield WildSet("numbers with zeros before", classes("10", "02", "1"), once("1", "02", "10"))
    yield WildSet("numbers below zero", classes("-2", "-10", "1"), once("-10", "-2", "1"))
    yield WildSet("fractions", classes("10.0", "2.0", "0.5"), once("0.5", "2.0", "10.0"))
    yield WildSet("a number twice", classes("01", "1"), None, r"class '01' is there in two spellings")
    yield WildSet("a fraction twice", classes("1", "1.0", "2"), None, r"class '1' is there in two spellings")


def spellings() -> Iterator[WildSet]:
    apart, together = (unicodedata.normalize(form, "Café") for form in ("NFD", "NFC"))
    names = {f"train/{apart}/1.png": PNG, "train/dog/1.png": PNG, f"val/{together}/1.png": PNG}
    read = {"train": {together: 1, "dog": 1}, "val": {together: 1}}
    yield WildSet("accents apart and together", file_of(zipped(names), "set.zip"), read)


def links() -> Iterator[WildSet]:
    def linked(target: str, link: str) -> Callable[[Path], Path]:
        def write(root: Path) -> Path:
            path = folder(TWO)(root)
            folder({"1.png": PNG}, "elsewhere")(root)
            (path / link).symlink_to(target)
            return path

        return write

    circle = r"1 files passed over: links to a folder above"
    yield WildSet("a linked class", linked("../elsewhere", "ship"), {"all": BOTH | {"ship": 1}})
    yield WildSet("a linked picture", linked("../../elsewhere/1.png", "dog/2.png"), {"all": {"cat": 1, "dog": 2}})
    yield WildSet("a link to the folder above", linked("..", "cat/again"), {"all": BOTH}, circle)
    yield WildSet("a link to itself", linked("itself", "itself"), {"all": BOTH}, r"1 files .* broken links")
    yield WildSet("a link to nothing", linked("nothing", "cat/2.png"), {"all": BOTH}, r"1 files .* broken links")


# Containers


def containers() -> Iterator[WildSet]:
    read = {"all": BOTH}
    for name, method in (("bzip2", zipfile.ZIP_BZIP2), ("lzma", zipfile.ZIP_LZMA), ("deflate", zipfile.ZIP_DEFLATED)):
        yield WildSet(f"zip of {name}", file_of(zipped(TWO, method), "set.zip"), read)
    for suffix, pack in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
        yield WildSet(f"tar.{suffix}", file_of(pack(tarred(TWO)), f"set.tar.{suffix}"), read)
    members = gzip.compress(tarred(TWO)[:700]) + gzip.compress(tarred(TWO)[700:])
    yield WildSet("tar.gz of several members", file_of(members, "set.tar.gz"), read)
    yield WildSet("a zip's suffix in capitals", file_of(zipped(TWO), "SET.ZIP"), read)
    yield WildSet("a tar's suffix in capitals", file_of(gzip.compress(tarred(TWO)), "SET.TAR.GZ"), read)
    yield WildSet("a tar called zip", file_of(gzip.compress(tarred(TWO)), "set.zip"), read)
    yield WildSet("a zip without a suffix", file_of(zipped(TWO), "download"), read)
    yield WildSet("names from the root", file_of(zipped(under("/", TWO)), "set.zip"), read)
    yield WildSet("names of Windows", file_of(zipped({"set\\cat\\1.png": PNG, "set\\dog\\1.png": PNG}), "a.zip"), read)
    yield WildSet("names with a dot", file_of(tarred(under("./", TWO)), "set.tar"), read)
    outwards = r"1 files passed over: names that lead out of their folder"
    for name, archive in (("zip", zipped), ("tar", tarred)):
        names = TWO | {"../../ship/1.png": PNG}
        yield WildSet(f"{name} that leads out of its folder", file_of(archive(names), f"set.{name}"), read, outwards)
        names = under("../", TWO)
        message = r"2 names that lead out of their folder"
        yield WildSet(f"{name} of nothing else", file_of(archive(names), f"set.{name}"), None, message)
    again = zipped(TWO, zipfile.ZIP_STORED, ("cat/1.png", JPEG))
    yield WildSet("a zip with a name twice", file_of(again, "set.zip"), read)
    others = []
    for name, kind in (("cat/2.png", tarfile.SYMTYPE), ("cat/3.png", tarfile.LNKTYPE), ("cat/4.png", tarfile.FIFOTYPE)):
        other = tarfile.TarInfo(name)
        other.type, other.linkname = kind, "/etc/passwd"
        others.append(other)
    yield WildSet("a tar of links", file_of(tarred(TWO, *others), "set.tar"), read, r"3 files passed over: links")


def damaged() -> Iterator[WildSet]:
    for name, method in (("bzip2", zipfile.ZIP_BZIP2), ("lzma", zipfile.ZIP_LZMA), ("deflate", zipfile.ZIP_DEFLATED)):
        data = zipped(TWO, method)
        message = r"cat/1\.png: cannot be unpacked \("
        yield WildSet(f"damaged zip of {name}", file_of(changed(data, 64), "set.zip"), None, message)
    yield WildSet("a zip cut short", file_of(zipped(TWO)[:-30], "set.zip"), None, r"not a readable zip")
    encrypted = bytearray(zipped(TWO))
    for mark, flags in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        encrypted[encrypted.index(mark) + flags] |= 1
    yield WildSet("an encrypted zip", file_of(bytes(encrypted), "set.zip"), None, r"cat/1\.png: encrypted")
    tar = tarred(TWO)
    for suffix, pack in (("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)):
        data = pack(tar)
        for name, wrong in (("cut", data[: len(data) // 2]), ("changed", changed(data, len(data) // 2))):
            yield WildSet(f"tar.{suffix} {name}", file_of(wrong, f"set.tar.{suffix}"), None, r"not a readable tar")
    second = tar.index(b"dog/1.png")
    yield WildSet("a tar with a damaged header", file_of(changed(tar, second), "set.tar"), None, r"no header at byte")
    yield WildSet("a tar cut in a header", file_of(tar[: second + 100], "set.tar"), None, r"no header at byte")
    yield WildSet("a tar cut between files", file_of(tar[:second], "set.tar"), None, r"nothing at byte")
    yield WildSet("a tar cut in a file", file_of(tar[: second + 700], "set.tar"), None, r"not a readable tar")
    yield WildSet("an empty file", file_of(b"", "set.zip"), None, r"not a readable zip \(it is empty\)")
    yield WildSet("a picture", file_of(PNG, "1.png"), None, r"a file of a kind that is not read")
    yield WildSet(
        "an archive of another kind", file_of(b"(\xb5/\xfd\0\0", "set.tar.zst"), None, r"kind that is not read"
    )
    pictures = {
        "a PNG with a wrong length": PNG[:33] + (1 << 30).to_bytes(4, "big") + PNG[37:],
        "a PNG cut short": PNG[:-20],
        "a JPEG cut short": JPEG[: len(JPEG) // 2],
        "a GIF cut short": drawn(4, "GIF")[:200],
        "a TIFF cut short": drawn(4, "TIFF")[:300],
        "a BMP cut short": drawn(4, "BMP")[:300],
        "a WebP cut short": drawn(4, "WEBP")[:100],
        "an AVIF cut short": drawn(4, "AVIF")[:300],
        "a HEIC called JPEG": b"\0\0\0\x18ftypheic" + bytes(50),
        "no bytes": b"",
    }
    for name, data in pictures.items():
        message = r"dog/2\.jpg: not a readable image"
        yield WildSet(name, file_of(zipped(TWO | {"dog/2.jpg": data}), "set.zip"), None, message)


# Arrays and CIFAR


def arrays() -> Iterator[WildSet]:
    pixels = np.random.default_rng(5).integers(0, 256, (3, SIDE, SIDE, 3), np.uint8)
    labels, each = np.arange(3), {"0": 1, "1": 1, "2": 1}

    def npz(name: str, read: Read | None, message: str = "", **named: Any) -> WildSet:
        return WildSet(f"npz, {name}", file_of(saved(**named), "set.npz"), read, message)

    yield npz("images and labels", {"all": each}, images=pixels, labels=labels)
    yield npz("X and y", {"all": each}, X=pixels, y=labels)
    yield npz("X_train", {"train": each, "test": each}, X_train=pixels, y_train=labels, X_test=pixels, y_test=labels)
    read: Read = {"train": each, "val": each, "test": each}
    named = {
        f"{part}_{kind}": array for part in read for kind, array in (("images", pixels), ("labels", labels[:, None]))
    }
    yield npz("as MedMNIST", read, "", **named)
    yield npz("channels first", {"all": each}, images=pixels.transpose(0, 3, 1, 2), labels=labels)
    yield npz("grey", {"all": each}, images=pixels[..., 0], labels=labels)
    yield npz("labels of floats", {"all": each}, images=pixels, labels=labels.astype(np.float64))
    yield npz("yes and no", {"all": {"0": 2, "1": 1}}, images=pixels, labels=labels == 1)
    yield npz("other byte order", {"all": each}, images=pixels, labels=labels.astype(">i8"))
    yield npz("Fortran's order", {"all": each}, images=np.asfortranarray(pixels), labels=labels)
    message = r"1 files passed over: arrays of other names, such as ids"
    yield npz("an array more", {"all": each}, message, images=pixels, labels=labels, ids=labels)
    small = pixels[:, :28, :28, :1]
    message = r"images are uint8 \[3, 28, 28, 1\]; expected .* search and audit at 28x28"
    yield npz("28x28x1", None, message, images=small, labels=labels)
    yield npz("fractions", None, r"labels of float64 with fractions", images=pixels, labels=np.array([0.5, 1, 2]))
    yield npz("no number", None, r"with fractions", images=pixels, labels=np.array([np.nan, 1, 2]))
    yield npz("labels below zero", None, r"labels from -1 to 2", images=pixels, labels=np.array([-1, 1, 2]))
    large = np.array([1 << 63, 1, 2], np.uint64)
    yield npz("labels without end", None, r"labels from 1 to 9223372036854775808", images=pixels, labels=large)
    yield npz("a column for each class", None, r"labels are of shape \[3, 3\]", images=pixels, labels=np.eye(3))
    yield npz("labels of words", None, r"labels of <U3", images=pixels, labels=np.array(["cat", "dog", "cat"]))
    yield npz("labels of objects", None, r"labels of object", images=pixels, labels=np.array(["cat", 1, 2], object))
    yield npz("floats from 0 to 1", None, r"images of float32", images=pixels.astype(np.float32) / 255, labels=labels)
    yield npz("16 bits", None, r"images are uint16", images=pixels.astype(np.uint16), labels=labels)
    alpha = np.zeros((3, SIDE, SIDE, 4), np.uint8)
    yield npz("four channels", None, r"images are uint8 \[3, 32, 32, 4\]", images=alpha, labels=labels)
    yield npz("labels alone", None, r"no array 'images' beside 'labels'", labels=labels)
    yield npz("no names", None, r"no array 'images' or 'labels' but arr_0, arr_1", arr_0=pixels, arr_1=labels)
    yield npz("as many labels and more", None, r"3 images, 4 labels", images=pixels, labels=np.arange(4))
    whole = saved(images=pixels, labels=labels)
    yield WildSet("npz called zip", file_of(whole, "set.zip"), {"all": each})
    yield WildSet("npz cut short", file_of(whole[: len(whole) // 2], "set.npz"), None, r"not a readable npz")


def cifars() -> Iterator[WildSet]:
    """Not the published files, which are 170 MB: others are refused, wherever they lie and whatever they are called."""
    ten, hundred = {"data_batch_1": b"x", "batches.meta": b"x"}, {"train": b"x", "test": b"x", "meta": b"x"}
    for name, contents in (("cifar-10-batches-py", ten), ("cifar-100-python", hundred)):
        message = r"a file of CIFAR100? is missing, or its MD5 is not that of the published one"
        inside = under(f"{name}/", contents)
        yield WildSet(f"{name} itself", folder(contents, name), None, message)
        yield WildSet(f"{name} in a folder", folder(inside), None, message)
        yield WildSet(f"{name} renamed", folder(contents, "mine"), None, message)
        yield WildSet(f"{name} in a tar", file_of(gzip.compress(tarred(inside)), f"{name}.tar.gz"), None, message)
        yield WildSet(f"{name} in a zip", file_of(zipped(inside), f"{name}.zip"), None, message)
    binary = gzip.compress(tarred({"cifar-10-batches-bin/data_batch_1.bin": b"x"}))
    yield WildSet("CIFAR's binary version", file_of(binary, "cifar-10-binary.tar.gz"), None, r"binary version")
