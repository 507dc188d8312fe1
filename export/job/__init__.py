"""A long, resumable job: staging, journal, progress, resources."""
