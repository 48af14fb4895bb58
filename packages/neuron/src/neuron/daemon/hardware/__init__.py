"""Host and devices, and how they are doing. Everything is read in the background and answered from memory."""
