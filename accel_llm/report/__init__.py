"""Output of a run: metrics, run.json, report.html and the screen."""
