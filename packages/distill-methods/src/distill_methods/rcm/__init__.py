"""rCM: continuous-time consistency, regularised by distribution matching."""
