"""Which linears are adapted, and which weights stay in 16 bits.

How: a target is a projection's own name (`q_proj`) or one of three sets of them; the sets are looked up in a table by
the names that the field's model classes use. One rule, `stays_16bit`, decides what is never quantized, for loading
and for planning alike.
"""

from collections.abc import Iterable

from qmica.errors import QmicaError

# The projections of transformers' decoder layers, by what they compute (fused ones of phi3 included).
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "qkv_proj")
FEED_FORWARD = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")
SETS = {
    "qv": ("q_proj", "v_proj"),
    "attn": ATTENTION,
    "mlp": FEED_FORWARD,
    "all": ATTENTION + FEED_FORWARD,
}


def stays_16bit(name: str) -> bool:
    """Whether the weight or module of this dotted name is kept in 16 bits: embeddings, the output head, norms and
    biases.

    Only the 2-D projections inside decoder layers are quantized, as transformers and bitsandbytes do by default.
    """
    module = name.removesuffix(".weight")
    return name.endswith(".bias") or ".layers." not in f".{name}" or "norm" in module.rsplit(".", 1)[-1]


def select(linears: Iterable[str], targets: str) -> list[str]:
    """The dotted module names among `linears` that `targets` names: qv, attn, mlp, all, or projections
    (`q_proj,down_proj`).

    Raises QmicaError for a name that no linear has, with the names there are.
    """
    linears = [name for name in linears if not stays_16bit(name)]
    present = {name.rsplit(".", 1)[-1] for name in linears}
    wanted = SETS.get(targets) or tuple(part.strip() for part in targets.split(",") if part.strip())
    unknown = [name for name in wanted if name not in present] if targets not in SETS else []
    chosen = [name for name in linears if name.rsplit(".", 1)[-1] in wanted]
    if unknown or not chosen:
        missing = ", ".join(unknown) or targets or "''"
        raise QmicaError(
            f"targets: no linear of this model is called {missing}; there are {', '.join(sorted(present)) or 'none'}, "
            f"and the sets {', '.join(SETS)}"
        )
    return chosen
