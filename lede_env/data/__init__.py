"""Files: trajectories (`trajectory_file`), and later traces, the dataset registry and exporters."""
