import numpy as np
import pytest

from pgolf_fast import shards
from pgolf_fast.shards import HEADER_BYTES, ShardError, ShardFile, ShardWriter, find_shards, open_shard, write_shard

TOKENS = np.arange(1000, dtype=np.uint16)


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, TOKENS)
    return path


def test_layout_is_the_challenges(shard):
    raw = shard.read_bytes()
    assert len(raw) == 1024 + 2 * len(TOKENS)
    header = np.frombuffer(raw[:1024], "<i4")
    assert header[:3].tolist() == [20240520, 1, len(TOKENS)] and not header[3:].any()
    assert raw[1024 + 2 * 258 : 1024 + 2 * 259] == b"\x02\x01"  # 258, low byte first


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
def test_round_trip(tmp_path, count):
    path = tmp_path / "fineweb_val_000000.bin"
    write_shard(path, TOKENS[:count])
    assert np.array_equal(open_shard(path), TOKENS[:count]) and open_shard(path).dtype == np.uint16
    assert shards.count_tokens(path) == count


def test_a_map_is_read_only(shard):
    with pytest.raises(ValueError):
        open_shard(shard)[0] = 1


def patch(path, offset, value):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(np.int32(value).tobytes())


FAULTS = {
    "zero bytes": lambda path: path.write_bytes(b""),
    "ends at byte 100, inside the header": lambda path: path.write_bytes(bytes(100)),
    "byte 0: magic 7": lambda path: patch(path, 0, 7),
    "byte 4: version 2": lambda path: patch(path, 4, 2),
    "byte 8: a count of -1": lambda path: patch(path, 8, -1),
    "truncated: ends at byte 3022": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "too long: ends at byte 3025": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "no such file": lambda path: path.unlink(),
}


@pytest.mark.parametrize("message", FAULTS)
def test_a_broken_file_is_refused_with_name_place_and_remedy(shard, message):
    FAULTS[message](shard)
    with pytest.raises(ShardError) as error:
        open_shard(shard)
    assert message in str(error.value) and str(shard) in str(error.value)
    assert error.value.remedy and str(error.value).endswith(error.value.remedy)


def test_a_token_outside_the_vocabulary_is_refused_with_its_offset(shard):
    assert len(open_shard(shard, vocab_size=1000)) == 1000
    with pytest.raises(ShardError, match=rf"byte {HEADER_BYTES + 2 * 700}: token 700 is outside the vocabulary of 700"):
        open_shard(shard, vocab_size=700)
    with pytest.raises(ShardError, match=rf"byte {HEADER_BYTES + 2 * 999}: token 999 is outside the vocabulary of 999"):
        shards.check_vocabulary(shard, TOKENS, vocab_size=999, block=300)


def test_names_are_strict(tmp_path):
    good = ["fineweb_val_000001.bin", "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin", "fineweb_train_000000.bin"]
    names = [*good, "fineweb_val_0.bin", "fineweb_val_000000.bin.partial", "xfineweb_val_000000.bin", "fineweb_val_000000xbin"]
    for name in names:
        (tmp_path / name).touch()
    assert [p.name for p in find_shards(tmp_path, "val")] == ["fineweb_val_000000.bin", "fineweb_val_000001.bin"]
    assert [p.name for p in find_shards(tmp_path, "val_bytes")] == ["fineweb_val_bytes_000000.bin"]


@pytest.mark.parametrize("pieces", [[2500], [1, 999, 1000, 500], [1000, 1000], [0], []])
def test_the_writer_cuts_shards_at_their_size_and_loses_nothing(tmp_path, pieces):
    stream = np.arange(sum(pieces), dtype=np.uint16)
    with ShardWriter(tmp_path, "train", shard_tokens=1000) as writer:
        for part in np.split(stream, np.cumsum(pieces)[:-1] if pieces else []):
            writer.append(part)
    found = find_shards(tmp_path, "train")
    assert found == writer.finished and len(found) == max(1, -(-len(stream) // 1000))
    assert np.array_equal(shards.read_split(found), stream)
    assert not list(tmp_path.glob("*.partial"))


def test_a_failure_leaves_no_shard_behind(tmp_path):
    path = tmp_path / "fineweb_val_000000.bin"
    with pytest.raises(RuntimeError):
        with ShardFile(path) as shard:
            shard.append(TOKENS)
            assert not path.exists(), "nor would a kill leave one here"
            raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_values_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="65535"):
        write_shard(tmp_path / "fineweb_val_000000.bin", np.array([1, 65536]))
    write_shard(tmp_path / "fineweb_val_000000.bin", np.array([0, 65535]))
    assert open_shard(tmp_path / "fineweb_val_000000.bin").tolist() == [0, 65535]


def test_missing_folder_and_missing_split_are_named(tmp_path):
    with pytest.raises(shards.UserError, match="no such folder"):
        shards.require_shards(tmp_path / "nothing", "train")
    with pytest.raises(shards.UserError, match="fineweb_train_000000.bin"):
        shards.require_shards(tmp_path, "train")
