"""rCM: continuous-time consistency, held to the teacher's distribution."""
