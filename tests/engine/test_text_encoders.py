"""Text encoders in all layouts that people have, against transformers' own loading and forward."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pack.engine.demo import text
from pack.engine.errors import CheckpointError
from pack.engine.text_encoders import ClipTextEncoder, T5TextEncoder, load_clip, load_t5
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CAPTIONS = ["a large red star in the center", "two small blue circles on a cream background"]
LONG = " ".join(["a large red star"] * 20)


@pytest.fixture(scope="module")
def t5_tokenizer() -> Any:
    return text.t5_tokenizer(CAPTIONS)


@pytest.fixture(scope="module")
def clip_tokenizer() -> Any:
    return text.clip_tokenizer(CAPTIONS)


@pytest.fixture
def t5_words(tmp_path: Path, t5_tokenizer: Any) -> Path:
    t5_tokenizer.save_pretrained(tmp_path / "t5_words")
    return tmp_path / "t5_words"


@pytest.fixture
def clip_words(tmp_path: Path, clip_tokenizer: Any) -> Path:
    clip_tokenizer.save_pretrained(tmp_path / "clip_words")
    return tmp_path / "clip_words"


def with_random_norms(module: nn.Module) -> Any:
    """The module with norms that differ from 1, so that one in the wrong place shows."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return module.requires_grad_(False).eval()


def t5_module(**settings: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    sizes = {"vocab_size": 480, "d_model": 64, "d_kv": 24, "d_ff": 96, "num_layers": 2}
    torch.manual_seed(0)
    config = T5Config(**sizes | {"num_heads": 4, "feed_forward_proj": "gated-gelu"} | settings)
    return with_random_norms(T5EncoderModel(config))


def clip_module(**settings: Any) -> Any:
    from transformers import CLIPTextModel

    torch.manual_seed(0)
    config = text.clip_model(480).config
    config.update({"hidden_size": 128, "num_attention_heads": 2} | settings)
    return with_random_norms(CLIPTextModel(config))


def t5_state(module: nn.Module) -> dict[str, Tensor]:
    """The encoder's tensors as published: the table of tokens once, called shared."""
    state = module.state_dict()
    return {key: value for key, value in state.items() if "embed_tokens" not in key}


def clip_state(module: nn.Module) -> dict[str, Tensor]:
    """Names as OpenAI and transformers 4 have them; transformers 5 drops the first part."""
    return {
        f"text_model.{key.removeprefix('text_model.')}": value
        for key, value in module.state_dict().items()
    }


def stored(state: dict[str, Tensor], folder: Path) -> Path:
    owned = {key: value.clone().contiguous() for key, value in state.items()}
    save_file(owned, folder / "encoder.safetensors")
    return folder / "encoder.safetensors"


def t5_output(module: nn.Module, tokenizer: Any, length: int = text.T5_TOKENS) -> Tensor:
    """What transformers gives for the captions, with padding like any other token."""
    rows = [tokenizer(caption).input_ids for caption in CAPTIONS]
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    with torch.no_grad():
        return module(input_ids=ids).last_hidden_state


def clip_output(module: nn.Module, tokenizer: Any) -> Tensor:
    """The last state of each caption where it ends, whatever follows."""
    rows = [tokenizer(caption).input_ids for caption in CAPTIONS]
    with torch.no_grad():
        return torch.stack(
            [module(input_ids=torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
        )


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name.startswith("pack.")]


T5_FILES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "shared only": lambda state: state,
    "embed_tokens only": lambda state: {
        key.replace("shared", "encoder.embed_tokens"): value for key, value in state.items()
    },
    "both": lambda state: state | {"encoder.embed_tokens.weight": state["shared.weight"]},
    "inside a checkpoint": lambda state: (
        {f"text_encoders.t5xxl.transformer.{key}": value for key, value in state.items()}
        | {"model.diffusion_model.img_in.weight": torch.zeros(300, 300, dtype=torch.float8_e4m3fn)}
    ),
}


@pytest.mark.parametrize("kind", T5_FILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_t5_file_encodes_as_transformers_does(
    tmp_path: Path, t5_words: Path, t5_tokenizer: Any, kind: str, dtype: torch.dtype
) -> None:
    module = t5_module().to(dtype)
    path = stored(T5_FILES[kind](t5_state(module)), tmp_path)

    encoder = load_t5(path, t5_words, dtype=None)

    assert {parameter.dtype for parameter in encoder.module.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())
    assert torch.equal(encoder.encode(CAPTIONS, 512), t5_output(module, t5_tokenizer))


@pytest.mark.parametrize("settings", [{"feed_forward_proj": "relu"}, {"num_layers": 3}])
def test_the_kind_of_a_t5_file_comes_from_its_tensors(
    tmp_path: Path, t5_words: Path, t5_tokenizer: Any, settings: dict[str, Any]
) -> None:
    module = t5_module(**settings)
    encoder = load_t5(stored(t5_state(module), tmp_path), t5_words, dtype=torch.float32)
    assert torch.equal(encoder.encode(CAPTIONS, 512), t5_output(module, t5_tokenizer))


def test_of_a_whole_t5_only_the_encoder_is_read(
    tmp_path: Path, t5_words: Path, t5_tokenizer: Any
) -> None:
    from transformers import T5ForConditionalGeneration

    config = t5_module().config
    config.tie_word_embeddings = False
    torch.manual_seed(2)
    whole = with_random_norms(T5ForConditionalGeneration(config))
    names = stored(whole.state_dict(), tmp_path)
    assert "decoder.block.0.layer.1.EncDecAttention.q.weight" in load_file(names)

    encoder = load_t5(names, t5_words, dtype=torch.float32)

    expected = t5_output(whole.get_encoder(), t5_tokenizer)
    assert torch.equal(encoder.encode(CAPTIONS, 512), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_t5_folder_is_loaded_as_transformers_does(
    tmp_path: Path, t5_tokenizer: Any, dtype: torch.dtype
) -> None:
    """In float16 that keeps some layers in float32, as their results would leave its range."""
    from transformers import T5EncoderModel

    folder = tmp_path / "text_encoder_2"
    t5_module().to(dtype).save_pretrained(folder)
    t5_tokenizer.save_pretrained(tmp_path / "tokenizer_2")
    expected: Any = T5EncoderModel.from_pretrained(str(folder), dtype=dtype)

    encoder = load_t5(folder, None, dtype=None)

    types = {name: value.dtype for name, value in encoder.module.state_dict().items()}
    assert types == {name: value.dtype for name, value in expected.state_dict().items()}
    assert torch.equal(encoder.encode(CAPTIONS, 512), t5_output(expected.eval(), t5_tokenizer))


def test_a_split_t5_folder_is_loaded_whole(tmp_path: Path, t5_tokenizer: Any) -> None:
    module = t5_module()
    module.save_pretrained(tmp_path, max_shard_size="100KB")
    t5_tokenizer.save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1

    encoder = load_t5(tmp_path, None, dtype=None)

    assert torch.equal(encoder.encode(CAPTIONS, 512), t5_output(module, t5_tokenizer))


def test_the_published_t5_config_is_understood(
    tmp_path: Path, t5_words: Path, t5_tokenizer: Any
) -> None:
    """With the settings that google's t5-v1_1 and FLUX.1's text_encoder_2 have, but for sizes."""
    module = t5_module()
    module.save_pretrained(tmp_path / "t5")
    sizes = {"vocab_size": 480, "d_model": 64, "d_kv": 24, "d_ff": 96, "num_heads": 4}
    published = {
        "_name_or_path": "google/t5-v1_1-xxl",
        "architectures": ["T5EncoderModel"],
        "classifier_dropout": 0.0,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "initializer_factor": 1.0,
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": 1e-06,
        "model_type": "t5",
        "n_positions": 512,
        "num_decoder_layers": 24,
        "num_layers": 2,
        "output_past": True,
        "pad_token_id": 0,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.43.3",
        "use_cache": True,
    }
    (tmp_path / "t5" / "config.json").write_text(json.dumps(published | sizes))

    encoder = load_t5(tmp_path / "t5", t5_words, dtype=torch.float32)

    assert torch.equal(encoder.encode(CAPTIONS, 512), t5_output(module, t5_tokenizer))


def test_the_table_of_tokens_is_in_memory_once(tmp_path: Path, t5_words: Path) -> None:
    module = load_t5(stored(t5_state(t5_module()), tmp_path), t5_words, dtype=None).module
    state = module.state_dict()
    table, copy = state["shared.weight"], state["encoder.embed_tokens.weight"]
    assert table.data_ptr() == copy.data_ptr()


def test_padding_takes_part_in_attention(tmp_path: Path, t5_words: Path, t5_tokenizer: Any) -> None:
    encoder = load_t5(stored(t5_state(t5_module()), tmp_path), t5_words, dtype=None)
    tokens = len(t5_tokenizer(CAPTIONS[0]).input_ids)

    short, padded = (encoder.encode(CAPTIONS[:1], length) for length in (tokens, text.T5_TOKENS))

    assert short.shape == (1, tokens, 64) and padded.shape == (1, text.T5_TOKENS, 64)
    assert (short - padded[:, :tokens]).abs().max() > 0.01


@pytest.mark.parametrize("asked", [8, 512])
def test_long_captions_are_cut_with_a_warning_and_still_end(
    tmp_path: Path, t5_words: Path, t5_tokenizer: Any, caplog: pytest.LogCaptureFixture, asked: int
) -> None:
    module = t5_module()
    encoder = load_t5(stored(t5_state(module), tmp_path), t5_words, dtype=None)
    ids = t5_tokenizer(LONG).input_ids
    kept = min(asked, text.T5_TOKENS)  # the tokenizer's own limit

    with caplog.at_level(logging.WARNING):
        output = encoder.encode([LONG, "a"], asked)

    with torch.no_grad():
        expected = module(input_ids=torch.tensor([[*ids[: kept - 1], 1]]))  # 1 ends a text
    torch.testing.assert_close(output[:1], expected.last_hidden_state, rtol=0, atol=5e-6)
    assert warnings(caplog) == [f"caption of {len(ids)} tokens is cut to {kept} for T5: {LONG}"]


CLIP_FILES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
    "as published": lambda state: state,
    "without prefix": lambda state: {
        key.removeprefix("text_model."): value for key, value in state.items()
    },
    "inside a checkpoint": lambda state: (
        {f"text_encoders.clip_l.transformer.{key}": value for key, value in state.items()}
        | {"model.diffusion_model.img_in.weight": torch.zeros(300, 300, dtype=torch.float8_e4m3fn)}
    ),
    "with a table of positions": lambda state: (
        state | {"text_model.embeddings.position_ids": torch.arange(text.CLIP_TOKENS)[None]}
    ),
    "with a projection": lambda state: (
        state | {"text_projection.weight": torch.zeros(8, 128), "logit_scale": torch.tensor(1.0)}
    ),
}


@pytest.mark.parametrize("kind", CLIP_FILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_single_clip_file_encodes_as_transformers_does(
    tmp_path: Path, clip_words: Path, clip_tokenizer: Any, kind: str, dtype: torch.dtype
) -> None:
    module = clip_module().to(dtype)
    path = stored(CLIP_FILES[kind](clip_state(module)), tmp_path)

    encoder = load_clip(path, clip_words, dtype=None)

    assert {parameter.dtype for parameter in encoder.module.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in encoder.module.parameters())
    output, expected = encoder.encode(CAPTIONS), clip_output(module, clip_tokenizer)
    # The same sums over rows of other lengths; the embeddings are of order 1.
    torch.testing.assert_close(output, expected, rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_a_whole_clip_model_gives_its_text_half(tmp_path: Path, clip_tokenizer: Any) -> None:
    from transformers import CLIPConfig, CLIPModel

    module = clip_module()
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 16,
        "patch_size": 8,
    }
    torch.manual_seed(4)
    config = CLIPConfig(text_config=module.config.to_dict(), vision_config=vision)
    whole = CLIPModel(config)
    whole.load_state_dict(clip_state(module), strict=False)
    whole.save_pretrained(tmp_path / "clip")
    clip_tokenizer.save_pretrained(tmp_path / "clip")
    names = load_file(tmp_path / "clip" / "model.safetensors")
    assert "vision_model.encoder.layers.0.self_attn.q_proj.weight" in names

    expected = clip_output(module, clip_tokenizer)
    for path in (tmp_path / "clip", tmp_path / "clip" / "model.safetensors"):
        encoder = load_clip(path, tmp_path / "clip", dtype=torch.float32)
        torch.testing.assert_close(encoder.encode(CAPTIONS), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("end", [2, 479])
def test_a_clip_folder_keeps_what_its_config_says(
    tmp_path: Path, clip_words: Path, clip_tokenizer: Any, end: int
) -> None:
    """Four heads of 32 cannot be told from a file; both ways of naming the end token are used."""
    assert clip_tokenizer.eos_token_id == max(clip_tokenizer.get_vocab().values())
    end = clip_tokenizer.eos_token_id if end == 479 else end
    module = clip_module(num_attention_heads=4, eos_token_id=end)
    module.save_pretrained(tmp_path / "text_encoder")
    encoder = load_clip(tmp_path / "text_encoder", clip_words, dtype=torch.float32)
    expected = clip_output(module, clip_tokenizer)
    torch.testing.assert_close(encoder.encode(CAPTIONS), expected, rtol=0, atol=5e-6)


def test_clip_cuts_at_its_positions_and_reads_the_end_token_there(
    tmp_path: Path, clip_words: Path, clip_tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    module = clip_module()
    encoder = load_clip(stored(clip_state(module), tmp_path), clip_words, dtype=None)
    ids = clip_tokenizer(LONG).input_ids

    with caplog.at_level(logging.WARNING):
        output = encoder.encode([LONG])

    with torch.no_grad():
        cut = [*ids[: text.CLIP_TOKENS - 1], ids[-1]]
        states = module(input_ids=torch.tensor([cut])).last_hidden_state
    torch.testing.assert_close(output, states[:, -1], rtol=0, atol=5e-6)
    told = f"caption of {len(ids)} tokens is cut to {text.CLIP_TOKENS} for CLIP: {LONG}"
    assert warnings(caplog) == [told]


def test_every_tensor_reaches_the_device(tmp_path: Path, t5_words: Path, clip_words: Path) -> None:
    """Buffers that are in no file too, or the first batch on a GPU fails."""
    t5 = load_t5(stored(t5_state(t5_module()), tmp_path), t5_words, dtype=None, device="meta")
    path = stored(clip_state(clip_module()), tmp_path)
    clip = load_clip(path, clip_words, dtype=None, device="meta")
    for module in (t5.module, clip.module):
        tensors = [*module.named_parameters(), *module.named_buffers()]
        assert {name for name, tensor in tensors if tensor.device.type != "meta"} == set()


def load_either(kind: str, path: Path, tokenizer: Path | None) -> T5TextEncoder | ClipTextEncoder:
    return (load_t5 if kind == "t5" else load_clip)(path, tokenizer, dtype=torch.float32)


def saved(kind: str, folder: Path) -> Path:
    """A single file of this kind."""
    return stored(t5_state(t5_module()) if kind == "t5" else clip_state(clip_module()), folder)


SETTINGS = {"t5": "tokenizer1", "clip": "tokenizer2"}


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_tokenizer_is_found_inside_a_folder_or_beside_it(
    tmp_path: Path, t5_tokenizer: Any, clip_tokenizer: Any, kind: str
) -> None:
    module, tokenizer, name = {
        "t5": (t5_module(), t5_tokenizer, "_2"),
        "clip": (clip_module(), clip_tokenizer, ""),
    }[kind]
    for inside in (True, False):
        folder = tmp_path / str(inside) / f"text_encoder{name}"
        module.save_pretrained(folder)
        tokenizer.save_pretrained(folder if inside else folder.with_name(f"tokenizer{name}"))
        found = load_either(kind, folder, None).tokenizer
        assert found(LONG).input_ids == tokenizer(LONG).input_ids


def test_a_named_tokenizer_goes_before_the_one_inside(
    tmp_path: Path, t5_tokenizer: Any, clip_words: Path
) -> None:
    t5_module().save_pretrained(tmp_path / "t5")
    t5_tokenizer.save_pretrained(tmp_path / "t5")
    found = load_t5(tmp_path / "t5", clip_words, dtype=None).tokenizer
    assert found.eos_token == "<|endoftext|>"


def test_clip_s_vocabulary_and_merges_are_enough(tmp_path: Path) -> None:
    """As ComfyUI's ``sd1_tokenizer`` has them, without tokenizer.json."""
    folder = tmp_path / "sd1_tokenizer"
    folder.mkdir()
    letters = [*"abcdefghijklmnopqrstuvwxyz", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz")]
    tokens = [*letters, "re", "red</w>", "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 77,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    encoder = load_clip(saved("clip", tmp_path), folder, dtype=torch.float32)

    names = ["<|startoftext|>", "red</w>", "a</w>", "<|endoftext|>"]
    assert encoder.tokenizer("Red a").input_ids == [vocabulary[name] for name in names]


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_single_file_needs_a_tokenizer_s_name(tmp_path: Path, kind: str) -> None:
    path, wanted = saved(kind, tmp_path), "tokenizer.json (or vocab.json and merges.txt)"
    with pytest.raises(CheckpointError) as caught:
        load_either(kind, path, None)
    assert str(caught.value) == (
        f"{path}: no tokenizer was found beside it; set {SETTINGS[kind]} to a folder with {wanted}"
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError) as caught:
        load_either(kind, path, tmp_path / "empty")
    assert str(caught.value) == (
        f"{tmp_path / 'empty'} holds no tokenizer; set {SETTINGS[kind]} to a folder with {wanted}"
    )


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    tmp_path: Path, t5_words: Path, t5_tokenizer: Any
) -> None:
    path = stored(t5_state(t5_module(vocab_size=100)), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_t5(path, t5_words, dtype=None)
    assert str(caught.value) == (
        f"{t5_words}: the tokenizer has {len(t5_tokenizer)} tokens, but {path} knows 100; "
        "tokenizer1 belongs to another model"
    )


def test_a_tokenizer_that_ends_texts_in_another_way_is_warned_of(
    tmp_path: Path, t5_words: Path, clip_words: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved("clip", tmp_path)
    with caplog.at_level(logging.WARNING):
        load_clip(path, clip_words, dtype=None)
        assert not warnings(caplog)
        load_clip(path, t5_words, dtype=None)
    assert warnings(caplog) == [
        f"{path} reads a text at its largest token id, which is not where {t5_words} ends it; "
        "tokenizer2 may belong to another model"
    ]


def test_a_tokenizer_without_padding_is_refused(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=text.t5_tokenizer(CAPTIONS).backend_tokenizer)
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(CheckpointError) as caught:
        load_t5(saved("t5", tmp_path), tmp_path / "bare", dtype=None)
    assert str(caught.value) == (
        f"{tmp_path / 'bare'}: the tokenizer has no token for padding; "
        "tokenizer1 belongs to another model"
    )


@pytest.mark.parametrize("content", ["", "{broken", "<!doctype html>", '{"model": 3}'])
def test_a_damaged_tokenizer_is_named_in_one_line(
    tmp_path: Path, t5_words: Path, content: str
) -> None:
    (t5_words / "tokenizer.json").write_text(content)
    with pytest.raises(CheckpointError) as caught:
        load_t5(saved("t5", tmp_path), t5_words, dtype=None)
    assert str(caught.value).startswith(
        f"{t5_words}: the tokenizer is damaged or of a kind we do not know ("
    )
    assert str(caught.value).endswith("); download it again")
    assert "\n" not in str(caught.value)


WRONG_FILES = {
    "a FLUX.1 transformer": ["img_in.weight", "double_blocks.0.img_attn.qkv.weight"],
    "an autoencoder (VAE)": ["encoder.down.0.block.0.conv1.weight", "decoder.conv_in.weight"],
    "a LoRA file": ["lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"],
    "a language model": ["model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"],
    "a CLIP vision encoder": ["vision_model.encoder.layers.0.self_attn.q_proj.weight"],
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("what", WRONG_FILES)
def test_a_wrong_file_is_named_for_what_it_is(tmp_path: Path, kind: str, what: str) -> None:
    path = stored({name: torch.zeros(2, 2) for name in WRONG_FILES[what]}, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_either(kind, path, None)
    wanted = {"t5": "a T5 text encoder", "clip": "a CLIP text encoder"}[kind]
    assert str(caught.value) == f"{path}: this is {what}, not {wanted}"


def test_the_two_encoders_are_not_taken_for_each_other(tmp_path: Path) -> None:
    path = saved("clip", tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_t5(path, None, dtype=None)
    assert str(caught.value) == f"{path}: this is a CLIP text encoder, not a T5 text encoder"
    path = saved("t5", tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_clip(path, None, dtype=None)
    assert str(caught.value) == f"{path}: this is a T5 text encoder, not a CLIP text encoder"


def test_wan_s_text_encoder_is_not_taken_for_t5(tmp_path: Path, t5_words: Path) -> None:
    """UMT5 has a table of distances in every block, T5 in the first alone."""
    from transformers import UMT5Config, UMT5EncoderModel

    sizes = {"vocab_size": 480, "d_model": 64, "d_kv": 24, "d_ff": 96, "num_layers": 2}
    module = UMT5EncoderModel(UMT5Config(**sizes, num_heads=4))
    path = stored(t5_state(module), tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_t5(path, t5_words, dtype=None)
    assert str(caught.value) == (
        f"{path}: encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight does not "
        "belong to this kind of model; the file looks like a UMT5 text encoder"
    )


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_missing_tensor_is_named(tmp_path: Path, kind: str) -> None:
    state = load_file(saved(kind, tmp_path))
    state.pop(key := sorted(key for key in state if key.endswith("final_layer_norm.weight"))[0])
    path = stored(state, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_either(kind, path, None)
    what = {"t5": "a T5 text encoder", "clip": "a CLIP text encoder"}[kind]
    assert str(caught.value) == f"{path}: {key} is missing; the file looks like {what}"


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
        ("clip", "text_model.embeddings.token_embedding.weight"),
    ],
)
def test_a_file_without_what_tells_its_size_is_named(tmp_path: Path, kind: str, key: str) -> None:
    state = load_file(saved(kind, tmp_path))
    state.pop(key)
    path = stored(state, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_either(kind, path, None)
    assert str(caught.value).replace("'", "") == (
        f"{path}: {key} is missing; the text encoder is not whole"
    )


def test_fp8_encoders_are_refused_with_the_way_out(tmp_path: Path, t5_words: Path) -> None:
    state = {key: value.to(torch.float8_e4m3fn) for key, value in t5_state(t5_module()).items()}
    path = stored(state, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_t5(path, t5_words, dtype=None)
    assert str(caught.value) == (
        f"{path}: FP8 text encoders cannot be read by this version; use the fp16 or bf16 file"
    )


def test_a_damaged_config_is_named(tmp_path: Path, t5_words: Path) -> None:
    t5_module().save_pretrained(tmp_path / "t5")
    shutil.copy(t5_words / "tokenizer.json", tmp_path / "t5")
    config = tmp_path / "t5" / "config.json"
    config.write_text("[1, 2]")
    with pytest.raises(CheckpointError) as caught:
        load_t5(tmp_path / "t5", None, dtype=None)
    assert str(caught.value) == f"{config}: this is not readable JSON; download it again"
