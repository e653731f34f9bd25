"""Tiny models of the architectures that people deploy, with random weights: two layers of width 64, twelve tokens.

``CATALOGUE`` is what ``benchmarks.architectures`` compiles and compares with floating point, and what
``tests/test_architectures.py`` takes its samples from. A model enters as its class in ``transformers`` makes it: no
wrapper picks an output, no attention is asked for by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, LENGTH, WIDTH = 120, 12, 64
LABELS = 3
LOW_ID = 5  # ids below are special tokens
SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
    "num_labels": LABELS,
}
GROUPED: Mapping[str, Any] = {**SIZES, "num_key_value_heads": 2}  # of decoders whose query heads share keys
SPREAD = 0.08  # of random weights: so wide that attention attends


@dataclass(frozen=True)
class Tiny:
    """One model of the catalogue.

    kind: the section of the table. make: builds the module. example: makes inputs from a seed. refused: a part of the
    message with which the compiler refuses it; "" for one that compiles.
    """

    name: str
    kind: str
    make: Callable[[], nn.Module]
    example: Callable[[int], dict[str, Tensor]]
    refused: str = ""

    def built(self, spread: float | None = None) -> nn.Module:
        """Build the model with random weights, the same at every call; spread: their deviation, for matrices."""
        torch.manual_seed(0)
        module = self.make().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if not parameter.any():  # biases, class tokens and positions that begin at zero are trained in practice
                    parameter.normal_(0.0, 0.02)
                elif spread is not None and parameter.dim() > 1:
                    parameter.mul_(spread / max(float(parameter.std()), 1e-6))
        return module


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _ids(seed: int, length: int = LENGTH) -> Tensor:
    return torch.randint(LOW_ID, VOCABULARY, (1, length), generator=_seeded(seed))


def _mask(seed: int, length: int = LENGTH) -> Tensor:
    """Every third text is full; others are padded on the right."""
    kept = length - (seed % 3) * (length // 4)
    return (torch.arange(length) < kept).long()[None]


def text(seed: int) -> dict[str, Tensor]:
    """Token ids and their mask; padding has the id 1."""
    mask = _mask(seed)
    return {"input_ids": torch.where(mask.bool(), _ids(seed), 1), "attention_mask": mask}


def unmasked(seed: int) -> dict[str, Tensor]:
    return {"input_ids": _ids(seed)}


def boxed(seed: int) -> dict[str, Tensor]:
    corner = torch.randint(0, 500, (1, LENGTH, 2), generator=_seeded(seed))
    size = torch.randint(1, 400, (1, LENGTH, 2), generator=_seeded(seed + 1000))
    return {**text(seed), "bbox": torch.cat([corner, corner + size], -1)}


def pair(seed: int) -> dict[str, Tensor]:
    return {**text(seed), "decoder_input_ids": _ids(seed + 1000, 8)}


def ended(seed: int) -> dict[str, Tensor]:
    """A text with its end-of-text token, the largest id, at the last place before the padding."""
    found = text(seed)
    last = int(found["attention_mask"].sum()) - 1
    found["input_ids"] = torch.where(torch.arange(LENGTH) < last, found["input_ids"].clamp(max=VOCABULARY - 2), 1)
    found["input_ids"][0, last] = VOCABULARY - 1
    return found


def image(seed: int, side: int = 32) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(1, 3, side, side, generator=_seeded(seed))}


def features(seed: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(1, 16, 32, generator=_seeded(seed))}


def spectrogram(seed: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(1, 32, 16, generator=_seeded(seed))}


def wave(seed: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(1, 400, generator=_seeded(seed))}


def speech(seed: int) -> dict[str, Tensor]:
    return {**features(seed), "decoder_input_ids": _ids(seed + 1000, 8)}


def series(seed: int) -> dict[str, Tensor]:
    return {"past_values": torch.randn(1, 32, 1, generator=_seeded(seed))}


def _made(configuration: str, model: str, sizes: Mapping[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        found: nn.Module = getattr(transformers, model)(getattr(transformers, configuration)(**sizes))
        return found

    return make


HEADS = {
    "encoder": "Model",
    "seqcls": "ForSequenceClassification",
    "tokcls": "ForTokenClassification",
    "qa": "ForQuestionAnswering",
    "mlm": "ForMaskedLM",
}


def _family(
    name: str,
    prefix: str,
    heads: str,
    example: Callable[[int], dict[str, Tensor]] = text,
    refused: str = "",
    configuration: str = "",
    **settings: Any,
) -> list[Tiny]:
    """Return a model with each of these heads."""
    found = {**SIZES, **settings}
    chosen = configuration or f"{prefix}Config"
    return [
        Tiny(
            f"{name} {head}",
            "encoder",
            _made(chosen, prefix + HEADS[head], {**found, "num_labels": 2 if head == "qa" else LABELS}),
            example,
            refused,
        )
        for head in heads.split()
    ]


def _one(
    name: str,
    kind: str,
    configuration: str,
    model: str,
    example: Callable[[int], dict[str, Tensor]] = text,
    sizes: Mapping[str, Any] = GROUPED,
    refused: str = "",
    **settings: Any,
) -> Tiny:
    return Tiny(name, kind, _made(f"{configuration}Config", model, {**sizes, **settings}), example, refused)


def _encoder_of(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return a maker of the encoder alone."""

    def encoder() -> nn.Module:
        found = make().get_submodule("encoder")
        return found

    return encoder


ALL = "encoder seqcls tokcls qa mlm"
RELATIVE: Mapping[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_biased_input": False,
}
GATED = "has no private protocol"
VISION = {**SIZES, "image_size": 32, "patch_size": 8, "num_channels": 3}
STAGED = {"image_size": 32, "num_channels": 3, "num_labels": LABELS}
BART = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
SPEECH = {
    **SIZES, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
WHISPER = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_mel_bins": 16,
    "max_source_positions": 16, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
XLNET = {"vocab_size": VOCABULARY, "d_model": WIDTH, "n_layer": 2, "n_head": 4, "d_inner": 128}
GEMMA = {**GROUPED, "head_dim": 16}
MIXTURE = {**GROUPED, "num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}

CATALOGUE: Sequence[Tiny] = (
    *_family("BERT", "Bert", ALL),
    *_family("RoBERTa", "Roberta", ALL),
    *_family("XLM-R", "XLMRoberta", ALL),
    *_family("CamemBERT", "Camembert", ALL),
    *_family("DistilBERT", "DistilBert", ALL, hidden_dim=128),
    *_family("MPNet", "MPNet", ALL),
    *_family("ALBERT", "Albert", ALL, embedding_size=32),
    *_family("ELECTRA", "Electra", ALL, embedding_size=32),
    *_family("DeBERTa", "Deberta", ALL, **RELATIVE),
    *_family(
        "DeBERTa-v2/v3", "DebertaV2", ALL, **RELATIVE, position_buckets=8, share_att_key=True, norm_rel_ebd="layer_norm"
    ),
    *_family("ModernBERT", "ModernBert", ALL, local_attention=8, pad_token_id=1),
    *_family("NomicBERT", "NomicBert", "encoder seqcls mlm"),
    *_family("ERNIE", "Ernie", ALL),
    *_family("EuroBERT", "EuroBert", "encoder seqcls tokcls mlm", pad_token_id=1),
    *_family("MobileBERT", "MobileBert", "encoder seqcls", embedding_size=32, intra_bottleneck_size=32),
    *_family("SqueezeBERT", "SqueezeBert", "encoder seqcls", embedding_size=WIDTH),
    *_family("LayoutLM", "LayoutLM", "encoder tokcls", boxed),
    *_family("Longformer", "Longformer", "encoder seqcls mlm", refused="cannot be traced", attention_window=[4, 4]),
    *_family("BigBird", "BigBird", "encoder seqcls", attention_type="original_full"),
    Tiny("XLNet encoder", "encoder", _made("XLNetConfig", "XLNetModel", XLNET), text),
    *_family("ESM-2 (protein)", "Esm", "encoder mlm", position_embedding_type="rotary", pad_token_id=1),
    *_family(
        "Nystromformer", "Nystromformer", "encoder", unmasked, refused="cannot be traced", num_landmarks=4,
        segment_means_seq_len=LENGTH,
    ),
    *_family("FNet", "FNet", "encoder", unmasked, refused="complex values"),
    _one("GPT-2", "decoder", "GPT2", "GPT2LMHeadModel", sizes=SIZES),
    _one("GPT-2 seqcls", "decoder", "GPT2", "GPT2ForSequenceClassification", sizes=SIZES, pad_token_id=1),
    _one("GPT-Neo", "decoder", "GPTNeo", "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]]),
    _one("GPT-NeoX / Pythia", "decoder", "GPTNeoX", "GPTNeoXForCausalLM"),
    _one("GPT-J", "decoder", "GPTJ", "GPTJForCausalLM", sizes=SIZES, rotary_dim=8),
    _one("OPT", "decoder", "OPT", "OPTForCausalLM", sizes=SIZES, ffn_dim=128, word_embed_proj_dim=WIDTH),
    _one("LLaMA", "decoder", "Llama", "LlamaForCausalLM"),
    _one("LLaMA seqcls", "decoder", "Llama", "LlamaForSequenceClassification", pad_token_id=1),
    _one("Mistral", "decoder", "Mistral", "MistralForCausalLM"),
    _one("Qwen2", "decoder", "Qwen2", "Qwen2ForCausalLM"),
    _one("Qwen3", "decoder", "Qwen3", "Qwen3ForCausalLM", head_dim=16),
    _one("Gemma", "decoder", "Gemma", "GemmaForCausalLM", sizes=GEMMA),
    _one("Gemma 2", "decoder", "Gemma2", "Gemma2ForCausalLM", sizes=GEMMA, sliding_window=8),
    _one("Gemma 3", "decoder", "Gemma3Text", "Gemma3ForCausalLM", sizes=GEMMA, sliding_window=8),
    _one(
        "EmbeddingGemma (Gemma 3 text)", "decoder", "Gemma3Text", "Gemma3TextModel", sizes=GEMMA, sliding_window=8,
        use_bidirectional_attention=True,
    ),
    _one("Qwen3-Embedding", "decoder", "Qwen3", "Qwen3Model", head_dim=16),
    _one("Phi (1/2)", "decoder", "Phi", "PhiForCausalLM"),
    _one("Phi-3", "decoder", "Phi3", "Phi3ForCausalLM", pad_token_id=1),
    _one("SmolLM3", "decoder", "SmolLM3", "SmolLM3ForCausalLM", pad_token_id=1),
    _one("StableLM", "decoder", "StableLm", "StableLmForCausalLM"),
    _one("Falcon", "decoder", "Falcon", "FalconForCausalLM", new_decoder_architecture=True, num_kv_heads=2),
    _one("Falcon 7B style (multi query)", "decoder", "Falcon", "FalconForCausalLM", multi_query=True),
    _one("Bloom", "decoder", "Bloom", "BloomForCausalLM", sizes=SIZES),
    _one(
        "MPT", "decoder", "Mpt", "MptForCausalLM", sizes={}, vocab_size=VOCABULARY, d_model=WIDTH, n_heads=4,
        n_layers=2, expansion_ratio=2, max_seq_len=64,
    ),
    _one("OLMo 2", "decoder", "Olmo2", "Olmo2ForCausalLM", pad_token_id=1),
    _one("Granite", "decoder", "Granite", "GraniteForCausalLM"),
    _one("Starcoder2", "decoder", "Starcoder2", "Starcoder2ForCausalLM"),
    _one("Cohere (Command R)", "decoder", "Cohere", "CohereForCausalLM", pad_token_id=1),
    _one("GLM-4", "decoder", "Glm4", "Glm4ForCausalLM", head_dim=16, pad_token_id=1),
    _one("Mixtral (MoE)", "decoder", "Mixtral", "MixtralForCausalLM", sizes=MIXTURE, refused=GATED),
    _one("Qwen3-MoE", "decoder", "Qwen3Moe", "Qwen3MoeForCausalLM", sizes=MIXTURE, head_dim=16, refused=GATED),
    _one("gpt-oss (MoE, sinks)", "decoder", "GptOss", "GptOssForCausalLM", sizes=MIXTURE, head_dim=16, refused=GATED),
    _one("Mamba", "decoder", "Mamba", "MambaForCausalLM", unmasked, SIZES, refused="aten.exp", state_size=4),
    _one("T5 encoder (ReLU)", "seq2seq", "T5", "T5EncoderModel", sizes=T5),
    _one("T5 encoder-decoder", "seq2seq", "T5", "T5Model", pair, T5),
    _one("Flan-T5 encoder (gated GeLU)", "seq2seq", "T5", "T5EncoderModel", sizes=T5, feed_forward_proj="gated-gelu"),
    _one("Flan-T5 encoder-decoder", "seq2seq", "T5", "T5Model", pair, T5, feed_forward_proj="gated-gelu"),
    _one("BART encoder-decoder", "seq2seq", "Bart", "BartModel", pair, BART),
    Tiny("BART encoder", "seq2seq", _encoder_of(_made("BartConfig", "BartModel", BART)), text),
    _one(
        "BART seqcls (zero-shot MNLI)", "seq2seq", "Bart", "BartForSequenceClassification", ended, BART,
        num_labels=LABELS, eos_token_id=VOCABULARY - 1, refused="aten.unique_consecutive",
    ),
    _one("Marian", "seq2seq", "Marian", "MarianModel", pair, BART, pad_token_id=1, decoder_start_token_id=1),
    _one("Pegasus", "seq2seq", "Pegasus", "PegasusModel", pair, BART),
    _one("ViT classification", "vision", "ViT", "ViTForImageClassification", image, VISION),
    _one("ViT encoder", "vision", "ViT", "ViTModel", image, VISION),
    _one("DeiT classification", "vision", "DeiT", "DeiTForImageClassification", image, VISION),
    _one(
        "Swin classification", "vision", "Swin", "SwinForImageClassification", image, STAGED, patch_size=4,
        embed_dim=32, depths=[2, 1], num_heads=[2, 4], window_size=4,
    ),
    _one(
        "Swin v2 classification", "vision", "Swinv2", "Swinv2ForImageClassification", image, STAGED, patch_size=4,
        embed_dim=32, depths=[2, 1], num_heads=[2, 4], window_size=4,
    ),
    _one("CLIP vision", "vision", "CLIPVision", "CLIPVisionModel", image, VISION),
    _one("CLIP text", "vision", "CLIPText", "CLIPTextModel", ended, SIZES, eos_token_id=VOCABULARY - 1),
    _one("CLIP text with projection", "vision", "CLIPText", "CLIPTextModelWithProjection", ended, SIZES, eos_token_id=2,
         projection_dim=32),
    _one("SigLIP vision", "vision", "SiglipVision", "SiglipVisionModel", image, VISION),
    _one("SigLIP text", "vision", "SiglipText", "SiglipTextModel", sizes=SIZES),
    _one("DINOv2", "vision", "Dinov2", "Dinov2Model", image, VISION),
    _one("DINOv3 ViT", "vision", "DINOv3ViT", "DINOv3ViTModel", image, VISION, num_register_tokens=2),
    _one(
        "BEiT classification", "vision", "Beit", "BeitForImageClassification", image, VISION,
        use_relative_position_bias=True,
    ),
    _one(
        "ConvNeXt classification", "vision", "ConvNext", "ConvNextForImageClassification", image, STAGED,
        hidden_sizes=[16, 32], depths=[1, 1], num_stages=2,
    ),
    _one(
        "ResNet classification", "vision", "ResNet", "ResNetForImageClassification", image, STAGED, embedding_size=16,
        hidden_sizes=[32, 64], depths=[1, 1], layer_type="basic",
    ),
    _one(
        "MobileViT classification", "vision", "MobileViT", "MobileViTForImageClassification", image, STAGED,
        hidden_sizes=[24, 32, 40], neck_hidden_sizes=[8, 16, 16, 24, 32, 40, 64], num_attention_heads=4,
    ),
    _one("ViT-MAE encoder", "vision", "ViTMAE", "ViTMAEModel", image, VISION, refused="draws random numbers"),
    Tiny("Whisper encoder", "audio", _encoder_of(_made("WhisperConfig", "WhisperModel", WHISPER)), features),
    _one("Whisper encoder-decoder", "audio", "Whisper", "WhisperModel", speech, WHISPER),
    _one("Wav2Vec2 CTC", "audio", "Wav2Vec2", "Wav2Vec2ForCTC", wave, SPEECH),
    _one("HuBERT", "audio", "Hubert", "HubertModel", wave, SPEECH),
    _one(
        "Audio Spectrogram Transformer", "audio", "AST", "ASTForAudioClassification", spectrogram, SIZES, patch_size=8,
        frequency_stride=8, time_stride=8, max_length=32, num_mel_bins=16,
    ),
    _one(
        "PatchTST (time series)", "other", "PatchTST", "PatchTSTModel", series, {}, context_length=32, patch_length=8,
        patch_stride=8, num_input_channels=1, d_model=WIDTH, num_hidden_layers=2, num_attention_heads=4, ffn_dim=128,
    ),
)  # fmt: skip
"""The models, in the order of the table."""
