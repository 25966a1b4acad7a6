"""What a run tells: metrics, run.json, report.html and the screen."""
