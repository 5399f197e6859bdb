"""Checkpoint files: all of Flash's names at small width, what transformers writes, and damage below the tensors."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from dsv4.errors import CheckpointError
from dsv4.model.config import ModelConfig
from dsv4.model.export import export_release, quantise_fp4, quantise_fp8
from dsv4.model.names import TensorSpec, canonical_name, tensors, transformers_name
from dsv4.model.shards import Stored, index_checkpoint, read_header
from dsv4.model.survey import examine
from dsv4.model.weights import load_weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.models import hf_state_dict, hf_twin, random_config_dict, random_weights

T = TypeVar("T")

SMALL = {
    "hidden_size": 32,
    "moe_intermediate_size": 32,
    "vocab_size": 256,
    "num_attention_heads": 8,
    "head_dim": 64,
    "qk_rope_head_dim": 32,
    "q_lora_rank": 32,
    "o_lora_rank": 8,
    "index_n_heads": 2,
    "index_head_dim": 32,
}


def release_config(name: str, **sizes: Any) -> dict[str, Any]:
    """The config.json of a release with other sizes: same layers, experts and names."""
    file = resources.files("dsv4") / "model" / "configs" / f"{name}.json"
    return json.loads(file.read_text()) | sizes


def random_draft(config: ModelConfig) -> dict[str, Tensor]:
    """Random `mtp.*` tensors, experts stacked."""
    g, weights = torch.Generator().manual_seed(1), {}
    for name, spec in tensors(config, draft=True):
        head, _, tail = name.partition(".ffn.experts.")
        if name.startswith("mtp.") and tail:
            stack = f"{head}.ffn.experts.{tail.split('.')[1]}"
            weights.setdefault(stack, torch.randn(config.num_experts, *spec.shape, generator=g))
        elif name.startswith("mtp."):
            weights[name] = torch.randn(spec.shape, generator=g)
    return weights


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def timed(run: Callable[[], T]) -> tuple[T, float]:
    """What it gives, and its seconds of the processor, the fewer of two: other tests run beside it."""
    times = []
    for _ in range(2):
        begun = time.process_time()
        found = run()
        times.append(time.process_time() - begun)
    return found, min(times)


def test_all_names_of_flash_at_small_width(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """69,187 tensors with Flash's names and dtypes, drafter included."""
    raw = release_config("v4-flash-preview", **SMALL)
    config = ModelConfig.from_dict(raw)
    export_release(random_weights(config) | random_draft(config), config, raw, tmp_path / "ours", shards=4)

    def both() -> dict[str, Stored]:
        stored = index_checkpoint(tmp_path / "ours", config.num_experts)
        examine(stored, config)
        return stored

    stored, took = timed(both)
    _, yardstick = timed(lambda: [json.loads(json.dumps([name, i, [i]])) for i, name in enumerate(stored)])
    assert took < 8 * yardstick, (took, yardstick)
    flash = ModelConfig.preset("v4-flash-preview")
    wanted = {n: dtype for name, spec in tensors(flash, draft=True) for n, dtype, _ in spec.stored(name)}
    assert {name: place.dtype for name, place in stored.items()} == wanted and len(stored) == 69_187

    stored["layers.3.attn.wq_c.weight"] = stored["norm.weight"]

    def refused() -> None:
        with pytest.raises(
            CheckpointError, match=r"layers\.3\.attn\.wq_c\.weight .* did you mean 'layers\.3\.attn\.w"
        ):
            examine(stored, config)

    _, took = timed(refused)
    assert took < 8 * yardstick, (took, yardstick)

    with caplog.at_level("INFO", logger="dsv4.weights"):
        load_weights(tmp_path / "ours", config, torch.float32)
    assert "skipped 1575 draft tensors" in caplog.text


def test_what_is_released_is_what_transformers_writes_in_both_of_its_forms(tmp_path: Path) -> None:
    raw = release_config("v4-flash-preview", **SMALL, n_routed_experts=24)
    config = ModelConfig.from_dict(raw)
    export_release(random_weights(config), config, raw, tmp_path / "ours", shards=4)
    ours = load_weights(tmp_path / "ours", config, torch.float32)
    twin = hf_twin(config, ours)
    for form in (True, False):
        twin.save_pretrained(tmp_path / "theirs", save_original_format=form)
        theirs = ModelConfig.from_dir(tmp_path / "theirs")
        assert same(load_weights(tmp_path / "theirs", theirs, torch.float32), ours)


def test_dspark_names_of_the_ga_release(tmp_path: Path) -> None:
    raw = release_config("v4-flash", **SMALL, n_routed_experts=8, dspark_markov_rank=16)
    raw |= {"num_hidden_layers": 3, "compress_ratios": [0, 4, 128, 0, 0, 0], "num_hash_layers": 1}
    config = ModelConfig.from_dict(raw)
    weights = random_weights(config)
    export_release(weights | random_draft(config), config, raw, tmp_path)
    with_draft = load_weights(tmp_path, config, torch.bfloat16)
    export_release(weights, config, raw, tmp_path)
    assert same(load_weights(tmp_path, config, torch.bfloat16), with_draft)
    assert with_draft["layers.0.attn.wq_a.weight"].dtype == torch.bfloat16
    assert with_draft["layers.0.attn.attn_sink"].dtype == torch.float32
    assert with_draft["layers.0.ffn.gate.tid2eid"].dtype == torch.int64


def test_base_models_have_fp8_experts(tmp_path: Path) -> None:
    raw = random_config_dict("flash", expert_dtype="fp8")
    config = ModelConfig.from_dict(raw)
    export_release(random_weights(config), config, raw, tmp_path)
    place = index_checkpoint(tmp_path, 8)["layers.0.ffn.experts.3.w2.weight"]
    assert (place.dtype, place.shape) == ("F8_E4M3", (128, 64))
    assert load_weights(tmp_path, config, torch.float32)["layers.0.ffn.experts.w2"].shape == (8, 128, 64)


def test_names_map_both_ways() -> None:
    config = ModelConfig.from_dict(random_config_dict("flash"))
    for name, _ in tensors(config):
        if ".ffn.experts." not in name:
            assert canonical_name(transformers_name(name)) == canonical_name(name) == name
    with pytest.raises(KeyError):
        transformers_name("layers.0.ffn.wrong")


def test_names_and_shapes_are_those_of_transformers_own_model() -> None:
    config = ModelConfig.from_dict(random_config_dict("flash"))
    weights = random_weights(config)
    theirs = {name: w.shape for name, w in hf_twin(config, weights).state_dict().items()}
    ours = {name: w.shape for name, w in hf_state_dict(config, weights).items()}
    assert ours == {name: shape for name, shape in theirs.items() if name in ours}
    assert all(name.endswith(("inv_freq", "tid2eid", "correction_bias")) for name in theirs.keys() - ours)


@pytest.mark.parametrize("shape", [(128, 128), (300, 129), (1, 1), (127, 640)])
def test_fp8_blocks_and_their_ragged_edges(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 3
    codes, scales = quantise_fp8(x)
    assert (codes.shape, scales.shape) == (shape, (-(-shape[0] // 128), -(-shape[1] // 128)))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128))
            scale, largest = scales[i, j].float(), x[block].abs().max()
            assert largest / 448 <= scale < 2 * largest / 448  # the smallest power of two that fits
            error = (codes[block].float() * scale - x[block]).abs()
            assert (error <= (x[block].abs() / 16).clamp(min=scale * 2**-10)).all()


def test_fp4_packs_the_even_index_low() -> None:
    x = torch.tensor([[6.0, -0.5] + [0.0] * 30 + [1.5, 0.25] + [0.0] * 29 + [-3.0]])
    packed, scales = quantise_fp4(x)
    assert packed.dtype == torch.int8 and packed.shape == (1, 32)
    assert packed.view(torch.uint8)[0, [0, 16, 31]].tolist() == [0x97, 0x15, 0xF0]
    assert scales.float().tolist() == [[1.0, 0.5]]


def test_the_model_that_ships() -> None:
    path = str(resources.files("dsv4") / "data" / "nano")
    config = ModelConfig.from_dir(path)
    weights = load_weights(path, config, torch.bfloat16)
    parameters = sum(w.numel() for name, w in weights.items() if not name.endswith("tid2eid"))
    assert parameters == 17_890_755
    files = sum(f.stat().st_size for f in Path(path).glob("*.safetensors"))
    assert files == 24_415_812


# Damage in one file. Every case fails before any tensor is read.


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small stacked checkpoint, as transformers writes it, in one file without an index."""
    config = ModelConfig.from_dict(random_config_dict("flash", compress_ratios=[0, 4]))
    path = tmp_path_factory.mktemp("plain")
    hf_twin(config, random_weights(config)).save_pretrained(path, save_original_format=False)
    return path


Header = dict[str, Any]


def edit_header(file: Path, change: Callable[[Header], Any]) -> None:
    """Replaces the JSON header; a `change` that returns a string gives its text."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    result = change(header)
    text = (result if isinstance(result, str) else json.dumps(header)).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_tensor(file: Path, name: str, value: Callable[[Tensor], Tensor]) -> None:
    edit(file, lambda flat: flat.update({name: value(flat[name]).contiguous()}))


def edit(file: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    flat = load_file(file)
    change(flat)
    save_file(flat, file)


def twice(header: Header) -> str:
    text = json.dumps(header)
    return text[:-1] + ', "lm_head.weight": ' + json.dumps(header["lm_head.weight"]) + "}"


def overlap(header: Header) -> None:
    a, b = "model.norm.weight", "model.layers.0.input_layernorm.weight"
    header[a]["data_offsets"] = header[b]["data_offsets"]


STACK = "model.layers.1.mlp.experts.gate_up_proj"
NORM = "model.norm.weight"
HASH = "model.layers.0.mlp.gate.tid2eid"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda f: f.write_bytes(b""), "is truncated: it has 0 bytes"),
    "no header": (lambda f: f.write_bytes(f.read_bytes()[:500]), "is truncated: it has 500 bytes"),
    "half the data": (lambda f: f.write_bytes(f.read_bytes()[:-1]), "is truncated: tensor .* ends at byte"),
    "no JSON": (lambda f: edit_header(f, lambda h: "{]"), "damaged header"),
    "deep JSON": (lambda f: edit_header(f, lambda h: "[" * 10**6), "damaged header"),
    "no object": (lambda f: edit_header(f, lambda h: "[]"), "damaged header: no object"),
    "two of a name": (lambda f: edit_header(f, twice), "lm_head.weight is there twice"),
    "no dtype": (
        lambda f: edit_header(f, lambda h: h[NORM].update(dtype=None)),
        "norm.weight has a damaged header",
    ),
    "odd dtype": (
        lambda f: edit_header(f, lambda h: h[NORM].update(dtype="F8_E5M2")),
        "has dtype F8_E5M2; known",
    ),
    "odd offsets": (
        lambda f: edit_header(f, lambda h: h[NORM].update(data_offsets=[4, "x"])),
        "norm.weight has a damaged header",
    ),
    "wrong bytes": (
        lambda f: edit_header(f, lambda h: h[NORM].update(shape=[2])),
        "512 bytes; F32 .2. takes 8",
    ),
    "beyond the end": (
        lambda f: edit_header(f, lambda h: h[NORM].update(data_offsets=[2**40, 2**40 + 512])),
        "is truncated: tensor model.norm.weight ends at byte 1099",
    ),
    "overlap": (lambda f: edit_header(f, overlap), "overlaps the one before it"),
    "stack of another number": (
        lambda f: edit_tensor(f, STACK, lambda t: t[:-1]),
        r"gate_up_proj has shape \[7, 128, 128\]; expected is one matrix per expert \(8\)",
    ),
    "stack of another width": (
        lambda f: edit_tensor(f, STACK, lambda t: t[:, :, :-1]),
        r"experts.0.w1.weight has shape \[64, 127\]; expected is \[64, 128\]",
    ),
    "not finite": (
        lambda f: edit_tensor(f, NORM, lambda t: t / 0),
        "norm.weight holds values that are not finite",
    ),
    "unknown expert": (
        lambda f: edit_tensor(f, HASH, lambda t: t + 8),
        "names experts 8 to 15; the model has 8",
    ),
    "a matrix of size zero": (
        lambda f: edit_tensor(f, NORM, lambda t: t[:0]),
        r"tensor norm.weight has shape \[0\]; expected is \[128\]",
    ),
    "a foreign tensor of size zero": (
        lambda f: edit(f, lambda t: t.update({"model.layers.0.extra": torch.ones(0, 4)})),
        "tensor layers.0.extra does not belong to this model",
    ),
    "a name that is nearly right": (
        lambda f: edit(f, lambda t: t.update({"model.layers.1.self_attn.kv_projj.weight": torch.ones(4)})),
        r"tensor layers.1.self_attn.kv_projj.weight does not belong to this model",
    ),
    "a scale of a matrix that needs none": (
        lambda f: edit(f, lambda t: t.update({"layers.1.attn.wq_a.scale": torch.ones(1, 1)})),
        "tensor layers.1.attn.wq_a.scale does not belong to this model; did you mean 'layers.1.attn.wq_a.weight'",
    ),
    "a second file": (
        lambda f: (f.parent / "other.safetensors").write_bytes(f.read_bytes()),
        "is there twice: in model.safetensors and in other.safetensors",
    ),
    "index to elsewhere": (
        lambda f: (f.parent / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../x.safetensors"}}'
        ),
        "names '../x.safetensors'; shards are .safetensors files beside it",
    ),
    "index of code": (
        lambda f: (f.parent / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model.bin"}}'
        ),
        "names 'model.bin'",
    ),
    "empty index": (
        lambda f: (f.parent / "model.safetensors.index.json").write_text("{}"),
        "has no weight_map",
    ),
    "broken index": (lambda f: (f.parent / "model.safetensors.index.json").write_text("{"), "is no JSON"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_line(plain: Path, tmp_path: Path, name: str) -> None:
    for file in plain.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damage, message = DAMAGE[name]
    damage(tmp_path / "model.safetensors")
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=message) as error:
        load_weights(tmp_path, ModelConfig.from_dir(tmp_path), torch.float32)
    assert time.monotonic() - start < 20
    assert "\n" not in str(error.value) and len(str(error.value)) < 250


def test_a_giant_header_is_not_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as f:
        f.write(struct.pack("<Q", 2**40))
        f.truncate(2**41)  # a hole: takes no disk
    with pytest.raises(CheckpointError, match="has a header of 1099511627776 bytes; the limit is 100000000"):
        read_header(file)


def test_export_refuses_what_does_not_fit(tmp_path: Path) -> None:
    raw = random_config_dict("flash")
    config = ModelConfig.from_dict(raw)
    weights = random_weights(config)
    with pytest.raises(CheckpointError, match=r"norm.weight has shape \[3\]; the config gives \[128\]"):
        export_release(weights | {"norm.weight": torch.ones(3)}, config, raw, tmp_path)
    del weights["norm.weight"]
    with pytest.raises(CheckpointError, match=r"norm\.weight is missing"):
        export_release(weights, config, raw, tmp_path)


def test_stored_shapes_of_each_storage() -> None:
    assert TensorSpec((200, 129), "fp8").stored("a.weight") == [
        ("a.weight", "F8_E4M3", (200, 129)),
        ("a.scale", "F8_E8M0", (2, 2)),
    ]
    assert TensorSpec((3, 64), "fp4").stored("a.weight") == [
        ("a.weight", "I8", (3, 32)),
        ("a.scale", "F8_E8M0", (3, 2)),
    ]
    assert TensorSpec((5,), "f32").stored("a") == [("a", "F32", (5,))]
