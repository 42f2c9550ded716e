"""How a run is distributed over processes: what is sharded, how gradients are averaged."""
