"""Supervised fine-tuning with LoRA: the paper's Qwen3-VL-8B run, or a tiny run that needs nothing but this repository.

python run.py --config=configs/sft.py:tiny
python run.py --config=configs/sft.py --config.model.path=DIR --config.data.path=FILE.json --config.data.root=DIR
"""

from configs.schema import Presets
from configs.tables.quickstart_recipe import SFT
from configs.tables.tiny import TINY_SFT
from configs.tables.training import SFT_KEYS

get_config = Presets(
    "configs/sft.py",
    SFT_KEYS,
    {
        "": (
            "the paper's settings (arXiv 2603.00515): Qwen3-VL-8B, LoRA rank 128 on q,k,v,o, batch 8, 30,000 steps",
            {},
        ),
        "release": (
            "the released training script's: batch 64 (8 on each of 8 GPUs), at most 8 frames, adapter dropout 0.05, "
            "one epoch of two million records",
            {"video.num_frames": 8, "lora.dropout": 0.05, "train.batch_size": 64, "train.steps": 31250},
        ),
        "qwen2_5_vl_7b": (
            "the paper's settings for its other base, Qwen2.5-VL-7B; the model is the folder model.path in this and "
            "the next variants: they name the size for plans",
            {"model.published": "qwen2_5_vl_7b"},
        ),
        "qwen3_vl_2b": ("for Qwen3-VL-2B", {"model.published": "2b"}),
        "qwen3_vl_4b": ("for Qwen3-VL-4B", {"model.published": "4b"}),
        "qwen3_vl_32b": (
            "for Qwen3-VL-32B, parameters sharded over 8 devices",
            {"model.published": "32b", "mesh.fsdp": 8},
        ),
        "qwen3_vl_30b_a3b": (
            "for Qwen3-VL-30B-A3B (mixture of experts), parameters sharded over 8 devices",
            {"model.published": "30b_a3b", "mesh.fsdp": 8},
        ),
        "quickstart": ("fine-tuning of configs/quickstart.py", SFT),
        "tiny": (
            "a random tiny model learns a self-made sample world, on a CPU",
            {**TINY_SFT, "data.sample": "tiny", "optim.warmup_ratio": 0.05, "train.batch_size": 4},
        ),
    },
)
