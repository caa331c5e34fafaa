"""The cost model of docs/scaling.md: bytes that a rank receives in a step, memory it needs, seconds it takes.

W ranks, B records a rank, N image tokens of width Dv, T text tokens, E contrastive width, P trainable parameters. Nothing
here is measured; `scaling.py` measures the constants and checks the predictions.
"""

from dataclasses import dataclass

ID = 8  # int64


def gradient_bytes(ranks: int, parameters: int) -> float:
    """DDP's all-reduce of the float32 gradient, a ring: 8 P (W-1)/W. The same in both stages."""
    return 2 * (ranks - 1) / ranks * 4 * parameters


def stage1_bytes(
    ranks: int, batch: int, *, tokens: int, encoder_width: int, contrastive_width: int, text_tokens: int,
    feature_bytes: int = 4, masked: bool = False,
) -> dict[str, float]:  # fmt: skip
    """What ITC and ITM move, gradient of the weights aside; of what is fetched the most it can be.

    ITC: text embeddings gathered (4 B E) and their gradient summed (8 B E), a block of scores to and from every rank
    (4 B^2 each way), picture ids. ITM: only the B pictures and B texts drawn, and which they are.
    """
    others = ranks - 1
    longest = 2 * others / ranks * ID  # the ranks agree on a length
    scalars = (3 if masked else 1) * longest + 2 * others / ranks * ID  # and on how many pairs ITM counts
    fetched = batch if ranks > 1 else 0
    return {
        "text embeddings": others * batch * contrastive_width * (4 + 2 * 4),
        "scores": others * batch * batch * 4 * 2,
        "ids": others * batch * ID * (4 if masked else 3) + scalars,
        "features": fetched * tokens * (encoder_width * feature_bytes + masked),
        "texts": fetched * text_tokens * 2 * ID,
    }


def reference_stage1_bytes(
    ranks: int, batch: int, *, tokens: int, encoder_width: int, queries: int, contrastive_width: int, text_tokens: int,
    feature_bytes: int = 2,
) -> dict[str, float]:  # fmt: skip
    """The same of LAVIS: all features gathered with gradient, all queries' and texts' embeddings without.

    Source: LAVIS models/blip2_models/blip2_qformer.py, forward; float16 features, float32 embeddings.
    """
    others = ranks - 1
    features = others * batch * tokens * encoder_width * feature_bytes
    return {
        "features": features,
        "their gradient": 2 * features,  # an all-reduce of all of them
        "embeddings": others * batch * (queries + 1) * contrastive_width * 4,
        "texts": others * batch * text_tokens * 2 * ID,
    }


def sharding_bytes(ranks: int, frozen_bytes: float, reshard: bool = True) -> float:
    """FSDP2's gathers of a frozen model's blocks in forward and, if they were let go of, backward; per micro-batch."""
    return (ranks - 1) / ranks * frozen_bytes * (2 if reshard else 1)


@dataclass(frozen=True)
class Machine:
    """Rates of one rank: products a second as they are reached, bytes a second it receives within and across nodes."""

    name: str
    flop_per_s: float
    node_bytes_per_s: float
    network_bytes_per_s: float
    ranks_per_node: int

    def bytes_per_s(self, ranks: int) -> float:
        """A ring is as fast as its slowest link."""
        return self.node_bytes_per_s if ranks <= self.ranks_per_node else self.network_bytes_per_s


def step_seconds(machine: Machine, flop: float, hidden: float, exposed: float, ranks: int) -> float:
    """Seconds of a step.

    Args:
        hidden: bytes that travel while the backward pass, two thirds of the products, goes on.
        exposed: bytes that everything waits for.
    """
    compute, rate = flop / machine.flop_per_s, machine.bytes_per_s(ranks)
    return compute + exposed / rate + max(0.0, hidden / rate - compute * 2 / 3)


def transformer_flop(layers: int, width: int, ffn_width: int, tokens: int) -> float:
    """Products of one forward pass of a plain transformer over one row, a multiply and an add counted as two."""
    weights = 4 * width * width + 2 * width * ffn_width
    return layers * (2 * weights * tokens + 4 * tokens * tokens * width)


def similarity_bytes(ranks: int, batch: int, queries: int) -> float:
    """ITC's scores of every query, [B, Q, W B] in float32, and their gradient: what grows with the ranks in memory."""
    return 2 * 4 * batch * queries * ranks * batch


def trainable_bytes(parameters: int, ranks: int) -> float:
    """Weights, gradients and two moments in float32, and DDP's buckets."""
    return parameters * (16 + 4 * (ranks > 1))
