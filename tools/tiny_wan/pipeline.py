"""The folder `wan/`: a complete pipeline that stock `WanPipeline.from_pretrained` reads.

model_index.json  scheduler/  text_encoder/  tokenizer/  transformer/  vae/
"""

import json
from pathlib import Path

import diffusers
from diffusers import ModelMixin, UniPCMultistepScheduler
from folders import replacing_folder
from text import MOVING_DIGITS, Language, build_text_encoder, build_tokenizer, save_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, UMT5EncoderModel

FLOW_SHIFT = 3.0
_INDEX = {
    "_class_name": "WanPipeline",
    "_diffusers_version": diffusers.__version__,
    "boundary_ratio": None,
    "expand_timesteps": False,
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    # Not what transformers 5 would write: its `TokenizersBackend` is unknown to transformers 4, and
    # 5 reads the old name too.
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "transformer_2": [None, None],
    "vae": ["diffusers", "AutoencoderKLWan"],
}


def save_model(model: ModelMixin, folder: Path) -> None:
    """Save a diffusers model as float32 safetensors."""
    with replacing_folder(folder) as staging:
        model.save_pretrained(staging)
        _readable_by_all(staging)


def save_text_side(wan: Path, seed: int, language: Language = MOVING_DIGITS) -> None:
    """Text encoder, tokenizer, scheduler and the index: everything that is not trained."""
    with replacing_folder(wan / "text_encoder") as staging:
        build_text_encoder(seed, language).save_pretrained(staging)
        _readable_by_all(staging)
    with replacing_folder(wan / "tokenizer") as staging:
        save_tokenizer(build_tokenizer(language), staging)
    # Wan 2.1's own choice of scheduler; flow_shift is what its 480p models ship with.
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW_SHIFT,
        num_train_timesteps=1000,
    )
    with replacing_folder(wan / "scheduler") as staging:
        scheduler.save_pretrained(staging)
    (wan / "model_index.json").write_text(json.dumps(_INDEX, indent=2) + "\n")


def load_text_side(wan: Path) -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel]:
    """Load what `save_text_side` wrote."""
    tokenizer = AutoTokenizer.from_pretrained(wan / "tokenizer")
    return tokenizer, UMT5EncoderModel.from_pretrained(wan / "text_encoder").eval()


def _readable_by_all(folder: Path) -> None:
    """safetensors creates its files for the owner alone, which git would carry into nobody else's
    clone but tar would.
    """
    for path in folder.glob("*.safetensors"):
        path.chmod(0o644)
