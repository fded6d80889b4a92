"""What a smaller shape costs in perplexity: SmolLM2-135M on WikiText-2, with fewer or narrower blocks.

    .venv/bin/python -m bench.structure [--only influence-3 perplexity-3] [--num-samples 64]

As bench.quality does it: the same calibration samples, the same tokens of the test text, in float32 by plain
transformers, and what was measured is kept in .bench/quality.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from bench.materials import smollm2
from bench.quality import Losses, print_claims, shown

COUNTS = (3, 6)
DEPTH, WIDTH = {"technique": "depth_pruning"}, {"technique": "width_pruning"}
# Of 1536 neurons, 3 key-value heads with 3 heads each, and 576 channels.
PARTS = {"neurons": {"intermediate_size": 1280}, "heads": {"num_key_value_heads": 2}, "channels": {"hidden_size": 504}}
SETTINGS: dict[str, dict[str, Any]] = {
    **{f"influence-{count}": {**DEPTH, "num_blocks": count} for count in COUNTS},
    **{f"perplexity-{count}": {**DEPTH, "method": "perplexity", "num_blocks": count} for count in COUNTS},
    # What needs no measuring: the last blocks but one.
    **{f"late-{count}": {**DEPTH, "method": "list", "blocks": list(range(29 - count, 29))} for count in COUNTS},
    **{f"{part}-activations": {**WIDTH, **sizes} for part, sizes in PARTS.items()},
    **{f"{part}-magnitude": {**WIDTH, **sizes, "importance": "magnitude"} for part, sizes in PARTS.items()},
}
CLAIMS = [
    *((f"perplexity-{count}", f"influence-{count}") for count in COUNTS),
    *((f"influence-{count}", f"late-{count}") for count in COUNTS),
    *((f"{part}-activations", f"{part}-magnitude") for part in PARTS),
]


def main() -> None:
    """Measure what is not known yet and print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="*", choices=SETTINGS, metavar="SETTING", default=list(SETTINGS))
    arguments.add_argument("--num-samples", type=int, default=64)
    options = arguments.parse_args()
    losses = Losses(options.num_samples)
    losses.of("original", lambda _: smollm2())
    for name in options.only:
        losses.of(name, partial(losses.compress, SETTINGS[name]))
    for name in ("original", *SETTINGS):
        if name in losses.known:
            print(f"| {name} | {shown(losses.known[name])} |")
    print_claims(CLAIMS, losses.known)


if __name__ == "__main__":
    main()
