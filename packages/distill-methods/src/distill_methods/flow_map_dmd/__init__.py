"""Flow maps on their own clips: distribution matching beside the loss of ``flow_map``."""
