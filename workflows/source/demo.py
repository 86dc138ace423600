"""The demo: trains a LoRA on the embedded tiny model and draws before and after."""

from __future__ import annotations

from . import notes
from .graph import Builder, Handle, Link
from .layout import DRAW, LOOK, PREPARE, TRAIN, Area, Note, Sized

_SIDE = 64
_CAPTION = "a large red loomling in the center on a cream background"


def build(flow: Builder) -> list[list[Area]]:
    """Add the nodes; gives the rows of areas on the canvas."""
    texts = notes.load("demo")
    demo = flow.add("LoraLoom_DemoModel")
    settings = flow.add("LoraLoom_LoraSettings", network_alpha=16.0)
    scheduler = flow.add("LoraLoom_LrScheduler", lr_warmup_steps=20.0, max_train_steps=400)
    train = flow.add(
        "LoraLoom_TrainLora",
        model=demo["training model"],
        dataset=demo["dataset"],
        output_name="loomling",
        max_train_steps=400,
        learning_rate=1e-3,
        network_dim=16,
        preview_images=4,
        lora=settings,
        lr_scheduler=scheduler["lr scheduler"],
        vae=demo["vae"],
    )
    curve = flow.add("PreviewImage", "Loss curve", images=train["loss curve"])
    previews = flow.add("PreviewImage", "Previews", images=train["previews"])
    return [
        [
            Area("1  Start here", PREPARE, [[texts["Start here"]], [demo]]),
            Area(
                "2  Train",
                TRAIN,
                [[texts["What the numbers mean"]], [settings, scheduler], [Sized(train, 340, 300)]],
            ),
            Area(
                "3  Look",
                LOOK,
                [[texts["Is it good?"], Sized(previews, 380, 300)], [Sized(curve, 560, 420)]],
            ),
        ],
        [_drawing(flow, demo, train["lora"], texts["Before and after"])],
    ]


def _drawing(flow: Builder, demo: Handle, lora: Link, note: Note) -> Area:
    sampling = flow.add("ModelSamplingFlux", model=demo["model"], width=_SIDE, height=_SIDE)
    tuned = flow.add("LoraModelLoader", model=sampling, lora=lora)
    text = flow.add("LoraLoom_DemoTextEncode", text_encoder=demo["text encoder"], text=_CAPTION)
    guidance = flow.add("FluxGuidance", conditioning=text, guidance=2.5)
    nothing = flow.add("ConditioningZeroOut", conditioning=text)
    latent = flow.add("EmptySD3LatentImage", width=_SIDE, height=_SIDE)
    samplers: list[Handle] = []
    pictures: list[Handle] = []
    for name, model in (("before", sampling), ("after", tuned)):
        sampler = flow.add(
            "KSampler",
            f"KSampler ({name})",
            model=model,
            positive=guidance,
            negative=nothing,
            latent_image=latent,
            seed=7,
            steps=25,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
        )
        samplers.append(sampler)
        pictures.append(
            flow.add("VAEDecode", f"VAE Decode ({name})", samples=sampler, vae=demo["vae"])
        )
    both = flow.add("ImageStitch", image1=pictures[0], image2=pictures[1], spacing_width=2)
    large = flow.add("ImageScaleBy", "Enlarge", image=both, upscale_method="bicubic", scale_by=6.0)
    saved = flow.add(
        "SaveImage", "Before and after", images=large, filename_prefix="lora_loom/before_after"
    )
    columns = [
        [note],
        [sampling, tuned, latent],
        [Sized(text, 340), guidance, nothing],
        [samplers[0], pictures[0]],
        [samplers[1], pictures[1]],
        [both, large],
        [Sized(saved, 620, 400)],
    ]
    return Area("4  Draw before and after", DRAW, columns)
