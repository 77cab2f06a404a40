"""Programs that measure, and write what they measured to `bench/` with hardware, commit, command and date."""
