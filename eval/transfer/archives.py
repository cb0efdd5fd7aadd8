"""Fetching and unpacking archives: whole or not at all, and never outside their folder."""

import http.client
import tarfile
import zipfile
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

from torchvision.datasets.utils import check_integrity, download_url

from common.errors import UserError, is_disk_error
from common.files import replacing

REFUSED = getattr(tarfile, "FilterError", ())  # of Python 3.11.4 and newer
ARCHIVE_ENDINGS = (".tar", ".tar.gz", ".tgz", ".zip")


def fetch(url: str, folder: Path, md5: str | None) -> Path:
    """The file of `url` in `folder`, downloaded unless it is there whole; UserError otherwise.

    A download gets its name only when it has ended and its checksum is right: a file of that name
    with another checksum was cut short (or is a web page) and is downloaded again.
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
    """Unpacks a tar or zip archive into `folder`; UserError for one that is damaged or that holds
    a path leaving the folder (nothing of that path is written).
    """
    try:
        if path.name.endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    check_inside(name, path)
                archive.extractall(folder)
            return
        with tarfile.open(path) as archive:
            # Python 3.11.4 and newer bring this check themselves, with links, modes and devices
            archive.extraction_filter = getattr(tarfile, "data_filter", only_plain)
            for member in archive:
                check_inside(member.name, path)
                archive.extract(member, folder)
    except REFUSED as error:
        raise UserError(f"{path} is refused: {error}") from None
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
        if is_disk_error(error):
            raise
        raise UserError(
            f"{path} cannot be unpacked ({error}): cut short, or not an archive; remove it and "
            "start again"
        ) from None


def only_plain(member: tarfile.TarInfo, folder: str) -> tarfile.TarInfo:
    """Stands in for the standard library's filter: files and folders only."""
    if not (member.isfile() or member.isdir()):
        raise tarfile.TarError(f"{member.name} is neither a file nor a folder")
    return member


def check_inside(name: str, archive: Path) -> None:
    """UserError for a member whose path leaves the folder that it is unpacked in."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise UserError(f"{archive} is refused: its member {name!r} leaves the folder")


def is_archive(path: Path) -> bool:
    return path.name.endswith(ARCHIVE_ENDINGS)
