"""A site: a tensor of a model, or a part of one, that hardware would keep on a grid."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One place where numbers are rounded.

    name: as rules name it: "L3.q", "L3.qk", "L3.q.w", "embed.out". heads: how many heads have a grid each where the
    plan says so. width: numbers of a row of one head; 0: as many as the token sees keys. layer: of the decoder, None
    outside of all. is_weight: a constant of the model, [features, width], else an activation. is_inner: it exists only
    where the op that makes it is taken apart.
    """

    name: str
    heads: int = 1
    width: int = 0
    layer: int | None = None
    is_weight: bool = False
    is_inner: bool = False
