"""Fixtures: tiny teachers on disk, made here, so that the real loading code runs without a hub."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, which would spin for each other

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    UNet2DModel,
)
from diffusers.utils import logging
from elsewhere import Elsewhere
from families import build

from stepdistill import outcome, prompts
from stepdistill.teacher import Teacher

logging.disable_progress_bar()
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported stays: half a second less for every collection of garbage, of which runs make many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def small_pictures():
    """The picture at the end of a run takes as long as a short run itself: four samples, in two steps of a teacher."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "picture_steps", 2)
        patch.setattr(outcome, "_SHOWN", 4)
        yield


def tiny_unet(*, seed: int = 0, **options) -> UNet2DModel:
    """An 8x8 grey UNet of about 13 thousand parameters whose output is not tiny."""
    torch.manual_seed(seed)
    settings = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 4,
    }
    return UNet2DModel(**{**settings, **options}).eval()


def make_teacher(folder: Path, kind: str = "ddpm") -> Path:
    """Save a tiny pipeline: ddpm, ddim, v, x0, consistency (class-conditional), flow, edm or cm."""
    ddim: Any = DDIMScheduler(clip_sample=False)
    flow: Any = FlowMatchEulerDiscreteScheduler()
    edm: Any = EDMEulerScheduler()
    pipelines = {
        "ddpm": lambda: DDPMPipeline(tiny_unet(), DDPMScheduler(clip_sample=False)),
        "ddim": lambda: DDIMPipeline(tiny_unet(), ddim),
        "v": lambda: DDPMPipeline(tiny_unet(), DDPMScheduler(prediction_type="v_prediction", clip_sample=False)),
        "x0": lambda: DDPMPipeline(tiny_unet(), DDPMScheduler(prediction_type="sample", clip_sample=False)),
        "consistency": lambda: ConsistencyModelPipeline(tiny_unet(num_class_embeds=4), ddim),
        "flow": lambda: DDPMPipeline(tiny_unet(), flow),
        "edm": lambda: ConsistencyModelPipeline(tiny_unet(), edm),
        "cm": lambda: ConsistencyModelPipeline(tiny_unet(), CMStochasticIterativeScheduler()),
    }
    pipelines[kind]().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory):
    """``teachers(kind)`` is the folder of a tiny teacher of that kind, made once."""
    root, made = tmp_path_factory.mktemp("teachers"), {}

    def get(kind: str = "ddpm") -> Path:
        if kind not in made:
            made[kind] = make_teacher(root / kind, kind)
        return made[kind]

    return get


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory):
    """``folders(name)`` is the folder of the tiny pipeline of that family, made once."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = build(name, tmp_path_factory.mktemp("families") / name)
        return made[name]

    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory):
    """Encoded prompts go to a folder of their own."""
    kept, prompts.CACHE = prompts.CACHE, tmp_path_factory.mktemp("prompts")
    yield prompts.CACHE
    prompts.CACHE = kept


@pytest.fixture(scope="session")
def elsewhere():
    """``elsewhere(code)`` runs where stepdistill cannot be imported, in one process for all tests."""
    process = Elsewhere()
    yield process
    process.close()
