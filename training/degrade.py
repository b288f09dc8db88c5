"""Which damages a training picture gets, how strong, and in what order.

The damages are in `training.damages`; here are the ranges their parameters are drawn from, the
composites, and the 20 types of the FoundIR test set. Every random draw comes from the
`numpy.random.Generator` that the caller passes: same seed, same result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from training.damages import (
    gaussian_blur,
    gaussian_noise,
    haze,
    jpeg,
    low_light,
    motion_blur,
    poisson_noise,
    rain,
    raindrops,
    raw_noise,
    read_variance,
)

Value = float | int | str

KINDS = ("blur", "noise", "haze", "rain", "raindrop", "low_light", "jpeg")
ORDER = ("low_light", "rain", "raindrop", "haze", "blur", "noise", "jpeg")


@dataclass(frozen=True)
class Range:
    """How one parameter is drawn: `rest` in `rest_share` of the draws, else within [low, high]."""

    low: float
    high: float
    scale: str = "linear"
    rest: float = 0.0
    rest_share: float = 0.0

    def draw(self, rng: np.random.Generator) -> float | int:
        """One value; `scale` is linear, log (log-uniform) or int (both ends included)."""
        if self.rest_share and rng.random() < self.rest_share:
            return int(self.rest) if self.scale == "int" else self.rest
        if self.scale == "int":
            return int(rng.integers(int(self.low), int(self.high) + 1))
        if self.scale == "log":
            return float(math.exp(rng.uniform(math.log(self.low), math.log(self.high))))
        return float(rng.uniform(self.low, self.high))


@dataclass(frozen=True)
class Model:
    """One way to make a kind of damage: its function, share of the draws, parameter ranges."""

    function: Callable[..., np.ndarray]
    ranges: dict[str, Range]
    share: float = 1.0


ANGLE = Range(0.0, 180.0)
RATIO = Range(0.3, 1.0, rest=1.0, rest_share=0.5)
GRAY = Range(0, 0, "int", rest=1, rest_share=0.4)

# Sizes, lengths and radii in pixels, angles in degrees, the sigma of noise in [0, 1] units.
MODELS: dict[str, dict[str, Model]] = {
    "blur": {
        "gaussian": Model(
            gaussian_blur,
            {"sigma": Range(0.2, 3.0), "ratio": RATIO, "angle": ANGLE, "size": Range(7, 21, "int")},
            share=0.45,
        ),
        "strong": Model(
            gaussian_blur,
            {
                "sigma": Range(3.0, 12.0, "log"),
                "ratio": RATIO,
                "angle": ANGLE,
                "size": Range(31, 61, "int"),
            },
            share=0.1,
        ),
        "motion": Model(
            motion_blur,
            {
                "length": Range(7.0, 41.0),
                "angle": ANGLE,
                "wander": Range(0.1, 1.0, rest=0.0, rest_share=0.4),
            },
            share=0.45,
        ),
    },
    "noise": {
        "gaussian": Model(
            gaussian_noise, {"sigma": Range(1 / 255, 50 / 255), "gray": GRAY}, share=0.5
        ),
        "poisson": Model(poisson_noise, {"scale": Range(0.05, 3.0), "gray": GRAY}, share=0.2),
        "raw": Model(raw_noise, {"shot": Range(1e-4, 0.012, "log")}, share=0.3),
    },
    "haze": {"haze": Model(haze, {"beta": Range(0.6, 3.0), "airlight": Range(0.6, 0.95)})},
    "rain": {
        "rain": Model(
            rain,
            {
                "density": Range(0.002, 0.010),
                "length": Range(15.0, 55.0),
                "width": Range(1.0, 9.0, "log"),
                "angle": Range(-45.0, 45.0),
                "strength": Range(0.25, 0.8),
                "veil": Range(0.05, 0.35, rest=0.0, rest_share=0.6),
            },
        )
    },
    "raindrop": {
        "raindrop": Model(
            raindrops,
            {
                "density": Range(4.0, 30.0),
                "radius": Range(4.0, 16.0, "log"),
                "magnification": Range(2.0, 4.0),
            },
        )
    },
    # Less shot noise than `raw`: a darkened picture shows the same variance far more.
    "low_light": {
        "low_light": Model(
            low_light,
            {
                "alpha": Range(0.9, 1.0),
                "beta": Range(0.3, 1.0),
                "gamma": Range(1.5, 5.0, "log"),
                "shot": Range(1e-5, 1e-3, "log", rest=0.0, rest_share=0.3),
            },
        )
    },
    "jpeg": {"jpeg": Model(jpeg, {"quality": Range(30, 95, "int")})},
}

FOUNDIR_TYPES: dict[str, tuple[str, ...]] = {
    "01Blur": ("blur",),
    "02Blur_Noise": ("blur", "noise"),
    "03Blur_JPEG": ("blur", "jpeg"),
    "04Blur_Noise_JPEG": ("blur", "noise", "jpeg"),
    "05Noise": ("noise",),
    "06JPEG": ("jpeg",),
    "07Noise_JPEG": ("noise", "jpeg"),
    "08Haze": ("haze",),
    "09Lowlight_Haze": ("low_light", "haze"),
    "10Rain": ("rain",),
    "11Raindrop": ("raindrop",),
    "12NightRain": ("low_light", "rain"),
    "13Rain_Haze": ("rain", "haze"),
    "14Lowlight": ("low_light",),
    "15Lowlight_Blur": ("low_light", "blur"),
    "16Lowlight_Noise": ("low_light", "noise"),
    "17Lowlight_JPEG": ("low_light", "jpeg"),
    "18Lowlight_Blur_Noise": ("low_light", "blur", "noise"),
    "19Lowlight_Blur_JPEG": ("low_light", "blur", "jpeg"),
    "20Lowlight_Noise_JPEG": ("low_light", "noise", "jpeg"),
}

SINGLE_WEIGHTS = {
    "noise": 1.0,
    "haze": 2.0,
    "rain": 1.5,
    "low_light": 1.0,
    "blur": 1.0,
    "raindrop": 0.4,
    "jpeg": 0.4,
}


@dataclass(frozen=True)
class Label:
    """What was done to a picture: kinds in the order applied, and each kind's parameters."""

    kinds: tuple[str, ...]
    parameters: dict[str, dict[str, Value]]

    def as_dict(self) -> dict[str, object]:
        """The same as plain lists and dictionaries, ready for JSON."""
        parameters = {kind: dict(values) for kind, values in self.parameters.items()}
        return {"kinds": list(self.kinds), "parameters": parameters}


def in_order(kinds: Iterable[str]) -> tuple[str, ...]:
    """`kinds` without repeats, in the order they are applied; ValueError for an unknown one."""
    wanted = set(kinds)
    if unknown := sorted(wanted - set(KINDS)):
        raise ValueError(f"kinds: expected some of {KINDS}, got {unknown}")
    return tuple(kind for kind in ORDER if kind in wanted)


def kinds_of(name: str) -> tuple[str, ...]:
    """Kinds by the name of a FoundIR type ("16Lowlight_Noise") or joined by "+" ("haze+rain"), in
    the order they are applied. ValueError for another name."""
    known = {each.lower(): kinds for each, kinds in FOUNDIR_TYPES.items()}
    try:
        return known.get(name.lower()) or in_order(name.split("+"))
    except ValueError:
        types = ", ".join(FOUNDIR_TYPES)
        raise ValueError(
            f"type: expected one of {types}, or some of {', '.join(KINDS)} joined by +; "
            f"got {name!r}"
        ) from None


def draw_parameters(
    kind: str, rng: np.random.Generator, fixed: Mapping[str, Value]
) -> dict[str, Value]:
    """Parameters of one damage, `model` among them; those in `fixed` are taken as given."""
    models = MODELS[kind]
    shares = [model.share for model in models.values()]
    drawn = list(models)[int(rng.choice(len(models), p=np.array(shares) / sum(shares)))]
    name = str(fixed.get("model", drawn))
    if name not in models:
        raise ValueError(f"{kind} model: expected one of {tuple(models)}, got {name!r}")
    ranges = models[name].ranges
    allowed = {"model", *ranges} | ({"read"} if "shot" in ranges else set())
    if unknown := sorted(set(fixed) - allowed):
        raise ValueError(f"{kind} ({name}): expected some of {sorted(allowed)}, got {unknown}")
    # A fixed parameter is drawn all the same, so that fixing one does not change the others.
    values: dict[str, Value] = {key: span.draw(rng) for key, span in ranges.items()}
    values.update(fixed)
    values["model"] = name
    if "shot" in ranges and "read" not in fixed:
        values["read"] = read_variance(float(values["shot"]), rng)
    return values


def degrade(
    image: np.ndarray,
    kinds: Iterable[str],
    rng: np.random.Generator,
    **fixed: Mapping[str, Value],
) -> tuple[np.ndarray, Label]:
    """Damage a picture with `kinds`, in composite order, and say with which parameters.

    image: [H, W, 3] float32 in [0, 1]; the result has the same shape, type and range. `fixed`
    overrides drawn parameters by kind: `noise={"model": "gaussian", "sigma": 25 / 255}`. Raises
    ValueError for another shape, an unknown kind, or an unknown model or parameter of a kind.
    """
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(f"image: expected shape [H, W, 3], got {image.shape}")
    ordered = in_order(kinds)
    if unused := sorted(set(fixed) - set(ordered)):
        raise ValueError(f"fixed parameters: expected for some of {ordered}, got {unused}")
    result = np.clip(image, 0.0, 1.0).astype(np.float32)
    parameters: dict[str, dict[str, Value]] = {}
    for kind in ordered:
        values = draw_parameters(kind, rng, fixed.get(kind, {}))
        parameters[kind] = dict(values)
        function = MODELS[kind][str(values.pop("model"))].function
        result = function(result, rng, **values)
    return np.clip(result, 0.0, 1.0).astype(np.float32), Label(ordered, parameters)


# Pictures that are left as they are: a good picture must not be made worse.
CLEAN_SHARE = 0.03


def sample_kinds(rng: np.random.Generator, mixtures: float = 0.3) -> tuple[str, ...]:
    """Kinds for one training picture: none in `CLEAN_SHARE` of the draws, a FoundIR mixture in
    `mixtures` of the others, else one kind."""
    if not 0 <= mixtures <= 1:
        raise ValueError(f"mixtures: expected a share in [0, 1], got {mixtures}")
    if rng.random() < CLEAN_SHARE:
        return ()
    if rng.random() < mixtures:
        combined = [kinds for kinds in FOUNDIR_TYPES.values() if len(kinds) > 1]
        return combined[int(rng.integers(len(combined)))]
    weights = np.array(list(SINGLE_WEIGHTS.values()))
    return (list(SINGLE_WEIGHTS)[int(rng.choice(len(weights), p=weights / weights.sum()))],)
