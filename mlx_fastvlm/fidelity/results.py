"""What a comparison of two models found, as plain values: frozen, and the same after a trip through JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Cosine:
    """Cosine similarity of the candidate's feature rows with the reference's; 1 means the same direction.

    Attributes:
        mean: over all rows of all images.
        worst: of the row that differs most.
    """

    mean: float
    worst: float


@dataclass(frozen=True)
class NextToken:
    """Next-token distributions at every position of the reference's own greedy answers.

    Attributes:
        positions: how many were compared, the end of each answer included.
        kl_mean, kl_median, kl_max: KL(reference ‖ candidate) in nats.
        top1_agreement: share of positions at which both find the same token likeliest.
        reference_perplexity, candidate_perplexity: of the reference's answers under either model.
    """

    positions: int
    kl_mean: float
    kl_median: float
    kl_max: float
    top1_agreement: float
    reference_perplexity: float
    candidate_perplexity: float

    @property
    def perplexity_change(self) -> float:
        """Relative: 0.01 is 1% worse."""
        return self.candidate_perplexity / self.reference_perplexity - 1


@dataclass(frozen=True)
class Answers:
    """Greedy answers of both models to the same questions.

    Attributes:
        first_divergences: for each answer, the index of the first token that differs; None where all are the same.
    """

    first_divergences: tuple[int | None, ...]

    @property
    def identical(self) -> float:
        """Share of answers that are the same, token for token."""
        return sum(index is None for index in self.first_divergences) / len(self.first_divergences)

    @property
    def median_divergence(self) -> float | None:
        """Median index of the first different token, over the answers that do differ."""
        indices = sorted(index for index in self.first_divergences if index is not None)
        middle = len(indices) // 2
        return (indices[middle] + indices[~middle]) / 2 if indices else None


@dataclass(frozen=True)
class Measured:
    """A repeated measurement: its median, and its samples in the order they were taken."""

    median: float
    samples: tuple[float, ...]


@dataclass(frozen=True)
class Speed:
    """What a model needs to answer, taken in processes that hold nothing else.

    Attributes:
        ttft_s: seconds from the image's bytes to the first token.
        decode_tps: tokens per second after the first, over answers of a fixed length.
        peak_rss_bytes: most memory the process has had resident, loading included.
        peak_mlx_bytes: most memory MLX has held, loading included.
    """

    ttft_s: Measured
    decode_tps: Measured
    peak_rss_bytes: Measured
    peak_mlx_bytes: Measured


@dataclass(frozen=True)
class ModelFacts:
    """One of the two models.

    Attributes:
        name: its folder's name, or "demo"; never a path.
        weight_bytes: size on disk of all its weights.
        dtype: type it computed in.
        recipe: name of the recipe it was quantized by, None where nothing is quantized.
        provenance: source, license, bits per weight and so on, from its conversion.json; empty where it has none.
        speed: None where it was not measured.
    """

    name: str
    weight_bytes: int
    dtype: str
    recipe: str | None
    provenance: dict[str, Any]
    speed: Speed | None = None


@dataclass(frozen=True)
class Fidelity:
    """A candidate measured against its reference.

    Attributes:
        tower_features, image_features: of the vision tower's rows, and of the same rows behind the projector. None
            where the two models' rows have different widths.
        pictures: "generated" for the built-in ones, "own" for the user's.
        num_images, prompts, max_tokens: what was asked.
        machine: where it was measured, see `benchmarks.machine.describe_machine`; its `time` is the date.
        kv_bits: how the candidate held keys and values; None as they are computed.
    """

    reference: ModelFacts
    candidate: ModelFacts
    tower_features: Cosine | None
    image_features: Cosine | None
    next_token: NextToken
    answers: Answers
    pictures: str
    num_images: int
    prompts: tuple[str, ...]
    max_tokens: int
    machine: dict[str, Any]
    kv_bits: int | None = None

    @property
    def size_ratio(self) -> float:
        """Candidate's weights on disk over the reference's."""
        return self.candidate.weight_bytes / self.reference.weight_bytes

    def to_dict(self) -> dict[str, Any]:
        """The JSON form. It also holds the figures that follow from others, for readers without this class."""
        value = asdict(self)
        value["next_token"]["perplexity_change"] = self.next_token.perplexity_change
        value["answers"]["identical"] = self.answers.identical
        value["answers"]["median_divergence"] = self.answers.median_divergence
        return {"format": FORMAT_VERSION, **value, "size_ratio": self.size_ratio}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Fidelity:
        """Build from what `to_dict` gave.

        Raises:
            ValueError, KeyError, TypeError: it is something else.
        """
        if value["format"] != FORMAT_VERSION:
            raise ValueError(f"format {value['format']!r} is not {FORMAT_VERSION}")
        next_token = {name: value["next_token"][name] for name in NextToken.__dataclass_fields__}
        return cls(
            reference=_facts(value["reference"]),
            candidate=_facts(value["candidate"]),
            tower_features=value["tower_features"] and Cosine(**value["tower_features"]),
            image_features=value["image_features"] and Cosine(**value["image_features"]),
            next_token=NextToken(**next_token),
            answers=Answers(tuple(value["answers"]["first_divergences"])),
            pictures=value["pictures"],
            num_images=value["num_images"],
            prompts=tuple(value["prompts"]),
            max_tokens=value["max_tokens"],
            machine=value["machine"],
            kv_bits=value.get("kv_bits"),
        )


def with_speed(facts: ModelFacts, speed: Speed | None) -> ModelFacts:
    """`facts` with a measured speed."""
    return replace(facts, speed=speed)


def _facts(value: Mapping[str, Any]) -> ModelFacts:
    speed = value["speed"]
    return ModelFacts(**{**value, "speed": speed and Speed(**{name: _measured(speed[name]) for name in speed})})


def _measured(value: Mapping[str, Any]) -> Measured:
    return Measured(value["median"], tuple(value["samples"]))
