"""Engine groups as the daemon sees them: spawned, spoken to, watched, rebuilt and killed. Nothing here knows torch."""
