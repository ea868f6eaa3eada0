"""Rules side by side at an equal budget: accuracy, speed, memory, over seeds."""
