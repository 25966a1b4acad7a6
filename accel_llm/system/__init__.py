"""The machine: disks, folders, files of tensors, memory, signals, and how a script ends."""
