"""Distribution matching: the student's and the critic's loss, for any rollout of a method."""
