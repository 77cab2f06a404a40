"""The planner's program and its pages (train/plan counts and times)."""
