"""The reader of .gguf files that Transformers gets: the package's own values, in a small part of the time."""

import pytest

pytest.importorskip("gguf")

import gguf
import numpy as np

from elastickv.transformers.gguf.gguf_readers import GgufReaders
from tests.helpers.tiny_models import tiny_gguf


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tiny_gguf(path)
    return path


def readers_of(path):
    own = gguf.GGUFReader(str(path))
    with GgufReaders():
        return own, gguf.GGUFReader(str(path))


def test_every_field_has_the_packages_type_and_contents(path):
    own, ours = readers_of(path)
    assert list(own.fields) == list(ours.fields)
    for name, field in own.fields.items():
        other = ours.fields[name]
        assert (other.types, other.offset, len(other.data)) == (field.types, field.offset, len(field.data)), name
        assert other.contents() == field.contents(), name
        for a, b in zip(field.data, other.data, strict=True):
            assert list(field.parts[a]) == list(other.parts[b]), name


def test_tensors_are_where_they_were(path):
    own, ours = readers_of(path)
    assert [tensor.name for tensor in own.tensors] == [tensor.name for tensor in ours.tensors]
    for a, b in zip(own.tensors, ours.tensors, strict=True):
        assert a.data_offset == b.data_offset
        np.testing.assert_array_equal(a.data, b.data)


def test_lists_of_all_kinds_are_read(tmp_path):
    path = tmp_path / "lists.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    lists = {"words": ["", "a", "naïve", "鍵" * 100], "numbers": [1, -2, 3], "fractions": [0.5, -1.25], "flags": [True, False]}
    for name, values in lists.items():
        writer.add_array(name, values)
    writer.add_tensor("a", np.ones((2, 3), np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    own, ours = readers_of(path)
    assert {name: ours.fields[name].contents() for name in lists} == {name: own.fields[name].contents() for name in lists}
    assert ours.fields["words"].contents() == lists["words"]
