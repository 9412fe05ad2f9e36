"""Forward-mode AD of whole networks: `jvp`, the `fused` mode, and the table of its rules."""
