"""Fetching and unpacking archives: whole or not at all, and never outside their folder."""

import http.client
import lzma
import os
import shutil
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

from torchvision.datasets.utils import check_integrity, download_url

from common.errors import UserError, is_disk_error
from common.files import replacing

REFUSED = getattr(tarfile, "FilterError", ())  # of Python 3.11.4 and newer
# what reading a damaged archive raises; RuntimeError: an encrypted one, or an unknown method
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError)
DAMAGED += (RuntimeError, ValueError, KeyError, struct.error)
ARCHIVE_ENDINGS = (".tar", ".tar.gz", ".tgz", ".zip")


def fetch(url: str, folder: Path, md5: str | None) -> Path:
    """Returns the file of `url` in `folder`, downloaded unless it is there whole; UserError
    otherwise.

    A download gets its name only when it has ended and its checksum is right. So a file of that
    name with another checksum was cut short (or is a web page), and is downloaded again.
    """
    path = folder / Path(urlparse(url).path).name
    if path.exists() and check_integrity(path, md5):
        return path
    if path.exists():
        print(f"{path} is not whole ({path.stat().st_size} bytes): downloading it again")
    try:
        with replacing(path) as beside:
            download_url(url, str(folder), beside.name, md5)
    except (OSError, RuntimeError, RecursionError, http.client.HTTPException) as error:
        if is_disk_error(error):
            raise
        text = "what came is not the archive" if "corrupted" in str(error) else str(error)
        raise UserError(f"{url} cannot be downloaded ({text})") from None
    return path


def unpack(path: Path, folder: Path) -> None:
    """Unpacks a tar or zip archive into `folder`, whole or not at all: it unpacks next to the
    folder, and moves all of it there at the end. Raises UserError for one that is damaged,
    encrypted, or that holds a path leaving the folder.
    """
    beside = folder / f"{path.name}.{os.getpid()}.partial"
    try:
        beside.mkdir(parents=True)
        (unpack_zip if path.name.endswith(".zip") else unpack_tar)(path, beside)
        move_into(beside, folder)
    except REFUSED as error:
        raise UserError(f"{path} is refused: {error}") from None
    except DAMAGED as error:
        if is_disk_error(error):
            raise
        raise UserError(
            f"{path} cannot be unpacked ({error or type(error).__name__}), and nothing of it was: "
            "cut short, damaged or not an archive; remove it and start again"
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def unpack_zip(path: Path, folder: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            check_inside(member.filename, path)
        archive.extractall(folder)  # checks each file's CRC


class Member(tarfile.TarInfo):
    """A header of a tar file. tarfile takes anything that is no header for the archive's end; here
    only the block of zeros that ends every tar file is one, if nothing comes behind it
    (`unpack_tar`).
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "Member":
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            text = f"{error} at byte {archive.offset}: neither a file nor the end"
            raise tarfile.ReadError(text) from None


def unpack_tar(path: Path, folder: Path) -> None:
    with tarfile.open(path, tarinfo=Member) as archive:
        # Python 3.11.4 and newer bring this check themselves, with links, modes and devices
        archive.extraction_filter = getattr(tarfile, "data_filter", only_plain)
        for member in archive:
            check_inside(member.name, path)
            archive.extract(member, folder)
        end, behind = archive.offset, 0
        while rest := archive.fileobj.read(1 << 20):  # a compressed file's checksum is at its end
            behind += len(rest.strip(b"\0"))
        if behind > tarfile.RECORDSIZE:  # old programs fill the last record with anything
            raise tarfile.ReadError(f"zeros at byte {end}, but it goes on: not its end")


def move_into(source: Path, folder: Path) -> None:
    """Moves what a folder holds into another, over what is there; folders of both become one."""
    for entry in sorted(source.iterdir()):
        target = folder / entry.name
        if entry.is_dir() and not entry.is_symlink() and target.is_dir():
            move_into(entry, target)
        else:
            os.replace(entry, target)


def only_plain(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """Lets only files and folders pass, in place of the standard library's filter."""
    if not (member.isfile() or member.isdir()):
        raise tarfile.TarError(f"{member.name} is neither a file nor a folder")
    return member


def check_inside(name: str, archive: Path) -> None:
    """Raises UserError for a member whose path leaves the folder that it is unpacked in."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{archive} is refused: its member {name!r} leaves the folder")


def is_archive(path: Path) -> bool:
    return path.name.endswith(ARCHIVE_ENDINGS)
