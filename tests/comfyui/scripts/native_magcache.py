"""Samples with the pack's MagCache inside ComfyUI and tells what was computed and what came of it.

usage: native_magcache.py COMFYUI_DIR PACK JOB REPORT
JOB and REPORT are JSON files; see test_native_magcache.py. Runs in ComfyUI's Python.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import headless

comfyui, pack, job_path, report_path = sys.argv[1:]
headless.prepare(comfyui)

import comfy.controlnet  # noqa: E402
import comfy.model_detection  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.patcher_extension  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import server  # noqa: E402, F401
import torch  # noqa: E402
from comfy_extras import nodes_context_windows, nodes_slg  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import nodes  # noqa: E402

assert asyncio.run(nodes.load_custom_node(pack, module_parent="custom_nodes"))
NODES = nodes.NODE_CLASS_MAPPINGS
ours = NODES["LoraLoom_MagCache"].__module__.rpartition(".")[0]
native_cache = importlib.import_module(f"{ours}.native_cache")
native_model = importlib.import_module(f"{ours}.native_model")

torch.set_num_threads(1)
WIDGETS = {
    "preset": "custom",
    "steps": 20,
    "retention_ratio": 0.2,
    "threshold": 0.24,
    "k": 6,
    "ratios": "auto",
    "steps_to_compute": 0,
}
detect = comfy.model_detection.detect_unet_config


def detect_any_size(state: dict[str, Any], prefix: str, metadata: Any = None) -> Any:
    """ComfyUI assumes the size of Qwen-Image's heads and text; tiny ones are told here."""
    config = detect(state, prefix, metadata=metadata)
    if config and config["image_model"] == "qwen_image":
        config["num_attention_heads"] = state[f"{prefix}img_in.weight"].shape[0] // 128
        config["joint_attention_dim"] = state[f"{prefix}txt_norm.weight"].shape[0]
    return config


comfy.model_detection.detect_unet_config = detect_any_size


class Model:
    """One tiny model and how it is sampled."""

    def __init__(self, name: str, job: dict[str, Any]) -> None:
        self.name, self.job = name, job
        self.ratios = ",".join(map(str, job["ratios"]))
        self.patcher = comfy.sd.load_diffusion_model(
            job["model"], model_options={"dtype": torch.float32}
        )
        inputs = load_file(job["inputs"])
        self.noise = inputs["x"]
        extra = {"pooled_output": inputs["y"]} if "y" in inputs else {}
        if "guidance" in inputs:
            extra["guidance"] = float(inputs["guidance"])
        if "vace_frames" in inputs:
            extra["vace_frames"] = [inputs["vace_frames"]]
            extra["vace_mask"] = [inputs["vace_mask"]]
            extra["vace_strength"] = [0.8]
        self.positive = [[inputs["c_crossattn"], extra]]
        self.negative = [[inputs["c_crossattn"].flip(1) * 0.5, dict(extra)]]

    @property
    def module(self) -> Any:
        return self.patcher.model.diffusion_model

    def with_magcache(self, patcher: Any = None, **changes: Any) -> Any:
        values = WIDGETS | {"ratios": self.ratios} | changes
        return NODES["LoraLoom_MagCache"].execute(model=patcher or self.patcher, **values).result[0]

    def sample(
        self,
        patcher: Any,
        *,
        cfg: float = 3.0,
        sampler: str = "euler",
        steps: int = 20,
        latent: torch.Tensor | None = None,
        **more: Any,
    ) -> torch.Tensor:
        positive = more.pop("positive", self.positive)
        callback = more.pop("callback", None)
        start = torch.zeros_like(self.noise) if latent is None else latent
        return comfy.sample.sample(
            patcher,
            more.pop("noise", self.noise),
            steps,
            cfg,
            sampler,
            "simple",
            positive,
            self.negative,
            start,
            callback=callback,
            disable_pbar=True,
            seed=7,
            **more,
        )

    def counted(self, patcher: Any, **how: Any) -> dict[str, Any]:
        """What a run gives, the noise levels of the model's calls, and how often blocks ran."""
        calls: list[float] = []

        def tell(executor: Any, *args: Any, **kwargs: Any) -> Any:
            options = next(each for each in args if isinstance(each, dict) and "sigmas" in each)
            calls.append(float(options["sigmas"][0]))
            return executor(*args, **kwargs)

        observed = patcher.clone()
        kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
        observed.add_wrapper_with_key(kind, "test", tell)
        counts: dict[str, int] = {}

        def count(name: str) -> Any:
            counts[name] = 0

            def hook(*_: Any) -> None:
                counts[name] += 1

            return hook

        blocks = dict(blocks_of(self.module))
        hooks = [each.register_forward_hook(count(name)) for name, each in blocks.items()]
        try:
            latent = self.sample(observed, **how)
        finally:
            for hook in hooks:
                hook.remove()
        return {"latent": latent, "calls": calls, "counts": counts}


def blocks_of(module: Any) -> Iterator[tuple[str, Any]]:
    for name in ("double_blocks", "single_blocks", "transformer_blocks", "blocks"):
        for index, block in enumerate(module._modules.get(name, ())):
            yield f"{name}.{index}", block


def facts(run: dict[str, Any], full: torch.Tensor | None = None) -> dict[str, Any]:
    """A run for JSON, compared with sampling in full."""
    found = {"calls": run["calls"], "counts": run["counts"]}
    found["finite"] = bool(run["latent"].isfinite().all())
    if full is not None:
        found["distance"] = float((run["latent"] - full).norm() / full.norm())
    return found


@contextmanager
def skipping_by_hooks(module: Any, computed: list[bool]) -> Iterator[None]:
    """The same method in another way: what enters the layer after the blocks is replaced.

    One call of the model is one step here. All blocks run in every step.
    """
    blocks = list(blocks_of(module))
    after = next(
        module._modules[name]
        for name in ("final_layer", "norm_out", "head")
        if name in module._modules
    )
    state: dict[str, Any] = {"step": 0}

    def before_blocks(_: Any, args: Any, kwargs: Any) -> None:
        names = [name for name in ("img", "hidden_states") if name in kwargs]
        state["entered"] = (kwargs[names[0]] if names else args[0]).clone()

    def before_last(_: Any, args: Any) -> Any:
        if computed[state["step"]]:
            state["residual"] = args[0] - state["entered"]
            replaced = args[0]
        else:
            replaced = state["entered"] + state["residual"]
        state["step"] += 1
        return (replaced, *args[1:])

    hooks = [
        blocks[0][1].register_forward_pre_hook(before_blocks, with_kwargs=True),
        after.register_forward_pre_hook(before_last),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def exactness(model: Model) -> dict[str, Any]:
    """Runs that skip nothing, and runs that skip, against the same method by hooks."""
    report: dict[str, Any] = {}
    for cfg in (1.0, 3.0):
        full = model.sample(model.patcher, cfg=cfg)
        runs = native_cache.CalibratedRuns()
        known = native_model.native_model(model.patcher)
        calibrating = native_cache.with_calibration(model.patcher, known, runs)
        skipping = model.with_magcache()
        run = model.counted(skipping, cfg=cfg)
        with skipping_by_hooks(model.module, model.job["computed"]):
            wanted = model.sample(model.patcher, cfg=cfg)
        report[str(cfg)] = {
            "never": torch.equal(full, model.sample(model.with_magcache(k=0), cfg=cfg)),
            "off": torch.equal(full, model.sample(model.with_magcache(preset="off"), cfg=cfg)),
            "calibrating": torch.equal(full, model.sample(calibrating, cfg=cfg)),
            "branches": sorted(runs.waiting[0].branches),
            "skipping": facts(run, full),
            "wanted": torch.equal(run["latent"], wanted),
            "again": torch.equal(run["latent"], model.sample(skipping, cfg=cfg)),
            "unpatched after": torch.equal(full, model.sample(model.patcher, cfg=cfg)),
        }
    report["hindrance"] = native_model.native_model(model.patcher).hindrance
    report["side cost"] = native_model.native_model(model.patcher).side_cost
    report["shape"] = list(full.shape)
    return report


def samplers(model: Model) -> dict[str, Any]:
    report: dict[str, Any] = {}
    for name in model.job["samplers"]:
        full = model.sample(model.patcher, sampler=name)
        run = model.counted(model.with_magcache(), sampler=name)
        again = model.sample(model.with_magcache(), sampler=name)
        report[name] = facts(run, full) | {"again": torch.equal(run["latent"], again)}
        sigmas = comfy.samplers.KSampler(
            model.patcher, steps=20, device="cpu", sampler=name, scheduler="simple"
        ).sigmas
        report[name]["sigmas"] = sigmas.tolist()
    return report


def parts(model: Model) -> dict[str, Any]:
    """The halves of a run with KSamplerAdvanced's settings, and the end of one with denoise."""
    patcher = model.with_magcache()
    first = model.counted(patcher, start_step=0, last_step=9)
    second = model.counted(
        patcher, start_step=9, last_step=20, latent=first["latent"], disable_noise=True,
        noise=torch.zeros_like(model.noise),
    )  # fmt: skip
    image = model.sample(model.patcher)
    changed = model.counted(patcher, steps=10, denoise=0.5, latent=image)
    exact = model.sample(model.patcher, start_step=0, last_step=9)
    return {
        "first": facts(first, exact),
        "second": facts(second),
        "denoised": facts(
            changed, model.sample(model.patcher, steps=10, denoise=0.5, latent=image)
        ),
    }


def parts_found(model: Model) -> list[list[Any]]:
    """Which part of a run is read from its noise levels: wanted and found."""
    sampling = model.patcher.get_model_object("model_sampling")
    euler = comfy.samplers.sampler_object("euler")
    found: list[list[Any]] = []
    for scheduler in comfy.samplers.SCHEDULER_NAMES:
        for steps, first, end in ((20, 0, 20), (20, 0, 9), (20, 9, 20), (40, 15, 40), (25, 5, 13)):
            grid = comfy.samplers.calculate_sigmas(sampling, scheduler, steps)
            total = len(grid) - 1
            known = native_model.run_facts(sampling, euler, grid[first : end + 1])
            part = known.part
            found.append(
                [
                    scheduler,
                    [first, end, total],
                    [part.first, part.end, part.steps],
                    known.scheduler,
                ]
            )
    return found


def together(model: Model) -> dict[str, Any]:
    """With what else changes a model or its calls."""
    report: dict[str, Any] = {}

    def compare(name: str, patcher: Any, **how: Any) -> None:
        full = model.sample(patcher, **how)
        run = model.counted(model.with_magcache(patcher), **how)
        never = model.sample(model.with_magcache(patcher, k=0), **how)
        report[name] = facts(run, full) | {
            "never": torch.equal(full, never),
            "effect": float((full - plain).norm() / plain.norm())
            if full.shape == plain.shape
            else 1,
        }

    plain = model.sample(model.patcher)
    layer = {"model": model.patcher, "double_layers": "0", "single_layers": "", "scale": 2.0}
    window = {"start_percent": 0.0, "end_percent": 1.0}
    skipping = nodes_slg.SkipLayerGuidanceDiT.execute(**layer, **window).result[0]
    compare("skip layer guidance", skipping)
    del layer["scale"]
    early = {"start_percent": 0.0, "end_percent": 0.5}
    simple = nodes_slg.SkipLayerGuidanceDiTSimple.execute(**layer, **early).result[0]
    compare("skip layer guidance of a part", simple)
    replaced = model.patcher.clone()

    def half(arguments: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        before = arguments["img"].clone()
        result = extra["original_block"](arguments)
        return {**result, "img": (result["img"] + before) / 2}

    replaced.set_model_patch_replace(half, "dit", "double_block", 1)
    compare("replaced block", replaced)
    lora = load_file(model.job["lora"])
    compare("lora", comfy.sd.load_lora_for_models(model.patcher, None, lora, 0.7, 0.0)[0])
    late = nodes.ConditioningSetTimestepRange().set_range(model.negative, 0.55, 1.0)[0]
    compare("late prompt", model.patcher, positive=[*model.positive, *late])
    if model.name == "FLUX.1 Kontext":
        reference = {"reference_latents": [model.noise.flip(-1)]}
        edited = [[text, {**extra, **reference}] for text, extra in model.positive]
        compare("picture to edit", model.patcher, positive=edited)
    with without_batches():
        compare("one by one", model.patcher)
    compare("two pictures", model.patcher, noise=torch.cat([model.noise, -model.noise]),
            latent=torch.zeros_like(torch.cat([model.noise] * 2)))  # fmt: skip
    twice = model.with_magcache(model.with_magcache(k=0))
    report["twice"] = {
        "wrappers": [
            len(twice.get_wrappers(kind, native_cache.KEY))
            for kind in ("outer_sample", "diffusion_model")
        ],
        "same": torch.equal(model.sample(twice), model.sample(model.with_magcache())),
    }
    return report


@contextmanager
def without_batches() -> Iterator[None]:
    """Conditionings go through the model one after the other, as where memory is short."""
    free = comfy.model_patcher.ModelPatcher.get_free_memory
    comfy.model_patcher.ModelPatcher.get_free_memory = lambda self, device: 0
    try:
        yield
    finally:
        comfy.model_patcher.ModelPatcher.get_free_memory = free


def additions(model: Model) -> dict[str, Any]:
    """What a ControlNet and a patch of block outputs add is neither lost nor added twice."""
    report: dict[str, Any] = {}
    if model.name in ("FLUX.1 Kontext", "HunyuanVideo", "Qwen-Image"):
        report["control"] = added(model, model.patcher, Control(model).conditions())
    if model.name in ("Qwen-Image", "Wan 2.1 t2v"):
        patched = model.patcher.clone()

        def add(arguments: dict[str, Any]) -> dict[str, Any]:
            return {**arguments, "img": arguments["img"] + 0.3 * slope(arguments["img"].shape[-1])}

        patched.set_model_double_block_patch(add)
        report["patch"] = added(model, patched, model.positive)
    return report


def added(model: Model, patcher: Any, positive: Any) -> dict[str, Any]:
    full = model.sample(patcher, positive=positive, cfg=1.0)
    run = model.counted(model.with_magcache(patcher), positive=positive, cfg=1.0)
    with skipping_by_hooks(model.module, model.job["computed"]):
        wanted = model.sample(patcher, positive=positive, cfg=1.0)
    return facts(run, full) | {
        "wanted": float((run["latent"] - wanted).abs().max() / wanted.abs().max()),
        "effect": float((full - model.sample(model.patcher, cfg=1.0)).norm() / full.norm()),
        "never": torch.equal(
            full, model.sample(model.with_magcache(patcher, k=0), positive=positive, cfg=1.0)
        ),
    }


def slope(width: int) -> torch.Tensor:
    """What a normalization does not remove."""
    return torch.linspace(-1, 1, width)


class Control(comfy.controlnet.ControlBase):
    """A ControlNet that adds constants after every block."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def conditions(self) -> Any:
        return [[text, {**extra, "control": self}] for text, extra in self.model.positive]

    def get_control(self, x: Any, t: Any, cond: Any, number: int, options: Any) -> dict[str, Any]:
        tokens, width = self.model.job["tokens"]
        add = 0.3 * slope(width).expand(x.shape[0], tokens, width)
        names = [name for name, _ in blocks_of(self.model.module)]
        single = sum(name.startswith("single") for name in names)
        return {
            "input": [add.clone() for _ in range(len(names) - single)],
            "output": [add.clone() * 0.5 for _ in range(single)],
        }


class Stop(BaseException):
    """What a Cancel raises."""


def interrupted(model: Model) -> dict[str, Any]:
    def stop(step: int, *_: Any) -> None:
        held.append(sum(len(each.residuals) for each in runs()))
        if step == 8:
            raise Stop

    def runs() -> list[Any]:
        return [each for each in gc.get_objects() if type(each).__name__ == "_Run"]

    held: list[int] = []
    patcher = model.with_magcache()
    options = patcher.model_options
    before = json.dumps(options, default=str)
    try:
        model.sample(patcher, callback=stop)
    except Stop:
        held.append(sum(len(each.residuals) for each in runs()))
    wanted = model.sample(model.with_magcache())
    return {
        "held": held,
        "options": json.dumps(options, default=str) == before,
        "then": torch.equal(model.sample(patcher), wanted),
        "module": [name for name in vars(model.module) if "magcache" in name or "loom" in name],
    }


def windows(model: Model) -> dict[str, Any]:
    """A long video in windows of frames that overlap."""
    patcher = nodes_context_windows.WanContextWindowsManualNode.execute(
        model.patcher, 13, 4, "standard_static", 1, False, "pyramid", False
    ).result[0]  # fmt: skip
    noise = torch.randn(1, 16, 10, 8, 8, generator=torch.Generator().manual_seed(3))
    how = {"noise": noise, "latent": torch.zeros_like(noise)}
    full = model.sample(patcher, **how)
    run = model.counted(model.with_magcache(patcher), **how)
    never = model.sample(model.with_magcache(patcher, k=0), **how)
    return facts(run, full) | {"never": torch.equal(full, never)}


def stored(model: Model) -> dict[str, Any]:
    """Calibrate, save, find; of whole runs and of a part of one."""
    report: dict[str, Any] = {}
    latent = {"samples": model.noise}

    def calibrated(**how: Any) -> Any:
        patcher, runs = NODES["LoraLoom_MagCacheCalibrate"].execute(model=model.patcher).result
        model.sample(patcher, **how)
        return runs

    def save(runs: Any, before: str = "average") -> Any:
        return NODES["LoraLoom_SaveMagCacheRatios"].execute(runs, latent, before).result

    try:
        model.with_magcache(ratios="auto")
    except Exception as error:  # noqa: BLE001 (an error of the engine, under a name of ComfyUI's)
        report["before"] = str(error)
    runs = calibrated()
    ratios, text, picture = save(runs)
    report["saved"] = {"ratios": ratios, "text": text, "picture": list(picture.shape)}
    report["saved again"] = save(runs)[1]
    report["other seed"] = save(calibrated(noise=-model.noise))[1]
    report["replaced"] = save(calibrated(), "replace")[1]
    found = NODES["LoraLoom_MagCache"].execute(model=model.patcher, **WIDGETS).result
    report["found"] = {"plan": found[1], "picture": list(found[2].shape)}
    report["run"] = facts(model.counted(found[0]), model.sample(model.patcher))
    report["longer"] = facts(model.counted(found[0], steps=31))
    save(calibrated(start_step=0, last_step=9))
    report["part"] = facts(
        model.counted(model.with_magcache(ratios="auto"), start_step=0, last_step=9)
    )
    folder = Path(folder_paths.get_user_directory(), "lora_loom", "magcache")
    report["files"] = {each.name: json.loads(each.read_text()) for each in folder.glob("*.json")}
    late = nodes.ConditioningSetTimestepRange().set_range(model.positive, 0.5, 1.0)[0]
    try:
        save(calibrated(positive=late, cfg=1.0))
    except Exception as error:  # noqa: BLE001
        report["incomplete"] = str(error)
    try:
        save(native_cache.CalibratedRuns())
    except Exception as error:  # noqa: BLE001
        report["nothing"] = str(error)
    return report


report: dict[str, Any] = {}
job = json.loads(Path(job_path).read_text())
folder_paths.set_user_directory(job["user"])
with torch.inference_mode():
    for name, each in job["models"].items():
        model = Model(name, each)
        report[name] = {"exact": exactness(model)}
        if name in job["closely"]:
            report[name] |= {
                "samplers": samplers(model),
                "parts": parts(model),
                "parts found": parts_found(model),
                "together": together(model),
                "interrupted": interrupted(model),
                "stored": stored(model),
            }
        if name == "Wan 2.1 t2v":
            report[name]["windows"] = windows(model)
        report[name]["additions"] = additions(model)
Path(report_path).write_text(json.dumps(report))
