"""What the Wan adapter supports. No torch: run files are checked against it."""

from distill_protocols import Capabilities

CAPABILITIES = Capabilities(
    supports_cfg=True, supports_decode=True, supported_pred_types=frozenset({"v", "x0", "eps"})
)
