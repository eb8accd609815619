"""image_uri reads files below the root, and nothing else."""

import pytest

from mim_ray.data.image_files import ImageFiles
from mim_ray.data.transforms import BadImage


@pytest.fixture
def files(tmp_path):
    root = tmp_path / "shop"
    (root / "pictures").mkdir(parents=True)
    (root / "pictures" / "a.jpg").write_bytes(b"a picture")
    (tmp_path / "secret.txt").write_bytes(b"secret")
    (root / "link.jpg").symlink_to(tmp_path / "secret.txt")
    return ImageFiles(str(root), 100)


def test_relative_names_absolute_paths_and_uris_below_the_root_are_read(files, tmp_path):
    for name in ("pictures/a.jpg", f"{tmp_path}/shop/pictures/a.jpg", f"file://{tmp_path}/shop/pictures/a.jpg"):
        assert files.read(None, name) == b"a picture"
    assert files.read(b"bytes", "pictures/missing.jpg") == b"bytes"  # bytes go before the name
    assert files.read(None, None) is None
    assert files.read(None, " ") is None


@pytest.mark.parametrize(
    "name",
    [
        "../secret.txt",
        "pictures/../../secret.txt",
        "/etc/passwd",
        "file:///etc/passwd",
        "http://169.254.169.254/latest/meta-data",
        "s3://other/a.jpg",
        "link.jpg",
    ],
)
def test_nothing_outside_the_root_is_read(files, name):
    with pytest.raises(BadImage, match="outside"):
        files.read(None, name)


def test_a_sibling_that_begins_like_the_root_is_outside(files, tmp_path):
    (tmp_path / "shopping").mkdir()
    (tmp_path / "shopping" / "b.jpg").write_bytes(b"b")
    with pytest.raises(BadImage, match="outside"):
        files.read(None, f"{tmp_path}/shopping/b.jpg")


def test_missing_and_too_large_files_are_bad_images_of_their_row_only(files, tmp_path):
    (tmp_path / "shop" / "large.jpg").write_bytes(b"x" * 101)
    found = files.read_all([None, None, None, b"own"], ["pictures/a.jpg", "none.jpg", "large.jpg", None])
    assert found[0] == b"a picture"
    assert found[3] == b"own"
    assert isinstance(found[1], BadImage)
    assert found[1].reason == "image_uri unreadable"
    assert isinstance(found[2], BadImage)
    assert found[2].reason == "image too large"
