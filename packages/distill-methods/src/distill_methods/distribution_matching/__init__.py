"""What all distribution matching has in common: no method, but the two turns of one."""
