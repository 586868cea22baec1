"""Folders and zips of images in a bucket. The prepared copy is on the local disk."""

import base64
import io
import json
import zipfile

import pytest
from buckets import bucket as bucket
from test_image_folder import encoded, noise, open_folder

IN_A_BUCKET = """
import sys
from ddgan_jax.config.settings import DataConfig
from ddgan_jax.data import sources
from ddgan_jax.errors import UserError
try:
    seen = sources.inspect(DataConfig("image_folder", path=sys.argv[1], dir=sys.argv[2]))
    print(seen.num_examples, *seen.shape, seen.labelled)
    data = sources.open_data(DataConfig("image_folder", path=sys.argv[1], dir=sys.argv[2], max_bad_share=0.5))
    print(*data.images.shape, int(data.images[...].astype(int).sum()), *data.classes)
except UserError as error:
    print("error:", error)
"""


def fill(bucket, **files):
    """Writes `files`, {name: content}, into a bucket."""
    script = (
        "import sys, json, base64\nfrom ddgan_jax.storage import paths\nfor name, content in json.loads(sys.argv[2])"
    )
    script += ".items(): paths.write(sys.argv[1] + '/' + name, base64.b64decode(content))"
    content = json.dumps({name: base64.b64encode(content).decode() for name, content in files.items()})
    bucket.python(script, bucket.url, content)


def test_a_folder_and_a_zip_in_a_bucket(bucket, tmp_path):
    """The images equal those of a local folder, and a change of a file results in a new copy."""
    pngs = {f"{'ant' if i < 3 else 'cat'}/{i}.png": encoded(noise(20, 17, i), "PNG") for i in range(6)}
    extra = {"ant/.hidden.png": b"x", "notes.txt": b"x", "cat/text.png": b"no image", "cat/empty.png": b""}
    fill(bucket, **{f"photos/{name}": content for name, content in (pngs | extra).items()})
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, content in pngs.items():
            file.writestr(name, content)
    fill(bucket, **{"photos.zip": archive.getvalue()})
    for name, content in pngs.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    images = open_folder(tmp_path / "in", tmp_path / "local")[0]
    expected = ["6 16 16 3 True", f"6 16 16 3 {int(images.astype(int).sum())} ant cat"]
    for name, skipped in (("photos", True), ("photos/", True), ("photos.zip", False)):
        lines = bucket.python(IN_A_BUCKET, f"{bucket.url}/{name}", tmp_path / "cache").splitlines()
        assert [line for line in lines if not line.startswith(("preparing", "2 of 8"))] == expected, lines
        assert any("2 of 8 files in gs://" in line for line in lines) == skipped
        assert any(line.startswith("preparing") for line in lines) == (name != "photos/")
    pngs["ant/0.png"] = encoded(noise(20, 17, 9), "PNG")
    fill(bucket, **{"photos/ant/0.png": pngs["ant/0.png"]})
    assert "preparing the 8 files" in bucket.python(IN_A_BUCKET, f"{bucket.url}/photos", tmp_path / "cache")


def test_with_data_dir_in_a_bucket_copies_are_local(bucket, tmp_path):
    fill(bucket, **{"few/a.png": encoded(noise(8, 8), "PNG")})
    bucket.env["XDG_CACHE_HOME"] = str(tmp_path)
    lines = bucket.python(IN_A_BUCKET, f"{bucket.url}/few", f"{bucket.url}/data").splitlines()
    del bucket.env["XDG_CACHE_HOME"]
    assert f"at 8 px in {tmp_path}/ddgan_jax/image_folder/few-" in lines[1]


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing", "does not exist: name a folder"),
        ("notes", "there is no image in gs://"),
        ("lmdb", "is an LMDB, which is read from a local disk only"),
        ("lmdb/data.mdb", "is an LMDB, which is read from a local disk only"),
        ("notes/a.txt", "neither a folder nor a zip"),
    ],
)
def test_what_cannot_be_read_in_a_bucket(bucket, tmp_path, name, message):
    fill(bucket, **{"notes/a.txt": b"text", "lmdb/data.mdb": b"database", "lmdb/lock.mdb": b""})
    assert message in bucket.python(IN_A_BUCKET, f"{bucket.url}/{name}", tmp_path / "cache")


SAMPLES = """
import sys
from ddgan_jax.commands.sample_files import file_samples
from ddgan_jax.data.archives import read_file
from ddgan_jax.errors import UserError
from ddgan_jax.storage import paths
print(*next(file_samples(sys.argv[1], 0)[0]).shape, len(read_file(paths.path(sys.argv[1] + "/a/0.png"))))
paths.write(sys.argv[1] + "/b/.unfinished", "")
try:
    file_samples(sys.argv[1], 0)
except UserError as error:
    print("error:", error)
"""


def test_samples_in_a_bucket(bucket):
    """Those of all subfolders without the figures of evaluations, unless a set was not completed."""
    content, url = encoded(noise(8, 8), "PNG"), f"{bucket.url}/sets"
    names = ("a/0.png", "b/0.png", "a.evaluation/results.json", "a.evaluation/samples.png")
    fill(bucket, **{f"sets/{name}": content for name in names})
    shape, refused = bucket.python(SAMPLES, url).splitlines()
    assert shape == f"2 8 8 3 {len(content)}"
    assert refused.startswith(f"error: --samples={url} is not complete") and refused.endswith(f"{url}/b/.unfinished")
