"""DMD2: distribution matching with a teacher and a critic."""
