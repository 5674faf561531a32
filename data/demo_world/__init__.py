"""The demo world: pictures that can be read, questions about them, and step-by-step answers with real mistakes."""
