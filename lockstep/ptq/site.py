"""`Site`: a tensor of a model, or a part of a tensor, that hardware would keep on a grid."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Site:
    """One place where numbers are rounded.

    name: as in rules: "L3.q", "L3.qk", "L3.q.w", "embed". heads: how many heads may have a grid each. width: elements
    in a row of one head; 0: one for each key that the token sees. layer: of the decoder, None outside of the layers.
    is_weight: a weight [features, width], else an activation. is_inner: the site exists only if the op that makes it is
    taken apart.
    """

    name: str
    heads: int = 1
    width: int = 0
    layer: int | None = None
    is_weight: bool = False
    is_inner: bool = False
