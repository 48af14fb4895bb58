"""What this host is and how its devices are doing. Everything is read in the background and answered from memory."""
