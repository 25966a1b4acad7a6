"""Where a run happens: strategies, the Accelerator, collectives, and every difference between backends with its reason."""
