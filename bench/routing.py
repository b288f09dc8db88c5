"""What the routers do with each kind of damage."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mimdit.mim import Routing

# Mean inter weights of the paper's Table 6: spatial, channel, Swin, SE.
PAPER: dict[str, tuple[float, float, float, float]] = {
    "blur": (0.3622, 0.1399, 0.3592, 0.1387),
    "noise": (0.3953, 0.2784, 0.1514, 0.1749),
    "haze": (0.1630, 0.4008, 0.2006, 0.2356),
    "rain": (0.3321, 0.1406, 0.3673, 0.1600),
    "low_light": (0.2081, 0.3716, 0.1423, 0.2780),
}


def picks(routing: Routing, experts: int) -> Tensor:
    """Share of each sub-expert among the picks of its group, [L,G,E], of one picture."""
    chosen = torch.nn.functional.one_hot(routing.index[:, 0], experts)  # [L,G,k,E]
    return chosen.float().mean(-2)


def mutual_information(labels: Sequence[str], shares: Tensor) -> Tensor:
    """Bits that a pick tells about the label, [L,G]; shares [N,L,G,E] of N labelled pictures.

    I = Σ p(label, expert) · log2 p(label, expert) / (p(label) p(expert)), labels weighted evenly.
    """
    names = sorted(set(labels))
    joint = torch.stack(
        [shares[torch.tensor([x == name for x in labels])].mean(0) for name in names]
    ) / len(names)  # [labels,L,G,E]
    independent = joint.sum(0, keepdim=True) / len(names)
    return (joint * (joint / independent).clamp(min=1e-12).log2()).nan_to_num().sum((0, -1))


def by_label(labels: Sequence[str], inter: Tensor) -> dict[str, Tensor]:
    """Mean inter weights [G] of the pictures of each label; inter [N,G]."""
    return {
        name: inter[torch.tensor([x == name for x in labels])].mean(0)
        for name in dict.fromkeys(labels)
    }


def report(labels: Sequence[str], inter: Tensor, shares: Tensor, groups: Sequence[str]) -> str:
    """Inter weights by damage beside the paper's, and what the picks tell about single damages.

    labels: kinds of each of N pictures, joined by "+". inter [N,G], shares [N,L,G,E] (`picks`).
    """
    found = table(by_label(labels, inter), groups)
    single = [i for i, label in enumerate(labels) if "+" not in label]
    if not single:
        return found
    some = shares[torch.tensor(single)]
    bits = mutual_information([labels[i] for i in single], some)
    return (
        f"{found}\n\nMutual information of damage and chosen sub-experts: "
        f"mean {bits.mean():.2f}, largest {bits.max():.2f} bits of a group; the least used "
        f"sub-expert has {some.mean(0).min():.1%} of the picks of its group."
    )


def table(inter: Mapping[str, Tensor], groups: Sequence[str]) -> str:
    """Markdown: mean inter weights by damage, [G] each, beside the paper's."""
    lines = [
        "| damage | " + " | ".join(groups) + " | paper: spatial | channel | swin | SE |",
        "|---" * (len(groups) + 5) + "|",
    ]
    for damage, weights in inter.items():
        own = " | ".join(f"{w:.3f}" for w in weights.tolist())
        paper = " | ".join(f"{w:.3f}" for w in PAPER[damage]) if damage in PAPER else " | | | "
        lines.append(f"| {damage} | {own} | {paper} |")
    return "\n".join(lines)
