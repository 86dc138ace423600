"""FLUX.1 Kontext: trains a LoRA on a folder of pictures and draws with it."""

from __future__ import annotations

from . import notes
from .graph import Builder, Handle, Link
from .layout import DRAW, LOOK, PREPARE, TRAIN, Area, Note, Sized

_DIT = "flux1-kontext-dev.safetensors"
_SIDE = 1024


def build(flow: Builder) -> list[list[Area]]:
    """Add the nodes; gives the rows of areas on the canvas."""
    texts = notes.load("flux_kontext")
    model = flow.add("LoraLoom_TrainingModel", dit=_DIT)
    clip = flow.add(
        "DualCLIPLoader",
        clip_name1="t5xxl_fp16.safetensors",
        clip_name2="clip_l.safetensors",
        type="flux",
    )
    vae = flow.add("VAELoader", vae_name="ae.safetensors")
    folder = flow.add("LoraLoom_DatasetFromFolder", folder="input/my_dataset", resolution=_SIDE)
    cached = flow.add("LoraLoom_CacheDataset", dataset=folder["dataset"], vae=vae, clip=clip)
    sheet = flow.add("PreviewImage", "Contact sheet", images=folder["contact sheet"])
    report = flow.add("PreviewAny", "Dataset report", source=folder["report"])
    train = flow.add(
        "LoraLoom_TrainLora",
        model=model,
        dataset=cached["dataset"],
        output_name="my_lora",
        max_train_steps=1500,
        learning_rate=1e-4,
        network_dim=16,
        save_every_n_steps=500,
        preview_images=4,
        vae=vae,
    )
    curve = flow.add("PreviewImage", "Loss curve", images=train["loss curve"])
    previews = flow.add("PreviewImage", "Previews", images=train["previews"])
    return [
        [
            Area(
                "1  Load",
                PREPARE,
                [[texts["Files you need"]], [Sized(model, 340), Sized(clip, 340), Sized(vae, 340)]],
            ),
            Area(
                "2  Pictures",
                PREPARE,
                [
                    [texts["Your pictures"], texts["To teach an edit"]],
                    [folder, cached],
                    [report, Sized(sheet, 420, 400)],
                ],
            ),
        ],
        [
            Area("3  Train", TRAIN, [[texts["Training"]], [Sized(train, 340, 300)]]),
            Area("4  Look", LOOK, [[Sized(curve, 480, 290), Sized(previews, 480, 290)]]),
            _drawing(flow, clip, vae, train["lora"], texts["Drawing"]),
        ],
    ]


def _drawing(flow: Builder, clip: Handle, vae: Handle, lora: Link, note: Note) -> Area:
    base = flow.add("UNETLoader", unet_name=_DIT)
    tuned = flow.add("LoraModelLoader", model=base, lora=lora)
    text = flow.add("CLIPTextEncode", clip=clip, text="a photo of a zorblax cat on a sofa")
    guidance = flow.add("FluxGuidance", conditioning=text, guidance=2.5)
    nothing = flow.add("ConditioningZeroOut", conditioning=text)
    latent = flow.add("EmptySD3LatentImage", width=_SIDE, height=_SIDE)
    sampler = flow.add(
        "KSampler",
        model=tuned,
        positive=guidance,
        negative=nothing,
        latent_image=latent,
        seed=7,
        steps=25,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
    )
    picture = flow.add("VAEDecode", samples=sampler, vae=vae)
    saved = flow.add("SaveImage", images=picture, filename_prefix="lora_loom/flux_kontext")
    columns = [
        [note, base, tuned],
        [Sized(text, 400), guidance, nothing, latent],
        [sampler, picture],
        [Sized(saved, 420, 420)],
    ]
    return Area("5  Draw", DRAW, columns)
