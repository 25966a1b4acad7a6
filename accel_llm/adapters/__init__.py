"""What is trained beside a model: attaching an adapter, and reading and writing its folder."""
