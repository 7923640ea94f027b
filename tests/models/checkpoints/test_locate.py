"""Names of models: paths first, then runs, then Hugging Face, in whose cache a name may lie."""

import pytest
from huggingface_hub import constants

from models.checkpoints import locate
from models.checkpoints.locate import find_checkpoint
from models.checkpoints.pretrained import open_checkpoint, save
from tests.models.checkpoints.test_pretrained import pretrained
from tests.models.tiny_checkpoints import LLAMA

COMMIT, OLDER = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache of huggingface_hub, without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    locate._fetched.cache_clear()
    yield tmp_path / "hub"
    locate._fetched.cache_clear()


def put(cache, repository, commit, *, revision="main"):
    """A snapshot as huggingface_hub lays it out: files that link to blobs."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    save(cache / "whole", pretrained(LLAMA))
    snapshot = folder / "snapshots" / commit
    for made in (folder / "blobs", folder / "refs", snapshot):
        made.mkdir(parents=True, exist_ok=True)
    for number, file in enumerate(sorted((cache / "whole").iterdir())):
        blob = folder / "blobs" / f"{number}-{commit}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(blob)
    (folder / "refs" / revision).write_text(commit)
    return snapshot


def test_a_name_that_lies_in_the_cache(hub_cache):
    newest = put(hub_cache, "org/name", COMMIT)
    older = put(hub_cache, "org/name", OLDER, revision="v1.0")
    assert find_checkpoint("org/name") == newest
    assert find_checkpoint("org/name@main") == newest
    assert find_checkpoint("org/name@v1.0") == older
    assert find_checkpoint(f"org/name@{OLDER}") == older
    assert open_checkpoint("org/name").config.vocab_size == LLAMA.vocab_size


def test_a_path_wins(hub_cache, tmp_path, monkeypatch):
    put(hub_cache, "org/name", COMMIT)
    monkeypatch.chdir(tmp_path)
    save("org/name", pretrained(LLAMA))
    assert str(find_checkpoint("org/name")) == "org/name"


def test_the_directory_of_a_run(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is a run that has written no model yet.* train\.py --run-dir"):
        find_checkpoint(tmp_path)
    save(tmp_path / "model", pretrained(LLAMA))
    assert find_checkpoint(tmp_path) == tmp_path / "model"
    assert find_checkpoint(tmp_path / "model") == tmp_path / "model"


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/name", "org/name is no path here, and as a model on Hugging Face: Hugging Face cannot be reached"),
        ("org/name@v2", "org/name@v2 is no path here, and as a model"),
        ("org/na--me", "it cannot be fetched .*Cannot have -- or"),
        ("name", "name is missing: expected a GGUF file"),
        ("./org/name", r"\./org/name is missing"),
        ("a/b/c", "a/b/c is missing"),
        ("models/nowhere.gguf", "nowhere.gguf is missing"),
        ("", "holds no|neither|is missing"),
        ("x" * 5000, "cannot be read: File name too long"),
    ],
)
def test_what_is_nowhere(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message) as raised:
        open_checkpoint(name)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 500
