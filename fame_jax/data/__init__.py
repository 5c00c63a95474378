"""From raw logs to batches; numpy only, no jax."""
