"""Trained models at work, closed modules left out."""

# How a recognizer may execute gates: see `recognizer.Recognizer`.
EXECUTIONS = ('mask', 'bucketed', 'skip', 'scanned', 'static', 'layerwise', 'compact')
