"""The training room: data, AdamW, schedules, the step, checkpoints to resume from, and the loop."""
